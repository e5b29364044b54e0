package gateway

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"gatehouse/session"
)

func TestNames(t *testing.T) {
	long := strings.Repeat("x", 70)
	for _, tt := range []struct {
		name     string
		prefixes []string
		remote   int
		tools    []string
		want     []string
	}{
		{"plain", []string{"notes"}, 0, []string{"add", "list"}, []string{"notes_add", "notes_list"}},
		{"characters", []string{"my notes"}, 0, []string{"a.b/c"}, []string{"my_notes_a_b_c"}},
		{"the one that was fine keeps its name", []string{"n"}, 0, []string{"a.b", "a_b", "a/b"},
			[]string{"n_a_b_8e9bf5", "n_a_b", "n_a_b_a6a0a3"}},
		{"another remote's prefix", []string{"a", "a_b"}, 0, []string{"b_c", "c"}, []string{"a_b_c_3ca5da", "a_c"}},
		{"the longer prefix owns the name", []string{"a", "a_b"}, 1, []string{"c"}, []string{"a_b_c"}},
		{"no prefix", []string{""}, 0, []string{"add"}, []string{"add"}},
		{"no prefix, another's name", []string{"", "notes"}, 0, []string{"notes_add"}, []string{"notes_add_1a4bc5"}},
		{"no prefix, the gateway's name", []string{""}, 0, []string{"gateway_status"}, []string{"gateway_status_6b1ba6"}},
		{"too long", []string{"n"}, 0, []string{long}, []string{"n_" + strings.Repeat("x", 55) + "_c7d7cf"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := newNamer(tt.prefixes).names(tt.remote, fmt.Sprint("remote", tt.remote), tt.tools)
			// The digits are pinned by TestSuffix; here their form is enough.
			hex := regexp.MustCompile(`_[0-9a-f]{6}$`)
			for i := range got {
				if hex.MatchString(tt.want[i]) && hex.MatchString(got[i]) {
					tt.want[i], got[i] = hex.ReplaceAllString(tt.want[i], "_HEX"), hex.ReplaceAllString(got[i], "_HEX")
				}
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// TestSuffix pins the form that interface.md promises: 6 hex digits of
// SHA-256(remote, NUL, tool).
func TestSuffix(t *testing.T) {
	// printf 'notes\0add' | sha256sum
	if got, want := withSuffix("notes_add", "notes", "add"), "notes_add_0d67c0"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

// FuzzNames: whatever remotes call their tools, the names are valid, differ,
// and lead back to their remote or carry a suffix.
func FuzzNames(f *testing.F) {
	f.Add("a", "a_b", "b_c", "c")
	f.Add("", "notes", "notes_add", "add")
	f.Add("gateway2", "x", "gateway_status", "ä")
	valid := regexp.MustCompile(`^[A-Za-z0-9_-]{1,64}$`)
	f.Fuzz(func(t *testing.T, prefix1, prefix2, tool1, tool2 string) {
		if tool1 == "" || tool2 == "" || tool1 == tool2 {
			return
		}
		n := newNamer([]string{prefix1, prefix2})
		for remote := range 2 {
			got := n.names(remote, fmt.Sprint(remote), []string{tool1, tool2})
			if got[0] == got[1] {
				t.Errorf("both tools are called %q", got[0])
			}
			for _, name := range got {
				if !valid.MatchString(name) {
					t.Errorf("invalid name %q", name)
				}
			}
		}
	})
}

func TestOwners(t *testing.T) {
	n := newNamer([]string{"a", "a_b", "", "a", ""})
	for name, want := range map[string][]int{"a_x": {0, 3}, "a_b_x": {1}, "other": {2, 4}, "gateway_status": nil, "a": {2, 4}} {
		if got := n.owners(name); !slices.Equal(got, want) {
			t.Errorf("owners(%q) = %d, want %d", name, got, want)
		}
	}
}

// TestOnePrefixForTwo: tools of two remotes that meet in a name are told apart,
// the status says how, and a name is looked for at both.
func TestOnePrefixForTwo(t *testing.T) {
	list := func(name string) string {
		return `{"tools":[{"name":"a","inputSchema":{"type":"object"}},{"name":"` + name + `","inputSchema":{"type":"object"}}]}`
	}
	one := newPlainRemote(t, `{"tools":{}}`, map[string]string{"tools/list": list("one.s"), "tools/call": `{"content":[],"by":"one"}`})
	two := newPlainRemote(t, `{"tools":{}}`, map[string]string{"tools/list": list("two.s"), "tools/call": `{"content":[],"by":"two"}`})
	initialized := two.results["initialize"]
	two.set("initialize", `!{"code":-32603,"message":"not yet"}`)
	g := newFront(t, `{"mcpServers": {"one": {"url": "`+one.URL+`", "prefix": ""}, "two": {"url": "`+two.URL+`", "prefix": ""}}}`)
	c := newPlainClient(t, g.url, "{}", false)
	if got := c.call("tools/call", `"name":"two_s"`); !strings.Contains(got, "refused to begin") {
		t.Errorf("while the second is down: %s", got)
	}
	two.set("initialize", initialized)
	for name, by := range map[string]string{"a": "one", "one_s": "one", "two_s": "two", withSuffix("a", "two", "a"): "two"} {
		if got := c.call("tools/call", fmt.Sprintf(`"name":%q`, name)); got != `{"content":[],"by":"`+by+`"}` {
			t.Errorf("%s: got %s", name, got)
		}
	}
	var status struct {
		Content           []struct{ Text string }
		StructuredContent struct{ Remotes []remoteStatus }
	}
	if err := json.Unmarshal([]byte(c.call("tools/call", `"name":"gateway_status"`)), &status); err != nil || len(status.StructuredContent.Remotes) != 2 {
		t.Fatalf("%v in %+v", err, status)
	}
	want := []renamed{{"a", withSuffix("a", "two", "a")}}
	if r := status.StructuredContent.Remotes; r[0].Renamed != nil || !slices.Equal(r[1].Renamed, want) {
		t.Errorf("got %+v", r)
	}
	if say := "renamed: a is " + want[0].Name; !strings.Contains(status.Content[0].Text, say) {
		t.Errorf("got %s, want %s", status.Content[0].Text, say)
	}
}

// TestLeftOut: what cannot be listed is known to be missing.
func TestLeftOut(t *testing.T) {
	m := merge([]session.Catalog{{Remote: "r", Tools: []session.Definition{
		{Name: "good", Raw: json.RawMessage(`{"name":"good"}`)}, {Name: "bad", Raw: json.RawMessage(`{"name":"bad","name":"worse"}`)},
	}}}, newNamer([]string{"r"}), nil, slog.New(slog.DiscardHandler))
	if l := m.tools.leftOut; len(l) != 1 || l[0].remote != "r" || l[0].original != "bad" || m.tools.renamed != nil {
		t.Errorf("got %+v", m.tools)
	}
	if got, want := describe(remoteStatus{Status: "connected", Tools: 2, LeftOut: []string{"bad", "worse"}}, time.Now()), "connected, 2 tools; left out: bad, and 1 more"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}
