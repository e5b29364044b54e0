package gateway

import (
	"bytes"
	"context"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/modelcontextprotocol/go-sdk/mcp"

	"gatehouse/auth"
	"gatehouse/session"
)

// listWait is how long a client waits for remotes that have not answered yet.
// What comes later is announced by list_changed.
const listWait = 1500 * time.Millisecond

// view is what one principal sees through the gateway: its session, the
// catalogs merged into one, and the SDK server that notifies its clients and
// nobody else's.
type view struct {
	g         *Gateway
	principal auth.Principal
	session   *session.Session
	server    *mcp.Server
	notify    mcp.MethodHandler // sends something to a client, past the SDK's own checks
	unwatch   func()
	levels    logLevels
	subs      subscriptions

	building sync.Mutex // one merge at a time, so that no older one overwrites a newer
	current  atomic.Pointer[merged]
	changes  atomic.Uint64 // how often a catalog has changed

	announced *merged // what the clients were last told of; announceChange's own
}

func newView(g *Gateway, p auth.Principal, s *session.Session) *view {
	v := &view{g: g, principal: p, session: s, announced: nothing}
	v.server = g.newServer(v, func() string {
		if id, ok := p.SessionID(); ok {
			return id
		}
		return uuid.NewString()
	})
	s.OnUpdated(v.resourceUpdated)
	v.unwatch = s.OnChange(func() {
		v.changes.Add(1)
		v.announceChange()
	})
	return v
}

// nothing is what a client knows that has been told of nothing.
var nothing = merge(nil, nil, nil, nil)

// announceChange tells the clients which lists have changed. Where none has, a
// remote has come to be connected: a call that failed before may work now, and
// a list of tools is what makes clients look again. One call at a time, as the
// session promises.
func (v *view) announceChange() {
	m, before := v.now(), v.announced
	v.announced = m
	changed := announcement{
		tools:     !bytes.Equal(m.tools.list, before.tools.list),
		prompts:   !bytes.Equal(m.prompts.list, before.prompts.list),
		resources: !bytes.Equal(m.resources.list, before.resources.list) || !bytes.Equal(m.templates.list, before.templates.list),
	}
	if changed == (announcement{}) {
		changed.tools = true
	}
	announce(v.server, changed)
}

func (v *view) close() {
	v.unwatch()
	for ss := range v.server.Sessions() {
		ss.Close()
	}
}

// list returns the merged catalog, having waited a moment for the remotes that
// have not answered yet.
func (v *view) list(ctx context.Context) *merged {
	ctx, cancel := context.WithTimeout(ctx, listWait)
	defer cancel()
	v.session.Catalogs(ctx)
	return v.now()
}

// now returns the merged catalog without waiting for anybody.
func (v *view) now() *merged {
	if m := v.current.Load(); m != nil && m.changes == v.changes.Load() {
		return m
	}
	return v.latest()
}

// latest is now for those who know better than to believe that nothing has
// changed: a change is in the catalog before it is told.
func (v *view) latest() *merged {
	v.building.Lock()
	defer v.building.Unlock()
	// Read before the catalogs are: a change in between is seen next time.
	changes := v.changes.Load()
	catalogs := v.session.Catalogs(ended)
	m := v.current.Load()
	switch {
	case m == nil || !slices.Equal(m.key, generations(catalogs)):
		m = merge(catalogs, v.g.names, v.g.filters, v.g.log)
	case m.changes == changes:
		return m
	default:
		same := *m
		m = &same
	}
	m.changes = changes
	v.current.Store(m)
	return m
}

// ended is for those who take what is there and wait for nothing.
var ended = func() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}()

// known reports whether the remote's tools have been listed for this principal.
func (v *view) known(remote string) bool {
	return slices.ContainsFunc(v.session.Catalogs(ended), func(c session.Catalog) bool {
		return c.Remote == remote && c.Known
	})
}

// offers returns what the remote declares to have, as far as that is known.
func (v *view) offers(remote string) session.Capabilities {
	for _, c := range v.session.Catalogs(ended) {
		if c.Remote == remote {
			return c.Offers
		}
	}
	return session.Capabilities{}
}
