package main

import (
	"encoding/json"
	"fmt"
	"html"
	"io"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"testing"
	"time"

	"gatehouse/auth/authtest"
)

// team is a gateway for many users: their company's provider, and two remotes
// with authorization servers of their own.
type team struct {
	idp, as      *authtest.AS
	notes, files *authtest.Remote
	gw           *process
	t            *testing.T
}

func newTeam(t *testing.T, settings string) *team {
	t.Helper()
	tm := &team{t: t, idp: authtest.NewAS(t), as: authtest.NewAS(t)}
	tm.idp.Set(func(k *authtest.ASKnobs) { k.IDToken = map[string]any{} })
	tm.notes = authtest.NewRemote(t, authtest.RemoteConfig{AS: tm.as})
	tm.files = authtest.NewRemote(t, authtest.RemoteConfig{AS: tm.as})
	if settings != "" {
		settings = ", " + settings
	}
	tm.gw = startServe(t, fmt.Sprintf(`{"mcpServers": {"notes": {"url": %q}, "files": {"url": %q}},
		"gateway": {"auth": {"issuer": %q, "clientId": "gatehouse", "clientSecret": "canary-cs-gateway-1"%s}}}`,
		tm.notes.URL, tm.files.URL, tm.idp.Issuer(), settings))
	tm.idp.AddClient(authtest.OAuthClient{ID: "gatehouse", Secret: "canary-cs-gateway-1", Method: "client_secret_basic",
		RedirectURIs: []string{tm.base() + "/login/callback"}})
	return tm
}

func (tm *team) base() string { return strings.TrimSuffix(tm.gw.url, "/mcp") }

func (tm *team) token(user string) string { return tm.idp.JWTFor(user, tm.gw.url, nil) }

func (tm *team) client(user, protocol string) *authtest.Client {
	tm.t.Helper()
	return authtest.Connect(tm.t, authtest.ClientConfig{URL: tm.gw.url, Token: tm.token(user), Protocol: protocol})
}

// browser is one that a user has logged in with.
func (tm *team) browser(user string) *authtest.Browser {
	tm.t.Helper()
	b := authtest.NewBrowser(tm.t)
	tm.idp.Set(func(k *authtest.ASKnobs) { k.User = user })
	if page := b.Open(tm.base() + "/"); page.Status != http.StatusOK || !strings.Contains(page.Body, "for you, "+user) {
		tm.t.Fatalf("logging in: %d %s\n%s", page.Status, page.URL, page.Body)
	}
	return b
}

// TestManyUsers: each user has their own sign-ins, whichever client of either
// era they use, and nobody else can finish one.
func TestManyUsers(t *testing.T) {
	t.Parallel()
	tm := newTeam(t, "")
	alice, bob := tm.client("alice", authtest.ProtocolLegacy), tm.client("bob", authtest.ProtocolModern)
	hers := link(t, alice.Call("notes_echo", nil), "notes")
	his := link(t, bob.Call("notes_echo", nil), "notes")
	if hers == his {
		t.Fatal("one link for two users")
	}
	bobsBrowser, alicesBrowser := tm.browser("bob"), tm.browser("alice")

	// Bob opens Alice's link: nothing happens, and she hears of it.
	before := tm.as.Count(authtest.EndpointAuthorize)
	if page := bobsBrowser.Open(hers); page.Status != http.StatusForbidden || !strings.Contains(page.Body, "made for another account") {
		t.Errorf("bob at alice's link: %d\n%s", page.Status, page.Body)
	}
	if page := bobsBrowser.Do(http.MethodPost, hers, url.Values{}); page.Status != http.StatusForbidden {
		t.Errorf("bob continues with alice's link: %d", page.Status)
	}
	if n := tm.as.Count(authtest.EndpointAuthorize); n != before {
		t.Error("the authorization server was asked")
	}
	result := alice.Call("notes_echo", nil)
	if again := link(t, result, "notes"); again != hers || !strings.Contains(authtest.Text(result), "another account") {
		t.Errorf("alice's next result: %s", authtest.Text(result))
	}

	// A preview fetches the link, and the page, as often as it likes.
	for range 50 {
		if page := authtest.NewBrowser(t).Get(hers); page.Status != http.StatusSeeOther {
			t.Fatalf("a preview: %d", page.Status)
		}
		alicesBrowser.Get(hers)
	}
	page := alicesBrowser.Open(hers)
	for _, want := range []string{"alice", "notes", tm.as.Issuer(), "authtest-client", "another account"} {
		if page.Status != http.StatusOK || !strings.Contains(page.Body, want) {
			t.Errorf("the page lacks %q: %d\n%s", want, page.Status, page.Body)
		}
	}
	if n := tm.as.Count(authtest.EndpointAuthorize); n != before {
		t.Error("looking at the page went to the authorization server")
	}
	// Not without the page's own proof.
	if page := alicesBrowser.Do(http.MethodPost, hers, url.Values{}); page.Status != http.StatusForbidden {
		t.Errorf("continued without the page: %d", page.Status)
	}
	tm.as.Set(func(k *authtest.ASKnobs) { k.User = "alice at notes" })
	if page := alicesBrowser.Submit(page, "Continue"); page.Status != http.StatusOK || !strings.Contains(page.Body, "notes is connected") {
		t.Fatalf("signing in: %d %s\n%s", page.Status, page.URL, page.Body)
	}
	echo(t, alice, "notes_echo", "hers")
	// Her other client, of the other era, has it as well; Bob has not.
	echo(t, tm.client("alice", authtest.ProtocolModern), "notes_echo", "hers too")
	if again := link(t, bob.Call("notes_echo", nil), "notes"); again != his {
		t.Error("bob's link changed")
	}
	tm.as.Set(func(k *authtest.ASKnobs) { k.User = "bob at notes" })
	bobsBrowser.Submit(bobsBrowser.Open(his), "Continue")
	for client, want := range map[*authtest.Client]string{alice: "alice at notes", bob: "bob at notes"} {
		if who := authtest.Text(client.Call("notes_whoami", nil)); who != want {
			t.Errorf("%q, want %q", who, want)
		}
	}
	// No token of the company's provider went to a remote.
	for _, token := range tm.notes.Tokens() {
		if strings.Count(token, ".") == 2 {
			t.Error("a client's bearer token reached a remote")
		}
	}
	log := tm.gw.output()
	if strings.Contains(log, "canary-") {
		t.Error("a secret is in the log")
	}
	if !regexp.MustCompile(`"msg":"sign-in refused","audit":\{"principal":\{"issuer":"[^"]+","subject":"alice"\},"remote":"notes","why":"wrong_person"\}`).MatchString(log) {
		t.Error("bob's attempt is not in the audit log")
	}
}

// TestUsersAttacked: what a foreign page, a frame, or a request that only claims
// to be somebody's gets.
func TestUsersAttacked(t *testing.T) {
	t.Parallel()
	tm := newTeam(t, "")
	alice := tm.client("alice", authtest.ProtocolLegacy)
	hers := link(t, alice.Call("notes_echo", nil), "notes")
	b := tm.browser("alice")
	form := url.Values{"token": {proof(t, b.Open(hers).Body)}}
	registered := tm.as.Count(authtest.EndpointAuthorize)
	do := func(method, address, body string, header http.Header) *http.Response {
		t.Helper()
		req, err := http.NewRequestWithContext(within(t), method, address, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header = header
		resp, err := b.Client().Do(req) // with her cookies
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		return resp
	}
	posted := http.Header{"Content-Type": {"application/x-www-form-urlencoded"}}
	with := func(h http.Header, name, value string) http.Header {
		h = h.Clone()
		h.Set(name, value)
		return h
	}
	for _, path := range []string{strings.TrimPrefix(hers, tm.base()), "/signin", "/signout", "/logout"} {
		for name, header := range map[string]http.Header{
			"Origin": with(posted, "Origin", "https://evil.example"), "Sec-Fetch-Site": with(posted, "Sec-Fetch-Site", "cross-site"),
			"a frame": with(with(posted, "Sec-Fetch-Site", "same-origin"), "Sec-Fetch-Dest", "iframe"),
		} {
			if resp := do(http.MethodPost, tm.base()+path, form.Encode(), header); resp.StatusCode != http.StatusForbidden {
				t.Errorf("%s from %s: %s", path, name, resp.Status)
			}
		}
		// The proof of another user, or of another login, is none.
		other := url.Values{"token": {proof(t, tm.browser("bob").Open(tm.base()+"/").Body)}}
		tm.idp.Set(func(k *authtest.ASKnobs) { k.User = "alice" })
		for name, body := range map[string]string{"no proof": "", "bob's proof": other.Encode(), "twice": form.Encode() + "x"} {
			if resp := do(http.MethodPost, tm.base()+path, body, posted); resp.StatusCode != http.StatusForbidden {
				t.Errorf("%s with %s: %s", path, name, resp.Status)
			}
		}
	}
	for _, path := range []string{"/login", "/login/callback", "/"} {
		if resp := do(http.MethodGet, tm.base()+path, "", http.Header{"Sec-Fetch-Dest": {"image"}}); resp.StatusCode != http.StatusForbidden {
			t.Errorf("%s as an image: %s", path, resp.Status)
		}
		if resp := do(http.MethodOptions, tm.base()+path, "", http.Header{}); resp.StatusCode != http.StatusMethodNotAllowed {
			t.Errorf("OPTIONS %s: %s", path, resp.Status)
		}
	}
	for _, to := range []string{"https://evil.example/", "//evil.example", "/\\evil.example", "/connect/..//evil.example", "javascript:alert(1)", "/login?to=/login"} {
		fresh := authtest.NewBrowser(t)
		if page := fresh.Open(tm.base() + "/login?to=" + url.QueryEscape(to)); !strings.HasPrefix(page.URL, tm.base()+"/") {
			t.Errorf("the login led from %s to %s", to, page.URL)
		}
	}
	if n := tm.as.Count(authtest.EndpointAuthorize); n != registered {
		t.Error("a sign-in was begun")
	}
	if page := b.Open(tm.base() + "/"); page.Status != http.StatusOK || !strings.Contains(page.Body, "for you, alice") {
		t.Errorf("she is logged out: %d", page.Status)
	}
	// Words about oneself.
	claims := http.Header{"Content-Type": {"application/json"}, "Accept": {"application/json, text/event-stream"}, "X-User": {"alice"}, "X-Forwarded-User": {"alice"},
		"X-Forwarded-For": {"127.0.0.1"}, "X-Forwarded-Email": {"alice"}, "Remote-User": {"alice"}, "Mcp-Session-Id": {alice.ID()}}
	if resp := do(http.MethodPost, tm.gw.url, `{"jsonrpc":"2.0","id":1,"method":"tools/list"}`, claims); resp.StatusCode != http.StatusUnauthorized {
		t.Errorf("only claimed: %s", resp.Status)
	}
	// A body is not read of whom nobody knows.
	if resp := do(http.MethodPost, tm.gw.url, strings.Repeat(" ", 10<<20), http.Header{"Content-Type": {"application/json"}}); resp.StatusCode != http.StatusUnauthorized {
		t.Errorf("10 MB of nobody: %s", resp.Status)
	}
	for name, header := range map[string]http.Header{"Origin": {"Origin": {"https://evil.example"}}, "Host": {}} {
		header.Set("Authorization", "Bearer "+tm.token("alice"))
		req, err := http.NewRequestWithContext(within(t), http.MethodPost, tm.gw.url, strings.NewReader("{}"))
		if err != nil {
			t.Fatal(err)
		}
		req.Header = header
		if name == "Host" {
			req.Host = "evil.example"
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusForbidden {
			t.Errorf("a foreign %s: %s", name, resp.Status)
		}
	}
}

// TestWhereTheBrowserGoes: where an authorization server has its page on another
// host than its name says, the person sees that before Continue.
func TestWhereTheBrowserGoes(t *testing.T) {
	t.Parallel()
	tm := newTeam(t, "")
	b := tm.browser("alice")
	alice := tm.client("alice", authtest.ProtocolLegacy)
	if page := b.Open(link(t, alice.Call("notes_echo", nil), "notes")); page.Status != http.StatusOK || strings.Contains(page.Body, "Its page is at") {
		t.Errorf("on the issuer's host: %d\n%s", page.Status, page.Body)
	}
	tm = newTeam(t, "")
	issuer, err := url.Parse(tm.as.Issuer())
	if err != nil {
		t.Fatal(err)
	}
	elsewhere := "localhost:" + issuer.Port()
	tm.as.Set(func(k *authtest.ASKnobs) {
		k.Metadata = authtest.EditJSON(func(doc map[string]any) { doc["authorization_endpoint"] = "http://" + elsewhere + "/authorize" })
	})
	b, alice = tm.browser("alice"), tm.client("alice", authtest.ProtocolLegacy)
	page := b.Open(link(t, alice.Call("notes_echo", nil), "notes"))
	for _, want := range []string{tm.as.Issuer(), "Its page is at", elsewhere} {
		if page.Status != http.StatusOK || !strings.Contains(page.Body, want) {
			t.Errorf("the page lacks %q: %d\n%s", want, page.Status, page.Body)
		}
	}
}

// TestFinishedByAnother: what Alice has begun in her browser is of no use in
// Bob's, nor in hers once somebody else is logged in there.
func TestFinishedByAnother(t *testing.T) {
	t.Parallel()
	tm := newTeam(t, "")
	alice := tm.client("alice", authtest.ProtocolLegacy)
	hers := link(t, alice.Call("notes_echo", nil), "notes")
	alicesBrowser, bobsBrowser := tm.browser("alice"), tm.browser("bob")
	// begun is the callback that her browser would be sent to.
	begun := func() string {
		t.Helper()
		page := alicesBrowser.Do(http.MethodPost, hers, url.Values{"token": {proof(t, alicesBrowser.Open(hers).Body)}})
		return alicesBrowser.OpenUntil(page.Header.Get("Location"), tm.base()).Next
	}
	if page := bobsBrowser.Open(begun()); page.Status != http.StatusForbidden {
		t.Errorf("bob finishes: %d", page.Status)
	}
	callback := begun()
	// Bob logs in at her browser.
	tm.idp.Set(func(k *authtest.ASKnobs) { k.User = "bob" })
	alicesBrowser.Open(tm.base() + "/login")
	if page := alicesBrowser.Open(callback); page.Status != http.StatusForbidden || !strings.Contains(page.Body, "another account") {
		t.Errorf("bob in her browser: %d\n%s", page.Status, page.Body)
	}
	if n := tm.as.Count(authtest.EndpointToken); n != 0 {
		t.Errorf("%d codes were redeemed", n)
	}
	link(t, alice.Call("notes_echo", nil), "notes")
}

func proof(t *testing.T, body string) string {
	t.Helper()
	_, after, ok := strings.Cut(body, `name="token" value="`)
	value, _, ok2 := strings.Cut(after, `"`)
	if !ok || !ok2 {
		t.Fatalf("no proof in the page:\n%s", body)
	}
	return value
}

// TestStrangerAtTheLink: that somebody else has opened her link Alice is told once
// more if she has signed in before her next result: by the gateway's own tools, on
// her page, and when she is asked to sign in elsewhere; what remotes answer stays
// as it is.
func TestStrangerAtTheLink(t *testing.T) {
	t.Parallel()
	const told = "logged in with another account"
	for next, tells := range map[string]struct {
		call func(alice *authtest.Client) string
		now  bool
	}{
		"a remote's": {func(alice *authtest.Client) string {
			return authtest.Text(alice.Call("notes_echo", map[string]any{"text": "x"}))
		}, false},
		"elsewhere": {func(alice *authtest.Client) string { return authtest.Text(alice.Call("files_echo", nil)) }, true},
		"gateway_find": {func(alice *authtest.Client) string {
			return authtest.Text(alice.Call("gateway_find_tools", map[string]any{"query": "echo"}))
		}, true},
		"gateway_login": {func(alice *authtest.Client) string {
			return authtest.Text(alice.Call("gateway_login", map[string]any{"remote": "files"}))
		}, true},
		"gateway_status": {func(alice *authtest.Client) string { return authtest.Text(alice.Call("gateway_status", nil)) }, true},
	} {
		t.Run(next, func(t *testing.T) {
			t.Parallel()
			tm := newTeam(t, "")
			alice := tm.client("alice", authtest.ProtocolLegacy)
			hers := link(t, alice.Call("notes_echo", nil), "notes")
			tm.browser("bob").Open(hers)
			b := tm.browser("alice")
			b.Submit(b.Open(hers), "Continue")
			if said := tells.call(alice); strings.Contains(said, told) != tells.now {
				t.Errorf("told %v, want %v: %s", !tells.now, tells.now, said)
			}
			if said := authtest.Text(alice.Call("gateway_find_tools", map[string]any{"query": "echo"})); strings.Contains(said, told) == tells.now {
				t.Errorf("told for the second time %v: %s", tells.now, said)
			}
			if said := authtest.Text(alice.Call("gateway_status", nil)); !strings.Contains(said, told) {
				t.Errorf("the status says nothing: %s", said)
			}
			if page := b.Open(tm.base() + "/"); !strings.Contains(page.Body, "opened by another account") {
				t.Errorf("her page says nothing: %s", page.Body)
			}
		})
	}
}

// TestLoginEndsMeanwhile: whose login ends while they are at the provider is asked
// to log in again, with the same link, and is no stranger to it.
func TestLoginEndsMeanwhile(t *testing.T) {
	t.Parallel()
	tm := newTeam(t, "")
	alice := tm.client("alice", authtest.ProtocolLegacy)
	hers := link(t, alice.Call("notes_echo", nil), "notes")
	b := tm.browser("alice")
	page := b.Do(http.MethodPost, hers, url.Values{"token": {proof(t, b.Open(hers).Body)}})
	back := b.OpenUntil(page.Header.Get("Location"), tm.base()).Next
	b.Submit(b.Open(tm.base()+"/"), "Log out")
	page = b.Open(back)
	again := regexp.MustCompile(`href="(/login\?to=[^"]+)"`).FindStringSubmatch(page.Body)
	if page.Status != http.StatusForbidden || !strings.Contains(page.Body, "You are not logged in") || again == nil {
		t.Fatalf("the callback of nobody: %d\n%s", page.Status, page.Body)
	}
	if n := tm.as.Count(authtest.EndpointToken); n != 0 {
		t.Errorf("%d token requests", n)
	}
	if result := alice.Call("notes_echo", nil); link(t, result, "notes") != hers || strings.Contains(authtest.Text(result), "another account") {
		t.Errorf("she is told of a stranger: %s", authtest.Text(result))
	}
	if page = b.Submit(b.Open(tm.base()+html.UnescapeString(again[1])), "Continue"); !strings.Contains(page.Body, "notes is connected") {
		t.Errorf("logged in again: %d %s\n%s", page.Status, page.URL, page.Body)
	}
}

// TestBearers: who has no good token gets 401, and where to get one.
func TestBearers(t *testing.T) {
	t.Parallel()
	tm := newTeam(t, "")
	initialize := `{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-11-25","capabilities":{},"clientInfo":{"name":"raw","version":"1"}}}`
	past := time.Now().Add(-time.Second).Unix()
	good := tm.token("alice")
	opaque := tm.idp.Mint("alice", tm.gw.url)
	for name, tt := range map[string]struct {
		headers []string
		code    string // "" is accepted
	}{
		"good":                  {headers: []string{"Bearer " + good}},
		"lower case":            {headers: []string{"bearer " + good}},
		"opaque":                {headers: []string{"Bearer " + opaque}},
		"typ JWT":               {headers: []string{"Bearer " + tm.idp.SignedJWT("alice", tm.gw.url, "JWT", nil)}},
		"several audiences":     {headers: []string{"Bearer " + tm.idp.JWTFor("alice", "", map[string]any{"aud": []string{"x", tm.gw.url}})}},
		"none":                  {code: "none"},
		"Basic":                 {headers: []string{"Basic YTpi"}, code: "none"},
		"two":                   {headers: []string{"Bearer " + good, "Bearer " + good}, code: "invalid_request"},
		"empty":                 {headers: []string{"Bearer "}, code: "none"},
		"garbage":               {headers: []string{"Bearer garbage"}, code: "invalid_token"},
		"garbage JWT":           {headers: []string{"Bearer e30.e30.e30"}, code: "invalid_token"},
		"expired":               {headers: []string{"Bearer " + tm.idp.JWTFor("alice", tm.gw.url, map[string]any{"exp": past})}, code: "invalid_token"},
		"no exp":                {headers: []string{"Bearer " + tm.idp.JWTFor("alice", tm.gw.url, map[string]any{"exp": nil})}, code: "invalid_token"},
		"exp of no clock":       {headers: []string{"Bearer " + tm.idp.JWTFor("alice", tm.gw.url, map[string]any{"exp": 1e300})}, code: "invalid_token"},
		"not yet":               {headers: []string{"Bearer " + tm.idp.JWTFor("alice", tm.gw.url, map[string]any{"nbf": time.Now().Add(time.Hour).Unix()})}, code: "invalid_token"},
		"wrong audience":        {headers: []string{"Bearer " + tm.idp.JWTFor("alice", "https://another.example/mcp", nil)}, code: "invalid_token"},
		"part of the audience":  {headers: []string{"Bearer " + tm.idp.JWTFor("alice", tm.base(), nil)}, code: "invalid_token"},
		"no audience":           {headers: []string{"Bearer " + tm.idp.JWTFor("alice", "", map[string]any{"aud": nil})}, code: "invalid_token"},
		"another issuer":        {headers: []string{"Bearer " + tm.idp.JWTFor("alice", tm.gw.url, map[string]any{"iss": tm.idp.Issuer() + "/"})}, code: "invalid_token"},
		"no subject":            {headers: []string{"Bearer " + tm.idp.JWTFor("", tm.gw.url, nil)}, code: "invalid_token"},
		"a subject that's none": {headers: []string{"Bearer " + tm.idp.JWTFor("", tm.gw.url, map[string]any{"sub": []string{"alice"}})}, code: "invalid_token"},
		"bound to a key":        {headers: []string{"Bearer " + tm.idp.JWTFor("alice", tm.gw.url, map[string]any{"cnf": map[string]any{"jkt": "x"}})}, code: "invalid_token"},
		"an ID token":           {headers: []string{"Bearer " + tm.idp.SignedJWT("alice", tm.gw.url, "JWT", map[string]any{"nonce": "n"})}, code: "invalid_token"},
		"an ID-JAG":             {headers: []string{"Bearer " + tm.idp.SignedJWT("alice", tm.gw.url, "oauth-id-jag+jwt", nil)}, code: "invalid_token"},
		"a logout token":        {headers: []string{"Bearer " + tm.idp.SignedJWT("alice", tm.gw.url, "logout+jwt", nil)}, code: "invalid_token"},
		"unsigned":              {headers: []string{"Bearer " + unsigned(good)}, code: "invalid_token"},
		"signature cut off":     {headers: []string{"Bearer " + good[:strings.LastIndex(good, ".")+1]}, code: "invalid_token"},
		"changed":               {headers: []string{"Bearer " + changed(good)}, code: "invalid_token"},
		"opaque for another":    {headers: []string{"Bearer " + tm.idp.Mint("alice", "https://another.example/mcp")}, code: "invalid_token"},
		"opaque, unknown":       {headers: []string{"Bearer canary-at-unknown"}, code: "invalid_token"},
		"huge":                  {headers: []string{"Bearer " + strings.Repeat("x", 20<<10)}, code: "invalid_token"},
	} {
		for _, path := range []string{"/mcp", "/mcp?access_token=" + good} {
			req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, tm.base()+path, strings.NewReader(initialize))
			if err != nil {
				t.Fatal(err)
			}
			req.Header.Set("Content-Type", "application/json")
			req.Header.Set("Accept", "application/json, text/event-stream")
			req.Header["Authorization"] = tt.headers
			resp, err := http.DefaultClient.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			resp.Body.Close()
			says := resp.Header.Get("WWW-Authenticate")
			switch {
			case tt.code == "" && resp.StatusCode != http.StatusOK:
				t.Errorf("%s: %d %s", name, resp.StatusCode, says)
			case tt.code == "":
			case resp.StatusCode != http.StatusUnauthorized || !strings.Contains(says, `resource_metadata="`+tm.base()+`/.well-known/oauth-protected-resource/mcp"`) || !strings.Contains(says, `scope="openid"`):
				t.Errorf("%s: %d %s", name, resp.StatusCode, says)
			case tt.code == "none" && strings.Contains(says, "error="), tt.code != "none" && !strings.Contains(says, `error="`+tt.code+`"`):
				t.Errorf("%s: %s", name, says)
			}
		}
	}
	for _, path := range []string{"/.well-known/oauth-protected-resource/mcp", "/.well-known/oauth-protected-resource"} {
		resp, err := http.Get(tm.base() + path)
		if err != nil {
			t.Fatal(err)
		}
		var document struct {
			Resource string
			Servers  []string `json:"authorization_servers"`
		}
		err = json.NewDecoder(resp.Body).Decode(&document)
		resp.Body.Close()
		if err != nil || document.Resource != tm.gw.url || len(document.Servers) != 1 || document.Servers[0] != tm.idp.Issuer() {
			t.Errorf("%s: %+v, %v", path, document, err)
		}
	}
}

// unsigned is the token with alg none.
func unsigned(token string) string {
	parts := strings.Split(token, ".")
	return "eyJhbGciOiJub25lIiwidHlwIjoiYXQrand0In0." + parts[1] + "."
}

// changed is the token with other claims.
func changed(token string) string {
	parts := strings.Split(token, ".")
	parts[1] = parts[1][:10] + "A" + parts[1][11:]
	return strings.Join(parts, ".")
}

// TestSessionOfAnother: another user's session id answers like one that there
// has never been.
func TestSessionOfAnother(t *testing.T) {
	t.Parallel()
	tm := newTeam(t, "")
	alice := tm.client("alice", authtest.ProtocolLegacy)
	answer := func(method, id, token string) string {
		t.Helper()
		req, err := http.NewRequestWithContext(within(t), method, tm.gw.url, strings.NewReader(`{"jsonrpc":"2.0","id":1,"method":"tools/list"}`))
		if err != nil {
			t.Fatal(err)
		}
		req.Header = http.Header{"Content-Type": {"application/json"}, "Accept": {"application/json, text/event-stream"},
			"Mcp-Session-Id": {id}, "Mcp-Protocol-Version": {"2025-11-25"}, "Authorization": {"Bearer " + token}}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return fmt.Sprint(resp.StatusCode, resp.Header.Get("Content-Type"), string(body))
	}
	for _, method := range []string{http.MethodPost, http.MethodGet, http.MethodDelete} {
		got, want := answer(method, alice.ID(), tm.token("bob")), answer(method, "no-such-session", tm.token("bob"))
		if got != want || !strings.HasPrefix(got, "404") {
			t.Errorf("%s: %q, want %q", method, got, want)
		}
	}
	if got := answer(http.MethodPost, alice.ID(), "garbage"); !strings.HasPrefix(got, "401") {
		t.Errorf("without a token: %s", got)
	}
	// A new token of the same user goes on.
	if got := answer(http.MethodPost, alice.ID(), tm.token("alice")); !strings.HasPrefix(got, "200") {
		t.Errorf("with a new token: %s", got)
	}
}

// TestConnectAll: one remote after the other, by one button.
func TestConnectAll(t *testing.T) {
	t.Parallel()
	tm := newTeam(t, "")
	alice := tm.client("alice", authtest.ProtocolLegacy)
	b := tm.browser("alice")
	page := b.Open(link(t, alice.Call("notes_echo", nil), "notes"))
	if !strings.Contains(page.Body, "files") {
		t.Errorf("the page does not say what else waits:\n%s", page.Body)
	}
	page = b.Submit(page, "Continue, then the other")
	if !strings.Contains(page.Body, "Sign in to files?") {
		t.Fatalf("after the first: %s\n%s", page.URL, page.Body)
	}
	page = b.Submit(page, "Continue")
	if page.URL[:len(tm.base())+2] != tm.base()+"/?" || !strings.Contains(page.Body, "signed in to every remote") {
		t.Errorf("after the last: %s\n%s", page.URL, page.Body)
	}
	echo(t, alice, "notes_echo", "one")
	echo(t, alice, "files_echo", "two")
	// Out of everything, and out of the gateway.
	if page = b.Submit(page, "Sign out of everything"); !strings.Contains(page.Body, "signed out") {
		t.Errorf("signing out: %s", page.Body)
	}
	link(t, alice.Call("files_echo", nil), "files")
	if page = b.Submit(page, "Log out"); page.Status != http.StatusOK || !strings.Contains(page.Body, "logged out") {
		t.Errorf("logging out: %d %s", page.Status, page.Body)
	}
	if page := b.Get(tm.base() + "/"); page.Status != http.StatusSeeOther || !strings.HasPrefix(page.Header.Get("Location"), "/login") {
		t.Errorf("still logged in: %d %s", page.Status, page.Header.Get("Location"))
	}
}

// TestUsersShareWhatKeepsNothing: at a remote without sign-in that keeps no state
// users have one handshake in common; at one with MCP sessions, and
// at one that may want a sign-in, each has their own.
func TestUsersShareWhatKeepsNothing(t *testing.T) {
	idp := authtest.NewAS(t)
	stateless, stateful, maybe := authtest.NewRemote(t, authtest.RemoteConfig{Stateless: true}), authtest.NewRemote(t, authtest.RemoteConfig{}), authtest.NewRemote(t, authtest.RemoteConfig{Stateless: true})
	gw := startServe(t, fmt.Sprintf(`{"mcpServers": {"one": {"url": %q, "auth": {"type": "none"}}, "each": {"url": %q, "auth": {"type": "none"}}, "may": {"url": %q}},
		"gateway": {"auth": {"issuer": %q, "clientId": "gatehouse"}}}`, stateless.URL, stateful.URL, maybe.URL, idp.Issuer()))
	const users = 4
	for i := range users {
		user := fmt.Sprint("user", i)
		c := authtest.Connect(t, authtest.ClientConfig{URL: gw.url, Token: idp.JWTFor(user, gw.url, nil), Protocol: authtest.ProtocolModern})
		for _, remote := range []string{"one", "each", "may"} {
			if got := authtest.Text(c.Call(remote+"_echo", map[string]any{"text": user})); got != user {
				t.Errorf("%s at %s got %q", user, remote, got)
			}
		}
	}
	for _, tt := range []struct {
		remote *authtest.Remote
		method string
		want   int
	}{
		{stateless, "server/discover", 1}, {stateless, "initialize", 0}, {stateful, "initialize", users}, {maybe, "server/discover", users},
	} {
		if n := tt.remote.Calls(tt.method); n != tt.want {
			t.Errorf("%d of %s, want %d", n, tt.method, tt.want)
		}
	}
}
