package gateway

import (
	"context"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	sdkauth "github.com/modelcontextprotocol/go-sdk/auth"

	"gatehouse/auth"
)

// This file is where many users are told apart: clients by their bearer tokens,
// browsers by their login. Nothing else of a request says who sends it.

const (
	loginPath    = "/login"
	logoutPath   = "/logout"
	resourcePath = "/.well-known/oauth-protected-resource"
	mcpPath      = "/mcp"
)

// How many bearer tokens a minute the provider is asked about that it then does
// not vouch for: of one address, and in all.
const (
	askedPerMinute      = 300
	askedPerMinuteTotal = 20_000
)

// authenticate says for whom an MCP request is, and refuses those of nobody.
// Where nobody is asked who they are, the identity is the zero one.
func (g *Gateway) authenticate(w http.ResponseWriter, r *http.Request) (who auth.Identity, ok bool) {
	if !g.users {
		return who, true
	}
	token, code := bearer(r)
	if code == "" {
		from, asked := g.remoteAddr(r), false
		identity, err := g.auth.Authenticate(r.Context(), token, func() bool {
			_, asked = g.bearers.allow(from, true)
			return asked
		})
		if err == nil {
			if asked {
				g.bearers.giveBack(from)
			}
			// It has said who it is, and goes no further. The SDK wants to see one.
			r.Header["Authorization"] = seenBearer
			return identity, true
		}
		if r.Context().Err() != nil {
			return who, false // nobody is there any more
		}
		code = "invalid_token"
		if errors.Is(err, auth.ErrUnasked) {
			// No record of each: the address has some already, and may go on for long.
			g.metrics.hit("bearersPerMinute")
		} else {
			g.log.Info("request refused: its bearer token is not accepted", "error", err)
			g.refused(r, auth.Principal{}, "bearer")
		}
	}
	g.metrics.unauthenticated(code)
	g.challenge(w, code)
	return who, false
}

var seenBearer = []string{"Bearer seen"}

// noBearer is no error code: RFC 6750 section 3.1: "If the request lacks any
// authentication information [...], the resource server SHOULD NOT include an
// error code or other error information."
const noBearer = "none"

// bearer returns the token of a request, or what is wrong with it.
func bearer(r *http.Request) (token, code string) {
	// MCP authorization: access tokens "MUST NOT be included in the URI query
	// string", so there they are not looked for.
	headers := r.Header["Authorization"]
	switch len(headers) {
	case 0:
		return "", noBearer
	case 1:
	default:
		return "", "invalid_request"
	}
	// RFC 9110 section 11.1: the scheme is case-insensitive.
	scheme, token, ok := strings.Cut(headers[0], " ")
	if !ok || !strings.EqualFold(scheme, "Bearer") {
		return "", noBearer
	}
	return strings.TrimLeft(token, " "), ""
}

// challenge answers a request of nobody. MCP authorization: "MCP servers MUST
// use the HTTP header WWW-Authenticate when returning a 401 Unauthorized to
// indicate the location of the resource server metadata URL".
func (g *Gateway) challenge(w http.ResponseWriter, code string) {
	say := "Log in first: this gateway serves those that its identity provider knows."
	fields := fmt.Sprintf("Bearer resource_metadata=%q, scope=%q", g.publicURL+resourcePath+mcpPath, strings.Join(g.askedScopes(), " "))
	if code != noBearer {
		say = "The access token is missing, has expired, or is not for this gateway: log in anew."
		fields += fmt.Sprintf(`, error=%q, error_description="The access token is not accepted here"`, code)
	}
	w.Header().Set("WWW-Authenticate", fields)
	http.Error(w, say, http.StatusUnauthorized)
}

// askedScopes are what a client should ask for. Nothing is demanded of its token
// but whom it is about; openid is what every provider has that says so.
func (g *Gateway) askedScopes() []string {
	if login := g.cfg.Gateway.Login; login != nil && len(login.Scopes) > 0 {
		return slices.DeleteFunc(slices.Clone(login.Scopes), func(s string) bool { return s == "offline_access" })
	}
	return []string{"openid"}
}

// serveResource serves the protected resource metadata, RFC 9728 section 2.
func (g *Gateway) serveResource(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		w.Header().Set("Allow", "GET, HEAD")
		http.Error(w, "Method Not Allowed", http.StatusMethodNotAllowed)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "public, max-age=300")
	w.Header().Set("Access-Control-Allow-Origin", "*")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	document := map[string]any{
		"resource":                 g.publicURL + mcpPath,
		"resource_name":            "Gatehouse",
		"authorization_servers":    []string{g.cfg.Gateway.Login.Issuer},
		"scopes_supported":         g.askedScopes(),
		"bearer_methods_supported": []string{"header"},
	}
	if err := json.NewEncoder(w).Encode(document); err != nil {
		g.log.Debug("writing the resource metadata", "error", err)
	}
}

// asPrincipal shows the SDK whose request it is, as its own middleware does: it
// binds its sessions to that as well.
func (g *Gateway) asPrincipal(next http.Handler) http.Handler {
	return &struct{ http.Handler }{sdkauth.RequireBearerToken(func(ctx context.Context, _ string, _ *http.Request) (*sdkauth.TokenInfo, error) {
		who := served(ctx).who
		if who.Principal == (auth.Principal{}) {
			return nil, sdkauth.ErrInvalidToken
		}
		return &sdkauth.TokenInfo{UserID: who.Principal.Key(), Expiration: who.Expires}, nil
	}, nil)(next)}
}

// during ends a stream when its token is not accepted any more: who opens it again
// shows another one. The token is looked at when it should be, which is its end
// where that is known.
func (g *Gateway) during(r *http.Request, who auth.Identity, token string) (*http.Request, context.CancelFunc) {
	ctx, cancel := context.WithCancel(r.Context())
	over := make(chan struct{})
	go func() {
		defer close(over)
		defer cancel()
		for wait := who.Expires.Sub(g.now()); ; {
			timer := time.NewTimer(wait)
			select {
			case <-timer.C:
			case <-ctx.Done():
				timer.Stop()
				return
			}
			again, err := g.auth.Authenticate(ctx, token, nil)
			if err != nil || again.Principal != who.Principal {
				return
			}
			wait = max(again.Expires.Sub(g.now()), time.Second)
		}
	}()
	return r.WithContext(ctx), func() {
		cancel()
		<-over
	}
}

// userRoutes adds the routes of a gateway that tells its users apart.
func (g *Gateway) userRoutes(mux *http.ServeMux) {
	if !g.users {
		return
	}
	mux.HandleFunc(loginPath, g.page(g.serveLogin, http.MethodGet))
	mux.HandleFunc(auth.LoginCallback, g.page(g.serveLoginCallback, http.MethodGet))
	mux.HandleFunc(logoutPath, g.page(g.serveLogout, http.MethodPost))
}

// visitor is who is at a browser.
type visitor struct {
	principal auth.Principal
	account   string // of the login; may be empty
	proof     string // what a form of a page of ours holds
}

// visitor says for whom a browser acts. On loopback, where nobody logs in, it is
// the local user, whoever of this machine that is.
func (g *Gateway) visitor(r *http.Request) (visitor, error) {
	if g.users {
		in, err := g.auth.Browser(r.Context(), cookiesOf(r))
		if err != nil {
			return visitor{}, err
		}
		return visitor{in.Principal, in.Account, in.Proof}, nil
	}
	if !g.onLoopback() || g.fromElsewhere(r) {
		return visitor{}, errNotHere
	}
	return visitor{principal: auth.Local, proof: g.tickets.seal(auth.Local, []byte(sealedForm))}, nil
}

// proves reports whether a form comes from a page that this visitor was shown.
func (g *Gateway) proves(who visitor, token string) bool {
	if g.users {
		return subtle.ConstantTimeCompare([]byte(who.proof), []byte(token)) == 1
	}
	said, ok := g.tickets.open(who.principal, token)
	return ok && string(said) == sealedForm
}

func cookiesOf(r *http.Request) func(name string) (string, bool) {
	return func(name string) (string, bool) {
		c, err := r.Cookie(name)
		if err != nil {
			return "", false
		}
		return c.Value, true
	}
}

// logInFirst leads to the login, and back to the path of the request, on which
// nothing has been done yet.
func (g *Gateway) logInFirst(w http.ResponseWriter, r *http.Request) {
	back := r.URL.EscapedPath()
	if r.URL.Query().Has(tourParameter) {
		back += "?" + tourParameter
	}
	http.Redirect(w, r, loginPath+"?to="+url.QueryEscape(back), http.StatusSeeOther)
}

// localPath is a path of the gateway's own pages, or its root: no text that a
// browser could take for another host.
func localPath(to string) string {
	u, err := url.Parse(to)
	if err != nil || len(to) > 512 || u.Scheme != "" || u.Host != "" || !strings.HasPrefix(to, "/connect/") || strings.ContainsAny(to, "\\\r\n\t") {
		return "/"
	}
	return to
}

// serveLogin sends a browser to the identity provider. It changes nothing here.
func (g *Gateway) serveLogin(w http.ResponseWriter, r *http.Request) error {
	if canonical, ok := g.canonical(r); !ok {
		http.Redirect(w, r, canonical, http.StatusSeeOther)
		return nil
	}
	query := r.URL.Query()
	start, err := g.auth.BeginLogin(r.Context(), localPath(query.Get("to")), query.Has("anew"))
	if err != nil {
		return err
	}
	var names []string
	for _, c := range r.Cookies() {
		names = append(names, c.Name)
	}
	for _, stale := range g.auth.StaleTrips(names) {
		g.setCookie(w, auth.Cookie{Name: stale})
	}
	g.sendAway(w, r, start)
	return nil
}

// serveLoginCallback notes who is at the browser.
func (g *Gateway) serveLoginCallback(w http.ResponseWriter, r *http.Request) error {
	if err := g.mayCallBack(w, r); err != nil {
		return err
	}
	query, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return fmt.Errorf("%w: malformed query", auth.ErrStateUnknown)
	}
	in, err := g.auth.FinishLogin(r.Context(), auth.Callback{Query: query, Cookie: cookiesOf(r)})
	if err != nil {
		g.record(r.Context(), slog.LevelWarn, eventLoginRefused, auth.Principal{}, slog.String("why", whyRefused(err)))
		if errors.Is(err, auth.ErrDenied) {
			return &againError{err, loginPath}
		}
		return err
	}
	g.record(r.Context(), slog.LevelInfo, eventLogin, in.Principal, slog.String("account", in.Account))
	g.setCookie(w, in.Ended)
	g.setCookie(w, in.Cookie)
	// Clients may be waiting for just that.
	if _, err := g.loggedIn(r.Context(), in.Principal); err != nil {
		g.log.Warn("logged in, but what waits for that was not told", "principal", in.Principal, "error", err)
	}
	http.Redirect(w, r, in.To, http.StatusSeeOther)
	return nil
}

// serveLogout ends the browser's login. What the user's clients hold stays.
func (g *Gateway) serveLogout(w http.ResponseWriter, r *http.Request) error {
	who, err := g.form(w, r)
	if err != nil {
		return err
	}
	name := g.auth.LoginCookie()
	if value, ok := cookiesOf(r)(name.Name); ok {
		g.auth.EndBrowser(r.Context(), value)
	}
	g.setCookie(w, name)
	g.record(r.Context(), slog.LevelInfo, eventLogout, who.principal)
	g.writePage(w, http.StatusOK, pageData{OK: true, Title: "You are logged out", Again: loginPath + "?anew", AgainSay: "Log in",
		Say: "This browser is logged out of the gateway. Your assistants keep working: to end what they use, log in and sign out of everything."})
	return nil
}

// setCookie sets a cookie of the gateway's, or deletes one that has no value.
func (g *Gateway) setCookie(w http.ResponseWriter, c auth.Cookie) {
	cookie := &http.Cookie{
		Name:     c.Name,
		Value:    c.Value.Value(),
		Path:     "/", // the __Host- prefix demands it
		MaxAge:   int(c.MaxAge / time.Second),
		Secure:   strings.HasPrefix(g.publicURL, "https:"),
		HttpOnly: true,
		// Lax: the provider's redirect back is a cross-site navigation.
		SameSite: http.SameSiteLaxMode,
	}
	if c.Value.IsEmpty() {
		cookie.MaxAge = -1
	}
	http.SetCookie(w, cookie)
}

// loggedIn ends the flow that a client's call has begun for want of this login,
// if there is one, and connects what lives on it.
func (g *Gateway) loggedIn(ctx context.Context, p auth.Principal) (outcome auth.Outcome, err error) {
	flow, err := g.auth.SkipLogin(ctx, p)
	if err != nil || flow == "" {
		return auth.Outcome{OK: true, Say: "You are logged in."}, err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), connectWait)
	defer cancel()
	outcome = g.connected(ctx, &auth.Finished{FlowID: flow, Principal: p, Remote: auth.LoginRemote})
	g.auth.Conclude(ctx, flow, outcome)
	return outcome, nil
}

// concludeLogin answers a link that asks for the login, to somebody who is logged
// in. Where that login is of no use any more, the browser logs in again.
func (g *Gateway) concludeLogin(w http.ResponseWriter, r *http.Request, who visitor) error {
	if !g.auth.Status(who.principal, auth.LoginRemote).SignedIn {
		http.Redirect(w, r, loginPath+"?to="+url.QueryEscape(r.URL.EscapedPath()), http.StatusSeeOther)
		return nil
	}
	outcome, err := g.loggedIn(r.Context(), who.principal)
	if err != nil {
		return err
	}
	g.writePage(w, http.StatusOK, outcomePage(&auth.FlowInfo{Outcome: outcome}))
	return nil
}
