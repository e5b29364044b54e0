package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strings"

	"gatehouse/auth"
	"gatehouse/auth/guard"
	"gatehouse/auth/secret"
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
func build(cfg *gateway.Config, publicURL string, store auth.Store, log, audit *slog.Logger) (*house, error) {
	clients, err := newClients(cfg)
	if err != nil {
		return nil, err
	}
	metrics := gateway.NewMetrics(cfg, version)
	broker, remotes, err := newBroker(cfg, clients, publicURL, store, log, metrics.Refreshed)
	if err != nil {
		return nil, err
	}
	pool := session.New(session.Config{
		Remotes:     remotes,
		Name:        "gatehouse",
		Version:     version,
		MaxSessions: cfg.Gateway.Limits.Sessions,
		Log:         log,
	})
	return &house{
		clients: clients,
		auth:    broker,
		pool:    pool,
		metrics: metrics,
		gateway: gateway.New(gateway.Setup{
			Config: cfg, Auth: broker, Sessions: pool, PublicURL: publicURL, Version: version, Log: log,
			Metrics: metrics, Audit: audit, SharedStore: store.Shared(), Identity: identity(cfg, store),
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
func newBroker(cfg *gateway.Config, clients *guard.Clients, publicURL string, store auth.Store, log *slog.Logger, refreshed func(remote, outcome string)) (*auth.Broker, []session.Remote, error) {
	var signIns []auth.Remote
	var remotes []session.Remote
	for _, server := range cfg.Running() {
		config, err := remoteTLS(cfg, server)
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
			Timeout: server.Timeout, HTTP: client,
		})
		if server.Auth.Type != "oauth" {
			continue
		}
		clientSecret, err := clientSecret(cfg, server)
		if err != nil {
			return nil, nil, usageError{fmt.Errorf("remote %s: %w", server.Name, err)}
		}
		signIns = append(signIns, auth.Remote{
			Name: server.Name, URL: server.URL.String(),
			Issuer: server.Auth.Issuer, ClientID: server.Auth.ClientID, ClientSecret: clientSecret,
			TokenEndpointAuthMethod: server.Auth.TokenEndpointAuthMethod,
			CallbackPath:            server.Auth.CallbackPath, Scopes: server.Auth.Scopes,
			HTTP: client,
		})
	}
	oauth := cfg.Gateway.OAuth
	broker, err := auth.New(auth.Config{
		Remotes: signIns, PublicURL: publicURL, CallbackPath: oauth.CallbackPath,
		ClientName: oauth.ClientName, ClientMetadataURL: oauth.ClientMetadataURL,
		MetadataPath: oauth.MetadataPath, ClientScopes: oauth.Scopes,
		Disabled: !oauth.Enabled, MaxFlows: cfg.Gateway.Limits.FlowsPerPrincipal,
		Refreshed: refreshed, Store: store, Log: log,
	})
	if err != nil {
		return nil, nil, fmt.Errorf("preparing sign-in: %w", err)
	}
	for i, r := range remotes {
		if cfg.Running()[i].Auth.Type == "oauth" {
			remotes[i].Authorizer = func(p auth.Principal) session.Authorizer { return broker.Authorizer(p, r.Name) }
		}
	}
	return broker, remotes, nil
}

func clientSecret(cfg *gateway.Config, server *gateway.Server) (secret.Text, error) {
	if file := server.Auth.ClientSecretFile; file != "" {
		return gateway.ReadSecretFile(cfg.Path(file))
	}
	return server.Auth.ClientSecret, nil
}

// remoteTLS returns the remote's own TLS settings, nil for none. Its "ca" adds
// to the system's roots and the gateway's.
func remoteTLS(cfg *gateway.Config, server *gateway.Server) (*tls.Config, error) {
	t := server.TLS
	if t == (gateway.TLS{}) {
		return nil, nil
	}
	out := &tls.Config{ServerName: t.ServerName, MinVersion: tls.VersionTLS12}
	if t.CA != "" {
		roots, err := x509.SystemCertPool()
		if err != nil {
			return nil, fmt.Errorf("reading the system's roots: %w", err)
		}
		for _, file := range []string{cfg.Gateway.CA, t.CA} {
			if file == "" {
				continue
			}
			pem, err := os.ReadFile(cfg.Path(file))
			if err != nil {
				return nil, fmt.Errorf("reading tls.ca: %w", err)
			}
			if !roots.AppendCertsFromPEM(pem) {
				return nil, fmt.Errorf("%s holds no certificate in PEM form", file)
			}
		}
		out.RootCAs = roots
	}
	if t.Cert != "" {
		cert, err := tls.LoadX509KeyPair(cfg.Path(t.Cert), cfg.Path(t.Key))
		if err != nil {
			return nil, fmt.Errorf("reading tls.cert and tls.key: %w", err)
		}
		out.Certificates = []tls.Certificate{cert}
	}
	return out, nil
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
	h, err := build(cfg, configuredURL(cfg), auth.NewMemory(auth.MemoryConfig{}), slog.New(slog.DiscardHandler), nil)
	if err != nil {
		return err
	}
	h.close()
	for _, server := range cfg.Servers {
		switch {
		case server.Disabled:
			fmt.Fprintf(c.out, "%s: disabled\n", server.Name)
		case server.Unsupported != "":
			fmt.Fprintf(c.out, "%s: %s\n", server.Name, server.Unsupported)
		default:
			fmt.Fprintf(c.out, "%s: %s, sign-in: %s\n", server.Name, withoutQuery(server.URL.String()), server.Auth.Type)
		}
	}
	fmt.Fprintln(c.out, "The config is valid.")
	return nil
}

func (c *command) checkRemote(ctx context.Context, cfg *gateway.Config, name string) error {
	if server, say := cfg.Named(name); server == nil {
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
	broker, remotes, err := newBroker(cfg, clients, configuredURL(cfg), auth.NewMemory(auth.MemoryConfig{}), log, nil)
	if err != nil {
		return err
	}
	defer broker.Close()
	running := slices.IndexFunc(remotes, func(r session.Remote) bool { return r.Name == name })
	return inspect(ctx, c, broker, remotes[running])
}

// inspect asks the remote without a token and prints each step from its answer
// to where a person would be sent.
func inspect(ctx context.Context, c *command, broker *auth.Broker, remote session.Remote) error {
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
	fmt.Fprintf(c.out, "%s: a sign-in would begin here.\n", remote.Name)
	return nil
}

// withoutQuery is a URL as it may be shown: a query may hold a key.
func withoutQuery(raw string) string {
	before, _, _ := strings.Cut(raw, "?")
	return before
}
