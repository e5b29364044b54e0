package auth_test

import (
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
