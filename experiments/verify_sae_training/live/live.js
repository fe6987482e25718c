"use strict";
// The live panel of the concepts page. Texts enter it as textContent alone, never as markup.
(() => {
  const root = document.getElementById("live");
  if (!root) return;
  const START = "The little dog was sad. \"Come and play in the park,\" said Tom, and then they ran home to eat.";
  const WAIT = { read: 40, write: 250, rewrite: 900 }; // ms without a key or a move before the server is asked

  const element = (tag, options = {}, ...children) => {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(options)) name in made ? made[name] = value : made.setAttribute(name, value);
    made.append(...children);
    return made;
  };
  const number = (x, digits = 3) => String(+x.toPrecision(digits));
  const percent = p => p >= 0.0005 ? (100 * p).toFixed(p < 0.1 ? 1 : 0) + " %" : p > 0 ? "< 0.1 %" : "0 %";
  const alpha = part => part > 0 ? (0.12 + 0.78 * Math.min(1, part)).toFixed(2) : "0";
  const visible = text => text.replaceAll("\n", "↵");

  // The latest request of each kind; an older one is given up.
  const asked = {};
  async function ask(kind, body) {
    asked[kind]?.abort();
    const control = asked[kind] = new AbortController();
    const response = await fetch(kind, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal: control.signal });
    if (!response.ok) throw new Error((await response.json()).error);
    return response;
  }
  const timers = {};
  function later(name, delay, work) {
    clearTimeout(timers[name]);
    timers[name] = setTimeout(work, delay);
  }
  function told(place, error) {
    if (error.name === "AbortError") return;
    place.classList.add("live-error");
    place.textContent = error instanceof TypeError ? "the server does not answer; is 10_explore.py still running?" : error.message;
  }
  function tell(place, text) {
    place.classList.remove("live-error");
    place.textContent = text;
  }

  // What is shown.
  let about, found = null, token = -1, latent = null, seed = 0;

  const text = element("textarea", { id: "live-text", value: START, spellcheck: false, placeholder: "Type a text" });
  const status = element("span", { className: "live-status", role: "status" });
  const all = element("option", { value: "all" }, "strongest latent"), one = element("option", { value: "one" }, "chosen latent");
  const colour = element("select", { id: "live-colour" }, all, one);
  const legend = element("label", { htmlFor: "live-colour" });
  const tokens = element("div", { className: "live-text", role: "group", ariaLabel: "tokens of the text" });
  const tokenTitle = element("h3");
  const latents = element("ul", { className: "live-latents" });
  const chosen = element("div", { id: "live-chosen" });

  const slider = element("input", { id: "live-strength", type: "range", min: -2, max: 4, step: 0.05, value: 0 });
  const strength = element("output", { htmlFor: "live-strength" });
  const again = element("button", { type: "button", className: "live-right", title: "write both texts again, from another seed" }, "other draw");
  const writeStatus = element("span", { className: "live-status", role: "status" });
  const texts = { plain: element("p", { id: "live-plain" }), steered: element("p", { id: "live-steered" }) };
  const costs = { plain: element("span", { className: "live-number" }), steered: element("span", { className: "live-number" }) };

  const everywhere = element("input", { id: "live-everywhere", type: "checkbox", checked: true });
  const nextStatus = element("p", { className: "live-hint", role: "status" });
  const tables = element("div", { className: "live-tables" });
  const steering = element("details", { open: true }, element("summary", {}, "Steer: what the model writes next"),
    element("div", { className: "live-slider" }, element("label", { htmlFor: "live-strength" }, "strength"), slider, strength),
    element("div", { className: "live-line" }, element("span", {}, "× its highest code; 0: unchanged"), again, writeStatus),
    element("div", { className: "live-pair" },
      element("div", {}, element("h4", {}, "as it is", costs.plain), texts.plain),
      element("div", {}, element("h4", {}, "with the latent", costs.steered), texts.steered)));
  const without = element("details", { open: true }, element("summary", {}, "Take it away: the next token"),
    element("label", { className: "live-check" }, everywhere, "on all tokens up to the chosen one, not on that one alone"),
    nextStatus, tables);

  root.append(
    element("label", { className: "live-title", htmlFor: "live-text" }, "Type a text: which latents fire?"), text,
    element("div", { className: "live-line" }, status, element("span", {}, legend, " ", colour)),
    tokens, tokenTitle, latents, chosen, steering, without);
  root.hidden = false;

  // A narrow window shows the list or this, with the latent's own page below it.
  const detail = document.getElementById("detail");
  if (detail) {
    const open = wanted => document.body.classList.toggle("open", wanted);
    document.querySelector("header").append(element("button", { type: "button", className: "live-narrow", onclick: () => { open(true); root.scrollIntoView(); } }, "Live"));
    root.prepend(element("button", { type: "button", className: "live-narrow", onclick: () => open(false) }, "← all latents"));
  }

  // Latents: their names, and the one that is chosen, on the page as here.
  const nameOf = number => globalThis.page?.has(number) ? page.name(number) : found?.names[number] ?? "(no name)";
  function choose(number) {
    if (globalThis.page?.has(number)) page.select(number);
    else { location.hash = number; chosenNow(number); }
  }
  function chosenNow(number) {
    if (number === latent) return;
    latent = number;
    showLatents();
    read();
    if (+slider.value) later("write", WAIT.write, write);
    else stale();
  }

  // A text, read.
  async function read() {
    const body = { text: text.value, latent };
    try {
      const answer = await (await ask("read", body)).json();
      const before = found && found.tokens.length;
      found = { ...answer, source: body.text };
      if (token >= found.tokens.length || token === before - 1 || token < 0) token = found.tokens.length - 1;
      tell(status, `${found.tokens.length} tokens in ${found.ms.toFixed(0)} ms`);
      showTokens();
      next();
    } catch (error) { told(status, error); }
  }

  // A code as a share of its latent's highest; where that is not known, of the highest in this text.
  const share = (number, code) => code / (found.highest[number] || Math.max(...found.tokens.map(each => each.latents[0]?.[1] ?? 0)));
  function part(index) {
    if (colour.value === "one") return found.codes ? share(latent, found.codes[index]) : 0;
    const [strongest] = found.tokens[index].latents;
    return strongest ? share(...strongest) : 0;
  }

  function showTokens() {
    tokens.classList.remove("live-stale");
    const shown = [];
    found.tokens.forEach((each, index) => {
      const made = element("span", { role: "button", tabIndex: index === token ? 0 : -1 }, visible(each.text) || "·");
      made.style.setProperty("--a", alpha(part(index)));
      made.title = each.latents.slice(0, 4).map(([i, code]) => `${number(code)}  ${i}  ${nameOf(i)}`).join("\n");
      made.dataset.index = index;
      made.ariaCurrent = String(index === token);
      shown.push(each.before, made);
      if (each.text.includes("\n")) shown.push("\n");
    });
    tokens.replaceChildren(...shown, found.after);
    const at = tokens.querySelector("[aria-current='true']");
    if (at && (at.offsetTop < tokens.scrollTop || at.offsetTop + at.offsetHeight > tokens.scrollTop + tokens.clientHeight)) tokens.scrollTop = at.offsetTop - tokens.clientHeight / 2;
    showLatents();
  }

  function showLatents() {
    if (found && token >= 0) {
      const { text: piece, latents: fired, n } = found.tokens[token];
      tokenTitle.textContent = `Latents on “${visible(piece) || "·"}”` + (n > fired.length ? ` (the ${fired.length} strongest of ${n})` : "");
      latents.replaceChildren(...fired.map(([i, code]) => {
        const bar = element("i");
        bar.style.width = Math.min(100, 100 * share(i, code)) + "%";
        const made = element("button", { type: "button", title: nameOf(i), ariaCurrent: String(i === latent) }, element("span", { className: "live-number" }, i),
          element("span", { className: "live-name" }, nameOf(i)), element("span", { className: "live-bar" }, bar), element("span", { className: "live-number" }, number(code)));
        made.dataset.latent = i;
        made.onclick = () => choose(i);
        return element("li", {}, made);
      }));
      if (!fired.length) latents.append(element("li", { className: "live-hint" }, "No latent fires here."));
    } else latents.replaceChildren();
    chosen.replaceChildren(...latent === null ? [element("span", { className: "live-hint" }, "Choose a latent: here, or in the list.")] : [
      element("span", { className: "live-number" }, `latent ${latent}`), element("strong", {}, nameOf(latent)),
      ...detail ? [element("button", { type: "button", className: "live-stacked", onclick: () => detail.scrollIntoView() }, "its texts ↓")] : []]);
    one.disabled = latent === null;
  }

  // Taken away.
  async function next() {
    if (latent === null || !found || token < 0 || about.no_writing || !without.open) return;
    try {
      showNext(await (await ask("without", { text: found.source, token, latent, everywhere: everywhere.checked })).json());
    } catch (error) { tables.replaceChildren(); told(nextStatus, error); }
  }

  function showNext(answer) {
    const piece = visible(found.tokens[token]?.text ?? "");
    const where = everywhere.checked ? `on ${answer.fires} of ${token + 1} tokens up to “${piece}”` : answer.fires ? `on “${piece}” with code ${number(answer.code)}` : "";
    tell(nextStatus, answer.fires ? `It fires ${where}. Without it the token after “${piece}” changes by ${number(answer.kl, 2)} nats (KL).` : `It does not fire ${everywhere.checked ? "up to" : "on"} “${piece}”, so nothing changes.`);
    const table = (title, rows) => rows.length ? [element("table", { className: "live-next" },
      element("thead", {}, element("tr", {}, element("th", {}, title), element("th", {}, "before"), element("th", {}, "without"))),
      element("tbody", {}, ...rows.map(([piece, p, q]) => element("tr", {}, element("td", {}, element("code", {}, visible(piece))), element("td", {}, percent(p)),
        element("td", { className: q > p ? "live-up" : q < p ? "live-down" : "" }, percent(q))))))] : [];
    tables.replaceChildren(...table("likeliest", answer.likely), ...table("rises", answer.raised), ...table("falls", answer.lowered));
  }

  // Steered.
  function stale() {
    for (const shown of Object.values(texts)) if (shown.textContent) shown.classList.add("live-stale");
  }

  async function write() {
    if (about.no_writing || !about.measured) return;
    if (latent === null) { tell(writeStatus, "choose a latent first"); return; }
    const prompt = text.value;
    tell(writeStatus, "writing …");
    try {
      const response = await ask("write", { text: prompt, latent, strength: +slider.value, seed });
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      let ended = "", rest = "";
      for (let { value, done } = await reader.read(); !done; { value, done } = await reader.read()) {
        const lines = (rest + value).split("\n");
        rest = lines.pop();
        for (const line of lines) {
          const said = JSON.parse(line);
          if (said.which) showWritten(prompt, said);
          ended = said.stopped ?? said.error ?? ended;
        }
      }
      tell(writeStatus, ended);
    } catch (error) { told(writeStatus, error); }
  }

  function showWritten(prompt, { which, text: written, pieces, perplexity }) {
    const shown = texts[which];
    shown.classList.remove("live-stale");
    const parts = !pieces ? [written] : pieces.flatMap(([before, piece, code]) => {
      if (!(code > 0)) return [before, piece];
      const mark = element("mark", { title: `code ${number(code)}` }, piece);
      mark.style.setProperty("--a", alpha(share(latent, code)));
      return [before, mark];
    });
    shown.replaceChildren(element("span", { className: "live-prompt" }, prompt.length > 60 ? "… " + prompt.slice(-50).replace(/^\S*\s/, "") : prompt), ...parts);
    costs[which].textContent = perplexity === undefined ? "" : `perplexity ${number(perplexity)}`;
  }

  function showStrength() { strength.textContent = (slider.value > 0 ? "+" : "") + (+slider.value).toFixed(2).replace("-", "−"); }

  // What a person does.
  text.oninput = () => {
    tokens.classList.add("live-stale");
    stale();
    later("read", WAIT.read, read);
    if (+slider.value && texts.plain.textContent) later("write", WAIT.rewrite, write);
  };
  colour.onchange = () => found && showTokens();
  slider.oninput = () => { showStrength(); stale(); later("write", WAIT.write, write); };
  again.onclick = () => { seed += 1; write(); };
  everywhere.onchange = without.ontoggle = next;
  function take(index) {
    if (!(index >= 0 && index < found.tokens.length)) return;
    token = index;
    for (const each of tokens.querySelectorAll("[data-index]")) {
      each.ariaCurrent = String(+each.dataset.index === token);
      each.tabIndex = +each.dataset.index === token ? 0 : -1;
    }
    showLatents();
    next();
  }
  tokens.onclick = event => event.target.dataset.index !== undefined && take(+event.target.dataset.index);
  tokens.onkeydown = event => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    take(token + step);
    tokens.querySelector("[tabindex='0']")?.focus();
  };

  async function start() {
    const response = await fetch("about");
    about = await response.json();
    if (!response.ok) throw new Error(about.error);
    text.maxLength = about.text_characters;
    legend.textContent = `colour: code ÷ highest code${about.measured ? "" : " in this text"} of the`;
    steering.hidden = without.hidden = Boolean(about.no_writing);
    if (about.no_writing) chosen.after(element("p", { className: "live-hint" }, about.no_writing + "."));
    else if (!about.measured) {
      slider.disabled = again.disabled = true;
      tell(writeStatus, "Run 04_name_sae_concepts.ipynb first: a strength is in units of the latent's highest code, which is not known yet.");
    } else tell(writeStatus, "move the slider");
    showStrength();
    if (globalThis.page) page.onSelect(chosenNow);
    else {
      const look = () => /^#\d{1,9}/.test(location.hash) && parseInt(location.hash.slice(1)) < about.n_latents && chosenNow(parseInt(location.hash.slice(1)));
      addEventListener("hashchange", look);
      look();
    }
    await read();
  }
  showLatents();
  start().catch(error => told(status, error));
})();
