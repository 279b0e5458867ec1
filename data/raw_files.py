"""Raw training tuples on disk, one file per dataset: which files of a folder are read, and what is in one.

The formats are raw_formats.py's, the meaning of the columns raw_columns.py's.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from data import raw_columns, raw_formats, raw_rows
from data.raw_columns import Columns, Tuples, find_columns
from data.raw_formats import UnreadableRows
from data.raw_rows import RawError
from data.row_styles import RowStyles
from utils import plural

ENDINGS = ".parquet, .jsonl, .json, .csv, .tsv (all but the first also as .gz)"
NOT_DATA = ("tasks.json", "report.txt", "dataset_settings.json")  # files with a meaning of their own
REPORTS = (".build.json", ".report.json")  # endings of files that say how a raw file was made
# What can be wrong with a tuple, and how it is said.
GOOD, EMPTY_QUERY, EMPTY_POSITIVE, NOTHING_LEFT = range(4)
FAULTS = (
    None,  # GOOD
    "an empty or null query",
    "an empty or null positive",
    "no negative but its positive, so that nothing is left to learn from",
)
SAMPLE_SEED = 42  # of `sample_rows`, as in F2LLM-v2
_SHOWN = 5  # row numbers given for a fault


# -------------------------------------------------------------------------------------------- a folder


def raw_files(source: Path) -> tuple[list[Path], dict[str, str]]:
    """The raw files of a folder, sorted by name, or the one file that `source` is.

    Returns:
        (files, names of other files there -> why each is not read). A folder whose name ends like a raw file's is
        among the files, and is refused when it is read.
    """
    if source.is_file():
        return [source], {}
    files = []
    others = {}
    for path in sorted(source.iterdir()):
        reason = _why_not_read(path)
        if reason is None:
            files.append(path)
        elif path.name not in NOT_DATA and not path.name.endswith(REPORTS):
            others[path.name] = reason
    return files, others


def _why_not_read(path: Path) -> str | None:
    """Why a path in a folder of raw files is not a raw file, or None."""
    if path.name.startswith("."):
        return "hidden"
    if path.name in NOT_DATA or path.name.endswith(REPORTS):
        return "of another purpose"
    kind = raw_formats.format_of(path)
    if kind is None:
        return "a folder" if path.is_dir() else "of another ending"
    if kind == ".json" and path.is_file() and not raw_rows.is_table(path):
        return "not an array of rows"
    return None


# ---------------------------------------------------------------------------------------------- a file


def find_faults(tuples: Tuples, task: str | None) -> np.ndarray:
    """What is wrong with each tuple, int [n]: GOOD, or a number into FAULTS.

    A negative that equals its positive is left out by the writer, and the tuple is good without it. But clustering and
    classification learn from negatives alone: there a tuple with no other negatives is at fault.
    """
    query, positive, *_ = tuples.texts
    no_query = ~query.is_valid().to_numpy(zero_copy_only=False)
    no_positive = ~positive.is_valid().to_numpy(zero_copy_only=False)
    nothing_left = np.zeros(len(query), bool)
    if task in ("clustering", "classification"):
        nothing_left = tuples.has_only_own_negatives()
    return np.select([no_query, no_positive, nothing_left], [EMPTY_QUERY, EMPTY_POSITIVE, NOTHING_LEFT], GOOD)


def sample_rows(rows: int, max_rows: int, seed: int = SAMPLE_SEED) -> np.ndarray:
    """Which raw rows to keep, bool [rows]; max_rows 0 keeps all. Kept rows stay in the order of the file.

    The same rows as pandas' `DataFrame.sample(n=max_rows, random_state=seed)`.
    """
    if not max_rows or rows <= max_rows:
        return np.ones(rows, bool)
    chosen = np.random.RandomState(seed).permutation(rows)[:max_rows]
    keep = np.zeros(rows, bool)
    keep[chosen] = True
    return keep


@dataclass
class Survey:
    """What one pass over a raw file found: its size, and its bad rows."""

    columns: Columns | None = None
    rows: int = 0
    good: int = 0  # tuples with nothing wrong
    slots: int = 0  # K, the most negatives a row has room for
    not_read: dict[str, str] = field(default_factory=dict)  # column -> why it is not read
    problems: list[str] = field(default_factory=list)  # the file cannot be used
    bad_rows: dict[str, list[int]] = field(default_factory=dict)  # of FAULTS -> rows, from 0

    def describe_bad_rows(self, path: Path) -> list[str]:
        """A line for each fault: how many rows have it, and the first of them."""
        lines = []
        for fault, rows in self.bad_rows.items():
            shown = ", ".join(str(row) for row in rows[:_SHOWN])
            if len(rows) > _SHOWN:
                shown += ", ..."
            lines.append(f"{path}: {plural(len(rows), 'row')} with {fault} (row {shown}, counted from 0)")
        return lines


def survey(path: Path, task: str | None, wanted: range | None = None, batch_rows: int = 1024) -> Survey:
    """Read a raw file once and report everything that is wrong with it.

    Args:
        wanted: rows to be read, of a Parquet file, which says itself how many it has; `slots` is then of these rows.
            None for all.
    """
    found = Survey()
    unreadable = UnreadableRows()
    problems = []
    try:
        raw_formats.check_file(path)
        names, found.columns = choose_columns(path)
        found.not_read = raw_columns.reasons_not_read(names, found.columns)
        for numbers, table in raw_formats.survey(path, found.columns.types, batch_rows, unreadable, wanted):
            _survey_table(found, numbers, table, task)
        if wanted is not None:
            found.rows = raw_formats.rows_of_schema(path)
        if not found.rows and not unreadable.count:
            raise RawError("the file has no rows")
    except RawError as error:
        problems = str(error).splitlines()
    found.problems = [f"{path}: {line}" for line in unreadable.describe() + problems]
    return found


def _survey_table(found: Survey, numbers: np.ndarray, table: pa.Table, task: str | None) -> None:
    """Add what some rows of a file hold to what was found in the rows before them; `numbers` [n] are theirs."""
    found.slots = max(found.slots, found.columns.count_negatives(table))
    tuples = found.columns.to_tuples(table, found.slots)
    faults = find_faults(tuples, task)
    found.good += int((faults == GOOD).sum())
    for fault in np.unique(faults[faults != GOOD]):
        rows = numbers[np.unique(tuples.rows[faults == fault])]
        found.bad_rows.setdefault(FAULTS[fault], []).extend(rows.tolist())
    found.rows += len(table)


# ------------------------------------------------------------------------------------- a file's columns


def choose_columns(path: Path) -> tuple[list[str], Columns]:
    """All columns of a file, and those of them to read.

    Raises:
        RawError: no style fits, or several do, or a column holds something other than text, or no row can be read.
    """
    if raw_formats.format_of(path) == raw_formats.PARQUET:
        return _choose_by_schema(path)
    found = RowStyles()
    unreadable = UnreadableRows()
    for row, value in raw_rows.rows_of(path, raw_formats.format_of(path)):
        if isinstance(value, str):
            unreadable.add(row, value)
        else:
            found.add(row, value)
    names = list(found.names)
    columns = find_columns(found.names_to_read())
    problems = found.problems()
    if names and columns is None:
        problems.append(_no_style(names))
    if not names and not unreadable.count:
        problems.append("the file has no rows")
    if problems or columns is None:
        raise RawError("\n".join(unreadable.describe() + problems))
    return names, columns


def _choose_by_schema(path: Path) -> tuple[list[str], Columns]:
    """What `choose_columns` gives, of a Parquet file. Its rows are looked at only where its columns fit two styles."""
    schema = raw_formats.schema_of(path)
    names = schema.names
    if find_columns(names) is None:
        raise RawError(_no_style(names))
    contested = raw_columns.contested(names)
    if contested:
        found = RowStyles()
        for row, values in raw_formats.rows_of_parquet(path, contested):
            found.add(row, values)
        if found.problems():
            raise RawError("\n".join(found.problems()))
        without = set(contested) - set(found.names_to_read())
        names = [name for name in names if name not in without]
    columns = find_columns(names)
    raw_formats.check_types(schema, columns.types)
    return schema.names, columns


def _no_style(names: list[str]) -> str:
    """What is said of columns that fit no style."""
    remedy = "; or ".join(style.words for style in raw_columns.STYLES)
    meant = [f"{name} may be {role}" for name, role in raw_columns.misspelt(names).items()]
    doubt = f" ({', '.join(meant)})" if meant else ""
    return f"columns {', '.join(names)}: no query and positive among them{doubt}; have {remedy}"
