package gateway

import (
	"fmt"
	"net/netip"
	"net/url"
	"slices"
	"strings"

	"gatehouse/auth"
	"gatehouse/auth/secret"
)

// Auth is how one signs in to a remote.
type Auth struct {
	Type                    string // oauth | forward | exchange | idJag | clientCredentials | none
	Issuer                  string // empty: as discovered, and pinned at first use
	ClientID                string
	ClientSecret            secret.Text
	ClientSecretFile        string
	PrivateKeyFile          string
	TokenEndpointAuthMethod string // empty: what the authorization server lists
	CallbackPath            string // empty: the gateway's
	Scopes                  []string
	SSOGroup                string // shares sign-ins with the others of the group
	Audience                string
	Resource                string
	TokenEndpoint           *url.URL // nil: as discovered
	ConnectorID             string
	ExpectedIssuer          string
	SubjectTokenType        string // idToken | accessToken; empty: idToken
	RequestedTokenType      string // accessToken | idToken | jwt; empty: accessToken
	TLS                     TLS    // towards TokenEndpoint
}

// Login is the provider where users log in to the gateway itself.
type Login struct {
	Issuer         string
	ClientID       string
	ClientSecret   secret.Text
	Audience       string   // whom clients' tokens must be for; empty: the public URL's /mcp
	IdentityClaims []string // that tell users apart; empty: sub
	Scopes         []string // empty: openid profile email groups
	IDTokenFile    string   // a workload's own identity, instead of users'
	AllowAddresses []netip.Prefix
}

type loginFile struct {
	Issuer         string   `json:"issuer"`
	ClientID       string   `json:"clientId"`
	ClientSecret   string   `json:"clientSecret"`
	Scopes         []string `json:"scopes"`
	IDTokenFile    string   `json:"idTokenFile"`
	AllowAddresses []string `json:"allowAddresses"`

	Audience       string   `json:"audience"`
	IdentityClaims []string `json:"identityClaims"`
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
	SSOGroup                string   `json:"ssoGroup"`
	Audience                string   `json:"audience"`
	Resource                string   `json:"resource"`
	TokenEndpoint           string   `json:"tokenEndpoint"`
	ConnectorID             string   `json:"connectorId"`
	ExpectedIssuer          string   `json:"expectedIssuer"`
	SubjectTokenType        string   `json:"subjectTokenType"`
	RequestedTokenType      string   `json:"requestedTokenType"`
	TLS                     TLS      `json:"tls"`
}

// SignsIn reports whether the remote gets tokens.
func (a *Auth) SignsIn() bool { return a.Type != "none" }

// ByLogin reports whether these come of the user's login at the gateway.
func (a *Auth) ByLogin() bool {
	return a.Type == auth.TypeForward || a.Type == auth.TypeExchange || a.Type == auth.TypeIDJAG
}

// authTypes are the ways of signing in, with the settings that each knows.
var authTypes = []struct {
	name string
	keys []string
}{
	{auth.TypeOAuth, []string{"issuer", "clientId", "clientSecret", "clientSecretFile", "tokenEndpointAuthMethod", "callbackPath", "scopes", "ssoGroup"}},
	{auth.TypeForward, []string{"audience", "subjectTokenType"}},
	{auth.TypeExchange, []string{"issuer", "clientId", "clientSecret", "clientSecretFile", "privateKeyFile", "tokenEndpointAuthMethod",
		"scopes", "audience", "resource", "tokenEndpoint", "connectorId", "expectedIssuer", "subjectTokenType", "requestedTokenType", "tls"}},
	{auth.TypeIDJAG, []string{"issuer", "clientId", "clientSecret", "clientSecretFile", "privateKeyFile", "tokenEndpointAuthMethod",
		"scopes", "audience", "resource"}},
	{auth.TypeMachine, []string{"issuer", "clientId", "clientSecret", "clientSecretFile", "privateKeyFile", "tokenEndpointAuthMethod",
		"scopes", "audience", "resource", "tokenEndpoint", "expectedIssuer", "tls"}},
	{"none", nil},
}

func checkAuth(r *reader, at string, f *authFile, allow []netip.Prefix) Auth {
	a := Auth{
		Type: or(f.Type, "oauth"), Issuer: f.Issuer, ClientID: f.ClientID, ClientSecret: secret.New(f.ClientSecret),
		ClientSecretFile: f.ClientSecretFile, PrivateKeyFile: f.PrivateKeyFile, TokenEndpointAuthMethod: f.TokenEndpointAuthMethod,
		CallbackPath: f.CallbackPath, Scopes: f.Scopes, SSOGroup: f.SSOGroup, Audience: f.Audience, Resource: f.Resource, ExpectedIssuer: f.ExpectedIssuer,
		ConnectorID: f.ConnectorID, SubjectTokenType: f.SubjectTokenType, RequestedTokenType: f.RequestedTokenType, TLS: f.TLS,
	}
	checkAuthType(r, at, f, a.Type)
	for _, issuer := range []struct{ key, value string }{{"issuer", f.Issuer}, {"expectedIssuer", f.ExpectedIssuer}} {
		checkIssuer(r, at+"."+issuer.key, issuer.value, allow)
	}
	checkClient(r, at, f, a.Type)
	checkCallbackPath(r, at+".callbackPath", f.CallbackPath)
	checkScopes(r, at+".scopes", f.Scopes)
	oneOf(r, at+".subjectTokenType", f.SubjectTokenType, "idToken", "accessToken")
	oneOf(r, at+".requestedTokenType", f.RequestedTokenType, "accessToken", "idToken", "jwt")
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
	case f.Type == "" && r.given(at+".type"), !known:
		r.problem(at+".type", "must be one of %s", strings.Join(names, ", "))
		return
	case typ == auth.TypeForward && f.Audience == "":
		r.problem(at, `forward needs "audience": whom a token must be for so that the remote may see it`)
	case typ == auth.TypeExchange && f.Audience == "" && f.Resource == "" && f.ConnectorID == "" && len(f.Scopes) == 0:
		r.problem(at, `exchange needs "audience" or "resource": whom the token is to be for`)
	}
	for _, set := range []struct {
		key string
		has bool
	}{
		{"issuer", f.Issuer != ""}, {"clientId", f.ClientID != ""}, {"clientSecret", f.ClientSecret != ""},
		{"clientSecretFile", f.ClientSecretFile != ""}, {"privateKeyFile", f.PrivateKeyFile != ""},
		{"tokenEndpointAuthMethod", f.TokenEndpointAuthMethod != ""}, {"callbackPath", f.CallbackPath != ""}, {"scopes", len(f.Scopes) > 0},
		{"ssoGroup", f.SSOGroup != ""}, {"audience", f.Audience != ""}, {"resource", f.Resource != ""}, {"tokenEndpoint", f.TokenEndpoint != ""},
		{"connectorId", f.ConnectorID != ""}, {"expectedIssuer", f.ExpectedIssuer != ""}, {"tls", f.TLS != TLS{}},
		{"subjectTokenType", f.SubjectTokenType != ""}, {"requestedTokenType", f.RequestedTokenType != ""},
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
	case typ == auth.TypeIDJAG && f.ClientID == "":
		r.problem(at, `idJag needs "clientId": the gateway's client at the remote's authorization server`)
	case typ == auth.TypeMachine && (f.ClientID == "" || secrets == 0):
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
		} else if typ == auth.TypeMachine {
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
	if typ != auth.TypeExchange && secrets > 0 && f.Issuer == "" && f.TokenEndpoint == "" {
		r.note(at, `names no "issuer", so the remote says who gets to see the gateway's client, until one has accepted it: better name it here`)
	}
}

func checkScopes(r *reader, at string, scopes []string) {
	for i, scope := range scopes {
		if scope == "" || strings.ContainsFunc(scope, func(c rune) bool { return c <= ' ' || c >= 0x7f || c == '"' || c == '\\' }) {
			r.problem(fmt.Sprintf("%s.%d", at, i), "is not one scope: write each as an element of its own")
		}
	}
}

// checkGroups refuses a group of one, which a typing error makes.
func (c *Config) checkGroups(r *reader) {
	size := map[string]int{}
	for i := range c.Servers {
		size[c.Servers[i].Auth.SSOGroup]++
	}
	for i := range c.Servers {
		if s := &c.Servers[i]; s.Auth.SSOGroup != "" && size[s.Auth.SSOGroup] == 1 {
			r.problem(join("mcpServers", s.Name)+".auth.ssoGroup", "names a group that no other remote is in")
		}
	}
}

// checkLogin reads gateway.auth, and holds the remotes that need it against it.
func (c *Config) checkLogin(r *reader, at string, f *loginFile) {
	for i := range c.Servers {
		s := &c.Servers[i]
		if !s.Auth.ByLogin() || s.Disabled {
			continue
		}
		here := join("mcpServers", s.Name) + ".auth"
		switch {
		case f == nil:
			r.problem(here+".type", "%s needs gateway.auth: the identity provider where users log in to the gateway", s.Auth.Type)
		case s.Auth.Type == auth.TypeExchange && s.Auth.ClientID == "" && (s.Auth.TokenEndpoint != nil || s.Auth.Issuer != "" && s.Auth.Issuer != f.Issuer):
			r.problem(here, `exchange elsewhere than at gateway.auth.issuer needs a "clientId" of its own`)
		}
	}
	if f == nil {
		return
	}
	for i := range c.Servers {
		s := &c.Servers[i]
		if s.Auth.Type == auth.TypeForward && !s.Disabled && s.Auth.SubjectTokenType != "accessToken" && f.IDTokenFile == "" && f.ClientID != "" && s.Auth.Audience != f.ClientID {
			r.note(join("mcpServers", s.Name)+".auth.audience", "is not gateway.auth.clientId, whom ID tokens are for: nothing is forwarded unless the provider adds this audience to them")
		}
	}
	l := &Login{Issuer: f.Issuer, ClientID: f.ClientID, ClientSecret: secret.New(f.ClientSecret), Scopes: f.Scopes, IDTokenFile: f.IDTokenFile,
		Audience: f.Audience, IdentityClaims: f.IdentityClaims}
	l.AllowAddresses = checkAddresses(r, at+".allowAddresses", f.AllowAddresses)
	c.Gateway.Login = l
	if f.Issuer == "" {
		r.problem(at+".issuer", "is missing: the identity provider where users log in to the gateway")
	}
	checkIssuer(r, at+".issuer", f.Issuer, l.AllowAddresses)
	if f.ClientID == "" && (f.IDTokenFile == "" || f.ClientSecret != "") {
		r.problem(at+".clientId", "is missing: the gateway's own client at that provider")
	}
	checkScopes(r, at+".scopes", f.Scopes)
	if len(f.Scopes) > 0 && !slices.Contains(f.Scopes, "openid") {
		// OpenID Connect Core section 3.1.2.1: "If the openid scope value is not
		// present, the behavior is entirely unspecified."
		r.problem(at+".scopes", `must hold "openid"`)
	}
	for i, claim := range f.IdentityClaims {
		switch claim {
		case "":
			r.problem(fmt.Sprintf("%s.identityClaims.%d", at, i), "must be the name of a claim")
		case "email", "preferred_username", "name", "nickname", "upn", "unique_name", "username", "phone_number":
			// OpenID Connect Core section 5.7: these "MUST NOT be used as unique
			// identifiers for the End-User". So it is with what providers add of the kind.
			r.problem(fmt.Sprintf("%s.identityClaims.%d", at, i), "%s may change, and may become another person's: name a claim that never does, such as sub", claim)
		}
	}
	if f.IDTokenFile != "" && (f.Audience != "" || len(f.IdentityClaims) > 0) {
		r.problem(at+".idTokenFile", `stands for everybody, so there are no users that "audience" and "identityClaims" could tell apart`)
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
