package gateway

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"time"

	"gatehouse/auth/authtest"
)

func TestWindowLimit(t *testing.T) {
	now := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	l := newWindowLimit(2, 5, func() time.Time { return now })
	a, b := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")
	allow := func(from netip.Addr, want bool, when string) {
		t.Helper()
		retry, ok := l.allow(from, true)
		if ok != want {
			t.Errorf("%s: allowed %v, want %v", when, ok, want)
		}
		if !ok && (retry <= 0 || retry > time.Minute) {
			t.Errorf("%s: retry after %v", when, retry)
		}
	}
	allow(a, true, "first")
	allow(a, true, "second")
	allow(a, false, "third of one address")
	allow(netip.MustParseAddr("::ffff:192.0.2.1"), false, "the same address, mapped")
	allow(b, true, "another address")
	allow(netip.MustParseAddr("2001:db8::2"), true, "the same /64")
	allow(netip.MustParseAddr("2001:db8::3"), false, "the same /64, third")
	allow(netip.MustParseAddr("192.0.2.9"), true, "fifth in all")
	allow(netip.MustParseAddr("192.0.2.10"), false, "sixth in all")
	if _, ok := l.allow(netip.MustParseAddr("192.0.2.10"), false); !ok {
		t.Error("what does not count in all was refused for it")
	}
	l.giveBack(b)
	allow(netip.MustParseAddr("192.0.2.11"), true, "in the place of one that was given back")
	now = now.Add(time.Minute)
	allow(a, true, "a minute later")
	if len(l.counts) != 1 {
		t.Errorf("%d addresses remembered after a new window, want 1", len(l.counts))
	}
	now = now.Add(-time.Hour)
	allow(a, true, "the clock went back")
	for i := range maxAddresses + 100 {
		l.allow(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), false)
	}
	if len(l.counts) > maxAddresses+1 {
		t.Errorf("%d addresses remembered", len(l.counts))
	}
}

// TestCallbacksOfNobody: callbacks that cannot be anybody's use up what their
// address may send, and nothing of what all may.
func TestCallbacksOfNobody(t *testing.T) {
	g := newInside(t, authtest.NewRemote(t, authtest.RemoteConfig{}), `{"mcpServers": {"r": {"url": "http://127.0.0.1:1/mcp"}},
		"gateway": {"trustedProxies": ["127.0.0.0/8"], "limits": {"callbackPerMinute": 5, "callbackPerMinuteTotal": 5}}}`)
	state := strings.Repeat("s", 43)
	get := func(from, query, cookie string) int {
		r := httptest.NewRequestWithContext(t.Context(), http.MethodGet, g.url+"/oauth/callback/r"+query, nil)
		r.RemoteAddr = "127.0.0.1:5"
		r.Header.Set("X-Forwarded-For", from)
		if cookie != "" {
			r.Header.Set("Cookie", cookie+"=x")
		}
		w := httptest.NewRecorder()
		g.Handler().ServeHTTP(w, r)
		return w.Code
	}
	for i := range 6 {
		from := fmt.Sprint("192.0.2.", i)
		for _, query := range []string{"", "?state=x", "?state=" + state, "?state=" + state + "&state=" + state} {
			if got := get(from, query, "gatehouse_flow_another"); got != http.StatusBadRequest {
				t.Errorf("%q: %d", query, got)
			}
		}
	}
	if got := get("192.0.2.1", "", ""); got != http.StatusBadRequest {
		t.Errorf("the fifth of one address: %d", got)
	}
	if got := get("192.0.2.1", "", ""); got != http.StatusTooManyRequests {
		t.Errorf("the sixth of one address: %d", got)
	}
}

// TestRemoteAddr: X-Forwarded-For counts from a trusted proxy alone, and of it
// only what trusted proxies have written.
func TestRemoteAddr(t *testing.T) {
	g := &Gateway{cfg: &Config{}}
	for _, tt := range []struct {
		trusted, peer string
		forwarded     []string
		want          string
	}{
		{"", "192.0.2.1:5", []string{"198.51.100.7"}, "192.0.2.1"},
		{"10.0.0.0/8", "192.0.2.1:5", []string{"198.51.100.7"}, "192.0.2.1"},
		{"10.0.0.0/8", "10.0.0.1:5", []string{"198.51.100.7"}, "198.51.100.7"},
		{"10.0.0.0/8", "[::ffff:10.0.0.1]:5", []string{"198.51.100.7"}, "198.51.100.7"},
		{"10.0.0.0/8", "10.0.0.1:5", []string{"203.0.113.1, 198.51.100.7"}, "198.51.100.7"},
		{"10.0.0.0/8", "10.0.0.1:5", []string{"203.0.113.1", "198.51.100.7, 10.9.9.9"}, "198.51.100.7"},
		{"10.0.0.0/8", "10.0.0.1:5", []string{"2001:db8::1"}, "2001:db8::1"},
		{"10.0.0.0/8", "10.0.0.1:5", []string{"198.51.100.7, unknown"}, "10.0.0.1"},
		{"10.0.0.0/8", "10.0.0.1:5", nil, "10.0.0.1"},
		{"10.0.0.0/8", "10.0.0.1:5", []string{"10.1.1.1"}, "10.1.1.1"},
	} {
		g.cfg.Gateway.TrustedProxies = nil
		if tt.trusted != "" {
			g.cfg.Gateway.TrustedProxies = []netip.Prefix{netip.MustParsePrefix(tt.trusted)}
		}
		r := &http.Request{RemoteAddr: tt.peer, Header: http.Header{"X-Forwarded-For": tt.forwarded}}
		if got := g.remoteAddr(r).String(); got != tt.want {
			t.Errorf("%+v: %s", tt, got)
		}
	}
}
