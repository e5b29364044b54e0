package authtest

import (
	"encoding/pem"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
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
