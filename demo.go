package main

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"

	"gatehouse/demo"
	"gatehouse/gateway"
)

// demo runs a provider, a remote that it protects, and the gateway in front,
// the gateway being the same as `gatehouse serve` with the config shown.
func (c *command) demo(ctx context.Context) error {
	if err := c.noArgs(); err != nil {
		return err
	}
	log, err := c.logger("warn", "auto")
	if err != nil {
		return err
	}
	// The provider's library logs to the default.
	slog.SetDefault(log)
	behind, err := demo.Start(ctx, demo.Config{Log: log})
	if err != nil {
		return fmt.Errorf("starting the demo's provider and remote: %w", err)
	}
	defer behind.Close()
	config, err := json.MarshalIndent(map[string]any{
		"mcpServers": map[string]any{"notes": map[string]any{"url": behind.RemoteURL}},
		// One person tries it with several clients: one sign-in for all of them.
		"gateway": map[string]any{"sessions": "shared"},
	}, "", "  ")
	if err != nil {
		return fmt.Errorf("writing the demo's config: %w", err)
	}
	cfg, _, err := gateway.ParseConfig("demo", config, func(string) (string, bool) { return "", false })
	if err != nil {
		return err
	}
	if c.listen == "" {
		c.listen = freeAddress(ctx, cfg.Gateway.Listen)
	}
	if err := cfg.SetListen(c.listen); err != nil {
		return usageError{err}
	}
	return serve(ctx, cfg, log, func(url string) { c.explain(url, behind, config) })
}

// freeAddress is the address if nobody listens there, or any port: a trial
// should not fail because something else is on 8080.
func freeAddress(ctx context.Context, address string) string {
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", address)
	if err != nil {
		return "127.0.0.1:0"
	}
	l.Close()
	return address
}

func (c *command) explain(url string, behind *demo.Demo, config []byte) {
	fmt.Fprintf(c.out, `Gatehouse demo: three servers on this machine, no account needed.

  identity provider   %s
  protected remote    %s   ("notes")
  gateway             %s

1. Add the gateway to a client, for example:

     claude mcp add --transport http gatehouse %s

   or put this into the client's mcp.json:

     {"mcpServers": {"gatehouse": {"type": "http", "url": "%s"}}}

2. Ask it: "Add a note: buy milk." The answer is a sign-in link.
3. Open the link and sign in as %s with the password %s.
4. Ask again. It works, and the client never saw a token.

Also worth asking for: gateway_status, gateway_logout.
The gateway runs with this config:

%s

Ctrl-C ends everything.
`, behind.Issuer, behind.RemoteURL, url, url, url, demo.User, demo.Password, config)
}
