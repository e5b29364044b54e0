package auth

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"gatehouse/auth/endpoint"
	"gatehouse/auth/guard"
)

// maxDepth is how deeply a document may nest. None of those that OAuth defines
// comes near.
const maxDepth = 64

// documentError is a document that could not be had or must not be used.
// Nothing of the document's own text is in it, a checked host at most.
type documentError struct {
	status int    // 0: no answer
	cut    bool   // no answer, or not all of it
	what   string // continues "the document …"
	advice string // what to do about it; empty: see remedy
	retry  string // the Retry-After header
	err    error
}

func (e *documentError) Error() string {
	if e.err == nil {
		return e.what
	}
	return e.what + ": " + e.err.Error()
}

func (e *documentError) Unwrap() error { return e.err }

// absent reports whether the server says that there is no such document, which
// some say by refusing whoever has no token.
func (e *documentError) absent() bool {
	switch e.status {
	case http.StatusUnauthorized, http.StatusForbidden, http.StatusNotFound, http.StatusMethodNotAllowed, http.StatusGone:
		return true
	}
	return false
}

// transient reports whether the same request may do better later.
func (e *documentError) transient() bool {
	return e.cut || e.status == http.StatusRequestTimeout || e.status == http.StatusTooManyRequests || e.status >= 500
}

// remedy says what the user can do.
func (e *documentError) remedy() string {
	switch {
	case e.advice != "":
		return e.advice
	case errors.Is(e.err, guard.ErrBlocked):
		return "if it is meant to be there, list the address in the remote's allowAddresses"
	case e.transient():
		return "try again later"
	}
	return "ask its operator to correct that"
}

// getDocument fetches a JSON object, from an address that the client allows,
// in the time and size that it allows.
func getDocument[T any](ctx context.Context, c *guard.Client, address string) (*T, *documentError) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return nil, &documentError{what: "has an address that is no URL"}
	}
	req.Header.Set("Accept", "application/json")
	return doDocument[T](c, req, http.StatusOK)
}

// doDocument sends a request whose answer, with one of the statuses, is a JSON
// object.
func doDocument[T any](c *guard.Client, req *http.Request, statuses ...int) (*T, *documentError) {
	resp, err := c.Fetch().Do(req)
	if err != nil {
		err = endpoint.WithoutURL(err)
		if errors.Is(err, guard.ErrBlocked) {
			return nil, &documentError{what: "leads to an address that the gateway may not reach", err: err}
		}
		return nil, &documentError{cut: true, what: "cannot be reached", err: err}
	}
	defer resp.Body.Close()
	if !slices.Contains(statuses, resp.StatusCode) {
		return nil, &documentError{
			status: resp.StatusCode,
			what:   fmt.Sprintf("was answered with status %d", resp.StatusCode),
			retry:  resp.Header.Get("Retry-After"),
		}
	}
	refuse := func(what string, err error) (*T, *documentError) {
		return nil, &documentError{status: resp.StatusCode, what: what, err: err}
	}
	if !isJSON(resp.Header.Get("Content-Type")) {
		return refuse("does not come as application/json", nil)
	}
	body, err := io.ReadAll(resp.Body)
	switch {
	case errors.Is(err, guard.ErrTooLarge):
		return refuse("is larger than 1 MiB", err)
	case err != nil:
		return nil, &documentError{cut: true, what: "breaks off", err: endpoint.WithoutURL(err)}
	}
	v, err := parseDocument[T](body)
	if err != nil {
		return refuse("is not the JSON that it should be", err)
	}
	return v, nil
}

func isJSON(contentType string) bool {
	media, _, err := mime.ParseMediaType(contentType)
	return err == nil && (media == "application/json" || strings.HasSuffix(media, "+json"))
}

var (
	errDepth     = fmt.Errorf("nested more than %d deep", maxDepth)
	errDuplicate = errors.New("a member is there twice")
	errSyntax    = errors.New("not JSON, or a member of another type")
)

// parseDocument decodes a JSON object whose members are of type [once]. The
// decoder's own errors quote the document, so they stay here.
func parseDocument[T any](data []byte) (*T, error) {
	if tooDeep(data) {
		return nil, errDepth
	}
	v := new(T)
	if err := json.Unmarshal(data, v); errors.Is(err, errDuplicate) {
		return nil, errDuplicate
	} else if err != nil {
		return nil, errSyntax
	}
	return v, nil
}

// tooDeep counts brackets outside strings.
func tooDeep(data []byte) bool {
	depth, quoted := 0, false
	for i := 0; i < len(data); i++ {
		switch c := data[i]; {
		case quoted && c == '\\':
			i++
		case c == '"':
			quoted = !quoted
		case quoted:
		case c == '{', c == '[':
			if depth++; depth > maxDepth {
				return true
			}
		case c == '}', c == ']':
			depth--
		}
	}
	return false
}

// once is a member of a document. Two readers of a document in which a member
// is there twice may see two documents, so that is an error.
type once[T any] struct {
	value T
	set   bool
}

// UnmarshalJSON is called for each occurrence of the member.
func (o *once[T]) UnmarshalJSON(data []byte) error {
	if o.set {
		return errDuplicate
	}
	o.set = true
	return json.Unmarshal(data, &o.value)
}

// checkEndpoint refuses what must not be fetched, and above all not be shown
// to a browser or to whatever a user pastes it into.
func checkEndpoint(c *guard.Client, address string) error {
	const unsafe = "\"<>\\^`{|}" // in no URL, by RFC 3986
	refuse := func(why string) error { return fmt.Errorf("%w: %s", guard.ErrBlocked, why) }
	switch {
	case address == "" || len(address) > maxURLLength:
		return refuse("no URL")
	case !endpoint.VisibleASCII(address), strings.ContainsAny(address, unsafe), strings.Contains(address, "$("):
		return refuse("the URL holds characters that no URL may hold")
	}
	u, err := url.Parse(address)
	if err != nil {
		return refuse("not a URL")
	}
	query, err := url.QueryUnescape(u.RawQuery)
	if err != nil || strings.ContainsFunc(query, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		return refuse("the URL's query holds control characters")
	}
	return c.CheckURL(u)
}

// origin returns scheme and host of a URL that has been checked.
func origin(address string) string {
	u, err := url.Parse(address)
	if err != nil {
		return ""
	}
	return u.Scheme + "://" + u.Host
}

// withoutQuery is the form of a URL that may be shown.
func withoutQuery(address string) string {
	u, err := url.Parse(address)
	if err != nil {
		return ""
	}
	u.User, u.RawQuery, u.ForceQuery, u.Fragment, u.RawFragment = nil, "", false, "", ""
	return u.String()
}
