"""The learning rate as a pure function of the step; a step is one optimizer update, on any number of processes."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up from 0, then a cosine to 0 or constant; never below `floor`.

    Args:
        peak: the rate after warm-up.
        floor: the published clamp; it holds during warm-up too.
        warmup: updates of warm-up.
        steps: updates in all.
        constant: stay at the peak instead of following the cosine.
    """

    peak: float
    floor: float
    warmup: int
    steps: int
    constant: bool = False

    def rate(self, step: int) -> float:
        """Learning rate of step 1, 2, ..., `steps`.

        As Transformers' get_scheduler with the published clamp, but that the very first update has the floor
        instead of 0.
        """
        before = step - 1  # updates made before this one
        if before < self.warmup:
            rate = self.peak * before / self.warmup
        elif self.constant:
            rate = self.peak
        else:
            progress = (before - self.warmup) / max(1, self.steps - self.warmup)
            rate = self.peak * 0.5 * (1 + math.cos(math.pi * progress))
        return max(rate, self.floor)
