package auth

import (
	"context"
	"crypto/subtle"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"slices"
	"strings"
	"unicode/utf8"

	"gatehouse/auth/endpoint"
	"gatehouse/auth/secret"
)

// Callback is what the browser brings back from the authorization server.
type Callback struct {
	Remote string     // in the path; empty: the plain route
	Path   string     // of the request, decoded; empty: not compared with the redirect URI's
	Query  url.Values // decoded
	Cookie func(name string) (string, bool)
	Who    Principal // logged in at the browser; see [Visit]
}

// Finished says whose sign-in at what a callback is about.
type Finished struct {
	FlowID    string
	Principal Principal
	Remote    string
	// Again is where the browser goes on if nothing is finished yet: the
	// authorization server was asked to show nothing, and wants to.
	Again *Start
	// Tour says that the next remote follows.
	Tour bool
}

const (
	stateLength  = 43 // 256 bits in base64url
	maxParameter = 4 << 10
)

// Finish answers the callback: it checks that it belongs to a flow, redeems the
// code and writes the grant. Whatever comes out, the state is used up. With an
// error it says whose sign-in it would have been, nil if nobody knows.
//
// It does not end with its caller: a browser that goes away after it has
// brought the code has done its part.
func (b *Broker) Finish(ctx context.Context, c Callback) (*Finished, error) {
	work, done, err := b.work(finishTime)
	if err != nil {
		return nil, err
	}
	defer done()
	// The order matters. The state goes first, so that nothing is tried twice.
	id, ok := one(c.Query, "state")
	if !ok || len(id) != stateLength {
		return nil, fmt.Errorf("%w: malformed", ErrStateUnknown)
	}
	s, err := b.takeState(work, id)
	if err != nil {
		return nil, err
	}
	if !b.now().Before(s.Expires) {
		return nil, fmt.Errorf("%w: expired", ErrStateUnknown)
	}
	f, err := b.readFlow(work, s.Flow)
	switch {
	case errors.Is(err, ErrFlowUnknown):
		return nil, fmt.Errorf("%w: its flow is gone", ErrStateUnknown)
	case err != nil:
		return nil, err
	case f.Ended:
		return nil, fmt.Errorf("%w: its flow has ended", ErrStateUnknown)
	}
	finished := &Finished{FlowID: f.ID, Principal: f.Principal, Remote: f.Remote, Tour: s.Tour}
	r := b.remotes[f.Remote]
	if r == nil || !f.fits(r) {
		return finished, fmt.Errorf("%w: the config has changed since", ErrStateUnknown)
	}
	log := b.log.With("remote", f.Remote, "principal", f.Principal, "flow", f.shortHash())
	code, err := b.check(c, id, s, f, log)
	switch {
	case errors.Is(err, errPrompt):
		return b.prompt(work, f, Visit{Who: c.Who, Tour: s.Tour})
	case errors.Is(err, ErrWrongPerson):
		return finished, b.turnAway(work, f, c.Who, err)
	case err != nil:
		log.WarnContext(ctx, "callback refused", "error", err)
		return finished, err
	}
	if err := b.redeem(work, r, f, s, code); err != nil {
		log.WarnContext(ctx, "sign-in failed", "error", err)
		b.noteTrouble(key{f.Principal, f.Remote}, err)
		return finished, err
	}
	log.InfoContext(ctx, "signed in", "issuer", f.Frozen.Issuer)
	return finished, nil
}

// Plausible reports whether a callback, of a sign-in or a login, may be the end of
// what began here in the same browser: it has a state, and a cookie for that. It
// proves nothing, and reads nothing from the store.
func (b *Broker) Plausible(c Callback) bool {
	state, ok := one(c.Query, "state")
	if !ok || len(state) != stateLength {
		return false
	}
	_, flow := c.Cookie(b.cookieName(state))
	_, trip := c.Cookie(b.tripCookie(state))
	return flow || trip
}

// errPrompt: the authorization server has to show something, and was asked not to.
var errPrompt = errors.New("a prompt is needed")

// prompt begins anew for the same browser, with whatever the authorization
// server has to show.
func (b *Broker) prompt(ctx context.Context, f *flow, v Visit) (*Finished, error) {
	_, err := b.updateFlow(ctx, f.ID, func(f *flow) error {
		f.Prompt = true
		return nil
	})
	if err != nil {
		return nil, err
	}
	start, err := b.Begin(ctx, f.ID, v)
	if err != nil {
		return nil, err
	}
	return &Finished{FlowID: f.ID, Principal: f.Principal, Remote: f.Remote, Again: start}, nil
}

// one returns a parameter that is there exactly once and is sane.
func one(query url.Values, name string) (string, bool) {
	values := query[name]
	if len(values) != 1 {
		return "", false
	}
	v := values[0]
	return v, v != "" && len(v) <= maxParameter && utf8.ValidString(v) && !strings.ContainsRune(v, 0)
}

// check returns the code of a callback that belongs to its flow, comes from the
// flow's browser and from the flow's authorization server.
func (b *Broker) check(c Callback, id string, s *state, f *flow, log *slog.Logger) (code string, err error) {
	if c.Remote != f.callbackRemote() || c.Path != "" && c.Path != b.callbackPathOf(f) {
		return "", ErrWrongRemote
	}
	cookie, ok := c.Cookie(b.cookieName(id))
	if !ok || subtle.ConstantTimeCompare([]byte(hash("cookie", cookie)), []byte(s.CookieHash)) != 1 {
		return "", ErrWrongBrowser
	}
	if err := b.admits(f, c.Who); err != nil {
		return "", err
	}
	code, err = answerCode(c.Query, &f.Frozen)
	if !errors.Is(err, ErrDenied) {
		return code, err
	}
	if s.Unprompted && wantsPrompt(c.Query.Get("error")) {
		return "", errPrompt
	}
	// The code goes to the log if it is one that we know; error_description
	// and error_uri, which anybody may write, go nowhere.
	log.Info("the authorization server answered with an error", "code", endpoint.KnownCode(c.Query.Get("error")))
	b.noteTrouble(key{f.Principal, f.Remote},
		&Error{Kind: KindDenied, Remote: f.Remote, Say: "its authorization server did not grant access: you or it said no; sign in again to retry"})
	return "", ErrDenied
}

// answerCode returns the code of an authorization response (RFC 6749 section
// 4.1.2) of the server that d describes; [ErrDenied] if it is an error's.
func answerCode(query url.Values, d *discovered) (code string, err error) {
	// RFC 6749 section 3.1: "Request and response parameters MUST NOT be included
	// more than once."
	for _, name := range []string{"code", "error", "iss"} {
		if _, ok := one(query, name); !ok && query.Has(name) {
			return "", fmt.Errorf("%w: malformed %s", ErrStateUnknown, name)
		}
	}
	if query.Has("code") == query.Has("error") {
		return "", fmt.Errorf("%w: either a code or an error is due", ErrStateUnknown)
	}
	// RFC 9207 section 2.4: clients that support it "MUST extract the value of the
	// iss parameter from authorization responses they receive if the parameter is
	// present. Clients MUST then decode the value [...] and compare the result to
	// the issuer identifier of the authorization server where the authorization
	// request was sent to. [...] If the value does not match the expected issuer
	// identifier, clients MUST reject the authorization response". Error responses
	// are no exception, so this comes before the error is looked at.
	if iss, ok := one(query, "iss"); ok && iss != d.Issuer || !ok && d.IssParameter {
		return "", ErrIssuerMismatch
	}
	if query.Has("error") {
		return "", ErrDenied
	}
	return query.Get("code"), nil
}

// redeem exchanges the code with one POST and writes the grant.
func (b *Broker) redeem(ctx context.Context, r *Remote, f *flow, s *state, code string) error {
	form := url.Values{
		"grant_type":    {"authorization_code"},
		"code":          {code},
		"redirect_uri":  {f.RedirectURI},
		"code_verifier": {s.Verifier.Value()},
	}
	if f.Frozen.Resource != "" {
		form.Set("resource", f.Frozen.Resource) // RFC 8707 section 2.2
	}
	if bound, err := b.boundTo(ctx, r); err != nil {
		return err
	} else if bound != "" && bound != f.Frozen.Issuer {
		// The link is older than the first sign-in.
		err := b.endFlows(ctx, f.Principal, f.Remote)
		return &Error{Kind: KindDiscovery, Remote: f.Remote, Err: err,
			Say: "this link led to another authorization server than the one where the gateway's client has been used, so the gateway sends nothing there; ask for a new link"}
	}
	c := endpoint.Client{ID: f.ClientID, Secret: f.ClientSecret, Method: f.AuthMethod}
	answer, err := endpoint.Token(ctx, r.HTTP.Fetch(), f.Frozen.TokenEndpoint, c, form)
	if err != nil {
		return b.redeemFailed(f, err)
	}
	if r.login {
		if err := b.verifyLogin(ctx, answer.ID, "", secret.Text{}); err != nil {
			return &Error{Kind: KindToken, Remote: f.Remote, Err: fmt.Errorf("%w: %w", ErrExchange, err),
				Say: "the identity provider did not issue an ID token that can be verified"}
		}
	}

	// The first success ends the flow. From here on its other states are worth
	// nothing, also those that are being redeemed right now.
	now := b.now()
	var states []stateRef
	_, err = b.updateFlow(ctx, f.ID, func(f *flow) error {
		if f.Ended {
			return ErrFlowUnknown
		}
		states = f.States
		f.Ended, f.States, f.Expires = true, nil, now.Add(endedLife)
		f.Outcome = Outcome{OK: true, Say: "The sign-in to " + f.Remote + " is stored."}
		return nil
	})
	if errors.Is(err, ErrFlowUnknown) {
		return fmt.Errorf("%w: its flow has ended", ErrStateUnknown)
	} else if err != nil {
		return internalError(f.Remote, err)
	}
	b.dropStates(ctx, states)

	k := key{f.Principal, f.Remote}
	g := (&grant{
		grantFacts: grantFacts{
			Principal: f.Principal, Remote: f.Remote, RemoteURL: f.RemoteURL,
			Issuer: f.Frozen.Issuer, Resource: f.Frozen.Resource,
			ClientID: f.ClientID, AuthMethod: f.AuthMethod,
			TokenEndpoint: f.Frozen.TokenEndpoint, RevocationEndpoint: f.Frozen.RevocationEndpoint,
			Requested: f.Scopes, Raised: f.Raised,
		},
		ClientSecret: f.ClientSecret,
	}).receive(answer, now)
	if err := b.writeGrant(ctx, k, r, g, AnyVersion); err != nil {
		b.Conclude(ctx, f.ID, Outcome{Say: "You signed in to " + f.Remote + ", but the gateway could not store it."})
		return internalError(f.Remote, err)
	}
	// If the principal has gone or signed out meanwhile, its flows went first.
	if _, err := b.readFlow(ctx, f.ID); errors.Is(err, ErrFlowUnknown) {
		return errors.Join(fmt.Errorf("%w: its flow is gone", ErrStateUnknown), b.dropGrant(ctx, k))
	}
	b.unlend(k)
	b.clearTrouble(ctx, k)
	b.pin(ctx, r, g.Issuer)
	if err := b.endServed(ctx, f); err != nil {
		b.log.WarnContext(ctx, "ending the flow's siblings failed; they expire by themselves", "remote", f.Remote, "error", err)
	}
	return nil
}

// endServed marks a flow as ended in its principal's list and drops those that
// asked for no more than it did.
func (b *Broker) endServed(ctx context.Context, f *flow) error {
	list, _, err := b.readPending(ctx, f.Principal)
	if err != nil {
		return err
	}
	served := map[string]bool{}
	for _, p := range list.Flows {
		if p.Remote != f.Remote || p.ID == f.ID || p.Ended {
			continue
		}
		if other, err := b.readFlow(ctx, p.ID); err == nil && containsAll(f.Scopes, other.Scopes) {
			served[p.ID] = true
		}
	}
	var gone []pendingFlow
	err = b.updatePending(ctx, f.Principal, func(list *pendingList) {
		gone = nil
		list.Flows = slices.DeleteFunc(list.Flows, func(p pendingFlow) bool {
			if served[p.ID] {
				gone = append(gone, p)
			}
			return served[p.ID]
		})
		for i := range list.Flows {
			if list.Flows[i].ID == f.ID {
				list.Flows[i].Ended = true
			}
		}
		gone = append(gone, list.trim(b.maxFlows)...)
	})
	return errors.Join(err, b.dropFlows(ctx, gone))
}

// redeemFailed says what a failed exchange means. The state is used up, the
// flow is not: its link can be tried again, unless its client is no good.
func (b *Broker) redeemFailed(f *flow, err error) error {
	// Its own context: the request may have used up the other's time.
	ctx, done, workErr := b.work(storeTime)
	if workErr != nil {
		return workErr
	}
	defer done()
	kind, say := KindUnavailable, "its authorization server could not be reached or failed to hand out a token; open the link again"
	if e, ok := errors.AsType[*endpoint.Error](err); ok && e.Status != 0 && e.Status < 500 {
		kind, say = KindToken, "its authorization server did not hand out a token that can be used"
		if e.Code != "" {
			say += " (" + e.Code + ")"
		}
		if e.Code == "invalid_client" {
			// The next challenge starts a new flow and, if the client was registered
			// dynamically, registers anew.
			if f.Source == sourceDynamic {
				b.registrar.invalidate(ctx, f.registration())
				say += "; the gateway registers there anew with the next link"
			} else {
				say += "; check clientId and clientSecret in the config"
			}
			if err := b.endFlows(ctx, f.Principal, f.Remote); err != nil {
				b.log.WarnContext(ctx, "ending a flow failed", "remote", f.Remote, "error", err)
			}
		}
	}
	return &Error{Kind: kind, Remote: f.Remote, Say: say, Err: fmt.Errorf("%w: %w", ErrExchange, err)}
}
