// The page of a run: draws what tools/run_page_data.py has collected. Text only ever enters by textContent.
"use strict";

const dark = matchMedia("(prefers-color-scheme: dark)");
const COLOURS = {
  light: ["#0072b2", "#d55e00", "#00805d", "#b0568a", "#9a6a00", "#4b5bd0", "#6b6b6b"],
  dark: ["#4fa8e8", "#ff8f4d", "#35c79a", "#e79bc4", "#edb93f", "#9aa6ff", "#a9b1ba"],
};
const DASHES = [undefined, [6, 4], [2, 3]]; // of a run's curves in one chart, where the colour says which run
const POLL_MS = 5000;
const CHARTS = [
  { title: "Loss (nats per token)", keys: ["loss", "val_loss"], main: true },
  { title: "Validation (bits per byte)", keys: ["val_bits_per_byte"] },
  { title: "Learning rate", keys: ["lr"] },
  { title: "Gradient norm", keys: ["grad_norm"] },
  { title: "Tokens per second", keys: ["tokens_per_s"] },
  { title: "Model FLOPs utilization", keys: ["mfu"], percent: true },
  { title: "Peak memory (GB per device)", keys: ["memory_peak_bytes"], factor: 1e-9 },
  { title: "Seconds per step", keys: ["step_s", "data_wait_s"] },
  { title: "Ranks (seconds of computing per step)", keys: ["rank_compute_s_max", "rank_compute_s_median", "rank_compute_s_min"] },
];
const NAMES = { loss: "training", val_loss: "validation", val_bits_per_byte: "validation", lr: "learning rate",
  grad_norm: "norm before clipping", tokens_per_s: "tokens/s", memory_peak_bytes: "peak", step_s: "step", data_wait_s: "waiting for data",
  rank_compute_s_max: "slowest", rank_compute_s_median: "median", rank_compute_s_min: "fastest" };

let runs = JSON.parse(document.getElementById("content").textContent).runs;
let charts = [];
const view = { x: "tokens", smooth: true, log: false, prompt: 0 };

const byId = (id) => document.getElementById(id);
function colour(i) {
  const colours = dark.matches ? COLOURS.dark : COLOURS.light;
  return colours[i % colours.length];
}

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") made.className = value;
    else if (name === "colour") made.style.setProperty("--colour", value);
    else made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

const UNITS = [[1e12, " T"], [1e9, " G"], [1e6, " M"], [1e3, " k"]];

function count(value) {
  if (value === null || value === undefined) return "–";
  for (const [size, unit] of UNITS) if (Math.abs(value) >= size) return +(value / size).toPrecision(3) + unit;
  return String(+value.toPrecision(4));
}

// The labels of an axis: with as many digits as its values need, however far one has zoomed in.
function ticks(values, isPercent) {
  const known = values.filter((v) => v !== null), most = Math.max(...known.map(Math.abs));
  const [size, unit] = isPercent ? [0.01, "%"] : UNITS.find(([each]) => most >= each) || [1, ""];
  const rounded = (v, digits) => +(v / size).toPrecision(digits);
  const tolerance = (Math.max(...known) - Math.min(...known)) / 1000 || most / 1000;
  let digits = 1;
  while (digits < 12 && known.some((v) => Math.abs(rounded(v, digits) * size - v) > tolerance)) digits++;
  return values.map((v) => (v === null ? "" : v === 0 && !isPercent ? "0" : rounded(v, digits) + unit));
}

function duration(seconds) {
  const [d, h, m] = [Math.floor(seconds / 86400), Math.floor(seconds / 3600) % 24, Math.floor(seconds / 60) % 60];
  return d ? `${d} d ${h} h` : h ? `${h} h ${m} min` : m ? `${m} min` : `${Math.round(seconds)} s`;
}

// A long name may break behind each of its words.
const breakable = (name) => element("span", {}, ...name.split(/(?<=[._])/).flatMap((word) => [word, element("wbr")]));

const last = (records, key) => {
  for (let i = records.length - 1; i >= 0; i--) if (typeof records[i][key] === "number") return records[i][key];
  return null;
};

function slowestRank(records) {
  const [rank, most, median] = ["slowest_rank", "rank_compute_s_max", "rank_compute_s_median"].map((key) => last(records, key));
  return rank === null || !median ? "–" : `${rank} (+${(100 * (most / median - 1)).toFixed(0)}%)`;
}

// Runs -----------------------------------------------------------------------------------------------------------------

function drawRuns() {
  const cards = runs.map((run, i) => {
    const fact = (key, format) => {
      const value = last(run.records, key);
      return value === null ? "–" : format(value);
    };
    const facts = [
      ["step", fact("step", count)],
      ["tokens", fact("tokens", count)],
      ["loss", fact("loss", (v) => v.toFixed(3))],
      ["validation", fact("val_loss", (v) => v.toFixed(3))],
      ["bits per byte", fact("val_bits_per_byte", (v) => v.toFixed(3))],
      ["tokens/s", fact("tokens_per_s", count)],
      ["MFU", fact("mfu", (v) => (100 * v).toFixed(1) + "%")],
      ["peak memory", fact("memory_peak_bytes", (v) => (v / 1e9).toFixed(1) + " GB")],
      ["slowest rank", slowestRank(run.records)],
      ["time left", fact("eta_s", duration)],
      ["checkpoint", run.checkpoint || "–"],
    ].filter(([, value]) => value !== "–");
    const list = element("dl");
    for (const [name, value] of facts) list.append(element("div", {}, element("dt", {}, name), element("dd", {}, value)));
    return element("div", { class: "card run", colour: colour(i) }, element("h2", {}, run.name), list);
  });
  byId("runs").replaceChildren(element("div", { class: "cards" }, ...cards));
}

// Curves ---------------------------------------------------------------------------------------------------------------

function smoothed(values) {
  const half = Math.max(1, Math.floor(values.length / 100));
  return values.map((_, i) => {
    const near = values.slice(Math.max(0, i - half), i + half + 1).sort((a, b) => a - b);
    return near[Math.floor(near.length / 2)];
  });
}

// Aligned columns for uPlot: one x, and one column per run and key.
function columns(chart) {
  const tables = [], series = [];
  runs.forEach((run, i) => {
    for (const key of chart.keys) {
      const points = run.records.filter((r) => typeof r[key] === "number" && typeof r[view.x] === "number");
      if (!points.length) continue;
      const x = points.map((r) => r[view.x]), y = points.map((r) => r[key] * (chart.factor || 1));
      const sparse = key.startsWith("val_") || key.startsWith("task_");
      const what = chart.keys.length > 1 || runs.length === 1 ? NAMES[key] || chart.labels?.[key] || key : null;
      const label = [runs.length > 1 ? run.name : null, what].filter(Boolean).join(" ");
      const fade = view.smooth && key === "loss" && y.length > 20;
      const shade = chart.keys.length > 1 && runs.length === 1 ? colour(chart.keys.indexOf(key)) : colour(i);
      const style = { label, stroke: shade, width: 1.5, spanGaps: true, points: { show: sparse || points.length < 3, size: 6, fill: shade } };
      if (runs.length > 1) style.dash = DASHES[chart.keys.indexOf(key)];
      if (fade) {
        tables.push([x, smoothed(y)], [x, y]);
        series.push(style, { ...style, label: label + " (each)", stroke: shade + "60", width: 1, points: { show: false } });
      } else {
        tables.push([x, y]);
        series.push(style);
      }
    }
  });
  return tables.length ? { data: uPlot.join(tables), series } : null;
}

function eventMarks(plot) {
  const { ctx, bbox } = plot;
  ctx.save();
  ctx.strokeStyle = getComputedStyle(document.body).getPropertyValue("--mark");
  ctx.setLineDash([3 * devicePixelRatio, 3 * devicePixelRatio]);
  ctx.lineWidth = devicePixelRatio;
  for (const run of runs) {
    for (const event of run.events) {
      const at = event.step === undefined || event.step === null ? null : placeOf(run, event.step);
      if (at === null || at < plot.scales.x.min || at > plot.scales.x.max) continue;
      const left = Math.round(plot.valToPos(at, "x", true));
      ctx.beginPath();
      ctx.moveTo(left, bbox.top);
      ctx.lineTo(left, bbox.top + bbox.height);
      ctx.stroke();
    }
  }
  ctx.restore();
}

function placeOf(run, step) {
  if (view.x === "step") return step;
  const record = run.records.find((r) => r.step >= step && typeof r[view.x] === "number");
  return record ? record[view.x] : null;
}

function drawChart(chart, into) {
  const found = columns(chart);
  if (!found) return;
  const card = element("div", { class: chart.main ? "card wide" : "card" }, element("h2", {}, breakable(chart.title)));
  const holder = element("div", { class: "plot", tabindex: "0", role: "group", "aria-label": `${chart.title}: arrow keys point at values`,
    title: "Drag to zoom; double-click or Escape to see all" });
  card.append(holder);
  into.append(card);
  const style = getComputedStyle(document.body);
  const axis = { stroke: style.getPropertyValue("--quiet"), grid: { stroke: style.getPropertyValue("--grid"), width: 1 },
    ticks: { stroke: style.getPropertyValue("--line"), width: 1 }, font: "11px system-ui, sans-serif" };
  const format = (v) => (v === null || v === undefined ? "–" : chart.percent ? (100 * v).toFixed(1) + "%" :
    v === 0 || Math.abs(v) >= 1000 ? count(v) : v.toPrecision(4));
  // Where nobody points, the newest value.
  const legend = (plot, v, i) => format(v ?? plot.data[i].findLast((each) => each !== null && each !== undefined));
  const space = (plot, i, min, max) => (max - min < max / 20 ? 76 : 50); // zoomed in, the labels are longer
  const room = (plot, labels) => Math.max(56, 16 + 7 * Math.max(...(labels || []).map((label) => label.length)));
  const size = () => ({ width: Math.max(200, holder.clientWidth), height: chart.main ? 300 : 190 });
  const plot = new uPlot({
    ...size(),
    cursor: { sync: { key: "runs", setSeries: false }, focus: { prox: 24 } },
    scales: { x: { time: false }, y: { distr: chart.main && view.log ? 3 : 1 } },
    axes: [{ ...axis, values: (_, values) => ticks(values), size: 34, space },
      { ...axis, values: (_, values) => ticks(values, chart.percent), size: room }],
    legend: { markers: { dash: (plot, i) => (plot.series[i].dash ? "dashed" : "solid") } },
    series: [{ label: view.x, value: (plot, v) => count(v ?? plot.data[0][plot.data[0].length - 1]) },
      ...found.series.map((each) => ({ ...each, value: legend }))],
    hooks: { draw: [eventMarks] },
  }, found.data, holder);
  new ResizeObserver(() => plot.setSize(size())).observe(holder);
  holder.addEventListener("keydown", (e) => pointByKey(plot, e));
  charts.push({ plot, title: chart.title });
}

function pointByKey(plot, event) {
  const x = plot.data[0], end = x.length - 1, at = plot.cursor.idx ?? end;
  if (event.key === "Escape") return plot.setScale("x", { min: x[0], max: x[end] });
  const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: end }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  plot.setCursor({ left: plot.valToPos(x[Math.min(Math.max(to, 0), end)], "x"), top: plot.over.clientHeight / 2 });
}

function drawCharts() {
  for (const { plot } of charts) plot.destroy();
  charts = [];
  const grid = element("div", { class: "cards" }), taskGrid = element("div", { class: "cards" });
  byId("charts").replaceChildren(grid);
  const wanted = chartsToDraw();
  byId("tasks").replaceChildren(...(wanted.some((chart) => chart.task) ? [element("h2", {}, "Tasks"), taskGrid] : []));
  for (const chart of wanted) drawChart(chart, chart.task ? taskGrid : grid);
}

function chartsToDraw() {
  const names = new Set(runs.flatMap((run) => run.records.flatMap((r) => Object.keys(r))));
  const tasks = [...names].filter((key) => /^task_.*_(acc|acc_norm|perplexity)$/.test(key)).sort();
  return [...CHARTS, ...tasks.map((key) => {
    const name = key.slice("task_".length);
    return { title: name, keys: [key], labels: { [key]: name }, percent: !key.endsWith("perplexity"), task: true };
  })];
}

// Tables ---------------------------------------------------------------------------------------------------------------

// `kind` is "list", whose rows a narrow window shows as paragraphs, or "compared", whose columns are equally wide.
function table(kind, head, rows) {
  const cell = (tag, value, name) => {
    const isNumber = typeof value === "number";
    const made = element(tag, { ...(isNumber ? { class: "number" } : {}), ...(name ? { "data-name": name } : {}) });
    made.append(value instanceof Node ? value : isNumber ? value.toLocaleString("en") : value ?? "");
    return made;
  };
  const made = element("table", { class: kind }, element("thead", {}, element("tr", {}, ...head.map((name) => cell("th", name)))));
  const body = element("tbody");
  for (const row of rows) {
    body.append(element("tr", row.kind ? { class: row.kind } : {}, ...row.cells.map((value, i) => cell("td", value, i && head[i]))));
  }
  made.append(body);
  if (kind === "compared") made.style.minWidth = `${7 * head.length}em`;
  return element("div", { class: "scroll" }, made);
}

function markTexts(made) {
  for (const cell of made.querySelectorAll("td:last-child")) cell.className = "text";
  return made;
}

const chip = (i) => element("span", { class: "chip", colour: colour(i), title: runs[i].name });

function drawSamples() {
  const prompts = [...new Set(runs.flatMap((run) => run.samples.map((s) => s.prompt)))];
  if (!prompts.length) return byId("samples").replaceChildren();
  view.prompt = Math.min(view.prompt, prompts.length - 1);
  const choice = element("select", { "aria-label": "Prompt" });
  prompts.forEach((prompt, i) => choice.append(element("option", i === view.prompt ? { value: i, selected: "" } : { value: i }, prompt)));
  choice.addEventListener("change", () => { view.prompt = Number(choice.value); drawSamples(); });
  const rows = [];
  runs.forEach((run, i) => {
    for (const s of [...run.samples].reverse()) {
      if (s.prompt !== prompts[view.prompt]) continue;
      const text = element("span", {}, element("span", { class: "prompt" }, s.prompt), s.text);
      rows.push({ cells: [element("span", {}, chip(i), `step ${s.step}`), s.temperature ? `at ${s.temperature}` : "greedy", text] });
    }
  });
  const made = markTexts(table("list", ["", "", "what the model writes"], rows));
  byId("samples").replaceChildren(element("div", { class: "card" },
    element("div", { class: "bar" }, element("h2", {}, "Samples"), choice), made));
}

function drawEvents() {
  const rows = [];
  runs.forEach((run, i) => {
    for (const e of run.events) rows.push({ cells: [element("span", {}, chip(i), (e.time || "").replace("T", " ").replace("+00:00", " UTC")),
      element("span", { class: "event" }, e.event), e.step === undefined || e.step === null ? "" : `step ${e.step}`, e.message] });
  });
  byId("events").replaceChildren(...(rows.length ? [element("div", { class: "card" }, element("h2", {}, "Events"),
    markTexts(table("list", ["time", "", "", ""], rows)))] : []));
}

function drawSettings() {
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.settings)))].sort();
  if (!names.length) return byId("settings").replaceChildren();
  const row = (name) => runs.map((run) => run.settings[name] ?? "–");
  const differing = names.filter((name) => new Set(row(name)).size > 1);
  const made = table("compared", ["setting", ...runs.map((run) => run.name)],
    [...differing, ...names.filter((name) => !differing.includes(name))].map((name) => (
      { cells: [breakable(name), ...row(name)], kind: differing.includes(name) ? "differs" : null })));
  const about = runs.length > 1 ? `${differing.length} of ${names.length} settings differ` : `${names.length} settings`;
  const folded = element("details", differing.length ? { open: "" } : {}, element("summary", {}, about), made);
  byId("settings").replaceChildren(element("div", { class: "card" }, element("h2", {}, "Settings"), folded));
}

function drawData() {
  const rows = [];
  runs.forEach((run, i) => {
    for (const d of run.data) rows.push({ cells: [element("span", {}, chip(i), d.path || "–"), d.split, d.documents, d.tokens,
      d.text_bytes, d.sources, d.tokenizer, d.manifest] });
  });
  byId("data").replaceChildren(...(rows.length ? [element("div", { class: "card" }, element("h2", {}, "Data"),
    table("list", ["dataset", "split", "documents", "tokens", "bytes of text", "source files", "tokenizer", "manifest"], rows))] : []));
}

// The page -------------------------------------------------------------------------------------------------------------

function drawControls() {
  const known = ["tokens", "step", "hours"].filter((x) => runs.every((run) => run.records.some((r) => typeof r[x] === "number")));
  if (!known.includes(view.x)) view.x = "step";
  const choice = document.querySelector("[data-choice=x]");
  choice.replaceChildren(...known.map((x) => {
    const button = element("button", { type: "button", "aria-pressed": String(x === view.x) }, x === "step" ? "steps" : x);
    if (x === "hours") button.title = "Hours of training steps, without validation, saving and restarts";
    button.addEventListener("click", () => {
      view.x = x;
      drawControls();
      drawCharts();
      choice.querySelector("[aria-pressed=true]").focus();
    });
    return button;
  }));
}

function drawAll() {
  const title = document.querySelector("h1");
  title.textContent = title.title = runs.map((run) => run.name).join(", "); // the whole of it where it is cut
  drawControls();
  drawRuns();
  drawCharts();
  drawSamples();
  drawEvents();
  drawSettings();
  drawData();
}

// New records, without losing what was zoomed into, pointed at, hidden or opened: only what changed is drawn again.
function refresh(fresh) {
  const differs = (part) => JSON.stringify(fresh.map((run) => run[part])) !== JSON.stringify(runs.map((run) => run[part]));
  const changed = ["records", "events", "samples", "settings", "data", "checkpoint"].filter(differs);
  runs = fresh;
  if (changed.includes("records") || changed.includes("checkpoint")) drawRuns();
  if (changed.includes("records") || changed.includes("events")) refreshCharts();
  if (changed.includes("samples")) drawSamples();
  if (changed.includes("events")) drawEvents();
  if (changed.includes("settings")) drawSettings();
  if (changed.includes("data")) drawData();
}

function refreshCharts() {
  const labels = (series) => JSON.stringify(series.map((each) => each.label));
  const drawable = chartsToDraw().map((chart) => ({ chart, found: columns(chart) })).filter(({ found }) => found);
  const sameCharts = drawable.length === charts.length && drawable.every(({ chart, found }, i) =>
    chart.title === charts[i].title && labels(found.series) === labels(charts[i].plot.series.slice(1)));
  if (!sameCharts) {
    drawControls();
    return drawCharts();
  }
  charts.forEach(({ plot }, i) => {
    const { min, max } = plot.scales.x, zoomed = isZoomed(plot);
    plot.batch(() => {
      plot.setData(drawable[i].found.data, !zoomed);
      if (zoomed) plot.setScale("x", { min, max });
    });
  });
}

function isZoomed(plot) {
  const x = plot.data[0];
  return plot.scales.x.min > x[0] || plot.scales.x.max < x[x.length - 1];
}

byId("log").addEventListener("change", (e) => { view.log = e.target.checked; drawCharts(); });
byId("smooth").addEventListener("change", (e) => { view.smooth = e.target.checked; drawCharts(); });
dark.addEventListener("change", drawAll);
drawAll();
if (document.body.dataset.live === "yes") {
  setInterval(async () => {
    try {
      const answer = await fetch("data.json");
      if (answer.ok) refresh((await answer.json()).runs);
    } catch { /* the server was stopped; what is here stays */ }
  }, POLL_MS);
}
