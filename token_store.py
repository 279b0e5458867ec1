"""A token store: one dataset on disk as flat arrays, every distinct text once, opened by memory map.

    tokens.npy    int32 [tokens]        all distinct texts end to end, each ending in EOS
    offsets.npy   int64 [texts + 1]     text i is tokens[offsets[i] : offsets[i + 1]]
    tuples.npy    int32 [rows, 2 + K]   text numbers of query, positive, negatives; -1 = no negative there
    meta.json     written last: name, task, counts, tokenizer, sources, checksums

Opening copies and parses nothing, and all processes of a node share the same pages. The same input
gives the same bytes: no clock, no host name, no order that depends on a hash seed.
"""

import hashlib
import json
import math
import os
import re
import shutil
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

FORMAT = 1
TASKS = ("retrieval", "clustering", "classification")
ARRAYS = {"tokens": np.int32, "offsets": np.int64, "tuples": np.int32}
PUBLISHED_TASKS = Path(__file__).with_name("configs") / "dataset_tasks.json"
_HEADER = 128  # bytes of a .npy header; fixed, so that it can be filled in when the length is known
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+#-]{0,127}")  # F2LLM-v2 has names such as xcodeeval_nl2code_C++


# ---------------------------------------------------------------------------------------- reading


class StoreError(ValueError):
    """Data on disk that cannot be used; the message has a line for each problem."""


@dataclass(frozen=True)
class TokenStore:
    """An open token store. Arrays are read-only memory maps; shapes in the module's docstring."""

    folder: Path
    meta: dict
    tokens: np.ndarray
    offsets: np.ndarray
    tuples: np.ndarray

    @property
    def name(self) -> str:
        """The dataset's name: the stem of the raw file."""
        return self.meta["name"]

    @property
    def task(self) -> str:
        """retrieval, clustering or classification: decides which losses apply."""
        return self.meta["task"]

    @property
    def eos(self) -> int:
        """The token id that ends every text."""
        return self.meta["eos_token_id"]

    @cached_property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(path.stat().st_size for path in self.folder.iterdir())


def open_store(folder: Path) -> TokenStore:
    """Open a finished store.

    Raises:
        StoreError: the folder is no finished store; the message is what `quick_check` found.
    """
    if problems := quick_check(folder):
        raise StoreError("\n".join(problems))
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ARRAYS}
    return TokenStore(folder, _read_json(folder / "meta.json"), **arrays)


def quick_check(folder: Path) -> list[str]:
    """What is wrong with a store as far as headers and sizes tell, one line each. Reads no data."""
    try:
        meta = _read_json(folder / "meta.json")
    except FileNotFoundError:
        return [f"{folder}: half-written store (no meta.json): run tokenize_data_qwen.py again, it continues"]
    except ValueError as error:
        return [f"{folder}/meta.json: not JSON ({error}): tokenise again with --overwrite true"]
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        return [f"{folder}/meta.json: not of store format {FORMAT}: tokenise again with --overwrite true"]
    shapes = _shapes(meta)
    return [problem for name in ARRAYS for problem in _check_array(folder / f"{name}.npy", ARRAYS[name], shapes[name])]


def deep_check(store: TokenStore) -> list[str]:
    """What is wrong with a store's contents, one line each. Reads every byte once."""
    with ThreadPoolExecutor() as pool:
        digests = dict(
            zip(ARRAYS, pool.map(lambda name: file_digest(store.folder / f"{name}.npy"), ARRAYS), strict=True)
        )
    problems = [
        f"{store.folder}/{name}.npy: checksum differs from meta.json: the file was damaged or edited"
        for name, digest in digests.items()
        if digest != store.meta["sha256"][name]
    ]
    lengths = np.diff(store.offsets)
    rules = {
        "offsets do not rise from 0 to the number of tokens": store.offsets[0] == 0
        and store.offsets[-1] == len(store.tokens)
        and bool((lengths > 0).all()),
        "a token id is negative or above max_token_id": _within(store.tokens, 0, store.meta["max_token_id"]),
        "a query or positive is not a text number": _within(store.tuples[:, :2], 0, store.meta["texts"] - 1),
        "a negative is not a text number or -1": _within(store.tuples[:, 2:], -1, store.meta["texts"] - 1),
        "a positive is its own negative": not (store.tuples[:, 2:] == store.tuples[:, 1:2]).any(),
    }
    problems += [f"{store.folder}: {rule}" for rule, holds in rules.items() if not holds]
    if not problems and not (store.tokens[store.offsets[1:] - 1] == store.eos).all():
        problems.append(f"{store.folder}: a text does not end in EOS ({store.eos})")
    return problems


def identity(folder: Path) -> str:
    """Names a store by its contents' checksums and its files' sizes and times: 16 hex digits."""
    stats = [(folder / f"{name}.npy").stat() for name in ARRAYS]
    facts = [(folder / "meta.json").read_text(), [(s.st_size, s.st_mtime_ns) for s in stats]]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def task_of(name: str, folder: Path, declared: dict[str, str] | None = None) -> str | None:
    """The task of dataset `name`: from `declared`, else `folder`/tasks.json, else the published sources; else None."""
    own = folder / "tasks.json"
    tables = [declared or {}, _read_json(own) if own.exists() else {}, _read_json(PUBLISHED_TASKS)]
    return next((table[name] for table in tables if name in table), None)


def name_problem(name: str) -> str | None:
    """Why `name` cannot name a dataset (it becomes a folder and a log tag), or None."""
    if _NAME.fullmatch(name):
        return None
    return f"dataset name {name!r}: use 1 to 128 of A-Z a-z 0-9 . _ + # -, not starting with one of . + # -"


# ---------------------------------------------------------------------------------------- writing


class StoreWriter:
    """Writes a store beside its final folder, survives a kill at any byte, and renames at the end.

    A text is added once under a key (16 bytes); tuples are added as text numbers. `commit` makes all
    that was added so far durable together with `position`, how far the source had been read. Opened
    again with the same `inputs`, a writer continues from the last commit.
    """

    def __init__(self, folder: Path, negatives: int, inputs: dict):
        self.folder, self.negatives, self.inputs = folder, negatives, inputs
        self.partial = folder.parent / f".{folder.name}.partial"
        self.journal = self._interrupted() or self._fresh()
        self.files = {name: _open_at(self.partial / name, size) for name, size in self._sizes(self.journal).items()}
        keys = (self.partial / "keys").read_bytes()
        self.numbers = {keys[16 * i : 16 * i + 16]: i for i in range(self.journal["texts"])}  # key -> text number

    @property
    def position(self) -> int:
        """Source rows consumed at the last commit: where to read on."""
        return self.journal["position"]

    @property
    def stats(self) -> dict:
        """Counters that are kept with the journal, free for the caller's use."""
        return self.journal["stats"]

    def add_texts(self, keys: list[bytes], tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Append texts under new `keys`: ids [T] end to end, each text ending in EOS, and their lengths [n]."""
        self.numbers.update(zip(keys, range(len(self.numbers), len(self.numbers) + len(keys)), strict=True))
        self.files["tokens.npy"].write(np.ascontiguousarray(tokens, np.int32))
        self.files["offsets.npy"].write(np.asarray(self.journal["tokens"] + np.cumsum(lengths), np.int64))
        self.files["keys"].write(b"".join(keys))
        self.journal["tokens"] += int(np.sum(lengths))
        self.journal["texts"] += len(keys)

    def add_tuples(self, numbers: np.ndarray) -> None:
        """Append rows of text numbers, int [rows, 2 + K]."""
        self.files["tuples.npy"].write(np.ascontiguousarray(numbers, np.int32))
        self.journal["rows"] += len(numbers)

    def commit(self, position: int) -> None:
        """Make everything added so far survive a kill; `position` source rows are dealt with."""
        self.journal["position"] = position
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        _write_json(self.partial / "journal.json", self.journal)

    def finish(self, meta: dict) -> Path:
        """Fill in the array headers, write meta.json, and move the store to its final folder."""
        counts = {name: self.journal[name] for name in ("rows", "texts", "tokens")} | {"negatives": self.negatives}
        for name, shape in _shapes(counts).items():
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
            "max_token_id": int(np.load(self.partial / "tokens.npy", mmap_mode="r").max()),
            "inputs": self.inputs,
            "stats": self.stats,
            "sha256": {name: file_digest(self.partial / f"{name}.npy") for name in ARRAYS},
        }
        _write_json(self.partial / "meta.json", meta)
        (self.partial / "journal.json").unlink(missing_ok=True)
        (self.partial / "keys").unlink()
        if self.folder.exists():
            shutil.rmtree(self.folder)
        os.replace(self.partial, self.folder)
        return self.folder

    def _interrupted(self) -> dict | None:
        """The journal of an interrupted writer with the same inputs and all its bytes, or None."""
        try:
            journal = _read_json(self.partial / "journal.json")
            whole = all((self.partial / name).stat().st_size >= size for name, size in self._sizes(journal).items())
        except (FileNotFoundError, ValueError, KeyError):
            return None
        return journal if whole and journal["inputs"] == self.inputs else None

    def _fresh(self) -> dict:
        """An empty folder to write in, and its journal."""
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        (self.partial / "offsets.npy").write_bytes(bytes(_HEADER + 8))  # the first offset is 0
        return {"inputs": self.inputs, "position": 0, "texts": 0, "tokens": 0, "rows": 0, "stats": {}}

    def _sizes(self, journal: dict) -> dict[str, int]:
        """Bytes of each file that the journal vouches for."""
        shapes = _shapes(journal | {"negatives": self.negatives})
        arrays = {
            f"{name}.npy": _HEADER + np.dtype(ARRAYS[name]).itemsize * math.prod(shape)
            for name, shape in shapes.items()
        }
        return arrays | {"keys": 16 * journal["texts"]}


# ---------------------------------------------------------------------------------------- helpers


def text_key(data: bytes) -> bytes:
    """16 bytes that stand for a text; two texts share them with probability n^2 / 2^129."""
    return hashlib.blake2b(data, digest_size=16).digest()


def file_digest(path: Path) -> str:
    """sha256 of a file, hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _shapes(counts: dict) -> dict[str, tuple[int, ...]]:
    """Array name -> shape, from the counts in meta.json or a journal."""
    return {
        "tokens": (counts["tokens"],),
        "offsets": (counts["texts"] + 1,),
        "tuples": (counts["rows"], 2 + counts["negatives"]),
    }


def _check_array(path: Path, dtype: type, shape: tuple) -> list[str]:
    remedy = "the file was damaged or is another store's: tokenise again with --overwrite true"
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        return [f"{path}: cannot be opened ({error}): {remedy}"]
    if array.dtype != dtype or array.shape != shape:
        return [f"{path}: {array.dtype} {array.shape}, but meta.json says {np.dtype(dtype)} {shape}: {remedy}"]
    return []


def _within(array: np.ndarray, low: int, high: int) -> bool:
    return array.size == 0 or bool(array.min() >= low and array.max() <= high)


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


def _read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def _write_json(path: Path, value) -> None:
    """Replace `path` in one step: it holds the old value or the new one, never a part."""
    aside = path.with_name(path.name + ".tmp")
    with open(aside, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
