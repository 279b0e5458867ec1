"""Raw tuples on disk in the published layout: NAME.parquet, its report NAME.build.json, and its task in tasks.json."""

import os
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from data.raw_files import sample_rows
from tuples.sources.description import Source
from tuples.sources.instructions import instruct
from tuples.sources.kinds import Recipe, count_left_out, recipe, sift
from tuples.sources.rows import Rows
from utils import RunError, flush, read_json, write_json

TASKS_FILE = "tasks.json"
_BLOCK = 1024  # tuples written together


def tuples_path(folder: Path, name: str) -> Path:
    """The file of a dataset's raw tuples."""
    return folder / f"{name}.parquet"


def report_path(folder: Path, name: str) -> Path:
    """The file that says how a dataset was built."""
    return folder / f"{name}.build.json"


def prepare(source: Source, rows: Rows, input_names: list[str]) -> tuple[Recipe | None, dict, str]:
    """What a source will give: (its tuples or None, its report so far, why it has no tuples or "")."""
    rules = sift(rows, source)
    count_left_out(rules, rows, input_names, rows.tally)
    report = {"name": source.name, "kind": source.kind, "task": source.task_of_tuples, **rows.tally.as_json()}
    try:
        return recipe(rows, rules, source), report, ""
    except RunError as error:
        return None, report, str(error)


def write(source: Source, rows: Rows, made: Recipe, report: dict, inputs: list[dict], folder: Path) -> dict:
    """Write the raw tuples of a source, then its report, then its task. Returns the report.

    Args:
        inputs: what was read, for the report.
    """
    chosen = np.flatnonzero(sample_rows(made.tuples, source.cap, source.seed))  # numbers of tuples
    path = tuples_path(folder, source.name)
    aside = folder / f".{path.name}.partial"
    counts = _write_tuples(aside, source, rows, made, chosen)
    report = report | {
        "tuples": len(chosen),
        "tuples_left_out_by_the_cap": made.tuples - len(chosen),
        "negatives": made.negatives,
        "tuples_with_fewer_negatives": counts["fewer"],
        "documents_with_instruction": counts["documents"],
        "inputs": inputs,
        "description": asdict(source),
    }
    flush(aside)
    os.replace(aside, path)
    write_json(report_path(folder, source.name), report)
    _add_task(folder / TASKS_FILE, source.name, source.task_of_tuples)
    flush(folder)
    return report


def _write_tuples(path: Path, source: Source, rows: Rows, made: Recipe, chosen: np.ndarray) -> dict[str, int]:
    """Write the chosen tuples, block by block. Returns what was counted on the way."""
    names = ["query", "passage", *(f"negative_{slot}" for slot in range(1, made.negatives + 1))]
    schema = pa.schema([(name, pa.string()) for name in names])
    wanted = source.negatives if source.kind == "clustering" else 0  # of other kinds the rows decide
    draws = np.random.RandomState(source.seed)
    document_draws = np.random.RandomState([source.seed, 1])
    counts = {"fewer": 0, "documents": 0}
    with (
        pq.ParquetWriter(path, schema) as writer,
        tqdm(total=len(chosen), desc=source.name, unit="tuple", disable=None, leave=False) as bar,
    ):
        for begin in range(0, len(chosen), _BLOCK):
            numbers = made.draw(chosen[begin : begin + _BLOCK], draws)  # [b, 2 + negatives]
            counts["fewer"] += int(((numbers[:, 2:] >= 0).sum(axis=1) < wanted).sum())
            columns = [rows.texts(column) for column in numbers.T]
            columns, documents = instruct(columns, source.instruction, source.document_instruction_rate, document_draws)
            counts["documents"] += documents
            writer.write_table(pa.table(dict(zip(names, columns, strict=True)), schema))
            bar.update(len(numbers))
    return counts


# ------------------------------------------------------------------------------------------- tasks.json


def task_problems(folder: Path, tasks: dict[str, str]) -> list[str]:
    """Why the tasks of some datasets cannot be added to tasks.json."""
    path = folder / TASKS_FILE
    if not path.exists():
        return []
    try:
        declared = read_json(path)
    except (OSError, ValueError) as error:
        return [f"{path}: not JSON ({error}): fix it, or move it away"]
    if not isinstance(declared, dict):
        return [f"{path}: must be one object of dataset names and tasks"]
    problems = []
    for name, task in tasks.items():
        if declared.get(name, task) != task:
            problems.append(
                f"{path}: {name} is {declared[name]!r} there, and the description makes it {task!r}: change one"
            )
    return problems


def _add_task(path: Path, name: str, task: str) -> None:
    declared = read_json(path) if path.exists() else {}
    write_json(path, declared | {name: task})
