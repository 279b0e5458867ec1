"""How well a ranking answers its queries."""

import numpy as np


def metrics(found: np.ndarray) -> dict[str, float]:
    """nDCG@10, MRR@10 and recall@10 when passage i alone answers query i.

    With one right answer at rank r the ideal DCG is 1, so nDCG is 1 / log2(1 + r), and 0 beyond rank 10.

    Args:
        found: int [n, 10] passages by rank.
    """
    hits = found == np.arange(len(found))[:, None]  # [n, 10], one True a row at most
    ranks = np.arange(1, found.shape[1] + 1)
    return {
        "nDCG@10": float((hits / np.log2(1 + ranks)).sum(axis=1).mean()),
        "MRR@10": float((hits / ranks).sum(axis=1).mean()),
        "recall@10": float(hits.any(axis=1).mean()),
    }
