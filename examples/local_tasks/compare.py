"""Results of several models as one table: the main metric of each task, of whole vectors.

    python -m examples.local_tasks.compare NAME=EVALUATION [NAME=EVALUATION ...]

EVALUATION is what tools/evaluate.py wrote.
"""

import argparse
import sys
from pathlib import Path

from tools.evaluation.results import MAIN, cell, markdown, mean
from utils import first_line, read_json


def main(argv: list[str] | None = None) -> int:
    """Print the table. Returns the exit status: 0, or 2 where a folder holds no results."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.local_tasks.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("evaluations", nargs="+", metavar="NAME=EVALUATION")
    given = parser.parse_args(argv)
    of_model = {}
    metric_of = {}
    for word in given.evaluations:
        name, _, folder = word.rpartition("=")
        try:
            of_model[name or folder] = main_scores(read_json(Path(folder) / "results.json"))
            settings = read_json(Path(folder) / "evaluation.json")["tasks"]
        except (OSError, ValueError, AttributeError, KeyError) as error:
            print(f"{folder}: no results of tools/evaluate.py there ({first_line(error)})", file=sys.stderr)
            return 2
        metric_of |= {task: found["main_metric"] for task, found in settings.items()}
    print(table(of_model, metric_of))
    return 0


def main_scores(results: dict[str, dict]) -> dict[str, float | None]:
    """Task -> its main metric at the first dimension, which is the model's own; None where mteb found no number."""
    return {task: next(iter(by_dimension.values())).get(MAIN) for task, by_dimension in results.items()}


def table(of_model: dict[str, dict[str, float | None]], metric_of: dict[str, str]) -> str:
    """The tasks that all models have, a column for each model, and the mean."""
    first, *others = of_model.values()
    shared = [task for task in first if all(task in other for other in others)]
    rows = [["task", "metric", *of_model]]
    for task in shared:
        rows.append([task, metric_of[task], *(cell(scores[task]) for scores in of_model.values())])
    if len(shared) > 1:
        means = [mean([scores[task] for task in shared]) for scores in of_model.values()]
        rows.append(["mean of tasks", "", *map(cell, means)])
    return markdown(rows)


if __name__ == "__main__":
    sys.exit(main())
