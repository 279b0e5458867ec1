"""A task folder, or an official name, as a task of mteb."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import mteb
from datasets import Dataset, DatasetDict
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from mteb.abstasks import (
    AbsTask,
    AbsTaskBitextMining,
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskPairClassification,
    AbsTaskRetrieval,
    AbsTaskSTS,
)
from mteb.abstasks.aggregated_task import AbsTaskAggregate
from mteb.abstasks.task_metadata import TaskMetadata

from retrieval.beir import RetrievalSet
from tools.evaluation.folders import LocalTask
from utils import first_line, plural

BASES = {
    "Retrieval": AbsTaskRetrieval,
    "Classification": AbsTaskClassification,
    "Clustering": AbsTaskClustering,
    "PairClassification": AbsTaskPairClassification,
    "BitextMining": AbsTaskBitextMining,
    "STS": AbsTaskSTS,
}
COLUMNS = {  # mteb's type -> our column -> mteb's
    "Clustering": {"text": "sentences", "label": "labels"},
    "PairClassification": {"label": "labels"},
}
MOST_PER_CLUSTERING = 2048  # texts that are drawn for each of mteb's ten clusterings of a local task


def local_task(task: LocalTask) -> AbsTask:
    """The task of a folder; its texts are handed over when mteb loads it.

    Raises:
        ValueError: mteb refuses what task.json says, as a language that it does not know.
    """
    metadata = TaskMetadata(
        name=task.name,
        description=task.description,
        type=task.kind.mteb_type,
        dataset={"path": f"local/{task.name}", "revision": task.revision},
        eval_splits=["test"],
        eval_langs=task.languages,
        main_score=task.main_metric,
        category="t2c" if task.kind.value == "label" and len(task.kind.texts) == 1 else "t2t",
        modalities=["text"],
    )
    metadata._validate_metadata()
    fields = {"metadata": metadata, "load_data": loader(task)}
    if task.kind.mteb_type == "Clustering":
        fields["max_fraction_of_documents_to_embed"] = None  # all of them: local tasks are small
        fields["max_documents_per_cluster"] = min(MOST_PER_CLUSTERING, len(task.rows["test"]))
    return type("LocalTask", (BASES[task.kind.mteb_type],), fields)()


def loader(task: LocalTask) -> Callable[..., None]:
    """mteb's hook that fills a task's dataset: from the folder that was read, and nothing from the hub."""

    def load_data(self, num_proc: int | None = None, **kwargs) -> None:
        if self.data_loaded:
            return
        if task.retrieval is not None:
            self.dataset = {"default": {"test": retrieval_split(task.retrieval)}}
        else:
            self.dataset = DatasetDict({split: table(task, split) for split in task.rows})
        self.data_loaded = True

    return load_data


def retrieval_split(found: RetrievalSet) -> dict:
    """mteb's RetrievalSplitData; every query of the set is judged."""
    relevant = {}
    for query, scores in zip(found.query_ids, found.relevance, strict=True):
        relevant[query] = {found.document_ids[number]: score for number, score in scores.items()}
    return {
        "queries": Dataset.from_dict({"id": found.query_ids, "text": found.queries}),
        "corpus": Dataset.from_dict({"id": found.document_ids, "text": found.documents[:]}),
        "relevant_docs": relevant,
        "top_ranked": None,
    }


def table(task: LocalTask, split: str) -> Dataset:
    """The rows of a split with mteb's names of columns; labels are numbered in the order of their names."""
    names = COLUMNS.get(task.kind.mteb_type, {})
    columns = {}
    for column in task.rows[split][0]:
        columns[names.get(column, column)] = [row[column] for row in task.rows[split]]
    if task.kind.mteb_type in ("Classification", "Clustering"):
        labels = sorted({str(row["label"]) for rows in task.rows.values() for row in rows})
        number = {label: place for place, label in enumerate(labels)}
        columns[names.get("label", "label")] = [number[str(row["label"])] for row in task.rows[split]]
    return Dataset.from_dict(columns)


def official_tasks(names: list[str], benchmark: str | None) -> tuple[list[AbsTask], list[str]]:
    """The tasks of these names and of a benchmark, as mteb defines them, and what is wrong with the names."""
    tasks = []
    problems = []
    if benchmark is not None:
        try:
            tasks += list(mteb.get_benchmark(benchmark).tasks)
        except KeyError as error:
            problems.append(f"--benchmark: {error.args[0]}")
    for name in names:
        try:
            tasks.append(mteb.get_task(name))
        except (KeyError, ValueError) as error:
            reason = f"neither a folder nor a task of mteb ({error.args[0].removeprefix('KeyError: ')})"
            if Path(name).is_dir():
                reason = "only one folder can be given: the one that holds a folder for each task"
            problems.append(f"--tasks {name}: {reason}")
    return tasks, problems


def missing_data(tasks: list[AbsTask]) -> list[str]:
    """Why the texts of official tasks cannot be fetched, one line; empty where they are cached or the hub answers."""
    repositories = sorted({found for task in tasks for found in repositories_of(task)})
    absent = [found for found in repositories if not is_cached(*found)]
    if not absent:
        return []
    named = ", ".join(path for path, _ in absent[:3])
    what = f"{plural(len(absent), 'dataset')} must be fetched from the hub, first {named}"
    if constants.HF_HUB_OFFLINE:
        return [f"{what}; but HF_HUB_OFFLINE is set: unset it, or give --tasks a folder of local tasks"]
    try:
        huggingface_hub.HfApi().dataset_info(absent[0][0], revision=absent[0][1], timeout=20)
    except (OSError, HfHubHTTPError, OfflineModeIsEnabled, RuntimeError) as error:
        return [f"{what}; {constants.ENDPOINT} does not give it ({first_line(error)})"]
    return []


def repositories_of(task: AbsTask) -> list[tuple[str, str | None]]:
    """(dataset, revision) of a task, or of the tasks that it is the mean of."""
    if isinstance(task, AbsTaskAggregate):
        return [found for part in task.metadata.tasks for found in repositories_of(part)]
    dataset = task.metadata.dataset
    return [(dataset["path"], dataset.get("revision"))]


def is_cached(path: str, revision: str | None) -> bool:
    """Whether a dataset was fetched before."""
    try:
        huggingface_hub.snapshot_download(path, repo_type="dataset", revision=revision, local_files_only=True)
    except (LocalEntryNotFoundError, OSError, ValueError):
        return False
    return True


def fresh(task: AbsTask) -> AbsTask:
    """A copy of a task that was never evaluated: its random numbers start anew."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return copy.deepcopy(task)
