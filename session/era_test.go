package session

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"gatehouse/auth"
)

const discovered = `{"resultType":"complete","supportedVersions":["2026-07-28"],"capabilities":{"tools":{"listChanged":true},"prompts":{},"resources":{"subscribe":true}},"_meta":{"io.modelcontextprotocol/serverInfo":{"name":"new","version":"2"}}}`

// newModern is a fake of protocol 2026-07-28.
func newModern(t testing.TB) *fake {
	t.Helper()
	f := newFake(t)
	f.result("server/discover", discovered)
	f.result("prompts/list", `{"prompts":[]}`)
	f.result("resources/list", `{"resources":[]}`)
	f.result("resources/templates/list", `{"resourceTemplates":[]}`)
	f.handle("subscriptions/listen", func(w http.ResponseWriter, r *http.Request, m received) {
		w.Header().Set("Content-Type", "text/event-stream")
		fmt.Fprint(w, "data: {\"jsonrpc\":\"2.0\",\"method\":\"notifications/subscriptions/acknowledged\",\"params\":{}}\n\n")
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	})
	return f
}

// TestModernRequests: each request says all about itself, in headers and _meta;
// there is no handshake, no session and no cancellation but the closed stream.
func TestModernRequests(t *testing.T) {
	f := newModern(t)
	f.result("tools/list", `{"tools":[
		{"name":"plain","inputSchema":{"type":"object"}},
		{"name":"größe","inputSchema":{"type":"object","properties":{"region":{"type":"string","x-mcp-header":"Region"},
			"deep":{"type":"object","properties":{"n":{"type":"integer","x-mcp-header":"N"}}},"on":{"type":"boolean","x-mcp-header":"On"}}}},
		{"name":"bad","inputSchema":{"type":"object","properties":{"o":{"type":"object","x-mcp-header":"O"}}}},
		{"name":"twice","inputSchema":{"type":"object","properties":{"a":{"type":"string","x-mcp-header":"X"},"b":{"type":"string","x-mcp-header":"x"}}}}]}`)
	p, written := newPool(t, newRemoteFor(t, "notes", f.URL))
	s, err := p.Open(auth.Local)
	if err != nil {
		t.Fatal(err)
	}
	catalogs := settled(t, s)
	if len(catalogs[0].Tools) != 2 {
		t.Errorf("got %+v", catalogs[0].Tools)
	}
	if st := s.Status("notes"); st.Protocol != "2026-07-28" || st.Server != "new" || st.Version != "2" {
		t.Errorf("got %+v", st)
	}
	s.SetLogLevel("debug")
	from := &Caller{Modern: true, Capabilities: json.RawMessage(`{"roots":{},"experimental":{"x":{}},"extensions":{"io.modelcontextprotocol/tasks":{},"ui":{"a":1.0}}}`)}
	_, err = s.Call(t.Context(), "notes", "tools/call",
		json.RawMessage(`{"name":"größe","arguments":{"region":" eu ","deep":{"n":1e2},"on":true},"_meta":{"io.modelcontextprotocol/clientInfo":{"name":"theirs"},"mine":1.0}}`), from)
	if err != nil {
		t.Fatal(err)
	}
	call := f.requests("tools/call")[0]
	for name, want := range map[string]string{
		"Mcp-Protocol-Version": "2026-07-28", "Mcp-Method": "tools/call", "Mcp-Name": "=?base64?Z3LDtsOfZQ==?=",
		"Mcp-Param-Region": "=?base64?IGV1IA==?=", "Mcp-Param-N": "100", "Mcp-Param-On": "true", "Mcp-Session-Id": "",
	} {
		if got := call.Header.Get(name); got != want {
			t.Errorf("%s: got %q, want %q", name, got, want)
		}
	}
	want := `{"name":"größe","arguments":{"region":" eu ","deep":{"n":1e2},"on":true},"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientInfo":{"name":"gatehouse","version":"test"},"io.modelcontextprotocol/clientCapabilities":{"roots":{},"extensions":{"ui":{"a":1.0}}},"io.modelcontextprotocol/logLevel":"debug","mine":1.0}}`
	if string(call.Params) != want {
		t.Errorf("got  %s\nwant %s", call.Params, want)
	}
	closed := make(chan struct{})
	ctx, cancel := context.WithCancel(t.Context())
	f.handle("tools/call", func(_ http.ResponseWriter, r *http.Request, _ received) {
		cancel()
		<-r.Context().Done()
		close(closed)
	})
	if _, err := s.Call(ctx, "notes", "tools/call", json.RawMessage(`{"name":"plain"}`), from); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	<-closed
	p.Close()
	for _, method := range []string{"initialize", "notifications/initialized", "notifications/cancelled", "logging/setLevel", "DELETE", "GET"} {
		if n := len(f.requests(method)); n != 0 {
			t.Errorf("%d of %s", n, method)
		}
	}
	if log := written.String(); strings.Count(log, "tool left out") != 2 {
		t.Errorf("the log says %s", log)
	}
}

// TestHeaderMismatch: annotations that have changed are read again, and the call
// is made once more; never twice, and never for another reason.
func TestHeaderMismatch(t *testing.T) {
	f := newModern(t)
	var calls atomic.Int64
	mismatch := func(w http.ResponseWriter, _ *http.Request, m received) {
		calls.Add(1)
		if m.Header.Get("Mcp-Param-New") == "" {
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(http.StatusBadRequest)
			fmt.Fprint(w, `{"jsonrpc":"2.0","id":null,"error":{"code":-32020,"message":"header mismatch"}}`)
			return
		}
		answer(w, m, `{"content":[]}`)
	}
	f.handle("tools/call", mismatch)
	s := open(t, newRemoteFor(t, "notes", f.URL))
	settled(t, s)
	params := json.RawMessage(`{"name":"echo","arguments":{"a":"b"}}`)
	_, err := s.Call(t.Context(), "notes", "tools/call", params, &Caller{Modern: true})
	if refusal, ok := errors.AsType[*ResponseError](err); !ok || refusal.Code != codeHeaderMismatch || calls.Load() != 2 {
		t.Errorf("got %v after %d calls", err, calls.Load())
	}
	f.result("tools/list", `{"tools":[{"name":"echo","inputSchema":{"properties":{"a":{"type":"string","x-mcp-header":"New"}}}}]}`)
	calls.Store(0)
	if _, err := s.Call(t.Context(), "notes", "tools/call", params, &Caller{Modern: true}); err != nil || calls.Load() != 2 {
		t.Errorf("got %v after %d calls", err, calls.Load())
	}
	f.handle("tools/call", func(w http.ResponseWriter, _ *http.Request, m received) {
		calls.Add(1)
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusNotFound)
		fmt.Fprintf(w, `{"jsonrpc":"2.0","id":%s,"error":{"code":-32601,"message":"no such method"}}`, m.ID)
	})
	calls.Store(0)
	if _, err := s.Call(t.Context(), "notes", "tools/call", params, &Caller{Modern: true}); err == nil || calls.Load() != 1 {
		t.Errorf("got %v after %d calls", err, calls.Load())
	}
}

// TestFallback: whatever an old remote answers to server/discover, it is dialed
// the old way, and from then on only so.
func TestFallback(t *testing.T) {
	rpc := func(status int, id, error string) func(http.ResponseWriter, *http.Request, received) {
		return func(w http.ResponseWriter, _ *http.Request, m received) {
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(status)
			if id == "" {
				id = string(m.ID)
			}
			fmt.Fprintf(w, `{"jsonrpc":"2.0","id":%s,"error":%s}`, id, error)
		}
	}
	plain := func(status int, kind, body string) func(http.ResponseWriter, *http.Request, received) {
		return func(w http.ResponseWriter, _ *http.Request, _ received) {
			w.Header().Set("Content-Type", kind)
			w.WriteHeader(status)
			fmt.Fprint(w, body)
		}
	}
	for name, answers := range map[string]func(http.ResponseWriter, *http.Request, received){
		"method not found": rpc(200, "", `{"code":-32601,"message":"no"}`),
		"no session":       rpc(400, "null", `{"code":-32000,"message":"Bad Request: No valid session ID provided"}`),
		"unsupported":      rpc(400, "", `{"code":-32022,"message":"no","data":{"supported":["2025-11-25"]}}`),
		"404":              plain(404, "text/plain", "not found"),
		"405":              plain(405, "text/plain", ""),
		"500":              plain(500, "text/plain", "oops"),
		"a page":           plain(200, "text/html", "<html>"),
		"nothing":          plain(202, "", ""),
		"old versions only": func(w http.ResponseWriter, _ *http.Request, m received) {
			answer(w, m, `{"supportedVersions":["2025-11-25"]}`)
		},
		"nonsense":       func(w http.ResponseWriter, _ *http.Request, m received) { answer(w, m, `{}`) },
		"cut":            func(http.ResponseWriter, *http.Request, received) { panic(http.ErrAbortHandler) },
		"an empty event": plain(200, "text/event-stream", ": hello\n\n"),
	} {
		t.Run(name, func(t *testing.T) {
			f := newFake(t)
			f.handle("server/discover", answers)
			p, _ := newPool(t, newRemoteFor(t, "notes", f.URL))
			for _, subject := range []string{"one", "two"} {
				s, err := p.Open(auth.Principal{Issuer: "i", Subject: subject})
				if err != nil {
					t.Fatal(err)
				}
				settled(t, s)
				if st := s.Status("notes"); st.State != StateConnected || st.Protocol != offered {
					t.Errorf("got %+v", st)
				}
			}
			want := 1
			switch name {
			case "500", "cut", "an empty event":
				want = 2 // that may have been a bad moment
			}
			if n := len(f.requests("server/discover")); n != want {
				t.Errorf("asked %d times, want %d", n, want)
			}
		})
	}
	t.Run("a remote that changes", func(t *testing.T) {
		f := newFake(t)
		s := open(t, newRemoteFor(t, "notes", f.URL))
		settled(t, s)
		f.result("server/discover", discovered)
		f.handle("initialize", plain(404, "text/plain", "gone"))
		f.handle("tools/call", func(w http.ResponseWriter, _ *http.Request, m received) {
			if m.Header.Get("Mcp-Session-Id") != "" {
				w.WriteHeader(http.StatusNotFound)
				return
			}
			answer(w, m, `{"content":[]}`)
		})
		for try := 0; ; try++ {
			_, err := s.Call(t.Context(), "notes", "tools/call", json.RawMessage(`{"name":"echo"}`), nil)
			if err == nil {
				break
			} else if try == 3 {
				t.Fatal(err)
			}
		}
	})
}

// TestListening: what a remote of the modern era has to say comes on one stream,
// which is asked anew, without a gap, when other resources matter.
func TestListening(t *testing.T) {
	f := newModern(t)
	type stream struct {
		params string
		say    chan string
		gone   <-chan struct{}
	}
	streams := make(chan stream, 10)
	f.handle("subscriptions/listen", func(w http.ResponseWriter, r *http.Request, m received) {
		var params struct {
			Notifications json.RawMessage `json:"notifications"`
		}
		if err := json.Unmarshal(m.Params, &params); err != nil {
			t.Error(err)
		}
		st := stream{string(params.Notifications), make(chan string), r.Context().Done()}
		w.Header().Set("Content-Type", "text/event-stream")
		fmt.Fprint(w, "data: {\"jsonrpc\":\"2.0\",\"method\":\"notifications/subscriptions/acknowledged\",\"params\":{}}\n\n")
		w.(http.Flusher).Flush()
		streams <- st
		for {
			select {
			case say := <-st.say:
				fmt.Fprintf(w, "data: {\"jsonrpc\":\"2.0\",%s}\n\n", say)
				w.(http.Flusher).Flush()
			case <-r.Context().Done():
				return
			}
		}
	})
	s := open(t, newRemoteFor(t, "notes", f.URL))
	settled(t, s)
	updates := make(chan string, 10)
	s.OnUpdated(func(_, _ string, params json.RawMessage) { updates <- string(params) })
	first := <-streams
	if first.params != `{"toolsListChanged":true}` {
		t.Errorf("asked for %s", first.params)
	}
	changed := make(chan struct{}, 10)
	defer s.OnChange(func() { changed <- struct{}{} })()
	f.result("tools/list", `{"tools":[]}`)
	first.say <- `"method":"notifications/tools/list_changed"`
	<-changed
	if got := settled(t, s); len(got[0].Tools) != 0 {
		t.Errorf("got %+v", got)
	}
	if err := s.Subscribe(t.Context(), "notes", "a:1"); err != nil {
		t.Fatal(err)
	}
	second := <-streams
	if second.params != `{"toolsListChanged":true,"resourceSubscriptions":["a:1"]}` {
		t.Errorf("asked for %s", second.params)
	}
	<-first.gone
	second.say <- `"method":"notifications/resources/updated","params":{"uri":"a:2"}`
	// Which of our streams it came on is nobody else's business.
	second.say <- `"method":"notifications/resources/updated","params":{"uri":"a:1","_meta":{"io.modelcontextprotocol/subscriptionId":7,"x":1}}`
	if got := <-updates; got != `{"uri":"a:1","_meta":{"x":1}}` {
		t.Errorf("got %s", got)
	}
	if err := s.Unsubscribe(t.Context(), "notes", "a:1"); err != nil {
		t.Fatal(err)
	}
	if third := <-streams; third.params != `{"toolsListChanged":true}` {
		t.Errorf("asked for %s", third.params)
	}
	<-second.gone
}

// TestListeningUnacknowledged: a remote that never acknowledges what it is asked
// to tell is told at once what else is wanted.
func TestListeningUnacknowledged(t *testing.T) {
	f := newModern(t)
	asked := make(chan string, 10)
	f.handle("subscriptions/listen", func(w http.ResponseWriter, r *http.Request, m received) {
		var params struct {
			Notifications struct {
				URIs []string `json:"resourceSubscriptions"`
			} `json:"notifications"`
		}
		if err := json.Unmarshal(m.Params, &params); err != nil {
			t.Error(err)
		}
		w.Header().Set("Content-Type", "text/event-stream")
		w.(http.Flusher).Flush()
		asked <- strings.Join(params.Notifications.URIs, " ")
		<-r.Context().Done()
	})
	s := open(t, newRemoteFor(t, "notes", f.URL))
	settled(t, s)
	began := time.Now()
	for _, want := range []string{"", "a:1", "a:1 a:2"} {
		if got := <-asked; got != want {
			t.Errorf("asked for %q, want %q", got, want)
		}
		impatient, cancel := context.WithCancel(t.Context())
		if err := s.Connect(impatient, "notes"); err != nil {
			t.Fatal(err)
		}
		cancel() // who subscribes would wait for the acknowledgement
		if err := s.Subscribe(impatient, "notes", "a:"+fmt.Sprint(1+len(strings.Fields(want)))); err != nil {
			t.Fatal(err)
		}
	}
	if took := time.Since(began); took > ackWait {
		t.Errorf("it took %v", took)
	}
}

// asks is a legacy fake whose tool asks its caller's client, on the stream of
// the call, and answers with what it was told.
func asks(t testing.TB) *fake {
	f := newFake(t)
	var sessions atomic.Int64
	f.handle("initialize", func(w http.ResponseWriter, _ *http.Request, m received) {
		w.Header().Set("Mcp-Session-Id", fmt.Sprint("s", sessions.Add(1)))
		answer(w, m, initialized)
	})
	f.handle("GET", func(w http.ResponseWriter, _ *http.Request, _ received) { w.WriteHeader(http.StatusMethodNotAllowed) })
	var mu sync.Mutex
	waiting := map[string]chan string{}
	f.handle("", func(w http.ResponseWriter, _ *http.Request, m received) {
		mu.Lock()
		answered := waiting[m.Header.Get("Mcp-Session-Id")+" "+string(m.ID)]
		mu.Unlock()
		w.WriteHeader(http.StatusAccepted)
		if answered != nil {
			answered <- m.Body
		}
	})
	var ids atomic.Int64
	f.handle("tools/call", func(w http.ResponseWriter, r *http.Request, m received) {
		id, answered := ids.Add(1), make(chan string, 1)
		mu.Lock()
		waiting[fmt.Sprint(m.Header.Get("Mcp-Session-Id"), " ", id)] = answered
		mu.Unlock()
		w.Header().Set("Content-Type", "text/event-stream")
		fmt.Fprintf(w, "data: {\"jsonrpc\":\"2.0\",\"id\":%d,\"method\":\"elicitation/create\",\"params\":{\"message\":\"who?\"}}\n\n", id)
		w.(http.Flusher).Flush()
		select {
		case said := <-answered:
			quoted, err := json.Marshal(said)
			if err != nil {
				t.Error(err)
			}
			fmt.Fprintf(w, "data: {\"jsonrpc\":\"2.0\",\"id\":%s,\"result\":{\"said\":%s}}\n\n", m.ID, quoted)
		case <-r.Context().Done():
		}
	})
	return f
}

// TestAskers: of many clients of one principal with calls at once each is asked
// for its own call alone, and its connection declares what it can do.
func TestAskers(t *testing.T) {
	f := asks(t)
	s := open(t, newRemoteFor(t, "notes", f.URL))
	settled(t, s)
	var wg sync.WaitGroup
	for i := range 32 {
		name := fmt.Sprint("client-", i)
		from := &Caller{
			Client: name, Capabilities: json.RawMessage(fmt.Sprintf(`{"elicitation":{"form":{}},"roots":{"n":%d}}`, i%2)),
			Ask: func(context.Context, string, json.RawMessage) (json.RawMessage, error) {
				return json.RawMessage(`{"action":"` + name + `"}`), nil
			},
		}
		for range 4 {
			wg.Go(func() {
				got, err := s.Call(t.Context(), "notes", "tools/call", nil, from)
				if err != nil || !strings.Contains(string(got), name+`\"`) {
					t.Errorf("%s got %s, %v", name, got, err)
				}
			})
		}
	}
	wg.Wait()
	declared := map[string]int{}
	for _, m := range f.requests("initialize") {
		var params struct{ Capabilities json.RawMessage }
		if err := json.Unmarshal(m.Params, &params); err != nil {
			t.Fatal(err)
		}
		declared[string(params.Capabilities)]++
	}
	want := map[string]int{`{}`: 1, `{"elicitation":{"form":{}},"roots":{"n":0}}`: 16, `{"elicitation":{"form":{}},"roots":{"n":1}}`: 16}
	if diff := cmp.Diff(want, declared); diff != "" {
		t.Error(diff)
	}
	s.Leave("client-3")
	s.Disconnect("notes")
	// One that is cut off in the middle of initialize nobody can end.
	if err := s.Connect(t.Context(), "notes"); err != nil {
		t.Fatal(err)
	}
	s.Close()
	if got, want := len(f.requests("DELETE")), len(f.requests("initialize")); got != want {
		t.Errorf("%d of %d MCP sessions were ended", got, want)
	}
}

// TestLateAsker: a call that is still on its way when its client leaves opens
// nothing for it any more.
func TestLateAsker(t *testing.T) {
	f := asks(t)
	s := open(t, newRemoteFor(t, "notes", f.URL))
	settled(t, s)
	gone := make(chan struct{})
	close(gone)
	s.Leave("client")
	_, err := s.Call(t.Context(), "notes", "tools/call", nil, &Caller{Client: "client", Gone: gone, Capabilities: json.RawMessage(`{"elicitation":{}}`)})
	if !errors.Is(err, ErrClosed) {
		t.Errorf("got %v", err)
	}
	if n := len(f.requests("initialize")); n != 1 {
		t.Errorf("%d MCP sessions were begun", n)
	}
}

// TestManyAskers: more clients at once than links are kept get their answers,
// and afterwards there are no more links than that.
func TestManyAskers(t *testing.T) {
	f := asks(t)
	s := open(t, newRemoteFor(t, "notes", f.URL))
	settled(t, s)
	const clients = maxSides + 6
	var all, wg sync.WaitGroup
	all.Add(clients)
	for i := range clients {
		from := &Caller{Client: i, Capabilities: json.RawMessage(`{"elicitation":{}}`), Ask: func(context.Context, string, json.RawMessage) (json.RawMessage, error) {
			all.Done()
			all.Wait()
			return json.RawMessage(`{"action":"accept"}`), nil
		}}
		wg.Go(func() {
			if _, err := s.Call(t.Context(), "notes", "tools/call", nil, from); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	c := s.byName["notes"]
	c.mu.Lock()
	defer c.mu.Unlock()
	if n := len(c.sides); n > maxSides {
		t.Errorf("%d links are kept", n)
	}
}

// TestGoodbyeAtClose: who closes a session waits also for the goodbyes that began
// while it was closing.
func TestGoodbyeAtClose(t *testing.T) {
	f := asks(t)
	gate, said := make(chan struct{}), make(chan struct{}, 1)
	f.handle("DELETE", func(w http.ResponseWriter, _ *http.Request, m received) {
		if m.Header.Get("Mcp-Session-Id") == "s2" {
			said <- struct{}{}
			<-gate
		}
		w.WriteHeader(http.StatusNoContent)
	})
	s := open(t, newRemoteFor(t, "notes", f.URL))
	settled(t, s)
	from := &Caller{Client: "client", Capabilities: json.RawMessage(`{"elicitation":{}}`), Ask: func(context.Context, string, json.RawMessage) (json.RawMessage, error) {
		return json.RawMessage(`{"action":"accept"}`), nil
	}}
	if _, err := s.Call(t.Context(), "notes", "tools/call", nil, from); err != nil {
		t.Fatal(err)
	}
	s.enter() // something is still under way
	closed := make(chan struct{})
	go func() {
		s.Close()
		close(closed)
	}()
	<-s.ctx.Done()
	s.Leave("client")
	<-said
	s.wg.Done()
	select {
	case <-closed:
		t.Error("closed while a goodbye was under way")
	case <-time.After(200 * time.Millisecond):
	}
	close(gate)
	<-closed
}

// TestNotAskable: who has not declared it is not asked, and a person's silence is
// not the remote's slowness.
func TestNotAskable(t *testing.T) {
	f := asks(t)
	r := newRemoteFor(t, "notes", f.URL)
	s := open(t, r)
	settled(t, s)
	for _, capabilities := range []string{"", "{}", `{"sampling":{}}`, `{"elicitation":{"url":{}}}`, `{"elicitation":7}`} {
		from := &Caller{Client: "c", Capabilities: json.RawMessage(capabilities), Ask: func(context.Context, string, json.RawMessage) (json.RawMessage, error) {
			t.Errorf("%s: the client was asked", capabilities)
			return nil, nil
		}}
		got, err := s.Call(t.Context(), "notes", "tools/call", nil, from)
		if err != nil || !strings.Contains(string(got), "has not declared") {
			t.Errorf("%s: got %s, %v", capabilities, got, err)
		}
	}
	// An ask ends with its call.
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	from := &Caller{Client: "c", Capabilities: json.RawMessage(`{"elicitation":{}}`), Ask: func(ctx context.Context, _ string, _ json.RawMessage) (json.RawMessage, error) {
		cancel()
		<-ctx.Done()
		close(ended)
		return nil, ctx.Err()
	}}
	// What the remote makes of it may still be heard, or not.
	if _, err := s.Call(ctx, "notes", "tools/call", nil, from); err != nil && !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	<-ended
}

// TestPatience: a call's deadline stands still while its client is asked.
func TestPatience(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var expired atomic.Bool
		p := &patience{length: time.Minute, timer: time.AfterFunc(time.Minute, func() { expired.Store(true) })}
		time.Sleep(50 * time.Second)
		p.pause()
		p.pause()
		time.Sleep(time.Hour)
		p.resume()
		time.Sleep(time.Hour)
		p.resume()
		time.Sleep(59 * time.Second)
		synctest.Wait()
		if expired.Load() {
			t.Error("the time that the client took was counted")
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if !expired.Load() {
			t.Error("there is no deadline any more")
		}
	})
}

// TestResume: an answer that is cut is fetched where it broke off, if the stream
// says where; otherwise, and when that does not help, it is an error.
func TestResume(t *testing.T) {
	f := newFake(t)
	f.handle("tools/call", func(w http.ResponseWriter, _ *http.Request, m received) {
		w.Header().Set("Content-Type", "text/event-stream")
		id := ""
		if strings.Contains(string(m.Params), "resumable") {
			id = "id: " + string(m.ID) + "\nretry: 1\n"
		}
		fmt.Fprintf(w, "%sdata:\n\n", id)
	})
	var lost atomic.Bool
	f.handle("GET", func(w http.ResponseWriter, _ *http.Request, m received) {
		last := m.Header.Get("Last-Event-Id")
		if last == "" || lost.Load() {
			w.WriteHeader(http.StatusMethodNotAllowed)
			return
		}
		w.Header().Set("Content-Type", "text/event-stream")
		fmt.Fprintf(w, "data: {\"jsonrpc\":\"2.0\",\"id\":%s,\"result\":{\"resumed\":true}}\n\n", last)
	})
	s := open(t, newRemoteFor(t, "notes", f.URL))
	settled(t, s)
	got, err := s.Call(t.Context(), "notes", "tools/call", json.RawMessage(`{"name":"resumable"}`), nil)
	if err != nil || string(got) != `{"resumed":true}` {
		t.Errorf("got %s, %v", got, err)
	}
	_, err = s.Call(t.Context(), "notes", "tools/call", json.RawMessage(`{"name":"other"}`), nil)
	failure(t, err, KindCut)
	lost.Store(true)
	_, err = s.Call(t.Context(), "notes", "tools/call", json.RawMessage(`{"name":"resumable"}`), nil)
	failure(t, err, KindCut)
	if n := len(f.requests("tools/call")); n != 3 {
		t.Errorf("%d calls were sent", n)
	}
}

// TestEraIsNotForgotten: that a remote of both eras has no time for the legacy
// one does not mean that it does not speak that.
func TestEraIsNotForgotten(t *testing.T) {
	f := asks(t)
	f.result("server/discover", discovered)
	f.result("prompts/list", `{"prompts":[]}`)
	f.result("resources/list", `{"resources":[]}`)
	f.result("resources/templates/list", `{"resourceTemplates":[]}`)
	f.mu.Lock()
	initialize, call := f.on["initialize"], f.on["tools/call"]
	f.mu.Unlock()
	f.handle("initialize", func(w http.ResponseWriter, _ *http.Request, _ received) { w.WriteHeader(http.StatusServiceUnavailable) })
	f.result("tools/call", `{"modern":true}`)
	s := open(t, newRemoteFor(t, "notes", f.URL))
	settled(t, s)
	from := &Caller{
		Client: "c", Capabilities: json.RawMessage(`{"elicitation":{"form":{}}}`),
		Ask: func(context.Context, string, json.RawMessage) (json.RawMessage, error) {
			return json.RawMessage(`{"action":"me"}`), nil
		},
	}
	if got, err := s.Call(t.Context(), "notes", "tools/call", nil, from); err != nil || string(got) != `{"modern":true}` {
		t.Errorf("got %s, %v", got, err)
	}
	f.handle("initialize", initialize)
	f.handle("tools/call", call)
	if got, err := s.Call(t.Context(), "notes", "tools/call", nil, from); err != nil || !strings.Contains(string(got), `me\"`) {
		t.Errorf("got %s, %v", got, err)
	}
	if calls := f.requests("tools/call"); len(calls) != 2 || calls[1].Header.Get("Mcp-Session-Id") == "" {
		t.Error("the legacy era was not used")
	}
}

// TestAsksAreBounded: a remote asks a client so often in one call, however its
// requests come, and no more.
func TestAsksAreBounded(t *testing.T) {
	const ask = "data: {\"jsonrpc\":\"2.0\",\"id\":%d,\"method\":\"elicitation/create\",\"params\":{}}\n\n"
	var asked atomic.Int64
	heard := make(chan struct{})
	from := &Caller{
		Client: "c", Capabilities: json.RawMessage(`{"elicitation":{}}`),
		Notify: func(string, json.RawMessage) { close(heard) },
		Ask: func(context.Context, string, json.RawMessage) (json.RawMessage, error) {
			asked.Add(1)
			return json.RawMessage(`{"action":"cancel"}`), nil
		},
	}
	t.Run("on the event stream", func(t *testing.T) {
		f := newFake(t)
		calling := make(chan json.RawMessage, 1)
		f.handle("GET", func(w http.ResponseWriter, r *http.Request, _ received) {
			w.Header().Set("Content-Type", "text/event-stream")
			w.(http.Flusher).Flush()
			select {
			case token := <-calling:
				for i := range 3 * maxRequests {
					fmt.Fprintf(w, ask, i)
				}
				fmt.Fprintf(w, "data: {\"jsonrpc\":\"2.0\",\"method\":\"notifications/progress\",\"params\":{\"progressToken\":%s}}\n\n", token)
				w.(http.Flusher).Flush()
			case <-r.Context().Done():
			}
			<-r.Context().Done()
		})
		f.handle("tools/call", func(w http.ResponseWriter, _ *http.Request, m received) {
			calling <- m.ID
			<-heard
			answer(w, m, `{}`)
		})
		s := open(t, newRemoteFor(t, "notes", f.URL))
		settled(t, s)
		if _, err := s.Call(t.Context(), "notes", "tools/call", json.RawMessage(`{"_meta":{"progressToken":1}}`), from); err != nil {
			t.Error(err)
		}
		if n := asked.Swap(0); n == 0 || n > maxRequests {
			t.Errorf("asked %d times", n)
		}
	})
	t.Run("by resuming", func(t *testing.T) {
		f := newFake(t)
		cut := func(w http.ResponseWriter, _ *http.Request, m received) {
			last := m.Header.Get("Last-Event-Id")
			if m.Method == "GET" && last == "" {
				w.WriteHeader(http.StatusMethodNotAllowed)
				return
			}
			w.Header().Set("Content-Type", "text/event-stream")
			fmt.Fprintf(w, "retry: 1\nid: %s0\ndata:\n\n", last)
			for i := range maxRequests / 2 {
				fmt.Fprintf(w, ask, i)
			}
		}
		f.handle("GET", cut)
		f.handle("tools/call", cut)
		r := newRemoteFor(t, "notes", f.URL)
		r.Timeout = 3 * time.Second
		s := open(t, r)
		settled(t, s)
		_, err := s.Call(t.Context(), "notes", "tools/call", nil, from)
		failure(t, err, KindBadAnswer)
		if n := asked.Load(); n == 0 || n > maxRequests {
			t.Errorf("asked %d times", n)
		}
	})
}

// TestEnvelopeIsOurs: what a client writes of protocol 2026-07-28 under _meta never
// reaches a remote, however it is written; its own members do.
func TestEnvelopeIsOurs(t *testing.T) {
	for in, want := range map[string]string{
		`{"_meta":{"io.modelcontextprotocol/clientInfo":{},"a":1.0}}`:                `{"_meta":{"a":1.0}}`,
		`{"_meta":{"io.modelcontextprotocol\\/clientCapabilities":{"x":1},"a":1.0}}`: `{"_meta":{"a":1.0}}`,
		`{"\\u005fmeta":{"io.modelcontextprotocol/logLevel":"debug"}}`:               `{"\\u005fmeta":{}}`,
		`{"_meta":{"io.modelcontextprotocol/related-task":{"taskId":"1"}}}`:          `{"_meta":{"io.modelcontextprotocol/related-task":{"taskId":"1"}}}`,
		`{"arguments":{"_meta":{"io.modelcontextprotocol/clientInfo":{}}}}`:          `{"arguments":{"_meta":{"io.modelcontextprotocol/clientInfo":{}}}}`,
		`{"_meta":7}`: `{"_meta":7}`,
	} {
		in, want = strings.ReplaceAll(in, `\\`, `\`), strings.ReplaceAll(want, `\\`, `\`)
		if got, err := withoutEnvelope(json.RawMessage(in)); err != nil || string(got) != want {
			t.Errorf("%s\n got %s, %v\nwant %s", in, got, err, want)
		}
	}
}

// TestOutageIsNoEra: a remote of both eras that is down while it is asked is asked
// again, and not taken for an old one for good.
func TestOutageIsNoEra(t *testing.T) {
	f := newModern(t)
	var asked atomic.Int64
	f.handle("server/discover", func(w http.ResponseWriter, _ *http.Request, m received) {
		if asked.Add(1) == 1 {
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		answer(w, m, discovered)
	})
	p, _ := newPool(t, newRemoteFor(t, "notes", f.URL))
	for i, want := range []string{offered, modernVersion} {
		s, err := p.Open(auth.Principal{Issuer: "i", Subject: fmt.Sprint(i)})
		if err != nil {
			t.Fatal(err)
		}
		settled(t, s)
		if got := s.Status("notes").Protocol; got != want {
			t.Errorf("%d: got %s, want %s", i, got, want)
		}
	}
}
