
// Data: the index of all latents, and parts that are read when wanted: from this file, or from the folder beside it.
const $ = id => document.getElementById(id);
const { about, columns, parts, per_part: perPart, n_buckets: nBuckets } = JSON.parse($("data").textContent);
const n = columns.latent.length, firstBucket = Math.ceil(n / perPart);
const rowOf = new Map(columns.latent.map((latent, row) => [latent, row]));
const KEPT = 64;  // parts in memory
const held = new Map(), arriving = new Map();
const page = window.page = { about, n, part: (name, value) => arriving.get(name)?.(value) };

// A page on disk may not fetch; a script may come from its folder, and calls page.part.
function load(name) {
  return new Promise((resolve, reject) => {
    const script = document.createElement("script");
    arriving.set(name, resolve);
    script.src = `${parts.folder}/${name}.js`;
    script.onload = () => { script.remove(); arriving.delete(name); };
    script.onerror = () => {
      script.remove();
      held.delete(name);
      reject(new Error(`${parts.folder}/${name}.js can't be read: keep the folder ${parts.folder} beside this page, or write the page again with notebook 05.`));
    };
    document.head.append(script);
  });
}

function read(number) {
  const name = parts ? parts.names[number] : number;
  if (!held.has(name)) {
    held.set(name, parts ? load(name) : Promise.resolve(JSON.parse($("part-" + number)?.textContent ?? "{}")));
    if (held.size > KEPT) held.delete(held.keys().next().value);
  }
  return held.get(name);
}

const detailOf = row => read(Math.floor(row / perPart)).then(part => part[row % perPart]);
const value = (key, row) => key === "total" ? columns.frequency[row] * columns.mean_active[row] : columns[key]?.[row] ?? null;

// Search. Names and tokens stand in the index, and any part of them is found. Of the texts each bucket of the word index
// holds the words with some two first letters, so that the beginning of a word is enough.
const WORD = /[UNSPACED]|(?:(?![UNSPACED])[\p{L}\p{N}])+/gu;
const DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
const digit = new Uint8Array(128);
[...DIGITS].forEach((character, at) => { digit[character.charCodeAt(0)] = at; });

const textRows = new Map();  // word of a query -> Uint8Array, 1 where a text of the row has it; undefined while it is read
// Whether a word has pieces of which the word index can say something: one letter alone is in too many texts.
function searchable(word) {
  const pieces = word.match(WORD) || [];
  return pieces.length > 0 && pieces.every(piece => [...piece].length > 1 || /[UNSPACED]/.test(piece));
}

async function findInTexts(word) {
  const found = new Uint8Array(n).fill(1);
  for (const piece of word.match(WORD)) {
    const [first, second] = [...piece].map(character => character.codePointAt(0)), start = piece.slice(0, 40);
    const bucket = await read(firstBucket + (31 * first + (second ?? 0)) % nBuckets), rows = new Uint8Array(n);
    for (const key in bucket) if (second === undefined ? key === start : key.startsWith(start)) mark(bucket[key], rows);
    for (let row = 0; row < n; row++) found[row] &= rows[row];
  }
  return found;
}

function mark(gaps, rows) {
  let row = -1, gap = 0, shift = 1;
  for (let at = 0; at < gaps.length; at++) {
    const five = digit[gaps.charCodeAt(at)];
    gap += (five & 31) * shift;
    if (five >= 32) { shift *= 32; continue; }
    row += gap;
    rows[row] = 1;
    gap = 0;
    shift = 1;
  }
}
