"""The state of a run on disk: whole or absent.

    state/step_N/weights-00001-of-00004.safetensors     the rows of the first of four processes; moments likewise
    state/step_N/processes-00001-of-00004.safetensors   each process's sums of the next log line
    state/step_N/state.json                             facts, and the checksum of each file and of itself; written last

Each process writes and flushes its own files, all into one folder with a temporary name. When all have, the main
process adds state.json and renames the folder; only then are old states removed, each renamed before its first file
goes. So after a kill of any process at any byte every folder called step_N is a whole state, and the next start removes
the others. A state that was damaged later is passed over for the one before it, with a warning. Nothing is pickled.
States of format 1 had one file of each kind (weights.safetensors), and are read all the same.
"""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError
from torch import Tensor

from runtime import shards
from utils import file_digest, is_sealed, publish, read_json, remove, retire, seal, write_json

FORMAT = 2
_READERS = 8  # files whose checksums are computed at a time
Tensors = dict[str, dict[str, Tensor]]  # kind -> name -> tensor


class State(NamedTuple):
    """What was found in the folder of one state."""

    step: int  # optimizer updates done
    facts: dict  # as given to `finish`
    tensors: dict[str, shards.Shards]  # by kind; nothing of them has been read yet


def aside_of(folder: Path, step: int, start: str) -> Path:
    """Where the state of `step` is written until it is whole.

    Args:
        start: names this start of the run. A process of an earlier start may live on for a while, cut off from the
            others, and must not write into this one's files.
    """
    return folder / f".step_{step}.{start}"


def write_part(aside: Path, tensors: Tensors, number: int, count: int) -> dict[str, str]:
    """Write what one process holds of a state, and flush it to the disk.

    Args:
        tensors: on the CPU; a kind without tensors gets no file.
        number, count: this process among those that write.

    Returns:
        File name -> checksum.
    """
    digests = {}
    for kind, named in tensors.items():
        if named:
            aside.mkdir(parents=True, exist_ok=True)
            name = f"{kind}-{number + 1:05d}-of-{count:05d}.safetensors"
            digests[name] = shards.write_file(aside / name, named)
    return digests


def finish(aside: Path, step: int, digests: dict[str, str], facts: dict, keep: int) -> Path:
    """Publish a state when all processes have written, then remove all but the newest `keep` up to this step.

    Args:
        digests: file name -> checksum, of all processes.
        facts: what JSON can hold, for `read`.

    Returns:
        The folder of the new state.
    """
    body = {"format": FORMAT, "step": step, "sha256": digests, "facts": facts}
    write_json(aside / "state.json", seal(body), indent=1)
    final = aside.with_name(f"step_{step}")
    publish(final, aside)  # in place of a state of this step that was passed over as damaged
    _remove_old_states(aside.parent, step, keep)
    return final


def folders(folder: Path) -> list[Path]:
    """The folders of all states in a folder, newest first."""
    return [folder / f"step_{step}" for step in _steps(folder)]


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary folders that killed processes left behind."""
    for left_behind in folder.glob(".step_*"):
        remove(left_behind)


def newest(folder: Path, warn: Callable[[str], None]) -> State | None:
    """The newest whole state, or None if there is none.

    Args:
        warn: called with a line about each state that is passed over.

    Raises:
        ValueError: there are states, and none of them is whole.
    """
    states = folders(folder)
    for state in states:
        try:
            return read(state)
        except ValueError as error:
            warn(f"{error}: going back to the state before it")
    if states:
        raise ValueError(f"{folder}: no state in it is intact; move the folder away to begin again")
    return None


def read(folder: Path) -> State:
    """One state, after its checksums were found to be right.

    Raises:
        ValueError: a file is missing, cut, or not what was written.
    """
    with _damage_of(folder):
        return _read_whole(folder)


def read_facts(folder: Path) -> dict:
    """The facts of one state, without a look at its tensors. Raises ValueError if state.json is missing or damaged."""
    with _damage_of(folder):
        return _read_body(folder)["facts"]


@contextmanager
def _damage_of(folder: Path) -> Iterator[None]:
    """What goes wrong in reading a state, as a ValueError."""
    try:
        yield
    except (OSError, KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
        raise ValueError(f"{folder}: not an intact state ({type(error).__name__}: {error})") from None


def _read_body(folder: Path) -> dict:
    """What state.json holds."""
    body = read_json(folder / "state.json")
    if not is_sealed(body):
        raise ValueError(f"{folder}/state.json: checksum differs: the file was damaged")
    return body


def _read_whole(folder: Path) -> State:
    body = _read_body(folder)
    digests = _digest_of_file(folder, body)
    with ThreadPoolExecutor(_READERS) as pool:
        found = list(pool.map(file_digest, [folder / name for name in digests]))
    for name, digest in zip(digests, found, strict=True):
        if digest != digests[name]:
            raise ValueError(f"{folder}/{name}: checksum differs: the file was damaged")
    paths_of_kind = {}
    for name in sorted(digests):  # which is the order of the processes, and of the rows
        kind = name.removesuffix(".safetensors").partition("-")[0]
        paths_of_kind.setdefault(kind, []).append(folder / name)
    tensors = {kind: shards.Shards(paths) for kind, paths in paths_of_kind.items()}
    return State(body["step"], body["facts"], tensors)


def _digest_of_file(folder: Path, body: dict) -> dict[str, str]:
    """File name -> checksum, of either format."""
    if body["format"] == FORMAT:
        return body["sha256"]
    if body["format"] == 1:
        return {f"{kind}.safetensors": digest for kind, digest in body["sha256"].items()}
    raise ValueError(f"{folder}: of another format ({body['format']}, not {FORMAT})")


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
    if state.exists():  # a folder step_007 counts as step 7, but nothing of this name is there
        retire(state)
