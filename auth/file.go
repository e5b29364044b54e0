package auth

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"gatehouse/auth/secret"
)

// FileConfig configures a [File].
type FileConfig struct {
	Dir string // required; made if it is not there; nobody but its owner may enter it

	// KeyFile holds the keys: one or more lines, each 32 random bytes in base64.
	// The first seals, all open. Only its owner may read it. Empty: the file key
	// in Dir, which is made with the store.
	KeyFile string
	// Keys are the keys themselves, in the form of the key file, instead of one.
	Keys secret.Text
	// AskKeys returns them, instead of both: from a keychain, say ([KeyringKeys]).
	// It is asked by one process at a time. fresh says that the store is new, so
	// that a key may be made for it.
	AskKeys func(fresh bool) (secret.Text, error)

	MaxRecords map[string]int   // per bucket; a bucket not named: 100,000
	Log        *slog.Logger     // required
	Now        func() time.Time // of expiries; nil: time.Now
}

// File is the store in a directory on a local disk, for all processes of one
// user on one machine at once. Nobody leads and nothing runs in the background:
//
//	key                     the key, if no other was named
//	canary                  a sealed record that says whether a key is the right one
//	records/<bucket>/<name> one sealed record; the name is a hash of bucket and key
//	locks/, leases/         empty files to lock, never removed, and last versions
//	tmp/                    records that are being written
//
// A record is written beside its place, synced and moved there, so that a
// process that is killed leaves the old one or the new one. Writers of a record
// lock one of 64 files; readers lock nothing. What is damaged, or lies where
// it does not belong, is set aside (*.bad) and counts as not there.
type File struct {
	dir     string
	keyFile string // empty: the keys do not come from a file
	limits  map[string]int
	log     *slog.Logger
	now     func() time.Time

	master  *fileLock // key and canary
	stripes [64]*fileLock

	mu       sync.Mutex // guards what follows
	closed   bool
	keys     keySet
	keysRead time.Time
	told     map[string]bool // what the log has been told of
	leases   map[string]*leaseLock
	buckets  map[string]*fileBucket
}

var (
	_ Store  = (*File)(nil)
	_ Sealer = (*File)(nil)
)

// fileBucket bounds a bucket without counting it at each write.
type fileBucket struct {
	mu      sync.Mutex // guards what follows; held while the last few records are made
	room    int        // records that may be made before the next count
	made    int        // since the last sweep
	sweptAt time.Time
}

// leaseLock is the lock of a lease while somebody in this process wants it.
type leaseLock struct {
	*fileLock
	users int // guarded by File.mu
}

const (
	maxRecordSize = 16 << 20
	openTime      = 10 * time.Second // for the lock at the start
	sweepAtOnce   = 1000             // records of a bucket that one sweep looks at
	sweepEvery    = 256              // records made between sweeps
	sweepPause    = time.Second      // between sweeps for want of room
	staleAfter    = time.Hour        // for what a killed process left in tmp
	reloadPause   = time.Second      // between looks at a key file that may have changed
	maxTold       = 1000
	canaryName    = "canary"
	badSuffix     = ".bad"
)

// OpenFile opens the store in a directory, or makes one. Errors say what to
// do: [ErrKey] if there is no usable key, [ErrWrongKey] if there is one but the
// store is sealed with another. Nothing is ever wiped.
func OpenFile(c FileConfig) (*File, error) {
	f, err := openFile(c)
	if err != nil {
		return nil, fmt.Errorf("opening the store in %s: %w", c.Dir, err)
	}
	return f, nil
}

func openFile(c FileConfig) (*File, error) {
	switch {
	case c.Dir == "" || c.Log == nil:
		return nil, errors.New("auth: Dir and Log are required")
	case c.KeyFile != "" && !c.Keys.IsEmpty(), c.AskKeys != nil && (c.KeyFile != "" || !c.Keys.IsEmpty()):
		return nil, fmt.Errorf("%w: either a file, the keys themselves, or AskKeys", ErrKey)
	}
	f := &File{
		dir: c.Dir, limits: c.MaxRecords, log: c.Log, now: c.Now,
		told: map[string]bool{}, leases: map[string]*leaseLock{}, buckets: map[string]*fileBucket{},
	}
	if f.now == nil {
		f.now = time.Now
	}
	for _, dir := range []string{f.dir, f.path("records"), f.path("locks"), f.path("leases"), f.path("tmp")} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrUnwritable, err)
		}
		if info, err := os.Stat(dir); err != nil {
			return nil, err
		} else if exposed(info) {
			return nil, fmt.Errorf("%s is open to others: chmod 700 it", dir)
		}
	}
	f.master = newFileLock(f.path("locks", "master"))
	for i := range f.stripes {
		f.stripes[i] = newFileLock(f.path("locks", strconv.Itoa(i)))
	}
	if err := f.unseal(c); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), openTime)
	defer cancel()
	f.clean()
	for _, bucket := range f.bucketNames() {
		if err := f.sweep(ctx, bucket, sweepAtOnce); err != nil {
			f.log.Warn("sweeping the store failed", "bucket", bucket, "error", err)
		}
	}
	return f, nil
}

// unseal gets the keys and sees that they are the right ones, alone.
func (f *File) unseal(c FileConfig) error {
	limit := openTime
	if c.AskKeys != nil {
		limit += keyringTime // whoever is first may have to be asked something
	}
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	if err := f.lockedBy(ctx, f.master); errors.Is(err, context.DeadlineExceeded) {
		return errors.New("another process is opening it and does not get done")
	} else if err != nil {
		return err
	}
	defer f.master.unlock()

	canary, err := os.ReadFile(f.path(canaryName))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	made := err == nil || len(f.bucketNames()) > 0
	keys := c.Keys
	if c.AskKeys != nil {
		if keys, err = c.AskKeys(!made); err != nil {
			return err
		}
	}
	if keys.IsEmpty() && c.AskKeys == nil {
		f.keyFile = c.KeyFile
		if f.keyFile == "" {
			f.keyFile = f.path("key")
			// A key is made for a new store only: one for an old store would open nothing.
			if _, err := os.Lstat(f.keyFile); errors.Is(err, fs.ErrNotExist) && !made {
				if err := f.replace(f.keyFile, newKey()); err != nil {
					return fmt.Errorf("making the key: %w", err)
				}
			}
		}
		// Read again what was written: that is what the next start will find.
		f.keys, err = readKeyFile(f.keyFile)
	} else {
		f.keys, err = parseKeys([]byte(keys.Value()))
	}
	if err != nil {
		return err
	}
	return f.checkCanary(canary)
}

// checkCanary refuses keys that are not the store's. A new first key seals
// everything anew, the canary last: only then is the old key done with.
func (f *File) checkCanary(canary []byte) error {
	_, err := f.keys.open("", canaryName, canary)
	switch {
	case err == nil && f.keys.sealedByFirst(canary):
		return nil
	case err == nil:
		if err := f.resealAll(); err != nil {
			return fmt.Errorf("sealing with the new first key: %w", err)
		}
	case errors.Is(err, ErrWrongKey):
		return fmt.Errorf("%w: give it the key that it was made with, on another line if there is a new one; nothing has been changed", err)
	default:
		// The canary is new, lost or damaged. A record is as good.
		opened, refused := f.tryRecords()
		if refused && !opened {
			return fmt.Errorf("%w: its canary is gone and no record opens; nothing has been changed", ErrWrongKey)
		}
	}
	if err := f.replace(f.path(canaryName), f.keys.seal("", canaryName, Record{Version: 1})); err != nil {
		return fmt.Errorf("writing the canary: %w", err)
	}
	return nil
}

// tryRecords looks for a record that opens, and for one that does not.
func (f *File) tryRecords() (opened, refused bool) {
	for _, bucket := range f.bucketNames() {
		for _, name := range f.names(bucket) {
			switch _, _, err := f.read(bucket, name); {
			case err == nil:
				return true, refused
			case errors.Is(err, ErrWrongKey):
				refused = true
			}
		}
	}
	return false, refused
}

// resealAll seals with the first key what another one has sealed.
func (f *File) resealAll() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for _, bucket := range f.bucketNames() {
		for _, name := range f.names(bucket) {
			if err := f.reseal(ctx, bucket, name); err != nil {
				return err
			}
		}
	}
	return nil
}

func (f *File) reseal(ctx context.Context, bucket, name string) error {
	l := f.stripe(name)
	if err := f.lockedBy(ctx, l); err != nil {
		return err
	}
	defer l.unlock()
	r, envelope, err := f.read(bucket, name)
	if err != nil || f.keySet().sealedByFirst(envelope) {
		return nil // no record; or one that needs nothing, or that nobody can read
	}
	return f.write(bucket, name, r)
}

// readKeyFile reads keys that nobody else can.
func readKeyFile(path string) (keySet, error) {
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("%w: %s is not there; put it back, or for a new store make one: (umask 077; openssl rand -base64 32 > %s)", ErrKey, path, path)
	case err != nil:
		return nil, fmt.Errorf("%w: %w", ErrKey, err)
	case !info.Mode().IsRegular() || info.Size() > 1<<16:
		return nil, fmt.Errorf("%w: %s is no key file", ErrKey, path)
	case exposed(info):
		return nil, fmt.Errorf("%w: others may read %s: chmod 600 it, and replace the key if they have", ErrKey, path)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrKey, err)
	}
	keys, err := parseKeys(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return keys, nil
}

// exposed reports whether anybody but the owner may do anything.
func exposed(info fs.FileInfo) bool {
	return runtime.GOOS != "windows" && info.Mode().Perm()&0o077 != 0 // Windows has other means
}

// Dir returns the store's directory.
func (f *File) Dir() string { return f.dir }

// Shared reports true: other processes may have the directory open.
func (f *File) Shared() bool { return true }

// Get is [Store.Get].
func (f *File) Get(ctx context.Context, bucket, key string) (Record, error) {
	if err := f.ready(ctx, bucket); err != nil {
		return Record{}, err
	}
	name := hash(bucket, key)
	r, _, err := f.read(bucket, name)
	switch {
	case errors.Is(err, errDamaged):
		return Record{}, f.suspect(ctx, bucket, name)
	case err != nil:
		return Record{}, err
	case r.expired(f.now()):
		f.collect(bucket, name)
		return Record{}, ErrNotFound
	}
	return r, nil
}

// Put is [Store.Put].
func (f *File) Put(ctx context.Context, bucket, key string, value []byte, version uint64, expires time.Time) (uint64, error) {
	if err := f.ready(ctx, bucket); err != nil {
		return 0, err
	}
	if len(value) > maxRecordSize/2 {
		return 0, fmt.Errorf("auth: a record of %d bytes is too large", len(value))
	}
	name := hash(bucket, key)
	next, made, err := f.put(ctx, bucket, name, value, version, expires)
	if errors.Is(err, ErrFull) && f.sweepForRoom(ctx, bucket) {
		next, made, err = f.put(ctx, bucket, name, value, version, expires)
	}
	if err == nil && made {
		f.sweepNowAndThen(ctx, bucket)
	}
	return next, err
}

func (f *File) put(ctx context.Context, bucket, name string, value []byte, version uint64, expires time.Time) (next uint64, made bool, err error) {
	l := f.stripe(name)
	if err := f.lockedBy(ctx, l); err != nil {
		return 0, false, err
	}
	defer l.unlock()
	old, err := f.present(bucket, name)
	made = errors.Is(err, ErrNotFound)
	switch {
	case err == nil, made:
	case errors.Is(err, ErrWrongKey) && version == AnyVersion:
		// Nobody here can read it, and whoever writes does not care what it was.
	default:
		return 0, false, err
	}
	if version != AnyVersion && old.Version != version {
		return 0, false, ErrConflict
	}
	if made {
		done, err := f.makeRoom(bucket)
		if err != nil {
			return 0, false, err
		}
		defer done()
	}
	if next, err = f.nextVersion(name, old.Version); err != nil {
		return 0, false, err
	}
	return next, made, f.write(bucket, name, Record{Value: value, Version: next, Expires: expires})
}

// Take is [Store.Take].
func (f *File) Take(ctx context.Context, bucket, key string) (Record, error) {
	if err := f.ready(ctx, bucket); err != nil {
		return Record{}, err
	}
	name := hash(bucket, key)
	if _, err := os.Lstat(f.record(bucket, name)); errors.Is(err, fs.ErrNotExist) {
		return Record{}, ErrNotFound
	}
	l := f.stripe(name)
	if err := f.lockedBy(ctx, l); err != nil {
		return Record{}, err
	}
	defer l.unlock()
	r, err := f.present(bucket, name)
	if err != nil {
		return Record{}, err
	}
	if err := f.remove(bucket, name); err != nil {
		return Record{}, err
	}
	return r, nil
}

// Delete is [Store.Delete]. What cannot be read can be deleted.
func (f *File) Delete(ctx context.Context, bucket, key string) error {
	if err := f.ready(ctx, bucket); err != nil {
		return err
	}
	name := hash(bucket, key)
	if _, err := os.Lstat(f.record(bucket, name)); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	l := f.stripe(name)
	if err := f.lockedBy(ctx, l); err != nil {
		return err
	}
	defer l.unlock()
	return f.remove(bucket, name)
}

// Lease is [Store.Lease]. It is the system that keeps it: it ends with the
// process however that ends, and never while the process is merely slow.
func (f *File) Lease(ctx context.Context, name string) (Lease, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	name = hash("lease", name)
	f.mu.Lock()
	if f.closed {
		f.mu.Unlock()
		return nil, ErrClosed
	}
	l := f.leases[name]
	if l == nil {
		l = &leaseLock{fileLock: newFileLock(f.path("leases", name))}
		f.leases[name] = l
	}
	l.users++
	f.mu.Unlock()
	leave := func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		if l.users--; l.users == 0 {
			delete(f.leases, name)
		}
	}
	if err := f.lockedBy(ctx, l.fileLock); err != nil {
		leave()
		return nil, err
	}
	return &fileLease{f: f, l: l.fileLock, leave: leave}, nil
}

type fileLease struct {
	f        *File
	l        *fileLock
	leave    func()
	released atomic.Bool
}

func (l *fileLease) Check(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	l.f.mu.Lock()
	closed := l.f.closed
	l.f.mu.Unlock()
	if closed || l.released.Load() || !l.l.current() {
		return ErrLeaseLost
	}
	return nil
}

func (l *fileLease) Release() {
	if !l.released.Swap(true) {
		l.l.unlock()
		l.leave()
	}
}

// Close lets nothing begin any more. A second call does nothing.
func (f *File) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.closed = true
	return nil
}

// ready is what every operation looks at first.
func (f *File) ready(ctx context.Context, bucket string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return ErrClosed
	}
	if bucket == "" || strings.Trim(bucket, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" {
		return fmt.Errorf("auth: %q is no name for a bucket", bucket)
	}
	return nil
}

func (f *File) path(parts ...string) string {
	return filepath.Join(append([]string{f.dir}, parts...)...)
}

func (f *File) record(bucket, name string) string { return f.path("records", bucket, name) }

// stripe is the lock of a record's writers.
func (f *File) stripe(name string) *fileLock { return f.stripes[stripeOf(name)] }

func stripeOf(name string) int {
	n, _ := strconv.ParseUint(name[:2], 16, 8) // a name is a hash in hex
	return int(n % 64)
}

// lockedBy waits for a lock.
func (f *File) lockedBy(ctx context.Context, l *fileLock) error {
	err := l.lock(ctx)
	if err != nil && ctx.Err() == nil {
		return fmt.Errorf("%w: locking: %w", ErrUnwritable, err)
	}
	return err
}

// Seal seals with the first key of the key file. See [Sealer].
func (f *File) Seal(plain, bound []byte) []byte { return f.keySet().sealOut(plain, bound) }

// Unseal opens with any key of the key file. See [Sealer].
func (f *File) Unseal(sealed, bound []byte) ([]byte, bool) { return f.keySet().openOut(sealed, bound) }

func (f *File) keySet() keySet {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.keys
}

// read reads a record, expired or not, and its envelope: [ErrNotFound],
// errDamaged, [ErrWrongKey], or the system's error.
func (f *File) read(bucket, name string) (Record, []byte, error) {
	path := f.record(bucket, name)
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return Record{}, nil, ErrNotFound
	} else if err != nil {
		return Record{}, nil, fmt.Errorf("reading a record: %w", err)
	}
	// A record that others can read or replace is not one that we left like this.
	if !info.Mode().IsRegular() || exposed(info) || info.Size() > maxRecordSize {
		return Record{}, nil, errDamaged
	}
	envelope, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return Record{}, nil, ErrNotFound
	} else if err != nil {
		return Record{}, nil, fmt.Errorf("reading a record: %w", err)
	}
	r, err := f.keySet().open(bucket, name, envelope)
	if errors.Is(err, ErrWrongKey) {
		reach("unknown key")
		f.reloadKeys() // or somebody else has, a moment ago
		r, err = f.keySet().open(bucket, name, envelope)
	}
	if errors.Is(err, ErrWrongKey) {
		f.tell(name, slog.LevelError, "a record cannot be read: "+
			"it is sealed with a key that is not in the key file, or written by a later version", bucket)
	}
	return r, envelope, err
}

// reloadKeys reads the key file again: another process may have started with a
// new first key.
func (f *File) reloadKeys() {
	f.mu.Lock()
	defer f.mu.Unlock()
	now := time.Now()
	if f.keyFile == "" || now.Sub(f.keysRead) < reloadPause {
		return
	}
	f.keysRead = now
	if keys, err := readKeyFile(f.keyFile); err == nil {
		f.keys = keys
	}
}

// present returns the live record. Its stripe is locked.
func (f *File) present(bucket, name string) (Record, error) {
	r, _, err := f.read(bucket, name)
	switch {
	case errors.Is(err, errDamaged):
		f.setAside(bucket, name)
		return Record{}, ErrNotFound
	case err != nil:
		return Record{}, err
	case r.expired(f.now()):
		if err := f.remove(bucket, name); err != nil {
			return Record{}, err
		}
		return Record{}, ErrNotFound
	}
	return r, nil
}

// suspect looks again at a damaged record, alone, and sets it aside. It
// returns [ErrNotFound] unless ctx ends.
func (f *File) suspect(ctx context.Context, bucket, name string) error {
	l := f.stripe(name)
	if err := l.lock(ctx); err == nil {
		defer l.unlock()
		if _, _, err := f.read(bucket, name); errors.Is(err, errDamaged) {
			f.setAside(bucket, name)
		}
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	return ErrNotFound
}

// setAside keeps a damaged record for whoever wants to know what happened to
// it. Its stripe is locked.
func (f *File) setAside(bucket, name string) {
	bad := f.record(bucket, name) + badSuffix
	err := os.Rename(f.record(bucket, name), bad)
	if err == nil {
		if info, statErr := os.Lstat(bad); statErr == nil && info.Mode().IsRegular() {
			err = os.Chmod(bad, 0o600)
		}
	}
	f.tell(name, slog.LevelWarn, "a damaged record has been set aside: it was cut, changed, moved, or open to others", bucket, "error", err)
}

// tell logs once what would otherwise be logged at every reading.
func (f *File) tell(name string, level slog.Level, what, bucket string, args ...any) {
	f.mu.Lock()
	known := f.told[name] || len(f.told) >= maxTold
	if !known {
		f.told[name] = true
	}
	f.mu.Unlock()
	if !known {
		f.log.Log(context.Background(), level, what, append([]any{"bucket", bucket, "record", name[:8]}, args...)...)
	}
}

// nextVersion returns a version above all that any record of the stripe has
// had, deleted ones included. The stripe is locked.
func (f *File) nextVersion(name string, old uint64) (uint64, error) {
	path := f.path("locks", strconv.Itoa(stripeOf(name))+".version")
	last := uint64(time.Now().UnixNano()) // where there is none, or not a whole one
	if data, err := os.ReadFile(path); err == nil && len(data) == 8 {
		last = binary.BigEndian.Uint64(data)
	}
	next := max(last, old) + 1
	// In place: what a power cut loses here, nobody lives to remember.
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE, 0o600)
	if err == nil {
		_, err = file.Write(binary.BigEndian.AppendUint64(nil, next))
		err = errors.Join(err, file.Close())
	}
	if err != nil {
		return 0, fmt.Errorf("%w: %w", ErrUnwritable, err)
	}
	return next, nil
}

// write seals a record and puts it in its place. Its stripe is locked.
func (f *File) write(bucket, name string, r Record) error {
	dir := f.path("records", bucket)
	if _, err := os.Lstat(dir); errors.Is(err, fs.ErrNotExist) {
		if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("%w: %w", ErrUnwritable, err)
		}
		if err := syncDir(f.path("records")); err != nil {
			return fmt.Errorf("%w: %w", ErrUnwritable, err)
		}
	}
	reach("record locked")
	return f.replace(f.record(bucket, name), f.keySet().seal(bucket, name, r))
}

// replace writes a file so that at any moment the old one or the new one is
// there whole, and the new one for good when it returns.
func (f *File) replace(path string, data []byte) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("%w: %w", ErrUnwritable, err)
		}
	}()
	tmp, err := os.CreateTemp(f.path("tmp"), "*") // 0600
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			tmp.Close()
			os.Remove(tmp.Name())
		}
	}()
	reach("temporary file made")
	if _, err := tmp.Write(data[:len(data)/2]); err != nil {
		return err
	}
	reach("temporary file half written")
	if _, err := tmp.Write(data[len(data)/2:]); err != nil {
		return err
	}
	if err := tmp.Sync(); err != nil {
		return err
	}
	if err := tmp.Close(); err != nil {
		return err
	}
	reach("temporary file synced")
	if err := os.Rename(tmp.Name(), path); err != nil {
		return err
	}
	reach("moved into place")
	if err := syncDir(filepath.Dir(path)); err != nil {
		return err
	}
	reach("directory synced")
	return nil
}

// remove deletes a record for good. Its stripe is locked.
func (f *File) remove(bucket, name string) error {
	path := f.record(bucket, name)
	reach("about to remove")
	if err := os.Remove(path); errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return fmt.Errorf("%w: %w", ErrUnwritable, err)
	}
	reach("removed")
	if err := syncDir(filepath.Dir(path)); err != nil {
		return fmt.Errorf("%w: %w", ErrUnwritable, err)
	}
	return nil
}

// syncDir makes the names in a directory last.
func syncDir(path string) error {
	if runtime.GOOS == "windows" {
		return nil // which knows no such thing
	}
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// reached is nil but in tests, which end the process at a point of a write, or
// have others arrive there, too.
var reached func(point string)

func reach(point string) {
	if reached != nil {
		reached(point)
	}
}

// bucketNames lists the buckets that hold or held something.
func (f *File) bucketNames() []string {
	entries, err := os.ReadDir(f.path("records"))
	if err != nil {
		return nil
	}
	var names []string
	for _, e := range entries {
		if e.IsDir() {
			names = append(names, e.Name())
		}
	}
	return names
}

// names lists the records of a bucket.
func (f *File) names(bucket string) []string {
	dir, err := os.Open(f.path("records", bucket))
	if err != nil {
		return nil
	}
	defer dir.Close()
	all, err := dir.Readdirnames(-1)
	if err != nil {
		return nil
	}
	names := all[:0]
	for _, name := range all {
		if len(name) == 64 && strings.Trim(name, "0123456789abcdef") == "" {
			names = append(names, name)
		}
	}
	return names
}

func (f *File) bucket(name string) *fileBucket {
	f.mu.Lock()
	defer f.mu.Unlock()
	b := f.buckets[name]
	if b == nil {
		b = &fileBucket{}
		f.buckets[name] = b
	}
	return b
}

// makeRoom says whether one more record may be made, and keeps others from
// making theirs until done where it is about the last few. Other processes
// count for themselves, so that a full bucket may hold a few hundred more for
// each of them.
func (f *File) makeRoom(bucket string) (done func(), err error) {
	const few = 128
	limit, ok := f.limits[bucket]
	if !ok {
		limit = defaultMaxRecords
	}
	b := f.bucket(bucket)
	b.mu.Lock()
	if b.room > 0 {
		b.room--
		b.mu.Unlock()
		return func() {}, nil
	}
	free := limit - len(f.names(bucket))
	switch {
	case free <= 0:
		b.mu.Unlock()
		return nil, ErrFull
	case free < few:
		return b.mu.Unlock, nil
	}
	b.room = min(free/2, sweepEvery)
	b.mu.Unlock()
	return func() {}, nil
}

// sweepForRoom looks through a full bucket, but not again and again.
func (f *File) sweepForRoom(ctx context.Context, bucket string) bool {
	b := f.bucket(bucket)
	now := f.now()
	b.mu.Lock()
	early := !b.sweptAt.IsZero() && now.Sub(b.sweptAt).Abs() < sweepPause
	if !early {
		b.sweptAt = now
	}
	b.mu.Unlock()
	return !early && f.sweep(ctx, bucket, defaultMaxRecords) == nil
}

// sweepNowAndThen makes those who add records pay for those that have expired.
func (f *File) sweepNowAndThen(ctx context.Context, bucket string) {
	b := f.bucket(bucket)
	b.mu.Lock()
	b.made++
	due := b.made >= sweepEvery
	if due {
		b.made = 0
	}
	b.mu.Unlock()
	if !due {
		return
	}
	if err := f.sweep(ctx, bucket, sweepAtOnce); err != nil && ctx.Err() == nil {
		f.log.WarnContext(ctx, "sweeping the store failed", "bucket", bucket, "error", err)
	}
}

// sweep removes what has expired among some of a bucket's records.
func (f *File) sweep(ctx context.Context, bucket string, some int) error {
	names := f.names(bucket)
	if len(names) > some {
		rand.Shuffle(len(names), func(i, j int) { names[i], names[j] = names[j], names[i] })
		names = names[:some]
	}
	for _, name := range names {
		if err := ctx.Err(); err != nil {
			return err
		}
		r, _, err := f.read(bucket, name)
		switch {
		case errors.Is(err, errDamaged):
			if err := f.suspect(ctx, bucket, name); !errors.Is(err, ErrNotFound) {
				return err
			}
		case err == nil && r.expired(f.now()):
			f.collect(bucket, name)
		}
	}
	return nil
}

// collect removes an expired record unless somebody is busy with it.
func (f *File) collect(bucket, name string) {
	l := f.stripe(name)
	if !l.try() {
		return
	}
	defer l.unlock()
	r, _, err := f.read(bucket, name)
	if err != nil || !r.expired(f.now()) {
		return
	}
	// A store that cannot be written says so to whoever writes; this is not asked for.
	if err := f.remove(bucket, name); err != nil && !errors.Is(err, ErrUnwritable) {
		f.log.Warn("removing an expired record failed", "bucket", bucket, "error", err)
	}
}

// clean removes what processes that were killed have left half written.
func (f *File) clean() {
	entries, err := os.ReadDir(f.path("tmp"))
	if err != nil {
		return
	}
	for _, e := range entries {
		if info, err := e.Info(); err == nil && time.Since(info.ModTime()) > staleAfter {
			os.Remove(f.path("tmp", e.Name()))
		}
	}
}
