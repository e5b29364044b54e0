package auth_test

import (
	"bytes"
	"errors"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"gatehouse/auth"
)

// A disk that is full, and one that has become read-only: what is there is
// read, nothing is lost, and it goes on when there is room.
func TestFullAndReadOnlyDisk(t *testing.T) {
	disk := t.TempDir()
	if err := syscall.Mount("tmpfs", disk, "tmpfs", 0, "size=256k,mode=0700"); err != nil {
		t.Skip("mounting a small disk: ", err) // takes root
	}
	defer syscall.Unmount(disk, syscall.MNT_DETACH)
	c := auth.FileConfig{Dir: filepath.Join(disk, "store"), Log: discard}
	f := openFile(t, c)
	version, err := f.Put(t.Context(), "b", "k", []byte("v"), 0, time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	reads := func(what string, f *auth.File) {
		t.Helper()
		if r, err := f.Get(t.Context(), "b", "k"); err != nil || string(r.Value) != "v" || r.Version != version {
			t.Errorf("Get on a %s disk: %+v, %v", what, r, err)
		}
	}
	full := bytes.Repeat([]byte("x"), 50_000)
	for i := 0; ; i++ {
		_, err := f.Put(t.Context(), "b", string(rune('a'+i)), full, 0, time.Time{})
		if i == 20 {
			t.Fatal("the disk does not fill")
		} else if err == nil {
			continue
		}
		if !errors.Is(err, auth.ErrUnwritable) || !errors.Is(err, syscall.ENOSPC) {
			t.Fatalf("Put on a full disk: %v, want %v", err, auth.ErrUnwritable)
		}
		break
	}
	reads("full", f)
	if left, _ := filepath.Glob(filepath.Join(c.Dir, "tmp", "*")); len(left) > 0 {
		t.Errorf("%d half written files are left", len(left))
	}
	if _, err := f.Take(t.Context(), "b", "a"); err != nil { // which makes room
		t.Fatal(err)
	}
	if _, err := f.Put(t.Context(), "b", "a", []byte("small"), 0, time.Time{}); err != nil {
		t.Errorf("Put once there is room: %v", err)
	}

	if err := syscall.Mount("", disk, "", syscall.MS_REMOUNT|syscall.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	for _, f := range []*auth.File{f, openFile(t, c)} {
		_, failed := f.Put(t.Context(), "b", "k", nil, version, time.Time{})
		_, taken := f.Take(t.Context(), "b", "k")
		for what, err := range map[string]error{"Put": failed, "Take": taken, "Delete": f.Delete(t.Context(), "b", "k")} {
			if !errors.Is(err, auth.ErrUnwritable) {
				t.Errorf("%s on a read-only disk: %v, want %v", what, err, auth.ErrUnwritable)
			}
		}
		reads("read-only", f)
	}
	if _, err := auth.OpenFile(auth.FileConfig{Dir: filepath.Join(disk, "new"), Log: discard}); !errors.Is(err, auth.ErrUnwritable) {
		t.Errorf("making a store on a read-only disk: %v", err)
	}
}
