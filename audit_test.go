package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"gatehouse/auth/authtest"
)

// TestAuditAndMetrics: a sign-in that is refused, one that works, a call, a
// refresh and a sign-out are written down and counted, without saying more than
// who, where, what and how it came out.
func TestAuditAndMetrics(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "audit.log")
	w := newWorld(t, fmt.Sprintf(`{"audit": {"file": %q}}`, file))
	client := authtest.Legacy(t, w.gw.url)
	url := link(t, client.Call("notes_echo", map[string]any{"text": "canary-argument"}), "notes")

	w.as.Set(func(k *authtest.ASKnobs) { k.Deny = "access_denied" })
	if page := authtest.NewBrowser(t).Open(url); page.Status != http.StatusBadRequest {
		t.Fatalf("a refused sign-in: %d", page.Status)
	}
	w.as.Set(func(k *authtest.ASKnobs) { k.Deny = "" })
	signIn(t, url)
	echo(t, client, "notes_echo", "canary-argument")
	w.as.ExpireAll()
	echo(t, client, "notes_echo", "canary-argument")
	client.Call("gateway_logout", map[string]any{"remote": "notes"})

	info, err := os.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode().Perm() != 0o600 {
		t.Errorf("the audit log has mode %v", info.Mode())
	}
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for _, secret := range append(w.as.Secrets(), "canary-argument", client.ID(), "/connect/") {
		if bytes.Contains(data, []byte(secret)) {
			t.Errorf("the audit log holds %q", secret)
		}
	}
	var got []string
	for lines := bufio.NewScanner(bytes.NewReader(data)); lines.Scan(); {
		var r struct {
			Msg, Principal, Remote, Method, Name, Outcome, Why string
			Revoked                                            bool
		}
		if err := json.Unmarshal(lines.Bytes(), &r); err != nil || r.Principal == "" || r.Remote != "notes" {
			t.Errorf("%v in %s", err, lines.Text())
		}
		got = append(got, strings.TrimSpace(fmt.Sprintf("%s %s %s %s%s", r.Msg, r.Method, r.Name, r.Outcome, r.Why)))
		if r.Msg == "sign-out" && !r.Revoked {
			t.Errorf("the sign-out says nothing of the tokens: %s", lines.Text())
		}
	}
	want := []string{"call initialize  auth_required", "sign-in begun", "sign-in refused   denied", "sign-in begun", "sign-in finished", "call tools/call echo ok", "call tools/call echo ok", "sign-out"}
	if !slices.Equal(got, want) {
		t.Errorf("audit log:\n%q\nwant\n%q", got, want)
	}

	metrics := scrape(t, strings.TrimSuffix(w.gw.url, "/mcp")+"/metrics")
	for _, line := range []string{
		`gatehouse_calls_total{outcome="ok",remote="notes"} 2`,
		`gatehouse_calls_total{outcome="auth_required",remote="notes"} 1`,
		`gatehouse_call_duration_seconds_count{remote="notes"} 3`,
		`gatehouse_sign_ins_total{outcome="begun",remote="notes"} 2`,
		`gatehouse_sign_ins_total{outcome="finished",remote="notes"} 1`,
		`gatehouse_sign_ins_total{outcome="refused",remote="notes"} 1`,
		`gatehouse_refreshes_total{outcome="done",remote="notes"} 1`,
		`gatehouse_sessions 1`,
		`gatehouse_principals 1`,
		`gatehouse_connections{remote="notes"} 0`,
	} {
		if !strings.Contains(metrics, line+"\n") {
			t.Errorf("the metrics lack %s", line)
		}
	}
	if !regexp.MustCompile(`gatehouse_build_info\{go="go1\S+",version="\d+\.\d+\.\d+"\} 1`).MatchString(metrics) {
		t.Error("the metrics lack the build")
	}
	for _, foreign := range []string{"echo", client.ID(), "canary"} {
		if strings.Contains(metrics, foreign) {
			t.Errorf("the metrics hold %q", foreign)
		}
	}
}

// TestRefusalsAreWrittenDown: what is refused at the door is in the audit log as
// well, with the address that it came from.
func TestRefusalsAreWrittenDown(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "audit.log")
	w := newWorld(t, fmt.Sprintf(`{"audit": {"file": %q}, "limits": {"callbackPerMinute": 1, "callsPerSecond": 1}}`, file))
	base := strings.TrimSuffix(w.gw.url, "/mcp")
	do := func(want int, method, url, host, body string, header http.Header) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header, req.Host = header, host
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != want {
			t.Errorf("%s %s: %s", method, url, resp.Status)
		}
	}
	const call = `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"notes_echo","arguments":{},"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientCapabilities":{}}}}`
	modern := http.Header{"Content-Type": {"application/json"}, "Accept": {"application/json, text/event-stream"},
		"Mcp-Protocol-Version": {"2026-07-28"}, "Mcp-Method": {"tools/call"}, "Mcp-Name": {"notes_echo"}}
	do(http.StatusForbidden, http.MethodGet, base+"/", "evil.example", "", http.Header{})
	do(http.StatusForbidden, http.MethodPost, w.gw.url, "", call, http.Header{"Origin": {"https://evil.example"}})
	do(http.StatusForbidden, http.MethodPost, base+"/signout", "", "", http.Header{"Sec-Fetch-Site": {"cross-site"}})
	do(http.StatusBadRequest, http.MethodGet, base+"/oauth/callback/notes?state=x", "", "", http.Header{})
	do(http.StatusTooManyRequests, http.MethodGet, base+"/oauth/callback/notes?state=x", "", "", http.Header{})
	do(http.StatusOK, http.MethodPost, w.gw.url, "", call, modern)
	do(http.StatusTooManyRequests, http.MethodPost, w.gw.url, "", call, modern)
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for lines := bufio.NewScanner(bytes.NewReader(data)); lines.Scan(); {
		var r struct{ Msg, Why, From string }
		if err := json.Unmarshal(lines.Bytes(), &r); err != nil {
			t.Fatalf("%v in %s", err, lines.Text())
		}
		if r.Msg == "refused" {
			got = append(got, r.Why+" "+r.From)
		}
	}
	want := []string{"host 127.0.0.1", "origin 127.0.0.1", "foreign_page 127.0.0.1", "callbackPerMinute 127.0.0.1", "callsPerSecond 127.0.0.1"}
	if !slices.Equal(got, want) {
		t.Errorf("audit log:\n%q\nwant\n%q", got, want)
	}
}

func scrape(t *testing.T, url string) string {
	t.Helper()
	resp, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("%s: %s %v", url, resp.Status, err)
	}
	return string(body)
}

// TestMetricsAddress: with an address of their own the metrics are there alone,
// and without one they are not for others.
func TestMetricsAddress(t *testing.T) {
	t.Parallel()
	remote := authtest.NewRemote(t, authtest.RemoteConfig{})
	gw := startServe(t, config(`{"metrics": {"listen": "127.0.0.1:0"}}`, "r", remote.URL))
	own := regexp.MustCompile(`"metrics":"(http://[^"]+)"`).FindStringSubmatch(gw.output())
	if own == nil {
		t.Fatal("the log does not say where the metrics are")
	}
	if got := scrape(t, own[1]); !strings.Contains(got, "gatehouse_build_info") {
		t.Errorf("at their own address: %s", got)
	}
	get := func(url, host string) int {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Host = host
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		return resp.StatusCode
	}
	base := func(p *process) string { return strings.TrimSuffix(p.url, "/mcp") }
	if got := get(base(gw)+"/metrics", ""); got != http.StatusNotFound {
		t.Errorf("at the gateway's address as well: %d", got)
	}
	if got := get(strings.TrimSuffix(own[1], "/metrics")+"/mcp", ""); got != http.StatusNotFound {
		t.Errorf("MCP at the metrics' address: %d", got)
	}
	public := startServe(t, config(`{"publicUrl": "https://gw.example.com"}`, "r", remote.URL))
	if got := get(base(public)+"/metrics", "gw.example.com"); got != http.StatusForbidden {
		t.Errorf("through the public URL: %d", got)
	}
}

// TestAuditRotated: once the file has been moved away and the process told so,
// the next record is in a new one, and none is lost.
func TestAuditRotated(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "audit.log")
	remote := authtest.NewRemote(t, authtest.RemoteConfig{})
	gw := startServe(t, config(fmt.Sprintf(`{"audit": {"file": %q}}`, file), "notes", remote.URL))
	client := authtest.Legacy(t, gw.url)
	echo(t, client, "notes_echo", "before")
	if err := os.Rename(file, file+".1"); err != nil {
		t.Fatal(err)
	}
	echo(t, client, "notes_echo", "between")
	if err := gw.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	for waited := time.Now(); !strings.Contains(gw.output(), "audit log opened anew"); runtime.Gosched() {
		if time.Since(waited) > 10*time.Second {
			t.Fatal("it is not opened anew")
		}
	}
	echo(t, client, "notes_echo", "after")
	for name, want := range map[string]int{file + ".1": 2, file: 1} {
		data, err := os.ReadFile(name)
		if got := bytes.Count(data, []byte(`"name":"echo"`)); err != nil || got != want {
			t.Errorf("%s: %d calls, want %d: %v", filepath.Base(name), got, want, err)
		}
	}
}

// TestAuditFileOfOthers: a file that others can read is no place for it.
func TestAuditFileOfOthers(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "audit.log")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("gatehouse", "serve", "--config", writeConfig(t, config(fmt.Sprintf(`{"audit": {"file": %q}}`, file), "r", "https://r.example.com/mcp")), "--listen", "127.0.0.1:0").CombinedOutput()
	if exit, ok := err.(*exec.ExitError); !ok || exit.ExitCode() != exitUsage || !strings.Contains(string(out), "chmod 600") {
		t.Errorf("%v: %s", err, out)
	}
}
