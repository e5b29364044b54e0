package auth_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"gatehouse/auth"
	"gatehouse/auth/authtest"
	"gatehouse/auth/gate"
	"gatehouse/auth/secret"
)

const gatewayURL = "http://127.0.0.1:8080/mcp"

// newUsers is an office whose users are told apart.
func newUsers(t testing.TB, change func(*office, *auth.Config)) *office {
	t.Helper()
	o := newOffice(t, func(o *office, c *auth.Config) {
		c.Login.Audience = gatewayURL
		if change != nil {
			change(o, c)
		}
	})
	o.idp.Set(func(k *authtest.ASKnobs) { k.Now = o.clock.Now })
	o.idp.RemoveClient("gatehouse")
	o.idp.AddClient(authtest.OAuthClient{ID: "gatehouse", Secret: "canary-cs-gatehouse", Method: "client_secret_basic",
		RedirectURIs: []string{"http://127.0.0.1:8080/login/callback", "https://gw.example/login/callback"}})
	return o
}

func (o *office) accepts(token string) auth.Identity {
	o.t.Helper()
	who, err := o.Authenticate(o.t.Context(), token, nil)
	if err != nil {
		o.t.Fatal(err)
	}
	return who
}

func (o *office) refuses(token string) {
	o.t.Helper()
	if who, err := o.Authenticate(o.t.Context(), token, nil); !errors.Is(err, auth.ErrBearer) || who != (auth.Identity{}) {
		o.t.Fatalf("accepted: %+v, %v", who, err)
	}
}

// A key that is not known is looked for, but not as often as somebody names one;
// while the provider is away, the keys that are known serve.
func TestProvidersKeys(t *testing.T) {
	o := newUsers(t, nil)
	o.idp.Set(func(k *authtest.ASKnobs) {
		k.Keys = authtest.Answer(200, "application/json", `{"keys":[{"kty":"EC","crv":"P-256","kid":"before","x":"f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU","y":"x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"},{"kty":"unknown"}]}`)
	})
	for range 50 {
		o.refuses(o.idp.JWTFor("alice", gatewayURL, nil))
	}
	if n := o.idp.Count(authtest.EndpointKeys); n < 2 || n > 6 {
		t.Errorf("the keys were fetched %d times", n)
	}
	o.idp.Set(func(k *authtest.ASKnobs) { k.Keys = nil })
	o.clock.Advance(time.Minute)
	if who := o.accepts(o.idp.JWTFor("alice", gatewayURL, nil)); who.Principal != (auth.Principal{Issuer: o.idp.Issuer(), Subject: "alice"}) {
		t.Errorf("got %+v", who)
	}
	fetched := o.idp.Count(authtest.EndpointKeys)
	for range 20 {
		o.accepts(o.idp.JWTFor("alice", gatewayURL, nil))
	}
	if n := o.idp.Count(authtest.EndpointKeys); n != fetched {
		t.Errorf("known keys were fetched %d times", n-fetched)
	}
	o.idp.Set(func(k *authtest.ASKnobs) { k.Keys = authtest.Status(503) })
	o.clock.Advance(3 * time.Hour)
	o.accepts(o.idp.JWTFor("alice", gatewayURL, nil))
	// Withdrawn keys are forgotten.
	o.idp.Set(func(k *authtest.ASKnobs) {
		k.Keys = authtest.Answer(200, "application/json", `{"keys":[{"kty":"EC","crv":"P-256","kid":"after","x":"f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU","y":"x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"}]}`)
	})
	o.clock.Advance(3 * time.Hour)
	o.refuses(o.idp.JWTFor("alice", gatewayURL, nil))
}

// A verified token is good until it ends, and no longer.
func TestBearerEnds(t *testing.T) {
	o := newUsers(t, nil)
	token := o.idp.JWTFor("alice", gatewayURL, map[string]any{"exp": o.clock.Now().Add(2 * time.Minute).Unix()})
	o.accepts(token)
	o.clock.Advance(time.Minute)
	o.accepts(token)
	o.clock.Advance(time.Minute)
	o.refuses(token)
}

// Opaque tokens are asked about, briefly remembered, and refused whenever the
// provider does not vouch for them.
func TestIntrospection(t *testing.T) {
	o := newUsers(t, nil)
	asked := func() int { return o.idp.Count(authtest.EndpointIntrospect) }
	token := o.idp.Mint("alice", gatewayURL)
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			if _, err := o.Authenticate(t.Context(), token, nil); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := asked(); n != 1 {
		t.Errorf("asked %d times about one token", n)
	}
	o.idp.RevokeAll()
	o.accepts(token)
	o.clock.Advance(11 * time.Second)
	o.refuses(token)
	before := asked()
	for range 20 {
		o.refuses(token)
	}
	if n := asked(); n != before {
		t.Errorf("asked %d times about a token that was refused a moment ago", n-before)
	}
	o.refuses(o.idp.Mint("alice", "https://another.example/mcp"))

	// Nobody is let in by what goes wrong, and nobody locked out by it either.
	good := o.idp.Mint("alice", gatewayURL)
	for name, answer := range map[string]authtest.Intercept{
		"away":           authtest.Status(503),
		"no JSON":        authtest.Answer(200, "text/html", "<html>"),
		"other JSON":     authtest.Answer(200, "application/json", `[]`),
		"nested":         authtest.Edit(authtest.Nest(1000)),
		"active in text": authtest.EditJSON(func(doc map[string]any) { doc["active"] = "true" }),
		"another issuer": authtest.EditJSON(func(doc map[string]any) { doc["iss"] = "https://another.example" }),
		"another type":   authtest.EditJSON(func(doc map[string]any) { doc["token_type"] = "DPoP" }),
		"no audience":    authtest.EditJSON(func(doc map[string]any) { delete(doc, "aud") }),
		"no subject":     authtest.EditJSON(func(doc map[string]any) { delete(doc, "sub") }),
		"over":           authtest.EditJSON(func(doc map[string]any) { doc["exp"] = 1 }),
		"not begun":      authtest.EditJSON(func(doc map[string]any) { doc["nbf"] = 9e9 }),
		"bound":          authtest.EditJSON(func(doc map[string]any) { doc["cnf"] = map[string]any{"x5t#S256": "x"} }),
	} {
		o.clock.Advance(11 * time.Second)
		o.idp.Set(func(k *authtest.ASKnobs) { k.Introspect = answer })
		if _, err := o.Authenticate(t.Context(), good, nil); !errors.Is(err, auth.ErrBearer) {
			t.Errorf("%s: %v", name, err)
		}
		o.idp.Set(func(k *authtest.ASKnobs) { k.Introspect = nil })
		o.clock.Advance(11 * time.Second)
		o.accepts(good)
	}
}

// Who makes tokens up does not make the gateway forget those that are good.
func TestMadeUpTokens(t *testing.T) {
	o := newUsers(t, nil)
	good := o.idp.Mint("alice", gatewayURL)
	o.accepts(good)
	asked := o.idp.Count(authtest.EndpointIntrospect)
	o.idp.Set(func(k *authtest.ASKnobs) { k.Introspect = authtest.Answer(200, "application/json", `{"active":false}`) })
	for i := range 11_000 {
		if _, err := o.Authenticate(t.Context(), fmt.Sprint("made-up-", i), nil); !errors.Is(err, auth.ErrBearer) {
			t.Fatal(err)
		}
	}
	if n := o.idp.Count(authtest.EndpointIntrospect) - asked; n != 11_000 {
		t.Errorf("asked %d times", n)
	}
	o.accepts(good)
}

// While the provider is asked about more tokens than it can take, those that
// find no place in time are refused, and that is not held against the provider.
func TestManyTokensAtOnce(t *testing.T) {
	o := newUsers(t, nil)
	o.AskWithin(50 * time.Millisecond)
	o.accepts(o.idp.JWTFor("alice", gatewayURL, nil)) // its metadata is known from here on
	inside, answer := make(chan bool, gate.AtOnce), make(chan bool)
	o.idp.Set(func(k *authtest.ASKnobs) {
		k.Introspect = func(w http.ResponseWriter, r *http.Request, next http.HandlerFunc) {
			inside <- true
			<-answer
			next(w, r)
		}
	})
	var asking sync.WaitGroup
	ask := func(i int) { o.Authenticate(t.Context(), fmt.Sprint("made-up-", i), nil) }
	for i := range gate.AtOnce {
		asking.Go(func() { ask(i) })
	}
	for range gate.AtOnce {
		<-inside
	}
	ask(gate.AtOnce)
	close(answer)
	asking.Wait()
	o.idp.Set(func(k *authtest.ASKnobs) { k.Introspect = nil })
	o.accepts(o.idp.Mint("bob", gatewayURL))
}

// Who may not have the provider asked is refused, but for a token that it has
// vouched for a while ago.
func TestProviderIsNotAsked(t *testing.T) {
	o := newUsers(t, nil)
	never := func() bool { return false }
	good := o.idp.Mint("alice", gatewayURL)
	if _, err := o.Authenticate(t.Context(), good, never); !errors.Is(err, auth.ErrUnasked) || !errors.Is(err, auth.ErrBearer) {
		t.Errorf("not asked: %v", err)
	}
	o.accepts(good)
	asked := o.idp.Count(authtest.EndpointIntrospect)
	o.clock.Advance(11 * time.Second)
	if _, err := o.Authenticate(t.Context(), good, never); err != nil || o.idp.Count(authtest.EndpointIntrospect) != asked+1 {
		t.Errorf("one that was good a moment ago: %v", err)
	}
	if _, err := o.Authenticate(t.Context(), o.idp.JWTFor("alice", gatewayURL, nil), never); err != nil {
		t.Errorf("one that says all by itself: %v", err)
	}
}

func TestIdentityClaims(t *testing.T) {
	o := newUsers(t, func(_ *office, c *auth.Config) { c.Login.IdentityClaims = []string{"tenant", "oid"} })
	who := func(claims map[string]any) auth.Principal {
		t.Helper()
		return o.accepts(o.idp.JWTFor("pairwise-1", gatewayURL, claims)).Principal
	}
	one := who(map[string]any{"tenant": "a", "oid": `b","c`})
	if two := who(map[string]any{"tenant": `a","b`, "oid": "c"}); one == two {
		t.Error("two users are one")
	}
	if again := o.accepts(o.idp.JWTFor("pairwise-2", gatewayURL, map[string]any{"tenant": "a", "oid": `b","c`})).Principal; again != one {
		t.Error("one user is two")
	}
	o.refuses(o.idp.JWTFor("x", gatewayURL, map[string]any{"tenant": "a"}))
	o.refuses(o.idp.JWTFor("x", gatewayURL, map[string]any{"tenant": "a", "oid": 7}))
	o.refuses(o.idp.JWTFor("x", gatewayURL, map[string]any{"tenant": "a", "oid": strings.Repeat("x", 2000)}))
}

// Without users nobody has a token that is good for anything.
func TestNobodyIsAsked(t *testing.T) {
	o := newOffice(t, nil)
	o.refuses(o.idp.JWTFor("alice", "", nil))
	o.refuses(o.idp.JWTFor("alice", gatewayURL, nil))
}

// jar is a browser's cookies.
type jar map[string]string

func (j jar) cookie(name string) (string, bool) { value, ok := j[name]; return value, ok }

// goLogIn takes a browser to the provider, and returns what it brings back.
func (o *office) goLogIn(j jar, to string) auth.Callback {
	o.t.Helper()
	start, err := o.BeginLogin(o.t.Context(), to, false)
	if err != nil {
		o.t.Fatal(err)
	}
	j[start.Cookie.Name] = start.Cookie.Value.Value()
	client := &http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	resp, err := client.Get(start.RedirectURL)
	if err != nil {
		o.t.Fatal(err)
	}
	resp.Body.Close()
	back, err := url.Parse(resp.Header.Get("Location"))
	if err != nil || back.Path != "/login/callback" {
		o.t.Fatalf("the provider sends the browser to %v, %v", back, err)
	}
	return auth.Callback{Query: back.Query(), Cookie: j.cookie}
}

func (o *office) comesBack(j jar, c auth.Callback) *auth.LoggedIn {
	o.t.Helper()
	in, err := o.FinishLogin(o.t.Context(), c)
	if err != nil {
		o.t.Fatal(err)
	}
	delete(j, in.Ended.Name)
	j[in.Cookie.Name] = in.Cookie.Value.Value()
	return in
}

func TestBrowserLogin(t *testing.T) {
	o := newUsers(t, nil)
	ctx := t.Context()
	j := jar{}
	if _, err := o.Browser(ctx, j.cookie); !errors.Is(err, auth.ErrNotLoggedIn) {
		t.Errorf("nobody is somebody: %v", err)
	}
	back := o.goLogIn(j, "/connect/x")
	asked := o.idp.Requests(authtest.EndpointAuthorize)[0].Query
	if asked.Get("nonce") == "" || asked.Get("code_challenge_method") != "S256" || asked.Get("scope") != "openid profile email groups" || asked.Has("resource") {
		t.Errorf("asked for %v", asked)
	}
	in := o.comesBack(j, back)
	if in.To != "/connect/x" || in.Principal != (auth.Principal{Issuer: o.idp.Issuer(), Subject: "alice"}) || len(j) != 1 {
		t.Errorf("logged in: %+v, %d cookies", in, len(j))
	}
	at, err := o.Browser(ctx, j.cookie)
	if err != nil || at.Principal != in.Principal || at.Account != "alice" || at.Proof == "" || at.Proof == j[in.Cookie.Name] {
		t.Errorf("the browser is %+v, %v", at, err)
	}
	// The bearer tokens of the same person are theirs.
	if who := o.accepts(o.idp.JWTFor("alice", gatewayURL, nil)); who.Principal != at.Principal {
		t.Errorf("%v and %v", who.Principal, at.Principal)
	}
	// What lives on the login needs nothing else.
	for _, name := range []string{"files", "wiki", "crm"} {
		o.works(at.Principal, name)
	}

	// Used up.
	back.Cookie = func(name string) (string, bool) { value, ok := j[name]; return value, ok }
	if _, err := o.FinishLogin(ctx, back); err == nil {
		t.Error("the same callback logged in twice")
	}
	// Another login, another secret; the old one is over.
	old := jar{in.Cookie.Name: j[in.Cookie.Name]}
	again := o.comesBack(j, o.goLogIn(j, "/"))
	if again.Cookie.Value.Equal(in.Cookie.Value) || again.Proof == at.Proof {
		t.Error("the cookie stayed")
	}
	if _, err := o.Browser(ctx, old.cookie); !errors.Is(err, auth.ErrNotLoggedIn) {
		t.Errorf("the old cookie: %v", err)
	}
	o.EndBrowser(ctx, j[again.Cookie.Name])
	if _, err := o.Browser(ctx, j.cookie); !errors.Is(err, auth.ErrNotLoggedIn) {
		t.Errorf("logged out: %v", err)
	}
	o.comesBack(j, o.goLogIn(j, "/"))
	if _, err := o.Browser(ctx, j.cookie); err != nil {
		t.Error(err)
	}
	o.clock.Advance(8 * time.Hour)
	if _, err := o.Browser(ctx, j.cookie); !errors.Is(err, auth.ErrNotLoggedIn) {
		t.Errorf("after eight hours: %v", err)
	}
}

func TestBrowserLoginRefused(t *testing.T) {
	o := newUsers(t, nil)
	ctx := t.Context()
	set := func(change func(*authtest.ASKnobs)) func() {
		return func() { o.idp.Set(change) }
	}
	for _, tt := range []struct {
		name   string
		before func() // the browser is at the provider
		change func(c *auth.Callback, j jar)
		after  func() // it is on its way back
		want   error
	}{
		{name: "no cookie", change: func(c *auth.Callback, j jar) { clear(j) }, want: auth.ErrWrongBrowser},
		{name: "another trip's cookie", change: func(c *auth.Callback, j jar) {
			other := jar{}
			o.goLogIn(other, "/")
			for name := range j {
				for _, value := range other {
					j[name] = value
				}
			}
		}, want: auth.ErrWrongBrowser},
		{name: "a changed cookie", change: func(c *auth.Callback, j jar) {
			for name, value := range j {
				j[name] = strings.Repeat("A", 8) + value[8:]
			}
		}, want: auth.ErrWrongBrowser},
		{name: "no state", change: func(c *auth.Callback, j jar) { c.Query.Del("state") }, want: auth.ErrStateUnknown},
		{name: "two states", change: func(c *auth.Callback, j jar) { c.Query.Add("state", "x") }, want: auth.ErrStateUnknown},
		{name: "huge state", change: func(c *auth.Callback, j jar) { c.Query.Set("state", strings.Repeat("x", 1<<20)) }, want: auth.ErrStateUnknown},
		{name: "expired", after: func() { o.clock.Advance(11 * time.Minute) }, want: auth.ErrStateUnknown},
		{name: "no code", change: func(c *auth.Callback, j jar) { c.Query.Del("code") }, want: auth.ErrStateUnknown},
		{name: "code and error", change: func(c *auth.Callback, j jar) { c.Query.Set("error", "access_denied") }, want: auth.ErrStateUnknown},
		{name: "denied", before: set(func(k *authtest.ASKnobs) { k.Deny = "access_denied" }), want: auth.ErrDenied},
		{name: "another issuer", before: set(func(k *authtest.ASKnobs) { k.Iss = authtest.IssWrong }), want: auth.ErrIssuerMismatch},
		{name: "a code of another", change: func(c *auth.Callback, j jar) { c.Query.Set("code", o.goLogIn(jar{}, "/").Query.Get("code")) }, want: auth.ErrExchange},
		{name: "no ID token", after: set(func(k *authtest.ASKnobs) { k.IDToken = nil }), want: auth.ErrExchange},
		{name: "another nonce", after: set(func(k *authtest.ASKnobs) { k.IDToken = map[string]any{"nonce": "x"} }), want: auth.ErrExchange},
		{name: "no nonce", after: set(func(k *authtest.ASKnobs) { k.IDToken = map[string]any{"nonce": nil} }), want: auth.ErrExchange},
		{name: "for another client", after: set(func(k *authtest.ASKnobs) { k.IDToken = map[string]any{"aud": "x"} }), want: auth.ErrExchange},
		{name: "of another issuer", after: set(func(k *authtest.ASKnobs) { k.IDToken = map[string]any{"iss": "https://x.example"} }), want: auth.ErrExchange},
		{name: "over", after: set(func(k *authtest.ASKnobs) { k.IDToken = map[string]any{"exp": 1} }), want: auth.ErrExchange},
		{name: "no subject", after: set(func(k *authtest.ASKnobs) { k.IDToken = map[string]any{"sub": nil} }), want: auth.ErrExchange},
		{name: "the provider is away", after: set(func(k *authtest.ASKnobs) { k.Token = authtest.Status(503) }), want: auth.ErrExchange},
	} {
		t.Run(tt.name, func(t *testing.T) {
			defer o.idp.Set(func(k *authtest.ASKnobs) {
				*k = authtest.ASKnobs{IDToken: map[string]any{}, JWT: true, Now: o.clock.Now}
			})
			j := jar{}
			if tt.before != nil {
				tt.before()
			}
			back := o.goLogIn(j, "/")
			if tt.change != nil {
				tt.change(&back, j)
			}
			if tt.after != nil {
				tt.after()
			}
			if in, err := o.FinishLogin(ctx, back); !errors.Is(err, tt.want) {
				t.Errorf("got %v, %v, want %v", in, err, tt.want)
			}
		})
	}
	if access, _ := o.idp.Live(); access == 0 {
		t.Error("nothing was issued: the cases prove nothing")
	}
	if s := o.Status(auth.Principal{Issuer: o.idp.Issuer(), Subject: "alice"}, auth.LoginRemote); s.SignedIn {
		t.Error("a refused login was kept")
	}
}

// Of a hundred callbacks at once one redeems the code.
func TestBrowserLoginOnce(t *testing.T) {
	o := newUsers(t, nil)
	back := o.goLogIn(jar{}, "/")
	cookies := jar{}
	start, err := o.BeginLogin(t.Context(), "/", false)
	if err != nil {
		t.Fatal(err)
	}
	cookies[start.Cookie.Name] = start.Cookie.Value.Value()
	back = o.goLogIn(cookies, "/")
	back.Cookie = cookies.cookie
	var wg sync.WaitGroup
	var mu sync.Mutex
	done := 0
	for range 100 {
		wg.Go(func() {
			if _, err := o.FinishLogin(context.Background(), back); err == nil {
				mu.Lock()
				done++
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if n := o.idp.Count(authtest.EndpointToken); done != 1 || n != 1 {
		t.Errorf("%d logins, %d requests", done, n)
	}
}

// A login that one replica began another finishes, and all know it.
func TestBrowserLoginOfReplicas(t *testing.T) {
	store := auth.NewMemory(auth.MemoryConfig{})
	on := func(_ *office, c *auth.Config) { c.Store = store }
	one := newUsers(t, on)
	two := *one
	login := &auth.Login{Issuer: one.idp.Issuer(), ClientID: "gatehouse", ClientSecret: secret.New("canary-cs-gatehouse"), Audience: gatewayURL}
	newOffice(t, func(_ *office, c *auth.Config) {
		login.HTTP = c.Login.HTTP
		c.Store, c.Login, c.Now = store, login, one.clock.Now
		b, err := auth.New(*c)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(b.Close)
		two.Broker = b
		c.Store = auth.NewMemory(auth.MemoryConfig{})
	})
	j := jar{}
	in := two.comesBack(j, one.goLogIn(j, "/"))
	if at, err := one.Browser(t.Context(), j.cookie); err != nil || at.Principal != in.Principal {
		t.Errorf("the other replica: %+v, %v", at, err)
	}
}

func TestLoginCookies(t *testing.T) {
	o := newUsers(t, func(_ *office, c *auth.Config) { c.PublicURL = "https://gw.example" })
	start, err := o.BeginLogin(t.Context(), "/", true)
	if err != nil {
		t.Fatal(err)
	}
	to, err := url.Parse(start.RedirectURL)
	if err != nil || to.Query().Get("prompt") != "login" || to.Query().Get("redirect_uri") != "https://gw.example/login/callback" {
		t.Errorf("sent to %v, %v", to, err)
	}
	if !strings.HasPrefix(start.Cookie.Name, "__Host-") || !strings.HasPrefix(o.LoginCookie().Name, "__Host-") {
		t.Errorf("cookies %q and %q", start.Cookie.Name, o.LoginCookie().Name)
	}
	// A foreign page can begin any number; few are kept.
	var names []string
	for i := range 30 {
		names = append(names, fmt.Sprintf("__Host-gatehouse_trip_%08d", i), "other")
	}
	if stale := o.StaleTrips(names); len(stale) != 26 || slices.Contains(stale, "other") {
		t.Errorf("%d of 30 are too many", len(stale))
	}
	if stale := o.StaleTrips([]string{"__Host-gatehouse_trip_1", "other"}); len(stale) != 0 {
		t.Errorf("too many: %q", stale)
	}
}

// A login without remotes that live on it asks for nothing to keep, and keeps
// nothing.
func TestLoginIsNotKept(t *testing.T) {
	o := newUsers(t, func(_ *office, c *auth.Config) { c.Remotes = c.Remotes[3:] })
	o.idp.Set(func(k *authtest.ASKnobs) { k.ScopesListed = []string{"openid", "offline_access"} })
	j := jar{}
	in := o.comesBack(j, o.goLogIn(j, "/"))
	if o.Status(in.Principal, auth.LoginRemote).SignedIn {
		t.Error("the login's tokens are kept, and nobody needs them")
	}
	if asked := o.idp.Requests(authtest.EndpointAuthorize)[0].Query.Get("scope"); strings.Contains(asked, "offline_access") {
		t.Errorf("asked for %s", asked)
	}
}

func FuzzAuthenticate(f *testing.F) {
	for _, token := range []string{"", "a", "a.b.c", "e30.e30.", "eyJhbGciOiJub25lIn0.e30.", "eyJhbGciOiJFUzI1NiJ9.eyJpc3MiOiJ4In0.AAAA", strings.Repeat("x.", 100)} {
		f.Add(token)
	}
	o := newUsers(f, nil)
	f.Fuzz(func(t *testing.T, token string) {
		if _, err := o.Authenticate(t.Context(), token, nil); !errors.Is(err, auth.ErrBearer) {
			t.Errorf("accepted %q: %v", token, err)
		}
	})
}

func BenchmarkAuthenticate(b *testing.B) {
	o := newUsers(b, nil)
	b.Run("known", func(b *testing.B) {
		token := o.idp.JWTFor("alice", gatewayURL, nil)
		b.ReportAllocs()
		for b.Loop() {
			if _, err := o.Authenticate(b.Context(), token, nil); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("unknown", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			b.StopTimer()
			token := o.idp.JWTFor("alice", gatewayURL, nil)
			b.StartTimer()
			if _, err := o.Authenticate(b.Context(), token, nil); err != nil {
				b.Fatal(err)
			}
		}
	})
}
