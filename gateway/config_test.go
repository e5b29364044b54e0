package gateway

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/google/jsonschema-go/jsonschema"
	"github.com/tailscale/hujson"
)

func env(name string) (string, bool) {
	v, ok := map[string]string{"TEAM": "blue", "SECRET": "canary-secret", "EMPTY": "", "NESTED": "${TEAM}"}[name]
	return v, ok
}

// problemsOf parses a config and returns its problems as "line: path: say".
func problemsOf(t *testing.T, config string) []string {
	t.Helper()
	_, _, err := ParseConfig("c.json", []byte(config), env)
	if err == nil {
		return nil
	}
	e, ok := err.(*ConfigError)
	if !ok {
		t.Fatalf("the error is a %T", err)
	}
	var out []string
	for _, p := range e.Problems {
		if p.Line < 1 || p.Column < 1 || p.Say == "" {
			t.Errorf("problem without a place: %+v", p)
		}
		out = append(out, fmt.Sprintf("%d: %s: %s", p.Line, p.Path, p.Say))
	}
	return out
}

// remote is a config whose only remote has these members.
func remote(members string) string {
	return `{"mcpServers": {"r": {` + members + `}}}`
}

// settings is a config with a good remote and these members in "gateway".
func settings(members string) string {
	return `{"mcpServers": {"r": {"url": "https://r.example.com/mcp"}}, "gateway": {` + members + `}}`
}

func TestConfigProblems(t *testing.T) {
	const url = `"url": "https://r.example.com/mcp"`
	for _, tt := range []struct{ config, want string }{
		{``, "1: : is empty: write {"},
		{" // nothing here", "1: : is empty: write {"},
		{"{\n  \"mcpServers\": {\n    \"r\": {" + url + "}\n", "2: : not valid JSON: the { that begins here has no end"},
		{"{\"mcpServers\": {\n\"r\": {\"url\": \"https://", "2: : not valid JSON: the text that begins here has no end"},
		{"/* \n {}", "1: : not valid JSON: the comment that begins here has no end"},
		{`{"mcpServers": {}} x`, "not valid JSON: invalid character 'x' after top-level value"},
		{`[]`, "must be an object"},
		{`{}`, "names no remote"},
		{`{"mcpServers": {}}`, "names no remote"},
		{`{"servers": {"r": {` + url + `}}}`, "rename the key to mcpServers"},
		{`{"mcpServers": {"r": {` + url + `}}, "gatway": {}}`, `did you mean "gateway"?`},
		{`{"mcpServers": {"r": {` + url + `}, "r": {` + url + `}}}`, "is there twice: first in line 1"},
		{`{"$schema": 7, "mcpServers": {"r": {` + url + `}}}`, "must be a text"},
		{`{"mcpServers": {"r": {"url": unquoted}}}`, "this is no value"},
		{`{"mcpServers": {"": {` + url + `}}}`, "1 to 64 characters"},
		{`{"mcpServers": {"a\u0085b": {` + url + `}}}`, "1 to 64 characters"},
		{`{"mcpServers": {"` + strings.Repeat("x", 65) + `": {` + url + `}}}`, "1 to 64 characters"},
		{`{"mcpServers": {"a/b": {` + url + `}}}`, "1 to 64 characters"},
		{`{"mcpServers": {"gateway": {` + url + `}}}`, "may not be called"},
		{remote(url + `, "prefix": "gateway"`), "the gateway's own prefix"},
		{remote(url + `, "prefix": "` + strings.Repeat("x", 41) + `"`), "longer than 40"},
		{remote(`"type": "stdio", ` + url), `has no "command"`},
		{remote(`"type": "stdio", "command": "npx", ` + url), "exclude each other"},
		{remote(`"url": "https://r.example.com:99999/mcp"`), "must be an http or https URL"},
		{remote(`"url": "https://r.example.com/mcp#"`), "fragment"},
		{remote(url + `, "timeout": "0s"`), "must be a duration"},
		{remote(url + `, "timeout": "5s", "timeout": "6s"`), "is there twice"},
		{remote(url + `, "headers": {"X-A": "1", "x-a": "2"}`), `the same header as "X-A"`},
		{remote(url + `, "auth": "none"`), "must be an object"},
		{remote(url + `, "auth": {"type": ""}`), "must be one of oauth, forward, exchange, idJag, clientCredentials, none"},
		{remote(url + `, "auth": {"issuer": "https://as.example.com#"}`), "without query"},
		{remote(url + `, "auth": {"clientId": "i", "callbackPath": "/.well-known/x"}`), "well-known"},
		{remote(``), `neither "url" nor "command"`},
		{remote(`"type": "http"`), `has no "url"`},
		{remote(`"type": "carrier pigeon", ` + url), "must be http, sse or stdio"},
		{remote(`"url": 7`), "must be a text"},
		{remote(`"url": null`), "not null"},
		{remote(`"url": "r.example.com"`), "must be an http or https URL"},
		{remote(`"url": "ftp://r.example.com"`), "must be an http or https URL"},
		{remote(`"url": "https://user:pass@r.example.com"`), "user name"},
		{remote(`"url": "https://r.example.com/#x"`), "fragment"},
		{remote(`"url": "http://r.example.com/mcp"`), "plain http"},
		{remote(`"url": "http://10.0.0.1/mcp", "allowAddresses": ["192.168.0.0/16"]`), "plain http"},
		{remote(url + `, "command": "npx", "type": "http"`), "exclude each other"},
		{remote(url + `, "timeout": "soon"`), "must be a duration"},
		{remote(url + `, "timeout": "2h"`), "must be a duration"},
		{remote(url + `, "disabled": "no"`), "must be true or false"},
		{remote(url + `, "headers": {"a b": "c"}`), "not a header's"},
		{remote(url + `, "headers": {"X": "a\nb"}`), "control characters"},
		{remote(url + `, "headers": ["X"]`), "must be an object"},
		{remote(url + `, "tools": {"alow": []}`), `did you mean "allow"?`},
		{remote(url + `, "tools": {"deny": ["["]}`), "is not a pattern"},
		{remote(url + `, "allowAddresses": ["10.0.0.0/99"]`), "must be an address or a network"},
		{remote(url + `, "tls": {"cert": "c.pem"}`), "go together"},
		{remote(url + `, "tls": {"insecure": true}`), "unknown key"},
		{remote(url + `, "auth": {"type": "magic"}`), "must be one of oauth"},
		{remote(url + `, "auth": {"type": "exchange", "audience": "x"}`), "exchange needs gateway.auth"},
		{remote(url + `, "auth": {"type": "idJag", "clientId": "x"}`), "idJag needs gateway.auth"},
		{remote(url + `, "auth": {"type": "forward", "audience": "x"}`), "forward needs gateway.auth"},
		{sso(`"type": "exchange"`, login), "whom the token is to be for"},
		{sso(`"type": "exchange", "audience": "x", "tokenEndpoint": "https://x.example.com/token"`, login), "\"clientId\" of its own"},
		{sso(`"type": "exchange", "audience": "x", "issuer": "https://x.example.com"`, login), "\"clientId\" of its own"},
		{sso(`"type": "exchange", "audience": "x", "clientId": "i", "callbackPath": "/c"`, login), "no effect where the type is exchange"},
		{sso(`"type": "exchange", "audience": "x", "subjectTokenType": "refreshToken"`, login), "must be one of idToken, accessToken"},
		{sso(`"type": "exchange", "audience": "x", "requestedTokenType": "x"`, login), "must be one of accessToken, idToken, jwt"},
		{sso(`"type": "idJag"`, login), "needs \"clientId\""},
		{sso(`"type": "idJag", "clientId": "i", "connectorId": "x"`, login), "no effect where the type is idJag"},
		{sso(`"type": "forward"`, login), "whom a token must be for"},
		{sso(`"type": "forward", "audience": "x", "resource": "https://x.example.com"`, login), "no effect where the type is forward"},
		{sso(`"type": "forward", "audience": "x"`, `"clientId": "gw"`), "identity provider where users log in"},
		{sso(`"type": "forward", "audience": "x"`, `"issuer": "https://idp.example.com"`), "own client at that provider"},
		{sso(`"type": "forward", "audience": "x"`, `"issuer": "https://idp.example.com", "idTokenFile": "f", "clientSecret": "s"`), "own client at that provider"},
		{sso(`"type": "forward", "audience": "x"`, `"issuer": "http://idp.example.com", "clientId": "gw"`), "plain http"},
		{sso(`"type": "forward", "audience": "x"`, login+`, "scopes": ["profile"]`), "must hold \"openid\""},
		{sso(`"type": "forward", "audience": "x"`, login+`, "allowAddresses": ["x"]`), "must be an address"},
		{remote(url + `, "auth": {"audience": "x"}`), "no effect where the type is oauth"},
		{remote(url + `, "auth": {"clientId": "i", "privateKeyFile": "x"}`), "no effect where the type is oauth"},
		{remote(url + `, "auth": {"tokenEndpoint": "https://x.example.com"}`), "no effect where the type is oauth"},
		{remote(url + `, "auth": {"type": "clientCredentials"}`), "needs \"clientId\""},
		{remote(url + `, "auth": {"type": "clientCredentials", "clientId": "i"}`), "clientSecretFile"},
		{remote(url + `, "auth": {"type": "clientCredentials", "clientId": "i", "clientSecret": "s", "callbackPath": "/c"}`), "no effect where the type is clientCredentials"},
		{remote(url + `, "auth": {"type": "clientCredentials", "clientId": "i", "clientSecret": "s", "privateKeyFile": "k"}`), "exclude each other"},
		{remote(url + `, "auth": {"type": "clientCredentials", "clientId": "i", "clientSecret": "s", "tokenEndpointAuthMethod": "private_key_jwt"}`), "needs \"privateKeyFile\""},
		{remote(url + `, "auth": {"type": "clientCredentials", "clientId": "i", "privateKeyFile": "k", "tokenEndpointAuthMethod": "client_secret_post"}`), "needs a client secret"},
		{remote(url + `, "auth": {"type": "clientCredentials", "clientId": "i", "clientSecret": "s", "tokenEndpoint": "http://as.example.com/token"}`), "plain http"},
		{remote(url + `, "auth": {"type": "clientCredentials", "clientId": "i", "clientSecret": "s", "expectedIssuer": "nonsense"}`), "URL of an issuer"},
		{remote(url + `, "auth": {"type": "clientCredentials", "clientId": "i", "clientSecret": "s", "resource": "nonsense"}`), "absolute URI"},
		{remote(url + `, "auth": {"type": "clientCredentials", "clientId": "i", "clientSecret": "s", "tls": {"ca": "x"}}`), "which is not set"},
		{remote(url + `, "auth": {"type": "clientCredentials", "clientId": "i", "clientSecret": "s", "tokenEndpoint": "https://x.example.com", "tls": {"cert": "x"}}`), "go together"},
		{remote(url + `, "auth": {"ssoGroup": "corp"}`), "no other remote is in"},
		{remote(url + `, "auth": {"type": "none", "clientId": "x"}`), "no effect"},
		{remote(url + `, "auth": {"issuer": "http://as.example.com"}`), "plain http"},
		{remote(url + `, "auth": {"issuer": "https://as.example.com?x=1"}`), "without query"},
		{remote(url + `, "auth": {"clientSecret": "x"}`), `no "clientId"`},
		{remote(url + `, "auth": {"clientId": "i", "clientSecret": "x", "clientSecretFile": "y"}`), "exclude each other"},
		{remote(url + `, "auth": {"clientId": "i", "tokenEndpointAuthMethod": "tls"}`), "client_secret_basic"},
		{remote(url + `, "auth": {"clientId": "i", "callbackPath": "callback"}`), "begins with a slash"},
		{remote(url + `, "auth": {"clientId": "i", "callbackPath": "/mcp"}`), "needs itself"},
		{remote(url + `, "auth": {"clientId": "i", "callbackPath": "/oauth/callback/r"}`), "needs itself"},
		{remote(url + `, "auth": {"scopes": ["a b"]}`), "is not one scope"},
		{remote(url + `, "auth": {"clientID": "i"}`), `did you mean "clientId"?`},
		{remote(url + `, "headers": {"X": "${NOT_SET}"}`), "NOT_SET is not set"},
		{settings(`"listen": "8080"`), "must be host:port"},
		{settings(`"listen": "127.0.0.1:99999"`), "must be host:port"},
		{settings(`"listen": "127.0.0.1:http"`), "must be host:port"},
		{settings(`"listen": ":8080"`), "other machines"},
		{settings(`"listen": "0.0.0.0:8080"`), "other machines"},
		{settings(`"listen": "[::]:8080"`), "other machines"},
		{settings(`"listen": "gw.example.com:8080"`), "other machines"},
		{settings(`"publicUrl": "http://gw.example.com"`), "plain http"},
		{settings(`"publicUrl": "https://gw.example.com/path"`), "must be an origin"},
		{settings(`"publicUrl": "https://gw.example.com?"`), "must be an origin"},
		{settings(`"publicUrl": "https://gw.example.com#"`), "must be an origin"},
		{settings(`"allowedHosts": ["a b"]`), "must be a host"},
		{settings(`"sessions": "many"`), "isolated, shared"},
		{settings(`"sessions": ""`), "isolated, shared"},
		{settings(`"proxy": "nonsense"`), "must be a URL"},
		{settings(`"proxy": "ftp://proxy.example.com"`), "must be a URL"},
		{settings(`"auth": {` + login + `}, "sessions": "shared"`), "no effect"},
		{settings(`"auth": {` + login + `, "identityClaims": ["email"]}`), "may change"},
		{settings(`"auth": {` + login + `, "identityClaims": ["upn"]}`), "upn may change"},
		{settings(`"auth": {` + login + `, "identityClaims": ["sub", "unique_name"]}`), "unique_name may change"},
		{settings(`"auth": {` + login + `, "identityClaims": ["username"]}`), "username may change"},
		{settings(`"auth": {` + login + `, "identityClaims": ["phone_number"]}`), "phone_number may change"},
		{settings(`"auth": {` + login + `, "identityClaims": [""]}`), "the name of a claim"},
		{settings(`"auth": {` + login + `, "idTokenFile": "f", "audience": "x"}`), "stands for everybody"},
		{settings(`"auth": {` + login + `}, "listen": "0.0.0.0:8080"`), "needs gateway.publicUrl"},
		{settings(`"auth": {` + login + `, "idTokenFile": "f"}, "listen": "0.0.0.0:8080", "publicUrl": "https://gw.example.com"`), "needs gateway.auth"},
		{settings(`"trustedProxies": ["proxy.example.com"]`), "an address or a network"},
		{settings(`"tls": {"cert": "c.pem"}`), "go together"},
		{settings(`"metrics": {"listen": "9090"}`), "must be host:port"},
		{settings(`"audit": {"path": "a.log"}`), "unknown key"},
		{settings(`"store": {"type": "redis", "keyEnv": "K"}`), `needs the "url"`},
		{settings(`"store": {"type": "redis", "url": "redis://h"}`), `needs a "keyFile" or "keyEnv"`},
		{settings(`"store": {"type": "redis", "url": "redis://h", "keyEnv": "K", "path": "x"}`), "is of the file store"},
		{settings(`"store": {"type": "redis", "url": "redis://h", "keyEnv": "K", "prefix": "{x}"}`), "without braces"},
		{settings(`"store": {"type": "file", "url": "redis://h"}`), "has settings of a Redis store"},
		{settings(`"store": {"type": "cloud"}`), "must be memory, file or redis"},
		{settings(`"store": {"keyFile": "k"}`), `add "type": "file"`},
		{settings(`"store": {"type": "file", "keyFile": "k", "keyEnv": "K"}`), "exclude each other"},
		{settings(`"store": {"type": "memory", "keyring": true}`), `add "type": "file"`},
		{settings(`"store": {"type": "file", "keyring": true, "keyEnv": "K"}`), "excludes"},
		{settings(`"oauth": {"metadataPath": "/oauth/callback"}`), "where callbacks arrive"},
		{settings(`"oauth": {"callbackPath": "/a\tb"}`), "plain path"},
		{settings(`"oauth": {"callbackPath": "/.well-known/x"}`), "well-known"},
		{settings(`"oauth": {"clientMetadataUrl": "https://c.example.com"}`), "with a path"},
		{settings(`"oauth": {"clientMetadataUrl": "http://c.example.com/c.json"}`), "https URL"},
		{settings(`"oauth": {"callbackPort": 70000}`), "must be a port"},
		{settings(`"limits": {"callbackPerMinute": 0}`), "from 1 to"},
		{settings(`"limits": {"sessions": 1.5}`), "must be a whole number"},
		{settings(`"limits": {"callsInFlight": 0}`), "from 1 to"},
		{settings(`"limits": {"callsPerSecond": -1}`), "from 0 to"},
		{settings(`"log": {"level": "loud"}`), "debug, info"},
		{settings(`"unknown": 1`), "unknown key"},
		{strings.Repeat(`{"a":`, 200), "nested more than"},
		{`{/* " */ "a": ` + strings.Repeat(`[`, 200), "nested more than"},
		{"{// \"\n" + strings.Repeat(`[`, 200), "nested more than"},
	} {
		got := problemsOf(t, tt.config)
		if len(got) != 1 || !strings.Contains(got[0], tt.want) {
			t.Errorf("%s\n got %q\nwant one problem with %q", tt.config, got, tt.want)
		}
	}
}

// TestConfigProblemsAtOnce: all problems, each with its line, none with a secret.
func TestConfigProblemsAtOnce(t *testing.T) {
	got := problemsOf(t, `{
  // a comment
  "mcpServers": {
    "a": {
      "url": "nonsense-${SECRET}",
      "timeout": "soon",
    },
    "b": {"url": "https://b.example.com/mcp", "auth": {"tipe": "none"}},
    "b": {"url": "https://b.example.com/mcp"}
  },
  "gateway": {
    "listen": "0.0.0.0:1",
    "limits": {"sessions": -1}
  }
}`)
	want := []string{"5: mcpServers.a.url", "6: mcpServers.a.timeout", "8: mcpServers.b.auth.tipe", "9: mcpServers.b", "12: gateway.listen", "13: gateway.limits.sessions"}
	if len(got) != len(want) {
		t.Fatalf("got %q", got)
	}
	for i := range want {
		if !strings.HasPrefix(got[i], want[i]+": ") {
			t.Errorf("problem %d is %q, want %q", i, got[i], want[i])
		}
		if strings.Contains(got[i], "canary") {
			t.Errorf("a secret is in %q", got[i])
		}
	}
}

// TestConfigProblemsOfOneValue: one value's or one object's problems do not hide each other.
func TestConfigProblemsOfOneValue(t *testing.T) {
	for config, want := range map[string]int{
		remote(`"url": "https://${NOT_A}/${NOT_B}"`): 2,
		remote(`"url": "https://r.example.com", "auth": {"clientSecret": "x", "clientSecretFile": "y", "issuer": "nonsense"}`): 3,
	} {
		if got := problemsOf(t, config); len(got) != want {
			t.Errorf("%s: %d problems, want %d: %q", config, len(got), want, got)
		}
	}
}

// TestConfigErrorsKeepSecrets: what stands in the file or comes from a
// variable is not repeated, wherever it was put by mistake.
func TestConfigErrorsKeepSecrets(t *testing.T) {
	const url = `"url": "https://r.example.com/mcp"`
	for _, config := range []string{
		`{"mcpServers": {"r": {"url": canary-secret}}}`,
		`{"mcpServers": {"r": {"url": "canary-secret\q"}}}`,
		remote(`"url": "${SECRET}"`), remote(`"url": "https://x:${SECRET}@r.example.com"`), remote(`"url": "https://r.example.com:${SECRET}"`),
		remote(`"type": "${SECRET}", ` + url), remote(url + `, "timeout": "${SECRET}"`), remote(url + `, "prefix": "${SECRET}` + strings.Repeat("x", 40) + `"`),
		remote(url + `, "headers": {"X": "${SECRET}\n"}`), remote(url + `, "allowAddresses": ["${SECRET}"]`), remote(url + `, "tools": {"deny": ["[${SECRET}"]}`),
		remote(url + `, "auth": {"type": "${SECRET}"}`), remote(url + `, "auth": {"issuer": "${SECRET}"}`), remote(url + `, "auth": {"clientSecret": "${SECRET}"}`),
		remote(url + `, "auth": {"clientId": "i", "tokenEndpointAuthMethod": "${SECRET}"}`), remote(url + `, "auth": {"scopes": ["${SECRET} x"]}`),
		remote(url + `, "auth": {"clientId": "i", "callbackPath": "${SECRET}"}`),
		settings(`"listen": "${SECRET}:80"`), settings(`"listen": "0.0.0.0:${SECRET}"`), settings(`"publicUrl": "${SECRET}"`), settings(`"allowedHosts": ["${SECRET} x"]`),
		settings(`"sessions": "${SECRET}"`), settings(`"proxy": "ftp://u:${SECRET}@p"`), settings(`"store": {"type": "${SECRET}"}`), settings(`"log": {"level": "${SECRET}"}`),
		settings(`"oauth": {"callbackPath": "${SECRET}"}`), settings(`"oauth": {"clientMetadataUrl": "${SECRET}"}`), settings(`"store": {"url": "${SECRET}"}`),
	} {
		_, _, err := ParseConfig("c.json", []byte(config), env)
		if err == nil {
			t.Errorf("accepted: %s", config)
		} else if strings.Contains(err.Error(), "canary") {
			t.Errorf("%s\n tells the secret: %v", config, err)
		}
	}
}

// TestConfigNotRunning: what does not run is not held to variables that are not set.
func TestConfigNotRunning(t *testing.T) {
	for _, members := range []string{
		`"url": "${NOT_SET}", "disabled": true, "auth": {"clientSecret": "${NOT_SET}"}`,
		`"command": "${NOT_SET}", "env": {"A": "${NOT_SET}"}, "disabled": true`,
	} {
		c, notes, err := ParseConfig("c.json", []byte(remote(members)), env)
		if err != nil {
			t.Errorf("%s: %v", members, err)
			continue
		}
		if len(c.Running()) != 0 || !strings.Contains(fmt.Sprint(notes), "NOT_SET is not set") {
			t.Errorf("%s: running %v, notes %v", members, c.Running(), notes)
		}
	}
}

// TestConfigClientForms: what clients write in their own way.
func TestConfigClientForms(t *testing.T) {
	for members, url := range map[string]string{
		`"serverUrl": "https://r.example.com/w"`:                                   "https://r.example.com/w",
		`"httpUrl": "https://r.example.com/g", "timeout": 5000, "tools": ["a"]`:    "https://r.example.com/g",
		`"serverUrl": "https://other.example.com", "url": "https://r.example.com"`: "https://r.example.com",
		`"url": "https://r.example.com", "auth": "oauth"`:                          "https://r.example.com",
	} {
		c, notes, err := ParseConfig("c.json", []byte("\ufeff"+remote(members)), env)
		if err != nil {
			t.Errorf("%s: %v", members, err)
			continue
		}
		if s := c.Servers[0]; s.URL.String() != url || s.Type != "http" || s.Auth.Type != "oauth" || len(notes) == 0 {
			t.Errorf("%s: %+v, notes %v", members, s, notes)
		}
	}
}

// login is a gateway.auth, and sso a config with one remote that uses one.
const login = `"issuer": "https://idp.example.com", "clientId": "gw"`

func sso(auth, login string) string {
	return `{"mcpServers": {"r": {"url": "https://r.example.com/mcp", "auth": {` + auth + `}}}, "gateway": {"auth": {` + login + `}}}`
}

// TestConfigLater: each key that comes later is refused, unless it changes nothing.
func TestConfigLater(t *testing.T) {
	inRemote := func(members string) string {
		return remote(`"url": "https://r.example.com/mcp", "auth": {` + members + `}`)
	}
	inside := func(object string) func(string) string {
		return func(members string) string { return settings(`"` + object + `": {` + members + `}`) }
	}
	for typ, wrap := range map[reflect.Type]func(string) string{
		reflect.TypeFor[authFile](): inRemote, reflect.TypeFor[settingsFile](): settings,
		reflect.TypeFor[storeFile](): inside("store"), reflect.TypeFor[Limits](): inside("limits"),
	} {
		for field := range typ.Fields() {
			if field.Tag.Get("later") == "" {
				continue
			}
			key := field.Tag.Get("json")
			on := map[reflect.Kind]string{reflect.String: `"x"`, reflect.Int: "7", reflect.Bool: "true", reflect.Slice: `["x"]`, reflect.Pointer: "{}"}[field.Type.Kind()]
			if field.Type.Kind() == reflect.Struct {
				on = fmt.Sprintf(`{%q: "x"}`, field.Type.Field(0).Tag.Get("json"))
			}
			got := problemsOf(t, wrap(fmt.Sprintf("%q: %s", key, on)))
			if len(got) != 1 || !strings.Contains(got[0], key+": not supported yet") {
				t.Errorf("%s: %s gives %q", key, on, got)
			}
		}
	}
	off := settings(`"sse": false, "trustedProxies": [], "tls": {}, "metrics": {"listen": ""}, "audit": {"file": ""},
		"store": {"type": "memory", "path": "", "url": "", "prefix": "gatehouse:", "ca": "", "keyFile": "", "keyEnv": "", "keyring": false},
		"limits": {"callsInFlight": 64, "callsPerSecond": 0}`)
	if got := problemsOf(t, off); got != nil {
		t.Errorf("the documented defaults are refused: %q", got)
	}
}

func TestConfigValues(t *testing.T) {
	c, notes, err := ParseConfig("/etc/gatehouse/c.json", []byte(`{
  "$schema": "./config.schema.json",
  "mcpServers": {
    "zebra": {"type": "streamable-http", "url": "https://z.example.com/${TEAM}/mcp", "headers": {"X-Team": "${env:TEAM}", "X-Key": "${SECRET}"}, "timeout": "5s", "prefix": ""},
    "ant": {"url": "http://10.1.2.3/mcp", "allowAddresses": ["10.0.0.0/8", "192.168.1.1"], "autoApprove": ["x"], "alowAddresses": [], "timeout": 600},
    "off": {"url": "https://${NOT_SET}.example.com", "disabled": true},
    "files": {"command": "npx", "args": ["-y", "${TEAM}"], "cwd": "work", "env": {"A": "${EMPTY:-b}"}},
    "old": {"type": "sse", "url": "https://old.example.com/sse"},
    "odd": {"url": "https://odd.example.com/", "headers": {"A": "$$ ${TEAM ${NESTED} ${NOT_SET:-a:-b}"}},
  },
  "gateway": {"publicUrl": "https://gw.example.com/", "sse": false, "trustedProxies": [], "store": {"type": "memory"}, "oauth": {"enabled": false}},
}`), env)
	if err != nil {
		t.Fatal(err)
	}
	var names, running []string
	for _, s := range c.Servers {
		names = append(names, s.Name)
	}
	for _, s := range c.Running() {
		running = append(running, s.Name)
	}
	if got := strings.Join(names, " "); got != "zebra ant off files old odd" {
		t.Errorf("order: %s", got)
	}
	if got := strings.Join(running, " "); got != "zebra ant files old odd" {
		t.Errorf("running: %s", got)
	}
	zebra, odd := c.Servers[0], c.Servers[5]
	if zebra.URL.String() != "https://z.example.com/blue/mcp" || zebra.Headers["X-Team"].Value() != "blue" || zebra.Headers["X-Key"].Value() != "canary-secret" ||
		zebra.Timeout.String() != "5s" || zebra.ToolPrefix() != "" || zebra.Auth.Type != "oauth" {
		t.Errorf("zebra: %+v", zebra)
	}
	if files := c.Servers[3]; files.Type != "stdio" || files.Command != "npx" || strings.Join(files.Args, " ") != "-y blue" || files.Env["A"].Value() != "b" ||
		files.Dir != "work" || files.Auth.Type != "none" || files.Timeout.String() != "1m0s" {
		t.Errorf("files: %+v", files)
	}
	if got := odd.Headers["A"].Value(); got != "$$ ${TEAM ${TEAM} a:-b" {
		t.Errorf("odd expansions: %q", got)
	}
	if len(c.Servers[1].AllowAddresses) != 2 || c.Servers[1].Timeout.String() != "1m0s" {
		t.Errorf("ant: %+v", c.Servers[1])
	}
	if c.Gateway.PublicURL != "https://gw.example.com" || c.Gateway.Listen != "127.0.0.1:8080" || c.Gateway.OAuth.Enabled ||
		c.Gateway.Limits.CallbackPerMinute != 20 || c.Gateway.Limits.BodyBytes != 4<<20 || c.Gateway.OAuth.CallbackPath != "/oauth/callback" {
		t.Errorf("gateway: %+v", c.Gateway)
	}
	if got := c.Path("ca.pem"); got != "/etc/gatehouse/ca.pem" {
		t.Errorf("Path: %s", got)
	}
	said := fmt.Sprint(notes)
	for _, want := range []string{"autoApprove", `did you mean "allowAddresses"?`, "mcpServers.ant.timeout"} {
		if !strings.Contains(said, want) {
			t.Errorf("no note mentions %s: %s", want, said)
		}
	}
	if printed := fmt.Sprintf("%+v %#v", c, c); strings.Contains(printed, "canary") {
		t.Error("printing the config prints a secret")
	}
}

// Where a secret would go to whatever the remote names, there is a note; where the
// config says where it goes, none.
func TestSecretWithoutIssuer(t *testing.T) {
	for members, noted := range map[string]bool{
		`"clientId": "i", "clientSecret": "s"`:                                true,
		`"clientId": "i", "clientSecretFile": "f"`:                            true,
		`"type": "clientCredentials", "clientId": "i", "privateKeyFile": "k"`: true,
		`"type": "idJag", "clientId": "i", "clientSecret": "s"`:               true,
		`"clientId": "i"`: false,
		`"clientId": "i", "clientSecret": "s", "issuer": "https://as.example.com"`:                                           false,
		`"type": "clientCredentials", "clientId": "i", "clientSecret": "s", "tokenEndpoint": "https://as.example.com/token"`: false,
		`"type": "exchange", "audience": "a", "clientId": "i", "clientSecret": "s"`:                                          false,
	} {
		_, notes, err := ParseConfig("c.json", []byte(`{"mcpServers": {"r": {"url": "https://r.example.com/mcp", "auth": {`+members+`}}},
			"gateway": {"auth": {"issuer": "https://idp.example.com", "clientId": "g", "clientSecret": "s"}}}`), env)
		if err != nil {
			t.Fatalf("%s: %v", members, err)
		}
		if got := slices.ContainsFunc(notes, func(n Note) bool { return n.Path == "mcpServers.r.auth" && strings.Contains(n.Say, `"issuer"`) }); got != noted {
			t.Errorf("%s: notes %v", members, notes)
		}
	}
}

// An ID token is for the gateway's client: where another audience is to be
// forwarded, there is a note.
func TestForwardedAudience(t *testing.T) {
	for members, noted := range map[string]bool{
		`"audience": "wiki"`: true,
		`"audience": "wiki", "subjectTokenType": "idToken"`: true,
		`"audience": "g"`: false,
		`"audience": "wiki", "subjectTokenType": "accessToken"`: false,
	} {
		_, notes, err := ParseConfig("c.json", []byte(`{"mcpServers": {"r": {"url": "https://r.example.com/mcp", "auth": {"type": "forward", `+members+`}}},
			"gateway": {"auth": {"issuer": "https://idp.example.com", "clientId": "g"}}}`), env)
		if err != nil {
			t.Fatalf("%s: %v", members, err)
		}
		if got := slices.ContainsFunc(notes, func(n Note) bool { return n.Path == "mcpServers.r.auth.audience" }); got != noted {
			t.Errorf("%s: notes %v", members, notes)
		}
	}
}

// TestConfigFiles: what clients write is a valid config as it is, to the code
// and to the schema.
func TestConfigFiles(t *testing.T) {
	_, schema := readSchema(t)
	var files []string
	for _, pattern := range []string{"testdata/clients/*.json", "testdata/config/*.json"} {
		found, err := filepath.Glob(pattern)
		if err != nil || len(found) == 0 {
			t.Fatal("no configs at", pattern, err)
		}
		files = append(files, found...)
	}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		set := func(name string) (string, bool) { return "https://api.example.com", true }
		if _, _, err := ParseConfig(file, data, set); err != nil {
			t.Error(err)
		}
		plain, err := hujson.Standardize(data)
		if err != nil {
			t.Fatal(err)
		}
		var v any
		if err := json.Unmarshal(plain, &v); err != nil {
			t.Fatal(err)
		}
		if err := schema.Validate(v); err != nil {
			t.Errorf("the schema refuses %s: %v", file, err)
		}
	}
}

// TestReadmeConfig: the README's example is a valid config.
func TestReadmeConfig(t *testing.T) {
	readme, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(readme), "```jsonc\n")
	example, _, found := strings.Cut(rest, "```")
	if !found {
		t.Fatal("the README has no example config")
	}
	if _, notes, err := ParseConfig("README.md", []byte(example), env); err != nil || len(notes) > 0 {
		t.Errorf("%v, notes: %v", err, notes)
	}
}

func TestReadSecretFile(t *testing.T) {
	write := func(content string, mode os.FileMode) string {
		file := filepath.Join(t.TempDir(), "secret")
		if err := os.WriteFile(file, []byte(content), mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(file, mode); err != nil {
			t.Fatal(err)
		}
		return file
	}
	if s, err := ReadSecretFile(write("s3cret\r\n", 0o400)); err != nil || s.Value() != "s3cret" {
		t.Errorf("%v, %v", s.Value(), err)
	}
	if _, err := ReadSecretFile(write("canary", 0o644)); err == nil || !strings.Contains(err.Error(), "chmod 600") || strings.Contains(err.Error(), "canary") {
		t.Errorf("a loose file: %v", err)
	}
	for _, file := range []string{write("x", 0o640), write("x", 0o604), write("\n", 0o600), write(strings.Repeat("x", maxSecret+1), 0o600), t.TempDir(), "/nonexistent"} {
		if _, err := ReadSecretFile(file); err == nil {
			t.Errorf("%s was read", file)
		}
	}
}

// schemaKeys walks a schema along a Go type and compares both ways.
func schemaKeys(t *testing.T, at string, s *jsonschema.Schema, typ reflect.Type) {
	t.Helper()
	for typ.Kind() == reflect.Pointer {
		typ = typ.Elem()
	}
	if typ.Kind() != reflect.Struct {
		return
	}
	var supported []string
	for field := range typ.Fields() {
		if key := field.Tag.Get("json"); field.Tag.Get("later") == "" {
			supported = append(supported, key)
			property := s.Properties[key]
			if property == nil {
				t.Errorf("the schema lacks %s.%s", at, key)
				continue
			}
			if property.Description == "" {
				t.Errorf("%s.%s has no description", at, key)
			}
			if len(property.OneOf) > 0 {
				property = property.OneOf[0] // the other one is a client's form
			}
			if key != "mcpServers" {
				schemaKeys(t, at+"."+key, property, field.Type)
			}
		}
	}
	for key := range s.Properties {
		if !slices.Contains(supported, key) {
			t.Errorf("the schema has %s.%s, which the code does not take", at, key)
		}
	}
}

func readSchema(t *testing.T) (*jsonschema.Schema, *jsonschema.Resolved) {
	t.Helper()
	data, err := os.ReadFile("config.schema.json")
	if err != nil {
		t.Fatal(err)
	}
	var s jsonschema.Schema
	if err := json.Unmarshal(data, &s); err != nil {
		t.Fatal(err)
	}
	resolved, err := s.Resolve(nil)
	if err != nil {
		t.Fatal(err)
	}
	return &s, resolved
}

// TestSchema holds the schema to the code: the same keys in both directions,
// and the same verdict on examples.
func TestSchema(t *testing.T) {
	s, resolved := readSchema(t)
	schemaKeys(t, "", s, reflect.TypeFor[configFile]())
	schemaKeys(t, "mcpServers.*", s.Properties["mcpServers"].AdditionalProperties, reflect.TypeFor[serverFile]())
	validate := func(config string) error {
		var v any
		if err := json.Unmarshal([]byte(config), &v); err != nil {
			t.Fatal(err)
		}
		return resolved.Validate(v)
	}
	good := []string{
		sso(`"type": "exchange", "clientId": "i", "clientSecretFile": "s", "tokenEndpoint": "https://dex.example.com/token", "connectorId": "a", "subjectTokenType": "accessToken", "requestedTokenType": "jwt", "scopes": ["openid"]`,
			`"issuer": "https://idp.example.com", "clientId": "gw", "clientSecret": "s", "scopes": ["openid"], "allowAddresses": ["10.0.0.1"]`),
		sso(`"type": "idJag", "clientId": "i", "clientSecret": "s", "issuer": "https://as.example.com"`, `"issuer": "https://idp.example.com", "idTokenFile": "f"`),
		sso(`"type": "forward", "audience": "a"`, login),
		remote(`"url": "https://r.example.com/mcp", "auth": {"type": "clientCredentials", "clientId": "i", "privateKeyFile": "k", "tokenEndpointAuthMethod": "private_key_jwt", "issuer": "https://as.example.com", "expectedIssuer": "https://as.example.com", "tokenEndpoint": "https://as.example.com/token", "audience": "a", "resource": "https://r.example.com", "tls": {"ca": "c", "cert": "c", "key": "k", "serverName": "s"}}`),
		remote(`"url": "https://r.example.com/mcp", "type": "streamableHttp", "tools": {"allow": ["a*"]}, "auth": {"type": "oauth", "clientId": "i", "clientSecretFile": "s", "tokenEndpointAuthMethod": "client_secret_post", "scopes": ["a"]}, "someClientsKey": 1`),
		remote(`"command": "npx", "args": ["x"], "env": {"A": "b"}, "cwd": "."`),
		settings(`"listen": "127.0.0.1:1", "sessions": "shared", "log": {"level": "debug", "format": "json"}, "store": {"type": "file", "path": "p", "keyFile": "k"}, "oauth": {"enabled": true, "callbackPort": 1}, "limits": {"sessions": 5}`),
	}
	for _, config := range good {
		if err := validate(config); err != nil {
			t.Errorf("the schema refuses %s: %v", config, err)
		}
		if problems := problemsOf(t, config); problems != nil {
			t.Errorf("the code refuses %s: %q", config, problems)
		}
	}
	for _, config := range []string{
		`{}`, `{"mcpServers": {"r": {}}}`, `{"mcpServers": {"a/b": {"url": "https://x.example.com"}}}`, `{"mcpServers": {"gateway": {"url": "https://x.example.com"}}}`,
		`{"mcpServers": {"r": {"url": "https://x.example.com"}}, "nonsense": 1}`, remote(`"url": "https://x.example.com", "auth": "none"`), remote(`"url": 7`), remote(`"url": "https://x.example.com", "type": "x"`),
		remote(`"url": "https://x.example.com", "auth": {"type": "magic"}`), remote(`"url": "https://x.example.com", "auth": {"x": 1}`),
		settings(`"sessions": "x"`), settings(`"log": {"level": "x"}`), settings(`"log": {"format": "x"}`), settings(`"auth": {"x": 1}`), settings(`"limits": {"sessions": 0}`), settings(`"store": {"type": "etcd"}`),
	} {
		if validate(config) == nil {
			t.Errorf("the schema takes %s", config)
		}
		if problemsOf(t, config) == nil {
			t.Errorf("the code takes %s", config)
		}
	}
}

// TestSchemaValues: the schema's enums are the code's, and its defaults change nothing.
func TestSchemaValues(t *testing.T) {
	s, _ := readSchema(t)
	entry := s.Properties["mcpServers"].AdditionalProperties
	bare, _, err := ParseConfig("c.json", []byte(settings("")), env)
	if err != nil {
		t.Fatal(err)
	}
	// What the code takes where its message does not list it as it is.
	taken := map[string][]string{
		"mcpServers.*.type":                         {"http", "streamable-http", "streamableHttp", "sse", "stdio", "local"},
		"mcpServers.*.auth.type":                    {"oauth", "forward", "exchange", "idJag", "clientCredentials", "none"},
		"mcpServers.*.auth.tokenEndpointAuthMethod": {"client_secret_basic", "client_secret_post", "private_key_jwt", "none"},
		"gateway.store.type":                        {"file", "memory", "redis"},
	}
	enums, defaults := 0, 0
	var walk func(at string, s *jsonschema.Schema, wrap func(string) string)
	walk = func(at string, s *jsonschema.Schema, wrap func(string) string) {
		for key, property := range s.Properties {
			here := at + "." + key
			member := func(value string) string { return wrap(fmt.Sprintf("%q: %s", key, value)) }
			if len(property.OneOf) > 0 {
				property = property.OneOf[0]
			}
			walk(here, property, func(members string) string { return member("{" + members + "}") })
			for _, value := range property.Enum {
				enums++
				given := fmt.Sprintf("%q", value)
				if value == "redis" {
					given += `, "url": "redis://redis.example.com", "keyEnv": "KEYS"`
				}
				if got := problemsOf(t, member(given)); got != nil {
					t.Errorf("the code refuses %s %q: %q", here, value, got)
				}
			}
			if property.Enum != nil {
				got := problemsOf(t, member(`"nonsense"`))
				if len(got) != 1 {
					t.Errorf("%s \"nonsense\" gives %q", here, got)
					continue
				}
				want, said := taken[here]
				if _, list, ok := strings.Cut(got[0], "must be one of "); ok && !said {
					want = strings.Split(list, ", ")
				}
				var has []string
				for _, value := range property.Enum {
					has = append(has, value.(string))
				}
				slices.Sort(has)
				slices.Sort(want)
				if !slices.Equal(has, want) {
					t.Errorf("%s: the schema has %q, the code %q", here, has, want)
				}
			}
			if property.Default != nil {
				defaults++
				c, _, err := ParseConfig("c.json", []byte(member(string(property.Default))), env)
				if err != nil {
					t.Errorf("the code refuses the default of %s: %v", here, err)
				} else if !reflect.DeepEqual(c, bare) {
					t.Errorf("the schema's default of %s is not the code's", here)
				}
			}
		}
	}
	walk("gateway", s.Properties["gateway"], settings)
	walk("mcpServers.*", entry, func(members string) string {
		// stdio and its like need a command, everything else a URL.
		if strings.Contains(members, `"type": "stdio"`) || strings.Contains(members, `"type": "local"`) {
			return remote(`"command": "x", ` + members)
		}
		switch {
		case strings.Contains(members, "tokenEndpointAuthMethod") && strings.Contains(members, "private_key_jwt"):
			members = strings.Replace(members, "{", `{"type": "clientCredentials", "clientId": "i", "privateKeyFile": "k", `, 1)
		case strings.Contains(members, "tokenEndpointAuthMethod"):
			members = strings.Replace(members, "{", `{"clientId": "i", `, 1)
		case strings.Contains(members, "clientCredentials"):
			members = strings.Replace(members, "{", `{"clientId": "i", "clientSecret": "s", `, 1)
		case strings.Contains(members, "TokenType"):
			members = strings.Replace(members, "{", `{"type": "exchange", "audience": "a", `, 1)
		case strings.Contains(members, `"forward"`), strings.Contains(members, `"exchange"`):
			members = strings.Replace(members, "{", `{"audience": "a", `, 1)
		case strings.Contains(members, `"idJag"`):
			members = strings.Replace(members, "{", `{"clientId": "i", `, 1)
		}
		if strings.Contains(members, `"audience": "a"`) || strings.Contains(members, `"idJag"`) {
			auth, _, _ := strings.Cut(members, "}")
			_, auth, _ = strings.Cut(auth, "{")
			return sso(auth, login)
		}
		return remote(`"url": "https://r.example.com/mcp", ` + members)
	})
	if enums < 15 || defaults < 15 {
		t.Errorf("walked %d enum values and %d defaults only", enums, defaults)
	}
}

// FuzzParseConfig: never a panic, never a problem without a place, and a
// config that is accepted has routes that can be served.
func FuzzParseConfig(f *testing.F) {
	f.Add(settings(`"limits": {"sessions": 5}`))
	f.Add(settings(`"oauth": {"callbackPath": "/a/b", "metadataPath": "/c"}`))
	f.Add(remote(`"url": "https://${TEAM:-x}.example.com", "auth": {"scopes": ["a"]}, "tools": {"deny": ["*"]}`))
	f.Add(remote(`"url": "https://r.example.com", "auth": {"clientId": "i", "callbackPath": "/cb"}, "headers": {"A": "b"}`))
	f.Add(remote(`"serverUrl": "http://[::1]:1/", "auth": "oauth", "timeout": 5, "allowAddresses": ["10.0.0.0/8"]`))
	f.Add(`{"mcpServers": {"a": {"command": "x", "env": {"A": "${B}"}}, /* c */ "a": null,},}`)
	f.Fuzz(func(t *testing.T, config string) {
		if problemsOf(t, config) != nil {
			return
		}
		c, _, err := ParseConfig("c.json", []byte(config), env)
		if err != nil {
			t.Fatal(err)
		}
		mux := http.NewServeMux()
		nothing := func(http.ResponseWriter, *http.Request) {}
		routes := map[string]bool{}
		for _, server := range c.Running() {
			if path := server.Auth.CallbackPath; path != "" {
				routes[path] = true
			}
		}
		routes[c.Gateway.OAuth.CallbackPath] = true
		for route := range routes {
			mux.HandleFunc(route, nothing)
		}
		mux.HandleFunc(c.Gateway.OAuth.CallbackPath+"/{remote}", nothing)
		mux.HandleFunc(c.Gateway.OAuth.MetadataPath, nothing)
		mux.HandleFunc("/connect/{flow}", nothing)
		mux.HandleFunc("/mcp", nothing)
	})
}

// TestPublicURLIsAnOrigin: it is what browsers call it, or every form would come
// from another origin.
func TestPublicURLIsAnOrigin(t *testing.T) {
	for given, want := range map[string]string{
		"https://gw.example.com:443": "https://gw.example.com", "https://gw.example.com:443/": "https://gw.example.com",
		"https://gw.example.com:8443": "https://gw.example.com:8443", "https://gw.example.com:80": "https://gw.example.com:80",
		"http://127.0.0.1:80": "http://127.0.0.1", "https://[2001:db8::443]": "https://[2001:db8::443]", "https://[2001:db8::1]:443": "https://[2001:db8::1]",
	} {
		c, _, err := ParseConfig("c.json", []byte(settings(`"publicUrl": "`+given+`"`)), func(string) (string, bool) { return "", false })
		if err != nil {
			t.Fatal(err)
		}
		if c.Gateway.PublicURL != want {
			t.Errorf("%s became %s, want %s", given, c.Gateway.PublicURL, want)
		}
	}
}
