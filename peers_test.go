package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/modelcontextprotocol/go-sdk/mcp"
	"github.com/zitadel/oidc/v3/pkg/client/rp"
	"github.com/zitadel/oidc/v3/pkg/oidc"

	"gatehouse/auth/authtest"
	"gatehouse/auth/endpoint"
)

// startOIDCProvider starts npm oidc-provider, which .ci/clients installs, and
// returns its issuer. exchange is the driver's argument of that name; empty: no
// tokens are exchanged. Without the package the test is skipped.
func startOIDCProvider(t *testing.T, resource, exchange string) (issuer string) {
	t.Helper()
	args := []string{resource, "2"}
	if exchange != "" {
		args = append(args, exchange)
	}
	return startNode(t, "oidc-provider.mjs", nil, args...)
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
	port := authtest.FreePort(t)
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
	issuer = startOIDCProvider(t, remote.URL+"/mcp", "")

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

// exchanging is npm oidc-provider as the remotes behind it see it: they verify
// its JWTs, introspect what is opaque, and refuse what they are told to.
type exchanging struct {
	issuer string
	keys   oidc.KeySet

	mu      sync.Mutex // guards what follows
	refused map[string]bool
	last    map[string]string // the token that was accepted last, by its audience
}

func (p *exchanging) Issuer() string { return p.issuer }

// Valid looks at who issued a token, for whom, until when.
func (p *exchanging) Valid(token string) (authtest.TokenInfo, bool) {
	var claims struct {
		Issuer   string `json:"iss"`
		Audience string `json:"aud"`
		Subject  string `json:"sub"`
		Scope    string `json:"scope"`
		Expires  int64  `json:"exp"`
		Active   bool   `json:"active"`
	}
	if signed, err := jose.ParseSigned(token, []jose.SignatureAlgorithm{jose.RS256}); err == nil {
		payload, err := p.keys.VerifySignature(context.Background(), signed)
		if err != nil || json.Unmarshal(payload, &claims) != nil || claims.Issuer != p.issuer {
			return authtest.TokenInfo{}, false
		}
	} else {
		req, err := http.NewRequest(http.MethodPost, p.issuer+"/token/introspection", strings.NewReader(url.Values{"token": {token}}.Encode()))
		if err != nil {
			return authtest.TokenInfo{}, false
		}
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		req.SetBasicAuth("resource", "of-the-resource-server")
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return authtest.TokenInfo{}, false
		}
		defer resp.Body.Close()
		if json.NewDecoder(resp.Body).Decode(&claims) != nil || !claims.Active {
			return authtest.TokenInfo{}, false
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.refused[token] {
		return authtest.TokenInfo{}, false
	}
	p.last[claims.Audience] = token
	return authtest.TokenInfo{Subject: claims.Subject, Audience: claims.Audience, Scopes: strings.Fields(claims.Scope), Expires: time.Unix(claims.Expires, 0)}, true
}

// refuseLast has the remotes refuse the token that they accepted last for an
// audience.
func (p *exchanging) refuseLast(audience string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.refused[p.last[audience]] = true
}

// made returns the targets of the exchanges that the provider has made.
func (p *exchanging) made(t *testing.T) (targets []string) {
	t.Helper()
	resp, err := http.Get(p.issuer + "/exchanges")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var exchanges []struct{ Target, Subject string }
	if err := json.NewDecoder(resp.Body).Decode(&exchanges); err != nil {
		t.Fatal(err)
	}
	for _, e := range exchanges {
		if e.Subject != "demo" {
			t.Errorf("an exchange for %q", e.Subject)
		}
		targets = append(targets, e.Target)
	}
	return targets
}

// TestOIDCProviderExchange: with a provider that nobody here wrote, one login
// gets the tools of three remotes, by tokens for an audience and for a resource,
// JWTs and opaque ones; they are exchanged once each, and once more when the
// remote refuses one.
func TestOIDCProviderExchange(t *testing.T) {
	p := &exchanging{refused: map[string]bool{}, last: map[string]string{}}
	remotes := map[string]*authtest.Remote{}
	for _, name := range []string{"files", "wiki", "crm"} {
		remotes[name] = authtest.NewRemote(t, authtest.RemoteConfig{AS: p})
	}
	audiences := map[string]string{"files": "files-api", "wiki": remotes["wiki"].URL, "crm": "crm-api"}
	scopes := map[string][]string{"files": {"read"}, "wiki": {"read", "write"}, "crm": {"profile"}}
	for name, remote := range remotes {
		remote.Set(func(k *authtest.RemoteKnobs) {
			k.Audience, k.ToolScopes = audiences[name], map[string][]string{"echo": scopes[name]}
		})
	}
	argument, err := json.Marshal(map[string]any{
		"client": map[string]any{
			"client_id": "gatehouse", "client_secret": "canary-cs-gateway-1", "application_type": "native",
			// RFC 8252 section 7.3: of any port.
			"redirect_uris": []string{"http://127.0.0.1/oauth/callback"}, "response_types": []string{"code"},
			"grant_types": []string{"authorization_code", "refresh_token", endpoint.GrantExchange},
		},
		"targets": []map[string]string{
			{"audience": audiences["files"], "scope": "read", "format": "jwt"},
			{"resource": audiences["wiki"], "scope": "read write", "format": "jwt"},
			{"audience": audiences["crm"], "scope": "profile", "format": "opaque"},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	p.issuer = startOIDCProvider(t, "https://none.example", string(argument))
	p.keys = rp.NewRemoteKeySet(http.DefaultClient, p.issuer+"/jwks")

	config, err := json.Marshal(map[string]any{
		"mcpServers": map[string]any{
			"files": map[string]any{"url": remotes["files"].URL, "auth": map[string]any{"type": "exchange", "audience": audiences["files"], "scopes": []string{"openid", "read"}}},
			"wiki":  map[string]any{"url": remotes["wiki"].URL, "auth": map[string]any{"type": "exchange", "resource": audiences["wiki"], "scopes": []string{"read", "write"}}},
			"crm":   map[string]any{"url": remotes["crm"].URL, "auth": map[string]any{"type": "exchange", "audience": audiences["crm"]}},
		},
		"gateway": map[string]any{
			"auth":  map[string]any{"issuer": p.issuer, "clientId": "gatehouse", "clientSecret": "canary-cs-gateway-1"},
			"oauth": map[string]any{"callbackPort": 0},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	state := t.TempDir()
	gw := startStdioIn(t, state, string(config))
	client := stdioClient(t, gw)
	link1 := link(t, client.Call("files_echo", nil), "files")
	if link2 := link(t, client.Call("crm_echo", nil), "crm"); link2 != link1 {
		t.Errorf("two links for one login: %s and %s", link1, link2)
	}
	if page := authtest.NewBrowser(t).Open(link1); page.Status != http.StatusOK || !strings.Contains(page.Body, "logged in") {
		t.Fatalf("%d %s\n%s", page.Status, page.URL, page.Body)
	}
	calls := func(client *authtest.Client) {
		t.Helper()
		for name := range remotes {
			echo(t, client, name+"_echo", "by exchange")
			if who := authtest.Text(client.Call(name+"_whoami", nil)); who != "demo" {
				t.Errorf("%s acts as %q", name, who)
			}
		}
	}
	calls(client)
	once := []string{audiences["files"], audiences["wiki"], audiences["crm"]}
	slices.Sort(once)
	if made := slices.Sorted(slices.Values(p.made(t))); !slices.Equal(made, once) {
		t.Errorf("exchanges: %v", made)
	}
	hits := cacheHits(t, client)
	calls(client)
	if now := cacheHits(t, client); now < hits+2*len(remotes) {
		t.Errorf("%d cache hits after six calls, %d before", now, hits)
	}
	for name, s := range status(t, client) {
		if s.Status != "connected" || s.SignInBy != "exchanged token" || s.Issuer != p.issuer {
			t.Errorf("%s: %+v", name, s)
		}
	}

	// Each kind of token, refused by its remote.
	for i, name := range []string{"files", "crm"} {
		p.refuseLast(audiences[name])
		echo(t, client, name+"_echo", "by another token")
		if made := p.made(t); len(made) != 4+i || made[3+i] != audiences[name] {
			t.Errorf("after a refusal by %s: %v", name, made)
		}
	}

	// The login outlives the process; what was exchanged for it does not.
	gw.end()
	calls(stdioClient(t, startStdioIn(t, state, string(config))))
	if made := p.made(t); len(made) != 8 {
		t.Errorf("after a restart: %v", made)
	}
}

// cacheHits is what the status says of the tokens that were exchanged.
func cacheHits(t *testing.T, client *authtest.Client) int {
	t.Helper()
	var s struct {
		Cache struct{ Hits, Misses, Size int } `json:"exchange_cache"`
	}
	raw, err := json.Marshal(client.Call("gateway_status", nil).StructuredContent)
	if err != nil || json.Unmarshal(raw, &s) != nil {
		t.Fatalf("the status: %s", raw)
	}
	if s.Cache.Size != 3 || s.Cache.Misses < 3 {
		t.Errorf("the cache: %+v", s.Cache)
	}
	return s.Cache.Hits
}
