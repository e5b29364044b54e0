package session

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"sync"
	"time"

	"golang.org/x/oauth2"

	"gatehouse/auth"
	"gatehouse/auth/guard"
)

const (
	defaultTimeout     = 60 * time.Second
	defaultMaxSessions = 10_000
	maxFarewells       = 64 // DELETEs at once when everything ends
)

// Remote is what a connection needs to know of one remote.
type Remote struct {
	Name       string
	URL        string                          // empty for a command
	SSE        bool                            // it speaks the deprecated HTTP+SSE transport
	Command    *Command                        // nil: it is at the URL
	Headers    http.Header                     // of every request; what the protocol sets itself stays its own; may be nil
	Timeout    time.Duration                   // of one call; 0: 60 s
	HTTP       *guard.Client                   // towards this remote, required
	Authorizer func(auth.Principal) Authorizer // nil: no sign-in there, so what keeps no state is everybody's
}

// Authorizer is what [auth.Authorizer] does for one principal at one remote.
//
// Streams ask under [auth.NoRefresh]: then only what is at hand is of use.
type Authorizer interface {
	// Token returns the token to send, or nil if there is none.
	Token(ctx context.Context) (*oauth2.Token, error)
	// Renew answers a 401 without starting a sign-in: nil if there is another
	// token now, [auth.ErrSignInNeeded] if there is no silent way to one.
	Renew(ctx context.Context, resp *http.Response) error
	// Challenge answers a 401 or 403: nil if there is another token now, or an
	// error with the link that somebody has to open in it.
	Challenge(ctx context.Context, resp *http.Response) error
}

// Memory keeps what remotes have listed from one run to the next ([auth.Broker]
// is one). What it fails at is lost, and no harm.
type Memory interface {
	Remember(ctx context.Context, p auth.Principal, remote, url string, listed []byte) error
	Recall(ctx context.Context, p auth.Principal, remote, url string) ([]byte, error)
	Unremember(ctx context.Context, p auth.Principal, remote, url string) error
}

// Config says what a pool connects to.
type Config struct {
	Remotes     []Remote // in config order, names unique
	Name        string   // how the gateway introduces itself to remotes
	Version     string
	Log         *slog.Logger // required
	Memory      Memory       // may be nil
	MaxSessions int          // at once; 0: 10,000
}

// Pool holds the sessions of all principals. It is made with [New] and ended
// with [Pool.Close].
type Pool struct {
	info      json.RawMessage // how the gateway introduces itself
	log       *slog.Logger
	memory    Memory
	max       int
	remotes   []*remote
	farewells chan struct{}
	ctx       context.Context // of all that goes on in the background
	cancel    context.CancelCauseFunc
	closing   sync.Once

	mu       sync.Mutex // guards closed and sessions
	closed   bool
	sessions map[auth.Principal]*Session
	wg       sync.WaitGroup // grows under mu only, and not once closed
}

// New makes a pool. Nothing is dialed before the first [Pool.Open].
func New(cfg Config) *Pool {
	p := &Pool{
		info:      implementation(cfg.Name, cfg.Version),
		log:       cfg.Log,
		memory:    cfg.Memory,
		max:       cfg.MaxSessions,
		farewells: make(chan struct{}, maxFarewells),
		sessions:  map[auth.Principal]*Session{},
	}
	if p.max == 0 {
		p.max = defaultMaxSessions
	}
	p.ctx, p.cancel = context.WithCancelCause(context.Background())
	for _, r := range cfg.Remotes {
		made := newRemote(r, cfg.Log)
		made.recovery = newRecovery(p, made)
		p.remotes = append(p.remotes, made)
	}
	return p
}

func newRemote(r Remote, log *slog.Logger) *remote {
	if r.Timeout == 0 {
		r.Timeout = defaultTimeout
	}
	made := &remote{Remote: r, header: http.Header{}, slots: slots{max: maxPrograms, taken: map[*slot]struct{}{}}}
	if r.Command != nil {
		made.url, made.display = &url.URL{}, r.Command.Path
		return made
	}
	made.client = r.HTTP.Stream()
	if r.SSE {
		made.eras.Store(int32(eraLegacy)) // the transport is older than the modern era
	}
	u, err := url.Parse(r.URL)
	if err != nil {
		u = &url.URL{} // the guarded client refuses it, and its failure says so
	}
	made.url = u
	made.display = (&url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path}).String()
	for name, values := range r.Headers {
		name = http.CanonicalHeaderKey(name)
		if reserved(name) {
			log.Warn("configured header is not sent: the protocol or the HTTP client sets it", "remote", r.Name, "header", name)
			continue
		}
		made.header[name] = values
	}
	made.header = made.requestHeader()
	return made
}

// Open returns the principal's session. A new one begins to dial all remotes in
// the background.
func (p *Pool) Open(principal auth.Principal) (*Session, error) { return p.OpenFor(principal, nil) }

// OpenFor is Open for a principal that has one client only, which declares
// these capabilities (MCP ClientCapabilities): so do its connections then, from
// the first on. Nil: not known, or more than one client.
func (p *Pool) OpenFor(principal auth.Principal, capabilities json.RawMessage) (*Session, error) {
	var owner json.RawMessage
	if capabilities != nil {
		owner = Profile(capabilities)
	}
	s, made, err := p.open(principal, owner)
	if made {
		for _, c := range s.connections {
			c.remote.recovery.soon(c)
		}
	}
	return s, err
}

func (p *Pool) open(principal auth.Principal, owner json.RawMessage) (s *Session, made bool, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, false, ErrClosed
	}
	if s := p.sessions[principal]; s != nil {
		return s, false, nil
	}
	if len(p.sessions) >= p.max {
		return nil, false, ErrFull
	}
	s = newSession(p, principal, owner)
	p.sessions[principal] = s
	return s, true, nil
}

// End closes a principal's session, if there is one.
func (p *Pool) End(principal auth.Principal) {
	p.mu.Lock()
	s := p.sessions[principal]
	p.mu.Unlock()
	if s != nil {
		s.Close()
	}
}

// Connections returns how many principals are connected to each remote.
func (p *Pool) Connections() map[string]int {
	p.mu.Lock()
	sessions := slices.Collect(maps.Values(p.sessions))
	p.mu.Unlock()
	connected := make(map[string]int, len(p.remotes))
	for i, r := range p.remotes {
		connected[r.Name] = 0
		for _, s := range sessions {
			if s.connections[i].currentCatalog().Connected {
				connected[r.Name]++
			}
		}
	}
	return connected
}

// Forget takes a session out of the table, so that the next [Pool.Open] makes
// another. It is the caller's to close.
func (p *Pool) Forget(s *Session) { p.forget(s) }

// forget takes a session that ends out of the table.
func (p *Pool) forget(s *Session) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.sessions[s.principal] == s {
		delete(p.sessions, s.principal)
	}
}

// Close ends all sessions and waits for everything that they began. Twice is
// safe.
func (p *Pool) Close() { p.closing.Do(p.close) }

func (p *Pool) close() {
	p.mu.Lock()
	p.closed = true
	sessions := p.sessions
	p.sessions = map[auth.Principal]*Session{}
	p.mu.Unlock()
	p.cancel(ErrClosed)
	// One deadline for all: a remote that is down must not hold up the end once
	// for each principal.
	ctx, cancel := context.WithTimeout(context.Background(), goodbyeTimeout)
	defer cancel()
	var ending sync.WaitGroup
	for _, s := range sessions {
		ending.Go(func() { s.close(ctx) })
	}
	ending.Wait()
	p.wg.Wait()
}

// farewell runs f when few others are at it, unless ctx is done before.
func (p *Pool) farewell(ctx context.Context, f func()) {
	select {
	case p.farewells <- struct{}{}:
		defer func() { <-p.farewells }()
		f()
	case <-ctx.Done():
	}
}

// spawn runs f in a goroutine that Close waits for, unless it has begun.
func (p *Pool) spawn(f func()) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return false
	}
	p.wg.Go(f)
	return true
}

// Probe sends initialize to a remote as somebody who has no token and returns
// the answer without its body.
func Probe(ctx context.Context, r Remote, name, version string) (*http.Response, error) {
	made := newRemote(r, slog.New(slog.DiscardHandler))
	made.Authorizer = nil
	params, err := initializeParams(implementation(name, version), json.RawMessage("{}"))
	if err != nil {
		return nil, err
	}
	body, err := appendRequest(nil, 1, "initialize", params)
	if err != nil {
		return nil, err
	}
	ctx, cancel := within(ctx, dialTimeout)
	defer cancel()
	w := wire{remote: made}
	resp, err := w.send(ctx, http.MethodPost, made.header, body)
	if err != nil {
		return nil, fmt.Errorf("sending initialize: %w", err)
	}
	drain(resp.Body)
	resp.Body.Close()
	resp.Body = http.NoBody
	if ids := resp.Header[headerSession]; len(ids) == 1 {
		// It lets everybody in, and has begun an MCP session.
		header := made.requestHeader()
		header[headerSession], header[headerProtocol] = ids, []string{offered}
		w.end(ctx, header)
	}
	return resp, nil
}
