"""Kill a run again and again, at any moment, and compare how it ends with a run that was never killed.

    make chaos                                      1,000 kills over twelve runs; an hour or two
    make chaos KILLS=96                             the same with fewer
    PYTHONPATH=. python tests/chaos.py --kills 100 --only "4 x fsdp"
    python -m pytest tests/runtime/test_chaos.py    one run: killed at each named point, then at a few random moments

A run trains the toy with everything that has a state: Matryoshka, three datasets, a saved state at every step, a search
in a retrieval set at every eighth step with the best model kept; all weights, or LoRA with dropout. One process or all
get SIGKILL, at the points of tests/kill_points.py or at a random moment. The processes that are left must then end by
themselves, every saved state must be whole, and the same command must continue the run.

Most runs keep their number of processes and their engine: at the end weights, moments, logs and model folders must be,
byte for byte, those of the reference, a run that was never killed. In a changing run each start draws another number of
processes and another engine: at the end the logs must name the same steps, the best model must be of the same step, and
losses and weights must be within BOUNDS of the reference.
"""

import argparse
import faulthandler
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial, partialmethod
from pathlib import Path

import toy
from harness import Processes, start_door
from kill_points import POINTS, TOKENISING
from safetensors.torch import load_file

import tokenize_data_qwen
from data import token_store, tokenising
from retrieval import vectors
from runtime import checkpoint, heartbeat, resume
from training.best import Evaluations
from training.folders import BEST, steps_of

LIMIT = 60.0  # seconds in which a process must end after another was killed: six times `process_timeout`
STILL = 300.0  # seconds without a new state and without an end, after which the processes count as hanging. A limit on
# the whole attempt would not do: four processes take 10 s for it on an idle core and a minute on a busy one.
STEPS_AN_EPOCH = 33
EVALUATION_STEPS = 8
TUPLES = 8  # of a global batch
Way = tuple[int, str]  # processes, engine
WAYS: list[Way] = [(1, "ddp"), (2, "ddp"), (2, "fsdp"), (4, "ddp"), (4, "fsdp")]  # one process has nothing to shard
KINDS = {"full": {"use_lora": False}, "LoRA with dropout": {"use_lora": True, "lora_dropout": 0.2}}
# Of a changing run: how far it may be from the reference. Sums over processes round differently, and AdamW enlarges
# that. Dropout is drawn for each process, and so differs with their number: over 330 steps that nobody kills, 2 or 4
# processes are off from one by 1.1 in the worst log line, by 0.02 to 0.03 in the median, and by 0.05 in the weights.
BOUNDS = {
    "full": {"worst loss": 1e-3, "median loss": 1e-3, "weights": 1e-3},  # losses relative, weights absolute
    "LoRA with dropout": {"worst loss": 1.5, "median loss": 0.1, "weights": 0.1},
}


# ----------------------------------------------------------------------------------------- processes


def victim_at(point: str, world: int) -> int:
    """The process that dies at a point."""
    return min(POINTS[point][0], world - 1)


def prepare(point: str | None, mark: str, world: int, rank: int) -> None:
    """Have a process leave a mark when all processes have met, and die at a point if it is the one to die there."""
    where, name = (heartbeat.Heartbeat, "__init__") if world > 1 else (resume, "lock_folder")
    begin = getattr(where, name)

    def watch(*words):
        Path(f"{mark}.{rank}").touch()  # from here on the processes end by themselves, without a launcher
        return begin(*words)

    setattr(where, name, watch)
    faulthandler.register(signal.SIGUSR2)  # prints the stacks of all threads
    Evaluations.note = partialmethod(note_by_step, Evaluations.note)
    vectors._FEWEST = 8  # documents of a chunk: so few that every process has some to search
    if point and rank == victim_at(point, world):
        _, where, name, replacement = POINTS[point]
        setattr(where, name, replacement(getattr(where, name)))


def note_by_step(self, note, step: int, results: dict) -> bool:
    """Have two of three evaluations find the best model so far: it is written often, and no rounding decides when."""
    value = float(step) if step // EVALUATION_STEPS % 3 else 0.0
    return note(self, step, {name: {"32": {"nDCG@10": value}} for name in results})


def tokenise_until(rank: int, world: int, words: list[str], point: str | None) -> None:
    """Tokenise in small pieces, and die at a point."""
    tokenising.BATCH_TEXTS = 416
    tokenising.COMMIT_ROWS = 32
    if point:
        where, name, replacement = TOKENISING[point]
        setattr(where, name, replacement(getattr(where, name)))
    sys.exit(tokenize_data_qwen.main(words))


# ------------------------------------------------------------------------------------------- killed runs


@dataclass
class KilledRun:
    """A run that is started and killed many times, and what was seen of it."""

    config: dict
    ways: list[Way]  # each start draws one
    seed: int
    met: int = 0  # attempts in which all processes had met
    seen: Counter = field(default_factory=Counter)  # point, or "random" -> kills that happened
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
        """Wait until all have ended. Where one ended before they had met, end the others as a launcher would."""
        first_end = None
        newest, moved = None, started
        while not group.wait(0.02):
            now = time.monotonic()
            if self.start == 0.0 and self._have_met():
                self.start = now - started
            if first_end is None and len(group.running()) < len(self.marks):
                first_end = now
            if self._newest_state() != newest:
                newest, moved = self._newest_state(), now
            if first_end is None and now - moved > STILL:
                self._give_up(group, f"{what}: no new state in {STILL:.0f} s after {newest}")
            elif first_end is not None and now - first_end > (LIMIT if self._have_met() else 1.0):
                if self._have_met():
                    self._give_up(group, f"{what}: {group.running()} did not end")
                group.kill(group.running())
        self.met += self._have_met()
        if first_end is not None:
            self.slowest = max(self.slowest, time.monotonic() - first_end)
        return [ended.status for ended in group.end()]

    def _give_up(self, group: Processes, what: str) -> None:
        """Note a hang with where each process stands, and kill all."""
        hanging = group.running()
        group.kill(hanging, signal.SIGUSR2)
        group.wait(2.0)
        group.kill(hanging)
        places = [f"process {rank} prints\n{group.printed[rank].decode(errors='replace')}" for rank in hanging]
        self.hangs.append("\n".join([what, *places]))

    def _newest_state(self) -> str | None:
        steps = [int(path.name.removeprefix("step_")) for path in self.states.glob("step_*[0-9]")]
        return f"step_{max(steps)}" if steps else None

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
    """What a run ends in: logs, model folders, the last states, without what depends on the clock."""
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
    """Tokenise under kills, at each named point and at random moments; the stores must be those of a reference."""
    seen = Counter()
    rng = random.Random(seed)
    words = ["--input_dir", str(raw), "--tokenizer_path", str(backbone), "--max_seq_length", "128", "--output_dir"]
    reference, stores = root / "reference", root / "stores"

    def start(folder: Path, point: str | None = None) -> Processes:
        return Processes(1, tokenise_until, [*words, str(folder)], point)

    start(root / "first").end()  # which also starts the fork server
    began = time.monotonic()
    assert [ended.status for ended in start(reference).end()] == [0]
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
    for path in sorted(reference.rglob("*.npy")) + sorted(reference.rglob("meta.json")):
        assert path.read_bytes() == (stores / path.relative_to(reference)).read_bytes(), path
    assert all(not token_store.deep_check(token_store.open_store(path.parent)) for path in stores.rglob("meta.json"))
    return seen


def deviation(killed: Path, whole: Path, kind: str) -> str:
    """What is wrong with the end of a changing run; empty where it is within BOUNDS of the reference."""
    lines, expected = (read_lines(folder / "metrics.jsonl") for folder in (killed, whole))
    if [(line["kind"], line["step"]) for line in lines] != [(line["kind"], line["step"]) for line in expected]:
        return "the logs name other steps"
    if steps_of(killed / BEST) != steps_of(whole / BEST):
        return "the best model is of another step"
    losses = list(map(loss_difference, lines, expected))
    off = {"worst loss": max(losses), "median loss": statistics.median(losses), "weights": 0.0}
    names = [str(path.relative_to(whole)) for path in whole.glob("*/*model.safetensors")]
    assert names
    for name in names:
        ours, theirs = load_file(killed / name), load_file(whole / name)
        off["weights"] = max(off["weights"], *(float((ours[key] - theirs[key]).abs().max()) for key in theirs))
    found = ", ".join(f"{what} {value:.2g}" for what, value in off.items())
    print(f"{kind}, off by: {found}, in {len(lines)} log lines and {len(names)} folders")
    return "" if all(off[what] <= BOUNDS[kind][what] for what in off) else f"off by: {found}"


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
        "evaluation_data_path": str(root / "sets"), "evaluation_steps": EVALUATION_STEPS, "best_metric": "nDCG@10",
    }  # fmt: skip


def train_under_kills(
    root: Path, ways: list[Way], kind: str, kills: int, epochs: int, seed: int = 0
) -> tuple[KilledRun, str]:
    """Train a reference, and train the same under kills at each named point and at random moments.

    Args:
        root: holds what `prepare_data` writes.
        ways: one, or several for a changing run.

    Returns:
        (the killed run, what is wrong with its end: empty where it is that of the reference)
    """
    config = settings(root, epochs, kind)
    reference = KilledRun(config | {"experiment_id": "whole"}, ways[:1], 0)
    run = KilledRun(config, ways, seed)
    began = time.monotonic()
    assert reference.attempt()
    took = time.monotonic() - began
    run.at_points()
    # So long that some progress is made in most attempts, so short that the run outlives all kills.
    run.at_random(kills, within=reference.start + (took - reference.start) / max(kills, 1))
    run.to_its_end(tries=3 * (kills + len(POINTS)))
    killed, whole = (Path(config["output_dir"]) / name for name in ("killed", "whole"))
    assert len(final(whole)) > 10
    assert steps_of(whole / BEST) > EVALUATION_STEPS
    if len(ways) > 1:
        return run, deviation(killed, whole, kind)
    ours, theirs = final(killed), final(whole)
    differing = [name for name in theirs.keys() | ours.keys() if ours.get(name) != theirs.get(name)]
    return run, f"other bytes: {differing}" if differing else ""


def prepare_data(root: Path, tokenising: int, seed: int = 0) -> Counter:
    """Write backbone, retrieval set and stores of the toy; tokenise under kills, and return how many there were."""
    toy.make_backbone(root / "backbone")
    toy.write_retrieval_set(root / "sets" / "search", queries=10, documents=30)
    toy.write_raw(root / "raw")
    return tokenise(root, root / "backbone", root / "raw", tokenising, seed)


def main(argv: list[str] | None = None) -> int:
    """Print what happened as the table of benchmarks/RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000, help="at random moments, over all runs (default 1000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", default="", metavar="TEXT", help='runs with this in their name: "full", "changing", "4 x fsdp"'
    )
    flags = parser.parse_args(argv)
    every_run = [([way], kind) for kind in KINDS for way in WAYS] + [(WAYS, kind) for kind in KINDS]
    runs = [(ways, kind) for ways, kind in every_run if flags.only in name_of(ways, kind)]
    if not runs:
        names = "\n".join(f"  {name_of(ways, kind)}" for ways, kind in every_run)
        parser.error(f"--only {flags.only!r}: no run has this in its name; the runs are\n{names}")
    os.environ["HF_HUB_OFFLINE"] = "1"
    began = time.monotonic()
    kills = -(-flags.kills // len(runs))  # of a run
    epochs = max(1, round(kills / 8))  # some four steps a kill
    problems = []
    total = Counter()
    slowest = 0.0
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        tokenising = prepare_data(root, tokenising=20, seed=flags.seed)
        print(f"kills while tokenising: {sum(tokenising.values())}, of them at named points: {len(TOKENISING)}")
        for number, (ways, kind) in enumerate(runs):
            what = name_of(ways, kind)
            run, problem = train_under_kills(root, ways, kind, kills, epochs, flags.seed + number)
            hit = [point for point in POINTS if run.seen[point]]
            print(
                f"{what}: {epochs * STEPS_AN_EPOCH} steps, {run.tries} starts, {run.met} had met; kills at random "
                f"moments {run.seen['random']}, at named points {len(hit)}; slowest end {run.slowest:.1f} s",
                flush=True,
            )
            faults = [*run.unreadable, *run.hangs, *filter(None, [problem])]
            problems += [f"{what}: {fault}" for fault in faults]
            problems += [f"{what}: nobody was killed {point}" for point in POINTS if point not in hit]
            total.update(random=run.seen["random"], named=len(hit), starts=run.tries)
            slowest = max(slowest, run.slowest)
            shutil.rmtree(root / "output")
    print(f"in all: {total['starts']} starts, {total['random']} random kills, {total['named']} at named points")
    print(f"slowest end: {slowest:.1f} s; {time.monotonic() - began:,.0f} s in all; problems: {len(problems)}")
    print("\n".join(problems), file=sys.stderr)
    return 1 if problems or total["random"] < flags.kills * 0.9 else 0  # some come too late, when a run is over


def name_of(ways: list[Way], kind: str) -> str:
    """What a run is called: "full, 4 x fsdp"."""
    if len(ways) > 1:
        return f"{kind}, changing"
    [(world, engine)] = ways
    return f"{kind}, {world} x {engine}"


if __name__ == "__main__":
    sys.exit(main())
