package auth

import (
	"errors"
	"fmt"
	"time"
)

// Outcomes of a sign-in that the edge turns into pages and results.
var (
	// ErrUnknownRemote: no remote of that name signs in by OAuth.
	ErrUnknownRemote = errors.New("no such remote")
	// ErrDisabled: the config switches OAuth towards remotes off.
	ErrDisabled = errors.New("OAuth sign-in is switched off in the config")
	// ErrSignInNeeded: no silent way to a token is left.
	ErrSignInNeeded = errors.New("sign-in needed")
	// ErrRefreshDue: only a refresh would help, and nobody waits for one ([NoRefresh]).
	ErrRefreshDue = errors.New("the token has to be refreshed first, which is left to a call")
	// ErrNoSignIn: the remote neither asks for a sign-in nor says how to do one.
	ErrNoSignIn = errors.New("the remote does not offer a sign-in")
	// ErrFlowUnknown: no such link, or it has expired.
	ErrFlowUnknown = errors.New("unknown or expired sign-in link")
	// ErrStateUnknown: the callback is malformed, or its state is missing,
	// unknown, expired or used.
	ErrStateUnknown = errors.New("unknown, expired or used state")
	// ErrWrongRemote: the callback arrived at another remote's redirect URI.
	ErrWrongRemote = errors.New("callback for another remote")
	// ErrWrongBrowser: the browser that finishes is not the one that began.
	ErrWrongBrowser = errors.New("callback from another browser")
	// ErrWrongPerson: another account is logged in at the browser than the one that
	// the sign-in is for, or none.
	ErrWrongPerson = errors.New("opened by another account")
	// ErrIssuerMismatch: the authorization response is from another issuer (RFC 9207).
	ErrIssuerMismatch = errors.New("authorization response from another issuer")
	// ErrDenied: the authorization server answered with an error.
	ErrDenied = errors.New("the authorization server did not grant access")
	// ErrExchange: the code could not be exchanged for a token.
	ErrExchange = errors.New("the code could not be exchanged for a token")
)

// Reason says why a sign-in is asked for.
type Reason string

const (
	ReasonSignIn     Reason = "sign_in"     // nothing is held yet
	ReasonExpired    Reason = "expired"     // the grant ran out and cannot be refreshed
	ReasonRefused    Reason = "refused"     // the remote rejected a token that looked valid
	ReasonMoreScopes Reason = "more_scopes" // RFC 6750 insufficient_scope
)

// RequiredError says that a person has to sign in, and where.
type RequiredError struct {
	Remote  string
	AuthURL string    // the gateway's own page, absolute
	Expires time.Time // of the link
	Reason  Reason
	Issuer  string // who will ask for the sign-in

	Stranger bool // somebody else has opened the link, in vain
	// Strangers are remotes of which the same is true of an earlier link, or of
	// another's; set by who knows that it has not been said (see
	// [Broker.UntoldStrangers]).
	Strangers []string

	flow string
}

func (e *RequiredError) Error() string {
	return fmt.Sprintf("%s: sign-in required (%s)", e.Remote, e.Reason)
}

// Kind classes an [Error].
type Kind string

const (
	KindDiscovery    Kind = "discovery"    // the remote's or its authorization server's documents
	KindRegistration Kind = "registration" // no way to a client id
	KindToken        Kind = "token"        // the token endpoint's answer
	KindDenied       Kind = "denied"       // the authorization server, or the user there, said no
	KindForbidden    Kind = "forbidden"    // 403 that more scopes would not mend
	KindUnavailable  Kind = "unavailable"  // the authorization server cannot be reached or fails
	KindInternal     Kind = "internal"     // the store, say
)

// Error is a failure on the way to a token.
type Error struct {
	Kind   Kind
	Remote string
	Say    string // for the user: what was wrong and what to do; no secret, no foreign text
	Err    error  // the cause, for the log; may be nil
}

func (e *Error) Error() string {
	if e.Err == nil {
		return e.Remote + ": " + e.Say
	}
	return e.Remote + ": " + e.Say + ": " + e.Err.Error()
}

func (e *Error) Unwrap() error { return e.Err }
