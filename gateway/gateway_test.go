package gateway

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/modelcontextprotocol/go-sdk/mcp"
	"go.uber.org/goleak"

	"gatehouse/auth"
	"gatehouse/auth/authtest"
	"gatehouse/auth/guard"
	"gatehouse/auth/secret"
	"gatehouse/session"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// inside is a gateway in the test's own process, with one remote behind it.
type inside struct {
	*Gateway
	url      string
	forward  atomic.Int64   // how far its clock is ahead, in nanoseconds
	outgoing *guard.Clients // with which it dials
	store    *auth.Memory
}

// newInside builds a gateway in front of a remote; change may alter the config.
func newInside(t *testing.T, remote *authtest.Remote, config string) *inside {
	t.Helper()
	return newInsideFor(t, remote, config, nil)
}

// newInsideFor is newInside for the users of a provider, nil: for nobody.
func newInsideFor(t *testing.T, remote *authtest.Remote, config string, idp *authtest.AS) *inside {
	t.Helper()
	canary := authtest.NewCanary(t, remote)
	cfg, _, err := ParseConfig("test", []byte(config), func(string) (string, bool) { return "", false })
	if err != nil {
		t.Fatal(err)
	}
	clients, err := guard.New(guard.Config{})
	if err != nil {
		t.Fatal(err)
	}
	client := clients.Client(guard.Policy{Loopback: true})
	srv := httptest.NewUnstartedServer(nil)
	url := "http://" + srv.Listener.Addr().String()
	store := auth.NewMemory(auth.MemoryConfig{})
	conf := auth.Config{
		Remotes:   []auth.Remote{{Name: "r", URL: remote.URL, HTTP: client}},
		PublicURL: url, CallbackPath: "/oauth/callback", Store: store, Log: canary.Logger(),
	}
	if idp != nil {
		const key = "canary-cs-gatehouse"
		idp.AddClient(authtest.OAuthClient{ID: "gatehouse", Secret: key, Method: "client_secret_basic", RedirectURIs: []string{url + "/login/callback"}})
		cfg.Gateway.Login = &Login{Issuer: idp.Issuer(), ClientID: "gatehouse"}
		conf.Login = &auth.Login{Issuer: idp.Issuer(), ClientID: "gatehouse", ClientSecret: secret.New(key), Audience: url + "/mcp", HTTP: client}
	}
	broker, err := auth.New(conf)
	if err != nil {
		t.Fatal(err)
	}
	pool := session.New(session.Config{
		MaxSessions: cfg.Gateway.Limits.Sessions,
		Remotes: []session.Remote{{Name: "r", URL: remote.URL, HTTP: client, Authorizer: func(p auth.Principal) session.Authorizer {
			return broker.Authorizer(p, "r")
		}}},
		Name: "gatehouse", Version: "test", Log: canary.Logger(),
	})
	in := &inside{url: url, outgoing: clients, store: store}
	g := New(Setup{
		Config: cfg, Users: idp != nil, Auth: broker, Sessions: pool, PublicURL: url, Version: "test", Log: canary.Logger(),
		Now: func() time.Time { return time.Now().Add(time.Duration(in.forward.Load())) },
	})
	in.Gateway = g
	srv.Config = NewServer(context.WithoutCancel(t.Context()), g.Handler(), canary.Logger())
	srv.Start()
	t.Cleanup(func() {
		g.Close()
		g.Close() // twice is safe
		srv.Close()
		pool.Close()
		broker.Close()
		clients.Close()
		if err := store.Close(); err != nil {
			t.Error(err)
		}
	})
	return in
}

const oneRemote = `{"mcpServers": {"r": {"url": "http://127.0.0.1:1/mcp"}}}`

// left returns what the gateway still holds for clients.
func (g *inside) left() (clients, views int) {
	g.clients.mu.Lock()
	clients = len(g.clients.byID)
	g.clients.mu.Unlock()
	g.mu.Lock()
	defer g.mu.Unlock()
	return clients, len(g.views)
}

// TestNothingIsLeft: sessions that end, or that never began, leave nothing.
func TestNothingIsLeft(t *testing.T) {
	remote := authtest.NewRemote(t, authtest.RemoteConfig{})
	g := newInside(t, remote, oneRemote)
	for range 20 {
		client := authtest.Legacy(t, g.url+"/mcp")
		client.Tools()
		if err := client.Close(); err != nil {
			t.Fatal(err)
		}
	}
	for _, body := range []string{
		`{"jsonrpc":"2.0","id":1,"method":"initialize"}`,
		`{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":7}}`,
		`{"jsonrpc":"2.0","method":"initialize","params":{}}`,
	} {
		req := httptest.NewRequestWithContext(t.Context(), http.MethodPost, g.url+"/mcp", strings.NewReader(body))
		req.Header.Set("Content-Type", "application/json")
		req.Header.Set("Accept", "application/json, text/event-stream")
		w := httptest.NewRecorder()
		g.Handler().ServeHTTP(w, req)
		if strings.Contains(w.Body.String(), `"result"`) {
			t.Errorf("%s was accepted: %s", body, w.Body)
		}
	}
	if clients, views := g.left(); clients != 0 || views != 0 {
		t.Errorf("%d clients and %d views are left", clients, views)
	}
}

// TestIdleAndFull: who is silent for long makes room; who has a stream stays.
func TestIdleAndFull(t *testing.T) {
	remote := authtest.NewRemote(t, authtest.RemoteConfig{})
	g := newInside(t, remote, `{"mcpServers": {"r": {"url": "http://127.0.0.1:1/mcp"}}, "gateway": {"limits": {"sessions": 3}}}`)
	connect := func(noStream bool) (*authtest.Client, error) {
		return authtest.TryConnect(t, authtest.ClientConfig{URL: g.url + "/mcp", NoStream: noStream})
	}
	first, err := connect(true)
	if err != nil {
		t.Fatal(err)
	}
	var streams []*authtest.Client
	for range 2 {
		c, err := connect(false)
		if err != nil {
			t.Fatal(err)
		}
		c.Tools()
		streams = append(streams, c)
	}
	third, err := connect(false)
	if err != nil {
		t.Fatalf("no room was made: %v", err)
	}
	streams = append(streams, third)
	if _, err := first.ListTools(t.Context(), nil); err == nil {
		t.Error("the silent session still serves, so four do, where three may")
	}
	if _, err := connect(true); err == nil {
		t.Error("a fourth session began while three have a stream open")
	}
	for _, c := range streams {
		c.Tools()
	}

	// Four hours later those without a stream are gone.
	g.forward.Store(int64(clientIdle + time.Minute))
	g.clients.mu.Lock()
	for _, cl := range g.clients.byID {
		if cl.active == 0 {
			t.Error("a session with an open stream counts as idle")
		}
		cl.active = 0
	}
	g.clients.mu.Unlock()
	if n := len(g.clients.idle()); n != 3 {
		t.Errorf("%d of 3 sessions are idle", n)
	}
	g.clients.mu.Lock()
	for _, cl := range g.clients.byID {
		cl.active = 1
	}
	g.clients.mu.Unlock()
}

// TestManyAtOnce: clients that come at the same time do not get past the limit.
func TestManyAtOnce(t *testing.T) {
	remote := authtest.NewRemote(t, authtest.RemoteConfig{})
	for _, sessions := range []string{"isolated", "shared"} {
		g := newInside(t, remote, `{"mcpServers": {"r": {"url": "http://127.0.0.1:1/mcp"}}, "gateway": {"sessions": "`+sessions+`", "limits": {"sessions": 3}}}`)
		for range 3 {
			var coming sync.WaitGroup
			for range 20 {
				coming.Go(func() {
					req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, g.url+"/mcp", strings.NewReader(`{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-11-25","capabilities":{},"clientInfo":{"name":"raw","version":"1"}}}`))
					if err != nil {
						t.Error(err)
						return
					}
					req.Header.Set("Content-Type", "application/json")
					req.Header.Set("Accept", "application/json, text/event-stream")
					resp, err := http.DefaultClient.Do(req)
					if err != nil {
						t.Error(err)
						return
					}
					defer resp.Body.Close()
					if _, err := io.Copy(io.Discard, resp.Body); err != nil { // until it is served
						t.Error(err)
					}
				})
			}
			coming.Wait()
		}
		if n, _ := g.left(); n != 3 {
			t.Errorf("%s: %d sessions, where three may be", sessions, n)
		}
	}
	http.DefaultClient.CloseIdleConnections()
}

// TestSignOutThatFails: who could not be signed out is told what is left.
func TestSignOutThatFails(t *testing.T) {
	as := authtest.NewAS(t)
	g := newInside(t, authtest.NewRemote(t, authtest.RemoteConfig{AS: as}), oneRemote)
	client := authtest.Legacy(t, g.url+"/mcp")
	signIn(t, client)
	if err := g.store.Close(); err != nil {
		t.Fatal(err)
	}
	result := client.Call("gateway_logout", map[string]any{"remote": "r"})
	if say := authtest.Text(result); !result.IsError || strings.Contains(say, "signed out") || !strings.Contains(say, "its tokens are revoked") {
		t.Errorf("error %v: %s", result.IsError, say)
	}
	if access, refresh := as.Live(); access != 0 || refresh != 0 {
		t.Errorf("%d access and %d refresh tokens are live", access, refresh)
	}
}

// TestSignOutOfARefusedGrant: what a remote refuses at the moment is a sign-in at
// its issuer all the same.
func TestSignOutOfARefusedGrant(t *testing.T) {
	as := authtest.NewAS(t)
	remote := authtest.NewRemote(t, authtest.RemoteConfig{AS: as})
	g := newInside(t, remote, oneRemote)
	client := authtest.Legacy(t, g.url+"/mcp")
	signIn(t, client)
	remote.Set(func(k *authtest.RemoteKnobs) { k.Audience = "https://other.example" })
	if result := client.Call("r_echo", nil); result.Meta[metaAuthRequired] == nil {
		t.Fatalf("the remote takes the token: %s", authtest.Text(result))
	}
	if say := authtest.Text(client.Call("gateway_logout", map[string]any{"issuer": as.Issuer()})); !strings.Contains(say, "r: signed out; the tokens are revoked") {
		t.Errorf("logout: %s", say)
	}
	if access, refresh := as.Live(); access != 0 || refresh != 0 {
		t.Errorf("%d access and %d refresh tokens are live", access, refresh)
	}
}

// signIn signs in to the remote r.
func signIn(t *testing.T, client *authtest.Client) {
	t.Helper()
	required, _ := client.Call("r_echo", nil).Meta[metaAuthRequired].(map[string]any)
	url, _ := required["auth_url"].(string)
	authtest.NewBrowser(t).Open(url)
	if result := client.Call("r_echo", map[string]any{"text": "in"}); authtest.Text(result) != "in" {
		t.Fatalf("not signed in: %s", authtest.Text(result))
	}
}

// TestAwaitSignIn: whoever waits for a sign-in is told when its link is gone, but
// not by a store that cannot be read for the moment.
func TestAwaitSignIn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		clients, err := guard.New(guard.Config{})
		if err != nil {
			t.Fatal(err)
		}
		defer clients.Close()
		store := auth.NewMemory(auth.MemoryConfig{})
		broker, err := auth.New(auth.Config{
			Remotes:   []auth.Remote{{Name: "r", URL: "https://r.example/mcp", HTTP: clients.Client(guard.Policy{})}},
			PublicURL: "http://127.0.0.1:8080", CallbackPath: "/oauth/callback", Store: store, Log: slog.New(slog.DiscardHandler),
		})
		if err != nil {
			t.Fatal(err)
		}
		defer broker.Close()
		g := &Gateway{auth: broker}
		if err := g.awaitSignIn(t.Context(), auth.Local, "r"); !errors.Is(err, auth.ErrFlowUnknown) {
			t.Errorf("without a link: %v", err)
		}
		if err := store.Close(); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if err := g.awaitSignIn(ctx, auth.Local, "r"); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("without the store: %v", err)
		}
	})
}

// TestDrain: a call in flight finishes, a new session is refused.
func TestDrain(t *testing.T) {
	remote := authtest.NewRemote(t, authtest.RemoteConfig{})
	gate, called := make(chan struct{}), make(chan struct{})
	remote.Set(func(k *authtest.RemoteKnobs) {
		k.Call = func(ctx context.Context, tool string, _ json.RawMessage) (json.RawMessage, error) {
			close(called)
			<-gate
			return nil, nil
		}
	})
	g := newInside(t, remote, oneRemote)
	client := authtest.Legacy(t, g.url+"/mcp")
	answered := make(chan *mcp.CallToolResult, 1)
	go func() { answered <- client.Call("r_echo", map[string]any{"text": "slow"}) }()
	<-called
	drained := make(chan struct{})
	go func() {
		defer close(drained)
		g.Drain(t.Context())
	}()
	for { // until the drain has begun
		w := httptest.NewRecorder()
		g.Handler().ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, g.url+"/readyz", nil))
		if w.Code == http.StatusServiceUnavailable {
			break
		}
	}
	if _, err := authtest.TryConnect(t, authtest.ClientConfig{URL: g.url + "/mcp"}); err == nil {
		t.Error("a session began while draining")
	}
	close(gate)
	if result := <-answered; authtest.Text(result) != "slow" {
		t.Errorf("the call in flight got %s", authtest.Text(result))
	}
	<-drained
}

// TestDrainEnds: a call that takes longer than the drain is told why it ends.
func TestDrainEnds(t *testing.T) {
	remote := authtest.NewRemote(t, authtest.RemoteConfig{})
	gate, called := make(chan struct{}), make(chan struct{})
	defer close(gate)
	remote.Set(func(k *authtest.RemoteKnobs) {
		k.Call = func(context.Context, string, json.RawMessage) (json.RawMessage, error) {
			close(called)
			<-gate
			return nil, nil
		}
	})
	g := newInside(t, remote, oneRemote)
	client := authtest.Legacy(t, g.url+"/mcp")
	answered := make(chan *mcp.CallToolResult, 1)
	go func() { answered <- client.Call("r_echo", nil) }()
	<-called
	over, cancel := context.WithCancel(t.Context())
	cancel()
	g.Drain(over)
	if result := <-answered; !result.IsError || !strings.Contains(authtest.Text(result), "shutting down") {
		t.Errorf("the call got %s", authtest.Text(result))
	}
}

// TestDeleteEndsCalls: a client that ends its session is not kept waiting for
// the calls that it gives up with it.
func TestDeleteEndsCalls(t *testing.T) {
	remote := authtest.NewRemote(t, authtest.RemoteConfig{})
	gate, called := make(chan struct{}), make(chan struct{})
	defer close(gate)
	remote.Set(func(k *authtest.RemoteKnobs) {
		k.Call = func(context.Context, string, json.RawMessage) (json.RawMessage, error) {
			close(called)
			<-gate
			return nil, nil
		}
	})
	g := newInside(t, remote, oneRemote)
	client := authtest.Legacy(t, g.url+"/mcp")
	answered := make(chan error, 1)
	go func() {
		result, err := client.CallTool(t.Context(), &mcp.CallToolParams{Name: "r_echo"})
		if err == nil && result.IsError {
			err = errors.New(authtest.Text(result)) // the session was gone before the call knew
		}
		answered <- err
	}()
	<-called
	req, err := http.NewRequestWithContext(t.Context(), http.MethodDelete, g.url+"/mcp", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Mcp-Session-Id", client.ID())
	resp, err := http.DefaultClient.Do(req) // the remote's gate is still shut
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusNoContent {
		t.Errorf("DELETE: %s", resp.Status)
	}
	if err := <-answered; err == nil {
		t.Error("the call that was given up has a result")
	}
	if clients, views := g.left(); clients != 0 || views != 0 {
		t.Errorf("%d clients and %d views are left", clients, views)
	}
}

// TestPanicCostsOneCall: the process lives, the client gets an error.
func TestPanicCostsOneCall(t *testing.T) {
	remote := authtest.NewRemote(t, authtest.RemoteConfig{})
	g := newInside(t, remote, oneRemote)
	handler := g.recoverPanics(func(context.Context, string, mcp.Request) (mcp.Result, error) { panic("boom") })
	if _, err := handler(t.Context(), "tools/call", nil); err == nil || strings.Contains(err.Error(), "boom") {
		t.Errorf("got %v", err)
	}
}

// TestIdleSession: what a client that has called once and is silent now costs in
// live memory, its own and the remote's side in this process included. What its
// remotes list it shares with all who see the same.
func TestIdleSession(t *testing.T) {
	var tools []string
	for i := range 200 {
		tools = append(tools, fmt.Sprintf(`{"name":"tool-%d","description":%q,"inputSchema":{"type":"object"}}`, i, strings.Repeat("x", 500)))
	}
	remote := newPlainRemote(t, `{"tools":{}}`, map[string]string{"tools/list": `{"tools":[` + strings.Join(tools, ",") + `]}`, "tools/call": `{"content":[]}`})
	g := newFront(t, servers("r", remote.URL))
	sessions := func(n int) {
		for range n {
			c := newPlainClient(t, g.url, `{"roots":{},"elicitation":{}}`, false)
			c.call("tools/call", `"name":"r_tool-1","arguments":{}`)
		}
	}
	live := func() int {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return int(m.HeapAlloc + m.StackInuse)
	}
	sessions(50)
	before := live()
	sessions(500)
	each := (live() - before) / 500
	t.Logf("%d bytes for each", each)
	// The list alone has 120 KB.
	if most := bytesWithin(20_000); each > most {
		t.Errorf("%d bytes for each, which is more than %d", each, most)
	}
}

// raceDetector is true in builds with the race detector, which allocate more.
var raceDetector bool

// bytesWithin is a bound of what is allocated, as it is in this build.
func bytesWithin(n int) int {
	if raceDetector {
		return 3 * n
	}
	return n
}

// TestCallAllocates: what is allocated for a call, its client and its remote in this
// process included. By the long way it would be ten times as much.
func TestCallAllocates(t *testing.T) {
	remote := newPlainRemote(t, `{"tools":{}}`, map[string]string{
		"tools/list": `{"tools":[{"name":"t","inputSchema":{"type":"object"}}]}`, "tools/call": `{"content":[{"type":"text","text":"fifty bytes"}]}`,
	})
	g := newFront(t, servers("r", remote.URL))
	for _, modern := range []bool{false, true} {
		c := newPlainClient(t, g.url, "{}", modern)
		c.bare = true
		params := `"name":"r_t","arguments":{}`
		if modern {
			params += `,"_meta":{` + shortEnvelope + `}`
		}
		calls := func(n int) {
			for range n {
				if got := c.call("tools/call", params); !strings.Contains(got, "fifty bytes") {
					t.Fatal(got)
				}
			}
		}
		calls(50) // what is made once is made now
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		calls(500)
		runtime.ReadMemStats(&after)
		each := int(after.TotalAlloc-before.TotalAlloc) / 500
		t.Logf("modern %v: %d bytes for each", modern, each)
		if most := bytesWithin(40_000); each > most {
			t.Errorf("modern %v: %d bytes for each, which is more than %d", modern, each, most)
		}
	}
}

// TestDescribe: the status is one readable line, whatever its parts end with.
func TestDescribe(t *testing.T) {
	for want, s := range map[string]remoteStatus{
		`unavailable; last problem: r cannot be started: is its "cwd" there? It is tried again.`: {
			Status: "unavailable", LastError: `r cannot be started: is its "cwd" there?`, Advice: "It is tried again."},
		"unavailable; last problem: r is down. It is tried again.": {
			Status: "unavailable", LastError: "r is down.", Advice: "It is tried again."},
		"sign-in needed; last problem: who? Sign in here: http://x": {Status: "auth_required", LastError: "who?", AuthURL: "http://x"},
		"disabled": {Status: "disabled"},
	} {
		if got := describe(s, time.Now()); got != want {
			t.Errorf("got  %s\nwant %s", got, want)
		}
	}
}

// TestFromElsewhere: what is for this machine alone is not had by a Host header
// that says that one is on it.
func TestFromElsewhere(t *testing.T) {
	g := newInside(t, authtest.NewRemote(t, authtest.RemoteConfig{}), oneRemote)
	for peer, want := range map[string]int{"127.0.0.1:5": http.StatusOK, "[::1]:5": http.StatusOK, "192.0.2.1:5": http.StatusForbidden, "10.0.0.1:5": http.StatusForbidden} {
		for _, path := range []string{"/metrics", "/"} {
			r := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "http://localhost"+path, nil)
			r.RemoteAddr = peer
			w := httptest.NewRecorder()
			g.Handler().ServeHTTP(w, r)
			if w.Code != want {
				t.Errorf("%s from %s: %d, want %d", path, peer, w.Code, want)
			}
		}
	}
}

// TestProbes: supervisors reach what is for them by any name, and nothing else.
func TestProbes(t *testing.T) {
	g := newInside(t, authtest.NewRemote(t, authtest.RemoteConfig{}), oneRemote)
	for path, want := range map[string]int{"/healthz": http.StatusOK, "/readyz": http.StatusOK, "/readyz/": http.StatusForbidden, "/metrics": http.StatusForbidden, "/": http.StatusForbidden} {
		w := httptest.NewRecorder()
		g.Handler().ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "http://10.1.2.3:8080"+path, nil))
		if w.Code != want {
			t.Errorf("%s: %d, want %d", path, w.Code, want)
		}
	}
}
