package endpoint

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"time"

	"github.com/go-jose/go-jose/v4"
)

// Key signs the assertions of a client that authenticates by private_key_jwt.
// It cannot be printed.
type Key struct{ *key }

type key struct {
	signer jose.Signer
	public crypto.PublicKey
}

// assertionLife is short: an assertion is made for one request.
const assertionLife = time.Minute

// minRSA is as small as an RSA key may be (RFC 7518 section 3.3).
const minRSA = 2048

// ParseKey reads a private key: in PEM form (PKCS #8, PKCS #1, SEC 1), or a
// JSON Web Key, whose kid goes into the assertions.
func ParseKey(data []byte) (*Key, error) {
	private, id, err := parsePrivate(data)
	if err != nil {
		return nil, err
	}
	var alg jose.SignatureAlgorithm
	signer, ok := private.(crypto.Signer)
	if !ok {
		return nil, errors.New("not a private key that signs")
	}
	switch public := signer.Public().(type) {
	case *rsa.PublicKey:
		if public.N.BitLen() < minRSA {
			return nil, fmt.Errorf("an RSA key of less than %d bits", minRSA)
		}
		alg = jose.RS256
	case *ecdsa.PublicKey:
		switch public.Curve {
		case elliptic.P256():
			alg = jose.ES256
		case elliptic.P384():
			alg = jose.ES384
		case elliptic.P521():
			alg = jose.ES512
		default:
			return nil, errors.New("a key on a curve that JSON Web Signatures do not have")
		}
	case ed25519.PublicKey:
		alg = jose.EdDSA
	default:
		return nil, errors.New("a kind of key that is not supported: use RSA, ECDSA or Ed25519")
	}
	made, err := jose.NewSigner(jose.SigningKey{Algorithm: alg, Key: jose.JSONWebKey{Key: private, KeyID: id}},
		(&jose.SignerOptions{}).WithType("JWT"))
	if err != nil {
		return nil, errors.New("a key that cannot sign") // its own error could show the key
	}
	return &Key{&key{made, signer.Public()}}, nil
}

func parsePrivate(data []byte) (private any, id string, err error) {
	block, _ := pem.Decode(data)
	if block == nil {
		var k jose.JSONWebKey
		if json.Unmarshal(data, &k) != nil || k.IsPublic() || !k.Valid() {
			return nil, "", errors.New("neither a private key in PEM form nor a private JSON Web Key")
		}
		return k.Key, k.KeyID, nil
	}
	switch block.Type {
	case "PRIVATE KEY":
		private, err = x509.ParsePKCS8PrivateKey(block.Bytes)
	case "RSA PRIVATE KEY":
		private, err = x509.ParsePKCS1PrivateKey(block.Bytes)
	case "EC PRIVATE KEY":
		private, err = x509.ParseECPrivateKey(block.Bytes)
	case "ENCRYPTED PRIVATE KEY":
		return nil, "", errors.New("an encrypted key: decrypt it")
	default:
		return nil, "", errors.New("PEM that is not a private key")
	}
	if err != nil {
		return nil, "", errors.New("a private key that cannot be parsed")
	}
	return private, "", nil
}

// Public returns the key that the server checks signatures with.
func (k *Key) Public() crypto.PublicKey { return k.public }

// assertion makes the JWT that stands for a client secret. RFC 7523 section 3:
// iss and sub are the client id, exp is required, jti keeps it from being used
// twice. Its audience is the issuer identifier and nothing else, as the update
// of RFC 7523 (draft-ietf-oauth-rfc7523bis) demands: an assertion for an endpoint
// could be played on to another server.
func (c *Client) assertion() (string, error) {
	if c.Key == nil || c.Audience == "" {
		return "", &Error{What: "the client has no key to authenticate with, or its server no issuer"}
	}
	now := time.Now()
	claims, err := json.Marshal(map[string]any{
		"iss": c.ID, "sub": c.ID, "aud": c.Audience, "jti": rand.Text(),
		"iat": now.Unix(), "exp": now.Add(assertionLife).Unix(),
	})
	if err != nil {
		return "", &Error{What: "the client's assertion cannot be encoded"}
	}
	signed, err := c.Key.signer.Sign(claims)
	if err != nil {
		return "", &Error{What: "the client's assertion cannot be signed"}
	}
	out, err := signed.CompactSerialize()
	if err != nil {
		return "", &Error{What: "the client's assertion cannot be encoded"}
	}
	return out, nil
}
