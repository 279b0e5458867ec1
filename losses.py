"""The losses of F2LLM and F2LLM-v2 as pure functions: tensors and numbers in, a scalar out.

Nothing here knows of processes, configurations or files. Embeddings need not be normalised: a
similarity is a cosine, so scaling a vector changes nothing. Work is done in fp32, or in fp64 when
the inputs are fp64, whatever autocast says outside.

    python -m pytest tests/test_losses.py      every function against a hand-written double loop
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

BLOCK = 2**23  # numbers in a block of rows: 32 MiB in fp32, and a few such tensors at a time


def in_batch_loss(
    queries: Tensor, candidates: Tensor, targets: Tensor, temperature: float, same: Tensor | None = None
) -> Tensor:
    """InfoNCE of each query against the positives of the whole global batch.

    F2LLM report, in-batch term: mean_i of -log( e^{s(q_i, d_i)/T} / sum_j e^{s(q_i, d_j)/T} ), where
    j runs over the positives of all processes and over nothing else.

    Args:
        queries: [b, d] this process's queries.
        candidates: [B, d] the positives of all processes.
        targets: [b] int64, the row of `candidates` that holds each query's own positive.
        temperature: divides the cosine similarity; 0.05 in both reports.
        same: [B] int64, equal where candidates are the same text; those equal to a query's own positive are then no
            negatives of it. None counts them as negatives, as published.

    Returns:
        fp32 (fp64 for fp64 inputs) scalar, the mean over b; 0 when b is 0.

    Raises:
        ValueError: a shape does not fit.
    """
    if queries.ndim != 2 or candidates.ndim != 2 or queries.shape[1] != candidates.shape[1]:
        raise ValueError(
            f"queries {tuple(queries.shape)}, candidates {tuple(candidates.shape)}: want [b, d] and [B, d]"
        )
    if targets.shape != queries.shape[:1]:
        raise ValueError(f"targets {tuple(targets.shape)}: want one for each of {queries.shape[0]} queries")
    with _full_precision(queries):
        q, c = _normalize(queries), _normalize(candidates)  # [b, d], [B, d]

        def row_losses(q: Tensor, targets: Tensor) -> Tensor:
            logits = q @ c.T / temperature  # [rows, B]
            if same is not None:
                own = torch.arange(len(c), device=c.device) == targets[:, None]  # [rows, B]
                logits = logits.masked_fill((same == same[targets, None]) & ~own, -torch.inf)
            return F.cross_entropy(logits, targets, reduction="none")

        return _mean(_by_rows(row_losses, len(c), q, targets))


def hard_negative_loss(
    queries: Tensor, positives: Tensor, negatives: Tensor, temperature: float, mask: Tensor | None = None
) -> Tensor:
    """InfoNCE of each query's positive against that query's own hard negatives.

    F2LLM report, hard-negative term: mean_i of
    -log( e^{s(q_i, d_i)/T} / ( e^{s(q_i, d_i)/T} + sum_j e^{s(q_i, n_ij)/T} ) ).

    Args:
        queries, positives: [b, d].
        negatives: [b, n, d]; n may be 0.
        temperature: divides the cosine similarity.
        mask: [b, n] bool, True where the negative exists. A query without any contributes the value
            of the equation for an empty sum, which is 0, and still counts in the mean.

    Returns:
        fp32 (fp64 for fp64 inputs) scalar, the mean over b; 0 when b or n is 0.

    Raises:
        ValueError: a shape does not fit.
    """
    b, d = queries.shape
    if positives.shape != (b, d) or negatives.ndim != 3 or negatives.shape[::2] != (b, d):
        shapes = [tuple(x.shape) for x in (queries, positives, negatives)]
        raise ValueError(f"queries, positives, negatives {shapes}: want [b, d], [b, d], [b, n, d]")
    if mask is not None and mask.shape != negatives.shape[:2]:
        raise ValueError(f"mask {tuple(mask.shape)}: want {tuple(negatives.shape[:2])}, as the negatives")
    with _full_precision(queries):
        if mask is None:
            mask = torch.ones(negatives.shape[:2], dtype=torch.bool, device=queries.device)

        def row_losses(queries: Tensor, positives: Tensor, negatives: Tensor, mask: Tensor) -> Tensor:
            group = _normalize(torch.cat([positives[:, None], negatives], dim=1))  # [rows, 1 + n, d], positive first
            logits = torch.einsum("bd,bnd->bn", _normalize(queries), group) / temperature  # [rows, 1 + n]
            logits = logits.masked_fill(F.pad(~mask, (1, 0), value=False), -torch.inf)
            return -logits.log_softmax(dim=1)[:, 0]

        return _mean(_by_rows(row_losses, (1 + negatives.shape[1]) * d, queries, positives, negatives, mask))


def matryoshka_weights(hidden_size: int) -> dict[int, float]:
    """Prefix length -> weight, longest first: 8, 16, 32, ... below `hidden_size`, and `hidden_size`.

    F2LLM-v2 report: the k-th prefix from the longest (k = 1 first) weighs 1 / (k * sqrt(hidden / dim));
    the sum is not renormalised. Each prefix is normalised again, which the losses above do themselves.
    """
    dims = []
    dim = 8
    while dim < hidden_size:
        dims.append(dim)
        dim *= 2
    dims.append(hidden_size)
    return {dim: 1 / (k * math.sqrt(hidden_size / dim)) for k, dim in enumerate(reversed(dims), start=1)}


def over_prefixes(loss, weights: dict[int, float], *embeddings: Tensor, **rest) -> Tensor:
    """sum over `weights` of weight * loss(first dim components of each embedding, **rest): Matryoshka for any loss.

    Args:
        loss: in_batch_loss or hard_negative_loss.
        weights: prefix length -> weight, from `matryoshka_weights`; {d: 1.0} is the plain loss.
        embeddings: tensors of shape [..., d], the loss's first arguments.
    """
    total = 0.0
    for dim, weight in weights.items():
        prefixes = [x[..., :dim] for x in embeddings]
        total = total + weight * loss(*prefixes, **rest)
    return total


def distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error between last-token states, before normalisation.

    F2LLM-v2 report: the student's full width d against the teacher's first d dimensions (the teacher
    is Matryoshka-trained, so its prefix is an embedding of its own). The mean is over all m*d elements.

    Args:
        student: [m, d].
        teacher: [m, D], D >= d; no gradient flows into it.

    Returns:
        fp32 (fp64 for fp64 inputs) scalar; 0 when m is 0.

    Raises:
        ValueError: the student is wider than its teacher, or the rows differ.
    """
    m, d = student.shape
    if teacher.shape[0] != m or teacher.shape[1] < d:
        raise ValueError(f"student {tuple(student.shape)}, teacher {tuple(teacher.shape)}: want [m, d], [m, D >= d]")
    with _full_precision(student):
        target = teacher.detach()[:, :d]  # [m, d]
        return _mean((_full(student) - _full(target)).square())


def group_ranks(queries: Tensor, positives: Tensor, negatives: Tensor, mask: Tensor | None = None) -> Tensor:
    """Rank of each positive among its own hard negatives, 1 = best. A tie counts against the positive.

    Args:
        queries, positives: [b, d].
        negatives: [b, n, d].
        mask: [b, n] bool, True where the negative exists.

    Returns:
        [b] int64. Its share of ones is the in-group accuracy, the mean of its inverse the in-group MRR.
    """
    with _full_precision(queries):
        q = _normalize(queries)
        positive = (q * _normalize(positives)).sum(-1, keepdim=True)  # [b, 1]
        others = torch.einsum("bd,bnd->bn", q, _normalize(negatives))  # [b, n]
        wins = ~(others < positive)  # NaN wins too: a broken model must not look perfect
        if mask is not None:
            wins &= mask
        return 1 + wins.sum(dim=1)


def _by_rows(function: Callable[..., Tensor], width: int, *inputs: Tensor) -> Tensor:
    """`function` of tensors that share their first dimension, block by block where all rows at once would be large.

    16,384 queries against 16,384 candidates are 1 GiB of logits, and as much again for each Matryoshka prefix. What a
    block computes is thrown away, and computed again in the backward pass; the results are the same.

    Args:
        width: how many numbers `function` computes for a row.
    """
    count = len(inputs[0])
    size = max(1, BLOCK // max(width, 1))  # rows of a block
    if count <= size:
        return function(*inputs)
    blocks = zip(*(x.split(size) for x in inputs), strict=True)
    found = [checkpoint(function, *block, use_reentrant=False, preserve_rng_state=False) for block in blocks]
    return torch.cat(found)


def _full(x: Tensor) -> Tensor:
    """x in fp32, or as it is when fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _normalize(x: Tensor) -> Tensor:
    """Rows of unit length along the last dimension."""
    return F.normalize(_full(x), dim=-1)


def _mean(values: Tensor) -> Tensor:
    """The mean, and 0 with a gradient of 0 (never NaN) for no values at all."""
    return values.sum() / max(values.numel(), 1)


def _full_precision(x: Tensor):
    """Autocast off: under bf16 autocast a matmul would round the similarities to 8 bits of mantissa."""
    return torch.autocast(x.device.type, enabled=False)
