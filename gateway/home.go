package gateway

import (
	"bytes"
	"cmp"
	_ "embed"
	"errors"
	"fmt"
	"html/template"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"gatehouse/auth"
	"gatehouse/session"
)

// This file is the status page: how each remote stands, and forms to sign in
// and out. It works without scripts.

//go:embed home.html
var homeHTML string

var homeTemplate = template.Must(template.Must(pageTemplate.Clone()).New("home").Parse(homeHTML))

const (
	homePath    = "/{$}"
	signInPath  = "/signin"
	signOutPath = "/signout"
)

// maxForm bounds what the page's own forms send.
const maxForm = 4 << 10

// homeRoutes adds the status page, where somebody can be told to be its reader.
func (g *Gateway) homeRoutes(mux *http.ServeMux) {
	if !g.onLoopback() && !g.users {
		return
	}
	mux.HandleFunc(homePath, g.page(g.serveHome, http.MethodGet, http.MethodHead))
	mux.HandleFunc(signInPath, g.page(g.serveSignIn, http.MethodPost))
	mux.HandleFunc(signOutPath, g.page(g.serveSignOut, http.MethodPost))
}

// homePage is what the status page shows. Names and sentences in it are the
// config's and the gateway's; of a remote or a provider are the account, the
// issuer and the name of a server, which are bounded and escaped.
type homePage struct {
	Said    string // what the last form did; empty: nothing
	Token   string // proves that a form comes from this page
	Remotes []homeRemote
	SignOut bool   // there is something to sign out of
	Others  int    // clients whose sign-ins are their own
	Account string // who is logged in; empty: the local user
	All     string // on the button that signs in to all that wait; empty: there is none
	Waiting []waitingAt
	Version string
}

type homeRemote struct {
	Name, Label string
	State       string // ok | wait | bad | off: its colour
	StateSay    string
	Facts       []homeFact
	Problem     string
	ProblemAt   *time.Time // may be nil
	Advice      string
	SignIn      string // on the button; empty: there is none
	SignOut     bool
}

type homeFact struct {
	Label, Value string
	Time         *time.Time // before the value; may be nil
}

func (g *Gateway) serveHome(w http.ResponseWriter, r *http.Request) error {
	if canonical, ok := g.canonical(r); !ok && g.users {
		http.Redirect(w, r, canonical, http.StatusSeeOther)
		return nil
	}
	who, err := g.visitor(r)
	if errors.Is(err, auth.ErrNotLoggedIn) {
		g.logInFirst(w, r)
		return nil
	} else if err != nil {
		return err
	}
	return g.writeHome(w, r, who)
}

// What a page of ours seals into a form or an address, for its principal: only
// who could read the page has it.
const (
	sealedForm = "form"
	sealedSaid = "said:"
)

// saidBy is what the form did that led here.
func (g *Gateway) saidBy(p auth.Principal, r *http.Request) string {
	plain, _ := g.tickets.open(p, r.URL.Query().Get("said"))
	said, ok := strings.CutPrefix(string(plain), sealedSaid)
	if !ok {
		return "" // sealed for something else, and none of the page's business
	}
	return said
}

// say leads back to the status page, which then says something.
func (g *Gateway) say(w http.ResponseWriter, r *http.Request, p auth.Principal, said string) {
	http.Redirect(w, r, "/?said="+url.QueryEscape(g.tickets.seal(p, []byte(sealedSaid+said))), http.StatusSeeOther)
}

// homeHeaders: a form's answer leads to the provider, which form-action would
// stop, and with no-referrer its Origin would be "null".
func homeHeaders(w http.ResponseWriter) {
	w.Header().Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'")
	w.Header().Set("Referrer-Policy", "same-origin")
}

func (g *Gateway) writeHome(w http.ResponseWriter, r *http.Request, who visitor) error {
	p := who.principal
	v, err := g.view(p)
	if err != nil {
		return err
	}
	_, all := g.report(r.Context(), v, false)
	data := homePage{Said: g.saidBy(p, r), Token: who.proof, Version: g.version}
	if g.users {
		data.Account = cmp.Or(who.account, p.Subject)
	}
	data.Waiting = g.waiting(v, "")
	if n := count(data.Waiting); n > 1 {
		data.All = fmt.Sprintf("Sign in to all %d", n)
	}
	if g.cfg.Gateway.Login != nil {
		if held := g.auth.Status(p, auth.LoginRemote); held.SignedIn {
			data.Remotes = append(data.Remotes, homeRemote{Name: auth.LoginRemote, Label: "Your login at the gateway", State: "ok", StateSay: "Logged in", SignOut: true,
				Facts: facts(remoteStatus{Account: held.Account, Issuer: held.Issuer, Expires: stamp(held.Expires), Refreshable: held.Refreshable})})
		}
	}
	for _, s := range all {
		data.Remotes = append(data.Remotes, g.homeRemote(s))
	}
	data.SignOut = slices.ContainsFunc(data.Remotes, func(r homeRemote) bool { return r.SignOut })
	if g.cfg.Gateway.Sessions != "shared" && !g.users {
		g.clients.mu.Lock()
		data.Others = len(g.clients.byID)
		g.clients.mu.Unlock()
	}
	var out bytes.Buffer
	if err := homeTemplate.Execute(&out, data); err != nil {
		return fmt.Errorf("rendering the status page: %w", err)
	}
	homeHeaders(w)
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.Write(out.Bytes())
	return nil
}

// homeRemote words a remote's status for a person at a browser.
func (g *Gateway) homeRemote(s remoteStatus) homeRemote {
	out := homeRemote{Name: s.Name, Label: s.Name, Problem: s.LastError, ProblemAt: s.LastErrorAt, Facts: facts(s)}
	server, _ := g.cfg.Named(s.Name)
	person := server != nil && g.cfg.Gateway.OAuth.Enabled && server.Auth.SignsIn() && server.Auth.Type != auth.TypeMachine
	if person && s.SignIn == "signed_out" {
		out.SignIn = "Sign in"
	}
	out.SignOut = person && s.SignIn == "signed_in" && !server.Auth.ByLogin()
	switch s.Status {
	case string(session.StateConnected):
		out.State, out.StateSay = "ok", "Connected, "+plural(s.Tools, "tool")
	case string(session.StateConnecting):
		out.State, out.StateSay = "wait", "Connecting"
	case "auth_required":
		out.State, out.StateSay = "wait", "Sign-in needed"
	case string(session.StateUnsupported):
		out.State, out.StateSay = "bad", "Not supported"
	case "disabled":
		out.State, out.StateSay, out.Advice = "off", "Switched off", s.Advice
	default:
		out.State, out.StateSay, out.Advice = "bad", "Unavailable", s.Advice
		switch {
		case s.retried:
			out.SignIn = "" // nobody is there to sign in with
		case out.SignIn != "":
			out.SignIn, out.Advice = "Try to sign in", ""
		}
	}
	return out
}

func facts(s remoteStatus) []homeFact {
	var out []homeFact
	add := func(label, value string) {
		if value != "" {
			out = append(out, homeFact{Label: label, Value: value})
		}
	}
	if s.SignInBy != signInBy[auth.TypeOAuth] {
		add("Signed in by", s.SignInBy)
	}
	add("Account", s.Account)
	add("Signed in at", s.Issuer)
	if s.Expires != nil {
		until := homeFact{Label: "Until", Time: s.Expires}
		if s.Refreshable {
			until.Value = ", then renewed by itself"
		}
		out = append(out, until)
	}
	add("Server", s.Server)
	if s.StrangerAt != nil {
		out = append(out, homeFact{Label: "Link opened by another account", Time: s.StrangerAt, Value: ", and refused: keep such links to yourself"})
	}
	return out
}

// form reads a form of the status page, and refuses what does not come from it.
func (g *Gateway) form(w http.ResponseWriter, r *http.Request) (visitor, error) {
	who, err := g.visitor(r)
	if err != nil {
		return who, err
	}
	if err := http.NewCrossOriginProtection().Check(r); err != nil {
		return who, fmt.Errorf("%w: %w", errForeignPage, err)
	}
	r.Body = http.MaxBytesReader(w, r.Body, maxForm)
	if err := r.ParseForm(); err != nil {
		return who, fmt.Errorf("%w: not a form", errForeignPage)
	}
	if !g.proves(who, r.PostForm.Get("token")) {
		return who, errOldPage
	}
	return who, nil
}

// serveSignIn leads to the sign-in of a remote.
func (g *Gateway) serveSignIn(w http.ResponseWriter, r *http.Request) error {
	who, err := g.form(w, r)
	if err != nil {
		return err
	}
	p := who.principal
	if r.PostForm.Has(tourParameter) {
		return g.tourOn(w, r, p)
	}
	server, _ := g.cfg.Named(r.PostForm.Get("remote"))
	if server == nil {
		return errOldPage
	}
	v, err := g.view(p)
	if err != nil {
		return err
	}
	required, say, err := g.signIn(r.Context(), caller{view: v}, server)
	if required != nil {
		homeHeaders(w)
		http.Redirect(w, r, required.AuthURL, http.StatusSeeOther)
		return nil
	}
	if err != nil {
		said, ok := sentence(err)
		if !ok {
			return err
		}
		say = said
	}
	g.say(w, r, p, say)
	return nil
}

// serveSignOut signs out of one remote, or of all.
func (g *Gateway) serveSignOut(w http.ResponseWriter, r *http.Request) error {
	who, err := g.form(w, r)
	if err != nil {
		return err
	}
	p := who.principal
	v, err := g.view(p)
	if err != nil {
		return err
	}
	name := r.PostForm.Get("remote")
	remotes, say := g.toSignOut(v, name, "", name == "")
	if say != "" {
		return errOldPage
	}
	said, _ := g.signOutOf(r.Context(), caller{view: v}, remotes)
	g.say(w, r, p, said)
	return nil
}

// tourParameter says that a sign-in is one of several, which follow each other.
const tourParameter = "all"

// waitingAt are the remotes that wait for a sign-in at one provider.
type waitingAt struct {
	At    string // its issuer
	Names string
	n     int
}

func count(waiting []waitingAt) (n int) {
	for _, w := range waiting {
		n += w.n
	}
	return n
}

// toSignIn are the remotes that a person could sign in to now, those of one
// provider together.
func (g *Gateway) toSignIn(v *view, but string) (servers []*Server, issuers []string) {
	type waiting struct {
		server *Server
		issuer string
	}
	var all []waiting
	first := map[string]int{}
	for i, server := range g.cfg.Running() {
		if server.Name == but || server.Command != "" {
			continue
		}
		s := g.remoteStatus(v, server, true)
		if g.homeRemote(s).SignIn == "" || server.Auth.ByLogin() {
			continue
		}
		issuer := cmp.Or(server.Auth.Issuer, s.Issuer, g.auth.PinnedIssuer(v.ended, server.Name))
		if _, known := first[issuer]; !known {
			first[issuer] = i
		}
		all = append(all, waiting{server, issuer})
	}
	slices.SortStableFunc(all, func(a, b waiting) int { return cmp.Compare(first[a.issuer], first[b.issuer]) })
	for _, w := range all {
		servers, issuers = append(servers, w.server), append(issuers, w.issuer)
	}
	return servers, issuers
}

// waiting says for a page which remotes wait for a sign-in, but for one.
func (g *Gateway) waiting(v *view, but string) (out []waitingAt) {
	servers, issuers := g.toSignIn(v, but)
	for i, server := range servers {
		at := cmp.Or(issuers[i], "a provider that is found when you sign in")
		if n := len(out); n > 0 && out[n-1].At == at {
			out[n-1].Names += ", " + server.Name
			out[n-1].n++
			continue
		}
		out = append(out, waitingAt{At: at, Names: server.Name, n: 1})
	}
	return out
}

// tourOn leads to the next remote that waits for a sign-in, by way of its own
// page, or to the status page when none is left.
func (g *Gateway) tourOn(w http.ResponseWriter, r *http.Request, p auth.Principal) error {
	v, err := g.view(p)
	if err != nil {
		return err
	}
	var failed []string
	servers, _ := g.toSignIn(v, "")
	for _, server := range servers {
		required, _, err := g.signIn(r.Context(), caller{view: v}, server)
		switch {
		case required != nil:
			homeHeaders(w)
			http.Redirect(w, r, required.AuthURL+"?"+tourParameter, http.StatusSeeOther)
			return nil
		case err != nil:
			say, ok := sentence(err)
			if !ok {
				say = server.Name + ": the sign-in could not be begun; the gateway's log says why."
			}
			failed = append(failed, say)
		}
	}
	said := "You are signed in to every remote that asks for it."
	if len(failed) > 0 {
		said = strings.Join(failed, "\n")
	}
	g.say(w, r, p, said)
	return nil
}
