"""The formats of raw files: the names of their columns, and their rows as Arrow tables.

    .parquet                        columns with a schema, read page by page
    .jsonl .json .csv .tsv, .gz     rows, read one by one (raw_rows.py)

What the columns mean is not known here: raw_columns.py says which ones to read, and what they must hold.
"""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.raw_rows import NOT_UTF8, RawError, rows_of
from utils import first_line, plural

PARQUET = ".parquet"
BY_ROW = (".jsonl", ".json", ".csv", ".tsv")
_BUFFER = 2**16  # bytes read ahead of each column of a Parquet file
_SHOWN = 10  # rows that cannot be read are named with the reason; the others are counted


def format_of(path: Path) -> str | None:
    """.parquet, .jsonl, .json, .csv or .tsv by a file's name, in any case and whether or not .gz follows; or None."""
    name = path.name.lower()
    suffix = Path(name.removesuffix(".gz")).suffix
    if suffix in BY_ROW or (suffix == PARQUET and not name.endswith(".gz")):
        return suffix
    return None


def dataset_name(path: Path) -> str:
    """What a raw file's dataset is called: its name without the format's endings."""
    stem = path.name
    if stem.lower().endswith(".gz"):
        stem = stem[: -len(".gz")]
    return Path(stem).stem


def check_file(path: Path) -> None:
    """Raise RawError for what is not a file, may not be read, or is empty."""
    if path.is_dir():
        raise RawError("is a folder: a dataset is one file; give the folder itself as --input_dir, or join its files")
    try:
        with open(path, "rb") as file:
            first_byte = file.read(1)
    except OSError as error:
        raise RawError(f"cannot be read ({error.strerror or first_line(error)})") from None
    if not first_byte:
        raise RawError("the file is empty")


class UnreadableRows:
    """Rows of a file that cannot be read: how many, and the first of them."""

    def __init__(self):
        self.count = 0
        self.first: list[tuple[int, str]] = []

    def add(self, row: int, why: str) -> None:
        """Count a row; the first ones are remembered."""
        self.count += 1
        self.first.append((row, why))
        if len(self.first) > _SHOWN:
            self.first = sorted(self.first)[:_SHOWN]

    def describe(self) -> list[str]:
        """A line for each of the first rows, and one for the number of the others."""
        lines = [f"row {row} (counted from 0){_joined(why)}" for row, why in sorted(self.first)]
        others = self.count - len(self.first)
        if others:
            lines.append(f"and {plural(others, 'more row')} that cannot be read")
        return lines


def _joined(why: str) -> str:
    """What is wrong with a row, as it follows the row's number: a value after a colon, a verb after a space."""
    return f": {why}" if why.startswith("'") else f" {why}"


def read(path: Path, types: dict[str, pa.DataType], batch_rows: int, skip: int = 0) -> Iterator[pa.Table]:
    """These columns of a file's rows as Arrow tables of at most `batch_rows`, from row `skip` on; nothing is cached.

    Raises:
        RawError: a row cannot be read.
    """
    if format_of(path) == PARQUET:
        yield from _read_parquet(path, list(types), batch_rows, skip)
        return
    unreadable = UnreadableRows()
    for _, table in _read_rows(path, types, batch_rows, skip, unreadable):
        if unreadable.count:
            break
        yield table
    if unreadable.count:
        raise RawError("\n".join(unreadable.describe()))


def survey(
    path: Path, types: dict[str, pa.DataType], batch_rows: int, unreadable: UnreadableRows, wanted: range | None = None
) -> Iterator[tuple[np.ndarray, pa.Table]]:
    """All rows that can be read, as (their numbers [n], table of them); the others are added to `unreadable`.

    Args:
        wanted: rows to be read, of a Parquet file; None for all.
    """
    if format_of(path) != PARQUET:
        yield from _read_rows(path, types, batch_rows, 0, unreadable)
        return
    begin = 0 if wanted is None else wanted.start
    for table in _read_parquet(path, list(types), batch_rows, begin):
        if wanted is not None:
            table = table.slice(0, wanted.stop - begin)
        if not len(table):
            return
        yield np.arange(begin, begin + len(table)), table
        begin += len(table)


# --------------------------------------------------------------------------------------------- Parquet


def schema_of(path: Path) -> pa.Schema:
    """The columns of a Parquet file and their types. Raises RawError if it is not one."""
    try:
        return pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        raise RawError(f"not a Parquet file ({first_line(error)})") from None


def rows_of_schema(path: Path) -> int | None:
    """The rows of a Parquet file, by its last bytes; None of another file, or where they cannot be read."""
    if format_of(path) != PARQUET:
        return None
    try:
        return pq.read_metadata(path).num_rows
    except (pa.ArrowException, OSError):
        return None


def check_types(schema: pa.Schema, types: dict[str, pa.DataType]) -> None:
    """Raise RawError if a column of a Parquet file holds something other than `types` asks for.

    Files that are written row by row have no schema: a value that does not fit is found when it is read.
    """
    wrong = []
    for name, wanted in types.items():
        kind = schema.field(name).type
        if not _fits(kind, wanted):
            what = "lists of texts" if pa.types.is_list(wanted) else "text"
            wrong.append(f"column {name!r} holds {kind}, not {what}{_remedy(name, is_list=_is_list(kind))}")
    if wrong:
        raise RawError("\n".join(wrong))


def rows_of_parquet(path: Path, names: list[str]) -> Iterator[tuple[int, dict]]:
    """These columns of a Parquet file, row by row: slow, for the few files whose rows must be looked at one by one."""
    row = 0
    for table in _read_parquet(path, names, batch_rows=1024, skip=0):
        for values in table.to_pylist():
            yield row, values
            row += 1


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _fits(kind: pa.DataType, wanted: pa.DataType) -> bool:
    """Whether a column of type `kind` can be read as one of type `wanted`: texts, or lists of texts."""
    if pa.types.is_list(wanted):
        return _is_list(kind) and _fits(kind.value_type, pa.string())
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)


def _remedy(name: str, is_list: bool) -> str:
    """What to do about a column that does not hold texts, where its name is the reason."""
    if name == "prompt":
        return ": it is read as the instruction of the row's query; if it is something else, rename the column"
    if not is_list:
        return ""
    if name == "negative":
        return ": call the column negatives"
    if name in ("passage", "positive"):
        return ": call the column pos"
    return ""


def _read_parquet(path: Path, names: list[str], batch_rows: int, skip: int) -> Iterator[pa.Table]:
    """What `read_unchecked` gives. Raises RawError also for a text that is not UTF-8."""
    row = skip
    for table in read_unchecked(path, names, batch_rows, skip):
        for batch in table.to_batches():
            _check_utf8(batch, row)
            row += len(batch)
        yield table


def read_unchecked(path: Path, names: list[str], batch_rows: int, skip: int) -> Iterator[pa.Table]:
    """These columns of a Parquet file, from row `skip` on, whose texts need not be UTF-8.

    Read page by page, so that memory does not grow with the file. Row groups of a million tuples are
    common, and `datasets` holds a whole one (dev/LOG.md).

    Raises:
        RawError: the file is damaged.
    """
    done = 0
    try:
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER) as file:
            group_rows = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
            first = int(np.searchsorted(np.cumsum(group_rows), skip, side="right"))  # the row group with row `skip`
            done = sum(group_rows[:first])
            groups = range(first, len(group_rows))
            for batch in file.iter_batches(batch_rows, groups, names):
                rest = batch.slice(max(skip - done, 0))
                if len(rest):
                    yield pa.Table.from_batches([rest])
                done += len(batch)
    except (pa.ArrowException, OSError) as error:
        raise RawError(f"damaged after row {done} ({first_line(error)}): fetch or write it again") from None


def _check_utf8(batch: pa.RecordBatch, begin: int) -> None:
    """Raise RawError for a text that is not UTF-8: Parquet does not look at what is written as one.

    Args:
        begin: the row of the file that is the batch's first.
    """
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if _is_valid(column):
            continue
        rows = (row for row in range(len(column)) if not _is_valid(column.slice(row, 1)))
        row = next(rows, 0)  # a dictionary of texts does not say whose text it is
        raise RawError(f"row {begin + row} (counted from 0): {name!r} {NOT_UTF8}")


def _is_valid(column: pa.Array) -> bool:
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


# -------------------------------------------------------------------------------------------- by row


def _read_rows(
    path: Path, types: dict[str, pa.DataType], batch_rows: int, skip: int, unreadable: UnreadableRows
) -> Iterator[tuple[np.ndarray, pa.Table]]:
    """Read row by row, because `datasets` takes the columns and types of the first 10 MB for those of the file.

    Gives (row numbers [n], table of them) for every `batch_rows` rows of the file, without those that are unreadable.
    """
    schema = pa.schema(list(types.items()))
    lists = [name for name, kind in types.items() if pa.types.is_list(kind)]
    rows = islice(rows_of(path, format_of(path)), skip, None)
    while True:
        batch = list(islice(rows, batch_rows))
        if not batch:
            return
        values = [value for _, value in batch]
        table = None
        if all(isinstance(value, dict) for value in values) and _are_lists(values, lists):
            table = _table(values, schema)
        if table is None:
            batch = _without_unreadable(batch, schema, unreadable)
            table = pa.Table.from_pylist([value for _, value in batch], schema)
        yield np.array([row for row, _ in batch], np.int64), table


def _are_lists(rows: list[dict], names: list[str]) -> bool:
    """Whether these columns hold lists. Arrow would take the letters of a text for a list of texts."""
    return all(isinstance(row.get(name), list | None) for name in names for row in rows)


def _table(rows: list[dict], schema: pa.Schema) -> pa.Table | None:
    """The rows as an Arrow table, None if a value does not fit."""
    try:
        return pa.Table.from_pylist(rows, schema)
    except (pa.ArrowException, UnicodeError, TypeError):
        return None


def _without_unreadable(batch: list, schema: pa.Schema, unreadable: UnreadableRows) -> list:
    """The (row, values) that can be read; the others are added to `unreadable`."""
    kept = []
    for row, values in batch:
        problem = values if isinstance(values, str) else _misfit(values, schema)
        if problem is None:
            kept.append((row, values))
        else:
            unreadable.add(row, problem)
    return kept


def _misfit(values: dict, schema: pa.Schema) -> str | None:
    """What is wrong with the first value that does not fit, or None."""
    for name, kind in zip(schema.names, schema.types, strict=True):
        value = values.get(name)
        is_list = isinstance(value, list)
        texts = value if is_list and pa.types.is_list(kind) else [value]
        if pa.types.is_list(kind) and not isinstance(value, list | None):
            texts = [0]  # not one that fits
        if not all(_is_text(text) for text in texts):
            what = "a list of texts" if pa.types.is_list(kind) else "text"
            return f"{name!r} holds {json.dumps(value)[:40]}, not {what}{_remedy(name, is_list)}"
    return None


def _is_text(value: object) -> bool:
    """Whether a value is null, or text that can be written as UTF-8."""
    if value is None:
        return True
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
