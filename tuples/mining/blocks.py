"""Negatives for the distinct queries, block by block: found, scored, chosen, filled up, and kept on the disk.

    00000.npz    the negatives of a block's queries, their scores, the scores of all positives, and what was removed

A block is written under a temporary name and renamed when it is whole, so after a kill only missing blocks are mined.
"""

import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from retrieval.search import Groups, in_own_group
from tuples.mining.rules import REMOVED, Candidates, Negatives, Rules, best_first, choose, passes
from tuples.mining.texts import MiningTexts

BLOCK = 512  # queries
_SMALL = 4096  # passages that are shuffled as a whole where some are drawn at random
COUNTED = ("found", *REMOVED, "random")  # what a block counts, in this order

# (queries [b], k) -> (passages int64 [b, k], -1 for none; scores float32 [b, k], descending)
Find = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]


class Scorer(Protocol):
    """Scores pairs of a query and a passage; the two implementations are in retrieval/rescore.py."""

    def score(self, queries: np.ndarray, passages: np.ndarray) -> np.ndarray:
        """fp32 [p], of queries [p] and passages [p] by their numbers."""


class Positives:
    """The passages that answer each query: those of all rows whose query has the same words.

    Queries of the same words are one topic, whatever instruction stands before them.
    """

    def __init__(self, texts: MiningTexts):
        good = texts.rows[texts.rows[:, 0] >= 0]
        self.topics = np.asarray(texts.topics[:, 0])  # [queries]
        self.passages = len(texts.passages)
        pairs = self._keys(self.topics[good[:, 0]], good[:, 1])
        self.pairs = np.unique(pairs)  # [p], sorted: the topics in order
        topics = int(self.topics.max(initial=-1)) + 1
        self.starts = np.searchsorted(self.pairs, np.arange(topics + 1) * self.passages)  # [topics + 1]
        rows_of_topic = np.bincount(self.topics[good[:, 0]], minlength=topics)
        self.most_rows = int(rows_of_topic.max(initial=0))  # of one topic

    def of(self, query: int) -> np.ndarray:
        """The numbers of a query's positives, ascending."""
        topic = self.topics[query]
        return self.pairs[self.starts[topic] : self.starts[topic + 1]] - topic * self.passages

    def contain(self, queries: np.ndarray, passages: np.ndarray) -> np.ndarray:
        """Which of the passages [b, k] are positives of their row's query, queries [b]: bool [b, k]."""
        keys = self._keys(self.topics[queries][:, None], passages)
        places = np.searchsorted(self.pairs, keys).clip(max=len(self.pairs) - 1)
        return (self.pairs[places] == keys) & (passages >= 0)

    def _keys(self, topics: np.ndarray, passages: np.ndarray) -> np.ndarray:
        """One number for each pair of a topic and a passage."""
        return topics * self.passages + passages


def groups_of(texts: MiningTexts) -> Groups | None:
    """The group of each query and of each passage; None if no query has one."""
    of_queries = np.ascontiguousarray(texts.topics[:, 2])
    if (of_queries < 0).all():
        return None
    return Groups(of_queries, np.asarray(texts.groups))


@dataclass(frozen=True)
class Miner:
    """Mines one block after another."""

    texts: MiningTexts
    positives: Positives
    groups: Groups | None
    rules: Rules
    find: Find
    scorer: Scorer | None  # of positives and random passages; None if nothing can score them (BM25 without a model)
    rescore: bool  # whether `scorer` also scores what `find` found, which is then sorted again
    fill: bool  # whether random passages fill up rows with too few negatives

    def mine(self, queries: np.ndarray) -> dict[str, np.ndarray]:
        """The arrays of one block: queries [b], by their numbers."""
        width = min(self.rules.range_max + self.positives.most_rows, len(self.texts.passages))
        numbers, scores = self.find(queries, width)
        if self.rescore:
            numbers, scores = best_first(numbers, self._score(queries, numbers))
        positive, positive_scores = self._positive_scores(queries)
        found = Candidates(numbers, scores, self._is_same(queries, numbers))
        chosen = choose(found, positive, self.rules, queries)
        drawn = 0
        if self.fill:
            for row, query in enumerate(queries):
                drawn += self._fill(chosen, row, found, positive, query)
        counts = {"found": int((numbers >= 0).sum()), **chosen.removed, "random": drawn}
        return {
            "numbers": chosen.numbers,
            "scores": chosen.scores,
            "positive": positive,
            "positive_scores": positive_scores,
            "counts": np.array([counts[name] for name in COUNTED], np.int64),
        }

    def _is_same(self, queries: np.ndarray, passages: np.ndarray) -> np.ndarray:
        """Which passages [b, k] are never negatives: positives, the query itself, its group; bool [b, k]."""
        same = self.positives.contain(queries, passages)
        own = self.texts.topics[queries, 1][:, None]
        same |= (passages == own) & (passages >= 0)
        if self.groups is not None:
            of_query = self.groups.queries[queries][:, None]
            same |= in_own_group(of_query, self.groups.passages[passages]) & (passages >= 0)
        return same

    def _score(self, queries: np.ndarray, passages: np.ndarray) -> np.ndarray:
        """The scores of passages [b, k] by number, -inf where there is none."""
        scores = np.full(passages.shape, -np.inf, np.float32)
        rows, columns = np.nonzero(passages >= 0)
        scores[rows, columns] = self.scorer.score(queries[rows], passages[rows, columns])
        return scores

    def _positive_scores(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The lowest score among each query's positives, float32 [b], and the scores of all positives in one array.

        Without a scorer the first is NaN and the second empty.
        """
        positives = [self.positives.of(query) for query in queries]
        counts = np.array([len(numbers) for numbers in positives])
        if self.scorer is None:
            return np.full(len(queries), np.nan, np.float32), np.zeros(0, np.float32)
        scores = self.scorer.score(np.repeat(queries, counts), np.concatenate(positives))
        return np.minimum.reduceat(scores, np.cumsum(counts) - counts), scores

    def _fill(self, chosen: Negatives, row: int, found: Candidates, positive: np.ndarray, query: int) -> int:
        """Add random passages to a row that has too few negatives; returns how many.

        A passage that the search found is never added: if a rule removed it, it may well be a correct answer.
        """
        free = np.flatnonzero(chosen.numbers[row] < 0)
        if not len(free):
            return 0
        drawn = self._draw(query, 8 * len(free) + 64)
        was_found = np.isin(drawn, found.numbers[row])
        is_same = self._is_same(np.array([query]), drawn[None])[0]
        drawn = drawn[~was_found & ~is_same]
        scores = np.full(len(drawn), np.nan, np.float32)
        if self.scorer is not None:
            scores = self.scorer.score(np.full(len(drawn), query), drawn)
            passed = passes(self.rules, scores[None], positive[row : row + 1])
            good = np.logical_and.reduce([of_rule[0] for of_rule in passed.values()])
            drawn = drawn[good]
            scores = scores[good]
        places = free[: len(drawn)]
        chosen.numbers[row, places] = drawn[: len(places)]
        chosen.scores[row, places] = scores[: len(places)]
        return len(places)

    def _draw(self, query: int, count: int) -> np.ndarray:
        """Different random passages for a query, at most `count` of a large corpus; query and seed decide which."""
        random = np.random.default_rng([self.rules.seed, int(query), 1])
        passages = len(self.texts.passages)
        if passages <= _SMALL:
            return random.permutation(passages)
        drawn = random.integers(0, passages, count)
        _, first = np.unique(drawn, return_index=True)
        return drawn[np.sort(first)]


# ------------------------------------------------------------------------------------ on the disk


@dataclass(frozen=True)
class BlockFolder:
    """Where the blocks of all distinct queries are, or will be."""

    folder: Path
    queries: int

    @property
    def count(self) -> int:
        """Blocks in all, written or not."""
        return -(-self.queries // BLOCK)

    def numbers(self, block: int) -> np.ndarray:
        """The numbers of a block's queries."""
        return np.arange(block * BLOCK, min((block + 1) * BLOCK, self.queries))

    def missing(self) -> list[int]:
        """The blocks that are not there."""
        return [block for block in range(self.count) if not self._path(block).exists()]

    def write(self, block: int, arrays: dict[str, np.ndarray]) -> None:
        """Write one block: whole, or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        aside = self.folder / f".{block:05}.{os.getpid()}"
        with open(aside, "wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, self._path(block))

    def read(self, block: int) -> dict[str, np.ndarray]:
        """What `write` was given."""
        with np.load(self._path(block), allow_pickle=False) as file:
            return {name: file[name] for name in file.files}

    def remove_damaged(self) -> None:
        """Take away blocks that cannot be read, so that they are mined again."""
        for block in range(self.count):
            if self._path(block).exists() and not zipfile.is_zipfile(self._path(block)):
                self._path(block).unlink(missing_ok=True)

    def _path(self, block: int) -> Path:
        return self.folder / f"{block:05}.npz"
