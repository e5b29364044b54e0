package main

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"gatehouse/auth/authtest"
)

// roomy lifts the rate limits where a test is about something else.
const roomy = `{"limits": {"callbackPerMinute": 100000, "callbackPerMinuteTotal": 100000}}`

// stolen is a sign-in that has come as far as the callback's URL, which nobody
// has opened yet.
type stolen struct {
	browser  *authtest.Browser
	callback string
}

// steal walks a link to just before the callback.
func steal(t *testing.T, w *world, link string) stolen {
	t.Helper()
	browser := authtest.NewBrowser(t)
	page := browser.OpenUntil(link, strings.TrimSuffix(w.gw.url, "/mcp")+"/oauth/callback")
	if page.Next == "" {
		t.Fatalf("the walk ended at %d %s before the callback:\n%s", page.Status, page.URL, page.Body)
	}
	return stolen{browser, page.Next}
}

// with returns the callback with a parameter changed; an empty value removes it.
func (s stolen) with(t *testing.T, name, value string) string {
	t.Helper()
	u, err := url.Parse(s.callback)
	if err != nil {
		t.Fatal(err)
	}
	q := u.Query()
	if q.Set(name, value); value == "" {
		q.Del(name)
	}
	u.RawQuery = q.Encode()
	return u.String()
}

// refused asserts what a page that refuses must be like.
func refused(t *testing.T, what string, page *authtest.Page, status int) {
	t.Helper()
	if page.Status != status {
		t.Errorf("%s: %d, want %d:\n%s", what, page.Status, status, page.Body)
	}
	for name, want := range map[string]string{
		"X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store",
	} {
		if got := page.Header.Get(name); got != want {
			t.Errorf("%s: %s: %q, want %q", what, name, got, want)
		}
	}
	if csp := page.Header.Get("Content-Security-Policy"); !strings.Contains(csp, "default-src 'none'") || !strings.Contains(csp, "frame-ancestors 'none'") {
		t.Errorf("%s: Content-Security-Policy: %q", what, csp)
	}
	if strings.Contains(page.Body, "<script") || strings.Contains(page.Body, "canary") {
		t.Errorf("%s: the page holds a script or something foreign:\n%s", what, page.Body)
	}
}

// TestCallbackAttacks: what does not belong is refused, without a request to the
// authorization server, and the link still works for the one who asked.
func TestCallbackAttacks(t *testing.T) {
	t.Parallel()
	w := newWorld(t, roomy)
	client := authtest.Legacy(t, w.gw.url)
	link := link(t, client.Call("notes_echo", nil), "notes")

	// Each attack has a fresh state, which a refusal uses up only if the state
	// itself arrived.
	for _, tt := range []struct {
		name   string
		status int
		attack func(s stolen) *authtest.Page
	}{
		{"another browser", 403, func(s stolen) *authtest.Page { return authtest.NewBrowser(t).Get(s.callback) }},
		{"another browser with a cookie of its own flow", 403, func(s stolen) *authtest.Page {
			return steal(t, w, link).browser.Get(s.callback)
		}},
		{"another remote's path", 400, func(s stolen) *authtest.Page {
			return s.browser.Get(strings.Replace(s.callback, "/oauth/callback/notes", "/oauth/callback/other", 1))
		}},
		{"the plain path", 400, func(s stolen) *authtest.Page {
			return s.browser.Get(strings.Replace(s.callback, "/oauth/callback/notes", "/oauth/callback", 1))
		}},
		{"code and error together", 400, func(s stolen) *authtest.Page { return s.browser.Get(s.with(t, "error", "access_denied")) }},
		{"two codes", 400, func(s stolen) *authtest.Page { return s.browser.Get(s.callback + "&code=other") }},
		{"neither code nor error", 400, func(s stolen) *authtest.Page { return s.browser.Get(s.with(t, "code", "")) }},
		{"no state", 400, func(s stolen) *authtest.Page { return s.browser.Get(s.with(t, "state", "")) }},
		{"two states", 400, func(s stolen) *authtest.Page { return s.browser.Get(s.callback + "&state=x") }},
		{"a flipped bit", 400, func(s stolen) *authtest.Page {
			u, _ := url.Parse(s.callback)
			state := []byte(u.Query().Get("state"))
			state[7] ^= 1
			return s.browser.Get(s.with(t, "state", string(state)))
		}},
		{"a huge state", 400, func(s stolen) *authtest.Page { return s.browser.Get(s.with(t, "state", strings.Repeat("x", 50<<10))) }},
		{"a NUL", 400, func(s stolen) *authtest.Page { return s.browser.Get(s.with(t, "state", "a\x00b")) }},
		{"bad UTF-8", 400, func(s stolen) *authtest.Page { return s.browser.Get(s.with(t, "state", "\xff\xfe")) }},
		{"a malformed query", 400, func(s stolen) *authtest.Page { return s.browser.Get(s.callback + "&%zz") }},
		{"another issuer", 400, func(s stolen) *authtest.Page { return s.browser.Get(s.with(t, "iss", "https://evil.example.com")) }},
		{"no issuer, though advertised", 400, func(s stolen) *authtest.Page { return s.browser.Get(s.with(t, "iss", "")) }},
		{"another issuer's error", 400, func(s stolen) *authtest.Page {
			u, _ := url.Parse(s.with(t, "code", ""))
			q := u.Query()
			q.Set("iss", "https://evil.example.com")
			q.Set("error", "canary-error")
			q.Set("error_description", "canary-description")
			u.RawQuery = q.Encode()
			return s.browser.Get(u.String())
		}},
		{"HEAD", 405, func(s stolen) *authtest.Page { return s.browser.Do(http.MethodHead, s.callback, nil) }},
		{"POST", 405, func(s stolen) *authtest.Page {
			return s.browser.Do(http.MethodPost, s.callback, url.Values{"x": {"y"}})
		}},
		{"OPTIONS", 405, func(s stolen) *authtest.Page { return s.browser.Do(http.MethodOptions, s.callback, nil) }},
	} {
		s := steal(t, w, link)
		refused(t, tt.name, tt.attack(s), tt.status)
		if tt.status == http.StatusMethodNotAllowed {
			continue // the state is intact, and the last one below proves it
		}
		if n := w.as.Count(authtest.EndpointToken); n != 0 {
			t.Fatalf("%s: %d token requests", tt.name, n)
		}
	}

	s := steal(t, w, link)
	// A megabyte of state is more than is read of any request: no page sees it.
	resp, err := http.Get(s.with(t, "state", strings.Repeat("x", 1<<20)))
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
		t.Errorf("a megabyte of state: %s", resp.Status)
	}
	s.browser.Do(http.MethodHead, s.callback, nil)
	s.browser.Do(http.MethodPost, s.callback, nil)
	if page := s.browser.Open(s.callback); page.Status != http.StatusOK || !strings.Contains(page.Body, "You are signed in") {
		t.Fatalf("the right browser after all that: %d\n%s", page.Status, page.Body)
	}
	refused(t, "replayed", s.browser.Get(s.callback), 400)
	if n := w.as.Count(authtest.EndpointToken); n != 1 {
		t.Errorf("%d token requests, want 1", n)
	}
	echo(t, client, "notes_echo", "still mine")
}

// TestDenied: the provider says no, with words that nobody may see.
func TestDenied(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "")
	w.as.Set(func(k *authtest.ASKnobs) {
		k.Deny, k.DenyDescription = "access_denied", "<b>canary-description</b>"
	})
	client := authtest.Legacy(t, w.gw.url)
	url := link(t, client.Call("notes_echo", nil), "notes")
	page := authtest.NewBrowser(t).Open(url)
	refused(t, "denied", page, 400)
	if s := status(t, client)["notes"]; !strings.Contains(s.LastError, "did not grant") {
		t.Errorf("status: %+v", s)
	}
	w.as.Set(func(k *authtest.ASKnobs) { k.Deny = "" })
	signIn(t, link(t, client.Call("notes_echo", nil), "notes"))
	if strings.Contains(w.gw.output(), "canary-description") {
		t.Error("the log holds error_description")
	}
}

// TestManyCallbacksAtOnce: 100 identical callbacks, one token request.
func TestManyCallbacksAtOnce(t *testing.T) {
	t.Parallel()
	w := newWorld(t, roomy)
	client := authtest.Legacy(t, w.gw.url)
	s := steal(t, w, link(t, client.Call("notes_echo", nil), "notes"))
	var good atomic.Int32
	var wg sync.WaitGroup
	for range 100 {
		wg.Go(func() {
			switch page := s.browser.Get(s.callback); page.Status {
			case http.StatusSeeOther:
				good.Add(1)
			case http.StatusBadRequest:
			default:
				t.Errorf("a callback got %d", page.Status)
			}
		})
	}
	wg.Wait()
	if good.Load() != 1 || w.as.Count(authtest.EndpointToken) != 1 {
		t.Errorf("%d successes, %d token requests, want one of each", good.Load(), w.as.Count(authtest.EndpointToken))
	}
	echo(t, client, "notes_echo", "once")
}

// TestManyTabs: a link opened in five tabs, or by a preview bot 50 times, can
// be finished in any of the last ten; the first success ends all.
func TestManyTabs(t *testing.T) {
	t.Parallel()
	w := newWorld(t, roomy)
	client := authtest.Legacy(t, w.gw.url)
	for i := range 5 {
		url := link(t, client.Call("notes_echo", nil), "notes")
		bot := authtest.NewBrowser(t)
		for range 50 {
			if page := bot.Get(url); page.Status != http.StatusSeeOther {
				t.Fatalf("a preview got %d", page.Status)
			}
		}
		tabs := make([]stolen, 5)
		browser := authtest.NewBrowser(t)
		for tab := range tabs {
			page := browser.OpenUntil(url, strings.TrimSuffix(w.gw.url, "/mcp")+"/oauth/callback")
			tabs[tab] = stolen{browser, page.Next}
		}
		if page := browser.Open(tabs[i].callback); page.Status != http.StatusOK {
			t.Fatalf("tab %d: %d\n%s", i, page.Status, page.Body)
		}
		refused(t, "a tab after the first success", browser.Get(tabs[(i+1)%5].callback), 400)
		if page := browser.Get(url); page.Status != http.StatusOK || !strings.Contains(page.Body, "You are signed in") {
			t.Errorf("the link after the sign-in: %d\n%s", page.Status, page.Body)
		}
		client.Call("gateway_logout", map[string]any{"all": true})
	}
}

// TestUnknownLink and frames: a page, never a stack trace.
func TestUnknownLink(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "")
	base := strings.TrimSuffix(w.gw.url, "/mcp")
	browser := authtest.NewBrowser(t)
	refused(t, "an unknown link", browser.Get(base+"/connect/"+strings.Repeat("A", 26)), 404)
	refused(t, "HEAD", browser.Do(http.MethodHead, base+"/connect/x", nil), 405)
	refused(t, "POST", browser.Do(http.MethodPost, base+"/connect/x", nil), 405)

	client := authtest.Legacy(t, w.gw.url)
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, link(t, client.Call("notes_echo", nil), "notes"), nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Sec-Fetch-Dest", "iframe")
	resp, err := browser.Client().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusForbidden || len(resp.Cookies()) > 0 {
		t.Errorf("framed: %d, %d cookies", resp.StatusCode, len(resp.Cookies()))
	}
}

// TestConsentPage: where browsers of others reach the gateway, a GET changes
// nothing and only a Continue from the page itself begins.
func TestConsentPage(t *testing.T) {
	t.Parallel()
	w := newWorld(t, `{"publicUrl": "https://gw.example.com"}`)
	client := authtest.Legacy(t, w.gw.url)
	url := link(t, client.Call("notes_echo", nil), "notes")
	path, ok := strings.CutPrefix(url, "https://gw.example.com")
	if !ok {
		t.Fatalf("the link is %s", url)
	}
	ask := func(method string, header http.Header) *http.Response {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), method, strings.TrimSuffix(w.gw.url, "/mcp")+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Host, req.Header = "gw.example.com", header
		resp, err := authtest.NewBrowser(t).Client().Do(req)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { resp.Body.Close() })
		return resp
	}
	for range 50 {
		if resp := ask(http.MethodGet, http.Header{}); resp.StatusCode != http.StatusOK || len(resp.Cookies()) != 0 {
			t.Fatalf("GET: %d, %d cookies", resp.StatusCode, len(resp.Cookies()))
		}
	}
	page, err := io.ReadAll(ask(http.MethodGet, http.Header{}).Body)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"Sign in to notes?", w.as.Issuer(), `method="post"`, "Continue"} {
		if !strings.Contains(string(page), want) {
			t.Errorf("the page lacks %q:\n%s", want, page)
		}
	}
	for _, foreign := range []http.Header{{"Sec-Fetch-Site": {"cross-site"}}, {"Sec-Fetch-Site": {"same-site"}}, {"Origin": {"https://evil.example.com"}}, {"Origin": {"null"}}} {
		if resp := ask(http.MethodPost, foreign); resp.StatusCode != http.StatusForbidden || len(resp.Cookies()) != 0 {
			t.Errorf("POST with %v: %d, %d cookies", foreign, resp.StatusCode, len(resp.Cookies()))
		}
	}
	resp := ask(http.MethodPost, http.Header{"Sec-Fetch-Site": {"same-origin"}, "Origin": {"https://gw.example.com"}})
	if resp.StatusCode != http.StatusSeeOther || !strings.HasPrefix(resp.Header.Get("Location"), w.as.URL) {
		t.Fatalf("Continue: %d to %s", resp.StatusCode, resp.Header.Get("Location"))
	}
	if cookies := resp.Cookies(); len(cookies) != 1 || !strings.HasPrefix(cookies[0].Name, "__Host-") || !cookies[0].Secure || !cookies[0].HttpOnly || cookies[0].Path != "/" {
		t.Errorf("cookies: %v", cookies)
	}
	if n := w.as.Count(authtest.EndpointAuthorize); n != 0 {
		t.Errorf("%d requests reached the authorization server", n)
	}
}

// TestForeignPagesCallback: what a foreign page loads from the callback's address
// costs the sign-in nothing, neither its state nor its place under the limit.
func TestForeignPagesCallback(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "")
	mine := steal(t, w, link(t, authtest.Legacy(t, w.gw.url).Call("notes_echo", nil), "notes"))
	for _, kind := range []string{"image", "script", "empty", "iframe"} {
		for range 10 {
			req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, mine.callback, nil)
			if err != nil {
				t.Fatal(err)
			}
			req.Header.Set("Sec-Fetch-Dest", kind)
			resp, err := http.DefaultClient.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			resp.Body.Close()
			if resp.StatusCode != http.StatusForbidden {
				t.Errorf("%s: %s", kind, resp.Status)
			}
		}
	}
	if page := mine.browser.Open(mine.callback); page.Status != http.StatusOK || !strings.Contains(page.Body, "You are signed in") {
		t.Errorf("the sign-in: %d\n%s", page.Status, page.Body)
	}
}

// TestCallbackRateLimit: 20 per minute and address by default, then 429.
func TestCallbackRateLimit(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "")
	browser := authtest.NewBrowser(t)
	statuses := map[int]int{}
	for range 25 {
		page := browser.Get(strings.TrimSuffix(w.gw.url, "/mcp") + "/oauth/callback/notes?state=x&code=y")
		statuses[page.Status]++
		if page.Status == http.StatusTooManyRequests && page.Header.Get("Retry-After") == "" {
			t.Error("429 without Retry-After")
		}
	}
	// A new minute may begin in between, which allows a few more.
	if statuses[400] < 20 || statuses[429] == 0 && statuses[400] < 25 || statuses[400]+statuses[429] != 25 {
		t.Errorf("statuses: %v", statuses)
	}
}

// TestHostAndOrigin: rebound names and foreign pages get nothing.
func TestHostAndOrigin(t *testing.T) {
	t.Parallel()
	remote := authtest.NewRemote(t, authtest.RemoteConfig{})
	gw := startServe(t, config(`{"publicUrl": "https://gw.example.com", "allowedHosts": ["gw.internal"]}`, "r", remote.URL))
	host := strings.TrimSuffix(strings.TrimPrefix(gw.url, "http://"), "/mcp")
	initialize := `{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-11-25","capabilities":{},"clientInfo":{"name":"raw","version":"1"}}}`
	for _, tt := range []struct {
		host, origin string
		want         int
	}{
		{"", "", 200},
		{"localhost:9", "", 200}, // behind a port mapping
		{"gw.example.com", "", 200},
		{"gw.internal", "", 200},
		{"gw.example.com", "https://gw.example.com", 200},
		{"", "http://" + host, 200},
		{"evil.example.com", "", 403},
		{"127.0.0.1.evil.example.com", "", 403},
		{"", "https://evil.example.com", 403},
		{"", "null", 403},
		{"", "http://localhost:1", 403}, // another server of this machine
		{"", "file://", 403},
	} {
		header := http.Header{}
		if tt.host != "" {
			header.Set("Host", tt.host)
		}
		if tt.origin != "" {
			header.Set("Origin", tt.origin)
		}
		if got := post(t, gw.url, initialize, header); got.status != tt.want {
			t.Errorf("Host %q, Origin %q: %d, want %d: %s", tt.host, tt.origin, got.status, tt.want, got.body)
		}
	}
	// Who has to allow a host finds it in the log.
	gw.mu.Lock()
	defer gw.mu.Unlock()
	if !bytes.Contains(gw.log.Bytes(), []byte(`"host":"evil.example.com"`)) {
		t.Error("the log does not say which Host was refused")
	}
}

// TestNoSessionFromElsewhere: without a session all clients are the local user,
// so nobody from another machine may be one, unless the config says so.
func TestNoSessionFromElsewhere(t *testing.T) {
	t.Parallel()
	remote := authtest.NewRemote(t, authtest.RemoteConfig{})
	body := `{"jsonrpc":"2.0","id":1,"method":"tools/list","params":{"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientCapabilities":{},"io.modelcontextprotocol/clientInfo":{"name":"raw","version":"1"}}}}`
	for _, tt := range []struct {
		sessions string
		header   http.Header
		want     int
	}{
		{"isolated", http.Header{}, 200},
		{"isolated", http.Header{"Host": {"gw.example.com"}}, 403},
		{"isolated", http.Header{"X-Forwarded-For": {"192.0.2.1"}}, 403},
		{"isolated", http.Header{"Forwarded": {"for=192.0.2.1"}}, 403},
		{"shared", http.Header{"Host": {"gw.example.com"}}, 200},
	} {
		gw := startServe(t, config(fmt.Sprintf(`{"publicUrl": "https://gw.example.com", "sessions": %q}`, tt.sessions), "r", remote.URL))
		tt.header.Set("Mcp-Protocol-Version", "2026-07-28")
		tt.header.Set("Mcp-Method", "tools/list")
		if got := post(t, gw.url, body, tt.header); got.status != tt.want {
			t.Errorf("%s, %v: %d, want %d: %s", tt.sessions, tt.header, got.status, tt.want, got.body)
		}
	}
}

// TestRequestLimits: what is too large is refused, and the rest keeps serving.
func TestRequestLimits(t *testing.T) {
	t.Parallel()
	remote := authtest.NewRemote(t, authtest.RemoteConfig{})
	gw := startServe(t, config(`{"limits": {"bodyBytes": 1000000}}`, "r", remote.URL))
	client := authtest.Legacy(t, gw.url)
	if got := post(t, gw.url, `{"x":"`+strings.Repeat("x", 10<<20)+`"}`, nil); got.status != http.StatusRequestEntityTooLarge {
		t.Errorf("10 MB body: %d", got.status)
	}
	many := http.Header{}
	for i := range 10_000 {
		many.Set(fmt.Sprint("X-Header-", i), "x")
	}
	if got := post(t, gw.url, `{}`, many); got.status != http.StatusRequestHeaderFieldsTooLarge {
		t.Errorf("10,000 headers: %d", got.status)
	}
	for _, body := range []string{``, `null`, `[]`, `{`, `{"method":7}`, `"x"`, `{"jsonrpc":"2.0","id":1,"method":"tools/list"}`, strings.Repeat("[", 100_000)} {
		if got := post(t, gw.url, body, nil); got.status < 400 || got.status >= 500 {
			t.Errorf("body %.20q: %d: %s", body, got.status, got.body)
		}
	}
	echo(t, client, "r_echo", "alive")
}

// TestPrivateHeaderIsOurs: a client cannot smuggle params past its own body.
func TestPrivateHeaderIsOurs(t *testing.T) {
	t.Parallel()
	remote := authtest.NewRemote(t, authtest.RemoteConfig{})
	gw := startServe(t, config("", "r", remote.URL))
	resp := post(t, gw.url, `{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-11-25","capabilities":{},"clientInfo":{"name":"raw","version":"1"}}}`, nil)
	header := http.Header{
		"Mcp-Session-Id":   {resp.header.Get("Mcp-Session-Id")},
		"Gatehouse-Params": {`{"name":"r_echo","arguments":{"text":"smuggled"}}`},
	}
	post(t, gw.url, `{"jsonrpc":"2.0","method":"notifications/initialized"}`, header)
	got := post(t, gw.url, `{"jsonrpc":"2.0","id":2,"method":"tools/call","params":{"name":"r_echo","arguments":{"text":"honest"}}}`, header)
	if !strings.Contains(string(got.body), "honest") || strings.Contains(string(got.body), "smuggled") {
		t.Errorf("got %s", got.body)
	}
}

// TestHealth: liveness and readiness, and nothing else that listens.
func TestHealth(t *testing.T) {
	t.Parallel()
	remote := authtest.NewRemote(t, authtest.RemoteConfig{})
	gw := startServe(t, config("", "r", remote.URL))
	base := strings.TrimSuffix(gw.url, "/mcp")
	for path, want := range map[string]int{"/healthz": 200, "/readyz": 200, "/nothing": 404} {
		resp, err := http.Get(base + path)
		if err != nil {
			t.Fatal(err)
		}
		io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
		if resp.StatusCode != want {
			t.Errorf("%s: %d, want %d", path, resp.StatusCode, want)
		}
	}
}

// TestOAuthOff: no endpoints, the remote is reported, and nobody gets a link.
func TestOAuthOff(t *testing.T) {
	t.Parallel()
	w := newWorld(t, `{"oauth": {"enabled": false}}`)
	client := authtest.Legacy(t, w.gw.url)
	result := client.Call("notes_echo", nil)
	if _, asked := authtest.RequiredOf(result); asked || !result.IsError || !strings.Contains(authtest.Text(result), "switched off") {
		t.Errorf("a call: %s", authtest.Text(result))
	}
	base := strings.TrimSuffix(w.gw.url, "/mcp")
	for _, path := range []string{"/oauth/callback", "/oauth/callback/notes", "/connect/x", "/.well-known/oauth-client.json"} {
		if page := authtest.NewBrowser(t).Get(base + path); page.Status != http.StatusNotFound {
			t.Errorf("%s: %d, want 404", path, page.Status)
		}
	}
	if n := w.as.Count(""); n != 0 {
		t.Errorf("%d requests to the authorization server", n)
	}
}

// TestClientMetadata: the Client ID Metadata Document, where it can be fetched.
func TestClientMetadata(t *testing.T) {
	t.Parallel()
	remote := authtest.NewRemote(t, authtest.RemoteConfig{})
	gw := startServe(t, config(`{"publicUrl": "https://gw.example.com", "oauth": {"metadataPath": "/client.json", "callbackPath": "/cb", "scopes": ["a", "b"], "clientName": "Ours"}}`, "r", remote.URL))
	base := strings.TrimSuffix(gw.url, "/mcp")
	page := authtest.NewBrowser(t).Get(base + "/client.json")
	for _, want := range []string{
		`"client_id":"https://gw.example.com/client.json"`, `"https://gw.example.com/cb/r"`, `"https://gw.example.com/cb"`,
		`"token_endpoint_auth_method":"none"`, `"authorization_code"`, `"client_name":"Ours"`, `"scope":"a b"`,
	} {
		if !strings.Contains(strings.ReplaceAll(page.Body, `": `, `":`), want) {
			t.Errorf("the document lacks %s:\n%s", want, page.Body)
		}
	}
	if page.Status != 200 || page.Header.Get("Content-Type") != "application/json" || page.Header.Get("Access-Control-Allow-Origin") != "*" ||
		!strings.Contains(page.Header.Get("Cache-Control"), "max-age") {
		t.Errorf("%d, %v", page.Status, page.Header)
	}
	if page := authtest.NewBrowser(t).Do(http.MethodPost, base+"/client.json", nil); page.Status != http.StatusMethodNotAllowed {
		t.Errorf("POST: %d", page.Status)
	}
}

// TestMalformedRequests are answered in JSON-RPC, in the gateway's own words and
// with nothing of what was sent.
func TestMalformedRequests(t *testing.T) {
	t.Parallel()
	remote := authtest.NewRemote(t, authtest.RemoteConfig{})
	gw := startServe(t, config("", "r", remote.URL))
	began := post(t, gw.url, `{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-11-25","capabilities":{},"clientInfo":{"name":"raw","version":"1"}}}`, nil)
	session := http.Header{"Mcp-Session-Id": {began.header.Get("Mcp-Session-Id")}, "Mcp-Protocol-Version": {"2025-11-25"}}
	modern := http.Header{"Mcp-Protocol-Version": {"2026-07-28"}}
	for _, tt := range []struct {
		body   string
		header http.Header
		status int
		code   string
		id     string
	}{
		{`{"jsonrpc":"2.0","id":2,"method":"foo/bar"}`, session, 200, "-32601", "2"},
		{`{"jsonrpc":"2.0","id":"x","method":"tools/call","params":{"name":{"canary":1}}}`, session, 200, "-32602", `"x"`},
		{`{"jsonrpc":"2.0","id":3,"method":"tools/call"}`, session, 200, "-32602", "3"},
		{`{"canary`, session, 400, "-32700", "null"},
		{`{"canary":1}`, session, 400, "-32600", "null"},
		{`{"jsonrpc":"2.0","id":4,"method":"foo/bar"}`, modern, 404, "-32601", "4"},
		{`{"jsonrpc":"2.0","id":5,"method":"tools/call","params":{"name":7}}`, modern, 400, "-32602", "5"},
	} {
		got := post(t, gw.url, tt.body, tt.header)
		if got.status != tt.status || got.header.Get("Content-Type") != "application/json" || string(member(t, got.body, "id")) != tt.id ||
			string(member(t, member(t, got.body, "error"), "code")) != tt.code || bytes.Contains(got.body, []byte("canary")) {
			t.Errorf("%s: %d %s", tt.body, got.status, got.body)
		}
	}
}
