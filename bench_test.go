package main

import (
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"sync"
	"sync/atomic"
	"testing"

	"gatehouse/auth"
	"gatehouse/gateway"
)

// startBenchGateway is a gateway in this process, in front of a remote.
func startBenchGateway(b *testing.B, remote string) (url string) {
	b.Helper()
	cfg, _, err := gateway.ParseConfig("bench", []byte(config("", "r", remote)), os.LookupEnv)
	if err != nil {
		b.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	store := auth.NewMemory(auth.MemoryConfig{})
	srv := httptest.NewUnstartedServer(nil)
	base := "http://" + srv.Listener.Addr().String()
	h, err := build(cfg, base, false, store, log, log)
	if err != nil {
		b.Fatal(err)
	}
	srv.Config = gateway.NewServer(b.Context(), h.gateway.Handler(), log)
	srv.Start()
	b.Cleanup(func() {
		h.close()
		srv.Close()
		store.Close()
	})
	return base + "/mcp"
}

func startBenchServer(b *testing.B, h http.Handler) (url string) {
	b.Helper()
	srv := httptest.NewServer(h)
	b.Cleanup(srv.Close)
	return srv.URL + "/mcp"
}

// BenchmarkGateway is a call directly, through a plain reverse proxy, and
// through the gateway, all in this process: what the client and the remote cost
// is in "direct", and in the others too.
func BenchmarkGateway(b *testing.B) {
	for _, era := range []string{legacyEra, modernEra} {
		remote := startBenchServer(b, loadRemote(era, 0))
		ways := []loadWay{
			{name: "direct", url: remote},
			{name: "proxy", url: startBenchServer(b, loadProxy(remote))},
			{name: "gatehouse", url: startBenchGateway(b, remote), prefix: "r_"},
		}
		for _, tool := range []string{"small", "large"} {
			for _, n := range []int{1, 16, 64} {
				for _, way := range ways {
					b.Run(fmt.Sprintf("era=%s/result=%dB/clients=%d/%s", era, loadTools[tool], n, way.name), func(b *testing.B) {
						benchmarkCalls(b, way, era, tool, n)
					})
				}
			}
		}
	}
}

func benchmarkCalls(b *testing.B, way loadWay, era, tool string, n int) {
	hc := loadHTTP()
	defer hc.CloseIdleConnections()
	clients := make([]*loadClient, n)
	for i := range clients {
		c, err := newLoadClient(b.Context(), hc, way.url, era, way.prefix)
		if err == nil {
			err = c.call(b.Context(), tool)
		}
		if err != nil {
			b.Fatal(err)
		}
		clients[i] = c
	}
	b.ReportAllocs()
	b.ResetTimer()
	var left atomic.Int64
	left.Store(int64(b.N))
	var running sync.WaitGroup
	for _, c := range clients {
		running.Go(func() {
			for left.Add(-1) >= 0 {
				if err := c.call(b.Context(), tool); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	running.Wait()
}

// BenchmarkList lists 5,000 tools from a warm catalog.
func BenchmarkList(b *testing.B) {
	const tools = 5000
	for _, era := range []string{legacyEra, modernEra} {
		remote := startBenchServer(b, loadRemote(era, tools))
		for _, way := range []loadWay{{name: "direct", url: remote}, {name: "gatehouse", url: startBenchGateway(b, remote), prefix: "r_"}} {
			b.Run("era="+era+"/"+way.name, func(b *testing.B) {
				hc := loadHTTP()
				defer hc.CloseIdleConnections()
				c, err := newLoadClient(b.Context(), hc, way.url, era, way.prefix)
				if err != nil {
					b.Fatal(err)
				}
				b.ReportAllocs()
				for b.Loop() {
					if err := c.list(b.Context(), tools*200); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}
