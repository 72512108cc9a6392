// A gallery, as your app may be: it takes uploads in, is told when they are done, and shows them.
//
//     imagepipeline up                                                    # in another terminal
//     npm install --prefix examples && node examples/gallery/server.mjs   # prints its address
//
// Arguments: the socket of Redis and the storage root, as `imagepipeline up` prints them, and the
// port. A Redis of your own is a URL. The search runs `imagepipeline search`, which must be on the
// PATH and takes about a second.
import { execFile } from 'node:child_process';
import { randomUUID } from 'node:crypto';
import { once } from 'node:events';
import { createReadStream, createWriteStream, readFileSync } from 'node:fs';
import { mkdir, rename, rm, writeFile } from 'node:fs/promises';
import { createServer } from 'node:http';
import { join, resolve } from 'node:path';
import { pipeline } from 'node:stream/promises';
import { promisify } from 'node:util';
import Redis from 'ioredis';

const [
  server = resolve('.imagepipeline/sockets/valkey.sock'), // a relative path would be a host
  storageRoot = '.imagepipeline/storage',
  port = '8080',
] = process.argv.slice(2);
const KEY = 'image-processing:events';
const GROUP = 'gallery';
const DATABASE = 'gallery.json'; // yours is a real one
const MAX_BYTES = 50_000_000;
const TYPES = {
  html: 'text/html; charset=utf-8',
  js: 'text/javascript',
  webp: 'image/webp',
  avif: 'image/avif',
  jpg: 'image/jpeg',
  png: 'image/png',
};

const images = new Map(readDatabase()); // the last event of each image, by its ID
const pages = new Set(); // open pages, which are told of events
const redis = new Redis(server);

function readDatabase() {
  try {
    return JSON.parse(readFileSync(DATABASE));
  } catch {
    return [];
  }
}

// Events come at least once and in order for each image, so saving one twice changes nothing.
async function save(event) {
  if (event.type === 'image.erased') images.delete(event.imageId);
  else if (event.generation >= (images.get(event.imageId)?.generation ?? 0)) {
    images.set(event.imageId, event);
  }
  await writeFile(`${DATABASE}.part`, JSON.stringify([...images]));
  await rename(`${DATABASE}.part`, DATABASE);
  for (const page of pages) page.write(`data: ${JSON.stringify(event)}\n\n`);
}

async function consume() {
  const reader = redis.duplicate({ maxRetriesPerRequest: null }); // it waits, so it has its own
  await reader.xgroup('CREATE', KEY, GROUP, '0', 'MKSTREAM').catch((error) => {
    if (!error.message.startsWith('BUSYGROUP')) throw error; // it exists already
  });
  for (let last = '0'; ; ) {
    const options = ['COUNT', 100, 'BLOCK', 5000, 'STREAMS', KEY, last];
    const found = await reader.xreadgroup('GROUP', GROUP, 'one', ...options);
    const entries = found?.[0][1] ?? [];
    if (!entries.length) last = '>'; // first what was not acknowledged before a crash, then the new
    for (const [id, fields] of entries) {
      if (fields) await save(JSON.parse(fields[1])); // null: it was deleted meanwhile
      await reader.xack(KEY, GROUP, id);
    }
  }
}

async function upload(request, extension) {
  const imageId = randomUUID(); // never from the request
  const folder = join(storageRoot, 'original');
  const part = join(folder, `.${imageId}.part`);
  await mkdir(folder, { recursive: true });
  try {
    await pipeline(request, createWriteStream(part));
  } catch (error) {
    await rm(part, { force: true });
    throw error;
  }
  await rename(part, join(folder, `${imageId}.${extension}`)); // no run ever reads half a file
  await redis.lpush('image-processing:wait', imageId);
  return imageId;
}

async function search(text) {
  const words = ['search', '--json', '-k', '20', '--', text];
  const found = await promisify(execFile)('imagepipeline', words);
  return JSON.parse(found.stdout).map((row) => images.get(row.image_id)).filter(Boolean);
}

async function answer(request, response) {
  const url = new URL(request.url, 'http://gallery');
  const send = (status, body) => {
    response.writeHead(status, { 'Content-Type': 'application/json' }).end(JSON.stringify(body));
  };
  const sendFile = async (path, headers) => {
    const file = createReadStream(path);
    await once(file, 'open');
    response.writeHead(200, { 'Content-Type': TYPES[path.split('.').pop()], ...headers });
    await pipeline(file, response);
  };
  response.setHeader('X-Content-Type-Options', 'nosniff');
  response.setHeader(
    'Content-Security-Policy',
    "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'",
  );
  const variant = /^\/(variants\/[\w-]+\.(?:webp|avif|jpg|png))$/.exec(url.pathname);
  const extension = /^\/upload\/(\w{1,8})$/.exec(url.pathname);
  if (request.method === 'POST' && extension) {
    if (request.headers.origin !== `http://${request.headers.host}`) return send(403, {});
    if (!(Number(request.headers['content-length']) <= MAX_BYTES)) return send(413, {});
    return send(201, { imageId: await upload(request, extension[1].toLowerCase()) });
  }
  if (url.pathname === '/') return sendFile(join(import.meta.dirname, 'index.html'));
  if (url.pathname === '/page.js') return sendFile(join(import.meta.dirname, 'page.js'));
  if (url.pathname === '/images') return send(200, [...images.values()]);
  if (url.pathname === '/search') return send(200, await search(url.searchParams.get('q') ?? ''));
  if (url.pathname === '/events') {
    response.writeHead(200, { 'Content-Type': 'text/event-stream' }).flushHeaders();
    pages.add(response);
    return response.on('close', () => pages.delete(response));
  }
  if (variant) {
    // The page adds the generation to the address, so that a new content has a new address.
    const isOfOneContent = url.searchParams.has('g');
    return sendFile(join(storageRoot, variant[1]), {
      'Cache-Control': isOfOneContent ? 'public, max-age=31536000, immutable' : 'no-cache',
    });
  }
  return send(404, {});
}

createServer((request, response) => {
  answer(request, response).catch((error) => {
    console.error(error.message);
    if (!response.headersSent) response.writeHead(error.code === 'ENOENT' ? 404 : 500);
    response.end();
  });
}).listen(Number(port), '127.0.0.1', () => console.log(`http://127.0.0.1:${port}`));
await consume();
