package rawjson

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestSetLeavesTheRestAlone(t *testing.T) {
	for _, tt := range []struct{ name, in, want string }{
		{"in the middle", `{"a":1.0, "name" : "x" ,"b":{"name":"y"}}`, `{"a":1.0, "name" : "NEW" ,"b":{"name":"y"}}`},
		{"numbers beyond 2^53", `{"n":9007199254740993,"name":"x","e":1E+2}`, `{"n":9007199254740993,"name":"NEW","e":1E+2}`},
		{"escaped key", `{"n\u0061me":"x"}`, `{"n\u0061me":"NEW"}`},
		{"absent", `{"a":[1,{"b":"}"}]}`, `{"a":[1,{"b":"}"}],"name":"NEW"}`},
		{"empty", ` { } `, `{"name":"NEW"}`},
		{"braces in strings", `{"s":"{\"name\":\"no\"}\\","name":null}`, `{"s":"{\"name\":\"no\"}\\","name":"NEW"}`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := Set([]byte(tt.in), "name", []byte(`"NEW"`))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, string(got)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestGet(t *testing.T) {
	got, err := Get([]byte(`{"id":7,"result":{"a":[1, 2]},"x":"y"}`), "result", "error", "id")
	if err != nil {
		t.Fatal(err)
	}
	if string(got[0]) != `{"a":[1, 2]}` || got[1] != nil || string(got[2]) != "7" {
		t.Errorf("got %s", got)
	}
	if _, err := Get([]byte(`{"id":1,"id":2}`), "id"); !errors.Is(err, ErrDuplicate) {
		t.Errorf("duplicate member: got %v", err)
	}
}

func TestDelete(t *testing.T) {
	odd := func(key string) bool { return strings.HasPrefix(key, "x") }
	for in, want := range map[string]string{
		`{ "a":1.0, "b" : {"x":1} }`:   `{ "a":1.0, "b" : {"x":1} }`,
		`{"x1":1,"a":1.0,"x2":[{}]}`:   `{"a":1.0}`,
		`{"a" : 1,"\u0078":2,"b":"}"}`: `{"a" : 1,"b":"}"}`,
		`{"x":1}`:                      `{}`,
		`{}`:                           `{}`,
	} {
		if got, err := Delete([]byte(in), odd); err != nil || string(got) != want {
			t.Errorf("Delete(%s) = %s, %v, want %s", in, got, err, want)
		}
	}
}

func TestRefuses(t *testing.T) {
	for _, in := range []string{``, `[]`, `"s"`, `{`, `{"a"}`, `{"a":}`, `{"a":1`, `{"a":1,}`, `{"a":1}x`, `{"a":"`, `{"a":[}`, `{a:1}`, `{"a":"\`} {
		if err := Each([]byte(in), func(Member) bool { return true }); !errors.Is(err, ErrSyntax) {
			t.Errorf("%q: got %v, want ErrSyntax", in, err)
		}
	}
}

func TestDepth(t *testing.T) {
	for in, want := range map[string]int{`1`: 0, `{}`: 1, `{"a":[{"b":"[[["}]}`: 3, strings.Repeat("[", 500): 500} {
		if got := Depth([]byte(in)); got != want {
			t.Errorf("Depth(%.20q) = %d, want %d", in, got, want)
		}
	}
}

// FuzzMembers holds Each, Get and Set to encoding/json on every valid object.
func FuzzMembers(f *testing.F) {
	f.Add([]byte(`{"a":1,"name":"x","b":{"c":[1,2,{"d":"\"}"}]}}`))
	f.Add([]byte(`{"\u006eame":-1.5e+9 , "z":null}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		Depth(data)
		var want map[string]json.RawMessage
		valid := json.Unmarshal(data, &want) == nil && want != nil
		got := map[string]json.RawMessage{}
		err := Each(data, func(m Member) bool {
			got[m.Key] = data[m.Start:m.End]
			return true
		})
		if !valid {
			return // must not panic, may refuse
		}
		if err != nil {
			t.Fatalf("a valid object was refused: %v", err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Fatal(diff)
		}
		out, err := Set(data, "name", []byte(`"NEW"`))
		if errors.Is(err, ErrDuplicate) {
			return
		}
		if err != nil || !json.Valid(out) {
			t.Fatalf("Set gave %q, %v", out, err)
		}
		if values, err := Get(out, "name"); err != nil || string(values[0]) != `"NEW"` {
			t.Fatalf("Get after Set gave %q, %v", values, err)
		}
	})
}
