package gateway

import (
	"bytes"
	"encoding/json"
	"io"
	"strings"
	"testing"
)

// sift returns what newLines lets through of an input, and what it answers.
func sift(t testing.TB, input string, most int) (through, answers string) {
	t.Helper()
	var out bytes.Buffer
	read, err := io.ReadAll(newLines(io.NopCloser(strings.NewReader(input)), &out, most))
	if err != nil {
		t.Fatal(err)
	}
	return string(read), out.String()
}

func TestLines(t *testing.T) {
	const ping = `{"jsonrpc":"2.0","id":1,"method":"ping"}`
	for _, tt := range []struct {
		name, input, through string
		codes                []string
	}{
		{"a message", ping + "\n", ping + "\n", nil},
		{"the last one without an end", ping, ping + "\n", nil},
		{"windows", ping + "\r\n\r\n" + ping + "\r\n", ping + "\n" + ping + "\n", nil},
		{"text", "hello\n" + ping + "\n", ping + "\n", []string{"-32700"}},
		{"half of one", ping[:20] + "\n" + ping + "\n", ping + "\n", []string{"-32700"}},
		{"two in a line", ping + ping + "\n", "", []string{"-32700"}},
		{"no message", "{}\n7\nnull\n\"x\"\n" + ping + "\n", ping + "\n", []string{"-32600", "-32600", "-32600", "-32600"}},
		{"a batch", "[" + ping + "]\n", "[" + ping + "]\n", nil},
		{"too long", `{"jsonrpc":"2.0","id":1,"method":"` + strings.Repeat("x", 10_000) + `"}` + "\n" + ping + "\n", ping + "\n", []string{"-32600"}},
		{"a notification", `{"jsonrpc":"2.0","method":"notifications/initialized"}` + "\n", `{"jsonrpc":"2.0","method":"notifications/initialized"}` + "\n", nil},
		{"nothing", "", "", nil},
	} {
		through, answers := sift(t, tt.input, 5_000)
		if through != tt.through {
			t.Errorf("%s: %q goes on, want %q", tt.name, through, tt.through)
		}
		if got := strings.Count(answers, "\n"); got != len(tt.codes) {
			t.Errorf("%s: answers %q, want %v", tt.name, answers, tt.codes)
			continue
		}
		for _, code := range tt.codes {
			var line string
			line, answers, _ = strings.Cut(answers, "\n")
			if !strings.Contains(line, `"code":`+code) || !strings.Contains(line, `"id":null`) {
				t.Errorf("%s: answer %s, want code %s", tt.name, line, code)
			}
		}
	}
}

func FuzzLines(f *testing.F) {
	f.Add("{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"ping\"}\nhello\n")
	f.Fuzz(func(t *testing.T, input string) {
		through, answers := sift(t, input, 200)
		for line := range strings.Lines(through) {
			if !json.Valid([]byte(line)) {
				t.Errorf("%q goes on", line)
			}
		}
		if strings.Count(through, "\n")+strings.Count(answers, "\n") > strings.Count(input, "\n")+1 {
			t.Errorf("more came of %q than it holds: %q and %q", input, through, answers)
		}
	})
}
