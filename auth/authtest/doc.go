// Package authtest is what the tests of every room sign in with: authorization
// servers, protected MCP servers, a browser, MCP clients, and a log that fails
// the test when a secret is in it.
//
//   - [AS] is an authorization server with a knob for every misbehaviour,
//   - [OP] is a real one: the provider of gatehouse/demo, which zitadel's op is,
//   - [Remote] is an MCP server behind either of them,
//   - [Browser] follows a link as a person does, signs in, and ends at a page,
//   - [Client] is an MCP client that remembers what it was notified of,
//   - [Canary] collects a log and looks for secrets in it when the test ends.
//
// A walk, start to end:
//
//	as := authtest.NewAS(t)
//	remote := authtest.NewRemote(t, authtest.RemoteConfig{AS: as})
//	canary := authtest.NewCanary(t, as, remote)
//	gw := …(remote.URL, canary.Logger())
//	client := authtest.Legacy(t, gw.URL)
//	link := …(client.Call("notes_echo", map[string]any{"text": "hi"}))
//	page := authtest.NewBrowser(t).Open(link)
//	… page.Status, page.Body, as.Count(authtest.EndpointToken), client.WaitChanged(ctx, 0)
//
// Knobs are plain fields, changed under a lock by Set, before the test or in
// the middle of it; their zero value behaves well:
//
//	as.Set(func(k *authtest.ASKnobs) { k.Iss = authtest.IssWrong; k.NoRefresh = true })
//	remote.Set(func(k *authtest.RemoteKnobs) { k.ToolScopes = map[string][]string{"add": {"math"}} })
//
// Whatever has no field of its own is an [Intercept], which stands in front of
// one endpoint and answers instead of it, changes its answer, or delays it:
//
//	k.Token    = authtest.Answer(200, "text/html", "<html>")
//	k.Token    = authtest.OnGrant("refresh_token", authtest.Status(503))
//	k.Token    = authtest.EditJSON(func(doc map[string]any) { doc["token_type"] = "mac" })
//	k.Metadata = authtest.Edit(authtest.Nest(10_000))
//	k.Register = authtest.First(1, authtest.Status(429, "Retry-After: 60"))
//	k.MCP      = authtest.OnRPC("tools/list", authtest.Hold(gate))
//
// Nothing here sleeps: what takes time waits for a channel that the test holds.
// Everything ends with the test. Nothing here imports gatehouse/auth.
package authtest
