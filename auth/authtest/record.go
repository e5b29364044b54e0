package authtest

import (
	"bytes"
	"io"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"sync"
)

// Endpoints, as in [Request.Endpoint].
const (
	EndpointMetadata   = "metadata"   // RFC 8414, OIDC
	EndpointResource   = "resource"   // RFC 9728, of a Remote
	EndpointRegister   = "register"   // RFC 7591
	EndpointAuthorize  = "authorize"  // RFC 6749, section 3.1
	EndpointToken      = "token"      // RFC 6749, section 3.2
	EndpointRevoke     = "revoke"     // RFC 7009
	EndpointKeys       = "keys"       // jwks_uri
	EndpointIntrospect = "introspect" // RFC 7662
	EndpointMCP        = "mcp"        // of a Remote
	EndpointOther      = "other"      // whatever else was asked for
)

// Request is one request that a server here received.
type Request struct {
	Endpoint string
	Method   string // of HTTP
	Path     string
	Query    url.Values
	Form     url.Values // of the body
	Header   http.Header
	Body     []byte
	RPC      string // JSON-RPC method, at a Remote; "GET" and "DELETE" for those
	Tool     string // of a tools/call
}

// recorder remembers requests and, apart from them, secrets.
type recorder struct {
	mu       sync.Mutex
	requests []Request
	secrets  []string
}

// Requests returns what an endpoint received, oldest first; of all of them
// for "".
func (c *recorder) Requests(endpoint string) []Request {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(c.requests), func(r Request) bool {
		return endpoint != "" && r.Endpoint != endpoint
	})
}

// Count returns how many requests an endpoint received.
func (c *recorder) Count(endpoint string) int { return len(c.Requests(endpoint)) }

// Forget drops the requests recorded so far.
func (c *recorder) Forget() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.requests = nil
}

// Secrets returns everything that came by which no log may contain.
func (c *recorder) Secrets() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.secrets)
}

func (c *recorder) secret(values ...string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, value := range values {
		if value != "" && !slices.Contains(c.secrets, value) {
			c.secrets = append(c.secrets, value)
		}
	}
}

// record reads the request, leaving its body to be read again.
func (c *recorder) record(endpoint string, r *http.Request) Request {
	body, _ := io.ReadAll(io.LimitReader(r.Body, 64<<20)) // cut short: the client left
	r.Body = io.NopCloser(bytes.NewReader(body))
	got := Request{
		Endpoint: endpoint, Method: r.Method, Path: r.URL.Path, Query: r.URL.Query(),
		Header: maps.Clone(r.Header), Body: body,
	}
	if r.Header.Get("Content-Type") == "application/x-www-form-urlencoded" {
		got.Form, _ = url.ParseQuery(string(body)) // the endpoint says what is wrong with it
	}
	if endpoint == EndpointMCP {
		call := callOf(r.Method, body)
		got.RPC, got.Tool = call.Method, call.Params.Name
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.requests = append(c.requests, got)
	return got
}
