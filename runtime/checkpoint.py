"""The state of a run on disk: whole or absent.

    state/step_N/*.safetensors      what a resume needs
    state/step_N/state.json         facts, and the checksum of each file and of itself; written last

A state is written under another name, flushed to the disk and renamed; only then are old states removed, each renamed
before its first file goes. So a kill at any byte leaves only whole states under their names, and the next write clears
away what lies under other names. A state that was damaged later is passed over for the one before it, with a warning.
Nothing is pickled.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from utils import aside_of, file_digest, is_sealed, publish, read_json, remove, seal, write_json

FORMAT = 1


class State(NamedTuple):
    """What was read from the folder of one state."""

    step: int  # optimizer updates done
    facts: dict  # as given to `write`
    tensors: dict[str, dict[str, Tensor]]  # file stem -> name -> tensor on the CPU


def write(folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], facts: dict, keep: int) -> Path:
    """Publish the state of `step` below `folder`, then remove all but the newest `keep` up to this step.

    Args:
        tensors: file stem -> name -> tensor on the CPU.
        facts: what JSON can hold, for `read`.

    Returns:
        The folder of the new state.
    """
    for left_behind in folder.glob(".step_*"):  # by a write that was killed
        remove(left_behind)
    final = folder / f"step_{step}"
    aside = aside_of(final)
    aside.mkdir(parents=True)
    digests = {}
    for stem, named in tensors.items():
        path = aside / f"{stem}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in named.items()}, path)
        digests[stem] = file_digest(path)
    body = {"format": FORMAT, "step": step, "sha256": digests, "facts": facts}
    write_json(aside / "state.json", seal(body), indent=1)
    publish(final)  # in place of a state of this step that was passed over as damaged
    _remove_old_states(folder, step, keep)
    return final


def newest(folder: Path, warn: Callable[[str], None]) -> State | None:
    """The newest whole state, or None where there is none.

    Args:
        warn: called with a line about each state that is passed over.

    Raises:
        ValueError: there are states, and none of them is whole.
    """
    steps = _steps(folder)
    for step in steps:
        try:
            return read(folder / f"step_{step}")
        except ValueError as error:
            warn(f"{error}: going back to the state before it")
    if steps:
        raise ValueError(f"{folder}: no state in it is whole; move the folder away to begin again")
    return None


def read(folder: Path) -> State:
    """One state, after its checksums were found to be right.

    Raises:
        ValueError: a file is missing, cut, or not what was written.
    """
    try:
        return _read_whole(folder)
    except (OSError, KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
        raise ValueError(f"{folder}: not a whole state ({type(error).__name__}: {error})") from None


def _read_whole(folder: Path) -> State:
    body = read_json(folder / "state.json")
    if not is_sealed(body):
        raise ValueError(f"{folder}/state.json: checksum differs: the file was damaged")
    if body["format"] != FORMAT:
        raise ValueError(f"{folder}: of another format ({body['format']}, not {FORMAT})")
    for stem, digest in body["sha256"].items():
        if file_digest(folder / f"{stem}.safetensors") != digest:
            raise ValueError(f"{folder}/{stem}.safetensors: checksum differs: the file was damaged")
    tensors = {stem: load_file(folder / f"{stem}.safetensors") for stem in body["sha256"]}
    return State(body["step"], body["facts"], tensors)


def _steps(folder: Path) -> list[int]:
    """Steps of the states in a folder, newest first: by their names, since a clock may go back."""
    numbers = [path.name.removeprefix("step_") for path in folder.glob("step_*") if path.is_dir()]
    return sorted((int(number) for number in numbers if number.isdigit()), reverse=True)


def _remove_old_states(folder: Path, step: int, keep: int) -> None:
    """Remove all states but the newest `keep` up to `step`.

    States of later steps go too: they are damaged, or were left behind by a resume from an older state.
    """
    steps = _steps(folder)
    later = [other for other in steps if other > step]
    up_to_now = [other for other in steps if other <= step]
    for old in later + up_to_now[keep:]:
        _remove_state(folder / f"step_{old}")


def _remove_state(state: Path) -> None:
    """Take a state's name away before its first file goes, so that what has the name is always whole."""
    if not state.exists():  # a folder step_007 counts as step 7, but nothing of this name is there
        return
    retired = state.with_name(f".{state.name}.old")
    os.replace(state, retired)
    remove(retired)
