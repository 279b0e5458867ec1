"""How much of a step fits on a device: which activations are recomputed, how many tokens a forward pass may have.

What a token costs is counted on the model at hand, by what autograd keeps of two short batches; what is free is asked
of the device. From the two follow the cheapest policy for a usual step, and the limit above which a step runs in parts.

    python -m pytest tests/training/test_memory.py
"""

import math
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

    layers: int  # of the decoder that can be recomputed
    per_layer: float  # in one decoder layer, all of its activations
    per_recomputed_layer: float  # in one whose activations are recomputed: its input
    outside_layers: float

    def per_token(self, recompute_every: int) -> float:
        """At the peak, with every `recompute_every`-th layer recomputed, 0 = none.

        On top of what is kept stand the gradients inside one layer and, where there is recomputing, one layer's
        activations once more.
        """
        recomputed = math.ceil(self.layers / recompute_every) if recompute_every else 0
        whole = self.layers - recomputed + 1
        if recomputed:
            whole += 1
        return self.outside_layers + recomputed * self.per_recomputed_layer + whole * self.per_layer


@dataclass(frozen=True)
class Policy:
    """What was chosen."""

    recompute_every: int  # recompute every such layer; 0 = none
    token_limit: int  # tokens of a forward pass; 0 = any number


def choose_policy(
    cost: Cost, free: float, usual_step: int, longest_text: int, recompute_every: int | None, token_limit: int | None
) -> Policy:
    """The policy that costs least time among those that fit.

    Recomputing all layers costs a quarter of a step's work, a part of them less; parts cost a third, whatever their
    number. So: nothing, then as few layers as it takes, then parts; both only where a part would not hold a text.

    Args:
        cost: of the model.
        free: bytes for activations.
        usual_step: tokens that a process has in a usual step.
        longest_text: tokens of the longest text there may be.
        recompute_every, token_limit: what the user fixed, a limit of 0 being none; None leaves it to this function.
    """
    if recompute_every is None:
        options = recomputing_options(cost.layers)
    else:
        options = [recompute_every]
    room = {option: int(free / cost.per_token(option)) for option in options}  # tokens that fit
    at_once = usual_step
    if token_limit:
        at_once = min(usual_step, max(token_limit, longest_text))
    chosen = next((option for option in options if room[option] >= at_once), None)
    if chosen is None and token_limit is None:  # parts
        chosen = next((option for option in options if room[option] >= longest_text), None)
    if chosen is None:  # nothing fits: try with the least
        chosen = options[-1]
    if token_limit is None:
        token_limit = max(room[chosen] // ROUND * ROUND, ROUND)
    return Policy(chosen, token_limit)


def recomputing_options(layers: int) -> list[int]:
    """Which layers to recompute, as in Policy.recompute_every, from none to all; each option recomputes more layers.

    >>> recomputing_options(8)
    [0, 8, 4, 3, 2, 1]
    """
    options = [0]
    for recomputed in range(1, layers + 1):
        every = math.ceil(layers / recomputed)
        if every not in options:
            options.append(every)
    return options


def usual_tokens(stores: list, negatives: list[int], rows: list[int], max_length: int) -> int:
    """Tokens of a process's part of a step, on average over the dataset with the longest.

    Args:
        stores: TokenStores.
        negatives: drawn per tuple, by dataset.
        rows: tuples per process and step, by dataset.
    """
    largest = 0.0
    for store, drawn, tuples in zip(stores, negatives, rows, strict=True):
        mean_length = min(store.meta["tokens"] / store.meta["texts"], max_length)
        largest = max(largest, tuples * (2 + drawn) * mean_length)
    return int(largest)


def free_bytes(device: torch.device, processes: int) -> int:
    """Bytes that one of `processes` on this machine may take: what a GPU has left; of main memory, half of all."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):  # "max" is no number
        whole = min(whole, int(_CONTAINER.read_text()))
    return whole // 2 // processes


def bytes_for_activations(free: float, model: nn.Module, layers: list[nn.Module], sharded: bool) -> float:
    """What of the free bytes is left when gradients, AdamW's moments and working copies of the weights have come.

    Args:
        model: as the engine holds it: of a sharded one only the process's own part counts as kept.
        layers: of its decoder; under sharding two are whole at a time, and so is the embedding table.
    """
    own = [getattr(parameter, "_local_tensor", parameter) for parameter in model.parameters()]
    trained = sum(parameter.numel() for parameter in own if parameter.requires_grad)
    if sharded:  # bf16 weights and gradients, and one of them in fp32 while it is summed
        largest_table = max(parameter.numel() for parameter in model.parameters())
        largest_layer = max((_parameters(layer) for layer in layers), default=0)
        copies = 8 * (largest_table + 2 * largest_layer)
    else:  # bf16, kept by autocast
        copies = 2 * sum(parameter.numel() for parameter in own)
    # 4 bytes each: gradient, its bucket under DDP, two moments
    return max(USABLE * (free - 16 * trained - copies) - SPARE, 0.0)


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def cost_of(model: Embedder) -> Cost:
    """What a token keeps in this model, in the precision and by the attention that it would train with.

    The model runs four short texts four times, without a backward pass.
    """
    layers = len(model.layers()) if model.can_recompute else 0

    def bytes_per_token(recompute_every: int) -> float:
        model.recompute(recompute_every)
        more_tokens = 4 * _PROBE  # four texts, each longer by _PROBE tokens
        return (kept_bytes(model, 2 * _PROBE) - kept_bytes(model, _PROBE)) / more_tokens

    kept = bytes_per_token(0)
    if not layers:
        return Cost(0, 0.0, model.hidden_size * 4.0, kept)
    outside_layers = bytes_per_token(1)
    per_layer = (kept - outside_layers) / layers
    return Cost(layers, per_layer, model.hidden_size * 4.0, outside_layers)  # an input is fp32 under autocast, at most


def kept_bytes(model: Embedder, length: int, texts: int = 4) -> int:
    """Bytes that autograd keeps of a forward pass on `texts` texts of `length` tokens; weights are not counted."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}
    device = next(model.parameters()).device
    tokens = torch.zeros(texts * length, dtype=torch.long, device=device)
    starts = torch.arange(0, texts * length + 1, length, dtype=torch.int32, device=device)
    with torch.autograd.graph.saved_tensors_hooks(_note_storages(seen, weights), lambda tensor: tensor):
        embeddings = model(tokens, starts, np.full(texts, length))  # held while it is counted
    del embeddings
    return sum(seen.values())


def format_policy(recompute_every: int) -> str:
    """What is recomputed, for people."""
    if recompute_every == 0:
        return "all kept"
    if recompute_every == 1:
        return "recomputed in all layers"
    return f"recomputed in one of every {recompute_every} layers"


def _note_storages(seen: dict[int, int], weights: set[int]) -> Callable[[Tensor], Tensor]:
    """A hook that notes the size of every storage once."""

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    return note
