"""Every loss against a hand-written double loop, value and gradient, in fp64.

python -m pytest tests/test_losses.py
"""

import math

import pytest
import torch
from torch import Tensor

import losses as module
from losses import distillation_loss, group_ranks, hard_negative_loss, in_batch_loss, matryoshka_weights, over_prefixes

T = 0.05


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Written out, so that it shares nothing with the code under test."""
    dot = na = nb = torch.zeros((), dtype=a.dtype)
    for x, y in zip(a, b, strict=True):
        dot, na, nb = dot + x * y, na + x * x, nb + y * y
    return dot / (na.sqrt() * nb.sqrt())


def loop_in_batch(queries: Tensor, candidates: Tensor, targets: Tensor) -> Tensor:
    total = torch.zeros((), dtype=queries.dtype)
    for i, query in enumerate(queries):
        denominator = sum(torch.exp(cosine(query, candidate) / T) for candidate in candidates)
        total = total - torch.log(torch.exp(cosine(query, candidates[targets[i]]) / T) / denominator)
    return total / len(queries)


def loop_hard(queries: Tensor, positives: Tensor, negatives: Tensor, mask: Tensor) -> Tensor:
    total = torch.zeros((), dtype=queries.dtype)
    for i, query in enumerate(queries):
        positive = torch.exp(cosine(query, positives[i]) / T)
        denominator = positive
        for j, negative in enumerate(negatives[i]):
            if mask[i, j]:
                denominator = denominator + torch.exp(cosine(query, negative) / T)
        total = total - torch.log(positive / denominator)
    return total / len(queries)


def leaves(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def assert_same(found: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    """Same value and same gradient of every input, and no gradient that is zero throughout."""
    assert torch.isclose(found, expected, rtol=1e-12)
    gradients = [torch.autograd.grad(value, inputs, retain_graph=True) for value in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        assert theirs.abs().max() > 1e-6
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("dim", [16, 8])
def test_in_batch_loss_is_the_equation(dim):
    queries, candidates = leaves((3, 16), (7, 16))
    targets = torch.tensor([2, 3, 4])  # as rank 1 of several sees it
    found = in_batch_loss(queries[:, :dim], candidates[:, :dim], targets, T)
    assert_same(found, loop_in_batch(queries[:, :dim], candidates[:, :dim], targets), [queries, candidates])


@pytest.mark.parametrize("dim", [16, 8])
@pytest.mark.parametrize("masked", [False, True])
def test_hard_negative_loss_is_the_equation(dim, masked):
    inputs = leaves((4, 16), (4, 16), (4, 3, 16))
    mask = torch.ones(4, 3, dtype=torch.bool)
    if masked:
        mask[0, 1] = mask[2, 0] = mask[2, 2] = False
    found = hard_negative_loss(*(x[..., :dim] for x in inputs), T, mask if masked else None)
    assert_same(found, loop_hard(*(x[..., :dim] for x in inputs), mask), inputs)


def test_matryoshka_sums_weighted_prefixes():
    weights = matryoshka_weights(32)
    assert weights == {32: 1.0, 16: 1 / (2 * math.sqrt(2)), 8: 1 / (3 * 2)}
    queries, candidates = leaves((3, 32), (5, 32))
    targets = torch.arange(3)
    found = over_prefixes(in_batch_loss, weights, queries, candidates, targets=targets, temperature=T)
    expected = sum(w * loop_in_batch(queries[:, :d], candidates[:, :d], targets) for d, w in weights.items())
    assert_same(found, expected, [queries, candidates])
    inputs = leaves((3, 32), (3, 32), (3, 2, 32))
    mask = torch.ones(3, 2, dtype=torch.bool)
    found = over_prefixes(hard_negative_loss, weights, *inputs, temperature=T, mask=mask)
    expected = sum(w * loop_hard(*(x[..., :d] for x in inputs), mask) for d, w in weights.items())
    assert_same(found, expected, inputs)


def test_matryoshka_weights_are_the_published_ones():
    table = {1024: 1, 512: 0.3536, 256: 0.1667, 128: 0.0884, 64: 0.05, 32: 0.0295, 16: 0.0179, 8: 0.0110}
    assert {dim: round(weight, 4) for dim, weight in matryoshka_weights(1024).items()} == table
    assert list(matryoshka_weights(320)) == [320, 256, 128, 64, 32, 16, 8]  # the 80M model's width: not a power of two


def test_distillation_loss_is_the_mean_square_over_the_first_dimensions():
    student, teacher = leaves((3, 4), (3, 6))
    expected = sum((student[i, j] - teacher[i, j].detach()) ** 2 for i in range(3) for j in range(4)) / 12
    assert_same(distillation_loss(student, teacher), expected, [student])
    assert torch.autograd.grad(distillation_loss(student, teacher), teacher, allow_unused=True) == (None,)


@pytest.mark.parametrize("rows", [0, 2])
def test_nothing_to_compare_with_gives_zero_and_a_finite_gradient(rows):
    queries, positives, negatives = leaves((rows, 8), (rows, 8), (rows, 0, 8))
    losses = [hard_negative_loss(queries, positives, negatives, T), distillation_loss(queries[:0], positives[:0])]
    losses += [in_batch_loss(queries[:0], positives, torch.zeros(0, dtype=torch.long), T)]
    for loss in losses:
        assert loss.item() == 0
        for gradient in torch.autograd.grad(loss, [queries, positives], allow_unused=True):
            assert gradient is None or (gradient == 0).all()


def test_a_fully_masked_row_adds_nothing_and_still_counts():
    queries, positives, negatives = leaves((2, 8), (2, 8), (2, 3, 8))
    with torch.no_grad():
        negatives[1] = 0  # what Batch.split puts where no negative exists
    mask = torch.tensor([[True, True, True], [False, False, False]])
    alone = hard_negative_loss(queries[:1], positives[:1], negatives[:1], T)
    both = hard_negative_loss(queries, positives, negatives, T, mask)
    assert torch.isclose(both, alone / 2, rtol=1e-12)
    both.backward()
    assert torch.isfinite(negatives.grad).all()
    assert (negatives.grad[1] == 0).all()
    assert (negatives.grad[0] != 0).any()


def test_scale_of_the_embeddings_does_not_matter():
    queries, candidates = leaves((3, 8), (3, 8))
    targets = torch.arange(3)
    scaled = in_batch_loss(queries * 7, candidates * 0.01, targets, T)
    assert torch.isclose(scaled, in_batch_loss(queries, candidates, targets, T), rtol=1e-12)


def test_losses_are_fp32_even_under_bf16_autocast():
    queries, candidates = (x.detach().float() for x in leaves((6, 64), (6, 64)))
    targets = torch.arange(6)
    plain = in_batch_loss(queries, candidates, targets, T)
    with torch.autocast("cpu", torch.bfloat16):
        assert (queries @ candidates.T).dtype == torch.bfloat16  # autocast is on
        assert torch.equal(in_batch_loss(queries, candidates, targets, T), plain)
        assert in_batch_loss(queries.bfloat16(), candidates.bfloat16(), targets, T).dtype == torch.float32


def test_group_ranks_count_ties_against_the_positive():
    query = torch.tensor([[1.0, 0.0]])
    positive = torch.tensor([[1.0, 1.0]])
    negatives = torch.tensor([[[1.0, 0.0], [2.0, 2.0], [0.0, 1.0], [5.0, 0.1]]])  # better, tied, worse, better
    assert group_ranks(query, positive, negatives).tolist() == [4]
    mask = torch.tensor([[True, True, True, False]])
    assert group_ranks(query, positive, negatives, mask).tolist() == [3]
    assert group_ranks(query, positive, negatives[:, :0]).tolist() == [1]


@pytest.mark.parametrize(
    "call",
    [
        lambda: in_batch_loss(torch.zeros(2, 4), torch.zeros(2, 5), torch.arange(2), T),
        lambda: in_batch_loss(torch.zeros(2, 4), torch.zeros(2, 4), torch.arange(3), T),
        lambda: hard_negative_loss(torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(2, 1, 4), T),
        lambda: hard_negative_loss(torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(2, 1, 4), T, torch.ones(2, 2)),
        lambda: distillation_loss(torch.zeros(2, 8), torch.zeros(2, 4)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(call):
    with pytest.raises(ValueError, match="want"):
        call()


def test_a_broken_model_has_no_good_rank():
    nan = torch.full((1, 2), float("nan"))
    assert group_ranks(nan, nan, nan[:, None].expand(1, 3, 2)).tolist() == [4]


@pytest.mark.parametrize("rows", [1, 3, 7])
def test_blocks_of_rows_change_nothing(monkeypatch, rows):
    """Losses of large batches are computed block by block; here the blocks are made small."""
    queries, candidates, positives, negatives = leaves((7, 16), (20, 16), (7, 16), (7, 3, 16))
    targets, same = torch.arange(7) + 4, torch.arange(20) // 2
    mask = torch.rand(7, 3, generator=torch.Generator().manual_seed(0)) < 0.7

    def losses() -> Tensor:
        in_batch = in_batch_loss(queries, candidates, targets, T, same)
        return in_batch + hard_negative_loss(queries, positives, negatives, T, mask)

    expected, calls = losses(), []
    real = module.checkpoint
    monkeypatch.setattr(module, "checkpoint", lambda *words, **named: (calls.append(1), real(*words, **named))[1])
    monkeypatch.setattr(module, "BLOCK", 20 * rows)
    assert_same(losses(), expected, [queries, candidates, positives, negatives])
    blocks = [-(-7 // size) for size in (rows, max(1, 20 * rows // 64)) if size < 7]
    assert len(calls) == sum(blocks) > 0


def test_an_in_batch_negative_that_is_the_positive_itself_can_be_left_out():
    queries, candidates = leaves((2, 8), (4, 8))
    same = torch.tensor([5, 6, 5, 7])  # the third candidate is the first query's positive again
    found = in_batch_loss(queries, candidates, torch.tensor([0, 1]), T, same)
    first = loop_in_batch(queries[:1], candidates[[0, 1, 3]], torch.tensor([0]))
    second = loop_in_batch(queries[1:], candidates, torch.tensor([1]))
    assert_same(found, (first + second) / 2, [queries, candidates])
    plain = in_batch_loss(queries, candidates, torch.tensor([0, 1]), T)
    assert not torch.isclose(plain, found)
