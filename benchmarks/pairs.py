"""Pairs of a query and its passage, negatives for them by words and at random, and raw training files of both.

Every way of mining gives each pair the same number of negatives: where it finds too few, passages drawn at random fill
up, so that all of them train on the same pairs.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from examples.code_search.tuples import instruct
from retrieval.search import BM25, Ranking

RANGE_MIN = 5  # ranks that are left out from the best on: false negatives gather there (F2LLM report)
RANGE_MAX = 100  # the last rank that is looked at


@dataclass(frozen=True)
class Pair:
    """A query, the passage that answers it, and what it is about."""

    query: str  # without instruction
    passage: str
    group: str  # passages of the same group may answer each other's queries: they are not negatives


def random_negatives(pairs: list[Pair], count: int, seed: int = 0) -> list[list[str]]:
    """For each pair `count` passages of other groups, drawn at random."""
    return fill_up(pairs, [[] for _ in pairs], count, seed)


def bm25_negatives(pairs: list[Pair], count: int) -> list[list[str]]:
    """For each pair the `count` passages that share most words with its query, from rank RANGE_MIN + 1 on."""
    index = BM25([pair.passage for pair in pairs])
    found = index.search([pair.query for pair in pairs], RANGE_MAX)
    return negatives_of_ranking(pairs, found, count)


def negatives_of_ranking(pairs: list[Pair], found: Ranking, count: int) -> list[list[str]]:
    """The first `count` passages of each ranking that may be negatives, behind its first RANGE_MIN.

    Args:
        found: [n, k] for the pairs' queries among the pairs' passages.
    """
    mined = []
    for row, pair in enumerate(pairs):
        chosen = []
        for number in found.passages[row, RANGE_MIN:]:
            if pairs[number].group != pair.group:
                chosen.append(pairs[number].passage)
        mined.append(chosen[:count])
    return fill_up(pairs, mined, count)


def fill_up(pairs: list[Pair], mined: list[list[str]], count: int, seed: int = 0) -> list[list[str]]:
    """The mined negatives, and random ones until each pair has `count` different ones.

    Raises:
        ValueError: the pairs of other groups are too few.
    """
    rng = random.Random(seed)
    filled = []
    for pair, negatives in zip(pairs, mined, strict=True):
        chosen = list(negatives)
        attempts = 0
        while len(chosen) < count:
            other = rng.choice(pairs)
            if other.group != pair.group and other.passage not in chosen:
                chosen.append(other.passage)
            attempts += 1
            if attempts > 1000 * count:
                raise ValueError(f"there are not {count} passages of other groups for {pair.query!r}")
        filled.append(chosen)
    return filled


def write_raw(
    path: Path, pairs: list[Pair], negatives: list[list[str]], instruction: str, with_group: bool = False
) -> None:
    """Tuples as Parquet in the published layout: query, passage, negative_1, ...

    Args:
        negatives: of each pair, all as many; may be none.
        instruction: stands before each query; "" = none.
        with_group: a column `group` as well, for the mining command.
    """
    columns = {"query": with_instruction(instruction, pairs), "passage": [pair.passage for pair in pairs]}
    if with_group:
        columns["group"] = [pair.group for pair in pairs]
    for number in range(len(negatives[0])):
        columns[f"negative_{number + 1}"] = [texts[number] for texts in negatives]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def with_instruction(instruction: str, pairs: list[Pair]) -> list[str]:
    """The pairs' queries as a model reads them."""
    if not instruction:
        return [pair.query for pair in pairs]
    return [instruct(instruction, pair.query) for pair in pairs]
