"""The best passages for each query: by cosine, exactly, or by words."""

import re

import bm25s
import numpy as np

_CAPITAL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


def top(queries: np.ndarray, passages: np.ndarray, k: int) -> np.ndarray:
    """Numbers of the k passages with the highest cosine for each query, best first: int [n, k]."""
    scores = queries @ passages.T
    best = np.argpartition(-scores, k, axis=1)[:, :k]
    return np.take_along_axis(
        best, np.argsort(-np.take_along_axis(scores, best, axis=1), axis=1, kind="stable"), axis=1
    )


class BM25:
    """BM25 over passages; identifiers are split at underscores and capitals."""

    def __init__(self, passages: list[str]):
        self.index = bm25s.BM25()
        self.index.index(_words(passages), show_progress=False)

    def search(self, queries: list[str], k: int) -> np.ndarray:
        """Numbers of the k best passages for each query, best first: int [queries, k]."""
        return self.index.retrieve(_words(queries), k=k, show_progress=False, n_threads=-1, return_as="documents")


def _words(texts: list[str]):
    spaced = [_CAPITAL.sub(" ", text) for text in texts]
    return bm25s.tokenize(spaced, token_pattern=r"[a-z]+|[0-9]+", stopwords="en", show_progress=False)
