// Package rawjson reads and changes single members of a JSON object without
// touching a byte of the rest: what a remote sends reaches the client with
// its number literals, its unknown members and its order as they were.
//
// The functions find their way by the structure alone. They never read past
// the data and refuse what is not an object, but they do not validate inner
// values; where the data is foreign, call [encoding/json.Valid] once before.
package rawjson

import (
	"encoding/json"
	"errors"
	"fmt"
)

var (
	// ErrSyntax: the data is not a JSON object.
	ErrSyntax = errors.New("not a JSON object")
	// ErrDuplicate: a member that was asked for occurs twice.
	ErrDuplicate = errors.New("duplicate member")
)

// Member is one member of an object; data[Start:End] is its value.
type Member struct {
	Key        string // decoded
	KeyStart   int    // of the key's opening quote
	Start, End int
}

// Each calls f for every member of the object in data, in order, until f
// returns false.
func Each(data []byte, f func(Member) bool) error {
	i := skipSpace(data, 0)
	if i >= len(data) || data[i] != '{' {
		return ErrSyntax
	}
	i = skipSpace(data, i+1)
	if i < len(data) && data[i] == '}' {
		return end(data, i+1)
	}
	for {
		keyStart := i
		keyEnd, err := skipString(data, i)
		if err != nil {
			return err
		}
		key, err := decodeString(data[i:keyEnd])
		if err != nil {
			return err
		}
		i = skipSpace(data, keyEnd)
		if i >= len(data) || data[i] != ':' {
			return ErrSyntax
		}
		start := skipSpace(data, i+1)
		stop, err := skipValue(data, start)
		if err != nil {
			return err
		}
		if !f(Member{key, keyStart, start, stop}) {
			return nil
		}
		i = skipSpace(data, stop)
		switch {
		case i < len(data) && data[i] == ',':
			i = skipSpace(data, i+1)
		case i < len(data) && data[i] == '}':
			return end(data, i+1)
		default:
			return ErrSyntax
		}
	}
}

// Get returns the values of the named members, nil for those that are absent.
// A named member that occurs twice is an error: two readers could disagree on
// which one counts.
func Get(data []byte, keys ...string) ([][]byte, error) {
	values := make([][]byte, len(keys))
	var duplicate error
	err := Each(data, func(m Member) bool {
		for k, key := range keys {
			if m.Key == key {
				if values[k] != nil {
					duplicate = fmt.Errorf("%w: %q", ErrDuplicate, key)
					return false
				}
				values[k] = data[m.Start:m.End:m.End]
			}
		}
		return true
	})
	return values, errors.Join(err, duplicate)
}

// Set returns a copy of the object with the value of one member replaced, or
// the member appended where it was absent.
func Set(data []byte, key string, value []byte) ([]byte, error) {
	start, stop, last := -1, -1, -1
	count := 0
	err := Each(data, func(m Member) bool {
		if m.Key == key {
			start, stop = m.Start, m.End
			count++
		}
		last = m.End
		return true
	})
	switch {
	case err != nil:
		return nil, err
	case count > 1:
		return nil, fmt.Errorf("%w: %q", ErrDuplicate, key)
	case count == 1:
		out := make([]byte, 0, len(data)-(stop-start)+len(value))
		out = append(out, data[:start]...)
		out = append(out, value...)
		return append(out, data[stop:]...), nil
	}
	name, err := json.Marshal(key)
	if err != nil {
		return nil, fmt.Errorf("encoding a member's name: %w", err)
	}
	out := make([]byte, 0, len(data)+len(name)+len(value)+2)
	if last < 0 { // an empty object
		out = append(append(append(out, '{'), name...), ':')
		return append(append(out, value...), '}'), nil
	}
	out = append(append(out, data[:last]...), ',')
	out = append(append(out, name...), ':')
	out = append(out, value...)
	return append(out, data[last:]...), nil
}

// Delete returns a copy of the object without the members that match, or the
// object itself where none does.
func Delete(data []byte, match func(key string) bool) ([]byte, error) {
	var out []byte
	kept, found := 0, false
	err := Each(data, func(m Member) bool {
		if match(m.Key) {
			found = true
			return true
		}
		if kept > 0 {
			out = append(out, ',')
		}
		kept++
		out = append(out, data[m.KeyStart:m.End]...)
		return true
	})
	if err != nil || !found {
		return data, err
	}
	return append(append([]byte{'{'}, out...), '}'), nil
}

// String decodes a JSON string; ok is false for any other value.
func String(value []byte) (s string, ok bool) {
	if len(value) < 2 || value[0] != '"' {
		return "", false
	}
	s, err := decodeString(value)
	return s, err == nil
}

// Depth returns how deep arrays and objects are nested in data; a scalar is 0.
func Depth(data []byte) int {
	depth, deepest := 0, 0
	for i := 0; i < len(data); i++ {
		switch data[i] {
		case '"':
			stop, err := skipString(data, i)
			if err != nil {
				return deepest
			}
			i = stop - 1
		case '{', '[':
			depth++
			deepest = max(deepest, depth)
		case '}', ']':
			depth--
		}
	}
	return deepest
}

func end(data []byte, i int) error {
	if skipSpace(data, i) != len(data) {
		return ErrSyntax
	}
	return nil
}

func skipSpace(data []byte, i int) int {
	for i < len(data) && (data[i] == ' ' || data[i] == '\t' || data[i] == '\n' || data[i] == '\r') {
		i++
	}
	return i
}

// skipString returns the index after the string that begins at i.
func skipString(data []byte, i int) (int, error) {
	if i >= len(data) || data[i] != '"' {
		return 0, ErrSyntax
	}
	for i++; i < len(data); i++ {
		switch data[i] {
		case '\\':
			i++
		case '"':
			return i + 1, nil
		}
	}
	return 0, ErrSyntax
}

// skipValue returns the index after the value that begins at i.
func skipValue(data []byte, i int) (int, error) {
	if i >= len(data) {
		return 0, ErrSyntax
	}
	switch data[i] {
	case '"':
		return skipString(data, i)
	case '{', '[':
		for depth := 0; i < len(data); i++ {
			switch data[i] {
			case '"':
				stop, err := skipString(data, i)
				if err != nil {
					return 0, err
				}
				i = stop - 1
			case '{', '[':
				depth++
			case '}', ']':
				if depth--; depth == 0 {
					return i + 1, nil
				}
			}
		}
		return 0, ErrSyntax
	}
	start := i
	for i < len(data) && isScalar(data[i]) {
		i++
	}
	if i == start {
		return 0, ErrSyntax
	}
	return i, nil
}

func isScalar(c byte) bool {
	return c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c == 'E' || c == '+' || c == '-' || c == '.'
}

func decodeString(quoted []byte) (string, error) {
	inner := quoted[1 : len(quoted)-1]
	for _, c := range inner {
		if c == '\\' || c < ' ' || c >= 0x80 {
			var s string
			if err := json.Unmarshal(quoted, &s); err != nil {
				return "", ErrSyntax
			}
			return s, nil
		}
	}
	return string(inner), nil
}
