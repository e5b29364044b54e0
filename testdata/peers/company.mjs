// npm oidc-provider with several users, as a company's identity provider or as
// the provider of a remote with accounts: a login form that takes any name whose
// password is the name, consent without asking, dynamic registration, client ID
// metadata documents, resource indicators, and refresh tokens that are good for
// one use. Access tokens are for the resource that was asked for and nothing
// else, JWTs or opaque; those of a client called "short" live for two seconds.
// Usage: company.mjs PORT jwt|opaque CLIENTS, which are JSON
import Provider, { errors } from 'oidc-provider';

const [port, accessTokenFormat, clients] = process.argv.slice(2);
const provider = new Provider(`http://127.0.0.1:${port}`, {
  clients: JSON.parse(clients),
  pkce: { required: () => true },
  scopes: ['openid', 'offline_access', 'read'],
  claims: { openid: ['sub'], email: ['email'], profile: ['name', 'preferred_username'] },
  conformIdTokenClaims: false,
  rotateRefreshToken: true,
  issueRefreshToken: (_, client) => client.grantTypeAllowed('refresh_token'),
  // Its own fetch keeps away from loopback, where all of this test is.
  fetch: (url, options) => {
    delete options.dispatcher;
    return fetch(url, options);
  },
  findAccount: (_, id) => ({
    accountId: id,
    claims: () => ({ sub: id, name: id, preferred_username: id, email: `${id}@company.example` }),
  }),
  interactions: { url: (_, interaction) => `/person/${interaction.uid}` },
  features: {
    devInteractions: { enabled: false },
    registration: { enabled: true },
    clientIdMetadataDocument: { enabled: true, ack: 'draft-02' },
    introspection: { enabled: true, allowedPolicy: () => true },
    revocation: { enabled: true },
    resourceIndicators: {
      enabled: true,
      useGrantedResource: () => true,
      getResourceServerInfo: (_, resource, client) => {
        if (!resource.startsWith('http://127.0.0.1:')) throw new errors.InvalidTarget();
        return { scope: 'read', audience: resource, accessTokenTTL: client.clientName === 'short' ? 2 : 600, accessTokenFormat, jwt: { sign: { alg: 'RS256' } } };
      },
    },
  },
});

const form = `<!doctype html><title>Log in</title>
<form method="post" action=""><input name="username" value=""><input type="password" name="password" value=""><button>Log in</button></form>`;

provider.use(async (ctx, next) => {
  if (!ctx.path.startsWith('/person/')) return next();
  const { prompt, params, session, grantId } = await provider.interactionDetails(ctx.req, ctx.res);
  if (prompt.name === 'login' && ctx.method !== 'POST') {
    ctx.type = 'html';
    ctx.body = form;
    return;
  }
  if (prompt.name === 'login') {
    const chunks = [];
    for await (const chunk of ctx.req) chunks.push(chunk);
    const said = new URLSearchParams(Buffer.concat(chunks).toString());
    const name = said.get('username');
    if (!name || said.get('password') !== name) return ctx.throw(403);
    ctx.respond = false;
    return provider.interactionFinished(ctx.req, ctx.res, { login: { accountId: name } }, { mergeWithLastSubmission: false });
  }
  const grant = grantId ? await provider.Grant.find(grantId) : new provider.Grant({ accountId: session.accountId, clientId: params.client_id });
  const { missingOIDCScope = [], missingOIDCClaims = [], missingResourceScopes = {} } = prompt.details;
  if (missingOIDCScope.length > 0) grant.addOIDCScope(missingOIDCScope.join(' '));
  if (missingOIDCClaims.length > 0) grant.addOIDCClaims(missingOIDCClaims);
  for (const [of, scopes] of Object.entries(missingResourceScopes)) grant.addResourceScope(of, scopes.join(' '));
  ctx.respond = false;
  return provider.interactionFinished(ctx.req, ctx.res, { consent: { grantId: await grant.save() } }, { mergeWithLastSubmission: true });
});
provider.listen(Number(port), '127.0.0.1', () => console.log('listening'));
