package authtest

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"html"
	"io"
	"net/http"
	"net/http/cookiejar"
	"net/url"
	"regexp"
	"strings"
	"testing"
	"time"
)

// Browser follows links like a person with one: it keeps cookies, follows
// redirects, and signs in where a page asks for a password. Two browsers are
// two people, or one with two machines. It may be used by several goroutines.
type Browser struct {
	User, Password string // for login forms; set by [NewBrowser] to what [OP] has

	t      testing.TB
	client *http.Client
	jar    *cookiejar.Jar
}

// Page is where a walk ended.
type Page struct {
	Status int // 0 if nothing answered: then Err says why
	URL    string
	Header http.Header
	Body   string
	Hops   []Hop  // every request on the way, the last being the page's own
	Next   string // of OpenUntil: the URL that was not asked for
	Err    error
}

// Hop is one request on the way.
type Hop struct {
	Method, URL string
	Status      int
}

// NewBrowser returns a browser without any cookies.
func NewBrowser(t testing.TB) *Browser {
	t.Helper()
	jar, err := cookiejar.New(nil)
	if err != nil {
		t.Fatal(err)
	}
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.Proxy = nil
	b := &Browser{User: "alice", Password: "alice", t: t, jar: jar, client: &http.Client{
		Transport: transport, Jar: jar, Timeout: 30 * time.Second,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
	t.Cleanup(transport.CloseIdleConnections)
	return b
}

// Trust makes the browser trust these certificates, PEM, and no others.
func (b *Browser) Trust(pem ...[]byte) {
	roots := x509.NewCertPool()
	for _, p := range pem {
		roots.AppendCertsFromPEM(p)
	}
	b.client.Transport.(*http.Transport).TLSClientConfig = &tls.Config{RootCAs: roots}
}

// Cookies returns the cookies that it would send to a URL.
func (b *Browser) Cookies(link string) []*http.Cookie {
	u, err := url.Parse(link)
	if err != nil {
		return nil
	}
	return b.jar.Cookies(u)
}

// Client returns what it uses, cookies and all; it does not follow redirects.
func (b *Browser) Client() *http.Client { return b.client }

// Open opens a link and goes where it leads, through login forms. Nothing
// answering is an error of the test.
func (b *Browser) Open(link string) *Page {
	b.t.Helper()
	page := b.walk(link, "")
	if page.Err != nil {
		b.t.Errorf("authtest: opening a link: %v", page.Err)
	}
	return page
}

// OpenUntil is Open, but stops when the next URL has a prefix, which is then
// in Next, as it would have been asked for. Nobody asked for it yet.
func (b *Browser) OpenUntil(link, prefix string) *Page {
	b.t.Helper()
	page := b.walk(link, prefix)
	switch {
	case page.Err != nil:
		b.t.Errorf("authtest: opening a link: %v", page.Err)
	case page.Next == "":
		b.t.Errorf("authtest: the walk ended with %d before it came to %s", page.Status, prefix)
	}
	return page
}

// Get asks for one URL, with cookies, and follows nothing. Its errors are in
// the page.
func (b *Browser) Get(link string) *Page {
	page := new(Page)
	b.step(page, http.MethodGet, link, nil)
	return page
}

// Do sends one request, with cookies, and follows nothing.
func (b *Browser) Do(method, link string, form url.Values) *Page {
	page := new(Page)
	b.step(page, method, link, form)
	return page
}

const maxHops = 20

func (b *Browser) walk(link, stop string) *Page {
	page := new(Page)
	method, form := http.MethodGet, url.Values(nil)
	for range maxHops {
		if stop != "" && strings.HasPrefix(link, stop) {
			page.Next = link
			return page
		}
		if !b.step(page, method, link, form) {
			return page
		}
		base, err := url.Parse(page.URL)
		if err != nil {
			page.Err = err
			return page
		}
		target := ""
		if page.Status >= 300 && page.Status < 400 {
			method, form, target = http.MethodGet, nil, page.Header.Get("Location")
		} else if action, fields, ok := loginForm(page.Body); ok {
			if form != nil {
				page.Err = fmt.Errorf("the sign-in as %q was refused", b.User)
				return page
			}
			method, form, target = http.MethodPost, fields, action
			form.Set("username", b.User)
			form.Set("password", b.Password)
		} else {
			return page
		}
		next, err := base.Parse(target)
		if err != nil {
			page.Err = err
			return page
		}
		link = next.String()
	}
	page.Err = fmt.Errorf("more than %d redirects", maxHops)
	return page
}

// step sends one request and notes it in the page.
func (b *Browser) step(page *Page, method, link string, form url.Values) bool {
	var body io.Reader
	if form != nil {
		body = strings.NewReader(form.Encode())
	}
	req, err := http.NewRequest(method, link, body)
	if err != nil {
		page.Err = err
		return false
	}
	req.Header.Set("Accept", "text/html")
	if form != nil {
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		// What a browser says of a form that a page of the same site posts.
		req.Header.Set("Origin", req.URL.Scheme+"://"+req.URL.Host)
		req.Header.Set("Sec-Fetch-Site", "same-origin")
	}
	resp, err := b.client.Do(req)
	if err != nil {
		page.Err = err
		return false
	}
	defer resp.Body.Close()
	content, err := io.ReadAll(io.LimitReader(resp.Body, 4<<20))
	if err != nil {
		page.Err = err
		return false
	}
	page.Status, page.URL, page.Header, page.Body = resp.StatusCode, link, resp.Header, string(content)
	page.Hops = append(page.Hops, Hop{method, link, resp.StatusCode})
	return true
}

var (
	formTag  = regexp.MustCompile(`(?is)<form\b([^>]*)>(.*?)</form>`)
	inputTag = regexp.MustCompile(`(?is)<input\b([^>]*)>`)
	attr     = regexp.MustCompile(`(?is)\b(name|value|type|action)\s*=\s*"([^"]*)"`)
)

func attrs(tag string) map[string]string {
	all := make(map[string]string)
	for _, m := range attr.FindAllStringSubmatch(tag, -1) {
		all[strings.ToLower(m[1])] = html.UnescapeString(m[2])
	}
	return all
}

// loginForm finds a form with a password in a page.
func loginForm(page string) (action string, fields url.Values, ok bool) {
	for _, form := range formTag.FindAllStringSubmatch(page, -1) {
		fields = make(url.Values)
		password := false
		for _, input := range inputTag.FindAllStringSubmatch(form[2], -1) {
			a := attrs(input[1])
			password = password || a["type"] == "password"
			if a["name"] != "" {
				fields.Set(a["name"], a["value"])
			}
		}
		if password {
			return attrs(form[1])["action"], fields, true
		}
	}
	return "", nil, false
}

// Submit posts the form of a page that has a button with this label, and goes
// where that leads.
func (b *Browser) Submit(page *Page, label string) *Page {
	b.t.Helper()
	for _, form := range formTag.FindAllStringSubmatch(page.Body, -1) {
		for _, button := range buttonTag.FindAllStringSubmatch(form[2], -1) {
			if !strings.HasPrefix(strings.TrimSpace(html.UnescapeString(button[2])), label) {
				continue
			}
			fields := make(url.Values)
			for _, input := range inputTag.FindAllStringSubmatch(form[2], -1) {
				if a := attrs(input[1]); a["name"] != "" {
					fields.Set(a["name"], a["value"])
				}
			}
			if a := attrs(button[1]); a["name"] != "" {
				fields.Set(a["name"], a["value"])
			}
			at, err := url.Parse(page.URL)
			if err != nil {
				b.t.Fatal(err)
			}
			to, err := at.Parse(attrs(form[1])["action"])
			if err != nil {
				b.t.Fatal(err)
			}
			next := b.Do(http.MethodPost, to.String(), fields)
			location := next.Header.Get("Location")
			if next.Err != nil || location == "" {
				return next
			}
			to, err = to.Parse(location)
			if err != nil {
				b.t.Fatal(err)
			}
			return b.Open(to.String())
		}
	}
	b.t.Fatalf("authtest: no button %q in this page:\n%s", label, page.Body)
	return nil
}

var buttonTag = regexp.MustCompile(`(?is)<button\b([^>]*)>(.*?)</button>`)
