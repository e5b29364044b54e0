// npm @modelcontextprotocol/client, pinned to protocol 2026-07-28: streamable
// HTTP and stdio. Nothing but that protocol will do for it. The reference server
// is of the legacy era, so what it says directly is heard by the same client in
// that era.
import { Client, StreamableHTTPClientTransport } from '@modelcontextprotocol/client';
import { StdioClientTransport } from '@modelcontextprotocol/client/stdio';
import assert from 'node:assert/strict';
import { check, compareAll, finish, signIn } from './checks.mjs';

const [direct, gateway, demo, binary, config] = process.argv.slice(2);
const modern = '2026-07-28';

// As in sdk.mjs: its own handling of progress races with the result.
const withProgress = (client, params, onprogress) => {
  client.setNotificationHandler('notifications/progress', ({ params: { progressToken, ...progress } }) => {
    if (progressToken === 'mine') onprogress(progress);
  });
  return client.callTool({ ...params, _meta: { progressToken: 'mine' } });
};

const connect = async (transport, mode) => {
  const client = new Client({ name: 'clients-client', version: '1' }, { versionNegotiation: { mode } });
  await client.connect(transport);
  return client;
};
const http = (url, mode) => connect(new StreamableHTTPClientTransport(new URL(url)), mode);

const remote = await http(direct, 'legacy');
await check('client 2.x, http', 'connect with ' + modern, async () => {
  const client = await http(gateway, { pin: modern });
  assert.equal(client.getNegotiatedProtocolVersion(), modern);
  await compareAll('client 2.x, http', remote, client, 'everything_', { withProgress, modern: true });
  await client.close();
});
await check('client 2.x, http', 'find the era by itself', async () => {
  const client = await http(gateway, 'auto');
  assert.equal(client.getNegotiatedProtocolVersion(), modern);
  await client.close();
});
await check('client 2.x, http', 'connect to the demo', async () => {
  const client = await http(demo, { pin: modern });
  await signIn('client 2.x, http', client);
  await client.close();
});
await check('client 2.x, stdio', 'connect with ' + modern, async () => {
  const client = await connect(
    new StdioClientTransport({ command: binary, args: ['stdio', '--config', config], env: process.env, stderr: 'ignore' }),
    { pin: modern },
  );
  assert.equal(client.getNegotiatedProtocolVersion(), modern);
  await compareAll('client 2.x, stdio', remote, client, 'everything_', { withProgress, modern: true });
  await signIn('client 2.x, stdio', client);
  await client.close();
});
await remote.close();
finish();
