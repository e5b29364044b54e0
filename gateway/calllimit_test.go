package gateway

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"gatehouse/auth"
	"gatehouse/auth/authtest"
)

func TestCallLimit(t *testing.T) {
	now := time.Unix(1e9, 0)
	l := newCallLimit(Limits{CallsInFlight: 3, CallsPerSecond: 5}, func() time.Time { return now })
	take := func(want string) (release func()) {
		t.Helper()
		release, refused := l.take()
		got := ""
		if refused != nil {
			got = refused.limit
			if refused.retry <= 0 || refused.retry > time.Second {
				t.Errorf("retry after %v", refused.retry)
			}
		}
		if got != want {
			t.Fatalf("refused by %q, want %q", got, want)
		}
		return release
	}
	var releases []func()
	for range 3 {
		releases = append(releases, take(""))
	}
	take("callsInFlight")
	for _, release := range releases {
		release()
	}
	take("")() // a refused one did not count
	take("")()
	take("callsPerSecond")
	now = now.Add(200 * time.Millisecond)
	take("")()
	take("callsPerSecond")
	now = now.Add(time.Hour)
	for range 5 {
		take("")()
	}
	take("callsPerSecond")
	now = now.Add(-time.Hour) // a clock that was set back
	take("callsPerSecond")
	now = now.Add(time.Second)
	take("")()
}

// TestTooManyCalls: one principal's calls are bounded, others are not touched,
// and who is refused reads why.
func TestTooManyCalls(t *testing.T) {
	remote := authtest.NewRemote(t, authtest.RemoteConfig{})
	gate, called := make(chan struct{}), make(chan struct{}, 10)
	remote.Set(func(k *authtest.RemoteKnobs) {
		k.Call = func(_ context.Context, tool string, arguments json.RawMessage) (json.RawMessage, error) {
			if strings.Contains(string(arguments), "wait") {
				called <- struct{}{}
				<-gate
			}
			return nil, nil
		}
	})
	g := newInside(t, remote, `{"mcpServers": {"r": {"url": "http://127.0.0.1:1/mcp"}}, "gateway": {"limits": {"callsInFlight": 2}}}`)
	client := authtest.Legacy(t, g.url+"/mcp")
	answered := make(chan string, 2)
	for range 2 {
		go func() { answered <- authtest.Text(client.Call("r_echo", map[string]any{"text": "wait"})) }()
	}
	<-called
	<-called

	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, g.url+"/mcp",
		strings.NewReader(`{"jsonrpc":"2.0","id":9,"method":"tools/call","params":{"name":"r_echo","arguments":{"text":"third"}}}`))
	if err != nil {
		t.Fatal(err)
	}
	for name, value := range map[string]string{"Content-Type": "application/json", "Accept": "application/json, text/event-stream",
		"Mcp-Session-Id": client.ID(), "Mcp-Protocol-Version": "2025-11-25"} {
		req.Header.Set(name, value)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	body, _ := io.ReadAll(resp.Body)
	resp.Body.Close()
	if resp.StatusCode != http.StatusTooManyRequests || resp.Header.Get("Retry-After") != "1" || !strings.Contains(string(body), "gateway.limits.callsInFlight") {
		t.Errorf("the third call: %s, Retry-After %q, %s", resp.Status, resp.Header.Get("Retry-After"), body)
	}
	// Where there is no status, as over stdio, the result says so.
	id := client.ID()
	v, err := g.view(auth.SessionPrincipal(id))
	if err != nil {
		t.Fatal(err)
	}
	raw, err := g.handle(t.Context(), caller{view: v}, "tools/call", json.RawMessage(`{"name":"r_echo","arguments":{"text":"third"}}`))
	if err != nil || !strings.Contains(string(raw), `"isError":true`) || !strings.Contains(string(raw), "callsInFlight") {
		t.Errorf("the third call further in: %v %s", err, raw)
	}
	other := authtest.Legacy(t, g.url+"/mcp")
	if got := authtest.Text(other.Call("r_echo", map[string]any{"text": "another's"})); got != "another's" {
		t.Errorf("another principal's call: %s", got)
	}
	close(gate)
	for range 2 {
		if got := <-answered; got != "wait" {
			t.Errorf("a call within the limit: %s", got)
		}
	}
	if got := authtest.Text(client.Call("r_echo", map[string]any{"text": "after"})); got != "after" {
		t.Errorf("after they have ended: %s", got)
	}
}

// TestTooManyFirstCalls: a call that has to wait for its remote to be connected
// counts like any other, and once only.
func TestTooManyFirstCalls(t *testing.T) {
	remote := newPlainRemote(t, `{"tools":{}}`, map[string]string{
		"tools/list": `{"tools":[{"name":"t","inputSchema":{"type":"object"}}]}`, "tools/call": `{"content":[]}`,
	})
	gate, dialed := make(chan struct{}), make(chan struct{}, 10)
	slow := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		dialed <- struct{}{}
		select {
		case <-gate:
			remote.ServeHTTP(w, r)
		case <-r.Context().Done():
		}
	}))
	t.Cleanup(slow.Close)
	open := sync.OnceFunc(func() { close(gate) })
	t.Cleanup(open)
	g := newFront(t, `{"mcpServers": {"r": {"url": "`+slow.URL+`"}}, "gateway": {"limits": {"callsInFlight": 1, "callsPerSecond": 1}}}`)
	v, err := g.view(auth.Local)
	if err != nil {
		t.Fatal(err)
	}
	call := func() string {
		raw, err := g.handle(t.Context(), caller{view: v}, "tools/call", json.RawMessage(`{"name":"r_t"}`))
		return fmt.Sprint(string(raw), err)
	}
	first := make(chan string, 1)
	go func() { first <- call() }()
	<-dialed
	for waited := time.Now(); v.calls.refused() == nil && time.Since(waited) < 10*time.Second; {
		runtime.Gosched()
	}
	if v.calls.refused() == nil {
		t.Fatal("a call that waits for its remote does not count")
	}
	if got := call(); !strings.Contains(got, "callsInFlight") {
		t.Errorf("a second call while the first one waits: %s", got)
	}
	open()
	if got := <-first; !strings.Contains(got, `"content":[]`) || strings.Contains(got, "isError") {
		t.Errorf("the first call: %s", got)
	}
}
