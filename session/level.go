package session

import (
	"context"
	"encoding/json"
	"fmt"
)

// SetLogLevel has the remotes that declare logging send log messages from this
// level on, now and after every dial.
func (s *Session) SetLogLevel(level string) {
	s.level.Store(&level)
	for _, c := range s.connections {
		c.mu.Lock()
		links := c.linksLocked()
		c.mu.Unlock()
		for _, l := range links {
			c.levelSoon(l)
		}
	}
}

// levelSoon has a remote told in the background what log level is wanted of it.
func (c *connection) levelSoon(l *link) {
	if l.wantsLevel() != nil {
		c.session.spawn(func() { c.leveled(l.ctx, l) })
	}
}

// wantsLevel returns the log level that the remote has to be told, nil if it
// knows or does not log. In the modern era each request says it.
func (l *link) wantsLevel() *string {
	want := l.connection.session.level.Load()
	if l.modern || !l.offers.Logging || l.level.Load() == want {
		return nil
	}
	return want
}

// leveled tells a remote the log level that is wanted of it, if it does not
// know. What comes of it is no matter to the call that comes after it.
func (c *connection) leveled(ctx context.Context, l *link) {
	if l.wantsLevel() == nil {
		return
	}
	// One at a time, so that no older one overtakes a newer.
	select {
	case l.leveling <- struct{}{}:
		defer func() { <-l.leveling }()
	case <-ctx.Done():
		return
	}
	want := l.wantsLevel()
	if want == nil {
		return
	}
	quoted, err := json.Marshal(*want)
	if err == nil {
		err = c.wire.authorized(ctx, false, func() error {
			ctx, cancel := within(ctx, asideTimeout)
			defer cancel()
			_, _, err := l.request(ctx, c.ids.Add(1), "logging/setLevel", fmt.Appendf(nil, `{"level":%s}`, quoted), nil)
			return err
		})
	}
	if err != nil {
		c.session.log.Debug("log level not set", "remote", c.remote.Name, "error", err)
	}
	// Once for each link: a remote that refuses it would refuse it again.
	if ctx.Err() == nil {
		l.level.Store(want)
	}
}
