package main

import (
	"cmp"
	"crypto/tls"
	"fmt"
	"log/slog"
	"net/url"

	"gatehouse/auth"
	"gatehouse/auth/endpoint"
	"gatehouse/auth/guard"
	"gatehouse/auth/secret"
	"gatehouse/exchange"
	"gatehouse/gateway"
)

// remoteSignIn is how one signs in to a remote, as auth needs it.
func remoteSignIn(cfg *gateway.Config, server *gateway.Server, clients *guard.Clients, log *slog.Logger) (*auth.Remote, error) {
	a := &server.Auth
	clientSecret, err := clientSecret(cfg, server)
	if err != nil {
		return nil, err
	}
	r := &auth.Remote{
		Name: server.Name, URL: server.URL.String(), Type: a.Type,
		Issuer: a.Issuer, ClientID: a.ClientID, ClientSecret: clientSecret,
		TokenEndpointAuthMethod: a.TokenEndpointAuthMethod,
		CallbackPath:            a.CallbackPath, Scopes: a.Scopes, SSOGroup: a.SSOGroup,
		Audience: a.Audience, Resource: a.Resource, ExpectedIssuer: a.ExpectedIssuer, ConnectorID: a.ConnectorID,
		SubjectTokenType: tokenTypes[a.SubjectTokenType], RequestedTokenType: tokenTypes[a.RequestedTokenType],
	}
	if a.PrivateKeyFile != "" {
		data, err := gateway.ReadSecretFile(cfg.Path(a.PrivateKeyFile))
		if err != nil {
			return nil, err
		}
		if r.Key, err = endpoint.ParseKey([]byte(data.Value())); err != nil {
			return nil, fmt.Errorf("auth.privateKeyFile holds %w", err)
		}
	}
	if a.TokenEndpoint != nil {
		// The config names it, so it is meant to be where it is.
		policy := guard.Policy{Allow: server.AllowAddresses, Loopback: isLoopback(a.TokenEndpoint.Hostname())}
		if err := tlsTowards(cfg, a.TLS, a.TokenEndpoint.Host, &policy, log); err != nil {
			return nil, fmt.Errorf("auth.%w", err)
		}
		r.TokenEndpoint, r.TokenHTTP = a.TokenEndpoint.String(), clients.Client(policy)
	}
	return r, nil
}

// tokenTypes are the config's words.
var tokenTypes = map[string]string{
	"idToken": exchange.TypeIDToken, "accessToken": exchange.TypeAccessToken, "jwt": exchange.TypeJWT,
}

// login is where users log in to the gateway; nil: nowhere.
func login(cfg *gateway.Config, clients *guard.Clients, publicURL string, users bool) *auth.Login {
	l := cfg.Gateway.Login
	if l == nil {
		return nil
	}
	out := &auth.Login{
		Issuer: l.Issuer, ClientID: l.ClientID, ClientSecret: l.ClientSecret, Scopes: l.Scopes,
		HTTP: clients.Client(guard.Policy{Allow: l.AllowAddresses, Loopback: isLoopback(hostOf(l.Issuer))}),
	}
	if users {
		// MCP authorization: the resource of an MCP server is its own URL.
		out.Audience, out.IdentityClaims = cmp.Or(l.Audience, publicURL+"/mcp"), l.IdentityClaims
	}
	if l.IDTokenFile != "" {
		out.IDTokenFile = cfg.Path(l.IDTokenFile)
	}
	return out
}

func hostOf(address string) string {
	u, err := url.Parse(address)
	if err != nil {
		return ""
	}
	return u.Hostname()
}

func clientSecret(cfg *gateway.Config, server *gateway.Server) (secret.Text, error) {
	if file := server.Auth.ClientSecretFile; file != "" {
		return gateway.ReadSecretFile(cfg.Path(file))
	}
	return server.Auth.ClientSecret, nil
}

// tlsTowards adds TLS settings of the config to a policy. Their "ca" adds to the
// system's roots and the gateway's. The client certificate is for that host alone.
func tlsTowards(cfg *gateway.Config, t gateway.TLS, host string, policy *guard.Policy, log *slog.Logger) error {
	if t == (gateway.TLS{}) {
		return nil
	}
	policy.TLS, policy.Host = &tls.Config{ServerName: t.ServerName, MinVersion: tls.VersionTLS12}, host
	if t.CA != "" {
		files := []string{cfg.Path(t.CA)}
		if cfg.Gateway.CA != "" {
			files = append(files, cfg.Path(cfg.Gateway.CA))
		}
		roots, err := gateway.LoadRoots(log, files...)
		if err != nil {
			return fmt.Errorf("tls.ca: %w", err)
		}
		policy.Roots = roots.Get
	}
	if t.Cert != "" {
		certificate, err := gateway.LoadCertificate(cfg.Path(t.Cert), cfg.Path(t.Key), log)
		if err != nil {
			return fmt.Errorf("tls.cert and tls.key: %w", err)
		}
		policy.TLS.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return certificate.Get(nil) }
	}
	return nil
}
