package gateway

import (
	"fmt"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
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

func TestOwner(t *testing.T) {
	n := newNamer([]string{"a", "a_b", ""})
	for name, want := range map[string]int{"a_x": 0, "a_b_x": 1, "other": 2, "gateway_status": -1, "a": 2} {
		if got := n.owner(name); got != want {
			t.Errorf("owner(%q) = %d, want %d", name, got, want)
		}
	}
}
