"""Which tuples at which step, which of their negatives, and how they are packed into one batch.

The order of the data is a pure function of (seed, step, global batch): there is no iterator and no
state, so to resume is to continue at an integer, and 1, 2 and 4 processes with the same global batch
see the same batches. All randomness is a 64-bit counter hash, so it depends on no library's version.

Rules, each pinned in tests/test_data.py:

- every training tuple of every dataset comes exactly once per epoch;
- a global batch comes from one dataset. All batches are full but the last two of a dataset, which
  share what is left evenly; a dataset smaller than one batch is one smaller batch. Nothing is
  dropped and nothing is repeated, so no tuple can meet itself as a negative;
- datasets are drawn with probability proportional to their number of batches until exhausted;
- 1 % of each dataset, at least one tuple, is held out for validation (of a one-tuple dataset none).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from token_store import TokenStore

HELD_OUT = 0.01  # share of each dataset, as published
SPLIT_SEED = 0  # as published; not the run's seed, so that runs with other seeds share their validation set
SORTED_ROWS = 4096  # up to here a whole permutation is made: a third of a millisecond
_ORDER, _ROWS, _NEGATIVES, _SPLIT = range(4)  # one stream of random numbers each


# ------------------------------------------------------------------------------------------- plan


@dataclass(frozen=True)
class Step:
    """What one global batch holds: `rows` [m] int64 are training rows 0 .. n-1 of dataset number `dataset`."""

    dataset: int
    epoch: int
    rows: np.ndarray


@dataclass(frozen=True)
class Plan:
    """The order of the training data.

    Args:
        sizes: training tuples of each dataset.
        global_batch: tuples of one step, over all processes.
        seed: the run's seed.
    """

    sizes: tuple[int, ...]
    global_batch: int
    seed: int

    @cached_property
    def batches(self) -> tuple[int, ...]:
        """Global batches of each dataset in one epoch."""
        return tuple(-(-size // self.global_batch) for size in self.sizes)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer updates of one pass over all datasets."""
        return sum(self.batches)

    def step(self, step: int) -> Step:
        """The global batch of update `step`, counted from 0 over all epochs."""
        epoch, within = divmod(step, self.steps_per_epoch)
        order = dataset_order(self.batches, _key(self.seed, _ORDER, epoch))
        dataset = int(order[within])
        number = int((order[:within] == dataset).sum())  # how many of its batches came before
        positions = np.arange(*batch_bounds(self.sizes[dataset], self.global_batch, number))
        return Step(dataset, epoch, shuffled(self.sizes[dataset], _key(self.seed, _ROWS, epoch, dataset), positions))


def batch_bounds(rows: int, batch: int, number: int) -> tuple[int, int]:
    """Where batch `number` of a dataset's epoch begins and ends: full batches, then two that share the rest evenly.

    >>> [batch_bounds(10, 4, number) for number in range(3)]
    [(0, 4), (4, 7), (7, 10)]

    A last batch of a single tuple would have an in-batch loss of exactly 0 and weigh as much as any other.
    """
    count = -(-rows // batch)
    tail = rows - max(count - 2, 0) * batch  # what the last two batches hold together
    cuts = [number * batch, (number + 1) * batch]
    return tuple(cut if cut <= rows - tail else rows if cut >= count * batch else rows - tail // 2 for cut in cuts)


@lru_cache(maxsize=2)
def dataset_order(counts: tuple[int, ...], key: int) -> np.ndarray:
    """The dataset of each step of an epoch, int64 [sum(counts)].

    F2LLM report: draw a source with probability proportional to its number of batches, until it is
    exhausted. Done at once: give dataset i a Poisson process of rate counts[i] and take its first
    counts[i] arrivals. In merged processes each next arrival belongs to i with probability
    proportional to its rate, whatever came before; leaving out exhausted datasets keeps the odds of
    the others. So sorting all arrival times is the published draw.
    """
    datasets = np.repeat(np.arange(len(counts)), counts)
    gaps = -np.log1p(-_uniform(_hash(key, np.arange(len(datasets))))) / np.asarray(counts)[datasets]
    starts = np.cumsum([0, *counts[:-1]])[datasets]  # where each dataset's gaps begin
    sums = np.cumsum(gaps)
    arrivals = sums - (sums - gaps)[starts]
    return datasets[np.argsort(arrivals, kind="stable")]


def shuffled(rows: int, key: int, positions: np.ndarray) -> np.ndarray:
    """What stands at `positions` in the permutation of range(rows) that `key` names; int64, same shape.

    Few rows are sorted by their hash. For many, a Feistel network over the next power of four is walked
    until the value falls inside: bijective whatever the round function, and no array of `rows` numbers
    is ever made (6 million rows would cost 48 MB and half a second an epoch, on every process).
    """
    if rows <= SORTED_ROWS:
        return np.argsort(_hash(key, np.arange(rows)), kind="stable")[positions]
    half = ((rows - 1).bit_length() + 1) // 2
    mask = np.uint64((1 << half) - 1)
    values = positions.astype(np.uint64)
    outside = np.ones(values.shape, bool)
    while outside.any():
        left, right = values[outside] >> np.uint64(half), values[outside] & mask
        for round in range(8):
            left, right = right, left ^ (_hash(key + round, right) & mask)
        values[outside] = left << np.uint64(half) | right
        outside = values >= rows
    return values.astype(np.int64)


def split_sizes(rows: int) -> tuple[int, int]:
    """(training tuples, held-out tuples) of a dataset of `rows` tuples."""
    held_out = max(1, int(rows * HELD_OUT)) if rows > 1 else 0
    return rows - held_out, held_out


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


def store_rows(store: TokenStore, rows: np.ndarray, held_out: bool = False) -> np.ndarray:
    """Rows of the store for rows of its training part (or of its held-out part), int64 [m].

    The held-out part is the head of one fixed permutation of the store, the training part its tail.
    """
    _, head = split_sizes(len(store.tuples))
    return shuffled(len(store.tuples), _key(SPLIT_SEED, _SPLIT), rows if held_out else rows + head)


def choose_negatives(negatives: np.ndarray, count: int, seed: int, epoch: int, rows: np.ndarray) -> np.ndarray:
    """Draw `count` negatives a tuple without replacement, int [m, min(count, K)]; -1 where fewer exist.

    A pure function of (seed, epoch, row): another process count, batch size or resume draws the same.

    Args:
        negatives: [m, K] text numbers, -1 = missing.
        rows: [m] the tuples' rows in their store.
    """
    slots = negatives.shape[1]
    keys = _hash(_key(seed, _NEGATIVES, epoch), rows[:, None] * max(slots, 1) + np.arange(slots))  # [m, K]
    keys[negatives < 0] = np.iinfo(np.uint64).max  # missing ones sort last
    chosen = np.argsort(keys, axis=1, kind="stable")[:, :count]
    return np.take_along_axis(negatives, chosen, axis=1)


def process_slice(rows: int, rank: int, world: int) -> slice:
    """The part of a global batch of `rows` tuples that process `rank` of `world` gets; sizes differ by at most 1."""
    return slice(rows * rank // world, rows * (rank + 1) // world)


# ------------------------------------------------------------------------------------------ batch


@dataclass(frozen=True)
class Batch:
    """One process's part of a step, without padding. Text order: queries | positives | negatives."""

    tokens: Tensor  # [T] int64, all texts end to end
    cu_seqlens: Tensor  # [texts + 1] int32, where each text begins
    mask: Tensor  # [b, n] bool, True where a negative exists; only those are in `tokens`
    texts: np.ndarray  # [texts] text numbers in the store
    lengths: np.ndarray  # [texts] tokens of each, as in cu_seqlens, but never on a device
    counts: tuple[int, ...]  # rows on each process; their sum is the global batch
    begin: int  # the first of this process's rows in the global batch
    negatives: int  # existing negatives on all processes together

    @property
    def rows(self) -> int:
        """b, the queries in this batch; 0 for a process with nothing to do."""
        return self.mask.shape[0]

    @property
    def targets(self) -> Tensor:
        """[b] int64, where each query's own positive stands among the positives of all processes."""
        return torch.arange(self.rows, device=self.tokens.device) + self.begin

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`."""
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in ("tokens", "cu_seqlens", "mask")}
        return replace(self, **moved)

    def split(self, embeddings: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings [texts, d] as queries [b, d], positives [b, d], negatives [b, n, d] (zeros where none exists)."""
        b, n = self.mask.shape
        queries, positives, rest = embeddings[:b], embeddings[b : 2 * b], embeddings[2 * b : len(self.texts)]
        negatives = embeddings.new_zeros(b, n, embeddings.shape[1])
        return queries, positives, negatives.masked_scatter(self.mask[..., None], rest)


@dataclass(frozen=True)
class Feed:
    """This process's part of every global batch, of training and of validation."""

    stores: list[TokenStore]
    negatives: list[int]  # hard negatives drawn a tuple, by dataset
    plan: Plan
    max_length: int  # tokens of a text at most, EOS included
    rank: int = 0
    world: int = 1

    def training(self, step: int) -> tuple[int, Batch]:
        """(dataset, batch) of update `step`, counted from 0."""
        what = self.plan.step(step)
        rows = store_rows(self.stores[what.dataset], what.rows)
        return what.dataset, self._batch(what.dataset, rows, what.epoch)

    def held_out(self, dataset: int) -> Iterator[Batch]:
        """A dataset's held-out tuples; their negatives are those of epoch 0, the same at each validation."""
        _, size = split_sizes(len(self.stores[dataset].tuples))
        for number in range(-(-size // self.plan.global_batch)):
            positions = np.arange(*batch_bounds(size, self.plan.global_batch, number))
            yield self._batch(dataset, store_rows(self.stores[dataset], positions, held_out=True), 0)

    def _batch(self, dataset: int, rows: np.ndarray, epoch: int) -> Batch:
        store = self.stores[dataset]
        chosen = choose_negatives(store.tuples[rows, 2:], self.negatives[dataset], self.plan.seed, epoch, rows)
        chosen[cut_alike(store, store.tuples[rows, 1], chosen, self.max_length)] = -1
        return make_batch(store, rows, chosen, self.max_length, self.rank, self.world)


def make_batch(
    store: TokenStore, rows: np.ndarray, negatives: np.ndarray, max_length: int, rank: int = 0, world: int = 1
) -> Batch:
    """The part of process `rank` of `world` in a global batch.

    Args:
        rows: [m] rows of the store, the whole global batch.
        negatives: [m, n] text numbers, -1 = missing.
        max_length: tokens of a text at most, EOS included.
    """
    shares = [process_slice(len(rows), r, world) for r in range(world)]
    mine = shares[rank]
    tuples, mask = store.tuples[rows[mine]], negatives[mine] >= 0
    texts = np.concatenate([tuples[:, 0], tuples[:, 1], negatives[mine][mask]])
    tokens, cu_seqlens = pack(store, texts, max_length)
    return Batch(
        tokens=torch.from_numpy(tokens),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        mask=torch.from_numpy(mask),
        texts=texts,
        lengths=np.diff(cu_seqlens),
        counts=tuple(share.stop - share.start for share in shares),
        begin=mine.start,
        negatives=int((negatives >= 0).sum()),
    )


def cut_alike(store: TokenStore, positives: np.ndarray, negatives: np.ndarray, max_length: int) -> np.ndarray:
    """Where a negative becomes its own positive when both are cut to `max_length` tokens, bool [m, n].

    Args:
        positives: [m] text numbers.
        negatives: [m, n] text numbers, -1 = missing.
    """
    alike = np.zeros(negatives.shape, bool)
    if (store.meta["max_seq_length"] or max_length + 1) <= max_length:
        return alike  # nothing is cut, and the store holds no such negative
    long = [store.offsets[x + 1] - store.offsets[x] >= max_length for x in (positives[:, None], negatives)]
    for row, column in np.argwhere(long[0] & long[1] & (negatives >= 0)):
        heads = (store.offsets[number] for number in (positives[row], negatives[row, column]))
        first, second = (store.tokens[head : head + max_length - 1] for head in heads)
        alike[row, column] = np.array_equal(first, second)
    return alike


def pack(store: TokenStore, texts: np.ndarray, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Lay texts end to end, each cut to `max_length` tokens with EOS kept as the last.

    No texts at all become one that is only an EOS: the model of a process without rows still runs, so that
    the process takes part in every collective of the step.

    Args:
        texts: [n] text numbers.

    Returns:
        tokens int64 [T], cu_seqlens int32 [n + 1].
    """
    starts = store.offsets[texts]
    lengths = np.minimum(store.offsets[texts + 1] - starts, max_length)
    pieces = [store.tokens[start : start + length] for start, length in zip(starts, lengths, strict=True)]
    ends = np.cumsum(lengths) if pieces else np.array([1])
    tokens = np.concatenate(pieces or [[store.eos]]).astype(np.int64)
    tokens[ends - 1] = store.eos
    return tokens, np.concatenate([[0], ends]).astype(np.int32)


# --------------------------------------------------------------------------------- counter hashing


def _key(*numbers: int) -> int:
    """One 62-bit key for a tuple of integers: a name for a stream of random numbers."""
    key = 0
    for number in numbers:
        key = int(_hash(key, np.array([number]))[0]) >> 2
    return key


def _hash(key: int, values: np.ndarray) -> np.ndarray:
    """uint64 hash of each value under `key`: the finaliser of splitmix64 (Steele, Lea, Flood 2014)."""
    x = values.astype(np.uint64) + np.uint64(key * 0x9E3779B97F4A7C15 % 2**64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _uniform(hashes: np.ndarray) -> np.ndarray:
    """float64 in [0, 1) from 64-bit hashes."""
    return (hashes >> np.uint64(11)) * 2.0**-53
