package auth_test

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"gatehouse/auth"
	"gatehouse/auth/authtest"
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
		manyAtOnce(left, func(p auth.Principal) {
			token, err := w.Authorizer(p, "r0").Token(t.Context())
			if err != nil || token == nil {
				mu.Lock()
				without = append(without, p)
				mu.Unlock()
			}
		})
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

// TestOutageAndNothingToRefresh: who was let in to see whether the provider is back,
// and found nothing to send, has not seen that it is.
func TestOutageAndNothingToRefresh(t *testing.T) {
	const gone = shutAfterForTests // the number of the remote whose grant goes
	w := newWorld(t, gone+1, nil)
	for i := range gone + 1 {
		w.signIn(auth.Local, fmt.Sprint("r", i))
	}
	w.p.set(func() { w.p.token = grab(http.StatusServiceUnavailable, "text/plain", "") })
	w.clock.Advance(2 * time.Hour)
	everybody := func() {
		for i := range gone {
			if _, err := w.Authorizer(auth.Local, fmt.Sprint("r", i)).Token(t.Context()); err == nil {
				t.Error("a token from a provider that is away")
			}
		}
	}
	everybody()
	w.clock.Advance(2 * time.Second) // the gate lets one in again
	if err := w.store.Delete(t.Context(), auth.BucketGrants, auth.GrantKey(auth.Local, fmt.Sprint("r", gone))); err != nil {
		t.Fatal(err)
	}
	if got := w.token(auth.Local, fmt.Sprint("r", gone)); got != "" {
		t.Fatalf("token %q", got)
	}
	before := w.p.count(&w.p.refreshes)
	everybody()
	if n := w.p.count(&w.p.refreshes) - before; n != 1 {
		t.Errorf("%d requests, want one that looks", n)
	}
}

// manyAtOnce does something for each principal, for a few hundred at once.
func manyAtOnce(principals []auth.Principal, do func(auth.Principal)) {
	var wg sync.WaitGroup
	next := make(chan auth.Principal)
	for range 200 {
		wg.Go(func() {
			for p := range next {
				do(p)
			}
		})
	}
	for _, p := range principals {
		next <- p
	}
	close(next)
	wg.Wait()
}

// TestOutageOfExchanges: the identity provider is away for more than an hour.
// Tokens that were exchanged before are used for as long as they live; who has
// none gets a sentence, no link; hardly a request reaches the provider, for
// tokens, logins and metadata together; and when it is back all work, in a queue.
func TestOutageOfExchanges(t *testing.T) {
	const users = 5000
	o := newOffice(t, func(_ *office, c *auth.Config) { c.Log = discard })
	start := o.clock.Now()
	o.idp.Set(func(k *authtest.ASKnobs) {
		k.Now, k.TokenLife = o.clock.Now, 6*time.Hour
		// What is signed is verified by the true time.
		k.IDToken = map[string]any{"exp": start.Add(2 * time.Minute).Unix(), "iat": start.Unix()}
	})
	// Some logins have to be renewed to be of use; they pass the same gate.
	var renewed []auth.Principal
	for i := range 20 {
		p := auth.SessionPrincipal(fmt.Sprint("renewed-", i))
		o.loggedIn(p)
		renewed = append(renewed, p)
	}
	lives := func(d time.Duration) {
		o.idp.Set(func(k *authtest.ASKnobs) { k.Claims = map[string]any{"exp": o.clock.Now().Add(d).Unix()} })
	}
	o.idp.Set(func(k *authtest.ASKnobs) { k.IDToken["exp"] = start.Add(6 * time.Hour).Unix() })
	principals := make([]auth.Principal, users)
	for i := range principals {
		name := fmt.Sprint("user-", i)
		principals[i] = auth.Principal{Issuer: o.idp.Issuer(), Subject: name}
		if err := o.KeepLogin(t.Context(), principals[i], o.idp.IDTokenFor(name, "gatehouse"), "canary-at-"+name, 6*time.Hour); err != nil {
			t.Fatal(err)
		}
	}
	kept, short, none := principals[:2000], principals[2000:3000], principals[3000:]
	var mu sync.Mutex
	tokens := map[auth.Principal]string{}
	sentences := map[string]bool{}
	// ask returns who got no token.
	ask := func(of []auth.Principal) (without []auth.Principal) {
		t.Helper()
		manyAtOnce(of, func(p auth.Principal) {
			token, err := o.Authorizer(p, "files").Token(t.Context())
			mu.Lock()
			defer mu.Unlock()
			if err == nil && token != nil {
				if was := tokens[p]; was != "" && was != token.AccessToken {
					t.Errorf("%v has another token than before", p)
				}
				tokens[p] = token.AccessToken
				return
			}
			without = append(without, p)
			if e, ok := errors.AsType[*auth.Error](err); ok && e.Kind == auth.KindUnavailable {
				sentences[e.Say] = true
			} else {
				t.Errorf("%v: got %v", p, err)
			}
		})
		return without
	}
	lives(5 * time.Hour)
	if left := ask(kept); len(left) > 0 {
		t.Fatalf("%d have no token", len(left))
	}
	lives(20 * time.Minute)
	if left := ask(short); len(left) > 0 {
		t.Fatalf("%d have no token", len(left))
	}
	lives(5 * time.Hour)

	var inFlight, most, asked atomic.Int64
	var down atomic.Bool
	door := func(w http.ResponseWriter, r *http.Request, next http.HandlerFunc) {
		if down.Load() {
			asked.Add(1)
		}
		if r.Method == http.MethodPost {
			defer inFlight.Add(-1)
			n := inFlight.Add(1)
			for before := most.Load(); n > before && !most.CompareAndSwap(before, n); before = most.Load() {
			}
		}
		if down.Load() {
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		next(w, r)
	}
	o.idp.Set(func(k *authtest.ASKnobs) { k.Token, k.Metadata = door, door })
	down.Store(true)
	const rounds = 12
	waiting := append(slices.Clone(none), renewed...)
	o.clock.Advance(6 * time.Minute)
	for round := range rounds {
		if left := ask(kept); len(left) > 0 {
			t.Fatalf("%d cannot use the token that they have", len(left))
		}
		want := 0
		if round >= 3 {
			want = len(short)
		}
		if left := ask(short); len(left) != want {
			t.Errorf("round %d: %d without a token, want %d", round, len(left), want)
		}
		if left := ask(waiting); len(left) != len(waiting) {
			t.Fatalf("%d got a token from a provider that is away", len(waiting)-len(left))
		}
		o.clock.Advance(6 * time.Minute)
	}
	// In each round the gate lets one in, or a few before it is shut; and what that
	// one does not get puts the metadata in doubt, which are in two places.
	if n := asked.Load(); n > shutAfterForTests+refreshesForTests+rounds*(1+2) {
		t.Errorf("%d requests in more than an hour of outage", n)
	}
	for say := range sentences {
		if !strings.Contains(say, "the identity provider") || !strings.Contains(say, "in a moment") && !strings.Contains(say, "tried again") {
			t.Errorf("a sentence: %s", say)
		}
	}
	if s := o.Exchanges(); s.Evictions != 0 || s.Size > len(kept)+100 {
		t.Errorf("failures fill the cache: %+v", s)
	}

	down.Store(false)
	for _, p := range short {
		delete(tokens, p) // they get new ones
	}
	left := append(waiting, short...)
	for range 20 {
		o.clock.Advance(30 * time.Second)
		if left = ask(left); len(left) == 0 {
			break
		}
	}
	if len(left) > 0 {
		t.Errorf("%d have not recovered", len(left))
	}
	if n := most.Load(); n > refreshesForTests {
		t.Errorf("%d requests in flight", n)
	}
	if left := ask(kept); len(left) > 0 {
		t.Errorf("%d lost their token", len(left))
	}
	if n := o.idp.Count(authtest.EndpointAuthorize); n != len(renewed) {
		t.Errorf("%d logins", n)
	}
}

const (
	refreshesForTests = 16
	shutAfterForTests = 5
)
