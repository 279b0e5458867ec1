"""Which tuples a step has, which of their negatives, and on which process: numbers only, no data.

The order of the data is a pure function of (seed, step, global batch): there is no iterator and no
state, so to resume is to continue at an integer, and 1, 2 and 4 processes with the same global batch
see the same batches. All randomness is a 64-bit counter hash, so it depends on no library's version.

Rules, each pinned in tests/data/test_plan.py:

- every training tuple of every dataset comes exactly once per pass over the dataset, which is an epoch;
- a global batch comes from one dataset. All batches are full but the last two of a dataset, which
  share what is left evenly; a dataset smaller than one batch is one smaller batch. Nothing is
  dropped and nothing is repeated, so no tuple can meet itself as a negative;
- datasets are drawn with probability proportional to their number of batches until exhausted;
- a dataset of weight w has w times as many batches in an epoch, rounded, at least one. They are the next ones of an
  endless sequence of passes over the dataset, each in an order of its own. So weight 2 gives every tuple twice an
  epoch; 0.5 gives half of them in one epoch and the others in the next. With weight 1, the default, an epoch is one
  pass. No batch reaches from one pass into the next, so no tuple meets itself;
- 1 % of each dataset, at least one tuple, is held out for validation (of a one-tuple dataset none).
"""

import heapq
import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

HELD_OUT = 0.01  # share of each dataset, as published
SPLIT_SEED = 0  # as published; not the run's seed, so that runs with other seeds share their validation set
SORTED_ROWS = 4096  # up to here a whole permutation is made: a third of a millisecond

# Streams of random numbers, kept apart by a number in each key.
_ORDER = 0  # of the datasets in an epoch
_ROWS = 1  # of a dataset's rows in an epoch
_NEGATIVES = 2  # which of a tuple's negatives are drawn
_SPLIT = 3  # which tuples are held out
_DROPOUT = 4

# splitmix64's finaliser: (shift, factor) twice, then a last shift.
_MIX = ((np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB)))
_LAST_SHIFT = np.uint64(31)
_KEY_STEP = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, splitmix64's step from one number to the next


@dataclass(frozen=True)
class Step:
    """What one global batch holds: `rows` [m] int64 are training rows 0 .. n-1 of dataset number `dataset`."""

    dataset: int
    epoch: int  # of this dataset: whole passes over it before this one; the run's epoch, where its weight is 1
    rows: np.ndarray


@dataclass(frozen=True)
class Plan:
    """The order of the training data.

    Args:
        sizes: training tuples of each dataset.
        global_batch: tuples of one step, over all processes.
        seed: the run's seed.
        weights: passes over each dataset in an epoch; () for one over each.
    """

    sizes: tuple[int, ...]
    global_batch: int
    seed: int
    weights: tuple[float, ...] = ()

    @cached_property
    def batches_of_pass(self) -> tuple[int, ...]:
        """Global batches of each dataset in one pass over it."""
        return tuple(batch_count(size, self.global_batch) for size in self.sizes)

    @cached_property
    def batches(self) -> tuple[int, ...]:
        """Global batches of each dataset in one epoch."""
        weights = self.weights or (1.0,) * len(self.sizes)
        return tuple(map(weighted_count, self.batches_of_pass, weights))

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer updates of one pass over all datasets."""
        return sum(self.batches)

    def step(self, step: int) -> Step:
        """The global batch of step 1, 2, 3, ..., counted over all epochs."""
        epoch, within = divmod(step - 1, self.steps_per_epoch)
        order = dataset_order(self.batches, _key(self.seed, _ORDER, epoch))
        dataset = int(order[within])
        earlier = int((order[:within] == dataset).sum())  # how many of its batches came before in this epoch
        earlier += epoch * self.batches[dataset]  # and in all
        passes, number = divmod(earlier, self.batches_of_pass[dataset])
        size = self.sizes[dataset]
        begin, end = batch_bounds(size, self.global_batch, number)
        rows = shuffled(size, _key(self.seed, _ROWS, passes, dataset), np.arange(begin, end))
        return Step(dataset, passes, rows)

    def dropout_seed(self, step: int, rank: int) -> int:
        """What seeds the dropout of one process in step 1, 2, ...: no random state runs on from step to step."""
        return _key(self.seed, _DROPOUT, step - 1, rank)


def batch_count(rows: int, batch: int) -> int:
    """How many batches of at most `batch` rows a dataset of `rows` rows is cut into.

    >>> batch_count(10, 4)
    3
    """
    return math.ceil(rows / batch)


def weighted_count(batches: int, weight: float) -> int:
    """How many batches an epoch takes of a dataset whose pass has `batches`: `weight` times as many, at least one.

    >>> [weighted_count(3, weight) for weight in (1, 2, 0.5, 0.1)]
    [3, 6, 2, 1]
    """
    return max(1, math.floor(weight * batches + 0.5))


def batch_bounds(rows: int, batch: int, number: int) -> tuple[int, int]:
    """Where batch `number` of a dataset's epoch begins and ends: full batches, then two that share the rest evenly.

    >>> [batch_bounds(10, 4, number) for number in range(3)]
    [(0, 4), (4, 7), (7, 10)]

    A last batch of a single tuple would have an in-batch loss of exactly 0 and weigh as much as any other.
    """
    count = batch_count(rows, batch)
    if count == 1:
        return 0, rows
    if number < count - 2:
        return number * batch, (number + 1) * batch
    begin = (count - 2) * batch  # of the last two
    middle = rows - (rows - begin) // 2  # of an odd rest the first has one more
    if number == count - 2:
        return begin, middle
    return middle, rows


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
    uniform = _uniform(_hash(key, np.arange(len(datasets))))
    rates = np.asarray(counts)[datasets]
    gaps = -np.log1p(-uniform) / rates  # exponential: between one arrival and the next of the same dataset
    starts = np.cumsum([0, *counts[:-1]])[datasets]  # where each dataset's gaps begin
    sums = np.cumsum(gaps)  # over all datasets, one after the other
    sums_before = (sums - gaps)[starts]  # what the datasets before this one add up to
    arrivals = sums - sums_before
    return datasets[np.argsort(arrivals, kind="stable")]


def shuffled(rows: int, key: int, positions: np.ndarray) -> np.ndarray:
    """What stands at `positions` in the permutation of range(rows) that `key` names; int64, same shape.

    Few rows are sorted by their hash. For many, a Feistel network over the next power of four is walked
    until the value falls inside: bijective whatever the round function, and no array of `rows` numbers
    is ever made (6 million rows would cost 48 MB and half a second an epoch, on every process).
    """
    if rows <= SORTED_ROWS:
        return np.argsort(_hash(key, np.arange(rows)), kind="stable")[positions]
    half = ((rows - 1).bit_length() + 1) // 2  # bits: 4^half is the next power of four
    values = positions.astype(np.int64)
    outside = np.ones(values.shape, bool)
    while outside.any():
        values[outside] = _permute(values[outside], key, half)
        outside = values >= rows
    return values


def _permute(values: np.ndarray, key: int, half: int) -> np.ndarray:
    """A permutation of the numbers below 4^half: a Feistel network of eight rounds."""
    left = values >> half
    right = values & ((1 << half) - 1)
    for table in _rounds(key, half):
        left, right = right, left ^ table[right]
    return left << half | right


@lru_cache(maxsize=64)
def _rounds(key: int, half: int) -> np.ndarray:
    """The round functions of a Feistel network on 2 * `half` bits, int64 [8, 2^half]: 256 KiB for 16 million rows.

    As tables, because a batch asks for few values at a time: looking them up takes a sixth of the time of hashing.
    """
    mask = np.uint64((1 << half) - 1)
    inputs = np.arange(1 << half)
    return np.stack([_hash(key + number, inputs) & mask for number in range(8)]).astype(np.int64)


def split_sizes(rows: int) -> tuple[int, int]:
    """(training tuples, held-out tuples) of a dataset of `rows` tuples."""
    if rows <= 1:
        return rows, 0
    held_out = max(1, int(rows * HELD_OUT))
    return rows - held_out, held_out


def split_rows(rows: np.ndarray, size: int, held_out: bool = False) -> np.ndarray:
    """Map training (or held-out) row numbers to rows of the store, int64, same shape.

    Args:
        rows: of the training part, or of the held-out part.
        size: tuples of the whole dataset.

    The held-out part is the head of one fixed permutation of the dataset, the training part its tail.
    """
    positions = rows
    if not held_out:
        _, head = split_sizes(size)
        positions = rows + head
    return shuffled(size, _key(SPLIT_SEED, _SPLIT), positions)


def choose_negatives(negatives: np.ndarray, count: int, seed: int, epoch: int, rows: np.ndarray) -> np.ndarray:
    """Draw `count` negatives per tuple without replacement, int [m, min(count, K)]; -1 where fewer exist.

    A pure function of (seed, epoch, row): another process count, batch size or resume draws the same.

    Args:
        negatives: [m, K] text numbers, -1 = missing.
        rows: [m] the tuples' rows in their store.
    """
    slots = negatives.shape[1]
    counters = rows[:, None] * max(slots, 1) + np.arange(slots)  # [m, K], another number for each slot of each row
    hashes = _hash(_key(seed, _NEGATIVES, epoch), counters)  # [m, K]
    hashes[negatives < 0] = np.iinfo(np.uint64).max  # missing ones sort last
    chosen = np.argsort(hashes, axis=1, kind="stable")[:, :count]
    return np.take_along_axis(negatives, chosen, axis=1)


def ranks_of_rows(costs: np.ndarray, world: int) -> np.ndarray:
    """The process of each row of a global batch, int64 [m], such that the costs of all processes come out alike.

    Longest first, each to the process with the least so far. The loss does not depend on it: gathering is exact for
    any number of rows on a process, none included.

    Args:
        costs: [m] int64, tokens of each row.
    """
    longest_first = np.argsort(-costs, kind="stable")
    # A heap of load * world + rank: the process with the least is on top, of equal ones the first. As one number each,
    # because thousands of rows go through it while the training thread waits for the interpreter.
    heap = list(range(world))
    added = (costs[longest_first] * world).tolist()
    least = [heapq.heapreplace(heap, heap[0] + cost) for cost in added]  # what was on top, as each row came
    ranks = np.empty(len(costs), np.int64)
    ranks[longest_first] = np.array(least, np.int64) % world
    return ranks


# --------------------------------------------------------------------------------- counter hashing


@lru_cache(maxsize=1024)
def _key(*numbers: int) -> int:
    """One 62-bit key for a tuple of integers: a name for a stream of random numbers."""
    key = 0
    for number in numbers:
        key = int(_hash(key, np.array([number]))[0]) >> 2
    return key


def _hash(key: int, values: np.ndarray) -> np.ndarray:
    """A uint64 hash of each value under `key`: the finaliser of splitmix64 (Steele, Lea, Flood 2014)."""
    x = values.astype(np.uint64)
    x += np.uint64(key * _KEY_STEP % 2**64)
    for shift, factor in _MIX:  # in place: a batch hashes a hundred times, few numbers each time
        x ^= x >> shift
        x *= factor
    x ^= x >> _LAST_SHIFT
    return x


def _uniform(hashes: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1), float64, from 64-bit hashes: their upper 53 bits."""
    return (hashes >> np.uint64(11)) * 2.0**-53
