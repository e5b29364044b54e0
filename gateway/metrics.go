package gateway

import (
	"net/http"
	"runtime"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"gatehouse/auth"
)

// Metrics count what the gateway does, for Prometheus. Their labels are names
// of remotes in the config and fixed words: nothing that a client, a user or a
// remote can make up. Make one with [NewMetrics], for one [Gateway].
type Metrics struct {
	registry *prometheus.Registry
	remotes  map[string]bool

	calls     *prometheus.CounterVec   // remote, outcome
	durations *prometheus.HistogramVec // remote
	signIns   *prometheus.CounterVec   // remote, outcome
	refreshes *prometheus.CounterVec   // remote, outcome
	exchanges *prometheus.CounterVec   // remote, way, outcome, issued
	limits    *prometheus.CounterVec   // limit
	unknown   *prometheus.CounterVec   // why
}

// NewMetrics makes the metrics of a gateway with this config.
func NewMetrics(cfg *Config, version string) *Metrics {
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: "gatehouse_" + name, Help: help}, labels)
	}
	m := &Metrics{
		registry: prometheus.NewRegistry(),
		remotes:  map[string]bool{auth.LoginRemote: cfg.Gateway.Login != nil},
		calls:    counter("calls_total", "Requests of clients that were passed on to remotes, by what came of them.", "remote", "outcome"),
		durations: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "gatehouse_call_duration_seconds", Help: "How long requests that were passed on to remotes took.",
			Buckets: []float64{.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 300},
		}, []string{"remote"}),
		signIns:   counter("sign_ins_total", "Sign-ins at remotes: begun in a browser, finished, refused.", "remote", "outcome"),
		refreshes: counter("refreshes_total", "Refreshes of grants: done, refused by the authorization server, failed.", "remote", "outcome"),
		unknown:   counter("unauthenticated_total", "MCP requests that were refused because nobody knew who sent them: none (no bearer token), invalid_token, invalid_request.", "why"),
		exchanges: counter("exchanges_total", "Tokens fetched without a person, by the way, what came of it, and the type of what was issued; those from the cache are counted there.", "remote", "way", "outcome", "issued"),
		limits:    counter("limits_hit_total", "Requests that were refused by a limit, most of them of gateway.limits.", "limit"),
	}
	build := prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "gatehouse_build_info", Help: "Always 1."}, []string{"version", "go"})
	build.WithLabelValues(version, runtime.Version()).Set(1)
	m.registry.MustRegister(m.calls, m.durations, m.signIns, m.refreshes, m.exchanges, m.limits, m.unknown, build,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	for _, server := range cfg.Running() {
		m.remotes[server.Name] = true
		// Named from the start, so that a rate has something to begin from.
		m.calls.WithLabelValues(server.Name, outcomeOK)
		m.durations.WithLabelValues(server.Name)
	}
	return m
}

// watch reads from the gateway what it holds, whenever somebody asks.
func (m *Metrics) watch(g *Gateway) {
	gauge := func(name, help string, value func() float64) {
		m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "gatehouse_" + name, Help: help}, value))
	}
	gauge("sessions", "MCP sessions of clients over HTTP.", func() float64 {
		g.clients.mu.Lock()
		defer g.clients.mu.Unlock()
		return float64(len(g.clients.byID))
	})
	gauge("principals", "Users, or anonymous sessions, that connections are held for.", func() float64 {
		g.mu.Lock()
		defer g.mu.Unlock()
		return float64(len(g.views))
	})
	gauge("calls_in_flight", "Requests of clients that are being answered.", func() float64 {
		g.calls.mu.Lock()
		defer g.calls.mu.Unlock()
		return float64(g.calls.n)
	})
	gauge("exchange_cache_tokens", "Tokens kept that no person signed in for.", func() float64 { return float64(g.auth.Exchanges().Size) })
	for name, read := range map[string]func() uint64{
		"hits":      func() uint64 { return g.auth.Exchanges().Hits },
		"misses":    func() uint64 { return g.auth.Exchanges().Misses },
		"evictions": func() uint64 { return g.auth.Exchanges().Evictions },
	} {
		m.registry.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{
			Name: "gatehouse_exchange_cache_" + name + "_total", Help: "What the cache of these tokens was good for: " + name + ".",
		}, func() float64 { return float64(read()) }))
	}
	m.registry.MustRegister(&connections{g: g, desc: prometheus.NewDesc("gatehouse_connections", "Connections to remotes.", []string{"remote"}, nil)})
}

// connections collects how many connections there are to each remote.
type connections struct {
	g    *Gateway
	desc *prometheus.Desc
}

func (c *connections) Describe(to chan<- *prometheus.Desc) { to <- c.desc }

func (c *connections) Collect(to chan<- prometheus.Metric) {
	for remote, n := range c.g.sessions.Connections() {
		to <- prometheus.MustNewConstMetric(c.desc, prometheus.GaugeValue, float64(n), remote)
	}
}

// remote is a label: a name of the config, or one word for all others.
func (m *Metrics) remote(name string) string {
	if m.remotes[name] {
		return name
	}
	return "unknown"
}

func (m *Metrics) called(remote, outcome string, took time.Duration) {
	m.calls.WithLabelValues(m.remote(remote), outcome).Inc()
	m.durations.WithLabelValues(m.remote(remote)).Observe(took.Seconds())
}

// Outcomes of a sign-in.
const (
	signInBegun    = "begun"
	signInFinished = "finished"
	signInRefused  = "refused"
)

func (m *Metrics) signIn(remote, outcome string) {
	m.signIns.WithLabelValues(m.remote(remote), outcome).Inc()
}

// Refreshed counts a refresh; its outcome is one of auth's.
func (m *Metrics) Refreshed(remote, outcome string) {
	m.refreshes.WithLabelValues(m.remote(remote), outcome).Inc()
}

// unauthenticated counts a request of nobody.
func (m *Metrics) unauthenticated(why string) { m.unknown.WithLabelValues(why).Inc() }

// Exchanged counts a token that no person signed in for; its arguments are
// auth's.
func (m *Metrics) Exchanged(remote, way, outcome, issued string) {
	m.exchanges.WithLabelValues(m.remote(remote), way, outcome, issued).Inc()
}

// hit counts a request that a limit has refused.
func (m *Metrics) hit(limit string) { m.limits.WithLabelValues(limit).Inc() }

// Handler serves the metrics.
func (m *Metrics) Handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{})
}
