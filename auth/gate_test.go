package auth

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"
)

// TestGate: after failures in a row nobody enters for a while, then one does to
// find out; a success opens it, a failure shuts it for longer, up to a bound; and
// it stays shut for as long as the server asks.
func TestGate(t *testing.T) {
	now := time.Date(2026, 7, 28, 12, 0, 0, 0, time.UTC)
	g := &gate{now: func() time.Time { return now }, slots: make(chan struct{}, refreshesAtOnce)}
	try := func(v verdict) error {
		leave, err := g.enter(t.Context())
		if err == nil {
			leave(v)
		}
		return err
	}
	must := func(v verdict) {
		t.Helper()
		if err := try(v); err != nil {
			t.Fatal(err)
		}
	}
	bad := verdict{unwell: true}
	for range shutAfter {
		must(bad)
	}
	for _, pause := range []time.Duration{1, 2, 4, 8, 16, 32, 60, 60} {
		pause *= time.Second
		now = now.Add(pause - time.Millisecond)
		if err := try(bad); !errors.Is(err, errShut) {
			t.Fatalf("after a bit less than %v: %v", pause, err)
		}
		now = now.Add(time.Millisecond)
		probe, err := g.enter(t.Context())
		if err != nil {
			t.Fatalf("after %v: %v", pause, err)
		}
		if err := try(bad); !errors.Is(err, errShut) {
			t.Errorf("a second one entered beside the probe: %v", err)
		}
		probe(bad)
	}
	now = now.Add(time.Hour)
	must(verdict{})
	for range 2 * refreshesAtOnce {
		must(verdict{})
	}
	must(verdict{unwell: true, wait: 10 * time.Minute})
	now = now.Add(10*time.Minute - time.Second)
	if err := try(bad); !errors.Is(err, errShut) {
		t.Errorf("before the server's Retry-After: %v", err)
	}
	now = now.Add(time.Second)
	must(verdict{})
}

// TestGateSlots: no more than 16 are inside, and who gives up waiting leaves
// the others alone.
func TestGateSlots(t *testing.T) {
	g := &gate{now: time.Now, slots: make(chan struct{}, refreshesAtOnce)}
	var leaves []func(verdict)
	for range refreshesAtOnce {
		leave, err := g.enter(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		leaves = append(leaves, leave)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := g.enter(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("one too many: %v", err)
	}
	var wg sync.WaitGroup
	for range 100 {
		wg.Go(func() {
			leave, err := g.enter(t.Context())
			if err != nil {
				t.Error(err)
				return
			}
			if len(g.slots) > refreshesAtOnce {
				t.Errorf("%d are inside", len(g.slots))
			}
			leave(verdict{})
		})
	}
	for _, leave := range leaves {
		leave(verdict{})
	}
	wg.Wait()
	if len(g.slots) != 0 {
		t.Errorf("%d slots are taken", len(g.slots))
	}
}
