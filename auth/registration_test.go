package auth

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"gatehouse/auth/endpoint"
	"gatehouse/auth/guard"
	"gatehouse/auth/secret"
)

// registry is a registrar with a clock, its store, and an authorization
// server's registration endpoint.
type registry struct {
	*registrar
	site     *site
	remote   *Remote
	found    *discovered
	clock    time.Time
	posts    atomic.Int64
	received chan clientMetadata
}

func newRegistry(t *testing.T, change func(*Config)) *registry {
	g := &registry{site: newSite(t), clock: time.Unix(1e9, 0), received: make(chan clientMetadata, 100)}
	g.remote = g.site.remote()
	c := Config{
		Remotes:      []Remote{*g.remote, {Name: "a b/c", URL: "https://x.example/mcp"}},
		PublicURL:    "http://127.0.0.1:8080",
		CallbackPath: "/oauth/callback",
		ClientName:   "Gatehouse",
		MetadataPath: "/.well-known/oauth-client.json",
		Log:          slog.New(slog.DiscardHandler),
		Now:          func() time.Time { return g.clock },
	}
	c.Store = NewMemory(MemoryConfig{Now: c.Now})
	if change != nil {
		change(&c)
	}
	g.registrar = newRegistrar(c)
	g.found = &discovered{Issuer: g.site.URL, RegistrationEndpoint: g.site.URL + "/register", AuthMethods: []string{"none"}}
	return g
}

// answer makes the registration endpoint give an answer.
func (g *registry) answer(status int, body string, header ...string) {
	g.site.handle("/register", func(w http.ResponseWriter, r *http.Request) {
		g.posts.Add(1)
		var m clientMetadata
		if err := json.NewDecoder(r.Body).Decode(&m); err != nil || r.Method != http.MethodPost || r.Header.Get("Content-Type") != "application/json" {
			g.site.t.Errorf("the request is no registration: %v", err)
		}
		g.received <- m
		w.Header().Set("Content-Type", "application/json")
		for i := 0; i+1 < len(header); i += 2 {
			w.Header().Set(header[i], header[i+1])
		}
		w.WriteHeader(status)
		io.WriteString(w, body)
	})
}

func (g *registry) get(t *testing.T) (*registration, error) {
	return g.register(t.Context(), g.remote, g.found, nil)
}

func (g *registry) must(t *testing.T) *registration {
	t.Helper()
	reg, err := g.get(t)
	if err != nil {
		t.Fatal(err)
	}
	return reg
}

func TestRegistrationOrder(t *testing.T) {
	g := newRegistry(t, func(c *Config) { c.PublicURL = "https://gw.example.com" })
	g.answer(201, `{"client_id": "dynamic"}`)
	g.found.CIMD = true
	g.found.AuthMethods = nil
	g.remote.ClientID, g.remote.ClientSecret = "by-hand", secret.New("s")

	reg := g.must(t)
	if reg.Source != sourceConfigured || reg.ClientID != "by-hand" || reg.ClientSecret.Value() != "s" || reg.RedirectURI != "https://gw.example.com/oauth/callback" {
		t.Errorf("configured: %+v", reg)
	}
	g.remote.CallbackPath = "/other"
	if reg := g.must(t); reg.RedirectURI != "https://gw.example.com/other" {
		t.Errorf("with a callback path: %+v", reg)
	}
	g.remote.ClientID = ""
	reg = g.must(t)
	if reg.Source != sourceCIMD || reg.ClientID != "https://gw.example.com/.well-known/oauth-client.json" || reg.AuthMethod != methodNone ||
		reg.RedirectURI != "https://gw.example.com/oauth/callback/notes" || !reg.ClientSecret.IsEmpty() {
		t.Errorf("document: %+v", reg)
	}
	if g.posts.Load() != 0 {
		t.Error("registered without need")
	}
	g.found.CIMD = false
	reg = g.must(t)
	if reg.Source != sourceDynamic || reg.ClientID != "dynamic" || reg.Issuer != g.site.URL || reg.RedirectURI != "https://gw.example.com/oauth/callback/notes" {
		t.Errorf("dynamic: %+v", reg)
	}
	if m := <-g.received; m.ApplicationType != "web" {
		t.Errorf("application_type %q of an https client", m.ApplicationType)
	}
	g.found.RegistrationEndpoint = ""
	g.remote.CallbackPath = ""
	_, err := g.get(t)
	saying(t, err, KindRegistration, g.site.URL, "redirect URI https://gw.example.com/oauth/callback ", "auth.clientId")
}

func TestDocumentNeedsToBeFetchable(t *testing.T) {
	g := newRegistry(t, nil) // public URL on loopback
	g.answer(201, `{"client_id": "dynamic"}`)
	g.found.CIMD = true
	if reg := g.must(t); reg.Source != sourceDynamic {
		t.Errorf("an authorization server cannot fetch from our loopback: %+v", reg)
	}
	g = newRegistry(t, func(c *Config) { c.ClientMetadataURL = "https://cdn.example.com/client.json" })
	g.found.CIMD = true
	if reg := g.must(t); reg.Source != sourceCIMD || reg.ClientID != "https://cdn.example.com/client.json" || reg.RedirectURI != "http://127.0.0.1:8080/oauth/callback/notes" {
		t.Errorf("a document elsewhere: %+v", reg)
	}
}

func TestConfiguredMethod(t *testing.T) {
	for _, test := range []struct {
		secret, configured string
		listed             []string
		want               string
	}{
		{"", "", nil, methodNone},
		{"", "", []string{methodBasic}, methodNone},
		{"s", "", nil, methodBasic},
		{"s", "", []string{methodPost, methodBasic}, methodBasic},
		{"s", "", []string{"private_key_jwt", methodPost}, methodPost},
		{"s", "", []string{"private_key_jwt"}, ""},
		{"s", methodPost, []string{methodBasic}, methodPost},
	} {
		g := newRegistry(t, nil)
		g.remote.ClientID, g.remote.ClientSecret, g.remote.TokenEndpointAuthMethod = "id", secret.New(test.secret), test.configured
		g.found.AuthMethods = test.listed
		reg, err := g.get(t)
		if test.want == "" {
			saying(t, err, KindRegistration, "auth.tokenEndpointAuthMethod")
		} else if err != nil || reg.AuthMethod != test.want {
			t.Errorf("%+v: %+v, %v", test, reg, err)
		}
	}
}

func TestMetadataDocument(t *testing.T) {
	g := newRegistry(t, func(c *Config) { c.PublicURL = "https://gw.example.com"; c.ClientScopes = []string{"read", "a&b"} })
	document := g.document()
	var got map[string]any
	if err := json.Unmarshal(document, &got); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"client_id":                  "https://gw.example.com/.well-known/oauth-client.json",
		"client_name":                "Gatehouse",
		"application_type":           "web",
		"redirect_uris":              "[https://gw.example.com/oauth/callback/notes https://gw.example.com/oauth/callback/a%20b%2Fc https://gw.example.com/oauth/callback]",
		"grant_types":                "[authorization_code refresh_token]",
		"response_types":             "[code]",
		"token_endpoint_auth_method": "none",
		"scope":                      "read a&b",
	} {
		if text := fmt.Sprint(got[name]); text != want {
			t.Errorf("%s: %s, want %s", name, text, want)
		}
	}
	if len(got) != 8 || !bytes.Contains(document, []byte("a&b")) {
		t.Errorf("document: %s", document)
	}
}

func TestDynamicRequest(t *testing.T) {
	for _, test := range []struct {
		listed []string
		want   string
	}{
		{[]string{methodBasic, "none"}, "none"},
		{[]string{methodPost, methodBasic}, methodBasic},
		{[]string{methodPost, "private_key_jwt"}, methodPost},
		{nil, methodBasic},
	} {
		g := newRegistry(t, nil)
		g.answer(201, `{"client_id": "id"}`)
		g.found.AuthMethods = test.listed
		g.must(t)
		m := <-g.received
		if m.AuthMethod != test.want || m.ApplicationType != "native" || m.ClientName != "Gatehouse" || m.ClientID != "" || m.Scope != "" ||
			!slices.Equal(m.RedirectURIs, []string{"http://127.0.0.1:8080/oauth/callback/notes"}) ||
			!slices.Equal(m.GrantTypes, []string{"authorization_code", "refresh_token"}) || !slices.Equal(m.ResponseTypes, []string{"code"}) {
			t.Errorf("%v: asked for %+v", test.listed, m)
		}
	}
	g := newRegistry(t, nil)
	g.answer(201, `{"client_id": "id"}`)
	g.found.AuthMethods = []string{"private_key_jwt"}
	_, err := g.get(t)
	saying(t, err, KindRegistration, "lists no way of authenticating", "auth.clientId")
	if g.posts.Load() != 0 {
		t.Error("a request that cannot help was sent")
	}
}

func TestDynamicAnswer(t *testing.T) {
	const canary = "canary-of-the-answer"
	for _, test := range []struct {
		name, body string
		listed     []string
		method     string // empty: refused
		secret     string
	}{
		{"public", `{"client_id": "id", "token_endpoint_auth_method": "none"}`, []string{"none"}, methodNone, ""},
		{"as asked", `{"client_id": "id"}`, []string{"none"}, methodNone, ""},
		{"post instead", `{"client_id": "id", "client_secret": "s", "token_endpoint_auth_method": "client_secret_post"}`, []string{"none"}, methodPost, "s"},
		{"basic instead", `{"client_id": "id", "client_secret": "s", "token_endpoint_auth_method": "client_secret_basic"}`, []string{methodPost}, methodBasic, "s"},
		{"none instead", `{"client_id": "id", "client_secret": "s", "token_endpoint_auth_method": "none"}`, nil, methodNone, ""},
		{"a secret, not asked for", `{"client_id": "id", "client_secret": "s"}`, []string{"none"}, methodBasic, "s"},
		{"a secret, as asked", `{"client_id": "id", "client_secret": "s"}`, []string{methodPost}, methodPost, "s"},
		{"a method without secret", `{"client_id": "id", "token_endpoint_auth_method": "client_secret_basic"}`, nil, methodNone, ""},
		{"never expires", `{"client_id": "id", "client_secret": "s", "client_secret_expires_at": 0}`, nil, methodBasic, "s"},
		{"no client_id", `{"client_secret": "` + canary + `"}`, nil, "", ""},
		{"empty client_id", `{"client_id": "", "x": "` + canary + `"}`, nil, "", ""},
		{"client_id with CRLF", `{"client_id": "` + canary + `\r\n"}`, nil, "", ""},
		{"secret with CRLF", `{"client_id": "id", "client_secret": "` + canary + `\r\n"}`, nil, "", ""},
		{"long client_id", `{"client_id": "` + canary + strings.Repeat("x", maxClientLength) + `"}`, nil, "", ""},
		{"unknown method", `{"client_id": "id", "client_secret": "s", "token_endpoint_auth_method": "` + canary + `"}`, nil, "", ""},
		{"expired", `{"client_id": "` + canary + `", "client_secret": "s", "client_secret_expires_at": 1}`, nil, "", ""},
		{"nonsense expiry", `{"client_id": "` + canary + `", "client_secret": "s", "client_secret_expires_at": -5}`, nil, "", ""},
		{"huge expiry", `{"client_id": "` + canary + `", "client_secret": "s", "client_secret_expires_at": 1e300}`, nil, "", ""},
		{"doubles", `{"client_id": "` + canary + `", "client_id": "b"}`, nil, "", ""},
		{"not JSON", canary, nil, "", ""},
		{"another type", `{"client_id": {"x": "` + canary + `"}}`, nil, "", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			g := newRegistry(t, nil)
			g.answer(201, test.body)
			g.found.AuthMethods = test.listed
			reg, err := g.get(t)
			if test.method == "" {
				saying(t, err, KindRegistration, "registering as a client at its authorization server "+g.site.URL+" failed", "auth.clientId")
				if strings.Contains(err.Error(), canary) {
					t.Errorf("%v quotes the answer", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if reg.ClientID != "id" || reg.AuthMethod != test.method || reg.ClientSecret.Value() != test.secret || !reg.Expires.IsZero() {
				t.Errorf("%+v", reg)
			}
			// What is stored is what was registered.
			if again := g.must(t); again.ClientSecret.Value() != test.secret || again.AuthMethod != test.method || g.posts.Load() != 1 {
				t.Errorf("from the store: %+v after %d posts", again, g.posts.Load())
			}
		})
	}
}

func TestRegistrationIsKept(t *testing.T) {
	g := newRegistry(t, nil)
	g.answer(201, `{"client_id": "one"}`)
	g.must(t)
	g.answer(201, `{"client_id": "two"}`)
	if reg := g.must(t); reg.ClientID != "one" {
		t.Errorf("registered again: %+v", reg)
	}

	// Another issuer or redirect URI is another client.
	other := *g.found
	other.Issuer += "/tenant"
	if reg, err := g.register(t.Context(), g.remote, &other, nil); err != nil || reg.ClientID != "two" {
		t.Errorf("another issuer: %+v, %v", reg, err)
	}
	second := *g.remote
	second.Name = "mail"
	if reg, err := g.register(t.Context(), &second, g.found, nil); err != nil || reg.ClientID != "two" {
		t.Errorf("another redirect URI: %+v, %v", reg, err)
	}

	// What was disowned is registered anew; what replaced it is not dropped.
	old := g.must(t)
	g.invalidate(t.Context(), old)
	if reg := g.must(t); reg.ClientID != "two" {
		t.Errorf("after invalidate: %+v", reg)
	}
	g.answer(201, `{"client_id": "three"}`)
	g.invalidate(t.Context(), old)
	if reg := g.must(t); reg.ClientID != "two" {
		t.Errorf("a late invalidate dropped the new one: %+v", reg)
	}
}

func TestRegistrationExpires(t *testing.T) {
	g := newRegistry(t, nil)
	end := g.clock.Add(time.Hour)
	g.answer(201, fmt.Sprintf(`{"client_id": "one", "client_secret": "s", "client_secret_expires_at": %d}`, end.Unix()))
	if reg := g.must(t); !reg.Expires.Equal(end) {
		t.Errorf("expires %v, want %v", reg.Expires, end)
	}
	g.answer(200, `{"client_id": "two"}`)
	g.clock = end.Add(-time.Second)
	if reg := g.must(t); reg.ClientID != "one" {
		t.Errorf("dropped early: %+v", reg)
	}
	g.clock = end
	if reg := g.must(t); reg.ClientID != "two" {
		t.Errorf("used beyond its secret's life: %+v", reg)
	}
}

func TestOneRegistrationForMany(t *testing.T) {
	g := newRegistry(t, nil)
	arrived, release := make(chan struct{}, 50), make(chan struct{})
	g.site.handle("/register", func(w http.ResponseWriter, _ *http.Request) {
		g.posts.Add(1)
		arrived <- struct{}{}
		<-release
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(201)
		io.WriteString(w, `{"client_id": "one"}`)
	})
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			if reg, err := g.get(t); err != nil || reg.ClientID != "one" {
				t.Errorf("%+v, %v", reg, err)
			}
		})
	}
	// Whoever waits does so under their own context.
	<-arrived
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := g.register(ctx, g.remote, g.found, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("a caller who left: %v", err)
	}
	close(release)
	wg.Wait()
	if n := g.posts.Load(); n != 1 {
		t.Errorf("%d registrations, want 1", n)
	}
	if len(g.attempts) != 0 {
		t.Errorf("%d attempts are remembered", len(g.attempts))
	}
}

func TestRegistrationBackOff(t *testing.T) {
	for _, test := range []struct {
		name   string
		status int
		header []string
		kind   Kind
		waits  []time.Duration
	}{
		{"429", 429, nil, KindUnavailable, []time.Duration{30 * time.Second, time.Minute, 2 * time.Minute, 4 * time.Minute, 8 * time.Minute, 10 * time.Minute, 10 * time.Minute}},
		{"500", 500, nil, KindUnavailable, []time.Duration{30 * time.Second, time.Minute}},
		{"403", 403, nil, KindRegistration, []time.Duration{30 * time.Second, time.Minute}},
		{"307", 307, []string{"Location", "/elsewhere"}, KindRegistration, []time.Duration{30 * time.Second}},
		{"Retry-After", 429, []string{"Retry-After", "300"}, KindUnavailable, []time.Duration{300 * time.Second, 300 * time.Second}},
		{"Retry-After, a date", 503, []string{"Retry-After", time.Unix(1e9, 0).Add(5 * time.Minute).UTC().Format(http.TimeFormat)}, KindUnavailable, []time.Duration{5 * time.Minute}},
		{"Retry-After for ever", 429, []string{"Retry-After", "99999999"}, KindUnavailable, []time.Duration{endpoint.MaxRetryAfter}},
		{"Retry-After, nonsense", 429, []string{"Retry-After", "-1; soon"}, KindUnavailable, []time.Duration{30 * time.Second}},
	} {
		t.Run(test.name, func(t *testing.T) {
			g := newRegistry(t, nil)
			g.answer(test.status, `{"error": "canary", "error_description": "canary"}`, test.header...)
			g.site.handle("/elsewhere", func(http.ResponseWriter, *http.Request) { t.Error("the redirect of a POST was followed") })
			_, first := g.get(t)
			saying(t, first, test.kind, fmt.Sprintf("was answered with status %d", test.status), "auth.clientId")
			if strings.Contains(first.Error(), "canary") {
				t.Errorf("%v quotes the answer", first)
			}
			for i, wait := range test.waits {
				g.clock = g.clock.Add(wait - time.Second)
				_, again := g.get(t)
				if again == nil || again.Error() != first.Error() {
					t.Errorf("while waiting: %v, want %v", again, first)
				}
				if n := g.posts.Load(); n != int64(i+1) {
					t.Fatalf("%d posts %v after failure %d", n, wait-time.Second, i+1)
				}
				g.clock = g.clock.Add(time.Second)
				g.get(t)
				if n := g.posts.Load(); n != int64(i+2) {
					t.Fatalf("%d posts %v after failure %d", n, wait, i+1)
				}
			}
			g.clock = g.clock.Add(endpoint.MaxRetryAfter)
			g.answer(201, `{"client_id": "id"}`)
			g.must(t)
			if len(g.attempts) != 0 {
				t.Errorf("%d attempts are remembered", len(g.attempts))
			}
		})
	}
}

func TestFailedAttemptsAreForgotten(t *testing.T) {
	g := newRegistry(t, nil)
	g.answer(500, ``)
	for i := range 20 {
		d := *g.found
		d.Issuer = fmt.Sprintf("%s/%d", g.site.URL, i)
		if _, err := g.register(t.Context(), g.remote, &d, nil); err == nil {
			t.Fatal("no error")
		}
	}
	g.clock = g.clock.Add(2*endpoint.MaxRetryAfter + maxRegistrationWait)
	g.answer(201, `{"client_id": "id"}`)
	g.must(t)
	if n := len(g.attempts); n != 0 {
		t.Errorf("%d attempts are remembered", n)
	}
}

func TestRegistrationEndpointOnPrivateHost(t *testing.T) {
	g := newRegistry(t, nil)
	for _, at := range []string{"https://10.0.0.1/register", "http://192.168.0.1/", "https://169.254.169.254/", "javascript:x"} {
		g.clock = g.clock.Add(2 * endpoint.MaxRetryAfter)
		g.found.RegistrationEndpoint = at
		_, err := g.get(t)
		saying(t, err, KindRegistration, "leads to an address that the gateway may not reach", "allowAddresses")
		if !errors.Is(err, guard.ErrBlocked) {
			t.Errorf("%s: %v", at, err)
		}
	}
}

// TestRemoteWithAKey: a remote that answers 401 and publishes nothing is more
// likely to want a key than a client that was registered by hand.
func TestRemoteWithAKey(t *testing.T) {
	g := newRegistry(t, nil)
	g.answer(401, "")
	g.found.NoPKCEMetadata = true
	_, err := g.get(t)
	saying(t, err, KindRegistration, "headers.Authorization", "auth.issuer and auth.clientId")
	if strings.Contains(err.Error(), "by hand") {
		t.Errorf("it sends people to a registration that there is not: %v", err)
	}
}

func TestRegistrationShowsNoSecret(t *testing.T) {
	var log bytes.Buffer
	const canary = "canary-secret"
	g := newRegistry(t, func(c *Config) {
		c.Log = slog.New(slog.NewJSONHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	})
	g.answer(201, `{"client_id": "id", "client_secret": "`+canary+`", "token_endpoint_auth_method": "client_secret_basic"}`)
	var steps []Step
	reg, err := g.register(t.Context(), g.remote, g.found, func(s Step) { steps = append(steps, s) })
	if err != nil {
		t.Fatal(err)
	}
	encoded, _ := json.Marshal(reg)
	if text := fmt.Sprintf("%s %+v %#v %v %s", log.String(), reg, *reg, steps, encoded); strings.Contains(text, canary) {
		t.Errorf("the secret is shown: %s", text)
	}
	if log.Len() == 0 || len(steps) != 1 || !steps[0].OK {
		t.Errorf("log %q, steps %+v", log.String(), steps)
	}
}
