"""Draw what a run did: losses by task, learning rate and gradient norm over the steps, as a PNG.

python -m tools.plot_run output/EXPERIMENT_ID          writes output/EXPERIMENT_ID/training.png
"""

import json
import sys
from pathlib import Path


def plot(run: Path) -> Path:
    """Read `run`/metrics.jsonl and write `run`/training.png; returns its path."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("plot_run needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["kind"] == "train"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name, points in curves(trained, "losses").items():
        left.plot(*zip(*points, strict=True), label=name, linewidth=1.5)
    for name, points in curves([line for line in lines if line["kind"] == "validation"], "measures").items():
        if name.endswith((" in_batch", " hard")):
            left.plot(*zip(*points, strict=True), "o:", label=f"{name}, held out", markersize=3)
    left.set(xlabel="step", ylabel="loss", title="losses", ylim=(0, None))
    left.legend(fontsize="x-small")
    steps = [line["step"] for line in trained]
    right.plot(steps, [line["lr"] for line in trained], label="learning rate")
    right.set(xlabel="step", ylabel="learning rate", title="learning rate and gradient norm", ylim=(0, None))
    norms = right.twinx()
    norms.plot(steps, [line["grad_norm"] for line in trained], color="tab:gray", linewidth=0.8)
    norms.set(ylabel="gradient norm (gray)", ylim=(0, None))
    figure.savefig(run / "training.png", dpi=120)
    pyplot.close(figure)
    return run / "training.png"


def curves(lines: list[dict], key: str) -> dict[str, list[tuple[int, float]]]:
    """ "dataset kind" -> (step, value) points, of the dictionaries at `key` of metrics.jsonl's lines."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for dataset, kinds in line[key].items():
            for kind, value in kinds.items():
                found.setdefault(f"{dataset} {kind}", []).append((line["step"], value))
    return found


if __name__ == "__main__":
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "metrics.jsonl").is_file():
        sys.exit("usage: python -m tools.plot_run RUN_FOLDER, where RUN_FOLDER holds a metrics.jsonl")
    print(plot(Path(sys.argv[1])))
