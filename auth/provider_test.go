package auth_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"gatehouse/auth"
	"gatehouse/auth/guard"
	"gatehouse/auth/secret"
)

func TestMain(m *testing.M) {
	child()
	goleak.VerifyTestMain(m)
}

// clock is the time of a test: it moves when told to.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func newClock() *clock { return &clock{now: time.Date(2026, 7, 28, 12, 0, 0, 0, time.UTC)} }

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) Advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

// lockedBuffer takes the logs of many goroutines.
type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// secretsCanary is in every secret that the provider makes.
const secretsCanary = "cAnArY"

// provider is an authorization server and, at /mcp/…, the remotes behind it.
type provider struct {
	t      *testing.T
	server *httptest.Server
	mux    *http.ServeMux

	mu            sync.Mutex
	metadata      map[string]any // of the authorization server; a nil value removes a member
	lives         int            // expires_in; 0: not sent
	noRefresh     bool
	rotate        bool
	forgiving     bool // a refresh token that was rotated still works
	idToken       string
	grantedScope  string                                               // scope of the answer; "": not sent
	token         func(http.ResponseWriter, *http.Request) (done bool) // first at /token
	codes         map[string]url.Values                                // by code: the authorization request
	refreshTokens map[string]bool
	redeemed      map[string]int // by refresh token: how often it was sent
	issued        int

	registered, tokenPosts, refreshes int
	revoked                           []string
	lastForm                          url.Values
}

func newProvider(t *testing.T) *provider {
	p := &provider{t: t, lives: 3600, codes: map[string]url.Values{}, refreshTokens: map[string]bool{}, redeemed: map[string]int{}}
	mux := http.NewServeMux()
	mux.HandleFunc("/mcp/", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("WWW-Authenticate", fmt.Sprintf("Bearer resource_metadata=%q", p.url("/.well-known/oauth-protected-resource"+r.URL.Path)))
		w.WriteHeader(http.StatusUnauthorized)
	})
	mux.HandleFunc("GET /.well-known/oauth-protected-resource/{path...}", func(w http.ResponseWriter, r *http.Request) {
		writeJSON(w, http.StatusOK, map[string]any{
			"resource": p.url("/" + r.PathValue("path")), "authorization_servers": []string{p.issuer()}, "scopes_supported": []string{"read"},
		})
	})
	mux.HandleFunc("GET /.well-known/oauth-authorization-server", func(w http.ResponseWriter, _ *http.Request) {
		doc := map[string]any{
			"issuer": p.issuer(), "authorization_endpoint": p.url("/authorize"), "token_endpoint": p.url("/token"),
			"registration_endpoint": p.url("/register"), "revocation_endpoint": p.url("/revoke"),
			"response_types_supported": []string{"code"}, "code_challenge_methods_supported": []string{"S256"},
			"token_endpoint_auth_methods_supported": []string{"none", "client_secret_basic"},
		}
		p.mu.Lock()
		defer p.mu.Unlock()
		for k, v := range p.metadata {
			if doc[k] = v; v == nil {
				delete(doc, k)
			}
		}
		writeJSON(w, http.StatusOK, doc)
	})
	mux.HandleFunc("POST /register", func(w http.ResponseWriter, r *http.Request) {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.registered++
		var asked map[string]any
		if err := json.NewDecoder(r.Body).Decode(&asked); err != nil {
			t.Error(err)
		}
		asked["client_id"] = fmt.Sprintf("client-%d", p.registered)
		writeJSON(w, http.StatusCreated, asked)
	})
	mux.HandleFunc("POST /token", p.serveToken)
	mux.HandleFunc("POST /revoke", func(_ http.ResponseWriter, r *http.Request) {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.revoked = append(p.revoked, r.PostFormValue("token"))
	})
	p.mux = mux
	p.server = httptest.NewServer(mux)
	t.Cleanup(p.server.Close)
	return p
}

func (p *provider) issuer() string         { return p.server.URL }
func (p *provider) url(path string) string { return p.server.URL + path }

func writeJSON(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(v)
}

// serve adds a document.
func (p *provider) serve(path string, v any) {
	p.mux.HandleFunc("GET "+path, func(w http.ResponseWriter, _ *http.Request) { writeJSON(w, http.StatusOK, v) })
}

// set changes knobs while the server runs.
func (p *provider) set(change func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	change()
}

func (p *provider) count(n *int) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return *n
}

func (p *provider) serveToken(w http.ResponseWriter, r *http.Request) {
	if err := r.ParseForm(); err != nil {
		p.t.Error(err)
	}
	form := r.PostForm
	p.mu.Lock()
	hook := p.token
	p.lastForm = form
	if form.Get("grant_type") == "refresh_token" {
		p.refreshes++
		p.redeemed[form.Get("refresh_token")]++
	} else {
		p.tokenPosts++
	}
	p.mu.Unlock()
	if hook != nil && hook(w, r) {
		return
	}
	p.answerToken(w, form)
}

func (p *provider) answerToken(w http.ResponseWriter, form url.Values) {
	p.mu.Lock()
	defer p.mu.Unlock()
	refuse := func(code string) { writeJSON(w, http.StatusBadRequest, map[string]string{"error": code}) }
	switch form.Get("grant_type") {
	case "authorization_code":
		asked := p.codes[form.Get("code")]
		delete(p.codes, form.Get("code"))
		challenge := sha256.Sum256([]byte(form.Get("code_verifier")))
		switch {
		case asked == nil,
			asked.Get("redirect_uri") != form.Get("redirect_uri"),
			asked.Get("resource") != form.Get("resource") || form.Get("resource") == "",
			asked.Get("client_id") != form.Get("client_id"),
			asked.Get("code_challenge_method") != "S256",
			asked.Get("code_challenge") != base64.RawURLEncoding.EncodeToString(challenge[:]):
			refuse("invalid_grant")
			return
		}
	case "refresh_token":
		if !p.refreshTokens[form.Get("refresh_token")] || form.Get("resource") == "" {
			refuse("invalid_grant")
			return
		}
		if p.rotate && !p.forgiving {
			delete(p.refreshTokens, form.Get("refresh_token"))
		}
	default:
		refuse("unsupported_grant_type")
		return
	}
	p.issued++
	answer := map[string]any{"access_token": fmt.Sprintf("%s-access-%d", secretsCanary, p.issued), "token_type": "Bearer"}
	if p.lives != 0 {
		answer["expires_in"] = p.lives
	}
	if !p.noRefresh && (p.rotate || form.Get("grant_type") == "authorization_code") {
		token := fmt.Sprintf("%s-refresh-%d", secretsCanary, p.issued)
		p.refreshTokens[token] = true
		answer["refresh_token"] = token
	}
	if p.idToken != "" {
		answer["id_token"] = p.idToken
	}
	if p.grantedScope != "" {
		answer["scope"] = p.grantedScope
	}
	writeJSON(w, http.StatusOK, answer)
}

// authorize plays the authorization endpoint and the user who agrees: it
// returns the query of the callback.
func (p *provider) authorize(redirectURL string) url.Values {
	p.t.Helper()
	u, err := url.Parse(redirectURL)
	if err != nil {
		p.t.Fatal(err)
	}
	q := u.Query()
	if !strings.HasPrefix(redirectURL, p.url("/authorize?")) || q.Get("response_type") != "code" {
		p.t.Fatalf("not an authorization request: %s", redirectURL)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	code := fmt.Sprintf("%s-code-%s", secretsCanary, rand8(q.Get("state")))
	p.codes[code] = q
	return url.Values{"code": {code}, "state": {q.Get("state")}}
}

func rand8(s string) string {
	sum := sha256.Sum256([]byte(s))
	return fmt.Sprintf("%x", sum[:8])
}

// world is a broker with a provider.
type world struct {
	*auth.Broker
	t     *testing.T
	p     *provider
	clock *clock
	store auth.Store
	log   *lockedBuffer
}

// overFile makes worlds over the file store: a test that sets it runs others again.
var overFile bool

// newWorld has the remotes r0, r1, … behind one provider.
func newWorld(t *testing.T, remotes int, change func(*auth.Config)) *world {
	w := &world{t: t, p: newProvider(t), clock: newClock(), log: &lockedBuffer{}}
	if overFile {
		w.store = openFile(t, auth.FileConfig{Dir: t.TempDir() + "/store", Now: w.clock.Now, Log: discard})
	} else {
		w.store = auth.NewMemory(auth.MemoryConfig{Now: w.clock.Now})
	}
	w.Broker = w.broker(remotes, change)
	return w
}

// broker makes another broker over the world's store, as after a restart.
func (w *world) broker(remotes int, change func(*auth.Config)) *auth.Broker {
	t := w.t
	t.Helper()
	clients, err := guard.New(guard.Config{})
	if err != nil {
		t.Fatal(err)
	}
	c := auth.Config{
		PublicURL: "http://127.0.0.1:8080", CallbackPath: "/oauth/callback", Store: w.store, Now: w.clock.Now,
		Log: slog.New(slog.NewTextHandler(w.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
	for i := range remotes {
		name := fmt.Sprintf("r%d", i)
		c.Remotes = append(c.Remotes, auth.Remote{
			Name: name, URL: w.p.url("/mcp/" + name), HTTP: clients.Client(guard.Policy{Loopback: true}),
		})
	}
	if change != nil {
		change(&c)
	}
	b, err := auth.New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		b.Close()
		b.Close()
		clients.Close()
		if logged := w.log.String(); strings.Contains(logged, secretsCanary) {
			t.Errorf("a secret is in the log:\n%s", logged)
		}
	})
	return b
}

// answer is the remote's answer to a request with the token.
func (w *world) answer(remote, token string, status int, challenge string) *http.Response {
	w.t.Helper()
	req, err := http.NewRequest(http.MethodPost, w.p.url("/mcp/"+remote), nil)
	if err != nil {
		w.t.Fatal(err)
	}
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	return &http.Response{StatusCode: status, Request: req, Header: http.Header{"Www-Authenticate": {challenge}}, Body: http.NoBody}
}

func (w *world) unauthorized(remote, token string) *http.Response {
	return w.answer(remote, token, http.StatusUnauthorized,
		fmt.Sprintf("Bearer resource_metadata=%q", w.p.url("/.well-known/oauth-protected-resource/mcp/"+remote)))
}

// link asks for a sign-in as a 401 does.
func (w *world) link(p auth.Principal, remote string) *auth.RequiredError {
	w.t.Helper()
	return w.required(w.Authorizer(p, remote).Challenge(w.t.Context(), w.unauthorized(remote, w.token(p, remote))))
}

func (w *world) required(err error) *auth.RequiredError {
	w.t.Helper()
	required, ok := errors.AsType[*auth.RequiredError](err)
	if !ok {
		w.t.Fatalf("got %v, want a RequiredError", err)
	}
	return required
}

// token is the access token that is held; empty if none.
func (w *world) token(p auth.Principal, remote string) string {
	w.t.Helper()
	token, err := w.Authorizer(p, remote).Token(w.t.Context())
	if err != nil {
		w.t.Fatal(err)
	}
	if token == nil {
		return ""
	}
	return token.AccessToken
}

func flowOf(e *auth.RequiredError) string { return e.AuthURL[strings.LastIndex(e.AuthURL, "/")+1:] }

// visit is one browser that has opened a link.
type visit struct {
	w      *world
	remote string
	start  *auth.Start
	query  url.Values
}

func (w *world) visit(e *auth.RequiredError) *visit {
	w.t.Helper()
	start, err := w.Begin(w.t.Context(), flowOf(e), auth.Visit{})
	if err != nil {
		w.t.Fatal(err)
	}
	return &visit{w, e.Remote, start, w.p.authorize(start.RedirectURL)}
}

func (v *visit) cookie(name string) (string, bool) {
	return v.start.Cookie.Value.Value(), name == v.start.Cookie.Name
}

func (v *visit) callback() auth.Callback {
	return auth.Callback{Remote: v.remote, Path: "/oauth/callback/" + v.remote, Query: v.query, Cookie: v.cookie}
}

func (v *visit) finish() (*auth.Finished, error) { return v.w.Finish(v.w.t.Context(), v.callback()) }

// signIn walks the whole way.
func (w *world) signIn(p auth.Principal, remote string) {
	w.t.Helper()
	finished, err := w.visit(w.link(p, remote)).finish()
	if err != nil {
		w.t.Fatal(err)
	}
	if finished.Principal != p || finished.Remote != remote {
		w.t.Fatalf("finished for another: %+v", finished)
	}
}

// grab answers a hook's request and reports that it did.
func grab(status int, contentType, body string) func(http.ResponseWriter, *http.Request) bool {
	return func(w http.ResponseWriter, _ *http.Request) bool {
		w.Header().Set("Content-Type", contentType)
		w.WriteHeader(status)
		io.WriteString(w, body)
		return true
	}
}

func secretClient(r *auth.Remote) {
	r.ClientID, r.ClientSecret = "pre registered", secret.New(secretsCanary+"-secret")
}

func logLines(w *world, has ...string) int {
	n := 0
	for line := range strings.SplitSeq(w.log.String(), "\n") {
		if !slices.ContainsFunc(has, func(s string) bool { return !strings.Contains(line, s) }) {
			n++
		}
	}
	return n
}

var discard = slog.New(slog.DiscardHandler)

func loopbackClient(t *testing.T) *guard.Client {
	t.Helper()
	clients, err := guard.New(guard.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(clients.Close)
	return clients.Client(guard.Policy{Loopback: true})
}
