package auth

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"
)

func pinKey(r *Remote) string { return hash("pin", r.Name, r.URL) }

// confides reports whether the remote's authorization server gets to see what
// must reach no other: credentials of the gateway's, or an assertion for a user.
func (r *Remote) confides() bool {
	return !r.ClientSecret.IsEmpty() || r.Key != nil || r.Type == TypeIDJAG
}

// boundTo returns the only issuer that what a remote is confided may go to, empty
// if that is open. A remote says itself which authorization server is its own, so
// without a word in the config the first one that accepted it is the one.
func (b *Broker) boundTo(ctx context.Context, r *Remote) (string, error) {
	if r.Issuer != "" || !r.confides() {
		return r.Issuer, nil
	}
	issuer, err := b.pinned(ctx, r)
	if err != nil {
		return "", internalError(r.Name, fmt.Errorf("reading the pinned issuer: %w", err))
	}
	return issuer, nil
}

// discover is [discoverer.discover], to where the remote is bound to.
func (b *Broker) discover(ctx context.Context, r *Remote, ch challenge, step func(Step)) (*discovered, error) {
	issuer, err := b.boundTo(ctx, r)
	if err != nil {
		return nil, err
	}
	bound := *r
	bound.pinned = issuer
	return b.discoverer.discover(ctx, &bound, ch, step)
}

// pinned returns who has signed somebody in to a remote, empty if nobody has.
func (b *Broker) pinned(ctx context.Context, r *Remote) (string, error) {
	if issuer := b.knownPin(r); issuer != "" {
		return issuer, nil
	}
	pin, err := b.store.Get(ctx, bucketPins, pinKey(r))
	if errors.Is(err, ErrNotFound) {
		return "", nil
	}
	return string(pin.Value), err
}

func (b *Broker) knownPin(r *Remote) string {
	b.mu.RLock()
	defer b.mu.RUnlock()
	return b.pins[r.Name]
}

// pin notes who has signed somebody in to a remote. It asks the store once for
// what a remote is confided, since it is called with each of its tokens.
func (b *Broker) pin(ctx context.Context, r *Remote, issuer string) {
	version := AnyVersion
	known := b.knownPin(r)
	if r.Issuer == "" && r.confides() {
		version = 0 // the first one stays
		issuer = cmp.Or(known, issuer)
	}
	if known == issuer {
		return
	}
	_, err := b.store.Put(ctx, bucketPins, pinKey(r), []byte(issuer), version, time.Time{})
	if errors.Is(err, ErrConflict) {
		issuer, err = b.pinned(ctx, r)
	}
	if err != nil {
		b.log.WarnContext(ctx, "pinning the issuer failed", "remote", r.Name, "error", err)
		return
	}
	if r.confides() {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.pins[r.Name] = issuer
	}
}
