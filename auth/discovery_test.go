package auth

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"gatehouse/auth/guard"
)

const (
	prmPath   = "/.well-known/oauth-protected-resource"
	oauthPath = "/.well-known/oauth-authorization-server"
	oidcPath  = "/.well-known/openid-configuration"
)

// site is a web server that has what a test puts there and records what is
// asked of it.
type site struct {
	*httptest.Server
	t *testing.T

	mu     sync.Mutex
	routes map[string]http.HandlerFunc
	asked  []string
}

func newSite(t *testing.T) *site {
	s := &site{t: t, routes: map[string]http.HandlerFunc{}}
	s.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		s.asked = append(s.asked, r.URL.RequestURI())
		h := s.routes[r.URL.Path]
		s.mu.Unlock()
		if h == nil {
			http.NotFound(w, r)
			return
		}
		h(w, r)
	}))
	t.Cleanup(s.Close)
	return s
}

func (s *site) handle(path string, h http.HandlerFunc) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.routes[path] = h
}

// json serves a document in which BASE stands for the site's origin.
func (s *site) json(path, document string) {
	s.handle(path, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		io.WriteString(w, s.at(document))
	})
}

func (s *site) at(text string) string { return strings.ReplaceAll(text, "BASE", s.URL) }

func (s *site) status(path string, code int) {
	s.handle(path, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(code) })
}

// requests returns what was asked since the last call.
func (s *site) requests() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	asked := s.asked
	s.asked = nil
	return asked
}

const (
	goodResource = `{"resource": "BASE/mcp", "authorization_servers": ["BASE"], "scopes_supported": ["read", "write"]}`
	goodServer   = `{"issuer": "BASE", "authorization_endpoint": "BASE/a", "token_endpoint": "BASE/t",
		"code_challenge_methods_supported": ["plain", "S256"]}`
	tenantServer = `{"issuer": "BASE/tenant1", "authorization_endpoint": "BASE/tenant1/a", "token_endpoint": "BASE/tenant1/t",
		"code_challenge_methods_supported": ["S256"]}`
)

// good makes the site a remote with its authorization server.
func (s *site) good() *site {
	s.json(prmPath+"/mcp", goodResource)
	s.json(oauthPath, goodServer)
	return s
}

func (s *site) remote() *Remote {
	return &Remote{Name: "notes", URL: s.URL + "/mcp", HTTP: testClient(s.t, guard.Policy{Loopback: true})}
}

func testClient(t *testing.T, p guard.Policy) *guard.Client {
	cs, err := guard.New(guard.Config{Timeout: 2 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(cs.Close)
	return cs.Client(p)
}

func testDiscoverer() *discoverer { return newDiscoverer(slog.New(slog.DiscardHandler), time.Now) }

// saying checks what an error tells the user.
func saying(t *testing.T, err error, kind Kind, parts ...string) {
	t.Helper()
	e, ok := errors.AsType[*Error](err)
	if !ok {
		t.Fatalf("%v is not an Error", err)
	}
	if e.Kind != kind || e.Remote != "notes" {
		t.Errorf("kind %s of %s, want %s: %v", e.Kind, e.Remote, kind, err)
	}
	for _, part := range parts {
		if !strings.Contains(e.Say, part) {
			t.Errorf("%q does not say %q", e.Say, part)
		}
	}
	for _, r := range e.Error() {
		if r < ' ' {
			t.Errorf("%q holds control characters", e.Error())
		}
	}
}

// Where documents may be: the four of the conformance suite, and the order.
func TestDiscoverPlaces(t *testing.T) {
	const rootResource = `{"resource": "BASE", "authorization_servers": ["BASE/tenant1"]}`
	for _, test := range []struct {
		name      string
		challenge challenge
		documents map[string]string
		resource  string
		issuer    string
		asked     []string
	}{
		{"announced", challenge{ResourceMetadata: "BASE/custom/location.json"}, map[string]string{
			"/custom/location.json": `{"resource": "BASE/mcp", "authorization_servers": ["BASE/tenant1"]}`,
			"/tenant1" + oidcPath:   tenantServer,
		}, "BASE/mcp", "BASE/tenant1", []string{"/custom/location.json", oauthPath + "/tenant1", oidcPath + "/tenant1", "/tenant1" + oidcPath}},
		{"by path", challenge{}, map[string]string{prmPath + "/mcp": goodResource, oauthPath: goodServer},
			"BASE/mcp", "BASE", []string{prmPath + "/mcp", oauthPath}},
		{"announced by path is asked once", challenge{ResourceMetadata: "BASE" + prmPath + "/mcp"},
			map[string]string{prmPath + "/mcp": goodResource, oidcPath: goodServer},
			"BASE/mcp", "BASE", []string{prmPath + "/mcp", oauthPath, oidcPath}},
		{"at the root, naming the origin", challenge{}, map[string]string{prmPath: rootResource, oauthPath + "/tenant1": tenantServer},
			"BASE", "BASE/tenant1", []string{prmPath + "/mcp", prmPath, oauthPath + "/tenant1"}},
		{"announced at the root, naming the origin", challenge{ResourceMetadata: "BASE" + prmPath},
			map[string]string{prmPath: rootResource, oidcPath + "/tenant1": tenantServer},
			"BASE", "BASE/tenant1", []string{prmPath, oauthPath + "/tenant1", oidcPath + "/tenant1"}},
		{"announced is gone, by path is there", challenge{ResourceMetadata: "BASE/gone"}, map[string]string{prmPath + "/mcp": goodResource, oauthPath: goodServer},
			"BASE/mcp", "BASE", []string{"/gone", prmPath + "/mcp", oauthPath}},
		{"announced is another's, by path is there", challenge{ResourceMetadata: "BASE/other"}, map[string]string{
			"/other": `{"resource": "https://other.example/mcp", "authorization_servers": ["BASE/evil"]}`, prmPath + "/mcp": goodResource, oauthPath: goodServer,
		}, "BASE/mcp", "BASE", []string{"/other", prmPath + "/mcp", oauthPath}},
		{"nothing but server metadata (2025-03-26)", challenge{}, map[string]string{oauthPath: goodServer},
			"BASE/mcp", "BASE", []string{prmPath + "/mcp", prmPath, oauthPath}},
		{"the same with a slash", challenge{}, map[string]string{oidcPath: strings.Replace(goodServer, `"BASE"`, `"BASE/"`, 1)},
			"BASE/mcp", "BASE/", []string{prmPath + "/mcp", prmPath, oauthPath, oidcPath}},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := newSite(t)
			for path, document := range test.documents {
				s.json(path, document)
			}
			test.challenge.ResourceMetadata = s.at(test.challenge.ResourceMetadata)
			var steps []Step
			found, err := testDiscoverer().discover(t.Context(), s.remote(), test.challenge, func(s Step) { steps = append(steps, s) })
			if err != nil {
				t.Fatal(err)
			}
			asked := s.requests()
			if found.Resource != s.at(test.resource) || found.Issuer != s.at(test.issuer) || found.NoPKCEMetadata {
				t.Errorf("found %+v", found)
			}
			if !slices.Equal(asked, test.asked) {
				t.Errorf("asked %v, want %v", asked, test.asked)
			}
			// Every request is a step that can be printed.
			var walked []string
			for _, step := range steps {
				walked = append(walked, strings.TrimPrefix(step.URL, s.URL))
				if step.What == "" || step.Note == "" {
					t.Errorf("a step says nothing: %+v", step)
				}
			}
			if !slices.Equal(walked, asked) || !steps[len(steps)-1].OK {
				t.Errorf("steps %+v", steps)
			}
		})
	}
}

func TestDiscoverEverything(t *testing.T) {
	s := newSite(t)
	s.json(prmPath+"/mcp", `{"resource": "BASE/mcp", "authorization_servers": ["BASE"], "scopes_supported": ["read", "wri\"te", "read"], "x": {"y": [1]}}`)
	s.json(oauthPath, `{"issuer": "BASE", "authorization_endpoint": "BASE/a?x=y", "token_endpoint": "BASE/t", "registration_endpoint": "BASE/r",
		"revocation_endpoint": "BASE/v", "code_challenge_methods_supported": ["S256"], "token_endpoint_auth_methods_supported": ["none"],
		"scopes_supported": ["offline_access"], "authorization_response_iss_parameter_supported": true,
		"client_id_metadata_document_supported": true}`)
	found, err := testDiscoverer().discover(t.Context(), s.remote(), challenge{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if found.AuthorizationEndpoint != s.URL+"/a?x=y" || found.TokenEndpoint != s.URL+"/t" || found.RegistrationEndpoint != s.URL+"/r" ||
		found.RevocationEndpoint != s.URL+"/v" || !found.IssParameter || !found.CIMD || !slices.Equal(found.AuthMethods, []string{"none"}) ||
		!slices.Equal(found.ScopesSupported, []string{"read"}) || !slices.Equal(found.ASScopes, []string{"offline_access"}) {
		t.Errorf("found %+v", found)
	}
}

func TestResourceMustMatch(t *testing.T) {
	s := newSite(t)
	s.json(oauthPath, goodServer)
	document := func(resource string) string {
		return `{"resource": "` + resource + `", "authorization_servers": ["BASE"]}`
	}
	for _, test := range []struct {
		path, resource string
		ok             bool
	}{
		{prmPath + "/mcp", "BASE/mcp", true},
		{prmPath + "/mcp", strings.Replace("BASE/mcp", "BASE", strings.ToUpper(s.URL), 1), true}, // scheme and host
		{prmPath + "/mcp", "BASE/mcp/", false},
		{prmPath + "/mcp", "BASE/MCP", false},
		{prmPath + "/mcp", "BASE/mcp?x", false},
		{prmPath + "/mcp", "BASE/mcp#x", false},
		{prmPath + "/mcp", "BASE/other", false},
		{prmPath + "/mcp", "BASE", false},
		{prmPath + "/mcp", "https://evil.example.com/mcp", false},
		{prmPath + "/mcp", "", false},
		{prmPath, "BASE", true},
		{prmPath, "BASE/", true},
		{prmPath, "BASE/mcp", true},
		{prmPath, "BASE/other", false},
		{prmPath, "http://user@" + strings.TrimPrefix(s.URL, "http://"), false},
	} {
		s.routes[prmPath], s.routes[prmPath+"/mcp"] = nil, nil
		s.json(test.path, document(test.resource))
		s.requests()
		found, err := testDiscoverer().discover(t.Context(), s.remote(), challenge{}, nil)
		if !test.ok {
			saying(t, err, KindDiscovery, "protected resource document at "+s.URL+test.path)
			// Nobody falls back from a document that is there and wrong.
			if asked := s.requests(); slices.Contains(asked, oauthPath) {
				t.Errorf("%s at %s: went on: %v", test.resource, test.path, asked)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s at %s: %v", test.resource, test.path, err)
		} else if found.Resource != s.at(test.resource) {
			t.Errorf("%s at %s: found %s, want the document's own value", test.resource, test.path, found.Resource)
		}
	}
	s.json(prmPath+"/mcp", document("https://evil.example.com/mcp"))
	_, err := testDiscoverer().discover(t.Context(), s.remote(), challenge{}, nil)
	saying(t, err, KindDiscovery, "is for another resource (at https://evil.example.com)", "the remote's url in the config")
}

// A document that cannot be had for a moment is not replaced by one that names
// another resource.
func TestResourceDoesNotFlip(t *testing.T) {
	s := newSite(t).good()
	s.json(prmPath, `{"resource": "BASE", "authorization_servers": ["BASE"]}`)
	s.status(prmPath+"/mcp", http.StatusServiceUnavailable)
	_, err := testDiscoverer().discover(t.Context(), s.remote(), challenge{}, nil)
	saying(t, err, KindUnavailable, s.URL+prmPath+"/mcp was answered with status 503: try again later")
}

func TestCanonicalResource(t *testing.T) {
	for in, want := range map[string]string{
		"https://A.Example/":         "https://a.example",
		"HTTPS://a.example:443/Mcp":  "https://a.example/Mcp",
		"http://a.example:80/mcp/":   "http://a.example/mcp/",
		"https://a.example:8443":     "https://a.example:8443",
		"https://a.example/?tenant":  "https://a.example/?tenant",
		"https://u@a.example/":       "",
		"https://a.example/#x":       "",
		"mailto:a@b.example":         "",
		"https://a.example/%2e/x%2F": "https://a.example/%2e/x%2F",
	} {
		if got := canonicalResource(in); got != want {
			t.Errorf("%s: %q, want %q", in, got, want)
		}
	}
}

func TestIssuerMustBeIdentical(t *testing.T) {
	for _, issuer := range []string{"BASE/", "BASE/x", "https://evil.example.com", "", strings.ToUpper("http://127.0.0.1")} {
		s := newSite(t).good()
		s.json(oauthPath, strings.Replace(goodServer, `"BASE"`, `"`+issuer+`"`, 1))
		_, err := testDiscoverer().discover(t.Context(), s.remote(), challenge{}, nil)
		saying(t, err, KindDiscovery, "authorization server "+s.URL, "names another issuer")
	}
	// By a letter's case, in an issuer with a path.
	s := newSite(t)
	s.json(prmPath+"/mcp", `{"resource": "BASE/mcp", "authorization_servers": ["BASE/Tenant1"]}`)
	s.json(oauthPath+"/Tenant1", tenantServer)
	_, err := testDiscoverer().discover(t.Context(), s.remote(), challenge{}, nil)
	saying(t, err, KindDiscovery, "names another issuer")
	// A slash in both is one issuer.
	s = newSite(t)
	s.json(prmPath+"/mcp", strings.Replace(goodResource, `["BASE"]`, `["BASE/"]`, 1))
	s.json(oauthPath, strings.Replace(goodServer, `"BASE"`, `"BASE/"`, 1))
	if found, err := testDiscoverer().discover(t.Context(), s.remote(), challenge{}, nil); err != nil || found.Issuer != s.URL+"/" {
		t.Errorf("found %+v, %v", found, err)
	}
}

func TestPKCERequired(t *testing.T) {
	for _, methods := range []string{``, `, "code_challenge_methods_supported": []`, `, "code_challenge_methods_supported": ["plain"]`, `, "code_challenge_methods_supported": ["s256"]`, `, "code_challenge_methods_supported": null`} {
		s := newSite(t).good()
		s.json(oauthPath, strings.Replace(goodServer, `,
		"code_challenge_methods_supported": ["plain", "S256"]`, methods, 1))
		_, err := testDiscoverer().discover(t.Context(), s.remote(), challenge{}, nil)
		saying(t, err, KindDiscovery, "its authorization server "+s.URL+" does not list S256 among code_challenge_methods_supported; Gatehouse requires PKCE with S256: ask its operator to enable it")
	}
}

// Endpoints that must never be fetched or shown.
func TestHostileEndpoints(t *testing.T) {
	// A public remote: the client is without exceptions.
	public := testClient(t, guard.Policy{})
	hostile := []string{
		"javascript:alert(1)", "file:///etc/passwd", "data:text/html,x", "vbscript:x", "ftp://as.example.com/", "/relative", "//as.example.com/",
		"$(touch /tmp/x)", "https://as.example.com/$(touch)", "https://$(touch).example.com/", "https://as.example.com/`id`", "a:$(cmd.exe /c calc)",
		"https://user@as.example.com/", "https://user:pw@as.example.com/", "https://as.example.com\r\nX: y", "https://as.example.com/%0d%0aX:y", "https://as.example.com/?a=%0aX",
		"https://as.example.com/?\x00", "https://as.example.com/ x", "https://as.example.com/\"onload=", "https://as.example.com/<script>", "https://as.example.com\\@evil.example/",
		"https://as.example.com/#f", "https://bücher.example/", "http://as.example.com/", "https://127.0.0.1/", "https://localhost/", "https://[::1]/", "https://10.0.0.1/",
		"https://169.254.169.254/", "https://[::ffff:10.0.0.1]/", "https://[64:ff9b::a00:1]/", "https://2130706433/", "https://0177.0.0.1/", "https://0x7f.0.0.1/",
		"https://as.example.com/" + strings.Repeat("x", maxURLLength), "",
	}
	for _, endpoint := range hostile {
		if err := checkEndpoint(public, endpoint); !errors.Is(err, guard.ErrBlocked) {
			t.Errorf("%q was allowed", endpoint)
		}
	}
	for _, endpoint := range []string{"https://as.example.com/a", "https://as.example.com:8443/a?x=%20y&z=(1)", "https://1.1.1.1/"} {
		if err := checkEndpoint(public, endpoint); err != nil {
			t.Errorf("%q: %v", endpoint, err)
		}
	}

	// In each member, even of a server on loopback.
	for _, member := range []string{"authorization_endpoint", "token_endpoint", "registration_endpoint", "revocation_endpoint"} {
		for _, endpoint := range []string{"javascript:alert(1)", "https://10.0.0.1/x", "http://as.example.com/", "https://user@as.example.com/", "a:$(calc)"} {
			s := newSite(t).good()
			rest := `"authorization_endpoint": "BASE/a", "token_endpoint": "BASE/t"`
			document := `{"issuer": "BASE", "code_challenge_methods_supported": ["S256"], ` + rest + `}`
			if strings.Contains(rest, member) {
				document = strings.Replace(document, member+`": "BASE/`+member[:1], member+`": "`+endpoint, 1)
			} else {
				document = strings.Replace(document, "{", `{"`+member+`": "`+endpoint+`", `, 1)
			}
			s.json(oauthPath, document)
			_, err := testDiscoverer().discover(t.Context(), s.remote(), challenge{}, nil)
			saying(t, err, KindDiscovery, member)
			if strings.Contains(err.Error(), endpoint) {
				t.Errorf("the endpoint is shown: %v", err)
			}
		}
	}
	for _, issuer := range []string{"javascript:alert(1)", "https://10.0.0.1", "https://as.example.com?x", "http://as.example.com", "https://as.example.com/#x", ""} {
		s := newSite(t)
		s.json(prmPath+"/mcp", `{"resource": "BASE/mcp", "authorization_servers": ["`+issuer+`"]}`)
		_, err := testDiscoverer().discover(t.Context(), s.remote(), challenge{}, nil)
		saying(t, err, KindDiscovery, "names an authorization server by a URL that the gateway may not reach")
	}
}

// A challenge or a redirect names a private address: nothing is connected to.
func TestPrivateAddressesAreNotConnectedTo(t *testing.T) {
	var connections atomic.Int64
	victim := httptest.NewUnstartedServer(http.NotFoundHandler())
	victim.Config.ConnState = func(_ net.Conn, state http.ConnState) { connections.Add(1) }
	victim.Start()
	t.Cleanup(victim.Close)
	_, port, _ := net.SplitHostPort(victim.Listener.Addr().String())

	// The remote is at an address that the config allows, the victim is not.
	front := newSite(t)
	_, frontPort, _ := net.SplitHostPort(front.Listener.Addr().String())
	closed := testClient(t, guard.Policy{})
	for _, host := range []string{"127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "[64:ff9b::7f00:1]", "0177.0.0.1", "2130706433", "0x7f000001", "0.0.0.0"} {
		for _, scheme := range []string{"http", "https"} {
			r := &Remote{Name: "notes", URL: "https://127.0.0.1:" + frontPort + "/mcp", HTTP: closed}
			_, err := testDiscoverer().discover(t.Context(), r, challenge{ResourceMetadata: scheme + "://" + host + ":" + port + "/prm"}, nil)
			if !errors.Is(err, guard.ErrBlocked) {
				t.Errorf("%s: %v", host, err)
			}
		}
	}
	open := front.remote()
	for _, target := range []string{"https://10.0.0.1/", "https://169.254.169.254/latest", "http://public.example.com/", "https://[::ffff:7f00:1]:" + port + "/"} {
		front.handle(prmPath+"/mcp", http.RedirectHandler(target, http.StatusFound).ServeHTTP)
		_, err := testDiscoverer().discover(t.Context(), open, challenge{}, nil)
		saying(t, err, KindDiscovery, "leads to an address that the gateway may not reach", "allowAddresses")
	}
	if n := connections.Load(); n != 0 {
		t.Errorf("%d connections", n)
	}
}

// raceDetector is true in builds with the race detector, which allocate more:
// the compiler leaves out append(nil, make(…)...) optimizations there.
var raceDetector bool

// What must end in an error, within the deadline and 4 MB.
func TestHostileDocuments(t *testing.T) {
	raw := func(contentType, body string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", contentType)
			io.WriteString(w, body)
		}
	}
	canary := `{"resource": "canary-of-the-document"`
	endless := func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		chunk := bytes.Repeat([]byte(" "), 32<<10)
		for range 1 << 30 / len(chunk) {
			if _, err := w.Write(chunk); err != nil {
				return
			}
		}
	}
	var bomb bytes.Buffer
	z := gzip.NewWriter(&bomb)
	for range 64 {
		z.Write(bytes.Repeat([]byte(" "), 1<<20))
	}
	z.Close()

	for _, test := range []struct {
		name    string
		handler http.HandlerFunc
		say     string
		kind    Kind
	}{
		{"1 GB", endless, "larger than 1 MiB", KindDiscovery},
		{"gzip bomb", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			w.Header().Set("Content-Encoding", "gzip")
			w.Write(bomb.Bytes())
		}, "larger than 1 MiB", KindDiscovery},
		{"100 deep", raw("application/json", `{"x": `+strings.Repeat("[", 100)+strings.Repeat("]", 100)+`}`), "not the JSON", KindDiscovery},
		{"10,000 deep", raw("application/json", `{"x": `+strings.Repeat("[", 10_000)+strings.Repeat("]", 10_000)+`}`), "not the JSON", KindDiscovery},
		{"1,000,000 deep", raw("application/json", strings.Repeat(`{"a":`, 200_000)), "not the JSON", KindDiscovery},
		{"doubles", raw("application/json", `{"resource": "a", "issuer": "a", "resource": "b", "issuer": "b"}`), "not the JSON", KindDiscovery},
		{"doubles in case", raw("application/json", `{"resource": "a", "issuer": "a", "Resource": "b", "ISSUER": "b"}`), "not the JSON", KindDiscovery},
		{"trailing data", raw("application/json", canary+`} {}`), "not the JSON", KindDiscovery},
		{"cut", raw("application/json", canary), "not the JSON", KindDiscovery},
		{"another type", raw("application/json", `{"resource": ["canary-of-the-document"], "issuer": ["canary-of-the-document"]}`), "not the JSON", KindDiscovery},
		{"an array", raw("application/json", `[]`), "not the JSON", KindDiscovery},
		{"null", raw("application/json", `null`), "names no resource", KindDiscovery},
		{"empty", raw("application/json", ``), "not the JSON", KindDiscovery},
		{"HTML", raw("text/html", `{"resource": "x"}`), "does not come as application/json", KindDiscovery},
		{"text", raw("text/plain; charset=utf-8", `{}`), "does not come as application/json", KindDiscovery},
		{"no type", raw("", `{}`), "does not come as application/json", KindDiscovery},
		{"500", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(500) }, "status 500: try again later", KindUnavailable},
		{"429", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(429) }, "status 429: try again later", KindUnavailable},
		{"204", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(204) }, "status 204", KindDiscovery},
		{"400", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(400) }, "status 400", KindDiscovery},
		{"hang up", func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, "cannot be reached", KindUnavailable},
		{"redirects in a circle", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, r.URL.Path, http.StatusFound) }, "may not reach", KindDiscovery},
	} {
		t.Run(test.name, func(t *testing.T) {
			for _, path := range []string{prmPath + "/mcp", oauthPath} {
				s := newSite(t).good()
				s.handle(path, test.handler)
				r := s.remote()
				var before, after runtime.MemStats
				runtime.ReadMemStats(&before)
				start := time.Now()
				_, err := testDiscoverer().discover(t.Context(), r, challenge{}, nil)
				runtime.ReadMemStats(&after)
				say := test.say
				if path == oauthPath {
					say = strings.Replace(say, "names no resource", "names another issuer", 1)
				}
				saying(t, err, test.kind, say)
				if strings.Contains(err.Error(), "canary") {
					t.Errorf("%v quotes the document", err)
				}
				// All that was allocated is more than what was held at any time.
				if n := after.TotalAlloc - before.TotalAlloc; n > 4<<20 && !raceDetector || time.Since(start) > 10*time.Second {
					t.Errorf("%d bytes, %v", n, time.Since(start))
				}
				if path == prmPath+"/mcp" && slices.Contains(s.requests(), oauthPath) {
					t.Error("went on without the document")
				}
			}
		})
	}
}

func TestSlowDocument(t *testing.T) {
	s := newSite(t).good()
	s.handle(prmPath+"/mcp", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	})
	r := s.remote()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := testDiscoverer().discover(ctx, r, challenge{}, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v, want the caller's deadline", err)
	}
}

func TestSeveralServers(t *testing.T) {
	other := newSite(t)
	other.json(oauthPath, goodServer)
	s := newSite(t)
	s.json(prmPath+"/mcp", `{"resource": "BASE/mcp", "authorization_servers": ["javascript:x", "BASE", "`+other.URL+`", "https://third.example.com"]}`)
	r := s.remote()
	if found, err := testDiscoverer().discover(t.Context(), r, challenge{}, nil); err != nil || found.Issuer != other.URL {
		t.Errorf("the first that works: %+v, %v", found, err)
	}
	s.json(oauthPath, goodServer)
	r.Issuer = other.URL
	if found, err := testDiscoverer().discover(t.Context(), r, challenge{}, nil); err != nil || found.Issuer != other.URL {
		t.Errorf("the configured one: %+v, %v", found, err)
	}
	r.Issuer = "https://pinned.example.com/secret-tenant"
	_, err := testDiscoverer().discover(t.Context(), r, challenge{}, nil)
	saying(t, err, KindDiscovery, "does not list the configured issuer https://pinned.example.com", "auth.issuer")

	s.json(prmPath+"/mcp", `{"resource": "BASE/mcp"}`)
	r.Issuer = ""
	_, err = testDiscoverer().discover(t.Context(), r, challenge{}, nil)
	saying(t, err, KindDiscovery, "lists no authorization server", "auth.issuer")
	r.Issuer = other.URL
	if found, err := testDiscoverer().discover(t.Context(), r, challenge{}, nil); err != nil || found.Issuer != other.URL {
		t.Errorf("the configured one where none is listed: %+v, %v", found, err)
	}
}

func TestDefaultEndpoints(t *testing.T) {
	for _, code := range []int{404, 405, 401, 403} {
		var log bytes.Buffer
		s := newSite(t)
		for _, path := range []string{prmPath, prmPath + "/mcp", oauthPath, oidcPath} {
			s.status(path, code)
		}
		r := s.remote()
		d := newDiscoverer(slog.New(slog.NewTextHandler(&log, nil)), time.Now)
		for range 2 {
			found, err := d.discover(t.Context(), r, challenge{}, nil)
			if err != nil {
				t.Fatal(err)
			}
			if !found.NoPKCEMetadata || found.Issuer != s.URL || found.Resource != s.URL+"/mcp" || found.AuthorizationEndpoint != s.URL+"/authorize" ||
				found.TokenEndpoint != s.URL+"/token" || found.RegistrationEndpoint != s.URL+"/register" {
				t.Errorf("%d: found %+v", code, found)
			}
			if strings.Contains(log.String(), "level=WARN") {
				t.Errorf("%d: looking alone warns", code)
			}
		}
		d.warnDefaults(r.Name)
		d.warnDefaults(r.Name)
		if n := strings.Count(log.String(), "level=WARN"); n != 1 {
			t.Errorf("%d: %d warnings, want 1: %s", code, n, log.String())
		}
	}
}

// The default endpoints are for servers that publish nothing, not for those
// whose documents could not be had.
func TestNoDefaultEndpoints(t *testing.T) {
	for name, arrange := range map[string]func(*site, *Remote) challenge{
		"resource document down":     func(s *site, _ *Remote) challenge { s.status(prmPath+"/mcp", 503); return challenge{} },
		"root document down":         func(s *site, _ *Remote) challenge { s.status(prmPath, 500); return challenge{} },
		"root document is a page":    func(s *site, _ *Remote) challenge { s.json(prmPath, "<html>"); return challenge{} },
		"metadata down":              func(s *site, _ *Remote) challenge { s.status(oauthPath, 502); return challenge{} },
		"metadata wrong":             func(s *site, _ *Remote) challenge { s.json(oidcPath, `{"issuer": "x"}`); return challenge{} },
		"announced document missing": func(s *site, _ *Remote) challenge { return challenge{ResourceMetadata: s.URL + "/gone"} },
		"announced well-known gone":  func(s *site, _ *Remote) challenge { return challenge{ResourceMetadata: s.URL + prmPath} },
		"issuer is configured":       func(s *site, r *Remote) challenge { r.Issuer = s.URL; return challenge{} },
		"nobody there":               func(s *site, _ *Remote) challenge { s.Close(); return challenge{} },
		"listed server without metadata": func(s *site, _ *Remote) challenge {
			s.json(prmPath, `{"resource": "BASE", "authorization_servers": ["BASE"]}`)
			return challenge{}
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t)
			r := s.remote()
			ch := arrange(s, r)
			found, err := testDiscoverer().discover(t.Context(), r, ch, nil)
			if err == nil {
				t.Fatalf("found %+v", found)
			}
			if _, ok := errors.AsType[*Error](err); !ok {
				t.Errorf("%v is not an Error", err)
			}
		})
	}
}

func TestMetadataIsCached(t *testing.T) {
	s := newSite(t).good()
	r := s.remote()
	now := time.Unix(1e9, 0)
	d := newDiscoverer(slog.New(slog.DiscardHandler), func() time.Time { return now })
	fetched := func(r *Remote) bool {
		t.Helper()
		s.requests()
		_, err := d.discover(t.Context(), r, challenge{}, nil)
		if err != nil {
			t.Fatal(err)
		}
		return slices.Contains(s.requests(), oauthPath)
	}
	if !fetched(r) || fetched(r) {
		t.Error("not fetched once")
	}
	if !fetched(s.remote()) {
		t.Error("what one remote's client fetched served another")
	}
	now = now.Add(metadataLife)
	if !fetched(r) {
		t.Error("not fetched again after 5 minutes")
	}

	// A failure is not kept.
	now = now.Add(metadataLife)
	s.status(oauthPath, 500)
	if _, err := d.discover(t.Context(), r, challenge{}, nil); err == nil {
		t.Fatal("500 is no metadata")
	}
	s.json(oauthPath, goodServer)
	if !fetched(r) {
		t.Error("a failure was cached")
	}

	for i := range 2 * maxCachedServers {
		d.keep(serverKey{issuer: strings.Repeat("x", i)}, &serverMetadata{})
	}
	if len(d.cache) > maxCachedServers {
		t.Errorf("%d servers cached", len(d.cache))
	}
}

func TestErrorsAndStepsShowNoQueries(t *testing.T) {
	const canary = "canary-in-a-query"
	s := newSite(t)
	r := s.remote()
	r.URL += "?key=" + canary
	var text strings.Builder
	step := func(s Step) { text.WriteString(s.What + s.URL + s.Note) }
	for _, ch := range []challenge{{}, {ResourceMetadata: s.URL + "/x?token=" + canary}, {ResourceMetadata: "https://10.0.0.1/?token=" + canary}} {
		s.status(prmPath+"/mcp", 500)
		_, err := testDiscoverer().discover(t.Context(), r, ch, step)
		text.WriteString(err.Error())
	}
	s.Close()
	_, err := testDiscoverer().discover(t.Context(), r, challenge{ResourceMetadata: s.URL + "/x?token=" + canary}, step)
	text.WriteString(err.Error())
	if strings.Contains(text.String(), canary) {
		t.Errorf("a query is shown: %s", text.String())
	}
}

func FuzzResourceDocument(f *testing.F) {
	f.Add([]byte(goodResource))
	f.Add([]byte(`{"resource": "a", "resource": "b"}`))
	f.Add([]byte(`{"resource": 1, "authorization_servers": {"a": []}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		doc, err := parseDocument[resourceDocument](data)
		if (doc == nil) == (err == nil) {
			t.Errorf("%v, %v", doc, err)
		}
	})
}

func FuzzServerMetadata(f *testing.F) {
	f.Add([]byte(goodServer))
	f.Add([]byte(`{"issuer":"https://a.example","authorization_endpoint":"javascript:x","token_endpoint":"https://a.example/t","code_challenge_methods_supported":["S256"]}`))
	cs, err := guard.New(guard.Config{})
	if err != nil {
		f.Fatal(err)
	}
	c := cs.Client(guard.Policy{})
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := parseDocument[serverMetadata](data)
		if err != nil {
			return
		}
		for _, endpoint := range []string{m.AuthorizationEndpoint.value, m.TokenEndpoint.value} {
			if checkEndpoint(c, endpoint) == nil && !strings.HasPrefix(strings.ToLower(endpoint), "https://") {
				t.Errorf("%q would be used", endpoint)
			}
		}
		for _, p := range serverPlaces(m.Issuer.value) {
			if checkEndpoint(c, m.Issuer.value) == nil && checkEndpoint(c, p.address) != nil && len(p.address) < maxURLLength {
				t.Errorf("issuer %q leads to %q", m.Issuer.value, p.address)
			}
		}
	})
}
