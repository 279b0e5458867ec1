"""Kill a run again and again, anywhere, and compare what it ends in with a run that nobody touched.

    make chaos                                      1,000 kills over twelve storms; an hour or two
    make chaos KILLS=96                             the same with fewer
    PYTHONPATH=. python tests/chaos.py --kills 100 --only "4 x fsdp"
    python -m pytest tests/runtime/test_chaos.py    one storm: each named point once, then a few at random moments

A storm is one run of the toy: Matryoshka, three datasets, a state at every step, full or LoRA with dropout. Processes
get SIGKILL, one or all; who is left must end by itself; every state that lies there must be whole; the same command
goes on. In a steady storm number of processes and engine stay as they are: at the end weights, moments, logs and model
folders must be, byte for byte, those of the run that was left alone. In a changing storm each start draws another
number of processes and another engine: at the end the logs must name the same steps, with losses and weights within
BOUNDS of that run's.
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
from safetensors.torch import load_file

import tokenize_data_qwen
from data import store_writer, token_store, tokenising
from export import model_folder, probe
from runtime import background, checkpoint, heartbeat, resume, shards
from training import objective, records, reports

LIMIT = 60.0  # seconds in which a process must end after another was killed: six times `process_timeout`
STEPS_AN_EPOCH = 33
TUPLES = 8  # of a global batch
Way = tuple[int, str]  # processes, engine
WAYS: list[Way] = [(1, "ddp"), (2, "ddp"), (2, "fsdp"), (4, "ddp"), (4, "fsdp")]  # one process has nothing to shard
KINDS = {"full": {"use_lora": False}, "LoRA with dropout": {"use_lora": True, "lora_dropout": 0.2}}
# Of a changing storm: how far losses (relative) and weights (absolute) may be from the quiet run's. Sums over processes
# round otherwise, and AdamW makes much of little; dropout is drawn for each process, and so differs with their number.
BOUNDS = {"full": (1e-3, 1e-3), "LoRA with dropout": (0.5, 0.1)}


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


def half(path: Path, *_) -> None:
    """What a full cache and a power cut make of a file."""
    os.truncate(path, path.stat().st_size // 2)


def half_a_line(metrics, *_) -> None:
    if metrics.files:
        os.write(metrics.files["metrics"].fileno(), b'{"step": 7, "ki')


def to_state(_, path) -> bool:
    return Path(path).parent.name == "state" and Path(path).name.startswith("step_")


def to_model_folder(_, path) -> bool:
    return Path(path).parent.name != "state" and Path(path).name.startswith(("step_", "epoch_"))


def of_moments(path, *_) -> bool:
    return Path(path).name.startswith("moments")


def on_old_state(path, *_) -> bool:
    return Path(path).name.endswith(".old") and Path(path).exists()


POINTS = {  # name -> (rank, or the last where there are fewer; where, attribute, its replacement)
    "before the backward pass": (1, Accelerator, "backward", before),
    "in the gather": (1, objective, "gather", before),
    "in the optimizer's step": (0, torch.optim.AdamW, "step", after),
    "in the collective that agrees to stop": (1, reports.Reports, "send", before),
    "in validation": (1, objective.Objective, "measures", before),
    "in the middle of a log line": (0, records.Metrics, "write", lambda f: after(f, spoil=half_a_line)),
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
    "between a state and its model folder": (0, model_folder, "save", before),
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


def victim_at(point: str, world: int) -> int:
    """The process that dies at a point."""
    return min(POINTS[point][0], world - 1)


def prepare(point: str | None, mark: str, world: int, rank: int) -> None:
    """Let a process of the run leave a mark when all have met, and die at a point if that is its part."""
    where, name = (heartbeat.Heartbeat, "__init__") if world > 1 else (resume, "lock_folder")
    begin = getattr(where, name)

    def watch(*words):
        Path(f"{mark}.{rank}").touch()  # from here on nobody needs the launcher to end
        return begin(*words)

    setattr(where, name, watch)
    if point and rank == victim_at(point, world):
        _, where, name, replacement = POINTS[point]
        setattr(where, name, replacement(getattr(where, name)))


def tokenise_until(rank: int, world: int, words: list[str], point: str | None) -> None:
    """The tokenising door, in small pieces, which dies at a point."""
    tokenising.BATCH_TEXTS = 416
    tokenising.COMMIT_ROWS = 32
    if point:
        where, name, replacement = TOKENISING[point]
        setattr(where, name, replacement(getattr(where, name)))
    sys.exit(tokenize_data_qwen.main(words))


# --------------------------------------------------------------------------------------------- storm


@dataclass
class Storm:
    """A run under kills, and what was seen."""

    config: dict
    ways: list[Way]  # each start draws one
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

    def attempt(self, point: str | None = None, within: float | None = None) -> bool:
        """Start all processes; let one die at a point, or kill some at a random moment; watch how the rest ends.

        Returns:
            Whether the run is finished.
        """
        self.tries += 1
        world, kind = self.rng.choice(self.ways)
        mark = f"{self.config['cache_dir']}.met"
        self.marks = [Path(f"{mark}.{rank}") for rank in range(world)]
        for path in self.marks:
            path.unlink(missing_ok=True)
        config = self.config | {"train_batch_size": TUPLES // world}
        group = start_door(world, config, partial(prepare, point, mark, world), kind)
        started = time.monotonic()
        if within is not None:
            group.wait(self.rng.uniform(0, within))
            every = list(range(world))
            victims = self.rng.choice([*([rank] for rank in every), every])
            self.seen["random"] += bool(set(victims) & set(group.running()))
            group.kill(victims)
        statuses = self._end(group, started, point or "random")
        if point:
            self.seen[point] += statuses[victim_at(point, world)] == -signal.SIGKILL
        self._read_states(point or "random")
        return statuses == [0] * world

    def _end(self, group: Processes, started: float, what: str) -> list[int | None]:
        """Wait for the end of all; who was left alone before they met is ended as a launcher would."""
        first_end = None
        while not group.wait(0.02):
            if first_end is None and len(group.running()) < len(self.marks):
                first_end = time.monotonic()
            if self.start == 0.0 and self._have_met():
                self.start = time.monotonic() - started
            if first_end is None:
                continue
            if time.monotonic() - first_end > (LIMIT if self._have_met() else 1.0):
                if self._have_met():
                    self.hangs.append(f"{what}: {group.running()} did not end")
                group.kill(group.running())
        self.met += self._have_met()
        if first_end is not None:
            self.slowest = max(self.slowest, time.monotonic() - first_end)
        return [ended.status for ended in group.end()]

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
            self.attempt(point)

    def at_random(self, kills: int, within: float) -> None:
        """This many kills at random moments, at most `within` seconds after a start."""
        while self.seen["random"] < kills and not self.attempt(within=within):
            pass

    def to_its_end(self, tries: int) -> None:
        """Start again until the run is finished."""
        while not self.attempt():
            assert self.tries < tries, "it never ends"


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


def nearly(killed: Path, whole: Path, kind: str) -> str:
    """What is wrong with the end of a changing storm; empty where it is within BOUNDS of the quiet run's."""
    most_of_losses, most_of_weights = BOUNDS[kind]
    lines, expected = (read_lines(folder / "metrics.jsonl") for folder in (killed, whole))
    if [(line["kind"], line["step"]) for line in lines] != [(line["kind"], line["step"]) for line in expected]:
        return "the logs name other steps"
    off_losses = max(map(loss_difference, lines, expected))
    names = [str(path.relative_to(whole)) for path in whole.glob("*_*/*model.safetensors")]
    off_weights = 0.0
    for name in names:
        ours, theirs = load_file(killed / name), load_file(whole / name)
        off_weights = max(off_weights, *(float((ours[key] - theirs[key]).abs().max()) for key in theirs))
    print(f"{kind}: losses off by {off_losses:.2g} at most, weights of {len(names)} folders by {off_weights:.2g}")
    is_near = names and off_losses <= most_of_losses and off_weights <= most_of_weights
    return "" if is_near else f"losses off by {off_losses:.2g}, weights by {off_weights:.2g}"


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def loss_difference(line: dict, expected: dict) -> float:
    """The largest relative difference between the losses of two log lines."""
    most = 0.0
    for name, losses in expected.get("losses", {}).items():
        for kind, loss in losses.items():
            most = max(most, abs(line["losses"][name][kind] - loss) / max(abs(loss), 0.1))
    return most


def settings(root: Path, epochs: int, kind: str) -> dict:
    """A run of 33 steps an epoch that uses all that has a state."""
    return KINDS[kind] | {
        "model_path": str(root / "backbone"), "train_data_path": str(root / "stores"), "experiment_id": "killed",
        "output_dir": str(root / "output"), "tb_dir": str(root / "tb"), "cache_dir": str(root / "cache"),
        "max_seq_length": 64, "num_hard_neg": 3, "learning_rate": 1e-3, "warmup_steps": 2,
        "train_epochs": epochs, "log_interval": 3, "validation_steps": 7, "checkpointing_steps": 11,
        "save_every_minutes": 1e-9,  # a state at every step
        "use_mrl": True, "report_to": "none", "process_timeout": 10,
    }  # fmt: skip


def weather(
    root: Path, ways: list[Way], kind: str, kills: int, epochs: int, seed: int = 0, named: bool = True
) -> tuple[Storm, str]:
    """Train under kills.

    Args:
        root: holds backbone/ and stores/, of `lay_ground`.
        ways: one for a steady storm, several for a changing one.
        named: kill at each named point too.

    Returns:
        (the storm, what is wrong with its end: empty where it is that of a run left alone)
    """
    config = settings(root, epochs, kind)
    quiet = Storm(config | {"experiment_id": "whole"}, ways[:1], 0)
    storm = Storm(config, ways, seed)
    began = time.monotonic()
    assert quiet.attempt()
    took = time.monotonic() - began
    if named:
        storm.at_points()
    # So long that some progress is made in most attempts, so short that the run outlives all kills.
    storm.at_random(kills, within=quiet.start + (took - quiet.start) / max(kills, 1))
    storm.to_its_end(tries=3 * (kills + len(POINTS)))
    killed, whole = (Path(config["output_dir"]) / name for name in ("killed", "whole"))
    assert len(final(whole)) > 10
    if len(ways) > 1:
        return storm, nearly(killed, whole, kind)
    ours, theirs = final(killed), final(whole)
    differing = [name for name in theirs.keys() | ours.keys() if ours.get(name) != theirs.get(name)]
    return storm, f"other bytes: {differing}" if differing else ""


def lay_ground(root: Path, tokenising: int, seed: int = 0) -> Counter:
    """Backbone and stores of the toy; they are tokenised under kills, which are counted."""
    toy.make_backbone(root / "backbone")
    toy.write_raw(root / "raw")
    return tokenise(root, root / "backbone", root / "raw", tokenising, seed)


def main() -> int:
    """Print what happened as the table of benchmarks/RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000, help="at random moments, over all storms")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", metavar="TEXT", help='storms so called: "full", "changing", "4 x fsdp"')
    flags = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    began = time.monotonic()
    storms = [([way], kind) for kind in KINDS for way in WAYS] + [(WAYS, kind) for kind in KINDS]
    storms = [(ways, kind) for ways, kind in storms if flags.only in f"{kind}, {describe(ways)}"]
    kills = -(-flags.kills // len(storms))  # of a storm
    epochs = max(1, round(kills / 8))  # some four steps a kill
    problems = []
    total = Counter()
    slowest = 0.0
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        tokenising = lay_ground(root, tokenising=20, seed=flags.seed)
        print(f"kills while tokenising: {sum(tokenising.values())}, of them at named points: {len(TOKENISING)}")
        for number, (ways, kind) in enumerate(storms):
            what = f"{kind}, {describe(ways)}"
            storm, problem = weather(root, ways, kind, kills, epochs, flags.seed + number)
            hit = [point for point in POINTS if storm.seen[point]]
            print(
                f"{what}: {epochs * STEPS_AN_EPOCH} steps, {storm.tries} starts, {storm.met} had met; kills at random "
                f"moments {storm.seen['random']}, at named points {len(hit)}; slowest end {storm.slowest:.1f} s",
                flush=True,
            )
            faults = [*storm.unreadable, *storm.hangs, *filter(None, [problem])]
            problems += [f"{what}: {fault}" for fault in faults]
            problems += [f"{what}: nobody was killed {point}" for point in POINTS if point not in hit]
            total.update(random=storm.seen["random"], named=len(hit), starts=storm.tries)
            slowest = max(slowest, storm.slowest)
            shutil.rmtree(root / "output")
    print(f"in all: {total['starts']} starts, {total['random']} random kills, {total['named']} at named points")
    print(f"slowest end: {slowest:.1f} s; {time.monotonic() - began:,.0f} s in all; problems: {len(problems)}")
    print("\n".join(problems), file=sys.stderr)
    return 1 if problems or total["random"] < flags.kills * 0.9 else 0  # some come too late, when a run is over


def describe(ways: list[Way]) -> str:
    """A storm's ways in words."""
    if len(ways) > 1:
        return "changing"
    [(world, kind)] = ways
    return f"{world} x {kind}"


if __name__ == "__main__":
    sys.exit(main())
