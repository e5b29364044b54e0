package session

import (
	"context"
	"encoding/json"
	"fmt"
)

// SetLogLevel has the remotes that declare logging send log messages from this
// level on, now and after every dial. Each is told before its next call.
func (s *Session) SetLogLevel(level string) {
	s.level.Store(&level)
}

// leveled tells a remote the log level that is wanted of it, if it does not
// know. What comes of it is no matter to the call that comes after it.
func (c *connection) leveled(ctx context.Context, l *link) {
	want := c.session.level.Load()
	if want == nil || l.modern || !l.offers.Logging || l.level.Load() == want {
		return // in the modern era each request says it
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
	l.level.Store(want)
}
