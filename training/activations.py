"""Which activations a run keeps, and how many tokens a forward pass has: asked, or chosen by time and memory."""

import os

import torch
from accelerate import Accelerator
from torch import nn

from arguments import Args
from model import Embedder
from runtime import engine
from runtime.collectives import all_rows
from training import memory, policy
from utils import RunError, plural

GIB = 2**30


def count_cost(args: Args, accelerator: Accelerator, model: Embedder) -> memory.Cost | None:
    """What a token costs, where something is to be chosen from it; None if the user fixed everything.

    Of a sharded model a collective, as its forward passes are.
    """
    if args.gradient_checkpointing is not None and args.max_tokens_per_forward is not None:
        return None
    with engine.trials(accelerator, model):
        return memory.cost_of(model)


def choose_activation_policy(
    args: Args,
    accelerator: Accelerator,
    model: nn.Module,
    cost: memory.Cost | None,
    usual: policy.UsualStep,
    longest_text: int,
    losses: int,
) -> policy.Policy:
    """What is recomputed and how many tokens a forward pass has at most, the same on all processes; printed.

    Args:
        model: as the engine holds it.
        cost: from `count_cost`.
        usual: a usual step of a process.
        longest_text: tokens of the longest text there may be.
        losses: bytes at their peak.

    Raises:
        RunError: on every process: gradients and moments alone are more than a GPU has left.
    """
    fixed = what_is_fixed(args, accelerator)
    if cost is None:
        parts = policy.count_parts(usual.tokens, fixed.max_tokens_per_forward)
        chosen = policy.Policy(
            fixed.recompute_every, fixed.max_tokens_per_forward, bool(fixed.keep_gathered), parts=parts
        )
        accelerator.print(describe(chosen, fixed, usual.tokens))
        return chosen
    embedder = accelerator.unwrap_model(model)
    layout = memory.Layout(accelerator.num_processes, engine.shards(accelerator))
    free = least_free_bytes(accelerator, memory.weights_of(embedder))
    name = device_name(accelerator.device)
    situation = policy.situation_of(embedder, cost, layout, name, free, losses, usual, longest_text)
    if accelerator.device.type == "cuda":
        refuse_what_cannot_fit(situation)
    chosen = policy.choose_policy(situation, fixed)
    left = situation.activation_bytes(chosen.keep_gathered) / GIB
    reason = f"; {left:.1f} GiB for them, a token takes {cost.per_token(chosen.recompute_every) / 2**10:,.0f} KiB"
    accelerator.print(describe(chosen, fixed, usual.tokens, reason))
    if not chosen.fits:
        accelerator.print(f"warning: {describe_shortage(situation, chosen)}")
    return chosen


def what_is_fixed(args: Args, accelerator: Accelerator) -> policy.Fixed:
    """What the configuration and the engine leave no choice in."""
    recompute_every = None
    if args.gradient_checkpointing is not None:
        recompute_every = int(args.gradient_checkpointing)
    max_tokens_per_forward = args.max_tokens_per_forward
    if engine.is_deepspeed(accelerator):
        max_tokens_per_forward = 0  # its steps do not run in parts
    keep_gathered = False
    if engine.is_sharded(accelerator):
        keep_gathered = True if engine.keeps_gathered(accelerator) else None
    return policy.Fixed(recompute_every, max_tokens_per_forward, keep_gathered)


def device_name(device: torch.device) -> str:
    """What CUDA calls a device, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def least_free_bytes(accelerator: Accelerator, weights: memory.Weights) -> float:
    """Bytes for gradients, moments, losses and activations on the process that has least; a collective."""
    own = torch.tensor([float(free_bytes_here(accelerator, weights))], device=accelerator.device)
    rows = all_rows(own, accelerator.num_processes)  # [processes, 1]
    return rows.min().item()


def free_bytes_here(accelerator: Accelerator, weights: memory.Weights) -> int:
    """What `least_free_bytes` counts, on this process; called when the engine has the model."""
    processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    free = memory.free_bytes(accelerator.device, processes_here)
    if accelerator.device.type == "cuda" and engine.has_buckets(accelerator):
        free += 4 * weights.trained  # the buckets are there already, and gradients will lie in them
    return free


def refuse_what_cannot_fit(situation: policy.Situation) -> None:
    """Refuse a model whose gradients and moments are more than what a GPU has left beside its weights.

    Raises:
        RunError: on every process.
    """
    needed = memory.gradient_and_moment_bytes(situation.weights, situation.layout)
    if needed > situation.free:
        raise RunError(
            f"memory: gradients and AdamW's moments need {needed / GIB:.1f} GiB on each GPU, and "
            f"{situation.free / GIB:.1f} GiB are left beside the weights: share them out over more GPUs "
            "(configs/accelerate_config.yaml), or set use_lora to true"
        )


def describe(chosen: policy.Policy, fixed: policy.Fixed, usual_tokens: int, reason: str = "") -> str:
    """A policy for people: what it is, what was asked for, and what a usual step makes of it."""
    activations = policy.format_recomputing(chosen.recompute_every)
    if fixed.recompute_every is not None:
        activations += " as asked"
    tokens = "any number of tokens a forward pass"
    if chosen.max_tokens_per_forward:
        tokens = f"at most {chosen.max_tokens_per_forward:,} tokens a forward pass"
    if fixed.max_tokens_per_forward is not None:
        tokens += " as asked"
    gathered = ""
    if chosen.keep_gathered:
        gathered = "; weights stay gathered through a step"
    parts = ""
    if chosen.parts > 1:
        parts = f", {chosen.parts} parts, each run twice"
    usual = f"a usual step has {usual_tokens:,} tokens a process{parts}"
    return f"activations: {activations}; {tokens}{reason}{gathered}; {usual}"


def describe_shortage(situation: policy.Situation, chosen: policy.Policy) -> str:
    """What a step lacks, and what to turn."""
    tokens = min(situation.usual_step, chosen.max_tokens_per_forward or situation.usual_step)
    tokens = max(tokens, situation.longest_text)
    needed = tokens * situation.cost.per_token(chosen.recompute_every) / GIB
    left = max(0.0, situation.activation_bytes(chosen.keep_gathered)) / GIB
    return (
        f"a step may run out of memory: a forward pass of {plural(tokens, 'token')} keeps {needed:.1f} GiB, and "
        f"{left:.1f} GiB are left beside weights, gradients, moments and losses: lower max_tokens_per_forward, "
        "max_seq_length or train_batch_size, share the model out over more GPUs (configs/accelerate_config.yaml), "
        "or set use_lora to true"
    )
