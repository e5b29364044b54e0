package auth

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/zitadel/oidc/v3/pkg/client/rp"
	"github.com/zitadel/oidc/v3/pkg/oidc"
	"golang.org/x/oauth2"

	"gatehouse/auth/endpoint"
	"gatehouse/auth/guard"
	"gatehouse/auth/secret"
	"gatehouse/exchange"
)

// LoginRemote names the user's login at the gateway's own provider where a
// remote's name is due: it is signed in to, renewed and signed out of like a
// remote, and no remote may be called so.
const LoginRemote = "gateway"

// Login is the provider where users log in to the gateway, and the gateway's own
// client there. What it issues is issued to the gateway, which is why it may be
// used for more: the token that a client of the gateway presents never is.
type Login struct {
	Issuer       string      // required
	ClientID     string      // required, unless IDTokenFile stands for everybody
	ClientSecret secret.Text // empty: a public client
	Scopes       []string    // empty: defaultScopes

	Audience       string   // that a client's bearer token must name; empty: nobody may present one
	IdentityClaims []string // of bearer and ID tokens, that tell one user from another; empty: sub

	// IDTokenFile holds a workload's own identity, an ID token that something else
	// keeps fresh. It stands for every principal, and nobody logs in.
	IDTokenFile string
	HTTP        *guard.Client // required
}

// loginRemote is the login in the form of a remote.
func (l *Login) remote() *Remote {
	scopes := l.Scopes
	if len(scopes) == 0 {
		scopes = defaultScopes
	}
	return &Remote{
		Name: LoginRemote, URL: l.Issuer, Issuer: l.Issuer, ClientID: l.ClientID, ClientSecret: l.ClientSecret,
		Scopes: scopes, HTTP: l.HTTP, login: true,
	}
}

// loginClient is the gateway's client at the login's provider.
func (b *Broker) loginClient(methods []string) endpoint.Client {
	c := endpoint.Client{ID: b.login.ClientID, Secret: b.login.ClientSecret, Audience: b.login.Issuer}
	if !c.Secret.IsEmpty() {
		c.Method = secretMethod(methods)
	}
	return c
}

// freshEnough is how long a subject token lives on for nobody to renew it.
const freshEnough = 30 * time.Second

// knownSubject is for whom a remote's tokens are, as far as it is known without
// asking anybody; what it presents may have expired. It is [ErrSignInNeeded] if
// there is nobody.
func (b *Broker) knownSubject(ctx context.Context, p Principal, r *Remote) (exchange.Subject, error) {
	switch {
	case r.Type == TypeMachine:
		return exchange.Subject{}, nil
	case b.workload != nil:
		return b.workload.subject()
	}
	h, err := b.held(ctx, key{p, LoginRemote}, b.login)
	if err != nil {
		return exchange.Subject{}, err
	} else if h == nil {
		return exchange.Subject{}, ErrSignInNeeded
	}
	g := h.snapshot()
	if g == nil || !g.fits(b.login) {
		return exchange.Subject{}, ErrSignInNeeded
	}
	return g.subject(r)
}

// subject is what the login is good for at a remote that wants one of its tokens.
func (g *grant) subject(r *Remote) (exchange.Subject, error) {
	// The claims were verified when the token came.
	c, ok := readIDToken(g.ID)
	if !ok || g.Access.IsEmpty() {
		return exchange.Subject{}, ErrSignInNeeded
	}
	if r.SubjectTokenType == exchange.TypeAccessToken {
		return exchange.Subject{Issuer: c.Issuer, ID: c.Subject, Token: g.Access, Type: exchange.TypeAccessToken, Expires: g.Expires}, nil
	}
	return exchange.Subject{Issuer: c.Issuer, ID: c.Subject, Token: g.ID, Type: exchange.TypeIDToken, Expires: c.expires()}, nil
}

// freshSubject is knownSubject, renewed where that is due: while the token lives,
// beside its use. Its errors say what the user can do.
func (b *Broker) freshSubject(ctx context.Context, p Principal, r *Remote) (exchange.Subject, error) {
	s, err := b.knownSubject(ctx, p, r)
	if err != nil || s.Expires.IsZero() || b.now().Add(freshEnough).Before(s.Expires) || r.Type == TypeMachine {
		return s, err
	}
	if b.workload != nil {
		return s, nil // who asks with it hears that it has expired
	}
	if b.now().Before(s.Expires) {
		if MayRefresh(ctx) {
			b.renewBeside(ctx, p)
		}
		return s, nil
	}
	return b.renewedSubject(ctx, p, r)
}

// renewBeside refreshes the login without waiting for it. A renewal that has just
// brought no better token is not repeated.
func (b *Broker) renewBeside(ctx context.Context, p Principal) {
	h, err := b.held(ctx, key{p, LoginRemote}, b.login)
	if err != nil || h == nil {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	now := b.now()
	if !h.dead && h.grant.refreshable() && !h.grant.inDoubt() && !now.Before(h.retryAt) && now.Sub(h.grant.Obtained) >= freshEnough {
		b.refreshLocked(h, false)
	}
}

// renewedSubject refreshes the login and waits for it.
func (b *Broker) renewedSubject(ctx context.Context, p Principal, r *Remote) (exchange.Subject, error) {
	h, err := b.held(ctx, key{p, LoginRemote}, b.login)
	if err != nil {
		return exchange.Subject{}, err
	} else if h == nil {
		return exchange.Subject{}, ErrSignInNeeded
	}
	h.mu.Lock()
	now := b.now()
	switch {
	case h.dead, !h.grant.refreshable(), h.final && now.Before(h.retryAt):
		h.mu.Unlock()
		return exchange.Subject{}, ErrSignInNeeded
	case h.refreshing == nil && now.Before(h.retryAt):
		defer h.mu.Unlock()
		return exchange.Subject{}, b.loginFailed(r, h.lastErr)
	case h.refreshing == nil && !MayRefresh(ctx):
		h.mu.Unlock()
		return exchange.Subject{}, ErrRefreshDue
	}
	call := b.refreshLocked(h, true)
	h.mu.Unlock()
	select {
	case <-ctx.Done():
		return exchange.Subject{}, ctx.Err()
	case <-call.done:
	}
	s, err := b.knownSubject(ctx, p, r)
	switch {
	case err != nil:
		return s, err
	case s.Expires.IsZero() || b.now().Before(s.Expires):
		return s, nil
	case call.err != nil:
		h.mu.Lock()
		defer h.mu.Unlock()
		if h.final {
			return exchange.Subject{}, ErrSignInNeeded
		}
		return exchange.Subject{}, b.loginFailed(r, call.err)
	}
	// The provider renews the login without renewing the ID token.
	return exchange.Subject{}, ErrSignInNeeded
}

// loginFailed words a failure at the login's provider for a remote that needs it.
func (b *Broker) loginFailed(r *Remote, err error) error {
	if unavailable(err) {
		return &Error{Kind: KindUnavailable, Remote: r.Name, Err: err,
			Say: "your login at the gateway has run out, and the identity provider could not be reached to renew it, which is tried again; nothing is lost meanwhile"}
	}
	return asError(r.Name, err)
}

// requireLogin asks for the login that a remote needs.
func (b *Broker) requireLogin(ctx context.Context, p Principal, r *Remote) error {
	if b.workload != nil {
		return &Error{Kind: KindToken, Remote: r.Name, Say: "the gateway's identity in gateway.auth.idTokenFile is not accepted or missing"}
	}
	a := b.Authorizer(p, LoginRemote)
	w := wish{reason: ReasonSignIn}
	if g, _, err := a.present(ctx); err == nil && g != nil {
		w.reason = ReasonExpired
	}
	err := a.require(ctx, w)
	if required, ok := errors.AsType[*RequiredError](err); ok {
		asked := *required
		asked.Remote = r.Name
		return &asked
	}
	if e, ok := errors.AsType[*Error](err); ok {
		return &Error{Kind: e.Kind, Remote: r.Name, Say: "logging in at the gateway's identity provider failed: " + e.Say, Err: e}
	}
	return err
}

// keepLogin keeps what a browser's login has brought, like what a flow has: in
// the store, renewed when it has to be, used for the remotes that live on the
// login. The ID token has been verified.
func (b *Broker) keepLogin(ctx context.Context, p Principal, d *discovered, answer *endpoint.Answer) error {
	c := b.loginClient(d.AuthMethods)
	g := &grant{
		grantFacts: grantFacts{
			Principal: p, Remote: LoginRemote, RemoteURL: b.login.URL, Issuer: b.login.Issuer,
			ClientID: c.ID, AuthMethod: c.Method,
			TokenEndpoint: d.TokenEndpoint, RevocationEndpoint: d.RevocationEndpoint,
			Requested: b.login.Scopes,
		},
		ClientSecret: c.Secret,
	}
	k := key{p, LoginRemote}
	// What was got for another account of the same person is not theirs any more.
	b.clearTokens(ctx, p, "")
	if err := b.writeGrant(ctx, k, b.login, g.receive(answer, b.now()), AnyVersion); err != nil {
		return internalError(LoginRemote, err)
	}
	b.clearTrouble(ctx, k)
	return nil
}

// loginStatus is what a principal's login stands at.
func (b *Broker) loginStatus(ctx context.Context, p Principal) Status {
	if b.workload != nil {
		s, err := b.workload.subject()
		return Status{SignedIn: err == nil && b.now().Before(s.Expires), Issuer: s.Issuer, Account: s.ID, Expires: s.Expires}
	}
	return b.Status(p, LoginRemote)
}

// forward returns the login's own token for a remote that trusts its audience.
// It is looked up for each request, and never kept beside the login.
func (s *silent) forward(ctx context.Context, p Principal) (*oauth2.Token, error) {
	subject, err := s.b.freshSubject(ctx, p, s.r)
	if err != nil {
		return nil, s.failed(p, err)
	}
	// Who gets the token can use it wherever it is accepted: so only who it names
	// may have it, while it lives.
	c, ok := readIDToken(subject.Token)
	switch {
	case !ok:
		return nil, s.failed(p, &Error{Kind: KindToken, Remote: s.r.Name,
			Say: "the token of your login does not say whom it is for, so it is not forwarded: use exchange instead of forward, or ask for JWT access tokens at the identity provider"})
	case !slices.Contains(c.audience(), s.r.Audience):
		return nil, s.failed(p, &Error{Kind: KindToken, Remote: s.r.Name,
			Say: "the token of your login is not for the audience that the remote's auth.audience names, so it is not forwarded: have the identity provider add that audience, or use exchange instead of forward"})
	case !subject.Expires.IsZero() && !s.b.now().Before(subject.Expires):
		return nil, s.failed(p, s.explain(exchange.ErrSubject))
	}
	s.worked(p)
	return &oauth2.Token{AccessToken: subject.Token.Value(), TokenType: "Bearer", Expiry: subject.Expires}, nil
}

// forwardAnew renews the login once if the remote does not accept its token.
func (s *silent) forwardAnew(ctx context.Context, p Principal, sent string) error {
	token, err := s.forward(ctx, p)
	switch {
	case err != nil:
		return err
	case token.AccessToken != sent:
		return nil
	case s.b.workload == nil && !MayRefresh(ctx):
		return ErrRefreshDue
	}
	now := s.b.now()
	s.mu.Lock()
	again := now.Before(s.forced[p].Add(forcedAgain))
	if !again {
		s.forced[p] = now
	}
	s.mu.Unlock()
	if again || s.b.workload != nil {
		return s.failed(p, s.unwanted())
	}
	if _, err := s.b.renewedSubject(ctx, p, s.r); err != nil && !errors.Is(err, ErrSignInNeeded) {
		return s.failed(p, err)
	}
	if token, err = s.forward(ctx, p); err != nil {
		return err
	} else if token.AccessToken == sent {
		return s.failed(p, s.unwanted())
	}
	return nil
}

// idClaims are what matters of an ID token that has been verified, or whose
// claims decide nothing.
type idClaims struct {
	Issuer   string          `json:"iss"`
	Subject  string          `json:"sub"`
	Audience json.RawMessage `json:"aud"`
	Expires  float64         `json:"exp"`
	Nonce    string          `json:"nonce"`
}

func readIDToken(token secret.Text) (c idClaims, ok bool) {
	parts := strings.Split(token.Value(), ".")
	if len(parts) != 3 {
		return idClaims{}, false
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil || json.Unmarshal(payload, &c) != nil || c.Issuer == "" || c.Subject == "" {
		return idClaims{}, false
	}
	return c, true
}

func (c idClaims) audience() []string { return audience(c.Audience) }

// expires is the token's end. OpenID Connect Core section 2 requires exp: a
// token without it is over.
func (c idClaims) expires() time.Time {
	if c.Expires <= 0 || c.Expires > 1<<40 {
		return time.Unix(1, 0)
	}
	return time.Unix(int64(c.Expires), 0)
}

// errAnotherSubject: a renewal has brought somebody else's login.
var errAnotherSubject = errors.New("the renewed ID token is another subject's")

// verifyLogin checks an ID token as OpenID Connect Core section 3.1.3.7 says:
// signature, issuer, audience, expiry, and the nonce that was sent, empty if none
// was. was is the token that this one replaces, at a refresh.
func (b *Broker) verifyLogin(ctx context.Context, token secret.Text, nonce string, was secret.Text) error {
	now, ok := readIDToken(token)
	before, renewed := readIDToken(was)
	switch {
	// Section 12.2: of the renewed token "its iss Claim Value MUST be the same as in
	// the ID Token issued when the original authentication occurred, its sub Claim
	// Value MUST be the same".
	case renewed && ok && (now.Issuer != before.Issuer || now.Subject != before.Subject):
		return errAnotherSubject
	// The renewed token "SHOULD NOT have a nonce Claim [...]; however,
	// if it is present, its value MUST be the same as in the ID Token issued at the
	// time of the original authentication".
	case renewed && now.Nonce != "" && now.Nonce != before.Nonce, !renewed && now.Nonce != nonce:
		return errors.New("the ID token answers another login: its nonce differs")
	}
	// The clocks may differ a little, and a token about to expire is of no use.
	verifier := rp.NewIDTokenVerifier(b.login.Issuer, b.login.ClientID, b.keys, rp.WithIssuedAtOffset(freshEnough),
		rp.WithSupportedSigningAlgorithms(signatures...), rp.WithNonce(func(context.Context) string { return now.Nonce }))
	if _, err := rp.VerifyIDToken[*oidc.IDTokenClaims](ctx, token.Value(), verifier); err != nil {
		return fmt.Errorf("verifying an ID token: %w", endpoint.WithoutURL(err))
	}
	return nil
}

// workload is the identity that a file holds.
type workload struct {
	file string

	mu      sync.Mutex // guards what follows
	changed time.Time
	size    int64
	known   exchange.Subject
}

// maxIdentity bounds the file.
const maxIdentity = 64 << 10

// subject reads the file if it has changed. Its claims are not verified here:
// the operator put the file there, like the config, and they decide nothing but
// which of the gateway's own tokens are kept together; the provider that it is
// presented to verifies it.
func (w *workload) subject() (exchange.Subject, error) {
	fail := func(say string, err error) (exchange.Subject, error) {
		return exchange.Subject{}, &Error{Kind: KindInternal, Remote: LoginRemote, Say: say, Err: err}
	}
	f, err := os.Open(w.file)
	if err != nil {
		return fail("gateway.auth.idTokenFile cannot be read", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return fail("gateway.auth.idTokenFile cannot be read", err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if info.ModTime().Equal(w.changed) && info.Size() == w.size && w.size > 0 {
		return w.known, nil
	}
	data, err := io.ReadAll(io.LimitReader(f, maxIdentity))
	if err != nil {
		return fail("gateway.auth.idTokenFile cannot be read", err)
	}
	token := secret.New(strings.TrimSpace(string(data)))
	c, ok := readIDToken(token)
	if !ok || !endpoint.VisibleASCII(token.Value()) {
		return fail("gateway.auth.idTokenFile holds no ID token", nil)
	}
	w.known = exchange.Subject{Issuer: c.Issuer, ID: c.Subject, Token: token, Type: exchange.TypeIDToken, Expires: c.expires()}
	w.changed, w.size = info.ModTime(), info.Size()
	return w.known, nil
}
