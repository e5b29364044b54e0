package gateway

import (
	"io"
	"net/http"
	"time"
)

// How long a peer may take for a step of its own. There are no deadlines for a
// whole request or answer: calls take long, and event streams stay open.
const (
	readHeaderTime = 10 * time.Second
	readBodyTime   = 30 * time.Second
	writeTime      = 30 * time.Second // of one write
)

// limitSlow gives a peer that does not read, or sends its body a byte at a
// time, up.
func limitSlow(next http.Handler, read, write time.Duration) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		slow := &slowWriter{ResponseWriter: w, control: http.NewResponseController(w), write: write}
		slow.clear() // what the last answer on this connection has left
		// Only a body is awaited: a deadline would also end the watch for a client
		// that goes away.
		if r.ContentLength != 0 {
			_ = slow.control.SetReadDeadline(time.Now().Add(read))
			r.Body = &slowBody{r.Body, slow.control}
		}
		defer slow.start() // the end of the answer is written after the handler
		next.ServeHTTP(slow, r)
	})
}

// slowWriter has a deadline for each write, and none in between.
type slowWriter struct {
	http.ResponseWriter
	control *http.ResponseController
	write   time.Duration
}

// Of a connection that knows no deadlines, as in tests, none is asked.
func (w *slowWriter) start() { _ = w.control.SetWriteDeadline(time.Now().Add(w.write)) }
func (w *slowWriter) clear() { _ = w.control.SetWriteDeadline(time.Time{}) }

func (w *slowWriter) Write(p []byte) (int, error) {
	w.start()
	defer w.clear()
	return w.ResponseWriter.Write(p)
}

// Flush is for those who ask for an http.Flusher.
func (w *slowWriter) Flush() { _ = w.FlushError() }

// FlushError is for an http.ResponseController.
func (w *slowWriter) FlushError() error {
	w.start()
	defer w.clear()
	return w.control.Flush()
}

// Unwrap leads an http.ResponseController to everything else.
func (w *slowWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// slowBody lifts the deadline when the body has been read.
type slowBody struct {
	io.ReadCloser
	control *http.ResponseController
}

func (b *slowBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if err != nil {
		_ = b.control.SetReadDeadline(time.Time{})
	}
	return n, err
}
