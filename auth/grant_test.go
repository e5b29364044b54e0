package auth_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"gatehouse/auth"
)

// eventually waits for what another goroutine does.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(10 * time.Second)
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-deadline:
			t.Fatal("in vain: ", what)
		case <-tick.C:
		}
	}
}

// At 95 % of its life a token is handed out as it is, and refreshed meanwhile.
func TestRefreshInTheBackground(t *testing.T) {
	w := newWorld(t, 1, nil)
	w.signIn(auth.Local, "r0")
	first := w.token(auth.Local, "r0")
	w.clock.Advance(41 * time.Minute)
	if w.token(auth.Local, "r0") != first || w.p.count(&w.p.refreshes) != 0 {
		t.Fatal("refreshed at 68 % of the life")
	}
	release := make(chan struct{})
	w.p.set(func() {
		w.p.token = func(http.ResponseWriter, *http.Request) bool { <-release; return false }
	})
	w.clock.Advance(16 * time.Minute)
	for range 20 {
		if w.token(auth.Local, "r0") != first {
			t.Fatal("the valid token was not handed out")
		}
	}
	close(release)
	eventually(t, "the refresh", func() bool { return w.token(auth.Local, "r0") != first })
	if n := w.p.count(&w.p.refreshes); n != 1 {
		t.Errorf("%d refreshes, want 1", n)
	}
	if got := w.p.lastForm.Get("resource"); got != w.p.url("/mcp/r0") {
		t.Errorf("resource %q", got)
	}
	if s := w.Status(auth.Local, "r0"); !s.Expires.Equal(w.clock.Now().Add(time.Hour)) {
		t.Errorf("expires %v", s.Expires)
	}
	// The new token is used before the log hears of it.
	lines := func() int {
		return logLines(w, "level=INFO", "grant refreshed", "duration=", "remote=r0", "principal=local")
	}
	eventually(t, "the log line", func() bool { return lines() > 0 })
	if n := lines(); n != 1 {
		t.Errorf("%d lines about it in the log, want 1:\n%s", n, w.log)
	}
}

// A stream that nobody waits for uses what is valid and refreshes nothing,
// however often it is opened again; it is served once a call has refreshed.
func TestNoRefresh(t *testing.T) {
	w := newWorld(t, 1, nil)
	w.signIn(auth.Local, "r0")
	a, ctx := w.Authorizer(auth.Local, "r0"), auth.NoRefresh(t.Context())
	w.clock.Advance(57 * time.Minute) // a call would refresh in the background
	token, err := a.Token(ctx)
	if err != nil || token == nil {
		t.Fatalf("a token that is valid: %v, %v", token != nil, err)
	}
	if err := a.Renew(ctx, w.unauthorized("r0", token.AccessToken)); !errors.Is(err, auth.ErrRefreshDue) {
		t.Errorf("refused by the remote: %v", err)
	}
	w.clock.Advance(time.Hour)
	for range 5 {
		if token, err := a.Token(ctx); token != nil || !errors.Is(err, auth.ErrRefreshDue) {
			t.Errorf("expired: %v, %v", token != nil, err)
		}
	}
	w.Close() // which waits for what has been begun
	if n := w.p.count(&w.p.refreshes); n != 0 {
		t.Fatalf("%d refreshes for a stream", n)
	}
	w.Broker = w.broker(1, nil)
	called := w.token(auth.Local, "r0")
	if token, err := w.Authorizer(auth.Local, "r0").Token(ctx); err != nil || token == nil || token.AccessToken != called {
		t.Errorf("after a call: %v, %v", token != nil, err)
	}
}

// Many wait for one refresh of an expired token, each under its own context.
func TestRefreshOfAnExpiredToken(t *testing.T) {
	w := newWorld(t, 1, nil)
	w.signIn(auth.Local, "r0")
	w.clock.Advance(2 * time.Hour)
	arrived, release := make(chan struct{}), make(chan struct{})
	w.p.set(func() {
		w.p.token = func(http.ResponseWriter, *http.Request) bool { close(arrived); <-release; return false }
	})
	a := w.Authorizer(auth.Local, "r0")
	ctx, leave := context.WithCancel(t.Context())
	left := make(chan error)
	go func() {
		_, err := a.Token(ctx)
		left <- err
	}()
	<-arrived
	tokens := make([]string, 50)
	var wg sync.WaitGroup
	for i := range tokens {
		wg.Go(func() {
			if token, err := a.Token(t.Context()); err == nil && token != nil {
				tokens[i] = token.AccessToken
			}
		})
	}
	leave() // the first, who caused the refresh
	if err := <-left; !errors.Is(err, context.Canceled) {
		t.Errorf("the caller who left got %v", err)
	}
	close(release)
	wg.Wait()
	for _, token := range tokens {
		if token != secretsCanary+"-access-2" {
			t.Errorf("token %q", token)
		}
	}
	if n := w.p.count(&w.p.refreshes); n != 1 {
		t.Errorf("%d refreshes, want 1", n)
	}
}

// However many users there are, a few grants are in memory, beside those in use;
// everybody gets their own all the same.
func TestGrantsInMemoryAreBounded(t *testing.T) {
	const users, most = 20, 3
	w := newWorld(t, 1, nil)
	w.p.set(func() { w.p.rotate = true })
	w.MaxHolds(most)
	p := func(i int) auth.Principal { return auth.SessionPrincipal(fmt.Sprint("user-", i)) }
	tokens := map[string]bool{}
	for i := range users {
		w.signIn(p(i), "r0")
		tokens[w.token(p(i), "r0")] = true
	}
	if n := w.Holds(); n != users {
		t.Errorf("%d grants are in memory while all are in use, want %d", n, users)
	}
	w.clock.Advance(10 * time.Minute) // all are silent
	w.signIn(p(users), "r0")
	for range 2 {
		for i := range users {
			w.clock.Advance(10 * time.Minute) // the others are silent
			token := w.token(p(i), "r0")
			if token == "" {
				t.Errorf("user %d has no token", i)
			}
			tokens[token] = true
			if n := w.Holds(); n > most {
				t.Errorf("%d grants are in memory, want %d at most", n, most)
			}
		}
	}
	if len(tokens) < 2*users {
		t.Errorf("%d tokens for %d users", len(tokens), users)
	}
}

// Whoever finds in memory what another has just read from the store finds all of
// it: after a restart all calls come at once.
func TestManyFindAGrantAtOnce(t *testing.T) {
	w := newWorld(t, 1, nil)
	w.signIn(auth.Local, "r0")
	for range 500 {
		a := w.broker(1, nil).Authorizer(auth.Local, "r0")
		start := make(chan struct{})
		var wg sync.WaitGroup
		for range 32 {
			wg.Go(func() {
				<-start
				if token, err := a.Token(t.Context()); err != nil || token == nil {
					t.Errorf("a token: %v, %v", token != nil, err)
				}
			})
		}
		close(start)
		wg.Wait()
	}
}

// TestClockSteps: a clock that steps back or forth by minutes costs nothing; one
// that has slept past the expiry finds the token expired, and renews it once.
func TestClockSteps(t *testing.T) {
	w := newWorld(t, 1, nil)
	w.signIn(auth.Local, "r0")
	for _, step := range []time.Duration{-5 * time.Minute, 5 * time.Minute, 5 * time.Minute, -5 * time.Minute} {
		w.clock.Advance(step)
		if got := w.token(auth.Local, "r0"); got != secretsCanary+"-access-1" {
			t.Errorf("after a step of %s: token %q", step, got)
		}
	}
	if n := w.p.count(&w.p.refreshes); n != 0 {
		t.Errorf("%d refreshes of a token that is good for an hour", n)
	}
	for _, step := range []time.Duration{time.Hour, -5 * time.Minute, 10 * time.Minute} {
		w.clock.Advance(step)
		if got := w.token(auth.Local, "r0"); got != secretsCanary+"-access-2" {
			t.Errorf("after the suspend and a step of %s: token %q", step, got)
		}
	}
	if n := w.p.count(&w.p.refreshes); n != 1 {
		t.Errorf("%d refreshes, want 1", n)
	}
}

// Without rotation the answer holds no refresh token: the old one stays.
func TestRefreshTokenIsKeptOrReplaced(t *testing.T) {
	for _, rotate := range []bool{false, true} {
		t.Run(fmt.Sprint("rotate ", rotate), func(t *testing.T) {
			w := newWorld(t, 1, nil)
			w.p.set(func() { w.p.rotate = rotate })
			w.signIn(auth.Local, "r0")
			for i := range 3 {
				w.clock.Advance(2 * time.Hour)
				if got, want := w.token(auth.Local, "r0"), fmt.Sprintf("%s-access-%d", secretsCanary, i+2); got != want {
					t.Fatalf("token %q, want %q", got, want)
				}
			}
		})
	}
}

func TestInvalidGrantEndsTheGrant(t *testing.T) {
	w := newWorld(t, 1, nil)
	w.signIn(auth.Local, "r0")
	w.clock.Advance(2 * time.Hour)
	w.p.set(func() { clear(w.p.refreshTokens) })
	for range 3 {
		if got := w.token(auth.Local, "r0"); got != "" {
			t.Fatalf("token %q", got)
		}
	}
	w.clock.Advance(2 * time.Hour) // longer than any pause
	if w.token(auth.Local, "r0") != "" || w.p.count(&w.p.refreshes) != 1 {
		t.Error("an ended grant was refreshed again")
	}
	if s := w.Status(auth.Local, "r0"); s.SignedIn || s.Refreshable || s.LastError == nil || s.LastError.Kind != auth.KindToken {
		t.Errorf("status: %+v", s)
	}
	required := w.link(auth.Local, "r0")
	if required.Reason != auth.ReasonExpired {
		t.Errorf("reason %q", required.Reason)
	}
	if _, err := w.visit(required).finish(); err != nil {
		t.Fatal(err)
	}
	if s := w.Status(auth.Local, "r0"); !s.SignedIn || s.LastError != nil {
		t.Errorf("status after the sign-in: %+v", s)
	}
}

// What comes back for an old refresh token says nothing about the grant of a
// sign-in that ended meanwhile: servers end the old one when they make a new one.
func TestRefusalOfWhatWasReplaced(t *testing.T) {
	for _, answer := range []string{`{"error":"invalid_grant"}`, `{"error":"invalid_client"}`} {
		w := newWorld(t, 1, nil)
		a := w.Authorizer(auth.Local, "r0")
		w.signIn(auth.Local, "r0")
		w.clock.Advance(57 * time.Minute)
		arrived, release := make(chan struct{}), make(chan struct{})
		w.p.set(func() {
			w.p.token = func(rw http.ResponseWriter, r *http.Request) bool {
				if r.PostFormValue("grant_type") != "refresh_token" {
					return false
				}
				close(arrived)
				<-release
				return grab(http.StatusBadRequest, "application/json", answer)(rw, r)
			}
		})
		w.token(auth.Local, "r0")
		<-arrived
		required := w.required(a.Challenge(t.Context(),
			w.answer("r0", w.token(auth.Local, "r0"), http.StatusForbidden, `Bearer error="insufficient_scope", scope="write"`)))
		if _, err := w.visit(required).finish(); err != nil {
			t.Fatal(err)
		}
		fresh := w.token(auth.Local, "r0")
		close(release)
		eventually(t, "the end of the refresh", func() bool {
			return logLines(w, "the authorization server ended the grant")+logLines(w, "refresh failed") == 1
		})
		w.Close() // the refresh has noted by then whatever it notes
		w.Broker = w.broker(1, nil)
		if s := w.Status(auth.Local, "r0"); w.token(auth.Local, "r0") != fresh || !s.SignedIn || !s.Refreshable || s.LastError != nil {
			t.Errorf("%s: the new sign-in is gone: %+v", answer, s)
		}
	}
}

// An outage of the authorization server costs no sign-in.
func TestOutageKeepsTheGrant(t *testing.T) {
	down := grab(http.StatusServiceUnavailable, "text/plain", secretsCanary)
	w := newWorld(t, 1, nil)
	a := w.Authorizer(auth.Local, "r0")
	w.signIn(auth.Local, "r0")
	first := w.token(auth.Local, "r0")
	w.p.set(func() { w.p.token = down })

	w.clock.Advance(55 * time.Minute) // still valid
	for range 5 {
		if w.token(auth.Local, "r0") != first {
			t.Fatal("the valid token is gone")
		}
	}
	eventually(t, "the failed refresh", func() bool { return logLines(w, "refresh failed") == 1 })

	w.clock.Advance(time.Hour) // expired
	unavailable := func(err error) {
		t.Helper()
		e, ok := errors.AsType[*auth.Error](err)
		if !ok || e.Kind != auth.KindUnavailable {
			t.Fatalf("got %v, want %v", err, auth.KindUnavailable)
		}
	}
	const before = 2
	eventually(t, "another try", func() bool { // the first call may still wait for the first one
		_, err := a.Token(t.Context())
		unavailable(err)
		return w.p.count(&w.p.refreshes) == before
	})
	_, err := a.Token(t.Context()) // at once: not asked again
	unavailable(err)
	unavailable(a.Challenge(t.Context(), w.unauthorized("r0", "")))
	if n := w.p.count(&w.p.refreshes); n != before {
		t.Errorf("%d refreshes, want %d: no pause between them", n, before)
	}
	s := w.Status(auth.Local, "r0")
	if !s.SignedIn || s.LastError == nil || s.LastError.Kind != auth.KindUnavailable || s.Pending != nil {
		t.Errorf("status: %+v", s)
	}

	w.p.set(func() { w.p.token = nil })
	w.clock.Advance(time.Minute)
	if w.token(auth.Local, "r0") == "" {
		t.Error("no token after the outage")
	}
	if s := w.Status(auth.Local, "r0"); s.LastError != nil {
		t.Errorf("the outage is still told: %v", s.LastError)
	}
}

// Dex says invalid_request to a refresh token that it has seen before: there is
// nothing to be had for it, and a link is due, without the server being asked on.
func TestReplayedRefreshTokenAtDex(t *testing.T) {
	w := newWorld(t, 1, nil)
	w.signIn(auth.Local, "r0")
	w.p.set(func() {
		w.p.token = grab(http.StatusBadRequest, "application/json", `{"error":"invalid_request","error_description":"Refresh token is invalid or has already been claimed by another client."}`)
	})
	w.clock.Advance(2 * time.Hour)
	if token := w.token(auth.Local, "r0"); token != "" {
		t.Fatal("an expired token was handed out")
	}
	asked := w.p.count(&w.p.refreshes)
	if link := w.link(auth.Local, "r0"); link.Reason != auth.ReasonExpired {
		t.Errorf("reason %q", link.Reason)
	}
	for range 20 {
		w.token(auth.Local, "r0")
	}
	if n := w.p.count(&w.p.refreshes); n != asked {
		t.Errorf("asked %d times more", n-asked)
	}
	w.p.set(func() { w.p.token = nil })
	w.signIn(auth.Local, "r0")
	if w.token(auth.Local, "r0") == "" {
		t.Error("no token after the new sign-in")
	}
}

// The authorization server disowns the client: the grant is not refreshed with
// another one, and the next link brings a new registration.
func TestDisownedClientAtRefresh(t *testing.T) {
	w := newWorld(t, 1, nil)
	w.signIn(auth.Local, "r0")
	w.p.set(func() { w.p.token = grab(http.StatusUnauthorized, "application/json", `{"error":"invalid_client"}`) })
	w.clock.Advance(2 * time.Hour)
	if got := w.token(auth.Local, "r0"); got != "" {
		t.Fatalf("token %q", got)
	}
	required := w.link(auth.Local, "r0")
	if n := w.p.count(&w.p.registered); required.Reason != auth.ReasonExpired || n != 2 {
		t.Errorf("reason %q, %d registrations, want 2", required.Reason, n)
	}
	w.p.set(func() { w.p.token = nil })
	if _, err := w.visit(required).finish(); err != nil {
		t.Fatal(err)
	}
	if w.token(auth.Local, "r0") == "" {
		t.Error("no token")
	}
}

// An expired token that nothing refreshes leads to a new link at once.
func TestExpiredWithoutRefreshToken(t *testing.T) {
	w := newWorld(t, 1, nil)
	w.p.set(func() { w.p.noRefresh = true })
	w.signIn(auth.Local, "r0")
	w.clock.Advance(time.Hour)
	if got := w.token(auth.Local, "r0"); got != "" {
		t.Fatalf("an expired token: %q", got)
	}
	if s := w.Status(auth.Local, "r0"); s.SignedIn {
		t.Errorf("status: %+v", s)
	}
	required := w.link(auth.Local, "r0")
	if required.Reason != auth.ReasonExpired {
		t.Errorf("reason %q", required.Reason)
	}
	if _, err := w.visit(required).finish(); err != nil {
		t.Fatal(err)
	}
	if w.token(auth.Local, "r0") == "" || !w.Status(auth.Local, "r0").SignedIn {
		t.Error("not signed in after the second sign-in")
	}
}

func TestUnknownExpiry(t *testing.T) {
	w := newWorld(t, 1, nil)
	w.p.set(func() { w.p.lives = 0 })
	w.signIn(auth.Local, "r0")
	w.clock.Advance(365 * 24 * time.Hour)
	if w.token(auth.Local, "r0") == "" || w.p.count(&w.p.refreshes) != 0 {
		t.Error("a token without expires_in is not used until it is refused")
	}
}

func TestRenew(t *testing.T) {
	w := newWorld(t, 1, nil)
	a := w.Authorizer(auth.Local, "r0")
	renew := func(token string) error { return a.Renew(t.Context(), w.unauthorized("r0", token)) }
	if err := renew(""); !errors.Is(err, auth.ErrSignInNeeded) {
		t.Errorf("nothing held: %v", err)
	}
	if w.p.count(&w.p.registered) != 0 || w.Status(auth.Local, "r0").Pending != nil {
		t.Error("Renew started something")
	}
	w.signIn(auth.Local, "r0")
	first := w.token(auth.Local, "r0")
	if err := renew(""); err != nil {
		t.Errorf("a token is there for a request that had none: %v", err)
	}
	// Many are refused at once: one refresh mends it for all.
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			if err := renew(first); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	second := w.token(auth.Local, "r0")
	if n := w.p.count(&w.p.refreshes); n != 1 || second == first {
		t.Fatalf("%d refreshes, want 1", n)
	}
	// The refreshed one is refused as well: refreshing is no help.
	if err := renew(second); !errors.Is(err, auth.ErrSignInNeeded) {
		t.Errorf("a fresh token that is refused: %v", err)
	}
	required := w.link2(a, second)
	if required.Reason != auth.ReasonRefused {
		t.Errorf("reason %q", required.Reason)
	}
	if s := w.Status(auth.Local, "r0"); s.SignedIn || s.LastError == nil || s.Pending == nil {
		t.Errorf("status: %+v", s)
	}
	if n := w.p.count(&w.p.refreshes); n != 1 {
		t.Errorf("%d refreshes, want 1", n)
	}
	if _, err := w.visit(required).finish(); err != nil {
		t.Fatal(err)
	}
	if err := renew(second); err != nil {
		t.Errorf("after the sign-in: %v", err)
	}
	if s := w.Status(auth.Local, "r0"); !s.SignedIn || s.LastError != nil {
		t.Errorf("status after the sign-in: %+v", s)
	}
}

// Where tokens live for seconds, a server that counts whole seconds ends each a
// little before it said it would: each such refusal is mended by a refresh.
func TestRenewOfShortTokens(t *testing.T) {
	w := newWorld(t, 1, nil)
	w.p.set(func() { w.p.lives = 2 })
	w.signIn(auth.Local, "r0")
	for range 10 {
		token := w.token(auth.Local, "r0")
		w.clock.Advance(1200 * time.Millisecond)
		if err := w.Authorizer(auth.Local, "r0").Renew(t.Context(), w.unauthorized("r0", token)); err != nil {
			t.Fatal(err)
		}
	}
	if n := w.p.count(&w.p.refreshes); n != 10 {
		t.Errorf("%d refreshes, want 10", n)
	}
}

func (w *world) link2(a *auth.Authorizer, token string) *auth.RequiredError {
	w.t.Helper()
	return w.required(a.Challenge(w.t.Context(), w.unauthorized("r0", token)))
}

func TestSignOut(t *testing.T) {
	w := newWorld(t, 2, nil)
	ctx := t.Context()
	w.signIn(auth.Local, "r0")
	w.signIn(auth.Local, "r1")
	revoked, err := w.SignOut(ctx, auth.Local, "r0")
	if err != nil || !revoked {
		t.Errorf("signing out: %v, %v", revoked, err)
	}
	if want := []string{secretsCanary + "-refresh-1", secretsCanary + "-access-1"}; !slices.Equal(w.p.revoked, want) {
		t.Errorf("revoked %q, want %q", w.p.revoked, want)
	}
	if w.token(auth.Local, "r0") != "" || w.Status(auth.Local, "r0").SignedIn {
		t.Error("still signed in")
	}
	if w.token(auth.Local, "r1") == "" {
		t.Error("a sibling was signed out")
	}
	if r := w.link(auth.Local, "r0"); r.Reason != auth.ReasonSignIn {
		t.Errorf("reason %q", r.Reason)
	}
	if revoked, err := w.SignOut(ctx, auth.Local, "r0"); err != nil || revoked {
		t.Errorf("signing out of nothing: %v, %v", revoked, err)
	}
	if w.Status(auth.Local, "r0").Pending != nil {
		t.Error("a link outlived the sign-out")
	}
	// A server that cannot be told does not keep anybody signed in.
	w.p.server.Close()
	if revoked, err := w.SignOut(ctx, auth.Local, "r1"); err != nil || revoked {
		t.Errorf("signing out without the server: %v, %v", revoked, err)
	}
	if w.token(auth.Local, "r1") != "" {
		t.Error("still signed in")
	}
}

// A store that cannot delete a sign-in is told, and what it keeps is of no use:
// the authorization server has revoked the tokens.
func TestSignOutWithoutTheStore(t *testing.T) {
	w := newWorld(t, 1, nil)
	w.signIn(auth.Local, "r0")
	w.token(auth.Local, "r0")
	if err := w.store.Close(); err != nil {
		t.Fatal(err)
	}
	revoked, err := w.SignOut(t.Context(), auth.Local, "r0")
	if e, ok := errors.AsType[*auth.Error](err); !ok || e.Kind != auth.KindInternal || !revoked {
		t.Errorf("revoked %v, error %v", revoked, err)
	}
	if want := []string{secretsCanary + "-refresh-1", secretsCanary + "-access-1"}; !slices.Equal(w.p.revoked, want) {
		t.Errorf("revoked %q, want %q", w.p.revoked, want)
	}
}

// A store that cannot be read does not make a link, or a sign-in, go away.
func TestStatusWithoutTheStore(t *testing.T) {
	w := newWorld(t, 2, nil)
	w.signIn(auth.Local, "r0")
	w.link(auth.Local, "r1")
	if s := w.Status(auth.Local, "r1"); s.Unknown || s.Pending == nil {
		t.Errorf("status: %+v", s)
	}
	if err := w.store.Close(); err != nil {
		t.Fatal(err)
	}
	for remote, signedIn := range map[string]bool{"r0": true, "r1": false} {
		if s := w.Status(auth.Local, remote); !s.Unknown || s.SignedIn != signedIn || s.LastError == nil || s.LastError.Kind != auth.KindInternal {
			t.Errorf("status of %s: %+v", remote, s)
		}
	}
}

// What a refresh brings while its owner signs out is revoked as well.
func TestSignOutDuringARefresh(t *testing.T) {
	w := newWorld(t, 1, nil)
	w.p.set(func() { w.p.rotate = true })
	w.signIn(auth.Local, "r0")
	w.clock.Advance(57 * time.Minute)
	arrived, release := make(chan struct{}), make(chan struct{})
	w.p.set(func() {
		w.p.token = func(http.ResponseWriter, *http.Request) bool { close(arrived); <-release; return false }
	})
	w.token(auth.Local, "r0")
	<-arrived
	done := make(chan error, 1)
	go func() {
		_, err := w.SignOut(t.Context(), auth.Local, "r0")
		done <- err
	}()
	select {
	case <-done:
		t.Error("did not wait for the refresh")
		done <- nil
	case <-time.After(20 * time.Millisecond): // long enough for one that does not wait
	}
	close(release)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if want := secretsCanary + "-refresh-2"; !slices.Contains(w.p.revoked, want) {
		t.Errorf("revoked %q, want %q among them", w.p.revoked, want)
	}
	if w.token(auth.Local, "r0") != "" {
		t.Error("still signed in")
	}
}

func TestEnd(t *testing.T) {
	w := newWorld(t, 2, nil)
	p, other := auth.SessionPrincipal("a"), auth.SessionPrincipal("b")
	w.signIn(p, "r0")
	w.signIn(other, "r0")
	pending := w.link(p, "r1")
	w.End(p)
	if w.token(p, "r0") != "" {
		t.Error("the grant is still there")
	}
	if _, err := w.Begin(t.Context(), flowOf(pending), auth.Visit{}); !errors.Is(err, auth.ErrFlowUnknown) {
		t.Errorf("the flow is still there: %v", err)
	}
	if w.token(other, "r0") == "" {
		t.Error("another's grant is gone")
	}
}

// A grant is for the remote, the issuer and the client that it was made for.
func TestGrantOfAnotherConfig(t *testing.T) {
	for name, change := range map[string]func(*auth.Remote){
		"url":    func(r *auth.Remote) { r.URL += "/v2" },
		"issuer": func(r *auth.Remote) { r.Issuer = "https://other.example" },
		"client": func(r *auth.Remote) { r.ClientID = "another" },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, 1, nil)
			w.signIn(auth.Local, "r0")
			same := w.broker(1, nil)
			if token, err := same.Authorizer(auth.Local, "r0").Token(t.Context()); err != nil || token == nil {
				t.Fatalf("the same config: %v, %v", token, err)
			}
			other := w.broker(1, func(c *auth.Config) { change(&c.Remotes[0]) })
			if token, err := other.Authorizer(auth.Local, "r0").Token(t.Context()); err != nil || token != nil {
				t.Errorf("the changed config: %v, %v", token, err)
			}
			if other.Status(auth.Local, "r0").SignedIn {
				t.Error("signed in")
			}
			if logLines(w, "level=WARN", "grant not used") != 1 {
				t.Errorf("not logged:\n%s", w.log)
			}
		})
	}
}

// A remote that names another authorization server: logged, the old grant is
// not used any more, and the user signs in anew.
func TestIssuerChanges(t *testing.T) {
	w := newWorld(t, 1, nil)
	w.signIn(auth.Local, "r0")
	token := w.token(auth.Local, "r0")
	next := newProvider(t)
	challenge := w.answer("r0", token, http.StatusForbidden, fmt.Sprintf(
		`Bearer error="insufficient_scope", scope="write", resource_metadata=%q`, w.p.url("/.well-known/oauth-protected-resource/moved")))
	w.p.serve("/.well-known/oauth-protected-resource/moved", map[string]any{
		"resource": w.p.url("/mcp/r0"), "authorization_servers": []string{next.issuer()},
	})
	required := w.required(w.Authorizer(auth.Local, "r0").Challenge(t.Context(), challenge))
	if required.Issuer != next.issuer() {
		t.Fatalf("issuer %q", required.Issuer)
	}
	if logLines(w, "level=WARN", "event=issuer_changed", "remote=r0", "was="+w.p.issuer(), "now="+next.issuer()) != 1 {
		t.Errorf("no event in the log:\n%s", w.log)
	}
	if got := w.token(auth.Local, "r0"); got != "" {
		t.Errorf("the old issuer's token: %q", got)
	}
	// Another principal's sign-in at the new one is an event, too.
	if strings.Count(w.log.String(), "issuer_changed") != 1 {
		t.Errorf("more than one event:\n%s", w.log)
	}
	old := w.link(auth.SessionPrincipal("b"), "r0") // still told the old one by the well-known document
	if old.Issuer != w.p.issuer() || strings.Count(w.log.String(), "issuer_changed") != 1 {
		t.Errorf("issuer %q of the other, log:\n%s", old.Issuer, w.log)
	}
}

// A client that was registered by hand has a secret of one authorization server:
// another one does not get to see it, nor does an older link lead it there.
func TestIssuerChangesUnderASecret(t *testing.T) {
	w := newWorld(t, 1, func(c *auth.Config) { secretClient(&c.Remotes[0]) })
	next := newProvider(t)
	w.p.serve("/.well-known/oauth-protected-resource/moved", map[string]any{
		"resource": w.p.url("/mcp/r0"), "authorization_servers": []string{next.issuer()},
	})
	moved := func(p auth.Principal) error {
		return w.Authorizer(p, "r0").Challenge(t.Context(), w.answer("r0", "", http.StatusUnauthorized,
			fmt.Sprintf("Bearer resource_metadata=%q", w.p.url("/.well-known/oauth-protected-resource/moved"))))
	}
	finish := func(v *visit) error {
		c := v.callback()
		c.Remote, c.Path = "", "/oauth/callback"
		_, err := w.Finish(t.Context(), c)
		return err
	}
	w.p.set(func() {
		w.p.token = grab(http.StatusOK, "application/json", `{"access_token":"a","token_type":"Bearer"}`)
	})
	refused := func(err error) {
		t.Helper()
		if e, ok := errors.AsType[*auth.Error](err); !ok || e.Kind != auth.KindDiscovery || !strings.Contains(e.Say, "another authorization server") {
			t.Errorf("got %v", err)
		}
		if n := next.count(&next.tokenPosts); n != 0 {
			t.Errorf("%d token requests at the other server", n)
		}
	}
	older := (&world{Broker: w.Broker, t: t, p: next}).visit(w.required(moved(auth.SessionPrincipal("b"))))
	if err := finish(w.visit(w.link(auth.Local, "r0"))); err != nil {
		t.Fatal(err)
	}
	refused(finish(older))

	w.Broker = w.broker(1, func(c *auth.Config) { secretClient(&c.Remotes[0]) })
	refused(moved(auth.SessionPrincipal("b")))
	if logLines(w, "level=WARN", "event=issuer_changed", "remote=r0", "was="+w.p.issuer(), "now="+next.issuer()) != 1 {
		t.Errorf("no event in the log:\n%s", w.log)
	}
	if token := w.token(auth.Local, "r0"); token == "" {
		t.Error("the sign-in at the server that it was made at is gone")
	}

	w.Broker = w.broker(1, func(c *auth.Config) {
		secretClient(&c.Remotes[0])
		c.Remotes[0].Issuer = next.issuer()
	})
	if required := w.required(moved(auth.Local)); required.Issuer != next.issuer() {
		t.Errorf("the config names it, and the link leads to %s", required.Issuer)
	}
}

func TestTokenIsCheap(t *testing.T) {
	w := newWorld(t, 1, nil)
	w.signIn(auth.Local, "r0")
	a := w.Authorizer(auth.Local, "r0")
	ctx := t.Context()
	allocs := testing.AllocsPerRun(1000, func() {
		if token, err := a.Token(ctx); err != nil || token == nil {
			t.Fatal(token, err)
		}
	})
	if allocs > 1 {
		t.Errorf("%v allocations, want 1 at most", allocs)
	}
	// What is handed out is the caller's.
	token, err := a.Token(ctx)
	if err != nil || token.RefreshToken != "" {
		t.Fatalf("%v, or the refresh token goes out", err)
	}
	token.AccessToken = "spoiled"
	if w.token(auth.Local, "r0") == "spoiled" {
		t.Error("callers share a token")
	}
}
