package gateway

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"
)

// TestSlowPeers: one that does not read, or sends its body bit by bit, is given
// up; a stream that is silent for longer than a write may take is not.
func TestSlowPeers(t *testing.T) {
	const short = 100 * time.Millisecond
	ended := make(chan error, 1)
	mux := http.NewServeMux()
	mux.HandleFunc("GET /endless", func(w http.ResponseWriter, _ *http.Request) {
		block := make([]byte, 1<<20)
		for {
			if _, err := w.Write(block); err != nil {
				ended <- err
				return
			}
		}
	})
	mux.HandleFunc("GET /silent", func(w http.ResponseWriter, _ *http.Request) {
		for range 3 {
			io.WriteString(w, "event\n")
			w.(http.Flusher).Flush()
			<-time.After(2 * short)
		}
	})
	mux.HandleFunc("POST /body", func(w http.ResponseWriter, r *http.Request) {
		_, err := io.ReadAll(r.Body)
		ended <- err
		if err == nil {
			<-time.After(2 * short)
			io.WriteString(w, "read\n")
		}
	})
	srv := httptest.NewServer(limitSlow(mux, short, short))
	t.Cleanup(srv.Close)
	dial := func(request string) (net.Conn, *bufio.Reader) {
		t.Helper()
		conn, err := net.Dial("tcp", srv.Listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		fmt.Fprint(conn, request)
		return conn, bufio.NewReader(conn)
	}
	dial("GET /endless HTTP/1.1\r\nHost: x\r\n\r\n")
	if err := <-ended; err == nil {
		t.Error("somebody who does not read is written to for ever")
	}
	dial("POST /body HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n1")
	if err := <-ended; err == nil {
		t.Error("half a body is a body")
	}
	// On one connection, each with longer pauses than its deadlines.
	conn, answers := dial("GET /silent HTTP/1.1\r\nHost: x\r\n\r\n")
	for _, next := range []string{"POST /body HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n", ""} {
		resp, err := http.ReadResponse(answers, nil)
		if err == nil && resp.StatusCode == http.StatusContinue {
			fmt.Fprint(conn, "body")
			resp, err = http.ReadResponse(answers, nil)
		}
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		if err != nil || len(body) == 0 {
			t.Errorf("a patient answer: %q, %v", body, err)
		}
		<-time.After(2 * short)
		fmt.Fprint(conn, next)
	}
	if err := <-ended; err != nil {
		t.Errorf("the body of a patient client: %v", err)
	}
}
