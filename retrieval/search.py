"""The best passages for each query: by cosine, exactly, or by the words they share with it (BM25).

One rule for ties holds everywhere: of equal scores the lower number comes first.
"""

import re
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils import RunError, plural

QUERIES_AT_ONCE = 512  # that are compared with a chunk of passages
SCORES_AT_ONCE = 2**24  # 64 MiB of fp32: chunks of passages are cut by it
SEVERAL_GROUPS = -2  # the group of a passage that is in more than one: no query with a group finds it
_INSIDE_CAMEL_CASE = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


class Ranking(NamedTuple):
    """What a search found for each of n queries, best first; k is smaller than asked where there are fewer passages."""

    passages: np.ndarray  # int [n, k], numbers of passages
    scores: np.ndarray  # float [n, k], the cosine or BM25's score of each, descending


class Groups(NamedTuple):
    """The group of each query and of each passage, -1 for none: a query finds no passage of its own group."""

    queries: np.ndarray  # int64 [n]
    passages: np.ndarray  # int64 [m]


def groups_of_some(groups: Groups | None, queries: np.ndarray | slice) -> Groups | None:
    """The groups of some of the queries, given by their numbers, and of all passages; None stays None."""
    if groups is None:
        return None
    return Groups(groups.queries[queries], groups.passages)


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Each row of [n, d] divided by its length; needed again after vectors were cut to their first dimensions."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def search(
    queries: np.ndarray, passages: np.ndarray, k: int, device: str = "cpu", groups: Groups | None = None
) -> Ranking:
    """The k passages with the highest cosine for each query, found by comparing all with all.

    Memory does not grow with the passages where these lie on a disk: they are read chunk by chunk.

    Args:
        queries: float [n, d], rows of unit length, as `encode` gives them.
        passages: float [m, d], the same; also retrieval.vectors.Vectors, which lie on a disk.
        k: passages per query; where m is smaller, all of them.
        device: where products are computed.
        groups: what a query may not find; such passages, if there are no others, come last with a score of -inf.
    """
    k = min(k, len(passages))
    numbers = np.zeros((len(queries), k), np.int64)
    cosines = np.zeros((len(queries), k), np.result_type(queries, passages.dtype))
    for start in range(0, len(queries), QUERIES_AT_ONCE):
        block = slice(start, start + QUERIES_AT_ONCE)
        rows = torch.from_numpy(np.ascontiguousarray(queries[block], cosines.dtype)).to(device)  # [b, d]
        found = _search_block(rows, passages, k, groups_of_some(groups, block))
        numbers[block] = found.numbers.cpu().numpy()
        cosines[block] = found.scores.cpu().numpy()
    return Ranking(numbers, cosines)


def highest(scores: np.ndarray, k: int) -> Ranking:
    """The k highest scores of each row, and in which columns they stand: [rows, m] -> [rows, k], k <= m."""
    best = _Best(torch.from_numpy(scores), k)
    best.add(torch.from_numpy(scores), 0)
    return Ranking(best.numbers.numpy(), best.scores.numpy())


def merge(rankings: list[Ranking], k: int) -> Ranking:
    """The k best of several searches for the same queries, among different passages."""
    numbers = np.concatenate([ranking.passages for ranking in rankings], axis=1)
    scores = np.concatenate([ranking.scores for ranking in rankings], axis=1)
    order = np.lexsort((numbers, -scores), axis=1)[:, :k]  # by score, and where it is equal by number
    return Ranking(np.take_along_axis(numbers, order, 1), np.take_along_axis(scores, order, 1))


class Nearest:
    """The k nearest passages of each query so far, of passages that come chunk by chunk, from the lowest numbers on.

    Args:
        queries: [n, d], rows of unit length; on the device that computes.
    """

    def __init__(self, queries: Tensor, k: int):
        self.blocks = queries.split(QUERIES_AT_ONCE)
        self.best = [_Best(block, k) for block in self.blocks]

    def add(self, passages: Tensor, begin: int) -> None:
        """Compare all queries with the passages [b, d], which are those of the numbers from `begin` on."""
        if not len(passages):
            return
        for block, best in zip(self.blocks, self.best, strict=True):
            best.add(block @ passages.T, begin)

    def found(self) -> tuple[Tensor, Tensor]:
        """Numbers int64 and scores [n, k], best first; narrower while fewer passages have come."""
        return torch.cat([best.numbers for best in self.best]), torch.cat([best.scores for best in self.best])


def _search_block(queries: Tensor, passages: np.ndarray, k: int, groups: Groups | None) -> "_Best":
    """The k best of all passages for a block of queries [b, d]; `groups` are those of the block."""
    best = _Best(queries, k)
    width = max(1, SCORES_AT_ONCE // len(queries))
    for begin in range(0, len(passages), width):
        chunk = torch.tensor(np.asarray(passages[begin : begin + width]), dtype=queries.dtype, device=queries.device)
        scores = queries @ chunk.T  # [b, width]
        if groups is not None:
            is_own = in_own_group(groups.queries[:, None], groups.passages[begin : begin + width])  # [b, width]
            scores.masked_fill_(torch.from_numpy(is_own).to(scores.device), -torch.inf)
        best.add(scores, begin)
    return best


def in_own_group(of_queries: np.ndarray, of_passages: np.ndarray) -> np.ndarray:
    """Whether passages of these groups may be in the group of the query: bool, of shapes that go together."""
    return (of_queries >= 0) & ((of_passages == of_queries) | (of_passages == SEVERAL_GROUPS))


class _Best:
    """The best k columns of each row so far, of scores that come chunk by chunk, from the lowest numbers on."""

    def __init__(self, like: Tensor, k: int):
        self.k = k
        self.scores = like.new_zeros(len(like), 0)  # [b, at most k], descending
        self.numbers = torch.zeros_like(self.scores, dtype=torch.int64)

    def add(self, scores: Tensor, begin: int) -> None:
        """Take what is good enough of scores [b, m], which are those of the numbers from `begin` on."""
        if not self.k:
            return
        if self.scores.shape[1] == self.k:
            # A score equal to the last one comes behind it, for its number is higher. Few pass, so little is sorted.
            wanted = scores > self.scores[:, -1:]
        elif scores.shape[1] > self.k:
            wanted = scores >= scores.topk(self.k, dim=1).values[:, -1:]  # also all that equal the last of them
        else:
            wanted = torch.ones_like(scores, dtype=torch.bool)
        counts = wanted.sum(dim=1)  # [b]
        longest = int(counts.max())
        if not longest:
            return
        rows, columns = wanted.nonzero(as_tuple=True)  # row by row, columns ascending
        starts = counts.cumsum(0) - counts
        places = torch.arange(len(rows), device=rows.device) - starts[rows]
        found = scores.new_full((len(scores), longest), -torch.inf)
        found[rows, places] = scores[rows, columns]
        numbers = torch.zeros_like(found, dtype=torch.int64)
        numbers[rows, places] = columns + begin
        self._merge(found, numbers)

    def _merge(self, scores: Tensor, numbers: Tensor) -> None:
        """Sort them in behind the best, whose numbers are all lower; a stable sort keeps equal scores in that order."""
        scores, order = torch.cat([self.scores, scores], dim=1).sort(dim=1, descending=True, stable=True)
        self.scores = scores[:, : self.k].contiguous()
        self.numbers = torch.cat([self.numbers, numbers], dim=1).gather(1, order)[:, : self.k].contiguous()


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
        """The k best passages for each query; all where there are fewer. Those that share no word with it score 0.

        Equal scores come in the order in which the package has them; `rank` orders them by number.
        """
        k = min(k, self.size)
        if not queries:  # the package cannot
            return Ranking(np.zeros((0, k), np.int64), np.zeros((0, k), np.float32))
        numbers, scores = self.index.retrieve(_words(queries), k=k, show_progress=False, n_threads=-1)
        return Ranking(numbers, scores)

    def rank(self, queries: list[str], k: int, groups: Groups | None = None) -> Ranking:
        """The same, of equal scores the lower number first; slower, as all scores of a query are looked at.

        Args:
            groups: what a query may not find scores 0.
        """
        k = min(k, self.size)
        numbers = np.zeros((len(queries), k), np.int64)
        scores = np.zeros((len(queries), k), np.float32)
        for row, words in enumerate(_words(queries, as_numbers=False)):
            of_all = np.zeros(self.size, np.float32)
            if words:
                of_all = np.asarray(self.index.get_scores(words), np.float32)  # [m]
            if groups is not None:
                of_all[in_own_group(groups.queries[row], groups.passages)] = 0
            numbers[row : row + 1], scores[row : row + 1] = highest(of_all[None], k)
        return Ranking(numbers, scores)


def _words(texts: list[str], as_numbers: bool = True):
    """The words of each text, in lower case and without English stop words.

    Args:
        as_numbers: as bm25s understands them; else a list of words for each text.
    """
    import bm25s

    spaced = [_INSIDE_CAMEL_CASE.sub(" ", text) for text in texts]
    return bm25s.tokenize(
        spaced, token_pattern=r"[a-z]+|[0-9]+", stopwords="en", show_progress=False, return_ids=as_numbers
    )
