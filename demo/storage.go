package demo

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/subtle"
	"errors"
	"log/slog"
	"maps"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/zitadel/oidc/v3/pkg/oidc"
	"github.com/zitadel/oidc/v3/pkg/op"
)

// How long things live, and how many there may be.
const (
	requestLife = 10 * time.Minute // from /authorize to the sign-in
	codeLife    = time.Minute
	refreshLife = 24 * time.Hour
	maxClients  = 1000
	maxRequests = 1000
)

// storage is op.Storage in memory. What expired goes when something is added.
type storage struct {
	users     map[string]Account
	first     Account // the one that the login page offers
	scopes    []string
	key       signingKey
	tokenLife time.Duration
	opaque    bool
	log       *slog.Logger

	mu       sync.Mutex // guards what follows
	clients  map[string]*client
	requests map[string]*authRequest
	codes    map[string]string // code → id of the request
	access   map[string]*accessToken
	refresh  map[string]*refreshToken
	swept    time.Time
}

func newStorage(cfg ProviderConfig) *storage {
	s := &storage{
		users: make(map[string]Account), first: cfg.Users[0], scopes: cfg.Scopes,
		key: signingKey{rand.Text(), cfg.Key}, tokenLife: cfg.TokenLife, opaque: cfg.Opaque, log: cfg.Log,
		clients:  make(map[string]*client),
		requests: make(map[string]*authRequest),
		codes:    make(map[string]string),
		access:   make(map[string]*accessToken),
		refresh:  make(map[string]*refreshToken),
	}
	for _, user := range cfg.Users {
		s.users[user.Name] = user
	}
	return s
}

// authRequest is one request to the authorization endpoint. op gets copies. It
// implements op.AuthRequest.
type authRequest struct {
	id, client, redirect, state, nonce, challenge string
	scopes, resources                             []string
	expires                                       time.Time

	subject  string // who signed in, "" until then
	authTime time.Time
	answered bool // its one code was issued
}

func (r *authRequest) GetID() string                      { return r.id }
func (r *authRequest) GetACR() string                     { return "" }
func (r *authRequest) GetAMR() []string                   { return []string{"pwd"} }
func (r *authRequest) GetAudience() []string              { return r.resources }
func (r *authRequest) GetAuthTime() time.Time             { return r.authTime }
func (r *authRequest) GetClientID() string                { return r.client }
func (r *authRequest) GetNonce() string                   { return r.nonce }
func (r *authRequest) GetRedirectURI() string             { return r.redirect }
func (r *authRequest) GetResponseType() oidc.ResponseType { return oidc.ResponseTypeCode }
func (r *authRequest) GetResponseMode() oidc.ResponseMode { return oidc.ResponseModeQuery }
func (r *authRequest) GetScopes() []string                { return r.scopes }
func (r *authRequest) GetState() string                   { return "" } // see asked
func (r *authRequest) GetSubject() string                 { return r.subject }
func (r *authRequest) Done() bool                         { return r.subject != "" }
func (r *authRequest) GetCodeChallenge() *oidc.CodeChallenge {
	return &oidc.CodeChallenge{Challenge: r.challenge, Method: oidc.CodeChallengeMethodS256}
}

// grant is what a user allowed a client; all tokens that came of it share it.
type grant struct {
	client, subject   string
	scopes, resources []string
	authTime          time.Time
	ended             bool // guarded by storage.mu
}

type accessToken struct {
	*grant
	scopes  []string
	expires time.Time
}

type refreshToken struct {
	*grant
	expires time.Time
	used    bool
}

// refreshRequest implements op.RefreshTokenRequest.
type refreshRequest struct {
	*grant
	scopes []string
}

func (r *refreshRequest) GetAMR() []string            { return []string{"pwd"} }
func (r *refreshRequest) GetAudience() []string       { return r.resources }
func (r *refreshRequest) GetAuthTime() time.Time      { return r.authTime }
func (r *refreshRequest) GetClientID() string         { return r.client }
func (r *refreshRequest) GetScopes() []string         { return r.scopes }
func (r *refreshRequest) GetSubject() string          { return r.subject }
func (r *refreshRequest) SetCurrentScopes(s []string) { r.scopes = s }

// sweepLocked drops what expired, once a minute at most.
func (s *storage) sweepLocked(now time.Time) {
	if now.Before(s.swept.Add(time.Minute)) {
		return
	}
	s.swept = now
	maps.DeleteFunc(s.requests, func(_ string, r *authRequest) bool { return now.After(r.expires) })
	maps.DeleteFunc(s.codes, func(_, id string) bool { return s.requests[id] == nil })
	maps.DeleteFunc(s.access, func(_ string, t *accessToken) bool { return now.After(t.expires) || t.ended })
	// A used refresh token is kept, so that its second use is noticed.
	maps.DeleteFunc(s.refresh, func(_ string, t *refreshToken) bool { return now.After(t.expires) || t.ended })
}

// endAll ends all access tokens, or all grants.
func (s *storage) endAll(grants bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	clear(s.access)
	if grants {
		clear(s.refresh)
		clear(s.codes)
	}
}

func (s *storage) addClient(c *client) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.clients) >= maxClients {
		return false
	}
	s.clients[c.id] = c
	return true
}

// pending returns a request that waits for a sign-in, and its client.
func (s *storage) pending(id string) (authRequest, *client, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r, ok := s.requests[id]
	if !ok || r.answered || time.Now().After(r.expires) {
		return authRequest{}, nil, false
	}
	return *r, s.clients[r.client], true
}

// errCredentials means that name or password were wrong.
var errCredentials = errors.New("wrong name or password")

// errGone means that a request is unknown, expired or answered.
var errGone = errors.New("no such request")

// signIn notes who signed in for a request.
func (s *storage) signIn(id, name, password string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	r, ok := s.requests[id]
	if !ok || r.answered || now.After(r.expires) {
		return errGone
	}
	user, ok := s.users[name]
	if subtle.ConstantTimeCompare([]byte(user.Password), []byte(password)) == 0 || !ok {
		return errCredentials
	}
	r.subject, r.authTime = user.Name, now
	return nil
}

// drop ends a request without an answer of op's.
func (s *storage) drop(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.requests, id)
}

// errTarget is RFC 8707's error for a resource that is not to be had.
func errTarget() error {
	return &oidc.Error{ErrorType: "invalid_target", Description: "the resource is not an absolute URL, or was not granted"}
}

// CreateAuthRequest takes a request whose client and redirect URI op has
// checked; an error goes to the client.
func (s *storage) CreateAuthRequest(ctx context.Context, r *oidc.AuthRequest, _ string) (op.AuthRequest, error) {
	// RFC 9700, section 2.1.1: "Authorization servers MUST support PKCE". This
	// one demands it, of everybody, with S256.
	if r.CodeChallenge == "" || r.CodeChallengeMethod != oidc.CodeChallengeMethodS256 {
		return nil, oidc.ErrInvalidRequest().WithDescription("PKCE with S256 is required")
	}
	if r.ResponseMode != "" && r.ResponseMode != oidc.ResponseModeQuery {
		return nil, oidc.ErrInvalidRequest().WithDescription("response_mode is query")
	}
	if slices.Contains(r.Prompt, oidc.PromptNone) {
		return nil, oidc.ErrLoginRequired()
	}
	a := askedOf(ctx)
	for _, resource := range a.resources {
		// RFC 8707, section 2: "Its value MUST be an absolute URI ... The URI
		// MUST NOT include a fragment component."
		if u, err := url.Parse(resource); err != nil || !u.IsAbs() || u.Host == "" || strings.Contains(resource, "#") {
			return nil, errTarget()
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	s.sweepLocked(now)
	if len(s.requests) >= maxRequests {
		return nil, &oidc.Error{ErrorType: "temporarily_unavailable", Description: "too many sign-ins are under way"}
	}
	request := &authRequest{
		id: rand.Text(), client: r.ClientID, redirect: r.RedirectURI, state: a.state, nonce: r.Nonce,
		challenge: r.CodeChallenge, scopes: r.Scopes, resources: a.resources, expires: now.Add(requestLife),
	}
	s.requests[request.id] = request
	return new(*request), nil
}

func (s *storage) AuthRequestByID(_ context.Context, id string) (op.AuthRequest, error) {
	r, _, ok := s.pending(id)
	if !ok {
		return nil, oidc.ErrInvalidRequest().WithDescription("this sign-in is over")
	}
	return &r, nil
}

// SaveAuthCode gives a request its one code.
func (s *storage) SaveAuthCode(_ context.Context, id, code string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	r, ok := s.requests[id]
	if !ok || r.answered {
		return oidc.ErrInvalidRequest().WithDescription("this sign-in is over")
	}
	r.answered, r.expires = true, time.Now().Add(codeLife)
	s.codes[code] = id
	return nil
}

// AuthRequestByCode redeems a code, whatever comes of it.
func (s *storage) AuthRequestByCode(_ context.Context, code string) (op.AuthRequest, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	id, ok := s.codes[code]
	delete(s.codes, code)
	r := s.requests[id]
	delete(s.requests, id)
	if !ok || r == nil || time.Now().After(r.expires) {
		return nil, errGone
	}
	return r, nil
}

// DeleteAuthRequest has nothing left to do: redeeming the code did it.
func (s *storage) DeleteAuthRequest(context.Context, string) error { return nil }

// grantOf returns what a token request is about.
func grantOf(request op.TokenRequest) (*grant, error) {
	switch r := request.(type) {
	case *authRequest:
		return &grant{client: r.client, subject: r.subject, scopes: r.scopes, resources: r.resources, authTime: r.authTime}, nil
	case *refreshRequest:
		return r.grant, nil
	}
	return nil, oidc.ErrUnsupportedGrantType()
}

func (s *storage) CreateAccessToken(ctx context.Context, request op.TokenRequest) (string, time.Time, error) {
	g, err := grantOf(request)
	if err != nil {
		return "", time.Time{}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.issueLocked(ctx, g, request.GetScopes())
}

// issueLocked issues an access token.
func (s *storage) issueLocked(ctx context.Context, g *grant, scopes []string) (id string, expires time.Time, err error) {
	// RFC 8707, section 2.2: the resources of a token request are those granted
	// or some of them. Here a grant has one, so it is either all or an error.
	for _, resource := range askedOf(ctx).resources {
		if !slices.Contains(g.resources, resource) {
			return "", time.Time{}, errTarget()
		}
	}
	now := time.Now()
	s.sweepLocked(now)
	id, expires = rand.Text(), now.Add(s.tokenLife)
	s.access[id] = &accessToken{grant: g, scopes: scopes, expires: expires}
	s.log.Info("provider: issued an access token", "user", g.subject, "life", s.tokenLife)
	return id, expires, nil
}

func (s *storage) CreateAccessAndRefreshTokens(ctx context.Context, request op.TokenRequest, current string) (string, string, time.Time, error) {
	fail := func(err error) (string, string, time.Time, error) { return "", "", time.Time{}, err }
	g, err := grantOf(request)
	if err != nil {
		return fail(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	id, expires, err := s.issueLocked(ctx, g, request.GetScopes())
	if err != nil {
		return fail(err)
	}
	if current != "" {
		// Two requests with one token may both have come this far.
		old, ok := s.refresh[current]
		if !ok || old.used || old.ended {
			delete(s.access, id)
			return fail(oidc.ErrInvalidGrant())
		}
		old.used = true
	}
	next := rand.Text()
	s.refresh[next] = &refreshToken{grant: g, expires: time.Now().Add(refreshLife)}
	return id, next, expires, nil
}

func (s *storage) TokenRequestByRefreshToken(_ context.Context, token string) (op.RefreshTokenRequest, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	t, ok := s.refresh[token]
	if !ok || t.ended || time.Now().After(t.expires) {
		return nil, errGone
	}
	if t.used {
		// RFC 9700, section 4.14.2: "The authorization server cannot determine
		// which party submitted the invalid refresh token, but it will revoke
		// the active refresh token."
		t.ended = true
		return nil, errGone
	}
	return &refreshRequest{grant: t.grant, scopes: t.scopes}, nil
}

// live returns an access token that is good.
func (s *storage) live(id string) (accessToken, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	t, ok := s.access[id]
	if !ok || t.ended || time.Now().After(t.expires) {
		return accessToken{}, false
	}
	return *t, true
}

func (s *storage) TerminateSession(context.Context, string, string) error { return nil }

func (s *storage) GetRefreshTokenInfo(_ context.Context, _, token string) (userID, tokenID string, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	t, ok := s.refresh[token]
	if !ok {
		return "", "", op.ErrInvalidRefreshToken
	}
	return t.subject, token, nil
}

// RevokeToken ends the grant of a refresh token, or one access token. What is
// unknown is revoked already.
func (s *storage) RevokeToken(_ context.Context, token, _, clientID string) *oidc.Error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if t, ok := s.access[token]; ok {
		if t.client != clientID {
			return oidc.ErrInvalidClient().WithDescription("the token is another client's")
		}
		delete(s.access, token)
	}
	if t, ok := s.refresh[token]; ok {
		if t.client != clientID {
			return oidc.ErrInvalidClient().WithDescription("the token is another client's")
		}
		t.ended = true
		s.log.Info("provider: revoked a grant", "user", t.subject)
	}
	return nil
}

// signingKey implements op.SigningKey; verifyKey, its public half, op.Key.
type signingKey struct {
	id  string
	key *rsa.PrivateKey
}

func (k signingKey) ID() string                                  { return k.id }
func (k signingKey) SignatureAlgorithm() jose.SignatureAlgorithm { return jose.RS256 }
func (k signingKey) Key() any                                    { return k.key }

type verifyKey struct{ signingKey }

func (k verifyKey) Algorithm() jose.SignatureAlgorithm { return jose.RS256 }
func (k verifyKey) Use() string                        { return oidc.KeyUseSignature }
func (k verifyKey) Key() any                           { return k.key.Public() }

func (s *storage) SigningKey(context.Context) (op.SigningKey, error) { return s.key, nil }

func (s *storage) SignatureAlgorithms(context.Context) ([]jose.SignatureAlgorithm, error) {
	return []jose.SignatureAlgorithm{jose.RS256}, nil
}

func (s *storage) KeySet(context.Context) ([]op.Key, error) { return []op.Key{verifyKey{s.key}}, nil }

func (s *storage) GetClientByClientID(_ context.Context, id string) (op.Client, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c, ok := s.clients[id]
	if !ok {
		return nil, oidc.ErrInvalidClient().WithDescription("the client is not registered")
	}
	return c, nil
}

func (s *storage) AuthorizeClientIDSecret(_ context.Context, id, secret string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	c, ok := s.clients[id]
	if !ok || c.secret == "" || subtle.ConstantTimeCompare([]byte(c.secret), []byte(secret)) == 0 {
		return oidc.ErrInvalidClient()
	}
	return nil
}

// userinfo says about a user what the scopes allow.
func (s *storage) userinfo(info *oidc.UserInfo, subject string, scopes []string) {
	user := s.users[subject]
	info.Subject = subject
	if slices.Contains(scopes, oidc.ScopeProfile) {
		info.Name, info.PreferredUsername = user.FullName, user.Name
	}
	if slices.Contains(scopes, oidc.ScopeEmail) {
		info.Email, info.EmailVerified = user.Email, user.Email != ""
	}
}

// SetUserinfoFromScopes is op's older way; SetUserinfoFromRequest does it.
func (s *storage) SetUserinfoFromScopes(context.Context, *oidc.UserInfo, string, string, []string) error {
	return nil
}

func (s *storage) SetUserinfoFromRequest(_ context.Context, info *oidc.UserInfo, request op.IDTokenRequest, scopes []string) error {
	s.userinfo(info, request.GetSubject(), scopes)
	return nil
}

func (s *storage) SetUserinfoFromToken(_ context.Context, info *oidc.UserInfo, id, _, _ string) error {
	t, ok := s.live(id)
	if !ok {
		return errGone
	}
	s.userinfo(info, t.subject, t.scopes)
	return nil
}

func (s *storage) SetIntrospectionFromToken(_ context.Context, answer *oidc.IntrospectionResponse, id, _, _ string) error {
	t, ok := s.live(id)
	if !ok {
		return errGone
	}
	info := new(oidc.UserInfo)
	s.userinfo(info, t.subject, t.scopes)
	answer.SetUserInfo(info)
	answer.TokenType, answer.JWTID, answer.ClientID = oidc.BearerToken, id, t.client
	answer.Scope, answer.Audience, answer.Expiration = t.scopes, t.resources, oidc.FromTime(t.expires)
	return nil
}

// GetPrivateClaimsFromScopes is op's older way; GetPrivateClaimsFromRequest
// does it.
func (s *storage) GetPrivateClaimsFromScopes(context.Context, string, string, []string) (map[string]any, error) {
	return nil, nil
}

// GetPrivateClaimsFromRequest adds the scope, by which an access token differs
// from an ID token, too (RFC 9068, section 2.2.3).
func (s *storage) GetPrivateClaimsFromRequest(_ context.Context, request op.TokenRequest, _ []string) (map[string]any, error) {
	return map[string]any{"scope": strings.Join(request.GetScopes(), " ")}, nil
}

// GetKeyByIDAndClientID knows no keys: no client signs anything.
func (s *storage) GetKeyByIDAndClientID(context.Context, string, string) (*jose.JSONWebKey, error) {
	return nil, oidc.ErrInvalidClient()
}

func (s *storage) ValidateJWTProfileScopes(context.Context, string, []string) ([]string, error) {
	return nil, oidc.ErrUnsupportedGrantType()
}

func (s *storage) Health(context.Context) error { return nil }
