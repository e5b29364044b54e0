package session

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"mime"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"gatehouse/auth"
)

const (
	maxMessage  = 16 << 20 // of one message of a remote
	maxDrain    = 64 << 10 // of what is left of an answer when the rest of it does not matter
	drainWait   = 20 * time.Millisecond
	maxRequests = 64 // of a remote, on the stream of one call
)

const (
	headerSession  = "Mcp-Session-Id"
	headerProtocol = "Mcp-Protocol-Version"
)

// remote is one configured remote, the same for all sessions.
type remote struct {
	Remote
	url      *url.URL
	display  string // the URL as far as it may be shown
	header   http.Header
	client   *http.Client
	recovery *recovery
	slots    slots // of a command's processes
	commons  commons
	listings atomic.Uint64                                 // the last generation of any catalog
	eras     atomic.Int32                                  // what is known of them
	lists    [len(lists{}.of)]atomic.Pointer[[]Definition] // as anybody has last listed them
}

// reserved reports whether a header is not the config's to set: what the
// protocol and the HTTP client need for themselves, and what would make
// net/http repeat a POST.
func reserved(name string) bool {
	switch name {
	case "Host", "Connection", "Keep-Alive", "Te", "Trailer", "Transfer-Encoding", "Upgrade",
		"Last-Event-Id", "Idempotency-Key", "X-Idempotency-Key":
		return true
	}
	return strings.HasPrefix(name, "Mcp-") || strings.HasPrefix(name, "Content-") || strings.HasPrefix(name, "Accept")
}

// requestHeader returns the headers of a POST: the config's, and the protocol's.
func (r *remote) requestHeader() http.Header {
	h := make(http.Header, len(r.header)+6)
	maps.Copy(h, r.header)
	// "The client MUST include an Accept header, listing both application/json
	// and text/event-stream as supported content types."
	h["Accept"] = []string{"application/json, text/event-stream"}
	h["Content-Type"] = []string{"application/json"}
	return h
}

// wire speaks MCP over streamable HTTP with one remote for one principal: each
// message is a POST of its own, and a request's answer is that POST's body.
type wire struct {
	remote *remote
	auth   Authorizer // nil: no sign-in
}

// incoming takes what arrives on a request's stream beside its answer.
type incoming struct {
	notify  func(method string, params json.RawMessage) // may be nil
	request func(id json.RawMessage, method string, params json.RawMessage)
}

// errGone: 404 with a session id. "The server MAY terminate the session at any
// time, after which it MUST respond to requests containing that session ID
// with HTTP 404 Not Found." So the request has not been executed.
var errGone = errors.New("the remote has forgotten the MCP session")

// unauthorized is a 401 or 403: the request was not executed.
type unauthorized struct {
	remote *remote
	resp   *http.Response // its body is closed
}

func (u *unauthorized) Error() string {
	return fmt.Sprintf("%s answered with status %d", u.remote.Name, u.resp.StatusCode)
}

// authorized does what may meet a 401 or 403. Those concern the sign-in and
// that one request: if the authorizer has another token, it is done once more,
// otherwise the authorizer's error is the answer. Loud, it may start a sign-in;
// quiet, it ends with [auth.ErrSignInNeeded] instead.
func (w *wire) authorized(ctx context.Context, loud bool, do func() error) error {
	for try := 0; ; try++ {
		err := do()
		u, ok := errors.AsType[*unauthorized](err)
		if !ok {
			return err
		}
		if err := w.challenge(ctx, u.resp, loud); err != nil {
			return err
		}
		if try == 1 {
			return w.remote.statusFailure(u.resp.StatusCode, u.resp.Header)
		}
	}
}

// challenge asks the authorizer what a 401 or 403 means. Nil: there is another
// token.
func (w *wire) challenge(ctx context.Context, resp *http.Response, loud bool) error {
	if w.auth == nil {
		return w.remote.statusFailure(resp.StatusCode, resp.Header)
	}
	asking, cancel := context.WithTimeout(ctx, challengeTimeout)
	defer cancel()
	var err error
	switch {
	case loud:
		err = w.auth.Challenge(asking, resp)
	case resp.StatusCode == http.StatusForbidden:
		// The token is good, but not for this: no renewal mends that.
		err = auth.ErrSignInNeeded
	default:
		err = w.auth.Renew(asking, resp)
	}
	if err != nil {
		if ended := w.remote.ended(ctx); ended != nil {
			return ended
		}
		return fmt.Errorf("answering %d of %s: %w", resp.StatusCode, w.remote.Name, err)
	}
	return nil
}

// request sends one request and returns its result, byte for byte, and the
// headers that came with it. ctx covers all of it.
func (w *wire) request(ctx context.Context, header http.Header, id int64, method string, params json.RawMessage, in incoming) (json.RawMessage, http.Header, error) {
	body, err := appendRequest(make([]byte, 0, len(params)+len(method)+64), id, method, params)
	if err != nil {
		return nil, nil, err
	}
	resp, err := w.post(ctx, header, id, body)
	if err != nil {
		return nil, nil, err
	}
	defer resp.Body.Close()
	result, err := w.answer(ctx, resp, header, id, in)
	return result, resp.Header, err
}

// notify sends a notification, or the response to a remote's request: a
// message that has no answer.
func (w *wire) notify(ctx context.Context, header http.Header, body []byte) error {
	resp, err := w.post(ctx, header, 0, body)
	if err != nil {
		return err
	}
	drain(resp.Body)
	return resp.Body.Close()
}

// post sends one message and returns an answer with a status of 2xx.
func (w *wire) post(ctx context.Context, header http.Header, id int64, body []byte) (*http.Response, error) {
	resp, err := w.send(ctx, http.MethodPost, header, body)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode/100 == 2 {
		return resp, nil
	}
	defer resp.Body.Close()
	return nil, w.refused(ctx, resp, id, header)
}

// send makes one HTTP request with the token that is held now, if there is one.
func (w *wire) send(ctx context.Context, method string, header http.Header, body []byte) (*http.Response, error) {
	return w.sendTo(ctx, method, w.remote.url, header, body)
}

func (w *wire) sendTo(ctx context.Context, method string, target *url.URL, header http.Header, body []byte) (*http.Response, error) {
	h := make(http.Header, len(header)+1)
	maps.Copy(h, header)
	if w.auth != nil {
		token, err := w.auth.Token(ctx)
		if err != nil {
			if ended := w.remote.ended(ctx); ended != nil {
				return nil, ended
			}
			return nil, fmt.Errorf("getting a token for %s: %w", w.remote.Name, err)
		}
		if token != nil {
			// "MCP client MUST use the Authorization request header field".
			h["Authorization"] = []string{"Bearer " + token.AccessToken}
		}
	}
	req := &http.Request{
		Method: method, URL: target, Host: target.Host, Header: h,
		Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
	}
	if body != nil {
		req.ContentLength = int64(len(body))
		req.Body = io.NopCloser(bytes.NewReader(body))
		// net/http sends a POST again only if nothing of it had been written.
		req.GetBody = func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(body)), nil }
	}
	resp, err := w.remote.client.Do(req.WithContext(ctx))
	if err != nil {
		return nil, w.remote.broken(ctx, err)
	}
	return resp, nil
}

// end ends an MCP session. "Clients that no longer need a particular session …
// SHOULD send an HTTP DELETE to the MCP endpoint with the Mcp-Session-Id header".
func (w *wire) end(ctx context.Context, header http.Header) {
	if header[headerSession] == nil {
		return
	}
	// Whatever comes of it: a remote may refuse it, and forgets by itself.
	if resp, err := w.send(ctx, http.MethodDelete, header, nil); err == nil {
		drain(resp.Body)
		resp.Body.Close()
	}
}

// refused makes the error of an answer with a status that is none of 2xx.
func (w *wire) refused(ctx context.Context, resp *http.Response, id int64, header http.Header) error {
	switch {
	case resp.StatusCode == http.StatusUnauthorized, resp.StatusCode == http.StatusForbidden:
		drain(resp.Body)
		return &unauthorized{w.remote, resp}
	case resp.StatusCode == http.StatusNotFound && header[headerSession] != nil:
		drain(resp.Body)
		return errGone
	}
	failure := w.remote.statusFailure(resp.StatusCode, resp.Header)
	if resp.StatusCode != http.StatusBadRequest && resp.StatusCode != http.StatusNotFound || mediaType(resp.Header) != typeJSON {
		drain(resp.Body)
		return failure
	}
	// "If the server cannot accept the input, it MUST return an HTTP error status
	// code … The HTTP response body MAY comprise a JSON-RPC error response".
	data, err := readAll(resp.Body, maxDrain, resp.ContentLength)
	if err != nil {
		if ended := w.remote.ended(ctx); ended != nil {
			return ended
		}
		return failure
	}
	m, err := parseMessage(data)
	if err != nil || m.err == nil || id == 0 {
		return failure
	}
	// In the modern era the request may have been refused before its id was read.
	// In the legacy one that is how a session is refused that is not known.
	if unread := m.id == nil || string(m.id) == "null"; m.answers(id) || unread && header[headerMethod] != nil {
		return m.err
	}
	return failure
}

const (
	typeJSON   = "application/json"
	typeStream = "text/event-stream"
)

func mediaType(h http.Header) string {
	value := h.Get("Content-Type")
	if value == typeJSON || value == typeStream {
		return value
	}
	t, _, err := mime.ParseMediaType(value)
	if err != nil {
		return ""
	}
	return t
}

// answer reads the answer of a request out of a response with a status 2xx.
func (w *wire) answer(ctx context.Context, resp *http.Response, header http.Header, id int64, in incoming) (json.RawMessage, error) {
	r := w.remote
	if encoding := resp.Header.Get("Content-Encoding"); encoding != "" && encoding != "identity" {
		return nil, r.fail(KindBadAnswer, nil, "answered with a compressed body that was not asked for.")
	}
	// "If the input is a JSON-RPC request, the server MUST either return
	// Content-Type: text/event-stream … or Content-Type: application/json".
	switch t := mediaType(resp.Header); {
	case t == typeStream:
		var where place
		result, err := w.readStream(ctx, resp.Body, id, in, &where)
		if err == nil {
			// "After the JSON-RPC response has been sent, the server SHOULD terminate
			// the SSE stream."
			drain(resp.Body)
		}
		// Protocol 2026-07-28 knows no resumption.
		if where.cut && where.lastID != "" && header[headerMethod] == nil {
			return w.resume(ctx, header, id, in, where, err)
		}
		return result, err
	case t == typeJSON:
		data, err := readAll(resp.Body, maxMessage, resp.ContentLength)
		if err != nil {
			return nil, r.broken(ctx, err)
		}
		m, err := parseMessage(data)
		if err != nil {
			return nil, r.badAnswer(err)
		}
		if !m.isResponse() {
			return nil, r.badAnswer(errors.New("a message that is no response"))
		}
		return w.result(m, id)
	case resp.StatusCode == http.StatusAccepted || resp.StatusCode == http.StatusNoContent || resp.ContentLength == 0:
		return nil, r.fail(KindBadAnswer, nil, "answered a request with status %d and nothing else: is %s an MCP endpoint?", resp.StatusCode, r.display)
	case t == "":
		return nil, r.fail(KindBadAnswer, nil, "answered without a content type: is %s an MCP endpoint?", r.display)
	default:
		return nil, r.fail(KindBadAnswer, nil, "answered with %s instead of JSON: is %s an MCP endpoint?", shown(t), r.display)
	}
}

// shown makes a foreign token fit for a sentence.
func shown(token string) string {
	const most = 60
	token = strings.Map(func(c rune) rune {
		if c <= ' ' || c > '~' {
			return '?'
		}
		return c
	}, token)
	if len(token) > most {
		token = token[:most] + "…"
	}
	return token
}

// result takes the result out of the response to our request.
func (w *wire) result(m *message, id int64) (json.RawMessage, error) {
	// JSON-RPC: "If there was an error in detecting the id in the Request object
	// (e.g. Parse error/Invalid Request), it MUST be Null"; in MCP it is absent.
	// On a POST of one request that can only be about this one.
	if !m.answers(id) && (m.err == nil || m.id != nil && string(m.id) != "null") {
		return nil, w.remote.badAnswer(errors.New("a response to another request"))
	}
	if m.err != nil {
		return nil, m.err
	}
	return m.result, nil
}

func (r *remote) badAnswer(what error) *Failure {
	return r.fail(KindBadAnswer, nil, "answered with %v. That is a fault of the server: ask its operator.", what)
}

// place is how far a stream has been read.
type place struct {
	lastID string
	retry  time.Duration
	cut    bool // it ended before the response
	asked  int  // requests of the remote's own so far
}

const (
	maxResumes   = 5 // in a row that bring nothing new
	firstRetry   = time.Second
	leastRetry   = 100 * time.Millisecond
	longestRetry = 30 * time.Second
)

// resume goes on reading an answer whose stream has ended before the response.
// "If the client wishes to resume after a disconnection, it SHOULD issue an HTTP
// GET to the MCP endpoint, and include the Last-Event-ID header". If that does
// not work, cut is the error.
func (w *wire) resume(ctx context.Context, header http.Header, id int64, in incoming, where place, cut error) (json.RawMessage, error) {
	for tries := 0; tries < maxResumes; tries++ {
		// "The client MUST respect the retry field".
		pause := firstRetry
		if where.retry > 0 {
			pause = min(max(where.retry, leastRetry), longestRetry)
		}
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return nil, w.remote.ended(ctx)
		}
		h := maps.Clone(header)
		h["Accept"], h["Last-Event-Id"] = []string{typeStream}, []string{where.lastID}
		delete(h, "Content-Type")
		resp, err := w.get(ctx, h)
		if failure, ok := errors.AsType[*Failure](err); ok && (failure.Kind == KindUnreachable || failure.Kind == KindCut) {
			continue
		}
		if err != nil || mediaType(resp.Header) != typeStream {
			if err == nil {
				resp.Body.Close()
			}
			return nil, cut
		}
		before := where.lastID
		result, err := w.readStream(ctx, resp.Body, id, in, &where)
		resp.Body.Close()
		if !where.cut {
			return result, err
		}
		if where.lastID != before {
			tries = -1
		}
	}
	return nil, cut
}

// readStream reads an event stream up to the response. What comes before it is
// handed on in order; what comes after it is nobody's.
func (w *wire) readStream(ctx context.Context, body io.Reader, id int64, in incoming, where *place) (json.RawMessage, error) {
	events := newEventReader(body, maxMessage)
	events.lastID, events.retry = where.lastID, where.retry
	defer func() {
		where.lastID, where.retry = events.lastID, events.retry
		events.release()
	}()
	where.cut = false
	for {
		event, data, err := events.next()
		if err != nil {
			where.cut = ctx.Err() == nil && !errors.Is(err, errTooLarge)
			return nil, w.remote.broken(ctx, err)
		}
		// An event without data only tells where the stream could be resumed.
		if len(data) == 0 || event != "" && event != "message" {
			continue
		}
		m, err := parseMessage(data)
		switch {
		case err != nil:
			return nil, w.remote.badAnswer(err)
		case m.isResponse():
			return w.result(m, id)
		case m.isNotification():
			if in.notify != nil {
				in.notify(m.method, m.params)
			}
			continue
		}
		if where.asked++; where.asked > maxRequests {
			return nil, w.remote.fail(KindBadAnswer, nil, "sent more than %d requests of its own instead of an answer.", maxRequests)
		}
		in.request(m.id, m.method, m.params)
	}
}

// statusFailure says what an HTTP status means for whoever called.
func (r *remote) statusFailure(status int, h http.Header) *Failure {
	say := "that request is not accepted there. Its operator may know why."
	var retry time.Duration
	switch {
	case status == http.StatusUnauthorized && r.Authorizer == nil:
		say = `it wants a sign-in or other credentials than the config gives it. Check the remote's "headers", or its "auth".`
	case status == http.StatusUnauthorized:
		say = "it does not accept the token that its authorization server has just issued. Ask its operator."
	case status == http.StatusForbidden:
		say = "it forbids this. Ask its operator for access."
	case status == http.StatusNotFound, status == http.StatusMethodNotAllowed, status == http.StatusNotAcceptable:
		say = fmt.Sprintf("is %s an MCP endpoint of the streamable HTTP kind?", r.display)
	case status == http.StatusRequestEntityTooLarge:
		say = "the request is too large for it."
	case status == http.StatusTooManyRequests:
		say = "too many requests. Wait a moment, then try again."
		if seconds, err := strconv.ParseUint(h.Get("Retry-After"), 10, 32); err == nil {
			retry = time.Duration(seconds) * time.Second
			say = fmt.Sprintf("too many requests. Try again in %d s.", seconds)
		}
	case status >= 500:
		say = "it has a problem of its own. Try again later."
	case status/100 == 3:
		say = `that is a redirect, which is not followed. Put the address where the server is now into its "url".`
	}
	f := r.fail(KindStatus, nil, "answered with status %d: %s", status, say)
	f.Status, f.Retry = status, retry
	return f
}

// readAll reads a body to its end and fails with errTooLarge beyond the limit.
func readAll(body io.Reader, limit int, length int64) ([]byte, error) {
	if length > int64(limit) {
		return nil, errTooLarge
	}
	size := int64(4 << 10)
	if length >= 0 {
		// What is announced is believed only so far.
		size = min(length+1, 64<<10)
	}
	data := make([]byte, 0, size)
	for {
		if len(data) == cap(data) {
			data = append(data, 0)[:len(data)]
		}
		n, err := body.Read(data[len(data):cap(data)])
		data = data[:len(data)+n]
		if len(data) > limit {
			return nil, errTooLarge
		}
		if err == io.EOF {
			return data, nil
		} else if err != nil {
			return nil, err
		}
	}
}

// drain reads what little is left of a body, so that its TCP connection can be
// used again, but waits only a moment for it.
func drain(body io.ReadCloser) {
	timer := time.AfterFunc(drainWait, func() { body.Close() })
	defer timer.Stop()
	// An error only means that the connection is not used again.
	_, _ = io.CopyN(io.Discard, body, maxDrain)
}
