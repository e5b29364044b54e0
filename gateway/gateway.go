package gateway

import (
	"context"
	"encoding/json"
	"log/slog"
	"sync"
	"time"

	"github.com/modelcontextprotocol/go-sdk/mcp"

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

	// SharedStore says that other processes may finish a sign-in that began
	// here. Then whoever waits for one looks for it.
	SharedStore bool
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
	identity  string

	names   *namer
	filters map[string]toolFilter
	index   map[string]int // of the remotes, by name, in config order

	calls    inFlight
	tickets  *tickets
	parked   parkedCalls
	sse      sseSessions
	before   mergedBefore
	clients  *clients
	callback *windowLimit
	legacy   *mcp.StreamableHTTPHandler
	modern   *mcp.StreamableHTTPHandler

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
		identity:  s.Identity,
		filters:   map[string]toolFilter{},
		index:     map[string]int{},
		views:     map[auth.Principal]*view{},
		tickets:   newTickets(),
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
	g.clients = newClients(g, limits.Sessions)
	g.metrics.watch(g)
	g.legacy, g.modern = newMCPHandlers(int64(limits.BodyBytes))
	return g
}

// view returns the principal's view, opening it if it is the first time.
func (g *Gateway) view(p auth.Principal) (*view, error) { return g.viewFor(p, nil) }

// viewFor is view for a principal with one client only, which declares these
// capabilities; nil: not known, or more clients.
func (g *Gateway) viewFor(p auth.Principal, capabilities json.RawMessage) (*view, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return nil, errDraining
	}
	if v := g.views[p]; v != nil {
		return v, nil
	}
	s, err := g.sessions.OpenFor(p, capabilities)
	if err != nil {
		return nil, err
	}
	v := newView(g, p, s)
	g.views[p] = v
	return v, nil
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
// and then ends every client's session. A call that is still waiting for its
// remote then is told so.
func (g *Gateway) Drain(ctx context.Context) {
	g.mu.Lock()
	g.closed = true
	g.mu.Unlock()
	if g.calls.wait(ctx); ctx.Err() != nil {
		g.sessions.Close()
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
