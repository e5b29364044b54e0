package session

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"gatehouse/auth"
)

// stateless has a legacy fake begin no MCP session.
func (f *fake) stateless(capabilities string) {
	f.handle("initialize", func(w http.ResponseWriter, _ *http.Request, m received) {
		answer(w, m, `{"protocolVersion":"2025-11-25","capabilities":`+capabilities+`,"serverInfo":{"name":"fake","version":"1"}}`)
	})
}

// TestCommonConnectionTellsNobody: what comes on it beside all calls is not taken
// for anybody's, also if each principal has one client only.
func TestCommonConnectionTellsNobody(t *testing.T) {
	f := newFake(t)
	f.stateless(`{"tools":{}}`)
	p, _ := newPool(t, newRemoteFor(t, "notes", f.URL))
	heard := 0
	for _, user := range []string{"alice", "bob"} {
		s, err := p.OpenFor(auth.Principal{Issuer: "i", Subject: user}, json.RawMessage(`{}`))
		if err != nil {
			t.Fatal(err)
		}
		from := &Caller{Client: user, Later: func(string, json.RawMessage) { heard++ }}
		if _, err := s.Call(t.Context(), "notes", "tools/call", nil, from); err != nil {
			t.Fatal(err)
		}
		l, release, err := s.byName["notes"].linkFor(t.Context(), from)
		if err != nil {
			t.Fatal(err)
		}
		defer release()
		if !l.connection.shared {
			t.Error("the connection is not in common")
		}
		l.heard(nil, "notifications/message", json.RawMessage(`{"level":"error","data":"somebody's"}`))
	}
	if heard != 0 {
		t.Errorf("heard %d times", heard)
	}
}

// TestCommonConnection: principals share one handshake and one list at a remote
// that keeps nothing of them, and have one each at every other.
func TestCommonConnection(t *testing.T) {
	const users = 8
	numbered := func(f *fake) {
		f.handle("initialize", func(w http.ResponseWriter, _ *http.Request, m received) {
			w.Header().Set("Mcp-Session-Id", string(m.ID)+fmt.Sprint(len(f.requests("initialize"))))
			answer(w, m, initialized)
		})
	}
	signIn := func(auth.Principal) Authorizer { return &door{} }
	for name, tt := range map[string]struct {
		prepare    func(f *fake)
		modern     bool
		authorizer func(auth.Principal) Authorizer
		handshakes int // and lists
		sessions   int // that are ended in the end
	}{
		"modern":              {modern: true, handshakes: 1},
		"legacy":              {prepare: func(f *fake) { f.stateless(`{"tools":{}}`) }, handshakes: 1},
		"with sessions":       {prepare: numbered, handshakes: users, sessions: users},
		"keeps log levels":    {prepare: func(f *fake) { f.stateless(`{"tools":{},"logging":{}}`) }, handshakes: users},
		"keeps subscriptions": {prepare: func(f *fake) { f.stateless(`{"tools":{},"resources":{"subscribe":true}}`) }, handshakes: users},
		"may want a sign-in":  {modern: true, authorizer: signIn, handshakes: users},
	} {
		t.Run(name, func(t *testing.T) {
			f, handshake := newFake(t), "initialize"
			if tt.modern {
				f, handshake = newModern(t), "server/discover"
			}
			f.result("resources/list", `{"resources":[]}`)
			f.result("resources/templates/list", `{"resourceTemplates":[]}`)
			if tt.prepare != nil {
				tt.prepare(f)
			}
			r := newRemoteFor(t, "notes", f.URL)
			r.Authorizer = tt.authorizer
			p, _ := newPool(t, r)
			var calls sync.WaitGroup
			for _, s := range openMany(t, p, users) {
				calls.Go(func() {
					if c := settled(t, s)[0]; namesOf(c.Tools) != "echo" || !c.Connected || !c.Known {
						t.Errorf("got %+v, %+v", c, s.Status("notes"))
					}
					if st := s.Status("notes"); st.State != StateConnected || st.Tools != 1 {
						t.Errorf("got %+v", st)
					}
					if _, err := s.Call(t.Context(), "notes", "tools/call", json.RawMessage(`{"name":"echo"}`), &Caller{Modern: tt.modern}); err != nil {
						t.Error(err)
					}
				})
			}
			calls.Wait()
			if n := p.Connections()["notes"]; n != users {
				t.Errorf("%d principals are connected", n)
			}
			// One that comes later.
			late, err := p.Open(auth.Local)
			if err != nil {
				t.Fatal(err)
			}
			settled(t, late)
			want := tt.handshakes
			if want > 1 {
				want++
			}
			if n, lists := len(f.requests(handshake)), len(f.requests("tools/list")); n != want || lists != want {
				t.Errorf("%d of %s and %d of tools/list, want %d", n, handshake, lists, want)
			}
			on := map[string]bool{}
			for _, m := range f.requests("tools/call") {
				on[m.Header.Get("Mcp-Session-Id")] = true
			}
			if want := max(1, tt.sessions); len(on) != want {
				t.Errorf("called in %d MCP sessions, want %d", len(on), want)
			}
			p.Close()
			if n := len(f.requests("DELETE")); tt.sessions > 0 && n != tt.sessions+1 || tt.sessions == 0 && n != 0 {
				t.Errorf("%d MCP sessions were ended", n)
			}
		})
	}
}

// TestCommonAndOwn: a client that can be asked something has a link of its own
// beside the common one, where a remote of both eras may ask.
func TestCommonAndOwn(t *testing.T) {
	f := asks(t)
	f.result("server/discover", discovered)
	for _, k := range kinds[1:] {
		f.result(k.method, `{"`+k.member+`":[]}`)
	}
	f.handle("subscriptions/listen", func(_ http.ResponseWriter, r *http.Request, _ received) { <-r.Context().Done() })
	p, _ := newPool(t, newRemoteFor(t, "notes", f.URL))
	sessions := openMany(t, p, 6)
	var calls sync.WaitGroup
	for i, s := range sessions {
		settled(t, s)
		name := fmt.Sprint("user", i)
		from := &Caller{
			Client: "the same name", Capabilities: json.RawMessage(`{"elicitation":{}}`),
			Ask: func(context.Context, string, json.RawMessage) (json.RawMessage, error) {
				return json.RawMessage(`{"action":"` + name + `"}`), nil
			},
		}
		for range 3 {
			calls.Go(func() {
				got, err := s.Call(t.Context(), "notes", "tools/call", nil, from)
				if err != nil || !strings.Contains(string(got), name+`\"`) {
					t.Errorf("%s got %s, %v", name, got, err)
				}
			})
		}
	}
	calls.Wait()
	if n := len(f.requests("server/discover")); n != 1 {
		t.Errorf("%d times asked what it is", n)
	}
	if n := len(f.requests("initialize")); n != 6 {
		t.Errorf("%d links for 6 clients that can be asked", n)
	}
	// They end with their principal.
	sessions[0].Close()
	if n := len(f.requests("DELETE")); n != 1 {
		t.Errorf("%d of them ended with one", n)
	}
}

// TestCommonConnectionTellsApart: progress and messages reach the caller whose
// call they come with, each with its own token and level; what comes beside all
// calls could be anybody's and reaches nobody.
func TestCommonConnectionTellsApart(t *testing.T) {
	f := newModern(t)
	f.handle("tools/call", func(w http.ResponseWriter, _ *http.Request, m received) {
		var params struct {
			Name string
			Meta struct {
				Token json.RawMessage `json:"progressToken"`
				Level string          `json:"io.modelcontextprotocol/logLevel"`
			} `json:"_meta"`
		}
		if err := json.Unmarshal(m.Params, &params); err != nil {
			t.Error(err)
		}
		w.Header().Set("Content-Type", "text/event-stream")
		for i := range 50 {
			fmt.Fprintf(w, "data: {\"jsonrpc\":\"2.0\",\"method\":\"notifications/progress\",\"params\":{\"progressToken\":%s,\"progress\":%d,\"message\":%q}}\n\n", params.Meta.Token, i, params.Name)
		}
		fmt.Fprintf(w, "data: {\"jsonrpc\":\"2.0\",\"method\":\"notifications/message\",\"params\":{\"level\":%q,\"data\":%q}}\n\n", params.Meta.Level, params.Name)
		fmt.Fprintf(w, "data: {\"jsonrpc\":\"2.0\",\"id\":%s,\"result\":{}}\n\n", m.ID)
	})
	p, _ := newPool(t, newRemoteFor(t, "notes", f.URL))
	var calls sync.WaitGroup
	for i, s := range openMany(t, p, 4) {
		settled(t, s)
		name := fmt.Sprint("user", i)
		s.SetLogLevel(name)
		for range 5 {
			calls.Go(func() {
				heard := 0
				_, err := s.Call(t.Context(), "notes", "tools/call", json.RawMessage(`{"name":"`+name+`","_meta":{"progressToken":"same"}}`),
					&Caller{Client: "same", Modern: true, Notify: func(method string, params json.RawMessage) {
						heard++
						last := `{"level":"` + name + `","data":"` + name + `"}`
						if !strings.Contains(string(params), `"progressToken":"same"`) && string(params) != last || !strings.Contains(string(params), name) {
							t.Errorf("%s heard %s", name, params)
						}
					}})
				if err != nil || heard != 51 {
					t.Errorf("%s heard %d, %v", name, heard, err)
				}
			})
		}
	}
	calls.Wait()

	// A legacy one speaks on the common stream while one call is in flight.
	f, say, _, opened := streaming(t)
	f.stateless(`{"tools":{"listChanged":true}}`)
	refused := make(chan string, 1)
	f.handle("", func(w http.ResponseWriter, _ *http.Request, m received) {
		refused <- m.Body
		w.WriteHeader(http.StatusAccepted)
	})
	f.handle("tools/call", func(w http.ResponseWriter, _ *http.Request, m received) {
		say <- `"method":"notifications/message","params":{"level":"error","data":"whose?"}`
		say <- `"id":1,"method":"elicitation/create","params":{}`
		<-refused
		answer(w, m, `{}`)
	})
	p, _ = newPool(t, newRemoteFor(t, "notes", f.URL))
	sessions := openMany(t, p, 2)
	settled(t, sessions[0])
	<-opened
	never := func(method string, params json.RawMessage) { t.Errorf("heard %s %s", method, params) }
	if _, err := sessions[0].Call(t.Context(), "notes", "tools/call", nil, &Caller{Client: "c", Notify: never, Later: never}); err != nil {
		t.Error(err)
	}
}

// TestCommonStream: what a remote says of its lists and resources comes once and
// reaches all whom it concerns, however slow one of them is; one that ends its
// subscription, or leaves, takes nothing from the others. With the last the
// stream ends.
func TestCommonStream(t *testing.T) {
	f := newModern(t)
	type stream struct {
		wanted string
		say    chan string
		gone   <-chan struct{}
	}
	streams := make(chan stream, 10)
	f.handle("subscriptions/listen", func(w http.ResponseWriter, r *http.Request, m received) {
		var params struct {
			Notifications struct {
				URIs []string `json:"resourceSubscriptions"`
			}
		}
		if err := json.Unmarshal(m.Params, &params); err != nil {
			t.Error(err)
		}
		st := stream{strings.Join(params.Notifications.URIs, " "), make(chan string), r.Context().Done()}
		w.Header().Set("Content-Type", "text/event-stream")
		fmt.Fprint(w, "data: {\"jsonrpc\":\"2.0\",\"method\":\"notifications/subscriptions/acknowledged\",\"params\":{}}\n\n")
		w.(http.Flusher).Flush()
		streams <- st
		for {
			select {
			case say := <-st.say:
				fmt.Fprintf(w, "data: {\"jsonrpc\":\"2.0\",%s}\n\n", say)
				w.(http.Flusher).Flush()
			case <-st.gone:
				return
			}
		}
	})
	p, _ := newPool(t, newRemoteFor(t, "notes", f.URL))
	sessions := openMany(t, p, 3)
	alice, bob, slow := sessions[0], sessions[1], sessions[2]
	hold := make(chan struct{})
	slow.OnChange(func() { <-hold })
	slow.OnUpdated(func(string, string, json.RawMessage) { <-hold })
	updates := make(chan string, 10)
	var changes [2]chan struct{}
	for i, s := range sessions[:2] {
		settled(t, s)
		changes[i] = watch(s)
		s.OnUpdated(func(_, uri string, _ json.RawMessage) { updates <- fmt.Sprint(i, uri) })
	}
	next := func(want string) stream {
		t.Helper()
		st := <-streams
		if st.wanted != want {
			t.Errorf("asked for updates of %q, want %q", st.wanted, want)
		}
		return st
	}
	next("")
	for _, s := range sessions {
		if err := s.Subscribe(t.Context(), "notes", "a:1"); err != nil {
			t.Fatal(err)
		}
	}
	now := next("a:1")
	update := func(st stream, uri string, want ...string) {
		t.Helper()
		st.say <- `"method":"notifications/resources/updated","params":{"uri":"` + uri + `"}`
		var got []string
		for range want {
			got = append(got, <-updates)
		}
		if slices.Sort(got); !slices.Equal(got, want) {
			t.Errorf("%s: told %v, want %v", uri, got, want)
		}
	}
	update(now, "a:1", "0a:1", "1a:1")
	for _, c := range changes { // of before
		for len(c) > 0 {
			<-c
		}
	}
	f.result("tools/list", listing("new"))
	now.say <- `"method":"notifications/tools/list_changed"`
	for i, s := range sessions[:2] {
		<-changes[i]
		if c := s.Catalogs(t.Context())[0]; namesOf(c.Tools) != "new" {
			t.Errorf("got %+v", c)
		}
	}
	if n := len(f.requests("tools/list")); n != 2 {
		t.Errorf("listed %d times", n)
	}
	if err := bob.Subscribe(t.Context(), "notes", "a:2"); err != nil {
		t.Fatal(err)
	}
	now = next("a:1 a:2")
	if err := alice.Unsubscribe(t.Context(), "notes", "a:1"); err != nil {
		t.Fatal(err)
	}
	if err := alice.Unsubscribe(t.Context(), "notes", "a:2"); err != nil {
		t.Fatal(err) // hers it never was
	}
	update(now, "a:1", "1a:1")
	update(now, "a:2", "1a:2")
	bob.Close()
	now = next("a:1")
	close(hold)
	slow.Close()
	now = next("")
	select {
	case <-now.gone:
		t.Error("the stream has ended, and alice is there")
	default:
	}
	if _, err := alice.Call(t.Context(), "notes", "tools/call", nil, &Caller{Modern: true}); err != nil {
		t.Error(err)
	}
	alice.Close()
	<-now.gone
	// Whoever comes then begins anew.
	again, err := p.Open(auth.Local)
	if err != nil {
		t.Fatal(err)
	}
	if c := settled(t, again)[0]; namesOf(c.Tools) != "new" || len(f.requests("server/discover")) != 2 {
		t.Errorf("got %+v after %d times asked what it is", c, len(f.requests("server/discover")))
	}
}

// TestCommonRest: the common connection is there as long as anybody is awake;
// who comes back, by a call even, finds it, and what was subscribed to.
func TestCommonRest(t *testing.T) {
	f := newModern(t)
	wanted, gone := make(chan string, 10), make(chan string, 10)
	f.handle("subscriptions/listen", func(w http.ResponseWriter, r *http.Request, m received) {
		uris := "none"
		if strings.Contains(string(m.Params), `["a:1"]`) {
			uris = "a:1"
		}
		w.Header().Set("Content-Type", "text/event-stream")
		fmt.Fprint(w, "data: {\"jsonrpc\":\"2.0\",\"method\":\"notifications/subscriptions/acknowledged\",\"params\":{}}\n\n")
		w.(http.Flusher).Flush()
		wanted <- uris
		<-r.Context().Done()
		gone <- uris
	})
	expect := func(from chan string, want string) {
		t.Helper()
		if got := <-from; got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
	p, _ := newPool(t, newRemoteFor(t, "notes", f.URL))
	sessions := openMany(t, p, 2)
	for _, s := range sessions {
		settled(t, s)
	}
	expect(wanted, "none")
	if err := sessions[0].Subscribe(t.Context(), "notes", "a:1"); err != nil {
		t.Fatal(err)
	}
	expect(wanted, "a:1")
	expect(gone, "none")
	sessions[0].Rest()
	expect(wanted, "none")
	expect(gone, "a:1")
	for i, s := range sessions {
		if c := s.Catalogs(t.Context())[0]; namesOf(c.Tools) != "echo" || !c.Known || c.Connected != (i == 1) {
			t.Errorf("user %d sees %+v", i, c)
		}
	}
	sessions[1].Rest()
	sessions[1].Rest() // twice is safe
	expect(gone, "none")
	if n := p.Connections()["notes"]; n != 0 {
		t.Errorf("%d are connected at rest", n)
	}
	f.result("tools/list", listing("new"))
	changed := make(chan struct{}, 100)
	unwatch := sessions[1].OnChange(func() { changed <- struct{}{} })
	if _, err := sessions[0].Call(t.Context(), "notes", "tools/call", nil, &Caller{Modern: true}); err != nil {
		t.Error(err)
	}
	expect(wanted, "a:1")
	sessions[1].Wake()
	<-changed
	unwatch()
	for _, s := range sessions {
		if c := s.Catalogs(t.Context())[0]; namesOf(c.Tools) != "new" || !c.Connected {
			t.Errorf("awake again: %+v", c)
		}
	}
	if n := len(f.requests("server/discover")); n != 2 {
		t.Errorf("%d times asked what it is", n)
	}
	// Some come and go while others call.
	f.handle("subscriptions/listen", func(_ http.ResponseWriter, r *http.Request, _ received) { <-r.Context().Done() })
	var calls sync.WaitGroup
	for _, s := range sessions {
		calls.Go(func() {
			for range 50 {
				if _, err := s.Call(t.Context(), "notes", "tools/call", nil, &Caller{Modern: true}); err != nil {
					t.Error(err)
				}
			}
		})
		calls.Go(func() {
			for range 50 {
				s.Rest()
				s.Wake()
			}
		})
		calls.Go(func() {
			for range 50 {
				if err := s.Connect(t.Context(), "notes"); err != nil {
					t.Error(err)
				}
			}
		})
	}
	calls.Wait()
}

// TestCommonConnectionParts: a remote that keeps nothing, and then does, gives
// nobody's session to another; what was listed and subscribed to stays.
func TestCommonConnectionParts(t *testing.T) {
	f := newModern(t)
	p, _ := newPool(t, newRemoteFor(t, "notes", f.URL))
	sessions := openMany(t, p, 4)
	for _, s := range sessions {
		settled(t, s)
	}
	if err := sessions[2].Subscribe(t.Context(), "notes", "a:1"); err != nil {
		t.Fatal(err)
	}
	before := sessions[0].Catalogs(t.Context())[0]
	f.handle("server/discover", nil)
	f.handle("subscriptions/listen", nil)
	subscribed := make(chan string, 10)
	f.handle("resources/subscribe", func(w http.ResponseWriter, _ *http.Request, m received) {
		subscribed <- m.Header.Get("Mcp-Session-Id")
		answer(w, m, `{}`)
	})
	var ids atomic.Int64
	f.handle("initialize", func(w http.ResponseWriter, _ *http.Request, m received) {
		w.Header().Set("Mcp-Session-Id", fmt.Sprint("s", ids.Add(1)))
		answer(w, m, strings.Replace(initialized, `{"tools":{}}`, changing, 1))
	})
	var mu sync.Mutex
	of := map[string]string{} // MCP sessions, and whose
	f.handle("tools/call", func(w http.ResponseWriter, _ *http.Request, m received) {
		id := m.Header.Get("Mcp-Session-Id")
		if id == "" {
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(http.StatusBadRequest)
			fmt.Fprintf(w, `{"jsonrpc":"2.0","id":%s,"error":{"code":-32022,"message":"unsupported protocol version"}}`, m.ID)
			return
		}
		mu.Lock()
		defer mu.Unlock()
		if was := of[id]; was != "" && was != string(m.Params) {
			t.Errorf("%s in the MCP session of %s", m.Params, was)
		}
		of[id] = string(m.Params)
		answer(w, m, `{}`)
	})
	for round := range 2 {
		for i, s := range sessions {
			if _, err := s.Call(t.Context(), "notes", "tools/call", json.RawMessage(fmt.Sprintf(`{"who":%d}`, i)), &Caller{Modern: true}); err != nil {
				t.Error(err)
			}
			if c := s.Catalogs(t.Context())[0]; namesOf(c.Tools) != "echo" || !c.Known {
				t.Errorf("round %d: got %+v, before it was %+v", round, c, before)
			}
		}
	}
	if len(of) != 4 || ids.Load() != 4 {
		t.Errorf("%d MCP sessions are used, %d were begun", len(of), ids.Load())
	}
	if id := <-subscribed; of[id] != `{"who":2}` {
		t.Errorf("subscribed for %s", of[id])
	}
}

// TestCommonRecovery: a remote that is down is tried for all at once, and is back
// for all.
func TestCommonRecovery(t *testing.T) {
	bubble(t, func(t *testing.T, f *fake, n *network, p *Pool) {
		p.remotes[0].Authorizer = nil
		f.stateless(`{"tools":{}}`)
		n.down.Store(true)
		sessions := openMany(t, p, 50)
		for _, s := range sessions {
			settled(t, s)
		}
		if got := countStates(sessions); got[StateUnavailable] != 50 {
			t.Errorf("got %v", got)
		}
		before := n.dials.Load()
		time.Sleep(time.Minute)
		if tries := n.dials.Load() - before; tries > 60 {
			t.Errorf("tried %d times in a minute", tries)
		}
		n.down.Store(false)
		time.Sleep(lastRecovery * 2)
		synctest.Wait()
		if got := countStates(sessions); got[StateConnected] != 50 {
			t.Errorf("got %v", got)
		}
		if got := len(f.requests("initialize")); got != 1 {
			t.Errorf("%d handshakes", got)
		}
		for _, s := range sessions {
			s.Close()
		}
		synctest.Wait()
		if !p.remotes[0].recovery.idle() {
			t.Error("somebody is waited for, and nobody is there")
		}
	})
}

// shelf is a Memory.
type shelf struct {
	mu   sync.Mutex
	kept map[auth.Principal]string
	put  chan auth.Principal
}

func (s *shelf) Remember(_ context.Context, p auth.Principal, _, _ string, listed []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.kept[p] = string(listed)
	s.put <- p
	return nil
}

func (s *shelf) Recall(_ context.Context, p auth.Principal, _, _ string) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if kept, ok := s.kept[p]; ok {
		return []byte(kept), nil
	}
	return nil, nil
}

func (s *shelf) Unremember(context.Context, auth.Principal, string, string) error { return nil }

// TestCommonCatalogIsRemembered: for each principal, and nobody is shown what
// only another has been shown.
func TestCommonCatalogIsRemembered(t *testing.T) {
	f := newModern(t)
	memory := &shelf{kept: map[auth.Principal]string{}, put: make(chan auth.Principal, 10)}
	begin := func() *Pool {
		p := New(Config{Remotes: []Remote{newRemoteFor(t, "notes", f.URL)}, Name: "g", Version: "1", Log: testLog(t), Memory: memory})
		t.Cleanup(p.Close)
		return p
	}
	p := begin()
	for _, s := range openMany(t, p, 2) {
		settled(t, s)
	}
	seen := map[string]bool{(<-memory.put).Subject: true, (<-memory.put).Subject: true}
	if !seen["user0"] || !seen["user1"] || len(seen) != 2 {
		t.Errorf("remembered for %v", seen)
	}
	p.Close()
	f.handle("server/discover", func(w http.ResponseWriter, _ *http.Request, _ received) { w.WriteHeader(http.StatusTooManyRequests) })
	for i, s := range openMany(t, begin(), 3) {
		want := "echo"
		if i == 2 {
			want = ""
		}
		if c := settled(t, s)[0]; namesOf(c.Tools) != want || c.Known || c.Connected {
			t.Errorf("user %d is shown %+v", i, c)
		}
	}
}

// TestRefusedSubscription: a resource that a remote wants to tell nobody of, and
// refuses the whole stream for, takes nothing from those who want something else.
func TestRefusedSubscription(t *testing.T) {
	f := newModern(t)
	var streams sync.Map // of what is said, by their requests
	f.handle("subscriptions/listen", func(w http.ResponseWriter, r *http.Request, m received) {
		if strings.Contains(m.Body, "bad:") {
			w.Header().Set("Content-Type", "application/json")
			fmt.Fprintf(w, `{"jsonrpc":"2.0","id":%s,"error":{"code":-32602,"message":"no such resource"}}`, m.ID)
			return
		}
		say := make(chan string)
		streams.Store(string(m.ID), say)
		defer streams.Delete(string(m.ID))
		w.Header().Set("Content-Type", "text/event-stream")
		fmt.Fprint(w, "data: {\"jsonrpc\":\"2.0\",\"method\":\"notifications/subscriptions/acknowledged\",\"params\":{}}\n\n")
		w.(http.Flusher).Flush()
		for {
			select {
			case message := <-say:
				fmt.Fprintf(w, "data: {\"jsonrpc\":\"2.0\",%s}\n\n", message)
				w.(http.Flusher).Flush()
			case <-r.Context().Done():
				return
			}
		}
	})
	p, _ := newPool(t, newRemoteFor(t, "notes", f.URL))
	sessions := openMany(t, p, 2)
	alice, bob := sessions[0], sessions[1]
	updates := make(chan string, 10)
	for _, s := range sessions {
		settled(t, s)
		s.OnUpdated(func(_, uri string, _ json.RawMessage) {
			select {
			case updates <- uri:
			default: // it is said again
			}
		})
	}
	if err := alice.Subscribe(t.Context(), "notes", "a:1"); err != nil {
		t.Fatal(err)
	}
	// At once, so that they may be asked for together.
	var subscribing sync.WaitGroup
	for _, uri := range []string{"bad:1", "b:1", "bad:2", "b:2", "bad:3"} {
		subscribing.Go(func() {
			if err := bob.Subscribe(t.Context(), "notes", uri); err != nil {
				t.Error(err)
			}
		})
	}
	subscribing.Wait()
	began := time.Now()
	for _, want := range []string{"a:1", "b:1", "b:2"} {
		for got := ""; got != want; {
			streams.Range(func(_, say any) bool {
				select {
				case say.(chan string) <- `"method":"notifications/resources/updated","params":{"uri":"` + want + `"}`:
				default:
				}
				return true
			})
			select {
			case got = <-updates:
			default: // the stream may have been about to end
				runtime.Gosched()
			}
			if time.Since(began) > 10*time.Second {
				t.Fatalf("nobody is told of %s", want)
			}
		}
	}
	if n := len(f.requests("subscriptions/listen")); n > 40 {
		t.Errorf("asked %d times", n)
	}
	c := alice.byName["notes"].main()
	c.mu.Lock()
	defer c.mu.Unlock()
	for uri, w := range c.subscribed {
		if refused := w.refused != nil; refused != strings.HasPrefix(uri, "bad:") {
			t.Errorf("%s: refused %v", uri, refused)
		}
	}
}
