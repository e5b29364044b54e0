package gateway

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/base64"
	"fmt"
	"strings"

	"gatehouse/auth"
)

// tickets seals what a client keeps for the gateway between two requests, and a
// browser between two pages.
type tickets struct {
	sealer auth.Sealer
	at     string // what is sealed for one address is nothing at another
}

// ticketPrefix tells the gateway's requestState from remotes'.
const ticketPrefix = "gatehouse1."

// newTickets makes those that only this process opens.
func newTickets() *tickets {
	key := make([]byte, 32)
	rand.Read(key) // never fails
	block, err := aes.NewCipher(key)
	if err == nil {
		var aead cipher.AEAD
		if aead, err = cipher.NewGCMWithRandomNonce(block); err == nil {
			return &tickets{sealer: ownKey{aead}}
		}
	}
	panic(fmt.Sprintf("AES-256-GCM: %v", err)) // 32 bytes are a key
}

// ownKey seals for this process alone.
type ownKey struct{ aead cipher.AEAD }

func (k ownKey) Seal(plain, bound []byte) []byte { return k.aead.Seal(nil, nil, plain, bound) }

func (k ownKey) Unseal(sealed, bound []byte) ([]byte, bool) {
	plain, err := k.aead.Open(nil, nil, sealed, bound)
	return plain, err == nil
}

// bound is what a ticket is good for.
func (t *tickets) bound(p auth.Principal) []byte { return []byte(t.at + "\x00" + p.Key()) }

// seal encrypts a ticket for one principal.
func (t *tickets) seal(p auth.Principal, plain []byte) string {
	return ticketPrefix + base64.RawURLEncoding.EncodeToString(t.sealer.Seal(plain, t.bound(p)))
}

// open returns what was sealed for this principal; ok is false for anything else.
func (t *tickets) open(p auth.Principal, state string) (plain []byte, ok bool) {
	encoded, ok := strings.CutPrefix(state, ticketPrefix)
	if !ok {
		return nil, false
	}
	sealed, err := base64.RawURLEncoding.DecodeString(encoded)
	if err != nil {
		return nil, false
	}
	return t.sealer.Unseal(sealed, t.bound(p))
}
