// Package demo is what `gatehouse demo` signs in to and calls: an identity
// provider and an MCP server that it protects, both on loopback, neither
// knowing anything of the gateway.
//
// [Start] runs both. The [Provider] is zitadel's op with what MCP clients need
// beside OpenID Connect: dynamic client registration (RFC 7591), resource
// indicators (RFC 8707), the issuer in its answers (RFC 9207), metadata where
// OAuth clients look (RFC 8414), and S256 demanded of everybody. It keeps all
// of it in memory and knows one user, whose password its login page says.
//
// The protected server, in remote.go, checks tokens as a server should that
// only knows its provider's address: the signature by the provider's published
// keys, then issuer, audience, expiry and scope. Whoever has none is told where
// to get one (RFC 9728).
package demo

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"
)

// The one user of the demo's provider.
const (
	User     = "demo"
	Password = "demo"
)

// Config says how the demo runs. Its zero value works.
type Config struct {
	Log *slog.Logger // nil: no log

	// Loopback addresses to listen on; "" is any port of 127.0.0.1.
	ProviderAddr, RemoteAddr string
}

// Demo is a running provider and a remote behind it.
type Demo struct {
	RemoteURL string // of the MCP endpoint
	Issuer    string // of the provider

	stop    context.CancelFunc
	servers []*http.Server // the remote, which asks the provider, first
	remote  *remote
	serving sync.WaitGroup
	once    sync.Once
}

// Start starts both servers. The context is for starting alone; what ends them
// is [Demo.Close].
func Start(ctx context.Context, cfg Config) (_ *Demo, err error) {
	log := cfg.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	forProvider, err := listen(ctx, cfg.ProviderAddr)
	if err != nil {
		return nil, fmt.Errorf("listening for the provider: %w", err)
	}
	defer func() {
		if err != nil {
			forProvider.Close()
		}
	}()
	forRemote, err := listen(ctx, cfg.RemoteAddr)
	if err != nil {
		return nil, fmt.Errorf("listening for the remote: %w", err)
	}
	defer func() {
		if err != nil {
			forRemote.Close()
		}
	}()
	issuer := "http://" + forProvider.Addr().String()
	provider, err := NewProvider(ProviderConfig{
		Issuer: issuer,
		Users:  []Account{{Name: User, Password: Password, FullName: "Demo User", Email: "demo@example.com"}},
		Scopes: []string{scopeNotes},
		Hint:   true,
		Log:    log,
	})
	if err != nil {
		return nil, err
	}
	remote := newRemote("http://"+forRemote.Addr().String(), issuer)
	// Handlers that wait, as event streams do, end with this context.
	base, stop := context.WithCancel(context.WithoutCancel(ctx))
	d := &Demo{
		RemoteURL: remote.url, Issuer: issuer, stop: stop, remote: remote,
		servers: []*http.Server{newServer(base, remote.handler(), log), newServer(base, provider, log)},
	}
	for i, listener := range []net.Listener{forRemote, forProvider} {
		d.serving.Go(func() {
			if err := d.servers[i].Serve(listener); !errors.Is(err, http.ErrServerClosed) {
				log.Error("demo: a server ended", "err", err)
			}
		})
	}
	return d, nil
}

// closeTime is how long requests in flight may take at Close.
const closeTime = time.Second

// Close ends both servers and waits for what they do. Twice is safe.
func (d *Demo) Close() {
	d.once.Do(func() {
		d.stop()
		ctx, cancel := context.WithTimeout(context.Background(), closeTime)
		defer cancel()
		for _, server := range d.servers {
			if err := server.Shutdown(ctx); err != nil {
				server.Close() // a connection that never sent its request
			}
		}
		d.serving.Wait()
		d.remote.close()
	})
}

// listen opens a loopback address and no other: the demo's password is known.
func listen(ctx context.Context, addr string) (net.Listener, error) {
	if addr == "" {
		addr = "127.0.0.1:0"
	}
	at, err := netip.ParseAddrPort(addr)
	if err != nil {
		return nil, fmt.Errorf("reading the address: %w", err)
	}
	if !at.Addr().IsLoopback() {
		return nil, fmt.Errorf("%s is not a loopback address", addr)
	}
	return new(net.ListenConfig).Listen(ctx, "tcp", addr)
}

func newServer(base context.Context, h http.Handler, log *slog.Logger) *http.Server {
	return &http.Server{
		Handler:           h,
		BaseContext:       func(net.Listener) context.Context { return base },
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    64 << 10,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelWarn),
	}
}
