package gateway

import (
	"fmt"
	"net/netip"
	"net/url"
	"slices"
	"strings"

	"gatehouse/auth/secret"
)

// Auth is how one signs in to a remote.
type Auth struct {
	Type                    string // oauth | clientCredentials | none
	Issuer                  string // empty: as discovered, and pinned at first use
	ClientID                string
	ClientSecret            secret.Text
	ClientSecretFile        string
	PrivateKeyFile          string
	TokenEndpointAuthMethod string // empty: what the authorization server lists
	CallbackPath            string // empty: the gateway's
	Scopes                  []string
	Audience                string
	Resource                string
	TokenEndpoint           *url.URL // nil: as discovered
	ExpectedIssuer          string
	TLS                     TLS // towards TokenEndpoint
}

type authFile struct {
	Type                    string   `json:"type"`
	Issuer                  string   `json:"issuer"`
	ClientID                string   `json:"clientId"`
	ClientSecret            string   `json:"clientSecret"`
	ClientSecretFile        string   `json:"clientSecretFile"`
	PrivateKeyFile          string   `json:"privateKeyFile"`
	TokenEndpointAuthMethod string   `json:"tokenEndpointAuthMethod"`
	CallbackPath            string   `json:"callbackPath"`
	Scopes                  []string `json:"scopes"`
	Audience                string   `json:"audience"`
	Resource                string   `json:"resource"`
	TokenEndpoint           string   `json:"tokenEndpoint"`
	ExpectedIssuer          string   `json:"expectedIssuer"`
	TLS                     TLS      `json:"tls"`

	SSOGroup           string `json:"ssoGroup" later:"true"`
	ConnectorID        string `json:"connectorId" later:"true"`
	SubjectTokenType   string `json:"subjectTokenType" later:"true"`
	RequestedTokenType string `json:"requestedTokenType" later:"true"`
}

// SignsIn reports whether the remote gets tokens.
func (a *Auth) SignsIn() bool { return a.Type != "none" }

// authTypes are the ways of signing in, with the settings that each knows.
var authTypes = []struct {
	name string
	keys []string
}{
	{"oauth", []string{"issuer", "clientId", "clientSecret", "clientSecretFile", "tokenEndpointAuthMethod", "callbackPath", "scopes"}},
	{"clientCredentials", []string{"issuer", "clientId", "clientSecret", "clientSecretFile", "privateKeyFile", "tokenEndpointAuthMethod",
		"scopes", "audience", "resource", "tokenEndpoint", "expectedIssuer", "tls"}},
	{"none", nil},
}

func checkAuth(r *reader, at string, f *authFile, allow []netip.Prefix) Auth {
	a := Auth{
		Type: or(f.Type, "oauth"), Issuer: f.Issuer, ClientID: f.ClientID, ClientSecret: secret.New(f.ClientSecret),
		ClientSecretFile: f.ClientSecretFile, PrivateKeyFile: f.PrivateKeyFile, TokenEndpointAuthMethod: f.TokenEndpointAuthMethod,
		CallbackPath: f.CallbackPath, Scopes: f.Scopes, Audience: f.Audience, Resource: f.Resource, ExpectedIssuer: f.ExpectedIssuer, TLS: f.TLS,
	}
	checkAuthType(r, at, f, a.Type)
	for _, issuer := range []struct{ key, value string }{{"issuer", f.Issuer}, {"expectedIssuer", f.ExpectedIssuer}} {
		checkIssuer(r, at+"."+issuer.key, issuer.value, allow)
	}
	checkClient(r, at, f, a.Type)
	checkCallbackPath(r, at+".callbackPath", f.CallbackPath)
	for i, scope := range f.Scopes {
		if scope == "" || strings.ContainsFunc(scope, func(c rune) bool { return c <= ' ' || c >= 0x7f || c == '"' || c == '\\' }) {
			r.problem(fmt.Sprintf("%s.scopes.%d", at, i), "is not one scope: write each as an element of its own")
		}
	}
	if f.TokenEndpoint != "" {
		a.TokenEndpoint = checkRemoteURL(r, at+".tokenEndpoint", f.TokenEndpoint, allow)
	}
	if u, err := url.Parse(f.Resource); f.Resource != "" && (err != nil || u.Scheme == "" || u.Host == "" && u.Opaque == "" || u.Fragment != "") {
		// RFC 8707 section 2: "an absolute URI [...] MUST NOT include a fragment component".
		r.problem(at+".resource", "must be an absolute URI without a fragment")
	}
	if f.TLS != (TLS{}) && f.TokenEndpoint == "" {
		r.problem(at+".tls", `is towards "tokenEndpoint", which is not set`)
	} else if (f.TLS.Cert == "") != (f.TLS.Key == "") {
		r.problem(at+".tls", `"cert" and "key" go together`)
	}
	return a
}

// checkAuthType refuses an unknown type, and settings that mean nothing to the
// one that is given.
func checkAuthType(r *reader, at string, f *authFile, typ string) {
	var names []string
	var keys []string
	known := false
	for _, t := range authTypes {
		names = append(names, t.name)
		if t.name == typ {
			keys, known = t.keys, true
		}
	}
	switch {
	case f.Type == "" && r.given(at+".type"), !known && !slices.Contains([]string{"forward", "exchange", "idJag"}, typ):
		r.problem(at+".type", "must be one of %s", strings.Join(names, ", "))
		return
	case !known:
		r.problem(at+".type", "%q is %s", typ, notYet)
		return
	}
	for _, set := range []struct {
		key string
		has bool
	}{
		{"issuer", f.Issuer != ""}, {"clientId", f.ClientID != ""}, {"clientSecret", f.ClientSecret != ""},
		{"clientSecretFile", f.ClientSecretFile != ""}, {"privateKeyFile", f.PrivateKeyFile != ""},
		{"tokenEndpointAuthMethod", f.TokenEndpointAuthMethod != ""}, {"callbackPath", f.CallbackPath != ""}, {"scopes", len(f.Scopes) > 0},
		{"audience", f.Audience != ""}, {"resource", f.Resource != ""}, {"tokenEndpoint", f.TokenEndpoint != ""},
		{"expectedIssuer", f.ExpectedIssuer != ""}, {"tls", f.TLS != TLS{}},
	} {
		if set.has && !slices.Contains(keys, set.key) {
			r.problem(at+"."+set.key, "has no effect where the type is %s", typ)
		}
	}
}

// checkClient checks what the gateway authenticates with at a token endpoint.
func checkClient(r *reader, at string, f *authFile, typ string) {
	secrets := 0
	for _, given := range []string{f.ClientSecret, f.ClientSecretFile, f.PrivateKeyFile} {
		if given != "" {
			secrets++
		}
	}
	switch {
	case f.ClientSecret != "" && f.ClientSecretFile != "":
		r.problem(at+".clientSecretFile", `"clientSecret" and "clientSecretFile" exclude each other`)
	case secrets > 1:
		r.problem(at+".privateKeyFile", `a client secret and "privateKeyFile" exclude each other`)
	}
	switch {
	case typ == "clientCredentials" && (f.ClientID == "" || secrets == 0):
		r.problem(at, `clientCredentials needs "clientId", and "clientSecret", "clientSecretFile" or "privateKeyFile"`)
	case f.ClientID == "" && (secrets > 0 || f.TokenEndpointAuthMethod != "" || f.CallbackPath != ""):
		r.problem(at, `has settings of a registered client, but no "clientId"`)
	}
	method := at + ".tokenEndpointAuthMethod"
	switch f.TokenEndpointAuthMethod {
	case "":
	case "none":
		if secrets > 0 {
			r.problem(method, "says none, and there is a secret or a key that would have no effect")
		} else if typ == "clientCredentials" {
			r.problem(method, "none authenticates nobody, which is all that clientCredentials does")
		}
	case "client_secret_basic", "client_secret_post":
		if f.PrivateKeyFile != "" {
			r.problem(method, `needs a client secret, and there is "privateKeyFile"`)
		}
	case "private_key_jwt":
		if f.PrivateKeyFile == "" {
			r.problem(method, `needs "privateKeyFile"`)
		}
	default:
		r.problem(method, "must be one of client_secret_basic, client_secret_post, private_key_jwt, none")
	}
}

// checkIssuer checks the identifier of an authorization server.
func checkIssuer(r *reader, at, issuer string, allow []netip.Prefix) {
	if issuer == "" {
		return
	}
	u, err := url.Parse(issuer)
	switch {
	case err != nil || !hasHost(u) || u.Scheme != "https" && u.Scheme != "http" || u.User != nil || strings.ContainsAny(issuer, "?#"):
		r.problem(at, "must be the https URL of an issuer, without query and fragment")
	case u.Scheme == "http" && !plainAllowed(u.Hostname(), allow):
		r.problem(at, "plain http is for loopback only: use https, or list its address in allowAddresses")
	}
}
