package auth

import (
	"context"
	"errors"
	"time"
)

// Store keeps grants, flows, registrations and what belongs to them, under a
// bucket and a key. [Memory], [File] and [Redis] are stores; storetest holds
// what every one of them must do. All methods may be called by many goroutines,
// and where the store is [Store.Shared] by many processes, at once.
//
// Beside the outcomes named below, a method returns the context's error if
// that has ended, and [ErrClosed] after Close.
type Store interface {
	// Get returns a copy of the record, or [ErrNotFound].
	Get(ctx context.Context, bucket, key string) (Record, error)

	// Put writes a record if the present one has the version: 0 stands for "there
	// is none", [AnyVersion] for whatever is there. It returns the new version,
	// which is higher than all before it under the key, [ErrConflict], [ErrFull],
	// or [ErrUnwritable]. The zero expires never comes. When Put returns without
	// an error, the record survives whatever the store survives.
	Put(ctx context.Context, bucket, key string, value []byte, version uint64, expires time.Time) (uint64, error)

	// Take returns the record and deletes it in one step: of many callers exactly
	// one gets it, the others [ErrNotFound].
	Take(ctx context.Context, bucket, key string) (Record, error)

	// Delete removes the record. That there is none is no error.
	Delete(ctx context.Context, bucket, key string) error

	// Lease waits until nobody else holds the lease of that name, and takes it.
	Lease(ctx context.Context, name string) (Lease, error)

	// Shared reports whether others may change what is in the store and use it
	// when this process has ended: what was read a while ago may have changed,
	// and what is begun should be noted.
	Shared() bool

	// Close ends the store's work. A second call does nothing.
	Close() error
}

// Watcher is a [Store] that tells what others change in it. What it says is a
// hint: it may come late, twice or not at all, and whoever must know reads.
type Watcher interface {
	// Watch calls changed with the bucket of each record that is written or
	// deleted, and the hash of bucket and key, until ctx is done.
	Watch(ctx context.Context, changed func(bucket, name string))
}

// Sealer is a [Store] whose key other processes have, too. It seals what leaves
// the house for a moment and may come back to any of them.
type Sealer interface {
	// Seal encrypts plain so that it opens with the same bound only.
	Seal(plain, bound []byte) []byte
	// Unseal returns what was sealed by a process that has the key; ok is false for
	// anything else.
	Unseal(sealed, bound []byte) (plain []byte, ok bool)
}

// Lease is the right to do something alone. It ends with Release, with its
// process, and in some stores by itself after a while; so look right before
// the step that must not be taken twice.
type Lease interface {
	// Check returns nil if the lease is still held, or [ErrLeaseLost].
	Check(ctx context.Context) error
	// Release gives the lease back. A second call does nothing.
	Release()
}

// Record is what the store holds under a key.
type Record struct {
	Value   []byte
	Version uint64    // never 0, and higher than that of an earlier record under the same key
	Expires time.Time // zero: never
}

// AnyVersion lets [Store.Put] write whatever is there.
const AnyVersion = ^uint64(0)

// What a store answers beside a record.
var (
	// ErrNotFound: no such record, or it has expired.
	ErrNotFound = errors.New("no such record")
	// ErrConflict: the record is not at the version that the caller expected.
	ErrConflict = errors.New("record changed meanwhile")
	// ErrFull: the bucket holds as many records as it may.
	ErrFull = errors.New("store is full")
	// ErrClosed: the store has been closed.
	ErrClosed = errors.New("store is closed")
	// ErrUnwritable: the medium takes no writes: it is full, or read-only.
	ErrUnwritable = errors.New("store cannot be written")
	// ErrLeaseLost: the lease is no longer held.
	ErrLeaseLost = errors.New("lease lost")
)

// The buckets of the store. Keys are hashes: nothing in a key is secret or
// says whose it is.
const (
	bucketGrants        = "grants"        // by principal and remote
	bucketPins          = "pins"          // the issuer of a remote, by its name and URL
	bucketRegistrations = "registrations" // by issuer and redirect URI
	bucketFlows         = "flows"         // by hash of the flow's id
	bucketPending       = "pending"       // the flows of a principal
	bucketStates        = "states"        // pending authorization requests, by hash of the state
	bucketTroubles      = "troubles"      // what failed last, by principal and remote
)

// defaultMaxRecords bounds a bucket for which the config says nothing.
const defaultMaxRecords = 100_000

func (r *Record) expired(now time.Time) bool {
	return !r.Expires.IsZero() && !now.Before(r.Expires)
}
