package session

import (
	"context"
	"encoding/json"
	"net/http"
	"sync"
)

// pipe carries whole JSON-RPC messages to a remote. What comes back is given to
// the duplex that uses it.
type pipe interface {
	// send sends one message. An error says that it was not sent, or not whole.
	send(ctx context.Context, message []byte) error
	// close lets go of the remote, as gently as ctx leaves time for, and waits.
	close(ctx context.Context)
}

// duplex is the transport over a pipe: one stream each way for everything, so
// answers are told apart by their ids. A local command and the deprecated
// HTTP+SSE are such.
type duplex struct {
	remote *remote
	pipe   pipe

	mu      sync.Mutex // guards all below
	link    *link      // whose messages these are
	waiting map[int64]*exchange
	ended   error // why nothing comes any more; nil while it does
}

// exchange is a request that waits for its answer.
type exchange struct {
	method string
	in     incoming
	answer chan outcome // holds one
}

type outcome struct {
	message *message
	err     error
}

func newDuplex(r *remote, l *link) *duplex {
	return &duplex{remote: r, link: l, waiting: map[int64]*exchange{}}
}

// serve has the duplex speak for another link from now on: the next attempt at
// a handshake.
func (d *duplex) serve(l *link) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.link = l
}

// over returns why the pipe has ended, nil if it has not.
func (d *duplex) over() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.ended
}

func (d *duplex) request(ctx context.Context, _ http.Header, id int64, method string, params json.RawMessage, in incoming) (json.RawMessage, http.Header, error) {
	body, err := appendRequest(make([]byte, 0, len(params)+len(method)+64), id, method, params)
	if err != nil {
		return nil, nil, err
	}
	x := &exchange{method: method, in: in, answer: make(chan outcome, 1)}
	d.mu.Lock()
	if err := d.ended; err != nil {
		d.mu.Unlock()
		return nil, nil, d.remote.unsent(err)
	}
	d.waiting[id] = x
	d.mu.Unlock()
	defer func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		delete(d.waiting, id)
	}()
	if err := d.pipe.send(ctx, body); err != nil {
		return nil, nil, d.notSent(ctx, err)
	}
	select {
	case a := <-x.answer:
		if a.err != nil {
			return nil, nil, a.err
		}
		if a.message.err != nil {
			return nil, nil, a.message.err
		}
		return a.message.result, nil, nil
	case <-ctx.Done():
		return nil, nil, d.remote.ended(ctx)
	}
}

func (d *duplex) notify(ctx context.Context, _ http.Header, body []byte) error {
	if err := d.over(); err != nil {
		return d.remote.unsent(err)
	}
	if err := d.pipe.send(ctx, body); err != nil {
		return d.notSent(ctx, err)
	}
	return nil
}

func (d *duplex) end(ctx context.Context, _ http.Header) { d.pipe.close(ctx) }

// notSent makes the error of a message that did not go out.
func (d *duplex) notSent(ctx context.Context, err error) error {
	if ended := d.remote.ended(ctx); ended != nil {
		return ended
	}
	if d.remote.Command == nil {
		return err // a wire's, and as such complete
	}
	return d.remote.unsent(err)
}

// unsent: the remote was gone before the request could reach it.
func (r *remote) unsent(err error) *Failure {
	if r.Command == nil {
		return r.fail(KindUnreachable, err, "has ended the event stream. It is opened again with the next call.")
	}
	return r.fail(KindUnreachable, err, "is not running any more. It is started again.")
}

// deliver takes one message of the remote, in order.
func (d *duplex) deliver(data []byte) error {
	m, err := parseMessage(data)
	if err != nil {
		return err
	}
	d.mu.Lock()
	l := d.link
	var listening []*exchange
	var x *exchange
	switch {
	case m.isResponse():
		for id, waiting := range d.waiting {
			if m.answers(id) {
				x = waiting
				delete(d.waiting, id)
			}
		}
	case m.isNotification():
		for _, waiting := range d.waiting {
			if waiting.method == "subscriptions/listen" {
				listening = append(listening, waiting)
			}
		}
	}
	d.mu.Unlock()
	switch {
	case x != nil:
		x.answer <- outcome{message: m}
	case m.isResponse(): // nobody waits for it any more
	case !m.isNotification():
		l.asked(nil, m.id, m.method, m.params)
	case m.method == "notifications/subscriptions/acknowledged":
		for _, waiting := range listening {
			waiting.in.notify(m.method, m.params)
		}
	default:
		l.heard(nil, m.method, m.params)
	}
	return nil
}

// stop fails whoever waits: nothing comes any more. It returns the link that
// has lost its remote.
func (d *duplex) stop(err error) *link {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.ended != nil {
		return nil
	}
	d.ended = err
	for _, x := range d.waiting {
		x.answer <- outcome{err: d.remote.cut(err)}
	}
	clear(d.waiting)
	return d.link
}

// cut: the remote has ended before it answered.
func (r *remote) cut(err error) *Failure {
	return r.fail(KindCut, err, "ended before it answered. The request may have been carried out all the same: check before you repeat it.")
}
