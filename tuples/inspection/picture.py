"""A picture of lengths: how many queries, positives and negatives have which."""

import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from tuples.inspection.checks import ROLES, Lengths
from tuples.inspection.look import MAX_LENGTHS, Inspection

_COLOURS = {"queries": "tab:blue", "positives": "tab:green", "negatives": "tab:red"}
_BINS = 40


def draw(total: Inspection, path: Path) -> bool:
    """Write a PNG to `path` where matplotlib is installed; returns whether it is."""
    if not find_spec("matplotlib"):
        return False
    import matplotlib

    matplotlib.use("Agg")  # draws into files, without a screen
    from matplotlib import pyplot

    present = [total.lengths[role].values for role in ROLES if total.lengths[role].count]
    least = max(min([int(values[0]) for values in present], default=1), 1)
    most = max([int(values[-1]) for values in present], default=1)
    edges = bin_edges(least, most)
    doublings = np.log2(edges[1:] / edges[:-1])  # bins of short texts are rounded, and not equally wide
    figure, axes = pyplot.subplots(figsize=(10, 4.5), layout="constrained")
    for role in ROLES:
        lengths = total.lengths[role]
        if lengths.count:
            shares = histogram(lengths, edges) / lengths.count / doublings
            axes.stairs(shares, edges, color=_COLOURS[role], linewidth=1.8, label=f"{role} ({lengths.count:,})")
    if total.unit == "tokens":
        for limit in MAX_LENGTHS:
            if least < limit < most:
                axes.axvline(limit, color="gray", linewidth=0.6, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set(
        xlabel=total.unit,
        ylabel="share of texts per doubling of the length",
        title=f"Lengths in {total.path}",
        ylim=(0, None),
    )
    axes.legend()
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    figure.savefig(aside, dpi=120, format="png")
    pyplot.close(figure)
    os.replace(aside, path)
    return True


def bin_edges(least: int, most: int) -> np.ndarray:
    """Edges of bins that grow by one factor, from `least` past `most`; whole numbers, each once."""
    return np.unique(np.geomspace(least, most + 1, _BINS + 1).round().astype(np.int64))


def histogram(lengths: Lengths, edges: np.ndarray) -> np.ndarray:
    """How many texts have a length from edge i up to and without edge i + 1; lengths of 0 are in the first."""
    places = np.clip(np.searchsorted(edges, lengths.values, side="right") - 1, 0, len(edges) - 2)
    return np.bincount(places, weights=lengths.counts, minlength=len(edges) - 1)
