package gateway

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"

	"github.com/modelcontextprotocol/go-sdk/jsonrpc"
	"github.com/modelcontextprotocol/go-sdk/mcp"

	"gatehouse/session"
	"gatehouse/session/rawjson"
)

// This file is the adapter between the SDK and the core: SDK types stop here.
// What it passes on and hands back are exact bytes, because the SDK's own
// types would lose unknown fields and change numbers on the way.

// headerParams carries the params of a request, as they were received, from
// the transport to the adapter. It exists inside the process only: whatever a
// client sends under this name is overwritten.
const headerParams = "Gatehouse-Params"

// headerID carries the id of a request on a pipe in the same way.
const headerID = "Gatehouse-Id"

const modernVersion = "2026-07-28"

const instructions = `Gatehouse puts the tools of several MCP servers (remotes) into one list; a tool is named <remote>_<tool>.
When a call answers with auth_required, show its link to the user, wait until they have signed in, and repeat the same call.
gateway_status says which remotes are up and who is signed in. gateway_find_tools searches all tools; gateway_call_tool calls any of them by name, also one that is not listed.`

// newServer makes the SDK's server of a view. It has no registered content: the
// middleware answers what the core knows, the SDK the rest (initialize, ping,
// discover, subscriptions).
func (g *Gateway) newServer(v *view, sessionID func() string) *mcp.Server {
	s := mcp.NewServer(&mcp.Implementation{Name: "gatehouse", Title: "Gatehouse", Version: g.version}, &mcp.ServerOptions{
		Instructions: instructions,
		// The SDK's log lines hold ids and payloads.
		Logger: slog.New(slog.DiscardHandler),
		Capabilities: &mcp.ServerCapabilities{
			Tools:       &mcp.ToolCapabilities{ListChanged: true},
			Prompts:     &mcp.PromptCapabilities{ListChanged: true},
			Resources:   &mcp.ResourceCapabilities{ListChanged: true, Subscribe: true},
			Completions: &mcp.CompletionCapabilities{},
			//lint:ignore SA1019 deprecated in 2026-07-28, not removed: remotes and clients of both eras use it
			Logging: &mcp.LoggingCapabilities{},
		},
		GetSessionID: sessionID,
		// The SDK knows who has subscribed, by either era's means, and on which stream
		// to tell.
		SubscribeHandler: func(ctx context.Context, req *mcp.SubscribeRequest) error {
			began := req.Session.InitializeParams()
			c := caller{view: v, modern: began != nil && began.ProtocolVersion >= modernVersion, client: req.Session}
			if err := g.subscribe(ctx, c, req.Params.URI); err != nil {
				return renderRPC(err, g.now())
			}
			return nil
		},
		UnsubscribeHandler: func(ctx context.Context, req *mcp.UnsubscribeRequest) error {
			g.unsubscribe(ctx, caller{view: v, client: req.Session}, req.Params.URI)
			return nil
		},
		//lint:ignore SA1019 deprecated in 2026-07-28, not removed: legacy remotes ask for roots
		RootsListChangedHandler: func(_ context.Context, req *mcp.RootsListChangedRequest) {
			v.session.RootsChanged(req.Session)
		},
		// Every list depends on who asks.
		SetCacheable: func(_ context.Context, _ mcp.Request, c *mcp.Cacheable) { c.CacheScope = "private" },
	})
	s.AddSendingMiddleware(func(next mcp.MethodHandler) mcp.MethodHandler {
		v.send = next
		return ownUpdates(next)
	})
	s.AddReceivingMiddleware(g.recoverPanics, g.adapt(v))
	return s
}

// announcement is which lists have changed.
type announcement struct{ tools, prompts, resources bool }

// announce makes the SDK tell the server's clients that lists have changed, in
// both eras. Only its own bookkeeping knows which streams are open, and adding
// something is the only way to it; what is added is never listed.
func announce(s *mcp.Server, changed announcement) {
	if changed.tools {
		s.AddTool(&mcp.Tool{Name: "gatehouse", InputSchema: json.RawMessage(`{"type":"object"}`)},
			func(context.Context, *mcp.CallToolRequest) (*mcp.CallToolResult, error) { return nil, errUnknownMethod })
	}
	if changed.prompts {
		s.AddPrompt(&mcp.Prompt{Name: "gatehouse"},
			func(context.Context, *mcp.GetPromptRequest) (*mcp.GetPromptResult, error) {
				return nil, errUnknownMethod
			})
	}
	if changed.resources {
		s.AddResource(&mcp.Resource{Name: "gatehouse", URI: "gatehouse:"},
			func(context.Context, *mcp.ReadResourceRequest) (*mcp.ReadResourceResult, error) {
				return nil, errUnknownMethod
			})
	}
}

// recoverPanics keeps one bad request from ending the process: the SDK runs
// handlers in goroutines that do not recover.
func (g *Gateway) recoverPanics(next mcp.MethodHandler) mcp.MethodHandler {
	return func(ctx context.Context, method string, req mcp.Request) (result mcp.Result, err error) {
		defer func() {
			if p := recover(); p != nil {
				g.log.ErrorContext(ctx, "panic while handling a request", "method", method, "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
				result, err = nil, renderRPC(fmt.Errorf("panic in %s", method), g.now())
			}
		}()
		return next(ctx, method, req)
	}
}

// adapt hands what the core answers to the core.
func (g *Gateway) adapt(v *view) mcp.Middleware {
	return func(next mcp.MethodHandler) mcp.MethodHandler {
		return func(ctx context.Context, method string, req mcp.Request) (mcp.Result, error) {
			switch method {
			case "tools/list", "tools/call", "prompts/list", "prompts/get", "completion/complete",
				"resources/list", "resources/templates/list", "resources/read", "logging/setLevel":
			case "initialize":
				params, raw := rawParams(req)
				result, err := next(ctx, method, req)
				if ss, ok := req.GetSession().(*mcp.ServerSession); ok && err == nil && raw == nil {
					// Before the answer goes out: the client's next request follows at once.
					v.peers.add(ss, params)
					g.clients.add(ss, v)
				}
				return result, err
			case "notifications/progress":
				if params, err := rawParams(req); err == nil && !isModern(req) {
					v.session.Progress(req.GetSession(), params)
				}
				return next(ctx, method, req)
			case "subscriptions/listen":
				id := pipeID(req)
				if id == nil || !isModern(req) {
					return next(ctx, method, req)
				}
				params, err := rawParams(req)
				if err != nil {
					return nil, renderRPC(err, g.now())
				}
				c := g.callerOf(ctx, v, req, params)
				result, err := g.listen(ctx, c, id, params)
				return g.answer(ctx, c, method, result, err)
			default:
				return next(ctx, method, req)
			}
			defer g.calls.begin()()
			var gone <-chan struct{}
			if ss, ok := req.GetSession().(*mcp.ServerSession); ok {
				var done context.CancelFunc
				ctx, done, gone = g.clients.during(ctx, ss)
				defer done()
			}
			params, err := rawParams(req)
			if err != nil {
				return nil, renderRPC(err, g.now())
			}
			c := g.callerOf(ctx, v, req, params)
			if !c.modern {
				c.gone = gone
			}
			result, err := g.handle(ctx, c, method, params)
			return g.answer(ctx, c, method, result, err)
		}
	}
}

// answer makes what the SDK sends of what the core says.
func (g *Gateway) answer(ctx context.Context, c caller, method string, result json.RawMessage, err error) (mcp.Result, error) {
	result, refusal := g.render(ctx, c, method, result, err)
	if refusal != nil {
		return nil, refusal
	}
	return &rawResult{raw: result}, nil
}

// render makes what the core says fit for the client's era.
func (g *Gateway) render(ctx context.Context, c caller, method string, result json.RawMessage, err error) (json.RawMessage, *jsonrpc.Error) {
	if err == nil && c.modern {
		result, err = g.modernize(method, result)
	}
	if err == nil {
		return result, nil
	}
	refusal := renderRPC(err, g.now())
	if refusal.Code == jsonrpc.CodeInternalError {
		g.log.ErrorContext(ctx, "request failed", "method", method, "principal", c.view.principal, "error", err)
	}
	return nil, refusal
}

// metaUpdate is where announceUpdate leaves the params for ownUpdates.
const metaUpdate = "gatehouse/update"

// announceUpdate makes the SDK tell those who have subscribed to a resource. It
// finds them by the URI that they know; what they get are these params.
func announceUpdate(ctx context.Context, s *mcp.Server, uri string, params json.RawMessage) error {
	return s.ResourceUpdated(ctx, &mcp.ResourceUpdatedNotificationParams{Meta: mcp.Meta{metaUpdate: params}, URI: uri})
}

// ownUpdates sends updates as the remote has them, on the stream that the SDK
// has found for them.
func ownUpdates(next mcp.MethodHandler) mcp.MethodHandler {
	return func(ctx context.Context, method string, req mcp.Request) (mcp.Result, error) {
		update, ok := req.GetParams().(*mcp.ResourceUpdatedNotificationParams)
		ss, isServer := req.GetSession().(*mcp.ServerSession)
		if !ok || !isServer {
			return next(ctx, method, req)
		}
		params, ok := update.Meta[metaUpdate].(json.RawMessage)
		if !ok {
			return next(ctx, method, req)
		}
		if stream := update.Meta[mcp.MetaKeySubscriptionID]; stream != nil {
			var err error
			if params, err = withMeta(params, mcp.MetaKeySubscriptionID, stream); err != nil {
				return nil, err
			}
		}
		return next(ctx, method, &mcp.ServerRequest[*rawMessage]{Session: ss, Params: &rawMessage{raw: params}})
	}
}

// withMeta returns the params of a message with one more member of their _meta.
func withMeta(params json.RawMessage, key string, value any) (json.RawMessage, error) {
	encoded, err := json.Marshal(value)
	if err != nil {
		return nil, fmt.Errorf("encoding %s: %w", key, err)
	}
	got, err := rawjson.Get(params, "_meta")
	if err != nil {
		return nil, fmt.Errorf("reading params: %w", err)
	}
	meta := json.RawMessage(got[0])
	if meta == nil || meta[0] != '{' {
		meta = json.RawMessage("{}")
	}
	if meta, err = rawjson.Set(meta, key, encoded); err != nil {
		return nil, fmt.Errorf("adding %s: %w", key, err)
	}
	return rawjson.Set(params, "_meta", meta)
}

// callerOf says who sent a request.
func (g *Gateway) callerOf(ctx context.Context, v *view, req mcp.Request, params json.RawMessage) caller {
	c := caller{view: v, modern: isModern(req), params: params}
	ss, ok := req.GetSession().(*mcp.ServerSession)
	if !ok {
		return c
	}
	// The handler's context is what puts a message onto the stream of its request.
	c.notify = func(method string, params json.RawMessage) { v.notify(ctx, ss, method, params) }
	if c.modern {
		c.capabilities = declared(params)
		return c
	}
	c.client, c.capabilities = ss, v.peers.of(ss)
	c.later = v.later(ss)
	c.ask = func(asking context.Context, method string, params json.RawMessage) (json.RawMessage, error) {
		// On the stream of the request, but no longer than who asks waits.
		ctx, cancel := context.WithCancelCause(ctx)
		defer cancel(nil)
		defer context.AfterFunc(asking, func() { cancel(context.Cause(asking)) })()
		result, err := v.send(ctx, method, &mcp.ServerRequest[*rawMessage]{Session: ss, Params: &rawMessage{raw: params}})
		if refusal, ok := errors.AsType[*jsonrpc.Error](err); ok {
			return nil, &session.ResponseError{Code: refusal.Code, Message: refusal.Message, Data: refusal.Data}
		} else if err != nil {
			return nil, fmt.Errorf("sending %s to the client: %w", method, err)
		}
		return smuggled(result)
	}
	return c
}

// later returns what sends notifications on the client's own event stream. It is
// kept for as long as the session, and so holds nothing of the request.
func (v *view) later(ss *mcp.ServerSession) func(method string, params json.RawMessage) {
	return func(method string, params json.RawMessage) { v.notify(context.Background(), ss, method, params) }
}

// notify sends a notification to a client, on the stream that the context is of.
func (v *view) notify(ctx context.Context, ss *mcp.ServerSession, method string, params json.RawMessage) {
	if _, err := v.send(ctx, method, &mcp.ServerRequest[*rawMessage]{Session: ss, Params: &rawMessage{raw: params}}); err != nil {
		v.g.log.DebugContext(ctx, "notification not delivered", "method", method, "principal", v.principal, "error", err)
	}
}

// declared returns the capabilities that a request of the modern era declares.
func declared(params json.RawMessage) json.RawMessage {
	got, err := rawjson.Get(params, "_meta")
	if err != nil || got[0] == nil {
		return nil
	}
	if got, err = rawjson.Get(got[0], mcp.MetaKeyClientCapabilities); err != nil {
		return nil
	}
	return got[0]
}

// rawMessage gives the SDK the params of a message to send.
type rawMessage struct {
	mcp.ParamsBase
	raw json.RawMessage
}

// MarshalJSON returns the params as they were received.
func (m *rawMessage) MarshalJSON() ([]byte, error) { return m.raw, nil }

// rawParams returns the params as the client sent them.
func rawParams(req mcp.Request) (json.RawMessage, error) {
	if extra := req.GetExtra(); extra != nil {
		if raw := extra.Header[headerParams]; len(raw) == 1 {
			return json.RawMessage(raw[0]), nil
		}
	}
	// No params, or a batch (protocol 2025-03-26), which holds several requests
	// under one header.
	raw, err := json.Marshal(req.GetParams())
	if err != nil {
		return nil, fmt.Errorf("encoding params: %w", err)
	}
	if string(raw) == "null" {
		return nil, nil
	}
	return raw, nil
}

func isModern(req mcp.Request) bool {
	r, ok := req.(interface{ ProtocolVersion() string })
	return ok && r.ProtocolVersion() >= modernVersion
}

// modernize adds what a result of protocol 2026-07-28 must carry and a legacy
// remote does not send.
func (g *Gateway) modernize(method string, result json.RawMessage) (json.RawMessage, error) {
	members, err := rawjson.Get(result, "resultType", "_meta", "ttlMs", "cacheScope")
	if err != nil {
		return nil, fmt.Errorf("reading a result: %w", err)
	}
	if members[0] == nil {
		if result, err = rawjson.Set(result, "resultType", []byte(`"complete"`)); err != nil {
			return nil, fmt.Errorf("adding resultType: %w", err)
		}
	}
	// "Servers SHOULD identify themselves in each result's _meta": the server
	// that the client talks to is the gateway.
	info, err := json.Marshal(map[string]string{"name": "gatehouse", "title": "Gatehouse", "version": g.version})
	if err != nil {
		return nil, fmt.Errorf("encoding serverInfo: %w", err)
	}
	meta := members[1]
	if meta == nil || string(meta) == "null" {
		meta = []byte("{}")
	}
	if meta, err = rawjson.Set(meta, mcp.MetaKeyServerInfo, info); err != nil {
		return nil, fmt.Errorf("adding serverInfo: %w", err)
	}
	if result, err = rawjson.Set(result, "_meta", meta); err != nil {
		return nil, fmt.Errorf("adding _meta: %w", err)
	}
	switch method {
	case "tools/list", "prompts/list", "resources/list", "resources/templates/list", "resources/read":
	default:
		return result, nil
	}
	if members[2] == nil {
		if result, err = rawjson.Set(result, "ttlMs", []byte("0")); err != nil {
			return nil, fmt.Errorf("adding ttlMs: %w", err)
		}
	}
	if members[3] != nil {
		return result, nil
	}
	return rawjson.Set(result, "cacheScope", []byte(`"private"`))
}

// legacyResult takes out of a result what only protocol 2026-07-28 has.
func legacyResult(result json.RawMessage) (json.RawMessage, error) {
	if !bytes.Contains(result, []byte(`"resultType"`)) {
		return result, nil
	}
	got, err := rawjson.Get(result, "resultType", "_meta")
	if err != nil || got[0] == nil {
		return result, err
	}
	plain, err := rawjson.Delete(result, func(key string) bool {
		return key == "resultType" || key == "ttlMs" || key == "cacheScope"
	})
	if err != nil || got[1] == nil || got[1][0] != '{' {
		return plain, err
	}
	meta, err := rawjson.Delete(got[1], func(key string) bool { return key == mcp.MetaKeyServerInfo })
	if err != nil {
		return nil, err
	}
	if string(meta) == "{}" && len(got[1]) != len(meta) {
		return rawjson.Delete(plain, func(key string) bool { return key == "_meta" })
	}
	return rawjson.Set(plain, "_meta", meta)
}

// rawResult gives the SDK bytes to send. Each is used once: the SDK sets _meta
// on what it gets.
type rawResult struct {
	mcp.ResultBase
	raw json.RawMessage
}

// MarshalJSON returns the result as it was received.
func (r *rawResult) MarshalJSON() ([]byte, error) { return r.raw, nil }

// noteRaw notes a request's params where rawParams finds them, and its id for
// pipeID.
func noteRaw(req *jsonrpc.Request) {
	header := map[string][]string{}
	if id, err := json.Marshal(req.ID.Raw()); err == nil && req.IsCall() {
		header[headerID] = []string{string(id)}
	}
	if len(req.Params) > 0 {
		header[headerParams] = []string{string(req.Params)}
	}
	req.Extra = &mcp.RequestExtra{Header: header}
}

// pipeID returns the id of a request that came on a pipe, nil for others.
func pipeID(req mcp.Request) json.RawMessage {
	if extra := req.GetExtra(); extra != nil {
		if id := extra.Header[headerID]; len(id) == 1 {
			return json.RawMessage(id[0])
		}
	}
	return nil
}
