"""Results of several models as one table: the main metric of each task, of whole vectors.

    python -m examples.local_tasks.compare NAME=EVALUATION [NAME=EVALUATION ...] [--card]

EVALUATION is what tools/evaluate.py wrote. With --card the results go into the card of the first one's model as well,
with the others beside it.
"""

import argparse
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tools.evaluation.results import MAIN, cell, markdown, mean
from utils import RunError, exit_status, first_line, read_json


@dataclass(frozen=True)
class Evaluation:
    """What tools/evaluate.py wrote about a model."""

    model: Path
    results: dict  # task -> dimensions -> metric -> value
    main_scores: dict[str, float | None]  # of whole vectors
    main_metrics: dict[str, str]  # task -> metric


def main(argv: list[str] | None = None) -> int:
    """Print the table. Returns the exit status: 0, or 2 if a folder holds no results; 1 if the disk is full."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.local_tasks.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("evaluations", nargs="+", metavar="NAME=EVALUATION")
    parser.add_argument("--card", action="store_true", help="also into the card of the first one's model")
    flags = parser.parse_args(argv)
    return exit_status(partial(compare, flags.evaluations, flags.card))


def compare(words: list[str], card: bool) -> None:
    """Print the table.

    Args:
        words: NAME=EVALUATION, or EVALUATION alone, which is its name then.
        card: put the first model's results into its card as well.

    Raises:
        RunError: two have one name, a folder holds no results, or the first model was not trained here.
    """
    found = {}
    metric_of = {}
    for word in words:
        name, _, folder = word.rpartition("=")
        name = name or folder
        if name in found:
            raise RunError(f"{name}: two evaluations of this name; give each a name of its own")
        found[name] = read_evaluation(Path(folder))
        metric_of |= found[name].main_metrics
    if card:
        put_into_card(found)
    print(table({name: one.main_scores for name, one in found.items()}, metric_of))


def put_into_card(found: dict[str, Evaluation]) -> None:
    """Put the first evaluation into the card of its model, with the others beside it.

    Raises:
        RunError: the model was not trained here, or lies elsewhere now; nothing was written.
    """
    from export.card_update import add_evaluation  # needs torch, which takes seconds

    first, *others = found
    beside = {name: found[name].results for name in others}
    folder = found[first].model
    if not add_evaluation(folder, found[first].results, beside):
        raise RunError(f"--card: {folder} holds no model that was trained here: it has no f2llm.json")


def read_evaluation(folder: Path) -> Evaluation:
    """What tools/evaluate.py wrote into a folder. Raises RunError if it did not."""
    try:
        results = read_json(folder / "results.json")
        settings = read_json(folder / "evaluation.json")
        main_metrics = {task: facts["main_metric"] for task, facts in settings["tasks"].items()}
        return Evaluation(Path(settings["model"]), results, main_scores(results), main_metrics)
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise RunError(f"{folder}: no results of tools/evaluate.py there ({first_line(error)})") from None


def main_scores(results: dict[str, dict]) -> dict[str, float | None]:
    """Task -> its main metric at the first dimension, which is the model's own; None if mteb found no number."""
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
