package gateway

import (
	"net/netip"
	"sync"
	"time"
)

// windowLimit allows so many requests a minute from one address and in all. It
// counts in fixed windows: a new window forgets every address.
type windowLimit struct {
	perAddress, total int
	now               func() time.Time

	mu      sync.Mutex // guards all below
	window  time.Time
	counts  map[netip.Addr]int
	counted int
}

// maxAddresses bounds the memory of a window: those that come after so many
// others count as one.
const maxAddresses = 100_000

func newWindowLimit(perAddress, total int, now func() time.Time) *windowLimit {
	return &windowLimit{perAddress: perAddress, total: total, now: now, counts: map[netip.Addr]int{}}
}

// allow counts a request, in all only if it is to; where it is one too many, it
// says when to try again.
func (l *windowLimit) allow(from netip.Addr, inAll bool) (retryAfter time.Duration, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.now()
	if since := now.Sub(l.window); since >= time.Minute || since < 0 {
		l.window, l.counted = now, 0
		clear(l.counts)
	}
	from = l.countedAsLocked(from)
	if inAll && l.counted >= l.total || l.counts[from] >= l.perAddress {
		return l.window.Add(time.Minute).Sub(now), false
	}
	if inAll {
		l.counted++
	}
	l.counts[from]++
	return 0, true
}

// giveBack takes back what allow has counted in all: the request was a good one.
func (l *windowLimit) giveBack(from netip.Addr) {
	l.mu.Lock()
	defer l.mu.Unlock()
	from = l.countedAsLocked(from)
	// Its window may be over.
	if l.counts[from] > 0 && l.counted > 0 {
		l.counts[from]--
		l.counted--
	}
}

func (l *windowLimit) countedAsLocked(from netip.Addr) netip.Addr {
	if from = from.Unmap(); from.Is6() {
		// One subscriber has a whole /64.
		if p, err := from.WithZone("").Prefix(64); err == nil {
			from = p.Addr()
		}
	}
	if _, known := l.counts[from]; !known && len(l.counts) >= maxAddresses {
		return netip.Addr{}
	}
	return from
}
