package auth_test

import (
	"fmt"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"gatehouse/auth"
)

// TestOutage: the provider is away for ten minutes, in which thousands of grants
// expire and are asked for again and again. Hardly any request reaches it
// meanwhile, and when it is back all of them work, without a sign-in.
func TestOutage(t *testing.T) {
	const grants = 5000
	w := newWorld(t, 1, func(c *auth.Config) { c.Log = discard })
	principals := make([]auth.Principal, grants)
	for i := range principals {
		principals[i] = auth.Principal{Issuer: "https://idp.example.com", Subject: fmt.Sprint("user-", i)}
		w.signIn(principals[i], "r0")
	}
	var inFlight, most, asked atomic.Int64
	var down atomic.Bool
	down.Store(true)
	w.p.set(func() {
		w.p.token = func(rw http.ResponseWriter, _ *http.Request) bool {
			defer inFlight.Add(-1)
			n := inFlight.Add(1)
			for {
				before := most.Load()
				if n <= before || most.CompareAndSwap(before, n) {
					break
				}
			}
			asked.Add(1)
			if down.Load() {
				rw.WriteHeader(http.StatusServiceUnavailable)
				return true
			}
			return false
		}
	})
	// everybody asks for their token, a few hundred at once, and says who got one.
	everybody := func(left []auth.Principal) (without []auth.Principal) {
		var mu sync.Mutex
		var wg sync.WaitGroup
		next := make(chan auth.Principal)
		for range 200 {
			wg.Go(func() {
				for p := range next {
					token, err := w.Authorizer(p, "r0").Token(t.Context())
					if err != nil || token == nil {
						mu.Lock()
						without = append(without, p)
						mu.Unlock()
					}
				}
			})
		}
		for _, p := range left {
			next <- p
		}
		close(next)
		wg.Wait()
		return without
	}
	w.clock.Advance(2 * time.Hour)
	for range 10 {
		if got := len(everybody(principals)); got != grants {
			t.Fatalf("%d got a token from a provider that is away", grants-got)
		}
		w.clock.Advance(time.Minute)
	}
	if n := asked.Load(); n > 10*(shutAfterForTests+refreshesForTests) {
		t.Errorf("%d requests in ten minutes of outage", n)
	}
	down.Store(false)
	left := principals
	for range 20 {
		w.clock.Advance(30 * time.Second)
		if left = everybody(left); len(left) == 0 {
			break
		}
	}
	if len(left) > 0 {
		t.Errorf("%d have not recovered", len(left))
	}
	if n := most.Load(); n > refreshesForTests {
		t.Errorf("%d refreshes in flight", n)
	}
}

const (
	refreshesForTests = 16
	shutAfterForTests = 5
)
