package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/modelcontextprotocol/go-sdk/mcp"

	"gatehouse/auth/authtest"
)

// toolServer is a small MCP server of the SDK's, whatever carries its messages.
func toolServer() *mcp.Server {
	type nothing struct{}
	server := mcp.NewServer(&mcp.Implementation{Name: "tools", Version: "1"}, nil)
	add := func(name string, answer func() string) {
		mcp.AddTool(server, &mcp.Tool{Name: name}, func(context.Context, *mcp.CallToolRequest, nothing) (*mcp.CallToolResult, any, error) {
			return &mcp.CallToolResult{Content: []mcp.Content{&mcp.TextContent{Text: answer()}}}, nil, nil
		})
	}
	add("pid", func() string { return strconv.Itoa(os.Getpid()) })
	add("env", func() string { return strings.Join(os.Environ(), "\n") })
	add("die", func() string {
		if self, err := os.FindProcess(os.Getpid()); err == nil {
			self.Kill()
		}
		select {}
	})
	return server
}

// toolProgram is toolServer as a local command.
func toolProgram() {
	fmt.Fprintln(os.Stderr, "tool-program: hello")
	if err := toolServer().Run(context.Background(), &mcp.StdioTransport{}); err != nil {
		os.Exit(1)
	}
}

func toolText(t *testing.T, result *mcp.CallToolResult) string {
	t.Helper()
	if len(result.Content) != 1 {
		t.Fatalf("got %d contents", len(result.Content))
	}
	text, ok := result.Content[0].(*mcp.TextContent)
	if !ok {
		t.Fatalf("got %T", result.Content[0])
	}
	return text.Text
}

// alive reports whether a process is there.
func alive(t *testing.T, pid string) bool {
	t.Helper()
	n, err := strconv.Atoi(pid)
	if err != nil {
		t.Fatalf("%q is no process id", pid)
	}
	p, err := os.FindProcess(n)
	return err == nil && p.Signal(syscall.Signal(0)) == nil
}

// gone waits until a process has ended; only a hang meets the deadline.
func gone(t *testing.T, pid string) {
	t.Helper()
	ctx := within(t)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for alive(t, pid) {
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("process %s is still there", pid)
		}
	}
}

func programConfig(t *testing.T) string {
	t.Helper()
	cfg, err := json.Marshal(map[string]any{"mcpServers": map[string]any{
		"local": map[string]any{"command": "tool-program", "env": map[string]string{"MINE": "yes"}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	return string(cfg)
}

// TestLocalCommand: a program of the config is a remote. It does not see the
// gateway's environment; killed in the middle of a call it says so and is
// started again; it ends with the gateway.
func TestLocalCommand(t *testing.T) {
	const secret = "not-for-programs"
	t.Setenv("GATEHOUSE_TEST_SECRET", secret)
	gw := startServe(t, programConfig(t))
	client := authtest.Connect(t, authtest.ClientConfig{URL: gw.url})
	env := toolText(t, client.Call("local_env", nil))
	if !strings.Contains(env, "MINE=yes") || strings.Contains(env, secret) {
		t.Errorf("its environment: %s", env)
	}
	first := toolText(t, client.Call("local_pid", nil))
	died := client.Call("local_die", nil)
	if say := toolText(t, died); !died.IsError || !strings.Contains(say, "check before you repeat it") {
		t.Errorf("killed in the middle of a call: %q", say)
	}
	gone(t, first)
	ctx := within(t)
	var second string
	for ctx.Err() == nil {
		// It may not be noticed at once, and is started again with back-off.
		if result := client.Call("local_pid", nil); !result.IsError {
			second = toolText(t, result)
			break
		}
	}
	if second == first || !alive(t, second) {
		t.Errorf("process %s after %s", second, first)
	}
	if log := gw.output(); !strings.Contains(log, "tool-program: hello") {
		t.Error("its stderr is not in the log")
	}
	if err := gw.end(); err != nil {
		t.Error(err)
	}
	if alive(t, second) {
		t.Error("it outlived the gateway")
	}
}

// TestLocalCommandAfterAKill: a gateway that is killed leaves no program
// behind: its stdin ends.
func TestLocalCommandAfterAKill(t *testing.T) {
	t.Parallel()
	gw := startServe(t, programConfig(t))
	client := authtest.Connect(t, authtest.ClientConfig{URL: gw.url})
	pid := toolText(t, client.Call("local_pid", nil))
	gw.kill()
	gone(t, pid)
}

// TestOldSSERemote: a server of the deprecated HTTP+SSE transport, the SDK's,
// behind the gateway.
func TestOldSSERemote(t *testing.T) {
	t.Parallel()
	server := toolServer()
	old := httptest.NewServer(mcp.NewSSEHandler(func(*http.Request) *mcp.Server { return server }, nil))
	t.Cleanup(old.Close)
	gw := startServe(t, fmt.Sprintf(`{"mcpServers": {"old": {"type": "sse", "url": %q}}}`, old.URL+"/sse"))
	t.Cleanup(func() { gw.end() }) // before the server, whose Close waits for the stream
	client := authtest.Connect(t, authtest.ClientConfig{URL: gw.url})
	if got := toolText(t, client.Call("old_pid", nil)); got != strconv.Itoa(os.Getpid()) {
		t.Errorf("got %q", got)
	}
}
