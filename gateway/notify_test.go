package gateway

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/jsonschema-go/jsonschema"
	"github.com/modelcontextprotocol/go-sdk/mcp"

	"gatehouse/auth/authtest"
)

// chattyRemote reports progress and logs at every level in each call.
func chattyRemote(t *testing.T) *plainRemote {
	r := newPlainRemote(t, `{"tools":{},"logging":{}}`, map[string]string{
		"tools/list": `{"tools":[{"name":"t","inputSchema":{"type":"object"}}]}`,
		"tools/call": `{"content":[]}`, "logging/setLevel": `{}`,
	})
	r.events = map[string][]string{"tools/call": {
		`"method":"notifications/progress","params":{"progressToken":$TOKEN,"progress":1.0}`,
		`"method":"notifications/message","params":{"level":"debug","data":1.0}`,
		`"method":"notifications/message","params":{"level":"error","data":2.0}`,
		`"method":"notifications/unknown","params":{}`,
		`"method":"notifications/elicitation/complete","params":{"elicitationId":"1"}`,
		`"method":"notifications/progress","params":{"progressToken":$TOKEN,"progress":9007199254740993}`,
	}}
	return r
}

const (
	gotProgress1 = `"method":"notifications/progress","params":{"progressToken":"same","progress":1.0}`
	gotProgress2 = `"method":"notifications/progress","params":{"progressToken":"same","progress":9007199254740993}`
	gotDebug     = `"method":"notifications/message","params":{"level":"debug","data":1.0}`
	gotComplete  = `"method":"notifications/elicitation/complete","params":{"elicitationId":"1"}`
	gotError     = `"method":"notifications/message","params":{"level":"error","data":2.0}`
)

// relayed checks what came on a call's stream before its result.
func relayed(t *testing.T, c *plainClient, members string, want ...string) {
	t.Helper()
	got := c.messages("tools/call", `"name":"r_t"`+members)
	if len(got) != len(want)+1 || !strings.Contains(got[len(got)-1], `"result"`) {
		t.Fatalf("got %d messages, want %d:\n%s", len(got), len(want)+1, strings.Join(got, "\n"))
	}
	for i, w := range want {
		if !strings.Contains(got[i], w) {
			t.Errorf("message %d: got %s, want %s", i, got[i], w)
		}
	}
}

// TestNotificationsReachTheCaller: in order, before the result, with the
// caller's token, at the caller's level, and what its era has; all clients are one principal's and
// use the same token.
func TestNotificationsReachTheCaller(t *testing.T) {
	remote := chattyRemote(t)
	g := newFront(t, strings.TrimSuffix(servers("r", remote.URL), "}")+`, "gateway": {"sessions": "shared"}}`)
	const token = `,"_meta":{"progressToken":"same"}`
	unset := newPlainClient(t, g.url, "{}", false)
	quiet := newPlainClient(t, g.url, "{}", false)
	modern := newPlainClient(t, g.url, "{}", true)
	unset.call("tools/list", "")
	if got := quiet.call("logging/setLevel", `"level":"error"`); got != "{}" {
		t.Fatal(got)
	}
	if got := quiet.call("logging/setLevel", `"level":"loud"`); !strings.HasPrefix(got, "-32602") {
		t.Error(got)
	}
	var wg sync.WaitGroup
	for range 5 {
		wg.Go(func() { relayed(t, unset, token, gotProgress1, gotDebug, gotError, gotComplete, gotProgress2) })
		wg.Go(func() { relayed(t, quiet, token, gotProgress1, gotError, gotComplete, gotProgress2) })
		wg.Go(func() { relayed(t, quiet, "", gotError, gotComplete) })
		wg.Go(func() { relayed(t, modern, "") })
	}
	wg.Wait()
	if got, want := remote.got("logging/setLevel"), `{"level":"error"}`; got != want {
		t.Errorf("the remote was told %s, want %s", got, want)
	}
	// One that wants more is served, and does not burden the others.
	const wants = `,"_meta":{"progressToken":"same","io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientCapabilities":{},"io.modelcontextprotocol/logLevel":%q}`
	modern.bare = true
	relayed(t, modern, fmt.Sprintf(wants, "debug"), gotProgress1, gotDebug, gotError, gotProgress2)
	relayed(t, modern, fmt.Sprintf(wants, "critical"), gotProgress1, gotProgress2)
	if got, want := remote.got("logging/setLevel"), `{"level":"debug"}`; got != want {
		t.Errorf("the remote was told %s, want %s", got, want)
	}
	relayed(t, quiet, "", gotError, gotComplete)
}

// TestProgressOfGatewayCallTool: the indirect call reports like the direct one.
func TestProgressOfGatewayCallTool(t *testing.T) {
	g := newFront(t, servers("r", chattyRemote(t).URL))
	c := newPlainClient(t, g.url, "{}", false)
	c.call("tools/list", "")
	got := c.messages("tools/call", `"name":"gateway_call_tool","arguments":{"name":"r_t"},"_meta":{"progressToken":"same"}`)
	if len(got) != 6 || !strings.Contains(got[0], gotProgress1) || !strings.Contains(got[4], gotProgress2) {
		t.Errorf("got %q", got)
	}
}

// TestProgressOfTheClient: what a client says about its progress with what a
// remote asks it reaches that remote, with the token that the remote gave.
func TestProgressOfTheClient(t *testing.T) {
	heard := make(chan string, 10)
	server := mcp.NewServer(&mcp.Implementation{Name: "asks", Version: "1"}, &mcp.ServerOptions{
		ProgressNotificationHandler: func(_ context.Context, req *mcp.ProgressNotificationServerRequest) {
			heard <- fmt.Sprint(req.Params.ProgressToken, " ", req.Params.Progress, " ", req.Params.Message)
		},
	})
	mcp.AddTool(server, &mcp.Tool{Name: "ask"}, func(ctx context.Context, req *mcp.CallToolRequest, _ struct{}) (*mcp.CallToolResult, any, error) {
		_, err := req.Session.Elicit(ctx, &mcp.ElicitParams{Meta: mcp.Meta{"progressToken": "r"}, Message: "Well?", RequestedSchema: &jsonschema.Schema{Type: "object"}})
		return &mcp.CallToolResult{Content: []mcp.Content{&mcp.TextContent{Text: "done"}}}, nil, err
	})
	srv := httptest.NewServer(mcp.NewStreamableHTTPHandler(func(*http.Request) *mcp.Server { return server }, nil))
	t.Cleanup(srv.Close)
	t.Cleanup(func() {
		for ss := range server.Sessions() {
			ss.Close()
		}
	})
	g := newFront(t, servers("r", srv.URL))
	client := authtest.Connect(t, authtest.ClientConfig{URL: g.url + "/mcp", Elicit: func(ctx context.Context, req *mcp.ElicitRequest) (*mcp.ElicitResult, error) {
		token := req.Params.GetProgressToken()
		if token == nil || token == "r" {
			t.Errorf("the client was given the token %v", token)
		}
		for i := range 2 {
			if err := req.Session.NotifyProgress(ctx, &mcp.ProgressNotificationParams{ProgressToken: token, Progress: float64(i + 1), Message: "thinking"}); err != nil {
				return nil, err
			}
		}
		return &mcp.ElicitResult{Action: "decline"}, nil
	}})
	for range 2 {
		result, err := client.CallTool(t.Context(), &mcp.CallToolParams{Name: "r_ask"})
		if err != nil || result.IsError {
			t.Fatalf("got %+v, %v", result, err)
		}
		for _, want := range []string{"r 1 thinking", "r 2 thinking"} {
			select {
			case got := <-heard:
				if got != want {
					t.Errorf("got %s, want %s", got, want)
				}
			case <-time.After(10 * time.Second):
				t.Fatalf("the remote has not heard %q", want)
			}
		}
	}
}

// TestLevelsAreForgotten: a client that has gone leaves nothing.
func TestLevelsAreForgotten(t *testing.T) {
	g := newFront(t, strings.TrimSuffix(servers("r", chattyRemote(t).URL), "}")+`, "gateway": {"sessions": "shared"}}`)
	client := authtest.Legacy(t, g.url+"/mcp")
	//lint:ignore SA1019 it is what the test is about
	if err := client.SetLoggingLevel(t.Context(), &mcp.SetLoggingLevelParams{Level: "debug"}); err != nil {
		t.Fatal(err)
	}
	if err := client.Close(); err != nil {
		t.Fatal(err)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, v := range g.views {
		v.levels.mu.Lock()
		if n := len(v.levels.wanted); n != 0 {
			t.Errorf("%d levels are left", n)
		}
		v.levels.mu.Unlock()
	}
}

// TestAfterwards: after its calls a client hears of a remote what it wants to
// hear, and nothing that is about the gateway's own requests to it.
func TestAfterwards(t *testing.T) {
	var heard []string
	v := &view{}
	v.levels.want("client", 4)
	c := caller{view: v, client: "client", later: func(method string, params json.RawMessage) { heard = append(heard, method+string(params)) }}
	say := c.behind().Later
	say("notifications/cancelled", json.RawMessage(`{"requestId":"gatehouse-1"}`))
	say("notifications/progress", json.RawMessage(`{"progressToken":1,"progress":1}`))
	say("notifications/message", json.RawMessage(`{"level":"info","data":1}`))
	say("notifications/message", json.RawMessage(`{"level":"error","data":2}`))
	say("notifications/elicitation/complete", json.RawMessage(`{"elicitationId":"x"}`))
	want := []string{`notifications/message{"level":"error","data":2}`, `notifications/elicitation/complete{"elicitationId":"x"}`}
	if !slices.Equal(heard, want) {
		t.Errorf("got %q", heard)
	}
	if (caller{view: v}).behind().Later != nil {
		t.Error("who cannot hear anything is told")
	}
}
