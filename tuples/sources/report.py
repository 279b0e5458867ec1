"""What happened to the rows of a source: read, used, left out by which rule; nothing is lost without being counted."""

from dataclasses import dataclass, field
from pathlib import Path

from tuples.sources.cleaning import NO_SCORE
from utils import plural

_SHOWN = 10  # rows that are named for a rule
_PRINTED = 3  # of them on the screen
_VALUES = 5  # values that are shown for a rule, such as labels that are not in the table
_IN_WORDS = {NO_SCORE: "a score that is not a number"}  # rules whose names in files are not what a person reads


@dataclass
class Counted:
    """Rows that a rule applies to: how many, and the first of them as FILE:ROW, counted from 0."""

    rows: int = 0
    first: list[str] = field(default_factory=list)
    values: list[str] = field(default_factory=list)

    def add(self, row: str, value: str = "") -> None:
        """Count a row, and what it held."""
        self.rows += 1
        if len(self.first) < _SHOWN:
            self.first.append(row)
        if value and value not in self.values and len(self.values) < _VALUES:
            self.values.append(value)

    def merge(self, later: "Counted") -> None:
        """Add rows that come after these."""
        self.rows += later.rows
        self.first = (self.first + later.first)[:_SHOWN]
        self.values = list(dict.fromkeys(self.values + later.values))[:_VALUES]

    def as_json(self) -> dict:
        """Itself for a report, without values where there are none."""
        found = {"rows": self.rows, "first": self.first}
        return found | {"values": self.values} if self.values else found


@dataclass
class Tally:
    """The rows of a source, or of a piece of it. Each row that was read is either used, or left out by one rule."""

    read: int = 0
    left_out: dict[str, Counted] = field(default_factory=dict)  # rule -> rows
    in_part: dict[str, Counted] = field(default_factory=dict)  # rule -> rows that are used, but for a part of them

    @property
    def used(self) -> int:
        """Rows that can stand in a tuple."""
        return self.read - sum(counted.rows for counted in self.left_out.values())

    def leave_out(self, rule: str, row: str, value: str = "") -> None:
        """Count a row that is not used."""
        self.left_out.setdefault(rule, Counted()).add(row, value)

    def use_in_part(self, rule: str, row: str) -> None:
        """Count a row of which something is left out or changed."""
        self.in_part.setdefault(rule, Counted()).add(row)

    def merge(self, later: "Tally") -> None:
        """Add what happened to rows that come after these."""
        self.read += later.read
        for own, others in ((self.left_out, later.left_out), (self.in_part, later.in_part)):
            for rule, counted in others.items():
                own.setdefault(rule, Counted()).merge(counted)

    def as_json(self) -> dict:
        """Itself for a report."""
        return {
            "rows_read": self.read,
            "rows_used": self.used,
            "left_out": {rule: counted.as_json() for rule, counted in sorted(self.left_out.items())},
            "in_part": {rule: counted.as_json() for rule, counted in sorted(self.in_part.items())},
        }


def tally_of(found: dict) -> Tally:
    """What `Tally.as_json` was made of."""
    tally = Tally(found["rows_read"])
    for own, name in ((tally.left_out, "left_out"), (tally.in_part, "in_part")):
        for rule, counted in found[name].items():
            own[rule] = Counted(counted["rows"], counted["first"], counted.get("values", []))
    return tally


def report_lines(report: dict) -> list[str]:
    """What is said below a file's line: rows left out and used in part, tuples over the cap, too few negatives."""
    lines = [f"left out: {_words(rule, counted)}" for rule, counted in report["left_out"].items()]
    lines += [f"used in part: {_words(rule, counted)}" for rule, counted in report["in_part"].items()]
    if report.get("tuples_left_out_by_the_cap"):
        capped = plural(report["tuples_left_out_by_the_cap"], "tuple")
        lines.append(f"left out: {capped} over the cap of {report['description']['cap']:,}")
    if report.get("tuples_with_fewer_negatives"):
        fewer = plural(report["tuples_with_fewer_negatives"], "tuple")
        wanted = report["description"]["negatives"]
        lines.append(f"{fewer} with fewer than {wanted} negatives: other classes have too few texts")
    if report.get("documents_with_instruction"):
        lines.append(f"{plural(report['documents_with_instruction'], 'document')} with the instruction too")
    return lines


def _words(rule: str, counted: dict) -> str:
    """A rule, how many rows, what some held, and where the first of them stand."""
    shown = ", ".join(counted["first"][:_PRINTED])
    if counted["rows"] > _PRINTED:
        shown += ", ..."
    values = f": {', '.join(counted['values'])}" if "values" in counted else ""
    return f"{plural(counted['rows'], 'row')}: {_IN_WORDS.get(rule, rule)}{values} ({shown})"


def summary(report: dict, path: Path) -> str:
    """One line about a file that was written."""
    most = f"up to {plural(report['negatives'], 'negative')}" if report["negatives"] else "no negatives"
    return (
        f"{path}: {report['kind']} for {report['task']}  {report['rows_read']:,} rows read  "
        f"{report['rows_used']:,} used  {plural(report['tuples'], 'tuple')}, {most}"
    )
