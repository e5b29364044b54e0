package gateway

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"path"
	"slices"
	"strings"

	"gatehouse/session"
	"gatehouse/session/rawjson"
)

// merged is all catalogs of one principal as one: what tools/list shows and
// where a call goes. It is immutable.
type merged struct {
	key   []uint64 // the catalogs' generations that it was made of
	tools []tool   // remotes in config order, the gateway's own last
	index map[string]int
	list  json.RawMessage // the tools array of tools/list
}

// tool is one entry of the merged list.
type tool struct {
	name        string // at the gateway
	remote      string // "" for the gateway's own
	original    string // the remote's name of it
	description string
	def         json.RawMessage // the definition under the gateway's name
}

func (m *merged) lookup(name string) (tool, bool) {
	i, ok := m.index[name]
	if !ok {
		return tool{}, false
	}
	return m.tools[i], true
}

// generations is the key by which a merged list is known to be current.
func generations(catalogs []session.Catalog) []uint64 {
	key := make([]uint64, len(catalogs))
	for i, c := range catalogs {
		key[i] = c.Generation
	}
	return key
}

// merge puts the catalogs, which are in config order, into one. What cannot be
// listed is left out with a warning, never the rest with it.
func merge(catalogs []session.Catalog, names *namer, filters map[string]toolFilter, log *slog.Logger) *merged {
	m := &merged{key: generations(catalogs), index: map[string]int{}}
	for i, c := range catalogs {
		allowed := slices.DeleteFunc(slices.Clone(c.Tools), func(t session.Tool) bool {
			return !filters[c.Remote].permits(t.Name)
		})
		originals := make([]string, len(allowed))
		for j, t := range allowed {
			originals[j] = t.Name
		}
		for j, name := range names.names(i, c.Remote, originals) {
			t := allowed[j]
			if _, taken := m.index[name]; taken {
				name = withSuffix(name, c.Remote, t.Name)
			}
			if _, taken := m.index[name]; taken {
				log.Warn("tool left out: its name is taken", "remote", c.Remote, "tool", t.Name, "name", name)
				continue
			}
			def, err := rename(t.Raw, name)
			if err != nil {
				log.Warn("tool left out: its definition cannot be read", "remote", c.Remote, "tool", t.Name, "error", err)
				continue
			}
			m.add(tool{name: name, remote: c.Remote, original: t.Name, description: t.Description, def: def})
		}
	}
	for _, t := range ownTools {
		m.add(t)
	}
	size := 2
	for _, t := range m.tools {
		size += len(t.def) + 1
	}
	m.list = append(make(json.RawMessage, 0, size), '[')
	for i, t := range m.tools {
		if i > 0 {
			m.list = append(m.list, ',')
		}
		m.list = append(m.list, t.def...)
	}
	m.list = append(m.list, ']')
	return m
}

func (m *merged) add(t tool) {
	m.index[t.name] = len(m.tools)
	m.tools = append(m.tools, t)
}

// rename replaces the name in a definition or in the params of a call.
func rename(raw json.RawMessage, name string) (json.RawMessage, error) {
	quoted, err := json.Marshal(name)
	if err != nil {
		return nil, fmt.Errorf("encoding the name: %w", err)
	}
	out, err := rawjson.Set(raw, "name", quoted)
	if err != nil {
		return nil, fmt.Errorf("replacing the name: %w", err)
	}
	return out, nil
}

// toolFilter is a remote's "tools" option; the patterns are globs over the
// remote's own names.
type toolFilter struct{ allow, deny []string }

// permits reports whether the tool may be listed and called. A deny wins.
func (f toolFilter) permits(name string) bool {
	matches := func(pattern string) bool {
		// path.Match stops at a slash; "*" here means every name.
		ok, err := path.Match(strings.ReplaceAll(pattern, "/", "\x00"), strings.ReplaceAll(name, "/", "\x00"))
		return ok && err == nil // patterns are checked when the config is read
	}
	if slices.ContainsFunc(f.deny, matches) {
		return false
	}
	return len(f.allow) == 0 || slices.ContainsFunc(f.allow, matches)
}
