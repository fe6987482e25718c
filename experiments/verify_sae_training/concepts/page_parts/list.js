
// The list and the table: one order, filters, search, and rows drawn only where they are seen.
const none = "–", ROW = 36;
const english = new Intl.NumberFormat("en");
const percent = x => x ? +(100 * x).toPrecision(2) + " %" : "never";
const fixed = (x, digits = 2) => x === null || x === undefined ? none : Math.abs(x) >= 1000 || (x && Math.abs(x) < .01) ? x.toPrecision(2) : x.toFixed(digits);
const grade = (x, good, fair) => x >= good ? "good" : x >= fair ? "fair" : "poor";
// What can be ordered, filtered (range: step of the input) and shown in a column. meter: share of its mark that is full.
const FIELDS = {
  interest: { label: "interest", help: about.interest || "F1 times coherence; more for what goes beyond the commonest token, and for a measured effect", range: .05 },
  f1: { label: "F1", help: "held-out F1 of the name's rule: how well it tells on which tokens the latent fires; 1 is best", range: .05, grades: [.8, .5], meter: x => x },
  score: { label: "accuracy", help: "held-out balanced accuracy of the name; 0.5 is chance, 1 is best", range: .05, grades: [.85, .7], meter: x => Math.max(0, 2 * x - 1) },
  coherence: { label: "coherence", help: "how alike two of its firings are, drawn in proportion to their codes; 1 is one pattern", range: .05 },
  stability: { label: "stability", help: "how well the latent is found again in SAEs of other seeds; 1 is exactly", range: .05 },
  frequency: { label: "density", help: "share of the tokens on which it fires", range: "any", text: percent, scale: 100, unit: "%" },
  total: { label: "activation", help: "mean code over all tokens", text: x => x.toPrecision(2) },
  max: { label: "highest", help: "highest code" + (about.units ? ", " + about.units : ""), range: "any" },
  effect_kl: { label: "effect", help: "KL of the next token's distribution, in nats, where its code is set to 0", range: "any" },
  latent: { label: "number", help: "number of the latent", text: String, up: true },
  name: { label: "name", help: "by the alphabet", up: true },
};
const has = key => key === "total" ? columns.frequency && columns.mean_active : columns[key];
for (const key of Object.keys(FIELDS)) if (!has(key)) delete FIELDS[key];
const fields = Object.keys(FIELDS), numeric = fields.filter(key => key !== "name");
const SOURCES = { offline: "by statistics", llm: "by a chat model", human: "by a person", none: "no name" };
const state = { latent: null, q: "", sort: fields[0], up: !!FIELDS[fields[0]].up, view: "list", colour: "", ranges: {}, sources: null, mine: false };
let shown = new Uint32Array(0), inTexts = 0;

// Every text enters the page as textContent, never as markup.
function element(tag, className, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children);
  return made;
}
const button = (label, title, onclick) => Object.assign(element("button", "", label), { type: "button", title, onclick });
const textOf = (key, x) => x === null ? none : (FIELDS[key].text || fixed)(x);
const renamed = row => (edits[columns.latent[row]]?.name ?? columns.name?.[row]) !== columns.name?.[row];
const sourceOf = row => renamed(row) ? "human" : columns.source?.[row] ?? "offline";
const nameOf = row => edits[columns.latent[row]]?.name || columns.name?.[row] || "";

function measured(key, x) {
  const { grades, meter } = FIELDS[key], made = element("span", "value " + (grades && x !== null ? grade(x, ...grades) : ""), textOf(key, x));
  if (meter && x !== null) {
    const mark = element("span", "meter " + key);
    mark.style.setProperty("--v", meter(x));
    made.append(mark);
  }
  return made;
}

// In ascending order of this number; null and missing ones last, ties by number.
function ordered() {
  const { sort, up } = state, order = Uint32Array.from({ length: n }, (_, row) => row), latent = columns.latent;
  if (sort === "name") {
    const names = Array.from(order, row => nameOf(row).toLowerCase().replace(/^[^\p{L}\p{N}]+/u, "") || "\uffff"), turn = up ? 1 : -1;
    return order.sort((a, b) => (names[a] < names[b] ? -turn : names[a] > names[b] ? turn : latent[a] - latent[b]));
  }
  const keys = Float64Array.from(order, row => { const x = value(sort, row); return x === null ? Infinity : up ? x : -x; });
  return order.sort((a, b) => keys[a] - keys[b] || latent[a] - latent[b]);
}

// What the search looks into, and where the name ends in it. Made at the first wish, or when the page is idle.
let order, passes, hay, nameEnds;
const ranks = new Uint8Array(n);
function prepare() {
  hay = columns.latent.map((_, row) => `${nameOf(row)}\n${(columns.tokens?.[row] || []).join("\n")}`.toLowerCase());
  nameEnds = hay.map(text => text.indexOf("\n"));
}

function filter() {
  passes = new Uint8Array(n).fill(1);
  for (const [key, [low, high]] of Object.entries(state.ranges)) {
    const scale = FIELDS[key].scale || 1;
    for (let row = 0; row < n; row++) {
      const x = value(key, row);
      if (x === null || low !== null && x * scale < low || high !== null && x * scale > high) passes[row] = 0;
    }
  }
  for (let row = 0; row < n; row++) {
    if (state.sources && !state.sources.has(sourceOf(row)) || state.mine && !edits[columns.latent[row]]) passes[row] = 0;
  }
}

// Rows that have all words of the query: first in the name, then in name or tokens, then with the help of a text.
function search() {
  const words = state.q.toLowerCase().split(/\s+/).filter(Boolean), number = words.length === 1 && /^\d+$/.test(words[0]);
  if (words.length && !hay) prepare();
  for (const word of words) if (!textRows.has(word)) wantTexts(word);
  inTexts = 0;
  if (!words.length && !Object.keys(state.ranges).length && !state.sources && !state.mine) { shown = order; return; }
  const texts = words.map(word => textRows.get(word)), sizes = [0, 0, 0, 0, 0];
  for (let row = 0; row < n; row++) {  // by rows: the texts lie in this order in memory
    let rank = passes[row] ? 1 : 4;
    if (rank < 4 && number && String(columns.latent[row]).startsWith(words[0])) rank = 0;
    else for (let which = 0; which < words.length && rank < 4; which++) {
      const found = hay[row].indexOf(words[which]);
      if (found < 0) rank = texts[which]?.[row] ? 3 : 4;
      else if (found > nameEnds[row] && rank < 2) rank = 2;
    }
    ranks[row] = rank;
    sizes[rank]++;
  }
  const next = [0, sizes[0], sizes[0] + sizes[1], n - sizes[4] - sizes[3]], found = new Uint32Array(n - sizes[4]);
  for (let at = 0; at < n; at++) if (ranks[order[at]] < 4) found[next[ranks[order[at]]]++] = order[at];
  if (number) found.subarray(0, sizes[0]).sort((a, b) => columns.latent[a] - columns.latent[b]);
  inTexts = sizes[3];
  shown = found;
}

function wantTexts(word) {
  if (textRows.size > 200) textRows.clear();
  if (!searchable(word)) { textRows.set(word, new Uint8Array(n)); return; }
  textRows.set(word, undefined);
  findInTexts(word).then(found => requestAnimationFrame(() => setTimeout(() => {  // what was typed is drawn first
    textRows.set(word, found);
    if (state.q.toLowerCase().includes(word)) { search(); draw(); follow(); }
  })), error => { $("count").textContent = error.message; });
}

function count() {
  const of = shown.length === n ? `${english.format(n)} latents` : `${english.format(shown.length)} of ${english.format(n)} latents`;
  const reading = state.q.toLowerCase().split(/\s+/).some(word => word && textRows.has(word) && !textRows.get(word));
  $("count").textContent = of + (inTexts ? `, ${english.format(inTexts)} of them by their texts alone` : "") + (reading ? ", searching the texts …" : "");
}

let columnsSeen = [];
function draw() {
  const list = $("list"), table = state.view === "table";
  list.className = table ? "table" : "";
  list.setAttribute("role", table ? "grid" : "listbox");
  list.toggleAttribute("aria-owns", table);
  if (table) list.setAttribute("aria-owns", "head rows");
  columnsSeen = table ? tableColumns() : [];
  $("head").hidden = !table;
  if (table) drawHead();
  $("rows").style.height = shown.length * ROW + "px";
  $("rows").setAttribute("role", table ? "rowgroup" : "presentation");
  list.setAttribute(table ? "aria-rowcount" : "data-count", shown.length);
  count();
  drawRows();
  drawMap();
}

function tableColumns() {
  const room = $("list").clientWidth - (innerWidth > 1000 ? 560 : innerWidth > 760 ? 330 : 180), wanted = [state.sort, ...numeric].filter(key => !["name", "latent"].includes(key));
  const seen = new Set([...new Set(wanted)].slice(0, Math.max(1, Math.floor(room / 104))));
  return numeric.filter(key => seen.has(key));
}

function drawHead() {
  const head = $("head"), cell = (key, label) => {
    const on = state.sort === key, made = element("div", ["name", "tokens"].includes(key) ? "left" : "");
    made.setAttribute("role", "columnheader");
    if (key !== "tokens") made.append(Object.assign(button(label + (on ? state.up ? " ↑" : " ↓" : ""), FIELDS[key]?.help || "", () => sortBy(key)), {}));
    else made.append(label);
    made.setAttribute("aria-sort", on ? state.up ? "ascending" : "descending" : "none");
    return made;
  };
  head.replaceChildren(cell("latent", "number"), ...("name" in FIELDS ? [cell("name", "name")] : [element("div")]), ...(wide() ? [cell("tokens", "tokens")] : []), ...columnsSeen.map(key => cell(key, FIELDS[key].label)));
  head.style.gridTemplateColumns = grid();
}
const wide = () => columns.tokens && innerWidth > 1000;
const grid = () => `3.4em minmax(0, 1fr) ${wide() ? "minmax(0, 200px) " : ""}${columnsSeen.map(() => "92px").join(" ")}`;

// Where the list is scrolled to, and its height: kept, since to ask for them makes the browser lay out the page at once.
let scrolled = 0, tall = 0;
function scrollTo(top) {
  if (top === scrolled) return;
  $("list").scrollTop = top;
  scrolled = $("list").scrollTop;
}

function drawRows() {
  const list = $("list"), first = Math.max(0, Math.floor(scrolled / ROW) - 4), last = Math.min(shown.length, Math.ceil((scrolled + tall) / ROW) + 4);
  const made = [], rest = address({ latent: null, view: "list" }).slice(1);
  for (let at = first; at < last; at++) made.push(rowAt(at, rest));
  $("rows").replaceChildren(...made);
  const on = state.latent !== null && $("row-" + state.latent);
  if (on) list.setAttribute("aria-activedescendant", on.id); else list.removeAttribute("aria-activedescendant");
}

function rowAt(at, rest) {
  const row = shown[at], latent = columns.latent[row], table = state.view === "table", key = state.sort === "name" ? numeric[0] : state.sort;
  const link = element("a", "row"), name = nameOf(row), mine = edits[latent];
  const title = element("span", name ? "name" : "name none", name || "no name");
  if (mine) title.prepend(element("span", "mine", mine.rating === "good" ? "✓ " : mine.rating === "wrong" ? "✗ " : mine.rating ? "? " : "✎ "));
  link.append(element("span", "number", latent), title);
  if (table && wide()) link.append(element("span", "name token", (columns.tokens[row] || []).join("  ")));
  const keys = table ? columnsSeen : [key === "latent" ? fields[0] : key];
  for (const one of keys) link.append(measured(one, value(one, row)));
  link.id = "row-" + latent;
  link.href = "#" + latent + rest;
  link.title = name;
  link.tabIndex = -1;
  link.dataset.latent = latent;
  link.style.transform = `translateY(${at * ROW}px)`;
  if (table) {
    link.style.gridTemplateColumns = grid();
    for (const cell of link.children) cell.setAttribute("role", "gridcell");
  }
  link.setAttribute("role", table ? "row" : "option");
  link.setAttribute("aria-selected", latent === state.latent);
  link.setAttribute(table ? "aria-rowindex" : "aria-posinset", at + 1);
  if (!table) link.setAttribute("aria-setsize", shown.length);
  return link;
}

function reveal(centre = false) {
  const at = shown.indexOf(rowOf.get(state.latent));
  if (at < 0) return;
  if (centre && Math.abs((at + .5) * ROW - scrolled - tall / 2) > tall / 2) scrollTo((at + .5) * ROW - tall / 2);
  if (at * ROW < scrolled) scrollTo(at * ROW);
  else if ((at + 1) * ROW > scrolled + tall) scrollTo((at + 1) * ROW - tall);
}

function drawTools() {
  $("sort").replaceChildren(...fields.map(key => Object.assign(new Option(FIELDS[key].label, key), { title: FIELDS[key].help })));
  $("sort").value = state.sort;
  $("direction").textContent = state.up ? "↑" : "↓";
  $("direction").title = state.up ? "smallest first" : "largest first";
  $("search").value = state.q;
  const active = Object.keys(state.ranges).length + !!state.sources + state.mine;
  $("to-filters").textContent = active ? `Filters (${active})` : "Filters";
  for (const one of document.querySelectorAll("#views button")) one.setAttribute("aria-pressed", one.dataset.view === state.view);
  document.body.dataset.view = state.view;
}

function drawFilters() {
  const form = $("filters"), parts = [];
  for (const key of fields.filter(key => FIELDS[key].range)) {
    const { label, help, range, unit } = FIELDS[key], [low, high] = state.ranges[key] || [null, null];
    const ends = [["from", low], ["to", high]].map(([word, x], end) => {
      const input = Object.assign(element("input"), { type: "number", step: range, value: x ?? "", placeholder: end ? "max" : "min" });
      input.setAttribute("aria-label", `${label} ${word}`);
      input.oninput = () => {
        const pair = state.ranges[key] ||= [null, null];
        pair[end] = input.value === "" ? null : Number(input.value);
        if (pair[0] === null && pair[1] === null) delete state.ranges[key];
        refilter();
      };
      return input;
    });
    parts.push(Object.assign(element("span", "", label + (unit ? ` (${unit})` : "")), { title: help }), ends[0], element("span", "", "to"), ends[1]);
  }
  const present = Object.keys(SOURCES).filter(source => columns.source?.includes(source) || source === "human");
  const boxes = present.map(source => box(SOURCES[source], !state.sources || state.sources.has(source), () => {
    const on = present.filter((_, at) => names.querySelectorAll("input")[at].checked);
    state.sources = on.length === present.length ? null : new Set(on);
    refilter();
  }));
  const names = element("fieldset", "", element("legend", "", "name"), ...boxes);
  const mine = element("fieldset", "", box("only what I edited or rated here", state.mine, event => { state.mine = event.target.checked; refilter(); }));
  const reset = button("Reset filters", "", () => { Object.assign(state, { ranges: {}, sources: null, mine: false }); drawFilters(); refilter(); });
  reset.className = "reset";
  form.replaceChildren(...parts, names, mine, reset);
}

function box(label, checked, onchange) {
  const input = Object.assign(element("input"), { type: "checkbox", checked, onchange });
  return element("label", "", input, " " + label);
}
