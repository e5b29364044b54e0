package auth

import (
	"net/http"
	"strings"

	"gatehouse/auth/endpoint"
)

// Bounds of what is read from WWW-Authenticate headers.
const (
	maxChallengeHeaders = 16
	maxChallengeLength  = 8 << 10
	maxURLLength        = 2 << 10
	maxErrorLength      = 64
)

// challenge is what a remote's Bearer challenge says. Everything in it is the
// remote's word and not checked beyond its form.
type challenge struct {
	ResourceMetadata string   // RFC 9728 section 5.1; empty: none
	Scope            []string // RFC 6750 section 3
	Error            string   // an error code of RFC 6750 section 3.1
}

// parseChallenge reads the Bearer challenge in a response's headers, the first
// with resource_metadata if there are several. What it cannot read, it skips:
// a challenge says where to look, and there are other places.
func parseChallenge(h http.Header) challenge {
	var found map[string]string
	for i, value := range h.Values("WWW-Authenticate") {
		if i == maxChallengeHeaders {
			break
		}
		if len(value) > maxChallengeLength {
			continue
		}
		for _, params := range bearerParams(value) {
			if found == nil || found["resource_metadata"] == "" && params["resource_metadata"] != "" {
				found = params
			}
		}
	}
	c := challenge{Scope: unionScopes(strings.Split(found["scope"], " "))}
	if u := found["resource_metadata"]; len(u) <= maxURLLength && endpoint.VisibleASCII(u) {
		c.ResourceMetadata = u
	}
	if code := found["error"]; len(code) <= maxErrorLength && endpoint.VisibleASCII(code) {
		c.Error = code
	}
	return c
}

// bearerParams returns the parameters of each Bearer challenge in a header's
// value, names in lower case.
//
// RFC 9110 section 11.6.1: "a comma-separated list of challenges, in which each
// challenge is an auth-scheme with optional auth-params, themselves separated
// by commas". What tells a parameter from the next scheme is the equals sign.
func bearerParams(s string) []map[string]string {
	var bearers []map[string]string
	var params map[string]string // of the present challenge; nil: not Bearer
	for {
		s = strings.TrimLeft(s, " \t,")
		if s == "" {
			return bearers
		}
		word, rest := cutToken(s)
		if word == "" {
			// Not a list at all, or the middle of a token68: go on after the comma.
			_, s, _ = strings.Cut(s, ",")
			continue
		}
		s = strings.TrimLeft(rest, " \t")
		if !strings.HasPrefix(s, "=") {
			params = nil
			if strings.EqualFold(word, "Bearer") {
				params = map[string]string{}
				bearers = append(bearers, params)
			}
			continue
		}
		var value string
		value, s = cutValue(strings.TrimLeft(s[1:], " \t"))
		// "Each parameter name MUST only occur once per challenge": the first counts.
		name := strings.ToLower(word)
		if _, again := params[name]; params != nil && !again {
			params[name] = value
		}
	}
}

// cutToken cuts the RFC 9110 token at the beginning of s.
func cutToken(s string) (token, rest string) {
	i := 0
	for i < len(s) && isTokenByte(s[i]) {
		i++
	}
	return s[:i], s[i:]
}

func isTokenByte(c byte) bool {
	switch {
	case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9':
		return true
	}
	return strings.IndexByte("!#$%&'*+-.^_`|~", c) >= 0
}

// cutValue cuts a parameter's value at the beginning of s: a quoted string, or
// what there is up to a space or comma. The second is more than a token, since
// URLs are found unquoted. A quoted string that does not end gives nothing.
func cutValue(s string) (value, rest string) {
	if !strings.HasPrefix(s, `"`) {
		end := strings.IndexAny(s, " \t,")
		if end < 0 {
			return s, ""
		}
		return s[:end], s[end:]
	}
	var b strings.Builder
	for i := 1; i < len(s); i++ {
		switch c := s[i]; {
		case c == '"':
			return b.String(), s[i+1:]
		case c == '\\' && i+1 < len(s):
			i++
			b.WriteByte(s[i])
		default:
			b.WriteByte(c)
		}
	}
	return "", ""
}
