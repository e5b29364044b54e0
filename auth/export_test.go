package auth

import (
	"context"
	"time"

	"gatehouse/auth/endpoint"
	"gatehouse/auth/secret"
)

// KeepLogin keeps what a login has brought, as FinishLogin does, without one.
func (b *Broker) KeepLogin(ctx context.Context, p Principal, id, access string, lives time.Duration) error {
	d, err := b.discoverer.discover(ctx, b.login, challenge{}, nil)
	if err != nil {
		return err
	}
	return b.keepLogin(ctx, p, d, &endpoint.Answer{ID: secret.New(id), Access: secret.New(access), ExpiresIn: lives})
}

// AtPoint calls f, nil: nothing, at each named point of the file store's work.
func AtPoint(f func(point string)) { reached = f }

// MaxHolds lets a broker keep so many grants in memory, and Holds counts them.
func (b *Broker) MaxHolds(n int) { b.maxHolds = n }
func (b *Broker) Holds() int     { return len(b.holds) }

// GrantName is what a store's watch calls the grant under a key.
func GrantName(key string) string { return hash(bucketGrants, key) }

// GrantKey is where the store has a grant.
func GrantKey(p Principal, remote string) string { return key{p, remote}.store() }

// BucketGrants is the bucket of grants.
const BucketGrants = bucketGrants

// AskWithin bounds how long it takes until the provider is asked about a token.
func (b *Broker) AskWithin(d time.Duration) { b.inbound.wait = d }
