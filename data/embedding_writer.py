"""Writes a teacher's embeddings of a token store's texts: by any number of processes, beside the final folder.

The layout is embedding_store's. While it is being written the folder is called .NAME.partial and also holds

    journal.json   what is written: of which texts, by which teacher, in which batches
    done           a byte for each batch, 1 where its rows are on the disk

Which texts are embedded together depends on their lengths alone. So the result has the same bytes with any number of
processes, and after a kill and a second start.
"""

import os
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np

from data.batch import lengths_when_cut, split_by_tokens
from data.embedding_store import ARRAY, DTYPES, FORMAT, is_token_store, read_meta, size_problem
from data.token_store import HEADER, StoreError, TokenStore, npy_header
from utils import aside_of, file_digest, publish, read_json, remove, seal, write_json

_NEWER_FACTS = {"teacher_config"}  # which older folders lack; they are not refused for it
WINDOW = 2**14  # texts sorted by length together: bounds memory, and keeps a batch's rows near each other on the disk


def longest_text(store: TokenStore) -> int:
    """Tokens of the longest text of a store, 0 if there is none."""
    texts = len(store.offsets) - 1
    starts = range(0, texts, WINDOW)
    return max((int(np.diff(store.offsets[first : first + WINDOW + 1]).max()) for first in starts), default=0)


class TextBatches:
    """All texts of a store in batches, those of a batch of like length.

    Args:
        max_length: tokens of a text at most, EOS included.
        max_tokens_per_forward: tokens of a batch at most, or one text.
    """

    def __init__(self, store: TokenStore, max_length: int, max_tokens_per_forward: int):
        self.store = store
        self.max_length = max_length
        self.texts = len(store.offsets) - 1
        parts = []
        for first in range(0, self.texts, WINDOW):
            order = self._longest_first(first)
            cuts = split_by_tokens(lengths_when_cut(store, order, max_length), max_tokens_per_forward)
            parts += [(first, begin, end) for begin, end in pairwise(cuts)]
        self.parts = np.array(parts, np.int64).reshape(-1, 3)  # [batches, 3] first of a window, begin and end in it
        self._order = lru_cache(maxsize=1)(self._longest_first)

    def __len__(self) -> int:
        """How many there are."""
        return len(self.parts)

    def numbers(self, batch: int) -> np.ndarray:
        """Text numbers of a batch, int64 [n], longest first."""
        first, begin, end = self.parts[batch].tolist()
        return self._order(first)[begin:end]

    def _longest_first(self, first: int) -> np.ndarray:
        """The text numbers of the window that begins with text `first`."""
        numbers = np.arange(first, min(first + WINDOW, self.texts))
        return numbers[np.argsort(-lengths_when_cut(self.store, numbers, self.max_length), kind="stable")]


def is_done(folder: Path, facts: dict) -> tuple[bool, list[str]]:
    """Whether `folder` already holds embeddings of these `facts`; if not, why they cannot be written there."""
    if not folder.exists() and not is_token_store(folder):
        return False, []
    try:
        meta = read_meta(folder)
    except StoreError as error:
        return False, [str(error)]
    size = size_problem(folder, meta)
    if size:
        return False, [size]
    lacking = _NEWER_FACTS - meta.keys()
    names = [name for name in _what_counts(facts) if name not in lacking and meta.get(name) != facts[name]]
    if names:
        changes = "; ".join(f"{name} {meta.get(name)!r} -> {facts[name]!r}" for name in names)
        return False, [f"{folder}: made with other settings ({changes}): choose another --output"]
    return True, []


def _what_counts(facts: dict) -> dict:
    """Facts without the path of the teacher, which may have moved."""
    return {name: value for name, value in facts.items() if name != "model"}


def begin(folder: Path, facts: dict, batches: int, max_tokens_per_forward: int) -> int:
    """Make room beside `folder`, or find what an interrupted writer of the same facts left. For one process to call.

    Args:
        facts: what meta.json shall say, all of it known before; "texts", "width" and "dtype" among them.

    Returns:
        How many batches are done already.
    """
    partial = aside_of(folder)
    # "budget" is what it was called first: what an earlier version left half-written continues.
    journal = {"facts": _what_counts(facts), "batches": batches, "budget": max_tokens_per_forward}
    size = HEADER + DTYPES[facts["dtype"]]().itemsize * facts["texts"] * facts["width"]
    if _is_interrupted(partial, journal, size):
        return int(_read_done(partial).sum())
    remove(partial)
    partial.mkdir(parents=True)
    with open(partial / ARRAY, "wb") as file:
        file.write(npy_header(DTYPES[facts["dtype"]], (facts["texts"], facts["width"])))
        file.truncate(size)
    (partial / "done").write_bytes(bytes(batches))
    write_json(partial / "journal.json", journal)  # last: where it stands, the other two are whole
    return 0


def _is_interrupted(partial: Path, journal: dict, size: int) -> bool:
    """Whether a writer with this journal was interrupted here."""
    if partial.is_symlink():
        return False  # what it points to is not ours to write
    try:
        same = read_json(partial / "journal.json") == journal
        sizes = [(partial / name).stat().st_size for name in (ARRAY, "done")]
    except (OSError, ValueError):
        return False
    return same and sizes == [size, journal["batches"]]


def _read_done(partial: Path) -> np.ndarray:
    return np.frombuffer((partial / "done").read_bytes(), np.uint8)


class RowWriter:
    """Writes one process's rows into the folder that `begin` has made.

    Each row is written at its place, not through a memory map. So rows do not count as this process's memory, and their
    neighbours on the same page, which another process may be writing, stay as they are.
    """

    def __init__(self, folder: Path, dtype: str, width: int):
        self.partial = aside_of(folder)
        self.dtype = DTYPES[dtype]
        self.row_bytes = self.dtype().itemsize * width
        self.rows = os.open(self.partial / ARRAY, os.O_RDWR)
        self.done = os.open(self.partial / "done", os.O_RDWR)
        self.pending: list[int] = []  # batches whose rows are written, and perhaps not on the disk yet

    def remaining(self) -> np.ndarray:
        """The batches that are not done, int64."""
        return np.flatnonzero(_read_done(self.partial) == 0)

    def write(self, batch: int, texts: np.ndarray, embeddings: np.ndarray) -> None:
        """Write the embeddings [n, D] of a batch's texts [n].

        Raises:
            ValueError: a number is not finite, or too large for the dtype.
        """
        with np.errstate(over="ignore"):  # it is looked for below
            rows = np.ascontiguousarray(embeddings, self.dtype)  # [n, D]
        wrong = np.flatnonzero(~np.isfinite(rows).all(axis=1))
        if len(wrong):
            number = int(texts[wrong[0]])
            reason = "the teacher's embedding is not finite"
            if np.isfinite(embeddings[wrong[0]]).all():
                reason = f"{np.abs(embeddings[wrong[0]]).max():.3g} is too large for float16: take --dtype float32"
            raise ValueError(f"text {number}: {reason}")
        for number, row in zip(texts.tolist(), rows, strict=True):
            _write_at(self.rows, row.tobytes(), HEADER + number * self.row_bytes)
        self.pending.append(batch)

    def commit(self) -> None:
        """Make all that was written so far survive a kill."""
        os.fsync(self.rows)  # first: a mark must not vouch for rows that a power cut could still take
        for batch in self.pending:
            _write_at(self.done, b"\x01", batch)
        os.fsync(self.done)
        self.pending = []

    def close(self) -> None:
        """Commit, and let go of the files."""
        self.commit()
        os.close(self.rows)
        os.close(self.done)


def _write_at(descriptor: int, data: bytes, place: int) -> None:
    written = 0
    while written < len(data):  # a signal, or the end of a disk, may leave a part
        written += os.pwrite(descriptor, data[written:], place + written)


def finish(folder: Path, facts: dict) -> None:
    """Write meta.json and give the folder its name, when all processes have closed. For one process to call.

    Raises:
        StoreError: a batch is missing.
    """
    partial = aside_of(folder)
    missing = int((_read_done(partial) == 0).sum())
    if missing:
        raise StoreError(f"{partial}: {missing} batches are missing: run tools.embed_store again, it continues")
    meta = {"format": FORMAT, **facts, "sha256": file_digest(partial / ARRAY)}
    write_json(partial / "meta.json", seal(meta))
    # Killed from here on, a writer has no journal to continue from and begins again: the same bytes, only later.
    for name in ("journal.json", "done"):
        (partial / name).unlink()
    publish(folder)


def bytes_to_come(folder: Path, facts: dict) -> int:
    """Bytes that the disk must still have free for embeddings of these facts."""
    size = DTYPES[facts["dtype"]]().itemsize * facts["texts"] * facts["width"]
    begun = aside_of(folder) / ARRAY
    return size - 512 * begun.stat().st_blocks if begun.exists() else size
