package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/modelcontextprotocol/go-sdk/mcp"

	"gatehouse/auth/authtest"
)

// world is one protected remote, its authorization server, and the gateway in
// front, run as the real binary. No log may hold a secret of theirs.
type world struct {
	as     *authtest.AS
	remote *authtest.Remote
	gw     *process
	canary *authtest.Canary
}

// newWorld starts all three; gateway is the config's "gateway" object.
func newWorld(t *testing.T, gateway string) *world {
	t.Helper()
	w := &world{as: authtest.NewAS(t)}
	w.remote = authtest.NewRemote(t, authtest.RemoteConfig{AS: w.as})
	w.gw = startServe(t, config(gateway, "notes", w.remote.URL))
	w.guardSecrets(t)
	return w
}

// guardSecrets searches everything that the gateway logged when the test ends.
func (w *world) guardSecrets(t *testing.T) {
	w.canary = authtest.NewCanary(t, w.as, w.remote)
	t.Cleanup(func() {
		w.gw.end()
		fmt.Fprint(w.canary, w.gw.output())
	})
}

// config is a config with remotes given as name, URL, name, URL, …
func config(gateway string, remotes ...string) string {
	servers := &strings.Builder{}
	for i := 0; i < len(remotes); i += 2 {
		if i > 0 {
			servers.WriteString(",\n")
		}
		fmt.Fprintf(servers, "%q: {\"url\": %q}", remotes[i], remotes[i+1])
	}
	if gateway == "" {
		gateway = "{}"
	}
	return fmt.Sprintf("{\"mcpServers\": {%s}, \"gateway\": %s}", servers, gateway)
}

// asked returns the JSON by which a result asks for a sign-in, zero if it does not.
func asked(result *mcp.CallToolResult) (required authtest.AuthRequired) {
	for _, content := range result.Content {
		if text, ok := content.(*mcp.TextContent); ok && json.Unmarshal([]byte(text.Text), &required) == nil {
			return required
		}
	}
	return required
}

// link asserts that a result asks for a sign-in, in the form that is promised,
// and returns the link.
func link(t *testing.T, result *mcp.CallToolResult, remote string) string {
	t.Helper()
	required := asked(result)
	if required.Status != "auth_required" || required.ServerName != remote || required.Message == "" {
		t.Fatalf("the result asks for no sign-in at %s: %s", remote, authtest.Text(result))
	}
	first, ok := result.Content[0].(*mcp.TextContent)
	if !ok || !strings.Contains(first.Text, required.AuthURL) || strings.HasPrefix(first.Text, "{") {
		t.Errorf("the first content is not a sentence with the link in it: %v", result.Content[0])
	}
	var second map[string]string
	if err := json.Unmarshal([]byte(result.Content[1].(*mcp.TextContent).Text), &second); err != nil || second["auth_url"] != required.AuthURL {
		t.Errorf("the second content is not the JSON: %v", result.Content[1])
	}
	if meta, ok := result.Meta["gatehouse/auth_required"].(map[string]any); !ok || meta["auth_url"] != required.AuthURL {
		t.Errorf("_meta = %v", result.Meta)
	}
	if result.StructuredContent != nil {
		t.Error("the result has structuredContent, which would have to fit the tool's outputSchema")
	}
	return required.AuthURL
}

// echo calls the remote's echo tool and wants its answer.
func echo(t *testing.T, c *authtest.Client, tool, say string) {
	t.Helper()
	result := c.Call(tool, map[string]any{"text": say})
	if result.IsError || authtest.Text(result) != say {
		t.Errorf("%s answered %q (error: %v), want %q", tool, authtest.Text(result), result.IsError, say)
	}
}

func signIn(t *testing.T, link string) *authtest.Page {
	t.Helper()
	page := authtest.NewBrowser(t).Open(link)
	if page.Status != http.StatusOK || !strings.Contains(page.Body, "You are signed in") {
		t.Fatalf("the sign-in ended at %d %s:\n%s", page.Status, page.URL, page.Body)
	}
	return page
}

var ownNames = []string{"gateway_status", "gateway_login", "gateway_logout", "gateway_find_tools", "gateway_call_tool"}

// TestWalk is the main job: a call asks for a sign-in, the browser does it, and
// the same call works. Over HTTP in both eras, and over stdio.
func TestWalk(t *testing.T) {
	for _, tt := range []struct {
		name  string
		start func(t *testing.T, w *world) *authtest.Client
	}{
		{"http, legacy", func(t *testing.T, w *world) *authtest.Client {
			w.gw = startServe(t, config("", "notes", w.remote.URL))
			return authtest.Legacy(t, w.gw.url)
		}},
		{"http, 2026-07-28", func(t *testing.T, w *world) *authtest.Client {
			w.gw = startServe(t, config("", "notes", w.remote.URL))
			return authtest.Modern(t, w.gw.url)
		}},
		{"stdio", func(t *testing.T, w *world) *authtest.Client {
			w.gw = startStdio(t, config("", "notes", w.remote.URL))
			return authtest.Connect(t, authtest.ClientConfig{
				Transport: &mcp.IOTransport{Reader: w.gw.stdout, Writer: w.gw.stdin},
			})
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			w := &world{as: authtest.NewAS(t)}
			w.remote = authtest.NewRemote(t, authtest.RemoteConfig{AS: w.as})
			client := tt.start(t, w)
			w.guardSecrets(t)

			// Before: the list is useful, and the first call by name gets the link.
			if diff := cmp.Diff(ownNames, client.Tools()); diff != "" {
				t.Errorf("tools before the sign-in: %s", diff)
			}
			url := link(t, client.Call("notes_echo", map[string]any{"text": "hi"}), "notes")
			if again := link(t, client.Call("notes_echo", map[string]any{"text": "hi"}), "notes"); again != url {
				t.Errorf("a second call got another link: %s, then %s", url, again)
			}

			changed := client.Changed()
			page := signIn(t, url)
			if !strings.Contains(page.Body, "notes is connected, 3 tools") {
				t.Errorf("the page does not say what came of it:\n%s", page.Body)
			}

			// After: told of the tools, and the same call works.
			if err := client.WaitChanged(within(t), changed); err != nil {
				t.Errorf("no list_changed after the sign-in: %v", err)
			}
			echo(t, client, "notes_echo", "hi")
			want := append([]string{"notes_add", "notes_echo", "notes_whoami"}, ownNames...)
			if diff := cmp.Diff(want, client.Tools()); diff != "" {
				t.Errorf("tools after the sign-in: %s", diff)
			}
			if got := authtest.Text(client.Call("notes_whoami", nil)); got != "alice" {
				t.Errorf("whoami = %q", got)
			}

			// One of everything.
			for _, endpoint := range []string{authtest.EndpointRegister, authtest.EndpointAuthorize, authtest.EndpointToken} {
				if n := w.as.Count(endpoint); n != 1 {
					t.Errorf("%d requests to the %s endpoint, want 1", n, endpoint)
				}
			}
			token := w.as.Requests(authtest.EndpointToken)[0].Form
			if token.Get("resource") != w.remote.URL || token.Get("code_verifier") == "" {
				t.Error("the token request lacks resource or code_verifier")
			}
			authorize := w.as.Requests(authtest.EndpointAuthorize)[0].Query
			if authorize.Get("code_challenge_method") != "S256" || authorize.Get("resource") != w.remote.URL || len(authorize.Get("state")) < 43 {
				t.Errorf("authorization request: %v", authorize)
			}
			w.canary.Add(authorize.Get("state"), token.Get("code_verifier"))
		})
	}
}

// TestIsolation: over HTTP without inbound auth each MCP session holds its own.
func TestIsolation(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "")
	alice, bob := authtest.Legacy(t, w.gw.url), authtest.Legacy(t, w.gw.url)
	url := link(t, alice.Call("notes_echo", nil), "notes")
	before := bob.Changed()
	signIn(t, url)
	echo(t, alice, "notes_echo", "mine")
	if other := link(t, bob.Call("notes_echo", nil), "notes"); other == url {
		t.Error("both sessions got the same link")
	}
	if diff := cmp.Diff(ownNames, bob.Tools()); diff != "" {
		t.Errorf("the other session's tools: %s", diff)
	}
	if n := bob.Changed() - before; n != 0 {
		t.Errorf("the other session was told %d times of a change that is not its", n)
	}
	if s := authtest.Text(alice.Call("gateway_status", nil)); !strings.Contains(s, "this MCP session alone") {
		t.Errorf("the status does not say whose the sign-ins are: %s", s)
	}

	// The grants end with the session.
	id := alice.ID()
	w.canary.Add(id, bob.ID())
	if err := alice.Close(); err != nil {
		t.Fatal(err)
	}
	carol := authtest.Legacy(t, w.gw.url)
	link(t, carol.Call("notes_echo", nil), "notes")
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, w.gw.url, strings.NewReader(`{"jsonrpc":"2.0","id":1,"method":"tools/list"}`))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Accept", "application/json, text/event-stream")
	req.Header.Set("Mcp-Session-Id", id)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusNotFound {
		t.Errorf("a request of the ended session: %d, want 404", resp.StatusCode)
	}
}

// TestShared: with "sessions": "shared" all clients are one local user.
func TestShared(t *testing.T) {
	t.Parallel()
	w := newWorld(t, `{"sessions": "shared"}`)
	one, two := authtest.Legacy(t, w.gw.url), authtest.Legacy(t, w.gw.url)
	three := authtest.Modern(t, w.gw.url)
	before := two.Changed()
	signIn(t, link(t, one.Call("notes_echo", nil), "notes"))
	if err := two.WaitChanged(within(t), before); err != nil {
		t.Errorf("the other client was not told: %v", err)
	}
	for _, c := range []*authtest.Client{one, two, three} {
		echo(t, c, "notes_echo", "ours")
	}
	if n := w.as.Count(authtest.EndpointToken); n != 1 {
		t.Errorf("%d token requests, want 1", n)
	}
	if s := authtest.Text(three.Call("gateway_status", nil)); !strings.Contains(s, "local user") {
		t.Errorf("the status does not say whose the sign-ins are: %s", s)
	}
}

// TestFirstCallsAtOnce: 50 parallel first calls give one flow, one link and one
// registration.
func TestFirstCallsAtOnce(t *testing.T) {
	t.Parallel()
	w := newWorld(t, `{"sessions": "shared"}`)
	client := authtest.Legacy(t, w.gw.url)
	var mu sync.Mutex
	links := map[string]bool{}
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			required, ok := authtest.RequiredOf(client.Call("notes_echo", nil))
			mu.Lock()
			defer mu.Unlock()
			if links[required.AuthURL] = true; !ok {
				t.Error("a call asked for no sign-in")
			}
		})
	}
	wg.Wait()
	if len(links) != 1 {
		t.Errorf("%d different links, want 1", len(links))
	}
	if n := w.as.Count(authtest.EndpointRegister); n != 1 {
		t.Errorf("%d registrations, want 1", n)
	}
	for l := range links {
		signIn(t, l)
	}
	echo(t, client, "notes_echo", "done")
}

// remoteState is what gateway_status says of one remote.
type remoteState struct {
	Name        string     `json:"name"`
	Status      string     `json:"status"`
	Tools       int        `json:"tools"`
	Server      string     `json:"server"`
	Protocol    string     `json:"protocol"`
	SignIn      string     `json:"sign_in"`
	SignInBy    string     `json:"sign_in_by"`
	Issuer      string     `json:"issuer"`
	Expires     *time.Time `json:"expires"`
	Refreshable bool       `json:"refreshable"`
	AuthURL     string     `json:"auth_url"`
	LastError   string     `json:"last_error"`
	Advice      string     `json:"advice"`
}

func status(t *testing.T, c *authtest.Client) map[string]remoteState {
	t.Helper()
	result := c.Call("gateway_status", nil)
	raw, err := json.Marshal(result.StructuredContent)
	if err != nil {
		t.Fatal(err)
	}
	var s struct {
		Remotes []remoteState `json:"remotes"`
	}
	if err := json.Unmarshal(raw, &s); err != nil {
		t.Fatalf("%v in %s", err, raw)
	}
	out := map[string]remoteState{}
	for _, r := range s.Remotes {
		out[r.Name] = r
	}
	return out
}

// TestStatusTellsTheTruth before, during and after a sign-in, and when the
// token has run out and nothing can renew it.
func TestStatusTellsTheTruth(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "")
	w.as.Set(func(k *authtest.ASKnobs) { k.NoRefresh = true })
	client := authtest.Legacy(t, w.gw.url)

	before := status(t, client)["notes"]
	if before.Status != "auth_required" || before.SignIn != "signed_out" || before.AuthURL == "" {
		t.Errorf("before the sign-in: %+v", before)
	}
	signIn(t, before.AuthURL)
	during := status(t, client)["notes"]
	if during.Status != "connected" || during.SignIn != "signed_in" || during.Issuer != w.as.Issuer() || during.Tools != 3 ||
		during.Expires == nil || time.Until(*during.Expires) < 50*time.Minute || during.Refreshable || during.AuthURL != "" {
		t.Errorf("signed in: %+v", during)
	}
	if s := authtest.Text(client.Call("gateway_login", map[string]any{"remote": "notes"})); !strings.Contains(s, "already signed in") {
		t.Errorf("login while signed in: %s", s)
	}

	// The token dies early. Nobody may say "already signed in".
	w.as.ExpireAll()
	login := client.Call("gateway_login", map[string]any{"remote": "notes"})
	url := link(t, client.Call("notes_echo", nil), "notes")
	if asked(login).AuthURL != url {
		t.Errorf("login with a dead token: %s", authtest.Text(login))
	}
	after := status(t, client)["notes"]
	if after.SignIn == "signed_in" || after.AuthURL != url {
		t.Errorf("with a dead token: %+v", after)
	}
	signIn(t, url)
	echo(t, client, "notes_echo", "again")
}

// TestExpiry: a token whose time is over leads to a new link at once, without
// being sent again.
func TestExpiry(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "")
	w.as.Set(func(k *authtest.ASKnobs) { k.NoRefresh, k.TokenLife = true, time.Second })
	client := authtest.Legacy(t, w.gw.url)
	signIn(t, link(t, client.Call("notes_echo", nil), "notes"))
	for {
		result := client.Call("notes_echo", map[string]any{"text": "x"})
		if _, asked := authtest.RequiredOf(result); asked {
			link(t, result, "notes")
			break
		}
		if result.IsError || t.Context().Err() != nil {
			t.Fatalf("a call failed: %s", authtest.Text(result))
		}
	}
}

// TestRefresh: with a refresh token an expired access token costs nobody a click.
func TestRefresh(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "")
	client := authtest.Legacy(t, w.gw.url)
	signIn(t, link(t, client.Call("notes_echo", nil), "notes"))
	w.as.ExpireAll()
	echo(t, client, "notes_echo", "still here")
	requests := w.as.Requests(authtest.EndpointToken)
	if len(requests) != 2 || requests[1].Form.Get("grant_type") != "refresh_token" || requests[1].Form.Get("resource") != w.remote.URL {
		t.Errorf("%d token requests, the last %v", len(requests), requests[len(requests)-1].Form["grant_type"])
	}
	if w.as.Count(authtest.EndpointAuthorize) != 1 {
		t.Error("the refresh cost a sign-in")
	}
}

// TestStepUp: a tool that needs more than was granted asks for a sign-in with
// more, and works after it; a user who does not grant it is told so in the end.
func TestStepUp(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "")
	w.remote.Set(func(k *authtest.RemoteKnobs) {
		k.ToolScopes = map[string][]string{"add": {"sums"}, "whoami": {"admin"}}
	})
	client := authtest.Legacy(t, w.gw.url)
	signIn(t, link(t, client.Call("notes_echo", nil), "notes"))
	echo(t, client, "notes_echo", "before")
	sum := func() *mcp.CallToolResult { return client.Call("notes_add", map[string]any{"a": 1, "b": 2}) }
	signIn(t, link(t, sum(), "notes"))
	if result := sum(); result.IsError {
		t.Errorf("after the sign-in with more: %s", authtest.Text(result))
	}
	echo(t, client, "notes_echo", "after")
	w.as.Set(func(k *authtest.ASKnobs) {
		k.Grant = func(asked []string) []string {
			return slices.DeleteFunc(asked, func(s string) bool { return s == "admin" })
		}
	})
	for range 2 {
		signIn(t, link(t, client.Call("notes_whoami", nil), "notes"))
	}
	if result := client.Call("notes_whoami", nil); !result.IsError || asked(result).Status != "" || !strings.Contains(authtest.Text(result), "forbids this") {
		t.Errorf("a permission that is not granted: %s", authtest.Text(result))
	}
}

// TestLogout: after it the next call asks again, the other remote is untouched,
// and the tokens are revoked.
func TestLogout(t *testing.T) {
	t.Parallel()
	w := &world{as: authtest.NewAS(t)}
	w.remote = authtest.NewRemote(t, authtest.RemoteConfig{AS: w.as})
	other := authtest.NewRemote(t, authtest.RemoteConfig{AS: w.as})
	w.gw = startServe(t, config("", "notes", w.remote.URL, "mail", other.URL))
	w.guardSecrets(t)
	client := authtest.Legacy(t, w.gw.url)
	signIn(t, link(t, client.Call("notes_echo", nil), "notes"))
	signIn(t, link(t, client.Call("mail_echo", nil), "mail"))

	if s := authtest.Text(client.Call("gateway_logout", map[string]any{"remote": "notes"})); !strings.Contains(s, "revoked") {
		t.Errorf("logout: %s", s)
	}
	link(t, client.Call("notes_echo", nil), "notes")
	echo(t, client, "mail_echo", "untouched")
	if slices.ContainsFunc(client.Tools(), func(name string) bool { return name == "notes_echo" }) {
		t.Error("the tools of a remote that was signed out of are still listed as if they worked")
	}
	if access, _ := w.as.Live(); access != 1 {
		t.Errorf("%d access tokens are live, want the sibling's alone", access)
	}
	if s := authtest.Text(client.Call("gateway_logout", map[string]any{"issuer": w.as.Issuer()})); !strings.Contains(s, "mail") {
		t.Errorf("logout of the issuer: %s", s)
	}
	link(t, client.Call("mail_echo", nil), "mail")
	if result := client.Call("gateway_logout", nil); !result.IsError {
		t.Errorf("logout of nothing in particular: %s", authtest.Text(result))
	}
	// Only a link is there by now.
	if s := authtest.Text(client.Call("gateway_logout", map[string]any{"all": true})); !strings.Contains(s, "mail: you were not signed in; the pending sign-in is cancelled") {
		t.Errorf("logout with a pending link alone: %s", s)
	}
	if s := authtest.Text(client.Call("gateway_logout", map[string]any{"all": true})); s != "You were not signed in there." {
		t.Errorf("logout of nothing: %s", s)
	}
}

// TestOwnToolArguments: what does not fit is named.
func TestOwnToolArguments(t *testing.T) {
	t.Parallel()
	client := authtest.Legacy(t, newWorld(t, "").gw.url)
	for _, tt := range []struct {
		tool string
		args map[string]any
		say  string
	}{
		{"gateway_status", map[string]any{"remote": "notes"}, `gateway_status takes no arguments, and there is "remote"`},
		{"gateway_login", map[string]any{"remote": 7}, "The argument remote of gateway_login must be a text."},
		{"gateway_login", map[string]any{"server": "notes"}, `gateway_login has no argument "server". It takes: remote.`},
		{"gateway_logout", map[string]any{"all": "yes"}, "The argument all of gateway_logout must be true or false."},
		{"gateway_find_tools", map[string]any{"limit": -3}, "The argument limit of gateway_find_tools must be from 1 to 200."},
		{"gateway_find_tools", map[string]any{"limit": 0}, "must be from 1 to 200"},
		{"gateway_find_tools", map[string]any{"limit": 1.5}, "The argument limit of gateway_find_tools must be a whole number."},
		{"gateway_call_tool", map[string]any{"name": "notes_echo", "arguments": "x"}, "The argument arguments of gateway_call_tool must be an object."},
		{"gateway_call_tool", map[string]any{"name": "notes_echo", "args": 1}, `gateway_call_tool has no argument "args". It takes: arguments, name.`},
	} {
		if result := client.Call(tt.tool, tt.args); !result.IsError || !strings.Contains(authtest.Text(result), tt.say) {
			t.Errorf("%s %v: %s", tt.tool, tt.args, authtest.Text(result))
		}
	}
}

// TestStatusOfSignIn: a remote that asked for a sign-in which cannot begin is
// not one that needs none, and nobody says that it is tried again by itself.
func TestStatusOfSignIn(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "")
	w.as.Set(func(k *authtest.ASKnobs) { k.NoS256 = true })
	client := authtest.Legacy(t, w.gw.url)
	client.Call("notes_echo", nil)
	if s := status(t, client)["notes"]; s.SignIn != "signed_out" || s.Status != "unavailable" || s.LastError == "" || strings.Contains(s.Advice, "by itself") {
		t.Errorf("status: %+v", s)
	}
	open := authtest.NewRemote(t, authtest.RemoteConfig{})
	client = authtest.Legacy(t, startServe(t, config("", "notes", open.URL)).url)
	echo(t, client, "notes_echo", "x")
	if s := status(t, client)["notes"]; s.SignIn != "none" || !strings.HasPrefix(s.Server, "authtest") || s.Protocol == "" {
		t.Errorf("status of an open one: %+v", s)
	}
}

// TestCallToolAndFindTools: a client that never lists again reaches everything.
func TestCallToolAndFindTools(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "")
	client := authtest.Connect(t, authtest.ClientConfig{URL: w.gw.url, NoStream: true})
	call := func(arguments map[string]any) *mcp.CallToolResult {
		return client.Call("gateway_call_tool", arguments)
	}
	signIn(t, link(t, call(map[string]any{"name": "notes_echo", "arguments": map[string]any{"text": "x"}}), "notes"))
	found := authtest.Text(client.Call("gateway_find_tools", map[string]any{"query": "echo"}))
	if !strings.Contains(found, `"notes_echo"`) || !strings.Contains(found, "inputSchema") || strings.Contains(found, `"notes_whoami"`) {
		t.Errorf("find_tools: %s", found)
	}
	direct := client.Call("notes_add", map[string]any{"a": 1, "b": 2})
	byName := call(map[string]any{"name": "notes_add", "arguments": map[string]any{"a": 1, "b": 2}})
	if diff := cmp.Diff(direct, byName, cmpopts.IgnoreUnexported(mcp.CallToolResult{})); diff != "" {
		t.Errorf("the result is not passed on unwrapped: %s", diff)
	}
	for _, bad := range []map[string]any{{"name": "nothing_here"}, {"name": ""}, {"name": "gateway_call_tool"}} {
		if result := call(bad); !result.IsError {
			t.Errorf("%v: %s", bad, authtest.Text(result))
		}
	}
}

// TestLoginTool: a remote that lets everybody connect but publishes a sign-in
// can be signed in to on request; an open one says that none is needed.
func TestLoginTool(t *testing.T) {
	t.Parallel()
	as := authtest.NewAS(t)
	offers := authtest.NewRemote(t, authtest.RemoteConfig{AS: as})
	offers.Set(func(k *authtest.RemoteKnobs) { k.Open = true })
	open := authtest.NewRemote(t, authtest.RemoteConfig{})
	gw := startServe(t, config("", "offers", offers.URL, "open", open.URL))
	client := authtest.Legacy(t, gw.url)
	echo(t, client, "open_echo", "no sign-in")
	login := func(remote string) *mcp.CallToolResult {
		return client.Call("gateway_login", map[string]any{"remote": remote})
	}
	if s := authtest.Text(login("open")); !strings.Contains(s, "no sign-in") {
		t.Errorf("login at an open remote: %s", s)
	}
	signIn(t, link(t, login("offers"), "offers"))
	if s := status(t, client)["offers"]; s.SignIn != "signed_in" {
		t.Errorf("after the sign-in: %+v", s)
	}
	if result := login("nobody"); !result.IsError || !strings.Contains(authtest.Text(result), "offers, open") {
		t.Errorf("login at an unknown remote: %s", authtest.Text(result))
	}
}

// TestRemotesFailAlone: a remote that hangs, is down or talks nonsense costs its
// own tools only, and comes back by itself.
func TestRemotesFailAlone(t *testing.T) {
	t.Parallel()
	good := authtest.NewRemote(t, authtest.RemoteConfig{})
	down := authtest.NewRemote(t, authtest.RemoteConfig{})
	down.Down()
	remotes := []string{"good", good.URL, "down", down.URL}
	for i := range 3 {
		hang := authtest.NewRemote(t, authtest.RemoteConfig{})
		hang.Set(func(k *authtest.RemoteKnobs) { k.MCP = authtest.Hang() })
		remotes = append(remotes, fmt.Sprint("hang", i), hang.URL)
	}
	nonsense := authtest.NewRemote(t, authtest.RemoteConfig{})
	nonsense.Set(func(k *authtest.RemoteKnobs) { k.MCP = authtest.Answer(200, "text/html", "<h1>canary-html</h1>") })
	remotes = append(remotes, "nonsense", nonsense.URL)

	gw := startServe(t, config(`{"sessions": "shared"}`, remotes...))
	client := authtest.Legacy(t, gw.url)
	if got := client.Tools(); len(got) != 3+len(ownNames) || got[0] != "good_add" {
		t.Errorf("tools: %v", got)
	}
	echo(t, client, "good_echo", "fine")
	if result := client.Call("down_echo", nil); !result.IsError || !strings.Contains(authtest.Text(result), "down") {
		t.Errorf("a call to a remote that is down: %s", authtest.Text(result))
	}
	if s := authtest.Text(client.Call("nonsense_echo", nil)); !strings.Contains(s, "text/html") || strings.Contains(s, "canary-html") {
		t.Errorf("a call to a remote that talks nonsense: %s", s)
	}
	s := status(t, client)
	if s["good"].Status != "connected" || s["down"].Status != "unavailable" || s["down"].LastError == "" || s["nonsense"].Status != "unavailable" {
		t.Errorf("status: %+v", s)
	}

	before := client.Changed()
	down.Up()
	if err := client.WaitChanged(within(t), before); err != nil {
		t.Fatalf("the remote came up and nobody was told: %v", err)
	}
	echo(t, client, "down_echo", "back")
}

// TestFidelity: definitions, arguments and results keep their values, number
// literals and unknown members.
func TestFidelity(t *testing.T) {
	t.Parallel()
	def := `{"name":"odd","title":"Ödd <&>","description":"","inputSchema":{"type":"object","x-unknown":[1.0,1e400,9007199254740993],"properties":{"n":{"const":12345678901234567890}}},"annotations":{"readOnlyHint":false,"x":null},"execution":{"taskSupport":"optional"},"icons":[{"src":"data:,x","y":1}],"_meta":{"big":9007199254740993}}`
	result := `{"content":[{"type":"text","text":""},{"type":"hologram","depth":1.0},{"type":"text","text":"<&>","annotations":{"priority":0}}],"structuredContent":{"n":9007199254740993,"f":1.0,"e":1E+2},"isError":false,"_meta":{"x":1.50},"unknown":{"a":[]}}`
	var got json.RawMessage
	remote := authtest.NewRemote(t, authtest.RemoteConfig{})
	remote.Set(func(k *authtest.RemoteKnobs) {
		k.Tools = []json.RawMessage{json.RawMessage(def), json.RawMessage(`{"name":"broken","inputSchema":7}`), json.RawMessage(`{"inputSchema":{"type":"object"}}`)}
		k.Results = map[string]json.RawMessage{"odd": json.RawMessage(result)}
	})
	gw := startServe(t, config("", "r", remote.URL))
	list, call := rawExchange(t, gw.url, `{"name":"r_odd","arguments":{"n":9007199254740993,"f":1.0,"d":{"z":1e3}},"_meta":{"k":12345678901234567890,"u":1.0},"unknown":[1.0]}`)
	tools := member(t, list, "tools")
	var defs []json.RawMessage
	if err := json.Unmarshal(tools, &defs); err != nil {
		t.Fatal(err)
	}
	if len(defs) != 1+len(ownNames) {
		t.Errorf("%d definitions, want the good one and the gateway's own", len(defs))
	}
	if diff := cmp.Diff(literals(t, strings.Replace(def, `"odd"`, `"r_odd"`, 1)), literals(t, string(defs[0]))); diff != "" {
		t.Errorf("definition: %s", diff)
	}
	if diff := cmp.Diff(literals(t, result), literals(t, string(call))); diff != "" {
		t.Errorf("result: %s", diff)
	}
	for _, request := range remote.Requests(authtest.EndpointMCP) {
		if request.RPC == "tools/call" {
			got = member(t, request.Body, "params")
		}
	}
	want := `{"name":"odd","arguments":{"n":9007199254740993,"f":1.0,"d":{"z":1e3}},"_meta":{"k":12345678901234567890,"u":1.0},"unknown":[1.0]}`
	if diff := cmp.Diff(literals(t, want), literals(t, string(got))); diff != "" {
		t.Errorf("params: %s", diff)
	}
}
