package auth

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	mathrand "math/rand/v2"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"

	"gatehouse/auth/secret"
)

// RedisConfig configures a [Redis].
type RedisConfig struct {
	URL    secret.Text // redis://, rediss:// or unix://, with user and password as in a URL; required
	Prefix string      // of every key
	CA     []byte      // PEM, added to the system's roots; may be nil

	// KeyFile holds the keys that records are sealed with: one or more lines, each
	// 32 random bytes in base64. The first seals, all open. Only its owner may
	// read it. Either it or Keys is required: all replicas have the same.
	KeyFile string
	Keys    secret.Text

	MaxRecords map[string]int   // per bucket; a bucket not named: 100,000
	Log        *slog.Logger     // required
	Now        func() time.Time // of expiries; nil: time.Now
}

// Redis is the store in a Redis or Valkey server, for any number of replicas at
// once. All keys begin with the prefix:
//
//	{<bucket>}:<name>   a record: a hash of its version and its sealed envelope
//	{<bucket>}          the names of the bucket's records, by expiry
//	{lease}:<name>      who has a lease
//	changes             the channel on which changes are told
//	{canary}            a sealed record that says whether a key is the right one
//
// The braces put all that one script touches into one slot of a cluster. What
// must not be torn apart is one script: compare and swap, take, release. A
// record that is deleted leaves its version for a while, as long as it would
// have lived at most, so that whoever remembers it cannot revive it.
type Redis struct {
	client redis.UniversalClient
	prefix string
	keys   keySet
	limits map[string]int
	log    *slog.Logger
	now    func() time.Time

	mu     sync.Mutex // guards closed and held
	closed bool
	held   map[*redisLease]struct{}
}

var _ Store = (*Redis)(nil)

const (
	redisTime    = 5 * time.Second // of one command, connecting included
	redisStart   = 15 * time.Second
	resealTime   = 2 * time.Minute  // for all records, at a start
	redisSlack   = time.Minute      // that Redis keeps a record longer than it counts: clocks differ
	redisRetries = 20               // of a swap whose version somebody else has just used
	tombstone    = 24 * time.Hour   // for which a deleted record's version is kept
	leaseTime    = 60 * time.Second // of a lease that nobody renews: more than three times a token request's deadline
	leasePause   = 5 * time.Millisecond
	leasePauseTo = 100 * time.Millisecond
)

// OpenRedis connects to the store and sees that the keys are its own. It waits
// a while for a server that is not there yet; then it gives up. Errors are as
// those of [OpenFile]. Nothing is ever wiped.
func OpenRedis(ctx context.Context, c RedisConfig) (*Redis, error) {
	r, err := newRedis(c)
	if err != nil {
		return nil, fmt.Errorf("opening the Redis store: %w", err)
	}
	err = r.begin(ctx)
	if err == nil && len(r.keys) > 1 {
		err = r.resealAll(ctx)
	}
	if err != nil {
		r.client.Close()
		return nil, fmt.Errorf("opening the Redis store: %w", err)
	}
	return r, nil
}

// quietRedis drops what the client library would write to stderr by itself: the
// errors that it is about come back from each call.
type quietRedis struct{}

func (quietRedis) Printf(context.Context, string, ...any) {}

var quietOnce sync.Once

func newRedis(c RedisConfig) (*Redis, error) {
	quietOnce.Do(func() { redis.SetLogger(quietRedis{}) })
	var keys keySet
	var err error
	switch {
	case c.Log == nil:
		return nil, errors.New("auth: Log is required")
	case (c.KeyFile == "") == c.Keys.IsEmpty():
		return nil, fmt.Errorf("%w: it must come from a file or from the environment, the same for all replicas", ErrKey)
	case c.KeyFile != "":
		keys, err = readKeyFile(c.KeyFile)
	default:
		keys, err = parseKeys([]byte(c.Keys.Value()))
	}
	if err != nil {
		return nil, err
	}
	options, err := redis.ParseURL(c.URL.Value())
	if err != nil {
		// Its error repeats the URL, and that holds the password.
		return nil, errors.New("its URL is none of the form redis://user:password@host:6379/0, or rediss:// with TLS")
	}
	if options.TLSConfig != nil {
		options.TLSConfig.MinVersion = tls.VersionTLS12
		if c.CA != nil {
			roots, err := x509.SystemCertPool()
			if err != nil {
				return nil, fmt.Errorf("reading the system's roots: %w", err)
			}
			if !roots.AppendCertsFromPEM(c.CA) {
				return nil, errors.New("its CA file holds no certificate in PEM form")
			}
			options.TLSConfig.RootCAs = roots
		}
	}
	options.DialTimeout, options.ReadTimeout, options.WriteTimeout = redisTime, redisTime, redisTime
	options.ContextTimeoutEnabled = true
	r := &Redis{
		client: redis.NewClient(options), prefix: c.Prefix, keys: keys, limits: c.MaxRecords, log: c.Log, now: c.Now,
		held: map[*redisLease]struct{}{},
	}
	if r.now == nil {
		r.now = time.Now
	}
	return r, nil
}

// begin waits for the server and checks the canary.
func (r *Redis) begin(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, redisStart)
	defer cancel()
	for pause := 50 * time.Millisecond; ; pause = min(2*pause, time.Second) {
		err := r.client.Ping(ctx).Err()
		if err == nil {
			break
		}
		if refused, ok := errors.AsType[redis.Error](err); ok {
			return fmt.Errorf("the server refuses: %w", refused) // wrong password, no permission
		}
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return fmt.Errorf("the server does not answer: %w", err)
		}
	}
	key := r.canary()
	// Whoever is first makes it; everybody reads what is there then.
	fresh := r.keys.seal("", canaryName, Record{Version: 1})
	if err := r.client.SetNX(ctx, key, fresh, 0).Err(); err != nil {
		return fmt.Errorf("writing the canary: %w", err)
	}
	canary, err := r.client.Get(ctx, key).Bytes()
	if err != nil {
		return fmt.Errorf("reading the canary: %w", err)
	}
	switch _, err = r.keys.open("", canaryName, canary); {
	case errors.Is(err, ErrWrongKey):
		return fmt.Errorf("%w: give it the key that it was made with, on another line if there is a new one; nothing has been changed", err)
	case err != nil:
		return fmt.Errorf("the canary at %s is %w; nothing has been changed", key, err)
	}
	return nil
}

// resealScript replaces an envelope by another with the same in it.
const resealScript = `
if redis.call('HGET', KEYS[1], 'v') ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'v', ARGV[2])
return 1
`

// resealAll seals with the first key what another one has sealed, the canary
// last. It looks at every start with several keys: while the first of the
// replicas start with a new one, the others still seal with the old. Versions
// stay, so that nobody's swap fails for it.
func (r *Redis) resealAll(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, resealTime)
	defer cancel()
	match := globEscaper.Replace(r.prefix) + "{*}:*"
	for cursor, done := uint64(0), false; !done; done = cursor == 0 {
		var keys []string
		var err error
		if keys, cursor, err = r.client.ScanType(ctx, cursor, match, 1000, "hash").Result(); err == nil {
			err = r.reseal(ctx, keys)
		}
		if err != nil {
			return fmt.Errorf("sealing with the new first key: %w", err)
		}
	}
	if err := r.client.Set(ctx, r.canary(), r.keys.seal("", canaryName, Record{Version: 1}), 0).Err(); err != nil {
		return fmt.Errorf("writing the canary: %w", err)
	}
	return nil
}

// globEscaper makes a prefix match itself.
var globEscaper = strings.NewReplacer("*", `\*`, "?", `\?`, "[", `\[`, `\`, `\\`)

// reseal is resealAll for some records. Those that nobody can read stay as they
// are, and so do those that are written meanwhile.
func (r *Redis) reseal(ctx context.Context, keys []string) error {
	read := r.client.Pipeline()
	for _, key := range keys {
		read.HGet(ctx, key, "v")
	}
	envelopes, err := read.Exec(ctx)
	if err != nil && !errors.Is(err, redis.Nil) { // deleted ones have none
		return err
	}
	write := r.client.Pipeline()
	for i, key := range keys {
		old, err := envelopes[i].(*redis.StringCmd).Bytes()
		bucket, name, ok := strings.Cut(strings.TrimPrefix(key, r.prefix+"{"), "}:")
		if err != nil || !ok {
			continue
		}
		if record, err := r.keys.open(bucket, name, old); err == nil && !r.keys.sealedByFirst(old) {
			write.Eval(ctx, resealScript, []string{key}, old, r.keys.seal(bucket, name, record))
		}
	}
	_, err = write.Exec(ctx)
	return err
}

func (r *Redis) record(bucket, name string) string { return r.prefix + "{" + bucket + "}:" + name }
func (r *Redis) canary() string                    { return r.prefix + "{canary}" }
func (r *Redis) channel() string                   { return r.prefix + "changes" }
func (r *Redis) index(bucket string) string        { return r.prefix + "{" + bucket + "}" }

// ready returns a context for one operation.
func (r *Redis) ready(ctx context.Context) (context.Context, context.CancelFunc, error) {
	if err := ctx.Err(); err != nil {
		return nil, nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return nil, nil, ErrClosed
	}
	ctx, cancel := context.WithTimeout(ctx, redisTime)
	return ctx, cancel, nil
}

// Shared reports true: that is what it is for.
func (r *Redis) Shared() bool { return true }

// Seal seals with the first key. See [Sealer].
func (r *Redis) Seal(plain, bound []byte) []byte { return r.keys.sealOut(plain, bound) }

// Unseal opens with any key. See [Sealer].
func (r *Redis) Unseal(sealed, bound []byte) ([]byte, bool) { return r.keys.openOut(sealed, bound) }

// Get is [Store.Get].
func (r *Redis) Get(ctx context.Context, bucket, key string) (Record, error) {
	ctx, cancel, err := r.ready(ctx)
	if err != nil {
		return Record{}, err
	}
	defer cancel()
	name := hash(bucket, key)
	envelope, err := r.client.HGet(ctx, r.record(bucket, name), "v").Bytes()
	if errors.Is(err, redis.Nil) {
		return Record{}, ErrNotFound
	} else if err != nil {
		return Record{}, r.failed("reading", err)
	}
	return r.unseal(bucket, name, envelope)
}

// unseal opens an envelope. What is damaged counts as not there.
func (r *Redis) unseal(bucket, name string, envelope []byte) (Record, error) {
	record, err := r.keys.open(bucket, name, envelope)
	switch {
	case errors.Is(err, errDamaged):
		r.log.Error("a record is damaged, or not the one that belongs there: it counts as not there", "bucket", bucket, "name", name[:8])
		return Record{}, ErrNotFound
	case err != nil:
		return Record{}, err
	case record.expired(r.now()):
		return Record{}, ErrNotFound
	}
	return record, nil
}

func (r *Redis) failed(doing string, err error) error {
	if errors.Is(err, redis.ErrClosed) {
		return ErrClosed
	}
	if refused, ok := errors.AsType[redis.Error](err); ok && isUnwritable(refused.Error()) {
		return fmt.Errorf("%s: %w: %w", doing, ErrUnwritable, err)
	}
	return fmt.Errorf("%s a record in Redis: %w", doing, err)
}

// isUnwritable reports whether a server's error says that it takes no writes
// now. The first word of an error is its code.
func isUnwritable(say string) bool {
	for _, code := range []string{"OOM ", "READONLY ", "MISCONF ", "LOADING ", "MASTERDOWN "} {
		if len(say) >= len(code) && say[:len(code)] == code {
			return true
		}
	}
	return false
}

// putScript swaps a record: KEYS the record and the index; ARGV the version
// that is expected ("any": whatever is there), the next one, the envelope, its
// time to live in ms ("" for ever), its score in the index, the time, the
// bucket's limit, the record's name, and the channel and the message that tell of
// it. Sent twice, as after an answer that was
// lost, it succeeds twice. It returns {"ok"}, {"conflict"},
// {"full"}, or {"version", the one that the next has to be higher than}.
var putScript = redis.NewScript(`
local have = redis.call('HMGET', KEYS[1], 'n', 'v')
local listed = redis.call('ZSCORE', KEYS[2], ARGV[8])
local live = have[2] and listed and tonumber(listed) > tonumber(ARGV[6])
local version = '0'
if live then version = have[1] end
if have[1] == ARGV[2] and have[2] == ARGV[3] then return {'ok'} end
if ARGV[1] ~= 'any' and ARGV[1] ~= version then return {'conflict'} end
if have[1] and (#have[1] > #ARGV[2] or #have[1] == #ARGV[2] and have[1] >= ARGV[2]) then return {'version', have[1]} end
if not live then
  redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', ARGV[6])
  if redis.call('ZCARD', KEYS[2]) >= tonumber(ARGV[7]) then return {'full'} end
end
redis.call('HSET', KEYS[1], 'n', ARGV[2], 'v', ARGV[3])
if ARGV[4] == '' then redis.call('PERSIST', KEYS[1]) else redis.call('PEXPIRE', KEYS[1], ARGV[4]) end
redis.call('ZADD', KEYS[2], ARGV[5], ARGV[8])
redis.call('PUBLISH', ARGV[9], ARGV[10])
return {'ok'}
`)

// Put is [Store.Put].
func (r *Redis) Put(ctx context.Context, bucket, key string, value []byte, version uint64, expires time.Time) (uint64, error) {
	if len(value) > maxRecordSize/2 {
		return 0, fmt.Errorf("auth: a record of %d bytes is too large", len(value))
	}
	ctx, cancel, err := r.ready(ctx)
	if err != nil {
		return 0, err
	}
	defer cancel()
	name, now := hash(bucket, key), r.now()
	expected := strconv.FormatUint(version, 10)
	if version == AnyVersion {
		expected = "any"
	}
	life, score := "", "+inf"
	if !expires.IsZero() {
		life = strconv.FormatInt(max(1, expires.Sub(now).Milliseconds()+redisSlack.Milliseconds()), 10)
		score = strconv.FormatInt(expires.UnixMilli(), 10)
	}
	limit := r.limits[bucket]
	if limit == 0 {
		limit = defaultMaxRecords
	}
	next := uint64(time.Now().UnixMicro())
	if version != AnyVersion {
		next = max(next, version+1)
	}
	for range redisRetries {
		envelope := r.keys.seal(bucket, name, Record{Value: value, Version: next, Expires: expires})
		answer, err := putScript.Run(ctx, r.client, []string{r.record(bucket, name), r.index(bucket)},
			expected, strconv.FormatUint(next, 10), envelope, life, score, strconv.FormatInt(now.UnixMilli(), 10), limit, name, r.channel(), bucket+":"+name).StringSlice()
		if err != nil {
			return 0, r.failed("writing", err)
		}
		switch answer[0] {
		case "ok":
			return next, nil
		case "conflict":
			return 0, ErrConflict
		case "full":
			return 0, ErrFull
		}
		used, err := strconv.ParseUint(answer[1], 10, 64)
		if err != nil {
			return 0, fmt.Errorf("reading a version in Redis: %w", err)
		}
		next = used + 1
	}
	return 0, ErrConflict
}

// takeScript deletes a record and returns it: KEYS the record and the index;
// ARGV how long its version is kept in ms, if it would have lived for as long,
// its name, and the channel and the message that tell of it.
var takeScript = redis.NewScript(`
local envelope = redis.call('HGET', KEYS[1], 'v')
if not envelope then return false end
redis.call('HDEL', KEYS[1], 'v')
local left = redis.call('PTTL', KEYS[1])
if left < 0 or left > tonumber(ARGV[1]) then redis.call('PEXPIRE', KEYS[1], ARGV[1]) end
redis.call('ZREM', KEYS[2], ARGV[2])
redis.call('PUBLISH', ARGV[3], ARGV[4])
return envelope
`)

// Take is [Store.Take].
func (r *Redis) Take(ctx context.Context, bucket, key string) (Record, error) {
	name := hash(bucket, key)
	envelope, err := r.take(ctx, bucket, name)
	if err != nil {
		return Record{}, err
	}
	return r.unseal(bucket, name, envelope)
}

// Delete is [Store.Delete].
func (r *Redis) Delete(ctx context.Context, bucket, key string) error {
	_, err := r.take(ctx, bucket, hash(bucket, key))
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	return err
}

func (r *Redis) take(ctx context.Context, bucket, name string) ([]byte, error) {
	ctx, cancel, err := r.ready(ctx)
	if err != nil {
		return nil, err
	}
	defer cancel()
	envelope, err := takeScript.Run(ctx, r.client, []string{r.record(bucket, name), r.index(bucket)}, tombstone.Milliseconds(), name, r.channel(), bucket+":"+name).Text()
	if errors.Is(err, redis.Nil) {
		return nil, ErrNotFound
	} else if err != nil {
		return nil, r.failed("deleting", err)
	}
	return []byte(envelope), nil
}

var _ Watcher = (*Redis)(nil)

// Watch is [Watcher.Watch]. The client library connects again when it has to.
func (r *Redis) Watch(ctx context.Context, changed func(bucket, name string)) {
	subscription := r.client.Subscribe(ctx, r.channel())
	defer subscription.Close()
	messages := subscription.Channel()
	for {
		select {
		case <-ctx.Done():
			return
		case m, open := <-messages:
			if !open {
				return
			}
			if bucket, name, ok := strings.Cut(m.Payload, ":"); ok {
				changed(bucket, name)
			}
		}
	}
}

// redisLease is a lease: the key holds a word that only its owner knows.
type redisLease struct {
	store *Redis
	key   string
	word  string
	once  sync.Once
}

// Lease is [Store.Lease]. It ends by itself after a minute in which it is not
// checked: a process that is paused for longer between the check and the step
// is one too many.
func (r *Redis) Lease(ctx context.Context, name string) (Lease, error) {
	l := &redisLease{store: r, key: r.prefix + "{lease}:" + hash("lease", name), word: rand.Text()}
	for pause := leasePause; ; pause = min(2*pause, leasePauseTo) {
		taken, err := l.try(ctx)
		if err != nil {
			return nil, err
		}
		if taken {
			return l, nil
		}
		timer := time.NewTimer(pause/2 + mathrand.N(pause))
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return nil, ctx.Err()
		}
	}
}

// leaseScript takes a lease that nobody has. Sent twice it succeeds twice.
var leaseScript = redis.NewScript(`
if redis.call('GET', KEYS[1]) == ARGV[1] then return 1 end
return redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) and 1
`)

func (l *redisLease) try(ctx context.Context) (bool, error) {
	asking, cancel, err := l.store.ready(ctx)
	if err != nil {
		return false, err
	}
	defer cancel()
	taken, err := leaseScript.Run(asking, l.store.client, []string{l.key}, l.word, leaseTime.Milliseconds()).Bool()
	if errors.Is(err, redis.Nil) {
		taken, err = false, nil
	}
	if err != nil {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		// The answer may be lost, and the lease taken: it ends by itself, or now.
		l.forget()
		return false, l.store.failed("leasing", err)
	}
	if !taken {
		return false, nil
	}
	l.store.mu.Lock()
	closed := l.store.closed
	if !closed {
		l.store.held[l] = struct{}{}
	}
	l.store.mu.Unlock()
	if closed {
		l.forget()
		return false, ErrClosed
	}
	return true, nil
}

// renewScript gives a lease its full time again if it is still its owner's.
var renewScript = redis.NewScript(`
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
`)

// Check is [Lease.Check]; the lease has its full time again after it.
func (l *redisLease) Check(ctx context.Context) error {
	ctx, cancel, err := l.store.ready(ctx)
	if errors.Is(err, ErrClosed) {
		return ErrLeaseLost
	} else if err != nil {
		return err
	}
	defer cancel()
	held, err := renewScript.Run(ctx, l.store.client, []string{l.key}, l.word, leaseTime.Milliseconds()).Int()
	if err != nil {
		return l.store.failed("checking a lease on", err)
	}
	l.store.mu.Lock()
	_, mine := l.store.held[l]
	l.store.mu.Unlock()
	if held == 0 || !mine {
		return ErrLeaseLost
	}
	return nil
}

// releaseScript deletes a lease that is still its owner's.
var releaseScript = redis.NewScript(`
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
`)

// Release is [Lease.Release].
func (l *redisLease) Release() {
	l.once.Do(func() {
		l.store.mu.Lock()
		_, mine := l.store.held[l]
		delete(l.store.held, l)
		l.store.mu.Unlock()
		if mine {
			l.forget()
		}
	})
}

func (l *redisLease) forget() {
	ctx, cancel := context.WithTimeout(context.Background(), redisTime)
	defer cancel()
	if err := releaseScript.Run(ctx, l.store.client, []string{l.key}, l.word).Err(); err != nil {
		l.store.log.Debug("a lease was not released: it ends by itself", "error", err)
	}
}

// Close is [Store.Close]. Leases that are held end.
func (r *Redis) Close() error {
	r.mu.Lock()
	if r.closed {
		r.mu.Unlock()
		return nil
	}
	r.closed = true
	held := r.held
	r.held = map[*redisLease]struct{}{}
	r.mu.Unlock()
	for l := range held {
		l.forget()
	}
	return r.client.Close()
}
