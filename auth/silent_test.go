package auth_test

import (
	"context"
	"encoding/base64"
	"errors"
	"log/slog"
	"net/http"
	"net/url"
	"path"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"gatehouse/auth"
	"gatehouse/auth/authtest"
	"gatehouse/auth/guard"
	"gatehouse/auth/secret"
	"gatehouse/exchange"
)

// office is a broker whose users log in at one provider, with a remote for each
// way of using that: files by exchange, wiki by forwarding, crm by an ID-JAG,
// and one that serves the gateway itself, jobs.
type office struct {
	*auth.Broker
	t                      testing.TB
	clock                  *clock
	idp, crmAS             *authtest.AS
	files, wiki, crm, jobs *authtest.Remote
	log                    *authtest.Canary
}

// newOffice starts it; change may be nil.
func newOffice(t testing.TB, change func(*office, *auth.Config)) *office {
	t.Helper()
	o := &office{t: t, idp: authtest.NewAS(t), crmAS: authtest.NewAS(t)}
	// Signatures are checked by the true time.
	o.clock = &clock{now: time.Now()}
	o.log = authtest.NewCanary(t, o.idp, o.crmAS)
	log := slog.New(slog.NewTextHandler(o.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	o.idp.Set(func(k *authtest.ASKnobs) { k.IDToken, k.JWT = map[string]any{}, true })
	o.idp.AddClient(authtest.OAuthClient{ID: "gatehouse", Secret: "canary-cs-gatehouse", Method: "client_secret_basic",
		RedirectURIs: []string{"http://127.0.0.1:8080/oauth/callback"}})
	o.crmAS.AddClient(authtest.OAuthClient{ID: "at-crm", Secret: "canary-cs-at-crm-01", Method: "client_secret_basic"})
	o.files = authtest.NewRemote(t, authtest.RemoteConfig{AS: o.idp})
	o.wiki = authtest.NewRemote(t, authtest.RemoteConfig{AS: o.idp})
	o.crm = authtest.NewRemote(t, authtest.RemoteConfig{AS: o.crmAS})
	o.jobs = authtest.NewRemote(t, authtest.RemoteConfig{AS: o.crmAS})
	o.files.Set(func(k *authtest.RemoteKnobs) { k.Audience = "files" })
	o.wiki.Set(func(k *authtest.RemoteKnobs) { k.Audience = "gatehouse" })

	clients, err := guard.New(guard.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(clients.Close)
	client := clients.Client(guard.Policy{Loopback: true})
	c := auth.Config{
		PublicURL: "http://127.0.0.1:8080", CallbackPath: "/oauth/callback",
		Store: auth.NewMemory(auth.MemoryConfig{}), Log: log, Now: o.clock.Now,
		Login: &auth.Login{Issuer: o.idp.Issuer(), ClientID: "gatehouse", ClientSecret: secret.New("canary-cs-gatehouse"), HTTP: client},
		Remotes: []auth.Remote{
			{Name: "files", URL: o.files.URL, Type: auth.TypeExchange, Audience: "files", HTTP: client},
			{Name: "wiki", URL: o.wiki.URL, Type: auth.TypeForward, Audience: "gatehouse", HTTP: client},
			{Name: "crm", URL: o.crm.URL, Type: auth.TypeIDJAG, ClientID: "at-crm", ClientSecret: secret.New("canary-cs-at-crm-01"), HTTP: client},
			{Name: "jobs", URL: o.jobs.URL, Type: auth.TypeMachine, ClientID: "at-crm", ClientSecret: secret.New("canary-cs-at-crm-01"), HTTP: client},
		},
	}
	if change != nil {
		change(o, &c)
	}
	if o.Broker, err = auth.New(c); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(o.Close)
	return o
}

func (o *office) remote(name string) *authtest.Remote {
	return map[string]*authtest.Remote{"files": o.files, "wiki": o.wiki, "crm": o.crm, "jobs": o.jobs}[name]
}

// send asks a remote as a session does: with the token that there is, and once
// more if the challenge brought another. It returns the last token.
func (o *office) send(p auth.Principal, name string) (token string, err error) {
	o.t.Helper()
	a := o.Authorizer(p, name)
	for range 2 {
		held, err := a.Token(o.t.Context())
		if err != nil {
			return "", err
		}
		req, err := http.NewRequestWithContext(o.t.Context(), http.MethodPost, o.remote(name).URL,
			strings.NewReader(`{"jsonrpc":"2.0","id":1,"method":"ping"}`))
		if err != nil {
			o.t.Fatal(err)
		}
		if held != nil {
			token = held.AccessToken
			held.SetAuthHeader(req)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			o.t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusUnauthorized && resp.StatusCode != http.StatusForbidden {
			return token, nil
		}
		if err := a.Challenge(o.t.Context(), resp); err != nil {
			return token, err
		}
	}
	return token, errors.New("refused twice")
}

// works fails the test unless the remote lets the principal in.
func (o *office) works(p auth.Principal, name string) string {
	o.t.Helper()
	token, err := o.send(p, name)
	if err != nil || token == "" {
		o.t.Fatalf("%s: %v", name, err)
	}
	return token
}

// fails returns the sentence with which a request fails.
func (o *office) fails(p auth.Principal, name string) string {
	o.t.Helper()
	_, err := o.send(p, name)
	e, ok := errors.AsType[*auth.Error](err)
	if !ok || e.Remote != name {
		o.t.Fatalf("%s: got %v, want a sentence", name, err)
	}
	return e.Say
}

// link returns the link that a request asks to open.
func (o *office) link(p auth.Principal, name string) *auth.RequiredError {
	o.t.Helper()
	_, err := o.send(p, name)
	required, ok := errors.AsType[*auth.RequiredError](err)
	if !ok || required.Remote != name {
		o.t.Fatalf("%s: got %v, want a link", name, err)
	}
	return required
}

// logIn follows a link to its end.
func (o *office) logIn(link *auth.RequiredError) error {
	o.t.Helper()
	start, err := o.Begin(o.t.Context(), path.Base(link.AuthURL), auth.Visit{})
	if err != nil {
		o.t.Fatal(err)
	}
	client := &http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	resp, err := client.Get(start.RedirectURL)
	if err != nil {
		o.t.Fatal(err)
	}
	resp.Body.Close()
	back, err := url.Parse(resp.Header.Get("Location"))
	if err != nil || back.Path != "/oauth/callback" {
		o.t.Fatalf("the provider sends the browser to %v, %v", back, err)
	}
	_, err = o.Finish(o.t.Context(), auth.Callback{Path: back.Path, Query: back.Query(),
		Cookie: func(name string) (string, bool) { return start.Cookie.Value.Value(), name == start.Cookie.Name }})
	return err
}

func (o *office) loggedIn(p auth.Principal) {
	o.t.Helper()
	if err := o.logIn(o.link(p, "files")); err != nil {
		o.t.Fatal(err)
	}
}

var alice, bob = auth.SessionPrincipal("alice"), auth.SessionPrincipal("bob")

// One login serves all, each user has their own, and a sign-out ends what came
// of it.
func TestLoginServesAll(t *testing.T) {
	o := newOffice(t, nil)
	first := o.link(alice, "crm")
	if again := o.link(alice, "wiki"); again.AuthURL != first.AuthURL {
		t.Error("two links for one login")
	}
	if s := o.Status(alice, "files"); s.SignedIn || s.Pending == nil || s.Pending.Remote != "files" || s.Pending.AuthURL != first.AuthURL {
		t.Errorf("status before: %+v", s)
	}
	if err := o.logIn(first); err != nil {
		t.Fatal(err)
	}
	tokens := map[string]bool{}
	for _, name := range []string{"files", "wiki", "crm", "jobs"} {
		token := o.works(alice, name)
		if tokens[token] {
			t.Errorf("%s has another's token", name)
		}
		tokens[token] = true
		if again := o.works(alice, name); again != token {
			t.Errorf("%s: another token for the second request", name)
		}
		if s := o.Status(alice, name); !s.SignedIn || s.LastError != nil || name != "jobs" && s.Account != "alice" {
			t.Errorf("%s: %+v", name, s)
		}
	}
	if s := o.Exchanges(); s.Size != 3 || s.Hits == 0 {
		t.Errorf("the cache: %+v", s)
	}
	if link := o.link(bob, "files"); link.AuthURL == first.AuthURL {
		t.Error("one link for two people")
	}
	o.idp.Set(func(k *authtest.ASKnobs) { k.User = "bob" })
	o.loggedIn(bob)
	if tokens[o.works(bob, "files")] || tokens[o.works(bob, "crm")] {
		t.Error("bob has alice's token")
	}

	before := o.works(alice, "files")
	if _, err := o.SignOut(t.Context(), alice, "files"); err != nil {
		t.Fatal(err)
	}
	if o.works(alice, "files") == before {
		t.Error("a token that was signed out of is used on")
	}
	if revoked, err := o.SignOut(t.Context(), alice, auth.LoginRemote); err != nil || !revoked {
		t.Errorf("signing out: %v, %v", revoked, err)
	}
	for _, name := range []string{"files", "wiki", "crm"} {
		o.link(alice, name)
		if s := o.Status(alice, name); s.SignedIn {
			t.Errorf("%s: %+v", name, s)
		}
	}
	o.works(bob, "files")
	if s := o.Exchanges(); s.Size != 3 { // bob's two, and the gateway's own
		t.Errorf("the cache: %+v", s)
	}
	o.End(bob)
	if s := o.Exchanges(); s.Size != 1 {
		t.Errorf("the cache after bob's end: %+v", s)
	}
}

// A login whose ID token runs out is renewed without anybody; nothing is
// exchanged for one that is over.
func TestLoginIsRenewed(t *testing.T) {
	o := newOffice(t, nil)
	soon := func(d time.Duration) {
		o.idp.Set(func(k *authtest.ASKnobs) { k.IDToken = map[string]any{"exp": o.clock.Now().Add(d).Unix()} })
	}
	soon(2 * time.Minute)
	o.loggedIn(alice)
	wiki, files := o.works(alice, "wiki"), o.works(alice, "files")
	soon(time.Hour)
	o.clock.Advance(3 * time.Minute)
	if again := o.works(alice, "wiki"); again == wiki {
		t.Error("a token that has expired was forwarded")
	}
	if n := o.idp.Count(authtest.EndpointAuthorize); n != 1 {
		t.Errorf("%d logins", n)
	}
	// Another subject token is another exchange.
	if o.works(alice, "files") == files {
		t.Error("the token of the old login")
	}
}

// A login whose ID token is about to run out is renewed beside its use: nobody
// waits for a provider that hangs or is away while the token lives.
func TestLoginIsRenewedBeside(t *testing.T) {
	o := newOffice(t, nil)
	lives := func(d time.Duration) {
		o.idp.Set(func(k *authtest.ASKnobs) { k.IDToken = map[string]any{"exp": o.clock.Now().Add(d).Unix()} })
	}
	lives(2 * time.Minute)
	o.loggedIn(alice)
	wiki := o.works(alice, "wiki")
	lives(time.Hour)
	gate := make(chan struct{})
	asked := make(chan struct{}, 1)
	o.idp.Set(func(k *authtest.ASKnobs) {
		k.Token = func(w http.ResponseWriter, r *http.Request, next http.HandlerFunc) {
			asked <- struct{}{}
			<-gate
			authtest.Status(http.StatusServiceUnavailable)(w, r, next)
		}
	})
	o.clock.Advance(100 * time.Second)
	for range 3 {
		if o.works(alice, "wiki") != wiki {
			t.Error("another token from a provider that hangs")
		}
	}
	<-asked
	close(gate)
	eventually(t, "the failure is noted", func() bool { return o.Status(alice, auth.LoginRemote).LastError != nil })
	for range 3 { // it is away, and not asked again at once
		if o.works(alice, "wiki") != wiki {
			t.Error("another token from a provider that is away")
		}
	}
	o.idp.Set(func(k *authtest.ASKnobs) { k.Token = nil })
	o.clock.Advance(2 * time.Second)
	eventually(t, "the login is renewed", func() bool { return o.works(alice, "wiki") != wiki })
	if n := o.idp.Count(authtest.EndpointAuthorize); n != 1 {
		t.Errorf("%d logins", n)
	}
}

// A stream that nobody waits for does not renew the login either: it uses what is
// there, and waits for a call.
func TestNoRefreshOfALogin(t *testing.T) {
	o := newOffice(t, nil)
	lives := func(d time.Duration) {
		exp := map[string]any{"exp": o.clock.Now().Add(d).Unix()}
		o.idp.Set(func(k *authtest.ASKnobs) { k.IDToken, k.Claims = exp, exp })
	}
	lives(2 * time.Minute)
	o.loggedIn(alice)
	ctx := auth.NoRefresh(t.Context())
	tokens := map[string]string{}
	for _, name := range []string{"wiki", "files"} {
		tokens[name] = o.works(alice, name)
	}
	asked := o.idp.Count(authtest.EndpointToken)
	refused := func(name string) *http.Response {
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, o.remote(name).URL, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer "+tokens[name])
		return &http.Response{StatusCode: http.StatusUnauthorized, Request: req, Header: http.Header{}}
	}
	wiki := o.Authorizer(alice, "wiki")
	if err := wiki.Renew(ctx, refused("wiki")); !errors.Is(err, auth.ErrRefreshDue) {
		t.Errorf("refused by the remote: %v", err)
	}
	o.clock.Advance(100 * time.Second) // a call would renew the login beside itself
	if token, err := wiki.Token(ctx); err != nil || token == nil || token.AccessToken != tokens["wiki"] {
		t.Errorf("a token that is valid: %v, %v", token != nil, err)
	}
	o.clock.Advance(time.Hour)
	for range 3 {
		for _, name := range []string{"wiki", "files"} {
			a := o.Authorizer(alice, name)
			if token, err := a.Token(ctx); token != nil || !errors.Is(err, auth.ErrRefreshDue) {
				t.Errorf("%s, expired: %v, %v", name, token != nil, err)
			}
			if err := a.Renew(ctx, refused(name)); !errors.Is(err, auth.ErrRefreshDue) {
				t.Errorf("%s, expired and refused: %v", name, err)
			}
		}
	}
	if n := o.idp.Count(authtest.EndpointToken); n != asked {
		t.Errorf("%d requests of the provider for a stream", n-asked)
	}
	lives(time.Hour)
	for _, name := range []string{"wiki", "files"} {
		called := o.works(alice, name)
		if token, err := o.Authorizer(alice, name).Token(ctx); err != nil || token == nil || token.AccessToken != called {
			t.Errorf("%s, after a call: %v, %v", name, token != nil, err)
		}
	}
}

// While the provider is away, tokens that live are used on; what needs a new one
// says why, once, and works when it is back, without a click.
func TestProviderAway(t *testing.T) {
	o := newOffice(t, nil)
	start := o.clock.Now()
	o.idp.Set(func(k *authtest.ASKnobs) {
		k.IDToken = map[string]any{"exp": o.clock.Now().Add(2 * time.Minute).Unix()}
		k.Claims = map[string]any{"exp": o.clock.Now().Add(3 * time.Hour).Unix()}
	})
	o.crmAS.Set(func(k *authtest.ASKnobs) { k.TokenLife = 3 * time.Hour })
	o.loggedIn(alice)
	files, crm := o.works(alice, "files"), o.works(alice, "crm")
	o.works(alice, "wiki")
	// The login is renewed, for one of them, right before.
	o.idp.Set(func(k *authtest.ASKnobs) {
		k.IDToken = map[string]any{"exp": o.clock.Now().Add(5 * time.Minute).Unix()}
	})
	o.clock.Advance(3 * time.Minute)
	wiki := o.works(alice, "wiki")
	o.idp.Set(func(k *authtest.ASKnobs) { k.Token = authtest.Status(http.StatusServiceUnavailable) })
	for range 25 { // more than an hour
		if o.works(alice, "files") != files || o.works(alice, "crm") != crm {
			t.Fatal("kept tokens are not used")
		}
		if now := o.clock.Now(); now.Before(start.Add(5*time.Minute)) && o.works(alice, "wiki") != wiki {
			t.Fatal("the login is not used")
		}
		o.clock.Advance(3 * time.Minute)
	}
	if say := o.fails(alice, "wiki"); !strings.Contains(say, "could not be reached") {
		t.Errorf("what needs the login says %q", say)
	}
	if s := o.Status(alice, "wiki"); s.LastError == nil {
		t.Errorf("status: %+v", s)
	}
	o.idp.Set(func(k *authtest.ASKnobs) {
		k.Token, k.IDToken = nil, map[string]any{"exp": o.clock.Now().Add(time.Hour).Unix()}
	})
	o.clock.Advance(time.Minute)
	o.works(alice, "wiki")
	if s := o.Status(alice, "wiki"); s.LastError != nil {
		t.Errorf("status afterwards: %+v", s)
	}
	if n := o.idp.Count(authtest.EndpointAuthorize); n != 1 {
		t.Errorf("%d logins", n)
	}
}

// The provider ends the login: one link, and no token of it is used on.
func TestLoginEnded(t *testing.T) {
	o := newOffice(t, nil)
	o.idp.Set(func(k *authtest.ASKnobs) {
		k.IDToken = map[string]any{"exp": o.clock.Now().Add(2 * time.Minute).Unix()}
	})
	o.idp.Set(func(k *authtest.ASKnobs) { k.Claims = map[string]any{"exp": o.clock.Now().Add(3 * time.Hour).Unix()} })
	o.loggedIn(alice)
	o.works(alice, "files")
	o.works(alice, "wiki")
	o.idp.RevokeAll()
	o.clock.Advance(5 * time.Minute)
	if link := o.link(alice, "wiki"); link.Reason != auth.ReasonExpired {
		t.Errorf("reason %s", link.Reason)
	}
	if s := o.Exchanges(); s.Size != 0 {
		t.Errorf("tokens of it are kept: %+v", s)
	}
}

// An ID token counts only if it can be verified, at the login and at each
// renewal, and stays its subject's.
func TestLoginIsVerified(t *testing.T) {
	for name, claims := range map[string]map[string]any{
		"another issuer":   {"iss": "https://evil.example"},
		"another audience": {"aud": "another"},
		"expired":          {"exp": 5},
		"no subject":       {"sub": nil},
		"no ID token":      nil,
	} {
		t.Run(name, func(t *testing.T) {
			o := newOffice(t, nil)
			o.idp.Set(func(k *authtest.ASKnobs) { k.IDToken = claims })
			err := o.logIn(o.link(alice, "files"))
			if e, ok := errors.AsType[*auth.Error](err); !ok || !strings.Contains(e.Say, "verified") {
				t.Errorf("the login: %v", err)
			}
			o.link(alice, "wiki")
		})
	}
	t.Run("a signature of somebody else", func(t *testing.T) {
		o := newOffice(t, nil)
		o.idp.Set(func(k *authtest.ASKnobs) {
			k.Token = authtest.EditJSON(func(m map[string]any) {
				if token, ok := m["id_token"].(string); ok {
					m["id_token"] = token[:len(token)-8] + "AAAAAAAA"
				}
			})
		})
		if err := o.logIn(o.link(alice, "files")); err == nil {
			t.Error("the login worked")
		}
	})
	t.Run("renewed for somebody else", func(t *testing.T) {
		o := newOffice(t, nil)
		o.idp.Set(func(k *authtest.ASKnobs) {
			k.IDToken = map[string]any{"exp": o.clock.Now().Add(2 * time.Minute).Unix()}
		})
		o.loggedIn(alice)
		o.idp.Set(func(k *authtest.ASKnobs) { k.IDToken = map[string]any{"sub": "mallory"} })
		o.clock.Advance(5 * time.Minute)
		o.link(alice, "wiki") // and not mallory's token
	})
	t.Run("an access token renewed for somebody else", func(t *testing.T) {
		o := newOffice(t, func(o *office, c *auth.Config) {
			o.idp.Set(func(k *authtest.ASKnobs) { k.TokenLife = 2 * time.Minute })
			c.Remotes[0].SubjectTokenType = exchange.TypeAccessToken
		})
		o.loggedIn(alice)
		o.works(alice, "files")
		before := o.idp.Count(authtest.EndpointToken)
		o.idp.Set(func(k *authtest.ASKnobs) { k.IDToken = map[string]any{"sub": "mallory", "nonce": "another"} })
		o.clock.Advance(90 * time.Minute)
		o.link(alice, "files")
		o.link(alice, "wiki")
		for _, r := range o.idp.Requests(authtest.EndpointToken)[before:] {
			if r.Form.Has("subject_token") {
				t.Error("what came with mallory's ID token is exchanged as alice's")
			}
		}
		if s := o.Exchanges(); s.Size != 0 {
			t.Errorf("of a login that has ended tokens are kept: %+v", s)
		}
		if !strings.Contains(o.log.String(), `level=WARN msg="a renewed login is another account's`) {
			t.Error("no warning in the log")
		}
	})
}

// A token goes to a remote only if it is for it.
func TestForwardAudience(t *testing.T) {
	o := newOffice(t, func(_ *office, c *auth.Config) {
		c.Remotes[1].Audience = "another"
	})
	o.loggedIn(alice)
	before := o.wiki.Count(authtest.EndpointMCP)
	if say := o.fails(alice, "wiki"); !strings.Contains(say, "not for the audience") {
		t.Errorf("%q", say)
	}
	if n := o.wiki.Count(authtest.EndpointMCP) - before; n != 0 {
		t.Errorf("%d requests went out", n)
	}

	// One for several is for each; an opaque token tells nothing.
	o = newOffice(t, func(o *office, c *auth.Config) {
		o.idp.Set(func(k *authtest.ASKnobs) {
			k.IDToken = map[string]any{"aud": []string{"gatehouse", "wiki-client"}, "azp": "gatehouse"}
		})
		c.Remotes[1].Audience = "wiki-client"
		c.Remotes[0].Type, c.Remotes[0].SubjectTokenType = auth.TypeForward, exchange.TypeAccessToken
	})
	if err := o.logIn(o.link(alice, "wiki")); err != nil {
		t.Fatal(err)
	}
	token, err := o.Authorizer(alice, "wiki").Token(t.Context())
	if err != nil || token == nil {
		t.Errorf("a token for several: %v", err)
	}
	if say := o.fails(alice, "files"); !strings.Contains(say, "does not say whom it is for") {
		t.Errorf("an opaque token: %q", say)
	}
}

// A remote that does not accept what it gets is tried with one other token, and
// then it is a sentence; nobody is sent in circles.
func TestUnwanted(t *testing.T) {
	o := newOffice(t, nil)
	o.loggedIn(alice)
	for _, name := range []string{"files", "crm", "jobs", "wiki"} {
		o.works(alice, name)
	}
	before := o.idp.Count(authtest.EndpointToken)
	for _, name := range []string{"files", "crm", "jobs", "wiki"} {
		o.remote(name).Set(func(k *authtest.RemoteKnobs) { k.MCP = authtest.Status(http.StatusUnauthorized) })
		for range 3 {
			if say := o.fails(alice, name); !strings.Contains(say, "does not accept the token") {
				t.Errorf("%s: %q", name, say)
			}
		}
	}
	if n := o.idp.Count(authtest.EndpointToken) - before; n != 3 { // for files, crm's assertion, and the login for wiki
		t.Errorf("%d requests for other tokens", n)
	}
	for _, name := range []string{"files", "crm", "jobs", "wiki"} {
		o.remote(name).Set(func(k *authtest.RemoteKnobs) { k.MCP = nil })
		o.works(alice, name)
	}
}

// Where tokens come from is looked for once, whoever waits for it and leaves; what
// came of it counts for those who come later.
func TestOneLooks(t *testing.T) {
	o := newOffice(t, nil)
	if err := o.logIn(o.link(alice, "wiki")); err != nil {
		t.Fatal(err)
	}
	o.clock.Advance(10 * time.Minute) // what the login knew of the provider is old
	asked, gate := make(chan struct{}, 10), make(chan struct{})
	o.idp.Set(func(k *authtest.ASKnobs) {
		k.Metadata = func(w http.ResponseWriter, r *http.Request, next http.HandlerFunc) {
			asked <- struct{}{}
			<-gate
			authtest.Status(http.StatusServiceUnavailable)(w, r, next)
		}
	})
	before := o.idp.Count(authtest.EndpointMetadata)
	ctx, leave := context.WithCancel(t.Context())
	left := make(chan error)
	for range 3 {
		go func() {
			_, err := o.Authorizer(alice, "files").Token(ctx)
			left <- err
		}()
	}
	<-asked
	leave()
	for range 3 {
		if err := <-left; !errors.Is(err, context.Canceled) {
			t.Errorf("who left got %v", err)
		}
	}
	for range 3 { // and these come when the others have left
		if _, err := o.Authorizer(alice, "files").Token(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("who left got %v", err)
		}
	}
	if n := o.idp.Count(authtest.EndpointMetadata) - before; n != 1 {
		t.Errorf("%d requests", n)
	}
	close(gate)
	for range 3 {
		if say := o.fails(alice, "files"); !strings.Contains(say, "503") {
			t.Errorf("%q", say)
		}
	}
	if n := o.idp.Count(authtest.EndpointMetadata) - before; n > 2 { // it has two places
		t.Errorf("%d requests", n)
	}
	o.idp.Set(func(k *authtest.ASKnobs) { k.Metadata = nil })
	o.clock.Advance(2 * time.Second)
	o.works(alice, "files")
}

// More permissions are one user's: what the server refuses to another costs them
// nothing, nor does a refusal cost what they had; and an operation leads to more
// a few times only.
func TestMoreScopesAreOnesOwn(t *testing.T) {
	o := newOffice(t, nil)
	o.loggedIn(alice)
	o.idp.Set(func(k *authtest.ASKnobs) { k.User = "bob" })
	o.loggedIn(bob)
	forbids := func(p auth.Principal, scope string) error {
		ctx := auth.ForOperation(t.Context(), func() string { return "tools/call greedy" })
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, o.crm.URL, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer "+o.works(p, "crm"))
		return o.Authorizer(p, "crm").Challenge(ctx, &http.Response{StatusCode: http.StatusForbidden, Request: req,
			Header: http.Header{"Www-Authenticate": {`Bearer error="insufficient_scope", scope="` + scope + `"`}}})
	}
	scopes := func(p auth.Principal) string { return strings.Join(o.Status(p, "crm").Scopes, " ") }
	refuses := func(scope, user string) {
		o.crmAS.Set(func(k *authtest.ASKnobs) {
			k.Token = func(w http.ResponseWriter, r *http.Request, next http.HandlerFunc) {
				if parts := strings.Split(r.PostFormValue("assertion"), "."); len(parts) == 3 {
					claims, _ := base64.RawURLEncoding.DecodeString(parts[1])
					if strings.Contains(string(claims), user) && strings.Contains(r.PostForm.Get("scope"), scope) {
						authtest.Answer(http.StatusBadRequest, "application/json", `{"error":"invalid_scope"}`)(w, r, next)
						return
					}
				}
				next(w, r)
			}
		})
	}
	refuses("admin", `"bob"`)
	alices, bobs := o.works(alice, "crm"), o.works(bob, "crm")
	if err := forbids(alice, "admin"); err != nil {
		t.Fatal(err)
	}
	if o.works(alice, "crm") == alices || scopes(alice) != "admin" {
		t.Errorf("no other token, with %q", scopes(alice))
	}
	if o.works(bob, "crm") != bobs || scopes(bob) != "" {
		t.Errorf("another user has another token, with %q", scopes(bob))
	}
	if e, ok := errors.AsType[*auth.Error](forbids(bob, "admin")); !ok || !strings.Contains(e.Say, "invalid_scope") {
		t.Errorf("what the server refuses: %v", e)
	}
	if o.works(bob, "crm") != bobs || scopes(bob) != "" {
		t.Errorf("after a refusal another token, with %q", scopes(bob))
	}

	if e, ok := errors.AsType[*auth.Error](forbids(alice, "admin")); !ok || !strings.Contains(e.Say, "forbids this") {
		t.Errorf("what was granted already: %v", e)
	}
	if err := forbids(alice, "more"); err != nil {
		t.Fatal(err)
	}
	if e, ok := errors.AsType[*auth.Error](forbids(alice, "still-more")); !ok || e.Kind != auth.KindForbidden || !strings.Contains(e.Say, "2 times") {
		t.Errorf("a third time: %v", e)
	}

	// What was granted is not any longer: the rest goes on.
	refuses("more", `"alice"`)
	o.crmAS.ExpireAll()
	if _, err := o.send(alice, "crm"); err == nil {
		t.Error("the token from before is good")
	}
	o.works(alice, "crm")
	if scopes(alice) != "" {
		t.Errorf("with %q", scopes(alice))
	}

	// Signing out forgets it, too.
	refuses("nothing", "nobody")
	if _, err := o.SignOut(t.Context(), alice, "crm"); err != nil {
		t.Fatal(err)
	}
	if err := forbids(alice, "admin"); err != nil {
		t.Errorf("after signing out: %v", err)
	}
}

// Two calls at once that need more permissions, of different kinds, end with both.
func TestMoreScopesAtOnce(t *testing.T) {
	o := newOffice(t, nil)
	o.loggedIn(alice)
	sent := o.works(alice, "crm")
	var both sync.WaitGroup
	both.Add(2)
	o.crmAS.Set(func(k *authtest.ASKnobs) {
		k.Token = func(w http.ResponseWriter, r *http.Request, next http.HandlerFunc) {
			both.Done()
			both.Wait()
			next(w, r)
		}
	})
	var calls sync.WaitGroup
	for _, scope := range []string{"admin", "more"} {
		calls.Go(func() {
			req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, o.crm.URL, nil)
			if err != nil {
				t.Error(err)
				return
			}
			req.Header.Set("Authorization", "Bearer "+sent)
			if err := o.Authorizer(alice, "crm").Challenge(t.Context(), &http.Response{StatusCode: http.StatusForbidden, Request: req,
				Header: http.Header{"Www-Authenticate": {`Bearer error="insufficient_scope", scope="` + scope + `"`}}}); err != nil {
				t.Errorf("%s: %v", scope, err)
			}
		})
	}
	calls.Wait()
	o.crmAS.Set(func(k *authtest.ASKnobs) { k.Token = nil })
	o.works(alice, "crm")
	if got := slices.Sorted(slices.Values(o.Status(alice, "crm").Scopes)); !slices.Equal(got, []string{"admin", "more"}) {
		t.Errorf("the permissions are %q", got)
	}
}

// What the gateway proves itself with goes to the authorization server that has
// accepted it, whatever the remote says later, also after a restart; to another
// one when the config says so.
func TestIssuerStays(t *testing.T) {
	for _, name := range []string{"jobs", "crm"} {
		t.Run(name, func(t *testing.T) {
			var config auth.Config
			o := newOffice(t, func(_ *office, c *auth.Config) { config = *c })
			restart := func() {
				t.Helper()
				o.Close()
				var err error
				if o.Broker, err = auth.New(config); err != nil {
					t.Fatal(err)
				}
				t.Cleanup(o.Close)
			}
			o.loggedIn(alice)
			o.works(alice, name)
			next := authtest.NewAS(t)
			next.AddClient(authtest.OAuthClient{ID: "at-crm", Secret: "canary-cs-at-crm-01", Method: "client_secret_basic"})
			o.remote(name).Set(func(k *authtest.RemoteKnobs) {
				k.Document = map[string]any{"authorization_servers": []string{next.Issuer()}}
				k.MCP = authtest.Status(http.StatusUnauthorized)
			})
			refused := func() {
				t.Helper()
				for range 2 {
					say := o.fails(alice, name)
					if !strings.Contains(say, next.Issuer()) || !strings.Contains(say, o.crmAS.Issuer()) || !strings.Contains(say, "auth.issuer") {
						t.Errorf("%q", say)
					}
				}
			}
			refused()
			restart()
			refused()
			if n := len(next.Requests("")); n != 0 {
				t.Errorf("%d requests to the other server", n)
			}
			if log := o.log.String(); !strings.Contains(log, "event=issuer_changed") || !strings.Contains(log, "remote="+name) {
				t.Error("no event in the log")
			}

			// Back where it was it works by itself.
			o.remote(name).Set(func(k *authtest.RemoteKnobs) { k.Document, k.MCP = nil, nil })
			o.works(alice, name)

			i := slices.IndexFunc(config.Remotes, func(r auth.Remote) bool { return r.Name == name })
			config.Remotes = slices.Clone(config.Remotes)
			config.Remotes[i].Issuer = next.Issuer()
			o.remote(name).Set(func(k *authtest.RemoteKnobs) {
				k.Document = map[string]any{"authorization_servers": []string{next.Issuer()}}
			})
			restart()
			if _, err := o.send(alice, name); err == nil {
				t.Error("the remote, which trusts the old server alone in this test, takes the new one's token")
			}
			if n := next.Count(authtest.EndpointToken); n == 0 {
				t.Error("the server that the config names was not asked")
			}
		})
	}
}

// An assertion for one authorization server is not shown to another.
func TestAssertionIsForItsServer(t *testing.T) {
	o := newOffice(t, func(o *office, c *auth.Config) { c.Remotes[2].Audience = o.crmAS.Issuer() })
	evil := authtest.NewAS(t)
	o.crm.Set(func(k *authtest.RemoteKnobs) {
		k.Document = map[string]any{"authorization_servers": []string{evil.Issuer()}}
	})
	o.loggedIn(alice)
	if say := o.fails(alice, "crm"); !strings.Contains(say, "auth.audience") {
		t.Errorf("%q", say)
	}
	if n := evil.Count(authtest.EndpointToken); n != 0 {
		t.Errorf("%d requests to the other server", n)
	}
	o.crm.Set(func(k *authtest.RemoteKnobs) { k.Document = nil })
	o.works(alice, "crm")
}

// Dex: its own parameters, metadata below a path at the OpenID place only, and
// tokens that tell their issuer.
func TestDex(t *testing.T) {
	dex := authtest.StartAS(t, authtest.ASConfig{Path: "/dex"})
	dex.Set(func(k *authtest.ASKnobs) {
		k.Dex, k.JWT, k.WellKnown = true, true, []authtest.WellKnown{authtest.OIDCAppending}
	})
	dex.AddClient(authtest.OAuthClient{ID: "gw-at-dex", Secret: "canary-cs-dex-00001", Method: "client_secret_basic"})
	remote := authtest.NewRemote(t, authtest.RemoteConfig{AS: dex})
	remote.Set(func(k *authtest.RemoteKnobs) { k.Audience = "files-client" })
	change := func(more func(*auth.Remote)) func(*office, *auth.Config) {
		return func(o *office, c *auth.Config) {
			o.files = remote
			r := &c.Remotes[0]
			r.URL, r.Audience, r.ConnectorID = remote.URL, "files-client", "idp"
			r.TokenEndpoint, r.ClientID, r.ClientSecret = dex.Issuer()+"/token", "gw-at-dex", secret.New("canary-cs-dex-00001")
			if more != nil {
				more(r)
			}
		}
	}
	o := newOffice(t, change(nil))
	o.loggedIn(alice)
	o.works(alice, "files")
	form := dex.Requests(authtest.EndpointToken)[0].Form
	if form.Get("connector_id") != "idp" || form.Has("audience") ||
		form.Get("scope") != "audience:server:client_id:files-client email groups openid profile" {
		t.Errorf("asked with %v", form)
	}
	if s := o.Status(alice, "files"); s.Issuer != dex.Issuer() {
		t.Errorf("issuer %q", s.Issuer)
	}

	// The issuer that is expected, explicit or derived from the endpoint, is
	// enforced.
	dex.Set(func(k *authtest.ASKnobs) { k.Claims = map[string]any{"iss": "https://evil.example"} })
	o = newOffice(t, change(nil))
	o.loggedIn(alice)
	if say := o.fails(alice, "files"); !strings.Contains(say, "another issuer") {
		t.Errorf("%q", say)
	}
	o = newOffice(t, change(func(r *auth.Remote) { r.ExpectedIssuer = "https://evil.example" }))
	o.loggedIn(alice)
	o.works(alice, "files")

	// Without connector_id Dex refuses, with a code that says little.
	dex.Set(func(k *authtest.ASKnobs) { k.Claims = nil })
	o = newOffice(t, change(func(r *auth.Remote) { r.ConnectorID = "" }))
	o.loggedIn(alice)
	if say := o.fails(alice, "files"); !strings.Contains(say, "invalid_request") {
		t.Errorf("%q", say)
	}

	// Opaque tokens are taken from the endpoint that the issuer's metadata names,
	// and from no other.
	dex.Set(func(k *authtest.ASKnobs) { k.JWT = false })
	o = newOffice(t, change(nil))
	o.loggedIn(alice)
	o.works(alice, "files")
	dex.Set(func(k *authtest.ASKnobs) { k.NoMetadata = true })
	o = newOffice(t, change(nil))
	o.loggedIn(alice)
	if say := o.fails(alice, "files"); !strings.Contains(say, "does not tell its issuer") {
		t.Errorf("%q", say)
	}
}

// The gateway's own provider is asked as the login asks it, wherever else the
// remote may go, and an endpoint that wants a certificate with that one, its
// metadata included.
func TestWhoMayReachTheProvider(t *testing.T) {
	clients, err := guard.New(guard.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(clients.Close)
	nowhere := clients.Client(guard.Policy{})
	o := newOffice(t, func(_ *office, c *auth.Config) { c.Remotes[0].HTTP = nowhere })
	if err := o.logIn(o.link(alice, "wiki")); err != nil {
		t.Fatal(err)
	}
	o.works(alice, "files")

	dex := authtest.NewAS(t)
	dex.AddClient(authtest.OAuthClient{ID: "gw-at-dex", Secret: "canary-cs-dex-00001", Method: "client_secret_basic"})
	remote := authtest.NewRemote(t, authtest.RemoteConfig{AS: dex})
	remote.Set(func(k *authtest.RemoteKnobs) { k.Audience = "files" })
	for _, issuer := range []string{"", dex.Issuer()} {
		o = newOffice(t, func(o *office, c *auth.Config) {
			o.files = remote
			r := &c.Remotes[0]
			r.URL, r.Issuer, r.TokenEndpoint, r.ClientID, r.ClientSecret = remote.URL, issuer, dex.Issuer()+"/token", "gw-at-dex", secret.New("canary-cs-dex-00001")
			r.TokenHTTP, r.HTTP = r.HTTP, nowhere
		})
		if err := o.logIn(o.link(alice, "wiki")); err != nil {
			t.Fatal(err)
		}
		o.works(alice, "files") // by an opaque token, which counts if the metadata name the endpoint
	}
}

// What would send a secret or a token astray is refused before it can.
func TestNewRefusesSources(t *testing.T) {
	clients, err := guard.New(guard.Config{})
	if err != nil {
		t.Fatal(err)
	}
	client := clients.Client(guard.Policy{})
	login := &auth.Login{Issuer: "https://idp.example", ClientID: "gw", HTTP: client}
	for name, c := range map[string]auth.Config{
		"no login": {Remotes: []auth.Remote{{Name: "r", URL: "https://r.example", HTTP: client, Type: auth.TypeForward}}},
		"the login's client elsewhere": {Login: login, Remotes: []auth.Remote{
			{Name: "r", URL: "https://r.example", HTTP: client, Type: auth.TypeExchange, TokenEndpoint: "https://dex.example/token"}}},
		"no issuer":        {Login: &auth.Login{ClientID: "gw", HTTP: client}},
		"nobody":           {Login: &auth.Login{Issuer: "https://idp.example", HTTP: client}},
		"the login's name": {Remotes: []auth.Remote{{Name: auth.LoginRemote, URL: "https://r.example", HTTP: client}}},
	} {
		c.PublicURL, c.CallbackPath, c.Store, c.Log = "http://127.0.0.1:8080", "/oauth/callback", auth.NewMemory(auth.MemoryConfig{}), slog.New(slog.DiscardHandler)
		if b, err := auth.New(c); err == nil {
			b.Close()
			t.Errorf("%s: accepted", name)
		}
	}
}

// The login's access token in the place of its ID token, where the config says so.
func TestAccessTokenAsSubject(t *testing.T) {
	o := newOffice(t, func(o *office, c *auth.Config) {
		// Access tokens that say whom they are for.
		o.idp.Set(func(k *authtest.ASKnobs) { k.Audiences = []string{"files", "wiki"} })
		o.wiki.Set(func(k *authtest.RemoteKnobs) { k.Audience = "wiki" })
		c.Remotes[0].SubjectTokenType, c.Remotes[1].SubjectTokenType = exchange.TypeAccessToken, exchange.TypeAccessToken
		c.Remotes[1].Audience = "wiki"
	})
	o.loggedIn(alice)
	o.works(alice, "files")
	forwarded := o.works(alice, "wiki")
	last := o.idp.Requests(authtest.EndpointToken)[o.idp.Count(authtest.EndpointToken)-1].Form
	if last.Get("subject_token_type") != exchange.TypeAccessToken || last.Get("subject_token") != forwarded {
		t.Errorf("exchanged a %s, and forwarded another", last.Get("subject_token_type"))
	}
}
