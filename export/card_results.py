"""What a model card says of a model's figures.

They are a dictionary of up to three parts, each of which may be missing:

    held_out     {"step": 100, "measures": {task: {measure: value}}}: losses and ranks of the held-out tuples
    evaluation   {task: {dimensions: {metric: value}}}, as results.json of tools/evaluate.py has them
    beside       {model: the same}: other models in the same tasks

Dimensions may be texts, as JSON has them.
"""

import math

_MEASURES_IN_WORDS = {
    "in_batch": "in-batch loss",
    "hard": "hard-negative loss",
    "group_accuracy": "accuracy among its negatives",
    "group_mrr": "MRR among its negatives",
}
_MAIN_METRICS = ("main_score", "ndcg_at_10")  # the first of these that a task has stands for it, else its first metric


def results_section(results: dict, hidden_size: int) -> str:
    """The card's section on results, "" where there are none.

    Args:
        hidden_size: the whole width.
    """
    parts = []
    if results.get("held_out", {}).get("measures"):
        parts.append(_held_out(results["held_out"], hidden_size))
    if results.get("evaluation"):
        parts.append(_evaluation(results["evaluation"]))
    if results.get("evaluation") and results.get("beside"):
        parts.append(_beside(results["evaluation"], results["beside"]))
    return "\n\n".join(["## Results", *parts]) if parts else ""


def evaluation_rows(results: dict, hidden_size: int) -> list[tuple[str, str, float]]:
    """(task, metric, value) of the evaluation at the whole width, what is finite, in the order of the alphabet."""
    rows = []
    for task, by_dim in sorted(results.get("evaluation", {}).items()):
        metrics = _by_number(by_dim).get(hidden_size, {})
        rows += [(task, metric, value) for metric, value in sorted(metrics.items()) if math.isfinite(value)]
    return rows


def in_cell(text) -> str:
    """Any text as one line of a table's cell: what Markdown or HTML would take for its own is escaped.

    >>> in_cell("a|b*")
    'a\\\\|b\\\\*'
    """
    return "".join("\\" + letter if letter in "\\`*[]<>|" else letter for letter in " ".join(str(text).split()))


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; cells are put in as they are."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _held_out(held_out: dict, hidden_size: int) -> str:
    """A row for each task and prefix. A prefix's measures have its dimensions behind an @: in_batch@64."""
    of_row: dict[tuple[str, int], dict[str, float]] = {}
    for task, measures in held_out["measures"].items():
        for name, value in measures.items():
            measure, _, prefix = name.partition("@")
            of_row.setdefault((task, int(prefix or hidden_size)), {})[measure] = value
    found = {measure for values in of_row.values() for measure in values}
    measures = [name for name in _MEASURES_IN_WORDS if name in found] + sorted(found - set(_MEASURES_IN_WORDS))
    rows = []
    for task, dims in sorted(of_row, key=lambda row: (row[0], -row[1])):
        rows.append([in_cell(task), str(dims), *_figures(of_row[task, dims], measures)])
    head = ["task", "dimensions", *(_MEASURES_IN_WORDS.get(measure, in_cell(measure)) for measure in measures)]
    said = f"Of the held-out tuples after step {held_out['step']:,}, the mean over a task's datasets:"
    return f"{said}\n\n{table(head, rows)}"


def _evaluation(evaluation: dict) -> str:
    """A table for each set of metrics: a clustering task has others than a search."""
    tasks_with: dict[tuple[str, ...], list[str]] = {}
    for task, by_dim in sorted(evaluation.items()):
        metrics = tuple(sorted({metric for values in by_dim.values() for metric in values}))
        tasks_with.setdefault(metrics, []).append(task)
    tables = []
    for metrics, tasks in tasks_with.items():
        rows = []
        for task in tasks:
            for dims, values in sorted(_by_number(evaluation[task]).items(), reverse=True):
                rows.append([in_cell(task), str(dims), *_figures(values, metrics)])
        tables.append(table(["evaluation", "dimensions", *map(in_cell, metrics)], rows))
    return "\n\n".join(tables)


def _beside(evaluation: dict, beside: dict) -> str:
    """The main metric of each task, each model at its whole width."""
    rows = []
    for task, by_dim in sorted(evaluation.items()):
        own = _widest(by_dim)
        metric = _main_metric(own)
        others = [_widest(figures.get(task, {})) for figures in beside.values()]
        cells = [_figures(values, [metric])[0] for values in (own, *others)]
        rows.append([in_cell(task), in_cell(metric), *cells])
    return table(["evaluation", "metric", "this model", *map(in_cell, beside)], rows)


def _main_metric(values: dict[str, float]) -> str:
    known = [metric for metric in _MAIN_METRICS if metric in values]
    return [*known, *sorted(values), ""][0]


def _widest(by_dim: dict) -> dict[str, float]:
    numbered = _by_number(by_dim)
    return numbered[max(numbered)] if numbered else {}


def _by_number(by_dim: dict) -> dict[int, dict[str, float]]:
    return {int(dims): values for dims, values in by_dim.items()}


def _figures(values: dict[str, float], names) -> list[str]:
    """The values of these names with four digits; a dash for what is missing."""
    return [f"{values[name]:.4f}" if name in values else "–" for name in names]
