package gateway

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"
)

// TestRefuseRequest: what does not fit is said in words of ours, which hold
// nothing of what was sent but the beginning of a method's name.
func TestRefuseRequest(t *testing.T) {
	for _, tt := range []struct {
		method, params string
		code           int64
		say            string
	}{
		{"foo/bar", `{}`, -32601, `method not found: "foo/bar"`},
		{strings.Repeat("x", 1000) + "\x1b[31m", `{}`, -32601, "method not found"},
		{"", `{}`, -32601, "method not found"},
		{"tools/call", ``, -32602, `tools/call needs params with a text "name"`},
		{"tools/call", `null`, -32602, `needs params`},
		{"tools/call", `[]`, -32602, "are no object"},
		{"tools/call", `{"name":7}`, -32602, `tools/call needs a text "name" in its params`},
		{"tools/call", `{"name":"a","name":"b"}`, -32602, "have a member twice"},
		{"tools/call", `{"name":"a","_meta":[]}`, -32602, "_meta in the params of tools/call is no object"},
		{"tools/list", `7`, -32602, "are no object"},
		{"tools/list", `{"cursor":7}`, -32602, "cursor in the params of tools/list is no text"},
		{"resources/read", `{}`, -32602, `needs a text "uri"`},
		{"logging/setLevel", `{"level":7}`, -32602, `needs a text "level"`},
		{"tools/call", `{"name":"a","arguments":{},"_meta":{"progressToken":1}}`, 0, ""},
		{"tools/list", ``, 0, ""},
		{"tools/list", `{"cursor":null,"_meta":null}`, 0, ""},
		{"ping", `{}`, 0, ""},
		{"completion/complete", `{"ref":7}`, 0, ""}, // the core says more
	} {
		got := refuseRequest(tt.method, json.RawMessage(tt.params))
		switch {
		case got == nil && tt.code == 0:
		case got == nil || got.Code != tt.code || !strings.Contains(got.Message, tt.say) || len(got.Message) > 200 || strings.Contains(got.Message, "\x1b"):
			t.Errorf("%.20s %s: %v", tt.method, tt.params, got)
		}
	}
}

// TestNoVersionHeader: what a body of protocol 2026-07-28 lacks in the headers is
// said in that protocol's words; whoever sends another begins with initialize.
func TestNoVersionHeader(t *testing.T) {
	g := newFront(t, servers("r", chattyRemote(t).URL))
	header := http.Header{"Content-Type": {"application/json"}, "Accept": {"application/json, text/event-stream"}}
	for meta, want := range map[string]string{
		`"_meta":{` + shortEnvelope + `}`: `map[error:map[code:-32020 message:the header Mcp-Protocol-Version does not say the version that _meta does] id:seven jsonrpc:2.0]`,
		``:                                "Mcp-Session-Id is missing: begin with initialize, or send Mcp-Protocol-Version: 2026-07-28\n",
	} {
		status, got := shortExchange(t, g.url+"/mcp", header, `{"jsonrpc":"2.0","id":"seven","method":"tools/list","params":{`+meta+`}}`)
		if status != http.StatusBadRequest || len(got) != 1 || fmt.Sprint(got[0]) != want {
			t.Errorf("%s: %d %v", meta, status, got)
		}
	}
}
