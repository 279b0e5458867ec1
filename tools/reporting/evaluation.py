"""What evaluations say: of lines of kind "evaluation" in metrics.jsonl, and of a results.json of tools/evaluate.py.

Both hold sets (or tasks) -> dimension -> metric -> value. Pure functions.
"""

from tools.reporting.read import RunLog
from tools.reporting.series import Points, number

MAIN = "main_score"  # mteb's name of a task's main metric, beside its own name
Key = tuple[str, int, str]  # set, dimension, metric


def values_of(by_set) -> dict[Key, float]:
    """Every value of set -> dimension -> metric, in this order; what is not a number is left out."""
    found = {}
    for name, by_dimension in _items(by_set):
        for dimension, by_metric in _items(by_dimension):
            if not dimension.isdecimal():
                continue
            for metric, value in _items(by_metric):
                if number(value) is not None:
                    found[str(name), int(dimension), str(metric)] = value
    return found


def _items(value) -> list[tuple]:
    return list(value.items()) if isinstance(value, dict) else []


def history(run: RunLog) -> dict[Key, Points]:
    """(step, value) of each evaluation during training."""
    found: dict[Key, Points] = {}
    for line in run.lines.get("evaluation", []):
        for key, value in values_of(line.get("sets")).items():
            found.setdefault(key, []).append((line["step"], value))
    return found


def widest(keys) -> dict[str, int]:
    """Set -> the most dimensions that it was evaluated at: the whole embedding, where no run says less."""
    found: dict[str, int] = {}
    for name, dimension, _ in keys:
        found[name] = max(dimension, found.get(name, 0))
    return found


def by_dimension(values: dict[Key, float]) -> dict[str, Points]:
    """ "set · metric" -> (dimension, value) of the main metric of each set that has at least two dimensions."""
    found: dict[str, dict[int, float]] = {}
    main = main_metrics(values)
    for (name, dimension, metric), value in values.items():
        if metric == main[name]:
            found.setdefault(f"{name} · {metric}", {})[dimension] = value
    return {title: sorted(points.items()) for title, points in found.items() if len(points) > 1}


def main_metrics(keys) -> dict[str, str]:
    """Set -> its main_score, where mteb has written one, else its first metric."""
    found: dict[str, str] = {}
    for name, _, metric in keys:
        if metric == MAIN or name not in found:
            found[name] = metric
    return found


def latest(run: RunLog) -> dict[Key, float]:
    """The values of the last evaluation during training."""
    lines = run.lines.get("evaluation", [])
    return values_of(lines[-1].get("sets")) if lines else {}


def results(run: RunLog) -> dict[Key, float]:
    """What its results.json files hold; a task's name is preceded by the folder of a file that lies deeper."""
    found = {}
    for path, content in run.results.items():
        folder = path.rpartition("/")[0]
        for (name, dimension, metric), value in values_of(content).items():
            found[f"{folder}: {name}" if folder else name, dimension, metric] = value
    return found


def chosen(run: RunLog, best_metric: str | None) -> tuple[str, Points]:
    """What runs are judged by, as text and over the steps of this one: best_metric, or its first set's main metric.

    Args:
        best_metric: METRIC, SET/METRIC, DIMENSIONS/METRIC or SET/DIMENSIONS/METRIC; without a set it is the mean of all
            sets, without dimensions that of the whole embedding.

    Returns:
        ("", []) where the run was never evaluated.
    """
    found = history(run)
    if not found:
        return "", []
    whole = widest(found)
    if best_metric is None:
        name, metric = next(iter(main_metrics(found).items()))
        return f"{name} · {metric}", found.get((name, whole[name], metric), [])
    *place, word = best_metric.split("/")
    sets = [part for part in place[:1] if part in whole] or list(whole)
    dimensions = [int(part) for part in place[-1:] if part.isdecimal() and [part] != sets]
    curves = []
    for one in sets:
        wanted = dimensions[0] if dimensions else whole[one]
        curves += [points for (*of, metric), points in found.items() if of == [one, wanted] and _same(metric, word)]
    return best_metric, _mean(curves)


def _same(metric: str, word: str) -> bool:
    """Whether a word names a metric; mteb spells nDCG@10 as ndcg_at_10."""
    return metric.lower() == word.lower().replace("_at_", "@")


def _mean(curves: list[Points]) -> Points:
    """The mean of curves, at the steps that all have."""
    if not curves:
        return []
    by_step = [dict(points) for points in curves]
    steps = [step for step, _ in curves[0] if all(step in one for one in by_step)]
    return [(step, sum(one[step] for one in by_step) / len(by_step)) for step in steps]
