package session

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/modelcontextprotocol/go-sdk/mcp"

	"gatehouse/auth"
)

// sdkServer is a real MCP server with a tool that reports progress.
func sdkServer(t testing.TB, json bool) string {
	t.Helper()
	server := mcp.NewServer(&mcp.Implementation{Name: "real", Version: "7"}, nil)
	type in struct {
		Steps int `json:"steps"`
	}
	mcp.AddTool(server, &mcp.Tool{Name: "walk", Description: "walks"}, func(ctx context.Context, req *mcp.CallToolRequest, args in) (*mcp.CallToolResult, any, error) {
		for i := range args.Steps {
			if json { // it would go to a stream that we do not hold
				break
			}
			if err := req.Session.NotifyProgress(ctx, &mcp.ProgressNotificationParams{
				ProgressToken: req.Params.GetProgressToken(), Progress: float64(i + 1),
			}); err != nil {
				return nil, nil, err
			}
		}
		return &mcp.CallToolResult{Content: []mcp.Content{&mcp.TextContent{Text: fmt.Sprintf("%d steps", args.Steps)}}}, nil, nil
	})
	handler := mcp.NewStreamableHTTPHandler(func(*http.Request) *mcp.Server { return server }, &mcp.StreamableHTTPOptions{JSONResponse: json})
	srv := httptest.NewServer(handler)
	t.Cleanup(srv.Close)
	// Before the handler's sessions are checked for leaks.
	t.Cleanup(func() {
		for ss := range server.Sessions() {
			ss.Close()
		}
	})
	return srv.URL
}

func TestRealServer(t *testing.T) {
	for _, tt := range []struct {
		name string
		json bool
	}{{"event stream", false}, {"JSON", true}} {
		t.Run(tt.name, func(t *testing.T) {
			s := open(t, newRemoteFor(t, "real", sdkServer(t, tt.json)))
			catalogs := settled(t, s)
			if len(catalogs) != 1 || !catalogs[0].Known || len(catalogs[0].Tools) != 1 || catalogs[0].Tools[0].Name != "walk" ||
				catalogs[0].Tools[0].Description != "walks" {
				t.Fatalf("got catalogs %+v", catalogs)
			}
			var progress []string
			result, err := s.Call(t.Context(), "real", "tools/call",
				json.RawMessage(`{"name":"walk","arguments":{"steps":3},"_meta":{"progressToken":"mine"}}`),
				&Caller{Notify: func(method string, params json.RawMessage) { progress = append(progress, method+string(params)) }})
			if err != nil {
				t.Fatal(err)
			}
			if want := `{"content":[{"type":"text","text":"3 steps"}]}`; string(result) != want {
				t.Errorf("got %s, want %s", result, want)
			}
			if !tt.json {
				want := []string{
					`notifications/progress{"progressToken":"mine","progress":1}`,
					`notifications/progress{"progressToken":"mine","progress":2}`,
					`notifications/progress{"progressToken":"mine","progress":3}`,
				}
				if diff := cmp.Diff(want, progress); diff != "" {
					t.Error(diff)
				}
			}
			st := s.Status("real")
			if st.State != StateConnected || st.Err != nil || st.Tools != 1 || st.Server != "real" || st.Version != "7" || st.Protocol != offered {
				t.Errorf("got status %+v", st)
			}
			_, err = s.Call(t.Context(), "real", "tools/call", json.RawMessage(`{"name":"nosuch"}`), nil)
			if refusal, ok := errors.AsType[*ResponseError](err); !ok || refusal.Code != -32602 || !strings.Contains(refusal.Message, "nosuch") {
				t.Errorf("unknown tool: got %v", err)
			}
		})
	}
}

func TestHandshakeAndGoodbye(t *testing.T) {
	f := newFake(t)
	f.handle("initialize", func(w http.ResponseWriter, r *http.Request, m received) {
		w.Header().Set("Mcp-Session-Id", "s1")
		answer(w, m, strings.Replace(initialized, "2025-11-25", "2025-06-18", 1))
	})
	p, _ := newPool(t, newRemoteFor(t, "notes", f.URL))
	s, err := p.Open(auth.Local)
	if err != nil {
		t.Fatal(err)
	}
	settled(t, s)
	p.End(auth.Local)
	var got []string
	f.mu.Lock()
	for _, m := range f.got {
		got = append(got, fmt.Sprintf("%s %s session=%s version=%s accept=%s", m.HTTPMethod, m.Method,
			m.Header.Get("Mcp-Session-Id"), m.Header.Get("Mcp-Protocol-Version"), m.Header.Get("Accept")))
	}
	hello := string(f.got[1].Params)
	f.mu.Unlock()
	want := []string{
		"POST server/discover session= version=2026-07-28 accept=application/json, text/event-stream",
		"POST initialize session= version= accept=application/json, text/event-stream",
		"POST notifications/initialized session=s1 version=2025-06-18 accept=application/json, text/event-stream",
		"POST tools/list session=s1 version=2025-06-18 accept=application/json, text/event-stream",
		"DELETE DELETE session=s1 version=2025-06-18 accept=application/json, text/event-stream",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if want := `{"protocolVersion":"2025-11-25","capabilities":{},"clientInfo":{"name":"gatehouse","version":"test"}}`; hello != want {
		t.Errorf("initialize had %s, want %s", hello, want)
	}
	if _, err := s.Call(t.Context(), "notes", "tools/call", nil, nil); !errors.Is(err, ErrClosed) {
		t.Errorf("after the end: got %v, want ErrClosed", err)
	}
}

func TestBytesPassThrough(t *testing.T) {
	const params = `{ "name":"echo", "arguments":{"n":9007199254740993,"f":1.0,"e":1E+2,"z":-0}, "unknown":[ {} ] }`
	const result = `{ "content":[{"type":"text","text":"\u00e9","unknown":1.10}],"isError":false ,"structuredContent":{"n":9007199254740993.0},"_meta":{"x":1e400} }`
	f := newFake(t)
	f.handle("tools/call", func(w http.ResponseWriter, _ *http.Request, m received) {
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprintf(w, "\n{\"\\u0072esult\":%s, \"extra\":{\"result\":1}, \"id\" : %s,\"jsonrpc\":\"2.0\"}\n", result, m.ID)
	})
	s := open(t, newRemoteFor(t, "notes", f.URL))
	got, err := s.Call(t.Context(), "notes", "tools/call", json.RawMessage(params), nil)
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != result {
		t.Errorf("result changed:\n got %s\nwant %s", got, result)
	}
	if sent := f.requests("tools/call")[0].Body; !strings.Contains(sent, `"params":`+params+"}") {
		t.Errorf("params changed: %s", sent)
	}
}

func TestRemotesOwnErrorPassesThrough(t *testing.T) {
	for _, status := range []int{http.StatusOK, http.StatusBadRequest} {
		f := newFake(t)
		f.handle("tools/call", func(w http.ResponseWriter, _ *http.Request, m received) {
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(status)
			fmt.Fprintf(w, `{"jsonrpc":"2.0","id":%s,"error":{"code":-32042,"message":"%s","data":{"n":1.0}}}`, m.ID, canary)
		})
		s := open(t, newRemoteFor(t, "notes", f.URL))
		_, err := s.Call(t.Context(), "notes", "tools/call", json.RawMessage(`{}`), nil)
		got, ok := errors.AsType[*ResponseError](err)
		if !ok || got.Code != -32042 || got.Message != canary || string(got.Data) != `{"n":1.0}` {
			t.Errorf("status %d: got %v", status, err)
		}
		if ok && strings.Contains(got.Error(), canary) {
			t.Error("the remote's text is in the error's")
		}
	}
}

func TestConfiguredHeaders(t *testing.T) {
	f := newFake(t)
	r := newRemoteFor(t, "notes", f.URL)
	r.Headers = http.Header{
		"x-team": {"core"}, "Authorization": {"Basic abc"}, "Mcp-Session-Id": {"mine"}, "Mcp-Protocol-Version": {"x"},
		"Accept": {"text/plain"}, "Content-Type": {"text/plain"}, "Host": {"evil.example"}, "Idempotency-Key": {"1"},
	}
	d := &door{}
	r.Authorizer = func(auth.Principal) Authorizer { return d }
	p, written := newPool(t, r)
	s, err := p.Open(auth.Local)
	if err != nil {
		t.Fatal(err)
	}
	settled(t, s)
	d.signIn(canary)
	if _, err := s.Call(t.Context(), "notes", "tools/call", nil, nil); err != nil {
		t.Fatal(err)
	}
	h := f.requests("initialize")[0].Header
	if h.Get("X-Team") != "core" || h.Get("Authorization") != "Basic abc" || h.Get("Mcp-Session-Id") != "" ||
		h.Get("Content-Type") != "application/json" || h.Get("Idempotency-Key") != "" || h.Get("User-Agent") != "test" {
		t.Errorf("initialize had %v", h)
	}
	if h := f.requests("tools/call")[0].Header; h.Get("Authorization") != "Bearer "+canary || h.Get("Mcp-Session-Id") != "s1" || len(h["Authorization"]) != 1 {
		t.Errorf("a call with a token had %v", h)
	}
	for _, name := range []string{"Mcp-Session-Id", "Host", "Idempotency-Key", "Accept"} {
		if !strings.Contains(written.String(), "header="+name) {
			t.Errorf("nothing in the log about %s", name)
		}
	}
}

func TestRedirectIsNotFollowed(t *testing.T) {
	elsewhere := newFake(t)
	for _, status := range []int{301, 302, 303, 307, 308} {
		f := newFake(t)
		f.handle("tools/call", func(w http.ResponseWriter, r *http.Request, _ received) {
			http.Redirect(w, r, elsewhere.URL, status)
		})
		r := newRemoteFor(t, "notes", f.URL)
		r.Authorizer = func(auth.Principal) Authorizer { return &door{token: canary} }
		_, err := open(t, r).Call(t.Context(), "notes", "tools/call", nil, nil)
		if got := failure(t, err, KindStatus); got.Status != status || !strings.Contains(got.Say, "redirect") {
			t.Errorf("status %d: got %v", status, got)
		}
	}
	elsewhere.mu.Lock()
	defer elsewhere.mu.Unlock()
	if len(elsewhere.got) != 0 {
		t.Errorf("the redirect was followed: %v", elsewhere.got)
	}
}

func TestCancelAndTimeout(t *testing.T) {
	f := newFake(t)
	arrived := make(chan json.RawMessage, 2)
	f.handle("tools/call", func(_ http.ResponseWriter, r *http.Request, m received) {
		arrived <- m.ID
		<-r.Context().Done()
	})
	told := make(chan string, 2)
	f.handle("notifications/cancelled", func(w http.ResponseWriter, _ *http.Request, m received) {
		w.WriteHeader(http.StatusAccepted)
		told <- string(m.Params)
	})
	r := newRemoteFor(t, "notes", f.URL)
	s := open(t, r)
	settled(t, s)
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		<-arrived
		cancel()
	}()
	if _, err := s.Call(ctx, "notes", "tools/call", nil, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want context.Canceled", err)
	}
	if got := <-told; got != `{"requestId":4}` {
		t.Errorf("the remote was told %s", got)
	}

	r = newRemoteFor(t, "notes", f.URL)
	r.Timeout = 50 * time.Millisecond
	s = open(t, r)
	settled(t, s)
	_, err := s.Call(t.Context(), "notes", "tools/call", nil, nil)
	if got := failure(t, err, KindTimeout); !strings.Contains(got.Say, "within 50ms") {
		t.Errorf("got %q", got.Say)
	}
	<-arrived
	if got := <-told; got != `{"requestId":4}` {
		t.Errorf("the remote was told %s", got)
	}
	if st := s.Status("notes"); st.State != StateConnected {
		t.Errorf("one slow call disconnected: %+v", st)
	}
}

// TestManyCancelled: a remote hears of each call that nobody waits for any more,
// also if they are many at once.
func TestManyCancelled(t *testing.T) {
	const calls = 5 * maxAside
	f := newFake(t)
	arrived := make(chan struct{}, calls)
	f.handle("tools/call", func(_ http.ResponseWriter, r *http.Request, _ received) {
		arrived <- struct{}{}
		<-r.Context().Done()
	})
	all := make(chan struct{})
	told := make(chan string, calls)
	f.handle("notifications/cancelled", func(w http.ResponseWriter, _ *http.Request, m received) {
		<-all // it takes its time
		w.WriteHeader(http.StatusAccepted)
		told <- string(m.Params)
	})
	s := open(t, newRemoteFor(t, "notes", f.URL))
	settled(t, s)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for range calls {
		wg.Go(func() {
			if _, err := s.Call(ctx, "notes", "tools/call", nil, nil); !errors.Is(err, context.Canceled) {
				t.Errorf("got %v, want context.Canceled", err)
			}
		})
	}
	for range calls {
		<-arrived
	}
	cancel()
	wg.Wait()
	close(all)
	different := map[string]bool{}
	for range calls {
		select {
		case params := <-told:
			different[params] = true
		case <-time.After(10 * time.Second):
			t.Fatalf("the remote was told of %d of %d", len(different), calls)
		}
	}
	if len(different) != calls {
		t.Errorf("the remote was told of %d of %d", len(different), calls)
	}
}

// TestAsidesAreBounded: a remote that does not take what it makes the gateway
// send has it kept up to a bound, and the log says when that is reached.
func TestAsidesAreBounded(t *testing.T) {
	f := newFake(t)
	f.handle("", func(_ http.ResponseWriter, r *http.Request, _ received) { <-r.Context().Done() })
	p, written := newPool(t, newRemoteFor(t, "notes", f.URL))
	s, err := p.Open(auth.Local)
	if err != nil {
		t.Fatal(err)
	}
	settled(t, s)
	c := s.byName["notes"]
	l, release, err := c.linkFor(t.Context(), &Caller{})
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	for i := range maxAside + maxAsideWaiting + 10 {
		l.asked(nil, json.RawMessage(strconv.Itoa(i)), "ping", nil)
	}
	if n := strings.Count(written.String(), "messages not sent"); n != 1 {
		t.Errorf("the log says so %d times", n)
	}
	c.asides.mu.Lock()
	waiting := len(c.asides.waiting)
	c.asides.mu.Unlock()
	if waiting > maxAsideWaiting {
		t.Errorf("%d wait", waiting)
	}
	began := time.Now()
	p.Close()
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("closing took %v", took)
	}
}

// TestRemoteAsks: a remote that asks something during a call is answered, and
// nobody is asked.
func TestRemoteAsks(t *testing.T) {
	f := newFake(t)
	replies := make(chan string, 2)
	f.handle("", func(w http.ResponseWriter, r *http.Request, m received) {
		w.WriteHeader(http.StatusAccepted)
		replies <- m.Body + r.Header.Get("Mcp-Session-Id")
	})
	f.handle("tools/call", func(w http.ResponseWriter, _ *http.Request, m received) {
		w.Header().Set("Content-Type", "text/event-stream")
		fmt.Fprint(w, "data: {\"jsonrpc\":\"2.0\",\"id\":\"p-1\",\"method\":\"ping\"}\n\n")
		w.(http.Flusher).Flush()
		one := <-replies
		fmt.Fprint(w, "data: {\"jsonrpc\":\"2.0\",\"id\":7,\"method\":\"sampling/createMessage\",\"params\":{}}\n\n")
		w.(http.Flusher).Flush()
		two := <-replies
		quoted, err := json.Marshal([]string{one, two})
		if err != nil {
			t.Error(err)
		}
		fmt.Fprintf(w, "data: {\"jsonrpc\":\"2.0\",\"id\":%s,\"result\":{\"got\":%s}}\n\n", m.ID, quoted)
	})
	got, err := open(t, newRemoteFor(t, "notes", f.URL)).Call(t.Context(), "notes", "tools/call", nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	want := `{"got":["{\"jsonrpc\":\"2.0\",\"id\":\"p-1\",\"result\":{}}s1","{\"jsonrpc\":\"2.0\",\"id\":7,\"error\":{\"code\":-32601,\"message\":\"The client behind this call has not declared this capability\"}}s1"]}`
	if string(got) != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

func TestForgottenSession(t *testing.T) {
	f := newFake(t)
	var session atomic.Int64
	var alive atomic.Int64 // the number of the session that the remote knows
	f.handle("initialize", func(w http.ResponseWriter, _ *http.Request, m received) {
		n := session.Add(1)
		alive.Store(n)
		w.Header().Set("Mcp-Session-Id", fmt.Sprint(n))
		answer(w, m, initialized)
	})
	var executed atomic.Int64
	f.handle("tools/call", func(w http.ResponseWriter, r *http.Request, m received) {
		if r.Header.Get("Mcp-Session-Id") != fmt.Sprint(alive.Load()) {
			http.Error(w, "gone", http.StatusNotFound)
			return
		}
		executed.Add(1)
		answer(w, m, `{}`)
	})
	s := open(t, newRemoteFor(t, "notes", f.URL))
	settled(t, s)
	alive.Store(-1)
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			if _, err := s.Call(t.Context(), "notes", "tools/call", nil, nil); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := executed.Load(); n != 50 {
		t.Errorf("%d calls were executed, want 50", n)
	}
	if n := len(f.requests("initialize")); n != 2 {
		t.Errorf("%d sessions were begun, want 2", n)
	}

	f.handle("tools/call", func(w http.ResponseWriter, _ *http.Request, _ received) { http.Error(w, canary, http.StatusNotFound) })
	before := len(f.requests("tools/call"))
	_, err := s.Call(t.Context(), "notes", "tools/call", nil, nil)
	failure(t, err, KindSessionGone)
	if n := len(f.requests("tools/call")) - before; n != 2 {
		t.Errorf("the call was sent %d times, want 2", n)
	}
}

// TestSessionForgottenWith400: some servers answer 400 where 404 is due. The
// call is not repeated, it may have been executed; the next one works.
func TestSessionForgottenWith400(t *testing.T) {
	f := newFake(t)
	var first atomic.Bool
	f.handle("tools/call", func(w http.ResponseWriter, _ *http.Request, m received) {
		if first.CompareAndSwap(false, true) {
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(http.StatusBadRequest)
			fmt.Fprint(w, `{"jsonrpc":"2.0","id":null,"error":{"code":-32000,"message":"No valid session ID provided"}}`)
			return
		}
		answer(w, m, `{}`)
	})
	s := open(t, newRemoteFor(t, "notes", f.URL))
	settled(t, s)
	_, err := s.Call(t.Context(), "notes", "tools/call", nil, nil)
	failure(t, err, KindStatus)
	if _, err := s.Call(t.Context(), "notes", "tools/call", nil, nil); err != nil {
		t.Error(err)
	}
	if n := len(f.requests("initialize")); n != 2 {
		t.Errorf("%d sessions were begun, want 2", n)
	}
}

func TestListChanged(t *testing.T) {
	f := newFake(t)
	var tools atomic.Value
	tools.Store(`{"tools":[]}`)
	f.handle("tools/list", func(w http.ResponseWriter, _ *http.Request, m received) { answer(w, m, tools.Load().(string)) })
	f.handle("tools/call", func(w http.ResponseWriter, _ *http.Request, m received) {
		tools.Store(`{"tools":[{"name":"new","inputSchema":{}}]}`)
		w.Header().Set("Content-Type", "text/event-stream")
		fmt.Fprintf(w, ": hello\n\nid: 1\ndata:\n\ndata: {\"jsonrpc\":\"2.0\",\"method\":\"notifications/tools/list_changed\"}\n\nevent: message\ndata: {\"jsonrpc\":\"2.0\",\ndata: \"id\":%s,\"result\":{}}\n\n", m.ID)
	})
	s := open(t, newRemoteFor(t, "notes", f.URL))
	first := settled(t, s)
	changed := make(chan struct{}, 1)
	s.OnChange(func() { changed <- struct{}{} })
	if _, err := s.Call(t.Context(), "notes", "tools/call", nil, &Caller{Notify: func(method string, _ json.RawMessage) {
		t.Errorf("%s was passed on", method)
	}}); err != nil {
		t.Fatal(err)
	}
	<-changed
	second := settled(t, s)
	if len(second[0].Tools) != 1 || second[0].Generation == first[0].Generation {
		t.Errorf("got %+v after %+v", second, first)
	}
}

func TestTwoPrincipals(t *testing.T) {
	f := newFake(t)
	var n atomic.Int64
	f.handle("initialize", func(w http.ResponseWriter, _ *http.Request, m received) {
		w.Header().Set("Mcp-Session-Id", fmt.Sprint(n.Add(1)))
		answer(w, m, initialized)
	})
	r := newRemoteFor(t, "notes", f.URL)
	doors := map[auth.Principal]*door{}
	alice, bob := auth.Principal{Issuer: "i", Subject: "alice"}, auth.Principal{Issuer: "i", Subject: "bob"}
	doors[alice], doors[bob] = &door{token: "A"}, &door{token: "B"}
	r.Authorizer = func(p auth.Principal) Authorizer { return doors[p] }
	p, _ := newPool(t, r)
	for _, who := range []auth.Principal{alice, bob} {
		s, err := p.Open(who)
		if err != nil {
			t.Fatal(err)
		}
		settled(t, s)
		if _, err := s.Call(t.Context(), "notes", "tools/call", json.RawMessage(`{"who":"`+who.Subject+`"}`), nil); err != nil {
			t.Fatal(err)
		}
	}
	ids := map[string]string{}
	for _, m := range f.requests("tools/call") {
		if token := m.Header.Get("Authorization"); (token == "Bearer A") != strings.Contains(m.Body, "alice") {
			t.Errorf("%s went with %s", m.Body, token)
		}
		ids[m.Header.Get("Mcp-Session-Id")] = m.Body
	}
	if len(ids) != 2 {
		t.Errorf("the principals share an MCP session: %v", ids)
	}
}

func TestPoolLimits(t *testing.T) {
	f := newFake(t)
	p := New(Config{Remotes: []Remote{newRemoteFor(t, "notes", f.URL)}, Name: "g", Version: "1", Log: testLog(t), MaxSessions: 1})
	one, err := p.Open(auth.Local)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := p.Open(auth.Local); err != nil || again != one {
		t.Errorf("got %v, %v, want the same session", again, err)
	}
	if _, err := p.Open(auth.SessionPrincipal("x")); !errors.Is(err, ErrFull) {
		t.Errorf("got %v, want ErrFull", err)
	}
	if _, err := one.Call(t.Context(), "nosuch", "tools/call", nil, nil); !errors.Is(err, ErrUnknownRemote) {
		t.Errorf("got %v, want ErrUnknownRemote", err)
	}
	if err := one.Connect(t.Context(), "nosuch"); !errors.Is(err, ErrUnknownRemote) {
		t.Errorf("got %v, want ErrUnknownRemote", err)
	}
	one.Close()
	one.Close()
	if _, err := p.Open(auth.SessionPrincipal("x")); err != nil {
		t.Errorf("after the first has ended: %v", err)
	}
	p.Close()
	p.Close()
	if _, err := p.Open(auth.Local); !errors.Is(err, ErrClosed) {
		t.Errorf("got %v, want ErrClosed", err)
	}
}

// TestCloseEndsCalls: closing does not wait for a remote that hangs.
func TestCloseEndsCalls(t *testing.T) {
	f := newFake(t)
	arrived := make(chan struct{})
	f.handle("tools/call", func(_ http.ResponseWriter, r *http.Request, _ received) {
		close(arrived)
		<-r.Context().Done()
	})
	p, _ := newPool(t, newRemoteFor(t, "notes", f.URL))
	s, err := p.Open(auth.Local)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() {
		_, err := s.Call(context.Background(), "notes", "tools/call", nil, nil)
		done <- err
	}()
	<-arrived
	go p.Close()
	if err := <-done; !errors.Is(err, ErrClosed) {
		t.Errorf("got %v, want ErrClosed", err)
	}
	p.Close()
	if len(f.requests("DELETE")) != 1 {
		t.Error("the MCP session was not ended")
	}
}

func TestProbe(t *testing.T) {
	f := newFake(t)
	r := newRemoteFor(t, "notes", f.URL)
	resp, err := Probe(t.Context(), r, "gatehouse", "test")
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("got %v, %v", resp, err)
	}
	if len(f.requests("DELETE")) != 1 {
		t.Error("the session that the probe began was not ended")
	}
	f.protect("T", "initialize")
	r.Authorizer = func(auth.Principal) Authorizer { return &door{token: "T"} }
	resp, err = Probe(t.Context(), r, "gatehouse", "test")
	if err != nil || resp.StatusCode != http.StatusUnauthorized || resp.Header.Get("WWW-Authenticate") == "" {
		t.Errorf("got %v, %v, want the 401", resp, err)
	}
	r.URL = "http://127.0.0.1:1/"
	_, err = Probe(t.Context(), r, "gatehouse", "test")
	failure(t, err, KindUnreachable)
}
