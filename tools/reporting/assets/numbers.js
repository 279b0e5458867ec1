// Numbers: how they are written, where an axis has its marks, and what smoothing makes of them. Nothing is drawn here.

// Four digits that count, as tools/reporting/summary.py writes them.
function show(value, unit) {
  if (value === null || value === undefined) return "–";
  if (unit === "%") return `${trim((100 * value).toFixed(Math.abs(value) < 0.01 ? 2 : 1))} %`;
  const size = Math.abs(value);
  if (size && size < 1e-3) {
    const [mantissa, exponent] = value.toExponential(2).split("e");
    return `${Number(mantissa)}e${Number(exponent)}`;
  }
  if (size >= 1000) return Math.round(value).toLocaleString("en-US");
  const digits = size ? 3 - Math.floor(Math.log10(size)) : 0;
  return trim(value.toFixed(Math.min(Math.max(digits, 0), 4)));
}

function trim(text) {
  return text.includes(".") ? text.replace(/\.?0+$/, "") : text;
}

// Round values from below `low` to above `high`, about `count` of them.
function linearTicks(low, high, count) {
  const rough = (high - low) / Math.max(count, 1);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.999);
  const ticks = [];
  for (let index = Math.ceil(low / step - 1e-9); index * step <= high + step * 1e-9; index++) {
    ticks.push(Number((index * step).toPrecision(12)));
  }
  return ticks;
}

// Powers of ten; where they are few, also their multiples by 2 and 5.
function logTicks(low, high) {
  const ticks = [];
  const factors = factorsFor(Math.log10(high / low));
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
    for (const factor of factors) {
      const tick = Number((factor * 10 ** power).toPrecision(6));
      if (tick >= low * 0.999 && tick <= high * 1.001) ticks.push(tick);
    }
  }
  return ticks;
}

function factorsFor(decades) {
  if (decades < 1) return [1, 1.5, 2, 3, 4, 5, 7];
  return decades < 3 ? [1, 2, 5] : [1];
}

// An exponential mean of what came before: each earlier value weighs `weight` times as much as the next; values that
// are missing stay so. Divided by the sum of the weights, so that the first values are not drawn to zero.
function smoothed(values, weight) {
  if (!weight) return values;
  let sum = 0;
  let weights = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = weight * sum + value;
    weights = weight * weights + 1;
    return sum / weights;
  });
}

// In what times up to `longest` seconds are shown.
function unitOfTime(longest) {
  return longest < 2 * 3600 ? { name: "minutes", seconds: 60 } : { name: "hours", seconds: 3600 };
}

// The y of a line through points of rising x; outside of them it goes on as between the last two there.
function interpolated(xs, ys, x) {
  const found = xs.findIndex((known) => known >= x);
  const next = found === -1 ? xs.length - 1 : Math.max(found, 1);
  const share = (x - xs[next - 1]) / (xs[next] - xs[next - 1]);
  return ys[next - 1] + share * (ys[next] - ys[next - 1]);
}

// Where in rising numbers the one nearest to `value` stands.
function nearest(sorted, value) {
  let low = 0;
  let high = sorted.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < value) low = middle;
    else high = middle;
  }
  return Math.abs(sorted[low] - value) <= Math.abs(sorted[high] - value) ? low : high;
}
