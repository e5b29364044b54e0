// Package gate stands before token endpoints: a bounded number of requests at
// once towards each, and after several failures in a row none for a while, so
// that an outage is not met by everybody's retries, nor its end by all of them
// at once. Whatever a token is asked for with, a refresh token, a login or the
// gateway's own credentials, the same server meets one queue.
package gate

import (
	"context"
	"errors"
	"net/http"
	"sync"
	"time"

	"gatehouse/auth/endpoint"
	"gatehouse/auth/guard"
)

// Gates are those of a process.
type Gates struct {
	now func() time.Time

	mu    sync.Mutex // guards gates
	gates map[string]*Gate
}

// New makes gates that go by this clock.
func New(now func() time.Time) *Gates {
	return &Gates{now: now, gates: map[string]*Gate{}}
}

// Of returns the gate of a token endpoint.
func (gs *Gates) Of(endpoint string) *Gate {
	gs.mu.Lock()
	defer gs.mu.Unlock()
	g := gs.gates[endpoint]
	if g == nil {
		if len(gs.gates) >= mostGates {
			for at, g := range gs.gates {
				if g.idle() {
					delete(gs.gates, at)
				}
			}
		}
		g = &Gate{now: gs.now, slots: make(chan struct{}, AtOnce)}
		gs.gates[endpoint] = g
	}
	return g
}

// Gate is that of one token endpoint.
type Gate struct {
	now   func() time.Time
	slots chan struct{}

	mu       sync.Mutex // guards all below
	failures int        // in a row
	until    time.Time  // nobody enters before; zero: it is not shut
	probing  bool       // somebody finds out whether it can be opened again
}

// AtOnce is how many requests are in flight towards one endpoint.
const AtOnce = 16

const (
	shutAfter   = 5 // failures in a row
	shutFor     = time.Second
	shutForMost = time.Minute

	// mostGates is when those are dropped that nobody uses: endpoints are named by
	// documents, which may name another one each time.
	mostGates = 1000
)

// ErrShut: the server has failed several times just now, and is not asked.
var ErrShut = errors.New("the authorization server has failed several times in a row and is not asked at the moment")

// Enter waits for a slot; it fails with [ErrShut], or with the context's error.
// leave, which must be called once, takes what came of the request.
func (g *Gate) Enter(ctx context.Context) (leave func(Verdict), err error) {
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
			return nil, ErrShut
		}
		g.probing, probe = true, true
	}
	return func(v Verdict) { g.leave(v, probe) }, nil
}

// Verdict is what a request said about the server. The zero value says that it
// is well.
type Verdict struct {
	Nothing bool          // it says nothing: no request was sent
	Unwell  bool          // it failed, or gave no answer
	Wait    time.Duration // as it asked for by Retry-After; 0: it did not
}

// Judge reads a verdict from what a request of package endpoint ended with; nil
// is a success. An answer that is meant for the one who asked, a request that
// never left because of how its sender is configured, and one that began too late
// to be answered in its sender's time say nothing against the server: others may
// fare better there.
func Judge(err error) Verdict {
	if err == nil {
		return Verdict{}
	}
	e, ok := errors.AsType[*endpoint.Error](err)
	switch {
	case !ok, errors.Is(err, guard.ErrBlocked), errors.Is(err, context.Canceled), e.Left, e.EndedHandshake():
		return Verdict{Nothing: true}
	case e.Refused():
		return Verdict{}
	case e.Code == "" && e.Status >= 300 && e.Status < 500 && e.Status != http.StatusTooManyRequests && e.Status != http.StatusRequestTimeout:
		return Verdict{Wait: e.Retry}
	}
	return Verdict{Unwell: true, Wait: e.Retry}
}

func (g *Gate) leave(v Verdict, probe bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	<-g.slots
	if probe {
		g.probing = false
	}
	if v.Nothing {
		return
	}
	if !v.Unwell {
		g.failures, g.until = 0, time.Time{}
		return
	}
	g.failures++
	if g.failures < shutAfter && v.Wait == 0 {
		return
	}
	pause := max(v.Wait, min(shutFor<<min(max(g.failures-shutAfter, 0), 10), shutForMost))
	if until := g.now().Add(pause); until.After(g.until) {
		g.until = until
	}
}

// idle reports whether nobody is inside and nothing stands against the server.
func (g *Gate) idle() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.slots) == 0 && g.failures == 0
}

// Opens returns when the next request may be made; zero: now.
func (g *Gate) Opens() time.Time {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.until
}
