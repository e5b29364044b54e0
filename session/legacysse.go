package session

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"sync"
)

// legacySSE is the deprecated HTTP+SSE transport of protocol 2024-11-05: one
// event stream for all that the remote says, POSTs for what is said to it.
type legacySSE struct {
	wire   *wire
	header http.Header // of POSTs
	target *url.URL    // where they go
	cancel context.CancelFunc
	done   chan struct{} // closed when the stream is read to its end
	once   sync.Once
}

// openSSE opens the event stream and waits for the address of the POSTs.
// "When a client connects, the server MUST send an endpoint event containing a
// URI for the client to use for sending messages."
func (c *connection) openSSE(ctx context.Context, l *link, d *duplex) (*legacySSE, error) {
	running, cancel := context.WithCancel(context.WithoutCancel(ctx))
	// The wait for the stream ends with the attempt, the stream does not.
	stop := context.AfterFunc(ctx, cancel)
	header := l.header.Clone()
	header["Accept"] = []string{typeStream}
	delete(header, "Content-Type")
	resp, err := c.wire.get(running, header)
	if err != nil {
		cancel()
		if ended := c.remote.ended(ctx); ended != nil {
			return nil, ended
		}
		return nil, err
	}
	fail := func(err error) (*legacySSE, error) {
		cancel()
		resp.Body.Close()
		if ended := c.remote.ended(ctx); ended != nil {
			return nil, ended
		}
		return nil, err
	}
	if mediaType(resp.Header) != typeStream {
		return fail(c.remote.fail(KindBadAnswer, nil, "answered without an event stream: is %s an endpoint of the HTTP+SSE transport? Newer servers want \"type\": \"http\".", c.remote.display))
	}
	events := newEventReader(resp.Body, maxMessage)
	event, data, err := events.next()
	if err != nil {
		events.release()
		return fail(c.remote.broken(ctx, err))
	}
	target, err := c.remote.url.Parse(string(data))
	if event != "endpoint" || err != nil || target.Scheme != c.remote.url.Scheme || target.Host != c.remote.url.Host || target.User != nil {
		// The token must not go anywhere else.
		events.release()
		return fail(c.remote.badAnswer(errors.New("no endpoint event, or one for another server")))
	}
	if !stop() {
		events.release()
		return fail(ctx.Err())
	}
	s := &legacySSE{wire: &c.wire, header: l.header, target: target, cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(s.done)
		defer resp.Body.Close()
		defer events.release()
		for nonsense := 0; ; {
			event, data, err := events.next()
			if err == nil && nonsense > maxNonsense {
				err = errNonsense
			}
			if err != nil {
				if !errors.Is(err, errNonsense) {
					err = cause(err)
				}
				if l := d.stop(err); l != nil && running.Err() == nil {
					c.drop(l, c.remote.fail(KindUnreachable, err, "ended the event stream. It is opened again."))
				}
				return
			}
			if len(data) == 0 || event != "" && event != "message" {
				continue
			}
			if err := d.deliver(data); err != nil {
				nonsense++
				c.session.log.Debug("an event that is no message", "remote", c.remote.Name, "error", err)
			}
		}
	}()
	return s, nil
}

func (s *legacySSE) send(ctx context.Context, message []byte) error {
	resp, err := s.wire.sendTo(ctx, http.MethodPost, s.target, s.header, message)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode/100 != 2 {
		return s.wire.refused(ctx, resp, 0, s.header)
	}
	drain(resp.Body)
	return nil
}

func (s *legacySSE) close(context.Context) {
	s.once.Do(s.cancel)
	<-s.done
}

// open returns what carries a new link's messages. It may meet a 401.
func (c *connection) open(ctx context.Context, l *link) (transport, error) {
	if c.remote.Command == nil && !c.remote.SSE {
		return &c.wire, nil
	}
	d := newDuplex(c.remote, l)
	var err error
	if c.remote.Command != nil {
		d.pipe, err = c.startProcess(ctx, d)
	} else {
		d.pipe, err = c.openSSE(ctx, l, d)
	}
	if err != nil {
		return nil, err
	}
	return d, nil
}

// reopened is open for another try at the handshake: a program that has
// answered is asked again, not started again.
func (c *connection) reopened(ctx context.Context, l *link, before transport) (transport, error) {
	if d, ok := before.(*duplex); ok && d.over() == nil {
		d.serve(l)
		return d, nil
	}
	via, err := c.open(ctx, l)
	if err != nil {
		return nil, fmt.Errorf("connecting: %w", err)
	}
	return via, nil
}
