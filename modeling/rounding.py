"""Whether one way of computing embeddings is as exact as another: right ways differ by rounding, a wrong one by more.

How much bf16 costs depends on the model, and still more on the text. `python -m benchmarks.rounding` compares two right
ways, packed texts and each text alone, with fp32. In SmolLM2's 30 layers one was more than 1.5 times as far off as the
other in 3 of 50 draws by the norm over three texts, and in none by the median of twelve. The worst of twelve was more
than 4 times as far off in one draw.
"""

import torch
from torch import Tensor

WORSE = 1.5  # times the plain way's distance, that of the median text
FAR = 4.0  # times the plain way's distance, in the worst text
TEXTS = (7, 2, 9, 6, 12, 3, 10, 5, 8, 4, 11, 6, 9)  # tokens: one beside which the others lie, and twelve to compare


def more_than_rounding(found: Tensor, plain: Tensor, exact: Tensor, tolerance: float) -> tuple[float, float] | None:
    """How far `found` and `plain` are from `exact`, relative, where that of `found` is too much; None where it is not.

    Args:
        found, plain, exact: [n, d] embeddings of the same texts, the last in fp32 where the weights are.
        tolerance: what is never too much.
    """
    own, usual = distances_of_texts(found, exact), distances_of_texts(plain, exact)
    for statistic, times in ((torch.median, WORSE), (torch.max, FAR)):
        distance, allowed = float(statistic(own)), float(statistic(usual))
        if not distance <= max(times * allowed, tolerance):  # NaN comes here too
            return distance, allowed
    return None


def distances_of_texts(found: Tensor, exact: Tensor) -> Tensor:
    """[n]: how far each text is from the exact one, relative."""
    return (found.float() - exact.float()).norm(dim=1) / exact.float().norm(dim=1)
