package authtest

import (
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// TokenInfo is what an authorization server knows of an access token.
type TokenInfo struct {
	Subject  string
	ClientID string
	Audience string   // the resource that it was issued for
	Also     []string // beside Audience
	Scopes   []string
	Expires  time.Time // zero: never
}

// Authority is what a [Remote] trusts: an [AS] or an [OP].
type Authority interface {
	Issuer() string
	Valid(token string) (TokenInfo, bool)
}

// ASConfig says how an [AS] is started.
type ASConfig struct {
	Path string // of the issuer, "/tenant" for example; "" is an issuer without one
	TLS  bool   // https, by the certificate in CA
	Addr string // to listen on; "" is any port of 127.0.0.1
}

// WellKnown is a place where authorization server metadata may be.
type WellKnown int

// The places, as the MCP specification lists them.
const (
	RFC8414       WellKnown = iota // /.well-known/oauth-authorization-server/path
	OIDCInsertion                  // /.well-known/openid-configuration/path
	OIDCAppending                  // /path/.well-known/openid-configuration
)

// IssMode is what happens to the `iss` parameter of RFC 9207.
type IssMode int

// Ways to send it.
const (
	IssRight      IssMode = iota // advertised and sent
	IssNone                      // neither
	IssUnasked                   // sent, though not advertised
	IssMissing                   // advertised, not sent
	IssWrong                     // another issuer's
	IssNormalised                // the same after normalisation only
)

// ASKnobs are the ways an [AS] misbehaves; the zero value behaves.
type ASKnobs struct {
	User string           // who approves; "" is "alice"
	Now  func() time.Time // nil is time.Now

	// Metadata.
	Issuer         string         // in the document, instead of the true one
	WellKnown      []WellKnown    // which places answer; nil is RFC8414 alone
	NoMetadata     bool           // none does
	NoS256         bool           // code_challenge_methods_supported is absent
	NoRegistration bool           // registration_endpoint is absent, and so is the endpoint
	NoRevocation   bool           // revocation_endpoint is absent, and so is the endpoint
	CIMD           bool           // client_id_metadata_document_supported, and documents are fetched
	AuthMethods    []string       // token_endpoint_auth_methods_supported; nil is none, basic, post; empty: absent
	ScopesListed   []string       // scopes_supported; nil: absent
	Document       map[string]any // members to set; a nil value removes the member

	// CIMD: how documents are fetched; nil is http.DefaultClient.
	Fetch *http.Client

	// Registration.
	SecretLife time.Duration // client_secret_expires_at; 0 is never

	// Authorization endpoint.
	Deny            string // the error to answer with, instead of approving
	PromptNeeded    string // the error to answer prompt=none with
	DenyDescription string // error_description
	Iss             IssMode

	// Token endpoint.
	TokenLife  time.Duration                 // 0 is an hour
	NoExpiry   bool                          // expires_in is absent
	NoRefresh  bool                          // no refresh tokens
	NoRotation bool                          // a refresh token stays, and is not repeated in the answer
	Grant      func(asked []string) []string // scopes granted; nil: as asked
	IDToken    map[string]any                // claims of an id_token beside iss, sub, aud, exp; nil: none
	Dex        bool                          // token exchange in Dex's dialect
	JWT        bool                          // exchanged access tokens are JWTs of the server's issuer
	Claims     map[string]any                // of exchanged JWTs; a nil value removes the claim
	Audiences  []string                      // access tokens are JWTs for all of these

	// In front of the endpoints.
	Metadata, Register, Authorize, Token, Revoke, Keys, Introspect Intercept
}

// OAuthClient is a client registered at an [AS].
type OAuthClient struct {
	ID           string
	Secret       string
	Method       string // none, client_secret_basic, client_secret_post, private_key_jwt
	RedirectURIs []string
	Expires      time.Time        // of the secret; zero is never
	Key          crypto.PublicKey // for private_key_jwt

	Metadata map[string]any // as it was registered
}

// AS is an authorization server that misbehaves on command. It approves
// without asking. Its tokens are opaque and begin with canary-, as do its
// codes and its clients' secrets.
type AS struct {
	recorder
	URL    string // where it listens, without a trailing slash
	CA     []byte // with TLS: the certificate to trust, PEM
	server *httptest.Server
	path   string

	mu      sync.Mutex // guards what follows
	base    string     // URL, or the origin it is mounted at
	knobs   ASKnobs
	clients map[string]OAuthClient
	codes   map[string]*asCode
	access  map[string]*asToken
	refresh map[string]*asRefresh
	jtis    map[string]bool // of the assertions that were seen
	reuses  int
}

// asGrant is one approval; it lives in all the tokens that came of it.
type asGrant struct {
	client, subject, resource string
	nonce                     string // of the authentication request
	scopes                    []string
	revoked                   bool
}

type asCode struct {
	*asGrant
	redirectURI, challenge string
	expires                time.Time
	used                   bool
}

type asToken struct {
	*asGrant
	scopes  []string
	expires time.Time
	also    []string // audiences beside the resource
}

type asRefresh struct {
	*asGrant
	used bool
}

// NewAS starts an authorization server on loopback, until the test ends.
func NewAS(t testing.TB) *AS { return StartAS(t, ASConfig{}) }

// StartAS is [NewAS] with a choice.
func StartAS(t testing.TB, cfg ASConfig) *AS {
	t.Helper()
	a := &AS{
		path:    cfg.Path,
		clients: make(map[string]OAuthClient),
		codes:   make(map[string]*asCode),
		access:  make(map[string]*asToken),
		refresh: make(map[string]*asRefresh),
		jtis:    make(map[string]bool),
	}
	a.server, a.CA = startServer(t, http.HandlerFunc(a.ServeHTTP), cfg.Addr, cfg.TLS)
	a.URL = a.server.URL
	a.base = a.URL
	return a
}

// Set changes knobs.
func (a *AS) Set(change func(*ASKnobs)) {
	a.mu.Lock()
	defer a.mu.Unlock()
	change(&a.knobs)
}

// Issuer returns the true issuer.
func (a *AS) Issuer() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.base + a.path
}

// AddClient registers a client by hand.
func (a *AS) AddClient(c OAuthClient) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.clients[c.ID] = c
	a.secret(c.Secret)
}

// RemoveClient forgets a client: from now on it is an invalid_client.
func (a *AS) RemoveClient(id string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.clients, id)
}

// Clients returns the registered clients.
func (a *AS) Clients() []OAuthClient {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Collect(maps.Values(a.clients))
}

// Valid says whether an access token is good, and what it is.
func (a *AS) Valid(token string) (TokenInfo, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	t, ok := a.access[token]
	if claims, is := ownJWT(token); !ok && is && claims["exp"] != nil {
		// An ID token, which somebody forwards.
		exp, _ := claims["exp"].(float64)
		audience, _ := claims["aud"].(string)
		subject, _ := claims["sub"].(string)
		expires := time.Unix(int64(exp), 0)
		return TokenInfo{Subject: subject, Audience: audience, Expires: expires}, claims["iss"] == a.base+a.path && a.nowLocked().Before(expires)
	}
	if !ok || t.revoked || !t.expires.IsZero() && !a.nowLocked().Before(t.expires) {
		return TokenInfo{}, false
	}
	return TokenInfo{
		Subject: t.subject, ClientID: t.client, Audience: t.resource, Also: t.also, Scopes: t.scopes, Expires: t.expires,
	}, true
}

// Mint issues an access token without any of the steps before it.
func (a *AS) Mint(subject, resource string, scopes ...string) string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.mintLocked(&asGrant{client: "minted", subject: subject, resource: resource}, scopes)
}

// JWTFor issues a JWT access token of the server's, with these claims instead of
// its own; a nil value removes one.
func (a *AS) JWTFor(subject, audience string, claims map[string]any) string {
	return a.SignedJWT(subject, audience, "at+jwt", claims)
}

// SignedJWT is JWTFor with any typ.
func (a *AS) SignedJWT(subject, audience, typ string, claims map[string]any) string {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := a.nowLocked()
	all := map[string]any{
		"iss": a.base + a.path, "sub": subject, "aud": audience, "client_id": "a-client", "jti": rand.Text(),
		"iat": now.Unix(), "exp": now.Add(time.Hour).Unix(),
	}
	override(all, claims)
	token := signJWT(all, typ)
	a.secret(token)
	return token
}

// IDTokenFor issues an ID token without any of the steps before it.
func (a *AS) IDTokenFor(subject, audience string) string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.idTokenLocked(&asGrant{client: audience, subject: subject})
}

// RevokeAll revokes every token, refresh tokens included.
func (a *AS) RevokeAll() {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, t := range a.access {
		t.revoked = true
	}
	for _, t := range a.refresh {
		t.revoked = true
	}
}

// ExpireAll ends every access token; refresh tokens stay good.
func (a *AS) ExpireAll() {
	a.mu.Lock()
	defer a.mu.Unlock()
	clear(a.access)
}

// Reuses returns how often a refresh token or a code came a second time.
func (a *AS) Reuses() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.reuses
}

// Live returns how many access tokens and refresh tokens are good.
func (a *AS) Live() (access, refresh int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := a.nowLocked()
	for _, t := range a.access {
		if !t.revoked && (t.expires.IsZero() || now.Before(t.expires)) {
			access++
		}
	}
	for _, t := range a.refresh {
		if !t.revoked && !t.used {
			refresh++
		}
	}
	return access, refresh
}

func (a *AS) nowLocked() time.Time {
	if a.knobs.Now != nil {
		return a.knobs.Now()
	}
	return time.Now()
}

// mount makes the server think that it is at another origin.
func (a *AS) mount(origin string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.base = origin
}

// owns says whether a path is one of the server's.
func (a *AS) owns(path string) bool { return a.endpoint(path) != EndpointOther }

func (a *AS) endpoint(path string) string {
	switch path {
	case "/.well-known/oauth-authorization-server" + a.path, "/.well-known/openid-configuration" + a.path,
		a.path + "/.well-known/openid-configuration":
		return EndpointMetadata
	case a.path + "/register":
		return EndpointRegister
	case a.path + "/authorize":
		return EndpointAuthorize
	case a.path + "/token":
		return EndpointToken
	case a.path + "/revoke":
		return EndpointRevoke
	case a.path + "/keys":
		return EndpointKeys
	case a.path + "/introspect":
		return EndpointIntrospect
	}
	return EndpointOther
}

// ServeHTTP serves everything that the server has.
func (a *AS) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	endpoint := a.endpoint(r.URL.Path)
	a.record(endpoint, r)
	a.mu.Lock()
	k := a.knobs
	a.mu.Unlock()
	switch endpoint {
	case EndpointMetadata:
		k.Metadata.serve(w, r, a.serveMetadata)
	case EndpointRegister:
		k.Register.serve(w, r, a.serveRegister)
	case EndpointAuthorize:
		a.secret(r.URL.Query().Get("state"))
		k.Authorize.serve(w, r, a.serveAuthorize)
	case EndpointToken:
		k.Token.serve(w, r, a.serveToken)
	case EndpointRevoke:
		k.Revoke.serve(w, r, a.serveRevoke)
	case EndpointKeys:
		k.Keys.serve(w, r, serveKeys)
	case EndpointIntrospect:
		k.Introspect.serve(w, r, a.serveIntrospect)
	default:
		http.NotFound(w, r)
	}
}

func (a *AS) serveMetadata(w http.ResponseWriter, r *http.Request) {
	a.mu.Lock()
	k, base := a.knobs, a.base+a.path
	a.mu.Unlock()
	places := k.WellKnown
	if places == nil {
		places = []WellKnown{RFC8414}
	}
	var paths []string
	for _, place := range places {
		switch place {
		case RFC8414:
			paths = append(paths, "/.well-known/oauth-authorization-server"+a.path)
		case OIDCInsertion:
			paths = append(paths, "/.well-known/openid-configuration"+a.path)
		case OIDCAppending:
			paths = append(paths, a.path+"/.well-known/openid-configuration")
		}
	}
	if k.NoMetadata || !slices.Contains(paths, r.URL.Path) {
		http.NotFound(w, r)
		return
	}
	methods := k.AuthMethods
	if methods == nil {
		methods = []string{"none", "client_secret_basic", "client_secret_post"}
	}
	doc := map[string]any{
		"issuer":                                base,
		"authorization_endpoint":                base + "/authorize",
		"token_endpoint":                        base + "/token",
		"registration_endpoint":                 base + "/register",
		"revocation_endpoint":                   base + "/revoke",
		"introspection_endpoint":                base + "/introspect",
		"jwks_uri":                              base + "/keys",
		"response_types_supported":              []string{"code"},
		"grant_types_supported":                 []string{"authorization_code", "refresh_token"},
		"code_challenge_methods_supported":      []string{"S256"},
		"token_endpoint_auth_methods_supported": methods,
	}
	if k.Issuer != "" {
		doc["issuer"] = k.Issuer
	}
	if len(methods) == 0 {
		delete(doc, "token_endpoint_auth_methods_supported")
	}
	if k.NoS256 {
		delete(doc, "code_challenge_methods_supported")
	}
	if k.NoRegistration {
		delete(doc, "registration_endpoint")
	}
	if k.NoRevocation {
		delete(doc, "revocation_endpoint")
	}
	if k.CIMD {
		doc["client_id_metadata_document_supported"] = true
	}
	if k.ScopesListed != nil {
		doc["scopes_supported"] = k.ScopesListed
	}
	if k.Iss != IssNone && k.Iss != IssUnasked {
		doc["authorization_response_iss_parameter_supported"] = true
	}
	override(doc, k.Document)
	writeJSON(w, http.StatusOK, doc)
}

// override sets members; nil values remove them.
func override(doc, members map[string]any) {
	for name, value := range members {
		if value == nil {
			delete(doc, name)
		} else {
			doc[name] = value
		}
	}
}

func (a *AS) serveRegister(w http.ResponseWriter, r *http.Request) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.knobs.NoRegistration {
		http.NotFound(w, r)
		return
	}
	var asked struct {
		RedirectURIs []string `json:"redirect_uris"`
		Method       *string  `json:"token_endpoint_auth_method"`
	}
	var all map[string]any
	body := json.NewDecoder(r.Body)
	var raw json.RawMessage
	if r.Method != http.MethodPost || body.Decode(&raw) != nil ||
		json.Unmarshal(raw, &asked) != nil || json.Unmarshal(raw, &all) != nil {
		oauthError(w, http.StatusBadRequest, "invalid_client_metadata", "not the JSON of a registration")
		return
	}
	if len(asked.RedirectURIs) == 0 {
		oauthError(w, http.StatusBadRequest, "invalid_redirect_uri", "redirect_uris is missing")
		return
	}
	// RFC 7591, section 2: "If unspecified or omitted, the default is
	// "client_secret_basic"".
	c := OAuthClient{ID: "client-" + rand.Text(), Method: "client_secret_basic", RedirectURIs: asked.RedirectURIs, Metadata: all}
	if asked.Method != nil {
		c.Method = *asked.Method
	}
	answer := maps.Clone(all)
	answer["client_id"] = c.ID
	answer["token_endpoint_auth_method"] = c.Method
	if c.Method != "none" {
		c.Secret = "canary-cs-" + rand.Text()
		a.secret(c.Secret)
		answer["client_secret"] = c.Secret
		answer["client_secret_expires_at"] = 0
		if a.knobs.SecretLife != 0 {
			c.Expires = a.nowLocked().Add(a.knobs.SecretLife)
			answer["client_secret_expires_at"] = c.Expires.Unix()
		}
	}
	a.clients[c.ID] = c
	writeJSON(w, http.StatusCreated, answer)
}

// client finds a client by its id, fetching its document if that is a URL.
func (a *AS) client(id string) (OAuthClient, error) {
	a.mu.Lock()
	c, ok := a.clients[id]
	k := a.knobs
	a.mu.Unlock()
	if ok {
		return c, nil
	}
	if !k.CIMD || !strings.Contains(id, "://") {
		return c, fmt.Errorf("there is no client %q", id)
	}
	fetch := k.Fetch
	if fetch == nil {
		fetch = http.DefaultClient
	}
	resp, err := fetch.Get(id)
	if err != nil {
		return c, err
	}
	defer resp.Body.Close()
	var doc struct {
		ClientID     string   `json:"client_id"`
		RedirectURIs []string `json:"redirect_uris"`
		Method       string   `json:"token_endpoint_auth_method"`
	}
	if err := json.NewDecoder(resp.Body).Decode(&doc); err != nil {
		return c, fmt.Errorf("reading the document of %q: %w", id, err)
	}
	// Client ID Metadata Document: client_id is the document's own URL, by
	// simple string comparison.
	if resp.StatusCode != http.StatusOK || doc.ClientID != id {
		return c, fmt.Errorf("the document of %q is not its own", id)
	}
	if doc.Method == "" {
		doc.Method = "none" // there is no secret that anybody could share
	}
	return OAuthClient{ID: id, Method: doc.Method, RedirectURIs: doc.RedirectURIs}, nil
}

func (a *AS) serveAuthorize(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	c, err := a.client(q.Get("client_id"))
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	redirect := q.Get("redirect_uri")
	if !slices.Contains(c.RedirectURIs, redirect) {
		http.Error(w, "redirect_uri is not registered", http.StatusBadRequest)
		return
	}
	target, err := url.Parse(redirect)
	if err != nil {
		http.Error(w, "redirect_uri is no URL", http.StatusBadRequest)
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	k := a.knobs
	answer := target.Query()
	if q.Has("state") {
		answer.Set("state", q.Get("state"))
	}
	issuer := a.base + a.path
	switch k.Iss {
	case IssRight, IssUnasked:
		answer.Set("iss", issuer)
	case IssWrong:
		answer.Set("iss", "https://another-issuer.example")
	case IssNormalised:
		answer.Set("iss", issuer+"/")
	}
	switch {
	case k.PromptNeeded != "" && q.Get("prompt") == "none":
		answer.Set("error", k.PromptNeeded)
	case k.Deny != "":
		answer.Set("error", k.Deny)
		if k.DenyDescription != "" {
			answer.Set("error_description", k.DenyDescription)
		}
	case q.Get("response_type") != "code":
		answer.Set("error", "unsupported_response_type")
	case q.Get("code_challenge_method") != "S256" || q.Get("code_challenge") == "":
		answer.Set("error", "invalid_request")
		answer.Set("error_description", "PKCE with S256 is required")
	default:
		scopes := strings.Fields(q.Get("scope"))
		if k.Grant != nil {
			scopes = k.Grant(scopes)
		}
		subject := k.User
		if subject == "" {
			subject = "alice"
		}
		code := "canary-code-" + rand.Text()
		a.secret(code)
		a.codes[code] = &asCode{
			asGrant:     &asGrant{client: c.ID, subject: subject, resource: q.Get("resource"), nonce: q.Get("nonce"), scopes: scopes},
			redirectURI: redirect, challenge: q.Get("code_challenge"), expires: a.nowLocked().Add(time.Minute),
		}
		answer.Set("code", code)
	}
	target.RawQuery = answer.Encode()
	http.Redirect(w, r, target.String(), http.StatusFound)
}

// authenticate returns the client that a request comes from.
func (a *AS) authenticate(w http.ResponseWriter, r *http.Request) (OAuthClient, bool) {
	id, secret, basic := r.BasicAuth()
	method := "client_secret_basic"
	if basic {
		// RFC 6749, section 2.3.1: both are form-encoded first.
		id, _ = url.QueryUnescape(id)
		secret, _ = url.QueryUnescape(secret)
	} else {
		id, secret, method = r.PostForm.Get("client_id"), r.PostForm.Get("client_secret"), "client_secret_post"
		if secret == "" {
			method = "none"
		}
	}
	a.secret(secret)
	c, err := a.client(id)
	a.mu.Lock()
	now := a.nowLocked()
	if r.PostForm.Has("client_assertion") {
		a.secret(r.PostForm.Get("client_assertion"))
		if method = "private_key_jwt"; err == nil && !a.assertedLocked(r.PostForm, c) {
			err = errors.New("the assertion is not good")
		}
	}
	a.mu.Unlock()
	if err != nil || c.Method != method || c.Secret != secret || !c.Expires.IsZero() && !now.Before(c.Expires) {
		oauthError(w, http.StatusUnauthorized, "invalid_client", "unknown, or not authenticated as it was registered")
		return c, false
	}
	return c, true
}

func (a *AS) serveToken(w http.ResponseWriter, r *http.Request) {
	if err := r.ParseForm(); err != nil || r.Method != http.MethodPost {
		oauthError(w, http.StatusBadRequest, "invalid_request", "not a form that was posted")
		return
	}
	form := r.PostForm
	a.secret(form.Get("code_verifier"))
	c, ok := a.authenticate(w, r)
	if !ok {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	var g *asGrant
	answer := map[string]any{"token_type": "Bearer"}
	switch form.Get("grant_type") {
	case "authorization_code":
		code := a.codes[form.Get("code")]
		if code != nil && code.used {
			// RFC 6749, section 4.1.2: a code used twice "SHOULD revoke ... all
			// tokens previously issued based on that authorization code".
			a.reuses++
			code.revoked = true
		}
		sum := sha256.Sum256([]byte(form.Get("code_verifier")))
		if code == nil || code.used || code.client != c.ID || code.redirectURI != form.Get("redirect_uri") ||
			code.challenge != base64.RawURLEncoding.EncodeToString(sum[:]) || !a.nowLocked().Before(code.expires) {
			oauthError(w, http.StatusBadRequest, "invalid_grant", "the code, or what it was issued for, is not right")
			return
		}
		code.used = true
		g = code.asGrant
	case "refresh_token":
		token := a.refresh[form.Get("refresh_token")]
		if token != nil && token.used {
			a.reuses++
			token.revoked = true
		}
		if token == nil || token.used || token.revoked || token.client != c.ID {
			oauthError(w, http.StatusBadRequest, "invalid_grant", "the refresh token is not good")
			return
		}
		token.used = !a.knobs.NoRotation
		g = token.asGrant
	default:
		var done map[string]any
		if g, done = a.machineLocked(w, c, form); g == nil {
			return
		}
		maps.Copy(answer, done)
	}
	// RFC 8707, section 2.2: a token request's resource is one of those granted.
	if asked := form.Get("resource"); asked != "" && asked != g.resource && form.Get("grant_type") != grantExchange {
		oauthError(w, http.StatusBadRequest, "invalid_target", "the resource was not granted")
		return
	}
	scopes := g.scopes
	if asked := strings.Fields(form.Get("scope")); len(asked) > 0 {
		scopes = slices.DeleteFunc(asked, func(s string) bool { return !slices.Contains(g.scopes, s) })
	}
	if answer["access_token"] == nil {
		access := a.mintLocked(g, scopes)
		answer["access_token"] = access
		if life := a.access[access].expires; !a.knobs.NoExpiry {
			answer["expires_in"] = int(life.Sub(a.nowLocked()).Seconds())
		}
	}
	if len(scopes) > 0 {
		answer["scope"] = strings.Join(scopes, " ")
	}
	if isCode := form.Has("code"); !a.knobs.NoRefresh && (isCode || form.Has("refresh_token") && !a.knobs.NoRotation) {
		refresh := "canary-rt-" + rand.Text()
		a.secret(refresh)
		a.refresh[refresh] = &asRefresh{asGrant: g}
		answer["refresh_token"] = refresh
	}
	if a.knobs.IDToken != nil && (form.Has("code") || form.Has("refresh_token")) {
		answer["id_token"] = a.idTokenLocked(g)
	}
	w.Header().Set("Cache-Control", "no-store")
	writeJSON(w, http.StatusOK, answer)
}

func (a *AS) mintLocked(g *asGrant, scopes []string) string {
	life := a.knobs.TokenLife
	if life == 0 {
		life = time.Hour
	}
	token := "canary-at-" + rand.Text()
	if a.knobs.Audiences != nil {
		token = signJWT(map[string]any{"iss": a.base + a.path, "sub": g.subject, "aud": a.knobs.Audiences, "jti": rand.Text()}, "at+jwt")
	}
	a.secret(token)
	a.access[token] = &asToken{asGrant: g, scopes: scopes, expires: a.nowLocked().Add(life), also: a.knobs.Audiences}
	return token
}

// idTokenLocked makes an ID token.
func (a *AS) idTokenLocked(g *asGrant) string {
	claims := map[string]any{
		"iss": a.base + a.path, "sub": g.subject, "aud": g.client, "jti": rand.Text(),
		"iat": a.nowLocked().Unix(), "exp": a.nowLocked().Add(time.Hour).Unix(),
	}
	if g.nonce != "" {
		claims["nonce"] = g.nonce
	}
	override(claims, a.knobs.IDToken)
	token := signJWT(claims, "JWT")
	a.secret(token)
	return token
}

// serveIntrospect is RFC 7662.
func (a *AS) serveIntrospect(w http.ResponseWriter, r *http.Request) {
	if err := r.ParseForm(); err != nil || r.Method != http.MethodPost {
		oauthError(w, http.StatusBadRequest, "invalid_request", "not a form that was posted")
		return
	}
	if _, ok := a.authenticate(w, r); !ok {
		return
	}
	info, ok := a.Valid(r.PostForm.Get("token"))
	if !ok {
		writeJSON(w, http.StatusOK, map[string]any{"active": false})
		return
	}
	doc := map[string]any{"active": true, "sub": info.Subject, "aud": info.Audience, "client_id": info.ClientID, "token_type": "Bearer", "iss": a.Issuer()}
	if !info.Expires.IsZero() {
		doc["exp"] = info.Expires.Unix()
	}
	writeJSON(w, http.StatusOK, doc)
}

func (a *AS) serveRevoke(w http.ResponseWriter, r *http.Request) {
	if err := r.ParseForm(); err != nil || r.Method != http.MethodPost {
		oauthError(w, http.StatusBadRequest, "invalid_request", "not a form that was posted")
		return
	}
	c, ok := a.authenticate(w, r)
	if !ok {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.knobs.NoRevocation {
		http.NotFound(w, r)
		return
	}
	token := r.PostForm.Get("token")
	// RFC 7009, section 2.1: with a refresh token, the access tokens of the
	// same grant SHOULD go too.
	if t := a.refresh[token]; t != nil && t.client == c.ID {
		t.revoked = true
	}
	if t := a.access[token]; t != nil && t.client == c.ID {
		delete(a.access, token)
	}
	w.WriteHeader(http.StatusOK)
}

func writeJSON(w http.ResponseWriter, status int, doc any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(doc)
}

// oauthError answers as RFC 6749, section 5.2, says.
func oauthError(w http.ResponseWriter, status int, code, description string) {
	if status == http.StatusUnauthorized {
		w.Header().Set("WWW-Authenticate", `Basic realm="authtest"`)
	}
	w.Header().Set("Cache-Control", "no-store")
	doc := map[string]any{"error": code}
	if description != "" {
		doc["error_description"] = description
	}
	writeJSON(w, status, doc)
}
