package gateway

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/modelcontextprotocol/go-sdk/jsonrpc"
	"github.com/modelcontextprotocol/go-sdk/mcp"

	"gatehouse/auth"
	"gatehouse/auth/authtest"
	"gatehouse/auth/guard"
	"gatehouse/session"
)

// plainRemote is a legacy remote by hand: it answers with the bytes that a test
// gives it and remembers the params it got.
type plainRemote struct {
	URL string

	mu      sync.Mutex
	results map[string]string   // by method: the whole result, or an error object after "!"
	params  map[string]string   // by method: as last received
	say     chan string         // nil: no event stream
	opened  chan struct{}       // gets something when it is opened
	events  map[string][]string // by method: sent before the result; $TOKEN is the request's progress token
}

func newPlainRemote(t *testing.T, capabilities string, results map[string]string) *plainRemote {
	t.Helper()
	r := &plainRemote{results: results, params: map[string]string{}}
	if r.results == nil {
		r.results = map[string]string{}
	}
	r.results["initialize"] = `{"protocolVersion":"2025-11-25","capabilities":` + capabilities + `,"serverInfo":{"name":"plain","version":"1"}}`
	srv := httptest.NewServer(r)
	t.Cleanup(srv.Close)
	r.URL = srv.URL
	return r
}

func (r *plainRemote) got(method string) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.params[method]
}

func (r *plainRemote) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	if req.Method == http.MethodGet {
		r.stream(w, req)
		return
	}
	var m struct {
		ID     json.RawMessage `json:"id"`
		Method string          `json:"method"`
		Params json.RawMessage `json:"params"`
	}
	if json.NewDecoder(req.Body).Decode(&m) != nil || m.ID == nil {
		w.WriteHeader(http.StatusAccepted)
		return
	}
	r.mu.Lock()
	r.params[m.Method] = string(m.Params)
	result, ok := r.results[m.Method]
	events := r.events[m.Method]
	r.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	if events != nil {
		var params struct {
			Meta struct{ ProgressToken json.RawMessage } `json:"_meta"`
		}
		if json.Unmarshal(m.Params, &params) != nil || params.Meta.ProgressToken == nil {
			params.Meta.ProgressToken = json.RawMessage(`"none"`)
		}
		w.Header().Set("Content-Type", "text/event-stream")
		for _, event := range events {
			fmt.Fprintf(w, "data: {\"jsonrpc\":\"2.0\",%s}\n\n", strings.ReplaceAll(event, "$TOKEN", string(params.Meta.ProgressToken)))
		}
		fmt.Fprintf(w, "data: {\"jsonrpc\":\"2.0\",\"id\":%s,\"result\":%s}\n\n", m.ID, result)
		return
	}
	failure, failed := strings.CutPrefix(result, "!")
	switch {
	case !ok:
		fmt.Fprintf(w, `{"jsonrpc":"2.0","id":%s,"error":{"code":-32601,"message":"no %s"}}`, m.ID, m.Method)
	case failed:
		fmt.Fprintf(w, `{"jsonrpc":"2.0","id":%s,"error":%s}`, m.ID, failure)
	default:
		fmt.Fprintf(w, `{"jsonrpc":"2.0","id":%s,"result":%s}`, m.ID, result)
	}
}

func (r *plainRemote) stream(w http.ResponseWriter, req *http.Request) {
	if r.say == nil {
		w.WriteHeader(http.StatusMethodNotAllowed)
		return
	}
	w.Header().Set("Content-Type", "text/event-stream")
	w.(http.Flusher).Flush()
	r.opened <- struct{}{}
	for {
		select {
		case event := <-r.say:
			fmt.Fprintf(w, "data: {\"jsonrpc\":\"2.0\",%s}\n\n", event)
			w.(http.Flusher).Flush()
		case <-req.Context().Done():
			return
		}
	}
}

// newFront builds a gateway in front of the config's remotes, which ask for no
// sign-in.
func newFront(t *testing.T, config string) *inside {
	t.Helper()
	canary := authtest.NewCanary(t)
	cfg, _, err := ParseConfig("test", []byte(config), func(string) (string, bool) { return "", false })
	if err != nil {
		t.Fatal(err)
	}
	clients, err := guard.New(guard.Config{})
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewUnstartedServer(nil)
	in := &inside{url: "http://" + srv.Listener.Addr().String()}
	store := auth.NewMemory(auth.MemoryConfig{})
	broker, err := auth.New(auth.Config{PublicURL: in.url, CallbackPath: "/oauth/callback", Store: store, Log: canary.Logger()})
	if err != nil {
		t.Fatal(err)
	}
	var remotes []session.Remote
	for _, server := range cfg.Running() {
		remotes = append(remotes, session.Remote{Name: server.Name, URL: server.URL.String(), HTTP: clients.Client(guard.Policy{Loopback: true})})
	}
	pool := session.New(session.Config{Remotes: remotes, Name: "gatehouse", Version: "test", Log: canary.Logger()})
	in.Gateway = New(Setup{
		Config: cfg, Auth: broker, Sessions: pool, PublicURL: in.url, Version: "test", Log: canary.Logger(),
		Now: func() time.Time { return time.Now().Add(time.Duration(in.forward.Load())) },
	})
	srv.Config = NewServer(context.WithoutCancel(t.Context()), in.Handler(), canary.Logger())
	srv.Start()
	t.Cleanup(func() {
		in.Close()
		srv.Close()
		pool.Close()
		broker.Close()
		clients.Close()
		if err := store.Close(); err != nil {
			t.Error(err)
		}
	})
	return in
}

// servers is a config of remotes: name, URL, name, URL, …
func servers(pairs ...string) string {
	var list []string
	for i := 0; i < len(pairs); i += 2 {
		list = append(list, fmt.Sprintf(`%q: {"url": %q}`, pairs[i], pairs[i+1]))
	}
	return `{"mcpServers": {` + strings.Join(list, ", ") + `}}`
}

// plainClient speaks MCP by hand, so that nothing in between changes a byte.
type plainClient struct {
	t       *testing.T
	url     string
	modern  bool
	bare    bool // modern, but the test writes _meta itself
	session string
	ids     atomic.Int64
}

func newPlainClient(t *testing.T, url, capabilities string, modern bool) *plainClient {
	t.Helper()
	c := &plainClient{t: t, url: url + "/mcp", modern: modern}
	if modern {
		return c
	}
	resp := c.post(`{"jsonrpc":"2.0","id":0,"method":"initialize","params":{"protocolVersion":"2025-11-25","capabilities":`+capabilities+`,"clientInfo":{"name":"plain","version":"1"}}}`, "")
	c.session = resp.Header.Get("Mcp-Session-Id")
	resp.Body.Close()
	c.post(`{"jsonrpc":"2.0","method":"notifications/initialized"}`, "").Body.Close()
	return c
}

// post sends one message; name is the Mcp-Name of a modern one.
func (c *plainClient) post(body, name string) *http.Response {
	c.t.Helper()
	req, err := http.NewRequestWithContext(c.t.Context(), http.MethodPost, c.url, strings.NewReader(body))
	if err != nil {
		c.t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Accept", "application/json, text/event-stream")
	if c.modern {
		var m struct{ Method string }
		if err := json.Unmarshal([]byte(body), &m); err != nil {
			c.t.Fatal(err)
		}
		req.Header.Set("Mcp-Protocol-Version", modernVersion)
		req.Header.Set("Mcp-Method", m.Method)
		if name != "" {
			req.Header.Set("Mcp-Name", name)
		}
	} else if c.session != "" {
		req.Header.Set("Mcp-Session-Id", c.session)
		req.Header.Set("Mcp-Protocol-Version", "2025-11-25")
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		c.t.Fatal(err)
	}
	return resp
}

const modernMeta = `"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientCapabilities":{},"x":1.0}`

// messages sends a request and returns all that comes on its stream.
func (c *plainClient) messages(method, members string) []string {
	c.t.Helper()
	if c.modern && !c.bare {
		members = strings.TrimSuffix(modernMeta+","+members, ",")
	}
	var named struct{ Name, URI string }
	if err := json.Unmarshal([]byte("{"+members+"}"), &named); err != nil {
		c.t.Fatal(err)
	}
	resp := c.post(fmt.Sprintf(`{"jsonrpc":"2.0","id":%d,"method":%q,"params":{%s}}`, c.ids.Add(1), method, members), named.Name+named.URI)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		c.t.Fatal(err)
	}
	if !strings.HasPrefix(resp.Header.Get("Content-Type"), "text/event-stream") {
		return []string{string(body)}
	}
	var all []string
	for line := range bytes.Lines(body) {
		if data, ok := bytes.CutPrefix(line, []byte("data: ")); ok {
			all = append(all, strings.TrimSpace(string(data)))
		}
	}
	return all
}

// call sends a request and returns its result, or its error as "code message data".
func (c *plainClient) call(method, members string) string {
	c.t.Helper()
	all := c.messages(method, members)
	var m struct {
		Result json.RawMessage
		Error  *struct {
			Code    int64
			Message string
			Data    json.RawMessage
		}
	}
	if len(all) == 0 {
		c.t.Fatal("no answer")
	}
	if err := json.Unmarshal([]byte(all[len(all)-1]), &m); err != nil {
		c.t.Fatalf("%v in %q", err, all)
	}
	if m.Error != nil {
		return fmt.Sprintf("%d %s %s", m.Error.Code, m.Error.Message, m.Error.Data)
	}
	return string(m.Result)
}

const everything = `{"tools":{},"prompts":{},"resources":{},"completions":{}}`

// richRemote has one of everything, with bytes that no typed decoder keeps.
func richRemote(t *testing.T, change map[string]string) *plainRemote {
	results := map[string]string{
		"tools/list":               `{"tools":[]}`,
		"prompts/list":             `{"prompts":[{"name":"ask me","x":1.0,"arguments":[{"name":"a","n":9007199254740993}]}]}`,
		"resources/list":           `{"resources":[{"uri":"file:///a","size":9007199254740993,"z":1.0}]}`,
		"resources/templates/list": `{"resourceTemplates":[{"uriTemplate":"file:///by-id/{id}","z":1.0}]}`,
		"prompts/get":              `{"messages":[],"z":1.0}`,
		"resources/read":           `{"contents":[{"uri":"file:///a","text":"","n":9007199254740993}]}`,
		"completion/complete":      `{"completion":{"values":["x"],"total":1.0}}`,
	}
	maps.Copy(results, change)
	return newPlainRemote(t, everything, results)
}

// TestContentPassesThrough: lists, requests and results in both eras, byte for
// byte but for what must differ.
func TestContentPassesThrough(t *testing.T) {
	remote := richRemote(t, nil)
	g := newFront(t, servers("r", remote.URL))
	for _, modern := range []bool{false, true} {
		c := newPlainClient(t, g.url, "{}", modern)
		cacheable := `,"resultType":"complete","_meta":{"io.modelcontextprotocol/serverInfo":{"name":"gatehouse","title":"Gatehouse","version":"test"}}`
		hints := cacheable + `,"ttlMs":0,"cacheScope":"private"`
		listed := `,"ttlMs":0,"cacheScope":"private"` + cacheable
		sent := `"_meta":{"x":1.0},`
		if !modern {
			cacheable, hints, listed, sent = "", "", "", ""
		}
		for _, tt := range []struct{ method, members, remoteGot, want string }{
			{"prompts/list", "", "", `{"prompts":[{"name":"r_ask_me","x":1.0,"arguments":[{"name":"a","n":9007199254740993}]}]` + listed},
			{"resources/list", "", "", `{"resources":[{"uri":"file:///a","size":9007199254740993,"z":1.0},` + string(statusResource) + `]` + listed},
			{"resources/templates/list", "", "", `{"resourceTemplates":[{"uriTemplate":"file:///by-id/{id}","z":1.0}]` + listed},
			{"prompts/get", `"name":"r_ask_me","arguments":{"a":"1"},"y":1.0`, `{` + sent + `"name":"ask me","arguments":{"a":"1"},"y":1.0}`, `{"messages":[],"z":1.0` + cacheable},
			{"resources/read", `"uri":"file:///a","y":1.0`, `{` + sent + `"uri":"file:///a","y":1.0}`, `{"contents":[{"uri":"file:///a","text":"","n":9007199254740993}]` + hints},
			{"resources/read", `"uri":"file:///by-id/7"`, `{` + sent + `"uri":"file:///by-id/7"}`, `{"contents":[{"uri":"file:///a","text":"","n":9007199254740993}]` + hints},
			{"completion/complete", `"ref":{"type":"ref/prompt","name":"r_ask_me"},"argument":{"name":"a","value":"1"}`, `{` + sent + `"ref":{"type":"ref/prompt","name":"ask me"},"argument":{"name":"a","value":"1"}}`, `{"completion":{"values":["x"],"total":1.0}` + cacheable},
			{"completion/complete", `"ref":{"type":"ref/resource","uri":"file:///by-id/{id}"},"argument":{"name":"id","value":""}`, `{` + sent + `"ref":{"type":"ref/resource","uri":"file:///by-id/{id}"},"argument":{"name":"id","value":""}}`, `{"completion":{"values":["x"],"total":1.0}` + cacheable},
		} {
			if got := c.call(tt.method, tt.members); got != tt.want+"}" {
				t.Errorf("modern %v: %s %s:\n got %s\nwant %s}", modern, tt.method, tt.members, got, tt.want)
			}
			if tt.remoteGot != "" && remote.got(tt.method) != tt.remoteGot {
				t.Errorf("modern %v: %s: the remote got %s, want %s", modern, tt.method, remote.got(tt.method), tt.remoteGot)
			}
		}
	}
}

// TestWhoseResource: a URI goes to the remote that lists it, then to the one
// whose template it fits, then where there is no choice.
func TestWhoseResource(t *testing.T) {
	says := func(who string) string { return `{"contents":[{"uri":"` + who + `","text":""}]}` }
	a := richRemote(t, map[string]string{"resources/read": says("a")})
	b := richRemote(t, map[string]string{
		"resources/read":           says("b"),
		"resources/list":           `{"resources":[{"uri":"file:///a"},{"uri":"file:///by-id/listed"}]}`,
		"resources/templates/list": `{"resourceTemplates":[{"uriTemplate":"b://{+path}"}]}`,
	})
	none := newPlainRemote(t, `{"tools":{}}`, map[string]string{"tools/list": `{"tools":[]}`, "resources/read": says("none")})
	two := newFront(t, servers("none", none.URL, "a", a.URL, "b", b.URL))
	one := newFront(t, servers("none", none.URL, "b", b.URL))
	for _, tt := range []struct {
		g           *inside
		uri, want   string
		remote      *plainRemote
		original    string
		legacy, new int
	}{
		{two, "file:///a", says("a"), a, "file:///a", 0, 0},
		{two, "gatehouse:b/file:///a", says("b"), b, "file:///a", 0, 0},
		{two, "gatehouse:a/any:thing", says("a"), a, "any:thing", 0, 0},
		{two, "file:///by-id/7", says("a"), a, "file:///by-id/7", 0, 0},
		{two, "file:///by-id/listed", says("b"), b, "file:///by-id/listed", 0, 0},
		{two, "b://x/y?z#q", says("b"), b, "b://x/y?z#q", 0, 0},
		{two, "file:///by-id/7/8", "", nil, "", -32002, -32602},
		{two, "gatehouse:nobody/x", "", nil, "", -32002, -32602},
		{one, "any:thing", says("b"), b, "any:thing", 0, 0},
	} {
		for _, modern := range []bool{false, true} {
			c := newPlainClient(t, tt.g.url, "{}", modern)
			c.call("tools/list", "") // the remotes are connected now
			got := c.call("resources/read", fmt.Sprintf(`"uri":%q`, tt.uri))
			if code := map[bool]int{false: tt.legacy, true: tt.new}[modern]; code != 0 {
				if want := fmt.Sprintf(`%d resource not found {"uri":%q}`, code, tt.uri); got != want {
					t.Errorf("%s: got %s, want %s", tt.uri, got, want)
				}
				continue
			}
			if !strings.HasPrefix(got, strings.TrimSuffix(tt.want, "}")) {
				t.Errorf("%s: got %s, want %s", tt.uri, got, tt.want)
			} else if !strings.Contains(tt.remote.got("resources/read"), `"uri":"`+tt.original+`"`) {
				t.Errorf("%s: the remote got %s", tt.uri, tt.remote.got("resources/read"))
			}
		}
	}
	c := newPlainClient(t, two.url, "{}", false)
	if got, want := c.call("resources/list", ""), `{"resources":[{"uri":"file:///a","size":9007199254740993,"z":1.0},{"uri":"gatehouse:b/file:///a"},{"uri":"file:///by-id/listed"},`+string(statusResource)+`]}`; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

// TestLinkedResource: a resource that no remote lists can be read at the one whose
// result has named it, by whose user it was named to, and nobody else hears of it.
func TestLinkedResource(t *testing.T) {
	a := richRemote(t, map[string]string{"prompts/get": `{"messages":[{"role":"user","content":{"type":"resource","resource":{"uri":"b:1","text":""}}},{"role":"user","content":{"type":"resource_link","name":"2","uri":"a:2"}}]}`})
	b := richRemote(t, map[string]string{
		"tools/list":     `{"tools":[{"name":"find","inputSchema":{"type":"object"}}]}`,
		"tools/call":     `{"content":[{"type":"text","text":"\"uri\""},{"type":"resource_link","name":"1","uri":"b:1"}]}`,
		"resources/read": `{"contents":[{"uri":"b","text":"of b"}]}`,
	})
	g := newFront(t, servers("a", a.URL, "b", b.URL))
	for _, modern := range []bool{false, true} {
		alice, bob := newPlainClient(t, g.url, "{}", false), newPlainClient(t, g.url, "{}", modern)
		read := func(c *plainClient, uri string) string { return c.call("resources/read", fmt.Sprintf(`"uri":%q`, uri)) }
		bob.call("tools/list", "")
		if got := read(bob, "b:1"); !strings.Contains(got, "not found") {
			t.Errorf("before anybody has named it: %s", got)
		}
		bob.call("tools/call", `"name":"b_find"`)
		bob.call("prompts/get", `"name":"a_ask_me"`) // which is not the first to name b:1
		if got := read(bob, "b:1"); !strings.Contains(got, "of b") {
			t.Errorf("what a result has named: %s", got)
		}
		if got := read(bob, "a:2"); !strings.Contains(got, "file:///a") {
			t.Errorf("what a prompt has named: %s", got)
		}
		alice.call("tools/list", "")
		if got := read(alice, "b:1"); !strings.Contains(got, "not found") {
			t.Errorf("what was named to another: %s", got)
		}
	}
	if got := a.got("resources/read"); !strings.Contains(got, "a:2") {
		t.Errorf("the other remote was asked for %s", got)
	}
}

// TestLinkedIsBounded: a remote that names resource after resource makes room by
// forgetting its own, and nobody takes over what another has named.
func TestLinkedIsBounded(t *testing.T) {
	var l linked
	link := func(uri string) json.RawMessage {
		return json.RawMessage(fmt.Sprintf(`{"content":[{"type":"resource_link","name":"x","uri":%q}]}`, uri))
	}
	l.note("quiet", link("its"))
	for i := range 3 * maxLinked {
		l.note("loud", link(fmt.Sprint(i)))
	}
	l.note("loud", link("its"))
	long := strings.Repeat("x", maxLinkedURI+1)
	l.note("loud", link(long))
	l.note("loud", json.RawMessage(`{"content":[{"type":"resource_link","uri":7},"uri"]}`))
	if len(l.remote) != maxLinked+1 || len(l.uris["loud"]) != maxLinked {
		t.Errorf("%d are remembered", len(l.remote))
	}
	for uri, want := range map[string]string{"its": "quiet", fmt.Sprint(3*maxLinked - 1): "loud", "0": "", long: ""} {
		if got, _ := l.by(uri); got != want {
			t.Errorf("%s is of %q, want %q", uri, got, want)
		}
	}
}

// TestRemoteSaysNotFound: its code is that of the client's era.
func TestRemoteSaysNotFound(t *testing.T) {
	g := newFront(t, servers("r", richRemote(t, map[string]string{"resources/read": `!{"code":-32002,"message":"no such thing","data":{"n":1.0}}`}).URL))
	for modern, want := range map[bool]string{
		false: `-32002 no such thing {"n":1.0}`,
		true:  `-32602 resource not found {"uri":"file:///a"}`,
	} {
		c := newPlainClient(t, g.url, "{}", modern)
		c.call("resources/list", "")
		if got := c.call("resources/read", `"uri":"file:///a"`); got != want {
			t.Errorf("modern %v: got %s, want %s", modern, got, want)
		}
	}
}

func TestBadContentRequests(t *testing.T) {
	silent := newPlainRemote(t, `{"tools":{},"prompts":{}}`, map[string]string{"tools/list": `{"tools":[]}`, "prompts/list": `{"prompts":[{"name":"p"}]}`})
	g := newFront(t, servers("r", silent.URL))
	c := newPlainClient(t, g.url, "{}", false)
	c.call("prompts/list", "")
	for _, tt := range []struct{ method, members, want string }{
		{"prompts/get", `"name":"r_nothing"`, "-32602 "},
		{"prompts/get", `"name":"p"`, "-32602 "},
		{"prompts/get", `"name":"r_p"`, "-32601 "},
		{"prompts/list", `"cursor":""`, "-32602 "},
		{"prompts/list", `"cursor":null`, `{"prompts":[{"name":"r_p"}]}`},
		{"resources/list", `"cursor":"x"`, "-32602 "},
		{"completion/complete", `"ref":{"type":"ref/prompt","name":"nothing"},"argument":{"name":"a","value":""}`, "-32602 "},
		{"completion/complete", `"ref":{"type":"ref/prompt","name":"r_p"},"argument":{"name":"a","value":""}`, `{"completion":{"values":[],"total":0,"hasMore":false}}`},
	} {
		if got := c.call(tt.method, tt.members); !strings.HasPrefix(got, tt.want) {
			t.Errorf("%s %s: got %s, want %s", tt.method, tt.members, got, tt.want)
		}
	}
}

// TestContentSignIn: prompts and resources ask for a sign-in by an error.
func TestContentSignIn(t *testing.T) {
	as := authtest.NewAS(t)
	remote := authtest.NewRemote(t, authtest.RemoteConfig{AS: as})
	g := newInside(t, remote, oneRemote)
	client := authtest.Legacy(t, g.url+"/mcp")
	_, prompt := client.GetPrompt(t.Context(), &mcp.GetPromptParams{Name: "r_p"})
	_, resource := client.ReadResource(t.Context(), &mcp.ReadResourceParams{URI: "any:thing"})
	_, qualified := client.ReadResource(t.Context(), &mcp.ReadResourceParams{URI: "gatehouse:r/any:thing"})
	for _, err := range []error{prompt, resource, qualified} {
		answer, ok := errors.AsType[*jsonrpc.Error](err)
		if !ok || answer.Code != -31401 {
			t.Fatalf("got %v", err)
		}
		var required authtest.AuthRequired
		if err := json.Unmarshal(answer.Data, &required); err != nil || required.Status != "auth_required" || required.ServerName != "r" ||
			!strings.HasPrefix(required.AuthURL, g.url+"/connect/") || required.Message != answer.Message {
			t.Errorf("got %s", answer.Data)
		}
	}
}

func TestMatches(t *testing.T) {
	for _, tt := range []struct {
		template, uri string
		want          bool
	}{
		{"test://template/{id}/data", "test://template/123/data", true},
		{"test://template/{id}/data", "test://template/1/2/data", false},
		{"test://template/{id}/data", "test://template//data", true},
		{"a://{+path}", "a://b/c?d", true},
		{"a://b{/x,y}", "a://b/1/2", true},
		{"a://b{/x}", "a://b", true},
		{"a://b{?q,r*}", "a://b?q=1", true},
		{"a://b{?q}", "a://b&q=1", false},
		{"a://b{.ext}", "a://b.json", true},
		{"a://b.c{x}", "a://bxcx", false},
		{"a://{unclosed", "a://{unclosed", false},
		{"a://{}", "a://", false},
		{"a://{x:9999}", "a://y", true},
		{"a:///" + strings.Repeat("{x}", 2000), "a:///y", true},
		{"no expression", "no expression", true},
	} {
		if got := matches(tt.template, tt.uri); got != tt.want {
			t.Errorf("%.40s, %s: got %v", tt.template, tt.uri, got)
		}
	}
}

func FuzzMatches(f *testing.F) {
	f.Add("test://{id}{?q*}", "test://1?q=2")
	f.Add("a{.b}{;c}{#d}{&e}", "a.b")
	f.Fuzz(func(t *testing.T, template, uri string) {
		if matches(template, uri) && !strings.Contains(template, "{") && template != uri {
			t.Errorf("%q is not %q", template, uri)
		}
	})
}
