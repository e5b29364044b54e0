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
	if !c.remote.mayShare() {
		return
	}
	all := &c.remote.commons
	all.mu.Lock()
	defer all.mu.Unlock()
	// Whoever can be asked something says so in initialize, for itself alone; in
	// the modern era there is none.
	known := eras(c.remote.eras.Load())
	if all.apart || !none(c.owner()) && known != eraModern && known != eraBoth {
		return
	}
	if all.connection == nil {
		all.connection = newCommon(c.session.pool, c.remote)
		all.users = map[*connection]struct{}{}
	}
	all.users[c] = struct{}{}
	c.common.Store(all.connection)
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

// leave ends c's part in the common connection. It returns the session of that
// if c was the last there.
func (c *connection) leave() *Session {
	all := &c.remote.commons
	all.mu.Lock()
	if _, ok := all.users[c]; !ok {
		all.mu.Unlock()
		return nil
	}
	common := all.connection
	delete(all.users, c)
	c.common.Store(nil)
	if len(all.users) == 0 {
		all.connection = nil
		all.mu.Unlock()
		return common.session
	}
	all.mu.Unlock()
	common.unwantAll(c)
	return nil
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
		u.mu.Lock()
		if c.catalog.Known {
			u.catalog = c.catalog // until it has been listed for each
		}
		for uri, w := range c.subscribed {
			if _, ok := w.by[u]; ok {
				u.subscribed[uri] = &subscription{by: map[*connection]struct{}{u: {}}}
			}
		}
		u.common.Store(nil)
		u.mu.Unlock()
	}
	clear(c.subscribed)
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
	for common := c.common.Load(); common != nil; common = c.common.Load() {
		c.recalled.Do(c.recall)
		err := common.tried(ctx)
		if errors.Is(err, errApart) {
			continue
		}
		c.rememberShared(common.currentCatalog())
		c.answeredOnce.Do(func() { close(c.answered) })
		return err
	}
	return c.tried(ctx)
}

// rememberShared keeps the common catalog for this principal.
func (c *connection) rememberShared(catalog Catalog) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if catalog.Known && catalog.Generation > c.remembered {
		c.remembered = catalog.Generation
		c.remember(catalog)
	}
}
