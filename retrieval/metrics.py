"""How well rankings answer their queries: nDCG@10, MRR@10, recall@10, recall@100 and MAP@100, as trec_eval has them.

A document of a score above 0 is relevant. nDCG's gain is the score itself (trec_eval's ndcg_cut), and the ideal ranking
has the best of all judged documents first. MAP divides by all relevant documents, found or not (map_cut). A query that
has none counts as 0.
"""

from collections.abc import Sequence

import numpy as np

DEPTH = 100  # of a ranking that is looked at
METRICS = ("nDCG@10", "MRR@10", "recall@10", "recall@100", "MAP@100")


def evaluate(ranking: np.ndarray, relevance: Sequence[dict[int, int]]) -> dict[str, float]:
    """Metric -> mean over the queries.

    Args:
        ranking: int [n, k], for each query the numbers of its documents, best first; k may be above DEPTH, or below
            where there are fewer documents.
        relevance: [n], for each query document number -> score.
    """
    return {name: float(values.mean()) for name, values in by_query(ranking, relevance).items()}


def by_query(ranking: np.ndarray, relevance: Sequence[dict[int, int]]) -> dict[str, np.ndarray]:
    """Metric -> its value for each query, fp64 [n]; the arguments are those of `evaluate`."""
    gains = _gains(ranking[:, :DEPTH], relevance)  # [n, k]
    is_right = gains > 0
    ranks = np.arange(1, gains.shape[1] + 1)  # [k]
    relevant = np.array([sum(score > 0 for score in scores.values()) for scores in relevance])  # [n]
    relevant = np.maximum(relevant, 1)  # where there are none, nothing is found either
    precision = is_right.cumsum(axis=1) / ranks  # [n, k]
    return {
        "nDCG@10": _discounted(gains[:, :10]) / _ideal(relevance),
        "MRR@10": (is_right[:, :10] / ranks[:10]).max(axis=1, initial=0.0),
        "recall@10": is_right[:, :10].sum(axis=1) / relevant,
        "recall@100": is_right.sum(axis=1) / relevant,
        "MAP@100": (precision * is_right).sum(axis=1) / relevant,
    }


def score(ranking: np.ndarray) -> dict[str, float]:
    """nDCG@10, MRR@10 and recall@10 when passage i, and no other, answers query i.

    Args:
        ranking: int [n, k], for each query the numbers of its passages, best first; the first 10 count.
    """
    means = evaluate(ranking[:, :10], [{number: 1} for number in range(len(ranking))])
    return {name: means[name] for name in ("nDCG@10", "MRR@10", "recall@10")}


def _gains(ranking: np.ndarray, relevance: Sequence[dict[int, int]]) -> np.ndarray:
    """What each place of a ranking gains, int [n, k]; 0 if the document is not relevant."""
    gains = np.zeros(ranking.shape, np.int64)
    for row, (documents, scores) in enumerate(zip(ranking.tolist(), relevance, strict=True)):
        for place, document in enumerate(documents):
            gains[row, place] = max(0, scores.get(document, 0))
    return gains


def _discounted(gains: np.ndarray) -> np.ndarray:
    """DCG of gains [n, k], fp64 [n]."""
    return (gains / np.log2(2 + np.arange(gains.shape[1]))).sum(axis=1)


def _ideal(relevance: Sequence[dict[int, int]]) -> np.ndarray:
    """DCG@10 of the best ranking there is, fp64 [n]; 1 where nothing is relevant, to divide by."""
    best = np.zeros((len(relevance), 10), np.int64)
    for row, scores in enumerate(relevance):
        gains = sorted((score for score in scores.values() if score > 0), reverse=True)[:10]
        best[row, : len(gains)] = gains
    ideal = _discounted(best)
    return np.where(ideal > 0, ideal, 1.0)
