package gateway

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	"gatehouse/session/rawjson"
)

// This file is who wants to know when a resource changes. A remote is asked
// once for all clients of a principal, and its answer goes to those who asked.

const (
	maxSubscriptions = 1000 // of one principal
	unsubscribeWait  = 5 * time.Second
)

// subscriptions are those of one principal's clients.
type subscriptions struct {
	mu    sync.Mutex // guards byURI and what is in it
	byURI map[string]*subscription
}

// subscription is a resource that clients want to know about.
type subscription struct {
	remote, original string
	clients          map[any]struct{}
}

// add notes a client; ok is false if there is no room for another resource.
func (s *subscriptions) add(uri, remote, original string, client any) (ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	sub := s.byURI[uri]
	if sub == nil {
		if len(s.byURI) >= maxSubscriptions {
			return false
		}
		if s.byURI == nil {
			s.byURI = map[string]*subscription{}
		}
		sub = &subscription{remote, original, map[any]struct{}{}}
		s.byURI[uri] = sub
	}
	sub.clients[client] = struct{}{}
	return true
}

// remove takes a client out; last is the subscription that nobody has now.
func (s *subscriptions) remove(uri string, client any) (last *subscription) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.removeLocked(uri, client)
}

func (s *subscriptions) removeLocked(uri string, client any) *subscription {
	sub := s.byURI[uri]
	if sub == nil {
		return nil
	}
	if _, ok := sub.clients[client]; !ok {
		return nil
	}
	delete(sub.clients, client)
	if len(sub.clients) > 0 {
		return nil
	}
	delete(s.byURI, uri)
	return sub
}

// removeAll takes a client out of all; last are those that nobody has now.
func (s *subscriptions) removeAll(client any) (last []*subscription) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for uri := range s.byURI {
		if sub := s.removeLocked(uri, client); sub != nil {
			last = append(last, sub)
		}
	}
	return last
}

// has reports whether anybody wants to know about a remote's resource, and
// under which URIs.
func (s *subscriptions) has(remote, original string) (uris []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, uri := range []string{original, qualify(remote, original)} {
		if sub := s.byURI[uri]; sub != nil && sub.remote == remote && sub.original == original {
			uris = append(uris, uri)
		}
	}
	return uris
}

// subscribe is resources/subscribe, and the part of subscriptions/listen that
// is about one resource.
func (g *Gateway) subscribe(ctx context.Context, c caller, uri string) error {
	remote, original, err := g.ownerOf(ctx, c, uri)
	if err == nil && !c.view.offers(remote).Subscribe {
		err = errUnknownMethod
	}
	if _, missing := errors.AsType[*notFound](err); c.modern && (missing || errors.Is(err, errUnknownMethod)) {
		return nil // the other parts of its subscription are good all the same
	}
	if err != nil {
		return err
	}
	if !c.view.subs.add(uri, remote, original, c.client) {
		return &invalidParams{"too many subscriptions: end some of them first"}
	}
	if err := c.view.session.Subscribe(ctx, remote, original); err != nil {
		c.view.subs.remove(uri, c.client)
		g.failed(ctx, c, remote, "subscribing to a resource", err)
		return err
	}
	return nil
}

// unsubscribe ends a client's subscription, and with the last client's the remote's.
func (g *Gateway) unsubscribe(ctx context.Context, c caller, uri string) {
	if last := c.view.subs.remove(uri, c.client); last != nil {
		g.endSubscriptions(ctx, c, last)
	}
}

// unsubscribeAll ends all subscriptions of a client that has gone.
func (g *Gateway) unsubscribeAll(c caller) {
	last := c.view.subs.removeAll(c.client)
	if c.view.principal.Ephemeral() {
		return // the connections end with it
	}
	g.endSubscriptions(context.Background(), c, last...)
}

func (g *Gateway) endSubscriptions(ctx context.Context, c caller, ended ...*subscription) {
	// A stream that the client has closed ends its context too.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), unsubscribeWait)
	defer cancel()
	for _, sub := range ended {
		err := c.view.session.Unsubscribe(ctx, sub.remote, sub.original)
		if err == nil && len(c.view.subs.has(sub.remote, sub.original)) > 0 {
			// Somebody came while the last one left, and may have been overtaken.
			err = c.view.session.Subscribe(ctx, sub.remote, sub.original)
		}
		if err != nil {
			g.failed(ctx, c, sub.remote, "ending a subscription", err)
		}
	}
}

// resourceUpdated tells those who have subscribed to a resource that it, or a
// part of it, has been updated.
func (v *view) resourceUpdated(remote, original string, params json.RawMessage) {
	for _, uri := range v.subs.has(remote, original) {
		told, update, err := asSubscribed(params, remote, uri != original)
		if err == nil {
			v.listens.update(uri, told, update)
			err = announceUpdate(context.Background(), v.server, uri, update)
		}
		if err != nil {
			v.g.log.Debug("update not delivered", "remote", remote, "principal", v.principal, "error", err)
		}
	}
}

// asSubscribed returns the params of an update, and the URI in them: a qualified
// one for those who have subscribed to such.
func asSubscribed(params json.RawMessage, remote string, qualified bool) (uri string, update json.RawMessage, err error) {
	got, err := rawjson.Get(params, "uri")
	if err != nil {
		return "", nil, fmt.Errorf("reading an update: %w", err)
	}
	uri, _ = rawjson.String(got[0])
	if !qualified {
		return uri, params, nil
	}
	uri = qualify(remote, uri)
	encoded, err := json.Marshal(uri)
	if err != nil {
		return "", nil, fmt.Errorf("encoding a URI: %w", err)
	}
	update, err = rawjson.Set(params, "uri", encoded)
	return uri, update, err
}
