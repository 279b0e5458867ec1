"""A step in parts has the loss and the gradient of the step at once; on several processes see test_distributed.

python -m pytest tests/training/test_two_pass.py
"""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from transformers import AutoModel

from data.feed import Feed
from data.plan import Plan
from data.token_store import open_store
from losses import matryoshka_weights
from model import Embedder
from modeling.backbone import add_lora
from modeling.versions import in_dtype
from training import two_pass
from training.objective import Objective


@pytest.fixture
def batches(toy_world):
    """A step at once, and the same in parts."""
    stores = [open_store(toy_world.stores / "toy_retrieval")]
    feeds = [Feed(stores, [3], Plan((198,), 24, 0), [64], max_tokens_per_forward=most) for most in (0, 300)]
    whole, parts = (feed.training(1)[1] for feed in feeds)
    assert (whole.parts, len(whole.lengths) > 90) == (1, True)
    assert parts.parts > 4
    return whole, parts


def gradients(model, batch, goal, taught=None, seed: int = 7) -> tuple[float, dict]:
    model.zero_grad()

    def loss_of(embeddings):
        terms = goal.gather_and_losses(batch, embeddings, True, taught)
        return goal.total(terms, embeddings), terms

    if batch.parts > 1:
        terms = two_pass.backward(model, batch, seed, loss_of)
    else:
        loss, terms = loss_of(two_pass.embed(model, batch, seed))
        loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient.abs().max() > 0 for gradient in found.values())
    return float(sum(terms.values())), found


def same(ours, theirs, limit: float) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=1e-12)
    for name, gradient in theirs[1].items():
        assert (ours[1][name] - gradient).norm() <= limit * gradient.norm(), name


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("backend", ["segments", "buckets", "padded"])
@pytest.mark.parametrize("goal", ["plain", "matryoshka and distillation"])
def test_parts_have_the_gradient_of_the_whole(toy_world, batches, backend, checkpointing, goal):
    backbone = AutoModel.from_pretrained(toy_world.backbone, **in_dtype(torch.float64))
    model = Embedder(backbone, backend, checkpointing).train()
    whole, parts = batches
    taught = torch.randn(len(whole.lengths), 48, dtype=torch.float64) if goal != "plain" else None
    objective = Objective(0.05, {32: 1.0} if goal == "plain" else matryoshka_weights(32))
    ours, theirs = (gradients(model, batch, objective, taught) for batch in (parts, whole))
    same(ours, theirs, 1e-6)  # Transformers' RMSNorm rounds to fp32 inside


def test_parts_in_bf16_differ_by_its_rounding(toy_world, batches):
    """Each pass under an autocast of its own, as accelerate has it: casts that one cached are not the other's."""
    model = Embedder(AutoModel.from_pretrained(toy_world.backbone, **in_dtype(torch.float32)), "segments").train()
    whole, parts = batches
    objective = Objective(0.05, {32: 1.0})
    exact = gradients(model, whole, objective)
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    ours, theirs = (gradients(model, batch, objective) for batch in (parts, whole))
    assert ours[0] == pytest.approx(theirs[0], rel=1e-6)
    assert exact[0] != pytest.approx(theirs[0], rel=1e-6)  # it does round
    for name, gradient in theirs[1].items():
        assert (ours[1][name] - gradient).norm() <= 1e-2 * gradient.norm(), name


def lora(toy_world, dropout: float) -> Embedder:
    torch.manual_seed(0)
    backbone = AutoModel.from_pretrained(toy_world.backbone, **in_dtype(torch.float64))
    model = Embedder(add_lora(backbone, 4, 8, dropout, ["q_proj", "up_proj"]), "segments").train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)  # zeros would leave the other half without a gradient
    return model


def test_both_passes_have_the_same_dropout(toy_world, batches):
    """One graph over all parts, each under its seed, is what the two passes must equal."""
    model, objective, (_, parts) = lora(toy_world, 0.3), Objective(0.05, {32: 1.0}), batches
    ours = gradients(model, parts, objective)
    model.zero_grad()
    embeddings = two_pass.embed(model, parts, seed=7)
    terms = objective.gather_and_losses(parts, embeddings, True)
    objective.total(terms, embeddings).backward()
    theirs = float(sum(terms.values())), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    same(ours, theirs, 1e-12)
    others = gradients(model, parts, objective, seed=8)  # dropout is on, and follows the seed
    assert others[0] != pytest.approx(ours[0], rel=1e-6)


def test_all_parts_but_the_last_run_within_the_engines_context(toy_world, batches):
    """There copies of a model do not sum their gradients (tests/runtime/test_sharding.py counts what they send)."""
    model = Embedder(AutoModel.from_pretrained(toy_world.backbone, **in_dtype(torch.float64)), "segments").train()
    within = []
    passes = []

    @contextmanager
    def earlier_part(model):
        within.append(model)
        yield
        within.pop()

    model.register_forward_hook(lambda *_: passes.append((torch.is_grad_enabled(), len(within))))
    square = lambda embeddings: (embeddings.square().sum(), {})  # noqa: E731
    two_pass.backward(model, batches[1], 7, square, earlier_part=earlier_part)
    parts = batches[1].parts
    assert passes == [(False, 0)] * parts + [(True, 1)] * (parts - 1) + [(True, 0)]


def test_a_text_that_runs_twice_has_the_gradient_of_both(toy_world):
    """Encoding each distinct text once against encoding every copy."""
    store = open_store(toy_world.stores / "toy_classification")
    _, batch = Feed([store], [1], Plan((29,), 16, 0), [64]).training(1)
    assert len(batch.lengths) == batch.rows + 2 < len(batch.texts)  # two labels for all queries
    model = Embedder(AutoModel.from_pretrained(toy_world.backbone, **in_dtype(torch.float64)), "segments").train()
    objective = Objective(0.05, {32: 1.0})
    ours = gradients(model, batch, objective)
    pieces = batch.tokens.split(batch.lengths.tolist())
    lengths = batch.lengths[batch.index]
    copies = torch.cat([pieces[place] for place in batch.index])
    starts = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    model.zero_grad()
    embeddings = model(copies, starts, lengths)
    straight = type(batch)(**vars(batch) | {"index": torch.arange(len(lengths))})
    terms = objective.gather_and_losses(straight, embeddings, True)
    objective.total(terms, embeddings).backward()
    theirs = float(sum(terms.values())), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    same(ours, theirs, 1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_validation_measures_the_loss_that_is_trained(toy_world, masked):
    """Also where queries share their positive: two labels for all of them."""
    _, batch = Feed([open_store(toy_world.stores / "toy_classification")], [1], Plan((29,), 16, 0), [64]).training(1)
    torch.manual_seed(0)
    embeddings = torch.randn(len(batch.lengths), 32, dtype=torch.float64)
    objective, other = (Objective(0.05, {32: 1.0}, mask_same_text=on) for on in (masked, not masked))
    trained = objective.gather_and_losses(batch, embeddings, True)["in_batch"]
    measured, rows = objective.measures(batch, embeddings, True)["in_batch"]
    assert rows == batch.rows
    assert measured.item() == pytest.approx(trained.item(), rel=1e-12)
    assert measured.item() != pytest.approx(other.measures(batch, embeddings, True)["in_batch"][0].item(), rel=1e-3)
