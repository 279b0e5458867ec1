"""Measure this project on a GPU: one command on any CUDA machine, without a network and without `datasets`.

    python -m benchmarks.gpu --parts equality,speed               Qwen3-0.6B from its config, random weights
    python -m benchmarks.gpu --parts equality,speed --sizes 4B    a command of its own: each has ten minutes at most
    python -m benchmarks.gpu --parts run                          run.py: states, a folder, a kill, a resume
    python -m benchmarks.gpu --parts run --deterministic          the same bits after the kill?
    python -m benchmarks.gpu --sizes toy --steps 2 --tuples 2     all of it on a CPU, in minutes; for the tests

Three parts, in this order, each for every size: `equality`, all ways to compute a step must agree; `speed`, one step
beside the published layout and Sentence Transformers' cached loss, with all weights and with LoRA, on three
distributions of lengths; `run`, run.py itself with saved states, a kill and a resume. All results go into one JSON
file, which is rewritten after each piece; the tables are printed from it at the end. A piece that does not fit into
--minutes is named as left out.
"""

import os

from runtime import launcher

if __name__ == "__main__":
    launcher.use_expandable_segments()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or torch's profiler prints two lines at each of its starts

import argparse
import gc
import platform
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.common import QWEN3, Budget
from benchmarks.gpu_equality import measure_equality
from benchmarks.gpu_model import TOY, datasheet, free_memory, matmul_ceiling
from benchmarks.gpu_run import RUN_SECONDS, measure_run
from benchmarks.gpu_speed import OTHER_TABLE_SECONDS, TABLE_SECONDS, Settings, measure_speed
from benchmarks.gpu_table import judge, lines_of
from benchmarks.lengths import SHAPES
from utils import RunError, first_line, write_json

PARTS = ("equality", "speed", "run")
KINDS = ("full", "LoRA")
PACKAGES = (
    "torch", "transformers", "accelerate", "peft", "sentence-transformers", "triton", "flash-attn", "flash-attn-3",
    "liger-kernel",
)  # fmt: skip
EQUALITY_SECONDS = {TOY: 2, "0.6B": 45}  # a guess
OTHER_EQUALITY_SECONDS = 120


def main(argv: list[str] | None = None) -> int:
    """Measure what was asked for and fits, write the JSON, print the tables. Returns the exit status, 0."""
    flags = read_flags(argv)
    measuring = Measuring(flags)
    for part, size, kind in pieces(flags):
        measuring.piece(part, size, kind)
    measuring.write()
    print("\n".join(lines_of(measuring.report)), flush=True)
    say(f"{measuring.path}: everything that was found, in {measuring.report['seconds']:.0f} s")
    return 0


def read_flags(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = (TOY, *QWEN3)
    shapes = tuple(SHAPES)
    parser.add_argument("--parts", type=some_of(PARTS), default=PARTS, help=f"of {', '.join(PARTS)} (default all)")
    parser.add_argument("--sizes", type=some_of(sizes), default=("0.6B",), help=f"of {', '.join(sizes)} (default 0.6B)")
    parser.add_argument("--kinds", type=some_of(KINDS), default=KINDS, help="what is trained in `speed` (default both)")
    parser.add_argument("--lengths", type=some_of(shapes), default=shapes, help=f"of {', '.join(shapes)} (default all)")
    parser.add_argument("--tuples", type=int, default=16, help="of a step, each with 7 hard negatives (default 16)")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each way (default 10)")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all of it (default 9)")
    parser.add_argument("--compile", default="inductor", help="backend of torch.compile, or none (default inductor)")
    parser.add_argument("--liger", action="store_true", help="use Liger's kernels for every way in `speed`")
    parser.add_argument("--deterministic", action="store_true", help="the same bits each time in `run`, slower")
    parser.add_argument("--output", type=Path, default=Path("output/gpu"), help="folder (default output/gpu)")
    parser.add_argument("--work", type=Path, help="folder for models and states; tens of GB, removed")
    parser.add_argument("--json", type=Path, help="file of all figures (default in that folder, by parts and sizes)")
    return parser.parse_args(argv)


def some_of(known: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    """A type for argparse: some of the known names, with commas between them."""

    def read(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
        return names

    return read


def pieces(flags: argparse.Namespace) -> list[tuple[str, str, str]]:
    """(part, size, kind) of everything that is asked for, in the order of the parts; of most parts the kind is ""."""
    found = []
    for part in PARTS:
        kinds = flags.kinds if part == "speed" else ("",)
        if part in flags.parts:
            found += [(part, size, kind) for size in flags.sizes for kind in kinds]
    return found


class Measuring:
    """The pieces of a command, and what they found.

    Args:
        flags: from `read_flags`.
    """

    def __init__(self, flags: argparse.Namespace):
        self.flags = flags
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        name = "_".join(["gpu", *flags.parts, *flags.sizes])  # 4B's figures must not replace those of 0.6B
        self.path = flags.json or flags.output / f"{name}.json"
        self.began = time.monotonic()
        self.budget = Budget(flags.minutes)
        self.waiting = Counter(part for part, _, _ in pieces(flags))  # part -> pieces that have not begun
        machine = machine_facts(self.device)
        self.report = {
            "flags": {name: str(value) if isinstance(value, Path) else value for name, value in vars(flags).items()},
            "machine": machine,
            "versions": {package: version_of(package) for package in PACKAGES},
            "matmul_flops": matmul_ceiling(self.device),
            "datasheet_flops": datasheet(machine["device"]),
            "equality": [],
            "speed": [],
            "runs": [],
            "left_out": self.budget.left_out,
        }

    def piece(self, part: str, size: str, kind: str) -> None:
        """Measure one piece. If it fails the others are still measured: a GPU may not be available again soon."""
        what = f"{part} of {size}" + (f", {kind}" if kind else "")
        self.waiting[part] -= 1
        try:
            if part == "equality":
                self.equality(what, size)
            elif part == "speed":
                self.speed(what, size, kind)
            else:
                self.run(what, size)
        except RunError as error:  # says all there is to say
            self.budget.leave_out(what, f"failed: {first_line(error)}")
        except Exception as error:
            self.budget.leave_out(what, f"failed: {type(error).__name__}: {first_line(error)}")
            traceback.print_exc()
        gc.collect()  # models refer to themselves
        free_memory(self.device)
        self.write()

    def equality(self, what: str, size: str) -> None:
        """All ways to compute a step."""
        if self.budget.allows(what, EQUALITY_SECONDS.get(size, OTHER_EQUALITY_SECONDS)):
            say(what)
            self.report["equality"].append(measure_equality(size, self.device, self.flags.compile))

    def speed(self, what: str, size: str, kind: str) -> None:
        """Tables of steps, in this piece's share of the time; the JSON is written after each."""
        flags = self.flags
        settings = Settings(flags.tuples, flags.steps, flags.compile, flags.lengths, flags.liger)
        reserved = sum(RUN_SECONDS.get(size, 0) for size in flags.sizes) if "run" in flags.parts else 0
        share = self.budget.part((self.budget.seconds_left() - reserved) / (self.waiting["speed"] + 1))
        if share.allows(what, TABLE_SECONDS.get(size, OTHER_TABLE_SECONDS)):
            for table in measure_speed(size, kind == "LoRA", self.device, settings, share, say):
                self.report["speed"].append(table)
                self.write()

    def run(self, what: str, size: str) -> None:
        """run.py, killed and resumed."""
        if size not in RUN_SECONDS:
            self.budget.leave_out(what, f"its states are too large for this part: --sizes {', '.join(RUN_SECONDS)}")
        elif self.budget.allows(what, RUN_SECONDS[size]):
            say(what)
            flags = self.flags
            folder = (flags.work or flags.output / "work").absolute()
            seconds = self.budget.seconds_left()
            self.report["runs"].append(
                measure_run(size, self.device, folder, flags.tuples, flags.deterministic, seconds)
            )

    def write(self) -> None:
        """Write all that was found so far: the process may be ended at any time."""
        self.report["seconds"] = time.monotonic() - self.began
        self.report["targets"] = judge(self.report)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.report)


def machine_facts(device: torch.device) -> dict:
    """What the figures are measured on."""
    facts = {"device": "CPU: figures of speed are of no interest", "memory_gib": None}
    if device.type == "cuda":
        facts["device"] = torch.cuda.get_device_name()
        facts["memory_gib"] = torch.cuda.get_device_properties(device).total_memory / 2**30
    facts |= {"cuda": torch.version.cuda, "cpus": os.cpu_count(), "python": platform.python_version()}
    return facts


def version_of(package: str) -> str | None:
    """A package's version; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def say(line: str) -> None:
    """Say what is done now, beside the tables."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
