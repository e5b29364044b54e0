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
	"gatehouse/auth/secret"
)

func TestWalk(t *testing.T) {
	w := newWorld(t, 2, nil)
	ctx := t.Context()
	p := auth.SessionPrincipal("5b2f0c1e-canary")
	if got := w.token(p, "r0"); got != "" {
		t.Fatalf("a token before the sign-in: %q", got)
	}
	required := w.link(p, "r0")
	if required.Remote != "r0" || required.Reason != auth.ReasonSignIn || required.Issuer != w.p.issuer() ||
		!required.Expires.Equal(w.clock.Now().Add(10*time.Minute)) ||
		!strings.HasPrefix(required.AuthURL, "http://127.0.0.1:8080/connect/") {
		t.Errorf("required: %+v", required)
	}
	if s := w.Status(p, "r0"); s.SignedIn || s.Pending == nil || s.Pending.AuthURL != required.AuthURL {
		t.Errorf("status while pending: %+v", s)
	}
	info, err := w.Flow(ctx, flowOf(required), auth.Visit{})
	if err != nil || info.Principal != p || info.Remote != "r0" || info.Issuer != w.p.issuer() || info.Ended {
		t.Errorf("flow: %+v, %v", info, err)
	}

	w.p.set(func() { w.p.idToken = "e30.eyJzdWIiOiJhbGljZSJ9.c2ln" })
	v := w.visit(required)
	if name := v.start.Cookie.Name; !strings.HasPrefix(name, "gatehouse_flow_") || len(name) != len("gatehouse_flow_")+8 {
		t.Errorf("cookie name %q", name)
	}
	asked, err := url.Parse(v.start.RedirectURL)
	if err != nil {
		t.Fatal(err)
	}
	q := asked.Query()
	if q.Get("resource") != w.p.url("/mcp/r0") || q.Get("scope") != "read" || q.Get("redirect_uri") != "http://127.0.0.1:8080/oauth/callback/r0" ||
		q.Get("code_challenge_method") != "S256" || len(q.Get("state")) != 43 {
		t.Errorf("authorization request: %v", q)
	}
	finished, err := v.finish()
	if err != nil || finished.Remote != "r0" || finished.Principal != p || finished.FlowID != flowOf(required) {
		t.Fatalf("finished: %+v, %v", finished, err)
	}
	if got := w.token(p, "r0"); got != secretsCanary+"-access-1" {
		t.Errorf("token %q", got)
	}
	s := w.Status(p, "r0")
	if !s.SignedIn || s.Issuer != w.p.issuer() || s.Account != "alice" || !s.Refreshable || s.Pending != nil || s.LastError != nil ||
		!s.Expires.Equal(w.clock.Now().Add(time.Hour)) || strings.Join(s.Scopes, " ") != "read" {
		t.Errorf("status: %+v", s)
	}
	// Nobody else, and no other remote, has it.
	if w.token(auth.Local, "r0") != "" || w.token(p, "r1") != "" {
		t.Error("another's token")
	}

	// The link says what came of it, for ten minutes, and begins nothing.
	outcome := auth.Outcome{OK: true, Say: "connected"}
	w.Conclude(ctx, finished.FlowID, outcome)
	if info, err := w.Flow(ctx, finished.FlowID, auth.Visit{}); err != nil || !info.Ended || info.Outcome != outcome {
		t.Errorf("ended flow: %+v, %v", info, err)
	}
	if _, err := w.Begin(ctx, finished.FlowID, auth.Visit{}); !errors.Is(err, auth.ErrFlowUnknown) {
		t.Errorf("Begin of an ended flow: %v", err)
	}
	w.clock.Advance(10 * time.Minute)
	if _, err := w.Flow(ctx, finished.FlowID, auth.Visit{}); !errors.Is(err, auth.ErrFlowUnknown) {
		t.Errorf("flow ten minutes after its end: %v", err)
	}
	for name, text := range map[string]string{
		"state": q.Get("state"), "challenge": q.Get("code_challenge"), "cookie": v.start.Cookie.Value.Value(),
		"flow id": flowOf(required), "session id": "5b2f0c1e-canary", "verifier": w.p.lastForm.Get("code_verifier"),
	} {
		if strings.Contains(w.log.String(), text) {
			t.Errorf("the log holds the %s", name)
		}
	}
}

func TestParallelChallengesShareOneFlow(t *testing.T) {
	w := newWorld(t, 1, nil)
	links := make([]string, 50)
	var wg sync.WaitGroup
	for i := range links {
		wg.Go(func() {
			err := w.Authorizer(auth.Local, "r0").Challenge(t.Context(), w.unauthorized("r0", ""))
			if required, ok := errors.AsType[*auth.RequiredError](err); ok {
				links[i] = required.AuthURL
			}
		})
	}
	wg.Wait()
	for _, link := range links {
		if link == "" || link != links[0] {
			t.Fatalf("links differ: %q and %q", link, links[0])
		}
	}
	if n := w.p.count(&w.p.registered); n != 1 {
		t.Errorf("%d registrations, want 1", n)
	}
	// Another principal has another link, but the same client.
	if w.link(auth.SessionPrincipal("b"), "r0").AuthURL == links[0] {
		t.Error("two principals share a link")
	}
	if n := w.p.count(&w.p.registered); n != 1 {
		t.Errorf("%d registrations for two principals, want 1", n)
	}
}

func TestPendingLinkSlides(t *testing.T) {
	w := newWorld(t, 1, nil)
	first := w.link(auth.Local, "r0")
	started := w.clock.Now()
	var last *auth.RequiredError
	for range 7 {
		w.clock.Advance(8 * time.Minute)
		last = w.link(auth.Local, "r0")
		if last.AuthURL != first.AuthURL {
			t.Fatalf("another link after %v", w.clock.Now().Sub(started))
		}
	}
	if want := started.Add(time.Hour); !last.Expires.Equal(want) {
		t.Errorf("the link works until %v, want %v: an hour after its start", last.Expires, want)
	}
	w.clock.Advance(4 * time.Minute)
	if w.link(auth.Local, "r0").AuthURL == first.AuthURL {
		t.Error("a link lives for more than an hour")
	}
	if _, err := w.Begin(t.Context(), flowOf(first), auth.Visit{}); !errors.Is(err, auth.ErrFlowUnknown) {
		t.Errorf("Begin of an expired link: %v", err)
	}
}

func TestFlowsOfOnePrincipalAreCapped(t *testing.T) {
	const remotes = 25
	w := newWorld(t, remotes, func(c *auth.Config) { c.MaxFlows = 10 })
	bob := auth.SessionPrincipal("bob")
	his := w.link(bob, "r0")
	var links []*auth.RequiredError
	for i := range remotes {
		links = append(links, w.link(auth.Local, fmt.Sprintf("r%d", i)))
	}
	for i, link := range links {
		_, err := w.Flow(t.Context(), flowOf(link), auth.Visit{})
		if gone := errors.Is(err, auth.ErrFlowUnknown); gone != (i < remotes-10) {
			t.Errorf("flow %d of %d: %v", i, remotes, err)
		}
	}
	if _, err := w.Flow(t.Context(), flowOf(his), auth.Visit{}); err != nil {
		t.Errorf("another's flow: %v", err)
	}
}

func TestStatesOfOneFlowAreCapped(t *testing.T) {
	w := newWorld(t, 1, nil)
	required := w.link(auth.Local, "r0")
	visits := make([]*visit, 30)
	for i := range visits {
		visits[i] = w.visit(required)
	}
	if _, err := visits[len(visits)-11].finish(); !errors.Is(err, auth.ErrStateUnknown) {
		t.Errorf("the eleventh newest state: %v", err)
	}
	if _, err := visits[len(visits)-10].finish(); err != nil {
		t.Errorf("the tenth newest state: %v", err)
	}
}

// Five visits in any order: the first success is the flow's, and ends the rest.
func TestFirstSuccessEndsAll(t *testing.T) {
	for first := range 5 {
		w := newWorld(t, 1, nil)
		required := w.link(auth.Local, "r0")
		visits := make([]*visit, 5)
		for i := range visits {
			visits[i] = w.visit(required)
		}
		if _, err := visits[first].finish(); err != nil {
			t.Fatalf("visit %d: %v", first, err)
		}
		for i, v := range visits {
			if _, err := v.finish(); !errors.Is(err, auth.ErrStateUnknown) {
				t.Errorf("visit %d after visit %d: %v", i, first, err)
			}
		}
		if n := w.p.count(&w.p.tokenPosts); n != 1 {
			t.Errorf("%d token POSTs, want 1", n)
		}
	}
}

// Two tabs that come back together: both may reach the token endpoint, one wins.
func TestConcurrentVisitsOfOneFlow(t *testing.T) {
	w := newWorld(t, 1, nil)
	required := w.link(auth.Local, "r0")
	visits := []*visit{w.visit(required), w.visit(required)}
	var arrived sync.WaitGroup
	arrived.Add(len(visits))
	w.p.set(func() {
		w.p.token = func(http.ResponseWriter, *http.Request) bool {
			arrived.Done()
			arrived.Wait()
			return false
		}
	})
	errs := make([]error, len(visits))
	var wg sync.WaitGroup
	for i, v := range visits {
		wg.Go(func() { _, errs[i] = v.finish() })
	}
	wg.Wait()
	if (errs[0] == nil) == (errs[1] == nil) {
		t.Fatalf("not exactly one finished: %v", errs)
	}
	if err := errors.Join(errs...); !errors.Is(err, auth.ErrStateUnknown) {
		t.Errorf("the loser: %v", err)
	}
	if w.token(auth.Local, "r0") == "" {
		t.Error("no token")
	}
}

// Several flows, each with two tabs, finished in another order than begun.
func TestManyFlowsAnyOrder(t *testing.T) {
	w := newWorld(t, 5, nil)
	var visits []*visit
	for i := range 5 {
		required := w.link(auth.Local, fmt.Sprintf("r%d", i))
		w.visit(required)
		visits = append(visits, w.visit(required))
	}
	for _, i := range []int{3, 0, 4, 2, 1} {
		if _, err := visits[i].finish(); err != nil {
			t.Errorf("flow %d: %v", i, err)
		}
	}
	if n := w.p.count(&w.p.registered); n != 5 { // one for each redirect URI
		t.Errorf("%d registrations, want 5", n)
	}
}

func TestStepUp(t *testing.T) {
	w := newWorld(t, 1, nil)
	w.signIn(auth.Local, "r0")
	a := w.Authorizer(auth.Local, "r0")
	token := w.token(auth.Local, "r0")
	forbidden := func(token, challenge string) error {
		return a.Challenge(t.Context(), w.answer("r0", token, http.StatusForbidden, challenge))
	}
	kind := func(err error) auth.Kind {
		e, ok := errors.AsType[*auth.Error](err)
		if !ok {
			t.Fatalf("got %v, want an *Error", err)
		}
		return e.Kind
	}
	if got := kind(forbidden(token, "Bearer")); got != auth.KindForbidden {
		t.Errorf("a plain 403: %v", got)
	}
	if got := kind(forbidden(token, `Bearer error="insufficient_scope", scope="read"`)); got != auth.KindForbidden {
		t.Errorf("a scope that was granted already: %v", got)
	}
	if err := forbidden("an older token", `Bearer error="insufficient_scope", scope="write"`); err != nil {
		t.Errorf("another token is there, got %v", err)
	}
	required := w.required(forbidden(token, `Bearer error="insufficient_scope", scope="write"`))
	if required.Reason != auth.ReasonMoreScopes {
		t.Errorf("reason %q", required.Reason)
	}
	scopes := func(e *auth.RequiredError) string {
		info, err := w.Flow(t.Context(), flowOf(e), auth.Visit{})
		if err != nil {
			t.Fatal(err)
		}
		return strings.Join(info.Scopes, " ")
	}
	if got := scopes(required); got != "read write" {
		t.Errorf("asked for %q, want the union", got)
	}
	// The same need, the same link; another need, a wider one. The first still works.
	if again := w.required(forbidden(token, `Bearer error="insufficient_scope", scope="write"`)); again.AuthURL != required.AuthURL {
		t.Error("another link for the same scopes")
	}
	wider := w.required(forbidden(token, `Bearer error="insufficient_scope", scope="admin"`))
	if got := scopes(wider); wider.AuthURL == required.AuthURL || got != "read write admin" {
		t.Errorf("the wider link asks for %q", got)
	}
	narrow := w.visit(required)
	if w.token(auth.Local, "r0") != token {
		t.Error("the old token is gone before the sign-in")
	}
	w.p.set(func() { w.p.grantedScope = "read" }) // the user ticks nothing else
	if _, err := w.visit(wider).finish(); err != nil {
		t.Fatal(err)
	}
	if got := w.Status(auth.Local, "r0").Scopes; !slices.Equal(got, []string{"read"}) {
		t.Errorf("scopes %q, want what was granted", got)
	}
	if _, err := narrow.finish(); !errors.Is(err, auth.ErrStateUnknown) {
		t.Errorf("the narrower flow outlived the wider: %v", err)
	}
	if w.Status(auth.Local, "r0").Pending != nil {
		t.Error("a link is pending after the wider sign-in")
	}
	// They may think again, once: no loop.
	again := w.required(forbidden(w.token(auth.Local, "r0"), `Bearer error="insufficient_scope", scope="admin"`))
	if got := scopes(again); got != "read write admin" {
		t.Errorf("asked for %q the second time", got)
	}
	if _, err := w.visit(again).finish(); err != nil {
		t.Fatal(err)
	}
	if got := kind(forbidden(w.token(auth.Local, "r0"), `Bearer error="insufficient_scope", scope="admin"`)); got != auth.KindForbidden {
		t.Errorf("a scope that was refused twice: %v", got)
	}
}

func TestScopes(t *testing.T) {
	for _, tt := range []struct {
		name      string
		config    []string
		asScopes  []string
		challenge string
		want      string
	}{
		{"challenge", nil, nil, `Bearer scope="x y"`, "x y"},
		{"document", nil, nil, "Bearer", "read"},
		{"offline_access is listed", nil, []string{"read", "offline_access"}, "Bearer", "read offline_access"},
		{"config", []string{"only"}, []string{"offline_access"}, `Bearer scope="x y"`, "only"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t, 1, func(c *auth.Config) { c.Remotes[0].Scopes = tt.config })
			if tt.asScopes != nil {
				w.p.set(func() { w.p.metadata = map[string]any{"scopes_supported": tt.asScopes} })
			}
			a := w.Authorizer(auth.Local, "r0")
			challenge := func() *auth.RequiredError {
				return w.required(a.Challenge(t.Context(), w.answer("r0", "", http.StatusUnauthorized, tt.challenge)))
			}
			required := challenge()
			info, err := w.Flow(t.Context(), flowOf(required), auth.Visit{})
			if err != nil || strings.Join(info.Scopes, " ") != tt.want {
				t.Errorf("scopes %q, want %q (%v)", info.Scopes, tt.want, err)
			}
			if challenge().AuthURL != required.AuthURL {
				t.Error("the same challenge gave another link")
			}
		})
	}
}

func TestSignIn(t *testing.T) {
	w := newWorld(t, 1, nil)
	a := w.Authorizer(auth.Local, "r0")
	required := w.required(a.SignIn(t.Context()))
	if w.link(auth.Local, "r0").AuthURL != required.AuthURL || w.required(a.SignIn(t.Context())).AuthURL != required.AuthURL {
		t.Error("a challenge after SignIn has another link")
	}
}

func TestUnknownAndDisabled(t *testing.T) {
	w := newWorld(t, 1, func(c *auth.Config) { c.Disabled = true })
	ctx := t.Context()
	a := w.Authorizer(auth.Local, "r0")
	if err := a.Challenge(ctx, w.unauthorized("r0", "")); !errors.Is(err, auth.ErrDisabled) {
		t.Errorf("Challenge while disabled: %v", err)
	}
	if err := a.SignIn(ctx); !errors.Is(err, auth.ErrDisabled) {
		t.Errorf("SignIn while disabled: %v", err)
	}
	if w.ClientMetadata() != nil {
		t.Error("the metadata document is served while disabled")
	}
	a = w.Authorizer(auth.Local, "nobody")
	_, err := a.Token(ctx)
	_, signOut := w.SignOut(ctx, auth.Local, "nobody")
	for what, err := range map[string]error{
		"Token": err, "Renew": a.Renew(ctx, w.unauthorized("r0", "")), "Challenge": a.Challenge(ctx, w.unauthorized("r0", "")),
		"SignIn": a.SignIn(ctx), "SignOut": signOut, "Inspect": w.Inspect(ctx, "nobody", nil, nil),
	} {
		if !errors.Is(err, auth.ErrUnknownRemote) {
			t.Errorf("%s of an unknown remote: %v", what, err)
		}
	}
	if _, err := w.Begin(ctx, "nonsense", auth.Visit{}); !errors.Is(err, auth.ErrFlowUnknown) {
		t.Errorf("Begin of nonsense: %v", err)
	}
	if s := w.Status(auth.Local, "nobody"); s.SignedIn || s.Pending != nil {
		t.Errorf("status of an unknown remote: %+v", s)
	}
}

func TestStartFailureIsToldAndForgotten(t *testing.T) {
	w := newWorld(t, 1, nil)
	w.p.set(func() { w.p.metadata = map[string]any{"issuer": "https://evil.example"} })
	err := w.Authorizer(auth.Local, "r0").Challenge(t.Context(), w.unauthorized("r0", ""))
	if e, ok := errors.AsType[*auth.Error](err); !ok || e.Kind != auth.KindDiscovery || e.Say == "" {
		t.Fatalf("got %v", err)
	}
	s := w.Status(auth.Local, "r0")
	if s.LastError == nil || s.LastError.Kind != auth.KindDiscovery || !s.LastErrorAt.Equal(w.clock.Now()) {
		t.Errorf("status: %+v", s)
	}
	w.p.set(func() { w.p.metadata = nil })
	w.link(auth.Local, "r0")
	if s := w.Status(auth.Local, "r0"); s.LastError != nil {
		t.Errorf("the failure is still told: %v", s.LastError)
	}
}

// A client that leaves does not end the start that others wait for.
func TestLeavingDoesNotEndTheStart(t *testing.T) {
	w := newWorld(t, 1, nil)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := w.Authorizer(auth.Local, "r0").SignIn(ctx); err == nil {
		t.Fatal("no error for a caller that has left")
	}
	w.required(w.Authorizer(auth.Local, "r0").SignIn(t.Context()))
}

func TestNewRefuses(t *testing.T) {
	w := newWorld(t, 1, nil)
	for name, change := range map[string]func(*auth.Config){
		"no store":             func(c *auth.Config) { c.Store = nil },
		"no log":               func(c *auth.Config) { c.Log = nil },
		"public URL":           func(c *auth.Config) { c.PublicURL = "127.0.0.1:8080" },
		"trailing slash":       func(c *auth.Config) { c.PublicURL += "/" },
		"callback path":        func(c *auth.Config) { c.CallbackPath = "callback" },
		"two of one name":      func(c *auth.Config) { c.Remotes = append(c.Remotes, c.Remotes[0]) },
		"a remote without URL": func(c *auth.Config) { c.Remotes[0].URL = "" },
	} {
		c := auth.Config{
			PublicURL: "http://127.0.0.1:8080", CallbackPath: "/oauth/callback", Store: w.store, Log: discard,
			Remotes: []auth.Remote{{Name: "a", URL: "https://a.example/mcp", HTTP: loopbackClient(t), ClientSecret: secret.New("x")}},
		}
		change(&c)
		if b, err := auth.New(c); err == nil {
			b.Close()
			t.Errorf("%s: not refused", name)
		}
	}
}

// TestStepUpLimit: a remote that wants more permissions each time it is called
// gets its way twice for each operation; others are not affected.
func TestStepUpLimit(t *testing.T) {
	w := newWorld(t, 1, nil)
	w.signIn(auth.Local, "r0")
	more := func(operation, scope string) error {
		t.Helper()
		ctx := auth.ForOperation(t.Context(), func() string { return operation })
		return w.Authorizer(auth.Local, "r0").Challenge(ctx, w.answer("r0", w.token(auth.Local, "r0"), http.StatusForbidden,
			fmt.Sprintf(`Bearer error="insufficient_scope", scope=%q`, scope)))
	}
	for _, scope := range []string{"one", "two"} {
		if _, err := w.visit(w.required(more("tools/call greedy", scope))).finish(); err != nil {
			t.Fatal(err)
		}
	}
	refused, ok := errors.AsType[*auth.Error](more("tools/call greedy", "three"))
	if !ok || refused.Kind != auth.KindForbidden || !strings.Contains(refused.Say, "2 times") {
		t.Errorf("a third time: %v", refused)
	}
	if _, err := w.visit(w.required(more("tools/call modest", "three"))).finish(); err != nil {
		t.Fatal(err)
	}
	if _, ok := errors.AsType[*auth.Error](more("tools/call greedy", "four")); !ok {
		t.Error("another operation's sign-in makes room for more")
	}
}
