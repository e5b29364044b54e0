package gateway

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"os"
	"slices"
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
		if state[i], err = stateOf(name); err != nil {
			return state, fmt.Errorf("reading a TLS certificate: %w", err)
		}
	}
	return state, nil
}

func stateOf(name string) (fileState, error) {
	info, err := os.Stat(name)
	if err != nil {
		return fileState{}, err
	}
	return fileState{info.ModTime(), info.Size()}, nil
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

// Roots are certificate authorities that add to the system's, read again when
// their files change: an authority is renewed, too.
type Roots struct {
	files []string
	log   *slog.Logger
	now   func() time.Time

	mu      sync.Mutex // guards all below
	loaded  *x509.CertPool
	read    []fileState // of the files, when they were last read
	checked time.Time
}

// LoadRoots reads PEM files, each with one certificate at least.
func LoadRoots(log *slog.Logger, files ...string) (*Roots, error) {
	r := &Roots{files: files, log: log, now: time.Now}
	state, err := r.state()
	if err != nil {
		return nil, err
	}
	return r, r.loadLocked(state)
}

// Get returns the system's roots and those of the files, the same pool until one
// of them changes. New files that cannot be used leave it as it was.
func (r *Roots) Get() *x509.CertPool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if now := r.now(); now.Sub(r.checked) >= certificateCheck || now.Before(r.checked) {
		r.checked = now
		state, err := r.state()
		if err == nil && !slices.Equal(state, r.read) {
			if err = r.loadLocked(state); err == nil {
				r.log.Info("CA certificates read again", "files", r.files)
			}
		}
		if err != nil {
			r.log.Error("CA certificates could not be read again: the old ones stay", "error", err)
		}
	}
	return r.loaded
}

func (r *Roots) state() ([]fileState, error) {
	out := make([]fileState, len(r.files))
	for i, name := range r.files {
		var err error
		if out[i], err = stateOf(name); err != nil {
			return nil, fmt.Errorf("reading CA certificates: %w", err)
		}
	}
	return out, nil
}

// loadLocked remembers the files' state only if they can be used.
func (r *Roots) loadLocked(state []fileState) error {
	pool, err := x509.SystemCertPool()
	if err != nil {
		return fmt.Errorf("reading the system's roots: %w", err)
	}
	for _, name := range r.files {
		pem, err := os.ReadFile(name)
		if err != nil {
			return fmt.Errorf("reading CA certificates: %w", err)
		}
		if !pool.AppendCertsFromPEM(pem) {
			return fmt.Errorf("%s holds no certificate in PEM form", name)
		}
	}
	r.loaded, r.read = pool, state
	return nil
}
