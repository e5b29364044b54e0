package session

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"gatehouse/session/rawjson"
)

const (
	maxSides = 64               // links of a connection beside the main one
	sideIdle = 10 * time.Minute // after which one is closed that nobody uses

	streamWait = time.Second // of the first call on a link for its event stream
)

// link is one agreement with the remote: in the legacy era an MCP session, from
// initialize to DELETE, in the modern one what server/discover said. The main
// link of a connection lists and serves whoever declares nothing. Beside it
// there are links for clients that a legacy remote may ask something, so that
// each declares what the client behind its calls can do.
type link struct {
	connection *connection
	via        transport
	modern     bool
	side       bool        // beside the main link
	header     http.Header // of each request; never changed
	version    string
	offers     Capabilities
	profile    json.RawMessage        // the capabilities that it was opened with
	level      atomic.Pointer[string] // the log level that it was told, nil for none
	leveling   chan struct{}          // holds one: who tells it a log level; nil in the modern era
	server     string
	build      string // the server's version of itself

	ctx       context.Context // ends with the link; set when it is the connection's
	stop      context.CancelFunc
	listening bool          // on the remote's event stream; guarded by the connection's mu
	relisten  bool          // a list has been read since it began to; guarded like it
	silent    bool          // the remote has none; guarded like it
	refusals  int           // of event streams, for one of the resources wanted there; guarded like it
	users     int           // calls that use a command's link; guarded like it
	began     time.Time     // when it became the main link; guarded like it
	used      time.Time     // when the last of those ended; guarded like it
	opened    chan struct{} // closed when the stream of a side link is open, or has failed
	once      sync.Once     // closes opened

	mu    sync.Mutex      // guards all below
	calls map[int64]*call // in flight, by request id
	asks  map[string]*ask // what the client is being asked, by the remote's request id
	later func(method string, params json.RawMessage)
}

// transport carries messages to one remote and back.
type transport interface {
	// request sends one request and returns its result, byte for byte, and the
	// HTTP headers that came with it, if there is HTTP. ctx covers all of it.
	request(ctx context.Context, header http.Header, id int64, method string, params json.RawMessage, in incoming) (json.RawMessage, http.Header, error)
	// notify sends a message that has no answer.
	notify(ctx context.Context, header http.Header, body []byte) error
	// end says goodbye and lets go of what the link alone has used.
	end(ctx context.Context, header http.Header)
}

// request sends one request on the link. c is the call that it is part of; nil
// for the connection's own.
func (l *link) request(ctx context.Context, id int64, method string, params json.RawMessage, c *call) (json.RawMessage, http.Header, error) {
	header := l.header
	if l.modern {
		var err error
		if params, err = l.enveloped(params, c); err != nil {
			return nil, nil, err
		}
		if header, err = l.named(method, params); err != nil {
			return nil, nil, err
		}
	}
	return l.via.request(ctx, header, id, method, params, l.incoming(c))
}

// streamKnown says that it is known whether there is an event stream.
func (l *link) streamKnown() {
	if l.opened != nil {
		l.once.Do(func() { close(l.opened) })
	}
}

// readCapabilities reads what a server declares, in an answer to method.
func (l *link) readCapabilities(declared json.RawMessage, method string) error {
	if declared == nil || declared[0] != '{' {
		return nil
	}
	twice := l.connection.remote.badAnswer(fmt.Errorf("a capability twice in its answer to %s", method))
	capabilities, err := rawjson.Get(declared, "tools", "prompts", "resources", "completions", "logging")
	if err != nil {
		return twice
	}
	o := &l.offers
	changes := []*bool{&o.ToolsChange, &o.PromptsChange, &o.ResourcesChange, nil, nil}
	for i, offered := range []*bool{&o.Tools, &o.Prompts, &o.Resources, &o.Completions, &o.Logging} {
		if *offered = capabilities[i] != nil && capabilities[i][0] == '{'; !*offered {
			continue
		}
		flags, err := rawjson.Get(capabilities[i], "listChanged", "subscribe")
		if err != nil {
			return twice
		}
		if changes[i] != nil {
			*changes[i] = string(flags[0]) == "true"
		}
		if offered == &o.Resources {
			o.Subscribe = string(flags[1]) == "true"
		}
	}
	return nil
}

// readServer reads what a server calls itself.
func (l *link) readServer(info json.RawMessage) {
	if info == nil || info[0] != '{' {
		return
	}
	if got, err := rawjson.Get(info, "name", "version"); err == nil {
		name, _ := rawjson.String(got[0])
		build, _ := rawjson.String(got[1])
		l.server, l.build = shown(name), shown(build)
	}
}

// readInitialized reads the answer to initialize.
func (l *link) readInitialized(result json.RawMessage, header http.Header) error {
	r := l.connection.remote
	got, err := rawjson.Get(result, "protocolVersion", "capabilities", "serverInfo")
	if err != nil {
		return r.badAnswer(errors.New("a member twice in its answer to initialize"))
	}
	version, ok := rawjson.String(got[0])
	if !ok {
		return r.badAnswer(errors.New("no protocol version in its answer to initialize"))
	}
	// "If the client does not support the version in the server's response, it
	// SHOULD disconnect."
	if !slices.Contains(accepted, version) {
		return r.fail(KindUnsupported, nil, "speaks protocol version %s; the gateway speaks %s.", shown(version), strings.Join(accepted, ", "))
	}
	l.version = version
	if err := l.readCapabilities(got[1], "initialize"); err != nil {
		return err
	}
	l.readServer(got[2])
	// "The client MUST include the MCP-Protocol-Version: <protocol-version> HTTP
	// header on all subsequent requests to the MCP server".
	l.header[headerProtocol] = []string{version}
	if ids := header[headerSession]; len(ids) > 0 {
		// "The session ID MUST only contain visible ASCII characters (ranging from
		// 0x21 to 0x7E)."
		id := ids[0]
		if len(ids) > 1 || id == "" || len(id) > maxSessionID || strings.ContainsFunc(id, func(c rune) bool { return c < 0x21 || c > 0x7e }) {
			return r.badAnswer(errors.New("an unusable session id"))
		}
		l.header[headerSession] = ids
	}
	return nil
}

// initialize is the handshake of the legacy era: initialize, and initialized.
// Before is the transport of an attempt in the other era, if it is still good.
// With an error the link, if there is one, is of no use, but its transport may be.
func (c *connection) initialize(ctx context.Context, loud bool, profile json.RawMessage, before transport) (*link, error) {
	params, err := initializeParams(c.session.pool.info, profile)
	if err != nil {
		return nil, err
	}
	l := &link{connection: c, header: c.remote.requestHeader(), profile: profile, leveling: make(chan struct{}, 1)}
	err = c.wire.authorized(ctx, loud, func() error {
		ctx, cancel := within(ctx, c.remote.patience(dialTimeout))
		defer cancel()
		if l.via == nil {
			via, err := c.reopened(ctx, l, before)
			if err != nil {
				return err
			}
			l.via = via
		}
		result, header, err := l.request(ctx, c.ids.Add(1), "initialize", params, nil)
		if err == nil {
			err = l.readInitialized(result, header)
		}
		return err
	})
	if err != nil {
		return l, c.refusedToBegin(err)
	}
	body, err := appendRequest(nil, 0, "notifications/initialized", nil)
	if err != nil {
		return l, err
	}
	err = c.wire.authorized(ctx, loud, func() error {
		ctx, cancel := within(ctx, dialTimeout)
		defer cancel()
		return l.via.notify(ctx, l.header, body)
	})
	if errors.Is(err, errGone) {
		return nil, c.remote.gone()
	}
	return l, err
}

// initializeParams are the params of initialize.
func initializeParams(info, profile json.RawMessage) (json.RawMessage, error) {
	params, err := json.Marshal(struct {
		ProtocolVersion string          `json:"protocolVersion"`
		Capabilities    json.RawMessage `json:"capabilities"`
		ClientInfo      json.RawMessage `json:"clientInfo"`
	}{offered, profile, info})
	if err != nil {
		return nil, fmt.Errorf("encoding initialize: %w", err)
	}
	return params, nil
}

// implementation is how the gateway introduces itself, as JSON.
func implementation(name, version string) json.RawMessage {
	info, err := json.Marshal(map[string]string{"name": name, "version": version})
	if err != nil {
		return json.RawMessage(`{"name":"","version":""}`) // strings always have an encoding
	}
	return info
}

// sideKey is whose a side link is.
type sideKey struct {
	client  any
	profile string
}

// side is a link beside the main one, or the attempt to open it.
type side struct {
	done  chan struct{} // closed when link and err are set
	link  *link
	err   error
	users int // calls that have it; guarded by the connection's mu
	idle  *time.Timer
}

// linkFor returns the link for a call of this caller, and what ends its use.
func (c *connection) linkFor(ctx context.Context, from *Caller) (l *link, release func(), err error) {
	main, err := c.joined().dialed(ctx, false)
	for errors.Is(err, errApart) {
		main, err = c.joined().dialed(ctx, false)
	}
	if err != nil {
		return nil, nil, err
	}
	for c.remote.Command != nil && !c.use(main) {
		if main, err = c.dialed(ctx, false); err != nil {
			return nil, nil, err
		}
	}
	key := sideKey{profile: string(Profile(from.Capabilities))}
	if !from.Modern {
		key.client = from.Client
	}
	switch {
	case c.remote.Command != nil:
		// One program for each principal: two would get into each other's way. Whom it
		// means after all calls is known where there is one client only.
		if c.session.owner != nil {
			main.heardBy(from.Later)
		}
		return main, func() { c.unuse(main) }, nil
	case main.modern && (from.Modern || eras(c.remote.eras.Load()) == eraModern):
		return main, func() {}, nil
	case main.modern && none(json.RawMessage(key.profile)):
		key.client = nil // nothing tells such clients apart
	case main.modern:
	case none(json.RawMessage(key.profile)):
		// Of several clients it is not known whom it means after all calls.
		if c.session.owner != nil && main.connection == c {
			main.heardBy(from.Later)
		}
		return main, func() {}, nil
	case key.profile == string(c.owner()) && main.connection == c:
		main.heardBy(from.Later)
		return main, func() {}, nil
	}
	s := c.sideOf(key, from)
	if s == nil {
		return nil, nil, ErrClosed
	}
	release = func() { c.leaveSide(key, s) }
	select {
	case <-s.done:
	case <-ctx.Done():
		release()
		return nil, nil, c.remote.ended(ctx)
	}
	sessions := s.err == nil && (s.link.header[headerSession] != nil || c.remote.SSE)
	if s.err == nil && (sessions || !main.modern) {
		return s.link, release, nil
	}
	release()
	if main.modern && (s.err == nil || speaksOld(s.err)) {
		// It has the modern era only, or the legacy one without sessions, in which
		// nobody can be asked anything. Then the modern one has to do for all.
		if !passing(s.err) {
			c.remote.eras.Store(int32(eraModern))
		}
		c.closeSides(func(k sideKey) bool { return k == key })
		return main, func() {}, nil
	}
	return nil, nil, s.err
}

// passing reports whether an error says nothing about what a remote speaks: it
// may have had too much to do.
func passing(err error) bool {
	failure, ok := errors.AsType[*Failure](err)
	return ok && (failure.Kind == KindTimeout || failure.Kind == KindCut || failure.Kind == KindStatus && !isFinal(failure.Status))
}

// heardBy sets who takes what the remote says after all calls.
func (l *link) heardBy(later func(string, json.RawMessage)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.later == nil {
		l.later = later
	}
}

// sideOf returns the side link of a key, opening it if there is none; nil if
// the session is closed, or the client has left.
func (c *connection) sideOf(key sideKey, from *Caller) *side {
	c.mu.Lock()
	defer c.mu.Unlock()
	select {
	case <-from.Gone:
		return nil // Leave has been here, or waits for the lock
	default:
	}
	if s := c.sides[key]; s != nil {
		s.users++
		if s.idle != nil {
			s.idle.Stop()
		}
		return s
	}
	s := &side{done: make(chan struct{}), users: 1}
	later := from.Later
	if key.client == nil {
		later = nil
	}
	if !c.session.spawn(func() { c.openSide(key, s, later) }) {
		return nil
	}
	if c.sides == nil {
		c.sides = map[sideKey]*side{}
	}
	c.makeRoomLocked()
	c.sides[key] = s
	return s
}

// makeRoomLocked closes a side link that nobody uses when there are many.
func (c *connection) makeRoomLocked() {
	if len(c.sides) < maxSides {
		return
	}
	for key, s := range c.sides {
		if s.users == 0 {
			c.closeSideLocked(key, s)
			return
		}
	}
}

// openSide initializes a side link.
func (c *connection) openSide(key sideKey, s *side, later func(string, json.RawMessage)) {
	l, err := c.initialize(c.session.ctx, true, json.RawMessage(key.profile), nil)
	if err != nil {
		c.abandon(l)
		l = nil
	} else {
		l.ctx, l.stop = context.WithCancel(c.session.ctx)
		l.side, l.later = true, later
	}
	c.mu.Lock()
	s.link, s.err = l, err
	gone := c.sides[key] != s
	switch {
	case err != nil && !gone:
		delete(c.sides, key)
	case err == nil && gone:
		l.stop()
	case err == nil:
		// Many servers ask on this stream, whichever call it is for; and what they
		// ask before it is open is lost.
		l.opened = make(chan struct{})
		l.listening = c.session.spawn(func() { c.listen(l) })
	}
	c.mu.Unlock()
	if err == nil && !gone {
		l.awaitStream()
	}
	close(s.done)
	if err == nil && gone {
		c.goodbye(l)
	}
}

// awaitStream waits a moment for the event stream of a new link.
func (l *link) awaitStream() {
	timer := time.NewTimer(streamWait)
	defer timer.Stop()
	select {
	case <-l.opened:
	case <-timer.C:
	case <-l.ctx.Done():
	}
}

// leaveSide ends one use of a side link.
func (c *connection) leaveSide(key sideKey, s *side) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if s.users--; s.users > 0 || c.sides[key] != s {
		return
	}
	if len(c.sides) > maxSides { // all of the others were in use when it was opened
		c.closeSideLocked(key, s)
		return
	}
	if s.idle == nil {
		s.idle = time.AfterFunc(sideIdle, func() {
			c.mu.Lock()
			defer c.mu.Unlock()
			if c.sides[key] == s && s.users == 0 {
				c.closeSideLocked(key, s)
			}
		})
		return
	}
	s.idle.Reset(sideIdle)
}

// closeSideLocked parts with a side link that is open.
func (c *connection) closeSideLocked(key sideKey, s *side) {
	delete(c.sides, key)
	if s.idle != nil {
		s.idle.Stop()
	}
	if l := s.link; l != nil {
		l.stop()
		c.letGoLocked(l)
	}
}

// letGoLocked says goodbye in the background.
func (c *connection) letGoLocked(l *link) {
	if !c.session.spawn(func() { c.goodbye(l) }) {
		c.leaving.Go(func() { c.goodbye(l) }) // the session is closing
	}
}

// dropSide forgets a side link that is of no use any more.
func (c *connection) dropSide(l *link) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for key, s := range c.sides {
		if s.link == l {
			delete(c.sides, key)
			if s.idle != nil {
				s.idle.Stop()
			}
			l.stop()
			c.letGoLocked(l)
		}
	}
}

// linksLocked returns all links that are open.
func (c *connection) linksLocked() (links []*link) {
	if c.link != nil {
		links = append(links, c.link)
	}
	for _, s := range c.sides {
		if s.link != nil {
			links = append(links, s.link)
		}
	}
	return links
}

// Leave ends the links that are one client's alone: it has gone.
func (s *Session) Leave(client any) {
	for _, c := range s.connections {
		c.closeSides(func(key sideKey) bool { return key.client == client })
	}
}

func (c *connection) closeSides(match func(sideKey) bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for key, s := range c.sides {
		if match(key) {
			c.closeSideLocked(key, s)
		}
	}
}

// takeSides takes all side links away, for good.
func (c *connection) takeSides() (links []*link) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for key, s := range c.sides {
		delete(c.sides, key)
		if s.idle != nil {
			s.idle.Stop()
		}
		if s.link != nil {
			s.link.stop()
			links = append(links, s.link)
		}
	}
	return links
}

// RootsChanged tells the remotes that may ask a client for its roots that these
// have changed.
func (s *Session) RootsChanged(client any) {
	body, err := appendRequest(nil, 0, "notifications/roots/list_changed", nil)
	if err != nil {
		return
	}
	for _, c := range s.connections {
		c.mu.Lock()
		var links []*link
		if l := c.link; l != nil && !l.modern {
			links = append(links, l)
		}
		for key, side := range c.sides {
			if key.client == client && side.link != nil {
				links = append(links, side.link)
			}
		}
		c.mu.Unlock()
		for _, l := range links {
			if Declares(l.profile, methodRoots, nil) {
				c.sendAside(l, body)
			}
		}
	}
}
