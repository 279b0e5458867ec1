"""What people read on the console: the start of a run, its steps, its end. Pure functions that give lines."""

import math
from pathlib import Path

from data.token_store import TASKS
from utils import plural

_SHORT_TASKS = {"retrieval": "ret", "clustering": "clu", "classification": "cls"}
_SHORT_KINDS = {"in_batch": "batch", "hard": "hard", "distillation": "kd", "group_accuracy": "acc", "group_mrr": "mrr"}


def format_means(means: dict[tuple[str, str], float], expected: list[tuple[str, str]] = (), short: bool = False) -> str:
    """Means by task, in one order: "retrieval in_batch 1.2345 hard 0.4567 | clustering hard 0.8912".

    Args:
        means: (task, kind) -> value.
        expected: (task, kind) that always have a place in the line; "-" stands for the value of one that did not occur.
        short: in three letters a task, and three digits.
    """
    kinds_of: dict[str, list[str]] = {}
    for task, kind in [*expected, *means]:
        kinds = kinds_of.setdefault(task, [])
        if kind not in kinds:
            kinds.append(kind)
    digits = 3 if short else 4
    columns = []
    for task in sorted(kinds_of, key=TASKS.index):
        words = [_SHORT_TASKS[task] if short else task]
        for kind in kinds_of[task]:
            name = _SHORT_KINDS.get(kind, kind) if short else kind
            value = means.get((task, kind))
            shown = "-".ljust(digits + 2) if value is None else f"{value:.{digits}f}"
            words.append(f"{name} {shown}")
        columns.append(" ".join(words))
    return " | ".join(columns)


def format_train_line(
    step: int,
    steps: int,
    means: dict[tuple[str, str], float],
    values: dict,
    expected: list[tuple[str, str]] = (),
    width: int | None = None,
) -> str:
    """The console's line about the steps since the last one.

    Padding and imbalance are shown where there are any. Where the line is wider than `width`, its words are shortened,
    and then what matters least is left out.

    Args:
        values: epoch, lr, grad_norm, padding, imbalance, tuples_per_second, tokens_per_second, peak_gib, seconds_left.
        expected: the (task, kind) that always have a column.
        width: of the terminal, in characters; None for a file, which takes any.
    """
    number = f"step {step}/{steps}"
    grad_norm = math.nan if values["grad_norm"] is None else values["grad_norm"]
    left = format_seconds(values["seconds_left"])
    columns = [
        number,
        f"epoch {values['epoch']:.2f}",
        format_means(means, expected),
        f"lr {values['lr']:.2e}",
        f"grad {grad_norm:.3f}",
        f"{values['tuples_per_second']:.1f} tuples/s {values['tokens_per_second'] / 1e3:.1f}k tokens/s",
    ]
    for name in ("padding", "imbalance"):
        if values[name] >= 0.005:
            columns.append(f"{name} {values[name]:.0%}")
    columns += [f"{values['peak_gib']:.2f} GiB", f"{left} left"]
    line = " | ".join(columns)
    if width is None or len(line) <= width:
        return line
    columns = [
        f"{step}/{steps}",
        format_means(means, expected, short=True),
        f"lr {values['lr']:.0e}",
        f"grad {grad_norm:.2f}",
        f"{values['tuples_per_second']:.0f} tuples/s",
        f"{values['peak_gib']:.1f} GiB",
        f"epoch {values['epoch']:.2f}",
    ]
    while len(" | ".join([*columns, left])) > width and len(columns) > 2:
        columns.pop()
    return " | ".join([*columns, left])


def _mean_of_sets(results: dict[str, dict[str, dict[str, float]]], width: str) -> dict[str, float]:
    """Metric -> its mean over the sets at a width."""
    at_width = [by_dim[width] for by_dim in results.values()]
    return {metric: sum(values[metric] for values in at_width) / len(at_width) for metric in at_width[0]}


def format_evaluation(results: dict[str, dict[str, dict[str, float]]], best: tuple[int, float] | None) -> str:
    """The console's line about an evaluation: the mean of the sets at the whole width, then nDCG@10 by width and set.

    >>> format_evaluation({"a": {"8": {"nDCG@10": 0.25}, "32": {"nDCG@10": 0.5}}}, best=(20, 0.5))
    'evaluation | a nDCG@10 0.5000 | at 8: 0.2500 | best 0.5000 at step 20'

    Args:
        results: set -> dimensions -> metric -> value.
        best: step and value of the best evaluation, where there is a metric that decides.
    """
    names = list(results)
    *shorter, whole = sorted(results[names[0]], key=int)  # every set has the same widths
    what = names[0]
    if len(names) > 1:
        what = f"mean of {len(names)} sets"
    values = " ".join(f"{metric} {value:.4f}" for metric, value in _mean_of_sets(results, whole).items())
    columns = ["evaluation", f"{what} {values}"]
    if shorter:
        columns.append(
            "at " + " ".join(f"{width}: {_mean_of_sets(results, width)['nDCG@10']:.4f}" for width in shorter)
        )
    if len(names) > 1:
        columns.append(" ".join(f"{name} {results[name][whole]['nDCG@10']:.4f}" for name in names))
    if best is not None:
        columns.append(f"best {best[1]:.4f} at step {best[0]}")
    return " | ".join(columns)


def format_seconds(seconds: float) -> str:
    """1:02:03, or 2:03 below an hour.

    >>> format_seconds(3723.4), format_seconds(123)
    ('1:02:03', '2:03')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def finished_line(folder: Path, steps: int) -> str:
    """What a run says that is started again when all was trained.

    >>> finished_line(Path("output/run"), 48)
    'output/run: this run is finished: 48 steps were trained. Its models are there; another experiment_id trains anew'
    """
    return (
        f"{folder}: this run is finished: {plural(steps, 'step')} were trained. "
        "Its models are there; another experiment_id trains anew"
    )


def how_to_go_on(step: int, steps: int, resumable: bool) -> str:
    """The last line of a run that was told to stop after `step` of `steps`."""
    line = f"stopped after step {step} of {steps}"
    if resumable:
        return f"{line} and saved: the same command continues from there"
    return f"{line}: a run under DeepSpeed cannot continue; its model folders can be trained further as another run"


def end_lines(
    steps: int,
    seconds: float,
    means: dict[tuple[str, str], float],
    folder: str,
    adapter: bool,
    picture: str | None,
    best: str | None = None,
) -> list[str]:
    """The last lines of a run: how long it took, where it ended, which folder to use, and how.

    Args:
        steps, seconds: trained by this process's run, without what it went on from.
        means: (task, loss) -> mean, as the last log line had it.
        folder: the last model folder.
        adapter: the folder holds a LoRA adapter.
        picture: where the plot is, None for none.
        best: what the best model is, None if no metric decides.
    """
    lines = [f"trained {plural(steps, 'step')} in {format_seconds(seconds)}; losses at the end: {format_means(means)}"]
    lines.append(f"use it:   SentenceTransformer({folder!r})")
    if best:
        lines.append(f"best:     {best}")
    if adapter:
        lines.append(f"merge it: python -m tools.merge_adapter {folder} {folder}-merged")
    if picture:
        lines.append(f"plot:     {picture}")
    return lines
