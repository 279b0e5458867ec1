"""One process with all cores against several with their share, at the same global batch, in turn.

    make quickstart && python -m benchmarks.scaling

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
from pathlib import Path

WAYS = {  # name -> (processes, how it is launched)
    "one process": (1, []),
    "2 processes, DDP": (2, ["-m", "accelerate.commands.launch", "--config_file", "configs/accelerate_cpu.yaml"]),
    "2 processes, FSDP2": (
        2,
        ["-m", "accelerate.commands.launch", "--config_file", "configs/accelerate_fsdp_cpu.yaml"],
    ),
}


def main() -> None:
    """Run every way in turn, several times, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="examples/code_search/config.json")
    parser.add_argument("--batch", type=int, default=256, help="tuples of a global batch")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    flags = parser.parse_args()
    speeds, losses = {name: [] for name in WAYS}, {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(flags.rounds):
            for name, (processes, launcher) in WAYS.items():
                lines = train(
                    launcher, processes, flags, Path(folder), f"{number}{name}".replace(" ", "").replace(",", "")
                )
                speeds[name] += [line["tuples_per_second"] for line in lines[1:]]  # the first one warms up
                losses[name] = [
                    value for line in lines for kinds in line["losses"].values() for value in kinds.values()
                ]
    base = statistics.median(speeds["one process"])
    for name, values in speeds.items():
        middle = statistics.median(values)
        difference = max(abs(a / b - 1) for a, b in zip(losses[name], losses["one process"], strict=True))
        print(f"{name:24}{middle:8.0f} tuples/s{middle / base:8.2f}x   losses differ by {difference:.0e} at most")


def train(launcher: list[str], processes: int, flags: argparse.Namespace, folder: Path, name: str) -> list[dict]:
    """The log lines of one run."""
    values = {
        "experiment_id": name, "output_dir": folder, "tb_dir": folder, "train_steps": flags.steps, "log_interval": 10,
        "validation_steps": 0, "checkpointing_steps": 0, "report_to": "none", "seed": 0,
        "train_batch_size": flags.batch // processes,
    }  # fmt: skip
    words = [word for key, value in values.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, *launcher, "run.py", "--config", flags.config, *words]
    environment = os.environ | ({} if "fsdp" in str(launcher) else {"ACCELERATE_USE_CPU": "true"})
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics, timings = (
        [json.loads(line) for line in (folder / name / f"{kind}.jsonl").read_text().splitlines()]
        for kind in ("metrics", "timings")
    )
    return [a | b for a, b in zip(metrics, timings, strict=True) if a["kind"] == "train"]


if __name__ == "__main__":
    main()
