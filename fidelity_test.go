package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// recorded is one exchange with a remote, testdata/fidelity/*.json. The file's
// bytes are what goes over the wire.
type recorded struct {
	file           string
	Method         string
	Params, Result json.RawMessage
}

func readRecorded(t *testing.T) []recorded {
	t.Helper()
	files, err := filepath.Glob("testdata/fidelity/*.json")
	if err != nil || len(files) == 0 {
		t.Fatalf("there are no recorded exchanges: %v", err)
	}
	var all []recorded
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		r := recorded{file: filepath.Base(file)}
		if err := json.Unmarshal(data, &r); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		all = append(all, r)
	}
	return all
}

// recordedRemote answers with what was recorded, and notes the params that
// came. It is written by hand so that nothing in it changes a byte.
type recordedRemote struct {
	url    string
	sse    bool // answers are event streams
	modern bool // it speaks protocol 2026-07-28
	mu     sync.Mutex
	params map[string]json.RawMessage // by file, as they came last
}

func newRecordedRemote(t *testing.T, sse, modern bool, all []recorded) *recordedRemote {
	t.Helper()
	remote := &recordedRemote{sse: sse, modern: modern, params: map[string]json.RawMessage{}}
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		var m struct {
			ID     json.RawMessage `json:"id"`
			Method string          `json:"method"`
			Params json.RawMessage `json:"params"`
		}
		switch {
		case r.Method != http.MethodPost:
			w.WriteHeader(http.StatusMethodNotAllowed)
		case err != nil || json.Unmarshal(body, &m) != nil:
			w.WriteHeader(http.StatusBadRequest)
		case m.ID == nil:
			w.WriteHeader(http.StatusAccepted)
		case m.Method == "server/discover" && modern:
			remote.answer(w, m.ID, "result", `{"supportedVersions":["2026-07-28"],"capabilities":{"tools":{},"prompts":{},"resources":{},"completions":{}},"serverInfo":{"name":"recorded","version":"1"},"resultType":"complete","ttlMs":0,"cacheScope":"private"}`)
		case m.Method == "initialize" && !modern:
			remote.answer(w, m.ID, "result", `{"protocolVersion":"2025-11-25","capabilities":{"tools":{},"prompts":{},"resources":{},"completions":{}},"serverInfo":{"name":"recorded","version":"1"}}`)
		case m.Method == "ping":
			remote.answer(w, m.ID, "result", `{}`)
		default:
			for _, exchange := range all {
				if m.Method == exchange.Method && slices.Equal(subject(m.Params), subject(exchange.Params)) {
					remote.mu.Lock()
					remote.params[exchange.file] = m.Params
					remote.mu.Unlock()
					result := string(exchange.Result)
					if modern {
						result = `{"resultType":"complete","ttlMs":7,"cacheScope":"private",` + strings.TrimPrefix(result, "{")
					}
					remote.answer(w, m.ID, "result", result)
					return
				}
			}
			remote.answer(w, m.ID, "error", `{"code":-32601,"message":"nothing was recorded of this"}`)
		}
	}))
	t.Cleanup(srv.Close)
	remote.url = srv.URL + "/mcp"
	return remote
}

func (remote *recordedRemote) answer(w http.ResponseWriter, id json.RawMessage, member, value string) {
	message := fmt.Sprintf(`{"jsonrpc":"2.0","id":%s,%q:%s}`, id, member, value)
	if !remote.sse {
		w.Header().Set("Content-Type", "application/json")
		io.WriteString(w, message)
		return
	}
	w.Header().Set("Content-Type", "text/event-stream")
	fmt.Fprintf(w, "event: message\ndata: %s\n\n", strings.ReplaceAll(message, "\n", "\ndata: "))
}

// came returns what the remote got for a recorded exchange.
func (remote *recordedRemote) came(file string) json.RawMessage {
	remote.mu.Lock()
	defer remote.mu.Unlock()
	return remote.params[file]
}

// subject is what params are about: the name of a tool or a prompt, or a URI.
func subject(params json.RawMessage) []string {
	var p map[string]json.RawMessage
	json.Unmarshal(params, &p) // no params: no subject
	return []string{string(p["name"]), string(p["uri"])}
}

// asker sends one request to the gateway by hand and returns the result.
type asker func(t *testing.T, method string, params json.RawMessage) json.RawMessage

// overHTTP and overStdio speak to the gateway in either era.
func overHTTP(t *testing.T, remote *recordedRemote, modern bool) asker {
	gw := startServe(t, config("", "r", remote.url))
	header := http.Header{}
	if modern {
		header.Set("Mcp-Protocol-Version", "2026-07-28")
	} else {
		resp := post(t, gw.url, initializeMessage, nil)
		header.Set("Mcp-Session-Id", resp.header.Get("Mcp-Session-Id"))
		header.Set("Mcp-Protocol-Version", "2025-11-25")
		post(t, gw.url, initializedMessage, header)
	}
	return func(t *testing.T, method string, params json.RawMessage) json.RawMessage {
		t.Helper()
		header := header.Clone()
		if modern {
			params = withEnvelope(t, params)
			header.Set("Mcp-Method", method)
			for _, name := range []string{"name", "uri"} {
				if raw := member(t, params, name); raw != nil {
					header.Set("Mcp-Name", unquote(t, raw))
				}
			}
		}
		return post(t, gw.url, request(method, params), header).result(t)
	}
}

func overStdio(t *testing.T, remote *recordedRemote, modern bool) asker {
	gw := startStdio(t, onPort(t, "r", remote.url))
	lines := bufio.NewReader(gw.stdout)
	send := func(t *testing.T, message string) {
		t.Helper()
		// A line is a message; between its tokens a line break means nothing.
		if _, err := io.WriteString(gw.stdin, strings.ReplaceAll(message, "\n", " ")+"\n"); err != nil {
			t.Fatal(err)
		}
	}
	result := func(t *testing.T) json.RawMessage {
		t.Helper()
		for {
			line, err := lines.ReadBytes('\n')
			if err != nil {
				t.Fatal(err)
			}
			if member(t, line, "id") != nil {
				return member(t, line, "result")
			}
		}
	}
	if !modern {
		send(t, initializeMessage)
		result(t)
		send(t, initializedMessage)
	}
	return func(t *testing.T, method string, params json.RawMessage) json.RawMessage {
		t.Helper()
		if modern {
			params = withEnvelope(t, params)
		}
		send(t, request(method, params))
		return result(t)
	}
}

const (
	initializeMessage  = `{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-11-25","capabilities":{},"clientInfo":{"name":"raw","version":"1"}}}`
	initializedMessage = `{"jsonrpc":"2.0","method":"notifications/initialized"}`
)

func request(method string, params json.RawMessage) string {
	if params == nil {
		return fmt.Sprintf(`{"jsonrpc":"2.0","id":7,"method":%q}`, method)
	}
	return fmt.Sprintf(`{"jsonrpc":"2.0","id":7,"method":%q,"params":%s}`, method, params)
}

// withEnvelope adds what every request of protocol 2026-07-28 carries.
func withEnvelope(t *testing.T, params json.RawMessage) json.RawMessage {
	t.Helper()
	const envelope = `"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientInfo":{"name":"raw","version":"1"},"io.modelcontextprotocol/clientCapabilities":{}`
	if params == nil {
		return json.RawMessage(`{"_meta":{` + envelope + `}}`)
	}
	if meta := member(t, params, "_meta"); meta != nil {
		return bytes.Replace(params, []byte(`"_meta": {`), []byte(`"_meta": {`+envelope+`, `), 1)
	}
	return slices.Concat(params[:len(params)-1], []byte(`, "_meta": {`+envelope+`}}`))
}

func unquote(t *testing.T, raw json.RawMessage) string {
	t.Helper()
	var s string
	if err := json.Unmarshal(raw, &s); err != nil {
		t.Fatal(err)
	}
	return s
}

// tokens is JSON as its tokens in their order: strings are their values, numbers
// their literals, and members that occur twice are there twice.
func tokens(t *testing.T, raw json.RawMessage) (all []string) {
	t.Helper()
	dec := json.NewDecoder(bytes.NewReader(raw))
	dec.UseNumber()
	for {
		token, err := dec.Token()
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatalf("%v in %q", err, raw)
		}
		all = append(all, fmt.Sprintf("%T %[1]v", token))
	}
}

// same asserts that two objects have the same members with the same tokens, but
// for members that the gateway may set: changed gives their new tokens, or nil
// for any.
func same(t *testing.T, what string, want, got json.RawMessage, changed map[string][]string) {
	t.Helper()
	wants, gots := members(t, want), members(t, got)
	for _, name := range slices.Sorted(maps.Keys(changed)) {
		if changed[name] != nil && !slices.Equal(gots[name], changed[name]) {
			t.Errorf("%s: %s is %v, want %v", what, name, gots[name], changed[name])
		}
		delete(wants, name)
		delete(gots, name)
	}
	if diff := cmp.Diff(wants, gots); diff != "" {
		t.Errorf("%s:\n%s", what, diff)
	}
}

func members(t *testing.T, object json.RawMessage) map[string][]string {
	t.Helper()
	var raw map[string]json.RawMessage
	if err := json.Unmarshal(object, &raw); err != nil {
		t.Fatalf("%v in %q", err, object)
	}
	out := map[string][]string{}
	for name, value := range raw {
		out[name] = tokens(t, value)
	}
	return out
}

// TestFidelityOfRecorded: what was recorded comes through the gateway with the
// same values, number literals, order and unknown members, both ways, in both
// eras of client and remote, over HTTP and stdio, and by gateway_call_tool. Only what the design
// names is different: names, and the members that protocol 2026-07-28 adds.
func TestFidelityOfRecorded(t *testing.T) {
	t.Parallel()
	all := readRecorded(t)
	for _, tt := range []struct {
		name   string
		open   func(t *testing.T, remote *recordedRemote, modern bool) asker
		modern bool
	}{
		{"http, legacy", overHTTP, false},
		{"http, 2026-07-28", overHTTP, true},
		{"stdio, legacy", overStdio, false},
		{"stdio, 2026-07-28", overStdio, true},
	} {
		for _, behind := range []struct {
			name        string
			sse, modern bool
		}{
			{"legacy, JSON", false, false}, {"legacy, streams", true, false},
			{"2026-07-28, JSON", false, true}, {"2026-07-28, streams", true, true},
		} {
			t.Run(tt.name+", remote "+behind.name, func(t *testing.T) {
				t.Parallel()
				remote := newRecordedRemote(t, behind.sse, behind.modern, all)
				ask := tt.open(t, remote, tt.modern)
				for _, exchange := range all {
					t.Run(exchange.file, func(t *testing.T) {
						if strings.HasSuffix(exchange.Method, "/list") {
							compareList(t, exchange, ask(t, exchange.Method, nil))
							return
						}
						compareExchange(t, remote, exchange, tt.modern, func(params json.RawMessage) json.RawMessage {
							return ask(t, exchange.Method, params)
						})
						if exchange.Method == "tools/call" {
							compareByName(t, remote, exchange, tt.modern, ask)
						}
					})
				}
			})
		}
	}
}

// prefixed renames what the params are about as the gateway does.
func prefixed(params json.RawMessage) json.RawMessage {
	return bytes.Replace(params, []byte(`"name": "`), []byte(`"name": "r_`), 1)
}

// added are the members of a result that protocol 2026-07-28 has and the
// recorded ones do not.
func added(t *testing.T, modern bool, result, got json.RawMessage) map[string][]string {
	t.Helper()
	// _meta is the remote's, with the gateway's own name in it in that era; an
	// empty one says as much as none.
	if diff := cmp.Diff(withoutEnvelope(t, result), withoutEnvelope(t, got)); diff != "" {
		t.Errorf("_meta of the result:\n%s", diff)
	}
	if !modern {
		return map[string][]string{"_meta": nil}
	}
	return map[string][]string{"_meta": nil, "resultType": {"string complete"}, "ttlMs": nil, "cacheScope": nil}
}

func compareExchange(t *testing.T, remote *recordedRemote, exchange recorded, modern bool, ask func(json.RawMessage) json.RawMessage) {
	t.Helper()
	params := exchange.Params
	if exchange.Method != "resources/read" {
		params = prefixed(params)
	}
	got := ask(params)
	if got == nil {
		t.Fatal("there is no result")
	}
	same(t, "result", exchange.Result, got, added(t, modern, exchange.Result, got))
	// Each side has an envelope of its own in _meta; what is beside it is the client's.
	came := remote.came(exchange.file)
	same(t, "params", exchange.Params, came, map[string][]string{"_meta": nil})
	if diff := cmp.Diff(withoutEnvelope(t, exchange.Params), withoutEnvelope(t, came)); diff != "" {
		t.Errorf("_meta of the params:\n%s", diff)
	}
}

// withoutEnvelope is what the _meta of params or of a result has beside what
// protocol 2026-07-28 says there.
func withoutEnvelope(t *testing.T, params json.RawMessage) map[string][]string {
	t.Helper()
	meta := member(t, params, "_meta")
	if meta == nil {
		return map[string][]string{}
	}
	all := members(t, meta)
	maps.DeleteFunc(all, func(name string, _ []string) bool { return strings.HasPrefix(name, "io.modelcontextprotocol/") })
	return all
}

// compareByName calls the tool by gateway_call_tool.
func compareByName(t *testing.T, remote *recordedRemote, exchange recorded, modern bool, ask asker) {
	t.Helper()
	arguments := member(t, exchange.Params, "arguments")
	if arguments == nil {
		return
	}
	got := ask(t, "tools/call", json.RawMessage(fmt.Sprintf(`{"name": "gateway_call_tool", "arguments": {"name": "r_%s", "arguments": %s}}`,
		unquote(t, member(t, exchange.Params, "name")), arguments)))
	same(t, "result by gateway_call_tool", exchange.Result, got, added(t, modern, exchange.Result, got))
	if diff := cmp.Diff(tokens(t, arguments), tokens(t, member(t, remote.came(exchange.file), "arguments"))); diff != "" {
		t.Errorf("arguments by gateway_call_tool:\n%s", diff)
	}
}

func compareList(t *testing.T, exchange recorded, got json.RawMessage) {
	t.Helper()
	for name, value := range rawMembers(t, exchange.Result) {
		wants, gots := elements(t, value), map[string]json.RawMessage{}
		for _, definition := range elements(t, member(t, got, name)) {
			gots[key(t, definition)] = definition
		}
		for _, want := range wants {
			k, changed := key(t, want), map[string][]string(nil)
			if name == "tools" || name == "prompts" {
				k = "r_" + k
				changed = map[string][]string{"name": {"string " + k}}
			}
			if gots[k] == nil {
				t.Errorf("%s is not listed", k)
				continue
			}
			same(t, k, want, gots[k], changed)
		}
	}
}

// TestReadFirst: a resource can be read by the first request of a session,
// whichever remote has it.
func TestReadFirst(t *testing.T) {
	t.Parallel()
	all := readRecorded(t)
	gw := startServe(t, config("", "r", newRecordedRemote(t, false, false, all).url, "other", newRecordedRemote(t, false, false, nil).url))
	for range 20 {
		resp := post(t, gw.url, initializeMessage, nil)
		header := http.Header{"Mcp-Session-Id": {resp.header.Get("Mcp-Session-Id")}, "Mcp-Protocol-Version": {"2025-11-25"}}
		for _, exchange := range all {
			if exchange.Method != "resources/read" {
				continue
			}
			answer := post(t, gw.url, request(exchange.Method, exchange.Params), header)
			if answer.result(t) == nil {
				t.Fatalf("%s", answer.body)
			}
		}
	}
}

func rawMembers(t *testing.T, object json.RawMessage) (raw map[string]json.RawMessage) {
	t.Helper()
	if err := json.Unmarshal(object, &raw); err != nil {
		t.Fatalf("%v in %q", err, object)
	}
	return raw
}

func elements(t *testing.T, array json.RawMessage) (raw []json.RawMessage) {
	t.Helper()
	if err := json.Unmarshal(array, &raw); err != nil {
		t.Fatalf("%v in %q", err, array)
	}
	return raw
}

func key(t *testing.T, definition json.RawMessage) string {
	t.Helper()
	return unquote(t, member(t, definition, "name"))
}
