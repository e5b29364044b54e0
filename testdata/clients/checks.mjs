// What every client does with the reference server "everything", directly and
// through the gateway, and what must come out the same on both ways.
import assert from 'node:assert/strict';

const plain = (name, prefix) => (name.startsWith(prefix) ? name.slice(prefix.length) : name);

const call = (name, args = {}) => async (client, prefix) => client.callTool({ name: prefix + name, arguments: args });

// answer is a result or the error in its place.
const answer = async promise => {
  try {
    return { result: await promise };
  } catch (error) {
    return { code: error.code, message: error.message };
  }
};

// Each takes the client and the prefix that the gateway puts before names, and
// returns what the client saw, without it.
const checks = {
  'list tools': async (client, prefix) =>
    (await client.listTools()).tools
      .filter(tool => tool.name.startsWith(prefix) && !tool.name.startsWith('gateway_'))
      .map(tool => ({ ...tool, name: plain(tool.name, prefix) }))
      .sort((a, b) => (a.name < b.name ? -1 : 1)),
  'call a tool': call('echo', { message: 'grüße, 世界 <&>\n' }),
  'call a tool with numbers': call('get-sum', { a: 0.1, b: 2e9 }),
  'structured content': call('get-structured-content', { location: 'Chicago' }),
  'annotated content': call('get-annotated-message', { messageType: 'error', includeImage: true }),
  'image content': call('get-tiny-image'),
  'resource links': call('get-resource-links', { count: 3 }),
  'a tool that fails': async (client, prefix) => answer(call('get-sum', { a: 'x' })(client, prefix)),
  progress: async (client, prefix, withProgress) => {
    const seen = [];
    const result = await withProgress(
      client,
      { name: prefix + 'trigger-long-running-operation', arguments: { duration: 0.3, steps: 3 } },
      progress => seen.push(progress),
    );
    // The last one just before the result is delivered before the result.
    assert.equal(seen.length, 3, 'progress notifications before the result');
    return { seen, result };
  },
  'list resources': async client => (await client.listResources()).resources.filter(resource => resource.uri !== 'auth://status'), // the gateway's own
  'list resource templates': async client => (await client.listResourceTemplates()).resourceTemplates,
  'read a resource': async client => client.readResource({ uri: 'demo://resource/static/document/features.md' }),
  'list prompts': async (client, prefix) =>
    (await client.listPrompts()).prompts
      .map(prompt => ({ ...prompt, name: plain(prompt.name, prefix) }))
      .sort((a, b) => (a.name < b.name ? -1 : 1)),
  'get a prompt': async (client, prefix) =>
    client.getPrompt({ name: prefix + 'args-prompt', arguments: { city: 'Zürich', state: 'ZH' } }),
  'a prompt that fails': async (client, prefix) => {
    const { code, result } = await answer(client.getPrompt({ name: prefix + 'args-prompt', arguments: {} }));
    return { code, result };
  },
  'complete an argument': async (client, prefix) =>
    client.complete({
      ref: { type: 'ref/prompt', name: prefix + 'completable-prompt' },
      argument: { name: 'department', value: 'E' },
    }),
};

// Members that protocol 2026-07-28 adds to a result between client and gateway,
// and "execution", of which that protocol's clients know nothing.
const between = ['resultType', 'ttlMs', 'cacheScope', 'io.modelcontextprotocol/serverInfo', 'execution'];

function withoutThem(value) {
  if (Array.isArray(value)) return value.map(withoutThem);
  if (value === null || typeof value !== 'object') return value;
  const out = {};
  for (const [key, member] of Object.entries(value)) {
    if (between.includes(key)) continue;
    out[key] = withoutThem(member);
    if (key === '_meta' && Object.keys(out[key]).length === 0) delete out[key];
  }
  return out;
}

let failed = false;

export async function check(who, what, run) {
  try {
    await run();
    console.log(`ok    ${who}: ${what}`);
  } catch (error) {
    failed = true;
    console.log(`FAIL  ${who}: ${what}: ${error.stack}`);
  }
}

// compareAll runs every check on both ways. withProgress calls a tool as this
// client does when it wants to hear of progress; modern says that the gateway's
// side speaks protocol 2026-07-28; without names checks that the client has no
// means for.
export async function compareAll(who, direct, gateway, prefix, { withProgress, modern = false, without = [] }) {
  for (const [what, run] of Object.entries(checks)) {
    if (without.includes(what)) continue;
    await check(who, what, async () => {
      const [want, got] = [await run(direct, '', withProgress), await run(gateway, prefix, withProgress)];
      if (modern) assert.deepStrictEqual(withoutThem(got), withoutThem(want));
      else assert.deepStrictEqual(got, want);
    });
  }
}

// signIn checks one round: a call asks for a sign-in, a browser does it, and the
// same call works. The gateway has the demo's remote under the name notes.
export async function signIn(who, client, call = { name: 'notes_add_note', arguments: { text: who } }) {
  await check(who, 'a call asks for the sign-in, and works after it', async () => {
    await client.callTool({ name: 'gateway_logout', arguments: { remote: 'notes' } });
    const asked = await client.callTool(call);
    assert.equal(asked.isError, true);
    const required = JSON.parse(asked.content[1].text);
    assert.equal(required.status, 'auth_required');
    assert.equal(required.server_name, 'notes');
    assert.ok(asked.content[0].text.includes(required.auth_url), 'the sentence has the link');
    await browse(required.auth_url);
    const done = await client.callTool(call);
    assert.ok(!done.isError, JSON.stringify(done));
    assert.ok((await client.listTools()).tools.some(t => t.name === 'notes_add_note'), 'the tool is listed after the sign-in');
  });
}

// browse opens a sign-in link as a person with the demo's password does.
export async function browse(link) {
  const { response, page } = await walk(link, fields => fields.set('action', 'signin'));
  assert.ok(response?.status === 200 && page.includes('You are signed in'), `the sign-in ended at ${response?.status}: ${page}`);
}

// logIn goes where a provider's login leads this user, up to a URL that begins
// with stop, which it returns without asking for it; without stop, to the end.
export async function logIn(link, user, stop) {
  const { url, response, page } = await walk(
    link,
    fields => {
      fields.set('username', user);
      fields.set('password', user);
    },
    stop,
  );
  assert.ok(stop ? !response : response.status === 200, `the login ended at ${response?.status}: ${page}`);
  return url;
}

// walk is a browser without scripts: it keeps cookies, follows redirects, and
// posts each form that asks for a password.
async function walk(link, fill, stop) {
  const jar = new Map(); // by host and port
  let request = { url: link, init: {} };
  for (let hop = 0; hop < 20; hop++) {
    if (stop && request.url.startsWith(stop)) return { url: request.url };
    const host = new URL(request.url).host;
    const cookies = [...(jar.get(host) ?? new Map())].map(([name, value]) => `${name}=${value}`).join('; ');
    const response = await fetch(request.url, {
      ...request.init,
      redirect: 'manual',
      headers: { ...request.init.headers, ...(cookies && { cookie: cookies }) },
    });
    for (const cookie of response.headers.getSetCookie()) {
      const [, name, value] = /^([^=]+)=([^;]*)/.exec(cookie);
      jar.set(host, (jar.get(host) ?? new Map()).set(name, value));
    }
    const page = await response.text();
    if (response.status >= 300 && response.status < 400) {
      request = { url: new URL(response.headers.get('location'), request.url).href, init: {} };
      continue;
    }
    const form = /<form method="post" action="([^"]*)"/.exec(page);
    if (form && page.includes('type="password"')) {
      const fields = new URLSearchParams();
      for (const [, input] of page.matchAll(/<input ([^>]*)>/g)) {
        fields.set(/name="([^"]*)"/.exec(input)[1], /value="([^"]*)"/.exec(input)?.[1] ?? '');
      }
      fill(fields);
      request = { url: new URL(form[1], request.url).href, init: { method: 'POST', body: fields } };
      continue;
    }
    return { url: request.url, response, page };
  }
  assert.fail('the login went in circles');
}

export function finish() {
  process.exit(failed ? 1 : 0);
}
