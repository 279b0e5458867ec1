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
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

READERS = {".parquet": "parquet", ".jsonl": "json"}
_STYLES = (("query", "passage"), ("query", "positive"), ("anchor", "positive"))
_REMEDY = "have query, passage, negative_1..K; or anchor, positive, negative_k; or query, pos, neg as lists"
_SHOWN = 5  # row numbers given for a kind of bad row


@dataclass(frozen=True)
class Columns:
    """Which columns of a file hold what. `lists` is FlagEmbedding's style, whose columns hold lists."""

    query: str
    positive: str
    negatives: tuple[str, ...]
    lists: bool = False


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
    return sorted(path for path in folder.iterdir() if path.suffix in READERS)


def find_columns(schema: pa.Schema) -> tuple[Columns | None, list[str]]:
    """How to read a file with this schema, or the reasons why it cannot be."""
    names = schema.names
    if {"query", "pos"} <= set(names):
        columns = Columns("query", "pos", ("neg",) if "neg" in names else (), lists=True)
    else:
        style = next((style for style in _STYLES if set(style) <= set(names)), None)
        if style is None:
            return None, [f"columns {', '.join(names)}: no query and positive among them; {_REMEDY}"]
        numbered = sorted((int(n.rpartition("_")[2]), n) for n in names if re.fullmatch(r"negative_\d+", n))
        negatives = tuple(name for _, name in numbered) or (("negative",) if "negative" in names else ())
        columns = Columns(*style, negatives)
    wrong = [
        f"column {name!r} holds {schema.field(name).type}, not {'lists of texts' if wants_list else 'text'}"
        for name, wants_list in _expected(columns).items()
        if not _holds_text(schema.field(name).type, wants_list)
    ]
    return (None, wrong) if wrong else (columns, [])


def read(path: Path, batch_rows: int, skip: int = 0) -> Iterator[pa.Table]:
    """The file's rows as Arrow tables of at most `batch_rows`, from row `skip` on; streamed, nothing is cached."""
    from datasets import load_dataset  # here, because it takes a second and training never needs it

    stream = load_dataset(READERS[path.suffix], data_files=str(path), split="train", streaming=True)
    yield from (stream.skip(skip) if skip else stream).with_format("arrow").iter(batch_rows)


def to_rows(table: pa.Table, columns: Columns, slots: int) -> list[list[tuple[str | None, ...]]]:
    """For each raw row its tuples (query, positive, negative x slots); None where a negative is missing.

    A raw row gives one tuple, or in FlagEmbedding's style one for each positive.
    """
    names = [columns.query, columns.positive, *columns.negatives]
    values = [table[name].to_pylist() for name in names]
    if not columns.lists:
        return [[(query, positive, *_pad(rest, slots))] for query, positive, *rest in zip(*values, strict=True)]
    negatives = values[2] if columns.negatives else [None] * len(table)
    return [
        [(query, text, *_pad(row or [], slots)) for text in (positives or [None])]
        for query, positives, row in zip(values[0], values[1], negatives, strict=True)
    ]


def survey(path: Path, batch_rows: int = 8192) -> Survey:
    """Read a raw file once and report everything that is wrong with it."""
    if problem := _unreadable(path):
        return Survey(problems=[f"{path}: {problem}"])
    found = Survey()
    try:
        for table in read(path, batch_rows):
            columns, problems = find_columns(table.schema)
            found.problems = [f"{path}: {problem}" for problem in problems]
            if problems:
                return found
            found.columns = found.columns or columns
            _survey_table(found, table)
    except Exception as error:  # `datasets` wraps Arrow's errors in several types of its own
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        found.problems.append(f"{path}: cannot be read as {READERS[path.suffix]} after row {found.rows} ({reason})")
    if not found.rows and not found.problems:
        found.problems.append(f"{path}: the file has no rows")
    return found


def bad_kind(row: tuple[str | None, ...]) -> str | None:
    """What is wrong with one tuple, or None."""
    query, positive, *negatives = row
    if not query or not query.strip():
        return "an empty or null query"
    if not positive or not positive.strip():
        return "an empty or null positive"
    if positive in negatives:
        return "a positive that is also its negative"
    return None


def count_rows(path: Path) -> int:
    """Raw rows in a file, without decoding it where the format tells."""
    if path.suffix == ".parquet":
        return pq.ParquetFile(path).metadata.num_rows
    with open(path, encoding="utf-8") as file:
        return sum(1 for line in file if line.strip())


def _survey_table(found: Survey, table: pa.Table) -> None:
    columns = found.columns
    if columns.lists and columns.negatives:
        found.slots = max(found.slots, pc.max(pc.list_value_length(table[columns.negatives[0]])).as_py() or 0)
    elif not columns.lists:
        found.slots = len(columns.negatives)
    for number, tuples in enumerate(to_rows(table, columns, found.slots), start=found.rows):
        kinds = [bad_kind(row) for row in tuples]
        found.good += kinds.count(None)
        for kind in sorted(set(kinds) - {None}):
            found.bad_rows.setdefault(kind, []).append(number)
    found.rows += len(table)


def _unreadable(path: Path) -> str | None:
    """Why a file cannot even be opened, or None. Faster and clearer than what the readers say."""
    if os.path.getsize(path) == 0:
        return "the file is empty"
    if path.suffix == ".parquet":
        try:
            pq.ParquetFile(path)
        except (pa.ArrowInvalid, OSError) as error:
            return f"not a Parquet file ({str(error).splitlines()[0]})"
        return None
    with open(path, encoding="utf-8", errors="replace") as file:
        try:
            first = json.loads(next((line for line in file if line.strip()), ""))
        except ValueError as error:
            return f"not JSONL: the first line is not JSON ({error})"
    return None if isinstance(first, dict) else "not JSONL: the first line is not an object of column names and values"


def _expected(columns: Columns) -> dict[str, bool]:
    """Column -> whether it must hold lists."""
    return {columns.query: False} | dict.fromkeys((columns.positive, *columns.negatives), columns.lists)


def _holds_text(kind: pa.DataType, wants_list: bool) -> bool:
    if wants_list:
        return (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and _holds_text(kind.value_type, False)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)


def _pad(negatives: list[str | None], slots: int) -> list[str | None]:
    """Exactly `slots` negatives; an empty text is a missing one."""
    present = [text if text and text.strip() else None for text in negatives[:slots]]
    return present + [None] * (slots - len(present))
