package session

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/oauth2"

	"gatehouse/auth"
	"gatehouse/auth/guard"
)

func TestMain(m *testing.M) {
	if how := os.Getenv("GATEHOUSE_TEST_PROGRAM"); how != "" {
		runProgram(how)
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

// received is one message as a fake remote got it.
type received struct {
	HTTPMethod string
	Header     http.Header
	Body       string
	ID         json.RawMessage
	Method     string
	Params     json.RawMessage
}

// fake is a remote by hand: it does what a proper one does, except where a
// test says otherwise.
type fake struct {
	URL string

	mu        sync.Mutex
	got       []received
	on        map[string]func(w http.ResponseWriter, r *http.Request, m received)
	token     string
	protected []string
}

const canary = "CANARY-do-not-print"

func newFake(t testing.TB) *fake {
	t.Helper()
	f := &fake{on: map[string]func(http.ResponseWriter, *http.Request, received){}}
	srv := httptest.NewServer(f)
	t.Cleanup(srv.Close)
	f.URL = srv.URL + "/mcp?key=" + canary
	return f
}

func (f *fake) handle(method string, h func(w http.ResponseWriter, r *http.Request, m received)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.on[method] = h
}

func (f *fake) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	m := received{HTTPMethod: r.Method, Header: r.Header.Clone(), Body: string(body)}
	if len(body) > 0 {
		var envelope struct {
			ID     json.RawMessage `json:"id"`
			Method string          `json:"method"`
			Params json.RawMessage `json:"params"`
		}
		if err := json.Unmarshal(body, &envelope); err != nil {
			http.Error(w, "not JSON", http.StatusBadRequest)
			return
		}
		m.ID, m.Method, m.Params = envelope.ID, envelope.Method, envelope.Params
	}
	if r.Method == http.MethodDelete {
		m.Method = "DELETE"
	}
	if r.Method == http.MethodGet {
		m.Method = "GET"
	}
	f.mu.Lock()
	f.got = append(f.got, m)
	h := f.on[m.Method]
	locked := slices.Contains(f.protected, m.Method) && r.Header.Get("Authorization") != "Bearer "+f.token
	f.mu.Unlock()
	switch {
	case locked:
		w.Header().Set("WWW-Authenticate", `Bearer resource_metadata="http://127.0.0.1/x"`)
		http.Error(w, canary, http.StatusUnauthorized)
	case h != nil:
		h(w, r, m)
	case m.Method == "initialize":
		w.Header().Set("Mcp-Session-Id", "s1")
		answer(w, m, initialized)
	case m.Method == "tools/list":
		answer(w, m, `{"tools":[{"name":"echo","inputSchema":{"type":"object"}}]}`)
	case m.Method == "tools/call":
		answer(w, m, `{"content":[]}`)
	default:
		w.WriteHeader(http.StatusAccepted)
	}
}

const initialized = `{"protocolVersion":"2025-11-25","capabilities":{"tools":{}},"serverInfo":{"name":"fake","version":"1"}}`

func answer(w http.ResponseWriter, m received, result string) {
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	fmt.Fprintf(w, `{"jsonrpc":"2.0","id":%s,"result":%s}`, m.ID, result)
}

// requests returns what came with a JSON-RPC method, or "DELETE".
func (f *fake) requests(method string) []received {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(f.got), func(m received) bool { return m.Method != method })
}

// newRemoteFor is a remote that may be at this machine's loopback.
func newRemoteFor(t testing.TB, name, url string) Remote {
	t.Helper()
	clients, err := guard.New(guard.Config{UserAgent: "test"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(clients.Close)
	return Remote{Name: name, URL: url, HTTP: clients.Client(guard.Policy{Loopback: true})}
}

// logs collects what is logged, at every level.
type logs struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *logs) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *logs) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// newPool is a pool whose log no secret may get into.
func newPool(t testing.TB, remotes ...Remote) (*Pool, *logs) {
	t.Helper()
	written := &logs{}
	p := New(Config{
		Remotes: remotes, Name: "gatehouse", Version: "test",
		Log: slog.New(slog.NewTextHandler(written, &slog.HandlerOptions{Level: slog.LevelDebug})),
	})
	t.Cleanup(func() {
		p.Close()
		if strings.Contains(written.String(), canary) {
			t.Errorf("a secret is in the log:\n%s", written)
		}
	})
	return p, written
}

// open opens the local session of a pool with these remotes.
func open(t testing.TB, remotes ...Remote) *Session {
	t.Helper()
	p, _ := newPool(t, remotes...)
	s, err := p.Open(auth.Local)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// settled waits until every remote has been listed or has failed.
func settled(t testing.TB, s *Session) []Catalog {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	catalogs := s.Catalogs(ctx)
	if ctx.Err() != nil {
		t.Fatal("some remote has not answered")
	}
	return catalogs
}

// failure fails the test unless err is a Failure without secrets.
func failure(t testing.TB, err error, kind Kind) *Failure {
	t.Helper()
	f, ok := errors.AsType[*Failure](err)
	if !ok {
		t.Fatalf("got %v (%T), want a Failure of kind %s", err, err, kind)
	}
	if f.Kind != kind {
		t.Errorf("got kind %s (%v), want %s", f.Kind, f, kind)
	}
	if strings.Contains(f.Error(), canary) {
		t.Errorf("a secret is in %q", f.Error())
	}
	return f
}

// door is an Authorizer that a test opens.
type door struct {
	remote string

	mu         sync.Mutex
	token      string
	renewed    string // what Renew finds; "" nothing
	tokens     int
	challenges int
	renewals   int
	err        error // of Challenge; nil: a RequiredError
}

func (d *door) Token(context.Context) (*oauth2.Token, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.tokens++
	if d.token == "" {
		return nil, nil
	}
	return &oauth2.Token{AccessToken: d.token}, nil
}

func (d *door) Renew(_ context.Context, resp *http.Response) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.renewals++
	return d.renewLocked(resp)
}

func (d *door) renewLocked(resp *http.Response) error {
	if d.renewed != "" {
		d.token, d.renewed = d.renewed, ""
		return nil
	}
	if d.token != "" && resp.Request.Header.Get("Authorization") != "Bearer "+d.token {
		return nil
	}
	return auth.ErrSignInNeeded
}

func (d *door) Challenge(_ context.Context, resp *http.Response) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.challenges++
	if d.renewLocked(resp) == nil {
		return nil
	}
	if d.err != nil {
		return d.err
	}
	return &auth.RequiredError{Remote: d.remote, AuthURL: "http://gw/connect/1", Reason: auth.ReasonSignIn}
}

func (d *door) signIn(token string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.token = token
}

func (d *door) count() (challenges, renewals int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.challenges, d.renewals
}

// protect lets these methods through with the token only.
func (f *fake) protect(token string, methods ...string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.token, f.protected = token, methods
}

func testLog(t testing.TB) *slog.Logger {
	return slog.New(slog.NewTextHandler(t.Output(), nil))
}
