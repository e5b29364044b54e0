package gateway

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/modelcontextprotocol/go-sdk/jsonrpc"

	"gatehouse/auth"
	"gatehouse/session"
	"gatehouse/session/rawjson"
)

// This file is what a request needs of the client before it can be answered: a
// sign-in, or what the remote asks. In the legacy era the client is sent a
// request of its own; in the modern one the answer says that input is required,
// and the client sends its request again with the input.

const (
	// signInWait is how long a repeated request waits for the browser.
	signInWait = time.Minute
	// signInRounds is how often a request asks for the same sign-in by
	// elicitation before it says so in its result.
	signInRounds = 3
	// parkedLife is how long a call waits for the client to come back.
	parkedLife = 10 * time.Minute
	// maxParked bounds the waiting calls of one principal.
	maxParked = 64
	// answerWait is what a person has to answer what a modern remote asks.
	answerWait = 10 * time.Minute
	// inputRounds is how often a remote may ask in the course of one request.
	inputRounds = 16
	// maxQuestions bounds the bytes of what one waiting call's remote asks at
	// once: some samplings have images in them.
	maxQuestions = 4 << 20
	// maxHeld bounds the same for all calls of one principal.
	maxHeld = 32 << 20
)

// codeURLElicitation is the error of protocol 2025-11-25 that a URL has to be
// visited first.
const codeURLElicitation = -32042

// interactive answers the requests in whose course the client can be asked
// something.
func (g *Gateway) interactive(ctx context.Context, c caller, method string, params json.RawMessage) (json.RawMessage, error) {
	was := &ticket{}
	var parked *parkedCall
	if c.modern {
		var err error
		if was, parked, params, err = g.resume(c, method, params); err != nil {
			return nil, err
		}
		c.foreign = was.Foreign
	}
	request := func() [32]byte { return digest(method, params) }
	c.request = request
	var result json.RawMessage
	var err error
	if parked != nil {
		began := g.now()
		c.notify = c.takeUp(params)
		result, err = g.attend(ctx, c, parked, was.Answers)
		g.answered(ctx, c, parked.remote, parked.method, parked.name, began, result, err)
	} else {
		if was.Remote != "" {
			g.waitForSignIn(ctx, c, was)
		}
		result, err = g.dispatch(ctx, c, method, params)
	}
	required, ok := errors.AsType[*auth.RequiredError](err)
	if ok {
		required = g.withStrangers(ctx, c, required)
		err = required
	}
	if ok && session.Declares(c.capabilities, "elicitation/create", urlMode) {
		switch {
		case c.modern && was.Round < signInRounds && !was.Refused:
			return g.elicitSignIn(c, required, &ticket{Remote: required.Remote, Round: was.Round + 1, Request: request()})
		case !c.modern && c.later != nil:
			if needs := g.requireURL(c, required); needs != nil {
				return nil, needs
			}
		}
	}
	if refusal, ok := errors.AsType[*session.ResponseError](err); ok && refusal.Code == codeURLElicitation && c.modern {
		return g.elicitURLs(c, method, refusal, &ticket{Round: was.Round + 1, Request: request()})
	}
	if err != nil && method == "tools/call" {
		return renderCall(err, g.now())
	}
	return result, err
}

var urlMode = json.RawMessage(`{"mode":"url"}`)

// dispatch does a request that may ask for input.
func (g *Gateway) dispatch(ctx context.Context, c caller, method string, params json.RawMessage) (json.RawMessage, error) {
	switch method {
	case "tools/call":
		return g.callTool(ctx, c, params)
	case "prompts/get":
		return g.getPrompt(ctx, c, params)
	}
	return g.readResource(ctx, c, params)
}

// ticket is what the gateway's own requestState holds. Sealed: MCP 2026-07-28,
// multi round-trip requests, has it protected, bound to the principal and the
// request, and short-lived.
type ticket struct {
	Remote  string    `json:"remote,omitempty"` // whose sign-in is awaited
	Parked  string    `json:"parked,omitempty"` // the call that waits
	Round   int       `json:"round,omitempty"`
	Request [32]byte  `json:"request"`
	Expires time.Time `json:"expires"`
	Refused bool      `json:"-"` // the user said no
	Answers []byte    `json:"-"` // to what the call has asked
	Foreign bool      `json:"-"` // it cannot be opened: another process's, or one for another principal
}

// digest tells a request from others: the ticket of one is none for another.
func digest(method string, params json.RawMessage) [32]byte {
	plain, err := rawjson.Delete(params, func(key string) bool {
		return key == "_meta" || key == "inputResponses" || key == "requestState"
	})
	if err != nil {
		plain = params
	}
	return sha256.Sum256(append([]byte(method+"\x00"), plain...))
}

// resume reads the requestState of a request that is sent again. One that is
// not the gateway's is the remote's, and goes there with the params as they are.
func (g *Gateway) resume(c caller, method string, params json.RawMessage) (*ticket, *parkedCall, json.RawMessage, error) {
	none := &ticket{}
	if !bytes.Contains(params, []byte(`"requestState"`)) {
		return none, nil, params, nil
	}
	got, err := rawjson.Get(params, "requestState", "inputResponses")
	if err != nil {
		return nil, nil, nil, &invalidParams{"the params of " + method + " have a member twice"}
	}
	state, _ := rawjson.String(got[0])
	plain, ours := g.states.open(c.view.principal, state)
	if !ours {
		none.Foreign = strings.HasPrefix(state, ticketPrefix)
		return none, nil, params, nil
	}
	t := &ticket{}
	if json.Unmarshal(plain, t) != nil || t.Request != digest(method, params) || g.now().After(t.Expires) {
		return nil, nil, nil, errStale
	}
	if params, err = rawjson.Delete(params, func(key string) bool { return key == "requestState" || key == "inputResponses" }); err != nil {
		return nil, nil, nil, &invalidParams{"the params of " + method + " cannot be read"}
	}
	if t.Parked == "" {
		t.Refused = refused(got[1])
		return t, nil, params, nil
	}
	parked := g.parked.take(c.view.principal, t.Parked)
	if parked == nil {
		return nil, nil, nil, errStale
	}
	t.Answers = got[1]
	return t, parked, params, nil
}

var errStale = &invalidParams{"this requestState belongs to another request or has run out: send the request again without it"}

// refuseForeign refuses a request with a ticket that cannot be opened, where it
// cannot be the remote's own: one of the legacy era has none. The ticket's call
// may be waiting for its client elsewhere, and must not be made twice.
func (g *Gateway) refuseForeign(ctx context.Context, c caller, remote string) error {
	if !c.foreign {
		return nil
	}
	if c.view.session.Status(remote).Protocol == "" {
		if err := g.connect(ctx, c, remote); err != nil {
			return err
		}
	}
	if c.view.session.Status(remote).Protocol < modernVersion {
		return errStale
	}
	return nil // a gateway like this one, perhaps
}

// refused reports whether the user did not want to visit a link.
func refused(responses json.RawMessage) bool {
	no := false
	_ = rawjson.Each(responses, func(m rawjson.Member) bool {
		if got, err := rawjson.Get(responses[m.Start:m.End], "action"); err == nil {
			action, _ := rawjson.String(got[0])
			no = no || action == "decline" || action == "cancel"
		}
		return true
	})
	return no
}

// inputRequest is one thing that a client is asked for.
type inputRequest struct {
	Method string          `json:"method"`
	Params json.RawMessage `json:"params,omitempty"`
}

// inputRequired is the result that asks for input.
func (g *Gateway) inputRequired(c caller, requests map[string]inputRequest, t *ticket) (json.RawMessage, error) {
	t.Expires = g.now().Add(parkedLife)
	plain, err := json.Marshal(t)
	if err != nil {
		return nil, fmt.Errorf("encoding a ticket: %w", err)
	}
	result, err := json.Marshal(struct {
		ResultType string                  `json:"resultType"`
		Requests   map[string]inputRequest `json:"inputRequests"`
		State      string                  `json:"requestState"`
	}{"input_required", requests, g.states.seal(c.view.principal, plain)})
	if err != nil {
		return nil, fmt.Errorf("encoding input_required: %w", err)
	}
	return result, nil
}

// urlElicitation are the params of an elicitation of a URL.
type urlElicitation struct {
	Mode    string `json:"mode"`
	ID      string `json:"elicitationId,omitempty"` // up to 2025-11-25
	URL     string `json:"url"`
	Message string `json:"message"`
}

// elicitSignIn asks a modern client to open the sign-in link.
func (g *Gateway) elicitSignIn(c caller, required *auth.RequiredError, t *ticket) (json.RawMessage, error) {
	params, err := json.Marshal(urlElicitation{Mode: "url", URL: required.AuthURL, Message: elicitation(required)})
	if err != nil {
		return nil, fmt.Errorf("encoding an elicitation: %w", err)
	}
	return g.inputRequired(c, map[string]inputRequest{"gatehouse_sign_in": {"elicitation/create", params}}, t)
}

// waitForSignIn waits a while for the browser. What came of it the request
// finds out.
func (g *Gateway) waitForSignIn(ctx context.Context, c caller, t *ticket) {
	if t.Refused {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, signInWait)
	defer cancel()
	if err := g.awaitSignIn(ctx, c.view.principal, t.Remote); err != nil {
		g.log.DebugContext(ctx, "waited for a sign-in", "remote", t.Remote, "principal", c.view.principal, "error", err)
		return
	}
	if err := c.view.session.Connect(ctx, t.Remote); err != nil {
		g.log.DebugContext(ctx, "connecting after a sign-in failed", "remote", t.Remote, "principal", c.view.principal, "error", err)
	}
}

// needsURL is the error of protocol 2025-11-25 that a URL has to be visited.
type needsURL struct {
	elicitation urlElicitation
}

func (e *needsURL) Error() string { return "a link has to be opened first" }

// requireURL asks a client of 2025-11-25 to open the sign-in link, and tells it
// when that has ended, well or not. Nil: enough such calls wait for that already.
func (g *Gateway) requireURL(c caller, required *auth.RequiredError) error {
	if c.view.links.Add(1) > maxParked {
		c.view.links.Add(-1)
		return nil
	}
	e := &needsURL{urlElicitation{Mode: "url", ID: uuid.NewString(), URL: required.AuthURL, Message: elicitation(required)}}
	done, err := json.Marshal(map[string]string{"elicitationId": e.elicitation.ID})
	if err != nil {
		c.view.links.Add(-1)
		return fmt.Errorf("encoding an elicitation: %w", err)
	}
	started := c.view.background(func(ended context.Context) {
		defer c.view.links.Add(-1)
		ctx, cancel := context.WithTimeout(ended, parkedLife)
		defer cancel()
		// Complete means over: well, or not.
		_ = g.awaitSignIn(ctx, c.view.principal, required.Remote)
		if ended.Err() == nil {
			c.later("notifications/elicitation/complete", done)
		}
	})
	if !started {
		c.view.links.Add(-1)
		return session.ErrClosed
	}
	return e
}

// elicitURLs gives a modern client what a legacy remote wants to be visited.
// "Servers MUST NOT send" the error itself in the modern era.
func (g *Gateway) elicitURLs(c caller, method string, refusal *session.ResponseError, t *ticket) (json.RawMessage, error) {
	var data struct {
		Elicitations []urlElicitation `json:"elicitations"`
	}
	if json.Unmarshal(refusal.Data, &data) != nil || len(data.Elicitations) == 0 || t.Round > inputRounds ||
		!session.Declares(c.capabilities, "elicitation/create", urlMode) {
		const say = "The remote wants a page to be visited first, which your client cannot show. Visit it by other means, or use another client."
		if method == "tools/call" {
			return toolError(say)
		}
		return nil, &session.ResponseError{Code: jsonrpc.CodeInternalError, Message: say}
	}
	requests := map[string]inputRequest{}
	for i, e := range data.Elicitations {
		e.Mode, e.ID = "url", ""
		params, err := json.Marshal(e)
		if err != nil {
			return nil, fmt.Errorf("encoding an elicitation: %w", err)
		}
		requests[strconv.Itoa(i+1)] = inputRequest{"elicitation/create", params}
	}
	return g.inputRequired(c, requests, t)
}

// inputOf returns what a remote of 2026-07-28 asks for in a result, nil if the
// result is complete.
func inputOf(result json.RawMessage) (requests map[string]inputRequest, state json.RawMessage, err error) {
	if !bytes.Contains(result, []byte(`"input_required"`)) {
		return nil, nil, nil
	}
	got, err := rawjson.Get(result, "resultType", "inputRequests", "requestState")
	if err != nil {
		return nil, nil, fmt.Errorf("reading a result: %w", err)
	}
	if kind, _ := rawjson.String(got[0]); kind != "input_required" {
		return nil, nil, nil
	}
	requests = map[string]inputRequest{}
	if got[1] != nil {
		if err := json.Unmarshal(got[1], &requests); err != nil {
			return nil, nil, fmt.Errorf("reading input requests: %w", err)
		}
	}
	return requests, got[2], nil
}

// provide asks a legacy client for what a modern remote wants, and returns the
// params to send again.
func (c caller) provide(ctx context.Context, params json.RawMessage, requests map[string]inputRequest, state json.RawMessage) (_ json.RawMessage, err error) {
	responses := make(map[string]json.RawMessage, len(requests))
	for _, key := range slices.Sorted(maps.Keys(requests)) {
		request := requests[key]
		if c.ask == nil || !session.Declares(c.capabilities, request.Method, request.Params) {
			return nil, &session.ResponseError{Code: -32601, Message: "the remote asks for something that the client has not declared: " + short(request.Method)}
		}
		if request.Params, err = withElicitationID(request); err != nil {
			return nil, fmt.Errorf("reading an elicitation: %w", err)
		}
		response, err := c.question(ctx, request)
		if err != nil {
			return nil, err
		}
		responses[key] = response
	}
	encoded, err := json.Marshal(responses)
	if err != nil {
		return nil, fmt.Errorf("encoding input responses: %w", err)
	}
	if params, err = rawjson.Set(params, "inputResponses", encoded); err != nil {
		return nil, fmt.Errorf("adding input responses: %w", err)
	}
	if state == nil {
		return params, nil
	}
	return rawjson.Set(params, "requestState", state)
}

// withElicitationID returns the params of a request for a legacy client: up to
// 2025-11-25 the elicitation of a URL has to have an id, and since it has none.
func withElicitationID(r inputRequest) (json.RawMessage, error) {
	if r.Method != "elicitation/create" {
		return r.Params, nil
	}
	got, err := rawjson.Get(r.Params, "mode", "elicitationId")
	if mode, _ := rawjson.String(got[0]); err != nil || mode != "url" || got[1] != nil {
		return r.Params, err
	}
	return rawjson.Set(r.Params, "elicitationId", []byte(strconv.Quote(uuid.NewString())))
}

// withoutElicitationID is the reverse for a modern client.
func withoutElicitationID(method string, params json.RawMessage) (json.RawMessage, error) {
	if method != "elicitation/create" || len(params) == 0 {
		return params, nil
	}
	return rawjson.Delete(params, func(key string) bool { return key == "elicitationId" })
}

// question asks a legacy client one thing. A client whose stream was cut may
// never have heard of it.
func (c caller) question(ctx context.Context, request inputRequest) (json.RawMessage, error) {
	ctx, end := context.WithCancelCause(ctx)
	defer end(nil)
	defer context.AfterFunc(c.view.ended, func() { end(session.ErrClosed) })()
	ctx, cancel := context.WithTimeoutCause(ctx, answerWait, errNoAnswer)
	defer cancel()
	response, err := c.ask(ctx, request.Method, request.Params)
	if err == nil {
		return response, nil
	}
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	return nil, fmt.Errorf("asking the client: %w", err)
}

// parkedCalls are the calls to legacy remotes that wait for a modern client to
// come back with what the remote has asked for. They wait in this process only.
type parkedCalls struct {
	mu   sync.Mutex // guards all below
	byID map[string]*parkedCall
	held map[auth.Principal]int // bytes of what is asked of them
}

// parkedCall is a call that goes on while no request of its client is there.
type parkedCall struct {
	all       *parkedCalls
	id        string
	principal auth.Principal
	remote    string
	name      string // of the tool or the prompt, as the remote knows it
	method    string
	request   [32]byte
	cancel    context.CancelFunc
	done      chan struct{} // closed when result and err are set
	result    json.RawMessage
	err       error
	news      chan struct{} // holds one: something is asked

	mu       sync.Mutex // guards all below
	asked    int
	held     int  // bytes of what is pending
	attended bool // a request of the client waits for what comes next
	pending  map[string]*question
	notify   func(method string, params json.RawMessage) // to the client, while it is there
	expires  *time.Timer
}

type question struct {
	inputRequest
	answered chan json.RawMessage // holds one
}

// take finds a parked call of a principal.
func (p *parkedCalls) take(principal auth.Principal, id string) *parkedCall {
	p.mu.Lock()
	defer p.mu.Unlock()
	if call := p.byID[id]; call != nil && call.principal == principal {
		return call
	}
	return nil
}

// add parks a call; false if there are too many of the principal.
func (p *parkedCalls) add(call *parkedCall) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.byID == nil {
		p.byID = map[string]*parkedCall{}
	}
	if p.byID[call.id] != nil {
		return true
	}
	n := 0
	for _, other := range p.byID {
		if other.principal == call.principal {
			n++
		}
	}
	if n >= maxParked {
		return false
	}
	p.byID[call.id] = call
	return true
}

// hold counts bytes that are asked of a principal, fewer if n is below zero;
// false if they were too many.
func (p *parkedCalls) hold(principal auth.Principal, n int) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	held := p.held[principal] + n
	switch {
	case n > 0 && held > maxHeld:
		return false
	case held == 0:
		delete(p.held, principal)
		return true
	case p.held == nil:
		p.held = map[auth.Principal]int{}
	}
	p.held[principal] = held
	return true
}

func (p *parkedCalls) remove(call *parkedCall) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.byID, call.id)
}

// answer gives the remote's questions what the client has sent.
func (p *parkedCall) answer(responses json.RawMessage) {
	p.mu.Lock()
	defer p.mu.Unlock()
	_ = rawjson.Each(responses, func(m rawjson.Member) bool {
		if q := p.pending[m.Key]; q != nil {
			p.settleLocked(m.Key, q)
			q.answered <- slices.Clone(responses[m.Start:m.End])
		}
		return true
	})
}

// ask is what the remote calls for: it waits until the client has come back.
func (p *parkedCall) ask(ctx context.Context, method string, params json.RawMessage) (json.RawMessage, error) {
	params, err := withoutElicitationID(method, params)
	if err != nil {
		return nil, fmt.Errorf("reading an elicitation: %w", err)
	}
	q := &question{inputRequest{method, slices.Clone(params)}, make(chan json.RawMessage, 1)}
	p.mu.Lock()
	p.asked++
	key := strconv.Itoa(p.asked)
	if p.asked > inputRounds {
		p.mu.Unlock()
		return nil, &session.ResponseError{Code: -32603, Message: "asked too often in one call"}
	}
	size := len(q.Method) + len(q.Params)
	if p.held+size > maxQuestions || !p.all.hold(p.principal, size) {
		p.mu.Unlock()
		return nil, &session.ResponseError{Code: -32603, Message: "asked for more at once than the gateway keeps for a client"}
	}
	p.held += size
	p.pending[key] = q
	p.mu.Unlock()
	select {
	case p.news <- struct{}{}:
	default:
	}
	select {
	case answer := <-q.answered:
		return answer, nil
	case <-ctx.Done():
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.pending[key] == q {
			p.settleLocked(key, q)
		}
		return nil, ctx.Err()
	}
}

// settleLocked takes a question out that is pending.
func (p *parkedCall) settleLocked(key string, q *question) {
	delete(p.pending, key)
	size := len(q.Method) + len(q.Params)
	p.held -= size
	p.all.hold(p.principal, -size)
}

// callParkable sends a modern client's request to a remote that may turn out to
// be a legacy one which asks something in the middle of it.
func (g *Gateway) callParkable(ctx context.Context, c caller, remote, method, name string, params json.RawMessage) (json.RawMessage, error) {
	background, cancel := context.WithCancel(context.WithoutCancel(ctx))
	p := &parkedCall{
		all: &g.parked, id: uuid.NewString(), principal: c.view.principal, remote: remote, method: method, name: name, request: c.request(), cancel: cancel,
		done: make(chan struct{}), news: make(chan struct{}, 1), pending: map[string]*question{},
	}
	from := c.behind()
	from.Ask = p.ask
	from.Notify = func(method string, params json.RawMessage) {
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.notify != nil {
			p.notify(method, params)
		}
	}
	c.view.stay() // while it is parked there may be no request
	started := c.view.background(func(ended context.Context) {
		defer cancel()
		defer context.AfterFunc(ended, cancel)()
		p.result, p.err = c.view.session.Call(background, remote, method, params, from)
		c.view.leave()
		close(p.done)
	})
	if !started {
		c.view.leave()
		cancel()
		return nil, session.ErrClosed
	}
	return g.attend(ctx, c, p, nil)
}

// attend gives a call the client's answers and waits for what comes next of it:
// its result, or a question.
func (g *Gateway) attend(ctx context.Context, c caller, p *parkedCall, answers json.RawMessage) (json.RawMessage, error) {
	p.mu.Lock()
	if p.attended {
		p.mu.Unlock()
		return nil, &invalidParams{"another request with this requestState is in progress: wait for its answer"}
	}
	if p.expires != nil {
		p.expires.Stop()
	}
	p.attended, p.notify = true, c.notify
	p.mu.Unlock()
	p.answer(answers)
	defer func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.attended, p.notify = false, nil
	}()
	for {
		if requests := p.questions(); requests != nil {
			if !g.parked.add(p) {
				p.cancel()
				<-p.done
				return nil, &invalidParams{"too many calls are waiting for your input: answer those first"}
			}
			p.mu.Lock()
			p.expires = time.AfterFunc(parkedLife, func() {
				p.cancel()
				g.parked.remove(p)
			})
			p.mu.Unlock()
			return g.inputRequired(c, requests, &ticket{Parked: p.id, Request: p.request})
		}
		select {
		case <-p.news:
		case <-ctx.Done():
			p.cancel()
			<-p.done
		case <-p.done:
		}
		select {
		case <-p.done:
			g.parked.remove(p)
			if p.err != nil {
				g.failed(ctx, c, p.remote, "passing on "+p.method, p.err)
			}
			return p.result, p.err
		default:
		}
	}
}

// questions returns what the remote still waits for, nil for nothing.
func (p *parkedCall) questions() map[string]inputRequest {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.pending) == 0 {
		return nil
	}
	requests := make(map[string]inputRequest, len(p.pending))
	for key, q := range p.pending {
		requests[key] = q.inputRequest
	}
	return requests
}
