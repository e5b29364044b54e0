package session

import "context"

// Rest closes the connections to all remotes that no call is using: for now
// nobody is there who would need them. What they have listed stays, and so does
// what was subscribed to; the next call, or [Session.Wake], dials anew.
func (s *Session) Rest() {
	for _, c := range s.connections {
		c.rest()
	}
}

// Wake dials all remotes in the background, as when the session began: somebody
// is there again.
func (s *Session) Wake() {
	for _, c := range s.connections {
		c.remote.recovery.soon(c)
	}
}

func (c *connection) rest() {
	c.remote.recovery.leave(c)
	c.restFromCommon()
	c.mu.Lock()
	defer c.mu.Unlock()
	for key, s := range c.sides {
		if s.users == 0 {
			c.closeSideLocked(key, s)
		}
	}
	if c.link == nil || c.link.users > 0 || c.link.busyFor(c.session) {
		return
	}
	c.letGoLocked(c.unlinkLocked())
}

// restFromCommon leaves the common connection. The last who does closes it.
func (c *connection) restFromCommon() {
	common := c.common.Load()
	if common == nil {
		return
	}
	common.mu.Lock()
	busy := common.link != nil && common.link.busyFor(c.session)
	common.mu.Unlock()
	if busy {
		return
	}
	if unused := c.leave(true); unused != nil {
		ctx, cancel := context.WithTimeout(context.Background(), goodbyeTimeout)
		defer cancel()
		unused.close(ctx)
	}
}

// busyFor reports whether a call of a session is in flight.
func (l *link) busyFor(s *Session) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range l.calls {
		if c.session == s {
			return true
		}
	}
	return false
}
