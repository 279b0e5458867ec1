"""What a model card says of a model's figures.

They are a dictionary of up to four parts, each of which may be missing:

    held_out     {"step": 100, "measures": {task: {measure: value}}}: losses and ranks of the held-out tuples
    in_training  {"step": 100, "sets": {set: {dimensions: {metric: value}}}}: searches while it was trained
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
# Of a task's metrics, of which mteb has dozens, the card shows these, main ones first; all where it has none of them.
_SHOWN_METRICS = (
    "ndcg_at_10", "mrr_at_10", "recall_at_10", "recall_at_100", "map_at_100", "map", "v_measure", "max_ap",
    "cosine_spearman", "accuracy", "f1",
)  # fmt: skip


def results_section(results: dict, hidden_size: int) -> str:
    """The card's section on results, "" if there are none.

    Args:
        hidden_size: the whole width.
    """
    parts = []
    if results.get("held_out", {}).get("measures"):
        parts.append(_held_out(results["held_out"], hidden_size))
    if results.get("in_training"):
        step = results["in_training"]["step"]
        parts.append(f"Of retrieval sets, searched by the training itself after step {step:,}:")
        parts.append(_evaluation(results["in_training"]["sets"]))
    if results.get("evaluation"):
        parts.append("Of evaluations with this folder:")
        parts.append(_evaluation(results["evaluation"]))
    if results.get("evaluation") and results.get("beside"):
        parts.append(_beside(results["evaluation"], results["beside"]))
    return "\n\n".join(["## Results", *parts]) if parts else ""


def evaluation_rows(results: dict, hidden_size: int) -> list[tuple[str, str, float]]:
    """(task, metric, value) of the evaluation at the whole width: what the card shows and is finite."""
    rows = []
    for task, by_dim in sorted(results.get("evaluation", {}).items()):
        values = _by_number(by_dim).get(hidden_size, {})
        rows += [(task, metric, values[metric]) for metric in _shown(values) if math.isfinite(values[metric])]
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
        metrics = tuple(_shown({metric for values in by_dim.values() for metric in values}))
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
    """mteb's main metric, whose value its results hold a second time as main_score; else the first that is shown.

    >>> _main_metric({"accuracy": 0.5, "f1": 0.4, "main_score": 0.4}), _main_metric({"accuracy": 0.5, "f1": 0.4})
    ('f1', 'accuracy')
    """
    shown = [*_shown(values), ""]
    main = values.get("main_score", math.nan)
    return next((metric for metric in shown if values.get(metric) == main), shown[0])


def _shown(metrics) -> list[str]:
    """Which of these metrics the card shows, in its order; nDCG@10 is mteb's ndcg_at_10."""
    place = {name: number for number, name in enumerate(_SHOWN_METRICS)}
    place_of = {metric: place.get(metric.lower().replace("@", "_at_")) for metric in sorted(metrics)}
    known = [metric for metric in place_of if place_of[metric] is not None]
    return sorted(known, key=place_of.get) or list(place_of)


def _widest(by_dim: dict) -> dict[str, float]:
    numbered = _by_number(by_dim)
    return numbered[max(numbered)] if numbered else {}


def _by_number(by_dim: dict) -> dict[int, dict[str, float]]:
    return {int(dims): values for dims, values in by_dim.items()}


def _figures(values: dict[str, float], names) -> list[str]:
    """The values of these names with four digits; a dash for what is missing."""
    return [f"{values[name]:.4f}" if name in values else "–" for name in names]
