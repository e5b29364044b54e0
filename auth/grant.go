package auth

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/oauth2"

	"gatehouse/auth/endpoint"
	"gatehouse/auth/secret"
)

// key names what a principal holds at a remote.
type key struct {
	principal Principal
	remote    string
}

// store is the key's form in the store.
func (k key) store() string { return hash(k.principal.Key(), k.remote) }

// hash joins parts unambiguously into a store key.
func hash(parts ...string) string {
	h := sha256.New()
	for _, part := range parts {
		fmt.Fprintf(h, "%d|%s|", len(part), part)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// grant is what a principal holds for one remote. It is immutable: a refresh
// makes another one.
type grant struct {
	grantFacts
	ClientSecret secret.Text
	Access       secret.Text // empty: the grant has ended and is kept for what it says about the past
	Refresh      secret.Text
	ID           secret.Text
}

// grantFacts are the parts of a grant that are no secrets.
type grantFacts struct {
	// To whom it belongs and for what it is good. Compared on use, so a record
	// under a wrong key is nobody's.
	Principal Principal
	Remote    string
	RemoteURL string
	Issuer    string
	Resource  string

	// The client that it was issued to, and where. A grant is refreshed with
	// these, whatever the config or a later registration says.
	ClientID           string
	AuthMethod         string
	TokenEndpoint      string
	RevocationEndpoint string

	Requested []string
	Granted   []string
	Raised    map[string]int `json:",omitempty"` // how often more was granted for an operation, by its hash
	Obtained  time.Time      // the access token
	RefreshAt time.Time      // zero: never
	Expires   time.Time      // zero: the server did not say
	Account   string         // for display

	// Redeeming is when the refresh token was about to be sent, zero once what
	// came of it is known. If nobody is at it any more, the answer is lost: the
	// server may have used the token up.
	Redeeming time.Time `json:",omitzero"`
}

// grantRecord is a grant's form in the store, the only place where its secrets
// are written out.
type grantRecord struct {
	grantFacts
	ClientSecret string `json:",omitempty"`
	Access       string `json:",omitempty"`
	Refresh      string `json:",omitempty"`
	ID           string `json:",omitempty"`
}

func (g *grant) encode() ([]byte, error) {
	return json.Marshal(grantRecord{g.grantFacts, g.ClientSecret.Value(), g.Access.Value(), g.Refresh.Value(), g.ID.Value()})
}

func decodeGrant(data []byte) (*grant, error) {
	var r grantRecord
	if err := json.Unmarshal(data, &r); err != nil {
		return nil, fmt.Errorf("decoding a grant: %w", err)
	}
	return &grant{r.grantFacts, secret.New(r.ClientSecret), secret.New(r.Access), secret.New(r.Refresh), secret.New(r.ID)}, nil
}

// fits reports whether the grant may be used for the remote as it is configured.
func (g *grant) fits(r *Remote) bool {
	return g.RemoteURL == r.URL &&
		(r.Issuer == "" || g.Issuer == r.Issuer) &&
		(r.ClientID == "" || g.ClientID == r.ClientID)
}

// valid reports whether the access token can be sent.
func (g *grant) valid(now time.Time) bool {
	return !g.Access.IsEmpty() && (g.Expires.IsZero() || now.Before(g.Expires))
}

func (g *grant) refreshable() bool { return !g.Access.IsEmpty() && !g.Refresh.IsEmpty() }

// sameTokens reports whether the grants came with the same answer.
func (g *grant) sameTokens(other *grant) bool {
	return g.Access.Equal(other.Access) && g.Refresh.Equal(other.Refresh)
}

// inDoubt reports whether the refresh token may have been used up.
func (g *grant) inDoubt() bool { return !g.Redeeming.IsZero() }

// redeeming is the grant with the note that its refresh token is about to be
// sent; at zero, that it has not been used up.
func (g *grant) redeeming(at time.Time) *grant {
	next := *g
	next.Redeeming = at
	return &next
}

// ended is the grant without its tokens: what was agreed, and with whom.
func (g *grant) ended() *grant {
	next := &grant{grantFacts: g.grantFacts, ClientSecret: g.ClientSecret}
	next.Redeeming = time.Time{}
	return next
}

// keepDead is how long the store keeps a grant that nothing can revive. Until
// then it says why a sign-in is asked for.
const keepDead = 24 * time.Hour

// keepEphemeral is how long it keeps what a session left that ended without a
// goodbye, with its process.
const keepEphemeral = 30 * 24 * time.Hour

// recordExpires says when the store may forget the grant.
func (g *grant) recordExpires(now time.Time) time.Time {
	switch {
	case g.Access.IsEmpty():
		return now.Add(keepDead)
	case (g.refreshable() || g.Expires.IsZero()) && g.Principal.Ephemeral():
		return now.Add(keepEphemeral)
	case g.refreshable() || g.Expires.IsZero():
		return time.Time{}
	}
	return g.Expires.Add(keepDead)
}

// receive makes the grant that a token answer brings.
func (g *grant) receive(a *endpoint.Answer, now time.Time) *grant {
	now = now.Round(0) // the monotonic clock may stop while the machine sleeps; tokens age
	next := &grant{grantFacts: g.grantFacts, ClientSecret: g.ClientSecret, Access: a.Access, Refresh: a.Refresh, ID: a.ID}
	// RFC 6749 section 6: "The authorization server MAY issue a new refresh
	// token, in which case the client MUST discard the old refresh token and
	// replace it with the new refresh token." Without one the old stays good.
	if next.Refresh.IsEmpty() {
		next.Refresh = g.Refresh
	}
	if next.ID.IsEmpty() {
		next.ID = g.ID
	}
	// RFC 6749 section 5.1: scope is "OPTIONAL, if identical to the scope
	// requested by the client".
	if a.Scope != "" {
		next.Granted = unionScopes(strings.Fields(a.Scope))
	} else if next.Granted == nil {
		next.Granted = g.Requested
	}
	if account := accountOf(a.ID); account != "" {
		next.Account = account
	}
	next.Obtained, next.Expires, next.RefreshAt, next.Redeeming = now, time.Time{}, time.Time{}, time.Time{}
	if a.ExpiresIn > 0 {
		next.Expires = now.Add(a.ExpiresIn)
		if !next.Refresh.IsEmpty() {
			// Spread, so that what was signed in together is not refreshed together.
			share := 0.7 + 0.2*rand.Float64()
			next.RefreshAt = now.Add(time.Duration(share * float64(a.ExpiresIn)))
		}
	}
	return next
}

// hold is a grant in memory, and what is being done to it.
type hold struct {
	key    key
	name   string // of its record, where the store tells of changes
	remote *Remote
	usedAt atomic.Int64 // when somebody last asked for it, in nanoseconds

	mu      sync.Mutex // guards what follows; never held over the network or the store
	grant   *grant
	version uint64
	token   *oauth2.Token // what Token hands out copies of
	dead    bool          // signed out or ended: the store has no such grant
	seenAt  time.Time     // when a shared store was last looked at
	unsaved bool          // the store could not take the grant

	refreshing *refreshCall // nil: none in flight
	failures   int          // refreshes in a row that failed
	retryAt    time.Time    // no refresh before
	lastErr    error        // of the last refresh
	final      bool         // the last refresh was refused for good, not failed
	badClient  bool         // it was refused with invalid_client

	forcedAt  time.Time // when a refresh was made because the remote refused the token
	refusedAt time.Time // when the remote refused a token that no refresh mends
}

// set puts a grant into the hold, unless a later one is there.
func (h *hold) set(g *grant, version uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if version > h.version {
		h.setLocked(g, version)
	}
}

func (h *hold) setLocked(g *grant, version uint64) {
	same := h.grant != nil && h.grant.Obtained.Equal(g.Obtained) && h.grant.Access.Equal(g.Access)
	h.grant, h.version, h.unsaved = g, version, false
	if same {
		return // the note of a refresh has come or gone, and what failed has failed
	}
	h.token = &oauth2.Token{AccessToken: g.Access.Value(), TokenType: "Bearer", Expiry: g.Expires}
	h.failures, h.retryAt, h.lastErr, h.final, h.badClient = 0, time.Time{}, nil, false, false
	h.refusedAt = time.Time{}
}

// snapshot returns the grant, nil if it is gone.
func (h *hold) snapshot() *grant {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.dead {
		return nil
	}
	return h.grant
}

// held returns the hold of a key, reading it from the store the first time. It
// is nil if there is no grant.
func (b *Broker) held(ctx context.Context, k key, r *Remote) (*hold, error) {
	b.mu.RLock()
	h := b.holds[k]
	if h != nil {
		h.usedAt.Store(b.now().UnixNano()) // before it could leave memory
	}
	b.mu.RUnlock()
	if h != nil {
		return b.current(ctx, h, seenFor), nil
	}
	g, version, err := b.readGrant(ctx, k)
	if errors.Is(err, ErrNotFound) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	if !g.fits(r) {
		b.log.WarnContext(ctx, "grant not used: the config of the remote has changed since the sign-in; sign in anew",
			"remote", k.remote, "principal", k.principal, "issuer", g.Issuer, "configured_issuer", r.Issuer)
	}
	return b.adopt(ctx, k, r, g, version)
}

// shares reports whether other processes may use and change the grant.
func (b *Broker) shares(k key) bool { return b.store.Shared() && !k.principal.Ephemeral() }

// seenFor is how long a grant in memory counts before a shared store is asked
// whether it has changed, so that a sign-out elsewhere is noticed within it.
const seenFor = 5 * time.Second

// current brings a hold up to date if the store was last looked at longer ago
// than age. It returns nil if the grant is gone. If the store cannot be read,
// what is held stays good; a routine look, whose age is not 0, does not keep a
// token that is valid waiting for a store that hangs.
func (b *Broker) current(ctx context.Context, h *hold, age time.Duration) *hold {
	if !b.shares(h.key) {
		return h
	}
	h.mu.Lock()
	fresh := !h.seenAt.IsZero() && b.now().Sub(h.seenAt).Abs() < age
	unsaved := h.unsaved
	limit := storeTime
	if age > 0 && h.grant.valid(b.now()) {
		limit = glanceTime
	}
	h.mu.Unlock()
	if fresh {
		return h
	}
	look, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	if unsaved {
		b.saveAgain(look, h)
	}
	g, version, err := b.readGrant(look, h.key)
	switch {
	case errors.Is(err, ErrNotFound):
		b.forget(h.key)
		return nil
	case err == nil:
		h.set(g, version)
	case ctx.Err() != nil:
		return h // nobody has looked
	default: // also after the limit: a store that hangs is not waited for at each call
		b.log.WarnContext(ctx, "looking for changes of a grant failed: what was held is used on",
			"remote", h.key.remote, "principal", h.key.principal, "error", err)
	}
	h.mu.Lock()
	h.seenAt = b.now()
	h.mu.Unlock()
	return h
}

// saveAgain writes a grant that the store could not take before.
func (b *Broker) saveAgain(ctx context.Context, h *hold) {
	h.mu.Lock()
	g, version, unsaved := h.grant, h.version, h.unsaved
	h.mu.Unlock()
	if !unsaved {
		return
	}
	if err := b.writeGrant(ctx, h.key, h.remote, g, version); err == nil {
		b.log.InfoContext(ctx, "a grant that could not be written is written now", "remote", h.key.remote, "principal", h.key.principal)
	}
}

// adopt takes a grant that is in the store into memory. The hold is nil if the
// grant is gone again.
func (b *Broker) adopt(ctx context.Context, k key, r *Remote, g *grant, version uint64) (*hold, error) {
	b.mu.Lock()
	h := b.holds[k]
	if h == nil {
		// Nobody else has it yet, and whoever finds it finds a grant in it.
		h = &hold{key: k, name: hash(bucketGrants, k.store()), remote: r}
		h.setLocked(g, version)
		b.makeRoomLocked()
		b.holds[k], b.named[h.name] = h, h
	}
	h.usedAt.Store(b.now().UnixNano())
	b.mu.Unlock()
	h.set(g, version)
	// A sign-out that deleted the record before the hold was there has not seen
	// the hold, so look again.
	if _, err := b.store.Get(ctx, bucketGrants, k.store()); err != nil {
		b.forget(k)
		if errors.Is(err, ErrNotFound) {
			return nil, nil
		}
		return nil, internalError(k.remote, fmt.Errorf("reading a grant: %w", err))
	}
	h.mu.Lock()
	h.seenAt = b.now()
	h.mu.Unlock()
	return h, nil
}

const (
	maxHolds  = 10_000
	idleAfter = 5 * time.Minute // longer than whoever has asked for a hold, or refreshes it, is at it
	idleLooks = 100             // at holds, until some are found that may leave
)

// makeRoomLocked lets some holds leave memory that nobody uses, if there are too
// many: the store has their grants. b.mu is held.
func (b *Broker) makeRoomLocked() {
	if len(b.holds) < b.maxHolds {
		return
	}
	before, looks := b.now().Add(-idleAfter).UnixNano(), 0
	for k, h := range b.holds { // in no order
		if looks++; looks > idleLooks {
			return
		}
		// Whoever has the lock uses the hold; b.mu must not wait for it.
		if h.usedAt.Load() > before || !h.mu.TryLock() {
			continue
		}
		idle := h.refreshing == nil && !h.unsaved
		h.mu.Unlock()
		if idle {
			delete(b.holds, k)
			delete(b.named, h.name)
		}
	}
}

// readGrant reads a grant from the store and checks whose it is.
func (b *Broker) readGrant(ctx context.Context, k key) (*grant, uint64, error) {
	record, err := b.store.Get(ctx, bucketGrants, k.store())
	if errors.Is(err, ErrNotFound) {
		return nil, 0, err
	} else if err != nil {
		return nil, 0, internalError(k.remote, fmt.Errorf("reading a grant: %w", err))
	}
	g, err := decodeGrant(record.Value)
	if err != nil {
		return nil, 0, internalError(k.remote, err)
	}
	if g.Principal != k.principal || g.Remote != k.remote {
		return nil, 0, internalError(k.remote, errors.New("the store holds another's grant under this key"))
	}
	return g, record.Version, nil
}

// writeGrant writes a grant, then lets it be used.
func (b *Broker) writeGrant(ctx context.Context, k key, r *Remote, g *grant, version uint64) error {
	version, err := b.putGrant(ctx, k, g, version)
	if err != nil {
		return err
	}
	_, err = b.adopt(ctx, k, r, g, version)
	return err
}

// putGrant writes a grant and returns its version.
func (b *Broker) putGrant(ctx context.Context, k key, g *grant, version uint64) (uint64, error) {
	data, err := g.encode()
	if err != nil {
		return 0, fmt.Errorf("encoding a grant: %w", err)
	}
	version, err = b.store.Put(ctx, bucketGrants, k.store(), data, version, g.recordExpires(b.now()))
	if err != nil {
		return 0, fmt.Errorf("writing a grant: %w", err)
	}
	return version, nil
}

// dropGrant deletes a grant, from the store first.
func (b *Broker) dropGrant(ctx context.Context, k key) error {
	err := b.store.Delete(ctx, bucketGrants, k.store())
	b.forget(k)
	if err != nil {
		return fmt.Errorf("deleting a grant: %w", err)
	}
	return nil
}

// endGrant takes the tokens out of a grant that is no good any more, or returns
// [ErrConflict] if another is held by now.
func (b *Broker) endGrant(ctx context.Context, h *hold, bad *grant) error {
	h.mu.Lock()
	g, version := h.grant, h.version
	h.mu.Unlock()
	if !g.sameTokens(bad) {
		return ErrConflict
	}
	if h.remote.login {
		b.clearTokens(ctx, h.key.principal, "") // whose they are the grant will not say any more
	}
	return b.writeGrant(ctx, h.key, h.remote, g.ended(), version)
}

// forget removes a hold from memory; whoever still has it finds it dead.
func (b *Broker) forget(k key) {
	b.mu.Lock()
	h := b.holds[k]
	if h != nil {
		delete(b.holds, k)
		delete(b.named, h.name)
	}
	b.mu.Unlock()
	if h != nil {
		h.mu.Lock()
		h.dead = true
		h.mu.Unlock()
	}
}

// End forgets everything of a principal that is gone: its grants and its flows.
func (b *Broker) End(p Principal) {
	ctx, done, err := b.work(storeTime)
	if err != nil {
		return
	}
	defer done()
	// Flows first: a callback that writes a grant looks for its flow afterwards,
	// so either it finds none and takes the grant back, or the grant was there
	// before the deletion below.
	err = b.endFlows(ctx, p, "")
	b.clearTokens(ctx, p, "")
	b.endLoans(p, "")
	for _, s := range b.silent {
		s.forget(p)
	}
	for _, name := range slices.Sorted(maps.Keys(b.remotes)) {
		k := key{p, name}
		err = errors.Join(err, b.dropGrant(ctx, k), b.store.Delete(ctx, bucketTroubles, k.store()))
	}
	if err != nil {
		b.log.Error("forgetting a principal failed", "principal", p, "error", err)
	}
}

// SignOut ends what the principal holds at the remote, whatever the
// authorization server says to it. It reports whether that server has revoked
// the tokens, which it is asked to also where the store fails; with an error the
// sign-in is still kept.
func (b *Broker) SignOut(ctx context.Context, p Principal, remote string) (revoked bool, err error) {
	r := b.remotes[remote]
	if r == nil {
		return false, ErrUnknownRemote
	}
	work, done, err := b.work(signOutTime)
	if err != nil {
		return false, err
	}
	defer done()
	if s := b.silent[remote]; s != nil {
		b.clearTokens(work, p, remote)
		s.forget(p)
		return false, nil
	}
	if r.login {
		b.clearTokens(work, p, "")
		for _, s := range b.silent {
			s.forget(p)
		}
	}
	// A grant that others of the group use ends for all of them.
	if from, _ := b.sharing(key{p, remote}); from != remote {
		defer func() { b.unlend(key{p, remote}) }()
		if mate := b.remotes[from]; mate != nil {
			return b.SignOut(ctx, p, from)
		}
	}
	b.endLoans(p, remote)

	k := key{p, remote}
	g, release := b.lastGrant(work, k, r)
	err = b.deleteSignIn(k)
	release()
	if g != nil && !g.Access.IsEmpty() {
		// Also where the store failed: what it still holds is then of no use.
		if err := b.revoke(work, r, g); err == nil {
			revoked = true
			b.log.InfoContext(ctx, "signing out, tokens revoked", "remote", remote, "principal", p)
		} else {
			b.log.WarnContext(ctx, "signing out; the tokens could not be revoked", "remote", remote, "principal", p, "error", err)
		}
	}
	if err != nil {
		b.log.ErrorContext(ctx, "deleting a sign-in failed", "remote", remote, "principal", p, "error", err)
		return revoked, internalError(remote, err)
	}
	return revoked, nil
}

// lastGrant returns what a sign-out ends, nil if there is nothing, and keeps
// others from refreshing it until release. A refresh that is under way, here or
// in another process, would leave a token behind that nobody revokes; it is
// waited for, but not for long: a sign-out does not depend on others.
func (b *Broker) lastGrant(ctx context.Context, k key, r *Remote) (g *grant, release func()) {
	release = func() {}
	h, err := b.held(ctx, k, r)
	if err != nil {
		b.log.WarnContext(ctx, "reading a grant to sign out failed", "remote", k.remote, "principal", k.principal, "error", err)
	}
	if h == nil {
		return nil, release
	}
	waiting, cancel := context.WithTimeout(ctx, settleTime)
	defer cancel()
	h.settle(waiting)
	if b.shares(k) {
		if lease, err := b.store.Lease(waiting, refreshLease(k)); err == nil {
			release = lease.Release
		} else {
			b.log.WarnContext(ctx, "signing out without waiting for a refresh elsewhere", "remote", k.remote, "principal", k.principal, "error", err)
		}
		if h = b.current(ctx, h, 0); h == nil {
			return nil, release
		}
	}
	return h.snapshot(), release
}

// deleteSignIn deletes what a principal holds at a remote, and the flows there.
func (b *Broker) deleteSignIn(k key) error {
	// Its own time: what was waited for before may have used up the other's.
	ctx, done, err := b.work(storeTime)
	if err != nil {
		return err
	}
	defer done()
	return errors.Join(
		b.endFlows(ctx, k.principal, k.remote), // flows first, as in End
		b.store.Delete(ctx, bucketTroubles, k.store()),
		b.dropGrant(ctx, k))
}

// clearTokens forgets what was got for a principal's login at a remote; at all
// remotes if it is empty.
func (b *Broker) clearTokens(ctx context.Context, p Principal, remote string) {
	if b.login == nil || b.workload != nil {
		return
	}
	s, err := b.knownSubject(ctx, p, b.login)
	if err == nil {
		b.exchanger.Clear(s.Issuer, s.ID, remote)
	}
}

// settle waits for the refresh that is in flight, if one is.
func (h *hold) settle(ctx context.Context) {
	h.mu.Lock()
	call := h.refreshing
	h.mu.Unlock()
	if call == nil {
		return
	}
	select {
	case <-call.done:
	case <-ctx.Done():
	}
}

// Status is what a principal holds at a remote.
type Status struct {
	SignedIn    bool // a token can be had without a person
	Issuer      string
	Account     string // from an ID token, for display only
	Scopes      []string
	Expires     time.Time // of the access token; zero: unknown
	Refreshable bool
	Shared      []string // the remotes of an ssoGroup that this sign-in serves, itself included; nil: it alone

	Unknown bool // the store could not be read: there may be a sign-in, or a link, that is not told here

	Pending     *RequiredError // the link that waits for a browser, if one does
	LastError   *Error         // what failed last; nil once something worked
	LastErrorAt time.Time
}

// refusedFor is how long a refusal by the remote counts. After that the token
// is believed again: a remote that could not reach its key set says 401, too.
const refusedFor = 10 * time.Minute

// Status says what the principal holds at the remote.
func (b *Broker) Status(p Principal, remote string) Status {
	var s Status
	r := b.remotes[remote]
	if r == nil {
		return s
	}
	ctx, done, err := b.work(storeTime)
	if err != nil {
		return s
	}
	defer done()
	if silent := b.silent[remote]; silent != nil {
		return silent.status(ctx, p)
	}
	if from, all := b.sharing(key{p, remote}); from != remote {
		s = b.Status(p, from)
		s.Shared = all
		return s
	} else {
		s.Shared = all
	}
	now := b.now()
	k := key{p, remote}
	h, err := b.held(ctx, k, r)
	if err != nil {
		s.Unknown, s.LastError, s.LastErrorAt = true, asError(remote, err), now
		return s
	}
	if h != nil {
		h.mu.Lock()
		g := h.grant
		if !h.dead && g.fits(r) && !g.Access.IsEmpty() {
			s.Issuer, s.Account, s.Expires = g.Issuer, g.Account, g.Expires
			s.Scopes = slices.Clone(g.Granted)
			s.Refreshable = g.refreshable() && !h.final
			refused := !h.refusedAt.IsZero() && now.Before(h.refusedAt.Add(refusedFor))
			s.SignedIn = (g.valid(now) || s.Refreshable) && !refused
		}
		h.mu.Unlock()
	}
	f, err := b.pending(ctx, k)
	if err != nil {
		s.Unknown, s.LastError, s.LastErrorAt = true, asError(remote, err), now
		return s
	}
	if f != nil {
		s.Pending = b.required(f)
	}
	s.LastError, s.LastErrorAt = b.trouble(ctx, k)
	return s
}

// troubleRecord is what failed last for a key, as the store keeps it. It holds
// sentences of ours only, never a cause.
type troubleRecord struct {
	Kind Kind
	Say  string
	At   time.Time
}

// noteTrouble keeps what failed for Status. A store that cannot take it is
// reported where it matters more.
func (b *Broker) noteTrouble(k key, err error) {
	e, ok := errors.AsType[*Error](err)
	if !ok {
		return
	}
	ctx, done, err := b.work(storeTime)
	if err != nil {
		return
	}
	defer done()
	now := b.now()
	data, err := json.Marshal(troubleRecord{e.Kind, e.Say, now})
	if err == nil {
		_, err = b.store.Put(ctx, bucketTroubles, k.store(), data, AnyVersion, now.Add(keepDead))
	}
	if err != nil {
		b.log.Warn("keeping the last error failed", "remote", k.remote, "error", err)
	}
}

func (b *Broker) trouble(ctx context.Context, k key) (*Error, time.Time) {
	record, err := b.store.Get(ctx, bucketTroubles, k.store())
	if err != nil {
		return nil, time.Time{}
	}
	var t troubleRecord
	if err := json.Unmarshal(record.Value, &t); err != nil {
		return nil, time.Time{}
	}
	return &Error{Kind: t.Kind, Remote: k.remote, Say: t.Say}, t.At
}

func (b *Broker) clearTrouble(ctx context.Context, k key) {
	if err := b.store.Delete(ctx, bucketTroubles, k.store()); err != nil {
		b.log.WarnContext(ctx, "clearing the last error failed", "remote", k.remote, "error", err)
	}
}

func internalError(remote string, err error) *Error {
	if errors.Is(err, ErrUnwritable) {
		return &Error{Kind: KindInternal, Remote: remote, Say: "the gateway cannot write its store, which may be full or read-only; its log says more", Err: err}
	}
	return &Error{Kind: KindInternal, Remote: remote, Say: "the gateway could not read or write its store; its log says more", Err: err}
}

// asError gives any failure the form that users get.
func asError(remote string, err error) *Error {
	if e, ok := errors.AsType[*Error](err); ok {
		return e
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return &Error{Kind: KindUnavailable, Remote: remote, Say: "it or its authorization server did not answer in time; try again", Err: err}
	}
	return &Error{Kind: KindInternal, Remote: remote, Say: "something went wrong inside the gateway; its log says more", Err: err}
}
