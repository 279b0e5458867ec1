"""What the losses need is what is counted while they run: every tensor that lives, forward and backward.

python -m pytest tests/training/test_loss_memory.py
"""

import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import train_here
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import losses
from benchmarks.common import batch_of_lengths
from losses import matryoshka_weights
from training import loss_memory, memory, objective, policy
from training.loss_memory import LossShape, loss_bytes
from training.objective import Objective

SHAPES = [
    LossShape(64, 64, 0, 64, (64,)),
    LossShape(64, 64, 7, 64, (64,)),
    LossShape(64, 512, 7, 64, (64,)),
    LossShape(16, 512, 1, 128, (128,)),
    LossShape(64, 512, 7, 64, tuple(matryoshka_weights(64))),
    LossShape(64, 512, 7, 64, tuple(matryoshka_weights(64)), teacher_width=96),
    LossShape(64, 512, 7, 64, (64,), teacher_width=64),  # of an array that was computed before
    LossShape(64, 512, 7, 64, (64,), retrieval=False),
    LossShape(32, 1024, 2, 256, tuple(matryoshka_weights(256))),
]


class Peak(TorchDispatchMode):
    """Bytes of all tensors that live at once, at most; counted by their storages, as they come and go."""

    def __init__(self, *known: torch.Tensor):
        super().__init__()
        self.live = 0
        self.peak = 0
        self.sizes: dict[int, int] = {}
        for tensor in known:
            self._note(tensor)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for value in tree_leaves(made):
            if isinstance(value, torch.Tensor):
                self._note(value)
        return made

    def _note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self.sizes:
            return
        self.sizes[storage._cdata] = storage.nbytes()
        weakref.finalize(storage, self._forget, storage._cdata)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)

    def _forget(self, address: int) -> None:
        self.live -= self.sizes.pop(address)


def test_the_counter_counts_what_lives_at_once():
    with Peak() as counted:
        first = torch.zeros(1000)
        second = first + 1
        del first, second
        torch.zeros(500)
    assert counted.peak == 8000
    assert counted.live == 0


def counted_peak(shape: LossShape, monkeypatch) -> int:
    """Bytes that live at most while the losses of such a step run, its embeddings included."""
    torch.manual_seed(0)
    texts = np.full((shape.tuples, 2 + shape.negatives), 3)
    batch = replace(
        batch_of_lengths(texts, 100),
        counts=(shape.tuples,) * (shape.global_batch // shape.tuples),
        positives=torch.arange(shape.global_batch),
    )
    others = torch.randn(shape.global_batch - shape.tuples, shape.width)
    monkeypatch.setattr(objective, "gather", lambda rows, counts: torch.cat([rows, others]) if len(others) else rows)
    goal = Objective(0.05, dict.fromkeys(shape.prefixes, 1.0))
    leaf = torch.randn(shape.texts, shape.width, requires_grad=True)
    teacher = torch.randn(shape.texts, shape.teacher_width) if shape.teacher_width else None
    known = [leaf] if teacher is None else [leaf, teacher]
    with Peak(*known) as counted:
        terms = goal.gather_and_losses(batch, leaf, shape.retrieval, teacher)
        goal.total(terms, leaf).backward()
    assert leaf.grad.norm() > 1e-3
    return counted.peak


@pytest.mark.parametrize("block", [2**23, 2**14, 2**11])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_losses_need_what_is_counted(shape, block, monkeypatch):
    monkeypatch.setattr(losses, "BLOCK", block)
    monkeypatch.setattr(loss_memory, "BLOCK", block)
    counted = counted_peak(shape, monkeypatch)
    print(f"{loss_bytes(shape) / counted:.2f} of what is counted, {counted:,}")
    assert counted <= loss_bytes(shape) <= 1.5 * counted


def test_a_run_leaves_room_for_its_losses(settings, monkeypatch):
    seen = []
    choose = policy.choose_policy
    monkeypatch.setattr(policy, "choose_policy", lambda found, fixed: seen.append(found) or choose(found, fixed))
    train_here(settings | {"train_steps": 1, "train_batch_size": 8, "use_mrl": True, "num_hard_neg": 2})
    expected = loss_bytes(LossShape(8, 8, 2, 32, tuple(matryoshka_weights(32))))
    (found,) = seen
    assert found.losses == expected > 0
    without = replace(found, losses=0)
    assert without.activation_bytes(False) - found.activation_bytes(False) == pytest.approx(memory.USABLE * expected)


def test_large_batches_need_gigabytes_and_the_published_ones_next_to_nothing():
    """1 GiB was once set aside for all of them."""
    large = LossShape(2048, 16384, 7, 2560, tuple(matryoshka_weights(2560)))
    assert loss_bytes(large) == pytest.approx(2.4e9, rel=0.03)
    alone = LossShape(16384, 16384, 1, 2560, (2560,))
    assert loss_bytes(alone) == pytest.approx(3.5e9, rel=0.03)
    published = LossShape(32, 512, 7, 1024, (1024,))
    assert loss_bytes(published) == pytest.approx(20e6, rel=0.03)
