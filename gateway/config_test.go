package gateway

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/google/jsonschema-go/jsonschema"
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
		{``, "not valid JSON"},
		{`[]`, "must be an object"},
		{`{}`, "names no remote"},
		{`{"mcpServers": {}}`, "names no remote"},
		{`{"servers": {"r": {` + url + `}}}`, "rename the key to mcpServers"},
		{`{"mcpServers": {"r": {` + url + `}}, "gatway": {}}`, `did you mean "gateway"?`},
		{`{"mcpServers": {"r": {` + url + `}, "r": {` + url + `}}}`, "is there twice: first in line 1"},
		{`{"mcpServers": {"": {` + url + `}}}`, "1 to 64 characters"},
		{`{"mcpServers": {"a/b": {` + url + `}}}`, "1 to 64 characters"},
		{`{"mcpServers": {"gateway": {` + url + `}}}`, "may not be called"},
		{remote(url + `, "prefix": "gateway"`), "the gateway's own prefix"},
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
		{remote(url + `, "auth": {"type": "magic"}`), "must be oauth or none"},
		{remote(url + `, "auth": {"type": "exchange"}`), "not supported yet"},
		{remote(url + `, "auth": {"audience": "x"}`), "not supported yet"},
		{remote(url + `, "auth": {"ssoGroup": "corp"}`), "not supported yet"},
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
		{settings(`"listen": ":8080"`), "other machines"},
		{settings(`"listen": "0.0.0.0:8080"`), "other machines"},
		{settings(`"listen": "[::]:8080"`), "other machines"},
		{settings(`"listen": "gw.example.com:8080"`), "other machines"},
		{settings(`"publicUrl": "http://gw.example.com"`), "plain http"},
		{settings(`"publicUrl": "https://gw.example.com/path"`), "must be an origin"},
		{settings(`"allowedHosts": ["a b"]`), "must be a host"},
		{settings(`"sessions": "many"`), "isolated, shared"},
		{settings(`"proxy": "nonsense"`), "must be a URL"},
		{settings(`"auth": {"issuer": "https://idp.example.com"}`), "not supported yet"},
		{settings(`"auth": {}`), "not supported yet"},
		{settings(`"sse": true`), "not supported yet"},
		{settings(`"tls": {"cert": "c", "key": "k"}`), "not supported yet"},
		{settings(`"trustedProxies": ["10.0.0.0/8"]`), "not supported yet"},
		{settings(`"metrics": {"listen": "127.0.0.1:9"}`), "not supported yet"},
		{settings(`"audit": {"file": "a.log"}`), "not supported yet"},
		{settings(`"store": {"type": "redis"}`), "not supported yet"},
		{settings(`"store": {"type": "cloud"}`), "must be memory or file"},
		{settings(`"store": {"keyFile": "k"}`), `add "type": "file"`},
		{settings(`"store": {"type": "file", "keyFile": "k", "keyEnv": "K"}`), "exclude each other"},
		{settings(`"store": {"type": "file", "keyring": true}`), "not supported yet"},
		{settings(`"oauth": {"metadataPath": "/oauth/callback"}`), "where callbacks arrive"},
		{settings(`"oauth": {"clientMetadataUrl": "https://c.example.com"}`), "with a path"},
		{settings(`"oauth": {"clientMetadataUrl": "http://c.example.com/c.json"}`), "https URL"},
		{settings(`"oauth": {"callbackPort": 70000}`), "must be a port"},
		{settings(`"limits": {"callbackPerMinute": 0}`), "from 1 to"},
		{settings(`"limits": {"sessions": 1.5}`), "must be a whole number"},
		{settings(`"limits": {"callsInFlight": 5}`), "not supported yet"},
		{settings(`"log": {"level": "loud"}`), "debug, info"},
		{settings(`"unknown": 1`), "unknown key"},
		{strings.Repeat(`{"a":`, 200), "nested more than"},
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

func TestConfigValues(t *testing.T) {
	c, notes, err := ParseConfig("/etc/gatehouse/c.json", []byte(`{
  "$schema": "./config.schema.json",
  "mcpServers": {
    "zebra": {"type": "streamable-http", "url": "https://z.example.com/${TEAM}/mcp", "headers": {"X-Team": "${env:TEAM}", "X-Key": "${SECRET}"}, "timeout": "5s", "prefix": ""},
    "ant": {"url": "http://10.1.2.3/mcp", "allowAddresses": ["10.0.0.0/8", "192.168.1.1"], "autoApprove": ["x"], "alowAddresses": [], "timeout": 600},
    "off": {"url": "https://${NOT_SET}.example.com", "disabled": true},
    "files": {"command": "npx", "args": ["-y", "${NOT_SET}"], "env": {"A": "${EMPTY:-b}"}},
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
	if got := strings.Join(running, " "); got != "zebra ant odd" {
		t.Errorf("running: %s", got)
	}
	zebra, odd := c.Servers[0], c.Servers[5]
	if zebra.URL.String() != "https://z.example.com/blue/mcp" || zebra.Headers["X-Team"].Value() != "blue" || zebra.Headers["X-Key"].Value() != "canary-secret" ||
		zebra.Timeout.String() != "5s" || zebra.ToolPrefix() != "" || zebra.Auth.Type != "oauth" {
		t.Errorf("zebra: %+v", zebra)
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
	for _, want := range []string{"autoApprove", `did you mean "allowAddresses"?`, "mcpServers.ant.timeout", "NOT_SET is not set"} {
		if !strings.Contains(said, want) {
			t.Errorf("no note mentions %s: %s", want, said)
		}
	}
	if printed := fmt.Sprintf("%+v %#v", c, c); strings.Contains(printed, "canary") {
		t.Error("printing the config prints a secret")
	}
}

// TestClientConfigs: what clients write is a valid config as it is.
func TestClientConfigs(t *testing.T) {
	files, err := filepath.Glob("testdata/clients/*.json")
	if err != nil || len(files) == 0 {
		t.Fatal("no client configs", err)
	}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := ParseConfig(file, data, env); err != nil {
			t.Error(err)
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
	for _, file := range []string{write("x", 0o640), write("x", 0o604), write("\n", 0o600), "/nonexistent"} {
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
		remote(`"url": "https://r.example.com/mcp", "type": "streamableHttp", "tools": {"allow": ["a*"]}, "auth": {"type": "oauth", "clientId": "i", "clientSecretFile": "s", "tokenEndpointAuthMethod": "none", "scopes": ["a"]}, "someClientsKey": 1`),
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
		`{}`, `{"mcpServers": {"r": {}}, "nonsense": 1}`, remote(`"url": 7`), remote(`"url": "https://x.example.com", "type": "x"`),
		remote(`"url": "https://x.example.com", "auth": {"type": "forward"}`), remote(`"url": "https://x.example.com", "auth": {"x": 1}`),
		settings(`"sessions": "x"`), settings(`"log": {"level": "x"}`), settings(`"log": {"format": "x"}`), settings(`"auth": {}`), settings(`"limits": {"sessions": 0}`), settings(`"store": {"type": "redis"}`),
	} {
		if validate(config) == nil {
			t.Errorf("the schema takes %s", config)
		}
		if problemsOf(t, config) == nil {
			t.Errorf("the code takes %s", config)
		}
	}
}

// FuzzParseConfig: never a panic, never a problem without a place.
func FuzzParseConfig(f *testing.F) {
	f.Add(settings(`"limits": {"sessions": 5}`))
	f.Add(remote(`"url": "https://${TEAM:-x}.example.com", "auth": {"scopes": ["a"]}, "tools": {"deny": ["*"]}`))
	f.Add(`{"mcpServers": {"a": {"command": "x", "env": {"A": "${B}"}}, /* c */ "a": null,},}`)
	f.Fuzz(func(t *testing.T, config string) { problemsOf(t, config) })
}
