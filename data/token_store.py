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
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from utils import is_sealed, read_json, read_strictly

FORMAT = 2
TASKS = ("retrieval", "clustering", "classification")
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
    """Open a finished store.

    Raises:
        StoreError: the folder is no finished store; the message is what `quick_check` found.
    """
    if problems := quick_check(folder):
        raise StoreError("\n".join(problems))
    # As plain views of the maps: slicing a numpy.memmap costs 2 us, and a batch has hundreds of slices.
    arrays = {
        name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False).view(np.ndarray) for name in ARRAYS
    }
    return TokenStore(folder, read_json(folder / "meta.json"), **arrays)


def quick_check(folder: Path) -> list[str]:
    """What is wrong with a store as far as headers and sizes tell, one line each. Reads no data."""
    try:
        meta = read_json(folder / "meta.json")
    except FileNotFoundError:
        return [f"{folder}: half of a store (no meta.json): delete it and tokenise again"]
    except ValueError as error:
        return [f"{folder}/meta.json: not JSON ({error}): tokenise again with --overwrite true"]
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        return [f"{folder}/meta.json: not of store format {FORMAT}: tokenise again with --overwrite true"]
    if not is_sealed(meta):
        return [
            f"{folder}/meta.json: checksum differs, it was damaged or edited: tokenise again with --overwrite true "
            "(a task is declared when tokenising, by --task or in tasks.json)"
        ]
    shapes = array_shapes(meta)
    return [problem for name in ARRAYS for problem in _check_array(folder / f"{name}.npy", ARRAYS[name], shapes[name])]


def deep_check(store: TokenStore) -> list[str]:
    """What is wrong with a store's contents, one line each. Reads every byte once."""
    with ThreadPoolExecutor() as pool:
        digests = dict(
            zip(ARRAYS, pool.map(lambda name: file_digest(store.folder / f"{name}.npy"), ARRAYS), strict=True)
        )
    problems = [
        f"{store.folder}/{name}.npy: checksum differs from meta.json, it was damaged or edited: "
        "tokenise again with --overwrite true"
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


def known_tasks(folder: Path) -> tuple[dict[str, str], list[str]]:
    """Dataset name -> task: the published sources, and what `folder`/tasks.json declares, which wins.

    Returns:
        (tasks, problems): a broken tasks.json is a problem.
    """
    tasks, own = read_json(PUBLISHED_TASKS), folder / "tasks.json"
    try:
        declared, problems = read_strictly(own) if own.exists() else ({}, [])
    except (ValueError, OSError) as error:
        return tasks, [f"{own}: not JSON ({error})"]
    if not isinstance(declared, dict):
        return tasks, [f"{own}: must be one object of dataset names and tasks"]
    wrong = {name: task for name, task in declared.items() if task not in TASKS}
    problems += [f"{own}: {name}: {json.dumps(task)} is none of {', '.join(TASKS)}" for name, task in wrong.items()]
    return tasks | declared, problems


def name_problem(name: str) -> str | None:
    """Why `name` cannot name a dataset (it becomes a folder and a log tag), or None."""
    if _NAME.fullmatch(name):
        return None
    return f"dataset name {name!r}: use 1 to 128 of A-Z a-z 0-9 . _ + # -, not starting with one of . + # -"


def file_digest(path: Path) -> str:
    """sha256 of a file, hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def array_shapes(counts: dict) -> dict[str, tuple[int, ...]]:
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
