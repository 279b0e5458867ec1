"""The few numbers at the top of the page, and how numbers are written."""

import math
from dataclasses import dataclass
from statistics import median

from tools.reporting.charts import loss_section, measure_section
from tools.reporting.evaluation import chosen
from tools.reporting.read import RunLog
from tools.reporting.series import Points, last_value, number

Value = tuple[str, str] | None  # a number as it is shown, and its unit; None if a run has none


@dataclass(frozen=True)
class Tile:
    """A label, and a value for each run."""

    label: str
    values: list[Value]


def show(value: float | None) -> str:
    """Four digits that count, thousands apart; assets/numbers.js writes the same.

    >>> show(0.50244), show(12345.6), show(1e-7), show(6e-4), show(27.93), show(0)
    ('0.5024', '12,346', '1e-7', '6e-4', '27.93', '0')
    """
    if value is None:
        return "–"
    size = abs(value)
    if size and size < 1e-3:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    if size >= 1000:
        return f"{value:,.0f}"
    digits = 3 - math.floor(math.log10(size)) if size else 0
    text = f"{value:.{min(max(digits, 0), 4)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def tiles(runs: list[RunLog]) -> list[Tile]:
    """Steps, the first loss, the first measure of quality, throughput, memory, batch; only what some run has."""
    found = [Tile("Steps trained", [(f"{run.last_step:,}", _of_planned(run)) for run in runs])]
    found += _last_of(loss_section(runs).charts, len(runs))
    quality = _best_evaluation(runs)
    if not quality:
        quality = _last_of(measure_section(runs).charts, len(runs))
    found += quality
    found.append(Tile("Throughput, median", [_throughput(run) for run in runs]))
    found.append(Tile("Peak memory", [_peak_memory(run) for run in runs]))
    found.append(Tile("Global batch", [_batch(run) for run in runs]))
    return [tile for tile in found if any(tile.values)]


def _of_planned(run: RunLog) -> str:
    """Of how many steps, where the configuration tells."""
    planned = planned_steps(run)
    if planned is None or planned < run.last_step:
        return ""
    return f"of {planned:,}"


def planned_steps(run: RunLog) -> int | None:
    """How many steps the run was to have: the earlier of train_steps and train_epochs; None if it is not known."""
    steps = run.configuration.get("train_steps")
    epochs = run.configuration.get("train_epochs")
    ends = []
    if isinstance(steps, int) and steps > 0:
        ends.append(steps)
    if isinstance(epochs, int) and run.steps_per_epoch:
        ends.append(round(epochs * run.steps_per_epoch))
    return min(ends, default=None)


def _last_of(charts: list, runs: int) -> list[Tile]:
    """The last value of the first chart, of each run: held out where there is such a value."""
    if not charts:
        return []
    values: list[Value] = [None] * runs
    for series in charts[0].series:  # a run's held-out series comes after its trained one
        values[series.run] = (show(last_value(series.points)), "held out" if series.held_out else "")
    return [Tile(f"{charts[0].title}, last", values)]


def _best_evaluation(runs: list[RunLog]) -> list[Tile]:
    """The best value, and when it was, of what the runs are judged by: the first best_metric that one of them has."""
    given = [run.configuration.get("best_metric") for run in runs]
    metrics = [metric for metric in given if isinstance(metric, str)]
    best_metric = metrics[0] if metrics else None
    judged = [chosen(run, best_metric) for run in runs]
    labels = [label for label, _ in judged if label]
    if not labels:
        return []
    values: list[Value] = []
    for label, points in judged:
        values.append(_highest(points) if label == labels[0] else None)
    return [Tile(f"{labels[0]}, best", values)]


def _highest(points: Points) -> Value:
    """The highest value, and the first step that has it."""
    if not points:
        return None
    step, value = max(points, key=lambda point: point[1])
    return show(value), f"step {step:,}"


def _throughput(run: RunLog) -> Value:
    speeds = _numbers(run, "tuples_per_second")
    return (show(median(speeds)), "tuples/s") if speeds else None


def _peak_memory(run: RunLog) -> Value:
    peaks = _numbers(run, "peak_gib")
    return (show(max(peaks)), "GiB") if peaks else None


def _numbers(run: RunLog, key: str) -> list[float]:
    values = [number(line.get(key)) for line in run.timings]
    return [value for value in values if value is not None]


def _batch(run: RunLog) -> Value:
    rows = number(run.configuration.get("train_batch_size"))
    processes = number(run.manifest.get("num_processes"))
    if not rows or not processes:
        return None
    return f"{rows * processes:,}", "tuples"
