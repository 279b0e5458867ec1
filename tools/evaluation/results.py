"""mteb's scores as results.json, task -> dimension -> metric -> value, and as a table."""

from collections.abc import Mapping, Sequence

import numpy as np

from tools.evaluation.folders import is_number

Scores = dict[str, dict[str, dict[str, float]]]  # task -> dimension -> metric -> value
MAIN = "main_score"
DECIMALS = 6  # of mteb's files


def metrics_of(scores: Mapping[str, list[dict]]) -> dict[str, float]:
    """Every metric of a task that is a finite number, as the mean over its splits and subsets.

    Args:
        scores: mteb's TaskResult.scores: split -> a dictionary for each subset. Values are rounded as in mteb's files,
            so a task that was finished before has the same ones.
    """
    parts = [part for parts in scores.values() for part in parts]
    means = {}
    for metric in parts[0]:
        values = [part.get(metric) for part in parts]
        if all(is_number(value) for value in values):
            means[metric] = round(float(np.mean([round(value, DECIMALS) for value in values])), DECIMALS)
    return means


def table(scores: Scores, main_metrics: dict[str, str]) -> str:
    """The main metric of each task at each dimension, and the mean over tasks, as a Markdown table.

    Args:
        main_metrics: task -> what its main_score is.
    """
    dimensions = list(next(iter(scores.values())))
    rows = [["task", "metric", *dimensions]]
    found = {task: [of[dimension].get(MAIN) for dimension in dimensions] for task, of in scores.items()}
    for task, values in found.items():
        rows.append([task, main_metrics[task], *map(cell, values)])
    if len(scores) > 1:
        rows.append(["mean of tasks", "", *(cell(mean(values)) for values in zip(*found.values(), strict=True))])
    return markdown(rows)


def cell(value: float | None) -> str:
    """A value in a table; a dash where mteb found no number, as for the correlation of vectors that are all alike."""
    return "-" if value is None else f"{value:.4f}"


def mean(values: Sequence[float | None]) -> float | None:
    """The mean, or None if a value is missing."""
    return None if None in values else float(np.mean(values))


def markdown(rows: list[list[str]]) -> str:
    """Rows, the head first, as a Markdown table whose columns stand below each other; numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            text.ljust(width) if column < 2 else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("| " + " | ".join(cells) + " |")
    rule = ["-" * width if column < 2 else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    lines.insert(1, "| " + " | ".join(rule) + " |")
    return "\n".join(lines)
