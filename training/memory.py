"""How much of a step fits on a device: which activations are recomputed, how many tokens a forward pass may have.

What a token costs is counted on the model at hand, by what autograd keeps of two short batches; what is free is asked
of the device. From the two follow the cheapest policy for a usual step, and the limit above which a step runs in parts.

    python -m pytest tests/training/test_memory.py
"""

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from model import Embedder

SPARE = 2**30  # bytes left for the losses, the allocator's gaps and the kernels' workspaces
USABLE = 0.85  # of what is free: allocations come in blocks
ROUND = 1024  # tokens; a limit is a multiple of it
_CONTAINER = Path("/sys/fs/cgroup/memory.max")  # bytes that a container may have
_PROBE = 64  # tokens of each of four texts, and twice as many


@dataclass(frozen=True)
class Cost:
    """Bytes that a token keeps on the device until its backward pass."""

    layers: int
    layer: float  # in one decoder layer, all of its activations
    light: float  # in one whose activations are recomputed: its input
    rest: float  # outside the layers

    def per_token(self, every: int) -> float:
        """At the peak, with every `every`-th layer recomputed, 0 = none.

        On top of what is kept stand the gradients inside one layer and, where there is recomputing, one layer's
        activations once more.
        """
        light = -(-self.layers // every) if every else 0
        whole = self.layers - light + 1 + (light > 0)
        return self.rest + light * self.light + whole * self.layer


@dataclass(frozen=True)
class Policy:
    """What was chosen."""

    every: int  # recompute every `every`-th layer; 0 = none
    limit: int  # tokens of a forward pass; 0 = any number


def choose(cost: Cost, free: float, usual: int, longest: int, every: int | None, limit: int | None) -> Policy:
    """The policy that costs least time among those that fit.

    Recomputing all layers costs a quarter of a step's work, a part of them less; parts cost a third, whatever their
    number. So: nothing, then as few layers as it takes, then parts; both only where a part would not hold a text.

    Args:
        cost: of the model.
        free: bytes for activations.
        usual: tokens that a process has in a usual step.
        longest: tokens of the longest text there may be.
        every, limit: what the user fixed, a limit of 0 being none; None leaves it to this function.
    """
    if every is not None:
        options = [every]
    else:
        options = [0, *dict.fromkeys(-(-cost.layers // light) for light in range(1, cost.layers + 1))]
    room = {option: int(free / cost.per_token(option)) for option in options}
    at_once = min(usual, max(limit, longest)) if limit else usual
    fits = [option for option in options if room[option] >= at_once]
    parts = [option for option in options if room[option] >= longest] if limit is None else []
    taken = (fits or parts or options[-1:])[0]
    return Policy(taken, max(room[taken] // ROUND * ROUND, ROUND) if limit is None else limit)


def usual_tokens(stores: list, negatives: list[int], rows: int, max_length: int) -> int:
    """Tokens of a process's part of a step, on average over the dataset with the longest.

    Args:
        stores: TokenStores.
        negatives: drawn a tuple, by dataset.
        rows: tuples a process.
    """
    means = [min(store.meta["tokens"] / store.meta["texts"], max_length) for store in stores]
    return int(max(rows * (2 + n) * mean for mean, n in zip(means, negatives, strict=True)))


def free_bytes(device: torch.device, processes: int) -> int:
    """Bytes that one of `processes` on this machine may take: what a GPU has left; of main memory, half of all."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):  # "max" is no number
        whole = min(whole, int(_CONTAINER.read_text()))
    return whole // 2 // processes


def for_activations(free: float, model: nn.Module, layers: list[nn.Module], sharded: bool) -> float:
    """What of the free bytes is left when gradients, AdamW's moments and working copies of the weights have come.

    Args:
        model: as the engine holds it: of a sharded one only the process's own part counts as kept.
        layers: of its decoder; under sharding two are whole at a time, and so is the embedding table.
    """
    held = [getattr(p, "_local_tensor", p) for p in model.parameters()]
    trained = sum(p.numel() for p in held if p.requires_grad)
    if sharded:  # bf16 weights and gradients, and one of them in fp32 while it is summed
        copies = 8 * (max(p.numel() for p in model.parameters()) + 2 * max(map(_size, layers), default=0))
    else:  # bf16, kept by autocast
        copies = 2 * sum(p.numel() for p in held)
    # 4 bytes each: gradient, its bucket under DDP, two moments
    return max(USABLE * (free - 16 * trained - copies) - SPARE, 0.0)


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def cost_of(model: Embedder) -> Cost:
    """What a token keeps in this model, in the precision and by the attention that it would train with.

    The model runs four short texts four times, without a backward pass.
    """
    layers = len(model.layers()) if model.can_recompute else 0

    def slope(every: int) -> float:
        model.recompute(every)
        small, large = (kept_bytes(model, length) for length in (_PROBE, 2 * _PROBE))
        return (large - small) / (4 * _PROBE)

    whole = slope(0)
    rest = slope(1) if layers else whole
    layer = (whole - rest) / max(layers, 1)
    return Cost(layers, layer, model.hidden_size * 4.0, rest)  # a layer's input is fp32 under autocast, at most


def kept_bytes(model: Embedder, length: int, texts: int = 4) -> int:
    """Bytes that autograd keeps of a forward pass on `texts` texts of `length` tokens; weights are not counted."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}
    device = next(model.parameters()).device
    tokens = torch.zeros(texts * length, dtype=torch.long, device=device)
    starts = torch.arange(0, texts * length + 1, length, dtype=torch.int32, device=device)
    with torch.autograd.graph.saved_tensors_hooks(_noting(seen, weights), lambda tensor: tensor):
        kept = model(tokens, starts, np.full(texts, length))  # held while it is counted
    del kept
    return sum(seen.values())


def format_policy(every: int) -> str:
    """What is recomputed, for people."""
    return {0: "all kept", 1: "recomputed in all layers"}.get(every, f"recomputed in one of every {every} layers")


def _noting(seen: dict[int, int], weights: set[int]) -> Callable[[Tensor], Tensor]:
    """A hook that notes the size of every storage once."""

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    return note
