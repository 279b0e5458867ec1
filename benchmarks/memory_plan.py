"""What training would choose on common cards: for each size of Qwen3 and engine, what is kept and what a step runs in.

    python -m benchmarks.memory_plan > docs/memory-plan.md          without a GPU and without weights
    python -m benchmarks.memory_plan --tuples 512                   for another train_batch_size

The policy is the one that a run takes (training/policy.py), given what `benchmarks.memory` counts of each size. A step
has 32 tuples of nine texts of 165 tokens on each GPU, as the published configurations and data come to.
"""

from dataclasses import dataclass
from functools import cache

from benchmarks.common import QWEN3, qwen3_config
from benchmarks.memory import GIB, state_bytes, token_cost, weights_of_config, with_adapters
from configuration.flag_parser import FlagParser
from configuration.flag_types import number_of
from losses import matryoshka_weights
from training.loss_memory import LossShape, loss_bytes
from training.memory import Layout, Weights, weight_bytes
from training.policy import Policy, Situation, choose_policy
from training.step_time import DEVICES, Device, work_of

TUPLES = 32  # on each GPU: train_batch_size
NEGATIVES = 7
TEXT = 165  # tokens of a usual text
LONGEST = 1024  # tokens
TAKEN = 1.5 * GIB  # by CUDA and NCCL, before anything is trained


@dataclass(frozen=True)
class Card:
    """A kind of GPU."""

    name: str
    gib: int
    device: Device


CARDS = (
    Card("24 GB, as RTX 4090", 24, DEVICES["4090"]),
    Card("40 GB, as A100", 40, DEVICES["A100"]),
    Card("80 GB, as H100", 80, DEVICES["H100"]),
    Card("141 GB, as H200", 141, DEVICES["H200"]),
)
ENGINES = {"one GPU": Layout(1, 1), "DDP, 8 GPUs": Layout(8, 1), "FSDP2, 8 GPUs": Layout(8, 8)}
INTRODUCTION = """\
# What fits on which card

What a run would choose by itself, worked out without a GPU: memory by the counts of `benchmarks/memory.py`, time by the
model of `training/step_time.py`. No GPU has measured it yet. A usual step has {tuples} tuples of {texts} texts
of {text} tokens on each GPU, {tokens:,} tokens; LoRA is that of `configs/config_lora.json`.

- **states**: GiB of weights, gradients and AdamW's moments, and of what stands beside them at the peak of a pass.
- **free**: GiB left for activations, after the losses and a reserve.
- **recomputed**: of how many layers the activations are computed again in the backward pass.
- **gathered**: under FSDP2, whether the gathered weights stay whole through a step.
- **parts**: of a usual step; more than one run forward twice.
- **tokens**: of a forward pass, at most.

What does not fit needs more GPUs under FSDP2, or LoRA. The published 512 tuples on one GPU are a step in parts: 0.6B on
one H100 runs them in four. `python -m benchmarks.memory_plan --tuples 512` shows all of them.

This page is made by `python -m benchmarks.memory_plan > docs/memory-plan.md`."""
TITLES = ("model", "engine", "states", "free", "recomputed", "gathered", "parts", "tokens")


def main(argv: list[str] | None = None) -> None:
    """Print the page."""
    parser = FlagParser(__doc__, prog="python -m benchmarks.memory_plan")
    words = "of a step on each GPU, the train_batch_size (default %(default)s)"
    parser.add_argument("--tuples", type=number_of("tuples"), default=TUPLES, help=words)
    print(page(parser.parse_args(argv).tuples))


def page(tuples: int = TUPLES) -> str:
    """The introduction, and a table for each card, without a newline at the end.

    Args:
        tuples: of a step on each GPU.
    """
    texts = 2 + NEGATIVES
    sections = [INTRODUCTION.format(tuples=tuples, texts=texts, text=TEXT, tokens=tuples * texts * TEXT)]
    for card in CARDS:
        lines = [f"| {' | '.join(TITLES)} |", f"|{'---|' * len(TITLES)}"]
        for size in QWEN3:
            for lora in (False, True):
                lines += [f"| {' | '.join(row(card, size, engine, lora, tuples))} |" for engine in ENGINES]
        sections += [f"## {card.name}", "\n".join(lines)]
    return "\n\n".join(sections)


def row(card: Card, size: str, engine: str, lora: bool, tuples: int = TUPLES) -> list[str]:
    """The cells of one model under one engine on one card."""
    found = situation(card, size, engine, lora, tuples)
    policy = choose_policy(found)
    name = f"{size}, LoRA" if lora else size
    states = state_bytes(found.weights, found.layout)
    free = found.activation_bytes(policy.keep_gathered)
    cells = [name, engine, f"{states / GIB:.1f}"]
    if not policy.fits:
        return [*cells, "does not fit", "", "", "", ""]
    return [*cells, f"{free / GIB:.1f}", *describe(policy, found)]


def describe(policy: Policy, found: Situation) -> list[str]:
    """What is recomputed, whether weights stay gathered, parts, tokens."""
    recomputed = found.cost.recomputed_layers(policy.recompute_every)
    gathered = ""
    if found.layout.sharded:
        gathered = "yes" if policy.keep_gathered else "no"
    return [f"{recomputed} of {found.cost.layers}", gathered, str(policy.parts), f"{policy.max_tokens_per_forward:,}"]


def situation(card: Card, size: str, engine: str, lora: bool, tuples: int = TUPLES) -> Situation:
    """What a run would find on such a card."""
    config = qwen3_config(size)
    weights = weights_of_size(size)
    if lora:
        weights = with_adapters(weights, config)
    layout = ENGINES[engine]
    shape = LossShape(
        tuples=tuples,
        global_batch=tuples * layout.processes,
        negatives=NEGATIVES,
        width=config.hidden_size,
        prefixes=tuple(matryoshka_weights(config.hidden_size)),
    )
    attention_width = config.num_attention_heads * config.head_dim
    return Situation(
        cost=token_cost(config),
        weights=weights,
        work=work_of(weights, config.num_hidden_layers, config.hidden_size, attention_width, TEXT),
        layout=layout,
        device=card.device,
        free=card.gib * GIB - TAKEN - weight_bytes(weights, layout),
        losses=loss_bytes(shape),
        usual_step=tuples * (2 + NEGATIVES) * TEXT,
        longest_text=LONGEST,
    )


@cache
def weights_of_size(size: str) -> Weights:
    """The numbers of weights of a published size."""
    return weights_of_config(qwen3_config(size))


if __name__ == "__main__":
    main()
