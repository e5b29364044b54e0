package gateway

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/modelcontextprotocol/go-sdk/jsonrpc"
	"github.com/modelcontextprotocol/go-sdk/mcp"

	"gatehouse/auth"
	"gatehouse/auth/authtest"
	"gatehouse/session"
)

// asking is a real server whose tool asks its client twice, and for a sample;
// of the modern era if stateless.
func asking(t *testing.T, stateless bool) string {
	t.Helper()
	server := mcp.NewServer(&mcp.Implementation{Name: "asking", Version: "1"}, nil)
	type none struct{}
	said := func(s string) *mcp.CallToolResult {
		return &mcp.CallToolResult{Content: []mcp.Content{&mcp.TextContent{Text: s}}}
	}
	mcp.AddTool(server, &mcp.Tool{Name: "ask"}, func(ctx context.Context, req *mcp.CallToolRequest, _ none) (*mcp.CallToolResult, any, error) {
		if stateless {
			if first, ok := req.Params.InputResponses["first"].(*mcp.ElicitResult); ok {
				return said(fmt.Sprint(first.Action, first.Content["n"], req.Params.RequestState)), nil, nil
			}
			return &mcp.CallToolResult{RequestState: "theirs", InputRequests: mcp.InputRequestMap{"first": &mcp.ElicitParams{Mode: "form", Message: "first?"}}}, nil, nil
		}
		first, err := req.Session.Elicit(ctx, &mcp.ElicitParams{Message: "first?"})
		if err != nil {
			return nil, nil, err
		}
		second, err := req.Session.Elicit(ctx, &mcp.ElicitParams{Message: "second?"})
		if err != nil {
			return nil, nil, err
		}
		return said(fmt.Sprint(first.Action, first.Content["n"], second.Action)), nil, nil
	})
	handler := mcp.NewStreamableHTTPHandler(func(*http.Request) *mcp.Server { return server }, &mcp.StreamableHTTPOptions{Stateless: stateless})
	srv := httptest.NewServer(handler)
	t.Cleanup(srv.Close)
	return srv.URL
}

// answering is a client that answers elicitations with its own name.
func answering(t *testing.T, url, version, name string, asked *atomic.Int64) *mcp.ClientSession {
	t.Helper()
	client := mcp.NewClient(&mcp.Implementation{Name: name, Version: "1"}, &mcp.ClientOptions{
		ElicitationHandler: func(context.Context, *mcp.ElicitRequest) (*mcp.ElicitResult, error) {
			asked.Add(1)
			return &mcp.ElicitResult{Action: "accept", Content: map[string]any{"n": name}}, nil
		},
	})
	session, err := client.Connect(t.Context(), &mcp.StreamableClientTransport{Endpoint: url + "/mcp"}, &mcp.ClientSessionOptions{ProtocolVersion: version})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { session.Close() })
	return session
}

// TestErasAsk: what a remote of either era asks in the middle of a call, the
// client of either era behind that call answers, and no other of the principal.
func TestErasAsk(t *testing.T) {
	for _, stateless := range []bool{false, true} {
		for _, version := range []string{"2025-11-25", "2026-07-28"} {
			t.Run(fmt.Sprintf("modern remote %v, client %s", stateless, version), func(t *testing.T) {
				g := newFront(t, strings.TrimSuffix(servers("r", asking(t, stateless)), "}")+`, "gateway": {"sessions": "shared"}}`)
				want, times := " accept", int64(2)
				if stateless {
					want, times = "theirs", 1
				}
				var wg sync.WaitGroup
				for i := range 8 {
					name := fmt.Sprint("client-", i)
					var asked atomic.Int64
					session := answering(t, g.url, version, name, &asked)
					wg.Go(func() {
						for range 3 {
							result, err := session.CallTool(t.Context(), &mcp.CallToolParams{Name: "r_ask", Arguments: map[string]any{}})
							if err != nil {
								t.Error(err)
								return
							}
							got := result.Content[0].(*mcp.TextContent).Text
							if strings.ReplaceAll(got, " ", "") != "accept"+name+strings.TrimSpace(want) {
								t.Errorf("%s got %q", name, got)
							}
						}
						if n := asked.Load(); n != 3*times {
							t.Errorf("%s was asked %d times", name, n)
						}
					})
				}
				wg.Wait()
			})
		}
	}
}

// TestNobodyAnswers: what a modern remote asks is waited for as long as a person
// takes, and no longer than the gateway runs.
func TestNobodyAnswers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := &view{}
		v.ended, v.end = context.WithCancel(context.Background())
		c := caller{view: v, capabilities: json.RawMessage(elicits), ask: func(ctx context.Context, _ string, _ json.RawMessage) (json.RawMessage, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}}
		questions := map[string]inputRequest{"first": {"elicitation/create", json.RawMessage(`{"message":"well?"}`)}}
		provide := func() (time.Duration, error) {
			began := time.Now()
			_, err := c.provide(t.Context(), json.RawMessage(`{}`), questions, nil)
			return time.Since(began), err
		}
		if took, err := provide(); took != answerWait || !errors.Is(err, errNoAnswer) {
			t.Errorf("after %v: %v", took, err)
		}
		time.AfterFunc(time.Second, v.end)
		if took, err := provide(); took != time.Second || !errors.Is(err, session.ErrClosed) {
			t.Errorf("closed, after %v: %v", took, err)
		}
	})
}

// TestDrainEndsQuestions: a drain that is over ends the call whose client went
// away while a modern remote was asking it, and one whose client is still there
// is told.
func TestDrainEndsQuestions(t *testing.T) {
	g := newFront(t, servers("r", asking(t, true)))
	const call = `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"r_ask","arguments":{}}}`
	asked := func() (events <-chan string, cut func()) {
		c := newPlainClient(t, g.url, elicits, false)
		resp := c.post(call, "")
		events = c.events(resp)
		until(t, events, "elicitation/create")
		return events, func() { resp.Body.Close() }
	}
	_, cut := asked()
	cut()
	events, _ := asked()
	over, cancel := context.WithCancel(t.Context())
	cancel()
	g.Drain(over)
	until(t, events, "notifications/cancelled")
	if got := <-events; !strings.Contains(got, "shutting down") {
		t.Errorf("got %s", got)
	}
	g.calls.wait(t.Context())
}

// modernCall sends tools/call of the modern era with capabilities and more members.
func modernCall(c *plainClient, capabilities, name, members string) map[string]any {
	c.t.Helper()
	c.bare = true
	got := c.call("tools/call", fmt.Sprintf(`"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientCapabilities":%s},"name":%q,"arguments":{}%s`, capabilities, name, members))
	var result map[string]any
	if json.Unmarshal([]byte(got), &result) != nil {
		return map[string]any{"error": got}
	}
	return result
}

const elicits = `{"elicitation":{"form":{},"url":{}}}`

// TestParked: a call to a legacy remote waits for its client. The state that the
// client carries is good for that request of that principal only, as it is, and
// for a while; what ends meanwhile leaves nothing behind.
func TestParked(t *testing.T) {
	g := newFront(t, strings.TrimSuffix(servers("r", asking(t, false)), "}")+`, "gateway": {"sessions": "shared"}}`)
	c := newPlainClient(t, g.url, "{}", true)
	for _, tool := range []string{"r_ask", "gateway_call_tool"} {
		call := func(members string) map[string]any { return modernCall(c, elicits, tool, members) }
		if tool == toolCall {
			call = func(members string) map[string]any {
				c.bare = true
				got := c.call("tools/call", `"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientCapabilities":`+elicits+`},"name":"gateway_call_tool","arguments":{"name":"r_ask","arguments":{}}`+members)
				var result map[string]any
				if json.Unmarshal([]byte(got), &result) != nil {
					return map[string]any{"error": got}
				}
				return result
			}
		}
		first := call("")
		state, _ := first["requestState"].(string)
		if first["resultType"] != "input_required" || state == "" {
			t.Fatalf("%s: got %v", tool, first)
		}
		back := func(state, key, answer string) map[string]any {
			return call(fmt.Sprintf(`,"requestState":%q,"inputResponses":{%q:%s}`, state, key, answer))
		}
		// Nothing that is asked for: the question comes again.
		again := back(state, "nonsense", `{"action":"accept","content":{}}`)
		if again["resultType"] != "input_required" {
			t.Errorf("%s: no answer gives %v", tool, again)
		}
		changed := state[:len(state)-4] + "AAAA"
		for what, got := range map[string]map[string]any{
			"a changed state":           back(changed, "1", `{"action":"accept","content":{"n":1}}`),
			"the state of another tool": modernCall(c, elicits, "gateway_status", fmt.Sprintf(`,"requestState":%q,"inputResponses":{"1":{"action":"accept"}}`, state)),
		} {
			if text := fmt.Sprint(got); strings.Contains(text, "accept1") || what != "a changed state" && !strings.Contains(text, "belongs to another request") {
				t.Errorf("%s: %s: got %v", tool, what, got)
			}
		}
		second := back(again["requestState"].(string), "1", `{"action":"accept","content":{"n":"one"}}`)
		if second["resultType"] != "input_required" {
			t.Fatalf("%s: after the first answer: %v", tool, second)
		}
		done := back(second["requestState"].(string), "2", `{"action":"decline"}`)
		if text := fmt.Sprint(done["content"]); !strings.Contains(text, "accept one decline") && !strings.Contains(text, "acceptonedecline") {
			t.Errorf("%s: got %v", tool, done)
		}
		if late := back(second["requestState"].(string), "2", `{"action":"accept"}`); !strings.Contains(fmt.Sprint(late), "belongs to another request") {
			t.Errorf("%s: after the end: %v", tool, late)
		}
	}
	g.parked.mu.Lock()
	if n := len(g.parked.byID); n > 2 { // those whose state was changed went on as other calls
		t.Errorf("%d calls are parked", n)
	}
	g.parked.mu.Unlock()
	// Closing with a parked call neither waits for its client nor leaks it.
	if got := modernCall(c, elicits, "r_ask", ""); got["resultType"] != "input_required" {
		t.Fatalf("got %v", got)
	}
	// Who cannot be asked is not: the remote is told.
	if got := fmt.Sprint(modernCall(c, "{}", "r_ask", "")); !strings.Contains(got, "isError") {
		t.Errorf("without the capability: %s", got)
	}
}

// TestParkedTells: what a remote tells in the course of a parked call is for the
// request that has taken it up: with its token, and at its level.
func TestParkedTells(t *testing.T) {
	server := mcp.NewServer(&mcp.Implementation{Name: "telling", Version: "1"}, nil)
	mcp.AddTool(server, &mcp.Tool{Name: "ask"}, func(ctx context.Context, req *mcp.CallToolRequest, _ struct{}) (*mcp.CallToolResult, any, error) {
		for i := range 4 {
			if err := req.Session.NotifyProgress(ctx, &mcp.ProgressNotificationParams{ProgressToken: req.Params.GetProgressToken(), Progress: float64(i)}); err != nil {
				return nil, nil, err
			}
			//lint:ignore SA1019 deprecated, not removed: legacy remotes send them
			if err := req.Session.Log(ctx, &mcp.LoggingMessageParams{Level: "error", Data: i}); err != nil {
				return nil, nil, err
			}
			if i == 3 {
				break
			}
			if _, err := req.Session.Elicit(ctx, &mcp.ElicitParams{Message: "well?"}); err != nil {
				return nil, nil, err
			}
		}
		return &mcp.CallToolResult{}, nil, nil
	})
	remote := httptest.NewServer(mcp.NewStreamableHTTPHandler(func(*http.Request) *mcp.Server { return server }, nil))
	t.Cleanup(remote.Close)
	g := newFront(t, strings.TrimSuffix(servers("r", remote.URL), "}")+`, "gateway": {"sessions": "shared"}}`)
	newPlainClient(t, g.url, "{}", false).call("logging/setLevel", `"level":"debug"`) // the remote sends them, for somebody
	c := newPlainClient(t, g.url, "{}", true)
	c.bare = true
	const progress, message = "notifications/progress", "notifications/message"
	state := ""
	for i, tt := range []struct {
		meta string
		want []string
	}{
		{`"progressToken":"one","io.modelcontextprotocol/logLevel":"info",`, []string{progress + ` "one"`, message}},
		{`"progressToken":2,`, []string{progress + ` 2`}},
		{`"io.modelcontextprotocol/logLevel":"info",`, []string{message}},
		{`"progressToken":"four","io.modelcontextprotocol/logLevel":"alert",`, []string{progress + ` "four"`}},
	} {
		again := ""
		if i > 0 {
			again = fmt.Sprintf(`,"requestState":%q,"inputResponses":{"%d":{"action":"accept","content":{}}}`, state, i)
		}
		var told []string
		for _, raw := range c.messages("tools/call", `"_meta":{`+tt.meta+`"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientCapabilities":`+elicits+`},"name":"r_ask","arguments":{}`+again) {
			var m struct {
				Method string
				Params struct{ ProgressToken json.RawMessage }
				Result struct{ RequestState string }
			}
			if err := json.Unmarshal([]byte(raw), &m); err != nil {
				t.Fatalf("%v in %s", err, raw)
			}
			if state = m.Result.RequestState; m.Method != "" {
				told = append(told, strings.TrimSpace(m.Method+" "+string(m.Params.ProgressToken)))
			}
		}
		if !slices.Equal(told, tt.want) {
			t.Errorf("request %d was told %q, want %q", i+1, told, tt.want)
		}
	}
}

// TestParkedOnce: of two requests with one state, one waits for the call, and the
// other neither ends it by going away nor leaves a timer behind that would.
func TestParkedOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &Gateway{}
		p := &parkedCall{done: make(chan struct{}), news: make(chan struct{}, 1), result: json.RawMessage(`{}`)}
		p.cancel = func() { t.Error("the call was cancelled") }
		answered := make(chan json.RawMessage, 1)
		go func() {
			result, err := g.attend(t.Context(), caller{}, p, nil)
			if err != nil {
				t.Error(err)
			}
			answered <- result
		}()
		synctest.Wait()
		gone, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		time.AfterFunc(time.Minute, func() { close(p.done) })
		if _, err := g.attend(gone, caller{}, p, nil); err == nil || !strings.Contains(fmt.Sprint(renderRPC(err, time.Now())), "in progress") {
			t.Errorf("got %v", err)
		}
		if got := <-answered; string(got) != `{}` {
			t.Errorf("got %s", got)
		}
	})
}

// TestPageToVisit: a legacy remote that wants a page visited gets that from a
// client that can; what the others get is of the kind that they have asked for.
func TestPageToVisit(t *testing.T) {
	const refusal = `!{"code":-32042,"message":"visit","data":{"elicitations":[{"mode":"url","elicitationId":"1","url":"https://example.com/","message":"visit"}]}}`
	r := newPlainRemote(t, `{"tools":{},"prompts":{}}`, map[string]string{
		"tools/list": `{"tools":[{"name":"t","inputSchema":{"type":"object"}}]}`, "prompts/list": `{"prompts":[{"name":"p"}]}`,
		"tools/call": refusal, "prompts/get": refusal,
	})
	g := newFront(t, strings.TrimSuffix(servers("r", r.URL), "}")+`, "gateway": {"sessions": "shared"}}`)
	for method, name := range map[string]string{"tools/call": "r_t", "prompts/get": "r_p"} {
		for capabilities, want := range map[string]string{elicits: `"input_required"`, "{}": "a page to be visited"} {
			c := newPlainClient(t, g.url, "{}", true)
			c.bare = true
			got := strings.Join(c.messages(method, fmt.Sprintf(`"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientCapabilities":%s},"name":%q`, capabilities, name)), "")
			if !strings.Contains(got, want) || want[0] == 'a' && strings.Contains(got, `"isError"`) != (method == "tools/call") {
				t.Errorf("%s of a client with %s: %s", method, capabilities, got)
			}
		}
	}
}

// TestLinksHaveTheirEra: up to 2025-11-25 a link that a remote wants opened has an
// id, later it has none; whose link it is says nothing about the client's era.
func TestLinksHaveTheirEra(t *testing.T) {
	for _, stateless := range []bool{false, true} {
		server := mcp.NewServer(&mcp.Implementation{Name: "linking", Version: "1"}, nil)
		mcp.AddTool(server, &mcp.Tool{Name: "link"}, func(ctx context.Context, req *mcp.CallToolRequest, _ struct{}) (*mcp.CallToolResult, any, error) {
			link := &mcp.ElicitParams{Mode: "url", Message: "visit", URL: "https://example.com/"}
			switch {
			case !stateless:
				link.ElicitationID = "theirs"
				_, err := req.Session.Elicit(ctx, link)
				return &mcp.CallToolResult{}, nil, err
			case len(req.Params.InputResponses) == 0:
				return &mcp.CallToolResult{InputRequests: mcp.InputRequestMap{"first": link}}, nil, nil
			}
			return &mcp.CallToolResult{}, nil, nil
		})
		remote := httptest.NewServer(mcp.NewStreamableHTTPHandler(func(*http.Request) *mcp.Server { return server }, &mcp.StreamableHTTPOptions{Stateless: stateless}))
		t.Cleanup(remote.Close)
		g := newFront(t, strings.TrimSuffix(servers("r", remote.URL), "}")+`, "gateway": {"sessions": "shared"}}`)

		legacy := newPlainClient(t, g.url, elicits, false)
		asked := until(t, legacy.events(legacy.post(`{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"r_link","arguments":{}}}`, "")), "elicitation/create")
		var request struct{ Params urlElicitation }
		if err := json.Unmarshal([]byte(asked), &request); err != nil || request.Params.ID == "" || !stateless && request.Params.ID != "theirs" {
			t.Errorf("modern remote %v: a legacy client is asked %s", stateless, asked)
		}
		modern := fmt.Sprint(modernCall(newPlainClient(t, g.url, "{}", true), elicits, "r_link", ""))
		if !strings.Contains(modern, "https://example.com/") || strings.Contains(modern, "elicitationId") {
			t.Errorf("modern remote %v: a modern client is asked %s", stateless, modern)
		}
	}
}

// TestParkedElsewhere: a call that waits in another process, or in this one
// before it was started again, is not made a second time by its ticket.
func TestParkedElsewhere(t *testing.T) {
	config := strings.TrimSuffix(servers("r", asking(t, false)), "}") + `, "gateway": {"sessions": "shared"}}`
	one, other := newFront(t, config), newFront(t, config)
	first := modernCall(newPlainClient(t, one.url, "{}", true), elicits, "r_ask", "")
	if first["resultType"] != "input_required" {
		t.Fatalf("got %v", first)
	}
	c := newPlainClient(t, other.url, "{}", true)
	got := fmt.Sprint(modernCall(c, elicits, "r_ask", fmt.Sprintf(`,"requestState":%q,"inputResponses":{"1":{"action":"accept"}}`, first["requestState"])))
	if !strings.Contains(got, "belongs to another request") {
		t.Errorf("got %s", got)
	}
	if n := len(other.parked.byID); n != 0 {
		t.Errorf("%d calls are parked there", n)
	}
}

// signInClient is a client that opens elicited URLs in a browser of its own.
func signInClient(t *testing.T, url, version string, action func(url string) string, done func()) *mcp.ClientSession {
	t.Helper()
	client := mcp.NewClient(&mcp.Implementation{Name: "client", Version: "1"}, &mcp.ClientOptions{
		Capabilities: &mcp.ClientCapabilities{Elicitation: &mcp.ElicitationCapabilities{URL: &mcp.URLElicitationCapabilities{}}},
		ElicitationHandler: func(_ context.Context, req *mcp.ElicitRequest) (*mcp.ElicitResult, error) {
			if req.Params.Mode != "url" || !strings.Contains(req.Params.Message, "needs you to sign in") {
				t.Errorf("asked for %+v", req.Params)
			}
			return &mcp.ElicitResult{Action: action(req.Params.URL)}, nil
		},
		ElicitationCompleteHandler: func(context.Context, *mcp.ElicitationCompleteNotificationRequest) { done() },
	})
	session, err := client.Connect(t.Context(), &mcp.StreamableClientTransport{Endpoint: url + "/mcp"}, &mcp.ClientSessionOptions{ProtocolVersion: version})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { session.Close() })
	return session
}

// TestSignInByElicitation: where the client can open links, the call completes
// with the sign-in, and the model does nothing. Who says no gets the result that
// everybody else gets.
func TestSignInByElicitation(t *testing.T) {
	for _, version := range []string{"2025-11-25", "2026-07-28"} {
		t.Run(version, func(t *testing.T) {
			as := authtest.NewAS(t)
			remote := authtest.NewRemote(t, authtest.RemoteConfig{AS: as})
			g := newInside(t, remote, oneRemote)
			complete := make(chan struct{}, 1)
			var opened atomic.Int64
			open := func(url string) string {
				opened.Add(1)
				if page := authtest.NewBrowser(t).Open(url); page.Status != http.StatusOK || !strings.Contains(page.Body, "connected") {
					t.Errorf("the page says %d %s", page.Status, page.Body)
				}
				return "accept"
			}
			session := signInClient(t, g.url, version, open, func() { complete <- struct{}{} })
			call := func() (*mcp.CallToolResult, error) {
				return session.CallTool(t.Context(), &mcp.CallToolParams{Name: "r_echo", Arguments: map[string]any{"text": "hello"}})
			}
			result, err := call()
			if version == "2025-11-25" {
				// This client leaves the error to whoever calls.
				refusal, ok := errors.AsType[*jsonrpc.Error](err)
				if !ok || refusal.Code != codeURLElicitation {
					t.Fatalf("got %+v, %v", result, err)
				}
				var data struct{ Elicitations []urlElicitation }
				if err := json.Unmarshal(refusal.Data, &data); err != nil || len(data.Elicitations) != 1 || data.Elicitations[0].ID == "" || data.Elicitations[0].Mode != "url" {
					t.Fatalf("got %s", refusal.Data)
				}
				open(data.Elicitations[0].URL)
				<-complete
				result, err = call()
			}
			if err != nil {
				t.Fatal(err)
			}
			if got := result.Content[0].(*mcp.TextContent).Text; got != "hello" || opened.Load() != 1 {
				t.Errorf("got %q after %d links", got, opened.Load())
			}
		})
		t.Run(version+" declined", func(t *testing.T) {
			as := authtest.NewAS(t)
			remote := authtest.NewRemote(t, authtest.RemoteConfig{AS: as})
			g := newInside(t, remote, oneRemote)
			session := signInClient(t, g.url, version, func(string) string { return "decline" }, func() {})
			result, err := session.CallTool(t.Context(), &mcp.CallToolParams{Name: "r_echo", Arguments: map[string]any{"text": "hello"}})
			if version == "2025-11-25" {
				if err == nil {
					t.Errorf("got %+v", result)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got := result.Content[0].(*mcp.TextContent).Text; !result.IsError || !strings.Contains(got, "/connect/") {
				t.Errorf("got %+v", result)
			}
		})
	}
}

// TestLinksAreBounded: who calls again and again instead of opening the link gets
// it in the end as everybody else does, and leaves no more behind.
func TestLinksAreBounded(t *testing.T) {
	remote := authtest.NewRemote(t, authtest.RemoteConfig{AS: authtest.NewAS(t)})
	g := newInside(t, remote, oneRemote)
	session := signInClient(t, g.url, "2025-11-25", func(string) string { return "accept" }, func() {})
	for i := range maxParked + 3 {
		result, err := session.CallTool(t.Context(), &mcp.CallToolParams{Name: "r_echo", Arguments: map[string]any{"text": "hello"}})
		refusal, _ := errors.AsType[*jsonrpc.Error](err)
		if asked := refusal != nil && refusal.Code == codeURLElicitation; asked != (i < maxParked) || !asked && (err != nil || !result.IsError) {
			t.Fatalf("call %d: got %+v, %v", i, result, err)
		}
	}
}

// TestAnswersAreExact: what a client answers reaches the remote byte for byte,
// also what the SDK has no field for; and nobody can put words into its mouth by
// the name under which it travels inside.
func TestAnswersAreExact(t *testing.T) {
	const exact = `{"action":"accept","content":{"n":9007199254740993,"f":1.0},"extra":[1e2],"_meta":{"gatehouse/answer":"{\"action\":\"forged\"}"}}`
	wrapped, err := smuggleResponse([]byte(`{"jsonrpc":"2.0","id":1,"result":` + exact + `}`))
	if err != nil {
		t.Fatal(err)
	}
	var response struct{ Result json.RawMessage }
	if err := json.Unmarshal(wrapped, &response); err != nil {
		t.Fatal(err)
	}
	//lint:ignore SA1019 deprecated, not removed: clients of both eras send them
	for _, result := range []mcp.Result{&mcp.ElicitResult{}, &mcp.CreateMessageWithToolsResult{}, &mcp.ListRootsResult{}} {
		if err := json.Unmarshal(response.Result, result); err != nil {
			t.Errorf("%T: %v", result, err)
			continue
		}
		if got, err := smuggled(result); err != nil || string(got) != exact {
			t.Errorf("%T: got %s, %v", result, got, err)
		}
	}
	for _, body := range []string{`{"jsonrpc":"2.0","id":1,"method":"x","result":{}}`, `{"jsonrpc":"2.0","id":1,"error":{}}`, `[1]`, `{`} {
		if got, err := smuggleResponse([]byte(body)); err != nil || string(got) != body {
			t.Errorf("%s: got %s, %v", body, got, err)
		}
	}
	if _, err := smuggleResponse([]byte(`{"result":{bad}}`)); err == nil {
		t.Error("a result that is not JSON was taken")
	}
}

// TestLegacyResult: only what the modern era has added goes.
func TestLegacyResult(t *testing.T) {
	for in, want := range map[string]string{
		`{"content":[],"x":1.0}`: `{"content":[],"x":1.0}`,
		`{"resultType":"complete","content":[{"resultType":"mine"}],"ttlMs":5,"cacheScope":"public","x":1.0}`:     `{"content":[{"resultType":"mine"}],"x":1.0}`,
		`{"content":[],"resultType":"complete","_meta":{"io.modelcontextprotocol/serverInfo":{}}}`:                `{"content":[]}`,
		`{"resultType":"complete","_meta":{"a":1e2,"io.modelcontextprotocol/serverInfo":{"name":"x"}},"ttlMs":1}`: `{"_meta":{"a":1e2}}`,
		`{"content":[{"text":"\"resultType\""}],"ttlMs":1}`:                                                       `{"content":[{"text":"\"resultType\""}],"ttlMs":1}`,
	} {
		if got, err := legacyResult(json.RawMessage(in)); err != nil || string(got) != want {
			t.Errorf("%s\n got %s, %v\nwant %s", in, got, err, want)
		}
	}
}

// TestParkedBytes: what remotes ask of a client that has not come back is
// bounded, for each call and for all of a principal. What is answered or given
// up counts no more.
func TestParkedBytes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var all parkedCalls
		half := json.RawMessage(`"` + strings.Repeat("x", maxQuestions/2-100) + `"`)
		ctx, giveUp := context.WithCancel(t.Context())
		defer giveUp()
		parked := func(p auth.Principal) *parkedCall {
			return &parkedCall{all: &all, principal: p, news: make(chan struct{}, 1), pending: map[string]*question{}}
		}
		ask := func(p *parkedCall) <-chan error {
			done := make(chan error, 1)
			go func() {
				_, err := p.ask(ctx, "sampling/createMessage", half)
				done <- err
			}()
			synctest.Wait()
			return done
		}
		kept := func(what string, p *parkedCall, want bool) <-chan error {
			t.Helper()
			done := ask(p)
			select {
			case err := <-done:
				if refusal, ok := errors.AsType[*session.ResponseError](err); want || !ok || refusal.Code != -32603 {
					t.Errorf("%s: got %v", what, err)
				}
			default:
				if !want {
					t.Errorf("%s is kept", what)
				}
			}
			return done
		}
		first := parked(auth.Local)
		answered := kept("the first", first, true)
		kept("the second", first, true)
		kept("the third", first, false)
		first.answer(json.RawMessage(`{"1":{"action":"accept"}}`))
		if err := <-answered; err != nil {
			t.Error(err)
		}
		kept("one more after an answer", first, true)

		for i := range maxHeld/maxQuestions - 1 {
			p := parked(auth.Local)
			kept(fmt.Sprint("call ", i), p, true)
			kept(fmt.Sprint("call ", i, " again"), p, true)
		}
		kept("one too many of the principal", parked(auth.Local), false)
		kept("another principal's", parked(auth.SessionPrincipal("other")), true)
		giveUp()
		synctest.Wait()
		if len(all.held) != 0 {
			t.Errorf("still held: %v", all.held)
		}
	})
}

// TestRemoteCancels: what a remote has asked and does not want to know any more
// is taken back from the client, whichever way the call came, and the call goes on.
func TestRemoteCancels(t *testing.T) {
	asked := make(chan struct{}, 1)
	takenBack := make(chan struct{}, 1)
	server := mcp.NewServer(&mcp.Implementation{Name: "asking", Version: "1"}, nil)
	mcp.AddTool(server, &mcp.Tool{Name: "ask"}, func(ctx context.Context, req *mcp.CallToolRequest, _ struct{}) (*mcp.CallToolResult, any, error) {
		asking, cancel := context.WithCancel(ctx)
		go func() {
			<-asked
			cancel()
		}()
		_, err := req.Session.Elicit(asking, &mcp.ElicitParams{Message: "well?"})
		select {
		case <-takenBack: // before the call ends, which takes back everything
		case <-time.After(5 * time.Second):
			err = errors.New("the client is still being asked")
		case <-ctx.Done():
		}
		return &mcp.CallToolResult{Content: []mcp.Content{&mcp.TextContent{Text: fmt.Sprint(err)}}}, nil, nil
	})
	remote := httptest.NewServer(mcp.NewStreamableHTTPHandler(func(*http.Request) *mcp.Server { return server }, nil))
	t.Cleanup(remote.Close)
	g := newFront(t, strings.TrimSuffix(servers("r", remote.URL), "}")+`, "gateway": {"sessions": "shared"}}`)
	for _, version := range []string{"2025-11-25", "2025-03-26"} { // the short way, and the SDK's
		client := mcp.NewClient(&mcp.Implementation{Name: "client", Version: "1"}, &mcp.ClientOptions{
			ElicitationHandler: func(ctx context.Context, _ *mcp.ElicitRequest) (*mcp.ElicitResult, error) {
				asked <- struct{}{}
				<-ctx.Done()
				takenBack <- struct{}{}
				return nil, ctx.Err()
			},
		})
		cs, err := client.Connect(t.Context(), &mcp.StreamableClientTransport{Endpoint: g.url + "/mcp"}, &mcp.ClientSessionOptions{ProtocolVersion: version})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { cs.Close() })
		result, err := cs.CallTool(t.Context(), &mcp.CallToolParams{Name: "r_ask", Arguments: map[string]any{}})
		if err != nil {
			t.Fatal(err)
		}
		if got := result.Content[0].(*mcp.TextContent).Text; !strings.Contains(got, "context canceled") {
			t.Errorf("%s: got %s", version, got)
		}
	}

	// A client of the modern era that has gone to ask its user finds the next
	// question, or the result, when it comes back.
	c := newPlainClient(t, g.url, "{}", true)
	first := modernCall(c, elicits, "r_ask", "")
	state, _ := first["requestState"].(string)
	if state == "" {
		t.Fatalf("got %v", first)
	}
	asked <- struct{}{}
	for waited := time.Now(); ; {
		g.parked.mu.Lock()
		held := len(g.parked.held)
		g.parked.mu.Unlock()
		if held == 0 {
			break
		}
		if time.Since(waited) > 3*time.Second {
			t.Fatal("the question is still kept")
		}
		runtime.Gosched()
	}
	takenBack <- struct{}{}
	if got := fmt.Sprint(modernCall(c, elicits, "r_ask", fmt.Sprintf(`,"requestState":%q,"inputResponses":{"1":{"action":"accept"}}`, state))); !strings.Contains(got, "context canceled") {
		t.Errorf("got %s", got)
	}
}

// TestTicketElsewhere: a ticket for a sign-in is good at every process that
// serves the same address with the same store; the remote never sees it.
func TestTicketElsewhere(t *testing.T) {
	dir := t.TempDir() + "/store"
	replica := func(address string) *Gateway {
		store, err := auth.OpenFile(auth.FileConfig{Dir: dir, Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { store.Close() })
		g := New(Setup{Config: &Config{}, PublicURL: address, Log: slog.New(slog.DiscardHandler), Sealer: store})
		t.Cleanup(g.Close)
		return g
	}
	c := caller{view: &view{principal: auth.Local}, modern: true}
	const params = `{"name":"r_t","arguments":{}}`
	issued, err := replica("https://gw").inputRequired(c, nil, &ticket{Remote: "r", Round: 1, Request: digest("tools/call", json.RawMessage(params))})
	if err != nil {
		t.Fatal(err)
	}
	var result struct{ RequestState string }
	if err := json.Unmarshal(issued, &result); err != nil {
		t.Fatal(err)
	}
	again := json.RawMessage(fmt.Sprintf(`{"name":"r_t","arguments":{},"requestState":%q,"inputResponses":{"gatehouse_sign_in":{"action":"accept"}}}`, result.RequestState))
	got, _, plain, err := replica("https://gw").resume(c, "tools/call", again)
	if err != nil || got.Remote != "r" || got.Round != 1 || string(plain) != params {
		t.Errorf("another replica: got %+v, %s, %v", got, plain, err)
	}
	for name, try := range map[string]struct {
		address   string
		principal auth.Principal
	}{
		"another gateway with this store": {"https://other", auth.Local},
		"another principal":               {"https://gw", auth.Principal{Issuer: "https://idp", Subject: "eve"}},
	} {
		got, _, plain, err := replica(try.address).resume(caller{view: &view{principal: try.principal}, modern: true}, "tools/call", again)
		if err != nil || !got.Foreign || got.Remote != "" || string(plain) != string(again) {
			t.Errorf("%s: got %+v, %s, %v", name, got, plain, err)
		}
	}
}
