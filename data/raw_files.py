"""Raw training tuples on disk: Parquet or JSONL files, one file per dataset, read in three column styles.

    query, passage, negative_1 .. negative_K      the published layout; `positive` may stand for `passage`
    anchor, positive, negative_1 .. negative_K    Sentence Transformers; one `negative` may stand alone
    query, pos, neg                               FlagEmbedding, lists of texts; one tuple for each text of pos

Negatives may be missing: null, an empty text, a shorter list, or no negative column at all.

To add a column style, add a line to STYLES: the words that a refused file is answered with, the column of queries,
the columns that may hold positives, and the class that reads the cells. `TextColumns` reads one text per cell,
`ListColumns` lists of positives and of negatives. Cells of another form need a third class beside these two. It says
which columns hold negatives (`negatives_among`), what type each column must have (`types`), how many negatives a row
has room for (`count_negatives`) and how rows become tuples (`to_tuples`). Nothing else knows of styles.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data import raw_formats
from data.raw_formats import RawError

SUFFIXES = (".parquet", ".jsonl")
# What can be wrong with a tuple; number 0 is nothing.
BAD_KINDS = (None, "an empty or null query", "an empty or null positive", "a positive that is also its negative")
SAMPLE_SEED = 42  # of `sample_rows`, as in F2LLM-v2
_SHOWN = 5  # row numbers given for a kind of bad row


@dataclass(frozen=True)
class Tuples:
    """Some tuples of a raw file, column by column."""

    texts: list[pa.Array]  # query, positive, negative x slots; each [n], null where missing
    rows: np.ndarray  # [n] the raw row of each tuple, from 0 in this part of the file

    def kinds(self) -> np.ndarray:
        """What is wrong with each tuple, [n] numbers into BAD_KINDS."""
        query, positive, *negatives = self.texts
        no_query = _numpy(pc.is_null(query))
        no_positive = _numpy(pc.is_null(positive))
        is_own_negative = np.zeros(len(query), bool)
        for negative in negatives:
            is_own_negative |= _numpy(pc.fill_null(pc.equal(negative, positive), False))
        return np.select([no_query, no_positive, is_own_negative], [1, 2, 3], 0)


# ------------------------------------------------------------------------------------- column styles


@dataclass(frozen=True)
class TextColumns:
    """One text per cell; a row is a tuple."""

    query: str
    positive: str
    negatives: tuple[str, ...]  # one column for each negative

    @staticmethod
    def negatives_among(names: list[str]) -> tuple[str, ...]:
        """negative_1, negative_2, ... in the order of their numbers, or else `negative`."""
        numbered = [name for name in names if re.fullmatch(r"negative_\d+", name)]
        if numbered:
            return tuple(sorted(numbered, key=lambda name: (int(name.removeprefix("negative_")), name)))
        return ("negative",) if "negative" in names else ()

    @property
    def types(self) -> dict[str, pa.DataType]:
        """Column -> the type that it must hold."""
        return dict.fromkeys((self.query, self.positive, *self.negatives), pa.string())

    def count_negatives(self, table: pa.Table) -> int:
        """The most negatives that a row has room for."""
        return len(self.negatives)

    def to_tuples(self, table: pa.Table, slots: int) -> Tuples:
        """A tuple for each row."""
        missing = pa.nulls(len(table), pa.large_string())
        texts = [_texts(table[name].combine_chunks()) for name in self.types]
        texts += [missing] * (slots - len(self.negatives))
        return Tuples(texts, rows=np.arange(len(table)))


@dataclass(frozen=True)
class ListColumns:
    """A text for the query, a list of texts for positives, and a list for negatives; a tuple for each positive."""

    query: str
    positive: str
    negatives: tuple[str, ...]  # the column of lists, or no column

    @staticmethod
    def negatives_among(names: list[str]) -> tuple[str, ...]:
        """`neg`, if the file has it."""
        return ("neg",) if "neg" in names else ()

    @property
    def types(self) -> dict[str, pa.DataType]:
        """Column -> the type that it must hold."""
        types = dict.fromkeys((self.positive, *self.negatives), pa.list_(pa.string()))
        return {self.query: pa.string(), **types}

    def count_negatives(self, table: pa.Table) -> int:
        """The most negatives that a row has."""
        if not self.negatives:
            return 0
        longest = pc.max(pc.list_value_length(table[self.negatives[0]])).as_py()
        return longest or 0  # None where every list is null

    def to_tuples(self, table: pa.Table, slots: int) -> Tuples:
        """A tuple for each positive of a row, all with the same query and the same negatives."""
        positives, counts, starts = _flat(table[self.positive].combine_chunks())  # counts, starts: [rows of the table]
        tuples_per_row = np.maximum(counts, 1)  # a row without a positive stays, as a bad one
        rows = np.repeat(np.arange(len(table)), tuples_per_row)  # [n] the row of each tuple
        first_tuple = np.cumsum(tuples_per_row) - tuples_per_row
        nth = np.arange(len(rows)) - first_tuple[rows]  # [n] which of its row's positives a tuple has
        queries = _texts(table[self.query].combine_chunks()).take(pa.array(rows))
        texts = [queries, _take(positives, starts[rows] + nth, nth < counts[rows])]
        if self.negatives:
            negatives, counts, starts = _flat(table[self.negatives[0]].combine_chunks())
            for slot in range(slots):
                texts.append(_take(negatives, starts[rows] + slot, slot < counts[rows]))
        return Tuples(texts, rows)


Columns = TextColumns | ListColumns


@dataclass(frozen=True)
class Style:
    """How a file's columns may be called, and how they are read."""

    words: str  # for people: what a file of this style has
    query: str
    positives: tuple[str, ...]  # any of these, the first that a file has
    cells: type[Columns]
    preferred: bool = False  # to others that a file also fits


STYLES = (
    Style("query, passage, negative_1..K", "query", ("passage", "positive"), TextColumns),
    Style("anchor, positive, negative_k", "anchor", ("positive",), TextColumns),
    Style("query, pos, neg as lists", "query", ("pos",), ListColumns, preferred=True),
)


def find_columns(names: list[str]) -> Columns | None:
    """How to read a file with columns of these names, or None."""
    for style in sorted(STYLES, key=lambda style: not style.preferred):
        for positive in style.positives:
            if style.query in names and positive in names:
                return style.cells(style.query, positive, style.cells.negatives_among(names))
    return None


# ------------------------------------------------------------------------------------------- a file


def raw_files(folder: Path) -> list[Path]:
    """The raw files of a folder, sorted by name."""
    return sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)  # also folders: refused by name


def read(path: Path, columns: Columns, batch_rows: int, skip: int = 0) -> Iterator[pa.Table]:
    """The file's rows as Arrow tables of at most `batch_rows`, from row `skip` on; streamed, nothing is cached.

    Raises:
        RawError: a row cannot be read.
    """
    return raw_formats.read(path, columns.types, batch_rows, skip)


def to_tuples(table: pa.Table, columns: Columns, slots: int) -> Tuples:
    """Rows as tuples with `slots` negatives each. An empty text, or one of white space alone, becomes null."""
    return columns.to_tuples(table, slots)


def sample_rows(rows: int, max_rows: int) -> np.ndarray:
    """Which raw rows to keep, bool [rows]; max_rows 0 keeps all. Kept rows stay in the order of the file.

    The same rows as pandas' `DataFrame.sample(n=max_rows, random_state=42)`.
    """
    if not max_rows or rows <= max_rows:
        return np.ones(rows, bool)
    chosen = np.random.RandomState(SAMPLE_SEED).permutation(rows)[:max_rows]
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
    problems: list[str] = field(default_factory=list)  # the file cannot be used
    bad_rows: dict[str, list[int]] = field(default_factory=dict)  # kind -> rows, from 0

    def describe_bad_rows(self, path: Path) -> list[str]:
        """A line for each kind of bad row: how many, and the first of them."""
        lines = []
        for kind, rows in self.bad_rows.items():
            shown = ", ".join(str(row) for row in rows[:_SHOWN])
            if len(rows) > _SHOWN:
                shown += ", ..."
            noun = "row" if len(rows) == 1 else "rows"
            lines.append(f"{path}: {len(rows)} {noun} with {kind} (row {shown}, counted from 0)")
        return lines


def survey(path: Path, batch_rows: int = 1024) -> Survey:
    """Read a raw file once and report everything that is wrong with it."""
    found = Survey()
    try:
        names = raw_formats.column_names(path)
        found.columns = find_columns(names)
        if found.columns is None:
            remedy = "; or ".join(style.words for style in STYLES)
            raise RawError(f"columns {', '.join(names)}: no query and positive among them; have {remedy}")
        raw_formats.check_types(path, found.columns.types)
        for table in read(path, found.columns, batch_rows):
            _survey_table(found, table)
        if not found.rows:
            raise RawError("the file has no rows")
    except RawError as error:
        found.problems += [f"{path}: {line}" for line in str(error).splitlines()]
    return found


def _survey_table(found: Survey, table: pa.Table) -> None:
    """Add what some rows of a file hold to what was found in the rows before them."""
    found.slots = max(found.slots, found.columns.count_negatives(table))
    tuples = found.columns.to_tuples(table, found.slots)
    kinds = tuples.kinds()
    found.good += int((kinds == 0).sum())
    for kind in np.unique(kinds[kinds > 0]):
        rows = np.unique(tuples.rows[kinds == kind]) + found.rows
        found.bad_rows.setdefault(BAD_KINDS[kind], []).extend(rows.tolist())
    found.rows += len(table)


# ------------------------------------------------------------------------------------- Arrow columns


def _texts(column: pa.Array) -> pa.Array:
    """A column of texts, null where there is nothing but white space."""
    column = column.cast(pa.large_string())
    is_blank = pc.equal(pc.utf8_trim_whitespace(column), "")
    return pc.if_else(is_blank, pa.scalar(None, pa.large_string()), column)


def _flat(column: pa.Array) -> tuple[pa.Array, np.ndarray, np.ndarray]:
    """A column of lists as (all texts, how many in each row, where each row begins); null is an empty list."""
    counts = _numpy(pc.fill_null(pc.list_value_length(column), 0)).astype(np.int64)
    starts = np.cumsum(counts) - counts
    return _texts(column.flatten()), counts, starts


def _take(texts: pa.Array, places: np.ndarray, real: np.ndarray) -> pa.Array:
    """texts[places] where `real`, else null."""
    return texts.take(pa.array(places, pa.int64(), mask=~real))


def _numpy(column: pa.Array) -> np.ndarray:
    return column.to_numpy(zero_copy_only=False)
