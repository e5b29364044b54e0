package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"io"
	"maps"
	"net/http"
	"strings"
	"testing"
)

// rawExchange speaks MCP by hand, so that nothing in between changes a byte:
// initialize, tools/list, tools/call. It returns the two results.
func rawExchange(t *testing.T, url, callParams string) (list, call json.RawMessage) {
	t.Helper()
	resp := post(t, url, `{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-11-25","capabilities":{},"clientInfo":{"name":"raw","version":"1"}}}`, nil)
	session := http.Header{"Mcp-Session-Id": {resp.header.Get("Mcp-Session-Id")}, "Mcp-Protocol-Version": {"2025-11-25"}}
	post(t, url, `{"jsonrpc":"2.0","method":"notifications/initialized"}`, session)
	list = post(t, url, `{"jsonrpc":"2.0","id":2,"method":"tools/list"}`, session).result(t)
	call = post(t, url, `{"jsonrpc":"2.0","id":3,"method":"tools/call","params":`+callParams+`}`, session).result(t)
	return list, call
}

type answer struct {
	status int
	header http.Header
	body   []byte
}

// post sends one message.
func post(t *testing.T, url, body string, header http.Header) answer {
	t.Helper()
	req, err := http.NewRequestWithContext(within(t), http.MethodPost, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	maps.Copy(req.Header, header)
	if host := header.Get("Host"); host != "" {
		req.Host = host
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Accept", "application/json, text/event-stream")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return answer{resp.StatusCode, resp.Header, data}
}

// result returns the result in an answer, which is JSON or an event stream.
func (a answer) result(t *testing.T) json.RawMessage {
	t.Helper()
	data := a.body
	if strings.HasPrefix(a.header.Get("Content-Type"), "text/event-stream") {
		lines := bufio.NewScanner(bytes.NewReader(a.body))
		lines.Buffer(nil, 16<<20)
		for lines.Scan() {
			if rest, ok := bytes.CutPrefix(lines.Bytes(), []byte("data: ")); ok && bytes.Contains(rest, []byte(`"result"`)) {
				data = bytes.Clone(rest)
			}
		}
	}
	return member(t, data, "result")
}

func member(t *testing.T, object []byte, name string) json.RawMessage {
	t.Helper()
	var members map[string]json.RawMessage
	if err := json.Unmarshal(object, &members); err != nil {
		t.Fatalf("%v in %q", err, object)
	}
	return members[name]
}

// literals decodes JSON for comparison, with numbers as they are written.
func literals(t *testing.T, s string) any {
	t.Helper()
	dec := json.NewDecoder(strings.NewReader(s))
	dec.UseNumber()
	var v any
	if err := dec.Decode(&v); err != nil {
		t.Fatalf("%v in %q", err, s)
	}
	return v
}
