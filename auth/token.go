package auth

import (
	"cmp"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"strings"
	"time"
	"unicode"

	"gatehouse/auth/endpoint"
	"gatehouse/auth/gate"
	"gatehouse/auth/secret"
)

// accountOf reads from an ID token who signed in. The signature is not
// checked: the token came straight from the token endpoint, and what is read
// here is shown to the user as theirs and decides nothing.
func accountOf(idToken secret.Text) string {
	parts := strings.Split(idToken.Value(), ".")
	if len(parts) != 3 {
		return ""
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return ""
	}
	var claims struct {
		Email             string `json:"email"`
		PreferredUsername string `json:"preferred_username"`
		Subject           string `json:"sub"`
	}
	if json.Unmarshal(payload, &claims) != nil {
		return ""
	}
	account := cmp.Or(claims.Email, claims.PreferredUsername, claims.Subject)
	if len(account) > 128 || strings.ContainsFunc(account, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return ""
	}
	return account
}

// revoke tells the authorization server to forget the grant's tokens.
// RFC 7009 section 2.1: if the token is a refresh token, the server "SHOULD
// also invalidate all access tokens based on the same authorization grant";
// those that do not are told of the access token as well.
func (b *Broker) revoke(ctx context.Context, r *Remote, g *grant) error {
	if g.RevocationEndpoint == "" {
		return errors.New("the authorization server has no revocation endpoint")
	}
	var failed error
	for _, t := range []struct {
		hint  string
		token secret.Text
	}{{"refresh_token", g.Refresh}, {"access_token", g.Access}} {
		if t.token.IsEmpty() {
			continue
		}
		form := url.Values{"token": {t.token.Value()}, "token_type_hint": {t.hint}}
		resp, err := endpoint.Post(ctx, r.HTTP.Fetch(), g.RevocationEndpoint, g.client(), form)
		if err != nil {
			failed = errors.Join(failed, fmt.Errorf("revoking the %s: %w", t.hint, err))
			continue
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			failed = errors.Join(failed, fmt.Errorf("revoking the %s: the server answered %d", t.hint, resp.StatusCode))
		}
	}
	return failed
}

func (g *grant) client() endpoint.Client {
	return endpoint.Client{ID: g.ClientID, Secret: g.ClientSecret, Method: g.AuthMethod}
}

// refreshCall is one refresh that everybody who needs it waits for.
type refreshCall struct {
	done chan struct{}
	err  error // set before done is closed
}

const (
	// After a failed refresh the next one waits, 1 s at first.
	refreshPause    = time.Second
	refreshPauseMax = 30 * time.Second
	// After a refusal that is not the end of the grant, longer.
	refusedPause = 5 * time.Minute
)

// refreshLocked starts a refresh, or returns the one in flight. refused says
// that the remote does not want the present token. h.mu is held.
func (b *Broker) refreshLocked(h *hold, refused bool) *refreshCall {
	if h.refreshing != nil {
		return h.refreshing
	}
	call := &refreshCall{done: make(chan struct{})}
	ctx, done, err := b.work(refreshTime)
	if err != nil {
		call.err = err
		close(call.done)
		return call
	}
	h.refreshing = call
	go func() {
		defer done()
		call.err = b.refresh(ctx, h, refused)
		h.mu.Lock()
		h.refreshing = nil
		h.mu.Unlock()
		close(call.done)
	}()
	return call
}

// refreshLease names the lease of whoever refreshes a grant.
func refreshLease(k key) string { return hash("refresh", k.store()) }

// refresh redeems the refresh token once and writes what comes of it.
//
// It goes: lease, read again, note the intent, look at the lease, one POST,
// compare and swap, use; the lease only where other processes have the grant,
// too. An answer that is lost, or a process that dies on the way, leaves the
// note. Whoever finds it uses the access token while it lives, and sends the
// refresh token again only when nothing is left to lose: the server answers, or
// ends the grant.
func (b *Broker) refresh(ctx context.Context, h *hold, refused bool) error {
	log := b.log.With("remote", h.key.remote, "principal", h.key.principal)
	lease, err := b.leaseToRefresh(ctx, h.key)
	if err != nil && errors.Is(ctx.Err(), context.DeadlineExceeded) { // not the store's own deadline
		return b.refreshFailed(log, h, nil, &endpoint.Error{What: "waiting for the refresh of another process", Err: err})
	} else if err != nil {
		return b.storeFailed(log, h, err)
	}
	defer lease.Release()
	h.mu.Lock()
	before := b.gates.Of(h.grant.TokenEndpoint)
	h.mu.Unlock()
	leave, err := before.Enter(ctx)
	if errors.Is(err, gate.ErrShut) {
		return b.refreshShut(h, before.Opens())
	} else if err != nil {
		return b.refreshFailed(log, h, nil, &endpoint.Error{What: "waiting for other refreshes", Err: err})
	}
	said := gate.Verdict{Nothing: true}
	defer func() { leave(said) }()
	g, version, err := b.toRefresh(ctx, h, refused)
	if err != nil {
		return b.storeFailed(log, h, err)
	} else if g == nil {
		return nil
	}
	if b.shares(h.key) {
		// From here on it goes to its end, also if the broker is being closed: an
		// answer that nobody reads may cost the grant.
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(context.WithoutCancel(ctx), refreshTime)
		defer cancel()
	}
	if err := lease.Check(ctx); err != nil {
		return b.storeFailed(log, h, err)
	}

	started := b.now()
	form := url.Values{
		"grant_type":    {"refresh_token"},
		"refresh_token": {g.Refresh.Value()},
	}
	if g.Resource != "" {
		// RFC 8707 section 2.2; MCP authorization: "MCP clients MUST implement
		// [...] the resource parameter in both authorization requests and token
		// requests".
		form.Set("resource", g.Resource)
	}
	answer, err := endpoint.Token(ctx, h.remote.HTTP.Fetch(), g.TokenEndpoint, g.client(), form)
	took := b.now().Sub(started)
	said = gate.Judge(err)
	if err != nil {
		e, ok := errors.AsType[*endpoint.Error](err)
		if ok && !e.Unanswered() {
			b.answered(ctx, h)
		}
		if ok && e.Refused() {
			b.refreshed(h.key.remote, RefreshRefused)
		} else {
			b.refreshed(h.key.remote, RefreshFailed)
		}
		return b.refreshFailed(log.With("duration", took), h, g, err)
	}
	b.refreshed(h.key.remote, RefreshDone)
	if h.remote.login && !answer.ID.IsEmpty() {
		err := b.verifyLogin(ctx, answer.ID, "", g.ID)
		if errors.Is(err, errAnotherSubject) {
			// All of the answer is somebody else's, and so is what comes after it.
			log.Warn("a renewed login is another account's: it is ended", "error", err)
			return b.refreshEnded(h, g, "the identity provider has renewed it for another account; log in again")
		} else if err != nil {
			// The rest of the answer is good, and the old refresh token may be used up.
			log.Warn("the renewed ID token is not used", "error", err)
			answer.ID = secret.Text{}
		}
	}
	next := g.receive(answer, b.now())
	err = b.writeRefreshed(ctx, h, next, version)
	switch {
	case errors.Is(err, ErrConflict):
		log.Info("refreshed, but the grant has changed meanwhile: the new token is dropped", "duration", took)
		b.current(ctx, h, 0)
		return nil
	case err != nil:
		// The old refresh token may be used up: the new one is kept at least here.
		h.keep(next)
		log.Error("refreshed, but the grant could not be written: it will not survive a restart", "duration", took, "error", err)
		return nil
	}
	b.clearTrouble(ctx, h.key)
	log.Info("grant refreshed", "duration", took, "expires", next.Expires, "rotated", !answer.Refresh.IsEmpty())
	return nil
}

// writeTime is how long a refreshed grant is tried to be written to a store that
// others read, too: well within the lease.
const writeTime = 15 * time.Second

// writeRefreshed writes what a refresh brought. A shared store that is away for
// a moment is waited for: whoever refreshes next there would send a refresh
// token that is used up.
func (b *Broker) writeRefreshed(ctx context.Context, h *hold, next *grant, version uint64) error {
	err := b.writeGrant(ctx, h.key, h.remote, next, version)
	if err == nil || errors.Is(err, ErrConflict) || !b.shares(h.key) {
		return err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), writeTime)
	defer cancel()
	for pause := 50 * time.Millisecond; ; pause = min(2*pause, time.Second) {
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return err
		}
		if err = b.writeGrant(ctx, h.key, h.remote, next, version); err == nil || errors.Is(err, ErrConflict) || errors.Is(err, ErrClosed) {
			return err
		}
	}
}

// leaseToRefresh waits until no other process refreshes the grant. Inside this
// one there is one refresh anyway.
func (b *Broker) leaseToRefresh(ctx context.Context, k key) (Lease, error) {
	if !b.shares(k) {
		return noLease{}, nil
	}
	return b.store.Lease(ctx, refreshLease(k))
}

// noLease is for what nobody else can do.
type noLease struct{}

func (noLease) Check(context.Context) error { return nil }
func (noLease) Release()                    {}

// toRefresh returns the grant whose refresh token is to be sent now, noted as
// such. It is nil if the store knows
// better: another process has refreshed, or the user has signed out.
func (b *Broker) toRefresh(ctx context.Context, h *hold, refused bool) (*grant, uint64, error) {
	h.mu.Lock()
	known := h.grant
	h.mu.Unlock()
	for {
		stored, version, err := b.readGrant(ctx, h.key)
		if errors.Is(err, ErrNotFound) {
			b.forget(h.key)
			return nil, 0, nil
		} else if err != nil {
			return nil, 0, err
		}
		h.set(stored, version)
		h.mu.Lock()
		g, version := h.grant, h.version
		h.mu.Unlock()
		now := b.now()
		changed := !g.Access.Equal(known.Access)
		switch {
		case !g.refreshable(), !g.fits(h.remote),
			changed && g.valid(now) && (g.RefreshAt.IsZero() || now.Before(g.RefreshAt)),
			g.inDoubt() && g.valid(now) && (changed || !refused):
			return nil, 0, nil
		}
		if g.inDoubt() {
			b.log.WarnContext(ctx, "the answer to a refresh was lost: trying the same refresh token again",
				"remote", h.key.remote, "principal", h.key.principal, "since", g.Redeeming)
		}
		g = g.redeeming(now)
		version, err = b.putGrant(ctx, h.key, g, version)
		switch {
		case err == nil:
			h.set(g, version)
			return g, version, nil
		case !errors.Is(err, ErrConflict):
			return nil, 0, err
		}
		// A sign-in or a sign-out came between; they do not wait for the lease.
	}
}

// answered takes back the note that the refresh token was sent.
func (b *Broker) answered(ctx context.Context, h *hold) {
	h.mu.Lock()
	g, version := h.grant, h.version
	h.mu.Unlock()
	if !g.inDoubt() {
		return
	}
	g = g.redeeming(time.Time{})
	version, err := b.putGrant(ctx, h.key, g, version)
	switch {
	case err == nil:
		h.set(g, version)
	case !errors.Is(err, ErrConflict):
		b.log.WarnContext(ctx, "noting that a refresh was answered failed", "remote", h.key.remote, "principal", h.key.principal, "error", err)
	}
}

// keep uses a grant that the store could not take. Its version stays that of
// the record, so that the next refresh finds nothing newer there.
func (h *hold) keep(g *grant) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.setLocked(g, h.version)
	h.unsaved = true
}

// storeFailed ends a refresh for which no request was sent.
func (b *Broker) storeFailed(log *slog.Logger, h *hold, err error) error {
	if errors.Is(err, context.Canceled) {
		return err // the broker is being closed
	}
	failure, ok := errors.AsType[*Error](err)
	if !ok {
		failure = internalError(h.key.remote, err)
	}
	h.mu.Lock()
	h.failures++
	h.retryAt = b.now().Add(min(refreshPause<<min(h.failures-1, 10), refreshPauseMax))
	h.lastErr = failure
	h.mu.Unlock()
	log.Warn("no refresh: the store failed", "error", err)
	return failure
}

// refreshShut is a refresh that was not tried, for the sake of the server.
func (b *Broker) refreshShut(h *hold, until time.Time) error {
	failure := &Error{KindUnavailable, h.key.remote, "its authorization server has failed several times in a row; the sign-in is kept, and the gateway asks again in a moment", gate.ErrShut}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.retryAt, h.lastErr = until, failure
	return failure
}

// refreshFailed decides what a failure means for the grant whose refresh token
// was sent; nil: none was. What was replaced meanwhile, as by a sign-in, takes
// the failure with it.
func (b *Broker) refreshFailed(log *slog.Logger, h *hold, sent *grant, err error) error {
	e, _ := errors.AsType[*endpoint.Error](err)
	if e != nil && e.Code == "invalid_grant" {
		log.Info("the authorization server ended the grant", "error", err)
		return b.refreshEnded(h, sent, "its authorization server has ended the sign-in; sign in again")
	}
	var failure *Error
	h.mu.Lock()
	if sent != nil && !h.grant.sameTokens(sent) {
		h.mu.Unlock()
		log.Info("refresh failed, but the grant has changed meanwhile", "error", err)
		return nil
	}
	h.failures++
	if e != nil && e.Refused() {
		h.final, h.badClient = true, e.Code == "invalid_client"
		h.retryAt = b.now().Add(refusedPause)
		failure = &Error{KindToken, h.key.remote, "its authorization server refuses to renew the sign-in (" + e.Code + ")", err}
	} else {
		pause := min(refreshPause<<min(h.failures-1, 10), refreshPauseMax)
		if e != nil {
			pause = max(pause, e.Retry)
		}
		h.retryAt = b.now().Add(pause)
		failure = &Error{KindUnavailable, h.key.remote, "its authorization server could not be reached or failed to renew the sign-in, which is kept; try again in a moment", err}
	}
	h.lastErr = failure
	h.mu.Unlock()
	log.Warn("refresh failed", "error", err)
	b.noteTrouble(h.key, failure)
	return failure
}

// refreshEnded ends the grant whose refresh token was sent, if it is still held.
func (b *Broker) refreshEnded(h *hold, sent *grant, say string) error {
	// Its own context: the request may have used up the other's time.
	ctx, done, err := b.work(storeTime)
	if err != nil {
		return err
	}
	defer done()
	if err := b.endGrant(ctx, h, sent); errors.Is(err, ErrConflict) {
		return nil
	} else if err != nil {
		return internalError(h.key.remote, err)
	}
	b.noteTrouble(h.key, &Error{KindToken, h.key.remote, say, nil})
	return nil
}
