package gateway

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"path"
	"slices"
	"strings"
	"sync"

	"gatehouse/session"
	"gatehouse/session/rawjson"
)

// merged is all catalogs of one principal as one: what the lists show and where
// a request goes. It is immutable.
type merged struct {
	key       []uint64 // the catalogs' generations that it was made of
	changes   uint64   // and how many changes the view had heard of then
	tools     entries  // remotes in config order, the gateway's own last
	prompts   entries
	resources entries // by URI
	templates entries // by URI template
}

// entries is one list: the definitions, and where to find them.
type entries struct {
	all   []entry
	index map[string]int
	list  json.RawMessage // the array of the list's result

	renamed []entry // those of all whose plain name was taken, or too long
	leftOut []entry // what is not in the list, its definition being empty
}

// entry is one definition of a merged list.
type entry struct {
	name        string // at the gateway
	remote      string // "" for the gateway's own
	original    string // the remote's name of it
	description string
	def         json.RawMessage       // the definition under the gateway's name
	headers     []session.ParamHeader // arguments of a tool that modern clients send in headers, too
}

func (l *entries) lookup(name string) (entry, bool) {
	i, ok := l.index[name]
	if !ok {
		return entry{}, false
	}
	return l.all[i], true
}

func (l *entries) add(e entry) {
	if l.index == nil {
		l.index = map[string]int{}
	}
	l.index[e.name] = len(l.all)
	l.all = append(l.all, e)
}

// seal writes the list.
func (l *entries) seal() {
	size := 2
	for _, e := range l.all {
		size += len(e.def) + 1
	}
	l.list = append(make(json.RawMessage, 0, size), '[')
	for i, e := range l.all {
		if i > 0 {
			l.list = append(l.list, ',')
		}
		l.list = append(l.list, e.def...)
	}
	l.list = append(l.list, ']')
}

// mergedBefore is what was merged lately, and of which lists.
type mergedBefore struct {
	mu   sync.Mutex // guards last
	last []mergedOf // the newest first
}

type mergedOf struct {
	lists [][]session.Definition
	m     *merged
}

// maxMerged bounds what is remembered: before and after the sign-ins that most
// principals have is not many.
const maxMerged = 8

// merged is merge, but for principals whose remotes list the same, which the
// session room holds once, what it makes is held once, too.
func (g *Gateway) merged(catalogs []session.Catalog) *merged {
	lists := make([][]session.Definition, 0, 4*len(catalogs))
	for _, c := range catalogs {
		lists = append(lists, c.Tools, c.Prompts, c.Resources, c.Templates)
	}
	same := func(a, b []session.Definition) bool {
		return len(a) == len(b) && (len(a) == 0 || &a[0] == &b[0])
	}
	before := &g.before
	before.mu.Lock()
	defer before.mu.Unlock()
	for _, known := range before.last {
		if slices.EqualFunc(known.lists, lists, same) {
			m := *known.m
			m.key = generations(catalogs)
			return &m
		}
	}
	m := merge(catalogs, g.names, g.filters, g.log)
	before.last = slices.Insert(before.last[:min(len(before.last), maxMerged-1)], 0, mergedOf{lists, m})
	own := *m // whoever gets it notes in it what it is current for
	return &own
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
	m := &merged{key: generations(catalogs)}
	for i, c := range catalogs {
		allowed := slices.DeleteFunc(slices.Clone(c.Tools), func(t session.Definition) bool {
			return !filters[c.Remote].permits(t.Name)
		})
		m.tools.addNamed("tool", i, c.Remote, allowed, names, log)
		m.prompts.addNamed("prompt", i, c.Remote, c.Prompts, names, log)
		m.resources.addURIs("resource", "uri", c.Remote, c.Resources, log)
		m.templates.addURIs("template", "uriTemplate", c.Remote, c.Templates, log)
	}
	for _, t := range ownTools {
		m.tools.add(t)
	}
	m.resources.add(entry{name: statusURI, original: statusURI, def: statusResource})
	for _, l := range []*entries{&m.tools, &m.prompts, &m.resources, &m.templates} {
		l.seal()
	}
	return m
}

// addNamed adds what is known by a name: tools and prompts.
func (l *entries) addNamed(what string, remote int, key string, definitions []session.Definition, names *namer, log *slog.Logger) {
	originals := make([]string, len(definitions))
	for j, d := range definitions {
		originals[j] = d.Name
	}
	for j, name := range names.names(remote, key, originals) {
		d := definitions[j]
		if _, taken := l.index[name]; taken {
			name = withSuffix(name, key, d.Name)
		}
		e := entry{name: name, remote: key, original: d.Name, description: d.Description}
		if _, taken := l.index[name]; taken {
			l.leftOut = append(l.leftOut, e)
			log.Warn(what+" left out: its name is taken", "remote", key, what, d.Name, "name", name)
			continue
		}
		def, err := rename(d.Raw, name)
		if err != nil {
			l.leftOut = append(l.leftOut, e)
			log.Warn(what+" left out: its definition cannot be read", "remote", key, what, d.Name, "error", err)
			continue
		}
		// What is wrong with the annotations of a legacy remote's tool is for its
		// clients to see.
		e.headers, _ = session.ParamHeaders(d.Raw)
		e.def = def
		l.add(e)
		if name != names.plain(remote, d.Name) {
			l.renamed = append(l.renamed, e)
		}
	}
}

// addURIs adds what is known by a URI or a URI template. These stay as they
// are; where two remotes have the same, the first in config order keeps it and
// the other's says whose it is.
func (l *entries) addURIs(what, member, remote string, definitions []session.Definition, log *slog.Logger) {
	for _, d := range definitions {
		uri, def := d.Name, d.Raw
		if _, taken := l.index[uri]; taken || uri == statusURI {
			uri = qualify(remote, uri)
			quoted, err := json.Marshal(uri)
			if err == nil {
				def, err = rawjson.Set(def, member, quoted)
			}
			if _, again := l.index[uri]; err != nil || again {
				log.Warn(what+" left out: its URI is taken", "remote", remote)
				continue
			}
		}
		l.add(entry{name: uri, remote: remote, original: d.Name, description: d.Description, def: def})
	}
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
