"""What benchmarks.quality measured, as a table and as a plot: nDCG@10 against seconds of training."""

from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

from benchmarks.measured_rows import RowFile, mean_and_spread

COLOURS = {"here": "tab:blue", "st_in_batch": "tab:orange", "st_cached": "tab:green"}
OF_A_ROW = ("minutes", "learning_rate")  # settings that the rows of one table may differ in


def lines(data: str, rows: RowFile) -> list[str]:
    """The trials, and a table for each set of sizes that was measured."""
    printed = trial_lines(rows.rows(kind="trial", data=data))
    for (settings, minutes), finals in tables(data, rows).items():
        printed += ["", f"# {data}, {minutes:g} minutes of training: {settings}"]
        printed += table_lines(finals)
        printed += yardstick_lines(rows.rows(kind="yardstick", data=data), settings)
        printed += speed_lines(finals)
    return printed or [f"{rows.path}: nothing was measured yet"]


def tables(data: str, rows: RowFile) -> dict[tuple[str, float], list[dict]]:
    """(sizes in words, minutes) -> the compared rows that have them."""
    found = defaultdict(list)
    for row in rows.rows(kind="final", data=data):
        found[(in_words(row["settings"]), row["settings"]["minutes"])].append(row)
    return dict(found)


def in_words(settings: dict) -> str:
    """The settings that the rows of a table share, on one line."""
    return ", ".join(f"{key} {value}" for key, value in settings.items() if key not in OF_A_ROW)


def by_system(finals: list[dict]) -> dict[tuple[str, float], list[dict]]:
    """(system, learning rate) -> its rows, one for each seed."""
    found = defaultdict(list)
    for row in finals:
        found[(row["system"], row["settings"]["learning_rate"])].append(row)
    return dict(sorted(found.items()))


def trial_lines(trials: list[dict]) -> list[str]:
    """Each system's learning rates and what they came to."""
    printed = ["# trials: nDCG@10 on other held-out pairs"] if trials else []
    for row in trials:
        rate = row["settings"]["learning_rate"]
        last = row["curve"][-1]
        steps = f"{row['steps']} steps in {last['seconds']:.0f} s"
        printed.append(f"{row['system']:20}{rate:8g}   {last['nDCG@10']:.3f}   {steps}")
    return printed


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


def yardstick_lines(yardsticks: list[dict], settings: str) -> list[str]:
    """What needs no training, on the same held-out pairs."""
    printed = []
    for row in yardsticks:
        if in_words(row["settings"]) == settings:
            printed.append(f"{row['system']:35}{row['scores']['nDCG@10']:.3f}")
    return printed


def speed_lines(finals: list[dict]) -> list[str]:
    """How long `here` takes to each other system's last quality."""
    curves = {key: points(members) for key, members in by_system(finals).items()}
    own_rates = [rate for system, rate in curves if system == "here"]
    others = [key for key in curves if key[0] != "here"]
    printed = []
    for own_rate in own_rates:
        for system, rate in others:
            seconds, qualities = curves[(system, rate)][-1]
            goal = mean(qualities)
            line = f"here ({own_rate:g}) reaches the last quality of {system} ({rate:g}), {goal:.3f} at {seconds:.0f} s"
            until = seconds_until(goal, curves[("here", own_rate)])
            if until is None:
                printed.append(f"{line}, not in its time")
            else:
                printed.append(f"{line}, after {until:.0f} s: {seconds / until:.2f} times as fast")
    return printed


def seconds_until(goal: float, curve: list[tuple[float, list[float]]]) -> float | None:
    """When a curve of means first reaches `goal`, on straight lines between its points; None where it never does.

    Before its first point nothing is known of a curve, so a goal that this point reaches has its seconds.
    """
    previous = None
    for seconds, qualities in curve:
        quality = mean(qualities)
        if quality >= goal:
            if previous is None:
                return seconds
            before, lower = previous
            return before + (seconds - before) * (goal - lower) / (quality - lower)
        previous = (seconds, quality)
    return None


def draw(data: str, rows: RowFile, path: Path) -> bool:
    """Write the plot, a panel for each table; returns whether there was anything to draw."""
    found = tables(data, rows)
    if not found:
        return False
    import matplotlib

    matplotlib.use("Agg")  # draws into files, without a screen
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(1, len(found), figsize=(7 * len(found), 5), layout="constrained", squeeze=False)
    for axes, ((settings, _), finals) in zip(grid.flat, found.items(), strict=True):
        for (system, rate), members in by_system(finals).items():
            draw_curve(axes, f"{system}, {rate:g}", points(members), COLOURS[system])
        for row in rows.rows(kind="yardstick", data=data):
            if in_words(row["settings"]) == settings:
                axes.axhline(row["scores"]["nDCG@10"], color="tab:gray", linewidth=0.8, linestyle=":")
                axes.annotate(row["system"], (0, row["scores"]["nDCG@10"]), fontsize="x-small")
        axes.set(xlabel="seconds of training", ylabel="nDCG@10", xlim=(0, None), title=data)
        axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


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
