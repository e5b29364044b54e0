// Package auth signs users in to remotes and keeps what they hold there. The
// agent never sees a token: it gets a link, a browser does the rest, and the
// same call works afterwards.
//
// One sign-in walks through the files like this:
//
//   - A remote answers 401. The session asks the [Authorizer] of its principal
//     and remote what to do ([Authorizer.Challenge], authorizer.go). It never
//     waits for a browser.
//   - challenge.go reads the WWW-Authenticate header, discovery.go follows it
//     to the RFC 9728 document and to the authorization server's metadata, and
//     checks both; document.go fetches and reads them.
//   - pin.go keeps what must reach one authorization server alone, a client's
//     secret or an assertion, from those that the remote names later.
//   - registration.go finds a client id there: from the config, by the
//     gateway's Client ID Metadata Document, or by dynamic registration.
//   - flow.go freezes all of that in a flow, together with whom it is for. The
//     flow's link is the only thing that leaves: the session gets it as a
//     [RequiredError]. A pending flow gives the same link to everybody who
//     asks.
//   - A browser opens the link. [Broker.Begin] mints a state, a PKCE verifier
//     and a cookie, and sends it to the authorization server. broker.go builds
//     the [Broker], which holds what all principals have in common.
//   - The browser comes back. [Broker.Finish] (callback.go) uses up the state,
//     checks that it is the same browser, the same remote and the same issuer,
//     and redeems the code with one POST (token.go).
//   - The answer becomes a grant (grant.go), bound to principal, remote, issuer,
//     resource and client, and is written to the store before anybody uses it.
//   - [Authorizer.Token] hands out its access token from memory from then on. At
//     about 80 % of its life it is refreshed in the background, one request in
//     flight per grant, everybody waiting under their own context.
//
// Where nobody signs in to the remote itself, the same [Authorizer] answers by
// silent.go: with the gateway's own credentials, or with what a login at the
// gateway's own provider is good for. That login (login.go) is a grant like any
// other, of the remote that is not there, [LoginRemote]; what it is good for is
// forwarded or, by the exchange room, exchanged. Only when it is missing there is
// a link. Remotes of one group (group.go) may use one grant.
//
// Who a user is, where there are many, inbound.go reads from the bearer tokens of
// their clients, verified with keys.go or by asking the provider, and browser.go
// from the login of their browsers: the same claims make the same [Principal]
// (principal.go). A flow belongs to one, and goes on for nobody else ([Visit]);
// its owner is told when somebody else has tried (stranger.go).
//
// A state carries nothing: it is 256 random bits, stored as a hash, good for one
// use in ten minutes. What a flow needs stays in the [Store] (store.go), which is
// told of every change before the change counts. [Memory] (memory.go) ends with
// the process. [File] (file.go, with its seals in seal.go, its locks in lock.go
// and, if so configured, its key in the system's keychain, keyring.go) is a
// directory that outlives it and that other processes use as well, [Redis]
// (redis.go) the same for other machines: then a refresh takes a lease, so that
// each refresh token is redeemed by one of them, and what the others change is
// looked up again. What remotes last listed is kept beside it (remember.go).
//
// Beside this package, guard makes the HTTP clients, which refuse addresses that
// a remote should not lead to; endpoint asks token endpoints, gate bounds how
// many at once do, and secret is the type of what must not be printed. storetest
// holds what every store must do, authtest the servers that tests sign in at.
//
// errors.go has the errors that others turn into answers. Failures of the
// authorization server never cost a grant: only its own invalid_grant, the user,
// or a change in the config ends one.
package auth
