package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/modelcontextprotocol/go-sdk/mcp"

	"gatehouse/auth/authtest"
)

// TestRealProvider: the walk with zitadel's provider and its login form, and
// several refreshes there, of which each rotates the refresh token.
func TestRealProvider(t *testing.T) {
	t.Parallel()
	op := authtest.NewOP(t, authtest.OPConfig{TokenLife: 3 * time.Second})
	remote := authtest.NewRemote(t, authtest.RemoteConfig{AS: op})
	remote.Set(func(k *authtest.RemoteKnobs) { k.Scopes = []string{"openid"} }) // with which offline_access is asked for
	gw := startServe(t, config("", "notes", remote.URL))
	client := authtest.Legacy(t, gw.url)
	signIn(t, link(t, client.Call("notes_echo", nil), "notes"))
	echo(t, client, "notes_echo", "by a real provider")
	s := status(t, client)["notes"]
	if s.SignIn != "signed_in" || s.Issuer != op.Issuer() || s.Expires == nil {
		t.Errorf("status: %+v", s)
	}
	const refreshes = 2
	for op.Count(authtest.EndpointToken) < 1+refreshes && within(t).Err() == nil && !t.Failed() {
		echo(t, client, "notes_echo", "with a token that is renewed")
	}
	tokens := map[string]bool{}
	for _, r := range op.Requests(authtest.EndpointToken) {
		if token := r.Form.Get("refresh_token"); token != "" {
			tokens[token] = true
		}
	}
	if len(tokens) < refreshes {
		t.Errorf("%d refresh tokens were redeemed in %d refreshes", len(tokens), refreshes)
	}
	if n := op.Count(authtest.EndpointAuthorize); n != 1 {
		t.Errorf("%d sign-ins, want 1", n)
	}
}

// TestCustomCA: a private certificate authority is used for the remote, for the
// documents and for the authorization server, and adds to the system's roots.
func TestCustomCA(t *testing.T) {
	t.Parallel()
	as := authtest.StartAS(t, authtest.ASConfig{TLS: true, Path: "/tenant"})
	remote := authtest.NewRemote(t, authtest.RemoteConfig{AS: as, TLS: true})
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, append(as.CA, remote.CA...), 0o600); err != nil {
		t.Fatal(err)
	}
	walk := func(gw *process) {
		t.Helper()
		client := authtest.Legacy(t, gw.url)
		browser := authtest.NewBrowser(t)
		browser.Trust(as.CA, remote.CA)
		if page := browser.Open(link(t, client.Call("notes_echo", nil), "notes")); page.Status != http.StatusOK {
			t.Fatalf("%d %s\n%s", page.Status, page.URL, page.Body)
		}
		echo(t, client, "notes_echo", "over TLS")
	}
	walk(startServe(t, config(fmt.Sprintf(`{"ca": %q}`, ca), "notes", remote.URL)))
	walk(startServe(t, fmt.Sprintf(`{"mcpServers": {"notes": {"url": %q, "tls": {"ca": %q}}}}`, remote.URL, ca)))

	// Without it, a sentence that says what is wrong.
	client := authtest.Legacy(t, startServe(t, config("", "notes", remote.URL)).url)
	if result := client.Call("notes_echo", nil); !result.IsError || !strings.Contains(authtest.Text(result), "certificate") {
		t.Errorf("without the CA: %s", authtest.Text(result))
	}
}

// TestPreRegistered: the configured client is used, with its own callback path,
// and nothing is registered.
func TestPreRegistered(t *testing.T) {
	t.Parallel()
	for _, method := range []string{"client_secret_basic", "client_secret_post", "none"} {
		as := authtest.NewAS(t)
		remote := authtest.NewRemote(t, authtest.RemoteConfig{AS: as})
		id, secret := "pre+registered/1", "canary-cs-sécret%:+"
		if method == "none" {
			secret = ""
		}
		file := filepath.Join(t.TempDir(), "secret")
		if err := os.WriteFile(file, []byte(secret+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		secretFile := fmt.Sprintf(`"clientSecretFile": %q,`, file)
		if method == "none" {
			secretFile = ""
		}
		gw := startServe(t, fmt.Sprintf(`{"mcpServers": {"notes": {"url": %q, "auth": {"clientId": %q, %s "tokenEndpointAuthMethod": %q, "callbackPath": "/my/callback", "scopes": ["only.this"]}}}}`,
			remote.URL, id, secretFile, method))
		as.AddClient(authtest.OAuthClient{ID: id, Secret: secret, Method: method, RedirectURIs: []string{strings.TrimSuffix(gw.url, "/mcp") + "/my/callback"}})
		w := &world{as: as, remote: remote, gw: gw}
		w.guardSecrets(t)
		client := authtest.Legacy(t, gw.url)
		signIn(t, link(t, client.Call("notes_echo", nil), "notes"))
		echo(t, client, "notes_echo", method)
		if n := as.Count(authtest.EndpointRegister); n != 0 {
			t.Errorf("%s: %d registrations", method, n)
		}
		if scope := as.Requests(authtest.EndpointAuthorize)[0].Query.Get("scope"); scope != "only.this" {
			t.Errorf("%s: scope %q", method, scope)
		}
	}
}

// TestCheckRemote prints the walk of discovery, step by step.
func TestCheckRemote(t *testing.T) {
	t.Parallel()
	as := authtest.NewAS(t)
	remote := authtest.NewRemote(t, authtest.RemoteConfig{AS: as})
	check := func() (string, error) {
		out, err := exec.Command("gatehouse", "check", "--config", writeConfig(t, config("", "notes", remote.URL)), "notes").CombinedOutput()
		return string(out), err
	}
	out, err := check()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, want := range []string{"401", "oauth-protected-resource", "oauth-authorization-server", as.Issuer(), "S256",
		"the first sign-in registers", "issuer " + as.Issuer(), "authorization endpoint " + as.Issuer(), "scopes: "} {
		if !strings.Contains(out, want) {
			t.Errorf("the walk does not mention %s:\n%s", want, out)
		}
	}
	if n := as.Count(authtest.EndpointRegister); n != 0 {
		t.Errorf("the check registered %d times", n)
	}
	remote.Set(func(k *authtest.RemoteKnobs) { k.Open = true })
	if out, err = check(); err != nil || !strings.Contains(out, "asks for no sign-in") {
		t.Errorf("an open remote: %v\n%s", err, out)
	}
	remote.Set(func(k *authtest.RemoteKnobs) { k.MCP = authtest.Answer(200, "text/html", "<h1>") })
	if out, err = check(); err == nil || !strings.Contains(out, "is not what an MCP server does") {
		t.Errorf("no MCP server: %v\n%s", err, out)
	}
	remote.Set(func(k *authtest.RemoteKnobs) { *k = authtest.RemoteKnobs{} })
	as.Set(func(k *authtest.ASKnobs) { k.NoS256 = true })
	out, err = check()
	if exit, ok := err.(*exec.ExitError); !ok || exit.ExitCode() != exitFailed {
		t.Errorf("a remote without S256: %v", err)
	}
	if !strings.Contains(out, "S256") || !strings.Contains(out, "code_challenge_methods_supported") {
		t.Errorf("it does not say what is wrong:\n%s", out)
	}
}

// TestRemoteProblems: what is wrong with a remote's sign-in is said in a
// sentence that names it, and the status keeps it.
func TestRemoteProblems(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "")
	for _, tt := range []struct {
		name   string
		as     func(*authtest.ASKnobs)
		remote func(*authtest.RemoteKnobs)
		say    string
	}{
		{"no S256", func(k *authtest.ASKnobs) { k.NoS256 = true }, nil, "S256"},
		{"another issuer", func(k *authtest.ASKnobs) { k.Issuer = "https://canary.example.com" }, nil, "issuer"},
		{"no registration", func(k *authtest.ASKnobs) { k.NoRegistration = true }, nil, "clientId"},
		{"a scheme that is none", func(k *authtest.ASKnobs) {
			k.Document = map[string]any{"authorization_endpoint": "javascript:alert('canary')"}
		}, nil, "authorization_endpoint"},
		{"an internal address", func(k *authtest.ASKnobs) {
			k.Document = map[string]any{"token_endpoint": "http://169.254.169.254/canary"}
		}, nil, "token_endpoint"},
		{"another's resource", nil, func(k *authtest.RemoteKnobs) {
			k.Document = map[string]any{"resource": "https://other.example.com/canary"}
		}, "resource"},
	} {
		w.as.Set(func(k *authtest.ASKnobs) {
			if *k = (authtest.ASKnobs{}); tt.as != nil {
				tt.as(k)
			}
		})
		w.remote.Set(func(k *authtest.RemoteKnobs) {
			if *k = (authtest.RemoteKnobs{}); tt.remote != nil {
				tt.remote(k)
			}
		})
		// Documents that were good a moment ago are cached; a restart forgets them.
		gw := startServe(t, config("", "notes", w.remote.URL))
		client := authtest.Legacy(t, gw.url)
		result := client.Call("notes_echo", nil)
		say := authtest.Text(result)
		if !result.IsError || asked(result).AuthURL != "" || !strings.Contains(say, "notes") || !strings.Contains(say, tt.say) || strings.Contains(say, "canary") {
			t.Errorf("%s: %s", tt.name, say)
		}
		if s := status(t, client)["notes"]; !strings.Contains(s.LastError, tt.say) {
			t.Errorf("%s: status: %+v", tt.name, s)
		}
	}
}

// TestStdioEnds: when the client goes away, so does the process; nothing but
// MCP was ever on stdout.
func TestStdioEnds(t *testing.T) {
	t.Parallel()
	remote := authtest.NewRemote(t, authtest.RemoteConfig{})
	gw := startStdio(t, config("", "r", remote.URL))
	client := authtest.Connect(t, authtest.ClientConfig{Transport: &mcp.IOTransport{Reader: gw.stdout, Writer: gw.stdin}})
	echo(t, client, "r_echo", "x")
	if err := gw.stdin.Close(); err != nil {
		t.Fatal(err)
	}
	if err := gw.wait(); err != nil {
		t.Errorf("it ended with %v", err)
	}
}

const handshake = `{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-11-25","capabilities":{},"clientInfo":{"name":"raw","version":"1"}}}
{"jsonrpc":"2.0","method":"notifications/initialized"}
`

// TestStdioAnswersFirst: whoever asks and closes the pipe, or sends a signal,
// still gets the answers.
func TestStdioAnswersFirst(t *testing.T) {
	t.Parallel()
	for _, how := range []string{"end of input", "signal"} {
		remote := authtest.NewRemote(t, authtest.RemoteConfig{})
		gate, called := make(chan struct{}), make(chan struct{})
		remote.Set(func(k *authtest.RemoteKnobs) {
			k.Call = func(context.Context, string, json.RawMessage) (json.RawMessage, error) {
				close(called)
				<-gate
				return nil, nil
			}
		})
		gw := startStdio(t, config("", "r", remote.URL))
		io.WriteString(gw.stdin, handshake+`{"jsonrpc":"2.0","id":2,"method":"tools/call","params":{"name":"r_echo","arguments":{"text":"owed"}}}`+"\n")
		<-called
		if how == "signal" {
			gw.cmd.Process.Signal(syscall.SIGTERM)
		} else if err := gw.stdin.Close(); err != nil {
			t.Fatal(err)
		}
		close(gate)
		out, err := io.ReadAll(gw.stdout)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(string(out), `"owed"`) {
			t.Errorf("%s: stdout holds %s", how, out)
		}
		if err := gw.wait(); err != nil {
			t.Errorf("%s: it ended with %v", how, err)
		}
	}
}

// TestStdioReaderGone: a client that stops reading ends the process, which
// still ends in order.
func TestStdioReaderGone(t *testing.T) {
	t.Parallel()
	remote := authtest.NewRemote(t, authtest.RemoteConfig{})
	gw := startStdio(t, config("", "r", remote.URL))
	if err := gw.stdout.Close(); err != nil {
		t.Fatal(err)
	}
	fmt.Fprintln(gw.stdin, `{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-11-25","capabilities":{},"clientInfo":{"name":"raw","version":"1"}}}`)
	if err := gw.wait(); err != nil {
		t.Errorf("it ended with %v", err)
	}
}

// served answers every request with one document, as a host on the internet would.
type served string

func (s served) RoundTrip(*http.Request) (*http.Response, error) {
	return &http.Response{
		StatusCode: http.StatusOK, ProtoMajor: 1, ProtoMinor: 1,
		Header: http.Header{"Content-Type": {"application/json"}},
		Body:   io.NopCloser(strings.NewReader(string(s))),
	}, nil
}

// TestClientMetadataElsewhere: a Client ID Metadata Document that is served
// elsewhere is the client id, and nothing is registered.
func TestClientMetadataElsewhere(t *testing.T) {
	t.Parallel()
	const id = "https://clients.example.com/gatehouse.json"
	w := newWorld(t, `{"oauth": {"clientMetadataUrl": "`+id+`"}}`)
	redirect := strings.TrimSuffix(w.gw.url, "/mcp") + "/oauth/callback/notes"
	document := fmt.Sprintf(`{"client_id": %q, "client_name": "Gatehouse", "redirect_uris": [%q], "token_endpoint_auth_method": "none"}`, id, redirect)
	w.as.Set(func(k *authtest.ASKnobs) {
		k.CIMD, k.Fetch = true, &http.Client{Transport: served(document)}
	})
	client := authtest.Legacy(t, w.gw.url)
	signIn(t, link(t, client.Call("notes_echo", nil), "notes"))
	echo(t, client, "notes_echo", "known by a document")
	if got := w.as.Requests(authtest.EndpointAuthorize)[0].Query.Get("client_id"); got != id {
		t.Errorf("client_id = %q", got)
	}
	if n := w.as.Count(authtest.EndpointRegister); n != 0 {
		t.Errorf("%d registrations", n)
	}
}

// TestOddName: a remote's name may hold what a URL or a tool's name may not.
func TestOddName(t *testing.T) {
	t.Parallel()
	as := authtest.NewAS(t)
	remote := authtest.NewRemote(t, authtest.RemoteConfig{AS: as})
	const name = "Möbel & notes.v2 100%?"
	gw := startServe(t, config("", name, remote.URL))
	client := authtest.Legacy(t, gw.url)
	const tool = "M_bel___notes_v2_100___echo"
	signIn(t, link(t, client.Call(tool, nil), name))
	echo(t, client, tool, "odd")
	if got := client.Tools()[1]; got != tool {
		t.Errorf("the tool is called %s", got)
	}
}

// TestOwnTLS: the gateway speaks TLS with its own certificate, and the walk
// with its cookies and redirects works over it.
func TestOwnTLS(t *testing.T) {
	t.Parallel()
	as := authtest.NewAS(t)
	remote := authtest.NewRemote(t, authtest.RemoteConfig{AS: as})
	dir := t.TempDir()
	cert, key := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	ca := writeKeyPair(t, cert, key)
	gw := startServe(t, config(fmt.Sprintf(`{"tls": {"cert": %q, "key": %q}}`, cert, key), "notes", remote.URL))
	if !strings.HasPrefix(gw.url, "https://") {
		t.Fatalf("it serves %s", gw.url)
	}
	client := authtest.Connect(t, authtest.ClientConfig{Transport: &mcp.StreamableClientTransport{Endpoint: gw.url, HTTPClient: trusting(t, ca)}})
	url := link(t, client.Call("notes_echo", nil), "notes")
	if !strings.HasPrefix(url, "https://") {
		t.Errorf("the link is %s", url)
	}
	browser := authtest.NewBrowser(t)
	browser.Trust(ca)
	if page := browser.Open(url); page.Status != http.StatusOK {
		t.Errorf("%d %s", page.Status, page.Body)
	}
	echo(t, client, "notes_echo", "over TLS")
	out, err := exec.Command("gatehouse", "check", "--config", writeConfig(t, config(fmt.Sprintf(`{"tls": {"cert": %q, "key": "missing.pem"}}`, cert), "notes", remote.URL))).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "missing.pem") {
		t.Errorf("check without the key: %v %s", err, out)
	}
}

func trusting(t *testing.T, ca []byte) *http.Client {
	t.Helper()
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

// writeKeyPair writes a self-signed certificate for loopback and its key, and
// returns it.
func writeKeyPair(t *testing.T, cert, key string) []byte {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &private.PublicKey, private)
	if err != nil {
		t.Fatal(err)
	}
	plain, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	encoded := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	for name, data := range map[string][]byte{cert: encoded, key: pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: plain})} {
		if err := os.WriteFile(name, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return encoded
}
