"""A source of each of the six kinds, from the Python functions of this machine, for tools/build_tuples.py.

    python -m examples.six_kinds.gather six_kinds
    python -m tools.build_tuples --source six_kinds/*.json --output_dir six_kinds/raw

The first command writes rows as JSON lines into the folder, and the descriptions that lie beside this file:

    pairs             docstrings.json   a docstring's first paragraph -> its function
    nli               facts.json        a function -> what its syntax tree shows, what it denies, what another one does
    sts               scored.json       docstrings of functions of one name, scored by the words that they share
    duplicates        copies.json       functions of one name: the same docstring or another one
    classification    loops.json        a function -> whether it loops
    clustering        packages.json     a function -> its package
"""

import argparse
import ast
import json
import random
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

from examples.code_search import corpus
from examples.code_search.corpus import Function

DESCRIPTIONS = sorted(Path(__file__).parent.glob("*.json"))
FACTS = {  # statement about a function -> the nodes of its syntax tree that make it true
    "It contains a loop.": (ast.For, ast.While, ast.comprehension),
    "It raises an exception.": (ast.Raise,),
    "It catches an exception.": (ast.Try,),
    "It returns a value.": (ast.Return,),
    "It makes a decision.": (ast.If, ast.IfExp),
    "It defines another function.": (ast.Lambda,),
}


def main(argv: list[str] | None = None) -> int:
    """Gather. Returns the exit status, 0."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.six_kinds.gather",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="where rows and descriptions go")
    parser.add_argument("--one_file_in", type=int, default=1, help="read one of every so many Python files (default 1)")
    given = parser.parse_args(argv)
    functions = corpus.installed_functions(given.one_file_in)
    write_sources(functions, given.folder)
    print(f"{given.folder}: {len(functions):,} documented functions, {len(DESCRIPTIONS)} descriptions")
    return 0


def write_sources(functions: list[Function], folder: Path) -> None:
    """Write the rows of all kinds and their descriptions. The same functions give the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    own = corpus.distinct(functions)
    of_one_name = neighbours(functions)
    _write(folder / "docstrings.jsonl", docstrings(own))
    _write(folder / "functions.jsonl", labelled(own))
    _write(folder / "facts.jsonl", facts(own))
    _write(folder / "scored.jsonl", scored(of_one_name))
    _write(folder / "copies.jsonl", copies(of_one_name))
    for path in DESCRIPTIONS:
        shutil.copyfile(path, folder / path.name)


def docstrings(functions: list[Function]) -> Iterable[dict]:
    """Rows of pairs."""
    for function in functions:
        name = f"{function.module}.{function.name}:{function.line}"
        yield {"function": name, "docstring": function.query, "source": function.passage}


def labelled(functions: list[Function]) -> Iterable[dict]:
    """Rows of both kinds of classification."""
    for function in functions:
        yield {"source": function.passage, "package": function.package, "has_loop": function.has_loop}


def facts(functions: list[Function], seed: int = 0) -> Iterable[dict]:
    """Rows of inference: what the syntax tree of a function shows, and what an unrelated function does."""
    rng = random.Random(seed)
    for function in functions:
        try:
            tree = ast.parse(function.passage)
        except SyntaxError:  # cut to its length, or a body that was nothing but its docstring
            continue
        nodes = list(ast.walk(tree))
        for fact, kinds in FACTS.items():
            holds = any(isinstance(node, kinds) for node in nodes)
            yield {"source": function.passage, "fact": fact, "holds": "yes" if holds else "no"}
        yield {"source": function.passage, "fact": rng.choice(functions).query, "holds": "unknown"}


def neighbours(functions: list[Function]) -> list[tuple[Function, Function]]:
    """Pairs of neighbours among the functions of each name, where their sources differ."""
    by_name = defaultdict(list)
    for function in functions:
        by_name[function.own_name].append(function)
    return [pair for name in sorted(by_name) for pair in pairwise(by_name[name]) if pair[0].passage != pair[1].passage]


def scored(pairs: list[tuple[Function, Function]]) -> Iterable[dict]:
    """Rows of scored pairs: 5 times the share of all their words that two docstrings have in common."""
    for first, second in pairs:
        words, others = set(first.query.lower().split()), set(second.query.lower().split())
        overlap = 5 * len(words & others) / len(words | others)
        yield {"first": first.query, "second": second.query, "overlap": round(overlap, 2)}


def copies(pairs: list[tuple[Function, Function]]) -> Iterable[dict]:
    """Rows of duplicates."""
    for first, second in pairs:
        same = first.query == second.query
        yield {"first": first.passage, "second": second.passage, "same_docstring": same}


def _write(path: Path, rows: Iterable[dict]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(main())
