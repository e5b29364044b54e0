package gateway

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
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
