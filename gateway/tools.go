package gateway

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"gatehouse/auth"
	"gatehouse/session"
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

// signInPoll is how often a sign-in is looked for that another process may finish.
const signInPoll = time.Second

// statusWait bounds what gateway_status spends on fetching sign-in links.
const statusWait = 3 * time.Second

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

// withStrangers adds to a request for a sign-in what its user has to know of
// others who have opened links of theirs.
func (g *Gateway) withStrangers(ctx context.Context, c caller, required *auth.RequiredError) *auth.RequiredError {
	if !g.users {
		return required
	}
	also := *required // others may be reading it
	also.Strangers = slices.DeleteFunc(g.auth.UntoldStrangers(ctx, c.view.principal), func(remote string) bool {
		return remote == required.Remote && required.Stranger
	})
	return &also
}

// tellOfStrangers adds the same to a result of the gateway's own tools. What
// remotes answer is passed on as it is.
func (g *Gateway) tellOfStrangers(ctx context.Context, c caller, tool string, result json.RawMessage) (json.RawMessage, error) {
	if !g.users {
		return result, nil
	}
	remotes := g.auth.UntoldStrangers(ctx, c.view.principal)
	if len(remotes) == 0 || tool == toolStatus {
		return result, nil // the status says it by itself
	}
	got, err := rawjson.Get(result, "content")
	if err != nil {
		return nil, fmt.Errorf("reading a result of %s: %w", tool, err)
	}
	var content []json.RawMessage
	if err := json.Unmarshal(got[0], &content); err != nil {
		return nil, fmt.Errorf("reading a result of %s: %w", tool, err)
	}
	more, err := json.Marshal(text(strangersSay(remotes)))
	if err == nil {
		got[0], err = json.Marshal(append(content, more))
	}
	if err != nil {
		return nil, fmt.Errorf("encoding a result of %s: %w", tool, err)
	}
	return rawjson.Set(result, "content", got[0])
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

// Await waits until the local user is signed in to a remote, or ctx is done.
func (g *Gateway) Await(ctx context.Context, remote string) error {
	return g.awaitSignIn(ctx, auth.Local, remote)
}

// awaitSignIn looks for a sign-in that another process may finish. It returns
// an error if the link runs out before.
func (g *Gateway) awaitSignIn(ctx context.Context, p auth.Principal, remote string) error {
	ticker := time.NewTicker(signInPoll)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ticker.C:
		}
		switch held := g.auth.Status(p, remote); {
		case held.Unknown: // the store is away for the moment
		case held.Pending != nil: // also where the grant that there is has to become another
		case held.SignedIn:
			return nil
		default:
			return auth.ErrFlowUnknown
		}
	}
}

func toolError(say string) (json.RawMessage, error) {
	return json.Marshal(toolResult{Content: []textContent{text(say)}, IsError: true})
}

func toolText(say string, structured any) (json.RawMessage, error) {
	return json.Marshal(toolResult{Content: []textContent{text(say)}, Structured: structured})
}

// remoteStatus is one remote as gateway_status shows it.
type remoteStatus struct {
	Name        string     `json:"name"`
	Status      string     `json:"status"` // connected | connecting | auth_required | unavailable | unsupported | disabled
	Tools       int        `json:"tools"`
	Renamed     []renamed  `json:"renamed,omitempty"`  // tools whose plain name is another's, or too long
	LeftOut     []string   `json:"left_out,omitempty"` // tools that are not listed
	Server      string     `json:"server,omitempty"`   // what it calls itself, and its version
	Protocol    string     `json:"protocol,omitempty"`
	SignIn      string     `json:"sign_in"`              // signed_in | signed_out | none: it asks for none
	SignInBy    string     `json:"sign_in_by,omitempty"` // one of signInBy
	Account     string     `json:"account,omitempty"`
	Issuer      string     `json:"issuer,omitempty"`
	Scopes      []string   `json:"scopes,omitempty"`
	Expires     *time.Time `json:"expires,omitempty"` // of the access token
	Refreshable bool       `json:"refreshable,omitempty"`
	AuthURL     string     `json:"auth_url,omitempty"`
	LastError   string     `json:"last_error,omitempty"`
	LastErrorAt *time.Time `json:"last_error_at,omitempty"`
	StrangerAt  *time.Time `json:"stranger_at,omitempty"` // when another account opened a sign-in link for it last
	Advice      string     `json:"advice,omitempty"`
	retried     bool       // by itself
}

// renamed is a tool that has a name with a suffix.
type renamed struct {
	Tool string `json:"tool"` // as the remote calls it
	Name string `json:"name"` // as the gateway does
}

// signInBy says how a remote is signed in to, by auth.type.
var signInBy = map[string]string{
	auth.TypeOAuth:    "own sign-in",
	auth.TypeForward:  "forwarded login",
	auth.TypeExchange: "exchanged token",
	auth.TypeIDJAG:    "identity assertion (ID-JAG)",
	auth.TypeMachine:  "the gateway's own credentials",
}

func (g *Gateway) status(ctx context.Context, c caller) (json.RawMessage, error) {
	say, structured := g.statusOf(ctx, c)
	return toolText(say, structured)
}

// statusOf is the status in words and as data.
func (g *Gateway) statusOf(ctx context.Context, c caller) (string, map[string]any) {
	say, all := g.report(ctx, c.view, true)
	structured := map[string]any{
		"version":  g.version,
		"identity": identity(c.view.principal),
		"remotes":  all,
	}
	if cache := g.auth.Exchanges(); cache.Hits+cache.Misses > 0 {
		structured["exchange_cache"] = map[string]any{
			"hits": cache.Hits, "misses": cache.Misses, "size": cache.Size, "evictions": cache.Evictions,
		}
	}
	return say, structured
}

// statusURI is the same as a resource, for clients that would rather read.
const statusURI = "auth://status"

var statusResource = json.RawMessage(`{"uri":"` + statusURI + `","name":"gateway status","title":"Gateway status","description":"Every remote behind the gateway: whether it is up, how and until when it is signed in, what failed last, and what to do about it.","mimeType":"application/json"}`)

func (g *Gateway) readStatus(ctx context.Context, c caller) (json.RawMessage, error) {
	_, structured := g.statusOf(ctx, c)
	data, err := json.Marshal(structured)
	if err != nil {
		return nil, fmt.Errorf("encoding the status: %w", err)
	}
	result := map[string]any{"contents": []map[string]string{{"uri": statusURI, "mimeType": "application/json", "text": string(data)}}}
	if c.modern {
		result["ttlMs"], result["cacheScope"] = 0, "private"
	}
	return json.Marshal(result)
}

// Status is what gateway_status says to the local user; without links where
// nobody serves the pages that they lead to.
func (g *Gateway) Status(ctx context.Context, links bool) (string, error) {
	v, err := g.view(auth.Local)
	if err != nil {
		return "", err
	}
	say, _ := g.report(ctx, v, links)
	return say, nil
}

// report says how all remotes stand, in words and as data.
func (g *Gateway) report(ctx context.Context, v *view, links bool) (string, []remoteStatus) {
	v.list(ctx) // let the remotes that are just starting be counted
	if links {
		g.fetchLinks(ctx, v)
	}
	var all []remoteStatus
	for i := range g.cfg.Servers {
		s := g.remoteStatus(v, &g.cfg.Servers[i], links)
		if g.users {
			s.StrangerAt = stamp(g.auth.Stranger(ctx, v.principal, s.Name))
		}
		all = append(all, s)
	}
	var say strings.Builder
	fmt.Fprintf(&say, "Gatehouse %s, %s. %s\n", g.version, plural(len(all), "remote"), g.whoami(v.principal))
	for _, s := range all {
		fmt.Fprintf(&say, "\n- %s: %s", s.Name, describe(s, g.now()))
	}
	return say.String(), all
}

func identity(p auth.Principal) string {
	switch {
	case p.Ephemeral():
		return "session"
	case p.Issuer != "":
		return "user"
	}
	return "local"
}

func (g *Gateway) whoami(p auth.Principal) string {
	if p.Ephemeral() {
		return "Sign-ins belong to this MCP session alone and end with it."
	}
	if p.Issuer != "" {
		return "Sign-ins belong to " + printable(p.Subject) + " of " + p.Issuer + " and are shared by all their clients."
	}
	return "Sign-ins belong to the local user and are shared by all their clients."
}

// fetchLinks gets a link for every remote that waits for a sign-in, so that
// the status says what to click.
func (g *Gateway) fetchLinks(ctx context.Context, v *view) {
	ctx, cancel := context.WithTimeout(ctx, statusWait)
	defer cancel()
	var wg sync.WaitGroup
	for _, server := range g.cfg.Running() {
		if v.session.Status(server.Name).State == session.StateSignInNeeded {
			wg.Go(func() {
				if err := v.session.Connect(ctx, server.Name); err != nil {
					g.failed(ctx, caller{view: v}, server.Name, "fetching a sign-in link", err)
				}
			})
		}
	}
	wg.Wait()
}

func (g *Gateway) remoteStatus(v *view, server *Server, links bool) remoteStatus {
	out := remoteStatus{Name: server.Name, SignIn: "none"}
	if server.Disabled {
		out.Status, out.Advice = "disabled", "It is switched off in the config."
		return out
	}
	conn := v.session.Status(server.Name)
	out.Status, out.Tools = string(conn.State), conn.Tools
	if conn.State == session.StateSignInNeeded {
		out.Status = "auth_required"
	}
	out.Server, out.Protocol = strings.TrimSpace(conn.Server+" "+conn.Version), conn.Protocol
	tools := v.now().tools
	for _, e := range tools.renamed {
		if e.remote == server.Name {
			out.Renamed = append(out.Renamed, renamed{e.original, e.name})
		}
	}
	for _, e := range tools.leftOut {
		if e.remote == server.Name {
			out.LeftOut = append(out.LeftOut, e.original)
		}
	}
	if say, ok := sentence(conn.Err); ok && conn.State != session.StateConnected {
		out.LastError, out.LastErrorAt = say, stamp(conn.Since)
	}
	if out.Status == string(session.StateUnavailable) {
		out.Advice = "It is tried again with the next call."
		if out.retried = conn.Retried; out.retried {
			out.Advice = "It is tried again by itself."
		}
	}
	if !server.Auth.SignsIn() {
		return out
	}
	out.SignInBy = signInBy[server.Auth.Type]
	held := g.auth.Status(v.principal, server.Name)
	// It has asked for a sign-in, or may do so yet: only what has let the
	// principal in without one is known to ask for none.
	_, asked := errors.AsType[*auth.Error](conn.Err)
	if asked || conn.State == session.StateSignInNeeded || conn.State != session.StateConnected && !v.known(server.Name) {
		out.SignIn = "signed_out"
	}
	if held.SignedIn {
		out.SignIn = "signed_in"
		out.Account, out.Issuer, out.Scopes = held.Account, held.Issuer, held.Scopes
		out.Expires, out.Refreshable = stamp(held.Expires), held.Refreshable
	}
	if held.Pending != nil && links {
		out.AuthURL, out.Issuer = held.Pending.AuthURL, held.Pending.Issuer
	}
	if held.LastError != nil {
		out.LastError, out.LastErrorAt = held.LastError.Say, stamp(held.LastErrorAt)
	}
	switch {
	case out.AuthURL != "":
		out.Advice = "Open the link in a browser and sign in."
	case out.Status == "auth_required" && out.LastError == "":
		out.Advice = fmt.Sprintf("Call %s with remote %q for a link.", toolLogin, server.Name)
	}
	return out
}

func stamp(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	t = t.UTC().Truncate(time.Second)
	return &t
}

// describe is a remote's status in one line for people and models.
func describe(s remoteStatus, now time.Time) string {
	var parts []string
	switch s.Status {
	case "connected":
		connected := "connected, " + plural(s.Tools, "tool")
		if s.Server != "" {
			connected += ", server " + s.Server
		}
		if s.Protocol != "" {
			connected += ", protocol " + s.Protocol
		}
		parts = append(parts, connected)
	case "auth_required":
		parts = append(parts, "sign-in needed")
	default:
		parts = append(parts, s.Status)
	}
	if s.SignIn == "signed_in" {
		in := "signed in"
		if s.Account != "" {
			in += " as " + s.Account
		}
		if s.Issuer != "" {
			in += " at " + s.Issuer
		}
		if s.Expires != nil {
			in += fmt.Sprintf(" until %s (in %s)", s.Expires.Format(time.RFC3339), s.Expires.Sub(now).Round(time.Second))
		}
		if s.Refreshable {
			in += ", renewed by itself"
		}
		if s.SignInBy != signInBy[auth.TypeOAuth] {
			in += ", by " + s.SignInBy
		}
		parts = append(parts, in)
	}
	if len(s.Renamed) > 0 {
		first := s.Renamed[0]
		parts = append(parts, "renamed: "+printable(first.Tool)+" is "+first.Name+andMore(len(s.Renamed)))
	}
	if len(s.LeftOut) > 0 {
		parts = append(parts, "left out: "+printable(s.LeftOut[0])+andMore(len(s.LeftOut)))
	}
	if s.LastError != "" {
		parts = append(parts, "last problem: "+s.LastError)
	}
	if s.StrangerAt != nil {
		parts = append(parts, "somebody logged in with another account opened a sign-in link for it at "+s.StrangerAt.Format(time.RFC3339)+" and was refused: keep such links to yourself")
	}
	if s.AuthURL != "" {
		parts = append(parts, "sign in here: "+s.AuthURL)
	} else if s.Advice != "" {
		parts = append(parts, s.Advice)
	}
	return joinParts(parts)
}

// andMore says that the first of n is not all.
func andMore(n int) string {
	if n == 1 {
		return ""
	}
	return fmt.Sprintf(", and %d more", n-1)
}

// joinParts makes one line of parts of which some are sentences.
func joinParts(parts []string) string {
	line := parts[0]
	for _, part := range parts[1:] {
		switch upper := strings.ToUpper(part[:1]) + part[1:]; {
		case strings.HasSuffix(line, "?") || strings.HasSuffix(line, "!"):
			line += " " + upper
		case part == upper: // a sentence of its own
			line = strings.TrimSuffix(line, ".") + ". " + part
		default:
			line = strings.TrimSuffix(line, ".") + "; " + part
		}
	}
	return line
}

// login is gateway_login.
func (g *Gateway) login(ctx context.Context, c caller, name string) (json.RawMessage, error) {
	server, say := g.cfg.Named(name)
	if server == nil {
		return toolError(say)
	}
	required, say, err := g.signIn(ctx, c, server)
	switch {
	case required != nil:
		return signInResult(newAuthRequired(g.withStrangers(ctx, c, required), g.now(), "its tools are there"), false)
	case err != nil:
		return renderCall(err, g.now())
	}
	return toolText(say, nil)
}

// signIn returns where to sign in to a remote, or says why that is not needed.
// A remote that is only known by its 401 gives its link when it is dialed; one
// that lets everybody connect and asks later, from what it publishes.
func (g *Gateway) signIn(ctx context.Context, c caller, server *Server) (required *auth.RequiredError, say string, err error) {
	name := server.Name
	err = c.view.session.Connect(ctx, name)
	if required, ok := errors.AsType[*auth.RequiredError](err); ok {
		g.failed(ctx, c, name, "connecting to sign in", err)
		return required, "", nil
	}
	if err != nil {
		g.failed(ctx, c, name, "signing in", err)
		return nil, "", err
	}
	switch server.Auth.Type {
	case "none":
		return nil, fmt.Sprintf("%s is connected and needs no sign-in: its config says so.", name), nil
	case auth.TypeMachine:
		return nil, fmt.Sprintf("%s is connected and needs no sign-in: the gateway signs in with credentials of its own.", name), nil
	}
	if held := g.auth.Status(c.view.principal, name); held.SignedIn && server.Auth.ByLogin() {
		return nil, fmt.Sprintf("%s is connected by your login at the gateway. To use another account, call %s with remote %q first.", name, toolLogout, auth.LoginRemote), nil
	} else if held.SignedIn {
		return nil, fmt.Sprintf("You are already signed in to %s, and it accepts the sign-in. To use another account, call %s first.", name, toolLogout), nil
	}
	err = g.auth.Authorizer(c.view.principal, name).SignIn(ctx)
	if required, ok := errors.AsType[*auth.RequiredError](err); ok {
		g.failed(ctx, c, name, "offering a sign-in", err)
		return required, "", nil
	}
	if errors.Is(err, auth.ErrNoSignIn) {
		return nil, fmt.Sprintf("%s is connected and asks for no sign-in.", name), nil
	}
	g.failed(ctx, c, name, "signing in", err)
	return nil, "", err
}

// logout is gateway_logout.
func (g *Gateway) logout(ctx context.Context, c caller, name, issuer string, all bool) (json.RawMessage, error) {
	given := 0
	for _, set := range []bool{name != "", issuer != "", all} {
		if set {
			given++
		}
	}
	if given != 1 {
		return toolError("Sign out of what? Give exactly one of remote, issuer, or all: true.")
	}
	remotes, say := g.toSignOut(c.view, name, issuer, all)
	if say != "" {
		return toolError(say)
	}
	say, ok := g.signOutOf(ctx, c, remotes)
	if !ok {
		return toolError(say)
	}
	return toolText(say, nil)
}

// toSignOut returns what a name, an issuer or all stands for, or says why it
// stands for nothing.
func (g *Gateway) toSignOut(v *view, name, issuer string, all bool) (remotes []string, say string) {
	if name == auth.LoginRemote && g.cfg.Gateway.Login != nil {
		return []string{name}, ""
	}
	if name != "" {
		if server, say := g.cfg.Named(name); server == nil {
			return nil, say
		}
		return []string{name}, ""
	}
	for _, server := range g.cfg.Running() {
		held := g.auth.Status(v.principal, server.Name)
		if all && server.Auth.ByLogin() {
			continue // it ends with the login
		}
		if all || held.Issuer == issuer { // also what is refused at the moment
			remotes = append(remotes, server.Name)
		}
	}
	if login := g.cfg.Gateway.Login; login != nil && (all || login.Issuer == issuer) {
		remotes = append(remotes, auth.LoginRemote)
	}
	return remotes, ""
}

// signOutOf signs out and says what came of it; ok is false if a sign-in may
// still be there.
func (g *Gateway) signOutOf(ctx context.Context, c caller, remotes []string) (say string, ok bool) {
	var lines []string
	ok = true
	for _, remote := range remotes {
		line, err := g.signOut(ctx, c, remote)
		if line != "" {
			lines = append(lines, line)
		}
		ok = ok && err == nil
	}
	if len(lines) == 0 {
		return "You were not signed in there.", ok
	}
	return strings.Join(lines, "\n"), ok
}

func (g *Gateway) signOut(ctx context.Context, c caller, remote string) (say string, err error) {
	server, _ := g.cfg.Named(remote)
	if server != nil && server.Auth.Type == auth.TypeMachine {
		return "", nil // nobody has signed in
	}
	held := g.auth.Status(c.view.principal, remote)
	revoked, err := g.auth.SignOut(ctx, c.view.principal, remote)
	if errors.Is(err, auth.ErrUnknownRemote) {
		return "", nil
	}
	// Without a sign-in too: what it listed in an earlier run is forgotten.
	c.view.session.Disconnect(remote)
	if remote == auth.LoginRemote {
		for _, server := range g.cfg.Running() {
			if server.Auth.ByLogin() {
				c.view.session.Disconnect(server.Name)
			}
		}
	}
	switch {
	case err != nil:
		g.failed(ctx, c, remote, "signing out", err)
		return notSignedOut(remote, revoked, err), err
	case !held.SignedIn && !revoked && held.Pending != nil:
		return remote + ": you were not signed in; the pending sign-in is cancelled and its link works no more.", nil
	case !held.SignedIn && !revoked:
		return "", nil
	}
	g.signedOut(ctx, c.view.principal, remote, revoked)
	if server != nil && server.Auth.ByLogin() {
		return fmt.Sprintf("%s: its tokens are forgotten here, and the next call gets new ones by your login at the gateway. To end that, call %s with remote %q.", remote, toolLogout, auth.LoginRemote), nil
	}
	if remote == auth.LoginRemote {
		remote = "your login at the gateway"
	}
	if len(held.Shared) > 0 {
		for _, mate := range held.Shared {
			c.view.session.Disconnect(mate)
		}
		remote = strings.Join(held.Shared, ", ") + " (one sign-in for the group)"
	}
	if revoked {
		return remote + ": signed out; the tokens are revoked at the authorization server and forgotten here.", nil
	}
	return remote + ": signed out; the tokens are forgotten here. The authorization server did not confirm that it revoked them.", nil
}

// notSignedOut says what is left of a sign-in that could not be ended.
func notSignedOut(remote string, revoked bool, err error) string {
	why, ok := sentence(err)
	if !ok {
		why = remote + ": something went wrong inside the gateway; its log says more"
	}
	if revoked {
		return why + ". The sign-in is still kept here, but its tokens are revoked at the authorization server. Sign out again when the gateway works."
	}
	return why + ". You may still be signed in: sign out again when the gateway works."
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
