package session

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/oauth2"

	"gatehouse/auth"
)

// network is a remote's network without the machine's, for tests on a clock
// of their own. It can be down.
type network struct {
	conns chan net.Conn
	ended chan struct{}
	down  atomic.Bool
	dials atomic.Int64
}

func (n *network) Accept() (net.Conn, error) {
	select {
	case c := <-n.conns:
		return c, nil
	case <-n.ended:
		return nil, net.ErrClosed
	}
}

func (n *network) Close() error   { close(n.ended); return nil }
func (n *network) Addr() net.Addr { return &net.TCPAddr{} }

func (n *network) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	n.dials.Add(1)
	if n.down.Load() {
		return nil, &net.OpError{Op: "dial", Net: "tcp", Err: syscall.ECONNREFUSED}
	}
	here, there := net.Pipe()
	select {
	case n.conns <- there:
		return here, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// bubble is a fake remote named notes, on a network and a clock of its own.
func bubble(t *testing.T, test func(t *testing.T, f *fake, n *network, p *Pool)) {
	synctest.Test(t, func(t *testing.T) {
		f := &fake{on: map[string]handler{}}
		n := &network{conns: make(chan net.Conn), ended: make(chan struct{})}
		srv := &http.Server{Handler: f}
		var serving sync.WaitGroup
		serving.Go(func() { srv.Serve(n) })
		transport := &http.Transport{DialContext: n.dial, MaxIdleConnsPerHost: 100}
		r := newRemoteFor(t, "notes", "http://127.0.0.1/mcp?key="+canary)
		r.Authorizer = func(p auth.Principal) Authorizer { return token(p.Subject) }
		p, _ := newPool(t, r)
		p.remotes[0].client = &http.Client{Transport: transport}
		test(t, f, n, p)
		p.Close()
		transport.CloseIdleConnections()
		srv.Close()
		serving.Wait()
	})
}

// token is an Authorizer that always has the same one.
type token string

func (s token) Token(context.Context) (*oauth2.Token, error) {
	return &oauth2.Token{AccessToken: string(s)}, nil
}
func (s token) Renew(context.Context, *http.Response) error { return auth.ErrSignInNeeded }
func (s token) Challenge(context.Context, *http.Response) error {
	return &auth.RequiredError{Remote: "notes"}
}

func openMany(t *testing.T, p *Pool, n int) []*Session {
	t.Helper()
	sessions := make([]*Session, n)
	for i := range sessions {
		s, err := p.Open(auth.Principal{Issuer: "i", Subject: fmt.Sprint("user", i)})
		if err != nil {
			t.Fatal(err)
		}
		sessions[i] = s
	}
	return sessions
}

func countStates(sessions []*Session) map[State]int {
	states := map[State]int{}
	for _, s := range sessions {
		states[s.Status("notes").State]++
	}
	return states
}

func (r *recovery) idle() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return !r.watching && r.workers == 0 && len(r.due) == 0 && len(r.waiting) == 0
}

// TestRecovery: a remote that was down serves everybody within seconds of
// coming up, was asked little while it was down, and is not stormed.
func TestRecovery(t *testing.T) {
	bubble(t, func(t *testing.T, f *fake, n *network, p *Pool) {
		const users = 200
		var now, most atomic.Int64
		f.handle("initialize", func(w http.ResponseWriter, _ *http.Request, m received) {
			most.Store(max(most.Load(), now.Add(1)))
			defer now.Add(-1)
			time.Sleep(10 * time.Millisecond) // of the bubble
			answer(w, m, initialized)
		})
		n.down.Store(true)
		sessions := openMany(t, p, users)
		for _, s := range sessions {
			settled(t, s)
		}
		if got := countStates(sessions); got[StateUnavailable] != users {
			t.Fatalf("states %v", got)
		}
		time.Sleep(10 * time.Minute)
		if got := n.dials.Load(); got < users+100 || got > users+200 {
			t.Errorf("%d dials in 10 minutes by %d users", got, users)
		}
		n.down.Store(false)
		time.Sleep(7 * time.Second)
		if got := countStates(sessions); got[StateConnected] != users {
			t.Errorf("states %v after it came up", got)
		}
		for _, s := range sessions {
			if c := s.Catalogs(ended(t))[0]; !c.Known {
				t.Fatalf("not listed: %+v", c)
			}
		}
		if got := len(f.requests("initialize")); got != users {
			t.Errorf("%d sessions were begun, want %d", got, users)
		}
		if got := most.Load(); got > maxQuiet+1 {
			t.Errorf("%d dials at once, want %d at most", got, maxQuiet+1)
		}
		if !p.remotes[0].recovery.idle() {
			t.Error("recovery goes on although nobody waits")
		}
	})
}

// TestRecoveryIsNotHeldUp: one for whom the remote always fails does not keep
// the others waiting.
func TestRecoveryIsNotHeldUp(t *testing.T) {
	bubble(t, func(t *testing.T, f *fake, n *network, p *Pool) {
		f.handle("initialize", func(w http.ResponseWriter, r *http.Request, m received) {
			if r.Header.Get("Authorization") == "Bearer user0" {
				w.WriteHeader(http.StatusInternalServerError)
				return
			}
			answer(w, m, initialized)
		})
		n.down.Store(true)
		sessions := openMany(t, p, 3)
		for _, s := range sessions {
			settled(t, s)
		}
		n.down.Store(false)
		time.Sleep(time.Minute)
		if got := countStates(sessions); got[StateConnected] != 2 || got[StateUnavailable] != 1 {
			t.Errorf("states %v", got)
		}
		if got := len(f.requests("initialize")); got > 40 {
			t.Errorf("%d dials in a minute", got)
		}
		sessions[0].Close()
		time.Sleep(10 * time.Second)
		if !p.remotes[0].recovery.idle() {
			t.Error("recovery goes on although nobody waits")
		}
	})
}

// TestGrowingPauses: a remote that ends again and again soon after it was listed
// is brought back with growing pauses, one that was there for a while at once.
func TestGrowingPauses(t *testing.T) {
	bubble(t, func(t *testing.T, f *fake, _ *network, p *Pool) {
		p.remotes[0].recovery.pause.MaxInterval = lastRestart
		s := openMany(t, p, 1)[0]
		settled(t, s)
		c := s.byName["notes"]
		// down has it end, and returns how long it was gone.
		down := func() time.Duration {
			synctest.Wait()
			c.mu.Lock()
			l := c.link
			c.mu.Unlock()
			began := time.Now()
			c.drop(l, c.remote.fail(KindUnreachable, errEnded, "ended by itself."))
			for changed := watch(s); s.Status("notes").State != StateConnected; {
				<-changed
			}
			return time.Since(began)
		}
		var pauses []time.Duration
		for range 15 {
			time.Sleep(time.Second) // of the bubble
			pauses = append(pauses, down())
		}
		last := time.Duration(float64(lastRestart) * 0.8)
		if pauses[0] > time.Second || pauses[5] < 2*pauses[0] || pauses[14] < last {
			t.Errorf("pauses %v", pauses)
		}
		time.Sleep(steady + time.Second)
		if pause := down(); pause > time.Second {
			t.Errorf("after a good while: %v", pause)
		}
	})
}

// TestCallBringsItBack: somebody's call finds the remote up before the loop
// does, and all profit; one that finds it down has it watched.
func TestCallBringsItBack(t *testing.T) {
	bubble(t, func(t *testing.T, f *fake, n *network, p *Pool) {
		sessions := openMany(t, p, 2)
		for _, s := range sessions {
			settled(t, s)
		}
		synctest.Wait() // until all connections are idle
		n.down.Store(true)
		p.remotes[0].client.CloseIdleConnections()
		for _, s := range sessions {
			_, err := s.Call(t.Context(), "notes", "tools/call", nil, nil)
			failure(t, err, KindUnreachable)
			if c := s.Catalogs(ended(t))[0]; !c.Known {
				t.Error("the catalog is gone")
			}
		}
		if got := countStates(sessions); got[StateUnavailable] != 2 {
			t.Errorf("states %v", got)
		}
		time.Sleep(30 * time.Second)
		_, err := sessions[0].Call(t.Context(), "notes", "tools/call", nil, nil)
		failure(t, err, KindUnreachable)
		n.down.Store(false)
		if _, err := sessions[0].Call(t.Context(), "notes", "tools/call", nil, nil); err != nil {
			t.Errorf("a call dials, whatever was before: %v", err)
		}
		synctest.Wait()
		if got := countStates(sessions); got[StateConnected] != 2 {
			t.Errorf("states %v", got)
		}
	})
}

// TestSignInIsNotPolled: nothing is tried that only a person can change.
func TestSignInIsNotPolled(t *testing.T) {
	bubble(t, func(t *testing.T, f *fake, _ *network, p *Pool) {
		f.handle("initialize", status(http.StatusUnauthorized))
		sessions := openMany(t, p, 1)
		settled(t, sessions[0])
		time.Sleep(time.Hour)
		if got := len(f.requests("initialize")); got != 1 {
			t.Errorf("%d dials", got)
		}
		if got := countStates(sessions); got[StateSignInNeeded] != 1 || !p.remotes[0].recovery.idle() {
			t.Errorf("states %v", got)
		}
	})
}

// TestRetryAfter: a remote that says when to come back is not asked before.
func TestRetryAfter(t *testing.T) {
	bubble(t, func(t *testing.T, f *fake, _ *network, p *Pool) {
		f.handle("initialize", func(w http.ResponseWriter, _ *http.Request, _ received) {
			w.Header().Set("Retry-After", "60")
			w.WriteHeader(http.StatusTooManyRequests)
		})
		s := openMany(t, p, 1)[0]
		settled(t, s)
		time.Sleep(10 * time.Minute)
		if got := len(f.requests("initialize")); got < 10 || got > 12 {
			t.Errorf("%d dials in 10 minutes", got)
		}
		f.handle("initialize", nil)
		time.Sleep(61 * time.Second)
		if got := s.Status("notes"); got.State != StateConnected {
			t.Errorf("status %+v", got)
		}
	})
}

// TestParallelConnects: whoever waits for a list that is as new as they need
// shares it.
func TestParallelConnects(t *testing.T) {
	bubble(t, func(t *testing.T, f *fake, _ *network, p *Pool) {
		s := openMany(t, p, 1)[0]
		settled(t, s)
		hold := make(chan struct{})
		f.handle("tools/list", func(w http.ResponseWriter, _ *http.Request, m received) {
			<-hold
			answer(w, m, `{"tools":[]}`)
		})
		var wg sync.WaitGroup
		for range 50 {
			wg.Go(func() {
				if err := s.Connect(t.Context(), "notes"); err != nil {
					t.Error(err)
				}
			})
		}
		synctest.Wait()
		close(hold)
		wg.Wait()
		// The first one, that of the first to connect, and a newer one for all others.
		if n := len(f.requests("tools/list")); n != 3 {
			t.Errorf("%d lists, want 3", n)
		}
	})
}

// TestHang: nothing a remote leaves open keeps anybody longer than it may.
func TestHang(t *testing.T) {
	hang := func(_ http.ResponseWriter, r *http.Request, _ received) { <-r.Context().Done() }
	for _, tt := range []struct {
		method string
		within time.Duration
		say    string
	}{
		{"initialize", dialTimeout, "within 15 s"},
		{"notifications/initialized", dialTimeout, "within 15 s"},
		{"tools/list", pageTimeout, "within 15 s"},
		{"tools/call", 60 * time.Second, "within 60 s"},
	} {
		for name, h := range map[string]handler{
			"says nothing": hang,
			"begins to answer": func(w http.ResponseWriter, r *http.Request, m received) {
				w.Header().Set("Content-Type", "text/event-stream")
				w.(http.Flusher).Flush()
				hang(w, r, m)
			},
			"talks for ever": func(w http.ResponseWriter, r *http.Request, _ received) {
				w.Header().Set("Content-Type", "text/event-stream")
				for r.Context().Err() == nil {
					fmt.Fprint(w, "data: {\"jsonrpc\":\"2.0\",\"method\":\"notifications/progress\"}\n\n")
					w.(http.Flusher).Flush()
					select {
					case <-r.Context().Done():
					case <-time.After(time.Second):
					}
				}
			},
		} {
			if tt.method == "notifications/initialized" && name != "says nothing" {
				continue // nobody reads its body
			}
			t.Run(tt.method+" "+name, func(t *testing.T) {
				bubble(t, func(t *testing.T, f *fake, _ *network, p *Pool) {
					f.handle(tt.method, h)
					s := openMany(t, p, 1)[0]
					began := time.Now()
					if tt.method != "tools/call" {
						ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
						defer cancel()
						s.Catalogs(ctx)
						f, ok := errors.AsType[*Failure](s.Status("notes").Err)
						if !ok || f.Kind != KindTimeout || !strings.Contains(f.Say, tt.say) {
							t.Errorf("got %v", s.Status("notes").Err)
						}
					} else {
						_, err := s.Call(t.Context(), "notes", "tools/call", nil, nil)
						if got := failure(t, err, KindTimeout); !strings.Contains(got.Say, tt.say) {
							t.Errorf("says %q", got.Say)
						}
					}
					if took := time.Since(began); took != tt.within {
						t.Errorf("took %v, want %v", took, tt.within)
					}
					began = time.Now()
					p.Close()
					if took := time.Since(began); took > goodbyeTimeout {
						t.Errorf("closing took %v", took)
					}
				})
			})
		}
	}
}

// TestGoodbyeIsBounded: a remote that does not answer DELETE does not hold up
// the end, however many sessions there are.
func TestGoodbyeIsBounded(t *testing.T) {
	bubble(t, func(t *testing.T, f *fake, _ *network, p *Pool) {
		f.handle("DELETE", func(_ http.ResponseWriter, r *http.Request, _ received) { <-r.Context().Done() })
		sessions := openMany(t, p, 150)
		for _, s := range sessions {
			settled(t, s)
		}
		began := time.Now()
		p.Close()
		if took := time.Since(began); took > goodbyeTimeout {
			t.Errorf("closing took %v", took)
		}
	})
}

// TestKilledInACall: a remote that dies under a call is not called connected a
// moment longer; one that has only dropped the answer is so again at once, with
// the MCP session that it had.
func TestKilledInACall(t *testing.T) {
	bubble(t, func(t *testing.T, f *fake, n *network, p *Pool) {
		dies := false
		f.handle("tools/call", func(http.ResponseWriter, *http.Request, received) {
			n.down.Store(dies)
			panic(http.ErrAbortHandler)
		})
		s := openMany(t, p, 1)[0]
		settled(t, s)
		_, err := s.Call(t.Context(), "notes", "tools/call", nil, nil)
		failure(t, err, KindCut)
		synctest.Wait()
		if st := s.Status("notes"); st.State != StateConnected || st.Err != nil || st.Retried {
			t.Errorf("it is still there: %+v", st)
		}
		if got := len(f.requests("initialize")); got != 1 {
			t.Errorf("%d MCP sessions for one lost answer", got)
		}
		dies = true
		_, err = s.Call(t.Context(), "notes", "tools/call", nil, nil)
		failure(t, err, KindCut)
		if st := s.Status("notes"); st.State != StateUnavailable || !st.Retried {
			t.Errorf("right after it died: %+v", st)
		}
		synctest.Wait()
		if st := s.Status("notes"); st.State != StateUnavailable || !st.Retried {
			t.Errorf("after it died: %+v", st)
		} else {
			failure(t, st.Err, KindUnreachable)
		}
	})
}
