"""The score of chosen pairs of a query and a passage: their cosine, or what a cross-encoder says of them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from retrieval.vectors import Vectors
from utils import RunError, first_line

_PRODUCTS = 2**22  # numbers of the passages' vectors that are in memory at a time: 16 MiB
_PAIRS = 32  # that a cross-encoder reads at once, as many as Sentence Transformers has by default


class Cosines:
    """Cosines by the vectors of all queries and passages.

    Args:
        queries: [n, d] unit vectors.
        passages: [m, d], the same.
    """

    def __init__(self, queries: Vectors, passages: Vectors):
        self.queries = queries
        self.passages = passages

    def score(self, queries: np.ndarray, passages: np.ndarray) -> np.ndarray:
        """fp32 [p], of the pairs of queries [p] and passages [p] by their numbers."""
        scores = np.zeros(len(queries), np.float32)
        step = max(1, _PRODUCTS // self.passages.shape[1])
        for begin in range(0, len(queries), step):
            part = slice(begin, begin + step)
            products = self.queries.take(queries[part]) * self.passages.take(passages[part])
            scores[part] = products.sum(axis=1)
        return scores


class CrossEncoderScores:
    """What a cross-encoder says of pairs.

    Args:
        folder: that Sentence Transformers' CrossEncoder loads.
        query_text, passage_text: a number's text.

    Raises:
        RunError: it cannot be loaded, or the package is not installed.
    """

    def __init__(
        self, folder: Path, query_text: Callable[[int], str], passage_text: Callable[[int], str], device: str = "cpu"
    ):
        try:
            from sentence_transformers import CrossEncoder
        except ImportError:
            raise RunError("a cross-encoder needs the package: pip install sentence-transformers") from None
        try:
            self.model = CrossEncoder(str(folder), device=device, trust_remote_code=False, local_files_only=True)
        except Exception as error:  # of any kind, as the folder's classes raise them
            raise RunError(f"{folder}: no cross-encoder that can be loaded: {first_line(error)}") from None
        if self.model.num_labels != 1:
            raise RunError(f"{folder}: gives {self.model.num_labels} scores to a pair; one is needed")
        self.query_text = query_text
        self.passage_text = passage_text

    @torch.no_grad()
    def score(self, queries: np.ndarray, passages: np.ndarray) -> np.ndarray:
        """fp32 [p], of the pairs of queries [p] and passages [p] by their numbers."""
        pairs = [
            (self.query_text(query), self.passage_text(passage))
            for query, passage in zip(queries.tolist(), passages.tolist(), strict=True)
        ]
        if not pairs:
            return np.zeros(0, np.float32)
        scores = self.model.predict(pairs, batch_size=_PAIRS, show_progress_bar=False, convert_to_numpy=True)
        return np.asarray(scores, np.float32)
