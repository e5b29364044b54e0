package gateway

import (
	"crypto/tls"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"
)

// certificateCheck is how often the files of a certificate are looked at.
const certificateCheck = time.Second

// Certificate is a TLS certificate of the gateway's, as a server or as a client,
// read again when its files change: whoever renews it need not restart anything.
type Certificate struct {
	cert, key string
	log       *slog.Logger
	now       func() time.Time

	mu      sync.Mutex // guards all below
	loaded  *tls.Certificate
	read    [2]fileState // of cert and key, when they were last read
	checked time.Time
}

// fileState tells a file from what it was before. A link that leads elsewhere,
// as in a mounted secret, has other values.
type fileState struct {
	modified time.Time
	size     int64
}

// LoadCertificate reads a certificate and its key from PEM files.
func LoadCertificate(cert, key string, log *slog.Logger) (*Certificate, error) {
	c := &Certificate{cert: cert, key: key, log: log, now: time.Now}
	state, err := c.state()
	if err != nil {
		return nil, err
	}
	return c, c.loadLocked(state)
}

// Get is for [tls.Config].GetCertificate, and looks at nothing of the hello. New
// files that cannot be used leave
// the certificate as it was.
func (c *Certificate) Get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if now := c.now(); now.Sub(c.checked) >= certificateCheck || now.Before(c.checked) {
		c.checked = now
		state, err := c.state()
		if err == nil && state != c.read {
			if err = c.loadLocked(state); err == nil {
				c.log.Info("TLS certificate read again", "file", c.cert, "expires", c.loaded.Leaf.NotAfter)
			}
		}
		if err != nil {
			c.log.Error("the TLS certificate could not be read again: the old one stays", "error", err)
		}
	}
	return c.loaded, nil
}

func (c *Certificate) state() (state [2]fileState, err error) {
	for i, name := range []string{c.cert, c.key} {
		info, err := os.Stat(name)
		if err != nil {
			return state, fmt.Errorf("reading a TLS certificate: %w", err)
		}
		state[i] = fileState{info.ModTime(), info.Size()}
	}
	return state, nil
}

// loadLocked reads the files, and remembers their state only if they can be
// used: half of a renewal is looked at again.
func (c *Certificate) loadLocked(state [2]fileState) error {
	loaded, err := tls.LoadX509KeyPair(c.cert, c.key)
	if err != nil {
		return fmt.Errorf("reading a TLS certificate: %w", err)
	}
	c.loaded, c.read = &loaded, state
	return nil
}
