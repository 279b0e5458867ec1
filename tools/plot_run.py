"""Draw what a run did: losses by task, learning rate and gradient norm over the steps, as a PNG.

python -m tools.plot_run output/EXPERIMENT_ID          writes output/EXPERIMENT_ID/training.png
"""

import argparse
import json
import sys
from pathlib import Path


def main(argv: list[str]) -> int:
    """Draw. Returns the exit status: 0, or 2 for refused input."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.plot_run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="the folder of a run; holds a metrics.jsonl")
    given = parser.parse_args(argv)
    try:
        print(plot(given.run))
    except (OSError, ValueError) as error:
        print(f"plot_run: {error}", file=sys.stderr)
        return 2
    return 0


def plot(run: Path) -> Path:
    """Read `run`/metrics.jsonl and write `run`/training.png; returns its path.

    Raises:
        OSError: there is no such file, or the picture cannot be written.
        ValueError: a line of the file is broken, or no training step was logged yet.
        SystemExit: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("plot_run needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")  # draws into files, without a screen
    from matplotlib import pyplot

    lines = read_lines(run / "metrics.jsonl")
    trained = [line for line in lines if line["kind"] == "train"]
    validated = [line for line in lines if line["kind"] == "validation"]
    if not trained:
        raise ValueError(f"{run / 'metrics.jsonl'}: no training step was logged yet")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    _draw_losses(left, trained, validated)
    _draw_schedule(right, trained)
    figure.savefig(run / "training.png", dpi=120)
    pyplot.close(figure)
    return run / "training.png"


def read_lines(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl. Raises ValueError, with the line's number, where one is no JSON."""
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            lines.append(json.loads(text))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    return lines


def curves(lines: list[dict], key: str) -> dict[str, list[tuple[int, float]]]:
    """ "dataset kind" -> (step, value) points, of the dictionaries at `key` of metrics.jsonl's lines."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for dataset, kinds in line[key].items():
            for kind, value in kinds.items():
                found.setdefault(f"{dataset} {kind}", []).append((line["step"], value))
    return found


def _draw_losses(axes, trained: list[dict], validated: list[dict]) -> None:
    """Training losses as lines; the same losses on held-out tuples dotted."""
    for name, points in curves(trained, "losses").items():
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, label=name, linewidth=1.5)
    for name, points in curves(validated, "measures").items():
        if name.endswith((" in_batch", " hard")):  # other measures are no losses
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, "o:", label=f"{name}, held out", markersize=3)
    axes.set(xlabel="step", ylabel="loss", title="losses", ylim=(0, None))
    axes.legend(fontsize="x-small")


def _draw_schedule(axes, trained: list[dict]) -> None:
    """The learning rate, and the gradient norm on an axis of its own at the right."""
    steps = [line["step"] for line in trained]
    axes.plot(steps, [line["lr"] for line in trained], label="learning rate")
    axes.set(xlabel="step", ylabel="learning rate", title="learning rate and gradient norm", ylim=(0, None))
    norms = axes.twinx()
    norms.plot(steps, [line["grad_norm"] for line in trained], color="tab:gray", linewidth=0.8)
    norms.set(ylabel="gradient norm (gray)", ylim=(0, None))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
