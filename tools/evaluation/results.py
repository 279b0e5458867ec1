"""mteb's scores as results.json, task -> dimension -> metric -> value, and as a table."""

import math
from collections.abc import Mapping

import numpy as np

Scores = dict[str, dict[str, dict[str, float]]]  # task -> dimension -> metric -> value
MAIN = "main_score"


def metrics_of(scores: Mapping[str, list[dict]]) -> dict[str, float]:
    """Every metric of a task that is a finite number, as the mean over its splits and subsets.

    Args:
        scores: mteb's TaskResult.scores: split -> a dictionary for each subset.
    """
    parts = [part for parts in scores.values() for part in parts]
    means = {}
    for metric in parts[0]:
        values = [part.get(metric) for part in parts]
        if all(is_finite(value) for value in values):
            means[metric] = float(np.mean(values))
    return means


def is_finite(value) -> bool:
    """Whether a value is a number that JSON can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def table(scores: Scores, main_metrics: dict[str, str]) -> str:
    """The main metric of each task at each dimension, and the mean over tasks, as a Markdown table.

    Args:
        main_metrics: task -> what its main_score is.
    """
    dimensions = list(next(iter(scores.values())))
    rows = [["task", "metric", *dimensions]]
    for task, by_dimension in scores.items():
        values = [f"{by_dimension[dimension][MAIN]:.4f}" for dimension in dimensions]
        rows.append([task, main_metrics[task], *values])
    if len(scores) > 1:
        means = [np.mean([found[dimension][MAIN] for found in scores.values()]) for dimension in dimensions]
        rows.append(["mean of tasks", "", *(f"{mean:.4f}" for mean in means)])
    return markdown(rows)


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
