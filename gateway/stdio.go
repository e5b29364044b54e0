package gateway

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"syscall"
	"time"

	"github.com/modelcontextprotocol/go-sdk/jsonrpc"
	"github.com/modelcontextprotocol/go-sdk/mcp"

	"gatehouse/auth"
)

// ServeStdio speaks MCP over in and out, one JSON message per line, for the
// default session, until in ends or ctx is done. Either way calls in flight
// have drain to be answered.
func (g *Gateway) ServeStdio(ctx context.Context, in io.ReadCloser, out io.WriteCloser, drain time.Duration) error {
	v, err := g.view(auth.Local)
	if err != nil {
		return fmt.Errorf("opening the default session: %w", err)
	}
	running, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	cancelled := context.AfterFunc(ctx, func() {
		bounded, cancel := context.WithTimeout(running, drain)
		defer cancel()
		g.Drain(bounded)
		stop()
	})
	writer := &oneByOne{WriteCloser: out}
	reader := newLines(in, writer, g.cfg.Gateway.Limits.BodyBytes)
	err = v.server.Run(running, &stdioTransport{Transport: &mcp.IOTransport{Reader: reader, Writer: writer, MaxLineLength: -1}, g: g, drain: drain})
	if !cancelled() {
		<-running.Done() // the drain has the rest
	}
	if errors.Is(err, io.EOF) || errors.Is(err, syscall.EPIPE) || ctx.Err() != nil {
		return nil // the client left, or we were told to
	}
	return err
}

// stdioTransport keeps each request's params as received, and the connection
// open until what was asked on it is answered.
type stdioTransport struct {
	mcp.Transport
	g     *Gateway
	drain time.Duration
}

func (t *stdioTransport) Connect(ctx context.Context) (mcp.Connection, error) {
	c, err := t.Transport.Connect(ctx)
	if err != nil {
		return nil, err
	}
	return &stdioConnection{Connection: c, g: t.g, drain: t.drain, calls: map[jsonrpc.ID]func(){}}, nil
}

type stdioConnection struct {
	mcp.Connection
	g     *Gateway
	drain time.Duration
	owed  inFlight // answers of this connection

	mu    sync.Mutex // guards calls
	calls map[jsonrpc.ID]func()
}

func (c *stdioConnection) Read(ctx context.Context) (jsonrpc.Message, error) {
	msg, err := c.Connection.Read(ctx)
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
		withRawParams(req)
		if req.IsCall() {
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
