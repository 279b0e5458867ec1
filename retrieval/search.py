"""The best passages for each query: by cosine, exactly, or by the words they share with it (BM25)."""

import re
from typing import NamedTuple

import numpy as np

from utils import RunError, plural

SCORES_AT_ONCE = 2**24  # 64 MiB of fp32; more queries are searched in blocks
_INSIDE_CAMEL_CASE = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


class Ranking(NamedTuple):
    """What a search found for each of n queries, best first; k is smaller than asked where there are fewer passages."""

    passages: np.ndarray  # int [n, k], numbers of passages
    scores: np.ndarray  # float [n, k], the cosine or BM25's score of each, descending


def search(queries: np.ndarray, passages: np.ndarray, k: int) -> Ranking:
    """The k passages with the highest cosine for each query, found by comparing all with all.

    Args:
        queries: float [n, d], rows of unit length, as `encode` gives them.
        passages: float [m, d], the same.
        k: passages per query; where m is smaller, all of them.
    """
    k = min(k, len(passages))
    numbers = np.zeros((len(queries), k), np.int64)
    cosines = np.zeros((len(queries), k), np.result_type(queries, passages))
    rows = max(1, SCORES_AT_ONCE // max(len(passages), 1))
    for start in range(0, len(queries), rows):
        block = slice(start, start + rows)
        numbers[block], cosines[block] = _highest(queries[block] @ passages.T, k)
    return Ranking(numbers, cosines)


def _highest(scores: np.ndarray, k: int) -> Ranking:
    """The k highest scores of each row and where they stand: [rows, m] -> [rows, k], k <= m."""
    columns = np.broadcast_to(np.arange(scores.shape[1]), scores.shape)
    if k < scores.shape[1]:  # sorting k is faster than sorting m
        columns = np.argpartition(-scores, k, axis=1)[:, :k]  # the k highest, in no order
    kept = np.take_along_axis(scores, columns, axis=1)  # [rows, k]
    order = np.argsort(-kept, axis=1, kind="stable")
    return Ranking(np.take_along_axis(columns, order, axis=1), np.take_along_axis(kept, order, axis=1))


class BM25:
    """Search by shared words, of which rare ones count more (Robertson et al. 1994).

    Words are runs of English letters or of digits, so names in code are several: copyFile_to is copy, file, to.

    Args:
        passages: the texts to search in.

    Raises:
        RunError: the package bm25s is not installed.
        ValueError: no passage has a word.
    """

    def __init__(self, passages: list[str]):
        try:
            import bm25s
        except ImportError:
            raise RunError("BM25 needs the package bm25s: pip install bm25s") from None
        self.size = len(passages)
        words = _words(passages)
        if not any(words.ids):
            raise ValueError(f"BM25 finds no word of English letters or digits in {plural(self.size, 'passage')}")
        self.index = bm25s.BM25()
        self.index.index(words, show_progress=False)

    def search(self, queries: list[str], k: int) -> Ranking:
        """The k best passages for each query; all where there are fewer. Those that share no word with it score 0."""
        k = min(k, self.size)
        if not queries:  # the package cannot
            return Ranking(np.zeros((0, k), np.int64), np.zeros((0, k), np.float32))
        numbers, scores = self.index.retrieve(_words(queries), k=k, show_progress=False, n_threads=-1)
        return Ranking(numbers, scores)


def _words(texts: list[str]):
    """The words of each text, in lower case and without English stop words, as numbers that bm25s understands."""
    import bm25s

    spaced = [_INSIDE_CAMEL_CASE.sub(" ", text) for text in texts]
    return bm25s.tokenize(spaced, token_pattern=r"[a-z]+|[0-9]+", stopwords="en", show_progress=False)
