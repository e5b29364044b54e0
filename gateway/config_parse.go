package gateway

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
	"slices"
	"strings"

	"github.com/tailscale/hujson"
)

// This file reads JWCC (JSON with comments and trailing commas) into tagged
// structs and notes where everything was, so that each problem has its line.
// It knows nothing of what the settings mean; config.go does.

// Problem is one thing that is wrong with a config.
type Problem struct {
	Line, Column int    // from 1
	Path         string // such as mcpServers.notes.url
	Say          string // what is wrong and what to do; never a secret's value
}

// ConfigError is all that is wrong with a config.
type ConfigError struct {
	File     string
	Problems []Problem // in the file's order
}

func (e *ConfigError) Error() string {
	lines := make([]string, len(e.Problems))
	for i, p := range e.Problems {
		where := ""
		if p.Path != "" {
			where = p.Path + ": "
		}
		lines[i] = fmt.Sprintf("%s:%d:%d: %s%s", e.File, p.Line, p.Column, where, p.Say)
	}
	return "the config has " + plural(len(lines), "problem") + "\n  " + strings.Join(lines, "\n  ")
}

// Note is a remark on a config that is no reason to refuse it.
type Note struct {
	Line      int
	Path, Say string
}

// reader decodes one file and collects what is wrong with it.
type reader struct {
	data     []byte
	getenv   func(string) (string, bool)
	offsets  map[string]int // of every value that was read, by path
	problems []Problem
	notes    []Note
	lenient  bool // unset variables are notes: the part that is being read does not run
	unset    int  // how many of those there were
}

func (r *reader) position(offset int) (line, column int) {
	before := r.data[:min(max(offset, 0), len(r.data))]
	line = 1 + strings.Count(string(before), "\n")
	return line, 1 + len(before) - (strings.LastIndex(string(before), "\n") + 1)
}

// problem notes what is wrong at a path, or at the closest one above it that
// stands in the file. Of a value that could not even be read, nothing more is
// said.
func (r *reader) problem(path, format string, args ...any) {
	if slices.ContainsFunc(r.problems, func(p Problem) bool { return p.Path == path }) {
		return
	}
	r.problemAt(r.offset(path), path, format, args...)
}

func (r *reader) problemAt(offset int, path, format string, args ...any) {
	line, column := r.position(offset)
	r.problems = append(r.problems, Problem{line, column, path, fmt.Sprintf(format, args...)})
}

func (r *reader) note(path, format string, args ...any) {
	line, _ := r.position(r.offset(path))
	r.notes = append(r.notes, Note{line, path, fmt.Sprintf(format, args...)})
}

func (r *reader) offset(path string) int {
	for {
		if at, ok := r.offsets[path]; ok {
			return at
		}
		i := strings.LastIndexByte(path, '.')
		if i < 0 {
			return 0
		}
		path = path[:i]
	}
}

// err is all problems as one error, nil if there are none.
func (r *reader) err(file string) error {
	if len(r.problems) == 0 {
		return nil
	}
	slices.SortStableFunc(r.problems, func(a, b Problem) int {
		if a.Line != b.Line {
			return a.Line - b.Line
		}
		return a.Column - b.Column
	})
	return &ConfigError{file, r.problems}
}

// maxNesting keeps a hostile file from exhausting the parser's stack.
const maxNesting = 100

// parse reads the file's syntax.
func (r *reader) parse() (value, bool) {
	// Some editors begin a file with a byte order mark. Blanks in its place keep
	// every offset.
	if bytes.HasPrefix(r.data, []byte("\xef\xbb\xbf")) {
		r.data = append([]byte("   "), r.data[3:]...)
	}
	shape := outline(r.data)
	if shape.deepest > maxNesting {
		r.problemAt(0, "", "nested more than %d deep", maxNesting)
		return value{}, false
	}
	// The library wants a line break behind a comment at the very end.
	root, err := hujson.Parse(append(slices.Clip(r.data), '\n'))
	switch {
	case err != nil && shape.empty:
		r.problemAt(0, "", `is empty: write {"mcpServers": {"notes": {"url": "https://notes.example.com/mcp"}}}`)
		return value{}, false
	case err != nil && shape.open != "" && errors.Is(err, io.ErrUnexpectedEOF):
		r.problemAt(shape.at, "", "not valid JSON: the %s that begins here has no end", shape.open)
		return value{}, false
	}
	if err != nil {
		// The library says "hujson: line 3, column 7: …".
		line, column, say := 1, 1, err.Error()
		if n, _ := fmt.Sscanf(say, "hujson: line %d, column %d:", &line, &column); n == 2 {
			_, say, _ = strings.Cut(say, ": ")
			_, say, _ = strings.Cut(say, ": ")
		}
		// It goes on with the literal itself, which may be somebody's password.
		if strings.HasPrefix(say, "invalid literal") {
			say = `this is no value: a text stands in double quotes, and in it \ only before "\/bfnrtu`
		}
		r.problems = append(r.problems, Problem{line, column, "", "not valid JSON: " + say})
		return value{}, false
	}
	return root, true
}

// shape is what can be said of a file without parsing it.
type shape struct {
	deepest int    // how deep objects and lists are nested
	empty   bool   // there is nothing but blanks and comments
	open    string // what has begun and not ended, the innermost; empty: nothing
	at      int    // where that began
}

// outline looks at nothing but brackets, texts and comments.
func outline(data []byte) shape {
	s := shape{empty: true}
	var began []int
	for i := 0; i < len(data); i++ {
		switch c := data[i]; {
		case c == '"':
			s.empty, s.at = false, i
			for i++; i < len(data) && data[i] != '"'; i++ {
				if data[i] == '\\' {
					i++
				}
			}
			if i >= len(data) {
				s.open = "text"
				return s
			}
		case bytes.HasPrefix(data[i:], []byte("//")), bytes.HasPrefix(data[i:], []byte("/*")):
			end := "\n"
			if data[i+1] == '*' {
				end = "*/"
			}
			n := bytes.Index(data[i+2:], []byte(end))
			switch {
			case n < 0 && end == "*/":
				s.empty, s.open, s.at = false, "comment", i
				return s
			case n < 0:
				n = len(data)
			}
			i += 1 + n + len(end)
		case c == '{' || c == '[':
			s.empty = false
			began = append(began, i)
			s.deepest = max(s.deepest, len(began))
		case c == '}' || c == ']':
			began = began[:max(len(began)-1, 0)]
		case c != ' ' && c != '\t' && c != '\r' && c != '\n':
			s.empty = false
		}
	}
	if n := len(began); n > 0 {
		s.open, s.at = string(data[began[n-1]]), began[n-1]
	}
	return s
}

// given reports whether the file has a value at path.
func (r *reader) given(path string) bool {
	_, ok := r.offsets[path]
	return ok
}

// members returns an object's members in order; a key that occurs twice is a
// problem, and its first occurrence counts.
func (r *reader) members(v value, path string) ([]hujson.ObjectMember, bool) {
	object, ok := v.Value.(*hujson.Object)
	if !ok {
		r.problemAt(v.StartOffset, path, "must be an object {…}, not %s", kindOf(v))
		return nil, false
	}
	first := map[string]int{}
	var members []hujson.ObjectMember
	for _, m := range object.Members {
		name := nameOf(m)
		if at, twice := first[name]; twice {
			line, _ := r.position(at)
			r.problemAt(m.Name.StartOffset, join(path, name), "is there twice: first in line %d", line)
			continue
		}
		first[name] = m.Name.StartOffset
		members = append(members, m)
	}
	return members, true
}

func nameOf(m hujson.ObjectMember) string { return m.Name.Value.(hujson.Literal).String() }

func join(path, name string) string {
	if path == "" {
		return name
	}
	return path + "." + name
}

// decode reads v into the Go value dst. A key that dst has no field for goes
// to unknown, or is a problem where that is nil.
func (r *reader) decode(v value, path string, dst reflect.Value, unknown func(path, name string)) {
	r.offsets[path] = v.StartOffset
	literal, isLiteral := v.Value.(hujson.Literal)
	if isLiteral && literal.Kind() == 'n' {
		r.problemAt(v.StartOffset, path, "must be %s, not null: leave it out instead", wanted(dst.Type()))
		return
	}
	switch dst.Kind() {
	case reflect.Pointer:
		dst.Set(reflect.New(dst.Type().Elem()))
		r.decode(v, path, dst.Elem(), unknown)
		return
	case reflect.Struct:
		r.decodeStruct(v, path, dst, unknown)
		return
	case reflect.Map:
		members, ok := r.members(v, path)
		if !ok {
			return
		}
		dst.Set(reflect.MakeMap(dst.Type()))
		for _, m := range members {
			value := reflect.New(dst.Type().Elem()).Elem()
			r.decode(m.Value, join(path, nameOf(m)), value, nil)
			dst.SetMapIndex(reflect.ValueOf(nameOf(m)), value)
		}
		return
	case reflect.Slice:
		array, ok := v.Value.(*hujson.Array)
		if !ok {
			break
		}
		dst.Set(reflect.MakeSlice(dst.Type(), len(array.Elements), len(array.Elements)))
		for i, element := range array.Elements {
			r.decode(element, join(path, fmt.Sprint(i)), dst.Index(i), nil)
		}
		return
	case reflect.String:
		if isLiteral && literal.Kind() == '"' {
			dst.SetString(r.expand(path, literal.String()))
			return
		}
	case reflect.Bool:
		if isLiteral && (literal.Kind() == 't' || literal.Kind() == 'f') {
			dst.SetBool(literal.Bool())
			return
		}
	case reflect.Int, reflect.Int64:
		var n int64
		if isLiteral && literal.Kind() == '0' && json.Unmarshal(literal, &n) == nil {
			dst.SetInt(n)
			return
		}
	}
	r.problemAt(v.StartOffset, path, "must be %s, not %s", wanted(dst.Type()), kindOf(v))
}

func (r *reader) decodeStruct(v value, path string, dst reflect.Value, unknown func(path, name string)) {
	members, ok := r.members(v, path)
	if !ok {
		return
	}
	var keys []string
	fields := map[string]int{}
	for i := range dst.NumField() {
		key := dst.Type().Field(i).Tag.Get("json")
		keys = append(keys, key)
		fields[key] = i
	}
	for _, m := range members {
		name := nameOf(m)
		at := join(path, name)
		i, known := fields[name]
		switch {
		case !known && unknown != nil:
			r.offsets[at] = m.Name.StartOffset
			unknown(at, name)
		case !known:
			r.problemAt(m.Name.StartOffset, at, "unknown key%s", didYouMean(name, keys))
		default:
			r.decode(m.Value, at, dst.Field(i), nil)
		}
	}
}

// expand replaces ${VAR}, ${VAR:-default} and ${env:VAR}. What a variable
// holds is not expanded again and appears in no problem.
func (r *reader) expand(path, s string) string {
	var out strings.Builder
	for {
		before, rest, found := strings.Cut(s, "${")
		out.WriteString(before)
		if !found {
			return out.String()
		}
		inner, after, closed := strings.Cut(rest, "}")
		name, fallback, hasFallback := strings.Cut(inner, ":-")
		name = strings.TrimPrefix(name, "env:")
		if !closed || !isVariable(name) {
			out.WriteString("${") // not of our form: it stays as it is
			s = rest
			continue
		}
		value, set := r.getenv(name)
		switch {
		case set && (value != "" || !hasFallback):
			out.WriteString(value)
		case hasFallback:
			out.WriteString(fallback)
		case r.lenient:
			r.unset++
			r.note(path, "the environment variable %s is not set", name)
		default:
			// Not by problem: the next one in the same text counts too.
			r.problemAt(r.offset(path), path, "the environment variable %s is not set: set it, or write ${%s:-default}", name, name)
		}
		s = after
	}
}

func isVariable(name string) bool {
	for i, c := range name {
		letter := c == '_' || c >= 'A' && c <= 'Z' || c >= 'a' && c <= 'z'
		if !letter && (i == 0 || c < '0' || c > '9') {
			return false
		}
	}
	return name != ""
}

func wanted(t reflect.Type) string {
	switch t.Kind() {
	case reflect.Pointer:
		return wanted(t.Elem())
	case reflect.Struct, reflect.Map:
		return "an object {…}"
	case reflect.Slice:
		return "a list […]"
	case reflect.Bool:
		return "true or false"
	case reflect.Int, reflect.Int64:
		return "a whole number"
	}
	return `a text "…"`
}

func kindOf(v value) string {
	switch v.Value.Kind() {
	case '{':
		return "an object"
	case '[':
		return "a list"
	case '"':
		return "a text"
	case '0':
		return "a number"
	case 'n':
		return "null"
	}
	return "true or false"
}

// didYouMean proposes the only key that is two edits away at the most.
func didYouMean(name string, keys []string) string {
	var close []string
	for _, key := range keys {
		if distance(strings.ToLower(name), strings.ToLower(key)) <= 2 {
			close = append(close, key)
		}
	}
	if len(close) != 1 {
		return ""
	}
	return fmt.Sprintf(": did you mean %q?", close[0])
}

// distance is Levenshtein's.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

// The names of the syntax tree's types.
type (
	value  = hujson.Value
	object = hujson.Object
	member = hujson.ObjectMember
)

// boolMember returns a boolean member before the rest is read; false if there
// is none.
func boolMember(v value, name string) bool {
	o, ok := v.Value.(*object)
	return ok && slices.ContainsFunc(o.Members, func(m member) bool {
		return nameOf(m) == name && m.Value.Value.Kind() == 't'
	})
}

// textMember returns a member that is a text before the rest is read; empty if
// there is none.
func textMember(v value, name string) string {
	if o, ok := v.Value.(*object); ok {
		for _, m := range o.Members {
			if l, isLiteral := m.Value.Value.(hujson.Literal); isLiteral && nameOf(m) == name && l.Kind() == '"' {
				return l.String()
			}
		}
	}
	return ""
}

func hasMember(v value, name string) bool {
	o, ok := v.Value.(*object)
	return ok && slices.ContainsFunc(o.Members, func(m member) bool { return nameOf(m) == name })
}

// jsonKeys returns the keys that a struct is read from.
func jsonKeys(t reflect.Type) []string {
	keys := make([]string, t.NumField())
	for i := range keys {
		keys[i] = t.Field(i).Tag.Get("json")
	}
	return keys
}
