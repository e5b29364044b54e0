package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/modelcontextprotocol/go-sdk/mcp"

	"gatehouse/auth/authtest"
)

// startOIDCProvider starts npm oidc-provider, which .ci/clients installs, and
// returns its issuer. Without it the test is skipped.
func startOIDCProvider(t *testing.T, resource string) (issuer string) {
	t.Helper()
	return startNode(t, "oidc-provider.mjs", nil, resource, "2")
}

// freePort is one of 127.0.0.1 that nobody listens on.
func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	return port
}

// startNode starts a provider of testdata/peers on any port, its first argument,
// and returns its issuer. Without npm oidc-provider the test is skipped.
func startNode(t *testing.T, name string, env []string, args ...string) (issuer string) {
	t.Helper()
	modules, err := filepath.Abs(filepath.Join(".cache", "peers", "node_modules"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(modules, "oidc-provider")); err != nil {
		t.Skip("npm oidc-provider is not installed in .cache/peers: the tests with it are skipped")
	}
	port := freePort(t)
	// Node looks for packages beside the script.
	script := filepath.Join(".cache", "peers", name)
	source, err := os.ReadFile(filepath.Join("testdata", "peers", name))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(script, source, 0o600); err != nil {
		t.Fatal(err)
	}
	node := filepath.Join(".cache", "node", "node_modules", "node", "bin", "node")
	if _, err := os.Stat(node); err != nil {
		node = "node"
	}
	cmd := exec.Command(node, append([]string{script, port}, args...)...)
	cmd.Env = append(os.Environ(), env...)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = t.Output()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	for lines := bufio.NewScanner(out); lines.Scan(); {
		if lines.Text() == "listening" {
			return "http://127.0.0.1:" + port
		}
	}
	t.Fatalf("%s did not start", name)
	return ""
}

// TestOIDCProvider: with an authorization server that nobody here wrote, whose
// tokens live for two seconds and whose refresh tokens are good once: sign-in,
// renewal again and again, by many calls at once, and after a restart, without
// another sign-in.
func TestOIDCProvider(t *testing.T) {
	var issuer string
	var mu sync.Mutex
	refused := 0
	server := mcp.NewServer(&mcp.Implementation{Name: "peer", Version: "1"}, nil)
	mcp.AddTool(server, &mcp.Tool{Name: "echo"}, func(_ context.Context, _ *mcp.CallToolRequest, in struct{ Text string }) (*mcp.CallToolResult, any, error) {
		return &mcp.CallToolResult{Content: []mcp.Content{&mcp.TextContent{Text: in.Text}}}, nil, nil
	})
	handler := mcp.NewStreamableHTTPHandler(func(*http.Request) *mcp.Server { return server }, nil)
	var remote *httptest.Server
	remote = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/mcp" {
			w.Header().Set("Content-Type", "application/json")
			json.NewEncoder(w).Encode(map[string]any{"resource": remote.URL + "/mcp", "authorization_servers": []string{issuer}, "scopes_supported": []string{"read"}})
			return
		}
		token := strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")
		req, err := http.NewRequestWithContext(r.Context(), http.MethodPost, issuer+"/token/introspection", strings.NewReader(url.Values{"token": {token}}.Encode()))
		if err != nil {
			t.Error(err)
			return
		}
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		req.SetBasicAuth("resource", "of-the-resource-server")
		var said struct {
			Active bool
			Aud    any
		}
		if resp, err := http.DefaultClient.Do(req); err == nil {
			json.NewDecoder(resp.Body).Decode(&said)
			resp.Body.Close()
		}
		if !said.Active || fmt.Sprint(said.Aud) != remote.URL+"/mcp" {
			mu.Lock()
			refused++
			mu.Unlock()
			w.Header().Set("WWW-Authenticate", `Bearer resource_metadata="`+remote.URL+`/.well-known/oauth-protected-resource/mcp"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		handler.ServeHTTP(w, r)
	}))
	t.Cleanup(remote.Close)
	issuer = startOIDCProvider(t, remote.URL+"/mcp")

	cfg, state := onPort(t, "notes", remote.URL+"/mcp"), t.TempDir()
	gw := startStdioIn(t, state, cfg)
	client := stdioClient(t, gw)
	page := authtest.NewBrowser(t).Open(link(t, client.Call("notes_echo", map[string]any{"Text": "x"}), "notes"))
	if page.Status != http.StatusOK || !strings.Contains(page.Body, "connected") {
		t.Fatalf("%d %s\n%s", page.Status, page.URL, page.Body)
	}
	echoes := func(client *authtest.Client, say string) {
		t.Helper()
		result := client.Call("notes_echo", map[string]any{"Text": say})
		if got := authtest.Text(result); result.IsError || got != say {
			t.Errorf("%s: got %s", say, got)
		}
	}
	renewed := func() int { return strings.Count(gw.output(), `"msg":"grant refreshed"`) }
	echoes(client, "after the sign-in")
	// A token is renewed ahead of its end as long as somebody calls.
	for before, n := renewed(), 0; renewed() < before+3 && n < 3000; n++ {
		echoes(client, "while tokens come and go")
	}
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() { echoes(client, fmt.Sprint("many at once ", i)) })
	}
	wg.Wait()
	gw.end()
	gw = startStdioIn(t, state, cfg)
	client = stdioClient(t, gw)
	echoes(client, "after a restart")
	for before, n := renewed(), 0; renewed() < before+2 && n < 3000; n++ {
		echoes(client, "and on")
	}
	if log := gw.output(); strings.Contains(log, "ended the grant") {
		t.Error("the provider ended the grant")
	}
	result := client.Call("gateway_logout", map[string]any{"remote": "notes"})
	if got := authtest.Text(result); !strings.Contains(got, "revoked") {
		t.Errorf("sign-out: %s", got)
	}
}
