"""Run folders made by hand, as training would leave them, without training. Imported by tests only."""

import json
import math
from pathlib import Path

TASKS = {"pairs": "retrieval", "more_pairs": "retrieval", "topics": "clustering"}
DIMENSIONS = (8, 16, 32)
METRICS = ("nDCG@10", "MRR@10", "recall@10")


def training_line(step: int, steps_per_epoch: int = 50, scale: float = 1.0) -> dict:
    """A line about the steps up to `step`; the third dataset comes in every second line only."""
    loss = scale * (0.2 + math.exp(-step / 40))
    losses = {"pairs": {"in_batch": loss, "hard": loss / 3}, "more_pairs": {"in_batch": 2 * loss, "hard": loss}}
    if step % 20 == 0:
        losses["topics"] = {"hard": loss / 7}
    return {
        "step": step,
        "kind": "train",
        "epoch": step / steps_per_epoch,
        "lr": 1e-3 * (1 - step / 200),
        "grad_norm": None if step == 30 else 1 + math.cos(step),
        "padding": 0.03,
        "imbalance": 0.0001,
        "losses": losses,
    }


def validation_line(step: int, scale: float = 1.0) -> dict:
    """Held-out losses and ranks, of prefixes too."""
    measures = {}
    for name in TASKS:
        of_name = {}
        for place, end in enumerate(["@8", "@16", ""]):
            of_name[f"hard{end}"] = scale * (1.5 - place / 4 + 1 / step)
            of_name[f"group_accuracy{end}"] = 0.3 + place / 10 + step / 1000
            of_name[f"group_mrr{end}"] = 0.5 + place / 10 + step / 1000
            if TASKS[name] == "retrieval":
                of_name[f"in_batch{end}"] = scale * (1.2 - place / 4 + 1 / step)
        measures[name] = of_name
    return {"step": step, "kind": "validation", "measures": measures}


def evaluation_line(step: int, scale: float = 1.0) -> dict:
    """Two retrieval sets at three numbers of dimensions."""
    sets = {}
    for share, name in ((1.0, "code"), (0.8, "packages")):
        sets[name] = {}
        for place, dimension in enumerate(DIMENSIONS):
            value = share * scale * (0.3 + step / 400) * (0.8 + place / 10)
            sets[name][str(dimension)] = {metric: value / (1 + rank / 9) for rank, metric in enumerate(METRICS)}
    return {"step": step, "kind": "evaluation", "sets": sets}


def write_lines(path: Path, lines: list[dict]) -> None:
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_run(folder: Path, scale: float = 1.0, steps: int = 100, pace: float = 60.0, **configuration) -> Path:
    """A run of `steps` steps with training, validation and evaluation lines; returns its folder.

    Args:
        scale: of its losses, so that runs differ.
        pace: seconds from a log line to the next, which are ten steps.
        configuration: keys of args.json that are not the defaults.
    """
    folder.mkdir(parents=True)
    lines = [training_line(step, scale=scale) for step in range(10, steps + 1, 10)]
    for step in range(50, steps + 1, 50):
        lines += [validation_line(step, scale), evaluation_line(step, scale)]
    write_lines(folder / "metrics.jsonl", lines)
    timings = []
    for step in range(10, steps + 1, 10):
        speeds = {"tuples_per_second": 20 + scale + step % 7, "tokens_per_second": 2000.5 + step, "peak_gib": 3.25}
        timings.append({"step": step, "kind": "train", "seconds": pace} | speeds)
    write_lines(folder / "timings.jsonl", timings)
    keys = {
        "model_path": "models/small",
        "experiment_id": folder.name,
        "output_dir": str(folder.parent),
        "cache_dir": "cache",
        "tb_dir": "tb",
        "train_data_path": "stores",
        "train_batch_size": 32,
        "max_seq_length": 64,
        "train_steps": steps,
        "train_epochs": 5,
        "learning_rate": 1e-3,
        "use_mrl": True,
    }
    (folder / "args.json").write_text(json.dumps(keys | configuration))
    manifest = {"versions": {"torch": "2.13.0"}, "num_processes": 2, "mixed_precision": "bf16", "tasks": TASKS}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder
