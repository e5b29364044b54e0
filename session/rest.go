package session

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
	c.mu.Lock()
	defer c.mu.Unlock()
	for key, s := range c.sides {
		if s.users == 0 {
			c.closeSideLocked(key, s)
		}
	}
	if c.link == nil || c.link.users > 0 || c.link.busy() {
		return
	}
	c.letGoLocked(c.unlinkLocked())
}

// busy reports whether a call is in flight.
func (l *link) busy() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.calls) > 0
}
