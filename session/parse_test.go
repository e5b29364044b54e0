package session

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/google/go-cmp/cmp"
)

// ended is the context of somebody who waits for nothing.
func ended(t testing.TB) context.Context {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	return ctx
}

type event struct{ Type, Data string }

func readEvents(r io.Reader, limit int) (events []event, err error) {
	e := newEventReader(r, limit)
	defer e.release()
	for {
		kind, data, err := e.next()
		if err != nil {
			return events, err
		}
		events = append(events, event{kind, string(data)})
	}
}

// referenceEvents is the same thing by the letter of the standard, for input
// that is there as a whole.
func referenceEvents(stream string) (events []event) {
	stream = strings.TrimPrefix(stream, "\uFEFF")
	stream = strings.ReplaceAll(strings.ReplaceAll(stream, "\r\n", "\n"), "\r", "\n")
	lines := strings.Split(stream, "\n")
	var kind string
	var data []string
	for _, line := range lines[:len(lines)-1] { // what follows the last line end is no line
		if line == "" {
			if data != nil {
				events = append(events, event{kind, strings.Join(data, "\n")})
			}
			kind, data = "", nil
			continue
		}
		name, value, _ := strings.Cut(line, ":")
		value = strings.TrimPrefix(value, " ")
		switch name {
		case "event":
			kind = value
		case "data":
			data = append(data, value)
		}
	}
	return events
}

func TestEvents(t *testing.T) {
	long := strings.Repeat("x", 3*readBuffer)
	for _, tt := range []struct {
		name, in string
		want     []event
	}{
		{"nothing", "", nil},
		{"LF", "data: a\n\n", []event{{"", "a"}}},
		{"CRLF", "event: message\r\ndata: a\r\n\r\n", []event{{"message", "a"}}},
		{"CR", "data: a\r\rdata:b\r\r", []event{{"", "a"}, {"", "b"}}},
		{"lines are joined", "data: a\ndata\ndata:  b\n\n", []event{{"", "a\n\n b"}}},
		{"comments and other fields", ": hi\nid: 7\nretry: 3\nfoo: x\ndatas: y\ndata: a\n\n", []event{{"", "a"}}},
		{"type without data", "event: x\n\ndata: a\n\n", []event{{"", "a"}}},
		{"empty data", "id: 1\ndata:\n\ndata: a\n\n", []event{{"", ""}, {"", "a"}}},
		{"byte order mark", "\uFEFFdata: a\n\n", []event{{"", "a"}}},
		{"colons in the value", "data: a: b:c\n\n", []event{{"", "a: b:c"}}},
		{"cut before the blank line", "data: a\n\ndata: b\n", []event{{"", "a"}}},
		{"longer than the buffer", "data: " + long + "\ndata: " + long + "\n\n", []event{{"", long + "\n" + long}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for _, r := range []io.Reader{strings.NewReader(tt.in), iotest.OneByteReader(strings.NewReader(tt.in)), iotest.DataErrReader(strings.NewReader(tt.in))} {
				got, err := readEvents(r, 1<<20)
				if err != io.EOF {
					t.Errorf("got %v, want EOF", err)
				}
				if diff := cmp.Diff(tt.want, got); diff != "" {
					t.Error(diff)
				}
			}
			if diff := cmp.Diff(tt.want, referenceEvents(tt.in)); diff != "" {
				t.Errorf("the reference differs: %s", diff)
			}
		})
	}
}

func TestEventsAreBounded(t *testing.T) {
	for name, in := range map[string]string{
		"one line":   "data: " + strings.Repeat("x", 2000),
		"many lines": strings.Repeat("data: xxxxxxxxx\n", 200),
		"empty ones": strings.Repeat("data\n", 2000),
		"a comment":  ":" + strings.Repeat("x", 2000),
		"a field":    strings.Repeat("x", 2000),
	} {
		endless := io.MultiReader(strings.NewReader(in), iotest.ErrReader(errors.New("read on")))
		if _, err := readEvents(iotest.OneByteReader(endless), 1000); !errors.Is(err, errTooLarge) {
			t.Errorf("%s: got %v, want errTooLarge", name, err)
		}
	}
}

// TestEventDataIsTheCallers: what is returned does not change when reading goes on.
func TestEventDataIsTheCallers(t *testing.T) {
	e := newEventReader(strings.NewReader("data: aaaa\n\ndata: bbbb\n\ndata: "+strings.Repeat("c", 2*readBuffer)+"\n\n"), 1<<20)
	var got [][]byte
	for range 3 {
		_, data, err := e.next()
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, data)
	}
	e.release()
	newEventReader(strings.NewReader(strings.Repeat("z", 100)), 1<<20).release()
	if string(got[0]) != "aaaa" || string(got[1]) != "bbbb" || len(bytes.Trim(got[2], "c")) != 0 {
		t.Errorf("got %.20q", got)
	}
}

func FuzzEvents(f *testing.F) {
	f.Add([]byte("\uFEFFevent: message\r\ndata: {\"a\":1}\r\n\r\n: x\rdata\r\n\n"), 3)
	f.Add([]byte("data: a\r\n\ndata\n\n"), 1)
	f.Fuzz(func(t *testing.T, stream []byte, cut int) {
		want := referenceEvents(string(stream))
		for _, r := range []io.Reader{bytes.NewReader(stream), iotest.OneByteReader(bytes.NewReader(stream)), iotest.HalfReader(bytes.NewReader(stream))} {
			got, err := readEvents(r, 1<<20)
			if err != io.EOF {
				t.Fatalf("got %v", err)
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Fatal(diff)
			}
		}
		// Cut anywhere, the events are a beginning of them all.
		if cut < 0 || cut > len(stream) {
			return
		}
		got, _ := readEvents(bytes.NewReader(stream[:cut]), 1<<20)
		if len(got) > len(want) {
			t.Fatalf("more events of less: %q", got)
		}
		if diff := cmp.Diff(want[:len(got)], got, cmp.Transformer("", func(e []event) int { return len(e) })); diff != "" {
			t.Fatal(diff)
		}
	})
}

func TestParseMessage(t *testing.T) {
	for _, tt := range []struct{ name, in, method, result string }{
		{"response", `{"jsonrpc":"2.0","id":7,"result":{"a":1.0}}`, "", `{"a":1.0}`},
		{"any order, spaces, unknown members", ` { "x" : {"id":8} , "result" : { } ,"id": 7 , "jsonrpc" : "2.0" } `, "", `{ }`},
		{"escapes in keys", `{"json\u0072pc":"2.\u0030","i\u0064":7,"re\u0073ult":{}}`, "", `{}`},
		{"notification", `{"jsonrpc":"2.0","method":"n/x","params":{"a":[]}}`, "n/x", ""},
		{"request", `{"jsonrpc":"2.0","id":"q","method":"ping"}`, "ping", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m, err := parseMessage([]byte(tt.in))
			if err != nil {
				t.Fatal(err)
			}
			if m.method != tt.method || string(m.result) != tt.result || m.isResponse() && !m.answers(7) || m.answers(8) {
				t.Errorf("got %+v", m)
			}
		})
	}
	for _, in := range []string{
		``, `x`, `7`, `"s"`, `null`, `[]`, `[{"jsonrpc":"2.0","id":7,"result":{}}]`, `{}`, `{"jsonrpc":"2.0"}`,
		`{"id":7,"result":{}}`, `{"jsonrpc":2.0,"id":7,"result":{}}`, `{"jsonrpc":"2.0","id":7}`, `{"jsonrpc":"2.0","result":{}}`,
		`{"jsonrpc":"2.0","id":7,"id":7,"result":{}}`, `{"jsonrpc":"2.0","id":7,"result":{},"result":{}}`,
		`{"jsonrpc":"2.0","id":7,"result":{}} x`, `{"jsonrpc":"2.0","id":7,"result":null}`, `{"jsonrpc":"2.0","id":7,"error":{}}`,
		`{"jsonrpc":"2.0","id":7,"error":{"code":"1"}}`, `{"jsonrpc":"2.0","id":7,"error":{"code":1.5}}`, `{"jsonrpc":"2.0","id":7,"error":{"code":1,"code":2}}`,
		`{"jsonrpc":"2.0","method":7}`, `{"jsonrpc":"2.0","method":""}`, `{"jsonrpc":"2.0","method":"x","id":null}`, `{"jsonrpc":"2.0","method":"x","id":{}}`,
		`{"jsonrpc":"2.0","method":"x","result":{}}`, `{"jsonrpc":"2.0","method":"x","id":"` + strings.Repeat("i", 300) + `"}`,
		"{\"jsonrpc\":\"2.0\",\"id\":7,\"result\":{\"x\":\"\xff\"}}",
	} {
		if m, err := parseMessage([]byte(in)); err == nil {
			t.Errorf("%s: got %+v", in, m)
		}
	}
}

// FuzzMessage: what is accepted is what encoding/json would have read, and
// the raw parts are parts of the input.
func FuzzMessage(f *testing.F) {
	f.Add([]byte(`{"jsonrpc":"2.0","id":7,"result":{"a":1.0}}`))
	f.Add([]byte(`{"jsonrpc":"2.0","id":null,"error":{"code":-32000,"message":"\u00e9","data":[1e9]}}`))
	f.Add([]byte(`{"jsonrpc":"2.0","id":"x","method":"ping","params":{}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := parseMessage(data)
		if err != nil {
			return
		}
		var want map[string]json.RawMessage
		if err := json.Unmarshal(data, &want); err != nil {
			t.Fatalf("accepted what is no object: %v", err)
		}
		if string(want["result"]) != string(m.result) && m.isResponse() {
			t.Fatalf("result %q, want %q", m.result, want["result"])
		}
		if string(want["id"]) != string(m.id) || string(want["params"]) != string(m.params) {
			t.Fatalf("got %+v", m)
		}
		if m.isResponse() == (m.method != "") || m.isResponse() && (m.err == nil) == (m.result == nil) {
			t.Fatalf("got %+v", m)
		}
		if m.err != nil {
			var want struct {
				Error struct {
					Code    int64
					Message string
					Data    json.RawMessage
				} `json:"error"`
			}
			if json.Unmarshal(data, &want) == nil && want.Error.Code != m.err.Code {
				t.Fatalf("got %+v", m.err)
			}
		}
	})
}

func TestAppendRequest(t *testing.T) {
	for _, tt := range []struct {
		id     int64
		method string
		params string
		want   string
	}{
		{1, "tools/call", `{"a":1.0}`, `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"a":1.0}}`},
		{0, "notifications/x", "", `{"jsonrpc":"2.0","method":"notifications/x"}`},
		{2, "a\"\\\n\u00e9", "", `{"jsonrpc":"2.0","id":2,"method":"a\"\\\n` + "\u00e9" + `"}`},
	} {
		var params json.RawMessage
		if tt.params != "" {
			params = json.RawMessage(tt.params)
		}
		got, err := appendRequest(nil, tt.id, tt.method, params)
		if err != nil || string(got) != tt.want {
			t.Errorf("got %s, %v, want %s", got, err, tt.want)
		}
	}
}
