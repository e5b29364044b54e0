// Package secret holds the type of everything that must not be printed:
// tokens, client secrets, verifiers. A [Text] shows "[REDACTED]" in logs, in
// every fmt verb, in JSON and in text, also inside structs and behind
// unexported fields. Only [Text.Value] gives the secret away, so a search for
// its calls finds every place where one leaves the process.
package secret

import (
	"crypto/subtle"
	"fmt"
	"log/slog"
)

const redacted = "[REDACTED]"

// Text is a secret string. The zero value is empty.
//
// The string is behind a pointer because fmt walks into unexported fields
// without calling methods: there it finds an address.
type Text struct{ p *string }

// New makes a secret of s.
func New(s string) Text {
	if s == "" {
		return Text{}
	}
	return Text{&s}
}

// Value returns the secret itself. Its result must not reach a log or an error.
func (t Text) Value() string {
	if t.p == nil {
		return ""
	}
	return *t.p
}

// IsEmpty reports whether there is no secret.
func (t Text) IsEmpty() bool { return t.p == nil }

// Equal compares in constant time.
func (t Text) Equal(u Text) bool {
	return subtle.ConstantTimeCompare([]byte(t.Value()), []byte(u.Value())) == 1
}

func (t Text) String() string               { return redacted }
func (t Text) GoString() string             { return redacted }
func (t Text) Format(s fmt.State, _ rune)   { fmt.Fprint(s, redacted) }
func (t Text) MarshalJSON() ([]byte, error) { return []byte(`"` + redacted + `"`), nil }
func (t Text) MarshalText() ([]byte, error) { return []byte(redacted), nil }
func (t Text) LogValue() slog.Value         { return slog.StringValue(redacted) }
