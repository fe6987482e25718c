
// One latent, all of it. What was not measured has no place here.
const exists = x => x !== null && x !== undefined;
function words(example, scale) {
  const line = element("div", "words");
  for (const piece of example.slice(1)) {
    if (typeof piece === "string") { line.append(piece); continue; }
    const [text, code, peak] = piece, token = element("span", code > 0 ? peak ? "peak" : "" : "silent", text);
    if (code > 0) token.style.setProperty("--a", alpha(code, scale));
    token.title = code > 0 ? "code " + code : "silent here";
    line.append(token);
  }
  const [code, needed] = [example[0]].flat(), number = element("span", "number", fixed(code));
  if (exists(needed)) number.title = `${fixed(code)} before TopK; ${fixed(needed)} would have fired`;
  return element("div", "example", number, line);
}
const alpha = (code, scale) => (.12 + .78 * Math.min(1, scale > 0 ? code / scale : 0)).toFixed(2);

// A token; the space before it is shown as a faint dot, and what can't be seen by its name.
function token(text) {
  const made = element("span", "token"), rest = text.replace(/^ /, "");
  if (rest !== text) made.append(element("span", "space", "·"));
  made.append(rest.replace(/\n/g, "↵").replace(/\t/g, "⇥") || (rest === text ? "(empty)" : ""));
  return made;
}

function fact(label, shown, small, help) {
  const number = element("dd", "", shown), made = element("div", "", element("dt", "", label), number);
  if (small) number.append(element("small", "", small));
  if (help) made.title = help;
  return made;
}

function heading(text, small) { return element("h3", "", text, ...(small ? [element("small", "", small)] : [])); }

function facts(row, d) {
  const at = key => value(key, row), found = [], scored = (key, small) => exists(at(key)) && found.push(fact(key === "score" ? "balanced accuracy" : FIELDS[key].label, measured(key, at(key)), small, FIELDS[key].help));
  if (exists(at("frequency"))) found.push(fact("fires on", percent(at("frequency")), exists(d.fires) ? d.fires.toLocaleString("en") + " tokens" : ""));
  if (exists(at("max"))) found.push(fact("highest code", fixed(at("max")), [exists(at("mean_active")) && `mean ${fixed(at("mean_active"))}`, exists(d.p99) && `99 % under ${fixed(d.p99)}`].filter(Boolean).join(", ")));
  scored("f1", exists(d.precision) ? `precision ${fixed(d.precision)}, recall ${fixed(d.recall)}` : "");
  const judge = d.judge && d.judge !== "rule" ? `judged by ${d.judge === "words" ? "its words" : d.judge}` : "";
  scored("score", [judge, exists(d.baseline) && `top token alone ${fixed(d.baseline)}`].filter(Boolean).join(", ") || "chance is 0.50");
  scored("coherence", "1 is one pattern");
  scored("stability", "over other seeds");
  scored("interest");
  return found.length ? element("dl", "", ...found) : "";
}

function histogram({ edges, counts }) {
  const most = Math.log1p(Math.max(...counts)), top = edges[edges.length - 1], names = $("drawing").namespaceURI;
  const svg = document.createElementNS(names, "svg"), total = counts.reduce((a, b) => a + b, 0);
  svg.setAttribute("viewBox", `0 0 ${counts.length} 100`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `Histogram of ${total} codes from ${fixed(edges[0])} to ${fixed(top)}; most often ${counts.indexOf(Math.max(...counts)) + 1} of ${counts.length} bins from the left`);
  counts.forEach((size, bin) => {
    const bar = document.createElementNS(names, "rect"), height = most ? 98 * Math.log1p(size) / most : 0, title = document.createElementNS(names, "title");
    for (const [key, x] of Object.entries({ x: bin + .06, width: .88, y: 100 - height, height })) bar.setAttribute(key, x);
    bar.style.setProperty("--a", alpha((edges[bin] + edges[bin + 1]) / 2, top));
    title.textContent = `${size.toLocaleString("en")} codes from ${fixed(edges[bin])} to ${fixed(edges[bin + 1])}`;
    bar.append(title);
    svg.append(bar);
  });
  const axis = element("div", "axis", element("span", "", fixed(edges[0])), element("span", "", "code" + (about.units ? ", " + about.units : "")), element("span", "", fixed(top)));
  return element("div", "", heading("Its codes", "tokens for each height, log scale"), svg, axis);
}

function shares(rows) {
  const table = element("div", "shares"), most = rows[0][1] || 1;
  for (const [text, share, firings, mean, fired] of rows.slice(0, 10)) {
    const track = element("span", "track");
    track.style.setProperty("--v", share / most);
    const number = element("span", "number", percent(share));
    number.title = [exists(firings) && `${firings.toLocaleString("en")} firings`, exists(mean) && `mean code ${fixed(mean)}`, exists(fired) && `fires on ${percent(fired)} of this token's occurrences`].filter(Boolean).join(", ");
    table.append(token(text), track, number);
  }
  const told = rows.reduce((sum, [, share]) => sum + share, 0);
  return element("div", "", heading("Its tokens", `share of its activation; ${rows.length === 1 ? "this one is" : `these ${Math.min(10, rows.length)} are`} ${percent(rows.slice(0, 10).reduce((sum, r) => sum + r[1], 0))}${rows.length > 10 ? `, the first ${rows.length} ${percent(told)}` : ""}`), table);
}

const KINDS = { top: "Strongest texts", middle: "From the middle of its range", near_miss: "Near misses: just too weak to fire", zero: "Silent here" };
function interval(part, scale) {
  const range = exists(part.low) && exists(part.high) ? `${part.kind === "near_miss" ? "before TopK" : "codes"} ${fixed(part.low)} to ${fixed(part.high)}` : "";
  const share = exists(part.share) ? `${percent(part.share)} of its firings` : "", small = [range, share].filter(Boolean).join(", ");
  const made = element("h4", "", KINDS[part.kind] || "Weaker", ...(small ? [element("small", "", small)] : []));
  return [made, ...part.examples.map(example => words(example, scale))];
}

// Next tokens whose logit an edit raised (+, whole frame) and lowered (−, dashed), with the difference.
function effectChip([text, change]) {
  const made = token(text);
  made.className = "token " + (change >= 0 ? "up" : "down");
  made.append(" ", element("span", "number", (change >= 0 ? "+" : "−") + fixed(Math.abs(change))));
  return made;
}
const measuredEffect = (sentence, found) => [element("p", "effect", `${sentence}: KL ${found.kl.toPrecision(2)} nats`), element("div", "chips", ...[...found.raised, ...found.lowered].map(effectChip))];
const direct = (sentence, tokens, sign) => tokens?.length ? [element("p", "effect", sentence), element("div", "chips", ...tokens.map(one => typeof one === "string" ? token(one) : effectChip([one[0], exists(one[1]) ? one[1] : sign])))] : [];

function chip(latent, x, name) {
  const row = rowOf.get(latent), shown = name ?? (row === undefined ? "not on this page" : nameOf(row) || "no name");
  const made = element(row === undefined ? "span" : "a", "", element("span", "number", latent), element("span", shown === "no name" ? "name none" : "name", shown), element("span", "value", exists(x) ? fixed(x) : ""));
  if (row !== undefined) { made.href = address({ latent }); made.dataset.latent = latent; made.title = shown; }
  return made;
}
const others = (title, small, rows) => rows?.length ? [element("div", "", heading(title, small), element("div", "others", ...rows))] : [];

// A match in another SAE: a link to that SAE's page where there is one, at a relative address only.
function match({ sae, layer, latent, correlation, name, href }) {
  const safe = href && /^(\.\.\/)*[\w.%-]+(\/[\w.%-]+)*#\d+$/.test(href), made = element(safe ? "a" : "span", "");
  if (safe) made.href = href;
  made.append(element("span", "number", latent), element("span", "name", [name, layer, sae].filter(Boolean).join(" · ")), element("span", "value", fixed(correlation)));
  made.title = `${sae}${layer ? ", " + layer : ""}, latent ${latent}`;
  return made;
}

function legend() {
  const sample = (code, kind) => { const made = element("span", kind, kind === "silent" ? "token" : "word"); if (kind !== "silent") made.style.setProperty("--a", alpha(code, 1)); return element("span", "words", made); };
  const said = (...parts) => element("p", "", ...parts);
  const made = element("details", "legend", element("summary", "", "Legend"),
    said(sample(.15, ""), " to ", sample(1, ""), "  the latent's code on a token, full at its highest; ", sample(.6, "peak"), "  the token with the number at the left; ", sample(0, "silent"), "  a token on which it is silent"),
    ...["f1", "score"].filter(key => key in FIELDS).map(key => said(measured(key, key === "f1" ? .9 : .95), `  ${key === "f1" ? "F1" : "balanced accuracy"}: ${FIELDS[key].help}. Green from ${FIELDS[key].grades[0]}, amber from ${FIELDS[key].grades[1]}, else red.`)),
    said(element("span", "chips", effectChip([" up", 1.5])), " ", element("span", "chips", effectChip([" down", -1.5])), "  next tokens whose logit rises or falls, relative to the mean over the vocabulary"),
    said(element("span", "space", "·"), "  a space before a token;  ↵  a line break;  ✓ ? ✗ ✎  what you rated good, unclear or wrong, or edited"),
    said("Search finds any part of names and tokens, and in texts the beginnings of words. Keys: ", element("kbd", "", "/"), " search, ", element("kbd", "", "↑"), element("kbd", "", "↓"), " move, ", element("kbd", "", "Enter"), " open, ", element("kbd", "", "r"), " random, ", element("kbd", "", "Esc"), " clear."));
  made.open = legendOpen;
  made.ontoggle = () => { legendOpen = made.open; };
  return made;
}
let legendOpen = true;

function body(row, d) {
  const scale = value("max", row) || [d.intervals[0]?.examples[0]?.[0]].flat()[0] || 1, parts = [];
  const pair = (...blocks) => { if (blocks.some(Boolean)) parts.push(element("div", "pair", ...blocks.filter(Boolean))); };
  pair(d.histogram && histogram(d.histogram), d.token_share?.length && shares(d.token_share));
  if (d.intervals.length) parts.push(heading("Its texts", d.intervals.length > 2 ? "from the strongest to the silent" : ""), ...d.intervals.flatMap(part => interval(part, scale)));
  if (d.effect) {
    const cosine = d.effect.direct_cosine;
    parts.push(heading("What it does to the next token, measured", exists(cosine) ? `cosine with the direct view ${fixed(cosine)}` : ""),
      ...measuredEffect(`Taken away on ${d.effect.n_tokens} tokens where it fires`, d.effect.ablated), ...measuredEffect("Its highest code added there", d.effect.added));
  }
  if (d.promotes || d.demotes) parts.push(heading("The direct view", "its direction straight through the unembedding, without the blocks between"),
    ...direct("Raises most", d.promotes, 1), ...direct("Lowers most", d.demotes, -1));
  const pairs = [...others("Closest directions", "cosine of decoder rows", d.near?.map(([latent, x]) => chip(latent, x))),
    ...others("Fires together with", d.cofiring_kind || about.cofiring || "", d.cofiring?.map(([latent, x, both]) => Object.assign(chip(latent, x), both ? { title: `${nameOf(rowOf.get(latent)) || "no name"}: both fire on ${both.toLocaleString("en")} tokens` } : {}))),
    ...others("In other layers", "correlation of codes", d.layers?.map(match)), ...others("In other seeds", "correlation of codes", d.seeds?.map(match))];
  if (pairs.length) parts.push(element("div", "pair", ...pairs));
  return parts;
}

function backButton() {
  const back = button("← all latents", "", () => { go({ latent: null }); });
  back.id = "back";
  return back;
}

function said(row, d) {
  const latent = columns.latent[row], name = nameOf(row), mine = edits[latent] || {}, source = sourceOf(row);
  const by = renamed(row) ? "named by you" : { human: `named or confirmed by ${d.edited_by || "a person"}`, llm: `named by ${d.model || "a chat model"}`, offline: "named by statistics", none: "no name" }[source];
  const over = element("div", "over", element("span", "", `latent ${latent} · ${by}`), ...rating(row, d));
  const title = element("h2", name ? "" : "name none", name || "No name"), made = [backButton(), over, title];
  const description = mine.description ?? d.description, notes = mine.notes ?? d.notes;
  if (description) made.push(element("p", "description", description));
  if (notes) made.push(element("p", "description notes", notes));
  return made;
}

let asked = 0, displayed = null;
async function show(latent) {
  const row = rowOf.get(latent), mine = ++asked, box = $("detail");
  if (row === undefined) return;
  displayed = latent;
  let parts;
  try {
    const d = await detailOf(row);
    if (mine !== asked) return;
    forget(latent, row, d);
    parts = [...said(row, d), facts(row, d), ...body(row, d), legend()];
  } catch (error) {
    if (mine !== asked) return;
    parts = [backButton(), element("h2", "", `latent ${latent}`), element("p", "description", error.message)];
  }
  const kept = box.dataset.latent === String(latent);
  box.replaceChildren(...parts);
  box.dataset.latent = latent;
  if (!kept && state.view === "list") $("main").scrollTop = 0;
}

// A latent of the SAE that is not here: dead, or there is none.
function missing(what) {
  asked++;
  displayed = null;
  const number = /^\d{1,9}$/.test(what), beyond = number && exists(about.n_latents) && Number(what) >= about.n_latents;
  const title = number && !beyond ? `Latent ${what} is not on this page` : "There is no such latent";
  const why = beyond || !number ? exists(about.n_latents) ? `The SAE has latents 0 to ${about.n_latents - 1}.` : "" : "It never fires on the texts that this page is about, or nothing was computed for it.";
  $("detail").dataset.latent = "";
  $("detail").replaceChildren(backButton(), element("h2", "", title), element("p", "description", why));
}
