package auth

import (
	"context"
	"errors"
	"net/http"
	"slices"
	"strings"

	"golang.org/x/oauth2"

	"gatehouse/auth/secret"
)

// Remotes of one group share sign-ins, as far as the authorization server means
// them to. A token that says that it is for several of them serves each of
// these: one grant, lent by the remote that it was made for. Where it does not,
// the second sign-in is tried without a prompt first.

// mates are the other remotes of the group that users sign in to.
func (b *Broker) mates(r *Remote) []*Remote {
	var out []*Remote
	if r.SSOGroup == "" {
		return nil
	}
	for _, m := range b.remotes {
		if m.SSOGroup == r.SSOGroup && m.Name != r.Name && m.browser() && !m.login {
			out = append(out, m)
		}
	}
	slices.SortFunc(out, func(a, b *Remote) int { return strings.Compare(a.Name, b.Name) })
	return out
}

// covers reports whether a token says itself that it is for a resource.
func covers(token string, resource string) bool {
	c, ok := readIDToken(secret.New(token)) // any JWT of the form
	return ok && slices.ContainsFunc(c.audience(), func(aud string) bool { return sameResource(aud, resource) })
}

// lent returns the token of the grant that another remote of the group lends.
func (a *Authorizer) lent(ctx context.Context) (*oauth2.Token, error) {
	b := a.b
	b.mu.RLock()
	l, ok := b.loans[a.key]
	b.mu.RUnlock()
	if !ok {
		return nil, nil
	}
	token, err := b.Authorizer(a.key.principal, l.from).own(ctx)
	if token == nil || err != nil || !covers(token.AccessToken, l.resource) {
		return nil, err
	}
	return token, nil
}

// borrow looks for a grant of the group that is for this remote as well: at the
// same issuer, with a token that names it.
func (a *Authorizer) borrow(ctx context.Context, resp *http.Response) error {
	b, mates := a.b, a.b.mates(a.remote)
	mates = slices.DeleteFunc(mates, func(m *Remote) bool { return !b.holdsGrant(ctx, key{a.key.principal, m.Name}, m, "") })
	if len(mates) == 0 {
		return ErrSignInNeeded
	}
	b.mu.RLock()
	was, lent := b.loans[a.key]
	b.mu.RUnlock()
	sent := sentToken(resp)
	if lent && sent != "" {
		// Perhaps it only has to be refreshed.
		if err := b.Authorizer(a.key.principal, was.from).Renew(ctx, resp); err == nil {
			return nil
		} else if !errors.Is(err, ErrSignInNeeded) {
			return err
		}
		b.unlend(a.key)
		return ErrSignInNeeded
	}
	d, err := b.discover(ctx, a.remote, parseChallenge(resp.Header), nil)
	if err != nil {
		return asError(a.key.remote, err)
	}
	for _, m := range mates {
		if !b.holdsGrant(ctx, key{a.key.principal, m.Name}, m, d.Issuer) {
			continue
		}
		token, err := b.Authorizer(a.key.principal, m.Name).own(ctx)
		if err != nil || token == nil || token.AccessToken == sent || !covers(token.AccessToken, d.Resource) {
			continue
		}
		b.mu.Lock()
		b.loans[a.key] = loan{from: m.Name, resource: d.Resource}
		delete(b.loans, key{a.key.principal, m.Name}) // it has a grant of its own
		b.mu.Unlock()
		b.log.InfoContext(ctx, "a sign-in is shared inside its group", "remote", a.key.remote, "with", m.Name,
			"group", m.SSOGroup, "principal", a.key.principal, "issuer", d.Issuer)
		return nil
	}
	return ErrSignInNeeded
}

// loan is a grant of another remote that serves this one, too.
type loan struct {
	from     string
	resource string // that its token must name
}

// unlend forgets a loan.
func (b *Broker) unlend(k key) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.loans, k)
}

// holdsGrant reports whether a grant is there that is good for something; of the
// issuer, unless that is empty.
func (b *Broker) holdsGrant(ctx context.Context, k key, r *Remote, issuer string) bool {
	h, err := b.held(ctx, k, r)
	if err != nil || h == nil {
		return false
	}
	g := h.snapshot()
	return g != nil && g.fits(r) && (issuer == "" || g.Issuer == issuer) && (g.valid(b.now()) || g.refreshable())
}

// sharing returns whose grant serves a remote, which may be its own, and all
// that this grant serves if they are several.
func (b *Broker) sharing(k key) (from string, all []string) {
	b.mu.RLock()
	defer b.mu.RUnlock()
	from = k.remote
	if l, ok := b.loans[k]; ok {
		from = l.from
	}
	for other, l := range b.loans {
		if other.principal == k.principal && l.from == from {
			all = append(all, other.remote)
		}
	}
	if len(all) == 0 {
		return from, nil
	}
	all = append(all, from)
	slices.Sort(all)
	return from, all
}

// endLoans forgets the loans of a principal that come from a remote; all of the
// principal's if it is empty.
func (b *Broker) endLoans(p Principal, from string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for k, l := range b.loans {
		if k.principal == p && (from == "" || l.from == from) {
			delete(b.loans, k)
		}
	}
}

// unprompted reports whether a visit to the authorization server is tried
// without a prompt: somebody of the group has been there already.
func (b *Broker) unprompted(ctx context.Context, f *flow) bool {
	r := b.remotes[f.Remote]
	return !f.Prompt && slices.ContainsFunc(b.mates(r), func(m *Remote) bool {
		return b.holdsGrant(ctx, key{f.Principal, m.Name}, m, f.Frozen.Issuer)
	})
}

// wantsPrompt reports whether an error of an authorization server means that it
// has to show the user something. OpenID Connect Core section 3.1.2.6.
func wantsPrompt(code string) bool {
	switch code {
	case "login_required", "interaction_required", "consent_required", "account_selection_required":
		return true
	}
	return false
}
