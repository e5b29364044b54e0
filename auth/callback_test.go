package auth_test

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"gatehouse/auth"
)

func TestIdenticalCallbacksAtOnce(t *testing.T) {
	w := newWorld(t, 1, nil)
	v := w.visit(w.link(auth.Local, "r0"))
	var finished, unknown atomic.Int32
	var wg sync.WaitGroup
	for range 100 {
		wg.Go(func() {
			switch _, err := v.finish(); {
			case err == nil:
				finished.Add(1)
			case errors.Is(err, auth.ErrStateUnknown):
				unknown.Add(1)
			default:
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if finished.Load() != 1 || unknown.Load() != 99 {
		t.Errorf("%d finished and %d were refused, want 1 and 99", finished.Load(), unknown.Load())
	}
	if n := w.p.count(&w.p.tokenPosts); n != 1 {
		t.Errorf("%d token POSTs, want 1", n)
	}
	if _, err := v.finish(); !errors.Is(err, auth.ErrStateUnknown) {
		t.Errorf("replay: %v", err)
	}
}

func TestStateExpires(t *testing.T) {
	w := newWorld(t, 1, nil)
	required := w.link(auth.Local, "r0")
	early := w.visit(required)
	w.clock.Advance(9 * time.Minute)
	late := w.visit(required)
	w.clock.Advance(time.Minute)
	if _, err := early.finish(); !errors.Is(err, auth.ErrStateUnknown) {
		t.Errorf("after ten minutes: %v", err)
	}
	w.clock.Advance(8*time.Minute + 59*time.Second)
	if _, err := late.finish(); err != nil {
		t.Errorf("within ten minutes of the visit: %v", err)
	}
}

// A visit keeps the link alive, but for an hour at most; one that begins in the
// last minute has its ten minutes all the same.
func TestVisitsSlideTheLink(t *testing.T) {
	w := newWorld(t, 1, nil)
	required := w.link(auth.Local, "r0")
	for range 7 {
		w.visit(required)
		w.clock.Advance(8*time.Minute + 30*time.Second)
	}
	last := w.visit(required) // at 59:30
	w.clock.Advance(9 * time.Minute)
	if _, err := w.Begin(t.Context(), flowOf(required), auth.Visit{}); !errors.Is(err, auth.ErrFlowUnknown) {
		t.Errorf("a link after more than an hour: %v", err)
	}
	if _, err := last.finish(); err != nil {
		t.Errorf("a visit that began in time: %v", err)
	}
}

// What does not belong is refused, uses the state up, and sends nothing to the
// authorization server.
func TestCallbackRefused(t *testing.T) {
	const description = "evil-description"
	for _, tt := range []struct {
		name   string
		change func(*auth.Callback)
		want   error
		intact bool // the state is another's business and stays
	}{
		{"no cookie", func(c *auth.Callback) {
			c.Cookie = func(string) (string, bool) { return "", false }
		}, auth.ErrWrongBrowser, false},
		{"another cookie", func(c *auth.Callback) {
			c.Cookie = func(string) (string, bool) { return "another", true }
		}, auth.ErrWrongBrowser, false},
		{"another remote's path", func(c *auth.Callback) { c.Remote = "r1" }, auth.ErrWrongRemote, false},
		{"the plain path", func(c *auth.Callback) { c.Remote = "" }, auth.ErrWrongRemote, false},
		{"another path", func(c *auth.Callback) { c.Path = "/oauth/callback" }, auth.ErrWrongRemote, false},
		{"code and error", func(c *auth.Callback) { c.Query.Set("error", "access_denied") }, auth.ErrStateUnknown, false},
		{"neither code nor error", func(c *auth.Callback) { c.Query.Del("code") }, auth.ErrStateUnknown, false},
		{"two codes", func(c *auth.Callback) { c.Query.Add("code", "x") }, auth.ErrStateUnknown, false},
		{"empty code", func(c *auth.Callback) { c.Query.Set("code", "") }, auth.ErrStateUnknown, false},
		{"huge code", func(c *auth.Callback) { c.Query.Set("code", strings.Repeat("x", 4<<10+1)) }, auth.ErrStateUnknown, false},
		{"NUL in the code", func(c *auth.Callback) { c.Query.Set("code", "x\x00") }, auth.ErrStateUnknown, false},
		{"bad UTF-8 in the code", func(c *auth.Callback) { c.Query.Set("code", "x\xff") }, auth.ErrStateUnknown, false},
		{"two issuers", func(c *auth.Callback) { c.Query["iss"] = []string{"a", "b"} }, auth.ErrStateUnknown, false},
		{"denied", func(c *auth.Callback) {
			c.Query.Del("code")
			c.Query.Set("error", "access_denied")
			c.Query.Set("error_description", description)
		}, auth.ErrDenied, false},
		{"an error that nobody knows", func(c *auth.Callback) {
			c.Query.Del("code")
			c.Query.Set("error", description)
		}, auth.ErrDenied, false},
		{"no state", func(c *auth.Callback) { c.Query.Del("state") }, auth.ErrStateUnknown, true},
		{"empty state", func(c *auth.Callback) { c.Query.Set("state", "") }, auth.ErrStateUnknown, true},
		{"two states", func(c *auth.Callback) { c.Query.Add("state", c.Query.Get("state")) }, auth.ErrStateUnknown, true},
		{"a bit of the state flipped", func(c *auth.Callback) {
			state := []byte(c.Query.Get("state"))
			state[7] ^= 1
			c.Query.Set("state", string(state))
		}, auth.ErrStateUnknown, true},
		{"a state of 1 MB", func(c *auth.Callback) { c.Query.Set("state", strings.Repeat("x", 1<<20)) }, auth.ErrStateUnknown, true},
		{"NUL in the state", func(c *auth.Callback) { c.Query.Set("state", "\x00"+c.Query.Get("state")[1:]) }, auth.ErrStateUnknown, true},
		{"bad UTF-8 in the state", func(c *auth.Callback) { c.Query.Set("state", "\xff"+c.Query.Get("state")[1:]) }, auth.ErrStateUnknown, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t, 2, nil)
			v := w.visit(w.link(auth.Local, "r0"))
			w.link(auth.Local, "r1")
			good := v.callback()
			bad := v.callback()
			bad.Query = url.Values{}
			for k, values := range good.Query {
				bad.Query[k] = append([]string(nil), values...)
			}
			tt.change(&bad)
			if _, err := w.Finish(t.Context(), bad); !errors.Is(err, tt.want) {
				t.Fatalf("got %v, want %v", err, tt.want)
			} else if strings.Contains(err.Error(), description) {
				t.Errorf("the error holds foreign text: %v", err)
			}
			if n := w.p.count(&w.p.tokenPosts); n != 0 {
				t.Errorf("%d token POSTs", n)
			}
			_, err := w.Finish(t.Context(), good)
			switch {
			case tt.intact && err != nil:
				t.Errorf("the state was touched: %v", err)
			case !tt.intact && !errors.Is(err, auth.ErrStateUnknown):
				t.Errorf("the state can still be used: %v", err)
			}
			if !tt.intact {
				// The link lives on.
				if _, err := w.visit(w.link(auth.Local, "r0")).finish(); err != nil {
					t.Errorf("the link is dead: %v", err)
				}
			}
			if s := w.Status(auth.Local, "r0"); s.LastError != nil && strings.Contains(s.LastError.Error(), description) || strings.Contains(w.log.String(), description) {
				t.Error("foreign text is kept or logged")
			}
		})
	}
}

func TestDenialIsTold(t *testing.T) {
	w := newWorld(t, 1, nil)
	v := w.visit(w.link(auth.Local, "r0"))
	v.query.Del("code")
	v.query.Set("error", "access_denied")
	if _, err := v.finish(); !errors.Is(err, auth.ErrDenied) {
		t.Fatal(err)
	}
	if s := w.Status(auth.Local, "r0"); s.LastError == nil || s.LastError.Kind != auth.KindDenied || s.Pending == nil {
		t.Errorf("status: %+v", s)
	}
	w.signIn(auth.Local, "r0")
	if s := w.Status(auth.Local, "r0"); s.LastError != nil {
		t.Errorf("the denial is told after the sign-in: %v", s.LastError)
	}
}

func TestIssuerOfTheResponse(t *testing.T) {
	const evil = "https://evil.example"
	for _, tt := range []struct {
		name       string
		advertised bool
		iss        string // "-": absent; "": the right one
		asError    bool
		want       error
	}{
		{"advertised and right", true, "", false, nil},
		{"advertised and absent", true, "-", false, auth.ErrIssuerMismatch},
		{"advertised and wrong", true, evil, false, auth.ErrIssuerMismatch},
		{"advertised, an error, right", true, "", true, auth.ErrDenied},
		{"advertised, an error, absent", true, "-", true, auth.ErrIssuerMismatch},
		{"advertised, an error, wrong", true, evil, true, auth.ErrIssuerMismatch},
		{"not advertised and absent", false, "-", false, nil},
		{"not advertised and right", false, "", false, nil},
		{"not advertised and wrong", false, evil, false, auth.ErrIssuerMismatch},
		{"not advertised, an error, wrong", false, evil, true, auth.ErrIssuerMismatch},
		{"a slash more", false, "/", false, auth.ErrIssuerMismatch},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t, 1, nil)
			w.p.set(func() {
				w.p.metadata = map[string]any{"authorization_response_iss_parameter_supported": tt.advertised}
			})
			v := w.visit(w.link(auth.Local, "r0"))
			switch tt.iss {
			case "-":
			case "", "/":
				v.query.Set("iss", w.p.issuer()+tt.iss)
			default:
				v.query.Set("iss", tt.iss)
			}
			if tt.asError {
				v.query.Del("code")
				v.query.Set("error", "server_error")
				v.query.Set("error_description", "evil")
			}
			_, err := v.finish()
			if tt.want == nil && err != nil || tt.want != nil && !errors.Is(err, tt.want) {
				t.Fatalf("got %v, want %v", err, tt.want)
			}
			if err == nil {
				return
			}
			if n := w.p.count(&w.p.tokenPosts); n != 0 {
				t.Errorf("%d token POSTs", n)
			}
			// Of a mismatch, the error fields are neither acted on nor told.
			if errors.Is(err, auth.ErrIssuerMismatch) {
				if s := w.Status(auth.Local, "r0"); s.LastError != nil || strings.Contains(w.log.String(), "server_error") {
					t.Errorf("the error of another issuer was acted on: %v", s.LastError)
				}
			}
		})
	}
}

func TestTokenEndpointAnswers(t *testing.T) {
	elsewhere := newProvider(t)
	const js = "application/json"
	for name, hook := range map[string]func(http.ResponseWriter, *http.Request) bool{
		"HTML":          grab(http.StatusOK, "text/html", "<html>"+secretsCanary),
		"empty token":   grab(http.StatusOK, js, `{"access_token":"","token_type":"Bearer"}`),
		"mac":           grab(http.StatusOK, js, `{"access_token":"`+secretsCanary+`","token_type":"mac"}`),
		"CRLF":          grab(http.StatusOK, js, `{"access_token":"`+secretsCanary+`\r\nX-Evil: 1","token_type":"Bearer"}`),
		"too large":     grab(http.StatusOK, js, `{"access_token":"a","token_type":"Bearer","x":"`+strings.Repeat("x", 2<<20)+`"}`),
		"invalid_grant": grab(http.StatusBadRequest, js, `{"error":"invalid_grant","error_description":"`+secretsCanary+`"}`),
		"503":           grab(http.StatusServiceUnavailable, "text/plain", secretsCanary),
		"redirect": func(w http.ResponseWriter, _ *http.Request) bool {
			w.Header().Set("Location", elsewhere.url("/token"))
			w.WriteHeader(http.StatusTemporaryRedirect)
			return true
		},
		"hangs up": func(http.ResponseWriter, *http.Request) bool { panic(http.ErrAbortHandler) },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, 1, nil)
			w.p.set(func() { w.p.token = hook })
			v := w.visit(w.link(auth.Local, "r0"))
			_, err := v.finish()
			e, ok := errors.AsType[*auth.Error](err)
			if !ok || !errors.Is(err, auth.ErrExchange) {
				t.Fatalf("got %v, want an *Error of ErrExchange", err)
			}
			if strings.Contains(err.Error(), secretsCanary) || strings.Contains(e.Say, secretsCanary) {
				t.Errorf("the error holds foreign text: %v", err)
			}
			if n := w.p.count(&w.p.tokenPosts); n != 1 {
				t.Errorf("%d token POSTs, want 1", n)
			}
			if n := elsewhere.count(&elsewhere.tokenPosts); n != 0 {
				t.Error("a redirect was followed")
			}
			if w.token(auth.Local, "r0") != "" {
				t.Error("a token was stored")
			}
			if s := w.Status(auth.Local, "r0"); s.SignedIn || s.LastError == nil {
				t.Errorf("status: %+v", s)
			}
			// The link can be tried again.
			w.p.set(func() { w.p.token = nil })
			if _, err := w.visit(w.link(auth.Local, "r0")).finish(); err != nil {
				t.Errorf("trying again: %v", err)
			}
		})
	}
}

// One byte and then nothing: Close ends it, and nobody is left waiting.
func TestCloseEndsASlowExchange(t *testing.T) {
	w := newWorld(t, 1, nil)
	slow := make(chan struct{})
	w.p.set(func() {
		w.p.token = func(rw http.ResponseWriter, r *http.Request) bool {
			rw.Header().Set("Content-Type", "application/json")
			io.WriteString(rw, "{")
			rw.(http.Flusher).Flush()
			close(slow)
			<-r.Context().Done()
			return true
		}
	})
	v := w.visit(w.link(auth.Local, "r0"))
	result := make(chan error)
	go func() {
		_, err := v.finish()
		result <- err
	}()
	<-slow
	w.Close()
	if err := <-result; err == nil {
		t.Error("an exchange that was cut off succeeded")
	}
	if _, err := w.visitAfterClose(v); err == nil {
		t.Error("a closed broker finishes sign-ins")
	}
	if err := w.Authorizer(auth.Local, "r0").SignIn(t.Context()); err == nil {
		t.Error("a closed broker starts flows")
	}
}

func (w *world) visitAfterClose(v *visit) (*auth.Finished, error) {
	return w.Finish(context.Background(), v.callback())
}

// The browser may leave once it has brought the code.
func TestBrowserLeaves(t *testing.T) {
	w := newWorld(t, 1, nil)
	v := w.visit(w.link(auth.Local, "r0"))
	ctx, leave := context.WithCancel(t.Context())
	w.p.set(func() {
		w.p.token = func(http.ResponseWriter, *http.Request) bool {
			leave()
			return false
		}
	})
	if _, err := w.Finish(ctx, v.callback()); err != nil {
		t.Fatal(err)
	}
	if w.token(auth.Local, "r0") == "" {
		t.Error("no token")
	}
}

// invalid_client at the exchange: the link is dead, the next one comes with a
// new registration.
func TestInvalidClientRegistersAnew(t *testing.T) {
	w := newWorld(t, 1, nil)
	first := w.link(auth.Local, "r0")
	v := w.visit(first)
	w.p.set(func() { w.p.token = grab(http.StatusUnauthorized, "application/json", `{"error":"invalid_client"}`) })
	if _, err := v.finish(); !errors.Is(err, auth.ErrExchange) {
		t.Fatal(err)
	}
	if _, err := w.Begin(t.Context(), flowOf(first), auth.Visit{}); !errors.Is(err, auth.ErrFlowUnknown) {
		t.Errorf("the link with the dead client: %v", err)
	}
	w.p.set(func() { w.p.token = nil })
	second := w.link(auth.Local, "r0")
	if n := w.p.count(&w.p.registered); second.AuthURL == first.AuthURL || n != 2 {
		t.Errorf("%d registrations, want 2", n)
	}
	if _, err := w.visit(second).finish(); err != nil {
		t.Error(err)
	}
}

func TestPreRegisteredClient(t *testing.T) {
	w := newWorld(t, 1, func(c *auth.Config) {
		secretClient(&c.Remotes[0])
		c.Remotes[0].CallbackPath = "/custom/back"
	})
	v := w.visit(w.link(auth.Local, "r0"))
	var user, password string
	w.p.set(func() {
		w.p.token = func(rw http.ResponseWriter, r *http.Request) bool {
			user, password, _ = r.BasicAuth()
			return grab(http.StatusOK, "application/json", `{"access_token":"a","token_type":"Bearer"}`)(rw, r)
		}
	})
	asked, err := url.Parse(v.start.RedirectURL)
	if err != nil || asked.Query().Get("redirect_uri") != "http://127.0.0.1:8080/custom/back" {
		t.Fatalf("redirect URI in %s", v.start.RedirectURL)
	}
	c := v.callback()
	c.Remote, c.Path = "", "/oauth/callback"
	if _, err := w.Finish(t.Context(), c); !errors.Is(err, auth.ErrWrongRemote) {
		t.Errorf("another path: %v", err)
	}
	c = w.visit(w.link(auth.Local, "r0")).callback()
	c.Remote, c.Path = "", "/custom/back"
	if _, err := w.Finish(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	if user != "pre+registered" || password != secretsCanary+"-secret" || w.p.lastForm.Has("client_secret") {
		t.Errorf("authenticated as %q", user)
	}
	if n := w.p.count(&w.p.registered); n != 0 {
		t.Errorf("%d registrations", n)
	}
}

// https brings the __Host- prefix.
func TestCookieOfAPublicGateway(t *testing.T) {
	w := newWorld(t, 1, func(c *auth.Config) { c.PublicURL = "https://gw.example.com" })
	start, err := w.Begin(t.Context(), flowOf(w.link(auth.Local, "r0")), auth.Visit{})
	if err != nil || !strings.HasPrefix(start.Cookie.Name, "__Host-gatehouse_flow_") || start.Cookie.MaxAge != 10*time.Minute {
		t.Errorf("cookie %+v, %v", start, err)
	}
}

// What comes back to another broker over the same store completes, as it will
// after a restart with a durable store.
func TestFinishElsewhere(t *testing.T) {
	w := newWorld(t, 1, nil)
	v := w.visit(w.link(auth.Local, "r0"))
	w.Close()
	other := w.broker(1, nil)
	if _, err := other.Finish(t.Context(), v.callback()); err != nil {
		t.Fatal(err)
	}
	token, err := other.Authorizer(auth.Local, "r0").Token(t.Context())
	if err != nil || token == nil {
		t.Errorf("token: %v, %v", token, err)
	}
}

// Whoever is gone before the exchange ends leaves nothing behind.
func TestEndDuringTheExchange(t *testing.T) {
	for name, end := range map[string]func(*world, auth.Principal){
		"End": func(w *world, p auth.Principal) { w.End(p) },
		"SignOut": func(w *world, p auth.Principal) {
			if _, err := w.SignOut(context.Background(), p, "r0"); err != nil {
				w.t.Error(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, 1, nil)
			p := auth.SessionPrincipal("gone")
			v := w.visit(w.link(p, "r0"))
			w.p.set(func() {
				w.p.token = func(http.ResponseWriter, *http.Request) bool {
					end(w, p)
					return false
				}
			})
			if _, err := v.finish(); !errors.Is(err, auth.ErrStateUnknown) {
				t.Errorf("finished for somebody who is gone: %v", err)
			}
			if w.token(p, "r0") != "" {
				t.Error("a grant of somebody who is gone")
			}
		})
	}
}
