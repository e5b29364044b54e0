package gateway

import (
	"context"
	"encoding/json"
	"log/slog"
	"strconv"
	"sync"
	"time"

	"github.com/modelcontextprotocol/go-sdk/mcp"

	"gatehouse/session/rawjson"
)

const (
	// clientIdle is how long a client with a session may be silent, without an
	// open stream, before its session ends. Most clients leave without a word.
	clientIdle  = 4 * time.Hour
	clientSweep = 10 * time.Second
)

// clients are the MCP sessions of the legacy era over HTTP, by their ids.
type clients struct {
	g     *Gateway
	limit int

	mu   sync.Mutex // guards byID and what is in it
	byID map[string]*client

	stop     chan struct{}
	stopOnce sync.Once
	done     sync.WaitGroup
}

// client is one connected MCP session.
type client struct {
	id      string
	session *mcp.ServerSession
	view    *view
	active  int       // requests being served, the event stream included
	seen    time.Time // when the last one ended

	gone  context.Context // done when the client has ended its session
	leave context.CancelFunc

	flying map[string]context.CancelFunc     // the calls that go the short way (short.go), by their ids
	asked  map[string]chan<- json.RawMessage // what they ask it, by the gateway's ids
	asks   int                               // how often they have
}

func newClients(g *Gateway, limit int) *clients {
	c := &clients{g: g, limit: limit, byID: map[string]*client{}, stop: make(chan struct{})}
	c.done.Go(c.sweep)
	return c
}

// add notes a session that has been initialized. Stdio has no id and is not noted.
func (c *clients) add(ss *mcp.ServerSession, v *view) {
	if ss.ID() == "" {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	cl := &client{id: ss.ID(), session: ss, view: v, seen: c.g.now()}
	cl.gone, cl.leave = context.WithCancel(context.Background())
	c.byID[ss.ID()] = cl
}

// ended is a channel of those that have gone already.
var ended = func() <-chan struct{} {
	ch := make(chan struct{})
	close(ch)
	return ch
}()

// during returns a context for a request of a session, which ends with it: the
// SDK lets go of a session only when its requests have been answered. gone is
// closed a little before; nil for a session without an id.
func (c *clients) during(ctx context.Context, ss *mcp.ServerSession) (_ context.Context, done context.CancelFunc, gone <-chan struct{}) {
	c.mu.Lock()
	cl := c.byID[ss.ID()]
	c.mu.Unlock()
	ctx, cancel := context.WithCancel(ctx)
	switch {
	case ss.ID() == "":
		return ctx, cancel, nil
	case cl == nil || cl.session != ss:
		return ctx, cancel, ended
	}
	stop := context.AfterFunc(cl.gone, cancel)
	return ctx, func() {
		stop()
		cancel()
	}, cl.gone.Done()
}

// fly notes a call, by its id as it was received, so that it can be cancelled;
// ok is false if there is one with this id.
func (c *clients) fly(cl *client, id json.RawMessage, cancel context.CancelFunc) (done func(), ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if cl.flying[string(id)] != nil {
		return nil, false
	}
	if cl.flying == nil {
		cl.flying = map[string]context.CancelFunc{}
	}
	cl.flying[string(id)] = cancel
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(cl.flying, string(id))
	}, true
}

// cancel ends the call that a notifications/cancelled is about, if it was noted.
func (c *clients) cancel(cl *client, notification json.RawMessage) {
	got, err := rawjson.Get(notification, "params")
	if err == nil && got[0] != nil {
		got, err = rawjson.Get(got[0], "requestId")
	}
	if err != nil || got[0] == nil {
		return
	}
	c.mu.Lock()
	cancel := cl.flying[string(got[0])]
	c.mu.Unlock()
	if cancel != nil {
		cancel()
	}
}

// asking makes an id for a request to a client, and waits for its answer until
// forget is called.
func (c *clients) asking(cl *client) (id string, answers <-chan json.RawMessage, forget func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if cl.asked == nil {
		cl.asked = map[string]chan<- json.RawMessage{}
	}
	cl.asks++
	id = "gatehouse-" + strconv.Itoa(cl.asks)
	answer := make(chan json.RawMessage, 1)
	cl.asked[id] = answer
	return id, answer, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(cl.asked, id)
	}
}

// answered hands a client's message to who waits for it; false if nobody does.
func (c *clients) answered(cl *client, message json.RawMessage) bool {
	got, err := rawjson.Get(message, "id")
	if err != nil || !json.Valid(message) {
		return false
	}
	id, _ := rawjson.String(got[0])
	c.mu.Lock()
	defer c.mu.Unlock()
	answer := cl.asked[id]
	if answer == nil {
		return false
	}
	delete(cl.asked, id) // a second answer is nobody's
	answer <- message
	return true
}

// enter finds a client and counts a request of it; leave ends the request. A
// client whose view is not theirs who ask is not there for them.
func (c *clients) enter(id string, theirs func(*view) bool) (cl *client, leave func(), ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if cl, ok = c.byID[id]; !ok || !theirs(cl.view) {
		return nil, nil, false
	}
	cl.active++
	return cl, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		cl.active--
		cl.seen = c.g.now()
	}, true
}

func (c *clients) has(id string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.byID[id] != nil
}

// makeRoom reports whether one more client fits. When all places are taken,
// the one that has been silent the longest gives up its own.
func (c *clients) makeRoom() bool {
	c.mu.Lock()
	var oldest *client
	full := len(c.byID) >= c.limit
	if full {
		oldest = c.takeOldestLocked()
	}
	c.mu.Unlock()
	if oldest != nil {
		c.displace(oldest)
	}
	return !full || oldest != nil
}

// trim ends those that are too many after a client has come for whom there was
// room: others may have come at the same time. Where all are busy, it leaves itself.
func (c *clients) trim(last string) {
	for {
		var over *client
		c.mu.Lock()
		if len(c.byID) > c.limit {
			if over = c.takeOldestLocked(); over == nil {
				over = c.byID[last]
				delete(c.byID, last)
			}
		}
		c.mu.Unlock()
		if over == nil {
			return
		}
		c.displace(over)
	}
}

// takeOldestLocked takes out the client that has been silent the longest; nil
// if none is.
func (c *clients) takeOldestLocked() (oldest *client) {
	for _, cl := range c.byID {
		if cl.active == 0 && (oldest == nil || cl.seen.Before(oldest.seen)) {
			oldest = cl
		}
	}
	if oldest != nil {
		delete(c.byID, oldest.id)
	}
	return oldest
}

// displace ends a client that was taken out for another's sake.
func (c *clients) displace(cl *client) {
	c.g.metrics.hit("sessions")
	c.g.log.Warn("session ended to make room: gateway.limits.sessions is reached", "session", shortID(cl.id))
	c.dismiss(cl)
}

// end closes a client's session; an isolated one takes its grants with it.
func (c *clients) end(cl *client) {
	c.mu.Lock()
	known := c.byID[cl.id] == cl
	if known {
		delete(c.byID, cl.id)
	}
	c.mu.Unlock()
	if known {
		c.dismiss(cl)
	}
}

// dismiss lets go of all that a client has that was taken out.
func (c *clients) dismiss(cl *client) {
	cl.leave()
	cl.session.Close()
	cl.view.levels.forget(cl.session)
	cl.view.peers.forget(cl.session)
	cl.view.session.Leave(cl.session)
	c.g.unsubscribeAll(caller{view: cl.view, client: cl.session})
	if cl.view.principal.Ephemeral() {
		c.g.end(cl.view.principal)
	}
}

// sweep ends the clients that have gone away.
func (c *clients) sweep() {
	ticker := time.NewTicker(clientSweep)
	defer ticker.Stop()
	for {
		select {
		case <-c.stop:
			return
		case <-ticker.C:
		}
		c.endIdle()
		c.g.restIdle()
	}
}

// views are those that have clients with a session.
func (c *clients) views() map[*view]bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	held := make(map[*view]bool, len(c.byID))
	for _, cl := range c.byID {
		held[cl.view] = true
	}
	return held
}

// endIdle ends them all at once: a remote that is down makes each goodbye take
// its time.
func (c *clients) endIdle() {
	var ending sync.WaitGroup
	for _, cl := range c.idle() {
		c.g.log.Info("session ended: idle", "session", shortID(cl.id))
		ending.Go(func() { c.end(cl) })
	}
	ending.Wait()
}

func (c *clients) idle() (gone []*client) {
	c.mu.Lock()
	defer c.mu.Unlock()
	limit := c.g.now().Add(-clientIdle)
	for _, cl := range c.byID {
		if cl.active == 0 && cl.seen.Before(limit) {
			gone = append(gone, cl)
		}
	}
	return gone
}

// close ends what clients are still being asked, which nobody waits for.
func (c *clients) close() {
	c.stopOnce.Do(func() { close(c.stop) })
	c.done.Wait()
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, cl := range c.byID {
		cl.leave()
	}
}

// shortID is as much of a session's id as a log may hold.
func shortID(id string) slog.Value {
	return slog.StringValue(id[:min(len(id), 8)])
}
