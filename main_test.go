package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// The tests run the real binary: testscript puts this test binary on the PATH
// under the name gatehouse.
func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"gatehouse": main, "conformance-driver": conformanceDriver, "conformance-router": conformanceRouter, "conformance-score": conformanceScore,
		"load-server": loadServer, "tool-program": toolProgram})
}

// TestScripts runs the command line, testdata/*.txtar.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata",
		RequireExplicitExec: true,
		Cmds:                map[string]func(*testscript.TestScript, bool, []string){"exits": exits},
		Setup: func(env *testscript.Env) error {
			env.Setenv("XDG_CONFIG_HOME", env.WorkDir)
			env.Setenv("XDG_STATE_HOME", env.WorkDir)
			return nil
		},
	})
}

// exits is a command of the scripts: exits CODE PROGRAM ARG…
func exits(ts *testscript.TestScript, _ bool, args []string) {
	failed, _ := errors.AsType[*exec.ExitError](ts.Exec(args[1], args[2:]...))
	if failed == nil || fmt.Sprint(failed.ExitCode()) != args[0] {
		ts.Fatalf("%s ended with %v, want exit code %s", args[1], failed, args[0])
	}
}

// process is one running gatehouse.
type process struct {
	t      *testing.T
	cmd    *exec.Cmd
	stdin  io.WriteCloser
	stdout io.ReadCloser
	url    string // of the MCP endpoint, or of the pages for stdio

	mu   sync.Mutex // guards log
	log  bytes.Buffer
	wait func() error // until it has ended; kills it when that takes too long

	killed bool // by the test
}

// kill ends the process without a warning.
func (p *process) kill() {
	p.killed = true
	p.cmd.Process.Kill()
	p.wait()
}

// end asks the process to end, as an operator does.
func (p *process) end() error {
	p.cmd.Process.Signal(syscall.SIGTERM) // fails if it has ended already
	return p.wait()
}

// startServe runs `gatehouse serve` with the config on any free port, and
// waits until it says that it serves.
func startServe(t *testing.T, config string, args ...string) *process {
	t.Helper()
	return start(t, "url", append([]string{"serve", "--config", writeConfig(t, config), "--listen", "127.0.0.1:0", "--log-level", "debug", "--log-format", "json"}, args...))
}

// startStdio runs `gatehouse stdio` with sign-ins of its own; its stdin and
// stdout are the test's.
func startStdio(t *testing.T, config string) *process {
	t.Helper()
	return startStdioIn(t, t.TempDir(), config)
}

// startStdioIn is startStdio with the sign-ins that a state directory holds.
func startStdioIn(t *testing.T, state, config string) *process {
	t.Helper()
	return start(t, "pages", []string{"stdio", "--config", writeConfig(t, config), "--log-level", "debug", "--log-format", "json"}, "XDG_STATE_HOME="+state)
}

func writeConfig(t *testing.T, config string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "gatehouse.json")
	if err := os.WriteFile(path, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// start runs the binary until the log holds a line with the member urlKey.
func start(t *testing.T, urlKey string, args []string, env ...string) *process {
	t.Helper()
	p := &process{t: t, cmd: exec.Command("gatehouse", args...)}
	p.cmd.Env = append(os.Environ(), env...)
	stderr, err := p.cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if p.stdin, err = p.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	if p.stdout, err = p.cmd.StdoutPipe(); err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ready := make(chan string, 1)
	drained := make(chan struct{})
	go func() {
		defer close(drained)
		lines := bufio.NewScanner(stderr)
		lines.Buffer(nil, 1<<20)
		for lines.Scan() {
			p.mu.Lock()
			p.log.Write(lines.Bytes())
			p.log.WriteByte('\n')
			p.mu.Unlock()
			var line map[string]any
			if json.Unmarshal(lines.Bytes(), &line) == nil {
				if url, ok := line[urlKey].(string); ok && strings.HasPrefix(fmt.Sprint(line["msg"]), "serving MCP") {
					ready <- url
				}
			}
		}
		close(ready)
	}()
	p.wait = sync.OnceValue(func() error {
		timer := time.AfterFunc(30*time.Second, func() { p.cmd.Process.Kill() })
		defer timer.Stop()
		<-drained
		return p.cmd.Wait()
	})
	t.Cleanup(func() {
		if err := p.end(); err != nil && !p.killed {
			t.Errorf("gatehouse did not end well: %v", err)
		}
		if t.Failed() {
			t.Logf("its log:\n%s", p.output())
		}
	})
	url, ok := <-ready
	if !ok {
		t.Fatalf("gatehouse ended before it served:\n%s", p.output())
	}
	p.url = url
	return p
}

// output is everything that was logged so far.
func (p *process) output() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.log.String()
}

// within gives a test's context a deadline that only a hang meets.
func within(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}
