package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/modelcontextprotocol/go-sdk/mcp"

	"gatehouse/auth/authtest"
)

// office is an organisation with one identity provider and a remote for each way
// of using its logins.
type office struct {
	idp, crmAS       *authtest.AS
	crm, files, wiki *authtest.Remote
	gw               *process
}

// newOffice starts it all; settings are of gateway.auth, beside issuer and client.
func newOffice(t *testing.T, settings string) *office {
	t.Helper()
	return newOfficeOn(t, settings, func(config string) *process { return startServe(t, config) })
}

// newOfficeOn is newOffice with another way of starting the gateway.
func newOfficeOn(t *testing.T, settings string, start func(config string) *process) *office {
	t.Helper()
	o := &office{idp: authtest.NewAS(t), crmAS: authtest.NewAS(t)}
	// What the provider does: ID tokens, and exchanges with JWTs.
	o.idp.Set(func(k *authtest.ASKnobs) { k.IDToken, k.JWT = map[string]any{}, true })
	o.files = authtest.NewRemote(t, authtest.RemoteConfig{AS: o.idp}) // exchanged
	o.wiki = authtest.NewRemote(t, authtest.RemoteConfig{AS: o.idp})  // forwarded
	o.crm = authtest.NewRemote(t, authtest.RemoteConfig{AS: o.crmAS}) // by an ID-JAG
	o.files.Set(func(k *authtest.RemoteKnobs) { k.Audience = "files" })
	o.wiki.Set(func(k *authtest.RemoteKnobs) { k.Audience = "gatehouse" })
	o.crmAS.AddClient(authtest.OAuthClient{ID: "gw-at-crm", Secret: "canary-cs-crm-0001", Method: "client_secret_basic"})
	config, err := json.Marshal(map[string]any{
		"mcpServers": map[string]any{
			"files": map[string]any{"url": o.files.URL, "auth": map[string]any{"type": "exchange", "audience": "files"}},
			"wiki":  map[string]any{"url": o.wiki.URL, "auth": map[string]any{"type": "forward", "audience": "gatehouse"}},
			"crm":   map[string]any{"url": o.crm.URL, "auth": map[string]any{"type": "idJag", "clientId": "gw-at-crm", "clientSecret": "canary-cs-crm-0001"}},
		},
		"gateway": map[string]any{"auth": json.RawMessage(fmt.Sprintf(`{"issuer": %q, "clientId": "gatehouse", %s}`, o.idp.Issuer(), settings))},
	})
	if err != nil {
		t.Fatal(err)
	}
	o.gw = start(string(config))
	base := strings.TrimSuffix(strings.TrimSuffix(o.gw.url, "/mcp"), "/")
	o.idp.AddClient(authtest.OAuthClient{ID: "gatehouse", Secret: "canary-cs-gateway-1", Method: "client_secret_basic", RedirectURIs: []string{base + "/oauth/callback", base + "/login/callback"}})
	return o
}

const loginSecret = `"clientSecret": "canary-cs-gateway-1"`

// TestSingleSignOn: one login at the gateway, and each remote works, whichever
// way it is signed in to; nobody clicks again.
func TestSingleSignOn(t *testing.T) {
	t.Parallel()
	o := newOffice(t, loginSecret)
	as := func(user string) (*authtest.Client, string) {
		bearer := o.idp.JWTFor(user, o.gw.url, nil)
		return authtest.Connect(t, authtest.ClientConfig{URL: o.gw.url, Token: bearer}), bearer
	}
	client, bearer := as("alice")
	url := link(t, client.Call("files_echo", nil), "files")
	if again := link(t, client.Call("crm_echo", nil), "crm"); again != url {
		t.Errorf("two links for one login: %s and %s", url, again)
	}
	if s := status(t, client); s["wiki"].Status != "auth_required" || s["wiki"].AuthURL != url {
		t.Errorf("status before: %+v", s["wiki"])
	}
	browser := authtest.NewBrowser(t)
	if page := browser.Open(url); !strings.Contains(page.Body, "files is connected") || !strings.Contains(page.Body, "crm is connected") {
		t.Errorf("the page after the login says\n%s", page.Body)
	}
	for _, name := range []string{"files", "wiki", "crm"} {
		echo(t, client, name+"_echo", name)
		if who := authtest.Text(client.Call(name+"_whoami", nil)); who != "alice" {
			t.Errorf("%s acts as %q", name, who)
		}
	}
	// The client's own token is worth nothing anywhere else.
	exchanged := 0
	for _, r := range slices.Concat(o.idp.Requests(""), o.crmAS.Requests(""), o.files.Requests(""), o.wiki.Requests(""), o.crm.Requests("")) {
		if strings.Contains(fmt.Sprint(r.Form, r.Query, r.Header)+string(r.Body), bearer) {
			t.Errorf("the client's token was sent to %s", r.Path)
		}
		if r.Form.Has("subject_token") {
			exchanged++
		}
	}
	if exchanged != 2 {
		t.Errorf("%d exchanges of the login", exchanged)
	}
	if n := o.idp.Count(authtest.EndpointAuthorize) + o.crmAS.Count(authtest.EndpointAuthorize); n != 1 {
		t.Errorf("%d sign-ins", n)
	}
	by := map[string]string{"files": "exchanged token", "wiki": "forwarded login", "crm": "identity assertion (ID-JAG)"}
	for name, s := range status(t, client) {
		if s.Status != "connected" || s.SignIn != "signed_in" || s.SignInBy != by[name] || s.LastError != "" {
			t.Errorf("%s: %+v", name, s)
		}
	}
	// The same as a resource.
	read, err := client.ReadResource(t.Context(), &mcp.ReadResourceParams{URI: "auth://status"})
	if err != nil || len(read.Contents) != 1 || read.Contents[0].MIMEType != "application/json" || !strings.Contains(read.Contents[0].Text, `"sign_in_by":"exchanged token"`) {
		t.Errorf("the resource: %+v, %v", read, err)
	}
	// The login asked for what the documentation says, at the provider, for no
	// resource.
	asked := o.idp.Requests(authtest.EndpointAuthorize)[0].Query
	if asked.Get("scope") != "openid profile email groups" || asked.Has("resource") {
		t.Errorf("the login asked for %v", asked)
	}

	// A rejected token is exchanged anew, once.
	o.crmAS.ExpireAll()
	echo(t, client, "crm_echo", "again")

	// What fails is told, in the status and on the page, and forgotten when it works.
	o.idp.Set(func(k *authtest.ASKnobs) {
		k.Token = authtest.OnGrant("urn:ietf:params:oauth:grant-type:token-exchange",
			authtest.Answer(http.StatusBadRequest, "application/json", `{"error":"invalid_target"}`))
	})
	client.Call("gateway_logout", map[string]any{"remote": "files"})
	if result := client.Call("files_echo", map[string]any{"text": "x"}); !result.IsError || !strings.Contains(authtest.Text(result), "invalid_target") {
		t.Errorf("an exchange that is refused: %s", authtest.Text(result))
	}
	if s := status(t, client)["files"]; !strings.Contains(s.LastError, "invalid_target") || s.SignInBy != by["files"] {
		t.Errorf("status: %+v", s)
	}
	page := browser.Open(strings.TrimSuffix(o.gw.url, "/mcp") + "/")
	for _, want := range []string{"Signed in by", by["files"], by["wiki"], by["crm"], "invalid_target"} {
		if !strings.Contains(page.Body, want) {
			t.Errorf("the page lacks %q:\n%s", want, page.Body)
		}
	}
	o.idp.Set(func(k *authtest.ASKnobs) { k.Token = nil })
	// It is asked again after a second.
	for deadline := time.Now().Add(10 * time.Second); client.Call("files_echo", map[string]any{"text": "x"}).IsError; {
		if time.Now().After(deadline) {
			t.Fatal("the exchange works again, and the remote does not")
		}
	}
	if s := status(t, client)["files"]; s.LastError != "" {
		t.Errorf("status: %+v", s)
	}

	// Another user has nothing of the first.
	other, _ := as("bob")
	if again := link(t, other.Call("files_echo", nil), "files"); again == url {
		t.Error("one link for two users")
	}

	// Signed out, everything asks again.
	if say := authtest.Text(client.Call("gateway_logout", map[string]any{"remote": "files"})); !strings.Contains(say, `"gateway"`) {
		t.Errorf("signing out of one: %s", say)
	}
	echo(t, client, "files_echo", "by itself")
	if say := authtest.Text(client.Call("gateway_logout", map[string]any{"all": true})); !strings.Contains(say, "your login at the gateway: signed out") {
		t.Errorf("signing out: %s", say)
	}
	for _, name := range []string{"files", "wiki", "crm"} {
		link(t, client.Call(name+"_echo", nil), name)
	}
	if access, refresh := o.idp.Live(); refresh != 0 {
		t.Errorf("%d access and %d refresh tokens live on", access, refresh)
	}
}

// TestWorkload: the identity in a file stands for everybody, and is read again
// when it changes.
func TestWorkload(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "token")
	write := func(token string) {
		t.Helper()
		if err := os.WriteFile(file+".new", []byte(token+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(file+".new", file); err != nil {
			t.Fatal(err)
		}
	}
	write("nonsense")
	o := newOffice(t, fmt.Sprintf(`%s, "idTokenFile": %q`, loginSecret, file))
	client := authtest.Legacy(t, o.gw.url)
	if say := authtest.Text(client.Call("files_echo", nil)); !strings.Contains(say, "holds no ID token") || strings.Contains(say, "/connect/") {
		t.Errorf("without a token in the file: %s", say)
	}
	write(o.idp.IDTokenFor("job-1", "gatehouse"))
	for _, name := range []string{"files", "wiki", "crm"} {
		echo(t, client, name+"_echo", name)
	}
	renewed := o.idp.IDTokenFor("job-1", "gatehouse")
	write(renewed)
	before := o.idp.Count(authtest.EndpointToken)
	for _, name := range []string{"files", "wiki", "crm"} {
		if who := authtest.Text(client.Call(name+"_whoami", nil)); who != "job-1" {
			t.Errorf("%s acts as %q", name, who)
		}
	}
	requests := o.idp.Requests(authtest.EndpointToken)[before:]
	if len(requests) != 2 || requests[0].Form.Get("subject_token") != renewed || requests[1].Form.Get("subject_token") != renewed {
		t.Errorf("%d exchanges, of what the file holds now", len(requests))
	}
	if n := o.idp.Count(authtest.EndpointAuthorize); n != 0 {
		t.Errorf("%d people logged in", n)
	}
	metrics := scrape(t, strings.TrimSuffix(o.gw.url, "/mcp")+"/metrics")
	for _, line := range []string{
		`gatehouse_exchanges_total{issued="access_token",outcome="fetched",remote="files",way="exchange"} 2` + "\n",
		`gatehouse_exchanges_total{issued="",outcome="fetched",remote="crm",way="idJag"} 2` + "\n",
		"gatehouse_exchange_cache_tokens 4\n", "gatehouse_exchange_cache_misses_total 4\n", "gatehouse_exchange_cache_evictions_total 0\n",
	} {
		if !strings.Contains(metrics, line) {
			t.Errorf("the metrics lack %s", line)
		}
	}
	if strings.Contains(metrics, "gatehouse_exchange_cache_hits_total 0\n") {
		t.Error("nothing came from the cache")
	}
}

// TestSingleSignOnStdio: one login for the local user, which a restart does not
// cost.
func TestSingleSignOnStdio(t *testing.T) {
	t.Parallel()
	state := t.TempDir()
	var config string
	o := newOfficeOn(t, loginSecret, func(c string) *process {
		config = c
		return startStdioIn(t, state, c)
	})
	connect := func(gw *process) *authtest.Client {
		t.Helper()
		return authtest.Connect(t, authtest.ClientConfig{Transport: &mcp.IOTransport{Reader: gw.stdout, Writer: gw.stdin}})
	}
	client := connect(o.gw)
	signIn(t, link(t, client.Call("crm_echo", nil), "crm"))
	echo(t, client, "crm_echo", "over stdio")
	if err := o.gw.stdin.Close(); err != nil {
		t.Fatal(err)
	}
	if err := o.gw.wait(); err != nil {
		t.Fatal(err)
	}
	client = connect(startStdioIn(t, state, config))
	for _, name := range []string{"files", "wiki", "crm"} {
		echo(t, client, name+"_echo", "after a restart")
	}
	if n := o.idp.Count(authtest.EndpointAuthorize); n != 1 {
		t.Errorf("%d logins", n)
	}
}
