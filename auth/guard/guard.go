// Package guard makes the HTTP clients that everything outgoing goes through.
//
// A gateway fetches what strangers name: the URL in a challenge, the endpoints
// in a document, the target of a redirect. Each could be the gateway's own
// loopback, a neighbour in its network, or a cloud's metadata service. So a
// client here looks twice. [Client.CheckURL] refuses a URL for what it says,
// before a name is looked up; the dialer refuses an address for what it is,
// after the lookup, so a name that changes its answer gains nothing.
//
// Private addresses are exceptions that a [Policy] names, one policy for each
// remote. Every [Client] has connections of its own: a connection that one
// policy allowed never serves a request under another.
//
// A client has two faces. [Client.Fetch] is for documents and token requests,
// short and small: it has a deadline, a size limit, and few redirects.
// [Client.Stream] is for MCP traffic, as long and as large as its caller
// permits.
package guard

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"time"
)

// MaxBody is how much of an answer [Client.Fetch] hands out, after decompression.
const MaxBody = 1 << 20

const (
	defaultTimeout = 10 * time.Second
	connectTimeout = 5 * time.Second // dialing, and again the TLS handshake
	idleTimeout    = 90 * time.Second
	maxHeader      = 256 << 10
	maxRedirects   = 3
)

var (
	// ErrBlocked: a URL or an address that the policy does not allow.
	ErrBlocked = errors.New("address not allowed")
	// ErrTooLarge: the answer exceeds [MaxBody].
	ErrTooLarge = errors.New("answer too large")
)

// Config holds what all clients share.
type Config struct {
	Roots     Roots         // that TLS trusts; nil: the system's
	Proxy     *url.URL      // for all hosts but loopback's; nil: none, the environment is never asked
	UserAgent string        // of requests that bring none; empty: Go's
	Timeout   time.Duration // of one request by Fetch with its answer; 0: 10 s
}

// Roots returns whom TLS trusts from now on, the same pool for as long as that
// does not change. It is asked before every request. After a change new requests
// get new connections, and those that are under way go on.
type Roots func() *x509.CertPool

// Policy says what one client may reach beyond public addresses over https.
type Policy struct {
	Allow    []netip.Prefix // private addresses, plain http included
	Loopback bool           // 127.0.0.0/8, ::1 and "localhost", plain http included
	Roots    Roots          // nil: those of [Config]
	TLS      *tls.Config    // client certificate and server name; may be nil
	Host     string         // the only host[:port] that sees TLS's client certificate and server name; empty: all do
}

// Clients makes clients and closes them together.
type Clients struct {
	config   Config
	resolver *net.Resolver // nil: Go's default

	mu   sync.Mutex // guards made
	made []*Client
}

// New checks the config.
func New(c Config) (*Clients, error) {
	cs := &Clients{}
	if c.Proxy != nil {
		switch c.Proxy.Scheme {
		case "http", "https", "socks5", "socks5h":
		default:
			return nil, errors.New("a proxy's URL must be http, https or socks5")
		}
		if c.Proxy.Hostname() == "" {
			return nil, errors.New("the proxy's URL names no host")
		}
	}
	if c.Timeout == 0 {
		c.Timeout = defaultTimeout
	}
	cs.config = c
	return cs, nil
}

// Client makes a client with connections of its own.
func (cs *Clients) Client(p Policy) *Client {
	c := &Client{addresses: newAddresses(p)}
	fetch := cs.transport(c, p, func(t *http.Transport) {
		t.MaxIdleConnsPerHost = 4
	})
	fetch.maxBody = MaxBody
	c.fetch = &http.Client{
		Transport:     fetch,
		CheckRedirect: c.checkRedirect,
		Timeout:       cs.config.Timeout,
	}
	c.stream = &http.Client{
		Transport: cs.transport(c, p, func(t *http.Transport) {
			t.MaxIdleConnsPerHost = 512
			t.DisableCompression = true
			// A stream may be silent for hours: only a ping tells it from a dead one.
			t.HTTP2 = &http.HTTP2Config{SendPingTimeout: 30 * time.Second, PingTimeout: 15 * time.Second}
		}),
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	cs.mu.Lock()
	defer cs.mu.Unlock()
	cs.made = append(cs.made, c)
	return c
}

// Close closes the idle connections of all clients, and those in use as soon
// as they become idle.
func (cs *Clients) Close() {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	for _, c := range cs.made {
		c.fetch.CloseIdleConnections()
		c.stream.CloseIdleConnections()
	}
}

// Client reaches what its policy allows.
type Client struct {
	addresses     addresses
	fetch, stream *http.Client
}

// CheckURL refuses, with an error that is [ErrBlocked], what no request of
// this client could be allowed to. What it passes may still be refused when
// the host's name has been resolved.
func (c *Client) CheckURL(u *url.URL) error { return c.addresses.checkURL(u) }

// Fetch returns the client for documents and token requests: 10 s for the
// whole of a request, at most [MaxBody] of an answer, at most 3 redirects of a
// GET or HEAD, never from https to http. Another method's redirect is returned
// as it came.
func (c *Client) Fetch() *http.Client { return c.fetch }

// Stream returns the client for MCP traffic. It follows no redirect, has no
// deadline beside the request's context, and leaves the size of an answer to
// the reader.
func (c *Client) Stream() *http.Client { return c.stream }

func (c *Client) checkRedirect(req *http.Request, via []*http.Request) error {
	last := via[len(via)-1]
	if last.Method != http.MethodGet && last.Method != http.MethodHead {
		return http.ErrUseLastResponse
	}
	if len(via) > maxRedirects {
		return fmt.Errorf("%w: more than %d redirects", ErrBlocked, maxRedirects)
	}
	if last.URL.Scheme == "https" && req.URL.Scheme != "https" {
		return fmt.Errorf("%w: redirect from https to %s", ErrBlocked, req.URL.Scheme)
	}
	return c.CheckURL(req.URL)
}

// transport returns a guarded transport whose parts tune adjusts.
func (cs *Clients) transport(c *Client, p Policy, tune func(*http.Transport)) *transport {
	base := func(check dialCheck, roots *x509.CertPool, config *tls.Config) *http.Transport {
		config.RootCAs = roots
		config.MinVersion = max(config.MinVersion, tls.VersionTLS12)
		t := &http.Transport{
			DialContext:            cs.dial(check),
			TLSClientConfig:        config,
			TLSHandshakeTimeout:    connectTimeout,
			ForceAttemptHTTP2:      true, // a dialer of one's own turns it off
			IdleConnTimeout:        idleTimeout,
			MaxResponseHeaderBytes: maxHeader,
		}
		if cs.config.Proxy != nil {
			t.Proxy = cs.proxy
		}
		tune(t)
		return t
	}
	t := &transport{
		check:     c.CheckURL,
		userAgent: cs.config.UserAgent,
		roots:     p.Roots,
		host:      p.Host,
		plain:     base(c.addresses.checkPlain, nil, &tls.Config{}),
	}
	if t.roots == nil {
		t.roots = cs.config.Roots
	}
	if t.roots == nil {
		t.roots = func() *x509.CertPool { return nil }
	}
	t.trust = func(roots *x509.CertPool) trusting {
		special := &tls.Config{}
		if p.TLS != nil {
			special = p.TLS.Clone()
		}
		now := trusting{roots: roots, secure: base(c.addresses.checkSecure, roots, special)}
		now.others = now.secure
		if p.TLS != nil && p.Host != "" {
			others := p.TLS.Clone()
			others.ServerName, others.Certificates, others.GetClientCertificate = "", nil, nil
			now.others = base(c.addresses.checkSecure, roots, others)
		}
		return now
	}
	t.now = t.trust(t.roots())
	return t
}

// proxy is for [http.Transport.Proxy].
func (cs *Clients) proxy(req *http.Request) (*url.URL, error) {
	// The proxy's loopback is another one.
	if isLoopbackHost(req.URL.Hostname()) {
		return nil, nil
	}
	return cs.config.Proxy, nil
}

// transport is one pool of connections for each way an address is judged: a
// connection dialed for https never carries http.
type transport struct {
	check     func(*url.URL) error
	userAgent string
	maxBody   int64 // 0: no limit

	plain *http.Transport
	host  string // of the special TLS; empty: every host
	roots Roots
	trust func(*x509.CertPool) trusting

	mu  sync.Mutex // guards now
	now trusting
}

// trusting is what carries https while certain roots are trusted.
type trusting struct {
	roots  *x509.CertPool
	secure *http.Transport // with the special TLS
	others *http.Transport // to every host but that one; may be the same
}

func (t *transport) RoundTrip(req *http.Request) (*http.Response, error) {
	if err := t.check(req.URL); err != nil {
		if req.Body != nil {
			req.Body.Close()
		}
		return nil, err
	}
	if t.userAgent != "" && req.Header.Get("User-Agent") == "" {
		// "RoundTrip should not modify the request."
		clone := *req
		clone.Header = req.Header.Clone()
		if clone.Header == nil {
			clone.Header = http.Header{}
		}
		clone.Header.Set("User-Agent", t.userAgent)
		req = &clone
	}
	resp, err := t.choose(req.URL).RoundTrip(req)
	if err != nil {
		return nil, err
	}
	if t.maxBody > 0 {
		resp.Body = &limitedBody{body: resp.Body, left: t.maxBody}
	}
	return resp, nil
}

func (t *transport) choose(u *url.URL) *http.Transport {
	if u.Scheme == "http" {
		return t.plain
	}
	now := t.trusts()
	if t.host == "" || strings.EqualFold(u.Host, t.host) {
		return now.secure
	}
	return now.others
}

// trusts returns what trusts the roots of this moment.
func (t *transport) trusts() trusting {
	t.mu.Lock()
	roots, was := t.roots(), t.now
	if was.roots != roots {
		t.now = t.trust(roots)
	}
	now := t.now
	t.mu.Unlock()
	if was.roots != roots {
		// What was verified by other roots serves nobody any more.
		was.closeIdle()
	}
	return now
}

func (t trusting) closeIdle() {
	t.secure.CloseIdleConnections()
	t.others.CloseIdleConnections()
}

// CloseIdleConnections is what [http.Client.CloseIdleConnections] looks for.
func (t *transport) CloseIdleConnections() {
	t.plain.CloseIdleConnections()
	t.mu.Lock()
	now := t.now
	t.mu.Unlock()
	now.closeIdle()
}

// limitedBody fails where [io.LimitReader] would pretend that the answer ends.
type limitedBody struct {
	body io.ReadCloser
	left int64
}

func (b *limitedBody) Read(p []byte) (int, error) {
	if b.left < 0 {
		return 0, ErrTooLarge
	}
	// One byte more than is left tells an answer that fits from one that does not.
	if int64(len(p)) > b.left+1 {
		p = p[:b.left+1]
	}
	n, err := b.body.Read(p)
	if b.left -= int64(n); b.left < 0 {
		return n - 1, ErrTooLarge
	}
	return n, err
}

func (b *limitedBody) Close() error { return b.body.Close() }
