"""A step in bounded memory: any number of texts, in each forward pass at most max_tokens_per_forward tokens.

Where the texts of a step are cut into parts, the step runs twice over them (GradCache, Gao et al. 2021): once without
activations, for the embeddings; the loss on all embeddings at once gives their gradient; then each part is run again
and its embeddings' gradient carried into the weights. Value and gradient are those of one pass; the price is one more
forward pass, a third of the work, however many parts there are.

    python -m pytest tests/training/test_two_pass.py
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from data.batch import Batch

LossOf = Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]


def embed(model: nn.Module, batch: Batch, seed: int | None = None) -> Tensor:
    """Embeddings of the distinct texts, [u, d], part by part.

    Args:
        seed: of the dropout; part i is run under seed + i. None leaves the random state alone.
    """
    pieces = []
    for number in range(batch.parts):
        if seed is not None:
            torch.manual_seed(seed + number)
        tokens, cu_seqlens, lengths, real_texts = batch.part(number)
        pieces.append(model(tokens, cu_seqlens, lengths)[:real_texts])  # [texts of the part, d]
    return pieces[0] if batch.parts == 1 else torch.cat(pieces)


def backward(
    model: nn.Module,
    batch: Batch,
    seed: int,
    loss_of: LossOf,
    backward: Callable[[Tensor], None] = torch.Tensor.backward,
    earlier_part: Callable[[nn.Module], AbstractContextManager] = lambda model: nullcontext(),
) -> dict[str, Tensor]:
    """Add the gradient of a step's loss to the weights, in parts; a collective.

    Args:
        seed: of the dropout.
        loss_of: from the distinct texts' embeddings [u, d] to (the loss, the losses that it is made of).
        backward: runs a scalar's backward pass; an engine may scale the loss in it.
        earlier_part: a context around forward and backward pass of all parts but the last; copies of a model do not sum
            their gradients in it.

    Returns:
        The losses that the loss is made of.
    """
    with torch.no_grad():
        embeddings = embed(model, batch, seed)  # [u, d]
    embeddings.requires_grad_()
    loss, losses = loss_of(embeddings)
    backward(loss)
    for number in range(batch.parts):
        is_last = number == batch.parts - 1
        with nullcontext() if is_last else earlier_part(model):
            _run_again(model, batch, number, seed, embeddings.grad)
    return losses


def _run_again(model: nn.Module, batch: Batch, number: int, seed: int, gradient: Tensor) -> None:
    """Run one part again, with the dropout it had, and carry its rows of `gradient` [u, d] into the weights."""
    torch.manual_seed(seed + number)
    tokens, cu_seqlens, lengths, real_texts = batch.part(number)
    states = model(tokens, cu_seqlens, lengths)  # [texts of the part, d]
    own_gradient = torch.zeros_like(states)  # zeros for a text that was run only to take part in collectives
    own_gradient[:real_texts] = gradient[batch.cuts[number] : batch.cuts[number + 1]]
    torch.autograd.backward(states, own_gradient)
