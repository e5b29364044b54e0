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

// tickets seals what a client keeps for the gateway between two requests of
// the modern era. The key is this process's own, and so is a parked call.
type tickets struct{ aead cipher.AEAD }

// ticketPrefix tells the gateway's requestState from remotes'.
const ticketPrefix = "gatehouse1."

func newTickets() *tickets {
	key := make([]byte, 32)
	rand.Read(key) // never fails
	block, err := aes.NewCipher(key)
	if err == nil {
		var aead cipher.AEAD
		if aead, err = cipher.NewGCMWithRandomNonce(block); err == nil {
			return &tickets{aead}
		}
	}
	panic(fmt.Sprintf("AES-256-GCM: %v", err)) // 32 bytes are a key
}

// seal encrypts a ticket for one principal.
func (t *tickets) seal(p auth.Principal, plain []byte) string {
	return ticketPrefix + base64.RawURLEncoding.EncodeToString(t.aead.Seal(nil, nil, plain, []byte(p.Key())))
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
	plain, err = t.aead.Open(nil, nil, sealed, []byte(p.Key()))
	return plain, err == nil
}
