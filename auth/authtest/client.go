package authtest

import (
	"context"
	"encoding/json"
	"maps"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/modelcontextprotocol/go-sdk/mcp"
)

// Protocol versions of the two eras.
const (
	ProtocolLegacy = "2025-11-25"
	ProtocolModern = "2026-07-28"
)

// ClientConfig says how a [Client] connects.
type ClientConfig struct {
	URL       string
	Transport mcp.Transport // instead of URL, for stdio
	Protocol  string        // "" is ProtocolLegacy
	Header    http.Header   // of every request
	Token     string        // sent as a bearer token
	NoStream  bool          // legacy: no GET stream, and so no notifications

	// Elicit answers elicitations; setting it declares them, and URL says that
	// they may be of mode "url".
	Elicit    func(context.Context, *mcp.ElicitRequest) (*mcp.ElicitResult, error)
	ElicitURL bool
	// NoRetry leaves input_required and -32042 to the test.
	NoRetry bool
}

// Client is an MCP client that remembers what it was notified of.
type Client struct {
	*mcp.ClientSession
	t         testing.TB
	transport *http.Transport

	mu       sync.Mutex
	changed  int
	complete []string
	woken    chan struct{} // closed, and replaced, at every notification
}

// Legacy connects with protocol 2025-11-25.
func Legacy(t testing.TB, url string) *Client {
	t.Helper()
	return Connect(t, ClientConfig{URL: url})
}

// Modern connects with protocol 2026-07-28.
func Modern(t testing.TB, url string) *Client {
	t.Helper()
	return Connect(t, ClientConfig{URL: url, Protocol: ProtocolModern})
}

// Connect connects a client, until the test ends.
func Connect(t testing.TB, cfg ClientConfig) *Client {
	t.Helper()
	c, err := TryConnect(t, cfg)
	if err != nil {
		t.Fatalf("authtest: connecting a client: %v", err)
	}
	return c
}

// TryConnect is [Connect] where failing may be right.
func TryConnect(t testing.TB, cfg ClientConfig) (*Client, error) {
	c := &Client{t: t, woken: make(chan struct{})}
	capabilities := new(mcp.ClientCapabilities)
	if cfg.Elicit != nil {
		capabilities.Elicitation = &mcp.ElicitationCapabilities{Form: &mcp.FormElicitationCapabilities{}}
		if cfg.ElicitURL {
			capabilities.Elicitation.URL = &mcp.URLElicitationCapabilities{}
		}
	}
	options := &mcp.ClientOptions{
		Capabilities:           capabilities,
		ElicitationHandler:     cfg.Elicit,
		ToolListChangedHandler: func(context.Context, *mcp.ToolListChangedRequest) { c.note(func() { c.changed++ }) },
		ElicitationCompleteHandler: func(_ context.Context, r *mcp.ElicitationCompleteNotificationRequest) {
			c.note(func() { c.complete = append(c.complete, r.Params.ElicitationID) })
		},
	}
	if cfg.NoRetry {
		options.MultiRoundTrip = &mcp.MultiRoundTripOptions{Disabled: true}
	}
	transport := cfg.Transport
	if transport == nil {
		c.transport = http.DefaultTransport.(*http.Transport).Clone()
		c.transport.Proxy = nil
		header := cfg.Header.Clone()
		if cfg.Token != "" {
			if header == nil {
				header = make(http.Header)
			}
			header.Set("Authorization", "Bearer "+cfg.Token)
		}
		transport = &mcp.StreamableClientTransport{
			Endpoint: cfg.URL, DisableStandaloneSSE: cfg.NoStream,
			HTTPClient: &http.Client{Transport: withHeader{c.transport, header}},
		}
	}
	protocol := cfg.Protocol
	if protocol == "" {
		protocol = ProtocolLegacy
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	session, err := mcp.NewClient(&mcp.Implementation{Name: "authtest-client", Version: "1.0.0"}, options).
		Connect(ctx, transport, &mcp.ClientSessionOptions{ProtocolVersion: protocol})
	if err != nil {
		if c.transport != nil {
			c.transport.CloseIdleConnections()
		}
		return nil, err
	}
	c.ClientSession = session
	t.Cleanup(func() {
		session.Close()
		if c.transport != nil {
			c.transport.CloseIdleConnections()
		}
	})
	return c, nil
}

// patience is how long helpers wait for what should come at once.
const patience = 30 * time.Second

// withHeader adds headers to every request.
type withHeader struct {
	next   http.RoundTripper
	header http.Header
}

func (h withHeader) RoundTrip(req *http.Request) (*http.Response, error) {
	if len(h.header) > 0 {
		req = req.Clone(req.Context())
		maps.Copy(req.Header, h.header)
	}
	return h.next.RoundTrip(req)
}

func (c *Client) note(change func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	change()
	close(c.woken)
	c.woken = make(chan struct{})
}

// Changed returns how many tools/list_changed notifications came so far.
func (c *Client) Changed() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.changed
}

// Completed returns the ids of elicitation/complete notifications so far.
func (c *Client) Completed() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]string(nil), c.complete...)
}

// WaitChanged waits until more than n tools/list_changed notifications came.
func (c *Client) WaitChanged(ctx context.Context, n int) error {
	for {
		c.mu.Lock()
		enough, woken := c.changed > n, c.woken
		c.mu.Unlock()
		if enough {
			return nil
		}
		select {
		case <-woken:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Call calls a tool; an error that is not the tool's own fails the test.
func (c *Client) Call(tool string, arguments any) *mcp.CallToolResult {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), patience)
	defer cancel()
	if arguments == nil {
		arguments = map[string]any{}
	}
	result, err := c.CallTool(ctx, &mcp.CallToolParams{Name: tool, Arguments: arguments})
	if err != nil {
		c.t.Errorf("authtest: calling %s: %v", tool, err)
		return &mcp.CallToolResult{IsError: true}
	}
	return result
}

// Tools returns the names of the tools, in the order of the list.
func (c *Client) Tools() []string {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), patience)
	defer cancel()
	var names []string
	for tool, err := range c.ClientSession.Tools(ctx, nil) {
		if err != nil {
			c.t.Errorf("authtest: listing tools: %v", err)
			return names
		}
		names = append(names, tool.Name)
	}
	return names
}

// Text returns the text of a result, its parts on lines of their own.
func Text(result *mcp.CallToolResult) string {
	var lines []string
	for _, content := range result.Content {
		if t, ok := content.(*mcp.TextContent); ok {
			lines = append(lines, t.Text)
		}
	}
	return strings.Join(lines, "\n")
}

// AuthRequired is the JSON by which the gateway asks for a sign-in.
type AuthRequired struct {
	Status     string `json:"status"`
	AuthURL    string `json:"auth_url"`
	ServerName string `json:"server_name"`
	Message    string `json:"message"`
}

// RequiredOf returns the sign-in that a result asks for, if it does.
func RequiredOf(result *mcp.CallToolResult) (AuthRequired, bool) {
	if !result.IsError {
		return AuthRequired{}, false
	}
	for _, content := range result.Content {
		t, ok := content.(*mcp.TextContent)
		var required AuthRequired
		if ok && json.Unmarshal([]byte(t.Text), &required) == nil && required.Status == "auth_required" {
			return required, true
		}
	}
	return AuthRequired{}, false
}
