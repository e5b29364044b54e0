package gateway

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/modelcontextprotocol/go-sdk/jsonrpc"
	"github.com/modelcontextprotocol/go-sdk/mcp"

	"gatehouse/session"
	"gatehouse/session/rawjson"
)

// This file is a short way to the core for what is most common, a tools/call
// with nothing unusual about it. The other adapter (server.go) parses every
// request five or six times, and in the era of protocol 2026-07-28 makes a
// session of the SDK's for each, which is most of what a call costs. What is not
// exactly as expected here is left to it, and so are all refusals of a malformed
// request.

// shortVersions are those of the legacy era whose calls can go the short way.
var shortVersions = []string{"2025-11-25", "2025-06-18", "2025-03-26"}

// shortCall is a request that can go the short way.
type shortCall struct{ id, params json.RawMessage }

// serveShort answers a tools/call of protocol 2026-07-28; it reports false,
// having done nothing, where the request has to go the long way.
func (g *Gateway) serveShort(w http.ResponseWriter, r *http.Request, v *view, method string) bool {
	body, ok := r.Body.(*readBody)
	if !ok || method != "tools/call" {
		return false
	}
	call, ok := readShort(r.Header, body.raw)
	if !ok {
		return false
	}
	out := &shortAnswer{w: w, id: call.id, modern: true}
	g.answerShort(r.Context(), caller{view: v, modern: true, capabilities: declared(call.params), params: call.params, notify: out.notify}, call, out)
	return true
}

// serveShortLegacy does the same for a session of the legacy era. It also takes
// what belongs to calls that came this way: the client's answers to what it was
// asked, its progress with that, and its wish to cancel.
func (g *Gateway) serveShortLegacy(w http.ResponseWriter, r *http.Request, cl *client, method string) bool {
	body, ok := r.Body.(*readBody)
	if !ok {
		return false
	}
	switch method {
	case "":
		if !g.clients.answered(cl, body.raw) {
			return false
		}
		w.WriteHeader(http.StatusAccepted)
		return true
	case "notifications/cancelled":
		g.clients.cancel(cl, body.raw)
		return false
	case "notifications/progress":
		// The answer that it is about may come right behind it, and this short way.
		message, err := rawjson.Get(body.raw, "params", "id")
		if err != nil || message[0] == nil || message[1] != nil || !json.Valid(body.raw) {
			return false
		}
		cl.view.session.Progress(cl.session, message[0])
		w.WriteHeader(http.StatusAccepted)
		return true
	case "tools/call":
	default:
		return false
	}
	call, ok := readShortLegacy(r.Header, body.raw)
	if !ok {
		return false
	}
	// MCP 2025-11-25, streamable HTTP: "Disconnection SHOULD NOT be interpreted as
	// the client cancelling its request."
	ctx, cancel := context.WithCancel(context.WithoutCancel(r.Context()))
	defer cancel()
	defer context.AfterFunc(cl.gone, cancel)()
	done, ok := g.clients.fly(cl, call.id, cancel)
	if !ok {
		return false
	}
	defer done()
	out := &shortAnswer{w: w, id: call.id}
	v, ss := cl.view, cl.session
	g.answerShort(ctx, caller{
		view: v, client: ss, gone: cl.gone.Done(), capabilities: v.peers.of(ss), notify: out.notify,
		later: v.later(ss),
		ask: func(asking context.Context, method string, params json.RawMessage) (json.RawMessage, error) {
			return g.askShort(asking, cl, out, method, params)
		},
	}, call, out)
	return true
}

// answerShort has the core do the call.
func (g *Gateway) answerShort(ctx context.Context, c caller, call shortCall, out *shortAnswer) {
	const method = "tools/call"
	defer func() {
		if p := recover(); p != nil {
			g.log.ErrorContext(ctx, "panic while handling a request", "method", method, "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
			out.fail(renderRPC(fmt.Errorf("panic in %s", method), g.now()))
		}
	}()
	result, err := g.handle(ctx, c, method, call.params)
	result, refusal := g.render(ctx, c, method, result, err)
	if refusal != nil {
		out.fail(refusal)
		return
	}
	out.end("result", result, http.StatusOK)
}

// askShort sends the client a request on the stream of its call and waits for
// the answer, which comes by a POST of its own.
func (g *Gateway) askShort(ctx context.Context, cl *client, out *shortAnswer, method string, params json.RawMessage) (json.RawMessage, error) {
	id, answers, forget := g.clients.asking(cl)
	defer forget()
	if params == nil {
		params = json.RawMessage("{}")
	}
	out.message(fmt.Appendf(nil, `{"jsonrpc":"2.0","id":%q,"method":%q,"params":%s}`, id, method, params))
	select {
	case answer := <-answers:
		got, err := rawjson.Get(answer, "result", "error")
		switch {
		case err != nil:
			return nil, fmt.Errorf("reading the client's answer to %s: %w", method, err)
		case got[0] == nil && got[1] == nil:
			return nil, fmt.Errorf("reading the client's answer to %s: neither a result nor an error", method)
		case got[1] == nil:
			return got[0], nil
		}
		var refusal jsonrpc.Error
		if err := json.Unmarshal(got[1], &refusal); err != nil {
			return nil, fmt.Errorf("reading the client's answer to %s: %w", method, err)
		}
		return nil, &session.ResponseError{Code: refusal.Code, Message: refusal.Message, Data: refusal.Data}
	case <-ctx.Done():
		out.notify("notifications/cancelled", fmt.Appendf(nil, `{"requestId":%q}`, id))
		return nil, fmt.Errorf("sending %s to the client: %w", method, context.Cause(ctx))
	case <-cl.gone.Done():
		return nil, fmt.Errorf("sending %s to the client: %w", method, session.ErrClosed)
	}
}

// readShortLegacy takes a request of the legacy era apart.
func readShortLegacy(header http.Header, body []byte) (call shortCall, ok bool) {
	// MCP 2025-11-25, protocol version header: "if the server does not receive an
	// MCP-Protocol-Version header […] the server SHOULD assume protocol version
	// 2025-03-26". That one has batches, but a batch is no object.
	if version := header["Mcp-Protocol-Version"]; len(version) > 1 || len(version) == 1 && !slices.Contains(shortVersions, version[0]) {
		return call, false
	}
	call, meta, ok := readCall(header, body)
	if !ok || meta == nil {
		return call, ok
	}
	version, err := rawjson.Get(meta, mcp.MetaKeyProtocolVersion)
	return call, err == nil && version[0] == nil
}

// readShort takes a request of protocol 2026-07-28 apart.
func readShort(header http.Header, body []byte) (call shortCall, ok bool) {
	if !has(header, "Mcp-Protocol-Version", modernVersion) || !has(header, "Mcp-Method", "tools/call") {
		return call, false
	}
	call, envelope, ok := readCall(header, body)
	if !ok || envelope == nil {
		return call, false
	}
	// MCP 2026-07-28, streamable HTTP: a request whose headers do not say what its
	// body says is to be refused.
	params, err := rawjson.Get(call.params, "name")
	if err != nil {
		return call, false
	}
	if name, _ := rawjson.String(params[0]); !has(header, "Mcp-Name", name) || strings.HasPrefix(name, "=?") {
		return call, false
	}
	meta, err := rawjson.Get(envelope, mcp.MetaKeyProtocolVersion, mcp.MetaKeyClientCapabilities, mcp.MetaKeyClientInfo)
	return call, err == nil && string(meta[0]) == `"`+modernVersion+`"` && isObjects(meta[1]) && (meta[2] == nil || isNames(meta[2]))
}

// readCall takes a tools/call apart, if it is in every respect as the protocol
// has it. meta is nil if there is none.
func readCall(header http.Header, body []byte) (call shortCall, meta []byte, ok bool) {
	if !has(header, "Content-Type", "application/json") || header["Last-Event-Id"] != nil || !json.Valid(body) {
		return call, nil, false
	}
	if accept := header["Accept"]; len(accept) != 1 || strings.Contains(accept[0], ";") ||
		!strings.Contains(accept[0], "application/json") || !strings.Contains(accept[0], "text/event-stream") {
		return call, nil, false
	}
	message, err := rawjson.Get(body, "jsonrpc", "id", "params")
	if err != nil || string(message[0]) != `"2.0"` || !isID(message[1]) || message[2] == nil {
		return call, nil, false
	}
	params, err := rawjson.Get(message[2], "name", "_meta", "arguments")
	if err != nil || params[1] != nil && params[1][0] != '{' || params[2] != nil && params[2][0] != '{' {
		return call, nil, false
	}
	if _, isName := rawjson.String(params[0]); !isName {
		return call, nil, false
	}
	return shortCall{message[1], message[2]}, params[1], true
}

// has reports whether a header is there once, with this value.
func has(header http.Header, name, value string) bool {
	values := header[name]
	return len(values) == 1 && values[0] == value
}

// isID reports whether a request's id is a string or an integer.
func isID(id []byte) bool {
	return len(id) > 0 && (id[0] == '"' || id[0] != 'n' && id[0] != 't' && id[0] != 'f' && id[0] != '{' && id[0] != '[' && !bytes.ContainsAny(id, ".eE"))
}

// isObjects reports whether a value is an object and so are its members, as
// those of client capabilities are.
func isObjects(object []byte) bool {
	ok := true
	err := rawjson.Each(object, func(m rawjson.Member) bool {
		ok = object[m.Start] == '{'
		return ok
	})
	return ok && err == nil
}

// isNames reports whether a value is an object of strings with a name and a
// version.
func isNames(object []byte) bool {
	found := 0
	err := rawjson.Each(object, func(m rawjson.Member) bool {
		if object[m.Start] != '"' {
			found = -1
			return false
		}
		if m.Key == "name" || m.Key == "version" {
			found++
		}
		return true
	})
	return found == 2 && err == nil
}

// shortAnswer writes the answer to one request: as JSON, or, once something
// has to be said before it, as an event stream.
type shortAnswer struct {
	w      http.ResponseWriter
	id     json.RawMessage
	modern bool // protocol 2026-07-28

	mu        sync.Mutex // guards what follows, and w
	streaming bool
	silence   *time.Timer // runs while streaming
	over      bool        // the request has been answered
}

// maxSilence is how long an event stream is silent: proxies cut those that are
// for a minute.
const maxSilence = 25 * time.Second

// notify sends a notification.
func (a *shortAnswer) notify(method string, params json.RawMessage) {
	if params == nil {
		params = json.RawMessage("{}")
	}
	a.message(fmt.Appendf(nil, `{"jsonrpc":"2.0","method":%q,"params":%s}`, method, params))
}

// message sends something before the answer.
func (a *shortAnswer) message(message []byte) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.over {
		return
	}
	if !a.streaming {
		a.streaming = true
		a.begin("text/event-stream", http.StatusOK)
		a.silence = time.AfterFunc(maxSilence, a.comment)
	}
	a.event(message)
}

// comment writes what clients skip.
func (a *shortAnswer) comment() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.over {
		return
	}
	a.silence.Reset(maxSilence)
	io.WriteString(a.w, ":\n\n")
	http.NewResponseController(a.w).Flush()
}

func (a *shortAnswer) begin(contentType string, status int) {
	h := a.w.Header()
	h.Set("Content-Type", contentType)
	h.Set("Cache-Control", "no-cache, no-transform")
	a.w.WriteHeader(status)
}

// event writes a message as an event. A line break between tokens would end it.
func (a *shortAnswer) event(message []byte) {
	if bytes.ContainsAny(message, "\r\n") {
		var line bytes.Buffer
		if json.Compact(&line, message) == nil {
			message = line.Bytes()
		}
	}
	a.w.Write(append(append([]byte("event: message\ndata: "), message...), "\n\n"...))
	http.NewResponseController(a.w).Flush()
}

// fail answers with an error. MCP 2026-07-28 gives some of them a status.
func (a *shortAnswer) fail(e *jsonrpc.Error) {
	status := http.StatusOK
	if a.modern {
		switch e.Code {
		case jsonrpc.CodeMethodNotFound:
			status = http.StatusNotFound
		case jsonrpc.CodeInvalidParams, mcp.CodeUnsupportedProtocolVersion, mcp.CodeMissingRequiredClientCapabilities:
			status = http.StatusBadRequest
		}
	}
	encoded, err := json.Marshal(e)
	if err != nil {
		encoded = fmt.Appendf(nil, `{"code":%d,"message":%q}`, e.Code, "internal error of the gateway")
	}
	a.end("error", encoded, status)
}

// end answers with a result or an error.
func (a *shortAnswer) end(member string, value json.RawMessage, status int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.over {
		return
	}
	a.over = true
	message := make([]byte, 0, len(value)+len(a.id)+len(`{"jsonrpc":"2.0","id":,"":}`)+len(member))
	message = append(append(append(message, `{"jsonrpc":"2.0","id":`...), a.id...), `,"`...)
	message = append(append(append(append(message, member...), `":`...), value...), '}')
	if a.streaming {
		a.silence.Stop()
		a.event(message)
		return
	}
	a.begin("application/json", status)
	a.w.Write(message)
}
