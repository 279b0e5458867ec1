"""Three frozen distributions of text lengths, for measurements that everybody can repeat without data.

Lengths are quantiles of log-normal distributions, so they depend on no random generator. `tuples` gives them the shape
of a step: a query, a positive and hard negatives for each of several tuples.
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


def tuples(name: str, count: int, negatives: int = 7) -> np.ndarray:
    """Token counts of `count` tuples, int64 [count, 2 + negatives]: query, positive, negatives."""
    median, spread, longest, query = SHAPES[name]
    quantiles = (np.arange(count * (1 + negatives)) + 0.5) / (count * (1 + negatives))
    passages = np.array([median * np.exp(spread * NormalDist().inv_cdf(q)) for q in quantiles])
    order = np.argsort((np.arange(len(passages)) * 0.6180339887498949) % 1)  # spread evenly, without a generator
    passages = np.clip(passages[order], 4, longest).astype(np.int64).reshape(count, 1 + negatives)
    queries = np.maximum(4, query + (np.arange(count) % 7 - 3) * query // 8)
    return np.concatenate([queries[:, None], passages], axis=1)


def packed(lengths: np.ndarray, vocabulary: int, device: str = "cpu") -> tuple[Tensor, Tensor, np.ndarray]:
    """(tokens [T], cu_seqlens [n + 1], lengths [n]) of texts of these lengths, their ids a fixed sequence."""
    flat = lengths.flatten()
    tokens = (torch.arange(int(flat.sum()), device=device) * 7919) % vocabulary
    return tokens, torch.tensor([0, *np.cumsum(flat)], dtype=torch.int32, device=device), flat


def padding_ratio(lengths: np.ndarray) -> float:
    """Positions of one rectangle around all texts, over tokens."""
    return lengths.size * lengths.max() / lengths.sum()
