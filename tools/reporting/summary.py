"""The few numbers at the top of the page, and how numbers are written."""

import math
from dataclasses import dataclass
from statistics import median

from tools.reporting.charts import loss_section, measure_section
from tools.reporting.evaluation import chosen
from tools.reporting.read import RunLog
from tools.reporting.series import last_value, number


@dataclass(frozen=True)
class Tile:
    """A label, and for each run a value and its unit; None where a run has none."""

    label: str
    values: list[tuple[str, str] | None]


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
    found += _best_evaluation(runs) or _last_of(measure_section(runs).charts, len(runs))
    speeds = [_numbers(run, "tuples_per_second") for run in runs]
    found.append(Tile("Throughput, median", [(show(median(one)), "tuples/s") if one else None for one in speeds]))
    memory = [_numbers(run, "peak_gib") for run in runs]
    found.append(Tile("Peak memory", [(show(max(one)), "GiB") if one else None for one in memory]))
    found.append(Tile("Global batch", [_batch(run) for run in runs]))
    return [tile for tile in found if any(tile.values)]


def _of_planned(run: RunLog) -> str:
    """Of how many steps, where the configuration tells."""
    planned = planned_steps(run)
    return "" if planned is None or planned < run.last_step else f"of {planned:,}"


def planned_steps(run: RunLog) -> int | None:
    """How many steps the run was to have: the earlier of train_steps and train_epochs; None where it is not known."""
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
    values: list[tuple[str, str] | None] = [None] * runs
    for series in charts[0].series:  # a run's held-out series comes after its trained one
        values[series.run] = (show(last_value(series.points)), "held out" if series.held_out else "")
    return [Tile(f"{charts[0].title}, last", values)]


def _best_evaluation(runs: list[RunLog]) -> list[Tile]:
    """The best value, and when it was, of what the runs are judged by: the first best_metric that one of them has."""
    given = [run.configuration.get("best_metric") for run in runs]
    judged = [chosen(run, next((one for one in given if isinstance(one, str)), None)) for run in runs]
    label = next((words for words, _ in judged if words), None)
    if label is None:
        return []
    values: list[tuple[str, str] | None] = []
    for words, points in judged:
        of_label = points if words == label else []
        step, value = max(of_label, key=lambda point: point[1], default=(0, None))
        values.append(None if value is None else (show(value), f"step {step:,}"))
    return [Tile(f"{label}, best", values)]


def _numbers(run: RunLog, key: str) -> list[float]:
    values = [number(line.get(key)) for line in run.timings]
    return [value for value in values if value is not None]


def _batch(run: RunLog) -> tuple[str, str] | None:
    rows = number(run.configuration.get("train_batch_size"))
    processes = number(run.manifest.get("num_processes"))
    return (f"{rows * processes:,}", "tuples") if rows and processes else None
