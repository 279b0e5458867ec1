"""Retrieval metrics on held-out functions: each query has one right answer among all of them."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from backbone import load_backbone
from model import Embedder
from tokenizer import load_tokenizer, make_encoder

BATCH = 256  # texts embedded together


@torch.no_grad()
def embed(folder: Path, texts: list[str], max_length: int) -> np.ndarray:
    """Unit vectors [n, d] of a saved model folder (or a bare backbone), texts of like length together."""
    tokenizer, problems = load_tokenizer(str(folder))
    if problems:
        raise ValueError(problems[0])
    model = Embedder(load_backbone(str(folder), torch.float32)).eval()
    encode = make_encoder(tokenizer, max_length)
    order = np.argsort([len(text) for text in texts])
    vectors = np.zeros((len(texts), model.hidden_size), np.float32)
    for batch in np.array_split(order, -(-len(texts) // BATCH)):
        tokens, lengths, _ = encode([texts[i] for i in batch])
        cu_seqlens = F.pad(torch.from_numpy(lengths).cumsum(0), (1, 0)).to(torch.int32)
        states = model(torch.from_numpy(tokens).long(), cu_seqlens, lengths)  # [batch, d]
        vectors[batch] = F.normalize(states, dim=-1).numpy()
    return vectors


def top(queries: np.ndarray, passages: np.ndarray, k: int) -> np.ndarray:
    """Numbers of the k passages with the highest cosine for each query, best first: int [n, k]."""
    scores = queries @ passages.T
    best = np.argpartition(-scores, k, axis=1)[:, :k]
    return np.take_along_axis(
        best, np.argsort(-np.take_along_axis(scores, best, axis=1), axis=1, kind="stable"), axis=1
    )


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
