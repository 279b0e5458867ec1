"""Every task at every dimension through mteb, whose files say what was done before."""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import mteb
from mteb.abstasks import AbsTask
from tqdm import tqdm

from tools.evaluation.kept_vectors import KeptVectors
from tools.evaluation.model import FolderModel
from tools.evaluation.results import Scores, metrics_of
from tools.evaluation.tasks import fresh
from utils import RunError, first_line, is_disk_error


def evaluate_all(model: FolderModel, tasks: list[AbsTask], dims: list[int], output: Path, batch_size: int) -> Scores:
    """The scores of all tasks. mteb's files go below output/results as they are finished.

    Args:
        dims: to evaluate, the widest first.

    Raises:
        RunError: mteb cannot evaluate a task.
        OSError: the disk refuses what is written.
    """
    cache = mteb.ResultCache(cache_path=output)
    scores = {}
    bar = tqdm(tasks, desc="evaluating", unit="task", disable=None)
    for task in bar:
        bar.set_postfix_str(task.metadata.name)
        with kept_vectors(model, len(dims) > 1, output):
            scores[task.metadata.name] = evaluate_task(model, task, dims, cache, batch_size)
    return scores


@contextmanager
def kept_vectors(model: FolderModel, is_wanted: bool, folder: Path) -> Iterator[None]:
    """Let the model keep its vectors on the disk for the time of one task."""
    if not is_wanted:
        yield
        return
    with contextlib.closing(KeptVectors(folder, model.width)) as kept:
        model.kept = kept
        try:
            yield
        finally:
            model.kept = None


def evaluate_task(
    model: FolderModel, task: AbsTask, dims: list[int], cache: mteb.ResultCache, batch_size: int
) -> dict[str, dict[str, float]]:
    """dimension -> metric -> value of one task."""
    by_dimension = {}
    for dimension in dims:
        model.use(dimension)
        strategy = "only-missing" if is_finished(task, model, cache) else "always"
        options = {"batch_size": batch_size, "show_progress_bar": False}
        try:
            with quiet():
                found = mteb.evaluate(
                    model,
                    fresh(task),
                    cache=cache,
                    encode_kwargs=options,
                    overwrite_strategy=strategy,
                    co2_tracker=False,
                    show_progress_bar=False,
                )
        except (ValueError, KeyError, OSError) as error:
            if is_disk_error(error):
                raise
            raise RunError(f"{task.metadata.name}: mteb cannot evaluate it ({first_line(error)})") from error
        by_dimension[str(dimension)] = metrics_of(found.task_results[0].scores)
    return by_dimension


def is_finished(task: AbsTask, model: FolderModel, cache: mteb.ResultCache) -> bool:
    """Whether mteb's file holds results of these texts by this version of mteb.

    mteb itself compares the texts' revision only where a split is missing. A file that was cut off by a kill counts as
    none.
    """
    try:
        found = cache.load_task_result(task.metadata.name, model.mteb_model_meta)
    except (ValueError, KeyError, OSError):
        return False
    if found is None:
        return False
    return found.dataset_revision == task.metadata.revision and found.mteb_version == version("mteb")


@contextmanager
def quiet() -> Iterator[None]:
    """Without mteb's log lines and warnings; off a terminal also without the progress bars below it."""
    logger = logging.getLogger("mteb")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.ExitStack() as stack:
            warnings.simplefilter("ignore")
            if not sys.stderr.isatty():
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stderr(nowhere))
            yield
    finally:
        logger.setLevel(level)
