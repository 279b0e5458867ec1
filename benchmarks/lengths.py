"""Frozen distributions of text lengths, for measurements that everybody can repeat without data.

Three are quantiles of log-normal distributions, so they depend on no random generator; code search was measured on the
quickstart's data, cut at 512 tokens. `tuples` gives them the shape of a step: a query, a positive, hard negatives.
"""

from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

SHAPES = {  # name -> (median tokens of a passage, spread, longest, tokens of a query)
    "heavy-tailed": (90, 1.1, 1024, 24),
    "MS-MARCO-like": (75, 0.32, 512, 12),
    "long documents": (620, 0.75, 1024, 40),
}

SHARES = (0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1)
MEASURED = {  # name -> tokens below which each of these shares of the passages lies, and of the queries
    "code search": (
        (7, 26, 39, 65, 96, 131, 174, 229, 305, 405, 459, 493, 512),
        (24, 27, 28, 29, 31, 32, 34, 35, 38, 43, 55, 68, 173),
    )
}
SHORTEST = 4  # tokens
GOLDEN_RATIO = 0.6180339887498949  # its multiples modulo 1 fill the unit interval evenly and never repeat


def tuples(name: str, count: int, negatives: int = 7) -> np.ndarray:
    """Token counts of `count` tuples, int64 [count, 2 + negatives]: query, positive, negatives."""
    passage_shares = quantiles(count * (1 + negatives))
    if name in MEASURED:
        passage_table, query_table = MEASURED[name]
        passages = np.interp(passage_shares, SHARES, passage_table)
        queries = np.interp(quantiles(count), SHARES, query_table)
    else:
        median, spread, longest, query = SHAPES[name]
        normal = np.array([NormalDist().inv_cdf(share) for share in passage_shares])
        passages = np.clip(median * np.exp(spread * normal), SHORTEST, longest)
        eighths = np.arange(count) % 7 - 3  # queries are between 5/8 and 11/8 of the usual one
        queries = np.maximum(SHORTEST, query + eighths * query // 8)
    passages = passages.reshape(count, 1 + negatives)
    return np.concatenate([queries[:, None], passages], axis=1).astype(np.int64)


def quantiles(count: int) -> np.ndarray:
    """`count` shares evenly between 0 and 1, in an order that mixes small and large without a generator."""
    shares = (np.arange(count) + 0.5) / count
    order = np.argsort((np.arange(count) * GOLDEN_RATIO) % 1)
    return shares[order]


def packed(lengths: np.ndarray, vocabulary: int, device: str = "cpu") -> tuple[Tensor, Tensor, np.ndarray]:
    """(tokens [T], cu_seqlens [n + 1], lengths [n]) of texts of these lengths, their ids a fixed sequence."""
    flat = lengths.flatten()
    tokens = (torch.arange(int(flat.sum()), device=device) * 7919) % vocabulary
    cu_seqlens = torch.tensor([0, *np.cumsum(flat)], dtype=torch.int32, device=device)
    return tokens, cu_seqlens, flat


def padding_ratio(lengths: np.ndarray) -> float:
    """Positions of one rectangle around all texts, over their tokens."""
    return lengths.size * lengths.max() / lengths.sum()
