package gateway

import (
	"context"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/modelcontextprotocol/go-sdk/mcp"

	"gatehouse/auth/authtest"
)

// TestOldClients: a client of the deprecated transport has a session of its own,
// sees what others see, is asked what it can be asked, and leaves nothing.
func TestOldClients(t *testing.T) {
	as := authtest.NewAS(t)
	remote := authtest.NewRemote(t, authtest.RemoteConfig{AS: as})
	g := newInside(t, remote, `{"mcpServers": {"r": {"url": "http://127.0.0.1:1/mcp"}}, "gateway": {"sse": true}}`)
	connect := func() *mcp.ClientSession {
		t.Helper()
		session, err := mcp.NewClient(&mcp.Implementation{Name: "old", Version: "1"}, nil).
			Connect(t.Context(), &mcp.SSEClientTransport{Endpoint: g.url + "/sse"}, &mcp.ClientSessionOptions{ProtocolVersion: "2025-06-18"})
		if err != nil {
			t.Fatal(err)
		}
		return session
	}
	one, two := connect(), connect()
	call := func(s *mcp.ClientSession) string {
		t.Helper()
		result, err := s.CallTool(t.Context(), &mcp.CallToolParams{Name: "r_echo", Arguments: map[string]any{"text": "hello"}})
		if err != nil {
			t.Fatal(err)
		}
		return result.Content[0].(*mcp.TextContent).Text
	}
	said := call(one)
	link := said[strings.Index(said, "http"):]
	link = link[:strings.Index(link, " ")]
	if page := authtest.NewBrowser(t).Open(link); page.Status != http.StatusOK {
		t.Fatalf("%d %s", page.Status, page.Body)
	}
	if got := call(one); got != "hello" {
		t.Errorf("got %q", got)
	}
	if got := call(two); !strings.Contains(got, "/connect/") {
		t.Errorf("one's sign-in is the other's: %q", got)
	}
	one.Close()
	two.Close()
	for ; ; runtime.Gosched() { // the gateway notices by itself
		g.sse.mu.Lock()
		n := len(g.sse.byID)
		g.sse.mu.Unlock()
		if _, views := g.left(); n == 0 && views == 0 {
			break
		}
	}
}

// TestSSEWithoutAWord: a stream whose client says nothing gives its place up.
func TestSSEWithoutAWord(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := &Gateway{cfg: &Config{}}
		g.cfg.Gateway.Limits.Sessions = 1
		places := func() int {
			g.sse.mu.Lock()
			defer g.sse.mu.Unlock()
			return len(g.sse.byID)
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			g.serveSSE(httptest.NewRecorder(), httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/sse", nil))
		}()
		synctest.Wait()
		time.Sleep(firstMessage - time.Second)
		if n := places(); n != 1 {
			t.Errorf("%d places are taken before it is time", n)
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if n := places(); n != 0 {
			t.Errorf("%d places are still taken", n)
		}
		<-done
	})
}

// TestSSEGuards: it is off by default; foreign pages, unknown sessions and too
// many of them are refused.
func TestSSEGuards(t *testing.T) {
	off := newFront(t, oneRemote)
	on := newFront(t, `{"mcpServers": {"r": {"url": "http://127.0.0.1:1/mcp"}}, "gateway": {"sse": true, "limits": {"sessions": 1}}}`)
	do := func(method, url, origin string) int {
		t.Helper()
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		req, err := http.NewRequestWithContext(ctx, method, url, strings.NewReader("{}"))
		if err != nil {
			t.Fatal(err)
		}
		if origin != "" {
			req.Header.Set("Origin", origin)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		return resp.StatusCode
	}
	for _, tt := range []struct {
		method, url, origin string
		want                int
	}{
		{http.MethodGet, off.url + "/sse", "", http.StatusNotFound},
		{http.MethodPost, off.url + "/messages?session=x", "", http.StatusNotFound},
		{http.MethodGet, on.url + "/sse", "https://evil.example", http.StatusForbidden},
		{http.MethodPost, on.url + "/messages?session=x", "https://evil.example", http.StatusForbidden},
		{http.MethodPost, on.url + "/messages?session=x", "", http.StatusNotFound},
		{http.MethodPost, on.url + "/sse", "", http.StatusMethodNotAllowed},
	} {
		if got := do(tt.method, tt.url, tt.origin); got != tt.want {
			t.Errorf("%s %s from %q: %d, want %d", tt.method, tt.url, tt.origin, got, tt.want)
		}
	}
	first, err := http.Get(on.url + "/sse")
	if err != nil {
		t.Fatal(err)
	}
	defer first.Body.Close()
	if got := do(http.MethodGet, on.url+"/sse", ""); got != http.StatusTooManyRequests {
		t.Errorf("one too many: %d", got)
	}
}
