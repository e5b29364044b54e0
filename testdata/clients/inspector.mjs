// npm @modelcontextprotocol/inspector --cli, which is a new process, and so a
// new session, for every step. What it prints must be the same on both ways.
import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { createRequire } from 'node:module';
import { promisify } from 'node:util';
import path from 'node:path';
import { check, compareAll, finish, signIn } from './checks.mjs';

const [direct, gateway, demo] = process.argv.slice(2);

const launcher = path.join(
  path.dirname(createRequire(import.meta.url).resolve('@modelcontextprotocol/inspector/package.json')),
  'clients/launcher/build/index.js',
);

// inspector is the command line with the methods of a client.
class Inspector {
  constructor(url, era) {
    this.common = ['--cli', url, '--transport', 'http', '--protocol-era', era, '--format', 'json', '--quiet'];
  }
  async run(...args) {
    const ran = await promisify(execFile)(process.execPath, [launcher, ...this.common, ...args], { maxBuffer: 1 << 26 }).catch(
      error => error, // a tool's error is an exit code
    );
    assert.ok(ran.stdout, `inspector ${args.join(' ')}: ${ran.stderr}`);
    return JSON.parse(ran.stdout).result;
  }
  // One tool is for clients that declare roots, as this one does, in a way that
  // the gateway does not pass on.
  async listTools() {
    const { tools } = await this.run('--method', 'tools/list');
    return { tools: tools.filter(tool => !tool.name.endsWith('get-roots-list')) };
  }
  listResources = () => this.run('--method', 'resources/list');
  listResourceTemplates = () => this.run('--method', 'resources/templates/list');
  listPrompts = () => this.run('--method', 'prompts/list');
  readResource = ({ uri }) => this.run('--method', 'resources/read', '--uri', uri);
  getPrompt = ({ name, arguments: args }) =>
    this.run('--method', 'prompts/get', '--prompt-name', name, '--prompt-args', ...Object.entries(args).map(pair => pair.join('=')));
  callTool = ({ name, arguments: args }) =>
    this.run('--method', 'tools/call', '--tool-name', name, '--tool-args-json', JSON.stringify(args));
}

// The command line has no means for these.
const without = ['progress', 'complete an argument', 'a prompt that fails'];

for (const era of ['legacy', 'modern']) {
  const who = `inspector --cli, ${era}`;
  await compareAll(who, new Inspector(direct, 'legacy'), new Inspector(gateway, era), 'everything_', { modern: era === 'modern', without });
  // It calls nothing that is not listed, and before the sign-in that is only this.
  await signIn(who, new Inspector(demo, era), {
    name: 'gateway_call_tool',
    arguments: { name: 'notes_add_note', arguments: { text: who } },
  });
}
finish();
