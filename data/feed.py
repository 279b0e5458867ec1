"""The data of a run as one process meets them: a batch for every step, made a step ahead, and the held-out tuples."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from data.batch import Batch, make_batch, truncates_to_its_positive
from data.embedding_store import EmbeddingStore
from data.plan import Plan, batch_bounds, batch_count, choose_negatives, split_rows, split_sizes
from data.store_report import DATASETS_SHOWN, largest, write_lines
from data.token_store import TokenStore
from utils import plural


@dataclass(frozen=True)
class Feed:
    """This process's part of every global batch, of training and of validation."""

    stores: list[TokenStore]
    negatives: list[int]  # hard negatives drawn per tuple, by dataset
    plan: Plan
    max_lengths: list[int]  # tokens of a text at most, EOS included, by dataset
    rank: int = 0
    world: int = 1
    max_tokens_per_forward: int = 0  # 0 = any number
    embeddings: Sequence[EmbeddingStore] = ()  # a teacher's, of each dataset; empty where none are known

    def training(self, step: int) -> tuple[int, Batch]:
        """(dataset, batch) of step 1, 2, 3, ..."""
        planned = self.plan.step(step)
        rows = split_rows(planned.rows, len(self.stores[planned.dataset].tuples))
        batch = self._batch(planned.dataset, rows, planned.epoch)
        if self.embeddings:
            known = self.embeddings[planned.dataset].of(batch.distinct())  # [u, d]
            batch = replace(batch, teacher=torch.from_numpy(known))
        return planned.dataset, batch

    def sources(self, step: int) -> str:
        """Where the global batch of step 1, 2, ... comes from, for people: rows of a store."""
        planned = self.plan.step(step)
        store = self.stores[planned.dataset]
        rows = split_rows(planned.rows, len(store.tuples))
        return f"tuples {', '.join(map(str, rows))} of {store.folder}"

    def held_out(self, dataset: int) -> Iterator[Batch]:
        """A dataset's held-out tuples; their negatives are those of epoch 0, the same at each validation."""
        tuples = len(self.stores[dataset].tuples)
        _, held_out = split_sizes(tuples)
        for number in range(batch_count(held_out, self.plan.global_batch)):
            begin, end = batch_bounds(held_out, self.plan.global_batch, number)
            rows = split_rows(np.arange(begin, end), tuples, held_out=True)
            yield self._batch(dataset, rows, epoch=0)

    def _batch(self, dataset: int, rows: np.ndarray, epoch: int) -> Batch:
        """This process's part of the global batch of these rows of a store, [m]."""
        store = self.stores[dataset]
        max_length = self.max_lengths[dataset]
        positives = store.tuples[rows, 1]  # [m] text numbers
        negatives = choose_negatives(  # [m, n] text numbers, -1 = missing
            store.tuples[rows, 2:], self.negatives[dataset], self.plan.seed, epoch, rows
        )
        negatives[truncates_to_its_positive(store, positives, negatives, max_length)] = -1
        return make_batch(store, rows, negatives, max_length, self.rank, self.world, self.max_tokens_per_forward)


class Prefetcher:
    """Batches of a feed, each made by a thread while the step before it runs.

    Args:
        pin: lay them into pinned memory.
        first_in_thread: what the thread calls first, to work on the GPU of this process; None = nothing.
    """

    def __init__(self, feed: Feed, pin: bool, first_in_thread: Callable[[], None] | None = None):
        self.feed, self.pin = feed, pin
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="batches", initializer=first_in_thread)
        self.next: tuple[int, Future] | None = None  # the step that is being prepared, and its batch to be

    def training(self, step: int) -> tuple[int, Batch]:
        """What `Feed.training` gives; then the batch of the following step is begun."""
        if self.next is not None and self.next[0] == step:
            _, current = self.next
        else:  # the first step, or a step that nobody expected
            current = self.pool.submit(self._make, step)
        self.next = (step + 1, self.pool.submit(self._make, step + 1))
        return current.result()

    def held_out(self, dataset: int) -> Iterator[Batch]:
        """What `Feed.held_out` gives, each batch made while the one before it is in use."""
        batches = self.feed.held_out(dataset)
        following = self.pool.submit(self._next_of, batches)
        while True:
            batch = following.result()
            if batch is None:
                return
            following = self.pool.submit(self._next_of, batches)
            yield batch

    def _make(self, step: int) -> tuple[int, Batch]:
        dataset, batch = self.feed.training(step)
        return dataset, self._pinned(batch)

    def _next_of(self, batches: Iterator[Batch]) -> Batch | None:
        batch = next(batches, None)
        return None if batch is None else self._pinned(batch)

    def _pinned(self, batch: Batch) -> Batch:
        return batch.pinned() if self.pin else batch


def describe(stores: list[TokenStore], listing: Path | None = None) -> list[str]:
    """What there is to train on, for people: a summary, then a line per dataset; of many, of the largest.

    Args:
        listing: a file that gets the lines of all datasets where not all are shown; None writes none.
    """
    shown = stores
    if len(stores) > DATASETS_SHOWN:
        shown = largest(stores)
    lines = [_summary(stores), *_describe_each(shown)]
    others = len(stores) - len(shown)
    if others:
        lines[0] += "; the largest:"
        lines.append(f"  and {others:,} more")
    if others and listing is not None:
        write_lines(listing, _describe_each(stores))
        lines[-1] += f", in {listing}"
    return lines


def _summary(stores: list[TokenStore]) -> str:
    tuples = sum(len(store.tuples) for store in stores)
    nbytes = sum(store.nbytes for store in stores)
    return f"data ready: {plural(len(stores), 'dataset')}, {tuples:,} tuples, {nbytes / 1e6:,.1f} MB"


def _describe_each(stores: list[TokenStore]) -> list[str]:
    """A line about each dataset."""
    longest_name = max(len(store.name) for store in stores)
    return [_describe_one(store, longest_name) for store in stores]


def _describe_one(store: TokenStore, width: int) -> str:
    """A line about a dataset; `width` is that of the column of names."""
    trained, held_out = split_sizes(len(store.tuples))
    negatives = plural(store.meta["negatives"], "negative")
    return (
        f"  {store.name:{width}}  {store.task:14}  {plural(trained, 'tuple')} + {held_out:,} held out, "
        f"up to {negatives}, {store.meta['tokens']:,} tokens, {store.nbytes / 1e6:,.1f} MB"
    )
