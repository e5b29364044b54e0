package gateway

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"

	"gatehouse/auth"
	"gatehouse/auth/authtest"
	"gatehouse/auth/guard"
	"gatehouse/session"
)

// This file runs random operations of many users on many remotes against a model
// of who holds what: nobody ever sees, uses or finishes what is another's.

const (
	modelUsers   = 50
	modelRemotes = 20
)

// farm is many remotes, and the authorization server of them all. An account is
// named after its user and its remote.
type farm struct {
	*httptest.Server
	mu                sync.Mutex
	codes             map[string]farmToken
	tokens            map[string]farmToken
	codesMade, minted int
	crossed           []string // tokens that came where they were not for
}

type farmToken struct{ remote, account string }

func newFarm(t *testing.T) *farm {
	f := &farm{codes: map[string]farmToken{}, tokens: map[string]farmToken{}}
	f.Server = httptest.NewServer(http.HandlerFunc(f.serve))
	t.Cleanup(f.Close)
	return f
}

func (f *farm) remote(i int) string { return fmt.Sprintf("%s/r%02d/mcp", f.URL, i) }

func (f *farm) serve(w http.ResponseWriter, r *http.Request) {
	answer := func(status int, v any) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(status)
		_ = json.NewEncoder(w).Encode(v) // the gateway notices
	}
	name, isMCP := strings.CutSuffix(strings.TrimPrefix(r.URL.Path, "/"), "/mcp")
	switch {
	case strings.HasPrefix(r.URL.Path, "/.well-known/oauth-protected-resource/"):
		answer(200, map[string]any{"resource": f.URL + strings.TrimPrefix(r.URL.Path, "/.well-known/oauth-protected-resource"), "authorization_servers": []string{f.URL}})
	case r.URL.Path == "/.well-known/oauth-authorization-server":
		answer(200, map[string]any{"issuer": f.URL, "authorization_endpoint": f.URL + "/authorize", "token_endpoint": f.URL + "/token",
			"registration_endpoint": f.URL + "/register", "revocation_endpoint": f.URL + "/revoke", "code_challenge_methods_supported": []string{"S256"}})
	case r.URL.Path == "/register":
		var asked map[string]any
		if err := json.NewDecoder(r.Body).Decode(&asked); err != nil {
			answer(400, nil)
			return
		}
		asked["client_id"], asked["token_endpoint_auth_method"] = "farmer", "none"
		answer(201, asked)
	case r.URL.Path == "/token":
		f.mu.Lock()
		defer f.mu.Unlock()
		code := r.PostFormValue("code")
		what, ok := f.codes[code]
		delete(f.codes, code)
		if !ok {
			answer(400, map[string]any{"error": "invalid_grant"})
			return
		}
		f.minted++
		token := fmt.Sprintf("token-%d", f.minted)
		f.tokens[token] = what
		answer(200, map[string]any{"access_token": token, "token_type": "Bearer", "expires_in": 36000})
	case r.URL.Path == "/revoke":
		f.mu.Lock()
		defer f.mu.Unlock()
		delete(f.tokens, r.PostFormValue("token"))
	case isMCP && r.Method == http.MethodPost:
		f.serveMCP(w, r, name, answer)
	default:
		http.NotFound(w, r)
	}
}

func (f *farm) serveMCP(w http.ResponseWriter, r *http.Request, name string, answer func(int, any)) {
	token := strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")
	f.mu.Lock()
	what, ok := f.tokens[token]
	if token != "" && what.remote != name && ok || strings.Count(token, ".") > 1 {
		f.crossed = append(f.crossed, name)
	}
	f.mu.Unlock()
	if !ok {
		w.Header().Set("WWW-Authenticate", fmt.Sprintf("Bearer resource_metadata=%q", f.URL+"/.well-known/oauth-protected-resource/"+name+"/mcp"))
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	var call struct {
		ID     json.RawMessage `json:"id"`
		Method string          `json:"method"`
		Params struct {
			Meta struct {
				ProgressToken json.RawMessage `json:"progressToken"`
			} `json:"_meta"`
		} `json:"params"`
	}
	if err := json.NewDecoder(r.Body).Decode(&call); err != nil {
		answer(400, nil)
		return
	}
	result := func(v any) { answer(200, map[string]any{"jsonrpc": "2.0", "id": call.ID, "result": v}) }
	switch call.Method {
	case "initialize":
		result(map[string]any{"protocolVersion": "2025-11-25", "capabilities": map[string]any{"tools": map[string]any{}}, "serverInfo": map[string]any{"name": name, "version": "1"}})
	case "tools/list":
		result(map[string]any{"tools": []any{map[string]any{"name": "whoami", "description": what.account, "inputSchema": map[string]any{"type": "object"}}}})
	case "tools/call":
		if token := call.Params.Meta.ProgressToken; token != nil {
			w.Header().Set("Content-Type", "text/event-stream")
			for i := range 3 {
				fmt.Fprintf(w, "data: {\"jsonrpc\":\"2.0\",\"method\":\"notifications/progress\",\"params\":{\"progressToken\":%s,\"progress\":%d,\"message\":%q}}\n\n", token, i, what.account)
				w.(http.Flusher).Flush()
			}
			fmt.Fprintf(w, "data: {\"jsonrpc\":\"2.0\",\"id\":%s,\"result\":{\"content\":[{\"type\":\"text\",\"text\":%q}]}}\n\n", call.ID, what.account)
			return
		}
		result(map[string]any{"content": []any{map[string]any{"type": "text", "text": what.account}}})
	case "notifications/initialized":
		w.WriteHeader(http.StatusAccepted)
	default:
		answer(400, map[string]any{"jsonrpc": "2.0", "id": call.ID, "error": map[string]any{"code": -32601, "message": "method not found"}})
	}
}

// modelUser is what the model knows of a user.
type modelUser struct {
	name    string
	token   string
	cookies map[string]string
	session string          // of protocol 2025-11-25; empty: none
	granted map[string]bool // remotes
	links   map[string]string
	begun   []modelCallback
	flows   map[string]string // cookies of flows
}

type modelCallback struct{ remote, url string }

// model is the gateway and what is known of it.
type model struct {
	t     *testing.T
	farm  *farm
	idp   *authtest.AS
	g     http.Handler
	base  string
	users []*modelUser
	owner map[string]string // of links, by flow
	used  []modelCallback   // callbacks that have been brought back
	steps int
}

func newModel(t *testing.T) *model {
	m := &model{t: t, farm: newFarm(t), idp: authtest.NewAS(t), base: "http://127.0.0.1:18080", owner: map[string]string{}}
	m.idp.Set(func(k *authtest.ASKnobs) { k.IDToken = map[string]any{} })
	m.idp.AddClient(authtest.OAuthClient{ID: "gatehouse", Method: "none", RedirectURIs: []string{m.base + "/login/callback"}})
	cfg, _, err := ParseConfig("test", []byte(`{"mcpServers": {`+func() string {
		var all []string
		for i := range modelRemotes {
			all = append(all, fmt.Sprintf(`"r%02d": {"url": %q}`, i, m.farm.remote(i)))
		}
		return strings.Join(all, ", ")
	}()+`}, "gateway": {"limits": {"callbackPerMinute": 1000000, "callbackPerMinuteTotal": 1000000, "flowsPerPrincipal": 20}}}`), nil)
	if err != nil {
		t.Fatal(err)
	}
	clients, err := guard.New(guard.Config{})
	if err != nil {
		t.Fatal(err)
	}
	client := clients.Client(guard.Policy{Loopback: true})
	quiet := slog.New(slog.DiscardHandler)
	cfg.Gateway.Login = &Login{Issuer: m.idp.Issuer(), ClientID: "gatehouse"}
	conf := auth.Config{
		Login:     &auth.Login{Issuer: m.idp.Issuer(), ClientID: "gatehouse", Audience: m.base + "/mcp", HTTP: client},
		PublicURL: m.base, CallbackPath: "/oauth/callback", Store: auth.NewMemory(auth.MemoryConfig{}), Log: quiet, MaxFlows: 20,
	}
	var remotes []session.Remote
	var broker *auth.Broker
	for i := range modelRemotes {
		name := fmt.Sprintf("r%02d", i)
		conf.Remotes = append(conf.Remotes, auth.Remote{Name: name, URL: m.farm.remote(i), HTTP: client})
		remotes = append(remotes, session.Remote{Name: name, URL: m.farm.remote(i), HTTP: client,
			Authorizer: func(p auth.Principal) session.Authorizer { return broker.Authorizer(p, name) }})
	}
	if broker, err = auth.New(conf); err != nil {
		t.Fatal(err)
	}
	pool := session.New(session.Config{Remotes: remotes, Name: "gatehouse", Version: "test", Log: quiet})
	g := New(Setup{Config: cfg, Users: true, Auth: broker, Sessions: pool, PublicURL: m.base, Version: "test", Log: quiet})
	m.g = g.Handler()
	t.Cleanup(func() {
		g.Close()
		pool.Close()
		broker.Close()
		clients.Close()
	})
	for i := range modelUsers {
		name := fmt.Sprintf("u%02d", i)
		u := &modelUser{name: name, token: m.idp.JWTFor(name, m.base+"/mcp", map[string]any{"exp": 9e9}), cookies: map[string]string{},
			granted: map[string]bool{}, links: map[string]string{}, flows: map[string]string{}}
		m.users = append(m.users, u)
		m.logIn(u)
	}
	return m
}

func (m *model) do(method, address string, body string, header http.Header, cookies ...map[string]string) *httptest.ResponseRecorder {
	req := httptest.NewRequestWithContext(context.Background(), method, address, strings.NewReader(body))
	req.Header = header
	for _, jar := range cookies {
		for name, value := range jar {
			req.AddCookie(&http.Cookie{Name: name, Value: value})
		}
	}
	w := httptest.NewRecorder()
	m.g.ServeHTTP(w, req)
	return w
}

// logIn is a browser's login.
func (m *model) logIn(u *modelUser) {
	m.idp.Set(func(k *authtest.ASKnobs) { k.User = u.name })
	start := m.do("GET", m.base+"/login", "", http.Header{})
	client := &http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	resp, err := client.Get(start.Header().Get("Location"))
	if err != nil {
		m.t.Fatal(err)
	}
	resp.Body.Close()
	trip := map[string]string{}
	for _, c := range start.Result().Cookies() {
		trip[c.Name] = c.Value
	}
	back := m.do("GET", resp.Header.Get("Location"), "", http.Header{}, trip)
	for _, c := range back.Result().Cookies() {
		if c.MaxAge > 0 {
			u.cookies[c.Name] = c.Value
		}
	}
	if back.Code != http.StatusSeeOther || len(u.cookies) != 1 {
		m.t.Fatalf("logging in: %d %s", back.Code, back.Body)
	}
}

func (m *model) rpc(u *modelUser, modern bool, session, method, name, params string) *httptest.ResponseRecorder {
	header := http.Header{"Content-Type": {"application/json"}, "Accept": {"application/json, text/event-stream"}, "Authorization": {"Bearer " + u.token}}
	body := fmt.Sprintf(`{"jsonrpc":"2.0","id":7,"method":%q,"params":%s}`, method, params)
	if modern {
		body, header = m.modern(u, method, name, params, shortEnvelope)
	} else if session != "" {
		header["Mcp-Session-Id"], header["Mcp-Protocol-Version"] = []string{session}, []string{"2025-11-25"}
	}
	return m.do("POST", m.base+"/mcp", body, header)
}

// modern is a request of protocol 2026-07-28, with these members of _meta.
func (m *model) modern(u *modelUser, method, name, params, meta string) (body string, header http.Header) {
	header = http.Header{"Content-Type": {"application/json"}, "Accept": {"application/json, text/event-stream"}, "Authorization": {"Bearer " + u.token},
		"Mcp-Protocol-Version": {"2026-07-28"}, "Mcp-Method": {method}}
	if name != "" {
		header["Mcp-Name"] = []string{name}
	}
	params = strings.TrimSuffix(params, "}")
	if params != "{" {
		params += ","
	}
	return fmt.Sprintf(`{"jsonrpc":"2.0","id":7,"method":%q,"params":%s"_meta":{%s}}}`, method, params, meta), header
}

// modelStream is what an event stream says while it is open.
type modelStream struct {
	header http.Header
	stop   func()

	mu   sync.Mutex // guards said and news
	said strings.Builder
	news chan struct{} // closed, and replaced, when there is more
}

func (s *modelStream) Header() http.Header { return s.header }
func (s *modelStream) WriteHeader(int)     {}
func (s *modelStream) Flush()              {}

func (s *modelStream) Write(data []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.news)
	s.news = make(chan struct{})
	return s.said.Write(data)
}

// await returns what was said once that holds want, or after a while.
func (s *modelStream) await(want string) (said string, ok bool) {
	late := time.NewTimer(10 * time.Second)
	defer late.Stop()
	for {
		s.mu.Lock()
		said, news := s.said.String(), s.news
		s.mu.Unlock()
		if strings.Contains(said, want) {
			return said, true
		}
		select {
		case <-news:
		case <-late.C:
			return said, false
		}
	}
}

// listen opens an event stream of a user's, until stop.
func (m *model) listen(t *rapid.T, u *modelUser) *modelStream {
	body, header := m.modern(u, "subscriptions/listen", "", `{"notifications":{"toolsListChanged":true}}`, shortEnvelope)
	ctx, cancel := context.WithCancel(context.Background())
	req := httptest.NewRequestWithContext(ctx, "POST", m.base+"/mcp", strings.NewReader(body))
	req.Header = header
	s := &modelStream{header: http.Header{}, news: make(chan struct{})}
	over := make(chan struct{})
	go func() {
		defer close(over)
		m.g.ServeHTTP(s, req)
	}()
	s.stop = func() {
		cancel()
		<-over
	}
	if said, ok := s.await("acknowledged"); !ok {
		s.stop()
		t.Fatalf("%s listens: %s", u.name, said)
	}
	return s
}

func (m *model) begin(t *rapid.T, u *modelUser) {
	w := m.rpc(u, false, "", "initialize", "", `{"protocolVersion":"2025-11-25","capabilities":{},"clientInfo":{"name":"model","version":"1"}}`)
	if u.session = w.Header().Get("Mcp-Session-Id"); w.Code != http.StatusOK || u.session == "" {
		t.Fatalf("initialize: %d %s", w.Code, w.Body)
	}
	m.rpc(u, false, u.session, "notifications/initialized", "", "{}")
}

var (
	accounts       = regexp.MustCompile(`u\d\d at r\d\d`)
	progressTokens = regexp.MustCompile(`"progressToken":"of (u\d\d)"`)
	requestStates  = regexp.MustCompile(`"requestState":("[^"]+")`)

	flowLinks = regexp.MustCompile(`/connect/([A-Z2-7]{20,})`)
)

// own checks that all that a user sees is theirs.
func (m *model) own(t *rapid.T, u *modelUser, said string) {
	for _, account := range accounts.FindAllString(said, -1) {
		if !strings.HasPrefix(account, u.name+" ") {
			t.Fatalf("%s sees %q in %s", u.name, account, said)
		}
	}
	for _, match := range flowLinks.FindAllStringSubmatch(said, -1) {
		if owner := m.owner[match[1]]; owner != "" && owner != u.name {
			t.Fatalf("%s gets a link of %s", u.name, owner)
		}
		m.owner[match[1]] = u.name
	}
}

// called checks a call's answer against the model.
func (m *model) called(t *rapid.T, u *modelUser, remote string, w *httptest.ResponseRecorder) {
	said := w.Body.String()
	m.own(t, u, said)
	link := flowLinks.FindStringSubmatch(said)
	switch {
	case w.Code != http.StatusOK:
		t.Fatalf("%s at %s: %d %s", u.name, remote, w.Code, said)
	case u.granted[remote] && !strings.Contains(said, u.name+" at "+remote):
		t.Fatalf("%s is signed in at %s and gets %s", u.name, remote, said)
	case !u.granted[remote] && (link == nil || strings.Contains(said, u.name+" at ")):
		t.Fatalf("%s is not signed in at %s and gets %s", u.name, remote, said)
	case !u.granted[remote]:
		u.links[remote] = m.base + "/connect/" + link[1]
	}
}

// linked is a user who has a link, and the remote that it is for; nil: nobody has.
func (m *model) linked(t *rapid.T) (*modelUser, string) {
	type linked struct {
		u      *modelUser
		remote string
	}
	var all []linked
	for _, u := range m.users {
		for _, remote := range slices.Sorted(maps.Keys(u.links)) {
			if !u.granted[remote] {
				all = append(all, linked{u, remote})
			}
		}
	}
	if len(all) == 0 {
		return nil, ""
	}
	one := anyOf(t, all, "linked")
	return one.u, one.remote
}

// away is a user whose browser is at the authorization server; nil: nobody's is.
func (m *model) away(t *rapid.T) *modelUser {
	var all []*modelUser
	for _, u := range m.users {
		if len(u.begun) > 0 {
			all = append(all, u)
		}
	}
	if len(all) == 0 {
		return nil
	}
	return anyOf(t, all, "away")
}

func anyOf[T any](t *rapid.T, from []T, label string) T {
	return from[rapid.IntRange(0, len(from)-1).Draw(t, label)]
}

// TestIsolation: fifty users, twenty remotes, whatever they do.
// GATEHOUSE_MODEL_STEPS says how many operations there are.
func TestIsolation(t *testing.T) {
	steps := 3000
	if given, err := strconv.Atoi(os.Getenv("GATEHOUSE_MODEL_STEPS")); err == nil {
		steps = given
	}
	const perCheck = 500
	for name, value := range map[string]string{
		"rapid.checks": strconv.Itoa(max(1, steps/perCheck)), "rapid.steps": strconv.Itoa(perCheck),
		"rapid.nofailfile": "true", "rapid.shrinktime": "0s", // a world that goes on cannot be repeated
	} {
		before := flag.Lookup(name).Value.String()
		if err := flag.Set(name, value); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { flag.Set(name, before) })
	}
	m := newModel(t)
	// One world for all checks: what earlier ones have left is what later ones meet.
	rapid.Check(t, func(t *rapid.T) { t.Repeat(m.operations()) })
	t.Logf("%d operations, %d sign-ins finished, %d links", m.steps, m.farm.minted, len(m.owner))
	if m.farm.minted < m.steps/200 { // rapid draws how many operations there are
		t.Error("hardly anybody has signed in: this proves little")
	}
}

func (m *model) operations() map[string]func(*rapid.T) {
	some := func(t *rapid.T) (u, other *modelUser, remote string) {
		m.steps++
		u, other = anyOf(t, m.users, "user"), anyOf(t, m.users, "other")
		return u, other, fmt.Sprintf("r%02d", rapid.IntRange(0, modelRemotes-1).Draw(t, "remote"))
	}
	call := func(u *modelUser, modern bool, remote string) *httptest.ResponseRecorder {
		return m.rpc(u, modern, u.session, "tools/call", remote+"_whoami", fmt.Sprintf(`{"name":"%s_whoami","arguments":{}}`, remote))
	}
	browser := func(u *modelUser) []map[string]string { return []map[string]string{u.cookies, u.flows} }
	return map[string]func(*rapid.T){
		"": func(t *rapid.T) {
			m.farm.mu.Lock()
			defer m.farm.mu.Unlock()
			if len(m.farm.crossed) > 0 {
				t.Fatalf("a token came to %s that was not for it", m.farm.crossed[0])
			}
		},
		"call": func(t *rapid.T) {
			u, _, remote := some(t)
			m.called(t, u, remote, call(u, true, remote))
		},
		"call in a session": func(t *rapid.T) {
			u, _, remote := some(t)
			if u.session == "" {
				m.begin(t, u)
			}
			m.called(t, u, remote, call(u, false, remote))
		},
		"many at once": func(t *rapid.T) {
			type one struct {
				u      *modelUser
				remote string
				w      *httptest.ResponseRecorder
			}
			var all []*one
			for range 8 {
				u, _, remote := some(t)
				all = append(all, &one{u: u, remote: remote})
			}
			var wg sync.WaitGroup
			for _, o := range all {
				wg.Go(func() { o.w = call(o.u, true, o.remote) })
			}
			wg.Wait()
			for _, o := range all {
				m.called(t, o.u, o.remote, o.w)
			}
		},
		"progress while others call": func(t *rapid.T) {
			type one struct {
				u      *modelUser
				remote string
				w      *httptest.ResponseRecorder
			}
			var all []*one
			for range 8 {
				u, _, remote := some(t)
				if granted := slices.Sorted(maps.Keys(u.granted)); len(granted) > 0 {
					remote = anyOf(t, granted, "granted")
				}
				all = append(all, &one{u: u, remote: remote})
			}
			var wg sync.WaitGroup
			for _, o := range all {
				wg.Go(func() {
					body, header := m.modern(o.u, "tools/call", o.remote+"_whoami", fmt.Sprintf(`{"name":"%s_whoami","arguments":{}}`, o.remote), shortEnvelope+`,"progressToken":"of `+o.u.name+`"`)
					o.w = m.do("POST", m.base+"/mcp", body, header)
				})
			}
			wg.Wait()
			for _, o := range all {
				m.called(t, o.u, o.remote, o.w)
				tokens := progressTokens.FindAllStringSubmatch(o.w.Body.String(), -1)
				if o.u.granted[o.remote] && len(tokens) != 3 {
					t.Fatalf("%s hears of progress %d times: %s", o.u.name, len(tokens), o.w.Body)
				}
				for _, token := range tokens {
					if token[1] != o.u.name {
						t.Fatalf("%s hears of the progress of %s: %s", o.u.name, token[1], o.w.Body)
					}
				}
			}
		},
		"listen while another's tools change": func(t *rapid.T) {
			u, other, _ := some(t)
			granted := slices.Sorted(maps.Keys(other.granted))
			if u == other || len(granted) == 0 {
				return
			}
			remote := anyOf(t, granted, "granted")
			if !strings.Contains(m.rpc(other, true, "", "tools/list", "", "{}").Body.String(), other.name+" at "+remote) {
				return // it has not been listed yet
			}
			hers, theirs := m.listen(t, u), m.listen(t, other)
			defer hers.stop()
			defer theirs.stop()
			m.rpc(other, true, "", "tools/call", "gateway_logout", fmt.Sprintf(`{"name":"gateway_logout","arguments":{"remote":%q}}`, remote))
			delete(other.granted, remote)
			delete(other.links, remote)
			said, ok := theirs.await("notifications/tools/list_changed")
			if m.own(t, other, said); !ok {
				t.Fatalf("%s signs out of %s, and the stream says %s", other.name, remote, said)
			}
			// Her own list may have changed as well, and nothing is said of another's.
			said, _ = hers.await("acknowledged")
			m.own(t, u, said)
		},
		"another's requestState": func(t *rapid.T) {
			u, other, remote := some(t)
			if u == other || u.granted[remote] {
				return
			}
			const asks = `"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientCapabilities":{"elicitation":{"url":{}}}`
			ask := func(by *modelUser, members string) *httptest.ResponseRecorder {
				body, header := m.modern(by, "tools/call", remote+"_whoami", fmt.Sprintf(`{"name":"%s_whoami","arguments":{}%s}`, remote, members), asks)
				return m.do("POST", m.base+"/mcp", body, header)
			}
			w := ask(u, "")
			m.own(t, u, w.Body.String())
			state := requestStates.FindStringSubmatch(w.Body.String())
			if state == nil {
				t.Fatalf("%s is not asked to sign in: %s", u.name, w.Body)
			}
			// What comes is the other's own, if anything.
			w = ask(other, `,"requestState":`+state[1]+`,"inputResponses":{}`)
			m.own(t, other, w.Body.String())
			if said := w.Body.String(); w.Code >= http.StatusInternalServerError || strings.Contains(said, other.name+" at ") && !other.granted[remote] {
				t.Fatalf("%s goes on where %s was asked to sign in: %d %s", other.name, u.name, w.Code, said)
			}
		},
		"another's session": func(t *rapid.T) {
			u, other, remote := some(t)
			if other.session == "" || u == other {
				return
			}
			method := anyOf(t, []string{"tools/call", "tools/list", "ping"}, "method")
			params := "{}"
			if method == "tools/call" {
				params = fmt.Sprintf(`{"name":"%s_whoami","arguments":{}}`, remote)
			}
			if w := m.rpc(u, false, other.session, method, "", params); w.Code != http.StatusNotFound {
				t.Fatalf("%s in the session of %s: %d %s", u.name, other.name, w.Code, w.Body)
			}
		},
		"list": func(t *rapid.T) {
			u, _, _ := some(t)
			m.own(t, u, m.rpc(u, true, "", "tools/list", "", "{}").Body.String())
		},
		"status": func(t *rapid.T) {
			u, _, _ := some(t)
			w := m.rpc(u, true, "", "tools/call", "gateway_status", `{"name":"gateway_status","arguments":{}}`)
			m.own(t, u, w.Body.String())
			if !strings.Contains(w.Body.String(), u.name) {
				t.Fatalf("the status of %s: %s", u.name, w.Body)
			}
		},
		"status page": func(t *rapid.T) {
			u, _, _ := some(t)
			w := m.do("GET", m.base+"/", "", http.Header{}, browser(u)...)
			m.own(t, u, w.Body.String())
			if w.Code != http.StatusOK || !strings.Contains(w.Body.String(), u.name) {
				t.Fatalf("the page of %s: %d %s", u.name, w.Code, w.Body)
			}
		},
		"open a link and go on": func(t *rapid.T) {
			_, other, _ := some(t)
			u, remote := m.linked(t)
			if u == nil {
				return
			}
			link := u.links[remote]
			if rapid.IntRange(0, 2).Draw(t, "whose") > 0 {
				other = u
			}
			page := m.do("GET", link, "", http.Header{}, browser(other)...)
			if other != u {
				if page.Code != http.StatusForbidden && page.Code != http.StatusNotFound || strings.Contains(page.Body.String(), u.name) {
					t.Fatalf("%s opens the link of %s: %d %s", other.name, u.name, page.Code, page.Body)
				}
				proof := regexp.MustCompile(`name="token" value="([^"]+)"`).FindStringSubmatch(m.do("GET", m.base+"/", "", http.Header{}, browser(other)...).Body.String())
				form := url.Values{"token": {proof[1]}}
				w := m.do("POST", link, form.Encode(), http.Header{"Content-Type": {"application/x-www-form-urlencoded"}}, browser(other)...)
				if w.Code != http.StatusForbidden && w.Code != http.StatusNotFound {
					t.Fatalf("%s goes on with the link of %s: %d %s", other.name, u.name, w.Code, w.Body)
				}
				return
			}
			m.own(t, u, page.Body.String())
			proof := regexp.MustCompile(`name="token" value="([^"]+)"`).FindStringSubmatch(page.Body.String())
			if page.Code != http.StatusOK || proof == nil {
				return // it has ended, or has made room for newer ones
			}
			w := m.do("POST", link, url.Values{"token": {proof[1]}}.Encode(), http.Header{"Content-Type": {"application/x-www-form-urlencoded"}}, browser(u)...)
			to, err := url.Parse(w.Header().Get("Location"))
			if err != nil || w.Code != http.StatusSeeOther || to.Path != "/authorize" {
				t.Fatalf("%s goes on: %d %s", u.name, w.Code, w.Body)
			}
			for _, c := range w.Result().Cookies() {
				u.flows[c.Name] = c.Value
			}
			query := to.Query()
			m.farm.mu.Lock()
			m.farm.codesMade++
			code := fmt.Sprintf("code-%d", m.farm.codesMade)
			resource := strings.Split(strings.TrimPrefix(query.Get("resource"), m.farm.URL+"/"), "/")[0]
			m.farm.codes[code] = farmToken{resource, u.name + " at " + resource}
			m.farm.mu.Unlock()
			if resource != remote {
				t.Fatalf("the link of %s leads to %s", remote, resource)
			}
			u.begun = append(u.begun, modelCallback{remote, query.Get("redirect_uri") + "?" + url.Values{"code": {code}, "state": {query.Get("state")}}.Encode()})
		},
		"come back": func(t *rapid.T) {
			_, other, _ := some(t)
			u := m.away(t)
			if u == nil {
				return
			}
			back := u.begun[0]
			u.begun = u.begun[1:]
			if rapid.IntRange(0, 2).Draw(t, "whose") > 0 {
				other = u
			}
			// A thief has her flow's cookie, and a login of their own.
			w := m.do("GET", back.url, "", http.Header{}, other.cookies, u.flows)
			m.used = append(m.used, back)
			switch {
			case other != u && w.Code != http.StatusForbidden && w.Code != http.StatusBadRequest:
				t.Fatalf("%s finishes for %s: %d %s", other.name, u.name, w.Code, w.Body)
			case other == u && w.Code == http.StatusSeeOther:
				u.granted[back.remote] = true
			}
			if len(u.begun) == 0 {
				clear(u.flows)
			}
		},
		"come back again": func(t *rapid.T) {
			u, _, _ := some(t)
			if len(m.used) == 0 {
				return
			}
			if w := m.do("GET", anyOf(t, m.used, "used").url, "", http.Header{}, browser(u)...); w.Code != http.StatusBadRequest {
				t.Fatalf("a callback that was used: %d %s", w.Code, w.Body)
			}
			m.used = m.used[max(0, len(m.used)-50):]
		},
		"sign out": func(t *rapid.T) {
			u, _, remote := some(t)
			w := m.rpc(u, true, "", "tools/call", "gateway_logout", fmt.Sprintf(`{"name":"gateway_logout","arguments":{"remote":%q}}`, remote))
			m.own(t, u, w.Body.String())
			delete(u.granted, remote)
			delete(u.links, remote)
		},
		"sign out of everything": func(t *rapid.T) {
			u, _, _ := some(t)
			if rapid.IntRange(0, 9).Draw(t, "really") > 0 {
				return
			}
			w := m.rpc(u, true, "", "tools/call", "gateway_logout", `{"name":"gateway_logout","arguments":{"all":true}}`)
			m.own(t, u, w.Body.String())
			clear(u.granted)
			clear(u.links)
		},
		"end the session": func(t *rapid.T) {
			u, other, _ := some(t)
			if u.session == "" {
				return
			}
			end := func(by *modelUser) int {
				return m.do("DELETE", m.base+"/mcp", "", http.Header{"Authorization": {"Bearer " + by.token}, "Mcp-Session-Id": {u.session}, "Mcp-Protocol-Version": {"2025-11-25"}}).Code
			}
			if code := end(other); other != u && code != http.StatusNotFound {
				t.Fatalf("%s ends the session of %s: %d", other.name, u.name, code)
			} else if other == u {
				u.session = ""
			} else if end(u) == http.StatusNotFound {
				t.Fatalf("the session of %s was ended by %s", u.name, other.name)
			} else {
				u.session = ""
			}
		},
	}
}
