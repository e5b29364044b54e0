package gateway

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"time"

	"gatehouse/auth"
	"gatehouse/session"
	"gatehouse/session/rawjson"
)

// This file is what is written down of who did what: a record for each sign-in
// begun, finished and refused, each sign-out, each request that was passed on to
// a remote, and each that was refused before. Arguments and results are never in
// it, nor what a link or a callback holds.

// Outcomes of a request that was passed on to a remote.
const (
	outcomeOK           = "ok"
	outcomeToolError    = "tool_error"     // the tool says that it failed
	outcomeError        = "error"          // the remote answered with a JSON-RPC error
	outcomeInput        = "input_required" // the client is asked for something first
	outcomeAuthRequired = "auth_required"
	outcomeForbidden    = "forbidden" // to the account that signed in
	outcomeTimeout      = "timeout"
	outcomeFailed       = "failed" // no proper answer
	outcomeCancelled    = "cancelled"
	outcomeLimited      = "limited"
)

// outcomeOf classes what came of a request.
func outcomeOf(result json.RawMessage, err error) string {
	if err == nil {
		switch {
		case is(result, "isError", `true`):
			return outcomeToolError
		case is(result, "resultType", `"input_required"`):
			return outcomeInput
		}
		return outcomeOK
	}
	if _, ok := errors.AsType[*auth.RequiredError](err); ok {
		return outcomeAuthRequired
	}
	if _, ok := errors.AsType[*limited](err); ok {
		return outcomeLimited
	}
	if _, ok := errors.AsType[*session.ResponseError](err); ok {
		return outcomeError
	}
	if refusal, ok := errors.AsType[*auth.Error](err); ok && refusal.Kind == auth.KindForbidden {
		return outcomeForbidden
	}
	if failure, ok := errors.AsType[*session.Failure](err); ok && failure.Kind == session.KindTimeout {
		return outcomeTimeout
	}
	if errors.Is(err, context.Canceled) || errors.Is(err, session.ErrClosed) {
		return outcomeCancelled
	}
	return outcomeFailed
}

// is reports whether a result's member has a value; the search spares most
// results the parser.
func is(result json.RawMessage, member, value string) bool {
	if !bytes.Contains(result, []byte(`"`+member+`"`)) {
		return false
	}
	got, err := rawjson.Get(result, member)
	return err == nil && string(got[0]) == value
}

// observe counts a request that was passed on and writes it down. name is that
// of the tool or the prompt, as the remote knows it.
func (g *Gateway) observe(ctx context.Context, c caller, remote, method, name string, began time.Time, result json.RawMessage, err error) {
	outcome, took := outcomeOf(result, err), g.now().Sub(began)
	g.metrics.called(remote, outcome, took)
	level := slog.LevelInfo
	if method == "completion/complete" {
		level = slog.LevelDebug // one for each key that somebody types
	}
	attrs := []slog.Attr{slog.String("remote", remote), slog.String("method", method)}
	if name != "" {
		attrs = append(attrs, slog.String("name", printable(name)))
	}
	attrs = append(attrs, slog.String("outcome", outcome), slog.Duration("duration", took))
	g.record(ctx, level, "call", c.view.principal, attrs...)
}

// nameIn returns the name in the params of a call, if it is one of a tool or of
// a prompt. The URI of a resource could hold anything.
func nameIn(method string, params json.RawMessage) string {
	if method != "tools/call" && method != "prompts/get" {
		return ""
	}
	got, err := rawjson.Get(params, "name")
	if err != nil {
		return ""
	}
	name, _ := rawjson.String(got[0])
	return name
}

// record writes one record. Whose it is stands in full where it is a person: an
// anonymous session's subject is its id, and who has that is the session. Of
// nobody, the zero principal, there is nothing to say.
func (g *Gateway) record(ctx context.Context, level slog.Level, event string, p auth.Principal, attrs ...slog.Attr) {
	switch {
	case p.Issuer != "":
		attrs = append([]slog.Attr{slog.Group("principal", slog.String("issuer", p.Issuer), slog.String("subject", p.Subject))}, attrs...)
	case p != auth.Principal{}:
		attrs = append([]slog.Attr{slog.Any("principal", p)}, attrs...)
	}
	g.audit.LogAttrs(ctx, level, event, attrs...)
}

// Events of the audit log beside "call".
const (
	eventSignInBegun    = "sign-in begun"
	eventSignInFinished = "sign-in finished"
	eventSignInRefused  = "sign-in refused"
	eventSignOut        = "sign-out"
	eventLogin          = "login" // of a browser at the gateway
	eventLoginRefused   = "login refused"
	eventLogout         = "logout"
	eventRefused        = "refused" // a request, before anybody looked at what it asks for
)

// refused notes a request that was refused at the door; why is a word, or the
// name of a limit. p is the zero principal where nobody knows who sent it.
func (g *Gateway) refused(r *http.Request, p auth.Principal, why string) {
	g.record(r.Context(), slog.LevelWarn, eventRefused, p, slog.String("why", why), slog.String("from", g.remoteAddr(r).String()))
}

func (g *Gateway) signInBegun(ctx context.Context, flow *auth.FlowInfo) {
	g.metrics.signIn(flow.Remote, signInBegun)
	g.record(ctx, slog.LevelInfo, eventSignInBegun, flow.Principal, slog.String("remote", flow.Remote), slog.String("issuer", flow.Issuer))
}

func (g *Gateway) signInFinished(ctx context.Context, f *auth.Finished, account string) {
	g.metrics.signIn(f.Remote, signInFinished)
	attrs := []slog.Attr{slog.String("remote", f.Remote)}
	if account != "" {
		attrs = append(attrs, slog.String("account", account))
	}
	g.record(ctx, slog.LevelInfo, eventSignInFinished, f.Principal, attrs...)
}

// signInRefused notes a callback that was refused; f is nil if nobody knows
// whose it would have been.
func (g *Gateway) signInRefused(ctx context.Context, f *auth.Finished, why error) {
	var p auth.Principal
	remote := ""
	if f != nil {
		p, remote = f.Principal, f.Remote
	}
	g.metrics.signIn(remote, signInRefused)
	g.record(ctx, slog.LevelWarn, eventSignInRefused, p, slog.String("remote", remote), slog.String("why", whyRefused(why)))
}

// whyRefused is a word for each way in which a sign-in fails.
func whyRefused(err error) string {
	for _, known := range []struct {
		err error
		why string
	}{
		{auth.ErrWrongBrowser, "wrong_browser"}, {auth.ErrWrongRemote, "wrong_remote"}, {auth.ErrWrongPerson, "wrong_person"}, {auth.ErrNotLoggedIn, "not_logged_in"}, {auth.ErrIssuerMismatch, "issuer_mismatch"},
		{auth.ErrDenied, "denied"}, {auth.ErrExchange, "exchange_failed"}, {auth.ErrStateUnknown, "state_unknown"},
	} {
		if errors.Is(err, known.err) {
			return known.why
		}
	}
	return "failed"
}

func (g *Gateway) signedOut(ctx context.Context, p auth.Principal, remote string, revoked bool) {
	g.record(ctx, slog.LevelInfo, eventSignOut, p, slog.String("remote", remote), slog.Bool("revoked", revoked))
}
