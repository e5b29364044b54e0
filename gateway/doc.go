// Package gateway is what a client and a browser see of Gatehouse.
//
// A request takes this way, and its answer comes back on it:
//
//   - http.go takes it in: Host and Origin are checked, users.go says whose it
//     is, the body is read within its limit, and the era and the session choose
//     a [view] (gateway.go holds them, one for each principal; clients.go the
//     sessions) and one of the SDK's two handlers. stdio.go does the same for a
//     pipe, sse.go for clients of the deprecated HTTP+SSE. An ordinary tools/call
//     goes past the SDK (short.go).
//   - server.go is the adapter: SDK types stop here, exact bytes go on. It hands
//     what concerns remotes to the core and leaves the handshake, pings and
//     who listens on which stream to the SDK.
//   - core.go is the core: it looks a tool up in the merged catalog (merge.go,
//     names.go) and sends the call to the remote, or to the gateway's own tools
//     (tools.go, with status.go and login.go). content.go does the same for
//     prompts, resources and completion; linked.go knows whose resource a link
//     in a result is. notify.go passes on what the remote says meanwhile,
//     subscribe.go that a resource has changed; listen.go tells a client on a
//     pipe what it listens for.
//   - input.go is what a request needs of its client first: a sign-in, or what
//     the remote asks. A legacy client is sent a request (peers.go); one of
//     2026-07-28 gets an answer that says so, and comes back with a sealed ticket
//     (tickets.go) to where its call is parked.
//   - errors.go is the one place where errors become results, JSON-RPC errors
//     and pages.
//
// A sign-in that such a call asks for continues in pages.go: the link begins
// the flow, the callback finishes it, connects the session, and says what came
// of it. The client is told by list_changed (view.go) and repeats its call.
//
// home.go is the status page, where a person at a browser sees how the remotes
// stand and signs in and out. Where there are many users, both know by users.go
// who is at the browser.
//
// What happens is counted in metrics.go and, as far as it concerns who did what,
// written down in audit.go. What a peer may take of the gateway is bounded:
// calllimit.go for calls of one principal, ratelimit.go for callbacks and tokens
// that nobody knows, slow.go for its time, refuse.go and lines.go for the form of
// what it sends.
//
// config.go reads the configuration, with config_auth.go for signing in and
// config_parse.go for the file's form; certificate.go reads the files of TLS again
// when they change. Nothing in this package looks at flags or the environment.
package gateway
