"""Raw training tuples on disk: Parquet or JSONL files, one a dataset, read in three column styles.

    query, passage, negative_1 .. negative_K      the published layout; `positive` may stand for `passage`
    anchor, positive, negative_1 .. negative_K    Sentence Transformers; one `negative` may stand alone
    query, pos, neg                               FlagEmbedding, lists of texts; one tuple for each text of pos

Negatives may be missing: null, an empty text, a shorter list, or no negative column at all.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

SUFFIXES = (".parquet", ".jsonl")
# What can be wrong with a tuple; number 0 is nothing.
BAD_KINDS = (None, "an empty or null query", "an empty or null positive", "a positive that is also its negative")
_STYLES = (("query", "passage"), ("query", "positive"), ("anchor", "positive"))
_REMEDY = "have query, passage, negative_1..K; or anchor, positive, negative_k; or query, pos, neg as lists"
_BUFFER = 2**16  # bytes read ahead of each column of a Parquet file
_SHOWN = 5  # row numbers given for a kind of bad row


class RawError(ValueError):
    """A raw file that cannot be read; the message names the row, not the file."""


@dataclass(frozen=True)
class Columns:
    """Which columns of a file hold what. `lists` is FlagEmbedding's style, whose columns hold lists."""

    query: str
    positive: str
    negatives: tuple[str, ...]
    lists: bool = False

    @property
    def types(self) -> dict[str, pa.DataType]:
        """Column -> the type that it must hold."""
        others = pa.list_(pa.string()) if self.lists else pa.string()
        return {self.query: pa.string()} | dict.fromkeys((self.positive, *self.negatives), others)


@dataclass(frozen=True)
class Tuples:
    """Some tuples of a raw file, column by column."""

    texts: list[pa.Array]  # query, positive, negative x slots; each [n], null where missing
    rows: np.ndarray  # [n] the raw row of each tuple, from 0 in this part of the file

    def kinds(self) -> np.ndarray:
        """What is wrong with each tuple, [n] numbers into BAD_KINDS."""
        query, positive, *negatives = self.texts
        own = np.zeros(len(query), bool)
        for negative in negatives:
            own |= _numpy(pc.fill_null(pc.equal(negative, positive), False))
        return np.select([_numpy(pc.is_null(query)), _numpy(pc.is_null(positive)), own], [1, 2, 3], 0)


@dataclass
class Survey:
    """What one pass over a raw file found: its size, and its bad rows."""

    columns: Columns | None = None
    rows: int = 0
    good: int = 0  # tuples with nothing wrong
    slots: int = 0  # K, the most negatives a row has room for
    problems: list[str] = field(default_factory=list)  # the file cannot be used
    bad_rows: dict[str, list[int]] = field(default_factory=dict)  # kind -> rows, from 0

    def describe_bad_rows(self, path: Path) -> list[str]:
        """A line for each kind of bad row: how many, and the first of them."""
        lines = []
        for kind, rows in self.bad_rows.items():
            shown = ", ".join(map(str, rows[:_SHOWN])) + (", ..." if len(rows) > _SHOWN else "")
            lines.append(f"{path}: {len(rows)} row{'s'[: len(rows) > 1]} with {kind} (row {shown}, counted from 0)")
        return lines


def raw_files(folder: Path) -> list[Path]:
    """The raw files of a folder, sorted by name."""
    return sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)  # also folders: refused by name


def find_columns(names: list[str]) -> Columns | None:
    """How to read a file with columns of these names, or None."""
    if {"query", "pos"} <= set(names):
        return Columns("query", "pos", ("neg",) if "neg" in names else (), lists=True)
    style = next((style for style in _STYLES if set(style) <= set(names)), None)
    if style is None:
        return None
    numbered = sorted((int(n.rpartition("_")[2]), n) for n in names if re.fullmatch(r"negative_\d+", n))
    return Columns(*style, tuple(n for _, n in numbered) or (("negative",) if "negative" in names else ()))


def read(path: Path, columns: Columns, batch_rows: int, skip: int = 0) -> Iterator[pa.Table]:
    """The file's rows as Arrow tables of at most `batch_rows`, from row `skip` on; streamed, nothing is cached.

    Raises:
        RawError: a row cannot be read.
    """
    return (_read_parquet if path.suffix == ".parquet" else _read_jsonl)(path, columns, batch_rows, skip)


def to_tuples(table: pa.Table, columns: Columns, slots: int) -> Tuples:
    """Rows as tuples: one for each raw row, or in FlagEmbedding's style one for each of its positives.

    An empty text, or one of white space alone, becomes null.
    """
    values = [table[name].combine_chunks() for name in columns.types]
    if not columns.lists:
        nothing = pa.nulls(len(table), pa.large_string())
        texts = [*map(_texts, values), *[nothing] * (slots - len(columns.negatives))]
        return Tuples(texts, np.arange(len(table)))
    positives, counts, starts = _flat(values[1])
    rows = np.repeat(np.arange(len(table)), np.maximum(counts, 1))  # a row without a positive stays, as a bad one
    first = np.cumsum(np.maximum(counts, 1)) - np.maximum(counts, 1)
    nth = np.arange(len(rows)) - first[rows]
    texts = [_texts(values[0]).take(pa.array(rows)), _take(positives, starts[rows] + nth, nth < counts[rows])]
    if columns.negatives:
        negatives, counts, starts = _flat(values[2])
        texts += [_take(negatives, starts[rows] + slot, slot < counts[rows]) for slot in range(slots)]
    return Tuples(texts, rows)


def survey(path: Path, batch_rows: int = 1024) -> Survey:
    """Read a raw file once and report everything that is wrong with it."""
    found = Survey()
    try:
        names = _names(path)
        found.columns = find_columns(names)
        if found.columns is None:
            raise RawError(f"columns {', '.join(names)}: no query and positive among them; {_REMEDY}")
        if not found.columns.lists:
            found.slots = len(found.columns.negatives)
        for table in read(path, found.columns, batch_rows):
            _survey_table(found, table)
        if not found.rows:
            raise RawError("the file has no rows")
    except RawError as error:
        found.problems += [f"{path}: {line}" for line in str(error).splitlines()]
    return found


def _survey_table(found: Survey, table: pa.Table) -> None:
    columns = found.columns
    if columns.lists and columns.negatives:
        found.slots = max(found.slots, pc.max(pc.list_value_length(table[columns.negatives[0]])).as_py() or 0)
    tuples = to_tuples(table, columns, found.slots)
    kinds = tuples.kinds()
    found.good += int((kinds == 0).sum())
    for kind in np.unique(kinds[kinds > 0]):
        rows = np.unique(tuples.rows[kinds == kind]) + found.rows
        found.bad_rows.setdefault(BAD_KINDS[kind], []).extend(rows.tolist())
    found.rows += len(table)


# --------------------------------------------------------------------------------------- the two formats


def _names(path: Path) -> list[str]:
    """The columns of a file: of Parquet by its schema, of JSONL all keys of all lines. Raises RawError."""
    if path.is_dir():
        raise RawError("is a folder: a dataset is one file; give the folder itself as --input_dir, or join its files")
    if os.path.getsize(path) == 0:
        raise RawError("the file is empty")
    if path.suffix == ".parquet":
        try:
            schema = pq.read_schema(path)
        except (pa.ArrowException, OSError) as error:
            raise RawError(f"not a Parquet file ({_first_line(error)})") from None
        _check_types(schema)
        return schema.names
    return list(dict.fromkeys(name for _, row in _json_rows(path) for name in row))


def _check_types(schema: pa.Schema) -> None:
    columns = find_columns(schema.names)
    kinds = {name: schema.field(name).type for name in (columns.types if columns else ())}
    wrong = [
        f"column {name!r} holds {kind}, not {'lists of texts' if pa.types.is_list(columns.types[name]) else 'text'}"
        for name, kind in kinds.items()
        if not _fits(kind, columns.types[name])
    ]
    if wrong:
        raise RawError("\n".join(wrong))


def _fits(kind: pa.DataType, wanted: pa.DataType) -> bool:
    if pa.types.is_list(wanted):
        return (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and _fits(kind.value_type, pa.string())
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)


def _read_parquet(path: Path, columns: Columns, batch_rows: int, skip: int) -> Iterator[pa.Table]:
    """Page by page, so that memory does not grow with the file: row groups of a million tuples are common, and
    `datasets` holds a whole one (LOG.md)."""
    done = 0
    try:
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER) as file:
            groups = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
            first = int(np.searchsorted(np.cumsum(groups), skip, side="right"))  # the row group with row `skip`
            done = sum(groups[:first])
            for batch in file.iter_batches(batch_rows, range(first, len(groups)), list(columns.types)):
                if rest := batch.slice(max(skip - done, 0)):
                    yield pa.Table.from_batches([rest])
                done += len(batch)
    except (pa.ArrowException, OSError) as error:
        raise RawError(f"damaged after row {done} ({_first_line(error)}): fetch or write it again") from None


def _read_jsonl(path: Path, columns: Columns, batch_rows: int, skip: int) -> Iterator[pa.Table]:
    """Line by line, because `datasets` takes the columns and types of the first 10 MB for those of the file."""
    rows = islice(_json_rows(path), skip, None)
    schema = pa.schema(list(columns.types.items()))
    while batch := list(islice(rows, batch_rows)):
        try:
            yield pa.Table.from_pylist([row for _, row in batch], schema)
        except (pa.ArrowException, UnicodeError, TypeError):
            raise RawError("\n".join(_misfits(batch, schema))) from None


def _json_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """(row, object) of each line that is not blank, rows counted from 0. Raises RawError."""
    row = 0
    with open(path, "rb") as file:
        for line in file:
            if line.isspace():
                continue
            try:
                value = json.loads(line)
            except UnicodeDecodeError:
                raise RawError(f"row {row} (counted from 0) is not UTF-8: save the file as UTF-8") from None
            except ValueError as error:
                reason = str(error).partition(": line")[0]
                raise RawError(f"row {row} (counted from 0) is not JSON ({reason}): mend it, and check again") from None
            if not isinstance(value, dict):
                raise RawError(f"row {row} (counted from 0) is not an object of column names and values")
            yield row, value
            row += 1


def _misfits(batch: list[tuple[int, dict]], schema: pa.Schema) -> Iterator[str]:
    """The first value of each column that does not fit, as a line."""
    for name, kind in zip(schema.names, schema.types, strict=True):
        for row, values in batch:
            try:
                pa.array([values.get(name)], kind)
            except (pa.ArrowException, UnicodeError, TypeError):
                what = "a list of texts" if pa.types.is_list(kind) else "text"
                yield f"row {row} (counted from 0): {name!r} holds {json.dumps(values[name])[:40]}, not {what}"
                break


# ------------------------------------------------------------------------------------------ columns


def _texts(column: pa.Array) -> pa.Array:
    """A column of texts, null where there is nothing but white space."""
    column = column.cast(pa.large_string())
    return pc.if_else(pc.equal(pc.utf8_trim_whitespace(column), ""), pa.scalar(None, pa.large_string()), column)


def _flat(column: pa.Array) -> tuple[pa.Array, np.ndarray, np.ndarray]:
    """A column of lists as (all texts, how many in each row, where each row begins); null is an empty list."""
    counts = _numpy(pc.fill_null(pc.list_value_length(column), 0)).astype(np.int64)
    return _texts(column.flatten()), counts, np.cumsum(counts) - counts


def _take(texts: pa.Array, places: np.ndarray, real: np.ndarray) -> pa.Array:
    """texts[places] where `real`, else null."""
    return texts.take(pa.array(places, pa.int64(), mask=~real))


def _numpy(column: pa.Array) -> np.ndarray:
    return column.to_numpy(zero_copy_only=False)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
