package authtest

import (
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"gatehouse/demo"
)

// OPConfig says how an [OP] is started.
type OPConfig struct {
	Users     []demo.Account // nil: alice and bob, whose passwords are their names
	Scopes    []string       // beside OpenID Connect's; nil: read and write
	TokenLife time.Duration  // 0 is 10 minutes
	Opaque    bool           // access tokens that are no JWTs
	Addr      string         // to listen on; "" is any port of 127.0.0.1
}

// OPKnobs put something in front of an [OP].
type OPKnobs struct {
	Metadata, Register, Authorize, Token, Revoke Intercept
}

// OP is a real OpenID provider, zitadel's op, as gatehouse/demo has it: a login
// form, dynamic registration, `resource` and `iss`, rotating refresh tokens.
// Like every op it goes by the true clock.
type OP struct {
	recorder
	URL          string // its issuer, too
	provider     *demo.Provider
	client       string // for introspection
	clientSecret string

	mu    sync.Mutex // guards knobs
	knobs OPKnobs
}

// opKey signs the tokens of all providers here: making one takes a while.
var opKey = sync.OnceValues(func() (*rsa.PrivateKey, error) { return rsa.GenerateKey(rand.Reader, 2048) })

// NewOP starts a provider on loopback, until the test ends.
func NewOP(t testing.TB, cfg OPConfig) *OP {
	t.Helper()
	if cfg.Users == nil {
		cfg.Users = []demo.Account{
			{Name: "alice", Password: "alice", FullName: "Alice Example", Email: "alice@example.com"},
			{Name: "bob", Password: "bob", FullName: "Bob Example", Email: "bob@example.com"},
		}
	}
	if cfg.Scopes == nil {
		cfg.Scopes = []string{"read", "write"}
	}
	key, err := opKey()
	if err != nil {
		t.Fatal(err)
	}
	o := new(OP)
	// The issuer has to be known before there is a provider to serve.
	server, _ := startServer(t, http.HandlerFunc(o.serve), cfg.Addr, false)
	o.URL = server.URL
	o.provider, err = demo.NewProvider(demo.ProviderConfig{
		Issuer: o.URL, Users: cfg.Users, Scopes: cfg.Scopes, Key: key, TokenLife: cfg.TokenLife, Opaque: cfg.Opaque,
	})
	if err != nil {
		t.Fatal(err)
	}
	// Whoever asks about tokens is a client; this one is in no count.
	req := httptest.NewRequest(http.MethodPost, o.URL+"/register", strings.NewReader(
		`{"client_name":"authtest","redirect_uris":["http://127.0.0.1/"],"token_endpoint_auth_method":"client_secret_basic"}`))
	answer := httptest.NewRecorder()
	o.provider.ServeHTTP(answer, req)
	var registered struct {
		ID     string `json:"client_id"`
		Secret string `json:"client_secret"`
	}
	if err := json.Unmarshal(answer.Body.Bytes(), &registered); err != nil || registered.Secret == "" {
		t.Fatalf("authtest: registering at the provider: %d %s", answer.Code, answer.Body)
	}
	o.client, o.clientSecret = registered.ID, registered.Secret
	return o
}

// Set changes knobs.
func (o *OP) Set(change func(*OPKnobs)) {
	o.mu.Lock()
	defer o.mu.Unlock()
	change(&o.knobs)
}

// Issuer returns the issuer.
func (o *OP) Issuer() string { return o.URL }

// Valid asks the provider whether an access token is good (RFC 7662).
func (o *OP) Valid(token string) (TokenInfo, bool) {
	if token == "" {
		return TokenInfo{}, false
	}
	req := httptest.NewRequest(http.MethodPost, o.URL+"/oauth/introspect",
		strings.NewReader(url.Values{"token": {token}}.Encode()))
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	req.SetBasicAuth(o.client, o.clientSecret)
	answer := httptest.NewRecorder()
	o.provider.ServeHTTP(answer, req)
	var info struct {
		Active   bool     `json:"active"`
		Subject  string   `json:"sub"`
		ClientID string   `json:"client_id"`
		Audience []string `json:"aud"`
		Scope    string   `json:"scope"`
		Expires  int64    `json:"exp"`
	}
	if json.Unmarshal(answer.Body.Bytes(), &info) != nil || !info.Active || len(info.Audience) == 0 {
		return TokenInfo{}, false
	}
	return TokenInfo{
		Subject: info.Subject, ClientID: info.ClientID, Audience: info.Audience[0],
		Scopes: strings.Fields(info.Scope), Expires: time.Unix(info.Expires, 0),
	}, true
}

// RevokeAll ends every token, refresh tokens included.
func (o *OP) RevokeAll() { o.provider.SignOutEverybody() }

// ExpireAll ends every access token; refresh tokens stay good.
func (o *OP) ExpireAll() { o.provider.EndAccessTokens() }

func (o *OP) serve(w http.ResponseWriter, r *http.Request) {
	endpoint := EndpointOther
	o.mu.Lock()
	k := o.knobs
	o.mu.Unlock()
	var intercept Intercept
	switch r.URL.Path {
	case "/.well-known/openid-configuration", "/.well-known/oauth-authorization-server":
		endpoint, intercept = EndpointMetadata, k.Metadata
	case "/register":
		endpoint, intercept = EndpointRegister, k.Register
	case "/authorize":
		endpoint, intercept = EndpointAuthorize, k.Authorize
	case "/oauth/token":
		endpoint, intercept = EndpointToken, k.Token
	case "/revoke":
		endpoint, intercept = EndpointRevoke, k.Revoke
	}
	got := o.record(endpoint, r)
	o.secret(got.Query.Get("state"), got.Form.Get("code"), got.Form.Get("code_verifier"))
	intercept.serve(w, r, func(w http.ResponseWriter, r *http.Request) {
		if endpoint != EndpointRegister && endpoint != EndpointToken {
			o.provider.ServeHTTP(w, r)
			return
		}
		status, body := record(w, r, o.provider.ServeHTTP)
		var issued struct {
			Access  string `json:"access_token"`
			Refresh string `json:"refresh_token"`
			ID      string `json:"id_token"`
			Secret  string `json:"client_secret"`
		}
		if json.Unmarshal(body, &issued) == nil {
			o.secret(issued.Access, issued.Refresh, issued.ID, issued.Secret)
		}
		w.WriteHeader(status)
		w.Write(body)
	})
}
