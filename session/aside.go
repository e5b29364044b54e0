package session

import (
	"context"
	"sync"
)

const (
	maxAside        = 8    // messages of a connection that nobody waits for, under way at once
	maxAsideWaiting = 1000 // of those that wait for others
)

// asides are a connection's messages that nobody waits for: answers to pings,
// refusals, cancellations and what else has no answer.
type asides struct {
	mu      sync.Mutex // guards all below; never held over the network
	waiting []aside
	senders int
	full    bool // and it has been said
}

type aside struct {
	link *link
	body []byte
}

// sendAside has a message sent that nobody waits for.
func (c *connection) sendAside(l *link, body []byte) {
	a := &c.asides
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.waiting) >= maxAsideWaiting {
		if !a.full {
			a.full = true
			c.session.log.Warn("messages not sent: the remote takes them too slowly", "remote", c.remote.Name, "waiting", len(a.waiting))
		}
		return
	}
	a.waiting = append(a.waiting, aside{l, body})
	if a.senders < maxAside && c.session.spawn(c.sendAsides) {
		a.senders++
	}
}

// sendAsides sends what waits until nothing does, or the session ends.
func (c *connection) sendAsides() {
	for {
		next, ok := c.nextAside()
		if !ok {
			return
		}
		ctx, cancel := context.WithTimeout(c.session.ctx, asideTimeout)
		if err := next.link.via.notify(ctx, next.link.header, next.body); err != nil {
			c.session.log.Debug("message not delivered", "remote", c.remote.Name, "error", err)
		}
		cancel()
	}
}

func (c *connection) nextAside() (next aside, ok bool) {
	a := &c.asides
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.waiting) == 0 || c.session.ctx.Err() != nil {
		a.waiting, a.full = nil, false
		a.senders--
		return aside{}, false
	}
	next = a.waiting[0]
	a.waiting[0] = aside{}
	a.waiting = a.waiting[1:]
	return next, true
}
