package auth_test

import (
	"errors"
	"runtime"
	"testing"
	"time"

	"gatehouse/auth"
	"gatehouse/auth/storetest"
)

func TestRedis(t *testing.T) {
	storetest.Run(t, func(t *testing.T, c storetest.Config) (a, b auth.Store) {
		return auth.RedisForTests(t, c.MaxRecords, c.Now)
	})
}

// TestWatch: a sign-out at one replica is seen by the others at once, not only
// when they look again.
func TestWatch(t *testing.T) {
	w := &world{t: t, p: newProvider(t), clock: newClock(), log: &lockedBuffer{}}
	server := auth.RedisServer(t)
	w.store = server.Open(w.clock.Now)
	w.Broker = w.broker(1, nil)
	other := *w
	other.store = server.Open(w.clock.Now)
	other.Broker = other.broker(1, nil)
	w.signIn(auth.Local, "r0")
	if other.token(auth.Local, "r0") == "" {
		t.Fatal("no token at the other replica")
	}
	if _, err := w.SignOut(t.Context(), auth.Local, "r0"); err != nil {
		t.Fatal(err)
	}
	// Its clock stands still, so that it does not look by itself.
	for deadline := time.Now().Add(10 * time.Second); other.token(auth.Local, "r0") != ""; runtime.Gosched() {
		if time.Now().After(deadline) {
			t.Fatal("the sign-out was not told")
		}
	}
}

// TestGrantWithoutRedis: while the server is away, a token that is valid is used,
// nothing is refreshed, and nobody is asked to sign in; afterwards all goes on.
func TestGrantWithoutRedis(t *testing.T) {
	w := &world{t: t, p: newProvider(t), clock: newClock(), log: &lockedBuffer{}}
	server := auth.RedisServer(t)
	w.store = server.Open(w.clock.Now)
	w.Broker = w.broker(1, nil)
	w.p.set(func() { w.p.rotate = true })
	w.signIn(auth.Local, "r0")
	first := w.token(auth.Local, "r0")
	server.Stop()
	w.clock.Advance(57 * time.Minute) // time to refresh
	for range 3 {
		if got := w.token(auth.Local, "r0"); got != first {
			t.Errorf("token %q", got)
		}
		w.clock.Advance(30 * time.Second)
	}
	w.clock.Advance(time.Hour) // it has expired
	internal := func(what string, err error) {
		t.Helper()
		if e, ok := errors.AsType[*auth.Error](err); !ok || e.Kind != auth.KindInternal {
			t.Errorf("%s: %v", what, err)
		}
	}
	a := w.Authorizer(auth.Local, "r0")
	_, err := a.Token(t.Context())
	internal("an expired token", err)
	internal("a 401", a.Challenge(t.Context(), w.unauthorized("r0", first)))
	if n := w.p.count(&w.p.refreshes); n != 0 {
		t.Errorf("%d refreshes", n)
	}
	server.Restart()
	eventually(t, "a token when it is back", func() bool {
		w.clock.Advance(time.Minute)
		token, err := a.Token(t.Context())
		return err == nil && token != nil && token.AccessToken != first
	})
}
