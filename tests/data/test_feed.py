"""The batch: what every process sees at every step.

python -m pytest tests/data/test_feed.py
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
import toy
from conftest import tokenize

from data import batch as batches
from data.feed import Feed, Prefetcher
from data.plan import Plan, split_sizes
from data.token_store import open_store


@pytest.fixture(scope="module")
def stores(toy_world):
    return [open_store(toy_world.stores / f"toy_{task}") for task in ("classification", "clustering", "retrieval")]


def feed(stores, rank: int = 0, world: int = 1, global_batch: int = 12, max_length: int = 64, seed: int = 0) -> Feed:
    sizes = tuple(split_sizes(len(store.tuples))[0] for store in stores)
    return Feed(stores, [1, 5, 3], Plan(sizes, global_batch, seed), [max_length] * 3, rank, world)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_all_processes_together_hold_the_batch_of_one(stores, world):
    alone = feed(stores)
    for step in range(1, alone.plan.steps_per_epoch + 1):
        dataset, whole = alone.training(step)
        parts = [feed(stores, rank, world).training(step) for rank in range(world)]
        assert {number for number, _ in parts} == {dataset}
        batches = [batch for _, batch in parts]
        assert all(batch.counts == batches[0].counts and batch.negatives == whole.negatives for batch in batches)
        assert [batch.rows for batch in batches] == list(batches[0].counts)
        assert [batch.begin for batch in batches] == np.cumsum([0, *batches[0].counts])[:-1].tolist()
        assert sorted(sum((tuples_of(batch) for batch in batches), [])) == sorted(tuples_of(whole))
        assert {batch.heaviest for batch in batches} == {
            max(int(batch.lengths.sum()) for batch in batches if batch.rows)
        }
        assert world > whole.rows or all(batch.rows for batch in batches)


def tuples_of(batch) -> list[tuple]:
    """(query, positive, *its negatives) as text numbers, for each row."""
    negatives = np.full(batch.mask.shape, -1)
    negatives[batch.mask.numpy()] = batch.texts[2 * batch.rows :]
    return [
        tuple(row)
        for row in np.c_[batch.texts[: batch.rows], batch.texts[batch.rows : 2 * batch.rows], negatives].tolist()
    ]


def test_no_tuple_meets_itself_as_a_negative(stores):
    alone = feed(stores, global_batch=4)
    for step in range(1, 2 * alone.plan.steps_per_epoch + 1):
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
    tokens, cu_seqlens = batches.pack(store, texts, 1000)
    assert tokens.tolist() == sum(originals, [])
    assert np.diff(cu_seqlens).tolist() == [len(text) for text in originals]
    tokens, cu_seqlens = batches.pack(store, texts, 6)
    expected = [text if len(text) <= 6 else [*text[:5], store.eos] for text in originals]
    assert max(map(len, originals)) > 6  # something was cut
    assert tokens.tolist() == sum(expected, [])
    assert np.diff(cu_seqlens).tolist() == [len(text) for text in expected]


def test_a_negative_that_is_cut_to_its_positive_is_masked(toy_world, tmp_path):
    rows = toy.raw_rows(20, 2)
    same = "The river is old and the castle is old and the engine is old"
    for row in rows[::2]:
        row |= {"passage": f"{same} {row['passage']}", "negative_1": f"{same} {row['negative_1']}"}
    toy.write_parquet(tmp_path / "raw" / "x.parquet", rows)
    assert tokenize(tmp_path / "raw", tmp_path / "stores", toy_world.backbone, "--task", "retrieval") == 0
    stores = [open_store(tmp_path / "stores" / "x")]
    long, short = (Feed(stores, [2], Plan((19,), 19, 0), [length]).training(1)[1] for length in (128, 8))
    assert long.mask.all()
    assert 8 <= (~short.mask).sum() <= 10  # one of two in every second tuple, of which one or none is held out
    for batch, length in ((long, 128), (short, 8)):
        distinct = [tuple(text.tolist()) for text in batch.tokens.split(batch.lengths.tolist())]
        texts = [distinct[place] for place in batch.index]
        assert max(map(len, texts)) <= length
        negatives = iter(texts[2 * batch.rows :])
        for positive, mask in zip(texts[batch.rows :], batch.mask.tolist(), strict=False):
            assert all(next(negatives) != positive for real in mask if real)


def test_a_process_without_rows_still_has_something_to_compute(stores):
    batch = batches.make_batch(stores[2], np.array([3]), np.array([[1, 2]]), 64, rank=1, world=2)
    assert batch.rows == 0
    assert batch.counts == (1, 0)
    assert batch.tokens.tolist() == [stores[2].eos]
    queries, positives, negatives = batch.split(batch.spread(torch.ones(1, 4)))
    assert (queries.shape, positives.shape, negatives.shape) == ((0, 4), (0, 4), (0, 2, 4))


def test_split_puts_embeddings_back_in_their_roles(stores):
    negatives = np.array([[4, -1], [-1, -1], [6, 7]])
    batch = batches.make_batch(stores[2], np.array([0, 1, 2]), negatives, 64)
    assert batch.mask.tolist() == [[True, False], [False, False], [True, True]]
    embeddings = torch.arange(9.0)[:, None].requires_grad_()  # 3 queries, 3 positives, 3 negatives
    queries, positives, found = batch.split(embeddings)  # spread already
    assert queries.flatten().tolist() == [0, 1, 2]
    assert positives.flatten().tolist() == [3, 4, 5]
    assert found.squeeze(-1).tolist() == [[6, 0], [0, 0], [7, 8]]
    found.sum().backward()
    assert embeddings.grad.flatten().tolist() == [0] * 6 + [1] * 3


@pytest.mark.parametrize("world", [1, 3])
def test_each_text_is_there_once_and_spreads_to_all_its_places(stores, world):
    shared = 0
    for rank in range(world):
        for step in range(1, feed(stores).plan.steps_per_epoch + 1):
            dataset, batch = feed(stores, rank, world).training(step)
            store = stores[dataset]
            assert len(set(batch.texts.tolist())) == len(batch.lengths) or not batch.rows
            shared += len(batch.texts) - len(batch.lengths)
            distinct = batch.tokens.split(batch.lengths.tolist())
            for number, place in zip(batch.texts, batch.index, strict=True):
                tokens = store.tokens[store.offsets[number] : store.offsets[number + 1]][:64].tolist()
                assert distinct[place].tolist() == [*tokens[:-1], store.eos]
            assert batch.lengths.tolist() == sorted(batch.lengths, reverse=True)
    assert shared > 30  # two label texts for all of the classification data


def test_a_process_with_fewer_parts_gets_empty_ones():
    assert batches.split_by_tokens(np.array([9, 5, 4, 3, 1]), 8) == [0, 1, 2, 5]
    assert batches.with_empty_parts([0, 4], parts=3) == (0, 4, 4, 4)
    assert batches.with_empty_parts([0, 2, 3, 6], parts=3) == (0, 2, 3, 6)


@pytest.mark.parametrize("world", [1, 2, 5])
def test_parts_hold_every_text_once_and_no_more_tokens_than_allowed_as_many_on_every_process(stores, world):
    for most in (1, 40, 200, 10**6):
        for step in range(1, 5):
            feeds = [replace(feed(stores, rank, world), max_tokens_per_forward=most) for rank in range(world)]
            batches = [own.training(step)[1] for own in feeds]
            assert len({batch.parts for batch in batches}) == 1
            assert batches[0].parts > 1 or most >= max(len(batch.tokens) for batch in batches)
            for batch in batches:
                parts = [batch.part(number) for number in range(batch.parts)]
                assert all(len(lengths) == 1 or len(tokens) <= most for tokens, _, lengths, _ in parts)
                assert all(len(tokens) and cu_seqlens[0] == 0 for tokens, cu_seqlens, _, _ in parts)
                assert all(np.diff(cu_seqlens).tolist() == lengths.tolist() for _, cu_seqlens, lengths, _ in parts)
                counted = torch.cat([tokens for tokens, _, _, size in parts if size] or [batch.tokens])
                assert counted.tolist() == batch.tokens.tolist()


@pytest.mark.parametrize("pin", [False, True])
def test_validation_batches_are_made_ahead_and_pinned_as_those_of_training(stores, monkeypatch, pin):
    monkeypatch.setattr(batches.Batch, "pinned", lambda batch: replace(batch, heaviest=-1))  # leaves a mark
    alone, ahead = feed(stores, global_batch=2), Prefetcher(feed(stores, global_batch=2), pin)
    for dataset in range(3):
        expected = list(alone.held_out(dataset))
        found = list(ahead.held_out(dataset))
        assert len(found) == len(expected) > 0
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours.tokens, theirs.tokens)
            assert (ours.heaviest == -1) == pin
    begun = ahead.held_out(2)
    next(begun)  # and no more of it: the following training batch comes all the same
    assert torch.equal(ahead.training(1)[1].tokens, alone.training(1)[1].tokens)


def test_validation_is_the_same_each_time_and_covers_what_is_held_out(stores):
    one, other_seed = feed(stores, global_batch=2), feed(stores, global_batch=2, seed=9)
    for dataset, store in enumerate(stores):
        batches = list(one.held_out(dataset))
        assert sum(batch.rows for batch in batches) == split_sizes(len(store.tuples))[1]
        queries = np.concatenate([batch.texts[: batch.rows] for batch in batches])
        others = np.concatenate([batch.texts[: batch.rows] for batch in other_seed.held_out(dataset)])
        assert queries.tolist() == others.tolist()  # runs with other seeds share their validation set


def test_batches_made_ahead_are_those_of_the_feed(stores, monkeypatch):
    alone, ahead = feed(stores), Prefetcher(feed(stores), pin=False)
    for step in (1, 2, 3, 7, 8, 3):  # a resume begins anywhere
        (dataset, batch), (other, expected) = ahead.training(step), alone.training(step)
        assert dataset == other
        assert all(torch.equal(getattr(batch, name), getattr(expected, name)) for name in batch.ON_DEVICE)
    assert ahead.next[0] == 4
    assert ahead.next[1].result()[0] == alone.training(4)[0]


def test_an_error_ahead_belongs_to_its_own_step(stores, monkeypatch):
    real = Feed.training

    def training(self, step):
        if step == 3:
            raise ValueError("a torn page")
        return real(self, step)

    monkeypatch.setattr(Feed, "training", training)
    ahead = Prefetcher(feed(stores), pin=False)
    for step in (1, 2):
        ahead.training(step)
    with pytest.raises(ValueError, match="a torn page"):
        ahead.training(3)
