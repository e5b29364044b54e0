package gateway

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"

	"github.com/modelcontextprotocol/go-sdk/jsonrpc"

	"gatehouse/session/rawjson"
)

// methods are what a client may ask, and which member of the params must be a
// text. Params may be missing where none must.
var methods = map[string]string{
	"initialize": "", "ping": "", "server/discover": "", "subscriptions/listen": "", "completion/complete": "",
	"tools/list": "", "prompts/list": "", "resources/list": "", "resources/templates/list": "",
	"tools/call": "name", "prompts/get": "name",
	"resources/read": "uri", "resources/subscribe": "uri", "resources/unsubscribe": "uri",
	"logging/setLevel": "level",
}

// refuseRequest says what is wrong with a request's method and the shape of its
// params, nil if nothing is. The SDK would say it, too, with its own types and
// all that was sent.
func refuseRequest(method string, params json.RawMessage) *jsonrpc.Error {
	text, known := methods[method]
	if !known {
		return &jsonrpc.Error{Code: jsonrpc.CodeMethodNotFound, Message: fmt.Sprintf("method not found: %q", printable(method))}
	}
	bad := func(format string, args ...any) *jsonrpc.Error {
		return &jsonrpc.Error{Code: jsonrpc.CodeInvalidParams, Message: fmt.Sprintf(format, args...)}
	}
	if len(params) == 0 || string(params) == "null" {
		if text != "" {
			return bad("%s needs params with a text %q", method, text)
		}
		return nil
	}
	got, err := rawjson.Get(params, "_meta", "cursor", text)
	if err != nil {
		return bad("the params of %s are no object, or have a member twice", method)
	}
	if meta := got[0]; meta != nil && meta[0] != '{' && string(meta) != "null" {
		return bad("_meta in the params of %s is no object", method)
	}
	if cursor := got[1]; cursor != nil && cursor[0] != '"' && string(cursor) != "null" {
		return bad("cursor in the params of %s is no text", method)
	}
	if text != "" && (got[2] == nil || got[2][0] != '"') {
		return bad("%s needs a text %q in its params", method, text)
	}
	return nil
}

// writeRPCError answers a request over HTTP with a JSON-RPC error. id is nil
// where nobody knows it.
func writeRPCError(w http.ResponseWriter, status int, id json.RawMessage, refusal *jsonrpc.Error) {
	if id == nil {
		id = json.RawMessage("null")
	}
	answer, err := json.Marshal(map[string]any{"jsonrpc": "2.0", "id": id,
		"error": map[string]any{"code": refusal.Code, "message": refusal.Message}})
	if err != nil {
		http.Error(w, refusal.Message, http.StatusBadRequest) // the id is not JSON
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	w.Write(answer)
}

// codeHeaderMismatch: the headers of a request do not fit its body.
const codeHeaderMismatch = -32020

// refuseHeaders says which header of a tools/call of protocol 2026-07-28 does
// not fit the arguments, nil if all do: servers have to check those that the
// tool's inputSchema names (MCP 2026-07-28, streamable HTTP).
func (v *view) refuseHeaders(header http.Header, params json.RawMessage) *jsonrpc.Error {
	got, err := rawjson.Get(params, "name", "arguments")
	if err != nil {
		return nil // refused elsewhere
	}
	name, _ := rawjson.String(got[0])
	tool, _ := v.now().tools.lookup(name)
	for _, p := range tool.headers {
		want, given := p.Value(got[1])
		sent := header.Values("Mcp-Param-" + p.Header)
		mismatch := func(say string) *jsonrpc.Error {
			return &jsonrpc.Error{Code: codeHeaderMismatch, Message: "the header Mcp-Param-" + p.Header + " " + say}
		}
		switch {
		case !given && len(sent) == 0:
		case !given:
			return mismatch("is there, but the argument that it repeats is not")
		case len(sent) == 0:
			return mismatch("is missing: it repeats an argument")
		case len(sent) > 1:
			return mismatch("is there more than once")
		default:
			value, ok := decodeHeader(sent[0])
			if !ok {
				return mismatch("is not in the form that it has to be in")
			}
			if value != want {
				return mismatch("is not what the argument is")
			}
		}
	}
	return nil
}

// decodeHeader reads a header's value: plain visible ASCII, or =?base64?…?=.
func decodeHeader(value string) (string, bool) {
	encoded, ok := strings.CutPrefix(value, "=?base64?")
	if !ok {
		return value, true
	}
	if encoded, ok = strings.CutSuffix(encoded, "?="); !ok {
		return value, true
	}
	decoded, err := base64.StdEncoding.DecodeString(encoded)
	return string(decoded), err == nil
}
