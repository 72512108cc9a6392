// Encodes PNGs with sharp as the reference worker does: node encode.mjs OUT EFFORT PNG...
// Writes OUT/<name>.avif and .webp; prints JSON: CPU seconds by format.
import fs from 'node:fs';
import path from 'node:path';
import sharp from 'sharp';

const [out, effort, ...files] = process.argv.slice(2);
sharp.concurrency(1);
const seconds = { avif: 0, webp: 0 };
for (const file of files) {
  const { data, info } = await sharp(file).raw().toBuffer({ resolveWithObject: true });
  const raw = { raw: { width: info.width, height: info.height, channels: info.channels } };
  for (const [format, options] of [['webp', { quality: 80 }], ['avif', { quality: 80, effort: Number(effort), chromaSubsampling: '4:4:4' }]]) {
    const before = process.cpuUsage();
    const encoded = await sharp(data, raw).toFormat(format, options).toBuffer();
    const used = process.cpuUsage(before);
    seconds[format] += (used.user + used.system) / 1e6;
    fs.writeFileSync(path.join(out, path.basename(file, '.png') + '.' + format), encoded);
  }
}
console.log(JSON.stringify(seconds));
