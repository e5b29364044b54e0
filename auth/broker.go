package auth

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"gatehouse/auth/guard"
	"gatehouse/auth/secret"
)

// Remote is what the broker needs to know of one remote.
type Remote struct {
	Name string // required: the key in mcpServers
	URL  string // required: the MCP endpoint

	Issuer                  string      // pins the authorization server; empty: pinned at the first sign-in
	ClientID                string      // of a pre-registered client; empty: registration finds one
	ClientSecret            secret.Text // of a pre-registered client; empty: it is public
	TokenEndpointAuthMethod string      // empty: what the authorization server lists
	CallbackPath            string      // for a pre-registered client that needs another; empty: the gateway's
	Scopes                  []string    // instead of what discovery says; empty: discovery

	HTTP *guard.Client // required: towards the remote's documents and its authorization server
}

// Config is what a [Broker] is built from.
type Config struct {
	Remotes []Remote // those that sign in by OAuth; names must be unique

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

	// refreshesAtOnce bounds the refreshes in flight towards one remote's
	// authorization server, so that one that comes back after an outage meets a
	// queue and not a crowd.
	refreshesAtOnce = 16

	// The deadlines of the broker's own work, network included.
	startTime   = 30 * time.Second // discovery and registration
	finishTime  = 20 * time.Second // the exchange of a code and its storing
	refreshTime = 30 * time.Second // queueing, the request, and its storing
	signOutTime = 20 * time.Second
	storeTime   = 5 * time.Second // of the store alone
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
	slots      map[string]chan struct{} // per remote: refreshes that may be in flight

	ctx    context.Context // of the broker's own work: it must not end with the caller that began it
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu     sync.RWMutex // guards what follows
	closed bool         // no more work is added to wg
	holds  map[key]*hold
	starts map[key]*startCall
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
	c.Remotes = slices.Clone(c.Remotes)
	remotes := make(map[string]*Remote, len(c.Remotes))
	slots := make(map[string]chan struct{}, len(c.Remotes))
	for i := range c.Remotes {
		r := &c.Remotes[i]
		switch {
		case r.Name == "":
			refuse("remote %d has no Name", i)
		case remotes[r.Name] != nil:
			refuse("remote %s is there twice", r.Name)
		case r.URL == "" || r.HTTP == nil:
			refuse("remote %s: URL and HTTP are required", r.Name)
		}
		remotes[r.Name] = r
		slots[r.Name] = make(chan struct{}, refreshesAtOnce)
	}
	if err := errors.Join(problems...); err != nil {
		return nil, fmt.Errorf("auth: %w", err)
	}

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
		slots:        slots,
		holds:        map[key]*hold{},
		starts:       map[key]*startCall{},
	}
	if !c.Disabled && c.ClientMetadataURL == "" {
		b.metadata = b.registrar.document()
	}
	b.ctx, b.cancel = context.WithCancel(context.Background())
	return b, nil
}

// Close ends the work that is under way and waits for it. A second call does
// nothing. The store stays open.
func (b *Broker) Close() {
	b.mu.Lock()
	b.closed = true
	b.mu.Unlock()
	b.cancel()
	b.wg.Wait()
}

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
// would have to be registered, it only says so. resp is the 401 that the remote
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
	d, err := b.discoverer.discover(ctx, r, ch, step)
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
