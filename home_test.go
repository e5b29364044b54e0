package main

import (
	"fmt"
	"io"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"testing"

	"github.com/chromedp/chromedp"

	"gatehouse/auth/authtest"
)

// manyRemotes is a gateway for the local user with a remote that wants a
// sign-in, an open one, one that is down and one that is switched off.
func manyRemotes(t *testing.T) *world {
	t.Helper()
	w := &world{as: authtest.NewAS(t)}
	w.remote = authtest.NewRemote(t, authtest.RemoteConfig{AS: w.as, Name: "Notes<b>server</b>"})
	open := authtest.NewRemote(t, authtest.RemoteConfig{})
	w.gw = startServe(t, fmt.Sprintf(`{"mcpServers": {"notes": {"url": %q}, "weather": {"url": %q}, "archive": {"url": "http://127.0.0.1:1/mcp"},
		"old wiki": {"url": "https://wiki.example.com/mcp", "disabled": true}}, "gateway": {"sessions": "shared"}}`, w.remote.URL, open.URL))
	w.guardSecrets(t)
	return w
}

// TestStatusPage: how the remotes stand, a sign-in and a sign-out, in a browser
// of this machine, on a phone, in the dark and without scripts.
func TestStatusPage(t *testing.T) {
	for _, look := range []struct {
		name          string
		width, height int64
		flags         map[string]any
	}{
		{"wide", 1000, 900, nil},
		{"phone-dark", 360, 740, map[string]any{"blink-settings": "preferredColorScheme=0,scriptEnabled=false"}},
	} {
		t.Run(look.name, func(t *testing.T) {
			w := manyRemotes(t)
			browser := newBrowser(t, look.flags)
			run := func(steps ...chromedp.Action[chromedp.Void]) {
				t.Helper()
				if err := chromedp.Do(browser, steps...); err != nil {
					t.Fatal(err)
				}
			}
			home := strings.TrimSuffix(w.gw.url, "/mcp") + "/"
			run(chromedp.EmulateViewport(look.width, look.height), chromedp.Navigate(home), chromedp.WaitVisible(chromedp.CSS("li button")))
			screenshot(t, browser, "status-before-"+look.name)
			said := text(t, browser, "main")
			for _, want := range []string{`notes\s+Sign-in needed\s+Sign in`, `weather\s+Connected, 3 tools`, `archive\s+Unavailable[\s\S]*connection refused[\s\S]*tried again by itself`, `old wiki\s+Switched off`} {
				if !regexp.MustCompile(want).MatchString(said) {
					t.Errorf("the page does not say %q: %s", want, said)
				}
			}
			run(chromedp.Click(chromedp.CSS(".remotes > li:first-child button")), chromedp.WaitVisible(chromedp.CSS("main.ok")),
				chromedp.Click(chromedp.CSS("footer a")), chromedp.WaitVisible(chromedp.CSS("li button.quiet")))
			screenshot(t, browser, "status-"+look.name)
			if said := text(t, browser, ".remotes > li:first-child"); !regexp.MustCompile(`Connected, 3 tools[\s\S]*Notes<b>server</b>`).MatchString(said) || !strings.Contains(said, w.as.Issuer()) {
				t.Errorf("signed in, the page says %s", said)
			}
			run(chromedp.Click(chromedp.CSS("summary")), chromedp.Click(chromedp.CSS("details button")), chromedp.WaitVisible(chromedp.CSS("[role=status]")))
			screenshot(t, browser, "status-after-"+look.name)
			if said := text(t, browser, "[role=status]"); !strings.Contains(said, "notes: signed out; the tokens are revoked") {
				t.Errorf("signed out, the page says %s", said)
			}
			if access, refresh := w.as.Live(); access != 0 || refresh != 0 {
				t.Errorf("%d access and %d refresh tokens are live after signing out of everything", access, refresh)
			}
		})
	}
}

// TestStatusPageForms: only the page's own forms do anything, and a GET nothing.
func TestStatusPageForms(t *testing.T) {
	t.Parallel()
	w := manyRemotes(t)
	base := strings.TrimSuffix(w.gw.url, "/mcp")
	client := &http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	do := func(method, path string, form url.Values, header http.Header) (*http.Response, string) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), method, base+path, strings.NewReader(form.Encode()))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		for name := range header {
			req.Header.Set(name, header.Get(name))
		}
		req.Host = header.Get("Host")
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp, string(body)
	}
	resp, body := do("GET", "/", nil, nil)
	if resp.StatusCode != http.StatusOK || w.as.Count(authtest.EndpointRegister) != 0 || strings.Contains(body, "/connect/") {
		t.Errorf("GET: %s, %d registrations", resp.Status, w.as.Count(authtest.EndpointRegister))
	}
	for name, want := range map[string]string{"Content-Security-Policy": "default-src 'none'", "X-Frame-Options": "DENY", "Cache-Control": "no-store"} {
		if got := resp.Header.Get(name); !strings.Contains(got, want) {
			t.Errorf("%s: %q", name, got)
		}
	}
	token := regexp.MustCompile(`name="token" value="([^"]+)"`).FindStringSubmatch(body)
	if token == nil {
		t.Fatal("the forms have no token")
	}
	signIn(t, base+"/connect/"+flowOf(t, w))
	good := url.Values{"token": {token[1]}, "remote": {"notes"}}
	for _, tt := range []struct {
		what, method, path string
		form               url.Values
		header             http.Header
		want               int
	}{
		{"without a token", "POST", "/signout", url.Values{"remote": {"notes"}}, nil, 403},
		{"with another token", "POST", "/signout", url.Values{"remote": {"notes"}, "token": {token[1] + "x"}}, nil, 403},
		{"from another site", "POST", "/signout", good, http.Header{"Origin": {"https://evil.example.com"}}, 403},
		{"from another site, by the browser's word", "POST", "/signout", good, http.Header{"Sec-Fetch-Site": {"cross-site"}}, 403},
		{"by a GET", "GET", "/signout?" + good.Encode(), nil, nil, 405},
		{"of a remote that there is not", "POST", "/signout", url.Values{"token": {token[1]}, "remote": {"nobody"}}, nil, 403},
		{"to a remote that there is not", "POST", "/signin", url.Values{"token": {token[1]}, "remote": {"nobody"}}, nil, 403},
		{"with a form that never ends", "POST", "/signout", url.Values{"token": {token[1]}, "x": {strings.Repeat("x", 1<<20)}}, nil, 403},
		{"at another name", "POST", "/signout", good, http.Header{"Host": {"evil.example.com"}}, 403},
		{"in a frame", "GET", "/", nil, http.Header{"Sec-Fetch-Dest": {"iframe"}}, 403},
		{"with words of somebody else's", "GET", "/?said=You+have+won", nil, nil, 200},
		{"with what was sealed for something else", "GET", "/?said=" + token[1], nil, nil, 200},
	} {
		if resp, body := do(tt.method, tt.path, tt.form, tt.header); resp.StatusCode != tt.want || strings.Contains(body, "You have won") || strings.Contains(body, `class="said"`) {
			t.Errorf("%s: %s, want %d", tt.what, resp.Status, tt.want)
		}
	}
	if access, _ := w.as.Live(); access != 1 {
		t.Fatalf("%d access tokens are live: one of those was heard", access)
	}
	if resp, _ := do("POST", "/signout", good, http.Header{"Origin": {base}}); resp.StatusCode != http.StatusSeeOther {
		t.Errorf("the page's own form: %s", resp.Status)
	}
	if access, _ := w.as.Live(); access != 0 {
		t.Errorf("%d access tokens are live after signing out", access)
	}
}

// flowOf asks for a sign-in as a client of the local user does.
func flowOf(t *testing.T, w *world) string {
	t.Helper()
	url := link(t, authtest.Legacy(t, w.gw.url).Call("notes_echo", nil), "notes")
	return url[strings.LastIndex(url, "/")+1:]
}

// TestStatusPageElsewhere: where others can reach the pages, nobody is known to
// be at the browser.
func TestStatusPageElsewhere(t *testing.T) {
	t.Parallel()
	remote := authtest.NewRemote(t, authtest.RemoteConfig{})
	gw := startServe(t, config(`{"publicUrl": "https://gw.example.com"}`, "r", remote.URL))
	resp, err := http.Get(strings.TrimSuffix(gw.url, "/mcp") + "/")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusNotFound {
		t.Errorf("%s", resp.Status)
	}
}

// formsToken is what the forms of the status page carry.
func formsToken(t *testing.T, page *authtest.Page) string {
	t.Helper()
	token := regexp.MustCompile(`name="token" value="([^"]+)"`).FindStringSubmatch(page.Body)
	if token == nil {
		t.Fatalf("the page has no forms: %d %s", page.Status, page.Body)
	}
	return token[1]
}

// submit posts a form of the status page and goes where that leads.
func submit(t *testing.T, browser *authtest.Browser, link string, form url.Values) *authtest.Page {
	t.Helper()
	page := browser.Do(http.MethodPost, link, form)
	if page.Status != http.StatusSeeOther {
		t.Fatalf("the form: %d %s", page.Status, page.Body)
	}
	base, err := url.Parse(link)
	if err != nil {
		t.Fatal(err)
	}
	next, err := base.Parse(page.Header.Get("Location"))
	if err != nil {
		t.Fatal(err)
	}
	return browser.Open(next.String())
}

// TestStatusPageLogin: where one login at the gateway is the sign-in to its
// remotes, the page begins it, shows it and ends it.
func TestStatusPageLogin(t *testing.T) {
	t.Parallel()
	o := newOfficeOn(t, loginSecret, func(config string) *process { return startStdio(t, config) })
	client := stdioClient(t, o.gw)
	home := o.gw.url + "/"
	browser := authtest.NewBrowser(t)
	page := browser.Get(home)
	if strings.Contains(page.Body, "Your login at the gateway") {
		t.Errorf("before the login: %s", page.Body)
	}
	token := formsToken(t, page)
	if page = submit(t, browser, home+"signin", url.Values{"token": {token}, "remote": {"files"}}); page.Status != http.StatusOK || !strings.Contains(page.Body, "You are") {
		t.Fatalf("the sign-in: %d %s %s", page.Status, page.URL, page.Body)
	}
	echo(t, client, "files_echo", "by the page's login")
	page = browser.Get(home)
	for _, want := range []string{"Your login at the gateway", "Logged in", o.idp.Issuer()} {
		if !strings.Contains(page.Body, want) {
			t.Errorf("logged in, the page does not say %q: %s", want, page.Body)
		}
	}
	page = submit(t, browser, home+"signout", url.Values{"token": {token}})
	if !strings.Contains(page.Body, "your login at the gateway: signed out") || strings.Contains(page.Body, "Logged in") {
		t.Errorf("signed out: %s", page.Body)
	}
	if _, refresh := o.idp.Live(); refresh != 0 {
		t.Errorf("%d refresh tokens live on", refresh)
	}
}

// TestStatusPageOthers: clients with sign-ins of their own are said to be there.
func TestStatusPageOthers(t *testing.T) {
	t.Parallel()
	as := authtest.NewAS(t)
	remote := authtest.NewRemote(t, authtest.RemoteConfig{AS: as})
	gw := startServe(t, fmt.Sprintf(`{"mcpServers": {"notes": {"url": %q}}}`, remote.URL))
	authtest.Legacy(t, gw.url)
	page := authtest.NewBrowser(t).Get(strings.TrimSuffix(gw.url, "/mcp") + "/")
	if !strings.Contains(page.Body, "One client is connected with sign-ins of its own") {
		t.Errorf("not mentioned: %s", page.Body)
	}
}

// TestStatusPageOfStdio: it is where the sign-in pages of stdio are, too.
func TestStatusPageOfStdio(t *testing.T) {
	t.Parallel()
	w := &world{as: authtest.NewAS(t)}
	w.remote = authtest.NewRemote(t, authtest.RemoteConfig{AS: w.as})
	p := startStdio(t, onPort(t, "notes", w.remote.URL))
	client := stdioClient(t, p)
	browser := authtest.NewBrowser(t)
	token := formsToken(t, browser.Get(p.url+"/"))
	if page := submit(t, browser, p.url+"/signin", url.Values{"token": {token}, "remote": {"notes"}}); page.Status != http.StatusOK {
		t.Fatalf("the sign-in: %d %s", page.Status, page.Body)
	}
	echo(t, client, "notes_echo", "signed in by the page")
}
