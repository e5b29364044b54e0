package main

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"gatehouse/auth/authtest"
)

// clientIdentity writes a client certificate with this serial number.
func clientIdentity(t *testing.T, dir string, serial int64) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: "gatehouse"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for file, block := range map[string]*pem.Block{"key.pem": {Type: "PRIVATE KEY", Bytes: der}, "cert.pem": {Type: "CERTIFICATE", Bytes: cert}} {
		path := filepath.Join(dir, file)
		if err := os.WriteFile(path, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
		// Two writes within a tick of the file system's clock are one.
		at := time.Now().Add(time.Duration(serial) * time.Second)
		if err := os.Chtimes(path, at, at); err != nil {
			t.Fatal(err)
		}
	}
}

// TestMutualTLS: a token endpoint behind mutual TLS sees the configured
// certificate, also after it was renewed; without one there is a sentence, and
// no token over anything less.
func TestMutualTLS(t *testing.T) {
	t.Parallel()
	t.Run("the gateway's own credentials", func(t *testing.T) {
		t.Parallel()
		testMutualTLS(t, `"type": "clientCredentials"`)
	})
	// Its tokens are opaque, so it takes the metadata, behind the same door, to know
	// whose they are.
	t.Run("an exchange", func(t *testing.T) {
		t.Parallel()
		testMutualTLS(t, `"type": "exchange", "audience": "notes"`)
	})
}

func testMutualTLS(t *testing.T, auth string) {
	t.Helper()
	as := authtest.NewAS(t)
	as.AddClient(authtest.OAuthClient{ID: "machine", Secret: "canary-cs-m", Method: "client_secret_basic"})
	remote := authtest.NewRemote(t, authtest.RemoteConfig{AS: as})
	if strings.Contains(auth, "audience") {
		remote.Set(func(k *authtest.RemoteKnobs) { k.Audience = "notes" })
	}

	var mu sync.Mutex
	accepted := int64(1)
	door := httptest.NewUnstartedServer(http.HandlerFunc(as.ServeHTTP))
	door.Config.SetKeepAlivesEnabled(false)
	door.Config.ErrorLog = log.New(io.Discard, "", 0)
	door.TLS = &tls.Config{ClientAuth: tls.RequireAnyClientCert, VerifyPeerCertificate: func(raw [][]byte, _ [][]*x509.Certificate) error {
		cert, err := x509.ParseCertificate(raw[0])
		if err != nil {
			return err
		}
		mu.Lock()
		defer mu.Unlock()
		if cert.SerialNumber.Int64() != accepted {
			return fmt.Errorf("the certificate %v is not accepted", cert.SerialNumber)
		}
		return nil
	}}
	door.StartTLS()
	t.Cleanup(door.Close)

	dir := t.TempDir()
	ca := filepath.Join(dir, "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: door.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	clientIdentity(t, dir, 1)
	as.Set(func(k *authtest.ASKnobs) {
		k.Document = map[string]any{"issuer": door.URL, "token_endpoint": door.URL + "/token"}
	})
	identity := filepath.Join(dir, "id_token")
	if err := os.WriteFile(identity, []byte(as.IDTokenFor("job-1", "machine")), 0o600); err != nil {
		t.Fatal(err)
	}
	config := func(certificate string) string {
		return fmt.Sprintf(`{"mcpServers": {"notes": {"url": %q, "auth": {%s, "clientId": "machine", "clientSecret": "canary-cs-m",
			"tokenEndpoint": %q, "tls": {"ca": %q %s}}}}, "gateway": {"auth": {"issuer": "https://idp.example.com", "idTokenFile": %q}}}`,
			remote.URL, auth, door.URL+"/token", ca, certificate, identity)
	}
	files := fmt.Sprintf(`, "cert": %q, "key": %q`, filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem"))

	gw := startServe(t, config(files))
	client := authtest.Legacy(t, gw.url)
	echo(t, client, "notes_echo", "by certificate 1")

	mu.Lock()
	accepted = 2
	mu.Unlock()
	clientIdentity(t, dir, 2)
	as.ExpireAll()
	// The files are looked at once a second.
	for deadline := time.Now().Add(10 * time.Second); client.Call("notes_echo", map[string]any{"text": "x"}).IsError; {
		if time.Now().After(deadline) {
			t.Fatal("the new certificate is not used")
		}
	}

	again := authtest.Legacy(t, startServe(t, config("")).url)
	requests := as.Count(authtest.EndpointToken)
	if say := authtest.Text(again.Call("notes_echo", nil)); !strings.Contains(say, "client certificate") || !strings.Contains(say, "auth.tls") {
		t.Errorf("without a certificate: %s", say)
	}
	if n := as.Count(authtest.EndpointToken); n != requests {
		t.Error("a token was asked for without a certificate")
	}
}

// serverIdentity makes a CA and a certificate of it for 127.0.0.1.
func serverIdentity(t *testing.T, serial int64) (ca []byte, identity tls.Certificate) {
	t.Helper()
	sign := func(template, parent *x509.Certificate, key crypto.PublicKey, by *ecdsa.PrivateKey) []byte {
		t.Helper()
		template.SerialNumber, template.NotBefore, template.NotAfter = big.NewInt(serial), time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
		der, err := x509.CreateCertificate(rand.Reader, template, parent, key, by)
		if err != nil {
			t.Fatal(err)
		}
		return der
	}
	keys := [2]*ecdsa.PrivateKey{}
	for i := range keys {
		var err error
		if keys[i], err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
			t.Fatal(err)
		}
	}
	root := &x509.Certificate{Subject: pkix.Name{CommonName: fmt.Sprint("root ", serial)}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	rootDER := sign(root, root, keys[0].Public(), keys[0])
	leaf := &x509.Certificate{Subject: pkix.Name{CommonName: "door"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	leafDER := sign(leaf, root, keys[1].Public(), keys[0])
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: rootDER}), tls.Certificate{Certificate: [][]byte{leafDER}, PrivateKey: keys[1]}
}

// TestAuthorityIsRenewed: the CA of a token endpoint behind mutual TLS, and that
// of a remote, are replaced while the gateway runs. Until its file is there the
// endpoint is not trusted, whatever was before; then it works.
func TestAuthorityIsRenewed(t *testing.T) {
	t.Parallel()
	as := authtest.NewAS(t)
	as.AddClient(authtest.OAuthClient{ID: "machine", Secret: "canary-cs-m", Method: "client_secret_basic"})
	remote := authtest.NewRemote(t, authtest.RemoteConfig{AS: as})

	dir := t.TempDir()
	ca := filepath.Join(dir, "ca.pem")
	clientIdentity(t, dir, 1)
	var mu sync.Mutex
	var identity tls.Certificate
	var written int64
	write := func(pem []byte) {
		t.Helper()
		if err := os.WriteFile(ca, pem, 0o600); err != nil {
			t.Fatal(err)
		}
		written++
		at := time.Now().Add(time.Duration(written) * time.Second)
		if err := os.Chtimes(ca, at, at); err != nil {
			t.Fatal(err)
		}
	}
	rotate := func(serial int64) (pem []byte) {
		t.Helper()
		pem, next := serverIdentity(t, serial)
		mu.Lock()
		defer mu.Unlock()
		identity = next
		return pem
	}
	door := func(handler http.Handler) *httptest.Server {
		s := httptest.NewUnstartedServer(handler)
		s.Config.SetKeepAlivesEnabled(false)
		s.Config.ErrorLog = log.New(io.Discard, "", 0)
		s.TLS = &tls.Config{ClientAuth: tls.RequireAnyClientCert, GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			mu.Lock()
			defer mu.Unlock()
			return &tls.Config{ClientAuth: tls.RequireAnyClientCert, Certificates: []tls.Certificate{identity}}, nil
		}}
		s.StartTLS()
		t.Cleanup(s.Close)
		return s
	}
	write(rotate(1))
	tokens := door(http.HandlerFunc(as.ServeHTTP))
	behind, err := url.Parse(remote.URL)
	if err != nil {
		t.Fatal(err)
	}
	notes := door(&httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) {
		r.Out.URL.Scheme, r.Out.URL.Host = "http", behind.Host
	}})
	files := fmt.Sprintf(`{"ca": %q, "cert": %q, "key": %q}`, ca, filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem"))
	gw := startServe(t, fmt.Sprintf(`{"mcpServers": {"notes": {"url": %q, "tls": %s, "auth": {"type": "clientCredentials", "clientId": "machine",
		"clientSecret": "canary-cs-m", "tokenEndpoint": %q, "resource": %q, "tls": %s}}}}`,
		notes.URL+behind.Path, files, tokens.URL+"/token", remote.URL, files))
	client := authtest.Legacy(t, gw.url)
	echo(t, client, "notes_echo", "by the first CA")

	requests := as.Count(authtest.EndpointToken)
	ca2 := rotate(2)
	as.ExpireAll()
	if result := client.Call("notes_echo", map[string]any{"text": "x"}); !result.IsError {
		t.Error("an unknown CA is trusted")
	}
	if n := as.Count(authtest.EndpointToken); n != requests {
		t.Error("a token was asked for at an endpoint of an unknown CA")
	}
	write(ca2)
	// The file is looked at once a second.
	for deadline := time.Now().Add(10 * time.Second); client.Call("notes_echo", map[string]any{"text": "x"}).IsError; {
		if time.Now().After(deadline) {
			t.Fatal("the new CA is not trusted")
		}
	}
	if n := as.Count(authtest.EndpointToken); n <= requests {
		t.Error("no new token")
	}
	rotate(1) // the same name, another key
	as.ExpireAll()
	if result := client.Call("notes_echo", map[string]any{"text": "x"}); !result.IsError {
		t.Error("the old CA is trusted")
	}
}
