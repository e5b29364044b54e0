package auth

import (
	"crypto/sha256"
	"encoding/hex"
	"log/slog"
	"strconv"
	"strings"
)

// Principal is for whom a request acts. It is comparable and the zero value is
// nobody.
type Principal struct {
	Issuer  string // of the verified token; empty for [Local] and sessions
	Subject string
}

// Local is the one user of stdio, of the command line, of the pages on
// loopback, and of requests that carry no session.
var Local = Principal{Subject: "local"}

const sessionSubject = "session:"

// SessionPrincipal is the principal of one anonymous MCP session. What it
// holds ends with the session.
func SessionPrincipal(id string) Principal {
	return Principal{Subject: sessionSubject + id}
}

// Ephemeral reports whether the principal ends with its MCP session.
func (p Principal) Ephemeral() bool {
	_, ok := p.SessionID()
	return ok
}

// SessionID returns the id of the anonymous MCP session that the principal is.
func (p Principal) SessionID() (id string, ok bool) {
	if p.Issuer != "" {
		return "", false
	}
	return strings.CutPrefix(p.Subject, sessionSubject)
}

// Key returns an unambiguous name of the principal for use in store keys.
func (p Principal) Key() string {
	// The length keeps ("a", "b|c") and ("a|b", "c") apart.
	return strconv.Itoa(len(p.Issuer)) + "|" + p.Issuer + "|" + p.Subject
}

// LogValue gives "local", or 8 characters of a hash: enough to follow one
// principal through a log, too little to be one.
func (p Principal) LogValue() slog.Value {
	if p == Local {
		return slog.StringValue(p.Subject)
	}
	sum := sha256.Sum256([]byte(p.Key()))
	return slog.StringValue(hex.EncodeToString(sum[:4]))
}

// String is as guarded as LogValue: a session's subject holds its id.
func (p Principal) String() string { return p.LogValue().String() }
