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
	ctx := auth.NoRefresh(l.ctx) // it comes back when a call has refreshed
	err = c.wire.authorized(ctx, false, func() (err error) {
		resp, err = c.wire.get(ctx, header)
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

// subscription is a resource whose updates are wanted.
type subscription struct {
	on      *link                    // where the remote has been asked for them; nil: not yet
	refused *link                    // where it was asked in vain
	by      map[*connection]struct{} // who wants them: the connection itself, or those who share it
}

// update is that of one resource, for who has subscribed to it or to what it is a
// part of.
type update struct {
	remote, subscribed, uri string
	params                  json.RawMessage
}

// What is told is kept for a while for those who are slow to take it.
const (
	maxUpdates = 1000       // of what is common to all, for one of them
	maxUpdate  = 2 * maxURI // bytes, beyond which only the URI is told
)

// updated tells that a resource has been updated, if somebody wants to know.
func (c *connection) updated(params json.RawMessage) {
	got, err := rawjson.Get(params, "uri", "_meta")
	if err != nil {
		return
	}
	uri, _ := rawjson.String(got[0])
	if params, err = withoutSubscription(params, got[1]); err == nil && len(params) > maxUpdate {
		params, err = uriParams(uri)
	}
	if err != nil || len(params) > maxUpdate {
		return
	}
	main := c.main()
	main.mu.Lock()
	wanted := map[string][]*connection{}
	for subscribed, w := range main.subscribed {
		if !isPart(uri, subscribed) {
			continue
		}
		for u := range w.by {
			// What a principal's own link hears is for that principal.
			if c == main || u == c {
				wanted[subscribed] = append(wanted[subscribed], u)
			}
		}
	}
	main.mu.Unlock()
	for _, subscribed := range slices.Sorted(maps.Keys(wanted)) {
		for _, u := range wanted[subscribed] {
			if c.shared {
				u.session.hear(update{c.remote.Name, subscribed, uri, params})
			} else if f := u.session.updatedFunc.Load(); f != nil {
				(*f)(c.remote.Name, subscribed, params)
			}
		}
	}
}

// hear has an update told in the background: whoever is slow to take it must not
// hold up the others on the stream. Those of one resource may come as one.
func (s *Session) hear(u update) {
	s.updateMu.Lock()
	defer s.updateMu.Unlock()
	same := func(other update) bool {
		return other.remote == u.remote && other.subscribed == u.subscribed && other.uri == u.uri
	}
	if i := slices.IndexFunc(s.updates, same); i >= 0 {
		s.updates[i] = u
	} else if len(s.updates) < maxUpdates {
		s.updates = append(s.updates, u)
	}
	if !s.updating {
		s.updating = s.spawn(s.tellUpdates)
	}
}

func (s *Session) tellUpdates() {
	for {
		s.updateMu.Lock()
		if len(s.updates) == 0 {
			s.updates, s.updating = nil, false
			s.updateMu.Unlock()
			return
		}
		u := s.updates[0]
		s.updates[0] = update{}
		s.updates = s.updates[1:]
		s.updateMu.Unlock()
		if f := s.updatedFunc.Load(); f != nil {
			(*f)(u.remote, u.subscribed, u.params)
		}
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
	for {
		err := c.joined().subscribeFor(ctx, c, uri)
		if !errors.Is(err, errApart) {
			return err
		}
	}
}

// subscribeFor has u hear of a resource's updates.
func (c *connection) subscribeFor(ctx context.Context, u *connection, uri string) error {
	l, err := c.dialed(ctx, false)
	if err != nil {
		return err
	}
	if l.modern {
		return c.wantUpdates(ctx, l, u, uri)
	}
	params, err := uriParams(uri)
	if err != nil {
		return err
	}
	// Noted before, so that no update gets lost that follows at once.
	c.mu.Lock()
	if u.main() != c {
		c.mu.Unlock()
		return errApart
	}
	had := c.wantLocked(u, uri)
	c.mu.Unlock()
	_, err = u.session.Call(ctx, c.remote.Name, "resources/subscribe", params, nil)
	c.mu.Lock()
	defer c.mu.Unlock()
	if err != nil && !had {
		c.unwantLocked(u, uri)
	} else if w := c.subscribed[uri]; err == nil && w != nil {
		w.on = c.link
	}
	return err
}

// wantLocked notes that u wants a resource's updates, and reports whether it did
// already.
func (c *connection) wantLocked(u *connection, uri string) (had bool) {
	w := c.subscribed[uri]
	if w == nil {
		w = &subscription{by: map[*connection]struct{}{}}
		c.subscribed[uri] = w
	}
	_, had = w.by[u]
	w.by[u] = struct{}{}
	return had
}

// unwantLocked is the opposite. It reports whether u was the last who wanted them.
func (c *connection) unwantLocked(u *connection, uri string) (last bool) {
	w := c.subscribed[uri]
	if w == nil {
		return false
	}
	_, had := w.by[u]
	delete(w.by, u)
	if len(w.by) > 0 {
		return false
	}
	delete(c.subscribed, uri)
	return had
}

// Unsubscribe ends what Subscribe began.
func (s *Session) Unsubscribe(ctx context.Context, remote, uri string) error {
	c := s.byName[remote]
	if c == nil {
		return ErrUnknownRemote
	}
	for {
		err := c.main().unsubscribeFor(ctx, c, uri)
		if !errors.Is(err, errApart) {
			return err
		}
	}
}

func (c *connection) unsubscribeFor(ctx context.Context, u *connection, uri string) error {
	c.mu.Lock()
	if u.main() != c {
		c.mu.Unlock()
		return errApart
	}
	last, l := c.unwantLocked(u, uri), c.link
	if last && l != nil && l.modern {
		c.relistenLocked(l)
	}
	c.mu.Unlock()
	if l == nil || l.modern {
		return nil // the next link does not begin it again
	}
	params, err := uriParams(uri)
	if err != nil {
		return err
	}
	_, err = u.session.Call(ctx, c.remote.Name, "resources/unsubscribe", params, nil)
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
	for uri, w := range c.subscribed {
		if w.on != l {
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
		if w := c.subscribed[uri]; w != nil {
			w.on = l
		}
		c.mu.Unlock()
	}
}
