package gateway

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"gatehouse/auth"
)

// stream opens a client's own event stream and returns what comes on it.
func (c *plainClient) stream() <-chan string {
	c.t.Helper()
	req, err := http.NewRequestWithContext(c.t.Context(), http.MethodGet, c.url, nil)
	if err != nil {
		c.t.Fatal(err)
	}
	req.Header.Set("Accept", "text/event-stream")
	req.Header.Set("Mcp-Session-Id", c.session)
	req.Header.Set("Mcp-Protocol-Version", "2025-11-25")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		c.t.Fatal(err)
	}
	return c.events(resp)
}

// events returns the data of a response's events until it ends.
func (c *plainClient) events(resp *http.Response) <-chan string {
	out, done := make(chan string, 100), make(chan struct{})
	go func() {
		defer close(done)
		lines := bufio.NewScanner(resp.Body)
		for lines.Scan() {
			if data, ok := strings.CutPrefix(lines.Text(), "data: "); ok && data != "" {
				out <- data
			}
		}
	}()
	c.t.Cleanup(func() { resp.Body.Close(); <-done })
	return out
}

// listen opens a modern client's stream of subscriptions, up to its
// acknowledgement.
func (c *plainClient) listen(notifications string) <-chan string {
	c.t.Helper()
	resp := c.post(fmt.Sprintf(`{"jsonrpc":"2.0","id":%d,"method":"subscriptions/listen","params":{%s,"notifications":{%s}}}`, c.ids.Add(1), modernMeta, notifications), "")
	events := c.events(resp)
	// The SDK takes the stream for a legacy one until it has read the request, and
	// may send a change before the acknowledgement.
	until(c.t, events, "notifications/subscriptions/acknowledged")
	return events
}

// until returns the next event that is of this method. It skips only what a
// client is told when a remote has just been connected, if it is there in time.
func until(t *testing.T, events <-chan string, method string) string {
	t.Helper()
	event := <-events
	for strings.Contains(event, "/list_changed") && !strings.Contains(event, method) {
		event = <-events
	}
	if !strings.Contains(event, `"`+method+`"`) {
		t.Errorf("got %s, want %s", event, method)
	}
	return event
}

// changingRemote is a remote with an event stream that says what a test says.
func changingRemote(t *testing.T) *plainRemote {
	r := newPlainRemote(t, `{"tools":{"listChanged":true},"prompts":{"listChanged":true},"resources":{"listChanged":true,"subscribe":true}}`, map[string]string{
		"tools/list":               `{"tools":[]}`,
		"prompts/list":             `{"prompts":[]}`,
		"resources/list":           `{"resources":[{"uri":"a:1"},{"uri":"a:2"}]}`,
		"resources/templates/list": `{"resourceTemplates":[]}`,
		"resources/subscribe":      `{}`, "resources/unsubscribe": `{}`,
	})
	r.say, r.opened = make(chan string), make(chan struct{}, 10)
	return r
}

func (r *plainRemote) set(method, result string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.results[method] = result
}

// TestListChangedFansIn: what changes at a remote is told to its clients of
// both eras, and no more than that.
func TestListChangedFansIn(t *testing.T) {
	remote := changingRemote(t)
	remote.set("resources/list", `{"resources":[]}`)
	g := newFront(t, strings.TrimSuffix(servers("r", remote.URL), "}")+`, "gateway": {"sessions": "shared"}}`)
	legacy, modern := newPlainClient(t, g.url, "{}", false), newPlainClient(t, g.url, "{}", true)
	legacy.call("tools/list", "")
	<-remote.opened
	streams := []<-chan string{legacy.stream(), modern.listen(`"promptsListChanged":true,"resourcesListChanged":true`)}
	remote.set("prompts/list", `{"prompts":[{"name":"new"}]}`)
	remote.say <- `"method":"notifications/prompts/list_changed"`
	until(t, streams[0], "notifications/prompts/list_changed")
	if got := <-streams[1]; !strings.Contains(got, "notifications/prompts/list_changed") {
		t.Errorf("got %s", got)
	}
	remote.set("resources/templates/list", `{"resourceTemplates":[{"uriTemplate":"a:{x}"}]}`)
	remote.say <- `"method":"notifications/resources/list_changed"`
	until(t, streams[0], "notifications/resources/list_changed")
	if got := <-streams[1]; !strings.Contains(got, "notifications/resources/list_changed") {
		t.Errorf("got %s", got)
	}
	// The list that a client reads then is the new one.
	if got, want := legacy.call("prompts/list", ""), `{"prompts":[{"name":"r_new"}]}`; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if got, want := legacy.call("resources/templates/list", ""), `{"resourceTemplates":[{"uriTemplate":"a:{x}"}]}`; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

// TestSubscriptions: an update reaches those who subscribed, in both eras, and
// nobody else of the same principal; the remote is left when the last one goes.
func TestSubscriptions(t *testing.T) {
	remote := changingRemote(t)
	g := newFront(t, strings.TrimSuffix(servers("first", remote.URL, "second", changingRemote(t).URL), "}")+`, "gateway": {"sessions": "shared"}}`)
	one, two := newPlainClient(t, g.url, "{}", false), newPlainClient(t, g.url, "{}", false)
	one.call("tools/list", "")
	<-remote.opened
	ones, twos := one.stream(), two.stream()
	for _, sub := range []struct {
		c   *plainClient
		uri string
	}{{one, "a:1"}, {two, "a:2"}, {one, "gatehouse:first/a:2"}} {
		if got := sub.c.call("resources/subscribe", fmt.Sprintf(`"uri":%q`, sub.uri)); got != "{}" {
			t.Fatalf("%s: got %s", sub.uri, got)
		}
	}
	threes := newPlainClient(t, g.url, "{}", true).listen(`"resourceSubscriptions":["a:1"]`)
	if got, want := remote.got("resources/subscribe"), `{"uri":"a:1"}`; got != want {
		t.Errorf("the remote got %s, want %s", got, want)
	}
	update := func(uri string) {
		remote.say <- `"method":"notifications/resources/updated","params":{"uri":"` + uri + `"}`
	}
	update("a:0")
	update("a:1")
	for _, events := range []<-chan string{ones, threes} {
		if got := until(t, events, "notifications/resources/updated"); !strings.Contains(got, `"uri":"a:1"`) {
			t.Errorf("got %s", got)
		}
	}
	update("a:2")
	if got := until(t, ones, "notifications/resources/updated"); !strings.Contains(got, `"uri":"gatehouse:first/a:2"`) {
		t.Errorf("got %s", got)
	}
	if got := until(t, twos, "notifications/resources/updated"); !strings.Contains(got, `"uri":"a:2"`) {
		t.Errorf("got %s", got)
	}
	// A part of it is told as what it is, with what the remote adds.
	const part = `"more":1.0,"_meta":{"x":1`
	remote.say <- `"method":"notifications/resources/updated","params":{"uri":"a:2/sub",` + part + `}}`
	if got := until(t, twos, "notifications/resources/updated"); !strings.Contains(got, `"params":{"uri":"a:2/sub",`+part+`}}`) {
		t.Errorf("got %s", got)
	}
	if got := until(t, ones, "notifications/resources/updated"); !strings.Contains(got, `"params":{"uri":"gatehouse:first/a:2/sub",`+part+`}}`) {
		t.Errorf("got %s", got)
	}
	remote.say <- `"method":"notifications/resources/updated","params":{"uri":"a:1/sub",` + part + `}}`
	if got := until(t, ones, "notifications/resources/updated"); !strings.Contains(got, `"params":{"uri":"a:1/sub",`+part+`}}`) {
		t.Errorf("got %s", got)
	}
	if got := until(t, threes, "notifications/resources/updated"); !strings.Contains(got, `"params":{"uri":"a:1/sub",`+part+`,"io.modelcontextprotocol/subscriptionId":`) {
		t.Errorf("got %s", got)
	}
	// The first of two who leave costs the other nothing.
	if got := one.call("resources/unsubscribe", `"uri":"a:1"`); got != "{}" {
		t.Error(got)
	}
	if got := remote.got("resources/unsubscribe"); got != "" {
		t.Errorf("the remote got %s while a client is left", got)
	}
	update("a:1")
	until(t, threes, "notifications/resources/updated")
	// One that goes away without a word leaves nothing behind.
	req, err := http.NewRequestWithContext(t.Context(), http.MethodDelete, two.url, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Mcp-Session-Id", two.session)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, v := range g.views {
		v.subs.mu.Lock()
		if _, ok := v.subs.byURI["a:2"]; ok || len(v.subs.byURI) != 2 {
			t.Errorf("left: %v", v.subs.byURI)
		}
		v.subs.mu.Unlock()
	}
}

// TestListenMissesNothing: what changes while a listen is being acknowledged is
// told right after that.
func TestListenMissesNothing(t *testing.T) {
	g := newFront(t, servers("r", changingRemote(t).URL))
	v, err := g.view(auth.Local)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	var told []string
	c := caller{view: v, modern: true, notify: func(method string, _ json.RawMessage) {
		if told = append(told, method); len(told) == 1 {
			v.listens.announce(announcement{prompts: true})
			return
		}
		cancel()
	}}
	if _, err := g.listen(ctx, c, json.RawMessage("1"), json.RawMessage(`{"notifications":{"promptsListChanged":true}}`)); err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(told, " "); !strings.HasPrefix(got, "notifications/subscriptions/acknowledged notifications/prompts/list_changed") {
		t.Errorf("told %s", got)
	}
}

// TestListensOnOnePipe: each of a client's listens is told what it asked for, under
// its own id, until that one ends; an open one holds up nobody's leaving.
func TestListensOnOnePipe(t *testing.T) {
	remote := changingRemote(t)
	g := newFront(t, servers("r", remote.URL))
	in, inWriter := io.Pipe()
	outReader, out := io.Pipe()
	served := make(chan error, 1)
	go func() { served <- g.ServeStdio(t.Context(), in, out, time.Hour) }()
	lines := bufio.NewScanner(outReader)
	next := func() string {
		t.Helper()
		if !lines.Scan() {
			t.Fatal("the output has ended")
		}
		return lines.Text()
	}
	expect := func(method, id string, more ...string) {
		t.Helper()
		got := next()
		for _, want := range append(more, `"`+method+`"`, `"io.modelcontextprotocol/subscriptionId":`+id) {
			if !strings.Contains(got, want) {
				t.Errorf("got %s, want %s", got, want)
			}
		}
	}
	send := func(message string) {
		t.Helper()
		if _, err := io.WriteString(inWriter, message+"\n"); err != nil {
			t.Fatal(err)
		}
	}
	send(`{"jsonrpc":"2.0","id":"first","method":"tools/list","params":{` + modernMeta + `}}`)
	<-remote.opened
	next()
	for id, notifications := range map[string]string{
		`1`:   `"promptsListChanged":true`,
		`2`:   `"promptsListChanged":true,"resourceSubscriptions":["a:1"]`,
		`"3"`: `"resourceSubscriptions":["a:1","a:2"]`,
	} {
		send(`{"jsonrpc":"2.0","id":` + id + `,"method":"subscriptions/listen","params":{` + modernMeta + `,"notifications":{` + notifications + `}}}`)
		expect("notifications/subscriptions/acknowledged", id, notifications)
	}
	told := func(method string, ids ...string) {
		t.Helper()
		var got []string
		for range ids {
			line := next()
			if !strings.Contains(line, method) {
				t.Errorf("got %s, want %s", line, method)
			}
			_, id, _ := strings.Cut(line, `subscriptionId":`)
			got = append(got, id[:strings.Index(id, "}")])
		}
		slices.Sort(got)
		if !slices.Equal(got, ids) {
			t.Errorf("%s was told to %v, want %v", method, got, ids)
		}
	}
	remote.set("prompts/list", `{"prompts":[{"name":"one"}]}`)
	remote.say <- `"method":"notifications/prompts/list_changed"`
	told("notifications/prompts/list_changed", `1`, `2`)
	remote.say <- `"method":"notifications/resources/updated","params":{"uri":"a:1"}`
	told("notifications/resources/updated", `"3"`, `2`)

	send(`{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":2}}`)
	if got := next(); !strings.Contains(got, `"id":2`) {
		t.Errorf("got %s after the second has been cancelled", got)
	}
	remote.set("prompts/list", `{"prompts":[{"name":"two"}]}`)
	remote.say <- `"method":"notifications/prompts/list_changed"`
	told("notifications/prompts/list_changed", `1`)
	remote.say <- `"method":"notifications/resources/updated","params":{"uri":"a:1"}`
	told("notifications/resources/updated", `"3"`)
	if got := remote.got("resources/unsubscribe"); got != "" {
		t.Errorf("the remote got %s while somebody listens", got)
	}
	inWriter.Close()
	if err := <-served; err != nil {
		t.Error(err)
	}
	outReader.Close()
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, v := range g.views {
		if n := len(v.listens.all) + len(v.subs.byURI); n != 0 {
			t.Errorf("%d entries are left", n)
		}
	}
}

func TestSubscribingToNothing(t *testing.T) {
	remote := changingRemote(t)
	remote.set("resources/subscribe", `!{"code":-32602,"message":"not this one"}`)
	silent := newPlainRemote(t, `{"resources":{}}`, map[string]string{"resources/list": `{"resources":[{"uri":"b:1"}]}`, "resources/templates/list": `{"resourceTemplates":[]}`})
	g := newFront(t, servers("r", remote.URL, "silent", silent.URL))
	c := newPlainClient(t, g.url, "{}", false)
	c.call("tools/list", "")
	for uri, want := range map[string]string{"a:1": "-32602 not this one", "b:1": "-32601 ", "c:1": "-32002 "} {
		if got := c.call("resources/subscribe", fmt.Sprintf(`"uri":%q`, uri)); !strings.HasPrefix(got, want) {
			t.Errorf("%s: got %s, want %s", uri, got, want)
		}
	}
	if got := c.call("resources/unsubscribe", `"uri":"a:1"`); got != "{}" {
		t.Error(got)
	}
	modern := newPlainClient(t, g.url, "{}", true)
	modern.call("tools/list", "")
	modern.listen(`"resourceSubscriptions":["b:1","c:1"]`)
}
