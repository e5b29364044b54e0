package session

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"gatehouse/auth"
)

type handler = func(w http.ResponseWriter, r *http.Request, m received)

// body answers with these bytes, in which %s is the request's id.
func body(contentType, format string) handler {
	return func(w http.ResponseWriter, _ *http.Request, m received) {
		w.Header()["Content-Type"] = []string{contentType}
		io.WriteString(w, strings.ReplaceAll(format, "%s", string(m.ID)))
	}
}

func status(code int) handler {
	return func(w http.ResponseWriter, _ *http.Request, _ received) { http.Error(w, canary, code) }
}

// TestHostileRemote: whatever a remote answers, to whatever request, is a
// sentence that names it, and the other remote does not notice.
func TestHostileRemote(t *testing.T) {
	const js, sse = "application/json", "text/event-stream"
	for _, tt := range []struct {
		name   string
		answer handler
		kind   Kind
		say    string
	}{
		{"HTML", body("text/html; charset=utf-8", canary), KindBadAnswer, "text/html instead of JSON"},
		{"hostile content type", body("x/"+strings.Repeat("y", 5000), canary), KindBadAnswer, "MCP endpoint?"},
		{"no content type", func(w http.ResponseWriter, _ *http.Request, _ received) {
			w.Header()["Content-Type"] = nil
			io.WriteString(w, canary)
		}, KindBadAnswer, "without a content type"},
		{"accepted, and no more", status202, KindBadAnswer, "status 202 and nothing else"},
		{"compressed", func(w http.ResponseWriter, _ *http.Request, _ received) {
			w.Header().Set("Content-Type", js)
			w.Header().Set("Content-Encoding", "gzip")
		}, KindBadAnswer, "compressed"},
		{"invalid JSON", body(js, `{"jsonrpc":"2.0","id":%s,"result":{]}`+canary), KindBadAnswer, "invalid JSON"},
		{"empty", body(js, ``), KindBadAnswer, "invalid JSON"},
		{"two responses in one body", body(js, `{"jsonrpc":"2.0","id":%s,"result":{}}{"jsonrpc":"2.0","id":%s,"result":{}}`), KindBadAnswer, "invalid JSON"},
		{"not UTF-8", body(js, `{"jsonrpc":"2.0","id":%s,"result":{"x":"`+"\xff"+`"}}`), KindBadAnswer, "not UTF-8"},
		{"too deep", body(js, `{"jsonrpc":"2.0","id":%s,"result":{"x":`+strings.Repeat("[", 20000)+strings.Repeat("]", 20000)+`}}`), KindBadAnswer, "invalid JSON"},
		{"batch", body(js, `[{"jsonrpc":"2.0","id":%s,"result":{}}]`), KindBadAnswer, "batch"},
		{"another id", body(js, `{"jsonrpc":"2.0","id":99999,"result":{}}`), KindBadAnswer, "another request"},
		{"id as a string", body(js, `{"jsonrpc":"2.0","id":"%s","result":{}}`), KindBadAnswer, "another request"},
		{"null id", body(js, `{"jsonrpc":"2.0","id":null,"result":{}}`), KindBadAnswer, "another request"},
		{"no id", body(js, `{"jsonrpc":"2.0","result":{}}`), KindBadAnswer, "neither"},
		{"other version of JSON-RPC", body(js, `{"jsonrpc":"1.0","id":%s,"result":{}}`), KindBadAnswer, "jsonrpc"},
		{"result and error", body(js, `{"jsonrpc":"2.0","id":%s,"result":{},"error":{"code":1,"message":""}}`), KindBadAnswer, "neither"},
		{"result twice", body(js, `{"jsonrpc":"2.0","id":%s,"result":{},"r\u0065sult":{}}`), KindBadAnswer, "twice"},
		{"result is no object", body(js, `{"jsonrpc":"2.0","id":%s,"result":[]}`), KindBadAnswer, "not an object"},
		{"error is no object", body(js, `{"jsonrpc":"2.0","id":%s,"error":"`+canary+`"}`), KindBadAnswer, "not an object"},
		{"a request instead", body(js, `{"jsonrpc":"2.0","id":%s,"method":"ping"}`), KindBadAnswer, "no response"},
		{"17 MB", body(js, `{"jsonrpc":"2.0","id":%s,"result":{"x":"`+strings.Repeat("x", 17<<20)+`"}}`), KindTooLarge, "16 MiB"},
		{"17 MB in an event", body(sse, `data: {"jsonrpc":"2.0","id":%s,"result":{"x":"`+strings.Repeat("x", 17<<20)+"\"}}\n\n"), KindTooLarge, "16 MiB"},
		{"17 MB in many lines", body(sse, strings.Repeat("data: x"+strings.Repeat("x", 1000)+"\n", 17<<10)), KindTooLarge, "16 MiB"},
		{"stream without a response", body(sse, ": hello\n\n"), KindCut, "without a complete answer"},
		{"stream with nonsense", body(sse, "data: "+canary+"\n\n"), KindBadAnswer, "invalid JSON"},
		{"stream with another id", body(sse, "data: {\"jsonrpc\":\"2.0\",\"id\":99999,\"result\":{}}\n\n"), KindBadAnswer, "another request"},
		{"stream of requests", body(sse, strings.Repeat("data: {\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"ping\"}\n\n", 1000)), KindBadAnswer, "64 requests"},
		{"hangs up", hangUp, KindCut, "without a complete answer"},
		{"speaks nonsense", func(w http.ResponseWriter, _ *http.Request, _ received) {
			conn, _, err := http.NewResponseController(w).Hijack()
			if err == nil {
				fmt.Fprintf(conn, "HTTP/1.1 2x0 %s\r\n\r\n", canary)
				conn.Close()
			}
		}, KindCut, "without a complete answer"},
		{"400", status(400), KindStatus, "status 400"},
		{"405", status(405), KindStatus, "streamable HTTP"},
		{"413", status(413), KindStatus, "too large"},
		{"429", func(w http.ResponseWriter, _ *http.Request, _ received) {
			w.Header().Set("Retry-After", "7")
			w.WriteHeader(429)
		}, KindStatus, "Try again in 7 s"},
		{"429 with a date", func(w http.ResponseWriter, _ *http.Request, _ received) {
			w.Header().Set("Retry-After", canary)
			w.WriteHeader(429)
		}, KindStatus, "Wait a moment"},
		{"500", status(500), KindStatus, "problem of its own"},
		{"503", status(503), KindStatus, "problem of its own"},
		{"418", status(418), KindStatus, "not accepted"},
		{"307 to nowhere", func(w http.ResponseWriter, _ *http.Request, _ received) {
			w.Header().Set("Location", "http://"+canary+".invalid/")
			w.WriteHeader(307)
		}, KindStatus, "redirect"},
	} {
		for _, method := range []string{"initialize", "tools/list", "tools/call"} {
			if tt.kind == KindTooLarge && method != "tools/call" {
				continue // once is slow enough
			}
			t.Run(tt.name+" to "+method, func(t *testing.T) {
				bad, good := newFake(t), newFake(t)
				bad.handle(method, tt.answer)
				r := newRemoteFor(t, "notes", bad.URL)
				r.Authorizer = func(auth.Principal) Authorizer { return &door{token: canary} }
				s := open(t, r, newRemoteFor(t, "other", good.URL))
				catalogs := settled(t, s)
				if !catalogs[1].Known || len(catalogs[1].Tools) != 1 {
					t.Errorf("the other remote suffers: %+v", catalogs[1])
				}
				var err error
				if method == "tools/list" {
					err = s.Connect(t.Context(), "notes")
				} else {
					_, err = s.Call(t.Context(), "notes", "tools/call", nil, nil)
				}
				f := failure(t, err, tt.kind)
				if !strings.HasPrefix(f.Say, "notes ") || !strings.Contains(f.Say, tt.say) || len(f.Say) > 500 {
					t.Errorf("says %q, which has no %q", f.Say, tt.say)
				}
				if method == "tools/call" {
					if n := len(bad.requests(method)); n != 1 {
						t.Errorf("the call was sent %d times", n)
					}
					return
				}
				st := s.Status("notes")
				if st.State != StateUnavailable || st.Err == nil {
					t.Errorf("status %+v", st)
				}
				if method == "tools/list" {
					if _, err := s.Call(t.Context(), "notes", "tools/call", nil, nil); err != nil {
						t.Errorf("a call without a list: %v", err)
					}
				}
				// What failed is not remembered.
				bad.handle(method, nil)
				if err := s.Connect(t.Context(), "notes"); err != nil {
					t.Errorf("after it was mended: %v", err)
				}
				if st := s.Status("notes"); st.State != StateConnected || st.Err != nil || st.Tools != 1 {
					t.Errorf("status %+v after it was mended", st)
				}
			})
		}
	}
}

func status202(w http.ResponseWriter, _ *http.Request, _ received) {
	w.WriteHeader(http.StatusAccepted)
}

func hangUp(w http.ResponseWriter, _ *http.Request, _ received) {
	if conn, _, err := http.NewResponseController(w).Hijack(); err == nil {
		conn.Close()
	}
}

func TestHostileHandshake(t *testing.T) {
	init := func(id string, result string) handler {
		return func(w http.ResponseWriter, _ *http.Request, m received) {
			if id != "" {
				w.Header()["Mcp-Session-Id"] = strings.Split(id, "|")
			}
			answer(w, m, result)
		}
	}
	for _, tt := range []struct {
		name   string
		answer handler
		kind   Kind
		say    string
		state  State
	}{
		{"newer protocol", init("", strings.Replace(initialized, "2025-11-25", "2099-01-01", 1)), KindUnsupported, "version 2099-01-01", StateUnsupported},
		{"hostile protocol", init("", strings.Replace(initialized, "2025-11-25", strings.Repeat("é", 1000), 1)), KindUnsupported, "?", StateUnsupported},
		{"no protocol", init("", `{}`), KindBadAnswer, "no protocol version", StateUnavailable},
		{"protocol is a number", init("", `{"protocolVersion":1}`), KindBadAnswer, "no protocol version", StateUnavailable},
		{"protocol twice", init("", `{"protocolVersion":"2025-11-25","protocolVersion":"2025-11-25"}`), KindBadAnswer, "twice", StateUnavailable},
		{"session id with a space", init("a b", initialized), KindBadAnswer, "session id", StateUnavailable},
		{"session id beyond ASCII", init("é", initialized), KindBadAnswer, "session id", StateUnavailable},
		{"session id of 5 KB", init(strings.Repeat("x", 5000), initialized), KindBadAnswer, "session id", StateUnavailable},
		{"two session ids", init("a|b", initialized), KindBadAnswer, "session id", StateUnavailable},
		{"refusal", body("application/json", `{"jsonrpc":"2.0","id":%s,"error":{"code":-32600,"message":"`+canary+`"}}`), KindBadAnswer, "-32600", StateUnavailable},
		{"other era", body("application/json", `{"jsonrpc":"2.0","id":%s,"error":{"code":-32022,"message":"`+canary+`"}}`), KindUnsupported, "none of the protocol versions", StateUnsupported},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := newFake(t)
			f.handle("initialize", tt.answer)
			s := open(t, newRemoteFor(t, "notes", f.URL))
			settled(t, s)
			_, err := s.Call(t.Context(), "notes", "tools/call", nil, nil)
			if got := failure(t, err, tt.kind); !strings.Contains(got.Say, tt.say) || len(got.Say) > 300 {
				t.Errorf("says %q", got.Say)
			}
			if got := s.Status("notes").State; got != tt.state {
				t.Errorf("state %s, want %s", got, tt.state)
			}
		})
	}
}

// TestUnreachable: what keeps a connection from coming about is told apart.
func TestUnreachable(t *testing.T) {
	closed := httptest.NewServer(nil)
	closed.Close()
	tls := httptest.NewTLSServer(nil)
	t.Cleanup(tls.Close)
	plain := httptest.NewServer(nil)
	t.Cleanup(plain.Close)
	for _, tt := range []struct {
		name, url, say string
		kind           Kind
	}{
		{"nobody listens", closed.URL + "/mcp?" + canary, "connection refused", KindUnreachable},
		{"unknown authority", tls.URL + "/?" + canary, "not trusted here", KindUnreachable},
		{"no TLS", strings.Replace(plain.URL, "http:", "https:", 1) + "/?" + canary, "does not speak TLS", KindUnreachable},
		{"private address", "https://10.0.0.1/mcp?" + canary, "allowAddresses", KindBlocked},
		{"plain http", "http://192.0.2.1/mcp?" + canary, "allowAddresses", KindBlocked},
		{"no URL", "://" + canary, "allowAddresses", KindBlocked},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := open(t, newRemoteFor(t, "notes", tt.url))
			_, err := s.Call(t.Context(), "notes", "tools/call", nil, nil)
			if got := failure(t, err, tt.kind); !strings.Contains(got.Say, tt.say) {
				t.Errorf("says %q", got.Say)
			}
		})
	}
}

func TestSlowHandshake(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0") // accepts, and says nothing
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	p, _ := newPool(t, newRemoteFor(t, "notes", "https://"+l.Addr().String()))
	transport := &http.Transport{TLSHandshakeTimeout: time.Millisecond}
	p.remotes[0].client = &http.Client{Transport: transport}
	s, err := p.Open(auth.Local)
	if err != nil {
		t.Fatal(err)
	}
	_, err = s.Call(t.Context(), "notes", "tools/call", nil, nil)
	if got := failure(t, err, KindUnreachable); !strings.Contains(got.Say, "no TLS handshake") {
		t.Errorf("says %q", got.Say)
	}
}

// TestFirstResponseCounts: a stream that answers twice has answered at the
// first time, also if it stays open.
func TestFirstResponseCounts(t *testing.T) {
	f := newFake(t)
	f.handle("tools/call", func(w http.ResponseWriter, r *http.Request, m received) {
		w.Header().Set("Content-Type", "text/event-stream")
		fmt.Fprintf(w, "data: {\"jsonrpc\":\"2.0\",\"id\":%s,\"result\":{\"n\":1}}\n\n", m.ID)
		fmt.Fprintf(w, "data: {\"jsonrpc\":\"2.0\",\"id\":%s,\"result\":{\"n\":2}}\n\n", m.ID)
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	})
	s := open(t, newRemoteFor(t, "notes", f.URL))
	for range 3 {
		got, err := s.Call(t.Context(), "notes", "tools/call", nil, nil)
		if err != nil || string(got) != `{"n":1}` {
			t.Errorf("got %s, %v", got, err)
		}
	}
}

// TestCutAtEveryByte: an answer that breaks off is an error wherever it does,
// and the call is sent once.
func TestCutAtEveryByte(t *testing.T) {
	const event = "event: message\r\ndata: {\"jsonrpc\":\"2.0\",\"id\":ID,\r\ndata: \"result\":{\"a\":[1]}}\r\n\r\n"
	const object = "{\"jsonrpc\":\"2.0\",\"id\":ID,\"result\":{\"a\":[1]}}"
	for _, tt := range []struct {
		name, contentType, text string
		chunked                 bool
		enough                  int // bytes that may be missing
	}{
		{"chunked stream", "text/event-stream", ": x\n\n" + event, true, 1}, // of the last CRLF, the CR does
		{"stream that just ends", "text/event-stream", ": x\n\n" + event, false, 1},
		{"JSON of a known length", "application/json", object, true, 0},
		{"JSON that just ends", "application/json", object, false, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var cut atomic.Int64
			f := newFake(t)
			f.handle("tools/call", func(w http.ResponseWriter, _ *http.Request, m received) {
				text := strings.ReplaceAll(tt.text, "ID", string(m.ID))
				conn, rw, err := http.NewResponseController(w).Hijack()
				if err != nil {
					t.Error(err)
					return
				}
				defer conn.Close()
				// Said, because the next call must not go into the connection that ends here.
				head := "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Type: " + tt.contentType + "\r\n"
				part := text[:len(text)-int(cut.Load())]
				switch {
				case !tt.chunked:
					head += "\r\n"
				case tt.contentType == "application/json":
					head += fmt.Sprintf("Content-Length: %d\r\n\r\n", len(text))
				default:
					head += "Transfer-Encoding: chunked\r\n\r\n"
					part = fmt.Sprintf("%x\r\n%s\r\n", len(part), part)
				}
				rw.WriteString(head + part)
				rw.Flush()
			})
			s := open(t, newRemoteFor(t, "notes", f.URL))
			settled(t, s)
			for missing := range len(tt.text) - 10 {
				cut.Store(int64(missing))
				before := len(f.requests("tools/call"))
				result, err := s.Call(t.Context(), "notes", "tools/call", nil, nil)
				if missing <= tt.enough {
					if err != nil || string(result) != `{"a":[1]}` {
						t.Errorf("%d bytes missing: got %s, %v", missing, result, err)
					}
				} else if f, ok := errors.AsType[*Failure](err); !ok || f.Kind != KindCut && f.Kind != KindBadAnswer {
					t.Errorf("%d bytes missing: got %s, %v", missing, result, err)
				}
				if n := len(f.requests("tools/call")) - before; n != 1 {
					t.Errorf("%d bytes missing: the call was sent %d times", missing, n)
				}
			}
		})
	}
}

// TestStaleConnection: a TCP connection that the remote has closed in the
// meantime makes no second POST of a call that was written.
func TestStaleConnection(t *testing.T) {
	var calls atomic.Int64
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				r := bufio.NewReader(conn)
				for {
					req, err := http.ReadRequest(r)
					if err != nil {
						return
					}
					b, err := io.ReadAll(req.Body)
					if err != nil {
						return
					}
					var m struct {
						ID     json.RawMessage
						Method string
					}
					if json.Unmarshal(b, &m) != nil {
						return
					}
					switch m.Method {
					case "initialize":
						writeHTTP(conn, `{"jsonrpc":"2.0","id":`+string(m.ID)+`,"result":`+strings.Replace(initialized, `"tools":{}`, "", 1)+`}`)
					case "tools/call":
						calls.Add(1)
						return // without a word, on a connection that was good before
					default:
						writeHTTP(conn, `{}`)
					}
				}
			}()
		}
	}()
	t.Cleanup(func() { l.Close(); <-done })
	s := open(t, newRemoteFor(t, "notes", "http://"+l.Addr().String()))
	settled(t, s)
	for n := range 5 {
		_, err := s.Call(t.Context(), "notes", "tools/call", nil, nil)
		failure(t, err, KindCut)
		if got := calls.Load(); got != int64(n)+1 {
			t.Fatalf("%d calls arrived, want %d", got, n+1)
		}
	}
}

func writeHTTP(w io.Writer, body string) {
	fmt.Fprintf(w, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
}

func TestHostileLists(t *testing.T) {
	tool := func(name string) string { return `{"name":"` + name + `","inputSchema":{"type":"object"}}` }
	pages := func(each func(page int, cursor string) string) handler {
		var n atomic.Int64
		return func(w http.ResponseWriter, _ *http.Request, m received) {
			var p struct{ Cursor string }
			json.Unmarshal(m.Params, &p)
			answer(w, m, each(int(n.Add(1)), p.Cursor))
		}
	}
	many := func(n int) string {
		var b bytes.Buffer
		for i := range n {
			if i > 0 {
				b.WriteByte(',')
			}
			b.WriteString(tool(fmt.Sprint("t", i)))
		}
		return b.String()
	}
	for _, tt := range []struct {
		name   string
		answer handler
		tools  string // names, separated by commas
		say    string // of the failure instead
		warn   string
	}{
		{"none", pages(func(int, string) string { return `{"tools":[]}` }), "", "", ""},
		{"bad ones among good ones", pages(func(int, string) string {
			return `{"tools":[` + strings.Join([]string{
				tool("a"), `7`, `null`, `{}`, `{"name":""}`, `{"name":3,"inputSchema":{}}`, `{"name":"noschema"}`, `{"name":"badschema","inputSchema":[]}`,
				`{"name":"nullschema","inputSchema":null}`, `{"name":"twice","name":"twice","inputSchema":{}}`, tool(strings.Repeat("l", 600)),
				`{"name":"deep","inputSchema":{"x":` + strings.Repeat("[", 200) + strings.Repeat("]", 200) + `}}`,
				`{"name":"a","inputSchema":{"second":true}}`, `{"name":"cyclic","inputSchema":{"$ref":"#"}}`, tool("b"),
			}, ",") + `]}`
		}), "a,cyclic,b", "", "tool=deep"},
		{"three pages", pages(func(_ int, cursor string) string {
			switch cursor {
			case "":
				return `{"tools":[` + tool("a") + `],"nextCursor":"p\u0032"}`
			case "p2":
				return `{"tools":[` + tool("b") + `],"nextCursor":"\"3"}`
			case `"3`:
				return `{"tools":[` + tool("c") + `],"nextCursor":null}`
			}
			return `{"tools":[]}`
		}), "a,b,c", "", ""},
		{"the same cursor for ever", pages(func(n int, _ string) string {
			return `{"tools":[` + tool(fmt.Sprint("t", n)) + `],"nextCursor":""}`
		}), "t1,t2", "", "same cursor"},
		{"pages for ever", pages(func(n int, _ string) string {
			return fmt.Sprintf(`{"tools":[],"nextCursor":"%d"}`, n)
		}), "", "more than 200 pages", ""},
		{"huge cursor", pages(func(int, string) string {
			return `{"tools":[],"nextCursor":"` + strings.Repeat("x", 9000) + `"}`
		}), "", "cursors of more than", ""},
		{"100,001 tools", pages(func(int, string) string { return `{"tools":[` + many(100_001) + `]}` }), "", "more than 100000 tools", ""},
		{"5 million nothings", pages(func(int, string) string { return `{"tools":[` + strings.Repeat("0,", 5_000_000) + `0]}` }), "", "more than 100000 tools", ""},
		{"50 MB in one page", pages(func(int, string) string {
			return `{"tools":[{"name":"a","inputSchema":{},"x":"` + strings.Repeat("x", 50<<20) + `"}]}`
		}), "", "16 MiB", ""},
		{"75 MB in five pages", pages(func(n int, _ string) string {
			return fmt.Sprintf(`{"tools":[{"name":"t%d","inputSchema":{},"x":"%s"}],"nextCursor":"%d"}`, n, strings.Repeat("x", 15<<20), n)
		}), "", "more than 64 MiB", ""},
		{"no list", pages(func(int, string) string { return `{}` }), "", "a list of tools that is none", ""},
		{"a list that is an object", pages(func(int, string) string { return `{"tools":{}}` }), "", "a list of tools that is none", ""},
		{"list twice", pages(func(int, string) string { return `{"tools":[],"tools":[]}` }), "", "twice", ""},
		{"an error", body("application/json", `{"jsonrpc":"2.0","id":%s,"error":{"code":-32601,"message":"`+canary+`"}}`), "", "-32601", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			bad, good := newFake(t), newFake(t)
			bad.handle("tools/list", tt.answer)
			p, written := newPool(t, newRemoteFor(t, "notes", bad.URL), newRemoteFor(t, "other", good.URL))
			s, err := p.Open(auth.Local)
			if err != nil {
				t.Fatal(err)
			}
			catalogs := settled(t, s)
			if !catalogs[1].Known {
				t.Error("the other remote suffers")
			}
			st := s.Status("notes")
			if tt.say != "" {
				if f, ok := errors.AsType[*Failure](st.Err); !ok || !strings.Contains(f.Say, tt.say) || catalogs[0].Known {
					t.Errorf("got %v, want %q", st.Err, tt.say)
				}
				return
			}
			var names []string
			for _, tool := range catalogs[0].Tools {
				names = append(names, tool.Name)
			}
			if got := strings.Join(names, ","); got != tt.tools || st.State != StateConnected || st.Tools != len(names) {
				t.Errorf("got %s, want %s (%+v)", got, tt.tools, st)
			}
			if !strings.Contains(written.String(), tt.warn) {
				t.Errorf("no %q in the log:\n%s", tt.warn, written)
			}
		})
	}
}

// TestSlowRemoteHarmsNobody: the list is there although one remote hangs.
func TestSlowRemoteHarmsNobody(t *testing.T) {
	for _, method := range []string{"initialize", "notifications/initialized", "tools/list"} {
		bad, good := newFake(t), newFake(t)
		bad.handle(method, func(_ http.ResponseWriter, r *http.Request, _ received) { <-r.Context().Done() })
		s := open(t, newRemoteFor(t, "bad", bad.URL), newRemoteFor(t, "good", good.URL))
		changed := make(chan struct{}, 10)
		s.OnChange(func() { changed <- struct{}{} })
		for !s.Catalogs(ended(t))[1].Known {
			<-changed
		}
		if got := s.Status("bad"); got.State != StateConnecting {
			t.Errorf("hang in %s: %+v", method, got)
		}
		began := time.Now()
		s.pool.Close()
		if took := time.Since(began); took > 5*time.Second {
			t.Errorf("hang in %s: closing took %v", method, took)
		}
	}
}
