package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"gatehouse/session/rawjson"
)

// This file is what a call through the gateway costs, beside the same call
// without it and through a plain reverse proxy: the benchmarks, in one process,
// and the load run, in separate ones, whose table is in docs/performance.md.

var loadTime = flag.Duration("load", 0, "run TestLoad, each measurement taking this long, such as 2s")

// Revisions of the protocol, one for each era.
const (
	legacyEra = "2025-11-25"
	modernEra = "2026-07-28"
)

// loadTools are the tools of the load remote and the sizes of their results.
var loadTools = map[string]int{"small": 50, "large": 20_000}

// loadRemote is a remote that costs next to nothing.
func loadRemote(era string, tools int) http.Handler {
	result := func(text string) string {
		return `{"content":[{"type":"text","text":"` + text + `"}],"resultType":"complete"}`
	}
	var list strings.Builder
	list.WriteString(`{"tools":[`)
	for name := range loadTools {
		fmt.Fprintf(&list, `{"name":%q,"inputSchema":{"type":"object"}},`, name)
	}
	for i := range max(tools, 1) {
		if i > 0 {
			list.WriteByte(',')
		}
		fmt.Fprintf(&list, `{"name":"tool_%05d","description":"The %d-th of many tools, with a description of an ordinary length.","inputSchema":{"type":"object","properties":{"path":{"type":"string","description":"where"},"limit":{"type":"integer","minimum":1}},"required":["path"]}}`, i, i)
	}
	list.WriteString(`],"resultType":"complete","ttlMs":60000,"cacheScope":"private"}`)
	answers := map[string]string{
		"tools/list": list.String(),
		"ping":       `{}`,
	}
	if era == modernEra {
		answers["server/discover"] = `{"supportedVersions":["2026-07-28"],"capabilities":{"tools":{}},"serverInfo":{"name":"load","version":"1"},"resultType":"complete","ttlMs":60000,"cacheScope":"public"}`
	} else {
		answers["initialize"] = `{"protocolVersion":"2025-11-25","capabilities":{"tools":{}},"serverInfo":{"name":"load","version":"1"}}`
	}
	calls := map[string]string{}
	for name, size := range loadTools {
		calls[name] = result(strings.Repeat("x", size))
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodPost {
			w.WriteHeader(http.StatusMethodNotAllowed)
			return
		}
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		got, err := rawjson.Get(body, "id", "method", "params")
		if err != nil || got[0] == nil {
			w.WriteHeader(http.StatusAccepted)
			return
		}
		method, _ := rawjson.String(got[1])
		answer, ok := answers[method]
		if method == "tools/call" {
			name, err := rawjson.Get(got[2], "name")
			if err == nil {
				tool, _ := rawjson.String(name[0])
				answer, ok = calls[tool]
			}
		}
		w.Header().Set("Content-Type", "application/json")
		if method == "initialize" {
			w.Header().Set("Mcp-Session-Id", "load")
		}
		if !ok {
			fmt.Fprintf(w, `{"jsonrpc":"2.0","id":%s,"error":{"code":-32601,"message":"there is no %s"}}`, got[0], method)
			return
		}
		buf := make([]byte, 0, len(answer)+64)
		buf = append(append(buf, `{"jsonrpc":"2.0","id":`...), got[0]...)
		buf = append(append(buf, `,"result":`...), answer...)
		w.Write(append(buf, '}'))
	})
}

// loadProxy is a plain reverse proxy, with what makes one fast.
func loadProxy(to string) http.Handler {
	target, err := url.Parse(to)
	if err != nil {
		panic(err) // our own
	}
	proxy := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: target.Scheme, Host: target.Host})
	proxy.FlushInterval = -1
	proxy.BufferPool = &buffers{}
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.MaxIdleConnsPerHost = 512
	proxy.Transport = transport
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// Or an answer that begins before the request's end has been read breaks off.
		http.NewResponseController(w).EnableFullDuplex()
		proxy.ServeHTTP(w, r)
	})
}

type buffers struct{ pool sync.Pool }

func (b *buffers) Get() []byte {
	if p, ok := b.pool.Get().(*[]byte); ok {
		return *p
	}
	return make([]byte, 32<<10)
}

func (b *buffers) Put(p []byte) { b.pool.Put(&p) }

// loadServer is `load-server remote ERA TOOLS` or `load-server proxy URL`.
func loadServer() {
	var h http.Handler
	switch os.Args[1] {
	case "remote":
		tools, _ := strconv.Atoi(os.Args[3])
		h = loadRemote(os.Args[2], tools)
	case "proxy":
		h = loadProxy(os.Args[2])
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Printf("http://%s/mcp\n", l.Addr())
	http.Serve(l, h)
}

// loadClient is one client of an endpoint, by hand.
type loadClient struct {
	url, era, prefix string
	http             *http.Client
	header           http.Header
	id               int
}

func newLoadClient(ctx context.Context, hc *http.Client, url, era, prefix string) (*loadClient, error) {
	c := &loadClient{url: url, era: era, prefix: prefix, http: hc, header: http.Header{
		"Content-Type": {"application/json"}, "Accept": {"application/json, text/event-stream"}, "Mcp-Protocol-Version": {era},
	}}
	if era == modernEra {
		return c, nil
	}
	if err := c.post(ctx, c.header, []byte(initializeMessage), func(h http.Header, _ []byte) {
		c.header["Mcp-Session-Id"] = h["Mcp-Session-Id"]
	}); err != nil {
		return nil, err
	}
	return c, c.post(ctx, c.header, []byte(initializedMessage), nil)
}

const loadEnvelope = `,"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientInfo":{"name":"load","version":"1"},"io.modelcontextprotocol/clientCapabilities":{}}`

func (c *loadClient) call(ctx context.Context, tool string) error {
	return c.request(ctx, "tools/call", c.prefix+tool, `"name":"`+c.prefix+tool+`","arguments":{"text":"hello"}`, loadTools[tool])
}

func (c *loadClient) list(ctx context.Context, size int) error {
	return c.request(ctx, "tools/list", "", `"x":0`, size)
}

// request wants a result of at least this size.
func (c *loadClient) request(ctx context.Context, method, name, params string, size int) error {
	c.id++
	header := c.header
	if c.era == modernEra {
		params += loadEnvelope
		header = c.header.Clone()
		header["Mcp-Method"] = []string{method}
		if name != "" {
			header["Mcp-Name"] = []string{name}
		}
	}
	var wrong error
	err := c.post(ctx, header, fmt.Appendf(nil, `{"jsonrpc":"2.0","id":%d,"method":%q,"params":{%s}}`, c.id, method, params), func(_ http.Header, body []byte) {
		if len(body) < size || !bytes.Contains(body, []byte(`"result"`)) || bytes.Contains(body, []byte(`"isError":true`)) {
			wrong = fmt.Errorf("%s: a wrong answer: %.300s", method, body)
		}
	})
	return cmp.Or(err, wrong)
}

func (c *loadClient) post(ctx context.Context, header http.Header, body []byte, done func(http.Header, []byte)) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.url, bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header = header
	resp, err := c.http.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	got, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode >= 300 {
		return fmt.Errorf("%s: %.300s", resp.Status, got)
	}
	if done != nil {
		done(resp.Header, got)
	}
	return nil
}

func loadHTTP() *http.Client {
	return &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 512}}
}

// loadWay is one way that a call can go.
type loadWay struct {
	name, url, prefix string
	pid               int // of the process whose time is measured; 0: none
}

// loadFigures are what one measurement shows.
type loadFigures struct {
	perSecond float64
	p50, p99  time.Duration
	cpu       time.Duration // of the process in between, for each call
}

// measure has n clients call for a while.
func (w loadWay) measure(ctx context.Context, era, tool string, n int, d time.Duration) (loadFigures, error) {
	hc := loadHTTP()
	defer hc.CloseIdleConnections()
	clients := make([]*loadClient, n)
	for i := range clients {
		c, err := newLoadClient(ctx, hc, w.url, era, w.prefix)
		if err == nil {
			err = c.call(ctx, tool)
		}
		if err != nil {
			return loadFigures{}, fmt.Errorf("%s: %w", w.name, err)
		}
		clients[i] = c
	}
	took := make([][]time.Duration, n)
	failed := make([]error, n)
	before, err := cpuTime(w.pid)
	if err != nil {
		return loadFigures{}, err
	}
	began := time.Now()
	var running sync.WaitGroup
	for i, c := range clients {
		running.Go(func() {
			for time.Since(began) < d && failed[i] == nil {
				start := time.Now()
				failed[i] = c.call(ctx, tool)
				took[i] = append(took[i], time.Since(start))
			}
		})
	}
	running.Wait()
	elapsed := time.Since(began)
	after, err := cpuTime(w.pid)
	if err != nil {
		return loadFigures{}, err
	}
	if err := cmp.Or(failed...); err != nil {
		return loadFigures{}, fmt.Errorf("%s: %w", w.name, err)
	}
	all := slices.Concat(took...)
	slices.Sort(all)
	return loadFigures{
		perSecond: float64(len(all)) / elapsed.Seconds(),
		p50:       all[len(all)/2], p99: all[len(all)*99/100],
		cpu: (after - before) / time.Duration(len(all)),
	}, nil
}

// cpuTime is what a process has used, Linux only.
func cpuTime(pid int) (time.Duration, error) {
	if pid == 0 {
		return 0, nil
	}
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	var ticks time.Duration
	for _, field := range fields[11:13] { // utime and stime, in hundredths of a second
		n, err := strconv.Atoi(field)
		if err != nil {
			return 0, err
		}
		ticks += time.Duration(n)
	}
	return ticks * 10 * time.Millisecond, nil
}

// resident is the memory of a process, in bytes, Linux only.
func resident(t *testing.T, pid int) int {
	t.Helper()
	statm, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	if err != nil {
		t.Fatal(err)
	}
	pages, err := strconv.Atoi(strings.Fields(string(statm))[1])
	if err != nil {
		t.Fatal(err)
	}
	return pages * os.Getpagesize()
}

// startLoadServer runs load-server until the test ends.
func startLoadServer(t *testing.T, args ...string) loadWay {
	t.Helper()
	cmd := exec.Command("load-server", args...)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	url, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	return loadWay{name: args[0], url: strings.TrimSpace(url), pid: cmd.Process.Pid}
}

func startLoadGateway(t *testing.T, remote string) loadWay {
	t.Helper()
	gw := start(t, "url", []string{"serve", "--config", writeConfig(t, config(`{"limits": {"sessions": 20000}}`, "r", remote)), "--listen", "127.0.0.1:0", "--log-format", "json"})
	return loadWay{name: "gatehouse", url: gw.url, prefix: "r_", pid: gw.cmd.Process.Pid}
}

// TestLoad measures, with -load and -v, and prints the tables of docs/performance.md.
func TestLoad(t *testing.T) {
	if *loadTime == 0 {
		t.Skip("-v -load 2s measures")
	}
	ctx := t.Context()
	const rounds = 3
	fmt.Println("| era | result | clients | way | calls/s | of the proxy's | p50 ms | p99 ms | CPU µs/call |")
	fmt.Println("|---|---|---|---|---|---|---|---|---|")
	for _, era := range []string{legacyEra, modernEra} {
		remote := startLoadServer(t, "remote", era, "0")
		ways := []loadWay{{name: "direct", url: remote.url}, startLoadServer(t, "proxy", remote.url), startLoadGateway(t, remote.url)}
		for _, tool := range []string{"small", "large"} {
			for _, n := range []int{1, 16, 64} {
				figures := make([][]loadFigures, len(ways))
				for range rounds {
					// All ways take turns, as the machine's mood changes.
					for i, way := range ways {
						f, err := way.measure(ctx, era, tool, n, *loadTime)
						if err != nil {
							t.Fatal(err)
						}
						figures[i] = append(figures[i], f)
					}
				}
				proxy := median(figures[1]).perSecond
				for i, way := range ways {
					f := median(figures[i])
					fmt.Printf("| %s | %d B | %d | %s | %.0f | %.2f | %.2f | %.2f | %.0f |\n", era, loadTools[tool], n, way.name, f.perSecond, f.perSecond/proxy,
						milliseconds(f.p50), milliseconds(f.p99), float64(f.cpu)/float64(time.Microsecond))
				}
			}
		}
	}

	fmt.Println("\n| tools | era | tools/list, ms |\n|---|---|---|")
	for _, tools := range []int{5_000, 10_000} {
		for _, era := range []string{legacyEra, modernEra} {
			remote := startLoadServer(t, "remote", era, strconv.Itoa(tools))
			way := startLoadGateway(t, remote.url)
			hc := loadHTTP()
			c, err := newLoadClient(ctx, hc, way.url, era, way.prefix)
			if err != nil {
				t.Fatal(err)
			}
			var took []time.Duration
			for range 21 {
				began := time.Now()
				if err := c.list(ctx, tools*200); err != nil {
					t.Fatal(err)
				}
				took = append(took, time.Since(began))
			}
			took = took[1:] // the first one fills the catalog
			slices.Sort(took)
			fmt.Printf("| %d | %s | %.1f |\n", tools, era, milliseconds(took[len(took)/2]))
			hc.CloseIdleConnections()
		}
	}

	const sessions = 4000
	remote := startLoadServer(t, "remote", legacyEra, "0")
	way := startLoadGateway(t, remote.url)
	hc := loadHTTP()
	defer hc.CloseIdleConnections()
	open := func(n int) {
		for range n {
			c, err := newLoadClient(ctx, hc, way.url, legacyEra, way.prefix)
			if err == nil {
				err = c.call(ctx, "small")
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	open(1000) // until the heap has its size
	before := resident(t, way.pid)
	open(sessions)
	fmt.Printf("\nResident memory of an idle session without a stream: %.1f KB\n", float64(resident(t, way.pid)-before)/sessions/1000)
}

func median(all []loadFigures) loadFigures {
	slices.SortFunc(all, func(a, b loadFigures) int { return cmp.Compare(a.perSecond, b.perSecond) })
	return all[len(all)/2]
}

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
