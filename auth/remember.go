package auth

import (
	"context"
	"errors"
	"time"
)

// What a remote has listed for a principal is kept beside the grants: it is as
// private as they are, and lives where they do.
const (
	bucketCatalogs   = "catalogs"          // what a remote last listed, by principal, remote and URL
	keepCatalog      = 90 * 24 * time.Hour // after which one is forgotten that nobody has listed again
	maxCatalogRecord = 4 << 20
)

func catalogKey(p Principal, remote, url string) string { return hash("catalog", p.Key(), remote, url) }

func (b *Broker) remembers(p Principal) bool { return b.store.Shared() && !p.Ephemeral() }

// Remember keeps what a remote has listed for a principal. It is a convenience:
// what does not fit, or cannot be written, is not kept, and the error is for the
// log. Nothing is kept for an ephemeral principal, nor in a store that ends with
// the process: what lives as long as it does the session has.
func (b *Broker) Remember(ctx context.Context, p Principal, remote, url string, listed []byte) error {
	if !b.remembers(p) || len(listed) > maxCatalogRecord {
		return nil
	}
	_, err := b.store.Put(ctx, bucketCatalogs, catalogKey(p, remote, url), listed, AnyVersion, b.now().Add(keepCatalog))
	return err
}

// Recall returns what Remember kept, nil if nothing is.
func (b *Broker) Recall(ctx context.Context, p Principal, remote, url string) ([]byte, error) {
	if !b.remembers(p) {
		return nil, nil
	}
	record, err := b.store.Get(ctx, bucketCatalogs, catalogKey(p, remote, url))
	if errors.Is(err, ErrNotFound) {
		return nil, nil
	}
	return record.Value, err
}

// Unremember deletes what Remember kept.
func (b *Broker) Unremember(ctx context.Context, p Principal, remote, url string) error {
	if !b.remembers(p) {
		return nil
	}
	return b.store.Delete(ctx, bucketCatalogs, catalogKey(p, remote, url))
}
