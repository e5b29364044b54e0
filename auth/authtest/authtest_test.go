package authtest

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/oauth2"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fetchJSON reads a document, whatever its status.
func fetchJSON(t *testing.T, link string, body io.Reader, into any) int {
	t.Helper()
	method := http.MethodGet
	if body != nil {
		method = http.MethodPost
	}
	req, err := http.NewRequest(method, link, body)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	req.Close = true
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if into != nil {
		if err := json.NewDecoder(resp.Body).Decode(into); err != nil {
			t.Fatalf("%s: %v", link, err)
		}
	}
	return resp.StatusCode
}

// landing is a client's redirect URI.
func landing(t *testing.T) (redirect string, callback chan url.Values) {
	callback = make(chan url.Values, 1)
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		callback <- r.URL.Query()
		io.WriteString(w, "<p>welcome back</p>")
	}))
	t.Cleanup(s.Close)
	return s.URL + "/cb", callback
}

// signIn registers a client and signs alice in for a remote.
func signIn(t *testing.T, metadata, resource string, scopes ...string) (*oauth2.Config, *oauth2.Token, context.Context) {
	t.Helper()
	var doc struct {
		Issuer    string   `json:"issuer"`
		Authorize string   `json:"authorization_endpoint"`
		Token     string   `json:"token_endpoint"`
		Register  string   `json:"registration_endpoint"`
		Methods   []string `json:"code_challenge_methods_supported"`
		Iss       bool     `json:"authorization_response_iss_parameter_supported"`
	}
	fetchJSON(t, metadata, nil, &doc)
	if !slices.Equal(doc.Methods, []string{"S256"}) || !doc.Iss {
		t.Errorf("metadata: %+v", doc)
	}
	redirect, callback := landing(t)
	var client struct {
		ID string `json:"client_id"`
	}
	if got := fetchJSON(t, doc.Register, strings.NewReader(fmt.Sprintf(
		`{"client_name":"test","redirect_uris":[%q],"token_endpoint_auth_method":"none","grant_types":["authorization_code","refresh_token"]}`, redirect)), &client); got != http.StatusCreated {
		t.Fatalf("registration: %d", got)
	}
	cfg := &oauth2.Config{
		ClientID: client.ID, RedirectURL: redirect, Scopes: scopes,
		Endpoint: oauth2.Endpoint{AuthURL: doc.Authorize, TokenURL: doc.Token, AuthStyle: oauth2.AuthStyleInParams},
	}
	verifier := oauth2.GenerateVerifier()
	page := NewBrowser(t).Open(cfg.AuthCodeURL("the-state-of-this-walk", oauth2.S256ChallengeOption(verifier), oauth2.SetAuthURLParam("resource", resource)))
	if page.Status != http.StatusOK || !strings.Contains(page.Body, "welcome back") {
		t.Fatalf("the browser ended at %d: %s\n%+v", page.Status, page.Body, page.Hops)
	}
	q := <-callback
	if q.Get("state") != "the-state-of-this-walk" || q.Get("iss") != doc.Issuer {
		t.Errorf("the callback had %v, want iss %q", q, doc.Issuer)
	}
	transport := http.DefaultTransport.(*http.Transport).Clone()
	t.Cleanup(transport.CloseIdleConnections)
	ctx := context.WithValue(t.Context(), oauth2.HTTPClient, &http.Client{Transport: transport})
	token, err := cfg.Exchange(ctx, q.Get("code"), oauth2.VerifierOption(verifier), oauth2.SetAuthURLParam("resource", resource))
	if err != nil {
		t.Fatal(err)
	}
	return cfg, token, ctx
}

// authority is an AS or an OP.
type authority interface {
	Authority
	SecretSource
	Count(string) int
	RevokeAll()
	ExpireAll()
}

func TestWalk(t *testing.T) {
	providers := map[string]func(*testing.T) authority{
		"AS":        func(t *testing.T) authority { return NewAS(t) },
		"AS path":   func(t *testing.T) authority { return StartAS(t, ASConfig{Path: "/tenant"}) },
		"OP":        func(t *testing.T) authority { return NewOP(t, OPConfig{}) },
		"OP opaque": func(t *testing.T) authority { return NewOP(t, OPConfig{Opaque: true}) },
	}
	for name, provider := range providers {
		t.Run(name, func(t *testing.T) {
			as := provider(t)
			remote := NewRemote(t, RemoteConfig{AS: as})
			canary := NewCanary(t, as, remote)

			if _, err := TryConnect(t, ClientConfig{URL: remote.URL}); err == nil {
				t.Fatal("connected without a token")
			}
			base, _ := url.Parse(as.Issuer())
			cfg, token, ctx := signIn(t, base.Scheme+"://"+base.Host+"/.well-known/oauth-authorization-server"+base.Path, remote.URL, "read", "offline_access")

			info, ok := as.Valid(token.AccessToken)
			if !ok || info.Subject != "alice" || info.Audience != remote.URL || info.ClientID != cfg.ClientID || !slices.Contains(info.Scopes, "read") {
				t.Fatalf("the token is %+v, %v", info, ok)
			}
			for _, protocol := range []string{ProtocolLegacy, ProtocolModern} {
				client := Connect(t, ClientConfig{URL: remote.URL, Protocol: protocol, Token: token.AccessToken})
				if got := Text(client.Call("whoami", nil)); got != "alice" {
					t.Errorf("%s: whoami says %q", protocol, got)
				}
				if got := client.Tools(); !slices.Equal(got, []string{"add", "echo", "whoami"}) {
					t.Errorf("%s: tools %q", protocol, got)
				}
			}
			other := NewRemote(t, RemoteConfig{AS: as})
			if _, err := TryConnect(t, ClientConfig{URL: other.URL, Token: token.AccessToken}); err == nil {
				t.Error("a token for one remote was good at another")
			}

			as.ExpireAll()
			if _, ok := as.Valid(token.AccessToken); ok {
				t.Error("the token outlived ExpireAll")
			}
			token.Expiry = time.Now().Add(-time.Hour)
			first := *token
			renewed, err := cfg.TokenSource(ctx, token).Token()
			if err != nil {
				t.Fatal(err)
			}
			if info, ok := as.Valid(renewed.AccessToken); !ok || info.Audience != remote.URL {
				t.Errorf("the renewed token is %+v, %v", info, ok)
			}
			if _, err := cfg.TokenSource(ctx, &first).Token(); err == nil {
				t.Error("a refresh token was good twice")
			}
			if _, ok := as.Valid(renewed.AccessToken); ok {
				t.Error("the family outlived the reuse of its refresh token")
			}
			if got := as.Count(EndpointToken); got != 3 {
				t.Errorf("%d token requests, want 3", got)
			}

			canary.Logger().Info("x", "refresh", url.QueryEscape(first.RefreshToken))
			canary.Logger().Info("x", "state", "the-state-of-this-walk")
			if got := canary.Found(); len(got) != 2 {
				t.Errorf("the canary found %q", got)
			}
			canary.log.Reset()
		})
	}
}

func TestASKnobs(t *testing.T) {
	as := NewAS(t)
	now := time.Now()
	as.Set(func(k *ASKnobs) {
		k.Now = func() time.Time { return now }
		k.WellKnown = []WellKnown{OIDCAppending}
		k.Document = map[string]any{"token_endpoint": "javascript:alert(1)", "registration_endpoint": nil}
		k.Metadata = Chain(ContentType("text/html"), Edit(Duplicate("issuer", "https://evil.example")))
	})
	if got := NewBrowser(t).Get(as.URL + "/.well-known/oauth-authorization-server"); got.Status != http.StatusNotFound {
		t.Errorf("RFC 8414 answered %d", got.Status)
	}
	page := NewBrowser(t).Get(as.URL + "/.well-known/openid-configuration")
	if !strings.HasPrefix(page.Body, `{"issuer":"https://evil.example",`) || !strings.Contains(page.Body, `"javascript:alert(1)"`) ||
		strings.Contains(page.Body, "registration_endpoint") || page.Header.Get("Content-Type") != "text/html" {
		t.Errorf("metadata: %s", page.Body)
	}
	token := as.Mint("bob", "https://remote.example", "a")
	if info, ok := as.Valid(token); !ok || info.Subject != "bob" {
		t.Error("a minted token is not good")
	}
	now = now.Add(time.Hour)
	if _, ok := as.Valid(token); ok {
		t.Error("a token outlived its hour")
	}
	as.Set(func(k *ASKnobs) {
		k.Deny, k.DenyDescription, k.Iss = "access_denied", "canary-description", IssNormalised
		k.Register = First(1, Status(http.StatusTooManyRequests, "Retry-After: 7"))
		k.Token = OnGrant("refresh_token", Answer(http.StatusServiceUnavailable, "text/plain", "later"))
	})
	as.AddClient(OAuthClient{ID: "known", Method: "none", RedirectURIs: []string{"http://127.0.0.1:1/cb"}})
	link := as.URL + "/authorize?client_id=known&response_type=code&redirect_uri="
	if got := NewBrowser(t).Get(link + url.QueryEscape("http://127.0.0.1:1/cb/")); got.Status != http.StatusBadRequest {
		t.Errorf("another redirect URI: %d", got.Status)
	}
	denied := NewBrowser(t).OpenUntil(link+url.QueryEscape("http://127.0.0.1:1/cb"), "http://127.0.0.1:1/")
	if q, err := url.Parse(denied.Next); err != nil || q.Query().Get("error") != "access_denied" || q.Query().Get("iss") != as.URL+"/" {
		t.Errorf("denied: %s", denied.Next)
	}
	registration := `{"redirect_uris":["http://127.0.0.1:1/cb"]}`
	if got := fetchJSON(t, as.URL+"/register", strings.NewReader(registration), nil); got != http.StatusTooManyRequests {
		t.Errorf("first registration: %d", got)
	}
	var client map[string]any
	if got := fetchJSON(t, as.URL+"/register", strings.NewReader(registration), &client); got != http.StatusCreated ||
		client["token_endpoint_auth_method"] != "client_secret_basic" || !strings.HasPrefix(client["client_secret"].(string), "canary-cs-") {
		t.Errorf("second registration: %d %v", got, client)
	}
	for grant, want := range map[string]int{"refresh_token": http.StatusServiceUnavailable, "authorization_code": http.StatusBadRequest} {
		if got := NewBrowser(t).Do(http.MethodPost, as.URL+"/token", url.Values{"grant_type": {grant}, "client_id": {"known"}}); got.Status != want {
			t.Errorf("%s: %d, want %d", grant, got.Status, want)
		}
	}
}

func TestAnswers(t *testing.T) {
	valid := func(w http.ResponseWriter, _ *http.Request) { writeJSON(w, http.StatusOK, map[string]any{"a": "b"}) }
	tests := map[string]struct {
		intercept Intercept
		want      func(*http.Response, []byte) bool
	}{
		"pad":     {Edit(Pad(1000)), func(_ *http.Response, b []byte) bool { return len(b) > 1000 && json.Valid(b) }},
		"nest":    {Edit(Nest(5000)), func(_ *http.Response, b []byte) bool { return json.Valid(b) && bytes.Contains(b, []byte("[[[[")) }},
		"trail":   {Edit(Trail("{}")), func(_ *http.Response, b []byte) bool { return !json.Valid(b) }},
		"endless": {Endless(1 << 20), func(_ *http.Response, b []byte) bool { return len(b) > 1<<20 && json.Valid(b) }},
		"bomb": {GzipBomb(1 << 20), func(r *http.Response, b []byte) bool {
			zipped, err := gzip.NewReader(bytes.NewReader(b))
			if err != nil {
				return false
			}
			plain, err := io.ReadAll(zipped)
			return err == nil && len(b) < 1<<14 && len(plain) > 1<<20 && json.Valid(plain)
		}},
		"json":     {EditJSON(func(d map[string]any) { d["a"] = 1 }), func(_ *http.Response, b []byte) bool { return string(b) == `{"a":1}` }},
		"redirect": {Redirect(307, "http://other.example/"), func(r *http.Response, _ []byte) bool { return r.Header.Get("Location") == "http://other.example/" }},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			w := httptest.NewRecorder()
			test.intercept.serve(w, httptest.NewRequest(http.MethodGet, "/", nil), valid)
			if !test.want(w.Result(), w.Body.Bytes()) {
				t.Errorf("%d %v %.200s", w.Code, w.Header(), w.Body)
			}
		})
	}
	tick := make(chan struct{})
	ctx, cancel := context.WithCancel(t.Context())
	w := httptest.NewRecorder()
	done := make(chan struct{})
	go func() {
		Drip(200, "text/plain", "abcdef", tick)(w, httptest.NewRequestWithContext(ctx, http.MethodGet, "/", nil), nil)
		close(done)
	}()
	for range 3 {
		tick <- struct{}{}
	}
	cancel()
	<-done
	if w.Body.String() != "abc" {
		t.Errorf("dripped %q", w.Body)
	}
}

func TestRemote(t *testing.T) {
	as := NewAS(t)
	for _, era := range []struct {
		protocol string
		cfg      RemoteConfig
	}{
		{ProtocolLegacy, RemoteConfig{}},
		{ProtocolLegacy, RemoteConfig{JSON: true, TLS: false}},
		{ProtocolModern, RemoteConfig{Stateless: true}},
	} {
		t.Run(fmt.Sprintf("%s %+v", era.protocol, era.cfg), func(t *testing.T) {
			era.cfg.AS = as
			remote := NewRemote(t, era.cfg)
			token := as.Mint("alice", remote.URL, "read")
			client := Connect(t, ClientConfig{URL: remote.URL, Protocol: era.protocol, Token: token})
			if got := Text(client.Call("echo", map[string]any{"text": "hi"})); got != "hi" {
				t.Errorf("echo says %q", got)
			}
			if got := Text(client.Call("add", map[string]any{"a": 1, "b": 2})); got != "3" {
				t.Errorf("add says %q", got)
			}
			if got := remote.ToolCalls("echo"); got != 1 {
				t.Errorf("%d calls of echo", got)
			}
			if got := remote.Tokens(); !slices.Equal(got, []string{token}) {
				t.Errorf("tokens %q", got)
			}
			remote.AddTool("new")
			if err := client.WaitChanged(t.Context(), 0); err != nil {
				t.Error(err)
			}

			raw := json.RawMessage(`{"content":[{"type":"text","text":"x","odd":9007199254740993}],"resultType":"complete"}`)
			gate := make(chan struct{})
			close(gate)
			remote.Set(func(k *RemoteKnobs) {
				k.Results = map[string]json.RawMessage{"echo": raw}
				k.ToolScopes = map[string][]string{"add": {"read", "math"}}
				k.MCP = Chain(OnRPC("tools/list", Hold(gate)), OnRPC("ping", Status(500)))
			})
			body := fmt.Sprintf(`{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"echo","arguments":{},"_meta":{"io.modelcontextprotocol/protocolVersion":%q,"io.modelcontextprotocol/clientCapabilities":{}}}}`, era.protocol)
			if era.protocol == ProtocolLegacy {
				body = `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"echo","arguments":{}}}`
			}
			req, _ := http.NewRequest(http.MethodPost, remote.URL, strings.NewReader(body))
			for name, value := range map[string]string{
				"Authorization": "Bearer " + token, "Accept": "application/json, text/event-stream", "Content-Type": "application/json",
				"Mcp-Protocol-Version": era.protocol, "Mcp-Session-Id": client.ID(), "Mcp-Method": "tools/call", "Mcp-Name": "echo",
			} {
				req.Header.Set(name, value)
			}
			req.Close = true
			resp, err := http.DefaultClient.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			if got, _ := io.ReadAll(resp.Body); !bytes.Contains(got, raw) {
				t.Errorf("the raw result became %s", got)
			}
			call := `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"add"}}`
			req, _ = http.NewRequest(http.MethodPost, remote.URL, strings.NewReader(call))
			req.Header.Set("Authorization", "Bearer "+token)
			req.Close = true
			resp, err = http.DefaultClient.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			resp.Body.Close()
			if got := resp.Header.Get("WWW-Authenticate"); resp.StatusCode != http.StatusForbidden ||
				!strings.Contains(got, `error="insufficient_scope"`) || !strings.Contains(got, `scope="read math"`) {
				t.Errorf("step-up: %d %s", resp.StatusCode, got)
			}

			client.Close()
			remote.Down()
			if _, err := TryConnect(t, ClientConfig{URL: remote.URL, Protocol: era.protocol, Token: token}); err == nil {
				t.Error("connected to a remote that is down")
			}
			remote.Up()
			Connect(t, ClientConfig{URL: remote.URL, Protocol: era.protocol, Token: token}).Tools()
		})
	}
}

func TestRemoteChallenge(t *testing.T) {
	as := NewAS(t)
	remote := NewRemote(t, RemoteConfig{AS: as, Path: "/deep/mcp"})
	challenge := func() string { return NewBrowser(t).Get(remote.URL).Header.Get("WWW-Authenticate") }
	document := remote.Origin + "/.well-known/oauth-protected-resource/deep/mcp"
	if got, want := challenge(), `Bearer resource_metadata="`+document+`"`; got != want {
		t.Errorf("challenge %s, want %s", got, want)
	}
	var doc struct {
		Resource string   `json:"resource"`
		Servers  []string `json:"authorization_servers"`
	}
	if fetchJSON(t, document, nil, &doc); doc.Resource != remote.URL || !slices.Equal(doc.Servers, []string{as.URL}) {
		t.Errorf("document %+v", doc)
	}
	remote.Set(func(k *RemoteKnobs) {
		k.DocumentAt, k.NoHeaderURL, k.ChallengeScope = []string{ResourceRoot}, true, []string{"a", "b"}
	})
	if got := challenge(); got != `Bearer scope="a b"` {
		t.Errorf("challenge %s", got)
	}
	if got := fetchJSON(t, remote.Origin+ResourceRoot, nil, &doc); got != http.StatusOK {
		t.Errorf("root document: %d", got)
	}
	remote.Set(func(k *RemoteKnobs) { k.Challenge = "-" })
	if got := challenge(); got != "" {
		t.Errorf("challenge %s", got)
	}
	old := NewAS(t)
	mounted := NewRemote(t, RemoteConfig{MountAS: old})
	if fetchJSON(t, mounted.Origin+"/.well-known/oauth-authorization-server", nil, &struct{}{}); old.Issuer() != mounted.Origin {
		t.Errorf("issuer %s", old.Issuer())
	}
}

func TestASGrants(t *testing.T) {
	as := NewAS(t)
	as.Set(func(k *ASKnobs) { k.CIMD, k.NoRotation, k.User = true, true, "bob" })
	redirect := "http://127.0.0.1:1/cb"
	var document *httptest.Server
	document = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		writeJSON(w, http.StatusOK, map[string]any{"client_id": document.URL + "/client.json", "redirect_uris": []string{redirect}})
	}))
	defer document.Close()
	as.Set(func(k *ASKnobs) { k.Fetch = document.Client() })
	as.AddClient(OAuthClient{ID: "known", Secret: "canary-cs-known", Method: "client_secret_basic", RedirectURIs: []string{redirect}})
	transport := http.DefaultTransport.(*http.Transport).Clone()
	defer transport.CloseIdleConnections()
	ctx := context.WithValue(t.Context(), oauth2.HTTPClient, &http.Client{Transport: transport})
	for _, cfg := range []*oauth2.Config{
		{ClientID: document.URL + "/client.json", Endpoint: oauth2.Endpoint{AuthStyle: oauth2.AuthStyleInParams}},
		{ClientID: "known", ClientSecret: "canary-cs-known", Endpoint: oauth2.Endpoint{AuthStyle: oauth2.AuthStyleInHeader}},
	} {
		cfg.RedirectURL, cfg.Endpoint.AuthURL, cfg.Endpoint.TokenURL = redirect, as.URL+"/authorize", as.URL+"/token"
		verifier := oauth2.GenerateVerifier()
		walk := NewBrowser(t).OpenUntil(cfg.AuthCodeURL("s", oauth2.S256ChallengeOption(verifier)), redirect)
		back, err := url.Parse(walk.Next)
		if err != nil {
			t.Fatal(err)
		}
		code := back.Query().Get("code")
		if _, err := cfg.Exchange(ctx, code, oauth2.VerifierOption(verifier+"x")); err == nil {
			t.Error("a wrong verifier was good")
		}
		token, err := cfg.Exchange(ctx, code, oauth2.VerifierOption(verifier))
		if err != nil {
			t.Fatal(err)
		}
		if info, ok := as.Valid(token.AccessToken); !ok || info.Subject != "bob" {
			t.Errorf("the token is %+v, %v", info, ok)
		}
		for range 2 {
			old := *token
			old.Expiry = time.Now().Add(-time.Hour)
			if renewed, err := cfg.TokenSource(ctx, &old).Token(); err != nil || renewed.RefreshToken != token.RefreshToken {
				t.Errorf("without rotation: %v", err)
			}
		}
		if _, err := cfg.Exchange(ctx, code, oauth2.VerifierOption(verifier)); err == nil {
			t.Error("a code was good twice")
		}
		if _, ok := as.Valid(token.AccessToken); ok {
			t.Error("a token outlived the reuse of its code")
		}
		wrong := *cfg
		wrong.ClientSecret += "x"
		if _, err := wrong.TokenSource(ctx, &oauth2.Token{RefreshToken: token.RefreshToken}).Token(); err == nil || !strings.Contains(err.Error(), "invalid_client") {
			t.Errorf("a wrong secret: %v", err)
		}
	}
	if got := as.Reuses(); got != 2 {
		t.Errorf("%d reuses, want 2", got)
	}
}

func TestForgottenSession(t *testing.T) {
	remote := NewRemote(t, RemoteConfig{})
	client := Connect(t, ClientConfig{URL: remote.URL, NoStream: true})
	remote.Restart()
	_, err := client.ListTools(t.Context(), nil)
	if err == nil {
		t.Fatal("a session outlived Restart")
	}
}
