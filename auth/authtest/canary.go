package authtest

import (
	"bytes"
	"encoding/base64"
	"log/slog"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
)

// Canary is a log that fails the test, when it ends, if a secret is in it:
// plain, escaped for a URL, or in base64. Make it first, so that it looks last.
type Canary struct {
	t testing.TB

	mu      sync.Mutex
	log     bytes.Buffer
	words   []string
	sources []SecretSource
}

// SecretSource knows strings that no log may contain; [AS], [OP] and [Remote]
// are sources.
type SecretSource interface{ Secrets() []string }

// NewCanary returns a log that looks for the secrets of these.
func NewCanary(t testing.TB, sources ...SecretSource) *Canary {
	c := &Canary{t: t, sources: sources}
	t.Cleanup(func() {
		for _, found := range c.Found() {
			t.Errorf("authtest: a secret is in the log: %s", found)
		}
	})
	return c
}

// Write collects output; hand the canary out as stderr, for example.
func (c *Canary) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.log.Write(p)
}

// Logger returns a logger of all levels that ends here.
func (c *Canary) Logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(c, &slog.HandlerOptions{Level: slog.LevelDebug - 4, AddSource: true}))
}

// Watch adds sources.
func (c *Canary) Watch(sources ...SecretSource) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.sources = append(c.sources, sources...)
}

// Add adds strings that may not occur: states, verifiers, session ids.
func (c *Canary) Add(words ...string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.words = append(c.words, words...)
}

// String returns everything that was written.
func (c *Canary) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.log.String()
}

// shortest is the length below which a word may occur by chance.
const shortest = 12

// Found returns the lines with a secret in them, and which it is.
func (c *Canary) Found() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	words := slices.Clone(c.words)
	for _, source := range c.sources {
		words = append(words, source.Secrets()...)
	}
	// What begins like a secret of this package is one, whoever issued it.
	forms := []string{"canary-at-", "canary-rt-", "canary-code-", "canary-cs-", "canary-id-"}
	for _, word := range words {
		if len(word) < shortest {
			continue
		}
		forms = append(forms, word, url.QueryEscape(word),
			base64.StdEncoding.EncodeToString([]byte(word)), base64.RawURLEncoding.EncodeToString([]byte(word)))
	}
	slices.Sort(forms)
	forms = slices.Compact(forms)
	var found []string
	for line := range strings.Lines(c.log.String()) {
		for _, form := range forms {
			if strings.Contains(line, form) {
				found = append(found, form+" in "+strings.TrimSpace(line))
				break
			}
		}
	}
	return found
}
