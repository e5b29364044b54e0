package exchange

import (
	"container/list"
	"time"

	"gatehouse/auth/secret"
)

// entry is what is kept under a key: a token, what failed, or both.
type entry struct {
	key     key
	person  key     // the key but for the subject's token
	subject Subject // without its token
	remote  string
	place   *list.Element

	token   *Token    // nil: none
	issued  time.Time // the token
	renewAt time.Time // of the token: from then on another one is fetched beside it

	err     error // of the last exchange; nil: it worked
	fails   int   // in a row
	retryAt time.Time

	rejectedAt time.Time // when the remote last rejected a token of this key
}

// cache keeps entries up to a bound. It is guarded by the exchanger's mutex.
type cache struct {
	max     int
	entries map[key]*entry
	latest  map[key]*entry // by entry.person: the one with the last token
	recent  *list.List     // of *entry, the most recently used in front
	swept   time.Time
	evicted uint64
}

func newCache(max int) *cache {
	return &cache{max: max, entries: map[key]*entry{}, latest: map[key]*entry{}, recent: list.New()}
}

// get returns what is kept under a key, if it is still good for something.
func (c *cache) get(k key, now time.Time) *entry {
	e := c.entries[k]
	if e == nil {
		return nil
	}
	if e.gone(now) {
		c.drop(e)
		return nil
	}
	c.recent.MoveToFront(e.place)
	return e
}

// last returns the entry of the last token that was got for the same as an entry
// under this key, whatever token the subject presented then.
func (c *cache) last(person key, now time.Time) *entry {
	e := c.latest[person]
	if e == nil || !e.valid(now) {
		return nil
	}
	c.recent.MoveToFront(e.place)
	return e
}

// gone reports whether nothing of an entry matters any more.
func (e *entry) gone(now time.Time) bool {
	return !e.valid(now) && !now.Before(e.retryAt) && !now.Before(e.rejectedAt.Add(rejectedAgain))
}

func (e *entry) valid(now time.Time) bool { return e.token != nil && now.Before(e.token.Expires) }

// put returns the entry of a key, making room for it if it is new.
func (c *cache) put(k, person key, s Subject, remote string, now time.Time) *entry {
	if e := c.entries[k]; e != nil {
		c.recent.MoveToFront(e.place)
		return e
	}
	c.sweep(now)
	for len(c.entries) >= c.max {
		c.drop(c.recent.Back().Value.(*entry))
		c.evicted++
	}
	s.Token = secret.Text{}
	e := &entry{key: k, person: person, subject: s, remote: remote}
	e.place = c.recent.PushFront(e)
	c.entries[k] = e
	return e
}

func (c *cache) drop(e *entry) {
	c.recent.Remove(e.place)
	delete(c.entries, e.key)
	if c.latest[e.person] == e {
		delete(c.latest, e.person)
	}
}

// sweepEvery is how often what has expired is looked for beyond what is asked
// for.
const sweepEvery = time.Minute

// sweep drops what has expired: tokens that nobody asks for any more.
func (c *cache) sweep(now time.Time) {
	if now.Sub(c.swept).Abs() < sweepEvery {
		return
	}
	c.swept = now
	for _, e := range c.entries {
		if e.gone(now) {
			c.drop(e)
		}
	}
}

// clear drops the entries that match and says how many these were.
func (c *cache) clear(match func(s Subject, remote string) bool) (n int) {
	for _, e := range c.entries {
		if match(e.subject, e.remote) {
			c.drop(e)
			n++
		}
	}
	return n
}
