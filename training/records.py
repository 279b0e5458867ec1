"""What a run writes down: sums between log lines, metrics.jsonl, trackers, the manifest, the console's lines."""

import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from torch import Tensor

from utils import all_rows


class Meter:
    """Sums of losses by (dataset, kind) and of counters between two log lines, kept on the device.

    Reading them is one collective whatever the number of datasets.
    """

    COUNTERS = ("tuples", "tokens", "computed", "heaviest")  # real tokens; positions computed; what the slowest had

    def __init__(self, names: Sequence[str], kinds: Sequence[str], device: torch.device):
        self.names, self.kinds = names, kinds
        self.sums = torch.zeros(
            len(names), len(kinds), 2, dtype=torch.float64, device="cpu" if device.type == "mps" else device
        )
        self.counters = dict.fromkeys(self.COUNTERS, 0)
        self.began = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock: validation and saving are no training."""
        stopped = time.perf_counter()
        yield
        self.began += time.perf_counter() - stopped

    def add(self, dataset: int, losses: dict[str, Tensor], rows: int) -> None:
        """Add losses that are means over `rows` rows of this process."""
        for kind, loss in losses.items():
            cell = self.sums[dataset, self.kinds.index(kind)]
            cell[0] += loss.detach() * rows
            cell[1] += rows

    def state(self) -> Tensor:
        """Everything summed since the last reading, [v] fp64."""
        counters = self.sums.new_tensor([float(self.counters[name]) for name in self.COUNTERS])
        return torch.cat([self.sums.flatten(), counters])

    def load(self, state: Tensor) -> None:
        """Go on from what `state` gave."""
        sums, counters = state.split([self.sums.numel(), len(self.COUNTERS)])
        self.sums.copy_(sums.reshape(self.sums.shape))
        self.counters = dict(zip(self.COUNTERS, map(int, counters.tolist()), strict=True))

    def count(self, **counters: int) -> None:
        """Add to the counters."""
        for name, value in counters.items():
            self.counters[name] += value

    def read(self, world: int) -> tuple[dict[str, dict[str, float]], dict[str, float], dict[str, float]]:
        """All processes' means and rates since the last reading, and start again from zero.

        Returns:
            losses: dataset name -> kind -> mean over all processes' rows; only what occurred.
            shares: padding (of the positions computed), and imbalance (how much more than the mean the process with
            most tokens had, step by step).
            timings: tuples_per_second, tokens_per_second (real ones), and peak_gib, the fullest process's memory.
        """
        now = time.perf_counter()
        vector = torch.cat([self.state(), self.sums.new_tensor([peak_gib(self.sums.device)])])
        rows = all_rows(vector, world).cpu()  # [world, datasets * kinds * 2 + counters + 1]
        sums, counters, peaks = rows.split([self.sums.numel(), len(self.COUNTERS), 1], dim=1)
        losses = {
            name: means
            for name, cells in zip(self.names, sums.sum(0).reshape(self.sums.shape).tolist(), strict=True)
            if (means := {kind: total / n for kind, (total, n) in zip(self.kinds, cells, strict=True) if n})
        }
        tuples, tokens, computed, heaviest = counters.sum(0).tolist()
        shares = {
            "padding": 1 - tokens / max(computed, 1),
            "imbalance": heaviest / max(tokens, 1) - 1 if world > 1 else 0.0,
        }
        timings = {
            "tuples_per_second": tuples / (now - self.began),
            "tokens_per_second": tokens / (now - self.began),
            "peak_gib": peaks.max().item(),
        }
        self.sums.zero_()
        self.counters = dict.fromkeys(self.COUNTERS, 0)
        self.began = now
        return losses, shares, timings


def task_means(losses: dict[str, dict[str, float]], tasks: dict[str, str]) -> dict[tuple[str, str], float]:
    """(task, kind) -> mean over the datasets of that task, each weighing the same, as the published logs have it."""
    groups: dict[tuple[str, str], list[float]] = {}
    for name, means in losses.items():
        for kind, value in means.items():
            groups.setdefault((tasks[name], kind), []).append(value)
    return {key: sum(values) / len(values) for key, values in groups.items()}


def format_means(means: dict[tuple[str, str], float]) -> str:
    """Means as people read them: "retrieval in_batch 1.2345 hard 0.4567 | clustering hard 0.8912"."""
    tasks = dict.fromkeys(task for task, _ in means)
    return " | ".join(
        " ".join([task, *(f"{kind} {value:.4f}" for (own, kind), value in means.items() if own == task)])
        for task in tasks
    )


def format_train_line(step: int, steps: int, means: dict[tuple[str, str], float], values: dict) -> str:
    """The console's line about the steps since the last one."""
    return (
        f"step {step}/{steps} | {format_means(means)} | lr {values['lr']:.2e} | grad {values['grad_norm'] or math.nan:.3f} | "
        f"{values['tuples_per_second']:.1f} tuples/s {values['tokens_per_second'] / 1e3:.1f}k tokens/s | "
        f"padding {values['padding']:.0%} | imbalance {values['imbalance']:.0%} | "
        f"{values['peak_gib']:.2f} GiB"
    )


def write_manifest(path: Path, accelerator: Accelerator, data: dict) -> None:
    """What ran, where, on what: versions, commit, hardware, processes, checksums of the data."""
    cuda = accelerator.device.type == "cuda"
    manifest = {
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "accelerate", "peft")},
        "commit": _commit(),
        "hardware": torch.cuda.get_device_name()
        if cuda
        else f"{platform.machine()}, {torch.get_num_threads()} threads",
        "num_processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "data": data,
    }
    path.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _commit() -> str | None:
    """This repository's commit, "-dirty" with local changes; None where git or the repository is missing."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return (
            subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True).stdout.strip()
            or None
        )
    except OSError:
        return None


def tracker_problems(names: list[str]) -> list[str]:
    """Why numbers cannot be sent to these trackers, one line each."""
    installed = {str(getattr(name, "value", name)) for name in get_available_trackers()}
    problems = []
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            problems.append(f"report_to: {name!r} is none of {', '.join(LOGGER_TYPE_TO_CLASS)}, none")
        elif name not in installed:
            problems.append(f"report_to: {name} is not installed: pip install {name}, or take another")
    return problems


class Metrics:
    """Where numbers go: metrics.jsonl, timings.jsonl, and accelerate's trackers (TensorBoard and others).

    metrics.jsonl is a function of the configuration alone: a resumed run writes the bytes of an uninterrupted one. What
    the clock says goes into timings.jsonl. On every process but the main one this does nothing.

    Args:
        sizes: bytes of the two files when the run was last saved; what a killed run wrote after that is dropped.
    """

    FILES = ("metrics", "timings")

    def __init__(self, accelerator: Accelerator, folder: Path, sizes: dict[str, int]):
        self.accelerator, self.files = accelerator, {}
        for name in self.FILES if accelerator.is_main_process else ():
            file = self.files[name] = open(folder / f"{name}.jsonl", "ab")
            if file.tell() < sizes.get(name, 0):
                accelerator.print(f"{file.name}: shorter than this run left it: lines of earlier steps are gone")
            file.truncate(min(file.tell(), sizes.get(name, 0)))

    def write(self, step: int, kind: str, values: dict, tags: dict[str, float], timings: dict | None = None) -> None:
        """A line {"step", "kind", **values} of metrics.jsonl, one of timings.jsonl; `tags` go to the trackers."""
        for name, content in (("metrics", values), ("timings", timings)) if self.files else ():
            if content is not None:
                line = json.dumps({"step": step, "kind": kind} | content, allow_nan=False) + "\n"
                self.files[name].write(line.encode())
                self.files[name].flush()
        if self.files:
            self.accelerator.log(tags, step=step)

    def sizes(self) -> dict[str, int]:
        """Bytes of each file, all of them on the disk."""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        return {name: os.fstat(file.fileno()).st_size for name, file in self.files.items()}

    def close(self) -> None:
        """Flush everything."""
        for file in self.files.values():
            file.close()
        for tracker in self.accelerator.trackers if self.files else ():
            tracker.finish()


def peak_gib(device: torch.device) -> float:
    """The most memory this process has held, GiB: on CUDA of the device's allocator, elsewhere resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
