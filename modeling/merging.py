"""The weighted average of model folders, tensor by tensor: memory holds one weights file at a time.

Folders are compared by their headers first: the same tensors of the same shapes. The average is taken in fp32, or in
fp64 where weights are, and rounded once to the type of the first folder's tensor.
"""

import math
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from modeling.hub import models_below
from utils import aside_of, file_digest, let_others_read, plural, publish, read_json, remove, write_json

RECORD = "merged_from.json"  # what an average was made of
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_KEYS_SHOWN = 3  # of configs that differ
_VALUE_SHOWN = 30  # characters of such a key's value
# Keys of config.json that say how a folder was written, not what the model is.
_NOT_THE_MODEL = {"transformers_version", "dtype", "torch_dtype", "_name_or_path"}


def merge_problems(folders: list[Path], weights: list[float]) -> list[str]:
    """Why these folders cannot be averaged, one line each. Reads configs and headers, no tensor."""
    problems = _weight_problems(folders, weights)
    tables = {}
    for folder in folders:
        try:
            tables[folder] = shapes(folder)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            problems.append(f"{folder}: no readable model folder ({error}){models_below(folder)}")
    for folder in folders[1:]:
        if folder in tables and folders[0] in tables:
            problems += _difference(folders[0], folder, tables)
    return problems


def _weight_problems(folders: list[Path], weights: list[float]) -> list[str]:
    """What is wrong with the number of folders and their weights."""
    problems = []
    if len(folders) < 2:
        problems.append("give two folders or more")
    if len(weights) != len(folders):
        problems.append(f"{len(weights)} weights for {len(folders)} folders: give one for each")
    bad = [weight for weight in weights if not math.isfinite(weight) or weight < 0]
    problems += [f"weight {weight}: must be 0 or more" for weight in bad]
    if not bad and sum(weights) == 0:
        problems.append("the weights add up to 0")
    return problems


def _difference(first: Path, folder: Path, tables: dict[Path, dict]) -> list[str]:
    """How `folder` differs from `first` in what must be the same."""
    problems = []
    for name in sorted(tables[first].keys() | tables[folder].keys()):
        ours = tables[first].get(name, "missing")
        theirs = tables[folder].get(name, "missing")
        if ours != theirs:
            problems.append(f"{folder}: {name} is {theirs}, in {first} it is {ours}")
            break  # the others differ for the same reason
    settings = _setting_differences(_model_settings(first), _model_settings(folder))
    if settings:
        problems.append(f"{folder}: its config.json is not that of {first}: {settings}")
    tokenizers = [path / "tokenizer.json" for path in (first, folder)]
    if all(path.is_file() for path in tokenizers) and file_digest(tokenizers[0]) != file_digest(tokenizers[1]):
        problems.append(f"{folder}: its tokenizer.json is not that of {first}")
    return problems


def _setting_differences(ours: dict, theirs: dict) -> str:
    """Which keys of a config are others than in the first one, for people; "" for none."""
    different = [key for key in sorted(ours.keys() | theirs.keys()) if ours.get(key) != theirs.get(key)]
    shown = []
    for key in different[:_KEYS_SHOWN]:
        shown.append(f"{key} {_cut(theirs.get(key))} instead of {_cut(ours.get(key))}")
    if len(different) > _KEYS_SHOWN:
        shown.append(f"and {plural(len(different) - _KEYS_SHOWN, 'other key')}")
    return ", ".join(shown)


def _cut(value) -> str:
    """A value of a config; a list of all layers is not shown whole."""
    text = repr(value)
    return text if len(text) <= _VALUE_SHOWN else f"{text[:_VALUE_SHOWN]}..."


def _model_settings(folder: Path) -> dict:
    """config.json without what says how it was written."""
    config = read_json(folder / "config.json")
    return {key: value for key, value in config.items() if key not in _NOT_THE_MODEL}


def shapes(folder: Path) -> dict[str, list[int]]:
    """Tensor -> shape, from the headers of a folder's weights files."""
    if (folder / "adapter_config.json").exists():
        raise ValueError("it is a LoRA adapter: make a model of it with python -m tools.merge_adapter")
    read_json(folder / "config.json")
    found = {}
    for path in sorted(set(weight_files(folder).values())):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 — no dictionary
                found[name] = file.get_slice(name).get_shape()
    return found


def weight_files(folder: Path) -> dict[str, Path]:
    """Tensor -> the safetensors file that holds it.

    Raises:
        OSError: there is none.
        ValueError, KeyError: the file is not an index.
    """
    index = folder / _INDEX
    if index.exists():
        return {name: folder / Path(file).name for name, file in read_json(index)["weight_map"].items()}
    with safe_open(folder / _SINGLE, framework="pt") as file:
        return dict.fromkeys(file.keys(), folder / _SINGLE)


def merge(folders: list[Path], weights: list[float], target: Path) -> None:
    """Write the average of model folders; all else is the first folder's.

    Args:
        weights: of each folder; divided by their sum.

    Raises:
        FileExistsError: there is something at `target` already.
        ValueError: the folders do not fit together, see `merge_problems`.
    """
    if target.exists():
        raise FileExistsError(f"{target} already exists")
    problems = merge_problems(folders, weights)
    if problems:
        raise ValueError("\n".join(problems))
    shares = [weight / sum(weights) for weight in weights]
    aside = aside_of(target)
    remove(aside)
    shutil.copytree(folders[0], aside, ignore=partial(_weights_of, folders[0]))
    with ExitStack() as stack:
        readers = [_Reader(folder, stack) for folder in folders]
        for path, names in _files_of(folders[0]):
            averaged = {name: average([reader.read(name) for reader in readers], shares) for name in names}
            save_file(averaged, aside / path.name, metadata={"format": "pt"})
    write_json(aside / RECORD, {"folders": [str(folder) for folder in folders], "shares": shares})
    let_others_read(aside)
    publish(target)


def _weights_of(model: Path, folder: str, names: list[str]) -> list[str]:
    """What is not copied of `folder`: the model's own weights. Those of its modules, as 2_Dense, are."""
    if Path(folder) != model:
        return []
    return [name for name in names if name == RECORD or name.endswith((".safetensors", ".bin", ".pt"))]


def average(tensors: list[Tensor], shares: list[float]) -> Tensor:
    """The weighted sum, in fp32 or fp64, rounded once to the type of the first tensor.

    Args:
        tensors: of one shape.
        shares: adding up to 1.
    """
    first = tensors[0]
    if not first.is_floating_point():
        return first
    exact = torch.promote_types(first.dtype, torch.float32)
    total = torch.zeros(first.shape, dtype=exact)
    for tensor, share in zip(tensors, shares, strict=True):
        total.add_(tensor.to(exact), alpha=share)
    return total.to(first.dtype)


class _Reader:
    """Reads tensors of one folder by name; its files stay open until the stack closes."""

    def __init__(self, folder: Path, stack: ExitStack):
        self.files = weight_files(folder)
        self.stack = stack
        self.opened = {}

    def read(self, name: str) -> Tensor:
        """The tensor, from the file that holds it."""
        path = self.files[name]
        if path not in self.opened:
            self.opened[path] = self.stack.enter_context(safe_open(path, framework="pt"))
        return self.opened[path].get_tensor(name)


def _files_of(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Each weights file of a folder and the tensors in it, with a progress bar over the files."""
    by_file: dict[Path, list[str]] = {}
    for name, path in weight_files(folder).items():
        by_file.setdefault(path, []).append(name)
    for path in tqdm(sorted(by_file), desc="averaging", unit="file", disable=None):
        yield path, sorted(by_file[path])
