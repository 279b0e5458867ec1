"""The data of a run as one process meets them: a batch for every step, made a step ahead, and the held-out tuples."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from data.batch import Batch, make_batch, truncates_to_its_positive
from data.plan import Plan, batch_bounds, choose_negatives, split_rows, split_sizes
from data.token_store import TokenStore


@dataclass(frozen=True)
class Feed:
    """This process's part of every global batch, of training and of validation."""

    stores: list[TokenStore]
    negatives: list[int]  # hard negatives drawn a tuple, by dataset
    plan: Plan
    max_length: int  # tokens of a text at most, EOS included
    rank: int = 0
    world: int = 1
    budget: int = 0  # tokens of a forward pass at most, 0 = any number

    def training(self, step: int) -> tuple[int, Batch]:
        """(dataset, batch) of step 1, 2, 3, ..."""
        what = self.plan.step(step)
        rows = split_rows(what.rows, len(self.stores[what.dataset].tuples))
        return what.dataset, self._batch(what.dataset, rows, what.epoch)

    def sources(self, step: int) -> str:
        """Where the global batch of step 1, 2, ... comes from, for people: rows of a store."""
        what = self.plan.step(step)
        store = self.stores[what.dataset]
        rows = split_rows(what.rows, len(store.tuples))
        return f"tuples {', '.join(map(str, rows))} of {store.folder}"

    def held_out(self, dataset: int) -> Iterator[Batch]:
        """A dataset's held-out tuples; their negatives are those of epoch 0, the same at each validation."""
        tuples = len(self.stores[dataset].tuples)
        _, size = split_sizes(tuples)
        for number in range(-(-size // self.plan.global_batch)):
            positions = np.arange(*batch_bounds(size, self.plan.global_batch, number))
            yield self._batch(dataset, split_rows(positions, tuples, held_out=True), 0)

    def _batch(self, dataset: int, rows: np.ndarray, epoch: int) -> Batch:
        store = self.stores[dataset]
        chosen = choose_negatives(store.tuples[rows, 2:], self.negatives[dataset], self.plan.seed, epoch, rows)
        chosen[truncates_to_its_positive(store, store.tuples[rows, 1], chosen, self.max_length)] = -1
        return make_batch(store, rows, chosen, self.max_length, self.rank, self.world, self.budget)


class Prefetcher:
    """Batches of a feed, each made by a thread while the step before it runs, so that no step waits for its data."""

    def __init__(self, feed: Feed, pin: bool):
        self.feed, self.pin = feed, pin
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self.next: tuple[int, Future] | None = None

    def training(self, step: int) -> tuple[int, Batch]:
        """What `Feed.training` gives; the following step's is begun."""
        number, future = self.next or (-1, None)
        if number != step:
            future = self.pool.submit(self._make, step)
        self.next = (step + 1, self.pool.submit(self._make, step + 1))
        return future.result()

    def _make(self, step: int) -> tuple[int, Batch]:
        dataset, batch = self.feed.training(step)
        return dataset, batch.pinned() if self.pin else batch


def describe(stores: list[TokenStore]) -> list[str]:
    """What there is to train on, for people: a summary, then a line a dataset."""
    rows, size, width = (
        sum(len(s.tuples) for s in stores),
        sum(s.nbytes for s in stores),
        max(len(s.name) for s in stores),
    )
    lines = [f"data ready: {len(stores)} dataset{'s'[: len(stores) > 1]}, {rows:,} tuples, {size / 1e6:,.1f} MB"]
    for store in stores:
        trained, held_out = split_sizes(len(store.tuples))
        lines.append(
            f"  {store.name:{width}}  {store.task:14}  {trained:,} tuples + {held_out:,} held out, up to "
            f"{store.meta['negatives']} negatives, {store.meta['tokens']:,} tokens, {store.nbytes / 1e6:,.1f} MB"
        )
    return lines
