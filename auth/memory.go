package auth

import (
	"container/heap"
	"context"
	"errors"
	"slices"
	"sync"
	"time"
)

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
)

// AnyVersion lets [Memory.Put] write whatever is there.
const AnyVersion = ^uint64(0)

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

// Record is what the store holds under a key.
type Record struct {
	Value   []byte
	Version uint64    // never 0, never that of an earlier record under the same key
	Expires time.Time // zero: never
}

// MemoryConfig configures a [Memory]. Its zero value serves.
type MemoryConfig struct {
	MaxRecords map[string]int   // per bucket; a bucket not named: 100,000
	Now        func() time.Time // nil: time.Now
}

// Memory is the store that ends with the process. Every operation costs the
// same however much it holds, but for the logarithm that keeps the expiries in
// order, and nothing runs in the background: what has expired leaves when
// something is written.
type Memory struct {
	limits map[string]int
	now    func() time.Time

	mu      sync.Mutex // guards what follows
	closed  bool
	version uint64
	buckets map[string]*memoryBucket
}

type memoryBucket struct {
	records map[string]*memoryRecord
	expiry  expiryHeap
}

type memoryRecord struct {
	Record
	key   string
	index int // in the heap; -1: never expires
}

// NewMemory returns an empty store.
func NewMemory(c MemoryConfig) *Memory {
	m := &Memory{limits: c.MaxRecords, now: c.Now, buckets: map[string]*memoryBucket{}}
	if m.now == nil {
		m.now = time.Now
	}
	return m
}

// Get returns a copy of the record, or [ErrNotFound].
func (m *Memory) Get(ctx context.Context, bucket, key string) (Record, error) {
	if err := ctx.Err(); err != nil {
		return Record{}, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	_, r, err := m.findLocked(bucket, key)
	if err != nil {
		return Record{}, err
	}
	return r.copy(), nil
}

// Put writes a record if the present one has the version: 0 stands for "there
// is none", [AnyVersion] for whatever is there. It returns the new version,
// [ErrConflict], or [ErrFull]. The zero expires never comes.
func (m *Memory) Put(ctx context.Context, bucket, key string, value []byte, version uint64, expires time.Time) (uint64, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return 0, ErrClosed
	}
	b := m.buckets[bucket]
	if b == nil {
		b = &memoryBucket{records: map[string]*memoryRecord{}}
		m.buckets[bucket] = b
	}
	b.sweep(m.now())

	r := b.records[key]
	switch {
	case version == AnyVersion:
	case r == nil && version != 0, r != nil && r.Version != version:
		return 0, ErrConflict
	}
	if r == nil {
		limit, ok := m.limits[bucket]
		if !ok {
			limit = defaultMaxRecords
		}
		if len(b.records) >= limit {
			return 0, ErrFull
		}
		r = &memoryRecord{key: key, index: -1}
		b.records[key] = r
	}
	m.version++
	r.Value, r.Version = slices.Clone(value), m.version
	b.setExpiry(r, expires)
	return r.Version, nil
}

// Take returns the record and deletes it in one step: of many callers exactly
// one gets it, the others [ErrNotFound].
func (m *Memory) Take(ctx context.Context, bucket, key string) (Record, error) {
	if err := ctx.Err(); err != nil {
		return Record{}, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	b, r, err := m.findLocked(bucket, key)
	if err != nil {
		return Record{}, err
	}
	b.remove(r)
	return r.Record, nil
}

// Delete removes the record. That there is none is no error.
func (m *Memory) Delete(ctx context.Context, bucket, key string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	b, r, err := m.findLocked(bucket, key)
	if errors.Is(err, ErrNotFound) {
		return nil
	} else if err != nil {
		return err
	}
	b.remove(r)
	return nil
}

// Close forgets everything. A second call does nothing.
func (m *Memory) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.closed = true
	m.buckets = nil
	return nil
}

// findLocked returns the live record and its bucket.
func (m *Memory) findLocked(bucket, key string) (*memoryBucket, *memoryRecord, error) {
	if m.closed {
		return nil, nil, ErrClosed
	}
	b := m.buckets[bucket]
	if b == nil {
		return nil, nil, ErrNotFound
	}
	r := b.records[key]
	if r == nil {
		return nil, nil, ErrNotFound
	}
	if r.expired(m.now()) {
		b.remove(r)
		return nil, nil, ErrNotFound
	}
	return b, r, nil
}

// sweep drops what has expired. Each record is swept once, so a write pays for
// those that came before it, not for what is there.
func (b *memoryBucket) sweep(now time.Time) {
	for len(b.expiry) > 0 && b.expiry[0].expired(now) {
		b.remove(b.expiry[0])
	}
}

func (b *memoryBucket) remove(r *memoryRecord) {
	delete(b.records, r.key)
	if r.index >= 0 {
		heap.Remove(&b.expiry, r.index)
	}
}

func (b *memoryBucket) setExpiry(r *memoryRecord, expires time.Time) {
	r.Expires = expires
	switch {
	case expires.IsZero() && r.index >= 0:
		heap.Remove(&b.expiry, r.index)
	case expires.IsZero():
	case r.index >= 0:
		heap.Fix(&b.expiry, r.index)
	default:
		heap.Push(&b.expiry, r)
	}
}

func (r *memoryRecord) expired(now time.Time) bool {
	return !r.Expires.IsZero() && !now.Before(r.Expires)
}

func (r *memoryRecord) copy() Record {
	c := r.Record
	c.Value = slices.Clone(c.Value)
	return c
}

// expiryHeap is a [heap.Interface] with the next to expire on top.
type expiryHeap []*memoryRecord

func (h expiryHeap) Len() int           { return len(h) }
func (h expiryHeap) Less(i, j int) bool { return h[i].Expires.Before(h[j].Expires) }

func (h expiryHeap) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].index, h[j].index = i, j
}

func (h *expiryHeap) Push(x any) {
	r := x.(*memoryRecord)
	r.index = len(*h)
	*h = append(*h, r)
}

func (h *expiryHeap) Pop() any {
	last := len(*h) - 1
	r := (*h)[last]
	(*h)[last] = nil
	*h = (*h)[:last]
	r.index = -1
	return r
}
