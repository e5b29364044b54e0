package gateway

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/modelcontextprotocol/go-sdk/jsonrpc"
)

// lines is stdin as the SDK may read it: what is no JSON-RPC message is
// answered here and goes no further, because the SDK ends with it. MCP stdio:
// "Messages are delimited by newlines, and MUST NOT contain embedded newlines."
type lines struct {
	in    io.ReadCloser
	lines *bufio.Reader
	out   io.Writer
	most  int    // bytes of one line
	rest  []byte // of the present one
}

func newLines(in io.ReadCloser, out io.Writer, most int) *lines {
	return &lines{in: in, lines: bufio.NewReader(in), out: out, most: most}
}

func (l *lines) Read(p []byte) (int, error) {
	for len(l.rest) == 0 {
		line, err := l.next()
		if err != nil {
			return 0, err
		}
		if len(bytes.TrimSpace(line)) == 0 {
			continue
		}
		refusal := refuseMessage(line)
		if len(line) > l.most {
			refusal = &jsonrpc.Error{Code: jsonrpc.CodeInvalidRequest, Message: fmt.Sprintf("the message exceeds %d bytes (gateway.limits.bodyBytes)", l.most)}
		}
		if refusal != nil {
			if err := l.answer(refusal); err != nil {
				return 0, err
			}
			continue
		}
		l.rest = append(line, '\n')
	}
	n := copy(p, l.rest)
	l.rest = l.rest[n:]
	return n, nil
}

// next returns a line without its end, and no more of it than shows that it is
// too long. What stands before the end of the input is a line, too.
func (l *lines) next() ([]byte, error) {
	var line []byte
	for {
		part, err := l.lines.ReadSlice('\n')
		if room := l.most + 1 - len(line); room > 0 {
			line = append(line, part[:min(room, len(part))]...)
		}
		switch {
		case err == nil, errors.Is(err, io.EOF) && len(line) > 0:
			return bytes.TrimRight(line, "\r\n"), nil
		case !errors.Is(err, bufio.ErrBufferFull):
			return nil, err
		}
	}
}

// refuseMessage says why something is no message, nil if it is one. A batch
// (protocol 2025-03-26) is the SDK's business.
func refuseMessage(data []byte) *jsonrpc.Error {
	if !json.Valid(data) {
		return &jsonrpc.Error{Code: jsonrpc.CodeParseError, Message: "this is not JSON: a message is one JSON object, over stdio in one line"}
	}
	if bytes.TrimSpace(data)[0] == '[' {
		return nil
	}
	if _, err := jsonrpc.DecodeMessage(data); err != nil {
		return &jsonrpc.Error{Code: jsonrpc.CodeInvalidRequest, Message: "this is JSON, but no JSON-RPC 2.0 message"}
	}
	return nil
}

// answer refuses a message whose id nobody knows. JSON-RPC 2.0, section 5: "If
// there was an error in detecting the id in the Request object (e.g. Parse
// error/Invalid Request), it MUST be Null."
func (l *lines) answer(refusal *jsonrpc.Error) error {
	answer, err := json.Marshal(map[string]any{"jsonrpc": "2.0", "id": nil,
		"error": map[string]any{"code": refusal.Code, "message": refusal.Message}})
	if err != nil {
		return fmt.Errorf("encoding an error: %w", err)
	}
	_, err = l.out.Write(append(answer, '\n'))
	return err
}

func (l *lines) Close() error { return l.in.Close() }

// oneByOne keeps messages of several writers apart; each is one Write.
type oneByOne struct {
	io.WriteCloser
	mu sync.Mutex
}

func (w *oneByOne) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.WriteCloser.Write(p)
}
