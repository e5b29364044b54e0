package authtest

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/modelcontextprotocol/go-sdk/auth"
	"github.com/modelcontextprotocol/go-sdk/mcp"
)

// RemoteConfig says how a [Remote] is started.
type RemoteConfig struct {
	AS        Authority // whose tokens it accepts; nil: no sign-in at all
	MountAS   *AS       // served at the remote's own origin too, and AS if that is nil
	Path      string    // of the MCP endpoint; "" is "/mcp", "/" the bare origin
	Stateless bool      // protocol 2026-07-28, older ones without a session
	JSON      bool      // application/json answers instead of event streams
	TLS       bool      // https, by the certificate in CA
	Name      string    // serverInfo.name; "" is "authtest"
}

// Values of [RemoteKnobs.DocumentAt] beside those a test makes up.
const (
	ResourceRoot = "/.well-known/oauth-protected-resource"
	// ResourcePath stands for ResourceRoot followed by the endpoint's path.
	ResourcePath = "path"
)

// RemoteKnobs are the ways a [Remote] misbehaves; the zero value behaves.
type RemoteKnobs struct {
	Open     bool   // no token is asked for
	Audience string // that tokens must be for; "": the URL

	// The challenge.
	Challenge      string              // WWW-Authenticate of a 401, verbatim; "-": none; "": as it should be
	NoHeaderURL    bool                // without resource_metadata
	HeaderURL      string              // resource_metadata, verbatim; "": the first of DocumentAt
	ChallengeScope []string            // scope of the challenge
	ToolScopes     map[string][]string // scopes that a tool needs: 403 insufficient_scope without

	// The protected resource document.
	DocumentAt []string       // paths that answer; nil: ResourcePath; empty: none
	Document   map[string]any // members to set; a nil value removes the member
	Scopes     []string       // scopes_supported

	// Raw tools and results, served byte for byte.
	Tools   []json.RawMessage                                                                          // definitions; nil: those it has
	List    func(cursor string) json.RawMessage                                                        // the whole result of tools/list
	Results map[string]json.RawMessage                                                                 // of a tool, the whole result
	Call    func(ctx context.Context, tool string, arguments json.RawMessage) (json.RawMessage, error) // of any tool; nil, nil: as if it were not set; ctx ends with the test

	// In front of the endpoints: MCP before the token is looked at, Called after.
	Resource, MCP, Called Intercept
}

// Remote is an MCP server by the SDK, behind a bearer check. Its tools are
// echo (returns its text), whoami (the token's subject), and add (of a and b).
type Remote struct {
	recorder
	URL    string // of the MCP endpoint
	Origin string
	CA     []byte // with TLS: the certificate to trust, PEM
	cfg    RemoteConfig
	path   string // "" for "/"
	t      testing.TB
	ctx    context.Context // ends with the test

	mu      sync.Mutex // guards what follows
	knobs   RemoteKnobs
	server  *mcp.Server
	handler http.Handler
	http    *httptest.Server
}

// NewRemote starts a remote on loopback, until the test ends.
func NewRemote(t testing.TB, cfg RemoteConfig) *Remote {
	t.Helper()
	if cfg.Path == "" {
		cfg.Path = "/mcp"
	}
	if cfg.Name == "" {
		cfg.Name = "authtest"
	}
	if cfg.AS == nil && cfg.MountAS != nil {
		cfg.AS = cfg.MountAS
	}
	ctx, cancel := context.WithCancel(context.Background())
	r := &Remote{cfg: cfg, path: strings.TrimSuffix(cfg.Path, "/"), t: t, ctx: ctx}
	r.fresh()
	t.Cleanup(func() {
		cancel()
		r.endSessions()
	})
	r.http, r.CA = startServer(t, http.HandlerFunc(r.serve), "", cfg.TLS)
	r.Origin = r.http.URL
	r.URL = r.Origin + r.path
	if cfg.MountAS != nil {
		cfg.MountAS.mount(r.Origin)
	}
	return r
}

// Set changes knobs.
func (r *Remote) Set(change func(*RemoteKnobs)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	change(&r.knobs)
}

// Calls returns how many requests had this JSON-RPC method ("GET" and
// "DELETE" count those of HTTP), whether they were let in or not.
func (r *Remote) Calls(method string) int {
	n := 0
	for _, got := range r.Requests(EndpointMCP) {
		if got.RPC == method {
			n++
		}
	}
	return n
}

// ToolCalls returns how many tools/call requests named this tool.
func (r *Remote) ToolCalls(tool string) int {
	n := 0
	for _, got := range r.Requests(EndpointMCP) {
		if got.RPC == "tools/call" && got.Tool == tool {
			n++
		}
	}
	return n
}

// Tokens returns the bearer tokens seen, each once, oldest first.
func (r *Remote) Tokens() []string {
	var tokens []string
	for _, got := range r.Requests("") {
		if token := bearer(got.Header); token != "" && !slices.Contains(tokens, token) {
			tokens = append(tokens, token)
		}
	}
	return tokens
}

// AddTool adds a tool that returns its own name; clients are told.
func (r *Remote) AddTool(name string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.server.AddTool(&mcp.Tool{Name: name, Description: "Returns its name.", InputSchema: json.RawMessage(`{"type":"object"}`)},
		func(context.Context, *mcp.CallToolRequest) (*mcp.CallToolResult, error) {
			return &mcp.CallToolResult{Content: []mcp.Content{&mcp.TextContent{Text: name}}}, nil
		})
}

// RemoveTool removes a tool; clients are told.
func (r *Remote) RemoveTool(name string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.server.RemoveTools(name)
}

// Server returns the SDK's server, for what has no method here. A Restart
// replaces it.
func (r *Remote) Server() *mcp.Server {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.server
}

// Down closes the listener and every connection.
func (r *Remote) Down() {
	r.mu.Lock()
	server := r.http
	r.mu.Unlock()
	server.CloseClientConnections()
	server.Close()
}

// Up listens again, on the same port. Sessions from before are still known.
func (r *Remote) Up() {
	r.t.Helper()
	origin, err := url.Parse(r.Origin)
	if err != nil {
		r.t.Fatal(err)
	}
	server, _ := startServer(r.t, http.HandlerFunc(r.serve), origin.Host, r.cfg.TLS)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.http = server
}

// Restart is Down, forgetting all sessions, and Up.
func (r *Remote) Restart() {
	r.t.Helper()
	r.Down()
	r.ForgetSessions()
	r.Up()
}

// ForgetSessions ends all sessions: to their ids the answer is 404 now.
func (r *Remote) ForgetSessions() {
	r.endSessions()
	r.fresh()
}

func (r *Remote) endSessions() {
	for session := range r.Server().Sessions() {
		session.Close()
	}
}

// fresh makes the SDK's server and handler anew.
func (r *Remote) fresh() {
	server := mcp.NewServer(&mcp.Implementation{Name: r.cfg.Name, Version: "1.0.0"}, &mcp.ServerOptions{
		Capabilities: &mcp.ServerCapabilities{Tools: &mcp.ToolCapabilities{ListChanged: true}},
	})
	type echo struct {
		Text string `json:"text" jsonschema:"what to return"`
	}
	mcp.AddTool(server, &mcp.Tool{Name: "echo", Description: "Returns its text."},
		func(_ context.Context, _ *mcp.CallToolRequest, in echo) (*mcp.CallToolResult, any, error) {
			return text(in.Text), nil, nil
		})
	mcp.AddTool(server, &mcp.Tool{Name: "whoami", Description: "Says who the token is for."},
		func(_ context.Context, req *mcp.CallToolRequest, _ struct{}) (*mcp.CallToolResult, any, error) {
			if req.Extra == nil || req.Extra.TokenInfo == nil {
				return text("anonymous"), nil, nil
			}
			return text(req.Extra.TokenInfo.UserID), nil, nil
		})
	type sum struct {
		A float64 `json:"a"`
		B float64 `json:"b"`
	}
	mcp.AddTool(server, &mcp.Tool{Name: "add", Description: "Adds two numbers."},
		func(_ context.Context, _ *mcp.CallToolRequest, in sum) (*mcp.CallToolResult, any, error) {
			return text(fmt.Sprint(in.A + in.B)), nil, nil
		})
	server.AddReceivingMiddleware(r.raw)
	handler := mcp.NewStreamableHTTPHandler(func(*http.Request) *mcp.Server { return server }, &mcp.StreamableHTTPOptions{
		Stateless: r.cfg.Stateless, JSONResponse: r.cfg.JSON, PropagateRequestCancellation: r.cfg.Stateless,
		MaxRequestBodyBytes: 64 << 20,
	})
	r.mu.Lock()
	defer r.mu.Unlock()
	r.server, r.handler = server, handler
}

func text(s string) *mcp.CallToolResult {
	return &mcp.CallToolResult{Content: []mcp.Content{&mcp.TextContent{Text: s}}}
}

// rawResult is a result that is sent as it is.
type rawResult struct {
	mcp.ResultBase
	raw json.RawMessage
}

func (r *rawResult) MarshalJSON() ([]byte, error) { return r.raw, nil }

// raw answers with what the knobs say.
func (r *Remote) raw(next mcp.MethodHandler) mcp.MethodHandler {
	return func(ctx context.Context, method string, req mcp.Request) (mcp.Result, error) {
		r.mu.Lock()
		k := r.knobs
		r.mu.Unlock()
		switch params := req.GetParams().(type) {
		case *mcp.ListToolsParams:
			if k.List != nil {
				return &rawResult{raw: k.List(params.Cursor)}, nil
			}
			if k.Tools != nil {
				// A list that is only raw in part: the rest is as either era wants it.
				list, err := json.Marshal(map[string]any{
					"tools": k.Tools, "resultType": "complete", "ttlMs": 0, "cacheScope": "private",
				})
				return &rawResult{raw: list}, err
			}
		case *mcp.CallToolParamsRaw:
			if result, ok := k.Results[params.Name]; ok {
				return &rawResult{raw: result}, nil
			}
			if k.Call != nil {
				ctx, cancel := context.WithCancel(ctx)
				defer cancel()
				defer context.AfterFunc(r.ctx, cancel)()
				result, err := k.Call(ctx, params.Name, params.Arguments)
				if err != nil {
					return nil, err
				}
				if result != nil {
					return &rawResult{raw: result}, nil
				}
			}
		}
		return next(ctx, method, req)
	}
}

// rpcCall is what a body asks for.
type rpcCall struct {
	Method string `json:"method"`
	Params struct {
		Name string `json:"name"`
	} `json:"params"`
}

func callOf(httpMethod string, body []byte) rpcCall {
	if httpMethod != http.MethodPost {
		return rpcCall{Method: httpMethod}
	}
	var call rpcCall
	if json.Unmarshal(body, &call) == nil {
		return call
	}
	var batch []rpcCall
	if json.Unmarshal(body, &batch) == nil && len(batch) > 0 {
		return batch[0]
	}
	return rpcCall{}
}

func bearer(h http.Header) string {
	scheme, token, _ := strings.Cut(h.Get("Authorization"), " ")
	if !strings.EqualFold(scheme, "Bearer") {
		return ""
	}
	return token
}

// documentPaths returns where the document is.
func (r *Remote) documentPaths(k RemoteKnobs) []string {
	places := k.DocumentAt
	if places == nil {
		places = []string{ResourcePath}
	}
	paths := make([]string, len(places))
	for i, place := range places {
		if place == ResourcePath {
			place = ResourceRoot + r.path
		}
		paths[i] = place
	}
	return paths
}

func (r *Remote) serve(w http.ResponseWriter, req *http.Request) {
	r.mu.Lock()
	k, handler := r.knobs, r.handler
	r.mu.Unlock()
	switch path := strings.TrimSuffix(req.URL.Path, "/"); {
	case path == r.path:
		got := r.record(EndpointMCP, req)
		r.secret(req.Header.Get("Mcp-Session-Id"))
		req = withRPC(req, callOf(req.Method, got.Body))
		k.MCP.serve(w, req, func(w http.ResponseWriter, req *http.Request) {
			r.authorize(w, req, k, func(w http.ResponseWriter, req *http.Request) {
				k.Called.serve(w, req, handler.ServeHTTP)
			})
		})
	case slices.Contains(r.documentPaths(k), req.URL.Path) && r.cfg.AS != nil:
		r.record(EndpointResource, req)
		k.Resource.serve(w, req, func(w http.ResponseWriter, _ *http.Request) {
			doc := map[string]any{
				"resource": r.URL, "authorization_servers": []string{r.cfg.AS.Issuer()},
				"bearer_methods_supported": []string{"header"},
			}
			if k.Scopes != nil {
				doc["scopes_supported"] = k.Scopes
			}
			override(doc, k.Document)
			writeJSON(w, http.StatusOK, doc)
		})
	case r.cfg.MountAS != nil && r.cfg.MountAS.owns(req.URL.Path):
		r.cfg.MountAS.ServeHTTP(w, req)
	default:
		r.record(EndpointOther, req)
		http.NotFound(w, req)
	}
}

// authorize lets requests in whose token is right.
func (r *Remote) authorize(w http.ResponseWriter, req *http.Request, k RemoteKnobs, next http.HandlerFunc) {
	if k.Open || r.cfg.AS == nil {
		next(w, req)
		return
	}
	var challenge []string
	if url := k.HeaderURL; url != "" {
		challenge = append(challenge, fmt.Sprintf(`resource_metadata="%s"`, url))
	} else if paths := r.documentPaths(k); !k.NoHeaderURL && len(paths) > 0 {
		challenge = append(challenge, fmt.Sprintf(`resource_metadata="%s"`, r.Origin+paths[0]))
	}
	refuse := func(status int, more ...string) {
		value := k.Challenge
		if value == "" || status != http.StatusUnauthorized {
			value = strings.TrimSpace("Bearer " + strings.Join(append(more, challenge...), ", "))
		}
		if value != "-" {
			w.Header().Set("WWW-Authenticate", value)
		}
		http.Error(w, http.StatusText(status), status)
	}
	token := bearer(req.Header)
	info, ok := r.cfg.AS.Valid(token)
	if audience := cmp.Or(k.Audience, r.URL); !ok || info.Audience != audience && !slices.Contains(info.Also, audience) {
		var more []string
		// RFC 6750, section 3.1: without any token there "SHOULD NOT" be an error.
		if token != "" {
			more = append(more, `error="invalid_token"`)
		}
		if len(k.ChallengeScope) > 0 {
			more = append(more, fmt.Sprintf("scope=%q", strings.Join(k.ChallengeScope, " ")))
		}
		refuse(http.StatusUnauthorized, more...)
		return
	}
	call, _ := req.Context().Value(rpcKey{}).(rpcCall)
	if need := k.ToolScopes[call.Params.Name]; call.Method == "tools/call" &&
		slices.ContainsFunc(need, func(s string) bool { return !slices.Contains(info.Scopes, s) }) {
		refuse(http.StatusForbidden, `error="insufficient_scope"`, fmt.Sprintf("scope=%q", strings.Join(need, " ")))
		return
	}
	// The SDK's own check puts what is known of the token where tools find it.
	known := func(context.Context, string, *http.Request) (*auth.TokenInfo, error) {
		return &auth.TokenInfo{UserID: info.Subject, Scopes: info.Scopes}, nil
	}
	auth.RequireBearerToken(known, &auth.RequireBearerTokenOptions{AllowMissingExpiration: true})(next).ServeHTTP(w, req)
}
