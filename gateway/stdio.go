package gateway

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"sync"
	"syscall"
	"time"

	"github.com/modelcontextprotocol/go-sdk/jsonrpc"
	"github.com/modelcontextprotocol/go-sdk/mcp"

	"gatehouse/auth"
	"gatehouse/session/rawjson"
)

// ServeStdio speaks MCP over in and out, one JSON message per line, for the
// default session, until in ends or ctx is done. Either way calls in flight
// have drain to be answered.
func (g *Gateway) ServeStdio(ctx context.Context, in io.ReadCloser, out io.WriteCloser, drain time.Duration) error {
	writer := &oneByOne{WriteCloser: out}
	reader := newLines(in, writer, g.cfg.Gateway.Limits.BodyBytes)
	transport := &stdioTransport{Transport: &mcp.IOTransport{Reader: reader, Writer: writer, MaxLineLength: -1}, g: g, drain: drain}
	capabilities, err := transport.listen(ctx)
	var v *view
	if err == nil {
		// Not before the client has said what it can be asked: remotes hear it first.
		if v, err = g.viewFor(auth.Local, capabilities); err != nil {
			return fmt.Errorf("opening the default session: %w", err)
		}
	}
	if err != nil {
		return endOfStdio(ctx, err)
	}
	running, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	cancelled := context.AfterFunc(ctx, func() {
		bounded, cancel := context.WithTimeout(running, drain)
		defer cancel()
		g.Drain(bounded)
		stop()
	})
	err = v.server.Run(running, transport)
	if !cancelled() {
		<-running.Done() // the drain has the rest
	}
	return endOfStdio(ctx, err)
}

// endOfStdio says what the end of the input means.
func endOfStdio(ctx context.Context, err error) error {
	// Closed is what the input is once an answer could not be written.
	if errors.Is(err, io.EOF) || errors.Is(err, syscall.EPIPE) || errors.Is(err, fs.ErrClosed) || ctx.Err() != nil {
		return nil // the client left, or we were told to
	}
	return err
}

// stdioTransport keeps each request's params as received, and the connection
// open until what was asked on it is answered.
type stdioTransport struct {
	mcp.Transport
	g          *Gateway
	drain      time.Duration
	connection *stdioConnection // since listen
}

// listen waits for the client's first message and returns the capabilities
// that it declares there.
func (t *stdioTransport) listen(ctx context.Context) (json.RawMessage, error) {
	c, err := t.Transport.Connect(ctx)
	if err != nil {
		return nil, err
	}
	t.connection = &stdioConnection{Connection: c, g: t.g, drain: t.drain, calls: map[jsonrpc.ID]func(){}}
	first, err := c.Read(ctx)
	if err != nil {
		return nil, errors.Join(err, c.Close())
	}
	t.connection.first = first
	req, ok := first.(*jsonrpc.Request)
	if !ok {
		return nil, nil
	}
	if req.Method != "initialize" {
		return declared(req.Params), nil
	}
	got, err := rawjson.Get(req.Params, "capabilities")
	if err != nil {
		return nil, nil // the SDK will say what is wrong with it
	}
	return got[0], nil
}

func (t *stdioTransport) Connect(context.Context) (mcp.Connection, error) { return t.connection, nil }

type stdioConnection struct {
	mcp.Connection
	first jsonrpc.Message // read already; nil: none
	g     *Gateway
	drain time.Duration
	owed  inFlight // answers of this connection

	mu    sync.Mutex // guards calls
	calls map[jsonrpc.ID]func()
}

func (c *stdioConnection) Read(ctx context.Context) (jsonrpc.Message, error) {
	msg, err := c.next(ctx)
	for err == nil {
		req, ok := msg.(*jsonrpc.Request)
		if !ok || !req.IsCall() {
			break
		}
		refusal := refuseRequest(req.Method, req.Params)
		if refusal == nil {
			break
		}
		if err = c.Connection.Write(ctx, &jsonrpc.Response{ID: req.ID, Error: refusal}); err == nil {
			msg, err = c.next(ctx)
		}
	}
	if err != nil {
		// The SDK ends with the input. Who has asked and closed it still wants the
		// answers.
		bounded, cancel := context.WithTimeout(ctx, c.drain)
		defer cancel()
		c.owed.wait(bounded)
		return msg, err
	}
	if resp, ok := msg.(*jsonrpc.Response); ok {
		return msg, withRawResult(resp)
	}
	if req, ok := msg.(*jsonrpc.Request); ok {
		noteRaw(req)
		if req.IsCall() && req.Method != "subscriptions/listen" { // which lasts as long as the connection
			here, everywhere := c.owed.begin(), c.g.calls.begin()
			c.mu.Lock()
			defer c.mu.Unlock()
			if earlier := c.calls[req.ID]; earlier != nil {
				earlier() // an id used twice has one answer owed
			}
			c.calls[req.ID] = func() { here(); everywhere() }
		}
	}
	return msg, nil
}

// next is the next message, what was read before the connection was one first.
func (c *stdioConnection) next(ctx context.Context) (jsonrpc.Message, error) {
	if msg := c.first; msg != nil {
		c.first = nil
		return msg, nil
	}
	return c.Connection.Read(ctx)
}

func (c *stdioConnection) Write(ctx context.Context, msg jsonrpc.Message) error {
	err := c.Connection.Write(ctx, msg)
	if resp, ok := msg.(*jsonrpc.Response); ok {
		c.mu.Lock()
		defer c.mu.Unlock()
		if end := c.calls[resp.ID]; end != nil {
			delete(c.calls, resp.ID)
			end()
		}
	}
	return err
}

// Close gives up what is still owed.
func (c *stdioConnection) Close() error {
	c.mu.Lock()
	for id, end := range c.calls {
		delete(c.calls, id)
		end()
	}
	c.mu.Unlock()
	return c.Connection.Close()
}
