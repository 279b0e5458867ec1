"""What a process gets at a step: its texts laid end to end, without padding, each distinct text once.

Which tuples and which negatives is the plan's business (plan.py); here they become token ids.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from data.plan import deal
from data.token_store import TokenStore


@dataclass(frozen=True)
class Batch:
    """One process's part of a step: u distinct texts, and where in the tuples each of them stands.

    The tuples' texts are queries | positives | negatives. A text that occurs twice (a label, a shared passage) is
    embedded once, which changes neither loss nor gradient.
    """

    tokens: Tensor  # [T] int64, the distinct texts end to end, longest first
    cu_seqlens: Tensor  # [u + 1] int32, where each begins
    index: Tensor  # [texts] int64, which of the u each text of the tuples is
    mask: Tensor  # [b, n] bool, True where a negative exists; only those are in `index`
    positives: Tensor  # [B] int64, text numbers of the positives of all processes: equal numbers are equal texts
    texts: np.ndarray  # [texts] text numbers in the store
    lengths: np.ndarray  # [u] tokens of each, as in cu_seqlens, but never on a device
    cuts: tuple[int, ...]  # where the u texts are cut into the parts of a step; as many parts on every process
    counts: tuple[int, ...]  # rows on each process; their sum is the global batch
    begin: int  # rows on the processes before this one: where its own stand when all are gathered
    negatives: int  # existing negatives on all processes together
    heaviest: int  # tokens on the process that has most: the others wait for it

    ON_DEVICE = ("tokens", "cu_seqlens", "index", "mask", "positives")

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
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in self.ON_DEVICE})

    def pinned(self) -> "Batch":
        """The same batch in pages that a GPU can fetch while it computes."""
        return replace(self, **{name: getattr(self, name).pin_memory() for name in self.ON_DEVICE})

    @property
    def parts(self) -> int:
        """Forward passes of the step, the same number on every process."""
        return len(self.cuts) - 1

    def part(self, number: int) -> tuple[Tensor, Tensor, np.ndarray, int]:
        """(tokens, cu_seqlens, lengths, texts that count) of one forward pass.

        A process that has fewer texts than others have parts runs its shortest text again, which then counts as none.
        """
        begin, end = self.cuts[number : number + 2]
        first, last = (begin, end) if end > begin else (len(self.lengths) - 1, len(self.lengths))
        head, tail = int(self.lengths[:first].sum()), int(self.lengths[:last].sum())
        tokens, starts = self.tokens[head:tail], self.cu_seqlens[first : last + 1] - head
        return tokens, starts, self.lengths[first:last], end - begin

    def spread(self, embeddings: Tensor) -> Tensor:
        """Embeddings of the distinct texts [u, d] as those of the tuples' texts [texts, d]."""
        return embeddings[self.index]

    def split(self, embeddings: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Spread embeddings [texts, d] as queries [b, d], positives [b, d], negatives [b, n, d], zeros for none."""
        b, n = self.mask.shape
        queries, positives, rest = embeddings[:b], embeddings[b : 2 * b], embeddings[2 * b : len(self.texts)]
        negatives = embeddings.new_zeros(b, n, embeddings.shape[1])
        return queries, positives, negatives.masked_scatter(self.mask[..., None], rest)


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

    Args:
        rows: [m] rows of the store, the whole global batch.
        negatives: [m, n] text numbers, -1 = missing.
        max_length: tokens of a text at most, EOS included.
        budget: tokens of a forward pass at most, 0 = any number.
    """
    tuples = np.concatenate([store.tuples[rows, :2], negatives], axis=1)  # [m, 2 + n]
    lengths = np.minimum(store.offsets[tuples + 1] - store.offsets[tuples], max_length) * (tuples >= 0)
    hands = deal(lengths.sum(axis=1), world)
    mine = hands[rank]
    mask = negatives[mine] >= 0  # [b, n]
    texts = np.concatenate([tuples[mine, 0], tuples[mine, 1], negatives[mine][mask]])
    held = [distinct_texts(store, tuples[hand][tuples[hand] >= 0], max_length) for hand in hands]  # of every process
    cuts = [split_by_budget(lengths, budget) for _, lengths in held]
    most = max(map(len, cuts))
    distinct, lengths = held[rank]
    tokens, cu_seqlens = pack(store, distinct, max_length)
    return Batch(
        tokens=torch.from_numpy(tokens),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        index=torch.from_numpy(positions_in(distinct, texts)),
        mask=torch.from_numpy(mask),
        positives=torch.from_numpy(tuples[np.concatenate(hands), 1].astype(np.int64)),
        texts=texts,
        lengths=np.diff(cu_seqlens),
        cuts=(*cuts[rank], *[len(lengths)] * (most - len(cuts[rank]))),
        counts=tuple(map(len, hands)),
        begin=sum(map(len, hands[:rank])),
        negatives=int((negatives >= 0).sum()),
        heaviest=max(int(lengths.sum()) for _, lengths in held),
    )


def distinct_texts(store: TokenStore, texts: np.ndarray, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """The distinct ones of these text numbers, longest first, and their tokens when cut: both [u]."""
    numbers = np.unique(texts)
    lengths = np.minimum(store.offsets[numbers + 1] - store.offsets[numbers], max_length)
    order = np.argsort(-lengths, kind="stable")
    return numbers[order], lengths[order]


def positions_in(distinct: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Where each of `texts` stands in `distinct`, int64 [texts]."""
    order = np.argsort(distinct)
    return order[np.searchsorted(distinct[order], texts)]


def split_by_budget(lengths: np.ndarray, budget: int) -> list[int]:
    """Cut texts into consecutive parts of at most `budget` tokens (or one text): [0, ..., len(lengths)].

    >>> cut(np.array([9, 5, 4, 3, 1]), 8)
    [0, 1, 2, 5]
    """
    if not budget:
        return [0, len(lengths)]
    bounds, tokens = [0], 0
    for number, length in enumerate(lengths.tolist()):
        if tokens and tokens + length > budget:
            bounds.append(number)
            tokens = 0
        tokens += length
    return [*bounds, len(lengths)]


def truncates_to_its_positive(
    store: TokenStore, positives: np.ndarray, negatives: np.ndarray, max_length: int
) -> np.ndarray:
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
