"""The state of a run on disk: whole or absent.

    state/step_N/*.safetensors      what a resume needs
    state/step_N/state.json         facts, and the checksum of each file and of itself; written last

A state is written aside, flushed, and renamed; only then are old states removed, each renamed before its first file
goes. So a kill at any byte leaves whole states alone under their names, and what lies aside is cleared by the next
write. A state that was damaged later is passed over for the one before it, loudly. Nothing is pickled.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from utils import flush, is_sealed, read_json, remove, seal

FORMAT = 1


def write(folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], facts: dict, keep: int) -> Path:
    """Publish the state of `step` below `folder`, then remove all but the newest `keep` up to this step.

    Args:
        tensors: file stem -> name -> tensor on the CPU.
        facts: what JSON can hold, for `read`.
    """
    final, aside = folder / f"step_{step}", folder / f".step_{step}.partial"
    for left in [aside, *folder.glob(".step_*")]:
        remove(left)
    aside.mkdir(parents=True)
    digests = {}
    for stem, named in tensors.items():
        save_file({name: tensor.contiguous() for name, tensor in named.items()}, aside / f"{stem}.safetensors")
        flush(aside / f"{stem}.safetensors")
        digests[stem] = _digest(aside / f"{stem}.safetensors")
    body = {"format": FORMAT, "step": step, "sha256": digests, "facts": facts}
    (aside / "state.json").write_text(json.dumps(seal(body), indent=1) + "\n", encoding="utf-8")
    flush(aside / "state.json")
    flush(aside)
    _retire(final)  # of a step that was reached before, passed over as damaged
    os.replace(aside, final)
    flush(folder)
    steps = _steps(folder)
    later = [other for other in steps if other > step]  # damaged, or left behind by a resume from an older state
    for old in later + [other for other in steps if other <= step][keep:]:
        _retire(folder / f"step_{old}")
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
        state = read_json(folder / "state.json")
        if not is_sealed(state):
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


def _retire(state: Path) -> None:
    """Remove a state in one step: its name goes first."""
    if state.exists():
        os.replace(state, state.with_name(f".{state.name}.old"))
        remove(state.with_name(f".{state.name}.old"))


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
