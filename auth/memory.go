package auth

import (
	"container/heap"
	"context"
	"errors"
	"slices"
	"sync"
	"time"
)

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
	leases  map[string]chan struct{} // of those held: closed at the release
}

var _ Store = (*Memory)(nil)

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
	m := &Memory{limits: c.MaxRecords, now: c.Now, buckets: map[string]*memoryBucket{}, leases: map[string]chan struct{}{}}
	if m.now == nil {
		m.now = time.Now
	}
	return m
}

// Shared reports false: nobody else has this memory.
func (m *Memory) Shared() bool { return false }

// Get is [Store.Get].
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

// Put is [Store.Put].
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

// Take is [Store.Take].
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

// Delete is [Store.Delete].
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

// Lease is [Store.Lease]. It lasts until its release.
func (m *Memory) Lease(ctx context.Context, name string) (Lease, error) {
	for {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		m.mu.Lock()
		if m.closed {
			m.mu.Unlock()
			return nil, ErrClosed
		}
		held, ok := m.leases[name]
		if !ok {
			l := &memoryLease{m, name, make(chan struct{})}
			m.leases[name] = l.ended
			m.mu.Unlock()
			return l, nil
		}
		m.mu.Unlock()
		select {
		case <-held:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

type memoryLease struct {
	m     *Memory
	name  string
	ended chan struct{}
}

func (l *memoryLease) Check(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	l.m.mu.Lock()
	defer l.m.mu.Unlock()
	if l.m.leases[l.name] != l.ended {
		return ErrLeaseLost
	}
	return nil
}

func (l *memoryLease) Release() {
	l.m.mu.Lock()
	defer l.m.mu.Unlock()
	if l.m.leases[l.name] == l.ended {
		delete(l.m.leases, l.name)
		close(l.ended)
	}
}

// Close forgets everything. A second call does nothing.
func (m *Memory) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.closed = true
	m.buckets = nil
	for name, ended := range m.leases {
		delete(m.leases, name)
		close(ended)
	}
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
