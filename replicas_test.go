package main

import (
	"bufio"
	"crypto/rand"
	"encoding/base64"
	"fmt"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"testing"

	"gatehouse/auth/authtest"
)

// startRedis starts a redis-server of the test's own and returns its URL.
func startRedis(t *testing.T) string {
	t.Helper()
	if _, err := exec.LookPath("redis-server"); err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal("redis-server is missing: the tests of the Redis store need it")
		}
		t.Skip("redis-server is missing: the tests of the Redis store are skipped")
	}
	port := authtest.FreePort(t)
	cmd := exec.Command("redis-server", "--port", port, "--bind", "127.0.0.1", "--dir", t.TempDir(), "--save", "", "--requirepass", "canary-redis-password")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		if strings.Contains(lines.Text(), "Ready to accept connections") {
			return "redis://:${REDIS_PASSWORD}@127.0.0.1:" + port + "/0"
		}
	}
	t.Fatal("redis-server did not start")
	return ""
}

// TestReplicas: two gateways on one Redis behind one URL. A sign-in that began
// at one is finished at the other, and the first one's call works; one that is
// killed in the middle of a sign-in loses nothing.
func TestReplicas(t *testing.T) {
	t.Parallel()
	redisURL := startRedis(t)
	as := authtest.NewAS(t)
	notes := authtest.NewRemote(t, authtest.RemoteConfig{AS: as})
	mail := authtest.NewRemote(t, authtest.RemoteConfig{AS: as})
	var backend atomic.Pointer[url.URL]
	balancer := httptest.NewServer(&httputil.ReverseProxy{FlushInterval: -1, Rewrite: func(r *httputil.ProxyRequest) {
		r.SetURL(backend.Load())
		r.Out.Host = r.In.Host
	}})
	t.Cleanup(balancer.Close)
	var key [32]byte
	rand.Read(key[:])
	cfg := config(fmt.Sprintf(`{"publicUrl": %q, "sessions": "shared", "store": {"type": "redis", "url": %q, "keyEnv": "STORE_KEY"}}`, balancer.URL, redisURL),
		"notes", notes.URL, "mail", mail.URL)
	replica := func() *process {
		return start(t, "url", []string{"serve", "--config", writeConfig(t, cfg), "--listen", "127.0.0.1:0", "--log-level", "debug", "--log-format", "json"},
			"REDIS_PASSWORD=canary-redis-password", "STORE_KEY="+base64.StdEncoding.EncodeToString(key[:]))
	}
	one, two := replica(), replica()
	oneAt, twoAt := strings.TrimSuffix(one.url, "/mcp"), strings.TrimSuffix(two.url, "/mcp")
	first, second := authtest.Legacy(t, oneAt+"/mcp"), authtest.Legacy(t, twoAt+"/mcp")
	serve := func(address string) {
		u, err := url.Parse(address)
		if err != nil {
			t.Fatal(err)
		}
		backend.Store(u)
	}

	serve(oneAt)
	link1 := link(t, first.Call("notes_echo", nil), "notes")
	browser := authtest.NewBrowser(t)
	page := browser.OpenUntil(link1, balancer.URL+"/oauth/callback")
	serve(twoAt)
	if done := browser.Open(page.Next); !strings.Contains(done.Body, "notes is connected, 3 tools") {
		t.Fatalf("%d %s\n%s", done.Status, done.URL, done.Body)
	}
	echo(t, first, "notes_echo", "begun here, finished there")
	echo(t, second, "notes_echo", "and there too")

	serve(oneAt)
	link2 := link(t, first.Call("mail_echo", nil), "mail")
	page = browser.OpenUntil(link2, balancer.URL+"/oauth/callback")
	one.kill()
	serve(twoAt)
	if done := browser.Open(page.Next); !strings.Contains(done.Body, "mail is connected, 3 tools") {
		t.Fatalf("%d %s\n%s", done.Status, done.URL, done.Body)
	}
	echo(t, second, "mail_echo", "nothing is lost")
	if n := as.Count(authtest.EndpointRegister); n > 2 {
		t.Errorf("%d registrations", n)
	}
	if strings.Contains(two.output(), "canary") {
		t.Error("a secret is in the log")
	}
}
