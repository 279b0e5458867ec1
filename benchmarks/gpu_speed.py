"""Part 2 of benchmarks.gpu: one training step, ours beside the published layout and Sentence Transformers' cached loss.

All step in turn on the same tuples with the same weights, so that a slow minute of the machine slows all. What ours
recomputes, and in how many parts it runs, is what training would choose for this device. Sentence Transformers' loss is
another (all documents of the batch are negatives of each query); it takes as many texts at once as fit.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module

import numpy as np
import torch

from benchmarks.common import Budget, in_parts
from benchmarks.gpu_model import (
    TOY,
    StepPlan,
    autocast,
    build,
    config_of,
    free_memory,
    plan_step,
    settle_backend,
    step_flops,
)
from benchmarks.gpu_profile import count_waits, shares_of_time
from benchmarks.gpu_trainee import Step, Trainee, Variant, Work, work_of
from benchmarks.lengths import SHAPES, padding_ratio, tuples
from model import Embedder
from training import kernels, memory
from utils import first_line

PUBLISHED = "published layout"
OURS = "ours"
COMPILED = "ours, compiled"
CACHED = "Sentence Transformers, cached"
TEXTS_AT_ONCE = 32  # of a forward pass of the cached loss, its default
TABLE_SECONDS = {TOY: 1, "0.6B": 15}  # that a table takes at least; a guess
OTHER_TABLE_SECONDS = 45


@dataclass(frozen=True)
class Settings:
    """What is measured of each model."""

    tuples: int  # of a step
    steps: int  # of each variant that are counted
    compiler: str  # of torch.compile; "none" = no compiled layers
    shapes: tuple[str, ...] = tuple(SHAPES)  # distributions of lengths
    liger: bool = False  # Liger's kernels in all variants


def measure_speed(
    size: str, lora: bool, device: torch.device, settings: Settings, budget: Budget, say: Callable[[str], None]
) -> Iterator[dict]:
    """A table for each distribution of lengths, of one size, trained whole or by LoRA.

    Args:
        budget: shared evenly by the tables; what does not fit into it is noted there.
        say: called with a line about what is done now.

    Yields:
        {"size", "kind", "lengths", "tuples", "tokens", "padding_ratio", "flops": that the real tokens of a step need,
        "recompute_every", "token_limit", "expected_peak_bytes": of ours, "ways": rows}, a row being what `describe_way`
        gives, or {"way", "left_out": why}.

    Raises:
        torch.OutOfMemoryError: weights, gradients and moments alone do not fit.
        RuntimeError: the model cannot be run as asked.
    """
    gc.collect()  # the model before refers to itself
    free_memory(device)
    config = config_of(size)
    model = build(config, lora, device)
    settle_backend(model, device)
    backend = model.backend
    if settings.liger:
        use_liger(model, device)
    trainee = Trainee(model, device)
    with autocast(device):
        cost = memory.cost_of(model)
    free = memory.free_bytes(device, 1)
    missing = missing_ways(trainee, settings.compiler)
    trainee.make_moments()
    for number, shape in enumerate(settings.shapes):
        lengths = tuples(shape, settings.tuples)  # [tuples, 9]
        plan = plan_step(model, cost, free, lengths, device)
        table = new_table(size, lora, shape, lengths, plan)
        if not budget.allows(name_of(table), TABLE_SECONDS.get(size, OTHER_TABLE_SECONDS)):
            continue
        say(name_of(table))
        work = work_of(shape, settings.tuples, config.vocab_size, device)
        variants = [variant for variant in variants_of(backend, plan) if variant.name not in missing]
        share = budget.part(budget.seconds_left() / (len(settings.shapes) - number))
        table["ways"] = measure_variants(trainee, work, variants, settings.steps, share)
        table["ways"] += [{"way": name, "left_out": reason} for name, reason in missing.items()]
        yield table


def new_table(size: str, lora: bool, shape: str, lengths: np.ndarray, plan: StepPlan) -> dict:
    """What a table is about: its step, and how training would run it.

    Args:
        lengths: tokens of each text, [tuples, texts of a tuple].
    """
    return {
        "size": size,
        "kind": "LoRA" if lora else "full",
        "lengths": shape,
        "tuples": len(lengths),
        "tokens": int(lengths.sum()),
        "padding_ratio": float(padding_ratio(lengths)),
        "flops": step_flops(config_of(size), lengths, lora),
        "recompute_every": plan.recompute_every,
        "token_limit": plan.max_tokens_per_forward,
        "expected_peak_bytes": plan.expected_bytes,
    }


def use_liger(model: Embedder, device: torch.device) -> None:
    """Liger's kernels in all variants. Raises RuntimeError if they cannot be."""
    with autocast(device):
        problems = kernels.use_liger(model)
    if problems:
        raise RuntimeError(problems[0])


def name_of(table: dict) -> str:
    """What a table is about, for people."""
    return f"speed of {table['size']}, {table['kind']}, {table['lengths']}"


def missing_ways(trainee: Trainee, compiler: str) -> dict[str, str]:
    """Way -> why it cannot be measured here. Compiles the layers where they can be."""
    missing = {}
    if compiler == "none":
        missing[COMPILED] = "--compile none"
    else:
        problems = trainee.compile_layers(compiler)
        if problems:
            missing[COMPILED] = "; ".join(problems)
    reason = why_not_sentence_transformers()
    if reason:
        missing[CACHED] = reason
    return missing


def why_not_sentence_transformers() -> str:
    """Why its loss cannot be measured here; "" if it can."""
    try:
        import_module("sentence_transformers")
    except Exception as error:  # installed, it may still want another package
        return f"sentence-transformers cannot be imported: {type(error).__name__}: {first_line(error)}"
    return ""


def variants_of(best: str, plan: StepPlan) -> list[Variant]:
    """The rows of a table.

    Args:
        best: the backend that training would choose.
        plan: what it would recompute, and in which parts.
    """
    every, most = plan.recompute_every, plan.max_tokens_per_forward
    return [
        Variant(PUBLISHED, "padded", recompute_every=1),
        Variant(OURS, best, every, most),
        Variant(COMPILED, best, every, most, compiled=True),
        Variant(CACHED, "padded", texts_at_once=TEXTS_AT_ONCE),
    ]


def measure_variants(trainee: Trainee, work: Work, variants: list[Variant], count: int, budget: Budget) -> list[dict]:
    """A row for each variant: steps in turn, then one whose waits are counted, and one under the profiler."""
    fitting = {}
    for variant in variants:
        fitting[variant] = largest_that_fits(trainee, work, variant)  # it also warms up
    running = [variant for variant in fitting.values() if variant is not None]
    steps = take_turns(trainee, work, running, count, budget)
    rows = []
    for variant, found in fitting.items():
        if found not in steps:
            rows.append({"way": variant.name, "left_out": "out of memory"})
        elif not steps[found]:
            rows.append({"way": variant.name, "left_out": "no time was left"})
        else:
            rows.append(describe_way(trainee, work, found, steps[found]))
    return rows


def largest_that_fits(trainee: Trainee, work: Work, variant: Variant) -> Variant | None:
    """The variant, of the cached loss with half as many texts at once until they fit; None if nothing does."""
    if trainee.try_step(work, variant) is not None:
        return variant
    if variant.texts_at_once <= 1:
        return None
    return largest_that_fits(trainee, work, replace(variant, texts_at_once=variant.texts_at_once // 2))


def take_turns(
    trainee: Trainee, work: Work, variants: list[Variant], count: int, budget: Budget
) -> dict[Variant, list[Step]]:
    """`count` steps of each variant, all in turn, after one more that warms up; fewer where the time is over.

    A variant that runs out of memory is missing.
    """
    steps = {variant: [] for variant in variants}
    for round_number in range(1 + count):
        began = time.monotonic()
        for variant in list(steps):
            measured = trainee.try_step(work, variant)
            if measured is None:
                del steps[variant]
            elif round_number:
                steps[variant].append(measured)
        if budget.seconds_left() < time.monotonic() - began:
            break
    return steps


def describe_way(trainee: Trainee, work: Work, variant: Variant, steps: list[Step]) -> dict:
    """What was measured of a variant: median seconds, highest peak, first loss, waits and shares of time.

    Rates are in the table's tuples and real tokens a second; FLOP/s are those that the real tokens need.
    """
    name = variant.name
    if variant.texts_at_once:
        name += f", {variant.texts_at_once} at a time"
    update = partial(trainee.update, work, variant)
    waits = count_waits(update, trainee.device)
    return {
        "way": name,
        "steps": len(steps),
        "seconds": statistics.median_high(step.seconds for step in steps),
        "peak_bytes": max(step.peak_bytes for step in steps),
        "loss": steps[0].loss,
        "parts": in_parts(work.batch, variant.max_tokens_per_forward).parts,
        "waits": sum(waits.values()),
        "waits_at": waits,
        "shares": shares_of_time(update, trainee.device),
    }
