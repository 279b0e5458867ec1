"""Train a text-embedding model from a decoder by contrastive fine-tuning, as F2LLM and F2LLM-v2 did.

python run.py --config configs/config.json                                  one process
accelerate launch --config_file configs/accelerate_config.yaml run.py --config configs/config.json
python run.py --config configs/config.json --cache_only true                only build the data cache
python run.py --help                                                        every key
"""

import math
import os
import sys
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from accelerate.utils import ProjectConfiguration, set_seed
from torch import Tensor
from tqdm import tqdm

import arguments
import cache
import data
import model_folder
from arguments import Args
from data import Batch, Feed, Plan
from losses import distillation_loss, group_ranks, hard_negative_loss, in_batch_loss, matryoshka_weights, over_prefixes
from model import Embedder, FrozenEmbedder, add_lora, check_backbone, check_teacher, is_causal, load_backbone
from token_store import TokenStore
from tokenizer import fitting_tokenizer
from utils import Meter, Metrics, gather, spoken, task_means, train_line, use_all_cores, write_manifest

LOSSES = ("in_batch", "hard", "distillation")
MEASURES = ("in_batch", "hard", "group_accuracy", "group_mrr")


@dataclass
class Run:
    """The live things of one training run."""

    args: Args
    accelerator: Accelerator
    feed: Feed  # the data
    tokenizer: object
    steps: int  # optimizer updates in all
    model: torch.nn.Module  # an Embedder, as accelerate prepared it
    teacher: FrozenEmbedder | None
    optimizer: torch.optim.Optimizer
    weights: dict[int, float]  # embedding prefix -> weight of its losses; one entry without Matryoshka
    metrics: Metrics
    folder: Path


def main(argv: list[str]) -> int:
    """Check everything, then train. Returns the exit status: 0, or 2 for refused input."""
    if {"--help", "-h"} & set(argv):
        print(arguments.help_text())
        return 0
    transformers.utils.logging.disable_progress_bar()  # its bars for loading weights tear the log apart
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)  # peft asks
    args, problems = arguments.parse(argv)
    stores, tokenizer, news = [], None, []
    if args:
        stores, tokenizer, problems, news = inspect(args)
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # one voice a node: each sees its own disks
        if problems:
            print(f"run.py: {len(problems)} problem{'s'[: len(problems) > 1]}, nothing was started", file=sys.stderr)
            print("\n".join(f"  {problem}" for problem in problems), file=sys.stderr)
        else:
            print("\n".join([*news, *data.describe(stores)]), flush=True)
    if problems:
        return 2
    if not args.cache_only:
        train(setup(args, stores, tokenizer))
    return 0


# ------------------------------------------------------------------------- before anything starts


def inspect(args: Args) -> tuple[list[TokenStore], object, list[str], list[str]]:
    """Look at data, model, tokenizer and output folder without loading a weight.

    Returns:
        (stores, tokenizer, problems, news); every problem there is, one line each.
    """
    stores, problems, news = cache.prepare(Path(args.train_data_path), Path(args.cache_dir))
    if args.cache_only:
        return stores, None, problems, news
    folder = Path(args.output_dir) / args.experiment_id
    if folder.exists() and any(folder.iterdir()):
        problems.append(f"{folder}: holds a run already: choose another experiment_id, or move it away")
    unknown = [name for name in args.trackers() if name not in LOGGER_TYPE_TO_CLASS]
    problems += [f"report_to: {name!r} is none of {', '.join(LOGGER_TYPE_TO_CLASS)}, none" for name in unknown]

    largest = max((store.meta["max_token_id"] for store in stores), default=0)
    targets = args.lora_targets() if args.use_lora else []
    config, wrong = check_backbone(args.model_path, largest, args.max_seq_length, args.attn_backend, targets)
    tokenizer, more = fitting_tokenizer(args.model_path, stores) if config else (None, [])
    problems += [f"model_path: {problem}" for problem in wrong + more]
    if args.teacher_model_path and config:
        wrong = check_teacher(args.teacher_model_path, config)
        more = [] if wrong else fitting_tokenizer(args.teacher_model_path, stores)[1]
        problems += [f"teacher_model_path: {problem}" for problem in wrong + more]
    return stores, tokenizer, problems, news


# ------------------------------------------------------------------------------------------ setup


def setup(args: Args, stores: list[TokenStore], tokenizer) -> Run:
    """Start the processes, load the models, and write the run's first files."""
    accelerator = Accelerator(
        log_with=args.trackers() or None, project_config=ProjectConfiguration(logging_dir=args.tb_dir)
    )
    use_all_cores(accelerator.device)
    set_seed(args.seed)
    args.num_processes = accelerator.num_processes
    sizes = tuple(data.split_sizes(len(store.tuples))[0] for store in stores)
    plan = Plan(sizes, args.train_batch_size * accelerator.num_processes, args.seed)
    negatives = [min(args.negatives_for(store.task), store.meta["negatives"]) for store in stores]
    feed = Feed(stores, negatives, plan, args.max_seq_length, accelerator.process_index, accelerator.num_processes)
    steps = args.train_steps if args.train_steps > 0 else args.train_epochs * plan.steps_per_epoch

    backbone = load_backbone(args.model_path, torch.float32)
    if args.use_lora:
        backbone = add_lora(backbone, args.lora_r, args.lora_alpha, args.lora_dropout, args.lora_targets())
    model = Embedder(backbone, args.attn_backend, args.gradient_checkpointing)
    if not is_causal(model, torch.arange(8)):
        raise SystemExit(f"run.py: {args.model_path} is not causal: the state of a token depends on what follows it")
    teacher = None
    if args.teacher_model_path:
        dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
        teacher = FrozenEmbedder(load_backbone(args.teacher_model_path, dtype), args.attn_backend).to(
            accelerator.device
        )
    weights = matryoshka_weights(model.hidden_size) if args.use_mrl else {model.hidden_size: 1.0}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=args.weight_decay, fused=True
    )
    model, optimizer = accelerator.prepare(model, optimizer)

    folder = Path(args.output_dir) / args.experiment_id
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "args.json").write_text(args.to_json())
        write_manifest(folder / "manifest.json", accelerator, {store.name: store.meta["sha256"] for store in stores})
    if args.trackers():
        accelerator.init_trackers(args.experiment_id)
    metrics = Metrics(accelerator, folder / "metrics.jsonl")
    return Run(args, accelerator, feed, tokenizer, steps, model, teacher, optimizer, weights, metrics, folder)


# --------------------------------------------------------------------------------------- training


def learning_rate(step: int, steps: int, args: Args) -> float:
    """Rate of update `step` of `steps`, from 0: linear warm-up, then a cosine to 0 or constant; never below min_lr.

    As Transformers' get_scheduler with the published clamp, but that the very first update has min_lr instead of 0.
    """
    if step < args.warmup_steps:
        rate = args.learning_rate * step / args.warmup_steps
    elif args.scheduler_type == "constant_with_warmup":
        rate = args.learning_rate
    else:
        progress = (step - args.warmup_steps) / max(1, steps - args.warmup_steps)
        rate = args.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
    return max(rate, args.min_lr)


def train(run: Run) -> None:
    """The loop, in the order of time: step, log, validate, save."""
    args, steps, per_epoch = run.args, run.steps, run.feed.plan.steps_per_epoch
    run.accelerator.print(
        f"training {args.model_path}: {steps:,} steps, {per_epoch:,} an epoch, "
        f"global batch {run.feed.plan.global_batch}, processes: {args.num_processes}, "
        f"mixed precision: {run.accelerator.mixed_precision}"
    )
    meter = Meter([store.name for store in run.feed.stores], LOSSES, run.accelerator.device)
    bar = tqdm(total=steps, desc="training", unit="step", disable=None if run.accelerator.is_main_process else True)
    run.model.train()
    for step in range(steps):
        rate, norm = train_step(run, step, meter)
        done, epoch = step + 1, (step + 1) // per_epoch
        last, epoch_ends = done == steps, done % per_epoch == 0
        bar.update()
        if done % args.log_interval == 0 or last:
            log(run, done, rate, norm, meter)
        if args.validation_steps and (done % args.validation_steps == 0 or epoch_ends or last):
            validate(run, done)
        if (args.checkpointing_steps and done % args.checkpointing_steps == 0) or (last and not epoch_ends):
            save(run, f"step_{done}", done)
        if epoch_ends:
            save(run, f"epoch_{epoch}", done)
    bar.close()
    run.metrics.close()


def train_step(run: Run, step: int, meter: Meter) -> tuple[float, Tensor]:
    """One optimizer update. Returns its learning rate and the gradient norm before clipping."""
    args, accelerator = run.args, run.accelerator
    dataset, batch = run.feed.training(step)
    batch = batch.to(accelerator.device)

    embeddings = run.model(batch.tokens, batch.cu_seqlens)  # [texts, d]
    queries, positives, negatives = batch.split(embeddings)  # [b, d], [b, d], [b, n, d]
    terms = {}
    if run.feed.stores[dataset].task == "retrieval":
        candidates = gather(positives if args.gather_with_grad else positives.detach(), batch.counts)  # [B, d]
        terms["in_batch"] = over_prefixes(
            in_batch_loss, run.weights, queries, candidates, targets=batch.targets, temperature=args.temperature
        )
    terms["hard"] = over_prefixes(
        hard_negative_loss, run.weights, queries, positives, negatives, temperature=args.temperature, mask=batch.mask
    )
    # Averaging over W processes, as data parallelism does with gradients, must give the mean over all B tuples.
    terms = {kind: term * batch.rows * len(batch.counts) / sum(batch.counts) for kind, term in terms.items()}
    if run.teacher:
        terms["distillation"] = distillation(run, batch, embeddings)
    loss = sum(terms.values()) + (args.kd_weight - 1) * terms.get("distillation", 0.0) + 0.0 * embeddings.sum()

    accelerator.backward(loss)
    norm = accelerator.clip_grad_norm_(run.model.parameters(), args.max_grad_norm or math.inf)
    rate = learning_rate(step, run.steps, args)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.optimizer.step()
    run.optimizer.zero_grad()

    meter.add(dataset, terms, rows=sum(batch.counts) / len(batch.counts))
    computed = accelerator.unwrap_model(run.model).computed(batch.lengths, accelerator.device)
    meter.count(tuples=batch.rows, tokens=len(batch.tokens), computed=computed)
    return rate, norm


def distillation(run: Run, batch: Batch, embeddings: Tensor) -> Tensor:
    """MSE to the teacher: of queries + of positives + of negatives, each a mean over the global batch, as above."""
    with torch.no_grad(), run.accelerator.autocast():
        taught = run.teacher(batch.tokens, batch.cu_seqlens)  # [texts, D]
    b, everywhere = batch.rows, sum(batch.counts)
    parts = [
        (slice(0, b), everywhere),
        (slice(b, 2 * b), everywhere),
        (slice(2 * b, len(batch.texts)), batch.negatives),
    ]
    return sum(
        distillation_loss(embeddings[part], taught[part]) * (part.stop - part.start) * len(batch.counts) / max(total, 1)
        for part, total in parts
    )


# --------------------------------------------------------------------------- log, validate, save


def log(run: Run, step: int, rate: float, norm: Tensor, meter: Meter) -> None:
    """One line on the console, one in metrics.jsonl, the published tags to the trackers."""
    found, rates = meter.read(run.accelerator.num_processes)
    means = task_means(found, {store.name: store.task for store in run.feed.stores})
    values = {
        "epoch": step / run.feed.plan.steps_per_epoch,
        "lr": rate,
        "grad_norm": float(norm),
        **rates,
        "losses": found,
    }
    tags = {f"{name}/training_loss_{kind}": value for name, kinds in found.items() for kind, value in kinds.items()}
    tags |= {f"Avg/{task}/training_loss_{kind}": value for (task, kind), value in means.items()}
    run.metrics.write(step, "train", values, {"lr": rate, "grad_norm": float(norm)} | tags)
    if run.accelerator.is_main_process:
        tqdm.write(train_line(step, run.steps, means, values))


@torch.no_grad()
def validate(run: Run, step: int) -> None:
    """Losses on the held-out tuples at full width, and how the positive ranks among its own hard negatives."""
    run.model.eval()
    meter = Meter([store.name for store in run.feed.stores], MEASURES, run.accelerator.device)
    for dataset in range(len(run.feed.stores)):
        for batch in run.feed.held_out(dataset):
            measure(run, dataset, batch.to(run.accelerator.device), meter)
    run.model.train()
    found, _ = meter.read(run.accelerator.num_processes)
    means = task_means(found, {store.name: store.task for store in run.feed.stores})
    prefix = {kind: "valid_loss_" if kind in LOSSES else "valid_" for kind in MEASURES}
    tags = {f"{name}/{prefix[kind]}{kind}": value for name, kinds in found.items() for kind, value in kinds.items()}
    tags |= {f"Avg/{task}/{prefix[kind]}{kind}": value for (task, kind), value in means.items()}
    run.metrics.write(step, "validation", {"measures": found}, tags)
    if run.accelerator.is_main_process:
        tqdm.write(f"step {step}/{run.steps} | validation | {spoken(means)}")


def measure(run: Run, dataset: int, batch: Batch, meter: Meter) -> None:
    """Add one held-out batch to the meter."""
    temperature = run.args.temperature
    queries, positives, negatives = batch.split(run.model(batch.tokens, batch.cu_seqlens))
    found = {"hard": hard_negative_loss(queries, positives, negatives, temperature, batch.mask)}
    if run.feed.stores[dataset].task == "retrieval":
        found["in_batch"] = in_batch_loss(queries, gather(positives, batch.counts), batch.targets, temperature)
    meter.add(dataset, found, batch.rows)
    grouped = batch.mask.any(dim=1)  # rows with a negative at all
    ranks = group_ranks(queries, positives, negatives, batch.mask)[grouped].double()
    if len(ranks):
        group = {"group_accuracy": (ranks == 1).double().mean(), "group_mrr": (1 / ranks).mean()}
        meter.add(dataset, group, len(ranks))


def save(run: Run, name: str, step: int) -> None:
    """Write a model folder and read it back: what users will load must be what was trained."""
    args, accelerator, folder = run.args, run.accelerator, run.folder / name
    model = accelerator.unwrap_model(run.model)
    tokens, cu_seqlens = model_folder.probe_batch(run.tokenizer, args.max_seq_length)
    model.eval()
    with torch.no_grad():
        live = model.encode(tokens.to(accelerator.device), cu_seqlens.to(accelerator.device))
    model.train()
    if accelerator.is_main_process:
        automatic = "bfloat16" if accelerator.mixed_precision == "bf16" else "float32"
        dtype = getattr(torch, automatic if args.save_dtype == "auto" else args.save_dtype)
        model_folder.save(folder, model.backbone, run.tokenizer, facts(run, step), dtype)
        # GPU against CPU rounds fp32 differently through 28 layers; a wrong folder is off by 0.1 and more.
        tolerance = 1e-3 if dtype == torch.float32 else 0.1
        if problems := model_folder.probe(folder, tokens, cu_seqlens, live, tolerance):
            raise RuntimeError("\n".join(problems))
        tqdm.write(f"step {step}/{run.steps} | saved {folder}, read back and compared")
    accelerator.wait_for_everyone()


def facts(run: Run, step: int) -> model_folder.Facts:
    """What a model folder says about its training."""
    args = run.args
    keys = ("learning_rate", "temperature", "num_hard_neg", "seed", "use_mrl", "use_lora", "teacher_model_path")
    return model_folder.Facts(
        hidden_size=max(run.weights),
        max_seq_length=args.max_seq_length,
        query_instruction=args.query_instruction,
        base_model=args.model_path,
        matryoshka_dims=sorted(run.weights) if args.use_mrl else [],
        training={"steps": step, "global_batch": run.feed.plan.global_batch} | {key: asdict(args)[key] for key in keys},
        datasets={store.name: size for store, size in zip(run.feed.stores, run.feed.plan.sizes, strict=True)},
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
