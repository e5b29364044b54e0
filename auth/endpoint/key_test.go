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
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
)

func pemOf(t *testing.T, typ string, der []byte, err error) []byte {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: typ, Bytes: der})
}

func pkcs8(t *testing.T, key any) []byte {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	return pemOf(t, "PRIVATE KEY", der, err)
}

// Every kind of key authenticates, by an assertion that says what RFC 7523
// section 3 demands, for the issuer alone and never twice the same.
func TestPrivateKeyJWT(t *testing.T) {
	var got url.Values
	server := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		r.ParseForm()
		got = r.PostForm
		if r.Header.Get("Authorization") != "" {
			t.Error("an assertion and Basic")
		}
	}))
	defer server.Close()
	defer server.Client().CloseIdleConnections()

	rsaKey, _ := rsa.GenerateKey(rand.Reader, 2048)
	p256, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	p384, _ := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	_, ed, _ := ed25519.GenerateKey(rand.Reader)
	sec1, sec1Err := x509.MarshalECPrivateKey(p256)
	jwk, _ := jose.JSONWebKey{Key: p256, KeyID: "k1"}.MarshalJSON()
	for name, test := range map[string]struct {
		data []byte
		alg  jose.SignatureAlgorithm
		kid  string
	}{
		"RSA, PKCS 8": {pkcs8(t, rsaKey), jose.RS256, ""},
		"RSA, PKCS 1": {pemOf(t, "RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(rsaKey), nil), jose.RS256, ""},
		"P-256":       {pkcs8(t, p256), jose.ES256, ""},
		"P-256, SEC1": {pemOf(t, "EC PRIVATE KEY", sec1, sec1Err), jose.ES256, ""},
		"P-384":       {pkcs8(t, p384), jose.ES384, ""},
		"Ed25519":     {pkcs8(t, ed), jose.EdDSA, ""},
		"JWK":         {jwk, jose.ES256, "k1"},
	} {
		t.Run(name, func(t *testing.T) {
			key, err := ParseKey(test.data)
			if err != nil {
				t.Fatal(err)
			}
			if shown := fmt.Sprintf("%+v %#v", key, Client{Key: key}); strings.Contains(shown, rsaKey.D.String()[:20]) {
				t.Error("printing a key shows it")
			}
			var last string
			for range 2 {
				resp, err := Post(t.Context(), server.Client(), server.URL, Client{ID: "me", Key: key, Audience: "https://as.example"}, url.Values{})
				if err != nil {
					t.Fatal(err)
				}
				resp.Body.Close()
				if got.Get("client_assertion_type") != "urn:ietf:params:oauth:client-assertion-type:jwt-bearer" || got.Get("client_id") != "me" || got.Has("client_secret") {
					t.Errorf("form %v", got)
				}
				assertion, err := jose.ParseSigned(got.Get("client_assertion"), []jose.SignatureAlgorithm{test.alg})
				if err != nil {
					t.Fatal(err)
				}
				payload, err := assertion.Verify(key.Public())
				if err != nil {
					t.Fatal(err)
				}
				var c struct {
					Iss, Sub, Aud, Jti string
					Iat, Exp           int64
				}
				if err := json.Unmarshal(payload, &c); err != nil {
					t.Fatal(err)
				}
				now := time.Now().Unix()
				if c.Iss != "me" || c.Sub != "me" || c.Aud != "https://as.example" || c.Jti == last || c.Jti == "" ||
					c.Exp <= now || c.Exp > now+60 || c.Iat > now || assertion.Signatures[0].Header.KeyID != test.kid {
					t.Errorf("claims %+v, kid %q", c, assertion.Signatures[0].Header.KeyID)
				}
				last = c.Jti
			}
		})
	}
	key, err := ParseKey(pkcs8(t, p256))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Post(t.Context(), server.Client(), server.URL, Client{ID: "me", Key: key}, url.Values{}); err == nil {
		t.Error("an assertion for nobody")
	}
}

func TestParseKeyRefuses(t *testing.T) {
	small, _ := rsa.GenerateKey(rand.Reader, 1024)
	p224, _ := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	p256, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	public, publicErr := x509.MarshalPKIXPublicKey(p256.Public())
	jwk, _ := jose.JSONWebKey{Key: crypto.PublicKey(p256.Public())}.MarshalJSON()
	for name, data := range map[string][]byte{
		"nothing": nil, "text": []byte("canary-key"), "empty JWK": []byte("{}"), "secret JWK": []byte(`{"kty":"oct","k":"AAAA"}`),
		"public":     pemOf(t, "PUBLIC KEY", public, publicErr),
		"public JWK": jwk, "broken": pemOf(t, "PRIVATE KEY", []byte("canary-key"), nil),
		"encrypted": pemOf(t, "ENCRYPTED PRIVATE KEY", []byte("canary-key"), nil),
		"P-224":     pkcs8(t, p224),
		"small RSA": pkcs8(t, small),
	} {
		if _, err := ParseKey(data); err == nil || strings.Contains(err.Error(), "canary") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// N_A is for exchanges.
func TestTokenType(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprint(w, `{"access_token":"a","token_type":"n_a","issued_token_type":"urn:x","scope":["odd"]}`)
	}))
	defer server.Close()
	defer server.Client().CloseIdleConnections()
	a, err := Token(t.Context(), server.Client(), server.URL, Client{ID: "me"}, url.Values{"grant_type": {GrantExchange}})
	if err != nil || a.Type != NoType || a.IssuedType != "urn:x" || a.Scope != "" {
		t.Errorf("%+v, %v", a, err)
	}
	if _, err := Token(t.Context(), server.Client(), server.URL, Client{ID: "me"}, url.Values{"grant_type": {"refresh_token"}}); err == nil {
		t.Error("N_A is taken for a bearer token")
	}
}
