package gateway

import (
	"context"
	"crypto/rand"
	"net/http"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/modelcontextprotocol/go-sdk/mcp"

	"gatehouse/auth"
)

// This file is the deprecated HTTP+SSE transport of protocol 2024-11-05, for old
// clients (gateway.sse): one event stream for all that they are told, POSTs for
// what they say. A session lasts as long as its stream.

// firstMessage is how long a stream may be open before its client says anything.
const firstMessage = 30 * time.Second

// sseSessions are the open streams by what their POSTs name them by.
type sseSessions struct {
	mu   sync.Mutex // guards byID
	byID map[string]sseStream
}

// sseStream is an open stream, and whose it is.
type sseStream struct {
	*mcp.SSEServerTransport
	principal auth.Principal // the zero one where nobody is asked
}

// add notes a stream, or says which limit it is too many for: limit is that of all
// sessions.
func (s *sseSessions) add(id string, t sseStream, limit int) (over string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.byID) >= limit {
		return "sessions"
	}
	own := 0
	for _, other := range s.byID {
		if other.principal == t.principal {
			own++
		}
	}
	if own >= maxStreams && t.principal != (auth.Principal{}) {
		return "streams"
	}
	if s.byID == nil {
		s.byID = map[string]sseStream{}
	}
	s.byID[id] = t
	return ""
}

// get returns the stream of that name if it is theirs who ask.
func (s *sseSessions) get(id string, theirs auth.Principal) (t sseStream, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	t, ok = s.byID[id]
	return t, ok && t.principal == theirs
}

func (s *sseSessions) remove(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.byID, id)
}

// serveSSE is GET /sse: a session from its beginning to its end.
func (g *Gateway) serveSSE(w http.ResponseWriter, r *http.Request) {
	token, _ := bearer(r) // before it is taken away
	who, ok := g.authenticate(w, r)
	if !ok {
		return
	}
	if g.users {
		var done context.CancelFunc
		r, done = g.during(r, who, token)
		defer done()
	}
	id := rand.Text()
	stream := &mcp.SSEServerTransport{
		Endpoint: "/messages?session=" + id, Response: w, MaxRequestBodyBytes: int64(g.cfg.Gateway.Limits.BodyBytes),
	}
	switch g.sse.add(id, sseStream{stream, who.Principal}, g.cfg.Gateway.Limits.Sessions) {
	case "streams":
		g.refuseStream(w, r, who.Principal)
		return
	case "sessions":
		g.tooMany(w, r, who.Principal, "sessions", fullFor)
		http.Error(w, "too many sessions (gateway.limits.sessions)", http.StatusTooManyRequests)
		return
	}
	defer g.sse.remove(id)
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("Cache-Control", "no-cache, no-transform")
	w.Header().Set("X-Accel-Buffering", "no")
	transport := &stdioTransport{Transport: stream, g: g}
	first, cancel := context.WithTimeout(r.Context(), firstMessage)
	capabilities, err := transport.listen(first)
	cancel()
	if err != nil {
		return // it left before it said anything, or says nothing
	}
	principal := who.Principal
	switch {
	case g.users:
		capabilities = nil
	case g.cfg.Gateway.Sessions == "shared":
		principal, capabilities = auth.Local, nil
	default:
		principal = auth.SessionPrincipal(uuid.NewString())
		defer g.end(principal)
	}
	v, leave, err := g.enter(principal, capabilities)
	defer leave()
	if err != nil {
		transport.connection.Close()
		g.log.Info("session refused", "error", err)
		return
	}
	g.serveStream(r.Context(), v, transport)
}

// serveStream speaks with one client until it leaves or its view is closed.
func (g *Gateway) serveStream(ctx context.Context, v *view, transport mcp.Transport) {
	session, err := v.server.Connect(ctx, transport, nil)
	if err != nil {
		g.log.Info("session not begun", "principal", v.principal, "error", err)
		return
	}
	g.log.Info("session began", "principal", v.principal, "transport", "sse")
	stop := context.AfterFunc(ctx, func() { session.Close() })
	// How it ended is no matter: the stream is gone.
	_ = session.Wait()
	stop()
	v.levels.forget(session)
	v.peers.forget(session)
	v.session.Leave(session)
	g.unsubscribeAll(caller{view: v, client: session})
	g.log.Info("session ended", "principal", v.principal, "transport", "sse")
}

// serveMessages is POST /messages: what a client says.
func (g *Gateway) serveMessages(w http.ResponseWriter, r *http.Request) {
	who, ok := g.authenticate(w, r)
	if !ok {
		return
	}
	stream, ok := g.sse.get(r.URL.Query().Get("session"), who.Principal)
	if !ok {
		http.Error(w, "session not found: open the stream at /sse again", http.StatusNotFound)
		return
	}
	stream.ServeHTTP(w, r)
}

// sseRoutes adds the transport's routes, if the config wants it.
func (g *Gateway) sseRoutes(mux *http.ServeMux) {
	if !g.cfg.Gateway.SSE {
		return
	}
	mux.Handle("GET /sse", g.guardOrigin(http.HandlerFunc(g.serveSSE)))
	mux.Handle("POST /messages", g.guardOrigin(http.HandlerFunc(g.serveMessages)))
}
