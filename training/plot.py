"""A picture of a run over its steps: losses and measures by task, evaluations, learning rate and gradient norm."""

import json
import math
from importlib.util import find_spec
from pathlib import Path

from data.token_store import TASKS
from training.objective import LOSSES

_FEW = 5  # datasets of a task that are told apart; of more, each is a thin gray line
_COLOURS = {"in_batch": "tab:blue", "hard": "tab:orange", "distillation": "tab:green"}
_MEASURE_COLOURS = {"group_accuracy": "tab:purple", "group_mrr": "tab:red"}


def draw(run: Path) -> str | None:
    """Write `run`/training.png where matplotlib is installed; returns its path, or None.

    Raises:
        ValueError: no training step was logged, or a line of metrics.jsonl is broken.
    """
    if not find_spec("matplotlib"):
        return None
    import matplotlib

    matplotlib.use("Agg")  # draws into files, without a screen
    from matplotlib import pyplot

    lines = read_lines(run / "metrics.jsonl")
    trained = [line for line in lines if line["kind"] == "train"]
    validated = [line for line in lines if line["kind"] == "validation"]
    evaluated = [line for line in lines if line["kind"] == "evaluation"]
    if not trained:
        raise ValueError(f"{run / 'metrics.jsonl'}: no training step was logged yet")
    tasks = read_tasks(run, trained)
    names = [task for task in (*TASKS, "all") if task in tasks.values()]
    rows = math.ceil((len(names) + 1 + bool(evaluated)) / 2)
    figure, grid = pyplot.subplots(rows, 2, figsize=(13, 4.6 * rows), layout="constrained", squeeze=False)
    panels = list(grid.flat)
    for panel, task in zip(panels, names, strict=False):
        members = [name for name, own in tasks.items() if own == task]
        _draw_task(panel, task, members, trained, validated)
    others = panels[len(names) :]
    if evaluated:
        _draw_evaluations(others.pop(0), evaluated)
    _draw_schedule(others.pop(0), trained)
    for unused in others:
        unused.set_visible(False)
    figure.savefig(run / "training.png", dpi=120)
    pyplot.close(figure)
    return str(run / "training.png")


def read_lines(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl. Raises ValueError, with the line's number, if one is not JSON."""
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            lines.append(json.loads(text))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    return lines


def read_tasks(run: Path, trained: list[dict]) -> dict[str, str]:
    """Dataset -> task, from the manifest; all datasets in one where it does not say."""
    path = run / "manifest.json"
    tasks = {}
    if path.exists():
        tasks = json.loads(path.read_text(encoding="utf-8")).get("tasks", {})
    for line in trained:
        for name in line["losses"]:
            tasks.setdefault(name, "all")
    return tasks


def curve(lines: list[dict], key: str, names: list[str], kind: str) -> tuple[list[int], list[float]]:
    """Steps and the mean over `names` of what stands under `key`, dataset, `kind`; only steps where there is any."""
    steps, means = [], []
    for line in lines:
        values = [line[key][name][kind] for name in names if kind in line[key].get(name, {})]
        if values:
            steps.append(line["step"])
            means.append(sum(values) / len(values))
    return steps, means


def _draw_task(axes, task: str, members: list[str], trained: list[dict], validated: list[dict]) -> None:
    """Losses of a task: its mean as a thick line, its datasets as thin ones, held-out tuples dotted; measures to 1."""
    for kind in LOSSES:
        steps, means = curve(trained, "losses", members, kind)
        if not steps:
            continue
        colour = _COLOURS.get(kind, "tab:brown")
        if len(members) > 1:
            _draw_members(axes, members, trained, kind, colour)
        axes.plot(steps, means, color=colour, linewidth=2, label=kind, marker="." if len(steps) == 1 else None)
        held_out_steps, held_out = curve(validated, "measures", members, kind)
        if held_out_steps:
            axes.plot(held_out_steps, held_out, "o:", color=colour, markersize=3, label=f"{kind}, held out")
    title = task if len(members) == 1 else f"{task}: mean of {len(members)} datasets"
    axes.set(xlabel="step", ylabel="loss", title=title, ylim=(0, None))
    lines, labels = axes.get_legend_handles_labels()
    measures = axes.twinx()
    for kind, colour in _MEASURE_COLOURS.items():
        steps, means = curve(validated, "measures", members, kind)
        if steps:
            (line,) = measures.plot(steps, means, "s--", color=colour, markersize=3, linewidth=0.9)
            lines.append(line)
            labels.append(f"{kind}, held out (right)")
    measures.set(ylim=(0, 1.02))
    measures.set_visible(bool(measures.lines))
    axes.legend(lines, labels, fontsize="x-small", loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4)


def _draw_members(axes, members: list[str], trained: list[dict], kind: str, colour: str) -> None:
    """Each dataset of a task: told apart where they are few, else thin and gray."""
    few = len(members) <= _FEW
    styles = ("--", "-.", ":", (0, (1, 3)), (0, (5, 1, 1, 1)))
    for number, name in enumerate(members):
        steps, values = curve(trained, "losses", [name], kind)
        if not steps:
            continue
        if few:
            axes.plot(steps, values, linestyle=styles[number], color=colour, linewidth=0.9, label=f"{kind}, {name}")
        else:
            axes.plot(steps, values, color=colour, linewidth=0.4, alpha=0.25)


def _draw_evaluations(axes, evaluated: list[dict]) -> None:
    """nDCG@10 of each set, at the whole width as a thick line, at shorter ones as thin ones."""
    for number, name in enumerate(evaluated[-1]["sets"]):
        for dim, (steps, values) in evaluation_curves(evaluated, name).items():
            whole = dim == max(map(int, evaluated[-1]["sets"][name]))
            axes.plot(
                steps,
                values,
                "o-" if whole else ".:",
                color=f"C{number % 10}",
                linewidth=2 if whole else 0.8,
                label=f"{name}, {dim}",
            )
    axes.set(xlabel="step", ylabel="nDCG@10", title="evaluation, by set and dimensions")
    axes.legend(fontsize="x-small", loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4)


def evaluation_curves(evaluated: list[dict], name: str) -> dict[int, tuple[list[int], list[float]]]:
    """Dimensions -> steps and nDCG@10 of one set, the most dimensions first."""
    curves: dict[int, tuple[list[int], list[float]]] = {}
    for line in evaluated:
        for dim, values in line["sets"].get(name, {}).items():
            steps, found = curves.setdefault(int(dim), ([], []))
            steps.append(line["step"])
            found.append(values["nDCG@10"])
    return dict(sorted(curves.items(), reverse=True))


def _draw_schedule(axes, trained: list[dict]) -> None:
    steps = [line["step"] for line in trained]
    axes.plot(steps, [line["lr"] for line in trained], label="learning rate")
    axes.set(xlabel="step", ylabel="learning rate", title="learning rate and gradient norm", ylim=(0, None))
    norms = axes.twinx()
    norms.plot(steps, [line["grad_norm"] for line in trained], color="tab:gray", linewidth=0.8)
    norms.set(ylabel="gradient norm (gray)", ylim=(0, None))
