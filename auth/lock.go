package auth

import (
	"context"
	"math/rand/v2"
	"os"
	"time"

	"github.com/gofrs/flock"
)

// fileLock excludes others, in this process and in others. Its file is never
// removed: whoever locks a file that somebody else has just replaced would be
// alone with it, and so would the other.
type fileLock struct {
	mine chan struct{} // holds one element while a goroutine of this process has the lock
	file *flock.Flock  // of whoever has mine; flock itself lets a process lock twice
}

func newFileLock(path string) *fileLock {
	return &fileLock{mine: make(chan struct{}, 1), file: flock.New(path)}
}

// The pauses between two looks at a lock that another process has.
const (
	lockPause    = time.Millisecond
	lockPauseMax = 25 * time.Millisecond
)

// lock waits for the lock until ctx ends.
func (l *fileLock) lock(ctx context.Context) error {
	select {
	case l.mine <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	for pause := lockPause; ; pause = min(2*pause, lockPauseMax) {
		ok, err := l.tryFile()
		if ok {
			return nil
		} else if err != nil {
			<-l.mine
			return err
		}
		timer := time.NewTimer(pause/2 + rand.N(pause))
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			<-l.mine
			return ctx.Err()
		}
	}
}

// try takes the lock if it is free this moment.
func (l *fileLock) try() bool {
	select {
	case l.mine <- struct{}{}:
	default:
		return false
	}
	ok, err := l.tryFile()
	if !ok || err != nil {
		<-l.mine
		return false
	}
	return true
}

// tryFile locks the file. mine is held.
func (l *fileLock) tryFile() (bool, error) {
	for range 3 {
		ok, err := l.file.TryLock()
		if !ok || err != nil {
			return false, err
		}
		if l.current() {
			return true, nil
		}
		// Somebody removed the file after all: the next turn opens the new one.
		l.file.Close()
	}
	return false, nil
}

// current reports whether what is locked is what others would lock.
func (l *fileLock) current() bool {
	held, err := l.file.Stat()
	if err != nil {
		return false
	}
	there, err := os.Stat(l.file.Path())
	return err == nil && os.SameFile(held, there)
}

func (l *fileLock) unlock() {
	l.file.Close()
	<-l.mine
}
