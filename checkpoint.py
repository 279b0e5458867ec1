"""The state of a run on disk: whole or absent.

    state/step_N/*.safetensors      what a resume needs
    state/step_N/state.json         facts, and the checksum of each file and of itself; written last

A state is written aside, flushed, and renamed; only then are old states removed. So a kill at any byte leaves the
newest whole state where it was. A damaged one is passed over for the one before it, loudly. Nothing is pickled.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT = 1


def write(folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], facts: dict, keep: int) -> Path:
    """Publish the state of `step` below `folder`, then remove all but the newest `keep`.

    Args:
        tensors: file stem -> name -> tensor on the CPU.
        facts: what JSON can hold, for `read`.
    """
    final, aside = folder / f"step_{step}", folder / f".step_{step}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    digests = {}
    for stem, named in tensors.items():
        save_file({name: tensor.contiguous() for name, tensor in named.items()}, aside / f"{stem}.safetensors")
        _flush(aside / f"{stem}.safetensors")
        digests[stem] = _digest(aside / f"{stem}.safetensors")
    body = {"format": FORMAT, "step": step, "sha256": digests, "facts": facts}
    (aside / "state.json").write_text(json.dumps(body | {"check": _check(body)}, indent=1) + "\n", encoding="utf-8")
    _flush(aside / "state.json")
    _flush(aside)
    shutil.rmtree(final, ignore_errors=True)  # of a step that was reached before, passed over as damaged
    os.replace(aside, final)
    _flush(folder)
    for old in _steps(folder)[keep:]:
        shutil.rmtree(folder / f"step_{old}")
    return final


def newest(folder: Path, say: Callable[[str], None]) -> tuple[int, dict, dict[str, dict[str, Tensor]]] | None:
    """(step, facts, tensors) of the newest whole state, or None where there is none.

    Args:
        say: is given a line about each state that is passed over.

    Raises:
        ValueError: there are states, and none of them is whole.
    """
    steps = _steps(folder)
    for step in steps:
        try:
            return read(folder / f"step_{step}")
        except ValueError as error:
            say(f"{error}: going back to the state before it")
    if steps:
        raise ValueError(f"{folder}: no state in it is whole; move the folder away to begin again")
    return None


def read(folder: Path) -> tuple[int, dict, dict[str, dict[str, Tensor]]]:
    """(step, facts, tensors) of one state.

    Raises:
        ValueError: a file is missing, cut, or not what was written.
    """
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if state.pop("check") != _check(state):
            raise ValueError(f"{folder}/state.json: checksum differs: the file was damaged")
        if state["format"] != FORMAT:
            raise ValueError(f"{folder}: of another format ({state['format']}, not {FORMAT})")
        for stem, digest in state["sha256"].items():
            if _digest(folder / f"{stem}.safetensors") != digest:
                raise ValueError(f"{folder}/{stem}.safetensors: checksum differs: the file was damaged")
        tensors = {stem: load_file(folder / f"{stem}.safetensors") for stem in state["sha256"]}
        return state["step"], state["facts"], tensors
    except (OSError, KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
        raise ValueError(f"{folder}: not a whole state ({type(error).__name__}: {error})") from None


def _steps(folder: Path) -> list[int]:
    """Steps of the states in a folder, newest first."""
    names = [path.name for path in folder.glob("step_*") if path.is_dir() and path.name[5:].isdigit()]
    return sorted((int(name[5:]) for name in names), reverse=True)


def _check(body: dict) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Make a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
