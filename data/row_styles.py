"""The column styles of a file that is written row by row: rows of JSON need not all have the same keys."""

from dataclasses import dataclass, field

from data import raw_columns
from utils import plural

_SHOWN = 3  # row numbers given for a style
_KEYS_REMEMBERED = 4096  # sets of column names whose style is remembered; memory must not grow with the file


@dataclass
class Rows:
    """Some rows of a file: how many, and the numbers of the first."""

    count: int = 0
    first: list[int] = field(default_factory=list)

    def add(self, row: int) -> None:
        """Count a row."""
        self.count += 1
        if self.count <= _SHOWN:
            self.first.append(row)

    def describe(self) -> str:
        """How many there are, and the first of them."""
        numbers = ", ".join(str(row) for row in self.first)
        more = ", ..." if self.count > len(self.first) else ""
        return f"{plural(self.count, 'row')}: {numbers}{more}"


class RowStyles:
    """What the columns of each row are called. A value that is null or empty does not count as one."""

    def __init__(self):
        self.names: dict[str, None] = {}  # all columns; a dictionary, because it keeps the order
        self.present: set[str] = set()  # those that hold something in a row with a query and a positive
        self.rows: dict[tuple, Rows] = {}  # style -> its rows
        self.two_queries: dict[tuple, Rows] = {}  # columns that may each be the query -> rows that have both
        self._seen: dict[tuple, tuple] = {}  # what was found for the names of earlier rows

    def add(self, row: int, values: dict) -> None:
        """Look at one row."""
        self.names.update(dict.fromkeys(values))
        present = tuple([name for name, value in values.items() if value])
        if present not in self._seen:
            self._look_at(present)
        style, queries = self._seen[present]
        if style is None:
            return  # its query or positive is missing: a bad row of whichever style the file has
        self.rows.setdefault(style, Rows()).add(row)
        if len(queries) > 1:
            self.two_queries.setdefault(queries, Rows()).add(row)

    def _look_at(self, present: tuple[str, ...]) -> None:
        """Remember what rows with these columns are."""
        if len(self._seen) >= _KEYS_REMEMBERED:
            self._seen.clear()
        style = raw_columns.style_of(present)
        if style is not None:
            self.present.update(present)
        self._seen[present] = (style, tuple(raw_columns.queries_among(present)))

    def problems(self) -> list[str]:
        """Why the rows cannot be read as of one style, a line each."""
        problems = []
        for queries, rows in self.two_queries.items():
            names = " and ".join(repr(name) for name in queries)
            problems.append(
                f"{names} are in one row ({rows.describe()}, counted from 0), and each may be the query: keep one"
            )
        pairs = {(query, positive) for query, positive, _ in self.rows}
        negatives = {name for _, _, name in self.rows if name}
        if not problems and (len(pairs) > 1 or len(negatives) > 1):
            found = "; ".join(
                f"{', '.join(filter(None, style))} ({rows.describe()})" for style, rows in self.rows.items()
            )
            problems.append(
                f"{len(self.rows)} column styles in one file, {found}, counted from 0: "
                "give all rows the same column names, or split the file"
            )
        return problems

    def names_to_read(self) -> list[str]:
        """The columns that matter: without those that would mean another style and hold nothing in any row."""
        if not self.rows:
            return list(self.names)
        negatives = {name for _, _, name in self.rows if name}
        kept = []
        for name in self.names:
            kind = raw_columns.kind_of_negative(name)
            of_other_style = name in raw_columns.role_names() and name not in self.present
            of_other_negatives = bool(kind and negatives) and kind not in negatives
            if not of_other_style and not of_other_negatives:
                kept.append(name)
        return kept
