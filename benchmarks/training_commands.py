"""The training commands as processes of their own, and how long each of their steps took.

run.py                                   this project, on one process or several
sentence_transformers_training.py        the Trainer of Sentence Transformers with one of its losses
"""

import itertools
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from data.plan import batch_bounds, batch_count, split_sizes
from export.convert import merge_adapter
from utils import RunError, read_json, remove, write_json

WARMUP_SHARE = 0.1  # of all steps
MINING_TOKENS = 128  # of a text, at most, that a model mines with
ADAM_BETAS = (0.9, 0.98)  # of both systems
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Training:
    """One training, whichever system does it."""

    model: str  # folder of the backbone
    raw: str  # Parquet file of tuples
    stores: str  # the same tuples as token stores
    folder: str  # where it writes; removed first
    steps: int
    batch: int  # tuples of a step, over all processes
    max_seq_length: int
    negatives: int
    learning_rate: float
    seed: int
    threads: int  # of each process
    bf16: bool  # autocast over fp32 weights; else fp32 alone
    saves: int = 1  # model folders, at equal distances; `steps` is a multiple of it
    temperature: float = 0.05
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0

    @property
    def warmup_steps(self) -> int:
        """Steps of linear warm-up."""
        return round(WARMUP_SHARE * self.steps)

    @property
    def steps_per_save(self) -> int:
        """Steps between two model folders."""
        return self.steps // self.saves


@dataclass(frozen=True)
class Trained:
    """What came out of a training."""

    seconds: list[float]  # since the first step began, after each step; without loading and saving
    folders: dict[int, Path]  # step -> model folder

    def seconds_per_step(self, skipped: int = 2) -> float:
        """Mean over all steps but the first `skipped`, in which memory is allocated; at least one step counts."""
        skipped = min(skipped, len(self.seconds) - 1)
        before = self.seconds[skipped - 1] if skipped else 0.0
        return (self.seconds[-1] - before) / (len(self.seconds) - skipped)


def run_command(words: list[str], threads: int, log: Path, environment: dict[str, str] | None = None) -> None:
    """Run a Python command of this repository with so many threads; what it prints goes to the end of `log`.

    Raises:
        RunError: it failed; with the last lines that it printed.
    """
    settings = os.environ | (environment or {})
    settings |= {"OMP_NUM_THREADS": str(threads), "RAYON_NUM_THREADS": str(threads)}
    settings |= {"TOKENIZERS_PARALLELISM": "true" if threads > 1 else "false", "HF_HUB_OFFLINE": "1"}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as console:
        done = subprocess.run([sys.executable, *words], cwd=ROOT, env=settings, stdout=console, stderr=console)
    if done.returncode:
        last = "\n".join(log.read_text(encoding="utf-8").splitlines()[-15:])
        raise RunError(f"{' '.join(words)}: ended with {done.returncode}; {log} ends with\n{last}")


def tokenize(raw: Path, stores: Path, model: Path, max_seq_length: int, task: str, threads: int) -> None:
    """A raw file becomes a token store. Files that are done are not done again."""
    words = ["tokenize_data_qwen.py", "--tokenizer_path", str(model), "--input_dir", str(raw.resolve())]
    words += ["--output_dir", str(stores.resolve()), "--max_seq_length", str(max_seq_length), "--task", task]
    words += ["--workers", str(threads)]
    run_command(words, threads, stores.with_name(f"{stores.name}.log"))


def mine_by_command(pairs: Path, output: Path, miner: Path, rules: list[str]) -> None:
    """A raw file gets its hard negatives by the mining command.

    Args:
        miner: folder of the model that embeds the texts.
        rules: further words of the command.
    """
    words = ["-m", "tools.mine_hard_negatives", "--input", str(pairs.resolve()), "--output", str(output.resolve())]
    words += ["--model", str(miner.resolve()), "--max_length", str(MINING_TOKENS), "--keep_cache", "false", *rules]
    run_command(words, 1, output.with_name("mining.log"))


def train_here(training: Training, changes: dict | None = None, processes: int = 1) -> Trained:
    """Train by run.py.

    Args:
        changes: keys of run.py that differ from what `config_of` says.
        processes: that share the batch evenly; more than one are started by accelerate launch.

    Raises:
        RunError: the run failed.
    """
    folder = Path(training.folder).resolve()
    remove(folder)
    folder.mkdir(parents=True)
    config = config_of(training, processes) | (changes or {})
    write_json(folder / "config.json", config)
    command = ["run.py", "--config", str(folder / "config.json")]
    precision = "bf16" if training.bf16 else "no"
    environment = {"ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": precision}
    if processes > 1:
        launcher = ["--config_file", "configs/accelerate_cpu.yaml", "--mixed_precision", precision]
        command = ["-m", "accelerate.commands.launch", *launcher, "--num_processes", str(processes), *command]
    run_command(command, training.threads, folder / "log.txt", environment)
    run_folder = folder / config["experiment_id"]
    folders = model_folders(run_folder)
    if config.get("use_lora"):
        folders = {step: merged(adapter) for step, adapter in folders.items()}
    return Trained(step_seconds(run_folder, rows_of_steps(training)), folders)


def config_of(training: Training, processes: int) -> dict:
    """What run.py is told."""
    return {
        "model_path": str(Path(training.model).resolve()),
        "experiment_id": "run",
        "train_data_path": str(Path(training.stores).resolve()),
        "output_dir": str(Path(training.folder).resolve()),
        "tb_dir": str(Path(training.folder).resolve() / "tb"),
        "cache_dir": str(Path(training.folder).resolve() / "cache"),
        "train_batch_size": training.batch // processes,
        "max_seq_length": training.max_seq_length,
        "num_hard_neg": training.negatives,
        "seed": training.seed,
        "gradient_checkpointing": False,
        "temperature": training.temperature,
        "learning_rate": training.learning_rate,
        "min_lr": 0.0,
        "warmup_steps": training.warmup_steps,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "train_steps": training.steps,
        "train_epochs": training.steps,  # never the earlier one
        "log_interval": 1,  # the time of each step
        "validation_steps": 0,
        "checkpointing_steps": training.steps_per_save,
        "save_dtype": "float32",
        "save_every_minutes": 0,
        "save_total_limit": 1,
        "report_to": "none",
        "threads": training.threads,
    }


def rows_of_steps(training: Training) -> list[int]:
    """Tuples of each step: the last two of an epoch share what is left."""
    meta = read_json(next(Path(training.stores).glob("*/meta.json")))
    size = split_sizes(meta["rows"])[0]
    per_epoch = batch_count(size, training.batch)
    rows = []
    for step in range(training.steps):
        begin, end = batch_bounds(size, training.batch, step % per_epoch)
        rows.append(end - begin)
    return rows


def step_seconds(run_folder: Path, rows: list[int]) -> list[float]:
    """Training seconds after each step, from the tuples per second that the run logged; saving is not counted there."""
    lines = [json.loads(line) for line in (run_folder / "timings.jsonl").read_text(encoding="utf-8").splitlines()]
    rates = [line["tuples_per_second"] for line in lines if line["kind"] == "train"]
    seconds = [count / rate for count, rate in zip(rows, rates, strict=True)]
    return list(itertools.accumulate(seconds))


def model_folders(run_folder: Path) -> dict[int, Path]:
    """Step -> the model folder that was saved after it."""
    folders = {}
    for path in run_folder.glob("*/f2llm.json"):
        folders[read_json(path)["training"]["steps"]] = path.parent
    return dict(sorted(folders.items()))


def merged(adapter: Path) -> Path:
    """A plain model folder with the adapter in it."""
    folder = adapter.with_name(f"{adapter.name}-merged")
    merge_adapter(adapter, folder, torch.float32)
    return folder


def train_by_sentence_transformers(training: Training, loss: str) -> Trained:
    """Train by Sentence Transformers' trainer in a process of its own.

    Args:
        loss: a name in sentence_transformers_training.LOSSES.

    Raises:
        RunError: it failed.
    """
    folder = Path(training.folder).resolve()
    remove(folder)
    folder.mkdir(parents=True)
    absolute = replace(training, model=str(Path(training.model).resolve()), raw=str(Path(training.raw).resolve()))
    write_json(folder / "training.json", asdict(absolute) | {"folder": str(folder), "loss": loss})
    words = ["-m", "benchmarks.sentence_transformers_training", str(folder / "training.json")]
    run_command(words, training.threads, folder / "log.txt")
    seconds = read_json(folder / "seconds.json")
    folders = {int(path.name.rpartition("-")[2]): path for path in folder.glob("checkpoint-*")}
    return Trained(seconds, dict(sorted(folders.items())))
