package auth_test

import (
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"log/slog"
	"testing"

	"gatehouse/auth"
	"gatehouse/auth/secret"
)

// TestSealer: what one process seals another one opens that has the key, if only
// among its old ones, for the same purpose, and nobody else.
func TestSealer(t *testing.T) {
	newKey := func() string {
		var key [32]byte
		rand.Read(key[:])
		return base64.StdEncoding.EncodeToString(key[:]) + "\n"
	}
	with := func(keys string) auth.Sealer {
		return openFile(t, auth.FileConfig{Dir: t.TempDir() + "/store", Keys: secret.New(keys), Log: slog.New(slog.DiscardHandler)})
	}
	old, next := newKey(), newKey()
	one, same, rotated, stranger := with(old), with(old), with(next+old), with(newKey())
	sealed := one.Seal([]byte("plain"), []byte("bound"))
	if bytes.Contains(sealed, []byte("plain")) {
		t.Error("it can be read")
	}
	for name, s := range map[string]auth.Sealer{"itself": one, "another with the key": same, "one with a newer key as well": rotated} {
		if plain, ok := s.Unseal(sealed, []byte("bound")); !ok || string(plain) != "plain" {
			t.Errorf("%s: got %q, %v", name, plain, ok)
		}
	}
	newer := rotated.Seal([]byte("plain"), []byte("bound"))
	damaged := bytes.Clone(sealed)
	damaged[len(damaged)-1]++
	for name, try := range map[string]struct {
		by            auth.Sealer
		sealed, bound string
	}{
		"for something else":       {one, string(sealed), "other"},
		"with another key":         {stranger, string(sealed), "bound"},
		"with a key yet to come":   {one, string(newer), "bound"},
		"damaged":                  {one, string(damaged), "bound"},
		"cut off":                  {one, string(sealed[:10]), "bound"},
		"nothing":                  {one, "", "bound"},
		"with the bound shifted":   {one, string(sealed), "boun"},
		"with nothing it's for":    {one, string(sealed), ""},
		"with the id of the key":   {one, string(sealed[:8]), "bound"},
		"with a foreign beginning": {one, "x" + string(sealed), "bound"},
	} {
		if plain, ok := try.by.Unseal([]byte(try.sealed), []byte(try.bound)); ok {
			t.Errorf("%s: got %q", name, plain)
		}
	}
}
