package session

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/oauth2"

	"gatehouse/auth"
)

const changing = `{"tools":{"listChanged":true},"resources":{"subscribe":true}}`

// streaming is a fake that declares changes and has an event stream, which
// sends what comes out of say until the test cuts it.
func streaming(t *testing.T) (f *fake, say chan string, cut chan struct{}, opened chan http.Header) {
	t.Helper()
	f = newFake(t)
	f.declaring(changing)
	f.result("resources/list", `{"resources":[]}`)
	f.result("resources/templates/list", `{"resourceTemplates":[]}`)
	f.result("resources/subscribe", `{}`)
	f.result("resources/unsubscribe", `{}`)
	say, cut, opened = make(chan string), make(chan struct{}), make(chan http.Header, 10)
	f.handle("GET", func(w http.ResponseWriter, r *http.Request, _ received) {
		w.Header().Set("Content-Type", "text/event-stream")
		w.(http.Flusher).Flush()
		opened <- r.Header.Clone()
		for {
			select {
			case event := <-say:
				fmt.Fprintf(w, "data: {\"jsonrpc\":\"2.0\",%s}\n\n", event)
				w.(http.Flusher).Flush()
			case <-cut:
				return
			case <-r.Context().Done():
				return
			}
		}
	})
	return f, say, cut, opened
}

// watch returns a channel that gets something at every change.
func watch(s *Session) chan struct{} {
	changed := make(chan struct{}, 100)
	s.OnChange(func() { changed <- struct{}{} })
	return changed
}

func listing(names ...string) string {
	var tools []string
	for _, name := range names {
		tools = append(tools, `{"name":"`+name+`","inputSchema":{}}`)
	}
	return `{"tools":[` + strings.Join(tools, ",") + `]}`
}

func TestStreamTellsOfChanges(t *testing.T) {
	f, say, _, opened := streaming(t)
	s := open(t, newRemoteFor(t, "notes", f.URL))
	settled(t, s)
	header := <-opened
	if header.Get("Mcp-Session-Id") != "s1" || header.Get("Mcp-Protocol-Version") != "2025-11-25" || header.Get("Accept") != "text/event-stream" || header.Get("Content-Type") != "" {
		t.Errorf("got %v", header)
	}
	changed := watch(s)
	f.result("tools/list", listing("new"))
	say <- `"method":"notifications/tools/list_changed"`
	<-changed
	if c := settled(t, s)[0]; namesOf(c.Tools) != "new" {
		t.Errorf("got %+v", c)
	}
	// Requests are answered, responses are nobody's.
	say <- `"id":1,"result":{}`
	answered := make(chan string, 10)
	f.handle("", func(w http.ResponseWriter, _ *http.Request, m received) {
		answered <- m.Body
		w.WriteHeader(http.StatusAccepted)
	})
	say <- `"id":"p","method":"ping"`
	if got := <-answered; got != `{"jsonrpc":"2.0","id":"p","result":{}}` {
		t.Errorf("got %s", got)
	}
}

// TestStreamTellsLater: what a remote that logs says after all calls goes to the
// one client of its principal, whatever that declares; of several, to none.
func TestStreamTellsLater(t *testing.T) {
	for declared, want := range map[string]string{
		"": "", "{}": "notifications/message", `{"roots":{}}`: "notifications/message",
	} {
		f, say, _, opened := streaming(t)
		f.declaring(`{"tools":{},"logging":{}}`)
		answered := make(chan struct{})
		f.handle("", func(w http.ResponseWriter, _ *http.Request, _ received) {
			w.WriteHeader(http.StatusAccepted)
			close(answered)
		})
		p, _ := newPool(t, newRemoteFor(t, "notes", f.URL))
		var capabilities json.RawMessage
		if declared != "" {
			capabilities = json.RawMessage(declared)
		}
		s, err := p.OpenFor(auth.Local, capabilities)
		if err != nil {
			t.Fatal(err)
		}
		settled(t, s)
		<-opened
		heard := make(chan string, 10)
		from := &Caller{Client: "one", Capabilities: capabilities, Later: func(method string, _ json.RawMessage) { heard <- method }}
		if _, err := s.Call(t.Context(), "notes", "tools/call", nil, from); err != nil {
			t.Fatal(err)
		}
		say <- `"method":"notifications/message","params":{"level":"error","data":1}`
		say <- `"id":"p","method":"ping"`
		<-answered
		got := ""
		select {
		case got = <-heard:
		default:
		}
		if got != want {
			t.Errorf("%q: heard %q, want %q", declared, got, want)
		}
	}
}

// TestStreamIsOptional: a remote that has none, or declares nothing to say, is
// asked once or not at all.
func TestStreamIsOptional(t *testing.T) {
	for _, tt := range []struct {
		capabilities string
		status, gets int
	}{
		{`{"tools":{}}`, 405, 0},
		{`{"tools":{"listChanged":false},"resources":{"subscribe":0},"prompts":{}}`, 405, 0},
		{`{"tools":{},"logging":{}}`, 405, 1},
		{`{"tools":{"listChanged":true}}`, 405, 1},
		{`{"tools":{"listChanged":true}}`, 404, 1},
		{`{"tools":{"listChanged":true}}`, 202, 1},
		{`{"tools":{"listChanged":true}}`, 401, 1},
	} {
		f := newFake(t)
		f.declaring(tt.capabilities)
		for _, k := range kinds {
			if k.member != "tools" {
				f.result(k.method, `{"`+k.member+`":[]}`)
			}
		}
		asked := make(chan struct{}, 10)
		f.handle("GET", func(w http.ResponseWriter, _ *http.Request, _ received) {
			w.WriteHeader(tt.status)
			asked <- struct{}{}
		})
		s := open(t, newRemoteFor(t, "notes", f.URL))
		settled(t, s)
		if tt.gets > 0 {
			<-asked
		}
		for range 3 {
			if err := s.Connect(t.Context(), "notes"); err != nil {
				t.Fatal(err)
			}
		}
		for c := s.byName["notes"]; ; { // until the listener has ended
			c.mu.Lock()
			done := !c.link.listening
			c.mu.Unlock()
			if done {
				break
			}
			runtime.Gosched()
		}
		if n := len(f.requests("GET")); n != tt.gets {
			t.Errorf("%s, %d: %d times asked for a stream, want %d", tt.capabilities, tt.status, n, tt.gets)
		}
		if n := len(f.requests("initialize")); n != 1 {
			t.Errorf("%d sessions", n)
		}
	}
}

// TestCutStream: it is opened again, what was missed is read, and the MCP
// session is the same.
func TestCutStream(t *testing.T) {
	f, say, cut, opened := streaming(t)
	s := open(t, newRemoteFor(t, "notes", f.URL))
	settled(t, s)
	<-opened
	changed := watch(s)
	f.result("tools/list", listing("meanwhile"))
	cut <- struct{}{}
	<-opened
	<-changed
	if c := settled(t, s)[0]; namesOf(c.Tools) != "meanwhile" {
		t.Errorf("got %+v", c)
	}
	f.result("tools/list", listing("later"))
	say <- `"method":"notifications/tools/list_changed"`
	<-changed
	if c := settled(t, s)[0]; namesOf(c.Tools) != "later" {
		t.Errorf("got %+v", c)
	}
	say <- `garbage` // as good as a cut
	<-opened
	if n := len(f.requests("initialize")); n != 1 {
		t.Errorf("%d sessions, want 1", n)
	}
	if got := s.Status("notes"); got.State != StateConnected {
		t.Errorf("got %+v", got)
	}
}

// TestStreamOfForgottenSession: nobody calls, and yet the change is seen.
func TestStreamOfForgottenSession(t *testing.T) {
	f, _, cut, opened := streaming(t)
	s := open(t, newRemoteFor(t, "notes", f.URL))
	settled(t, s)
	<-opened
	if err := s.Subscribe(t.Context(), "notes", "a:b"); err != nil {
		t.Fatal(err)
	}
	changed := watch(s)
	f.result("tools/list", listing("new"))
	stream := f.on["GET"]
	f.handle("GET", func(w http.ResponseWriter, r *http.Request, m received) {
		if m.Header.Get("Mcp-Session-Id") == "s1" {
			w.WriteHeader(http.StatusNotFound)
			return
		}
		stream(w, r, m)
	})
	f.handle("initialize", func(w http.ResponseWriter, _ *http.Request, m received) {
		w.Header().Set("Mcp-Session-Id", "s2")
		answer(w, m, strings.Replace(initialized, `{"tools":{}}`, changing, 1))
	})
	cut <- struct{}{}
	<-changed
	<-opened
	if c := settled(t, s)[0]; namesOf(c.Tools) != "new" {
		t.Errorf("got %+v", c)
	}
	var on []string
	for _, m := range f.requests("resources/subscribe") {
		on = append(on, m.Header.Get("Mcp-Session-Id")+string(m.Params))
	}
	if got, want := strings.Join(on, " "), `s1{"uri":"a:b"} s2{"uri":"a:b"}`; got != want {
		t.Errorf("subscribed on %s, want %s", got, want)
	}
}

// TestRest: a session that rests has no connection, and what is in flight keeps
// its own. The next one knows of the subscription and of the log level.
func TestRest(t *testing.T) {
	f, say, _, opened := streaming(t)
	f.declaring(`{"tools":{"listChanged":true},"resources":{"subscribe":true},"logging":{}}`)
	f.result("logging/setLevel", `{}`)
	n := 0
	f.handle("initialize", func(w http.ResponseWriter, _ *http.Request, m received) {
		n++
		w.Header().Set("Mcp-Session-Id", fmt.Sprint("s", n))
		answer(w, m, strings.Replace(initialized, `{"tools":{}}`, `{"tools":{"listChanged":true},"resources":{"subscribe":true},"logging":{}}`, 1))
	})
	ended := make(chan string, 1)
	f.handle("DELETE", func(_ http.ResponseWriter, _ *http.Request, m received) { ended <- m.Header.Get("Mcp-Session-Id") })
	inside, answered := make(chan bool), make(chan bool)
	f.handle("tools/call", func(w http.ResponseWriter, _ *http.Request, m received) {
		inside <- true
		<-answered
		answer(w, m, "{}")
	})
	s := open(t, newRemoteFor(t, "notes", f.URL))
	settled(t, s)
	<-opened
	s.SetLogLevel("debug")
	if err := s.Subscribe(t.Context(), "notes", "a:b"); err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() {
		_, err := s.Call(t.Context(), "notes", "tools/call", nil, nil)
		done <- err
	}()
	<-inside
	s.Rest()
	if !settled(t, s)[0].Connected {
		t.Error("the connection of a call that was in flight is gone")
	}
	answered <- true
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	s.Rest()
	if c := settled(t, s)[0]; c.Connected || !c.Known {
		t.Errorf("at rest it is connected %v, its tools known %v", c.Connected, c.Known)
	}
	if got := <-ended; got != "s1" {
		t.Errorf("ended %s", got)
	}
	s.Rest() // twice is safe
	if err := s.Unsubscribe(t.Context(), "notes", "c:d"); err != nil || settled(t, s)[0].Connected {
		t.Errorf("connected for the end of a subscription: %v", err)
	}

	s.Wake()
	<-opened
	updates := make(chan string, 1)
	s.OnUpdated(func(_, uri string, _ json.RawMessage) { updates <- uri })
	say <- `"method":"notifications/resources/updated","params":{"uri":"a:b"}`
	if got := <-updates; got != "a:b" {
		t.Errorf("updated: %s", got)
	}
	go func() { <-inside; answered <- true }()
	if _, err := s.Call(t.Context(), "notes", "tools/call", nil, nil); err != nil {
		t.Fatal(err)
	}
	for method, want := range map[string]string{"resources/subscribe": "s1 s2", "logging/setLevel": "s1 s2", "initialize": " "} {
		var on []string
		for _, m := range f.requests(method) {
			on = append(on, m.Header.Get("Mcp-Session-Id"))
		}
		if got := strings.Join(on, " "); got != want {
			t.Errorf("%s on %q, want %q", method, got, want)
		}
	}
}

// TestStreamAfterSignIn: the stream wants the sign-in too, and is there after it.
func TestStreamAfterSignIn(t *testing.T) {
	f, _, _, opened := streaming(t)
	d := &door{remote: "notes"}
	f.protect("T", "GET", "tools/call")
	r := newRemoteFor(t, "notes", f.URL)
	r.Authorizer = func(auth.Principal) Authorizer { return d }
	s := open(t, r)
	settled(t, s)
	d.signIn("T")
	if err := s.Connect(t.Context(), "notes"); err != nil {
		t.Fatal(err)
	}
	if header := <-opened; header.Get("Authorization") != "Bearer T" {
		t.Errorf("got %v", header)
	}
	if challenges, _ := d.count(); challenges != 0 {
		t.Errorf("the stream asked for a sign-in %d times", challenges)
	}
}

// expiring is an Authorizer whose token a call refreshes, and nothing else.
type expiring struct {
	door
	expired, refreshed atomic.Bool
	asked              chan struct{} // by a stream, in vain
}

func (e *expiring) Token(ctx context.Context) (*oauth2.Token, error) {
	switch {
	case !e.expired.Load():
	case auth.MayRefresh(ctx):
		e.expired.Store(false)
		e.refreshed.Store(true)
	default:
		e.asked <- struct{}{}
		return nil, auth.ErrRefreshDue
	}
	return e.door.Token(ctx)
}

// TestStreamRefreshesNothing: a stream that is cut when the token has expired
// waits until a call has refreshed it.
func TestStreamRefreshesNothing(t *testing.T) {
	legacy, _, cut, opened := streaming(t)
	modern, over := newModern(t), make(chan struct{})
	modern.handle("subscriptions/listen", func(w http.ResponseWriter, r *http.Request, m received) {
		w.Header().Set("Content-Type", "text/event-stream")
		fmt.Fprint(w, "data: {\"jsonrpc\":\"2.0\",\"method\":\"notifications/subscriptions/acknowledged\",\"params\":{}}\n\n")
		w.(http.Flusher).Flush()
		opened <- m.Header
		select {
		case <-over:
		case <-r.Context().Done():
		}
	})
	for _, tt := range []struct {
		era string
		f   *fake
		cut func()
	}{
		{"legacy", legacy, func() { cut <- struct{}{} }},
		{"modern", modern, func() { close(over) }},
	} {
		t.Run(tt.era, func(t *testing.T) {
			e := &expiring{door: door{remote: "notes", token: "T"}, asked: make(chan struct{}, 100)}
			r := newRemoteFor(t, "notes", tt.f.URL)
			r.Authorizer = func(auth.Principal) Authorizer { return e }
			s := open(t, r)
			settled(t, s)
			<-opened
			e.expired.Store(true)
			tt.cut()
			for range 2 {
				<-e.asked
			}
			for len(opened) > 0 {
				<-opened // one that another has followed
			}
			if e.refreshed.Load() {
				t.Error("refreshed for a stream")
			}
			if _, err := s.Call(t.Context(), "notes", "tools/call", nil, nil); err != nil {
				t.Fatal(err)
			}
			<-opened
		})
	}
}

// TestSideStreamAfterSignIn: so is that of a client's own link.
func TestSideStreamAfterSignIn(t *testing.T) {
	f, _, _, opened := streaming(t)
	f.handle("initialize", func(w http.ResponseWriter, _ *http.Request, m received) {
		w.Header().Set("Mcp-Session-Id", fmt.Sprint("s", len(f.requests("initialize"))))
		answer(w, m, strings.Replace(initialized, `{"tools":{}}`, changing, 1))
	})
	d := &door{remote: "notes"}
	f.protect("T", "GET")
	r := newRemoteFor(t, "notes", f.URL)
	r.Authorizer = func(auth.Principal) Authorizer { return d }
	s := open(t, r)
	settled(t, s)
	if _, err := s.Call(t.Context(), "notes", "tools/call", nil, &Caller{Client: "c", Capabilities: json.RawMessage(`{"sampling":{}}`)}); err != nil {
		t.Fatal(err)
	}
	d.signIn("T")
	if err := s.Connect(t.Context(), "notes"); err != nil {
		t.Fatal(err)
	}
	for on := map[string]bool{}; len(on) < 2; {
		select {
		case header := <-opened:
			on[header.Get("Mcp-Session-Id")] = true
		case <-time.After(5 * time.Second):
			t.Fatalf("streams are open for %v only", on)
		}
	}
}

// TestSilentStream: headers that never come hold up nothing.
func TestSilentStream(t *testing.T) {
	f, _, _, _ := streaming(t)
	asked := make(chan struct{}, 10)
	f.handle("GET", func(_ http.ResponseWriter, r *http.Request, _ received) { asked <- struct{}{}; <-r.Context().Done() })
	s := open(t, newRemoteFor(t, "notes", f.URL))
	settled(t, s)
	<-asked
	if _, err := s.Call(t.Context(), "notes", "tools/call", nil, nil); err != nil {
		t.Error(err)
	}
	began := time.Now()
	s.Close()
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("closing took %v", took)
	}
}

// TestUpdates: only what was subscribed to is told, from whichever stream.
func TestUpdates(t *testing.T) {
	f, say, _, opened := streaming(t)
	f.handle("tools/call", func(w http.ResponseWriter, _ *http.Request, m received) {
		w.Header().Set("Content-Type", "text/event-stream")
		fmt.Fprintf(w, "data: {\"jsonrpc\":\"2.0\",\"method\":\"notifications/resources/updated\",\"params\":{\"uri\":\"a:call\"}}\n\n")
		fmt.Fprintf(w, "data: {\"jsonrpc\":\"2.0\",\"id\":%s,\"result\":{}}\n\n", m.ID)
	})
	s := open(t, newRemoteFor(t, "notes", f.URL))
	settled(t, s)
	<-opened
	updates := make(chan string, 10)
	s.OnUpdated(func(remote, uri string, _ json.RawMessage) { updates <- remote + " " + uri })
	update := func(uri string) {
		say <- `"method":"notifications/resources/updated","params":{"uri":"` + uri + `"}`
	}
	for _, uri := range []string{"a:1", "a:2", "a:call"} {
		if err := s.Subscribe(t.Context(), "notes", uri); err != nil {
			t.Fatal(err)
		}
	}
	update("a:0")
	update("a:1")
	if got := <-updates; got != "notes a:1" {
		t.Errorf("got %s", got)
	}
	if err := s.Unsubscribe(t.Context(), "notes", "a:1"); err != nil {
		t.Fatal(err)
	}
	update("a:1")
	update("a:2")
	if got := <-updates; got != "notes a:2" {
		t.Errorf("got %s", got)
	}
	if _, err := s.Call(t.Context(), "notes", "tools/call", nil, nil); err != nil {
		t.Fatal(err)
	}
	if got := <-updates; got != "notes a:call" {
		t.Errorf("got %s", got)
	}
	// A subscription that the remote refuses is none.
	f.handle("resources/subscribe", func(w http.ResponseWriter, _ *http.Request, m received) {
		fmt.Fprintf(w, `{"jsonrpc":"2.0","id":%s,"error":{"code":-32602,"message":"no"}}`, m.ID)
	})
	if err := s.Subscribe(t.Context(), "notes", "a:no"); err == nil {
		t.Error("no error")
	}
	update("a:no")
	update("a:2")
	if got := <-updates; got != "notes a:2" {
		t.Errorf("got %s", got)
	}
}

// TestUpdatesOfParts: an update of a part of a resource is told to those who
// subscribed to the whole, with the part's own URI and all that the remote says.
func TestUpdatesOfParts(t *testing.T) {
	f, say, _, opened := streaming(t)
	s := open(t, newRemoteFor(t, "notes", f.URL))
	settled(t, s)
	<-opened
	updates := make(chan string, 10)
	s.OnUpdated(func(_, subscribed string, params json.RawMessage) { updates <- subscribed + " " + string(params) })
	for _, uri := range []string{"a:1", "file:///dir/"} {
		if err := s.Subscribe(t.Context(), "notes", uri); err != nil {
			t.Fatal(err)
		}
	}
	update := func(params string) { say <- `"method":"notifications/resources/updated","params":` + params }
	for _, none := range []string{"a:10", "a:", "file:///dir2/x", "file:///"} {
		update(`{"uri":"` + none + `"}`)
	}
	for part, whole := range map[string]string{"a:1/sub": "a:1", "file:///dir/x/y": "file:///dir/", "file:///dir/": "file:///dir/"} {
		params := `{"_meta":{"x":1},"uri":"` + part + `","more":1.0}`
		update(params)
		if got, want := <-updates, whole+" "+params; got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
}

// TestListChangedFlood: however often a remote says that its lists have changed,
// they are read so often and no more, and once more after the last time.
func TestListChangedFlood(t *testing.T) {
	f := newFake(t)
	f.declaring(`{"tools":{"listChanged":true}}`)
	const changed = "data: {\"jsonrpc\":\"2.0\",\"method\":\"notifications/tools/list_changed\"}\n\n"
	flooded := make(chan struct{})
	began := time.Now()
	f.handle("GET", func(w http.ResponseWriter, r *http.Request, _ received) {
		w.Header().Set("Content-Type", "text/event-stream")
		for time.Since(began) < 500*time.Millisecond {
			fmt.Fprint(w, changed)
			w.(http.Flusher).Flush()
		}
		f.result("tools/list", listing("the", "last"))
		fmt.Fprint(w, changed)
		w.(http.Flusher).Flush()
		close(flooded)
		<-r.Context().Done()
	})
	s := open(t, newRemoteFor(t, "notes", f.URL))
	news := watch(s)
	<-flooded
	for len(s.Catalogs(t.Context())[0].Tools) != 2 {
		<-news
	}
	if n, most := len(f.requests("tools/list")), int(time.Since(began)/listFloor)+3; n > most {
		t.Errorf("listed %d times, want no more than %d", n, most)
	}
}
