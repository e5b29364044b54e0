package gateway

import (
	"bytes"
	"encoding/json"
	"slices"
	"sync"

	"gatehouse/session/rawjson"
)

// This file is what a remote tells a client in the course of its request:
// progress, and log messages from the level on that the client wants.

// levels are the severities of RFC 5424, the least first.
var levels = []string{"debug", "info", "notice", "warning", "error", "critical", "alert", "emergency"}

const metaLogLevel = "io.modelcontextprotocol/logLevel"

// relay returns what passes a remote's notifications on to the caller that
// sends a request with these params.
func (c caller) relay(params json.RawMessage) func(string, json.RawMessage) {
	if c.notify == nil {
		return nil
	}
	from := c.logLevel(params)
	return func(method string, params json.RawMessage) {
		switch method {
		case "notifications/progress":
		case "notifications/message":
			if params == nil || from == levelNone || from > 0 && severity(params) < from {
				return
			}
		case "notifications/elicitation/complete":
			if c.modern {
				return // protocol 2026-07-28 has it no more
			}
		default:
			return
		}
		c.notify(method, params)
	}
}

// takeUp is relay for a request that goes on with a call which another one
// began: progress has that one's token, and is for whoever gave one now.
func (c caller) takeUp(params json.RawMessage) func(string, json.RawMessage) {
	tell := c.relay(params)
	if tell == nil {
		return nil
	}
	token := progressToken(params)
	return func(method string, params json.RawMessage) {
		if method == "notifications/progress" {
			var err error
			if params, err = rawjson.Set(params, "progressToken", token); token == nil || err != nil {
				return
			}
		}
		tell(method, params)
	}
}

// progressToken returns the progress token in a request's params, nil for none.
func progressToken(params json.RawMessage) json.RawMessage {
	got, err := rawjson.Get(params, "_meta")
	if err != nil || got[0] == nil {
		return nil
	}
	if got, err = rawjson.Get(got[0], "progressToken"); err != nil {
		return nil
	}
	return got[0]
}

// afterwards returns what passes on what a remote says when none of the client's
// requests is in flight there. What else a remote could say then is about
// requests to the client, which are the gateway's, and perhaps for another remote.
func (c caller) afterwards() func(string, json.RawMessage) {
	if c.later == nil {
		return nil
	}
	// Nothing else of the caller: this is kept when the request is over.
	later, levels, client := c.later, &c.view.levels, c.client
	return func(method string, params json.RawMessage) {
		switch method {
		case "notifications/elicitation/complete":
		case "notifications/message":
			if from := levels.of(client); params == nil || from > 0 && severity(params) < from {
				return
			}
		default:
			return
		}
		later(method, params)
	}
}

// levelNone: no log messages at all.
const levelNone = -1

// logLevel is the index of the least severity that a caller wants to see.
func (c caller) logLevel(params json.RawMessage) int {
	if !c.modern {
		// A client that never said what it wants gets what the remotes choose to send.
		return c.view.levels.of(c.client)
	}
	// Protocol 2026-07-28: "servers MUST NOT send notifications/message for a
	// request that does not include" the level.
	if !bytes.Contains(params, []byte(metaLogLevel)) {
		return levelNone
	}
	got, err := rawjson.Get(params, "_meta")
	if err != nil || got[0] == nil {
		return levelNone
	}
	if got, err = rawjson.Get(got[0], metaLogLevel); err != nil {
		return levelNone
	}
	level, _ := rawjson.String(got[0])
	i := slices.Index(levels, level)
	if i >= 0 && c.view.levels.want(nil, i) {
		c.view.session.SetLogLevel(levels[c.view.levels.least()])
	}
	return i
}

// severity is the index of a log message's level; an unknown one is the most
// severe, so that it is seen.
func severity(params json.RawMessage) int {
	got, err := rawjson.Get(params, "level")
	if err != nil {
		return len(levels)
	}
	level, _ := rawjson.String(got[0])
	if i := slices.Index(levels, level); i >= 0 {
		return i
	}
	return len(levels)
}

// setLevel is logging/setLevel: it is remembered for this client, and the
// remotes are asked for the least that any client of the principal wants.
func (g *Gateway) setLevel(c caller, params json.RawMessage) (json.RawMessage, error) {
	got, err := rawjson.Get(params, "level")
	if err != nil {
		return nil, &invalidParams{"the params of logging/setLevel are not an object with a level"}
	}
	level, _ := rawjson.String(got[0])
	i := slices.Index(levels, level)
	if i < 0 {
		return nil, &invalidParams{"logging/setLevel takes one of the levels debug, info, notice, warning, error, critical, alert, emergency"}
	}
	c.view.levels.want(c.client, i)
	c.view.session.SetLogLevel(levels[c.view.levels.least()])
	return json.RawMessage("{}"), nil
}

// logLevels are the log levels that the clients of one principal want. Those of
// the modern era, who say it with every request, count as one, and as wanting
// the least that any of them ever wanted.
type logLevels struct {
	mu     sync.Mutex
	wanted map[any]int
}

// want notes what a client wants and reports whether that is news.
func (l *logLevels) want(client any, level int) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.wanted == nil {
		l.wanted = map[any]int{}
	}
	before, ok := l.wanted[client]
	if ok && (before == level || client == nil && before < level) {
		return false
	}
	l.wanted[client] = level
	return true
}

// of returns what a client wants; 0, everything, if it never said so.
func (l *logLevels) of(client any) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.wanted[client]
}

// least is what the remotes have to send for all to be content.
func (l *logLevels) least() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	least := len(levels) - 1
	for _, level := range l.wanted {
		least = min(least, level)
	}
	return least
}

// forget forgets a client that has gone.
func (l *logLevels) forget(client any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.wanted, client)
}
