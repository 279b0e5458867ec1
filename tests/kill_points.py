"""Where tests/chaos.py kills: named points of a run and of tokenising, and how a process dies there."""

import os
import shutil
import signal
from pathlib import Path

import torch
from accelerate import Accelerator

from data import store_writer
from export import model_folder, probe
from runtime import background, checkpoint, resume, shards
from training import evaluation, objective, records, reports
from training.folders import BEST
from utils import aside_of

# ------------------------------------------------------------------------------------------- how


def die(*_, **__) -> None:
    """As a power cut: nothing is tidied up."""
    os.kill(os.getpid(), signal.SIGKILL)


def before(function, when=lambda *_: True):
    """The function, or death in its place when it is called so."""
    return lambda *words, **named: die() if when(*words) else function(*words, **named)


def after(function, when=lambda *_: True, spoil=lambda *_: None):
    """The function, and death when it was called so."""

    def call(*words, **named):
        found = function(*words, **named)
        if when(*words):
            spoil(*words)
            die()
        return found

    return call


def half(path: Path, *_) -> None:
    """What a full cache and a power cut make of a file."""
    os.truncate(path, path.stat().st_size // 2)


def half_a_line(metrics, *_) -> None:
    if metrics.files:
        os.write(metrics.files["metrics"].fileno(), b'{"step": 7, "ki')


# ------------------------------------------------------------------------------------------- when


def of_training(_metrics, _step, kind, *_) -> bool:
    return kind == "train"


def of_search(_metrics, _step, kind, *_) -> bool:
    return kind == "evaluation"


def to_state(_, path) -> bool:
    return Path(path).parent.name == "state" and Path(path).name.startswith("step_")


def to_model_folder(_, path) -> bool:
    return Path(path).parent.name != "state" and Path(path).name.startswith(("step_", "epoch_"))


def to_best(_, path) -> bool:
    return Path(path).name == BEST


def of_moments(path, *_) -> bool:
    return Path(path).name.startswith("moments")


def on_old_state(path, *_) -> bool:
    return Path(path).parent.name == "state" and Path(path).name.endswith(".old") and Path(path).exists()


def on_old_best(path, *_) -> bool:
    return Path(path).name == f".{BEST}.old" and Path(path).exists()


def of_best(folder, *_) -> bool:
    return Path(folder) in (Path(folder).with_name(BEST), aside_of(Path(folder).with_name(BEST)))


def of_plain_folder(folder, *_) -> bool:
    return not of_best(folder)


# ------------------------------------------------------------------------------------------ where

# name -> (rank, or the last where there are fewer; where, attribute, its replacement). In the order in which a run of
# 33 steps comes to them: a state after each, an evaluation at 8 and 16, a model folder at 11 and 22.
POINTS = {
    "before the backward pass": (1, Accelerator, "backward", before),
    "in the gather": (1, objective, "gather", before),
    "in the optimizer's step": (0, torch.optim.AdamW, "step", after),
    "in the collective that agrees to stop": (1, reports.Reports, "send", before),
    "in the middle of a log line": (0, records.Metrics, "write", lambda f: after(f, of_training, half_a_line)),
    "before a state is captured": (1, resume, "capture", before),
    "while a state is copied": (1, background, "copy_to_cpu", after),
    "in the background, in the middle of a file": (0, shards, "write_file", lambda f: after(f, spoil=half)),
    "in the background, between two files": (0, shards, "write_file", lambda f: before(f, of_moments)),
    "in the middle of another process's part": (1, shards, "write_file", lambda f: after(f, of_moments, half)),
    "when a process has written and told nobody": (1, checkpoint, "write_part", after),
    "when all have written": (0, checkpoint, "finish", before),
    "before a state's rename": (0, os, "replace", lambda f: before(f, to_state)),
    "after a state's rename": (0, os, "replace", lambda f: after(f, to_state)),
    "while an old state is removed": (0, shutil, "rmtree", lambda f: before(f, on_old_state)),
    "in validation": (1, objective.Objective, "measures", before),
    "in the search of an evaluation": (1, evaluation.Nearest, "add", before),
    "in the collective of an evaluation": (1, evaluation, "all_rows", before),
    "in the middle of an evaluation's line": (0, records.Metrics, "write", lambda f: after(f, of_search, half_a_line)),
    "while the best model is read back": (0, probe, "read_back", lambda f: before(f, of_best)),
    "between a state and the best model": (0, model_folder, "save", lambda f: before(f, of_best)),
    "between the two renames of the best model": (0, os, "replace", lambda f: before(f, to_best)),
    "while the best model before it is removed": (0, shutil, "rmtree", lambda f: before(f, on_old_best)),
    "while a model folder is read back": (0, probe, "read_back", lambda f: before(f, of_plain_folder)),
    "between a state and its model folder": (0, model_folder, "save", lambda f: before(f, of_plain_folder)),
    "before a model folder's rename": (0, os, "replace", lambda f: before(f, to_model_folder)),
    "after a model folder's rename": (0, os, "replace", lambda f: after(f, to_model_folder)),
    "in a resume": (0, resume, "restore", before),
}  # fmt: skip
TOKENISING = {
    "before a commit": (store_writer.StoreWriter, "commit", before),
    "after a commit": (store_writer.StoreWriter, "commit", after),
    "before the journal's rename": (os, "replace", lambda f: before(f, lambda _, to: Path(to).name == "journal.json")),
    "before a store's rename": (os, "replace", lambda f: before(f, lambda _, to: Path(to).parent.name == "stores")),
    "after a store's rename": (os, "replace", lambda f: after(f, lambda _, to: Path(to).parent.name == "stores")),
}
