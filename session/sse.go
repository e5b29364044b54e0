package session

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"strconv"
	"sync"
	"time"
)

// errTooLarge: a message of a remote exceeds what is read of one.
var errTooLarge = errors.New("message too large")

const readBuffer = 16 << 10

var readers = sync.Pool{New: func() any { return bufio.NewReaderSize(nil, readBuffer) }}

// maxEventID bounds what is kept of an event's id.
const maxEventID = 1 << 10

// eventReader reads an event stream, as the HTML standard (section 9.2.6,
// "Interpreting an event stream") defines it.
type eventReader struct {
	lastID string        // where the stream could be resumed; "" nowhere
	retry  time.Duration // to wait before that, as the server says; 0: it did not

	r      *bufio.Reader
	limit  int    // of one event's data, and of one line
	begun  bool   // the byte order mark is behind us
	skipLF bool   // the last line ended with CR: an LF belongs to it
	held   []byte // a line that did not fit into the buffer
}

func newEventReader(r io.Reader, limit int) *eventReader {
	buffered := readers.Get().(*bufio.Reader)
	buffered.Reset(r)
	return &eventReader{r: buffered, limit: limit}
}

// release gives the buffer back. The reader is of no use after it.
func (e *eventReader) release() {
	e.r.Reset(nil)
	readers.Put(e.r)
	e.r = nil
}

// next returns the type and the data of the next event; the data are the
// caller's. "Once the end of the file is reached, any pending data must be
// discarded": an event without its blank line is none, and io.EOF follows.
func (e *eventReader) next() (event string, data []byte, err error) {
	seen := false // a data field, be it an empty one
	for {
		line, owned, err := e.line()
		if err != nil {
			return "", nil, err
		}
		if len(line) == 0 {
			if seen {
				return event, data, nil
			}
			event = ""
			continue
		}
		name, value, _ := bytes.Cut(line, []byte{':'})
		if len(value) > 0 && value[0] == ' ' {
			value = value[1:]
		}
		switch string(name) {
		case "id":
			// "If the field value does not contain U+0000 NULL, then set the last event
			// ID buffer to the field value."
			if len(value) <= maxEventID && !bytes.ContainsRune(value, 0) {
				e.lastID = string(value)
			}
		case "retry":
			if ms, err := strconv.ParseUint(string(value), 10, 31); err == nil {
				e.retry = time.Duration(ms) * time.Millisecond
			}
		case "event":
			event = string(value)
		case "data":
			if len(data)+len(value)+1 > e.limit {
				return "", nil, errTooLarge
			}
			switch {
			case !seen && owned:
				data = value
			case !seen:
				data = bytes.Clone(value)
			default:
				data = append(append(data, '\n'), value...)
			}
			seen = true
		}
	}
}

// line returns the next line without its end. It is good until the next call,
// unless it is owned by the caller.
func (e *eventReader) line() (line []byte, owned bool, err error) {
	e.held = nil
	for {
		if _, err := e.r.Peek(1); err != nil {
			return nil, false, err
		}
		chunk, err := e.r.Peek(e.r.Buffered())
		if err != nil {
			return nil, false, err
		}
		if e.skipLF {
			e.skipLF = false
			if chunk[0] == '\n' {
				e.discard(1)
				continue
			}
		}
		// "lines … separated by either a CRLF pair, a single LF, or a single CR".
		// A CR ends the line at once: waiting for its LF could be waiting for long.
		end := bytes.IndexByte(chunk, '\n')
		if end < 0 {
			end = len(chunk)
		}
		if cr := bytes.IndexByte(chunk[:end], '\r'); cr >= 0 {
			end = cr
		}
		if len(e.held)+end > e.limit {
			return nil, false, errTooLarge
		}
		if end == len(chunk) {
			e.held = append(e.held, chunk...)
			e.discard(end)
			continue
		}
		e.skipLF = chunk[end] == '\r'
		line, owned = chunk[:end], false
		if len(e.held) > 0 {
			line, owned = append(e.held, line...), true
			e.held = nil
		}
		e.discard(end + 1)
		if !e.begun {
			e.begun = true
			line = bytes.TrimPrefix(line, []byte("\uFEFF"))
		}
		return line, owned, nil
	}
}

// discard drops bytes that have been peeked at. They stay where they are until
// the next read.
func (e *eventReader) discard(n int) {
	if _, err := e.r.Discard(n); err != nil {
		panic(err) // n is never more than what is buffered
	}
}
