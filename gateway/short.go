package gateway

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"runtime/debug"
	"strings"
	"sync"

	"github.com/modelcontextprotocol/go-sdk/jsonrpc"
	"github.com/modelcontextprotocol/go-sdk/mcp"

	"gatehouse/session/rawjson"
)

// This file is a short way to the core for what is most common, a tools/call of
// protocol 2026-07-28 with nothing unusual about it. The other adapter
// (server.go) makes a session of the SDK's for every such request and parses it
// six times, which is most of what a call costs. What is not exactly as expected
// here is left to it, and so are all refusals of a malformed request.

// shortCall is a request that can go the short way.
type shortCall struct{ id, params json.RawMessage }

// serveShort answers a tools/call; it reports false, having done nothing, where
// the request has to go the long way.
func (g *Gateway) serveShort(w http.ResponseWriter, r *http.Request, v *view, method string) bool {
	body, ok := r.Body.(*readBody)
	if !ok || method != "tools/call" {
		return false
	}
	call, ok := readShort(r.Header, body.raw)
	if !ok {
		return false
	}
	out := &shortAnswer{w: w, id: call.id}
	defer func() {
		if p := recover(); p != nil {
			g.log.ErrorContext(r.Context(), "panic while handling a request", "method", method, "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
			out.fail(renderRPC(fmt.Errorf("panic in %s", method), g.now()))
		}
	}()
	c := caller{view: v, modern: true, capabilities: declared(call.params), notify: out.notify}
	result, err := g.handle(r.Context(), c, method, call.params)
	if err == nil {
		result, err = g.modernize(method, result)
	}
	if err != nil {
		answer := renderRPC(err, g.now())
		if answer.Code == jsonrpc.CodeInternalError {
			g.log.ErrorContext(r.Context(), "request failed", "method", method, "principal", v.principal, "error", err)
		}
		out.fail(answer)
		return true
	}
	out.end("result", result, http.StatusOK)
	return true
}

// readShort takes a request apart, if it is in every respect as the protocol
// has it.
func readShort(header http.Header, body []byte) (call shortCall, ok bool) {
	if !json.Valid(body) || !has(header, "Content-Type", "application/json") || !has(header, "Mcp-Protocol-Version", modernVersion) ||
		!has(header, "Mcp-Method", "tools/call") || header["Last-Event-Id"] != nil {
		return call, false
	}
	if accept := header["Accept"]; len(accept) != 1 || strings.Contains(accept[0], ";") ||
		!strings.Contains(accept[0], "application/json") || !strings.Contains(accept[0], "text/event-stream") {
		return call, false
	}
	message, err := rawjson.Get(body, "jsonrpc", "id", "params")
	if err != nil || string(message[0]) != `"2.0"` || !isID(message[1]) || message[2] == nil {
		return call, false
	}
	params, err := rawjson.Get(message[2], "name", "_meta", "arguments")
	if err != nil || params[1] == nil || params[2] != nil && params[2][0] != '{' {
		return call, false
	}
	// MCP 2026-07-28, streamable HTTP: a request whose headers do not say what its
	// body says is to be refused.
	name, isName := rawjson.String(params[0])
	if !isName || !has(header, "Mcp-Name", name) || strings.HasPrefix(name, "=?") {
		return call, false
	}
	meta, err := rawjson.Get(params[1], mcp.MetaKeyProtocolVersion, mcp.MetaKeyClientCapabilities, mcp.MetaKeyClientInfo)
	if err != nil || string(meta[0]) != `"`+modernVersion+`"` || !isObjects(meta[1]) || meta[2] != nil && !isNames(meta[2]) {
		return call, false
	}
	return shortCall{message[1], message[2]}, true
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
	w  http.ResponseWriter
	id json.RawMessage

	mu        sync.Mutex // guards what follows, and w
	streaming bool
	over      bool // the request has been answered
}

// notify sends a notification.
func (a *shortAnswer) notify(method string, params json.RawMessage) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.over {
		return
	}
	if !a.streaming {
		a.streaming = true
		a.begin("text/event-stream", http.StatusOK)
	}
	a.event(fmt.Appendf(nil, `{"jsonrpc":"2.0","method":%q,"params":%s}`, method, params))
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
	switch e.Code {
	case jsonrpc.CodeMethodNotFound:
		status = http.StatusNotFound
	case jsonrpc.CodeInvalidParams, mcp.CodeUnsupportedProtocolVersion, mcp.CodeMissingRequiredClientCapabilities:
		status = http.StatusBadRequest
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
		a.event(message)
		return
	}
	a.begin("application/json", status)
	a.w.Write(message)
}
