"""Reads the rows of a source: from files by data/raw_formats.py and data/raw_rows.py, or from the hub by `datasets`.

A row is (number, values) or (number, why it cannot be read), numbered from 0 in its file. Memory holds one batch at a
time.
"""

import glob
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data import raw_formats, raw_rows
from data.raw_rows import NOT_OBJECT, NOT_UTF8, NOTHING_AFTER, RawError, Row
from tuples.sources import judged
from tuples.sources.columns import column_problems, path_problems, schema_problems
from tuples.sources.description import FILE, Source
from utils import first_line

PIECE_BYTES = 2**26  # of a Parquet file, compressed; a piece is read by one job
_BATCH_ROWS = 1024
_LOOKED_AT = 1000  # rows in which the columns of a file without a schema are looked for


@dataclass(frozen=True)
class Input:
    """A file of a source, or its hub dataset."""

    name: str  # in reports
    path: Path | None  # None = of the hub
    size: int  # bytes; 0 = unknown
    changed: int  # when, in nanoseconds; 0 = unknown


@dataclass(frozen=True)
class Piece:
    """Rows of one input that are read together."""

    source: int  # number of the description
    number: int  # of the piece in its source
    input: Input
    input_number: int
    begin: int  # row
    end: int | None  # row after the last; None = to the end
    size: int  # bytes

    def identity(self) -> dict:
        """What its rows depend on, beside the description."""
        return {
            "input": self.input.name,
            "size": self.input.size,
            "changed": self.input.changed,
            "begin": self.begin,
            "end": self.end,
        }


# ----------------------------------------------------------------------------------- what there is to read


def find_inputs(source: Source, folder: Path) -> tuple[list[Input], list[str]]:
    """The inputs of a source, sorted by name within each pattern; and why some cannot be read.

    Args:
        folder: of the description; `files` stand relative to it.
    """
    if source.hub is not None:
        return [Input("/".join([source.hub, *source.splits]), None, 0, 0)], _hub_problems(source)
    patterns = [source.files] if isinstance(source.files, str) else source.files
    inputs = []
    problems = []
    for pattern in patterns:
        found, found_problems = _inputs_of(pattern, source, folder)
        inputs += found
        problems += found_problems
    times = Counter(found.name for found in inputs)
    problems += [f"files: {name}: given twice" for name in sorted(times) if times[name] > 1]
    return inputs, problems


def _inputs_of(pattern: str, source: Source, folder: Path) -> tuple[list[Input], list[str]]:
    """The inputs of one pattern, and why some of its files cannot be read."""
    names = _names_that_fit(pattern, folder)
    if not names:
        return [], [f"files: {pattern}: no such file in {folder}"]
    inputs = []
    problems = []
    for name in names:
        path = folder / name
        found = _file_problems(path, source)
        problems += [f"files: {path}: {problem}" for problem in found]
        if not found:
            files = [path]
            if source.layout:
                files = [file for _, file in judged.files_of(path, source.splits)]
            stats = [file.stat() for file in files]
            changed = max(stat.st_mtime_ns for stat in stats)
            inputs.append(Input(name, path, sum(stat.st_size for stat in stats), changed))
    return inputs, problems


def _names_that_fit(pattern: str, folder: Path) -> list[str]:
    """The files of a pattern, sorted, relative to `folder`; a pattern may also be the very name of a file."""
    pattern = os.path.expanduser(pattern)
    if (folder / pattern).exists():
        return [pattern]
    return sorted(glob.glob(pattern, root_dir=folder, recursive=True))


def _file_problems(path: Path, source: Source) -> list[str]:
    """Why a file, or a folder of three tables, cannot be read as the description says."""
    if source.layout:
        return _folder_problems(path, source)
    if path.is_dir():
        return ["is a folder: name its files, for instance with /*.parquet"]
    if raw_formats.format_of(path) is None:
        return ["must end in one of .parquet, .jsonl, .json, .csv, .tsv"]
    try:
        raw_formats.check_file(path)
        if raw_formats.format_of(path) == raw_formats.PARQUET:
            schema = raw_formats.schema_of(path)
            if not pq.read_metadata(path).num_rows:
                raise RawError("the file has no rows")
            return schema_problems(schema, source)
        rows = (values for _, values in _first_rows(path))
        return column_problems(_names_of_rows(path), source) or path_problems(rows, source)
    except RawError as error:
        return str(error).splitlines()


def _folder_problems(folder: Path, source: Source) -> list[str]:
    """Why a folder of three tables cannot be read as the description says."""
    problems = judged.folder_problems(folder, source.splits)
    if problems:
        return problems
    for table, path in judged.files_of(folder, source.splits):
        try:
            found = judged.table_problems(table, _names_of_rows(path))
        except RawError as error:
            found = str(error).splitlines()
        problems += [f"{path.relative_to(folder)}: {problem}" for problem in found]
    return problems + column_problems(list(judged.COLUMNS), source)


def _names_of_rows(path: Path) -> list[str]:
    """The columns of a file without a schema, by its first rows. Raises RawError if none can be read."""
    names = {}  # a dictionary, because it keeps the order
    unreadable = raw_formats.UnreadableRows()
    for row, values in _first_rows(path):
        if isinstance(values, dict):
            names.update(dict.fromkeys(values))
        else:
            unreadable.add(row, values)
    if not names:
        raise RawError("\n".join(unreadable.describe() or ["the file has no rows"]))
    return list(names)


def _first_rows(path: Path) -> Iterator[Row]:
    return islice(raw_rows.rows_of(path, raw_formats.format_of(path)), _LOOKED_AT)


def pieces_of(inputs: list[Input], source_number: int) -> list[Piece]:
    """The pieces of a source in the order of its rows; of a Parquet file whole row groups, else the whole input."""
    pieces = []
    for input_number, found in enumerate(inputs):
        ranges = [(0, None, max(found.size, 1))]
        if found.path is not None and raw_formats.format_of(found.path) == raw_formats.PARQUET:
            ranges = _row_ranges(found.path)
        for begin, end, size in ranges:
            pieces.append(Piece(source_number, len(pieces), found, input_number, begin, end, size))
    return pieces


def _row_ranges(path: Path) -> list[tuple[int, int, int]]:
    """(first row, row after the last, bytes) of neighbouring row groups that have PIECE_BYTES together."""
    metadata = pq.read_metadata(path)
    ranges = []
    begin = end = size = 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        end += group.num_rows
        size += sum(group.column(column).total_compressed_size for column in range(group.num_columns))
        if size >= PIECE_BYTES or number == metadata.num_row_groups - 1:
            ranges.append((begin, end, max(size, 1)))
            begin = end
            size = 0
    return ranges


# ------------------------------------------------------------------------------------------- its rows


def rows_of(source: Source, piece: Piece) -> Iterator[Row]:
    """The rows of a piece, with the columns that the source reads.

    Raises:
        RawError: nothing can be read from some row on.
    """
    path = piece.input.path
    if path is None:
        yield from _rows_of_hub(source)
        return
    if source.layout:
        yield from judged.rows_of_folder(path, source.splits, _rows_of_table)
        return
    names = list(dict.fromkeys(chain.from_iterable(source.columns_of.values())))
    rows = _rows_of_file(path, [name for name in names if name != FILE], piece)
    if FILE not in names:
        yield from rows
        return
    of_file = {FILE: raw_formats.dataset_name(path)}
    for row, values in rows:
        if isinstance(values, dict):
            values = values | of_file
        yield row, values


def _rows_of_file(path: Path, names: list[str], piece: Piece) -> Iterator[Row]:
    if raw_formats.format_of(path) == raw_formats.PARQUET:
        return _rows_of_parquet(path, names, piece.begin, piece.end)
    return _rows_by_row(path)


def _rows_of_table(path: Path) -> Iterator[Row]:
    """The rows of one table of several; an error begins with the table's name."""
    try:
        yield from _rows_by_row(path)
    except RawError as error:
        raise RawError(f"{path.name}: {error}") from None


def _rows_by_row(path: Path) -> Iterator[Row]:
    """All rows of a file that is written row by row. Raises RawError at a row after which nothing can be read."""
    ending = raw_formats.format_of(path)
    for row, values in raw_rows.rows_of(path, ending):
        if isinstance(values, str):
            ends_an_array = ending == ".json" and values != NOT_OBJECT
            if ends_an_array or values.endswith(NOTHING_AFTER):
                raise RawError(f"row {row} (counted from 0) {values}")
        yield row, values


def _rows_of_parquet(path: Path, names: list[str], begin: int, end: int) -> Iterator[Row]:
    row = begin
    for table in raw_formats.read_unchecked(path, names, _BATCH_ROWS, begin):
        table = table.slice(0, end - row)
        try:
            values = table.to_pylist()
        except UnicodeDecodeError:
            values = [_row_or_problem(table, number) for number in range(len(table))]
        yield from enumerate(values, start=row)
        row += len(table)
        if row >= end:
            return


def _row_or_problem(table: pa.Table, number: int) -> dict | str:
    """One row of a table whose texts are not all UTF-8."""
    try:
        return table.slice(number, 1).to_pylist()[0]
    except UnicodeDecodeError:
        return NOT_UTF8


# --------------------------------------------------------------------------------------------- the hub


def _open_hub(source: Source, split: str, config: str | None = None):
    """The rows of a hub dataset, streamed: it is never stored as a whole, and none of its code runs."""
    from datasets import load_dataset  # the only use of the package, which takes a second to import

    config = config or source.config
    return load_dataset(source.hub, config, split=split, revision=source.revision, streaming=True)


def _rows_of_hub(source: Source) -> Iterator[Row]:
    """The rows of all splits of a hub dataset, numbered on from one to the next."""
    rows = 0
    try:
        found = _tables_of_hub(source) if source.layout else _table_of_hub(source)
        for row, values in found:
            yield row, values
            rows += 1
    except Exception as error:  # as below
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise RawError(f"cannot be read after row {rows} ({reason}): the same command begins it again") from None


def _table_of_hub(source: Source, config: str | None = None) -> Iterator[Row]:
    """The rows of all splits, numbered on from one to the next."""
    return enumerate(chain.from_iterable(_open_hub(source, split, config) for split in source.splits))


def _tables_of_hub(source: Source) -> Iterator[Row]:
    """The judgements of all splits with their texts."""
    queries = enumerate(_open_hub(source, "queries", "queries"))
    corpus = enumerate(_open_hub(source, "corpus", "corpus"))
    return judged.joined(queries, corpus, _table_of_hub(source, "default"))


def _hub_problems(source: Source) -> list[str]:
    """Why a hub dataset cannot be read as the description says; each split is opened, and its first row is read."""
    problems = column_problems(list(judged.COLUMNS), source) if source.layout else []
    for config, split in _tables_named(source):
        try:
            first = next(iter(_open_hub(source, split, config)))
        except ImportError:
            return ["hub: needs the package datasets: pip install datasets"]
        except StopIteration:
            problems.append(f"hub: {source.hub}: its split {split!r} has no rows")
        except Exception as error:  # of the network, the hub, its library and three file systems
            problems.append(
                f"hub: {source.hub}: {split!r} cannot be read ({type(error).__name__}: {first_line(error)})"
            )
        else:
            if config is None:
                found = column_problems(list(first), source) or path_problems([first], source)
            else:
                found = judged.table_problems(config, list(first))
            problems += [f"hub: {source.hub}: {split!r}: {problem}" for problem in found]
    return problems


def _tables_named(source: Source) -> list[tuple[str | None, str]]:
    """(configuration or None for that of the description, split) of everything that is read of a hub dataset."""
    if not source.layout:
        return [(None, split) for split in source.splits]
    return [("queries", "queries"), ("corpus", "corpus"), *(("default", split) for split in source.splits)]
