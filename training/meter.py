"""Sums of losses and of work between two log lines, kept on the device and read with one collective."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from runtime.collectives import all_rows


class Meter:
    """Sums of losses by (dataset, kind) and of counters between two log lines, kept on the device.

    Reading them is one collective whatever the number of datasets.
    """

    COUNTERS = ("tuples", "tokens", "computed", "heaviest")  # real tokens; positions computed; what the slowest had

    def __init__(self, names: Sequence[str], kinds: Sequence[str], device: torch.device):
        self.names = names
        self.kinds = kinds
        if device.type == "mps":  # has no fp64
            device = torch.device("cpu")
        # By dataset and kind: the sum of the loss over rows, and the rows.
        self.sums = torch.zeros(len(names), len(kinds), 2, dtype=torch.float64, device=device)
        self.counters = dict.fromkeys(self.COUNTERS, 0)
        self.earlier = dict.fromkeys(self.COUNTERS, 0)  # what of them an earlier start of the run has counted
        self.began = time.perf_counter()

    def start(self) -> None:
        """Begin to count the time: what came before, such as reading a state, was not training."""
        self.began = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock: validation and saving are not training."""
        stopped = time.perf_counter()
        yield
        self.began += time.perf_counter() - stopped

    def add(self, dataset: int, losses: dict[str, Tensor], rows: float, counts: Tensor | None = None) -> None:
        """Add losses that are means over `rows` rows of this process.

        Args:
            counts: [] bool on the device; where false, nothing is added. None = true.
        """
        for kind, loss in losses.items():
            cell = self.sums[dataset, self.kinds.index(kind)]
            own = torch.stack([loss.detach() * rows, torch.full_like(loss, rows)]).to(cell)  # [2]
            if counts is not None:
                own = torch.where(counts.to(cell.device), own, 0.0)  # a loss that is left out may be NaN
            cell += own

    def state(self) -> Tensor:
        """Everything summed since the last reading, [v] fp64."""
        counters = self.sums.new_tensor([float(self.counters[name]) for name in self.COUNTERS])
        return torch.cat([self.sums.flatten(), counters])

    def load(self, state: Tensor) -> None:
        """Go on from what `state` gave. The rates count nothing of it: nobody knows how long it took."""
        sums, counters = state.split([self.sums.numel(), len(self.COUNTERS)])
        self.sums.copy_(sums.reshape(self.sums.shape))
        self.counters = dict(zip(self.COUNTERS, map(int, counters.tolist()), strict=True))
        self.earlier = dict(self.counters)

    def count(self, **counters: int) -> None:
        """Add to the counters."""
        for name, value in counters.items():
            self.counters[name] += value

    def read(self, world: int) -> tuple[dict[str, dict[str, float]], dict[str, float], dict[str, float]]:
        """All processes' means and rates since the last reading, and start again from zero.

        Returns:
            losses: dataset name -> kind -> mean over all processes' rows; only what occurred.
            shares: padding (of the positions computed), and imbalance (how much more than the mean the process with
            most tokens had, step by step).
            timings: seconds of training by this start, tuples_per_second, tokens_per_second (real ones), and peak_gib,
            the fullest process's memory.
        """
        now = time.perf_counter()
        timed = [float(self.counters[name] - self.earlier[name]) for name in ("tuples", "tokens")]
        vector = torch.cat([self.state(), self.sums.new_tensor([*timed, peak_gib(self.sums.device)])])
        rows = all_rows(vector, world).cpu()  # [world, datasets * kinds * 2 + counters + 3]
        sums, counters, timed, peaks = rows.split([self.sums.numel(), len(self.COUNTERS), 2, 1], dim=1)
        losses = self._means(sums.sum(0).reshape(self.sums.shape))
        _, tokens, computed, heaviest = counters.sum(0).tolist()
        shares = {
            "padding": 1 - tokens / max(computed, 1),
            "imbalance": heaviest / max(tokens, 1) - 1 if world > 1 else 0.0,
        }
        seconds = now - self.began
        timed_tuples, timed_tokens = timed.sum(0).tolist()
        timings = {
            "seconds": seconds,
            "tuples_per_second": timed_tuples / seconds,
            "tokens_per_second": timed_tokens / seconds,
            "peak_gib": peaks.max().item(),
        }
        self.sums.zero_()
        self.counters = dict.fromkeys(self.COUNTERS, 0)
        self.earlier = dict.fromkeys(self.COUNTERS, 0)
        self.began = now
        return losses, shares, timings

    def _means(self, sums: Tensor) -> dict[str, dict[str, float]]:
        """Dataset name -> kind -> mean, of sums [datasets, kinds, 2]; only where there were rows."""
        means: dict[str, dict[str, float]] = {}
        for name, cells in zip(self.names, sums.tolist(), strict=True):
            for kind, (total, rows) in zip(self.kinds, cells, strict=True):
                if rows:
                    means.setdefault(name, {})[kind] = total / rows
        return means


class Clock:
    """Time since the loop began, and what the steps to come will take at the same pace.

    Args:
        steps_before: steps that were done when it began.
    """

    def __init__(self, steps_before: int):
        self.steps_before = steps_before
        self.began = time.monotonic()

    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.began

    def seconds_left(self, step: int, steps: int) -> float:
        """Until the last of `steps`, when `step` is done."""
        return self.seconds() / (step - self.steps_before) * (steps - step)


def peak_gib(device: torch.device) -> float:
    """The most memory this process has held, GiB: on CUDA of the device's allocator, elsewhere resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
