package auth

import (
	"cmp"
	"context"
	"errors"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/oauth2"

	"gatehouse/auth/endpoint"
	"gatehouse/auth/gate"
	"gatehouse/auth/guard"
	"gatehouse/exchange"
)

// Ways of signing in to a remote, as the config names them.
const (
	TypeOAuth    = "oauth"             // the user's own sign-in at its authorization server
	TypeForward  = "forward"           // the token of the user's login at the gateway, as it is
	TypeExchange = "exchange"          // a token exchanged for that one (RFC 8693)
	TypeIDJAG    = "idJag"             // an identity assertion of the provider, for that one
	TypeMachine  = "clientCredentials" // the gateway's own credentials
)

// defaultScopes are asked for at an OpenID provider unless the config says
// otherwise.
var defaultScopes = []string{"openid", "profile", "email", "groups"}

// silent gets tokens for one remote without a person: by the gateway's own
// credentials, or by what the user's login at the gateway is good for. Tokens
// are kept by the exchanger; what is kept here is where they come from.
type silent struct {
	b *Broker
	r *Remote

	mu        sync.Mutex // guards what follows; never held over the network
	found     *found     // nil: not looked for yet
	doubted   bool       // found is looked for again when the next token is needed
	missed    missed
	searching *search // nil: nobody looks
	troubles  map[Principal]trouble
	raised    map[Principal]raised
	forced    map[Principal]time.Time // when a forwarded token was renewed because the remote refused it
}

// found is where a remote's tokens come from.
type found struct {
	target *exchange.Target
	issuer string // for display
	at     time.Time
}

// raised is what a principal's calls needed beyond what the remote asked for at
// first. It is one principal's: what the server grants to one it may refuse to
// another.
type raised struct {
	scopes []string
	times  map[string]int // by operation, see raise
}

// with is the target with more scopes.
func (f *found) with(scopes []string) *exchange.Target {
	if containsAll(f.target.Scopes, scopes) {
		return f.target
	}
	t := *f.target
	t.Scopes = unionScopes(t.Scopes, scopes)
	return &t
}

// target is where a principal's tokens come from.
func (s *silent) target(p Principal, f *found) *exchange.Target {
	s.mu.Lock()
	defer s.mu.Unlock()
	return f.with(s.raised[p].scopes)
}

// After a search that failed, nobody looks for this long at first.
const (
	lookPause    = time.Second
	lookPauseMax = 30 * time.Second
)

// missed is a search that failed because a server was away.
type missed struct {
	err   error
	times int       // in a row
	until time.Time // nobody looks again before
}

type trouble struct {
	err *Error
	at  time.Time
}

func newSilent(b *Broker, r *Remote) *silent {
	return &silent{b: b, r: r, troubles: map[Principal]trouble{}, raised: map[Principal]raised{}, forced: map[Principal]time.Time{}}
}

// browser reports whether tokens for the remote come of a person's visit to its
// authorization server.
func (r *Remote) browser() bool { return r.Type == "" || r.Type == TypeOAuth }

// asks reports whether the remote has to be asked where its tokens come from.
func (s *silent) asks() bool {
	return s.r.Type == TypeIDJAG || s.r.Type == TypeMachine && s.r.TokenEndpoint == ""
}

// token is [Authorizer.Token].
func (s *silent) token(ctx context.Context, p Principal) (*oauth2.Token, error) {
	var f *found
	if s.r.Type != TypeForward {
		if f = s.trusted(ctx, p); f == nil && s.asks() {
			return nil, nil // its challenge tells
		}
	}
	token, err := s.fetch(ctx, p, f)
	if errors.Is(err, ErrSignInNeeded) {
		return nil, nil
	}
	return token, err
}

// renew is [Authorizer.Renew], and all of [Authorizer.Challenge] that needs no
// person.
func (s *silent) renew(ctx context.Context, p Principal, resp *http.Response) error {
	sent := sentToken(resp)
	if s.r.Type == TypeForward {
		return s.forwardAnew(ctx, p, sent)
	}
	ch := parseChallenge(resp.Header)
	f := s.known()
	if f == nil || s.asks() {
		// Its authorization server may be another one by now.
		var err error
		if f, err = s.find(ctx, ch); err != nil {
			return s.failed(p, err)
		}
	}
	t := s.target(p, f)
	err := s.another(ctx, p, f, t, sent)
	if t != f.target && s.lowered(p, err) {
		return s.another(ctx, p, f, f.target, sent)
	}
	return err
}

// another gets another token than the one that was sent.
func (s *silent) another(ctx context.Context, p Principal, f *found, t *exchange.Target, sent string) error {
	if sent != "" {
		subject, err := s.b.knownSubject(ctx, p, s.r)
		if err != nil {
			return err
		}
		if !s.b.exchanger.Reject(subject, t, sent) {
			return s.failed(p, s.unwanted())
		}
	}
	token, err := s.issue(ctx, p, f, t)
	switch {
	case err != nil:
		return err
	case token.AccessToken == sent:
		return s.failed(p, s.unwanted())
	}
	return nil
}

// unwanted: a new token is no better than the last.
func (s *silent) unwanted() *Error {
	say := "it does not accept the token that the identity provider issued for it: ask its operator which audience and scopes it expects"
	switch s.r.Type {
	case TypeMachine:
		say = "it does not accept the token that its authorization server issued to the gateway: ask its operator whether the gateway's client may use it"
	case TypeForward:
		say = "it does not accept the token of your login at the gateway: ask its operator whether it trusts that provider and audience"
	}
	return &Error{Kind: KindToken, Remote: s.r.Name, Say: say}
}

// stepUp answers a 403 insufficient_scope: with the scopes that it names, where
// the config leaves them to the remote.
func (s *silent) stepUp(ctx context.Context, p Principal, resp *http.Response) error {
	ch, sent := parseChallenge(resp.Header), sentToken(resp)
	forbidden := &Error{Kind: KindForbidden, Remote: s.r.Name, Say: "it forbids this to the account that the gateway signs in with"}
	f := s.known()
	if ch.Error != "insufficient_scope" || !s.asks() || f == nil || len(s.r.Scopes) > 0 {
		return forbidden
	}
	token, err := s.token(ctx, p)
	switch {
	case err != nil:
		return err
	case token != nil && token.AccessToken != sent:
		return nil // another call was here first
	case containsAll(s.target(p, f).Scopes, ch.Scope):
		return forbidden
	}
	s.mu.Lock()
	was := s.raised[p]
	s.mu.Unlock()
	operation := operationOf(ctx)
	if _, ok := raise(was.times, operation); !ok {
		forbidden.Say += raisedEnough
		return forbidden
	}
	if err := s.another(ctx, p, f, f.with(unionScopes(was.scopes, ch.Scope)), sent); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	next := s.raised[p] // another call may have come to more meanwhile
	next.scopes = unionScopes(next.scopes, ch.Scope)
	if times, ok := raise(next.times, operation); ok {
		next.times = times
	}
	s.raised[p] = next
	return nil
}

// trusted is known, unless that is in doubt and the principal needs a new token.
func (s *silent) trusted(ctx context.Context, p Principal) *found {
	s.mu.Lock()
	f, doubted := s.found, s.doubted
	s.mu.Unlock()
	if f == nil || !doubted {
		return f
	}
	if subject, err := s.b.knownSubject(ctx, p, s.r); err == nil && s.b.exchanger.Kept(subject, s.target(p, f)) != nil {
		return f
	}
	return nil
}

func (s *silent) known() *found {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.found
}

// fetch returns a token of the principal, or [ErrSignInNeeded] if it takes a
// login at the gateway that is not there.
func (s *silent) fetch(ctx context.Context, p Principal, f *found) (*oauth2.Token, error) {
	if s.r.Type == TypeForward {
		return s.forward(ctx, p)
	}
	if f == nil {
		var err error
		if f, err = s.find(ctx, challenge{}); err != nil {
			return nil, s.failed(p, err)
		}
	}
	t := s.target(p, f)
	token, err := s.issue(ctx, p, f, t)
	if t != f.target && s.lowered(p, err) {
		return s.issue(ctx, p, f, f.target)
	}
	return token, err
}

// issue is fetch for a target.
func (s *silent) issue(ctx context.Context, p Principal, f *found, t *exchange.Target) (*oauth2.Token, error) {
	subject, err := s.b.knownSubject(ctx, p, s.r)
	if err != nil {
		return nil, s.failed(p, err)
	}
	// While a token is kept, nobody waits for the login to be renewed, which the
	// provider may be too far away for.
	var token *exchange.Token
	if s.b.exchanger.Kept(subject, t) == nil {
		fresh, err := s.b.freshSubject(ctx, p, s.r)
		if unavailable(err) || errors.Is(err, ErrRefreshDue) {
			token = s.b.exchanger.Last(subject, t)
		}
		if err != nil && token == nil {
			return nil, s.failed(p, err)
		}
		subject = fresh
	}
	if token == nil {
		if token, err = s.b.exchanger.Token(ctx, subject, t); err != nil {
			s.doubt(f, err)
			return nil, s.failed(p, s.explain(err))
		}
	}
	s.worked(p)
	if s.asks() {
		s.b.pin(ctx, s.r, f.issuer)
	}
	return &oauth2.Token{AccessToken: token.Access.Value(), TokenType: "Bearer", Expiry: token.Expires}, nil
}

func unavailable(err error) bool {
	e, ok := errors.AsType[*Error](err)
	return ok && e.Kind == KindUnavailable
}

// sureFor is for how long what was found of an endpoint's issuer is not looked
// for again although it led to nothing.
const sureFor = time.Minute

// doubt has the next one look again for where tokens come from: servers move, and
// an issuer's metadata may not have been there to name the endpoint.
func (s *silent) doubt(f *found, err error) {
	_, failed := errors.AsType[*endpoint.Error](err)
	if !failed && !(errors.Is(err, exchange.ErrNoIssuer) && s.b.now().Sub(f.at) >= sureFor) {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.found == f {
		s.doubted = true
	}
}

// worked forgets what failed.
func (s *silent) worked(p Principal) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.troubles, p)
}

// failed keeps what failed for Status.
func (s *silent) failed(p Principal, err error) error {
	if e, ok := errors.AsType[*Error](err); ok {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.troubles[p] = trouble{e, s.b.now()}
	}
	return err
}

// forget drops what is kept of a principal that is gone.
func (s *silent) forget(p Principal) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.troubles, p)
	delete(s.raised, p)
	delete(s.forced, p)
}

// lowered drops the scopes that were raised if they are not granted any more, and
// reports whether that is so: the rest may still be.
func (s *silent) lowered(p Principal, err error) bool {
	e, ok := errors.AsType[*endpoint.Error](err)
	if !ok || e.Code != "invalid_scope" {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.raised[p] = raised{times: s.raised[p].times}
	return true
}

// explain words a failure of the exchanger.
func (s *silent) explain(err error) error {
	if errors.Is(err, context.Canceled) {
		return err
	}
	fail := func(kind Kind, say string) error { return &Error{Kind: kind, Remote: s.r.Name, Say: say, Err: err} }
	server := "its authorization server"
	_, then := errors.AsType[*exchange.ThenError](err)
	if !then && s.r.Type != TypeMachine {
		server = "the identity provider"
	}
	switch {
	case then && errors.Is(err, exchange.ErrIssuer):
		return fail(KindToken, "the token that its authorization server issued says that it is another server's: ask its operator to make iss the issuer in the server's metadata")
	case then && errors.Is(err, exchange.ErrAudience):
		return fail(KindToken, "the token that its authorization server issued is for another place than the remote: ask its operator to issue tokens for the resource that the gateway asks for")
	case errors.Is(err, exchange.ErrCleared):
		return ErrSignInNeeded
	case errors.Is(err, gate.ErrShut):
		return fail(KindUnavailable, server+" has failed several times in a row and is asked again in a moment; until then there is no new token for it, and nothing is lost")
	case errors.Is(err, exchange.ErrIssuer):
		return fail(KindToken, "the token that "+server+" issued is from another issuer than the one expected: set the remote's auth.expectedIssuer if that issuer is right")
	case errors.Is(err, exchange.ErrNoIssuer):
		return fail(KindToken, "the token that "+server+" issued does not tell its issuer, and the expected issuer's metadata does not name the token endpoint: ask for JWT access tokens there, or correct the remote's auth.expectedIssuer or auth.issuer")
	case errors.Is(err, exchange.ErrAudience):
		return fail(KindToken, "the token that "+server+" issued is for another audience than the configured one: ask its operator to allow that audience to the gateway's client, or correct the remote's auth.audience")
	case errors.Is(err, exchange.ErrTokenType):
		return fail(KindToken, server+" issued another type of token than the one asked for: set the remote's auth.requestedTokenType to what it supports")
	case errors.Is(err, exchange.ErrExpired):
		return fail(KindToken, "the token that "+server+" issued has expired already: compare its clock with the gateway's")
	case errors.Is(err, exchange.ErrSubject):
		return fail(KindToken, "the gateway's identity has expired: whatever writes gateway.auth.idTokenFile has to renew it")
	}
	e, ok := errors.AsType[*endpoint.Error](err)
	switch {
	case !ok:
		return asError(s.r.Name, err)
	case errors.Is(err, guard.ErrBlocked):
		return fail(KindUnavailable, "the token endpoint of "+server+" is at an address that the gateway may not reach: list it in the remote's allowAddresses if it is meant to be there")
	case e.EndedHandshake():
		return fail(KindUnavailable, "the token endpoint of "+server+" ended the TLS handshake, as it does without a client certificate that it accepts: set cert and key in the remote's auth.tls, or renew them")
	case e.Code == "invalid_client" || e.Code == "unauthorized_client":
		return fail(KindToken, server+" refuses the gateway's client ("+e.Code+"): check its id, its credentials and what it is allowed in the config and there")
	case e.Code != "" && e.Refused():
		return fail(KindToken, server+" does not issue a token for it ("+e.Code+"): ask its operator whether the gateway's client and you may have one")
	}
	return fail(KindUnavailable, server+" could not be reached or failed to issue a token; try again in a moment")
}

// search is one look for where the remote's tokens come from, that everybody who
// needs it waits for.
type search struct {
	done  chan struct{}
	found *found // set before done is closed, like err
	err   error
}

// find looks for where the remote's tokens come from, as its challenge says. One
// looks at a time; who waited takes what was found meanwhile if it serves.
func (s *silent) find(ctx context.Context, ch challenge) (*found, error) {
	for {
		call, mine, err := s.search(ch)
		if err != nil {
			return nil, err
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-call.done:
		}
		if mine || call.err != nil || s.serves(call.found, ch) {
			return call.found, call.err
		}
	}
}

// serves reports whether what was found is enough for a challenge.
func (s *silent) serves(f *found, ch challenge) bool {
	return f != nil && (len(s.r.Scopes) > 0 || containsAll(f.target.Scopes, ch.Scope))
}

// search begins a look, or joins the one that is under way. While a server is away
// it has ended before it began.
func (s *silent) search(ch challenge) (call *search, mine bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.searching != nil {
		return s.searching, false, nil
	}
	call = &search{done: make(chan struct{})}
	if s.b.now().Before(s.missed.until) {
		if call.err = s.missed.err; s.serves(s.found, ch) {
			call.found, call.err = s.found, nil
		}
		close(call.done)
		return call, true, nil
	}
	ctx, done, err := s.b.work(startTime)
	if err != nil {
		return nil, false, err
	}
	s.searching = call
	go func() {
		defer done()
		f, err := s.look(ctx, ch, nil)
		s.mu.Lock()
		defer s.mu.Unlock()
		defer close(call.done)
		s.searching = nil
		call.found, call.err = s.lookedLocked(ch, f, err)
	}()
	return call, true, nil
}

// lookedLocked keeps what came of a look, and returns what it is worth to those
// who wait. s.mu is held.
func (s *silent) lookedLocked(ch challenge, f *found, err error) (*found, error) {
	if errors.Is(err, context.Canceled) {
		return nil, err // our own doing
	}
	now := s.b.now()
	if err == nil {
		f.at = now
		s.found, s.doubted, s.missed = f, false, missed{}
		return f, nil
	}
	failure := asError(s.r.Name, err)
	if !unavailable(failure) {
		return nil, failure
	}
	// Everybody comes here while a server is away: one of them asks, now and then,
	// and what was found before is no worse for it.
	s.missed = s.missed.again(failure, now)
	if s.serves(s.found, ch) {
		s.doubted = false
		return s.found, nil
	}
	return nil, failure
}

func (m missed) again(err error, now time.Time) missed {
	pause := min(lookPause<<min(m.times, 10), lookPauseMax)
	return missed{err, m.times + 1, now.Add(pause)}
}

// look is a find without its memory; step hears of what was tried.
func (s *silent) look(ctx context.Context, ch challenge, step func(Step)) (*found, error) {
	switch s.r.Type {
	case TypeMachine:
		return s.machine(ctx, ch, step)
	case TypeIDJAG:
		return s.assertion(ctx, ch, step)
	}
	return s.exchange(ctx, step)
}

// client returns the gateway's client at the remote's own authorization server.
func (s *silent) client(issuer string, methods []string) (endpoint.Client, error) {
	c := endpoint.Client{ID: s.r.ClientID, Secret: s.r.ClientSecret, Key: s.r.Key, Method: s.r.TokenEndpointAuthMethod, Audience: issuer}
	if c.Method == "" && c.Key == nil && !c.Secret.IsEmpty() {
		if c.Method = secretMethod(methods); c.Method == "" {
			return c, &Error{Kind: KindRegistration, Remote: s.r.Name,
				Say: "its authorization server lists no way of authenticating with a client secret: set auth.privateKeyFile, or auth.tokenEndpointAuthMethod if the secret is right"}
		}
	}
	return c, nil
}

// machine finds where the gateway's own credentials are good. MCP client
// credentials extension: the same discovery as for a user, and the resource
// parameter.
func (s *silent) machine(ctx context.Context, ch challenge, step func(Step)) (*found, error) {
	t := &exchange.Target{Remote: s.r.Name, Kind: exchange.Machine, Audience: s.r.Audience}
	d := &discovered{Issuer: s.r.ExpectedIssuer, TokenEndpoint: s.r.TokenEndpoint, Resource: canonicalResource(s.r.URL)}
	if s.r.TokenEndpoint == "" {
		var err error
		if d, err = s.b.discover(ctx, s.r, ch, step); err != nil {
			return nil, err
		}
	} else if d.Issuer == "" {
		d.Issuer = derivedIssuer(d.TokenEndpoint)
	}
	c, err := s.client(d.Issuer, d.AuthMethods)
	if err != nil {
		return nil, err
	}
	t.Resource = cmp.Or(s.r.Resource, d.Resource)
	t.Scopes = unionScopes(scopesOf(s.r, ch, d))
	t.Server = exchange.Server{Endpoint: d.TokenEndpoint, Client: c, HTTP: s.r.tokenHTTP(),
		// Without a word in the config the metadata's endpoint decides who issues.
		Issuer: s.r.ExpectedIssuer, Pinned: s.r.TokenEndpoint == "" && d.Issuer == s.r.ExpectedIssuer}
	return &found{target: t, issuer: d.Issuer}, nil
}

func (r *Remote) tokenHTTP() *guard.Client {
	if r.TokenHTTP != nil {
		return r.TokenHTTP
	}
	return r.HTTP
}

// derivedIssuer is the issuer that a token endpoint of the common form is of.
func derivedIssuer(tokenEndpoint string) string {
	base, _, _ := strings.Cut(tokenEndpoint, "?")
	for _, suffix := range []string{"/protocol/openid-connect/token", "/oauth2/v1/token", "/v1/token", "/oauth2/token", "/oauth/v2/token", "/oauth/token", "/token"} {
		if issuer, ok := strings.CutSuffix(base, suffix); ok && origin(issuer) != "://" {
			return issuer
		}
	}
	return strings.TrimSuffix(base, "/")
}

// exchange finds where a token for the remote is exchanged: at the configured
// endpoint, at that of the configured issuer, or at the gateway's own provider.
func (s *silent) exchange(ctx context.Context, step func(Step)) (*found, error) {
	t := &exchange.Target{
		Remote: s.r.Name, Kind: exchange.Exchange, Audience: s.r.Audience, Resource: s.r.Resource,
		ConnectorID: s.r.ConnectorID, Requested: s.r.RequestedTokenType, Scopes: s.r.Scopes,
		Server: exchange.Server{Endpoint: s.r.TokenEndpoint, Issuer: s.r.ExpectedIssuer, HTTP: s.r.tokenHTTP()},
	}
	if s.atLogin() {
		t.Server.HTTP = cmp.Or(s.r.TokenHTTP, s.b.login.HTTP)
	}
	if len(t.Scopes) == 0 {
		t.Scopes = defaultScopes
	}
	at := s.r.Issuer
	if s.atLogin() {
		at = s.b.login.Issuer
	}
	if at == "" {
		t.Server.Issuer = cmp.Or(t.Server.Issuer, derivedIssuer(t.Server.Endpoint))
		t.Server.Pinned = s.pinned(ctx, t.Server.Issuer, t.Server.Endpoint)
		c, err := s.exchanger(t.Server.Issuer, nil)
		t.Server.Client = c
		return &found{target: t, issuer: t.Server.Issuer}, err
	}
	meta, err := s.metadata(ctx, at, step)
	if err != nil {
		return nil, err
	}
	t.Server.Endpoint = cmp.Or(s.r.TokenEndpoint, meta.TokenEndpoint.value)
	t.Server.Issuer = cmp.Or(s.r.ExpectedIssuer, at)
	t.Server.Pinned = t.Server.Issuer == at && t.Server.Endpoint == meta.TokenEndpoint.value
	t.Server.Client, err = s.exchanger(at, meta.AuthMethods.value)
	return &found{target: t, issuer: t.Server.Issuer}, err
}

// atLogin reports whether tokens are exchanged at the gateway's own provider,
// which is not the remote's to reach but the login's.
func (s *silent) atLogin() bool {
	return s.r.TokenEndpoint == "" && (s.r.Issuer == "" || s.r.Issuer == s.b.login.Issuer)
}

// metadata returns the metadata of the issuer where tokens are exchanged. They are
// asked for like the tokens if they are at the same place: a certificate may be
// needed for both.
func (s *silent) metadata(ctx context.Context, issuer string, step func(Step)) (*serverMetadata, error) {
	r := *s.r
	if s.atLogin() {
		r.HTTP = s.b.login.HTTP
	} else if origin(issuer) == origin(r.TokenEndpoint) {
		r.HTTP = r.tokenHTTP()
	}
	return s.b.discoverer.issuer(ctx, &r, issuer, step)
}

// exchanger is the gateway's client where tokens are exchanged: the remote's own
// if it has one, else that of the login.
func (s *silent) exchanger(issuer string, methods []string) (endpoint.Client, error) {
	if s.r.ClientID != "" {
		return s.client(issuer, methods)
	}
	return s.b.loginClient(methods), nil
}

// pinned reports whether an issuer's own metadata names the endpoint. That
// nobody can tell is a no, unless it has been known.
func (s *silent) pinned(ctx context.Context, issuer, tokenEndpoint string) bool {
	meta, err := s.metadata(ctx, issuer, nil)
	if unavailable(err) {
		was := s.known()
		return was != nil && was.target.Server.Pinned && was.target.Server.Issuer == issuer && was.target.Server.Endpoint == tokenEndpoint
	}
	return err == nil && meta.TokenEndpoint.value == tokenEndpoint
}

// assertion finds both servers of an ID-JAG: the gateway's provider, and the
// remote's own authorization server by its challenge.
func (s *silent) assertion(ctx context.Context, ch challenge, step func(Step)) (*found, error) {
	d, err := s.b.discover(ctx, s.r, ch, step)
	if err != nil {
		return nil, err
	}
	if s.r.Audience != "" && s.r.Audience != d.Issuer {
		// Who gets an assertion must not be able to use it elsewhere.
		return nil, &Error{Kind: KindDiscovery, Remote: s.r.Name,
			Say: "its authorization server " + origin(d.Issuer) + " is not the one that the remote's auth.audience names, so it gets no assertion for that one: correct auth.audience, or leave it out"}
	}
	login, err := s.b.discoverer.issuer(ctx, s.b.login, s.b.login.Issuer, step)
	if err != nil {
		return nil, err
	}
	there, err := s.client(d.Issuer, d.AuthMethods)
	if err != nil {
		return nil, err
	}
	return &found{target: &exchange.Target{
		Remote: s.r.Name, Kind: exchange.IDJAG, Scopes: unionScopes(scopesOf(s.r, ch, d)),
		// Enterprise-managed authorization: audience is "the issuer identifier of
		// the resource authorization server", resource that of the MCP server.
		Audience: d.Issuer, Resource: cmp.Or(s.r.Resource, d.Resource),
		Server: exchange.Server{
			Endpoint: login.TokenEndpoint.value, Issuer: s.b.login.Issuer, Pinned: true,
			Client: s.b.loginClient(login.AuthMethods.value), HTTP: s.b.login.tokenHTTP(),
		},
		// Its metadata, checked, name the endpoint.
		Then: exchange.Server{Endpoint: d.TokenEndpoint, Issuer: d.Issuer, Pinned: true, Client: there, HTTP: s.r.tokenHTTP()},
	}, issuer: d.Issuer}, nil
}

// status is [Broker.Status].
func (s *silent) status(ctx context.Context, p Principal) Status {
	var out Status
	f := s.known()
	if f != nil {
		out.Issuer, out.Scopes = f.issuer, slices.Clone(s.target(p, f).Scopes)
	}
	subject, err := s.b.knownSubject(ctx, p, s.r)
	if err == nil && f != nil {
		if token := s.b.exchanger.Kept(subject, s.target(p, f)); token != nil {
			out.SignedIn, out.Refreshable, out.Expires = true, true, token.Expires
		}
	}
	if s.r.Type != TypeMachine {
		login := s.b.loginStatus(ctx, p)
		out.SignedIn = out.SignedIn || login.SignedIn
		out.Account, out.Refreshable, out.Pending, out.Unknown = login.Account, login.Refreshable, login.Pending, login.Unknown
		if s.r.Type == TypeForward {
			out.Issuer, out.Scopes, out.Expires = login.Issuer, login.Scopes, login.Expires
		}
		out.LastError, out.LastErrorAt = login.LastError, login.LastErrorAt
		if out.Pending != nil {
			out.Pending.Remote = s.r.Name
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if t, ok := s.troubles[p]; ok {
		out.LastError, out.LastErrorAt = t.err, t.at
	}
	return out
}

// inspect is [Broker.Inspect].
func (s *silent) inspect(ctx context.Context, ch challenge, step func(Step)) error {
	if s.r.Type == TypeForward {
		step(Step{What: "forwarding the login at the gateway", URL: s.b.login.Issuer, OK: true, Note: "with the audience " + s.r.Audience})
		return nil
	}
	f, err := s.look(ctx, ch, step)
	if err != nil {
		return asError(s.r.Name, err)
	}
	note := "no issuer is expected of its tokens"
	switch {
	case f.target.Server.Issuer != "" && f.target.Server.Pinned:
		note = "its tokens must be from " + f.target.Server.Issuer + ", whose metadata names this endpoint"
	case f.target.Server.Issuer != "":
		note = "its tokens must say that they are from " + f.target.Server.Issuer
	}
	step(Step{What: "token endpoint", URL: withoutQuery(f.target.Server.Endpoint), OK: true, Note: note})
	if s.r.Type != TypeMachine {
		return nil
	}
	// Only here is there nobody else to ask.
	if _, err := s.b.exchanger.Token(ctx, exchange.Subject{}, f.target); err != nil {
		err = s.explain(err)
		step(Step{What: "token for the gateway itself", Note: err.Error()})
		return err
	}
	step(Step{What: "token for the gateway itself", OK: true})
	return nil
}
