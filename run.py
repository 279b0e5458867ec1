"""Train a text-embedding model from a decoder by contrastive fine-tuning, as F2LLM and F2LLM-v2 did.

python run.py --config configs/config.json                                  one process
accelerate launch --config_file configs/accelerate_config.yaml run.py --config configs/config.json
python run.py --config configs/config.json --cache_only true                only build the data cache
python run.py --help                                                        every key
"""

import math
import os
import sys
import time
import warnings
from dataclasses import asdict
from functools import partial

import torch
import transformers
from torch import Tensor
from tqdm import tqdm

import arguments
from data.batch import Batch
from data.feed import describe
from export import model_folder
from runtime import checkpoint, engine, processes, resume
from training import two_pass
from training.objective import LOSSES, MEASURES
from training.preflight import find_problems
from training.records import Meter, format_means, format_train_line, task_means
from training.setup import Run, setup
from utils import RunError


def main(argv: list[str]) -> int:
    """Check everything, then train.

    Returns:
        The exit status: 0; 2 for refused input; 75 for a run told to stop; 1 for one that could not go on.
    """
    if {"--help", "-h"} & set(argv):
        print(arguments.help_text())
        return 0
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)  # a log file is read while the run goes on
    transformers.utils.logging.disable_progress_bar()  # its bars for loading weights tear the log apart
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)  # peft asks
    try:
        return check_and_train(argv)
    except Exception as error:
        if not (line := processes.user_message(error)):
            raise
        print(line, file=sys.stderr)
        return processes.FAILED


def check_and_train(argv: list[str]) -> int:
    """Everything that can stand against the run, all of it at once; then the run. Returns the exit status."""
    speaks = int(os.environ.get("LOCAL_RANK", 0)) == 0  # one voice a node: each sees its own disks
    args, problems, unknown = arguments.parse(argv)
    stores, tokenizer, problems = find_problems(args, problems, unknown)
    if problems:
        if speaks:
            print(f"run.py: {len(problems)} problem{'s'[: len(problems) > 1]}, nothing was started", file=sys.stderr)
            print("\n".join(f"  {problem}" for problem in problems), file=sys.stderr)
        return 2
    if speaks:
        print("\n".join(describe(stores)), flush=True)
    if not args.cache_only:
        with processes.process_group(args.trackers(), args.tb_dir, args.process_timeout) as accelerator:
            return train(setup(args, accelerator, stores, tokenizer))
    return 0


# --------------------------------------------------------------------------------------- training


def train(run: Run) -> int:
    """The loop, in the order of time: step, log, validate, save. Returns the exit status: 0; 75 when told to stop."""
    args, steps, per_epoch = run.args, run.schedule.steps, run.feed.plan.steps_per_epoch
    if run.steps_done >= steps:
        run.accelerator.print(f"{run.folder}: this run is finished: {steps:,} steps were trained")
    hidden, asked, saved = None if run.accelerator.is_main_process else True, processes.StopSignal(), time.monotonic()
    bar = tqdm(total=steps, initial=run.steps_done, desc="training", unit="step", disable=hidden)
    run.model.train()
    for step in range(run.steps_done + 1, steps + 1):
        rate, norm = train_step(run, step)
        done, epoch = step, step // per_epoch
        last, epoch_ends = done == steps, done % per_epoch == 0
        bar.update()
        if done % args.log_interval == 0 or last:
            log(run, done, rate, norm)
        with run.meter.paused():
            if args.validation_steps and (done % args.validation_steps == 0 or epoch_ends or last):
                validate(run, done)
            due = bool(args.checkpointing_steps) and done % args.checkpointing_steps == 0
            if due or (last and not epoch_ends):
                save(run, f"step_{done}", done)
            if epoch_ends:
                save(run, f"epoch_{epoch}", done)
            late = args.save_every_minutes and time.monotonic() - saved > 60 * args.save_every_minutes
            stop, late = processes.on_any_process(run.accelerator, [asked.stop, late])
            if due or last or epoch_ends or stop or late:
                save_state(run, done)
                saved = time.monotonic()
        if stop and not last:
            break
    bar.close()
    run.metrics.close()
    asked.forget()
    return processes.STOPPED if asked.stop or (run.steps_done < steps and done < steps) else 0


def train_step(run: Run, step: int) -> tuple[float, float]:
    """One optimizer update. Returns its learning rate and the gradient norm before clipping."""
    args, accelerator = run.args, run.accelerator
    rate = run.schedule.rate(step)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    dataset, batch = run.ahead.training(step)
    batch = batch.to(accelerator.device)
    taught = teacher_embeddings(run, batch)  # [u, D] or None

    def loss_of(embeddings: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        terms = run.objective.terms(batch, embeddings, run.feed.stores[dataset].task == "retrieval", taught)
        return run.objective.total(terms, embeddings), terms

    seed = run.feed.plan.dropout_seed(step, accelerator.process_index)
    terms = two_pass.backward(accelerator, run.model, batch, seed, loss_of)
    norm = float(accelerator.clip_grad_norm_(run.model.parameters(), args.max_grad_norm or math.inf))
    if math.isfinite(norm):  # the norm is that of all processes' gradients together: they agree
        run.optimizer.step()
        run.meter.add(dataset, terms, sum(batch.counts) / len(batch.counts))  # their mean over processes is the loss
    run.optimizer.zero_grad()
    skip_or_stop(run, step, norm)

    embedder = accelerator.unwrap_model(run.model)
    computed = sum(embedder.computed(batch.part(number)[2]) for number in range(batch.parts))
    run.meter.count(tuples=batch.rows, tokens=len(batch.tokens), computed=computed, heaviest=batch.heaviest)
    return rate, norm


def skip_or_stop(run: Run, step: int, norm: float) -> None:
    """Say that an update was left out for its gradient, and end the run when too many in a row were.

    Raises:
        RunError: on every process.
    """
    run.skipped = 0 if math.isfinite(norm) else run.skipped + 1
    if not run.skipped:
        return
    what = f"step {step}: the gradient is {norm}: {run.feed.sources(step)}"
    if run.skipped > run.args.max_skipped_steps:
        raise RunError(f"{what}; {run.skipped} updates in a row. A lower learning_rate may help.")
    tqdm.write(f"{what}; this update is left out", file=sys.stderr) if run.accelerator.is_main_process else None


@torch.no_grad()
def teacher_embeddings(run: Run, batch: Batch) -> Tensor | None:
    """The teacher's embeddings of a batch's distinct texts, [u, D], where there is a teacher."""
    if run.teacher is None:
        return None
    with run.accelerator.autocast():
        return two_pass.embed(run.teacher, batch)


# --------------------------------------------------------------------------- log, validate, save


def log(run: Run, step: int, rate: float, norm: float) -> None:
    """One line on the console, one in metrics.jsonl, the published tags to the trackers."""
    found, shares, timings = run.meter.read(run.accelerator.num_processes)
    means = task_means(found, {store.name: store.task for store in run.feed.stores})
    norm = norm if math.isfinite(norm) else None  # JSON has no NaN
    values = {"epoch": step / run.feed.plan.steps_per_epoch, "lr": rate, "grad_norm": norm, **shares, "losses": found}
    tags = {f"{name}/training_loss_{kind}": value for name, kinds in found.items() for kind, value in kinds.items()}
    tags |= {f"Avg/{task}/training_loss_{kind}": value for (task, kind), value in means.items()}
    run.metrics.write(step, "train", values, {"lr": rate, "grad_norm": norm or math.nan} | tags, timings)
    if run.accelerator.is_main_process:
        tqdm.write(format_train_line(step, run.schedule.steps, means, values | timings))


@torch.no_grad()
def validate(run: Run, step: int) -> None:
    """Losses on the held-out tuples at full width, and how the positive ranks among its own hard negatives."""
    run.model.eval()
    meter = Meter([store.name for store in run.feed.stores], MEASURES, run.accelerator.device)
    for dataset in range(len(run.feed.stores)):
        for batch in run.feed.held_out(dataset):
            batch = batch.to(run.accelerator.device)
            embeddings = two_pass.embed(run.model, batch)
            retrieval = run.feed.stores[dataset].task == "retrieval"
            for kind, (value, rows) in run.objective.measures(batch, embeddings, retrieval).items():
                meter.add(dataset, {kind: value}, rows)
    run.model.train()
    found, _, _ = meter.read(run.accelerator.num_processes)
    means = task_means(found, {store.name: store.task for store in run.feed.stores})
    prefix = {kind: "valid_loss_" if kind in LOSSES else "valid_" for kind in MEASURES}
    tags = {f"{name}/{prefix[kind]}{kind}": value for name, kinds in found.items() for kind, value in kinds.items()}
    tags |= {f"Avg/{task}/{prefix[kind]}{kind}": value for (task, kind), value in means.items()}
    run.metrics.write(step, "validation", {"measures": found}, tags)
    if run.accelerator.is_main_process and found:
        tqdm.write(f"step {step}/{run.schedule.steps} | validation | {format_means(means)}")


def save(run: Run, name: str, step: int) -> None:
    """Write a model folder and read it back: what users will load must be what was trained."""
    args, accelerator, folder = run.args, run.accelerator, run.folder / name
    tokens, cu_seqlens = model_folder.probe_batch(run.tokenizer, args.max_seq_length)
    run.model.eval()
    with torch.no_grad():  # as training runs it: wrapped, in its precision, on every process
        on_device = (tokens.to(accelerator.device), cu_seqlens.to(accelerator.device))
        live = run.model(*on_device, cu_seqlens.diff().numpy())
    run.model.train()
    weights = engine.whole_weights(accelerator, run.model)
    if accelerator.is_main_process:
        automatic = "bfloat16" if accelerator.mixed_precision == "bf16" else "float32"
        dtype = getattr(torch, automatic if args.save_dtype == "auto" else args.save_dtype)
        weights = {name.removeprefix("backbone."): weight for name, weight in weights.items()}
        backbone = accelerator.unwrap_model(run.model).backbone
        # GPU against CPU rounds fp32 differently through 28 layers, and bf16 far more; a wrong folder is off by more.
        tolerance = 1e-3 if dtype == torch.float32 and accelerator.mixed_precision == "no" else 0.1
        read_back = partial(model_folder.probe, tokens=tokens, cu_seqlens=cu_seqlens, live=live, tolerance=tolerance)
        if not model_folder.holds(folder, facts(run, step)):  # written just before this run was killed
            model_folder.save(folder, backbone, run.tokenizer, facts(run, step), dtype, weights, read_back)
        tqdm.write(f"step {step}/{run.schedule.steps} | saved {folder}, read back and compared")
    accelerator.wait_for_everyone()


def save_state(run: Run, step: int) -> None:
    """Publish what a resume needs."""
    if not run.resumable:
        return
    accelerator, began = run.accelerator, time.monotonic()
    tensors = resume.capture(accelerator, run.model, run.optimizer, run.meter.state())
    if accelerator.is_main_process:
        if broken := resume.broken(tensors):
            raise RunError(f"step {step}: {broken} is not finite: nothing is saved, and older states are kept")
        facts = {"ground": run.identity, "sizes": run.metrics.sizes(), "skipped": run.skipped}
        path = checkpoint.write(run.folder / "state", step, tensors, facts, run.args.save_total_limit)
        size, took = sum(file.stat().st_size for file in path.iterdir()) / 1e6, time.monotonic() - began
        tqdm.write(f"step {step}/{run.schedule.steps} | state {path}, {size:,.1f} MB in {took:.1f} s")
    accelerator.wait_for_everyone()


def facts(run: Run, step: int) -> model_folder.Facts:
    """What a model folder says about its training."""
    args = run.args
    keys = ("learning_rate", "temperature", "num_hard_neg", "seed", "use_mrl", "use_lora", "teacher_model_path")
    return model_folder.Facts(
        hidden_size=max(run.objective.prefixes),
        max_seq_length=args.max_seq_length,
        query_instruction=args.query_instruction,
        base_model=args.model_path,
        matryoshka_dims=sorted(run.objective.prefixes) if args.use_mrl else [],
        training={"steps": step, "global_batch": run.feed.plan.global_batch} | {key: asdict(args)[key] for key in keys},
        datasets={store.name: size for store, size in zip(run.feed.stores, run.feed.plan.sizes, strict=True)},
    )


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit("run.py: interrupted")
