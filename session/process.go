package session

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode"
)

// Command is a remote that is a local program: MCP over its stdin and stdout.
type Command struct {
	Path string   // a file, or a name that is looked up in PATH
	Args []string // never read by a shell
	Env  []string // "NAME=value": all that it gets
	Dir  string   // where it runs; empty: where the gateway does

	Secrets []string // values of Env that its stderr must not put into the log
}

const (
	maxStderrLine = 1 << 10 // of which more is cut off in the log
	maxStderrRate = 100     // lines of stderr that are logged in stderrSpan
	stderrSpan    = 10 * time.Second
	maxNonsense   = 1000 // lines on stdout that are no messages, before the program is given up
	stdinGrace    = 700 * time.Millisecond
	killGrace     = 700 * time.Millisecond
	outputGrace   = 700 * time.Millisecond // to read what is left when it has ended
)

// process is a running command.
type process struct {
	cmd   *exec.Cmd
	stdin io.WriteCloser
	slot  *slot
	done  chan struct{} // closed when it has ended and all of its output is read

	writing chan struct{} // holds one: who writes to stdin
	closing sync.Once
}

// startProcess starts the command of a link. What it says goes to d.
func (c *connection) startProcess(ctx context.Context, d *duplex) (*process, error) {
	in, err := c.admit(ctx)
	if err != nil {
		return nil, err
	}
	p, err := c.startIn(in, d)
	if err != nil {
		c.remote.slots.free(in)
		return nil, err
	}
	return p, nil
}

func (c *connection) startIn(in *slot, d *duplex) (*process, error) {
	spec := c.remote.Command
	cmd := exec.Command(spec.Path, spec.Args...)
	cmd.Env, cmd.Dir = spec.Env, spec.Dir
	ownGroup(cmd)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, c.remote.notStarted(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, c.remote.notStarted(err)
	}
	stderr, err := cmd.StderrPipe()
	if err != nil {
		return nil, c.remote.notStarted(err)
	}
	if err := cmd.Start(); err != nil {
		return nil, c.remote.notStarted(err)
	}
	log := c.session.log.With("remote", c.remote.Name, "pid", cmd.Process.Pid)
	log.Info("command started")
	p := &process{cmd: cmd, stdin: stdin, slot: in, done: make(chan struct{}), writing: make(chan struct{}, 1)}
	// Not the session's goroutine: Close waits for those before it ends processes.
	go p.watch(c, d, stdout, stderr, log)
	return p, nil
}

// watch reads what the program says until it ends.
func (p *process) watch(c *connection, d *duplex, stdout, stderr io.ReadCloser, log *slog.Logger) {
	defer close(p.done)
	defer c.remote.slots.free(p.slot)
	var exit error
	var exiting sync.WaitGroup
	read := make(chan struct{})
	exiting.Go(func() {
		// Not cmd.Wait, which has to come after the end of the output: what the
		// program has started may hold that open for ever.
		exit = reap(p.cmd)
		timer := time.NewTimer(outputGrace)
		defer timer.Stop()
		select {
		case <-read:
		case <-timer.C:
		}
		// What it has started, also where its output is somewhere else. The group's
		// number is no other process's as long as there is any of them.
		killGroup(p.cmd)
		stdout.Close()
		stderr.Close()
	})
	var errors sync.WaitGroup
	errors.Go(func() { logLines(stderr, c.remote.Command.Secrets, log) })
	readErr := readLines(stdout, maxMessage, func(line []byte) error {
		err := d.deliver(line)
		if err != nil {
			log.Debug("a line on stdout that is no message", "bytes", len(line), "error", err)
		}
		return err
	})
	if readErr != nil {
		// It goes on writing what is not read any more.
		killGroup(p.cmd)
	}
	errors.Wait()
	close(read)
	exiting.Wait()
	p.stdin.Close()
	err := exit
	if readErr != nil {
		err = readErr
	}
	if err == nil {
		err = errEnded
	}
	log.Info("command ended", "error", err)
	if l := d.stop(err); l != nil {
		c.drop(l, c.remote.fail(KindUnreachable, err, "ended by itself (%v). It is started again.", err))
	}
}

// reap waits for the end of the program itself, and says how it ended.
func reap(cmd *exec.Cmd) error {
	state, err := cmd.Process.Wait()
	if err == nil && !state.Success() {
		err = &exec.ExitError{ProcessState: state}
	}
	return err
}

var (
	errEnded    = errors.New("exit status 0")
	errNonsense = errors.New("too much that is no MCP message")
)

// commandTimeout is what a program has to start and to introduce itself: some
// are downloaded first.
const commandTimeout = 3 * time.Minute

// patience is how long a handshake may take.
func (r *remote) patience(usual time.Duration) time.Duration {
	if r.Command != nil {
		return commandTimeout
	}
	return usual
}

// notStarted says why a command did not start.
func (r *remote) notStarted(err error) *Failure {
	name := shown(r.Command.Path)
	switch {
	case errors.Is(err, exec.ErrNotFound), errors.Is(err, fs.ErrNotExist):
		return r.fail(KindUnreachable, err, "cannot be started: %s is not found. Is it installed, and in PATH? And is its \"cwd\" there?", name)
	case errors.Is(err, fs.ErrPermission):
		return r.fail(KindUnreachable, err, "cannot be started: %s may not be executed.", name)
	}
	return r.fail(KindUnreachable, err, "cannot be started: %s. The log says why.", name)
}

// send writes one line. "Messages are delimited by newlines, and MUST NOT
// contain embedded newlines."
func (p *process) send(ctx context.Context, message []byte) error {
	line := make([]byte, 0, len(message)+1)
	for _, b := range message {
		// Between the tokens of JSON only, where they mean nothing: inside texts
		// they are escaped.
		if b != '\n' && b != '\r' {
			line = append(line, b)
		}
	}
	line = append(line, '\n')
	select {
	case p.writing <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	case <-p.done:
		return errEnded
	}
	written := make(chan error, 1)
	go func() {
		defer func() { <-p.writing }()
		_, err := p.stdin.Write(line)
		written <- err
	}()
	select {
	case err := <-written:
		if err != nil {
			return fmt.Errorf("writing to stdin: %w", err)
		}
		return nil
	case <-ctx.Done():
		return ctx.Err() // a program that does not read; its end ends the write
	}
}

// close ends the program: its input ends, then it is told, then killed. What it
// has started is killed when it has ended.
func (p *process) close(context.Context) {
	p.closing.Do(func() {
		p.stdin.Close()
		if p.wait(stdinGrace) {
			return
		}
		stopGroup(p.cmd)
		if p.wait(killGrace) {
			return
		}
		killGroup(p.cmd)
	})
	<-p.done
}

func (p *process) wait(d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-p.done:
		return true
	case <-timer.C:
		return false
	}
}

// readLines calls f with each line that is not empty; what f refuses counts as
// nonsense. A line beyond the limit is an error.
func readLines(r io.Reader, limit int, f func(line []byte) error) error {
	in := bufio.NewReaderSize(r, 64<<10)
	var line []byte
	nonsense := 0
	for {
		chunk, err := in.ReadSlice('\n')
		if len(line)+len(chunk) > limit {
			return errTooLarge
		}
		line = append(line, chunk...)
		if errors.Is(err, bufio.ErrBufferFull) {
			continue
		}
		if text := strings.TrimSpace(string(line)); text != "" {
			if f([]byte(text)) != nil {
				if nonsense++; nonsense > maxNonsense {
					return errNonsense
				}
			}
		}
		line = nil
		if err != nil {
			return nil // the end, or as good as that
		}
	}
}

// logLines writes what a program says on stderr to the log, within bounds, and
// without these secrets.
func logLines(r io.Reader, secrets []string, log *slog.Logger) {
	longest := 0
	var replaced []string
	for _, s := range slices.SortedFunc(slices.Values(secrets), func(a, b string) int { return len(b) - len(a) }) {
		longest = max(longest, len(s))
		replaced = append(replaced, s, "[REDACTED]")
	}
	redact := strings.NewReplacer(replaced...)
	in := bufio.NewReaderSize(r, maxStderrLine)
	since, logged, dropped := time.Now(), 0, 0
	for {
		chunk, more, err := in.ReadLine()
		if err != nil {
			return
		}
		line := string(chunk)
		if more {
			line = line[:max(0, len(line)-longest)] // half a secret is not recognized
		}
		text := strings.Map(func(c rune) rune {
			if unicode.IsControl(c) {
				return ' '
			}
			return c
		}, redact.Replace(line))
		for more && err == nil {
			_, more, err = in.ReadLine()
		}
		if now := time.Now(); now.Sub(since) > stderrSpan {
			if dropped > 0 {
				log.Info("lines on stderr left out", "count", dropped)
			}
			since, logged, dropped = now, 0, 0
		}
		if logged++; logged > maxStderrRate {
			dropped++
			continue
		}
		log.Info("stderr", "line", text)
	}
}
