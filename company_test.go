package main

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	sdkauth "github.com/modelcontextprotocol/go-sdk/auth"
	"github.com/modelcontextprotocol/go-sdk/mcp"
	"github.com/modelcontextprotocol/go-sdk/oauthex"
	"github.com/zitadel/oidc/v3/example/server/exampleop"
	"github.com/zitadel/oidc/v3/example/server/storage"
	"github.com/zitadel/oidc/v3/pkg/oidc"

	"gatehouse/auth/authtest"
)

// A company's provider, a remote's provider, and MCP clients that log in by
// themselves: none of them written here. Between them, the real binary.

// nobody listens there: what comes back to a client is read off the redirect.
const clientCallback = "http://127.0.0.1:9/callback"

const gatewaySecret = "canary-cs-gateway-1"

// person is a user with a browser, logged in at the gateway in it or not.
type person struct {
	name    string // at the company's provider
	subject string // what that provider calls them
	browser *authtest.Browser
	asked   atomic.Int32 // how often a client sent the browser to the provider
}

func newPerson(t *testing.T, name, subject, password string) *person {
	t.Helper()
	b := authtest.NewBrowser(t)
	b.User, b.Password = name, password
	return &person{name: name, subject: subject, browser: b}
}

// ways are how a client of the SDK becomes one of the company's provider.
type ways struct {
	document   string // URL of a client ID metadata document
	register   string // client_name of a dynamic registration
	registered *oauthex.ClientCredentials
}

// oauth is the SDK's own log-in, with this person's browser.
func (p *person) oauth(t *testing.T, by ways) *sdkauth.AuthorizationCodeHandler {
	t.Helper()
	cfg := &sdkauth.AuthorizationCodeHandlerConfig{
		PreregisteredClient: by.registered, RedirectURL: clientCallback, RequestRefreshToken: true,
		AuthorizationCodeFetcher: func(_ context.Context, args *sdkauth.AuthorizationArgs) (*sdkauth.AuthorizationResult, error) {
			p.asked.Add(1)
			page := p.browser.OpenUntil(args.URL, clientCallback)
			if page.Next == "" {
				return nil, fmt.Errorf("the provider shows %s", page.Body)
			}
			back, err := url.Parse(page.Next)
			if err != nil {
				return nil, err
			}
			said := back.Query()
			if said.Get("code") == "" {
				return nil, fmt.Errorf("the provider says %s: %s", said.Get("error"), said.Get("error_description"))
			}
			return &sdkauth.AuthorizationResult{Code: said.Get("code"), State: said.Get("state"), Iss: said.Get("iss")}, nil
		},
	}
	if by.document != "" {
		cfg.ClientIDMetadataDocumentConfig = &sdkauth.ClientIDMetadataDocumentConfig{URL: by.document}
	}
	if by.register != "" {
		cfg.DynamicClientRegistrationConfig = &sdkauth.DynamicClientRegistrationConfig{Metadata: &oauthex.ClientRegistrationMetadata{
			ClientName: by.register, RedirectURIs: []string{clientCallback}, TokenEndpointAuthMethod: "none",
			GrantTypes: []string{"authorization_code", "refresh_token"}, ResponseTypes: []string{"code"},
		}}
	}
	handler, err := sdkauth.NewAuthorizationCodeHandler(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return handler
}

// client is an MCP client that knows the gateway's URL and nothing else.
func (p *person) client(t *testing.T, gateway, protocol string, by ways) *authtest.Client {
	t.Helper()
	transport := http.DefaultTransport.(*http.Transport).Clone()
	t.Cleanup(transport.CloseIdleConnections)
	return authtest.Connect(t, authtest.ClientConfig{Protocol: protocol, Transport: &mcp.StreamableClientTransport{
		Endpoint: gateway, HTTPClient: &http.Client{Transport: transport}, OAuthHandler: p.oauth(t, by),
	}})
}

// token logs in as a client does that was refused, and returns what it got.
// resource is what the token is for.
func (p *person) token(t *testing.T, issuer, resource string, by ways) string {
	t.Helper()
	handler := p.oauth(t, by)
	metadata := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(map[string]any{"resource": resource, "authorization_servers": []string{issuer}, "scopes_supported": []string{"openid"}})
	}))
	defer metadata.Close()
	req := httptest.NewRequest(http.MethodPost, resource, http.NoBody)
	refused := &http.Response{StatusCode: http.StatusUnauthorized, Body: http.NoBody, Header: http.Header{
		"Www-Authenticate": {`Bearer resource_metadata="` + metadata.URL + `"`},
	}}
	if err := handler.Authorize(within(t), req, refused); err != nil {
		t.Fatal(err)
	}
	source, err := handler.TokenSource(within(t))
	if err != nil {
		t.Fatal(err)
	}
	token, err := source.Token()
	if err != nil {
		t.Fatal(err)
	}
	return token.AccessToken
}

// logIn logs a browser in at the gateway.
func (p *person) logIn(t *testing.T, base string) {
	t.Helper()
	if page := p.browser.Open(base + "/"); page.Status != http.StatusOK || !strings.Contains(page.Body, "Log out") {
		t.Fatalf("%s logs in: %d %s\n%s", p.name, page.Status, page.URL, page.Body)
	}
}

// httpAnswer is what /mcp says to one request with a bearer token.
func httpAnswer(t *testing.T, gateway, token string) (status int, challenge string) {
	t.Helper()
	req, err := http.NewRequestWithContext(within(t), http.MethodPost, gateway, strings.NewReader(
		`{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-11-25","capabilities":{},"clientInfo":{"name":"raw","version":"1"}}}`))
	if err != nil {
		t.Fatal(err)
	}
	req.Header = http.Header{"Content-Type": {"application/json"}, "Accept": {"application/json, text/event-stream"}}
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, resp.Body); err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, resp.Header.Get("WWW-Authenticate")
}

// refuses checks that a token is not accepted, and what the answer tells of it.
func refuses(t *testing.T, gateway, what, token string) {
	t.Helper()
	status, says := httpAnswer(t, gateway, token)
	where := `resource_metadata="` + strings.TrimSuffix(gateway, "/mcp") + `/.well-known/oauth-protected-resource/mcp"`
	if status != http.StatusUnauthorized || !strings.Contains(says, where) || strings.Contains(says, `error="invalid_token"`) != (token != "") {
		t.Errorf("%s: %d %s", what, status, says)
	}
}

// peer is npm oidc-provider with people who have accounts.
type peer string

func (p peer) Issuer() string { return string(p) }

// Valid introspects an opaque token (RFC 7662).
func (p peer) Valid(token string) (authtest.TokenInfo, bool) {
	req, err := http.NewRequest(http.MethodPost, string(p)+"/token/introspection", strings.NewReader(url.Values{"token": {token}}.Encode()))
	if err != nil || token == "" {
		return authtest.TokenInfo{}, false
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	req.SetBasicAuth("resource", "of-the-resource-server")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return authtest.TokenInfo{}, false
	}
	defer resp.Body.Close()
	var said struct {
		Active  bool   `json:"active"`
		Subject string `json:"sub"`
		Aud     string `json:"aud"`
		Scope   string `json:"scope"`
		Expires int64  `json:"exp"`
	}
	if json.NewDecoder(resp.Body).Decode(&said) != nil || !said.Active {
		return authtest.TokenInfo{}, false
	}
	return authtest.TokenInfo{Subject: said.Subject, Audience: said.Aud, Scopes: strings.Fields(said.Scope), Expires: time.Unix(said.Expires, 0)}, true
}

// peerClient is what a provider knows of a client beforehand.
type peerClient struct {
	ID           string   `json:"client_id"`
	Secret       string   `json:"client_secret"`
	RedirectURIs []string `json:"redirect_uris"`
	Responses    []string `json:"response_types"`
	Grants       []string `json:"grant_types"`
}

func startPeer(t *testing.T, format string, env []string, clients ...peerClient) peer {
	t.Helper()
	known, err := json.Marshal(clients)
	if err != nil {
		t.Fatal(err)
	}
	return peer(startNode(t, "company.mjs", env, format, string(known)))
}

// notesOf is a remote with accounts, at a provider of its own.
func notesOf(t *testing.T) *authtest.Remote {
	t.Helper()
	as := startPeer(t, "opaque", nil, peerClient{ID: "resource", Secret: "of-the-resource-server", RedirectURIs: []string{}, Responses: []string{}, Grants: []string{}})
	notes := authtest.NewRemote(t, authtest.RemoteConfig{AS: as})
	notes.Set(func(k *authtest.RemoteKnobs) { k.Scopes = []string{"read"} })
	return notes
}

// throughTheirLinks: two users with a client each, both eras; each signs in by
// the own link, and by nobody else's.
func throughTheirLinks(t *testing.T, gw *process, alice, bob *person, as func(p *person, protocol string) *authtest.Client) {
	t.Helper()
	base := strings.TrimSuffix(gw.url, "/mcp")
	hersOld, hersNew := as(alice, authtest.ProtocolLegacy), as(alice, authtest.ProtocolModern)
	his := as(bob, authtest.ProtocolModern)
	alice.logIn(t, base)
	bob.logIn(t, base)

	herLink := link(t, hersOld.Call("notes_echo", nil), "notes")
	if again := link(t, hersNew.Call("notes_echo", nil), "notes"); again != herLink {
		t.Errorf("two links for one user: %s and %s", herLink, again)
	}
	hisLink := link(t, his.Call("notes_echo", nil), "notes")
	if hisLink == herLink {
		t.Fatal("one link for two users")
	}
	if page := bob.browser.Open(herLink); page.Status != http.StatusForbidden || !strings.Contains(page.Body, "made for another account") {
		t.Errorf("bob at alice's link: %d\n%s", page.Status, page.Body)
	}
	if said := authtest.Text(hersOld.Call("notes_echo", nil)); !strings.Contains(said, "another account") {
		t.Errorf("alice does not hear of it: %s", said)
	}

	// At the remote they are other people than at the company.
	signInAs := func(p *person, link, account string) {
		t.Helper()
		page := p.browser.Open(link)
		if page.Status != http.StatusOK || !strings.Contains(page.Body, "Continue") {
			t.Fatalf("%s at the own link: %d %s\n%s", p.name, page.Status, page.URL, page.Body)
		}
		name, password := p.browser.User, p.browser.Password
		p.browser.User, p.browser.Password = account, account
		defer func() { p.browser.User, p.browser.Password = name, password }()
		if page = p.browser.Submit(page, "Continue"); page.Status != http.StatusOK || !strings.Contains(page.Body, "notes is connected") {
			t.Fatalf("%s signs in: %d %s\n%s", p.name, page.Status, page.URL, page.Body)
		}
	}
	signInAs(alice, herLink, "alice-at-notes")
	echo(t, hersOld, "notes_echo", "hers, of 2025")
	echo(t, hersNew, "notes_echo", "hers, of 2026")
	if again := link(t, his.Call("notes_echo", nil), "notes"); again != hisLink {
		t.Error("bob's link is another one since alice signed in")
	}
	signInAs(bob, hisLink, "bob-at-notes")
	var wg sync.WaitGroup
	for range 20 {
		for client, want := range map[*authtest.Client]string{hersOld: "alice-at-notes", hersNew: "alice-at-notes", his: "bob-at-notes"} {
			wg.Go(func() {
				if who := authtest.Text(client.Call("notes_whoami", nil)); who != want {
					t.Errorf("%q, want %q", who, want)
				}
			})
		}
	}
	wg.Wait()
	if !regexp.MustCompile(`"msg":"sign-in refused","audit":\{"principal":\{"issuer":"[^"]+","subject":"` + alice.subject + `"\},"remote":"notes","why":"wrong_person"\}`).MatchString(gw.output()) {
		t.Error("bob's attempt is not in the audit log")
	}
}

// TestCompanyProvider: npm oidc-provider as the company's provider, whose access
// tokens are JWTs for this gateway, and as the remote's.
func TestCompanyProvider(t *testing.T) {
	t.Parallel()
	// A client ID metadata document has to be at an https URL.
	var documentURL string
	var fetched atomic.Int32
	document := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		fetched.Add(1)
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(map[string]any{
			"client_id": documentURL, "client_name": "by document", "redirect_uris": []string{clientCallback}, "application_type": "native",
			"token_endpoint_auth_method": "none", "grant_types": []string{"authorization_code", "refresh_token"}, "response_types": []string{"code"},
		})
	}))
	t.Cleanup(document.Close)
	documentURL = document.URL + "/client.json"
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: document.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}

	listen := "127.0.0.1:" + authtest.FreePort(t)
	company := startPeer(t, "jwt", []string{"NODE_EXTRA_CA_CERTS=" + ca}, peerClient{
		ID: "gatehouse", Secret: gatewaySecret, RedirectURIs: []string{"http://" + listen + "/login/callback"},
		Responses: []string{"code"}, Grants: []string{"authorization_code", "refresh_token"},
	})
	notes := notesOf(t)
	gw := startServe(t, fmt.Sprintf(`{"mcpServers": {"notes": {"url": %q}}, "gateway": {"auth": {"issuer": %q, "clientId": "gatehouse", "clientSecret": %q,
		"scopes": ["openid", "profile", "email", "offline_access"]}}}`, notes.URL, company, gatewaySecret), "--listen", listen)

	alice, bob := newPerson(t, "alice", "alice", "alice"), newPerson(t, "bob", "bob", "bob")
	throughTheirLinks(t, gw, alice, bob, func(p *person, protocol string) *authtest.Client {
		// Each kind of client that an MCP client can be.
		if protocol == authtest.ProtocolModern {
			return p.client(t, gw.url, protocol, ways{document: documentURL})
		}
		return p.client(t, gw.url, protocol, ways{register: "by registration"})
	})

	if fetched.Load() == 0 {
		t.Error("nobody read the client's metadata document")
	}

	registering := ways{register: "by registration"}
	good := alice.token(t, company.Issuer(), gw.url, registering)
	if strings.Count(good, ".") != 2 {
		t.Fatal("the provider's access tokens are no JWTs")
	}
	if status, says := httpAnswer(t, gw.url, good); status != http.StatusOK {
		t.Errorf("a good token: %d %s", status, says)
	}
	refuses(t, gw.url, "no token", "")
	refuses(t, gw.url, "garbage", "garbage")
	refuses(t, gw.url, "another's audience", alice.token(t, company.Issuer(), gw.url+"/elsewhere", registering))
	refuses(t, gw.url, "with another payload", changed(good))
	short := alice.token(t, company.Issuer(), gw.url, ways{register: "short"})
	if status, says := httpAnswer(t, gw.url, short); status != http.StatusOK {
		t.Errorf("a token of two seconds, new: %d %s", status, says)
	}
	untilRefused(t, gw.url, short)
	// A session goes on with the next token, and nobody is asked again.
	lasting, asked := alice.client(t, gw.url, authtest.ProtocolLegacy, ways{register: "short"}), alice.asked.Load()
	end := time.After(3 * time.Second)
	for going := true; going; {
		select {
		case <-end:
			going = false
		case <-time.Tick(100 * time.Millisecond):
		}
		echo(t, lasting, "notes_echo", "with a new token")
	}
	if n := alice.asked.Load() - asked; n != 0 {
		t.Errorf("alice was asked to log in %d times more", n)
	}
	noTokenWentOn(t, notes)
	// Who was refused is nobody, and no principal is written down for it.
	if !strings.Contains(gw.output(), `"msg":"refused","audit":{"why":"bearer","from":"127.0.0.1"}`) {
		t.Error("the refused tokens are not in the audit log")
	}
	if strings.Contains(gw.output(), gatewaySecret) {
		t.Error("the client's secret is in the log")
	}
}

// untilRefused asks until a token that has been good is good no more.
func untilRefused(t *testing.T, gateway, token string) {
	t.Helper()
	end := time.After(20 * time.Second)
	for tick := time.Tick(50 * time.Millisecond); ; {
		select {
		case <-end:
			t.Error("a token outlived its end")
			return
		case <-tick:
		}
		if status, _ := httpAnswer(t, gateway, token); status != http.StatusOK {
			refuses(t, gateway, "at its end", token)
			return
		}
	}
}

// noTokenWentOn: what a client proves itself with is for the gateway alone.
func noTokenWentOn(t *testing.T, remote *authtest.Remote) {
	t.Helper()
	if len(remote.Tokens()) == 0 {
		t.Error("the remote saw no tokens")
	}
	for _, token := range remote.Tokens() {
		if strings.Count(token, ".") == 2 {
			t.Error("a client's bearer token reached a remote")
		}
	}
}

// audienceStorage tells of a token's audience at introspection, which the
// example's storage checks and then keeps to itself.
type audienceStorage struct{ *storage.Storage }

func (s audienceStorage) SetIntrospectionFromToken(ctx context.Context, said *oidc.IntrospectionResponse, token, subject, client string) error {
	if err := s.Storage.SetIntrospectionFromToken(ctx, said, token, subject, client); err != nil {
		return err
	}
	said.Audience = oidc.Audience{client}
	return nil
}

// TestOpaqueTokens: zitadel's own example as the company's provider. It knows no
// resource indicators, registers nobody, and its access tokens say nothing by
// themselves: the gateway asks it about each. Clients are the gateway's own
// client there, and that is the audience.
func TestOpaqueTokens(t *testing.T) {
	t.Parallel()
	z := &zitadel{}
	z.Server = httptest.NewServer(http.HandlerFunc(z.serve))
	t.Cleanup(z.Close)
	notes := notesOf(t)
	gw := startServe(t, fmt.Sprintf(`{"mcpServers": {"notes": {"url": %q}}, "gateway": {"auth": {"issuer": %q, "clientId": "gatehouse", "clientSecret": %q,
		"audience": "gatehouse", "scopes": ["openid", "profile", "email", "offline_access"]}}}`, notes.URL, z.URL, gatewaySecret))
	base := strings.TrimSuffix(gw.url, "/mcp")
	provider := exampleop.SetupServer(z.URL, audienceStorage{storage.NewStorageWithClients(storage.NewUserStore(z.URL), map[string]*storage.Client{
		"gatehouse": storage.WebClient("gatehouse", gatewaySecret, base+"/login/callback", clientCallback),
		"files":     storage.WebClient("files", "canary-cs-files-01", clientCallback),
	})}, nil, false)
	z.mu.Lock()
	z.provider = provider
	z.mu.Unlock()

	of := func(id, secret string) ways {
		return ways{registered: &oauthex.ClientCredentials{ClientID: id, ClientSecretAuth: &oauthex.ClientSecretAuth{ClientSecret: secret}}}
	}
	alice, bob := newPerson(t, "test-user@127.0.0.1", "id1", "verysecure"), newPerson(t, "test-user2", "id2", "verysecure")
	throughTheirLinks(t, gw, alice, bob, func(p *person, protocol string) *authtest.Client {
		return p.client(t, gw.url, protocol, of("gatehouse", gatewaySecret))
	})

	good := alice.token(t, z.URL, gw.url, of("gatehouse", gatewaySecret))
	if strings.Count(good, ".") == 2 {
		t.Fatal("the provider's access tokens are JWTs")
	}
	if status, says := httpAnswer(t, gw.url, good); status != http.StatusOK {
		t.Errorf("a good token: %d %s", status, says)
	}
	refuses(t, gw.url, "no token", "")
	refuses(t, gw.url, "garbage", "garbage")
	refuses(t, gw.url, "another client's", alice.token(t, z.URL, gw.url, of("files", "canary-cs-files-01")))
	// Ended at the provider: what was heard of it is not believed for long.
	revoke(t, z.URL, good)
	untilRefused(t, gw.url, good)
	for _, token := range notes.Tokens() {
		if token == good {
			t.Error("a client's bearer token reached a remote")
		}
	}
}

func revoke(t *testing.T, issuer, token string) {
	t.Helper()
	req, err := http.NewRequestWithContext(within(t), http.MethodPost, issuer+"/revoke", strings.NewReader(url.Values{"token": {token}, "token_type_hint": {"access_token"}}.Encode()))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	req.SetBasicAuth("gatehouse", gatewaySecret)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("revoking: %s", resp.Status)
	}
}
