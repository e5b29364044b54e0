package auth

import (
	"errors"
	"testing"

	"github.com/zalando/go-keyring"
)

// TestKeyring: a key is made once, for a new store only, and stays.
func TestKeyring(t *testing.T) {
	keyring.MockInit()
	if _, err := KeyringKeys(t.Context(), "old", false); !errors.Is(err, ErrKey) {
		t.Errorf("an old store without its key: %v", err)
	}
	first, err := KeyringKeys(t.Context(), "new", true)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := parseKeys([]byte(first.Value())); err != nil {
		t.Error(err)
	}
	for _, fresh := range []bool{true, false} {
		if again, err := KeyringKeys(t.Context(), "new", fresh); err != nil || !again.Equal(first) {
			t.Errorf("again: %v", err)
		}
	}
	if other, err := KeyringKeys(t.Context(), "another", true); err != nil || other.Equal(first) {
		t.Errorf("two stores have one key: %v", err)
	}
	keyring.MockInitWithError(errors.New("no keychain"))
	if _, err := KeyringKeys(t.Context(), "new", true); !errors.Is(err, ErrKey) {
		t.Errorf("no keychain: %v", err)
	}
}
