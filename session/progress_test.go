package session

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"
)

func TestRemint(t *testing.T) {
	for _, tt := range []struct{ in, out, token string }{
		{``, ``, ``},
		{`{"name":"x"}`, `{"name":"x"}`, ``},
		{`{"_meta":{"progressToken":"t","n":1.0},"name":"x"}`, `{"_meta":{"progressToken":7,"n":1.0},"name":"x"}`, `"t"`},
		{`{"_meta":{"progressToken":9007199254740993}}`, `{"_meta":{"progressToken":7}}`, `9007199254740993`},
		{`{"arguments":{"progressToken":1}}`, `{"arguments":{"progressToken":1}}`, ``},
		{`{"_meta":null,"progressToken":1}`, `{"_meta":null,"progressToken":1}`, ``},
	} {
		out, token, err := remint(json.RawMessage(tt.in), "7")
		if err != nil || string(out) != tt.out || string(token) != tt.token {
			t.Errorf("%s: got %s, %s, %v", tt.in, out, token, err)
		}
	}
	for _, in := range []string{`{"_meta":{"progressToken":1,"progressToken":2}}`, `{"_meta":{},"_meta":{"progressToken":2}}`} {
		if out, _, err := remint(json.RawMessage(in), "7"); err == nil {
			t.Errorf("%s: got %s", in, out)
		}
	}
}

// TestProgress: each caller gets the progress of its own call, with its own
// token, before the result; a foreign or unasked token is dropped.
func TestProgress(t *testing.T) {
	f := newFake(t)
	f.handle("tools/call", func(w http.ResponseWriter, _ *http.Request, m received) {
		w.Header().Set("Content-Type", "text/event-stream")
		var params struct {
			Meta struct{ ProgressToken json.RawMessage } `json:"_meta"`
		}
		if err := json.Unmarshal(m.Params, &params); err != nil {
			t.Error(err)
		}
		own := string(params.Meta.ProgressToken)
		if own == "" {
			own = string(m.ID)
		}
		for i, token := range []string{own, `"same"`, own, "0", own} {
			fmt.Fprintf(w, "data: {\"jsonrpc\":\"2.0\",\"method\":\"notifications/progress\",\"params\":{\"progressToken\":%s,\"progress\":%d.0}}\n\n", token, i)
		}
		fmt.Fprint(w, "data: {\"jsonrpc\":\"2.0\",\"method\":\"notifications/message\",\"params\":{\"level\":\"info\",\"data\":1.0}}\n\n")
		fmt.Fprintf(w, "data: {\"jsonrpc\":\"2.0\",\"id\":%s,\"result\":{}}\n\n", m.ID)
	})
	s := open(t, newRemoteFor(t, "notes", f.URL))
	settled(t, s)
	var wg sync.WaitGroup
	for _, tt := range []struct{ params, want string }{
		{`{"_meta":{"progressToken":"same"}}`, `{"progressToken":"same","progress":0.0}{"progressToken":"same","progress":2.0}{"progressToken":"same","progress":4.0}{"level":"info","data":1.0}`},
		{`{"_meta":{"progressToken":1e2}}`, `{"progressToken":1e2,"progress":0.0}{"progressToken":1e2,"progress":2.0}{"progressToken":1e2,"progress":4.0}{"level":"info","data":1.0}`},
		{`{}`, `{"level":"info","data":1.0}`},
	} {
		for range 10 {
			wg.Go(func() {
				var got strings.Builder
				_, err := s.Call(t.Context(), "notes", "tools/call", json.RawMessage(tt.params), &Caller{Notify: func(_ string, params json.RawMessage) { got.Write(params) }})
				if err != nil || got.String() != tt.want {
					t.Errorf("%s: got %s, %v", tt.params, got.String(), err)
				}
			})
		}
	}
	wg.Wait()
	seen := map[string]bool{}
	for _, m := range f.requests("tools/call") {
		if token := string(m.Params); token != "{}" && seen[token] {
			t.Errorf("the remote got %s twice", token)
		} else {
			seen[token] = true
		}
	}
}

// TestProgressOfTheClient: what a client says about its progress with what it is
// asked reaches the remote that asked, with that one's token and before the
// answer; what another client says does not.
func TestProgressOfTheClient(t *testing.T) {
	f := newFake(t)
	replies := make(chan string, 10)
	reply := func(w http.ResponseWriter, _ *http.Request, m received) {
		w.WriteHeader(http.StatusAccepted)
		replies <- string(m.Params)
	}
	f.handle("notifications/progress", reply)
	f.handle("", reply)
	asked := func(w http.ResponseWriter, meta string) {
		w.Header().Set("Content-Type", "text/event-stream")
		fmt.Fprintf(w, "data: {\"jsonrpc\":\"2.0\",\"id\":7,\"method\":\"sampling/createMessage\",\"params\":{%s}}\n\n", meta)
		w.(http.Flusher).Flush()
	}
	f.handle("tools/call", func(w http.ResponseWriter, _ *http.Request, m received) {
		asked(w, `"_meta":{"progressToken":"r","x":1.0}`)
		var got []string
		for range 4 {
			got = append(got, <-replies)
		}
		quoted, err := json.Marshal(got)
		if err != nil {
			t.Error(err)
		}
		fmt.Fprintf(w, "data: {\"jsonrpc\":\"2.0\",\"id\":%s,\"result\":{\"got\":%s}}\n\n", m.ID, quoted)
	})
	s := open(t, newRemoteFor(t, "notes", f.URL))
	settled(t, s)
	var last string
	from := &Caller{Client: "one", Capabilities: json.RawMessage(`{"sampling":{}}`)}
	from.Ask = func(_ context.Context, _ string, params json.RawMessage) (json.RawMessage, error) {
		var got struct {
			Meta struct {
				Token json.RawMessage `json:"progressToken"`
				X     json.RawMessage `json:"x"`
			} `json:"_meta"`
		}
		if err := json.Unmarshal(params, &got); err != nil || string(got.Meta.Token) == `"r"` || string(got.Meta.X) != "1.0" {
			t.Errorf("asked %s, %v", params, err)
		}
		last = string(got.Meta.Token)
		s.Progress("two", json.RawMessage(`{"progressToken":`+last+`,"progress":9}`))
		s.Progress("one", json.RawMessage(`{"progressToken":"r","progress":9}`))
		for i := range 3 {
			s.Progress("one", json.RawMessage(fmt.Sprintf(`{"progressToken":%s,"progress":%d.0,"more":1}`, last, i)))
		}
		return json.RawMessage(`{}`), nil
	}
	got, err := s.Call(t.Context(), "notes", "tools/call", nil, from)
	if err != nil {
		t.Fatal(err)
	}
	want, err := json.Marshal(map[string][]string{"got": {`{"progressToken":"r","progress":0.0,"more":1}`, `{"progressToken":"r","progress":1.0,"more":1}`, `{"progressToken":"r","progress":2.0,"more":1}`, ""}})
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != string(want) {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	s.Progress("one", json.RawMessage(`{"progressToken":`+last+`,"progress":3}`)) // it has answered
	if len(s.questions.byToken) != 0 {
		t.Errorf("left: %v", s.questions.byToken)
	}
	// Params that two readers could understand differently are not passed on.
	f.handle("tools/call", func(w http.ResponseWriter, _ *http.Request, m received) {
		asked(w, `"_meta":{"progressToken":1,"progressToken":2}`)
		<-replies
		fmt.Fprintf(w, "data: {\"jsonrpc\":\"2.0\",\"id\":%s,\"result\":{}}\n\n", m.ID)
	})
	from.Ask = func(context.Context, string, json.RawMessage) (json.RawMessage, error) {
		t.Error("the client was asked")
		return nil, nil
	}
	if _, err := s.Call(t.Context(), "notes", "tools/call", nil, from); err != nil {
		t.Error(err)
	}
}

// TestSlowClient: a client that does not read holds up nobody else on a stream
// that is many clients', however much there is to tell it; and what it reads it
// reads in order, and before the result.
func TestSlowClient(t *testing.T) {
	f, say, _, opened := streaming(t)
	type waiting struct {
		token  string
		answer chan struct{}
	}
	calls := make(chan waiting)
	f.handle("tools/call", func(w http.ResponseWriter, r *http.Request, m received) {
		var params struct {
			Meta struct{ ProgressToken json.RawMessage } `json:"_meta"`
		}
		if err := json.Unmarshal(m.Params, &params); err != nil {
			t.Error(err)
		}
		call := waiting{string(params.Meta.ProgressToken), make(chan struct{})}
		calls <- call
		select {
		case <-call.answer:
			answer(w, m, `{}`)
		case <-r.Context().Done():
		}
	})
	s := open(t, newRemoteFor(t, "notes", f.URL))
	settled(t, s)
	<-opened
	var running sync.WaitGroup
	call := func(notify func(params string)) waiting {
		running.Go(func() {
			_, err := s.Call(t.Context(), "notes", "tools/call", json.RawMessage(`{"_meta":{"progressToken":"t"}}`),
				&Caller{Notify: func(_ string, params json.RawMessage) { notify(string(params)) }})
			if err != nil {
				t.Error(err)
			}
			notify("the result")
		})
		return <-calls
	}
	var slowRead []string // the last is the result
	stuck, goOn := make(chan struct{}, 1000), make(chan struct{})
	read := sync.OnceFunc(func() { close(goOn) })
	defer read()
	slow := call(func(params string) {
		stuck <- struct{}{}
		<-goOn
		slowRead = append(slowRead, params)
	})
	quickRead := make(chan string, 10)
	quick := call(func(params string) { quickRead <- params })
	progress := func(c waiting, n int) {
		say <- fmt.Sprintf(`"method":"notifications/progress","params":{"progressToken":%s,"progress":%d}`, c.token, n)
	}
	progress(slow, 0)
	<-stuck
	for _, many := range []int{3, 2 * maxTold} { // some, and more than waits for anybody
		for n := range many {
			progress(slow, n+1)
		}
		progress(quick, many)
		select {
		case got := <-quickRead:
			if want := fmt.Sprintf(`{"progressToken":"t","progress":%d}`, many); got != want {
				t.Errorf("got %s, want %s", got, want)
			}
		case <-time.After(10 * time.Second):
			t.Fatal("the one that reads waits for the one that does not")
		}
	}
	close(slow.answer)
	close(quick.answer)
	read()
	running.Wait()
	if n := len(slowRead); n < maxTold || slowRead[n-1] != "the result" {
		t.Fatalf("the slow one has read %d messages, the last of them %q", n, slowRead[max(n, 1)-1])
	}
	for i, want := range []string{"0", "1", "2", "3", "1", "2"} {
		if got := slowRead[i]; got != `{"progressToken":"t","progress":`+want+`}` {
			t.Errorf("message %d is %s, want progress %s", i, got, want)
		}
	}
}

// TestLogLevel: a remote that declares logging is told at once, before its next
// call, and again on a new link; another is not.
func TestLogLevel(t *testing.T) {
	logging, silent := newFake(t), newFake(t)
	logging.declaring(`{"tools":{},"logging":{}}`)
	told := make(chan struct{}, 1)
	logging.handle("logging/setLevel", func(w http.ResponseWriter, _ *http.Request, m received) {
		answer(w, m, `{}`)
		told <- struct{}{}
	})
	s := open(t, newRemoteFor(t, "logging", logging.URL), newRemoteFor(t, "silent", silent.URL))
	settled(t, s)
	call := func() {
		t.Helper()
		for _, remote := range []string{"logging", "silent"} {
			if _, err := s.Call(t.Context(), remote, "tools/call", nil, nil); err != nil {
				t.Fatal(err)
			}
		}
	}
	call()
	s.SetLogLevel("debug")
	<-told
	call()
	call()
	logging.handle("tools/call", func(w http.ResponseWriter, _ *http.Request, m received) {
		if m.Header.Get("Mcp-Session-Id") == "s1" {
			w.WriteHeader(http.StatusNotFound)
			return
		}
		answer(w, m, "{}")
	})
	logging.handle("initialize", func(w http.ResponseWriter, _ *http.Request, m received) {
		w.Header().Set("Mcp-Session-Id", "s2")
		answer(w, m, strings.Replace(initialized, `"tools":{}`, `"tools":{},"logging":{}`, 1))
	})
	call()
	// A remote that refuses is not asked again, and the call is none the worse.
	logging.handle("logging/setLevel", func(w http.ResponseWriter, _ *http.Request, _ received) {
		w.WriteHeader(http.StatusInternalServerError)
	})
	s.SetLogLevel("error")
	call()
	call()
	var got []string
	for _, m := range logging.requests("logging/setLevel") {
		got = append(got, m.Header.Get("Mcp-Session-Id")+string(m.Params))
	}
	if got, want := strings.Join(got, " "), `s1{"level":"debug"} s2{"level":"debug"} s2{"level":"error"}`; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if n := len(silent.requests("logging/setLevel")); n != 0 {
		t.Errorf("%d to a remote that does not log", n)
	}
}
