"""What mining reads, as files: every distinct text once, and the rows of the input as numbers of texts.

    passages.bin, passages.npy    the corpus: texts end to end, int64 [m + 1] where each begins
    queries.bin, queries.npy      the distinct queries, with their instruction, as they go into the output
    own.bin, own.npy              negatives that the input brought along and that are not passages: numbers from m on
    rows.npy                      int64 [rows, 2 + S], the rows of the input: query, positive, own negatives; -1 where
                                  there is none, and everywhere in a row that is left out
    topics.npy                    int64 [queries, 3], for each query: its topic, which queries with the same words share
                                  whatever their instruction; the passage that has its words, or -1; its group, or -1
    groups.npy                    int64 [m], the group of each passage; -1 for none, SEVERAL_GROUPS for more than one
    meta.json                     counts, and a digest of the texts

Texts that differ only in white space or in Unicode normalisation count as one, and the first is kept. Passages that
differ only in an instruction before them count as one too, because symmetric tasks put it before some of them.
"""

import hashlib
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from data import raw_files, raw_formats
from data.instructions import add_instructions
from data.raw_columns import Columns, Tuples
from data.raw_rows import RawError, rows_of
from data.store_writer import text_key
from modeling.prompts import split_prompt
from retrieval.search import SEVERAL_GROUPS
from utils import RunError, aside_of, publish, read_json, remove, write_json

BATCH_ROWS = 1024  # rows of the input that are in memory at a time
CORPUS_COLUMNS = ("passage", "text", "document", "positive", "contents")  # what a corpus's texts may be called


@dataclass(frozen=True)
class Inputs:
    """The files to read, and how."""

    tuples: Path
    columns: Columns  # of `tuples`
    slots: int  # negatives that a row of `tuples` has room for
    corpora: tuple[tuple[Path, str], ...] = ()  # files of further passages, and the column of their texts
    instruction: str | None = None  # before every query that carries none
    group_column: str | None = None  # passages of a query's group are never its negatives


def same_text(text: str) -> bytes:
    """16 bytes that are equal for texts which differ only in white space or in Unicode normalisation."""
    folded = " ".join(text.split())
    if not folded.isascii():
        folded = unicodedata.normalize("NFC", folded)
    return text_key(folded.encode())


def same_words(text: str) -> bytes:
    """The same, whatever instruction stands before the text."""
    return same_text(split_prompt(text)[1])


def corpus_column(path: Path, wanted: str | None) -> str:
    """The column of a corpus file that holds its texts.

    Raises:
        RunError: it has no such column, or none that is known.
        RawError: the column holds something else.
    """
    names = column_names(path)
    looked_for = (wanted,) if wanted else CORPUS_COLUMNS
    found = [name for name in looked_for if name in names]
    if not found and not wanted and len(names) == 1:
        found = names
    if not found:
        there = ", ".join(names) or "none"
        raise RunError(
            f"{path}: no column {' or '.join(looked_for)}; the columns are {there}: choose one with --corpus_column"
        )
    if raw_formats.format_of(path) == raw_formats.PARQUET:
        raw_formats.check_types(raw_formats.schema_of(path), {found[0]: pa.string()})
    return found[0]


def column_names(path: Path) -> list[str]:
    """The columns of a file; of one that is written row by row those of its first row."""
    if raw_formats.format_of(path) == raw_formats.PARQUET:
        return raw_formats.schema_of(path).names
    _, first = next(rows_of(path, raw_formats.format_of(path)), (0, {}))
    return list(first) if isinstance(first, dict) else []


# ------------------------------------------------------------------------------------------ reading


class TextFile:
    """Texts of a finished file, by number; opened by memory map."""

    def __init__(self, folder: Path, name: str):
        self.starts = np.load(folder / f"{name}.npy", mmap_mode="r")
        path = folder / f"{name}.bin"
        self.data = np.zeros(0, np.uint8)
        if path.stat().st_size:  # an empty file cannot be mapped
            self.data = np.memmap(path, np.uint8, "r")

    def __len__(self) -> int:
        """How many there are."""
        return len(self.starts) - 1

    def get(self, number: int) -> str:
        """The text of this number."""
        return bytes(self.data[self.starts[number] : self.starts[number + 1]]).decode()


@dataclass(frozen=True)
class MiningTexts:
    """What `write` wrote, open; shapes in the module's docstring."""

    meta: dict
    passages: TextFile
    queries: TextFile
    own: TextFile
    rows: np.ndarray
    topics: np.ndarray
    groups: np.ndarray

    def passage(self, number: int) -> str:
        """A passage, or a negative that the input brought along."""
        if number < len(self.passages):
            return self.passages.get(number)
        return self.own.get(number - len(self.passages))


def open_texts(folder: Path) -> MiningTexts:
    """The files that `write` published in `folder`."""
    return MiningTexts(
        read_json(folder / "meta.json"),
        TextFile(folder, "passages"),
        TextFile(folder, "queries"),
        TextFile(folder, "own"),
        np.load(folder / "rows.npy", mmap_mode="r"),
        np.load(folder / "topics.npy", mmap_mode="r"),
        np.load(folder / "groups.npy", mmap_mode="r"),
    )


def read_tuples(inputs: Inputs) -> Iterator[tuple[Tuples, np.ndarray, list[str | None]]]:
    """The input's rows, part by part: (tuples, which of them are good [n], the group of each)."""
    types = dict(inputs.columns.types)
    if inputs.group_column:
        types[inputs.group_column] = pa.string()
    for table in raw_formats.read(inputs.tuples, types, BATCH_ROWS):
        tuples = inputs.columns.to_tuples(table, inputs.slots)
        groups = [None] * len(tuples.rows)
        if inputs.group_column:
            groups = table[inputs.group_column].cast(pa.string()).take(pa.array(tuples.rows)).to_pylist()
        yield tuples, raw_files.find_faults(tuples, None) == raw_files.GOOD, groups


# ------------------------------------------------------------------------------------------ writing


def write(folder: Path, inputs: Inputs) -> None:
    """Read everything once and publish it in `folder`: first the passages of the corpora, then those of the tuples.

    Raises:
        RawError: a row cannot be read.
    """
    aside = aside_of(folder)
    remove(aside)
    aside.mkdir(parents=True)
    passages = _TextWriter(aside, "passages")
    queries = _TextWriter(aside, "queries")
    own = _TextWriter(aside, "own")
    groups = _Groups()
    counts = _add_corpora(inputs, passages, groups)
    parts = [np.zeros((0, 2 + inputs.slots), np.int64)]
    topics = _Topics()
    for tuples, good, group_of_tuple in read_tuples(inputs):
        part = np.full((len(good), 2 + inputs.slots), -1, np.int64)
        texts = tuples.texts_of(good)
        texts[0] = add_instructions(texts[0], tuples.prompts_of(good), inputs.instruction)
        for row, tuple_texts in zip(np.flatnonzero(good), zip(*texts, strict=True), strict=True):
            query, positive, *negatives = tuple_texts
            part[row, 0] = queries.add(query, same_text(query))
            part[row, 1] = passages.add(positive, same_words(positive))
            topics.add(part[row, 0], query, groups.number(group_of_tuple[row]))
            groups.add(part[row, 1], group_of_tuple[row])
            for slot, negative in enumerate(negatives):
                if negative:
                    part[row, 2 + slot] = own.add(negative, same_words(negative))
        parts.append(part)
    rows = np.concatenate(parts)
    rows[:, 2:] = _renumbered(rows[:, 2:], own, passages)
    np.save(aside / "rows.npy", rows)
    np.save(aside / "topics.npy", topics.whole(passages))
    np.save(aside / "groups.npy", groups.whole(len(passages.numbers)))
    digest = passages.close() + queries.close()
    own.close()
    write_json(aside / "meta.json", counts | _count_rows(rows) | {"digest": digest})
    publish(folder, aside)


class _TextWriter:
    """Writes each distinct text once, in the order in which they come."""

    def __init__(self, folder: Path, name: str):
        self.ends_path = folder / f"{name}.npy"
        self.file = open(folder / f"{name}.bin", "wb")
        self.starts = [0]
        self.numbers: dict[bytes, int] = {}
        self.digest = hashlib.sha256()

    def add(self, text: str, key: bytes) -> int:
        """The number of a text, which is written where `key` is new."""
        number = self.numbers.setdefault(key, len(self.numbers))
        if number == len(self.starts) - 1:
            data = text.encode()
            self.file.write(data)
            self.digest.update(len(data).to_bytes(8, "little") + data)
            self.starts.append(self.starts[-1] + len(data))
        return number

    def close(self) -> str:
        """Write where each text begins. Returns a digest of all texts, in hex."""
        self.file.close()
        np.save(self.ends_path, np.array(self.starts, np.int64))
        return self.digest.hexdigest()


class _Topics:
    """Which queries have the same words behind their instruction."""

    def __init__(self):
        self.numbers: dict[bytes, int] = {}  # words -> topic
        self.of_query: list[int] = []
        self.group_of_query: list[int] = []

    def add(self, query: int, text: str, group: int) -> None:
        """Note the topic of a query, numbers of which come in order, and the group of its first row."""
        if query == len(self.of_query):
            self.group_of_query.append(group)
            self.of_query.append(self.numbers.setdefault(same_words(text), len(self.numbers)))

    def whole(self, passages: _TextWriter) -> np.ndarray:
        """int64 [queries, 3]: each query's topic, the passage that it is itself or -1, and its group or -1."""
        passage_of_topic = np.full(len(self.numbers), -1, np.int64)
        for words, topic in self.numbers.items():
            passage_of_topic[topic] = passages.numbers.get(words, -1)
        of_query = np.array(self.of_query, np.int64)
        return np.stack([of_query, passage_of_topic[of_query], np.array(self.group_of_query, np.int64)], axis=1)


class _Groups:
    """The group of each passage."""

    def __init__(self):
        self.numbers: dict[str, int] = {}  # group -> its number
        self.of_passage: dict[int, int] = {}

    def number(self, group: str | None) -> int:
        """The number of a group; -1 for none."""
        if group is None:
            return -1
        return self.numbers.setdefault(group, len(self.numbers))

    def add(self, passage: int, group: str | None) -> None:
        """Note that a passage is in a group; None notes nothing."""
        number = self.number(group)
        if number >= 0 and self.of_passage.setdefault(int(passage), number) != number:
            self.of_passage[int(passage)] = SEVERAL_GROUPS

    def whole(self, count: int) -> np.ndarray:
        """int64 [count], -1 where a passage has none, SEVERAL_GROUPS where it has more than one."""
        groups = np.full(count, -1, np.int64)
        groups[list(self.of_passage)] = list(self.of_passage.values())
        return groups


def _add_corpora(inputs: Inputs, passages: _TextWriter, groups: _Groups) -> dict[str, int]:
    """Write the passages of all corpus files. Returns how many there were."""
    counts = {"corpus_rows": 0, "corpus_rows_empty": 0}
    for path, column in inputs.corpora:
        names = [column]
        if inputs.group_column and inputs.group_column in column_names(path):
            names.append(inputs.group_column)
        for text, *group in _corpus_rows(path, names):
            counts["corpus_rows"] += 1
            if text and not text.isspace():
                groups.add(passages.add(text, same_words(text)), group[0] if group else None)
            else:
                counts["corpus_rows_empty"] += 1
    return counts


def _corpus_rows(path: Path, names: list[str]) -> Iterator[tuple[str | None, ...]]:
    """These columns of a file, row by row. Raises RunError if a row cannot be read."""
    try:
        for table in raw_formats.read(path, dict.fromkeys(names, pa.string()), BATCH_ROWS):
            columns = [table[name].cast(pa.string()).to_pylist() for name in names]
            yield from zip(*columns, strict=True)
    except RawError as error:
        raise RunError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from None


def _renumbered(numbers: np.ndarray, own: _TextWriter, passages: _TextWriter) -> np.ndarray:
    """Own negatives by passage number where they are passages, else from the number of passages on; -1 stays.

    Args:
        numbers: [rows, S], places in `own`.
    """
    new = np.arange(len(own.numbers) + 1, dtype=np.int64) + len(passages.numbers)
    new[-1] = -1  # where -1 leads
    for key, place in own.numbers.items():
        new[place] = passages.numbers.get(key, new[place])
    return new[numbers]


def _count_rows(rows: np.ndarray) -> dict[str, int]:
    """What the report says of the input."""
    good = rows[rows[:, 0] >= 0, :2]
    distinct = len(np.unique(good, axis=0)) if len(good) else 0
    return {"rows": len(rows), "bad_rows": len(rows) - len(good), "duplicate_rows": len(good) - distinct}
