"""A training run, put together: data, models, optimizer, objective, and where an earlier one stopped.

Between the door, which has checked everything, and the loop. As the doors do, it takes the configuration.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from arguments import Args
from data.feed import Feed, Prefetcher
from data.plan import Plan, split_sizes
from data.token_store import TokenStore
from losses import matryoshka_weights
from model import Embedder, FrozenEmbedder, backend_candidates, choose_backend, explain_backend
from modeling.backbone import add_lora, attention_window, load_backbone
from runtime import engine, resume
from runtime.engine import use_all_cores
from runtime.resume import lock_folder
from training import kernels, memory
from training.objective import LOSSES, Objective
from training.preflight import run_identity
from training.records import Meter, Metrics, write_manifest
from training.schedule import Schedule
from utils import RunError, all_rows


@dataclass
class Run:
    """The live things of one training run."""

    args: Args
    accelerator: Accelerator
    feed: Feed  # the data
    ahead: Prefetcher  # its training batches, made one step ahead
    tokenizer: object
    schedule: Schedule
    model: torch.nn.Module  # an Embedder, as accelerate prepared it
    teacher: FrozenEmbedder | None
    optimizer: torch.optim.Optimizer
    objective: Objective
    metrics: Metrics
    folder: Path
    lock: object  # on the folder, held by the main process
    identity: dict  # what a resume must find unchanged
    resumable: bool
    meter: Meter
    steps_done: int = 0  # updates done by earlier runs of this one
    skipped: int = 0  # updates left out in a row


def setup(args: Args, accelerator: Accelerator, stores: list[TokenStore], tokenizer) -> Run:
    """Load the models, lay out the data, and write the run's first files."""
    use_all_cores(accelerator.device)
    if args.num_processes not in (0, accelerator.num_processes):
        accelerator.print(f"num_processes {args.num_processes} is only a record: `accelerate launch` starts processes")
    args.num_processes = accelerator.num_processes
    sizes = tuple(split_sizes(len(store.tuples))[0] for store in stores)
    plan = Plan(sizes, args.train_batch_size * accelerator.num_processes, args.seed)
    steps = args.train_steps if args.train_steps > 0 else args.train_epochs * plan.steps_per_epoch
    schedule = Schedule(
        args.learning_rate, args.min_lr, args.warmup_steps, steps, args.scheduler_type == "constant_with_warmup"
    )
    model, teacher, backend = load_models(args, accelerator)
    prefixes = matryoshka_weights(model.hidden_size) if args.use_mrl else {model.hidden_size: 1.0}
    objective = Objective(args.temperature, prefixes, args.gather_with_grad, args.kd_weight, args.mask_same_text)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=args.weight_decay, fused=True
    )
    accelerator.print(
        f"training {args.model_path}: {steps:,} step{'s'[: steps > 1]}, {plan.steps_per_epoch:,} an epoch, "
        f"global batch {plan.global_batch}, processes: {args.num_processes}, "
        f"mixed precision: {accelerator.mixed_precision}, attention: {backend}"
    )
    folder = Path(args.output_dir) / args.experiment_id
    identity = run_identity(args, schedule, plan, stores, tokenizer, model)
    passing = engine.is_deepspeed(accelerator)
    check_deepspeed(accelerator, folder, bool(args.max_tokens_per_forward))
    accelerator.wait_for_everyone()  # all have looked before anything is written
    lock = lock_folder(folder) if accelerator.is_main_process else None
    steps_done, facts, tensors = resume.find(accelerator, args.resume, folder / "state", identity)
    if accelerator.is_main_process and not facts:
        (folder / "args.json").write_text(args.to_json())
        write_manifest(folder / "manifest.json", accelerator, {store.name: store.meta["sha256"] for store in stores})
    cost = count_cost(args, accelerator, model)
    model, optimizer = engine.prepare(accelerator, model, optimizer, args.train_batch_size, args.max_grad_norm)
    negatives = [min(args.negatives_for(store.task), store.meta["negatives"]) for store in stores]
    usual = memory.usual_tokens(stores, negatives, args.train_batch_size, args.max_seq_length)
    limit = choose_activation_policy(
        args, accelerator, model, cost, usual, 0 if passing else args.max_tokens_per_forward
    )
    place = (accelerator.process_index, accelerator.num_processes)
    feed = Feed(stores, negatives, plan, args.max_seq_length, *place, limit)
    meter = Meter([store.name for store in stores], LOSSES, accelerator.device)
    if facts:
        meter.load(resume.restore(accelerator, model, optimizer, tensors).to(accelerator.device))
        accelerator.print(f"going on after step {steps_done} of {steps}")
    if args.trackers():
        purge = (
            {"tensorboard": {"purge_step": steps_done + 1}} if steps_done and "tensorboard" in args.trackers() else {}
        )
        accelerator.init_trackers(args.experiment_id, init_kwargs=purge)  # no second curve over the first
    metrics = Metrics(accelerator, folder, facts.get("sizes", {}))
    return Run(
        args=args, accelerator=accelerator, feed=feed, ahead=Prefetcher(feed, pin=accelerator.device.type == "cuda"),
        tokenizer=tokenizer, schedule=schedule, model=model, teacher=teacher, optimizer=optimizer, objective=objective,
        metrics=metrics, folder=folder, lock=lock, identity=identity, resumable=not passing, meter=meter, steps_done=steps_done,
        skipped=facts.get("skipped", 0),
    )  # fmt: skip


def check_deepspeed(accelerator: Accelerator, folder: Path, parts: bool) -> None:
    """Refuse what does not go with DeepSpeed, which keeps weights and moments in a way of its own.

    Raises:
        RunError: the step shall run in parts, or the folder holds a run.
    """
    if not engine.is_deepspeed(accelerator):
        return
    if parts:
        raise RunError("max_tokens_per_forward: not under DeepSpeed; take configs/accelerate_config.yaml")
    if (folder / "args.json").exists():
        raise RunError(f"{folder}: holds a run already, and DeepSpeed's do not resume: choose another experiment_id")
    accelerator.print("DeepSpeed: an interrupted run cannot go on; configs/accelerate_config.yaml can")


def load_models(args: Args, accelerator: Accelerator) -> tuple[Embedder, FrozenEmbedder | None, str]:
    """The model on its device, tried out; its teacher; and for people, how and why attention is computed."""
    set_seed(args.seed)  # the same adapters on every process
    try:
        backbone = load_backbone(args.model_path, torch.float32)
    except ValueError as error:
        raise RunError(f"model_path: {error}") from None
    if args.use_lora:
        backbone = add_lora(backbone, args.lora_r, args.lora_alpha, args.lora_dropout, args.lora_targets())
    sharded, on_cpu = engine.is_sharded(accelerator), accelerator.device.type == "cpu"
    windowed = attention_window(backbone.config) is not None
    half = accelerator.mixed_precision in ("bf16", "fp16")
    candidates = backend_candidates(args.attn_backend, on_cpu, windowed, sharded, half)
    model = Embedder(backbone.to(accelerator.device), candidates[0])
    with accelerator.autocast():
        problems = choose_backend(model, candidates)
        if sharded and model.backend == "buckets":
            problems = ["attn_backend buckets: processes would call a sharded model unequally often; set it to auto"]
        if args.gradient_checkpointing and not model.can_recompute:
            problems += ["gradient_checkpointing: this decoder cannot recompute its layers: set it to false"]
        if args.liger and not problems:
            problems = kernels.use_liger(model)
        if args.compile and not problems:
            problems = kernels.compile_layers(model)
    if problems:
        raise RunError("\n".join(f"{args.model_path}: {problem}" for problem in problems))
    teacher = None
    if args.teacher_model_path:
        dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
        teacher = FrozenEmbedder(load_backbone(args.teacher_model_path, dtype).to(accelerator.device))
        with accelerator.autocast():
            choose_backend(teacher, candidates)
        engine.shard_frozen(accelerator, teacher, teacher._no_split_modules)
    attended = f"{model.backend} ({explain_backend(model.backend, args.attn_backend, on_cpu, windowed, half)})"
    return model, teacher, attended + ", compiled" * args.compile + ", Liger's kernels" * args.liger


def count_cost(args: Args, accelerator: Accelerator, model: Embedder) -> memory.Cost | None:
    """What a token costs, where something is to be chosen from it. Before the engine takes the model: after that a
    forward pass may be a collective."""
    if args.gradient_checkpointing is not None and args.max_tokens_per_forward is not None:
        return None
    with accelerator.autocast():
        return memory.cost_of(model)


def choose_activation_policy(
    args: Args,
    accelerator: Accelerator,
    model: torch.nn.Module,
    cost: memory.Cost | None,
    usual: int,
    limit: int | None,
) -> int:
    """Set what is recomputed, the same on all processes; the tokens of a forward pass at most, 0 = any number.

    Args:
        model: as the engine holds it.
        usual: tokens of a process's part of a usual step.
        limit: what is fixed already.
    """
    embedder = accelerator.unwrap_model(model)
    every = None if args.gradient_checkpointing is None else int(args.gradient_checkpointing)
    policy = memory.Policy(every or 0, limit or 0)
    given = [" as asked" if value is not None else "" for value in (every, limit)]
    why = ""
    if cost:
        free = memory.free_bytes(accelerator.device, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        free = memory.for_activations(free, model, embedder.layers(), engine.is_sharded(accelerator))
        least = all_rows(torch.tensor([free], device=accelerator.device), accelerator.num_processes).min().item()
        policy = memory.choose(cost, least, usual, args.max_seq_length, every, limit)
        why = f"; {least / 2**30:.1f} GiB for them, a token takes {cost.per_token(policy.every) / 2**10:,.0f} KiB"
    most = f"at most {policy.limit:,} tokens" if policy.limit else "any number of tokens"
    parts = -(-usual // policy.limit) if policy.limit else 1
    accelerator.print(
        f"activations: {memory.format_policy(policy.every)}{given[0]}; {most} a forward pass{given[1]}{why}; a usual step has "
        f"{usual:,} tokens a process" + (f", {parts} parts, each run twice" if parts > 1 else "")
    )
    embedder.recompute(policy.every)
    return policy.limit
