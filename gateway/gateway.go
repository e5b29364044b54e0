package gateway

import (
	"context"
	"encoding/json"
	"log/slog"
	"net/http"
	"sync"
	"time"

	"gatehouse/auth"
	"gatehouse/session"
)

// Setup is what a [Gateway] is made of. All fields without "may be" are required.
type Setup struct {
	Config    *Config
	Auth      *auth.Broker
	Sessions  *session.Pool
	PublicURL string // where browsers reach the pages, without a trailing slash
	Version   string
	Log       *slog.Logger
	Now       func() time.Time // may be nil: time.Now
	Metrics   *Metrics         // made for this config; may be nil: new ones
	Audit     *slog.Logger     // takes the audit log; may be nil: Log, under the group "audit"

	// Users says that clients present bearer tokens, and browsers log in, at the
	// provider of gateway.auth: everybody is somebody. Otherwise nobody is asked.
	Users bool

	// SharedStore says that other processes may finish a sign-in that began
	// here. Then whoever waits for one looks for it.
	SharedStore bool
	// Sealer seals the requestState of those who serve PublicURL together, so that
	// a sign-in that is asked for here can be waited for there; may be nil: only
	// this process opens what it has sealed.
	Sealer auth.Sealer
	// Identity tells processes that can finish each other's sign-ins from
	// others; empty: it is not said.
	Identity string
}

// Gateway is the MCP server in front of all remotes, and the pages that a
// sign-in needs. Make one with [New] and end it with [Gateway.Close].
type Gateway struct {
	cfg       *Config
	auth      *auth.Broker
	sessions  *session.Pool
	publicURL string
	version   string
	log       *slog.Logger
	audit     *slog.Logger
	metrics   *Metrics
	now       func() time.Time
	shared    bool
	users     bool
	identity  string

	names   *namer
	filters map[string]toolFilter
	index   map[string]int // of the remotes, by name, in config order

	calls    inFlight
	tickets  *tickets // of pages
	states   *tickets // of requests: requestState
	parked   parkedCalls
	sse      sseSessions
	before   mergedBefore
	clients  *clients
	callback *windowLimit
	bearers  *windowLimit // tokens that the provider would have to be asked about
	legacy   http.Handler
	modern   http.Handler

	mu     sync.Mutex // guards views and closed
	views  map[auth.Principal]*view
	closed bool
}

// New builds the gateway. Connections are dialed when the first client of a
// principal arrives.
func New(s Setup) *Gateway {
	g := &Gateway{
		cfg:       s.Config,
		auth:      s.Auth,
		sessions:  s.Sessions,
		publicURL: s.PublicURL,
		version:   s.Version,
		log:       s.Log,
		audit:     s.Audit,
		metrics:   s.Metrics,
		now:       s.Now,
		shared:    s.SharedStore,
		users:     s.Users,
		identity:  s.Identity,
		filters:   map[string]toolFilter{},
		index:     map[string]int{},
		views:     map[auth.Principal]*view{},
		tickets:   newTickets(),
	}
	g.states = g.tickets
	if s.Sealer != nil {
		g.states = &tickets{s.Sealer, s.PublicURL}
	}
	if g.now == nil {
		g.now = time.Now
	}
	if g.audit == nil {
		g.audit = s.Log.WithGroup("audit")
	}
	if g.metrics == nil {
		g.metrics = NewMetrics(s.Config, s.Version)
	}
	var prefixes []string
	for _, server := range s.Config.Running() {
		g.index[server.Name] = len(prefixes)
		prefixes = append(prefixes, server.ToolPrefix())
		g.filters[server.Name] = toolFilter{allow: server.Tools.Allow, deny: server.Tools.Deny}
	}
	g.names = newNamer(prefixes)
	limits := s.Config.Gateway.Limits
	g.callback = newWindowLimit(limits.CallbackPerMinute, limits.CallbackPerMinuteTotal, g.now)
	g.bearers = newWindowLimit(askedPerMinute, askedPerMinuteTotal, g.now)
	g.clients = newClients(g, limits.Sessions)
	g.metrics.watch(g)
	g.legacy, g.modern = newMCPHandlers(int64(limits.BodyBytes))
	if g.users {
		g.legacy, g.modern = g.asPrincipal(g.legacy), g.asPrincipal(g.modern)
	}
	return g
}

// view returns the principal's view, opening it if it is the first time.
func (g *Gateway) view(p auth.Principal) (*view, error) { return g.viewFor(p, nil) }

// viewFor is view for a principal with one client only, which declares these
// capabilities; nil: not known, or more clients.
func (g *Gateway) viewFor(p auth.Principal, capabilities json.RawMessage) (*view, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.viewLocked(p, capabilities)
}

func (g *Gateway) viewLocked(p auth.Principal, capabilities json.RawMessage) (*view, error) {
	if g.closed {
		return nil, errDraining
	}
	if v := g.views[p]; v != nil {
		v.seen = g.now()
		v.wake()
		return v, nil
	}
	s, err := g.sessions.OpenFor(p, capabilities)
	if err != nil {
		return nil, err
	}
	v := newView(g, p, s)
	v.seen = g.now()
	g.views[p] = v
	return v, nil
}

// enter is viewFor for a request, which keeps the view open until leave.
func (g *Gateway) enter(p auth.Principal, capabilities json.RawMessage) (v *view, leave func(), err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if v, err = g.viewLocked(p, capabilities); err != nil {
		return nil, func() {}, err
	}
	v.requests++
	return v, v.leave, nil
}

// stay keeps an open view open until leave.
func (v *view) stay() {
	v.g.mu.Lock()
	defer v.g.mu.Unlock()
	v.requests++
}

// leave ends a request.
func (v *view) leave() {
	v.g.mu.Lock()
	defer v.g.mu.Unlock()
	v.requests--
	v.seen = v.g.now()
}

// maxStreams is how many event streams one principal may hold open. A client needs
// one.
const maxStreams = 64

// stream counts an event stream until done is called; false if it is one too many.
func (v *view) stream() (done func(), ok bool) {
	v.g.mu.Lock()
	defer v.g.mu.Unlock()
	if v.streams >= maxStreams {
		return nil, false
	}
	v.streams++
	return func() {
		v.g.mu.Lock()
		defer v.g.mu.Unlock()
		v.streams--
	}, true
}

// viewIdle is how long the connections of a user are held who has no client
// with a session, no open stream, no request and no call that waits for them.
const viewIdle = 40 * time.Second

// restIdle closes what is held for users who have left. Their grants stay, and
// what clients need that have not ended their session.
func (g *Gateway) restIdle() {
	held := g.clients.views()
	var idle, resting []*view
	g.mu.Lock()
	for p, v := range g.views {
		here, hasClients := held[v]
		switch {
		case p.Issuer == "" || v.requests > 0 || here || g.now().Sub(v.seen) <= viewIdle:
		case hasClients:
			resting = append(resting, v)
			v.resting.Store(true)
		default:
			idle = append(idle, v)
			delete(g.views, p)
			// At once, or who comes now would get what is being closed.
			g.sessions.Forget(v.session)
		}
	}
	g.mu.Unlock()
	held = g.clients.views()
	for _, v := range resting {
		if held[v] {
			v.wake() // its client has come before it could see that the view rests
			continue
		}
		v.rest()
	}
	var closing sync.WaitGroup
	for _, v := range idle {
		closing.Go(func() {
			v.close()
			v.session.Close()
		})
	}
	closing.Wait()
}

// rest closes the connections of a view that was marked as resting.
func (v *view) rest() {
	v.session.Rest()
	if !v.resting.Load() {
		v.session.Wake() // somebody has come meanwhile
	}
}

// wake has the connections of a view opened again that was at rest.
func (v *view) wake() {
	if v.resting.Swap(false) {
		v.session.Wake()
	}
}

// end forgets an ephemeral principal: its view, its connections, its grants.
func (g *Gateway) end(p auth.Principal) {
	g.mu.Lock()
	v := g.views[p]
	delete(g.views, p)
	g.mu.Unlock()
	if v != nil {
		v.close()
	}
	g.sessions.End(p)
	g.auth.End(p)
}

// Drain refuses new sessions, waits until no call is in flight or ctx is done,
// and then ends every client's session. A call that is still waiting then, for
// its remote or for its client, is told so.
func (g *Gateway) Drain(ctx context.Context) {
	g.mu.Lock()
	g.closed = true
	g.mu.Unlock()
	if g.calls.wait(ctx); ctx.Err() != nil {
		g.sessions.Close()
		g.mu.Lock()
		for _, v := range g.views {
			v.end() // what waits for a client, not for a remote
		}
		g.mu.Unlock()
		last, cancel := context.WithTimeout(context.WithoutCancel(ctx), lastAnswers)
		defer cancel()
		g.calls.wait(last)
	}
	g.Close()
}

// lastAnswers is what the answers take of those calls that a drain cuts short.
const lastAnswers = time.Second

// Close ends every client's session. The pool and the broker are the caller's
// to close, after it. Twice is safe.
func (g *Gateway) Close() {
	g.mu.Lock()
	g.closed = true
	views := g.views
	g.views = map[auth.Principal]*view{}
	g.mu.Unlock()
	for _, v := range views {
		v.close()
	}
	g.clients.close()
}

// inFlight counts calls, so that draining can wait for them.
type inFlight struct {
	mu   sync.Mutex // guards n and idle
	n    int
	idle chan struct{} // closed when n is 0; nil while nobody waits
}

// begin counts a call until end is called.
func (f *inFlight) begin() (end func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.n++
	return f.end
}

func (f *inFlight) end() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.n--; f.n == 0 && f.idle != nil {
		close(f.idle)
		f.idle = nil
	}
}

// wait returns when no call is in flight or ctx is done.
func (f *inFlight) wait(ctx context.Context) {
	f.mu.Lock()
	if f.n == 0 {
		f.mu.Unlock()
		return
	}
	if f.idle == nil {
		f.idle = make(chan struct{})
	}
	idle := f.idle
	f.mu.Unlock()
	select {
	case <-idle:
	case <-ctx.Done():
	}
}
