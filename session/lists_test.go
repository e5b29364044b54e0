package session

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"gatehouse/auth"
)

// declaring has a fake declare capabilities.
func (f *fake) declaring(capabilities string) {
	f.handle("initialize", func(w http.ResponseWriter, _ *http.Request, m received) {
		w.Header().Set("Mcp-Session-Id", "s1")
		answer(w, m, `{"protocolVersion":"2025-11-25","capabilities":`+capabilities+`,"serverInfo":{"name":"fake","version":"1"}}`)
	})
}

func (f *fake) result(method, result string) {
	f.handle(method, func(w http.ResponseWriter, _ *http.Request, m received) { answer(w, m, result) })
}

func namesOf(list []Definition) string {
	var names []string
	for _, d := range list {
		names = append(names, d.Name)
	}
	return strings.Join(names, " ")
}

// TestLists: what is declared is listed, byte for byte, and what is not is not
// asked for. A bad definition is left out alone.
func TestLists(t *testing.T) {
	f := newFake(t)
	f.declaring(`{"tools":{},"prompts":{},"resources":{"subscribe":true},"completions":{}}`)
	f.result("prompts/list", `{"prompts":[{"name":"p", "x":1.0},{"title":"no name"},7,{"name":"q"},{"name":"p"}]}`)
	f.handle("resources/list", func(w http.ResponseWriter, _ *http.Request, m received) {
		if strings.Contains(m.Body, "more") {
			answer(w, m, `{"resources":[{"uri":"file:///b"}]}`)
			return
		}
		answer(w, m, `{"resources":[{"uri":"file:///a","size":9007199254740993},{"uri":""}],"nextCursor":"more"}`)
	})
	f.result("resources/templates/list", `{"resourceTemplates":[{"uriTemplate":"file:///{x}"},{"uri":"file:///"}]}`)
	p, written := newPool(t, newRemoteFor(t, "notes", f.URL))
	s, err := p.Open(auth.Local)
	if err != nil {
		t.Fatal(err)
	}
	c := settled(t, s)[0]
	got := fmt.Sprint(namesOf(c.Tools), "|", namesOf(c.Prompts), "|", namesOf(c.Resources), "|", namesOf(c.Templates))
	if want := "echo|p q|file:///a file:///b|file:///{x}"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if string(c.Prompts[0].Raw) != `{"name":"p", "x":1.0}` || string(c.Resources[0].Raw) != `{"uri":"file:///a","size":9007199254740993}` {
		t.Errorf("changed on the way: %s, %s", c.Prompts[0].Raw, c.Resources[0].Raw)
	}
	if want := (Capabilities{Tools: true, Prompts: true, Resources: true, Completions: true, Subscribe: true}); c.Offers != want || !c.Connected || !c.Known {
		t.Errorf("got %+v", c)
	}
	for _, want := range []string{"prompt=p reason=\"the remote lists this name twice", "reason=\"it has no uri\"", "reason=\"it has no uriTemplate\""} {
		if !strings.Contains(written.String(), want) {
			t.Errorf("no %s in the log:\n%s", want, written)
		}
	}
}

func TestListsThatAreNotDeclared(t *testing.T) {
	for capabilities, want := range map[string]string{
		`{}`:                            "",
		`{"tools":{}}`:                  "tools/list",
		`{"prompts":{}}`:                "prompts/list",
		`{"resources":{},"prompts":{}}`: "prompts/list resources/list resources/templates/list",
	} {
		f := newFake(t)
		f.declaring(capabilities)
		f.result("prompts/list", `{"prompts":[]}`)
		f.result("resources/list", `{"resources":[]}`)
		f.result("resources/templates/list", `{"resourceTemplates":[]}`)
		if c := settled(t, open(t, newRemoteFor(t, "notes", f.URL)))[0]; !c.Known {
			t.Errorf("%s: not listed", capabilities)
		}
		var got []string
		for _, k := range kinds {
			if len(f.requests(k.method)) > 0 {
				got = append(got, k.method)
			}
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%s: asked for %v, want %s", capabilities, got, want)
		}
	}
}

// TestBadListHarmsItselfOnly: the tools are there although another list is not,
// and what was listed before stays.
func TestBadListHarmsItselfOnly(t *testing.T) {
	f := newFake(t)
	f.declaring(`{"tools":{},"prompts":{},"resources":{}}`)
	f.result("prompts/list", `{"prompts":[{"name":"p"}]}`)
	f.result("resources/list", `{"resources":{}}`)
	f.handle("resources/templates/list", func(w http.ResponseWriter, _ *http.Request, m received) {
		fmt.Fprintf(w, `{"jsonrpc":"2.0","id":%s,"error":{"code":-32601,"message":"%s"}}`, m.ID, canary)
	})
	s := open(t, newRemoteFor(t, "notes", f.URL))
	if c := settled(t, s)[0]; namesOf(c.Tools) != "echo" || namesOf(c.Prompts) != "p" || len(c.Resources) != 0 {
		t.Errorf("got %+v", c)
	}
	if got := s.Status("notes"); got.State != StateConnected {
		t.Errorf("got %+v", got)
	}
	f.handle("prompts/list", func(w http.ResponseWriter, _ *http.Request, _ received) {
		w.WriteHeader(http.StatusInternalServerError)
	})
	f.result("resources/list", `{"resources":[{"uri":"a:b"}]}`)
	if err := s.Connect(t.Context(), "notes"); err != nil {
		t.Fatal(err)
	}
	if c := settled(t, s)[0]; namesOf(c.Prompts) != "p" || namesOf(c.Resources) != "a:b" {
		t.Errorf("got %+v", c)
	}
}

// TestProtectedList: tools are there before the sign-in that the prompts want.
func TestProtectedList(t *testing.T) {
	f, d, r := guarded(t, "prompts/list")
	f.declaring(`{"tools":{},"prompts":{}}`)
	f.result("prompts/list", `{"prompts":[{"name":"p"}]}`)
	s := open(t, r)
	if c := settled(t, s)[0]; namesOf(c.Tools) != "echo" || len(c.Prompts) != 0 {
		t.Errorf("got %+v", c)
	}
	if got := s.Status("notes"); got.State != StateSignInNeeded {
		t.Errorf("got %+v", got)
	}
	d.signIn("T")
	if err := s.Connect(t.Context(), "notes"); err != nil {
		t.Fatal(err)
	}
	if c := settled(t, s)[0]; namesOf(c.Prompts) != "p" {
		t.Errorf("got %+v", c)
	}
}

// TestAnyListChanged: whichever list changes, it is read again.
func TestAnyListChanged(t *testing.T) {
	for _, list := range []string{"tools", "prompts", "resources"} {
		f := newFake(t)
		f.declaring(`{"tools":{},"prompts":{},"resources":{}}`)
		f.result("prompts/list", `{"prompts":[]}`)
		f.result("resources/list", `{"resources":[]}`)
		f.result("resources/templates/list", `{"resourceTemplates":[]}`)
		f.handle("tools/call", func(w http.ResponseWriter, _ *http.Request, m received) {
			w.Header().Set("Content-Type", "text/event-stream")
			fmt.Fprintf(w, "data: {\"jsonrpc\":\"2.0\",\"method\":\"notifications/%s/list_changed\"}\n\n", list)
			fmt.Fprintf(w, "data: {\"jsonrpc\":\"2.0\",\"id\":%s,\"result\":{}}\n\n", m.ID)
		})
		s := open(t, newRemoteFor(t, "notes", f.URL))
		settled(t, s)
		changed := make(chan struct{}, 10)
		s.OnChange(func() { changed <- struct{}{} })
		f.result("tools/list", `{"tools":[{"name":"new","inputSchema":{}}]}`)
		f.result("prompts/list", `{"prompts":[{"name":"new"}]}`)
		f.result("resources/list", `{"resources":[{"uri":"new"}]}`)
		if _, err := s.Call(t.Context(), "notes", "tools/call", nil, nil); err != nil {
			t.Fatal(err)
		}
		<-changed
		c := settled(t, s)[0]
		for _, got := range [][]Definition{c.Tools, c.Prompts, c.Resources} {
			if !slices.ContainsFunc(got, func(d Definition) bool { return d.Name == "new" }) {
				t.Errorf("%s changed: got %+v", list, c)
			}
		}
	}
}

// TestListsGrowOld: a remote that does not say when its lists change has them read
// again when somebody looks, now and then; one that does is believed.
func TestListsGrowOld(t *testing.T) {
	for capabilities, again := range map[string]bool{`{"tools":{}}`: true, `{"tools":{"listChanged":true}}`: false} {
		bubble(t, func(t *testing.T, f *fake, _ *network, p *Pool) {
			f.declaring(capabilities)
			s := openMany(t, p, 1)[0]
			settled(t, s)
			changed := 0
			s.OnChange(func() { changed++ })
			look := func() {
				s.Refresh()
				synctest.Wait()
			}
			f.result("tools/list", `{"tools":[{"name":"new","inputSchema":{}}]}`)
			look()
			if got := len(f.requests("tools/list")); got != 1 {
				t.Errorf("%s: listed %d times at once", capabilities, got)
			}
			time.Sleep(refreshFloor + time.Second)
			look()
			if got := namesOf(settled(t, s)[0].Tools) == "new"; got != again || changed > 1 || changed == 1 != again {
				t.Errorf("%s: read again: %v, and told %d times", capabilities, got, changed)
			}
		})
	}
}
