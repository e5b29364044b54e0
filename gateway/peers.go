package gateway

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/modelcontextprotocol/go-sdk/jsonrpc"
	"github.com/modelcontextprotocol/go-sdk/mcp"

	"gatehouse/session/rawjson"
)

// This file is the gateway asking a client of the legacy era: what it has
// declared that it can be asked, and its answers, byte for byte.

// peers are the clients of one view by their SDK sessions.
type peers struct {
	mu       sync.Mutex // guards declared
	declared map[*mcp.ServerSession]json.RawMessage
}

// add notes what a client declares in the params of initialize.
func (p *peers) add(ss *mcp.ServerSession, initialize json.RawMessage) {
	got, err := rawjson.Get(initialize, "capabilities")
	if err != nil || got[0] == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.declared == nil {
		p.declared = map[*mcp.ServerSession]json.RawMessage{}
	}
	p.declared[ss] = slices.Clone(got[0])
}

func (p *peers) of(ss *mcp.ServerSession) json.RawMessage {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.declared[ss]
}

func (p *peers) forget(ss *mcp.ServerSession) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.declared, ss)
}

// metaAnswer is where a client's answer to a request of ours goes through the
// SDK unread. It exists inside the process only.
const metaAnswer = "gatehouse/answer"

// smuggle wraps a result in one that every result type of the SDK takes: its
// types would lose unknown members and change numbers.
func smuggle(result json.RawMessage) (json.RawMessage, error) {
	if !json.Valid(result) {
		return nil, errors.New("a result that is not JSON")
	}
	return json.Marshal(map[string]any{
		"_meta": map[string]string{metaAnswer: string(result)},
		"role":  "assistant", "model": "", "content": map[string]string{"type": "text", "text": ""},
		"roots": []string{},
	})
}

// smuggled returns the result that was wrapped.
func smuggled(result mcp.Result) (json.RawMessage, error) {
	answer, ok := result.GetMeta()[metaAnswer].(string)
	if !ok {
		return nil, errors.New("an answer that did not come from the client")
	}
	return json.RawMessage(answer), nil
}

// smuggleResponse wraps the result in a client's JSON-RPC response. Whatever is
// no response stays as it is.
func smuggleResponse(body []byte) ([]byte, error) {
	got, err := rawjson.Get(body, "method", "result")
	if err != nil || got[0] != nil || got[1] == nil {
		return body, nil
	}
	wrapped, err := smuggle(got[1])
	if err != nil {
		return nil, fmt.Errorf("wrapping a result: %w", err)
	}
	return rawjson.Set(body, "result", wrapped)
}

// withRawResult does the same for a response over stdio.
func withRawResult(resp *jsonrpc.Response) error {
	if resp.Error != nil || len(resp.Result) == 0 {
		return nil
	}
	wrapped, err := smuggle(resp.Result)
	if err != nil {
		return fmt.Errorf("wrapping a result: %w", err)
	}
	resp.Result = wrapped
	return nil
}
