"""What benchmarks.quality measured, as tables and as a plot: nDCG@10 against seconds of training."""

import json
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

from benchmarks.measured_rows import CONDITIONS, RowFile, conditions_line, mean_and_spread

COLOURS = {"here": "tab:blue", "st_in_batch": "tab:orange", "st_cached": "tab:green"}
AT_THE_EDGE = "the best rate stands at the edge of those tried: widen --learning_rates"


def lines(data: str, rows: RowFile) -> list[str]:
    """The trials, and a table for each set of settings that was measured."""
    printed = []
    for settings, trials in by_settings(rows.rows(kind="trial", data=data)):
        heading = f"# {data}, trials of {in_words(settings)}: nDCG@10 on other held-out pairs"
        printed += ["", heading, conditions_line(settings), *trial_lines(trials)]
    yardsticks = rows.rows(kind="yardstick", data=data)
    for settings, finals in by_settings(rows.rows(kind="final", data=data)):
        printed += ["", f"# {data}, {in_words(settings)}", conditions_line(settings)]
        printed += table_lines(finals)
        printed += yardstick_lines(yardsticks_of(settings, yardsticks))
        printed += speed_lines(finals)
    return printed or [f"{rows.path}: nothing was measured yet"]


# ---------------------------------------------------------------------------------------- sorting


def by_settings(rows: list[dict]) -> list[tuple[dict, list[dict]]]:
    """(settings but for the learning rate, the rows that have them) in the order of measuring.

    Of rows that are alike in all, seed included, the newest alone stays.
    """
    groups = {}  # settings as JSON -> (settings, rows by what else names them)
    for row in rows:
        settings = without(row["settings"], "learning_rate")
        key = json.dumps(settings, sort_keys=True)
        members = groups.setdefault(key, (settings, {}))[1]
        members[(row["system"], row["settings"]["learning_rate"], row["seed"])] = row
    return [(settings, list(members.values())) for settings, members in groups.values()]


def without(settings: dict, left_out: str) -> dict:
    """The settings but for one."""
    return {key: value for key, value in settings.items() if key != left_out}


def in_words(settings: dict) -> str:
    """What was asked for, on one line; the conditions stand on their own."""
    words = [f"{settings['minutes']:g} minutes of training"]
    for key, value in settings.items():
        if key not in (*CONDITIONS, "minutes"):
            words.append(f"{key} {value}")
    return ", ".join(words)


def by_system(rows: list[dict]) -> dict[tuple[str, float], list[dict]]:
    """(system, learning rate) -> its rows, one for each seed."""
    found = defaultdict(list)
    for row in rows:
        found[(row["system"], row["settings"]["learning_rate"])].append(row)
    return dict(sorted(found.items()))


def yardsticks_of(settings: dict, yardsticks: list[dict]) -> list[dict]:
    """The yardsticks of a table, the newest of each: measured by the same pairs in the same conditions."""
    wanted = without(settings, "minutes")
    newest = {row["system"]: row for row in yardsticks if row["settings"] == wanted}
    return list(newest.values())


# ----------------------------------------------------------------------------------------- tables


def trial_lines(trials: list[dict]) -> list[str]:
    """Each system's learning rates and what they came to; with a warning where the best one may lie outside."""
    printed = []
    by_name = defaultdict(list)
    for row in trials:
        by_name[row["system"]].append(row)
    for system, members in by_name.items():
        members = sorted(members, key=rate_of)
        for row in members:
            last = row["curve"][-1]
            steps = f"{row['steps']} steps in {last['seconds']:.0f} s"
            printed.append(f"{system:20}{rate_of(row):8g}   {last['nDCG@10']:.3f}   {steps}")
        best = max(members, key=last_quality)  # of equal ones the first, which has the lower rate
        if best in (members[0], members[-1]):
            printed.append(f"{system:20}{AT_THE_EDGE}")
    return printed


def rate_of(row: dict) -> float:
    """A row's learning rate."""
    return row["settings"]["learning_rate"]


def last_quality(row: dict) -> float:
    """A row's nDCG@10 when its training ended."""
    return row["curve"][-1]["nDCG@10"]


def table_lines(finals: list[dict]) -> list[str]:
    """A line for each system: the mean over seeds at each point of its curve, with the mean of the seconds."""
    head = "".join(f"{f'{share} % of the steps':>24}" for share in (25, 50, 75, 100))
    printed = [f"{'system':20}{'rate':>8}{'seeds':>7}{head}{'tuples':>9}"]
    for (system, rate), members in by_system(finals).items():
        cells = ""
        for seconds, qualities in points(members):
            cells += f"{mean_and_spread(qualities)} at {seconds:4.0f} s".rjust(24)
        tuples = mean(row["steps"] * row["settings"]["batch"] for row in members)
        printed.append(f"{system:20}{rate:8g}{len(members):7}{cells}{tuples:9,.0f}")
    return printed


def points(members: list[dict]) -> list[tuple[float, list[float]]]:
    """(mean of the seconds, nDCG@10 of each seed) at each point of the curves."""
    found = []
    for at_point in zip(*[row["curve"] for row in members], strict=True):
        found.append((mean(point["seconds"] for point in at_point), [point["nDCG@10"] for point in at_point]))
    return found


def yardstick_lines(yardsticks: list[dict]) -> list[str]:
    """What needs no training, on the same held-out pairs."""
    return [f"{row['system']:35}{row['scores']['nDCG@10']:.3f}" for row in yardsticks]


# ------------------------------------------------------------------------------------------ speed


def speed_lines(finals: list[dict]) -> list[str]:
    """How long `here` takes to each other system's last quality, and how long the other takes to that of `here`."""
    systems = by_system(finals)
    printed = []
    for own in systems:
        for other in systems:
            if own[0] == "here" and other[0] != "here":
                printed.append(speed_line(systems, own, other))
                printed.append(speed_line(systems, other, own))
    return printed


def speed_line(systems: dict[tuple[str, float], list[dict]], own: tuple[str, float], other: tuple[str, float]) -> str:
    """How long `own` takes to the last quality of `other`, each row beside the other's row of the same seed.

    Args:
        systems: (system, learning rate) -> its rows, one for each seed.
        own, other: keys of it.
    """
    line = f"{own[0]} ({own[1]:g}) to the last quality of {other[0]} ({other[1]:g})"
    own_rows = {row["seed"]: row for row in systems[own]}
    goals = [row for row in systems[other] if row["seed"] in own_rows]
    if not goals:
        return f"{line}: no seed in common"
    line += f", {mean(last_quality(row) for row in goals):.3f}"
    line += f" at {mean(row['curve'][-1]['seconds'] for row in goals):.0f} s"
    seconds = []  # of the seeds whose goal is reached
    ratios = []
    for goal in goals:
        until = seconds_until(last_quality(goal), own_rows[goal["seed"]]["curve"])
        if until is not None:
            seconds.append(until)
            ratios.append(goal["curve"][-1]["seconds"] / until)
    if not ratios:
        return f"{line}: not in its time, with 0 of {len(goals)} seeds"
    speed = f"{mean(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f})"
    return f"{line}: after {mean(seconds):.0f} s, {speed}, with {len(ratios)} of {len(goals)} seeds"


def seconds_until(goal: float, curve: list[dict]) -> float | None:
    """When a curve first reaches `goal`, on straight lines between its points; None if it never does.

    Before its first point nothing is known of a curve, so a goal that this point reaches has its seconds.
    """
    before = None
    for point in curve:
        if point["nDCG@10"] >= goal:
            if before is None:
                return point["seconds"]
            share = (goal - before["nDCG@10"]) / (point["nDCG@10"] - before["nDCG@10"])
            return before["seconds"] + share * (point["seconds"] - before["seconds"])
        before = point
    return None


# ------------------------------------------------------------------------------------------- plot


def draw(data: str, rows: RowFile, path: Path) -> None:
    """Write the plot, a panel for each table; nothing if nothing was measured."""
    tables = by_settings(rows.rows(kind="final", data=data))
    if not tables:
        return
    import matplotlib

    matplotlib.use("Agg")  # draws into files, without a screen
    from matplotlib import pyplot

    yardsticks = rows.rows(kind="yardstick", data=data)
    figure, grid = pyplot.subplots(1, len(tables), figsize=(7 * len(tables), 5), layout="constrained", squeeze=False)
    for axes, (settings, finals) in zip(grid.flat, tables, strict=True):
        for (system, rate), members in by_system(finals).items():
            draw_curve(axes, f"{system}, {rate:g}", points(members), COLOURS[system])
        for row in yardsticks_of(settings, yardsticks):
            axes.axhline(row["scores"]["nDCG@10"], color="tab:gray", linewidth=0.8, linestyle=":")
            axes.annotate(row["system"], (0, row["scores"]["nDCG@10"]), fontsize="x-small")
        axes.set(xlabel="seconds of training", ylabel="nDCG@10", xlim=(0, None))
        axes.set_title(f"{data}, {settings['minutes']:g} minutes of training")
        axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def draw_curve(axes, label: str, curve: list[tuple[float, list[float]]], colour: str) -> None:
    """The mean over seeds, with a band of one standard deviation where there are several."""
    seconds = [point[0] for point in curve]
    means = [mean(point[1]) for point in curve]
    axes.plot(seconds, means, "o-", color=colour, label=label)
    if len(curve[0][1]) > 1:
        spreads = [stdev(point[1]) for point in curve]
        lower = [middle - spread for middle, spread in zip(means, spreads, strict=True)]
        upper = [middle + spread for middle, spread in zip(means, spreads, strict=True)]
        axes.fill_between(seconds, lower, upper, color=colour, alpha=0.2)
