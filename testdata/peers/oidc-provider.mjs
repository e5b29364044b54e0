// npm oidc-provider as an authorization server: dynamic registration, PKCE,
// resource indicators, and refresh tokens that are good for one use: a second
// one ends all tokens of the sign-in. Its user signs in and agrees by just being
// sent there. Usage: oidc-provider.mjs PORT RESOURCE SECONDS [EXCHANGE]
//
// EXCHANGE is JSON: a client that may exchange its ID tokens (RFC 8693), and for
// which targets: [{ audience, resource, scope, format }]. GET /exchanges tells
// which exchanges were made.
import Provider, { errors } from 'oidc-provider';

const [port, resource, seconds, exchange] = process.argv.slice(2);
const { client, targets = [] } = JSON.parse(exchange ?? '{}');
const clients = [{ client_id: 'resource', client_secret: 'of-the-resource-server', redirect_uris: [], response_types: [], grant_types: [] }];
if (client) clients.push(client);
const provider = new Provider(`http://127.0.0.1:${port}`, {
  clients,
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

const tokenExchange = 'urn:ietf:params:oauth:grant-type:token-exchange';
const idToken = 'urn:ietf:params:oauth:token-type:id_token';
const accessToken = 'urn:ietf:params:oauth:token-type:access_token';
const exchanges = [];
provider.registerGrantType(tokenExchange, async (ctx) => {
  const { client: by, params } = ctx.oidc;
  if (params.subject_token_type !== idToken || (params.requested_token_type ?? accessToken) !== accessToken) {
    throw new errors.InvalidRequest('only ID tokens are exchanged, for access tokens');
  }
  let subject;
  try {
    // Signature, issuer, and that it was issued to the client that asks.
    ({ payload: subject } = await provider.IdToken.validate(params.subject_token, by));
  } catch {
    throw new errors.InvalidGrant('the subject token is not valid');
  }
  if (subject.exp <= Date.now() / 1000) throw new errors.InvalidGrant('the subject token has expired');
  const target = targets.find((t) => (params.audience ? t.audience === params.audience : t.resource === params.resource));
  if (!target) throw new errors.InvalidTarget('no such audience or resource');
  const scope = (params.scope ?? '').split(' ').filter((s) => target.scope.split(' ').includes(s)).join(' ');
  if (!scope) throw new errors.InvalidScope('no scope of the target is asked for', params.scope);

  const grant = new provider.Grant({ accountId: subject.sub, clientId: by.clientId });
  const identifier = target.audience ?? target.resource;
  grant.addResourceScope(identifier, scope);
  const token = new provider.AccessToken({ accountId: subject.sub, client: by, grantId: await grant.save(), gty: 'token_exchange', scope });
  token.resourceServer = new provider.ResourceServer(identifier, {
    audience: identifier, scope: target.scope, accessTokenTTL: 600, accessTokenFormat: target.format, jwt: { sign: { alg: 'RS256' } },
  });
  ctx.oidc.entity('AccessToken', token);
  ctx.body = {
    access_token: await token.save(), issued_token_type: accessToken, token_type: token.tokenType, expires_in: token.expiration, scope: token.scope,
  };
  exchanges.push({ target: identifier, scope: params.scope, subject: subject.sub });
}, ['audience', 'resource', 'scope', 'requested_token_type', 'subject_token', 'subject_token_type']);

provider.use(async (ctx, next) => {
  if (ctx.path === '/exchanges') {
    ctx.body = exchanges;
    return;
  }
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
