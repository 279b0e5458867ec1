"""The files of a mining, looked through before anything is done; and the task that the output takes over."""

from dataclasses import replace
from pathlib import Path

from data import raw_files, raw_formats, token_store
from data.raw_rows import RawError
from modeling.prompts import bare_instruction
from tuples.mining.texts import Inputs, column_names, corpus_column
from utils import RunError, plural, read_json, write_json


def read_inputs(
    path: Path,
    corpora: list[Path],
    corpus_name: str | None = None,
    instruction: str | None = None,
    group_column: str | None = None,
    keep_negatives: bool = True,
    skip_bad_rows: bool = False,
) -> Inputs:
    """Look through all files once.

    Args:
        path: raw tuples.
        corpora: files of further passages.
        corpus_name: the column of their texts; None = the first that is known.
        instruction: before every query that carries none, with or without the words around it.
        group_column: of `path`; a corpus may have it too.
        keep_negatives: read those that `path` has.
        skip_bad_rows: leave out rows without query or passage, instead of refusing the file.

    Raises:
        RunError: the files cannot be mined; the message has a line for each problem.
    """
    problems = file_problems([path, *corpora]) + task_problems(path)
    if problems:
        raise RunError("\n".join(problems))
    survey = raw_files.survey(path, None)
    problems = list(survey.problems)
    if not skip_bad_rows:
        for line in survey.describe_bad_rows(path):
            problems.append(f"{line}: mend the file, or leave such rows out with --skip_bad_rows true")
    elif not survey.good and not problems:
        problems.append(f"{path}: no good row would be left")
    files, corpus_problems = _corpus_columns(corpora, corpus_name)
    problems += corpus_problems
    if group_column and survey.columns and group_column not in column_names(path):
        names = ", ".join(column_names(path))
        problems.append(f"{path}: no column {group_column!r}; the columns are {names}: choose one with --group_column")
    if problems:
        raise RunError("\n".join(problems))
    instruction = bare_instruction(instruction) if instruction else None
    if keep_negatives:
        return Inputs(path, survey.columns, survey.slots, tuple(files), instruction, group_column)
    return Inputs(path, replace(survey.columns, negatives=()), 0, tuple(files), instruction, group_column)


def _corpus_columns(corpora: list[Path], wanted: str | None) -> tuple[list[tuple[Path, str]], list[str]]:
    """Each corpus with the column of its texts, and why some cannot be used."""
    files = []
    problems = []
    for path in corpora:
        try:
            files.append((path, corpus_column(path, wanted)))
        except RunError as error:
            problems.append(str(error))
        except RawError as error:
            problems += [f"{path}: {line}" for line in str(error).splitlines()]
    return files, problems


def file_problems(paths: list[Path]) -> list[str]:
    """Files that cannot be read, one line each."""
    problems = []
    for path in paths:
        if raw_formats.format_of(path) is None:
            problems.append(f"{path}: must end in one of {raw_files.ENDINGS}")
        try:
            raw_formats.check_file(path)
        except RawError as error:
            problems.append(f"{path}: {error}")
    return problems


def task_problems(path: Path) -> list[str]:
    """Why tuples of the file's task have no negatives to be mined, one line, or nothing."""
    if task_of(path) != "classification":
        return []
    return [
        f"{path}: its task is classification, whose one negative is the other label's text: tokenise it as it is, or "
        f"declare another task in {path.with_name('tasks.json')}"
    ]


def task_of(path: Path) -> str | None:
    """The task that tasks.json beside a file, or the published list, gives it."""
    tasks, _ = token_store.known_tasks(path.parent)
    return tasks.get(raw_formats.dataset_name(path))


def declare_task(source: Path, output: Path) -> None:
    """Give the output the task of the input, in the tasks.json beside it."""
    task = task_of(source)
    if task is None or task_of(output) == task:
        return
    path = output.with_name("tasks.json")
    known = read_json(path) if path.exists() else {}
    write_json(path, {**known, raw_formats.dataset_name(output): task})


def check_size(passages: int, num_negatives: int, may_be_fewer: bool) -> None:
    """Raise RunError if there are not as many different passages as a tuple needs."""
    if passages <= num_negatives and not may_be_fewer:
        there_are = "there is" if passages == 1 else "there are"
        raise RunError(
            f"{there_are} {plural(passages, 'distinct passage')}, one of them the positive, and --num_negatives "
            f"{num_negatives} are wanted: add passages with --corpus, ask for fewer, or use --too_few fewer"
        )
