package gateway

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"log/slog"
	"math/big"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// writeCertificate writes a self-signed certificate with a serial number.
func writeCertificate(t *testing.T, cert, key string, serial int64) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(serial), DNSNames: []string{"localhost"}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &private.PublicKey, private)
	if err != nil {
		t.Fatal(err)
	}
	plain, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	for name, block := range map[string]*pem.Block{cert: {Type: "CERTIFICATE", Bytes: der}, key: {Type: "PRIVATE KEY", Bytes: plain}} {
		if err := os.WriteFile(name, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
		// A file system's clock may be too coarse to tell two writes apart.
		if err := os.Chtimes(name, time.Time{}, time.Unix(serial, 0)); err != nil {
			t.Fatal(err)
		}
	}
}

// TestCertificateIsReadAgain when it changes, and stays what it is while the
// files cannot be used.
func TestCertificateIsReadAgain(t *testing.T) {
	dir := t.TempDir()
	cert, key := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	if _, err := LoadCertificate(cert, key, slog.New(slog.DiscardHandler)); err == nil {
		t.Error("files that do not exist are a certificate")
	}
	writeCertificate(t, cert, key, 1)
	var log bytes.Buffer
	c, err := LoadCertificate(cert, key, slog.New(slog.NewJSONHandler(&log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	c.now = func() time.Time { return now }
	serves := func(serial int64) {
		t.Helper()
		got, err := c.Get(nil)
		if err != nil || got.Leaf.SerialNumber.Int64() != serial {
			t.Errorf("it serves %v, %v, want number %d", got.Leaf.SerialNumber, err, serial)
		}
	}
	serves(1)
	writeCertificate(t, cert, key, 2)
	serves(1) // it has just looked
	now = now.Add(certificateCheck)
	serves(2)

	// A renewal that is half done: a new certificate beside the old key.
	old, err := os.ReadFile(key)
	if err != nil {
		t.Fatal(err)
	}
	writeCertificate(t, cert, key, 3)
	fresh, err := os.ReadFile(key)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(key, old, 0o600); err != nil {
		t.Fatal(err)
	}
	now = now.Add(certificateCheck)
	serves(2)
	if !bytes.Contains(log.Bytes(), []byte("the old one stays")) {
		t.Errorf("the log says nothing of it: %s", log.Bytes())
	}
	if err := os.WriteFile(key, fresh, 0o600); err != nil {
		t.Fatal(err)
	}
	now = now.Add(certificateCheck)
	serves(3)
	if err := os.Remove(cert); err != nil {
		t.Fatal(err)
	}
	now = now.Add(certificateCheck)
	serves(3)
}

// TestRootsAreReadAgain when a file changes, with all of them still in, and stay
// what they are while a file cannot be used.
func TestRootsAreReadAgain(t *testing.T) {
	dir := t.TempDir()
	first, second := filepath.Join(dir, "1.pem"), filepath.Join(dir, "2.pem")
	if _, err := LoadRoots(slog.New(slog.DiscardHandler), first); err == nil {
		t.Error("a file that does not exist is a CA")
	}
	certificate := func(file string, serial int64) *x509.Certificate {
		t.Helper()
		writeCertificate(t, file, filepath.Join(dir, "key.pem"), serial)
		pair, err := tls.LoadX509KeyPair(file, filepath.Join(dir, "key.pem"))
		if err != nil {
			t.Fatal(err)
		}
		return pair.Leaf
	}
	one, other := certificate(first, 1), certificate(second, 2)
	var log bytes.Buffer
	r, err := LoadRoots(slog.New(slog.NewJSONHandler(&log, nil)), first, second)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	r.now = func() time.Time { return now }
	trusts := func(want ...*x509.Certificate) {
		t.Helper()
		system, err := x509.SystemCertPool()
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range want {
			system.AddCert(c)
		}
		if !r.Get().Equal(system) {
			t.Error("it trusts something else")
		}
		if pool := r.Get(); pool != r.Get() {
			t.Error("another pool without a change")
		}
	}
	trusts(one, other)
	renewed := certificate(second, 3)
	trusts(one, other) // it has just looked
	now = now.Add(certificateCheck)
	trusts(one, renewed)
	if err := os.WriteFile(first, []byte("no PEM"), 0o600); err != nil {
		t.Fatal(err)
	}
	now = now.Add(certificateCheck)
	trusts(one, renewed)
	if !bytes.Contains(log.Bytes(), []byte("the old ones stay")) {
		t.Errorf("the log says nothing of it: %s", log.Bytes())
	}
	if err := os.Remove(first); err != nil {
		t.Fatal(err)
	}
	now = now.Add(certificateCheck)
	trusts(one, renewed)
	again := certificate(first, 4)
	now = now.Add(certificateCheck)
	trusts(again, renewed)
}
