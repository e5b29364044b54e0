package gateway

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"gatehouse/auth"
	"gatehouse/session/rawjson"
)

// This file is gateway_login and gateway_logout, as tools, pages and the command
// line have them.

// signInPoll is how often a sign-in is looked for that another process may finish.
const signInPoll = time.Second

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
