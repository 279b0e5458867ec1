"""Train a text-embedding model from a decoder by contrastive fine-tuning, as F2LLM and F2LLM-v2 did.

python run.py --config configs/config.json                                  one process
accelerate launch --config_file configs/accelerate_config.yaml run.py --config configs/config.json
python run.py --config configs/config.json --cache_only true                only build the data cache
python run.py --help                                                        every key
"""

# ruff: noqa: E402 - torch takes seconds to import, and a mistyped key is named before
import sys

from runtime import launcher
from training.refusal import answer_at_once, asks_for_help, refuse, refuse_with_others

PROBLEMS_PRINTED = []
if __name__ == "__main__":
    launcher.install_excepthook()
    launcher.stop_when_launcher_ends()
    launcher.use_expandable_segments()
    PROBLEMS_PRINTED = answer_at_once(sys.argv[1:])

import math
import shutil
import time
import warnings
from functools import partial
from pathlib import Path

import torch
import transformers
from torch import Tensor
from tqdm import tqdm

import arguments
from data.feed import describe
from export import model_folder, probe
from runtime import computing, engine, processes, resume
from runtime.verdict import refused_elsewhere
from training import two_pass
from training.card import model_facts, push
from training.console import end_lines, finished_line, format_means, format_train_line, how_to_go_on
from training.evaluation import evaluate
from training.folders import BEST, folder_name
from training.meter import Clock, Meter
from training.models import saved_dtype
from training.objective import MEASURES
from training.plot import draw
from training.preflight import open_inputs, read_evaluation_sets
from training.recipes import describe_recipes
from training.records import task_means, tracker_tags
from training.reports import Reports
from training.setup import Run, setup
from training.step import start_training, train_step
from utils import RunError, hide_bar_unless


def main(argv: list[str], printed: list[str] = ()) -> int:
    """Check everything, then train.

    Args:
        argv: the words of the command line.
        printed: problems that are on the screen already.

    Returns:
        The exit status: 0; 2 for refused input; 75 for a run told to stop; 1 for one that could not continue.
    """
    if asks_for_help(argv):
        print(arguments.help_text())
        return processes.FINISHED
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)  # a log file is read while the run continues
    transformers.utils.logging.disable_progress_bar()  # its bars for loading weights tear the log apart
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)  # peft asks
    try:
        return check_and_train(argv, printed)
    except Exception as error:
        message = processes.user_message(error)
        if message is None:
            raise
        launcher.say([message])
        launcher.repeat_below_launcher([message])
        return processes.FAILED


def check_and_train(argv: list[str], printed: list[str] = ()) -> int:
    """Print every problem that keeps the run from starting; if there is none, train. Returns the exit status."""
    args, problems, unknown = arguments.parse(argv)
    try:
        sets, set_problems = read_evaluation_sets(args, unknown)
        stores, recipes, tokenizer, problems = open_inputs(args, problems + set_problems, unknown)
    except Exception:
        refused_elsewhere(problems=1)  # the others must not wait for this process
        raise
    elsewhere = refused_elsewhere(len(problems))
    if problems:
        return refuse(problems, printed)
    if elsewhere:
        return refuse_with_others(elsewhere)
    if launcher.is_first_on_machine():
        listing = Path(args.cache_dir) / "datasets.txt"
        print("\n".join([*describe(stores, listing), *describe_recipes(recipes)]), flush=True)
    if args.cache_only:
        return processes.FINISHED
    with processes.process_group(args.trackers(), args.tb_dir, args.process_timeout) as accelerator:
        run = setup(args, accelerator, stores, recipes, tokenizer, sets)
        status = train(run)
    push(run)
    return status


# --------------------------------------------------------------------------------------- training


def train(run: Run) -> int:  # noqa: C901, PLR0915 - the loop is read from top to bottom
    """The loop, in the order of time: step, log, judge, save. Returns the exit status, the same on all processes."""
    args = run.args
    steps = run.schedule.steps
    steps_per_epoch = run.feed.plan.steps_per_epoch
    to_do = range(run.steps_done + 1, steps + 1)
    if run.is_finished:
        run.accelerator.print(finished_line(run.folder, run.steps_done))
        to_do = range(0)
    last_saved = time.monotonic()
    hidden = hide_bar_unless(run.accelerator.is_main_process)
    bar = tqdm(total=steps, initial=run.steps_done, desc="training", unit="step", disable=hidden)
    start_training(run)
    run.clock = Clock(steps_before=run.steps_done)
    means: dict[tuple[str, str], float] = {}
    folder = None
    reports = Reports(run.accelerator.device, run.accelerator.num_processes)
    with processes.StopSignal() as stop_signal, run.states:
        save_missing_folders(run)
        run.meter.start()
        for step in to_do:
            learning_rate, norm = train_step(run, step)
            run.steps_done = step
            bar.update()
            is_best = evaluate(run, step)
            is_last = run.is_finished
            epoch_ends = step % steps_per_epoch == 0
            if step % args.log_interval == 0 or is_last:
                means = log(run, step, learning_rate, norm)
            with run.meter.paused():
                if args.validation_steps and (step % args.validation_steps == 0 or epoch_ends or is_last):
                    validate(run, step)
                say_state(run)
                minutes = (time.monotonic() - last_saved) / 60
                state_is_late = bool(args.save_every_minutes) and minutes > args.save_every_minutes
                due = folder_name(step, args.checkpointing_steps, step if is_last else steps, steps_per_epoch)
                reports.send(step, norm, [stop_signal.stop, state_is_late])
                stop, state_is_late = read_reports(run, reports, everything=bool(due or is_best))
                if due or is_best or stop or state_is_late:
                    read_reports(run, reports, everything=True)
                    save_state(run, step)  # before the folders, which are read back, and may be refused
                    last_saved = time.monotonic()
                if is_best:
                    save(run, BEST, step)
                if due:
                    folder = save(run, due, step)
            if stop or is_last:
                break
    say_state(run)
    bar.close()
    run.metrics.close()
    if run.accelerator.is_main_process:
        lines = last_lines(run, means, folder)
        for line in lines:
            print(line, flush=True)
        if not run.is_finished:
            launcher.repeat_below_launcher(lines)
    return processes.FINISHED if run.is_finished else processes.STOPPED


def read_reports(run: Run, reports: Reports, everything: bool) -> list[bool]:
    """Look at the reports that have arrived. Returns whether to stop, and whether a state is late, on any process.

    Args:
        everything: wait for those that have not arrived yet, down to that of this step.

    Raises:
        RunError: on every process: too many updates in a row were left out.
    """
    found = [False, False]
    for report in reports.arrived(everything):
        if report.is_left_out:
            skip_or_stop(run, report.step, report.grad_norm)
        else:
            run.skipped = 0
        found = [earlier or now for earlier, now in zip(found, report.flags, strict=True)]
    return found


def skip_or_stop(run: Run, step: int, norm: float) -> None:
    """Say that an update was left out because its gradient is not finite, and end the run after too many in a row.

    Raises:
        RunError: on every process.
    """
    run.skipped += 1
    what = f"step {step}: the gradient is {norm}: {run.feed.sources(step)}"
    if run.skipped > run.args.max_skipped_steps:
        raise RunError(f"{what}; {run.skipped} updates in a row were left out. A lower learning_rate may help.")
    if run.accelerator.is_main_process:
        tqdm.write(f"{what}; this update is left out", file=sys.stderr)


# --------------------------------------------------------------------------- log, validate, save


def log(run: Run, step: int, learning_rate: float, grad_norm: Tensor) -> dict[tuple[str, str], float]:
    """One line on the console, one in metrics.jsonl, the published tags to the trackers. Returns the means by task."""
    losses, shares, timings = run.meter.read(run.accelerator.num_processes)
    means = task_means(losses, run.tasks)
    norm = float(grad_norm)
    finite_norm = norm if math.isfinite(norm) else None  # JSON has no NaN
    epoch = step / run.feed.plan.steps_per_epoch
    values = {"epoch": epoch, "lr": learning_rate, "grad_norm": finite_norm, **shares, "losses": losses}
    tags = {"lr": learning_rate, "grad_norm": math.nan if finite_norm is None else norm}
    run.metrics.write(step, "train", values, tags | tracker_tags("training", losses, means), timings)
    if run.accelerator.is_main_process:
        values |= timings | {"seconds_left": run.clock.seconds_left(step, run.schedule.steps)}
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        tqdm.write(format_train_line(step, run.schedule.steps, means, values, run.expected_losses, width))
    return means


def last_lines(run: Run, means: dict[tuple[str, str], float], folder: Path | None) -> list[str]:
    """What the run says last: what came out and how to use it, or how to continue.

    Args:
        means: of the last log line.
        folder: the last model folder, None if this run has written none.
    """
    if not run.is_finished:
        return [how_to_go_on(run.steps_done, run.schedule.steps, run.resumable)]
    if folder is None:
        return []
    steps_here = run.steps_done - run.clock.steps_before
    best = run.evaluations.best
    about_best = None
    if best is not None:
        about_best = f"{run.folder / BEST}: {run.args.best_metric} {best.value:.4f} at step {best.step}"
    picture = draw(run.folder)
    return end_lines(steps_here, run.clock.seconds(), means, str(folder), run.args.use_lora, picture, about_best)


@torch.no_grad()
def validate(run: Run, step: int) -> None:
    """Losses on the held-out tuples, and how the positive ranks among its own hard negatives.

    With Matryoshka the same for each prefix, which goes into metrics.jsonl and not onto the console.
    """
    run.model.eval()
    meter = Meter(list(run.tasks), run.objectives[0].measured, run.accelerator.device)
    for dataset, recipe in enumerate(run.recipes):
        for batch in run.batches.held_out(dataset):
            batch = batch.to(run.accelerator.device)
            embeddings = two_pass.embed(run.model, batch)
            measures = run.objectives[dataset].measures_by_width(batch, embeddings, recipe.in_batch)
            for kind, (value, rows) in measures.items():
                meter.add(dataset, {kind: value}, rows)
    run.model.train()
    measures, _, _ = meter.read(run.accelerator.num_processes)
    means = task_means(measures, run.tasks)
    run.metrics.write(step, "validation", {"measures": measures}, tracker_tags("valid", measures, means))
    if run.accelerator.is_main_process and measures:
        full_width = {(task, kind): value for (task, kind), value in means.items() if kind in MEASURES}
        tqdm.write(f"step {step}/{run.schedule.steps} | validation | {format_means(full_width)}")


def save_missing_folders(run: Run) -> None:
    """After a resume, write the model folders that the killed run did not: a step's state comes before its folders."""
    steps_per_epoch = run.feed.plan.steps_per_epoch
    last = run.steps_done if run.is_finished else run.schedule.steps
    due = folder_name(run.steps_done, run.args.checkpointing_steps, last, steps_per_epoch)
    best = run.evaluations.best
    if best is not None and best.step == run.steps_done:
        is_there = model_folder.is_finished(run.folder / BEST, model_facts(run, best.step))
        if not resume.from_main(run.accelerator, is_there):
            save(run, BEST, best.step)
    if run.steps_done and due and not resume.from_main(run.accelerator, (run.folder / due).exists()):
        save(run, due, run.steps_done)


def save(run: Run, name: str, step: int) -> Path:
    """Write a model folder and read it back: what users will load must be what was trained. Returns the folder."""
    accelerator = run.accelerator
    folder = run.folder / name
    tokens, cu_seqlens = probe.probe_batch(run.tokenizer, run.args.max_seq_length)
    run.model.eval()
    with torch.no_grad():  # as training runs it: wrapped, in its precision, on every process
        live = run.model(tokens.to(accelerator.device), cu_seqlens.to(accelerator.device), cu_seqlens.diff().numpy())
    run.model.train()
    weights = engine.whole_weights(accelerator, run.model)
    if accelerator.is_main_process:
        dtype = saved_dtype(run.args, accelerator)
        rounded = dtype != torch.float32 or accelerator.mixed_precision != "no"
        by_many_threads = computing.threads_of_a_processor(run.args.threads)(probe.read_back)  # the GPUs wait for it
        read_back = partial(by_many_threads, tokens=tokens, cu_seqlens=cu_seqlens, live=live, rounded=rounded)
        facts = model_facts(run, step)
        embedder = accelerator.unwrap_model(run.model)
        if not model_folder.is_finished(folder, facts):  # it may be: a killed run wrote it, and not yet its state
            weights = {name.removeprefix("backbone."): weight for name, weight in weights.items()}
            model_folder.save(
                folder, embedder.backbone, run.tokenizer, facts, dtype, weights, read_back,
                pooling=embedder.pooling, replace=name == BEST,
            )  # fmt: skip
        tqdm.write(f"step {step}/{run.schedule.steps} | saved {folder}, read back and compared")
        model_folder.remove_old(run.folder, run.args.model_folders_limit, step, run.feed.plan.steps_per_epoch)
    accelerator.wait_for_everyone()
    return folder


def save_state(run: Run, step: int) -> None:
    """Begin to write what a resume needs; training continues as soon as it is copied to main memory.

    Raises:
        RunError: a weight or a moment is not finite; older states are kept.
        OSError: the disk refused the state before.
    """
    if not run.resumable:
        return
    began = time.monotonic()
    run.states.wait()  # for the one before: its copies are written over now
    say_state(run)
    meter = run.meter.state()
    parts = resume.capture(run.accelerator, run.model, run.optimizer, meter, run.states.number, run.states.count)
    broken = resume.broken(parts)
    if broken:
        raise RunError(f"step {step}: {broken} is not finite: nothing is saved, and older states are kept")
    best = run.evaluations.best
    facts = {
        resume.IDENTITY_KEY: run.identity,
        "model_path": run.args.model_path,
        "sizes": run.metrics.sizes(),
        "skipped": run.skipped,
        "best": None if best is None else best.step,
    }
    run.states.begin(step, parts, facts, began)


def say_state(run: Run) -> None:
    """Say on the main process, once, that a state is finished. Raises OSError if the disk refused it."""
    state = run.states.check()
    if state is not None:
        tqdm.write(f"step {state.step}/{run.schedule.steps} | {state}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], PROBLEMS_PRINTED))
