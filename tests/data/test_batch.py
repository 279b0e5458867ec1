"""The batch of one process among many: the one that a plain loop over all processes makes, by far fewer calls.

python -m pytest tests/data/test_batch.py
"""

import heapq
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields

import numpy as np
import pytest
import torch

from data import batch as batches
from data.batch import Batch, make_batch, truncates_to_its_positive

EOS = 0
TEXTS = 90


@dataclass
class Store:
    """A token store in memory; what of `tokens` is read is counted."""

    tokens: np.ndarray
    offsets: np.ndarray
    tuples: np.ndarray
    meta: dict = field(default_factory=lambda: {"max_seq_length": None})
    eos: int = EOS


def store(seed: int = 0, rows: int = 40, negatives: int = 5) -> Store:
    """Texts of 1 to 40 tokens, many shared by tuples and of equal length, and tuples with missing negatives."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 41, TEXTS)
    lengths[::7] = 12
    tokens = random.integers(1, 500, lengths.sum()).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens[offsets[1:] - 1] = EOS
    tuples = random.integers(0, TEXTS, (rows, 2 + negatives)).astype(np.int32)
    missing = random.random((rows, negatives)) < 0.3
    tuples[:, 2:][missing] = -1
    return Store(tokens, offsets, tuples)


# ------------------------------------------------------------------------- the batch, said plainly


def rows_of_each_process(costs: np.ndarray, world: int) -> list[np.ndarray]:
    rows = [[] for _ in range(world)]
    loads = [(0, rank) for rank in range(world)]
    for row in np.argsort(-costs, kind="stable"):
        load, rank = heapq.heappop(loads)
        rows[rank].append(int(row))
        heapq.heappush(loads, (load + int(costs[row]), rank))
    return [np.array(sorted(own), np.int64) for own in rows]


def cut_lengths(store: Store, texts: np.ndarray, max_length: int) -> np.ndarray:
    lengths = store.offsets[texts + 1] - store.offsets[texts]
    return np.minimum(lengths, max_length) * (texts >= 0)


def longest_first(store: Store, texts: np.ndarray, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    numbers = np.unique(texts[texts >= 0])
    lengths = cut_lengths(store, numbers, max_length)
    order = np.argsort(-lengths, kind="stable")
    return numbers[order], lengths[order]


def plain_batch(
    store: Store, rows, negatives, max_length: int, rank: int, world: int, max_tokens_per_forward: int
) -> Batch:
    """As it was made before: every process in turn, texts, cuts and all."""
    tuples = np.concatenate([store.tuples[rows, :2], negatives], axis=1)
    rows_by_rank = rows_of_each_process(cut_lengths(store, tuples, max_length).sum(axis=1), world)
    counts = tuple(len(own) for own in rows_by_rank)
    texts_by_rank = [longest_first(store, tuples[own], max_length) for own in rows_by_rank]
    cuts_by_rank = [batches.split_by_tokens(lengths, max_tokens_per_forward) for _, lengths in texts_by_rank]
    own_rows = rows_by_rank[rank]
    mask = negatives[own_rows] >= 0
    texts = np.concatenate([tuples[own_rows, 0], tuples[own_rows, 1], negatives[own_rows][mask]])
    distinct = texts_by_rank[rank][0].tolist()
    tokens, cu_seqlens = batches.pack(store, np.array(distinct, np.int64), max_length)
    parts = max(len(cuts) for cuts in cuts_by_rank)
    own_cuts = cuts_by_rank[rank]
    return Batch(
        tokens=torch.from_numpy(tokens),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        index=torch.tensor([distinct.index(text) for text in texts], dtype=torch.int64),
        mask=torch.from_numpy(mask),
        slots=torch.from_numpy(batches.slots_of(mask)),
        positives=torch.from_numpy(tuples[np.concatenate(rows_by_rank), 1].astype(np.int64)),
        texts=texts,
        lengths=np.diff(cu_seqlens),
        cuts=tuple(own_cuts + own_cuts[-1:] * (parts - len(own_cuts))),
        counts=counts,
        begin=sum(counts[:rank]),
        negatives=int((negatives >= 0).sum()),
        heaviest=max(int(lengths.sum()) for _, lengths in texts_by_rank),
    )


def assert_same(found: Batch, expected: Batch) -> None:
    for name in (one.name for one in fields(Batch)):
        ours, theirs = getattr(found, name), getattr(expected, name)
        if isinstance(theirs, torch.Tensor):
            assert torch.equal(ours, theirs), name
        elif isinstance(theirs, np.ndarray):
            assert np.array_equal(ours, theirs), name
        else:
            assert ours == theirs, name
        if hasattr(theirs, "dtype"):
            assert ours.dtype == theirs.dtype, name


@pytest.mark.parametrize("max_length", [2, 12, 100])
@pytest.mark.parametrize("world", [1, 2, 3, 7, 64])
def test_every_field_is_that_of_the_plain_way(world, max_length):
    data = store(seed=world)
    most = 0
    for rows in (np.arange(40), np.array([5, 3]), np.array([11])):
        negatives = data.tuples[rows, 2:]
        for most in (0, 1, 25, 80, 10**6):
            for rank in {0, world // 2, world - 1}:
                arguments = (data, rows, negatives, max_length, rank, world, most)
                expected = plain_batch(*arguments)
                assert_same(make_batch(*arguments), expected)
                most = max(most, expected.parts)
    assert most > 1


@pytest.mark.parametrize("world", [1, 4])
def test_tuples_without_any_negative_are_as_in_the_plain_way(world):
    data = store(negatives=0)
    for negatives in (data.tuples[:9, 2:], np.full((9, 3), -1, np.int32)):
        for rank in range(world):
            arguments = (data, np.arange(9), negatives, 30, rank, world, 60)
            assert_same(make_batch(*arguments), plain_batch(*arguments))


# ------------------------------------------------------------------------------- what it does not do


def calls_of(function: Callable) -> int:
    """How many functions Python calls, written in Python or in C, while `function` runs."""
    counted = 0

    def count(frame, event, argument):
        nonlocal counted
        counted += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return counted


def test_more_processes_cost_a_process_no_more_calls():
    """Each call holds the interpreter, for which training waits. Before there were 30 more for each process."""
    data = store(rows=256)
    rows = np.arange(256)
    counts = [
        calls_of(lambda world=world: make_batch(data, rows, data.tuples[:, 2:], 40, 0, world, 500)) for world in (8, 64)
    ]
    assert counts[0] > 256  # each row is dealt to somebody
    assert counts[1] <= counts[0]


def test_few_pairs_of_long_texts_are_compared_one_by_one(monkeypatch):
    """All 16,384 were: each process compared the tokens of everybody's long texts, 3 us a pair."""
    random = np.random.default_rng(3)
    length, texts = 30, 64
    tokens = random.integers(1, 500, (texts, length)).astype(np.int32)
    tokens[:, : length // 2] = 7  # they begin alike
    tokens[5, :20] = tokens[6, :20] = tokens[8, :20]
    offsets = np.arange(texts + 1) * length
    data = Store(tokens.ravel(), offsets, np.zeros((0, 2), np.int32))
    positives = np.repeat(np.arange(texts), 16)
    negatives = (positives[:, None] + np.arange(1, 17)[None].repeat(len(positives), 0)) % texts
    negatives[0, 0] = -1
    compared = []
    original = batches._first_tokens
    monkeypatch.setattr(batches, "_first_tokens", lambda *words: compared.append(1) or original(*words))
    found = truncates_to_its_positive(data, positives, negatives, 20)
    kept = tokens[:, :19]
    expected = (kept[positives][:, None] == kept[negatives]).all(-1) & (negatives >= 0)
    assert np.array_equal(found, expected)
    assert 0 < found.sum() < 500
    assert 0 < len(compared) < negatives.size / 10
