"""States are written while training continues: the loop stops only until the numbers are copied to CPU memory.

Each process copies its rows, and a thread writes, hashes and flushes them. It leaves their checksums in the key-value
store at which the processes met (torch.distributed.Store). When all checksums are there, the main process's thread
publishes the state: it writes state.json and renames the folder.

The threads use no collectives: NCCL and gloo pair collectives by their order, and would pair a thread's with those of
the training. Nor can publishing wait for the loop's next collective: between two steps a model folder is written, read
back, and perhaps refused, and by then what was trained must be safe on the disk.
"""

import json
import math
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from accelerate import Accelerator

from runtime import checkpoint, computing, engine, heartbeat
from runtime.collectives import all_rows
from runtime.resume import from_main
from utils import RunError

_PATIENCE = 60.0  # seconds that an error waits for the state that is being written
_PIECE = 2**30  # bytes of pinned memory that tensors share; a power of two
_ALIGNED = 512  # bytes; each tensor in a piece begins at a multiple of it
_LOOKING = 40.0  # seconds; a network file system may remember for 30 that a file was not there


class SavedState(NamedTuple):
    """A state that has been published."""

    step: int
    path: Path
    size: int  # bytes, of all processes
    seconds: float  # from the step until it was published
    waited: float  # seconds of them in which training stood still

    def __str__(self) -> str:
        """For the console."""
        return (
            f"state {self.path}, {self.size / 1e6:,.1f} MB in {self.seconds:.1f} s, "
            f"of which training waited {self.waited:.2f}"
        )


class StateWriter:
    """One process's part in writing states, at most one at a time.

    `begin` and `wait` are called by all processes alike; `check` by each for itself. As a context manager it waits at
    the end for the state that is being written, also after an error.

    Args:
        folder: of the states. Every process that can see it writes its rows; under DDP those that cannot, on other
            machines, leave it to the others.
        keep: how many states are kept.

    Raises:
        RunError: on every process: under FSDP2 one cannot see the folder, and no other process has its rows.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, keep: int):
        self.accelerator = accelerator
        self.folder = folder
        self.keep = keep
        self.rank = accelerator.process_index
        self.world = accelerator.num_processes
        if accelerator.is_main_process:
            checkpoint.remove_leftovers(folder)
        self.start = from_main(accelerator, uuid.uuid4().hex[:8])
        self.number, self.count = self._place_among_writers()
        self.store = dist.HashStore() if self.world == 1 else heartbeat.new_connection()
        first = computing.first_in_thread(accelerator.device)
        self.pool = ThreadPoolExecutor(1, "state writer", initializer=first)  # its thread starts with the first work
        self.copies: checkpoint.Tensors = {}
        self.room: Future | None = None  # memory for the first copies, being allocated
        self.written: Future | None = None  # this process's part: checksums of its files
        self.published: Future | None = None  # the whole state: a SavedState on the main process; None once waited for
        self.unannounced: Future | None = None  # the same, until `check` has returned it

    def __enter__(self) -> "StateWriter":
        """Nothing is to be done before the first state."""
        return self

    def __exit__(self, _kind, error: BaseException | None, _traceback) -> None:
        """Wait for the state that is being written."""
        if error is None:
            self.wait()
        elif self.published is not None and not heartbeat.is_lost_contact(error):  # it needs the other processes
            wait([self.published], _PATIENCE)
        self.pool.shutdown(wait=False)

    def make_room(self, tensors: checkpoint.Tensors) -> None:
        """Begin to get the memory for copies of such tensors, so that the first state need not wait for it.

        On CUDA it is page-locked, and a gigabyte takes some tenths of a second to get. Elsewhere nothing is done, since
        memory costs nothing until it is written to.
        """
        if self.accelerator.device.type == "cuda":
            self.room = self.pool.submit(_rooms_for, tensors)

    def begin(self, step: int, tensors: checkpoint.Tensors, facts: dict, began: float) -> None:
        """Copy this process's part of a state, and have it written; the state before must have been waited for.

        Args:
            tensors: live, on their device.
            facts: what JSON can hold; the main process's count.
            began: time.monotonic() when training stood still.
        """
        if self.room is not None:
            self.copies = self.room.result()
            self.room = None
        self.copies = copy_to_cpu(tensors, self.copies)
        waited = time.monotonic() - began
        self.written = self.pool.submit(self._write, step)
        self.published = self.pool.submit(self._publish, step, self.written, facts, began, waited)
        self.unannounced = self.published

    def wait(self) -> None:
        """Wait until the state that was begun is published; a collective.

        Raises:
            OSError: the disk refuses it.
        """
        if self.published is None:
            return
        self.written.result()
        self.accelerator.wait_for_everyone()  # fails at once where a process is gone; the store would wait long for it
        self.published.result()
        self.published = None

    def check(self) -> SavedState | None:
        """What has been published since the last call; None on all but the main process.

        Raises:
            OSError: the disk refused it.
        """
        if self.written is not None and self.written.done():
            self.written.result()
        if self.unannounced is None or not self.unannounced.done():
            return None
        state = self.unannounced.result()
        self.unannounced = None
        return state

    def _write(self, step: int) -> dict[str, str]:
        if self.number is None:
            return {}
        aside = checkpoint.aside_of(self.folder, step, self.start)
        return checkpoint.write_part(aside, self.copies, self.number, self.count)

    def _publish(self, step: int, written: Future, facts: dict, began: float, waited: float) -> SavedState | None:
        """Leave this process's checksums in the store; the main process publishes the state when it has all of them."""
        digests = written.result()
        key = f"state/{self.start}/{step}"
        self.store.set(f"{key}/{self.rank}", json.dumps(digests))
        if self.rank != 0:
            self.store.wait([f"{key}/published"], engine.COLLECTIVE_TIMEOUT)
            return None
        keys = [f"{key}/{rank}" for rank in range(self.world)]
        self.store.wait(keys, engine.COLLECTIVE_TIMEOUT)
        for other in keys[1:]:
            digests |= json.loads(self.store.get(other))
        aside = checkpoint.aside_of(self.folder, step, self.start)
        path = checkpoint.finish(aside, step, digests, facts, self.keep)
        self.store.set(f"{key}/published", "yes")
        size = sum(file.stat().st_size for file in path.iterdir())
        return SavedState(step, path, size, time.monotonic() - began, waited)

    def _place_among_writers(self) -> tuple[int | None, int]:
        """(this process's number among those that write, None if it does not write; how many write)"""
        if self.world == 1:
            return 0, 1
        mark = self.folder.parent / f".meeting-{self.start}"
        if self.accelerator.is_main_process:
            for left_behind in mark.parent.glob(".meeting-*"):  # by a start that was killed
                left_behind.unlink()
            mark.touch()
        self.accelerator.wait_for_everyone()
        seen = torch.tensor([float(appears(mark, _LOOKING))], device=self.accelerator.device)
        writes = all_rows(seen, self.world).flatten().bool().tolist()
        if self.accelerator.is_main_process:
            mark.unlink()
        if engine.is_sharded(self.accelerator) and not all(writes):
            raise RunError(
                f"output_dir: process {writes.index(False)} does not see {self.folder.parent}, and under FSDP2 each "
                "process writes its own part of a state: take a folder that all machines share, or DDP"
            )
        return sum(writes[: self.rank]) if writes[self.rank] else None, sum(writes)


def appears(path: Path, seconds: float) -> bool:
    """Whether something is at `path`, or appears there within so many seconds."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def copy_to_cpu(tensors: checkpoint.Tensors, earlier: checkpoint.Tensors) -> checkpoint.Tensors:
    """Copies of tensors in CPU memory, complete on return.

    Args:
        earlier: copies that are no longer needed. Their memory is used again: a GPU copies several times as fast into
            pinned memory, but to allocate a gigabyte of it takes some tenths of a second.
    """
    missing: checkpoint.Tensors = {}
    for kind, named in tensors.items():
        missing[kind] = {name: tensor for name, tensor in named.items() if name not in earlier.get(kind, {})}
    rooms = _rooms_for(missing)
    copies: checkpoint.Tensors = {}
    for kind, named in tensors.items():
        room_of = earlier.get(kind, {}) | rooms[kind]
        copies[kind] = {name: room_of[name].copy_(tensor.detach(), non_blocking=True) for name, tensor in named.items()}
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return copies


def _rooms_for(tensors: checkpoint.Tensors) -> checkpoint.Tensors:
    """CPU memory for copies of tensors; for those of a GPU pinned, and several in one piece (`places_in_pieces`)."""
    listed = [(kind, name, tensor) for kind, named in tensors.items() for name, tensor in named.items()]
    sizes = [tensor.numel() * tensor.element_size() for _, _, tensor in listed]
    places = places_in_pieces(sizes)
    lengths = [0] * (1 + max((piece for piece, _ in places), default=-1))
    for (piece, begin), size in zip(places, sizes, strict=True):
        lengths[piece] = max(lengths[piece], begin + size)
    pin = any(tensor.is_cuda for _, _, tensor in listed)
    pieces = [torch.empty(length, dtype=torch.uint8, pin_memory=pin) for length in lengths]
    rooms: checkpoint.Tensors = {kind: {} for kind in tensors}
    for (kind, name, tensor), (piece, begin), size in zip(listed, places, sizes, strict=True):
        rooms[kind][name] = pieces[piece][begin : begin + size].view(tensor.dtype).view(tensor.shape)
    return rooms


def places_in_pieces(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Where each of some tensors lies in pieces of memory: (piece, first byte).

    torch rounds each piece of pinned memory up to a power of two. With a piece for each tensor the states of 4B took
    1.41 times their size, so tensors share pieces of at most _PIECE bytes, the largest first; a larger one has its own.

    >>> places_in_pieces([2**20, 2**30 - 2**20, 2**31, 100, 8])
    [(1, 1072693248), (1, 0), (0, 0), (2, 0), (2, 512)]

    Args:
        sizes: bytes of each.
    """
    places = [(0, 0)] * len(sizes)
    ends: list[int] = []  # of each piece, the first byte that is free
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        size = sizes[number]
        piece = next((piece for piece, end in enumerate(ends) if end + size <= _PIECE), len(ends))
        if piece == len(ends):
            ends.append(0)
        places[number] = (piece, ends[piece])
        ends[piece] += math.ceil(size / _ALIGNED) * _ALIGNED
    return places
