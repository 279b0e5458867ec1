"""A token store: one dataset on disk as flat arrays, every distinct text once, opened by memory map.

    tokens.npy    int32 [tokens]        all distinct texts end to end, each ending in EOS
    offsets.npy   int64 [texts + 1]     text i is tokens[offsets[i] : offsets[i + 1]]
    tuples.npy    int32 [rows, 2 + K]   text numbers of query, positive, negatives; -1 = no negative there
    meta.json     written last: name, task, counts, tokenizer, sources, checksums

Opening copies and parses nothing, and all processes of a node share the same pages. The same input
gives the same bytes: no clock, no host name, no order that depends on a hash seed.
"""

import errno
import json
import math
import os
import re
import struct
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from utils import file_digest, is_sealed, read_json, read_strictly, short_digest

FORMAT = 2
TASKS = ("retrieval", "clustering", "classification")
PARTS = ".parts"  # folder among the stores, with parts of some that are not joined yet (parts.py)
HEADER = 128  # bytes of a .npy header; fixed, so that it can be filled in when the length is known
ARRAYS = {"tokens": np.int32, "offsets": np.int64, "tuples": np.int32}
PUBLISHED_TASKS = Path(__file__).parent.parent / "configs" / "dataset_tasks.json"
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
    """Open a finished store, as far as headers and sizes tell. Reads no data.

    Raises:
        StoreError: the folder is not a finished store; the message has a line for each problem.
    """
    meta = _read_meta(folder)
    arrays = {}
    problems = []
    for name, shape in array_shapes(meta).items():
        try:
            arrays[name] = _open_array(folder / f"{name}.npy", ARRAYS[name], shape)
        except StoreError as error:
            problems.append(str(error))
    if problems:
        raise StoreError("\n".join(problems))
    return TokenStore(folder, meta, **arrays)


def quick_check(folder: Path) -> list[str]:
    """What is wrong with a store as far as headers and sizes tell, one line each. Reads no data."""
    try:
        open_store(folder)
    except StoreError as error:
        return str(error).splitlines()
    return []


def _read_meta(folder: Path) -> dict:
    """A store's meta.json. Raises StoreError if it is not as it was written."""
    try:
        meta = read_json(folder / "meta.json")
    except FileNotFoundError:
        raise StoreError(f"{folder}: half of a store (no meta.json): delete it and tokenise again") from None
    except ValueError as error:
        line = f"{folder}/meta.json: not JSON ({error}): tokenise again with --overwrite true"
        raise StoreError(line) from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise StoreError(f"{folder}/meta.json: not of store format {FORMAT}: tokenise again with --overwrite true")
    if not is_sealed(meta):
        raise StoreError(
            f"{folder}/meta.json: checksum differs, it was damaged or edited: tokenise again with --overwrite true "
            "(a task is declared when tokenising, by --task or in tasks.json)"
        )
    return meta


def _open_array(path: Path, dtype: type, shape: tuple) -> np.ndarray:
    """One array as a memory map. Raises StoreError if header or size are not those of this dtype and shape."""
    remedy = "the file was damaged or is another store's: tokenise again with --overwrite true"
    try:
        array = _map_as_written(path, dtype, shape)
        if array is None:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        if getattr(error, "errno", None) == errno.EMFILE:
            remedy = "a store keeps three files open: allow this process more of them (ulimit -n)"
        raise StoreError(f"{path}: cannot be opened ({error}): {remedy}") from None
    if array.dtype != dtype or array.shape != shape:
        raise StoreError(f"{path}: {array.dtype} {array.shape}, but meta.json says {np.dtype(dtype)} {shape}: {remedy}")
    return array.view(np.ndarray)  # slicing a numpy.memmap costs 2 us more, and a batch has hundreds of slices


def _map_as_written(path: Path, dtype: type, shape: tuple) -> np.memmap | None:
    """A memory map of a file with exactly the header and the size that store_writer gives it; None for any other.

    numpy reads a header as Python source, which takes longer than all the rest, and 502 stores have 1,506 of them.
    """
    header = npy_header(dtype, shape)
    with open(path, "rb", buffering=0) as file:
        is_as_written = file.read(len(header)) == header
        size = os.fstat(file.fileno()).st_size
        if not is_as_written or size != len(header) + np.dtype(dtype).itemsize * math.prod(shape):
            return None
        return np.memmap(file, dtype, "r", len(header), shape)


def npy_header(dtype: type, shape: tuple) -> bytes:
    """A version 1.0 .npy header of exactly HEADER bytes, as numpy.lib.format lays it down."""
    facts = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    body = repr(facts).encode().ljust(HEADER - 11) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(body)) + body


def deep_check(store: TokenStore) -> list[str]:
    """What is wrong with a store's contents, one line each. Reads every byte once."""
    problems = []
    paths = [store.folder / f"{name}.npy" for name in ARRAYS]
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(file_digest, paths))
    for name, path, digest in zip(ARRAYS, paths, digests, strict=True):
        if digest != store.meta["sha256"][name]:
            problems.append(
                f"{path}: checksum differs from meta.json, it was damaged or edited: "
                "tokenise again with --overwrite true"
            )
    problems += [f"{store.folder}: {broken}" for broken in _broken_rules(store)]
    if problems:
        return problems  # the offsets may be wrong, and nothing could be looked up by them
    if (store.tokens[store.offsets[1:] - 1] != store.eos).any():
        return [f"{store.folder}: a text does not end in EOS ({store.eos})"]
    return []


def _broken_rules(store: TokenStore) -> list[str]:
    """The rules that the numbers in a store's arrays break."""
    positives = store.tuples[:, 1:2]  # [rows, 1]
    negatives = store.tuples[:, 2:]  # [rows, K]
    last_text = store.meta["texts"] - 1
    broken = []
    if not _offsets_rise(store):
        broken.append("offsets do not rise from 0 to the number of tokens")
    if not _within(store.tokens, 0, store.meta["max_token_id"]):
        broken.append("a token id is negative or above max_token_id")
    if not _within(store.tuples[:, :2], 0, last_text):
        broken.append("a query or positive is not a text number")
    if not _within(negatives, -1, last_text):
        broken.append("a negative is not a text number or -1")
    if (negatives == positives).any():
        broken.append("a positive is its own negative")
    return broken


def _offsets_rise(store: TokenStore) -> bool:
    if store.offsets[0] != 0 or store.offsets[-1] != len(store.tokens):
        return False
    return bool((np.diff(store.offsets) > 0).all())  # no text is empty


def identity(folder: Path) -> str:
    """Names a store by its contents' checksums and its files' sizes and times: 16 hex digits."""
    sizes_and_times = []
    for name in ARRAYS:
        stat = (folder / f"{name}.npy").stat()
        sizes_and_times.append((stat.st_size, stat.st_mtime_ns))
    facts = [(folder / "meta.json").read_text(), sizes_and_times]
    return short_digest(repr(facts))


# --------------------------------------------------------------------------------------- instructions


def instruction_shares(stores: list[TokenStore]) -> dict[str, dict[str, float]]:
    """Dataset name -> instruction -> share of its queries that carry it, the most frequent first.

    Stores that do not know their instructions are left out: those written before they were counted, and those made from
    the published scripts' token ids.
    """
    shares = {}
    for store in stores:
        counts = _instruction_counts(store)
        if counts is not None:
            queries = max(store.meta["rows"], 1)
            shares[store.name] = {text: count / queries for text, count in counts.items() if text is not None}
    return shares


def usual_instruction(stores: list[TokenStore]) -> tuple[str | None, float]:
    """What most retrieval queries carry, and their share: an instruction, or None for no instruction.

    (None, 0.0) where nothing is known: no retrieval dataset among the stores that know their instructions.
    """
    totals = Counter()
    queries = 0
    for store in stores:
        counts = _instruction_counts(store)
        if store.task == "retrieval" and counts is not None:
            totals.update(counts)
            queries += store.meta["rows"]
    if not totals or not queries:
        return None, 0.0
    usual = min(totals, key=lambda text: (-totals[text], text or ""))
    return usual, totals[usual] / queries


def _instruction_counts(store: TokenStore) -> dict[str | None, int] | None:
    """Queries by the instruction that they carry, None for no instruction; or None if the store does not know."""
    found = store.meta["stats"].get("instructions")
    if found is None:
        return None
    counts = dict(found["counts"])
    if found["none"]:
        counts[None] = found["none"]
    return counts


# ----------------------------------------------------------------------------------- tasks and names


def known_tasks(folder: Path) -> tuple[dict[str, str], list[str]]:
    """Dataset name -> task: the published sources, and what `folder`/tasks.json declares, which wins.

    Returns:
        (tasks, problems): a broken tasks.json is a problem.
    """
    published = read_json(PUBLISHED_TASKS)
    path = folder / "tasks.json"
    if not path.exists():
        return published, []
    try:
        declared, problems = read_strictly(path)
    except (ValueError, OSError) as error:
        return published, [f"{path}: not JSON ({error})"]
    if not isinstance(declared, dict):
        return published, [f"{path}: must be one object of dataset names and tasks"]
    for name, task in declared.items():
        if task not in TASKS:
            problems.append(f"{path}: {name}: {json.dumps(task)} is not one of {', '.join(TASKS)}")
    return published | declared, problems


def name_problem(name: str) -> str | None:
    """Why `name` cannot name a dataset (it becomes a folder and a log tag), or None."""
    if _NAME.fullmatch(name):
        return None
    return f"dataset name {name!r}: use 1 to 128 of A-Z a-z 0-9 . _ + # -, not starting with one of . + # -"


def array_shapes(counts: dict) -> dict[str, tuple[int, ...]]:
    """Array name -> shape, from the counts in meta.json or a journal."""
    return {
        "tokens": (counts["tokens"],),
        "offsets": (counts["texts"] + 1,),
        "tuples": (counts["rows"], 2 + counts["negatives"]),
    }


def _within(array: np.ndarray, low: int, high: int) -> bool:
    return array.size == 0 or bool(array.min() >= low and array.max() <= high)
