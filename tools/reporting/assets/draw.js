// One chart as SVG. drawChart(figure, chart, view) draws; the scales that it returns tell page.js where the pointer is.

const SVG = "http://www.w3.org/2000/svg";
const LETTER = 6.3; // px of an average letter at the axis' 11 px
const BOLD_LETTER = 7;
const MOST_LABELS = 6;
const COLOURS = 6; // of runs; of more, the lines are dashed

function colourOf(run) {
  if (run < 0) return "run-all";
  return `run-${run % COLOURS}${run >= COLOURS ? " again" : ""}`;
}

function node(name, attributes, parent, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  if (parent) parent.append(made);
  return made;
}

// A step of a run on the chosen axis: the step itself, the epoch, or the time of training in TIME's unit.
function positionOf(run, step, view) {
  if (view.x === "epoch") return step / (run.stepsPerEpoch || 1);
  if (view.x === "time") return interpolated(run.clock.step, run.clock.seconds, step) / TIME.seconds;
  return step;
}

// What is drawn of a chart now: without hidden runs, by the chosen axis, smoothed.
function visible(chart, view) {
  const shown = chart.series.filter((series) => !view.hidden.has(series.run));
  return shown.map((series) => {
    const isOverSteps = chart.x === "step" && view.x !== "step";
    const xs = isOverSteps ? series.x.map((x) => positionOf(DATA.runs[series.run], x, view)) : series.x;
    const weight = chart.noisy && !series.heldOut ? view.smooth : 0;
    return { ...series, x: xs, drawn: smoothed(series.y, weight), isSmoothed: weight > 0 };
  });
}

function drawChart(figure, chart, view) {
  const plot = figure.querySelector(".plot");
  const series = visible(chart, view);
  const width = Math.max(plot.clientWidth, 200);
  const height = width > 700 ? 300 : 210;
  plot.replaceChildren();
  const svg = node("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", tabindex: 0 }, plot);
  node("title", {}, svg, `${chart.title}: ${series.length} lines; arrow keys read values`);
  const ys = series.flatMap((one) => one.y).filter((y) => y !== null);
  if (!ys.length) {
    node("text", { x: width / 2, y: height / 2, class: "tick", "text-anchor": "middle" }, svg, "hidden");
    return null;
  }
  const yScale = valueScale(chart, ys, view.scale === "log" && chart.log && extent(ys)[0] > 0);
  const labels = endLabels(chart, series, width);
  const left = Math.max(...yScale.ticks.map((tick) => show(tick, chart.unit).length)) * LETTER + 8;
  const box = { left, right: width - labels.width - 10, top: chart.limit ? 22 : 8, bottom: height - 36 };
  const xScale = positionScale(chart, series, box, view);
  yScale.place = (y) => box.bottom - (box.bottom - box.top) * yScale.share(y);
  drawAxes(svg, chart, box, xScale, yScale);
  const isMixed = series.some((one) => one.heldOut) && series.some((one) => !one.heldOut);
  series.forEach((one, place) => {
    if (chart.bars) drawBars(svg, one, place, series.length, box, xScale, yScale);
    else drawLine(svg, one, isMixed, xScale, yScale);
  });
  drawEndLabels(svg, labels.entries, box, xScale, yScale);
  node("line", { class: "cursor", y1: box.top, y2: box.bottom, visibility: "hidden" }, svg);
  for (const one of series) node("circle", { class: `point ${colourOf(one.run)}`, r: 3.5, visibility: "hidden" }, svg);
  return { svg, box, series, xScale, yScale };
}

// ------------------------------------------------------------------------------------------------ scales

// The smallest and the largest; a spread into Math.min would fail on a hundred thousand values.
function extent(values) {
  return values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
}

function valueScale(chart, ys, isLog) {
  let [low, high] = extent(ys);
  if (isLog) {
    if (low === high) [low, high] = [low / 2, high * 2];
    const span = Math.log(high / low);
    const from = low * Math.exp(-0.04 * span);
    const to = high * Math.exp(0.04 * span);
    const share = (y) => Math.log(y / from) / Math.log(to / from);
    return { ticks: logTicks(from, to), share };
  }
  if (chart.fromZero) low = Math.min(low, 0);
  if (low === 0 && high === 0) high = 1;
  if (low === high) [low, high] = [low - (Math.abs(low) || 1) / 10, high + (Math.abs(high) || 1) / 10];
  const margin = 0.05 * (high - low);
  const from = chart.fromZero && low === 0 ? 0 : low - margin;
  const to = high + margin;
  return { ticks: linearTicks(from, to, 4), share: (y) => (y - from) / (to - from) };
}

function positionScale(chart, series, box, view) {
  const xs = [...new Set(series.flatMap((one) => one.x))].sort((a, b) => a - b);
  const room = box.right - box.left;
  if (chart.bars) return bandScale(chart, xs, box);
  const isLog = chart.x === "dimension";
  const position = isLog ? Math.log2 : (x) => x;
  let low = position(isLog ? xs[0] : 0);
  let high = isLog ? position(xs[xs.length - 1]) : lastPosition(view);
  if (low === high) [low, high] = [low - 1, high + 1];
  const place = (x) => box.left + (room * (position(x) - low)) / (high - low);
  const count = Math.max(2, Math.floor(room / 80));
  const ticks = isLog ? apart(xs, place, 34) : linearTicks(low, high, count);
  const name = isLog ? "dimensions" : axisName(view);
  return { xs, ticks, place, name };
}

// Where the runs that are shown end: all charts over steps have the same axis, so that the eye can go from one to another.
function lastPosition(view) {
  const shown = DATA.runs.filter((_, index) => !view.hidden.has(index));
  return Math.max(...shown.map((run) => positionOf(run, run.lastStep, view)));
}

function axisName(view) {
  return view.x === "time" ? `${TIME.name} of training` : view.x;
}

// Each bin of lengths has the same width; `limit`, where texts are cut, falls between two.
function bandScale(chart, xs, box) {
  const band = (box.right - box.left) / xs.length;
  const place = (x) => {
    const index = xs.findIndex((edge) => edge > x);
    const bin = (index === -1 ? xs.length : index) - 1;
    const next = xs[bin + 1] ?? nextEdge(xs[bin]);
    return box.left + band * (bin + (x - xs[bin]) / (next - xs[bin]));
  };
  return { xs, band, place, ticks: apart(xs, place, 34), name: "tokens" };
}

// Where a bin ends: there are two an octave, 2, 3, 4, 6, 8, 12, ...
function nextEdge(edge) {
  return Number.isInteger(Math.log2(edge)) && edge > 1 ? edge * 1.5 : Math.ceil((edge * 4) / 3);
}

// Those of `values` that stand at least `gap` px apart.
function apart(values, place, gap) {
  let last = -Infinity;
  return values.filter((value) => {
    if (place(value) - last < gap) return false;
    last = place(value);
    return true;
  });
}

// ------------------------------------------------------------------------------------------- what is drawn

function drawAxes(svg, chart, box, xScale, yScale) {
  for (const tick of yScale.ticks) {
    const y = yScale.place(tick);
    node("line", { class: "grid-line", x1: box.left, x2: box.right, y1: y, y2: y }, svg);
    node("text", { class: "tick", x: box.left - 6, y: y + 3.5, "text-anchor": "end" }, svg, show(tick, chart.unit));
  }
  node("line", { class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }, svg);
  for (const tick of xScale.ticks) {
    const x = xScale.place(tick);
    node("line", { class: "axis", x1: x, x2: x, y1: box.bottom, y2: box.bottom + 4 }, svg);
    const text = chart.x === "dimension" ? String(tick) : show(tick);
    node("text", { class: "tick", x, y: box.bottom + 16, "text-anchor": "middle" }, svg, text);
  }
  const middle = (box.left + box.right) / 2;
  node("text", { class: "tick name", x: middle, y: box.bottom + 31, "text-anchor": "middle" }, svg, xScale.name);
  if (chart.limit && chart.limit > xScale.xs[0] && chart.limit <= nextEdge(xScale.xs[xScale.xs.length - 1])) {
    const x = Math.min(xScale.place(chart.limit), box.right);
    node("line", { class: "limit", x1: x, x2: x, y1: box.top - 4, y2: box.bottom }, svg);
    node("text", { class: "tick", x, y: box.top - 8, "text-anchor": "middle" }, svg, `cut at ${chart.limit}`);
  }
}

// Dotted where it goes through held-out tuples and another goes through trained ones.
function drawLine(svg, one, isMixed, xScale, yScale) {
  const kind = `${one.heldOut && isMixed ? " dotted" : ""}${one.x.length > 400 ? " dense" : ""}`;
  const group = node("g", { class: `series ${colourOf(one.run)}${kind}` }, svg);
  if (one.isSmoothed) node("path", { class: "raw", d: pathOf(one.x, one.y, xScale, yScale) }, group);
  node("path", { class: "line", d: pathOf(one.x, one.drawn, xScale, yScale) }, group);
  const withDots = one.heldOut || one.x.length === 1;
  if (!withDots || one.x.length > 60) return;
  one.x.forEach((x, index) => {
    if (one.y[index] !== null) node("circle", { cx: xScale.place(x), cy: yScale.place(one.y[index]), r: 2.6 }, group);
  });
}

// A gap where a value is missing.
function pathOf(xs, ys, xScale, yScale) {
  let path = "";
  let pen = "M";
  xs.forEach((x, index) => {
    if (ys[index] === null) {
      pen = "M";
      return;
    }
    path += `${pen}${xScale.place(x).toFixed(1)},${yScale.place(ys[index]).toFixed(1)}`;
    pen = "L";
  });
  return path;
}

// Of several runs side by side.
function drawBars(svg, one, place, count, box, xScale, yScale) {
  const group = node("g", { class: `series bars ${colourOf(one.run)}` }, svg);
  const width = (xScale.band - 3) / count;
  one.x.forEach((x, index) => {
    const top = yScale.place(one.y[index]);
    const left = xScale.place(x) + 1.5 + place * width;
    node("rect", { x: left, y: top, width: Math.max(width - 1, 0.5), height: Math.max(box.bottom - top, 0) }, group);
  });
}

// Names at the ends of the lines, where there are several lines and room; of many they would stand far from their lines.
function endLabels(chart, series, width) {
  if (chart.bars || series.length < 2 || series.length > MOST_LABELS || width < 300) return { width: 0, entries: [] };
  const several = DATA.runs.length > 1;
  const entries = series.map((one) => {
    const last = one.drawn.findLastIndex((y) => y !== null);
    const text = one.label || (several ? DATA.runs[one.run].name : "training");
    return { run: one.run, x: one.x[last], value: one.drawn[last], text: text.length > 18 ? `${text.slice(0, 17)}…` : text };
  });
  const longest = Math.max(...entries.map((entry) => entry.text.length));
  return { width: longest * BOLD_LETTER + 8, entries };
}

// Each as near to its line's end as the others leave room for.
function drawEndLabels(svg, entries, box, xScale, yScale) {
  const gap = 13;
  const placed = entries.filter((entry) => entry.value !== undefined && entry.value !== null);
  for (const entry of placed) entry.y = Math.min(Math.max(yScale.place(entry.value), box.top + 4), box.bottom - 2);
  placed.sort((a, b) => a.y - b.y);
  for (let index = 1; index < placed.length; index++) placed[index].y = Math.max(placed[index].y, placed[index - 1].y + gap);
  let floor = box.bottom;
  for (const entry of placed.slice().reverse()) {
    entry.y = Math.min(entry.y, floor);
    floor = entry.y - gap;
    const end = { x: xScale.place(entry.x), y: yScale.place(entry.value) };
    if (box.right - end.x > 14) {
      const path = `M${end.x + 4},${end.y}H${box.right - 8}L${box.right + 4},${entry.y}`;
      node("path", { class: `leader ${colourOf(entry.run)}`, d: path }, svg);
    }
    const attributes = { class: `end-label ${colourOf(entry.run)}`, x: box.right + 8, y: entry.y + 3.5 };
    node("text", attributes, svg, entry.text);
  }
}
