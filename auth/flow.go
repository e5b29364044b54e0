package auth

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"time"

	"golang.org/x/oauth2"

	"gatehouse/auth/secret"
)

const (
	flowLife   = 10 * time.Minute // of a link, from the last time it was given out
	flowMax    = time.Hour        // of a link, from its start
	flowRest   = time.Minute      // a link with less than that left is not given out again
	stateLife  = 10 * time.Minute // of a state, and so of the visit to the authorization server
	flowStates = 10               // live states of one flow
	endedLife  = 10 * time.Minute // for which an ended flow says what came of it
)

// flow is one pending sign-in: for whom, where, and the authorization server's
// metadata and client as they were when it started. Nothing that happens later
// changes where its code is redeemed.
type flow struct {
	flowFacts
	ClientSecret secret.Text
}

// flowFacts are the parts of a flow that are no secrets. The id is none: it
// opens a page, which decides who may go on.
type flowFacts struct {
	ID        string // 130 random bits, in letters and digits that survive in any prose
	Principal Principal
	Remote    string
	RemoteURL string
	Reason    Reason
	Scopes    []string
	Raised    map[string]int `json:",omitempty"` // as in the grant that this is for
	Created   time.Time
	Expires   time.Time // of the link
	States    []stateRef
	Ended     bool
	Outcome   Outcome
	Prompt    bool      // the authorization server wants to show something: no more tries without
	Client    string    `json:",omitempty"` // the program that asked last, as it calls itself
	Asked     time.Time // when that was
	Stranger  time.Time `json:",omitzero"` // when somebody else opened the link

	Frozen      discovered
	RedirectURI string
	ClientID    string
	AuthMethod  string
	Source      string // of the client id
}

// stateRef finds the states of a flow, so that its end is theirs.
type stateRef struct {
	Key     string
	Expires time.Time
}

// flowRecord is a flow's form in the store.
type flowRecord struct {
	flowFacts
	ClientSecret string `json:",omitempty"`
}

// Outcome is what came of a connection after its sign-in.
type Outcome struct {
	OK  bool
	Say string // for the page
}

// FlowInfo is what a page may know of a flow.
type FlowInfo struct {
	Principal Principal
	Remote    string
	Issuer    string
	SignInAt  string // the host, with its port, that a browser is sent to
	Scopes    []string
	Client    string    // the program that asked, as it calls itself: anybody's text, printable
	Asked     time.Time // when it did
	Stranger  time.Time // when somebody else opened the link last; zero: nobody did
	Expires   time.Time
	Ended     bool
	Outcome   Outcome // once ended
}

// Visit is a browser at a flow's link.
type Visit struct {
	// Who is logged in at the browser, the zero Principal if nobody is. Where users
	// log in at the gateway (see [Login].Audience), it has to be the flow's own.
	Who Principal
	// Tour says that the next remote follows when this one is done ([Finished].Tour).
	Tour bool
}

// admits says whether a visit may go on with a flow: nil, [ErrNotLoggedIn] or
// [ErrWrongPerson].
//
// MCP elicitation, phishing: "the server MUST ensure that the user who started
// the elicitation request is the same user who completes the authorization flow".
// Where nobody logs in, the cookie alone says so (see the gateway's connect page).
func (b *Broker) admits(f *flow, who Principal) error {
	switch {
	case b.audience == "" || who == f.Principal:
		return nil
	case who == Principal{}:
		return ErrNotLoggedIn // it may be the flow's own
	}
	return ErrWrongPerson
}

// turnAway notes that somebody else came to a flow, if that is why it was not
// admitted, and returns why.
func (b *Broker) turnAway(ctx context.Context, f *flow, who Principal, why error) error {
	if !errors.Is(why, ErrWrongPerson) {
		return why
	}
	b.log.WarnContext(ctx, "a sign-in link was opened by another account", "remote", f.Remote, "principal", f.Principal, "by", who, "flow", f.shortHash())
	now := b.now()
	if _, err := b.updateFlow(ctx, f.ID, func(f *flow) error {
		f.Stranger = now
		return nil
	}); err != nil && !errors.Is(err, ErrFlowUnknown) {
		b.log.WarnContext(ctx, "noting that failed", "error", err)
	}
	if err := b.updateStrangers(ctx, f.Principal, func(known strangers) bool {
		known[f.Remote] = stranger{At: now}
		return true
	}); err != nil {
		b.log.WarnContext(ctx, "remembering that failed", "error", err)
	}
	return why
}

// Start is what sends a browser to the authorization server.
type Start struct {
	RedirectURL string
	Cookie      Cookie
}

// Cookie is the proof that the browser that finishes is the one that began. The
// gateway adds the attributes.
type Cookie struct {
	Name   string
	Value  secret.Text
	MaxAge time.Duration
}

// live reports whether the link still works.
func (f *flow) live(now time.Time) bool { return !f.Ended && now.Before(f.Expires) }

// slide keeps a link that is in use alive.
func (f *flow) slide(now time.Time) {
	until := now.Add(flowLife)
	if limit := f.Created.Add(flowMax); until.After(limit) {
		until = limit
	}
	if until.After(f.Expires) {
		f.Expires = until
	}
}

func (f *flow) registration() *registration {
	return &registration{Issuer: f.Frozen.Issuer, RedirectURI: f.RedirectURI, ClientID: f.ClientID,
		ClientSecret: f.ClientSecret, AuthMethod: f.AuthMethod, Source: f.Source}
}

// shortHash is as much of a flow as a log may hold.
func (f *flow) shortHash() string { return flowKey(f.ID)[:8] }

func flowKey(id string) string { return hash("flow", id) }

// randomText returns 256 random bits.
func randomText() string {
	var bits [32]byte
	rand.Read(bits[:]) // never fails
	return base64.RawURLEncoding.EncodeToString(bits[:])
}

// required is the error that hands out a flow's link.
func (b *Broker) required(f *flow) *RequiredError {
	return &RequiredError{Remote: f.Remote, AuthURL: b.publicURL + "/connect/" + f.ID,
		Expires: f.Expires, Reason: f.Reason, Issuer: f.Frozen.Issuer, Stranger: !f.Stranger.IsZero(), flow: f.ID}
}

// startFlow starts a flow, or joins the start that is under way for the key.
func (b *Broker) startFlow(k key, r *Remote, w wish) (call *startCall, mine bool, err error) {
	ctx, done, err := b.work(startTime)
	if err != nil {
		return nil, false, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if call := b.starts[k]; call != nil {
		done()
		return call, false, nil
	}
	call = &startCall{unasked: w.unasked, done: make(chan struct{})}
	b.starts[k] = call
	go func() {
		defer done()
		call.flow, call.err = b.start(ctx, k, r, w)
		if call.err != nil && !errors.Is(call.err, ErrNoSignIn) {
			b.log.Warn("no sign-in link", "remote", k.remote, "principal", k.principal, "error", call.err)
			b.noteTrouble(k, call.err)
		}
		b.mu.Lock()
		delete(b.starts, k)
		b.mu.Unlock()
		close(call.done)
	}()
	return call, true, nil
}

// start walks from the challenge to a flow with a link.
func (b *Broker) start(ctx context.Context, k key, r *Remote, w wish) (*flow, error) {
	// One may have been started since the caller looked.
	if f, err := b.reuse(ctx, k, w); f != nil || err != nil {
		return f, err
	}
	d, err := b.discover(ctx, r, w.challenge, nil)
	if err != nil {
		return nil, asError(k.remote, err)
	}
	if w.unasked && d.NoPKCEMetadata {
		// Endpoints guessed by the rules of 2025-03-26 are no offer.
		return nil, ErrNoSignIn
	}
	if d.NoPKCEMetadata {
		b.discoverer.warnDefaults(r.Name)
	}
	if err := b.checkIssuer(ctx, k, r, d.Issuer); err != nil {
		return nil, err
	}
	reg, err := b.clientFor(ctx, k, r, d)
	if err != nil {
		return nil, asError(k.remote, err)
	}
	scopes, err := b.scopesFor(ctx, k, r, w, d)
	if err != nil {
		return nil, err
	}
	now := b.now()
	f := &flow{
		flowFacts: flowFacts{
			ID: rand.Text(), Principal: k.principal, Remote: k.remote, RemoteURL: r.URL,
			Reason: w.reason, Scopes: scopes, Raised: w.raised, Created: now, Expires: now.Add(flowLife), Asked: now,
			Frozen: *d, RedirectURI: reg.RedirectURI, ClientID: reg.ClientID, AuthMethod: reg.AuthMethod, Source: reg.Source,
		},
		ClientSecret: reg.ClientSecret,
	}
	if err := b.addFlow(ctx, f); err != nil {
		return nil, internalError(k.remote, err)
	}
	if trouble, _ := b.trouble(ctx, k); trouble != nil && (trouble.Kind == KindDiscovery || trouble.Kind == KindRegistration) {
		b.clearTrouble(ctx, k)
	}
	b.log.Info("sign-in link made", "remote", k.remote, "principal", k.principal, "issuer", d.Issuer,
		"reason", f.Reason, "client", f.Source, "scopes", f.Scopes, "flow", f.shortHash())
	return f, nil
}

// checkIssuer makes a change of a remote's authorization server an event: it is
// logged, and what was granted by the old one is not used any more.
func (b *Broker) checkIssuer(ctx context.Context, k key, r *Remote, issuer string) error {
	was, err := b.pinned(ctx, r)
	if err != nil {
		return internalError(k.remote, fmt.Errorf("reading the pinned issuer: %w", err))
	}
	h, err := b.held(ctx, k, r)
	if err != nil {
		return err
	}
	var g *grant
	if h != nil {
		g = h.snapshot()
	}
	if g != nil {
		was = g.Issuer
	}
	if was == "" || was == issuer {
		return nil
	}
	b.log.WarnContext(ctx, "the authorization server of a remote has changed: everybody signs in anew",
		"event", "issuer_changed", "remote", k.remote, "principal", k.principal, "was", was, "now", issuer)
	if g == nil || g.Access.IsEmpty() {
		return nil
	}
	if err := b.endGrant(ctx, h, g); err != nil && !errors.Is(err, ErrConflict) {
		return internalError(k.remote, err)
	}
	return nil
}

// clientFor finds the client of a new flow. A dynamic one that the
// authorization server has disowned at a refresh is replaced here, once; the
// grant that came with it is not touched.
func (b *Broker) clientFor(ctx context.Context, k key, r *Remote, d *discovered) (*registration, error) {
	reg, err := b.registrar.register(ctx, r, d, nil)
	if err != nil {
		return nil, err
	}
	h, err := b.held(ctx, k, r)
	if err != nil || h == nil {
		return reg, err
	}
	h.mu.Lock()
	disowned := h.badClient && h.grant.ClientID == reg.ClientID
	h.mu.Unlock()
	if !disowned || reg.Source != sourceDynamic {
		return reg, nil
	}
	b.registrar.invalidate(ctx, reg)
	return b.registrar.register(ctx, r, d, nil)
}

// scopesOf decides what to ask for where nothing else is known. MCP
// authorization, scope selection: the scope of the challenge, else all of
// scopes_supported, else none.
func scopesOf(r *Remote, ch challenge, d *discovered) []string {
	switch {
	case len(r.Scopes) > 0:
		return r.Scopes
	case len(ch.Scope) == 0:
		return d.ScopesSupported
	}
	return ch.Scope
}

// withOffline asks for a refresh token as well. MCP authorization: clients MAY
// add offline_access "when the authorization server metadata contains it in
// scopes_supported". Alone it would replace the server's defaults.
func withOffline(r *Remote, d *discovered, scopes []string) []string {
	if (len(r.Scopes) == 0 || r.login) && len(scopes) > 0 && slices.Contains(d.ASScopes, "offline_access") {
		return unionScopes(scopes, []string{"offline_access"})
	}
	return scopes
}

// scopesFor decides what a new flow asks for.
func (b *Broker) scopesFor(ctx context.Context, k key, r *Remote, w wish, d *discovered) ([]string, error) {
	// The link that is open asks for less. The new one asks for all of it, so
	// that either may be finished first.
	var open []string
	f, err := b.pending(ctx, k)
	if err != nil {
		return nil, err
	} else if f != nil {
		open = f.Scopes
	}
	return withOffline(r, d, unionScopes(w.keep, open, scopesOf(r, w.challenge, d), w.need)), nil
}

// Begin goes on from a flow's link: it mints a state, a PKCE verifier and a
// cookie and says where to send the browser. Every call begins anew, in another
// tab perhaps; the flow's first success ends them all.
func (b *Broker) Begin(ctx context.Context, flowID string, v Visit) (*Start, error) {
	f, err := b.readFlow(ctx, flowID)
	if err != nil {
		return nil, err
	}
	now := b.now()
	if r := b.remotes[f.Remote]; r == nil || !f.fits(r) || !f.live(now) {
		return nil, ErrFlowUnknown
	}
	if err := b.admits(f, v.Who); err != nil {
		return nil, b.turnAway(ctx, f, v.Who, err)
	}
	id, cookie := randomText(), randomText()
	silently := b.unprompted(ctx, f)
	s := &state{
		stateFacts: stateFacts{Flow: f.ID, CookieHash: hash("cookie", cookie), Expires: now.Add(stateLife), Unprompted: silently, Tour: v.Tour},
		Verifier:   secret.New(oauth2.GenerateVerifier()),
	}
	if err := b.putState(ctx, id, s); err != nil {
		return nil, internalError(f.Remote, err)
	}
	var dropped []stateRef
	f, err = b.updateFlow(ctx, flowID, func(f *flow) error {
		if !f.live(now) {
			return ErrFlowUnknown
		}
		dropped = nil
		f.States = slices.DeleteFunc(f.States, func(s stateRef) bool { return !now.Before(s.Expires) })
		f.States = append(f.States, stateRef{stateKey(id), s.Expires})
		if over := len(f.States) - flowStates; over > 0 {
			dropped = slices.Clone(f.States[:over])
			f.States = slices.Delete(f.States, 0, over)
		}
		f.slide(now)
		return nil
	})
	if err != nil {
		b.dropStates(ctx, []stateRef{{Key: stateKey(id)}})
		return nil, err
	}
	b.dropStates(ctx, dropped)

	conf := oauth2.Config{
		ClientID:    f.ClientID,
		RedirectURL: f.RedirectURI,
		Scopes:      f.Scopes,
		Endpoint:    oauth2.Endpoint{AuthURL: f.Frozen.AuthorizationEndpoint},
	}
	options := []oauth2.AuthCodeOption{oauth2.S256ChallengeOption(s.Verifier.Value())}
	if f.Frozen.Resource != "" {
		// RFC 8707; MCP authorization: the parameter "MUST be included in both
		// authorization requests and token requests".
		options = append(options, oauth2.SetAuthURLParam("resource", f.Frozen.Resource))
	}
	if silently {
		options = append(options, oauth2.SetAuthURLParam("prompt", "none"))
	} else if slices.Contains(f.Scopes, "offline_access") {
		// OpenID Connect Core 1.0 section 11: without consent among the prompts a
		// server ignores offline_access, and gives no refresh token.
		options = append(options, oauth2.SetAuthURLParam("prompt", "consent"))
	}
	return &Start{
		RedirectURL: conf.AuthCodeURL(id, options...),
		Cookie:      Cookie{Name: b.cookieName(id), Value: secret.New(cookie), MaxAge: stateLife},
	}, nil
}

// cookieName is different for every state, so that tabs do not overwrite each
// other's.
func (b *Broker) cookieName(state string) string {
	return b.cookiePrefix() + "gatehouse_flow_" + hash("cookie name", state)[:8]
}

// cookiePrefix ties a cookie to this very host, over TLS.
func (b *Broker) cookiePrefix() string {
	if strings.HasPrefix(b.publicURL, "https:") {
		return "__Host-"
	}
	return ""
}

// Flow returns what the pages show of a flow to a visitor: while its link works,
// and for ten minutes after it has ended.
func (b *Broker) Flow(ctx context.Context, flowID string, v Visit) (*FlowInfo, error) {
	f, err := b.readFlow(ctx, flowID)
	if err != nil {
		return nil, err
	}
	if !b.now().Before(f.Expires) {
		return nil, ErrFlowUnknown
	}
	info := &FlowInfo{Principal: f.Principal, Remote: f.Remote, Issuer: f.Frozen.Issuer, SignInAt: hostOf(f.Frozen.AuthorizationEndpoint), Scopes: f.Scopes,
		Client: f.Client, Asked: f.Asked, Stranger: f.Stranger, Expires: f.Expires, Ended: f.Ended, Outcome: f.Outcome}
	if err := b.admits(f, v.Who); err != nil {
		return info, b.turnAway(ctx, f, v.Who, err)
	}
	return info, nil
}

func hostOf(address string) string {
	u, err := url.Parse(address)
	if err != nil {
		return "" // discovery refuses such
	}
	return u.Host
}

// SkipLogin ends the flow of [LoginRemote] that is open for a principal: its
// sign-in has come about by a browser's login (see [Broker.FinishLogin]). It
// returns the flow's id, empty if there was none.
func (b *Broker) SkipLogin(ctx context.Context, p Principal) (flowID string, err error) {
	pending, err := b.pending(ctx, key{p, LoginRemote})
	if err != nil || pending == nil {
		return "", err
	}
	now := b.now()
	var states []stateRef
	f, err := b.updateFlow(ctx, pending.ID, func(f *flow) error {
		if f.Ended {
			return ErrFlowUnknown
		}
		states = f.States
		f.Ended, f.States, f.Expires = true, nil, now.Add(endedLife)
		f.Outcome = Outcome{OK: true, Say: "You are logged in."}
		return nil
	})
	if errors.Is(err, ErrFlowUnknown) {
		return "", nil // somebody else was quicker
	} else if err != nil {
		return "", err
	}
	b.dropStates(ctx, states)
	return f.ID, b.endServed(ctx, f)
}

// Conclude notes what came of the connection after a sign-in, for whoever
// looks at the flow's page.
func (b *Broker) Conclude(ctx context.Context, flowID string, o Outcome) {
	_, err := b.updateFlow(ctx, flowID, func(f *flow) error {
		if !f.Ended {
			return ErrFlowUnknown
		}
		f.Outcome = o
		return nil
	})
	if err != nil {
		b.log.WarnContext(ctx, "noting the outcome of a sign-in failed", "error", err)
	}
}

// readFlow returns the flow, ended or not, or [ErrFlowUnknown].
func (b *Broker) readFlow(ctx context.Context, id string) (*flow, error) {
	f, _, err := b.readFlowVersion(ctx, id)
	return f, err
}

func (b *Broker) readFlowVersion(ctx context.Context, id string) (*flow, uint64, error) {
	record, err := b.store.Get(ctx, bucketFlows, flowKey(id))
	if errors.Is(err, ErrNotFound) {
		return nil, 0, ErrFlowUnknown
	} else if err != nil {
		return nil, 0, fmt.Errorf("reading a flow: %w", err)
	}
	var r flowRecord
	if err := json.Unmarshal(record.Value, &r); err != nil {
		return nil, 0, fmt.Errorf("decoding a flow: %w", err)
	}
	return &flow{r.flowFacts, secret.New(r.ClientSecret)}, record.Version, nil
}

func (b *Broker) putFlow(ctx context.Context, f *flow, version uint64) error {
	data, err := json.Marshal(flowRecord{f.flowFacts, f.ClientSecret.Value()})
	if err != nil {
		return fmt.Errorf("encoding a flow: %w", err)
	}
	// A state that was minted in the last moment of the link may still come back.
	_, err = b.store.Put(ctx, bucketFlows, flowKey(f.ID), data, version, f.Expires.Add(stateLife))
	if err != nil {
		return fmt.Errorf("writing a flow: %w", err)
	}
	return nil
}

// updateFlow changes a flow. change may run more than once, each time on what
// is stored by then.
func (b *Broker) updateFlow(ctx context.Context, id string, change func(*flow) error) (*flow, error) {
	for {
		f, version, err := b.readFlowVersion(ctx, id)
		if err != nil {
			return nil, err
		}
		if err := change(f); err != nil {
			return nil, err
		}
		if err := b.putFlow(ctx, f, version); !errors.Is(err, ErrConflict) {
			return f, err
		}
	}
}

// pendingList is the record of a principal's flows.
type pendingList struct {
	Flows []pendingFlow // oldest first
}

type pendingFlow struct {
	ID     string
	Remote string
	Ended  bool
	Gone   time.Time // when the record has expired at the latest
}

func pendingKey(p Principal) string { return hash("pending", p.Key()) }

func (b *Broker) readPending(ctx context.Context, p Principal) (*pendingList, uint64, error) {
	var list pendingList
	record, err := b.store.Get(ctx, bucketPending, pendingKey(p))
	if errors.Is(err, ErrNotFound) {
		return &list, 0, nil
	} else if err != nil {
		return nil, 0, fmt.Errorf("reading the pending flows: %w", err)
	}
	if err := json.Unmarshal(record.Value, &list); err != nil {
		return nil, 0, fmt.Errorf("decoding the pending flows: %w", err)
	}
	return &list, record.Version, nil
}

// updatePending changes the list of a principal's flows. change may run more
// than once.
func (b *Broker) updatePending(ctx context.Context, p Principal, change func(*pendingList)) error {
	for {
		list, version, err := b.readPending(ctx, p)
		if err != nil {
			return err
		}
		now := b.now()
		list.Flows = slices.DeleteFunc(list.Flows, func(f pendingFlow) bool { return !now.Before(f.Gone) })
		change(list)
		data, err := json.Marshal(list)
		if err != nil {
			return fmt.Errorf("encoding the pending flows: %w", err)
		}
		expires := now
		for _, f := range list.Flows {
			if f.Gone.After(expires) {
				expires = f.Gone
			}
		}
		_, err = b.store.Put(ctx, bucketPending, pendingKey(p), data, version, expires)
		if err == nil {
			return nil
		} else if !errors.Is(err, ErrConflict) {
			return fmt.Errorf("writing the pending flows: %w", err)
		}
	}
}

// addFlow writes a new flow. When the principal has too many, the oldest go.
func (b *Broker) addFlow(ctx context.Context, f *flow) error {
	if err := b.putFlow(ctx, f, 0); err != nil {
		return err
	}
	var gone []pendingFlow
	err := b.updatePending(ctx, f.Principal, func(list *pendingList) {
		list.Flows = append(list.Flows, pendingFlow{ID: f.ID, Remote: f.Remote, Gone: f.Created.Add(flowMax + stateLife)})
		gone = list.trim(b.maxFlows)
	})
	if err != nil {
		return errors.Join(err, b.store.Delete(ctx, bucketFlows, flowKey(f.ID)))
	}
	return b.dropFlows(ctx, gone)
}

// trim takes out the oldest beyond limit, of the pending and of the ended alike.
func (l *pendingList) trim(limit int) (gone []pendingFlow) {
	room := map[bool]int{true: limit, false: limit}
	var kept []pendingFlow
	for _, f := range slices.Backward(l.Flows) {
		if room[f.Ended] > 0 {
			room[f.Ended]--
			kept = append(kept, f)
		} else {
			gone = append(gone, f)
		}
	}
	slices.Reverse(kept)
	l.Flows = kept
	return gone
}

// dropFlows deletes flows and their states.
func (b *Broker) dropFlows(ctx context.Context, flows []pendingFlow) error {
	var failed error
	for _, p := range flows {
		f, err := b.readFlow(ctx, p.ID)
		if errors.Is(err, ErrFlowUnknown) {
			continue
		} else if err != nil {
			failed = errors.Join(failed, err)
			continue
		}
		failed = errors.Join(failed, b.store.Delete(ctx, bucketFlows, flowKey(p.ID)))
		b.dropStates(ctx, f.States)
	}
	return failed
}

// endFlows deletes the flows of a principal at a remote, ended ones too; at all
// remotes if remote is empty.
func (b *Broker) endFlows(ctx context.Context, p Principal, remote string) error {
	list, _, err := b.readPending(ctx, p)
	if err != nil || len(list.Flows) == 0 {
		return err
	}
	var gone []pendingFlow
	err = b.updatePending(ctx, p, func(list *pendingList) {
		gone = nil
		list.Flows = slices.DeleteFunc(list.Flows, func(f pendingFlow) bool {
			if remote != "" && f.Remote != remote {
				return false
			}
			gone = append(gone, f)
			return true
		})
	})
	return errors.Join(err, b.dropFlows(ctx, gone))
}

// pending returns the newest flow of a key whose link works; nil if there is none.
func (b *Broker) pending(ctx context.Context, k key) (*flow, error) {
	list, _, err := b.readPending(ctx, k.principal)
	if err != nil {
		return nil, internalError(k.remote, err)
	}
	for _, p := range slices.Backward(list.Flows) {
		if p.Ended || p.Remote != k.remote {
			continue
		}
		f, err := b.readFlow(ctx, p.ID)
		if errors.Is(err, ErrFlowUnknown) {
			continue
		} else if err != nil {
			return nil, internalError(k.remote, err)
		}
		// One of a process with its pages elsewhere would end where nobody listens.
		here := strings.HasPrefix(f.RedirectURI, b.publicURL+"/")
		if here && f.live(b.now()) && f.fits(b.remotes[k.remote]) {
			return f, nil
		}
	}
	return nil, nil
}

// fits reports whether the flow is for the remote as it is configured.
func (f *flow) fits(r *Remote) bool {
	return f.RemoteURL == r.URL && (r.Issuer == "" || r.Issuer == f.Frozen.Issuer) && (r.ClientID == "" || r.ClientID == f.ClientID)
}

// reuse gives out the link of the pending flow again, if it serves the wish.
func (b *Broker) reuse(ctx context.Context, k key, w wish) (*flow, error) {
	f, err := b.pending(ctx, k)
	if f == nil || err != nil || !containsAll(f.Scopes, w.need) {
		return nil, err
	}
	now := b.now()
	f, err = b.updateFlow(ctx, f.ID, func(f *flow) error {
		f.slide(now)
		if !f.live(now.Add(flowRest)) {
			return ErrFlowUnknown
		}
		f.Asked = now
		return nil
	})
	if errors.Is(err, ErrFlowUnknown) {
		return nil, nil
	} else if err != nil {
		return nil, internalError(k.remote, err)
	}
	return f, nil
}

// state is one pending authorization request of a flow. What the browser
// carries is a random text that names it.
type state struct {
	stateFacts
	Verifier secret.Text
}

type stateFacts struct {
	Flow       string
	CookieHash string
	Expires    time.Time
	Unprompted bool // the authorization server was asked to show nothing
	Tour       bool // the next remote follows
}

// stateRecord is a state's form in the store.
type stateRecord struct {
	stateFacts
	Verifier string
}

func stateKey(id string) string { return hash("state", id) }

func (b *Broker) putState(ctx context.Context, id string, s *state) error {
	data, err := json.Marshal(stateRecord{s.stateFacts, s.Verifier.Value()})
	if err != nil {
		return fmt.Errorf("encoding a state: %w", err)
	}
	if _, err := b.store.Put(ctx, bucketStates, stateKey(id), data, 0, s.Expires); err != nil {
		return fmt.Errorf("writing a state: %w", err)
	}
	return nil
}

// takeState uses a state up: of many callers one gets it, the others
// [ErrStateUnknown].
func (b *Broker) takeState(ctx context.Context, id string) (*state, error) {
	record, err := b.store.Take(ctx, bucketStates, stateKey(id))
	if errors.Is(err, ErrNotFound) {
		return nil, ErrStateUnknown
	} else if err != nil {
		return nil, fmt.Errorf("reading a state: %w", err)
	}
	var r stateRecord
	if err := json.Unmarshal(record.Value, &r); err != nil {
		return nil, fmt.Errorf("decoding a state: %w", err)
	}
	return &state{r.stateFacts, secret.New(r.Verifier)}, nil
}

func (b *Broker) dropStates(ctx context.Context, states []stateRef) {
	for _, s := range states {
		if err := b.store.Delete(ctx, bucketStates, s.Key); err != nil {
			b.log.WarnContext(ctx, "deleting a state failed; it expires by itself", "error", err)
		}
	}
}

// callbackRemote is the remote in the path of the flow's redirect URI: none for
// a client that was registered by hand.
func (f *flow) callbackRemote() string {
	if f.Source == sourceConfigured {
		return ""
	}
	return f.Remote
}

// callbackPath is the path of the flow's redirect URI under the public URL.
func (b *Broker) callbackPathOf(f *flow) string {
	path := strings.TrimPrefix(f.RedirectURI, b.publicURL)
	if plain, err := url.PathUnescape(path); err == nil {
		return plain
	}
	return path
}
