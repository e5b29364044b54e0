package authtest

import (
	"encoding/pem"
	"io"
	"log"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"testing"
)

// startServer serves until the test ends. Its own log is nobody's business:
// broken connections are what many tests want.
func startServer(t testing.TB, h http.Handler, addr string, tls bool) (s *httptest.Server, ca []byte) {
	t.Helper()
	s = httptest.NewUnstartedServer(h)
	if addr != "" {
		listener, err := net.Listen("tcp", addr)
		if err != nil {
			t.Fatalf("authtest: listening on %s: %v", addr, err)
		}
		s.Listener.Close()
		s.Listener = listener
	}
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	if tls {
		s.StartTLS()
		ca = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
	} else {
		s.Start()
	}
	t.Cleanup(func() {
		// Whoever still waits for an answer does not get one.
		s.CloseClientConnections()
		s.Close()
	})
	return s, ca
}

// FreePort is a port of 127.0.0.1 that nobody listens on, for a program that
// must be told one. It is below those that the system gives to outgoing
// connections, so that none of them takes it before the program listens.
func FreePort(t testing.TB) string {
	t.Helper()
	for range 100 {
		port := strconv.Itoa(15000 + rand.IntN(17000))
		l, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", port))
		if err == nil {
			l.Close()
			return port
		}
	}
	t.Fatal("no port of 127.0.0.1 is free")
	return ""
}
