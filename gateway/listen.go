package gateway

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"sync"

	"github.com/modelcontextprotocol/go-sdk/mcp"
)

// This file is subscriptions/listen of protocol 2026-07-28 on a pipe, where a
// client may have several at once. The SDK, which has those over HTTP, tells
// them apart by their sessions, and on a pipe there is one.

// listens are those of one principal's clients.
type listens struct {
	mu  sync.Mutex // guards all, and the listens in it
	all map[*listen]struct{}
}

// listen is one request, and what its client has not been told yet.
type listen struct {
	wants   announcement
	uris    []string
	changed announcement
	updated map[string]json.RawMessage // the params, by their URIs
	news    chan struct{}              // holds one: there is something to tell
}

func (s *listens) add(l *listen) (remove func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.all == nil {
		s.all = map[*listen]struct{}{}
	}
	s.all[l] = struct{}{}
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.all, l)
	}
}

// announce notes that lists have changed, for those who want to know.
func (s *listens) announce(changed announcement) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for l := range s.all {
		l.changed.tools = l.changed.tools || changed.tools && l.wants.tools
		l.changed.prompts = l.changed.prompts || changed.prompts && l.wants.prompts
		l.changed.resources = l.changed.resources || changed.resources && l.wants.resources
		l.wakeLocked()
	}
}

// update notes what is to be told to those who have subscribed to a resource: it
// has changed, or a part of it with a URI of its own. Of one the last counts.
func (s *listens) update(subscribed, uri string, params json.RawMessage) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for l := range s.all {
		if !slices.Contains(l.uris, subscribed) {
			continue
		}
		if _, again := l.updated[uri]; !again && len(l.updated) >= maxSubscriptions {
			continue // it does not read
		}
		if l.updated == nil {
			l.updated = map[string]json.RawMessage{}
		}
		l.updated[uri] = params
		l.wakeLocked()
	}
}

func (l *listen) wakeLocked() {
	if l.changed == (announcement{}) && len(l.updated) == 0 {
		return
	}
	select {
	case l.news <- struct{}{}:
	default:
	}
}

// take returns what a client is to be told now.
func (s *listens) take(l *listen) (changed announcement, updated []json.RawMessage) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, uri := range slices.Sorted(maps.Keys(l.updated)) {
		updated = append(updated, l.updated[uri])
	}
	changed, l.changed, l.updated = l.changed, announcement{}, nil
	return changed, updated
}

// subscribed is what a client wants to be told, as the protocol has it.
type subscribed struct {
	Tools     bool     `json:"toolsListChanged,omitempty"`
	Prompts   bool     `json:"promptsListChanged,omitempty"`
	Resources bool     `json:"resourcesListChanged,omitempty"`
	URIs      []string `json:"resourceSubscriptions,omitempty"`
}

// subscriptionParams are the params of what is told: it names the request.
type subscriptionParams struct {
	Meta          map[string]json.RawMessage `json:"_meta"`
	Notifications *subscribed                `json:"notifications,omitempty"`
}

// listen serves one request with this id until its client ends it, or the view
// is closed.
func (g *Gateway) listen(ctx context.Context, c caller, id, params json.RawMessage) (json.RawMessage, error) {
	var request struct{ Notifications *subscribed }
	if err := json.Unmarshal(params, &request); err != nil || request.Notifications == nil {
		return nil, &invalidParams{"subscriptions/listen needs notifications that say what to listen for"}
	}
	wanted := request.Notifications
	l := &listen{wants: announcement{wanted.Tools, wanted.Prompts, wanted.Resources}, uris: wanted.URIs, news: make(chan struct{}, 1)}
	c.client = l // whose the subscriptions are
	defer g.unsubscribeAll(c)
	defer c.view.listens.add(l)() // what happens from now on is told after the acknowledgement
	for _, uri := range wanted.URIs {
		if err := g.subscribe(ctx, c, uri); err != nil {
			return nil, err
		}
	}
	tell := func(method string, p subscriptionParams) {
		p.Meta = map[string]json.RawMessage{mcp.MetaKeySubscriptionID: id}
		encoded, err := json.Marshal(p)
		if err != nil {
			g.log.ErrorContext(ctx, "encoding a notification", "method", method, "error", err)
			return
		}
		c.notify(method, encoded)
	}
	tell("notifications/subscriptions/acknowledged", subscriptionParams{Notifications: wanted})
	for listening := l.wants != (announcement{}) || len(l.uris) > 0; listening; {
		select {
		case <-l.news:
		case <-ctx.Done():
			listening = false
		case <-c.view.ended.Done():
			listening = false
		}
		changed, updated := c.view.listens.take(l)
		if changed.tools {
			tell("notifications/tools/list_changed", subscriptionParams{})
		}
		if changed.prompts {
			tell("notifications/prompts/list_changed", subscriptionParams{})
		}
		if changed.resources {
			tell("notifications/resources/list_changed", subscriptionParams{})
		}
		for _, params := range updated {
			update, err := withMeta(params, mcp.MetaKeySubscriptionID, id)
			if err != nil {
				g.log.DebugContext(ctx, "update not delivered", "principal", c.view.principal, "error", err)
				continue
			}
			c.notify("notifications/resources/updated", update)
		}
	}
	return fmt.Appendf(nil, `{"_meta":{%q:%s}}`, mcp.MetaKeySubscriptionID, id), nil
}
