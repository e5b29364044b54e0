package auth

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"gatehouse/auth/endpoint"
	"gatehouse/auth/guard"
	"gatehouse/auth/secret"
)

func TestAccountOf(t *testing.T) {
	idToken := func(claims string) secret.Text {
		return secret.New("e30." + base64.RawURLEncoding.EncodeToString([]byte(claims)) + ".c2ln")
	}
	for claims, want := range map[string]string{
		`{"sub":"1","email":"a@b.example","preferred_username":"a"}`: "a@b.example",
		`{"sub":"1","preferred_username":"a"}`:                       "a",
		`{"sub":"1"}`:                                                "1",
		`{"sub":"\u001b[31m"}`:                                       "",
		`{"sub":"` + strings.Repeat("x", 200) + `"}`:                 "",
		`{"sub":5}`: "",
		`nonsense`:  "",
	} {
		if got := accountOf(idToken(claims)); got != want {
			t.Errorf("accountOf(%s) = %q, want %q", claims, got, want)
		}
	}
	if got := accountOf(secret.New("no.token")); got != "" {
		t.Errorf("accountOf(no token) = %q", got)
	}
}

func TestUnionScopes(t *testing.T) {
	got := unionScopes([]string{"b", "a"}, nil, []string{"a", "c", "", "d e", `q"`, "n\x00"})
	if want := "b a c"; strings.Join(got, " ") != want {
		t.Errorf("union = %q, want %q", got, want)
	}
}

// A token expires by the clock on the wall, also on a machine that has slept.
func TestExpiryWithoutMonotonicClock(t *testing.T) {
	g := (&grant{}).receive(&endpoint.Answer{Access: secret.New("a"), Refresh: secret.New("r"), ExpiresIn: time.Hour}, time.Now())
	for what, at := range map[string]time.Time{"Obtained": g.Obtained, "RefreshAt": g.RefreshAt, "Expires": g.Expires} {
		if at.IsZero() || at != at.Round(0) { // == sees the monotonic reading, which Round drops
			t.Errorf("%s is %v", what, at)
		}
	}
}

// Nothing that marshals or prints a grant, a flow or a state shows its secrets.
func TestRecordsHideSecrets(t *testing.T) {
	const canary = "canary-90d2"
	s := secret.New(canary)
	for _, v := range []any{
		&grant{ClientSecret: s, Access: s, Refresh: s, ID: s},
		&flow{ClientSecret: s},
		&state{Verifier: s},
		&endpoint.Answer{Access: s, Refresh: s, ID: s},
		&endpoint.Client{Secret: s},
	} {
		data, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(data), canary) {
			t.Errorf("%T in JSON shows its secret", v)
		}
	}
	// Only what goes to the store has them.
	data, err := (&grant{Access: s, Refresh: s}).encode()
	if err != nil {
		t.Fatal(err)
	}
	g, err := decodeGrant(data)
	if err != nil || g.Access.Value() != canary || g.Refresh.Value() != canary {
		t.Errorf("a grant does not survive the store: %v", err)
	}
}

// stalled is a store that does not answer while it is told not to.
type stalled struct {
	Store
	limit time.Duration // after which it gives up by itself; 0: it answers
}

func (s *stalled) wait(ctx context.Context) error {
	if s.limit == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, s.limit)
	defer cancel()
	<-ctx.Done()
	return ctx.Err()
}

func (s *stalled) Get(ctx context.Context, bucket, key string) (Record, error) {
	if err := s.wait(ctx); err != nil {
		return Record{}, err
	}
	return s.Store.Get(ctx, bucket, key)
}

func (s *stalled) Lease(ctx context.Context, name string) (Lease, error) {
	if err := s.wait(ctx); err != nil {
		return nil, err
	}
	return s.Store.Lease(ctx, name)
}

// withGrant is a broker over the file store, in which the local user has a grant
// for the remote r, whose token lives for an hour.
func withGrant(t *testing.T) (*Broker, *stalled) {
	t.Helper()
	file, err := OpenFile(FileConfig{Dir: filepath.Join(t.TempDir(), "store"), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	clients, err := guard.New(guard.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(clients.Close)
	store := &stalled{Store: file}
	b, err := New(Config{
		Remotes:   []Remote{{Name: "r", URL: "https://r.example/mcp", HTTP: clients.Client(guard.Policy{})}},
		PublicURL: "http://127.0.0.1:8080", CallbackPath: "/oauth/callback", Store: store, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Close)
	g := &grant{
		grantFacts: grantFacts{Principal: Local, Remote: "r", RemoteURL: "https://r.example/mcp", Expires: time.Now().Add(time.Hour)},
		Access:     secret.New("access"), Refresh: secret.New("refresh"),
	}
	if err := b.writeGrant(t.Context(), key{Local, "r"}, b.remotes["r"], g, 0); err != nil {
		t.Fatal(err)
	}
	return b, store
}

// A refresh that hangs, here or in another process, does not keep a sign-out
// from deleting what there is.
func TestSignOutWhileARefreshHangs(t *testing.T) {
	for _, elsewhere := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			b, store := withGrant(t)
			k := key{Local, "r"}
			if elsewhere {
				lease, err := store.Lease(t.Context(), refreshLease(k))
				if err != nil {
					t.Fatal(err)
				}
				defer lease.Release()
			} else {
				b.holds[k].refreshing = &refreshCall{done: make(chan struct{})}
			}
			begun := time.Now()
			if _, err := b.SignOut(t.Context(), Local, "r"); err != nil {
				t.Errorf("elsewhere %v: %v", elsewhere, err)
			}
			if took := time.Since(begun); took > 10*time.Second {
				t.Errorf("elsewhere %v: it took %s", elsewhere, took)
			}
			if _, err := store.Get(t.Context(), bucketGrants, k.store()); !errors.Is(err, ErrNotFound) {
				t.Errorf("elsewhere %v: the grant is still there: %v", elsewhere, err)
			}
		})
	}
}

// A store that hangs does not keep a valid token back for long, nor at each
// call; where one is needed, it is the store that is named.
func TestStoreThatHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, store := withGrant(t)
		a := b.Authorizer(Local, "r")
		store.limit = time.Hour
		time.Sleep(10 * time.Second)
		for i, most := range []time.Duration{time.Second, 0, 0} {
			begun := time.Now()
			token, err := a.Token(t.Context())
			if took := time.Since(begun); err != nil || token == nil || took > most {
				t.Errorf("call %d: token %v, %v, after %s", i, token != nil, err, took)
			}
		}
		store.limit = storeTime // as Redis does
		time.Sleep(2 * time.Hour)
		_, err := a.Token(t.Context())
		if e, ok := errors.AsType[*Error](err); !ok || e.Kind != KindInternal {
			t.Errorf("an expired token: %v", err)
		}
	})
}
