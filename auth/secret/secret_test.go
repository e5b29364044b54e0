package secret

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"github.com/lmittmann/tint"
)

const canary = "canary-7f3a"

type nested struct {
	Exported   Text
	unexported Text
	Pointer    *Text
	List       []Text
	Map        map[string]Text
	Any        any
}

func TestNothingPrintsASecret(t *testing.T) {
	s := New(canary)
	n := nested{s, s, &s, []Text{s}, map[string]Text{"k": s}, s}
	var out bytes.Buffer
	for _, v := range []any{s, &s, n, &n, []any{n}, map[string]any{"n": n}, errors.Join(fmt.Errorf("%v", n))} {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "%p", "%T", "%b"} {
			fmt.Fprintf(&out, verb+"\n", v)
		}
		data, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		out.Write(data)
		for _, h := range []slog.Handler{
			slog.NewTextHandler(&out, &slog.HandlerOptions{Level: slog.LevelDebug}),
			slog.NewJSONHandler(&out, &slog.HandlerOptions{Level: slog.LevelDebug}),
			tint.NewTextHandler(&out, &tint.Options{Level: slog.LevelDebug}),
		} {
			slog.New(h).Debug("m", "v", v, slog.Group("g", "v", v))
		}
	}
	for _, form := range []string{canary, fmt.Sprintf("%x", canary), fmt.Sprintf("%X", canary)} {
		if strings.Contains(out.String(), form) {
			t.Errorf("the output holds the secret as %q", form)
		}
	}
	if !strings.Contains(out.String(), redacted) {
		t.Error("the output does not say that something was redacted")
	}
}

func TestValue(t *testing.T) {
	if s := New(canary); s.Value() != canary || s.IsEmpty() {
		t.Error("a secret lost its value")
	}
	if s := New(""); s.Value() != "" || !s.IsEmpty() || !(Text{}).Equal(s) {
		t.Error("an empty secret is not empty")
	}
	if !New(canary).Equal(New(canary)) || New(canary).Equal(New("other")) {
		t.Error("Equal does not compare values")
	}
}
