package auth

import (
	"crypto/rand"
	"log/slog"
	"testing"
	"time"
)

// However many flows one principal starts, a few are kept, and the store does
// not grow.
func TestFloodOfFlows(t *testing.T) {
	const n = 20_000
	store := NewMemory(MemoryConfig{})
	b, err := New(Config{PublicURL: "http://127.0.0.1:8080", CallbackPath: "/oauth/callback", Store: store, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	add := func(p Principal) *flow {
		t.Helper()
		now := time.Now()
		f := &flow{flowFacts: flowFacts{ID: rand.Text(), Principal: p, Remote: "r", Created: now, Expires: now.Add(flowLife)}}
		if err := b.addFlow(t.Context(), f); err != nil {
			t.Fatal(err)
		}
		return f
	}
	bobs := add(SessionPrincipal("bob"))
	first := add(Local)
	for range n {
		add(Local)
	}
	if got, want := len(store.buckets[bucketFlows].records), defaultMaxFlows+1; got != want {
		t.Errorf("%d flows are stored, want %d", got, want)
	}
	if got := len(store.buckets[bucketFlows].expiry); got > defaultMaxFlows+1 {
		t.Errorf("the expiries hold %d flows", got)
	}
	if _, err := b.readFlow(t.Context(), bobs.ID); err != nil {
		t.Errorf("another's flow: %v", err)
	}
	if _, err := b.readFlow(t.Context(), first.ID); err == nil {
		t.Error("the oldest flow is still there")
	}
}
