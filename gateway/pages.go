package gateway

import (
	"bytes"
	"cmp"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"html/template"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"gatehouse/auth"
	"gatehouse/session"
)

// connectWait is how long the page after a sign-in waits for the connection.
const connectWait = 5 * time.Second

//go:embed page.html
var pageHTML string

//go:embed style.html
var styleHTML string

var pageTemplate = template.Must(template.Must(template.New("page").Parse(styleHTML)).Parse(pageHTML))

// pageData is one page. It never holds anything that a provider or the request
// wrote, except the configured remote's name.
type pageData struct {
	Title    string
	Say      string
	OK       bool
	Facts    [][2]string // what the person should compare, as label and value
	Note     string      // below the facts; empty: none
	Ask      string      // of the button that posts to the page's own URL; empty: none
	All      string      // of another one, which goes on with the other remotes afterwards; empty: none
	Token    string      // of that form
	Again    string      // where a link below all leads, and what it says; empty: none
	AgainSay string
	Home     bool // there is a status page to go to; writePage's

	// Waiting are the other remotes that need a sign-in, by who will ask for it.
	Waiting []waitingAt
}

// page wraps a page's handler: the headers that every page has, the methods
// that it takes, and errors rendered in their one place.
func (g *Gateway) page(h func(http.ResponseWriter, *http.Request) error, methods ...string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		header := w.Header()
		header.Set("Cache-Control", "no-store")
		header.Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'")
		header.Set("Referrer-Policy", "no-referrer")
		header.Set("X-Content-Type-Options", "nosniff")
		header.Set("X-Frame-Options", "DENY")
		header.Set("Cross-Origin-Opener-Policy", "same-origin")
		if !slices.Contains(methods, r.Method) {
			header.Set("Allow", strings.Join(methods, ", "))
			g.writePage(w, http.StatusMethodNotAllowed, pageData{Title: "Method not allowed", Say: "This page can only be opened."})
			return
		}
		if framed(r) {
			g.writePage(w, http.StatusForbidden, pageData{Title: "Not inside another page", Say: "Open the link in a tab of its own."})
			return
		}
		err := h(w, r)
		if err == nil {
			return
		}
		switch {
		case errors.Is(err, session.ErrFull):
			g.tooMany(w, r, auth.Principal{}, "sessions", fullFor)
		case errors.Is(err, errForeignPage):
			g.refused(r, auth.Principal{}, "foreign_page")
		}
		problem := renderPage(err, g.log)
		g.log.Info("page refused", "page", r.Pattern, "status", problem.status, "error", err)
		data := pageData{Title: problem.title, Say: problem.say}
		here := r.URL.EscapedPath()
		if again, ok := errors.AsType[*againError](err); ok {
			here = again.link
			data.Again, data.AgainSay = here, "Try again"
		}
		if g.users && errors.Is(err, auth.ErrNotLoggedIn) {
			data.Again, data.AgainSay = loginPath+"?to="+url.QueryEscape(here), "Log in"
		}
		if g.users && errors.Is(err, auth.ErrWrongPerson) {
			data.Again, data.AgainSay = loginPath+"?anew&to="+url.QueryEscape(here), "Log in with another account"
			if who, err := g.visitor(r); err == nil {
				data.Facts = [][2]string{{"Your account here", cmp.Or(who.account, who.principal.Subject)}}
			}
		}
		g.writePage(w, problem.status, data)
	}
}

func (g *Gateway) writePage(w http.ResponseWriter, status int, data pageData) {
	data.Home = g.onLoopback() || g.users
	var out bytes.Buffer
	if err := pageTemplate.Execute(&out, data); err != nil {
		g.log.Error("rendering a page", "error", err)
		http.Error(w, "the page could not be made", http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.WriteHeader(status)
	w.Write(out.Bytes())
}

// framed reports whether a browser loads the page into another one: into a
// frame, or as an image, a script or whatever else is no page of its own.
func framed(r *http.Request) bool {
	dest := r.Header.Get("Sec-Fetch-Dest")
	return dest != "" && dest != "document"
}

// serveConnect begins the sign-in of a link, or says what came of it.
//
// On loopback, where nobody logs in, there is no page in between. The threat it
// would answer is that somebody is lured into finishing another person's flow; a
// link to loopback leads everybody to the gateway on their own machine, which
// does not know the flow of another. Everywhere else a GET changes nothing, since
// previews fetch links, too: the page says what would be signed in to and for
// whom, and its Continue begins. Where users log in, only the flow's own gets as
// far as that.
func (g *Gateway) serveConnect(w http.ResponseWriter, r *http.Request) error {
	if canonical, ok := g.canonical(r); !ok {
		// The cookie must be set where the callback will arrive.
		http.Redirect(w, r, canonical, http.StatusSeeOther)
		return nil
	}
	var who visitor
	if g.users {
		var err error
		if who, err = g.visitor(r); errors.Is(err, auth.ErrNotLoggedIn) {
			g.logInFirst(w, r)
			return nil
		} else if err != nil {
			return err
		}
	}
	visit := auth.Visit{Who: who.principal, Tour: r.URL.Query().Has(tourParameter)}
	flow, err := g.auth.Flow(r.Context(), r.PathValue("flow"), visit)
	if errors.Is(err, auth.ErrWrongPerson) {
		g.signInRefused(r.Context(), &auth.Finished{Principal: flow.Principal, Remote: flow.Remote}, err)
	}
	if err != nil {
		return err
	}
	switch {
	case flow.Ended:
		g.writePage(w, http.StatusOK, outcomePage(flow))
		return nil
	case g.users && flow.Remote == auth.LoginRemote:
		return g.concludeLogin(w, r, who)
	case r.Method == http.MethodPost:
		if g.users {
			if _, err := g.form(w, r); err != nil {
				return err
			}
			visit.Tour = visit.Tour || r.PostForm.Has(tourParameter)
		} else if err := http.NewCrossOriginProtection().Check(r); err != nil {
			return fmt.Errorf("%w: %w", errForeignPage, err)
		}
	case g.users || !g.onLoopback():
		// The form posts here, and a post is redirected to the provider, which
		// form-action would stop.
		w.Header().Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'")
		// With no-referrer the form's Origin would be "null".
		w.Header().Set("Referrer-Policy", "same-origin")
		page, err := g.consentPage(flow, who, visit.Tour)
		if err != nil {
			return err
		}
		g.writePage(w, http.StatusOK, page)
		return nil
	}
	start, err := g.auth.Begin(r.Context(), r.PathValue("flow"), visit)
	if err != nil {
		return err
	}
	g.signInBegun(r.Context(), flow)
	g.sendAway(w, r, start)
	return nil
}

// sendAway sends a browser to an authorization server, with the proof that it
// will be the same when it comes back.
func (g *Gateway) sendAway(w http.ResponseWriter, r *http.Request, start *auth.Start) {
	g.setCookie(w, start.Cookie)
	http.Redirect(w, r, start.RedirectURL, http.StatusSeeOther)
}

// onLoopback reports whether browsers reach the gateway on their own machine.
func (g *Gateway) onLoopback() bool {
	public, err := url.Parse(g.publicURL)
	return err == nil && isLoopbackName(public.Hostname())
}

// consentPage says what Continue would do. Where nobody logs in, nobody has
// authenticated the one who asked, so the person must know whether it was they.
func (g *Gateway) consentPage(flow *auth.FlowInfo, who visitor, tour bool) (pageData, error) {
	name := flow.Remote
	if name == auth.LoginRemote {
		name = "the gateway itself"
	}
	scopes := strings.Join(flow.Scopes, "\n")
	if scopes == "" {
		scopes = "what the server gives by default"
	}
	page := pageData{
		Title: "Sign in to " + name + "?",
		Say:   "Continue only if you asked for this yourself, just now, in your own assistant. Whoever sent you this link would act with your account.",
		Token: who.proof,
		Ask:   "Continue",
	}
	fact := func(label, value string) {
		if value != "" {
			page.Facts = append(page.Facts, [2]string{label, value})
		}
	}
	if g.users {
		page.Say = "After you have signed in, your assistants may use " + name + " with the account that you choose there."
		if flow.Client != "" {
			page.Say = "Your assistant asked for this. After you have signed in, it may use " + name + " with the account that you choose there."
		}
		fact("Your account here", cmp.Or(who.account, who.principal.Subject))
	}
	fact("Remote", name)
	fact("Sign-in at", flow.Issuer)
	if issuer, err := url.Parse(flow.Issuer); err != nil || !strings.EqualFold(issuer.Host, flow.SignInAt) {
		fact("Its page is at", flow.SignInAt)
	}
	fact("Permissions", scopes)
	fact("Asked for by", flow.Client)
	fact("Asked for at", flow.Asked.UTC().Format("15:04:05")+" UTC")
	if !flow.Stranger.IsZero() {
		page.Note = "Somebody who is logged in with another account has opened this link as well, and was refused. Keep such links to yourself."
	}
	if !g.users {
		return page, nil
	}
	v, err := g.view(who.principal)
	if err != nil {
		return page, err
	}
	page.Waiting = g.waiting(v, flow.Remote)
	if tour {
		page.Ask = ""
	}
	if n := count(page.Waiting); n > 0 {
		page.All = "Continue, then the " + plural(n, "other")
		if n == 1 {
			page.All = "Continue, then the other"
		}
	} else {
		page.Ask = "Continue"
	}
	return page, nil
}

// canonical returns the request's URL under the public URL's host, and whether
// the request came there.
func (g *Gateway) canonical(r *http.Request) (string, bool) {
	public, err := url.Parse(g.publicURL)
	if err != nil || strings.EqualFold(public.Host, r.Host) {
		return "", true
	}
	return g.publicURL + r.URL.EscapedPath(), false
}

func outcomePage(flow *auth.FlowInfo) pageData {
	if !flow.Outcome.OK {
		return pageData{Title: "Signed in, but not connected", Say: flow.Outcome.Say}
	}
	return pageData{Title: "You are signed in", Say: flow.Outcome.Say, OK: true}
}

// serveCallback finishes a sign-in: auth checks and stores, session connects,
// and the page says what came of it.
func (g *Gateway) serveCallback(w http.ResponseWriter, r *http.Request) error {
	if err := g.mayCallBack(w, r); err != nil {
		return err
	}
	var who auth.Principal
	if g.users {
		// Nobody is nobody's flow's owner.
		at, err := g.visitor(r)
		if err != nil && !errors.Is(err, auth.ErrNotLoggedIn) {
			return err
		}
		who = at.principal
	}
	query, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return fmt.Errorf("%w: malformed query", auth.ErrStateUnknown)
	}
	finished, err := g.auth.Finish(r.Context(), auth.Callback{
		Remote: r.PathValue("remote"),
		Path:   r.URL.Path,
		Query:  query,
		Cookie: cookiesOf(r),
		Who:    who,
	})
	if err != nil {
		g.signInRefused(r.Context(), finished, err)
		if finished != nil && (errors.Is(err, auth.ErrDenied) || errors.Is(err, auth.ErrNotLoggedIn)) {
			return &againError{err, connectLink(finished)}
		}
		return err
	}
	if finished.Again != nil {
		g.sendAway(w, r, finished.Again)
		return nil
	}
	g.signInFinished(r.Context(), finished, g.auth.Status(finished.Principal, finished.Remote).Account)
	// The person has signed in, even if their browser leaves now.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), connectWait)
	defer cancel()
	outcome := g.connected(ctx, finished)
	g.auth.Conclude(ctx, finished.FlowID, outcome)
	if finished.Tour && outcome.OK {
		return g.tourOn(w, r, finished.Principal)
	}
	http.Redirect(w, r, "/connect/"+url.PathEscape(finished.FlowID), http.StatusSeeOther)
	return nil
}

// againError is an [auth.ErrDenied], or an [auth.ErrNotLoggedIn] of somebody whose
// login has ended meanwhile, which leaves the link good for another try. Its
// browser is the one that began: only that gets here.
type againError struct {
	err  error
	link string
}

func (e *againError) Error() string { return e.err.Error() }
func (e *againError) Unwrap() error { return e.err }

// connectLink is the path of a sign-in's own page.
func connectLink(f *auth.Finished) string {
	link := "/connect/" + url.PathEscape(f.FlowID)
	if f.Tour {
		link += "?" + tourParameter
	}
	return link
}

// mayCallBack counts a callback, and refuses those that are too many. One that can
// be nobody's counts for its address alone, or a few machines that send such would
// keep everybody from signing in.
func (g *Gateway) mayCallBack(w http.ResponseWriter, r *http.Request) error {
	plausible := g.auth.Plausible(auth.Callback{Query: r.URL.Query(), Cookie: cookiesOf(r)})
	retry, ok := g.callback.allow(g.remoteAddr(r), plausible)
	if ok {
		return nil
	}
	g.tooMany(w, r, auth.Principal{}, "callbackPerMinute", retry)
	return errTooMany
}

// connected connects the session to the remote that was signed in to and says
// what came of it.
func (g *Gateway) connected(ctx context.Context, f *auth.Finished) auth.Outcome {
	const back = " You can close this page and repeat the call in your assistant."
	v, err := g.view(f.Principal)
	if f.Remote == auth.LoginRemote && err == nil {
		return auth.Outcome{OK: true, Say: "You are logged in. " + g.connectByLogin(ctx, v) + back}
	}
	if err == nil {
		err = v.session.Connect(ctx, f.Remote)
	}
	if err == nil {
		tools := v.session.Status(f.Remote).Tools
		g.log.Info("connected after sign-in", "remote", f.Remote, "principal", f.Principal, "tools", tools)
		return auth.Outcome{OK: true, Say: fmt.Sprintf("%s is connected, %s.", f.Remote, plural(tools, "tool")) + back}
	}
	g.log.Warn("signed in, but not connected", "remote", f.Remote, "principal", f.Principal, "error", err)
	if errors.Is(err, context.DeadlineExceeded) {
		return auth.Outcome{OK: true, Say: fmt.Sprintf("The sign-in to %s is stored. The server has not answered yet; the connection is made when it does.", f.Remote) + back}
	}
	if _, again := errors.AsType[*auth.RequiredError](err); again {
		return auth.Outcome{Say: fmt.Sprintf("The sign-in at the authorization server worked, but %s does not accept the token that it gave. Ask the operator of %s.", f.Remote, f.Remote)}
	}
	if say, ok := sentence(err); ok {
		return auth.Outcome{Say: "The sign-in is stored. " + say}
	}
	return auth.Outcome{Say: fmt.Sprintf("The sign-in to %s is stored, but the connection failed. The gateway's log says why; it is tried again with the next call.", f.Remote)}
}

// connectByLogin connects the session to the remotes that a login is good for,
// and says what came of each.
func (g *Gateway) connectByLogin(ctx context.Context, v *view) string {
	var servers []*Server
	for _, server := range g.cfg.Running() {
		if server.Auth.ByLogin() {
			servers = append(servers, server)
		}
	}
	said := make([]string, len(servers))
	var wg sync.WaitGroup
	for i, server := range servers {
		wg.Go(func() {
			err := v.session.Connect(ctx, server.Name)
			if err == nil {
				said[i] = fmt.Sprintf("%s is connected, %s.", server.Name, plural(v.session.Status(server.Name).Tools, "tool"))
				return
			}
			g.log.Warn("logged in, but a remote is not connected", "remote", server.Name, "principal", v.principal, "error", err)
			if say, ok := sentence(err); ok {
				said[i] = strings.TrimSuffix(say, ".") + "."
			} else {
				said[i] = server.Name + " is not connected yet."
			}
		})
	}
	wg.Wait()
	return strings.Join(said, " ")
}

// serveClientMetadata serves the Client ID Metadata Document, which
// authorization servers fetch and any page may read.
func serveClientMetadata(document []byte) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			w.Header().Set("Allow", "GET, HEAD")
			http.Error(w, "Method Not Allowed", http.StatusMethodNotAllowed)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("Cache-Control", "public, max-age=3600")
		w.Header().Set("Access-Control-Allow-Origin", "*")
		w.Header().Set("X-Content-Type-Options", "nosniff")
		w.Write(document)
	}
}
