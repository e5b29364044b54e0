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

// listWait is how long after a view has been opened its clients wait for
// remotes that have not answered yet. What comes later is announced by
// list_changed.
const listWait = 1500 * time.Millisecond

// view is what one principal sees through the gateway: its session, the
// catalogs merged into one, and the SDK server that notifies its clients and
// nobody else's.
type view struct {
	g         *Gateway
	principal auth.Principal
	session   *session.Session
	opened    time.Time
	server    *mcp.Server
	send      mcp.MethodHandler // sends something to a client, past the SDK's own checks
	unwatch   func()
	levels    logLevels
	subs      subscriptions
	listens   listens
	linked    linked
	peers     peers
	calls     *callLimit

	waits    sync.WaitGroup // for what goes on in the background, until end
	seen     time.Time      // when it was last asked for; guarded by g.mu, like the next two
	requests int            // in flight
	streams  int            // of those, the event streams that stay open

	resting atomic.Bool // its connections are closed, since its clients have left

	links   atomic.Int64 // how many calls wait for a link to be visited
	ended   context.Context
	end     context.CancelFunc
	waitMu  sync.Mutex      // guards waiting
	waiting map[string]bool // remotes

	building sync.Mutex // one merge at a time, so that no older one overwrites a newer
	current  atomic.Pointer[merged]
	changes  atomic.Uint64 // how often a catalog has changed

	announced *merged // what the clients were last told of; announceChange's own
}

func newView(g *Gateway, p auth.Principal, s *session.Session) *view {
	v := &view{g: g, principal: p, session: s, opened: time.Now(), announced: nothing, waiting: map[string]bool{},
		calls: newCallLimit(g.cfg.Gateway.Limits, g.now)}
	v.server = g.newServer(v, func() string {
		if id, ok := p.SessionID(); ok {
			return id
		}
		return uuid.NewString()
	})
	v.ended, v.end = context.WithCancel(context.Background())
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
	v.listens.announce(changed)
}

func (v *view) close() {
	v.waitMu.Lock()
	v.end()
	v.waitMu.Unlock()
	v.waits.Wait()
	v.unwatch()
	for ss := range v.server.Sessions() {
		ss.Close()
	}
}

// list returns the merged catalog, having waited a moment for the remotes that
// have not answered yet.
func (v *view) list(ctx context.Context) *merged {
	ctx, cancel := context.WithDeadline(ctx, v.opened.Add(listWait))
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
	catalogs := v.session.Catalogs(atOnce)
	m := v.current.Load()
	switch {
	case m == nil || !slices.Equal(m.key, generations(catalogs)):
		m = v.g.merged(catalogs)
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

// await connects to a remote once its sign-in is there, whichever process
// finished it. One goroutine waits for each remote, as long as its link works.
func (v *view) await(remote string) {
	v.waitMu.Lock()
	defer v.waitMu.Unlock()
	if v.waiting[remote] || v.ended.Err() != nil {
		return
	}
	v.waiting[remote] = true
	v.waits.Go(func() {
		err := v.g.awaitSignIn(v.ended, v.principal, remote)
		if err == nil {
			err = v.session.Connect(v.ended, remote)
		}
		v.g.log.DebugContext(v.ended, "waited for a sign-in", "remote", remote, "principal", v.principal, "error", err)
		v.waitMu.Lock()
		defer v.waitMu.Unlock()
		delete(v.waiting, remote)
	})
}

// background runs f until it returns, which it has to when ended is done; false
// if the view is closed.
func (v *view) background(f func(ended context.Context)) bool {
	v.waitMu.Lock()
	defer v.waitMu.Unlock()
	if v.ended.Err() != nil {
		return false
	}
	v.waits.Go(func() { f(v.ended) })
	return true
}

// atOnce is for those who take what is there and wait for nothing.
var atOnce = func() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}()

// cacheHint is how long a merged list may be kept, and by whom: "public" where
// every remote says that its part is the same for everybody, and none of them
// knows who asks. A remote that is not connected may change its part at any moment.
func (v *view) cacheHint(kind int) (ttl time.Duration, scope string) {
	ttl, scope = time.Hour, "public"
	if v.g.users {
		scope = "private" // it says which remotes a user has signed in to
	}
	now := time.Now()
	servers := v.g.cfg.Running()
	for i, c := range v.session.Catalogs(atOnce) {
		hint := c.Hints[kind]
		if !c.Known || !c.Connected {
			hint = session.CacheHint{}
		}
		if !hint.Public || servers[i].Auth.SignsIn() {
			scope = "private"
		}
		ttl = max(0, min(ttl, hint.Until.Sub(now)))
	}
	return ttl, scope
}

// known reports whether the remote's tools have been listed for this principal.
func (v *view) known(remote string) bool {
	return slices.ContainsFunc(v.session.Catalogs(atOnce), func(c session.Catalog) bool {
		return c.Remote == remote && c.Known
	})
}

// offers returns what the remote declares to have, as far as that is known.
func (v *view) offers(remote string) session.Capabilities {
	for _, c := range v.session.Catalogs(atOnce) {
		if c.Remote == remote {
			return c.Offers
		}
	}
	return session.Capabilities{}
}
