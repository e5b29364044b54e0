package auth

import (
	"context"
	"errors"
	"sync"
	"time"
)

// gate is before one issuer's token endpoint: a bounded number of refreshes at
// once, and after several failures in a row none for a while, so that an
// outage is not met by everybody's retries, nor its end by all of them at once.
type gate struct {
	now   func() time.Time
	slots chan struct{}

	mu       sync.Mutex // guards all below
	failures int        // in a row
	until    time.Time  // nobody enters before; zero: it is not shut
	probing  bool       // somebody finds out whether it can be opened again
}

const (
	refreshesAtOnce = 16 // of one issuer
	shutAfter       = 5  // failures in a row
	shutFor         = time.Second
	shutForMost     = time.Minute
)

// errShut: the issuer has failed several times just now, and is not asked.
var errShut = errors.New("the authorization server has failed several times in a row and is not asked at the moment")

// gateOf returns the gate of an issuer. There are no more of them than issuers
// that remotes have been signed in with.
func (b *Broker) gateOf(issuer string) *gate {
	b.mu.Lock()
	defer b.mu.Unlock()
	g := b.gates[issuer]
	if g == nil {
		g = &gate{now: b.now, slots: make(chan struct{}, refreshesAtOnce)}
		b.gates[issuer] = g
	}
	return g
}

// enter waits for a slot, or returns errShut. leave takes what came of it.
func (g *gate) enter(ctx context.Context) (leave func(verdict), err error) {
	select {
	case g.slots <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	probe := false
	if !g.until.IsZero() {
		if g.probing || g.now().Before(g.until) {
			<-g.slots
			return nil, errShut
		}
		g.probing, probe = true, true
	}
	return func(v verdict) { g.leave(v, probe) }, nil
}

// verdict is what a request said about the issuer.
type verdict struct {
	unwell bool          // it failed, or gave no answer
	wait   time.Duration // as it asked for by Retry-After; 0: it did not
}

func (g *gate) leave(v verdict, probe bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	<-g.slots
	if probe {
		g.probing = false
	}
	if !v.unwell {
		g.failures, g.until = 0, time.Time{}
		return
	}
	g.failures++
	if g.failures < shutAfter && v.wait == 0 {
		return
	}
	pause := max(v.wait, min(shutFor<<min(max(g.failures-shutAfter, 0), 10), shutForMost))
	if until := g.now().Add(pause); until.After(g.until) {
		g.until = until
	}
}

// opens returns when the next request may be made; zero: now.
func (g *gate) opens() time.Time {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.until
}
