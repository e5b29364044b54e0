package main

import (
	"fmt"
	"log/slog"
	"os"

	"gatehouse/gateway"
)

// auditFile is the audit log in a file of its own. Each record is one write at
// the file's end, so that several processes can share it.
type auditFile struct {
	*os.File
	log *slog.Logger
}

// openAudit opens the audit log that the config names, and returns a nil logger
// if it names none.
func openAudit(cfg *gateway.Config, log *slog.Logger) (audit *slog.Logger, closer func(), err error) {
	if cfg.Gateway.Audit.File == "" {
		return nil, func() {}, nil
	}
	f, err := os.OpenFile(cfg.Path(cfg.Gateway.Audit.File), os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return nil, nil, usageError{fmt.Errorf("gateway.audit.file: %w", err)}
	}
	info, err := f.Stat()
	if err == nil && info.Mode().IsRegular() && info.Mode().Perm()&0o077 != 0 {
		err = fmt.Errorf("%s can be read or written by others (mode %#o): chmod 600 it", f.Name(), info.Mode().Perm())
	}
	if err != nil {
		f.Close()
		return nil, nil, usageError{fmt.Errorf("gateway.audit.file: %w", err)}
	}
	return slog.New(slog.NewJSONHandler(&auditFile{f, log}, nil)), func() { f.Close() }, nil
}

// Write says in the ordinary log what could not be written.
func (f *auditFile) Write(p []byte) (int, error) {
	n, err := f.File.Write(p)
	if err != nil {
		f.log.Error("writing the audit log failed", "error", err)
	}
	return n, err
}
