package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/cookiejar"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"gatehouse/auth/authtest"
)

var usersLoad = flag.Duration("usersload", 0, "run TestUsersLoad for this long, such as 2m")

// loadUser is one of many users: a bearer token, a browser, perhaps a session.
type loadUser struct {
	token   string
	browser *http.Client
	session string // of protocol 2025-11-25; empty: the user's clients speak 2026-07-28
	hangUp  func() // ends the session's event stream
}

// TestUsersLoad is the documented run of many users (docs/performance.md): each
// logs in and signs in to all remotes through the pages; then calls come at a
// steady rate from clients of both eras; then everybody leaves, half of those that
// have a session without a word.
func TestUsersLoad(t *testing.T) {
	if *usersLoad == 0 {
		t.Skip("a run for -usersload")
	}
	const users, remotes, rate = 1000, 5, 500
	idp, as := authtest.NewAS(t), authtest.NewAS(t)
	idp.Set(func(k *authtest.ASKnobs) { k.IDToken = map[string]any{} })
	var servers []string
	for i := range remotes {
		r := authtest.NewRemote(t, authtest.RemoteConfig{AS: as, Stateless: true, JSON: true})
		servers = append(servers, fmt.Sprintf(`"r%d": {"url": %q}`, i, r.URL))
	}
	gw := startServe(t, fmt.Sprintf(`{"mcpServers": {%s}, "gateway": {"auth": {"issuer": %q, "clientId": "gatehouse"},
		"limits": {"callbackPerMinute": 1000000, "callbackPerMinuteTotal": 1000000}}}`, strings.Join(servers, ", "), idp.Issuer()), "--log-level", "info")
	base := strings.TrimSuffix(gw.url, "/mcp")
	idp.AddClient(authtest.OAuthClient{ID: "gatehouse", Method: "none", RedirectURIs: []string{base + "/login/callback"}})
	transport := &http.Transport{MaxIdleConnsPerHost: 200}
	t.Cleanup(transport.CloseIdleConnections)
	clients := &http.Client{Transport: transport, Timeout: time.Minute}

	var ids atomic.Int64 // a session may have several requests in flight
	post := func(u *loadUser, method, tool, params string) (string, http.Header, error) {
		header := http.Header{"Content-Type": {"application/json"}, "Accept": {"application/json, text/event-stream"}, "Authorization": {"Bearer " + u.token}}
		if u.session == "" && method != "initialize" {
			header.Set("Mcp-Protocol-Version", modernEra)
			header.Set("Mcp-Method", method)
			header.Set("Mcp-Name", tool)
			params = strings.TrimSuffix(params, "}") + `,"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientInfo":{"name":"load","version":"1"},"io.modelcontextprotocol/clientCapabilities":{}}}`
		} else if u.session != "" {
			header.Set("Mcp-Protocol-Version", legacyEra)
			header.Set("Mcp-Session-Id", u.session)
		}
		req, err := http.NewRequestWithContext(context.Background(), http.MethodPost, gw.url, strings.NewReader(fmt.Sprintf(`{"jsonrpc":"2.0","id":%d,"method":%q,"params":%s}`, ids.Add(1), method, params)))
		if err != nil {
			return "", nil, err
		}
		req.Header = header
		resp, err := clients.Do(req)
		if err != nil {
			return "", nil, err
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err == nil && resp.StatusCode != http.StatusOK {
			err = fmt.Errorf("%s: %s", resp.Status, body)
		}
		return string(body), resp.Header, err
	}
	// visit sends a browser somewhere, and returns where it is sent next.
	visit := func(u *loadUser, method, address string, form url.Values) (location, body string) {
		req, err := http.NewRequestWithContext(context.Background(), method, address, strings.NewReader(form.Encode()))
		if err != nil {
			t.Error(err)
			return "", ""
		}
		if form != nil {
			req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		}
		resp, err := u.browser.Do(req)
		if err != nil {
			t.Error(err)
			return "", ""
		}
		defer resp.Body.Close()
		data, err := io.ReadAll(resp.Body)
		if err != nil || resp.StatusCode >= 400 {
			t.Errorf("%s %s: %s %v", method, address, resp.Status, err)
		}
		return resp.Header.Get("Location"), string(data)
	}
	call := func(u *loadUser, remote int) (string, error) {
		body, _, err := post(u, "tools/call", fmt.Sprintf("r%d_echo", remote), fmt.Sprintf(`{"name":"r%d_echo","arguments":{"text":"fifty bytes of something to be carried there and back"}}`, remote))
		return body, err
	}
	each := func(n int, do func(i int)) {
		next := make(chan int)
		var workers sync.WaitGroup
		for range 16 {
			workers.Go(func() {
				for i := range next {
					do(i)
				}
			})
		}
		for i := range n {
			next <- i
		}
		close(next)
		workers.Wait()
	}

	idle := resident(t, gw.cmd.Process.Pid)
	began := time.Now()
	all := make([]*loadUser, users)
	var provider sync.Mutex // says who is at its page
	linked, proven := regexp.MustCompile(`http://[^" \\]+/connect/[A-Z2-7]+`), regexp.MustCompile(`name="token" value="([^"]+)"`)
	each(users, func(i int) {
		jar, err := cookiejar.New(nil)
		if err != nil {
			t.Error(err)
			return
		}
		u := &loadUser{token: idp.JWTFor(fmt.Sprint("user-", i), gw.url, nil), browser: &http.Client{Transport: transport, Jar: jar,
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}}
		all[i] = u
		to, _ := visit(u, http.MethodGet, base+"/login", nil)
		provider.Lock()
		idp.Set(func(k *authtest.ASKnobs) { k.User = fmt.Sprint("user-", i) })
		to, _ = visit(u, http.MethodGet, to, nil)
		provider.Unlock()
		visit(u, http.MethodGet, to, nil)
		for remote := range remotes {
			said, err := call(u, remote)
			link := linked.FindString(said)
			if link == "" {
				t.Errorf("no link: %v %s", err, said)
				return
			}
			_, page := visit(u, http.MethodGet, link, nil)
			proof := proven.FindStringSubmatch(page)
			if proof == nil {
				t.Errorf("no form: %s", page)
				return
			}
			to, _ := visit(u, http.MethodPost, link, url.Values{"token": {proof[1]}})
			to, _ = visit(u, http.MethodGet, to, nil)
			visit(u, http.MethodGet, to, nil)
		}
		if i%2 == 0 {
			_, header, err := post(u, "initialize", "", `{"protocolVersion":"2025-11-25","capabilities":{},"clientInfo":{"name":"load","version":"1"}}`)
			if u.session = header.Get("Mcp-Session-Id"); err != nil || u.session == "" {
				t.Errorf("initialize: %v", err)
				return
			}
			ctx, cancel := context.WithCancel(context.Background())
			req, err := http.NewRequestWithContext(ctx, http.MethodGet, gw.url, nil)
			if err != nil {
				t.Error(err)
			}
			req.Header = http.Header{"Accept": {"text/event-stream"}, "Authorization": {"Bearer " + u.token}, "Mcp-Session-Id": {u.session}, "Mcp-Protocol-Version": {legacyEra}}
			stream, err := (&http.Client{Transport: transport}).Do(req)
			if err != nil || stream.StatusCode != http.StatusOK {
				t.Errorf("opening an event stream: %v", err)
			}
			u.hangUp = func() {
				cancel()
				stream.Body.Close()
			}
		}
	})
	if t.Failed() {
		return
	}
	t.Logf("%d users signed in to %d remotes each in %s", users, remotes, time.Since(began).Round(time.Second))

	before, err := cpuTime(gw.cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var took []time.Duration
	failed, most := 0, resident(t, gw.cmd.Process.Pid)
	jobs := make(chan struct{}, rate)
	var workers sync.WaitGroup
	for range 64 {
		workers.Go(func() {
			for range jobs {
				start := time.Now()
				said, err := call(all[rand.N(users)], rand.N(remotes))
				mu.Lock()
				if took = append(took, time.Since(start)); err != nil || !strings.Contains(said, "fifty bytes") || strings.Contains(said, `"isError":true`) {
					if failed++; failed <= 5 {
						t.Errorf("a call: %v %.300s", err, said)
					}
				}
				mu.Unlock()
			}
		})
	}
	began = time.Now()
	for n := 0; time.Since(began) < *usersLoad; n++ {
		if wait := time.Until(began.Add(time.Duration(n) * time.Second / rate)); wait > 0 {
			time.Sleep(wait) // it is the rate that is asked for
		}
		jobs <- struct{}{}
		if n%rate == 0 {
			most = max(most, resident(t, gw.cmd.Process.Pid))
		}
	}
	close(jobs)
	workers.Wait()
	ran := time.Since(began)
	after, err := cpuTime(gw.cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(took)
	t.Logf("%d calls in %s (%.0f/s), %d failed; p50 %.1f ms, p99 %.1f ms; %.0f µs of CPU per call; resident %d MB idle, %d MB at the most",
		len(took), ran.Round(time.Second), float64(len(took))/ran.Seconds(), failed, milliseconds(took[len(took)/2]), milliseconds(took[len(took)*99/100]),
		float64((after-before).Microseconds())/float64(len(took)), idle>>20, most>>20)

	each(users, func(i int) {
		if all[i].session == "" {
			return
		}
		all[i].hangUp()
		if i%4 == 0 {
			return
		}
		req, err := http.NewRequestWithContext(context.Background(), http.MethodDelete, gw.url, nil)
		if err != nil {
			t.Error(err)
			return
		}
		req.Header = http.Header{"Authorization": {"Bearer " + all[i].token}, "Mcp-Session-Id": {all[i].session}, "Mcp-Protocol-Version": {legacyEra}}
		resp, err := clients.Do(req)
		if err != nil {
			t.Error(err)
			return
		}
		resp.Body.Close()
	})
	transport.CloseIdleConnections()
	began = time.Now()
	held := regexp.MustCompile(`(?m)^gatehouse_(?:sessions|principals|connections)\S* (\S+)$`)
	const stay = users/4 + users/4 // sessions that nobody has ended, and their users, without connections
	for {
		left := 0
		metrics := scrape(t, base+"/metrics")
		for _, m := range held.FindAllStringSubmatch(metrics, -1) {
			n, err := strconv.ParseFloat(m[1], 64)
			if err != nil {
				t.Fatal(err)
			}
			left += int(n)
		}
		goroutines := regexp.MustCompile(`(?m)^go_goroutines (\S+)$`).FindStringSubmatch(metrics)
		if left == stay || time.Since(began) > 5*time.Minute {
			t.Logf("%s after they left: %d sessions, users and connections, %s goroutines, %d MB resident", time.Since(began).Round(time.Second), left, goroutines[1], resident(t, gw.cmd.Process.Pid)>>20)
			if left != stay {
				t.Errorf("want %d", stay)
			}
			return
		}
		time.Sleep(time.Second)
	}
}
