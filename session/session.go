package session

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"gatehouse/auth"
)

// State is how a remote stands for one principal.
type State string

const (
	StateConnecting   State = "connecting"   // not known yet
	StateConnected    State = "connected"    // and its tools listed
	StateSignInNeeded State = "signInNeeded" // it wants a token that there is not
	StateUnavailable  State = "unavailable"  // it failed
	StateUnsupported  State = "unsupported"  // it speaks another protocol version
)

// Status is what there is to say about one remote.
type Status struct {
	State    State
	Err      error     // why it is not connected; nil if it is, or if it is not known yet
	Since    time.Time // when it came to that
	Retried  bool      // it is tried again by itself
	Tools    int       // as last listed
	Server   string    // what the remote calls itself
	Version  string    // and its version
	Protocol string    // the protocol version agreed on
}

// Session is what is held for one principal: a connection to each remote, and
// their catalogs. A [Pool] makes it.
type Session struct {
	pool        *Pool
	principal   auth.Principal
	owner       json.RawMessage // the profile of its one client; nil: not known, or several
	log         *slog.Logger
	ctx         context.Context // of all that goes on in the background
	cancel      context.CancelCauseFunc
	connections []*connection // in config order
	byName      map[string]*connection
	level       atomic.Pointer[string] // of log messages, nil: each remote's own choice
	questions   questions
	updatedFunc atomic.Pointer[func(remote, subscribed string, params json.RawMessage)]

	mu       sync.Mutex // guards closed and watchers
	closed   bool
	watchers map[*func()]struct{}
	wg       sync.WaitGroup // grows under mu only, and not once closed

	closing sync.Once
	dirty   atomic.Bool
	telling sync.Mutex // one round of calls to the watchers at a time

	updateMu sync.Mutex // guards both
	updates  []update   // of what is common to all, that are still to be told
	updating bool       // somebody is telling them
}

func newSession(p *Pool, principal auth.Principal, owner json.RawMessage) *Session {
	s := emptySession(p, principal, owner, p.log.With("principal", principal))
	for _, r := range p.remotes {
		c := newConnection(s, r)
		c.join()
		s.add(c)
	}
	return s
}

// emptySession makes a session without connections.
func emptySession(p *Pool, principal auth.Principal, owner json.RawMessage, log *slog.Logger) *Session {
	s := &Session{
		pool:      p,
		principal: principal,
		owner:     owner,
		log:       log,
		byName:    make(map[string]*connection, len(p.remotes)),
		watchers:  map[*func()]struct{}{},
	}
	s.ctx, s.cancel = context.WithCancelCause(p.ctx)
	return s
}

func (s *Session) add(c *connection) {
	s.connections = append(s.connections, c)
	s.byName[c.remote.Name] = c
}

// Call sends one request to a remote and returns its result, byte for byte.
// Params must be valid JSON, an object, or nil for none; they are sent as they
// are, but for a progress token, which the remote gets another one for, and
// what protocol 2026-07-28 says under _meta. What belongs to the request is
// given to from, in order and with the progress token of params, before Call
// returns; from may be nil, and its functions must not wait for Close.
//
// A result of a remote of 2026-07-28 may be one that asks for input (its
// resultType says so): the caller's business.
//
// The error is a [*ResponseError] if the remote answered with one; it has a
// [*auth.RequiredError] in it if somebody must sign in first, an [*auth.Error]
// if that could not be prepared, a [*Failure] if there was no proper answer, or
// ctx's own.
func (s *Session) Call(ctx context.Context, remote, method string, params json.RawMessage, from *Caller) (json.RawMessage, error) {
	c := s.byName[remote]
	if c == nil {
		return nil, ErrUnknownRemote
	}
	if !s.enter() {
		return nil, ErrClosed
	}
	defer s.wg.Done()
	if from == nil {
		from = &Caller{}
	}
	return c.call(ctx, method, params, from)
}

// Catalogs returns the catalogs of all remotes in config order. It waits until
// each remote has answered or failed once, or ctx is done, and returns what is
// known then.
func (s *Session) Catalogs(ctx context.Context) []Catalog {
	catalogs := make([]Catalog, len(s.connections))
	for i, c := range s.connections {
		select {
		case <-c.answered:
		case <-ctx.Done():
		case <-s.ctx.Done():
		}
		catalogs[i] = c.currentCatalog()
	}
	return catalogs
}

// refreshFloor is how often lists are read anew at the most because they have
// become old.
const refreshFloor = 5 * time.Second

// Refresh has lists read anew that may be out of date: their time is over, and
// the remote does not say when they change. Nobody waits for it.
func (s *Session) Refresh() {
	now := time.Now()
	for _, c := range s.connections {
		c = c.main()
		c.mu.Lock()
		stale := c.link != nil && c.catalog.Known && c.listedAt.Add(refreshFloor).Before(now)
		if stale {
			o := c.link.offers
			told := [...]bool{o.ToolsChange, o.PromptsChange, o.ResourcesChange, o.ResourcesChange}
			stale = false
			for i, hint := range c.catalog.Hints {
				stale = stale || !told[i] && hint.Until.Before(now)
			}
		}
		c.mu.Unlock()
		if stale {
			c.changed()
		}
	}
}

// Connect makes sure that the remote is connected and its tools listed, both
// as of now. If that takes a sign-in it starts one, and its error says so as
// that of [Session.Call] does. What it began goes on when ctx is done.
func (s *Session) Connect(ctx context.Context, remote string) error {
	c := s.byName[remote]
	if c == nil {
		return ErrUnknownRemote
	}
	for {
		err := c.joined().connect(ctx)
		if errors.Is(err, errApart) {
			continue
		}
		if err == nil {
			s.tell() // in case that goes on in the background
		}
		return err
	}
}

// Disconnect closes the connection to a remote and forgets its catalog: the
// principal has signed out there.
func (s *Session) Disconnect(remote string) {
	if c := s.byName[remote]; c != nil {
		c.disconnect()
	}
}

// Status returns how a remote stands; the zero Status for one that there is not.
func (s *Session) Status(remote string) Status {
	c := s.byName[remote]
	if c == nil {
		return Status{}
	}
	c = c.main()
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.status
}

// OnChange has f called whenever the catalogs may have changed, until cancel is
// called. Changes in quick succession may come as one. Who waits for a
// connection sees f called before the wait ends, so f must not itself wait for
// [Session.Connect] or Close.
func (s *Session) OnChange(f func()) (cancel func()) {
	key := &f
	s.mu.Lock()
	defer s.mu.Unlock()
	s.watchers[key] = struct{}{}
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.watchers, key)
	}
}

// changed tells the watchers. When it returns, a round of calls that began
// after it was called is over.
func (s *Session) changed() {
	s.dirty.Store(true)
	s.tell()
}

// tell tells the watchers of changes that they have not been told of.
func (s *Session) tell() {
	s.telling.Lock()
	defer s.telling.Unlock()
	if !s.dirty.Swap(false) {
		return // a round that began later has just ended
	}
	s.mu.Lock()
	watchers := make([]func(), 0, len(s.watchers))
	for f := range s.watchers {
		watchers = append(watchers, *f)
	}
	s.mu.Unlock()
	for _, f := range watchers {
		f()
	}
}

// Close ends what is in flight, ends the MCP sessions at the remotes as far as
// they answer in time, and waits. The pool forgets the session. Twice is safe.
func (s *Session) Close() {
	s.pool.forget(s)
	ctx, cancel := context.WithTimeout(context.Background(), goodbyeTimeout)
	defer cancel()
	s.close(ctx)
}

func (s *Session) close(ctx context.Context) {
	s.closing.Do(func() {
		s.mu.Lock()
		s.closed = true
		s.mu.Unlock()
		s.cancel(ErrClosed)
		s.wg.Wait()
		var farewells sync.WaitGroup
		for _, c := range s.connections {
			c.remote.recovery.leave(c)
			for _, l := range c.takeLinks() {
				farewells.Go(func() { s.pool.farewell(ctx, func() { l.via.end(ctx, l.header) }) })
			}
			farewells.Go(c.leaving.Wait)
			if common := c.leave(false); common != nil {
				farewells.Go(func() { common.close(ctx) })
			}
		}
		farewells.Wait()
	})
}

// spawn runs f in a goroutine that Close waits for, unless it has begun.
func (s *Session) spawn(f func()) bool {
	if !s.enter() {
		return false
	}
	go func() {
		defer s.wg.Done()
		f()
	}()
	return true
}

func (s *Session) enter() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false
	}
	s.wg.Add(1)
	return true
}
