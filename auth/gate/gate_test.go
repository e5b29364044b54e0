package gate

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"testing"
	"time"

	"gatehouse/auth/endpoint"
	"gatehouse/auth/guard"
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

// TestJudge: only what the server does wrong, or does not do, counts against it.
func TestJudge(t *testing.T) {
	alert := &net.OpError{Op: "remote error", Err: errors.New("certificate required")}
	for name, test := range map[string]struct {
		err  error
		want Verdict
	}{
		"worked":              {nil, Verdict{}},
		"refused":             {&endpoint.Error{Status: 400, Code: "invalid_grant"}, Verdict{}},
		"not found":           {&endpoint.Error{Status: 404}, Verdict{}},
		"down":                {&endpoint.Error{Status: 503, Retry: time.Minute}, Verdict{Unwell: true, Wait: time.Minute}},
		"busy":                {&endpoint.Error{Status: 429, Retry: time.Second}, Verdict{Unwell: true, Wait: time.Second}},
		"says that it is":     {&endpoint.Error{Status: 400, Code: "temporarily_unavailable"}, Verdict{Unwell: true}},
		"says nonsense":       {&endpoint.Error{Status: 200}, Verdict{Unwell: true}},
		"silent":              {&endpoint.Error{Err: context.DeadlineExceeded}, Verdict{Unwell: true}},
		"no time left":        {&endpoint.Error{Err: context.DeadlineExceeded, Left: true}, Verdict{Nothing: true}},
		"we left":             {&endpoint.Error{Err: context.Canceled}, Verdict{Nothing: true}},
		"not allowed":         {&endpoint.Error{Err: guard.ErrBlocked}, Verdict{Nothing: true}},
		"without certificate": {&endpoint.Error{Err: alert}, Verdict{Nothing: true}},
		"not sent":            {errors.New("no assertion could be signed"), Verdict{Nothing: true}},
	} {
		if got := Judge(test.err); got != test.want {
			t.Errorf("%s: %+v", name, got)
		}
	}

	// What says nothing neither opens nor shuts.
	now := time.Now()
	g := New(func() time.Time { return now }).Of("https://as.example/token")
	try := func(v Verdict) error {
		leave, err := g.Enter(t.Context())
		if err == nil {
			leave(v)
		}
		return err
	}
	for range shutAfter {
		for _, v := range []Verdict{{Nothing: true}, {Unwell: true}} {
			if err := try(v); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := try(Verdict{}); !errors.Is(err, ErrShut) {
		t.Errorf("after failures with nothing in between: %v", err)
	}
	now = now.Add(shutForMost)
	for range 2 {
		if err := try(Verdict{Nothing: true}); err != nil {
			t.Errorf("the probe: %v", err)
		}
	}
}

// TestOf: an endpoint has one gate, and those that nobody uses do not pile up.
func TestOf(t *testing.T) {
	gs := New(time.Now)
	used, shut := gs.Of("used"), gs.Of("shut")
	leave, err := used.Enter(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer leave(Verdict{})
	bad, err := shut.Enter(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	bad(Verdict{Unwell: true})
	for i := range 10 * mostGates {
		gs.Of(fmt.Sprint(i))
	}
	if len(gs.gates) > mostGates {
		t.Errorf("%d gates", len(gs.gates))
	}
	if gs.Of("used") != used || gs.Of("shut") != shut {
		t.Error("a gate that matters was dropped")
	}
}
