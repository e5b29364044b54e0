package main

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/chromedp/chromedp"

	"gatehouse/auth/authtest"
)

// TestDemoInBrowser walks `gatehouse demo` as its user does: add a note, open
// the link in a real browser, click, and add the note.
func TestDemoInBrowser(t *testing.T) {
	browser := newBrowser(t, nil)
	demoCmd := start(t, "url", []string{"demo", "--listen", "127.0.0.1:0", "--log-level", "debug", "--log-format", "json"})
	client := authtest.Legacy(t, demoCmd.url)
	url := link(t, client.Call("notes_add_note", map[string]any{"text": "buy milk"}), "notes")

	run := func(steps ...chromedp.Action[chromedp.Void]) {
		t.Helper()
		if err := chromedp.Do(browser, steps...); err != nil {
			t.Fatal(err)
		}
	}
	run(chromedp.Navigate(url), chromedp.WaitVisible(chromedp.CSS("form button")))
	screenshot(t, browser, "login")
	run(chromedp.Click(chromedp.CSS("form button")), chromedp.WaitVisible(chromedp.CSS("main.ok")))
	screenshot(t, browser, "signed-in")
	said := text(t, browser, "main")
	if !regexp.MustCompile(`You are signed in[\s\S]*notes is connected, \d+ tools`).MatchString(said) {
		t.Errorf("the page says %q", said)
	}
	at, err := chromedp.Run(browser, chromedp.Location())
	if err != nil {
		t.Fatal(err)
	}
	if at != url {
		t.Errorf("the sign-in ended at %s, want %s: no code or state in the address bar", at, url)
	}
	if result := client.Call("notes_add_note", map[string]any{"text": "buy milk"}); result.IsError {
		t.Errorf("the same call after the sign-in: %s", authtest.Text(result))
	}

	// Opened again, the link says what came of it; a wrong one says so.
	run(chromedp.Navigate(url), chromedp.WaitVisible(chromedp.CSS("main")))
	if again := text(t, browser, "main"); again != said {
		t.Errorf("the link, opened again, says %q", again)
	}
	run(chromedp.Navigate(url+"x"), chromedp.WaitVisible(chromedp.CSS("main")))
	screenshot(t, browser, "expired")
	if again := text(t, browser, "main"); !strings.Contains(again, "expired") {
		t.Errorf("an unknown link says %q", again)
	}
}

func text(t *testing.T, browser context.Context, selector string) string {
	t.Helper()
	said, err := chromedp.Run(browser, chromedp.Text(chromedp.CSS(selector)))
	if err != nil {
		t.Fatal(err)
	}
	return said
}

// newBrowser starts Chromium. On a user's machine without one the test is
// skipped; in CI that is a failure.
func newBrowser(t *testing.T, flags map[string]any) context.Context {
	t.Helper()
	if _, err := exec.LookPath("chromium"); err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal("chromium is missing")
		}
		t.Skip("chromium is missing: apt-get install chromium runs this test")
	}
	options := append(chromedp.DefaultExecAllocatorOptions[:],
		chromedp.ExecPath("chromium"),
		chromedp.NoSandbox,
		chromedp.UserDataDir(t.TempDir()),
		chromedp.WindowSize(480, 720),
		chromedp.Flag("disable-quic", true),
		chromedp.Flag("disable-component-update", true),
	)
	for name, value := range flags {
		options = append(options, chromedp.Flag(name, value))
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	t.Cleanup(cancel)
	ctx, cancel = chromedp.NewExecAllocator(ctx, options...)
	t.Cleanup(cancel)
	ctx, cancel = chromedp.NewContext(ctx)
	t.Cleanup(cancel)
	return ctx
}

// screenshot keeps what the browser shows in $GATEHOUSE_SCREENSHOTS, if that is set.
func screenshot(t *testing.T, browser context.Context, name string) {
	t.Helper()
	dir := os.Getenv("GATEHOUSE_SCREENSHOTS")
	if dir == "" {
		return
	}
	png, err := chromedp.Run(browser, chromedp.FullScreenshot(100))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, name+".png"), png, 0o644); err != nil {
		t.Fatal(err)
	}
}
