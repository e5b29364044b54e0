package auth_test

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"gatehouse/auth"
	"gatehouse/auth/guard"
	"gatehouse/auth/secret"
)

// The test binary starts itself as the other processes. What such a child is to
// do, and with what, it finds in these variables.
const (
	childRole    = "GATEHOUSE_TEST_CHILD"
	childDir     = "GATEHOUSE_TEST_DIR"
	childPoint   = "GATEHOUSE_TEST_POINT"   // where it dies: "name of the point#which time"
	childURL     = "GATEHOUSE_TEST_URL"     // of the provider
	childEpoch   = "GATEHOUSE_TEST_EPOCH"   // of its clock: unix nanoseconds
	childRedis   = "GATEHOUSE_TEST_REDIS"   // the URL of a Redis store, instead of the directory
	childKeys    = "GATEHOUSE_TEST_KEYS"    // of it
	childStop    = "GATEHOUSE_TEST_STOP"    // a file: it ends when that is there
	childPatient = "GATEHOUSE_TEST_PATIENT" // calls may fail meanwhile
)

var roles = map[string]func() error{
	"open":    childOpens,
	"write":   childWrites,
	"count":   childCounts,
	"rotate":  childRotates,
	"refresh": childRefreshes,
}

// child runs what this process was started for, if it was, and exits.
func child() {
	role := roles[os.Getenv(childRole)]
	if role == nil {
		return
	}
	if point, nth, ok := strings.Cut(os.Getenv(childPoint), "#"); ok {
		left, _ := strconv.Atoi(nth)
		auth.AtPoint(func(p string) {
			if p != point {
				return
			}
			if left--; left == 0 {
				self, _ := os.FindProcess(os.Getpid())
				self.Kill()
				select {} // until it has arrived
			}
		})
	}
	if err := role(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// spawn starts a child.
func spawn(t *testing.T, role string, env map[string]string) *exec.Cmd {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), exe)
	cmd.Env = append(os.Environ(), childRole+"="+role, "GORACE=atexit_sleep_ms=0")
	for name, value := range env {
		cmd.Env = append(cmd.Env, name+"="+value)
	}
	cmd.Stderr = t.Output()
	return cmd
}

// killed runs a child that is to die on the way, and returns what it wrote.
// done reports that it came to its end instead.
func killed(t *testing.T, role string, env map[string]string) (lines []string, done bool) {
	t.Helper()
	out, err := spawn(t, role, env).Output()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok && exit.ExitCode() != -1 {
		t.Fatalf("the child failed: %v", err)
	} else if !ok && err != nil {
		t.Fatal(err)
	}
	return strings.Split(strings.TrimSpace(string(out)), "\n"), err == nil
}

func childStore() (*auth.File, error) {
	return auth.OpenFile(auth.FileConfig{Dir: os.Getenv(childDir), Log: slog.New(slog.NewTextHandler(os.Stderr, nil))})
}

var writePoints = []string{
	"record locked", "temporary file made", "temporary file half written", "temporary file synced",
	"moved into place", "directory synced",
}

var removePoints = []string{"about to remove", "removed"}

func childOpens() error {
	f, err := childStore()
	if err != nil {
		return err
	}
	return f.Close()
}

// A process that dies while it makes a store leaves one that opens.
func TestKilledWhileOpening(t *testing.T) {
	for _, point := range writePoints[1:] {
		for nth := 1; ; nth++ { // the key, the canary
			dir := filepath.Join(t.TempDir(), "store")
			_, done := killed(t, "open", map[string]string{childDir: dir, childPoint: fmt.Sprintf("%s#%d", point, nth)})
			f := openFile(t, auth.FileConfig{Dir: dir, Log: discard})
			if _, err := f.Put(t.Context(), "b", "k", []byte("v"), 0, time.Time{}); err != nil {
				t.Fatalf("%s#%d: %v", point, nth, err)
			}
			r, err := openFile(t, auth.FileConfig{Dir: dir, Log: discard}).Get(t.Context(), "b", "k")
			if err != nil || string(r.Value) != "v" {
				t.Fatalf("%s#%d: %v", point, nth, err)
			}
			if done {
				if nth != 3 {
					t.Errorf("%s is passed %d times, want 2", point, nth-1)
				}
				break
			}
		}
	}
}

const killKeys = 3

// childWrites says what it tries and what it has done, record by record.
func childWrites() error {
	f, err := childStore()
	if err != nil {
		return err
	}
	ctx := context.Background()
	for i := 1; i <= 30; i++ {
		key := fmt.Sprint(i % killKeys)
		r, err := f.Get(ctx, "b", key)
		if err != nil && !errors.Is(err, auth.ErrNotFound) {
			return err
		}
		if i%5 == 0 {
			fmt.Println("try", key, 0)
			if _, err := f.Take(ctx, "b", key); err != nil {
				return err
			}
			fmt.Println("did", key, 0)
			continue
		}
		fmt.Println("try", key, i)
		if _, err := f.Put(ctx, "b", key, []byte(strconv.Itoa(i)), r.Version, time.Time{}); err != nil {
			return err
		}
		fmt.Println("did", key, i)
	}
	return nil
}

// Whenever a process dies, each record is as it was before the write or after
// it, and what it was told to be written is. All times that a point is reached,
// so often that it makes a thousand runs, with GATEHOUSE_KILLS=7, as .ci/run has it.
func TestKilledWhileWriting(t *testing.T) {
	rounds, full := 1, false
	if n, err := strconv.Atoi(os.Getenv("GATEHOUSE_KILLS")); err == nil {
		rounds, full = n, true
	}
	for _, point := range slices.Concat(writePoints, removePoints) {
		times := []int{1, 3, 4, 6}
		if full {
			last := 24 // writes of a child
			if slices.Contains(removePoints, point) {
				last = 6
			}
			times = nil
			for i := range rounds * last {
				times = append(times, 1+i%last)
			}
		}
		for _, nth := range times {
			t.Run(fmt.Sprintf("%s#%d", point, nth), func(t *testing.T) {
				dir := filepath.Join(t.TempDir(), "store")
				openFile(t, auth.FileConfig{Dir: dir, Log: discard})
				lines, done := killed(t, "write", map[string]string{childDir: dir, childPoint: fmt.Sprintf("%s#%d", point, nth)})
				if done {
					t.Fatal("the point was not reached")
				}
				can := map[string][]string{} // what each record may be
				for _, line := range lines {
					words := strings.Fields(line)
					if len(words) != 3 {
						t.Fatalf("line %q", line)
					}
					if words[0] == "did" {
						can[words[1]] = nil
					}
					can[words[1]] = append(can[words[1]], words[2])
				}
				log := &lockedBuffer{}
				f := openFile(t, auth.FileConfig{Dir: dir, Log: slog.New(slog.NewTextHandler(log, nil))})
				for i := range killKeys {
					key := fmt.Sprint(i)
					r, err := f.Get(t.Context(), "b", key)
					got := string(r.Value)
					if errors.Is(err, auth.ErrNotFound) {
						got = "0"
					} else if err != nil {
						t.Fatal(err)
					}
					may := can[key]
					if len(may) < 2 { // with the first try, there was nothing before
						may = append(may, "0")
					}
					if !slices.Contains(may, got) {
						t.Errorf("record %s is %s, want one of %v", key, got, may)
					}
					if _, err := f.Put(t.Context(), "b", key, []byte("after"), r.Version, time.Time{}); err != nil {
						t.Errorf("writing on: %v", err)
					}
				}
				if bad, _ := filepath.Glob(dir + "/records/*/*.bad"); len(bad) > 0 || log.String() != "" {
					t.Errorf("set aside %d, log: %s", len(bad), log)
				}
			})
		}
	}
}

const counts = 20

func childCounts() error {
	f, err := childStore()
	if err != nil {
		return err
	}
	ctx := context.Background()
	for i := range counts {
		for {
			r, err := f.Get(ctx, "b", "counter")
			n := uint64(0)
			if err == nil {
				n = binary.BigEndian.Uint64(r.Value)
			} else if !errors.Is(err, auth.ErrNotFound) {
				return err
			}
			_, err = f.Put(ctx, "b", "counter", binary.BigEndian.AppendUint64(nil, n+1), r.Version, time.Time{})
			if err == nil {
				break
			} else if !errors.Is(err, auth.ErrConflict) {
				return err
			}
		}
		if _, err := f.Take(ctx, "b", fmt.Sprint("prize ", i)); err == nil {
			fmt.Println("prize", i)
		} else if !errors.Is(err, auth.ErrNotFound) {
			return err
		}
	}
	return nil
}

// Eight processes that begin on an empty directory make one key, count
// together, and each prize has one winner.
func TestProcessesShareAStore(t *testing.T) {
	const processes = 8
	dir := filepath.Join(t.TempDir(), "store")
	outs := make([][]byte, processes)
	var wg sync.WaitGroup
	for i := range processes {
		cmd := spawn(t, "count", map[string]string{childDir: dir})
		if i == 0 {
			// The first one alone would also pass without any lock.
			f := openFile(t, auth.FileConfig{Dir: dir, Log: discard})
			for i := range counts {
				if _, err := f.Put(t.Context(), "b", fmt.Sprint("prize ", i), nil, 0, time.Time{}); err != nil {
					t.Fatal(err)
				}
			}
		}
		wg.Go(func() {
			var err error
			if outs[i], err = cmd.Output(); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	f := openFile(t, auth.FileConfig{Dir: dir, Log: discard})
	r, err := f.Get(t.Context(), "b", "counter")
	if err != nil || binary.BigEndian.Uint64(r.Value) != processes*counts {
		t.Errorf("counted %x, %v, want %d", r.Value, err, processes*counts)
	}
	won := map[string]int{}
	for _, out := range outs {
		for line := range strings.Lines(string(out)) {
			won[line]++
		}
	}
	for line, n := range won {
		if n != 1 {
			t.Errorf("%s: %d winners", line, n)
		}
	}
	if len(won) != counts {
		t.Errorf("%d of %d prizes were won", len(won), counts)
	}
}

// Many processes on an empty directory at once make one key.
func TestProcessesMakeOneKey(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "store")
	var wg sync.WaitGroup
	for range 6 {
		cmd := spawn(t, "open", map[string]string{childDir: dir})
		wg.Go(func() {
			if err := cmd.Run(); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	openFile(t, auth.FileConfig{Dir: dir, Log: discard})
}

// The children of a rotation share a clock that is that much faster.
const haste = 4 * 3600

// childBroker is a broker on the provider and the store of a test, with as
// many remotes. Its clock begins at the epoch, and runs at a pace.
func childBroker(remotes int, pace time.Duration) (b *auth.Broker, end func(), err error) {
	epoch, err := strconv.ParseInt(os.Getenv(childEpoch), 10, 64)
	if err != nil {
		return nil, nil, err
	}
	begun := time.Unix(0, epoch)
	base := newClock().Now().Add(2 * time.Hour)
	now := func() time.Time { return base.Add(time.Since(begun) * pace) }
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	var f auth.Store
	if url := os.Getenv(childRedis); url != "" {
		f, err = auth.OpenRedis(context.Background(), auth.RedisConfig{
			URL: secret.New(url), Prefix: "gatehouse:", Keys: secret.New(os.Getenv(childKeys)), Log: log, Now: now,
		})
	} else {
		f, err = auth.OpenFile(auth.FileConfig{Dir: os.Getenv(childDir), Log: log, Now: now})
	}
	if err != nil {
		return nil, nil, err
	}
	clients, err := guard.New(guard.Config{})
	if err != nil {
		return nil, nil, err
	}
	c := auth.Config{PublicURL: "http://127.0.0.1:8080", CallbackPath: "/oauth/callback", Store: f, Now: now, Log: log}
	for i := range remotes {
		name := fmt.Sprintf("r%d", i)
		c.Remotes = append(c.Remotes, auth.Remote{
			Name: name, URL: os.Getenv(childURL) + "/mcp/" + name, HTTP: clients.Client(guard.Policy{Loopback: true}),
		})
	}
	b, err = auth.New(c)
	if err != nil {
		return nil, nil, err
	}
	return b, func() {
		b.Close()
		f.Close()
		clients.Close()
	}, nil
}

// rotated are the grants that all children use, and rotations how often at
// least these are refreshed; 0: as often as it goes in a few seconds. The full
// size takes minutes: GATEHOUSE_ROTATIONS=10000, as .ci/run has it.
var rotated, rotations = func() (int, int) {
	if n, err := strconv.Atoi(os.Getenv("GATEHOUSE_ROTATIONS")); err == nil {
		return 200, n
	}
	return 20, 0
}()

func childRotates() error {
	b, end, err := childBroker(rotated, haste)
	if err != nil {
		return err
	}
	defer end()
	begun := time.Now()
	stopped := func() bool {
		if file := os.Getenv(childStop); file != "" {
			_, err := os.Stat(file)
			return err == nil
		}
		return time.Since(begun) > 3*time.Second
	}
	errs := make([]error, 4)
	var wg sync.WaitGroup
	for worker := range errs {
		wg.Go(func() {
			for i := worker; !stopped(); i++ {
				remote := fmt.Sprintf("r%d", i%rotated)
				// None without an error: it lived for a quarter of a second, and the machine
				// was busy for longer. The grant must be good all the same, which is
				// looked at in the end.
				if _, err := b.Authorizer(auth.Local, remote).Token(context.Background()); err != nil {
					if os.Getenv(childPatient) != "" {
						continue // the store is away for a moment; what counts is the end
					}
					errs[worker] = fmt.Errorf("%s: %w", remote, err)
					return
				}
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// Eight processes use the same grants, whose tokens expire all the time, at an
// authorization server that takes each refresh token once.
func TestProcessesRefreshOnce(t *testing.T) {
	t.Run("file", func(t *testing.T) {
		w := newFileWorld(t, rotated)
		w.refreshOnce(map[string]string{childDir: w.dir}, func() {})
	})
	t.Run("redis", func(t *testing.T) {
		w, _, env := newRedisWorld(t)
		w.refreshOnce(env, func() {})
	})
	// Whoever waits for a paused server goes on where it was.
	t.Run("redis paused", func(t *testing.T) {
		w, server, env := newRedisWorld(t)
		env[childPatient] = "1"
		w.refreshOnce(env, func() {
			for range 4 {
				<-time.After(300 * time.Millisecond)
				server.Pause(300 * time.Millisecond)
			}
		})
	})
	t.Run("redis restarted", func(t *testing.T) {
		w, server, env := newRedisWorld(t)
		env[childPatient] = "1"
		w.refreshOnce(env, func() {
			for range 4 {
				<-time.After(400 * time.Millisecond)
				server.Restart()
			}
		})
	})
}

func newRedisWorld(t *testing.T) (*world, auth.SharedRedis, map[string]string) {
	w := &world{t: t, p: newProvider(t), clock: newClock(), log: &lockedBuffer{}}
	server := auth.RedisServer(t)
	w.store = server.Open(w.clock.Now)
	w.Broker = w.broker(rotated, nil)
	return w, server, map[string]string{childRedis: server.URL, childKeys: server.Keys}
}

// refreshOnce runs the processes, and meanwhile in the midst of them.
func (w *world) refreshOnce(env map[string]string, meanwhile func()) {
	const processes = 8
	t := w.t
	w.p.set(func() { w.p.rotate = true })
	for i := range rotated {
		w.signIn(auth.Local, fmt.Sprintf("r%d", i))
	}
	env[childURL], env[childEpoch] = w.p.url(""), strconv.FormatInt(time.Now().UnixNano(), 10)
	if rotations > 0 {
		env[childStop] = filepath.Join(t.TempDir(), "stop")
	}
	var wg sync.WaitGroup
	for range processes {
		cmd := spawn(t, "rotate", env)
		wg.Go(func() {
			if err := cmd.Run(); err != nil {
				t.Error(err)
			}
		})
	}
	meanwhile()
	if file := env[childStop]; file != "" {
		for w.p.count(&w.p.refreshes) < rotations && !t.Failed() {
			<-time.After(100 * time.Millisecond)
		}
		if err := os.WriteFile(file, nil, 0o600); err != nil {
			t.Error(err)
		}
	}
	wg.Wait()
	w.p.mu.Lock()
	redeemed := slices.Sorted(maps.Values(w.p.redeemed))
	w.p.mu.Unlock()
	if len(redeemed) < rotated || redeemed[len(redeemed)-1] != 1 {
		t.Errorf("%d refresh tokens were redeemed, one of them %v times", len(redeemed), redeemed[len(redeemed)-1:])
	}
	t.Logf("%d rotations", len(redeemed))
	w.clock.Advance(1000 * 24 * time.Hour) // beyond the children's
	other := w.broker(rotated, nil)
	for i := range rotated {
		if token, err := other.Authorizer(auth.Local, fmt.Sprintf("r%d", i)).Token(t.Context()); err != nil || token == nil {
			t.Errorf("grant %d: %v, %v", i, token != nil, err)
		}
	}
}

// fileWorld is a world over the file store, whose directory others can open.
type fileWorld struct {
	*world
	dir string
}

func newFileWorld(t *testing.T, remotes int) *fileWorld {
	w := &world{t: t, p: newProvider(t), clock: newClock(), log: &lockedBuffer{}}
	dir := filepath.Join(t.TempDir(), "store")
	w.store = openFile(t, auth.FileConfig{Dir: dir, Now: w.clock.Now, Log: discard})
	w.Broker = w.broker(remotes, nil)
	return &fileWorld{w, dir}
}

// elsewhere is the same gateway in another process, as far as it can tell.
func (w *fileWorld) elsewhere() *fileWorld {
	w.t.Helper()
	other := *w.world
	other.store = openFile(w.t, auth.FileConfig{Dir: w.dir, Now: w.clock.Now, Log: discard})
	other.Broker = other.broker(1, nil)
	return &fileWorld{&other, w.dir}
}

func childRefreshes() error {
	b, _, err := childBroker(1, 1)
	if err != nil {
		return err
	}
	fmt.Println("begun")
	token, err := b.Authorizer(auth.Local, "r0").Token(context.Background())
	if err == nil && token != nil {
		fmt.Println("token", token.AccessToken)
	}
	return err
}

// A process dies somewhere in a refresh. An authorization server that lets a
// refresh token be tried again costs no sign-in; one that does not costs one
// where the answer was lost, and then there is a clean link.
func TestKilledWhileRefreshing(t *testing.T) {
	type death struct {
		name  string
		point string                                           // of the store's writes: the note is the first, the result the second
		token func(w *fileWorld, kill func()) http.HandlerFunc // or at the token endpoint
		lost  bool                                             // the token was redeemed and the answer is nowhere
	}
	deaths := []death{
		{name: "the request arrives", token: func(_ *fileWorld, kill func()) http.HandlerFunc {
			return func(http.ResponseWriter, *http.Request) { kill() }
		}},
		{name: "the answer leaves", lost: true, token: func(w *fileWorld, kill func()) http.HandlerFunc {
			return func(_ http.ResponseWriter, r *http.Request) {
				w.p.answerToken(httptest.NewRecorder(), r.PostForm)
				kill()
			}
		}},
	}
	for _, point := range writePoints {
		landed := point == "moved into place" || point == "directory synced"
		deaths = append(deaths,
			death{name: "the note: " + point, point: point + "#1"},
			death{name: "the result: " + point, point: point + "#2", lost: !landed})
	}
	for _, d := range deaths {
		for _, forgiving := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, forgiving %v", d.name, forgiving), func(t *testing.T) {
				w := newFileWorld(t, 1)
				w.p.set(func() { w.p.rotate, w.p.forgiving = true, forgiving })
				w.signIn(auth.Local, "r0")
				cmd := spawn(t, "refresh", map[string]string{
					childDir: w.dir, childURL: w.p.url(""), childEpoch: strconv.FormatInt(time.Now().UnixNano(), 10),
					childPoint: d.point,
				})
				out, err := cmd.StdoutPipe()
				if err != nil {
					t.Fatal(err)
				}
				started := make(chan struct{})
				if d.token != nil {
					handle := d.token(w, func() {
						<-started
						cmd.Process.Kill()
					})
					w.p.set(func() {
						w.p.token = func(rw http.ResponseWriter, r *http.Request) bool { handle(rw, r); panic(http.ErrAbortHandler) }
					})
				}
				if err := cmd.Start(); err != nil {
					t.Fatal(err)
				}
				close(started)
				lines := 0
				for scanner := bufio.NewScanner(out); scanner.Scan(); lines++ {
				}
				if err := cmd.Wait(); err == nil || cmd.ProcessState.ExitCode() != -1 || lines != 1 {
					t.Fatalf("the child did not die in its refresh: %v, %d lines", err, lines)
				}
				w.p.set(func() { w.p.token = nil })

				w.clock.Advance(3 * time.Hour) // expired, here and by the child's clock
				got := w.token(auth.Local, "r0")
				switch {
				case d.lost && !forgiving:
					if got != "" {
						t.Fatalf("token %q, although the refresh token was used up", got)
					}
					if required := w.link(auth.Local, "r0"); required.Reason != auth.ReasonExpired {
						t.Errorf("reason %q", required.Reason)
					}
					w.signIn(auth.Local, "r0")
					if w.token(auth.Local, "r0") == "" {
						t.Error("no token after the sign-in")
					}
				case got == "":
					t.Error("the grant is lost")
				}
				if bad, _ := filepath.Glob(w.dir + "/records/*/*.bad"); len(bad) > 0 {
					t.Errorf("%d records are damaged", len(bad))
				}
			})
		}
	}
}
