package session

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/cenkalti/backoff/v5"

	"gatehouse/auth"
	"gatehouse/session/rawjson"
)

const (
	firstReopen = 500 * time.Millisecond
	lastReopen  = time.Minute
	steady      = 10 * time.Second // a stream that was open for so long was a good one
)

const notifyUpdated = "notifications/resources/updated"

// Outcomes of opening a remote's event stream.
var (
	errNoStream = errors.New("the remote offers no event stream")
	errCut      = errors.New("the event stream has ended")
)

// listenLocked keeps the remote's event stream of a link open in the
// background, if the remote has anything to say there.
func (c *connection) listenLocked(l *link) {
	switch {
	case l.silent:
	case l.modern && c.listens == nil && !l.offers.changes():
	case !l.modern && !l.offers.changes() && !l.offers.Logging && none(l.profile):
	case l.listening:
		l.relisten = true // it may be about to give up, for want of a sign-in
	default:
		l.relisten = false
		l.listening = c.session.spawn(func() { c.listen(l) })
	}
}

// listen opens the stream again and again until the link ends, or the remote
// says that there is none. "The client MAY issue an HTTP GET to the MCP
// endpoint. This can be used to open an SSE stream, allowing the server to
// communicate to the client, without the client first sending data via HTTP
// POST." Whatever becomes of the stream, the link is as good as before.
func (c *connection) listen(l *link) {
	silent := false
	defer func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		l.listening, l.silent = false, l.silent || silent
		if l.relisten && l.ctx.Err() == nil {
			c.listenLocked(l)
		}
	}()
	if l.modern {
		silent = c.keepListening(l)
		return
	}
	if !l.side {
		c.resubscribe(l)
	}
	if _, overHTTP := l.via.(*wire); !overHTTP {
		l.streamKnown()
		return // what it has to say comes by itself
	}
	pause := backoff.NewExponentialBackOff()
	pause.InitialInterval, pause.MaxInterval = firstReopen, lastReopen
	for before := false; ; {
		began := time.Now()
		opened, err := c.stream(l, before)
		if l.ctx.Err() != nil {
			return
		}
		before = before || opened
		failure, _ := errors.AsType[*Failure](err)
		refused, _ := errors.AsType[*auth.Error](err)
		switch {
		case errors.Is(err, errGone) && before:
			// It knew the session, and does not any more: whoever waits for changes
			// needs another one, and nobody may call for long.
			c.drop(l, nil)
			if !l.side {
				c.remote.recovery.soon(c)
			}
			return
		case errors.Is(err, errNoStream), errors.Is(err, errGone), failure != nil && isFinal(failure.Status):
			silent = true
			return
		case errors.Is(err, auth.ErrSignInNeeded), refused != nil && refused.Kind != auth.KindUnavailable:
			return // the next list that is read after a sign-in begins it again
		}
		if opened && time.Since(began) > steady {
			pause.Reset()
		}
		if !l.rest(pause, err) {
			return
		}
	}
}

// rest waits before an event stream is opened again; false if the link has ended.
func (l *link) rest(pause *backoff.ExponentialBackOff, why error) bool {
	var asked time.Duration // by the remote
	if failure, ok := errors.AsType[*Failure](why); ok {
		asked = min(failure.Retry, maxRetryAfter)
	}
	c := l.connection
	c.session.log.Debug("event stream ended", "remote", c.remote.Name, "error", why)
	timer := time.NewTimer(max(pause.NextBackOff(), asked))
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-l.ctx.Done():
		return false
	}
}

// isFinal reports whether a status says that there is no stream, now or later.
func isFinal(status int) bool {
	return status/100 == 4 && status != http.StatusTooManyRequests && status != http.StatusRequestTimeout
}

// stream opens the stream once and reads it to its end. There is no deadline:
// it may say nothing for days. The headers too may come with the first event.
func (c *connection) stream(l *link, again bool) (opened bool, err error) {
	header := maps.Clone(l.header)
	// "The client MUST include an Accept header, listing text/event-stream as a
	// supported content type."
	header["Accept"] = []string{typeStream}
	delete(header, "Content-Type")
	var resp *http.Response
	err = c.wire.authorized(l.ctx, false, func() (err error) {
		resp, err = c.wire.get(l.ctx, header)
		return err
	})
	l.streamKnown()
	if err != nil {
		return false, err
	}
	defer resp.Body.Close()
	if mediaType(resp.Header) != typeStream {
		return false, errNoStream
	}
	if again && !l.side {
		c.changed() // what was said in between is lost
	}
	in := l.incoming(nil)
	events := newEventReader(resp.Body, maxMessage)
	defer events.release()
	for {
		event, data, err := events.next()
		if err != nil {
			return true, fmt.Errorf("%w: %w", errCut, cause(err))
		}
		if len(data) == 0 || event != "" && event != "message" {
			continue
		}
		m, err := parseMessage(data)
		switch {
		case err != nil:
			return true, fmt.Errorf("%w with %w", errCut, err)
		case m.isResponse(): // "The server MUST NOT send a JSON-RPC response on the stream"
		case m.isNotification():
			in.notify(m.method, m.params)
		default:
			in.request(m.id, m.method, m.params)
		}
	}
}

// get makes a GET and returns an answer with a status of 2xx.
func (w *wire) get(ctx context.Context, header http.Header) (*http.Response, error) {
	resp, err := w.send(ctx, http.MethodGet, header, nil)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode/100 == 2 {
		return resp, nil
	}
	defer resp.Body.Close()
	return nil, w.refused(ctx, resp, 0, header)
}

// OnUpdated has f called when a remote says that a resource has been updated
// that [Session.Subscribe] was called for, or a part of one: params are the
// remote's, and what has been updated is their uri.
func (s *Session) OnUpdated(f func(remote, subscribed string, params json.RawMessage)) {
	s.updatedFunc.Store(&f)
}

// updated tells that a resource has been updated, if somebody wants to know.
func (c *connection) updated(params json.RawMessage) {
	f := c.session.updatedFunc.Load()
	got, err := rawjson.Get(params, "uri", "_meta")
	if err != nil || f == nil {
		return
	}
	uri, _ := rawjson.String(got[0])
	var wanted []string
	c.mu.Lock()
	for subscribed := range c.subscribed {
		if isPart(uri, subscribed) {
			wanted = append(wanted, subscribed)
		}
	}
	c.mu.Unlock()
	if wanted == nil {
		return
	}
	if params, err = withoutSubscription(params, got[1]); err != nil {
		return
	}
	slices.Sort(wanted)
	for _, subscribed := range wanted {
		(*f)(c.remote.Name, subscribed, params)
	}
}

// isPart reports whether an update of one resource is about another that is
// subscribed to: "This might be a sub-resource of the one that the client
// actually subscribed to."
func isPart(uri, subscribed string) bool {
	return uri == subscribed || strings.HasPrefix(uri, strings.TrimSuffix(subscribed, "/")+"/")
}

// withoutSubscription removes from a notification's params which of our streams
// at the remote it came on.
func withoutSubscription(params, meta json.RawMessage) (json.RawMessage, error) {
	if meta == nil || meta[0] != '{' {
		return params, nil
	}
	rest, err := rawjson.Delete(meta, func(key string) bool { return key == metaSubscription })
	if err != nil || len(rest) == len(meta) {
		return params, err
	}
	if string(rest) == "{}" {
		return rawjson.Delete(params, func(key string) bool { return key == "_meta" })
	}
	return rawjson.Set(params, "_meta", rest)
}

// Subscribe asks a remote to say when a resource is updated; on every later
// link too, until [Session.Unsubscribe]. The error is as that of [Session.Call].
func (s *Session) Subscribe(ctx context.Context, remote, uri string) error {
	c := s.byName[remote]
	if c == nil {
		return ErrUnknownRemote
	}
	c.mu.Lock()
	_, had := c.subscribed[uri]
	c.mu.Unlock()
	if l, err := c.dialed(ctx, false); err != nil {
		return err
	} else if l.modern {
		c.wantUpdates(ctx, l, uri, true)
		return nil
	}
	params, err := uriParams(uri)
	if err != nil {
		return err
	}
	// Noted before, so that no update gets lost that follows at once.
	c.mu.Lock()
	c.subscribed[uri] = nil
	c.mu.Unlock()
	_, err = s.Call(ctx, remote, "resources/subscribe", params, nil)
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, still := c.subscribed[uri]; err != nil && !had {
		delete(c.subscribed, uri)
	} else if err == nil && still {
		c.subscribed[uri] = c.link
	}
	return err
}

// Unsubscribe ends what Subscribe began.
func (s *Session) Unsubscribe(ctx context.Context, remote, uri string) error {
	c := s.byName[remote]
	if c == nil {
		return ErrUnknownRemote
	}
	if l := c.modernLink(); l != nil {
		c.wantUpdates(ctx, l, uri, false)
		return nil
	}
	c.mu.Lock()
	delete(c.subscribed, uri)
	c.mu.Unlock()
	params, err := uriParams(uri)
	if err != nil {
		return err
	}
	_, err = s.Call(ctx, remote, "resources/unsubscribe", params, nil)
	return err
}

func uriParams(uri string) (json.RawMessage, error) {
	params, err := json.Marshal(map[string]string{"uri": uri})
	if err != nil {
		return nil, fmt.Errorf("encoding a URI: %w", err)
	}
	return params, nil
}

// resubscribe repeats on a new link what was subscribed to on another.
func (c *connection) resubscribe(l *link) {
	var missing []string
	c.mu.Lock()
	for uri, on := range c.subscribed {
		if on != l {
			missing = append(missing, uri)
		}
	}
	c.mu.Unlock()
	for _, uri := range missing {
		params, err := uriParams(uri)
		if err == nil {
			err = c.wire.authorized(l.ctx, false, func() error {
				ctx, cancel := within(l.ctx, pageTimeout)
				defer cancel()
				_, _, err := l.request(ctx, c.ids.Add(1), "resources/subscribe", params, nil)
				return err
			})
		}
		if err != nil {
			c.session.log.Warn("resource not subscribed to again", "remote", c.remote.Name, "error", err)
			continue
		}
		c.mu.Lock()
		if _, still := c.subscribed[uri]; still {
			c.subscribed[uri] = l
		}
		c.mu.Unlock()
	}
}
