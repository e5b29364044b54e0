package session

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/cenkalti/backoff/v5"

	"gatehouse/auth"
)

const (
	maxQuiet      = 16 // connections of one remote that are dialed in the background at once
	firstRecovery = 500 * time.Millisecond
	lastRecovery  = 5 * time.Second
	lastRestart   = time.Minute     // the same for a local command that ends again and again
	maxRetryAfter = 5 * time.Minute // that a remote can ask for
)

// recovery dials one remote in the background. There are those who are due:
// they are dialed now, a few at a time. And there are those who found the
// remote down: while there are any, one of them tries it now and then, and all
// are due when it is back.
type recovery struct {
	pool  *Pool
	pause *backoff.ExponentialBackOff // between tries; used under mu, or by watch

	mu       sync.Mutex // guards all below
	due      map[*connection]struct{}
	workers  int
	waiting  map[*connection]struct{}
	watching bool
	calm     time.Time     // when the last watch ended
	roused   bool          // all are due already, since the last try
	wake     chan struct{} // the remote may be back, or nobody waits any more
}

func newRecovery(p *Pool, r *remote) *recovery {
	pause := backoff.NewExponentialBackOff()
	pause.InitialInterval, pause.MaxInterval = firstRecovery, lastRecovery
	pause.RandomizationFactor = 0.2
	if r.Command != nil {
		pause.MaxInterval = lastRestart
	}
	return &recovery{
		pause:   pause,
		pool:    p,
		due:     map[*connection]struct{}{},
		waiting: map[*connection]struct{}{},
		wake:    make(chan struct{}, 1),
	}
}

// soon has a connection dialed in the background.
func (r *recovery) soon(c *connection) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.soonLocked(c)
}

func (r *recovery) soonLocked(c *connection) {
	r.due[c] = struct{}{}
	if r.workers < maxQuiet && r.pool.spawn(r.work) {
		r.workers++
	}
}

// work dials those who are due until nobody is.
func (r *recovery) work() {
	for {
		c := r.next()
		if c == nil {
			return
		}
		// What came of it is the connection's to note.
		_ = c.quietly(r.pool.ctx)
	}
}

func (r *recovery) next() *connection {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.pool.ctx.Err() == nil {
		for c := range r.due {
			delete(r.due, c)
			return c
		}
	}
	r.workers--
	return nil
}

// join adds one who found the remote down.
func (r *recovery) join(c *connection) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if c.session.ctx.Err() != nil {
		return
	}
	r.waiting[c] = struct{}{}
	if !r.watching {
		select {
		case <-r.wake: // it was for a watch that had just ended
		default:
		}
		r.roused = false
		// What ends again soon after it has come back waits longer each time.
		if time.Since(r.calm) > steady {
			r.pause.Reset()
		}
		r.watching = r.pool.spawn(r.watch)
	}
}

// leave removes one who does not wait any more.
func (r *recovery) leave(c *connection) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.due, c)
	delete(r.waiting, c)
	if len(r.waiting) == 0 && r.watching {
		r.signal()
	}
}

// up says that the remote has answered somebody.
func (r *recovery) up() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.waiting) > 0 && !r.roused {
		r.roused = true
		r.signal()
	}
}

func (r *recovery) signal() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// watch tries the remote with one of those who wait, until nobody does.
func (r *recovery) watch() {
	pause := r.pause.NextBackOff()
	var asked time.Duration // to wait, by the remote
	for {
		timer := time.NewTimer(max(pause, asked))
		select {
		case <-r.pool.ctx.Done():
			timer.Stop()
			return
		case <-r.wake:
			timer.Stop()
			if !r.allDue() {
				return
			}
			asked = 0
		case <-timer.C:
			if c := r.one(); c != nil {
				// A success comes back by up. The next try is another's: what fails
				// may fail for this one alone.
				err := c.quietly(r.pool.ctx)
				asked = 0
				if err != nil {
					pause = r.pause.NextBackOff()
				}
				if failure, ok := errors.AsType[*Failure](err); ok {
					asked = min(failure.Retry, maxRetryAfter)
				}
			}
		}
	}
}

// one picks somebody who waits. Go's order of a map is as good as any: it is
// another one each time.
func (r *recovery) one() *connection {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.roused = false
	for c := range r.waiting {
		return c
	}
	return nil
}

// allDue has all dialed who wait; if nobody does, watching ends. They wait
// until their own dial has come to something.
func (r *recovery) allDue() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.waiting) == 0 {
		r.watching, r.calm = false, time.Now()
		return false
	}
	for c := range r.waiting {
		r.soonLocked(c)
	}
	return true
}

// isDown reports whether an error is of the kind that passes by itself, without
// anybody signing in or changing the config.
func isDown(err error) bool {
	if failure, ok := errors.AsType[*Failure](err); ok {
		return failure.Kind != KindUnsupported
	}
	unavailable, ok := errors.AsType[*auth.Error](err)
	return ok && unavailable.Kind == auth.KindUnavailable || errors.Is(err, context.DeadlineExceeded)
}
