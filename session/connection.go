package session

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"gatehouse/auth"
	"gatehouse/session/rawjson"
)

const (
	dialTimeout      = 15 * time.Second       // of initialize, and again of initialized
	challengeTimeout = 30 * time.Second       // of finding out how to sign in
	pageTimeout      = 15 * time.Second       // of one page of a list
	listTimeout      = 60 * time.Second       // after which no further page is asked for
	asideTimeout     = 5 * time.Second        // of a message that nobody waits for
	goodbyeTimeout   = 2 * time.Second        // of the DELETE that ends an MCP session
	listFloor        = 100 * time.Millisecond // between two listings that nobody waits for
	maxSessionID     = 4096
)

// offered is the protocol version that initialize asks for, accepted what the
// remote may answer.
const offered = "2025-11-25"

var accepted = []string{offered, "2025-06-18", "2025-03-26", "2024-11-05"}

const codeUnsupportedVersion = -32022

// connection is one principal's way to one remote. It is there from the
// session's beginning to its end, whether or not the remote is. Where all have
// one connection in common, that has the main link and the catalog, and the
// principal's own has the links of clients that can be asked something.
type connection struct {
	session *Session
	remote  *remote
	wire    wire
	common  atomic.Pointer[connection] // nil: there is none
	shared  bool                       // it is the common one, and its session nobody's
	resting atomic.Bool                // it has left the common one, until it is needed
	ids     atomic.Int64               // of our requests, over all links
	asides  asides
	wanting atomic.Bool // the state is StateSignInNeeded
	said    atomic.Bool // the remote has said that its tools have changed: clients hear of it even if they look the same

	answered     chan struct{} // closed when the remote has been listed or has failed, once
	answeredOnce sync.Once
	recalled     sync.Once // what was listed in an earlier run
	memo         memo

	leaving sync.WaitGroup // goodbyes that the session does not wait for; grows under mu, until takeLinks

	mu         sync.Mutex // guards all below; never held over the network
	epoch      int        // counts disconnects: what began before one does not count after it
	link       *link      // nil: not connected
	dialing    *attempt   // nil: none in flight
	listing    *attempt   // nil: none in flight
	listed     *attempt   // the last listing that ended
	listedAt   time.Time
	listings   int                      // begun so far
	relist     bool                     // the list has changed while it was being read
	subscribed map[string]*subscription // by the URI of the resource
	listens    *listens                 // what a modern remote is asked to tell; nil: none is open
	sides      map[sideKey]*side
	headers    map[string][]ParamHeader // of tools that have some, as last listed
	catalog    Catalog
	status     Status
	apart      bool   // a common connection that nobody uses any more: the remote keeps state
	found      *link  // by which it knows that, until somebody inherits it
	remembered uint64 // the generation of the common catalog that is kept for the principal
}

// attempt is a dial or a listing in flight. It runs under the session's
// context; whoever needs it waits under their own.
type attempt struct {
	seq   int // of a listing
	epoch int
	loud  bool // may start a sign-in
	told  bool // a listing because of a change; guarded by the connection's mu
	done  chan struct{}
	link  *link // like err, set before done is closed
	err   error
}

// errStale: the attempt began before a disconnect and ended after it.
var errStale = errors.New("disconnected meanwhile")

func newConnection(s *Session, r *remote) *connection {
	c := &connection{
		session:    s,
		remote:     r,
		wire:       wire{remote: r},
		answered:   make(chan struct{}),
		subscribed: map[string]*subscription{},
		catalog:    Catalog{Remote: r.Name},
		status:     Status{State: StateConnecting, Since: time.Now()},
	}
	if r.Authorizer != nil {
		c.wire.auth = r.Authorizer(s.principal)
	}
	return c
}

// call sends one request on behalf of a client, dialing first if need be.
func (c *connection) call(ctx context.Context, method string, params json.RawMessage, from *Caller) (json.RawMessage, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	timer := time.AfterFunc(c.remote.Timeout, func() { cancel(&deadline{c.remote.Timeout, true}) })
	defer timer.Stop()
	stop := context.AfterFunc(c.session.ctx, func() { cancel(ErrClosed) })
	defer stop()
	patient := &patience{timer: timer, length: c.remote.Timeout}
	params, err := withoutEnvelope(params)
	if err != nil {
		return nil, fmt.Errorf("reading _meta: %w", err)
	}

	ctx = auth.ForOperation(ctx, func() string { return operation(method, params) })

	for try := 0; ; try++ {
		l, release, err := c.linkFor(ctx, from)
		if err != nil {
			return nil, err
		}
		on := l.connection
		c.leveled(ctx, l)
		id, result, err := c.once(ctx, l, method, params, from, patient)
		release()
		refusal, _ := errors.AsType[*ResponseError](err)
		switch {
		case err == nil:
			if on.wanting.Load() {
				on.changed() // it does not want a sign-in any more, nor perhaps for its list
			}
			return result, nil
		case errors.Is(err, errGone) && try == 0:
			// "When a client receives HTTP 404 in response to a request containing an
			// Mcp-Session-Id, it MUST start a new session".
			on.drop(l, nil)
			continue
		case errors.Is(err, errGone):
			err = c.remote.gone()
		case l.modern && refusal != nil && refusal.Code == codeHeaderMismatch && try == 0:
			// The tool's annotations are not what they were when it was listed. The
			// remote has not executed the request.
			if on.relisted(ctx, l) == nil {
				continue
			}
		case l.modern && refusal != nil && refusal.Code == codeUnsupportedVersion && try == 0:
			c.remote.eras.Store(int32(erasUnknown))
			on.drop(l, nil)
			continue
		}
		if ctx.Err() != nil {
			c.cancelled(l, id)
		}
		on.failed(l, err)
		return nil, err
	}
}

// operation is what a request is for: its method, and the tool, prompt or
// resource.
func operation(method string, params json.RawMessage) string {
	got, err := rawjson.Get(params, "name", "uri")
	if err != nil {
		return method
	}
	return method + " " + string(got[0]) + string(got[1])
}

// once sends the request on one link.
func (c *connection) once(ctx context.Context, l *link, method string, params json.RawMessage, from *Caller, patient *patience) (id int64, result json.RawMessage, err error) {
	id = l.connection.ids.Add(1)
	outgoing, token, err := remint(params, strconv.FormatInt(id, 10))
	if err != nil {
		return id, nil, err
	}
	in := l.start(ctx, id, c.session, from, token, patient)
	defer l.end(in)
	err = c.wire.authorized(ctx, true, func() (err error) {
		result, _, err = l.request(ctx, id, method, outgoing, in)
		return err
	})
	return id, result, err
}

// relisted reads the lists anew, and returns when that is done.
func (c *connection) relisted(ctx context.Context, l *link) error {
	c.mu.Lock()
	since := c.listings
	c.mu.Unlock()
	for {
		a := c.listedAfter(since, l)
		if a == nil {
			return ErrClosed
		}
		if err := c.wait(ctx, a); err != nil {
			return err
		}
		if a.seq > since {
			return a.err
		}
	}
}

// paramsOf returns which arguments of a tool go into headers.
func (c *connection) paramsOf(tool string) []ParamHeader {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.headers[tool]
}

// owner is the profile of the one client whose session this is, if it has only
// one: the main link declares what that client does.
func (c *connection) owner() json.RawMessage {
	if profile := c.session.owner; profile != nil {
		return profile
	}
	return json.RawMessage("{}")
}

func (r *remote) gone() *Failure {
	return r.fail(KindSessionGone, nil, "forgot the MCP session twice in a row. If it runs as several replicas, they need to share their sessions.")
}

// failed notes what a request's error says about the connection.
func (c *connection) failed(l *link, err error) {
	if required, ok := errors.AsType[*auth.RequiredError](err); ok {
		if required.Reason != auth.ReasonMoreScopes {
			c.note(l, err)
		}
		return
	}
	failure, _ := errors.AsType[*Failure](err)
	switch {
	case isLost(err):
		c.drop(l, err)
	case failure != nil && failure.Status == http.StatusBadRequest:
		// Servers that do not answer 404 for a session that they do not know
		// answer this. A new one costs little, and begins with the next request. What
		// others use is not dropped for one's bad requests, but now and then.
		if !c.shared || c.linkedFor(l) > steady {
			c.drop(l, nil)
		}
	case failure != nil && failure.Kind == KindCut:
		// It may have died, or have dropped this one answer: a look at its lists
		// tells, and until then it is not called connected.
		if c.note(l, err) {
			c.remote.recovery.soon(c)
		}
	}
}

// linkedFor is for how long a link has been used.
func (c *connection) linkedFor(l *link) time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	return time.Since(l.began)
}

// note changes the state of a live connection; false if it is not the one that
// counts.
func (c *connection) note(l *link, err error) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.link != l {
		return false
	}
	c.settleLocked(err)
	return true
}

// drop forgets a link that is of no use any more. With an error the remote is
// down, and somebody has to find out when it is back.
func (c *connection) drop(l *link, err error) {
	c.mu.Lock()
	if c.link != l {
		c.mu.Unlock()
		c.dropSide(l)
		return
	}
	c.unlinkLocked()
	if _, owned := l.via.(*duplex); owned {
		c.letGoLocked(l)
	}
	if err == nil {
		c.mu.Unlock()
		return
	}
	news := c.settleLocked(err)
	c.mu.Unlock()
	c.unwell(err, news)
}

// unlinkLocked parts with the link, and returns it, nil if there is none.
func (c *connection) unlinkLocked() *link {
	l := c.link
	c.link = nil
	if l != nil {
		l.stop()
	}
	return l
}

// settleLocked derives the state from the outcome of what was tried last, and
// reports whether it is another than before.
func (c *connection) settleLocked(err error) (news bool) {
	state := StateUnavailable
	if err == nil {
		state = StateConnected
	} else if _, ok := errors.AsType[*auth.RequiredError](err); ok || errors.Is(err, auth.ErrSignInNeeded) {
		state = StateSignInNeeded
	} else if failure, ok := errors.AsType[*Failure](err); ok && failure.Kind == KindUnsupported {
		state = StateUnsupported
	}
	news = state != c.status.State || err != nil && c.status.Err != nil && err.Error() != c.status.Err.Error()
	if news {
		c.status.Since = time.Now()
	}
	c.status.State, c.status.Err, c.status.Retried = state, err, err != nil && isDown(err)
	c.wanting.Store(state == StateSignInNeeded)
	return news
}

// unwell has a remote that is down watched until it is back.
func (c *connection) unwell(err error, news bool) {
	if c.session.ctx.Err() != nil {
		return
	}
	down := isDown(err)
	if down {
		c.remote.recovery.join(c)
	} else {
		c.remote.recovery.leave(c)
	}
	level := slog.LevelInfo
	refusal, _ := errors.AsType[*auth.Error](err)
	_, required := errors.AsType[*auth.RequiredError](err)
	switch {
	case required, errors.Is(err, auth.ErrSignInNeeded):
		level = slog.LevelDebug // nothing is wrong
	case refusal != nil && refusal.Kind != auth.KindForbidden:
		level = slog.LevelDebug // auth has said so
	case down:
		level = slog.LevelWarn
	}
	if news {
		c.session.log.Log(c.session.ctx, level, "remote not connected", "remote", c.remote.Name, "error", err)
	}
}

// dialed returns a link, dialing if there is none. One dial is in flight at a
// time, and it is always loud here: whoever calls this waits for the answer. A
// quiet one that is found in flight and ends for want of a sign-in is followed
// by a loud one. With fresh, so is one that began before a sign-in that the
// caller knows of.
func (c *connection) dialed(ctx context.Context, fresh bool) (*link, error) {
	for {
		c.mu.Lock()
		if l := c.link; l != nil {
			c.mu.Unlock()
			return l, nil
		}
		a, joined := c.dialing, true
		if a == nil {
			a, joined = c.startDialLocked(true), false
		}
		c.mu.Unlock()
		switch {
		case a == nil && c.shared:
			return nil, errApart
		case a == nil:
			return nil, ErrClosed
		}
		if err := c.wait(ctx, a); err != nil {
			return nil, err
		}
		_, required := errors.AsType[*auth.RequiredError](a.err)
		old := joined && fresh && required
		switch {
		case a.err == nil:
			return a.link, nil
		case errors.Is(a.err, errStale):
		case !a.loud && errors.Is(a.err, auth.ErrSignInNeeded):
		case old:
			fresh = false
		default:
			return nil, a.err
		}
	}
}

// wait waits for an attempt; its error is that of the waiting.
func (c *connection) wait(ctx context.Context, a *attempt) error {
	select {
	case <-a.done:
		return nil
	case <-ctx.Done():
		return c.remote.ended(ctx)
	}
}

// startDialLocked begins a dial, or returns nil if the session is closed, or the
// connection not in common any more.
func (c *connection) startDialLocked(loud bool) *attempt {
	if c.apart {
		return nil
	}
	a := &attempt{epoch: c.epoch, loud: loud, done: make(chan struct{})}
	if !c.session.spawn(func() { c.dial(a) }) {
		return nil
	}
	c.dialing = a
	if c.status.State == StateConnected {
		c.status.State, c.status.Since = StateConnecting, time.Now()
	}
	return a
}

// dial initializes an MCP session and has its tools listed.
func (c *connection) dial(a *attempt) {
	c.recalled.Do(c.recall)
	l, err := c.begin(c.session.ctx, a.loud)
	c.mu.Lock()
	if c.dialing == a {
		c.dialing = nil
	}
	stale, news := c.epoch != a.epoch, false
	switch {
	case stale:
		err = errStale
	case err == nil && c.shared && l.keepsState():
		c.dialing, c.found, err = a, l, errApart // who comes now waits for part
	case err == nil:
		l.ctx, l.stop = context.WithCancel(c.session.ctx)
		c.link, l.began, l.used = l, time.Now(), time.Now()
		c.catalog.Offers = l.offers
		c.status.Server, c.status.Version, c.status.Protocol = l.server, l.build, l.version
		// Before anybody can see the link, so that none is seen unlisted. Quietly:
		// the caller that dialed may not need the list.
		c.startListLocked(l, false)
	default:
		news = c.settleLocked(err)
	}
	c.mu.Unlock()
	if errors.Is(err, errApart) {
		c.part() // before anybody tries again
	}
	a.link, a.err = l, err
	close(a.done)
	switch {
	case stale && l != nil:
		c.goodbye(l)
	case stale, errors.Is(err, errApart):
	case err == nil:
		c.remote.recovery.up()
		c.levelSoon(l)
	default:
		c.answeredOnce.Do(func() { close(c.answered) })
		c.unwell(err, news)
	}
}

// within is a context for something that a remote has to do in time.
func within(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(ctx, d, &deadline{after: d})
}

// refusedToBegin makes a remote's error to initialize a failure: no client
// asked for it.
func (c *connection) refusedToBegin(err error) error {
	refusal, ok := errors.AsType[*ResponseError](err)
	switch {
	case !ok:
		return err
	case refusal.Code == codeUnsupportedVersion:
		return c.remote.fail(KindUnsupported, refusal, "speaks none of the protocol versions %s.", strings.Join(accepted, ", "))
	default:
		return c.remote.fail(KindBadAnswer, refusal, "refused to begin an MCP session (JSON-RPC error %d). Ask its operator.", refusal.Code)
	}
}

// cancelled tells the remote that nobody waits for a request any more. In the
// modern era over HTTP it sees the stream closed.
func (c *connection) cancelled(l *link, id int64) {
	if _, http := l.via.(*wire); http && l.modern {
		return
	}
	body, err := appendRequest(nil, 0, notifyCancelled, fmt.Appendf(nil, `{"requestId":%d}`, id))
	if err == nil {
		c.sendAside(l, body)
	}
}

// startListLocked begins a listing, or returns nil if the session is closed.
func (c *connection) startListLocked(l *link, loud bool) *attempt {
	a := &attempt{seq: c.listings + 1, epoch: c.epoch, loud: loud, link: l, done: make(chan struct{})}
	if !c.session.spawn(func() { c.list(a) }) {
		return nil
	}
	c.listings++
	c.listing = a
	c.relist = false
	return a
}

// list reads the catalog anew.
func (c *connection) list(a *attempt) {
	c.spare(a)
	said := c.said.Swap(false)
	read, err := c.readLists(c.session.ctx, a.link, a.loud)
	if errors.Is(err, errGone) {
		err = c.remote.gone()
	}
	c.mu.Lock()
	if c.epoch != a.epoch {
		c.mu.Unlock()
		a.err = errStale
		close(a.done)
		return
	}
	c.listing, c.listed, c.listedAt = nil, a, time.Now()
	if isLost(err) && c.link == a.link {
		c.unlinkLocked()
		if _, owned := a.link.via.(*duplex); owned {
			c.letGoLocked(a.link)
		}
	}
	news := c.settleLocked(err)
	changed := err == nil && (news || said)
	if read != nil && a.link.modern {
		c.headers = read.headers
	}
	if read != nil && c.catalog.update(read) {
		c.catalog.Generation = c.remote.listings.Add(1)
		c.status.Tools = len(c.catalog.Tools)
		changed = true
		c.remember(c.catalog)
	}
	if c.relist && c.link == a.link {
		c.relistLocked()
	}
	if err == nil && c.link == a.link {
		c.listenLocked(a.link)
		for _, s := range c.sides {
			if s.link != nil {
				c.listenLocked(s.link)
			}
		}
	}
	c.mu.Unlock()
	// Before those who wait go on: they will look at what has changed.
	if changed {
		c.session.changed()
	}
	a.err = err
	close(a.done)
	c.answeredOnce.Do(func() { close(c.answered) })
	if err != nil {
		c.unwell(err, news)
		return
	}
	c.remote.recovery.leave(c)
	if news {
		c.session.log.Info("remote connected", "remote", c.remote.Name, "tools", len(read.of[0]))
	}
}

// spare waits until a moment has gone by since the last listing, if a change is
// what the next one is for: a remote may speak of those as often as it likes.
func (c *connection) spare(a *attempt) {
	c.mu.Lock()
	wait := time.Until(c.listedAt.Add(listFloor))
	told := a.told
	c.mu.Unlock()
	if !told || wait <= 0 {
		return
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-c.session.ctx.Done():
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.listing == a {
		c.relist = false // nothing has been read yet
	}
}

// isLost reports whether a failure means that the link is of no use any more.
func isLost(err error) bool {
	failure, ok := errors.AsType[*Failure](err)
	return ok && (failure.Kind == KindSessionGone || failure.Kind == KindUnreachable || failure.Kind == KindBlocked)
}

// changed has all lists read again: the remote says that one has changed.
func (c *connection) changed() {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.listing != nil:
		c.relist = true
	case c.link != nil:
		c.relistLocked()
	}
}

func (c *connection) relistLocked() {
	if a := c.startListLocked(c.link, false); a != nil {
		a.told = true
	}
}

// connect dials if need be, and lists; nil means that both worked after it was
// called. It may start a sign-in.
func (c *connection) connect(ctx context.Context) error {
	c.mu.Lock()
	since := c.listings // a listing up to this one may be older than the caller's sign-in
	old := c.link
	c.mu.Unlock()
	for again := false; ; {
		l, err := c.dialed(ctx, true)
		if err != nil {
			return err
		}
		a := c.listedAfter(since, l)
		switch {
		case a == nil && c.shared:
			return errApart
		case a == nil:
			return ErrClosed
		}
		if err := c.wait(ctx, a); err != nil {
			return err
		}
		if a.seq <= since {
			continue // there is room for a newer one now
		}
		since = a.seq
		failure, _ := errors.AsType[*Failure](a.err)
		refusal, _ := errors.AsType[*auth.Error](a.err)
		switch {
		case a.err == nil:
			return nil
		case errors.Is(a.err, errStale), !a.loud && errors.Is(a.err, auth.ErrSignInNeeded):
		case !again && failure != nil && failure.Kind == KindSessionGone:
			again = true
		case !again && refusal != nil && refusal.Kind == auth.KindForbidden && l == old:
			// The MCP session may belong to the account that was signed in before.
			again = true
			c.drop(l, nil)
			c.goodbye(l)
		default:
			return a.err
		}
	}
}

// listedAfter returns the last listing, or one in flight, or else begins one:
// after the since-th, on the link that is there.
func (c *connection) listedAfter(since int, l *link) *attempt {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.listing != nil:
		return c.listing
	case c.listed != nil && c.listed.seq > since:
		return c.listed
	}
	return c.startListLocked(l, true)
}

// tried is quietly, where there is no other connection in common.
func (c *connection) tried(ctx context.Context) error {
	for again := true; ; {
		c.mu.Lock()
		a := c.dialing
		switch {
		case a != nil:
		case c.listing != nil:
			a = c.listing
		case !again:
		case c.link == nil:
			a, again = c.startDialLocked(false), false
		case c.status.State == StateUnavailable:
			a, again = c.startListLocked(c.link, false), false
		}
		apart := c.shared && c.link == nil
		c.mu.Unlock()
		switch {
		case a == nil && apart:
			return errApart
		case a == nil:
			return nil
		}
		if err := c.wait(ctx, a); err != nil {
			return err
		}
		if a.err != nil {
			return a.err
		}
	}
}

// disconnect closes the connection, forgets the catalog, and looks quietly what
// is left without the sign-in. What is common to all has none.
func (c *connection) disconnect() {
	if c.common.Load() != nil {
		c.unremember()
		c.closeSides(func(sideKey) bool { return true })
		return
	}
	c.mu.Lock()
	l := c.unlinkLocked()
	known := c.catalog.Known || len(c.catalog.Tools) > 0
	c.epoch++
	c.dialing, c.listing, c.listed = nil, nil, nil
	c.catalog = Catalog{Remote: c.remote.Name, Generation: c.remote.listings.Add(1)}
	c.status = Status{State: StateConnecting, Since: time.Now()}
	c.startDialLocked(false)
	c.mu.Unlock()
	c.unremember()
	c.closeSides(func(sideKey) bool { return true })
	if known {
		c.session.changed()
	}
	if l != nil {
		c.session.spawn(func() { c.goodbye(l) })
	}
}

// currentCatalog returns the catalog as last listed. What this principal was
// shown in an earlier run is shown until the common one is there.
func (c *connection) currentCatalog() Catalog {
	var common Catalog
	if main := c.main(); main != c {
		if common = main.currentCatalog(); common.Known {
			return common
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	catalog := c.catalog
	catalog.Connected = c.link != nil || common.Connected
	if common.Connected {
		catalog.Offers = common.Offers
	}
	return catalog
}

// takeLinks takes all links away, for good.
func (c *connection) takeLinks() []*link {
	links := c.takeSides()
	c.mu.Lock()
	defer c.mu.Unlock()
	if l := c.unlinkLocked(); l != nil {
		links = append(links, l)
	}
	if c.found != nil {
		links = append(links, c.found)
		c.found = nil
	}
	return links
}

// goodbye ends a link at the remote, in the background of a session that goes on.
func (c *connection) goodbye(l *link) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(c.session.ctx), goodbyeTimeout)
	defer cancel()
	l.via.end(ctx, l.header)
}
