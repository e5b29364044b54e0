package session

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	"gatehouse/session/rawjson"
)

// Bounds of one remote's list. Beyond them the list is refused as a whole:
// half of it would look like all of it.
const (
	maxPages       = 200
	maxListBytes   = 64 << 20
	maxDefinitions = 100_000
	maxCursor      = 8 << 10
	maxToolName    = 512
	maxURI         = 8 << 10
	maxDepth       = 100 // of a definition; schemas in use have less than 30
	maxWarnings    = 20  // of single definitions, for one list
)

// Catalog is what a remote has last listed for a principal.
type Catalog struct {
	Remote     string
	Generation uint64       // another one: other contents
	Tools      []Definition // all lists in the remote's order, never changed
	Prompts    []Definition
	Resources  []Definition
	Templates  []Definition               // of resources
	Known      bool                       // the tools have been listed at least once
	Connected  bool                       // there is an MCP session at the remote
	Offers     Capabilities               // as the remote declared them when it was last dialed
	Hints      [len(lists{}.of)]CacheHint // of tools, prompts, resources and templates, in this order
}

// CacheHint is how long a list may be kept, as a remote of 2026-07-28 says (MCP
// 2026-07-28, caching); the zero CacheHint is that of all others.
type CacheHint struct {
	Until  time.Time
	Public bool // it is the same for everybody
}

// Capabilities are what a remote declares to have.
type Capabilities struct {
	Tools, Prompts, Resources, Completions, Logging bool
	Subscribe                                       bool // to resources
	ToolsChange, PromptsChange, ResourcesChange     bool // and it says so
}

// changes reports whether there is anything to listen for.
func (c Capabilities) changes() bool {
	return c.ToolsChange || c.PromptsChange || c.ResourcesChange || c.Subscribe
}

// Definition is one tool, prompt, resource or resource template.
type Definition struct {
	Name        string          // of a resource its URI, of a template its URI template
	Raw         json.RawMessage // byte for byte; never changed
	Description string
}

func sameDefinitions(a, b []Definition) bool {
	return slices.EqualFunc(a, b, func(x, y Definition) bool { return bytes.Equal(x.Raw, y.Raw) })
}

// update takes in what has just been listed and reports whether that is
// anything new, and as such another generation.
func (c *Catalog) update(read *lists) bool {
	news := !c.Known
	for i, list := range c.lists() {
		if read.of[i] != nil {
			c.Hints[i] = read.hints[i]
		}
		if read.of[i] != nil && !sameDefinitions(*list, read.of[i]) {
			*list, news = read.of[i], true
		}
	}
	c.Known = true
	return news
}

// lists are all that a remote has to list.
type lists struct {
	of      [4][]Definition          // in the order of kinds; nil is a list that could not be read
	headers map[string][]ParamHeader // of tools that have some
	hints   [4]CacheHint
}

// kind is one of the lists of the protocol.
type kind struct {
	method  string
	member  string // of the result
	one     string // in words
	key     string // the member that a definition is known by
	schema  bool   // a definition has an inputSchema
	offered func(Capabilities) bool
}

func (k *kind) many() string { return k.one + "s" }

var kinds = [len(lists{}.of)]kind{
	{"tools/list", "tools", "tool", "name", true, func(c Capabilities) bool { return c.Tools }},
	{"prompts/list", "prompts", "prompt", "name", false, func(c Capabilities) bool { return c.Prompts }},
	{"resources/list", "resources", "resource", "uri", false, func(c Capabilities) bool { return c.Resources }},
	{"resources/templates/list", "resourceTemplates", "template", "uriTemplate", false, func(c Capabilities) bool { return c.Resources }},
}

// readLists reads all lists that the remote declares to have. Without the tools
// there are none. What is wrong with another list costs that list alone, unless
// it concerns the whole connection: then the error is returned beside what has
// been read so far.
func (c *connection) readLists(ctx context.Context, l *link, loud bool) (*lists, error) {
	read := &lists{headers: map[string][]ParamHeader{}}
	for i := range kinds {
		k := &kinds[i]
		if !k.offered(l.offers) {
			// Nothing there is kept for as long as the remote is what it is.
			read.of[i], read.hints[i] = []Definition{}, CacheHint{time.Now().Add(maxTTL), true}
			continue
		}
		definitions, err := c.readList(ctx, l, k, loud, read.headers, &read.hints[i])
		switch {
		case err == nil:
			read.of[i] = c.remote.shared(i, definitions)
		case i == 0:
			return nil, err
		case isListsOwn(err):
			c.session.log.Warn("list left out", "remote", c.remote.Name, "list", k.many(), "error", err)
		default:
			return read, err
		}
	}
	return read, nil
}

// maxTTL bounds how long a list may be kept.
const maxTTL = 24 * time.Hour

// restrict takes in what one page of a list says; the least counts.
func (h *CacheHint) restrict(at time.Time, page json.RawMessage) {
	got, err := rawjson.Get(page, "ttlMs", "cacheScope")
	if err != nil {
		got = make([][]byte, 2)
	}
	ms, err := strconv.ParseUint(string(got[0]), 10, 63)
	if err != nil {
		ms = 0
	}
	if until := at.Add(time.Duration(min(ms, uint64(maxTTL/time.Millisecond))) * time.Millisecond); until.Before(h.Until) {
		h.Until = until
	}
	scope, _ := rawjson.String(got[1])
	h.Public = h.Public && scope == "public"
}

// isListsOwn reports whether a failure is one of that list, which other
// requests need not share.
func isListsOwn(err error) bool {
	failure, ok := errors.AsType[*Failure](err)
	if !ok {
		return false
	}
	switch failure.Kind {
	case KindBadAnswer, KindTooLarge, KindTimeout, KindStatus, KindCut:
		return true
	}
	return false
}

// shared returns the definitions as another principal has listed them, where
// they are the same: most see the same, and it is held once for all of them.
func (r *remote) shared(kind int, definitions []Definition) []Definition {
	if held := r.lists[kind].Load(); held != nil && sameDefinitions(*held, definitions) {
		return *held
	}
	r.lists[kind].Store(&definitions)
	return definitions
}

// readList reads all pages of one list.
func (c *connection) readList(ctx context.Context, l *link, k *kind, loud bool, headers map[string][]ParamHeader, hint *CacheHint) ([]Definition, error) {
	began := time.Now()
	*hint = CacheHint{began.Add(maxTTL), true}
	reader := listReader{connection: c, kind: k, definitions: []Definition{}, names: map[string]bool{}}
	if l.modern && k.schema {
		reader.headers = headers
	}
	cursors := map[string]bool{}
	params := json.RawMessage("{}")
	for page := 1; ; page++ {
		var result json.RawMessage
		err := c.wire.authorized(ctx, loud, func() (err error) {
			ctx, cancel := within(ctx, pageTimeout)
			defer cancel()
			result, _, err = l.request(ctx, c.ids.Add(1), k.method, params, nil)
			return err
		})
		if refusal, ok := errors.AsType[*ResponseError](err); ok {
			return nil, c.remote.fail(KindBadAnswer, refusal, "did not list its %s (JSON-RPC error %d). Ask its operator.", k.many(), refusal.Code)
		} else if err != nil {
			return nil, err
		}
		hint.restrict(began, result)
		cursor, err := reader.page(result)
		if err != nil {
			return nil, err
		}
		if cursor == nil {
			break
		}
		if cursors[string(cursor)] {
			// It would go round for ever; what has been listed is good.
			c.session.log.Warn("list ended: the remote gave the same cursor twice", "remote", c.remote.Name, "list", k.many(), "page", page)
			break
		}
		cursors[string(cursor)] = true
		if time.Since(began) > listTimeout {
			return nil, c.remote.fail(KindTimeout, nil, "did not list its %s within %s.", k.many(), plain(listTimeout))
		}
		if page == maxPages || len(cursor) > maxCursor {
			return nil, c.remote.fail(KindTooLarge, nil, "listed its %s on more than %d pages, or with cursors of more than %d bytes, which is not read.", k.many(), maxPages, maxCursor)
		}
		params = append(append(json.RawMessage(`{"cursor":`), cursor...), '}')
	}
	if more := reader.dropped - maxWarnings; more > 0 {
		c.session.log.Warn("more "+k.many()+" left out", "remote", c.remote.Name, "count", more)
	}
	return reader.definitions, nil
}

// listReader collects the definitions of a list.
type listReader struct {
	connection  *connection
	kind        *kind
	definitions []Definition
	names       map[string]bool
	headers     map[string][]ParamHeader // nil: arguments never go into headers here
	size        int
	seen        int
	dropped     int
}

// page adds one page and returns the cursor of the next, as JSON, or nil.
func (t *listReader) page(result json.RawMessage) (cursor json.RawMessage, err error) {
	r, many := t.connection.remote, t.kind.many()
	noList := fmt.Errorf("a list of %s that is none", many)
	values, err := rawjson.Get(result, t.kind.member, "nextCursor")
	if err != nil {
		return nil, r.badAnswer(fmt.Errorf("a member twice in its list of %s", many))
	}
	if values[0] == nil || values[0][0] != '[' {
		return nil, r.badAnswer(noList)
	}
	if t.size += len(result); t.size > maxListBytes {
		return nil, r.fail(KindTooLarge, nil, "listed more than %d MiB of %s, which is not read.", maxListBytes>>20, many)
	}
	definitions := json.NewDecoder(bytes.NewReader(values[0]))
	if _, err := definitions.Token(); err != nil {
		return nil, r.badAnswer(noList)
	}
	for definitions.More() {
		if t.seen++; t.seen > maxDefinitions {
			return nil, r.fail(KindTooLarge, nil, "listed more than %d %s, which is not read.", maxDefinitions, many)
		}
		var raw json.RawMessage
		if err := definitions.Decode(&raw); err != nil {
			return nil, r.badAnswer(noList)
		}
		t.add(raw)
	}
	// "Clients SHOULD treat a missing nextCursor as the end of results".
	if c := values[1]; c != nil && c[0] == '"' {
		return c, nil
	}
	return nil, nil
}

// add adds one definition, or drops it alone.
func (t *listReader) add(raw json.RawMessage) {
	d, problem := t.kind.read(raw)
	if problem == "" && t.names[d.Name] {
		problem = "the remote lists this " + t.kind.key + " twice; the first one counts"
	}
	if problem == "" && t.headers != nil {
		var headers []ParamHeader
		if headers, problem = ParamHeaders(d.Raw); headers != nil {
			t.headers[d.Name] = headers
		}
	}
	if problem == "" {
		t.names[d.Name] = true
		t.definitions = append(t.definitions, d)
		return
	}
	if t.dropped++; t.dropped <= maxWarnings {
		t.connection.session.log.Warn(t.kind.one+" left out", "remote", t.connection.remote.Name, t.kind.one, shown(d.Name), "reason", problem)
	}
}

// read checks as much of a definition as the gateway relies on. The bytes are
// valid JSON already.
func (k *kind) read(raw json.RawMessage) (d Definition, problem string) {
	if raw[0] != '{' {
		return Definition{}, "its definition is not an object"
	}
	values, err := rawjson.Get(raw, k.key, "inputSchema", "description")
	if err != nil {
		return Definition{}, "its definition has a member twice"
	}
	name, ok := rawjson.String(values[0])
	d = Definition{Name: name, Raw: raw}
	longest := maxToolName
	if k.key != "name" {
		longest = maxURI
	}
	switch {
	case !ok || name == "":
		return d, "it has no " + k.key
	case len(name) > longest:
		return d, "its " + k.key + " is too long"
	case k.schema && (values[1] == nil || values[1][0] != '{'):
		return d, "its inputSchema is not an object"
	case rawjson.Depth(raw) > maxDepth:
		return d, "its definition is nested too deep"
	}
	d.Description, _ = rawjson.String(values[2])
	return d, ""
}
