package demo

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/modelcontextprotocol/go-sdk/mcp"
	"go.uber.org/goleak"
	"golang.org/x/oauth2"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fixture is a running demo and a client of it.
type fixture struct {
	*Demo
	t      *testing.T
	http   *http.Client
	log    *strings.Builder
	config *oauth2.Config
	ctx    context.Context
}

// redirect is where the client's answers go; nothing listens there.
const redirect = "http://127.0.0.1:1/callback?of=demo"

func start(t *testing.T) *fixture {
	t.Helper()
	log := new(strings.Builder)
	d, err := Start(t.Context(), Config{Log: slog.New(slog.NewTextHandler(log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Close)
	transport := http.DefaultTransport.(*http.Transport).Clone()
	t.Cleanup(transport.CloseIdleConnections)
	f := &fixture{Demo: d, t: t, log: log, http: &http.Client{
		Transport:     transport,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
	f.ctx = context.WithValue(t.Context(), oauth2.HTTPClient, f.http)
	return f
}

// do sends a request: a form or JSON if there is a body.
func (f *fixture) do(method, link, body string, header ...string) (*http.Response, string) {
	f.t.Helper()
	req, err := http.NewRequestWithContext(f.t.Context(), method, link, strings.NewReader(body))
	if err != nil {
		f.t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	if strings.HasPrefix(body, "{") {
		req.Header.Set("Content-Type", "application/json")
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := f.http.Do(req)
	if err != nil {
		f.t.Fatal(err)
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err != nil {
		f.t.Fatal(err)
	}
	return resp, string(answer)
}

// register registers a client.
func (f *fixture) register(method string) {
	f.t.Helper()
	resp, body := f.do(http.MethodPost, f.Issuer+"/register", fmt.Sprintf(
		`{"client_name":"<b>Test</b>","redirect_uris":[%q],"token_endpoint_auth_method":%q,"grant_types":["authorization_code","refresh_token"]}`, redirect, method))
	var c struct {
		ID     string `json:"client_id"`
		Secret string `json:"client_secret"`
	}
	if err := json.Unmarshal([]byte(body), &c); err != nil || resp.StatusCode != http.StatusCreated || (c.Secret == "") != (method == "none") {
		f.t.Fatalf("registration: %d %s", resp.StatusCode, body)
	}
	style := oauth2.AuthStyleInParams
	if method == "client_secret_basic" {
		style = oauth2.AuthStyleInHeader
	}
	f.config = &oauth2.Config{
		ClientID: c.ID, ClientSecret: c.Secret, RedirectURL: redirect, Scopes: []string{"openid", "profile", "notes", "offline_access"},
		Endpoint: oauth2.Endpoint{AuthURL: f.Issuer + "/authorize", TokenURL: f.Issuer + "/oauth/token", AuthStyle: style},
	}
}

// loginForm goes from a link to the provider's page.
func (f *fixture) loginForm(link string) (id, page string) {
	f.t.Helper()
	resp, _ := f.do(http.MethodGet, link, "")
	to, err := resp.Location()
	if err != nil || to.Path != "/login" {
		f.t.Fatalf("the authorization endpoint: %d %v", resp.StatusCode, resp.Header)
	}
	resp, page = f.do(http.MethodGet, to.String(), "")
	if resp.StatusCode != http.StatusOK {
		f.t.Fatalf("the login page: %d %s", resp.StatusCode, page)
	}
	style := page[strings.Index(page, "<style>")+len("<style>") : strings.Index(page, "</style>")]
	sum := sha256.Sum256([]byte(style))
	policy := resp.Header.Get("Content-Security-Policy")
	if hash := base64.StdEncoding.EncodeToString(sum[:]); !strings.Contains(policy, hash) || !strings.Contains(policy, "form-action 'self' http://127.0.0.1:1") {
		f.t.Errorf("the policy %s does not allow the page its style, %s", policy, hash)
	}
	if strings.Contains(page, "<b>Test") || !strings.Contains(page, "&lt;b&gt;Test") {
		f.t.Error("the client's name is not escaped")
	}
	hidden := regexp.MustCompile(`name="id" value="([^"]+)"`).FindStringSubmatch(page)
	if hidden == nil {
		f.t.Fatalf("no form: %s", page)
	}
	return hidden[1], page
}

// answer posts the form and returns what goes back to the client.
func (f *fixture) answer(id, action, password string) url.Values {
	f.t.Helper()
	resp, body := f.do(http.MethodPost, f.Issuer+"/login",
		url.Values{"id": {id}, "action": {action}, "username": {User}, "password": {password}}.Encode())
	for resp.StatusCode/100 == 3 {
		to, err := resp.Location()
		if err != nil {
			f.t.Fatal(err)
		}
		if strings.HasPrefix(to.String(), "http://127.0.0.1:1/") {
			return to.Query()
		}
		resp, body = f.do(http.MethodGet, to.String(), "")
	}
	f.t.Fatalf("the sign-in ended at %d %s", resp.StatusCode, body)
	return nil
}

// signIn does everything up to the token.
func (f *fixture) signIn(resource string) (*oauth2.Token, url.Values) {
	f.t.Helper()
	verifier := oauth2.GenerateVerifier()
	target := oauth2.SetAuthURLParam("resource", resource)
	id, _ := f.loginForm(f.config.AuthCodeURL("a-state", oauth2.S256ChallengeOption(verifier), target))
	q := f.answer(id, "signin", Password)
	if q.Get("iss") != f.Issuer || q.Get("state") != "a-state" || q.Get("of") != "demo" {
		f.t.Errorf("the answer has %v", q)
	}
	token, err := f.config.Exchange(f.ctx, q.Get("code"), oauth2.VerifierOption(verifier), target)
	if err != nil {
		f.t.Fatal(err)
	}
	return token, q
}

// bearer sends a token.
type bearer struct {
	token string
	next  http.RoundTripper
}

func (b bearer) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set("Authorization", "Bearer "+b.token)
	return b.next.RoundTrip(r)
}

func (f *fixture) connect(token, protocol string) (*mcp.ClientSession, error) {
	return mcp.NewClient(&mcp.Implementation{Name: "test"}, nil).Connect(f.t.Context(), &mcp.StreamableClientTransport{
		Endpoint: f.RemoteURL, HTTPClient: &http.Client{Transport: bearer{token, f.http.Transport}},
	}, &mcp.ClientSessionOptions{ProtocolVersion: protocol})
}

func (f *fixture) call(s *mcp.ClientSession, tool string, arguments map[string]any) string {
	f.t.Helper()
	result, err := s.CallTool(f.t.Context(), &mcp.CallToolParams{Name: tool, Arguments: arguments})
	if err != nil || result.IsError {
		f.t.Fatalf("%s: %v %+v", tool, err, result)
	}
	return result.Content[0].(*mcp.TextContent).Text
}

func TestDemo(t *testing.T) {
	f := start(t)

	// A client that has nothing learns where to go.
	resp, _ := f.do(http.MethodPost, f.RemoteURL, `{"jsonrpc":"2.0","id":1,"method":"initialize","params":{}}`)
	challenge := resp.Header.Get("WWW-Authenticate")
	where := regexp.MustCompile(`resource_metadata="([^"]+)"`).FindStringSubmatch(challenge)
	if resp.StatusCode != http.StatusUnauthorized || where == nil || strings.Contains(challenge, "error=") {
		t.Fatalf("without a token: %d %s", resp.StatusCode, challenge)
	}
	var document struct {
		Resource string   `json:"resource"`
		Servers  []string `json:"authorization_servers"`
	}
	_, body := f.do(http.MethodGet, where[1], "")
	if err := json.Unmarshal([]byte(body), &document); err != nil || document.Resource != f.RemoteURL || !slices.Equal(document.Servers, []string{f.Issuer}) {
		t.Fatalf("the document: %s", body)
	}
	for _, place := range []string{"/.well-known/oauth-authorization-server", "/.well-known/openid-configuration"} {
		var doc struct {
			Issuer, RegistrationEndpoint string
			Methods                      []string `json:"code_challenge_methods_supported"`
			Scopes                       []string `json:"scopes_supported"`
			Iss                          bool     `json:"authorization_response_iss_parameter_supported"`
		}
		_, body := f.do(http.MethodGet, f.Issuer+place, "")
		if err := json.Unmarshal([]byte(body), &doc); err != nil || doc.Issuer != f.Issuer || !doc.Iss ||
			!slices.Equal(doc.Methods, []string{"S256"}) || !slices.Contains(doc.Scopes, "offline_access") || strings.Contains(body, "device") {
			t.Errorf("%s: %s", place, body)
		}
	}

	for _, method := range []string{"none", "client_secret_basic", "client_secret_post"} {
		f.register(method)
		token, q := f.signIn(f.RemoteURL)
		if token.RefreshToken == "" || time.Until(token.Expiry) > 11*time.Minute || token.Extra("id_token") == nil {
			t.Errorf("%s: the token is %+v", method, token)
		}
		for _, protocol := range []string{"2025-11-25", "2026-07-28"} {
			s, err := f.connect(token.AccessToken, protocol)
			if err != nil {
				t.Fatal(err)
			}
			f.call(s, "add_note", map[string]any{"text": "by " + method + " in " + protocol})
			if got := f.call(s, "whoami", nil); !strings.Contains(got, "You are demo") || !strings.Contains(got, "notes") || strings.Contains(got, token.AccessToken) {
				t.Errorf("whoami: %s", got)
			}
			f.call(s, "roll_dice", map[string]any{"count": 3})
			if got := f.call(s, "list_notes", nil); !strings.Contains(got, "by none in 2025-11-25") {
				t.Errorf("the notes: %s", got)
			}
			s.Close()
		}
		// Refreshing rotates, and a token used twice ends them all.
		old := *token
		token.Expiry = time.Now().Add(-time.Minute)
		renewed, err := f.config.TokenSource(f.ctx, token).Token()
		if err != nil || renewed.RefreshToken == old.RefreshToken {
			t.Fatalf("refreshing: %v", err)
		}
		s, err := f.connect(renewed.AccessToken, "2025-11-25")
		if err != nil {
			t.Fatal(err)
		}
		s.Close()
		old.Expiry = token.Expiry
		if _, err := f.config.TokenSource(f.ctx, &old).Token(); err == nil {
			t.Error("a refresh token was good twice")
		}
		renewed.Expiry = token.Expiry
		if _, err := f.config.TokenSource(f.ctx, renewed).Token(); err == nil {
			t.Error("the family outlived the reuse")
		}
		for _, secret := range []string{token.AccessToken, old.RefreshToken, renewed.AccessToken, q.Get("code")} {
			if strings.Contains(f.log.String(), secret) {
				t.Errorf("a secret is in the log: %s", f.log)
			}
		}
	}

	f.Close()
	f.Close()
	if _, err := f.http.Get(f.Issuer + "/keys"); err == nil {
		t.Error("the provider outlived Close")
	}
}

func TestWrongTokens(t *testing.T) {
	f := start(t)
	f.register("none")
	elsewhere, _ := f.signIn("http://127.0.0.1:2/mcp")
	here, _ := f.signIn(f.RemoteURL)
	f.config.Scopes = []string{"openid"}
	narrow, _ := f.signIn(f.RemoteURL)
	parts := strings.Split(here.AccessToken, ".")
	unsigned := base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"none"}`)) + "." + parts[1] + "."
	another := newRemote(strings.TrimSuffix(f.RemoteURL, "/mcp"), f.Issuer+"/")
	defer another.close()
	tests := map[string]struct {
		token string
		want  int
		code  string
	}{
		"right":       {here.AccessToken, http.StatusBadRequest, ""}, // what it sends is no MCP
		"audience":    {elsewhere.AccessToken, http.StatusUnauthorized, "invalid_token"},
		"scope":       {narrow.AccessToken, http.StatusForbidden, "insufficient_scope"},
		"ID token":    {here.Extra("id_token").(string), http.StatusUnauthorized, "invalid_token"},
		"refresh":     {here.RefreshToken, http.StatusUnauthorized, "invalid_token"},
		"unsigned":    {unsigned, http.StatusUnauthorized, "invalid_token"},
		"cut":         {here.AccessToken[:len(here.AccessToken)-8], http.StatusUnauthorized, "invalid_token"},
		"other parts": {parts[0] + "." + strings.Split(elsewhere.AccessToken, ".")[1] + "." + parts[2], http.StatusUnauthorized, "invalid_token"},
		"garbage":     {"garbage", http.StatusUnauthorized, "invalid_token"},
	}
	for name, test := range tests {
		resp, body := f.do(http.MethodPost, f.RemoteURL, "{}", "Authorization", "Bearer "+test.token, "Accept", "application/json, text/event-stream")
		if got := resp.Header.Get("WWW-Authenticate"); resp.StatusCode != test.want || test.code != "" && !strings.Contains(got, `error="`+test.code+`"`) {
			t.Errorf("%s: %d %s %s", name, resp.StatusCode, got, body)
		}
	}
	if _, err := another.verify(t.Context(), here.AccessToken); err == nil {
		t.Error("a token of another issuer was good")
	}
	resp, _ := f.do(http.MethodPost, f.RemoteURL, "{}", "Authorization", "Bearer "+here.AccessToken, "Origin", "https://evil.example")
	if resp.StatusCode != http.StatusForbidden {
		t.Errorf("another site's page: %d", resp.StatusCode)
	}
}

func TestProviderRefuses(t *testing.T) {
	// What op has to say goes to the process's log, and no state with it.
	log := new(strings.Builder)
	before := slog.Default()
	defer slog.SetDefault(before)
	slog.SetDefault(slog.New(slog.NewTextHandler(log, nil)))
	const state = "the-secret-state"
	f := start(t)
	f.register("none")
	challenge := oauth2.S256ChallengeOption(oauth2.GenerateVerifier())
	param := oauth2.SetAuthURLParam
	for name, test := range map[string]struct {
		options []oauth2.AuthCodeOption
		want    string
	}{
		"no PKCE":       {nil, "invalid_request"},
		"plain":         {[]oauth2.AuthCodeOption{param("code_challenge", "x"), param("code_challenge_method", "plain")}, "invalid_request"},
		"resource":      {[]oauth2.AuthCodeOption{challenge, param("resource", "nonsense")}, "invalid_target"},
		"prompt":        {[]oauth2.AuthCodeOption{challenge, param("prompt", "none")}, "login_required"},
		"response mode": {[]oauth2.AuthCodeOption{challenge, param("response_mode", "form_post")}, "invalid_request"},
	} {
		resp, body := f.do(http.MethodGet, f.config.AuthCodeURL(state, test.options...), "")
		to, err := resp.Location()
		if err != nil || !strings.HasPrefix(to.String(), "http://127.0.0.1:1/") || to.Query().Get("error") != test.want || to.Query().Get("state") != state || to.Query().Get("iss") != f.Issuer {
			t.Errorf("%s: %d %v %s", name, resp.StatusCode, to, body)
		}
	}
	other := *f.config
	other.RedirectURL = "https://evil.example/"
	if resp, _ := f.do(http.MethodGet, other.AuthCodeURL(state, challenge), ""); resp.StatusCode != http.StatusBadRequest || resp.Header.Get("Location") != "" {
		t.Errorf("another redirect URI: %d", resp.StatusCode)
	}

	id, page := f.loginForm(f.config.AuthCodeURL(state, challenge))
	if !strings.Contains(page, `value="demo"`) {
		t.Error("the form is not filled in")
	}
	form := url.Values{"id": {id}, "username": {User}, "password": {"wrong"}}.Encode()
	if resp, body := f.do(http.MethodPost, f.Issuer+"/login", form); resp.StatusCode != http.StatusForbidden || !strings.Contains(body, "password is wrong") {
		t.Errorf("a wrong password: %d", resp.StatusCode)
	}
	if resp, _ := f.do(http.MethodPost, f.Issuer+"/login", form, "Origin", "https://evil.example"); resp.StatusCode != http.StatusForbidden {
		t.Errorf("another site's form: %d", resp.StatusCode)
	}
	if q := f.answer(id, "cancel", ""); q.Get("error") != "access_denied" || q.Get("state") != state || q.Get("iss") != f.Issuer {
		t.Errorf("cancelled: %v", q)
	}
	if resp, body := f.do(http.MethodGet, f.Issuer+"/login?id="+id, ""); resp.StatusCode != http.StatusBadRequest || !strings.Contains(body, "is over") {
		t.Errorf("a sign-in that is over: %d", resp.StatusCode)
	}
	if resp, _ := f.do(http.MethodGet, f.Issuer+"/authorize/callback?id="+id, ""); resp.StatusCode != http.StatusBadRequest {
		t.Errorf("a callback that is over: %d", resp.StatusCode)
	}

	for name, body := range map[string]string{
		"no JSON":  "{",
		"none":     `{}`,
		"http":     `{"redirect_uris":["http://example.com/"]}`,
		"fragment": `{"redirect_uris":["https://example.com/#x"]}`,
		"script":   `{"redirect_uris":["javascript:alert(1)"]}`,
		"method":   `{"redirect_uris":["https://example.com/"],"token_endpoint_auth_method":"private_key_jwt"}`,
		"grant":    `{"redirect_uris":["https://example.com/"],"grant_types":["client_credentials"]}`,
		"large":    `{"client_name":"` + strings.Repeat("x", 1<<20) + `"}`,
	} {
		if resp, got := f.do(http.MethodPost, f.Issuer+"/register", body); resp.StatusCode != http.StatusBadRequest || !strings.Contains(got, `"error":"invalid_`) {
			t.Errorf("registration %s: %d %s", name, resp.StatusCode, got)
		}
	}
	if log.Len() == 0 || strings.Contains(log.String(), state) {
		t.Errorf("the log: %s", log)
	}
	for _, grant := range []string{"client_credentials", "urn:ietf:params:oauth:grant-type:device_code", ""} {
		if resp, got := f.do(http.MethodPost, f.Issuer+"/oauth/token", url.Values{"grant_type": {grant}, "client_id": {f.config.ClientID}}.Encode()); resp.StatusCode != http.StatusBadRequest {
			t.Errorf("grant %q: %d %s", grant, resp.StatusCode, got)
		}
	}
}

func TestRevocation(t *testing.T) {
	f := start(t)
	f.register("none")
	token, _ := f.signIn(f.RemoteURL)
	revoke := url.Values{"token": {token.RefreshToken}, "client_id": {f.config.ClientID}}.Encode()
	if resp, body := f.do(http.MethodPost, f.Issuer+"/revoke", revoke); resp.StatusCode != http.StatusOK {
		t.Fatalf("revoking: %d %s", resp.StatusCode, body)
	}
	token.Expiry = time.Now().Add(-time.Minute)
	if _, err := f.config.TokenSource(f.ctx, token).Token(); err == nil {
		t.Error("a revoked token was refreshed")
	}
	if resp, _ := f.do(http.MethodGet, f.Issuer+"/userinfo", "", "Authorization", "Bearer "+token.AccessToken); resp.StatusCode == http.StatusOK {
		t.Error("the access token outlived its grant")
	}
}

func TestStart(t *testing.T) {
	for _, addr := range []string{"0.0.0.0:0", "192.0.2.1:80", "nonsense"} {
		if d, err := Start(t.Context(), Config{RemoteAddr: addr}); err == nil {
			d.Close()
			t.Errorf("it listens on %s", addr)
		}
	}
	for _, issuer := range []string{"", "ftp://x", "https://idp.example.com/path"} {
		if _, err := NewProvider(ProviderConfig{Issuer: issuer, Users: []Account{{Name: "x"}}}); err == nil {
			t.Errorf("%q became an issuer", issuer)
		}
	}
	if _, err := NewProvider(ProviderConfig{Issuer: "https://idp.example.com"}); err == nil {
		t.Error("a provider has no users")
	}
}

// A page that was asked for and never read, and streams, do not hold Close up.
func TestCloseInFlight(t *testing.T) {
	f := start(t)
	f.register("none")
	token, _ := f.signIn(f.RemoteURL)
	s, err := f.connect(token.AccessToken, "2026-07-28")
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	f.Close()
	if took := time.Since(began); took > closeTime+time.Second {
		t.Errorf("Close took %v", took)
	}
	s.Close()
}

func TestPage(t *testing.T) {
	p, err := NewProvider(ProviderConfig{Issuer: "http://127.0.0.1:1", Users: []Account{{Name: "x", Password: "y"}}})
	if err != nil {
		t.Fatal(err)
	}
	for _, redirect := range []string{"http://[::1]:8080/cb", "http://127.0.0.1:8080/cb"} {
		v := p.view(authRequest{id: "id", redirect: redirect}, &client{})
		want := map[bool]string{true: "form-action 'self' http:", false: "form-action 'self' http://127.0.0.1:8080"}[strings.Contains(redirect, "[")]
		w := httptest.NewRecorder()
		p.page(w, http.StatusOK, v)
		if got := w.Header().Get("Content-Security-Policy"); !strings.HasSuffix(got, want) {
			t.Errorf("%s: %s", redirect, got)
		}
		if strings.Contains(w.Body.String(), `value="y"`) {
			t.Error("the page says a password that is nobody's business")
		}
	}
}
