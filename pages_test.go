package main

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"

	"gatehouse/auth/authtest"
)

const longRemote = "quarterly-reports-of-the-northern-region"

// company is one whose people use a gateway in real browsers: three remotes
// of two issuers, one of which has a login form, and names as long as they get.
type company struct {
	idp, as *authtest.AS
	op      *authtest.OP
	gw      *process
	base    string
	t       *testing.T
}

func newCompany(t *testing.T) *company {
	t.Helper()
	c := &company{t: t, idp: authtest.NewAS(t), op: authtest.NewOP(t, authtest.OPConfig{}),
		as: authtest.StartAS(t, authtest.ASConfig{Path: "/tenants/0f8fad5b-d9cb-469f-a165-70867728950e/northern-region/v2.0"})}
	c.idp.Set(func(k *authtest.ASKnobs) { k.IDToken = map[string]any{} })
	notes := authtest.NewRemote(t, authtest.RemoteConfig{AS: c.as})
	reports := authtest.NewRemote(t, authtest.RemoteConfig{AS: c.as})
	reports.Set(func(k *authtest.RemoteKnobs) {
		k.Scopes = []string{"https://reports.example.com/auth/documents.readonly", "https://reports.example.com/auth/comments", "offline"}
	})
	wiki := authtest.NewRemote(t, authtest.RemoteConfig{AS: c.op})
	c.gw = startServe(t, fmt.Sprintf(`{"mcpServers": {"notes": {"url": %q}, %q: {"url": %q}, "wiki": {"url": %q}},
		"gateway": {"auth": {"issuer": %q, "clientId": "gatehouse", "clientSecret": "canary-cs-gateway-1"}}}`,
		notes.URL, longRemote, reports.URL, wiki.URL, c.idp.Issuer()))
	c.base = strings.TrimSuffix(c.gw.url, "/mcp")
	c.idp.AddClient(authtest.OAuthClient{ID: "gatehouse", Secret: "canary-cs-gateway-1", Method: "client_secret_basic",
		RedirectURIs: []string{c.base + "/login/callback"}})
	return c
}

// atTheDoor says who the company's provider will say is there.
func (c *company) atTheDoor(user string) {
	c.idp.Set(func(k *authtest.ASKnobs) { k.User = user })
}

func (c *company) client(user string) *authtest.Client {
	c.t.Helper()
	return authtest.Connect(c.t, authtest.ClientConfig{URL: c.gw.url, Token: c.idp.JWTFor(user, c.gw.url, nil)})
}

// tab is one tab of a browser.
type tab struct {
	context.Context
	t *testing.T
}

func (b tab) do(steps ...chromedp.Action[chromedp.Void]) {
	b.t.Helper()
	if err := chromedp.Do(b, steps...); err != nil {
		b.t.Fatalf("%v\n%s\n%s", err, b.at(), b.body())
	}
}

func (b tab) open(url string) {
	b.t.Helper()
	b.do(chromedp.Navigate(url), chromedp.WaitVisible(chromedp.CSS("main")))
}

// press clicks, and waits for a text that only the next page has.
func (b tab) press(selector, then string) {
	b.t.Helper()
	b.do(chromedp.Click(chromedp.CSS(selector)), waitFor(then))
}

func waitFor(text string) chromedp.Action[chromedp.Void] {
	return chromedp.WaitVisible(chromedp.Search(`//*[self::h1 or self::p or self::button][contains(., "` + text + `")]`))
}

// another opens another tab of the same browser.
func (b tab) another() tab {
	b.t.Helper()
	ctx, cancel := chromedp.NewContext(b)
	b.t.Cleanup(cancel)
	return tab{ctx, b.t}
}

func (b tab) at() string {
	at, err := chromedp.Run(b, chromedp.Location())
	if err != nil {
		return err.Error()
	}
	return at
}

func (b tab) body() string {
	said, err := chromedp.Run(b, chromedp.Evaluate[string]("document.body.innerText"))
	if err != nil {
		return err.Error()
	}
	return said
}

func (b tab) says(want ...string) {
	b.t.Helper()
	said := b.body()
	for _, w := range want {
		if !strings.Contains(said, w) {
			b.t.Errorf("%s does not say %q:\n%s", b.at(), w, said)
		}
	}
}

// faults finds what a page lacks for those who cannot see it well or at all. Its
// contrast is that of WCAG 2.2, 1.4.3, for small text.
const faults = `(() => {
	const found = [];
	if (!document.documentElement.lang) found.push("no language");
	if (!document.title.trim()) found.push("no title");
	if (!document.querySelector("main")) found.push("no main");
	const h1 = document.querySelectorAll("h1").length;
	if (h1 !== 1) found.push(h1 + " h1");
	const ids = [...document.querySelectorAll("[id]")].map(e => e.id);
	for (const id of ids) if (ids.indexOf(id) !== ids.lastIndexOf(id)) found.push("id twice: " + id);
	for (const e of document.querySelectorAll("[aria-labelledby]"))
		if (!document.getElementById(e.getAttribute("aria-labelledby"))) found.push("labelled by nothing: " + e.outerHTML.slice(0, 80));
	const names = [];
	for (const e of document.querySelectorAll("button, a, summary")) {
		const name = (e.getAttribute("aria-label") || e.textContent).replace(/\s+/g, " ").trim();
		if (!name) found.push("no name: " + e.outerHTML.slice(0, 80));
		if (e.tagName === "BUTTON" && names.includes(name)) found.push("two buttons named " + name);
		if (e.tagName === "BUTTON") names.push(name);
		const box = e.getBoundingClientRect();
		if (e.tagName === "BUTTON" && box.width && box.height < 40) found.push("a button of " + box.height + "px: " + name);
	}
	for (const e of document.querySelectorAll("input:not([type=hidden])")) if (!e.labels.length) found.push("no label: " + e.name);
	for (const e of document.querySelectorAll("script, [onclick], [onload]")) found.push("a script: " + e.outerHTML.slice(0, 80));
	const width = document.documentElement.clientWidth;
	if (document.documentElement.scrollWidth > width) found.push("wider than the window: " + document.documentElement.scrollWidth + " of " + width);
	const rgb = s => (s.match(/[\d.]+/g) || []).map(Number);
	const light = c => {
		const [r, g, b] = c.slice(0, 3).map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
		return 0.2126 * r + 0.7152 * g + 0.0722 * b;
	};
	let texts = 0;
	for (const e of document.body.querySelectorAll("*")) {
		if (![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())) continue;
		const ink = getComputedStyle(e).color;
		let paper = [0, 0, 0, 0];
		for (let p = e; p && paper[3] === 0; p = p.parentElement) {
			const c = rgb(getComputedStyle(p).backgroundColor);
			paper = c.length === 3 ? [...c, 1] : c;
		}
		texts++;
		const [a, b] = [light(rgb(ink)), light(paper)].sort((x, y) => y - x);
		const ratio = (a + 0.05) / (b + 0.05);
		if (paper[3] !== 1 || ratio < 4.5) found.push("contrast " + ratio.toFixed(2) + ": " + e.textContent.trim().slice(0, 40));
		const box = e.getBoundingClientRect();
		if (e.textContent.trim().length > 8 && box.width < 80 && box.height > 100) found.push("squashed: " + e.textContent.trim().slice(0, 40));
		if (box.right > width + 1) found.push("cut off: " + e.textContent.trim().slice(0, 40));
	}
	if (!texts) found.push("no text");
	return found;
})()`

// look looks at a page as people do: at a desk and on a phone, by day and by
// night. It is kept as screenshots.
func (b tab) look(name string) {
	b.t.Helper()
	for _, scheme := range []string{"light", "dark"} {
		for size, width := range map[string]int64{"desk": 1000, "phone": 390} {
			b.do(func(ctx context.Context, target *chromedp.Target) (chromedp.Void, error) {
				_, err := cdp.Call(ctx, target, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{
					Features: []*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: scheme}}})
				return chromedp.Void{}, err
			}, chromedp.EmulateViewport(width, 800))
			found, err := chromedp.Run(b, chromedp.Evaluate[[]string](faults))
			if err != nil {
				b.t.Fatal(err)
			}
			for _, fault := range found {
				b.t.Errorf("%s, %s, %s: %s", name, size, scheme, fault)
			}
			screenshot(b.t, b, name+"-"+size+"-"+scheme)
		}
	}
}

const (
	consent   = `form[method=post] button` // of the connect page
	signedIn  = "You are signed in"
	wikiLogin = "Demo identity provider"
)

// TestTeamPages: a user signs in by a link, looks back, and goes on; somebody
// else at the same link is turned away.
func TestTeamPages(t *testing.T) {
	c := newCompany(t)
	c.idp.Set(func(k *authtest.ASKnobs) {
		k.IDToken = map[string]any{"email": "alexandra.montgomery-featherstonehaugh@northern-region.example.com"}
	})
	alice := c.client("alice")
	hers := link(t, alice.Call("notes_echo", nil), "notes")
	b := tab{newBrowser(t, nil), t}

	// Logged in, and back to the page of the link.
	c.atTheDoor("alice")
	b.open(hers)
	b.says("Sign in to notes?", "alexandra.montgomery", c.as.Issuer(), "authtest-client")
	b.look("team-connect")
	if at := b.at(); at != hers {
		t.Errorf("the login led to %s", at)
	}

	// Two tabs of one link: either finishes, and both then say what came of it.
	other := b.another()
	other.open(hers)
	b.press(consent, signedIn)
	b.says("You are signed in", "notes is connected")
	b.look("team-signed-in")
	other.press(consent, signedIn)
	other.says("You are signed in", "notes is connected")
	echo(t, alice, "notes_echo", "hers")
	if n := c.as.Count(authtest.EndpointToken); n != 1 {
		t.Errorf("%d codes were redeemed", n)
	}

	// Back, after it: no form that was used is offered again.
	b.do(chromedp.NavigateBack(), chromedp.WaitVisible(chromedp.CSS("main")))
	b.open(hers)
	b.says("You are signed in")

	// Bob at her next link.
	next := link(t, alice.Call("wiki_echo", nil), "wiki")
	bob := tab{newBrowser(t, nil), t}
	c.idp.Set(func(k *authtest.ASKnobs) { k.IDToken = map[string]any{} })
	c.atTheDoor("bob")
	bob.open(next)
	bob.says("This link was made for another account")
	bob.look("team-another-account")
	// The account is theirs, too.
	c.atTheDoor("alice")
	bob.press(".again a", "Sign in to wiki?")
	bob.says("Sign in to wiki?", "alice", "another account has opened this link")
	bob.look("team-stranger")

	// Back in the middle of it, and forth again.
	b.open(next)
	b.press(consent, wikiLogin)
	b.do(chromedp.NavigateBack(), waitFor("Sign in to wiki?"))
	b.says("Sign in to wiki?")
	b.press(consent, wikiLogin)
	// A provider that says no, and then yes.
	b.press("button[value=cancel]", "Access was not granted")
	b.says("Access was not granted")
	b.look("team-denied")
	b.press(".again a", "Sign in to wiki?")
	if at := b.at(); at != next {
		t.Errorf("another try is at %s, want %s", at, next)
	}
	b.press(consent, wikiLogin)
	b.do(chromedp.SetValue(chromedp.CSS("#username"), "alice"), chromedp.SetValue(chromedp.CSS("#password"), "alice"))
	b.press("button[value=signin]", signedIn)
	echo(t, alice, "wiki_echo", "hers")

	b.open(c.base + "/connect/" + strings.Repeat("x", 26))
	b.says("This link has expired")
	b.look("team-expired")
	if strings.Contains(c.gw.output(), "canary-") {
		t.Error("a secret is in the log")
	}
}

// TestTeamTour: all remotes one after the other, by the connect page and by the
// status page; out of one, out of all, out of the gateway, and in as another.
func TestTeamTour(t *testing.T) {
	c := newCompany(t)
	alice := c.client("alice")
	hers := link(t, alice.Call("notes_echo", nil), "notes")
	b := tab{newBrowser(t, nil), t}
	c.atTheDoor("alice")
	atWiki := func() {
		t.Helper()
		b.do(chromedp.SetValue(chromedp.CSS("#username"), "alice"), chromedp.SetValue(chromedp.CSS("#password"), "alice"))
		b.press("button[value=signin]", "You are signed in to every remote")
		b.says("You are signed in to every remote")
		for _, remote := range []string{"notes", longRemote, "wiki"} {
			echo(t, alice, remote+"_echo", "after the tour")
		}
	}
	all := "button[name=all]"

	// From the link's page.
	b.open(hers)
	b.says("Continue, then the 2 others", longRemote, "wiki")
	b.press(all, "Sign in to "+longRemote)
	b.look("team-tour")
	b.press(all, "Sign in to wiki?")
	b.press(consent, wikiLogin)
	atWiki()
	b.look("team-home")
	// By the keyboard: what has the focus shows it.
	b.do(chromedp.KeyEvent(kb.Tab))
	focus, err := chromedp.Run(b, chromedp.Evaluate[string](
		`(e => e.textContent + ", " + (getComputedStyle(e).outlineStyle === "solid" && parseFloat(getComputedStyle(e).outlineWidth) >= 2))(document.activeElement)`))
	if err != nil || focus != "Log out, true" {
		t.Errorf("the focus: %q, %v", focus, err)
	}

	// Out of one, and of everything.
	b.press(".remotes > li:first-child button.quiet", "notes: signed out")
	b.says("notes: signed out")
	b.look("team-home-one-out")
	b.press("summary", "Every sign-in above ends")
	b.look("team-home-asks")
	b.press("details button", "Sign in to all 3")
	b.look("team-home-out")
	if access, refresh := c.as.Live(); access != 0 || refresh != 0 {
		t.Errorf("%d access and %d refresh tokens live on", access, refresh)
	}

	// From the status page.
	b.press(all, "Sign in to notes?")
	b.says("then the 2 others")
	b.press(all, "Sign in to "+longRemote)
	b.press(all, "Sign in to wiki?")
	b.press(consent, wikiLogin)
	atWiki()

	// A page that was left open when the login ended in another tab, where the
	// provider then says no at first.
	left := b.another()
	left.open(c.base + "/")

	// Out of the gateway, and in as somebody else.
	b.press(`form[action="/logout"] button`, "You are logged out")
	b.says("You are logged out")
	b.look("team-logged-out")
	echo(t, alice, "notes_echo", "her assistant goes on")
	left.press(".remotes > li:first-child button", "You are not logged in")
	left.look("team-login-ended")
	c.idp.Set(func(k *authtest.ASKnobs) { k.Deny = "access_denied" })
	left.press(".again a", "Access was not granted")
	c.idp.Set(func(k *authtest.ASKnobs) { k.Deny = "" })
	left.press(".again a", "for you, alice")
	c.atTheDoor("bob")
	b.press(".again a", "Sign in to all 3")
	b.says("for you, bob", "Sign in to all 3")
	if got := c.idp.Requests(authtest.EndpointAuthorize); got[len(got)-1].Query.Get("prompt") != "login" {
		t.Error("the provider was not told to ask who it is")
	}
}
