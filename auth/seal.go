package auth

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"strings"
	"time"
)

// A sealed record is
//
//	"GHR" | version of the envelope, 1 | key id, 8 | nonce, 12 | ciphertext | tag, 16
//
// by AES-256-GCM. What comes before the nonce, the bucket and the name, which is
// a hash of bucket and key, are associated data: a record that has been moved
// to another place does not open. Inside are the record's version, its expiry
// and its value.
const (
	envelopeMagic   = "GHR"
	envelopeVersion = 1
	keyIDSize       = 8
	envelopeHeader  = len(envelopeMagic) + 1 + keyIDSize
	sealedHeader    = 8 + 8 + 4
)

var (
	// ErrKey: the store's key is missing, is no key, or may be read by others.
	ErrKey = errors.New("store key")
	// ErrWrongKey: the store, or a record of it, is sealed with a key that is not
	// among those given.
	ErrWrongKey = errors.New("sealed with another key")

	// errDamaged: what is there is no record of ours, or not the one that belongs there.
	errDamaged = errors.New("damaged, or not the record that belongs there")
)

// keySet seals with its first key and opens with all.
type keySet []sealKey

type sealKey struct {
	id   [keyIDSize]byte
	aead cipher.AEAD // of records
	out  cipher.AEAD // of what leaves the house
}

// newKey returns a key in the form of the key file.
func newKey() []byte {
	var key [32]byte
	rand.Read(key[:]) // never fails
	return append(base64.StdEncoding.AppendEncode(nil, key[:]), '\n')
}

// parseKeys reads one or more lines, each 32 random bytes in base64. Nothing
// of them is in an error.
func parseKeys(data []byte) (keySet, error) {
	var keys keySet
	number := 0
	for line := range bytes.Lines(data) {
		number++
		text := string(bytes.TrimSpace(line))
		if text == "" {
			continue
		}
		// Whether a tool pads, and which alphabet it uses, makes no other key.
		text = strings.NewReplacer("-", "+", "_", "/").Replace(strings.TrimRight(text, "="))
		raw, err := base64.RawStdEncoding.DecodeString(text)
		switch {
		case err != nil:
			return nil, fmt.Errorf("%w: line %d is not base64", ErrKey, number)
		case len(raw) != 32:
			return nil, fmt.Errorf("%w: line %d holds %d bytes, want 32 random ones, as openssl rand -base64 32 makes them", ErrKey, number, len(raw))
		case !looksRandom(raw):
			return nil, fmt.Errorf("%w: line %d is not random; openssl rand -base64 32 makes one that is", ErrKey, number)
		}
		k, err := deriveKey(raw)
		if err != nil {
			return nil, fmt.Errorf("%w: line %d: %w", ErrKey, number, err)
		}
		keys = append(keys, k)
	}
	if len(keys) == 0 {
		return nil, fmt.Errorf("%w: there is none; openssl rand -base64 32 makes one", ErrKey)
	}
	return keys, nil
}

// looksRandom refuses words, patterns and counted-up bytes. Of 32 random bytes
// about 30 are different, and so are the steps between them; that fewer than
// 20 are happens less than once in 10^9 keys, as does a key that is text.
func looksRandom(key []byte) bool {
	const enough = 20
	values, steps := map[byte]bool{}, map[byte]bool{}
	text := true
	for i, b := range key {
		values[b] = true
		text = text && b >= ' ' && b <= '~'
		if i > 0 {
			steps[b-key[i-1]] = true
		}
	}
	return len(values) >= enough && len(steps) >= enough && !text
}

// deriveKey keeps the bytes of the file for nothing but deriving.
func deriveKey(raw []byte) (sealKey, error) {
	var k sealKey
	id, err := hkdf.Key(sha256.New, raw, nil, "gatehouse store key id", keyIDSize)
	if err != nil {
		return k, err
	}
	copy(k.id[:], id)
	for purpose, aead := range map[string]*cipher.AEAD{"gatehouse store AES-256-GCM": &k.aead, "gatehouse outside AES-256-GCM": &k.out} {
		sealing, err := hkdf.Key(sha256.New, raw, nil, purpose, 32)
		if err != nil {
			return k, err
		}
		block, err := aes.NewCipher(sealing)
		if err != nil {
			return k, err
		}
		if *aead, err = cipher.NewGCMWithRandomNonce(block); err != nil {
			return k, err
		}
	}
	return k, nil
}

// sealOut is [Sealer]'s Seal. Before the nonce stands the key's id.
func (s keySet) sealOut(plain, bound []byte) []byte {
	k := s[0]
	return k.out.Seal(bytes.Clone(k.id[:]), nil, plain, bound)
}

// openOut is [Sealer]'s Unseal.
func (s keySet) openOut(sealed, bound []byte) (plain []byte, ok bool) {
	for _, k := range s {
		if rest, found := bytes.CutPrefix(sealed, k.id[:]); found {
			plain, err := k.out.Open(nil, nil, rest, bound)
			return plain, err == nil
		}
	}
	return nil, false
}

// seal makes the envelope of a record with the first key.
func (s keySet) seal(bucket, name string, r Record) []byte {
	k := s[0]
	header := make([]byte, 0, envelopeHeader+k.aead.Overhead()+sealedHeader+len(r.Value))
	header = append(header, envelopeMagic...)
	header = append(header, envelopeVersion)
	header = append(header, k.id[:]...)

	plain := make([]byte, 0, sealedHeader+len(r.Value))
	plain = binary.BigEndian.AppendUint64(plain, r.Version)
	seconds, nanos := int64(math.MinInt64), 0 // never
	if !r.Expires.IsZero() {
		seconds, nanos = r.Expires.Unix(), r.Expires.Nanosecond()
	}
	plain = binary.BigEndian.AppendUint64(plain, uint64(seconds))
	plain = binary.BigEndian.AppendUint32(plain, uint32(nanos))
	plain = append(plain, r.Value...)
	return k.aead.Seal(header, nil, plain, associated(header, bucket, name))
}

// open returns the record in an envelope: [ErrWrongKey] if it was sealed with
// a key, or in a form, that a later program or config knows; errDamaged if it
// is nothing that anybody sealed for this place.
func (s keySet) open(bucket, name string, envelope []byte) (Record, error) {
	if len(envelope) < envelopeHeader || string(envelope[:len(envelopeMagic)]) != envelopeMagic {
		return Record{}, errDamaged
	}
	header, sealed := envelope[:envelopeHeader], envelope[envelopeHeader:]
	if header[len(envelopeMagic)] != envelopeVersion {
		return Record{}, ErrWrongKey
	}
	for _, k := range s {
		if !bytes.Equal(k.id[:], keyID(envelope)) {
			continue
		}
		plain, err := k.aead.Open(nil, nil, sealed, associated(header, bucket, name))
		if err != nil || len(plain) < sealedHeader {
			return Record{}, errDamaged
		}
		r := Record{Version: binary.BigEndian.Uint64(plain), Value: plain[sealedHeader:]}
		if seconds := int64(binary.BigEndian.Uint64(plain[8:])); seconds != math.MinInt64 {
			r.Expires = time.Unix(seconds, int64(binary.BigEndian.Uint32(plain[16:])))
		}
		return r, nil
	}
	return Record{}, ErrWrongKey
}

// keyID is the part of an envelope that names its key.
func keyID(envelope []byte) []byte { return envelope[envelopeHeader-keyIDSize : envelopeHeader] }

// sealedByFirst reports whether an envelope that opens needs no sealing anew.
func (s keySet) sealedByFirst(envelope []byte) bool { return bytes.Equal(s[0].id[:], keyID(envelope)) }

// associated ties an envelope to its place. The length keeps ("a", "bc") and
// ("ab", "c") apart.
func associated(header []byte, bucket, name string) []byte {
	data := binary.BigEndian.AppendUint32(bytes.Clone(header), uint32(len(bucket)))
	data = append(data, bucket...)
	return append(data, name...)
}
