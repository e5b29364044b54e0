package demo

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/zitadel/oidc/v3/pkg/oidc"
	"github.com/zitadel/oidc/v3/pkg/op"
)

// ProviderConfig says what a [Provider] is.
type ProviderConfig struct {
	// Issuer is where the provider is served, without a path: required. It may
	// be http.
	Issuer string
	// Users may sign in; at least one.
	Users []Account
	// Scopes beside those of OpenID Connect that clients may have.
	Scopes []string
	// Key signs tokens; nil makes one.
	Key *rsa.PrivateKey
	// TokenLife is how long access tokens live; 0 is 10 minutes.
	TokenLife time.Duration
	// Opaque makes access tokens that say nothing, instead of JWTs.
	Opaque bool
	// Hint makes the login page say the first user's password.
	Hint bool
	// Log; nil is none.
	Log *slog.Logger
}

// Account is somebody who can sign in. Name is the subject of the tokens, too.
type Account struct {
	Name, Password, FullName, Email string
}

// Provider is an identity provider that keeps everything in memory. It is an
// http.Handler, to be served at the root of its issuer.
type Provider struct {
	issuer  string
	hint    bool
	log     *slog.Logger
	storage *storage
	op      *op.Provider
	mux     *http.ServeMux
}

// NewProvider makes a provider. It starts nothing and needs no Close.
func NewProvider(cfg ProviderConfig) (*Provider, error) {
	at, err := url.Parse(cfg.Issuer)
	switch {
	case err != nil:
		return nil, fmt.Errorf("reading the provider's issuer: %w", err)
	case at.Host == "" || at.Path != "" || at.Scheme != "http" && at.Scheme != "https":
		return nil, fmt.Errorf("the provider's issuer %q is not of the form http://host:port", cfg.Issuer)
	case len(cfg.Users) == 0:
		return nil, errors.New("the provider has no users")
	}
	if cfg.Key == nil {
		if cfg.Key, err = rsa.GenerateKey(rand.Reader, 2048); err != nil {
			return nil, fmt.Errorf("making the provider's key: %w", err)
		}
	}
	if cfg.TokenLife == 0 {
		cfg.TokenLife = 10 * time.Minute
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	p := &Provider{issuer: cfg.Issuer, hint: cfg.Hint, log: cfg.Log, storage: newStorage(cfg)}
	settings := &op.Config{
		CodeMethodS256:        true,
		AuthMethodPost:        true,
		GrantTypeRefreshToken: true,
		SupportedScopes: append([]string{
			oidc.ScopeOpenID, oidc.ScopeProfile, oidc.ScopeEmail, oidc.ScopeOfflineAccess,
		}, cfg.Scopes...),
		SupportedClaims: []string{"sub", "aud", "exp", "iat", "iss", "auth_time", "name", "preferred_username", "email", "email_verified"},
	}
	rand.Read(settings.CryptoKey[:])
	options := []op.Option{op.WithCORSOptions(nil)}
	if at.Scheme == "http" {
		options = append(options, op.WithAllowInsecure())
	}
	if p.op, err = op.NewProvider(settings, p.storage, op.StaticIssuer(cfg.Issuer), options...); err != nil {
		return nil, fmt.Errorf("making the provider: %w", err)
	}
	metadata, err := p.metadata()
	if err != nil {
		return nil, err
	}
	p.mux = http.NewServeMux()
	for _, place := range []string{"/.well-known/openid-configuration", "/.well-known/oauth-authorization-server"} {
		p.mux.HandleFunc("GET "+place, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			w.Write(metadata)
		})
	}
	p.mux.HandleFunc("POST /register", p.register)
	p.mux.HandleFunc("/authorize", p.authorize)
	p.mux.HandleFunc("GET /authorize/callback", p.callback)
	p.mux.HandleFunc("GET /login", p.loginPage)
	p.mux.HandleFunc("POST /login", p.login)
	p.mux.HandleFunc("POST /oauth/token", p.token)
	for _, route := range []string{"GET /keys", "/userinfo", "POST /oauth/introspect", "POST /revoke"} {
		p.mux.Handle(route, p.op)
	}
	return p, nil
}

// maxBody is the most that a request to the provider may hold.
const maxBody = 64 << 10

// ServeHTTP serves the provider.
func (p *Provider) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	r.Body = http.MaxBytesReader(w, r.Body, maxBody)
	p.mux.ServeHTTP(w, r)
}

// SignOutEverybody ends all tokens that were issued.
func (p *Provider) SignOutEverybody() { p.storage.endAll(true) }

// EndAccessTokens ends all access tokens; refresh tokens stay good. Whoever
// checks a JWT by its signature alone will not notice.
func (p *Provider) EndAccessTokens() { p.storage.endAll(false) }

// metadata is op's discovery document, without what is not there and with what
// was added.
func (p *Provider) metadata() ([]byte, error) {
	doc := op.CreateDiscoveryConfig(op.ContextWithIssuer(context.Background(), p.issuer), p.op, p.storage)
	doc.RegistrationEndpoint = p.issuer + "/register"
	doc.ResponseTypesSupported = []string{string(oidc.ResponseTypeCode)}
	doc.ResponseModesSupported = []string{string(oidc.ResponseModeQuery)}
	doc.GrantTypesSupported = []oidc.GrantType{oidc.GrantTypeCode, oidc.GrantTypeRefreshToken}
	doc.DeviceAuthorizationEndpoint, doc.EndSessionEndpoint = "", ""
	data, err := json.Marshal(struct {
		*oidc.DiscoveryConfiguration
		Iss bool `json:"authorization_response_iss_parameter_supported"`
	}{doc, true})
	if err != nil {
		return nil, fmt.Errorf("writing the provider's metadata: %w", err)
	}
	return data, nil
}

// asked is what op is not told of a request: the `resource` parameters, which
// it knows nothing of, and the state, which it would log with its errors.
type asked struct {
	resources []string
	state     string
}

type askedKey struct{}

func withAsked(r *http.Request, a asked) *http.Request {
	return r.WithContext(context.WithValue(r.Context(), askedKey{}, a))
}

func askedOf(ctx context.Context) asked {
	a, _ := ctx.Value(askedKey{}).(asked)
	return a
}

// authorize is op's authorization endpoint for clients of plain OAuth, too.
func (p *Provider) authorize(w http.ResponseWriter, r *http.Request) {
	if err := r.ParseForm(); err != nil {
		p.page(w, http.StatusBadRequest, loginView{Problem: "That request cannot be read."})
		return
	}
	// RFC 6749, section 3.3: "If the client omits the scope parameter ... the
	// authorization server MUST either process the request using a pre-defined
	// default value or fail". op fails.
	if len(strings.Fields(r.Form.Get("scope"))) == 0 {
		r.Form.Set("scope", oidc.ScopeOpenID)
	}
	a := asked{r.Form["resource"], r.Form.Get("state")}
	r.Form.Del("state")
	p.op.ServeHTTP(&answer{w, p.issuer, a.state}, withAsked(r, a))
}

// callback goes back to the client after the sign-in.
func (p *Provider) callback(w http.ResponseWriter, r *http.Request) {
	request, _, ok := p.storage.pending(r.URL.Query().Get("id"))
	if !ok || !request.Done() {
		p.page(w, http.StatusBadRequest, loginView{Problem: goneSay})
		return
	}
	p.op.ServeHTTP(&answer{w, p.issuer, request.state}, r)
}

// token is op's token endpoint with the `resource` parameter.
func (p *Provider) token(w http.ResponseWriter, r *http.Request) {
	// RFC 6749, section 5.1: "The authorization server MUST include the HTTP
	// "Cache-Control" response header field with a value of "no-store"".
	w.Header().Set("Cache-Control", "no-store")
	if err := r.ParseForm(); err != nil {
		writeJSON(w, http.StatusBadRequest, oidc.ErrInvalidRequest())
		return
	}
	if r.Form = r.PostForm; slices.Contains([]string{string(oidc.GrantTypeCode), string(oidc.GrantTypeRefreshToken)}, r.Form.Get("grant_type")) {
		p.op.ServeHTTP(w, withAsked(r, asked{resources: r.Form["resource"]}))
		return
	}
	writeJSON(w, http.StatusBadRequest, oidc.ErrUnsupportedGrantType())
}

// answer adds to what goes back to a client the state that op was not told,
// and the issuer.
//
// RFC 9207, section 2: "In authorization responses to the client, including
// error responses, an authorization server supporting this specification MUST
// indicate its identity by including the iss parameter in the response."
type answer struct {
	http.ResponseWriter
	issuer, state string
}

func (a *answer) WriteHeader(status int) {
	to, err := url.Parse(a.Header().Get("Location"))
	if err == nil && to.IsAbs() && !strings.HasPrefix(to.String(), a.issuer+"/") {
		add := url.Values{"iss": {a.issuer}}
		if a.state != "" {
			add.Set("state", a.state)
		}
		if to.RawQuery != "" {
			to.RawQuery += "&"
		}
		to.RawQuery += add.Encode()
		a.Header().Set("Location", to.String())
	}
	a.ResponseWriter.WriteHeader(status)
}

func writeJSON(w http.ResponseWriter, status int, doc any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(doc) // a client that left is no error
}
