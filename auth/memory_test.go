package auth_test

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"gatehouse/auth"
)

func TestMemoryVersions(t *testing.T) {
	m := auth.NewMemory(auth.MemoryConfig{})
	ctx := t.Context()
	if _, err := m.Get(ctx, "b", "k"); !errors.Is(err, auth.ErrNotFound) {
		t.Fatalf("Get of nothing: %v", err)
	}
	if _, err := m.Put(ctx, "b", "k", nil, 7, time.Time{}); !errors.Is(err, auth.ErrConflict) {
		t.Fatalf("Put over nothing that was expected at a version: %v", err)
	}
	value := []byte("one")
	v1, err := m.Put(ctx, "b", "k", value, 0, time.Time{})
	if err != nil || v1 == 0 {
		t.Fatalf("Put: %d, %v", v1, err)
	}
	value[0] = 'X'
	r, err := m.Get(ctx, "b", "k")
	if err != nil || string(r.Value) != "one" || r.Version != v1 {
		t.Fatalf("Get: %q at %d, %v", r.Value, r.Version, err)
	}
	r.Value[0] = 'X'
	if r, _ := m.Get(ctx, "b", "k"); string(r.Value) != "one" {
		t.Error("the store shares its bytes with a reader")
	}
	if _, err := m.Put(ctx, "b", "k", nil, 0, time.Time{}); !errors.Is(err, auth.ErrConflict) {
		t.Errorf("Put of a new record over an old one: %v", err)
	}
	v2, err := m.Put(ctx, "b", "k", []byte("two"), v1, time.Time{})
	if err != nil || v2 == v1 {
		t.Fatalf("Put at the version: %d, %v", v2, err)
	}
	if _, err := m.Put(ctx, "b", "k", nil, v1, time.Time{}); !errors.Is(err, auth.ErrConflict) {
		t.Errorf("Put at an old version: %v", err)
	}
	if err := m.Delete(ctx, "b", "k"); err != nil {
		t.Fatal(err)
	}
	if err := m.Delete(ctx, "b", "k"); err != nil {
		t.Errorf("second Delete: %v", err)
	}
	// A writer that remembers the deleted record must not revive it.
	if _, err := m.Put(ctx, "b", "k", nil, v2, time.Time{}); !errors.Is(err, auth.ErrConflict) {
		t.Errorf("Put at a deleted version: %v", err)
	}
	v3, err := m.Put(ctx, "b", "k", nil, 0, time.Time{})
	if err != nil || v3 == v1 || v3 == v2 {
		t.Errorf("a new record has an old version: %d, %v", v3, err)
	}
	if _, err := m.Put(ctx, "b", "k", []byte("any"), auth.AnyVersion, time.Time{}); err != nil {
		t.Errorf("Put at any version: %v", err)
	}
}

func TestMemoryTakeHasOneWinner(t *testing.T) {
	m := auth.NewMemory(auth.MemoryConfig{})
	if _, err := m.Put(t.Context(), "b", "k", []byte("v"), 0, time.Now().Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	var won, lost atomic.Int32
	var wg sync.WaitGroup
	for range 100 {
		wg.Go(func() {
			switch r, err := m.Take(context.Background(), "b", "k"); {
			case err == nil && string(r.Value) == "v":
				won.Add(1)
			case errors.Is(err, auth.ErrNotFound):
				lost.Add(1)
			}
		})
	}
	wg.Wait()
	if won.Load() != 1 || lost.Load() != 99 {
		t.Errorf("%d won and %d lost, want 1 and 99", won.Load(), lost.Load())
	}
}

func TestMemoryExpires(t *testing.T) {
	clock := newClock()
	m := auth.NewMemory(auth.MemoryConfig{Now: clock.Now, MaxRecords: map[string]int{"b": 2}})
	ctx := t.Context()
	put := func(key string, life time.Duration) error {
		t.Helper()
		var expires time.Time
		if life > 0 {
			expires = clock.Now().Add(life)
		}
		_, err := m.Put(ctx, "b", key, nil, auth.AnyVersion, expires)
		return err
	}
	has := func(key string) bool {
		_, err := m.Get(ctx, "b", key)
		return err == nil
	}
	for key, life := range map[string]time.Duration{"short": time.Second, "long": time.Minute} {
		if err := put(key, life); err != nil {
			t.Fatal(err)
		}
	}
	if err := put("third", time.Hour); !errors.Is(err, auth.ErrFull) {
		t.Fatalf("a third record of two: %v", err)
	}
	if _, err := m.Put(ctx, "other", "third", nil, 0, time.Time{}); err != nil {
		t.Fatalf("a full bucket fills another: %v", err)
	}
	clock.Advance(time.Second)
	if err := put("third", 0); err != nil {
		t.Fatalf("an expired record still takes room: %v", err)
	}
	if has("short") || !has("long") {
		t.Fatal("not exactly the short one has expired")
	}
	if err := put("long", 2*time.Minute); err != nil { // longer than before
		t.Fatal(err)
	}
	clock.Advance(time.Minute)
	if !has("long") {
		t.Error("a record expired although it was written again")
	}
	clock.Advance(time.Hour)
	if has("long") || !has("third") {
		t.Error("not exactly the one that expires has expired")
	}
	if _, err := m.Take(ctx, "b", "long"); !errors.Is(err, auth.ErrNotFound) {
		t.Errorf("an expired record was taken: %v", err)
	}
}

// A record that is written again takes its new place among the expiries.
func TestMemoryExpiryMoves(t *testing.T) {
	clock := newClock()
	m := auth.NewMemory(auth.MemoryConfig{Now: clock.Now, MaxRecords: map[string]int{"b": 2}})
	put := func(key string, life time.Duration) {
		t.Helper()
		if _, err := m.Put(t.Context(), "b", key, nil, auth.AnyVersion, clock.Now().Add(life)); err != nil {
			t.Fatal(err)
		}
	}
	put("first", time.Minute)
	put("second", 2*time.Minute)
	put("first", 3*time.Minute)
	clock.Advance(2 * time.Minute)
	put("third", time.Minute) // the room of the second
	if _, err := m.Get(t.Context(), "b", "first"); err != nil {
		t.Errorf("the first: %v", err)
	}
	for _, key := range []string{"first", "third"} { // taken out of the middle
		if _, err := m.Take(t.Context(), "b", key); err != nil {
			t.Errorf("the %s: %v", key, err)
		}
	}
	put("fourth", time.Minute)
	put("fifth", time.Minute)
}

func TestMemoryClose(t *testing.T) {
	m := auth.NewMemory(auth.MemoryConfig{})
	for range 2 {
		if err := m.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := m.Put(t.Context(), "b", "k", nil, 0, time.Time{}); !errors.Is(err, auth.ErrClosed) {
		t.Errorf("Put after Close: %v", err)
	}
	if _, err := m.Get(t.Context(), "b", "k"); !errors.Is(err, auth.ErrClosed) {
		t.Errorf("Get after Close: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := m.Get(ctx, "b", "k"); !errors.Is(err, context.Canceled) {
		t.Errorf("Get with an ended context: %v", err)
	}
}

// A write must not become slower with what is there.
func BenchmarkMemoryPut(b *testing.B) {
	for _, n := range []int{100, 100_000} {
		b.Run(strconv.Itoa(n), func(b *testing.B) {
			m := auth.NewMemory(auth.MemoryConfig{MaxRecords: map[string]int{"b": n + 1}})
			expires := time.Now().Add(time.Hour)
			for i := range n {
				if _, err := m.Put(b.Context(), "b", fmt.Sprint(i), nil, 0, expires.Add(time.Duration(i))); err != nil {
					b.Fatal(err)
				}
			}
			for b.Loop() {
				if _, err := m.Put(b.Context(), "b", "k", nil, auth.AnyVersion, expires); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
