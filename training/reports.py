"""What a step finds out, read without holding up the device: its gradient norm, and whether to stop or to save.

To read a number of a GPU is to wait until all that was asked of it before is done, and then to ask for the next step
with nothing left in its queue. So there each step's numbers are copied while the next step is being asked for, and read
after that. On a CPU there is no queue, and they are read at once.

    python -m pytest tests/training/test_reports.py
"""

import math
from collections import deque
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Report:
    """What came out of a step, the same on every process."""

    step: int
    grad_norm: float  # before clipping
    flags: tuple[bool, ...]  # each true where it was on any process

    @property
    def is_left_out(self) -> bool:
        """Whether the optimizer left this update out, for a gradient that is not finite."""
        return not math.isfinite(self.grad_norm)


class Reports:
    """Numbers of steps on their way from the device.

    Args:
        processes: that must agree on the flags.
        delay: steps after which they are read; None = 1 where the device has a queue, else 0.
    """

    def __init__(self, device: torch.device, processes: int, delay: int | None = None):
        if delay is None:
            delay = 1 if device.type == "cuda" else 0
        self.device = device
        self.processes = processes
        self.delay = delay
        self.on_their_way: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def send(self, step: int, grad_norm: Tensor, flags: list[bool]) -> None:
        """Start the numbers of a step on their way; a collective where there are several processes.

        Args:
            grad_norm: [] on the device, of all processes' gradients together.
            flags: of this process.
        """
        own = torch.tensor([float(flag) for flag in flags])
        if self.device.type == "cuda":
            own = own.pin_memory()
        on_any = own.to(self.device, non_blocking=True)  # [flags]
        if self.processes > 1:
            dist.all_reduce(on_any, op=dist.ReduceOp.MAX)
        numbers = torch.cat([grad_norm.detach().reshape(1).float(), on_any])  # [1 + flags]
        copied = None
        if self.device.type == "cuda":
            numbers = numbers.to("cpu", non_blocking=True)  # into pinned memory
            copied = torch.cuda.Event()
            copied.record()
        self.on_their_way.append((step, numbers, copied))

    def arrived(self, everything: bool = False) -> list[Report]:
        """The reports that can be read without waiting, oldest first.

        Args:
            everything: all of them, waiting for the last; before anything is saved, and at the end.
        """
        remain = 0 if everything else self.delay
        reports = []
        while len(self.on_their_way) > remain:
            step, numbers, copied = self.on_their_way.popleft()
            if copied is not None:
                copied.synchronize()
            norm, *flags = numbers.tolist()
            reports.append(Report(step, norm, tuple(flag > 0 for flag in flags)))
        return reports
