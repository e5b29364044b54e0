// npm oidc-provider as an authorization server: dynamic registration, PKCE,
// resource indicators, and refresh tokens that are good for one use: a second
// one ends all tokens of the sign-in. Its user signs in and agrees by just being
// sent there. Usage: oidc-provider.mjs PORT RESOURCE SECONDS
import Provider from 'oidc-provider';

const [port, resource, seconds] = process.argv.slice(2);
const provider = new Provider(`http://127.0.0.1:${port}`, {
  clients: [{ client_id: 'resource', client_secret: 'of-the-resource-server', redirect_uris: [], response_types: [], grant_types: [] }],
  pkce: { required: () => true },
  scopes: ['openid', 'offline_access', 'read'],
  rotateRefreshToken: true,
  findAccount: (_, id) => ({ accountId: id, claims: () => ({ sub: id }) }),
  interactions: { url: (_, interaction) => `/auto/${interaction.uid}` },
  features: {
    devInteractions: { enabled: false },
    registration: { enabled: true },
    introspection: { enabled: true, allowedPolicy: () => true },
    revocation: { enabled: true },
    resourceIndicators: {
      enabled: true,
      useGrantedResource: () => true,
      getResourceServerInfo: () => ({ scope: 'read', audience: resource, accessTokenTTL: Number(seconds), accessTokenFormat: 'opaque' }),
    },
  },
});

provider.use(async (ctx, next) => {
  if (!ctx.path.startsWith('/auto/')) return next();
  const { prompt, params, session, grantId } = await provider.interactionDetails(ctx.req, ctx.res);
  ctx.respond = false;
  if (prompt.name === 'login') {
    return provider.interactionFinished(ctx.req, ctx.res, { login: { accountId: 'demo' } }, { mergeWithLastSubmission: false });
  }
  const grant = grantId ? await provider.Grant.find(grantId) : new provider.Grant({ accountId: session.accountId, clientId: params.client_id });
  const { missingOIDCScope = [], missingResourceScopes = {} } = prompt.details;
  if (missingOIDCScope.length > 0) grant.addOIDCScope(missingOIDCScope.join(' '));
  for (const [of, scopes] of Object.entries(missingResourceScopes)) grant.addResourceScope(of, scopes.join(' '));
  return provider.interactionFinished(ctx.req, ctx.res, { consent: { grantId: await grant.save() } }, { mergeWithLastSubmission: true });
});
provider.listen(Number(port), '127.0.0.1', () => console.log('listening'));
