package session

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/cenkalti/backoff/v5"

	"gatehouse/auth"
)

// This file keeps up with a remote of protocol 2026-07-28: what it has to say
// when nobody asks comes on the stream of a subscriptions/listen request, which
// names each thing that is wanted.

// ackWait is how long a subscription waits to be acknowledged.
const ackWait = 5 * time.Second

// maxRefusals is how often, on one link, it is found out which resources a remote
// refuses a subscription for.
const maxRefusals = 64

// listens is the state of a connection's subscriptions at a modern remote.
type listens struct {
	changed chan struct{} // holds one: what is wanted is not what is asked for
	wanted  int           // counts changes of what is wanted; guarded by the connection's mu, like the rest
	acked   int           // the last that the remote has acknowledged
	news    chan struct{} // closed, and replaced, with each acknowledgement
}

// wantedLocked returns the params of subscriptions/listen without _meta, nil if
// there is nothing to listen for. Of the resources that the remote has not
// accepted yet on this link, untried, there are so many in it at the most.
func (c *connection) wantedLocked(l *link, most int) (params json.RawMessage, untried []string, rest bool, err error) {
	var wanted struct {
		Notifications struct {
			Tools     bool     `json:"toolsListChanged,omitempty"`
			Prompts   bool     `json:"promptsListChanged,omitempty"`
			Resources bool     `json:"resourcesListChanged,omitempty"`
			URIs      []string `json:"resourceSubscriptions,omitempty"`
		} `json:"notifications"`
	}
	n := &wanted.Notifications
	n.Tools, n.Prompts, n.Resources = l.offers.ToolsChange, l.offers.PromptsChange, l.offers.ResourcesChange
	for uri, w := range c.subscribed {
		switch l {
		case w.on:
			n.URIs = append(n.URIs, uri)
		case w.refused:
		default:
			untried = append(untried, uri)
		}
	}
	slices.Sort(untried)
	if rest = len(untried) > most; rest {
		untried = untried[:most]
	}
	n.URIs = append(n.URIs, untried...)
	slices.Sort(n.URIs)
	if !n.Tools && !n.Prompts && !n.Resources && n.URIs == nil {
		return nil, nil, rest, nil
	}
	if params, err = json.Marshal(wanted); err != nil {
		return nil, nil, false, fmt.Errorf("encoding subscriptions: %w", err)
	}
	return params, untried, rest, nil
}

// refused notes that a remote refuses a stream as long as one of these resources
// is wanted on it. It returns how many of them to try next, or says that it is not
// for their sake. The other parts are good all the same, and may be others' too.
func (c *connection) refused(l *link, untried []string) (most int, theirs bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(untried) == 0 {
		// They were good before. Which is not any more?
		for _, w := range c.subscribed {
			if w.on == l {
				w.on, theirs = nil, true
			}
		}
		return math.MaxInt, theirs
	}
	if l.refusals++; len(untried) > 1 && l.refusals < maxRefusals {
		return len(untried) / 2, true
	}
	for _, uri := range untried {
		if w := c.subscribed[uri]; w != nil {
			w.refused = l
		}
	}
	c.session.log.Info("the remote refuses to tell of updates", "remote", c.remote.Name, "resources", len(untried))
	return math.MaxInt, true
}

// relistenLocked has the stream opened anew, as what is wanted has changed, and
// returns the number of that change.
func (c *connection) relistenLocked(l *link) int {
	if c.listens == nil {
		c.listens = &listens{changed: make(chan struct{}, 1), news: make(chan struct{})}
	}
	c.listens.wanted++
	select {
	case c.listens.changed <- struct{}{}:
	default:
	}
	c.listenLocked(l)
	return c.listens.wanted
}

// acknowledged waits a moment until the remote has acknowledged a change.
func (c *connection) acknowledged(ctx context.Context, l *link, wanted int) {
	ctx, cancel := context.WithTimeout(ctx, ackWait)
	defer cancel()
	for {
		c.mu.Lock()
		done := c.listens.acked >= wanted || l.silent || c.link != l
		news := c.listens.news
		c.mu.Unlock()
		if done {
			return
		}
		select {
		case <-news:
		case <-ctx.Done():
			return
		case <-l.ctx.Done():
			return
		}
	}
}

// stream is one subscriptions/listen request.
type stream struct {
	untried []string // resources that it is tried with
	rest    bool     // there are more of those
	cancel  context.CancelFunc
	acked   chan struct{} // closed by the acknowledgement, the first message
	done    chan struct{} // closed at the end
	err     error
}

func (s *stream) end() {
	s.cancel()
	<-s.done
}

// subscribe opens a stream for what is wanted now, with so many resources at the
// most that it was not tried with before; nil if that is nothing.
func (c *connection) subscribe(l *link, most int) (*stream, error) {
	c.mu.Lock()
	if c.listens == nil {
		c.listens = &listens{changed: make(chan struct{}, 1), news: make(chan struct{})}
	}
	params, untried, rest, err := c.wantedLocked(l, most)
	wanted := c.listens.wanted
	c.mu.Unlock()
	if err != nil {
		return nil, err
	}
	acknowledge := func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		for _, uri := range untried {
			if w := c.subscribed[uri]; w != nil {
				w.on = l
			}
		}
		if !rest {
			c.listens.acked = max(c.listens.acked, wanted)
		}
		close(c.listens.news)
		c.listens.news = make(chan struct{})
	}
	if params == nil {
		acknowledge()
		return nil, nil
	}
	ctx, cancel := context.WithCancel(auth.NoRefresh(l.ctx)) // it comes back when a call has refreshed
	s := &stream{untried: untried, rest: rest, cancel: cancel, acked: make(chan struct{}), done: make(chan struct{})}
	in := l.incoming(nil)
	heard, acked := in.notify, false
	in.notify = func(method string, params json.RawMessage) {
		switch {
		case method != "notifications/subscriptions/acknowledged":
			heard(method, params)
		case !acked:
			acked = true
			acknowledge()
			close(s.acked)
		}
	}
	started := c.session.spawn(func() {
		defer close(s.done)
		defer cancel()
		s.err = c.wire.authorized(ctx, false, func() error {
			params, err := l.enveloped(params, nil)
			if err != nil {
				return err
			}
			header, err := l.named("subscriptions/listen", params)
			if err != nil {
				return err
			}
			_, _, err = l.via.request(ctx, header, c.ids.Add(1), "subscriptions/listen", params, in)
			return err
		})
	})
	if !started {
		cancel()
		return nil, ErrClosed
	}
	return s, nil
}

// keepListening keeps a stream open until the link ends, or the remote says
// that there is none. When something else is wanted the next stream is there
// before the last one ends, so that nothing is missed.
func (c *connection) keepListening(l *link) (silent bool) {
	pause := backoff.NewExponentialBackOff()
	pause.InitialInterval, pause.MaxInterval = firstReopen, lastReopen
	var current *stream
	defer func() {
		if current != nil {
			current.end()
		}
	}()
	most := math.MaxInt
	for lost := false; ; {
		next, err := c.subscribe(l, most)
		if err != nil {
			return false
		}
		most = math.MaxInt
		began, outdated, failed := time.Now(), false, false
		c.mu.Lock()
		changed := c.listens.changed
		c.mu.Unlock()
		if next != nil {
			timer := time.NewTimer(ackWait)
			select {
			case <-next.acked:
			case <-next.done:
				failed = next.err != nil
			case <-changed:
				outdated = true // and perhaps it never answers
			case <-timer.C: // it may work all the same
			}
			timer.Stop()
		}
		if outdated {
			next.end()
			continue
		}
		if failed && isRefusal(next.err) {
			var theirs bool
			if most, theirs = c.refused(l, next.untried); theirs {
				continue
			}
		}
		if current != nil {
			current.end()
		}
		if current = next; current != nil && lost && !failed {
			c.changed() // what was said in between is lost
		}
		if current != nil && current.rest && !failed {
			lost = false
			continue
		}
		var done chan struct{}
		if current != nil {
			done = current.done
		}
		select {
		case <-l.ctx.Done():
			return false
		case <-changed:
			lost = false
			continue
		case <-done:
		}
		err, current, lost = current.err, nil, true
		if l.ctx.Err() != nil {
			return false
		}
		failure, _ := errors.AsType[*Failure](err)
		refusal, _ := errors.AsType[*ResponseError](err)
		refused, _ := errors.AsType[*auth.Error](err)
		switch {
		case refusal != nil, failure != nil && isFinal(failure.Status):
			return true
		case errors.Is(err, auth.ErrSignInNeeded), refused != nil && refused.Kind != auth.KindUnavailable:
			return false // the next list that is read after a sign-in begins it again
		}
		if time.Since(began) > steady {
			pause.Reset()
		}
		if !l.rest(pause, err) {
			return false
		}
	}
}

// wantUpdates notes that u wants a resource's updates, and has a modern remote
// told so.
func (c *connection) wantUpdates(ctx context.Context, l *link, u *connection, uri string) error {
	c.mu.Lock()
	if u.main() != c {
		c.mu.Unlock()
		return errApart
	}
	others := c.subscribed[uri] != nil && c.listens != nil
	c.wantLocked(u, uri)
	var change int
	if others {
		change = c.listens.wanted
	} else {
		change = c.relistenLocked(l)
	}
	c.mu.Unlock()
	c.acknowledged(ctx, l, change)
	return nil
}

// isRefusal reports whether a remote refuses a stream for what is wanted on it.
func isRefusal(err error) bool {
	refusal, ok := errors.AsType[*ResponseError](err)
	return ok && refusal.Code != codeUnknownMethod
}
