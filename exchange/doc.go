// Package exchange turns the proof of who somebody is into a token for one
// remote, without a person: by token exchange (RFC 8693), by an identity
// assertion grant (ID-JAG: an exchange at the identity provider, then RFC 7523
// at the remote's authorization server), or, for a remote that serves machines,
// by the gateway's own credentials.
//
// It is a leaf. Who somebody is comes in as an argument, a [Subject], and where
// to go as a [Target] (target.go); [Exchanger.Token] (exchange.go) has no other
// source of either. An answer is checked before it is used (answer.go): its issuer, its audience, its
// kind. What passes is kept (cache.go) under everything that went into the
// request, so that no two requests that differ share a token; least recently
// used ones go first. Of those who need a token that is not there, one asks, the
// others wait, each for as long as they like, and no lock is held meanwhile.
package exchange
