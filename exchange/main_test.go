package exchange

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"gatehouse/auth/endpoint"
	"gatehouse/auth/gate"
	"gatehouse/auth/guard"
	"gatehouse/auth/secret"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// request is what a provider got.
type request struct {
	form           url.Values
	user, password string
}

// provider is a token endpoint that does what the test says.
type provider struct {
	*httptest.Server
	mu     sync.Mutex // guards what follows
	got    []request
	answer func(w http.ResponseWriter, r *http.Request, n int)
}

// newProvider's tokens are JWTs of its own issuer, different each time.
func newProvider(t *testing.T) *provider {
	t.Helper()
	p := &provider{}
	p.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.ParseForm()
		p.mu.Lock()
		user, password, _ := r.BasicAuth()
		p.got = append(p.got, request{r.PostForm, user, password})
		n, answer := len(p.got), p.answer
		p.mu.Unlock()
		if answer != nil {
			answer(w, r, n)
			return
		}
		p.issue(w, map[string]any{"n": n}, nil)
	}))
	t.Cleanup(p.Close)
	return p
}

// issue answers with a JWT of these claims beside iss.
func (p *provider) issue(w http.ResponseWriter, claims map[string]any, members map[string]any) {
	all := map[string]any{"iss": p.URL}
	maps.Copy(all, claims)
	answer := map[string]any{"access_token": jwt(all), "token_type": "Bearer", "expires_in": 600, "issued_token_type": TypeAccessToken}
	maps.Copy(answer, members)
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(answer)
}

func (p *provider) set(answer func(w http.ResponseWriter, r *http.Request, n int)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.answer = answer
}

func (p *provider) requests() []request {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]request(nil), p.got...)
}

func jwt(claims map[string]any) string {
	data, err := json.Marshal(claims)
	if err != nil {
		panic(err)
	}
	return "e30." + base64.RawURLEncoding.EncodeToString(data) + ".c2ln"
}

// clock is a time that tests move.
type clock struct {
	mu sync.Mutex
	t  time.Time
}

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.t
}

func (c *clock) add(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.t = c.t.Add(d)
}

type fixture struct {
	*Exchanger
	clock    *clock
	provider *provider
	http     *guard.Client
	target   *Target
	alice    Subject
}

// guarded returns a client that may go to loopback.
func guarded(t *testing.T, timeout time.Duration) *guard.Client {
	t.Helper()
	clients, err := guard.New(guard.Config{Timeout: timeout})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(clients.Close)
	return clients.Client(guard.Policy{Loopback: true})
}

func setUp(t *testing.T, cfg Config) *fixture {
	t.Helper()
	f := &fixture{clock: &clock{t: time.Now()}, provider: newProvider(t), http: guarded(t, 2*time.Second)}
	cfg.Log = slog.New(slog.NewTextHandler(&noCanary{t: t}, &slog.HandlerOptions{Level: slog.LevelDebug}))
	cfg.Now = f.clock.now
	cfg.Gates = gate.New(cfg.Now)
	f.Exchanger = New(cfg)
	t.Cleanup(f.Exchanger.Close)
	f.target = &Target{
		Remote: "crm", Kind: Exchange, Audience: "", Scopes: []string{"openid"},
		Server: Server{Endpoint: f.provider.URL + "/token", Issuer: f.provider.URL,
			Client: endpoint.Client{ID: "gw", Secret: secret.New("canary-client-secret")}, HTTP: f.http},
	}
	f.alice = Subject{Issuer: "https://idp.example", ID: "alice", Token: secret.New("canary-alice"), Type: TypeIDToken}
	return f
}

// noCanary is a log in which no secret may appear.
type noCanary struct{ t *testing.T }

func (l *noCanary) Write(p []byte) (int, error) {
	for _, word := range []string{"canary", "e30."} {
		if bytes.Contains(p, []byte(word)) {
			l.t.Errorf("a secret is in the log: %s", p)
		}
	}
	return io.Discard.Write(p)
}

func (f *fixture) token(t *testing.T, s Subject, target *Target) string {
	t.Helper()
	token, err := f.Token(t.Context(), s, target)
	if err != nil {
		t.Fatal(err)
	}
	return token.Access.Value()
}

func person(i int) Subject {
	return Subject{Issuer: "https://idp.example", ID: fmt.Sprint("p", i), Token: secret.New(fmt.Sprint("canary-", i)), Type: TypeIDToken}
}
