package auth_test

import (
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"gatehouse/auth"
	"gatehouse/auth/secret"
	"gatehouse/auth/storetest"
)

func TestFile(t *testing.T) {
	storetest.Run(t, func(t *testing.T, c storetest.Config) (a, b auth.Store) {
		config := auth.FileConfig{Dir: t.TempDir() + "/store", MaxRecords: c.MaxRecords, Now: c.Now, Log: discard}
		return openFile(t, config), openFile(t, config)
	})
}

// What the broker does on the file store is what it does in memory.
func TestBrokerOverFile(t *testing.T) {
	overFile = true
	defer func() { overFile = false }()
	for name, test := range map[string]func(*testing.T){
		"walk": TestWalk, "finish elsewhere": TestFinishElsewhere, "first success ends all": TestFirstSuccessEndsAll,
		"end during the exchange": TestEndDuringTheExchange, "many flows": TestManyFlowsAnyOrder, "step up": TestStepUp,
		"refresh in the background": TestRefreshInTheBackground, "refresh of an expired token": TestRefreshOfAnExpiredToken,
		"refresh token kept or replaced": TestRefreshTokenIsKeptOrReplaced, "invalid_grant": TestInvalidGrantEndsTheGrant,
		"disowned client": TestDisownedClientAtRefresh, "without refresh token": TestExpiredWithoutRefreshToken,
		"renew": TestRenew, "sign out": TestSignOut, "sign out during a refresh": TestSignOutDuringARefresh, "end": TestEnd,
		"another config": TestGrantOfAnotherConfig, "issuer changes": TestIssuerChanges, "cheap": TestTokenIsCheap,
		"many at once": TestManyFindAGrantAtOnce,
	} {
		t.Run(name, test)
	}
}

func openFile(t *testing.T, c auth.FileConfig) *auth.File {
	t.Helper()
	f, err := auth.OpenFile(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// records lists the files of a store's records.
func records(t *testing.T, dir string) []string {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(dir, "records", "*", "*"))
	if err != nil {
		t.Fatal(err)
	}
	return paths
}

// recordOf makes a record and returns its file.
func recordOf(t *testing.T, f *auth.File, dir, bucket, key, value string) string {
	t.Helper()
	before := records(t, dir)
	if _, err := f.Put(t.Context(), bucket, key, []byte(value), 0, time.Time{}); err != nil {
		t.Fatal(err)
	}
	for _, path := range records(t, dir) {
		if !slices.Contains(before, path) {
			return path
		}
	}
	t.Fatal("no file was made")
	return ""
}

// What is damaged, or not ours, or another's is nobody's: it is set aside, said
// once in the log, and its place is free.
func TestDamagedRecords(t *testing.T) {
	for name, damage := range map[string]func(t *testing.T, path, other string) error{
		"empty":     func(_ *testing.T, path, _ string) error { return os.Truncate(path, 0) },
		"truncated": func(_ *testing.T, path, _ string) error { return os.Truncate(path, 40) },
		"cut by one": func(t *testing.T, path, _ string) error {
			return os.Truncate(path, int64(len(read(t, path))-1))
		},
		"a bit flipped": func(t *testing.T, path, _ string) error {
			data := read(t, path)
			data[len(data)/2] ^= 1
			return os.WriteFile(path, data, 0o600)
		},
		"other text":     func(_ *testing.T, path, _ string) error { return os.WriteFile(path, []byte("{}"), 0o600) },
		"another's":      func(t *testing.T, path, other string) error { return os.WriteFile(path, read(t, other), 0o600) },
		"world-readable": func(_ *testing.T, path, _ string) error { return os.Chmod(path, 0o644) },
		"group-writable": func(_ *testing.T, path, _ string) error { return os.Chmod(path, 0o620) },
		"a link": func(_ *testing.T, path, other string) error {
			return errors.Join(os.Remove(path), os.Symlink(other, path))
		},
		"a directory": func(_ *testing.T, path, _ string) error {
			return errors.Join(os.Remove(path), os.Mkdir(path, 0o700))
		},
		"huge": func(_ *testing.T, path, _ string) error { return os.Truncate(path, 1<<30) },
	} {
		t.Run(name, func(t *testing.T) {
			log := &lockedBuffer{}
			dir := filepath.Join(t.TempDir(), "store")
			f := openFile(t, auth.FileConfig{Dir: dir, Log: slog.New(slog.NewTextHandler(log, nil))})
			alices := recordOf(t, f, dir, "b", "alice", "alice's "+secretsCanary)
			bobs := recordOf(t, f, dir, "b", "bob", "bob's "+secretsCanary)
			if err := damage(t, alices, bobs); err != nil {
				t.Fatal(err)
			}
			var wg sync.WaitGroup
			for range 10 {
				wg.Go(func() {
					if r, err := f.Get(t.Context(), "b", "alice"); !errors.Is(err, auth.ErrNotFound) {
						t.Errorf("Get: %q, %v", r.Value, err)
					}
				})
			}
			wg.Wait()
			if r, err := f.Get(t.Context(), "b", "bob"); err != nil || string(r.Value) != "bob's "+secretsCanary {
				t.Errorf("the other: %q, %v", r.Value, err)
			}
			info, err := os.Lstat(alices + ".bad")
			if err != nil || info.Mode().IsRegular() && info.Mode().Perm() != 0o600 {
				t.Errorf("set aside: %v, %v", info, err)
			}
			if n := strings.Count(log.String(), "\n"); n != 1 || strings.Contains(log.String(), secretsCanary) {
				t.Errorf("%d lines in the log, want 1:\n%s", n, log)
			}
			if _, err := f.Put(t.Context(), "b", "alice", []byte("anew"), 0, time.Time{}); err != nil {
				t.Errorf("the place is not free: %v", err)
			}
			// A later start has nothing to say about it.
			if r, err := openFile(t, auth.FileConfig{Dir: dir, Log: discard}).Get(t.Context(), "b", "alice"); err != nil || string(r.Value) != "anew" {
				t.Errorf("after a restart: %q, %v", r.Value, err)
			}
		})
	}
}

// Two records that change places are neither's.
func TestSwappedRecords(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "store")
	f := openFile(t, auth.FileConfig{Dir: dir, Log: discard})
	a := recordOf(t, f, dir, "grants", "k", "alice's")
	b := recordOf(t, f, dir, "grants", "l", "bob's")
	c := recordOf(t, f, dir, "flows", "k", "a flow")
	cross := filepath.Join(filepath.Dir(c), filepath.Base(a)) // another bucket, the same name
	err := errors.Join(os.Rename(a, a+"x"), os.Rename(b, a), os.Rename(a+"x", b), os.WriteFile(cross, read(t, b), 0o600))
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{"k", "l"} {
		if r, err := f.Take(t.Context(), "grants", key); !errors.Is(err, auth.ErrNotFound) {
			t.Errorf("Take %s: %q, %v", key, r.Value, err)
		}
	}
	if r, err := f.Get(t.Context(), "flows", "k"); err != nil || string(r.Value) != "a flow" {
		t.Errorf("the flow: %q, %v", r.Value, err)
	}
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// Nothing in the directory can be entered, read, or understood by others.
func TestFileKeepsSecrets(t *testing.T) {
	w := newFileWorld(t, 1)
	w.signIn(auth.Local, "r0")
	w.link(auth.SessionPrincipal("canary-session"), "r0")
	err := filepath.WalkDir(w.dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		if want := map[bool]fs.FileMode{true: 0o700, false: 0o600}[d.IsDir()]; info.Mode().Perm() != want {
			t.Errorf("%s: %v, want %v", path, info.Mode(), want)
		}
		if d.IsDir() {
			return nil
		}
		for _, canary := range []string{secretsCanary, "canary-session", "local", "http:"} {
			if bytes.Contains(read(t, path), []byte(canary)) {
				t.Errorf("%s holds %q", path, canary)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func keyLine() string {
	key := make([]byte, 32)
	rand.Read(key)
	return base64.StdEncoding.EncodeToString(key) + "\n"
}

func keyFile(t *testing.T, path string, lines ...string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(strings.Join(lines, "")), 0o600); err != nil {
		t.Fatal(err)
	}
}

// snapshot is the content of a directory, but for what is there to be locked.
func snapshot(t *testing.T, dir string) map[string]string {
	t.Helper()
	files := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() && filepath.Base(filepath.Dir(path)) != "locks" {
			files[path] = string(read(t, path))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// A wrong key opens nothing and changes nothing.
func TestWrongKey(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "store")
	keys := filepath.Join(t.TempDir(), "keys")
	right, wrong := keyLine(), keyLine()
	keyFile(t, keys, right)
	c := auth.FileConfig{Dir: dir, KeyFile: keys, Log: discard}
	f := openFile(t, c)
	if _, err := f.Put(t.Context(), "b", "k", []byte("v"), 0, time.Time{}); err != nil {
		t.Fatal(err)
	}
	refused := func(what string, c auth.FileConfig, want error) {
		t.Helper()
		before := snapshot(t, dir)
		f, err := auth.OpenFile(c)
		if err == nil {
			f.Close()
		}
		if !errors.Is(err, want) || err != nil && strings.Contains(err.Error(), strings.TrimSpace(wrong)) {
			t.Errorf("%s: %v, want %v", what, err, want)
		}
		if after := snapshot(t, dir); fmt.Sprint(before) != fmt.Sprint(after) {
			t.Errorf("%s changed the store", what)
		}
	}
	opens := func(what string, c auth.FileConfig) {
		t.Helper()
		if r, err := openFile(t, c).Get(t.Context(), "b", "k"); err != nil || string(r.Value) != "v" {
			t.Errorf("%s: %q, %v", what, r.Value, err)
		}
	}
	keyFile(t, keys, wrong)
	refused("another key", c, auth.ErrWrongKey)
	refused("another key itself", auth.FileConfig{Dir: dir, Keys: secret.New(wrong), Log: discard}, auth.ErrWrongKey)
	refused("no key file", auth.FileConfig{Dir: dir, KeyFile: keys + "x", Log: discard}, auth.ErrKey)
	refused("none at all", auth.FileConfig{Dir: dir, Log: discard}, auth.ErrKey)
	opens("the key itself", auth.FileConfig{Dir: dir, Keys: secret.New(right), Log: discard})

	// Without the canary the records say whose key it is.
	canary := filepath.Join(dir, "canary")
	if err := os.Remove(canary); err != nil {
		t.Fatal(err)
	}
	refused("another key, without the canary", c, auth.ErrWrongKey)
	keyFile(t, keys, right)
	opens("the right key, without the canary", c)
	if err := os.WriteFile(canary, []byte("damaged"), 0o600); err != nil {
		t.Fatal(err)
	}
	opens("the right key, with a damaged canary", c)
	keyFile(t, keys, wrong)
	refused("another key, after that", c, auth.ErrWrongKey)
}

// A new first line seals everything anew; then the old line can go. A process
// that runs on learns the new key from the file, for all who read at once.
func TestKeyRotation(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "store")
	keys := filepath.Join(t.TempDir(), "keys")
	first, second := keyLine(), keyLine()
	keyFile(t, keys, first)
	c := auth.FileConfig{Dir: dir, KeyFile: keys, Log: discard}
	running := openFile(t, c)
	busy := openFile(t, c)
	expires := time.Now().Add(time.Hour)
	versions := map[string]uint64{}
	for i := range 10 {
		key := fmt.Sprint(i)
		v, err := running.Put(t.Context(), "b", key, []byte(key), 0, expires)
		if err != nil {
			t.Fatal(err)
		}
		versions[key] = v
	}
	keyFile(t, keys, second, first)
	openFile(t, c)
	keyFile(t, keys, second)
	rotated := openFile(t, c)
	var arrived, readers sync.WaitGroup
	arrived.Add(2)
	auth.AtPoint(func(point string) {
		if point == "unknown key" {
			arrived.Done()
			arrived.Wait() // one of them reads the key file
		}
	})
	for range 2 {
		readers.Go(func() {
			if _, err := busy.Get(t.Context(), "b", "0"); err != nil {
				t.Errorf("read with another: %v", err)
			}
		})
	}
	readers.Wait()
	auth.AtPoint(nil)
	for _, f := range []*auth.File{running, rotated} {
		for key, version := range versions {
			r, err := f.Get(t.Context(), "b", key)
			if err != nil || string(r.Value) != key || r.Version != version || !r.Expires.Equal(expires) {
				t.Errorf("record %s: %+v, %v", key, r, err)
			}
		}
	}
	if _, err := running.Put(t.Context(), "b", "new", []byte("v"), 0, time.Time{}); err != nil {
		t.Fatal(err)
	}
	if _, err := rotated.Get(t.Context(), "b", "new"); err != nil {
		t.Errorf("what the process that ran on has written: %v", err)
	}
	keyFile(t, keys, first)
	if _, err := auth.OpenFile(c); !errors.Is(err, auth.ErrWrongKey) {
		t.Errorf("the old key alone: %v", err)
	}
}

// A record under a key that this process does not have is refused and left
// alone: it may be somebody else's newer one.
func TestRecordOfAnUnknownKey(t *testing.T) {
	log := &lockedBuffer{}
	dir := filepath.Join(t.TempDir(), "store")
	first, second := keyLine(), keyLine()
	old := openFile(t, auth.FileConfig{Dir: dir, Keys: secret.New(first), Log: slog.New(slog.NewTextHandler(log, nil))})
	recordOf(t, old, dir, "b", "k", "v")
	next := openFile(t, auth.FileConfig{Dir: dir, Keys: secret.New(second + first), Log: discard})
	for range 3 {
		if _, err := old.Get(t.Context(), "b", "k"); !errors.Is(err, auth.ErrWrongKey) {
			t.Errorf("Get: %v, want %v", err, auth.ErrWrongKey)
		}
		if _, err := old.Take(t.Context(), "b", "k"); !errors.Is(err, auth.ErrWrongKey) {
			t.Errorf("Take: %v, want %v", err, auth.ErrWrongKey)
		}
		if _, err := old.Put(t.Context(), "b", "k", nil, 0, time.Time{}); !errors.Is(err, auth.ErrWrongKey) {
			t.Errorf("Put: %v, want %v", err, auth.ErrWrongKey)
		}
	}
	if n := strings.Count(log.String(), "\n"); n != 1 {
		t.Errorf("%d lines in the log, want 1:\n%s", n, log)
	}
	r, err := next.Get(t.Context(), "b", "k")
	if err != nil || string(r.Value) != "v" {
		t.Fatalf("the newer one: %q, %v", r.Value, err)
	}
	// A new sign-in does not care what was there.
	if v, err := old.Put(t.Context(), "b", "k", []byte("anew"), auth.AnyVersion, time.Time{}); err != nil || v <= r.Version {
		t.Errorf("Put at any version: %d, %v", v, err)
	}
	if r, err := next.Get(t.Context(), "b", "k"); err != nil || string(r.Value) != "anew" {
		t.Errorf("after it: %q, %v", r.Value, err)
	}
}

func TestKeyFiles(t *testing.T) {
	counted := make([]byte, 32)
	for i := range counted {
		counted[i] = byte(3 * i)
	}
	encode := base64.StdEncoding.EncodeToString
	good := keyLine()
	for _, tt := range []struct {
		name, content string
		mode          fs.FileMode
		ok            bool
	}{
		{"one", good, 0o600, true},
		{"read-only", good, 0o400, true},
		{"several, with blank lines and CRLF", "\r\n" + strings.TrimSpace(good) + "\r\n\n" + keyLine(), 0o600, true},
		{"no newline, no padding", strings.TrimRight(good, "=\n"), 0o600, true},
		{"URL alphabet", strings.NewReplacer("+", "-", "/", "_").Replace(good), 0o600, true},
		{"group-readable", good, 0o640, false},
		{"world-readable", good, 0o604, false},
		{"empty", "", 0o600, false},
		{"blank", "\n\n", 0o600, false},
		{"no base64", "correct horse battery staple, long enough!", 0o600, false},
		{"short", encode(counted[:16]), 0o600, false},
		{"long", good[:44] + good, 0o600, false},
		{"zeros", encode(make([]byte, 32)), 0o600, false},
		{"counted", encode(counted), 0o600, false},
		{"repeated", encode(bytes.Repeat([]byte("\x9f\x03\xd1\x77\x5a\xee\x12\xc8"), 4)), 0o600, false},
		{"words", encode([]byte("Correct horse battery staple 12.")), 0o600, false},
		{"one good, one bad", good + "c2hvcnQ=\n", 0o600, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			keys := filepath.Join(t.TempDir(), "keys")
			if err := os.WriteFile(keys, []byte(tt.content), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Chmod(keys, tt.mode); err != nil {
				t.Fatal(err)
			}
			f, err := auth.OpenFile(auth.FileConfig{Dir: filepath.Join(t.TempDir(), "store"), KeyFile: keys, Log: discard})
			if err == nil {
				f.Close()
			}
			if (err == nil) != tt.ok || err != nil && !errors.Is(err, auth.ErrKey) {
				t.Errorf("opening: %v", err)
			}
			for line := range strings.Lines(tt.content) {
				if line = strings.TrimSpace(line); err != nil && len(line) > 8 && strings.Contains(err.Error(), line[:8]) {
					t.Errorf("the error holds the key: %v", err)
				}
			}
		})
	}
}

// The key is made with the store, and only with it.
func TestKeyIsMadeOnce(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "some", "where", "store")
	c := auth.FileConfig{Dir: dir, Log: discard}
	var wg sync.WaitGroup
	for i := range 10 {
		wg.Go(func() {
			f := openFile(t, c)
			if _, err := f.Put(t.Context(), "b", fmt.Sprint(i), []byte("v"), 0, time.Time{}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	f := openFile(t, c)
	for i := range 10 {
		if _, err := f.Get(t.Context(), "b", fmt.Sprint(i)); err != nil {
			t.Errorf("record %d: %v", i, err)
		}
	}
	if err := os.Remove(filepath.Join(dir, "key")); err != nil {
		t.Fatal(err)
	}
	if _, err := auth.OpenFile(c); !errors.Is(err, auth.ErrKey) {
		t.Errorf("a store whose key is gone: %v, want %v", err, auth.ErrKey)
	}
}

// A keychain, too, is asked for a new key once, by one process at a time, also if
// the directory is there already.
func TestKeysAreAskedForAlone(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	var asking, made atomic.Int32
	key := keyLine()
	ask := func(fresh bool) (secret.Text, error) {
		if asking.Add(1) != 1 {
			t.Error("asked by two at once")
		}
		defer asking.Add(-1)
		if fresh {
			made.Add(1)
		}
		runtime.Gosched()
		return secret.New(key), nil
	}
	var wg sync.WaitGroup
	for range 10 {
		wg.Go(func() { openFile(t, auth.FileConfig{Dir: dir, AskKeys: ask, Log: discard}) })
	}
	wg.Wait()
	if n := made.Load(); n != 1 {
		t.Errorf("a key was to be made %d times", n)
	}
	none := func(bool) (secret.Text, error) { return secret.Text{}, auth.ErrKey }
	if _, err := auth.OpenFile(auth.FileConfig{Dir: dir, AskKeys: none, Log: discard}); !errors.Is(err, auth.ErrKey) {
		t.Errorf("no key: %v", err)
	}
}

func TestDirectoryOpenToOthers(t *testing.T) {
	dir := t.TempDir() // 0755
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := auth.OpenFile(auth.FileConfig{Dir: dir, Log: discard}); err == nil || !strings.Contains(err.Error(), "chmod 700") {
		t.Errorf("opening a directory that others may enter: %v", err)
	}
}

// Where nothing can be written, what is there can be read.
func TestUnwritable(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "store")
	f := openFile(t, auth.FileConfig{Dir: dir, Log: discard})
	version, err := f.Put(t.Context(), "b", "k", []byte("v"), 0, time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	// A file where the temporary directory was stops root, too.
	tmp := filepath.Join(dir, "tmp")
	if err := errors.Join(os.Remove(tmp), os.WriteFile(tmp, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	for _, v := range []uint64{version, auth.AnyVersion} {
		if _, err := f.Put(t.Context(), "b", "k", []byte("w"), v, time.Time{}); !errors.Is(err, auth.ErrUnwritable) {
			t.Errorf("Put: %v, want %v", err, auth.ErrUnwritable)
		}
	}
	if r, err := f.Get(t.Context(), "b", "k"); err != nil || string(r.Value) != "v" || r.Version != version {
		t.Errorf("Get: %+v, %v", r, err)
	}
	if err := errors.Join(os.Remove(tmp), os.Mkdir(tmp, 0o700)); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Put(t.Context(), "b", "k", []byte("w"), version, time.Time{}); err != nil {
		t.Errorf("after it: %v", err)
	}
}

// What expired while nobody ran is removed at the next start, and so is what a
// killed process left half written.
func TestSweepAtOpen(t *testing.T) {
	clock := newClock()
	dir := filepath.Join(t.TempDir(), "store")
	c := auth.FileConfig{Dir: dir, Now: clock.Now, Log: discard}
	f := openFile(t, c)
	for i := range 20 {
		if _, err := f.Put(t.Context(), "b", fmt.Sprint(i), []byte("v"), 0, clock.Now().Add(time.Duration(i+1)*time.Minute)); err != nil {
			t.Fatal(err)
		}
	}
	old, young := filepath.Join(dir, "tmp", "1"), filepath.Join(dir, "tmp", "2")
	keyFile(t, old)
	keyFile(t, young)
	if err := os.Chtimes(old, time.Time{}, time.Now().Add(-2*time.Hour)); err != nil {
		t.Fatal(err)
	}
	clock.Advance(15 * time.Minute)
	openFile(t, c)
	if n := len(records(t, dir)); n != 5 {
		t.Errorf("%d records, want 5", n)
	}
	if _, err := os.Stat(old); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the old half: %v", err)
	}
	if _, err := os.Stat(young); err != nil {
		t.Errorf("somebody may be writing the young half: %v", err)
	}
}

// Those who add records pay for those that have expired: a process that runs
// for long does not fill the disk with them.
func TestSweepWhileRunning(t *testing.T) {
	clock := newClock()
	dir := filepath.Join(t.TempDir(), "store")
	f := openFile(t, auth.FileConfig{Dir: dir, Now: clock.Now, Log: discard})
	for i := range 1000 {
		if _, err := f.Put(t.Context(), "b", fmt.Sprint(i), nil, 0, clock.Now().Add(time.Minute)); err != nil {
			t.Fatal(err)
		}
		clock.Advance(10 * time.Second)
	}
	if n := len(records(t, dir)); n > 300 {
		t.Errorf("%d records, of which 6 have not expired", n)
	}
}

// A lease whose file somebody has removed is not one any more.
func TestLeaseWithoutItsFile(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "store")
	f := openFile(t, auth.FileConfig{Dir: dir, Log: discard})
	l, err := f.Lease(t.Context(), "n")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Release()
	files, err := filepath.Glob(filepath.Join(dir, "leases", "*"))
	if err != nil || len(files) != 1 {
		t.Fatalf("%d lease files, %v", len(files), err)
	}
	if err := os.Remove(files[0]); err != nil {
		t.Fatal(err)
	}
	if err := l.Check(t.Context()); !errors.Is(err, auth.ErrLeaseLost) {
		t.Errorf("Check: %v, want %v", err, auth.ErrLeaseLost)
	}
}

func BenchmarkFile(b *testing.B) {
	f, err := auth.OpenFile(auth.FileConfig{Dir: filepath.Join(b.TempDir(), "store"), Log: discard})
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	value := bytes.Repeat([]byte("x"), 2000)
	b.Run("Put", func(b *testing.B) {
		for b.Loop() {
			if _, err := f.Put(b.Context(), "b", "k", value, auth.AnyVersion, time.Time{}); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("Get", func(b *testing.B) {
		for b.Loop() {
			if _, err := f.Get(b.Context(), "b", "k"); err != nil {
				b.Fatal(err)
			}
		}
	})
}
