"""Writes a token store: beside its final folder, so that a kill at any byte leaves it whole or absent.

The layout is token_store's. While it is being written the folder is called .NAME.partial and also holds
journal.json (how far the arrays reach and how far the source was read), keys and signatures.
"""

import hashlib
import math
import os
import struct
from array import array
from pathlib import Path

import numpy as np

from data.token_store import ARRAYS, FORMAT, array_shapes, file_digest
from utils import read_json, remove, seal, write_json

_HEADER = 128  # bytes of a .npy header; fixed, so that it can be filled in when the length is known


class StoreWriter:
    """Writes a store beside its final folder, survives a kill at any byte, and renames at the end.

    A text is added once under a key (16 bytes); tuples are added as text numbers. `commit` makes all
    that was added so far durable together with `position`, how far the source had been read. Opened
    again with the same `inputs`, a writer continues from the last commit.

    Memory: about 150 bytes a distinct text (its key, its number, its signature), whatever the texts' length, and for a
    moment half as much again where the table of keys grows.
    """

    def __init__(self, folder: Path, negatives: int, inputs: dict):
        self.folder, self.negatives, self.inputs = folder, negatives, inputs
        self.partial = folder.parent / f".{folder.name}.partial"
        self.journal = self._interrupted() or self._fresh()
        self.files = {name: _open_at(self.partial / name, size) for name, size in self._sizes(self.journal).items()}
        keys = (self.partial / "keys").read_bytes()
        self.numbers = {keys[16 * i : 16 * i + 16]: i for i in range(self.journal["texts"])}  # key -> text number
        self.signatures = array("Q", (self.partial / "signatures").read_bytes())  # of each text's ids

    @property
    def position(self) -> int:
        """Source rows consumed at the last commit: where to read on."""
        return self.journal["position"]

    @property
    def stats(self) -> dict:
        """Counters that are kept with the journal, free for the caller's use."""
        return self.journal["stats"]

    def add_texts(self, keys: list[bytes], tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append texts under new `keys`: ids [T] end to end, each text ending in EOS, and their lengths [n].

        Raises:
            ValueError: a key is given twice or known already.
        """
        if len(set(keys)) < len(keys) or not self.numbers.keys().isdisjoint(keys):
            raise ValueError("a text was added twice")
        first = self.journal["texts"]
        self.numbers.update(zip(keys, range(first, first + len(keys)), strict=True))
        tokens, ends = np.ascontiguousarray(tokens, np.int32), np.cumsum(lengths)
        texts = np.split(tokens, ends[:-1]) if len(keys) else []
        signatures = b"".join(hashlib.blake2b(text.tobytes(), digest_size=8).digest() for text in texts)
        self.signatures.frombytes(signatures)
        self.files["tokens.npy"].write(tokens)
        self.files["offsets.npy"].write(np.asarray(self.journal["tokens"] + ends, np.int64))
        self.files["keys"].write(b"".join(keys))
        self.files["signatures"].write(signatures)
        self.journal["tokens"] += int(np.sum(lengths))
        self.journal["texts"] += len(keys)
        self.journal["max_token_id"] = max(self.journal["max_token_id"], int(tokens.max(initial=0)))

    def add_tuples(self, numbers: np.ndarray) -> None:
        """Append rows of text numbers, int [rows, 2 + K].

        A negative with the ids of its positive (equal once cut, or spelled otherwise in Unicode) is left out, and
        counted as stats["own"]: no tuple may be its own negative.
        """
        numbers = np.array(numbers, np.int32, order="C")
        signatures = np.frombuffer(self.signatures, np.uint64)[numbers]  # -1 looks up the last: masked below
        own = (signatures[:, 2:] == signatures[:, 1:2]) & (numbers[:, 2:] >= 0)
        numbers[:, 2:][own] = -1
        self.stats["own"] = self.stats.get("own", 0) + int(own.sum())
        self.files["tuples.npy"].write(numbers)
        self.journal["rows"] += len(numbers)

    def text(self, key: bytes) -> np.ndarray | None:
        """The ids of a text that was added, or None."""
        if key not in self.numbers:
            return None
        for name in ("offsets.npy", "tokens.npy"):
            self.files[name].flush()
        begin, end = _read_at(self.files["offsets.npy"], np.int64, self.numbers[key], 2)
        return _read_at(self.files["tokens.npy"], np.int32, begin, end - begin)

    def commit(self, position: int) -> None:
        """Make everything added so far survive a kill; `position` source rows are dealt with."""
        self.journal["position"] = position
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        write_json(self.partial / "journal.json", self.journal)

    def finish(self, meta: dict) -> Path:
        """Fill in the array headers, write meta.json, and move the store to its final folder."""
        counts = {name: self.journal[name] for name in ("rows", "texts", "tokens")} | {"negatives": self.negatives}
        for name, shape in array_shapes(counts).items():
            self.files[f"{name}.npy"].seek(0)
            self.files[f"{name}.npy"].write(_npy_header(ARRAYS[name], shape))
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        meta = {
            "format": FORMAT,
            **meta,
            **counts,
            "max_token_id": self.journal["max_token_id"],
            "inputs": self.inputs,
            "stats": self.stats,
            "sha256": {name: file_digest(self.partial / f"{name}.npy") for name in ARRAYS},
        }
        write_json(self.partial / "meta.json", seal(meta))
        for name in ("journal.json", "keys", "signatures"):
            (self.partial / name).unlink(missing_ok=True)
        old = self.folder.with_name(f".{self.folder.name}.old")
        if self.folder.exists():
            os.replace(self.folder, old)  # a kill from here on leaves the old store or the new one, whole
        os.replace(self.partial, self.folder)
        remove(old)
        return self.folder

    def _interrupted(self) -> dict | None:
        """The journal of an interrupted writer with the same inputs and all its bytes, or None."""
        if self.partial.is_symlink():
            return None
        try:
            journal = read_json(self.partial / "journal.json")
            journal["max_token_id"]
            whole = all((self.partial / name).stat().st_size >= size for name, size in self._sizes(journal).items())
        except (FileNotFoundError, ValueError, KeyError):
            return None
        return journal if whole and journal["inputs"] == self.inputs else None

    def _fresh(self) -> dict:
        """An empty folder to write in, and its journal."""
        remove(self.partial)
        self.partial.mkdir(parents=True)
        (self.partial / "offsets.npy").write_bytes(bytes(_HEADER + 8))  # the first offset is 0
        return {
            "inputs": self.inputs,
            "position": 0,
            "texts": 0,
            "tokens": 0,
            "rows": 0,
            "max_token_id": 0,
            "stats": {},
        }

    def _sizes(self, journal: dict) -> dict[str, int]:
        """Bytes of each file that the journal vouches for."""
        shapes = array_shapes(journal | {"negatives": self.negatives})
        arrays = {
            f"{name}.npy": _HEADER + np.dtype(ARRAYS[name]).itemsize * math.prod(shape)
            for name, shape in shapes.items()
        }
        return arrays | {"keys": 16 * journal["texts"], "signatures": 8 * journal["texts"]}


def text_key(data: bytes) -> bytes:
    """16 bytes that stand for a text; two texts share them with probability n^2 / 2^129."""
    return hashlib.blake2b(data, digest_size=16).digest()


def _npy_header(dtype: type, shape: tuple) -> bytes:
    """A version 1.0 .npy header of exactly `_HEADER` bytes, as numpy.lib.format lays it down."""
    facts = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    body = repr(facts).encode().ljust(_HEADER - 11) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(body)) + body


def _open_at(path: Path, size: int):
    """Open for writing at byte `size`, dropping whatever a killed writer left behind it."""
    path.touch()
    file = open(path, "r+b")
    file.truncate(size)
    file.seek(size)
    return file


def _read_at(file, dtype: type, first: int, count: int) -> np.ndarray:
    """`count` numbers of a .npy file from number `first`; the file's own position stays."""
    size = np.dtype(dtype).itemsize
    return np.frombuffer(os.pread(file.fileno(), size * count, _HEADER + size * int(first)), dtype)
