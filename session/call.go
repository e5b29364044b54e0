package session

import (
	"context"
	"encoding/json"
	"errors"
	"strconv"
	"sync"
	"time"

	"gatehouse/session/rawjson"
)

// askTimeout is what a person has to answer what a remote asks.
const askTimeout = 10 * time.Minute

// call is one request of a client while it is in flight.
type call struct {
	id      int64
	session *Session // whose client's it is
	from    Caller
	token   json.RawMessage // the client's progress token; nil: it wants no progress
	ctx     context.Context // ends with the call
	cancel  context.CancelFunc
	patient *patience
	asks    sync.WaitGroup

	mu    sync.Mutex // guards all below; not held while the client is told
	over  bool       // it is told nothing more
	asked int        // how often the client has been asked

	telling bool          // somebody is telling the client, one message at a time
	told    []notice      // what comes next, in order; empty if nobody is telling
	bytes   int           // of that
	deaf    bool          // it did not read for so long that others' messages had to wait
	room    chan struct{} // closed when something has been taken out of told; nil: nobody waits
	quiet   chan struct{} // closed when nobody is telling any more; nil: nobody waits
}

// notice is a notification for the client of a call.
type notice struct {
	method string
	params json.RawMessage
}

const (
	maxTold      = 64      // notices that wait for a client to read
	maxToldBytes = 1 << 20 // of those
	toldWait     = time.Second
)

// patience is the deadline of a call. It stands still while the client is being
// asked something: a person takes the time that a person takes.
type patience struct {
	timer  *time.Timer
	length time.Duration

	mu   sync.Mutex
	asks int
}

func (p *patience) pause() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.asks++; p.asks == 1 {
		p.timer.Stop()
	}
}

func (p *patience) resume() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.asks--; p.asks == 0 {
		p.timer.Reset(p.length)
	}
}

// start enters a call; until end its messages find their way by the link.
func (l *link) start(ctx context.Context, id int64, s *Session, from *Caller, token json.RawMessage, p *patience) *call {
	c := &call{id: id, session: s, from: *from, token: token, patient: p}
	c.ctx, c.cancel = context.WithCancel(ctx)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.calls == nil {
		l.calls = map[int64]*call{}
	}
	l.calls[id] = c
	return c
}

// end takes a call out and waits until nothing of it is under way any more. The
// client has been told all that there was, unless nobody waits for the call.
func (l *link) end(c *call) {
	l.mu.Lock()
	delete(l.calls, c.id)
	l.mu.Unlock()
	c.mu.Lock()
	c.over = true
	var quiet chan struct{}
	if c.telling {
		quiet = make(chan struct{})
		c.quiet = quiet
	}
	c.mu.Unlock()
	if quiet != nil {
		select {
		case <-quiet:
		case <-c.ctx.Done():
			c.mu.Lock()
			c.told = nil
			c.mu.Unlock()
			<-quiet
		}
	}
	c.cancel()
	c.asks.Wait()
}

// asking counts a request to the client; not ok if the call is over, or its
// remote has asked too often.
func (c *call) asking() (ok, tooOften bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.over || c.asked >= maxRequests {
		return false, !c.over
	}
	c.asked++
	c.asks.Add(1)
	return true, false
}

// notify gives the client a message, unless its call is over. Who reads the
// call's own stream waits until it has been told. Who reads a stream that is
// others' as well does not, but for a moment if there is much to tell: a client
// that does not read must not hold up the others.
func (c *call) notify(method string, params json.RawMessage, own bool) {
	if c.from.Notify == nil {
		return
	}
	c.mu.Lock()
	if own && !c.telling && !c.over {
		c.telling = true
		c.mu.Unlock()
		c.from.Notify(method, params)
		c.tell()
		return
	}
	if !c.makeRoomLocked(len(params), own) {
		c.mu.Unlock()
		return
	}
	c.told = append(c.told, notice{method, params})
	c.bytes += len(params)
	begin := !c.telling
	c.telling = true
	c.mu.Unlock()
	if begin {
		go c.tell() // end waits for it
	}
}

// makeRoomLocked waits for room for one more notice; false if there is none, or
// the call is over. It lets go of the lock meanwhile.
func (c *call) makeRoomLocked(size int, own bool) bool {
	var late <-chan time.Time
	for !c.over && len(c.told) > 0 && (len(c.told) >= maxTold || c.bytes+size > maxToldBytes) {
		if c.deaf && !own {
			return false
		}
		if late == nil && !own {
			timer := time.NewTimer(toldWait)
			defer timer.Stop()
			late = timer.C
		}
		if c.room == nil {
			c.room = make(chan struct{})
		}
		room := c.room
		c.mu.Unlock()
		select {
		case <-room:
			c.mu.Lock()
		case <-late:
			c.mu.Lock()
			c.deaf = true
		case <-c.ctx.Done():
			c.mu.Lock()
			return false
		}
	}
	return !c.over
}

// tell gives the client what there is to tell.
func (c *call) tell() {
	for {
		c.mu.Lock()
		if c.room != nil {
			close(c.room)
			c.room = nil
		}
		if len(c.told) == 0 {
			c.telling, c.deaf, c.told, c.bytes = false, false, nil, 0
			if c.quiet != nil {
				close(c.quiet)
			}
			c.mu.Unlock()
			return
		}
		next := c.told[0]
		c.told[0] = notice{}
		c.told = c.told[1:]
		c.bytes -= len(next.params)
		c.mu.Unlock()
		c.from.Notify(next.method, next.params)
	}
}

// byToken finds the call that a progress notification is about, and gives the
// notification the client's token again.
func (l *link) byToken(params json.RawMessage) (*call, json.RawMessage) {
	got, err := rawjson.Get(params, "progressToken")
	if err != nil {
		return nil, nil
	}
	id, err := strconv.ParseInt(string(got[0]), 10, 64)
	if err != nil {
		return nil, nil
	}
	l.mu.Lock()
	c := l.calls[id]
	l.mu.Unlock()
	if c == nil || c.token == nil {
		return nil, nil
	}
	restored, err := rawjson.Set(params, "progressToken", c.token)
	if err != nil {
		return nil, nil
	}
	return c, restored
}

// only returns the call that a message is about which came beside all calls:
// the newest, if those in flight are all one client's, else none. On what is
// common to all it could be about anybody's.
func (l *link) only() *call {
	if l.connection.shared {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	var newest *call
	oneClient := l.connection.session.owner != nil
	for _, c := range l.calls {
		if newest != nil && !oneClient && (c.from.Client != newest.from.Client || c.from.Client == nil) {
			return nil // a guess could reach the wrong one
		}
		if newest == nil || c.id > newest.id {
			newest = c
		}
	}
	return newest
}

// incoming takes what a remote sends on the stream of one of our requests; c is
// the call that this was for, nil for none.
func (l *link) incoming(c *call) incoming {
	return incoming{
		notify:  func(method string, params json.RawMessage) { l.heard(c, method, params) },
		request: func(id json.RawMessage, method string, params json.RawMessage) { l.asked(c, id, method, params) },
	}
}

// heard passes a remote's notification on to whom it concerns.
func (l *link) heard(c *call, method string, params json.RawMessage) {
	switch method {
	case "notifications/tools/list_changed":
		l.connection.main().said.Store(true)
		l.connection.main().changed()
	case "notifications/prompts/list_changed", "notifications/resources/list_changed":
		l.connection.main().changed()
	case notifyUpdated:
		l.connection.updated(params)
	case notifyCancelled:
		l.withdraw(params)
	case notifyProgress:
		if about, restored := l.byToken(params); about != nil && (c == nil || c == about) {
			about.notify(method, restored, c != nil)
		}
	default:
		own := c != nil
		if !own {
			c = l.only()
		}
		if c != nil {
			c.notify(method, params, own)
			return
		}
		l.mu.Lock()
		later := l.later
		l.mu.Unlock()
		if later != nil {
			later(method, params)
		}
	}
}

// asked answers a remote's request: a ping at once, what its client has
// declared by asking the client.
func (l *link) asked(c *call, id json.RawMessage, method string, params json.RawMessage) {
	// "The receiver MUST respond promptly with an empty response".
	if method == "ping" {
		l.connection.sendAside(l, append(append([]byte(`{"jsonrpc":"2.0","id":`), id...), `,"result":{}}`...))
		return
	}
	if c == nil {
		c = l.only()
	}
	refuse := func(code int, say string) {
		l.connection.sendAside(l, appendError(id, int64(code), say, nil))
	}
	switch {
	case askable[method] == "":
		refuse(codeUnknownMethod, "Method not found")
		return
	case c == nil:
		refuse(codeUnknownMethod, "No call of a client is in progress that this could be for")
		return
	case c.from.Ask == nil || !Declares(c.from.Capabilities, method, params):
		refuse(codeUnknownMethod, "The client behind this call has not declared this capability")
		return
	}
	if ok, tooOften := c.asking(); tooOften {
		refuse(codeInternal, "The client has been asked too often in this call")
		return
	} else if !ok {
		return
	}
	// Before the remote's next message is read, which may cancel it.
	a := l.enter(c, id)
	started := l.connection.session.spawn(func() {
		defer c.asks.Done()
		defer l.leave(a)
		l.ask(a, c, method, params)
	})
	if !started {
		l.leave(a)
		c.asks.Done()
	}
}

// ask is a remote's request while the client is being asked.
type ask struct {
	id     json.RawMessage
	ctx    context.Context
	cancel context.CancelCauseFunc
}

// errWithdrawn is why the client is not asked any more.
var errWithdrawn = errors.New("the remote has cancelled its request")

func (l *link) enter(c *call, id json.RawMessage) *ask {
	a := &ask{id: id}
	a.ctx, a.cancel = context.WithCancelCause(c.ctx)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.asks == nil {
		l.asks = map[string]*ask{}
	}
	l.asks[string(id)] = a
	return a
}

func (l *link) leave(a *ask) {
	a.cancel(nil)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.asks[string(a.id)] == a {
		delete(l.asks, string(a.id))
	}
}

// withdraw ends the request that a remote does not want to be answered any more.
func (l *link) withdraw(params json.RawMessage) {
	got, err := rawjson.Get(params, "requestId")
	if err != nil {
		return
	}
	l.mu.Lock()
	a := l.asks[string(got[0])]
	l.mu.Unlock()
	if a != nil {
		a.cancel(errWithdrawn)
	}
}

const (
	codeUnknownMethod = -32601
	codeInvalidParams = -32602
)

// ask asks the client behind a call, and gives the remote its answer.
func (l *link) ask(a *ask, c *call, method string, params json.RawMessage) {
	c.patient.pause()
	defer c.patient.resume()
	ctx, cancel := context.WithTimeout(a.ctx, askTimeout)
	defer cancel()
	var result json.RawMessage
	params, end, err := l.reportable(c, params)
	if err == nil {
		result, err = c.from.Ask(ctx, method, params)
		end()
	}
	if context.Cause(a.ctx) == errWithdrawn {
		// "Receivers of cancellation notifications SHOULD … Not send a response for
		// the cancelled request".
		return
	}
	id := a.id
	var body []byte
	switch refusal, ok := errors.AsType[*ResponseError](err); {
	case err == nil:
		body = append(append([]byte(`{"jsonrpc":"2.0","id":`), id...), `,"result":`...)
		body = append(append(body, result...), '}')
	case ok:
		body = appendError(id, refusal.Code, refusal.Message, refusal.Data)
	default:
		l.connection.session.log.Info("client did not answer a remote", "remote", l.connection.remote.Name, "method", method, "error", err)
		body = appendError(id, codeInternal, "The client did not answer", nil)
	}
	sending, cancel := context.WithTimeout(l.connection.session.ctx, asideTimeout)
	defer cancel()
	// A person takes longer than a token may live.
	err = l.connection.wire.authorized(sending, false, func() error { return l.via.notify(sending, l.header, body) })
	if err != nil {
		l.connection.session.log.Info("client's answer not delivered", "remote", l.connection.remote.Name, "method", method, "error", err)
	}
}

const codeInternal = -32603

// appendError writes the error response to a remote's request; data may be nil.
func appendError(id json.RawMessage, code int64, say string, data json.RawMessage) []byte {
	quoted, err := json.Marshal(say)
	if err != nil {
		quoted = []byte(`""`) // strings always have an encoding
	}
	body := append([]byte(`{"jsonrpc":"2.0","id":`), id...)
	body = append(body, `,"error":{"code":`...)
	body = strconv.AppendInt(body, code, 10)
	body = append(body, `,"message":`...)
	body = append(body, quoted...)
	if data != nil {
		body = append(append(body, `,"data":`...), data...)
	}
	return append(body, `}}`...)
}
