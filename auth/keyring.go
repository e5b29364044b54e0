package auth

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/zalando/go-keyring"

	"gatehouse/auth/secret"
)

const (
	keyringService = "gatehouse"
	// keyringTime is what the keychain has to answer: it may ask its user first.
	keyringTime = 30 * time.Second
)

// KeyringKeys returns the keys of a store from the keychain of the operating
// system, in the form of the key file; name tells stores apart. fresh says that
// the store is new, so that a key may be made for it. Errors are [ErrKey]s.
func KeyringKeys(ctx context.Context, name string, fresh bool) (secret.Text, error) {
	ctx, cancel := context.WithTimeout(ctx, keyringTime)
	defer cancel()
	type outcome struct {
		keys string
		err  error
	}
	done := make(chan outcome, 1)
	// The library has no context. Where the keychain hangs, so does this, until the
	// process ends.
	go func() {
		keys, err := keyring.Get(keyringService, name)
		if errors.Is(err, keyring.ErrNotFound) && fresh {
			if err = keyring.Set(keyringService, name, string(newKey())); err == nil {
				// Read again: another process may have been at it.
				keys, err = keyring.Get(keyringService, name)
			}
		}
		done <- outcome{keys, err}
	}()
	select {
	case got := <-done:
		switch {
		case errors.Is(got.err, keyring.ErrNotFound):
			return secret.Text{}, fmt.Errorf("%w: the keychain has none for this store, which is sealed with one: bring it back, or use a new store", ErrKey)
		case got.err != nil:
			return secret.Text{}, fmt.Errorf("%w: the keychain gives none (%w): is one running and unlocked? Otherwise use keyFile", ErrKey, got.err)
		}
		return secret.New(got.keys), nil
	case <-ctx.Done():
		return secret.Text{}, fmt.Errorf("%w: the keychain does not answer: unlock it, or use keyFile", ErrKey)
	}
}
