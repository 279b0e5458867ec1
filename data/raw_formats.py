"""The two formats of raw files, Parquet and JSONL: the names of their columns, and their rows as Arrow tables.

What the columns mean is not known here: raw_files.py says which ones to read, and what they must hold.
"""

import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from utils import first_line

_BUFFER = 2**16  # bytes read ahead of each column of a Parquet file


class RawError(ValueError):
    """A raw file that cannot be read; the message names the row, not the file."""


def column_names(path: Path) -> list[str]:
    """The columns of a file: of Parquet by its schema, of JSONL all keys of all lines. Raises RawError."""
    if path.is_dir():
        raise RawError("is a folder: a dataset is one file; give the folder itself as --input_dir, or join its files")
    if os.path.getsize(path) == 0:
        raise RawError("the file is empty")
    if path.suffix == ".parquet":
        return _schema(path).names
    names = {}  # a dictionary, because it keeps the order of first appearance
    for _, row in _json_rows(path):
        names.update(dict.fromkeys(row))
    return list(names)


def check_types(path: Path, types: dict[str, pa.DataType]) -> None:
    """Raise RawError where a column of a Parquet file holds something else than `types` asks for.

    The lines of a JSONL file have no common schema: a value that does not fit is found when it is read.
    """
    if path.suffix != ".parquet":
        return
    schema = _schema(path)
    wrong = []
    for name, wanted in types.items():
        kind = schema.field(name).type
        if not _fits(kind, wanted):
            what = "lists of texts" if pa.types.is_list(wanted) else "text"
            wrong.append(f"column {name!r} holds {kind}, not {what}")
    if wrong:
        raise RawError("\n".join(wrong))


def read(path: Path, types: dict[str, pa.DataType], batch_rows: int, skip: int) -> Iterator[pa.Table]:
    """These columns of a file's rows as Arrow tables of at most `batch_rows`, from row `skip` on.

    Raises:
        RawError: a row cannot be read.
    """
    if path.suffix == ".parquet":
        return _read_parquet(path, list(types), batch_rows, skip)
    return _read_jsonl(path, pa.schema(list(types.items())), batch_rows, skip)


# --------------------------------------------------------------------------------------------- Parquet


def _schema(path: Path) -> pa.Schema:
    """The columns of a Parquet file and their types. Raises RawError where it is none."""
    try:
        return pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        raise RawError(f"not a Parquet file ({first_line(error)})") from None


def _fits(kind: pa.DataType, wanted: pa.DataType) -> bool:
    """Whether a column of type `kind` can be read as one of type `wanted`: texts, or lists of texts."""
    if pa.types.is_list(wanted):
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
        return is_list and _fits(kind.value_type, pa.string())
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)


def _read_parquet(path: Path, names: list[str], batch_rows: int, skip: int) -> Iterator[pa.Table]:
    """Read page by page, so that memory does not grow with the file.

    Row groups of a million tuples are common, and `datasets` holds a whole one (dev/LOG.md).
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


# ----------------------------------------------------------------------------------------------- JSONL


def _read_jsonl(path: Path, schema: pa.Schema, batch_rows: int, skip: int) -> Iterator[pa.Table]:
    """Read line by line, because `datasets` takes the columns and types of the first 10 MB for those of the file."""
    rows = islice(_json_rows(path), skip, None)
    while True:
        batch = list(islice(rows, batch_rows))
        if not batch:
            return
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
