"""What a mining did, beside its output: NAME.report.json, and NAME.report.png where matplotlib is installed.

It holds no clock and no path of this machine's cache, so the same mining has the same report.
"""

import heapq
from collections.abc import Iterator
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from retrieval.faiss_index import recall
from tuples.mining.blocks import COUNTED, BlockFolder
from tuples.mining.mine import Mining
from tuples.mining.texts import MiningTexts
from utils import plural, write_json

HARDEST = 20  # examples
SAMPLE = 200  # queries that are also searched exactly, to know an index's recall
_BINS = 50
_SHOWN = 300  # characters of a text


def opening_lines(mining: Mining) -> list[str]:
    """What there is to mine, and a warning where score rules have no effect."""
    counts = mining.texts.meta
    rows = plural(counts["rows"], "row")
    lines = [
        f"{rows}, {len(mining.texts.queries):,} distinct queries, {len(mining.texts.passages):,} distinct passages"
    ]
    if counts["bad_rows"]:
        lines.append(f"{plural(counts['bad_rows'], 'row')} without query or passage left out")
    if counts["duplicate_rows"]:
        lines.append(f"{plural(counts['duplicate_rows'], 'row')} with the query and passage of an earlier one, kept")
    if counts["corpus_rows_empty"]:
        lines.append(f"{plural(counts['corpus_rows_empty'], 'row')} of the corpus without a text left out")
    if mining.plan.model is None and mining.plan.cross_encoder is None:
        lines.append("BM25 has no cosines: margins, max_score and min_score do nothing; --model scores what BM25 finds")
    return lines


def write(stem: Path, mining: Mining, names: dict[str, str], rows: dict[str, int]) -> dict:
    """Write `stem`.report.json and the picture; returns what the JSON holds.

    Args:
        names: entries that only the command knows, such as the files' names.
        rows: how many rows were written, dropped, and have fewer negatives.
    """
    plan = mining.plan
    settings = {"backend": plan.backend, "rules": asdict(plan.rules)}
    cut = {}
    if plan.model is not None:
        settings["model"] = asdict(plan.model) | {"folder": plan.model.folder.name}
        cut = {"passages_cut": mining.passage_folder.cut(), "queries_cut": mining.query_folder.cut()}
    if plan.cross_encoder is not None:
        settings["cross_encoder"] = plan.cross_encoder.name
    counts = {key: value for key, value in mining.texts.meta.items() if key != "digest"}
    counts |= {"queries": len(mining.texts.queries), "passages": len(mining.texts.passages)}
    report = {
        **names,
        "settings": settings,
        "counts": counts | cut | rows,
        "candidates": counts_of(mining.blocks),
        "scores": histograms(mining.blocks),
        "hardest": hardest(mining.blocks, mining.texts),
    }
    if plan.backend == "faiss":
        settings["faiss"] = {"index": plan.index, "lists": plan.lists, "probes": plan.probes, "code": plan.code_bytes}
        report["recall"] = index_recall(mining)
    write_json(stem.with_name(f"{stem.name}.report.json"), report)
    draw(stem.with_name(f"{stem.name}.report.png"), report["scores"])
    return report


def closing_lines(report: dict) -> list[str]:
    """What was mined, for people."""
    counts = report["counts"]
    lines = [f"{counts['rows_written']:,} rows written, {counts['rows_dropped']:,} dropped with too few negatives"]
    for kind in ("passages", "queries"):
        if counts.get(f"{kind}_cut"):
            lines.append(
                f"{counts[f'{kind}_cut']:,} of {counts[kind]:,} {kind} were longer than the model reads, and cut"
            )
    candidates = dict(report["candidates"])
    found = candidates.pop("found")
    removed = ", ".join(f"{name} {count:,}" for name, count in candidates.items() if count and name != "random")
    lines.append(f"{found:,} candidates found; removed: {removed or 'none'}")
    if candidates["random"]:
        lines.append(f"{candidates['random']:,} negatives drawn at random")
    if "recall" in report:
        lines.append(f"recall of the index: {report['recall']:.3f} of the exact best, over a sample of queries")
    return lines


def counts_of(blocks: BlockFolder) -> dict[str, int]:
    """What became of all candidates."""
    total = np.zeros(len(COUNTED), np.int64)
    for block in _each(blocks):
        total += block["counts"]
    return dict(zip(COUNTED, total.tolist(), strict=True))


def histograms(blocks: BlockFolder) -> dict:
    """How many positives and negatives have which score: {"edges": [51], "positives": [50], "negatives": [50]}.

    Empty where nothing has a score.
    """
    lowest, highest = np.inf, -np.inf
    for scores in _scores(blocks):
        for values in scores:
            lowest = min(lowest, values.min(initial=np.inf))
            highest = max(highest, values.max(initial=-np.inf))
    if lowest > highest:
        return {}
    edges = np.linspace(lowest, max(highest, lowest + 1e-6), _BINS + 1)
    totals = np.zeros((2, _BINS), np.int64)
    for scores in _scores(blocks):
        for kind, values in enumerate(scores):
            totals[kind] += np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]
    return {
        "edges": [round(float(edge), 6) for edge in edges],
        "positives": totals[0].tolist(),
        "negatives": totals[1].tolist(),
    }


def hardest(blocks: BlockFolder, texts: MiningTexts) -> list[dict]:
    """The queries whose best negative comes nearest to their positive, or has the highest score without one."""
    best: list[tuple[float, int, int, float, float]] = []  # sorted by distance; of equal ones the lower query is larger
    for number, block in enumerate(_each(blocks)):
        scores = block["scores"][:, 0]
        distances = scores - np.nan_to_num(block["positive"])  # [b]
        for row in np.argsort(-np.nan_to_num(distances, nan=-np.inf), kind="stable")[:HARDEST]:
            if block["numbers"][row, 0] >= 0:
                query = int(blocks.numbers(number)[row])
                facts = (float(distances[row]), -query, int(block["numbers"][row, 0]))
                best.append((*facts, float(scores[row]), float(block["positive"][row])))
        best = heapq.nlargest(HARDEST, best)
    return [_example(texts, -minus_query, *facts) for _, minus_query, *facts in best]


def _example(texts: MiningTexts, query: int, negative: int, score: float, positive_score: float) -> dict:
    """One of the hardest negatives, as it stands in the report."""
    row = texts.rows[np.flatnonzero(texts.rows[:, 0] == query)[0]]
    return {
        "query": texts.queries.get(query)[:_SHOWN],
        "positive": texts.passage(row[1])[:_SHOWN],
        "negative": texts.passage(negative)[:_SHOWN],
        "positive_score": _rounded(positive_score),
        "negative_score": _rounded(score),
    }


def _rounded(score: float) -> float | None:
    """A score for people; None if there is none."""
    return None if np.isnan(score) else round(score, 4)


def index_recall(mining: Mining) -> float:
    """Which share of the exact best range_max an index finds, over a sample of the queries."""
    queries = np.unique(np.linspace(0, len(mining.texts.queries) - 1, SAMPLE).astype(np.int64))
    exact, _ = mining.exact(mining.query_folder.open())(queries, mining.plan.rules.range_max)
    found, _ = mining.finder()(queries, mining.plan.rules.range_max)
    return round(recall(found, exact), 4)


def draw(path: Path, histogram: dict) -> bool:
    """Write a picture of the histograms; False where matplotlib is not installed or there is nothing to draw."""
    if not histogram or not find_spec("matplotlib"):
        return False
    import matplotlib

    matplotlib.use("Agg")  # draws into files, without a screen
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    for kind, colour in (("negatives", "tab:orange"), ("positives", "tab:blue")):
        total = max(sum(histogram[kind]), 1)
        shares = [count / total for count in histogram[kind]]
        axes.stairs(shares, histogram["edges"], fill=True, alpha=0.6, color=colour, label=f"{total:,} {kind}")
    axes.set(xlabel="score", ylabel="share")
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def _each(blocks: BlockFolder) -> Iterator[dict[str, np.ndarray]]:
    for block in range(blocks.count):
        yield blocks.read(block)


def _scores(blocks: BlockFolder) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The scores of each block's positives and of its negatives, without those that have none."""
    for block in _each(blocks):
        positives = block["positive_scores"]
        negatives = block["scores"].ravel()
        yield positives[np.isfinite(positives)], negatives[np.isfinite(negatives)]
