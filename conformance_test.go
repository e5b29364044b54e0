package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/cookiejar"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/modelcontextprotocol/go-sdk/mcp"
)

// conformanceDriver is the client that the official conformance suite tests:
// the gateway in front of the suite's server, and this in place of the person
// and their assistant. The suite runs it as `conformance-driver URL`; .ci/conformance
// puts it under that name.
func conformanceDriver() {
	ctx, cancel := context.WithTimeout(context.Background(), 25*time.Second)
	defer cancel()
	if err := drive(ctx, os.Args[len(os.Args)-1]); err != nil {
		fmt.Fprintln(os.Stderr, "conformance-driver:", err)
		os.Exit(1)
	}
}

// conformanceRouter is `conformance-router LISTEN LEGACY MODERN`: one address in
// front of two servers, of which each speaks one era.
func conformanceRouter() {
	legacy := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: os.Args[2]})
	modern := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: os.Args[3]})
	for _, proxy := range []*httputil.ReverseProxy{legacy, modern} {
		proxy.FlushInterval = -1
	}
	err := http.ListenAndServe(os.Args[1], http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// Or an answer that begins before the request's end has been read breaks off.
		http.NewResponseController(w).EnableFullDuplex()
		if r.Header.Get("Mcp-Protocol-Version") >= "2026-07-28" {
			modern.ServeHTTP(w, r)
			return
		}
		legacy.ServeHTTP(w, r)
	}))
	fmt.Fprintln(os.Stderr, "conformance-router:", err)
	os.Exit(1)
}

// conformanceScore is `conformance-score LEG RESULTS WANT SCENARIO…`: how many
// scenarios of a leg, server or client, have passed in the results of a run.
// There must be WANT, and all must have. A tick of the suite can be one for
// nothing seen: here a scenario passes if it saw something that it wanted, and
// nothing that it did not.
func conformanceScore() {
	leg, results, want, scenarios := os.Args[1], os.Args[2], os.Args[3], os.Args[4:]
	var failed []string
	seen := 0
	for _, scenario := range scenarios {
		checks, err := scoreScenario(leg, results, scenario)
		if err != nil {
			failed = append(failed, fmt.Sprintf("  %s: %v", scenario, err))
		}
		seen += checks
	}
	fmt.Printf("%s: %d of %s scenarios, %d checks\n", filepath.Base(results), len(scenarios)-len(failed), want, seen)
	if len(failed) > 0 || fmt.Sprint(len(scenarios)) != want {
		fmt.Println(strings.Join(failed, "\n"))
		os.Exit(1)
	}
}

// scoreScenario counts what a scenario saw of what it wanted.
func scoreScenario(leg, results, scenario string) (successes int, err error) {
	folder := scenario // and the time behind it
	if leg == "server" {
		folder = "server-" + scenario
	}
	found, err := filepath.Glob(filepath.Join(results, folder+"-2*", "checks.json"))
	if err != nil {
		return 0, err
	}
	if len(found) != 1 {
		return 0, fmt.Errorf("it has %d results", len(found))
	}
	data, err := os.ReadFile(found[0])
	if err != nil {
		return 0, err
	}
	var checks []struct{ ID, Status, ErrorMessage string }
	if err := json.Unmarshal(data, &checks); err != nil {
		return 0, fmt.Errorf("reading %s: %w", found[0], err)
	}
	for _, c := range checks {
		switch {
		case c.Status == "SUCCESS":
			successes++
		case c.Status == "FAILURE", c.Status == "WARNING" && leg == "client":
			return 0, fmt.Errorf("%s: %s", c.ID, c.ErrorMessage)
		}
	}
	if successes == 0 {
		return 0, errors.New("it saw nothing of what it wanted")
	}
	return successes, nil
}

func drive(ctx context.Context, server string) error {
	gateway, stop, err := driveGateway(ctx, server)
	if err != nil {
		return err
	}
	defer stop()
	scenario := os.Getenv("MCP_CONFORMANCE_SCENARIO")
	if !strings.HasPrefix(scenario, "auth/") {
		everything := exec.CommandContext(ctx, os.Getenv("EVERYTHING_CLIENT"), gateway)
		everything.Stdout, everything.Stderr = os.Stdout, os.Stderr
		if err := everything.Run(); err != nil || scenario != "request-metadata" {
			return err
		}
		// That client leaves at once. A list is what makes the gateway talk to the remote.
		return listOnce(ctx, gateway)
	}
	client := mcp.NewClient(&mcp.Implementation{Name: "conformance-driver", Version: "1"}, nil)
	session, err := client.Connect(ctx, &mcp.StreamableClientTransport{Endpoint: gateway}, &mcp.ClientSessionOptions{ProtocolVersion: "2025-11-25"})
	if err != nil {
		return err
	}
	defer session.Close()
	// The person: opens each link that a call brings, at most four times.
	jar, err := cookiejar.New(nil)
	if err != nil {
		return err
	}
	browser := &http.Client{Jar: jar, Timeout: 10 * time.Second}
	var said string
	for range 5 {
		result, err := session.CallTool(ctx, &mcp.CallToolParams{Name: "test-tool", Arguments: map[string]any{}})
		if err != nil {
			return err
		}
		if !result.IsError {
			return nil
		}
		if said = result.Content[0].(*mcp.TextContent).Text; len(said) > 500 {
			said = said[:500]
		}
		link := regexp.MustCompile(`http\S+/connect/[A-Z0-9]+`).FindString(said)
		if link == "" {
			return fmt.Errorf("the call failed: %s", said)
		}
		resp, err := browser.Get(link)
		if err != nil {
			return err
		}
		page, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil {
			return err
		}
		if resp.StatusCode != http.StatusOK {
			return fmt.Errorf("the sign-in ended at %d: %s", resp.StatusCode, regexp.MustCompile(`<h1>[^<]*|<p[^<]*`).FindAll(page, 2))
		}
	}
	return fmt.Errorf("still asked to sign in: %s", said)
}

func listOnce(ctx context.Context, gateway string) error {
	client := mcp.NewClient(&mcp.Implementation{Name: "conformance-driver", Version: "1"}, nil)
	session, err := client.Connect(ctx, &mcp.StreamableClientTransport{Endpoint: gateway}, nil)
	if err != nil {
		return err
	}
	defer session.Close()
	_, err = session.ListTools(ctx, nil)
	return err
}

// driveGateway starts the gateway in front of the suite's server.
func driveGateway(ctx context.Context, server string) (endpoint string, stop func(), err error) {
	dir, err := os.MkdirTemp("", "conformance")
	if err != nil {
		return "", nil, err
	}
	auth, settings, err := driveAuth(dir)
	if err != nil {
		os.RemoveAll(dir)
		return "", nil, err
	}
	settings["listen"], settings["sessions"] = "localhost:0", "shared"
	settings["oauth"] = map[string]any{"clientMetadataUrl": "https://conformance-test.local/client-metadata.json"}
	config, err := json.Marshal(map[string]any{
		"mcpServers": map[string]any{"r": map[string]any{"url": server, "prefix": "", "auth": auth}},
		"gateway":    settings,
	})
	if err != nil {
		return "", nil, err
	}
	file := filepath.Join(dir, "gatehouse.json")
	if err := os.WriteFile(file, config, 0o600); err != nil {
		return "", nil, err
	}
	gw := exec.CommandContext(ctx, "gatehouse", "serve", "--config", file, "--log-level", "debug", "--log-format", "json")
	log, err := gw.StderrPipe()
	if err != nil {
		return "", nil, err
	}
	if err := gw.Start(); err != nil {
		return "", nil, err
	}
	// The log goes on to the suite; the line that says where it serves, here too.
	serving, logged := make(chan string, 1), make(chan struct{})
	go func() {
		defer close(logged)
		defer close(serving)
		lines := bufio.NewScanner(log)
		lines.Buffer(nil, 1<<20)
		for lines.Scan() {
			fmt.Fprintln(os.Stderr, lines.Text())
			var line struct{ Msg, URL string }
			if json.Unmarshal(lines.Bytes(), &line) == nil && line.Msg == "serving MCP over HTTP" {
				serving <- line.URL
			}
		}
	}()
	stop = func() {
		gw.Process.Signal(os.Interrupt)
		<-logged
		gw.Wait()
		os.RemoveAll(dir)
	}
	endpoint, ok := <-serving
	if !ok {
		stop()
		return "", nil, errors.New("the gateway ended before it served")
	}
	return endpoint, stop, nil
}

// driveAuth is the auth of the remote and the settings of the gateway that a
// scenario is about; what it needs as files goes to dir.
func driveAuth(dir string) (auth, settings map[string]any, err error) {
	auth, settings = map[string]any{}, map[string]any{}
	var given struct {
		ClientID     string `json:"client_id"`
		ClientSecret string `json:"client_secret"`
		PrivateKey   string `json:"private_key_pem"`
		IDPClientID  string `json:"idp_client_id"`
		IDToken      string `json:"idp_id_token"`
		IDPIssuer    string `json:"idp_issuer"`
	}
	if raw := os.Getenv("MCP_CONFORMANCE_CONTEXT"); raw == "" || json.Unmarshal([]byte(raw), &given) != nil || given.ClientID == "" {
		return auth, settings, nil
	}
	auth["clientId"] = given.ClientID
	if given.ClientSecret != "" {
		auth["clientSecret"] = given.ClientSecret
	}
	if given.PrivateKey != "" {
		file := filepath.Join(dir, "key.pem")
		auth["privateKeyFile"] = file
		err = os.WriteFile(file, []byte(given.PrivateKey), 0o600)
	}
	switch {
	case strings.HasPrefix(os.Getenv("MCP_CONFORMANCE_SCENARIO"), "auth/client-credentials-"):
		auth["type"] = "clientCredentials"
	case given.IDToken != "":
		auth["type"] = "idJag"
		file := filepath.Join(dir, "id_token")
		settings["auth"] = map[string]any{"issuer": given.IDPIssuer, "clientId": given.IDPClientID, "idTokenFile": file}
		err = os.WriteFile(file, []byte(given.IDToken), 0o600)
	}
	return auth, settings, err
}
