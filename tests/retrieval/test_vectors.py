"""Vectors on a disk, and FAISS over them.

python -m pytest tests/retrieval/test_vectors.py
"""

import sys

import numpy as np
import pytest

from retrieval import vectors as module
from retrieval.faiss_index import FaissIndex, build, bytes_of_code, check_index, number_of_lists, recall
from retrieval.rescore import Cosines
from retrieval.search import search
from retrieval.vectors import VectorFolder, shard_size
from utils import RunError


def unit_rows(count: int, width: int, seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def write_all(folder: VectorFolder, rows: np.ndarray) -> None:
    for shard in folder.missing():
        begin, end = folder.bounds(shard)
        folder.write(shard, rows[begin:end], cut=shard)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(module, "_FEWEST", 16)
    monkeypatch.setattr(module, "_SHARDS", 1000)


def test_shards_depend_on_the_number_of_texts_alone():
    assert shard_size(1) == shard_size(65_536) == 256
    assert shard_size(65_537) == 512
    assert shard_size(60_000_000) == 65_536


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_shards_are_read_as_one_array(tmp_path, small_shards, dtype):
    rows = unit_rows(50, 8, 0)
    folder = VectorFolder(tmp_path / "vectors", 50, dtype)
    assert folder.missing() == [0, 1, 2, 3]
    write_all(folder, rows)
    assert folder.missing() == []
    assert folder.cut() == 0 + 1 + 2 + 3
    vectors = folder.open()
    assert (vectors.shape, len(vectors), vectors.dtype) == ((50, 8), 50, dtype)
    expected = rows.astype(dtype)
    for begin, end in ((0, 50), (3, 7), (15, 17), (16, 32), (40, 99), (20, 20)):
        assert np.array_equal(vectors[begin:end], expected[begin:end])
    numbers = np.array([49, 0, 16, 15, 16])
    assert vectors.take(numbers).dtype == np.float32
    assert np.array_equal(vectors.take(numbers), expected[numbers].astype(np.float32))
    found = search(rows[:9], vectors, 12)
    assert np.array_equal(found.passages, search(rows[:9], expected.astype(np.float32), 12).passages)


def test_a_shard_that_is_gone_or_cut_short_is_missing_and_no_other(tmp_path, small_shards):
    folder = VectorFolder(tmp_path, 70)
    write_all(folder, unit_rows(70, 8, 0))
    (tmp_path / "00001.npy").unlink()
    cut = tmp_path / "00003.npy"
    cut.write_bytes(cut.read_bytes()[:-1])
    (tmp_path / "00004.json").unlink()
    assert folder.missing() == [1, 3, 4]


@pytest.mark.parametrize("kind", ["flat", "IVF", "IVF-PQ"])
def test_an_index_finds_what_the_exact_search_finds(tmp_path, small_shards, kind):
    passages, queries = unit_rows(2000, 16, 0), unit_rows(40, 16, 1)
    folder = VectorFolder(tmp_path / "vectors", 2000)
    write_all(folder, passages)
    path = tmp_path / "index"
    build(path, folder.open(), kind, lists=8)
    exact = search(queries, passages, 20)
    found = FaissIndex(path, probes=8).search(queries, 20)
    if kind == "IVF-PQ":  # by codes of 2 bytes: far from exact, and far from nothing
        assert 0.2 < recall(found, exact.passages) < 1
    else:
        assert np.array_equal(found, exact.passages)
        assert recall(found, exact.passages) == 1
    if kind != "flat":
        index = FaissIndex(path, probes=2)
        assert "8 lists, of which 2" in index.description
        assert recall(index.search(queries, 20), exact.passages) < recall(found, exact.passages)


def test_an_index_that_cannot_be_trained_is_refused(monkeypatch):
    check_index("IVF-PQ", 9984)
    with pytest.raises(RunError, match="needs 9984 passages"):
        check_index("IVF-PQ", 9983)
    with pytest.raises(RunError, match="needs 64 passages to be trained on, not 63: take flat"):
        check_index("IVF", 63)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(RunError, match="pip install faiss-cpu"):
        check_index("flat", 1)


def test_sizes_of_indexes_by_hand():
    assert number_of_lists(1_000_000) == 4000
    assert number_of_lists(640) == 10  # there are no vectors for 100
    assert [bytes_of_code(width) for width in (384, 1024, 12, 10, 7)] == [48, 128, 2, 2, 1]


def test_recall_by_hand():
    assert recall(np.array([[1, 2, -1], [9, 8, 7]]), np.array([[2, 5], [7, 8]])) == (0.5 + 1) / 2


def test_cosines_of_pairs_are_those_of_the_matrix(tmp_path, small_shards, monkeypatch):
    monkeypatch.setattr("retrieval.rescore._PRODUCTS", 24)  # three pairs at a time
    passages, queries = unit_rows(40, 8, 0), unit_rows(20, 8, 1)
    folders = [VectorFolder(tmp_path / "q", 20), VectorFolder(tmp_path / "p", 40)]
    for folder, rows in zip(folders, (queries, passages), strict=True):
        write_all(folder, rows)
    rows, columns = np.array([0, 19, 3, 3, 7]), np.array([39, 0, 1, 2, 1])
    scores = Cosines(*[folder.open() for folder in folders]).score(rows, columns)
    assert np.allclose(scores, (queries @ passages.T)[rows, columns], atol=1e-6)
