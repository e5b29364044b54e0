// Gatehouse is one MCP server in front of all of a user's MCP servers.
//
// This file parses the command line, builds the house, serves and drains;
// nothing else reads flags or the environment. A call then goes one way
// through the rooms, and its answer comes back:
//
//	main → gateway → session → auth → exchange
//
// gateway is what clients and browsers see, session holds the connections to
// the remotes, auth knows who may use which token, exchange gets tokens for
// other tokens. Each package's doc is the next stop of the tour.
package main

import (
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/lmittmann/tint"
	"golang.org/x/term"

	"gatehouse/gateway"
)

// version is what `gatehouse version` and the MCP handshake say.
const version = "0.1.0"

// Exit codes.
const (
	exitDone   = 0
	exitFailed = 1
	exitUsage  = 2 // wrong usage or config
)

const usage = `Gatehouse: one MCP server in front of all your MCP servers.

  gatehouse serve  [--config FILE] [--listen ADDR]   MCP over HTTP at http://ADDR/mcp, default 127.0.0.1:8080
  gatehouse stdio  [--config FILE]                   MCP over stdin and stdout
  gatehouse demo   [--listen ADDR]                   try it: a provider, a protected remote and the gateway, all local
  gatehouse check  [--config FILE] [REMOTE]          validate the config; with REMOTE, walk its sign-in discovery
  gatehouse status | login REMOTE | logout REMOTE    the sign-ins that stdio uses, from a terminal
  gatehouse version

Without --config: ./gatehouse.json, else gatehouse/gatehouse.json in your config directory.
--log-level debug|info|warn|error and --log-format auto|text|json go with every command.
`

// drainTime is how long calls in flight may take after a signal to stop.
const drainTime = 10 * time.Second

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	// A second signal does not wait for the drain.
	context.AfterFunc(ctx, stop)
	floor := heapFloor()
	code := run(ctx, os.Args[1:])
	runtime.KeepAlive(floor)
	os.Exit(code)
}

// heapFloor is memory that is never touched, and so never resident, but counts
// for the collector as in use: it waits until as much garbage has gathered
// before it looks for it. The SDK makes 32 KB of garbage whenever it reads JSON,
// and with few sessions there would be a collection every few dozen calls. A
// higher GOGC would do the same, but also multiply what each session costs.
func heapFloor() []byte {
	if os.Getenv("GOGC") != "" || os.Getenv("GOMEMLIMIT") != "" {
		return nil // who sets these knows better
	}
	return make([]byte, 64<<20)
}

// command is one invocation: its flags, and what it writes to.
type command struct {
	config, listen      string
	logLevel, logFormat string
	args                []string
	out, err            io.Writer
}

// usageError is a mistake in the command line or the config: exit code 2.
type usageError struct{ error }

func run(ctx context.Context, args []string) int {
	c := &command{out: os.Stdout, err: os.Stderr}
	name := "help"
	if len(args) > 0 {
		name, args = args[0], args[1:]
	}
	commands := map[string]struct {
		run   func(context.Context) error
		flags string // that it takes beside those of the log
	}{
		"serve": {c.serve, "config listen"}, "stdio": {c.stdio, "config"}, "demo": {c.demo, "listen"},
		"check": {c.check, "config"}, "version": {c.version, ""},
		"status": {c.status, "config"}, "login": {c.login, "config"}, "logout": {c.logout, "config"},
	}
	action, ok := commands[name]
	if !ok {
		fmt.Fprint(c.err, usage)
		if name == "help" || name == "-h" || name == "--help" {
			return exitDone
		}
		fmt.Fprintf(c.err, "\ngatehouse: there is no command %q\n", name)
		return exitUsage
	}
	flags := flag.NewFlagSet(name, flag.ContinueOnError)
	flags.SetOutput(c.err)
	flags.Usage = func() { fmt.Fprint(c.err, usage) }
	flags.StringVar(&c.config, "config", "", "config file")
	flags.StringVar(&c.listen, "listen", "", "address to listen on")
	flags.StringVar(&c.logLevel, "log-level", "", "debug, info, warn or error")
	flags.StringVar(&c.logFormat, "log-format", "", "auto, text or json")
	// Flags may stand after a remote's name, too.
	for rest := args; ; rest = rest[1:] {
		switch err := flags.Parse(rest); {
		case errors.Is(err, flag.ErrHelp):
			return exitDone
		case err != nil:
			return exitUsage
		}
		if rest = flags.Args(); len(rest) == 0 {
			break
		}
		c.args = append(c.args, rest[0])
	}
	err := c.checkFlags(flags, name, action.flags)
	if err == nil {
		err = action.run(ctx)
	}
	if err == nil {
		return exitDone
	}
	fmt.Fprintln(c.err, "gatehouse:", err)
	if _, ok := errors.AsType[*gateway.ConfigError](err); ok {
		return exitUsage
	}
	if _, ok := errors.AsType[usageError](err); ok {
		return exitUsage
	}
	return exitFailed
}

// checkFlags refuses flags that would have no effect, and values that they
// cannot have.
func (c *command) checkFlags(given *flag.FlagSet, name, taken string) error {
	var err error
	given.Visit(func(f *flag.Flag) {
		if !strings.HasPrefix(f.Name, "log-") && !slices.Contains(strings.Fields(taken), f.Name) {
			err = usageError{fmt.Errorf("%s takes no --%s", name, f.Name)}
		}
	})
	if err == nil {
		_, err = c.logger("info", "auto")
	}
	return err
}

func (c *command) version(context.Context) error {
	if err := c.noArgs(); err != nil {
		return err
	}
	fmt.Fprintln(c.out, "gatehouse", version)
	return nil
}

// noArgs refuses what a command does not take.
func (c *command) noArgs() error {
	if len(c.args) > 0 {
		return usageError{fmt.Errorf("unexpected argument %q", c.args[0])}
	}
	return nil
}

// readConfig finds, reads and checks the config.
func (c *command) readConfig() (*gateway.Config, []gateway.Note, error) {
	path := c.config
	if path == "" {
		found, err := findConfig()
		if err != nil {
			return nil, nil, err
		}
		path = found
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, nil, usageError{fmt.Errorf("reading the config: %w", err)}
	}
	return gateway.ParseConfig(path, data, os.LookupEnv)
}

// findConfig looks where a config is expected without --config.
func findConfig() (string, error) {
	tried := []string{"gatehouse.json"}
	if dir, err := os.UserConfigDir(); err == nil {
		tried = append(tried, filepath.Join(dir, "gatehouse", "gatehouse.json"))
	}
	for _, path := range tried {
		if _, err := os.Stat(path); err == nil {
			return path, nil
		}
	}
	return "", usageError{fmt.Errorf(`there is no config at %s. Write one, such as {"mcpServers": {"notes": {"url": "https://notes.example.com/mcp"}}}, name one with --config (your client's mcp.json will do), or see "gatehouse demo"`,
		strings.Join(tried, " or "))}
}

// logger makes the log: to stderr, colours on a terminal, JSON otherwise.
func (c *command) logger(level, format string) (*slog.Logger, error) {
	if c.logLevel != "" {
		level = c.logLevel
	}
	if c.logFormat != "" {
		format = c.logFormat
	}
	var l slog.Level
	if err := l.UnmarshalText([]byte(level)); err != nil {
		return nil, usageError{fmt.Errorf("--log-level %q is not one of debug, info, warn, error", level)}
	}
	f, isFile := c.err.(*os.File)
	terminal := isFile && term.IsTerminal(int(f.Fd()))
	switch {
	case format == "json", format == "auto" && !terminal:
		return slog.New(slog.NewJSONHandler(c.err, &slog.HandlerOptions{Level: l})), nil
	case format == "text", format == "auto":
		return slog.New(tint.NewTextHandler(c.err, &tint.Options{Level: l, TimeFormat: time.TimeOnly, NoColor: !terminal})), nil
	}
	return nil, usageError{fmt.Errorf("--log-format %q is not one of auto, text, json", format)}
}

// prepare reads the config and makes the logger for a command that runs.
func (c *command) prepare() (*gateway.Config, *slog.Logger, error) {
	cfg, notes, err := c.readConfig()
	if err != nil {
		return nil, nil, err
	}
	log, err := c.logger(cfg.Gateway.Log.Level, cfg.Gateway.Log.Format)
	if err != nil {
		return nil, nil, err
	}
	for _, note := range notes {
		log.Info("config: "+note.Say, "line", note.Line, "at", note.Path)
	}
	return cfg, log, nil
}

func (c *command) serve(ctx context.Context) error {
	if err := c.noArgs(); err != nil {
		return err
	}
	cfg, log, err := c.prepare()
	if err != nil {
		return err
	}
	if c.listen != "" {
		if err := cfg.SetListen(c.listen); err != nil {
			return usageError{err}
		}
	}
	return serve(ctx, cfg, log, nil)
}

// serve listens, builds the house and serves it until ctx ends. ready, if not
// nil, learns the URL of the MCP endpoint.
func serve(ctx context.Context, cfg *gateway.Config, log *slog.Logger, ready func(url string)) error {
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", cfg.Gateway.Listen)
	if err != nil {
		return fmt.Errorf("listening (gateway.listen or --listen chooses another address): %w", err)
	}
	defer listener.Close()
	base := localURL(cfg.Gateway.Listen, listener.Addr())
	certificate, err := loadCertificate(cfg, log)
	if err != nil {
		return err
	}
	if certificate != nil {
		base = "https" + strings.TrimPrefix(base, "http")
		listener = tls.NewListener(listener, &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: certificate.Get})
	}
	store, err := openStore(ctx, cfg, "memory", log)
	if err != nil {
		return err
	}
	defer store.Close()
	// Where there is nothing to open anew it ends the process, as ever.
	rotated := make(chan os.Signal, 1)
	if cfg.Gateway.Audit.File != "" {
		signal.Notify(rotated, syscall.SIGHUP)
		defer signal.Stop(rotated)
	}
	audit, closeAudit, err := openAudit(cfg, log, rotated)
	if err != nil {
		return err
	}
	defer closeAudit()
	h, err := build(cfg, publicURL(cfg, base), cfg.Users(), store, log, audit)
	if err != nil {
		return err
	}
	defer h.close()
	stopMetrics, err := serveMetrics(ctx, cfg, h, log)
	if err != nil {
		return err
	}
	defer stopMetrics()
	srv := gateway.NewServer(context.WithoutCancel(ctx), h.gateway.Handler(), log)
	served := make(chan error, 1)
	go func() { served <- srv.Serve(listener) }()
	sessions := cfg.Gateway.Sessions
	if cfg.Users() {
		sessions = "of users who log in at " + cfg.Gateway.Login.Issuer
	}
	log.Info("serving MCP over HTTP", "url", base+"/mcp", "remotes", len(cfg.Running()), "sessions", sessions)
	if public, err := url.Parse(publicURL(cfg, base)); err == nil && !isLoopback(public.Hostname()) && !cfg.Users() {
		log.Warn("clients are not authenticated: whoever reaches the MCP endpoint through publicUrl can use it; let your proxy admit the right people only", "publicUrl", cfg.Gateway.PublicURL)
	}
	if ready != nil {
		ready(base + "/mcp")
	}
	select {
	case err := <-served:
		return fmt.Errorf("serving: %w", err)
	case <-ctx.Done():
	}
	log.Info("stopping: calls in flight may finish", "within", drainTime.String())
	drain, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTime)
	defer cancel()
	h.gateway.Drain(drain)
	// Event streams end with their sessions; what is left is cut.
	if err := srv.Shutdown(drain); err != nil {
		srv.Close()
	}
	if err := <-served; !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serving: %w", err)
	}
	return nil
}

// loadCertificate reads the gateway's own certificate, nil if it has none.
func loadCertificate(cfg *gateway.Config, log *slog.Logger) (*gateway.Certificate, error) {
	files := cfg.Gateway.TLS
	if files.Cert == "" {
		return nil, nil
	}
	certificate, err := gateway.LoadCertificate(cfg.Path(files.Cert), cfg.Path(files.Key), log)
	if err != nil {
		return nil, usageError{fmt.Errorf("gateway.tls: %w", err)}
	}
	return certificate, nil
}

// serveMetrics serves the metrics at an address of their own, if they have one,
// until stop.
func serveMetrics(ctx context.Context, cfg *gateway.Config, h *house, log *slog.Logger) (stop func(), err error) {
	address := cfg.Gateway.Metrics.Listen
	if address == "" {
		return func() {}, nil
	}
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", address)
	if err != nil {
		return nil, fmt.Errorf("listening for metrics (gateway.metrics.listen): %w", err)
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", h.metrics.Handler())
	srv := gateway.NewServer(context.WithoutCancel(ctx), mux, log)
	var serving sync.WaitGroup
	serving.Go(func() {
		if err := srv.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
			log.Error("serving metrics failed", "error", err)
		}
	})
	log.Info("serving metrics", "metrics", "http://"+listener.Addr().String()+"/metrics")
	return func() {
		srv.Close()
		serving.Wait()
	}, nil
}

// configuredURL is where clients and browsers reach the gateway, going by the
// config alone.
func configuredURL(cfg *gateway.Config) string {
	if cfg.Gateway.TLS.Cert != "" {
		return publicURL(cfg, "https://"+cfg.Gateway.Listen)
	}
	return publicURL(cfg, "http://"+cfg.Gateway.Listen)
}

// publicURL is where browsers reach the gateway.
func publicURL(cfg *gateway.Config, base string) string {
	if cfg.Gateway.PublicURL != "" {
		return cfg.Gateway.PublicURL
	}
	return base
}

// localURL is the address that was asked for, with the port that it became.
func localURL(asked string, got net.Addr) string {
	host, _, err := net.SplitHostPort(asked)
	_, port, err2 := net.SplitHostPort(got.String())
	if err != nil || err2 != nil || host == "" {
		return "http://" + got.String()
	}
	return "http://" + net.JoinHostPort(host, port)
}
