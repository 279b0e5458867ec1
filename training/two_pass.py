"""A step in bounded memory: any number of texts, a limit of tokens in each forward pass.

Where the texts of a step are cut into parts, the step runs twice over them (GradCache, Gao et al. 2021): once without
activations, for the embeddings; the loss on all embeddings at once gives their gradient; then each part is run again
and its embeddings' gradient carried into the weights. Value and gradient are those of one pass; the price is one more
forward pass, a third of the work, however many parts there are.

    python -m pytest tests/training/test_two_pass.py
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from data.batch import Batch


def embed(model: nn.Module, batch: Batch, seed: int | None = None) -> Tensor:
    """Embeddings of the distinct texts, [u, d], part by part.

    Args:
        seed: of the dropout; part i is run under seed + i. None leaves the random state alone.
    """
    pieces = []
    for number in range(batch.parts):
        tokens, cu_seqlens, lengths, size = batch.part(number)
        if seed is not None:
            torch.manual_seed(seed + number)
        pieces.append(model(tokens, cu_seqlens, lengths)[:size])  # [texts of the part, d]
    return pieces[0] if batch.parts == 1 else torch.cat(pieces)


def backward(
    accelerator: Accelerator,
    model: nn.Module,
    batch: Batch,
    seed: int,
    loss_of: Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]],
) -> dict[str, Tensor]:
    """Add the gradient of a step's loss to the weights; a collective.

    Args:
        seed: of the dropout.
        loss_of: from the distinct texts' embeddings [u, d] to (loss, its terms).

    Returns:
        The terms.
    """
    with nullcontext() if batch.parts == 1 else torch.no_grad():
        embeddings = embed(model, batch, seed)
    if batch.parts > 1:
        embeddings.requires_grad_()
    loss, terms = loss_of(embeddings)
    accelerator.backward(loss)
    if batch.parts > 1:
        for number in range(batch.parts):
            with _waiting(accelerator, model, number == batch.parts - 1):
                _again(model, batch, number, seed, embeddings.grad)
    return terms


def _waiting(accelerator: Accelerator, model: nn.Module, last: bool) -> AbstractContextManager:
    """Copies of a model sum their gradients over the processes once, with the last part; a sharded model at each part:
    waiting would keep them whole, 4 bytes a parameter on every process, which is more than parts save."""
    return nullcontext() if last or isinstance(model, FSDPModule) else accelerator.no_sync(model)


def _again(model: nn.Module, batch: Batch, number: int, seed: int, gradient: Tensor) -> None:
    """Run one part again, with the dropout it had, and carry its rows of `gradient` [u, d] into the weights."""
    tokens, cu_seqlens, lengths, size = batch.part(number)
    torch.manual_seed(seed + number)
    states = model(tokens, cu_seqlens, lengths)
    rows = torch.zeros_like(states)  # zeros for a text that was run only to take part
    rows[:size] = gradient[batch.cuts[number] : batch.cuts[number + 1]]
    torch.autograd.backward(states, rows)
