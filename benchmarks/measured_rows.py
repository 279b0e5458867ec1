"""Measured rows in a JSONL file: what stands there is not measured again, so a long benchmark goes on where it ended.

A row is a dictionary. IDENTITY names the keys that say what was measured; the others hold what came out.
"""

import json
from pathlib import Path
from statistics import mean, stdev

IDENTITY = ("kind", "data", "system", "seed", "settings")


class RowFile:
    """The rows of one file. Several processes may append to it: a row is one line, written at once.

    Args:
        path: the file; it need not exist.
    """

    def __init__(self, path: Path):
        self.path = path

    def rows(self, **wanted) -> list[dict]:
        """The rows that have these values, in the order of measuring; read anew each time."""
        if not self.path.exists():
            return []
        rows = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if all(row[key] == value for key, value in wanted.items()):
                rows.append(row)
        return rows

    def find(self, identity: dict) -> dict | None:
        """The row of this identity, or None where it was not measured yet."""
        found = self.rows(**{key: identity[key] for key in IDENTITY})
        return found[-1] if found else None

    def append(self, row: dict) -> None:
        """Add a row."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(row, ensure_ascii=False) + "\n"
        with open(self.path, "a", encoding="utf-8", buffering=max(len(line.encode()) + 1, 1 << 16)) as file:
            file.write(line)  # leaves the buffer in one write, which O_APPEND puts at the end
            file.flush()


def mean_and_spread(values: list[float]) -> str:
    """The mean and the standard deviation over seeds, which a single seed has not.

    >>> mean_and_spread([0.5]), mean_and_spread([0.4, 0.6])
    ('0.500       ', '0.500 ±0.141')
    """
    if len(values) == 1:
        return f"{values[0]:.3f}" + 7 * " "
    return f"{mean(values):.3f} ±{stdev(values):.3f}"
