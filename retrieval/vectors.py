"""Vectors of many texts as shards on a disk, written by many processes and read by memory map.

    00000.npy     float32 or float16 [texts of the shard, d], unit vectors
    00000.json    {"cut": how many of its texts were longer than the model reads}

A shard is written under a temporary name and renamed when it is whole, so after a kill only missing ones are computed.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils import read_json, write_json

_FEWEST, _MOST = 256, 65536  # texts of a shard
_SHARDS = 256  # about as many are made of many texts, so that many processes have something to do


def shard_size(count: int) -> int:
    """How many of `count` texts a shard has: a power of two, whatever the number of processes.

    The last bits of a vector depend on the texts that are embedded with it, so other shards would give other bits.
    """
    size = _FEWEST
    while size < _MOST and size * _SHARDS < count:
        size *= 2
    return size


@dataclass(frozen=True)
class VectorFolder:
    """Where the vectors of `count` texts are, or will be."""

    folder: Path
    count: int
    dtype: str = "float32"

    @property
    def shards(self) -> int:
        """How many shards there will be."""
        return -(-self.count // shard_size(self.count))

    def bounds(self, number: int) -> tuple[int, int]:
        """The texts of a shard: from the first to before the last."""
        size = shard_size(self.count)
        return number * size, min((number + 1) * size, self.count)

    def missing(self) -> list[int]:
        """The numbers of the shards that are not there, or not whole."""
        return [number for number in range(self.shards) if self._open(number) is None]

    def write(self, number: int, vectors: np.ndarray, cut: int) -> None:
        """Write one shard, float [texts of the shard, d]: whole, or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self._path(number, "json"), {"cut": cut})
        aside = self.folder / f".{number:05}.{os.getpid()}"
        with open(aside, "wb") as file:
            np.save(file, vectors.astype(self.dtype))
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, self._path(number, "npy"))

    def cut(self) -> int:
        """How many texts were longer than the model reads."""
        return sum(read_json(self._path(number, "json"))["cut"] for number in range(self.shards))

    def open(self) -> "Vectors":
        """All of them, when none is missing."""
        return Vectors([self._open(number) for number in range(self.shards)], shard_size(self.count))

    def _path(self, number: int, ending: str) -> Path:
        return self.folder / f"{number:05}.{ending}"

    def _open(self, number: int) -> np.ndarray | None:
        """One shard by memory map; None if it cannot be used."""
        begin, end = self.bounds(number)
        try:
            shard = np.load(self._path(number, "npy"), mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError):
            return None
        is_whole = shard.ndim == 2 and len(shard) == end - begin and shard.dtype == self.dtype
        return shard if is_whole and self._path(number, "json").exists() else None


class Vectors:
    """Open shards as one array [m, d], of which slices and rows are read when they are asked for."""

    def __init__(self, shards: list[np.ndarray], size: int):
        self.shards = shards
        self.size = size
        self.shape = (sum(len(shard) for shard in shards), shards[0].shape[1] if shards else 0)
        self.dtype = shards[0].dtype if shards else np.dtype(np.float32)

    def __len__(self) -> int:
        """m."""
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        """A slice without a step."""
        begin, end, _ = rows.indices(len(self))
        parts = [np.zeros((0, self.shape[1]), self.dtype)]
        for number in range(begin // self.size, -(-end // self.size)):
            first = number * self.size
            parts.append(self.shards[number][max(begin - first, 0) : end - first])
        return np.concatenate(parts)

    def take(self, numbers: np.ndarray) -> np.ndarray:
        """The vectors of these texts, [n] -> fp32 [n, d]."""
        taken = np.zeros((len(numbers), self.shape[1]), np.float32)
        of_shard = numbers // self.size  # [n]
        for number in np.unique(of_shard):
            here = of_shard == number
            taken[here] = self.shards[number][numbers[here] - number * self.size]
        return taken
