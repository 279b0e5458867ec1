"""The plan: every tuple once an epoch, on whatever process, by integers alone.

python -m pytest tests/data/test_plan.py
"""

import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import plan
from data.plan import Plan, batch_bounds, choose_negatives, ranks_of_rows, shuffled, split_rows, split_sizes


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
        for step in range(epoch * plan.steps_per_epoch + 1, (epoch + 1) * plan.steps_per_epoch + 1):
            what = plan.step(step)
            assert what.epoch == epoch
            seen[what.dataset].update(what.rows.tolist())
        assert seen == [Counter(range(size)) for size in sizes]


def test_a_step_is_a_pure_function():
    first, again = Plan((400, 90, 7), 16, 3), Plan((400, 90, 7), 16, 3)
    for step in (40, 3, 1, 77, 3):  # in any order
        a, b = first.step(step), again.step(step)
        assert (a.dataset, a.epoch) == (b.dataset, b.epoch)
        assert a.rows.tolist() == b.rows.tolist()


def test_epochs_and_seeds_differ():
    orders = {
        (seed, epoch): tuple(tuple(plan.step(epoch * plan.steps_per_epoch + k).rows) for k in range(1, 6))
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
    monkeypatch.setattr(plan, "SORTED_ROWS", sorted_rows)  # 0: the network, which is for many rows, on few
    # Each value at each position, over many keys: chi squared with (rows - 1)^2 degrees of freedom has that mean and
    # twice that variance. Six standard deviations are 1 in 10^9 for one draw, and the keys are fixed: no flicker.
    draws = 4000
    table = np.zeros((rows, rows))
    for key in range(draws):
        table[np.arange(rows), shuffled(rows, plan._key(11, key), np.arange(rows))] += 1
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
    orders = np.stack([plan.dataset_order(counts, plan._key(1, epoch)) for epoch in range(epochs)])
    for step in (0, 10):  # none is exhausted after ten steps
        shares = np.bincount(orders[:, step], minlength=3) / epochs
        assert np.abs(shares - [0.5, 0.3, 0.2]).max() < 0.024
    assert all(np.bincount(order).tolist() == [50, 30, 20] for order in orders[:100])


# ------------------------------------------------------------------------------------------- weights


@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    weights=st.lists(st.floats(0.05, 5), min_size=4, max_size=4),
    batch=st.integers(1, 20),
    seed=st.integers(0, 2**31 - 1),
)
def test_a_weighted_dataset_goes_on_in_its_passes_from_epoch_to_epoch(sizes, weights, batch, seed):
    """What came of each dataset, cut into passes: each is a permutation, and no batch reaches into the next."""
    plan = Plan(tuple(sizes), batch, seed, tuple(weights[: len(sizes)]))
    assert plan.batches == tuple(
        max(1, int(weight * -(-size // batch) + 0.5)) for size, weight in zip(sizes, weights, strict=False)
    )
    came = [{} for _ in sizes]  # of each dataset: pass -> rows
    for epoch in range(3):
        steps = [plan.step(epoch * plan.steps_per_epoch + number + 1) for number in range(plan.steps_per_epoch)]
        assert tuple(sum(step.dataset == number for step in steps) for number in range(len(sizes))) == plan.batches
        for step in steps:
            came[step.dataset].setdefault(step.epoch, []).extend(step.rows.tolist())
    for number, (size, passes) in enumerate(zip(sizes, came, strict=True)):
        assert list(passes) == list(range(len(passes)))
        *whole, last = passes.values()
        assert all(sorted(rows) == list(range(size)) for rows in whole)
        assert len(set(last)) == len(last)
        whole_passes, rest = divmod(3 * plan.batches[number], plan.batches_of_pass[number])
        assert len(whole) + (len(last) == size) == whole_passes
        assert bool(rest) == (len(last) < size)


def test_weight_two_gives_every_tuple_twice_an_epoch_and_a_half_gives_the_other_half_in_the_next():
    plan = Plan((64, 64), 8, 5, (2.0, 0.5))
    steps = [plan.step(number + 1) for number in range(2 * plan.steps_per_epoch)]
    epochs = steps[: plan.steps_per_epoch], steps[plan.steps_per_epoch :]
    for steps in epochs:
        twice = Counter(row for step in steps if step.dataset == 0 for row in step.rows.tolist())
        assert twice == Counter(dict.fromkeys(range(64), 2))
    halves = [{row for step in steps if step.dataset == 1 for row in step.rows.tolist()} for steps in epochs]
    assert [len(half) for half in halves] == [32, 32]
    assert halves[0] | halves[1] == set(range(64))


def test_weight_one_is_the_plan_without_weights():
    for step in range(1, 60):
        plain, weighted = (Plan((70, 33), 8, 3, weights).step(step) for weights in ((), (1.0, 1.0)))
        assert (plain.dataset, plain.epoch, plain.rows.tolist()) == (
            weighted.dataset, weighted.epoch, weighted.rows.tolist(),
        )  # fmt: skip


@given(rows=st.integers(1, 3000))
def test_held_out_tuples_are_one_percent_at_least_one_and_never_trained_on(rows):
    trained, held_out = split_sizes(rows)
    assert trained + held_out == rows
    assert trained >= 1
    assert held_out == (max(1, rows // 100) if rows > 1 else 0)

    parts = [split_rows(np.arange(trained), rows), split_rows(np.arange(held_out), rows, held_out=True)]
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


def rows_of_ranks(costs: np.ndarray, world: int) -> list[np.ndarray]:
    ranks = ranks_of_rows(costs, world)
    return [np.flatnonzero(ranks == rank) for rank in range(world)]


@given(st.lists(st.integers(1, 2048), min_size=1, max_size=70), st.integers(1, 9))
def test_dealing_hands_out_every_row_once_and_evenly(costs, world):
    costs = np.array(costs)
    rows_by_rank = rows_of_ranks(costs, world)
    assert sorted(np.concatenate(rows_by_rank).tolist()) == list(range(len(costs)))
    loads = [costs[rows].sum() for rows in rows_by_rank]
    assert max(loads) - min(loads) <= costs.max()  # the last row dealt to the fullest went to the emptiest
    assert min(map(len, rows_by_rank)) >= 1 or len(costs) < world


def test_dealing_beats_slicing_on_heavy_tails():
    costs = np.random.default_rng(0).lognormal(5, 1, 256).astype(int)
    dealt = max(costs[rows].sum() for rows in rows_of_ranks(costs, 8))
    sliced = max(costs[part].sum() for part in np.array_split(np.arange(256), 8))
    assert dealt < 1.01 * costs.sum() / 8 < 1.1 * costs.sum() / 8 < sliced
