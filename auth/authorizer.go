package auth

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"

	"golang.org/x/oauth2"

	"gatehouse/auth/endpoint"
)

// Authorizer is what a session asks about one principal at one remote.
type Authorizer struct {
	b      *Broker
	key    key
	remote *Remote // nil: unknown
	silent *silent // nil: it takes a person
}

// Authorizer returns the authorizer of a principal at a remote. If tokens are
// needed for no such remote, its methods return [ErrUnknownRemote].
func (b *Broker) Authorizer(p Principal, remote string) *Authorizer {
	return &Authorizer{b: b, key: key{p, remote}, remote: b.remotes[remote], silent: b.silent[remote]}
}

type noRefreshKey struct{}

// NoRefresh marks what nobody waits for, such as an event stream that is opened
// again: a grant that nobody uses is not to be refreshed for ever. [Authorizer.Token]
// and [Authorizer.Renew] return [ErrRefreshDue] where they would have to.
func NoRefresh(ctx context.Context) context.Context {
	return context.WithValue(ctx, noRefreshKey{}, true)
}

// MayRefresh reports whether ctx is none of [NoRefresh].
func MayRefresh(ctx context.Context) bool { return ctx.Value(noRefreshKey{}) == nil }

// Token returns the token to send, or nil if there is none that could be good:
// then the request goes without, and the remote says what it wants. It
// refreshes where that helps, waiting for it only if the old token has expired.
func (a *Authorizer) Token(ctx context.Context) (*oauth2.Token, error) {
	if a.remote == nil {
		return nil, ErrUnknownRemote
	} else if a.silent != nil {
		return a.silent.token(ctx, a.key.principal)
	}
	token, err := a.own(ctx)
	if token != nil || err != nil {
		return token, err
	}
	return a.lent(ctx)
}

// own is Token for the remote's own grant.
func (a *Authorizer) own(ctx context.Context) (*oauth2.Token, error) {
	b := a.b
	h, err := b.held(ctx, a.key, a.remote)
	if h == nil || err != nil {
		return nil, err
	}
	token, call, err := b.tokenOf(h, MayRefresh(ctx))
	if call == nil {
		if token == nil && err == nil && h.spent() {
			b.forget(a.key) // the store remembers it, for a while
		}
		return token, err
	}
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-call.done:
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.dead && h.grant.valid(b.now()) {
		t := *h.token
		return &t, nil
	}
	if h.final {
		return nil, nil
	}
	return nil, call.err
}

// tokenOf returns the token of a hold, or the refresh to wait for, which it may
// start.
func (b *Broker) tokenOf(h *hold, mayStart bool) (*oauth2.Token, *refreshCall, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	g := h.grant
	if h.dead || !g.fits(h.remote) {
		return nil, nil, nil
	}
	now := b.now()
	mayRefresh := g.refreshable() && !now.Before(h.retryAt)
	if g.valid(now) {
		if mayStart && mayRefresh && !g.RefreshAt.IsZero() && !now.Before(g.RefreshAt) && !g.inDoubt() {
			b.refreshLocked(h, false)
		}
		t := *h.token
		return &t, nil, nil
	}
	switch {
	case mayRefresh && h.refreshing == nil && !mayStart:
		return nil, nil, ErrRefreshDue
	case mayRefresh || h.refreshing != nil:
		return nil, b.refreshLocked(h, false), nil
	case !g.refreshable() || h.final:
		return nil, nil, nil
	}
	return nil, nil, h.lastErr // it failed a moment ago
}

// spent reports whether the grant is of no use any more, to nobody.
func (h *hold) spent() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.grant.fits(h.remote) && !h.grant.refreshable() && h.refreshing == nil
}

// sentToken returns the bearer token that the answered request carried.
func sentToken(resp *http.Response) string {
	if resp == nil || resp.Request == nil {
		return ""
	}
	scheme, token, _ := strings.Cut(resp.Request.Header.Get("Authorization"), " ")
	if !strings.EqualFold(scheme, "Bearer") {
		return ""
	}
	return token
}

// forcedAgain is how long after a refresh that a 401 caused another 401 means
// that refreshing does not help.
const forcedAgain = time.Minute

// forcedAgain is as long, or half the life of a token that lives for less than
// that: such tokens may well end a little earlier than was said.
func (g *grant) forcedAgain() time.Duration {
	if g.Expires.IsZero() {
		return forcedAgain
	}
	return min(forcedAgain, g.Expires.Sub(g.Obtained)/2)
}

// Renew looks for another token after a 401, without starting anything that a
// person would see. Nil means that there is one: send the request again.
// [ErrSignInNeeded] means that there is no silent way.
func (a *Authorizer) Renew(ctx context.Context, resp *http.Response) error {
	if a.silent != nil {
		return a.silent.renew(ctx, a.key.principal, resp)
	}
	err := a.renewOwn(ctx, resp)
	if errors.Is(err, ErrSignInNeeded) && a.remote != nil && a.remote.SSOGroup != "" {
		return a.borrow(ctx, resp)
	}
	return err
}

// renewOwn is Renew for the remote's own grant.
func (a *Authorizer) renewOwn(ctx context.Context, resp *http.Response) error {
	if a.remote == nil {
		return ErrUnknownRemote
	}
	sent := sentToken(resp)
	a.b.mu.RLock()
	h := a.b.holds[a.key]
	a.b.mu.RUnlock()
	if h != nil {
		a.b.current(ctx, h, 0) // another process may have another token already
	}
	token, err := a.own(ctx)
	switch {
	case err != nil:
		return err
	case token == nil:
		return ErrSignInNeeded
	}
	b := a.b
	h, err = b.held(ctx, a.key, a.remote)
	if err != nil {
		return err
	} else if h == nil {
		return ErrSignInNeeded
	}
	// The remote does not want what looks valid: revoked, perhaps. One refresh
	// may mend that; a second one right after it would not.
	h.mu.Lock()
	now := b.now()
	switch {
	case h.dead:
		h.mu.Unlock()
		return ErrSignInNeeded
	case h.grant.valid(now) && h.grant.Access.Value() != sent: // of somebody else's sign-in or refresh
		h.mu.Unlock()
		return nil
	case !h.grant.refreshable() || h.final || h.refreshing == nil && now.Before(h.forcedAt.Add(h.grant.forcedAgain())):
		h.refusedAt = now
		h.mu.Unlock()
		return ErrSignInNeeded
	case h.refreshing == nil && now.Before(h.retryAt):
		defer h.mu.Unlock()
		return h.lastErr
	case h.refreshing == nil && !MayRefresh(ctx):
		h.mu.Unlock()
		return ErrRefreshDue
	}
	h.forcedAt = now
	call := b.refreshLocked(h, true)
	h.mu.Unlock()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-call.done:
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case h.dead:
		return ErrSignInNeeded
	case h.grant.valid(b.now()) && h.grant.Access.Value() != sent:
		return nil
	case call.err != nil && !h.final:
		return call.err
	}
	h.refusedAt = b.now()
	return ErrSignInNeeded
}

// Challenge answers a 401 or 403 of the remote. Nil means that another token
// is there now: send the request again. A [RequiredError] holds the link for a
// person; an [Error] says why there is none. It reads the status and the
// headers of the response only, and never waits for a browser.
func (a *Authorizer) Challenge(ctx context.Context, resp *http.Response) error {
	if a.remote == nil {
		return ErrUnknownRemote
	}
	if a.silent != nil {
		return a.challengeSilent(ctx, resp)
	}
	ch := parseChallenge(resp.Header)
	if resp.StatusCode == http.StatusForbidden {
		return a.stepUp(ctx, resp, ch)
	}
	if err := a.Renew(ctx, resp); !errors.Is(err, ErrSignInNeeded) {
		return err
	}
	g, refused, err := a.present(ctx)
	if err != nil {
		return err
	}
	w := wish{challenge: ch, reason: ReasonSignIn, need: unionScopes(ch.Scope)}
	switch {
	case refused:
		w.reason = ReasonRefused
		a.b.noteTrouble(a.key, &Error{Kind: KindToken, Remote: a.key.remote, Say: "it no longer accepts the sign-in that was made for it; sign in again"})
	case g != nil:
		w.reason = ReasonExpired
	}
	if len(a.remote.Scopes) > 0 {
		w.need = nil // the config decides what is asked for
	}
	return a.require(ctx, w)
}

// challengeSilent asks for the login at the gateway when no silent way is left.
func (a *Authorizer) challengeSilent(ctx context.Context, resp *http.Response) error {
	var err error
	if resp.StatusCode == http.StatusForbidden {
		err = a.silent.stepUp(ctx, a.key.principal, resp)
	} else {
		err = a.silent.renew(ctx, a.key.principal, resp)
	}
	if errors.Is(err, ErrSignInNeeded) {
		return a.b.requireLogin(ctx, a.key.principal, a.remote)
	}
	return err
}

const (
	maxRaised     = 2   // times that an operation leads to more permissions
	maxOperations = 200 // that are counted for one grant
)

type operationKey struct{}

// ForOperation notes in a context for which operation of a remote a challenge
// is met, so that each leads to more permissions a few times only. name is
// asked when it matters.
func ForOperation(ctx context.Context, name func() string) context.Context {
	return context.WithValue(ctx, operationKey{}, name)
}

func operationOf(ctx context.Context) string {
	name, ok := ctx.Value(operationKey{}).(func() string)
	if !ok {
		return ""
	}
	return hash("operation", name())[:16]
}

var raisedEnough = fmt.Sprintf(": it asks for permissions that it was not granted, after more were asked for on behalf of this %d times. Its operator may know why", maxRaised)

// raise counts once more that an operation leads to more permissions; ok is false
// if that has been often enough.
func raise(times map[string]int, operation string) (next map[string]int, ok bool) {
	if times[operation] >= maxRaised {
		return nil, false
	}
	next = maps.Clone(times)
	if next == nil {
		next = map[string]int{}
	}
	if len(next) < maxOperations || next[operation] > 0 {
		next[operation]++
	}
	return next, true
}

// stepUp answers a 403. RFC 6750 section 3.1: insufficient_scope says that
// "the request requires higher privileges than provided by the access token".
func (a *Authorizer) stepUp(ctx context.Context, resp *http.Response, ch challenge) error {
	const say = "it forbids this to the account that signed in"
	if ch.Error != "insufficient_scope" {
		return &Error{Kind: KindForbidden, Remote: a.key.remote, Say: say}
	}
	token, err := a.Token(ctx)
	switch {
	case err != nil:
		return err
	case token != nil && token.AccessToken != sentToken(resp):
		return nil
	}
	g, _, err := a.present(ctx)
	if err != nil {
		return err
	}
	w := wish{challenge: ch, reason: ReasonMoreScopes, need: unionScopes(ch.Scope)}
	if g != nil {
		if containsAll(g.Granted, w.need) {
			return &Error{Kind: KindForbidden, Remote: a.key.remote,
				Say: say + ": the permissions that it names were granted at the sign-in already"}
		}
		// MCP authorization, step-up flow: clients keep retries few and count them
		// for each resource and operation. So a user who did not grant all that was
		// asked for may think again, but is not asked in a loop.
		var ok bool
		if w.raised, ok = raise(g.Raised, operationOf(ctx)); !ok {
			return &Error{Kind: KindForbidden, Remote: a.key.remote, Say: say + raisedEnough}
		}
		// MCP authorization, step-up flow: "the union of previously requested
		// scopes and those from the challenge".
		w.keep = unionScopes(g.Requested, g.Granted)
	}
	return a.require(ctx, w)
}

// SignIn starts or reuses a flow without a challenge at hand, going by what the
// remote publishes. It returns a [RequiredError], [ErrNoSignIn] if the remote
// publishes nothing, or an [Error].
func (a *Authorizer) SignIn(ctx context.Context) error {
	if a.remote == nil {
		return ErrUnknownRemote
	} else if a.silent != nil {
		if a.remote.Type == TypeMachine {
			return ErrNoSignIn
		}
		return a.b.requireLogin(ctx, a.key.principal, a.remote)
	}
	return a.require(ctx, wish{reason: ReasonSignIn, unasked: true})
}

// present returns the grant that is held, usable or not, and whether the
// remote has just refused it.
func (a *Authorizer) present(ctx context.Context) (g *grant, refused bool, err error) {
	h, err := a.b.held(ctx, a.key, a.remote)
	if h == nil || err != nil {
		return nil, false, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.dead || !h.grant.fits(a.remote) {
		return nil, false, nil
	}
	return h.grant, h.grant.valid(a.b.now()) && !h.refusedAt.IsZero(), nil
}

// wish is what somebody who needs a flow wants of it.
type wish struct {
	challenge challenge
	reason    Reason
	raised    map[string]int
	need      []string // scopes without which the flow is of no use
	keep      []string // scopes to ask for beside those
	unasked   bool     // no challenge was seen: the remote must publish that it signs in
}

// startCall is one start of a flow that everybody who needs it waits for.
type startCall struct {
	unasked bool
	done    chan struct{}
	flow    *flow // set before done is closed, like err
	err     error
}

// require returns the error that asks for the sign-in, with the link of a
// flow. Whoever comes while one is being started waits for that one.
func (a *Authorizer) require(ctx context.Context, w wish) error {
	b := a.b
	if b.disabled {
		return ErrDisabled
	}
	for {
		f, err := b.reuse(ctx, a.key, w)
		if err != nil {
			return err
		} else if f != nil {
			return b.required(f)
		}
		call, mine, err := b.startFlow(a.key, a.remote, w)
		if err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-call.done:
		}
		switch {
		case !mine && call.unasked != w.unasked && errors.Is(call.err, ErrNoSignIn):
			// That answer was for somebody without a challenge.
		case call.err != nil:
			return call.err
		case mine || containsAll(call.flow.Scopes, w.need):
			return b.required(call.flow)
		}
	}
}

// unionScopes joins lists, in order, without doubles and without what is no
// scope. RFC 6749 section 3.3: scope-token = 1*( %x21 / %x23-5B / %x5D-7E ).
func unionScopes(lists ...[]string) []string {
	const maxScopes = 200
	var union []string
	for _, list := range lists {
		for _, s := range list {
			if s != "" && endpoint.VisibleASCII(s) && !strings.ContainsAny(s, `"\`) && !slices.Contains(union, s) && len(union) < maxScopes {
				union = append(union, s)
			}
		}
	}
	return union
}

func containsAll(have, want []string) bool {
	return !slices.ContainsFunc(want, func(s string) bool { return !slices.Contains(have, s) })
}
