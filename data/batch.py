"""What a process gets at a step: its texts laid end to end, without padding, each distinct text once.

The plan (plan.py) decides which tuples and which negatives belong to a step; here they become token ids.
`make_batch` tells the whole story:

1. share out the rows of the global batch, so that every process has about as many tokens (`ranks_of_rows`);
2. find the distinct texts of every process at once (`distinct_texts`). Of the other processes only two numbers are
   needed: the most tokens that one has, and the most parts that one needs (`most_parts`);
3. cut this process's texts, longest first, into parts that fit into one forward pass each (`split_by_tokens`);
4. lay them end to end (`pack`), and remember which text stands where in the tuples (`positions_in`).

The batch of the next step is made by a thread of the training process, so Python's part of it must be short: here it
grows with the rows of this process, and not with the number of processes.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.plan import ranks_of_rows
from data.token_store import TokenStore


@dataclass(frozen=True)
class Batch:
    """One process's part of a step: u distinct texts, and where in the tuples each of them stands.

    The tuples' texts are queries | positives | negatives. A text that occurs twice (a label, a shared passage) is
    embedded once, which changes neither loss nor gradient.
    """

    tokens: Tensor  # [T] int64, the distinct texts end to end, longest first
    cu_seqlens: Tensor  # [u + 1] int32, where each begins
    index: Tensor  # [texts] int64, for each text of the tuples, its row among the u distinct texts
    mask: Tensor  # [b, n] bool, True where a negative exists; only those are in `index`
    slots: Tensor  # [b, n] int64, which of the e negatives that exist stands there; e where there is none
    positives: Tensor  # [B] int64, text numbers of the positives of all processes: equal numbers are equal texts
    texts: np.ndarray  # [texts] text numbers in the store
    lengths: np.ndarray  # [u] tokens of each, as in cu_seqlens, but never on a device
    cuts: tuple[int, ...]  # where the u texts are cut into the parts of a step; as many parts on every process
    counts: tuple[int, ...]  # rows on each process; their sum is the global batch
    begin: int  # rows on the processes before this one: where its own stand when all are gathered
    negatives: int  # existing negatives on all processes together
    heaviest: int  # tokens on the process that has most: the others wait for it
    teacher: Tensor | None = None  # [u, d] fp32, a teacher's embeddings of the distinct texts, where they are known

    ON_DEVICE = ("tokens", "cu_seqlens", "index", "mask", "slots", "positives")

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
        return self._with_each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        """The same batch in pinned memory, so that copies to a GPU overlap with its work."""
        return self._with_each(Tensor.pin_memory)

    def _with_each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The same batch with each tensor that it has changed."""
        changed = {name: change(getattr(self, name)) for name in self.ON_DEVICE}
        if self.teacher is not None:
            changed["teacher"] = change(self.teacher)
        return replace(self, **changed)

    def distinct(self) -> np.ndarray:
        """Text numbers of the distinct texts, int64 [u]; text 0 stands for the empty one of a process without rows."""
        numbers = np.zeros(len(self.lengths), np.int64)
        numbers[self.index.numpy()] = self.texts
        return numbers

    @property
    def parts(self) -> int:
        """Forward passes of the step, the same number on every process."""
        return len(self.cuts) - 1

    def part(self, number: int) -> tuple[Tensor, Tensor, np.ndarray, int]:
        """The input of forward pass `number`, counted from 0.

        A process that has fewer texts than others have parts runs its shortest text again, and the result is ignored.

        Returns:
            tokens [t], cu_seqlens [k + 1] from 0, lengths [k], and how many of these k texts count: k or 0.
        """
        begin, end = self.cuts[number], self.cuts[number + 1]
        texts_that_count = end - begin
        if texts_that_count == 0:
            begin, end = len(self.lengths) - 1, len(self.lengths)  # the shortest text stands last
        first_token = int(self.lengths[:begin].sum())
        last_token = int(self.lengths[:end].sum())
        cu_seqlens = self.cu_seqlens[begin : end + 1] - first_token
        return self.tokens[first_token:last_token], cu_seqlens, self.lengths[begin:end], texts_that_count

    def spread(self, embeddings: Tensor) -> Tensor:
        """Give every text of the tuples its embedding: distinct texts [u, d] -> texts of the tuples [texts, d]."""
        return embeddings[self.index]

    def split(self, embeddings: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take spread embeddings [texts, d] apart by role.

        Returns:
            queries [b, d], positives [b, d], negatives [b, n, d] with zeros where there is no negative.
        """
        b = self.rows
        queries = embeddings[:b]
        positives = embeddings[b : 2 * b]
        existing = embeddings[2 * b : len(self.texts)]  # [e, d], only negatives that exist, row by row
        with_zeros = F.pad(existing, (0, 0, 0, 1))  # [e + 1, d]
        return queries, positives, with_zeros[self.slots]


def make_batch(
    store: TokenStore,
    rows: np.ndarray,
    negatives: np.ndarray,
    max_length: int,
    rank: int = 0,
    world: int = 1,
    max_tokens_per_forward: int = 0,
) -> Batch:
    """The part of process `rank` of `world` in a global batch.

    Every process computes the shares of all, so they agree on sizes without talking to each other.

    Args:
        rows: [m] rows of the store, the whole global batch.
        negatives: [m, n] text numbers, -1 = missing.
        max_length: tokens of a text at most, EOS included.
        max_tokens_per_forward: 0 = any number.
    """
    tuples = np.concatenate([store.tuples[rows, :2], negatives], axis=1)  # [m, 2 + n] text numbers, -1 = missing
    tokens_per_tuple = lengths_when_cut(store, tuples, max_length).sum(axis=1)  # [m]
    ranks = ranks_of_rows(tokens_per_tuple, world)  # [m]
    rows_by_rank = np.argsort(ranks, kind="stable")  # [m] the rows of process 0, then those of process 1, ...
    counts = np.bincount(ranks, minlength=world)  # [world]
    begin = int(counts[:rank].sum())

    texts = distinct_texts(store, tuples, ranks, world, max_length)
    first, last = texts.starts[rank], texts.starts[rank + 1]
    longest_first = np.argsort(-texts.lengths[first:last], kind="stable")
    own_distinct = texts.numbers[first:last][longest_first]  # [u]
    own_cuts = split_by_tokens(texts.lengths[first:last][longest_first], max_tokens_per_forward)

    own_rows = rows_by_rank[begin : begin + counts[rank]]  # [b]
    own_mask = negatives[own_rows] >= 0  # [b, n]
    own_negatives = negatives[own_rows][own_mask]  # those that exist, row by row
    own_texts = np.concatenate([tuples[own_rows, 0], tuples[own_rows, 1], own_negatives])  # [texts]
    tokens, cu_seqlens = pack(store, own_distinct, max_length)
    all_positives = tuples[rows_by_rank, 1]  # [B], in the order in which processes are gathered
    return Batch(
        tokens=torch.from_numpy(tokens),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        index=torch.from_numpy(positions_in(own_distinct, own_texts)),
        mask=torch.from_numpy(own_mask),
        slots=torch.from_numpy(slots_of(own_mask)),
        positives=torch.from_numpy(all_positives.astype(np.int64)),
        texts=own_texts,
        lengths=np.diff(cu_seqlens),
        cuts=with_empty_parts(own_cuts, most_parts(texts, max_length, max_tokens_per_forward)),
        counts=tuple(counts.tolist()),
        begin=begin,
        negatives=int((negatives >= 0).sum()),
        heaviest=int(texts.tokens_by_rank.max()),
    )


def lengths_when_cut(store: TokenStore, texts: np.ndarray, max_length: int) -> np.ndarray:
    """Tokens of each text cut to `max_length`, 0 where the text number is -1: int64, shape of `texts`."""
    lengths = store.offsets[texts + 1] - store.offsets[texts]
    return np.minimum(lengths, max_length) * (texts >= 0)


@dataclass(frozen=True)
class DistinctTexts:
    """The distinct texts of every process of a step, process by process; those of process r from starts[r] on."""

    numbers: np.ndarray  # [U] text numbers in the store, ascending within a process
    lengths: np.ndarray  # [U] tokens of each, when cut
    starts: np.ndarray  # [world + 1]

    @property
    def tokens_by_rank(self) -> np.ndarray:
        """Tokens of all distinct texts of each process, int64 [world]."""
        ends = np.concatenate([[0], np.cumsum(self.lengths)])  # [U + 1]
        return np.diff(ends[self.starts])


def distinct_texts(
    store: TokenStore, tuples: np.ndarray, ranks: np.ndarray, world: int, max_length: int
) -> DistinctTexts:
    """The distinct texts of all processes, found by sorting once.

    Args:
        tuples: [m, 2 + n] text numbers, -1 = missing.
        ranks: [m] the process of each row.
    """
    texts_in_store = len(store.offsets) - 1
    keys = ranks[:, None] * texts_in_store + tuples  # [m, 2 + n], another number for each text of each process
    keys = np.sort(keys[tuples >= 0])  # equal ones side by side; np.unique hashes first, and takes ten times as long
    is_new = np.diff(keys, prepend=-1) != 0
    keys = keys[is_new]  # [U]
    first_keys = np.arange(world + 1) * texts_in_store
    starts = np.searchsorted(keys, first_keys)
    numbers = keys - np.repeat(first_keys[:-1], np.diff(starts))
    return DistinctTexts(numbers, lengths_when_cut(store, numbers, max_length), starts)


def most_parts(texts: DistinctTexts, max_length: int, max_tokens_per_forward: int) -> int:
    """The parts of the process that needs most, as `split_by_tokens` would cut them; for all processes at once.

    >>> texts = DistinctTexts(np.arange(8), np.array([2, 2, 1, 9, 3, 1, 4, 5]), np.array([0, 3, 8, 8]))
    >>> most_parts(texts, max_length=9, max_tokens_per_forward=8)
    3
    """
    if not max_tokens_per_forward:
        return 1
    # Longest first within each process: the larger a process's number, the larger all its keys.
    first_keys = np.arange(len(texts.starts) - 1, dtype=np.int32) * (max_length + 1)
    offsets = np.repeat(first_keys, np.diff(texts.starts))  # [U]
    lengths = offsets - np.sort(offsets - texts.lengths.astype(np.int32))
    ends = np.concatenate(
        [[0], np.cumsum(lengths, dtype=np.int64)]
    )  # [U + 1] tokens before each text, of all processes
    places, last = texts.starts[:-1], texts.starts[1:]  # [world], where each process's next part begins
    parts = 0
    while (places < last).any():
        fitting = np.searchsorted(ends, ends[places] + max_tokens_per_forward, side="right") - 1
        places = np.minimum(np.maximum(fitting, places + 1), last)  # at least one text, and no other process's
        parts += 1
    return max(parts, 1)


def positions_in(distinct: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Where each of `texts` stands in `distinct`, int64 [texts]."""
    order = np.argsort(distinct)
    return order[np.searchsorted(distinct[order], texts)]


def slots_of(mask: np.ndarray) -> np.ndarray:
    """The number of each negative among those that exist, counted row by row; for the others how many exist.

    Made with the batch, so that the device need not count where the mask is true, for which the host would wait.

    >>> slots_of(np.array([[True, False], [True, True]]))
    array([[0, 3],
           [1, 2]])
    """
    numbers = np.cumsum(mask.ravel()).reshape(mask.shape) - 1
    return np.where(mask, numbers, np.count_nonzero(mask)).astype(np.int64)


def split_by_tokens(lengths: np.ndarray, max_tokens_per_forward: int) -> list[int]:
    """Cut texts into consecutive parts of at most so many tokens (or one text): [0, ..., len(lengths)].

    >>> split_by_tokens(np.array([9, 5, 4, 3, 1]), 8)
    [0, 1, 2, 5]
    """
    if not max_tokens_per_forward:
        return [0, len(lengths)]
    cuts = [0]
    tokens_in_part = 0
    for number, length in enumerate(lengths.tolist()):
        if tokens_in_part and tokens_in_part + length > max_tokens_per_forward:
            cuts.append(number)
            tokens_in_part = 0
        tokens_in_part += length
    return [*cuts, len(lengths)]


def with_empty_parts(cuts: list[int], parts: int) -> tuple[int, ...]:
    """The cuts of one process, followed by empty parts until it has as many parts as any other.

    All processes then run as many forward passes, and meet in the collectives of each.

    >>> with_empty_parts([0, 4], parts=3)
    (0, 4, 4, 4)
    """
    missing = parts - (len(cuts) - 1)
    return (*cuts, *[cuts[-1]] * missing)


def truncates_to_its_positive(
    store: TokenStore, positives: np.ndarray, negatives: np.ndarray, max_length: int
) -> np.ndarray:
    """Where a negative becomes its own positive when both are cut to `max_length` tokens, bool [m, n].

    Args:
        positives: [m] text numbers.
        negatives: [m, n] text numbers, -1 = missing.
    """
    becomes_positive = np.zeros(negatives.shape, bool)
    stored_length = store.meta["max_seq_length"]  # None: the store holds texts of any length
    if stored_length is not None and stored_length <= max_length:
        return becomes_positive  # nothing is cut, and the store holds no such negative
    positive_is_long = lengths_when_cut(store, positives, max_length) == max_length  # [m]
    negative_is_long = lengths_when_cut(store, negatives, max_length) == max_length  # [m, n]
    both_are_long = positive_is_long[:, None] & negative_is_long  # [m, n]
    rows, columns = np.nonzero(both_are_long)
    kept = max_length - 1  # tokens; behind them the cut puts EOS
    # Nearly all pairs differ in the last of these: one look at all pairs leaves few to be compared one by one.
    last_of_positives = store.tokens[store.offsets[positives[rows]] + kept - 1]
    last_of_negatives = store.tokens[store.offsets[negatives[rows, columns]] + kept - 1]
    alike = last_of_positives == last_of_negatives
    for row, column in zip(rows[alike], columns[alike], strict=True):
        positive = _first_tokens(store, positives[row], kept)
        negative = _first_tokens(store, negatives[row, column], kept)
        becomes_positive[row, column] = np.array_equal(positive, negative)
    return becomes_positive


def _first_tokens(store: TokenStore, text: int, count: int) -> np.ndarray:
    begin = store.offsets[text]
    return store.tokens[begin : begin + count]


def pack(store: TokenStore, texts: np.ndarray, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Lay texts end to end, each cut to `max_length` tokens with EOS kept as the last.

    No texts at all become one that is only an EOS: the model of a process without rows still runs, so that
    the process takes part in every collective of the step.

    Args:
        texts: [n] text numbers.

    Returns:
        tokens int64 [T], cu_seqlens int32 [n + 1].
    """
    if len(texts) == 0:
        return np.array([store.eos], np.int64), np.array([0, 1], np.int32)
    starts = store.offsets[texts]
    lengths = lengths_when_cut(store, texts, max_length)
    ends = np.cumsum(lengths)
    pieces = [store.tokens[start : start + length] for start, length in zip(starts, lengths, strict=True)]
    tokens = np.concatenate(pieces).astype(np.int64)
    tokens[ends - 1] = store.eos
    return tokens, np.concatenate([[0], ends]).astype(np.int32)
