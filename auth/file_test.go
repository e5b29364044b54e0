package auth_test

import (
	"log/slog"
	"testing"

	"gatehouse/auth"
	"gatehouse/auth/storetest"
)

func TestFile(t *testing.T) {
	storetest.Run(t, func(t *testing.T, c storetest.Config) (a, b auth.Store) {
		config := auth.FileConfig{Dir: t.TempDir() + "/store", MaxRecords: c.MaxRecords, Now: c.Now, Log: slog.New(slog.DiscardHandler)}
		return openFile(t, config), openFile(t, config)
	})
}

func openFile(t *testing.T, c auth.FileConfig) *auth.File {
	t.Helper()
	f, err := auth.OpenFile(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}
