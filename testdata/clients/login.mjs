// MCP clients that know nothing but the URL of a gateway for many users: what
// they read there leads them to the company's provider, they register, a person
// logs in, and they call a tool. Each is another person. BROWSER is person.mjs.
// Usage: login.mjs GATEWAY LOG, which is what the gateway logs as JSON
import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { randomUUID } from 'node:crypto';
import { readFile } from 'node:fs/promises';
import { createRequire } from 'node:module';
import path from 'node:path';
import { promisify } from 'node:util';
import * as modern from '@modelcontextprotocol/client';
import { Client } from '@modelcontextprotocol/sdk/client/index.js';
import { StdioClientTransport } from '@modelcontextprotocol/sdk/client/stdio.js';
import { StreamableHTTPClientTransport } from '@modelcontextprotocol/sdk/client/streamableHttp.js';
import { check, finish, logIn } from './checks.mjs';

const [gateway, log] = process.argv.slice(2);
const callback = 'http://127.0.0.1:9/callback'; // nobody listens there

// Provider is what both SDKs want of a program: a place for what they learn, and
// a browser.
class Provider {
  constructor(user) {
    this.user = user;
    this.logins = 0;
    this.clientMetadata = {
      client_name: user,
      redirect_uris: [callback],
      grant_types: ['authorization_code', 'refresh_token'],
      response_types: ['code'],
      token_endpoint_auth_method: 'none',
    };
  }
  redirectUrl = callback;
  state = () => (this.sent = randomUUID());
  clientInformation = () => this.information;
  saveClientInformation = information => (this.information = information);
  tokens = () => this.saved;
  saveTokens = tokens => (this.saved = tokens);
  saveCodeVerifier = verifier => (this.verifier = verifier);
  codeVerifier = () => this.verifier;
  discoveryState = () => this.discovered;
  saveDiscoveryState = discovered => (this.discovered = discovered);
  async redirectToAuthorization(url) {
    this.logins++;
    assert.equal(url.searchParams.get('resource'), gateway, 'the token is asked for this gateway');
    assert.equal(url.searchParams.get('code_challenge_method'), 'S256');
    this.back = new URL(await logIn(url.href, this.user, callback)).searchParams;
    assert.equal(this.back.get('state'), this.sent);
  }
}

// served says that the gateway served a call for this person.
const served = async user => {
  const lines = (await readFile(log, 'utf8')).trim().split('\n').map(line => JSON.parse(line));
  assert.ok(
    lines.some(({ audit }) => audit?.principal?.subject === user && audit.remote === 'everything' && audit.method === 'tools/call' && audit.outcome === 'ok'),
    `no call of ${user} is in the audit log`,
  );
};

const call = { name: 'everything_echo', arguments: { message: 'grüße' } };
const echoes = async (client, user) => {
  const result = await client.callTool(call);
  assert.equal(result.content[0].text, 'Echo: grüße');
  await served(user);
};

const throughSDK = async (user, connect, finishAuth) => {
  const provider = new Provider(user);
  await assert.rejects(connect(provider), error => error.constructor.name === 'UnauthorizedError'); // the browser has been by now
  await finishAuth(provider);
  const client = await connect(provider);
  await echoes(client, user);
  // Another session of the same program has the token already.
  const other = await connect(provider);
  await echoes(other, user);
  // It is worth nothing when it is another one, and the refresh token is.
  provider.saved = { ...provider.saved, access_token: 'garbage' };
  await echoes(other, user);
  assert.notEqual(provider.saved.access_token, 'garbage');
  assert.equal(provider.logins, 1, 'one login');
  await client.close();
  await other.close();
};

await check('login, sdk 1.x', 'finds the provider, registers, logs in, calls, refreshes', async () => {
  let transport;
  await throughSDK(
    'erin',
    async authProvider => {
      const client = new Client({ name: 'login-sdk', version: '1' });
      transport = new StreamableHTTPClientTransport(new URL(gateway), { authProvider });
      await client.connect(transport);
      return client;
    },
    provider => transport.finishAuth(provider.back.get('code')),
  );
});

for (const [user, mode] of [['frank', { pin: '2026-07-28' }], ['grace', 'legacy']]) {
  await check(`login, client 2.x, ${mode.pin ?? mode}`, 'finds the provider, registers, logs in, calls, refreshes', async () => {
    let transport;
    await throughSDK(
      user,
      async authProvider => {
        const client = new modern.Client({ name: 'login-client', version: '1' }, { versionNegotiation: { mode } });
        transport = new modern.StreamableHTTPClientTransport(new URL(gateway), { authProvider });
        await client.connect(transport);
        return client;
      },
      provider => transport.finishAuth(provider.back),
    );
  });
}

// Beside these, programs that open a browser themselves.
const installed = (name, file) => path.join(path.dirname(createRequire(import.meta.url).resolve(`${name}/package.json`)), file);

for (const [user, era] of [['heidi', 'legacy'], ['ivan', 'modern']]) {
  await check(`login, inspector --cli, ${era}`, 'opens a browser, logs in, calls, and again without a login', async () => {
    const run = (...args) =>
      promisify(execFile)(
        process.execPath,
        [
          installed('@modelcontextprotocol/inspector', 'clients/launcher/build/index.js'),
          ...['--cli', gateway, '--transport', 'http', '--protocol-era', era, '--format', 'json', '--method', 'tools/call'],
          ...['--tool-name', call.name, '--tool-args-json', JSON.stringify(call.arguments), ...args],
        ],
        {
          env: {
            ...process.env,
            HOME: path.join(process.env.HOME, user),
            PERSON: user,
            MCP_AUTO_OPEN_ENABLED: 'true', // or it wants a terminal
            MCP_INSPECTOR_SECRET_STORE: 'file', // or it forgets the token
          },
          timeout: 60_000,
        },
      );
    for (const args of [[], ['--stored-auth-only']]) {
      const { stdout } = await run(...args);
      assert.equal(JSON.parse(stdout).result.content[0].text, 'Echo: grüße');
    }
    await served(user);
  });
}

await check('login, mcp-remote', 'opens a browser, logs in, calls, and again without a login', async () => {
  const user = 'judy';
  for (const browser of [process.env.BROWSER, '/bin/false']) {
    const client = new Client({ name: 'login-mcp-remote', version: '1' });
    await client.connect(
      new StdioClientTransport({
        command: process.execPath,
        args: [installed('mcp-remote', 'dist/proxy.js'), gateway, '--transport', 'http-only'],
        env: { ...process.env, BROWSER: browser, PERSON: user, MCP_REMOTE_CONFIG_DIR: path.join(process.env.HOME, user) },
        stderr: 'ignore',
      }),
      { timeout: 60_000 },
    );
    await echoes(client, user);
    await client.close();
  }
});
finish();
