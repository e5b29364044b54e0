package session

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"gatehouse/session/rawjson"
)

// This file is protocol 2026-07-28 towards remotes: there is no session, and
// each request says all about itself, in _meta and in headers.

const modernVersion = "2026-07-28"

// probeTimeout is what a remote has to say whether it speaks 2026-07-28. Old
// ones that do not answer an unknown method at all are dialed the old way then.
const probeTimeout = 5 * time.Second

const (
	metaPrefix       = "io.modelcontextprotocol/"
	metaVersion      = metaPrefix + "protocolVersion"
	metaClient       = metaPrefix + "clientInfo"
	metaServer       = metaPrefix + "serverInfo"
	metaCapabilities = metaPrefix + "clientCapabilities"
	metaLogLevel     = metaPrefix + "logLevel"
	metaSubscription = metaPrefix + "subscriptionId"
)

const (
	headerMethod      = "Mcp-Method"
	headerName        = "Mcp-Name"
	headerParamPrefix = "Mcp-Param-"
)

// codeHeaderMismatch: the headers of a request do not fit its body.
const codeHeaderMismatch = -32020

// eras is what is known of the protocol versions that a remote speaks.
type eras int32

const (
	erasUnknown eras = iota
	eraLegacy        // initialize only
	eraModern        // 2026-07-28 only
	eraBoth          // 2026-07-28; whether initialize too, the first legacy client finds out
)

// begin opens a link in the era that the remote is known for, else in the
// newest that it speaks: a client of both tries a modern request first (MCP
// 2026-07-28, versioning).
func (c *connection) begin(ctx context.Context, loud bool) (*link, error) {
	if c.remote.Command != nil {
		return c.beginProgram(ctx, loud)
	}
	if l := c.inherited(); l != nil {
		return l, nil
	}
	known := eras(c.remote.eras.Load())
	definite := true // it has said that it does not know the modern era
	if known != eraLegacy {
		l := c.modernAttempt()
		err := c.discover(ctx, loud, l)
		if err == nil {
			if known == erasUnknown {
				c.remote.eras.Store(int32(eraBoth))
			}
			return l, nil
		}
		if !speaksOld(err) {
			return nil, err
		}
		_, answered := errors.AsType[*ResponseError](err)
		definite = answered || !mayPass(err)
	}
	l, err := c.initialize(ctx, loud, c.owner(), nil)
	if err == nil {
		if definite {
			c.remote.eras.Store(int32(eraLegacy))
		}
		return l, nil
	}
	c.abandon(l)
	// What was known may not be so any more: the next dial finds out anew.
	c.remote.eras.Store(int32(erasUnknown))
	return nil, err
}

// speaksOld reports whether an answer to server/discover may be that of a
// remote that does not know it. Which error that is differs from one to the next.
func speaksOld(err error) bool {
	if _, ok := errors.AsType[*ResponseError](err); ok {
		return true
	}
	failure, ok := errors.AsType[*Failure](err)
	if !ok {
		return false
	}
	switch failure.Kind {
	case KindStatus:
		return failure.Status != http.StatusUnauthorized && failure.Status != http.StatusForbidden && failure.Status != http.StatusTooManyRequests
	case KindBadAnswer, KindTimeout, KindCut, KindUnsupported:
		return true
	}
	return false
}

// mayPass reports whether a failure says nothing about the era: it may be another
// one the next time.
func mayPass(err error) bool {
	failure, ok := errors.AsType[*Failure](err)
	return ok && (failure.Kind == KindTimeout || failure.Kind == KindCut || failure.Kind == KindStatus && failure.Status >= 500)
}

// modernAttempt is a link that [connection.discover] may make one of.
func (c *connection) modernAttempt() *link {
	l := &link{connection: c, modern: true, version: modernVersion, header: c.remote.requestHeader(), profile: json.RawMessage("{}")}
	l.header[headerProtocol] = []string{modernVersion}
	return l
}

// discover asks a remote what it is, in the modern era. With an error the link
// is of no use, but its transport may be.
func (c *connection) discover(ctx context.Context, loud bool, l *link) error {
	var result json.RawMessage
	var err error
	for try := 0; ; try++ {
		err = c.wire.authorized(ctx, loud, func() (err error) {
			ctx, cancel := within(ctx, c.remote.patience(probeTimeout))
			defer cancel()
			if l.via == nil {
				if l.via, err = c.open(ctx, l); err != nil {
					return err
				}
			}
			result, _, err = l.request(ctx, c.ids.Add(1), "server/discover", nil, nil)
			return err
		})
		if try > 0 || !offersModern(err) {
			break
		}
	}
	if err == nil {
		err = l.readDiscovery(result)
	}
	return err
}

// abandon lets go of a link that came to nothing, nil for none.
func (c *connection) abandon(l *link) {
	if l != nil && l.via != nil {
		c.goodbye(l)
	}
}

// offersModern reports whether a refusal of our version names it as one that is
// supported: then it is worth another try.
func offersModern(err error) bool {
	refusal, ok := errors.AsType[*ResponseError](err)
	if !ok || refusal.Code != codeUnsupportedVersion {
		return false
	}
	var data struct {
		Supported []string `json:"supported"`
	}
	return json.Unmarshal(refusal.Data, &data) == nil && slices.Contains(data.Supported, modernVersion)
}

// readDiscovery reads the answer to server/discover.
func (l *link) readDiscovery(result json.RawMessage) error {
	r := l.connection.remote
	got, err := rawjson.Get(result, "supportedVersions", "capabilities", "_meta")
	if err != nil {
		return r.badAnswer(errors.New("a member twice in its answer to server/discover"))
	}
	var versions []string
	if got[0] == nil || json.Unmarshal(got[0], &versions) != nil {
		return r.badAnswer(errors.New("no protocol versions in its answer to server/discover"))
	}
	if !slices.Contains(versions, modernVersion) {
		return r.fail(KindUnsupported, nil, "does not speak protocol version %s.", modernVersion)
	}
	if err := l.readCapabilities(got[1], "server/discover"); err != nil {
		return err
	}
	if got[2] != nil && got[2][0] == '{' {
		if meta, err := rawjson.Get(got[2], metaServer); err == nil {
			l.readServer(meta[0])
		}
	}
	return nil
}

// enveloped puts into a request's _meta what each must say there: version,
// client and capabilities (MCP 2026-07-28, basic).
func (l *link) enveloped(params json.RawMessage, c *call) (json.RawMessage, error) {
	profile, level, of := json.RawMessage("{}"), "", l.connection.session
	if c != nil {
		profile, of = Profile(c.from.Capabilities), c.session
	}
	if want := of.level.Load(); want != nil {
		level = *want
	}
	if params == nil {
		params = json.RawMessage("{}")
	}
	got, err := rawjson.Get(params, "_meta")
	if err != nil {
		return nil, fmt.Errorf("reading params: %w", err)
	}
	meta := make([]byte, 0, 256+len(got[0]))
	meta = append(meta, `{"`+metaVersion+`":"`+modernVersion+`","`+metaClient+`":`...)
	meta = append(meta, l.connection.session.pool.info...)
	meta = append(meta, `,"`+metaCapabilities+`":`...)
	meta = append(meta, profile...)
	if level != "" {
		meta = append(meta, `,"`+metaLogLevel+`":`...)
		if meta, err = appendString(meta, level); err != nil {
			return nil, err
		}
	}
	if rest := got[0]; len(rest) > 0 && rest[0] == '{' {
		if inner := strings.TrimSpace(string(rest[1 : len(rest)-1])); inner != "" {
			meta = append(append(meta, ','), inner...)
		}
	}
	meta = append(meta, '}')
	return rawjson.Set(params, "_meta", meta)
}

// named returns the headers of one request: Mcp-Method, Mcp-Name for what has a
// name or a URI, and Mcp-Param-* for arguments that the tool wants there (MCP
// 2026-07-28, streamable HTTP).
func (l *link) named(method string, params json.RawMessage) (http.Header, error) {
	h := make(http.Header, len(l.header)+3)
	maps.Copy(h, l.header)
	h[headerMethod] = []string{method}
	member := ""
	switch method {
	case "tools/call", "prompts/get":
		member = "name"
	case "resources/read":
		member = "uri"
	default:
		return h, nil
	}
	got, err := rawjson.Get(params, member, "arguments")
	if err != nil {
		return nil, fmt.Errorf("reading params: %w", err)
	}
	name, ok := rawjson.String(got[0])
	if !ok {
		return h, nil
	}
	h[headerName] = []string{headerValue(name)}
	if method == "tools/call" {
		for _, p := range l.connection.paramsOf(name) {
			if value, ok := p.Value(got[1]); ok {
				h[headerParamPrefix+p.Header] = []string{headerValue(value)}
			}
		}
	}
	return h, nil
}

// headerValue writes a value as a header can hold it: "=?base64?…?=" where it
// is not plain visible ASCII.
func headerValue(s string) string {
	const prefix, suffix = "=?base64?", "?="
	plain := s == strings.TrimSpace(s) && !strings.ContainsFunc(s, func(c rune) bool { return c < ' ' || c > '~' }) &&
		!(strings.HasPrefix(s, prefix) && strings.HasSuffix(s, suffix))
	if plain {
		return s
	}
	return prefix + base64.StdEncoding.EncodeToString([]byte(s)) + suffix
}

// ParamHeader is an argument of a tool that goes into a header too: its
// inputSchema says so by x-mcp-header (SEP-2243).
type ParamHeader struct {
	Path   []string // of members, from the arguments on
	Header string   // the name behind Mcp-Param-
}

// Value returns the argument as the header's value, before it is encoded; false
// if it is absent.
func (p ParamHeader) Value(arguments json.RawMessage) (string, bool) {
	value := arguments
	for _, name := range p.Path {
		if value == nil || value[0] != '{' {
			return "", false
		}
		got, err := rawjson.Get(value, name)
		if err != nil {
			return "", false
		}
		value = got[0]
	}
	switch {
	case value == nil:
		return "", false
	case value[0] == '"':
		return rawjson.String(value)
	case string(value) == "true", string(value) == "false":
		return string(value), true
	case value[0] == '{', value[0] == '[', value[0] == 'n':
		return "", false
	}
	// Integers that a float64 holds exactly, in plain digits: 1.0 and 1e2 too.
	f, err := strconv.ParseFloat(string(value), 64)
	if err != nil || f != math.Trunc(f) || math.Abs(f) > 1<<53-1 {
		return "", false
	}
	return strconv.FormatInt(int64(f), 10), true
}

// ParamHeaders reads the annotations of a tool's inputSchema. A tool whose
// annotations are not valid has to be left out.
func ParamHeaders(tool json.RawMessage) (found []ParamHeader, problem string) {
	if !strings.Contains(string(tool), "x-mcp-header") {
		return nil, ""
	}
	seen := map[string]bool{}
	var walk func(schema json.RawMessage, path []string) string
	walk = func(schema json.RawMessage, path []string) (problem string) {
		got, err := rawjson.Get(schema, "properties")
		if err != nil || got[0] == nil || got[0][0] != '{' {
			return ""
		}
		err = rawjson.Each(got[0], func(m rawjson.Member) bool {
			property := got[0][m.Start:m.End]
			if property[0] != '{' {
				return true
			}
			here := append(slices.Clone(path), m.Key)
			var annotated [][]byte
			if annotated, err = rawjson.Get(property, "x-mcp-header", "type"); err != nil {
				problem = "a property of its inputSchema has a member twice"
				return false
			}
			if annotated[0] != nil {
				name, _ := rawjson.String(annotated[0])
				kind, _ := rawjson.String(annotated[1])
				switch {
				case !isToken(name):
					problem = "an x-mcp-header in its inputSchema is no header name"
				case kind != "string" && kind != "integer" && kind != "boolean":
					problem = "an x-mcp-header in its inputSchema is on something that is no string, integer or boolean"
				case seen[strings.ToLower(name)]:
					problem = "two x-mcp-headers in its inputSchema have the same name"
				}
				if problem != "" {
					return false
				}
				seen[strings.ToLower(name)] = true
				found = append(found, ParamHeader{here, http.CanonicalHeaderKey(name)})
			}
			problem = walk(property, here)
			return problem == ""
		})
		if err != nil && problem == "" {
			return "its inputSchema cannot be read"
		}
		return problem
	}
	got, err := rawjson.Get(tool, "inputSchema")
	if err != nil {
		return nil, "its definition has a member twice"
	}
	if problem = walk(got[0], nil); problem != "" {
		return nil, problem
	}
	return found, ""
}

// isToken reports whether s is a token of RFC 9110, section 5.6.2.
func isToken(s string) bool {
	return s != "" && !strings.ContainsFunc(s, func(c rune) bool {
		return c <= ' ' || c > '~' || strings.ContainsRune(`"(),/:;<=>?@[\]{}`, c)
	})
}
