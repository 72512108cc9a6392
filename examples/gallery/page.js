// Shows images with `<picture>`. Texts come from a model or an uploader, so they are set as text.
const main = document.querySelector('main');
const status = document.querySelector('#status');
const MESSAGES = {
  'image.pictures_ready': 'Its description follows.',
  'image.erased': '',
};

function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

// Crops have another shape and do not belong here.
function isWhole(event, one) {
  return Math.abs(one.width * event.height - one.height * event.width) <= 2 * event.width;
}

function listWidths(event, format) {
  return event.variants
    .filter((one) => one.format === format && isWhole(event, one))
    .map((one) => `/${one.path}?g=${event.generation} ${one.width}w`)
    .join(', ');
}

function makePicture(event) {
  const sizes = '(max-width: 40rem) 100vw, 19rem';
  const webp = event.variants.find((one) => one.format === 'webp');
  const img = make('img', {
    src: `/${webp.path}?g=${event.generation}`,
    srcset: listWidths(event, 'webp'),
    sizes,
    width: event.width,
    height: event.height,
    alt: event.description ?? '',
    loading: 'lazy',
  });
  img.style.backgroundColor = event.dominantColor;
  img.style.backgroundImage = `url("${event.placeholder}")`;
  const avif = make('source', { type: 'image/avif', srcset: listWidths(event, 'avif'), sizes });
  return make('picture', {}, avif, img);
}

function makeFigure(event) {
  const figure = make('figure', { id: `image-${event.imageId}` });
  if (event.variants.length) figure.append(makePicture(event));
  const text = event.error ?? event.description ?? MESSAGES[event.type];
  const caption = make('figcaption', { class: event.status }, text);
  if (event.tags.length) caption.append(make('br'), make('small', {}, event.tags.join(' · ')));
  figure.append(caption);
  return figure;
}

function show(event) {
  const before = document.getElementById(`image-${event.imageId}`);
  if (event.type === 'image.erased') before?.remove();
  else if (before) before.replaceWith(makeFigure(event));
  else main.prepend(makeFigure(event));
}

document.querySelector('#upload').addEventListener('submit', async (submit) => {
  submit.preventDefault();
  const file = submit.target.photo.files[0];
  status.textContent = 'Uploading…';
  const address = `/upload/${file.name.split('.').pop()}`;
  const answer = await fetch(address, { method: 'POST', body: file });
  status.textContent = answer.ok ? 'It is being processed.' : 'It could not be uploaded.';
});

document.querySelector('#search').addEventListener('submit', async (submit) => {
  submit.preventDefault();
  const text = submit.target.q.value.trim();
  status.textContent = 'Searching…';
  const answer = await fetch(text ? `/search?q=${encodeURIComponent(text)}` : '/images');
  const found = await answer.json();
  main.replaceChildren(...found.map(makeFigure));
  status.textContent = text ? `${found.length} images, the nearest first.` : '';
});

new EventSource('/events').addEventListener('message', (message) => {
  status.textContent = '';
  show(JSON.parse(message.data));
});
for (const event of await (await fetch('/images')).json()) show(event);
