// Owns the page: asks the daemon for its state again and again, and shows it.
// Never writes what the daemon says as anything but text: models are named by strangers.

const POLL_MS = 1000;
const RETRY_MS = 3000;
const PATIENCE_MS = 5000;
const FEW = 10; // shown of what may be long, until more is asked for

const STAGES = ["import", "open", "describe", "look", "move", "bind", "files", "settle"];
const LANES = ["origin", "wait", "disk", "host", "verify", "device", "store"];
const LANE_MEANS = {
  stage: "one after the other",
  origin: "reading from where the model was born",
  wait: "for another process that fetches the same",
  disk: "reading the disk tier",
  host: "copying from host memory",
  verify: "computing digests",
  device: "copying to the device",
  store: "writing to the disk tier, behind",
};
const TIER_NAMES = new Map([["host", "Host memory"], ["disk", "Disk"]]);
const NONE = "–";

const byId = (id) => document.getElementById(id);

// -- numbers, each with its unit

function size(nbytes) {
  for (const [power, unit] of [[12, "TB"], [9, "GB"], [6, "MB"], [3, "kB"]]) {
    if (nbytes >= 10 ** power) return `${(nbytes / 10 ** power).toFixed(2)} ${unit}`;
  }
  return Number.isFinite(nbytes) ? `${nbytes} B` : NONE;
}

const rate = (bytesPerS) => (bytesPerS > 0 ? `${size(bytesPerS)}/s` : NONE);
const count = (number) => (Number.isFinite(number) ? number.toLocaleString("en") : NONE);
const percent = (part) => `${Math.round(part * 100)} %`;
const share = (part, whole) => (whole > 0 ? Math.min(1, Math.max(0, part / whole)) : 0);
const plural = (number, what) => `${count(number)} ${what}${number === 1 ? "" : "s"}`;

function duration(spentS) {
  if (!Number.isFinite(spentS)) return NONE;
  const [days, hours, minutes] = [Math.floor(spentS / 86400), Math.floor(spentS / 3600), Math.floor(spentS / 60)];
  if (days) return `${days} d ${hours % 24} h`;
  if (hours) return `${hours} h ${minutes % 60} min`;
  if (minutes) return `${minutes} min ${Math.floor(spentS % 60)} s`;
  if (spentS >= 1) return `${spentS.toFixed(2)} s`;
  return spentS > 0 ? `${Number((spentS * 1000).toPrecision(3))} ms` : "0 s";
}

// How long ago, or ahead, something is: to the second, or coarser.
function about(spentS) {
  if (spentS < 60) return `${Math.round(spentS)} s`;
  return spentS < 3600 ? `${Math.floor(spentS / 60)} min` : duration(spentS);
}

const ago = (thenS, nowS) => (thenS > 0 ? `${about(Math.max(0, nowS - thenS))} ago` : "never");

function usd(amount) {
  if (amount > 0 && amount < 0.0001) return "< 0.0001 USD";
  return Number.isFinite(amount) ? `${amount.toFixed(amount > 0 && amount < 1 ? 4 : 2)} USD` : NONE;
}

function clock(atS) {
  return new Date(atS * 1000).toLocaleTimeString([], { hour12: false });
}

function expected(fromS, untilS, nowS) {
  if (untilS < nowS) return `passed ${ago(untilS, nowS)}`;
  if (fromS <= nowS) return `now, for ${about(untilS - nowS)} more`;
  return `in ${about(fromS - nowS)} to ${about(untilS - nowS)}`;
}

// -- elements

// Spells out what has no shape of its own, or would turn the text around it.
const printable = (text) => text.replace(/[\p{Cc}\p{Cf}\p{Cs}\p{Co}]/gu, (char) => `\\u{${char.codePointAt(0).toString(16)}}`);

function make(tag, className = "", text = "") {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text) element.textContent = printable(text);
  return element;
}

// Touches nothing that stays the same: what a person has selected stays selected.
function say(element, text) {
  const shown = printable(text);
  if (element.textContent !== shown) element.textContent = shown;
}

// Makes a parent's children follow a list: those that stay are filled anew, and keep their focus and what is open.
function follow(parent, items, keyOf, build, fill) {
  const known = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  const kept = new Set();
  let at = parent.firstElementChild;
  for (const item of items) {
    const key = keyOf(item);
    let child = known.get(key);
    if (child === undefined || kept.has(child)) {
      child = build(item);
      child.dataset.key = key;
    }
    kept.add(child);
    fill(child, item);
    if (child === at) at = at.nextElementSibling;
    else parent.insertBefore(child, at);
  }
  for (const child of [...parent.children]) if (!kept.has(child)) child.remove();
}

// Fills a <dl> with [name, value] pairs.
function pairs(list, rows) {
  const build = () => {
    const pair = make("div");
    pair.append(make("dt"), " ", make("dd"));
    return pair;
  };
  follow(list, rows, ([name]) => name, build, (pair, [name, value]) => {
    say(pair.children[0], name);
    say(pair.children[1], value);
  });
}

const SVG = "http://www.w3.org/2000/svg";

function svg(tag, attributes) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

function bar(x, y, width, height, className, told) {
  const rect = svg("rect", { x: x.toFixed(2), y, width: Math.max(1, width).toFixed(2), height, class: className });
  const title = svg("title", {});
  title.textContent = printable(told);
  rect.append(title);
  return rect;
}

// A table whose columns are {title, order, isNumber, fill}; those with an order are sorted by at a press.
class Table {
  constructor(place, caption, columns, keyOf) {
    Object.assign(this, { columns, keyOf, by: null, isDescending: false, items: [] });
    const table = make("table");
    table.setAttribute("role", "table");
    const head = make("tr");
    head.setAttribute("role", "row");
    this.heads = columns.map((column) => this.#head(column));
    head.append(...this.heads);
    const top = make("thead");
    top.setAttribute("role", "rowgroup");
    top.append(head);
    this.body = make("tbody");
    this.body.setAttribute("role", "rowgroup");
    table.append(make("caption", "hidden", caption), top, this.body);
    place.className = "table";
    place.append(table);
    this.table = table;
  }

  #head(column) {
    const head = make("th", column.isNumber ? "number" : "");
    head.setAttribute("role", "columnheader");
    head.scope = "col";
    if (column.order) {
      const button = make("button", "sort", column.title);
      button.type = "button";
      button.addEventListener("click", () => this.#sortBy(column));
      head.append(button);
    } else {
      head.textContent = column.title;
      head.classList.add("unsorted");
    }
    return head;
  }

  #sortBy(column) {
    this.isDescending = this.by === column ? !this.isDescending : Boolean(column.isNumber);
    this.by = column;
    this.columns.forEach((each, index) => {
      if (each === column) this.heads[index].setAttribute("aria-sort", this.isDescending ? "descending" : "ascending");
      else this.heads[index].removeAttribute("aria-sort");
    });
    this.show(this.items);
  }

  show(items) {
    this.items = items;
    this.table.hidden = items.length === 0;
    let shown = items;
    if (this.by) {
      const order = this.by.order;
      const sign = this.isDescending ? -1 : 1;
      shown = [...items].sort((a, b) => sign * (order(a) < order(b) ? -1 : order(a) > order(b) ? 1 : 0));
    }
    follow(this.body, shown, this.keyOf, () => this.#row(), (row, item) => {
      this.columns.forEach((column, index) => column.fill(row.children[index].firstElementChild, item));
    });
  }

  #row() {
    const row = make("tr");
    row.setAttribute("role", "row");
    this.columns.forEach((column, index) => {
      const cell = make(index ? "td" : "th", column.isNumber ? "number" : "");
      cell.setAttribute("role", index ? "cell" : "rowheader");
      if (!index) cell.scope = "row";
      cell.dataset.title = column.title;
      cell.append(make("div"));
      row.append(cell);
    });
    return row;
  }
}

const plain = (told) => (place, item) => say(place, told(item));
// Text that may be long and without a place to break.
const long = (className, told) => (place, item) => {
  place.className = className;
  say(place, told(item));
};

// -- the parts of the page

function showNode(state) {
  const chip = byId("state");
  say(chip, isPaused ? "paused" : state.is_ready ? "ready" : "not ready");
  chip.className = `chip ${isPaused ? "waiting" : state.is_ready ? "good" : "waiting"}`;
  pairs(byId("node"), [
    ["version", String(state.version)],
    ["process", String(state.pid)],
    ["up", duration(Math.max(0, Math.floor(state.now_s - state.started_s)))],
    ["clients", count(state.n_clients)],
    ["refused", count(state.n_refused)],
    ["socket", String(state.socket)],
    ["folder", String(state.dir)],
  ]);
}

function buildTier() {
  const tier = make("div", "tier");
  const meter = make("div", "bar");
  meter.setAttribute("role", "meter");
  meter.append(make("div", "used"), make("div", "leased"));
  const detail = make("p", "detail");
  detail.append(make("span", "leased"), make("span"), " · ", make("span"));
  tier.append(make("h3"), make("p", "amount"), meter, detail);
  return tier;
}

function showTiers(state) {
  follow(byId("tier-list"), state.tiers, (tier) => tier.tier, buildTier, (element, tier) => {
    const [title, amount, meter, detail] = element.children;
    const used = share(tier.used_bytes, tier.budget_bytes);
    const name = TIER_NAMES.get(tier.tier) ?? String(tier.tier);
    const told = `${size(tier.used_bytes)} of ${size(tier.budget_bytes)}`;
    say(title, name);
    say(amount, `${told} · ${percent(used)}`);
    meter.setAttribute("aria-label", printable(`${name}: part of the budget in use`));
    meter.setAttribute("aria-valuemin", 0);
    meter.setAttribute("aria-valuemax", 100);
    meter.setAttribute("aria-valuenow", Math.round(used * 100));
    meter.setAttribute("aria-valuetext", told);
    meter.children[0].style.width = `${used * 100}%`;
    meter.children[1].style.width = `${share(tier.leased_bytes, tier.budget_bytes) * 100}%`;
    const freeBytes = Math.max(0, tier.budget_bytes - tier.used_bytes);
    say(detail.children[1], `${size(tier.leased_bytes)} leased`);
    say(detail.children[2], `${size(freeBytes)} free`);
  });
}

function buildTransfer() {
  const item = make("li");
  const line = make("p", "line");
  line.append(make("span", "uri"), make("span", "chip"), make("span", "chip"));
  const progress = make("div", "bar");
  progress.setAttribute("role", "progressbar");
  progress.append(make("div", "done"));
  item.append(line, progress, make("p", "detail"));
  return item;
}

function showTransfers(state) {
  byId("transfers-none").hidden = state.transfers.length > 0;
  follow(byId("transfer-list"), state.transfers, (each) => String(each.id), buildTransfer, (item, each) => {
    const [line, progress, detail] = item.children;
    const done = share(each.done_bytes, each.total_bytes);
    say(line.children[0], String(each.uri));
    say(line.children[1], `to ${each.tier}`);
    say(line.children[2], `by ${each.why}`);
    progress.setAttribute("aria-label", printable(String(each.uri)));
    progress.setAttribute("aria-valuenow", Math.round(done * 100));
    progress.children[0].style.width = `${done * 100}%`;
    const parts = [`${size(each.done_bytes)} of ${size(each.total_bytes)}`, percent(done), each.bytes_per_s > 0 ? rate(each.bytes_per_s) : "waiting"];
    if (each.bytes_per_s > 0) parts.push(`${about((each.total_bytes - each.done_bytes) / each.bytes_per_s)} left`);
    parts.push(`begun ${ago(each.began_s, state.now_s)}`);
    say(detail, parts.join(" · "));
  });
}

let nowS = 0; // of the daemon, whose clock may be another than the browser's

function fillState(place, model) {
  const parts = [model.state === "filling" ? `filling, ${percent(share(model.bytes, model.total_bytes))}` : model.state];
  if (model.pinned) parts.push("pinned");
  if (model.until_s) parts.push(model.until_s > nowS ? `for ${about(model.until_s - nowS)} more` : "its time is over");
  say(place, parts.join(", "));
}

const models = new Table(
  byId("model-table"),
  "Models on this node, by tier",
  [
    {
      title: "Model",
      order: (model) => String(model.uri),
      fill: (place, model) => {
        if (!place.children.length) place.append(make("span", "uri"), make("span", "revision"));
        say(place.children[0], String(model.uri));
        say(place.children[1], String(model.revision).slice(0, 19));
        place.children[1].title = printable(String(model.revision));
      },
    },
    { title: "Tier", order: (model) => String(model.tier), fill: plain((model) => String(model.tier)) },
    { title: "State", order: (model) => String(model.state), fill: fillState },
    { title: "Size", isNumber: true, order: (model) => model.total_bytes, fill: plain((model) => size(model.total_bytes)) },
    { title: "Hits", isNumber: true, order: (model) => model.n_hits, fill: plain((model) => count(model.n_hits)) },
    { title: "Leases", isNumber: true, order: (model) => model.n_leases, fill: plain((model) => count(model.n_leases)) },
    {
      title: "Last use",
      isNumber: true,
      order: (model) => model.last_use_s,
      fill: plain((model) => ago(model.last_use_s, nowS)),
    },
    { title: "Memory", fill: long("why", (model) => String(model.pages || NONE)) },
  ],
  (model) => `${model.tier} ${model.revision} ${model.uri}`,
);

function showModels(state) {
  byId("models-none").hidden = state.models.length > 0;
  models.show(state.models);
}

// -- loads

// The spans of a load as objects; of one that tells none, its stages one after the other.
function spansOf(report) {
  if (Array.isArray(report.spans)) {
    const spans = report.spans.map(([lane, name, start, stop, nbytes]) => ({ lane, name, start, stop, nbytes }));
    return spans.sort((a, b) => a.start - b.start);
  }
  let at = 0;
  return stagesOf(report).map(([name, spentS]) => ({ lane: "stage", name, start: at, stop: (at += spentS), nbytes: 0 }));
}

function stagesOf(report) {
  return Object.entries(report.seconds).filter(([name, spentS]) => name !== "total" && spentS > 0);
}

function busyS(spans) {
  let [total, until] = [0, 0];
  for (const span of spans) {
    total += Math.max(0, span.stop - Math.max(span.start, until));
    until = Math.max(until, span.stop);
  }
  return total;
}

// As few rows as hold spans without overlap.
function pack(spans) {
  const rows = [];
  for (const span of spans) {
    const row = rows.find((each) => each.at(-1).stop <= span.start);
    if (row) row.push(span);
    else rows.push([span]);
  }
  return rows;
}

const classOf = (names, name, prefix) => `${prefix}-${names.includes(name) ? name : "other"}`;

function drawLane(lane, spans, endS) {
  const rows = pack(spans);
  const height = Math.max(4, Math.floor(14 / rows.length));
  const nbytes = spans.reduce((sum, span) => sum + span.nbytes, 0);
  const busy = busyS(spans);
  const drawing = svg("svg", {
    viewBox: `0 0 1000 ${rows.length * height}`,
    height: rows.length * height,
    preserveAspectRatio: "none",
    role: "img",
    "aria-label": `${lane}, ${LANE_MEANS[lane]}: busy for ${duration(busy)}`,
  });
  rows.forEach((row, number) => {
    for (const span of row) {
      const className = lane === "stage" ? classOf(STAGES, span.name, "stage") : `lane-${lane}`;
      const spentS = span.stop - span.start;
      const told = [`${span.name || lane}: ${duration(spentS)} from ${duration(span.start)}`];
      if (span.nbytes) told.push(size(span.nbytes));
      drawing.append(bar((span.start / endS) * 1000, number * height, (spentS / endS) * 1000, height - 1, className, told.join(", ")));
    }
  });
  const line = make("div", "lane");
  const numbers = nbytes ? `${size(nbytes)} · ${rate(nbytes / busy)}` : duration(busy);
  line.append(make("span", "lane-name", lane), drawing, make("span", "lane-numbers", numbers));
  return line;
}

function drawAxis(endS) {
  const line = make("div", "lane");
  line.setAttribute("aria-hidden", "true");
  const axis = make("div", "axis");
  const power = 10 ** Math.floor(Math.log10(endS / 4));
  const stepS = [1, 2, 5, 10].map((each) => each * power).find((each) => endS / each <= 5) ?? endS;
  for (let number = 0; number * stepS <= endS; number += 1) {
    const tick = make("span", "", number ? duration(number * stepS) : "0");
    tick.style.left = `${((number * stepS) / endS) * 100}%`;
    axis.append(tick);
  }
  line.append(make("span"), axis, make("span"));
  return line;
}

function drawWaterfall(report) {
  const spans = spansOf(report);
  const endS = spans.reduce((end, span) => Math.max(end, span.stop), 0);
  const waterfall = make("div", "waterfall");
  if (!(endS > 0)) return waterfall;
  for (const lane of ["stage", ...LANES]) {
    const ofLane = spans.filter((span) => span.lane === lane);
    if (ofLane.length) waterfall.append(drawLane(lane, ofLane, endS));
  }
  waterfall.append(drawAxis(endS));
  return waterfall;
}

function factsOf(report) {
  const moved = Object.entries(report.bytes ?? {}).filter(([, nbytes]) => nbytes > 0);
  const rows = moved.map(([tier, nbytes]) => [`from ${tier}`, size(nbytes)]);
  if (report.n_requests) rows.push(["requests", `${count(report.n_requests)}, ${count(report.n_retries)} of them retries`]);
  if (report.device) rows.push(["tensors", `${count(report.n_tensors)}, ${size(report.tensor_bytes)}, on ${report.device}`]);
  if (report.stored_bytes) rows.push(["stored", size(report.stored_bytes)]);
  if (report.usd) rows.push(["cost", usd(report.usd)]);
  rows.push(["revision", String(report.revision)]);
  for (const [name, reason] of Object.entries(report.choices ?? {})) rows.push([`choice of ${name}`, String(reason)]);
  (report.warnings ?? []).forEach((text, index) => rows.push([`warning ${index + 1}`, String(text)]));
  return rows;
}

function buildLoad(load) {
  const details = make("details", "load");
  const summary = make("summary");
  const stages = svg("svg", { viewBox: "0 0 1000 8", height: 8, preserveAspectRatio: "none", "aria-hidden": "true" });
  stages.classList.add("stages");
  const line = make("span", "line");
  line.append(make("span", "uri", String(load.report.uri)), make("span", "total"), make("span", "rate"), make("span", "who"));
  summary.append(line, stages, make("span", "bottleneck"));
  details.append(summary);
  details.addEventListener("toggle", () => {
    if (!details.open || details.children.length > 1) return;
    const facts = make("dl", "facts");
    pairs(facts, factsOf(load.report));
    details.append(drawWaterfall(load.report), facts);
  });
  return details;
}

function drawStages(drawing, report, longestS) {
  let at = 0;
  const bars = stagesOf(report).map(([name, spentS]) => {
    const [x, width] = [(at / longestS) * 1000, (spentS / longestS) * 1000];
    at += spentS;
    return bar(x, 0, width, 8, classOf(STAGES, name, "stage"), `${name}: ${duration(spentS)}`);
  });
  drawing.replaceChildren(...bars);
  drawing.dataset.longest = longestS;
}

const shownMore = { loads: false, decisions: false };

// Shows the first few of a list, and a button for the rest.
function few(what, items) {
  const button = byId(`${what}-more`);
  button.hidden = items.length <= FEW;
  say(button, shownMore[what] ? "Show fewer" : `Show all ${items.length}`);
  return shownMore[what] ? items : items.slice(0, FEW);
}

let isFirst = true;

function showLoads(state) {
  const all = state.loads.filter((load) => Number.isFinite(load.report?.seconds?.total)); // a client may send anything
  byId("loads-none").hidden = all.length > 0;
  byId("stage-key").hidden = all.length === 0;
  const loads = few("loads", all);
  const longestS = Math.max(...loads.map((load) => load.report.seconds.total), 1e-9);
  const keyOf = (load) => `${load.ended_s} ${load.pid} ${load.report.uri}`;
  follow(byId("load-list"), loads, keyOf, buildLoad, (details, load) => {
    const [line, stages, bottleneck] = details.firstElementChild.children;
    say(line.children[1], duration(load.report.seconds.total));
    const gbPerS = Number(load.report.gb_per_s);
    say(line.children[2], gbPerS > 0 ? `${gbPerS.toFixed(2)} GB/s` : "nothing moved");
    say(line.children[3], `${load.by} ${load.pid}, ${ago(load.ended_s, state.now_s)}`);
    if (stages.dataset.longest !== String(longestS)) drawStages(stages, load.report, longestS);
    say(bottleneck, load.bottleneck ? load.bottleneck.says : "");
  });
  if (isFirst && loads.length) {
    byId("load-list").firstElementChild.open = true;
    isFirst = false;
  }
  const limits = Object.entries(state.limits).filter(([, limit]) => limit > 0);
  pairs(byId("limits"), limits.map(([name, limit]) => [`best from ${name.split("_")[0]}`, rate(limit)]));
}

// -- what the daemon expects and decides

const forecast = new Table(
  byId("forecast-table"),
  "Models that are expected to be asked for",
  [
    { title: "Model", order: (each) => String(each.uri), fill: long("uri", (each) => String(each.uri)) },
    { title: "Uses", isNumber: true, order: (each) => each.n_uses, fill: plain((each) => count(each.n_uses)) },
    {
      title: "Expected",
      order: (each) => each.expected_from_s,
      fill: plain((each) => expected(each.expected_from_s, each.expected_until_s, nowS)),
    },
    { title: "Why", fill: long("why", (each) => String(each.why)) },
  ],
  (each) => String(each.uri),
);

const decisions = new Table(
  byId("decision-table"),
  "What was fetched ahead, demoted, evicted or left, the newest first",
  [
    { title: "Model", fill: long("uri", (each) => String(each.uri)) },
    { title: "What", fill: plain((each) => String(each.what)) },
    { title: "Tier", fill: plain((each) => String(each.tier)) },
    { title: "When", fill: plain((each) => `${clock(each.at_s)}, ${ago(each.at_s, nowS)}`) },
    { title: "Why", fill: long("why", (each) => String(each.why)) },
  ],
  (each) => `${each.at_s} ${each.what} ${each.tier} ${each.uri}`,
);

function showForecast(state) {
  byId("forecast-none").hidden = state.forecast.length > 0;
  forecast.show(state.forecast);
}

function showDecisions(state) {
  byId("decisions-none").hidden = state.decisions.length > 0;
  decisions.show(few("decisions", state.decisions));
}

function showLedger(state) {
  const ledger = state.ledger;
  pairs(byId("ledger-list"), [
    ["spent at origins", usd(ledger.usd)],
    ["received", size(ledger.received_bytes)],
    ["requests", plural(ledger.n_gets, "GET")],
    ["saved by this node", size(ledger.saved_bytes)],
    ["fetched ahead in vain", size(ledger.wasted_prefetch_bytes)],
  ]);
}

// -- asking

const PARTS = {
  tiers: showTiers,
  transfers: showTransfers,
  models: showModels,
  loads: showLoads,
  forecast: showForecast,
  decisions: showDecisions,
  ledger: showLedger,
};

let last = null;
let lastHeard = 0; // by the browser's clock
let isPaused = false;
let timer = 0;

function show(state) {
  nowS = state.now_s;
  showNode(state);
  for (const [id, showPart] of Object.entries(PARTS)) {
    let isBroken = false;
    try {
      showPart(state);
    } catch (error) {
      isBroken = true;
      console.error(error);
    }
    byId(id).classList.toggle("broken", isBroken);
  }
}

function showSilence(error) {
  const why = error.name === "TimeoutError" ? `no answer in ${PATIENCE_MS / 1000} s` : error.message;
  const since = last ? ` What is shown is of ${clock(lastHeard / 1000)}.` : "";
  say(byId("notice"), `The daemon does not answer (${why}).${since} Asking again every ${RETRY_MS / 1000} s.`);
  say(byId("state"), "no answer");
  byId("state").className = "chip bad";
  document.body.classList.add("stale");
}

async function ask() {
  clearTimeout(timer);
  let pauseMs = POLL_MS;
  try {
    const answer = await fetch("api/state", { cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) });
    if (!answer.ok) throw new Error(`it answered ${answer.status}`);
    last = await answer.json();
    lastHeard = Date.now();
    say(byId("notice"), "");
    document.body.classList.remove("stale");
    show(last);
  } catch (error) {
    showSilence(error);
    pauseMs = RETRY_MS;
  }
  clearTimeout(timer);
  if (!isPaused && !document.hidden) timer = setTimeout(ask, pauseMs);
}

byId("pause").addEventListener("click", () => {
  isPaused = !isPaused;
  byId("pause").setAttribute("aria-pressed", String(isPaused));
  if (last) showNode(last);
  if (isPaused) clearTimeout(timer);
  else ask();
});

for (const what of Object.keys(shownMore)) {
  byId(`${what}-more`).addEventListener("click", () => {
    shownMore[what] = !shownMore[what];
    if (last) show(last);
  });
}

document.addEventListener("visibilitychange", () => {
  if (!document.hidden && !isPaused) ask();
});

for (const name of STAGES) byId("stage-key").append(make("li", `key-${name}`, name));

ask();
