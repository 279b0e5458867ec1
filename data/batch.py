"""What a process gets at a step: its texts laid end to end, without padding, each distinct text once.

The plan (plan.py) decides which tuples and which negatives belong to a step; here they become token ids.
`make_batch` tells the whole story:

1. share out the rows of the global batch, so that every process has about as many tokens (`rows_of_ranks`);
2. find the distinct texts of each process, longest first (`distinct_texts`);
3. cut them into parts that fit into one forward pass each (`split_by_budget`, `cuts_of_rank`);
4. lay this process's texts end to end (`pack`), and remember which text stands where in the tuples (`positions_in`).
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.plan import rows_of_ranks
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
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in self.ON_DEVICE}
        return replace(self, **moved)

    def pinned(self) -> "Batch":
        """The same batch in pinned memory, so that copies to a GPU overlap with its work."""
        pinned = {name: getattr(self, name).pin_memory() for name in self.ON_DEVICE}
        return replace(self, **pinned)

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
    budget: int = 0,
) -> Batch:
    """The part of process `rank` of `world` in a global batch.

    Every process computes the shares of all, so they agree on sizes without talking to each other.

    Args:
        rows: [m] rows of the store, the whole global batch.
        negatives: [m, n] text numbers, -1 = missing.
        max_length: tokens of a text at most, EOS included.
        budget: tokens of a forward pass at most, 0 = any number.
    """
    tuples = np.concatenate([store.tuples[rows, :2], negatives], axis=1)  # [m, 2 + n] text numbers, -1 = missing
    tokens_per_tuple = lengths_when_cut(store, tuples, max_length).sum(axis=1)  # [m]
    rows_by_rank = rows_of_ranks(tokens_per_tuple, world)
    counts = tuple(len(rank_rows) for rank_rows in rows_by_rank)

    texts_by_rank = [distinct_texts(store, tuples[rank_rows], max_length) for rank_rows in rows_by_rank]
    cuts_by_rank = [split_by_budget(lengths, budget) for _, lengths in texts_by_rank]
    tokens_by_rank = [int(lengths.sum()) for _, lengths in texts_by_rank]

    own_rows = rows_by_rank[rank]  # [b]
    own_mask = negatives[own_rows] >= 0  # [b, n]
    own_negatives = negatives[own_rows][own_mask]  # those that exist, row by row
    own_texts = np.concatenate([tuples[own_rows, 0], tuples[own_rows, 1], own_negatives])  # [texts]
    own_distinct, _ = texts_by_rank[rank]  # [u]
    tokens, cu_seqlens = pack(store, own_distinct, max_length)
    all_positives = tuples[np.concatenate(rows_by_rank), 1]  # [B], in the order in which processes are gathered
    return Batch(
        tokens=torch.from_numpy(tokens),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        index=torch.from_numpy(positions_in(own_distinct, own_texts)),
        mask=torch.from_numpy(own_mask),
        slots=torch.from_numpy(slots_of(own_mask)),
        positives=torch.from_numpy(all_positives.astype(np.int64)),
        texts=own_texts,
        lengths=np.diff(cu_seqlens),
        cuts=cuts_of_rank(cuts_by_rank, rank),
        counts=counts,
        begin=sum(counts[:rank]),
        negatives=int((negatives >= 0).sum()),
        heaviest=max(tokens_by_rank),
    )


def lengths_when_cut(store: TokenStore, texts: np.ndarray, max_length: int) -> np.ndarray:
    """Tokens of each text cut to `max_length`, 0 where the text number is -1: int64, shape of `texts`."""
    lengths = store.offsets[texts + 1] - store.offsets[texts]
    return np.minimum(lengths, max_length) * (texts >= 0)


def distinct_texts(store: TokenStore, texts: np.ndarray, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """The distinct text numbers among `texts` without -1, longest first.

    Returns:
        their numbers [u], and their tokens when cut to `max_length` [u].
    """
    numbers = np.unique(texts[texts >= 0])
    lengths = lengths_when_cut(store, numbers, max_length)
    longest_first = np.argsort(-lengths, kind="stable")
    return numbers[longest_first], lengths[longest_first]


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


def split_by_budget(lengths: np.ndarray, budget: int) -> list[int]:
    """Cut texts into consecutive parts of at most `budget` tokens (or one text): [0, ..., len(lengths)].

    >>> split_by_budget(np.array([9, 5, 4, 3, 1]), 8)
    [0, 1, 2, 5]
    """
    if not budget:
        return [0, len(lengths)]
    cuts = [0]
    tokens_in_part = 0
    for number, length in enumerate(lengths.tolist()):
        if tokens_in_part and tokens_in_part + length > budget:
            cuts.append(number)
            tokens_in_part = 0
        tokens_in_part += length
    return [*cuts, len(lengths)]


def cuts_of_rank(cuts_by_rank: list[list[int]], rank: int) -> tuple[int, ...]:
    """The cuts of one process, followed by empty parts until it has as many parts as any other.

    All processes then run as many forward passes, and meet in the collectives of each.

    >>> cuts_of_rank([[0, 4], [0, 2, 3, 6]], rank=0)
    (0, 4, 4, 4)
    """
    own_cuts = cuts_by_rank[rank]
    missing = max(len(cuts) for cuts in cuts_by_rank) - len(own_cuts)
    last_cut = own_cuts[-1]
    return (*own_cuts, *[last_cut] * missing)


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
    for row, column in np.argwhere(positive_is_long[:, None] & negative_is_long):
        # Without the last token: there the cut puts EOS in both.
        positive = _first_tokens(store, positives[row], max_length - 1)
        negative = _first_tokens(store, negatives[row, column], max_length - 1)
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
