"""Which candidates become negatives: by hand, and as Sentence Transformers chooses them from the same vectors.

python -m pytest tests/tuples/test_mining_rules.py
"""

from dataclasses import replace
from importlib.metadata import version

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers.util import mine_hard_negatives

from modeling.versions import numbers
from retrieval.search import search
from tuples.mining.rules import Candidates, Rules, best_first, choose, problems_with, row_negatives

EVERYTHING = Rules(range_min=0, range_max=10, max_score=None, relative_margin=None, num_negatives=10)  # no rule at work


def candidates(scores: list[float], same: tuple[int, ...] = ()) -> Candidates:
    """One query's candidates with numbers 10, 11, ..."""
    count = len(scores)
    is_same = np.isin(np.arange(count), same)[None]
    return Candidates(np.arange(10, 10 + count)[None], np.array([scores], np.float32), is_same)


def chosen(rules: Rules, scores: list[float], positive: float = 0.5, same: tuple[int, ...] = ()) -> list[int]:
    """The negatives of one query, and nothing behind them."""
    found = choose(candidates(scores, same), np.array([positive], np.float32), rules, np.array([0]))
    numbers = found.numbers[0]
    left = numbers[numbers >= 0].tolist()
    assert numbers.tolist() == left + [-1] * (rules.num_negatives - len(left))
    assert np.isnan(found.scores[0, len(left) :]).all()
    assert np.allclose(found.scores[0, : len(left)], [scores[number - 10] for number in left])
    total = sum(found.removed.values()) + len(left)
    assert total == len(scores)  # nothing is lost silently
    return left


SCORES = [0.9, 0.8, 0.6, 0.5, 0.4, 0.3]


@pytest.mark.parametrize(
    ("changes", "left"),
    [
        ({}, [10, 11, 12, 13, 14, 15]),
        ({"max_score": 0.8}, [12, 13, 14, 15]),  # below, not at
        ({"min_score": 0.4}, [10, 11, 12, 13, 14]),  # at, not below
        ({"absolute_margin": 0.0}, [14, 15]),
        ({"absolute_margin": 0.15}, [15]),
        ({"relative_margin": 0.1}, [14, 15]),
        ({"relative_margin": 0.3}, [15]),
        ({"range_min": 2}, [12, 13, 14, 15]),
        ({"range_max": 4}, [10, 11, 12, 13]),
        ({"num_negatives": 2}, [10, 11]),
        # What the scores leave is ranked: 12 and 13 are the first two below 0.8.
        ({"max_score": 0.8, "range_min": 2}, [14, 15]),
        ({"max_score": 0.8, "range_min": 2, "ranks": "found"}, [12, 13, 14, 15]),
        ({"max_score": 0.8, "range_max": 3}, [12, 13, 14]),
        ({"max_score": 0.8, "range_max": 3, "ranks": "found"}, [12]),
    ],
)
def test_each_rule_by_hand(changes, left):
    assert chosen(replace(EVERYTHING, **changes), SCORES) == left


def test_a_positive_takes_no_rank():
    rules = replace(EVERYTHING, range_min=1, range_max=3)
    assert chosen(rules, SCORES, same=(0, 2)) == [13, 14]
    assert chosen(replace(rules, ranks="found"), SCORES, same=(0, 2)) == [13, 14]


def test_the_margin_of_a_positive_below_zero_is_taken_off_its_size():
    rules = replace(EVERYTHING, relative_margin=0.5)
    assert chosen(rules, [-1.0, -2.9, -3.1, -9.0], positive=-2.0) == [12, 13]


def test_draws_depend_on_the_query_and_the_seed_alone():
    rules = replace(EVERYTHING, num_negatives=3, sampling_strategy="random")
    rows = [np.repeat(part, 40, axis=0) for part in candidates(SCORES)]
    positive = np.full(40, 0.5, np.float32)
    whole = choose(Candidates(*rows), positive, rules, np.arange(40)).numbers
    part = choose(Candidates(*[row[:7] for row in rows]), positive[:7], rules, np.arange(20, 27)).numbers
    assert np.array_equal(part, whole[20:27])
    assert (np.diff(whole, axis=1) > 0).all()  # in the order of their scores
    assert len(np.unique(whole)) == len(SCORES)  # all are drawn somewhere
    other = choose(Candidates(*rows), positive, replace(rules, seed=1), np.arange(40)).numbers
    assert not np.array_equal(other, whole)


def test_new_scores_sort_anew_and_nothing_comes_last():
    numbers, scores = best_first(np.array([[7, -1, 3, 5]]), np.array([[0.2, 9.0, 0.2, 0.4]]))
    assert numbers.tolist() == [[5, 3, 7, -1]]
    assert scores[0, :3].tolist() == pytest.approx([0.4, 0.2, 0.2])


def test_a_rows_own_negatives_come_first_and_each_comes_once():
    mined = np.array([1, 2, 3, 4, -1])
    assert row_negatives(mined, np.array([9, -1, 2]), {3}, 4) == [9, 2, 1, 4]
    assert row_negatives(mined, np.array([3]), {3}, 2) == [1, 2]
    assert row_negatives(np.array([-1]), np.array([], int), set(), 2) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_negatives": 0}, "num_negatives must be at least 1"),
        ({"range_min": -1}, "range_min must be at least 0"),
        ({"range_max": 28}, "leave fewer ranks than --num_negatives 24"),
        ({"relative_margin": 1.0}, "relative_margin is a share"),
        ({"absolute_margin": -0.1}, "absolute_margin must be"),
        ({"min_score": 0.8}, "no score is left"),
    ],
)
def test_numbers_that_make_no_sense_are_named(changes, words):
    assert problems_with(Rules()) == []
    assert words in "\n".join(problems_with(replace(Rules(), **changes)))


# --------------------------------------------------------------------------- as Sentence Transformers does


old_library = pytest.mark.skipif(
    numbers(version("sentence-transformers")) < (5, 2),
    reason="until 5.1 the library takes another query's positives for the margins where a query has several",
)


class Vectors:
    """Stands for a SentenceTransformer: the vectors of texts "q3" and "p7" are rows of two matrices."""

    device = "cpu"

    def __init__(self, queries: np.ndarray, passages: np.ndarray):
        self.rows = {"q": queries, "p": passages}

    def encode_query(self, texts: list[str], **_) -> np.ndarray:
        return np.stack([self.rows[text[0]][int(text[1:])] for text in texts])

    encode_document = encode = encode_query  # Sentence Transformers 5.0 calls `encode` for both

    def similarity(self, first, second) -> torch.Tensor:
        return torch.as_tensor(first) @ torch.as_tensor(second).T

    def similarity_pairwise(self, first, second) -> torch.Tensor:
        return (torch.as_tensor(first) * torch.as_tensor(second)).sum(dim=1)


class CrossEncoder:
    """Stands for one: the score of a pair is an entry of a matrix, as logits are."""

    def __init__(self, scores: np.ndarray):
        self.scores = scores

    def predict(self, pairs: list[tuple[str, str]], **_) -> torch.Tensor:
        return torch.tensor([self.scores[int(query[1:]), int(passage[1:])] for query, passage in pairs])


def world(seed: int, queries: int = 60, passages: int = 150) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int]]]:
    """Unit vectors of queries near their passages, and rows of (query, passage): some queries have several."""
    rng = np.random.default_rng(seed)
    corpus = rng.normal(size=(passages, 6))
    asked = corpus[:queries] + 0.5 * rng.normal(size=(queries, 6))
    pairs = [(query, query) for query in range(queries)]
    pairs += [(query, query + 60) for query in range(0, queries, 7)] + [(0, 149), (0, 149)]
    units = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (asked, corpus)]
    return units[0].astype(np.float32), units[1].astype(np.float32), pairs


def theirs(queries, passages, pairs, rules: Rules, cross_encoder=None) -> dict[tuple[str, str], list[str]]:
    """What Sentence Transformers mines: (query, passage) -> negatives."""
    dataset = Dataset.from_dict({"query": [f"q{q}" for q, _ in pairs], "passage": [f"p{p}" for _, p in pairs]})
    mined = mine_hard_negatives(
        dataset,
        Vectors(queries, passages),
        corpus=[f"p{number}" for number in range(len(passages))],
        cross_encoder=cross_encoder,
        range_min=rules.range_min,
        range_max=rules.range_max,
        max_score=rules.max_score,
        min_score=rules.min_score,
        absolute_margin=rules.absolute_margin,
        relative_margin=rules.relative_margin,
        num_negatives=rules.num_negatives,
        output_format="n-tuple",
        verbose=False,
    )
    names = [f"negative_{slot + 1}" for slot in range(rules.num_negatives)]
    return {(row["query"], row["passage"]): [row[name] for name in names] for row in mined}


def ours(queries, passages, pairs, rules: Rules, cross_scores=None) -> dict[tuple[str, str], list[str]]:
    """The same by our rules: every query that has enough."""
    most = max(np.bincount([query for query, _ in pairs]))
    found = search(queries, passages, rules.range_max + most)
    of_pairs = (queries[[q for q, _ in pairs]] * passages[[p for _, p in pairs]]).sum(axis=1)
    numbers, scores = found
    if cross_scores is not None:
        numbers, scores = best_first(numbers, np.take_along_axis(cross_scores, numbers, axis=1))
        of_pairs = np.array([cross_scores[pair] for pair in pairs])
    positive = np.full(len(queries), np.inf, np.float32)
    np.minimum.at(positive, [query for query, _ in pairs], of_pairs)
    same = np.array([[(query, number) in pairs for number in row] for query, row in enumerate(numbers)])
    negatives = choose(Candidates(numbers, scores, same), positive, rules, np.arange(len(queries))).numbers
    whole = (negatives >= 0).all(axis=1)
    return {
        (f"q{query}", f"p{passage}"): [f"p{number}" for number in negatives[query]]
        for query, passage in pairs
        if whole[query]
    }


PUBLISHED = Rules()
SETTINGS = {
    "published": PUBLISHED,
    "published, fewer": replace(PUBLISHED, num_negatives=5, range_max=40),
    "published, none skipped": replace(PUBLISHED, num_negatives=7, range_min=0, range_max=20),
    "no rule": replace(EVERYTHING, num_negatives=4, range_max=12),
    "absolute margin": Rules(2, 60, None, 0.1, 0.05, None, 6),
    "all of them": Rules(3, 50, 0.7, 0.05, 0.02, 0.1, 3),
}


@old_library
@pytest.mark.parametrize("name", SETTINGS)
def test_the_negatives_are_those_of_sentence_transformers(name):
    for seed in range(3):
        expected = theirs(*world(seed), SETTINGS[name])
        assert ours(*world(seed), SETTINGS[name]) == expected
        assert len(expected) > 10
    if name != "no rule":
        assert len(expected) < 60  # some queries have too few: the rules did something


@old_library
def test_the_negatives_by_a_cross_encoder_are_those_of_sentence_transformers():
    queries, passages, pairs = world(5)
    logits = (3 * queries @ passages.T + np.random.default_rng(6).normal(size=(60, 150)) - 2).astype(np.float32)
    rules = Rules(2, 50, 0.5, None, None, 0.05, 5)
    expected = theirs(queries, passages, pairs, rules, CrossEncoder(logits))
    assert ours(queries, passages, pairs, rules, logits) == expected
    assert len(expected) > 10
    assert expected != ours(queries, passages, pairs, rules)  # its scores decided


def test_a_lower_rank_of_what_was_found_is_another_rule():
    """Read literally, the report drops the five nearest before any score is looked at."""
    literal = replace(PUBLISHED, num_negatives=5, ranks="found")
    assert ours(*world(0), literal) != ours(*world(0), replace(literal, ranks="kept"))
