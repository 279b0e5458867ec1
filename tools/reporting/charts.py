"""Which charts there are of some runs, and what each shows. Pure functions of what `read.open_runs` gives.

In every chart a colour is a run. A line through the training steps is plain; one through held-out tuples or evaluation
sets has a dot for each value.
"""

from dataclasses import dataclass, replace

from data.token_store import TASKS
from tools.reporting.evaluation import by_dimension, history, latest, main_metrics, results, widest
from tools.reporting.read import RunLog, full_width
from tools.reporting.series import Points, Series, kinds_of, last_value, mean_curve, plain_curve, thin

NOTABLE = 0.005  # a share of padding or imbalance below it has no chart, as it has no place on the console
POINTS, FEWER_POINTS = 2000, 400  # of one line: of the charts by task, of the many charts by dataset
# training/objective.py names the same; importing it would import torch, which takes longer than the whole page.
LOSSES = {"in_batch": "in-batch loss", "hard": "hard-negative loss", "distillation": "distillation loss"}
RANKS = {"group_accuracy": "positive ranked first", "group_mrr": "reciprocal rank of the positive"}


@dataclass(frozen=True)
class Chart:
    """One chart; the browser draws it."""

    title: str
    series: list[Series]
    note: str = ""  # what the values are, in a few words
    unit: str = ""
    x: str = "step"  # or dimension, or length
    from_zero: bool = False  # the axis of values begins at 0
    may_be_log: bool = False
    is_noisy: bool = False  # smoothing helps
    bars: bool = False
    limit: float | None = None  # a vertical mark on the axis of lengths


IN_METRICS = {  # key of training lines -> its chart, still without lines
    "lr": Chart("Learning rate", [], "after warm-up and schedule", from_zero=True),
    "grad_norm": Chart("Gradient norm", [], "before clipping", from_zero=True, may_be_log=True, is_noisy=True),
    "padding": Chart("Padding", [], "of the positions computed", "%", from_zero=True, is_noisy=True),
    "imbalance": Chart("Imbalance", [], "the fullest process above the mean", "%", from_zero=True, is_noisy=True),
}
IN_TIMINGS = {
    "tuples_per_second": Chart("Throughput", [], "all processes", "tuples/s", from_zero=True, is_noisy=True),
    "tokens_per_second": Chart("Token throughput", [], "without padding", "tokens/s", from_zero=True, is_noisy=True),
    "peak_gib": Chart("Peak memory", [], "the fullest process", "GiB", from_zero=True),
}


@dataclass(frozen=True)
class Section:
    """Charts under a heading."""

    title: str
    charts: list[Chart]
    note: str = ""
    closed: bool = False  # opened by who wants to see it


def tasks_of(run: RunLog) -> dict[str, str]:
    """Dataset -> task, from the manifest; datasets of which it says nothing are in one task, "all"."""
    said = run.manifest.get("tasks")
    tasks = {name: str(task) for name, task in said.items()} if isinstance(said, dict) else {}
    for name in [*kinds_of(run.trained, "losses"), *kinds_of(run.lines.get("validation", []), "measures")]:
        tasks.setdefault(name, "all")
    return tasks


def task_names(runs: list[RunLog]) -> list[str]:
    """The tasks of all runs, in one order."""
    found = {task for run in runs for task in tasks_of(run).values()}
    return [task for task in (*TASKS, "all") if task in found] + sorted(found - {*TASKS, "all"})


def loss_section(runs: list[RunLog]) -> Section:
    """A chart of each loss of each task: the mean over the task's datasets."""
    charts = []
    unused = []
    for task in task_names(runs):
        for kind in LOSSES:
            members = [[name for name, own in tasks_of(run).items() if own == task] for run in runs]
            series = _losses(runs, members, kind, POINTS)
            if not series:
                continue
            title = f"{task} · {LOSSES[kind]}"
            if all(not value for one in series for _, value in one.points):
                unused.append(title)
                continue
            largest = max(map(len, members))
            note = f"mean of {largest} datasets" if largest > 1 else ""
            if kind != "distillation" and any(run.configuration.get("use_mrl") for run in runs):
                note = f"{note}; trained: weighted sum over prefixes".removeprefix("; ")
            charts.append(Chart(title, series, note, from_zero=True, may_be_log=True, is_noisy=True))
    note = f"Zero throughout, and so without a chart: {', '.join(unused)}." if unused else ""
    return Section("Losses", charts, note)


def _losses(runs: list[RunLog], members: list[list[str]], kind: str, limit: int) -> list[Series]:
    """Trained and held out, of each run that has such values."""
    found = []
    for index, run in enumerate(runs):
        trained = mean_curve(run.trained, "losses", members[index], kind)
        held_out = mean_curve(run.lines.get("validation", []), "measures", members[index], kind)
        if trained:
            found.append(Series(index, thin(trained, limit)))
        if held_out:
            found.append(Series(index, thin(held_out, limit), held_out=True, label="held out"))
    return found


def measure_section(runs: list[RunLog]) -> Section:
    """How the positive ranks among its own hard negatives, on held-out tuples, by task."""
    charts = []
    for task in task_names(runs):
        members = [[name for name, own in tasks_of(run).items() if own == task] for run in runs]
        charts += _rank_charts(runs, task, members, POINTS)
    return Section("Ranks on held-out tuples", charts)


def _rank_charts(runs: list[RunLog], title: str, members: list[list[str]], limit: int) -> list[Chart]:
    """A chart of each measure of the positive's rank, the mean over `members` of each run."""
    charts = []
    for kind, words in RANKS.items():
        series = []
        for index, run in enumerate(runs):
            points = mean_curve(run.lines.get("validation", []), "measures", members[index], kind)
            if points:
                series.append(Series(index, thin(points, limit), held_out=True))
        if series:
            charts.append(Chart(f"{title} · {words}", series, "among its own hard negatives", from_zero=True))
    return charts


def evaluation_section(runs: list[RunLog], main: bool) -> Section:
    """A chart of each metric of each evaluation set over the steps, at the most dimensions that it was evaluated at.

    Args:
        main: the main metric of each set; or all others, in a section that is closed.
    """
    by_title: dict[str, list[Series]] = {}
    for index, run in enumerate(runs):
        found = history(run)
        whole = widest(found)
        mains = main_metrics(found)
        for (name, dimension, metric), points in found.items():
            if dimension == whole[name] and (metric == mains[name]) == main:
                series = Series(index, thin(points, POINTS), held_out=True)
                by_title.setdefault(f"{name} · {metric}", []).append(series)
    title = "Evaluation during training" if main else "Evaluation by other metrics"
    return Section(title, [Chart(title, series) for title, series in by_title.items()], closed=not main)


def matryoshka_section(runs: list[RunLog]) -> Section:
    """Quality by the number of dimensions that are kept, as measured last.

    Of each evaluation set its first metric; of the held-out tuples of each task its first loss, and how often the
    positive is ranked first.
    """
    by_title: dict[str, list[Series]] = {}
    for index, run in enumerate(runs):
        curves = by_dimension(latest(run)) | by_dimension(results(run)) | _prefixes(run)
        for title, points in curves.items():
            by_title.setdefault(title, []).append(Series(index, points, held_out=True))
    charts = []
    for title, series in by_title.items():
        charts.append(Chart(title, series, "measured last", x="dimension"))
    return Section("Matryoshka: quality by dimensions kept", charts)


def _prefixes(run: RunLog) -> dict[str, Points]:
    """Of the last validation: title -> (dimension, mean over a task's datasets).

    Of each task its first loss that has prefixes, and how often the positive is ranked first.
    """
    lines = run.lines.get("validation", [])[-1:]
    width = full_width(run)
    found = {}
    for task in task_names([run]):
        members = [name for name, own in tasks_of(run).items() if own == task]
        for kinds in (tuple(LOSSES), ("group_accuracy",)):
            for kind in kinds:
                points = _by_prefix(lines, members, kind, width)
                if len(points) > 1:
                    found[f"{task} · {(LOSSES | RANKS)[kind]}, held out"] = points
                    break
    return found


def _by_prefix(lines: list[dict], members: list[str], kind: str, width: int | None) -> Points:
    """(dimension, mean over datasets) of one kind of measure: of each prefix, "kind@dimension", and of the whole."""
    names = {} if width is None else {width: kind}
    for name in set().union(*kinds_of(lines, "measures").values()):
        start, _, end = name.partition("@")
        if start == kind and end.isdecimal():
            names.setdefault(int(end), name)
    values = [(dimension, last_value(mean_curve(lines, "measures", members, names[dimension]))) for dimension in names]
    return sorted(point for point in values if point[1] is not None)


def optimiser_section(runs: list[RunLog]) -> Section:
    """Learning rate, gradient norm, padding; throughput and memory."""
    charts = [_filled(chart, [plain_curve(run.trained, key) for run in runs]) for key, chart in IN_METRICS.items()]
    charts += [_filled(chart, [plain_curve(run.timings, key) for run in runs]) for key, chart in IN_TIMINGS.items()]
    return Section("Optimiser and machine", [chart for chart in charts if chart is not None])


def _filled(chart: Chart, curves: list[Points]) -> Chart | None:
    """A chart with the curve of each run that has values; None if no value is worth one."""
    values = [value for points in curves for _, value in points]
    least = NOTABLE if chart.unit == "%" else 0
    if not any(value is not None and value > least for value in values):
        return None
    series = []
    for index, points in enumerate(curves):
        if last_value(points) is not None:
            series.append(Series(index, thin(points, POINTS)))
    note = chart.note
    if None in values:  # an update was left out, because its gradient had no norm
        note += f"; {values.count(None)} without a finite value"
    return replace(chart, series=series, note=note)


def dataset_section(runs: list[RunLog]) -> Section:
    """A chart of each loss and rank of each dataset, where a task has several datasets."""
    charts = []
    everywhere = {name: task for run in runs for name, task in tasks_of(run).items()}
    tasks = list(everywhere.values())
    for name in sorted(name for name, task in everywhere.items() if tasks.count(task) > 1):
        members = [[name]] * len(runs)
        for kind, words in LOSSES.items():
            series = _losses(runs, members, kind, FEWER_POINTS)
            if any(value for one in series for _, value in one.points):
                note = everywhere[name]
                charts.append(Chart(f"{name} · {words}", series, note, from_zero=True, may_be_log=True, is_noisy=True))
        charts += _rank_charts(runs, name, members, FEWER_POINTS)
    return Section("Losses and ranks by dataset", charts, closed=True)
