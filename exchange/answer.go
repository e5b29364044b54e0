package exchange

import (
	"cmp"
	"encoding/base64"
	"encoding/json"
	"errors"
	"net/url"
	"slices"
	"strings"
	"time"

	"gatehouse/auth/endpoint"
	"gatehouse/auth/secret"
)

// Why an answer is not used.
var (
	// ErrIssuer: the token is another issuer's.
	ErrIssuer = errors.New("the token is from another issuer than the one expected")
	// ErrNoIssuer: the token does not tell its issuer, and its endpoint is not
	// known to be that issuer's.
	ErrNoIssuer = errors.New("the token does not tell its issuer")
	// ErrAudience: the token is for somebody else.
	ErrAudience = errors.New("the token is for another audience than the one asked for")
	// ErrTokenType: the server issued something else than what was asked for.
	ErrTokenType = errors.New("the server issued another type of token than the one asked for")
	// ErrExpired: the token had expired when it came.
	ErrExpired = errors.New("the token has expired already")
)

// claims are what matters of a JWT that came straight from a token endpoint.
// Its signature is for whoever it is sent to.
type claims struct {
	Issuer   string
	Audience []string
	Expires  time.Time // zero: it does not say
}

// readClaims reads the claims of a JWT; ok is false if it is none. What is
// there is foreign input.
func readClaims(token secret.Text) (c claims, ok bool) {
	parts := strings.Split(token.Value(), ".")
	if len(parts) != 3 {
		return claims{}, false
	}
	payload, err := base64.RawURLEncoding.DecodeString(strings.TrimRight(parts[1], "="))
	if err != nil {
		return claims{}, false
	}
	var raw struct {
		Issuer   string          `json:"iss"`
		Audience json.RawMessage `json:"aud"`
		Expires  *float64        `json:"exp"`
	}
	if json.Unmarshal(payload, &raw) != nil {
		return claims{}, false
	}
	c.Issuer = raw.Issuer
	var one string
	switch {
	case len(raw.Audience) == 0:
	case json.Unmarshal(raw.Audience, &one) == nil:
		if one != "" {
			c.Audience = []string{one}
		}
	case json.Unmarshal(raw.Audience, &c.Audience) != nil:
		return claims{}, false
	}
	if raw.Expires != nil {
		// Out of range: no such time, so it is over.
		c.Expires = time.Unix(1, 0)
		if s := *raw.Expires; s > 0 && s < 1<<40 {
			c.Expires = time.Unix(int64(s), 0)
		}
	}
	return c, true
}

// unknownLife is how long a token is kept whose server does not say how long it
// lives.
const unknownLife = 5 * time.Minute

// check judges an answer of a server to a request for a type of token that must
// be meant for us as far as it says whom it is for, and returns until when it is
// good.
func (s *Server) check(a *endpoint.Answer, requested string, meant func(audience []string) bool, now time.Time) (expires time.Time, err error) {
	if !fits(a.IssuedType, requested) {
		return time.Time{}, ErrTokenType
	}
	c, isJWT := readClaims(a.Access)
	switch {
	case s.Issuer == "":
	case isJWT && c.Issuer != "":
		// Whatever endpoint it came from.
		if c.Issuer != s.Issuer {
			return time.Time{}, ErrIssuer
		}
	case !s.Pinned:
		return time.Time{}, ErrNoIssuer
	}
	// What says nothing of its audience, or says it to the remote alone, is as
	// good as the server's word.
	if len(c.Audience) > 0 && !meant(c.Audience) {
		return time.Time{}, ErrAudience
	}
	if a.ExpiresIn > 0 {
		expires = now.Add(a.ExpiresIn)
	}
	if !c.Expires.IsZero() && (expires.IsZero() || c.Expires.Before(expires)) {
		expires = c.Expires
	}
	if expires.IsZero() {
		expires = now.Add(unknownLife)
	}
	if !now.Before(expires) {
		return time.Time{}, ErrExpired
	}
	return expires, nil
}

// meant reports whether these are the audience that the first server was asked
// for.
func (t *Target) meant(audience []string) bool {
	// A machine's resource is what its remote publishes, and servers that do not
	// know the parameter put something else into aud; an exchange's comes from the
	// config.
	byResource := t.Resource != "" && t.Kind == Exchange
	return t.Audience == "" && !byResource ||
		t.Audience != "" && slices.Contains(audience, t.Audience) ||
		byResource && slices.Contains(audience, t.Resource)
}

// meantThere is meant for the second server of an ID-JAG. What it calls the
// remote is between those two, some name themselves, but a URL of a third place is
// not the remote.
func (t *Target) meantThere(audience []string) bool {
	there := placeOf(t.Resource)
	return there == "" || slices.ContainsFunc(audience, func(a string) bool {
		place := placeOf(a)
		return place == "" || place == there || place == placeOf(t.Then.Issuer)
	})
}

// placeOf is the origin of a web address, empty for any other name.
func placeOf(name string) string {
	u, err := url.Parse(name)
	if err != nil || u.Host == "" {
		return ""
	}
	scheme := strings.ToLower(u.Scheme)
	port := map[string]string{"http": "80", "https": "443"}[scheme]
	if port == "" {
		return ""
	}
	return scheme + "://" + strings.ToLower(u.Hostname()) + ":" + cmp.Or(u.Port(), port)
}

// fits reports whether a token of the issued type serves who asked for the
// requested one. RFC 8693 section 2.2.1 requires issued_token_type; who leaves it
// out has issued what was asked for.
func fits(issued, requested string) bool {
	switch {
	case issued == "" || issued == requested:
		return true
	case requested == TypeIDJAG:
		return false
	case requested == TypeIDToken:
		return issued == TypeJWT
	}
	return issued == TypeAccessToken || issued == TypeJWT
}
