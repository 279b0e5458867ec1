"""One optimizer update: a batch, its embeddings, its losses, the gradient, the weights."""

import math
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from data.batch import Batch
from runtime import engine
from training import two_pass
from training.setup import Run
from utils import RunError, first_line, plural

_WARM_UP_TOKENS = 8  # of the pass that settles DDP's buckets: any number will do


def start_training(run: Run) -> None:
    """Put the model into training mode, and settle where DDP sums which gradient.

    DDP lays the gradients into its buckets twice: before the first backward pass, and once more after it, in the order
    in which they were ready. From three processes on, how a sum is rounded depends on its place in a bucket. So without
    this pass, whose gradient is thrown away, the first step after a resume was rounded differently from the same step
    of a run that was never stopped: the last bits of the weights differed (tests/chaos.py, four processes).
    """
    run.model.train()
    if run.is_finished or not engine.has_buckets(run.accelerator):
        return
    device = run.accelerator.device
    tokens = torch.arange(_WARM_UP_TOKENS, device=device)  # [t]
    cu_seqlens = torch.tensor([0, _WARM_UP_TOKENS], dtype=torch.int32, device=device)
    states = run.model(tokens, cu_seqlens, np.array([_WARM_UP_TOKENS]))  # [1, d]
    run.accelerator.backward(states.sum())
    engine.clear_gradients(run.accelerator, run.optimizer)


def train_step(run: Run, step: int) -> tuple[float, Tensor]:
    """One optimizer update, of step 1, 2, ...

    Nothing in it waits for the device (tests/training/test_reports.py counts).

    Returns:
        its learning rate, and the gradient norm before clipping, [] on the device; one that is not finite stands for
        an update that was left out.

    Raises:
        RunError: the GPU's memory is full.
    """
    learning_rate = run.schedule.rate(step)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate
    dataset, batch = run.batches.training(step)
    try:
        norm = update(run, step, dataset, batch.to(run.accelerator.device))
    except torch.OutOfMemoryError as error:
        raise RunError(out_of_memory(run, step, batch, first_line(error))) from None
    count_work(run, batch)
    return learning_rate, norm


def update(run: Run, step: int, dataset: int, batch: Batch) -> Tensor:
    """Gradient and update of one batch on the device. Returns the gradient norm before clipping, [] on the device."""
    accelerator = run.accelerator
    objective = run.objectives[dataset]
    in_batch = run.recipes[dataset].in_batch
    seed = run.feed.plan.dropout_seed(step, accelerator.process_index)
    teacher = teacher_embeddings(run, batch)  # [u, D] or None

    def loss_of(embeddings: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """From [u, d] of the distinct texts to the scalar to differentiate, and the losses that it is made of."""
        losses = objective.gather_and_losses(batch, embeddings, in_batch, teacher)
        return objective.total(losses, embeddings), losses

    if batch.parts == 1:
        loss, losses = loss_of(two_pass.embed(run.model, batch, seed))
        accelerator.backward(loss)
    else:  # the same gradient where the texts are too many for one forward pass
        earlier_part = partial(engine.earlier_part, accelerator)
        losses = two_pass.backward(run.model, batch, seed, loss_of, accelerator.backward, earlier_part)
    norm = clip_gradients(run)  # []
    finite = norm.isfinite()  # of all processes' gradients together: all of them leave the update out, or none
    run.optimizer.optimizer.found_inf = (~finite).float()  # AdamW then changes nothing, without asking the host
    run.optimizer.step()
    mean_rows = sum(batch.counts) / len(batch.counts)  # a loss is this process's share already: all weigh alike
    run.meter.add(dataset, losses, mean_rows, counts=finite)
    engine.clear_gradients(accelerator, run.optimizer)
    return norm


@torch.no_grad()
def teacher_embeddings(run: Run, batch: Batch) -> Tensor | None:
    """The teacher's embeddings of a batch's distinct texts, [u, D], where there is a teacher, or they are known."""
    if batch.teacher is not None:
        return batch.teacher  # [u, d], read from the disk with the batch
    if run.teacher is None:
        return None
    with run.accelerator.autocast():
        return two_pass.embed(run.teacher, batch)


def clip_gradients(run: Run) -> Tensor:
    """Scale the gradients down to max_grad_norm. Returns their norm before, [] on the device."""
    norm = run.accelerator.clip_grad_norm_(run.model.parameters(), run.args.max_grad_norm or math.inf)
    if isinstance(norm, DTensor):  # of a sharded model
        norm = norm.full_tensor()
    return torch.as_tensor(norm, device=run.accelerator.device)  # DeepSpeed's may be a number


def out_of_memory(run: Run, step: int, batch: Batch, reason: str) -> str:
    """What a step that did not fit was, and which keys make it smaller."""
    recomputes = any(layer.gradient_checkpointing for layer in run.accelerator.unwrap_model(run.model).layers())
    remedy = "a lower max_tokens_per_forward"
    if not recomputes:
        remedy = f"gradient_checkpointing true, or {remedy}"
    return (
        f"step {step}: the memory of {run.accelerator.device} is full ({reason}). The step has {batch.rows} tuples, "
        f"{len(batch.lengths):,} texts and {len(batch.tokens):,} tokens on this process, the longest text "
        f"{int(batch.lengths.max()):,}, in {plural(batch.parts, 'part')} of at most "
        f"{run.feed.max_tokens_per_forward:,} tokens (0 = any number). The same command continues from the last state "
        f"with {remedy}"
    )


def count_work(run: Run, batch: Batch) -> None:
    """Tell the meter what this process had in a step."""
    embedder = run.accelerator.unwrap_model(run.model)
    computed = 0
    for number in range(batch.parts):
        _, _, lengths, _ = batch.part(number)
        computed += embedder.computed_positions(lengths)
    run.meter.count(tuples=batch.rows, tokens=len(batch.tokens), computed=computed, heaviest=batch.heaviest)
