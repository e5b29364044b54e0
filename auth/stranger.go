package auth

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"
)

// This file remembers that somebody else has opened a sign-in link, so that its
// owner is told, also if they have used it in the meantime.

const (
	bucketStrangers = "strangers" // by principal
	strangersKept   = 24 * time.Hour
)

// strangers are those who came last to a principal's links, by remote.
type strangers map[string]stranger

type stranger struct {
	At   time.Time
	Told bool // the owner knows
}

func strangersKey(p Principal) string { return hash("strangers", p.Key()) }

// updateStrangers changes what is remembered. change may run more than once; with
// false it leaves things as they are.
func (b *Broker) updateStrangers(ctx context.Context, p Principal, change func(strangers) bool) error {
	for {
		known, version, err := b.readStrangers(ctx, p)
		if err != nil {
			return err
		}
		if !change(known) {
			return nil
		}
		data, err := json.Marshal(known)
		if err != nil {
			return fmt.Errorf("encoding strangers: %w", err)
		}
		_, err = b.store.Put(ctx, bucketStrangers, strangersKey(p), data, version, b.now().Add(strangersKept))
		if !errors.Is(err, ErrConflict) {
			return err
		}
	}
}

func (b *Broker) readStrangers(ctx context.Context, p Principal) (known strangers, version uint64, err error) {
	record, err := b.store.Get(ctx, bucketStrangers, strangersKey(p))
	if errors.Is(err, ErrNotFound) {
		return strangers{}, 0, nil
	} else if err != nil {
		return nil, 0, fmt.Errorf("reading strangers: %w", err)
	}
	if err := json.Unmarshal(record.Value, &known); err != nil || known == nil {
		known = strangers{} // it is not worth more than that
	}
	for remote, s := range known {
		if b.remotes[remote] == nil || !b.now().Before(s.At.Add(strangersKept)) {
			delete(known, remote)
		}
	}
	return known, record.Version, nil
}

// Stranger is when somebody else opened a link for the principal's sign-in at a
// remote last, in vain; zero: nobody did within a day.
func (b *Broker) Stranger(ctx context.Context, p Principal, remote string) time.Time {
	known, _, err := b.readStrangers(ctx, p)
	if err != nil {
		b.log.WarnContext(ctx, "looking for strangers failed", "error", err)
	}
	return known[remote].At
}

// UntoldStrangers returns the remotes whose links somebody else has opened since
// the principal was told last, and counts that as telling.
func (b *Broker) UntoldStrangers(ctx context.Context, p Principal) (remotes []string) {
	err := b.updateStrangers(ctx, p, func(known strangers) bool {
		remotes = nil
		for remote, s := range known {
			if !s.Told {
				remotes = append(remotes, remote)
				known[remote] = stranger{s.At, true}
			}
		}
		return len(remotes) > 0
	})
	if err != nil {
		b.log.WarnContext(ctx, "telling of strangers failed", "error", err)
	}
	slices.Sort(remotes)
	return remotes
}
