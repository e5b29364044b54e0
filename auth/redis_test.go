package auth

import (
	"bufio"
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"gatehouse/auth/authtest"
	"gatehouse/auth/secret"
)

// redisServer is a real redis-server of a test's own.
type redisServer struct {
	t    testing.TB
	dir  string
	port string
	cmd  *exec.Cmd
}

const redisPassword = "canary-redis-password"

// startRedis starts a server, or skips the test where there is none.
func startRedis(t testing.TB) *redisServer {
	t.Helper()
	if _, err := exec.LookPath("redis-server"); err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal("redis-server is missing: the tests of the Redis store need it")
		}
		t.Skip("redis-server is missing: the tests of the Redis store are skipped")
	}
	port := authtest.FreePort(t)
	s := &redisServer{t: t, dir: t.TempDir(), port: port}
	acl := filepath.Join(s.dir, "users.acl")
	// What the store needs, and nothing else.
	rules := "user default on >somebody-else ~* &* +@all\nuser gatehouse on >" + redisPassword + " ~gatehouse:* &gatehouse:* +@read +@write +@scripting +@connection +@pubsub -@dangerous\n"
	if err := os.WriteFile(acl, []byte(rules), 0o600); err != nil {
		t.Fatal(err)
	}
	s.start()
	t.Cleanup(func() { s.stop(syscall.SIGKILL) })
	return s
}

func (s *redisServer) start() {
	s.t.Helper()
	s.cmd = exec.Command("redis-server", "--port", s.port, "--bind", "127.0.0.1", "--dir", s.dir, "--appendonly", "yes",
		"--appendfsync", "always", "--save", "", "--aclfile", filepath.Join(s.dir, "users.acl"))
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		s.t.Fatal(err)
	}
	if err := s.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		if strings.Contains(lines.Text(), "Ready to accept connections") {
			go io.Copy(io.Discard, out)
			return
		}
	}
	s.t.Fatal("redis-server did not start")
}

func (s *redisServer) stop(sig syscall.Signal) {
	s.cmd.Process.Signal(syscall.SIGCONT)
	s.cmd.Process.Signal(sig)
	s.cmd.Wait()
}

func (s *redisServer) url() string {
	return "redis://gatehouse:" + redisPassword + "@127.0.0.1:" + s.port + "/0"
}

var redisKey = secret.New(string(newKey()))

func (s *redisServer) config() RedisConfig {
	return RedisConfig{URL: secret.New(s.url()), Prefix: "gatehouse:", Keys: redisKey, Log: slog.New(slog.DiscardHandler)}
}

func openRedis(t testing.TB, c RedisConfig) *Redis {
	t.Helper()
	r, err := OpenRedis(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

// RedisForTests opens two stores on the records of a server of the test's own.
func RedisForTests(t *testing.T, limits map[string]int, now func() time.Time) (a, b Store) {
	s := startRedis(t)
	c := s.config()
	c.MaxRecords, c.Now = limits, now
	return openRedis(t, c), openRedis(t, c)
}

// SharedRedis is a server for processes that share it.
type SharedRedis struct {
	s         *redisServer
	URL, Keys string
}

// RedisServer starts a server for processes that share it.
func RedisServer(t *testing.T) SharedRedis {
	s := startRedis(t)
	return SharedRedis{s, s.url(), redisKey.Value()}
}

// Open opens a store on it.
func (s SharedRedis) Open(now func() time.Time) Store {
	c := s.s.config()
	c.Now = now
	return openRedis(s.s.t, c)
}

// Pause stops the server for a while, without an end of its connections.
func (s SharedRedis) Pause(d time.Duration) {
	s.s.cmd.Process.Signal(syscall.SIGSTOP)
	<-time.After(d)
	s.s.cmd.Process.Signal(syscall.SIGCONT)
}

// Stop kills the server.
func (s SharedRedis) Stop() { s.s.stop(syscall.SIGKILL) }

// Restart kills the server, if that has not been done, and starts it again.
func (s SharedRedis) Restart() {
	s.Stop()
	s.s.start()
}

// TestRedisKeys: the wrong key does not start, and changes nothing; a second
// one opens what the first has sealed, and takes its place; what is no key is
// refused.
func TestRedisKeys(t *testing.T) {
	s := startRedis(t)
	first := openRedis(t, s.config())
	version, err := first.Put(t.Context(), "b", "k", []byte("value"), 0, time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	expires := time.Now().Add(time.Hour).Round(time.Millisecond)
	late := func(key string) {
		t.Helper()
		if _, err := first.Put(t.Context(), "b", key, []byte("value"), 0, expires); err != nil {
			t.Fatal(err)
		}
	}
	late("mortal")
	other := s.config()
	other.Keys = secret.New(string(newKey()))
	if _, err := OpenRedis(t.Context(), other); !errors.Is(err, ErrWrongKey) {
		t.Errorf("another key: %v", err)
	}
	rotated := s.config()
	rotated.Keys = secret.New(other.Keys.Value() + redisKey.Value())
	second := openRedis(t, rotated)
	if got, err := second.Get(t.Context(), "b", "k"); err != nil || string(got.Value) != "value" {
		t.Errorf("after the rotation: %q, %v", got.Value, err)
	}
	// A replica that has the old key first writes on; a start that comes when it
	// does not any more lets the old key go.
	late("late")
	openRedis(t, rotated)
	only := openRedis(t, other)
	for key, expires := range map[string]time.Time{"k": {}, "mortal": expires, "late": expires} {
		got, err := only.Get(t.Context(), "b", key)
		if err != nil || string(got.Value) != "value" || !got.Expires.Equal(expires) || key == "k" && got.Version != version {
			t.Errorf("%s without the old key: %+v, %v", key, got, err)
		}
		life, err := only.client.TTL(t.Context(), only.record("b", hash("b", key))).Result()
		if err != nil || expires.IsZero() != (life < 0) {
			t.Errorf("%s stays for %s: %v", key, life, err)
		}
	}
	if _, err := second.Put(t.Context(), "b", "k", []byte("value"), version, time.Time{}); err != nil {
		t.Errorf("a swap of what was sealed anew: %v", err)
	}
	if _, err := OpenRedis(t.Context(), s.config()); !errors.Is(err, ErrWrongKey) {
		t.Errorf("the old key: %v", err)
	}
	for name, change := range map[string]func(*RedisConfig){
		"no key":       func(c *RedisConfig) { c.Keys = secret.Text{} },
		"a weak key":   func(c *RedisConfig) { c.Keys = secret.New("AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=") },
		"both":         func(c *RedisConfig) { c.KeyFile = "key" },
		"no key there": func(c *RedisConfig) { c.Keys, c.KeyFile = secret.Text{}, filepath.Join(t.TempDir(), "key") },
	} {
		c := s.config()
		change(&c)
		if _, err := OpenRedis(t.Context(), c); !errors.Is(err, ErrKey) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// What is stored is sealed, and tells nothing.
	for _, secret := range []string{"value"} {
		dump, err := os.ReadFile(filepath.Join(s.dir, "appendonlydir", "appendonly.aof.1.incr.aof"))
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(dump), secret) {
			t.Errorf("%q is in the clear", secret)
		}
	}
}

// TestRedisStart: a server that is not there, that refuses, or a URL that is
// none: no start, no password in the error, and never another store instead.
func TestRedisStart(t *testing.T) {
	s := startRedis(t)
	wrong := s.config()
	wrong.URL = secret.New("redis://gatehouse:canary-wrong@127.0.0.1:" + s.port + "/0")
	for name, c := range map[string]RedisConfig{
		"password": wrong,
		"scheme":   {URL: secret.New("http://gatehouse:" + redisPassword + "@127.0.0.1/"), Keys: redisKey, Log: slog.New(slog.DiscardHandler)},
		"no URL":   {URL: secret.New(redisPassword), Keys: redisKey, Log: slog.New(slog.DiscardHandler)},
	} {
		_, err := OpenRedis(t.Context(), c)
		if err == nil || strings.Contains(err.Error(), "canary") {
			t.Errorf("%s: %v", name, err)
		}
	}
	s.stop(syscall.SIGTERM)
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := OpenRedis(ctx, s.config()); err == nil || !strings.Contains(err.Error(), "does not answer") {
		t.Errorf("no server: %v", err)
	}
	// One that comes late is waited for.
	opened := make(chan error, 1)
	go func() {
		r, err := OpenRedis(t.Context(), s.config())
		if err == nil {
			err = r.Close()
		}
		opened <- err
	}()
	s.start()
	if err := <-opened; err != nil {
		t.Error(err)
	}
}

// TestRedisSwapped: a record that was moved to another's place, or cut, counts
// as not there.
func TestRedisSwapped(t *testing.T) {
	s := startRedis(t)
	r := openRedis(t, s.config())
	for _, key := range []string{"mine", "yours", "cut"} {
		if _, err := r.Put(t.Context(), "b", key, []byte(key), 0, time.Time{}); err != nil {
			t.Fatal(err)
		}
	}
	at := func(key string) string { return r.record("b", hash("b", key)) }
	yours, err := r.client.HGet(t.Context(), at("yours"), "v").Result()
	if err != nil {
		t.Fatal(err)
	}
	if err := r.client.HSet(t.Context(), at("mine"), "v", yours).Err(); err != nil {
		t.Fatal(err)
	}
	if err := r.client.HSet(t.Context(), at("cut"), "v", yours[:20]).Err(); err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{"mine", "cut"} {
		if got, err := r.Get(t.Context(), "b", key); !errors.Is(err, ErrNotFound) {
			t.Errorf("%s: %q, %v", key, got.Value, err)
		}
	}
}

// TestRedisForgets: what is left of a record that is deleted does not stay for
// longer than the record would have, nor for more than a day.
func TestRedisForgets(t *testing.T) {
	r := openRedis(t, startRedis(t).config())
	for life, most := range map[time.Duration]time.Duration{
		10 * time.Minute: 10*time.Minute + redisSlack,
		72 * time.Hour:   tombstone,
		0:                tombstone,
	} {
		var expires time.Time
		if life > 0 {
			expires = time.Now().Add(life)
		}
		if _, err := r.Put(t.Context(), "b", "k", nil, AnyVersion, expires); err != nil {
			t.Fatal(err)
		}
		if err := r.Delete(t.Context(), "b", "k"); err != nil {
			t.Fatal(err)
		}
		left, err := r.client.PTTL(t.Context(), r.record("b", hash("b", "k"))).Result()
		if err != nil || left <= most-time.Minute || left > most {
			t.Errorf("of a record that lives for %s something stays for %s, want %s (%v)", life, left, most, err)
		}
	}
}

// TestRedisGone: without the server everything fails in time, and works again
// when it is back, with all that was written.
func TestRedisGone(t *testing.T) {
	s := startRedis(t)
	r := openRedis(t, s.config())
	version, err := r.Put(t.Context(), "b", "k", []byte("kept"), 0, time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	lease, err := r.Lease(t.Context(), "l")
	if err != nil {
		t.Fatal(err)
	}
	tries := func(how string) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		defer cancel()
		if _, err := r.Get(ctx, "b", "k"); err == nil || errors.Is(err, ErrNotFound) {
			t.Errorf("%s: Get: %v", how, err)
		}
		if _, err := r.Put(ctx, "b", "k", nil, version, time.Time{}); err == nil || errors.Is(err, ErrConflict) {
			t.Errorf("%s: Put: %v", how, err)
		}
		if _, err := r.Lease(ctx, "other"); err == nil {
			t.Errorf("%s: a lease", how)
		}
		if err := lease.Check(ctx); err == nil {
			t.Errorf("%s: the lease is said to be held", how)
		}
	}
	if err := s.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	tries("paused")
	if err := s.cmd.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	s.stop(syscall.SIGKILL)
	tries("killed")
	s.start()
	if got, err := r.Get(t.Context(), "b", "k"); err != nil || string(got.Value) != "kept" {
		t.Errorf("after the restart: %q, %v", got.Value, err)
	}
	if err := lease.Check(t.Context()); err != nil {
		t.Errorf("the lease after the restart: %v", err)
	}
	lease.Release()
}

// TestRedisLeaseLost: a lease that somebody else has by now is no longer held,
// and its old owner cannot release it.
func TestRedisLeaseLost(t *testing.T) {
	s := startRedis(t)
	a, b := openRedis(t, s.config()), openRedis(t, s.config())
	old, err := a.Lease(t.Context(), "l")
	if err != nil {
		t.Fatal(err)
	}
	// As if a minute had gone by.
	if err := b.client.Del(t.Context(), old.(*redisLease).key).Err(); err != nil {
		t.Fatal(err)
	}
	now, err := b.Lease(t.Context(), "l")
	if err != nil {
		t.Fatal(err)
	}
	if err := old.Check(t.Context()); !errors.Is(err, ErrLeaseLost) {
		t.Errorf("the old one: %v", err)
	}
	old.Release()
	if err := now.Check(t.Context()); err != nil {
		t.Errorf("the new one: %v", err)
	}
}

// TestRedisFenced: of two writers who both believe to have the lease one wins.
func TestRedisFenced(t *testing.T) {
	a, b := RedisForTests(t, nil, nil)
	version, err := a.Put(t.Context(), "b", "k", []byte("0"), 0, time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	results := make(chan error, 20)
	for i := range 20 {
		store := []Store{a, b}[i%2]
		wg.Go(func() {
			_, err := store.Put(t.Context(), "b", "k", fmt.Append(nil, i), version, time.Time{})
			results <- err
		})
	}
	wg.Wait()
	close(results)
	won := 0
	for err := range results {
		if err == nil {
			won++
		} else if !errors.Is(err, ErrConflict) {
			t.Error(err)
		}
	}
	if won != 1 {
		t.Errorf("%d have won", won)
	}
}

// TestRedisTLS: with a CA of the config's own the server is known; without it,
// it is not talked to.
func TestRedisTLS(t *testing.T) {
	if _, err := exec.LookPath("redis-server"); err != nil {
		startRedis(t) // says so
	}
	dir := t.TempDir()
	certificate := httptest.NewUnstartedServer(nil)
	certificate.StartTLS()
	pair := certificate.TLS.Certificates[0]
	certificate.Close()
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: pair.Certificate[0]})
	key, err := x509.MarshalPKCS8PrivateKey(pair.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{"cert.pem": ca, "key.pem": pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	port := authtest.FreePort(t)
	cmd := exec.Command("redis-server", "--port", "0", "--tls-port", port, "--bind", "127.0.0.1", "--dir", dir, "--save", "",
		"--tls-cert-file", filepath.Join(dir, "cert.pem"), "--tls-key-file", filepath.Join(dir, "key.pem"),
		"--tls-ca-cert-file", filepath.Join(dir, "cert.pem"), "--tls-auth-clients", "no")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	c := RedisConfig{URL: secret.New("rediss://127.0.0.1:" + port + "/0"), Prefix: "gatehouse:", Keys: redisKey, CA: ca, Log: slog.New(slog.DiscardHandler)}
	r := openRedis(t, c) // waits until it is up
	if _, err := r.Put(t.Context(), "b", "k", []byte("v"), 0, time.Time{}); err != nil {
		t.Error(err)
	}
	c.CA = nil
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if _, err := OpenRedis(ctx, c); err == nil {
		t.Error("a certificate of nobody's was taken")
	}
	c.CA = []byte("no certificate")
	if _, err := OpenRedis(t.Context(), c); err == nil || !strings.Contains(err.Error(), "PEM") {
		t.Errorf("a CA that is none: %v", err)
	}
}
