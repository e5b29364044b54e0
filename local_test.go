package main

import (
	"bufio"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/modelcontextprotocol/go-sdk/mcp"

	"gatehouse/auth/authtest"
	"gatehouse/auth/secret"
	"gatehouse/gateway"
)

// onPort is a config whose pages are on a port of the test's own.
func onPort(t *testing.T, remotes ...string) string {
	t.Helper()
	return config(fmt.Sprintf(`{"oauth": {"callbackPort": %s}}`, authtest.FreePort(t)), remotes...)
}

func stdioClient(t *testing.T, p *process) *authtest.Client {
	t.Helper()
	return authtest.Connect(t, authtest.ClientConfig{Transport: &mcp.IOTransport{Reader: p.stdout, Writer: p.stdin}})
}

// TestSignInOutlivesTheProcess: a restart costs nobody a sign-in, and nothing
// on the disk can be read by others or without the key.
func TestSignInOutlivesTheProcess(t *testing.T) {
	t.Parallel()
	w := &world{as: authtest.NewAS(t)}
	w.remote = authtest.NewRemote(t, authtest.RemoteConfig{AS: w.as})
	cfg, state := onPort(t, "notes", w.remote.URL), t.TempDir()
	w.gw = startStdioIn(t, state, cfg)
	w.guardSecrets(t)
	client := stdioClient(t, w.gw)
	signIn(t, link(t, client.Call("notes_echo", nil), "notes"))
	echo(t, client, "notes_echo", "before")
	w.gw.end()

	w.as.ExpireAll() // so that the refresh token must have been kept, too
	again := startStdioIn(t, state, cfg)
	client = stdioClient(t, again)
	echo(t, client, "notes_echo", "after")
	if n := w.as.Count(authtest.EndpointAuthorize); n != 1 {
		t.Errorf("%d sign-ins, want 1", n)
	}
	again.end()

	err := filepath.WalkDir(state, func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		if path != state && info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s has mode %v", path, info.Mode())
		}
		if d.IsDir() {
			return nil
		}
		data, err := os.ReadFile(path)
		for _, secret := range w.as.Secrets() {
			if strings.Contains(string(data), secret) {
				t.Errorf("%s holds a secret in the clear", path)
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestRestartDuringASignIn: the link of a process that has gone works in the next.
func TestRestartDuringASignIn(t *testing.T) {
	t.Parallel()
	as := authtest.NewAS(t)
	remote := authtest.NewRemote(t, authtest.RemoteConfig{AS: as})
	cfg, state := onPort(t, "notes", remote.URL), t.TempDir()
	first := startStdioIn(t, state, cfg)
	url := link(t, stdioClient(t, first).Call("notes_echo", nil), "notes")
	browser := authtest.NewBrowser(t)
	page := browser.OpenUntil(url, first.url+"/oauth/callback")
	first.end()

	second := startStdioIn(t, state, cfg)
	client := stdioClient(t, second)
	if done := browser.Open(page.Next); !strings.Contains(done.Body, "notes is connected, 3 tools") {
		t.Fatalf("%d %s\n%s", done.Status, done.URL, done.Body)
	}
	echo(t, client, "notes_echo", "finished after a restart")
}

// TestTwoWindows: two stdio gateways share sign-ins. The pages of both are where
// the first one has the port; when it ends, the second takes it over.
func TestTwoWindows(t *testing.T) {
	t.Parallel()
	as := authtest.NewAS(t)
	notes := authtest.NewRemote(t, authtest.RemoteConfig{AS: as})
	mail := authtest.NewRemote(t, authtest.RemoteConfig{AS: as})
	cfg, state := onPort(t, "notes", notes.URL, "mail", mail.URL), t.TempDir()
	first := startStdioIn(t, state, cfg)
	second := startStdioIn(t, state, cfg)
	if first.url != second.url {
		t.Fatalf("the pages are at %s and at %s", first.url, second.url)
	}
	one, two := stdioClient(t, first), stdioClient(t, second)

	// Asked for in the second window, finished by the first one's pages: the
	// second is told, and both can call.
	before := two.Changed()
	signIn(t, link(t, two.Call("notes_echo", nil), "notes"))
	if err := two.WaitChanged(within(t), before); err != nil {
		t.Errorf("the window that asked was not told: %v", err)
	}
	echo(t, two, "notes_echo", "two")
	echo(t, one, "notes_echo", "one")

	url := link(t, two.Call("mail_echo", nil), "mail")
	first.end()
	browser := authtest.NewBrowser(t)
	for page := browser.Get(url); page.Status == 0; page = browser.Get(url) {
		if within(t).Err() != nil {
			t.Fatal("nobody took the port over")
		}
	}
	signIn(t, url)
	echo(t, two, "mail_echo", "mine now")
}

// TestPagesMoved: a link of a process whose pages were elsewhere is not given
// out again, since its callback would arrive where nobody listens.
func TestPagesMoved(t *testing.T) {
	t.Parallel()
	as := authtest.NewAS(t)
	remote := authtest.NewRemote(t, authtest.RemoteConfig{AS: as})
	state := t.TempDir()
	first := startStdioIn(t, state, onPort(t, "notes", remote.URL))
	old := link(t, stdioClient(t, first).Call("notes_echo", nil), "notes")
	first.end()

	second := startStdioIn(t, state, onPort(t, "notes", remote.URL))
	client := stdioClient(t, second)
	url := link(t, client.Call("notes_echo", nil), "notes")
	if path.Base(url) == path.Base(old) || !strings.HasPrefix(url, second.url) {
		t.Errorf("the links are %s and %s", old, url)
	}
	signIn(t, url)
	echo(t, client, "notes_echo", "at the new place")
}

// commandIn is a command on the sign-ins that a state directory holds.
func commandIn(state, file string, args ...string) *exec.Cmd {
	cmd := exec.Command("gatehouse", append([]string{args[0], "--config", file}, args[1:]...)...)
	cmd.Env = append(os.Environ(), "XDG_STATE_HOME="+state)
	return cmd
}

func outputOf(t *testing.T, cmd *exec.Cmd) string {
	t.Helper()
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("%v: %v", cmd.Args[1:], err)
	}
	return string(out)
}

// loginBy runs `gatehouse login notes` and does what it says.
func loginBy(t *testing.T, login *exec.Cmd) {
	t.Helper()
	stdout, err := login.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := login.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(stdout)
	lines.Scan()
	start := strings.Index(lines.Text(), "http://")
	if start < 0 {
		t.Fatalf("login said %q", lines.Text())
	}
	signIn(t, strings.Fields(lines.Text()[start:])[0])
	lines.Scan()
	if got := lines.Text(); got != "Signed in to notes." {
		t.Errorf("login said %q", got)
	}
	if err := login.Wait(); err != nil {
		t.Errorf("login: %v", err)
	}
}

// TestCommandsBesideStdio: what the commands do to the sign-ins holds for the
// gateway that runs meanwhile.
func TestCommandsBesideStdio(t *testing.T) {
	t.Parallel()
	as := authtest.NewAS(t)
	remote := authtest.NewRemote(t, authtest.RemoteConfig{AS: as})
	cfg, state := onPort(t, "notes", remote.URL), t.TempDir()
	file := writeConfig(t, cfg)
	client := stdioClient(t, startStdioIn(t, state, cfg))
	link(t, client.Call("notes_echo", nil), "notes")
	loginBy(t, commandIn(state, file, "login", "notes"))
	echo(t, client, "notes_echo", "signed in by the command")
	if out := outputOf(t, commandIn(state, file, "status")); !strings.Contains(out, "signed in") {
		t.Errorf("status: %s", out)
	}
	if out := outputOf(t, commandIn(state, file, "logout", "notes")); !strings.Contains(out, "revoked") {
		t.Errorf("logout: %s", out)
	}
	for begun := time.Now(); asked(client.Call("notes_echo", map[string]any{"text": "x"})).Status == ""; {
		if time.Since(begun) > 10*time.Second {
			t.Fatal("the logout is not seen")
		}
	}
}

// TestCommands: status, login and logout on sign-ins that no gateway uses.
func TestCommands(t *testing.T) {
	t.Parallel()
	as := authtest.NewAS(t)
	remote := authtest.NewRemote(t, authtest.RemoteConfig{AS: as})
	state, file := t.TempDir(), writeConfig(t, onPort(t, "notes", remote.URL))
	command := func(args ...string) *exec.Cmd { return commandIn(state, file, args...) }
	output := func(args ...string) string { t.Helper(); return outputOf(t, command(args...)) }
	if out := output("status"); !strings.Contains(out, "notes: sign-in needed") || strings.Contains(out, "/connect/") {
		t.Errorf("status: %s", out)
	}

	loginBy(t, command("login", "notes"))
	if out := output("status"); !regexp.MustCompile(`notes: connected, 3 tools, server authtest \S+, protocol 20\S+; signed in`).MatchString(out) {
		t.Errorf("status: %s", out)
	}
	if out := output("login", "notes"); !strings.Contains(out, "already signed in") {
		t.Errorf("login: %s", out)
	}
	if out := output("logout", "notes"); !strings.Contains(out, "revoked") {
		t.Errorf("logout: %s", out)
	}
	if access, refresh := as.Live(); access != 0 || refresh != 0 {
		t.Errorf("%d access and %d refresh tokens are live after the logout", access, refresh)
	}
}

// TestStatusLeavesThePort: a gateway that starts while a command waits for a slow
// remote has the port for its pages.
func TestStatusLeavesThePort(t *testing.T) {
	t.Parallel()
	as := authtest.NewAS(t)
	remote := authtest.NewRemote(t, authtest.RemoteConfig{AS: as})
	arrived, answer := make(chan struct{}), make(chan struct{})
	release := sync.OnceFunc(func() { close(answer) })
	defer release()
	var once sync.Once
	remote.Set(func(k *authtest.RemoteKnobs) {
		k.MCP = func(w http.ResponseWriter, r *http.Request, next http.HandlerFunc) {
			once.Do(func() { close(arrived) })
			<-answer
			next(w, r)
		}
	})
	cfg, state := onPort(t, "notes", remote.URL), t.TempDir()
	status := exec.Command("gatehouse", "status", "--config", writeConfig(t, cfg))
	status.Env = append(os.Environ(), "XDG_STATE_HOME="+state)
	if err := status.Start(); err != nil {
		t.Fatal(err)
	}
	<-arrived
	p := startStdioIn(t, state, cfg)
	release()
	if err := status.Wait(); err != nil {
		t.Errorf("status: %v", err)
	}
	client := stdioClient(t, p)
	signIn(t, link(t, client.Call("notes_echo", nil), "notes"))
	echo(t, client, "notes_echo", "here")
}

// TestRememberedTools: what a remote listed in an earlier run stays listed when
// it wants a new sign-in, and when it is down; signing out forgets it.
func TestRememberedTools(t *testing.T) {
	t.Parallel()
	w := &world{as: authtest.NewAS(t)}
	w.remote = authtest.NewRemote(t, authtest.RemoteConfig{AS: w.as})
	cfg, state := onPort(t, "notes", w.remote.URL), t.TempDir()
	w.gw = startStdioIn(t, state, cfg)
	w.guardSecrets(t)
	client := stdioClient(t, w.gw)
	signIn(t, link(t, client.Call("notes_echo", nil), "notes"))
	echo(t, client, "notes_echo", "before")
	w.gw.end()

	w.as.RevokeAll()
	again := startStdioIn(t, state, cfg)
	client = stdioClient(t, again)
	if !slices.Contains(client.Tools(), "notes_add") {
		t.Error("not listed before the sign-in")
	}
	link(t, client.Call("notes_add", nil), "notes")
	again.end()

	w.remote.Down()
	again = startStdioIn(t, state, cfg)
	client = stdioClient(t, again)
	if !slices.Contains(client.Tools(), "notes_add") {
		t.Error("not listed while the remote is down")
	}
	again.end()

	w.remote.Up()
	again = startStdioIn(t, state, cfg)
	client = stdioClient(t, again)
	client.Call("gateway_logout", map[string]any{"remote": "notes"})
	if slices.Contains(client.Tools(), "notes_add") {
		t.Error("listed after the sign-out")
	}
	again.end()
	again = startStdioIn(t, state, cfg)
	if slices.Contains(stdioClient(t, again).Tools(), "notes_add") {
		t.Error("remembered after the sign-out")
	}
	again.end()
}

// TestStdioGoesOn: a line that is no message costs an answer, not the session.
func TestStdioGoesOn(t *testing.T) {
	t.Parallel()
	remote := authtest.NewRemote(t, authtest.RemoteConfig{})
	p := startStdio(t, config("", "notes", remote.URL))
	out := bufio.NewScanner(p.stdout)
	exchange := func(line string) string {
		t.Helper()
		fmt.Fprintln(p.stdin, line)
		if !out.Scan() {
			t.Fatalf("it ended: %v", out.Err())
		}
		return out.Text()
	}
	if got := exchange("Content-Length: 52"); !strings.Contains(got, "-32700") || !strings.Contains(got, `"id":null`) {
		t.Errorf("no JSON: %s", got)
	}
	if got := exchange(`{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-11-25","capabilities":{},"clientInfo":{"name":"raw","version":"1"}}}`); !strings.Contains(got, "gatehouse") {
		t.Errorf("initialize: %s", got)
	}
	if got := exchange(`{"jsonrpc":"2.0"`); !strings.Contains(got, "-32700") {
		t.Errorf("half a message: %s", got)
	}
	if got := exchange(`{"jsonrpc":"2.0","id":2,"method":"ping"}`); !strings.Contains(got, `"id":2`) {
		t.Errorf("ping: %s", got)
	}
}

// TestCommandSecrets: what the config gives a program in its environment is kept
// out of the log, words like "true" aside.
func TestCommandSecrets(t *testing.T) {
	c := localCommand(&gateway.Config{}, &gateway.Server{Command: "x", Env: map[string]secret.Text{"TOKEN": secret.New("0123456789"), "DEBUG": secret.New("true")}})
	if !slices.Equal(c.Secrets, []string{"0123456789"}) || !slices.Contains(c.Env, "TOKEN=0123456789") || !slices.Contains(c.Env, "DEBUG=true") {
		t.Errorf("got %q", c.Secrets)
	}
}
