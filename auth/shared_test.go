package auth_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"gatehouse/auth"
)

// drop takes a request at the token endpoint and loses the answer; redeemed
// says whether the server has acted on it.
func (p *provider) drop(redeemed bool) func(http.ResponseWriter, *http.Request) bool {
	return func(_ http.ResponseWriter, r *http.Request) bool {
		if redeemed {
			p.answerToken(httptest.NewRecorder(), r.PostForm)
		}
		panic(http.ErrAbortHandler)
	}
}

// After a lost answer: the old access token while it lives, then the same
// refresh token once more, then what the server says to it. So it is with every
// store, and for those whose sign-ins end with their session.
func TestLostAnswer(t *testing.T) {
	session := auth.SessionPrincipal("7f1b7c1e-0000-4000-8000-000000000001")
	for where, begin := range map[string]func(t *testing.T) (w, other *world, p auth.Principal){
		"file": func(t *testing.T) (*world, *world, auth.Principal) {
			w := newFileWorld(t, 1)
			return w.world, w.elsewhere().world, auth.Local
		},
		"memory": func(t *testing.T) (*world, *world, auth.Principal) {
			w := newWorld(t, 1, nil)
			return w, w, auth.Local
		},
		"file, session": func(t *testing.T) (*world, *world, auth.Principal) {
			w := newFileWorld(t, 1).world
			return w, w, session
		},
	} {
		for _, tt := range []lostAnswer{
			{"never redeemed", false, false, true},
			{"redeemed, forgiving server", true, true, true},
			{"redeemed, strict server", true, false, false},
		} {
			t.Run(where+", "+tt.name, func(t *testing.T) {
				w, other, p := begin(t)
				tt.run(w, other, p)
			})
		}
	}
}

type lostAnswer struct {
	name                string
	redeemed, forgiving bool
	survives            bool
}

func (l lostAnswer) run(w, other *world, p auth.Principal) {
	t := w.t
	w.p.set(func() { w.p.rotate, w.p.forgiving = true, l.forgiving })
	w.signIn(p, "r0")
	first := w.token(p, "r0")
	w.p.set(func() { w.p.token = w.p.drop(l.redeemed) })
	w.clock.Advance(56 * time.Minute)
	w.token(p, "r0")
	eventually(t, "the refresh without an answer", func() bool { return logLines(w, "refresh failed") == 1 })
	w.p.set(func() { w.p.token = nil })

	// While the token lives nothing is risked, here or elsewhere.
	for range 3 {
		w.clock.Advance(time.Minute)
		if w.token(p, "r0") != first || other.token(p, "r0") != first {
			t.Fatal("the token that lives is not used")
		}
	}
	if n := w.p.count(&w.p.refreshes); n != 1 {
		t.Fatalf("%d refreshes while the token lives, want 1", n)
	}
	w.clock.Advance(2 * time.Minute) // it has expired
	got := ""
	eventually(t, "an answer", func() bool { // a call may still wait for the refresh that has failed
		token, err := other.Authorizer(p, "r0").Token(t.Context())
		if token != nil {
			got = token.AccessToken
		}
		return err == nil
	})
	if (got != "") != l.survives || got == first {
		t.Fatalf("token %q", got)
	}
	if again := w.token(p, "r0"); again != got {
		t.Errorf("here %q, elsewhere %q", again, got)
	}
	if n := w.p.count(&w.p.refreshes); n != 2 {
		t.Errorf("%d refreshes, want 2", n)
	}
	if l.survives {
		w.clock.Advance(2 * time.Hour)
		if next := w.token(p, "r0"); next == "" || next == got {
			t.Errorf("the refresh after it: %q", next)
		}
		return
	}
	if required := w.link(p, "r0"); required.Reason != auth.ReasonExpired {
		t.Errorf("reason %q", required.Reason)
	}
	if n := w.p.count(&w.p.refreshes); n != 2 {
		t.Errorf("%d refreshes after the end, want 2", n)
	}
}

// A remote that refuses the old access token leaves nothing to lose.
func TestLostAnswerAndARefusedToken(t *testing.T) {
	w := newFileWorld(t, 1)
	w.p.set(func() { w.p.rotate = true })
	w.signIn(auth.Local, "r0")
	first := w.token(auth.Local, "r0")
	w.p.set(func() { w.p.token = w.p.drop(false) })
	w.clock.Advance(56 * time.Minute)
	w.token(auth.Local, "r0")
	eventually(t, "the refresh without an answer", func() bool { return logLines(w.world, "refresh failed") == 1 })
	w.p.set(func() { w.p.token = nil })
	other := w.elsewhere()
	if err := other.Authorizer(auth.Local, "r0").Renew(t.Context(), w.unauthorized("r0", first)); err != nil {
		t.Fatal(err)
	}
	if got := w.p.count(&w.p.refreshes); got != 2 || other.token(auth.Local, "r0") == first {
		t.Errorf("%d refreshes, want 2", got)
	}
}

// A server that cannot handle a request has not used the token up: it is asked
// again before the access token ends. One that failed may have, and is not.
func TestFailureAndLostAnswer(t *testing.T) {
	for status, again := range map[int]bool{
		http.StatusServiceUnavailable: true, http.StatusTooManyRequests: true,
		http.StatusInternalServerError: false, http.StatusBadGateway: false, http.StatusGatewayTimeout: false,
	} {
		w := newFileWorld(t, 1)
		w.p.set(func() {
			w.p.rotate = true
			w.p.token = grab(status, "text/plain", "")
		})
		w.signInDespite()
		first := w.token(auth.Local, "r0")
		w.clock.Advance(56 * time.Minute)
		w.token(auth.Local, "r0")
		eventually(t, "the failed refresh", func() bool { return logLines(w.world, "refresh failed") == 1 })
		w.Close() // which waits for its end
		w.Broker = w.broker(1, nil)
		w.p.set(func() { w.p.token = nil })
		w.clock.Advance(time.Minute)
		if again {
			eventually(t, "the refresh", func() bool { return w.token(auth.Local, "r0") != first })
			continue
		}
		for range 5 {
			if w.token(auth.Local, "r0") != first {
				t.Fatalf("%d: the token that lives is not used", status)
			}
		}
		w.clock.Advance(30 * time.Minute) // it has expired
		if got := w.token(auth.Local, "r0"); got == "" || got == first {
			t.Errorf("%d: token %q: the grant is lost", status, got)
		}
	}
}

// signInDespite signs in while the token endpoint refuses everything else.
func (w *fileWorld) signInDespite() {
	w.t.Helper()
	hook := w.p.token
	w.p.set(func() { w.p.token = nil })
	w.signIn(auth.Local, "r0")
	w.p.set(func() { w.p.token = hook })
}

// What one process does, the others see: at once where it matters, soon where
// they would not look.
func TestOtherProcesses(t *testing.T) {
	w := newFileWorld(t, 1)
	w.p.set(func() { w.p.rotate = true })
	other := w.elsewhere()
	if other.token(auth.Local, "r0") != "" {
		t.Fatal("a token before the sign-in")
	}
	w.signIn(auth.Local, "r0")
	first := other.token(auth.Local, "r0")
	if first == "" {
		t.Fatal("a sign-in elsewhere is not seen")
	}

	// A refresh elsewhere serves here, and its token is found after a 401.
	a := w.Authorizer(auth.Local, "r0")
	if err := a.Renew(t.Context(), w.unauthorized("r0", first)); err != nil {
		t.Fatal(err)
	}
	if err := other.Authorizer(auth.Local, "r0").Renew(t.Context(), w.unauthorized("r0", first)); err != nil {
		t.Fatal(err)
	}
	second := other.token(auth.Local, "r0")
	if n := w.p.count(&w.p.refreshes); n != 1 || second == first || second != w.token(auth.Local, "r0") {
		t.Fatalf("%d refreshes, want 1", n)
	}

	// Both find it expired: one refresh.
	w.clock.Advance(2 * time.Hour)
	var wg sync.WaitGroup
	for range 10 {
		for _, b := range []*auth.Broker{w.Broker, other.Broker} {
			wg.Go(func() {
				if token, err := b.Authorizer(auth.Local, "r0").Token(t.Context()); err != nil || token == nil || token.AccessToken == second {
					t.Errorf("token %v, %v", token != nil, err)
				}
			})
		}
	}
	wg.Wait()
	if n := w.p.count(&w.p.refreshes); n != 2 {
		t.Errorf("%d refreshes, want 2", n)
	}

	// A token that is good is handed out without a look, for a few seconds.
	if token := other.token(auth.Local, "r0"); token == "" {
		t.Fatal("no token")
	}
	if revoked, err := w.SignOut(t.Context(), auth.Local, "r0"); err != nil || !revoked {
		t.Fatalf("signing out: %v, %v", revoked, err)
	}
	w.clock.Advance(10 * time.Second)
	if other.token(auth.Local, "r0") != "" || other.Status(auth.Local, "r0").SignedIn {
		t.Error("a sign-out elsewhere is not seen after 10 s")
	}
	// And back: what was seen to be gone comes again.
	w.signIn(auth.Local, "r0")
	if other.token(auth.Local, "r0") == "" {
		t.Error("the next sign-in elsewhere is not seen")
	}
}

// A sign-out waits for a refresh that another process has under way, and
// revokes what that brings.
func TestSignOutDuringARefreshElsewhere(t *testing.T) {
	w := newFileWorld(t, 1)
	w.p.set(func() { w.p.rotate = true })
	w.signIn(auth.Local, "r0")
	other := w.elsewhere()
	other.token(auth.Local, "r0")
	w.clock.Advance(2 * time.Hour)
	arrived, release := make(chan struct{}), make(chan struct{})
	w.p.set(func() {
		w.p.token = func(http.ResponseWriter, *http.Request) bool { close(arrived); <-release; return false }
	})
	refreshed := make(chan error, 1)
	go func() {
		_, err := w.Authorizer(auth.Local, "r0").Token(context.WithoutCancel(t.Context()))
		refreshed <- err
	}()
	<-arrived
	ended := make(chan error, 1)
	go func() {
		_, err := other.SignOut(context.WithoutCancel(t.Context()), auth.Local, "r0")
		ended <- err
	}()
	select {
	case <-ended:
		t.Error("did not wait")
		ended <- nil
	case <-time.After(30 * time.Millisecond): // long enough for one that does not wait
	}
	close(release)
	if err := errors.Join(<-refreshed, <-ended); err != nil {
		t.Fatal(err)
	}
	w.p.mu.Lock()
	revoked := w.p.revoked
	w.p.mu.Unlock()
	if len(revoked) == 0 || revoked[0] != secretsCanary+"-refresh-2" {
		t.Errorf("revoked %q, want the refresh token that came last", revoked)
	}
	w.clock.Advance(10 * time.Second)
	if w.token(auth.Local, "r0") != "" {
		t.Error("still signed in")
	}
}

// A shutdown lets a refresh come to its end: an answer that nobody reads would
// cost the grant.
func TestCloseDuringARefresh(t *testing.T) {
	w := newFileWorld(t, 1)
	w.p.set(func() { w.p.rotate = true })
	w.signIn(auth.Local, "r0")
	w.clock.Advance(56 * time.Minute)
	arrived, release := make(chan struct{}), make(chan struct{})
	w.p.set(func() {
		w.p.token = func(http.ResponseWriter, *http.Request) bool { close(arrived); <-release; return false }
	})
	w.token(auth.Local, "r0")
	<-arrived
	closed := make(chan struct{})
	go func() {
		w.Close()
		close(closed)
	}()
	select {
	case <-closed:
		t.Error("did not wait")
	case <-time.After(30 * time.Millisecond): // long enough for one that does not wait
	}
	close(release)
	<-closed
	w.p.set(func() { w.p.token = nil })
	w.clock.Advance(2 * time.Hour)
	if w.elsewhere().token(auth.Local, "r0") == "" {
		t.Error("the grant is lost")
	}
}

// Without a place to write the intent to nothing is sent: the token that lives
// is used, and the refresh follows when the disk has room again.
func TestRefreshNeedsTheStore(t *testing.T) {
	w := newFileWorld(t, 1)
	w.p.set(func() { w.p.rotate = true })
	w.signIn(auth.Local, "r0")
	first := w.token(auth.Local, "r0")
	tmp := filepath.Join(w.dir, "tmp")
	if err := errors.Join(os.RemoveAll(tmp), os.WriteFile(tmp, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	w.clock.Advance(56 * time.Minute)
	if w.token(auth.Local, "r0") != first {
		t.Error("the token that lives is not used")
	}
	w.clock.Advance(time.Hour)
	_, err := w.Authorizer(auth.Local, "r0").Token(t.Context())
	if e, ok := errors.AsType[*auth.Error](err); !ok || e.Kind != auth.KindInternal || !errors.Is(err, auth.ErrUnwritable) {
		t.Errorf("an expired token: %v", err)
	}
	if err := w.Authorizer(auth.SessionPrincipal("new"), "r0").Challenge(t.Context(), w.unauthorized("r0", "")); !errors.Is(err, auth.ErrUnwritable) {
		t.Errorf("a new sign-in: %v", err)
	}
	if n := w.p.count(&w.p.refreshes); n != 0 {
		t.Errorf("%d refreshes, want none", n)
	}
	if err := errors.Join(os.Remove(tmp), os.Mkdir(tmp, 0o700)); err != nil {
		t.Fatal(err)
	}
	w.clock.Advance(time.Minute)
	if got := w.token(auth.Local, "r0"); got == "" || got == first {
		t.Errorf("token %q once there is room", got)
	}
}

// A disk that fills up between the note and the result: what came is used, and
// written as soon as that can be done.
func TestRefreshThatCannotBeWritten(t *testing.T) {
	w := newFileWorld(t, 1)
	w.p.set(func() { w.p.rotate = true })
	w.signIn(auth.Local, "r0")
	w.clock.Advance(2 * time.Hour)
	tmp := filepath.Join(w.dir, "tmp")
	w.p.set(func() {
		w.p.token = func(http.ResponseWriter, *http.Request) bool {
			if err := errors.Join(os.RemoveAll(tmp), os.WriteFile(tmp, nil, 0o600)); err != nil {
				t.Error(err)
			}
			return false
		}
	})
	second := w.token(auth.Local, "r0")
	if second == "" || logLines(w.world, "level=ERROR", "could not be written") != 1 {
		t.Fatalf("token %q, log:\n%s", second, w.log)
	}
	w.p.set(func() { w.p.token = nil })
	if err := errors.Join(os.Remove(tmp), os.Mkdir(tmp, 0o700)); err != nil {
		t.Fatal(err)
	}
	w.clock.Advance(10 * time.Second)
	if w.token(auth.Local, "r0") != second {
		t.Error("another token")
	}
	if got := w.elsewhere().token(auth.Local, "r0"); got != second {
		t.Errorf("after a restart: %q, want %q", got, second)
	}
}

// A damaged grant is a sign-in anew, for nobody but its owner.
func TestDamagedGrant(t *testing.T) {
	w := newFileWorld(t, 1)
	alice, bob := auth.Principal{Issuer: "https://idp.example", Subject: "alice"}, auth.Principal{Issuer: "https://idp.example", Subject: "bob"}
	w.signIn(alice, "r0")
	grants, err := filepath.Glob(filepath.Join(w.dir, "records", "grants", "*"))
	if err != nil || len(grants) != 1 {
		t.Fatalf("%d grants, %v", len(grants), err)
	}
	w.signIn(bob, "r0")
	bobs := w.token(bob, "r0")
	if err := os.Truncate(grants[0], 100); err != nil {
		t.Fatal(err)
	}
	other := w.elsewhere()
	if got := other.token(alice, "r0"); got != "" {
		t.Errorf("token %q", got)
	}
	if other.token(bob, "r0") != bobs {
		t.Error("another's grant has suffered")
	}
	other.signIn(alice, "r0")
	w.clock.Advance(10 * time.Second)
	if got := w.token(alice, "r0"); got == "" || got == bobs {
		t.Errorf("token %q after the sign-in", got)
	}
}

// A sign-in that was begun before a restart completes after it, with the
// client that was registered before it.
func TestRestartDuringASignIn(t *testing.T) {
	w := newFileWorld(t, 1)
	v := w.visit(w.link(auth.Local, "r0"))
	w.Close()
	if err := w.store.Close(); err != nil {
		t.Fatal(err)
	}
	other := w.elsewhere()
	finished, err := other.Finish(t.Context(), v.callback())
	if err != nil || finished.Principal != auth.Local {
		t.Fatalf("finished %+v, %v", finished, err)
	}
	if other.token(auth.Local, "r0") == "" {
		t.Error("no token")
	}
	if _, err := other.Finish(t.Context(), v.callback()); !errors.Is(err, auth.ErrStateUnknown) {
		t.Errorf("the same callback again: %v", err)
	}
	if _, err := other.SignOut(t.Context(), auth.Local, "r0"); err != nil {
		t.Fatal(err)
	}
	other.signIn(auth.Local, "r0")
	if n := w.p.count(&w.p.registered); n != 1 {
		t.Errorf("%d registrations, want 1", n)
	}
}

// A process whose memory is too fresh to be looked up again finds the note of a
// lost answer when it comes to refresh itself.
func TestLostAnswerUnknownElsewhere(t *testing.T) {
	w := newFileWorld(t, 1)
	w.p.set(func() { w.p.rotate, w.p.lives = true, 3 })
	w.signIn(auth.Local, "r0")
	other := w.elsewhere()
	first := other.token(auth.Local, "r0")
	w.p.set(func() { w.p.token = w.p.drop(true) })
	w.clock.Advance(2900 * time.Millisecond)
	w.token(auth.Local, "r0")
	eventually(t, "the refresh without an answer", func() bool { return logLines(w.world, "refresh failed") == 1 })
	if other.token(auth.Local, "r0") != first {
		t.Error("the token that lives is not used")
	}
	if _, err := other.SignOut(t.Context(), auth.Local, "r0"); err != nil { // which waits for what that began
		t.Fatal(err)
	}
	if n := w.p.count(&w.p.refreshes); n != 1 {
		t.Errorf("%d refreshes, want 1", n)
	}
}

// A token that nothing refreshes is replaced by a sign-in elsewhere, which a
// 401 here finds.
func TestSignInElsewhereAfterARefusal(t *testing.T) {
	w := newFileWorld(t, 1)
	w.p.set(func() { w.p.noRefresh = true })
	w.signIn(auth.Local, "r0")
	other := w.elsewhere()
	first := other.token(auth.Local, "r0")
	if _, err := w.SignOut(t.Context(), auth.Local, "r0"); err != nil {
		t.Fatal(err)
	}
	w.signIn(auth.Local, "r0")
	if err := other.Authorizer(auth.Local, "r0").Renew(t.Context(), w.unauthorized("r0", first)); err != nil {
		t.Errorf("the sign-in elsewhere is not found: %v", err)
	}
	if got := other.token(auth.Local, "r0"); got == first || got == "" {
		t.Errorf("token %q", got)
	}
}

// A caller who has given up has not looked for a sign-out elsewhere: the next
// one does.
func TestCallerWhoGaveUpDoesNotLook(t *testing.T) {
	w := newFileWorld(t, 1)
	w.signIn(auth.Local, "r0")
	other := w.elsewhere()
	other.token(auth.Local, "r0")
	if _, err := w.SignOut(t.Context(), auth.Local, "r0"); err != nil {
		t.Fatal(err)
	}
	w.clock.Advance(10 * time.Second)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := other.Authorizer(auth.Local, "r0").Token(ctx); err != nil && !errors.Is(err, context.Canceled) {
		t.Errorf("with an ended context: %v", err)
	}
	if other.token(auth.Local, "r0") != "" {
		t.Error("the sign-out is not seen")
	}
}

// gossip is a store that tells of every grant that is written, again and again.
type gossip struct {
	auth.Store
	mu    sync.Mutex
	names []string
}

func (g *gossip) Put(ctx context.Context, bucket, key string, value []byte, version uint64, expires time.Time) (uint64, error) {
	if bucket == auth.BucketGrants {
		g.mu.Lock()
		if name := auth.GrantName(key); !slices.Contains(g.names, name) {
			g.names = append(g.names, name)
		}
		g.mu.Unlock()
	}
	return g.Store.Put(ctx, bucket, key, value, version, expires)
}

func (g *gossip) Watch(ctx context.Context, changed func(bucket, name string)) {
	for ctx.Err() == nil {
		g.mu.Lock()
		names := slices.Clone(g.names)
		g.mu.Unlock()
		for _, name := range names {
			changed(auth.BucketGrants, name)
		}
		runtime.Gosched()
	}
}

// Others change grants while they are being used and refreshed here: nobody
// waits for each other in a circle.
func TestNewsWhileRefreshing(t *testing.T) {
	w := newWorld(t, 1, nil)
	w.p.set(func() { w.p.rotate = true })
	w.store = &gossip{Store: w.store}
	w.Broker = w.broker(1, nil)
	users := make([]auth.Principal, 4)
	for i := range users {
		users[i] = auth.Principal{Issuer: "https://idp.example", Subject: fmt.Sprint(i)}
		w.signIn(users[i], "r0")
	}
	var wg sync.WaitGroup
	for _, user := range users {
		wg.Go(func() {
			a := w.Authorizer(user, "r0")
			for range 300 {
				w.clock.Advance(50 * time.Minute)
				if _, err := a.Token(t.Context()); err != nil {
					t.Error(err)
				}
			}
		})
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		wg.Wait()
	}()
	select {
	case <-done:
	case <-time.After(time.Minute):
		t.Fatal("they wait for each other")
	}
}
