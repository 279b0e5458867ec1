"""Which activations a run keeps, and how many tokens it puts into a forward pass: asked, or chosen from memory."""

import math
import os

import torch
from accelerate import Accelerator
from torch import nn

from arguments import Args
from model import Embedder
from runtime import engine
from runtime.collectives import all_rows
from training import memory


def count_cost(args: Args, accelerator: Accelerator, model: Embedder) -> memory.Cost | None:
    """What a token costs, where something is to be chosen from it; None where the user fixed everything.

    Before the engine takes the model: after that a forward pass may be a collective.
    """
    if args.gradient_checkpointing is not None and args.max_tokens_per_forward is not None:
        return None
    with accelerator.autocast():
        return memory.cost_of(model)


def choose_activation_policy(
    args: Args,
    accelerator: Accelerator,
    model: nn.Module,
    cost: memory.Cost | None,
    usual_step: int,
    token_limit: int | None,
) -> memory.Policy:
    """What is recomputed and how many tokens a forward pass has at most, the same on all processes; printed.

    Args:
        model: as the engine holds it.
        cost: from `count_cost`.
        usual_step: tokens of a process's part of a usual step.
        token_limit: what is fixed already; 0 = any number, None = to be chosen.
    """
    asked_every = None
    if args.gradient_checkpointing is not None:
        asked_every = int(args.gradient_checkpointing)
    if cost is None:
        policy = memory.Policy(asked_every or 0, token_limit or 0)
        reason = ""
    else:
        free = least_free_bytes(accelerator, model)
        policy = memory.choose_policy(cost, free, usual_step, args.max_seq_length, asked_every, token_limit)
        kib = cost.per_token(policy.recompute_every) / 2**10
        reason = f"; {free / 2**30:.1f} GiB for them, a token takes {kib:,.0f} KiB"
    activations = memory.format_policy(policy.recompute_every)
    if asked_every is not None:
        activations += " as asked"
    limit = f"at most {policy.token_limit:,} tokens" if policy.token_limit else "any number of tokens"
    limit += " a forward pass"
    if token_limit is not None:
        limit += " as asked"
    accelerator.print(
        f"activations: {activations}; {limit}{reason}; a usual step has {usual_step:,} tokens a process"
        f"{describe_parts(usual_step, policy.token_limit)}"
    )
    return policy


def least_free_bytes(accelerator: Accelerator, model: nn.Module) -> float:
    """Bytes for activations on the process that has least; a collective."""
    processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    free = memory.free_bytes(accelerator.device, processes_here)
    layers = accelerator.unwrap_model(model).layers()
    own = memory.bytes_for_activations(free, model, layers, engine.is_sharded(accelerator))
    rows = all_rows(torch.tensor([own], device=accelerator.device), accelerator.num_processes)  # [processes, 1]
    return rows.min().item()


def describe_parts(usual_step: int, token_limit: int) -> str:
    """How many parts a usual step runs in, where it does not run at once."""
    if not token_limit or usual_step <= token_limit:
        return ""
    return f", {math.ceil(usual_step / token_limit)} parts, each run twice"
