"""How much of a step fits on a device: what a model keeps there, what a token costs, what is free.

What a token costs is counted on the model at hand, by what autograd keeps of two short batches; what is free is asked
of the device; what weights, gradients and moments need is arithmetic. training/policy.py chooses by them.

    python -m pytest tests/training/test_memory.py
"""

import math
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef

from model import Embedder

SPARE = 2**30  # bytes left for the kernels' workspaces and the buffers of collectives
USABLE = 0.85  # of what is free: allocations come in blocks
_CONTAINER = Path("/sys/fs/cgroup/memory.max")  # bytes that a container may have
_TEXTS = 4  # that are run to count what a token keeps
_PROBE = 64  # tokens of each of them; then twice as many


# ------------------------------------------------------------------------------------------ a token


@dataclass(frozen=True)
class Cost:
    """Bytes that a token keeps on the device until its backward pass."""

    layers: int  # of the decoder that can be recomputed
    per_layer: float  # in one decoder layer, all of its activations
    per_recomputed_layer: float  # in one whose activations are recomputed: its input
    outside_layers: float

    def per_token(self, recompute_every: int) -> float:
        """At the peak, with every `recompute_every`-th layer recomputed, 0 = none.

        On top of what is kept stand the gradients inside one layer and, where there is recomputing, one layer's
        activations once more.
        """
        recomputed = self.recomputed_layers(recompute_every)
        whole = self.layers - recomputed + 1
        if recomputed:
            whole += 1
        return self.outside_layers + recomputed * self.per_recomputed_layer + whole * self.per_layer

    def recomputed_layers(self, recompute_every: int) -> int:
        """How many layers are recomputed where every `recompute_every`-th is, 0 = none."""
        return math.ceil(self.layers / recompute_every) if recompute_every else 0


def cost_of(model: Embedder) -> Cost:
    """What a token keeps in this model, in the precision and by the attention that it would train with.

    The model runs a few short texts four times, without a backward pass.
    """
    layers = len(model.layers()) if model.can_recompute else 0

    def bytes_per_token(recompute_every: int) -> float:
        model.recompute(recompute_every)
        more_tokens = _TEXTS * _PROBE
        return (kept_bytes(model, 2 * _PROBE) - kept_bytes(model, _PROBE)) / more_tokens

    # Between layers states have the type of the weights, also under autocast.
    layer_input = model.hidden_size * next(model.parameters()).element_size()
    kept = bytes_per_token(0)
    if not layers:
        return Cost(0, 0.0, layer_input, kept)
    outside_layers = bytes_per_token(1) - layers * layer_input  # recomputing keeps the inputs of all layers
    per_layer = (kept - outside_layers) / layers
    return Cost(layers, per_layer, layer_input, outside_layers)


def kept_bytes(model: Embedder, length: int) -> int:
    """Bytes that autograd would keep of a forward pass on _TEXTS texts of `length` tokens.

    Counted and not kept, since no backward pass follows. Weights are not counted. Their copies in bf16 are, and what
    FSDP2 gathers, but these do not depend on the length.
    """
    weights = {p.untyped_storage()._cdata for p in model.parameters() if not isinstance(p, DTensor)}
    counted: dict[int, StorageWeakRef] = {}  # by address; the reference keeps it from being given to another storage
    device = next(model.parameters()).device
    tokens = torch.zeros(_TEXTS * length, dtype=torch.long, device=device)
    starts = torch.arange(0, len(tokens) + 1, length, dtype=torch.int32, device=device)
    bytes_kept = 0

    def count(tensor: Tensor) -> None:
        """Add the storage of a tensor that autograd would keep, unless it is there already."""
        nonlocal bytes_kept
        storage = tensor.untyped_storage()
        if storage._cdata not in weights and storage._cdata not in counted:
            counted[storage._cdata] = StorageWeakRef(storage)
            bytes_kept += storage.nbytes()

    with torch.autograd.graph.saved_tensors_hooks(count, lambda nothing: nothing):
        model(tokens, starts, np.full(_TEXTS, length))
    return bytes_kept


# ---------------------------------------------------------------------------------------- the model


@dataclass(frozen=True)
class Weights:
    """How many weights a model has, in the parts that engines treat apart."""

    whole: int  # all of them
    trained: int  # the others are frozen
    in_layers: int  # in the decoder's layers together
    largest_layer: int
    largest_other: int  # the largest tensor outside the layers: the embedding table

    @property
    def trained_share(self) -> float:
        """Of the weights, how many are trained: 1.0, or a few hundredths of adapters."""
        return self.trained / self.whole


def weights_of(model: Embedder) -> Weights:
    """The numbers of weights of a model, whole also where an engine holds it in parts."""
    layers = model.layers()
    in_layers = {id(parameter) for layer in layers for parameter in layer.parameters()}
    others = [parameter.numel() for parameter in model.parameters() if id(parameter) not in in_layers]
    sizes = [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers]
    return Weights(
        whole=sum(sizes) + sum(others),
        trained=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        in_layers=sum(sizes),
        largest_layer=max(sizes, default=0),
        largest_other=max(others, default=0),
    )


@dataclass(frozen=True)
class Layout:
    """How an engine lays a model out over processes."""

    processes: int = 1
    shards: int = 1  # processes that share one copy of the model; 1 = each has all of it, as under DDP

    @property
    def sharded(self) -> bool:
        """Whether a layer is gathered from several processes before it runs."""
        return self.shards > 1


def weight_bytes(weights: Weights, layout: Layout) -> float:
    """Bytes of this process's fp32 weights."""
    return 4 * weights.whole / layout.shards


def gradient_and_moment_bytes(weights: Weights, layout: Layout) -> float:
    """Bytes of this process's fp32 gradients and of AdamW's two moments.

    Under DDP the gradients are views of the buckets in which they are summed, and take nothing beside them.
    """
    return 12 * weights.trained / layout.shards


def working_bytes(weights: Weights, layout: Layout, keep_gathered: bool = False) -> float:
    """Bytes that the peak of a pass needs beside weights, gradients and moments, computing in bf16.

    Whole copies: autocast's bf16 copies of the layers' matrices, and one gradient of the largest tensor before it is
    added to those of earlier parts. Sharded: two layers (one computes, the next is on its way) and the table are
    gathered in bf16, with their gradients; the largest of them is in fp32 once more while it is summed.

    Args:
        keep_gathered: what was gathered in the forward pass stays so until the backward pass.
    """
    if not layout.sharded:
        gradient = 4 * weights.largest_other if weights.trained == weights.whole else 0
        return 2 * weights.in_layers + gradient
    at_once = 2 * weights.largest_layer + weights.largest_other
    gathered = weights.whole if keep_gathered else at_once
    summed = max(weights.largest_layer, weights.largest_other)
    return 2 * gathered + weights.trained_share * (2 * at_once + 4 * summed)


def bytes_for_activations(free: float, states: float, losses: float) -> float:
    """What is left of the free bytes for activations; negative where not even the rest fits.

    Args:
        free: bytes, the weights already on the device.
        states: of gradients, moments, and what `working_bytes` counts.
        losses: at their peak (training/loss_memory.py).
    """
    return USABLE * (free - states - losses) - SPARE


# --------------------------------------------------------------------------------------- the device


def free_bytes(device: torch.device, processes: int) -> int:
    """Bytes that one of `processes` on this machine may take: what a GPU has left; of main memory, half of all."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):  # "max" is not a number
        whole = min(whole, int(_CONTAINER.read_text()))
    return whole // 2 // processes
