package main

import (
	"fmt"
	"log/slog"
	"os"
	"sync"

	"gatehouse/gateway"
)

// auditFile is the audit log in a file of its own. Each record is one write at
// the file's end, so that several processes can share it.
type auditFile struct {
	path string
	log  *slog.Logger

	mu   sync.Mutex // guards file
	file *os.File
}

// openAudit opens the audit log that the config names, and returns a nil logger
// if it names none. It is opened anew whenever reopen says so; nil: never.
func openAudit(cfg *gateway.Config, log *slog.Logger, reopen <-chan os.Signal) (audit *slog.Logger, closer func(), err error) {
	if cfg.Gateway.Audit.File == "" {
		return nil, func() {}, nil
	}
	f := &auditFile{path: cfg.Path(cfg.Gateway.Audit.File), log: log}
	if err := f.open(); err != nil {
		return nil, nil, usageError{fmt.Errorf("gateway.audit.file: %w", err)}
	}
	stop := make(chan struct{})
	var reopening sync.WaitGroup
	reopening.Go(func() {
		for {
			select {
			case <-reopen:
			case <-stop:
				return
			}
			if err := f.open(); err != nil {
				log.Error("opening the audit log anew failed: it goes on where it was", "error", err)
				continue
			}
			log.Info("audit log opened anew")
		}
	})
	return slog.New(slog.NewJSONHandler(f, nil)), func() {
		close(stop)
		reopening.Wait()
		f.mu.Lock()
		defer f.mu.Unlock()
		f.file.Close()
	}, nil
}

// open opens the file by its name, in place of the one that is open, if any.
func (f *auditFile) open() error {
	opened, err := os.OpenFile(f.path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	info, err := opened.Stat()
	if err == nil && info.Mode().IsRegular() && info.Mode().Perm()&0o077 != 0 {
		err = fmt.Errorf("%s can be read or written by others (mode %#o): chmod 600 it", f.path, info.Mode().Perm())
	}
	if err != nil {
		opened.Close()
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.file != nil {
		f.file.Close()
	}
	f.file = opened
	return nil
}

// Write says in the ordinary log what could not be written.
func (f *auditFile) Write(p []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	n, err := f.file.Write(p)
	if err != nil {
		f.log.Error("writing the audit log failed", "error", err)
	}
	return n, err
}
