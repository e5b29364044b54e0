package gateway

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/modelcontextprotocol/go-sdk/mcp"

	"gatehouse/auth"
	"gatehouse/session"
	"gatehouse/session/rawjson"
)

// caller is who sent a request, as far as its answer depends on it.
type caller struct {
	view         *view
	modern       bool            // protocol 2026-07-28 or newer
	client       any             // its session, to tell it from the principal's others; nil in the modern era
	gone         <-chan struct{} // closed when that has ended; nil where it ends with all that it has
	capabilities json.RawMessage // what it declares (MCP ClientCapabilities); nil: nothing
	foreign      bool            // the request has a ticket of the gateway's kind that cannot be opened
	request      func() [32]byte // tells the request that is being answered from others
	params       json.RawMessage // of the request, in the modern era: there it says what it calls itself

	notify func(method string, params json.RawMessage)                                               // sends it a notification, on the stream of this request; may be nil
	later  func(method string, params json.RawMessage)                                               // the same when no request is there; nil in the modern era
	ask    func(ctx context.Context, method string, params json.RawMessage) (json.RawMessage, error) // sends it a request; nil in the modern era
}

// name is what the client calls itself, which may be anything; empty: nothing.
func (c caller) name() string {
	var info mcp.Implementation
	if ss, ok := c.client.(*mcp.ServerSession); ok {
		if began := ss.InitializeParams(); began != nil && began.ClientInfo != nil {
			info = *began.ClientInfo
		}
	} else if got, err := rawjson.Get(c.params, "_meta"); err == nil && got[0] != nil {
		got, err = rawjson.Get(got[0], "io.modelcontextprotocol/clientInfo")
		if err != nil || json.Unmarshal(got[0], &info) != nil {
			return ""
		}
	}
	return cmp.Or(info.Title, info.Name)
}

// behind is the caller as the remotes notice it.
func (c caller) behind() *session.Caller {
	return &session.Caller{
		Client: c.client, Gone: c.gone, Modern: c.modern, Capabilities: c.capabilities,
		Notify: c.notify, Later: c.afterwards(), Ask: c.ask,
	}
}

// handle answers one request of a client. Params and result are the exact
// bytes; what the SDK makes of them stays in the adapter (server.go).
func (g *Gateway) handle(ctx context.Context, c caller, method string, params json.RawMessage) (json.RawMessage, error) {
	switch method {
	case "tools/list":
		return g.list(ctx, c, method, params, "tools", 0, func(m *merged) *entries { return &m.tools })
	case "tools/call", "prompts/get", "resources/read":
		return g.interactive(ctx, c, method, params)
	case "prompts/list":
		return g.list(ctx, c, method, params, "prompts", 1, func(m *merged) *entries { return &m.prompts })
	case "resources/list":
		return g.list(ctx, c, method, params, "resources", 2, func(m *merged) *entries { return &m.resources })
	case "resources/templates/list":
		return g.list(ctx, c, method, params, "resourceTemplates", 3, func(m *merged) *entries { return &m.templates })
	case "completion/complete":
		return g.complete(ctx, c, params)
	case "logging/setLevel":
		return g.setLevel(c, params)
	}
	return nil, fmt.Errorf("%w: %s", errUnknownMethod, method)
}

func (g *Gateway) list(ctx context.Context, c caller, method string, params json.RawMessage, member string, kind int, of func(*merged) *entries) (json.RawMessage, error) {
	if len(params) > 0 {
		got, err := rawjson.Get(params, "cursor")
		if err != nil {
			return nil, &invalidParams{"the params of " + method + " are not an object"}
		}
		// Everything is on one page, so no cursor was ever given out.
		if got[0] != nil && string(got[0]) != "null" {
			return nil, &invalidParams{"unknown cursor"}
		}
	}
	list := of(c.view.list(ctx)).list
	out := make(json.RawMessage, 0, len(list)+len(member)+64)
	out = append(append(append(out, `{"`...), member...), `":`...)
	out = append(out, list...)
	if c.modern {
		ttl, scope := c.view.cacheHint(kind)
		out = fmt.Appendf(out, `,"ttlMs":%d,"cacheScope":%q`, ttl.Milliseconds(), scope)
	}
	c.view.session.Refresh() // what comes of it is announced
	return append(out, '}'), nil
}

// callTool is the one path of every tool call: the name is looked up in the
// merged catalog, which holds only what may be called, and the call goes to
// the gateway's own tool or to the remote.
func (g *Gateway) callTool(ctx context.Context, c caller, params json.RawMessage) (json.RawMessage, error) {
	got, err := rawjson.Get(params, "name", "arguments")
	if err != nil {
		return nil, &invalidParams{"the params of tools/call are not an object with a name"}
	}
	name, ok := rawjson.String(got[0])
	if !ok {
		return nil, &invalidParams{"tools/call needs the name of a tool"}
	}
	t, err := g.find(ctx, c, name, func(m *merged) *entries { return &m.tools }, unknownTool)
	if err != nil {
		return nil, err
	}
	if t.remote == "" {
		result, err := g.callOwn(ctx, c, t.name, got[1], params)
		if err == nil && t.name != toolCall {
			return g.tellOfStrangers(ctx, c, t.name, result)
		}
		return result, err
	}
	outgoing, err := rename(params, t.original)
	if err != nil {
		return nil, &invalidParams{"the params of tools/call cannot be read"}
	}
	return g.send(ctx, c, t.remote, "tools/call", outgoing)
}

// send is how every request of a client gets to a remote.
func (g *Gateway) send(ctx context.Context, c caller, remote, method string, params json.RawMessage) (json.RawMessage, error) {
	began, name := g.now(), nameIn(method, params)
	result, err := g.pass(ctx, c, remote, method, name, params)
	g.answered(ctx, c, remote, method, name, began, result, err)
	return result, err
}

// answered takes note of what a remote has made of a client's request.
func (g *Gateway) answered(ctx context.Context, c caller, remote, method, name string, began time.Time, result json.RawMessage, err error) {
	g.observe(ctx, c, remote, method, name, began, result, err)
	if err == nil && len(g.index) > 1 {
		c.view.linked.note(remote, result)
	}
}

// pass sends a request to a remote and gets it what it asks for meanwhile.
func (g *Gateway) pass(ctx context.Context, c caller, remote, method, name string, params json.RawMessage) (json.RawMessage, error) {
	release, refused := c.view.calls.take()
	if refused != nil {
		g.metrics.hit(refused.limit)
		return nil, refused
	}
	defer release()
	if err := g.refuseForeign(ctx, c, remote); err != nil {
		return nil, err
	}
	c.notify = c.relay(params)
	if c.modern && c.request != nil && asksBack(c.capabilities) {
		return g.callParkable(ctx, c, remote, method, name, params)
	}
	for range inputRounds {
		result, err := c.view.session.Call(ctx, remote, method, params, c.behind())
		if err != nil {
			g.failed(ctx, c, remote, "passing on "+method, err)
			return nil, err
		}
		if c.modern {
			return result, nil
		}
		requests, state, err := inputOf(result)
		if err != nil {
			return nil, err
		}
		if requests == nil {
			return legacyResult(result)
		}
		if params, err = c.provide(ctx, params, requests, state); err != nil {
			g.failed(ctx, c, remote, "asking the client on behalf of "+method, err)
			return nil, err
		}
	}
	return nil, &session.ResponseError{Code: -32603, Message: "the remote asked for input again and again"}
}

// asksBack reports whether a client can be asked anything.
func asksBack(capabilities json.RawMessage) bool {
	return len(session.Profile(capabilities)) > len("{}")
}

// find looks a tool or a prompt up. A name that is not listed but carries the
// prefix of a remote whose lists are not known yet is worth a connection: that
// is the first call of a client that has the name from elsewhere, and where a
// sign-in is asked for.
func (g *Gateway) find(ctx context.Context, c caller, name string, in func(*merged) *entries, unknown func(string) error) (entry, error) {
	v := c.view
	if e, ok := in(v.now()).lookup(name); ok {
		return e, nil
	}
	var failed error
	for _, owner := range g.names.owners(name) {
		remote := g.cfg.Running()[owner].Name
		if v.known(remote) {
			continue
		}
		err := g.connectFirst(ctx, c, remote)
		if _, required := errors.AsType[*auth.RequiredError](err); required {
			return entry{}, err
		}
		if e, ok := in(v.latest()).lookup(name); ok {
			return e, nil
		}
		failed = cmp.Or(failed, err) // of several with one prefix, another may have it
	}
	if e, ok := in(v.latest()).lookup(name); ok {
		return e, nil
	}
	return entry{}, cmp.Or(failed, unknown(name))
}

// connectFirst connects a remote that has not been listed yet, for a request
// that is not counted before its remote is known.
func (g *Gateway) connectFirst(ctx context.Context, c caller, remote string) error {
	calls := c.view.calls
	release, refused := calls.take()
	if refused != nil {
		g.metrics.hit(refused.limit)
		g.observe(ctx, c, remote, "initialize", "", g.now(), nil, refused)
		return refused
	}
	defer release()
	err := g.connect(ctx, c, remote)
	if err == nil {
		calls.giveBack() // the request itself counts
	}
	return err
}

// connect connects a remote, for a request that is counted.
func (g *Gateway) connect(ctx context.Context, c caller, remote string) error {
	began := g.now()
	err := c.view.session.Connect(ctx, remote)
	if err != nil {
		// The call that wanted it ends here, its tool not known yet.
		g.observe(ctx, c, remote, "initialize", "", began, nil, err)
		g.failed(ctx, c, remote, "connecting for a first call", err)
	}
	return err
}

func unknownTool(name string) error {
	return &invalidParams{fmt.Sprintf("unknown tool %q: gateway_find_tools searches all that there are", short(name))}
}

func short(name string) string {
	if len(name) > maxName {
		return name[:maxName] + "…"
	}
	return name
}

// failed writes the cause of what the client gets as a sentence, and looks
// after a sign-in that was asked for.
func (g *Gateway) failed(ctx context.Context, c caller, remote, doing string, err error) {
	if required, ok := errors.AsType[*auth.RequiredError](err); ok {
		// What should happen, and auth has logged the link.
		g.auth.AskedBy(ctx, required, c.name())
		if g.shared {
			c.view.await(remote)
		}
		return
	}
	level := slog.LevelInfo
	if refusal, ok := errors.AsType[*auth.Error](err); ok && refusal.Kind != auth.KindForbidden {
		level = slog.LevelDebug // auth has said so
	}
	g.log.Log(ctx, level, doing+" failed", "remote", remote, "principal", c.view.principal, "error", err)
}
