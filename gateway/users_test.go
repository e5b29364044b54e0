package gateway

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"runtime"
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
		resp := u.call("alice")
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

// TestUsersLeaveWithoutAWord: most clients do not end their session. A minute after
// its event stream has gone, or a quarter of an hour after the last request of one
// that had none, nothing is held open for it; it can come back as if nothing was.
func TestUsersLeaveWithoutAWord(t *testing.T) {
	u := newUsers(t, oneRemote)
	// at has so much time pass, and returns how many MCP sessions the remote has then.
	at := func(d time.Duration, want int) (got int) {
		u.forward.Add(int64(d))
		u.restIdle()
		for began := time.Now(); time.Since(began) < 5*time.Second; runtime.Gosched() { // they end in the background
			if got = sessions(u.remote); got == want {
				break
			}
		}
		return got
	}
	alice, bob := u.connect("alice", authtest.ProtocolLegacy), u.connect("bob", authtest.ProtocolLegacy)
	ctx, closeStream := context.WithCancel(t.Context())
	defer closeStream()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.url+"/mcp", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header = http.Header{"Accept": {"text/event-stream"}, "Authorization": {"Bearer " + u.idp.JWTFor("alice", u.url+"/mcp", nil)},
		"Mcp-Session-Id": {alice.ID()}, "Mcp-Protocol-Version": {"2025-11-25"}}
	stream, err := http.DefaultClient.Do(req)
	if err != nil || stream.StatusCode != http.StatusOK {
		t.Fatal(stream, err)
	}
	defer stream.Body.Close()
	alice.Call("r_echo", nil)
	bob.Call("r_echo", nil)
	if n := at(10*time.Minute, 2); n != 2 {
		t.Fatalf("%d are connected, one with a stream, one that was there a moment ago", n)
	}
	closeStream()
	for active := 1; active > 0; runtime.Gosched() {
		u.clients.mu.Lock()
		active = u.clients.byID[alice.ID()].active
		u.clients.mu.Unlock()
	}
	if n := at(streamGone/2, 2); n != 2 {
		t.Errorf("%d are connected half a minute after the stream has gone", n)
	}
	if n := at(streamGone/2, 1); n != 1 {
		t.Errorf("%d are connected a minute after the stream has gone", n)
	}
	if n := at(silentFor, 0); n != 0 {
		t.Errorf("%d are connected, and nobody is there", n)
	}
	if clients, views := u.left(); clients != 2 || views != 2 {
		t.Errorf("%d sessions of clients and %d views are left, want both", clients, views)
	}
	for _, client := range []*authtest.Client{alice, bob} {
		if got := authtest.Text(client.Call("r_echo", map[string]any{"text": "again"})); got != "again" {
			t.Errorf("come back: %s", got)
		}
	}
	if n := sessions(u.remote); n != 2 {
		t.Errorf("%d are connected, and both are there", n)
	}
	// One that comes while its connections are being closed has them opened again.
	u.clients.mu.Lock()
	v := u.clients.byID[alice.ID()].view
	u.clients.mu.Unlock()
	v.rest()
	for began := time.Now(); !v.session.Catalogs(atOnce)[0].Connected; runtime.Gosched() {
		if time.Since(began) > 5*time.Second {
			t.Fatal("the connections of one that is there stay closed")
		}
	}
}

// call is a tools/call of the modern era, as a user.
func (u *users) call(user string) *http.Response {
	u.t.Helper()
	return u.do(http.MethodPost, "/mcp", user, `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"r_echo","arguments":{"text":"hers"},"_meta":{`+shortEnvelope+`}}}`,
		http.Header{"Mcp-Protocol-Version": {"2026-07-28"}, "Mcp-Method": {"tools/call"}, "Mcp-Name": {"r_echo"}})
}

// TestFullHouse: where as many users are served as may be, another one is told
// to come back, in either era.
func TestFullHouse(t *testing.T) {
	u := newUsers(t, `{"mcpServers": {"r": {"url": "http://127.0.0.1:1/mcp"}}, "gateway": {"limits": {"sessions": 1}}}`)
	if resp := u.call("alice"); resp.Body.Close() != nil || resp.StatusCode != http.StatusOK {
		t.Fatal(resp.Status)
	}
	for what, resp := range map[string]*http.Response{"modern": u.call("bob"),
		"legacy": u.do(http.MethodPost, "/mcp", "bob", `{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-11-25","capabilities":{},"clientInfo":{"name":"raw","version":"1"}}}`, nil)} {
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || resp.StatusCode != http.StatusTooManyRequests || resp.Header.Get("Retry-After") != "60" || !strings.Contains(string(body), "gateway.limits.sessions") {
			t.Errorf("%s: %s, Retry-After %q, %s", what, resp.Status, resp.Header.Get("Retry-After"), body)
		}
	}
	scraped := httptest.NewRecorder()
	u.metrics.Handler().ServeHTTP(scraped, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/metrics", nil))
	if want := `gatehouse_limits_hit_total{limit="sessions"} 2`; !strings.Contains(scraped.Body.String(), want) {
		t.Errorf("the metrics lack %s", want)
	}
}

// TestRoomOfOwn: who opens session after session gives up their own for it, not
// that of another user, however long that one has been silent.
func TestRoomOfOwn(t *testing.T) {
	u := newUsers(t, `{"mcpServers": {"r": {"url": "http://127.0.0.1:1/mcp"}}, "gateway": {"limits": {"sessions": 5}}}`)
	bob := u.connect("bob", authtest.ProtocolLegacy)
	var hers []*authtest.Client
	for range 10 {
		u.forward.Add(int64(time.Second))
		hers = append(hers, u.connect("alice", authtest.ProtocolLegacy))
	}
	lives := func(user, id string) bool {
		resp := u.do(http.MethodPost, "/mcp", user, `{"jsonrpc":"2.0","id":9,"method":"tools/list"}`, http.Header{"Mcp-Session-Id": {id}, "Mcp-Protocol-Version": {"2025-11-25"}})
		resp.Body.Close()
		return resp.StatusCode == http.StatusOK
	}
	if !lives("bob", bob.ID()) {
		t.Error("alice's sessions have ended bob's")
	}
	if lives("alice", hers[5].ID()) || !lives("alice", hers[6].ID()) {
		t.Error("of hers it is not the oldest that have ended")
	}
}

// TestStreamsOfOne: one user holds so many event streams open and no more, of
// whichever kind, and others have theirs.
func TestStreamsOfOne(t *testing.T) {
	u := newUsers(t, `{"mcpServers": {"r": {"url": "http://127.0.0.1:1/mcp"}}, "gateway": {"sse": true}}`)
	listen := func(user string) *http.Response {
		resp := u.do(http.MethodPost, "/mcp", user, `{"jsonrpc":"2.0","id":1,"method":"subscriptions/listen","params":{"notifications":{"toolsListChanged":true},"_meta":{`+shortEnvelope+`}}}`,
			http.Header{"Mcp-Protocol-Version": {"2026-07-28"}, "Mcp-Method": {"subscriptions/listen"}})
		t.Cleanup(func() { resp.Body.Close() })
		return resp
	}
	old := func(user string) *http.Response {
		resp := u.do(http.MethodGet, "/sse", user, "", nil)
		t.Cleanup(func() { resp.Body.Close() })
		return resp
	}
	refused := func(what string, resp *http.Response) {
		t.Helper()
		if resp.StatusCode != http.StatusTooManyRequests || resp.Header.Get("Retry-After") == "" {
			t.Errorf("%s: %s, Retry-After %q", what, resp.Status, resp.Header.Get("Retry-After"))
		}
	}
	alice := u.connect("alice", authtest.ProtocolLegacy)
	var last *http.Response
	for range maxStreams {
		if last = listen("alice"); last.StatusCode != http.StatusOK {
			t.Fatal(last.Status)
		}
		if resp := old("alice"); resp.StatusCode != http.StatusOK {
			t.Fatal(resp.Status)
		}
	}
	refused("one too many", listen("alice"))
	refused("of the deprecated transport", old("alice"))
	stream := http.Header{"Mcp-Session-Id": {alice.ID()}, "Mcp-Protocol-Version": {"2025-11-25"}}
	resp := u.do(http.MethodGet, "/mcp", "alice", "", stream)
	resp.Body.Close()
	refused("of a session", resp)
	for _, resp := range []*http.Response{listen("bob"), old("bob")} {
		if resp.StatusCode != http.StatusOK {
			t.Errorf("another user's: %s", resp.Status)
		}
	}
	last.Body.Close()
	for again := time.Now(); ; runtime.Gosched() { // until the gateway has noticed
		resp := u.do(http.MethodGet, "/mcp", "alice", "", stream)
		resp.Body.Close()
		if resp.StatusCode == http.StatusOK {
			break
		}
		if time.Since(again) > 10*time.Second {
			t.Fatalf("in the place of one that has ended: %s", resp.Status)
		}
	}
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

// TestMadeUpBearers: whoever makes tokens up has the provider asked about some of
// them, and does not keep those out who have good ones, nor another address.
func TestMadeUpBearers(t *testing.T) {
	u := newUsers(t, `{"mcpServers": {"r": {"url": "http://127.0.0.1:1/mcp"}}, "gateway": {"trustedProxies": ["127.0.0.0/8"]}}`)
	const initialize = `{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-11-25","capabilities":{},"clientInfo":{"name":"raw","version":"1"}}}`
	status := func(token, from string) int {
		resp := u.do(http.MethodPost, "/mcp", "", initialize, http.Header{"Authorization": {"Bearer " + token}, "X-Forwarded-For": {from}})
		resp.Body.Close()
		return resp.StatusCode
	}
	const here, elsewhere = "198.51.100.2", "198.51.100.3"
	bob := u.idp.Mint("bob", u.url+"/mcp")
	if got := status(bob, here); got != http.StatusOK {
		t.Fatal(got)
	}
	asked := u.idp.Count(authtest.EndpointIntrospect)
	for i := range 2 * askedPerMinute {
		if got := status(fmt.Sprint("made-up-", i), here); got != http.StatusUnauthorized {
			t.Fatal(got)
		}
	}
	if n := u.idp.Count(authtest.EndpointIntrospect) - asked; n != askedPerMinute {
		t.Errorf("the provider was asked %d times, want %d", n, askedPerMinute)
	}
	if got := status(bob, here); got != http.StatusOK {
		t.Errorf("a good token from the same address: %d", got)
	}
	alice := u.idp.Mint("alice", u.url+"/mcp")
	if got := status(alice, here); got != http.StatusUnauthorized {
		t.Errorf("one that nobody knows, from there: %d", got)
	}
	if got := status(alice, elsewhere); got != http.StatusOK {
		t.Errorf("the same from another address: %d", got)
	}
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

// TestStreamOutlivesALook: a stream goes on while the provider vouches for its
// token, however often it has to be asked, and no longer.
func TestStreamOutlivesALook(t *testing.T) {
	u := newUsers(t, oneRemote)
	looks := make(chan bool, 100)
	u.idp.Set(func(k *authtest.ASKnobs) {
		k.Introspect = authtest.EditJSON(func(doc map[string]any) {
			doc["exp"] = time.Now().Add(1500 * time.Millisecond).Unix()
			looks <- true
		})
	})
	token := u.idp.Mint("alice", u.url+"/mcp")
	resp := u.do(http.MethodPost, "/mcp", "", `{"jsonrpc":"2.0","id":1,"method":"subscriptions/listen","params":{"notifications":{"toolsListChanged":true},"_meta":{`+shortEnvelope+`}}}`,
		http.Header{"Authorization": {"Bearer " + token}, "Mcp-Protocol-Version": {"2026-07-28"}, "Mcp-Method": {"subscriptions/listen"}})
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		t.Fatal(resp.Status)
	}
	ended := make(chan error, 1)
	go func() {
		_, err := io.Copy(io.Discard, resp.Body)
		ended <- err
	}()
	for range 3 {
		select {
		case <-looks:
		case err := <-ended:
			t.Fatalf("it has ended while its token was good: %v", err)
		}
	}
	u.idp.Set(func(k *authtest.ASKnobs) { k.Introspect = authtest.Answer(200, "application/json", `{"active":false}`) })
	<-ended
}

// TestListsAreOnesOwn: what a list holds depends on who asks, so nobody may keep it
// for others, whatever the remote says of its part; without users and sign-ins
// that is the remote's to say.
func TestListsAreOnesOwn(t *testing.T) {
	const list = `{"jsonrpc":"2.0","id":1,"method":"tools/list","params":{"_meta":{` + shortEnvelope + `}}}`
	public := func(remote *authtest.Remote) {
		remote.Set(func(k *authtest.RemoteKnobs) {
			k.List = func(string) json.RawMessage {
				return json.RawMessage(`{"tools":[{"name":"plan","inputSchema":{"type":"object"}}],"resultType":"complete","ttlMs":60000,"cacheScope":"public"}`)
			}
		})
	}
	says := func(in *inside, want string, header http.Header) {
		t.Helper()
		u := &users{inside: in, t: t}
		header["Mcp-Protocol-Version"], header["Mcp-Method"] = []string{"2026-07-28"}, []string{"tools/list"}
		resp := u.do(http.MethodPost, "/mcp", "", list, header)
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil || !strings.Contains(string(body), "r_plan") || !strings.Contains(string(body), `"cacheScope":"`+want+`"`) {
			t.Errorf("want %s: %s %v", want, body, err)
		}
	}
	u := newUsers(t, `{"mcpServers": {"r": {"url": "http://127.0.0.1:1/mcp", "auth": {"type": "none"}}}}`)
	public(u.remote)
	says(u.inside, "private", http.Header{"Authorization": {"Bearer " + u.idp.JWTFor("alice", u.url+"/mcp", nil)}})
	for auth, want := range map[string]string{"oauth": "private", "none": "public"} {
		remote := authtest.NewRemote(t, authtest.RemoteConfig{})
		public(remote)
		says(newInside(t, remote, `{"mcpServers": {"r": {"url": "http://127.0.0.1:1/mcp", "auth": {"type": "`+auth+`"}}}}`), want, http.Header{})
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
