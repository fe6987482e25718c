
// The address holds the state: #latent?q=…&sort=…; events and the first drawing.
function address(change = {}) {
  const { latent, q, sort, up, view, colour, ranges, sources, mine } = { ...state, ...change }, found = new URLSearchParams();
  if (q) found.set("q", q);
  if (sort !== fields[0] || up !== !!FIELDS[sort].up) found.set("sort", up === !!FIELDS[sort].up ? sort : "-" + sort);
  if (view !== "list") found.set("view", view);
  if (view === "map" && colour) found.set("colour", colour);
  for (const [key, [low, high]] of Object.entries(ranges)) found.set(key, `${low ?? ""}..${high ?? ""}`);
  if (sources) found.set("source", [...sources].join("."));
  if (mine) found.set("mine", "1");
  const more = found.toString();
  return "#" + (latent ?? "") + (more ? "?" + more : "");
}

function parse(hash) {
  const [what, more = ""] = hash.slice(1).split(/\?(.*)/s), found = new URLSearchParams(more), sort = (found.get("sort") || "").replace(/^-/, ""), order = sort in FIELDS ? sort : fields[0];
  const number = text => text !== "" && Number.isFinite(Number(text)) ? Number(text) : null;
  const ranges = fields.filter(key => FIELDS[key].range && found.has(key)).map(key => [key, found.get(key).split("..").map(number)]).map(([key, [low = null, high = null]]) => [key, [low, high]]);
  return { what, q: found.get("q") || "", sort: order, up: !!FIELDS[order].up !== (found.get("sort") || "").startsWith("-"),
    view: ["table", placed ? "map" : "table"].find(view => view === found.get("view")) || "list", colour: found.get("colour") || "", ranges: Object.fromEntries(ranges),
    sources: found.has("source") ? new Set(found.get("source").split(".")) : null, mine: found.get("mine") === "1" };
}

let timer = 0;
function remember(push = false) {
  clearTimeout(timer);
  const now = address();
  if (now === (location.hash || "#")) return;
  history[push ? "pushState" : "replaceState"](null, "", now === "#" ? location.pathname + location.search : now);
}
const rememberSoon = () => { clearTimeout(timer); timer = setTimeout(remember, 300); };  // browsers count how often a page writes its address

const narrow = matchMedia("(max-width: 760px)"), watching = [];
function told(what) {
  const row = rowOf.get(state.latent);
  document.title = row === undefined ? what ? `no latent ${what} · ${about.title}` : about.title : `${state.latent} ${nameOf(row) || "no name"} · ${about.title}`;
  document.body.classList.toggle("open", state.latent !== null || !!what);
  for (const f of watching) f(displayed);
}

// Change the state, the page and the address; push: a step back leads to where it was.
function go(change, push = true) {
  const before = state.view;
  if (push) wanted = false;
  Object.assign(state, change);
  if (before !== state.view) { drawTools(); opened(); draw(); reveal(true); } else { drawRows(); drawMap(); }
  if ("latent" in change) { if (state.latent !== null) show(state.latent); told(); }
  remember(push);
}

function opened() {
  $("map").hidden = state.view !== "map";
  if (state.view === "map") openMap();
}

function refilter() {
  wanted = true;
  filter();
  search();
  drawTools();
  draw();
  follow();
  rememberSoon();
}

function sortBy(key) {
  if (key === state.sort) state.up = !state.up;
  else Object.assign(state, { sort: key, up: !!FIELDS[key].up });
  order = ordered();
  search();
  drawTools();
  draw();
  scrollTo(0);
  rememberSoon();
}

// The detail follows the search, when it pauses: the first hit is shown, and its number stands in the address. Hits in
// texts may come later; they don't take away what a person has chosen since.
let following = 0, wanted = false;
function follow() {
  clearTimeout(following);
  following = setTimeout(() => {
    if (!wanted) return;
    const hit = state.q || passes.includes(0) ? shown[0] : undefined;
    if (hit === undefined || narrow.matches || state.view === "table" || columns.latent[hit] === state.latent) return;
    go({ latent: columns.latent[hit] }, false);
    scrollTo(0);
  }, 150);
}

function route() {
  const { what, ...found } = parse(location.hash), latent = /^\d{1,9}$/.test(what) && rowOf.has(Number(what)) ? Number(what) : null;
  clearTimeout(timer);
  wanted = false;
  Object.assign(state, found, { latent });
  order = ordered();
  filter();
  search();
  drawTools();
  drawFilters();
  opened();
  draw();
  if (latent !== null) { show(latent); reveal(true); }
  else if (what) missing(what);
  else if (shown.length) show(columns.latent[shown[0]]);
  told(what);
}

function step(event) {
  const at = shown.indexOf(rowOf.get(state.latent)), many = Math.max(1, Math.floor(tall / ROW) - 1);
  const moves = { ArrowDown: at + 1, ArrowUp: at - 1, PageDown: at + many, PageUp: at - many, Home: 0, End: shown.length - 1 };
  if (!(event.key in moves) || !shown.length || event.target === $("search") && !event.key.startsWith("Arrow")) return false;
  event.preventDefault();
  const row = shown[Math.min(shown.length - 1, Math.max(0, moves[event.key]))];
  wanted = false;
  Object.assign(state, { latent: columns.latent[row] });
  reveal();
  drawRows();
  drawMap();
  clearTimeout(stepping);
  stepping = setTimeout(() => { if (!narrow.matches) { show(state.latent); told(); } rememberSoon(); }, 60);
  return true;
}
let stepping = 0;

function random() {
  if (shown.length) { go({ latent: columns.latent[shown[Math.floor(Math.random() * shown.length)]] }); reveal(true); }
}

function enter() {
  const row = rowOf.get(state.latent), hit = shown.includes(row) ? row : shown[0];
  if (hit === undefined) return;
  go({ latent: columns.latent[hit], view: state.view === "map" ? "map" : "list" });
  $("detail").focus({ preventScroll: true });
}

function typed() {
  state.q = $("search").value;
  wanted = true;
  search();
  scrollTo(0);
  draw();
  follow();
  rememberSoon();
}

addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const inside = event.target.matches("input, textarea, select"), here = event.target === $("search") || $("list").contains(event.target);
  if (here && step(event)) return;
  if (here && event.key === "Enter") { event.preventDefault(); enter(); return; }
  if (event.target === $("search") && event.key === "Escape" && state.q) { event.preventDefault(); $("search").value = ""; typed(); return; }
  if (inside) return;
  const keys = { "/": () => $("search").select(), r: random, e: () => document.querySelector(".over > button")?.click() };
  if (keys[event.key]) { event.preventDefault(); if (event.key === "/") $("search").focus(); keys[event.key](); }
});
document.addEventListener("click", event => {
  const link = event.target.closest("a[data-latent]");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey || event.button) return;
  event.preventDefault();
  go({ latent: Number(link.dataset.latent), view: state.view === "table" ? "list" : state.view });
  if (!$("list").contains(link)) reveal(true);
});

Object.assign(page, {
  has: latent => rowOf.has(latent), name: latent => rowOf.has(latent) ? nameOf(rowOf.get(latent)) || "(no name)" : undefined,
  row: latent => rowOf.has(latent) ? Object.fromEntries(Object.keys(columns).map(key => [key, columns[key][rowOf.get(latent)]])) : undefined,
  detail: latent => rowOf.has(latent) ? detailOf(rowOf.get(latent)) : Promise.reject(new Error(`latent ${latent} is not on the page`)),
  selected: () => displayed, select: latent => { if (rowOf.has(latent)) { go({ latent, view: state.view === "table" ? "list" : state.view }); reveal(); } },
  onSelect: f => { watching.push(f); if (displayed !== null) f(displayed); },
  element, chip, colour: (code, scale) => `rgba(${getComputedStyle(document.body).getPropertyValue("--act")}, ${alpha(code, scale)})`,
});

$("facts").append(...(about.facts || []).map(text => element("span", "", text)));
$("to-map").hidden = !placed;
$("search").oninput = typed;
$("sort").onchange = () => { state.sort = ""; sortBy($("sort").value); };
$("direction").onclick = () => sortBy(state.sort);
$("random").onclick = random;
$("save").onclick = saveFile;
$("to-filters").onclick = () => {
  $("filters").hidden = !$("filters").hidden;
  $("to-filters").setAttribute("aria-expanded", !$("filters").hidden);
  draw();
};
$("filters").onsubmit = event => event.preventDefault();
$("views").onclick = event => { if (event.target.dataset.view) go({ view: event.target.dataset.view }); };
$("list").onscroll = () => { scrolled = $("list").scrollTop; drawRows(); };
for (const event of ["hashchange", "popstate"]) addEventListener(event, () => { if ((location.hash || "#") !== address()) route(); });
new ResizeObserver(() => { tall = $("list").clientHeight; scrolled = $("list").scrollTop; draw(); }).observe($("list"));
tall = $("list").clientHeight;
watchMap();
drawSave();
route();
setTimeout(() => { if (!hay) prepare(); }, 200);
