package gateway

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/jsonschema-go/jsonschema"
	"github.com/modelcontextprotocol/go-sdk/mcp"

	"gatehouse/auth/authtest"
)

const shortEnvelope = `"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientInfo":{"name":"raw","version":"1"},"io.modelcontextprotocol/clientCapabilities":{}`

// TestBothWays: a tools/call of protocol 2026-07-28 gets the same messages and
// the same status by either adapter, and what is unusual goes the long way.
func TestBothWays(t *testing.T) {
	remote := authtest.NewRemote(t, authtest.RemoteConfig{})
	remote.Server().AddTool(&mcp.Tool{Name: "steps", InputSchema: json.RawMessage(`{"type":"object"}`)},
		func(ctx context.Context, req *mcp.CallToolRequest) (*mcp.CallToolResult, error) {
			for i := range 3 {
				if err := req.Session.NotifyProgress(ctx, &mcp.ProgressNotificationParams{ProgressToken: req.Params.GetProgressToken(), Progress: float64(i)}); err != nil {
					return nil, err
				}
			}
			return &mcp.CallToolResult{Content: []mcp.Content{&mcp.TextContent{Text: "line\nbreak"}}}, nil
		})
	remote.Set(func(k *authtest.RemoteKnobs) {
		k.Results = map[string]json.RawMessage{"whoami": json.RawMessage("{\n  \"content\": [],\n  \"isError\": true, \"n\": 1.0\n}")}
	})
	g := newInside(t, remote, oneRemote)
	locked := newInside(t, authtest.NewRemote(t, authtest.RemoteConfig{AS: authtest.NewAS(t)}), oneRemote)

	call := func(name, more string) string {
		return `{"jsonrpc":"2.0","id":7,"method":"tools/call","params":{"name":"` + name + `","arguments":{"text":"hi"}` + more + `}}`
	}
	meta := `,"_meta":{` + shortEnvelope + `}`
	for _, tt := range []struct {
		name, body string
		header     http.Header // beside what is usual
		gateway    *inside     // nil: the one in front of the open remote
		long       bool        // it cannot go the short way
	}{
		{name: "a call", body: call("r_echo", meta)},
		{name: "one with spaces", body: " " + strings.ReplaceAll(call("r_echo", meta), ",", "\n , ") + "\n"},
		{name: "a string as id", body: strings.Replace(call("r_echo", meta), `"id":7`, `"id":"ü\n"`, 1)},
		{name: "progress", body: call("r_steps", `,"_meta":{"progressToken":"p",`+shortEnvelope+`}`)},
		{name: "progress, by gateway_call_tool", body: `{"jsonrpc":"2.0","id":7,"method":"tools/call","params":{"name":"gateway_call_tool","arguments":{"name":"r_steps"},"_meta":{"progressToken":1,` + shortEnvelope + `}}}`, header: http.Header{"Mcp-Name": {"gateway_call_tool"}}},
		{name: "a result with line breaks", body: call("r_whoami", meta)},
		{name: "no such tool", body: call("r_nothing", meta)},
		{name: "no such remote", body: call("nothing", meta)},
		{name: "an own tool's error", body: call("gateway_login", meta)},
		{name: "somebody else's requestState", body: call("r_echo", `,"requestState":"gatehouse1.AAAA"`+meta)},
		{name: "capabilities that are declared", body: call("r_echo", strings.Replace(meta, `Capabilities":{}`, `Capabilities":{"elicitation":{"url":{}},"x":{}}`, 1))},
		{name: "no client info", body: call("r_echo", strings.Replace(meta, `"io.modelcontextprotocol/clientInfo":{"name":"raw","version":"1"},`, "", 1))},

		{name: "a notification", body: strings.Replace(call("r_echo", meta), `"id":7,`, "", 1), long: true},
		{name: "null as id", body: strings.Replace(call("r_echo", meta), `"id":7`, `"id":null`, 1), long: true},
		{name: "no envelope", body: call("r_echo", ""), long: true},
		{name: "another version in the envelope", body: strings.Replace(call("r_echo", meta), "2026-07-28", "2026-07-29", 1), long: true},
		{name: "a version to come", body: strings.Replace(call("r_echo", meta), "2026-07-28", "2027-01-01", 1), header: http.Header{"Mcp-Protocol-Version": {"2027-01-01"}}, long: true},
		{name: "no capabilities", body: call("r_echo", strings.Replace(meta, `,"io.modelcontextprotocol/clientCapabilities":{}`, "", 1)), long: true},
		{name: "capabilities of a wrong type", body: call("r_echo", strings.Replace(meta, `Capabilities":{}`, `Capabilities":{"elicitation":7}`, 1)), long: true},
		{name: "a client info of a wrong type", body: call("r_echo", strings.Replace(meta, `"name":"raw"`, `"name":7`, 1)), long: true},
		{name: "another name in the header", body: call("r_echo", meta), header: http.Header{"Mcp-Name": {"r_whoami"}}, long: true},
		{name: "no name in the header", body: call("r_echo", meta), header: http.Header{"Mcp-Name": nil}, long: true},
		{name: "another method in the header", body: call("r_echo", meta), header: http.Header{"Mcp-Method": {"tools/list"}}, long: true},
		{name: "no event streams", body: call("r_echo", meta), header: http.Header{"Accept": {"application/json"}}, long: true},
		{name: "an encoded name", body: call("r_echo", meta), header: http.Header{"Mcp-Name": {"=?base64?cl9lY2hv?="}}, long: true},
		{name: "a member twice", body: strings.Replace(call("r_echo", meta), `"id":7`, `"id":7,"id":7`, 1), long: true},
		{name: "a batch", body: "[" + call("r_echo", meta) + "]", long: true},
		{name: "no JSON", body: call("r_echo", meta) + "}", long: true},
		{name: "arguments of a wrong type", body: strings.Replace(call("r_echo", meta), `{"text":"hi"}`, `7`, 1), long: true},
		{name: "another version of JSON-RPC", body: strings.Replace(call("r_echo", meta), `"2.0"`, `"1.0"`, 1), long: true},

		{name: "a sign-in is asked for", body: call("r_echo", meta), gateway: locked},
	} {
		t.Run(tt.name, func(t *testing.T) {
			to := tt.gateway
			if to == nil {
				to = g
			}
			header := http.Header{
				"Content-Type": {"application/json"}, "Accept": {"application/json, text/event-stream"},
				"Mcp-Protocol-Version": {modernVersion}, "Mcp-Method": {"tools/call"},
			}
			var named struct{ Params struct{ Name string } }
			if json.Unmarshal([]byte(tt.body), &named) == nil {
				header.Set("Mcp-Name", named.Params.Name)
			}
			maps.Copy(header, tt.header)
			if _, short := readShort(header, []byte(tt.body)); short == tt.long {
				t.Fatalf("it goes the short way: %v", short)
			}
			status, messages := shortExchange(t, to.url+"/mcp", header, tt.body)
			header.Set("Content-Type", "application/json; charset=utf-8") // which is unusual
			wantStatus, want := shortExchange(t, to.url+"/mcp", header, tt.body)
			if status != wantStatus {
				t.Errorf("status %d, and %d the long way", status, wantStatus)
			}
			if diff := cmp.Diff(want, messages); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// TestBothWaysLegacy is the same for a session of the legacy era.
func TestBothWaysLegacy(t *testing.T) {
	remote := authtest.NewRemote(t, authtest.RemoteConfig{})
	asked := make(chan struct{})
	remote.Server().AddTool(&mcp.Tool{Name: "ask", InputSchema: json.RawMessage(`{"type":"object"}`)},
		func(ctx context.Context, req *mcp.CallToolRequest) (*mcp.CallToolResult, error) {
			answer, err := req.Session.Elicit(ctx, &mcp.ElicitParams{Message: "Well?", RequestedSchema: &jsonschema.Schema{Type: "object"}})
			if err != nil {
				return nil, err
			}
			return &mcp.CallToolResult{Content: []mcp.Content{&mcp.TextContent{Text: answer.Action}}}, nil
		})
	remote.Server().AddTool(&mcp.Tool{Name: "wait", InputSchema: json.RawMessage(`{"type":"object"}`)},
		func(ctx context.Context, req *mcp.CallToolRequest) (*mcp.CallToolResult, error) {
			close(asked)
			<-ctx.Done()
			return nil, ctx.Err()
		})
	g := newInside(t, remote, oneRemote)
	header := http.Header{"Content-Type": {"application/json"}, "Accept": {"application/json, text/event-stream"}}
	first := sendShort(t, g.url+"/mcp", header, `{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-11-25","capabilities":{"elicitation":{}},"clientInfo":{"name":"raw","version":"1"}}}`)
	first.Body.Close()
	header.Set("Mcp-Session-Id", first.Header.Get("Mcp-Session-Id"))
	header.Set("Mcp-Protocol-Version", "2025-11-25")
	shortExchange(t, g.url+"/mcp", header, `{"jsonrpc":"2.0","method":"notifications/initialized"}`)

	call := func(params string) string {
		return `{"jsonrpc":"2.0","id":9007199254740991,"method":"tools/call","params":` + params + `}`
	}
	for _, tt := range []struct {
		name, body string
		version    []string // of the header; nil: the session's
		long       bool
	}{
		{name: "a call", body: call(`{"name":"r_echo","arguments":{"text":"hi"}}`)},
		{name: "an older version", version: []string{"2025-03-26"}, body: call(`{"name":"r_echo","arguments":{"text":"hi"}}`)},
		{name: "no version", version: []string{}, body: call(`{"name":"r_echo","arguments":{"text":"hi"}}`)},
		{name: "no such version", version: []string{"2025-03-27"}, body: call(`{"name":"r_echo","arguments":{"text":"hi"}}`), long: true},
		{name: "a batch", version: []string{"2025-03-26"}, body: `[` + call(`{"name":"r_echo","arguments":{"text":"hi"}}`) + `]`, long: true},
		{name: "a _meta of its own", body: call(`{"name":"r_echo","arguments":{"text":"hi"},"_meta":{"x":1.0}}`)},
		{name: "no such tool", body: call(`{"name":"r_nothing"}`)},
		{name: "no such remote", body: call(`{"name":"nothing"}`)},
		{name: "no name", body: call(`{}`), long: true},
		{name: "no params", body: `{"jsonrpc":"2.0","id":1,"method":"tools/call"}`, long: true},
		{name: "the envelope of the other era", body: call(`{"name":"r_echo","_meta":{` + shortEnvelope + `}}`), long: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			header := header.Clone()
			if tt.version != nil {
				header["Mcp-Protocol-Version"] = tt.version
			}
			if _, short := readShortLegacy(header, []byte(tt.body)); short == tt.long {
				t.Fatalf("it goes the short way: %v", short)
			}
			unusual := header.Clone()
			unusual.Set("Content-Type", "application/json; charset=utf-8")
			wantStatus, want := shortExchange(t, g.url+"/mcp", unusual, tt.body)
			status, messages := shortExchange(t, g.url+"/mcp", header, tt.body)
			if status != wantStatus {
				t.Errorf("status %d, and %d the long way", status, wantStatus)
			}
			if diff := cmp.Diff(want, messages); diff != "" {
				t.Error(diff)
			}
		})
	}
	for _, tt := range []struct{ name, answer, want string }{
		{"the client is asked", `"result":{"action":"accept","content":{}}`, `"text":"accept"`},
		{"the client refuses", `"error":{"code":-1,"message":"not now"}`, `not now`},
		{"the client answers nothing", `"x":1`, `The client did not answer`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			resp := sendShort(t, g.url+"/mcp", header, call(`{"name":"r_ask"}`))
			defer resp.Body.Close()
			lines := bufio.NewScanner(resp.Body)
			var question struct{ ID, Method string }
			for question.ID == "" && lines.Scan() {
				if message, ok := bytes.CutPrefix(lines.Bytes(), []byte("data: ")); ok {
					if err := json.Unmarshal(message, &question); err != nil || question.Method != "elicitation/create" {
						t.Fatalf("%v in %s", err, message)
					}
				}
			}
			answer := `{"jsonrpc":"2.0","id":"` + question.ID + `",` + tt.answer + `}`
			if status, _ := shortExchange(t, g.url+"/mcp", header, answer); status != http.StatusAccepted {
				t.Errorf("the answer got %d", status)
			}
			rest, err := io.ReadAll(resp.Body)
			if err != nil {
				t.Fatal(err)
			}
			for lines.Scan() { // what the scanner has read ahead
				rest = append(rest, lines.Bytes()...)
			}
			if !bytes.Contains(rest, []byte(tt.want)) {
				t.Errorf("the call ended with %s", rest)
			}
		})
	}
	t.Run("the client cancels", func(t *testing.T) {
		go func() {
			<-asked
			req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, g.url+"/mcp", strings.NewReader(`{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":9007199254740991}}`))
			if err == nil {
				req.Header = header.Clone()
				if resp, err := http.DefaultClient.Do(req); err == nil {
					resp.Body.Close()
				}
			}
		}()
		_, messages := shortExchange(t, g.url+"/mcp", header, call(`{"name":"r_wait"}`))
		if len(messages) != 1 || !strings.Contains(fmt.Sprint(messages), "cancelled") {
			t.Errorf("the call ended with %v", messages)
		}
	})
}

// TestStreamIsNotSilent: a stream that waits shows that it is there, and nothing
// comes after the answer.
func TestStreamIsNotSilent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := httptest.NewRecorder()
		out := &shortAnswer{w: w, id: json.RawMessage("1")}
		time.Sleep(time.Hour)
		out.notify("notifications/message", nil)
		time.Sleep(2*maxSilence + time.Second)
		out.end("result", json.RawMessage("{}"), http.StatusOK)
		time.Sleep(time.Hour)
		synctest.Wait()
		const event = "event: message\ndata: {\"jsonrpc\":\"2.0\","
		if got, want := w.Body.String(), event+`"method":"notifications/message","params":{}}`+"\n\n:\n\n:\n\n"+event+`"id":1,"result":{}}`+"\n\n"; got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	})
}

// TestStreamsPassProxies: whoever makes an event stream, it says that a proxy is
// not to hold it back.
func TestStreamsPassProxies(t *testing.T) {
	remote := chattyRemote(t)
	g := newFront(t, strings.TrimSuffix(servers("r", remote.URL), "}")+`, "gateway": {"sse": true}}`)
	c := newPlainClient(t, g.url, "{}", false)
	legacy := http.Header{"Content-Type": {"application/json"}, "Accept": {"application/json, text/event-stream"}, "Mcp-Session-Id": {c.session}, "Mcp-Protocol-Version": {"2025-11-25"}}
	long := legacy.Clone()
	long.Set("Content-Type", "application/json; charset=utf-8")
	modern := http.Header{"Content-Type": {"application/json"}, "Accept": {"application/json, text/event-stream"}, "Mcp-Protocol-Version": {modernVersion}, "Mcp-Method": {"subscriptions/listen"}}
	const call = `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"r_t","arguments":{},"_meta":{"progressToken":1}}}`
	for name, tt := range map[string]struct {
		method, path, body string
		header             http.Header
	}{
		"a call":              {http.MethodPost, "/mcp", call, legacy},
		"a call the long way": {http.MethodPost, "/mcp", call, long},
		"a session's stream":  {http.MethodGet, "/mcp", "", legacy},
		"subscriptions":       {http.MethodPost, "/mcp", `{"jsonrpc":"2.0","id":1,"method":"subscriptions/listen","params":{"notifications":{"toolsListChanged":true},"_meta":{` + shortEnvelope + `}}}`, modern},
		"the old transport":   {http.MethodGet, "/sse", "", nil},
	} {
		ctx, cancel := context.WithCancel(t.Context())
		req, err := http.NewRequestWithContext(ctx, tt.method, g.url+tt.path, strings.NewReader(tt.body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header = tt.header.Clone()
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		if kind := resp.Header.Get("Content-Type"); !strings.HasPrefix(kind, "text/event-stream") || resp.Header.Get("X-Accel-Buffering") != "no" {
			t.Errorf("%s: %s %v", name, resp.Status, resp.Header)
		}
		cancel()
		resp.Body.Close()
	}
}

func sendShort(t *testing.T, url string, header http.Header, body string) *http.Response {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header = header.Clone()
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	return resp
}

// shortExchange posts a message and returns the messages that come back, or the text
// if it is none.
func shortExchange(t *testing.T, url string, header http.Header, body string) (status int, messages []any) {
	t.Helper()
	resp := sendShort(t, url, header, body)
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	add := func(message []byte) {
		var v any
		dec := json.NewDecoder(bytes.NewReader(message))
		dec.UseNumber()
		if dec.Decode(&v) != nil {
			v = string(message)
		}
		messages = append(messages, v)
	}
	if !strings.HasPrefix(resp.Header.Get("Content-Type"), "text/event-stream") {
		add(data)
		return resp.StatusCode, messages
	}
	for line := range bytes.Lines(data) {
		if message, ok := bytes.CutPrefix(line, []byte("data: ")); ok {
			add(message)
		}
	}
	return resp.StatusCode, messages
}
