package exchange

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"gatehouse/auth/endpoint"
	"gatehouse/auth/gate"
	"gatehouse/auth/guard"
	"gatehouse/auth/secret"
)

// The form of each kind of request is the standard's.
func TestForms(t *testing.T) {
	f := setUp(t, Config{})
	const grant = "urn:ietf:params:oauth:grant-type:token-exchange"
	for name, test := range map[string]struct {
		change func(*Target)
		want   map[string]string
	}{
		"plain": {func(*Target) {}, map[string]string{
			"grant_type": grant, "subject_token": "canary-alice", "subject_token_type": TypeIDToken,
			"requested_token_type": TypeAccessToken, "scope": "openid"}},
		"all": {func(t *Target) {
			t.Audience, t.Resource, t.Scopes, t.Requested = "crm-client", "https://crm.example", []string{"profile", "openid", "openid"}, TypeIDToken
		}, map[string]string{
			"grant_type": grant, "subject_token": "canary-alice", "subject_token_type": TypeIDToken, "requested_token_type": TypeIDToken,
			"audience": "crm-client", "resource": "https://crm.example", "scope": "openid profile"}},
		// Dex has no audience parameter.
		"Dex": {func(t *Target) { t.ConnectorID, t.Audience = "dex-a", "crm-client" }, map[string]string{
			"grant_type": grant, "subject_token": "canary-alice", "subject_token_type": TypeIDToken, "requested_token_type": TypeAccessToken,
			"connector_id": "dex-a", "scope": "audience:server:client_id:crm-client openid"}},
		"post": {func(t *Target) { t.Server.Client.Method = endpoint.MethodPost }, map[string]string{
			"grant_type": grant, "subject_token": "canary-alice", "subject_token_type": TypeIDToken, "requested_token_type": TypeAccessToken,
			"scope": "openid", "client_id": "g%w", "client_secret": "canary-client-secret"}},
		"machine": {func(t *Target) { t.Kind, t.Resource = Machine, "https://crm.example" }, map[string]string{
			"grant_type": "client_credentials", "scope": "openid", "resource": "https://crm.example"}},
	} {
		target := *f.target
		target.Server.Client.ID = "g%w"
		test.change(&target)
		f.provider.set(func(w http.ResponseWriter, _ *http.Request, _ int) {
			f.provider.issue(w, nil, map[string]any{"issued_token_type": target.requested()})
		})
		f.token(t, f.alice, &target)
		requests := f.provider.requests()
		last := requests[len(requests)-1]
		got := map[string]string{}
		for k, v := range last.form {
			got[k] = strings.Join(v, "|")
		}
		if !maps.Equal(got, test.want) {
			t.Errorf("%s: %v", name, got)
		}
		// RFC 6749 section 2.3.1: form-encoded before it is Basic.
		if basic := target.Server.Client.Method == ""; basic != (last.user == "g%25w" && last.password == "canary-client-secret") {
			t.Errorf("%s: Basic %q", name, last.user)
		}
	}
}

// Every field of a request, changed alone, gives another token; one that does
// not would hand somebody's token to somebody else.
func TestKeyFields(t *testing.T) {
	f := setUp(t, Config{})
	base := f.alice
	base.Expires = f.clock.now().Add(time.Hour)
	key1, key2 := new(endpoint.Key), new(endpoint.Key)
	f.target.Then = Server{Endpoint: "https://as.example/token", HTTP: f.http, Client: endpoint.Client{ID: "there"}}
	f.target.Server.Client.Key = key1
	other := guarded(t, time.Second)

	seen := map[key]string{keyOf(base, f.target): "nothing"}
	note := func(what string, s Subject, target *Target) {
		t.Helper()
		k := keyOf(s, target)
		if was, twice := seen[k]; twice {
			t.Errorf("%s and %s share a token", what, was)
		}
		seen[k] = what
	}
	// walk changes each field below v, one at a time.
	var walk func(path string, v reflect.Value, note func(path string))
	walk = func(path string, v reflect.Value, note func(path string)) {
		if v.Kind() == reflect.Struct && v.Type() != reflect.TypeFor[secret.Text]() && v.Type() != reflect.TypeFor[time.Time]() {
			for i := range v.NumField() {
				walk(path+"."+v.Type().Field(i).Name, v.Field(i), note)
			}
			return
		}
		was := reflect.ValueOf(v.Interface())
		switch old := v.Interface().(type) {
		case string:
			v.SetString(old + "x")
		case Kind:
			v.SetString(string(Machine))
		case bool:
			v.SetBool(!old)
		case []string:
			v.Set(reflect.ValueOf(append(slices.Clone(old), "another")))
		case secret.Text:
			v.Set(reflect.ValueOf(secret.New(old.Value() + "x")))
		case *endpoint.Key:
			v.Set(reflect.ValueOf(key2))
		case time.Time:
			return // of the subject's token, which is another one then
		default:
			if v.Type() != reflect.TypeFor[*guard.Client]() {
				t.Fatalf("%s: a field of a type that this test does not know: %s", path, v.Type())
			}
			v.Set(reflect.ValueOf(other))
		}
		note(path)
		v.Set(was)
	}
	s, target := base, *f.target
	walk("Subject", reflect.ValueOf(&s).Elem(), func(path string) { note(path, s, &target) })
	walk("Target", reflect.ValueOf(&target).Elem(), func(path string) { note(path, s, &target) })
	if len(seen) < 25 {
		t.Errorf("only %d fields were changed", len(seen))
	}
	// Texts do not run into each other.
	a, b := *f.target, *f.target
	a.Audience, a.Resource = "ab", "c"
	b.Audience, b.Resource = "a", "bc"
	if keyOf(base, &a) == keyOf(base, &b) {
		t.Error("two audiences share a token")
	}
	// The order of scopes is no difference.
	a.Scopes, b = []string{"x", "y"}, a
	b.Scopes = []string{"y", "x", "y"}
	if keyOf(base, &a) != keyOf(base, &b) {
		t.Error("the order of scopes makes another token")
	}
	runtime.KeepAlive(key1)
}

// The same through the front: another scope, audience, client or issuer of the
// same sub is another exchange; the same again is none.
func TestTokensApart(t *testing.T) {
	f := setUp(t, Config{})
	seen := map[string]bool{}
	ask := func(s Subject, change func(*Target)) {
		t.Helper()
		target := *f.target
		change(&target)
		first := f.token(t, s, &target)
		if seen[first] {
			t.Error("one token for two requests")
		}
		seen[first] = true
		if again := f.token(t, s, &target); again != first {
			t.Error("not from the cache")
		}
	}
	ask(f.alice, func(*Target) {})
	ask(f.alice, func(t *Target) { t.Scopes = []string{"openid", "email"} })
	ask(f.alice, func(t *Target) { t.Audience = "other" })
	ask(f.alice, func(t *Target) { t.Server.Client.ID = "other" })
	ask(f.alice, func(t *Target) { t.ConnectorID = "other" })
	ask(f.alice, func(t *Target) { t.Remote = "other" })
	elsewhere := f.alice
	elsewhere.Issuer = "https://other.example"
	ask(elsewhere, func(*Target) {})
	if s := f.Stats(); s.Hits != 7 || s.Misses != 7 || s.Size != 7 || s.Max != 10_000 || s.Evictions != 0 {
		t.Errorf("%+v", s)
	}
}

// Many who need one token make one request, and each waits as long as it likes.
func TestOneInFlight(t *testing.T) {
	f := setUp(t, Config{})
	open := make(chan struct{})
	f.provider.set(func(w http.ResponseWriter, _ *http.Request, n int) {
		<-open
		f.provider.issue(w, map[string]any{"n": n}, nil)
	})
	// The first leaves; what it began goes on for the others.
	ctx, cancel := context.WithCancel(t.Context())
	left := make(chan error)
	go func() {
		_, err := f.Token(ctx, f.alice, f.target)
		left <- err
	}()
	for f.Stats().Misses == 0 {
		runtime.Gosched()
	}
	cancel()
	if err := <-left; !errors.Is(err, context.Canceled) {
		t.Errorf("who left got %v", err)
	}
	var wg sync.WaitGroup
	tokens := make([]*Token, 50)
	for i := range tokens {
		wg.Go(func() {
			token, err := f.Token(t.Context(), f.alice, f.target)
			if err != nil {
				t.Error(err)
			}
			tokens[i] = token
		})
	}
	for f.Stats().Misses < 51 {
		runtime.Gosched() // all wait, and the lock is free meanwhile
	}
	close(open)
	wg.Wait()
	for _, token := range tokens {
		if token == nil || token != tokens[0] {
			t.Fatal("not everybody has the one token")
		}
	}
	if n := len(f.provider.requests()); n != 1 {
		t.Errorf("%d requests", n)
	}
}

// Near its end a token is renewed beside its use; while the server is away it is
// used to its end, also for a subject whose own token is over.
func TestLife(t *testing.T) {
	f := setUp(t, Config{})
	s := f.alice
	s.Expires = f.clock.now().Add(5 * time.Minute)
	first := f.token(t, s, f.target) // for ten minutes
	f.provider.set(func(w http.ResponseWriter, _ *http.Request, _ int) { w.WriteHeader(http.StatusServiceUnavailable) })
	f.clock.add(9*time.Minute + 30*time.Second)
	for range 3 {
		if f.token(t, s, f.target) != first {
			t.Error("another token")
		}
	}
	if n := len(f.provider.requests()); n != 1 {
		t.Errorf("%d requests, for a subject that has expired", n)
	}
	f.clock.add(time.Minute)
	if _, err := f.Token(t.Context(), s, f.target); !errors.Is(err, ErrSubject) {
		t.Errorf("after the end of both: %v", err)
	}
	s.Expires = f.clock.now().Add(time.Hour)
	if _, err := f.Token(t.Context(), s, f.target); !failedWith(err, http.StatusServiceUnavailable) {
		t.Errorf("from a server that fails: %v", err)
	}
	// It is not asked again at once, and asked again after a while.
	if _, err := f.Token(t.Context(), s, f.target); !failedWith(err, http.StatusServiceUnavailable) || len(f.provider.requests()) != 2 {
		t.Errorf("%v, %d requests", err, len(f.provider.requests()))
	}
	f.provider.set(nil)
	f.clock.add(2 * time.Second)
	second := f.token(t, s, f.target)
	if second == first {
		t.Error("the old token")
	}
	f.clock.add(9*time.Minute + 30*time.Second)
	if f.token(t, s, f.target) != second {
		t.Error("waited for the renewal")
	}
	f.settle()
	if got := f.token(t, s, f.target); got == second || len(f.provider.requests()) != 4 {
		t.Errorf("not renewed, %d requests", len(f.provider.requests()))
	}
}

// settle waits until no exchange is under way.
func (f *fixture) settle() {
	for {
		f.Exchanger.mu.Lock()
		n := len(f.flights)
		f.Exchanger.mu.Unlock()
		if n == 0 {
			return
		}
		runtime.Gosched()
	}
}

func failedWith(err error, status int) bool {
	e, ok := errors.AsType[*endpoint.Error](err)
	return ok && e.Status == status
}

// What the remote rejects is fetched anew, once.
func TestReject(t *testing.T) {
	f := setUp(t, Config{})
	first := f.token(t, f.alice, f.target)
	if !f.Reject(f.alice, f.target, first) {
		t.Error("the first rejection is worth another try")
	}
	second := f.token(t, f.alice, f.target)
	if second == first {
		t.Fatal("the rejected token again")
	}
	if !f.Reject(f.alice, f.target, first) || f.token(t, f.alice, f.target) != second {
		t.Error("a late rejection of the old token costs the new one")
	}
	if f.Reject(f.alice, f.target, second) {
		t.Error("the second rejection is not worth another try")
	}
	if f.token(t, f.alice, f.target) != second || len(f.provider.requests()) != 2 {
		t.Errorf("%d requests", len(f.provider.requests()))
	}
	f.clock.add(2 * time.Minute)
	if !f.Reject(f.alice, f.target, second) || f.token(t, f.alice, f.target) == second {
		t.Error("never again")
	}
}

// A token that was got for an earlier token of the subject serves while no server
// answers, for as long as it lives: not where one refuses, not for anybody or
// anything else, not after the remote has rejected it or its owner has gone.
func TestEarlierToken(t *testing.T) {
	f := setUp(t, Config{})
	away := func(w http.ResponseWriter, _ *http.Request, _ int) { w.WriteHeader(http.StatusServiceUnavailable) }
	first := f.token(t, f.alice, f.target) // for ten minutes
	renewed := f.alice
	renewed.Token = secret.New("canary-alice-2")
	f.provider.set(away)
	for range 12 { // the last of these meet a gate that is shut
		if f.token(t, renewed, f.target) != first {
			t.Error("not the token that is left")
		}
		f.clock.add(2 * time.Second)
	}
	if n := len(f.provider.requests()); n < 2 || n > 9 {
		t.Errorf("%d requests", n)
	}
	other, elsewhere, another := renewed, *f.target, renewed
	other.ID, elsewhere.Audience, another.Type = "bob", "wiki", TypeAccessToken
	for _, err := range []error{errOf(f.Token(t.Context(), other, f.target)), errOf(f.Token(t.Context(), renewed, &elsewhere)), errOf(f.Token(t.Context(), another, f.target))} {
		if err == nil {
			t.Error("a token for something else")
		}
	}

	f.clock.add(2 * time.Minute)
	f.provider.set(func(w http.ResponseWriter, _ *http.Request, _ int) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusBadRequest)
		io.WriteString(w, `{"error":"access_denied"}`)
	})
	if _, err := f.Token(t.Context(), renewed, f.target); err == nil {
		t.Error("the provider says no, and the earlier token is used")
	}

	f.provider.set(nil)
	f.clock.add(time.Minute)
	second := f.token(t, renewed, f.target)
	if second == first {
		t.Error("the provider is back, and the earlier token is used")
	}
	f.provider.set(away)
	third := f.alice
	third.Token = secret.New("canary-alice-3")
	if f.token(t, third, f.target) != second {
		t.Error("not the last token")
	}
	if !f.Reject(third, f.target, second) {
		t.Error("the rejection is not worth another try")
	}
	if _, err := f.Token(t.Context(), third, f.target); err == nil {
		t.Error("a token that was rejected")
	}

	f.provider.set(nil)
	f.clock.add(2 * time.Minute)
	f.token(t, third, f.target)
	f.provider.set(away)
	f.Clear(f.alice.Issuer, "alice", "")
	if _, err := f.Token(t.Context(), renewed, f.target); err == nil || f.Last(third, f.target) != nil {
		t.Error("a token of somebody who signed out")
	}
	if len(f.cache.latest) != 0 {
		t.Errorf("%d are kept as the latest", len(f.cache.latest))
	}
}

func errOf(_ *Token, err error) error { return err }

// Who has signed out finds nothing, not even what was on its way.
func TestClear(t *testing.T) {
	f := setUp(t, Config{})
	bob := f.alice
	bob.ID = "bob"
	crm, wiki := *f.target, *f.target
	wiki.Remote = "wiki"
	alices, bobs, wikis := f.token(t, f.alice, &crm), f.token(t, bob, &crm), f.token(t, f.alice, &wiki)
	f.Clear(f.alice.Issuer, "alice", "crm")
	if f.Kept(f.alice, &crm) != nil || f.Kept(bob, &crm) == nil || f.Kept(f.alice, &wiki) == nil {
		t.Error("clearing one clears too much or too little")
	}
	if f.token(t, f.alice, &crm) == alices || f.token(t, bob, &crm) != bobs || f.token(t, f.alice, &wiki) != wikis {
		t.Error("clearing one clears too much or too little")
	}
	f.Clear(f.alice.Issuer, "alice", "")
	if f.Kept(f.alice, &crm) != nil || f.Kept(f.alice, &wiki) != nil || f.Kept(bob, &crm) == nil {
		t.Error("clearing a subject clears too much or too little")
	}

	open := make(chan struct{})
	arrived := make(chan struct{})
	f.provider.set(func(w http.ResponseWriter, _ *http.Request, n int) {
		close(arrived)
		<-open
		f.provider.issue(w, map[string]any{"n": n}, nil)
	})
	got := make(chan error)
	go func() {
		_, err := f.Token(t.Context(), f.alice, &crm)
		got <- err
	}()
	<-arrived
	f.Clear(f.alice.Issuer, "alice", "")
	close(open)
	if err := <-got; !errors.Is(err, ErrCleared) {
		t.Errorf("what was on its way: %v", err)
	}
	if f.Kept(f.alice, &crm) != nil {
		t.Error("what was on its way is kept")
	}
}

// Ten thousand users and more: the bound holds, and who was not seen for longest
// goes first.
func TestBound(t *testing.T) {
	const bound = 100
	f := setUp(t, Config{Max: bound})
	first := f.token(t, person(0), f.target)
	for i := 1; i < 3*bound; i++ {
		f.token(t, person(i), f.target)
		if f.token(t, person(0), f.target) != first {
			t.Fatal("the most used was evicted")
		}
	}
	s := f.Stats()
	if s.Size != bound || s.Evictions != 2*bound {
		t.Errorf("%+v", s)
	}
	if f.Kept(person(1), f.target) != nil || f.Kept(person(3*bound-1), f.target) == nil {
		t.Error("not the least recently used went")
	}
	f.clock.add(time.Hour)
	if s := f.Stats(); s.Size != 0 {
		t.Errorf("an hour later there are %d", s.Size)
	}
}

func TestBoundTenThousand(t *testing.T) {
	c := newCache(defaultMax)
	now := time.Now()
	for i := range 15_000 {
		e := c.put(key{byte(i), byte(i >> 8)}, key{byte(i), byte(i >> 8), 1}, person(i), "crm", now)
		e.token = &Token{Expires: now.Add(time.Hour)}
		c.latest[e.person] = e
	}
	if len(c.entries) != defaultMax || len(c.latest) != defaultMax || c.recent.Len() != defaultMax || c.evicted != 5_000 {
		t.Errorf("%d entries, %d evicted", len(c.entries), c.evicted)
	}
}

// Twelve thousand users at once: the bound holds, those who were seen last are
// the ones who stay, and the lock is free while servers answer.
func TestTenThousandUsers(t *testing.T) {
	f := setUp(t, Config{})
	f.provider.set(func(w http.ResponseWriter, _ *http.Request, n int) {
		f.Stats() // would wait for ever for a lock that the request holds
		f.Kept(f.alice, f.target)
		f.provider.issue(w, map[string]any{"n": n}, nil)
	})
	const users = 12_000
	ask := func(from, to int) {
		var wg sync.WaitGroup
		next := make(chan int)
		for range 100 {
			wg.Go(func() {
				for i := range next {
					if _, err := f.Token(t.Context(), person(i), f.target); err != nil {
						t.Error(err)
					}
				}
			})
		}
		for i := from; i < to; i++ {
			next <- i
		}
		close(next)
		wg.Wait()
	}
	ask(0, 10_000)
	ask(0, 5_000) // from the cache: seen again
	if s := f.Stats(); s.Hits != 5_000 || s.Misses != 10_000 || s.Evictions != 0 {
		t.Errorf("before the bound: %+v", s)
	}
	ask(10_000, users)
	if s := f.Stats(); s.Size != 10_000 || s.Max != 10_000 || s.Evictions != 2_000 {
		t.Errorf("at the bound: %+v", s)
	}
	for i := range users {
		kept := f.Kept(person(i), f.target) != nil
		switch {
		case (i < 5_000 || i >= 10_000) && !kept:
			t.Fatalf("user %d, seen lately, has gone", i)
		case i >= 5_000 && i < 6_500 && kept: // about that order: many asked at once
			t.Fatalf("user %d, unseen for longest, is kept", i)
		}
	}
}

// The log tells what came from the cache and what was issued; hooks hear how each
// attempt ended.
func TestTold(t *testing.T) {
	var mu sync.Mutex
	var heard []string
	f := setUp(t, Config{Fetched: func(t *Target, outcome, issued string) {
		mu.Lock()
		defer mu.Unlock()
		heard = append(heard, t.Remote+" "+outcome+" "+issued)
	}})
	var log bytes.Buffer
	f.log = slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	f.token(t, f.alice, f.target)
	f.token(t, f.alice, f.target)
	for _, line := range []string{`msg="token fetched" remote=crm kind=exchange duration=`, `issued_type=` + TypeAccessToken, `msg="token from the cache" remote=crm kind=exchange issued_type=` + TypeAccessToken} {
		if !strings.Contains(log.String(), line) {
			t.Errorf("the log lacks %s:\n%s", line, &log)
		}
	}
	failing := func(remote string, answer func(w http.ResponseWriter)) {
		t.Helper()
		f.provider.set(func(w http.ResponseWriter, _ *http.Request, _ int) { answer(w) })
		target := *f.target
		target.Remote = remote
		if _, err := f.Token(t.Context(), f.alice, &target); err == nil {
			t.Errorf("%s got a token", remote)
		}
	}
	failing("refused", func(w http.ResponseWriter) { f.provider.issue(w, nil, map[string]any{"error": "invalid_target"}) })
	failing("wrong", func(w http.ResponseWriter) {
		f.provider.issue(w, map[string]any{"iss": "https://evil.example"}, nil)
	})
	failing("down", func(w http.ResponseWriter) {
		w.Header().Set("Retry-After", "60")
		w.WriteHeader(http.StatusServiceUnavailable)
	})
	failing("waiting", func(http.ResponseWriter) { t.Error("a request through a gate that is shut") })
	want := []string{"crm fetched access_token", "refused refused ", "wrong refused ", "down failed ", "waiting shut "}
	if !slices.Equal(heard, want) {
		t.Errorf("heard %q", heard)
	}
}

// A server that comes back meets a queue.
func TestQueue(t *testing.T) {
	f := setUp(t, Config{})
	var mu sync.Mutex
	var now, most int
	f.provider.set(func(w http.ResponseWriter, _ *http.Request, n int) {
		mu.Lock()
		now++
		most = max(most, now)
		mu.Unlock()
		runtime.Gosched()
		mu.Lock()
		now--
		mu.Unlock()
		f.provider.issue(w, map[string]any{"n": n}, nil)
	})
	var wg sync.WaitGroup
	for i := range 200 {
		wg.Go(func() { f.token(t, person(i), f.target) })
	}
	wg.Wait()
	if most > gate.AtOnce {
		t.Errorf("%d at once", most)
	}
}

// Every request passes the gate of its endpoint: where that is shut none is made,
// what is kept is used, and those who are turned away take no room.
func TestGates(t *testing.T) {
	f := setUp(t, Config{})
	as := newProvider(t)
	f.provider.set(func(w http.ResponseWriter, r *http.Request, _ int) {
		switch r.PostForm.Get("requested_token_type") {
		case TypeIDJAG:
			f.provider.issue(w, map[string]any{"aud": as.URL}, map[string]any{"issued_token_type": TypeIDJAG, "token_type": "N_A"})
		default:
			f.provider.issue(w, nil, nil)
		}
	})
	targets := map[string]*Target{}
	for _, kind := range []Kind{Exchange, Machine, IDJAG} {
		target := *f.target
		target.Remote, target.Kind = string(kind), kind
		targets[target.Remote] = &target
	}
	targets["idJag"].Audience = as.URL
	targets["idJag"].Then = Server{Endpoint: as.URL + "/token", HTTP: f.http, Client: endpoint.Client{ID: "there"}}
	kept := f.token(t, f.alice, f.target)
	shut := func(endpoint string) (open func()) {
		g := f.gates.Of(endpoint)
		leave, err := g.Enter(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		leave(gate.Verdict{Unwell: true, Wait: time.Minute})
		return func() { f.clock.add(time.Minute) }
	}
	open := shut(f.target.Server.Endpoint)
	for name, target := range targets {
		if _, err := f.Token(t.Context(), f.alice, target); !errors.Is(err, gate.ErrShut) {
			t.Errorf("%s, with the gate shut: %v", name, err)
		}
	}
	if f.token(t, f.alice, f.target) != kept {
		t.Error("what is kept is not used")
	}
	if s := f.Stats(); s.Size != 1 || len(f.provider.requests()) != 1 {
		t.Errorf("%+v, %d requests", s, len(f.provider.requests()))
	}
	open()
	open = shut(as.URL + "/token")
	for name, target := range targets {
		_, err := f.Token(t.Context(), f.alice, target)
		if _, then := errors.AsType[*ThenError](err); name == "idJag" && !(then && errors.Is(err, gate.ErrShut)) || name != "idJag" && err != nil {
			t.Errorf("%s, with the other gate shut: %v", name, err)
		}
	}
	if n := len(as.requests()); n != 0 {
		t.Errorf("%d requests at the remote's server", n)
	}
	open()
	f.token(t, f.alice, targets["idJag"])
}

// The issuer that is expected is the one that issued.
func TestIssuer(t *testing.T) {
	f := setUp(t, Config{})
	const us = "https://dex.example"
	for name, test := range map[string]struct {
		token  string
		pinned bool
		want   error
	}{
		"right":                 {jwt(map[string]any{"iss": us}), false, nil},
		"right, pinned":         {jwt(map[string]any{"iss": us}), true, nil},
		"another":               {jwt(map[string]any{"iss": "https://evil.example"}), false, ErrIssuer},
		"another, pinned":       {jwt(map[string]any{"iss": "https://evil.example"}), true, ErrIssuer},
		"by a slash":            {jwt(map[string]any{"iss": us + "/"}), true, ErrIssuer},
		"by a letter":           {jwt(map[string]any{"iss": "https://Dex.example"}), true, ErrIssuer},
		"none":                  {jwt(map[string]any{"sub": "x"}), false, ErrNoIssuer},
		"none, pinned":          {jwt(map[string]any{"sub": "x"}), true, nil},
		"opaque":                {"opaque", false, ErrNoIssuer},
		"opaque, pinned":        {"opaque", true, nil},
		"no JWT but like one":   {"a.b.c", false, ErrNoIssuer},
		"claims that are none":  {"e30.W10.x", false, ErrNoIssuer},
		"iss of another type":   {"e30.eyJpc3MiOjV9.x", false, ErrNoIssuer},
		"an audience that is 5": {jwt(map[string]any{"iss": us, "aud": 5}), false, ErrNoIssuer},
	} {
		f.provider.set(func(w http.ResponseWriter, _ *http.Request, _ int) {
			f.provider.issue(w, nil, map[string]any{"access_token": test.token})
		})
		target := *f.target
		target.Remote, target.Server.Issuer, target.Server.Pinned = name, us, test.pinned
		_, err := f.Token(t.Context(), f.alice, &target)
		if !errors.Is(err, test.want) {
			t.Errorf("%s: %v", name, err)
		}
		if test.want != nil && f.Kept(f.alice, &target) != nil {
			t.Errorf("%s is kept", name)
		}
	}
	f.provider.set(func(w http.ResponseWriter, _ *http.Request, _ int) {
		f.provider.issue(w, nil, map[string]any{"access_token": "opaque"})
	})
	f.target.Server.Issuer = ""
	if got := f.token(t, f.alice, f.target); got != "opaque" {
		t.Errorf("where no issuer is expected: %q", got)
	}
}

func TestAnswers(t *testing.T) {
	f := setUp(t, Config{})
	for name, test := range map[string]struct {
		claims, members map[string]any
		requested       string
		want            error
		lives           time.Duration
	}{
		"lives as it says":        {nil, nil, "", nil, 10 * time.Minute},
		"lives as its claim says": {map[string]any{"exp": f.clock.now().Add(time.Minute).Unix()}, nil, "", nil, time.Minute},
		"does not say":            {nil, map[string]any{"expires_in": nil}, "", nil, unknownLife},
		"over":                    {map[string]any{"exp": 5}, nil, "", ErrExpired, 0},
		"over, by far":            {map[string]any{"exp": -1e300}, nil, "", ErrExpired, 0},
		"for us":                  {map[string]any{"aud": "crm-client"}, nil, "", nil, 10 * time.Minute},
		"for us and others":       {map[string]any{"aud": []string{"gw", "crm-client"}}, nil, "", nil, 10 * time.Minute},
		"for the resource":        {map[string]any{"aud": "https://crm.example"}, nil, "", nil, 10 * time.Minute},
		"for others":              {map[string]any{"aud": []string{"gw"}}, nil, "", ErrAudience, 0},
		"a JWT":                   {nil, map[string]any{"issued_token_type": TypeJWT}, "", nil, 10 * time.Minute},
		"untold type":             {nil, map[string]any{"issued_token_type": nil}, "", nil, 10 * time.Minute},
		"an ID token":             {nil, map[string]any{"issued_token_type": TypeIDToken, "token_type": "N_A"}, TypeIDToken, nil, 10 * time.Minute},
		"an ID token, unasked":    {nil, map[string]any{"issued_token_type": TypeIDToken}, "", ErrTokenType, 0},
		"a refresh token":         {nil, map[string]any{"issued_token_type": "urn:ietf:params:oauth:token-type:refresh_token"}, "", ErrTokenType, 0},
		"no ID token":             {nil, map[string]any{"issued_token_type": TypeAccessToken}, TypeIDToken, ErrTokenType, 0},
	} {
		f.provider.set(func(w http.ResponseWriter, _ *http.Request, _ int) { f.provider.issue(w, test.claims, test.members) })
		target := *f.target
		target.Remote, target.Requested, target.Audience, target.Resource = name, test.requested, "crm-client", "https://crm.example"
		token, err := f.Token(t.Context(), f.alice, &target)
		if !errors.Is(err, test.want) {
			t.Errorf("%s: %v", name, err)
		} else if err == nil {
			if lives := token.Expires.Sub(f.clock.now()); (lives - test.lives).Abs() > time.Second {
				t.Errorf("%s lives %s", name, lives)
			}
		}
	}
}

// A token endpoint may do what it likes: there is an error, soon, and nothing is
// kept.
func TestHostile(t *testing.T) {
	f := setUp(t, Config{})
	inner := newProvider(t)
	stop := make(chan struct{})
	t.Cleanup(func() { close(stop) })
	for name, answer := range map[string]http.HandlerFunc{
		"HTML": func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "<html>canary") },
		"huge": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			io.WriteString(w, `{"access_token":"`)
			for range 64 {
				if _, err := io.WriteString(w, strings.Repeat("a", 1<<20)); err != nil {
					return
				}
			}
		},
		"slow": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			w.(http.Flusher).Flush()
			select {
			case <-stop:
			case <-r.Context().Done():
			}
		},
		"redirect": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, inner.URL, http.StatusTemporaryRedirect)
		},
		"mac": func(w http.ResponseWriter, _ *http.Request) {
			f.provider.issue(w, nil, map[string]any{"token_type": "mac"})
		},
		"no token": func(w http.ResponseWriter, _ *http.Request) {
			f.provider.issue(w, nil, map[string]any{"access_token": ""})
		},
		"CRLF": func(w http.ResponseWriter, _ *http.Request) {
			f.provider.issue(w, nil, map[string]any{"access_token": "a\r\nb"})
		},
		"wrong types": func(w http.ResponseWriter, _ *http.Request) {
			f.provider.issue(w, nil, map[string]any{"access_token": 5})
		},
		"type no text": func(w http.ResponseWriter, _ *http.Request) {
			f.provider.issue(w, nil, map[string]any{"issued_token_type": 5})
		},
		"wrong issuer": func(w http.ResponseWriter, _ *http.Request) {
			f.provider.issue(w, map[string]any{"iss": "https://evil.example"}, nil)
		},
		"an error": func(w http.ResponseWriter, _ *http.Request) {
			f.provider.issue(w, nil, map[string]any{"error": "invalid_request", "error_description": "canary"})
		},
		"500": func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "canary", http.StatusInternalServerError) },
	} {
		t.Run(name, func(t *testing.T) {
			f.provider.set(func(w http.ResponseWriter, r *http.Request, _ int) { answer(w, r) })
			target := *f.target
			target.Remote = name
			target.Server.HTTP = guarded(t, 500*time.Millisecond)
			if _, err := f.Token(t.Context(), f.alice, &target); err == nil || strings.Contains(err.Error(), "canary") {
				t.Errorf("%v", err)
			}
			if f.Kept(f.alice, &target) != nil {
				t.Error("something is kept")
			}
		})
	}
	if len(inner.requests()) != 0 {
		t.Error("a redirect was followed, with the subject token")
	}
}

// An ID-JAG: the assertion goes to the remote's own server, and no other.
func TestIDJAG(t *testing.T) {
	f := setUp(t, Config{})
	as := newProvider(t)
	target := *f.target
	target.Kind, target.Audience, target.Resource, target.Scopes = IDJAG, as.URL, "https://crm.example/mcp", []string{"crm.read"}
	target.Then = Server{Endpoint: as.URL + "/token", Issuer: as.URL, Pinned: true, HTTP: f.http, Client: endpoint.Client{ID: "there", Secret: secret.New("canary-there")}}
	jag := map[string]any{"issued_token_type": TypeIDJAG, "token_type": "N_A"}
	f.provider.set(func(w http.ResponseWriter, _ *http.Request, n int) {
		f.provider.issue(w, map[string]any{"aud": as.URL, "n": n}, jag)
	})
	token := f.token(t, f.alice, &target)
	first, second := f.provider.requests()[0], as.requests()[0]
	if first.form.Get("requested_token_type") != TypeIDJAG || first.form.Get("audience") != as.URL ||
		first.form.Get("resource") != "https://crm.example/mcp" || first.form.Get("subject_token") != "canary-alice" || first.user != "gw" {
		t.Errorf("at the provider: %v", first.form)
	}
	if second.form.Get("grant_type") != "urn:ietf:params:oauth:grant-type:jwt-bearer" || second.user != "there" ||
		second.form.Get("resource") != "https://crm.example/mcp" || second.form.Get("scope") != "crm.read" || second.form.Has("subject_token") {
		t.Errorf("at the remote's server: %v", second.form)
	}
	if assertion := second.form.Get("assertion"); assertion == "" || assertion == token {
		t.Error("no assertion")
	}
	if f.token(t, f.alice, &target) != token || len(f.provider.requests()) != 1 {
		t.Error("not from the cache")
	}

	for name, test := range map[string]struct {
		claims, members map[string]any
		want            error
	}{
		"for another server":  {map[string]any{"aud": "https://evil.example"}, jag, ErrAudience},
		"another's":           {map[string]any{"aud": as.URL, "iss": "https://evil.example"}, jag, ErrIssuer},
		"no assertion at all": {map[string]any{"aud": as.URL}, nil, ErrTokenType},
	} {
		f.provider.set(func(w http.ResponseWriter, _ *http.Request, _ int) { f.provider.issue(w, test.claims, test.members) })
		again := target
		again.Remote = name
		if _, err := f.Token(t.Context(), f.alice, &again); !errors.Is(err, test.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if n := len(as.requests()); n != 1 {
		t.Errorf("the remote's server got %d requests", n)
	}
	f.provider.set(func(w http.ResponseWriter, _ *http.Request, _ int) {
		f.provider.issue(w, map[string]any{"aud": as.URL}, jag)
	})
	for name, test := range map[string]struct {
		claims, members map[string]any
		want            error
	}{
		"of another server":      {map[string]any{"iss": "https://evil.example", "aud": target.Resource}, nil, ErrIssuer},
		"for another place":      {map[string]any{"aud": "https://payroll.example/mcp"}, nil, ErrAudience},
		"for other places":       {map[string]any{"aud": []string{"https://crm.example:8443/mcp", "http://crm.example/mcp"}}, nil, ErrAudience},
		"for the same place":     {map[string]any{"aud": "HTTPS://CRM.example:443"}, nil, nil},
		"for who issued it":      {map[string]any{"aud": as.URL}, nil, nil},
		"for several":            {map[string]any{"aud": []string{"https://payroll.example", target.Resource}}, nil, nil},
		"for a name of its own":  {map[string]any{"aud": "api://crm"}, nil, nil},
		"that does not tell":     {nil, nil, nil},
		"that nobody can read":   {nil, map[string]any{"access_token": "canary-opaque"}, nil},
		"that is of other types": {nil, map[string]any{"issued_token_type": TypeIDJAG}, ErrTokenType},
	} {
		as.set(func(w http.ResponseWriter, _ *http.Request, _ int) { as.issue(w, test.claims, test.members) })
		again := target
		again.Remote = name
		_, err := f.Token(t.Context(), f.alice, &again)
		if _, then := errors.AsType[*ThenError](err); !errors.Is(err, test.want) || then != (test.want != nil) {
			t.Errorf("a token %s: %v", name, err)
		}
	}
	as.set(func(w http.ResponseWriter, _ *http.Request, _ int) { w.WriteHeader(http.StatusBadGateway) })
	target.Remote = "down"
	_, err := f.Token(t.Context(), f.alice, &target)
	if _, then := errors.AsType[*ThenError](err); !then || !failedWith(err, http.StatusBadGateway) {
		t.Errorf("where the second fails: %v", err)
	}
}

// After Close there is nothing more, and what was under way has ended.
func TestClose(t *testing.T) {
	f := setUp(t, Config{})
	arrived := make(chan struct{})
	f.provider.set(func(_ http.ResponseWriter, r *http.Request, _ int) {
		close(arrived)
		<-r.Context().Done()
	})
	got := make(chan error)
	go func() {
		_, err := f.Token(t.Context(), f.alice, f.target)
		got <- err
	}()
	<-arrived
	f.Close()
	if err := <-got; err == nil {
		t.Error("a token from a closed exchanger")
	}
	f.Close()
	if _, err := f.Token(t.Context(), f.alice, f.target); !errors.Is(err, context.Canceled) {
		t.Errorf("after Close: %v", err)
	}
}

// FuzzReadClaims: foreign tokens never panic, and a token that is read tells no
// time that cannot be.
func FuzzReadClaims(f *testing.F) {
	f.Add("e30.e30.x")
	f.Add(jwt(map[string]any{"iss": "a", "aud": []string{"b"}, "exp": 5}))
	f.Add(jwt(map[string]any{"aud": "b", "exp": 1e300}))
	f.Fuzz(func(t *testing.T, token string) {
		c, ok := readClaims(secret.New(token))
		if !ok && (c.Issuer != "" || c.Audience != nil || !c.Expires.IsZero()) {
			t.Errorf("%+v of no token", c)
		}
		if !c.Expires.IsZero() && c.Expires.Unix() < 0 {
			t.Errorf("expires %v", c.Expires)
		}
		_ = fmt.Sprint(c)
	})
}
