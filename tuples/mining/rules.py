"""Which of the passages that a search found become hard negatives: pure functions of numbers and scores.

A public summary of the report says that it mined with Sentence Transformers. So the rules, their names and their order
are those of its `mine_hard_negatives`; tests/tuples/test_mining_rules.py compares the two. In this order a candidate is
removed because

    same              it is a positive of the query, the query itself, or of its group
    absolute_margin   its score is not below the positive's score minus this
    relative_margin   its score is not below the positive's score minus this share of its size
    max_score         its score is not below this
    min_score         its score is below this
    range_min         it is among the first of what is left
    range_max         it is behind so many of what is left
    num_negatives     enough better ones are left

"The positive's score" is the lowest of a query's positives. With ranks="found" the two ranges count what was found,
before any score is looked at.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

REMOVED = (
    "same",
    "absolute_margin",
    "relative_margin",
    "max_score",
    "min_score",
    "range_min",
    "range_max",
    "num_negatives",
)


@dataclass(frozen=True)
class Rules:
    """The numbers of the rules, by the names that Sentence Transformers has for them; None switches a rule off."""

    range_min: int = 5
    range_max: int = 100
    max_score: float | None = 0.8
    min_score: float | None = None
    absolute_margin: float | None = None
    relative_margin: float | None = 0.05
    num_negatives: int = 24
    sampling_strategy: str = "top"  # or "random": any of what is left, in the order of their scores
    ranks: str = "kept"  # range_min and range_max count what the scores left; or "found": all that was found
    seed: int = 42  # of what is drawn at random


class Candidates(NamedTuple):
    """What a search found for each of b queries, best first."""

    numbers: np.ndarray  # int64 [b, k], passages; -1 for none
    scores: np.ndarray  # float32 [b, k], descending
    same: np.ndarray  # bool [b, k]: a positive, the query itself, or of its group


@dataclass(frozen=True)
class Negatives:
    """The negatives of b queries, and what became of all other candidates."""

    numbers: np.ndarray  # int64 [b, num_negatives], best first; -1 behind the last
    scores: np.ndarray  # float32 [b, num_negatives], NaN behind the last
    removed: dict[str, int] = field(default_factory=dict)  # of REMOVED -> candidates


def limits(rules: Rules, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What a negative's score must stay below by the absolute and by the relative margin: float32 [b] both.

    Args:
        positive: float32 [b], the score of each query's positive.
    """
    nothing = np.full(len(positive), np.inf, np.float32)
    absolute = nothing
    relative = nothing
    if rules.absolute_margin is not None:
        absolute = positive - np.float32(rules.absolute_margin)
    if rules.relative_margin is not None:  # of its size: a cross-encoder's score may be negative
        relative = positive - np.abs(positive) * np.float32(rules.relative_margin)
    return absolute, relative


def passes(rules: Rules, scores: np.ndarray, positive: np.ndarray) -> dict[str, np.ndarray]:
    """Which scores [b, k] pass each of the rules that look at scores, in their order: name -> bool [b, k]."""
    absolute, relative = limits(rules, positive)
    passed = {
        "absolute_margin": scores < absolute[:, None],
        "relative_margin": scores < relative[:, None],
        "max_score": np.ones(scores.shape, bool),
        "min_score": np.ones(scores.shape, bool),
    }
    if rules.max_score is not None:
        passed["max_score"] = scores < np.float32(rules.max_score)
    if rules.min_score is not None:
        passed["min_score"] = scores >= np.float32(rules.min_score)
    return passed


def choose(found: Candidates, positive: np.ndarray, rules: Rules, queries: np.ndarray) -> Negatives:
    """Apply the rules to what was found for b queries.

    Args:
        positive: float32 [b], the lowest score among each query's positives; where no rule looks at scores, anything.
        queries: int64 [b], the numbers of the queries: what is drawn at random depends on them and on the seed alone.
    """
    removed = {}
    there = found.numbers >= 0
    kept = there & ~found.same
    removed["same"] = int((there & found.same).sum())
    found_ranks = _ranks(kept)
    for name, passed in passes(rules, found.scores, positive).items():
        removed[name] = int((kept & ~passed).sum())
        kept = kept & passed
    ranks = _ranks(kept)
    if rules.ranks == "found":
        ranks = found_ranks
    removed["range_min"] = int((kept & (ranks < rules.range_min)).sum())
    removed["range_max"] = int((kept & (ranks >= rules.range_max)).sum())
    kept = kept & (ranks >= rules.range_min) & (ranks < rules.range_max)
    taken = kept & (_ranks(kept) < rules.num_negatives)
    if rules.sampling_strategy == "random":
        taken = _drawn(kept, rules, queries)
    removed["num_negatives"] = int((kept & ~taken).sum())
    return Negatives(*_left_aligned(found, taken, rules.num_negatives), removed)


def _ranks(kept: np.ndarray) -> np.ndarray:
    """How many of a row are kept before each place, [b, k]."""
    return np.cumsum(kept, axis=1) - kept


def _drawn(kept: np.ndarray, rules: Rules, queries: np.ndarray) -> np.ndarray:
    """num_negatives of those that are kept in each row, all where there are fewer: bool [b, k]."""
    taken = np.zeros_like(kept)
    for row, query in enumerate(queries):
        places = np.flatnonzero(kept[row])
        random = np.random.default_rng([rules.seed, int(query)])
        taken[row, random.permutation(places)[: rules.num_negatives]] = True
    return taken


def _left_aligned(found: Candidates, taken: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The numbers and scores of what is taken, from the left on: [b, width] both."""
    numbers = np.full((len(taken), width), -1, np.int64)
    scores = np.full((len(taken), width), np.nan, np.float32)
    rows, columns = np.nonzero(taken)
    places = _ranks(taken)[rows, columns]
    numbers[rows, places] = found.numbers[rows, columns]
    scores[rows, places] = found.scores[rows, columns]
    return numbers, scores


def best_first(numbers: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Candidates [b, k] sorted by new scores, of equal ones the lower number first; -1 for none comes last."""
    scores = np.where(numbers >= 0, scores, -np.inf).astype(np.float32)
    order = np.lexsort((numbers, -scores), axis=1)
    return np.take_along_axis(numbers, order, axis=1), np.take_along_axis(scores, order, axis=1)


def row_negatives(mined: np.ndarray, own: np.ndarray, positives: set[int], width: int) -> list[int]:
    """The negatives of one row: its own first, then what was mined for its query; at most `width`, each once.

    Args:
        mined: int64 [num_negatives] of its query, -1 for none.
        own: int64 [S] that the row brought along, -1 for none.
        positives: of its query: none of them is a negative.
    """
    numbers = dict.fromkeys([*own.tolist(), *mined.tolist()])  # each once, in order
    return [number for number in numbers if number >= 0 and number not in positives][:width]


def problems_with(rules: Rules) -> list[str]:
    """Numbers that make no sense, a line for each, by the names of their flags."""
    problems = []
    if rules.num_negatives < 1:
        problems.append(f"--num_negatives must be at least 1, not {rules.num_negatives}")
    if rules.range_min < 0:
        problems.append(f"--range_min must be at least 0, not {rules.range_min}")
    if rules.range_max - rules.range_min < max(rules.num_negatives, 1):
        problems.append(
            f"--range_min {rules.range_min} and --range_max {rules.range_max} leave fewer ranks than --num_negatives "
            f"{rules.num_negatives}: raise range_max, or lower one of the others"
        )
    if rules.relative_margin is not None and not 0 <= rules.relative_margin < 1:
        problems.append(f"--relative_margin is a share, from 0 to below 1, not {rules.relative_margin}")
    if rules.absolute_margin is not None and rules.absolute_margin < 0:
        problems.append(f"--absolute_margin must be at least 0, not {rules.absolute_margin}")
    if rules.max_score is not None and rules.min_score is not None and rules.min_score >= rules.max_score:
        problems.append(f"--min_score {rules.min_score} is not below --max_score {rules.max_score}: no score is left")
    return problems
