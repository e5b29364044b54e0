package session

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/modelcontextprotocol/go-sdk/jsonrpc"
	"github.com/modelcontextprotocol/go-sdk/mcp"
	"golang.org/x/oauth2"

	"gatehouse/auth"
)

// program is the test binary as a local MCP server; how says in which way.
func program(t *testing.T, how string, env ...string) Remote {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return Remote{Name: "local", Command: &Command{Path: self, Env: append(env, "GATEHOUSE_TEST_PROGRAM="+how)}}
}

// runProgram is what the test binary does when it is started as a program.
func runProgram(how string) {
	server := mcp.NewServer(&mcp.Implementation{Name: "program", Version: "1"}, nil)
	refuse := func(refused string, code int64) {
		server.AddReceivingMiddleware(func(next mcp.MethodHandler) mcp.MethodHandler {
			return func(ctx context.Context, method string, req mcp.Request) (mcp.Result, error) {
				if method == refused {
					return nil, &jsonrpc.Error{Code: code, Message: "refused"}
				}
				return next(ctx, method, req)
			}
		})
	}
	in := io.ReadCloser(os.Stdin)
	switch how {
	case "modern":
		refuse("initialize", codeUnsupportedVersion)
	case "refuses":
		refuse("server/discover", -32602)
	case "late":
		refuse("initialize", codeUnsupportedVersion)
		in = firstRequest(how)
	case "ignores", "dies", "dies late":
		in = firstRequest(how)
	}
	type nothing struct{}
	say := func(s string) (*mcp.CallToolResult, any, error) {
		return &mcp.CallToolResult{Content: []mcp.Content{&mcp.TextContent{Text: s}}}, nil, nil
	}
	mcp.AddTool(server, &mcp.Tool{Name: "pid"}, func(context.Context, *mcp.CallToolRequest, nothing) (*mcp.CallToolResult, any, error) {
		return say(strconv.Itoa(os.Getpid()))
	})
	mcp.AddTool(server, &mcp.Tool{Name: "env"}, func(context.Context, *mcp.CallToolRequest, nothing) (*mcp.CallToolResult, any, error) {
		return say(strings.Join(os.Environ(), "\n"))
	})
	mcp.AddTool(server, &mcp.Tool{Name: "die"}, func(context.Context, *mcp.CallToolRequest, nothing) (*mcp.CallToolResult, any, error) {
		os.Exit(3)
		return nil, nil, nil
	})
	mcp.AddTool(server, &mcp.Tool{Name: "walk"}, func(ctx context.Context, req *mcp.CallToolRequest, _ nothing) (*mcp.CallToolResult, any, error) {
		for i := range 3 {
			err := req.Session.NotifyProgress(ctx, &mcp.ProgressNotificationParams{ProgressToken: req.Params.GetProgressToken(), Progress: float64(i + 1)})
			if err != nil {
				return nil, nil, err
			}
		}
		return say("there")
	})
	mcp.AddTool(server, &mcp.Tool{Name: "ask"}, func(ctx context.Context, req *mcp.CallToolRequest, _ nothing) (*mcp.CallToolResult, any, error) {
		answer, err := req.Session.Elicit(ctx, &mcp.ElicitParams{Message: "well?"})
		if err != nil {
			return nil, nil, err
		}
		return say(fmt.Sprint(answer.Action, answer.Content["x"]))
	})
	switch how {
	case "leaves":
		child := exec.Command("sleep", "1000") // with no output of ours
		child.Start()
		mcp.AddTool(server, &mcp.Tool{Name: "child"}, func(context.Context, *mcp.CallToolRequest, nothing) (*mcp.CallToolResult, any, error) {
			return say(strconv.Itoa(child.Process.Pid))
		})
	case "noisy":
		for i := range maxStderrRate + 100 {
			if i == 30 {
				fmt.Fprintf(os.Stderr, "my token is %s\n%s%s\n", os.Getenv("TOKEN"), strings.Repeat("y", maxStderrLine-len(os.Getenv("TOKEN"))/2), os.Getenv("TOKEN"))
			}
			fmt.Fprintf(os.Stderr, "line %d \x1b[31m\x00 %s\n", i, strings.Repeat("x", 3*maxStderrLine))
		}
		fmt.Println("Welcome!")
		fmt.Println(`{"not":"a message"}`)
	case "stubborn":
		signal.Ignore(syscall.SIGTERM)
		exec.Command("sleep", "1000").Start() // would keep the pipes open
	case "escape":
		// It is in no group of ours, and keeps the pipes open.
		child := exec.Command("sleep", "30")
		child.Stdout, child.Stderr, child.SysProcAttr = os.Stdout, os.Stderr, &syscall.SysProcAttr{Setsid: true}
		child.Start()
	case "silent":
		io.Copy(io.Discard, os.Stdin)
		return
	case "flood":
		line := strings.Repeat("x", 100)
		for {
			if _, err := fmt.Println(line); err != nil {
				return
			}
		}
	case "endless":
		out := bufio.NewWriterSize(os.Stdout, 1<<20)
		for {
			if _, err := out.WriteString(strings.Repeat("x", 1<<20)); err != nil {
				return
			}
		}
	case "crash":
		os.Exit(4)
	}
	_ = server.Run(context.Background(), &mcp.IOTransport{Reader: in, Writer: os.Stdout})
	if how == "stubborn" {
		select {}
	}
}

// firstRequest is stdin with what a program does about server/discover: it
// ignores it, or dies of it, or does not even read it before the next request.
func firstRequest(how string) io.ReadCloser {
	out, in := io.Pipe()
	go func() {
		lines := bufio.NewReader(os.Stdin)
		for {
			line, err := lines.ReadString('\n')
			if err != nil {
				in.CloseWithError(err)
				return
			}
			if strings.Contains(line, `"server/discover"`) {
				if strings.HasSuffix(how, "late") {
					lines.Peek(1)
				}
				switch how {
				case "ignores":
					continue
				case "dies", "dies late":
					os.Exit(6)
				}
			}
			io.WriteString(in, line)
		}
	}()
	return out
}

func callText(t *testing.T, s *Session, tool string, from *Caller) string {
	t.Helper()
	result, err := s.Call(t.Context(), "local", "tools/call", json.RawMessage(`{"name":"`+tool+`","arguments":{},"_meta":{"progressToken":"p"}}`), from)
	if err != nil {
		t.Fatalf("%s: %v", tool, err)
	}
	var got struct{ Content []struct{ Text string } }
	if err := json.Unmarshal(result, &got); err != nil || len(got.Content) != 1 {
		t.Fatalf("%s: got %s", tool, result)
	}
	return got.Content[0].Text
}

// running reports whether a process is there.
func running(pid string) bool {
	n, err := strconv.Atoi(pid)
	return err == nil && syscall.Kill(n, 0) == nil
}

// TestProgram: a local command is a remote like others: lists, calls, progress
// in order, and what it asks; it gets the environment that it was given and
// nothing else, and ends with the session.
func TestProgram(t *testing.T) {
	t.Setenv("GATEHOUSE_SECRET", canary)
	r := program(t, "noisy", "MINE=yes", "TOKEN="+canary)
	r.Command.Secrets = []string{canary}
	p, written := newPool(t, r)
	s, err := p.OpenFor(auth.Local, json.RawMessage(`{"elicitation":{}}`))
	if err != nil {
		t.Fatal(err)
	}
	catalogs := settled(t, s)
	if len(catalogs[0].Tools) != 5 {
		t.Fatalf("got %+v, %v", catalogs, s.Status("local"))
	}
	if got := callText(t, s, "env", nil); !strings.Contains(got, "MINE=yes") || strings.Contains(got, "GATEHOUSE_SECRET") {
		t.Errorf("its environment: %s", got)
	}
	var heard []string
	from := &Caller{
		Capabilities: json.RawMessage(`{"elicitation":{}}`),
		Notify:       func(_ string, params json.RawMessage) { heard = append(heard, string(params)) },
		Ask: func(_ context.Context, method string, _ json.RawMessage) (json.RawMessage, error) {
			return json.RawMessage(`{"action":"accept","content":{"x":"` + method + `"}}`), nil
		},
	}
	callText(t, s, "walk", from)
	want := []string{`{"progressToken":"p","progress":1}`, `{"progressToken":"p","progress":2}`, `{"progressToken":"p","progress":3}`}
	if !slices.Equal(heard, want) {
		t.Errorf("heard %q", heard)
	}
	if got := callText(t, s, "ask", from); got != "acceptelicitation/create" {
		t.Errorf("got %q", got)
	}
	pid := callText(t, s, "pid", nil)
	if other := callText(t, s, "pid", from); other != pid {
		t.Errorf("two processes for one principal: %s, %s", pid, other)
	}
	p.Close()
	if running(pid) {
		t.Error("it outlived the session")
	}
	log := written.String()
	if !strings.Contains(log, "my token is [REDACTED]") || strings.Contains(log, canary[:len(canary)/2]) {
		t.Error("what it must not tell is in the log")
	}
	if strings.Contains(log, "\x1b") || strings.Contains(log, `line="line 150`) || !strings.Contains(log, `line="line 20 `) || strings.Contains(log, strings.Repeat("x", 2*maxStderrLine)) {
		t.Error("stderr is not logged within its bounds")
	}
}

// TestModernProgram: one that speaks 2026-07-28 alone, over its pipes: calls,
// progress, and what it has to say when nobody asks.
func TestModernProgram(t *testing.T) {
	s := open(t, program(t, "modern"))
	catalogs := settled(t, s)
	if len(catalogs[0].Tools) != 5 || s.Status("local").Protocol != modernVersion {
		t.Fatalf("got %+v, %+v", catalogs, s.Status("local"))
	}
	var heard []string
	callText(t, s, "walk", &Caller{Modern: true, Notify: func(_ string, params json.RawMessage) { heard = append(heard, string(params)) }})
	if len(heard) != 3 || !strings.Contains(heard[2], `"progressToken":"p"`) {
		t.Errorf("heard %q", heard)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.Call(ctx, "local", "tools/call", json.RawMessage(`{"name":"pid"}`), &Caller{Modern: true}); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	callText(t, s, "pid", &Caller{Modern: true})
}

// TestProgramEras: whatever a program does about the era that it does not know,
// it is found out which it speaks, for all users of it, and it is started twice
// only if it dies of the question.
func TestProgramEras(t *testing.T) {
	for _, tt := range []struct {
		how, protocol string
		starts        int
		known         eras
	}{
		{"plain", modernVersion, 1, eraBoth},
		{"modern", modernVersion, 1, eraBoth},
		{"late", modernVersion, 1, eraBoth},
		{"refuses", offered, 1, eraLegacy},
		{"ignores", offered, 1, eraLegacy},
		{"dies", offered, 2, eraLegacy},
		{"dies late", offered, 2, eraLegacy},
	} {
		t.Run(tt.how, func(t *testing.T) {
			t.Parallel() // silence takes its time
			p, written := newPool(t, program(t, tt.how))
			for _, user := range []string{"one", "two"} {
				s, err := p.Open(auth.Principal{Issuer: "i", Subject: user})
				if err != nil {
					t.Fatal(err)
				}
				settled(t, s)
				if st := s.Status("local"); st.State != StateConnected || st.Protocol != tt.protocol {
					t.Errorf("%s: got %+v", user, st)
				}
				callText(t, s, "pid", nil)
				if got := eras(p.remotes[0].eras.Load()); got != tt.known {
					t.Errorf("%s: known %d, want %d", user, got, tt.known)
				}
			}
			if got, want := strings.Count(written.String(), "command started"), tt.starts+1; got != want {
				t.Errorf("started %d times for two users, want %d", got, want)
			}
		})
	}
}

// TestProgramOfBothErasAsks: where a program has one client that can be asked,
// it speaks the era in which it may ask at any time.
func TestProgramOfBothErasAsks(t *testing.T) {
	for capabilities, want := range map[string]string{`{"elicitation":{}}`: offered, `{}`: modernVersion} {
		p, _ := newPool(t, program(t, "plain"))
		s, err := p.OpenFor(auth.Local, json.RawMessage(capabilities))
		if err != nil {
			t.Fatal(err)
		}
		settled(t, s)
		if got := s.Status("local").Protocol; got != want {
			t.Errorf("%s: got %s, want %s", capabilities, got, want)
		}
	}
	// One that has the modern era only is not started again for that.
	p, written := newPool(t, program(t, "modern"))
	s, err := p.OpenFor(auth.Local, json.RawMessage(`{"elicitation":{}}`))
	if err != nil {
		t.Fatal(err)
	}
	settled(t, s)
	if got := s.Status("local").Protocol; got != modernVersion || eras(p.remotes[0].eras.Load()) != eraModern {
		t.Errorf("got %s, known %d", got, p.remotes[0].eras.Load())
	}
	if n := strings.Count(written.String(), "command started"); n != 1 {
		t.Errorf("started %d times", n)
	}
}

// TestProgramSpeaksLater: what a program says after all calls goes to the one
// client of its principal; of several, to none.
func TestProgramSpeaksLater(t *testing.T) {
	for capabilities, want := range map[string]int{"": 0, "{}": 1} {
		p, _ := newPool(t, program(t, "plain"))
		var declared json.RawMessage
		if capabilities != "" {
			declared = json.RawMessage(capabilities)
		}
		s, err := p.OpenFor(auth.Local, declared)
		if err != nil {
			t.Fatal(err)
		}
		heard := 0
		callText(t, s, "pid", &Caller{Client: "one", Later: func(string, json.RawMessage) { heard++ }})
		l, release, err := s.byName["local"].linkFor(t.Context(), &Caller{Client: "two"})
		if err != nil {
			t.Fatal(err)
		}
		l.heard(nil, "notifications/message", json.RawMessage(`{"level":"error","data":"the other client's"}`))
		release()
		if heard != want {
			t.Errorf("%q: heard %d", capabilities, heard)
		}
	}
}

// TestProgramsAreBounded: each principal has a process of its own, but no more
// run at once than may. The one that has not been called for the longest time
// makes room, one that is busy never; and each ends with its principal.
func TestProgramsAreBounded(t *testing.T) {
	p, _ := newPool(t, program(t, "plain"))
	p.remotes[0].slots.max = 2
	users := map[string]*Session{}
	pid := func(user string) string {
		t.Helper()
		if users[user] == nil {
			s, err := p.OpenFor(auth.SessionPrincipal(user), json.RawMessage(`{"elicitation":{}}`))
			if err != nil {
				t.Fatal(err)
			}
			settled(t, s)
			users[user] = s
		}
		return callText(t, users[user], "pid", nil)
	}
	alice, bob := pid("alice"), pid("bob")
	if alice == bob || pid("alice") != alice {
		t.Fatalf("alice has %s, bob %s", alice, bob)
	}
	carol := pid("carol")
	if running(bob) || pid("alice") != alice {
		t.Error("not the one made room that was idle the longest")
	}
	asked, answer := make(chan struct{}), make(chan struct{})
	busy := &Caller{Capabilities: json.RawMessage(`{"elicitation":{}}`), Ask: func(context.Context, string, json.RawMessage) (json.RawMessage, error) {
		asked <- struct{}{}
		<-answer
		return json.RawMessage(`{"action":"decline"}`), nil
	}}
	var calls sync.WaitGroup
	for _, user := range []string{"alice", "carol"} {
		calls.Go(func() {
			if _, err := users[user].Call(t.Context(), "local", "tools/call", json.RawMessage(`{"name":"ask","arguments":{}}`), busy); err != nil {
				t.Error(err)
			}
		})
		<-asked
	}
	_, err := users["bob"].Call(t.Context(), "local", "tools/call", json.RawMessage(`{"name":"pid","arguments":{}}`), nil)
	if f := failure(t, err, KindUnreachable); !strings.Contains(f.Say, "already runs 2 times") || !strings.Contains(f.Say, "busy") {
		t.Errorf("got %q", f.Say)
	}
	close(answer)
	calls.Wait()
	bob = pid("bob")
	if running(alice) == running(carol) {
		t.Error("not one of the two made room")
	}
	users["bob"].Close()
	if running(bob) {
		t.Error("it is still there, and its user has left")
	}
	p.Close()
	if left := len(p.remotes[0].slots.taken); running(alice) || running(carol) || left != 0 {
		t.Errorf("after the end %d are left", left)
	}
}

// TestProgramDies: the call that it dies in says that it may have been carried
// out; then it is started again.
func TestProgramDies(t *testing.T) {
	s := open(t, program(t, "plain"))
	settled(t, s)
	before := callText(t, s, "pid", nil)
	_, err := s.Call(t.Context(), "local", "tools/call", json.RawMessage(`{"name":"die","arguments":{}}`), nil)
	if f := failure(t, err, KindCut); !strings.Contains(f.Say, "check before you repeat it") {
		t.Errorf("got %q", f.Say)
	}
	changed := make(chan struct{}, 10)
	defer s.OnChange(func() { changed <- struct{}{} })()
	var after string
	for {
		// It may not be noticed at once that it has died.
		result, err := s.Call(t.Context(), "local", "tools/call", json.RawMessage(`{"name":"pid","arguments":{}}`), nil)
		if err == nil {
			after = string(result)
			break
		}
		failure(t, err, KindUnreachable)
	}
	if strings.Contains(after, before) {
		t.Error("the same process")
	}
}

// TestProgramEnds: a program that does not want to end is killed, with what it
// has started.
func TestProgramEnds(t *testing.T) {
	p, _ := newPool(t, program(t, "stubborn", "PATH="+os.Getenv("PATH")))
	s, err := p.Open(auth.Local)
	if err != nil {
		t.Fatal(err)
	}
	settled(t, s)
	pid := callText(t, s, "pid", nil)
	began := time.Now()
	p.Close()
	if running(pid) {
		t.Error("it is still there")
	}
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("took %v", took)
	}
}

// TestProgramLeaves: what a program has started ends with it, also if the program
// ends as it should and holds nothing open.
func TestProgramLeaves(t *testing.T) {
	p, _ := newPool(t, program(t, "leaves", "PATH="+os.Getenv("PATH")))
	s, err := p.Open(auth.Local)
	if err != nil {
		t.Fatal(err)
	}
	settled(t, s)
	pid := callText(t, s, "child", nil)
	if !running(pid) {
		t.Fatal("it has not been started")
	}
	p.Close()
	for waited := time.Now(); running(pid); {
		if stat, err := os.ReadFile("/proc/" + pid + "/stat"); err == nil && strings.Contains(string(stat), ") Z ") {
			break // it has ended, and nobody has asked how
		}
		if time.Since(waited) > 5*time.Second {
			t.Fatal("it is still there")
		}
		runtime.Gosched()
	}
}

// TestProgramEscapes: what a program has started in a process group of its own,
// with its output open, does not hold up the end of the session, nor hide that
// the program has died.
func TestProgramEscapes(t *testing.T) {
	p, _ := newPool(t, program(t, "escape", "PATH="+os.Getenv("PATH")))
	s, err := p.Open(auth.Local)
	if err != nil {
		t.Fatal(err)
	}
	settled(t, s)
	began := time.Now()
	_, err = s.Call(t.Context(), "local", "tools/call", json.RawMessage(`{"name":"die","arguments":{}}`), nil)
	failure(t, err, KindCut)
	pid := callText(t, s, "pid", nil)
	p.Close()
	if running(pid) {
		t.Error("it is still there")
	}
	if took := time.Since(began); took > 15*time.Second {
		t.Errorf("took %v", took)
	}
}

// TestBadPrograms: each fails with a sentence, and harms nobody else.
func TestBadPrograms(t *testing.T) {
	good := newFake(t)
	for how, want := range map[string]string{
		"crash": "ended before it answered", "flood": "ended before it answered", "endless": "ended before it answered",
	} {
		t.Run(how, func(t *testing.T) {
			bad := program(t, how)
			s := open(t, bad, newRemoteFor(t, "notes", good.URL))
			settled(t, s)
			if st := s.Status("local"); st.State != StateUnavailable || st.Err == nil || !strings.Contains(st.Err.Error(), want) {
				t.Errorf("got %+v", st)
			}
			if _, err := s.Call(t.Context(), "notes", "tools/call", nil, nil); err != nil {
				t.Error(err)
			}
		})
	}
	t.Run("missing", func(t *testing.T) {
		s := open(t, Remote{Name: "local", Command: &Command{Path: "gatehouse-no-such-program"}})
		_, err := s.Call(t.Context(), "local", "tools/call", nil, nil)
		if f := failure(t, err, KindUnreachable); !strings.Contains(f.Say, "gatehouse-no-such-program is not found") {
			t.Errorf("got %q", f.Say)
		}
	})
	t.Run("silent", func(t *testing.T) {
		r := program(t, "silent")
		r.Timeout = 100 * time.Millisecond
		s := open(t, r)
		_, err := s.Call(t.Context(), "local", "tools/call", nil, nil)
		failure(t, err, KindTimeout)
	})
}

// TestLegacySSE: a server of the deprecated transport, the SDK's own.
func TestLegacySSE(t *testing.T) {
	server := mcp.NewServer(&mcp.Implementation{Name: "old", Version: "1"}, nil)
	mcp.AddTool(server, &mcp.Tool{Name: "pid"}, func(ctx context.Context, req *mcp.CallToolRequest, _ struct{}) (*mcp.CallToolResult, any, error) {
		err := req.Session.NotifyProgress(ctx, &mcp.ProgressNotificationParams{ProgressToken: req.Params.GetProgressToken(), Progress: 1})
		return &mcp.CallToolResult{Content: []mcp.Content{&mcp.TextContent{Text: "old"}}}, nil, err
	})
	handler := mcp.NewSSEHandler(func(*http.Request) *mcp.Server { return server }, nil)
	door := &door{remote: "local"}
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "Bearer let-me-in" {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		handler.ServeHTTP(w, r)
	}))
	t.Cleanup(srv.Close)
	r := newRemoteFor(t, "local", srv.URL)
	r.SSE = true
	r.Authorizer = func(auth.Principal) Authorizer { return door }
	s := open(t, r)
	_, err := s.Call(t.Context(), "local", "tools/call", json.RawMessage(`{"name":"pid","arguments":{}}`), nil)
	if _, ok := errors.AsType[*auth.RequiredError](err); !ok {
		t.Fatalf("got %v, want a sign-in", err)
	}
	door.signIn("let-me-in")
	var heard []string
	if got := callText(t, s, "pid", &Caller{Notify: func(_ string, params json.RawMessage) { heard = append(heard, string(params)) }}); got != "old" {
		t.Errorf("got %q", got)
	}
	if !slices.Equal(heard, []string{`{"progressToken":"p","progress":1}`}) {
		t.Errorf("heard %q", heard)
	}
	// A cut stream is opened again with the next call.
	srv.CloseClientConnections()
	for {
		_, err := s.Call(t.Context(), "local", "tools/call", json.RawMessage(`{"name":"pid","arguments":{}}`), nil)
		if err == nil {
			break
		}
		if _, ok := errors.AsType[*Failure](err); !ok {
			t.Fatal(err)
		}
	}
}

// moody is a door that has no token at times.
type moody struct {
	door
	fails atomic.Bool
}

var errMood = errors.New("no token now")

func (m *moody) Token(ctx context.Context) (*oauth2.Token, error) {
	if m.fails.Load() {
		return nil, errMood
	}
	return m.door.Token(ctx)
}

// TestLegacySSEWithoutToken: a token that cannot be had is not the remote's fault.
func TestLegacySSEWithoutToken(t *testing.T) {
	server := mcp.NewServer(&mcp.Implementation{Name: "old", Version: "1"}, nil)
	srv := httptest.NewServer(mcp.NewSSEHandler(func(*http.Request) *mcp.Server { return server }, nil))
	t.Cleanup(srv.Close)
	m := &moody{door: door{remote: "local"}}
	r := newRemoteFor(t, "local", srv.URL)
	r.SSE = true
	r.Authorizer = func(auth.Principal) Authorizer { return m }
	p, _ := newPool(t, r)
	s, err := p.Open(auth.Local)
	if err != nil {
		t.Fatal(err)
	}
	settled(t, s)
	m.fails.Store(true)
	if _, err := s.Call(t.Context(), "local", "ping", nil, nil); !errors.Is(err, errMood) || isLost(err) {
		t.Errorf("got %v", err)
	}
	m.fails.Store(false)
	if _, err := s.Call(t.Context(), "local", "ping", nil, nil); err != nil {
		t.Error(err)
	}
	p.Close()
}

// TestHostileSSE: the POSTs, and the token in them, go to the same server only.
func TestHostileSSE(t *testing.T) {
	other := newFake(t)
	for _, endpoint := range []string{other.URL, "javascript:alert(1)", "//127.0.0.1:1/x", "http://user:pw@" + "x/", "\x7f", ""} {
		t.Run(endpoint, func(t *testing.T) {
			srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Content-Type", "text/event-stream")
				fmt.Fprintf(w, "event: endpoint\ndata: %s\n\n", endpoint)
				w.(http.Flusher).Flush()
				<-r.Context().Done()
			}))
			defer srv.Close()
			r := newRemoteFor(t, "local", srv.URL)
			r.SSE = true
			p, _ := newPool(t, r)
			s, err := p.Open(auth.Local)
			if err != nil {
				t.Fatal(err)
			}
			if endpoint == "" {
				// It is this very URL, which answers nothing useful.
				ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
				defer cancel()
				if _, err = s.Call(ctx, "local", "tools/call", nil, nil); err == nil {
					t.Error("no error")
				}
			} else {
				_, err = s.Call(t.Context(), "local", "tools/call", nil, nil)
				failure(t, err, KindBadAnswer)
			}
			p.Close()
		})
	}
	other.mu.Lock()
	defer other.mu.Unlock()
	if len(other.got) > 0 {
		t.Errorf("another server was asked: %v", other.got)
	}
}
