
// The map: one dot for each latent. What the search and the filters leave out is pale.
const LIGHT = ["#4b3f8f", "#2f629a", "#14747a", "#3a7a2c", "#806c00", "#a85400", "#b02f3f"], DARK = ["#a095e6", "#7fb0e6", "#5fc4c4", "#86c870", "#d2c04a", "#eda04a", "#f28a90"];
const dark = matchMedia("(prefers-color-scheme: dark)");
const placed = columns.map_x && columns.map_y, view = { zoom: 1, x: 0, y: 0 };
let spots, classes, classNames, classesOf;  // spots: [x, y] of each row, 0 to 1

function place() {
  spots = new Float32Array(2 * n).fill(NaN);
  for (const [axis, xs] of [[0, columns.map_x], [1, columns.map_y]]) {
    let low = Infinity, high = -Infinity;
    for (const x of xs) if (x !== null) { low = Math.min(low, x); high = Math.max(high, x); }
    xs.forEach((x, row) => { if (x !== null) spots[2 * row + axis] = (x - low) / (high - low || 1); });
  }
}

// The class of each row, 0 to 6, or 7 for none; and what each class is called.
function classify() {
  const key = state.colour, last = LIGHT.length;
  if (classesOf === key) return;
  classesOf = key;
  classes = new Uint8Array(n).fill(last);
  if (key === "token") {
    const sizes = new Map(), first = columns.tokens.map(tokens => tokens?.[0]?.trim().toLowerCase());
    for (const text of first) if (text) sizes.set(text, (sizes.get(text) || 0) + 1);
    const common = [...sizes].sort((a, b) => b[1] - a[1]).slice(0, last).map(([text]) => text);
    first.forEach((text, row) => { const at = common.indexOf(text); if (at >= 0) classes[row] = at; });
    classNames = [...common.map(text => `${text} (${sizes.get(text)})`), "other"];
    return;
  }
  const xs = columns.latent.map((_, row) => value(key, row)), there = xs.filter(x => x !== null).sort((a, b) => a - b);
  const bounds = LIGHT.map((_, at) => there[Math.floor(at * there.length / last)] ?? 0);  // as many in each class
  xs.forEach((x, row) => { if (x !== null) classes[row] = Math.max(0, bounds.findLastIndex(bound => x >= bound)); });
  classNames = [...bounds.map(bound => "from " + textOf(key, bound)), "not measured"];
}

function spotOn(canvas, row) {
  const room = 14, { clientWidth: width, clientHeight: height } = canvas;
  return [room + (width - 2 * room) * ((spots[2 * row] - .5) * view.zoom + .5 + view.x), room + (height - 2 * room) * ((spots[2 * row + 1] - .5) * view.zoom + .5 + view.y)];
}

function drawMap() {
  if (state.view !== "map" || !placed) return;
  const canvas = $("canvas"), ratio = devicePixelRatio || 1, pen = canvas.getContext("2d"), size = Math.max(1.6, Math.min(5, 150 / Math.sqrt(n))) * Math.min(3, Math.sqrt(view.zoom));
  if (!spots) place();
  classify();
  canvas.width = canvas.clientWidth * ratio;
  canvas.height = canvas.clientHeight * ratio;
  pen.scale(ratio, ratio);
  const style = getComputedStyle(document.body), colours = [...(dark.matches ? DARK : LIGHT), style.getPropertyValue("--edge")], seen = new Uint8Array(n);
  for (const row of shown) seen[row] = 1;
  const groups = colours.map(() => []), pale = [];
  for (let row = 0; row < n; row++) (seen[row] ? groups[classes[row]] : pale).push(row);
  for (const [colour, rows, opacity] of [[style.getPropertyValue("--edge"), pale, .25], [colours.at(-1), groups.at(-1), .6], ...colours.slice(0, -1).map((colour, at) => [colour, groups[at], .9])]) {
    pen.fillStyle = colour;
    pen.globalAlpha = opacity;
    for (const row of rows) { const [x, y] = spotOn(canvas, row); pen.fillRect(x - size / 2, y - size / 2, size, size); }
  }
  pen.globalAlpha = 1;
  const row = rowOf.get(state.latent);
  if (row !== undefined && !Number.isNaN(spots[2 * row])) {
    const [x, y] = spotOn(canvas, row);
    pen.strokeStyle = style.getPropertyValue("--ink");
    pen.lineWidth = 2;
    pen.beginPath();
    pen.arc(x, y, size + 5, 0, 7);
    pen.stroke();
  }
}

function nearest(event) {
  const canvas = $("canvas"), box = canvas.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
  let best = null, least = 14 ** 2;
  for (const row of shown) {
    const [a, b] = spotOn(canvas, row), distance = (a - x) ** 2 + (b - y) ** 2;
    if (distance < least) { least = distance; best = row; }
  }
  return best;
}

function zoom(factor, x = .5, y = .5) {
  const next = Math.min(60, Math.max(1, view.zoom * factor)), ratio = next / view.zoom;
  Object.assign(view, { zoom: next, x: next === 1 ? 0 : (view.x + .5 - x) * ratio + x - .5, y: next === 1 ? 0 : (view.y + .5 - y) * ratio + y - .5 });
  drawMap();
}

function drawMapLegend() {
  classify();
  const colours = [...(dark.matches ? DARK : LIGHT), "var(--edge)"];
  $("map-legend").replaceChildren(...classNames.map((name, at) => {
    const swatch = element("span", "swatch");
    swatch.style.setProperty("--c", colours[at]);
    return element("span", "", swatch, name);
  }));
}

function openMap() {
  const select = Object.assign(element("select"), { onchange: () => { state.colour = select.value; drawMapLegend(); drawMap(); remember(); } });
  select.setAttribute("aria-label", "colour of the dots");
  const by = numeric.filter(key => !["latent", "total"].includes(key));
  select.append(...by.map(key => new Option("colour: " + FIELDS[key].label, key)), ...(columns.tokens ? [new Option("colour: its first token", "token")] : []));
  if (!by.includes(state.colour) && state.colour !== "token") state.colour = by[0] ?? "token";
  select.value = state.colour;
  const readout = element("span", "", about.map || "");
  readout.id = "readout";
  $("map-tools").replaceChildren(select, button("+", "nearer", () => zoom(1.6)), button("−", "farther", () => zoom(1 / 1.6)), button("Whole", "the whole map", () => zoom(0)), readout);
  drawMapLegend();
}

function watchMap() {
  const canvas = $("canvas");
  let from = null;
  canvas.onpointerdown = event => { from = { x: event.clientX, y: event.clientY, left: view.x, top: view.y, moved: false }; canvas.setPointerCapture(event.pointerId); };
  canvas.onpointermove = event => {
    if (from) {
      const [dx, dy] = [event.clientX - from.x, event.clientY - from.y];
      from.moved ||= Math.abs(dx) + Math.abs(dy) > 4;
      if (from.moved && view.zoom > 1) { Object.assign(view, { x: from.left + dx / canvas.clientWidth, y: from.top + dy / canvas.clientHeight }); requestAnimationFrame(drawMap); }
      return;
    }
    const row = nearest(event);
    $("readout").textContent = row === null ? about.map || "" : `${columns.latent[row]}  ${nameOf(row) || "no name"}${state.colour !== "token" ? `  ·  ${FIELDS[state.colour].label} ${textOf(state.colour, value(state.colour, row))}` : ""}`;
  };
  canvas.onpointerup = event => {
    const row = from && !from.moved ? nearest(event) : null;
    from = null;
    if (row !== null) go({ latent: columns.latent[row] });
  };
  canvas.onpointercancel = () => { from = null; };
  canvas.addEventListener("wheel", event => {
    event.preventDefault();
    const box = canvas.getBoundingClientRect();
    zoom(Math.exp(-event.deltaY / 300), (event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
  }, { passive: false });
  dark.onchange = () => { drawMap(); if (state.view === "map") drawMapLegend(); };
}
