"""The steps from Python functions to a search engine, with the commands that a user of this repository types.

quickstart.py and foundation.py are the commands: they choose a `Job` and call these steps in order.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import transformers

from arguments import Args
from configuration.keys import did_you_mean
from configuration.sources import read_command_line
from examples.models import random_qwen3, smollm2
from utils import RunError

from . import corpus, tuples
from .corpus import Function

FOLDERS = {"experiment_id", "model_path", "output_dir", "train_data_path"}  # keys of run.py that the job decides
BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # of /proc/cpuinfo: processors that multiply in bf16


@dataclass(frozen=True)
class Job:
    """What is built, trained and where it goes."""

    folder: Path  # holds everything that the job makes; an earlier one is kept as FOLDER.1
    config: Path  # what run.py is given
    layers: int | None  # the first so many of SmolLM2's; None = a random Qwen3 of one layer
    rows: int  # training tuples for retrieval, about
    others: int  # of each other task, at most
    yardsticks: tuple[str, ...]  # what the trained model is compared with: BM25, MiniLM
    one_file_in: int = 1  # Python files that are read
    gguf: Path | None = None  # a decoder as GGUF; None = SmolLM2's, from its package

    def settings(self) -> dict:
        """What the config holds."""
        return json.loads(self.config.read_text(encoding="utf-8"))

    @property
    def backbone(self) -> Path:
        """Folder of the decoder that training starts from."""
        return Path(self.settings()["model_path"])

    @property
    def run_folder(self) -> Path:
        """Folder of the training run."""
        settings = self.settings()
        return Path(settings["output_dir"]) / settings["experiment_id"]


def exit_status(work: Callable[[], None]) -> int:
    """Do the steps of a job and print how long they took.

    Returns:
        0; 2 where something is missing; the exit status of a command that failed.
    """
    began = time.perf_counter()
    transformers.utils.logging.disable_progress_bar()
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        work()
    except RunError as error:
        print(error, file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:  # it has said why
        return error.returncode
    print(f"{(time.perf_counter() - began) / 60:.1f} minutes in all")
    return 0


def override_problems(words: list[str]) -> list[str]:
    """What is wrong with the options that are passed on to run.py, found before minutes of work."""
    keys = {field.name: field for field in fields(Args)}
    values, config, problems = read_command_line(words, keys)
    for name in values:
        if name not in keys:
            problems.append(f"{name}: no such flag, and no key of run.py{did_you_mean(name, keys)}")
    for name in sorted(values.keys() & FOLDERS):
        problems.append(f"{name}: the folders of this job are fixed")
    if config is not None:
        problems.append("config: the configuration of this job is fixed")
    return problems


def keep_earlier_folder(folder: Path) -> None:
    """Rename what an earlier job made to FOLDER.1, or the next number that is free."""
    if not folder.exists():
        return
    number = 1
    while Path(f"{folder}.{number}").exists():
        number += 1
    kept = folder.rename(f"{folder}.{number}")
    print(f"the earlier {folder} is kept as {kept}")


def build(job: Job) -> list[Function]:
    """Make raw tuples and the backbone; returns the held-out functions, those of the standard library."""
    title("raw tuples from the Python functions on this machine")
    library = corpus.distinct(corpus.standard_library_functions(job.one_file_in))
    functions = corpus.distinct(corpus.installed_functions(job.one_file_in), library)
    packages = len({function.package for function in functions})
    print(f"{len(functions):,} documented functions of {packages} installed packages, to train on")
    print(f"{len(library):,} of the standard library, held out", flush=True)
    tuples.write_tuples(functions, job.folder / "training_data", job.rows, job.others)
    if job.layers is None:
        texts = [text for function in functions for text in (function.query, function.passage)]
        random_qwen3.make_backbone(job.backbone, texts, vocab_size=16384, hidden_size=128, layers=1)
    else:
        smollm2.make_backbone(job.backbone, job.layers, job.gguf)
        print(f"{job.backbone}: the first {job.layers} layers of {(job.gguf or Path('SmolLM2-135M-Instruct')).name}")
    return library


def train(job: Job, overrides: list[str]) -> None:
    """Tokenise, warm up the cache and train, with the commands of a user.

    Args:
        overrides: further words for run.py.
    """
    settings = job.settings()
    model, stores = settings["model_path"], settings["train_data_path"]
    folders = f"--tokenizer_path {model} --input_dir {job.folder}/training_data --output_dir {stores}"
    run(f"python tokenize_data_qwen.py {folders} --max_seq_length 512")
    run(f"python run.py --config {job.config} --cache_only true")
    processes = processes_to_train_on()
    batch = settings["train_batch_size"] // processes  # per process; `settings` has that of one
    launch = f"accelerate launch --config_file configs/accelerate_cpu.yaml --num_processes {processes}"
    if job.layers is not None and multiplies_in_bf16():
        launch += " --mixed_precision bf16"
    elif job.layers is not None:
        print("this processor has no instructions for bf16: training takes three to four times as long in fp32")
    command = f"{launch} run.py --config {job.config} --train_batch_size {batch} {shlex.join(overrides)}"
    run(command.strip(), {"ACCELERATE_USE_CPU": "true"})


def newest_model_folder(run_folder: Path) -> Path:
    """The model that a run saved last."""
    saved = [*run_folder.glob("epoch_*"), *run_folder.glob("step_*")]
    return max(saved, key=lambda path: path.stat().st_mtime)


def run(command: str, environment: dict[str, str] | None = None) -> None:
    """Show a command as a user would type it, and run it with this Python.

    Args:
        environment: further environment variables, which stand before the command.
    """
    environment = environment or {}
    settings = [f"{key}={value}" for key, value in environment.items()]
    print("\n$", *settings, command, flush=True)
    words = shlex.split(command)
    if words[0] == "accelerate":
        program = ["-m", "accelerate.commands.launch", *words[2:]]
    else:
        program = words[1:]
    subprocess.run([sys.executable, *program], check=True, env=os.environ | environment)


def title(text: str) -> None:
    """Print a line that begins a step."""
    print(f"\n# {text}", flush=True)


def processes_to_train_on() -> int:
    """Two where there are two cores, so that gradients and passages cross processes; each takes half of the cores.

    The result does not depend on it. More processes would be no faster, and each holds weights, gradients, moments and
    activations of its own: 5 GiB in the foundation.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))  # those that this process may use
    else:
        cores = os.cpu_count()
    return min(2, cores)


def multiplies_in_bf16() -> bool:
    """Whether the processor has instructions for bf16: with them bf16 is faster than fp32, without them slower."""
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:  # not Linux
        return False
    return not BF16_FLAGS.isdisjoint(words)
