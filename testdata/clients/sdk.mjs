// npm @modelcontextprotocol/sdk, the clients of the legacy era: streamable HTTP
// and stdio.
import { Client } from '@modelcontextprotocol/sdk/client/index.js';
import { StdioClientTransport } from '@modelcontextprotocol/sdk/client/stdio.js';
import { StreamableHTTPClientTransport } from '@modelcontextprotocol/sdk/client/streamableHttp.js';
import { ProgressNotificationSchema } from '@modelcontextprotocol/sdk/types.js';
import { check, compareAll, finish, signIn } from './checks.mjs';

const [direct, gateway, demo, binary, config] = process.argv.slice(2);

const withProgress = (client, params, onprogress) => client.callTool(params, undefined, { onprogress });

// Over a pipe this client forgets who wants to hear of progress as soon as it
// reads the result, before it hands on what came just before it. So listen to
// the notifications themselves.
const withNotifications = (client, params, onprogress) => {
  client.setNotificationHandler(ProgressNotificationSchema, ({ params: { progressToken, ...progress } }) => {
    if (progressToken === 'mine') onprogress(progress);
  });
  return client.callTool({ ...params, _meta: { progressToken: 'mine' } });
};

const connect = async transport => {
  const client = new Client({ name: 'clients-sdk', version: '1' });
  await client.connect(transport);
  return client;
};
const http = url => connect(new StreamableHTTPClientTransport(new URL(url)));

const remote = await http(direct);
await check('sdk 1.x, http', 'connect', async () => {
  const client = await http(gateway);
  await compareAll('sdk 1.x, http', remote, client, 'everything_', { withProgress });
  await client.transport.terminateSession();
  await client.close();
});
await check('sdk 1.x, http', 'connect to the demo', async () => {
  const client = await http(demo);
  await signIn('sdk 1.x, http', client);
  await client.close();
});
await check('sdk 1.x, stdio', 'connect', async () => {
  const client = await connect(
    new StdioClientTransport({ command: binary, args: ['stdio', '--config', config], env: process.env, stderr: 'ignore' }),
  );
  await compareAll('sdk 1.x, stdio', remote, client, 'everything_', { withProgress: withNotifications });
  await signIn('sdk 1.x, stdio', client);
  await client.close();
});
await remote.close();
finish();
