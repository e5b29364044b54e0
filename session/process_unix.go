//go:build unix

package session

import (
	"os/exec"
	"syscall"
)

// ownGroup makes the command the head of a process group, so that what it
// starts ends with it, and a Ctrl-C in the terminal is the gateway's alone.
func ownGroup(cmd *exec.Cmd) { cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} }

func stopGroup(cmd *exec.Cmd) { _ = syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }

func killGroup(cmd *exec.Cmd) { _ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
