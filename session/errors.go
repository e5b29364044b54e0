package session

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"syscall"
	"time"

	"gatehouse/auth/guard"
)

var (
	// ErrFull: there are as many sessions as there may be.
	ErrFull = errors.New("too many sessions")
	// ErrClosed: the session or the pool has been closed.
	ErrClosed = errors.New("session closed")
	// ErrUnknownRemote: no remote of that name is configured.
	ErrUnknownRemote = errors.New("no such remote")
)

// ResponseError is the JSON-RPC error with which a remote answered. It is for
// the client that asked: message and data are the remote's own.
type ResponseError struct {
	Code    int64
	Message string
	Data    json.RawMessage // nil: none
}

// Error leaves the remote's text out: it could hold anything, and errors get
// into logs.
func (e *ResponseError) Error() string { return fmt.Sprintf("JSON-RPC error %d", e.Code) }

// Kind classes a [Failure].
type Kind string

const (
	KindUnreachable Kind = "unreachable" // no connection to it: down, wrong address, TLS
	KindTimeout     Kind = "timeout"     // it did not answer in time
	KindBadAnswer   Kind = "badAnswer"   // what it answered is not MCP
	KindStatus      Kind = "status"      // an HTTP status that is a refusal
	KindCut         Kind = "cut"         // the answer broke off, or never began
	KindSessionGone Kind = "sessionGone" // it forgot the MCP session, twice
	KindBlocked     Kind = "blocked"     // the config does not allow its address
	KindTooLarge    Kind = "tooLarge"    // more than is read
	KindUnsupported Kind = "unsupported" // a protocol version that is not spoken here
)

// Failure is a remote that gave no proper answer.
type Failure struct {
	Remote string
	Kind   Kind
	Status int           // the HTTP status of a [KindStatus]
	Retry  time.Duration // how long to wait first, as a 429 said; 0: it did not
	Say    string        // for the user: what was wrong and what to do; no secret, no foreign text
	Err    error         // the cause, for the log; may be nil
}

func (f *Failure) Error() string {
	if f.Err == nil {
		return f.Say
	}
	return f.Say + " (" + f.Err.Error() + ")"
}

func (f *Failure) Unwrap() error { return f.Err }

// deadline is the cause of a context that ended because the remote was too slow.
type deadline struct {
	after time.Duration
	call  bool // the config says how long
}

func (d *deadline) Error() string { return fmt.Sprintf("no answer within %v", d.after) }

// errNoCause is an error whose text is not ours to repeat.
var errNoCause = errors.New("the connection broke")

// cause returns what may be logged of an error of net/http. Its own errors
// hold the URL with the query, and some hold what the remote sent.
func cause(err error) error {
	if e, ok := errors.AsType[*url.Error](err); ok {
		err = e.Err
	}
	if errors.Is(err, guard.ErrBlocked) {
		return err
	}
	if e, ok := errors.AsType[*net.OpError](err); ok {
		return e
	}
	if e, ok := errors.AsType[*net.DNSError](err); ok {
		return e
	}
	if e, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		return e
	}
	if e, ok := errors.AsType[tls.RecordHeaderError](err); ok {
		return e
	}
	if e, ok := errors.AsType[tls.AlertError](err); ok {
		return e
	}
	if e, ok := errors.AsType[syscall.Errno](err); ok {
		return e
	}
	for _, known := range []error{io.EOF, io.ErrUnexpectedEOF, http.ErrSchemeMismatch} {
		if errors.Is(err, known) {
			return known
		}
	}
	return fmt.Errorf("%w (%T)", errNoCause, err)
}

// fail makes a Failure of this remote. The sentence begins with its name.
func (r *remote) fail(kind Kind, err error, format string, args ...any) *Failure {
	return &Failure{Remote: r.Name, Kind: kind, Err: err, Say: r.Name + " " + fmt.Sprintf(format, args...)}
}

// broken makes the error of a request whose answer did not come, or not whole.
func (r *remote) broken(ctx context.Context, err error) error {
	if ended := r.ended(ctx); ended != nil {
		return ended
	}
	if errors.Is(err, errTooLarge) {
		return r.fail(KindTooLarge, nil, "answered with a message of more than %d MiB, which is not read. Ask for less.", maxMessage>>20)
	}
	c := cause(err)
	if say, ok := unreachable(err); ok {
		return r.fail(KindUnreachable, c, "cannot be reached at %s: %s", r.display, say)
	}
	if errors.Is(err, guard.ErrBlocked) {
		return r.fail(KindBlocked, c, `is at an address that the gateway does not connect to: %s. A private address must be listed in the remote's "allowAddresses".`, r.display)
	}
	return r.fail(KindCut, c, "ended the connection without a complete answer. The request may have been carried out all the same: check before you repeat it.")
}

// ended returns the error of a request whose context is done, or nil.
func (r *remote) ended(ctx context.Context) error {
	if ctx.Err() == nil {
		return nil
	}
	cause := context.Cause(ctx)
	if d, ok := errors.AsType[*deadline](cause); ok {
		advice := "Is it running properly?"
		if d.call {
			advice = `Try again, or raise its "timeout" in the config if it needs longer.`
		}
		return r.fail(KindTimeout, nil, "did not answer within %s. %s", plain(d.after), advice)
	}
	return fmt.Errorf("asking %s: %w", r.Name, cause)
}

// plain writes a duration without its zero parts: 1m0s as 60 s.
func plain(d time.Duration) string {
	if d%time.Second == 0 {
		return fmt.Sprintf("%d s", d/time.Second)
	}
	return d.String()
}

// unreachable says why no connection came about, if none did.
func unreachable(err error) (string, bool) {
	if e, ok := errors.AsType[*net.DNSError](err); ok {
		if e.IsNotFound {
			return `its name does not resolve. Check the "url" in the config.`, true
		}
		return "its name could not be resolved. Check the network.", true
	}
	if e, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		if _, ok := errors.AsType[x509.UnknownAuthorityError](e); ok {
			return `its TLS certificate is signed by an authority that is not trusted here. If it is your own, set "tls": {"ca": …} for this remote.`, true
		}
		return "its TLS certificate is not valid for it. Ask its operator.", true
	}
	if _, ok := errors.AsType[tls.RecordHeaderError](err); ok || errors.Is(err, http.ErrSchemeMismatch) {
		return "it does not speak TLS there. Is it http:// instead of https://?", true
	}
	if _, ok := errors.AsType[tls.AlertError](err); ok {
		return "it refused the TLS handshake. Does it want a client certificate?", true
	}
	if errors.Is(err, guard.ErrBlocked) { // the dialer said so
		return "", false
	}
	e, ok := errors.AsType[*net.OpError](err)
	switch {
	case !ok:
		// The request's own deadline is not in err, so only the handshake's is left.
		slow, _ := errors.AsType[net.Error](err)
		return "no TLS handshake within 5 s. Is it running properly?", slow != nil && slow.Timeout()
	case e.Op == "proxyconnect" || strings.Contains(e.Op, "socks"):
		return "the proxy gave no connection to it.", true
	case e.Op == "remote error": // a TLS alert
		return "it refused the TLS handshake. Does it want a client certificate?", true
	case e.Op != "dial":
		return "", false
	case errors.Is(err, syscall.ECONNREFUSED):
		return "connection refused. Is it running?", true
	case e.Timeout():
		return "no connection within 5 s. Is it running, and is the network up?", true
	}
	return "no connection. Is it running, and is the network up?", true
}
