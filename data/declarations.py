"""What the tokenising command line says about datasets: VALUE for all of them, NAME=VALUE for the one called NAME."""

from collections import Counter
from pathlib import Path

from data import token_store
from data.store_report import some
from modeling.prompts import bare_instruction, query_prompt, split_prompt

ALL_FILES = "*"  # stands for a file's name where none is given


def declared_tasks(declarations: list[str]) -> tuple[dict[str, str], list[str]]:
    """--task flags as name -> task, ALL_FILES where none is named; and the ones that make no sense."""
    declared = {}
    problems = []
    for text in declarations:
        name, _, task = text.rpartition("=")
        if task not in token_store.TASKS:
            problems.append(f"--task {text}: {task!r} is not one of {', '.join(token_store.TASKS)}")
        declared[name or ALL_FILES] = task
    return declared, problems


def declared_instructions(declarations: list[str], names: list[str]) -> tuple[dict[str, str], list[str]]:
    """--instruction flags as name -> instruction, ALL_FILES where none is named; and the ones that make no sense.

    What stands before an equals sign is a name if it can be one: an instruction has spaces.
    """
    declared = {}
    problems = []
    for text in declarations:
        name, equals, instruction = text.partition("=")
        if not equals or token_store.name_problem(name):
            name, instruction = ALL_FILES, text
        elif name not in names:
            problems.append(f"--instruction {text}: no file is called {name!r}; the files are called {some(names)}")
        problem = instruction_problem(instruction)
        if problem:
            problems.append(f"--instruction {text!r}: {problem}")
        instruction = bare_instruction(instruction)
        if name in declared:
            problems.append(
                f"--instruction {text}: given twice for {'all files' if name == ALL_FILES else name}; keep one"
            )
        declared[name] = instruction
    return declared, problems


def instruction_problem(text: str) -> str | None:
    """Why a text cannot be an instruction, or None; the words that stand around one may be there."""
    instruction = bare_instruction(text)
    if not instruction or split_prompt(query_prompt(instruction))[0] != instruction:
        return "give one instruction, such as 'Given a question, find its answer.'"
    return None


def name_problems(folder: Path, names: list[str], tasks: dict[str, str]) -> list[str]:
    """Names that two raw files share, and tasks declared for a name that no raw file has. `names` have no endings."""
    problems = []
    counts = Counter(names)
    for name in sorted(counts):
        if counts[name] > 1:
            problems.append(f"{folder}: two files are called {name!r}; one store can hold only one")
    for name, task in tasks.items():
        is_known = name == ALL_FILES or name in counts
        if not is_known and task in token_store.TASKS:  # an unknown task was a problem before
            problems.append(
                f"--task {name}={task}: no file is called {name}.parquet, {name}.jsonl, ...; "
                f"the files are called {some(names)}"
            )
    return problems
