package gateway

import (
	"fmt"
	"sync"
	"time"
)

// callLimit bounds what one principal may ask of remotes: so many calls at
// once, and so many a second in the long run, with a second's worth at once.
type callLimit struct {
	inFlight, perSecond int // perSecond 0: any number
	now                 func() time.Time

	mu     sync.Mutex // guards all below
	active int
	spare  float64 // calls that may begin now
	filled time.Time
}

// limited says that a principal has asked for too much.
type limited struct {
	limit string // its key in gateway.limits
	most  int
	retry time.Duration // until it is worth trying again
}

func (e *limited) Error() string { return "gateway.limits." + e.limit + " is reached" }

// say is what the user reads.
func (e *limited) say() string {
	if e.limit == "callsPerSecond" {
		return fmt.Sprintf("This is more than %s a second, which is all that one user may make (gateway.limits.callsPerSecond). Wait a moment and repeat the call.", plural(e.most, "call"))
	}
	return fmt.Sprintf("As many calls are in flight as one user may have: %d (gateway.limits.callsInFlight). Wait for some of them to end and repeat the call.", e.most)
}

func newCallLimit(limits Limits, now func() time.Time) *callLimit {
	return &callLimit{inFlight: limits.CallsInFlight, perSecond: limits.CallsPerSecond, now: now, spare: float64(limits.CallsPerSecond), filled: now()}
}

// take counts a call until release is called.
func (l *callLimit) take() (release func(), refused *limited) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if refused := l.refusedLocked(); refused != nil {
		return nil, refused
	}
	l.active++
	if l.perSecond > 0 {
		l.spare--
	}
	return l.release, nil
}

func (l *callLimit) release() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.active--
}

// giveBack lets another call begin in place of one that was only the way to it.
func (l *callLimit) giveBack() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.spare = min(float64(l.perSecond), l.spare+1)
}

// refused says whether a call that began now would be one too many.
func (l *callLimit) refused() *limited {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.refusedLocked()
}

func (l *callLimit) refusedLocked() *limited {
	if l.active >= l.inFlight {
		return &limited{"callsInFlight", l.inFlight, time.Second}
	}
	if l.perSecond == 0 {
		return nil
	}
	rate := float64(l.perSecond)
	now := l.now()
	if since := now.Sub(l.filled); since > 0 {
		l.spare = min(rate, l.spare+since.Seconds()*rate)
	}
	l.filled = now
	if l.spare < 1 {
		return &limited{"callsPerSecond", l.perSecond, time.Duration((1 - l.spare) / rate * float64(time.Second))}
	}
	return nil
}
