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
	clientIdle = 4 * time.Hour
	// streamGone and silentFor are when a client counts as having left: one whose
	// event stream is gone, and one that never had any. Its session stays, so that
	// it can come back, but for its sake nothing is held open any more.
	streamGone  = time.Minute
	silentFor   = 15 * time.Minute
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
	stream  bool      // it has had an event stream

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

// enter finds a client and counts a request of it, for its event stream perhaps;
// leave ends the request. A client whose view is not theirs who ask is not there
// for them.
func (c *clients) enter(id string, stream bool, theirs func(*view) bool) (cl *client, leave func(), ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if cl, ok = c.byID[id]; !ok || !theirs(cl.view) {
		return nil, nil, false
	}
	cl.active++
	cl.stream = cl.stream || stream
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

// makeRoom reports whether one more client fits. When all places are taken, an
// idle one gives up its own.
func (c *clients) makeRoom() bool {
	c.mu.Lock()
	var idle *client
	full := len(c.byID) >= c.limit
	if full {
		idle = c.takeIdleLocked()
	}
	c.mu.Unlock()
	if idle != nil {
		c.displace(idle)
	}
	return !full || idle != nil
}

// trim ends those that are too many after a client has come for whom there was
// room: others may have come at the same time. Where all are busy, it leaves itself.
func (c *clients) trim(last string) {
	for {
		var over *client
		c.mu.Lock()
		if len(c.byID) > c.limit {
			if over = c.takeIdleLocked(); over == nil {
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

// takeIdleLocked takes out one that is idle, nil if none is: of the principal that
// holds the most, so that nobody drives others out, the one that has been silent
// the longest.
func (c *clients) takeIdleLocked() (chosen *client) {
	held := map[*view]int{}
	for _, cl := range c.byID {
		held[cl.view]++
	}
	for _, cl := range c.byID {
		if cl.active > 0 {
			continue
		}
		if chosen == nil || held[cl.view] > held[chosen.view] ||
			held[cl.view] == held[chosen.view] && cl.seen.Before(chosen.seen) {
			chosen = cl
		}
	}
	if chosen != nil {
		delete(c.byID, chosen.id)
	}
	return chosen
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

// views are those that have clients with a session, and whether one of these is
// there.
func (c *clients) views() map[*view]bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	held := make(map[*view]bool, len(c.byID))
	now := c.g.now()
	for _, cl := range c.byID {
		held[cl.view] = held[cl.view] || !cl.left(now)
	}
	return held
}

// left reports whether a client has gone without a word.
func (cl *client) left(now time.Time) bool {
	after := silentFor
	if cl.stream {
		after = streamGone
	}
	return cl.active == 0 && now.Sub(cl.seen) >= after
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
