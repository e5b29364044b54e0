package gateway

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"regexp"
	"strings"

	"gatehouse/session"
	"gatehouse/session/rawjson"
)

// This file is what remotes have beside tools: prompts, resources, and the
// completion of their arguments.

// getPrompt is prompts/get.
func (g *Gateway) getPrompt(ctx context.Context, c caller, params json.RawMessage) (json.RawMessage, error) {
	got, err := rawjson.Get(params, "name")
	if err != nil {
		return nil, &invalidParams{"the params of prompts/get are not an object with a name"}
	}
	name, ok := rawjson.String(got[0])
	if !ok {
		return nil, &invalidParams{"prompts/get needs the name of a prompt"}
	}
	p, err := g.findPrompt(ctx, c, name)
	if err != nil {
		return nil, err
	}
	if params, err = rename(params, p.original); err != nil {
		return nil, &invalidParams{"the params of prompts/get cannot be read"}
	}
	return g.send(ctx, c, p.remote, "prompts/get", params)
}

func (g *Gateway) findPrompt(ctx context.Context, c caller, name string) (entry, error) {
	return g.find(ctx, c, name, func(m *merged) *entries { return &m.prompts }, func(name string) error {
		return &invalidParams{fmt.Sprintf("unknown prompt %q", short(name))}
	})
}

// readResource is resources/read.
func (g *Gateway) readResource(ctx context.Context, c caller, params json.RawMessage) (json.RawMessage, error) {
	got, err := rawjson.Get(params, "uri")
	if err != nil {
		return nil, &invalidParams{"the params of resources/read are not an object with a uri"}
	}
	uri, ok := rawjson.String(got[0])
	if !ok {
		return nil, &invalidParams{"resources/read needs the uri of a resource"}
	}
	if uri == statusURI {
		return g.readStatus(ctx, c)
	}
	remote, original, err := g.ownerOf(ctx, c, uri)
	if err != nil {
		return nil, err
	}
	if original != uri {
		if params, err = withURI(params, original); err != nil {
			return nil, &invalidParams{"the params of resources/read cannot be read"}
		}
	}
	result, err := g.send(ctx, c, remote, "resources/read", params)
	// Protocol 2026-07-28 has -32602 for it: "servers MUST NOT" send -32002.
	if refusal, ok := errors.AsType[*session.ResponseError](err); ok && refusal.Code == codeNotFound && c.modern {
		return nil, &notFound{uri, c.modern}
	}
	return result, err
}

func withURI(object json.RawMessage, uri string) (json.RawMessage, error) {
	quoted, err := json.Marshal(uri)
	if err != nil {
		return nil, fmt.Errorf("encoding a URI: %w", err)
	}
	return rawjson.Set(object, "uri", quoted)
}

// ownerOf finds the remote that a URI belongs to, and what the remote calls it:
// by the resources that are listed, then by the templates, then by what results
// have named. Other URIs are good too, as far as the protocol goes; they can only
// go where there is no choice.
func (g *Gateway) ownerOf(ctx context.Context, c caller, uri string) (remote, original string, err error) {
	if e, ok := c.view.latest().resources.lookup(uri); ok {
		return e.remote, e.original, nil
	}
	if remote, original, ok := g.unqualify(uri); ok {
		if !c.view.known(remote) {
			err = g.connectFirst(ctx, c, remote)
		}
		return remote, original, err
	}
	// The first request of a session may come before the remotes have answered.
	m := c.view.list(ctx)
	if e, ok := m.resources.lookup(uri); ok {
		return e.remote, e.original, nil
	}
	for _, t := range m.templates.all {
		if t.name == t.original && matches(t.original, uri) {
			return t.remote, uri, nil
		}
	}
	if remote, ok := c.view.linked.by(uri); ok {
		return remote, uri, nil
	}
	var connected, unknown []string
	for _, catalog := range c.view.session.Catalogs(atOnce) {
		switch {
		case !catalog.Known:
			unknown = append(unknown, catalog.Remote)
		case catalog.Connected && catalog.Offers.Resources:
			connected = append(connected, catalog.Remote)
		}
	}
	switch {
	case len(connected) == 1:
		return connected[0], uri, nil
	case len(connected) == 0 && len(unknown) == 1:
		return unknown[0], uri, g.connectFirst(ctx, c, unknown[0])
	}
	return "", "", &notFound{uri, c.modern}
}

// qualifiedScheme begins the URI of a resource whose own URI another remote has
// as well: gatehouse:<remote>/<the remote's URI>.
const qualifiedScheme = "gatehouse:"

func qualify(remote, uri string) string {
	return qualifiedScheme + url.PathEscape(remote) + "/" + uri
}

func (g *Gateway) unqualify(uri string) (remote, original string, ok bool) {
	rest, ok := strings.CutPrefix(uri, qualifiedScheme)
	if !ok {
		return "", "", false
	}
	escaped, original, ok := strings.Cut(rest, "/")
	if !ok {
		return "", "", false
	}
	remote, err := url.PathUnescape(escaped)
	if _, running := g.index[remote]; err != nil || !running {
		return "", "", false
	}
	return remote, original, true
}

// matches reports whether a URI can have been made from a URI template (RFC
// 6570). Only the remote knows for sure; what is asked here is whose it is.
func matches(template, uri string) bool {
	literal, _, _ := strings.Cut(template, "{")
	if !strings.HasPrefix(uri, literal) {
		return false
	}
	var pattern strings.Builder
	pattern.WriteString("^")
	for rest := template; ; {
		literal, after, found := strings.Cut(rest, "{")
		pattern.WriteString(regexp.QuoteMeta(literal))
		if !found {
			break
		}
		expression, next, closed := strings.Cut(after, "}")
		if !closed || expression == "" {
			return false // not a template
		}
		pattern.WriteString(expansion(expression[0]))
		rest = next
	}
	pattern.WriteString("$")
	// Made for this one look: the templates are foreign, and compiled they are large.
	re, err := regexp.Compile(pattern.String())
	return err == nil && re.MatchString(uri)
}

// expansion is the pattern of what an expression with this operator makes.
func expansion(operator byte) string {
	switch operator {
	case '+', '#':
		return `.*`
	case '/':
		return `(?:/[^?#]*)?`
	case '.', ';':
		return `(?:\` + string(operator) + `[^/?#]*)?`
	case '?', '&':
		return `(?:\` + string(operator) + `[^#]*)?`
	}
	return `[^/?#]*`
}

// noCompletion is the answer for a remote that completes nothing.
const noCompletion = `{"completion":{"values":[],"total":0,"hasMore":false}}`

// complete is completion/complete: it goes where the prompt or the resource is.
func (g *Gateway) complete(ctx context.Context, c caller, params json.RawMessage) (json.RawMessage, error) {
	invalid := &invalidParams{"completion/complete needs a ref: a prompt with its name, or a resource with its uri"}
	got, err := rawjson.Get(params, "ref")
	if err != nil || got[0] == nil {
		return nil, invalid
	}
	ref := json.RawMessage(got[0])
	if got, err = rawjson.Get(ref, "type", "name", "uri"); err != nil {
		return nil, invalid
	}
	var remote string
	switch kind, _ := rawjson.String(got[0]); kind {
	case "ref/prompt":
		name, ok := rawjson.String(got[1])
		if !ok {
			return nil, invalid
		}
		p, err := g.findPrompt(ctx, c, name)
		if err != nil {
			return nil, err
		}
		remote = p.remote
		if ref, err = rename(ref, p.original); err != nil {
			return nil, invalid
		}
	case "ref/resource":
		uri, ok := rawjson.String(got[2])
		if !ok {
			return nil, invalid
		}
		original := uri
		if t, ok := c.view.latest().templates.lookup(uri); ok {
			remote, original = t.remote, t.original
		} else if remote, original, err = g.ownerOf(ctx, c, uri); err != nil {
			return nil, err
		}
		if ref, err = withURI(ref, original); err != nil {
			return nil, invalid
		}
	default:
		return nil, invalid
	}
	if !c.view.offers(remote).Completions {
		return json.RawMessage(noCompletion), nil
	}
	if params, err = rawjson.Set(params, "ref", ref); err != nil {
		return nil, invalid
	}
	return g.send(ctx, c, remote, "completion/complete", params)
}
