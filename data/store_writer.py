"""Writes a token store: beside its final folder, so that a kill at any byte leaves it whole or absent.

The layout is token_store's. While it is being written the folder is called .NAME.partial and also holds
journal.json (how far the arrays reach and how far the source was read), keys and signatures.
"""

import hashlib
import math
import os
from array import array
from pathlib import Path

import numpy as np

from data.token_store import ARRAYS, FORMAT, HEADER, array_shapes, npy_header, open_store, quick_check
from utils import aside_of, file_digest, publish, read_json, remove, seal, write_json

_KEY_BYTES = 16
_SIGNATURE_BYTES = 8


class StoreWriter:
    """Writes a store beside its final folder, survives a kill at any byte, and renames at the end.

    A text is added once under a key (16 bytes); tuples are added as text numbers. `commit` makes all
    that was added so far durable together with `position`, how far the source had been read. Opened
    again with the same `inputs`, a writer continues from the last commit.

    Memory: about 150 bytes per distinct text (its key, its number, its signature), whatever the texts' length, and
    for a moment half as much again where the table of keys grows.
    """

    TEMPORARY = ("journal.json", "keys", "signatures")  # files that go when the store is whole

    def __init__(self, folder: Path, negatives: int, inputs: dict):
        self.folder, self.negatives, self.inputs = folder, negatives, inputs
        self.partial = aside_of(folder)
        journal = self._interrupted()
        if journal is None:
            journal = self._fresh()
        self.journal = journal
        self.files = {name: _open_at(self.partial / name, size) for name, size in self._sizes(journal).items()}
        keys = (self.partial / "keys").read_bytes()
        self.numbers = {_nth_key(keys, number): number for number in range(journal["texts"])}  # key -> text number
        self.signatures = array("Q", (self.partial / "signatures").read_bytes())  # a hash of each text's ids

    @property
    def position(self) -> int:
        """Source rows consumed at the last commit: where to read on."""
        return self.journal["position"]

    @property
    def stats(self) -> dict:
        """Counters that are kept with the journal, free for the caller's use."""
        return self.journal["stats"]

    def add_texts(
        self, keys: list[bytes], tokens: np.ndarray, lengths: np.ndarray, is_cut: np.ndarray | None = None
    ) -> None:
        """Append texts under new `keys`: ids [T] end to end, each text ending in EOS, and their lengths [n].

        Args:
            is_cut: bool [n], which texts were longer; counted as stats["truncated"]. None if that is not known.

        Raises:
            ValueError: a key is given twice or known already.
        """
        if len(set(keys)) < len(keys) or not self.numbers.keys().isdisjoint(keys):
            raise ValueError("a text was added twice")
        if is_cut is not None:
            self.stats["truncated"] = self.stats.get("truncated", 0) + int(is_cut.sum())
        first = self.journal["texts"]
        self.numbers.update(zip(keys, range(first, first + len(keys)), strict=True))
        tokens = np.ascontiguousarray(tokens, np.int32)
        ends = np.cumsum(lengths)
        signatures = _signatures(tokens, ends)
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
        negatives = numbers[:, 2:]  # a view: what is written into it is written into `numbers`
        # By ids, not by key: texts that differ may have the same ids.
        signatures = np.frombuffer(self.signatures, np.uint64)[numbers]  # -1 looks up the last: masked below
        equals_positive = (signatures[:, 2:] == signatures[:, 1:2]) & (negatives >= 0)
        negatives[equals_positive] = -1
        self.stats["own"] = self.stats.get("own", 0) + int(equals_positive.sum())
        self.files["tuples.npy"].write(numbers)
        self.journal["rows"] += len(numbers)

    def note_queries(self, queries: list[str]) -> None:
        """Called with the queries of tuples that will be added; nothing of them is kept here (data/parts.py does)."""

    def text(self, key: bytes) -> np.ndarray | None:
        """The ids of a text that was added, or None."""
        if key not in self.numbers:
            return None
        for name in ("offsets.npy", "tokens.npy"):
            self.files[name].flush()
        begin, end = _read_at(self.files["offsets.npy"], np.int64, self.numbers[key], count=2)
        return _read_at(self.files["tokens.npy"], np.int32, begin, end - begin)

    def commit(self, position: int) -> None:
        """Make everything added so far survive a kill; `position` source rows are dealt with."""
        self.journal["position"] = position
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        # Last: the journal must not vouch for bytes that a power cut could still take.
        write_json(self.partial / "journal.json", self.journal)

    def finish(self, meta: dict) -> Path:
        """Fill in the array headers, write meta.json, and move the store to its final folder."""
        counts = {name: self.journal[name] for name in ("rows", "texts", "tokens")}
        counts["negatives"] = self.negatives
        self._write_headers(counts)
        for file in self.files.values():
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
        meta |= self.more_facts()
        write_json(self.partial / "meta.json", seal(meta))
        # Killed from here on, a writer has no journal to continue from and begins again: the same bytes, only later.
        for name in self.TEMPORARY:
            (self.partial / name).unlink(missing_ok=True)
        publish(self.folder)
        return self.folder

    def more_facts(self) -> dict:
        """What meta.json says besides; nothing here."""
        return {}

    def _write_headers(self, counts: dict) -> None:
        """Write the header of each array into the bytes that were left free for it."""
        for name, shape in array_shapes(counts).items():
            file = self.files[f"{name}.npy"]
            file.seek(0)
            file.write(npy_header(ARRAYS[name], shape))

    def _interrupted(self) -> dict | None:
        """The journal of an interrupted writer with the same inputs and all its bytes, or None."""
        if self.partial.is_symlink():
            return None  # what it points to is not ours to write
        try:
            journal = read_json(self.partial / "journal.json")
            journal["max_token_id"]  # a journal of an earlier version has none
            same_inputs = journal["inputs"] == self.inputs
            for name, size in self._sizes(journal).items():
                if (self.partial / name).stat().st_size < size:
                    return None
        except (FileNotFoundError, ValueError, KeyError):
            return None
        return journal if same_inputs else None

    def _fresh(self) -> dict:
        """An empty folder to write in, and its journal."""
        remove(self.partial)
        self.partial.mkdir(parents=True)
        (self.partial / "offsets.npy").write_bytes(bytes(HEADER + 8))  # the first offset is 0
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
        """How many bytes of each file the journal vouches for."""
        sizes = {}
        for name, shape in array_shapes(journal | {"negatives": self.negatives}).items():
            sizes[f"{name}.npy"] = HEADER + np.dtype(ARRAYS[name]).itemsize * math.prod(shape)
        sizes["keys"] = _KEY_BYTES * journal["texts"]
        sizes["signatures"] = _SIGNATURE_BYTES * journal["texts"]
        return sizes


def is_done(folder: Path, inputs: dict, overwrite: bool) -> tuple[bool, list[str]]:
    """Whether `folder` already holds the store of these inputs; if not, why it cannot be written there."""
    if not folder.exists():
        return False, []
    if not (folder / "meta.json").exists():
        return False, [
            f"{folder}: is not a token store and would be replaced: move it away, or choose another --output_dir"
        ]
    problems = quick_check(folder)
    if not problems:
        old_inputs = open_store(folder).meta["inputs"]
        if old_inputs == inputs:
            return True, []
        changes = "; ".join(_changed_inputs(old_inputs, inputs))
        problems = [f"{folder}: made from other inputs ({changes}): choose another --output_dir, or --overwrite true"]
    if overwrite:
        return False, []
    return False, problems


def _changed_inputs(old: dict, new: dict) -> list[str]:
    names = list(dict.fromkeys([*new, *old]))  # some inputs are there only where they are used
    return [f"{name} {old.get(name)!r} -> {new.get(name)!r}" for name in names if old.get(name) != new.get(name)]


def text_key(data: bytes) -> bytes:
    """16 bytes that stand for a text; two texts share them with probability n^2 / 2^129."""
    return hashlib.blake2b(data, digest_size=_KEY_BYTES).digest()


def _nth_key(keys: bytes, number: int) -> bytes:
    return keys[_KEY_BYTES * number : _KEY_BYTES * (number + 1)]


def _signatures(tokens: np.ndarray, ends: np.ndarray) -> bytes:
    """A hash of each text's ids, end to end; texts with equal ids have equal ones. `ends` [n]: where each text ends."""
    signatures = []
    begin = 0
    for end in ends.tolist():
        text = tokens[begin:end]
        signatures.append(hashlib.blake2b(text.tobytes(), digest_size=_SIGNATURE_BYTES).digest())
        begin = end
    return b"".join(signatures)


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
    return np.frombuffer(os.pread(file.fileno(), size * count, HEADER + size * int(first)), dtype)
