package exchange

import (
	"crypto/sha256"
	"fmt"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"gatehouse/auth/endpoint"
	"gatehouse/auth/guard"
	"gatehouse/auth/secret"
)

// Token types, RFC 8693 section 3 and the identity assertion draft.
const (
	TypeAccessToken = "urn:ietf:params:oauth:token-type:access_token"
	TypeIDToken     = "urn:ietf:params:oauth:token-type:id_token"
	TypeJWT         = "urn:ietf:params:oauth:token-type:jwt"
	TypeIDJAG       = "urn:ietf:params:oauth:token-type:id-jag"
)

// Kind is a way to a token.
type Kind string

const (
	Exchange Kind = "exchange"          // RFC 8693
	IDJAG    Kind = "idJag"             // RFC 8693, then RFC 7523 section 2.1
	Machine  Kind = "clientCredentials" // RFC 6749 section 4.4
)

// Subject is for whom a token is. The zero value is the gateway itself, which
// is who a [Machine] acts as.
type Subject struct {
	Issuer  string      // of the token
	ID      string      // its sub, as its verified claims say
	Token   secret.Text // what is presented
	Type    string      // [TypeIDToken], [TypeAccessToken] or [TypeJWT]
	Expires time.Time   // of the token; zero: unknown
}

// Server is an authorization server, as one client of it sees it.
type Server struct {
	Endpoint string // the token endpoint
	// Issuer is who must have issued what comes from there; empty: anybody.
	Issuer string
	// Pinned says that Issuer's own metadata names Endpoint. What such an
	// endpoint answers over TLS is the issuer's word, so a token that does not
	// tell its issuer, an opaque one, may come from there and only from there.
	Pinned bool
	Client endpoint.Client
	HTTP   *guard.Client // required
}

// Target is what a token is for, and where it comes from. It must not change
// once it has been used.
type Target struct {
	Remote      string // whose tokens these are
	Kind        Kind
	Server      Server
	Audience    string // of the token; of an ID-JAG: the issuer of Then
	Resource    string // RFC 8707; empty: not sent
	Scopes      []string
	ConnectorID string // Dex: the connector that the subject token belongs to; empty: not Dex
	Requested   string // requested_token_type; empty: [TypeAccessToken]
	Then        Server // of an ID-JAG: the remote's authorization server
}

// crossClient is Dex's way to ask for an audience.
const crossClient = "audience:server:client_id:"

// scopes are those to ask for. Dex has no audience parameter: a token for
// another client is asked for by a scope.
func (t *Target) scopes() []string {
	out := slices.Clone(t.Scopes)
	if t.ConnectorID != "" && t.Audience != "" && t.Kind == Exchange {
		out = append(out, crossClient+t.Audience)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

func (t *Target) requested() string {
	switch {
	case t.Kind == IDJAG:
		return TypeIDJAG
	case t.Requested == "":
		return TypeAccessToken
	}
	return t.Requested
}

// form is the first request.
func (t *Target) form(s Subject) url.Values {
	form := url.Values{}
	set := func(name, value string) {
		if value != "" {
			form.Set(name, value)
		}
	}
	set("scope", strings.Join(t.scopes(), " "))
	set("resource", t.Resource)
	if t.Kind == Machine {
		form.Set("grant_type", "client_credentials")
		set("audience", t.Audience) // not of a standard; some servers need it
		return form
	}
	form.Set("grant_type", endpoint.GrantExchange)
	form.Set("subject_token", s.Token.Value())
	form.Set("subject_token_type", s.Type)
	form.Set("requested_token_type", t.requested())
	set("connector_id", t.ConnectorID)
	if t.ConnectorID == "" {
		set("audience", t.Audience)
	}
	return form
}

// key is where a token is kept.
type key [sha256.Size]byte

// keyOf takes in everything that goes into the requests, or decides what an
// answer to them is worth. A token that was obtained by another request, down to
// a single field, is another token.
func keyOf(s Subject, t *Target) key {
	h := sha256.New()
	add := func(parts ...string) {
		for _, part := range parts {
			fmt.Fprintf(h, "%d|%s|", len(part), part)
		}
	}
	add(s.Issuer, s.ID, s.Token.Value(), s.Type)
	add(t.Remote, string(t.Kind), t.Audience, t.Resource, t.ConnectorID, t.requested())
	for _, server := range []*Server{&t.Server, &t.Then} {
		add(server.Endpoint, server.Issuer, strconv.FormatBool(server.Pinned),
			server.Client.ID, server.Client.Secret.Value(), server.Client.Method, server.Client.Audience)
		fmt.Fprintf(h, "%p|%p|", server.Client.Key, server.HTTP)
	}
	add(t.scopes()...)
	return key(h.Sum(nil))
}

// personOf is keyOf without the token that the subject presents, which is another
// one each time its login is renewed.
func personOf(s Subject, t *Target) key {
	s.Token = secret.Text{}
	return keyOf(s, t)
}
