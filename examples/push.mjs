// Push a photo from Node, as an upload service does: store the original, then push its ID.
//
//     imagepipeline up                                        # in another terminal
//     npm install --prefix examples
//     node examples/push.mjs PHOTO [SOCKET] [STORAGE_ROOT]    # prints the image's ID
//
// SOCKET and STORAGE_ROOT are those that `imagepipeline up` prints; a Redis of your own is a URL.
import { randomUUID } from 'node:crypto';
import { copyFile, mkdir, rename } from 'node:fs/promises';
import { extname, join, resolve } from 'node:path';
import Redis from 'ioredis';

const [
  photo,
  server = resolve('.imagepipeline/sockets/valkey.sock'), // ioredis takes a relative path for a host
  storageRoot = '.imagepipeline/storage',
] = process.argv.slice(2);
const imageId = randomUUID();
const folder = join(storageRoot, 'original');

// A rename within one file system is atomic: no run ever reads half a file.
await mkdir(folder, { recursive: true });
await copyFile(photo, join(folder, `.${imageId}.part`));
await rename(join(folder, `.${imageId}.part`), join(folder, imageId + extname(photo)));

const redis = new Redis(server);
await redis.lpush('image-processing:wait', imageId);
await redis.quit();
console.log(imageId);
