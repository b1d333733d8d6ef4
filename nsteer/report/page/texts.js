"use strict";
// The texts: columns unpacked once, texts unpacked chunk by chunk; only the rows of one page are in the document.

(async () => {
  const head = JSON.parse(document.getElementById("head").textContent);
  if (!head.rows) return;
  const PAGE = 50, NONE = 0xffffffff;
  const byId = (id) => document.getElementById(id);
  const say = (text) => { byId("count").textContent = text; };
  if (!("DecompressionStream" in window)) {
    say("This browser can not unpack the texts; a browser of 2023 or later can.");
    return;
  }

  // ---- chunks -----------------------------------------------------------------------------------------------

  async function unpack(id) {
    const element = byId(`chunk-${id}`);
    const bytes = Uint8Array.from(atob(element.textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream);
  }
  const kept = new Map();
  function chunk(name, k) {
    const id = `${name}-${k}`;
    if (!kept.has(id)) kept.set(id, unpack(id).then((found) => found.json()));
    return kept.get(id);
  }
  const at = async (name, index) => (await chunk(name, Math.floor(index / head.chunk)))[index % head.chunk];

  const data = await (await unpack("columns")).arrayBuffer();
  const code = {}, number = {};
  head.codes.forEach((name, i) => { code[name] = new Uint32Array(data, 4 * i * head.rows, head.rows); });
  head.numbers.forEach((name, i) => {
    number[name] = new Float32Array(data, 4 * (head.codes.length + i) * head.rows, head.rows);
  });

  // ---- which rows -------------------------------------------------------------------------------------------

  let rows = [], page = 0, turn = 0;
  let haystack = null;  // every text in lower case, once somebody searches

  async function searchable(mine) {
    if (haystack) return haystack;
    const found = [];
    for (let k = 0; k < head.texts; k += 1) {
      for (const text of await chunk("texts", k)) found.push(text.toLowerCase());
      if (k % 20 === 19) {
        say(`Unpacking texts: ${found.length.toLocaleString("en")} of ${head.rows.toLocaleString("en")}.`);
        await new Promise((done) => setTimeout(done));
        if (mine !== turn) return null;
      }
    }
    haystack = found;
    return found;
  }

  const moved = { yes: (x) => x > 0, no: (x) => x <= 0, "-": (x) => Number.isNaN(x) };
  function tests() {
    const found = [];
    for (const select of document.querySelectorAll("#filters select[data-axis]")) {
      const column = code[select.dataset.axis], wanted = Number(select.value);
      if (select.value !== "") found.push((i) => column[i] === wanted);
    }
    const regime = byId("regime").value;
    if (regime) {
      const wanted = regime === "-" ? NONE : head.regimes.indexOf(regime);
      found.push((i) => code.regime[i] === wanted);
    }
    const judge = moved[byId("moved").value];
    if (judge) found.push((i) => judge(number.change[i]));
    return found;
  }

  function sorted(found) {
    const by = byId("sort").value, down = byId("down").checked;
    if (!by) return down ? found.reverse() : found;
    const strengths = (head.axes.strength || []).map(Number);
    const key = by === "strength" ? (i) => strengths[code.strength[i]] : (i) => number[by][i];
    const known = found.filter((i) => !Number.isNaN(key(i)));
    known.sort((a, b) => (down ? -1 : 1) * (key(a) - key(b)) || a - b);
    return known.concat(found.filter((i) => Number.isNaN(key(i))));  // holes last, whichever way
  }

  async function choose() {
    turn += 1;
    const mine = turn, needle = byId("search").value.trim().toLowerCase(), checks = tests();
    if (needle) {
      const texts = await searchable(mine);
      if (mine !== turn || !texts) return;
      checks.push((i) => texts[i].includes(needle));
    }
    const found = [];
    for (let i = 0; i < head.rows; i += 1) if (checks.every((check) => check(i))) found.push(i);
    rows = sorted(found);
    page = 0;
    await draw(mine);
  }

  // ---- what a row shows -------------------------------------------------------------------------------------

  const make = (tag, text, name) => {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    if (name) element.className = name;
    return element;
  };
  const figure = (x, digits = 3) => (Number.isNaN(x) || x === null ? "–" : Number(x.toPrecision(digits)).toLocaleString("en"));
  const label = (axis, i) => (head.axes[axis] || [])[code[axis][i]] || "";
  const lines = (cell, list) => list.forEach((text) => cell.append(make("span", text, "line")));

  // Words of `text` that a longest common subsequence with `other` leaves over.
  function added(text, other) {
    const a = text.split(/(\s+)/), b = other.split(/\s+/);
    if (a.length * b.length > 4e6) return a.map((word) => [word, false]);
    const table = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
    for (let i = a.length - 1; i >= 0; i -= 1) {
      for (let j = b.length - 1; j >= 0; j -= 1) {
        table[i][j] = a[i] && a[i] === b[j] ? table[i + 1][j + 1] + 1 : Math.max(table[i + 1][j], table[i][j + 1]);
      }
    }
    const found = [];
    for (let i = 0, j = 0; i < a.length; i += 1) {
      while (j < b.length && a[i] !== b[j] && table[i][j + 1] > table[i + 1][j]) j += 1;
      const same = j < b.length && a[i] === b[j];
      if (same) j += 1;
      found.push([a[i], !same && a[i].trim() !== ""]);
    }
    return found;
  }

  function words(cell, text, other) {
    if (!text) { cell.append(make("span", "empty", "empty")); return; }
    if (other === undefined || !byId("marks").checked) { cell.append(text); return; }
    for (const [word, fresh] of added(text, other)) cell.append(fresh ? make("mark", word) : word);
  }

  async function row(i) {
    const index = code.unsteered[i];
    const text = await at("texts", i);
    const other = index === NONE ? null : await at("unsteered", index);
    const made = make("tr");
    const condition = make("th");
    condition.scope = "row";
    const shown = Object.keys(head.names).filter((axis) => axis !== "prompt" && label(axis, i));
    const varying = shown.filter((axis) => head.axes[axis].length > 1);
    const named = { strength: "strength ", seed: "seed ", layer_set: "layers ", control: "control " };
    lines(condition, (varying.length ? varying : shown).map((axis) => (named[axis] || "") + label(axis, i)));
    const prompt = make("td");
    prompt.append(make("strong", label("prompt", i)));
    if (head.prompts[label("prompt", i)]) prompt.append(make("div", head.prompts[label("prompt", i)], "quiet"));
    const steered = make("td", undefined, "text"), plain = make("td", undefined, "text");
    words(steered, text, other ? other[0] : undefined);
    if (other) words(plain, other[0]); else plain.append(make("span", "no unsteered text", "empty"));
    const judge = make("td");
    if (code.named[i] === NONE) judge.append(make("span", "not judged", "empty"));
    else {
      const said = [`says ${head.classes[code.named[i]]} (${figure(number.confidence[i], 2)})`];
      if (other && other[1] >= 0) said.push(`unsteered: ${head.classes[other[1]]} (${figure(other[2], 2)})`);
      const target = head.targets[label("emotion", i)];
      if (target) said.push(`${target} ${figure(number.before[i], 2)} → ${figure(number.target[i], 2)}`);
      lines(judge, said);
    }
    const measures = make("td");
    const regime = code.regime[i] === NONE ? "regime undetermined" : head.regimes[code.regime[i]];
    lines(measures, [regime, `repetition ${figure(number.repetition[i], 2)}`, `perplexity × ${figure(number.perplexity_ratio[i])}`]);
    for (const cell of [prompt, steered, plain]) cell.dir = "auto";
    [["Prompt", prompt], ["Steered", steered], ["Unsteered", plain], ["Judge", judge], ["Measures", measures]].forEach(
      ([name, cell]) => { cell.dataset.name = name; });
    made.append(condition, prompt, steered, plain, judge, measures);
    return made;
  }

  async function draw(mine) {
    const pages = Math.max(1, Math.ceil(rows.length / PAGE));
    page = Math.min(Math.max(page, 0), pages - 1);
    const shown = await Promise.all(rows.slice(page * PAGE, (page + 1) * PAGE).map(row));
    if (mine !== turn) return;
    document.querySelector("#texts-table tbody").replaceChildren(...shown);
    byId("page").value = page + 1;
    byId("page").max = pages;
    byId("pages").textContent = `of ${pages.toLocaleString("en")}`;
    byId("first").disabled = byId("back").disabled = page === 0;
    byId("next").disabled = byId("last").disabled = page === pages - 1;
    const from = rows.length ? page * PAGE + 1 : 0, to = Math.min((page + 1) * PAGE, rows.length);
    say(`${rows.length.toLocaleString("en")} of ${head.rows.toLocaleString("en")} texts; showing ${from.toLocaleString("en")} to ${to.toLocaleString("en")}.`);
  }

  // ---- controls ---------------------------------------------------------------------------------------------

  const go = (to) => { page = to; turn += 1; draw(turn); };
  byId("first").addEventListener("click", () => go(0));
  byId("back").addEventListener("click", () => go(page - 1));
  byId("next").addEventListener("click", () => go(page + 1));
  byId("last").addEventListener("click", () => go(Infinity));
  byId("page").addEventListener("change", (event) => go((parseInt(event.target.value, 10) || 1) - 1));
  const form = byId("filters");
  let waiting = 0;
  byId("search").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(choose, 200); });
  form.addEventListener("change", (event) => { if (event.target.id !== "search") choose(); });
  form.addEventListener("reset", () => setTimeout(choose));
  form.addEventListener("submit", (event) => { event.preventDefault(); choose(); });
  form.hidden = false;
  document.querySelector(".pager").hidden = false;
  await choose();
})();
