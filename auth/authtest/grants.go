package authtest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"

	"github.com/go-jose/go-jose/v4"
)

// Token types and grants of RFC 8693, RFC 7523 and the identity assertion draft.
const (
	grantExchange  = "urn:ietf:params:oauth:grant-type:token-exchange"
	grantJWTBearer = "urn:ietf:params:oauth:grant-type:jwt-bearer"
	typeAccess     = "urn:ietf:params:oauth:token-type:access_token"
	typeIDToken    = "urn:ietf:params:oauth:token-type:id_token"
	typeIDJAG      = "urn:ietf:params:oauth:token-type:id-jag"

	// crossClient is Dex's scope for a token that another client accepts.
	crossClient = "audience:server:client_id:"
)

// signingKey signs the JWTs of every [AS].
var signingKey = sync.OnceValue(func() *ecdsa.PrivateKey {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	return key
})

const signingKeyID = "authtest"

// signJWT makes a JWT of these claims.
func signJWT(claims map[string]any, typ string) string {
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: signingKey(), KeyID: signingKeyID}},
		(&jose.SignerOptions{}).WithType(jose.ContentType(typ)))
	if err != nil {
		panic(err)
	}
	payload, err := json.Marshal(claims)
	if err != nil {
		panic(err) // the test put something into its claims that is no JSON
	}
	signed, err := signer.Sign(payload)
	if err != nil {
		panic(err)
	}
	token, err := signed.CompactSerialize()
	if err != nil {
		panic(err)
	}
	return token
}

// readJWT returns the claims of a JWT that some AS of this package has signed.
func readJWT(token string, key crypto.PublicKey, algorithms ...jose.SignatureAlgorithm) (map[string]any, bool) {
	signed, err := jose.ParseSigned(token, algorithms)
	if err != nil {
		return nil, false
	}
	payload, err := signed.Verify(key)
	if err != nil {
		return nil, false
	}
	var claims map[string]any
	return claims, json.Unmarshal(payload, &claims) == nil
}

func ownJWT(token string) (map[string]any, bool) {
	return readJWT(token, signingKey().Public(), jose.ES256)
}

func serveKeys(w http.ResponseWriter, _ *http.Request) {
	writeJSON(w, http.StatusOK, jose.JSONWebKeySet{Keys: []jose.JSONWebKey{
		{Key: signingKey().Public(), KeyID: signingKeyID, Algorithm: "ES256", Use: "sig"},
	}})
}

// assertedLocked checks a private_key_jwt. RFC 7523 section 3.
func (a *AS) assertedLocked(form url.Values, c OAuthClient) bool {
	if c.Key == nil || form.Get("client_assertion_type") != "urn:ietf:params:oauth:client-assertion-type:jwt-bearer" {
		return false
	}
	claims, ok := readJWT(form.Get("client_assertion"), c.Key, jose.ES256, jose.RS256, jose.EdDSA)
	exp, _ := claims["exp"].(float64)
	jti, _ := claims["jti"].(string)
	if !ok || claims["iss"] != c.ID || claims["sub"] != c.ID || claims["aud"] != a.base+a.path ||
		exp <= float64(a.nowLocked().Unix()) || jti == "" || a.jtis[jti] {
		return false
	}
	a.jtis[jti] = true
	return true
}

// machineLocked answers a grant that no person takes part in; g is nil if it is
// refused, and then the error has been sent.
func (a *AS) machineLocked(w http.ResponseWriter, c OAuthClient, form url.Values) (g *asGrant, answer map[string]any) {
	refuse := func(code, description string) (*asGrant, map[string]any) {
		oauthError(w, http.StatusBadRequest, code, description)
		return nil, nil
	}
	g = &asGrant{client: c.ID, resource: form.Get("resource"), scopes: strings.Fields(form.Get("scope"))}
	switch form.Get("grant_type") {
	case "client_credentials":
		if c.Method == "none" {
			return refuse("unauthorized_client", "a public client has no credentials")
		}
		g.subject = c.ID
		return g, nil
	case grantJWTBearer:
		claims, ok := ownJWT(form.Get("assertion"))
		if !ok || claims["aud"] != a.base+a.path || claims["client_id"] != c.ID && claims["client_id"] != nil {
			return refuse("invalid_grant", "the assertion is for somebody else")
		}
		g.subject, _ = claims["sub"].(string)
		if resource, _ := claims["resource"].(string); resource != "" {
			g.resource = resource
		}
		return g, nil
	case grantExchange:
	default:
		return refuse("unsupported_grant_type", "")
	}
	// RFC 8693, as far as it is needed: the subject is who some AS of this
	// package says it is.
	k := a.knobs
	subject := form.Get("subject_token")
	a.secret(subject)
	claims, ok := ownJWT(subject)
	if t := a.access[subject]; t != nil && form.Get("subject_token_type") == typeAccess {
		claims, ok = map[string]any{"sub": t.subject}, true
	} else if form.Get("subject_token_type") != typeIDToken && form.Get("subject_token_type") != typeAccess {
		return refuse("invalid_request", "the type of the subject token")
	}
	exp, hasExp := claims["exp"].(float64)
	if !ok || hasExp && exp <= float64(a.nowLocked().Unix()) {
		return refuse("invalid_grant", "the subject token is not good")
	}
	g.subject, _ = claims["sub"].(string)
	audience := form.Get("audience")
	if k.Dex {
		// Dex: connector_id is required, audience is unknown and a scope stands for
		// it, and its errors are its own.
		if form.Get("connector_id") == "" {
			return refuse("invalid_request", "Requested connector does not exist.")
		}
		audience = c.ID
		for _, scope := range g.scopes {
			if other, ok := strings.CutPrefix(scope, crossClient); ok {
				audience = other
			}
		}
		g.scopes = slices.DeleteFunc(g.scopes, func(s string) bool { return strings.HasPrefix(s, crossClient) })
	}
	answer = map[string]any{"issued_token_type": typeAccess}
	requested := form.Get("requested_token_type")
	switch {
	case requested == typeIDJAG:
		if audience == "" {
			return refuse("invalid_request", "no audience")
		}
		assertion := signJWT(map[string]any{
			"iss": a.base + a.path, "sub": g.subject, "aud": audience, "resource": g.resource,
			"exp": a.nowLocked().Unix() + 300, "jti": rand.Text(),
		}, "oauth-id-jag+jwt")
		a.secret(assertion)
		answer["access_token"], answer["issued_token_type"], answer["token_type"] = assertion, typeIDJAG, "N_A"
	case requested == typeIDToken || k.JWT:
		issued := map[string]any{
			"iss": a.base + a.path, "sub": g.subject, "aud": audience, "jti": rand.Text(), "exp": a.nowLocked().Unix() + 3600,
		}
		if audience == "" {
			delete(issued, "aud")
		}
		override(issued, k.Claims)
		token := signJWT(issued, "JWT")
		a.secret(token)
		g.resource = audience
		a.access[token] = &asToken{asGrant: g, scopes: g.scopes}
		answer["access_token"], answer["token_type"] = token, "Bearer"
		if requested == typeIDToken {
			answer["issued_token_type"], answer["token_type"] = typeIDToken, "N_A"
		}
	case audience != "":
		g.resource = audience
	}
	return g, answer
}
