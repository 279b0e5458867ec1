"""Search and its measures, on numbers small enough for paper.

python -m pytest tests/retrieval/test_retrieval.py
"""

import math
import sys

import numpy as np
import pytest

from retrieval import search as module
from retrieval.metrics import score
from retrieval.search import BM25, search
from utils import RunError


def test_metrics_by_hand():
    # Query 0 finds its passage first, query 1 third, query 2 not among the best ten.
    ranking = np.array([[0, *range(20, 29)], [7, 8, 1, *range(20, 27)], [*range(20, 30)]])
    assert score(ranking) == {
        "nDCG@10": pytest.approx((1 + 1 / math.log2(4)) / 3),
        "MRR@10": pytest.approx((1 + 1 / 3) / 3),
        "recall@10": pytest.approx(2 / 3),
    }


def test_only_the_first_ten_of_a_ranking_count():
    ranking = np.array([[*range(20, 30), 0, 30]])
    assert score(ranking) == {"nDCG@10": 0.0, "MRR@10": 0.0, "recall@10": 0.0}


@pytest.fixture
def vectors() -> tuple[np.ndarray, np.ndarray]:
    """Two sets of 30 vectors."""
    queries, passages = np.random.default_rng(0).normal(size=(2, 30, 8))
    return queries, passages


def test_search_is_sorted_by_cosine(vectors):
    queries, passages = vectors
    cosines = queries @ passages.T
    found = search(queries, passages, 5)
    assert np.array_equal(found.passages, np.argsort(-cosines, axis=1)[:, :5])
    assert np.array_equal(found.scores, -np.sort(-cosines, axis=1)[:, :5])


@pytest.mark.parametrize("k", [30, 31, 1000])
def test_search_gives_all_passages_where_there_are_no_more(vectors, k):
    queries, passages = vectors
    found = search(queries[:4], passages, k)
    assert found.passages.shape == found.scores.shape == (4, 30)
    assert np.array_equal(found.passages, np.argsort(-(queries[:4] @ passages.T), axis=1))
    assert search(queries, passages[:0], k).passages.shape == (30, 0)


def test_search_in_blocks_finds_the_same(vectors, monkeypatch):
    whole = search(*vectors, 5)
    monkeypatch.setattr(module, "SCORES_AT_ONCE", 7 * 30 + 1)  # seven queries, and two that are left over
    parts = search(*vectors, 5)
    assert np.array_equal(parts.passages, whole.passages)
    assert np.allclose(parts.scores, whole.scores)


def test_bm25_splits_names_and_finds_rare_words():
    index = BM25(["def copyFile_to(path): ...", "def load_page(path): ...", "def path(): ..."])
    found = index.search(["copy a file", "the page at this path"], 2)
    assert found.passages[:, 0].tolist() == [0, 1]
    assert (found.scores[:, 0] > found.scores[:, 1]).all()
    assert sorted(index.search(["page"], 10).passages[0]) == [0, 1, 2]  # more than there are
    assert index.search([], 2).passages.shape == (0, 2)


def test_bm25_without_a_word_to_find_says_so():
    with pytest.raises(ValueError, match="no word"):
        BM25(["...", "價值"])


def test_bm25_names_the_package_that_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)  # importing it fails as if it were not installed
    with pytest.raises(RunError, match="pip install bm25s"):
        BM25(["a passage"])
