package exchange

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"strings"
	"sync"
	"time"

	"gatehouse/auth/endpoint"
	"gatehouse/auth/gate"
	"gatehouse/auth/secret"
)

const (
	defaultMax = 10_000

	exchangeTime = 30 * time.Second // of one exchange with all its requests, queueing included

	// After a failed exchange the next one for the same waits, this at first.
	retryPause    = time.Second
	retryPauseMax = 30 * time.Second

	// rejectedAgain is how long after an exchange that a rejection caused another
	// rejection means that exchanging does not help.
	rejectedAgain = time.Minute
)

var (
	// ErrSubject: the subject's token has expired, so nothing can be had for it.
	ErrSubject = errors.New("the subject token has expired")
	// ErrCleared: what was being fetched has been signed out of meanwhile.
	ErrCleared = errors.New("signed out meanwhile")
)

// errClosed ends what is asked of an exchanger after Close.
var errClosed = fmt.Errorf("exchange: closed: %w", context.Canceled)

// Config is what an [Exchanger] is built from.
type Config struct {
	Max   int              // tokens kept at once; 0: 10,000
	Gates *gate.Gates      // required: each request passes that of its endpoint
	Log   *slog.Logger     // required
	Now   func() time.Time // nil: time.Now
	// Fetched hears how each attempt to get a token that was not kept ended: one of
	// the Outcome constants, and for [OutcomeFetched] what was issued, the last word
	// of a token type, empty if the server did not say. nil: nobody does. It must not
	// block.
	Fetched func(t *Target, outcome, issued string)
}

// Outcomes of an attempt, for [Config].
const (
	OutcomeFetched = "fetched"
	OutcomeRefused = "refused" // by a server, or its answer was not one to use
	OutcomeFailed  = "failed"  // a server failed, or did not answer
	OutcomeShut    = "shut"    // no server was asked, see [gate.ErrShut]
)

// Token is what came of an exchange.
type Token struct {
	Access  secret.Text
	Expires time.Time
	Issued  string // issued_token_type, empty if the server did not say
}

// Stats are counted since the start, but Size.
type Stats struct {
	Hits, Misses, Evictions uint64
	Size, Max               int
}

// Exchanger gets tokens and keeps them. Make one with [New] and end it with
// [Exchanger.Close].
type Exchanger struct {
	gates   *gate.Gates
	log     *slog.Logger
	now     func() time.Time
	fetched func(t *Target, outcome, issued string)

	ctx    context.Context // of the exchanges: others may wait for what one caller began
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu           sync.Mutex // guards what follows; never held over the network
	closed       bool       // no more work is added to wg
	cache        *cache
	flights      map[key]*flight
	hits, misses uint64
}

// flight is one exchange that everybody who needs it waits for.
type flight struct {
	subject Subject
	person  key
	remote  string
	cleared bool // its outcome is nobody's; guarded by Exchanger.mu
	done    chan struct{}
	token   *Token // set before done is closed, like err
	err     error
}

// New makes an exchanger.
func New(c Config) *Exchanger {
	if c.Max == 0 {
		c.Max = defaultMax
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Fetched == nil {
		c.Fetched = func(*Target, string, string) {}
	}
	x := &Exchanger{
		fetched: c.Fetched, gates: c.Gates, log: c.Log, now: c.Now, cache: newCache(c.Max),
		flights: map[key]*flight{},
	}
	x.ctx, x.cancel = context.WithCancel(context.Background())
	return x
}

// Close ends the exchanges that are under way and waits for them. A second call
// does nothing.
func (x *Exchanger) Close() {
	x.mu.Lock()
	x.closed = true
	x.mu.Unlock()
	x.cancel()
	x.wg.Wait()
}

// Token returns a token of the subject for the target: one that is kept, or a
// new one. A kept one serves for as long as it lives, also if the subject's own
// token has expired meanwhile or its server is away; near its end another one is
// fetched beside it. While no server answers, one that was got for an earlier
// token of the subject serves, too. Failures are [*endpoint.Error]s,
// [gate.ErrShut], or the errors of this package; the caller's context ends the
// waiting and nothing else.
func (x *Exchanger) Token(ctx context.Context, s Subject, t *Target) (*Token, error) {
	f, token, err := x.look(s, t)
	if f != nil {
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-f.done:
			token, err = f.token, f.err
		}
	}
	if err != nil && outcomeOf(err) != OutcomeRefused {
		if last := x.Last(s, t); last != nil {
			return last, nil
		}
	}
	return token, err
}

// Last returns the token that was got last for the subject, whatever token that
// presented then, nil if it has expired. It is for when none can be had for the
// present one.
func (x *Exchanger) Last(s Subject, t *Target) *Token {
	x.mu.Lock()
	defer x.mu.Unlock()
	if e := x.cache.last(personOf(s, t), x.now()); e != nil {
		return e.token
	}
	return nil
}

// look returns the kept token, or the exchange to wait for, or why there is
// neither.
func (x *Exchanger) look(s Subject, t *Target) (*flight, *Token, error) {
	k := keyOf(s, t)
	x.mu.Lock()
	defer x.mu.Unlock()
	now := x.now()
	x.cache.sweep(now)
	e := x.cache.get(k, now)
	if e != nil && e.valid(now) {
		x.hits++
		x.log.Debug("token from the cache", "remote", t.Remote, "kind", t.Kind, "issued_type", e.token.Issued)
		if !now.Before(e.renewAt) && !now.Before(e.retryAt) && !s.expired(now) {
			x.startLocked(k, s, t)
		}
		return nil, e.token, nil
	}
	x.misses++
	switch f := x.flights[k]; {
	case f != nil:
		return f, nil, nil
	case e != nil && now.Before(e.retryAt):
		return nil, nil, e.err // it failed a moment ago
	case s.expired(now):
		return nil, nil, ErrSubject
	}
	f := x.startLocked(k, s, t)
	if f == nil {
		return nil, nil, errClosed
	}
	return f, nil, nil
}

// Kept returns the token that is kept for the subject, nil if there is none. It
// fetches nothing.
func (x *Exchanger) Kept(s Subject, t *Target) *Token {
	x.mu.Lock()
	defer x.mu.Unlock()
	now := x.now()
	if e := x.cache.get(keyOf(s, t), now); e != nil && e.valid(now) {
		return e.token
	}
	return nil
}

func (s Subject) expired(now time.Time) bool { return !s.Expires.IsZero() && !now.Before(s.Expires) }

// startLocked begins an exchange; nil if the exchanger is closed or one is under
// way. x.mu is held.
func (x *Exchanger) startLocked(k key, s Subject, t *Target) *flight {
	if x.closed || x.flights[k] != nil {
		return nil
	}
	f := &flight{subject: s, person: personOf(s, t), remote: t.Remote, done: make(chan struct{})}
	x.flights[k] = f
	x.wg.Go(func() {
		ctx, cancel := context.WithTimeout(x.ctx, exchangeTime)
		defer cancel()
		token, err := x.run(ctx, s, t)
		x.finish(k, f, token, err)
	})
	return f
}

// finish keeps what came of an exchange and tells those who wait.
func (x *Exchanger) finish(k key, f *flight, token *Token, err error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	defer close(f.done)
	if f.cleared {
		f.err = ErrCleared
		return
	}
	delete(x.flights, k)
	f.token, f.err = token, err
	if errors.Is(err, context.Canceled) {
		return // our own doing
	}
	now := x.now()
	if errors.Is(err, gate.ErrShut) {
		// Whom the gate turned away it remembers itself: the room is for tokens.
		if e := x.cache.get(k, now); e != nil {
			e.err, e.retryAt = err, now.Add(retryPause)
		}
		return
	}
	e := x.cache.put(k, f.person, f.subject, f.remote, now)
	if e.err = err; err != nil {
		e.retryAt = now.Add(min(retryPause<<min(e.fails, 10), retryPauseMax))
		e.fails++
		return
	}
	e.token, e.issued, e.fails, e.retryAt = token, now, 0, time.Time{}
	x.cache.latest[e.person] = e
	// Early enough that nobody waits, and late enough to be worth it.
	e.renewAt = token.Expires.Add(-min(token.Expires.Sub(now)/5, time.Minute))
}

// Reject says that the remote does not accept a token. It reports whether
// another one is worth a try: the first time it is forgotten, and the next
// [Exchanger.Token] exchanges anew; a rejection soon after that changes nothing.
func (x *Exchanger) Reject(s Subject, t *Target, token string) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	now := x.now()
	e := x.cache.get(keyOf(s, t), now)
	if e == nil || e.token == nil {
		e = x.cache.last(personOf(s, t), now)
	}
	switch {
	case e == nil || e.token == nil || e.token.Access.Value() != token:
		return true // it is not what Token would give
	case now.Before(e.rejectedAt.Add(rejectedAgain)):
		return false
	}
	e.rejectedAt, e.token = now, nil
	x.log.Info("the remote rejected a token: another one is fetched", "remote", t.Remote, "kind", t.Kind)
	return true
}

// Clear forgets what is kept for a subject at a remote; at all remotes if it is
// empty. Exchanges that are under way for it end with [ErrCleared].
func (x *Exchanger) Clear(issuer, subject, remote string) {
	match := func(s Subject, r string) bool {
		return s.Issuer == issuer && s.ID == subject && (remote == "" || r == remote)
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	x.cache.clear(match)
	for k, f := range x.flights {
		if match(f.subject, f.remote) {
			f.cleared = true
			delete(x.flights, k)
		}
	}
}

// Stats returns how the cache does.
func (x *Exchanger) Stats() Stats {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.cache.sweep(x.now())
	return Stats{Hits: x.hits, Misses: x.misses, Evictions: x.cache.evicted, Size: len(x.cache.entries), Max: x.cache.max}
}

// run makes the requests.
func (x *Exchanger) run(ctx context.Context, s Subject, t *Target) (*Token, error) {
	log := x.log.With("remote", t.Remote, "kind", t.Kind)
	started := x.now()
	token, err := x.request(ctx, s, t)
	took := x.now().Sub(started)
	if errors.Is(err, gate.ErrShut) {
		x.fetched(t, OutcomeShut, "")
		log.Debug("no token was asked for", "error", err)
		return nil, err
	} else if err != nil {
		if !errors.Is(err, context.Canceled) {
			x.fetched(t, outcomeOf(err), "")
		}
		log.Warn("no token could be fetched", "duration", took, "error", err)
		return nil, err
	}
	x.fetched(t, OutcomeFetched, token.Issued[strings.LastIndexByte(token.Issued, ':')+1:])
	log.Info("token fetched", "duration", took, "issued_type", token.Issued, "expires", token.Expires)
	return token, nil
}

func outcomeOf(err error) string {
	if errors.Is(err, gate.ErrShut) {
		return OutcomeShut
	}
	if e, ok := errors.AsType[*endpoint.Error](err); ok && !e.Refused() {
		return OutcomeFailed
	}
	return OutcomeRefused
}

func (x *Exchanger) request(ctx context.Context, s Subject, t *Target) (*Token, error) {
	answer, err := x.ask(ctx, &t.Server, t.form(s))
	if err != nil {
		return nil, err
	}
	requested := t.requested()
	expires, err := t.Server.check(answer, requested, t.meant, x.now())
	if err != nil || t.Kind != IDJAG {
		return &Token{Access: answer.Access, Expires: expires, Issued: answer.IssuedType}, err
	}
	// RFC 7523 section 2.1, at the server that the assertion is for.
	form := url.Values{
		"grant_type": {"urn:ietf:params:oauth:grant-type:jwt-bearer"},
		"assertion":  {answer.Access.Value()},
	}
	if t.Resource != "" {
		form.Set("resource", t.Resource)
	}
	if scopes := t.scopes(); len(scopes) > 0 {
		form.Set("scope", strings.Join(scopes, " "))
	}
	if answer, err = x.ask(ctx, &t.Then, form); err != nil {
		return nil, &ThenError{err}
	}
	expires, err = t.Then.check(answer, TypeAccessToken, t.meantThere, x.now())
	if err != nil {
		return nil, &ThenError{err}
	}
	return &Token{Access: answer.Access, Expires: expires, Issued: answer.IssuedType}, nil
}

// ask makes one request, through the gate of its endpoint.
func (x *Exchanger) ask(ctx context.Context, s *Server, form url.Values) (answer *endpoint.Answer, err error) {
	leave, err := x.gates.Of(s.Endpoint).Enter(ctx)
	if errors.Is(err, gate.ErrShut) {
		return nil, err
	} else if err != nil {
		return nil, &endpoint.Error{What: "waiting for other requests", Err: err}
	}
	defer func() { leave(gate.Judge(err)) }()
	return endpoint.Token(ctx, s.HTTP.Fetch(), s.Endpoint, s.Client, form)
}

// ThenError is a failure at the second server of an ID-JAG.
type ThenError struct{ Err error }

func (e *ThenError) Error() string { return "at the remote's authorization server: " + e.Err.Error() }

func (e *ThenError) Unwrap() error { return e.Err }
