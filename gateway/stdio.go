package gateway

import (
	"context"
	"errors"
	"fmt"
	"io"
	"syscall"

	"github.com/modelcontextprotocol/go-sdk/jsonrpc"
	"github.com/modelcontextprotocol/go-sdk/mcp"

	"gatehouse/auth"
)

// ServeStdio speaks MCP over in and out, one JSON message per line, for the
// default session, until in ends or ctx is done.
func (g *Gateway) ServeStdio(ctx context.Context, in io.ReadCloser, out io.WriteCloser) error {
	v, err := g.view(auth.Local)
	if err != nil {
		return fmt.Errorf("opening the default session: %w", err)
	}
	err = v.server.Run(ctx, rawTransport{&mcp.IOTransport{Reader: in, Writer: out}})
	if errors.Is(err, io.EOF) || errors.Is(err, syscall.EPIPE) || ctx.Err() != nil {
		return nil // the client left, or we were told to
	}
	return err
}

// rawTransport is a transport that keeps each request's params as received.
type rawTransport struct{ mcp.Transport }

func (t rawTransport) Connect(ctx context.Context) (mcp.Connection, error) {
	c, err := t.Transport.Connect(ctx)
	if err != nil {
		return nil, err
	}
	return rawConnection{c}, nil
}

type rawConnection struct{ mcp.Connection }

func (c rawConnection) Read(ctx context.Context) (jsonrpc.Message, error) {
	msg, err := c.Connection.Read(ctx)
	if req, ok := msg.(*jsonrpc.Request); ok {
		withRawParams(req)
	}
	return msg, err
}
