package gateway

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"gatehouse/auth"
	"gatehouse/session"
)

// This file says how the remotes stand: gateway_status, its resource, and what the
// pages and the command line show of it.

// statusWait bounds what gateway_status spends on fetching sign-in links.
const statusWait = 3 * time.Second

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
