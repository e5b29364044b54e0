package gateway

import (
	"crypto/sha256"
	"encoding/hex"
	"slices"
	"strings"
)

const (
	// maxName is the least that the vendors' APIs take: 64 of [A-Za-z0-9_-].
	maxName = 64
	// ownPrefix is the prefix of the gateway's own tools; no remote may have it.
	ownPrefix = "gateway"
	// suffixLen is "_" and 6 hex digits.
	suffixLen = 7
)

// namer gives the tools of all remotes their names at the gateway. A name
// depends on the config and on the remote's own list alone, never on which
// other remotes happen to be up, so that a name that an agent has learned
// cannot change its meaning. Only remotes that the config gives the same
// prefix can still meet in a name; merge settles that in config order.
type namer struct {
	prefixes []string // sanitized, with the trailing "_"; "" for none; by the remote's index
}

// newNamer takes the remotes' prefixes in config order.
func newNamer(prefixes []string) *namer {
	n := &namer{prefixes: make([]string, len(prefixes))}
	for i, p := range prefixes {
		if p != "" {
			n.prefixes[i] = sanitize(p) + "_"
		}
	}
	return n
}

// names returns the gateway's names of one remote's tools, in their order.
func (n *namer) names(remote int, key string, tools []string) []string {
	// Two tools of one remote may become equal by sanitizing. The one that was
	// fine keeps its name; of those that were not, none does.
	count := make(map[string]int, len(tools))
	fine := make(map[string]bool, len(tools))
	for _, tool := range tools {
		clean := sanitize(tool)
		count[clean]++
		if clean == tool {
			fine[clean] = true
		}
	}
	out := make([]string, len(tools))
	for i, tool := range tools {
		clean := sanitize(tool)
		name := n.plain(remote, tool)
		clash := count[clean] > 1 && !(clean == tool && fine[clean])
		if clash || len(name) > maxName || !n.owns(remote, name) {
			name = withSuffix(name, key, tool)
		}
		out[i] = name
	}
	return out
}

// owners returns the indexes of the remotes that a name belongs to by their
// prefix: the longest one that fits, in config order where several have it. The
// gateway's own names and names that fit nobody have none.
func (n *namer) owners(name string) (owners []int) {
	if strings.HasPrefix(name, ownPrefix+"_") {
		return nil
	}
	longest := 0
	for i, p := range n.prefixes {
		switch {
		case !strings.HasPrefix(name, p) || len(p) < longest:
		case len(p) > longest:
			longest, owners = len(p), []int{i}
		default:
			owners = append(owners, i)
		}
	}
	return owners
}

// owns reports whether no other remote's prefix, nor the gateway's, claims name.
func (n *namer) owns(remote int, name string) bool {
	return slices.Contains(n.owners(name), remote)
}

// plain is the name of a remote's tool where nothing is in its way.
func (n *namer) plain(remote int, tool string) string { return n.prefixes[remote] + sanitize(tool) }

// withSuffix cuts a name and adds "_" and 6 hex digits of SHA-256(remote, NUL, tool).
func withSuffix(name, remote, tool string) string {
	sum := sha256.Sum256([]byte(remote + "\x00" + tool))
	return name[:min(len(name), maxName-suffixLen)] + "_" + hex.EncodeToString(sum[:3])
}

// sanitize replaces every character outside [A-Za-z0-9_-] by "_".
func sanitize(s string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9', r == '_', r == '-':
			return r
		}
		return '_'
	}, s)
}
