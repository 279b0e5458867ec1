"""Numbers over steps as a run logged them. Pure functions; nothing is rounded."""

import math
from dataclasses import dataclass
from itertools import accumulate

Points = list[tuple[float, float | None]]  # (step, value), None if the run says that there is none


@dataclass(frozen=True)
class Series:
    """One line of a chart."""

    run: int  # number of the run, which gives it its colour
    points: Points
    held_out: bool = False  # measured on tuples that were not trained
    label: str = ""  # tells it apart within its run, "" if it is the only one


def number(value) -> float | None:
    """`value` where it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def plain_curve(lines: list[dict], key: str) -> Points:
    """(step, value) of what stands under `key`; None if it is null, and no point where it is missing."""
    return [(line["step"], number(line[key])) for line in lines if key in line]


def mean_curve(lines: list[dict], key: str, names: list[str], kind: str) -> Points:
    """(step, mean over `names` of what stands under `key`, name, `kind`), where there is any.

    Each dataset weighs the same, as on the console and in the published logs.
    """
    points = []
    for line in lines:
        by_name = _object(line.get(key))
        values = [number(_object(by_name.get(name)).get(kind)) for name in names]
        known = [value for value in values if value is not None]
        if known:
            points.append((line["step"], sum(known) / len(known)))
    return points


def kinds_of(lines: list[dict], key: str) -> dict[str, set[str]]:
    """Name -> kinds that occur under `key`, name."""
    found: dict[str, set[str]] = {}
    for line in lines:
        for name, by_kind in _object(line.get(key)).items():
            found.setdefault(name, set()).update(_object(by_kind))
    return found


def _object(value) -> dict:
    return value if isinstance(value, dict) else {}


def clock(lines: list[dict]) -> Points:
    """(step, seconds of training until its end) from step 0 on, of the lines of a timings.jsonl.

    Each line has the seconds since the one before, without validation, evaluation and saving. Nothing where any line
    has none.
    """
    seconds = [number(line.get("seconds")) for line in lines]
    if not lines or None in seconds:
        return []
    steps = [line["step"] for line in lines]
    return [(0, 0.0), *zip(steps, accumulate(seconds), strict=True)]


def last_value(points: Points) -> float | None:
    """The last value that there is."""
    return next((value for _, value in reversed(points) if value is not None), None)


def thin(points: Points, limit: int) -> Points:
    """At most about `limit` of the points: of each stretch the lowest and the highest, so that no peak is lost.

    The first, the last and all that have no value stay as well. What is kept is kept exactly.
    """
    if len(points) <= limit:
        return points
    stretch = math.ceil(2 * len(points) / limit)
    kept = {0, len(points) - 1}
    for begin in range(0, len(points), stretch):
        places = range(begin, min(begin + stretch, len(points)))
        with_value = [place for place in places if points[place][1] is not None]
        kept.update(set(places) - set(with_value))
        if with_value:
            kept.add(min(with_value, key=lambda place: points[place][1]))
            kept.add(max(with_value, key=lambda place: points[place][1]))
    return [points[place] for place in sorted(kept)]
