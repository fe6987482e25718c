
// What a person writes here. It stays in this browser, under the SAE's hash, until it is saved as a file and merged.
const STORE = "sae-concepts:" + about.sae_hash, BY = "sae-concepts-by", WRITTEN = ["name", "description", "notes", "rating"];
const RATINGS = { good: "✓ good", unclear: "? unclear", wrong: "✗ wrong" };
let edits = {}, keeps = true;
edits = stored();

function stored() {
  try { return about.sae_hash && JSON.parse(localStorage.getItem(STORE)) || {}; } catch { keeps = false; return edits; }
}

// Keep what was written of one latent, or nothing; what other windows have written meanwhile stays.
function keep(latent, mine) {
  edits = stored();
  if (mine) edits[latent] = mine; else delete edits[latent];
  try { localStorage.setItem(STORE, JSON.stringify(edits)); } catch { keeps = false; }
  hay = null;
  drawSave();
  drawRows();
}

addEventListener("storage", () => {
  edits = stored();
  hay = null;
  drawSave();
  drawRows();
  if (displayed !== null && !document.querySelector(".editor")) show(displayed);
});

function drawSave() {
  const many = Object.keys(edits).length, save = $("save");
  save.hidden = !many;
  save.textContent = `Save ${many} edit${many === 1 ? "" : "s"}`;
  save.title = `as concepts_edits.csv, which python concept_dictionary.py MERGE=concepts_edits.csv takes${keeps ? "" : "; this browser keeps nothing, so save before you close the page"}`;
}

// An edit that says what the page says by now has been merged.
function forget(latent, row, d) {
  const mine = edits[latent];
  if (mine && WRITTEN.every(key => mine[key] === undefined || mine[key] === (key === "name" ? columns.name?.[row] : d[key] ?? ""))) keep(latent, null);
}

function write(row, d, change) {
  const latent = columns.latent[row], mine = { ...edits[latent], ...change, stamp: `${about.sae_hash}/${d.digest}` };
  for (const key of WRITTEN) if (mine[key] === ((key === "name" ? columns.name?.[row] : d[key]) ?? "")) delete mine[key];
  keep(latent, WRITTEN.some(key => mine[key] !== undefined) ? { ...mine, name: mine.name ?? columns.name?.[row] } : null);
  show(latent);
}

function rating(row, d) {
  if (!about.sae_hash) return [];
  const now = edits[columns.latent[row]]?.rating ?? d.rating ?? "", group = element("span", "group");
  group.setAttribute("role", "group");
  group.setAttribute("aria-label", "your rating of the name");
  for (const [key, label] of Object.entries(RATINGS)) {
    const one = button(label, "rate the name", () => nameOf(row) ? write(row, d, { rating: now === key ? "" : key }) : openEditor(row, d, "A rating is of a name: give it one first."));
    one.setAttribute("aria-pressed", now === key);
    group.append(one);
  }
  return [group, button("Edit", "name, description and notes (e)", () => openEditor(row, d, ""))];
}

function openEditor(row, d, why) {
  document.querySelector(".editor")?.remove();
  const mine = edits[columns.latent[row]] || {}, form = element("form", "editor"), inputs = {};
  const field = (key, label, tag, text) => {
    inputs[key] = Object.assign(element(tag), { value: text ?? "", maxLength: key === "name" ? 1000 : 20000 });
    if (tag === "textarea") inputs[key].rows = 2;
    form.append(element("label", "", label, inputs[key]));
  };
  field("name", "name", "input", nameOf(row));
  field("description", "description", "textarea", mine.description ?? d.description);
  field("notes", "notes", "textarea", mine.notes ?? d.notes);
  let by = "";
  try { by = localStorage.getItem(BY) || ""; } catch { keeps = false; }
  field("by", "your name, for the file (may be empty)", "input", by);
  inputs.name.required = true;
  const close = () => { form.remove(); $("detail").focus({ preventScroll: true }); }, again = button("As it was", "take back what you wrote here", () => { keep(columns.latent[row], null); show(columns.latent[row]); });
  form.append(element("div", "buttons", Object.assign(element("button", "", "Keep"), { type: "submit" }), button("Cancel", "", close), ...(edits[columns.latent[row]] ? [again] : []), element("span", "", why || "Kept in this browser until you save the file.")));
  form.onsubmit = event => {
    event.preventDefault();
    if (!inputs.name.value.trim()) { inputs.name.setCustomValidity("a name is needed"); inputs.name.reportValidity(); return; }
    try { localStorage.setItem(BY, inputs.by.value); } catch { keeps = false; }
    write(row, d, { name: inputs.name.value.trim(), description: inputs.description.value, notes: inputs.notes.value });
  };
  inputs.name.oninput = () => inputs.name.setCustomValidity("");
  form.onkeydown = event => { if (event.key === "Escape") close(); };
  document.querySelector("h2").after(form);
  inputs.name.focus();
}

// concepts.csv's columns; a cell that a spreadsheet would run gets the apostrophe that concept_dictionary.py takes off.
function saveFile() {
  const keys = ["name", "description", "notes", "rating"], cell = text => `"${(/^'*[=+\-@\t\r\n＝＋－＠]/.test(text) ? "'" : "") + text.replaceAll('"', '""')}"`;
  let by = "";
  try { by = localStorage.getItem(BY) || ""; } catch { keeps = false; }
  const found = Object.keys(edits).map(Number);  // also of latents that another page of this SAE holds
  Promise.all(found.map(latent => rowOf.has(latent) ? detailOf(rowOf.get(latent)) : {})).then(details => {
    const rows = found.map((latent, at) => [String(latent), ...keys.map(key => cell(edits[latent][key] ?? details[at][key] ?? "")), cell(by || details[at].edited_by || ""), cell(edits[latent].stamp)].join(","));
    const file = new Blob(["\ufeff" + ["latent," + keys + ",edited_by,stamp", ...rows].join("\r\n") + "\r\n"], { type: "text/csv" });
    const link = Object.assign(element("a"), { href: URL.createObjectURL(file), download: "concepts_edits.csv" });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  });
}
