"""What a run writes down: metrics.jsonl, trackers, the manifest."""

import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import Accelerator

from training import trackers
from training.objective import LOSSES
from utils import write_json


def task_means(losses: dict[str, dict[str, float]], tasks: dict[str, str]) -> dict[tuple[str, str], float]:
    """(task, kind) -> mean over the datasets of that task, each weighing the same, as the published logs have it."""
    values_of: dict[tuple[str, str], list[float]] = {}
    for name, means in losses.items():
        for kind, value in means.items():
            values_of.setdefault((tasks[name], kind), []).append(value)
    return {key: sum(values) / len(values) for key, values in values_of.items()}


def tracker_tags(
    phase: str, by_dataset: dict[str, dict[str, float]], by_task: dict[tuple[str, str], float]
) -> dict[str, float]:
    """Tag -> value under the published names: {dataset}/training_loss_hard, Avg/{task}/valid_loss_in_batch.

    What is not a loss has a tag without the word: {dataset}/valid_group_mrr. Of a Matryoshka prefix the number of its
    dimensions stands last: {dataset}/valid_loss_in_batch@64.

    Args:
        phase: training or valid.
    """
    tags = {}
    for name, kinds in by_dataset.items():
        for kind, value in kinds.items():
            tags[f"{name}/{_tag(phase, kind)}"] = value
    for (task, kind), value in by_task.items():
        tags[f"Avg/{task}/{_tag(phase, kind)}"] = value
    return tags


def _tag(phase: str, kind: str) -> str:
    name, _, _ = kind.partition("@")
    return f"{phase}_loss_{kind}" if name in LOSSES else f"{phase}_{kind}"


def evaluation_tags(results: dict[str, dict[str, dict[str, float]]]) -> dict[str, float]:
    """Tag -> value of an evaluation: {set}/eval_nDCG@10, of shorter embeddings {set}/eval_nDCG@10@64.

    Args:
        results: set -> dimensions -> metric -> value.
    """
    tags = {}
    for name, by_dim in results.items():
        whole = max(map(int, by_dim))
        for dim, values in by_dim.items():
            ending = "" if int(dim) == whole else f"@{dim}"
            tags |= {f"{name}/eval_{metric}{ending}": value for metric, value in values.items()}
    return tags


def write_manifest(
    path: Path, accelerator: Accelerator, data: dict, tasks: dict[str, str], settings: dict[str, dict] | None = None
) -> None:
    """What ran, where, on what: versions, commit, hardware, processes, checksums, task and settings of each dataset.

    Args:
        settings: dataset name -> what its settings have changed; nothing is written of no settings.
    """
    versions = {"python": platform.python_version()}
    for package in ("torch", "transformers", "accelerate", "peft"):
        versions[package] = version(package)
    if accelerator.device.type == "cuda":
        hardware = torch.cuda.get_device_name()
    else:
        hardware = f"{platform.machine()}, {torch.get_num_threads()} threads"
    manifest = {
        "versions": versions,
        "commit": _commit(),
        "hardware": hardware,
        "num_processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "tasks": tasks,
        "data": data,
    }
    if settings:
        manifest["settings"] = settings
    write_json(path, manifest)


def _commit() -> str | None:
    """This repository's commit, "-dirty" with local changes; None if git or the repository is missing."""
    command = ["git", "describe", "--always", "--dirty"]
    repository = Path(__file__).parent.parent
    try:
        answer = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    except OSError:
        return None
    return answer.stdout.strip() or None


class Metrics:
    """Where numbers go: metrics.jsonl, timings.jsonl, and accelerate's trackers (TensorBoard and others).

    metrics.jsonl is a function of the configuration alone: a resumed run writes the bytes of an uninterrupted one. What
    the clock says goes into timings.jsonl. On every process but the main one this does nothing.

    Args:
        sizes: bytes of the two files when the run was last saved; what a killed run wrote after that is dropped.
    """

    FILES = ("metrics", "timings")

    def __init__(self, accelerator: Accelerator, folder: Path, sizes: dict[str, int]):
        self.accelerator = accelerator
        self.files = {}
        if not accelerator.is_main_process:
            return
        for name in self.FILES:
            file = open(folder / f"{name}.jsonl", "ab")
            size = sizes.get(name, 0)
            if file.tell() < size:
                accelerator.print(f"{file.name}: shorter than this run left it: lines of earlier steps are gone")
            file.truncate(min(file.tell(), size))
            self.files[name] = file

    def write(self, step: int, kind: str, values: dict, tags: dict[str, float], timings: dict | None = None) -> None:
        """A line {"step", "kind", **values} of metrics.jsonl, one of timings.jsonl; `tags` go to the trackers."""
        if not self.files:
            return
        self._write_line("metrics", {"step": step, "kind": kind} | values)
        if timings is not None:
            self._write_line("timings", {"step": step, "kind": kind} | timings)
        trackers.log(self.accelerator, tags, step)

    def _write_line(self, name: str, content: dict) -> None:
        line = json.dumps(content, allow_nan=False) + "\n"
        self.files[name].write(line.encode())
        self.files[name].flush()

    def lines(self, kind: str) -> list[dict]:
        """The lines of one kind that metrics.jsonl has; on every process but the main one, none."""
        if not self.files:
            return []
        with open(self.files["metrics"].name, "rb") as file:
            return [json.loads(line) for line in file if f'"kind": "{kind}"'.encode() in line]

    def sizes(self) -> dict[str, int]:
        """Bytes of each file, all of them on the disk."""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        return {name: os.fstat(file.fileno()).st_size for name, file in self.files.items()}

    def close(self) -> None:
        """Flush everything."""
        if not self.files:
            return
        for file in self.files.values():
            file.close()
        trackers.finish(self.accelerator)
