// Package session holds the live connections to remotes: for each principal
// one [Session], in it one connection to each remote, and what the remote last
// listed there, its [Catalog].
//
// One call walks through the files like this:
//
//   - [Pool.Open] (pool.go) finds or makes the principal's session and starts
//     dialing all remotes in the background, so that the catalogs are there
//     when a client asks ([Session.Catalogs], session.go). While the principal
//     has no client there, its connections are closed (rest.go).
//   - [Session.Call] finds the remote's connection. connection.go dials if
//     there is none, at most once at a time, everybody waiting under their own
//     context. A failed dial is never remembered as an answer: the next call
//     dials again.
//   - era.go asks a remote first whether it speaks protocol 2026-07-28, and
//     remembers it; link.go is what was agreed on. A legacy remote that may ask
//     the client something gets a link for each client, with that client's
//     capabilities, beside the main one. probe.go does the asking where the
//     remote is a program, which may die of it.
//   - call.go knows which call a message of the remote belongs to, and asks the
//     client behind it ([Caller], caller.go). progress.go gives each call a
//     progress token of the gateway's own, level.go tells remotes which log
//     messages are wanted, aside.go sends what nobody waits for.
//   - wire.go puts the request into one POST, with the principal's token for
//     this remote, and reads the answer: plain JSON, or an event stream
//     (sse.go). message.go looks at the envelope only. Params and results stay
//     the bytes that they are; package rawjson reads and changes members in them.
//     A local command (process.go, with process_unix.go and process_other.go)
//     and the deprecated HTTP+SSE (legacysse.go) are pipes, where one stream
//     each way carries everything (duplex.go).
//   - A 401 or 403 goes to the [Authorizer]. If that has another token the
//     request is sent once more; otherwise its error is the call's, and the
//     connection is as good as before.
//   - A remote that forgot the MCP session (404) has not executed the request,
//     so there is a new one and the request is repeated, once.
//   - catalog.go reads the lists that the remote declares to have page by page
//     and drops definitions that cannot be used, one by one.
//   - stream.go keeps the event stream of a remote open that has one to offer,
//     listen.go that of a remote of 2026-07-28: there it says that a list or a
//     resource has changed. Streams may be cut as often as they like.
//   - remember.go keeps catalogs from one run to the next.
//   - errors.go says in one sentence what went wrong. Remotes' own texts stay
//     in [ResponseError], for the client that asked, and in no log.
//   - common.go is the exception to one connection for each principal: where
//     nobody signs in, and the remote keeps nothing of its client, all have one
//     handshake, one catalog and one event stream in common. What belongs to a
//     call has a way of its own there too, and what comes beside all calls
//     reaches nobody. A remote that begins an MCP session keeps state.
//   - slots.go bounds the processes of one command. They are never shared.
//   - Whoever finds a remote down waits in recovery.go: one loop for each
//     remote tries it with one of those who wait and wakes the others when it
//     is back.
//
// What nobody waits for is done quietly: it uses tokens that are there and
// never starts a sign-in. A request is never sent twice unless the remote said
// that it did not execute it; a call that got no answer fails instead.
package session
