package session

import (
	"bytes"
	"context"
	"encoding/json"
	"sync"
	"time"
)

// This file keeps a catalog from one run to the next, so that a remote's tools
// are listed before the sign-in, and while the remote is down.

// memoryTimeout bounds what waits for the memory.
const memoryTimeout = 5 * time.Second

// remembered is a catalog as it is kept: the definitions as they were listed.
type remembered struct {
	Offers    Capabilities      `json:"offers"`
	Tools     []json.RawMessage `json:"tools,omitempty"`
	Prompts   []json.RawMessage `json:"prompts,omitempty"`
	Resources []json.RawMessage `json:"resources,omitempty"`
	Templates []json.RawMessage `json:"templates,omitempty"`
}

func (r *remembered) lists() [len(lists{}.of)]*[]json.RawMessage {
	return [...]*[]json.RawMessage{&r.Tools, &r.Prompts, &r.Resources, &r.Templates}
}

func (c *Catalog) lists() [len(lists{}.of)]*[]Definition {
	return [...]*[]Definition{&c.Tools, &c.Prompts, &c.Resources, &c.Templates}
}

// memory is where catalogs are kept, each principal's for itself; nil: nowhere.
func (c *connection) memory() Memory {
	if c.shared {
		return nil
	}
	return c.session.pool.memory
}

// recall fills the catalog with what was listed in an earlier run, unless it
// has been listed already. Once for each connection.
func (c *connection) recall() {
	memory := c.memory()
	if memory == nil {
		return
	}
	ctx, cancel := context.WithTimeout(c.session.ctx, memoryTimeout)
	defer cancel()
	data, err := memory.Recall(ctx, c.session.principal, c.remote.Name, c.remote.URL)
	var kept remembered
	if err == nil && data != nil {
		err = json.Unmarshal(data, &kept)
	}
	if err != nil {
		c.session.log.Debug("remembered catalog not read", "remote", c.remote.Name, "error", err)
	}
	if err != nil || data == nil {
		return
	}
	catalog := Catalog{Offers: kept.Offers}
	for i, list := range kept.lists() {
		for _, raw := range *list {
			// The store is ours, but its contents were a remote's.
			if len(raw) == 0 {
				continue
			}
			if d, problem := kinds[i].read(raw); problem == "" {
				into := catalog.lists()[i]
				*into = append(*into, d)
			}
		}
	}
	c.mu.Lock()
	if c.catalog.Known || c.epoch != 0 {
		c.mu.Unlock()
		return
	}
	catalog.Remote, catalog.Generation = c.catalog.Remote, c.remote.listings.Add(1)
	if c.link != nil {
		catalog.Offers = c.link.offers
	}
	c.catalog = catalog
	c.mu.Unlock()
	c.session.changed()
}

// memo has what is kept written in order: one writer at a time, and only the
// last of what waits for it.
type memo struct {
	mu      sync.Mutex // guards both
	next    func(context.Context) error
	writing bool
}

// keep has write done in the background, after what is being written.
func (c *connection) keep(write func(context.Context) error) {
	c.memo.mu.Lock()
	defer c.memo.mu.Unlock()
	c.memo.next = write
	if !c.memo.writing {
		c.memo.writing = c.session.spawn(c.writeMemo)
	}
}

func (c *connection) writeMemo() {
	for {
		c.memo.mu.Lock()
		write := c.memo.next
		c.memo.next, c.memo.writing = nil, write != nil
		c.memo.mu.Unlock()
		if write == nil {
			return
		}
		// What was listed or signed out of before the end is written after it too.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(c.session.ctx), memoryTimeout)
		if err := write(ctx); err != nil {
			c.session.log.Info("remembered catalog not written", "remote", c.remote.Name, "error", err)
		}
		cancel()
	}
}

// remember keeps the catalog.
func (c *connection) remember(catalog Catalog) {
	memory := c.memory()
	if memory == nil {
		return
	}
	c.keep(func(ctx context.Context) error {
		kept := remembered{Offers: catalog.Offers}
		for i, list := range catalog.lists() {
			for _, d := range *list {
				into := kept.lists()[i]
				*into = append(*into, d.Raw)
			}
		}
		var data bytes.Buffer
		encoder := json.NewEncoder(&data)
		encoder.SetEscapeHTML(false)
		if err := encoder.Encode(kept); err != nil {
			return err
		}
		return memory.Remember(ctx, c.session.principal, c.remote.Name, c.remote.URL, data.Bytes())
	})
}

// unremember forgets what is kept: the principal has signed out.
func (c *connection) unremember() {
	memory := c.memory()
	if memory == nil {
		return
	}
	c.keep(func(ctx context.Context) error {
		return memory.Unremember(ctx, c.session.principal, c.remote.Name, c.remote.URL)
	})
}
