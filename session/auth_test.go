package session

import (
	"errors"
	"fmt"
	"net/http"
	"sync"
	"testing"

	"gatehouse/auth"
)

func required(t testing.TB, err error) {
	t.Helper()
	if e, ok := errors.AsType[*auth.RequiredError](err); !ok || e.AuthURL == "" {
		t.Fatalf("got %v (%T), want a RequiredError", err, err)
	}
}

// guarded is a fake behind a door, which lets these methods through only with
// the token T.
func guarded(t testing.TB, methods ...string) (*fake, *door, Remote) {
	t.Helper()
	f, d := newFake(t), &door{remote: "notes"}
	f.protect("T", methods...)
	r := newRemoteFor(t, "notes", f.URL)
	r.Authorizer = func(auth.Principal) Authorizer { return d }
	return f, d, r
}

// TestWalk is the whole way: refused, signed in, and the same call works.
func TestWalk(t *testing.T) {
	for _, tt := range []struct {
		name    string
		methods []string
		listed  bool // before the sign-in
	}{
		{"everything is protected", []string{"initialize", "notifications/initialized", "tools/list", "tools/call"}, false},
		{"lists and calls are protected", []string{"tools/list", "tools/call"}, false},
		{"calls are protected", []string{"tools/call"}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f, d, r := guarded(t, tt.methods...)
			s := open(t, r)
			if got := settled(t, s)[0]; got.Known != tt.listed {
				t.Errorf("listed before the sign-in: %v, want %v", got.Known, tt.listed)
			}
			want := StateSignInNeeded
			if tt.listed {
				want = StateConnected
			}
			if got := s.Status("notes"); got.State != want {
				t.Errorf("state %s, want %s (%v)", got.State, want, got.Err)
			}
			if challenges, _ := d.count(); challenges != 0 {
				t.Errorf("the background asked for a sign-in %d times", challenges)
			}
			_, err := s.Call(t.Context(), "notes", "tools/call", nil, nil)
			required(t, err)
			if got := s.Status("notes"); got.State != StateSignInNeeded {
				t.Errorf("state %s after the refusal", got.State)
			}
			changes := 0
			s.OnChange(func() { changes++ })
			d.signIn("T")
			if err := s.Connect(t.Context(), "notes"); err != nil {
				t.Fatal(err)
			}
			if got := settled(t, s)[0]; !got.Known || len(got.Tools) != 1 {
				t.Errorf("after the sign-in: %+v", got)
			}
			if got := s.Status("notes"); got.State != StateConnected || got.Err != nil {
				t.Errorf("status %+v after the sign-in", got)
			}
			if changes == 0 {
				t.Error("nobody was told")
			}
			if _, err := s.Call(t.Context(), "notes", "tools/call", nil, nil); err != nil {
				t.Errorf("the same call again: %v", err)
			}
			if n := len(f.requests("tools/call")); n > 2 {
				t.Errorf("%d calls were sent, want 2 at most", n)
			}
		})
	}
}

// TestCallFindsSignInByItself: nobody says Connect after the sign-in.
func TestCallFindsSignInByItself(t *testing.T) {
	_, d, r := guarded(t, "initialize", "tools/list", "tools/call")
	s := open(t, r)
	_, err := s.Call(t.Context(), "notes", "tools/call", nil, nil)
	required(t, err)
	d.signIn("T")
	if _, err := s.Call(t.Context(), "notes", "tools/call", nil, nil); err != nil {
		t.Errorf("after the sign-in: %v", err)
	}
}

func TestParallelFirstCalls(t *testing.T) {
	f, d, r := guarded(t, "initialize", "tools/call")
	hold := make(chan struct{})
	f.handle("initialize", func(w http.ResponseWriter, _ *http.Request, m received) { <-hold; answer(w, m, initialized) })
	f.protect("T", "tools/call")
	s := open(t, r)
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			_, err := s.Call(t.Context(), "notes", "tools/call", nil, nil)
			if _, ok := errors.AsType[*auth.RequiredError](err); !ok {
				t.Errorf("got %v", err)
			}
		})
	}
	close(hold)
	wg.Wait()
	if n := len(f.requests("initialize")); n != 1 {
		t.Errorf("%d dials, want 1", n)
	}
	if challenges, _ := d.count(); challenges != 50 {
		t.Errorf("%d challenges, want 50", challenges)
	}
}

// TestCallDuringQuietDial: a call that finds a quiet dial in flight gets the
// link all the same.
func TestCallDuringQuietDial(t *testing.T) {
	f, d, r := guarded(t)
	arrived, hold := make(chan struct{}, 10), make(chan struct{})
	f.handle("initialize", func(w http.ResponseWriter, _ *http.Request, _ received) {
		arrived <- struct{}{}
		<-hold
		w.WriteHeader(http.StatusUnauthorized)
	})
	s := open(t, r)
	<-arrived
	done := make(chan error)
	go func() {
		_, err := s.Call(t.Context(), "notes", "tools/call", nil, nil)
		done <- err
	}()
	close(hold)
	required(t, <-done)
	if challenges, _ := d.count(); challenges != 1 {
		t.Errorf("%d challenges, want 1", challenges)
	}
}

func TestRenewedToken(t *testing.T) {
	f, d, r := guarded(t, "tools/call")
	s := open(t, r)
	settled(t, s)
	d.mu.Lock()
	d.token, d.renewed = "old", "T"
	d.mu.Unlock()
	if _, err := s.Call(t.Context(), "notes", "tools/call", nil, nil); err != nil {
		t.Fatal(err)
	}
	calls := f.requests("tools/call")
	if len(calls) != 2 || calls[0].Header.Get("Authorization") != "Bearer old" || calls[1].Header.Get("Authorization") != "Bearer T" {
		t.Errorf("got %d calls", len(calls))
	}
	// A new token that is refused as well is the end of it.
	d.mu.Lock()
	d.token, d.renewed = "old", "older"
	d.mu.Unlock()
	_, err := s.Call(t.Context(), "notes", "tools/call", nil, nil)
	required(t, err)
	if n := len(f.requests("tools/call")); n != 4 {
		t.Errorf("%d requests in all, want 4", n)
	}
	if n := len(f.requests("initialize")); n != 1 {
		t.Errorf("%d sessions, want 1: a 401 is the request's, not the connection's", n)
	}
}

// TestQuietRenewal: what the background needs is renewed in the background.
func TestQuietRenewal(t *testing.T) {
	_, d, r := guarded(t, "initialize", "tools/list")
	d.token, d.renewed = "old", "T"
	s := open(t, r)
	if got := settled(t, s)[0]; !got.Known {
		t.Errorf("got %+v, status %+v", got, s.Status("notes"))
	}
	if challenges, renewals := d.count(); challenges != 0 || renewals != 1 {
		t.Errorf("%d challenges and %d renewals, want 0 and 1", challenges, renewals)
	}
}

func TestForbidden(t *testing.T) {
	f, d, r := guarded(t)
	d.token = "T"
	d.err = &auth.Error{Kind: auth.KindForbidden, Remote: "notes", Say: "no"}
	f.handle("tools/call", func(w http.ResponseWriter, _ *http.Request, _ received) { http.Error(w, canary, http.StatusForbidden) })
	s := open(t, r)
	settled(t, s)
	_, err := s.Call(t.Context(), "notes", "tools/call", nil, nil)
	if e, ok := errors.AsType[*auth.Error](err); !ok || e.Kind != auth.KindForbidden {
		t.Errorf("got %v, want the authorizer's error", err)
	}
	if got := s.Status("notes"); got.State != StateConnected {
		t.Errorf("state %s", got.State)
	}
}

func TestNoAuthorizer(t *testing.T) {
	for _, status := range []int{401, 403} {
		f := newFake(t)
		f.handle("tools/call", func(w http.ResponseWriter, _ *http.Request, _ received) { http.Error(w, canary, status) })
		s := open(t, newRemoteFor(t, "notes", f.URL))
		_, err := s.Call(t.Context(), "notes", "tools/call", nil, nil)
		if got := failure(t, err, KindStatus); got.Status != status {
			t.Errorf("got %+v", got)
		}
		if n := len(f.requests("tools/call")); n != 1 {
			t.Errorf("the call was sent %d times", n)
		}
	}
}

// TestOtherAccount: the MCP session at the remote belongs to the account that
// began it; after a sign-in with another one a new one is begun.
func TestOtherAccount(t *testing.T) {
	f, d, r := guarded(t)
	d.token = "alice"
	d.err = &auth.Error{Kind: auth.KindForbidden, Remote: "notes", Say: "no"}
	owners := map[string]string{}
	var mu sync.Mutex
	f.handle("initialize", func(w http.ResponseWriter, r *http.Request, m received) {
		mu.Lock()
		defer mu.Unlock()
		id := fmt.Sprint(len(owners))
		owners[id] = r.Header.Get("Authorization")
		w.Header().Set("Mcp-Session-Id", id)
		answer(w, m, initialized)
	})
	f.handle("tools/list", func(w http.ResponseWriter, r *http.Request, m received) {
		mu.Lock()
		defer mu.Unlock()
		if owners[r.Header.Get("Mcp-Session-Id")] != r.Header.Get("Authorization") {
			http.Error(w, "not yours", http.StatusForbidden)
			return
		}
		answer(w, m, `{"tools":[]}`)
	})
	s := open(t, r)
	settled(t, s)
	d.signIn("bob")
	if err := s.Connect(t.Context(), "notes"); err != nil {
		t.Error(err)
	}
}

func TestDisconnect(t *testing.T) {
	f, d, r := guarded(t, "initialize", "tools/list", "tools/call")
	d.token = "T"
	s := open(t, r)
	before := settled(t, s)[0]
	if !before.Known {
		t.Fatalf("not listed: %+v", s.Status("notes"))
	}
	ended := make(chan struct{}, 10)
	f.handle("DELETE", func(http.ResponseWriter, *http.Request, received) { ended <- struct{}{} })
	changes := 0
	cancel := s.OnChange(func() { changes++ })
	d.signIn("")
	s.Disconnect("notes")
	after := settled(t, s)[0]
	if after.Known || len(after.Tools) != 0 || after.Generation == before.Generation || changes != 1 {
		t.Errorf("after the sign-out: %+v, %d changes", after, changes)
	}
	<-ended
	_, err := s.Call(t.Context(), "notes", "tools/call", nil, nil)
	required(t, err)
	cancel()
	d.signIn("T")
	if err := s.Connect(t.Context(), "notes"); err != nil {
		t.Fatal(err)
	}
	if changes != 1 {
		t.Error("a cancelled watcher was called")
	}
	if n := len(f.requests("tools/call")); n != 0 {
		t.Errorf("%d calls reached the remote without a sign-in", n)
	}
}

// TestDisconnectDuringDial: a dial that began before the sign-out brings no
// connection after it.
func TestDisconnectDuringDial(t *testing.T) {
	f, d, r := guarded(t)
	arrived, hold := make(chan struct{}, 10), make(chan struct{})
	f.handle("initialize", func(w http.ResponseWriter, _ *http.Request, m received) {
		arrived <- struct{}{}
		<-hold
		w.Header().Set("Mcp-Session-Id", string(m.ID))
		answer(w, m, initialized)
	})
	ended := make(chan string, 10)
	f.handle("DELETE", func(_ http.ResponseWriter, _ *http.Request, m received) { ended <- m.Header.Get("Mcp-Session-Id") })
	d.signIn("T")
	s := open(t, r)
	<-arrived
	done := make(chan error)
	go func() { done <- s.Connect(t.Context(), "notes") }()
	s.Disconnect("notes")
	<-arrived
	close(hold)
	if err := <-done; err != nil {
		t.Error(err)
	}
	<-ended
	if _, err := s.Call(t.Context(), "notes", "tools/call", nil, nil); err != nil {
		t.Error(err)
	}
	if n := len(f.requests("initialize")); n != 2 {
		t.Errorf("%d dials, want 2", n)
	}
}

// TestCallEndsTheWaitForASignIn: a call that works tells that the sign-in was
// done, although nobody said so.
func TestCallEndsTheWaitForASignIn(t *testing.T) {
	_, d, r := guarded(t, "tools/list", "tools/call")
	s := open(t, r)
	settled(t, s)
	changed := make(chan struct{}, 10)
	s.OnChange(func() { changed <- struct{}{} })
	d.signIn("T")
	if _, err := s.Call(t.Context(), "notes", "tools/call", nil, nil); err != nil {
		t.Fatal(err)
	}
	<-changed
	if got := settled(t, s)[0]; !got.Known || s.Status("notes").State != StateConnected {
		t.Errorf("got %+v", got)
	}
}
