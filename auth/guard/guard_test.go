package guard

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func newClients(t *testing.T, c Config) *Clients {
	t.Helper()
	cs, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(cs.Close)
	return cs
}

func mustParse(t *testing.T, s string) *url.URL {
	t.Helper()
	u, err := url.Parse(s)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

var (
	private10 = Policy{Allow: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("fd00::/8")}}
	onLoop    = Policy{Loopback: true}
)

func TestCheckURL(t *testing.T) {
	cs := newClients(t, Config{})
	policies := map[string]*Client{"public": cs.Client(Policy{}), "private": cs.Client(private10), "loopback": cs.Client(onLoop)}
	const all, none = "public private loopback", ""
	for _, test := range []struct{ url, allowed string }{
		{"https://as.example.com/x?y=z", all},
		{"https://as.example.com:8443/", all},
		{"https://1.1.1.1/", all},
		{"https://[2606:4700:4700::1111]/", all},
		{"https://[64:ff9b::101:101]/", all}, // NAT64 of 1.1.1.1
		{"https://xn--bcher-kva.example/", all},

		{"http://as.example.com/", "private"}, // the dial decides
		{"http://1.1.1.1/", none},
		{"http://10.1.2.3/", "private"},
		{"https://10.1.2.3/", "private"},
		{"https://[fd00::1]/", "private"},
		{"http://127.0.0.1:80/", "loopback"},
		{"https://127.255.0.1/", "loopback"},
		{"https://[::1]/", "loopback"},
		{"http://localhost:3000/", "loopback"},
		{"http://LOCALHOST./", "loopback"},

		{"https://169.254.169.254/latest/meta-data", none},
		{"https://192.168.1.1/", none},
		{"https://172.16.0.1/", none},
		{"https://100.64.0.1/", none},
		{"https://0.0.0.0/", none},
		{"https://[::]/", none},
		{"https://[fe80::1]/", none},
		{"https://[fe80::1%25eth0]/", none},
		{"https://[::ffff:127.0.0.1]/", none},
		{"https://[::ffff:10.0.0.1]/", none},
		{"https://[::ffff:1.1.1.1]/", none},
		{"https://[64:ff9b::7f00:1]/", none},
		{"https://[64:ff9b::a00:1]/", none},
		{"https://[64:ff9b:1::7f00:1]/", none},
		{"https://[2002:7f00:1::]/", none},
		{"https://2130706433/", none},
		{"https://0177.0.0.1/", none},
		{"https://017700000001/", none},
		{"https://0x7f.1/", none},
		{"https://0x7f000001/", none},
		{"https://127.1/", none},
		{"https://127.0.0.1./", none},
		{"https://as.example.com:0/", none},
		{"https://as.example.com:99999/", none},
		{"https://as.example.com:/", none},

		{"javascript:alert(1)", none},
		{"file:///etc/passwd", none},
		{"data:text/html,x", none},
		{"gopher://as.example.com/", none},
		{"//as.example.com/", none},
		{"/relative", none},
		{"https:as.example.com", none},
		{"https:///path", none},
		{"https://user@as.example.com/", none},
		{"https://user:pw@as.example.com/", none},
		{"https://@as.example.com/", none},
		{"https://as.example.com/#fragment", none},
		{"https://as.example.com/%0d%0aSet-Cookie:x", none},
		{"https://as.example.com/%00", none},
		{"https://$(calc).example.com/", none},
		{"https://as..example.com/", none},
		{"https://bücher.example/", none},
	} {
		u := mustParse(t, test.url)
		for name, c := range policies {
			err := c.CheckURL(u)
			if want := strings.Contains(test.allowed, name); (err == nil) != want {
				t.Errorf("%s, %s: allowed = %v, want %v (%v)", test.url, name, err == nil, want, err)
			}
			if err != nil && !errors.Is(err, ErrBlocked) {
				t.Errorf("%s, %s: %v is not ErrBlocked", test.url, name, err)
			}
		}
	}
}

// An exception for a way of writing IPv4 addresses is none for the addresses.
func TestExceptionsDoNotEmbed(t *testing.T) {
	c := newClients(t, Config{}).Client(Policy{Allow: []netip.Prefix{netip.MustParsePrefix("64:ff9b::/96"), netip.MustParsePrefix("::ffff:0:0/96")}})
	for _, address := range []string{"https://[64:ff9b::7f00:1]/", "http://[64:ff9b::101:101]/", "https://[::ffff:127.0.0.1]/"} {
		if err := c.CheckURL(mustParse(t, address)); !errors.Is(err, ErrBlocked) {
			t.Errorf("%s: %v, want ErrBlocked", address, err)
		}
	}
}

// countingServer counts connections, which is what must not happen.
func countingServer(t *testing.T, h http.Handler) (s *httptest.Server, connections *atomic.Int64) {
	connections = new(atomic.Int64)
	s = httptest.NewUnstartedServer(h)
	s.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			connections.Add(1)
		}
	}
	s.Start()
	t.Cleanup(s.Close)
	return s, connections
}

func ok(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "ok") }

func TestRefusedIsNeverDialed(t *testing.T) {
	s, connections := countingServer(t, http.HandlerFunc(ok))
	port := mustParse(t, s.URL).Port()
	cs := newClients(t, Config{})
	cs.resolver = resolver(t, func(name string) netip.Addr {
		ip, _ := netip.ParseAddr(strings.NewReplacer("-", ".").Replace(strings.TrimSuffix(name, ".evil.test.")))
		return ip
	})
	for _, policy := range []Policy{{}, private10} {
		c := cs.Client(policy)
		for _, host := range []string{
			"127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "[64:ff9b::7f00:1]", "0.0.0.0", "2130706433", "0177.0.0.1", "0x7f.1", "127.1",
			"127-0-0-1.evil.test", // a name
		} {
			for _, scheme := range []string{"http", "https"} {
				for what, hc := range map[string]*http.Client{"Fetch": c.Fetch(), "Stream": c.Stream()} {
					resp, err := hc.Get(scheme + "://" + host + ":" + port + "/")
					if err == nil {
						resp.Body.Close()
					}
					if !errors.Is(err, ErrBlocked) {
						t.Errorf("%s %s://%s: %v, want ErrBlocked", what, scheme, host, err)
					}
				}
			}
		}
	}
	if n := connections.Load(); n != 0 {
		t.Errorf("%d connections were made", n)
	}
}

func TestPlainHTTPOnlyToExceptions(t *testing.T) {
	cs := newClients(t, Config{})
	cs.resolver = resolver(t, func(string) netip.Addr { return netip.MustParseAddr("1.1.1.1") })
	_, err := cs.Client(private10).Fetch().Get("http://public.example.test/")
	if !errors.Is(err, ErrBlocked) {
		t.Errorf("plain http to a public address: %v, want ErrBlocked", err)
	}
}

// A name answers with an allowed address first and with another afterwards.
func TestRebinding(t *testing.T) {
	s, connections := countingServer(t, http.HandlerFunc(ok))
	address := mustParse(t, s.URL)
	var answer atomic.Value
	answer.Store(netip.MustParseAddr("127.0.0.1"))
	cs := newClients(t, Config{})
	cs.resolver = resolver(t, func(string) netip.Addr { return answer.Load().(netip.Addr) })
	c := cs.Client(Policy{Allow: []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")}})

	get := func() error {
		resp, err := c.Fetch().Get("http://rebind.example.test:" + address.Port() + "/")
		if err == nil {
			resp.Body.Close()
		}
		return err
	}
	if err := get(); err != nil {
		t.Fatal(err)
	}
	cs.Close() // drop the idle connection, so that the next request dials
	answer.Store(netip.MustParseAddr("127.0.0.2"))
	if err := get(); !errors.Is(err, ErrBlocked) {
		t.Errorf("after the name moved: %v, want ErrBlocked", err)
	}
	if n := connections.Load(); n != 1 {
		t.Errorf("%d connections, want 1", n)
	}
}

func TestPoolsAreNotShared(t *testing.T) {
	s, _ := countingServer(t, http.HandlerFunc(ok))
	cs := newClients(t, Config{})
	for range 2 {
		resp, err := cs.Client(onLoop).Fetch().Get(s.URL)
		if err != nil {
			t.Fatal(err)
		}
		io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
		if _, err := cs.Client(Policy{}).Fetch().Get(s.URL); !errors.Is(err, ErrBlocked) {
			t.Errorf("another client's connection was used: %v", err)
		}
	}
}

func TestRedirects(t *testing.T) {
	inner, innerConnections := countingServer(t, http.HandlerFunc(ok))
	secure := httptest.NewTLSServer(http.RedirectHandler(inner.URL, http.StatusFound))
	t.Cleanup(secure.Close)
	var posts atomic.Int64
	mux := http.NewServeMux()
	mux.HandleFunc("/ok", ok)
	mux.HandleFunc("POST /post", func(w http.ResponseWriter, _ *http.Request) {
		posts.Add(1)
		w.Header().Set("Location", "/ok")
		w.WriteHeader(http.StatusTemporaryRedirect)
	})
	mux.HandleFunc("/hop/{n}", func(w http.ResponseWriter, r *http.Request) {
		n := len(r.PathValue("n"))
		if n == 1 {
			http.Redirect(w, r, "/ok", http.StatusFound)
			return
		}
		http.Redirect(w, r, "/hop/"+strings.Repeat("x", n-1), http.StatusFound)
	})
	mux.HandleFunc("/to", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Location", r.URL.Query().Get("u"))
		w.WriteHeader(http.StatusFound)
	})
	outer, _ := countingServer(t, mux)

	cs := newClients(t, Config{Roots: trust(t, secure)})
	c := cs.Client(onLoop)

	get := func(address string) error {
		resp, err := c.Fetch().Get(address)
		if err == nil {
			resp.Body.Close()
			if resp.StatusCode != http.StatusOK {
				return fmt.Errorf("status %d", resp.StatusCode)
			}
		}
		return err
	}
	if err := get(outer.URL + "/hop/xxx"); err != nil {
		t.Errorf("three redirects: %v", err)
	}
	if err := get(outer.URL + "/hop/xxxx"); !errors.Is(err, ErrBlocked) {
		t.Errorf("four redirects: %v, want ErrBlocked", err)
	}
	for _, target := range []string{"http://10.0.0.1/", "https://169.254.169.254/", "file:///etc/passwd", "http://public.example.com/", "https://user@as.example.com/", "https://2130706433/"} {
		if err := get(outer.URL + "/to?u=" + url.QueryEscape(target)); !errors.Is(err, ErrBlocked) {
			t.Errorf("redirect to %s: %v, want ErrBlocked", target, err)
		}
	}
	if err := get(secure.URL); !errors.Is(err, ErrBlocked) {
		t.Errorf("redirect from https to http: %v, want ErrBlocked", err)
	}
	if n := innerConnections.Load(); n != 0 {
		t.Errorf("https led to %d plain connections", n)
	}

	resp, err := c.Fetch().Post(outer.URL+"/post", "text/plain", strings.NewReader("x"))
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusTemporaryRedirect || posts.Load() != 1 {
		t.Errorf("POST: status %d, %d posts; want the redirect itself", resp.StatusCode, posts.Load())
	}
	resp, err = c.Stream().Get(outer.URL + "/hop/x")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusFound {
		t.Errorf("Stream followed a redirect: %d", resp.StatusCode)
	}
}

func TestBounds(t *testing.T) {
	size := func(n int) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { w.Write(make([]byte, n)) }
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/fits", size(MaxBody))
	mux.HandleFunc("/over", size(MaxBody+1))
	mux.HandleFunc("/endless", func(w http.ResponseWriter, r *http.Request) {
		chunk := make([]byte, 32<<10)
		for {
			if _, err := w.Write(chunk); err != nil {
				return
			}
		}
	})
	mux.HandleFunc("/bomb", func(w http.ResponseWriter, _ *http.Request) {
		var b bytes.Buffer
		z := gzip.NewWriter(&b)
		z.Write(make([]byte, 64<<20))
		z.Close()
		w.Header().Set("Content-Encoding", "gzip")
		w.Write(b.Bytes())
	})
	mux.HandleFunc("/header", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("X-Long", strings.Repeat("x", maxHeader))
	})
	s, _ := countingServer(t, mux)
	c := newClients(t, Config{}).Client(onLoop)
	for path, want := range map[string]error{"/fits": nil, "/over": ErrTooLarge, "/endless": ErrTooLarge, "/bomb": ErrTooLarge} {
		resp, err := c.Fetch().Get(s.URL + path)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if !errors.Is(err, want) || len(body) > MaxBody {
			t.Errorf("%s: %d bytes, %v; want %v", path, len(body), err, want)
		}
		if want != nil {
			if n, again := resp.Body.Read(make([]byte, 1)); n != 0 || again == nil || errors.Is(again, io.EOF) {
				t.Errorf("%s: reading on gives %d, %v", path, n, again)
			}
		}
	}
	if resp, err := c.Fetch().Get(s.URL + "/header"); err == nil {
		resp.Body.Close()
		t.Error("an endless header was read")
	}
	resp, err := c.Stream().Get(s.URL + "/over")
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(resp.Body)
	resp.Body.Close()
	if err != nil || len(body) != MaxBody+1 {
		t.Errorf("Stream: %d bytes, %v", len(body), err)
	}
}

func TestDeadline(t *testing.T) {
	drip := func(w http.ResponseWriter, r *http.Request) {
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-r.Context().Done():
				return
			case <-tick.C:
				w.Write([]byte("."))
				w.(http.Flusher).Flush()
			}
		}
	}
	s, _ := countingServer(t, http.HandlerFunc(drip))
	c := newClients(t, Config{Timeout: 100 * time.Millisecond}).Client(onLoop)
	resp, err := c.Fetch().Get(s.URL)
	if err == nil {
		_, err = io.ReadAll(resp.Body)
		resp.Body.Close()
	}
	if e, ok := errors.AsType[net.Error](err); !ok || !e.Timeout() {
		t.Errorf("%v, want a timeout", err)
	}
	if cs := newClients(t, Config{}); cs.Client(Policy{}).Fetch().Timeout != 10*time.Second || cs.Client(Policy{}).Stream().Timeout != 0 {
		t.Error("Fetch has 10 s, Stream no deadline")
	}
}

func TestUserAgent(t *testing.T) {
	s, _ := countingServer(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, r.UserAgent()) }))
	c := newClients(t, Config{UserAgent: "gatehouse/1"}).Client(onLoop)
	for _, own := range []string{"", "mine"} {
		req, _ := http.NewRequestWithContext(t.Context(), http.MethodGet, s.URL, nil)
		if own != "" {
			req.Header.Set("User-Agent", own)
		}
		resp, err := c.Stream().Do(req)
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if want := map[string]string{"": "gatehouse/1", "mine": "mine"}[own]; string(body) != want {
			t.Errorf("User-Agent %q, want %q", body, want)
		}
		if req.Header.Get("User-Agent") != own {
			t.Error("the caller's request was changed")
		}
	}
}

func TestProxy(t *testing.T) {
	var seen atomic.Value
	seen.Store("")
	proxy, _ := countingServer(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		seen.Store(r.Method + " " + r.Host)
		if r.Method == http.MethodConnect {
			w.WriteHeader(http.StatusForbidden)
		}
	}))
	direct, _ := countingServer(t, http.HandlerFunc(ok))
	t.Setenv("HTTPS_PROXY", "http://127.0.0.1:1")
	t.Setenv("HTTP_PROXY", "http://127.0.0.1:1")
	cs := newClients(t, Config{Proxy: mustParse(t, proxy.URL)})

	for _, test := range []struct {
		policy Policy
		url    string
		seen   string
	}{
		{Policy{}, "https://as.example.test/", "CONNECT as.example.test:443"},
		{private10, "http://in.example.test/", "GET in.example.test"},
		{onLoop, direct.URL, ""},
		{Policy{}, "https://10.0.0.1/", ""},
		{Policy{}, "http://in.example.test/", ""},
		{Policy{}, proxy.URL, ""},
	} {
		seen.Store("")
		resp, err := cs.Client(test.policy).Fetch().Get(test.url)
		if err == nil {
			resp.Body.Close()
		}
		if got := seen.Load(); got != test.seen {
			t.Errorf("%s: the proxy saw %q, want %q (%v)", test.url, got, test.seen, err)
		}
	}
	for _, bad := range []string{"ftp://p/", "http://", "p:3128"} {
		if _, err := New(Config{Proxy: mustParse(t, bad)}); err == nil {
			t.Errorf("proxy %q was accepted", bad)
		}
	}
}

// trust returns roots of these servers' own certificates.
func trust(t *testing.T, servers ...*httptest.Server) Roots {
	t.Helper()
	pool := x509.NewCertPool()
	for _, s := range servers {
		pool.AddCert(s.Certificate())
	}
	return func() *x509.CertPool { return pool }
}

// TestRootsChange: from one request to the next another CA is trusted, and the
// old one no longer, whatever connections there were; what is under way goes on.
func TestRootsChange(t *testing.T) {
	more := make(chan struct{})
	remote := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.(http.Flusher).Flush()
		if r.URL.Path == "/stream" {
			<-more
		}
		io.WriteString(w, "said")
	}))
	remote.Config.ErrorLog = log.New(io.Discard, "", 0)
	remote.StartTLS()
	t.Cleanup(remote.Close)
	right, wrong := trust(t, remote), trust(t)
	now := right
	c := newClients(t, Config{Roots: func() *x509.CertPool { return now() }}).Client(onLoop)
	get := func(path string) (*http.Response, error) { return c.Stream().Get(remote.URL + path) }
	must := func(resp *http.Response, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || string(body) != "said" {
			t.Errorf("%q, %v", body, err)
		}
	}
	must(get("/"))
	stream, err := get("/stream")
	if err != nil {
		t.Fatal(err)
	}
	now = wrong
	if resp, err := get("/"); err == nil {
		resp.Body.Close()
		t.Error("a connection that the roots of before had verified was used again")
	}
	close(more)
	must(stream, nil)
	now = right
	must(get("/"))
}

func TestTLS(t *testing.T) {
	var presented atomic.Int64
	newServer := func() *httptest.Server {
		s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			presented.Add(int64(len(r.TLS.PeerCertificates)))
			io.WriteString(w, r.Proto)
		}))
		s.EnableHTTP2 = true
		s.Config.ErrorLog = log.New(io.Discard, "", 0)
		s.TLS = &tls.Config{ClientAuth: tls.RequestClientCert}
		s.StartTLS()
		t.Cleanup(s.Close)
		return s
	}
	remote, other := newServer(), newServer() // httptest gives both the same certificate
	own := &tls.Config{Certificates: remote.TLS.Certificates, ServerName: "example.com"}

	get := func(c *Client, s *httptest.Server) (string, error) {
		resp, err := c.Stream().Get(s.URL)
		if err != nil {
			return "", err
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		return string(body), err
	}

	if _, err := get(newClients(t, Config{}).Client(onLoop), remote); err == nil {
		t.Error("an unknown certificate was accepted")
	}
	if proto, err := get(newClients(t, Config{Roots: trust(t, remote)}).Client(onLoop), remote); err != nil || proto != "HTTP/2.0" {
		t.Errorf("with the shared CA: %q, %v", proto, err)
	}

	cs := newClients(t, Config{})
	c := cs.Client(Policy{Loopback: true, Roots: trust(t, remote), TLS: own, Host: mustParse(t, remote.URL).Host})
	presented.Store(0)
	if _, err := get(c, other); err != nil || presented.Load() != 0 {
		t.Errorf("another host: %d client certificates, %v", presented.Load(), err)
	}
	if _, err := get(c, remote); err != nil || presented.Load() != 1 {
		t.Errorf("the remote's host: %d client certificates, %v", presented.Load(), err)
	}

	old := httptest.NewUnstartedServer(http.HandlerFunc(ok))
	old.TLS = &tls.Config{MaxVersion: tls.VersionTLS11, MinVersion: tls.VersionTLS10}
	old.Config.ErrorLog = log.New(io.Discard, "", 0)
	old.StartTLS()
	t.Cleanup(old.Close)
	if _, err := get(newClients(t, Config{Roots: trust(t, old)}).Client(onLoop), old); err == nil {
		t.Error("TLS 1.1 was accepted")
	}
}

// resolver answers every A query with what lookup says.
func resolver(t *testing.T, lookup func(name string) netip.Addr) *net.Resolver {
	return &net.Resolver{PreferGo: true, Dial: func(context.Context, string, string) (net.Conn, error) {
		client, server := net.Pipe()
		go func() {
			defer server.Close()
			for {
				var size [2]byte // DNS over a stream is length-prefixed
				if _, err := io.ReadFull(server, size[:]); err != nil {
					return
				}
				query := make([]byte, binary.BigEndian.Uint16(size[:]))
				if _, err := io.ReadFull(server, query); err != nil {
					return
				}
				answer := dnsAnswer(query, lookup)
				if _, err := server.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(answer))), answer...)); err != nil {
					return
				}
			}
		}()
		return client, nil
	}}
}

func dnsAnswer(query []byte, lookup func(string) netip.Addr) []byte {
	var name strings.Builder
	end := 12
	for query[end] != 0 {
		n := int(query[end])
		name.Write(query[end+1 : end+1+n])
		name.WriteByte('.')
		end += n + 1
	}
	end++
	isA := binary.BigEndian.Uint16(query[end:]) == 1
	end += 4
	answer := append([]byte{}, query[:end]...)
	copy(answer[2:12], []byte{0x81, 0x80, 0, 1, 0, 0, 0, 0, 0, 0})
	ip := lookup(name.String())
	if isA && ip.Is4() {
		answer[7] = 1
		answer = append(answer, 0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 0, 0, 4)
		answer = append(answer, ip.AsSlice()...)
	}
	return answer
}

func FuzzCheckURL(f *testing.F) {
	for _, s := range []string{"https://as.example.com/", "http://[::ffff:127.0.0.1]/", "https://0x7f.1/", "https://[fe80::1%25eth0]:1/", "https://a.b:99/#x"} {
		f.Add(s)
	}
	cs, err := New(Config{})
	if err != nil {
		f.Fatal(err)
	}
	c := cs.Client(Policy{})
	f.Fuzz(func(t *testing.T, s string) {
		u, err := url.Parse(s)
		if err != nil || c.CheckURL(u) != nil {
			return
		}
		if u.Scheme != "https" || u.User != nil || u.Hostname() == "" {
			t.Errorf("%q was allowed", s)
		}
		if ip, err := netip.ParseAddr(u.Hostname()); err == nil && (ip.IsLoopback() || ip.IsPrivate() || ip.IsLinkLocalUnicast() || ip.Is4In6()) {
			t.Errorf("%q was allowed", s)
		}
	})
}
