package gate

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
	g := &Gate{now: func() time.Time { return now }, slots: make(chan struct{}, AtOnce)}
	try := func(v Verdict) error {
		leave, err := g.Enter(t.Context())
		if err == nil {
			leave(v)
		}
		return err
	}
	must := func(v Verdict) {
		t.Helper()
		if err := try(v); err != nil {
			t.Fatal(err)
		}
	}
	bad := Verdict{Unwell: true}
	for range shutAfter {
		must(bad)
	}
	for _, pause := range []time.Duration{1, 2, 4, 8, 16, 32, 60, 60} {
		pause *= time.Second
		now = now.Add(pause - time.Millisecond)
		if err := try(bad); !errors.Is(err, ErrShut) {
			t.Fatalf("after a bit less than %v: %v", pause, err)
		}
		now = now.Add(time.Millisecond)
		probe, err := g.Enter(t.Context())
		if err != nil {
			t.Fatalf("after %v: %v", pause, err)
		}
		if err := try(bad); !errors.Is(err, ErrShut) {
			t.Errorf("a second one entered beside the probe: %v", err)
		}
		probe(bad)
	}
	now = now.Add(time.Hour)
	must(Verdict{})
	for range 2 * AtOnce {
		must(Verdict{})
	}
	must(Verdict{Unwell: true, Wait: 10 * time.Minute})
	now = now.Add(10*time.Minute - time.Second)
	if err := try(bad); !errors.Is(err, ErrShut) {
		t.Errorf("before the server's Retry-After: %v", err)
	}
	now = now.Add(time.Second)
	must(Verdict{})
}

// TestGateSlots: no more than 16 are inside, and who gives up waiting leaves
// the others alone.
func TestGateSlots(t *testing.T) {
	g := &Gate{now: time.Now, slots: make(chan struct{}, AtOnce)}
	var leaves []func(Verdict)
	for range AtOnce {
		leave, err := g.Enter(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		leaves = append(leaves, leave)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := g.Enter(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("one too many: %v", err)
	}
	var wg sync.WaitGroup
	for range 100 {
		wg.Go(func() {
			leave, err := g.Enter(t.Context())
			if err != nil {
				t.Error(err)
				return
			}
			if len(g.slots) > AtOnce {
				t.Errorf("%d are inside", len(g.slots))
			}
			leave(Verdict{})
		})
	}
	for _, leave := range leaves {
		leave(Verdict{})
	}
	wg.Wait()
	if len(g.slots) != 0 {
		t.Errorf("%d slots are taken", len(g.slots))
	}
}
