package authtest

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
)

// An Intercept stands in front of an endpoint: it answers instead of it, or
// calls next and changes or delays what that answers.
type Intercept func(w http.ResponseWriter, r *http.Request, next http.HandlerFunc)

// serve runs next behind the intercept, if there is one.
func (i Intercept) serve(w http.ResponseWriter, r *http.Request, next http.HandlerFunc) {
	if i == nil {
		next(w, r)
		return
	}
	i(w, r, next)
}

// Answer answers with exactly this.
func Answer(status int, contentType, body string) Intercept {
	return func(w http.ResponseWriter, r *http.Request, _ http.HandlerFunc) {
		w.Header().Set("Content-Type", contentType)
		w.WriteHeader(status)
		io.WriteString(w, body)
	}
}

// Status answers with a status, headers given as "Name: value", and no body.
func Status(status int, headers ...string) Intercept {
	return func(w http.ResponseWriter, r *http.Request, _ http.HandlerFunc) {
		for _, header := range headers {
			name, value, _ := strings.Cut(header, ":")
			w.Header().Add(name, strings.TrimSpace(value))
		}
		w.WriteHeader(status)
	}
}

// Redirect answers with a redirect, its location as it stands.
func Redirect(status int, location string) Intercept {
	return Status(status, "Location: "+location)
}

// Hold lets requests through once gate is closed (or sends). A request whose
// client leaves first is not answered. A nil gate holds forever.
func Hold(gate <-chan struct{}) Intercept {
	return func(w http.ResponseWriter, r *http.Request, next http.HandlerFunc) {
		select {
		case <-gate:
			next(w, r)
		case <-r.Context().Done():
		}
	}
}

// Hang never answers.
func Hang() Intercept { return Hold(nil) }

// First misbehaves for the first n requests.
func First(n int, i Intercept) Intercept {
	var seen atomic.Int64
	return func(w http.ResponseWriter, r *http.Request, next http.HandlerFunc) {
		if seen.Add(1) > int64(n) {
			next(w, r)
			return
		}
		i(w, r, next)
	}
}

// Chain puts intercepts in front of each other, the first outermost.
func Chain(all ...Intercept) Intercept {
	return func(w http.ResponseWriter, r *http.Request, next http.HandlerFunc) {
		for _, i := range slices.Backward(all) {
			inner := next
			next = func(w http.ResponseWriter, r *http.Request) { i.serve(w, r, inner) }
		}
		next(w, r)
	}
}

// OnGrant misbehaves for token requests of this grant_type only.
func OnGrant(grantType string, i Intercept) Intercept {
	return func(w http.ResponseWriter, r *http.Request, next http.HandlerFunc) {
		if r.ParseForm(); r.PostForm.Get("grant_type") != grantType {
			next(w, r)
			return
		}
		i(w, r, next)
	}
}

// rpcKey is the context key of the JSON-RPC methods in a request's body.
type rpcKey struct{}

// OnRPC misbehaves for requests at a [Remote] with this JSON-RPC method only;
// the methods "GET" and "DELETE" are those of HTTP.
func OnRPC(method string, i Intercept) Intercept {
	return func(w http.ResponseWriter, r *http.Request, next http.HandlerFunc) {
		if got, _ := r.Context().Value(rpcKey{}).(rpcCall); got.Method != method {
			next(w, r)
			return
		}
		i(w, r, next)
	}
}

// Edit changes the body of the answer.
func Edit(edit func([]byte) []byte) Intercept {
	return func(w http.ResponseWriter, r *http.Request, next http.HandlerFunc) {
		status, body := record(w, r, next)
		w.WriteHeader(status)
		w.Write(edit(body))
	}
}

// EditJSON changes the members of a JSON answer.
func EditJSON(edit func(doc map[string]any)) Intercept {
	return Edit(func(body []byte) []byte {
		var doc map[string]any
		if err := json.Unmarshal(body, &doc); err != nil {
			return body // an error page: there is nothing to edit
		}
		edit(doc)
		body, err := json.Marshal(doc)
		if err != nil {
			panic(err) // the test put something into doc that is no JSON
		}
		return body
	})
}

// ContentType changes the media type of the answer.
func ContentType(value string) Intercept {
	return func(w http.ResponseWriter, r *http.Request, next http.HandlerFunc) {
		status, body := record(w, r, next)
		w.Header().Set("Content-Type", value)
		w.WriteHeader(status)
		w.Write(body)
	}
}

// Pad, for [Edit], adds a member of n bytes to a JSON object.
func Pad(n int) func([]byte) []byte {
	return func(body []byte) []byte { return member(body, `"padding":"`+strings.Repeat("x", n)+`"`) }
}

// Nest, for [Edit], adds a member that is n arrays deep to a JSON object.
func Nest(n int) func([]byte) []byte {
	return func(body []byte) []byte {
		return member(body, `"nested":`+strings.Repeat("[", n)+strings.Repeat("]", n))
	}
}

// Duplicate, for [Edit], puts a member in front of a JSON object's members,
// whether it has one of that name or not.
func Duplicate(name, value string) func([]byte) []byte {
	return func(body []byte) []byte { return member(body, fmt.Sprintf("%q:%q", name, value)) }
}

// Trail, for [Edit], adds something after the end.
func Trail(s string) func([]byte) []byte {
	return func(body []byte) []byte { return append(body, s...) }
}

// member puts a member in front of the others of a JSON object.
func member(body []byte, m string) []byte {
	if rest, ok := bytes.CutPrefix(bytes.TrimSpace(body), []byte("{")); ok {
		if !bytes.HasPrefix(bytes.TrimSpace(rest), []byte("}")) {
			m += ","
		}
		return append([]byte("{"+m), rest...)
	}
	return body
}

// Endless answers with JSON whose only member goes on for n bytes.
func Endless(n int64) Intercept {
	return func(w http.ResponseWriter, r *http.Request, _ http.HandlerFunc) {
		w.Header().Set("Content-Type", "application/json")
		flood(w, n)
	}
}

// GzipBomb answers with JSON whose only member goes on for n bytes, which
// gzip makes a thousandth of.
func GzipBomb(n int64) Intercept {
	return func(w http.ResponseWriter, r *http.Request, _ http.HandlerFunc) {
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("Content-Encoding", "gzip")
		zipped := gzip.NewWriter(w)
		flood(zipped, n)
		zipped.Close()
	}
}

// flood writes a JSON object of about n bytes until its reader has enough.
func flood(w io.Writer, n int64) {
	chunk := bytes.Repeat([]byte("x"), 64<<10)
	if _, err := io.WriteString(w, `{"padding":"`); err != nil {
		return
	}
	for ; n > 0; n -= int64(len(chunk)) {
		if _, err := w.Write(chunk[:min(n, int64(len(chunk)))]); err != nil {
			return
		}
	}
	io.WriteString(w, `"}`)
}

// Drip answers one byte for each value from tick, and stops in the middle if
// the client leaves.
func Drip[T any](status int, contentType, body string, tick <-chan T) Intercept {
	return func(w http.ResponseWriter, r *http.Request, _ http.HandlerFunc) {
		w.Header().Set("Content-Type", contentType)
		w.Header().Set("Content-Length", strconv.Itoa(len(body)))
		w.WriteHeader(status)
		flusher := http.NewResponseController(w)
		flusher.Flush()
		for i := range len(body) {
			select {
			case <-tick:
			case <-r.Context().Done():
				return
			}
			io.WriteString(w, body[i:i+1])
			flusher.Flush()
		}
	}
}

// Cut lets n bytes of the answer's body out and then cuts the connection. The
// whole answer is made first, so it is not for a stream without an end.
func Cut(n int) Intercept {
	return func(w http.ResponseWriter, r *http.Request, next http.HandlerFunc) {
		status, body := record(w, r, next)
		w.WriteHeader(status)
		w.Write(body[:min(n, len(body))])
		http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	}
}

// record runs next, puts its headers into w, and returns the rest.
func record(w http.ResponseWriter, r *http.Request, next http.HandlerFunc) (status int, body []byte) {
	recorder := httptest.NewRecorder()
	next(recorder, r)
	maps.Copy(w.Header(), recorder.Header())
	w.Header().Del("Content-Length")
	return recorder.Code, recorder.Body.Bytes()
}

// withRPC notes in the request what it calls.
func withRPC(r *http.Request, call rpcCall) *http.Request {
	return r.WithContext(context.WithValue(r.Context(), rpcKey{}, call))
}
