package session

import (
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"testing"

	"gatehouse/auth"
)

// replay is a transport that answers at once, so that only our own work counts.
type replay struct{ contentType, before, after string }

func (r replay) RoundTrip(req *http.Request) (*http.Response, error) {
	body, err := io.ReadAll(req.Body)
	if err != nil {
		return nil, err
	}
	var m struct{ ID json.RawMessage }
	if err := json.Unmarshal(body, &m); err != nil {
		return nil, err
	}
	text := r.before + string(m.ID) + r.after
	return &http.Response{
		StatusCode: http.StatusOK, Header: http.Header{"Content-Type": {r.contentType}},
		Body: io.NopCloser(strings.NewReader(text)), ContentLength: int64(len(text)), Request: req,
	}, nil
}

// BenchmarkCall measures a call on a connected remote: without a network, where
// a third of the allocations are replay's, and over loopback, where more than
// half of them are net/http's and the fake's.
func BenchmarkCall(b *testing.B) {
	result := `{"content":[{"type":"text","text":"` + strings.Repeat("x", 300) + `"}]}`
	params := json.RawMessage(`{"name":"echo","arguments":{"text":"` + strings.Repeat("y", 200) + `"}}`)
	js := replay{"application/json", `{"jsonrpc":"2.0","id":`, `,"result":` + result + `}`}
	sse := replay{"text/event-stream", `data: {"jsonrpc":"2.0","id":`, `,"result":` + result + "}\n\n"}
	f := newFake(b)
	r := newRemoteFor(b, "notes", f.URL)
	r.Authorizer = func(auth.Principal) Authorizer { return token("T") }
	p, _ := newPool(b, r)
	s, err := p.Open(auth.Local)
	if err != nil {
		b.Fatal(err)
	}
	settled(b, s)
	run := func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := s.Call(b.Context(), "notes", "tools/call", params, nil); err != nil {
				b.Fatal(err)
			}
		}
	}
	real := p.remotes[0].client
	for _, tt := range []struct {
		name string
		r    replay
	}{{"JSON", js}, {"SSE", sse}} {
		p.remotes[0].client = &http.Client{Transport: tt.r}
		b.Run("no network "+tt.name, run)
		f.handle("tools/call", func(w http.ResponseWriter, _ *http.Request, m received) {
			w.Header().Set("Content-Type", tt.r.contentType)
			io.WriteString(w, tt.r.before+string(m.ID)+tt.r.after)
		})
		p.remotes[0].client = real
		b.Run("loopback "+tt.name, run)
	}
}
