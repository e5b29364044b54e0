package session

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"sync"
	"time"

	"gatehouse/session/rawjson"
)

const (
	notifyProgress  = "notifications/progress"
	notifyCancelled = "notifications/cancelled"
	notifyMessage   = "notifications/message"
)

// remint replaces the progress token in a request's params by one of the
// gateway's, so that two clients with the same token never meet at a remote, nor
// two remotes at a client. It returns the token that was there, nil for none.
func remint(params json.RawMessage, minted string) (out, token json.RawMessage, err error) {
	// Hardly any call asks for progress, and most are not worth a second look. A
	// client that writes the key with escapes goes without.
	if !bytes.Contains(params, []byte(`"progressToken"`)) {
		return params, nil, nil
	}
	got, err := rawjson.Get(params, "_meta")
	if err != nil {
		return nil, nil, fmt.Errorf("reading params: %w", err)
	}
	meta := got[0]
	if meta == nil || meta[0] != '{' {
		return params, nil, nil
	}
	if got, err = rawjson.Get(meta, "progressToken"); err != nil {
		return nil, nil, fmt.Errorf("reading _meta: %w", err)
	}
	if token = got[0]; token == nil {
		return params, nil, nil
	}
	if meta, err = rawjson.Set(meta, "progressToken", []byte(minted)); err != nil {
		return nil, nil, fmt.Errorf("replacing the progress token: %w", err)
	}
	if out, err = rawjson.Set(params, "_meta", meta); err != nil {
		return nil, nil, fmt.Errorf("replacing _meta: %w", err)
	}
	return out, token, nil
}

// maxReports is how many reports of a client's progress wait to be sent. What is
// more is left out: the next says how far it is then.
const maxReports = 16

// question is what a client is asked, while it may report its progress with it.
type question struct {
	client  any
	token   json.RawMessage // the remote's
	reports chan json.RawMessage
}

// questions are those that clients are being asked, by the tokens that they have.
type questions struct {
	mu      sync.Mutex // guards byToken; reports are closed under it
	byToken map[string]*question
}

// Progress passes on what a client says about its progress with something that a
// remote asks it ([Caller]). Params are those of its notification.
func (s *Session) Progress(client any, params json.RawMessage) {
	got, err := rawjson.Get(params, "progressToken")
	if err != nil {
		return
	}
	s.questions.mu.Lock()
	defer s.questions.mu.Unlock()
	q := s.questions.byToken[string(got[0])]
	if q == nil || q.client != client {
		return
	}
	if params, err = rawjson.Set(params, "progressToken", q.token); err != nil {
		return
	}
	select {
	case q.reports <- params:
	default:
	}
}

// reportable gives what a client is asked a progress token of the gateway's, and
// sends the remote what the client reports with it, one after the other, until
// end is called. The remote has heard all of it when that returns.
func (l *link) reportable(c *call, params json.RawMessage) (out json.RawMessage, end func(), err error) {
	minted := `"` + rand.Text() + `"`
	out, token, err := remint(params, minted)
	if err != nil {
		return nil, nil, &ResponseError{Code: codeInvalidParams, Message: "The params have a member twice"}
	}
	// Nothing of it could come back from a client without a session, nor go to a
	// remote without one.
	if token == nil || c.from.Client == nil || l.modern {
		return out, func() {}, nil
	}
	s := c.session
	q := &question{c.from.Client, token, make(chan json.RawMessage, maxReports)}
	s.questions.mu.Lock()
	if s.questions.byToken == nil {
		s.questions.byToken = map[string]*question{}
	}
	s.questions.byToken[minted] = q
	s.questions.mu.Unlock()
	ctx, cancel := context.WithCancel(s.ctx)
	var sending sync.WaitGroup
	sending.Go(func() {
		for params := range q.reports {
			l.report(ctx, params)
		}
	})
	return out, func() {
		s.questions.mu.Lock()
		delete(s.questions.byToken, minted)
		close(q.reports)
		s.questions.mu.Unlock()
		// The answer waits for them, but not for long.
		late := time.AfterFunc(asideTimeout, cancel)
		sending.Wait()
		late.Stop()
		cancel()
	}, nil
}

// report sends a remote a client's progress.
func (l *link) report(ctx context.Context, params json.RawMessage) {
	c := l.connection
	body, err := appendRequest(nil, 0, notifyProgress, params)
	if err == nil {
		err = c.wire.authorized(ctx, false, func() error {
			ctx, cancel := context.WithTimeout(ctx, asideTimeout)
			defer cancel()
			return l.via.notify(ctx, l.header, body)
		})
	}
	if err != nil {
		c.session.log.Debug("client's progress not delivered", "remote", c.remote.Name, "error", err)
	}
}
