package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"slices"
	"strings"

	"gatehouse/auth"
	"gatehouse/auth/guard"
	"gatehouse/gateway"
	"gatehouse/session"
)

// house is the rooms, built and connected.
type house struct {
	clients *guard.Clients
	auth    *auth.Broker
	pool    *session.Pool
	gateway *gateway.Gateway
	metrics *gateway.Metrics
}

// build makes the rooms from the inside out: who may use which token, then the
// connections, then what clients and browsers see. audit may be nil: then log
// takes the audit log, too.
// With users, those who connect have to say who they are; where gateway.auth
// does not tell them apart, that is nobody.
func build(cfg *gateway.Config, publicURL string, users bool, store auth.Store, log, audit *slog.Logger) (*house, error) {
	clients, err := newClients(cfg)
	if err != nil {
		return nil, err
	}
	metrics := gateway.NewMetrics(cfg, version)
	sealer, _ := store.(auth.Sealer) // nil: nobody else has the key
	broker, remotes, err := newBroker(cfg, clients, publicURL, users, store, log, metrics.Refreshed)
	if err != nil {
		return nil, err
	}
	pool := session.New(session.Config{
		Remotes:     remotes,
		Name:        "gatehouse",
		Version:     version,
		MaxSessions: cfg.Gateway.Limits.Sessions,
		Memory:      broker,
		Log:         log,
	})
	return &house{
		clients: clients,
		auth:    broker,
		pool:    pool,
		metrics: metrics,
		gateway: gateway.New(gateway.Setup{
			Config: cfg, Users: users, Auth: broker, Sessions: pool, PublicURL: publicURL, Version: version, Log: log,
			Metrics: metrics, Audit: audit, SharedStore: store.Shared(), Sealer: sealer, Identity: identity(cfg, store),
		}),
	}, nil
}

// close ends everything from the outside in.
func (h *house) close() {
	h.gateway.Close()
	h.pool.Close()
	h.auth.Close()
	h.clients.Close()
}

func newClients(cfg *gateway.Config) (*guard.Clients, error) {
	g := guard.Config{UserAgent: "gatehouse/" + version}
	if file := cfg.Gateway.CA; file != "" {
		pem, err := os.ReadFile(cfg.Path(file))
		if err != nil {
			return nil, usageError{fmt.Errorf("reading gateway.ca: %w", err)}
		}
		g.CA = pem
	}
	if cfg.Gateway.Proxy != "" {
		proxy, err := url.Parse(cfg.Gateway.Proxy)
		if err != nil {
			return nil, usageError{fmt.Errorf("gateway.proxy is not a URL")}
		}
		g.Proxy = proxy
	}
	clients, err := guard.New(g)
	if err != nil {
		return nil, usageError{fmt.Errorf("gateway.ca and gateway.proxy: %w", err)}
	}
	return clients, nil
}

// newBroker builds what signs in, and for each remote what dials it: both need
// the remote's own guarded clients.
func newBroker(cfg *gateway.Config, clients *guard.Clients, publicURL string, users bool, store auth.Store, log *slog.Logger, refreshed func(remote, outcome string)) (*auth.Broker, []session.Remote, error) {
	var signIns []auth.Remote
	var remotes []session.Remote
	for _, server := range cfg.Running() {
		if server.Command != "" {
			remotes = append(remotes, session.Remote{Name: server.Name, Timeout: server.Timeout, Command: localCommand(cfg, server)})
			continue
		}
		config, err := tlsTowards(cfg, server.TLS, log)
		if err != nil {
			return nil, nil, usageError{fmt.Errorf("remote %s: %w", server.Name, err)}
		}
		client := clients.Client(guard.Policy{
			Allow: server.AllowAddresses, Loopback: isLoopback(server.URL.Hostname()),
			// The client certificate is for the remote; its authorization server is
			// another party and does not see it.
			TLS: config, Host: server.URL.Host,
		})
		headers := http.Header{}
		for name, value := range server.Headers {
			headers.Set(name, value.Value())
		}
		remotes = append(remotes, session.Remote{
			Name: server.Name, URL: server.URL.String(), Headers: headers,
			Timeout: server.Timeout, HTTP: client, SSE: server.Type == "sse",
		})
		if !server.Auth.SignsIn() {
			continue
		}
		signIn, err := remoteSignIn(cfg, server, clients, log)
		if err != nil {
			return nil, nil, usageError{fmt.Errorf("remote %s: %w", server.Name, err)}
		}
		signIn.HTTP = client
		signIns = append(signIns, *signIn)
	}
	oauth := cfg.Gateway.OAuth
	broker, err := auth.New(auth.Config{
		Remotes: signIns, Login: login(cfg, clients, publicURL, users), PublicURL: publicURL, CallbackPath: oauth.CallbackPath,
		ClientName: oauth.ClientName, ClientMetadataURL: oauth.ClientMetadataURL,
		MetadataPath: oauth.MetadataPath, ClientScopes: oauth.Scopes,
		Disabled: !oauth.Enabled, MaxFlows: cfg.Gateway.Limits.FlowsPerPrincipal,
		ExchangeCache: cfg.Gateway.Limits.ExchangeCache,
		Refreshed:     refreshed,
		Store:         store, Log: log,
	})
	if err != nil {
		return nil, nil, fmt.Errorf("preparing sign-in: %w", err)
	}
	for i, r := range remotes {
		if cfg.Running()[i].Auth.SignsIn() {
			remotes[i].Authorizer = func(p auth.Principal) session.Authorizer { return broker.Authorizer(p, r.Name) }
		}
	}
	return broker, remotes, nil
}

// inherited are the variables of the gateway's own environment that a local
// command gets: what programs need to run at all. The rest may hold secrets
// that are none of its business.
var inherited = []string{
	"HOME", "LOGNAME", "PATH", "SHELL", "TERM", "USER", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR",
	"XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_RUNTIME_DIR",
	"HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy", "SSL_CERT_FILE", "SSL_CERT_DIR", "NODE_EXTRA_CA_CERTS",
	"APPDATA", "COMSPEC", "HOMEDRIVE", "HOMEPATH", "LOCALAPPDATA", "PATHEXT", "PROCESSOR_ARCHITECTURE", "PROGRAMDATA", "PROGRAMFILES",
	"SYSTEMDRIVE", "SYSTEMROOT", "TEMP", "TMP", "USERNAME", "USERPROFILE", "WINDIR",
}

// shortestSecret: what is shorter in a command's "env" is a word like "true",
// which its stderr may well say.
const shortestSecret = 8

// localCommand is how a remote that is a local program is started.
func localCommand(cfg *gateway.Config, server *gateway.Server) *session.Command {
	c := &session.Command{Path: server.Command, Args: server.Args}
	if server.Dir != "" {
		c.Dir = cfg.Path(server.Dir)
	}
	for _, name := range inherited {
		// A proxy's URL may hold a password.
		if value, ok := os.LookupEnv(name); ok && !strings.Contains(value, "@") {
			c.Env = append(c.Env, name+"="+value)
		}
	}
	for name, value := range server.Env {
		c.Env = append(c.Env, name+"="+value.Value())
		if len(value.Value()) >= shortestSecret {
			c.Secrets = append(c.Secrets, value.Value())
		}
	}
	return c
}

func isLoopback(host string) bool {
	if host == "localhost" {
		return true
	}
	addr, err := netip.ParseAddr(host)
	return err == nil && addr.IsLoopback()
}

// check validates the config, and with a remote's name walks how one would
// sign in to it.
func (c *command) check(ctx context.Context) error {
	cfg, notes, err := c.readConfig()
	if err != nil {
		return err
	}
	for _, note := range notes {
		fmt.Fprintf(c.out, "note: line %d: %s: %s\n", note.Line, note.Path, note.Say)
	}
	if len(c.args) == 0 {
		return c.checkAll(cfg)
	}
	if len(c.args) > 1 {
		return usageError{fmt.Errorf("check takes one remote, not %d", len(c.args))}
	}
	return c.checkRemote(ctx, cfg, c.args[0])
}

// checkAll builds everything that serve would, without listening or dialing,
// so that a missing file is found here.
func (c *command) checkAll(cfg *gateway.Config) error {
	if _, err := loadCertificate(cfg, slog.New(slog.DiscardHandler)); err != nil {
		return err
	}
	h, err := build(cfg, configuredURL(cfg), cfg.Users(), auth.NewMemory(auth.MemoryConfig{}), slog.New(slog.DiscardHandler), nil)
	if err != nil {
		return err
	}
	h.close()
	for _, server := range cfg.Servers {
		switch {
		case server.Disabled:
			fmt.Fprintf(c.out, "%s: disabled\n", server.Name)
		case server.Command != "":
			fmt.Fprintf(c.out, "%s: the local command %s\n", server.Name, server.Command)
		default:
			fmt.Fprintf(c.out, "%s: %s, sign-in: %s\n", server.Name, withoutQuery(server.URL.String()), server.Auth.Type)
		}
	}
	fmt.Fprintln(c.out, "The config is valid.")
	return nil
}

func (c *command) checkRemote(ctx context.Context, cfg *gateway.Config, name string) error {
	server, say := cfg.Named(name)
	if server == nil {
		return usageError{errors.New(say)}
	}
	log, err := c.logger("warn", "auto")
	if err != nil {
		return err
	}
	clients, err := newClients(cfg)
	if err != nil {
		return err
	}
	defer clients.Close()
	broker, remotes, err := newBroker(cfg, clients, configuredURL(cfg), false, auth.NewMemory(auth.MemoryConfig{}), log, nil)
	if err != nil {
		return err
	}
	defer broker.Close()
	running := slices.IndexFunc(remotes, func(r session.Remote) bool { return r.Name == name })
	return inspect(ctx, c, broker, remotes[running], server.Auth.Type)
}

// inspect asks the remote without a token and prints each step from its answer
// to where a person would be sent.
func inspect(ctx context.Context, c *command, broker *auth.Broker, remote session.Remote, authType string) error {
	step := func(s auth.Step) {
		mark := "ok  "
		if !s.OK {
			mark = "no  "
		}
		fmt.Fprintf(c.out, "%s %s", mark, s.What)
		if s.URL != "" {
			fmt.Fprintf(c.out, " %s", s.URL)
		}
		if s.Note != "" {
			fmt.Fprintf(c.out, ": %s", s.Note)
		}
		fmt.Fprintln(c.out)
	}
	if remote.Command != nil {
		return inspectCommand(c, remote)
	}
	resp, err := session.Probe(ctx, remote, "gatehouse", version)
	if err != nil {
		return fmt.Errorf("asking %s: %w", remote.Name, err)
	}
	defer resp.Body.Close()
	asks := resp.StatusCode == http.StatusUnauthorized
	open := resp.StatusCode == http.StatusOK && !strings.HasPrefix(resp.Header.Get("Content-Type"), "text/html")
	step(auth.Step{What: "initialize without a token at", URL: withoutQuery(remote.URL), OK: asks || open, Note: resp.Status})
	switch {
	case open:
		fmt.Fprintf(c.out, "%s lets everybody connect and asks for no sign-in there.\n", remote.Name)
		return nil
	case !asks:
		return fmt.Errorf("%s answered with status %d and content type %q, which is not what an MCP server does: is %s an MCP endpoint?",
			remote.Name, resp.StatusCode, resp.Header.Get("Content-Type"), withoutQuery(remote.URL))
	}
	if remote.Authorizer == nil {
		fmt.Fprintf(c.out, "%s needs no sign-in: its config says so.\n", remote.Name)
		return nil
	}
	if err := broker.Inspect(ctx, remote.Name, resp, step); err != nil {
		return err
	}
	switch authType {
	case auth.TypeMachine:
		fmt.Fprintf(c.out, "%s: the gateway signs in there itself.\n", remote.Name)
	case auth.TypeOAuth:
		fmt.Fprintf(c.out, "%s: a sign-in would begin here.\n", remote.Name)
	default:
		fmt.Fprintf(c.out, "%s: the login at gateway.auth would be used here.\n", remote.Name)
	}
	return nil
}

// inspectCommand says whether a local command is there. It does not start it.
func inspectCommand(c *command, remote session.Remote) error {
	path, err := exec.LookPath(remote.Command.Path)
	if err != nil {
		return fmt.Errorf("%s is a local command that cannot be started: %w", remote.Name, err)
	}
	fmt.Fprintf(c.out, "ok   command %s\n%s is a local command; it is started when it is first needed.\n", path, remote.Name)
	return nil
}

// withoutQuery is a URL as it may be shown: a query may hold a key.
func withoutQuery(raw string) string {
	before, _, _ := strings.Cut(raw, "?")
	return before
}
