package gateway

import (
	"encoding/json"
	"fmt"
	"net/http"

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
