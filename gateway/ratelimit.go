package gateway

import (
	"net/netip"
	"sync"
	"time"
)

// windowLimit allows so many requests a minute from one address and in all. It
// counts in fixed windows, so that its memory is bounded by the total: a new
// window forgets every address.
type windowLimit struct {
	perAddress, total int
	now               func() time.Time

	mu      sync.Mutex // guards all below
	window  time.Time
	counts  map[netip.Addr]int
	counted int
}

func newWindowLimit(perAddress, total int, now func() time.Time) *windowLimit {
	return &windowLimit{perAddress: perAddress, total: total, now: now, counts: map[netip.Addr]int{}}
}

// allow counts a request; where it is one too many, it says when to try again.
func (l *windowLimit) allow(from netip.Addr) (retryAfter time.Duration, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.now()
	if since := now.Sub(l.window); since >= time.Minute || since < 0 {
		l.window, l.counted = now, 0
		clear(l.counts)
	}
	if from = from.Unmap(); from.Is6() {
		// One subscriber has a whole /64.
		if p, err := from.WithZone("").Prefix(64); err == nil {
			from = p.Addr()
		}
	}
	if l.counted >= l.total || l.counts[from] >= l.perAddress {
		return l.window.Add(time.Minute).Sub(now), false
	}
	l.counted++
	l.counts[from]++
	return 0, true
}
