package demo

import (
	"crypto/rand"
	"encoding/json"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"time"

	"github.com/zitadel/oidc/v3/pkg/oidc"
	"github.com/zitadel/oidc/v3/pkg/op"
)

// client is a registered client; it is never changed. It implements op.Client.
type client struct {
	id, secret, name string
	redirects        []string
	method           oidc.AuthMethod
	grants           []oidc.GrantType
	native, opaque   bool
	scopes           []string
	registered       time.Time
}

func (c *client) GetID() string                    { return c.id }
func (c *client) RedirectURIs() []string           { return c.redirects }
func (c *client) PostLogoutRedirectURIs() []string { return nil }
func (c *client) AuthMethod() oidc.AuthMethod      { return c.method }
func (c *client) ResponseTypes() []oidc.ResponseType {
	return []oidc.ResponseType{oidc.ResponseTypeCode}
}
func (c *client) GrantTypes() []oidc.GrantType     { return c.grants }
func (c *client) LoginURL(id string) string        { return "/login?id=" + url.QueryEscape(id) }
func (c *client) IDTokenLifetime() time.Duration   { return time.Hour }
func (c *client) DevMode() bool                    { return false }
func (c *client) IsScopeAllowed(scope string) bool { return slices.Contains(c.scopes, scope) }
func (c *client) ClockSkew() time.Duration         { return 0 }

// The ID token says who signed in, so that a client can show it.
func (c *client) IDTokenUserinfoClaimsAssertion() bool { return true }

func (c *client) RestrictAdditionalIdTokenScopes() func([]string) []string     { return keep }
func (c *client) RestrictAdditionalAccessTokenScopes() func([]string) []string { return keep }

func keep(scopes []string) []string { return scopes }

func (c *client) ApplicationType() op.ApplicationType {
	if c.native {
		return op.ApplicationTypeNative
	}
	return op.ApplicationTypeWeb
}

func (c *client) AccessTokenType() op.AccessTokenType {
	if c.opaque {
		return op.AccessTokenTypeBearer
	}
	return op.AccessTokenTypeJWT
}

// Bounds of a registration.
const (
	maxRedirects = 32
	maxName      = 100
)

// registration is a request and an answer of RFC 7591.
type registration struct {
	RedirectURIs    []string         `json:"redirect_uris"`
	AuthMethod      oidc.AuthMethod  `json:"token_endpoint_auth_method,omitempty"`
	GrantTypes      []oidc.GrantType `json:"grant_types,omitempty"`
	ResponseTypes   []string         `json:"response_types,omitempty"`
	ApplicationType string           `json:"application_type,omitempty"`
	ClientName      string           `json:"client_name,omitempty"`

	ClientID      string `json:"client_id,omitempty"`
	IssuedAt      int64  `json:"client_id_issued_at,omitempty"`
	ClientSecret  string `json:"client_secret,omitempty"`
	SecretExpires *int64 `json:"client_secret_expires_at,omitempty"`
}

// register registers whoever asks, which is what dynamic registration means.
func (p *Provider) register(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Cache-Control", "no-store")
	refuse := func(code, say string) {
		writeJSON(w, http.StatusBadRequest, map[string]string{"error": code, "error_description": say})
	}
	var asked registration
	if err := json.NewDecoder(r.Body).Decode(&asked); err != nil {
		refuse("invalid_client_metadata", "the body is not the JSON of a registration")
		return
	}
	if len(asked.RedirectURIs) == 0 || len(asked.RedirectURIs) > maxRedirects {
		refuse("invalid_redirect_uri", "redirect_uris is missing or too long")
		return
	}
	c := &client{
		id: rand.Text(), name: asked.ClientName, redirects: asked.RedirectURIs, method: asked.AuthMethod,
		grants: asked.GrantTypes, opaque: p.storage.opaque, scopes: p.storage.scopes, registered: time.Now(),
	}
	for _, redirect := range c.redirects {
		loopback, ok := redirectURI(redirect)
		if !ok {
			refuse("invalid_redirect_uri", "redirect_uris are https, or http to loopback, without a fragment")
			return
		}
		c.native = c.native || loopback
	}
	// RFC 7591, section 2: "If unspecified or omitted, the default is
	// "client_secret_basic"", and of grant_types "authorization_code".
	if c.method == "" {
		c.method = oidc.AuthMethodBasic
	}
	if len(c.grants) == 0 {
		c.grants = []oidc.GrantType{oidc.GrantTypeCode}
	}
	if len(c.name) > maxName {
		refuse("invalid_client_metadata", "client_name is too long")
		return
	}
	answer := registration{
		RedirectURIs: c.redirects, AuthMethod: c.method, GrantTypes: c.grants,
		ResponseTypes: []string{string(oidc.ResponseTypeCode)}, ApplicationType: asked.ApplicationType,
		ClientName: c.name, ClientID: c.id, IssuedAt: c.registered.Unix(),
	}
	switch c.method {
	case oidc.AuthMethodNone:
	case oidc.AuthMethodBasic, oidc.AuthMethodPost:
		c.secret = rand.Text()
		answer.ClientSecret, answer.SecretExpires = c.secret, new(int64(0))
	default:
		refuse("invalid_client_metadata", "token_endpoint_auth_method is none, client_secret_basic or client_secret_post")
		return
	}
	for _, grant := range c.grants {
		if grant != oidc.GrantTypeCode && grant != oidc.GrantTypeRefreshToken {
			refuse("invalid_client_metadata", "grant_types are authorization_code and refresh_token")
			return
		}
	}
	if !p.storage.addClient(c) {
		writeJSON(w, http.StatusServiceUnavailable, map[string]string{"error": "temporarily_unavailable"})
		return
	}
	p.log.Info("provider: a client registered", "name", c.name, "method", c.method)
	writeJSON(w, http.StatusCreated, answer)
}

// redirectURI says whether a redirect URI may be registered, and whether it
// leads to this machine.
func redirectURI(s string) (loopback, ok bool) {
	u, err := url.Parse(s)
	if err != nil || u.Host == "" || u.User != nil || u.Fragment != "" || u.Opaque != "" {
		return false, false
	}
	addr, err := netip.ParseAddr(u.Hostname())
	loopback = u.Hostname() == "localhost" || err == nil && addr.IsLoopback()
	return loopback, u.Scheme == "https" || u.Scheme == "http" && loopback
}
