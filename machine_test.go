package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"gatehouse/auth/authtest"
)

// privateKey writes a new key and returns its file.
func privateKey(t *testing.T) (string, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "key.pem")
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	return file, key
}

// TestMachine: a remote that serves machines works without anybody signing in,
// with each way of authenticating, found by its challenge or by the config.
func TestMachine(t *testing.T) {
	t.Parallel()
	keyFile, key := privateKey(t)
	for name, test := range map[string]struct {
		client   authtest.OAuthClient
		settings string // %s: the token endpoint
	}{
		"basic": {authtest.OAuthClient{ID: "machine", Secret: "canary-cs-m%+", Method: "client_secret_basic"}, `"clientSecret": "canary-cs-m%%+"`},
		"post": {authtest.OAuthClient{ID: "machine", Secret: "canary-cs-m", Method: "client_secret_post"},
			`"clientSecret": "canary-cs-m", "tokenEndpointAuthMethod": "client_secret_post"`},
		"key":            {authtest.OAuthClient{ID: "machine", Key: key.Public(), Method: "private_key_jwt"}, fmt.Sprintf(`"privateKeyFile": %q`, keyFile)},
		"token endpoint": {authtest.OAuthClient{ID: "machine", Secret: "canary-cs-m", Method: "client_secret_basic"}, `"clientSecret": "canary-cs-m", "tokenEndpoint": "%s"`},
		"key, token endpoint": {authtest.OAuthClient{ID: "machine", Key: key.Public(), Method: "private_key_jwt"},
			fmt.Sprintf(`"privateKeyFile": %q, "tokenEndpoint": "%%s"`, keyFile)},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			as := authtest.NewAS(t)
			as.AddClient(test.client)
			remote := authtest.NewRemote(t, authtest.RemoteConfig{AS: as})
			remote.Set(func(k *authtest.RemoteKnobs) { k.Scopes = []string{"read"} })
			settings := strings.ReplaceAll(strings.ReplaceAll(test.settings, "%s", as.URL+"/token"), "%%", "%")
			gw := startServe(t, fmt.Sprintf(`{"mcpServers": {"notes": {"url": %q, "auth": {"type": "clientCredentials", "clientId": "machine", %s}}}}`, remote.URL, settings))
			w := &world{as: as, remote: remote, gw: gw}
			w.guardSecrets(t)
			for range 2 { // two users, one machine
				client := authtest.Legacy(t, gw.url)
				echo(t, client, "notes_echo", name)
				if who := authtest.Text(client.Call("notes_whoami", nil)); who != "machine" {
					t.Errorf("acts as %s", who)
				}
				if s := status(t, client)["notes"]; s.SignIn != "signed_in" || s.SignInBy != "the gateway's own credentials" || s.Expires == nil {
					t.Errorf("status: %+v", s)
				}
			}
			requests := as.Requests(authtest.EndpointToken)
			if len(requests) != 1 || requests[0].Form.Get("resource") != remote.URL || requests[0].Form.Get("grant_type") != "client_credentials" {
				t.Errorf("token requests: %d", len(requests))
			}
			if as.Count(authtest.EndpointAuthorize)+as.Count(authtest.EndpointRegister) != 0 {
				t.Error("somebody signed in or registered")
			}

			// What is not accepted any more is replaced, once for all.
			as.ExpireAll()
			client := authtest.Legacy(t, gw.url)
			echo(t, client, "notes_echo", "again")
			if n := as.Count(authtest.EndpointToken); n != 2 {
				t.Errorf("%d token requests", n)
			}
		})
	}
}

// TestMachineSaysWhy: what goes wrong is a sentence about what to change, never
// a link that nobody could finish.
func TestMachineSaysWhy(t *testing.T) {
	t.Parallel()
	as := authtest.NewAS(t)
	as.AddClient(authtest.OAuthClient{ID: "machine", Secret: "canary-cs-m", Method: "client_secret_basic"})
	remote := authtest.NewRemote(t, authtest.RemoteConfig{AS: as})
	machine := func(id string) string {
		return fmt.Sprintf(`{"mcpServers": {"notes": {"url": %q, "auth": {"type": "clientCredentials", "clientId": %q, "clientSecret": "canary-cs-m"}}}}`, remote.URL, id)
	}
	client := authtest.Legacy(t, startServe(t, machine("nobody")).url)
	if say := authtest.Text(client.Call("notes_echo", nil)); !strings.Contains(say, "refuses the gateway's client (invalid_client)") || strings.Contains(say, "/connect/") {
		t.Errorf("an unknown client: %s", say)
	}
	if s := status(t, client)["notes"]; s.SignIn == "signed_in" || !strings.Contains(s.LastError, "invalid_client") || s.AuthURL != "" {
		t.Errorf("status: %+v", s)
	}

	client = authtest.Legacy(t, startServe(t, machine("machine")).url)
	echo(t, client, "notes_echo", "fine")
	if say := authtest.Text(client.Call("gateway_login", map[string]any{"remote": "notes"})); !strings.Contains(say, "credentials of its own") {
		t.Errorf("login: %s", say)
	}
	remote.Set(func(k *authtest.RemoteKnobs) { k.ToolScopes = map[string][]string{"add": {"admin"}} })
	if result := client.Call("notes_add", map[string]any{"a": 1, "b": 2}); result.IsError {
		t.Errorf("with more scopes: %s", authtest.Text(result))
	}
	remote.Set(func(k *authtest.RemoteKnobs) {
		k.MCP = func(w http.ResponseWriter, _ *http.Request, _ http.HandlerFunc) {
			w.Header().Set("WWW-Authenticate", `Bearer error="invalid_token"`)
			w.WriteHeader(http.StatusUnauthorized)
		}
	})
	before := as.Count(authtest.EndpointToken)
	for range 3 {
		if say := authtest.Text(client.Call("notes_echo", nil)); !strings.Contains(say, "does not accept the token") {
			t.Errorf("a remote that accepts nothing: %s", say)
		}
	}
	if n := as.Count(authtest.EndpointToken) - before; n != 1 {
		t.Errorf("%d exchanges for a remote that accepts nothing", n)
	}

	remote.Set(func(k *authtest.RemoteKnobs) { k.MCP = nil })
	out, err := exec.Command("gatehouse", "check", "--config", writeConfig(t, machine("machine")), "notes").CombinedOutput()
	if err != nil || !strings.Contains(string(out), "signs in there itself") {
		t.Errorf("check: %v\n%s", err, out)
	}
	out, err = exec.Command("gatehouse", "check", "--config", writeConfig(t, machine("nobody")), "notes").CombinedOutput()
	if err == nil || !strings.Contains(string(out), "invalid_client") || strings.Contains(string(out), "canary") {
		t.Errorf("check: %v\n%s", err, out)
	}
}
