package gateway

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/modelcontextprotocol/go-sdk/mcp"

	"gatehouse/auth/authtest"
)

// users is a gateway whose users are told apart, with an open remote.
type users struct {
	*inside
	idp    *authtest.AS
	remote *authtest.Remote
	t      *testing.T
}

func newUsers(t *testing.T, config string) *users {
	t.Helper()
	u := &users{idp: authtest.NewAS(t), remote: authtest.NewRemote(t, authtest.RemoteConfig{}), t: t}
	u.inside = newInsideFor(t, u.remote, config, u.idp)
	return u
}

func (u *users) connect(user, protocol string) *authtest.Client {
	u.t.Helper()
	return authtest.Connect(u.t, authtest.ClientConfig{URL: u.url + "/mcp", Protocol: protocol, NoStream: true, Token: u.idp.JWTFor(user, u.url+"/mcp", nil)})
}

// TestUsersLeave: the connections of a user are closed a while after they have
// left, not before, and are there again when they come back.
func TestUsersLeave(t *testing.T) {
	u := newUsers(t, oneRemote)
	views := func() int { _, n := u.left(); return n }
	rest := func(d time.Duration) int {
		u.forward.Add(int64(d))
		u.restIdle()
		return views()
	}
	alice := func() {
		resp := u.do(http.MethodPost, "/mcp", "alice", `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"r_echo","arguments":{"text":"hers"},"_meta":{`+shortEnvelope+`}}}`,
			http.Header{"Mcp-Protocol-Version": {"2026-07-28"}, "Mcp-Method": {"tools/call"}, "Mcp-Name": {"r_echo"}})
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil || !strings.Contains(string(body), "hers") {
			t.Errorf("%s %s %v", resp.Status, body, err)
		}
	}
	bob := u.connect("bob", authtest.ProtocolLegacy)
	alice()
	bob.Call("r_echo", nil)
	if n := rest(viewIdle / 2); n != 2 {
		t.Fatalf("%d users after a moment", n)
	}
	// Bob has a session; Alice's protocol has none.
	if n := rest(viewIdle); n != 1 {
		t.Errorf("%d users are held, want bob", n)
	}
	alice()
	if err := bob.Close(); err != nil {
		t.Fatal(err)
	}
	if n := rest(viewIdle + time.Second); n != 0 {
		t.Errorf("%d users are held, and nobody is there", n)
	}
	if n := sessions(u.remote); n != 0 {
		t.Errorf("%d MCP sessions at the remote are left", n)
	}

	// Whoever comes while others are being let go of is served.
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 50 {
				alice()
			}
		})
	}
	for range 50 {
		rest(viewIdle + time.Second)
	}
	wg.Wait()
}

// TestParkedUser: a user who takes minutes to answer finds their call where it
// was, and is not held once it is over.
func TestParkedUser(t *testing.T) {
	u := newUsers(t, oneRemote)
	u.remote.Server().AddTool(&mcp.Tool{Name: "ask", InputSchema: json.RawMessage(`{"type":"object"}`)},
		func(ctx context.Context, req *mcp.CallToolRequest) (*mcp.CallToolResult, error) {
			answer, err := req.Session.Elicit(ctx, &mcp.ElicitParams{Message: "Well?"})
			if err != nil {
				return nil, err
			}
			return &mcp.CallToolResult{Content: []mcp.Content{&mcp.TextContent{Text: answer.Action}}}, nil
		})
	call := func(members string) (result struct {
		ResultType, RequestState string
		Content                  []struct{ Text string }
	}) {
		t.Helper()
		resp := u.do(http.MethodPost, "/mcp", "alice", `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"r_ask","arguments":{}`+members+`,"_meta":{`+strings.Replace(shortEnvelope, `Capabilities":{}`, `Capabilities":`+elicits, 1)+`}}}`,
			http.Header{"Mcp-Protocol-Version": {"2026-07-28"}, "Mcp-Method": {"tools/call"}, "Mcp-Name": {"r_ask"}})
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		answer := struct{ Result any }{&result}
		if err := json.Unmarshal(body, &answer); err != nil {
			t.Fatalf("%v in %s", err, body)
		}
		return result
	}
	first := call("")
	u.forward.Add(int64(parkedLife / 2))
	u.restIdle()
	last := call(fmt.Sprintf(`,"requestState":%q,"inputResponses":{"1":{"action":"decline"}}`, first.RequestState))
	if len(last.Content) != 1 || last.Content[0].Text != "decline" {
		t.Errorf("asked with %+v, answered, got %+v", first, last)
	}
	u.forward.Add(int64(viewIdle + time.Second))
	u.restIdle()
	if _, views := u.left(); views != 0 {
		t.Errorf("%d users are held, and nobody is there", views)
	}
}

// do sends a request as a user; without one, without a token.
func (u *users) do(method, path, user, body string, header http.Header) *http.Response {
	u.t.Helper()
	req, err := http.NewRequestWithContext(u.t.Context(), method, u.url+path, strings.NewReader(body))
	if err != nil {
		u.t.Fatal(err)
	}
	req.Header = http.Header{"Content-Type": {"application/json"}, "Accept": {"application/json, text/event-stream"}}
	maps.Copy(req.Header, header)
	if user != "" {
		req.Header.Set("Authorization", "Bearer "+u.idp.JWTFor(user, u.url+"/mcp", nil))
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		u.t.Fatal(err)
	}
	return resp
}

// TestStreamEndsWithItsToken: who opened a stream has to show another token when
// that one has ended.
func TestStreamEndsWithItsToken(t *testing.T) {
	u := newUsers(t, oneRemote)
	soon := time.Now().Add(2 * time.Second).Truncate(time.Second)
	token := u.idp.JWTFor("alice", u.url+"/mcp", map[string]any{"exp": soon.Unix()})
	resp := u.do(http.MethodPost, "/mcp", "", `{"jsonrpc":"2.0","id":1,"method":"subscriptions/listen","params":{"notifications":{"toolsListChanged":true},"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientCapabilities":{}}}}`,
		http.Header{"Authorization": {"Bearer " + token}, "Mcp-Protocol-Version": {"2026-07-28"}, "Mcp-Method": {"subscriptions/listen"}})
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		t.Fatal(resp.Status)
	}
	said, err := io.ReadAll(resp.Body) // until the gateway ends it
	if now := time.Now(); now.Before(soon) || !strings.Contains(string(said), "acknowledged") {
		t.Errorf("ended %v before its token, with %v: %s", soon.Sub(now), err, said)
	}
}

// TestOldClientsOfUsers: the deprecated transport knows its users, too.
func TestOldClientsOfUsers(t *testing.T) {
	u := newUsers(t, `{"mcpServers": {"r": {"url": "http://127.0.0.1:1/mcp"}}, "gateway": {"sse": true}}`)
	for _, r := range []*http.Response{u.do(http.MethodGet, "/sse", "", "", nil), u.do(http.MethodPost, "/messages?session=x", "", "{}", nil)} {
		r.Body.Close()
		if r.StatusCode != http.StatusUnauthorized || r.Header.Get("WWW-Authenticate") == "" {
			t.Errorf("without a token: %s", r.Status)
		}
	}
	stream := u.do(http.MethodGet, "/sse", "alice", "", nil)
	defer stream.Body.Close()
	lines := bufio.NewScanner(stream.Body)
	endpoint := ""
	for endpoint == "" && lines.Scan() {
		endpoint, _ = strings.CutPrefix(lines.Text(), "data: ")
		if !strings.HasPrefix(endpoint, "/") {
			endpoint = ""
		}
	}
	const initialize = `{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2024-11-05","capabilities":{},"clientInfo":{"name":"old","version":"1"}}}`
	answer := func(path, user string) string {
		resp := u.do(http.MethodPost, path, user, initialize, nil)
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.Status + string(body)
	}
	if got, want := answer(endpoint, "bob"), answer("/messages?session=none", "bob"); got != want || !strings.HasPrefix(got, "404") {
		t.Errorf("another user's stream: %q, want %q", got, want)
	}
	if got := answer(endpoint, "alice"); !strings.HasPrefix(got, "202") {
		t.Errorf("her own: %s", got)
	}
	for lines.Scan() && !strings.Contains(lines.Text(), `"serverInfo"`) {
	}
	if !strings.Contains(lines.Text(), `"serverInfo"`) {
		t.Error("no answer on the stream")
	}
}
