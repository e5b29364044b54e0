package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/zitadel/oidc/v3/example/server/exampleop"
	"github.com/zitadel/oidc/v3/example/server/storage"

	"gatehouse/auth/authtest"
)

// zitadel is zitadel's own example provider, token exchange included.
type zitadel struct {
	*httptest.Server

	mu        sync.Mutex // guards what follows
	provider  http.Handler
	exchanges []url.Values
}

func (z *zitadel) serve(w http.ResponseWriter, r *http.Request) {
	z.mu.Lock()
	provider := z.provider
	if r.URL.Path == "/oauth/token" && r.ParseForm() == nil && r.PostForm.Has("subject_token") {
		z.exchanges = append(z.exchanges, r.PostForm)
	}
	z.mu.Unlock()
	provider.ServeHTTP(w, r)
}

func (z *zitadel) Issuer() string { return z.URL }

// Valid introspects a token. The provider tells each client of tokens for that
// client alone.
func (z *zitadel) Valid(token string) (authtest.TokenInfo, bool) {
	if token == "" {
		return authtest.TokenInfo{}, false
	}
	req, err := http.NewRequest(http.MethodPost, z.URL+"/oauth/introspect", strings.NewReader(url.Values{"token": {token}}.Encode()))
	if err != nil {
		return authtest.TokenInfo{}, false
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	req.SetBasicAuth("files", "canary-cs-files-01")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return authtest.TokenInfo{}, false
	}
	defer resp.Body.Close()
	var info struct {
		Active  bool   `json:"active"`
		Subject string `json:"sub"`
		Expires int64  `json:"exp"`
	}
	if json.NewDecoder(resp.Body).Decode(&info) != nil || !info.Active {
		return authtest.TokenInfo{}, false
	}
	return authtest.TokenInfo{Subject: info.Subject, Audience: "files", Expires: time.Unix(info.Expires, 0)}, true
}

// TestExchangeAtZitadel: login and exchange at a provider that nobody here wrote.
// Its access tokens are opaque: they are taken because its metadata names the
// endpoint.
func TestExchangeAtZitadel(t *testing.T) {
	t.Parallel()
	z := &zitadel{}
	z.Server = httptest.NewServer(http.HandlerFunc(z.serve))
	t.Cleanup(z.Close)
	remote := authtest.NewRemote(t, authtest.RemoteConfig{AS: z})
	remote.Set(func(k *authtest.RemoteKnobs) { k.Audience = "files" })
	gw := startStdio(t, fmt.Sprintf(`{"mcpServers": {"files": {"url": %q, "auth": {"type": "exchange", "audience": "files", "scopes": ["openid"]}}},
		"gateway": {"auth": {"issuer": %q, "clientId": "gatehouse", "clientSecret": "canary-cs-gateway-1", "scopes": ["openid", "profile", "email", "offline_access"]}, "oauth": {"callbackPort": 0}}}`,
		remote.URL, z.URL))
	client := storage.WebClient("gatehouse", "canary-cs-gateway-1", gw.url+"/oauth/callback")
	provider := exampleop.SetupServer(z.URL, storage.NewStorageWithClients(storage.NewUserStore(z.URL), map[string]*storage.Client{
		"gatehouse": client, "files": storage.WebClient("files", "canary-cs-files-01"),
	}), nil, false)
	z.mu.Lock()
	z.provider = provider
	z.mu.Unlock()

	c := stdioClient(t, gw)
	browser := authtest.NewBrowser(t)
	browser.User, browser.Password = "test-user@127.0.0.1", "verysecure"
	if page := browser.Open(link(t, c.Call("files_echo", nil), "files")); page.Status != http.StatusOK || !strings.Contains(page.Body, "logged in") {
		t.Fatalf("%d %s\n%s", page.Status, page.URL, page.Body)
	}
	echo(t, c, "files_echo", "by exchange")
	if who := authtest.Text(c.Call("files_whoami", nil)); who != "id1" {
		t.Errorf("acts as %q", who)
	}
	z.mu.Lock()
	defer z.mu.Unlock()
	if len(z.exchanges) != 1 || z.exchanges[0].Get("audience") != "files" {
		t.Errorf("%d exchanges", len(z.exchanges))
	}
	if s := status(t, c)["files"]; s.SignIn != "signed_in" || s.Issuer != z.URL {
		t.Errorf("status: %+v", s)
	}
}
