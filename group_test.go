package main

import (
	"fmt"
	"net/http"
	"strings"
	"testing"

	"gatehouse/auth/authtest"
)

// group starts two remotes of one authorization server in one group, and a third
// outside of it.
func group(t *testing.T) (as *authtest.AS, a, b, c *authtest.Remote, client *authtest.Client, gw *process) {
	t.Helper()
	as = authtest.NewAS(t)
	a = authtest.NewRemote(t, authtest.RemoteConfig{AS: as})
	b = authtest.NewRemote(t, authtest.RemoteConfig{AS: as})
	c = authtest.NewRemote(t, authtest.RemoteConfig{AS: as})
	gw = startServe(t, fmt.Sprintf(`{"mcpServers": {"a": {"url": %q, "auth": {"ssoGroup": "corp"}}, "b": {"url": %q, "auth": {"ssoGroup": "corp"}}, "c": {"url": %q}}}`,
		a.URL, b.URL, c.URL))
	return as, a, b, c, authtest.Legacy(t, gw.url), gw
}

// TestGroupShares: a token that is for several remotes of a group serves them,
// until the one sign-in ends; nobody outside the group gets it.
func TestGroupShares(t *testing.T) {
	t.Parallel()
	as, a, b, c, client, _ := group(t)
	as.Set(func(k *authtest.ASKnobs) { k.Audiences = []string{a.URL, b.URL, c.URL} })
	signIn(t, link(t, client.Call("a_echo", nil), "a"))
	echo(t, client, "a_echo", "own")
	echo(t, client, "b_echo", "shared")
	link(t, client.Call("c_echo", nil), "c")
	if n := as.Count(authtest.EndpointAuthorize); n != 1 {
		t.Errorf("%d sign-ins", n)
	}
	if s := status(t, client)["b"]; s.Status != "connected" || s.SignIn != "signed_in" {
		t.Errorf("status: %+v", s)
	}
	// A refresh serves both.
	as.ExpireAll()
	echo(t, client, "b_echo", "refreshed")
	echo(t, client, "a_echo", "refreshed")
	if n := as.Count(authtest.EndpointAuthorize); n != 1 {
		t.Errorf("%d sign-ins", n)
	}
	if say := authtest.Text(client.Call("gateway_logout", map[string]any{"remote": "b"})); !strings.Contains(say, "a, b (one sign-in for the group): signed out") {
		t.Errorf("signing out: %s", say)
	}
	link(t, client.Call("a_echo", nil), "a")
	link(t, client.Call("b_echo", nil), "b")
}

// TestGroupApart: a token that does not say that it is for the other remote never
// gets there; the second sign-in goes through without a prompt, and with one
// where the authorization server wants that.
func TestGroupApart(t *testing.T) {
	t.Parallel()
	for _, prompt := range []string{"", "login_required"} {
		as, a, b, _, client, _ := group(t)
		as.Set(func(k *authtest.ASKnobs) {
			k.PromptNeeded = prompt
			if prompt == "" {
				k.Audiences = []string{a.URL} // else opaque, which says nothing
			}
		})
		signIn(t, link(t, client.Call("a_echo", nil), "a"))
		echo(t, client, "a_echo", "own")
		as.Set(func(k *authtest.ASKnobs) { k.Audiences = nil })
		signIn(t, link(t, client.Call("b_echo", nil), "b"))
		echo(t, client, "b_echo", "own")
		var prompts []string
		for _, r := range as.Requests(authtest.EndpointAuthorize) {
			prompts = append(prompts, r.Query.Get("prompt"))
		}
		want := []string{"", "none"}
		if prompt != "" {
			want = append(want, "")
		}
		if fmt.Sprint(prompts) != fmt.Sprint(want) {
			t.Errorf("prompts %q, want %q", prompts, want)
		}
		for _, r := range b.Requests(authtest.EndpointMCP) {
			token := strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")
			if info, ok := as.Valid(token); token != "" && (!ok || info.Audience != b.URL) {
				t.Error("b saw a token that is not for it")
			}
		}
		// Each ends for itself.
		if say := authtest.Text(client.Call("gateway_logout", map[string]any{"remote": "b"})); !strings.HasPrefix(say, "b: signed out") {
			t.Errorf("signing out: %s", say)
		}
		echo(t, client, "a_echo", "still")
	}
}

// TestGroupDenied: what is no question of a prompt is an answer.
func TestGroupDenied(t *testing.T) {
	t.Parallel()
	as, _, _, _, client, _ := group(t)
	signIn(t, link(t, client.Call("a_echo", nil), "a"))
	as.Set(func(k *authtest.ASKnobs) { k.PromptNeeded = "access_denied" })
	page := authtest.NewBrowser(t).Open(link(t, client.Call("b_echo", nil), "b"))
	if page.Status != http.StatusBadRequest || !strings.Contains(page.Body, "Access was not granted") {
		t.Errorf("%d %s", page.Status, page.Body)
	}
}
