package auth

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"gatehouse/auth/endpoint"
	"gatehouse/auth/guard"
	"gatehouse/auth/secret"
)

// Where a client id comes from.
const (
	sourceConfigured = "configured"
	sourceCIMD       = "cimd"
	sourceDynamic    = "dynamic"
)

// Ways to authenticate at a token endpoint, by their registered names.
const (
	methodNone  = endpoint.MethodNone
	methodBasic = endpoint.MethodBasic
	methodPost  = endpoint.MethodPost
)

const (
	minRegistrationWait = 30 * time.Second // after the first failure, doubling
	maxRegistrationWait = 10 * time.Minute // of our own; a Retry-After may ask for more

	maxClientLength = 4 << 10 // of a client id and of a client secret
)

// registration is a client at an authorization server.
type registration struct {
	Issuer       string
	RedirectURI  string
	ClientID     string
	ClientSecret secret.Text // empty: a public client
	AuthMethod   string      // at the token endpoint
	Source       string      // sourceConfigured, sourceCIMD or sourceDynamic
	Expires      time.Time   // of the client secret; zero: never
}

// registrar finds a client for a sign-in. Dynamic registrations are kept in the
// store and shared by all principals.
type registrar struct {
	publicURL, callbackPath       string
	clientName, clientMetadataURL string
	metadataPath                  string
	scopes                        []string // of the metadata document
	remotes                       []string // names, in the config's order
	store                         Store
	log                           *slog.Logger
	now                           func() time.Time

	mu       sync.Mutex // guards attempts and their users
	attempts map[string]*attempt
}

// attempt is what is known of registering under one key, while somebody is at
// it and after a failure.
type attempt struct {
	users int
	turn  chan struct{} // held by the one who registers; guards what follows
	fails int
	retry time.Time // not before
	last  *documentError
}

// newRegistrar expects a config that [New] has checked and completed.
func newRegistrar(c Config) *registrar {
	g := &registrar{
		publicURL:         c.PublicURL,
		callbackPath:      c.CallbackPath,
		clientName:        c.ClientName,
		clientMetadataURL: c.ClientMetadataURL,
		metadataPath:      c.MetadataPath,
		scopes:            c.ClientScopes,
		store:             c.Store,
		log:               c.Log,
		now:               c.Now,
		attempts:          map[string]*attempt{},
	}
	for _, r := range c.Remotes {
		g.remotes = append(g.remotes, r.Name)
	}
	return g
}

// register finds a client for the remote at its authorization server. MCP
// client registration: "1. Use pre-registered client information for the
// server if the client has it available. 2. Use Client ID Metadata Documents if
// the Authorization Server indicates support [...] 3. Use Dynamic Client
// Registration as a fallback [...] 4. Prompt the user to enter the client
// information if no other option is available".
func (g *registrar) register(ctx context.Context, r *Remote, d *discovered, step func(Step)) (*registration, error) {
	if step == nil {
		step = func(Step) {}
	}
	if reg, err := g.unasked(r, d, step); reg != nil || err != nil {
		return reg, err
	}
	return g.dynamic(ctx, r, d, step)
}

// unasked finds a client without asking the authorization server for one. Nil
// and no error: that is what is left to do.
func (g *registrar) unasked(r *Remote, d *discovered, step func(Step)) (*registration, error) {
	switch {
	case r.ClientID != "":
		return g.preRegistered(r, d, step)
	case d.CIMD && g.hasDocument():
		return g.byDocument(r, d, step), nil
	case d.CIMD:
		step(Step{What: "client id metadata document", Note: "the server cannot fetch it: set gateway.publicUrl to an https URL, or gateway.oauth.clientMetadataUrl"})
	}
	if d.RegistrationEndpoint != "" {
		return nil, nil
	}
	step(Step{What: "client registration", Note: "not offered"})
	return nil, &Error{Kind: KindRegistration, Remote: r.Name, Say: fmt.Sprintf(
		"its authorization server %s lets no client register itself: %s", origin(d.Issuer), g.byHand(r))}
}

// noOAuth is what to do about a remote that answered 401 and publishes nothing:
// it is more likely to want a key than to be of 2025-03-26.
const noOAuth = "if it wants an API key, check headers.Authorization of the remote in the config; if it does sign in by OAuth, set auth.issuer and auth.clientId"

// byHand says what a person can do where nothing else is left.
func (g *registrar) byHand(r *Remote) string {
	return "register one there by hand with the redirect URI " + g.plainRedirect(r) +
		" and set auth.clientId, and auth.clientSecret if it gets one, of the remote in the config"
}

// plainRedirect is the redirect URI of a client that was registered by hand.
func (g *registrar) plainRedirect(r *Remote) string {
	return g.publicURL + cmp.Or(r.CallbackPath, g.callbackPath)
}

// ownRedirect is the redirect URI of a remote. That each has its own keeps a
// response of one authorization server from passing for another's (RFC 9700
// section 4.4.2).
func (g *registrar) ownRedirect(remote string) string {
	return g.publicURL + g.callbackPath + "/" + url.PathEscape(remote)
}

func (g *registrar) preRegistered(r *Remote, d *discovered, step func(Step)) (*registration, error) {
	method := r.TokenEndpointAuthMethod
	if method == "" {
		if r.ClientSecret.IsEmpty() {
			method = methodNone
		} else if method = secretMethod(d.AuthMethods); method == "" {
			return nil, &Error{Kind: KindRegistration, Remote: r.Name, Say: fmt.Sprintf(
				"its authorization server %s lists no way of authenticating with a client secret: ask its operator, or set the remote's auth.tokenEndpointAuthMethod", origin(d.Issuer))}
		}
	}
	step(Step{What: "client", OK: true, Note: "from the config, " + method})
	return &registration{
		Issuer:       d.Issuer,
		RedirectURI:  g.plainRedirect(r),
		ClientID:     r.ClientID,
		ClientSecret: r.ClientSecret,
		AuthMethod:   method,
		Source:       sourceConfigured,
	}, nil
}

// secretMethod chooses how to send a secret. RFC 8414 section 2, of
// token_endpoint_auth_methods_supported: "If omitted, the default is
// "client_secret_basic"".
func secretMethod(listed []string) string {
	switch {
	case len(listed) == 0, slices.Contains(listed, methodBasic):
		return methodBasic
	case slices.Contains(listed, methodPost):
		return methodPost
	}
	return ""
}

// hasDocument reports whether an authorization server can fetch a metadata
// document of ours. Its URL "MUST use the "https" scheme".
func (g *registrar) hasDocument() bool {
	return g.clientMetadataURL != "" || strings.HasPrefix(g.publicURL, "https://")
}

func (g *registrar) documentURL() string {
	return cmp.Or(g.clientMetadataURL, g.publicURL+g.metadataPath)
}

func (g *registrar) byDocument(r *Remote, d *discovered, step func(Step)) *registration {
	step(Step{What: "client id metadata document", URL: withoutQuery(g.documentURL()), OK: true})
	return &registration{
		Issuer:      d.Issuer,
		RedirectURI: g.ownRedirect(r.Name),
		ClientID:    g.documentURL(),
		AuthMethod:  methodNone,
		Source:      sourceCIMD,
	}
}

// clientMetadata is RFC 7591 section 2, in a registration request and, with
// the client id, in the metadata document.
type clientMetadata struct {
	ClientID        string   `json:"client_id,omitempty"`
	ClientName      string   `json:"client_name"`
	ApplicationType string   `json:"application_type"`
	RedirectURIs    []string `json:"redirect_uris"`
	GrantTypes      []string `json:"grant_types"`
	ResponseTypes   []string `json:"response_types"`
	AuthMethod      string   `json:"token_endpoint_auth_method"`
	Scope           string   `json:"scope,omitempty"`
}

func (g *registrar) metadata(method string, redirects ...string) clientMetadata {
	return clientMetadata{
		ClientName: g.clientName,
		// MCP client registration: native for clients with redirect URIs on
		// loopback, web for those with https ones.
		ApplicationType: applicationType(g.publicURL),
		RedirectURIs:    redirects,
		GrantTypes:      []string{"authorization_code", "refresh_token"},
		ResponseTypes:   []string{"code"},
		AuthMethod:      method,
	}
}

func applicationType(publicURL string) string {
	u, err := url.Parse(publicURL)
	if err != nil {
		return "web"
	}
	ip, err := netip.ParseAddr(u.Hostname())
	if err == nil && ip.IsLoopback() || strings.EqualFold(u.Hostname(), "localhost") {
		return "native"
	}
	return "web"
}

// document returns the gateway's Client ID Metadata Document. "The client_id
// in the document MUST match the document URL exactly."
func (g *registrar) document() []byte {
	var redirects []string
	for _, name := range g.remotes {
		redirects = append(redirects, g.ownRedirect(name))
	}
	redirects = append(redirects, g.publicURL+g.callbackPath)
	m := g.metadata(methodNone, redirects...)
	m.ClientID = g.documentURL()
	m.Scope = strings.Join(g.scopes, " ")
	return encodeJSON(m)
}

// encodeJSON leaves & and < as they are, unlike [json.Marshal]: they are in
// URLs, and these are compared byte by byte.
func encodeJSON(m clientMetadata) []byte {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	// Strings and lists of strings always encode.
	_ = e.Encode(m)
	return b.Bytes()
}

// dynamic returns the stored registration, or makes one. However many ask at
// once, one request is under way for an issuer and redirect URI, and after a
// failure there is none until some time has passed.
func (g *registrar) dynamic(ctx context.Context, r *Remote, d *discovered, step func(Step)) (*registration, error) {
	const what = "dynamic registration"
	shown := withoutQuery(d.RegistrationEndpoint)
	redirect := g.ownRedirect(r.Name)
	key := registrationKey(d.Issuer, redirect)
	a, err := g.begin(ctx, key)
	if err != nil {
		return nil, err
	}
	defer g.end(key, a)

	reg, err := g.stored(ctx, d.Issuer, redirect)
	if err != nil {
		return nil, internalError(r.Name, err)
	} else if reg != nil {
		step(Step{What: what, URL: shown, OK: true, Note: "registered already, " + reg.AuthMethod})
		return reg, nil
	}
	if wait := a.retry.Sub(g.now()); wait > 0 {
		step(Step{What: what, URL: shown, Note: a.last.what + "; waiting before the next attempt"})
		return nil, g.refused(r, d, a.last)
	}
	reg, failure := g.post(ctx, r, d, redirect)
	if failure != nil {
		step(Step{What: what, URL: shown, Note: failure.what})
		if errors.Is(ctx.Err(), context.Canceled) {
			return nil, ctx.Err() // our own doing
		}
		wait := min(minRegistrationWait<<min(a.fails, 10), maxRegistrationWait)
		a.fails++
		a.retry, a.last = g.now().Add(max(wait, endpoint.RetryAfter(failure.retry, g.now()))), failure
		return nil, g.refused(r, d, failure)
	}
	a.fails, a.retry, a.last = 0, time.Time{}, nil
	step(Step{What: what, URL: shown, OK: true, Note: reg.AuthMethod})
	if err := g.save(ctx, reg); err != nil {
		return nil, internalError(r.Name, err)
	}
	g.log.InfoContext(ctx, "registered as a client", "remote", r.Name, "issuer", origin(d.Issuer), "method", reg.AuthMethod)
	return reg, nil
}

// refused makes the sentence for a failed registration.
func (g *registrar) refused(r *Remote, d *discovered, e *documentError) *Error {
	server := origin(d.Issuer)
	kind, advice := KindRegistration, g.byHand(r)
	switch {
	case d.NoPKCEMetadata && !e.transient():
		return &Error{Kind: kind, Remote: r.Name, Err: e, Say: "it refuses the request and does not say how to sign in: " + noOAuth}
	case errors.Is(e, guard.ErrBlocked):
		advice = e.remedy()
	case e.transient():
		kind, advice = KindUnavailable, "the gateway tries again in a while; or "+advice
	}
	return &Error{Kind: kind, Remote: r.Name, Err: e,
		Say: fmt.Sprintf("registering as a client at its authorization server %s failed, the request %s: %s", server, e.what, advice)}
}

// begin waits for the turn to register under the key.
func (g *registrar) begin(ctx context.Context, key string) (*attempt, error) {
	g.mu.Lock()
	a := g.attempts[key]
	if a == nil {
		a = &attempt{turn: make(chan struct{}, 1)}
		g.attempts[key] = a
	}
	a.users++
	g.mu.Unlock()
	select {
	case a.turn <- struct{}{}:
		return a, nil
	case <-ctx.Done():
		g.leave(key, a)
		return nil, ctx.Err()
	}
}

// end gives the turn back.
func (g *registrar) end(key string, a *attempt) {
	g.mu.Lock()
	defer g.mu.Unlock()
	<-a.turn
	g.leaveLocked(key, a)
}

func (g *registrar) leave(key string, a *attempt) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.leaveLocked(key, a)
}

// leaveLocked forgets an attempt that nobody needs, and old failures with it.
func (g *registrar) leaveLocked(key string, a *attempt) {
	if a.users--; a.users > 0 {
		return
	}
	if a.fails == 0 {
		delete(g.attempts, key)
	}
	old := g.now().Add(-endpoint.MaxRetryAfter)
	for key, a := range g.attempts {
		if a.users == 0 && a.retry.Before(old) {
			delete(g.attempts, key)
		}
	}
}

// registrationAnswer is what matters of RFC 7591 section 3.2.1.
type registrationAnswer struct {
	ClientID      once[string]      `json:"client_id"`
	ClientSecret  once[string]      `json:"client_secret"`
	SecretExpires once[json.Number] `json:"client_secret_expires_at"`
	AuthMethod    once[string]      `json:"token_endpoint_auth_method"`
}

// post makes one registration request. Nothing of the answer's own text is in
// the error: it is a stranger's, and could hold a secret.
func (g *registrar) post(ctx context.Context, r *Remote, d *discovered, redirect string) (*registration, *documentError) {
	if err := checkEndpoint(r.HTTP, d.RegistrationEndpoint); err != nil {
		return nil, &documentError{what: "leads to an address that the gateway may not reach", err: err}
	}
	method := methodNone
	if !slices.Contains(d.AuthMethods, methodNone) {
		if method = secretMethod(d.AuthMethods); method == "" {
			return nil, &documentError{what: "was not sent, since the server lists no way of authenticating that Gatehouse knows"}
		}
	}
	body := encodeJSON(g.metadata(method, redirect))
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, d.RegistrationEndpoint, bytes.NewReader(body))
	if err != nil {
		return nil, &documentError{what: "was not sent, since the endpoint is no URL"}
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Accept", "application/json")
	// RFC 7591 section 3.2.1 says 201; some servers say 200.
	answer, failure := doDocument[registrationAnswer](r.HTTP, req, http.StatusCreated, http.StatusOK)
	if failure != nil {
		switch {
		case failure.cut:
			failure.what = "got no answer"
		case failure.status == http.StatusCreated, failure.status == http.StatusOK:
			failure.what = "was answered with what " + failure.what
		}
		return nil, failure
	}
	return g.accept(answer, d, redirect, method)
}

// accept checks an answer to a registration request that asked for a method.
func (g *registrar) accept(answer *registrationAnswer, d *discovered, redirect, asked string) (*registration, *documentError) {
	refuse := func(what string) (*registration, *documentError) { return nil, &documentError{what: what} }
	id, clientSecret := answer.ClientID.value, answer.ClientSecret.value
	switch {
	case id == "":
		return refuse("was answered without a client_id")
	case !printableASCII(id), !printableASCII(clientSecret):
		return refuse("was answered with a client_id or client_secret that holds characters it may not")
	}
	// RFC 7591 section 3.2.1: the server "MAY reject or replace any of the
	// client's requested metadata values": its method counts, not ours.
	method := cmp.Or(answer.AuthMethod.value, asked)
	if clientSecret == "" {
		method = methodNone // nothing to authenticate with
	} else if answer.AuthMethod.value == "" && method == methodNone {
		method = cmp.Or(secretMethod(d.AuthMethods), methodBasic)
	}
	switch method {
	case methodNone, methodBasic, methodPost:
	default:
		return refuse("was answered with a way of authenticating that Gatehouse does not know")
	}
	reg := &registration{
		Issuer:      d.Issuer,
		RedirectURI: redirect,
		ClientID:    id,
		AuthMethod:  method,
		Source:      sourceDynamic,
	}
	if method != methodNone {
		reg.ClientSecret = secret.New(clientSecret)
		// "client_secret_expires_at [...] or 0 if it will not expire".
		if text := answer.SecretExpires.value.String(); text != "" && text != "0" {
			at, err := strconv.ParseFloat(text, 64)
			if err != nil || at < 0 || at > 1<<40 {
				return refuse("was answered with a client_secret_expires_at that is no time")
			}
			if at > 0 {
				reg.Expires = time.Unix(int64(at), 0)
				if !g.now().Before(reg.Expires) {
					return refuse("was answered with a client secret that has expired")
				}
			}
		}
	}
	return reg, nil
}

// printableASCII: RFC 6749 appendix A.1 and A.2, client ids and secrets are
// *VSCHAR, which includes the space.
func printableASCII(s string) bool {
	for i := range len(s) {
		if s[i] < ' ' || s[i] > '~' {
			return false
		}
	}
	return len(s) <= maxClientLength
}

func registrationKey(issuer, redirect string) string { return hash("registration", issuer, redirect) }

// registrationRecord is a dynamic registration in the store, which is where
// secrets may be in the clear.
type registrationRecord struct {
	Issuer       string    `json:"issuer"`
	RedirectURI  string    `json:"redirectUri"`
	ClientID     string    `json:"clientId"`
	ClientSecret string    `json:"clientSecret,omitempty"`
	AuthMethod   string    `json:"authMethod"`
	Expires      time.Time `json:"expires,omitzero"`
}

// stored returns the registration in the store, nil if there is none.
func (g *registrar) stored(ctx context.Context, issuer, redirect string) (*registration, error) {
	record, err := g.store.Get(ctx, bucketRegistrations, registrationKey(issuer, redirect))
	if errors.Is(err, ErrNotFound) {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("reading a registration: %w", err)
	}
	var v registrationRecord
	if err := json.Unmarshal(record.Value, &v); err != nil {
		return nil, fmt.Errorf("decoding a registration: %w", err)
	}
	// MCP client registration: credentials are bound to the issuer that gave them.
	if v.Issuer != issuer || v.RedirectURI != redirect {
		return nil, errors.New("a registration is stored under the key of another")
	}
	return &registration{
		Issuer:       v.Issuer,
		RedirectURI:  v.RedirectURI,
		ClientID:     v.ClientID,
		ClientSecret: secret.New(v.ClientSecret),
		AuthMethod:   v.AuthMethod,
		Source:       sourceDynamic,
		Expires:      v.Expires,
	}, nil
}

func (g *registrar) save(ctx context.Context, reg *registration) error {
	value, err := json.Marshal(registrationRecord{
		Issuer:       reg.Issuer,
		RedirectURI:  reg.RedirectURI,
		ClientID:     reg.ClientID,
		ClientSecret: reg.ClientSecret.Value(),
		AuthMethod:   reg.AuthMethod,
		Expires:      reg.Expires,
	})
	if err != nil {
		return fmt.Errorf("encoding a registration: %w", err)
	}
	_, err = g.store.Put(ctx, bucketRegistrations, registrationKey(reg.Issuer, reg.RedirectURI), value, AnyVersion, reg.Expires)
	if err != nil {
		return fmt.Errorf("storing a registration: %w", err)
	}
	return nil
}

// invalidate forgets a dynamic registration that the authorization server has
// disowned, unless it has been replaced already. The next flow registers anew.
func (g *registrar) invalidate(ctx context.Context, reg *registration) {
	if reg.Source != sourceDynamic {
		return
	}
	key := registrationKey(reg.Issuer, reg.RedirectURI)
	a, err := g.begin(ctx, key)
	if err != nil {
		return
	}
	defer g.end(key, a)
	now, err := g.stored(ctx, reg.Issuer, reg.RedirectURI)
	if err == nil && now != nil && now.ClientID == reg.ClientID {
		err = g.store.Delete(ctx, bucketRegistrations, key)
	}
	if err != nil {
		g.log.WarnContext(ctx, "forgetting a client registration failed", "issuer", origin(reg.Issuer), "error", err)
	}
}
