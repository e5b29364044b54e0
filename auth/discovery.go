package auth

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"gatehouse/auth/guard"
)

const (
	metadataLife     = 5 * time.Minute
	maxCachedServers = 1000
	maxServers       = 10 // of a resource's authorization_servers, how many are tried
)

// Step is one thing that was tried on the way to a sign-in.
type Step struct {
	What string
	URL  string // without query
	OK   bool
	Note string // what was found, or why not
}

// discovered is what a flow freezes when it starts.
type discovered struct {
	Resource string // the resource parameter of RFC 8707

	Issuer                string
	AuthorizationEndpoint string
	TokenEndpoint         string
	RegistrationEndpoint  string // empty: none
	RevocationEndpoint    string // empty: none

	IssParameter bool     // RFC 9207: authorization responses carry iss
	CIMD         bool     // client ids may be URLs of metadata documents
	AuthMethods  []string // token_endpoint_auth_methods_supported; nil: not said

	ScopesSupported []string // of the remote
	ASScopes        []string // of the authorization server

	// NoPKCEMetadata: the remote publishes nothing at all, and the endpoints are
	// those that MCP 2025-03-26 prescribes. Whether the server does PKCE is
	// unknown; it is asked for as ever.
	NoPKCEMetadata bool
}

// discoverer finds out how to sign in to a remote. It keeps the metadata of
// authorization servers for five minutes, failures never.
type discoverer struct {
	log *slog.Logger
	now func() time.Time

	mu     sync.Mutex // guards what follows
	cache  map[serverKey]cachedServer
	warned map[string]bool // remotes whose missing metadata has been logged
}

// serverKey holds the client because what one remote may reach, another may not.
type serverKey struct {
	issuer  string
	spec    bool // see walk.server
	browser bool // what a browser's visit needs has been checked
	http    *guard.Client
}

type cachedServer struct {
	meta    *serverMetadata
	expires time.Time
}

func newDiscoverer(log *slog.Logger, now func() time.Time) *discoverer {
	return &discoverer{log: log, now: now, cache: map[serverKey]cachedServer{}, warned: map[string]bool{}}
}

// discover walks from the remote's challenge, which may be the zero value, to
// the endpoints of its authorization server. Each thing tried is told to step,
// if there is one. The error is an [Error], or the context's.
func (d *discoverer) discover(ctx context.Context, r *Remote, ch challenge, step func(Step)) (*discovered, error) {
	if step == nil {
		step = func(Step) {}
	}
	base, err := url.Parse(r.URL)
	if err != nil || base.Host == "" {
		return nil, &Error{Kind: KindInternal, Remote: r.Name, Say: "its url in the config is not a URL"}
	}
	w := &walk{discoverer: d, r: r, bound: cmp.Or(r.Issuer, r.pinned), base: base, step: step, browser: r.browser()}
	found, err := w.run(ctx, ch)
	if err != nil && ctx.Err() != nil {
		return nil, ctx.Err()
	}
	return found, err
}

// walk is one run of a discovery.
type walk struct {
	*discoverer
	r     *Remote
	bound string   // the issuer to be found; empty: any
	base  *url.URL // of the remote
	step  func(Step)

	browser bool // a person is to visit the authorization server
}

// issuer returns the metadata of an authorization server that the config names,
// as far as r may reach it, for requests that need no browser.
func (d *discoverer) issuer(ctx context.Context, r *Remote, issuer string, step func(Step)) (*serverMetadata, error) {
	if step == nil {
		step = func(Step) {}
	}
	w := &walk{discoverer: d, r: r, step: step}
	return w.server(ctx, issuer, true)
}

func (w *walk) run(ctx context.Context, ch challenge) (*discovered, error) {
	if w.r.login {
		// An OpenID provider for the gateway itself: there is no resource.
		meta, err := w.server(ctx, w.r.Issuer, true)
		if err != nil {
			return nil, err
		}
		return meta.discovered(), nil
	}
	doc, err := w.protectedResource(ctx, ch)
	if err != nil {
		return nil, err
	}
	if doc == nil {
		return w.withoutDocument(ctx)
	}
	meta, err := w.anyServer(ctx, doc.AuthorizationServers.value)
	if err != nil {
		return nil, err
	}
	found := meta.discovered()
	found.Resource = doc.Resource.value
	found.ScopesSupported = unionScopes(doc.ScopesSupported.value)
	return found, nil
}

func (w *walk) fail(kind Kind, err error, format string, args ...any) *Error {
	return &Error{Kind: kind, Remote: w.r.Name, Say: fmt.Sprintf(format, args...), Err: err}
}

// resourceDocument is what matters of RFC 9728 section 2.
type resourceDocument struct {
	Resource             once[string]   `json:"resource"`
	AuthorizationServers once[[]string] `json:"authorization_servers"`
	ScopesSupported      once[[]string] `json:"scopes_supported"`
}

// place is where a document may be.
type place struct {
	what      string
	address   string
	announced bool // by the challenge
	root      bool // of the origin: it may speak for the origin
}

// resourcePlaces: MCP authorization server discovery: clients "MUST support
// both discovery mechanisms and use the resource metadata URL from the parsed
// WWW-Authenticate headers when present; otherwise, they MUST fall back to
// constructing and requesting the well-known URIs in the order": at the path
// of the MCP endpoint, at the root.
func (w *walk) resourcePlaces(ch challenge) []place {
	const wellKnown = "/.well-known/oauth-protected-resource"
	const what = "protected resource document"
	places := []place{{what: what + ", at the root", address: origin(w.r.URL) + wellKnown, root: true}}
	if path := w.base.EscapedPath(); path != "" && path != "/" || w.base.RawQuery != "" {
		// RFC 9728 section 3.1: the well-known string is inserted "between the
		// host component and the path and/or query components".
		if path == "/" {
			path = ""
		}
		address := origin(w.r.URL) + wellKnown + path
		if w.base.RawQuery != "" {
			address += "?" + w.base.RawQuery
		}
		places = slices.Insert(places, 0, place{what: what + ", by the remote's path", address: address})
	}
	if ch.ResourceMetadata != "" {
		announced := place{what: what + ", from the challenge", address: ch.ResourceMetadata, announced: true}
		if i := slices.IndexFunc(places, func(p place) bool { return p.address == ch.ResourceMetadata }); i >= 0 {
			announced.root = places[i].root
			places = slices.Delete(places, i, i+1)
		}
		places = slices.Insert(places, 0, announced)
	}
	return places
}

// protectedResource finds the remote's RFC 9728 document. It returns nil
// without an error if there is none: neither announced nor at a well-known
// place.
func (w *walk) protectedResource(ctx context.Context, ch challenge) (*resourceDocument, error) {
	var worst *Error
	for _, p := range w.resourcePlaces(ch) {
		doc, err := w.resourceAt(ctx, p)
		if err == nil {
			w.step(Step{What: p.what, URL: withoutQuery(p.address), OK: true, Note: "for this remote"})
			return doc, nil
		}
		w.step(Step{What: p.what, URL: withoutQuery(p.address), Note: err.what})
		if err.absent() && !p.announced {
			continue
		}
		where := withoutQuery(p.address)
		if p.announced {
			where = shownOrigin(w.r.HTTP, p.address, "the URL in its challenge") // the rest of it is foreign
		}
		kind := KindDiscovery
		if err.transient() {
			kind = KindUnavailable
		}
		if worst == nil {
			worst = w.fail(kind, err, "its protected resource document at %s %s: %s", where, err.what, err.remedy())
		}
		// Another document could name another resource, and all grants with it:
		// not because a server was down for a moment.
		if err.transient() && !p.announced || ctx.Err() != nil {
			return nil, worst
		}
	}
	if worst != nil {
		return nil, worst
	}
	return nil, nil
}

// shownOrigin returns the origin of a foreign URL, otherwise if that cannot be
// shown.
func shownOrigin(c *guard.Client, address, otherwise string) string {
	if checkEndpoint(c, address) != nil {
		return otherwise
	}
	return origin(address)
}

// resourceAt fetches a document and checks that it is for this remote.
func (w *walk) resourceAt(ctx context.Context, p place) (*resourceDocument, *documentError) {
	if err := checkEndpoint(w.r.HTTP, p.address); err != nil {
		return nil, &documentError{what: "leads to an address that the gateway may not reach", err: err}
	}
	doc, err := getDocument[resourceDocument](ctx, w.r.HTTP, p.address)
	if err != nil {
		return nil, err
	}
	// RFC 9728 section 3.3: "If these values are not identical, the data
	// contained in the response MUST NOT be used."
	resource := doc.Resource.value
	switch {
	case resource == "":
		return nil, &documentError{what: "names no resource"}
	case sameResource(resource, w.r.URL):
	case p.root && sameResource(resource, origin(w.r.URL)):
	default:
		other := "another resource"
		if checkEndpoint(w.r.HTTP, resource) == nil {
			other += " (at " + origin(resource) + ")"
		}
		return nil, &documentError{
			what:   "is for " + other,
			advice: "the remote's url in the config must be exactly the one that the document names",
		}
	}
	return doc, nil
}

// sameResource reports whether two URLs name one resource. A bare origin is
// one with and without its slash, and RFC 3986 section 6.2 makes no difference
// of a host's case or a default port; nothing else is forgiven.
func sameResource(a, b string) bool {
	a, b = canonicalResource(a), canonicalResource(b)
	return a != "" && a == b
}

// canonicalResource is the configured URL as a resource parameter. RFC 8707
// section 2: "The URI MUST NOT include a fragment component"; MCP
// authorization asks for lower case in scheme and host and for no trailing
// slash where it means nothing.
func canonicalResource(address string) string {
	u, err := url.Parse(address)
	if err != nil || u.Host == "" || u.User != nil || u.Fragment != "" {
		return ""
	}
	u.Scheme, u.Host = strings.ToLower(u.Scheme), strings.ToLower(u.Host)
	if port := u.Port(); u.Scheme == "https" && port == "443" || u.Scheme == "http" && port == "80" {
		u.Host = strings.TrimSuffix(u.Host, ":"+port)
	}
	if u.Path == "/" && u.RawQuery == "" {
		u.Path = ""
	}
	return u.String()
}

// anyServer returns the metadata of the issuer that the remote is bound to if it
// lists that, otherwise of the first listed that has valid metadata.
func (w *walk) anyServer(ctx context.Context, listed []string) (*serverMetadata, error) {
	if w.bound != "" {
		if len(listed) > 0 && !slices.Contains(listed, w.bound) {
			return nil, w.strayed(listed[0])
		}
		listed = []string{w.bound}
	}
	if len(listed) == 0 {
		return nil, w.fail(KindDiscovery, nil,
			"its protected resource document lists no authorization server: ask its operator to correct that, or set the remote's auth.issuer")
	}
	var first error
	for _, issuer := range listed[:min(len(listed), maxServers)] {
		meta, err := w.server(ctx, issuer, true)
		if err == nil {
			return meta, nil
		}
		if first == nil {
			first = err
		}
		if ctx.Err() != nil {
			break
		}
	}
	return nil, first
}

// strayed: the remote names another authorization server than the one that it is
// bound to. That one is not asked for anything.
func (w *walk) strayed(to string) error {
	if w.r.Issuer != "" {
		return w.fail(KindDiscovery, nil,
			"its document does not list the configured issuer %s: correct the remote's auth.issuer, or ask its operator what has changed", origin(w.bound))
	}
	to = shownOrigin(w.r.HTTP, to, "at a URL that the gateway may not reach")
	w.log.Warn("a remote names another authorization server than before: it gets none of the gateway's credentials",
		"event", "issuer_changed", "remote", w.r.Name, "was", w.bound, "now", to)
	return w.fail(KindDiscovery, nil,
		"its document names another authorization server (%s) than the one where the gateway's client has been used (%s), so the gateway sends nothing there: ask its operator, and if the change is right, set the remote's auth.issuer", to, origin(w.bound))
}

// errAbsent: the server says of each place that nothing is there.
var errAbsent = errors.New("no metadata published")

// withoutDocument is discovery as of MCP 2025-03-26, for remotes without any
// protected resource document: "The authorization base URL MUST be determined
// from the MCP server URL by discarding any existing path component."
func (w *walk) withoutDocument(ctx context.Context) (*discovered, error) {
	base := origin(canonicalResource(w.r.URL))
	var meta *serverMetadata
	var err error
	if w.bound != "" {
		meta, err = w.server(ctx, w.bound, true)
	} else {
		meta, err = w.server(ctx, base, false)
	}
	var found *discovered
	switch {
	case err == nil:
		found = meta.discovered()
	case w.r.Issuer == "" && (w.bound == "" || w.bound == base) && errors.Is(err, errAbsent) && w.browser:
		found = w.defaultEndpoints(base)
	default:
		return nil, err
	}
	found.Resource = canonicalResource(w.r.URL)
	return found, nil
}

// warnDefaults says once for each remote that a sign-in goes by endpoints that
// nobody published.
func (d *discoverer) warnDefaults(remote string) {
	d.mu.Lock()
	again := d.warned[remote]
	d.warned[remote] = true
	d.mu.Unlock()
	if !again {
		d.log.Warn("remote publishes no OAuth metadata; assuming the default endpoints of MCP 2025-03-26, without knowing that its server does PKCE", "remote", remote)
	}
}

// defaultEndpoints: MCP 2025-03-26, authorization section 2.3.3: "For servers
// that do not implement OAuth 2.0 Authorization Server Metadata, clients MUST
// use the following default endpoint paths relative to the authorization base
// URL".
func (w *walk) defaultEndpoints(base string) *discovered {
	w.step(Step{What: "default endpoints of MCP 2025-03-26", URL: base, OK: true, Note: "assumed, since nothing is published; PKCE is used without knowing that the server checks it"})
	return &discovered{
		Issuer:                base,
		AuthorizationEndpoint: base + "/authorize",
		TokenEndpoint:         base + "/token",
		RegistrationEndpoint:  base + "/register",
		NoPKCEMetadata:        true,
	}
}

// serverMetadata is what matters of RFC 8414 section 2, RFC 9207 and the
// client id metadata draft.
type serverMetadata struct {
	Issuer                once[string]   `json:"issuer"`
	AuthorizationEndpoint once[string]   `json:"authorization_endpoint"`
	TokenEndpoint         once[string]   `json:"token_endpoint"`
	RegistrationEndpoint  once[string]   `json:"registration_endpoint"`
	RevocationEndpoint    once[string]   `json:"revocation_endpoint"`
	IntrospectionEndpoint once[string]   `json:"introspection_endpoint"`
	IntrospectionMethods  once[[]string] `json:"introspection_endpoint_auth_methods_supported"`
	JWKS                  once[string]   `json:"jwks_uri"`
	ChallengeMethods      once[[]string] `json:"code_challenge_methods_supported"`
	AuthMethods           once[[]string] `json:"token_endpoint_auth_methods_supported"`
	ScopesSupported       once[[]string] `json:"scopes_supported"`
	IssParameter          once[bool]     `json:"authorization_response_iss_parameter_supported"`
	CIMD                  once[bool]     `json:"client_id_metadata_document_supported"`
}

func (m *serverMetadata) discovered() *discovered {
	return &discovered{
		Issuer:                m.Issuer.value,
		AuthorizationEndpoint: m.AuthorizationEndpoint.value,
		TokenEndpoint:         m.TokenEndpoint.value,
		RegistrationEndpoint:  m.RegistrationEndpoint.value,
		RevocationEndpoint:    m.RevocationEndpoint.value,
		IssParameter:          m.IssParameter.value,
		CIMD:                  m.CIMD.value,
		AuthMethods:           slices.Clone(m.AuthMethods.value),
		ASScopes:              unionScopes(m.ScopesSupported.value),
	}
}

// serverPlaces: MCP authorization server discovery: clients "MUST attempt
// multiple well-known endpoints" in this order.
func serverPlaces(issuer string) []place {
	const (
		oauth  = "/.well-known/oauth-authorization-server"
		openid = "/.well-known/openid-configuration"

		oauthWhat  = "authorization server metadata (RFC 8414)"
		openidWhat = "authorization server metadata (OpenID Connect)"
	)
	u, err := url.Parse(issuer)
	if err != nil {
		return nil
	}
	base, path := origin(issuer), strings.TrimSuffix(u.EscapedPath(), "/")
	if path == "" {
		return []place{
			{what: oauthWhat, address: base + oauth},
			{what: openidWhat, address: base + openid},
		}
	}
	return []place{
		{what: oauthWhat, address: base + oauth + path},
		{what: openidWhat, address: base + openid + path},
		{what: openidWhat + ", appended", address: base + path + openid},
	}
}

// server returns the metadata of an authorization server, from the cache or
// from the first place that has it. With spec its issuer must be the one asked
// for, byte for byte; without, the issuer was not named by anybody but made
// from the remote's URL, and may have the slash that it lacks.
func (w *walk) server(ctx context.Context, issuer string, spec bool) (*serverMetadata, error) {
	// RFC 8414 section 2: the issuer is "a URL that uses the "https" scheme and
	// has no query or fragment components".
	if err := checkEndpoint(w.r.HTTP, issuer); err != nil || strings.Contains(issuer, "?") || origin(issuer) == "" {
		w.step(Step{What: "authorization server", Note: "named by a URL that the gateway may not reach"})
		return nil, w.fail(KindDiscovery, err,
			"it names an authorization server by a URL that the gateway may not reach: ask its operator to correct that, or list the address in the remote's allowAddresses if it is meant to be there")
	}
	key := serverKey{issuer, spec, w.browser, w.r.HTTP}
	if meta := w.cached(key); meta != nil {
		w.step(Step{What: "authorization server metadata", URL: issuer, OK: true, Note: "known already; " + meta.summary()})
		return meta, nil
	}

	var worst *documentError
	absent := true
	for _, p := range serverPlaces(issuer) {
		meta, err := w.serverAt(ctx, p, issuer, spec)
		if err == nil {
			w.step(Step{What: p.what, URL: p.address, OK: true, Note: meta.summary()})
			w.keep(key, meta)
			return meta, nil
		}
		w.step(Step{What: p.what, URL: p.address, Note: err.what})
		if !err.absent() {
			absent = false
			// A document that is there and wrong says more than a server that is down.
			if worst == nil || worst.transient() && !err.transient() {
				worst = err
			}
		}
		if ctx.Err() != nil || err.cut {
			break // the other places are on the same server
		}
	}
	server := origin(issuer)
	switch {
	case absent:
		return nil, w.fail(KindDiscovery, errAbsent,
			"its authorization server %s publishes no metadata (RFC 8414 or OpenID Connect): ask its operator to publish it", server)
	case worst.transient():
		return nil, w.fail(KindUnavailable, worst, "the metadata of its authorization server %s %s: %s", server, worst.what, worst.remedy())
	case errors.Is(worst.err, errPKCE):
		return nil, w.fail(KindDiscovery, worst, "its authorization server %s does not list S256 among code_challenge_methods_supported; %s", server, worst.advice)
	}
	return nil, w.fail(KindDiscovery, worst, "the metadata of its authorization server %s %s: %s", server, worst.what, worst.remedy())
}

// errPKCE marks the one flaw that is the server's and not its document's.
var errPKCE = errors.New("no S256")

// serverAt fetches a document and checks everything that is used of it.
func (w *walk) serverAt(ctx context.Context, p place, issuer string, spec bool) (*serverMetadata, *documentError) {
	meta, err := getDocument[serverMetadata](ctx, w.r.HTTP, p.address)
	if err != nil {
		return nil, err
	}
	// RFC 8414 section 3.3: "The "issuer" value returned MUST be identical to the
	// authorization server's issuer identifier value [...] If these values are
	// not identical, the data contained in the response MUST NOT be used."
	if got := meta.Issuer.value; got != issuer && (spec || got != issuer+"/") {
		return nil, &documentError{
			what:   "names another issuer",
			advice: "ask its operator to make the issuer in the metadata identical to the one that the remote names, letter by letter",
		}
	}
	for _, e := range []struct {
		name, value string
		required    bool
	}{
		{"authorization_endpoint", meta.AuthorizationEndpoint.value, w.browser},
		{"token_endpoint", meta.TokenEndpoint.value, true},
		{"registration_endpoint", meta.RegistrationEndpoint.value, false},
		{"revocation_endpoint", meta.RevocationEndpoint.value, false},
		{"introspection_endpoint", meta.IntrospectionEndpoint.value, false},
		{"jwks_uri", meta.JWKS.value, false},
	} {
		if e.value == "" {
			if e.required {
				return nil, &documentError{what: "has no " + e.name}
			}
			continue
		}
		if err := checkEndpoint(w.r.HTTP, e.value); err != nil {
			return nil, &documentError{what: "has an " + e.name + " that the gateway may not use", err: err}
		}
	}
	// MCP authorization, PKCE: "If code_challenge_methods_supported is absent, the
	// authorization server does not support PKCE and MCP clients MUST refuse to
	// proceed."
	if w.browser && !slices.Contains(meta.ChallengeMethods.value, "S256") {
		return nil, &documentError{
			what:   "does not list S256 among code_challenge_methods_supported",
			advice: "Gatehouse requires PKCE with S256: ask its operator to enable it",
			err:    errPKCE,
		}
	}
	return meta, nil
}

// summary is for a [Step]; it holds nothing of the document's text.
func (m *serverMetadata) summary() string {
	s := "no PKCE with S256"
	if slices.Contains(m.ChallengeMethods.value, "S256") {
		s = "PKCE with S256"
	}
	if m.CIMD.value {
		s += ", client id metadata documents"
	}
	if m.RegistrationEndpoint.value != "" {
		s += ", dynamic registration"
	}
	if m.RevocationEndpoint.value != "" {
		s += ", revocation"
	}
	if m.IssParameter.value {
		s += ", iss in responses"
	}
	return s
}

func (d *discoverer) cached(key serverKey) *serverMetadata {
	d.mu.Lock()
	defer d.mu.Unlock()
	c, ok := d.cache[key]
	if !ok || !d.now().Before(c.expires) {
		return nil
	}
	return c.meta
}

func (d *discoverer) keep(key serverKey, meta *serverMetadata) {
	d.mu.Lock()
	defer d.mu.Unlock()
	now := d.now()
	if len(d.cache) >= maxCachedServers {
		for k, c := range d.cache {
			if !now.Before(c.expires) {
				delete(d.cache, k)
			}
		}
		if len(d.cache) >= maxCachedServers {
			clear(d.cache)
		}
	}
	d.cache[key] = cachedServer{meta, now.Add(metadataLife)}
}
