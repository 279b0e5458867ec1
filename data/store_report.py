"""What is said about datasets, for people: the largest of many on the screen, all of them in a file."""

import os
from collections.abc import Iterable
from pathlib import Path

from data.token_store import TokenStore, usual_instruction
from utils import plural

DATASETS_SHOWN = 10  # of more, the largest are shown
FILES_SHOWN = 20  # tokenised at once; of more not every one gets a line
_NAMES_SHOWN = 8  # names in a line


def largest(stores: list[TokenStore], count: int = DATASETS_SHOWN) -> list[TokenStore]:
    """The stores with the most tuples, the largest first; of equal ones the first by name."""
    return sorted(stores, key=lambda store: (-len(store.tuples), store.name))[:count]


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
    meta, stats = store.meta, store.meta["stats"]
    own = stats.get("own", 0)
    parts = [
        f"{store.name:{width}}  {store.task:14}",
        f"{meta['rows']:>11,} rows  {meta['texts']:>11,} texts  {meta['tokens']:>14,} tokens",
        f"{stats.get('truncated', 0) / max(meta['texts'], 1):6.1%} truncated  {stats.get('skipped', 0):,} skipped",
        f"{plural(own, 'negative')} equal to the positive left out",
        f"{store.nbytes / 1e6:,.1f} MB",
    ]
    return "  ".join(parts)


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
    totals = {name: sum(store.meta[name] for store in stores) for name in ("rows", "texts", "tokens")}
    stats = [store.meta["stats"] for store in stores]
    skipped = sum(counts.get("skipped", 0) for counts in stats)
    own = sum(counts.get("own", 0) for counts in stats)
    nbytes = sum(store.nbytes for store in stores)
    return (
        f"{plural(len(stores), 'dataset')}  {totals['rows']:,} rows  {totals['texts']:,} texts  "
        f"{totals['tokens']:,} tokens  {skipped:,} skipped  "
        f"{plural(own, 'negative')} equal to the positive left out  {nbytes / 1e6:,.1f} MB"
    )


def not_read_lines(columns_by_file: dict[str, dict[str, str]]) -> list[str]:
    """A line for each reason why columns are not read.

    Args:
        columns_by_file: file name -> column -> reason.
    """
    columns = {}  # reason -> names, in the order of the files
    files = {}  # reason -> files
    for file, reasons in columns_by_file.items():
        for name, reason in reasons.items():
            columns.setdefault(reason, {})[name] = True
            files.setdefault(reason, {})[file] = True
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
