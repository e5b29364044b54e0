package gateway

import (
	"bytes"
	"encoding/json"
	"sync"

	"gatehouse/session/rawjson"
)

// Of the resources that the results of one remote have named so many are
// remembered, with URIs of so many bytes. A remote that names more forgets its own
// only.
const (
	maxLinked    = 500
	maxLinkedURI = 8 << 10
)

// linked knows which remote has named a resource in a result. Such a link "is not
// guaranteed to appear in the results of a resources/list request" (MCP, tools),
// and no other remote is to see it, let alone to answer for it.
type linked struct {
	mu     sync.Mutex          // guards what follows
	remote map[string]string   // by URI; the first that named it
	uris   map[string][]string // by remote, the oldest first
}

// note remembers the resources that the content of a result names.
func (l *linked) note(remote string, result json.RawMessage) {
	if !bytes.Contains(result, []byte(`"uri"`)) {
		return
	}
	type content struct {
		Type, URI string
		Resource  struct{ URI string }
	}
	got, err := rawjson.Get(result, "content", "messages")
	if err != nil {
		return
	}
	var contents []content
	if got[0] != nil {
		// Of a tool. What is not as expected names nothing.
		_ = json.Unmarshal(got[0], &contents)
	}
	if got[1] != nil {
		var messages []struct{ Content content } // of a prompt
		_ = json.Unmarshal(got[1], &messages)
		for _, m := range messages {
			contents = append(contents, m.Content)
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range contents {
		switch c.Type {
		case "resource_link":
			l.noteLocked(remote, c.URI)
		case "resource":
			l.noteLocked(remote, c.Resource.URI)
		}
	}
}

func (l *linked) noteLocked(remote, uri string) {
	if _, ok := l.remote[uri]; ok || uri == "" || len(uri) > maxLinkedURI {
		return
	}
	if l.remote == nil {
		l.remote, l.uris = map[string]string{}, map[string][]string{}
	}
	uris := l.uris[remote]
	if len(uris) == maxLinked {
		delete(l.remote, uris[0])
		uris = uris[1:]
	}
	l.remote[uri] = remote
	l.uris[remote] = append(uris, uri)
}

// by returns the remote that has named a resource.
func (l *linked) by(uri string) (remote string, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	remote, ok = l.remote[uri]
	return remote, ok
}
