package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"syscall"
	"time"

	"gatehouse/auth"
	"gatehouse/auth/secret"
	"gatehouse/gateway"
)

// This file is what runs for one user on their own machine: stdio, and the
// commands that act on the same sign-ins. Every IDE window starts its own
// stdio gateway; with the file store they share the sign-ins, and the pages
// that a browser needs are served by whichever of them has the port.

const (
	// pagesPort is where the pages are with the file store, so that a sign-in can
	// be finished by another process, and registrations outlive this one.
	pagesPort = 47113
	// takeOver is how often a process looks whether the port is free by now.
	takeOver = 2 * time.Second
	// loginTime is how long `gatehouse login` waits for a person.
	loginTime = 15 * time.Minute
)

// openStore opens the configured store; fallback is the type where the config
// names none.
func openStore(ctx context.Context, cfg *gateway.Config, fallback string, log *slog.Logger) (auth.Store, error) {
	s := cfg.Gateway.Store
	if s.Type == "" {
		s.Type = fallback
	}
	if s.Type == "memory" {
		return auth.NewMemory(auth.MemoryConfig{}), nil
	}
	var keyFile string
	if s.KeyFile != "" {
		keyFile = cfg.Path(s.KeyFile)
	}
	var keys secret.Text
	if s.KeyEnv != "" {
		value, ok := os.LookupEnv(s.KeyEnv)
		if !ok {
			return nil, usageError{fmt.Errorf("gateway.store.keyEnv: the environment variable %s is not set", s.KeyEnv)}
		}
		keys = secret.New(value)
	}
	if s.Type == "redis" {
		c := auth.RedisConfig{URL: s.URL, Prefix: s.Prefix, KeyFile: keyFile, Keys: keys, Log: log}
		if s.CA != "" {
			pem, err := os.ReadFile(cfg.Path(s.CA))
			if err != nil {
				return nil, usageError{fmt.Errorf("reading gateway.store.ca: %w", err)}
			}
			c.CA = pem
		}
		store, err := auth.OpenRedis(ctx, c)
		if errors.Is(err, auth.ErrKey) || errors.Is(err, auth.ErrWrongKey) {
			return nil, usageError{err}
		} else if err != nil {
			return nil, err
		}
		return store, nil
	}
	c := auth.FileConfig{Dir: cfg.Path(s.Path), KeyFile: keyFile, Keys: keys, Log: log}
	if s.Path == "" {
		dir, err := stateDir()
		if err != nil {
			return nil, usageError{fmt.Errorf("there is no place for the store: %w; set gateway.store.path", err)}
		}
		c.Dir = dir
	}
	if s.Keyring {
		c.AskKeys = func(fresh bool) (secret.Text, error) {
			keys, err := auth.KeyringKeys(ctx, "store "+c.Dir, fresh)
			if err != nil {
				return keys, fmt.Errorf("gateway.store.keyring: %w", err)
			}
			return keys, nil
		}
	}
	store, err := auth.OpenFile(c)
	if err != nil {
		return nil, usageError{err}
	}
	return store, nil
}

// stateDir is where this user's programs keep what must outlive them.
func stateDir() (string, error) {
	switch runtime.GOOS {
	case "darwin":
		dir, err := os.UserConfigDir()
		return filepath.Join(dir, "gatehouse"), err
	case "windows":
		dir, err := os.UserCacheDir()
		return filepath.Join(dir, "gatehouse"), err
	}
	// XDG Base Directory Specification: "If $XDG_STATE_HOME is either not set or
	// empty, a default equal to $HOME/.local/state should be used."
	if dir := os.Getenv("XDG_STATE_HOME"); filepath.IsAbs(dir) {
		return filepath.Join(dir, "gatehouse"), nil
	}
	home, err := os.UserHomeDir()
	return filepath.Join(home, ".local", "state", "gatehouse"), err
}

// identity is the same for processes that can finish each other's sign-ins:
// the same store, the same remotes. It is empty where nobody else could.
func identity(cfg *gateway.Config, store auth.Store) string {
	file, ok := store.(*auth.File)
	if !ok {
		return ""
	}
	h := sha256.New()
	fmt.Fprintf(h, "%q\n", file.Dir())
	for _, server := range cfg.Running() {
		if server.URL == nil {
			continue
		}
		fmt.Fprintf(h, "%q %q %q %q\n", server.Name, server.URL, server.Auth.ClientID, server.Auth.Issuer)
	}
	if login := cfg.Gateway.Login; login != nil {
		fmt.Fprintf(h, "login %q %q\n", login.Issuer, login.ClientID)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// local is the house for one user, and the pages that belong to it.
type local struct {
	*house
	store    auth.Store
	log      *slog.Logger
	base     string       // where the pages are, here or in another process
	listener net.Listener // nil: another process has the port, or nobody
	served   bool         // the pages are there, or will be once serve is called
	serving  sync.WaitGroup
	stop     context.CancelFunc

	closeAudit func()
}

// openLocal builds the house on the file store and finds out who serves its
// pages. If pages is false, this process will not, and leaves the port alone.
func openLocal(ctx context.Context, cfg *gateway.Config, log *slog.Logger, pages bool) (*local, error) {
	store, err := openStore(ctx, cfg, "file", log)
	if err != nil {
		return nil, err
	}
	l := &local{store: store, log: log, stop: func() {}}
	if err := l.open(ctx, cfg, pages); err != nil {
		if l.listener != nil {
			l.listener.Close()
		}
		store.Close()
		return nil, err
	}
	return l, nil
}

func (l *local) open(ctx context.Context, cfg *gateway.Config, pages bool) error {
	if err := l.findPages(ctx, cfg, pages); err != nil {
		return err
	}
	audit, closeAudit, err := openAudit(cfg, l.log, nil)
	if err != nil {
		return err
	}
	if l.house, err = build(cfg, l.base, false, l.store, l.log, audit); err != nil {
		closeAudit()
		return err
	}
	l.closeAudit = closeAudit
	return nil
}

// findPages takes the port for the pages, or sees that a process has it that
// can finish the sign-ins of this one. If take is false, it only looks.
func (l *local) findPages(ctx context.Context, cfg *gateway.Config, take bool) (err error) {
	port := cfg.Gateway.OAuth.CallbackPort
	configured := port != 0
	if !configured && l.store.Shared() {
		port = pagesPort
	}
	address := net.JoinHostPort("127.0.0.1", strconv.Itoa(port))
	l.served = true
	if !take {
		l.base, l.served = "http://"+address, asksSame(ctx, address, identity(cfg, l.store))
		return nil
	}
	l.listener, err = new(net.ListenConfig).Listen(ctx, "tcp", address)
	switch {
	case err == nil:
	case l.store.Shared() && asksSame(ctx, address, identity(cfg, l.store)):
		l.base = "http://" + address
		return nil
	case configured:
		return fmt.Errorf("listening for sign-in pages (gateway.oauth.callbackPort chooses the port): %w", err)
	default:
		// Somebody else's: these sign-ins are finished here, on another port.
		if l.listener, err = new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0"); err != nil {
			return fmt.Errorf("listening for sign-in pages: %w", err)
		}
	}
	l.base = "http://" + l.listener.Addr().String()
	return nil
}

// asksSame reports whether a gateway at the address has the identity.
func asksSame(ctx context.Context, address, identity string) bool {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+gateway.IdentityPath, nil)
	if err != nil {
		return false
	}
	// It goes to this machine, at an address that nobody else names: no guard.
	resp, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(req)
	if err != nil {
		return false
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<10))
	return err == nil && resp.StatusCode == http.StatusOK && string(body) == identity
}

// serve serves the pages until close, taking the port over from another process
// when that ends.
func (l *local) serve(ctx context.Context) {
	ctx, l.stop = context.WithCancel(ctx)
	l.serving.Go(func() {
		listener := l.listener
		for listener == nil {
			select {
			case <-ctx.Done():
				return
			case <-time.After(takeOver):
			}
			listener, _ = new(net.ListenConfig).Listen(ctx, "tcp", l.base[len("http://"):])
		}
		srv := gateway.NewServer(context.WithoutCancel(ctx), l.gateway.PageHandler(), l.log)
		l.serving.Go(func() {
			<-ctx.Done()
			srv.Close()
		})
		if err := srv.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
			l.log.Error("serving the sign-in pages failed", "error", err)
		}
	})
}

func (l *local) close() {
	l.stop()
	l.serving.Wait()
	l.house.close()
	l.closeAudit()
	if err := l.store.Close(); err != nil {
		l.log.Error("closing the store", "error", err)
	}
}

func (c *command) stdio(ctx context.Context) error {
	if err := c.noArgs(); err != nil {
		return err
	}
	cfg, log, err := c.prepare()
	if err != nil {
		return err
	}
	l, err := openLocal(ctx, cfg, log, true)
	if err != nil {
		return err
	}
	defer l.close()
	// A client that has gone away must not kill what is being written to the store.
	signal.Ignore(syscall.SIGPIPE)
	l.serve(context.WithoutCancel(ctx))
	log.Info("serving MCP over stdio", "remotes", len(cfg.Running()), "pages", l.base, "pages_here", l.listener != nil, "sign_ins_kept", l.store.Shared())
	return l.gateway.ServeStdio(ctx, os.Stdin, os.Stdout, drainTime)
}

// terminal opens the local house for a command that acts on its sign-ins, or
// on that of one remote, and may have to serve its pages.
func (c *command) terminal(ctx context.Context, pages bool, remote ...string) (*local, error) {
	if c.logLevel == "" {
		c.logLevel = "warn"
	}
	cfg, log, err := c.prepare()
	if err != nil {
		return nil, err
	}
	for _, name := range remote {
		if server, say := cfg.Named(name); server == nil {
			return nil, usageError{errors.New(say)}
		}
	}
	const ask = ": ask the running gateway by its tool gateway_status, gateway_login or gateway_logout"
	switch cfg.Gateway.Store.Type {
	case "memory":
		return nil, usageError{errors.New("the config keeps sign-ins in memory (gateway.store.type), where no other process can see them" + ask)}
	case "redis":
		return nil, usageError{errors.New("the config keeps sign-ins in Redis (gateway.store.type), where those of many users are; this command is for those of one user on this machine" + ask)}
	}
	return openLocal(ctx, cfg, log, pages)
}

func (c *command) status(ctx context.Context) error {
	if err := c.noArgs(); err != nil {
		return err
	}
	l, err := c.terminal(ctx, false)
	if err != nil {
		return err
	}
	defer l.close()
	say, err := l.gateway.Status(ctx, l.served)
	if err != nil {
		return err
	}
	fmt.Fprintln(c.out, say)
	return nil
}

func (c *command) logout(ctx context.Context) error {
	if len(c.args) != 1 {
		return usageError{errors.New("which remote? gatehouse logout REMOTE")}
	}
	l, err := c.terminal(ctx, false, c.args[0])
	if err != nil {
		return err
	}
	defer l.close()
	say, _, err := l.gateway.Own(ctx, "gateway_logout", map[string]any{"remote": c.args[0]})
	if err != nil {
		return err
	}
	fmt.Fprintln(c.out, say)
	return nil
}

// login prints the link and waits until somebody has used it.
func (c *command) login(ctx context.Context) error {
	if len(c.args) != 1 {
		return usageError{errors.New("which remote? gatehouse login REMOTE")}
	}
	l, err := c.terminal(ctx, true, c.args[0])
	if err != nil {
		return err
	}
	defer l.close()
	l.serve(context.WithoutCancel(ctx))
	say, link, err := l.gateway.Own(ctx, "gateway_login", map[string]any{"remote": c.args[0]})
	if err != nil {
		return err
	}
	fmt.Fprintln(c.out, say)
	if link == "" {
		return nil
	}
	waiting, cancel := context.WithTimeout(ctx, loginTime)
	defer cancel()
	switch err := l.gateway.Await(waiting, c.args[0]); {
	case ctx.Err() != nil:
		return errors.New("stopped; the link works no more")
	case err != nil:
		return fmt.Errorf("nobody signed in to %s in time: run it again for a new link", c.args[0])
	}
	fmt.Fprintf(c.out, "Signed in to %s.\n", c.args[0])
	return nil
}
