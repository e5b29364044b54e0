package gateway

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/jsonschema-go/jsonschema"
	"github.com/modelcontextprotocol/go-sdk/mcp"
	"go.uber.org/goleak"

	"gatehouse/auth/authtest"
)

// TestNothingIsLeftOfAThousand: after a thousand sessions have come and gone,
// half of them without a goodbye, there is no goroutine, no connection and no
// entry in any map of the gateway's, its pool's, its broker's, its store's or
// the SDK's that was not there before.
func TestNothingIsLeftOfAThousand(t *testing.T) {
	for _, tt := range []struct {
		name   string
		remote func(t *testing.T) *authtest.Remote
	}{
		{"open remote", func(t *testing.T) *authtest.Remote {
			return authtest.NewRemote(t, authtest.RemoteConfig{})
		}},
		{"a sign-in is pending", func(t *testing.T) *authtest.Remote {
			return authtest.NewRemote(t, authtest.RemoteConfig{AS: authtest.NewAS(t)})
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			remote := tt.remote(t)
			remote.Server().AddTool(&mcp.Tool{Name: "ask", InputSchema: json.RawMessage(`{"type":"object"}`)}, ask)
			g := newInside(t, remote, `{"mcpServers": {"r": {"url": "http://127.0.0.1:1/mcp"}}, "gateway": {"limits": {"sessions": 2000}}}`)
			transport := &http.Transport{MaxIdleConnsPerHost: 100}
			v := visitors{url: g.url + "/mcp", client: &http.Client{Transport: transport}}

			visit := func(n int) {
				numbers := make(chan int)
				var workers sync.WaitGroup
				for range 8 {
					workers.Go(func() {
						for i := range numbers {
							if err := v.visit(t.Context(), i); err != nil {
								t.Errorf("visitor %d: %v", i, err)
							}
						}
					})
				}
				for i := range n {
					numbers <- i
				}
				close(numbers)
				workers.Wait()
				// Until those that were cut off have been noticed.
				for g.busy() && t.Context().Err() == nil {
					runtime.Gosched()
				}
				if clients, _ := g.left(); clients != n*silent/len(ways) {
					t.Errorf("%d clients left without a word, want %d", clients, n*silent/len(ways))
				}
				g.forward.Add(int64(clientIdle + time.Minute))
				g.clients.endIdle()
				transport.CloseIdleConnections()
				g.outgoing.Close()
			}
			visit(len(ways)) // what is made once is made now
			before, current := holdings(g.Gateway, g.store), goleak.IgnoreCurrent()
			atRemote := sessions(remote)

			visit(1000)
			if err := goleak.Find(current); err != nil {
				t.Error(err)
			}
			if clients, views := g.left(); clients != 0 || views > 1 { // the local user of the modern era stays
				t.Errorf("%d clients and %d views are left", clients, views)
			}
			if diff := cmp.Diff(before, holdings(g.Gateway, g.store)); diff != "" {
				t.Errorf("entries before and after:\n%s", diff)
			}
			if n := sessions(remote); n != atRemote {
				t.Errorf("the remote has %d MCP sessions, and had %d before", n, atRemote)
			}
		})
	}
}

// ask is a tool that wants to know something and waits a little for the answer.
func ask(ctx context.Context, req *mcp.CallToolRequest) (*mcp.CallToolResult, error) {
	ctx, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancel()
	_, err := req.Session.Elicit(ctx, &mcp.ElicitParams{Message: "Well?", RequestedSchema: &jsonschema.Schema{Type: "object"}})
	return nil, err
}

// busy reports whether a request is being served or a stream is open.
func (g *inside) busy() bool {
	g.calls.mu.Lock()
	calls := g.calls.n
	g.calls.mu.Unlock()
	if calls > 0 {
		return true
	}
	g.clients.mu.Lock()
	defer g.clients.mu.Unlock()
	for _, cl := range g.clients.byID {
		if cl.active > 0 {
			return true
		}
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, v := range g.views {
		if v.principal.Ephemeral() {
			continue
		}
		for range v.server.Sessions() { // one for each request of the modern era
			return true
		}
	}
	return false
}

func sessions(remote *authtest.Remote) (n int) {
	for range remote.Server().Sessions() {
		n++
	}
	return n
}

// visitors are clients that do something and go, by hand so that a thousand
// cost little.
type visitors struct {
	url    string
	client *http.Client
}

// ways are how a visitor goes.
var ways = []string{
	"goodbye", "silence",
	"stream and goodbye", "stream cut",
	"call cut and goodbye", "call cut",
	"asked and goodbye", "asked and cut",
	"modern", "modern stream cut",
}

// silent is how many of the ways leave a session behind.
const silent = 4

func (v visitors) visit(ctx context.Context, i int) error {
	way := ways[i%len(ways)]
	header := http.Header{"Mcp-Protocol-Version": {"2025-11-25"}}
	if strings.HasPrefix(way, "modern") {
		return v.visitModern(ctx, way == "modern stream cut")
	}
	resp, err := v.post(ctx, header, `{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-11-25","capabilities":{"roots":{},"sampling":{},"elicitation":{}},"clientInfo":{"name":"visitor","version":"1"}}}`)
	if err != nil {
		return err
	}
	header.Set("Mcp-Session-Id", resp.Header.Get("Mcp-Session-Id"))
	if _, err := v.post(ctx, header, `{"jsonrpc":"2.0","method":"notifications/initialized"}`); err != nil {
		return err
	}
	if way == "stream and goodbye" || way == "stream cut" {
		cut, err := v.stream(ctx, http.MethodGet, header, "")
		if err != nil {
			return err
		}
		defer cut()
	}
	for _, message := range []string{
		`{"jsonrpc":"2.0","id":2,"method":"tools/list"}`,
		`{"jsonrpc":"2.0","id":3,"method":"tools/call","params":{"name":"r_echo","arguments":{"text":"x"},"_meta":{"progressToken":1}}}`,
		`{"jsonrpc":"2.0","id":4,"method":"logging/setLevel","params":{"level":"debug"}}`,
	} {
		if _, err := v.post(ctx, header, message); err != nil {
			return err
		}
	}
	switch way {
	case "call cut", "call cut and goodbye":
		call, cancel := context.WithTimeout(ctx, time.Millisecond)
		v.post(call, header, `{"jsonrpc":"2.0","id":5,"method":"tools/call","params":{"name":"r_echo","arguments":{"text":"cut"}}}`)
		cancel()
	case "asked and goodbye", "asked and cut":
		cut, err := v.stream(ctx, http.MethodPost, header, `{"jsonrpc":"2.0","id":6,"method":"tools/call","params":{"name":"r_ask","arguments":{}}}`)
		if err != nil {
			return err
		}
		cut()
	}
	if strings.HasSuffix(way, "goodbye") {
		_, err = v.do(ctx, http.MethodDelete, header, "")
	}
	return err
}

func (v visitors) visitModern(ctx context.Context, stream bool) error {
	const meta = `"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientInfo":{"name":"visitor","version":"1"},"io.modelcontextprotocol/clientCapabilities":{}}`
	header := http.Header{"Mcp-Protocol-Version": {"2026-07-28"}, "Mcp-Method": {"tools/call"}, "Mcp-Name": {"r_echo"}}
	if _, err := v.post(ctx, header, `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"r_echo","arguments":{"text":"x"},`+meta+`}}`); err != nil {
		return err
	}
	if !stream {
		return nil
	}
	header = http.Header{"Mcp-Protocol-Version": {"2026-07-28"}, "Mcp-Method": {"subscriptions/listen"}}
	cut, err := v.stream(ctx, http.MethodPost, header, `{"jsonrpc":"2.0","id":2,"method":"subscriptions/listen","params":{"notifications":{"toolsListChanged":true},`+meta+`}}`)
	if err != nil {
		return err
	}
	cut()
	return nil
}

func (v visitors) post(ctx context.Context, header http.Header, body string) (*http.Response, error) {
	return v.do(ctx, http.MethodPost, header, body)
}

// do sends one request and reads the answer to its end.
func (v visitors) do(ctx context.Context, method string, header http.Header, body string) (*http.Response, error) {
	resp, err := v.send(ctx, method, header, body)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	said, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode >= 300 {
		err = fmt.Errorf("%s %s: %s: %s", method, body, resp.Status, said)
	}
	return resp, err
}

// stream opens an event stream; cut breaks it off.
func (v visitors) stream(ctx context.Context, method string, header http.Header, body string) (cut func(), err error) {
	ctx, cancel := context.WithCancel(ctx)
	resp, err := v.send(ctx, method, header, body)
	if err != nil {
		cancel()
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		defer cancel()
		defer resp.Body.Close()
		return nil, fmt.Errorf("%s: %s", method, resp.Status)
	}
	if method == http.MethodPost {
		bufio.NewReader(resp.Body).ReadString('\n') // it has begun
	}
	return func() {
		cancel()
		resp.Body.Close()
	}, nil
}

func (v visitors) send(ctx context.Context, method string, header http.Header, body string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, v.url, strings.NewReader(body))
	if err != nil {
		return nil, err
	}
	maps.Copy(req.Header, header)
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Accept", "application/json, text/event-stream")
	return v.client.Do(req)
}

// holdings counts the entries of every map, slice and channel that can be
// reached from the roots through types of ours and the SDK's, by the field that
// holds them. Nothing may be using them.
func holdings(roots ...any) map[string]int {
	h := holder{counts: map[string]int{}, seen: map[uintptr]bool{}}
	for _, root := range roots {
		h.walk("", reflect.ValueOf(root))
	}
	return h.counts
}

type holder struct {
	counts map[string]int
	seen   map[uintptr]bool
}

func (h *holder) walk(field string, v reflect.Value) {
	switch v.Kind() {
	case reflect.Interface:
		h.walk(field, v.Elem())
	case reflect.Pointer:
		if !v.IsNil() && !h.seen[v.Pointer()] {
			h.seen[v.Pointer()] = true
			h.walk(field, v.Elem())
		}
	case reflect.Struct:
		settle(v)
		of := v.Type()
		if !slices.ContainsFunc([]string{"", "gatehouse/", "github.com/modelcontextprotocol/", "sync"}, func(prefix string) bool {
			return prefix == of.PkgPath() || prefix != "" && strings.HasPrefix(of.PkgPath(), prefix)
		}) {
			return
		}
		for i := range of.NumField() {
			h.walk(of.String()+"."+of.Field(i).Name, v.Field(i))
		}
	case reflect.Map:
		h.counts[field] += v.Len()
		for entries := v.MapRange(); entries.Next(); {
			h.walk(field+"[]", entries.Value())
		}
	case reflect.Slice:
		if v.Type().Elem().Kind() == reflect.Uint8 {
			return // how long a text is says nothing
		}
		h.counts[field] += v.Len()
		fallthrough
	case reflect.Array:
		for i := range v.Len() {
			h.walk(field+"[]", v.Index(i))
		}
	case reflect.Chan:
		h.counts[field] += v.Len()
	}
}

// settle takes and releases a struct's mutexes, so that what was written under
// them can be read.
func settle(v reflect.Value) {
	for _, f := range v.Fields() {
		if !f.CanAddr() {
			continue
		}
		switch f.Type() {
		case reflect.TypeFor[sync.Mutex]():
			mu := (*sync.Mutex)(f.Addr().UnsafePointer())
			mu.Lock()
			mu.Unlock()
		case reflect.TypeFor[sync.RWMutex]():
			mu := (*sync.RWMutex)(f.Addr().UnsafePointer())
			mu.Lock()
			mu.Unlock()
		}
	}
}
