"""Tasks as folders: which files each kind has, and everything that can be wrong in them.

    NAME/task.json    {"type": "classification", "languages": ["eng-Latn"], "prompt": "...", "main_metric": "f1"}

Only `type` must be given, and of a folder with a queries.jsonl not even that. All other files are JSON lines:

    retrieval             queries.jsonl (_id, text), corpus.jsonl (_id, title, text), qrels/test.tsv
    classification        train.jsonl, test.jsonl (text, label)
    clustering            test.jsonl (text, label)
    pair_classification   test.jsonl (sentence1, sentence2, label: 0 or 1)
    bitext                test.jsonl (sentence1, sentence2: translations of each other)
    sts                   test.jsonl (sentence1, sentence2, score)
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from configuration.keys import did_you_mean
from retrieval import beir
from utils import RunError, file_digest, first_line, plural, read_strictly, short_digest

DEFAULT_LANGUAGES = ["eng-Latn"]
SETTINGS = ("type", "languages", "prompt", "main_metric", "description")
SHOWN = 5  # problems of one file
_CUTOFFS = (1, 3, 5, 10, 20, 100, 1000)
_OF_RANKINGS = ("ndcg", "map", "recall", "precision", "mrr", "hit_rate")
_OF_CLASSES = ("accuracy", "f1", "f1_weighted", "precision", "precision_weighted", "recall", "recall_weighted")
_OF_PAIRS = ("accuracy", "f1", "precision", "recall", "ap")
_OF_SCORES = ("pearson", "spearman")


@dataclass(frozen=True)
class Kind:
    """What tasks of one kind have in common."""

    mteb_type: str
    main_metric: str  # where task.json names none
    metrics: tuple[str, ...]  # that may be the main one, as mteb calls them
    splits: tuple[str, ...] = ("test",)  # files of rows
    texts: tuple[str, ...] = ()  # columns of text
    value: str = ""  # one more column
    is_symmetric: bool = True  # both sides are read with the instruction; otherwise queries alone


KINDS = {
    "retrieval": Kind(
        "Retrieval",
        "ndcg_at_10",
        tuple(f"{metric}_at_{k}" for metric in _OF_RANKINGS for k in _CUTOFFS),
        splits=(),
        is_symmetric=False,
    ),
    "classification": Kind("Classification", "accuracy", _OF_CLASSES, ("train", "test"), ("text",), "label"),
    "clustering": Kind("Clustering", "v_measure", ("v_measure", "ami"), ("test",), ("text",), "label"),
    "pair_classification": Kind(
        "PairClassification",
        "max_ap",
        tuple(f"{by}_{metric}" for by in ("max", "cosine", "dot", "euclidean") for metric in _OF_PAIRS),
        texts=("sentence1", "sentence2"),
        value="label",
    ),
    "bitext": Kind("BitextMining", "f1", ("f1", "accuracy", "precision", "recall"), texts=("sentence1", "sentence2")),
    "sts": Kind(
        "STS",
        "cosine_spearman",
        tuple(f"{by}_{metric}" for by in ("cosine", "euclidean", "manhattan") for metric in _OF_SCORES),
        texts=("sentence1", "sentence2"),
        value="score",
    ),
}


@dataclass(frozen=True)
class LocalTask:
    """One folder, read."""

    name: str
    kind: Kind
    languages: list[str]
    main_metric: str
    prompt: (
        str | dict[str, str] | None
    )  # the task's own instruction; for retrieval also one each for query and document
    description: str
    revision: str  # changes with any file
    rows: dict[str, list[dict]] = field(default_factory=dict)  # split -> rows
    retrieval: beir.RetrievalSet | None = None


def read_tasks(root: Path) -> tuple[list[LocalTask], list[str]]:
    """The tasks in the folders of `root`, by name, and everything that is wrong with them, one line each."""
    if not root.is_dir():
        return [], [f"{root}: no such folder"]
    if (root / "task.json").exists() or (root / "queries.jsonl").exists():
        return [], [f"{root}: is a task itself; give the folder that holds it"]
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    tasks = []
    problems = []
    for folder in folders:
        task, found = read_task(folder)
        problems += found
        if task is not None:
            tasks.append(task)
    if not folders:
        problems.append(f"{root}: no task in it; it holds a folder for each task (docs/evaluation.md)")
    return tasks, problems


def read_task(folder: Path) -> tuple[LocalTask | None, list[str]]:
    """The task of a folder, and what is wrong with it; None if anything is."""
    settings, problems = read_settings(folder)
    if problems:
        return None, problems
    kind = KINDS[settings["type"]]
    rows = {}
    for split in kind.splits:
        rows[split], found = read_rows(folder / f"{split}.jsonl", kind)
        problems += found
    retrieval = None
    if kind.mteb_type == "Retrieval":
        try:
            retrieval = beir.read_set(folder)
        except RunError as error:
            problems += str(error).splitlines()
    elif not problems:
        problems += too_few_labels(folder, kind, rows)
    if problems:
        return None, problems
    task = LocalTask(
        name=folder.name,
        kind=kind,
        languages=settings.get("languages", DEFAULT_LANGUAGES),
        main_metric=settings.get("main_metric", kind.main_metric),
        prompt=settings.get("prompt"),
        description=settings.get("description", folder.name),
        revision=digest(folder),
        rows=rows,
        retrieval=retrieval,
    )
    return task, []


def read_settings(folder: Path) -> tuple[dict, list[str]]:
    """task.json, with a type, and what is wrong in it."""
    path = folder / "task.json"
    is_beir = (folder / "queries.jsonl").exists()
    if not path.exists():
        if is_beir:
            return {"type": "retrieval"}, []
        kinds = ", ".join(KINDS)
        return {}, [f'{folder}: no task.json, and no queries.jsonl; write {{"type": one of {kinds}}} into task.json']
    try:
        settings, problems = read_strictly(path)
    except (OSError, ValueError) as error:
        return {}, [f"{path}: cannot be read as JSON ({first_line(error)})"]
    if not isinstance(settings, dict):
        return {}, [f"{path}: must hold an object, as {{...}}"]
    if is_beir:
        settings.setdefault("type", "retrieval")
    return settings, problems + setting_problems(path, settings)


def setting_problems(path: Path, settings: dict) -> list[str]:
    """What is wrong with the values of a task.json, one line each."""
    problems = []
    for key in settings:
        if key not in SETTINGS:
            problems.append(f"{path}: {key}: no such key{did_you_mean(key, SETTINGS)}")
    chosen = settings.get("type")
    if not isinstance(chosen, str) or chosen not in KINDS:
        return [*problems, f"{path}: type {chosen!r}: must be one of {', '.join(KINDS)}"]
    kind = KINDS[chosen]
    metric = settings.get("main_metric", kind.main_metric)
    if metric not in kind.metrics:
        hint = did_you_mean(str(metric), kind.metrics)
        problems.append(f"{path}: main_metric {metric!r}: mteb has no such metric of {chosen}{hint}")
    languages = settings.get("languages", DEFAULT_LANGUAGES)
    if not isinstance(languages, list) or not languages or not all(isinstance(code, str) for code in languages):
        problems.append(f'{path}: languages: must be a list of language-script codes, as ["eng-Latn"]')
    if not isinstance(settings.get("description", ""), str):
        problems.append(f"{path}: description: must be a text")
    if "prompt" in settings:
        problems += [f"{path}: prompt: {problem}" for problem in prompt_problems(settings["prompt"], kind)]
    return problems


def prompt_problems(prompt, kind: Kind) -> list[str]:
    """What is wrong with an instruction: a text, or for the two sides of a search a text each."""
    if isinstance(prompt, str):
        return []
    is_by_side = isinstance(prompt, dict) and set(prompt) <= {"query", "document"}
    if not is_by_side or not all(isinstance(text, str) for text in prompt.values()):
        return ['must be a text, or {"query": "...", "document": "..."}']
    if kind.is_symmetric:
        return [f"must be one text: both sides of {kind.mteb_type} are read with it"]
    return []


def read_rows(path: Path, kind: Kind) -> tuple[list[dict], list[str]]:
    """The rows of a file, and what is wrong with it, a few lines at most."""
    rows = []
    problems = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        return [], [f"{path}: cannot be read ({first_line(error)})"]
    for number, line in enumerate(lines, start=1):
        if line.strip():
            row, problem = read_row(line, kind)
            rows.append(row)
            if problem:
                problems.append(f"{path}, line {number}: {problem}")
    if not rows:
        problems.append(f"{path}: no row in it")
    hidden = len(problems) - SHOWN
    if hidden > 0:
        problems[SHOWN:] = [f"{path}: and {plural(hidden, 'more problem')} of this kind"]
    return rows, problems


def read_row(line: str, kind: Kind) -> tuple[dict, str]:
    """A row's columns, and what is wrong with it, or ""."""
    try:
        row = json.loads(line)
    except ValueError:
        return {}, "not JSON"
    if not isinstance(row, dict):
        return {}, f"must be an object with {', '.join((*kind.texts, kind.value))}"
    for column in kind.texts:
        if not isinstance(row.get(column), str) or not row[column].strip():
            return {}, f"{column}: must be a text that is not empty"
    if kind.value and kind.value not in row:
        return {}, f"{kind.value}: missing"
    value = row.get(kind.value)
    if kind.mteb_type == "PairClassification" and (isinstance(value, bool) or value not in (0, 1)):
        return {}, f"label {value!r}: must be 0 or 1"
    if kind.mteb_type == "STS" and not is_number(value):
        return {}, f"score {value!r}: must be a number"
    if kind.value == "label" and not isinstance(value, str | int):
        return {}, f"label {value!r}: must be a text or a whole number"
    columns = [*kind.texts, kind.value] if kind.value else kind.texts
    return {column: row[column] for column in columns}, ""


def is_number(value) -> bool:
    """Whether a value is a finite number; true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def too_few_labels(folder: Path, kind: Kind, rows: dict[str, list[dict]]) -> list[str]:
    """What makes labels useless: all are the same, or a label of test.jsonl is not in train.jsonl."""
    if kind.value == "score" and len({row["score"] for row in rows["test"]}) < 2:
        return [f"{folder}/test.jsonl: all scores are the same"]
    if kind.value != "label":
        return []
    labels = {split: {str(row["label"]) for row in rows[split]} for split in rows}
    for split, found in labels.items():
        if len(found) < 2:
            return [f"{folder}/{split}.jsonl: all labels are {found.pop()!r}"]
    unseen = sorted(labels["test"] - labels.get("train", labels["test"]))
    if unseen:
        return [f"{folder}/test.jsonl: label {unseen[0]!r} is not in train.jsonl"]
    return []


def digest(folder: Path, without: tuple[str, ...] = ()) -> str:
    """Changes with the name or the bytes of any file below a folder; 16 hex digits.

    Args:
        without: names of files in the folder itself that do not count.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [str(path.relative_to(folder)) for path in files]
    facts = [(name, file_digest(folder / name)) for name in names if name not in without]
    return short_digest(json.dumps(facts))
