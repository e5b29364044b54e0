// Package endpoint makes requests at the token endpoints of authorization
// servers, and at those beside them that clients authenticate to in the same
// way: one POST of a form each, and an answer that is judged before anybody
// uses it. What a server writes is foreign: no text of it gets into an error but
// the codes that the standards define.
package endpoint

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"gatehouse/auth/guard"
	"gatehouse/auth/secret"
)

// Ways for a client to authenticate, by their registered names.
const (
	MethodNone  = "none"
	MethodBasic = "client_secret_basic"
	MethodPost  = "client_secret_post"
	MethodJWT   = "private_key_jwt"
)

// Client is who asks at an endpoint.
type Client struct {
	ID     string
	Secret secret.Text
	Method string // token_endpoint_auth_method; empty: by what there is, a key, a secret or neither

	// For private_key_jwt.
	Key      *Key   // required for it
	Audience string // whom the assertions are for: the server's issuer
}

// Answer is a token endpoint's answer that may be used.
type Answer struct {
	Access, Refresh, ID secret.Text
	ExpiresIn           time.Duration // 0: the server did not say
	Scope               string        // as it came, which may be anything; empty: the server did not say
	Type                string        // token_type: Bearer or N_A, whatever its case was
	IssuedType          string        // issued_token_type of RFC 8693; empty: the server did not say
}

// GrantExchange is the grant type of RFC 8693.
const GrantExchange = "urn:ietf:params:oauth:grant-type:token-exchange"

// NoType is the token_type of what an exchange issued that is no access token
// (RFC 8693 section 2.2.1).
const NoType = "N_A"

// Error is an answer that may not be used, or none. Nothing of the
// server's own text is in it but an error code that RFC 6749 knows.
type Error struct {
	Status int    // 0: no answer
	Code   string // of the answer, "other" if we do not know it
	What   string
	Err    error
	Retry  time.Duration // that the server asked to wait; 0: it did not
	Left   bool          // the one who asked had no more time, whatever the server would have said
}

func (e *Error) Error() string {
	var s strings.Builder
	s.WriteString(e.What)
	if e.Status != 0 {
		fmt.Fprintf(&s, " (status %d", e.Status)
		if e.Code != "" {
			s.WriteString(", " + e.Code)
		}
		s.WriteString(")")
	}
	if e.Err != nil {
		s.WriteString(": " + e.Err.Error())
	}
	return s.String()
}

func (e *Error) Unwrap() error { return e.Err }

// Refused reports whether the server has decided, as opposed to failed.
func (e *Error) Refused() bool {
	return e.Code != "" && e.Status < 500 && e.Status != http.StatusTooManyRequests &&
		e.Code != "temporarily_unavailable" && e.Code != "server_error"
}

// Unanswered reports whether the server may have acted on a request although
// nobody knows its answer.
func (e *Error) Unanswered() bool {
	switch {
	case e.Status >= 500:
		// Of somebody in between, or of a server that failed half-way; RFC 9110
		// section 15.6.4: 503 is from one that is "unable to handle the request".
		return e.Status != http.StatusServiceUnavailable
	case e.Status != 0:
		return e.Code == "" && e.Status < 300
	case e.Err == nil, errors.Is(e.Err, guard.ErrBlocked):
		return false // not sent
	}
	dial, ok := errors.AsType[*net.OpError](e.Err)
	return !ok || dial.Op != "dial"
}

// EndedHandshake reports whether a server answered with a TLS alert, as one does
// that wants a client certificate. Which alert it was has no type.
func (e *Error) EndedHandshake() bool {
	op, ok := errors.AsType[*net.OpError](e.Err)
	return ok && op.Op == "remote error"
}

// Error codes of RFC 6749 sections 4.1.2.1 and 5.2, RFC 8707 and OpenID Connect
// that may be named in logs and sentences.
var knownCodes = []string{
	"access_denied", "account_selection_required", "consent_required", "interaction_required",
	"invalid_client", "invalid_grant", "invalid_request", "invalid_scope", "invalid_target", "login_required",
	"server_error", "temporarily_unavailable", "unauthorized_client", "unsupported_grant_type",
	"unsupported_response_type",
}

// KnownCode keeps foreign text out: what we do not know is "other".
func KnownCode(code string) string {
	if code == "" || slices.Contains(knownCodes, code) {
		return code
	}
	return "other"
}

// Post sends one authenticated POST, adding to the form what the client's
// method needs. What the answer says is the caller's to judge, and its body the
// caller's to close. Its failures are [*Error]s.
func Post(ctx context.Context, hc *http.Client, endpoint string, c Client, form url.Values) (*http.Response, error) {
	basic := false
	switch method := cmp.Or(c.Method, defaultMethod(c)); method {
	case MethodNone:
		form.Set("client_id", c.ID)
	case MethodBasic:
		basic = true
	case MethodPost:
		form.Set("client_id", c.ID)
		form.Set("client_secret", c.Secret.Value())
	case MethodJWT:
		assertion, err := c.assertion()
		if err != nil {
			return nil, err
		}
		// RFC 7523 section 2.2.
		form.Set("client_id", c.ID)
		form.Set("client_assertion_type", "urn:ietf:params:oauth:client-assertion-type:jwt-bearer")
		form.Set("client_assertion", assertion)
	default:
		return nil, &Error{What: "the client's authentication method is not supported"}
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, endpoint, strings.NewReader(form.Encode()))
	if err != nil {
		return nil, &Error{What: "the endpoint is no URL"}
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	req.Header.Set("Accept", "application/json")
	if basic {
		// RFC 6749 section 2.3.1: "The client identifier is encoded using the
		// "application/x-www-form-urlencoded" encoding algorithm [...] and the
		// encoded value is used as the username; the client password is encoded
		// using the same algorithm and used as the password."
		req.SetBasicAuth(url.QueryEscape(c.ID), url.QueryEscape(c.Secret.Value()))
	}
	resp, err := hc.Do(req)
	if err != nil {
		return nil, &Error{What: "no answer", Err: WithoutURL(err), Left: ctx.Err() != nil}
	}
	return resp, nil
}

func defaultMethod(c Client) string {
	if c.Key != nil {
		return MethodJWT
	}
	if c.Secret.IsEmpty() {
		return MethodNone
	}
	return MethodBasic
}

// WithoutURL drops the URL, whose query may hold anything, from an error of
// net/http.
func WithoutURL(err error) error {
	if e, ok := errors.AsType[*url.Error](err); ok {
		return e.Err
	}
	return err
}

// Token makes one token request and checks the answer. hc is a guarded client,
// which follows no redirect of a POST, bounds the answer and has a deadline.
// Its failures are [*Error]s.
func Token(ctx context.Context, hc *http.Client, endpoint string, c Client, form url.Values) (*Answer, error) {
	resp, err := Post(ctx, hc, endpoint, c, form)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, &Error{Status: resp.StatusCode, What: "the answer could not be read", Err: WithoutURL(err), Left: ctx.Err() != nil}
	}
	answer, err := ParseAnswer(resp.StatusCode, resp.Header.Get("Content-Type"), body)
	if err != nil {
		if e, ok := errors.AsType[*Error](err); ok {
			e.Retry = RetryAfter(resp.Header.Get("Retry-After"), time.Now())
		}
		return nil, err
	}
	// RFC 6749 section 7.1: "The client MUST NOT use an access token if it does
	// not understand the token type." RFC 8693 section 2.2.1 adds N_A, of tokens
	// that are no access tokens, to exchanges alone.
	if answer.Type != "Bearer" && form.Get("grant_type") != GrantExchange {
		return nil, &Error{Status: resp.StatusCode, What: "the token_type is not Bearer"}
	}
	return answer, nil
}

// MaxRetryAfter is the longest wait that a server may ask for.
const MaxRetryAfter = time.Hour

// RetryAfter reads RFC 9110 section 10.2.3: "a date or a number of seconds". It
// is 0 where there is nothing to read.
func RetryAfter(header string, now time.Time) time.Duration {
	var wait time.Duration
	if seconds, err := strconv.ParseUint(header, 10, 31); err == nil {
		wait = time.Duration(seconds) * time.Second
	} else if date, err := http.ParseTime(header); err == nil {
		wait = date.Sub(now)
	}
	return min(max(wait, 0), MaxRetryAfter)
}

// ParseAnswer reads a token endpoint's answer, which is foreign input.
func ParseAnswer(status int, contentType string, body []byte) (*Answer, error) {
	bad := func(what string) error { return &Error{Status: status, What: what} }
	media, _, err := mime.ParseMediaType(contentType)
	isJSON := err == nil && (media == "application/json" || strings.HasSuffix(media, "+json"))
	var a struct {
		AccessToken  string          `json:"access_token"`
		TokenType    string          `json:"token_type"`
		RefreshToken string          `json:"refresh_token"`
		IDToken      string          `json:"id_token"`
		ExpiresIn    json.RawMessage `json:"expires_in"`
		Scope        json.RawMessage `json:"scope"`
		IssuedType   json.RawMessage `json:"issued_token_type"`
		Error        string          `json:"error"`
	}
	valid := isJSON && json.Unmarshal(body, &a) == nil
	// Some servers send errors with status 200.
	if valid && a.Error != "" && status < 500 {
		return nil, &Error{Status: status, Code: KnownCode(a.Error), What: "the token endpoint answered with an error"}
	}
	switch {
	case status >= 300 && status < 400:
		return nil, bad("the token endpoint redirected, which is not followed")
	case status != http.StatusOK:
		return nil, bad("the token endpoint failed")
	case !isJSON:
		return nil, bad("the token endpoint's answer is not JSON")
	case !valid:
		return nil, bad("the token endpoint's answer is not the JSON that it should be")
	case a.AccessToken == "":
		return nil, bad("the token endpoint's answer holds no access_token")
	case !VisibleASCII(a.AccessToken), !VisibleASCII(a.RefreshToken), !VisibleASCII(a.IDToken):
		return nil, bad("a token holds characters that no token may hold")
	}
	answer := &Answer{Access: secret.New(a.AccessToken), Refresh: secret.New(a.RefreshToken), ID: secret.New(a.IDToken)}
	switch {
	case strings.EqualFold(a.TokenType, "Bearer"):
		answer.Type = "Bearer"
	case strings.EqualFold(a.TokenType, NoType):
		answer.Type = NoType
	default:
		return nil, bad("the token_type is not Bearer")
	}
	if answer.ExpiresIn, err = parseLifetime(a.ExpiresIn); err != nil {
		return nil, bad("expires_in is no sensible number of seconds")
	}
	// Some servers send a list, or a number, where nobody looks.
	if len(a.Scope) > 0 && json.Unmarshal(a.Scope, &answer.Scope) != nil {
		answer.Scope = ""
	}
	if len(a.IssuedType) > 0 && json.Unmarshal(a.IssuedType, &answer.IssuedType) != nil {
		return nil, bad("issued_token_type is no text")
	}
	return answer, nil
}

// VisibleASCII: what fits a header and, by RFC 6750, a bearer token.
func VisibleASCII(s string) bool {
	for i := range len(s) {
		if s[i] <= ' ' || s[i] > '~' {
			return false
		}
	}
	return true
}

// MaxLifetime keeps sums of times within what they can hold.
const MaxLifetime = 10 * 365 * 24 * time.Hour

// parseLifetime reads expires_in, which some servers send as a string. Absent,
// null and 0 mean that the server does not say: no server means a token to be
// useless from the start.
func parseLifetime(raw json.RawMessage) (time.Duration, error) {
	text := string(raw)
	if len(raw) > 0 && raw[0] == '"' {
		if err := json.Unmarshal(raw, &text); err != nil {
			return 0, err
		}
	}
	if text == "" || text == "null" {
		return 0, nil
	}
	seconds, err := strconv.ParseFloat(text, 64)
	// The negation also refuses NaN, which a string can hold.
	if err != nil || !(seconds >= 0) {
		return 0, errors.New("not a number of seconds")
	}
	if seconds > MaxLifetime.Seconds() {
		return MaxLifetime, nil
	}
	return time.Duration(seconds * float64(time.Second)), nil
}
