package session

import (
	"context"
	"errors"
	"time"
)

// This file finds out which era a local command speaks, and starts it no more
// often than that takes.

const (
	// silenceWait is how long a program may be silent about the modern era before
	// it is initialized in the legacy one. It may be one that still starts: what it
	// says later counts as well.
	silenceWait = 2 * time.Second
	// orderWait is for one that answers what it was asked first a little later.
	orderWait = 500 * time.Millisecond
)

// beginProgram is begin for a local command.
func (c *connection) beginProgram(ctx context.Context, loud bool) (*link, error) {
	known := eras(c.remote.eras.Load())
	// A program of both eras can ask a legacy client something in the middle of a
	// call in the legacy era only. A remote with a URL does so on a link beside the
	// main one; here there is no other.
	if known != eraLegacy && (known == eraModern || none(c.owner())) {
		return c.probe(ctx, loud, nil)
	}
	l, err := c.initialize(ctx, loud, c.owner(), nil)
	switch {
	case err == nil:
		return l, nil
	case !hasAnswered(err):
		c.abandon(l)
		return nil, err
	}
	if l, err = c.probe(ctx, loud, l.via); err == nil && l.modern {
		c.remote.eras.Store(int32(eraModern))
	}
	return l, err
}

// probe asks a program what it is in the modern era first (MCP 2026-07-28,
// stdio). Any error says that it does not know that era, and so does silence:
// then it is initialized over the same pipes. Some legacy programs die of a
// request that they do not know; such a one is started again, and not asked again.
// Before is the transport of one that runs, or nil.
func (c *connection) probe(ctx context.Context, loud bool, before transport) (*link, error) {
	d, err := c.startDiscovery(ctx, loud, before)
	if err != nil {
		return nil, err
	}
	defer d.end()
	if d.wait(silenceWait) && d.err == nil {
		return c.foundModern(d.link), nil
	}
	legacy, err := c.initialize(d.pending, loud, c.owner(), d.link.via)
	d.wait(orderWait)
	d.end()
	switch {
	case err == nil && d.err == nil:
		c.remote.eras.Store(int32(eraBoth))
		return legacy, nil
	case err == nil:
		c.remote.eras.Store(int32(eraLegacy))
		return legacy, nil
	case d.err == nil:
		return c.foundModern(d.link), nil
	}
	c.abandon(d.link)
	c.abandon(legacy)
	if !hasDied(err) && !hasDied(d.err) {
		return nil, err
	}
	c.remote.eras.Store(int32(eraLegacy))
	if legacy == nil || legacy.via != d.link.via {
		return nil, err // it has been started again already
	}
	if legacy, err = c.initialize(ctx, loud, c.owner(), nil); err != nil {
		c.abandon(legacy)
		return nil, err
	}
	return legacy, nil
}

// discovery is server/discover in the background.
type discovery struct {
	link    *link
	pending context.Context // ends when the answer is a good one
	stop    context.CancelFunc
	done    chan struct{} // closed when err is set
	err     error
}

// startDiscovery starts a program, or takes one that runs, and asks it.
func (c *connection) startDiscovery(ctx context.Context, loud bool, before transport) (*discovery, error) {
	opening, opened := within(ctx, commandTimeout)
	defer opened()
	d := &discovery{link: c.modernAttempt(), done: make(chan struct{})}
	var err error
	if d.link.via, err = c.reopened(opening, d.link, before); err != nil {
		return nil, err
	}
	asking, stop := context.WithCancel(ctx)
	pending, found := context.WithCancel(ctx)
	d.pending, d.stop = pending, func() { stop(); found() }
	started := c.session.spawn(func() {
		defer close(d.done)
		if d.err = c.discover(asking, loud, d.link); d.err == nil {
			found()
		}
	})
	if !started {
		d.stop()
		c.abandon(d.link)
		return nil, ErrClosed
	}
	return d, nil
}

// wait waits for the answer, but not for longer than this; false if there is none.
func (d *discovery) wait(longest time.Duration) bool {
	timer := time.NewTimer(longest)
	defer timer.Stop()
	select {
	case <-d.done:
		return true
	case <-timer.C:
		return false
	}
}

// end gives up waiting for the answer. After that err is there to be read.
func (d *discovery) end() {
	d.stop()
	<-d.done
}

// foundModern has a program's messages come to the link of the modern era.
func (c *connection) foundModern(l *link) *link {
	if d, ok := l.via.(*duplex); ok {
		d.serve(l)
	}
	c.remote.eras.CompareAndSwap(int32(erasUnknown), int32(eraBoth))
	return l
}

// hasAnswered reports whether an error is what a remote has answered.
func hasAnswered(err error) bool {
	if _, ok := errors.AsType[*ResponseError](err); ok {
		return true
	}
	failure, ok := errors.AsType[*Failure](err)
	return ok && (failure.Kind == KindBadAnswer || failure.Kind == KindUnsupported)
}

// hasDied reports whether an error says that a program ended before it answered.
func hasDied(err error) bool {
	failure, ok := errors.AsType[*Failure](err)
	return ok && (failure.Kind == KindCut || failure.Kind == KindUnreachable)
}
