package demo

import (
	"bytes"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"errors"
	"html/template"
	"net/http"
	"net/url"
	"strings"

	"github.com/zitadel/oidc/v3/pkg/op"
)

//go:embed login.html
var loginHTML string

//go:embed login.css
var loginCSS string

var (
	loginTemplate = template.Must(template.New("login").Parse(loginHTML))
	// The page's own style and nothing else.
	styleSource = func() string {
		sum := sha256.Sum256([]byte(loginCSS))
		return "'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'"
	}()
)

// loginView is what the page shows: a form, or, without an ID, a problem.
type loginView struct {
	ID             string
	Client, Host   string // who asks, and where it is
	Resources      []string
	User, Password string // to offer; "" offers nothing
	Problem        string
	Style          template.CSS
	formTargets    string
}

// view describes a request to the person who is to allow it.
func (p *Provider) view(r authRequest, c *client) loginView {
	v := loginView{ID: r.id, Client: c.name, Resources: r.resources}
	if p.hint {
		v.User, v.Password = p.storage.first.Name, p.storage.first.Password
	}
	if v.Client == "" {
		v.Client = "A client"
	}
	if to, err := url.Parse(r.redirect); err == nil {
		v.Host = to.Host
		// Browsers hold form-action against the redirects after a form, too. A
		// policy cannot name an IPv6 address.
		v.formTargets = to.Scheme + "://" + to.Host
		if strings.Contains(to.Host, "[") {
			v.formTargets = to.Scheme + ":"
		}
	}
	return v
}

const goneSay = "This sign-in is over, or never began. Ask for a new link where you got this one."

func (p *Provider) loginPage(w http.ResponseWriter, r *http.Request) {
	request, c, ok := p.storage.pending(r.URL.Query().Get("id"))
	if !ok {
		p.page(w, http.StatusBadRequest, loginView{Problem: goneSay})
		return
	}
	p.page(w, http.StatusOK, p.view(request, c))
}

func (p *Provider) login(w http.ResponseWriter, r *http.Request) {
	// Nobody else's page signs anybody in.
	if err := http.NewCrossOriginProtection().Check(r); err != nil {
		p.page(w, http.StatusForbidden, loginView{Problem: "This form was sent by another site's page."})
		return
	}
	id := r.PostFormValue("id")
	request, c, ok := p.storage.pending(id)
	if !ok {
		p.page(w, http.StatusBadRequest, loginView{Problem: goneSay})
		return
	}
	if r.PostForm.Get("action") == "cancel" {
		p.cancel(w, r, request)
		return
	}
	switch err := p.storage.signIn(id, r.PostForm.Get("username"), r.PostForm.Get("password")); {
	case errors.Is(err, errCredentials):
		v := p.view(request, c)
		v.Problem = "The name or the password is wrong."
		p.page(w, http.StatusForbidden, v)
	case err != nil:
		p.page(w, http.StatusBadRequest, loginView{Problem: goneSay})
	default:
		p.log.Info("provider: signed in", "user", r.PostForm.Get("username"), "client", c.name)
		ctx := op.ContextWithIssuer(r.Context(), p.issuer)
		http.Redirect(w, r, op.AuthCallbackURL(p.op)(ctx, id), http.StatusSeeOther)
	}
}

// cancel tells the client that the person does not want to.
func (p *Provider) cancel(w http.ResponseWriter, r *http.Request, request authRequest) {
	p.storage.drop(request.id)
	to, err := url.Parse(request.redirect)
	if err != nil {
		p.page(w, http.StatusBadRequest, loginView{Problem: goneSay})
		return
	}
	query := to.Query()
	query.Set("error", "access_denied")
	to.RawQuery = query.Encode()
	http.Redirect(&answer{w, p.issuer, request.state}, r, to.String(), http.StatusSeeOther)
}

// page writes the page. It is the only place that does.
func (p *Provider) page(w http.ResponseWriter, status int, v loginView) {
	v.Style = template.CSS(loginCSS)
	var page bytes.Buffer
	if err := loginTemplate.Execute(&page, v); err != nil {
		p.log.Error("provider: writing the login page", "err", err)
		http.Error(w, http.StatusText(http.StatusInternalServerError), http.StatusInternalServerError)
		return
	}
	h := w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Content-Security-Policy", strings.TrimSpace("default-src 'none'; style-src "+styleSource+
		"; base-uri 'none'; frame-ancestors 'none'; form-action 'self' "+v.formTargets))
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("X-Frame-Options", "DENY")
	h.Set("Cache-Control", "no-store")
	// Not no-referrer: it would turn the form's Origin into "null".
	h.Set("Referrer-Policy", "same-origin")
	w.WriteHeader(status)
	w.Write(page.Bytes())
}
