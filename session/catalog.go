package session

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"slices"
	"time"

	"gatehouse/session/rawjson"
)

// Bounds of one remote's list. Beyond them the list is refused as a whole:
// half of it would look like all of it.
const (
	maxPages     = 200
	maxListBytes = 64 << 20
	maxTools     = 100_000
	maxCursor    = 8 << 10
	maxToolName  = 512
	maxDepth     = 100 // of a definition; schemas in use have less than 30
	maxWarnings  = 20  // of single tools, for one list
)

// Catalog is what a remote has last listed for a principal.
type Catalog struct {
	Remote       string
	Generation   uint64 // another one: other tools
	Tools        []Tool // in the remote's order, never changed
	Known        bool   // the tools have been listed at least once
	Instructions string
}

// Tool is one definition.
type Tool struct {
	Name        string
	Raw         json.RawMessage // byte for byte; never changed
	Description string
}

func sameTools(a, b []Tool) bool {
	return slices.EqualFunc(a, b, func(x, y Tool) bool { return bytes.Equal(x.Raw, y.Raw) })
}

// readTools lists all pages.
func (c *connection) readTools(ctx context.Context, l *link, loud bool) ([]Tool, error) {
	if !l.tools {
		return nil, nil
	}
	began := time.Now()
	reader := toolReader{connection: c, names: map[string]bool{}}
	cursors := map[string]bool{}
	params := json.RawMessage("{}")
	for page := 1; ; page++ {
		var result json.RawMessage
		err := c.wire.authorized(ctx, loud, func() (err error) {
			ctx, cancel := within(ctx, pageTimeout)
			defer cancel()
			result, _, err = c.wire.request(ctx, l.header, c.ids.Add(1), "tools/list", params, c.incoming(l, nil))
			return err
		})
		if refusal, ok := errors.AsType[*ResponseError](err); ok {
			return nil, c.remote.fail(KindBadAnswer, refusal, "did not list its tools (JSON-RPC error %d). Ask its operator.", refusal.Code)
		} else if err != nil {
			return nil, err
		}
		cursor, err := reader.page(result)
		if err != nil {
			return nil, err
		}
		if cursor == nil {
			break
		}
		if cursors[string(cursor)] {
			// It would go round for ever; what has been listed is good.
			c.session.log.Warn("list ended: the remote gave the same cursor twice", "remote", c.remote.Name, "page", page)
			break
		}
		cursors[string(cursor)] = true
		if time.Since(began) > listTimeout {
			return nil, c.remote.fail(KindTimeout, nil, "did not list its tools within %s.", plain(listTimeout))
		}
		if page == maxPages || len(cursor) > maxCursor {
			return nil, c.remote.fail(KindTooLarge, nil, "listed its tools on more than %d pages, or with cursors of more than %d bytes, which is not read.", maxPages, maxCursor)
		}
		params = append(append(json.RawMessage(`{"cursor":`), cursor...), '}')
	}
	if more := reader.dropped - maxWarnings; more > 0 {
		c.session.log.Warn("more tools left out", "remote", c.remote.Name, "count", more)
	}
	return reader.tools, nil
}

// toolReader collects the tools of a list.
type toolReader struct {
	connection *connection
	tools      []Tool
	names      map[string]bool
	size       int
	seen       int
	dropped    int
}

// page adds one page and returns the cursor of the next, as JSON, or nil.
func (t *toolReader) page(result json.RawMessage) (cursor json.RawMessage, err error) {
	r := t.connection.remote
	values, err := rawjson.Get(result, "tools", "nextCursor")
	if err != nil {
		return nil, r.badAnswer(errors.New("a member twice in its list of tools"))
	}
	if values[0] == nil || values[0][0] != '[' {
		return nil, r.badAnswer(errors.New("a list of tools that is none"))
	}
	if t.size += len(result); t.size > maxListBytes {
		return nil, r.fail(KindTooLarge, nil, "listed more than %d MiB of tools, which is not read.", maxListBytes>>20)
	}
	definitions := json.NewDecoder(bytes.NewReader(values[0]))
	if _, err := definitions.Token(); err != nil {
		return nil, r.badAnswer(errors.New("a list of tools that is none"))
	}
	for definitions.More() {
		if t.seen++; t.seen > maxTools {
			return nil, r.fail(KindTooLarge, nil, "listed more than %d tools, which is not read.", maxTools)
		}
		var raw json.RawMessage
		if err := definitions.Decode(&raw); err != nil {
			return nil, r.badAnswer(errors.New("a list of tools that is none"))
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
func (t *toolReader) add(raw json.RawMessage) {
	tool, problem := readTool(raw)
	if problem == "" && t.names[tool.Name] {
		problem = "the remote lists this name twice; the first one counts"
	}
	if problem == "" {
		t.names[tool.Name] = true
		t.tools = append(t.tools, tool)
		return
	}
	if t.dropped++; t.dropped <= maxWarnings {
		t.connection.session.log.Warn("tool left out", "remote", t.connection.remote.Name, "tool", shown(tool.Name), "reason", problem)
	}
}

// readTool checks as much of a definition as the gateway relies on. The bytes
// are valid JSON already.
func readTool(raw json.RawMessage) (t Tool, problem string) {
	if raw[0] != '{' {
		return Tool{}, "its definition is not an object"
	}
	values, err := rawjson.Get(raw, "name", "inputSchema", "description")
	if err != nil {
		return Tool{}, "its definition has a member twice"
	}
	name, ok := rawjson.String(values[0])
	t = Tool{Name: name, Raw: raw}
	switch {
	case !ok || name == "":
		return t, "it has no name"
	case len(name) > maxToolName:
		return t, "its name is too long"
	case values[1] == nil || values[1][0] != '{':
		return t, "its inputSchema is not an object"
	case rawjson.Depth(raw) > maxDepth:
		return t, "its definition is nested too deep"
	}
	t.Description, _ = rawjson.String(values[2])
	return t, ""
}
