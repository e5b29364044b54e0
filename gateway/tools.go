package gateway

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"gatehouse/auth"
	"gatehouse/session/rawjson"
)

// The gateway's own tools. They are always listed, after the remotes', and
// reach everything, so that a client that never lists again misses nothing.
const (
	toolStatus = "gateway_status"
	toolLogin  = "gateway_login"
	toolLogout = "gateway_logout"
	toolFind   = "gateway_find_tools"
	toolCall   = "gateway_call_tool"
)

var ownTools = []entry{
	ownTool(toolStatus, "Shows every remote (MCP server behind the gateway): whether it is up, whether you are signed in and until when, what failed last, and what to do about it.",
		`{"type":"object","properties":{},"additionalProperties":false}`, `{"readOnlyHint":true,"title":"Gateway status"}`),
	ownTool(toolLogin, "Signs in to one remote: returns the link that the user has to open in their browser, or says that none is needed.",
		`{"type":"object","properties":{"remote":{"type":"string","description":"name of the remote, as gateway_status shows it"}},"required":["remote"],"additionalProperties":false}`,
		`{"title":"Sign in to a remote"}`),
	ownTool(toolLogout, "Signs out: revokes and forgets the tokens for one remote, for all remotes of one issuer, or for all. The next call to them asks for a sign-in again.",
		`{"type":"object","properties":{"remote":{"type":"string","description":"name of the remote"},"issuer":{"type":"string","description":"issuer URL: sign out of all its remotes"},"all":{"type":"boolean","description":"true: sign out of everything"}},"additionalProperties":false}`,
		`{"title":"Sign out","destructiveHint":true,"idempotentHint":true}`),
	ownTool(toolFind, "Searches the tools of all remotes by words in their names and descriptions and returns them with their input schemas. Use it when a tool that you expect is not in your list; call what it finds with gateway_call_tool.",
		`{"type":"object","properties":{"query":{"type":"string","description":"words to look for; empty: all tools"},"remote":{"type":"string","description":"only this remote's tools"},"limit":{"type":"integer","minimum":1,"maximum":200,"default":20}},"additionalProperties":false}`,
		`{"readOnlyHint":true,"title":"Find tools"}`),
	ownTool(toolCall, "Calls any tool of any remote by its name and returns the tool's own result.",
		`{"type":"object","properties":{"name":{"type":"string","description":"name of the tool, as gateway_find_tools shows it"},"arguments":{"type":"object","description":"the tool's arguments"}},"required":["name"],"additionalProperties":false}`,
		`{"title":"Call a tool by name","openWorldHint":true}`),
}

func ownTool(name, description, schema, annotations string) entry {
	def, err := json.Marshal(struct {
		Name        string          `json:"name"`
		Description string          `json:"description"`
		InputSchema json.RawMessage `json:"inputSchema"`
		Annotations json.RawMessage `json:"annotations"`
	}{name, description, json.RawMessage(schema), json.RawMessage(annotations)})
	if err != nil {
		panic(err) // the literals above are not JSON
	}
	return entry{name: name, original: name, description: description, def: def}
}

// callOwn calls one of the gateway's own tools.
func (g *Gateway) callOwn(ctx context.Context, c caller, name string, arguments, params json.RawMessage) (json.RawMessage, error) {
	var remote, issuer, query string
	var all bool
	limit := foundTools
	switch name {
	case toolStatus:
		if say := readArguments(name, arguments, nil); say != "" {
			return toolError(say)
		}
		return g.status(ctx, c)
	case toolLogin:
		if say := readArguments(name, arguments, map[string]any{"remote": &remote}); say != "" {
			return toolError(say)
		}
		return g.login(ctx, c, remote)
	case toolLogout:
		if say := readArguments(name, arguments, map[string]any{"remote": &remote, "issuer": &issuer, "all": &all}); say != "" {
			return toolError(say)
		}
		return g.logout(ctx, c, remote, issuer, all)
	case toolFind:
		if say := readArguments(name, arguments, map[string]any{"query": &query, "remote": &remote, "limit": &limit}); say != "" {
			return toolError(say)
		}
		if limit < 1 || limit > maxFoundTools {
			return toolError(fmt.Sprintf("The argument limit of %s must be from 1 to %d.", name, maxFoundTools))
		}
		return g.findTools(ctx, c, query, remote, limit)
	case toolCall:
		return g.callByName(ctx, c, arguments, params)
	}
	return nil, unknownTool(name)
}

// How many tools gateway_find_tools shows, if it is not told and at most.
const foundTools, maxFoundTools = 20, 200

// readArguments reads a tool's arguments into pointers by their names. What
// does not fit is said in a sentence.
func readArguments(tool string, arguments json.RawMessage, into map[string]any) (say string) {
	if len(arguments) == 0 || string(arguments) == "null" {
		return ""
	}
	var given map[string]json.RawMessage
	if err := json.Unmarshal(arguments, &given); err != nil {
		return "The arguments of " + tool + " must be an object."
	}
	for _, name := range slices.Sorted(maps.Keys(given)) {
		switch to, known := into[name]; {
		case !known && len(into) == 0:
			return fmt.Sprintf("%s takes no arguments, and there is %q.", tool, short(name))
		case !known:
			return fmt.Sprintf("%s has no argument %q. It takes: %s.", tool, short(name), strings.Join(slices.Sorted(maps.Keys(into)), ", "))
		case string(given[name]) == "null":
		case json.Unmarshal(given[name], to) != nil:
			return fmt.Sprintf("The argument %s of %s must be %s.", name, tool, kindName(to))
		}
	}
	return ""
}

// kindName says what a pointer of readArguments takes.
func kindName(to any) string {
	switch to.(type) {
	case *string:
		return "a text"
	case *bool:
		return "true or false"
	case *int:
		return "a whole number"
	}
	return "an object"
}

// callByName is gateway_call_tool: the same path as a direct call, with the
// params that a direct call would have had.
func (g *Gateway) callByName(ctx context.Context, c caller, arguments, params json.RawMessage) (json.RawMessage, error) {
	var name string
	var object map[string]json.RawMessage
	if say := readArguments(toolCall, arguments, map[string]any{"name": &name, "arguments": &object}); say != "" {
		return toolError(say)
	}
	if name == "" {
		return toolError("Which tool? Give its name, as gateway_find_tools shows it.")
	}
	if name == toolCall {
		return toolError("gateway_call_tool does not call itself: give the name of the tool to call.")
	}
	got, err := rawjson.Get(arguments, "arguments") // as they were received
	if err != nil {
		return toolError("The arguments of " + toolCall + " are there twice.")
	}
	inner := got[0]
	if object == nil {
		inner = []byte("{}")
	}
	direct, err := rawjson.Set(params, "arguments", inner)
	if err != nil {
		return nil, &invalidParams{"the params of tools/call cannot be read"}
	}
	if direct, err = rename(direct, name); err != nil {
		return nil, &invalidParams{"the params of tools/call cannot be read"}
	}
	result, err := g.callTool(ctx, c, direct)
	if invalid, ok := errors.AsType[*invalidParams](err); ok {
		return toolError(invalid.say)
	}
	return result, err
}

// Own calls one of the gateway's own tools for the local user, as the command
// line does. It returns the sentence of the result, and the link if the tool
// asks for a sign-in.
func (g *Gateway) Own(ctx context.Context, tool string, arguments any) (say, link string, err error) {
	v, err := g.view(auth.Local)
	if err != nil {
		return "", "", err
	}
	params, err := json.Marshal(map[string]any{"name": tool, "arguments": arguments})
	if err != nil {
		return "", "", fmt.Errorf("encoding arguments: %w", err)
	}
	raw, err := g.callTool(ctx, caller{view: v}, params)
	if err != nil {
		return "", "", err
	}
	var result struct {
		Meta    map[string]authRequired `json:"_meta"`
		Content []textContent           `json:"content"`
		IsError bool                    `json:"isError"`
	}
	if err := json.Unmarshal(raw, &result); err != nil || len(result.Content) == 0 {
		return "", "", fmt.Errorf("reading the result of %s: %w", tool, err)
	}
	if result.IsError {
		return "", "", errors.New(result.Content[0].Text)
	}
	return result.Content[0].Text, result.Meta[metaAuthRequired].AuthURL, nil
}

func toolError(say string) (json.RawMessage, error) {
	return json.Marshal(toolResult{Content: []textContent{text(say)}, IsError: true})
}

func toolText(say string, structured any) (json.RawMessage, error) {
	return json.Marshal(toolResult{Content: []textContent{text(say)}, Structured: structured})
}

// findTools is gateway_find_tools: every word of the query counts, in the name
// more than in the description.
func (g *Gateway) findTools(ctx context.Context, c caller, query, server string, limit int) (json.RawMessage, error) {
	if server != "" {
		if s, say := g.cfg.Named(server); s == nil {
			return toolError(say)
		}
	}
	type hit struct {
		entry
		score int
	}
	words := strings.Fields(strings.ToLower(query))
	var hits []hit
	for _, t := range c.view.list(ctx).tools.all {
		if t.remote == "" || server != "" && t.remote != server {
			continue
		}
		score := 0
		name, description := strings.ToLower(t.name), strings.ToLower(t.description)
		for _, w := range words {
			if strings.Contains(name, w) {
				score += 3
			}
			if strings.Contains(description, w) {
				score++
			}
		}
		if score > 0 || len(words) == 0 {
			hits = append(hits, hit{t, score})
		}
	}
	slices.SortStableFunc(hits, func(a, b hit) int { return b.score - a.score })
	total := len(hits)
	hits = hits[:min(total, limit)]
	found := make([]json.RawMessage, len(hits))
	for i, h := range hits {
		found[i] = h.def
	}
	structured := map[string]any{"tools": found, "total": total}
	data, err := json.Marshal(structured)
	if err != nil {
		return nil, fmt.Errorf("encoding the tools found: %w", err)
	}
	say := "No tool found."
	if total > 0 {
		say = fmt.Sprintf("%s found, %d shown. Call one with %s.", plural(total, "tool"), len(hits), toolCall)
	}
	if missing := g.unlisted(c.view); missing != "" {
		say += " " + missing
	}
	return json.Marshal(toolResult{Content: []textContent{text(say), text(string(data))}, Structured: structured})
}

// unlisted says which remotes' tools could not be searched.
func (g *Gateway) unlisted(v *view) string {
	var names []string
	for _, server := range g.cfg.Running() {
		if !v.known(server.Name) {
			names = append(names, server.Name)
		}
	}
	if len(names) == 0 {
		return ""
	}
	return fmt.Sprintf("Not searched, because their tools are not known yet: %s (%s says why; where a sign-in is needed, %s gives the link).", strings.Join(names, ", "), toolStatus, toolLogin)
}
