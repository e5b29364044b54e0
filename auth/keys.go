package auth

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	jose "github.com/go-jose/go-jose/v4"
	"github.com/zitadel/oidc/v3/pkg/oidc"
	"golang.org/x/time/rate"
)

// loginKeys are the public keys of the login's provider (RFC 7517), fetched when
// they are needed. It is an [oidc.KeySet].
type loginKeys struct {
	b     *Broker
	often *rate.Limiter // fetches: anybody can name a key that is not there

	mu       sync.Mutex // guards what follows
	keys     []jose.JSONWebKey
	fetched  time.Time
	fetching *keysCall // nil: none in flight
}

// keysCall is one fetch that everybody who needs it waits for.
type keysCall struct {
	done chan struct{}
	err  error // set before done is closed
}

const (
	keysFresh   = time.Hour // after which a key that has been withdrawn is forgotten
	keysEvery   = 10 * time.Second
	keysAtOnce  = 5 // fetches without a pause
	maxKeys     = 100
	keysTimeout = 10 * time.Second
)

func newLoginKeys(b *Broker) *loginKeys {
	return &loginKeys{b: b, often: rate.NewLimiter(rate.Every(keysEvery), keysAtOnce)}
}

var errNoKey = errors.New("the provider has no such key")

// VerifySignature returns the payload of a token that one of the provider's
// keys has signed. A key that is not known is looked for once more.
func (k *loginKeys) VerifySignature(ctx context.Context, jws *jose.JSONWebSignature) ([]byte, error) {
	keys, fresh, err := k.known(ctx)
	if err != nil {
		return nil, err
	}
	payload, err := verifyWith(jws, keys)
	if err == nil || fresh || !errors.Is(err, errNoKey) {
		return payload, err
	}
	if keys, err = k.refetch(ctx); err != nil {
		return nil, err
	}
	return verifyWith(jws, keys)
}

// verifyWith is errNoKey where another set of keys might do.
func verifyWith(jws *jose.JSONWebSignature, keys []jose.JSONWebKey) ([]byte, error) {
	id, alg := oidc.GetKeyIDAndAlg(jws)
	key, err := oidc.FindMatchingKey(id, oidc.KeyUseSignature, alg, keys...)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errNoKey, err)
	}
	payload, err := jws.Verify(&key)
	if err != nil && key.KeyID == "" {
		return nil, fmt.Errorf("%w: %w", errNoKey, err)
	}
	return payload, err
}

// known returns the keys, fetching them where there are none or old ones; fresh
// says that they have been fetched just now. Old ones serve while the provider
// is away.
func (k *loginKeys) known(ctx context.Context) (keys []jose.JSONWebKey, fresh bool, err error) {
	k.mu.Lock()
	keys = k.keys
	old := k.b.now().Sub(k.fetched) >= keysFresh
	k.mu.Unlock()
	if len(keys) > 0 && !old {
		return keys, false, nil
	}
	got, err := k.refetch(ctx)
	if err != nil && len(keys) > 0 && ctx.Err() == nil {
		return keys, true, nil
	}
	return got, true, err
}

// refetch fetches the keys, together with whoever else does.
func (k *loginKeys) refetch(ctx context.Context) ([]jose.JSONWebKey, error) {
	k.mu.Lock()
	call := k.fetching
	if call == nil {
		if !k.often.AllowN(k.b.now(), 1) {
			k.mu.Unlock()
			return nil, fmt.Errorf("%w, and its keys were asked for a moment ago", errNoKey)
		}
		work, done, err := k.b.work(keysTimeout)
		if err != nil {
			k.mu.Unlock()
			return nil, err
		}
		call = &keysCall{done: make(chan struct{})}
		k.fetching = call
		go func() {
			defer done()
			keys, err := k.fetch(work)
			k.mu.Lock()
			if err == nil {
				k.keys, k.fetched = keys, k.b.now()
			}
			k.fetching, call.err = nil, err
			k.mu.Unlock()
			close(call.done)
		}()
	}
	k.mu.Unlock()
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-call.done:
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.keys, call.err
}

// keyDocument is a JWK Set. Section 5: "Implementations SHOULD ignore JWKs
// within a JWK Set that use "kty" values that are not understood by them".
type keyDocument struct {
	Keys once[[]json.RawMessage] `json:"keys"`
}

func (k *loginKeys) fetch(ctx context.Context) (keys []jose.JSONWebKey, err error) {
	meta, err := k.b.discoverer.issuer(ctx, k.b.login, k.b.login.Issuer, nil)
	if err != nil {
		return nil, fmt.Errorf("looking for the provider's keys: %w", err)
	}
	at := meta.JWKS.value
	if at == "" {
		return nil, errors.New("the provider's metadata names no jwks_uri")
	}
	document, problem := getDocument[keyDocument](ctx, k.b.login.HTTP, at)
	if problem != nil {
		return nil, fmt.Errorf("fetching the provider's keys: its jwks_uri %w", problem)
	}
	for _, raw := range document.Keys.value[:min(len(document.Keys.value), maxKeys)] {
		var key jose.JSONWebKey
		if key.UnmarshalJSON(raw) == nil && key.Valid() && key.IsPublic() {
			keys = append(keys, key)
		}
	}
	if len(keys) == 0 {
		return nil, errors.New("the provider publishes no key that can be used")
	}
	return keys, nil
}
