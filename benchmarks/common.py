"""What several benchmarks need: variants in turn, a fresh process for a measurement, made-up steps, their gradients."""

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen3Config

from benchmarks.lengths import packed, tuples
from data.batch import Batch, split_by_tokens
from training import two_pass
from training.objective import Objective

Result = TypeVar("Result")

TEMPERATURE = 0.05  # of both reports
QWEN3 = {  # published size -> (width, MLP width, layers, heads)
    "0.6B": (1024, 3072, 28, 16),
    "1.7B": (2048, 6144, 28, 16),
    "4B": (2560, 9728, 36, 32),
    "8B": (4096, 12288, 36, 32),
    "14B": (5120, 17408, 40, 40),
}


def qwen3_config(size: str) -> Qwen3Config:
    """The architecture of a published size."""
    width, mlp_width, layers, heads = QWEN3[size]
    return Qwen3Config(
        vocab_size=151936,
        hidden_size=width,
        intermediate_size=mlp_width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
    )


def measure_in_turn(variants: dict[str, Callable[[], Result]], rounds: int) -> dict[str, list[Result]]:
    """What each variant gives in each round. They take turns, so that a slow minute of the machine slows all."""
    results = {name: [] for name in variants}
    for _ in range(rounds):
        for name, measure in variants.items():
            results[name].append(measure())
    return results


class Budget:
    """The minutes that a command may take. What does not fit any more is not begun, and named.

    Args:
        minutes: from now on.
    """

    def __init__(self, minutes: float):
        self.ends = time.monotonic() + 60 * minutes
        self.left_out: list[dict[str, str]] = []  # {"what", "reason"} of everything that was not measured

    def seconds_left(self) -> float:
        """Until the end; negative behind it."""
        return self.ends - time.monotonic()

    def allows(self, what: str, seconds: float) -> bool:
        """Whether something that takes about `seconds` still fits; where it does not, it is noted as left out."""
        left = self.seconds_left()
        if left >= seconds:
            return True
        self.leave_out(what, f"takes about {seconds:.0f} s, and {max(left, 0):.0f} s of --minutes are left")
        return False

    def leave_out(self, what: str, reason: str) -> None:
        """Note that something was not measured, and why."""
        self.left_out.append({"what": what, "reason": reason})

    def part(self, seconds: float) -> "Budget":
        """A budget within this one, of so many seconds from now on; what it leaves out is noted here too."""
        within = Budget(min(seconds, self.seconds_left()) / 60)
        within.left_out = self.left_out
        return within


def in_fresh_process(function: Callable[..., Result], *args) -> Result:
    """What the function returns in a process of its own: nothing is loaded yet, and a peak of memory is its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def own_memory(process: int | str = "self") -> float:
    """MiB that a process has for itself now, without mapped files that others can share; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0.0
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields.get("RssAnon", "0").split()[0]) / 1024  # the file says kB


def batch_of_lengths(lengths: np.ndarray, vocab_size: int) -> Batch:
    """A step of one process in one part, of made-up texts that are all distinct.

    Args:
        lengths: int [m, 2 + n], tokens of each tuple's query, positive and negatives.
    """
    count, columns = lengths.shape
    order = np.concatenate([lengths[:, 0], lengths[:, 1], lengths[:, 2:].flatten()])  # queries | positives | negatives
    tokens, cu_seqlens, flat = packed(order, vocab_size)
    texts = torch.arange(len(flat))
    return Batch(
        tokens=tokens,
        cu_seqlens=cu_seqlens,
        index=texts,
        mask=torch.ones(count, columns - 2, dtype=torch.bool),
        slots=torch.arange(count * (columns - 2)).view(count, columns - 2),
        positives=torch.arange(count),
        texts=texts.numpy(),
        lengths=flat,
        cuts=(0, len(flat)),
        counts=(count,),
        begin=0,
        negatives=count * (columns - 2),
        heaviest=len(tokens),
    )


def batch_of_shape(shape: str, count: int, vocab_size: int) -> Batch:
    """A step of `count` tuples with the text lengths of a frozen distribution (benchmarks/lengths.py)."""
    return batch_of_lengths(tuples(shape, count), vocab_size)


def in_parts(batch: Batch, max_tokens_per_forward: int) -> Batch:
    """The same step in parts of at most so many tokens; 0 = in one."""
    return replace(batch, cuts=tuple(split_by_tokens(batch.lengths, max_tokens_per_forward)))


def add_gradients(model: Callable[..., Tensor], batch: Batch, width: int) -> Tensor:
    """Add the gradient of a retrieval step to the weights, as training does on one process.

    Args:
        model: an Embedder, or a function with the same arguments.
        width: d, the width of an embedding.

    Returns:
        The loss, a scalar without gradient; still on the device, so that nothing waits for it.
    """
    objective = Objective(TEMPERATURE, {width: 1.0})

    def loss_of(embeddings: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        losses = objective.gather_and_losses(batch, embeddings, in_batch=True)
        return objective.total(losses, embeddings), losses

    if batch.parts > 1:
        losses = two_pass.backward(model, batch, 0, loss_of)
    else:
        loss, losses = loss_of(two_pass.embed(model, batch, 0))
        loss.backward()
    return sum(losses.values()).detach()
