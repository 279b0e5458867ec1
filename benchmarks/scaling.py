"""One process with all cores against several with their share, at the same global batch, in turn.

    python -m examples.code_search.quickstart --backbone random && python -m benchmarks.scaling

Prints tuples/s of each engine (the median of the log lines of all rounds), and checks that all of them logged the same
losses. On one machine's cores this measures what the engines cost, not what more machines give.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from benchmarks.common import measure_in_turn


@dataclass(frozen=True)
class Launch:
    """One way to run the same training."""

    processes: int
    engine: str = ""  # configuration of accelerate; none for a plain Python process

    def command(self) -> list[str]:
        """What stands before run.py."""
        if not self.engine:
            return [sys.executable]
        return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", self.engine]


ONE = "one process"
LAUNCHES = {
    ONE: Launch(1),
    "2 processes, DDP": Launch(2, "configs/accelerate_cpu.yaml"),
    "2 processes, FSDP2": Launch(2, "configs/accelerate_fsdp_cpu.yaml"),
}


def main() -> None:
    """Run every launch in turn, several times, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="examples/code_search/random.json")
    parser.add_argument("--batch", type=int, default=256, help="tuples of a global batch")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    flags = parser.parse_args()
    trainings = {
        name: partial(train, launch, flags.config, flags.batch, flags.steps) for name, launch in LAUNCHES.items()
    }
    logs = measure_in_turn(trainings, flags.rounds)
    speeds = {name: statistics.median(speeds_of(rounds)) for name, rounds in logs.items()}
    reference = losses_of(chain.from_iterable(logs[ONE]))
    for name, speed in speeds.items():
        pairs = zip(losses_of(chain.from_iterable(logs[name])), reference, strict=True)
        difference = max(abs(loss / expected - 1) for loss, expected in pairs)
        gain = speed / speeds[ONE]
        print(f"{name:24}{speed:8.0f} tuples/s{gain:8.2f}x   losses differ by {difference:.0e} at most")


def train(launch: Launch, config: str, global_batch: int, steps: int) -> list[dict]:
    """The log lines of one training, each with its losses and its timings."""
    with tempfile.TemporaryDirectory() as folder:
        values = {
            "experiment_id": "scaling",
            "output_dir": folder,
            "tb_dir": folder,
            "train_steps": steps,
            "log_interval": 10,
            "validation_steps": 0,
            "checkpointing_steps": 0,
            "report_to": "none",
            "seed": 0,
            "train_batch_size": global_batch // launch.processes,
        }
        words = [word for key, value in values.items() for word in (f"--{key}", str(value))]
        environment = dict(os.environ)
        if "fsdp" not in launch.engine:
            environment["ACCELERATE_USE_CPU"] = "true"
        subprocess.run(
            [*launch.command(), "run.py", "--config", config, *words],
            check=True,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        metrics = read_lines(Path(folder) / "scaling" / "metrics.jsonl")
        timings = read_lines(Path(folder) / "scaling" / "timings.jsonl")
    lines = [metric | timing for metric, timing in zip(metrics, timings, strict=True)]
    return [line for line in lines if line["kind"] == "train"]


def read_lines(path: Path) -> list[dict]:
    """The objects of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def speeds_of(rounds: list[list[dict]]) -> list[float]:
    """tuples/s of all log lines but the first of each training, which warms up."""
    return [line["tuples_per_second"] for lines in rounds for line in lines[1:]]


def losses_of(lines: Iterable[dict]) -> list[float]:
    """All losses of log lines about training, in their order."""
    losses = []
    for line in lines:
        for by_name in line["losses"].values():
            losses += by_name.values()
    return losses


if __name__ == "__main__":
    main()
