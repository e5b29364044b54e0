package gateway

import (
	"bytes"
	_ "embed"
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
	if !g.onLoopback() {
		return
	}
	mux.HandleFunc(homePath, g.page(g.serveHome, http.MethodGet, http.MethodHead))
	mux.HandleFunc(signInPath, g.page(g.serveSignIn, http.MethodPost))
	mux.HandleFunc(signOutPath, g.page(g.serveSignOut, http.MethodPost))
}

// browserPrincipal says for whom a browser acts that asks for the status page.
// On loopback it is the local user, whoever of this machine that is.
func (g *Gateway) browserPrincipal(r *http.Request) (auth.Principal, error) {
	if !g.onLoopback() || g.fromElsewhere(r) {
		return auth.Principal{}, errNotHere
	}
	return auth.Local, nil
}

// homePage is what the status page shows. Names and sentences in it are the
// config's and the gateway's; of a remote or a provider are the account, the
// issuer and the name of a server, which are bounded and escaped.
type homePage struct {
	Said    string // what the last form did; empty: nothing
	Token   string // proves that a form comes from this page
	Remotes []homeRemote
	SignOut bool // there is something to sign out of
	Others  int  // clients whose sign-ins are their own
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
	p, err := g.browserPrincipal(r)
	if err != nil {
		return err
	}
	return g.writeHome(w, r, p)
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

func (g *Gateway) writeHome(w http.ResponseWriter, r *http.Request, p auth.Principal) error {
	v, err := g.view(p)
	if err != nil {
		return err
	}
	_, all := g.report(r.Context(), v, false)
	data := homePage{Said: g.saidBy(p, r), Token: g.tickets.seal(p, []byte(sealedForm)), Version: g.version}
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
	if g.cfg.Gateway.Sessions != "shared" {
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
	return out
}

// form reads a form of the status page, and refuses what does not come from it.
func (g *Gateway) form(w http.ResponseWriter, r *http.Request) (auth.Principal, error) {
	p, err := g.browserPrincipal(r)
	if err != nil {
		return p, err
	}
	if err := http.NewCrossOriginProtection().Check(r); err != nil {
		return p, fmt.Errorf("%w: %w", errForeignPage, err)
	}
	r.Body = http.MaxBytesReader(w, r.Body, maxForm)
	if err := r.ParseForm(); err != nil {
		return p, fmt.Errorf("%w: not a form", errForeignPage)
	}
	if said, ok := g.tickets.open(p, r.PostForm.Get("token")); !ok || string(said) != sealedForm {
		return p, errOldPage
	}
	return p, nil
}

// serveSignIn leads to the sign-in of a remote.
func (g *Gateway) serveSignIn(w http.ResponseWriter, r *http.Request) error {
	p, err := g.form(w, r)
	if err != nil {
		return err
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
	p, err := g.form(w, r)
	if err != nil {
		return err
	}
	v, err := g.view(p)
	if err != nil {
		return err
	}
	name := r.PostForm.Get("remote")
	remotes, say := g.toSignOut(v, name, "", name == "")
	if say != "" {
		return errOldPage
	}
	g.say(w, r, p, g.signOutOf(r.Context(), caller{view: v}, remotes))
	return nil
}
