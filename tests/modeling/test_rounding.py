"""What rounding explains passes, and nothing more.

python -m pytest tests/modeling/test_rounding.py
"""

import pytest
import torch

from modeling.rounding import more_than_rounding

EXACT = torch.nn.functional.normalize(torch.randn(12, 8, generator=torch.Generator().manual_seed(0)), dim=1)


def off_by(*distances: float) -> torch.Tensor:
    """Embeddings of which each is so far from the exact one, relative."""
    aside = EXACT.roll(1, dims=1) * EXACT.norm(dim=1, keepdim=True)
    return EXACT + torch.tensor(distances)[:, None] * aside / aside.norm(dim=1, keepdim=True)


PLAIN = off_by(*[0.02] * 12)


@pytest.mark.parametrize("distances", [[0.0] * 12, [0.028] * 12, [0.02] * 11 + [0.07], [0.01] * 7 + [0.07] * 5])
def test_another_order_of_sums_passes(distances):
    assert more_than_rounding(off_by(*distances), PLAIN, EXACT, 1e-3) is None


def test_all_texts_a_little_further_and_one_text_far_off_do_not():
    everywhere = more_than_rounding(off_by(*[0.032] * 12), PLAIN, EXACT, 1e-3)
    assert everywhere == pytest.approx((0.032, 0.02), rel=1e-3)
    in_one = more_than_rounding(off_by(*[0.02] * 11, 0.09), PLAIN, EXACT, 1e-3)
    assert in_one == pytest.approx((0.09, 0.02), rel=1e-3)


def test_what_is_tolerated_counts_where_the_plain_way_is_exact():
    assert more_than_rounding(off_by(*[9e-4] * 12), EXACT, EXACT, 1e-3) is None
    assert more_than_rounding(off_by(*[2e-3] * 12), EXACT, EXACT, 1e-3) is not None


def test_a_number_that_is_none_does_not_pass():
    broken = PLAIN.clone()
    broken[3, 1] = float("nan")
    assert more_than_rounding(broken, PLAIN, EXACT, 1e-3) is not None
