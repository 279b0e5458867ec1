"""Raw training tuples of all three tasks from Python functions, in the published Parquet layout.

code_search     retrieval        a docstring's first paragraph -> its function; 24 hard negatives by BM25
code_packages   clustering       a function -> another of its package; 24 negatives from other packages
code_loops      classification   a function -> whether it loops, as a text; the other label is the negative
"""

import json
import random
from collections import defaultdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from retrieval.search import BM25
from utils import RunError, plural

from .corpus import Function

NEGATIVES = 24  # of a tuple, as published
SKIPPED_RANKS = 5  # of BM25's ranking, from the best
SMALL_PACKAGE = 300  # functions; smaller packages are mined in together
LEAST_FUNCTIONS = 20  # of a package that is a cluster
SEARCH = "Retrieve the most relevant code snippet for the given query."
PACKAGES = "Identify the package that the given function belongs to."
LOOPS = "Classify whether the given function contains a loop."
LABELS = ("The function runs straight through.", "The function contains a loop.")


def write_tuples(functions: list[Function], folder: Path, retrieval: int, others: int, seed: int = 0) -> None:
    """Write the three raw files, and tasks.json beside them.

    Args:
        retrieval: rows of code_search, about.
        others: rows of each other file at most.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    _write(folder / "code_search.parquet", search_tuples(functions, rng, retrieval))
    _write(folder / "code_packages.parquet", package_tuples(functions, rng, others))
    _write(folder / "code_loops.parquet", loop_tuples(functions, rng, others))
    tasks = {"code_search": "retrieval", "code_packages": "clustering", "code_loops": "classification"}
    (folder / "tasks.json").write_text(json.dumps(tasks, indent=2) + "\n")


def search_tuples(functions: list[Function], rng: random.Random, rows: int) -> list[tuple[str, ...]]:
    """(query, passage, 24 negatives): what BM25 ranks highest for the query among the functions of its package.

    As in the report the first five are left out, where false negatives gather, and so are functions of the
    positive's own name: copies and overrides would be more of them.

    Args:
        rows: how many to make, about: each function is taken with the same chance.
    """
    share = rows / len(functions)
    table = []
    for members in _groups(functions):
        chosen = [function for function in members if rng.random() < share]
        if not chosen:
            continue
        index = BM25([function.passage for function in members])
        ranking = index.search([function.query for function in chosen], 3 * NEGATIVES)
        for own, candidates in zip(chosen, ranking.passages, strict=True):
            others = [members[number] for number in candidates[SKIPPED_RANKS:]]
            negatives = [other.passage for other in others if other.own_name != own.own_name]
            if len(negatives) >= NEGATIVES:
                table.append((instruct(SEARCH, own.query), own.passage, *negatives[:NEGATIVES]))
    return table


def _groups(functions: list[Function]) -> list[list[Function]]:
    """Functions by package; packages too small to mine in go together."""
    large = []
    small = []
    for members in _by_package(functions).values():
        if len(members) >= SMALL_PACKAGE:
            large.append(members)
        else:
            small += members
    return [*large, small]


def _by_package(functions: list[Function]) -> dict[str, list[Function]]:
    packages = defaultdict(list)
    for function in functions:
        packages[function.package].append(function)
    return packages


def package_tuples(functions: list[Function], rng: random.Random, rows: int) -> list[tuple[str, ...]]:
    """(query, passage, 24 negatives) by package; each package is drawn equally often.

    Raises:
        RunError: there is no second package to take negatives from.
    """
    packages = _by_package(functions)
    names = sorted(name for name, members in packages.items() if len(members) >= LEAST_FUNCTIONS)
    if len(names) < 2:
        raise RunError(
            f"code_packages: {plural(len(names), 'package')} with {LEAST_FUNCTIONS} documented functions or more, and "
            "two are needed, as a function's negatives come from other packages: pip install -r requirements-dev.txt"
        )
    table = []
    for _ in range(rows):
        own, *others = rng.sample(names, 1 + min(NEGATIVES, len(names) - 1))
        query, positive = rng.sample(packages[own], 2)
        negatives = []
        for number in range(NEGATIVES):
            other = others[number % len(others)]  # where there are fewer packages than negatives, in turn
            negatives.append(rng.choice(packages[other]).passage)
        table.append((instruct(PACKAGES, query.passage), positive.passage, *negatives))
    return table


def loop_tuples(functions: list[Function], rng: random.Random, rows: int) -> list[tuple[str, ...]]:
    """(query, label, other label), as many with a loop as without."""
    table = []
    for has_loop in (False, True):
        members = [function for function in functions if function.has_loop == has_loop]
        for function in rng.sample(members, min(rows // 2, len(members))):
            table.append((instruct(LOOPS, function.passage), LABELS[has_loop], LABELS[not has_loop]))
    rng.shuffle(table)
    return table


def instruct(instruction: str, text: str) -> str:
    """A query as the reports write it."""
    return f"Instruct: {instruction}\nQuery: {text}"


def _write(path: Path, rows: list[tuple[str, ...]]) -> None:
    """A Parquet file with a column for each text of a tuple."""
    negatives = len(rows[0]) - 2
    names = ["query", "passage", *(f"negative_{number}" for number in range(1, negatives + 1))]
    columns = zip(*rows, strict=True)
    table = {name: list(column) for name, column in zip(names, columns, strict=True)}
    pq.write_table(pa.table(table), path)
