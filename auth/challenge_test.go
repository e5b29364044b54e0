package auth

import (
	"net/http"
	"slices"
	"strings"
	"testing"

	"gatehouse/auth/endpoint"
)

func TestParseChallenge(t *testing.T) {
	long := strings.Repeat("x", maxChallengeLength)
	for _, test := range []struct {
		name    string
		headers []string
		want    challenge
	}{
		{"none", nil, challenge{}},
		{"bare", []string{"Bearer"}, challenge{}},
		{"plain", []string{`Bearer resource_metadata="https://a.example/m", scope="read write", error="invalid_token"`},
			challenge{"https://a.example/m", []string{"read", "write"}, "invalid_token"}},
		{"any case, any spacing", []string{`bEaReR  Resource_Metadata = "https://a.example/m" ,scope=read`},
			challenge{"https://a.example/m", []string{"read"}, ""}},
		{"unquoted URL", []string{`Bearer resource_metadata=https://a.example/m?x=y, error=insufficient_scope`},
			challenge{"https://a.example/m?x=y", nil, "insufficient_scope"}},
		{"empty values", []string{`Bearer realm="", error_description="", resource_metadata="https://a.example/m"`},
			challenge{ResourceMetadata: "https://a.example/m"}},
		{"escapes and commas in quotes", []string{`Bearer realm="a \"b\", Bearer c=\"d\"", scope="x"`},
			challenge{Scope: []string{"x"}}},
		{"another scheme first", []string{`Basic realm="x", Bearer scope="read"`}, challenge{Scope: []string{"read"}}},
		{"another scheme's parameters", []string{`Bearer scope="read", DPoP resource_metadata="https://dpop.example/m", error="x"`},
			challenge{Scope: []string{"read"}}},
		{"token68 first", []string{`Negotiate YII/abc+==, Bearer scope="read"`}, challenge{Scope: []string{"read"}}},
		{"several headers", []string{`Negotiate`, `Bearer realm="x"`, `Bearer resource_metadata="https://a.example/m"`, `Bearer resource_metadata="https://b.example/m"`},
			challenge{ResourceMetadata: "https://a.example/m"}},
		{"the first of doubles", []string{`Bearer scope="a", scope="b"`}, challenge{Scope: []string{"a"}}},
		{"scopes once", []string{`Bearer scope=" a  b a "`}, challenge{Scope: []string{"a", "b"}}},
		{"broken header beside a good one", []string{`"""=,`, `Bearer scope="a"`}, challenge{Scope: []string{"a"}}},
		{"no end", []string{`Bearer resource_metadata="https://a.example/m`}, challenge{}},
		{"control characters", []string{"Bearer resource_metadata=\"https://a.example/\r\nX: y\", error=\"a\x00\""}, challenge{}},
		{"space in the URL", []string{`Bearer resource_metadata="https://a.example/ m"`}, challenge{}},
		{"not a scope", []string{`Bearer scope="a b\"c d\\e f"`}, challenge{Scope: []string{"a", `f`}}},
		{"too long", []string{`Bearer scope="a", x="` + long + `"`}, challenge{}},
		{"long URL", []string{`Bearer scope="a", resource_metadata="https://a.example/` + long[:maxURLLength] + `"`}, challenge{Scope: []string{"a"}}},
		{"too many headers", append(slices.Repeat([]string{"Basic"}, maxChallengeHeaders), `Bearer scope="a"`), challenge{}},
	} {
		t.Run(test.name, func(t *testing.T) {
			h := http.Header{"Www-Authenticate": test.headers}
			got := parseChallenge(h)
			if got.ResourceMetadata != test.want.ResourceMetadata || got.Error != test.want.Error || !slices.Equal(got.Scope, test.want.Scope) {
				t.Errorf("got %+v, want %+v", got, test.want)
			}
		})
	}
}

func FuzzParseChallenge(f *testing.F) {
	for _, s := range []string{
		`Bearer resource_metadata="https://a.example/m", scope="read write", error="invalid_token"`,
		`Negotiate YII/abc+==, Basic realm="a \"b\"", Bearer scope=x`,
		`Bearer x="`, `Bearer x="\`, `,,=,"`,
	} {
		f.Add(s, s)
	}
	f.Fuzz(func(t *testing.T, a, b string) {
		c := parseChallenge(http.Header{"Www-Authenticate": {a, b}})
		if len(c.ResourceMetadata) > maxURLLength || !endpoint.VisibleASCII(c.ResourceMetadata) || len(c.Error) > maxErrorLength || !endpoint.VisibleASCII(c.Error) {
			t.Errorf("%q, %q: %+v", a, b, c)
		}
		for _, s := range c.Scope {
			if s == "" || !endpoint.VisibleASCII(s) || strings.ContainsAny(s, `"\`) {
				t.Errorf("%q, %q: scope %q", a, b, s)
			}
		}
	})
}
