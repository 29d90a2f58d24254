// The interactive heatmap, in a notebook (anywidget) and in a page without a kernel (`save_html`). The one file of the package that is written by hand;
// what it shows and how it talks to Python is described on the page on widgets. Names of tasks are data: they only ever become text, never HTML.

// ---------------------------------------------------------------------------------------------------------------- search

const DIGITS = 12; // costs, and lengths, that agree in so many significant digits are the same, as in Python

const rounded = x => (Number.isFinite(x) ? Number(x.toPrecision(DIGITS)) : x);

function sum(parts) { // compensated, so that the order of the parts does not matter
  let total = 0, lost = 0;
  for (const x of parts) {
    const next = total + x;
    lost += Math.abs(total) >= Math.abs(x) ? total - next + x : x - next + total;
    total = next;
  }
  return total + lost;
}

/** Distances hop by hop, and the cost: these and the distances of all but the last source to the target. */
export function pathCost(distance, n, path, target) {
  const stops = [...path, target], hops = path.map((a, k) => distance[a * n + stops[k + 1]]);
  return { hops, length: sum(hops), cost: sum([...hops, ...path.slice(0, -1).map(a => distance[a * n + target])]) };
}

/** The positions of the least values, and of all that equal the last of them; those that are not finite never count. */
function least(values, wanted, before) {
  const top = [];
  for (const x of values) {
    if (!Number.isFinite(x) || (top.length === wanted && x >= top[wanted - 1])) continue;
    let k = top.length === wanted ? wanted - 1 : top.length;
    for (; k > 0 && top[k - 1] > x; k--) top[k] = top[k - 1];
    top[k] = x;
  }
  if (!top.length) return [];
  const last = top[top.length - 1], cut = last + Math.abs(last) * 1e-9, found = [];
  for (let i = 0; i < values.length; i++) if (values[i] <= cut) found.push(i);
  return found.length > wanted ? found.sort(before).slice(0, 20 * wanted) : found;
}

/**
 * The best paths of one to three sources, found among all of them, ordered as Python's `best_paths` orders them: by cost, length and names.
 * @param distance Float64Array of n * n, from source (row) to target (column); infinite where a hop may not be made
 * @param n number of tasks
 * @param target position of the target
 * @param sources number of sources, 1 to 3
 * @param top how many paths
 * @param names of the tasks, which decide between paths of equal cost and length
 * @returns array of {path, hops, length, cost, tied}, path being positions, the first source first; throws an Error for a distance that is not a number
 */
export function search(distance, n, target, sources, top, names) {
  const rank = new Int32Array(n);
  [...names.keys()].sort((a, b) => (names[a] < names[b] ? -1 : 1)).forEach((i, place) => { rank[i] = place; });
  const end = new Float64Array(n).map((_, i) => (i === target ? Infinity : distance[i * n + target]));
  for (let i = 0; i < n; i++) if (i !== target) for (let j = 0; j < n; j++) {
    const d = distance[i * n + j];
    if (i !== j && (Number.isNaN(d) || d === -Infinity)) throw new Error(`The distance from ${names[i]} to ${names[j]} is not a number.`);
  }
  const found = [], limit = 4096;
  let cut = Infinity;
  const key = p => { const c = pathCost(distance, n, p, target); return { path: p, ...c, keys: [rounded(c.cost), rounded(c.length), ...p.map(i => rank[i])] }; };
  const order = (a, b) => { for (let k = 0; k < a.keys.length; k++) if (a.keys[k] !== b.keys[k]) return a.keys[k] - b.keys[k]; return 0; };
  const best = () => found.map(f => key(f.path)).sort(order);
  const offer = (cost, path) => {
    if (!(cost <= cut) || !Number.isFinite(cost)) return;
    found.push({ cost, path });
    if (found.length < limit) return;
    const kept = best().slice(0, top + 1);
    cut = kept[top] ? kept[top].cost + Math.abs(kept[top].cost) * 1e-9 : Infinity;
    found.splice(0, found.length, ...(kept.length > top ? kept : found).map(f => ({ cost: f.cost, path: f.path })));
  };
  const can = i => i !== target;
  if (sources === 1) for (let a = 0; a < n; a++) offer(end[a], [a]);
  if (sources === 2) for (let b = 0; b < n; b++) if (can(b) && Number.isFinite(end[b])) for (let a = 0; a < n; a++) if (can(a) && a !== b) offer(end[a] + distance[a * n + b] + end[b], [a, b]);
  if (sources === 3) { // the middle source apart, the first and the last decide each for itself, but for meeting each other
    const first = new Float64Array(n), last = new Float64Array(n), wanted = top + 3;
    for (let b = 0; b < n; b++) if (can(b) && Number.isFinite(end[b])) {
      for (let i = 0; i < n; i++) {
        const free = can(i) && i !== b;
        first[i] = free ? end[i] + distance[i * n + b] : Infinity;
        last[i] = free ? distance[b * n + i] + end[i] : Infinity;
      }
      const byLength = part => (i, j) => rounded(part[i]) - rounded(part[j]) || rank[i] - rank[j];
      const as = least(first, wanted, (i, j) => rounded(first[i]) - rounded(first[j]) || rounded(distance[i * n + b]) - rounded(distance[j * n + b]) || rank[i] - rank[j]);
      for (const c of least(last, wanted, byLength(last))) for (const a of as) if (a !== c) offer(first[a] + end[b] + last[c], [a, b, c]);
    }
  }
  const all = best();
  return all.slice(0, top).map(({ keys, ...p }) => ({ ...p, tied: all.filter(q => q.keys[0] === keys[0]).length > 1 }));
}

// ---------------------------------------------------------------------------------------------------------------- numbers

const bytes = view => (view && view.byteLength ? view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength) : null);

/** The weighted sum of the terms, in the order of the terms; in 64 bits, of terms that are 32-bit numbers on both sides. */
export function weighted(terms, names, weights, n) {
  const out = new Float64Array(n * n);
  names.forEach((name, t) => {
    const w = weights[name] || 0, at = t * n * n;
    if (!w) return;
    if (name === "oca") for (let i = 0; i < n * n; i++) out[i] += w * (1 - terms[at + i]);
    else for (let i = 0; i < n * n; i++) out[i] += w * terms[at + i];
  });
  return out;
}

const say = x => (x === null || x === undefined || Number.isNaN(x) ? "none" : x === 0 ? "0" : Math.abs(x) >= 1e6 || Math.abs(x) < 0.001 ? x.toExponential(2) : String(Number(x.toPrecision(3))));

// ---------------------------------------------------------------------------------------------------------------- page

const STYLE = `
.sq { --ink: var(--jp-ui-font-color1, #1a1a1a); --soft: var(--jp-ui-font-color2, #595959); --paper: var(--jp-layout-color1, #ffffff); --line: var(--jp-border-color1, #b5b5b5); --mark: #b34700; --run: #0072b2;
  color: var(--ink); background: var(--paper); font: 13px/1.45 system-ui, sans-serif; padding: 10px; display: grid; grid-template-columns: minmax(0, 1fr) minmax(260px, 340px); gap: 10px 18px; }
.sq.dark { --ink: var(--jp-ui-font-color1, #ececec); --soft: var(--jp-ui-font-color2, #b9b9b9); --paper: var(--jp-layout-color1, #161616); --line: var(--jp-border-color1, #5a5a5a); --mark: #ff9a4d; --run: #6bbcff; }
.sq * { box-sizing: border-box; } .sq .bar { grid-column: 1 / -1; display: flex; flex-wrap: wrap; gap: 8px 16px; align-items: end; }
.sq label { display: flex; flex-direction: column; color: var(--soft); font-size: 12px; } .sq select, .sq input[type=number] { font: inherit; font-size: 13px; color: var(--ink); background: var(--paper); border: 1px solid var(--line); border-radius: 3px; padding: 3px 5px; max-width: 260px; }
.sq input[type=number] { width: 70px; } .sq fieldset { border: 0; margin: 0 0 10px; padding: 0; } .sq legend, .sq h4 { font-weight: 600; font-size: 13px; margin: 0 0 4px; padding: 0; color: var(--ink); }
.sq .weight { display: grid; grid-template-columns: 64px 1fr 44px; gap: 8px; align-items: center; flex-direction: row; font-size: 12px; color: var(--ink); } .sq .weight input { width: 100%; accent-color: var(--run); } .sq .weight output { text-align: right; font-variant-numeric: tabular-nums; }
.sq canvas { display: block; width: 100%; } .sq :focus-visible { outline: 3px solid var(--run); outline-offset: 1px; } .sq .readout { min-height: 2.9em; color: var(--soft); }
.sq table { border-collapse: collapse; width: 100%; font-size: 12px; margin: 0; } .sq th, .sq td { text-align: left; padding: 2px 8px 2px 0; border: 0; border-bottom: 1px solid var(--line); background: none; color: var(--ink); vertical-align: top; } .sq td.n, .sq th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.sq button { font: inherit; font-size: 12px; text-align: left; color: var(--ink); background: none; border: 0; padding: 1px 0; cursor: pointer; overflow-wrap: anywhere; } .sq button:hover { text-decoration: underline; } .sq button[aria-pressed=true] { color: var(--mark); font-weight: 600; }
.sq ol { list-style: none; margin: 0 0 8px; padding: 0; } .sq ol li { overflow-wrap: anywhere; } .sq ol .stop { border: 1.5px solid var(--mark); border-radius: 3px; padding: 1px 6px; display: inline-block; } .sq ol .stop.target { border-color: var(--run); } .sq ol .hop { color: var(--soft); font-size: 12px; padding-left: 10px; }
.sq .detail { grid-column: 1 / -1; display: flex; flex-wrap: wrap; gap: 14px 22px; border-top: 1px solid var(--line); padding-top: 8px; } .sq figure { margin: 0; width: 190px; } .sq figcaption { font-size: 12px; overflow-wrap: anywhere; } .sq .slice { position: relative; background: #000; } .sq .slice img { display: block; width: 100%; image-rendering: pixelated; } .sq .slice img + img { position: absolute; inset: 0; }
.sq svg text { fill: var(--soft); font-size: 9px; } .sq .note { color: var(--soft); font-size: 12px; margin: 2px 0 6px; } @media (max-width: 700px) { .sq { grid-template-columns: minmax(0, 1fr); } }`;

function make(tag, more = {}, ...children) {
  const { data, ...rest } = more, node = document.createElement(tag);
  for (const [k, v] of Object.entries(rest)) k in node && k !== "style" ? (node[k] = v) : node.setAttribute(k, v);
  if (data) node.dataset.name = data;
  node.append(...children);
  return node;
}

function isDark(el) { // JupyterLab says so itself; elsewhere the reader's system does
  const lab = document.body.dataset.jpThemeLight;
  return lab ? lab === "false" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function render({ model, el }) {
  const about = model.get("_about"), names = about.names, n = names.length, termNames = about.terms, at = new Map(names.map((name, i) => [name, i]));
  const terms = new Float32Array(bytes(model.get("_terms")));
  const bounds = bytes(model.get("_bounds")), ends = bounds ? new Float32Array(bounds) : null; // low and high of each term, for a page without Python
  const colours = Uint8Array.from(about.colours.match(/../g), h => parseInt(h, 16));
  let distance, permutation, groupsAt, answers = [], said = "", cursor = null, far = 1, picture = document.createElement("canvas"), waiting = 0, later = 0, box = null, mine = false; // mine: the question was changed here, not by Python, which says its path itself

  const root = make("div", { className: "sq" }), id = `sq${Math.random().toString(36).slice(2)}`;
  const paint = () => root.classList.toggle("dark", isDark(el));
  paint();
  const select = (name, text, options) => {
    const s = make("select", { data: name, id: `${id}-${name}` }, ...options.map(([value, shown]) => make("option", { value }, shown)));
    return [s, make("label", { htmlFor: s.id }, text, s)];
  };
  const [target, targetLabel] = select("target", "target", [...names].sort().map(x => [x, x]));
  const [strategy, strategyLabel] = select("strategy", "strategy", about.strategies);
  const [group, groupLabel] = select("group", "grouped by", about.groups.map(x => [x, x]));
  const [order, orderLabel] = select("order", "within a group by", [["name", "name"], ["distance", "distance to the target"]]);
  const sources = make("input", { data: "sources", id: `${id}-sources`, type: "number", min: 1, max: Math.max(1, n - 1), step: 1 });
  const canvas = make("canvas", { data: "matrix", tabIndex: 0, role: "application", "aria-label": "Matrix of distances, a row for each source and a column for each target. Arrow keys move, Enter shows the pair." });
  const readout = make("div", { data: "readout", className: "readout", "aria-live": "polite" });
  const side = make("div"), weightBox = make("fieldset", {}, make("legend", {}, "weights of the terms, in units of their medians"));
  const pathBox = make("ol", { data: "path", "aria-label": "the path" }), rest = make("div", { data: "runners-up" }), note = make("p", { className: "note", data: "said" }), detail = make("div", { data: "detail", className: "detail", "aria-live": "polite" });
  const sliders = termNames.map((t, k) => {
    const input = make("input", { data: `weight-${t}`, id: `${id}-w-${k}`, type: "range", min: 0, max: 3, step: 0.05 }), out = make("output", { htmlFor: input.id });
    weightBox.append(make("label", { className: "weight", htmlFor: input.id }, make("span", {}, t), input, out));
    input.addEventListener("input", () => { ask({ weights: { ...model.get("weights"), [t]: Number(input.value) / about.scales[t] } }); });
    return [t, input, out];
  });
  root.append(make("style", {}, STYLE), make("div", { className: "bar" }, targetLabel, make("label", { htmlFor: sources.id }, "sources", sources), strategyLabel, groupLabel, orderLabel), make("div", {}, canvas, readout), side, detail);
  side.append(weightBox, make("h4", {}, "path of least cost"), pathBox, note, rest);
  el.append(root);

  // What is moved here is drawn at once; Python hears of it when the hand rests for a moment.
  function tell() { clearTimeout(later); later = setTimeout(() => model.save_changes(), 150); }
  function put(changes) { for (const [k, v] of Object.entries(changes)) model.set(k, v); tell(); }
  function ask(changes) { mine = true; put(changes); soon(true); }
  const here = () => model.get("strategy") === "exact" && model.get("sources") <= 3;

  function soon(anew) { // at most once a frame
    if (waiting) { waiting = Math.max(waiting, anew ? 2 : 1); return; }
    waiting = anew ? 2 : 1;
    requestAnimationFrame(() => { const all = waiting === 2; waiting = 0; if (all) reckon(); draw(); });
  }

  function reckon() {
    const start = performance.now();
    distance = weighted(terms, termNames, model.get("weights"), n);
    for (let i = 0; i < n; i++) distance[i * n + i] = 0;
    answer();
    arrange();
    tint();
    root.dataset.ms = (performance.now() - start).toFixed(1);
  }

  function answer() {
    said = "";
    if (!Object.values(model.get("weights")).some(w => w > 0)) { answers = []; said = "No term has a weight: move at least one above 0."; }
    else if (here()) {
      try { answers = search(distance, n, at.get(model.get("target")), model.get("sources"), 6, names); } catch (e) { answers = []; said = e.message; }
      if (!answers.length && !said) said = "There is no such path.";
    } else {
      const given = model.get("_answer"), asked = JSON.stringify([model.get("target"), model.get("sources"), model.get("strategy"), model.get("weights")]);
      if (about.kernel && given && JSON.stringify(given.asked) === asked) { answers = given.paths.map(p => ({ path: p.map(x => at.get(x)), ...pathCost(distance, n, p.map(x => at.get(x)), at.get(model.get("target"))) })); said = given.said; }
      else { answers = []; said = about.kernel ? `Python is searching ...${model.get("strategy") === "landmarks" && n > 50 ? " The communities of so many tasks take minutes." : ""}` : "This page searches up to three sources among all tasks; the rest needs Python: open the widget in a notebook."; }
    }
    if (mine && here()) put({ path: answers.length ? answers[0].path.map(i => names[i]) : [], runners_up: answers.slice(1).map(p => p.path.map(i => names[i])) });
    mine = false;
  }

  function arrange() { // rows and columns stand in one order
    const g = model.get("group"), known = g === "community" ? model.get("_communities") : about.groups_of[g] || [], labels = names.map((_, i) => String(known[i] ?? "")), t = at.get(model.get("target"));
    const near = i => (i === t ? -Infinity : distance[i * n + t]);
    permutation = [...names.keys()].sort((a, b) => (labels[a] < labels[b] ? -1 : labels[a] > labels[b] ? 1 : (model.get("order") === "distance" ? near(a) - near(b) : 0) || (names[a] < names[b] ? -1 : 1)));
    groupsAt = [];
    permutation.forEach((i, k) => { if (!k || labels[i] !== labels[permutation[k - 1]]) groupsAt.push([k, labels[i]]); });
  }

  function tint() {
    const some = [], step = Math.max(1, Math.floor((n * n) / 4000));
    for (let i = 0; i < n * n; i += step) if (i % (n + 1) && Number.isFinite(distance[i])) some.push(distance[i]);
    some.sort((a, b) => a - b);
    far = some.length ? some[Math.floor(0.98 * (some.length - 1))] || 1 : 1;
    picture.width = picture.height = n;
    const image = new ImageData(n, n), out = image.data, most = colours.length / 3 - 1;
    for (let y = 0, k = 0; y < n; y++) for (let x = 0, row = permutation[y] * n; x < n; x++, k += 4) {
      const i = row + permutation[x], d = distance[i];
      if (permutation[y] === permutation[x] || !Number.isFinite(d)) { out[k] = out[k + 1] = out[k + 2] = 128; out[k + 3] = permutation[y] === permutation[x] ? 40 : 160; continue; }
      const c = 3 * Math.min(most, Math.max(0, Math.round((d / far) * most)));
      out[k] = colours[c]; out[k + 1] = colours[c + 1]; out[k + 2] = colours[c + 2]; out[k + 3] = 255;
    }
    picture.getContext("2d").putImageData(image, 0, 0);
  }

  function draw() {
    paint();
    const ratio = window.devicePixelRatio || 1, wide = Math.max(300, canvas.clientWidth), style = getComputedStyle(root), ink = style.getPropertyValue("--ink"), soft = style.getPropertyValue("--soft"), mark = style.getPropertyValue("--mark"), run = style.getPropertyValue("--run");
    const named = n <= 40, left = Math.min(190, wide * 0.3), right = 72, top = 22, size = Math.min(wide - left - right, 640), cell = size / n, high = top + size + 8, shown = names.map(x => x);
    box = { left, top, size, cell };
    canvas.style.height = `${high}px`;
    canvas.width = wide * ratio; canvas.height = high * ratio;
    const c = canvas.getContext("2d");
    c.scale(ratio, ratio); c.imageSmoothingEnabled = cell < 1;
    c.drawImage(picture, left, top, size, size);
    c.font = "11px system-ui, sans-serif"; c.textBaseline = "middle"; c.fillStyle = soft;
    const fit = (text, room) => { let s = text; while (s.length > 2 && c.measureText(s).width > room) s = `${s.slice(0, -2)}…`; return s; };
    c.textAlign = "right";
    if (named && cell >= 9) permutation.forEach((i, k) => c.fillText(fit(shown[i], left - 8), left - 5, top + (k + 0.5) * cell));
    else groupsAt.forEach(([k, text], q) => { const next = q + 1 < groupsAt.length ? groupsAt[q + 1][0] : n; if ((next - k) * cell >= 10) c.fillText(fit(text, left - 8), left - 5, top + ((k + next) / 2) * cell); });
    c.textAlign = "left"; c.fillText("rows: sources, columns: targets", left, 10);
    c.strokeStyle = style.getPropertyValue("--paper"); c.lineWidth = 1.5;
    for (const [k] of groupsAt.slice(1)) { c.beginPath(); c.moveTo(left + k * cell, top); c.lineTo(left + k * cell, top + size); c.moveTo(left, top + k * cell); c.lineTo(left + size, top + k * cell); c.stroke(); }
    const place = []; permutation.forEach((i, k) => { place[i] = k; });
    const cellBox = (i, j, colour, width) => { c.strokeStyle = colour; c.lineWidth = width; const s = Math.max(cell, 5); c.strokeRect(left + (place[j] + 0.5) * cell - s / 2, top + (place[i] + 0.5) * cell - s / 2, s, s); };
    const t = at.get(model.get("target"));
    c.strokeStyle = run; c.lineWidth = 2; c.strokeRect(left + place[t] * cell - 1, top - 1, Math.max(cell, 3) + 2, size + 2);
    const path = model.get("path").map(x => at.get(x)).filter(i => i !== undefined), stops = [...path, t];
    path.forEach((i, k) => cellBox(i, stops[k + 1], mark, 2.5));
    const pair = model.get("pair");
    if (pair.length === 2) cellBox(at.get(pair[0]), at.get(pair[1]), ink, 2);
    if (cursor && document.activeElement === canvas) cellBox(permutation[cursor[0]], permutation[cursor[1]], run, 3);
    const bar = left + size + 14; // the scale
    for (let y = 0; y < size; y++) { const k = 3 * Math.round((1 - y / size) * (colours.length / 3 - 1)); c.fillStyle = `rgb(${colours[k]},${colours[k + 1]},${colours[k + 2]})`; c.fillRect(bar, top + y, 10, 1.5); }
    c.fillStyle = soft; c.fillText(`≥ ${say(far)}`, bar - 6, top - 11); c.fillText(say(far / 2), bar + 14, top + size / 2); c.fillText("0", bar + 14, top + size - 4);
    words(path, t);
  }

  function words(path, t) {
    target.value = model.get("target"); strategy.value = model.get("strategy"); group.value = model.get("group"); order.value = model.get("order");
    if (document.activeElement !== sources) sources.value = model.get("sources");
    for (const [name, input, out] of sliders) { const w = (model.get("weights")[name] || 0) * about.scales[name]; if (document.activeElement !== input) input.value = w; out.textContent = w.toFixed(2); }
    const known = path.length && path.length === model.get("path").length, cost = known ? pathCost(distance, n, path, t) : null;
    pathBox.replaceChildren(...(known ? path.flatMap((i, k) => [make("li", {}, make("span", { className: "stop" }, names[i])), make("li", { className: "hop" }, `↓ ${say(cost.hops[k])}${k < path.length - 1 ? `, and ${say(distance[i * n + t])} to the target` : ""}`)]) : []),
      ...(known ? [make("li", {}, make("span", { className: "stop target" }, names[t]))] : []));
    const other = answers.length && known && answers[0].path.join() !== path.join() ? " This is not the best of them." : "";
    note.textContent = said || (known ? `Cost ${say(cost.cost)}.${other}${answers[0] && answers[0].tied ? " Another path costs the same." : ""}` : "");
    rest.replaceChildren(...(answers.length ? [make("table", {}, make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "best and runners-up"), make("th", { scope: "col", className: "n" }, "cost"))), make("tbody", {}, ...answers.map((p, k) => {
      const pick = make("button", { type: "button", ariaPressed: String(p.path.join() === path.join()) }, p.path.map(i => names[i]).join(" → "));
      pick.addEventListener("click", () => { put({ path: p.path.map(i => names[i]) }); soon(false); });
      return make("tr", {}, make("td", {}, pick), make("td", { className: "n" }, k ? `+${say(p.cost - answers[0].cost)}` : say(p.cost)));
    })))] : []));
  }

  // ------------------------------------------------------------------------------------------------------------ a pair
  const pairText = (i, j) => (i === j ? names[i] : `${names[i]} → ${names[j]}: distance ${say(distance[i * n + j])}`);
  function point(i, j) { readout.textContent = pairText(i, j); }
  function choose(i, j) {
    if (i === j) return;
    put({ pair: [names[i], names[j]] });
    clearTimeout(later); model.save_changes();
    show(); soon(false);
  }

  function show() {
    const [a, b] = model.get("pair");
    if (!a || !b || !distance) { detail.replaceChildren(make("p", { className: "note" }, "Click a cell, or move to it with the arrow keys and press Enter, to see its two tasks.")); return; }
    const i = at.get(a), j = at.get(b), given = model.get("_detail"), own = given && given.pair && given.pair[0] === a && given.pair[1] === b ? given : null, w = model.get("weights");
    const bound = (t, k) => { const low = own ? own.bounds[t] : ends ? [ends[2 * k * n * n + i * n + j], ends[(2 * k + 1) * n * n + i * n + j]] : null; return low && Number.isFinite(low[0]) ? `${say(low[0])} to ${say(low[1])}` : "none"; };
    const rows = termNames.map((t, k) => { const v = terms[k * n * n + i * n + j], part = w[t] ? w[t] * (t === "oca" ? 1 - v : v) : 0; return make("tr", {}, make("th", { scope: "row" }, t), make("td", { className: "n" }, say(v)), make("td", { className: "n" }, bound(t, k)), make("td", { className: "n" }, say(part))); });
    const whole = own && own.bounds.Distance ? bound("Distance") : "";
    const table = make("table", {}, make("thead", {}, make("tr", {}, ...["term", "value", "95 % interval", "share of the distance"].map((x, k) => make("th", { scope: "col", className: k ? "n" : "" }, x)))),
      make("tbody", {}, ...rows, make("tr", {}, make("th", { scope: "row" }, "distance"), make("td", {}, ""), make("td", { className: "n" }, whole), make("td", { className: "n" }, say(distance[i * n + j])))));
    const pictures = own ? own.tasks : about.pictures || {};
    detail.replaceChildren(...[[a, "source"], [b, "target"]].map(([name, role]) => figure(name, role, pictures[name])), make("div", { style: "flex: 1 1 300px" }, make("h4", {}, `${a} → ${b}`), table));
  }

  function figure(name, role, p) {
    if (!p) return make("figure", {}, make("figcaption", {}, make("b", {}, role), ` ${name}`), make("p", { className: "note" }, about.kernel && about.pool ? "reading ..." : "The pool was not given, so there is no picture."));
    if (p.said) return make("figure", {}, make("figcaption", {}, make("b", {}, role), ` ${name}`), make("p", { className: "note" }, p.said));
    const slice = make("div", { className: "slice" }, make("img", { src: p.image, alt: `axial slice ${p.slice} of a case of ${name}` }), make("img", { src: p.outline, alt: "", "aria-hidden": "true" }));
    return make("figure", {}, slice, histogram(p), make("figcaption", {}, make("b", {}, role), ` ${name}, ${p.patient}: axial slice ${p.slice}, ${p.extent}; label outlined`));
  }

  function histogram(p) {
    const NS = "http://www.w3.org/2000/svg", svg = document.createElementNS(NS, "svg"), put_ = (tag, attributes, text) => { const e = document.createElementNS(NS, tag); for (const [k, v] of Object.entries(attributes)) e.setAttribute(k, v); if (text) e.textContent = text; svg.append(e); };
    const w = 190, h = 62, most = Math.max(...p.inside, ...p.around, 1e-9), x = k => (k / p.inside.length) * w, y = v => h - 14 - (v / most) * (h - 26);
    svg.setAttribute("viewBox", `0 0 ${w} ${h}`); svg.setAttribute("role", "img"); svg.setAttribute("aria-label", "share of the voxels over raw intensity, in the label and in the rest of the foreground");
    const steps = v => v.map((s, k) => `${k ? "L" : "M"}${x(k)},${y(s)}L${x(k + 1)},${y(s)}`).join("");
    put_("path", { d: steps(p.around), fill: "none", stroke: "#8a8a8a", "stroke-width": 1.5 }); put_("path", { d: steps(p.inside), fill: "none", stroke: "#e69f00", "stroke-width": 2 });
    put_("text", { x: 0, y: h - 3 }, say(p.low)); put_("text", { x: w, y: h - 3, "text-anchor": "end" }, say(p.high)); put_("text", { x: w / 2, y: h - 3, "text-anchor": "middle" }, "raw intensity");
    put_("text", { x: w, y: 8, "text-anchor": "end" }, "label (orange), rest of foreground");
    return svg;
  }

  // ------------------------------------------------------------------------------------------------------------ hands
  const cellAt = e => { const r = canvas.getBoundingClientRect(), x = Math.floor((e.clientX - r.left - box.left) / box.cell), y = Math.floor((e.clientY - r.top - box.top) / box.cell); return x >= 0 && y >= 0 && x < n && y < n ? [y, x] : null; };
  canvas.addEventListener("mousemove", e => { const k = cellAt(e); if (k) point(permutation[k[0]], permutation[k[1]]); });
  canvas.addEventListener("click", e => { const k = cellAt(e); if (!k) return; cursor = k; canvas.focus(); choose(permutation[k[0]], permutation[k[1]]); });
  canvas.addEventListener("focus", () => { if (!cursor) cursor = [0, permutation.indexOf(at.get(model.get("target")))]; point(permutation[cursor[0]], permutation[cursor[1]]); draw(); });
  canvas.addEventListener("blur", () => draw());
  canvas.addEventListener("keydown", e => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[e.key];
    if (!step && e.key !== "Enter" && e.key !== " ") return;
    e.preventDefault(); e.stopPropagation();
    if (step) { cursor = cursor.map((x, k) => Math.min(n - 1, Math.max(0, x + step[k]))); point(permutation[cursor[0]], permutation[cursor[1]]); draw(); } else choose(permutation[cursor[0]], permutation[cursor[1]]);
  });
  target.addEventListener("change", () => ask({ target: target.value }));
  strategy.addEventListener("change", () => ask({ strategy: strategy.value }));
  group.addEventListener("change", () => { put({ group: group.value }); if (group.value === "community" && !model.get("_communities").length) readout.textContent = "Python is looking for the communities; of a hundred tasks that takes minutes."; soon(true); });
  order.addEventListener("change", () => { put({ order: order.value }); soon(true); });
  sources.addEventListener("change", () => { const k = Math.round(Number(sources.value)); if (k >= 1 && k <= n - 1) ask({ sources: k }); else sources.value = model.get("sources"); });
  const heard = { "change:target": true, "change:sources": true, "change:strategy": true, "change:weights": true, "change:group": true, "change:order": true, "change:_answer": true, "change:_communities": true, "change:path": false };
  for (const [event, anew] of Object.entries(heard)) model.on(event, () => soon(anew));
  const newPair = () => { show(); soon(false); };
  model.on("change:pair", newPair); model.on("change:_detail", show);
  const resized = new ResizeObserver(() => soon(false)), scheme = matchMedia("(prefers-color-scheme: dark)"), repaint = () => soon(false);
  resized.observe(canvas.parentElement); scheme.addEventListener("change", repaint);
  reckon(); draw(); show();
  return () => { resized.disconnect(); scheme.removeEventListener("change", repaint); clearTimeout(later); };
}

/** A stand-in for the model of a widget, for a page without a kernel: state, and who wants to hear of its changes. */
export function standIn(state) {
  const listeners = {};
  const buffer = text => { const raw = atob(text), out = new Uint8Array(raw.length); for (let i = 0; i < raw.length; i++) out[i] = raw.charCodeAt(i); return new DataView(out.buffer); };
  const values = { ...state, _terms: buffer(state._terms), _bounds: buffer(state._bounds) };
  return {
    get: k => values[k], set(k, v) { if (JSON.stringify(values[k]) === JSON.stringify(v)) return; values[k] = v; for (const f of listeners[`change:${k}`] || []) f(); },
    on(k, f) { (listeners[k] ||= []).push(f); }, off() {}, save_changes() {}, send() {},
  };
}

export default { render };
