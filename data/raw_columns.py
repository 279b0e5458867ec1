"""Which columns of a raw file are read, and what they mean.

    query, passage, negative_1 .. negative_K      the published layout; `positive` may stand for `passage`
    anchor, positive, negative_1 .. negative_K    Sentence Transformers; one `negative` may stand alone
    query, pos, neg                               FlagEmbedding, lists of texts; one tuple for each text of pos

In each of them a list of texts in `neg` or `negatives` may stand for negative_1 .. negative_K, and `prompt` may hold
the instruction of the row's query. Negatives may be missing: null, an empty text, a shorter list, or no column at all.

To add a column style, add a line to STYLES: the words that a refused file is answered with, the column of queries,
and the columns that may hold positives. A column whose cells are lists of texts also goes into LISTS. Nothing else
knows of styles.
"""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

LISTS = ("pos", "neg", "negatives")  # columns whose cells are lists of texts; those of all others are texts
PROMPT = "prompt"
_NUMBERED = re.compile(r"negative_\d+")


@dataclass(frozen=True)
class Style:
    """How a file's columns may be called."""

    words: str  # for people: what a file of this style has
    query: str
    positives: tuple[str, ...]  # any of these, the first that a file has
    preferred: bool = False  # to others that a file also fits


STYLES = (
    Style("query, passage, negative_1..K", "query", ("passage", "positive")),
    Style("anchor, positive, negative_k", "anchor", ("positive",)),
    Style("query, pos, neg as lists", "query", ("pos",), preferred=True),
)


@dataclass(frozen=True)
class Tuples:
    """Some tuples of a raw file, column by column."""

    texts: list[pa.Array]  # query, positive, negative x slots; each [n], null where missing
    rows: np.ndarray  # [n] the raw row of each tuple, from 0 in this part of the file
    prompts: pa.Array | None = None  # [n] an instruction for each query, null where missing; None: no such column

    def texts_of(self, chosen: np.ndarray) -> list[list[str | None]]:
        """Queries, positives and negatives of the tuples that are `chosen`, bool [n]."""
        return [column.filter(pa.array(chosen)).to_pylist() for column in self.texts]

    def prompts_of(self, chosen: np.ndarray) -> list[str | None] | None:
        """The instructions of the tuples that are `chosen`, bool [n]; None if the file has no such column."""
        if self.prompts is None:
            return None
        return self.prompts.filter(pa.array(chosen)).to_pylist()

    def equals_positive(self) -> list[np.ndarray]:
        """Of each column of negatives, which of them are their own positive: bool [n]."""
        _, positive, *negatives = self.texts
        return [_numpy(pc.fill_null(pc.equal(negative, positive), False)) for negative in negatives]

    def has_only_own_negatives(self) -> np.ndarray:
        """Tuples that had negatives, each of which is the positive: without those none is left. Bool [n]."""
        any_own = np.zeros(len(self.rows), bool)
        any_other = np.zeros(len(self.rows), bool)
        for negative, is_own in zip(self.texts[2:], self.equals_positive(), strict=True):
            any_own |= is_own
            any_other |= _numpy(pc.is_valid(negative)) & ~is_own
        return any_own & ~any_other


@dataclass(frozen=True)
class Columns:
    """The columns of a file that are read."""

    query: str
    positive: str  # of LISTS: a tuple for each text of a row's list
    negatives: tuple[str, ...]  # one column for each negative, or one column of LISTS
    prompt: str | None = None

    @property
    def names(self) -> list[str]:
        """All of them."""
        names = [self.query, self.positive, *self.negatives]
        return [*names, self.prompt] if self.prompt else names

    @property
    def types(self) -> dict[str, pa.DataType]:
        """Column -> the type that it must hold."""
        return {name: pa.list_(pa.string()) if name in LISTS else pa.string() for name in self.names}

    @property
    def negatives_are_listed(self) -> bool:
        """Whether one column holds all negatives of a row."""
        return bool(self.negatives) and self.negatives[0] in LISTS

    def count_negatives(self, table: pa.Table) -> int:
        """The most negatives that a row has room for."""
        if not self.negatives_are_listed:
            return len(self.negatives)
        longest = pc.max(pc.list_value_length(table[self.negatives[0]])).as_py()
        return longest or 0  # None if every list is null

    def to_tuples(self, table: pa.Table, slots: int) -> Tuples:
        """Rows as tuples with `slots` negatives each. An empty text, or one of white space alone, becomes null."""
        if self.positive in LISTS:
            positives, rows = _each_of_lists(table[self.positive].combine_chunks())
        else:
            positives = _texts(table[self.positive].combine_chunks())
            rows = None  # a tuple for each row

        def texts_of(name: str) -> pa.Array:
            """A column of texts, [n] as the tuples."""
            texts = _texts(table[name].combine_chunks())
            if rows is None:
                return texts
            return texts.take(pa.array(rows))

        texts = [texts_of(self.query), positives]
        if self.negatives_are_listed:
            negatives, counts, starts = _flat(table[self.negatives[0]].combine_chunks())  # counts, starts: [rows]
            if rows is not None:
                counts, starts = counts[rows], starts[rows]
            texts += [_take(negatives, starts + slot, slot < counts) for slot in range(slots)]
        else:
            texts += [texts_of(name) for name in self.negatives]
            texts += [pa.nulls(len(positives), pa.large_string())] * (slots - len(self.negatives))
        prompts = texts_of(self.prompt) if self.prompt else None
        if rows is None:
            rows = np.arange(len(table))
        return Tuples(texts, rows, prompts)


# ------------------------------------------------------------------------------------ choosing columns


def find_columns(names: Iterable[str]) -> Columns | None:
    """How to read a file, or a row, with columns of these names; None if no style fits."""
    names = list(names)
    for style in sorted(STYLES, key=lambda style: not style.preferred):
        for positive in style.positives:
            if style.query in names and positive in names:
                prompt = PROMPT if PROMPT in names else None
                return Columns(style.query, positive, _negatives_among(names, positive in LISTS), prompt)
    return None


def _negatives_among(names: list[str], lists_first: bool) -> tuple[str, ...]:
    """The columns of negatives: negative_1, negative_2, ... in the order of their numbers; negative; or a list."""
    numbered = sorted(filter(_NUMBERED.fullmatch, names), key=lambda name: (int(name.removeprefix("negative_")), name))
    texts = [tuple(numbered), ("negative",)]
    lists = [("neg",), ("negatives",)]
    candidates = [*lists, *texts] if lists_first else [*texts, *lists]
    for candidate in candidates:
        if candidate and set(candidate) <= set(names):
            return candidate
    return ()


def queries_among(names: Iterable[str]) -> list[str]:
    """The columns that may hold the query: more than one where the columns fit styles that contradict each other."""
    names = set(names)
    queries = [style.query for style in STYLES if style.query in names and names & set(style.positives)]
    return list(dict.fromkeys(queries))  # each once, in order


def style_of(names: Iterable[str]) -> tuple[str, str, str] | None:
    """The style of one row with these columns: its query's, its positive's and its negatives' column ("" for none).

    None if no style fits: the row lacks a query or a positive, whatever it is called.
    """
    columns = find_columns(names)
    if columns is None:
        return None
    negatives = kind_of_negative(columns.negatives[0]) if columns.negatives else ""
    return columns.query, columns.positive, negatives


def misspelt(names: Iterable[str]) -> dict[str, str]:
    """Columns that may be meant for a query or positive that is not there: name -> what it may be meant for.

    >>> misspelt(["query", "Pasage", "negative_1"])
    {'Pasage': 'passage'}
    """
    names = list(names)
    roles = {role: None for style in STYLES for role in (style.query, *style.positives) if role not in names}
    found = {}
    for name in names:
        close = difflib.get_close_matches(name.lower(), roles, n=1, cutoff=0.8)
        if close:
            found[name] = close[0]
    return found


def kind_of_negative(name: str) -> str:
    """How a column of negatives is called, negative_k if it is one of many; "" for any other column."""
    if _NUMBERED.fullmatch(name):
        return "negative_k"
    return name if name in ("negative", "neg", "negatives") else ""


def role_names() -> set[str]:
    """The names that columns of queries and of positives have in some style."""
    return {style.query for style in STYLES} | {name for style in STYLES for name in style.positives}


def texts_of_row(values: dict) -> list[str]:
    """Every text of one row, of whatever style: query, positives and negatives, without blank ones.

    An empty list where the row fits no style and has texts in columns that are not known: they would be lost.

    >>> texts_of_row({"query": "a", "pos": ["b"], "neg": ["c", ""], "scores": [1.0]})
    ['a', 'b', 'c']
    >>> texts_of_row({"query": "a", "answer": "b"})
    []
    """
    roles = role_names()
    known = [name for name in values if name in roles or kind_of_negative(name)]
    others = [name for name in values if name not in known]
    if find_columns(known) is None and any(_texts_of_value(values[name]) for name in others):
        return []
    return [text for name in known for text in _texts_of_value(values[name])]


def _texts_of_value(value: object) -> list[str]:
    """The texts that a value is, or that it lists."""
    values = value if isinstance(value, list) else [value]
    return [text for text in values if isinstance(text, str) and text.strip()]


def contested(names: list[str]) -> list[str]:
    """The columns by which rows of different styles are told, where the names alone allow several; else none."""
    columns = find_columns(names)
    deciding = [name for name in names if name in role_names() or kind_of_negative(name)]
    rivals = [name for name in deciding if name not in columns.names]
    return deciding if rivals else []


def reasons_not_read(names: Iterable[str], columns: Columns) -> dict[str, str]:
    """The columns of a file that are not read, each with the reason."""
    reasons = {}
    for name in names:
        if name in columns.names:
            continue
        if name.endswith(("score", "scores")):
            reasons[name] = "scores are not used"
        elif name in role_names():
            reasons[name] = f"the tuple is in {columns.query} and {columns.positive}"
        elif "neg" in name.lower():
            reasons[name] = (
                "negatives are read from negative_1, negative_2, ..., or negative, or lists in neg, negatives"
            )
        else:
            reasons[name] = "no column of that name is known"
    return reasons


# ------------------------------------------------------------------------------------- Arrow columns


def _texts(column: pa.Array) -> pa.Array:
    """A column of texts, null where there is nothing but white space."""
    column = column.cast(pa.large_string())
    is_blank = pc.equal(pc.utf8_trim_whitespace(column), "")
    return pc.if_else(is_blank, pa.scalar(None, pa.large_string()), column)


def _each_of_lists(column: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """Every text of a column of lists, with the row that it comes from; a row without one gives a null."""
    texts, counts, starts = _flat(column)  # counts, starts: [rows]
    texts_per_row = np.maximum(counts, 1)
    rows = np.repeat(np.arange(len(column)), texts_per_row)  # [n]
    first_of_row = np.cumsum(texts_per_row) - texts_per_row
    nth = np.arange(len(rows)) - first_of_row[rows]  # [n] which text of its row
    return _take(texts, starts[rows] + nth, nth < counts[rows]), rows


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
