"""Settings of single datasets: one JSON file beside the data, checked as the configuration is.

    {"*": {"temperature": 0.05}, "msmarco": {"num_hard_neg": 15, "sampling_weight": 2}}

A dataset's own entry wins over "*", key by key, and both over the configuration. null stands for what the configuration
says: a dataset's null takes a key of "*" back. A mistake raises nothing: `read` returns every problem it found.
"""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from configuration.keys import did_you_mean, key, normalised, value_problem
from utils import first_line, read_strictly

FILE_NAME = "dataset_settings.json"
ALL = "*"  # stands for the name of every dataset
LOSSES = ("in_batch", "hard")  # that a dataset may train with, in the order in which they are said
# What people type who come from the configuration or from other trainers, and what it is called here.
ALIASES = {
    "num_hard_neg_clustering": "num_hard_neg",
    "num_negatives": "num_hard_neg",
    "max_seq_length": "max_length",
    "weight": "sampling_weight",
    "loss": "losses",
    "prompt": "instruction",
    "query_instruction": "instruction",
}
HINTS = {
    "task": "a dataset's task is declared when it is tokenised: --task NAME=TASK, or tasks.json",
    "train_batch_size": "a step has one size for all datasets: it is a key of the configuration",
    "learning_rate": "it is a key of the configuration, for all datasets",
}
_GROUP = "Settings of datasets"


@dataclass(frozen=True)
class Settings:
    """What is said of one dataset; None if it is left to the configuration, or to the dataset's task."""

    num_hard_neg: int | None = key(
        _GROUP, "per tuple", "hard negatives drawn each epoch, whatever the task; 0 = none", None, low=0
    )
    losses: list[str] | None = key(
        _GROUP, "", "the losses it trains with: in_batch, hard or both; without hard no negatives are drawn", None
    )
    temperature: float | None = key(_GROUP, "", "divides cosine similarities, in validation too", None, above=0)
    sampling_weight: float | None = key(
        _GROUP,
        "passes per epoch",
        "2 = every tuple twice an epoch; 0.5 = half of them, and the others in the next epoch",
        None,
        above=0,
        high=100,
    )
    max_length: int | None = key(
        _GROUP, "tokens", "longer texts are cut here, EOS kept; at most max_seq_length", None, low=2
    )
    instruction: str | None = key(
        _GROUP, "instruction", "put before each query that carries none, when the data are tokenised", None
    )


KEYS = {f.name: f for f in fields(Settings)}


@dataclass(frozen=True)
class DatasetSettings:
    """A file of settings: dataset name, or ALL, -> key -> value, as far as they are good."""

    path: Path | None = None
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)

    def of(self, name: str) -> Settings:
        """What is said of a dataset, in its own entry or for all."""
        return Settings(**self.entries.get(ALL, {}) | self.entries.get(name, {}))


def find(folder: Path, given: str | None) -> Path | None:
    """The file of settings: the one that is given, or the one in the folder of the data, where there is one."""
    if given is not None:
        return Path(given)
    path = folder / FILE_NAME
    return path if path.exists() else None


def read(path: Path | None) -> tuple[DatasetSettings, list[str]]:
    """A file of settings, and every problem with it, one line each: its JSON, keys, kinds and bounds of values.

    Args:
        path: None for no settings at all.
    """
    if path is None:
        return DatasetSettings(), []
    try:
        content, problems = read_strictly(path)
    except OSError as error:
        return DatasetSettings(path), [f"dataset_settings {path}: {error.strerror or first_line(error)}"]
    except ValueError as error:
        return DatasetSettings(path), [f"{path}: not JSON ({error})"]
    if not isinstance(content, dict):
        return DatasetSettings(path), [f"{path}: must be one object of dataset names and their settings"]
    entries = {}
    for name, entry in content.items():
        entries[name], wrong = _check_entry(name, entry)
        problems += [f"{path}: {line}" for line in wrong]
    return DatasetSettings(path, entries), problems


def unknown_names(settings: DatasetSettings, names: list[str]) -> list[str]:
    """Entries of datasets that are not there, one line each.

    Args:
        names: of all datasets.
    """
    problems = []
    for name in settings.entries:
        if name != ALL and name not in names:
            problems.append(f"{settings.path}: {name}: no such dataset{did_you_mean(name, names)}")
    return problems


def _check_entry(name: str, entry: Any) -> tuple[dict[str, Any], list[str]]:
    """(the values of an entry that are good, what is wrong with the others, one line each)."""
    if not isinstance(entry, dict):
        remedy = f'; put it under the name of a dataset, or under "{ALL}" for all' if name in KEYS else ""
        return {}, [f"{name}: {json.dumps(entry)[:40]} is not an object of settings{remedy}"]
    good = {}
    problems = []
    for setting, value in entry.items():
        if setting not in KEYS:
            problems.append(f"{name}: {setting}: no such setting{_what_it_may_be(setting)}")
            continue
        problem = value_problem(KEYS[setting], value)
        if problem is None and setting == "losses" and value is not None:
            problem = _losses_problem(value)
        if problem:
            problems.append(f"{name}: {setting}: {problem}")
        else:
            good[setting] = normalised(KEYS[setting], value)
    if good.get("num_hard_neg") and "hard" not in (good.get("losses") or LOSSES):
        problems.append(f"{name}: num_hard_neg: {good['num_hard_neg']}, but losses leave hard out: give one of them")
    return good, problems


def _losses_problem(losses: list[str]) -> str | None:
    for loss in losses:
        if loss not in LOSSES:
            return f"{json.dumps(loss)} is not one of {', '.join(LOSSES)}{did_you_mean(loss, LOSSES)}"
        if losses.count(loss) > 1:
            return f"{json.dumps(loss)} is given twice; keep one"
    return None


def _what_it_may_be(setting: str) -> str:
    if setting in HINTS:
        return f"; {HINTS[setting]}"
    if setting in ALIASES:
        return f"; did you mean {ALIASES[setting]}?"
    return did_you_mean(setting, KEYS) or f"; the settings are {', '.join(KEYS)}"
