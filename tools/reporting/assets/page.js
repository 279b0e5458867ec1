// The page's behaviour: charts are drawn when they come into sight, a pointer reads all of them at one step, and the
// controls at the top redraw them.

const DATA = JSON.parse(document.getElementById("data").textContent);
const TIME = unitOfTime(Math.max(...DATA.runs.map((run) => run.clock.seconds.at(-1) ?? 0)));
const view = { x: "step", scale: "linear", smooth: 0, hidden: new Set() };
const figures = [...document.querySelectorAll("figure.chart")];
const chartOf = (figure) => DATA.charts[Number(figure.dataset.chart)];
const drawn = new Map(); // figure -> what drawChart returned
const inSight = new Set();

function draw(figure) {
  drawn.set(figure, drawChart(figure, chartOf(figure), view));
  figure.dataset.drawn = "true";
  listen(figure);
  read(figure, null);
}

function drawAll() {
  for (const figure of figures) if (figure.dataset.drawn) draw(figure);
}

// ------------------------------------------------------------------------------------------------ reading

// The values of a chart nearest to `x`, beside their marks; the last ones where `x` is null.
function read(figure, x) {
  const found = drawn.get(figure);
  const values = figure.querySelector(".values");
  values.replaceChildren();
  if (!found) return;
  const chart = chartOf(figure);
  const at = x === null ? null : found.xScale.xs[nearest(found.xScale.xs, x)];
  const line = figure.querySelector(".cursor");
  const circles = figure.querySelectorAll(".point");
  line.setAttribute("visibility", at === null || chart.bars ? "hidden" : "visible");
  if (at !== null) {
    line.setAttribute("x1", found.xScale.place(at));
    line.setAttribute("x2", found.xScale.place(at));
  }
  found.series.forEach((series, place) => {
    const index = at === null ? series.y.findLastIndex((y) => y !== null) : nearest(series.x, at);
    const value = at === null || covers(series.x, at) ? series.y[index] : null;
    if (!chart.bars || at !== null) values.append(valueMark(series, chart, value));
    const isShown = at !== null && !chart.bars && value !== null && value !== undefined;
    circles[place].setAttribute("visibility", isShown ? "visible" : "hidden");
    if (isShown) {
      circles[place].setAttribute("cx", found.xScale.place(series.x[index]));
      circles[place].setAttribute("cy", found.yScale.place(value));
    }
  });
  const where = document.createElement("span");
  where.className = "at";
  if (at !== null) where.textContent = positionWords(chart, at);
  values.append(where);
}

// Whether `at` lies between the first and the last of `xs`, or no further outside than two of them are apart.
function covers(xs, at) {
  const last = xs[xs.length - 1];
  const gap = (last - xs[0]) / Math.max(xs.length - 1, 1);
  return at >= xs[0] - gap && at <= last + gap;
}

function valueMark(series, chart, value) {
  const mark = document.createElement("span");
  mark.className = "value";
  const dot = document.createElement("i");
  dot.className = `dot ${colourOf(series.run)}${series.heldOut ? " held-out" : ""}`;
  const number = document.createElement("b");
  number.textContent = show(value, chart.unit);
  mark.append(dot, number);
  const name = series.run < 0 ? "" : DATA.runs[series.run].name;
  mark.title = [name, series.label].filter(Boolean).join(", ");
  return mark;
}

function positionWords(chart, at) {
  if (chart.x === "dimension") return `${at} dimensions`;
  if (chart.x === "length") return `from ${at} tokens`;
  if (view.x === "time") return `${show(at)} ${TIME.name}`;
  return `${view.x} ${view.x === "epoch" ? at.toFixed(2) : at.toLocaleString("en-US")}`;
}

// The same step in all charts in sight.
function readAll(chart, figure, x) {
  if (chart.x !== "step") {
    read(figure, x);
    return;
  }
  for (const other of inSight) if (chartOf(other).x === "step") read(other, x);
}

function listen(figure) {
  const found = drawn.get(figure);
  if (!found) return;
  const chart = chartOf(figure);
  found.svg.addEventListener("pointermove", (event) => {
    const bounds = found.svg.getBoundingClientRect();
    const x = ((event.clientX - bounds.left) * found.svg.viewBox.baseVal.width) / bounds.width;
    const places = found.xScale.xs.map((value) => found.xScale.place(value) + (chart.bars ? found.xScale.band / 2 : 0));
    readAll(chart, figure, found.xScale.xs[nearest(places, x)]);
  });
  found.svg.addEventListener("pointerleave", () => readAll(chart, figure, null));
  found.svg.addEventListener("blur", () => readAll(chart, figure, null));
  let index = found.xScale.xs.length;
  found.svg.addEventListener("keydown", (event) => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    event.preventDefault();
    index = Math.min(Math.max(index + (event.key === "ArrowLeft" ? -1 : 1), 0), found.xScale.xs.length - 1);
    readAll(chart, figure, found.xScale.xs[index]);
  });
}

// ----------------------------------------------------------------------------------------------- controls

for (const button of document.querySelectorAll("button[data-key]")) {
  button.addEventListener("click", () => {
    const { key, value } = button.dataset;
    view[key] = key === "smooth" ? Number(value) : value;
    for (const other of button.parentElement.children) other.setAttribute("aria-pressed", String(other === button));
    drawAll();
  });
}

for (const button of document.querySelectorAll("button[data-run]")) {
  button.addEventListener("click", () => {
    const run = Number(button.dataset.run);
    if (!view.hidden.delete(run)) view.hidden.add(run);
    button.setAttribute("aria-pressed", String(!view.hidden.has(run)));
    drawAll();
  });
}

for (const button of document.querySelectorAll("button.only")) {
  button.addEventListener("click", () => {
    const isOnly = button.closest("section").classList.toggle("only-marked");
    button.setAttribute("aria-pressed", String(isOnly));
  });
}

// ---------------------------------------------------------------------------------- when charts are drawn

const sight = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting) inSight.add(target);
      else inSight.delete(target);
      if (isIntersecting && !target.dataset.drawn) draw(target);
    }
  },
  { rootMargin: "400px" },
);
const widths = new Map();
const resized = new ResizeObserver((entries) => {
  for (const { target, contentRect } of entries) {
    const figure = target.closest("figure");
    if (figure.dataset.drawn && contentRect.width && widths.get(target) !== contentRect.width) draw(figure);
    widths.set(target, contentRect.width);
  }
});
for (const figure of figures) {
  sight.observe(figure);
  resized.observe(figure.querySelector(".plot"));
}
window.addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
  for (const figure of figures) if (!figure.dataset.drawn) draw(figure);
});
