package auth

import (
	"cmp"
	"context"
	"crypto/cipher"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"gatehouse/auth/endpoint"
	"gatehouse/auth/gate"
	"gatehouse/auth/guard"
	"gatehouse/auth/secret"
	"gatehouse/exchange"
)

// Remote is what the broker needs to know of one remote.
type Remote struct {
	Name string // required: the key in mcpServers
	URL  string // required: the MCP endpoint

	Issuer                  string      // pins the authorization server; empty: what the remote names, pinned at the first use
	ClientID                string      // of a pre-registered client; empty: registration finds one
	ClientSecret            secret.Text // of a pre-registered client; empty: it is public
	TokenEndpointAuthMethod string      // empty: what the authorization server lists
	CallbackPath            string      // for a pre-registered client that needs another; empty: the gateway's
	Scopes                  []string    // instead of what discovery says; empty: discovery

	SSOGroup string // remotes of one group share sign-ins; empty: none

	HTTP *guard.Client // required: towards the remote's documents and its authorization server

	// How one signs in there: one of the Type constants; empty: [TypeOAuth]. What
	// follows is for the others, which ask nobody at the remote.
	Type               string
	Key                *endpoint.Key // for private_key_jwt; nil: none
	Audience           string        // whom tokens are for; forward requires it
	Resource           string        // empty: not sent (exchange), or as discovered
	TokenEndpoint      string        // empty: as discovered
	ConnectorID        string        // exchange at a Dex
	ExpectedIssuer     string        // of tokens; empty: of the server that they come from
	SubjectTokenType   string        // [exchange.TypeIDToken] or [exchange.TypeAccessToken]; empty: the former
	RequestedTokenType string        // empty: [exchange.TypeAccessToken]
	TokenHTTP          *guard.Client // towards the token endpoint; nil: HTTP

	login  bool   // it is no remote but the login at the gateway
	pinned string // the issuer that a discovery may lead to where Issuer is empty; empty: any
}

// Config is what a [Broker] is built from.
type Config struct {
	Remotes []Remote // those that tokens are needed for; names must be unique
	Login   *Login   // nil: nobody logs in at the gateway

	ExchangeCache int // tokens kept that no person signed in for; 0: 10,000

	PublicURL         string   // required, without trailing slash: redirect URIs and links start with it
	CallbackPath      string   // required, such as /oauth/callback
	ClientName        string   // what authorization servers show; empty: Gatehouse
	ClientMetadataURL string   // a client metadata document that is served elsewhere; empty: ours
	MetadataPath      string   // where ours is served; empty: /.well-known/oauth-client.json
	ClientScopes      []string // scope of our document; empty: none

	Disabled bool // no sign-ins: a challenge is ErrDisabled
	MaxFlows int  // pending flows of one principal; 0: 10

	// Refreshed is told of each refresh that was sent to an authorization server
	// and of its outcome: one of [RefreshDone] and so on; may be nil.
	Refreshed func(remote, outcome string)
	// Exchanged is told of each token that no person signed in for and that was not
	// kept, as [exchange.Config] says, with the remote's way of signing in; may be
	// nil.
	Exchanged func(remote, way, outcome, issued string)

	Store Store            // required; closed by its owner
	Log   *slog.Logger     // required
	Now   func() time.Time // nil: time.Now
}

// Outcomes of a refresh.
const (
	RefreshDone    = "done"
	RefreshRefused = "refused" // by the authorization server
	RefreshFailed  = "failed"  // no answer that could be used
)

const (
	defaultMaxFlows     = 10
	defaultClientName   = "Gatehouse"
	defaultMetadataPath = "/.well-known/oauth-client.json"

	// The deadlines of the broker's own work, network included.
	startTime   = 30 * time.Second // discovery and registration
	finishTime  = 20 * time.Second // the exchange of a code and its storing
	refreshTime = 30 * time.Second // queueing, the request, and its storing
	signOutTime = 20 * time.Second
	settleTime  = 8 * time.Second        // of that, for a refresh that is under way
	storeTime   = 5 * time.Second        // of the store alone
	glanceTime  = 500 * time.Millisecond // of it, while there is a token to use
)

// Broker gets tokens for principals at remotes and keeps them. Make one with
// [New] and end it with [Broker.Close].
type Broker struct {
	publicURL    string
	callbackPath string
	disabled     bool
	maxFlows     int
	metadata     []byte // the Client ID Metadata Document; nil: not served here
	refreshed    func(remote, outcome string)
	store        Store
	log          *slog.Logger
	now          func() time.Time

	discoverer *discoverer
	registrar  *registrar
	remotes    map[string]*Remote
	silent     map[string]*silent // of the remotes that need no sign-in of their own
	login      *Remote            // nil: nobody logs in at the gateway
	workload   *workload          // nil: users log in
	keys       *loginKeys

	audience       string   // that bearer tokens must name; empty: none is accepted
	identityClaims []string // that tell one principal from another
	inbound        inbound

	exchanger *exchange.Exchanger
	gates     *gate.Gates

	ctx    context.Context // of the broker's own work: it must not end with the caller that began it
	cancel context.CancelFunc
	wg     sync.WaitGroup

	// A hold's own lock is taken first where both are needed.
	mu       sync.RWMutex // guards what follows
	closed   bool         // no more work is added to wg
	holds    map[key]*hold
	named    map[string]*hold // the same, by the names of their records
	maxHolds int              // beyond which those leave that nobody uses
	loans    map[key]loan     // by who borrows
	starts   map[key]*startCall
	pins     map[string]string // by remote: the issuers that the gateway's credentials are bound to, as far as known
	seal     cipher.AEAD       // of what browsers carry; nil: not needed yet
}

// New checks the config and makes a broker of it.
func New(c Config) (*Broker, error) {
	var problems []error
	refuse := func(format string, args ...any) { problems = append(problems, fmt.Errorf(format, args...)) }
	if c.Store == nil || c.Log == nil {
		refuse("Store and Log are required")
	}
	if u, err := url.Parse(c.PublicURL); err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" ||
		strings.HasSuffix(c.PublicURL, "/") || u.RawQuery != "" || u.Fragment != "" || u.User != nil {
		refuse("PublicURL must be an absolute http or https URL without a trailing slash, query and fragment")
	}
	if !strings.HasPrefix(c.CallbackPath, "/") || strings.HasSuffix(c.CallbackPath, "/") {
		refuse("CallbackPath must begin with a slash and not end with one")
	}
	if c.MaxFlows < 0 {
		refuse("MaxFlows must not be negative")
	}
	c.ClientName = cmp.Or(c.ClientName, defaultClientName)
	c.MetadataPath = cmp.Or(c.MetadataPath, defaultMetadataPath)
	c.MaxFlows = cmp.Or(c.MaxFlows, defaultMaxFlows)
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Refreshed == nil {
		c.Refreshed = func(string, string) {}
	}
	if c.Exchanged == nil {
		c.Exchanged = func(string, string, string, string) {}
	}
	c.Remotes = slices.Clone(c.Remotes)
	remotes := make(map[string]*Remote, len(c.Remotes))
	for i := range c.Remotes {
		r := &c.Remotes[i]
		switch {
		case r.Name == "":
			refuse("remote %d has no Name", i)
		case remotes[r.Name] != nil:
			refuse("remote %s is there twice", r.Name)
		case r.URL == "" || r.HTTP == nil:
			refuse("remote %s: URL and HTTP are required", r.Name)
		case r.Name == LoginRemote:
			refuse("no remote may be called %s", LoginRemote)
		case (r.Type == TypeForward || r.Type == TypeIDJAG || r.Type == TypeExchange) && c.Login == nil:
			refuse("remote %s: %s needs a Login", r.Name, r.Type)
		case r.Type == TypeExchange && r.ClientID == "" && (r.TokenEndpoint != "" || r.Issuer != "" && r.Issuer != c.Login.Issuer):
			// The login's client secret is for the login's provider.
			refuse("remote %s: ClientID is required elsewhere than at the Login's Issuer", r.Name)
		}
		remotes[r.Name] = r
	}
	var login *Remote
	if c.Login != nil {
		if c.Login.Issuer == "" || c.Login.HTTP == nil || c.Login.ClientID == "" && c.Login.IDTokenFile == "" {
			refuse("Login: Issuer, HTTP, and ClientID or IDTokenFile are required")
		}
		login = c.Login.remote()
	}
	if err := errors.Join(problems...); err != nil {
		return nil, fmt.Errorf("auth: %w", err)
	}
	if login != nil {
		remotes[LoginRemote] = login
	}

	gates := gate.New(c.Now)
	b := &Broker{
		publicURL:    c.PublicURL,
		callbackPath: c.CallbackPath,
		disabled:     c.Disabled,
		maxFlows:     c.MaxFlows,
		refreshed:    c.Refreshed,
		store:        c.Store,
		log:          c.Log,
		now:          c.Now,
		discoverer:   newDiscoverer(c.Log, c.Now),
		registrar:    newRegistrar(c),
		remotes:      remotes,
		silent:       map[string]*silent{},
		login:        login,
		exchanger: exchange.New(exchange.Config{Max: c.ExchangeCache, Gates: gates, Log: c.Log, Now: c.Now, Fetched: func(t *exchange.Target, outcome, issued string) {
			c.Exchanged(t.Remote, string(t.Kind), outcome, issued)
		}}),
		gates:    gates,
		inbound:  inbound{wait: introspectWait, gates: gate.New(c.Now)},
		holds:    map[key]*hold{},
		named:    map[string]*hold{},
		maxHolds: maxHolds,
		loans:    map[key]loan{},
		starts:   map[key]*startCall{},
		pins:     map[string]string{},
	}
	if !c.Disabled && c.ClientMetadataURL == "" {
		b.metadata = b.registrar.document()
	}
	for i := range c.Remotes {
		if r := &c.Remotes[i]; !r.browser() {
			b.silent[r.Name] = newSilent(b, r)
		}
	}
	if c.Login != nil && c.Login.IDTokenFile != "" {
		b.workload = &workload{file: c.Login.IDTokenFile}
	}
	b.keys = newLoginKeys(b)
	if c.Login != nil {
		b.audience, b.identityClaims = c.Login.Audience, c.Login.IdentityClaims
		if len(b.identityClaims) == 0 {
			b.identityClaims = []string{"sub"}
		}
	}
	b.ctx, b.cancel = context.WithCancel(context.Background())
	if watcher, ok := c.Store.(Watcher); ok {
		b.wg.Go(func() { watcher.Watch(b.ctx, b.changedElsewhere) })
	}
	return b, nil
}

// changedElsewhere has a grant read again before it is used: another process may
// have refreshed it, or its user has signed out.
func (b *Broker) changedElsewhere(bucket, name string) {
	if bucket != bucketGrants {
		return
	}
	b.mu.RLock()
	h := b.named[name]
	b.mu.RUnlock()
	if h != nil {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.seenAt = time.Time{}
	}
}

// Close ends the work that is under way and waits for it. A second call does
// nothing. The store stays open.
func (b *Broker) Close() {
	b.mu.Lock()
	b.closed = true
	b.mu.Unlock()
	b.cancel()
	b.wg.Wait()
	b.exchanger.Close()
}

// Exchanges says how the cache of tokens does that no person signed in for.
func (b *Broker) Exchanges() exchange.Stats { return b.exchanger.Stats() }

// errClosed ends what is asked of a broker after Close.
var errClosed = fmt.Errorf("auth: the broker is closed: %w", context.Canceled)

// work begins something that Close waits for. Its context is the broker's, not
// the caller's: whoever asked may leave, and others may be waiting for it.
func (b *Broker) work(limit time.Duration) (ctx context.Context, done func(), err error) {
	b.mu.RLock()
	defer b.mu.RUnlock()
	if b.closed {
		return nil, nil, errClosed
	}
	b.wg.Add(1)
	ctx, cancel := context.WithTimeout(b.ctx, limit)
	return ctx, func() {
		cancel()
		b.wg.Done()
	}, nil
}

// ClientMetadata returns the gateway's Client ID Metadata Document, nil if it
// is not served here.
func (b *Broker) ClientMetadata() []byte { return slices.Clone(b.metadata) }

// Inspect walks a remote's discovery without a user, telling step what it found
// and how a sign-in would go on. It changes nothing anywhere: where a client
// would have to be registered, it only says so; where the gateway signs in
// itself, it tries. resp is the 401 that the remote
// gave; nil: none was seen.
func (b *Broker) Inspect(ctx context.Context, remote string, resp *http.Response, step func(Step)) error {
	r := b.remotes[remote]
	switch {
	case r == nil:
		return ErrUnknownRemote
	case b.disabled:
		return ErrDisabled
	}
	ctx, cancel := context.WithTimeout(ctx, startTime)
	defer cancel()
	var ch challenge
	if resp != nil {
		ch = parseChallenge(resp.Header)
	}
	if s := b.silent[remote]; s != nil {
		return s.inspect(ctx, ch, step)
	}
	d, err := b.discover(ctx, r, ch, step)
	if err != nil {
		return err
	}
	reg, err := b.registrar.unasked(r, d, step)
	switch {
	case err != nil:
		return err
	case reg == nil && d.NoPKCEMetadata:
		step(Step{What: "dynamic registration", URL: withoutQuery(d.RegistrationEndpoint), Note: "not known to be there; " + noOAuth})
	case reg == nil:
		step(Step{What: "dynamic registration", URL: withoutQuery(d.RegistrationEndpoint), OK: true, Note: "offered; the first sign-in registers the gateway, this check does not"})
	}
	scopes := strings.Join(withOffline(r, d, unionScopes(scopesOf(r, ch, d))), " ")
	step(Step{What: "issuer", URL: d.Issuer, OK: true})
	step(Step{What: "authorization endpoint", URL: withoutQuery(d.AuthorizationEndpoint), OK: true})
	step(Step{What: "scopes", OK: true, Note: cmp.Or(scopes, "none, so what the server gives by default")})
	return nil
}
