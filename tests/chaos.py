"""Kill a run again and again, anywhere, and compare what it ends in with a run that nobody touched.

    make chaos                                      each named point once, then 200 kills at random moments
    python -m pytest tests/runtime/test_chaos.py    each named point once, then a few at random moments

Two gloo processes train the toy: LoRA with dropout, Matryoshka, three datasets, a state at every step. One of them,
or both, get SIGKILL; who is left must end by itself; every state that lies there must be whole; the same command goes
on. At the end weights, moments, logs and model folders must be, byte for byte, those of the run that was left alone.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import toy
from accelerate import Accelerator
from harness import Processes, start_door

import tokenize_data_qwen
from data import store_writer, token_store
from export import probe
from runtime import checkpoint, heartbeat, resume
from training import objective, records, reports

LIMIT = 60.0  # seconds in which a process must end after another was killed: six times `process_timeout`
WORLD = 2


# ------------------------------------------------------------------------------------- named points


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


def half(_, path: Path) -> None:
    """What a full cache and a power cut make of a file."""
    os.truncate(path, path.stat().st_size // 2)


def half_a_line(metrics, *_) -> None:
    if metrics.files:
        os.write(metrics.files["metrics"].fileno(), b'{"step": 7, "ki')


def to_state(_, path) -> bool:
    return Path(path).parent.name == "state" and Path(path).name.startswith("step_")


def to_model_folder(_, path) -> bool:
    return Path(path).parent.name != "state" and Path(path).name.startswith(("step_", "epoch_"))


def on_old_state(path, *_) -> bool:
    return Path(path).name.endswith(".old") and Path(path).exists()


POINTS = {  # name -> (rank, where, attribute, its replacement)
    "before the backward pass": (1, Accelerator, "backward", before),
    "in the gather": (1, objective, "gather", before),
    "in the optimizer's step": (0, torch.optim.AdamW, "step", after),
    "in the collective that agrees to stop": (1, reports.Reports, "send", before),
    "in validation": (1, objective.Objective, "measures", before),
    "in the middle of a log line": (0, records.Metrics, "write", lambda f: after(f, spoil=half_a_line)),
    "while a state is gathered": (1, resume, "capture", before),
    "in the middle of a shard": (0, checkpoint, "save_file", lambda f: after(f, spoil=half)),
    "before a state's rename": (0, os, "replace", lambda f: before(f, to_state)),
    "after a state's rename": (0, os, "replace", lambda f: after(f, to_state)),
    "while an old state is removed": (0, shutil, "rmtree", lambda f: before(f, on_old_state)),
    "before a model folder's rename": (0, os, "replace", lambda f: before(f, to_model_folder)),
    "after a model folder's rename": (0, os, "replace", lambda f: after(f, to_model_folder)),
    "while a model folder is read back": (0, probe, "read_back", before),
    "in a resume": (0, resume, "restore", before),
}
TOKENISING = {
    "before a commit": (store_writer.StoreWriter, "commit", before),
    "after a commit": (store_writer.StoreWriter, "commit", after),
    "before the journal's rename": (os, "replace", lambda f: before(f, lambda _, to: Path(to).name == "journal.json")),
    "before a store's rename": (os, "replace", lambda f: before(f, lambda _, to: Path(to).parent.name == "stores")),
    "after a store's rename": (os, "replace", lambda f: after(f, lambda _, to: Path(to).parent.name == "stores")),
}


# ----------------------------------------------------------------------------------------- processes


def prepare(point: str | None, mark: str, rank: int) -> None:
    """Let a process of the run leave a mark when all have met, and die at a point if that is its part."""
    begin = heartbeat.Heartbeat.__init__

    def watch(self, *words) -> None:
        Path(f"{mark}.{rank}").touch()  # from here on nobody needs the launcher to end
        begin(self, *words)

    heartbeat.Heartbeat.__init__ = watch
    if point:
        victim, where, name, replacement = POINTS[point]
        if rank == victim:
            setattr(where, name, replacement(getattr(where, name)))


def tokenise_until(rank: int, world: int, words: list[str], point: str | None) -> None:
    """The tokenising door, in small pieces, which dies at a point."""
    tokenize_data_qwen.BATCH_TEXTS = 416
    tokenize_data_qwen.COMMIT_ROWS = 32
    if point:
        where, name, replacement = TOKENISING[point]
        setattr(where, name, replacement(getattr(where, name)))
    sys.exit(tokenize_data_qwen.main(words))


# --------------------------------------------------------------------------------------------- storm


@dataclass
class Storm:
    """A run under kills, and what was seen."""

    config: dict
    seed: int
    met: int = 0  # kills after all processes had met
    seen: Counter = field(default_factory=Counter)
    unreadable: list[str] = field(default_factory=list)
    hangs: list[str] = field(default_factory=list)
    slowest: float = 0.0  # seconds from a kill to the end of the last process
    tries: int = 0
    start: float = 0.0  # seconds until all processes had met, of the first attempt

    def __post_init__(self):
        self.rng = random.Random(self.seed)
        self.states = Path(self.config["output_dir"]) / self.config["experiment_id"] / "state"
        self.marks: list[Path] = []  # of the processes, each there when all have met

    def attempt(self, point: str | None = None, within: float | None = None) -> list[int | None]:
        """Start both processes; let one die at a point, or kill some at a random moment; watch how the rest ends.

        Returns:
            Their exit statuses.
        """
        self.tries += 1
        mark = f"{self.config['cache_dir']}.met"
        self.marks = [Path(f"{mark}.{rank}") for rank in range(WORLD)]
        for path in self.marks:
            path.unlink(missing_ok=True)
        pair = start_door(WORLD, self.config, partial(prepare, point, mark))
        started = time.monotonic()
        if within is not None:
            pair.wait(self.rng.uniform(0, within))
            victims = self.rng.choice([[0], [1], [0, 1]])
            self.seen["random"] += bool(set(victims) & set(pair.running()))
            pair.kill(victims)
        statuses = self._end(pair, started, point or "random")
        self._read_states(point or "random")
        return statuses

    def _end(self, pair: Processes, started: float, what: str) -> list[int | None]:
        """Wait for the end of all; who was left alone before they met is ended as a launcher would."""
        first_end = None
        while not pair.wait(0.02):
            if first_end is None and len(pair.running()) < WORLD:
                first_end = time.monotonic()
            if self.start == 0.0 and self._have_met():
                self.start = time.monotonic() - started
            if first_end is None:
                continue
            if time.monotonic() - first_end > (LIMIT if self._have_met() else 1.0):
                if self._have_met():
                    self.hangs.append(f"{what}: {pair.running()} did not end")
                pair.kill(pair.running())
        self.met += self._have_met()
        if first_end is not None:
            self.slowest = max(self.slowest, time.monotonic() - first_end)
        return [ended.status for ended in pair.end()]

    def _have_met(self) -> bool:
        return all(path.exists() for path in self.marks)

    def _read_states(self, what: str) -> None:
        for state in self.states.glob("step_*"):
            try:
                checkpoint.read(state)
            except ValueError as error:
                self.unreadable.append(f"{what}: {error}")

    def at_points(self) -> None:
        """Each named point once; the kill must have happened."""
        for point in POINTS:
            codes = self.attempt(point)
            self.seen[point] = codes[POINTS[point][0]] == -signal.SIGKILL

    def at_random(self, kills: int, within: float) -> None:
        """This many kills at random moments, at most `within` seconds after a start."""
        while self.seen["random"] < kills and self.attempt(within=within) != [0, 0]:
            pass


def final(folder: Path) -> dict[str, bytes | dict]:
    """Everything that the whole run decides: logs, model folders, the last states. What the clock says is left out."""
    kinds = (".jsonl", ".json", ".safetensors")
    found = {}
    for path in folder.rglob("*"):
        if path.suffix in kinds and path.name not in ("timings.jsonl", "args.json", "manifest.json"):
            found[str(path.relative_to(folder))] = path.read_bytes()
        if path.name == "state.json":
            state = json.loads(path.read_text())
            del state["facts"]["sizes"]["timings"], state["check"]
            found[str(path.relative_to(folder))] = state
    return found


def tokenise(root: Path, backbone: Path, raw: Path, kills: int, seed: int) -> Counter:
    """Tokenise under kills: each named point, then random moments; the stores must be those of a quiet run."""
    seen = Counter()
    rng = random.Random(seed)
    words = ["--input_dir", str(raw), "--tokenizer_path", str(backbone), "--max_seq_length", "128", "--output_dir"]
    quiet, stores = root / "quiet", root / "stores"

    def start(folder: Path, point: str | None = None) -> Processes:
        return Processes(1, tokenise_until, [*words, str(folder)], point)

    start(root / "first").end()  # which also starts the fork server
    began = time.monotonic()
    start(quiet).end()
    took = time.monotonic() - began
    for point in TOKENISING:
        [ended] = start(stores, point).end()
        seen[point] += ended.status == -signal.SIGKILL
    for _ in range(kills):
        if (stores / "toy_retrieval").exists():
            shutil.rmtree(stores)  # all is done: from the beginning
        process = start(stores)
        process.wait(rng.uniform(0, took))
        process.kill([0])
        [ended] = process.end()
        seen["random"] += ended.status == -signal.SIGKILL
    start(stores).end()
    for path in sorted(quiet.rglob("*.npy")) + sorted(quiet.rglob("meta.json")):
        assert path.read_bytes() == (stores / path.relative_to(quiet)).read_bytes(), path
    assert all(not token_store.deep_check(token_store.open_store(path.parent)) for path in stores.rglob("meta.json"))
    return seen


def settings(root: Path, epochs: int) -> dict:
    """A run of 31 steps an epoch that uses all that has a state."""
    return {
        "model_path": str(root / "backbone"), "train_data_path": str(root / "stores"), "experiment_id": "killed",
        "output_dir": str(root / "output"), "tb_dir": str(root / "tb"), "cache_dir": str(root / "cache"),
        "train_batch_size": 4, "max_seq_length": 64, "num_hard_neg": 3, "learning_rate": 1e-3, "warmup_steps": 2,
        "train_epochs": epochs, "log_interval": 3, "validation_steps": 7, "checkpointing_steps": 11,
        "save_every_minutes": 1e-9,  # a state at every step
        "use_lora": True, "lora_dropout": 0.2, "use_mrl": True, "report_to": "none", "process_timeout": 10,
    }  # fmt: skip


def weather(root: Path, kills: int, epochs: int, seed: int = 0, tokenising: int = 4) -> tuple[Storm, Counter, bool]:
    """Tokenise under kills, train under kills, and say whether the end is that of a run left alone."""
    toy.make_backbone(root / "backbone")
    toy.write_raw(root / "raw")
    seen = tokenise(root, root / "backbone", root / "raw", tokenising, seed)
    quiet, storm = Storm(settings(root, epochs) | {"experiment_id": "whole"}, 0), Storm(settings(root, epochs), seed)
    began = time.monotonic()
    assert quiet.attempt() == [0, 0]
    took = time.monotonic() - began
    storm.at_points()
    # So long that some progress is made in most attempts, so short that the run outlives all kills.
    storm.at_random(kills, within=quiet.start + (took - quiet.start) / max(kills, 1))
    while storm.attempt() != [0, 0]:
        assert storm.tries < 3 * (kills + len(POINTS)), "it never ends"
    folders = [Path(storm.config["output_dir"]) / name for name in ("killed", "whole")]
    killed, whole = map(final, folders)
    assert len(whole) > 10
    return storm, seen, killed == whole


def main() -> int:
    """Print what happened as the table of benchmarks/RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as root:
        storm, tokenising, equal = weather(Path(root), flags.kills, flags.epochs, flags.seed, tokenising=20)
        steps = 31 * flags.epochs
    named = sum(storm.seen[point] for point in POINTS)
    print(f"run: {steps} steps on {WORLD} processes, {storm.tries} starts, {time.monotonic() - began:,.0f} s in all")
    print(f"kills at random moments: {storm.seen['random']}, {storm.met} starts had met; at named points: {named}")
    print(f"kills while tokenising: {sum(tokenising.values())}, of them at named points: {len(TOKENISING)}")
    print(f"unreadable states: {len(storm.unreadable)}; hangs: {len(storm.hangs)}; slowest end: {storm.slowest:.1f} s")
    print(f"final state bitwise equal: {'yes' if equal else 'NO'}")
    print("\n".join(storm.unreadable + storm.hangs), file=sys.stderr)
    sound = equal and not storm.unreadable and not storm.hangs and named == len(POINTS)
    return 0 if sound and storm.seen["random"] == flags.kills else 1


if __name__ == "__main__":
    sys.exit(main())
