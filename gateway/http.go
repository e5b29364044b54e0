package gateway

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"math"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/google/uuid"
	"github.com/modelcontextprotocol/go-sdk/jsonrpc"
	"github.com/modelcontextprotocol/go-sdk/mcp"

	"gatehouse/auth"
	"gatehouse/session"
	"gatehouse/session/rawjson"
)

// Where supervisors look whether the process lives, and whether it takes calls.
const (
	healthPath = "/healthz"
	readyPath  = "/readyz"
)

// Handler returns everything that `gatehouse serve` answers.
func (g *Gateway) Handler() http.Handler {
	mux := http.NewServeMux()
	g.pageRoutes(mux)
	mux.Handle(mcpPath, g.guardOrigin(http.HandlerFunc(g.serveMCP)))
	if g.users {
		mux.HandleFunc(resourcePath+mcpPath, g.serveResource)
		mux.HandleFunc(resourcePath, g.serveResource)
	}
	g.sseRoutes(mux)
	mux.HandleFunc("GET "+healthPath, func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "ok\n") })
	mux.HandleFunc("GET "+readyPath, g.serveReady)
	if g.cfg.Gateway.Metrics.Listen == "" {
		mux.HandleFunc("GET /metrics", g.serveMetrics)
	}
	return g.guardHost(mux)
}

// PageHandler returns the pages alone, for the loopback listener of stdio.
func (g *Gateway) PageHandler() http.Handler {
	mux := http.NewServeMux()
	g.pageRoutes(mux)
	if g.identity != "" {
		mux.HandleFunc("GET "+IdentityPath, func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, g.identity) })
	}
	return g.guardHost(mux)
}

// IdentityPath is where a process that serves the pages says which sign-ins it
// can finish ([Setup].Identity).
const IdentityPath = "/.well-known/gatehouse"

// pageRoutes adds the routes that a browser or an authorization server meets.
// Methods are checked inside: "GET" in a pattern would let HEAD through, and a
// HEAD must not use up a state.
func (g *Gateway) pageRoutes(mux *http.ServeMux) {
	g.homeRoutes(mux)
	g.userRoutes(mux)
	if !g.cfg.Gateway.OAuth.Enabled {
		return
	}
	mux.HandleFunc("/connect/{flow}", g.page(g.serveConnect, g.connectMethods()...))
	callbacks := []string{g.cfg.Gateway.OAuth.CallbackPath}
	for _, server := range g.cfg.Running() {
		if path := server.Auth.CallbackPath; path != "" && !slices.Contains(callbacks, path) {
			callbacks = append(callbacks, path)
		}
	}
	for _, path := range callbacks {
		mux.HandleFunc(path, g.page(g.serveCallback, http.MethodGet))
	}
	mux.HandleFunc(callbacks[0]+"/{remote}", g.page(g.serveCallback, http.MethodGet))
	if document := g.auth.ClientMetadata(); document != nil {
		mux.HandleFunc(g.cfg.Gateway.OAuth.MetadataPath, serveClientMetadata(document))
	}
}

// connectMethods: only where there is a page to continue from can it be posted.
func (g *Gateway) connectMethods() []string {
	if g.onLoopback() && !g.users {
		return []string{http.MethodGet}
	}
	return []string{http.MethodGet, http.MethodPost}
}

func (g *Gateway) serveReady(w http.ResponseWriter, _ *http.Request) {
	g.mu.Lock()
	closed := g.closed
	g.mu.Unlock()
	if closed {
		http.Error(w, "shutting down", http.StatusServiceUnavailable)
		return
	}
	io.WriteString(w, "ready\n")
}

// serveMetrics serves the metrics to this machine: whoever comes from elsewhere
// has no business with them, and nothing here would tell who that is.
func (g *Gateway) serveMetrics(w http.ResponseWriter, r *http.Request) {
	if g.fromElsewhere(r) {
		http.Error(w, "metrics are served to this machine only; gateway.metrics.listen is an address of their own", http.StatusForbidden)
		return
	}
	g.metrics.Handler().ServeHTTP(w, r)
}

// guardHost refuses requests for a name that is not the gateway's: a foreign
// page whose name was rebound to this address sends its own. Probes come by whatever
// address there is, and learn nothing that matters.
func (g *Gateway) guardHost(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != healthPath && r.URL.Path != readyPath && !g.hostAllowed(r.Host) {
			g.log.Warn("request refused: Host is not allowed (gateway.allowedHosts)", "method", r.Method, "host", printable(r.Host))
			g.refused(r, auth.Principal{}, "host")
			http.Error(w, "Forbidden: this Host is not served here; gateway.allowedHosts lists the names that are", http.StatusForbidden)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// printable is as much of foreign text as a log may hold.
func printable(s string) string {
	const most = 100
	s = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, s[:min(len(s), most)])
	return s
}

// guardOrigin refuses what a foreign page sends. MCP, streamable HTTP: "Servers
// MUST validate the Origin header on all incoming connections to prevent DNS
// rebinding attacks."
func (g *Gateway) guardOrigin(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if origins := r.Header.Values("Origin"); len(origins) > 0 && !g.originAllowed(origins, r.Host) {
			g.log.Warn("request refused: foreign Origin", "method", r.Method)
			g.refused(r, auth.Principal{}, "origin")
			http.Error(w, "Forbidden: requests from pages of another origin are not served", http.StatusForbidden)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// hostAllowed: loopback names, the public URL's host, and gateway.allowedHosts.
func (g *Gateway) hostAllowed(hostport string) bool {
	host := hostOf(hostport)
	if isLoopbackName(host) {
		return true
	}
	if public, err := url.Parse(g.publicURL); err == nil && strings.EqualFold(public.Host, hostport) {
		return true
	}
	return slices.ContainsFunc(g.cfg.Gateway.AllowedHosts, func(allowed string) bool {
		return strings.EqualFold(allowed, hostport) || strings.EqualFold(allowed, host)
	})
}

// originAllowed: the origin that the request itself is for, and the public URL's.
func (g *Gateway) originAllowed(origins []string, host string) bool {
	if len(origins) != 1 {
		return false
	}
	origin, err := url.Parse(origins[0])
	if err != nil || origin.Scheme != "http" && origin.Scheme != "https" || origin.Host == "" {
		return false
	}
	if strings.EqualFold(origins[0], g.publicURL) {
		return true
	}
	return strings.EqualFold(origin.Host, host)
}

func hostOf(hostport string) string {
	if host, _, err := net.SplitHostPort(hostport); err == nil {
		return host
	}
	return strings.Trim(hostport, "[]")
}

func isLoopbackName(host string) bool {
	if strings.EqualFold(host, "localhost") {
		return true
	}
	addr, err := netip.ParseAddr(host)
	return err == nil && addr.IsLoopback()
}

// remoteAddr is the address of the peer, or what a trusted proxy says of it:
// the last one in X-Forwarded-For that is not a trusted proxy's own, since
// everything before that is the client's to invent.
func (g *Gateway) remoteAddr(r *http.Request) netip.Addr {
	ap, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return netip.Addr{}
	}
	addr := ap.Addr().Unmap()
	if !g.isProxy(addr) {
		return addr
	}
	hops := strings.Split(strings.Join(r.Header.Values("X-Forwarded-For"), ","), ",")
	for _, hop := range slices.Backward(hops) {
		forwarded, err := netip.ParseAddr(strings.TrimSpace(hop))
		if err != nil {
			break
		}
		if addr = forwarded.Unmap(); !g.isProxy(addr) {
			break
		}
	}
	return addr
}

func (g *Gateway) isProxy(addr netip.Addr) bool {
	return slices.ContainsFunc(g.cfg.Gateway.TrustedProxies, func(p netip.Prefix) bool { return p.Contains(addr) })
}

// newMCPHandlers returns the SDK's two handlers: one cannot serve both eras.
// Which server answers stands in the request's context.
func newMCPHandlers(bodyBytes int64) (legacy, modern http.Handler) {
	server := func(r *http.Request) *mcp.Server {
		return served(r.Context()).server
	}
	quiet := slog.New(slog.DiscardHandler)
	return mcp.NewStreamableHTTPHandler(server, &mcp.StreamableHTTPOptions{
			Logger: quiet, MaxRequestBodyBytes: bodyBytes,
			DisableLocalhostProtection: true, // guardOrigin has done it
		}), mcp.NewStreamableHTTPHandler(server, &mcp.StreamableHTTPOptions{
			Logger: quiet, MaxRequestBodyBytes: bodyBytes,
			DisableLocalhostProtection:   true,
			Stateless:                    true,
			PropagateRequestCancellation: true,
		})
}

type servedKey struct{}

// servedBy is which server answers a request, and for whom.
type servedBy struct {
	server *mcp.Server
	who    auth.Identity
}

func served(ctx context.Context) servedBy {
	by, _ := ctx.Value(servedKey{}).(servedBy)
	return by
}

// serveMCP chooses the era by the request, and the view by its session.
func (g *Gateway) serveMCP(w http.ResponseWriter, r *http.Request) {
	// MCP 2026-07-28, streamable HTTP: event streams should say that a proxy must
	// not hold them back. Which answers become one is not known yet.
	w.Header().Set("X-Accel-Buffering", "no")
	token, _ := bearer(r) // before it is taken away
	who, ok := g.authenticate(w, r)
	if !ok {
		return
	}
	method, ok := g.readEnvelope(w, r)
	if !ok {
		return
	}
	if r.Method == http.MethodPost && method != "subscriptions/listen" {
		// A call is over when its answer is out, not when it is there: draining
		// closes the streams.
		defer g.calls.begin()()
	}
	if g.users && staysOpen(r, method) {
		var done context.CancelFunc
		r, done = g.during(r, who, token)
		defer done()
	}
	if r.Header.Get("Mcp-Protocol-Version") >= modernVersion {
		if !g.users {
			who.Principal = auth.Local
		}
		// Without a session nothing tells clients apart: they all are the local user,
		// which is right on this machine alone.
		if !g.users && g.cfg.Gateway.Sessions != "shared" && g.fromElsewhere(r) {
			http.Error(w, "protocol "+modernVersion+" is served on loopback only, as it has no sessions that would keep users apart; use an older one, or set gateway.sessions to shared", http.StatusForbidden)
			return
		}
		g.serveView(w, r, g.modern, who, method)
		return
	}
	id := r.Header.Get("Mcp-Session-Id")
	if id == "" {
		g.serveFirst(w, r, who, method)
		return
	}
	client, leave, ok := g.clients.enter(id, r.Method == http.MethodGet, func(v *view) bool { return !g.users || v.principal == who.Principal })
	if !ok {
		// MCP 2025-11-25, session management: "The server MAY terminate the session
		// at any time, after which it MUST respond to requests containing that
		// session ID with HTTP 404 Not Found."
		http.Error(w, "session not found: start a new one with initialize", http.StatusNotFound)
		return
	}
	defer leave()
	client.view.wake()
	if g.refuseCall(w, r, client.view, method) {
		return
	}
	if staysOpen(r, method) {
		done, ok := client.view.stream()
		if !ok {
			g.refuseStream(w, r, client.view.principal)
			return
		}
		defer done()
	}
	if r.Method == http.MethodPost && g.serveShortLegacy(w, r, client, method) {
		return
	}
	if r.Method == http.MethodDelete {
		client.leave() // nobody waits for its calls any more
	}
	g.legacy.ServeHTTP(w, withServer(r, client.view.server, who))
	if r.Method == http.MethodDelete {
		g.log.Info("session ended by the client", "session", shortID(id))
		g.clients.end(client)
	}
}

// staysOpen reports whether a request is answered by an event stream that lasts.
func staysOpen(r *http.Request, method string) bool {
	return r.Method == http.MethodGet || method == "subscriptions/listen"
}

// refuseStream answers a request for an event stream that is one too many.
func (g *Gateway) refuseStream(w http.ResponseWriter, r *http.Request, p auth.Principal) {
	g.tooMany(w, r, p, "streams", fullFor)
	http.Error(w, "too many event streams of one user: "+strconv.Itoa(maxStreams)+" may be open at once", http.StatusTooManyRequests)
}

// fromElsewhere reports whether a request comes from another machine, by a name
// that is not this one's own or, where the config names a public URL, through the
// proxy behind it. Such headers can be forged, but only into a refusal.
func (g *Gateway) fromElsewhere(r *http.Request) bool {
	if !g.remoteAddr(r).IsLoopback() || !isLoopbackName(hostOf(r.Host)) {
		return true
	}
	return !g.onLoopback() && slices.ContainsFunc([]string{"Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "Via"}, func(name string) bool {
		return r.Header.Get(name) != ""
	})
}

// serveFirst serves the request that begins a session.
func (g *Gateway) serveFirst(w http.ResponseWriter, r *http.Request, who auth.Identity, method string) {
	if method != "initialize" && declaresModern(r) {
		// MCP 2026-07-28, streamable HTTP: a request without the header is refused as
		// one whose header does not fit its body.
		writeRPCError(w, http.StatusBadRequest, idOf(r), &jsonrpc.Error{Code: codeHeaderMismatch, Message: "the header Mcp-Protocol-Version does not say the version that _meta does"})
		return
	}
	if r.Method != http.MethodPost || method != "initialize" {
		// "Servers that require a session ID SHOULD respond to requests without an
		// Mcp-Session-Id header (other than initialization) with HTTP 400 Bad Request."
		http.Error(w, "Mcp-Session-Id is missing: begin with initialize, or send Mcp-Protocol-Version: "+modernVersion, http.StatusBadRequest)
		return
	}
	if !g.clients.makeRoom() {
		g.tooMany(w, r, who.Principal, "sessions", fullFor)
		http.Error(w, "too many sessions (gateway.limits.sessions)", http.StatusTooManyRequests)
		return
	}
	// The SDK has put the session's id there, if there is one now.
	defer func() { g.clients.trim(w.Header().Get("Mcp-Session-Id")) }()
	if !g.users && g.cfg.Gateway.Sessions == "shared" {
		who.Principal = auth.Local
	}
	if who.Principal != (auth.Principal{}) {
		g.serveView(w, r, g.legacy, who, method)
		return
	}
	id := uuid.NewString()
	principal := auth.SessionPrincipal(id)
	v, leave, err := g.enter(principal, declaredAtFirst(r))
	defer leave()
	g.serveOpened(w, r, g.legacy, v, err, who, method)
	if !g.clients.has(id) {
		g.end(principal) // initialize was refused
		return
	}
	g.log.Info("session began", "session", shortID(id))
}

func (g *Gateway) serveView(w http.ResponseWriter, r *http.Request, h http.Handler, who auth.Identity, method string) {
	v, leave, err := g.enter(who.Principal, nil)
	defer leave()
	g.serveOpened(w, r, h, v, err, who, method)
}

func (g *Gateway) serveOpened(w http.ResponseWriter, r *http.Request, h http.Handler, v *view, err error, who auth.Identity, method string) {
	if err != nil {
		if errors.Is(err, session.ErrFull) {
			g.tooMany(w, r, who.Principal, "sessions", fullFor)
		}
		problem := renderPage(err, g.log)
		http.Error(w, problem.say, problem.status)
		return
	}
	if staysOpen(r, method) {
		done, ok := v.stream()
		if !ok {
			g.refuseStream(w, r, v.principal)
			return
		}
		defer done()
	}
	if g.refuseCall(w, r, v, method) || h == g.modern && (refuseHeaders(w, r, v, method) || g.serveShort(w, r, v, method)) {
		return
	}
	h.ServeHTTP(w, withServer(r, v.server, who))
}

// refuseHeaders answers a call whose headers do not fit its arguments.
func refuseHeaders(w http.ResponseWriter, r *http.Request, v *view, method string) bool {
	raw := r.Header[headerParams]
	if method != "tools/call" || len(raw) != 1 {
		return false
	}
	refusal := v.refuseHeaders(r.Header, json.RawMessage(raw[0]))
	if refusal == nil {
		return false
	}
	writeRPCError(w, http.StatusBadRequest, idOf(r), refusal)
	return true
}

// idOf returns the id of a request, nil if there is none.
func idOf(r *http.Request) json.RawMessage {
	if read, ok := r.Body.(*readBody); ok {
		if got, err := rawjson.Get(read.raw, "id"); err == nil {
			return got[0]
		}
	}
	return nil
}

// declaresModern reports whether a body is of protocol 2026-07-28 or newer.
func declaresModern(r *http.Request) bool {
	raw := r.Header[headerParams]
	if len(raw) != 1 {
		return false
	}
	got, err := rawjson.Get([]byte(raw[0]), "_meta")
	if err != nil || got[0] == nil {
		return false
	}
	got, err = rawjson.Get(got[0], mcp.MetaKeyProtocolVersion)
	version, _ := rawjson.String(got[0])
	return err == nil && version >= modernVersion
}

// refuseCall answers a call that is one too many for its principal. It is
// counted further in, so that one that slips through is refused there.
func (g *Gateway) refuseCall(w http.ResponseWriter, r *http.Request, v *view, method string) bool {
	switch method {
	case "tools/call", "prompts/get", "resources/read", "completion/complete":
	default:
		return false
	}
	refused := v.calls.refused()
	if refused == nil {
		return false
	}
	g.tooMany(w, r, v.principal, refused.limit, refused.retry)
	http.Error(w, refused.say(), http.StatusTooManyRequests)
	return true
}

// fullFor is when it is worth trying again where all places are taken.
const fullFor = time.Minute

// tooMany counts a request that a limit refuses, writes it down and says when to
// try again. Answering it is the caller's.
func (g *Gateway) tooMany(w http.ResponseWriter, r *http.Request, p auth.Principal, limit string, retry time.Duration) {
	g.metrics.hit(limit)
	g.refused(r, p, limit)
	w.Header().Set("Retry-After", strconv.Itoa(max(1, int(math.Ceil(retry.Seconds())))))
}

// declaredAtFirst returns the capabilities in the params of initialize.
func declaredAtFirst(r *http.Request) json.RawMessage {
	if raw := r.Header[headerParams]; len(raw) == 1 {
		if got, err := rawjson.Get([]byte(raw[0]), "capabilities"); err == nil && got[0] != nil {
			return got[0]
		}
	}
	return json.RawMessage("{}")
}

func withServer(r *http.Request, s *mcp.Server, who auth.Identity) *http.Request {
	return r.WithContext(context.WithValue(r.Context(), servedKey{}, servedBy{s, who}))
}

// removed are the methods that protocol 2026-07-28 has no more.
var removed = []string{"logging/setLevel", "resources/subscribe", "resources/unsubscribe"}

// readBody is the body of a request that has been read already.
type readBody struct {
	*bytes.Reader // as the SDK gets it
	raw           []byte
}

// Close does nothing.
func (*readBody) Close() error { return nil }

// readEnvelope reads a POST's body within its limit, notes the params as they
// were received for the adapter, and returns the method. A batch has none.
func (g *Gateway) readEnvelope(w http.ResponseWriter, r *http.Request) (method string, ok bool) {
	delete(r.Header, headerParams)
	delete(r.Header, headerID)
	if r.Method != http.MethodPost {
		return "", true
	}
	limit := int64(g.cfg.Gateway.Limits.BodyBytes)
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, limit))
	if _, tooLarge := errors.AsType[*http.MaxBytesError](err); tooLarge {
		g.metrics.hit("bodyBytes")
		http.Error(w, "request body exceeds "+strconv.FormatInt(limit, 10)+" bytes (gateway.limits.bodyBytes)", http.StatusRequestEntityTooLarge)
		return "", false
	}
	if err != nil {
		http.Error(w, "the request body could not be read", http.StatusBadRequest)
		return "", false
	}
	received := body
	if body, err = smuggleResponse(body); err != nil {
		http.Error(w, "the response could not be read", http.StatusBadRequest)
		return "", false
	}
	r.Body = &readBody{bytes.NewReader(body), received}
	members, err := rawjson.Get(body, "method", "params", "id", "result", "error")
	if err != nil {
		members = make([][]byte, 5) // a batch, or no message
	}
	method, _ = rawjson.String(members[0])
	if members[1] != nil {
		r.Header[headerParams] = []string{string(members[1])}
	}
	status, refusal := http.StatusBadRequest, (*jsonrpc.Error)(nil)
	switch modern := r.Header.Get("Mcp-Protocol-Version") >= modernVersion; {
	case method == "" && members[3] == nil && members[4] == nil:
		refusal = refuseMessage(body)
	case method == "" || members[2] == nil || !modern && r.Header.Get("Mcp-Session-Id") == "":
		// It is an answer itself, nobody waits for one, or it begins a session.
	case modern && slices.Contains(removed, method):
		// The SDK says that this version does not have it, whatever its params are.
	default:
		if refusal = refuseRequest(method, members[1]); refusal == nil {
			break
		}
		// Protocol 2026-07-28 has a status for each; before it, an error is an answer.
		if !modern {
			status = http.StatusOK
		} else if refusal.Code == jsonrpc.CodeMethodNotFound {
			status = http.StatusNotFound
		}
	}
	if refusal != nil {
		writeRPCError(w, status, members[2], refusal)
		return "", false
	}
	return method, true
}

// NewServer returns the HTTP server for h with the limits that a slow or
// hostile peer meets.
func NewServer(ctx context.Context, h http.Handler, log *slog.Logger) *http.Server {
	return &http.Server{
		Handler:           limitSlow(h, readBodyTime, writeTime),
		ReadHeaderTimeout: readHeaderTime,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    64 << 10,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug),
		BaseContext:       func(net.Listener) context.Context { return ctx },
	}
}
