"""What is said about datasets, for people: the largest of many on the screen, all of them in a file."""

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from data.token_store import TokenStore, usual_instruction
from utils import plural

DATASETS_SHOWN = 10  # of more, the largest are shown
FILES_SHOWN = 20  # tokenised at once; of more not every one gets a line
_NAMES_SHOWN = 8  # names in a line


def largest(stores: list[TokenStore]) -> list[TokenStore]:
    """The DATASETS_SHOWN stores with the most tuples, the largest first; of equal ones the first by name."""
    return sorted(stores, key=lambda store: (-len(store.tuples), store.name))[:DATASETS_SHOWN]


def write_lines(path: Path, lines: list[str]) -> None:
    """Replace a text file in one step: several processes may write the same one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    aside.write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.replace(aside, path)


def some(names: Iterable[str]) -> str:
    """Names with commas between them; of many the first, and how many more there are."""
    names = list(names)
    shown = ", ".join(names[:_NAMES_SHOWN])
    others = len(names) - _NAMES_SHOWN
    return f"{shown} and {others:,} more" if others > 0 else shown


def store_line(store: TokenStore, width: int) -> str:
    """One line about a store that was written; `width` is that of the column of names."""
    counts = _counts(store)
    parts = [
        f"{store.name:{width}}  {store.task:14}",
        f"{counts['rows']:>11,} rows  {counts['texts']:>11,} texts  {counts['tokens']:>14,} tokens",
        f"{counts['bytes'] / 1e6:>9,.1f} MB",
    ]
    truncated = store.meta["stats"].get("truncated", 0)
    if truncated:
        parts.append(f"{truncated / counts['texts']:.1%} truncated")
    return "  ".join(parts + _left_out(counts))


def _counts(store: TokenStore) -> Counter:
    """What is in a store, what was left out of it, and its bytes."""
    counts = Counter(bytes=store.nbytes)
    for name in ("rows", "texts", "tokens"):
        counts[name] = store.meta[name]
    for name in ("skipped", "own"):
        counts[name] = store.meta["stats"].get(name, 0)
    return counts


def _left_out(counts: Counter) -> list[str]:
    """What was left out of one store or many: the last parts of a line about them; none where all is in."""
    parts = []
    if counts["skipped"]:
        parts.append(f"{counts['skipped']:,} skipped")
    if counts["own"]:
        parts.append(f"{plural(counts['own'], 'negative')} equal to the positive left out")
    return parts


def report_lines(stores: list[TokenStore]) -> list[str]:
    """A line for each store, with the columns that were not read: the same for the same stores."""
    width = max(len(store.name) for store in stores)
    lines = []
    for store in stores:
        line = store_line(store, width)
        not_read = store.meta["stats"].get("columns_not_read")
        if not_read:
            line += f"  columns not read: {some(not_read)}"
        lines.append(line)
    return lines


def total_line(stores: list[TokenStore]) -> str:
    """One line about all stores together."""
    counts = Counter()
    for store in stores:
        counts.update(_counts(store))
    parts = [
        plural(len(stores), "dataset"),
        f"{counts['rows']:,} rows  {counts['texts']:,} texts  {counts['tokens']:,} tokens",
        f"{counts['bytes'] / 1e6:,.1f} MB",
    ]
    return "  ".join(parts + _left_out(counts))


def not_read_lines(columns_by_file: dict[str, dict[str, str]]) -> list[str]:
    """A line for each reason why columns are not read.

    Args:
        columns_by_file: file name -> column -> reason.
    """
    columns: dict[str, dict] = {}  # reason -> names; dictionaries, because they keep the order and each name once
    files: dict[str, dict] = {}  # reason -> files
    for file, reasons in columns_by_file.items():
        for name, reason in reasons.items():
            columns.setdefault(reason, {})[name] = None
            files.setdefault(reason, {})[file] = None
    lines = []
    for reason, names in columns.items():
        noun = "column" if len(names) == 1 else "columns"
        first, *others = files[reason]
        where = f"{first} and {plural(len(others), 'other file')}" if others else first
        lines.append(f"not read: {noun} {some(names)} of {where}: {reason}")
    return lines


def last_lines(stores: list[TokenStore], report: Path) -> list[str]:
    """What is said at the end: of many stores the largest and the sum; and which instruction the queries carry."""
    lines = []
    if len(stores) > FILES_SHOWN:
        write_lines(report, report_lines(stores))
        lines += report_lines(largest(stores))
        lines += [f"the largest of {total_line(stores)}", f"all of them: {report}"]
    instruction, share = usual_instruction(stores)
    if instruction is not None:
        lines.append(f"{share:.1%} of the retrieval queries carry the instruction {instruction!r}")
    elif share:
        lines.append(f"{share:.1%} of the retrieval queries carry no instruction; --instruction TEXT gives them one")
    return lines
