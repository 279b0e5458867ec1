"""How well a ranking answers its queries."""

import numpy as np


def score(ranking: np.ndarray) -> dict[str, float]:
    """nDCG@10, MRR@10 and recall@10 when passage i, and no other, answers query i.

    With one right answer at rank r the ideal DCG is 1, so nDCG is 1 / log2(1 + r), and 0 beyond rank 10.

    Args:
        ranking: int [n, k], for each query the numbers of its passages, best first; the first 10 count.
    """
    ranking = ranking[:, :10]
    is_right = ranking == np.arange(len(ranking))[:, None]  # [n, 10], at most one True per query
    ranks = np.arange(1, ranking.shape[1] + 1)  # [10]
    return {
        "nDCG@10": float((is_right / np.log2(1 + ranks)).sum(axis=1).mean()),
        "MRR@10": float((is_right / ranks).sum(axis=1).mean()),
        "recall@10": float(is_right.any(axis=1).mean()),
    }
