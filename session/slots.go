package session

import (
	"context"
	"maps"
	"slices"
	"sync"
	"time"
)

// maxPrograms is how many processes of one command run at once, over all
// principals: each has its own, for a program keeps the state of its one client.
const maxPrograms = 64

// slots are for the processes of one command. When all are taken, who needs one
// gets that of the principal who has not called for the longest time.
type slots struct {
	max   int
	mu    sync.Mutex // guards taken, and heir and over of what is in it
	taken map[*slot]struct{}
}

// slot is that of one process, from before its start to after its end.
type slot struct {
	of   *connection
	heir *slot         // gets it when the process has ended; nil: nobody
	over bool          // the process has ended
	gone chan struct{} // closed then
}

// admit returns a slot for a process, having ended another's if need be.
func (c *connection) admit(ctx context.Context) (*slot, error) {
	r := &c.remote.slots
	mine := &slot{of: c, gone: make(chan struct{})}
	r.mu.Lock()
	if len(r.taken) < r.max {
		r.taken[mine] = struct{}{}
		r.mu.Unlock()
		return mine, nil
	}
	others := slices.Collect(maps.Keys(r.taken))
	r.mu.Unlock()
	for len(others) > 0 {
		oldest, since := -1, time.Time{}
		for i, p := range others {
			if used, idle := p.of.idleSince(p); idle && (oldest < 0 || used.Before(since)) {
				oldest, since = i, used
			}
		}
		if oldest < 0 {
			break
		}
		victim := others[oldest]
		others = slices.Delete(others, oldest, oldest+1)
		if !r.claim(victim, mine) {
			continue
		}
		if !victim.of.evict(victim) && r.disclaim(victim) {
			continue // it has a call now
		}
		select {
		case <-victim.gone:
			return mine, nil
		case <-ctx.Done():
			if !r.disclaim(victim) {
				r.free(mine)
			}
			return nil, c.remote.ended(ctx)
		}
	}
	return nil, c.remote.fail(KindUnreachable, nil, "already runs %d times, once for each of its users, and each is busy with a call. Try again in a moment.", r.max)
}

// claim has mine follow on another slot; false if that has an heir already, or
// is none any more.
func (r *slots) claim(p, mine *slot) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if p.over || p.heir != nil {
		return false
	}
	p.heir = mine
	return true
}

// disclaim is the end of a claim; false if it has been satisfied.
func (r *slots) disclaim(p *slot) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if p.over {
		return false
	}
	p.heir = nil
	return true
}

// free is called when there is no process there any more.
func (r *slots) free(p *slot) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.taken, p)
	if p.heir != nil {
		r.taken[p.heir] = struct{}{}
	}
	p.over = true
	close(p.gone)
}

// in reports whether the link's process has this slot.
func (l *link) in(p *slot) bool {
	d, _ := l.via.(*duplex)
	if d == nil {
		return false
	}
	running, _ := d.pipe.(*process)
	return running != nil && running.slot == p
}

// idleSince returns when the process in a slot has last been used, if it is
// not in use.
func (c *connection) idleSince(p *slot) (used time.Time, idle bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.link == nil || !c.link.in(p) || c.link.users > 0 || c.listing != nil {
		return time.Time{}, false
	}
	return c.link.used, true
}

// evict ends the process in a slot for another principal's, unless it is in use
// now. The next call starts it again.
func (c *connection) evict(p *slot) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.link == nil || !c.link.in(p) || c.link.users > 0 || c.listing != nil {
		return false
	}
	c.session.log.Info("command ended: another user needs its slot", "remote", c.remote.Name)
	c.letGoLocked(c.unlinkLocked())
	return true
}

// use has a call use the link of a command; false if that is of no use any more.
func (c *connection) use(l *link) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.link != l {
		return false
	}
	if d, ok := l.via.(*duplex); ok && d.over() != nil {
		c.letGoLocked(c.unlinkLocked()) // it has ended, and that is not noted yet
		return false
	}
	l.users++
	return true
}

func (c *connection) unuse(l *link) {
	c.mu.Lock()
	defer c.mu.Unlock()
	l.users--
	l.used = time.Now()
}
