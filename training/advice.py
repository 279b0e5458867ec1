"""What a run says at its start: what is trained, and what a person may not have meant. Nothing here stops it."""

from dataclasses import fields

import torch
from accelerate import Accelerator

from arguments import Args
from data.plan import Plan
from data.token_store import TokenStore, instruction_shares, usual_instruction
from losses import matryoshka_weights
from model import Embedder
from modeling.hub import at_revision
from runtime import engine
from training.activations import device_name
from training.folders import room_lines
from training.models import saved_dtype, trained_share
from training.recipes import Recipe
from training.schedule import Schedule
from utils import plural

# Of F2LLM-v2's query prompt; taken where the data do not say what their queries carry: the published layouts do not.
PUBLISHED_INSTRUCTION = "Given a question, retrieve passages that can help answer the question."
_NAMED = 3  # datasets named in a line; of more, their number is said


def announce(
    args: Args, accelerator: Accelerator, plan: Plan, schedule: Schedule, attention: str, model: Embedder
) -> None:
    """The start-up line: what is trained, for how long, on what."""
    facts = [
        plural(schedule.steps, "step"),
        f"{plan.steps_per_epoch:,} an epoch",
        f"global batch {plan.global_batch}",
        *where(accelerator),
        f"processes: {args.num_processes}",
        f"mixed precision: {accelerator.mixed_precision}",
        f"attention: {attention}",
    ]
    if args.use_lora:
        facts.append(f"LoRA of rank {args.lora_r}: {trained_share(model):.2%} of the weights are trained")
    if args.use_mrl:
        dims = sorted(matryoshka_weights(model.hidden_size))
        facts.append(f"Matryoshka: {', '.join(map(str, dims))} dimensions")
    if args.teacher_embeddings:
        facts.append(f"teacher: its embeddings in {args.teacher_embeddings}")
    if args.teacher_model_path:
        facts.append(f"teacher: {at_revision(args.teacher_model_path, args.teacher_revision)}")
    accelerator.print(f"training {at_revision(args.model_path, args.model_revision)}: {', '.join(facts)}")
    if accelerator.mixed_precision == "no" and engine.gpu_with_bf16():
        accelerator.print(
            "warning: in fp32 on a GPU that has bf16: several times slower, and twice the activations; "
            "accelerate launch --mixed_precision bf16"
        )


def where(accelerator: Accelerator) -> list[str]:
    """On what device the run computes, and by which engine."""
    device = accelerator.device
    facts = [f"device: {device_name(device)}"]
    if device.type == "cpu":
        facts = [f"device: cpu, {plural(torch.get_num_threads(), 'thread')} a process"]
    engine_name = engine.name_of(accelerator)
    return [*facts, f"engine: {engine_name}"] if engine_name else facts


def warn(
    args: Args,
    accelerator: Accelerator,
    plan: Plan,
    schedule: Schedule,
    stores: list[TokenStore],
    recipes: list[Recipe],
    model: Embedder,
) -> None:
    """Print a line about each thing that a person may not have meant."""
    lines = unexpected(args, plan, schedule, stores, recipes)
    for line in [*lines, *large_output(args, accelerator, plan, schedule, model)]:
        accelerator.print(f"warning: {line}")


def unexpected(
    args: Args, plan: Plan, schedule: Schedule, stores: list[TokenStore], recipes: list[Recipe]
) -> list[str]:
    """What may surprise in a configuration that can be trained, one line each."""
    lines = without_effect(args)
    lone = [store.name for store in stores if len(store.tuples) == 1]
    if lone:
        lines.append(f"{_names(lone)}: one tuple alone: nothing is held out for validation")
    small = [store.name for store, size in zip(stores, plan.sizes, strict=True) if 1 < size < plan.global_batch]
    if small:
        lines.append(f"{_names(small)}: fewer tuples than the global batch of {plan.global_batch}: a smaller batch")
    if schedule.warmup and schedule.steps <= schedule.warmup:
        lines.append(
            f"warmup_steps {schedule.warmup:,} is not below the {schedule.steps:,} steps of this run: "
            f"the learning rate never reaches {schedule.peak:g}"
        )
    if args.train_steps > schedule.steps:
        lines.append(
            f"train_steps {args.train_steps:,} is more than train_epochs {args.train_epochs} make: "
            f"the run ends after {schedule.steps:,} steps, as published; raise train_epochs for more"
        )
    cuts = [store.meta["max_seq_length"] for store in stores]
    if all(cuts) and max(cuts) < args.max_seq_length:
        lines.append(
            f"max_seq_length {args.max_seq_length:,}, but tokenising cut the texts at {max(cuts):,}: "
            "the model folder will promise a length that was never trained"
        )
    longest = max(recipe.max_length for recipe in recipes)
    if longest < args.max_seq_length:
        lines.append(
            f"max_seq_length {args.max_seq_length:,}, but the settings of the datasets cut all texts at {longest:,}: "
            "the model folder will promise a length that was never trained"
        )
    doubtful = [recipe.name for recipe in recipes if recipe.in_batch and recipe.task != "retrieval"]
    if doubtful:
        lines.append(
            f"{_names(doubtful)}: the in-batch loss on clustering or classification data, where another query's "
            "positive may answer a query just as well, and counts as wrong"
        )
    return lines


def without_effect(args: Args) -> list[str]:
    """Keys that were given, but that nothing reads without another one, a line for each such other."""
    given = {field.name for field in fields(Args) if getattr(args, field.name) != field.default}
    lines = []
    if "kd_weight" in given and not (args.teacher_model_path or args.teacher_embeddings):
        lines.append(f"kd_weight {args.kd_weight:g}: without a teacher nothing is distilled")
    of_lora = sorted(name for name in given if name.startswith("lora_"))
    if of_lora and not args.use_lora:
        lines.append(f"{', '.join(of_lora)}: all weights are trained, as use_lora is false")
    return lines


def _names(names: list[str]) -> str:
    if len(names) <= _NAMED:
        return ", ".join(names)
    return f"{', '.join(names[:_NAMED])} and {len(names) - _NAMED} more datasets"


def large_output(
    args: Args, accelerator: Accelerator, plan: Plan, schedule: Schedule, model: torch.nn.Module
) -> list[str]:
    """A line about the model folders of this run, where they take much room."""
    size = 0  # bytes of a model folder, but for some megabytes of tokenizer
    for parameter in model.parameters():
        if args.use_lora:
            size += 4 * parameter.numel() * parameter.requires_grad  # an adapter, in fp32
        else:
            size += torch.finfo(saved_dtype(args, accelerator)).bits // 8 * parameter.numel()
    every = args.checkpointing_steps
    return room_lines(size, args.model_folders_limit, every, schedule.steps, plan.steps_per_epoch)


def choose_query_instruction(asked: str | None, stores: list[TokenStore]) -> tuple[str, str]:
    """What the saved folders' query prompt says, and a line about it: a prompt that was never trained finds less.

    Args:
        asked: the key; None leaves it to the data.

    Returns:
        (instruction, "" for none; a line for people)
    """
    usual, share = usual_instruction(stores)
    if asked is None and share == 0:
        return PUBLISHED_INSTRUCTION, f"query prompt: the published one, {PUBLISHED_INSTRUCTION!r}"
    if asked is None and usual is None:
        return "", f"query prompt: none, as {share:.0%} of the retrieval queries carry no instruction"
    if asked is None:
        return usual, f"query prompt: {usual!r}, which {share:.0%} of the retrieval queries carry"
    if share == 0 or asked == (usual or ""):
        return asked, f"query prompt: {asked!r}"
    own_shares = [f"{shares.get(asked, 0.0):.0%} of {name}" for name, shares in instruction_shares(stores).items()]
    listed = ", ".join(own_shares[:_NAMED])
    mostly = repr(usual) if usual else "none"
    return asked, (
        f"warning: query_instruction {asked!r} is carried by {listed} alone; "
        f"most retrieval queries ({share:.0%}) carry {mostly}: null takes what most carry"
    )
