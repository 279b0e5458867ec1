"""Texts that lie end to end, as rectangles: which go together, and where each text stands in one.

A batch is `tokens` [T], all texts end to end, and `cu_seqlens` [n + 1], where each begins. Backends that cannot take a
packed row run rectangles [rows, longest], padded on the right.
"""

import numpy as np
import torch
from torch import Tensor, nn

# Tokens. Compiled kernels load whole vectors where they know that a size has such a factor; and a processor's products
# in bf16 are prepared anew for each number of rows, of which oneDNN keeps 1,024: 50 MiB a step without rounding.
MULTIPLE = 256


def rectangle(tokens: Tensor, lengths: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Packed texts as right-padded ids [n, longest], and where they are real, bool [n, longest]."""
    real = torch.arange(longest, device=tokens.device) < lengths[:, None]
    return tokens.new_zeros(real.shape).masked_scatter(real, tokens), real


def places_in_rectangle(lengths: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Where the first and the last token of each row stand when the rows are laid end to end, int64 [n] both.

    Args:
        lengths: [n] real tokens of each row.
    """
    first = torch.arange(len(lengths), device=lengths.device) * longest
    return first, first + lengths - 1


def round_up(
    tokens: Tensor, cu_seqlens: Tensor, lengths: np.ndarray, multiple: int
) -> tuple[Tensor, Tensor, np.ndarray]:
    """The packed row with one more text of padding behind it, so that it has a multiple of `multiple` tokens."""
    gap = -len(tokens) % multiple
    if not gap:
        return tokens, cu_seqlens, lengths
    ends = torch.cat([cu_seqlens, cu_seqlens[-1:] + gap])
    return nn.functional.pad(tokens, (0, gap)), ends, np.append(lengths, gap)


def buckets(lengths: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Texts of like length together: the text numbers of each rectangle, longest texts first."""
    order = np.argsort(-lengths, kind="stable")
    sizes = bucket_sizes(lengths[order].tolist(), max_tokens)
    return np.split(order, np.cumsum(sizes)[:-1])


def bucket_sizes(lengths: list[int], max_tokens: int) -> list[int]:
    """Cut descending `lengths` into runs of texts for rectangles of at most `max_tokens` tokens (or one text).

    A run also ends where a text is shorter than 3/4 of the run's longest, so at most a quarter is padding.
    """
    sizes = []
    longest, count = lengths[0], 0
    for length in lengths:
        is_full = longest * (count + 1) > max_tokens
        is_short = 4 * length < 3 * longest
        if count and (is_full or is_short):
            sizes.append(count)
            longest, count = length, 0
        count += 1
    return [*sizes, count]
