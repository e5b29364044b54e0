package session

import (
	"context"
	"errors"
	"maps"
	"slices"
	"sync"

	"gatehouse/auth"
)

// This file is what principals have in common: one connection to a remote that
// cannot tell them apart, for it asks for no sign-in and keeps nothing of whoever
// asks.

// commons is who shares a remote's common connection.
type commons struct {
	mu         sync.Mutex  // guards all below; taken before any connection's
	apart      bool        // the remote keeps state: each principal has a connection of its own
	connection *connection // nil: nobody is there
	users      map[*connection]struct{}
}

// errApart: the connection is not in common, or not any more.
var errApart = errors.New("the remote keeps state for each client")

// mayShare reports whether the config leaves it open that principals share a
// connection. A sign-in is one's own, and so is what has a single other end.
func (r *remote) mayShare() bool { return r.Authorizer == nil && r.Command == nil && !r.SSE }

// keepsState reports whether the remote may keep anything of the link's client:
// in the legacy era a session, what log messages it wants, what it has subscribed
// to. In the modern era each request says it all.
func (l *link) keepsState() bool {
	return l.header[headerSession] != nil || !l.modern && (l.offers.Logging || l.offers.Subscribe)
}

// join has c use the common connection, if there may be one.
func (c *connection) join() {
	all := &c.remote.commons
	all.mu.Lock()
	defer all.mu.Unlock()
	c.resting.Store(false)
	if _, joined := all.users[c]; joined || all.apart || !c.remote.mayShare() || c.session.ctx.Err() != nil {
		return
	}
	// Whoever can be asked something says so in initialize, for itself alone; in
	// the modern era there is none.
	known := eras(c.remote.eras.Load())
	if !none(c.owner()) && known != eraModern && known != eraBoth {
		return
	}
	if all.connection == nil {
		all.connection = newCommon(c.session.pool, c.remote)
		all.users = map[*connection]struct{}{}
	}
	all.users[c] = struct{}{}
	common := all.connection
	common.mu.Lock()
	defer common.mu.Unlock()
	c.mu.Lock()
	defer c.mu.Unlock()
	for uri := range c.subscribed { // before it was at rest
		common.wantLocked(c, uri)
	}
	if l := common.link; l != nil && l.modern && len(c.subscribed) > 0 {
		common.relistenLocked(l)
	}
	clear(c.subscribed)
	c.common.Store(common)
}

// newCommon makes a connection that is no principal's, in a session of its own.
func newCommon(p *Pool, r *remote) *connection {
	s := emptySession(p, auth.Principal{}, nil, p.log)
	c := newConnection(s, r)
	c.shared = true
	s.add(c)
	s.OnChange(func() {
		catalog := c.currentCatalog()
		for _, u := range c.users() {
			u.rememberShared(catalog)
			// Who is slow to be told holds up nobody else. Who waits for the connection
			// looks at dirty.
			if !u.session.dirty.Swap(true) {
				u.session.spawn(u.session.tell)
			}
		}
	})
	return c
}

// users are those who share c.
func (c *connection) users() []*connection {
	all := &c.remote.commons
	all.mu.Lock()
	defer all.mu.Unlock()
	if all.connection != c || all.apart {
		return nil
	}
	return slices.Collect(maps.Keys(all.users))
}

// main is the connection that has the main link and the catalog: the common one,
// or c itself.
func (c *connection) main() *connection {
	if common := c.common.Load(); common != nil {
		return common
	}
	return c
}

// joined is main for who needs the remote: with it ends c's rest.
func (c *connection) joined() *connection {
	if c.resting.Load() {
		c.join()
	}
	return c.main()
}

// leave ends c's part in the common connection, until it is joined again if c
// goes to rest. It returns the session of that if c was the last there.
func (c *connection) leave(rest bool) *Session {
	all := &c.remote.commons
	all.mu.Lock()
	defer all.mu.Unlock()
	if _, ok := all.users[c]; !ok {
		return nil
	}
	common := all.connection
	c.resting.Store(rest)
	delete(all.users, c)
	common.mu.Lock()
	defer common.mu.Unlock()
	if common.handBackLocked(c) && common.link != nil && common.link.modern {
		common.relistenLocked(common.link)
	}
	if len(all.users) > 0 {
		return nil
	}
	all.connection = nil
	return common.session
}

// handBackLocked gives a user what is known and wanted here, which from now on
// has a connection of its own. It reports whether less is subscribed to now.
func (c *connection) handBackLocked(u *connection) (less bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if c.catalog.Known {
		u.catalog, u.status = c.catalog, c.status
	}
	for uri, w := range c.subscribed {
		if _, ok := w.by[u]; ok {
			u.subscribed[uri] = &subscription{by: map[*connection]struct{}{u: {}}}
			less = c.unwantLocked(u, uri) || less
		}
	}
	u.common.Store(nil)
	return less
}

// part gives everybody a connection of their own, from now on: the remote keeps
// state. One of them inherits what has been begun.
func (c *connection) part() {
	all := &c.remote.commons
	all.mu.Lock()
	all.apart = true
	users := slices.Collect(maps.Keys(all.users))
	c.mu.Lock()
	for _, u := range users {
		c.handBackLocked(u)
	}
	c.apart, c.dialing = true, nil
	c.mu.Unlock()
	all.mu.Unlock()
	c.remote.recovery.leave(c)
	for _, u := range users {
		c.remote.recovery.soon(u)
	}
}

// inherited returns the link by which the common connection found that the remote
// keeps state, to the first who needs one; nil if it is given away.
func (c *connection) inherited() *link {
	all := &c.remote.commons
	all.mu.Lock()
	common := all.connection
	all.mu.Unlock()
	if common == nil || common == c || !none(c.owner()) {
		return nil
	}
	common.mu.Lock()
	defer common.mu.Unlock()
	l := common.found
	if l == nil {
		return nil
	}
	common.found = nil
	c.ids.Add(common.ids.Load()) // "The request ID MUST NOT have been previously used"
	return &link{
		connection: c, via: &c.wire, header: l.header, version: l.version, offers: l.offers, profile: l.profile,
		server: l.server, build: l.build, leveling: make(chan struct{}, 1),
	}
}

// quietly connects and lists with the tokens that are there, and returns when
// that has been tried.
func (c *connection) quietly(ctx context.Context) error {
	for common := c.joined(); common != c; common = c.joined() {
		c.recalled.Do(c.recall)
		err := common.tried(ctx)
		if errors.Is(err, errApart) {
			continue
		}
		if c.rememberShared(common.currentCatalog()) {
			c.session.changed()
		}
		c.answeredOnce.Do(func() { close(c.answered) })
		return err
	}
	return c.tried(ctx)
}

// rememberShared keeps the common catalog for this principal, and reports whether
// it is new to them.
func (c *connection) rememberShared(catalog Catalog) (news bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !catalog.Known || catalog.Generation <= c.remembered {
		return false
	}
	c.remembered = catalog.Generation
	c.remember(catalog)
	return true
}
