// Package storetest holds what every [auth.Store] must do.
package storetest

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"gatehouse/auth"
)

// Config is what the test needs of a store.
type Config struct {
	MaxRecords map[string]int
	Now        func() time.Time
}

// Run holds a store to its contract. open makes an empty store and returns it
// twice: a store that several processes share as two that were opened on the
// same records, any other as the same value.
func Run(t *testing.T, open func(t *testing.T, c Config) (a, b auth.Store)) {
	for _, test := range []struct {
		name string
		run  func(*testing.T, func(*testing.T, Config) (auth.Store, auth.Store))
	}{
		{"versions", versions},
		{"values are copied", copies},
		{"buckets and keys are apart", apart},
		{"take has one winner", takeOnce},
		{"records expire", expire},
		{"expiries move", expiryMoves},
		{"buckets are bounded", bounded},
		{"compare and swap loses nothing", counting},
		{"leases exclude", leases},
		{"a lease ends with the store", leaseEnds},
		{"contexts end", contexts},
		{"close", closing},
	} {
		t.Run(test.name, func(t *testing.T) { test.run(t, open) })
	}
}

// opener is what Run was given.
type opener = func(*testing.T, Config) (auth.Store, auth.Store)

// clock moves when told to.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func newClock() *clock { return &clock{now: time.Date(2026, 7, 28, 12, 0, 0, 0, time.UTC)} }

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

func put(t *testing.T, s auth.Store, bucket, key, value string, version uint64, expires time.Time) uint64 {
	t.Helper()
	v, err := s.Put(t.Context(), bucket, key, []byte(value), version, expires)
	if err != nil {
		t.Fatalf("Put %s/%s: %v", bucket, key, err)
	}
	return v
}

// is reads a record; want "" means that there must be none.
func is(t *testing.T, s auth.Store, bucket, key, want string) {
	t.Helper()
	r, err := s.Get(t.Context(), bucket, key)
	switch {
	case want == "" && !errors.Is(err, auth.ErrNotFound):
		t.Errorf("Get %s/%s: %q, %v, want none", bucket, key, r.Value, err)
	case want != "" && (err != nil || string(r.Value) != want):
		t.Errorf("Get %s/%s: %q, %v, want %q", bucket, key, r.Value, err, want)
	}
}

func versions(t *testing.T, open opener) {
	a, b := open(t, Config{})
	conflict := func(s auth.Store, version uint64) {
		t.Helper()
		if _, err := s.Put(t.Context(), "b", "k", nil, version, time.Time{}); !errors.Is(err, auth.ErrConflict) {
			t.Errorf("Put at version %d: %v, want %v", version, err, auth.ErrConflict)
		}
	}
	is(t, a, "b", "k", "")
	conflict(a, 7) // a version of nothing
	v1 := put(t, a, "b", "k", "one", 0, time.Time{})
	is(t, b, "b", "k", "one")
	conflict(a, 0)
	conflict(b, 0)
	v2 := put(t, b, "b", "k", "two", v1, time.Time{})
	conflict(a, v1)
	v3 := put(t, a, "b", "k", "three", auth.AnyVersion, time.Time{})
	if r, err := b.Get(t.Context(), "b", "k"); err != nil || r.Version != v3 || !r.Expires.IsZero() {
		t.Errorf("Get: %+v, %v, want version %d", r, err, v3)
	}
	for range 2 {
		if err := a.Delete(t.Context(), "b", "k"); err != nil {
			t.Fatal(err)
		}
	}
	is(t, b, "b", "k", "")
	conflict(b, v3) // whoever remembers the deleted record must not revive it
	v4 := put(t, b, "b", "k", "four", 0, time.Time{})
	if _, err := a.Take(t.Context(), "b", "k"); err != nil {
		t.Fatal(err)
	}
	v5 := put(t, a, "b", "k", "", auth.AnyVersion, time.Time{})
	if all := []uint64{0, v1, v2, v3, v4, v5, auth.AnyVersion}; !slices.IsSorted(all) || len(slices.Compact(all)) != 7 {
		t.Errorf("versions %d do not rise", all)
	}
	if r, err := b.Get(t.Context(), "b", "k"); err != nil || len(r.Value) != 0 {
		t.Errorf("an empty value: %+v, %v", r, err)
	}
}

func copies(t *testing.T, open opener) {
	a, _ := open(t, Config{})
	value := []byte("one")
	if _, err := a.Put(t.Context(), "b", "k", value, 0, time.Time{}); err != nil {
		t.Fatal(err)
	}
	value[0] = 'X'
	r, err := a.Get(t.Context(), "b", "k")
	if err != nil || string(r.Value) != "one" {
		t.Fatalf("the store shares its bytes with a writer: %q, %v", r.Value, err)
	}
	r.Value[0] = 'X'
	is(t, a, "b", "k", "one")
}

func apart(t *testing.T, open opener) {
	a, b := open(t, Config{})
	keys := []string{"k", "K", "k ", "", "../k", "k/../k", "k\x00", "ключ"}
	for _, bucket := range []string{"a", "b", "a-1"} {
		for _, key := range keys {
			put(t, a, bucket, key, bucket+":"+key, 0, time.Time{})
		}
	}
	for _, bucket := range []string{"a", "b", "a-1"} {
		for _, key := range keys {
			is(t, b, bucket, key, bucket+":"+key)
		}
	}
	if err := b.Delete(t.Context(), "a", "k"); err != nil {
		t.Fatal(err)
	}
	is(t, a, "a", "k", "")
	is(t, a, "b", "k", "b:k")
}

func takeOnce(t *testing.T, open opener) {
	a, b := open(t, Config{})
	for round := range 5 {
		key := fmt.Sprint(round)
		put(t, a, "b", key, "v", 0, time.Now().Add(time.Hour))
		won := make(chan string, 40)
		var wg sync.WaitGroup
		for i := range cap(won) {
			s := []auth.Store{a, b}[i%2]
			wg.Go(func() {
				r, err := s.Take(t.Context(), "b", key)
				switch {
				case err == nil:
					won <- string(r.Value)
				case !errors.Is(err, auth.ErrNotFound):
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if len(won) != 1 || <-won != "v" {
			t.Fatalf("%d won, want 1", len(won))
		}
		is(t, b, "b", key, "")
	}
}

func expire(t *testing.T, open opener) {
	clock := newClock()
	a, b := open(t, Config{Now: clock.Now})
	at := clock.Now().Add(time.Minute + 7*time.Nanosecond)
	put(t, a, "b", "short", "v", 0, clock.Now().Add(time.Second))
	put(t, a, "b", "long", "v", 0, at)
	put(t, a, "b", "never", "v", 0, time.Time{})
	if r, err := b.Get(t.Context(), "b", "long"); err != nil || !r.Expires.Equal(at) {
		t.Errorf("expires %v, %v, want %v", r.Expires, err, at)
	}
	clock.advance(time.Second)
	is(t, a, "b", "short", "")
	is(t, b, "b", "short", "")
	is(t, b, "b", "long", "v")
	clock.advance(time.Hour)
	if _, err := a.Take(t.Context(), "b", "long"); !errors.Is(err, auth.ErrNotFound) {
		t.Errorf("an expired record was taken: %v", err)
	}
	put(t, b, "b", "long", "again", 0, time.Time{}) // as if there had been none
	is(t, a, "b", "long", "again")
	is(t, a, "b", "never", "v")
}

func expiryMoves(t *testing.T, open opener) {
	clock := newClock()
	a, b := open(t, Config{Now: clock.Now, MaxRecords: map[string]int{"b": 2}})
	in := func(d time.Duration) time.Time { return clock.Now().Add(d) }
	put(t, a, "b", "first", "v", auth.AnyVersion, in(time.Minute))
	put(t, a, "b", "second", "v", auth.AnyVersion, in(2*time.Minute))
	put(t, a, "b", "first", "v", auth.AnyVersion, in(3*time.Minute))
	clock.advance(2 * time.Minute)
	put(t, a, "b", "third", "v", auth.AnyVersion, in(time.Minute)) // the room of the second
	is(t, b, "b", "first", "v")
	is(t, b, "b", "second", "")
	for _, key := range []string{"first", "third"} {
		if _, err := a.Take(t.Context(), "b", key); err != nil {
			t.Errorf("the %s: %v", key, err)
		}
	}
	put(t, a, "b", "fourth", "v", auth.AnyVersion, in(time.Minute))
	put(t, a, "b", "fourth", "v", auth.AnyVersion, time.Time{}) // for good now
	clock.advance(time.Hour)
	is(t, b, "b", "fourth", "v")
}

func bounded(t *testing.T, open opener) {
	clock := newClock()
	a, _ := open(t, Config{Now: clock.Now, MaxRecords: map[string]int{"b": 3}})
	for i := range 3 {
		put(t, a, "b", fmt.Sprint(i), "v", 0, clock.Now().Add(time.Minute))
	}
	full := func() {
		t.Helper()
		for range 2 {
			if _, err := a.Put(t.Context(), "b", "more", nil, auth.AnyVersion, time.Time{}); !errors.Is(err, auth.ErrFull) {
				t.Errorf("one too many: %v", err)
			}
		}
	}
	full()
	put(t, a, "b", "1", "again", auth.AnyVersion, clock.Now().Add(time.Hour)) // takes no room
	put(t, a, "other", "k", "v", 0, time.Time{})
	if err := a.Delete(t.Context(), "b", "0"); err != nil {
		t.Fatal(err)
	}
	put(t, a, "b", "0", "v", 0, clock.Now().Add(time.Minute))
	full()
	clock.advance(time.Minute)
	put(t, a, "b", "3", "v", 0, time.Time{}) // expired records take no room
	put(t, a, "b", "4", "v", 0, time.Time{})
	full()
}

// counting adds one to the same records from everywhere at once.
func counting(t *testing.T, open opener) {
	a, b := open(t, Config{})
	const workers, rounds, counters = 8, 10, 3
	var wg sync.WaitGroup
	for i := range workers {
		s := []auth.Store{a, b}[i%2]
		wg.Go(func() {
			for round := range rounds {
				key := fmt.Sprint((i + round) % counters)
				if err := add(t.Context(), s, key); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	total := uint64(0)
	for i := range counters {
		r, err := a.Get(t.Context(), "b", fmt.Sprint(i))
		if err != nil {
			t.Fatal(err)
		}
		total += binary.BigEndian.Uint64(r.Value)
	}
	if total != workers*rounds {
		t.Errorf("counted to %d, want %d", total, workers*rounds)
	}
}

func add(ctx context.Context, s auth.Store, key string) error {
	for {
		r, err := s.Get(ctx, "b", key)
		n := uint64(0)
		switch {
		case err == nil:
			n = binary.BigEndian.Uint64(r.Value)
		case !errors.Is(err, auth.ErrNotFound):
			return err
		}
		_, err = s.Put(ctx, "b", key, binary.BigEndian.AppendUint64(nil, n+1), r.Version, time.Time{})
		if !errors.Is(err, auth.ErrConflict) {
			return err
		}
	}
}

func leases(t *testing.T, open opener) {
	a, b := open(t, Config{})
	const workers, rounds = 8, 10
	var inside, total atomic.Int32
	var wg sync.WaitGroup
	for i := range workers {
		s := []auth.Store{a, b}[i%2]
		wg.Go(func() {
			for range rounds {
				l, err := s.Lease(t.Context(), "n")
				if err != nil {
					t.Error(err)
					return
				}
				if n := inside.Add(1); n != 1 {
					t.Errorf("%d hold the lease", n)
				}
				if err := l.Check(t.Context()); err != nil {
					t.Error(err)
				}
				total.Add(1)
				inside.Add(-1)
				l.Release()
				l.Release()
			}
		})
	}
	wg.Wait()
	if n := total.Load(); n != workers*rounds {
		t.Errorf("%d leases, want %d", n, workers*rounds)
	}

	held, err := a.Lease(t.Context(), "n")
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []auth.Store{a, b} {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		if _, err := s.Lease(ctx, "n"); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a lease that another holds: %v", err)
		}
		cancel()
		other, err := s.Lease(t.Context(), "other")
		if err != nil {
			t.Fatal(err)
		}
		other.Release()
	}
	next := make(chan error, 1)
	go func() {
		l, err := b.Lease(context.WithoutCancel(t.Context()), "n")
		if err == nil {
			l.Release()
		}
		next <- err
	}()
	held.Release()
	if err := <-next; err != nil {
		t.Errorf("whoever waited: %v", err)
	}
	if err := held.Check(t.Context()); err == nil {
		t.Error("a released lease checks")
	}
}

func leaseEnds(t *testing.T, open opener) {
	a, _ := open(t, Config{})
	l, err := a.Lease(t.Context(), "n")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := l.Check(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("Check with an ended context: %v", err)
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	if err := l.Check(t.Context()); !errors.Is(err, auth.ErrLeaseLost) {
		t.Errorf("Check after Close: %v", err)
	}
	l.Release()
}

func contexts(t *testing.T, open opener) {
	a, _ := open(t, Config{})
	put(t, a, "b", "k", "v", 0, time.Time{})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for name, err := range everything(ctx, a) {
		if !errors.Is(err, context.Canceled) {
			t.Errorf("%s with an ended context: %v", name, err)
		}
	}
	is(t, a, "b", "k", "v")
}

func closing(t *testing.T, open opener) {
	a, _ := open(t, Config{})
	put(t, a, "b", "k", "v", 0, time.Time{})
	for range 2 {
		if err := a.Close(); err != nil {
			t.Fatal(err)
		}
	}
	for name, err := range everything(t.Context(), a) {
		if !errors.Is(err, auth.ErrClosed) {
			t.Errorf("%s after Close: %v", name, err)
		}
	}
}

func everything(ctx context.Context, s auth.Store) map[string]error {
	failed := map[string]error{}
	_, failed["Get"] = s.Get(ctx, "b", "k")
	_, failed["Put"] = s.Put(ctx, "b", "k", bytes.Repeat([]byte("x"), 10), auth.AnyVersion, time.Time{})
	_, failed["Take"] = s.Take(ctx, "b", "k")
	failed["Delete"] = s.Delete(ctx, "b", "k")
	_, failed["Lease"] = s.Lease(ctx, "n")
	return failed
}
