package gateway

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"time"

	"github.com/modelcontextprotocol/go-sdk/jsonrpc"

	"gatehouse/auth"
	"gatehouse/session"
)

// This file is the one place where errors become answers: results and errors
// of MCP for the client, pages for the browser. The client gets a sentence
// with what to do next; the cause goes to the log.

// Outcomes of the gateway's own.
var (
	errUnknownMethod = errors.New("method not found")
	errTooMany       = errors.New("too many requests")
	errForeignPage   = errors.New("posted from a page of another origin")
	errNotHere       = errors.New("nobody is known to be at this browser")
	errOldPage       = errors.New("a form of a page that is out of date")
	errDraining      = errors.New("the gateway is shutting down")
	errNoAnswer      = errors.New("the client did not answer in time")
)

// invalidParams says what was wrong with the params of a request.
type invalidParams struct{ say string }

func (e *invalidParams) Error() string { return e.say }

// Codes of JSON-RPC errors.
const (
	codeAuthRequired = -31401 // its data is what authRequired is in JSON
	codeNotFound     = -32002 // a resource, up to protocol 2025-11-25
)

// notFound: no remote has the resource.
type notFound struct {
	uri    string
	modern bool // the client's era
}

func (e *notFound) Error() string { return "resource not found" }

func (e *notFound) render() *jsonrpc.Error {
	code := int64(codeNotFound)
	if e.modern {
		code = jsonrpc.CodeInvalidParams
	}
	data, err := json.Marshal(map[string]string{"uri": e.uri})
	if err != nil {
		data = nil // a string always has an encoding
	}
	return &jsonrpc.Error{Code: code, Message: "resource not found", Data: data}
}

// metaAuthRequired is the key under _meta of a result that asks for a sign-in.
const metaAuthRequired = "gatehouse/auth_required"

// authRequired is what a client gets as JSON when a person has to sign in.
type authRequired struct {
	Status     string `json:"status"` // always "auth_required"
	AuthURL    string `json:"auth_url"`
	ServerName string `json:"server_name"`
	Message    string `json:"message"`
}

// whySignIn says in a sentence why a sign-in is needed.
func whySignIn(e *auth.RequiredError) string {
	why := reasonToSignIn(e)
	if e.Stranger {
		why += " (Somebody logged in with another account has opened the link for it and was refused: keep it to yourself.)"
	}
	if len(e.Strangers) > 0 {
		why += " (" + strangersSay(e.Strangers) + ")"
	}
	return why
}

// strangersSay is what the owner of links is told that somebody else has opened.
func strangersSay(remotes []string) string {
	return "Somebody logged in with another account has opened a sign-in link of yours, for " + strings.Join(remotes, " and for ") + ", and was refused: keep such links to yourself."
}

func reasonToSignIn(e *auth.RequiredError) string {
	switch e.Reason {
	case auth.ReasonExpired:
		return "The sign-in at " + e.Remote + " has run out."
	case auth.ReasonRefused:
		return e.Remote + " no longer accepts the sign-in that was made for it."
	case auth.ReasonMoreScopes:
		return e.Remote + " asks for more permissions than were granted."
	}
	return e.Remote + " needs you to sign in."
}

// elicitation is what a client shows beside a link that it opens itself.
func elicitation(e *auth.RequiredError) string {
	return whySignIn(e) + " Open the link in your browser and sign in there; the request goes on after it."
}

// newAuthRequired words the request for a sign-in; then is what to do after it.
func newAuthRequired(e *auth.RequiredError, now time.Time, then string) authRequired {
	minutes := max(1, int(e.Expires.Sub(now).Round(time.Minute)/time.Minute))
	return authRequired{
		Status:     "auth_required",
		AuthURL:    e.AuthURL,
		ServerName: e.Remote,
		Message: fmt.Sprintf("%s Open this link in your browser: %s — then %s. The link works for %s.",
			whySignIn(e), e.AuthURL, then, plural(minutes, "minute")),
	}
}

func plural(n int, unit string) string {
	if n == 1 {
		return "1 " + unit
	}
	return fmt.Sprintf("%d %ss", n, unit)
}

// signInResult is the tool result that asks for a sign-in: a sentence for
// people and models first, the JSON second and under _meta. It has no
// structuredContent, which would have to fit the tool's outputSchema.
func signInResult(required authRequired, isError bool) (json.RawMessage, error) {
	data, err := json.Marshal(required)
	if err != nil {
		return nil, fmt.Errorf("encoding auth_required: %w", err)
	}
	return json.Marshal(toolResult{
		Meta:    map[string]any{metaAuthRequired: json.RawMessage(data)},
		Content: []textContent{text(required.Message), text(string(data))},
		IsError: isError,
	})
}

// toolResult is a result of tools/call that the gateway makes itself.
type toolResult struct {
	Meta       map[string]any `json:"_meta,omitempty"`
	Content    []textContent  `json:"content"`
	Structured any            `json:"structuredContent,omitempty"`
	IsError    bool           `json:"isError,omitempty"`
}

type textContent struct {
	Type string `json:"type"`
	Text string `json:"text"`
}

func text(s string) textContent { return textContent{"text", s} }

// renderCall turns the error of a tools/call into a result where the call was
// understood, and leaves it an error where it was not.
func renderCall(err error, now time.Time) (json.RawMessage, error) {
	if required, ok := errors.AsType[*auth.RequiredError](err); ok {
		return signInResult(newAuthRequired(required, now, "repeat the same call"), true)
	}
	if say, ok := sentence(err); ok {
		return json.Marshal(toolResult{Content: []textContent{text(say)}, IsError: true})
	}
	return nil, err
}

// sentence returns what a user should read about a failure at a remote, if
// that is what err is.
func sentence(err error) (string, bool) {
	if failure, ok := errors.AsType[*session.Failure](err); ok {
		return failure.Say, true
	}
	if failure, ok := errors.AsType[*auth.Error](err); ok {
		return fmt.Sprintf("%s: %s", failure.Remote, failure.Say), true
	}
	if limit, ok := errors.AsType[*limited](err); ok {
		return limit.say(), true
	}
	switch {
	case errors.Is(err, auth.ErrDisabled):
		return "This remote wants a sign-in, but sign-in is switched off in the gateway's config (gateway.oauth.enabled).", true
	case errors.Is(err, session.ErrClosed):
		return "The gateway is shutting down, or this session has ended. Repeat the call when it is back.", true
	case errors.Is(err, errNoAnswer):
		return fmt.Sprintf("The remote asked your client something, and there was no answer within %s. Repeat the call.", plural(int(answerWait.Minutes()), "minute")), true
	case errors.Is(err, session.ErrFull):
		return "The gateway serves as many sessions as it may (gateway.limits.sessions). Close other clients and try again.", true
	}
	return "", false
}

// renderRPC turns an error into the JSON-RPC error that the client gets.
func renderRPC(err error, now time.Time) *jsonrpc.Error {
	if required, ok := errors.AsType[*auth.RequiredError](err); ok {
		answer := newAuthRequired(required, now, "repeat the request")
		data, err := json.Marshal(answer)
		if err != nil {
			return &jsonrpc.Error{Code: jsonrpc.CodeInternalError, Message: answer.Message}
		}
		return &jsonrpc.Error{Code: codeAuthRequired, Message: answer.Message, Data: data}
	}
	if needs, ok := errors.AsType[*needsURL](err); ok {
		data, err := json.Marshal(map[string]any{"elicitations": []urlElicitation{needs.elicitation}})
		if err != nil {
			data = nil // strings always have an encoding
		}
		return &jsonrpc.Error{Code: codeURLElicitation, Message: needs.elicitation.Message, Data: data}
	}
	if missing, ok := errors.AsType[*notFound](err); ok {
		return missing.render()
	}
	if remote, ok := errors.AsType[*session.ResponseError](err); ok {
		return &jsonrpc.Error{Code: remote.Code, Message: remote.Message, Data: remote.Data}
	}
	if invalid, ok := errors.AsType[*invalidParams](err); ok {
		return &jsonrpc.Error{Code: jsonrpc.CodeInvalidParams, Message: invalid.say}
	}
	if say, ok := sentence(err); ok {
		return &jsonrpc.Error{Code: jsonrpc.CodeInternalError, Message: say}
	}
	switch {
	case errors.Is(err, errUnknownMethod):
		return &jsonrpc.Error{Code: jsonrpc.CodeMethodNotFound, Message: "method not found"}
	case errors.Is(err, context.Canceled):
		return &jsonrpc.Error{Code: jsonrpc.CodeInternalError, Message: "the request was cancelled"}
	}
	return &jsonrpc.Error{Code: jsonrpc.CodeInternalError, Message: "internal error of the gateway; its log says more"}
}

// problem is an error as a page shows it.
type problem struct {
	status int
	title  string
	say    string
}

// renderPage turns the error of a sign-in into what the browser shows. No text
// of a provider or of the request gets into it.
func renderPage(err error, log *slog.Logger) problem {
	const again = " Go back to your assistant and repeat the call there: it gives you a new link."
	if failure, ok := errors.AsType[*auth.Error](err); ok {
		return problem{http.StatusBadRequest, "Sign-in failed", failure.Remote + ": " + failure.Say + "." + again}
	}
	switch {
	case errors.Is(err, auth.ErrFlowUnknown):
		return problem{http.StatusNotFound, "This link has expired", "The sign-in link is unknown, has been used or is too old." + again}
	case errors.Is(err, auth.ErrWrongPerson):
		return problem{http.StatusForbidden, "This link was made for another account", "You are logged in to the gateway with another account than the one that this sign-in is for. Nothing has been done. If both accounts are yours, log in with the other one."}
	case errors.Is(err, auth.ErrNotLoggedIn):
		return problem{http.StatusForbidden, "You are not logged in", "Your login at the gateway has ended. Log in and open the page again."}
	case errors.Is(err, auth.ErrWrongBrowser):
		return problem{http.StatusForbidden, "Another browser began this", "Only the browser that opened the sign-in link can finish it, and this one has no proof that it did." + again}
	case errors.Is(err, auth.ErrStateUnknown), errors.Is(err, auth.ErrWrongRemote):
		return problem{http.StatusBadRequest, "This sign-in cannot be finished", "The answer belongs to no sign-in that is waiting: it was used before, is too old, or was changed on the way." + again}
	case errors.Is(err, auth.ErrIssuerMismatch):
		return problem{http.StatusBadRequest, "Sign-in refused", "The answer came from another authorization server than the one that you were sent to. Nothing was stored." + again}
	case errors.Is(err, auth.ErrDenied):
		return problem{http.StatusBadRequest, "Access was not granted", "The authorization server did not grant access: you or it said no. Nothing was stored."}
	case errors.Is(err, auth.ErrExchange):
		return problem{http.StatusBadRequest, "Sign-in failed", "The authorization server did not hand out a token for this sign-in. The gateway's log says why." + again}
	case errors.Is(err, errForeignPage):
		return problem{http.StatusForbidden, "Not from this page", "The request came from a page of another site. Open the link itself and continue there."}
	case errors.Is(err, errNotHere):
		return problem{http.StatusForbidden, "Not from here", "This page is for the machine that the gateway runs on."}
	case errors.Is(err, errOldPage):
		return problem{http.StatusForbidden, "This page is out of date", "The gateway has been restarted, or its config has changed, since the page was opened. Open it again."}
	case errors.Is(err, errTooMany):
		return problem{http.StatusTooManyRequests, "Too many requests", "Wait a minute and try again."}
	case errors.Is(err, session.ErrFull):
		return problem{http.StatusTooManyRequests, "Too many users at once", "The gateway serves as many sessions as it may (gateway.limits.sessions). Wait a minute and try again."}
	case errors.Is(err, errDraining):
		return problem{http.StatusServiceUnavailable, "Shutting down", "The gateway is shutting down. Try again when it is back."}
	}
	log.Error("rendering a page", "error", err)
	return problem{http.StatusInternalServerError, "Something went wrong", "The gateway's log says more." + again}
}
