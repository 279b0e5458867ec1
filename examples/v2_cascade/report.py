"""How well the models of the cascade search, by their first dimensions; as tables and as a picture."""

import random
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import mean

import torch
from transformers import AutoConfig, AutoModel

from examples.code_search.comparison import embed, score_vectors, with_instruction
from examples.code_search.corpus import Function
from retrieval.search import unit_rows

EVALUATED = 2000  # held-out functions that are searched in
DIMS = (8, 16, 32, 64, 128, 256)  # and the whole width
MAX_LENGTH = 64  # tokens of a text, as in training


@dataclass(frozen=True)
class Measured:
    """A model folder's figures."""

    parameters: int
    texts_per_second: float  # passages embedded, on all cores
    ndcg: dict[int, float]  # first dimensions -> nDCG@10; the last entry is the whole width


def sample_of(library: list[Function]) -> list[Function]:
    """The functions that are searched in, drawn once."""
    return random.Random(0).sample(library, min(EVALUATED, len(library)))


def measure(folder: Path, functions: list[Function]) -> Measured:
    """How well and how fast a model folder finds each function by its docstring."""
    queries = embed(folder, with_instruction(function.query for function in functions), MAX_LENGTH)  # [n, d]
    began = time.perf_counter()
    passages = embed(folder, [function.passage for function in functions], MAX_LENGTH)  # [n, d]
    seconds = time.perf_counter() - began
    width = queries.shape[1]
    ndcg = {}
    for dim in (*[dim for dim in DIMS if dim < width], width):
        ndcg[dim] = score_vectors(unit_rows(queries[:, :dim]), unit_rows(passages[:, :dim]))["nDCG@10"]
    return Measured(parameters(folder), len(functions) / seconds, ndcg)


def parameters(folder: Path) -> int:
    """Of the decoder, without a language-model head."""
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.from_pretrained(folder))
    return sum(weight.numel() for weight in model.parameters())


def table(rows: dict[str, list[Measured]]) -> list[str]:
    """Name -> its figures, one for each seed, as aligned lines; means, and the spread at the whole width."""
    head = "".join(f"{dim:>7}" for dim in DIMS) + f"{'whole':>16}"
    lines = [f"{'nDCG@10 by first dimensions':30}{'parameters':>12}{'texts/s':>9}{head}"]
    for name, measured in rows.items():
        speed = mean(one.texts_per_second for one in measured)
        cells = ""
        for dim in DIMS:
            found = [one.ndcg[dim] for one in measured if dim in one.ndcg]
            cells += f"{mean(found):7.3f}" if found else f"{'':7}"
        lines.append(f"{name:30}{measured[0].parameters:12,}{speed:9.0f}{cells}{whole(measured):>16}")
    return lines


def whole(measured: list[Measured]) -> str:
    """nDCG@10 at the whole width: the mean, and from the lowest to the highest where there are several seeds."""
    found = [list(one.ndcg.values())[-1] for one in measured]
    if len(found) == 1:
        return f"{found[0]:.3f}"
    return f"{mean(found):.3f} ±{(max(found) - min(found)) / 2:.3f}"


def draw(rows: dict[str, list[Measured]], picture: Path) -> Path | None:
    """Curves of nDCG@10 over the number of first dimensions; None if matplotlib is not installed."""
    if not find_spec("matplotlib"):
        return None
    import matplotlib

    matplotlib.use("Agg")  # draws into files, without a screen
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    for name, measured in rows.items():
        dims = list(measured[0].ndcg)
        means = [mean(one.ndcg[dim] for one in measured) for dim in dims]
        axes.plot(dims, means, marker="o", label=f"{name}, {measured[0].parameters / 1e6:.0f} M")
    axes.set_xscale("log", base=2)
    axes.set_xticks(DIMS, labels=[str(dim) for dim in DIMS])
    axes.set_xlabel("first dimensions of the embedding")
    axes.set_ylabel("nDCG@10")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)  # beside the curves, which fill the plot
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)
    return picture
