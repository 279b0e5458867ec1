"""Rows of all processes on each of them, with the gradient that makes data parallelism exact, or without one."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class _Gather(torch.autograd.Function):
    """All processes' rows, in the order of the processes; the backward pass sums what each sends back."""

    @staticmethod
    def forward(ctx, rows: Tensor, counts: Sequence[int]) -> Tensor:
        ctx.counts = counts
        longest = max(counts)
        padded = rows.new_zeros(longest, *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)  # the sum over processes of d(loss of that process) / d(gathered rows)
        begin = sum(ctx.counts[: dist.get_rank()])
        return gradient[begin : begin + ctx.counts[dist.get_rank()]], None


def gather(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """The rows of all processes, with gradient: [b, d] -> [sum(counts), d].

    Args:
        rows: [b, d], b = counts[rank].
        counts: rows on each process; known to all of them from the plan, so no collective is spent on it.

    Each process takes the mean loss over its own queries, and data parallelism averages gradients over
    processes. Summing in the backward pass then gives exactly the one-process gradient, with no factor:
    L = (1/W) sum_r l_r, and process s receives d(sum_r l_r)/d(rows_s), which averaging divides by W.
    """
    return _Gather.apply(rows, tuple(counts)) if len(counts) > 1 else rows


def problem_of_any(problem: str | None, world: int) -> str | None:
    """The problem of the first process that has one, on every process; None if nobody has. A collective."""
    if world == 1:
        return problem
    problems = [None] * world
    dist.all_gather_object(problems, problem)
    return next((found for found in problems if found), None)


def all_rows(values: Tensor, world: int) -> Tensor:
    """The same vector from every process: [v] -> [world, v]. One collective, no gradient."""
    if world == 1:
        return values[None]
    rows = [torch.empty_like(values) for _ in range(world)]
    dist.all_gather(rows, values)
    return torch.stack(rows)


def sum_of_all(values: Tensor, world: int) -> Tensor:
    """The sum of a tensor over all processes, on each of them and in its place. One collective, no gradient."""
    if world > 1:
        dist.all_reduce(values)
    return values


def largest_of_all(value: int, world: int, device: torch.device) -> int:
    """The largest number that a process has, on each of them. One collective."""
    if world == 1:
        return value
    largest = torch.tensor(value, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)
