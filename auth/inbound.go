package auth

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	jose "github.com/go-jose/go-jose/v4"
	"github.com/zitadel/oidc/v3/pkg/oidc"
	"golang.org/x/sync/singleflight"

	"gatehouse/auth/endpoint"
	"gatehouse/auth/gate"
)

// This file says who sends a request: whom a client's bearer token stands for.
// The token proves that and is good for nothing else here. It is not kept, not
// sent on, and not exchanged.

// ErrBearer: a bearer token is not accepted. What it wraps is for the log.
var ErrBearer = errors.New("the bearer token is not accepted")

// Identity is whom a bearer token stands for.
type Identity struct {
	Principal Principal
	Expires   time.Time // when the token has to be looked at anew
}

const (
	maxBearer    = 16 << 10
	maxSubject   = 1 << 10         // of a principal, all claims together
	jwtKept      = 5 * time.Minute // for which a verified JWT is not verified again
	opaqueKept   = 10 * time.Second
	clocksDiffer = time.Minute // by which the provider's clock may be ahead
	maxKnown     = 10_000      // tokens, of each kind

	introspectWait = 10 * time.Second // for others that ask about their tokens
	lookTime       = 30 * time.Second // that, the request, and what has to be found out for it
)

// signatures are the algorithms that a token may be signed with: RFC 8725
// section 3.1, those that are current, and none with a shared key.
var signatures = []string{"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"}

// inbound is what is known of bearer tokens.
type inbound struct {
	asking singleflight.Group // one look at the same token at a time
	wait   time.Duration      // introspectWait
	gates  *gate.Gates        // apart from those of token endpoints: anybody can have a token asked about

	mu sync.Mutex // guards both
	// Apart, so that who makes tokens up does not drive out those that are good.
	accepted, refused generations
}

// generations are the tokens of late, by their hashes: of two generations the
// older goes when the younger is full.
type generations struct {
	young, older map[[sha256.Size]byte]seenBearer
}

// seenBearer is a token that has been looked at, by its hash.
type seenBearer struct {
	identity Identity
	err      error
	until    time.Time
}

// ErrUnasked: whether a bearer token is good could only be said by the provider,
// which was not to be asked. It is an [ErrBearer], too.
var ErrUnasked = errors.New("the provider is not asked about it")

// Authenticate returns whom a bearer token stands for. Its error is [ErrBearer]
// whatever is wrong, the provider's absence included: nobody is let in by it.
//
// Before the provider is asked about a token that it has not vouched for lately,
// which anybody may have made up, may is called; nil: it always may.
func (b *Broker) Authenticate(ctx context.Context, bearer string, may func() bool) (Identity, error) {
	refuse := func(err error) (Identity, error) { return Identity{}, fmt.Errorf("%w: %w", ErrBearer, err) }
	switch {
	case b.login == nil || b.audience == "":
		return refuse(errors.New("nobody is known here"))
	case bearer == "" || len(bearer) > maxBearer || !endpoint.VisibleASCII(bearer):
		return refuse(errors.New("malformed"))
	}
	sum := sha256.Sum256([]byte(bearer))
	if seen, ok := b.inbound.seen(sum, b.now()); ok {
		return seen.identity, seen.err
	}
	if _, isJWT := joseHeader(bearer); !isJWT && may != nil && !b.inbound.vouchedFor(sum) && !may() {
		return refuse(ErrUnasked)
	}
	// Not under the caller's context: it may leave, and others wait for the same.
	answer := b.inbound.asking.DoChan(string(sum[:]), func() (any, error) {
		work, done, err := b.work(lookTime)
		if err != nil {
			return seenBearer{err: err}, nil
		}
		defer done()
		seen := b.look(work, bearer)
		b.inbound.keep(sum, seen)
		return seen, nil
	})
	select {
	case <-ctx.Done():
		return refuse(ctx.Err())
	case got := <-answer:
		seen, _ := got.Val.(seenBearer)
		if seen.err != nil && !errors.Is(seen.err, ErrBearer) {
			return refuse(seen.err)
		}
		return seen.identity, seen.err
	}
}

// look verifies a token by what it is.
func (b *Broker) look(ctx context.Context, bearer string) seenBearer {
	now := b.now()
	header, isJWT := joseHeader(bearer)
	var identity Identity
	var err error
	kept := opaqueKept
	if isJWT {
		kept = jwtKept
		identity, err = b.verifyJWT(ctx, bearer, header)
	} else {
		identity, err = b.introspect(ctx, bearer)
	}
	seen := seenBearer{identity: identity, until: now.Add(kept)}
	if err != nil {
		seen = seenBearer{err: fmt.Errorf("%w: %w", ErrBearer, err)}
		// What the provider has refused is not asked again at once.
		if errors.Is(err, errInactive) {
			seen.until = now.Add(opaqueKept)
		}
		return seen
	}
	if identity.Expires.Before(seen.until) {
		seen.until = identity.Expires
	}
	return seen
}

// header is what matters of a JOSE header (RFC 7515 section 4.1).
type header struct {
	Type      string `json:"typ"`
	Algorithm string `json:"alg"`
}

// joseHeader returns the header of what has the form of a signed JWT.
func joseHeader(token string) (h header, ok bool) {
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return h, false
	}
	data, err := base64.RawURLEncoding.DecodeString(parts[0])
	return h, err == nil && json.Unmarshal(data, &h) == nil && h.Algorithm != ""
}

// bearerClaims are the claims of a JWT access token (RFC 9068 section 2.2), and
// the members of an introspection's answer (RFC 7662 section 2.2) of the same
// names.
type bearerClaims struct {
	Issuer    string          `json:"iss"`
	Audience  json.RawMessage `json:"aud"`
	Expires   float64         `json:"exp"`
	NotBefore float64         `json:"nbf"`
	IssuedAt  float64         `json:"iat"`
	Bound     json.RawMessage `json:"cnf"`

	// What only other kinds of tokens have.
	Nonce      json.RawMessage `json:"nonce"`
	AccessHash json.RawMessage `json:"at_hash"`
	CodeHash   json.RawMessage `json:"c_hash"`
	Events     json.RawMessage `json:"events"`

	// Of an introspection's answer.
	Active    bool   `json:"active"`
	TokenType string `json:"token_type"`
}

// SetSignatureAlgorithm does nothing: which algorithms are accepted is checked
// before.
func (*bearerClaims) SetSignatureAlgorithm(jose.SignatureAlgorithm) {}

// verifyJWT checks a JWT access token. RFC 9068 section 4.
func (b *Broker) verifyJWT(ctx context.Context, token string, h header) (Identity, error) {
	// "The resource server MUST verify that the "typ" header value is "at+jwt" or
	// "application/at+jwt" and reject tokens carrying any other value." Many
	// providers write JWT, or nothing: then what is no access token must not pass
	// for one.
	typ := strings.TrimPrefix(strings.ToLower(h.Type), "application/")
	if !slices.Contains([]string{"at+jwt", "jwt", ""}, typ) {
		return Identity{}, errors.New("its typ is that of another kind of token")
	}
	var claims bearerClaims
	payload, err := oidc.ParseToken(token, &claims)
	if err != nil {
		return Identity{}, errors.New("malformed claims")
	}
	if typ != "at+jwt" && (claims.Nonce != nil || claims.AccessHash != nil || claims.CodeHash != nil || claims.Events != nil) {
		return Identity{}, errors.New("it is an ID token or a logout token, no access token")
	}
	// "The issuer identifier for the authorization server [...] MUST exactly match
	// the value of the "iss" claim."
	if claims.Issuer != b.login.Issuer {
		return Identity{}, errors.New("it comes from another issuer")
	}
	// "The resource server MUST validate the signature of all incoming JWT access
	// tokens [...] using the algorithm specified in the JWT "alg" Header Parameter.
	// The resource server MUST reject any JWT in which the value of "alg" is "none".
	// The resource server MUST use the keys provided by the authorization server."
	if err := oidc.CheckSignature(ctx, token, payload, &claims, signatures, b.keys); err != nil {
		return Identity{}, fmt.Errorf("verifying the signature: %w", err)
	}
	if claims.Expires == 0 {
		return Identity{}, errors.New("it has no exp")
	}
	return b.identify(payload, &claims)
}

// identify checks what JWTs and introspections have in common, and says who it
// is. claims have been read from document.
func (b *Broker) identify(document []byte, claims *bearerClaims) (Identity, error) {
	now := b.now()
	// RFC 9068 section 4: "The resource server MUST validate that the "aud" claim
	// contains a resource indicator value corresponding to an identifier the
	// resource server expects for itself." MCP authorization: servers "MUST reject
	// tokens that were not issued for them".
	if !slices.Contains(audience(claims.Audience), b.audience) {
		return Identity{}, errors.New("it is not for this gateway: gateway.auth.audience is not in its aud")
	}
	for _, seconds := range []float64{claims.Expires, claims.NotBefore, claims.IssuedAt} {
		if !(seconds >= 0 && seconds < 1<<40) {
			return Identity{}, errors.New("malformed claims")
		}
	}
	expires := now.Add(opaqueKept)
	if claims.Expires != 0 {
		// "The current time MUST be before the time represented by the "exp" claim."
		if expires = numericDate(claims.Expires); !now.Before(expires) {
			return Identity{}, errors.New("it has expired")
		}
	}
	// RFC 7519 sections 4.1.5 and 4.1.6.
	if latest := now.Add(clocksDiffer); numericDate(max(claims.NotBefore, claims.IssuedAt)).After(latest) {
		return Identity{}, errors.New("it is not valid yet")
	}
	// RFC 7800, as of RFC 8705 and RFC 9449: it is good only together with a proof
	// that is not asked for here, so it was not meant to be sent like this.
	if claims.Bound != nil {
		return Identity{}, errors.New("it is bound to a key, and came as a bearer token")
	}
	p, err := b.principal(document)
	return Identity{Principal: p, Expires: expires}, err
}

// principal is whom a verified token is about.
func (b *Broker) principal(claims []byte) (Principal, error) {
	var all map[string]json.RawMessage
	if err := json.Unmarshal(claims, &all); err != nil {
		return Principal{}, errors.New("malformed claims")
	}
	var values []string
	length := 0
	for _, name := range b.identityClaims {
		var value string
		if err := json.Unmarshal(all[name], &value); err != nil || value == "" {
			return Principal{}, fmt.Errorf("it has no %s, which gateway.auth.identityClaims names", name)
		}
		values = append(values, value)
		length += len(value)
	}
	if length > maxSubject {
		return Principal{}, errors.New("what identifies its subject is too long")
	}
	if len(values) == 1 {
		return Principal{Issuer: b.login.Issuer, Subject: values[0]}, nil
	}
	// Unambiguous whatever the values hold.
	joined, err := json.Marshal(values)
	return Principal{Issuer: b.login.Issuer, Subject: string(joined)}, err
}

// numericDate is a NumericDate of RFC 7519 section 2.
func numericDate(seconds float64) time.Time { return time.Unix(int64(seconds), 0) }

// audience reads an aud: RFC 7519 section 4.1.3, "an array of case-sensitive
// strings", or the only one itself.
func audience(raw json.RawMessage) []string {
	var one string
	if json.Unmarshal(raw, &one) == nil && one != "" {
		return []string{one}
	}
	var many []string
	if json.Unmarshal(raw, &many) != nil {
		return nil
	}
	return many
}

// errInactive: the provider has answered, and does not vouch for the token.
var errInactive = errors.New("the provider says that it is not active")

// introspect asks the provider about a token that says nothing by itself.
// RFC 7662.
func (b *Broker) introspect(ctx context.Context, token string) (Identity, error) {
	meta, err := b.discoverer.issuer(ctx, b.login, b.login.Issuer, nil)
	if err != nil {
		return Identity{}, fmt.Errorf("looking for the provider's introspection endpoint: %w", err)
	}
	at := meta.IntrospectionEndpoint.value
	if at == "" || b.login.ClientSecret.IsEmpty() {
		// Section 4: the endpoint MUST require authentication.
		return Identity{}, errors.New("it is no JWT, and there is no introspection: the provider has no endpoint for it, or gateway.auth no clientSecret")
	}
	waiting, cancel := context.WithTimeout(ctx, b.inbound.wait)
	leave, err := b.inbound.gates.Of(at).Enter(waiting)
	cancel()
	if err != nil {
		return Identity{}, fmt.Errorf("asking the provider: %w", err)
	}
	document, unwell, err := b.askAbout(ctx, at, meta, token)
	// A request that is cut off from here says nothing of the provider.
	leave(gate.Verdict{Unwell: unwell, Nothing: err != nil && ctx.Err() != nil})
	if err != nil {
		return Identity{}, fmt.Errorf("asking the provider: %w", err)
	}
	var claims bearerClaims
	if tooDeep(document) || json.Unmarshal(document, &claims) != nil {
		return Identity{}, errors.New("the provider's answer is not the JSON that it should be")
	}
	switch {
	case !claims.Active:
		return Identity{}, errInactive
	case claims.Issuer != "" && claims.Issuer != b.login.Issuer:
		return Identity{}, fmt.Errorf("%w: it comes from another issuer", errInactive)
	case claims.TokenType != "" && !strings.EqualFold(claims.TokenType, "Bearer"):
		return Identity{}, fmt.Errorf("%w: its type is not Bearer", errInactive)
	}
	identity, err := b.identify(document, &claims)
	if err != nil {
		return Identity{}, fmt.Errorf("%w: %w", errInactive, err)
	}
	return identity, nil
}

// askAbout makes the request of RFC 7662 section 2.1.
func (b *Broker) askAbout(ctx context.Context, at string, meta *serverMetadata, token string) (document []byte, unwell bool, err error) {
	methods := meta.IntrospectionMethods.value
	if len(methods) == 0 {
		methods = meta.AuthMethods.value
	}
	form := url.Values{"token": {token}, "token_type_hint": {"access_token"}}
	resp, err := endpoint.Post(ctx, b.login.HTTP.Fetch(), at, b.loginClient(methods), form)
	if err != nil {
		return nil, true, err
	}
	defer resp.Body.Close()
	document, err = io.ReadAll(resp.Body)
	switch {
	case err != nil:
		return nil, true, endpoint.WithoutURL(err)
	case resp.StatusCode != http.StatusOK:
		return nil, resp.StatusCode >= 500 || resp.StatusCode == http.StatusTooManyRequests,
			fmt.Errorf("it answered with status %d", resp.StatusCode)
	case !isJSON(resp.Header.Get("Content-Type")):
		return nil, false, errors.New("it did not answer with JSON")
	}
	return document, false, nil
}

// seen returns what is known of a token.
func (i *inbound) seen(sum [sha256.Size]byte, now time.Time) (seenBearer, bool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if seen, ok := i.accepted.get(sum, now); ok {
		return seen, true
	}
	return i.refused.get(sum, now)
}

// vouchedFor reports whether a token has been good lately, if perhaps no more.
func (i *inbound) vouchedFor(sum [sha256.Size]byte) bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	_, young := i.accepted.young[sum]
	_, older := i.accepted.older[sum]
	return young || older
}

func (i *inbound) keep(sum [sha256.Size]byte, seen seenBearer) {
	if seen.until.IsZero() {
		return
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if seen.err != nil {
		i.refused.put(sum, seen)
	} else {
		i.accepted.put(sum, seen)
	}
}

func (g *generations) get(sum [sha256.Size]byte, now time.Time) (seenBearer, bool) {
	seen, ok := g.young[sum]
	if !ok {
		if seen, ok = g.older[sum]; ok && now.Before(seen.until) {
			g.put(sum, seen)
		}
	}
	return seen, ok && now.Before(seen.until)
}

func (g *generations) put(sum [sha256.Size]byte, seen seenBearer) {
	if g.young == nil || len(g.young) >= maxKnown/2 {
		g.older, g.young = g.young, make(map[[sha256.Size]byte]seenBearer)
	}
	g.young[sum] = seen
}
