package auth

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/subtle"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"golang.org/x/oauth2"

	"gatehouse/auth/endpoint"
	"gatehouse/auth/secret"
)

// This file is the browser's login at the gateway: OpenID Connect Core 1.0,
// section 3.1, with PKCE. It says who is at a browser. What the provider issues
// on the way is kept for those remotes alone that live on it (login.go).

const (
	bucketLogins = "logins" // of browsers, by hash of the cookie
	bucketKeys   = "keys"   // that all processes on the store share

	browserLife   = 8 * time.Hour // of a login, from its beginning
	maxLoginTrips = 5             // of one browser to the provider at once

	loginPath     = "/login"
	LoginCallback = loginPath + "/callback" // where the provider sends browsers back to
)

// ErrNotLoggedIn: nobody is logged in at this browser.
var ErrNotLoggedIn = errors.New("nobody is logged in at this browser")

// Browser is who is logged in at a browser.
type Browser struct {
	Principal Principal
	Account   string // for display; may be empty
	Expires   time.Time
	// Proof is known to this browser and to the gateway, and to nobody else: a
	// form that holds it comes from a page that this browser was shown.
	Proof string
}

// browserRecord is a browser's login in the store.
type browserRecord struct {
	Principal Principal
	Account   string
	Expires   time.Time
}

// LoggedIn is what came of a login.
type LoggedIn struct {
	Browser
	Cookie Cookie // the login's
	Ended  Cookie // that of the trip, which has been used up
	To     string // the local path that was asked for
}

// trip is one visit to the provider. The browser carries it, sealed.
type trip struct {
	State    string // its hash
	Nonce    string
	Verifier string
	To       string
	Expires  time.Time
}

// loginCookie is the name of the cookie of those who are logged in.
func (b *Broker) loginCookie() string { return b.cookiePrefix() + "gatehouse_login" }

// tripCookie is different for every trip, so that tabs do not overwrite each
// other's.
func (b *Broker) tripCookie(state string) string {
	return b.cookiePrefix() + tripPrefix + hash("trip cookie", state)[:8]
}

const tripPrefix = "gatehouse_trip_"

// StaleTrips returns those cookies of trips that are too many, of all of a
// browser's cookies: a foreign page can begin as many as it likes.
func (b *Broker) StaleTrips(cookies []string) (stale []string) {
	for _, name := range cookies {
		if strings.HasPrefix(name, b.cookiePrefix()+tripPrefix) {
			stale = append(stale, name)
		}
	}
	return stale[:max(0, len(stale)-maxLoginTrips+1)]
}

// BeginLogin says where to send a browser that is to log in. It comes back to
// the local path to. With anew the provider is to ask who it is, even if it knows.
// Nothing is written: what the way back needs travels in the cookie, sealed.
func (b *Broker) BeginLogin(ctx context.Context, to string, anew bool) (*Start, error) {
	if b.login == nil || b.workload != nil {
		return nil, ErrUnknownRemote
	}
	work, done, err := b.work(startTime)
	if err != nil {
		return nil, err
	}
	defer done()
	d, err := b.discoverer.discover(work, b.login, challenge{}, nil)
	if err != nil {
		return nil, asError(LoginRemote, err)
	}
	seal, err := b.sharedSeal(work)
	if err != nil {
		return nil, internalError(LoginRemote, err)
	}
	state, verifier := randomText(), oauth2.GenerateVerifier()
	t := trip{State: hash("trip", state), Nonce: randomText(), Verifier: verifier, To: to, Expires: b.now().Add(stateLife)}
	plain, err := json.Marshal(t)
	if err != nil {
		return nil, internalError(LoginRemote, fmt.Errorf("encoding a login: %w", err))
	}
	scopes := b.loginScopes(d)
	conf := oauth2.Config{ClientID: b.login.ClientID, RedirectURL: b.publicURL + LoginCallback, Scopes: scopes,
		Endpoint: oauth2.Endpoint{AuthURL: d.AuthorizationEndpoint}}
	options := []oauth2.AuthCodeOption{oauth2.S256ChallengeOption(verifier), oauth2.SetAuthURLParam("nonce", t.Nonce)}
	if prompt := b.loginPrompt(scopes, anew); prompt != "" {
		options = append(options, oauth2.SetAuthURLParam("prompt", prompt))
	}
	return &Start{
		RedirectURL: conf.AuthCodeURL(state, options...),
		Cookie:      Cookie{Name: b.tripCookie(state), Value: secret.New(base64.RawURLEncoding.EncodeToString(seal.Seal(nil, nil, plain, nil))), MaxAge: stateLife},
	}, nil
}

// loginScopes: a refresh token is asked for only where something lives on it.
func (b *Broker) loginScopes(d *discovered) []string {
	if !b.keepsLogins() {
		return b.login.Scopes
	}
	return withOffline(b.login, d, b.login.Scopes)
}

func (b *Broker) loginPrompt(scopes []string, anew bool) string {
	var prompts []string
	if anew {
		// OpenID Connect Core section 3.1.2.1: login, "SHOULD prompt the End-User for
		// reauthentication".
		prompts = append(prompts, "login")
	}
	if slices.Contains(scopes, "offline_access") {
		// Section 11: without consent among the prompts it is ignored.
		prompts = append(prompts, "consent")
	}
	return strings.Join(prompts, " ")
}

// keepsLogins reports whether there are remotes that live on the login.
func (b *Broker) keepsLogins() bool {
	for _, s := range b.silent {
		if s.r.Type != TypeMachine {
			return true
		}
	}
	return false
}

// FinishLogin answers the callback of a login.
func (b *Broker) FinishLogin(ctx context.Context, c Callback) (*LoggedIn, error) {
	if b.login == nil || b.workload != nil {
		return nil, ErrUnknownRemote
	}
	work, done, err := b.work(finishTime)
	if err != nil {
		return nil, err
	}
	defer done()
	t, ended, err := b.takeTrip(work, c)
	if err != nil {
		b.log.WarnContext(ctx, "login refused", "error", err)
		return nil, err
	}
	in, err := b.logIn(work, c, t)
	if err != nil {
		b.log.WarnContext(ctx, "login failed", "error", err)
		return nil, err
	}
	in.Ended = ended
	b.log.InfoContext(ctx, "logged in at the gateway", "principal", in.Principal, "issuer", b.login.Issuer)
	return in, nil
}

// takeTrip finds the trip that a callback ends, and uses it up.
func (b *Broker) takeTrip(ctx context.Context, c Callback) (*trip, Cookie, error) {
	state, ok := one(c.Query, "state")
	if !ok || len(state) != stateLength {
		return nil, Cookie{}, fmt.Errorf("%w: malformed", ErrStateUnknown)
	}
	sealed, ok := c.Cookie(b.tripCookie(state))
	if !ok {
		return nil, Cookie{}, ErrWrongBrowser
	}
	seal, err := b.sharedSeal(ctx)
	if err != nil {
		return nil, Cookie{}, internalError(LoginRemote, err)
	}
	var t trip
	data, err := base64.RawURLEncoding.DecodeString(sealed)
	if err == nil {
		data, err = seal.Open(nil, nil, data, nil)
	}
	if err != nil || json.Unmarshal(data, &t) != nil || subtle.ConstantTimeCompare([]byte(t.State), []byte(hash("trip", state))) != 1 {
		return nil, Cookie{}, ErrWrongBrowser
	}
	if !b.now().Before(t.Expires) {
		return nil, Cookie{}, fmt.Errorf("%w: expired", ErrStateUnknown)
	}
	// Of many callbacks with this state one goes on.
	_, err = b.store.Put(ctx, bucketStates, t.State, []byte("used"), 0, t.Expires)
	if errors.Is(err, ErrConflict) {
		return nil, Cookie{}, fmt.Errorf("%w: used", ErrStateUnknown)
	} else if err != nil {
		return nil, Cookie{}, internalError(LoginRemote, fmt.Errorf("using up a login: %w", err))
	}
	return &t, Cookie{Name: b.tripCookie(state)}, nil
}

// logIn checks the provider's answer, redeems its code and notes who is at the
// browser now.
func (b *Broker) logIn(ctx context.Context, c Callback, t *trip) (*LoggedIn, error) {
	d, err := b.discoverer.discover(ctx, b.login, challenge{}, nil)
	if err != nil {
		return nil, asError(LoginRemote, err)
	}
	code, err := answerCode(c.Query, d)
	if errors.Is(err, ErrDenied) {
		b.log.InfoContext(ctx, "the identity provider answered with an error", "code", endpoint.KnownCode(c.Query.Get("error")))
	}
	if err != nil {
		return nil, err
	}
	form := url.Values{
		"grant_type": {"authorization_code"}, "code": {code},
		"redirect_uri": {b.publicURL + LoginCallback}, "code_verifier": {t.Verifier},
	}
	answer, err := endpoint.Token(ctx, b.login.HTTP.Fetch(), d.TokenEndpoint, b.loginClient(d.AuthMethods), form)
	if err != nil {
		return nil, loginRefused(err)
	}
	if err := b.verifyLogin(ctx, answer.ID, t.Nonce, secret.Text{}); err != nil {
		return nil, &Error{Kind: KindToken, Remote: LoginRemote, Err: fmt.Errorf("%w: %w", ErrExchange, err),
			Say: "the identity provider did not issue an ID token that can be verified"}
	}
	_, claims, _ := strings.Cut(answer.ID.Value(), ".")
	claims, _, _ = strings.Cut(claims, ".")
	payload, err := base64.RawURLEncoding.DecodeString(claims)
	if err != nil {
		return nil, internalError(LoginRemote, errors.New("a verified ID token cannot be read"))
	}
	p, err := b.principal(payload)
	if err != nil {
		return nil, &Error{Kind: KindToken, Remote: LoginRemote, Err: fmt.Errorf("%w: %w", ErrExchange, err),
			Say: "the identity provider's ID token does not say who you are: gateway.auth.identityClaims names a claim that it does not have"}
	}
	if b.keepsLogins() {
		if err := b.keepLogin(ctx, p, d, answer); err != nil {
			return nil, err
		}
	}
	// OWASP's session fixation: another secret with every login.
	if old, ok := c.Cookie(b.loginCookie()); ok {
		b.EndBrowser(ctx, old)
	}
	in := &LoggedIn{To: t.To, Browser: Browser{Principal: p, Account: accountOf(answer.ID), Expires: b.now().Add(browserLife)}}
	cookie := randomText()
	record, err := json.Marshal(browserRecord{in.Principal, in.Account, in.Expires})
	if err == nil {
		_, err = b.store.Put(ctx, bucketLogins, hash("login", cookie), record, 0, in.Expires)
	}
	if err != nil {
		return nil, internalError(LoginRemote, fmt.Errorf("writing a login: %w", err))
	}
	in.Cookie = Cookie{Name: b.loginCookie(), Value: secret.New(cookie), MaxAge: browserLife}
	return in, nil
}

// loginRefused words a failure of the provider's token endpoint.
func loginRefused(err error) error {
	kind, say := KindUnavailable, "the identity provider could not be reached or failed to answer; try again"
	if e, ok := errors.AsType[*endpoint.Error](err); ok && e.Status != 0 && e.Status < 500 {
		kind, say = KindToken, "the identity provider did not accept the login's code"
		if e.Code == "invalid_client" {
			say += ": check clientId and clientSecret in gateway.auth"
		}
	}
	return &Error{Kind: kind, Remote: LoginRemote, Say: say, Err: fmt.Errorf("%w: %w", ErrExchange, err)}
}

// Browser returns who is logged in at the browser that has these cookies, or
// [ErrNotLoggedIn].
func (b *Broker) Browser(ctx context.Context, cookie func(name string) (string, bool)) (*Browser, error) {
	value, ok := cookie(b.loginCookie())
	if !ok || len(value) != stateLength {
		return nil, ErrNotLoggedIn
	}
	record, err := b.store.Get(ctx, bucketLogins, hash("login", value))
	if errors.Is(err, ErrNotFound) {
		return nil, ErrNotLoggedIn
	} else if err != nil {
		return nil, fmt.Errorf("reading a login: %w", err)
	}
	var r browserRecord
	if err := json.Unmarshal(record.Value, &r); err != nil {
		return nil, fmt.Errorf("decoding a login: %w", err)
	}
	// The config may have changed since.
	if !b.now().Before(r.Expires) || b.login == nil || r.Principal.Issuer != b.login.Issuer {
		return nil, ErrNotLoggedIn
	}
	return &Browser{Principal: r.Principal, Account: r.Account, Expires: r.Expires, Proof: hash("proof", value)}, nil
}

// EndBrowser forgets a login, by the value of its cookie.
func (b *Broker) EndBrowser(ctx context.Context, cookie string) {
	if err := b.store.Delete(ctx, bucketLogins, hash("login", cookie)); err != nil {
		b.log.WarnContext(ctx, "deleting a browser's login failed; it ends by itself", "error", err)
	}
}

// LoginCookie is the cookie of those who are logged in, without its value.
func (b *Broker) LoginCookie() Cookie { return Cookie{Name: b.loginCookie()} }

// sharedSeal seals what browsers carry, with a key that all processes on the
// store have. The first one that needs it makes it.
func (b *Broker) sharedSeal(ctx context.Context) (cipher.AEAD, error) {
	b.mu.RLock()
	seal := b.seal
	b.mu.RUnlock()
	if seal != nil {
		return seal, nil
	}
	name := hash("key", "browsers")
	record, err := b.store.Get(ctx, bucketKeys, name)
	if errors.Is(err, ErrNotFound) {
		key := make([]byte, 32)
		rand.Read(key) // never fails
		if _, err = b.store.Put(ctx, bucketKeys, name, key, 0, time.Time{}); err == nil || errors.Is(err, ErrConflict) {
			record, err = b.store.Get(ctx, bucketKeys, name)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("reading the key for browsers: %w", err)
	}
	block, err := aes.NewCipher(record.Value)
	if err == nil {
		seal, err = cipher.NewGCMWithRandomNonce(block)
	}
	if err != nil {
		return nil, fmt.Errorf("using the key for browsers: %w", err)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.seal = seal
	return seal, nil
}

// PinnedIssuer is who has been found to sign users in to a remote, empty if that
// is not known yet.
func (b *Broker) PinnedIssuer(ctx context.Context, remote string) string {
	r := b.remotes[remote]
	if r == nil {
		return ""
	}
	issuer, err := b.pinned(ctx, r)
	if err != nil {
		return ""
	}
	return issuer
}

// AskedBy notes which program has been told of a sign-in, by the name that it
// gives itself: its page shows that to the person who has to know whether it was
// theirs.
func (b *Broker) AskedBy(ctx context.Context, e *RequiredError, client string) {
	client = shownName(client)
	if client == "" || e.flow == "" {
		return
	}
	now := b.now()
	_, err := b.updateFlow(ctx, e.flow, func(f *flow) error {
		f.Client, f.Asked = client, now
		return nil
	})
	if err != nil && !errors.Is(err, ErrFlowUnknown) {
		b.log.WarnContext(ctx, "noting who asked for a sign-in failed", "error", err)
	}
}

const maxClientName = 80

// shownName is as much of a name as a page may show.
func shownName(name string) string {
	name = strings.ToValidUTF8(strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return -1
		}
		return r
	}, name), "")
	if utf8.RuneCountInString(name) > maxClientName {
		name = string([]rune(name)[:maxClientName]) + "…"
	}
	return name
}
