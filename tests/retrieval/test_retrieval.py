"""Search, on numbers small enough for paper.

python -m pytest tests/retrieval/test_retrieval.py
"""

import sys

import numpy as np
import pytest
import torch

from retrieval import search as module
from retrieval.search import BM25, Groups, Nearest, Ranking, merge, search
from utils import RunError


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
    assert found.scores.dtype == cosines.dtype
    assert np.allclose(found.scores, -np.sort(-cosines, axis=1)[:, :5], rtol=1e-12)


@pytest.mark.parametrize("k", [30, 31, 1000])
def test_search_gives_all_passages_where_there_are_no_more(vectors, k):
    queries, passages = vectors
    found = search(queries[:4], passages, k)
    assert found.passages.shape == found.scores.shape == (4, 30)
    assert np.array_equal(found.passages, np.argsort(-(queries[:4] @ passages.T), axis=1))
    assert search(queries, passages[:0], k).passages.shape == (30, 0)


def test_search_in_blocks_finds_the_same(vectors, monkeypatch):
    whole = search(*vectors, 5)
    monkeypatch.setattr(module, "QUERIES_AT_ONCE", 7)  # four blocks, and two queries that are left over
    for passages_at_once in (1, 4, 11, 29):  # fewer than are wanted, and more
        monkeypatch.setattr(module, "SCORES_AT_ONCE", 7 * passages_at_once)
        parts = search(*vectors, 5)
        assert np.array_equal(parts.passages, whole.passages)
        assert np.allclose(parts.scores, whole.scores)


@pytest.mark.parametrize("scores_at_once", [2**24, 40 * 7])
def test_of_equal_scores_the_lower_number_comes_first_whatever_the_chunks(monkeypatch, scores_at_once):
    monkeypatch.setattr(module, "SCORES_AT_ONCE", scores_at_once)
    rng = np.random.default_rng(1)
    queries, passages = rng.integers(-1, 2, (40, 3)), rng.integers(-1, 2, (200, 3))  # few values: ties everywhere
    scores = (queries @ passages.T).astype(np.float32)
    found = search(queries.astype(np.float32), passages.astype(np.float32), 12)
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :12]
    assert np.array_equal(found.passages, expected)
    assert (np.diff(np.sort(scores, axis=1)[:, -20:]) == 0).any(axis=1).all()  # there were ties in every row


@pytest.mark.parametrize("parts", [1, 3, 7])
def test_chunks_searched_in_several_places_and_merged_are_the_whole(monkeypatch, parts):
    """With ties everywhere; the last of seven places has no chunk at all."""
    monkeypatch.setattr(module, "QUERIES_AT_ONCE", 16)
    rng = np.random.default_rng(2)
    queries, passages = (torch.from_numpy(rng.integers(-1, 2, (rows, 3))).float() for rows in (40, 200))
    whole = search(queries.numpy(), passages.numpy(), 12)
    places = [Nearest(queries, 12) for _ in range(parts)]
    for number, begin in enumerate(range(0, 200, 35)):
        places[number % parts].add(passages[begin : begin + 35], begin)
    found = merge([Ranking(*(tensor.numpy() for tensor in place.found())) for place in places], 12)
    assert np.array_equal(found.passages, whole.passages)
    assert np.array_equal(found.scores, whole.scores)


def test_a_query_finds_nothing_of_its_own_group(vectors):
    queries, passages = vectors
    groups = Groups(np.arange(30) % 4 - 1, np.arange(30) % 4 - 2)
    found = search(queries, passages, 30, groups=groups)
    own = (groups.passages[found.passages] == groups.queries[:, None]) | (groups.passages[found.passages] == -2)
    is_own = own & (groups.queries[:, None] >= 0)
    assert is_own.any()
    assert np.array_equal(np.isneginf(found.scores), is_own)
    assert np.isfinite(found.scores[groups.queries == -1]).all()  # without a group everything is found


def test_bm25_splits_names_and_finds_rare_words():
    index = BM25(["def copyFile_to(path): ...", "def load_page(path): ...", "def path(): ..."])
    found = index.search(["copy a file", "the page at this path"], 2)
    assert found.passages[:, 0].tolist() == [0, 1]
    assert (found.scores[:, 0] > found.scores[:, 1]).all()
    assert sorted(index.search(["page"], 10).passages[0]) == [0, 1, 2]  # more than there are
    assert index.search([], 2).passages.shape == (0, 2)


def test_bm25_ranks_by_number_where_scores_are_equal():
    texts = ["blue river", "old castle", "blue bridge", "blue engine", "blue garden at a river"] * 3
    index = BM25(texts)
    ranked = index.rank(["blue", "river", "of the"], 15)
    found = index.search(["blue", "river", "of the"], 15)
    assert np.allclose(ranked.scores, found.scores)
    for numbers, scores in zip(ranked.passages, ranked.scores, strict=True):
        assert sorted(zip(-scores, numbers, strict=True)) == list(zip(-scores, numbers, strict=True))
    assert ranked.scores[0, :9].all()
    assert not ranked.scores[2].any()  # nothing but stop words
    groups = Groups(np.array([0, -1, -1]), np.arange(15) % 5 % 2)
    assert set(index.rank(["blue"], 15, groups).passages[0][:3] % 5) == {3}  # group 1 has one that is blue


def test_bm25_without_a_word_to_find_says_so():
    with pytest.raises(ValueError, match="no word"):
        BM25(["...", "價值"])


def test_bm25_names_the_package_that_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)  # importing it fails as if it were not installed
    with pytest.raises(RunError, match="pip install bm25s"):
        BM25(["a passage"])
