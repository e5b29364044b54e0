package demo

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/modelcontextprotocol/go-sdk/auth"
	"github.com/modelcontextprotocol/go-sdk/mcp"
	"github.com/modelcontextprotocol/go-sdk/oauthex"
	"github.com/zitadel/oidc/v3/pkg/client/rp"
	"github.com/zitadel/oidc/v3/pkg/oidc"
	"github.com/zitadel/oidc/v3/pkg/op"
)

// scopeNotes is the scope that the remote demands.
const scopeNotes = "notes"

// remote is the protected MCP server: notes for each user, and two toys.
type remote struct {
	origin, url, issuer string
	transport           *http.Transport // towards the provider
	verifier            *op.AccessTokenVerifier

	mu    sync.Mutex
	notes map[string][]string // by issuer and subject
}

func newRemote(origin, issuer string) *remote {
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.Proxy = nil // the provider is on this machine
	keys := rp.NewRemoteKeySet(&http.Client{Transport: transport, Timeout: 10 * time.Second}, issuer+"/keys")
	return &remote{
		origin: origin, url: origin + "/mcp", issuer: issuer, transport: transport,
		verifier: op.NewAccessTokenVerifier(issuer, keys),
		notes:    make(map[string][]string),
	}
}

func (r *remote) close() { r.transport.CloseIdleConnections() }

const documentPath = "/.well-known/oauth-protected-resource"

// handler returns all that the remote serves.
func (r *remote) handler() http.Handler {
	server := r.server()
	// Stateless serves clients of every protocol version, and nothing is left
	// of them when they go.
	handler := mcp.NewStreamableHTTPHandler(func(*http.Request) *mcp.Server { return server },
		&mcp.StreamableHTTPOptions{Stateless: true, PropagateRequestCancellation: true})
	document := auth.ProtectedResourceMetadataHandler(&oauthex.ProtectedResourceMetadata{
		Resource:               r.url,
		ResourceName:           "Demo notes",
		AuthorizationServers:   []string{r.issuer},
		ScopesSupported:        []string{oidc.ScopeOpenID, oidc.ScopeProfile, scopeNotes},
		BearerMethodsSupported: []string{"header"},
	})
	mux := http.NewServeMux()
	mux.Handle("/mcp", http.NewCrossOriginProtection().Handler(r.protect(handler)))
	mux.Handle("GET "+documentPath+"/mcp", document)
	return mux
}

// protect lets requests in whose token is for this server.
func (r *remote) protect(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		scheme, token, _ := strings.Cut(req.Header.Get("Authorization"), " ")
		if !strings.EqualFold(scheme, "Bearer") || token == "" {
			// RFC 6750, section 3.1: if there is no token at all, "the resource
			// server SHOULD NOT include an error code".
			r.refuse(w, http.StatusUnauthorized, "")
			return
		}
		info, err := r.verify(req.Context(), token)
		if err != nil {
			r.refuse(w, http.StatusUnauthorized, "invalid_token")
			return
		}
		if !slices.Contains(info.Scopes, scopeNotes) {
			r.refuse(w, http.StatusForbidden, "insufficient_scope")
			return
		}
		// The SDK's own middleware puts what is known where tools find it.
		known := func(context.Context, string, *http.Request) (*auth.TokenInfo, error) { return info, nil }
		auth.RequireBearerToken(known, nil)(next).ServeHTTP(w, req)
	})
}

// refuse answers with a challenge.
//
// RFC 9728, section 5.1: the resource_metadata parameter holds "The URL of the
// protected resource metadata."
func (r *remote) refuse(w http.ResponseWriter, status int, code string) {
	challenge := fmt.Sprintf(`Bearer resource_metadata="%s%s/mcp", scope="%s"`, r.origin, documentPath, scopeNotes)
	if code != "" {
		challenge += fmt.Sprintf(`, error="%s"`, code)
	}
	w.Header().Set("WWW-Authenticate", challenge)
	http.Error(w, http.StatusText(status), status)
}

// verify checks a token: signature, issuer and expiry, then the audience.
func (r *remote) verify(ctx context.Context, token string) (*auth.TokenInfo, error) {
	// The key set fetches for all who wait, so one who leaves must not end it.
	claims, err := op.VerifyAccessToken[*oidc.AccessTokenClaims](context.WithoutCancel(ctx), token, r.verifier)
	if err != nil {
		return nil, err
	}
	// MCP authorization: servers "MUST validate that access tokens were issued
	// specifically for them as the intended audience". An ID token, which has
	// that audience too, has no scope.
	if !slices.Contains(claims.Audience, r.url) || len(claims.Scopes) == 0 || claims.Subject == "" {
		return nil, auth.ErrInvalidToken
	}
	return &auth.TokenInfo{
		UserID: claims.Issuer + "|" + claims.Subject, Scopes: claims.Scopes, Expiration: claims.Expiration.AsTime(),
		Extra: map[string]any{"subject": claims.Subject, "client": claims.ClientID},
	}, nil
}

// Bounds of what one user may keep.
const (
	maxNotes = 100
	maxNote  = 2000
)

func (r *remote) server() *mcp.Server {
	server := mcp.NewServer(&mcp.Implementation{Name: "gatehouse-demo-notes", Title: "Demo notes", Version: "1.0.0"}, &mcp.ServerOptions{
		Instructions: "Notes of the person who signed in, kept until the demo ends.",
		Capabilities: new(mcp.ServerCapabilities),
		SetCacheable: func(_ context.Context, _ mcp.Request, c *mcp.Cacheable) { c.CacheScope = "private" },
	})
	no := new(false)
	type note struct {
		Text string `json:"text" jsonschema:"what to write down"`
	}
	mcp.AddTool(server, &mcp.Tool{
		Name: "add_note", Title: "Add a note", Description: "Writes down a note for the person who is signed in.",
		Annotations: &mcp.ToolAnnotations{DestructiveHint: no, OpenWorldHint: no},
	}, func(_ context.Context, req *mcp.CallToolRequest, in note) (*mcp.CallToolResult, any, error) {
		text := strings.TrimSpace(in.Text)
		if text == "" || len(text) > maxNote {
			return nil, nil, fmt.Errorf("a note has between 1 and %d bytes", maxNote)
		}
		n, err := r.addNote(req.Extra.TokenInfo.UserID, text)
		if err != nil {
			return nil, nil, err
		}
		return say("Noted. You have %d %s now.", n, plural(n, "note")), nil, nil
	})
	mcp.AddTool(server, &mcp.Tool{
		Name: "list_notes", Title: "List notes", Description: "Lists the notes of the person who is signed in, oldest first.",
		Annotations: &mcp.ToolAnnotations{ReadOnlyHint: true, OpenWorldHint: no},
	}, func(_ context.Context, req *mcp.CallToolRequest, _ struct{}) (*mcp.CallToolResult, any, error) {
		notes := r.notesOf(req.Extra.TokenInfo.UserID)
		if len(notes) == 0 {
			return say("There are no notes yet."), nil, nil
		}
		var list strings.Builder
		for i, note := range notes {
			fmt.Fprintf(&list, "%d. %s\n", i+1, note)
		}
		return say("%s", list.String()), nil, nil
	})
	mcp.AddTool(server, &mcp.Tool{
		Name: "whoami", Title: "Who am I?", Description: "Says whom the access token is for, what it allows and until when. Never the token.",
		Annotations: &mcp.ToolAnnotations{ReadOnlyHint: true, OpenWorldHint: no},
	}, func(_ context.Context, req *mcp.CallToolRequest, _ struct{}) (*mcp.CallToolResult, any, error) {
		info := req.Extra.TokenInfo
		left := time.Until(info.Expiration).Round(time.Second)
		return say("You are %v, says %s.\nYour token is for %s only, allows %s, and expires in %s.",
			info.Extra["subject"], r.issuer, r.url, strings.Join(info.Scopes, ", "), left), nil, nil
	})
	type roll struct {
		Sides int `json:"sides,omitempty" jsonschema:"of each die, 6 unless said otherwise"`
		Count int `json:"count,omitempty" jsonschema:"how many dice, 1 unless said otherwise"`
	}
	mcp.AddTool(server, &mcp.Tool{
		Name: "roll_dice", Title: "Roll dice", Description: "Rolls dice.",
		Annotations: &mcp.ToolAnnotations{ReadOnlyHint: true, OpenWorldHint: no},
	}, func(_ context.Context, _ *mcp.CallToolRequest, in roll) (*mcp.CallToolResult, any, error) {
		if in.Sides == 0 {
			in.Sides = 6
		}
		if in.Count == 0 {
			in.Count = 1
		}
		if in.Sides < 2 || in.Sides > 1000 || in.Count < 1 || in.Count > 100 {
			return nil, nil, fmt.Errorf("dice have 2 to 1000 sides, and there are 1 to 100 of them")
		}
		sum, rolled := 0, make([]string, in.Count)
		for i := range rolled {
			n := rand.IntN(in.Sides) + 1
			sum += n
			rolled[i] = fmt.Sprint(n)
		}
		if in.Count == 1 {
			return say("%d", sum), nil, nil
		}
		return say("%s, which is %d", strings.Join(rolled, " + "), sum), nil, nil
	})
	return server
}

func say(format string, args ...any) *mcp.CallToolResult {
	return &mcp.CallToolResult{Content: []mcp.Content{&mcp.TextContent{Text: fmt.Sprintf(format, args...)}}}
}

func plural(n int, word string) string {
	if n == 1 {
		return word
	}
	return word + "s"
}

func (r *remote) addNote(user, text string) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.notes[user]) >= maxNotes {
		return 0, fmt.Errorf("there are %d notes already, and the demo keeps no more", maxNotes)
	}
	r.notes[user] = append(r.notes[user], text)
	return len(r.notes[user]), nil
}

func (r *remote) notesOf(user string) []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.notes[user])
}
