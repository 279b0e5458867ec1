"""Tensors in files, each process its own rows: how they are cut, written and put together again.

FSDP2 leaves each process some rows of every weight, and those are what it writes. What all processes hold whole (under
DDP everything, under FSDP2 AdamW's counts of steps) is cut into rows in the same way, so that each writes as much as
the others. A file says nothing of rows: the parts of a tensor, in the order of the files' names, are the tensor.

Files are in the safetensors layout (https://huggingface.co/docs/safetensors): eight bytes with the length of the
header, the header in JSON, the numbers. They are written here, and not by the library, because only the one who writes
can hash on the way: reading a state again for its checksum took a fifth of the time of a save.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

_BLOCK = 1 << 24  # bytes hashed and written at a time
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}


# ------------------------------------------------------------------------------------------ rows


def rows_of(rows: int, number: int, count: int) -> slice:
    """The rows of part `number` of `count`, cut as FSDP2 does: equally many, and fewer or none in the last parts.

    >>> [rows_of(5, number, 4) for number in range(4)]
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None), slice(5, 5, None)]
    """
    size = math.ceil(rows / count)
    return slice(min(number * size, rows), min((number + 1) * size, rows))


def part_to_write(tensor: Tensor, number: int, count: int) -> Tensor | None:
    """The rows of a live tensor that this process writes, [some of its rows, ...]; None if there are none.

    Args:
        number, count: this process among those that write; a tensor that is sharded already needs neither.
    """
    if isinstance(tensor, DTensor):
        part = tensor.to_local() if _is_first_copy(tensor) else None
    elif tensor.dim() == 0:
        part = tensor if number == 0 else None
    else:
        part = tensor[rows_of(len(tensor), number, count)]
    return part if part is not None and part.numel() else None


def put(tensor: Tensor, whole: Tensor) -> None:
    """Overwrite a live tensor, or the rows of it that this process holds, with those of `whole`."""
    if isinstance(tensor, DTensor):
        dimension = _sharded_dimension(tensor)
        count = tensor.device_mesh.size(dimension)
        number = tensor.device_mesh.get_local_rank(dimension)
        tensor.to_local().copy_(whole[rows_of(len(whole), number, count)])
    else:
        tensor.copy_(whole)


def _sharded_dimension(tensor: DTensor) -> int:
    """The dimension of the mesh of processes over which a tensor's rows are cut."""
    [dimension] = [number for number, placement in enumerate(tensor.placements) if placement.is_shard(dim=0)]
    return dimension


def _is_first_copy(tensor: DTensor) -> bool:
    """Whether this process holds its rows in the first place, where several processes hold the same ones (HSDP)."""
    sharded = _sharded_dimension(tensor)
    place = tensor.device_mesh.get_coordinate()
    return all(index == 0 for dimension, index in enumerate(place) if dimension != sharded)


# ----------------------------------------------------------------------------------------- files


def write_file(path: Path, tensors: dict[str, Tensor]) -> str:
    """Write tensors on the CPU into a new file, and flush it to the disk.

    Returns:
        sha256 of the file, hex, computed on the way.

    Raises:
        FileExistsError: there is a file already.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # so that all numbers are aligned
    header = _header(tensors, names)
    digest = hashlib.sha256()
    with open(path, "xb") as file:
        file.write(header)
        digest.update(header)
        for name in names:
            for block in _blocks(tensors[name]):
                file.write(block)
                digest.update(block)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _header(tensors: dict[str, Tensor], names: Sequence[str]) -> bytes:
    """What stands before the numbers: the length of the rest, and dtype, shape and place of each tensor."""
    entries = {}
    end = 0
    for name in names:
        tensor = tensors[name]
        begin = end
        end += tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the numbers begin at a multiple of eight
    return len(text).to_bytes(8, "little") + text


def _blocks(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor on the CPU, a block at a time and without a copy."""
    numbers = memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    for begin in range(0, len(numbers), _BLOCK):
        yield numbers[begin : begin + _BLOCK]


class Shards:
    """Tensors that lie in several files, each with some rows, and are read one at a time.

    Args:
        paths: the files, in the order of their rows.

    Raises:
        SafetensorError, OSError: one of them is damaged or missing.
    """

    def __init__(self, paths: Sequence[Path]):
        self.files_of: dict[str, list] = {}
        for path in paths:
            file = safe_open(path, framework="pt")
            for name in file.keys():  # noqa: SIM118 - the file itself cannot be iterated
                self.files_of.setdefault(name, []).append(file)

    def names(self) -> list[str]:
        """The names of the tensors."""
        return sorted(self.files_of)

    def read(self, name: str) -> Tensor:
        """One tensor, whole, on the CPU. Raises KeyError if there is none of this name."""
        parts = [file.get_tensor(name) for file in self.files_of[name]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
