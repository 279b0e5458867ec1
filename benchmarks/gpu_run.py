"""Part 3 of benchmarks.gpu: run.py itself, in processes of its own, on a model and a token store made here.

One run is left alone. It saves states by the clock and a model folder in between; how long training paused for each is
seen from outside, by the times at which its log lines arrive. Another run of the same configuration gets SIGKILL after
a state, and the same command continues it: it must end with the same losses, and with `deterministic: true` in the same
bits.
"""

import math
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.gpu_model import TOY, build, config_of, free_memory, step_flops
from benchmarks.lengths import tuples
from benchmarks.scaling import losses_of, read_lines
from benchmarks.training_commands import ROOT
from data.store_writer import StoreWriter, text_key
from modeling.qwen_bpe import EOS, train_tokenizer
from utils import RunError, file_digest, remove, write_json

SHAPE = "MS-MARCO-like"  # steps of nearly the same length, so that a longer one is seen
NEGATIVES = 7
LONGEST = 1024  # tokens of a text
WORDS = ("one river, two castles", "a poem about planets", "the market of violins")  # for a small tokenizer
STEPS_AFTER_STATE = 3  # until the kill
NOT_COUNTED = 3  # first steps, which warm up
STEP_LINE = re.compile(r"step (\d+)/\d+ \| epoch")
STATE_LINE = re.compile(  # step, megabytes, seconds, those of them in which training waited
    r"step (\d+)/\d+ \| state \S+, ([\d,.]+) MB in ([\d.]+) s(?:, of which training waited ([\d.]+))?"
)
FOLDER_LINE = re.compile(r"step (\d+)/\d+ \| saved ")
RESUME_LINE = re.compile(r"continuing after step (\d+) of")


@dataclass(frozen=True)
class Pace:
    """How long a run is, by size."""

    steps: int
    folder_every: int  # steps
    state_every: float  # seconds


PACES = {TOY: Pace(60, 41, 0.15), "0.6B": Pace(160, 100, 5), "1.7B": Pace(120, 80, 12)}
RUN_SECONDS = {TOY: 30, "0.6B": 200, "1.7B": 400}  # that all of it takes; a guess


@dataclass(frozen=True)
class Watched:
    """What a process printed, and when: (time.monotonic(), line)."""

    lines: list[tuple[float, str]]
    began: float
    status: int  # as subprocess gives it; minus the signal where one ended it

    def steps(self) -> dict[int, float]:
        """Step -> when its line came."""
        return {int(found[1]): at for at, found in self.matching(STEP_LINE)}

    def matching(self, pattern: re.Pattern) -> list[tuple[float, re.Match]]:
        """(when, match) of every line that begins so."""
        found = [(at, pattern.match(line)) for at, line in self.lines]
        return [(at, match) for at, match in found if match]


def measure_run(
    size: str, device: torch.device, folder: Path, tuples_per_step: int, deterministic: bool, seconds: float
) -> dict:
    """Train, kill, resume, compare.

    Args:
        folder: is made, and removed at the end: tens of GB.
        seconds: that all of it may take; a process that is still running then is killed.

    Returns:
        What `describe_run` and `describe_resume` give.

    Raises:
        RunError: a run failed, or took too long.
    """
    ends = time.monotonic() + seconds
    pace = PACES[size]
    try:
        make_model(folder / "model", size, device)
        rows = math.ceil(1.1 * pace.steps * tuples_per_step) + tuples_per_step  # the run ends within its first epoch
        make_store(folder / "stores" / "made_up", rows, config_of(size).vocab_size)
        left_alone = config_of_run(folder, "left_alone", pace, tuples_per_step, deterministic)
        watched = train(left_alone, ends)
        report = {"size": size, "tuples": tuples_per_step, "deterministic": deterministic}
        lengths = tuples(SHAPE, rows, NEGATIVES)  # [rows, 9]
        report["flops_per_token"] = step_flops(config_of(size), lengths, lora=False) / int(lengths.sum())
        report |= describe_run(watched, run_folder(left_alone))
        remove(run_folder(left_alone) / "state")
        killed = config_of_run(folder, "killed", pace, tuples_per_step, deterministic)
        first = train(killed, ends, kill_when=StepsAfterState())
        second = train(killed, ends)
        report |= describe_resume(first, second, run_folder(left_alone), run_folder(killed))
        return report
    finally:
        remove(folder)


# ----------------------------------------------------------------------------------------- what is trained


def make_model(folder: Path, size: str, device: torch.device) -> None:
    """A model folder with random weights in bf16, and a small tokenizer with Qwen's special tokens."""
    model = build(config_of(size), lora=False, device=device)
    model.backbone.bfloat16().save_pretrained(folder)
    train_tokenizer(WORDS, vocab_size=300).save_pretrained(folder)
    del model
    free_memory(device)


def make_store(folder: Path, rows: int, vocab_size: int) -> None:
    """A token store of random ids, with the text lengths of a frozen distribution; every text is another."""
    lengths = tuples(SHAPE, rows, NEGATIVES)  # [rows, 2 + NEGATIVES]
    eos = train_tokenizer(WORDS, vocab_size=300).convert_tokens_to_ids(EOS)
    flat = lengths.flatten()
    tokens = np.random.default_rng(0).integers(0, vocab_size, int(flat.sum()), dtype=np.int32)
    tokens[np.cumsum(flat) - 1] = eos
    writer = StoreWriter(folder, NEGATIVES, {"made_of": f"random ids, lengths as {SHAPE}"})
    keys = [text_key(str(number).encode()) for number in range(len(flat))]
    writer.add_texts(keys, tokens, flat)
    writer.add_tuples(np.arange(len(flat)).reshape(lengths.shape))
    writer.commit(rows)
    meta = {"name": folder.name, "task": "retrieval", "max_seq_length": LONGEST, "eos_token_id": eos, "tokenizer": None}
    writer.finish(meta)


def config_of_run(folder: Path, name: str, pace: Pace, tuples_per_step: int, deterministic: bool) -> dict:
    """What run.py is told."""
    return {
        "model_path": str(folder / "model"),
        "experiment_id": name,
        "output_dir": str(folder / "output"),
        "tb_dir": str(folder / "tb"),
        "cache_dir": str(folder / "cache"),
        "train_data_path": str(folder / "stores"),
        "train_batch_size": tuples_per_step,
        "max_seq_length": LONGEST,
        "num_hard_neg": NEGATIVES,
        "learning_rate": 1e-5,
        "warmup_steps": 2,
        "train_steps": pace.steps,
        "train_epochs": 1,
        "log_interval": 1,
        "validation_steps": 0,
        "checkpointing_steps": pace.folder_every,
        "save_every_minutes": pace.state_every / 60,
        "save_total_limit": 1,
        "report_to": "none",
        "deterministic": deterministic,
    }


def run_folder(config: dict) -> Path:
    """Where a run writes."""
    return Path(config["output_dir"]) / config["experiment_id"]


# ---------------------------------------------------------------------------------------------- processes


class StepsAfterState:
    """Whether a run has saved a state and made STEPS_AFTER_STATE more steps, by the lines that it prints."""

    def __init__(self):
        self.state_step = math.inf

    def __call__(self, line: str) -> bool:
        """Look at the next line. Returns whether the time has come."""
        state = STATE_LINE.match(line)
        if state:
            self.state_step = min(self.state_step, int(state[1]))
        step = STEP_LINE.match(line)
        return bool(step) and int(step[1]) >= self.state_step + STEPS_AFTER_STATE


def train(config: dict, ends: float, kill_when: Callable[[str], bool] | None = None) -> Watched:
    """Run run.py, and note when each line came.

    Args:
        ends: time.monotonic() at which it is killed.
        kill_when: called with each line; where it says so, the process gets SIGKILL.

    Raises:
        RunError: it failed, took too long, or ended before it was to be killed.
    """
    path = Path(config["output_dir"]).parent / f"{config['experiment_id']}.json"
    write_json(path, config)
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "run.py", "--config", str(path)],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    out_of_time = threading.Timer(ends - began, process.kill)
    out_of_time.start()
    lines = []
    was_killed = False
    for line in process.stdout:
        lines.append((time.monotonic(), line.rstrip()))
        if kill_when is not None and not was_killed and kill_when(line):
            was_killed = True
            process.kill()
    status = process.wait()
    out_of_time.cancel()
    last = " / ".join(line for _, line in lines[-3:])
    if time.monotonic() >= ends:
        raise RunError(f"run.py took more than the {ends - began:.0f} s that were left; its last lines: {last}")
    if kill_when is not None and not was_killed:
        raise RunError(f"run.py ended with {status} before it could be killed: {last}")
    if status and not was_killed:
        raise RunError(f"run.py ended with {status}: {last}")
    return Watched(lines, began, status)


# ------------------------------------------------------------------------------------------- what was seen


def describe_run(watched: Watched, folder: Path) -> dict:
    """What a run that was left alone took, and how long it stood still to save.

    Returns:
        start_seconds: until the line of step 1. step_seconds: median, of steps that follow no save. states, folders:
        by step, with stall_seconds: how much longer the line of the following step took than usual; None after the
        last step. With a folder comes a state: its stall is that of both.
    """
    at = watched.steps()
    gaps = {step: at[step] - at[step - 1] for step in at if step - 1 in at}  # step -> seconds since the one before
    states = [describe_state(match) for _, match in watched.matching(STATE_LINE)]
    folders = [{"step": int(match[1])} for _, match in watched.matching(FOLDER_LINE)]
    saved = {save["step"] for save in states + folders}
    usual = [gap for step, gap in gaps.items() if step - 1 not in saved and step > NOT_COUNTED]
    median = statistics.median(usual or gaps.values())
    for save in states + folders:
        following = gaps.get(save["step"] + 1)
        save["stall_seconds"] = None if following is None else max(0.0, following - median)
    with_folder = {save["step"] for save in folders}
    timings = training_lines(folder / "timings.jsonl")[NOT_COUNTED:]
    return {
        "steps": max(at),
        "start_seconds": at[1] - watched.began,
        "step_seconds": median,
        "tuples_per_second": statistics.median(line["tuples_per_second"] for line in timings),
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in timings),
        "peak_gib": max(line["peak_gib"] for line in timings),
        "states": [save for save in states if save["step"] not in with_folder],
        "folders": folders,
    }


def describe_state(line: re.Match) -> dict:
    """A state by the run's own words; where they do not tell how long training waited, it waited all the time."""
    step, megabytes, seconds, waited = line.groups()
    return {
        "step": int(step),
        "megabytes": float(megabytes.replace(",", "")),
        "seconds": float(seconds),
        "waited_seconds": float(waited or seconds),
    }


def describe_resume(first: Watched, second: Watched, left_alone: Path, killed: Path) -> dict:
    """After which steps a run was killed and went on, and whether it ended as the one that was left alone."""
    expected = losses_of(training_lines(left_alone / "metrics.jsonl"))
    found = losses_of(training_lines(killed / "metrics.jsonl"))
    went_on = second.matching(RESUME_LINE)
    if not went_on or len(found) != len(expected):
        raise RunError(f"the killed run did not continue, or logged {len(found)} losses instead of {len(expected)}")
    differences = [abs(own - exact) / abs(exact) for own, exact in zip(found, expected, strict=True)]
    last = max(second.steps())
    return {
        "killed_after_step": max(first.steps()),
        "resumed_after_step": int(went_on[0][1][1]),
        "largest_loss_difference": max(differences),
        "same_bits": digests(left_alone, last) == digests(killed, last),
    }


def training_lines(path: Path) -> list[dict]:
    """The lines of a log that are about training steps."""
    return [line for line in read_lines(path) if line["kind"] == "train"]


def digests(folder: Path, last_step: int) -> list[str]:
    """Checksums of a run's metrics and of the weights that it ended with."""
    weights = sorted(folder.glob(f"step_{last_step}/*.safetensors"))
    if not weights:
        raise RunError(f"{folder}: no model folder of step {last_step}")
    return [file_digest(path) for path in [folder / "metrics.jsonl", *weights]]
