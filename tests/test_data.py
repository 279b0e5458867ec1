"""The plan, the negatives and the packing: what every process sees at every step.

python -m pytest tests/test_data.py
"""

import tracemalloc
from collections import Counter

import numpy as np
import pytest
import torch
import toy
from conftest import tokenize
from hypothesis import given
from hypothesis import strategies as st

import data
from data import Feed, Plan, batch_bounds, choose_negatives, process_slice, shuffled, split_sizes
from token_store import open_store


@pytest.fixture(scope="module")
def stores(ground):
    return [open_store(ground.stores / f"toy_{task}") for task in ("classification", "clustering", "retrieval")]


def feed(stores, rank: int = 0, world: int = 1, global_batch: int = 12, max_length: int = 64, seed: int = 0) -> Feed:
    sizes = tuple(split_sizes(len(store.tuples))[0] for store in stores)
    return Feed(stores, [1, 5, 3], Plan(sizes, global_batch, seed), max_length, rank, world)


@given(rows=st.integers(1, 500), batch=st.integers(1, 70))
def test_batches_cover_a_dataset_once_and_are_full_but_the_last_two(rows, batch):
    bounds = [batch_bounds(rows, batch, number) for number in range(-(-rows // batch))]
    assert bounds[0][0] == 0
    assert bounds[-1][1] == rows
    assert all(a[1] == b[0] for a, b in zip(bounds, bounds[1:], strict=False))
    sizes = [end - begin for begin, end in bounds]
    assert sizes[:-2] == [batch] * (len(sizes) - 2)
    assert max(sizes) <= batch
    if len(sizes) > 1:
        assert min(sizes) >= batch // 2
        assert max(sizes[-2:]) - min(sizes[-2:]) <= 1


@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=5), batch=st.integers(1, 20), seed=st.integers(0, 2**31 - 1)
)
def test_every_tuple_comes_exactly_once_an_epoch(sizes, batch, seed):
    plan = Plan(tuple(sizes), batch, seed)
    for epoch in (0, 1, 7):
        seen = [Counter() for _ in sizes]
        for step in range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch):
            what = plan.step(step)
            assert what.epoch == epoch
            seen[what.dataset].update(what.rows.tolist())
        assert seen == [Counter(range(size)) for size in sizes]


def test_a_step_is_a_pure_function():
    plan, again = Plan((400, 90, 7), 16, 3), Plan((400, 90, 7), 16, 3)
    for step in (40, 3, 0, 77, 3):  # in any order
        a, b = plan.step(step), again.step(step)
        assert (a.dataset, a.epoch) == (b.dataset, b.epoch)
        assert a.rows.tolist() == b.rows.tolist()


def test_epochs_and_seeds_differ():
    orders = {
        (seed, epoch): tuple(tuple(plan.step(epoch * plan.steps_per_epoch + k).rows) for k in range(5))
        for seed in (0, 1)
        for plan in [Plan((200,), 10, seed)]
        for epoch in (0, 1)
    }
    assert len(set(orders.values())) == 4


@given(rows=st.integers(1, 20000), key=st.integers(0, 2**62 - 1))
def test_shuffled_is_a_permutation(rows, key):
    assert np.array_equal(np.sort(shuffled(rows, key, np.arange(rows))), np.arange(rows))


@pytest.mark.parametrize(("rows", "sorted_rows"), [(2, 4096), (7, 4096), (50, 4096), (50, 0), (100, 0)])
def test_shuffled_is_uniform(rows, sorted_rows, monkeypatch):
    monkeypatch.setattr(data, "SORTED_ROWS", sorted_rows)  # 0: the network, which is for many rows, on few
    # Each value at each position, over many keys: chi squared with (rows - 1)^2 degrees of freedom has that mean and
    # twice that variance. Six standard deviations are 1 in 10^9 for one draw, and the keys are fixed: no flicker.
    draws = 4000
    table = np.zeros((rows, rows))
    for key in range(draws):
        table[np.arange(rows), shuffled(rows, data._key(11, key), np.arange(rows))] += 1
    chi = ((table - draws / rows) ** 2 / (draws / rows)).sum() * (rows - 1) / rows
    freedom = (rows - 1) ** 2
    assert chi < freedom + 6 * np.sqrt(2 * freedom)


def test_shuffling_six_million_rows_makes_no_large_array():
    positions = np.arange(512)
    tracemalloc.start()
    assert len(np.unique(shuffled(6_000_000, 5, positions))) == 512
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 512 * 8 < peak < 1e6  # an array of all rows would be 48 MB


def test_datasets_are_drawn_in_proportion_to_their_batches():
    # The first step of an epoch belongs to dataset i with probability counts[i] / sum: 0.5, 0.3, 0.2.
    # 4,000 epochs: three standard deviations are at most 3 * sqrt(0.25 / 4000) = 0.024.
    counts, epochs = (50, 30, 20), 4000
    orders = np.stack([data.dataset_order(counts, data._key(1, epoch)) for epoch in range(epochs)])
    for step in (0, 10):  # none is exhausted after ten steps
        shares = np.bincount(orders[:, step], minlength=3) / epochs
        assert np.abs(shares - [0.5, 0.3, 0.2]).max() < 0.024
    assert all(np.bincount(order).tolist() == [50, 30, 20] for order in orders[:100])


@given(rows=st.integers(1, 3000))
def test_held_out_tuples_are_one_percent_at_least_one_and_never_trained_on(rows):
    trained, held_out = split_sizes(rows)
    assert trained + held_out == rows
    assert trained >= 1
    assert held_out == (max(1, rows // 100) if rows > 1 else 0)

    class Store:
        tuples = np.zeros((rows, 2))

    parts = [data.store_rows(Store, np.arange(trained)), data.store_rows(Store, np.arange(held_out), held_out=True)]
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(rows))


def test_negatives_are_a_pure_function_of_seed_epoch_and_tuple():
    negatives = np.arange(40 * 24).reshape(40, 24)
    rows = np.arange(100, 140)
    whole = choose_negatives(negatives, 7, 0, 2, rows)
    order = np.random.default_rng(0).permutation(40)
    assert np.array_equal(choose_negatives(negatives[order], 7, 0, 2, rows[order]), whole[order])
    assert all(len(set(row)) == 7 for row in whole)
    assert not np.array_equal(choose_negatives(negatives, 7, 0, 3, rows), whole)
    assert not np.array_equal(choose_negatives(negatives, 7, 1, 2, rows), whole)
    slots = whole - negatives[:, :1]
    assert len({tuple(row) for row in slots}) > 30  # each tuple draws its own, not the whole batch the same


def test_every_negative_is_drawn_equally_often():
    # 7 of 24 over 3,000 tuples: expected 875 a slot, standard deviation sqrt(3000 * 7/24 * 17/24) = 25; five are 125.
    drawn = choose_negatives(np.tile(np.arange(24), (3000, 1)), 7, 0, 0, np.arange(3000))
    assert np.abs(np.bincount(drawn.ravel()) - 875).max() < 125


def test_missing_negatives_are_drawn_last():
    negatives = np.array([[-1, 5, -1, 6], [-1, -1, -1, -1], [1, 2, 3, 4]])
    chosen = choose_negatives(negatives, 3, 0, 0, np.arange(3))
    assert sorted(chosen[0]) == [-1, 5, 6]
    assert chosen[1].tolist() == [-1, -1, -1]
    assert set(chosen[2]) < {1, 2, 3, 4}
    assert choose_negatives(negatives, 9, 0, 0, np.arange(3)).shape == (3, 4)
    assert choose_negatives(negatives[:, :0], 3, 0, 0, np.arange(3)).shape == (3, 0)


@given(rows=st.integers(0, 200), world=st.integers(1, 16))
def test_process_slices_tile_the_batch(rows, world):
    slices = [process_slice(rows, rank, world) for rank in range(world)]
    assert np.concatenate([np.arange(rows)[s] for s in slices]).tolist() == list(range(rows))
    sizes = [s.stop - s.start for s in slices]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_all_processes_together_hold_the_batch_of_one(stores, world):
    alone = feed(stores)
    for step in range(alone.plan.steps_per_epoch):
        dataset, whole = alone.training(step)
        parts = [feed(stores, rank, world).training(step) for rank in range(world)]
        assert {number for number, _ in parts} == {dataset}
        batches = [batch for _, batch in parts]
        assert all(batch.counts == batches[0].counts and batch.negatives == whole.negatives for batch in batches)
        assert [batch.rows for batch in batches] == list(batches[0].counts)
        assert [batch.begin for batch in batches] == np.cumsum([0, *batches[0].counts])[:-1].tolist()
        b = whole.rows
        for part in (slice(0, b), slice(b, 2 * b), slice(2 * b, None)):  # queries, positives, negatives
            local = [batch.texts[_part(part, b, batch.rows)] for batch in batches]
            assert np.concatenate(local).tolist() == whole.texts[part].tolist()


def _part(part: slice, whole: int, rows: int) -> slice:
    """The same third of a local batch: boundaries at multiples of its own rows."""
    ends = {0: 0, whole: rows, 2 * whole: 2 * rows, None: None}
    return slice(ends[part.start], ends[part.stop])


def test_no_tuple_meets_itself_as_a_negative(stores):
    alone = feed(stores, global_batch=4)
    for step in range(2 * alone.plan.steps_per_epoch):
        dataset, batch = alone.training(step)
        positives = batch.texts[batch.rows : 2 * batch.rows]
        negatives = np.full(batch.mask.shape, -1)
        negatives[batch.mask.numpy()] = batch.texts[2 * batch.rows :]
        assert not (negatives == positives[:, None]).any()
        assert len(set(batch.texts[: batch.rows])) == batch.rows or stores[dataset].task != "retrieval"


def test_packing_lays_texts_end_to_end_and_keeps_eos_when_cutting(stores):
    store = stores[2]
    texts = np.array([5, 0, 17])
    originals = [store.tokens[store.offsets[i] : store.offsets[i + 1]].tolist() for i in texts]
    tokens, cu_seqlens = data.pack(store, texts, 1000)
    assert tokens.tolist() == sum(originals, [])
    assert np.diff(cu_seqlens).tolist() == [len(text) for text in originals]
    tokens, cu_seqlens = data.pack(store, texts, 6)
    expected = [text if len(text) <= 6 else [*text[:5], store.eos] for text in originals]
    assert max(map(len, originals)) > 6  # something was cut
    assert tokens.tolist() == sum(expected, [])
    assert np.diff(cu_seqlens).tolist() == [len(text) for text in expected]


def test_a_negative_that_is_cut_to_its_positive_is_masked(ground, tmp_path):
    rows = toy.raw_rows(20, 2)
    same = "The river is old and the castle is old and the engine is old"
    for row in rows[::2]:
        row |= {"passage": f"{same} {row['passage']}", "negative_1": f"{same} {row['negative_1']}"}
    toy.write_parquet(tmp_path / "raw" / "x.parquet", rows)
    assert tokenize(tmp_path / "raw", tmp_path / "stores", ground.backbone, "--task", "retrieval") == 0
    stores = [open_store(tmp_path / "stores" / "x")]
    long, short = (Feed(stores, [2], Plan((19,), 19, 0), length).training(0)[1] for length in (128, 8))
    assert long.mask.all()
    assert 8 <= (~short.mask).sum() <= 10  # one of two in every second tuple, of which one or none is held out
    for batch, length in ((long, 128), (short, 8)):
        texts = [tuple(text.tolist()) for text in batch.tokens.split(batch.lengths.tolist())]
        assert max(map(len, texts)) <= length
        negatives = iter(texts[2 * batch.rows :])
        for positive, mask in zip(texts[batch.rows :], batch.mask.tolist(), strict=False):
            assert all(next(negatives) != positive for real in mask if real)


def test_a_process_without_rows_still_has_something_to_compute(stores):
    batch = data.make_batch(stores[2], np.array([3]), np.array([[1, 2]]), 64, rank=0, world=2)
    assert batch.rows == 0
    assert batch.counts == (0, 1)
    assert batch.tokens.tolist() == [stores[2].eos]
    queries, positives, negatives = batch.split(torch.ones(1, 4))
    assert (queries.shape, positives.shape, negatives.shape) == ((0, 4), (0, 4), (0, 2, 4))


def test_split_puts_embeddings_back_in_their_roles(stores):
    negatives = np.array([[4, -1], [-1, -1], [6, 7]])
    batch = data.make_batch(stores[2], np.array([0, 1, 2]), negatives, 64)
    assert batch.mask.tolist() == [[True, False], [False, False], [True, True]]
    embeddings = torch.arange(9.0)[:, None].requires_grad_()  # 3 queries, 3 positives, 3 negatives
    queries, positives, found = batch.split(embeddings)
    assert queries.flatten().tolist() == [0, 1, 2]
    assert positives.flatten().tolist() == [3, 4, 5]
    assert found.squeeze(-1).tolist() == [[6, 0], [0, 0], [7, 8]]
    found.sum().backward()
    assert embeddings.grad.flatten().tolist() == [0] * 6 + [1] * 3


def test_validation_is_the_same_each_time_and_covers_what_is_held_out(stores):
    one, other_seed = feed(stores, global_batch=2), feed(stores, global_batch=2, seed=9)
    for dataset, store in enumerate(stores):
        batches = list(one.held_out(dataset))
        assert sum(batch.rows for batch in batches) == split_sizes(len(store.tuples))[1]
        queries = np.concatenate([batch.texts[: batch.rows] for batch in batches])
        others = np.concatenate([batch.texts[: batch.rows] for batch in other_seed.held_out(dataset)])
        assert queries.tolist() == others.tolist()  # runs with other seeds share their validation set
