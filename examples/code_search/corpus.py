"""Documented Python functions of this machine: the standard library and the installed packages.

A function becomes a query, the first paragraph of its docstring, and a passage, its source without the docstring.
The standard library is held out for evaluation; the installed packages are for training. The same installation
gives the same functions in the same order.
"""

import ast
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

SKIPPED = {"tests", "test", "testing", "idlelib", "lib2to3", "site-packages", "__pycache__", "_vendor"}
MAX_CHARS = 2000  # of a passage; longer ones are cut by the tokenizer anyway
_WORD = re.compile(r"[A-Za-z]{2,}")


@dataclass(frozen=True)
class Function:
    """One documented function."""

    package: str  # top-level package
    module: str
    name: str  # with its class, if it has one
    line: int  # of its file, from 1
    query: str  # first paragraph of the docstring, on one line
    passage: str  # source without the docstring
    has_loop: bool  # a for or while statement, or a comprehension

    @property
    def own_name(self) -> str:
        """The name without the class."""
        return self.name.rpartition(".")[2]


def installed_functions(one_file_in: int = 1) -> list[Function]:
    """Functions of the packages in this environment, sorted by file, read from one of every so many files."""
    return _functions_below(Path(sysconfig.get_paths()["purelib"]), one_file_in)


def standard_library_functions(one_file_in: int = 1) -> list[Function]:
    """Functions of Python's own library, sorted by file, read from one of every so many files."""
    return _functions_below(Path(sysconfig.get_paths()["stdlib"]), one_file_in)


def distinct(functions: list[Function], others: list[Function] = ()) -> list[Function]:
    """`functions` without those whose query or passage came before, in the list or in `others`."""
    seen = set()
    for other in others:
        seen |= _texts(other)
    kept = []
    for function in functions:
        if seen.isdisjoint(_texts(function)):
            kept.append(function)
        seen |= _texts(function)
    return kept


def _texts(function: Function) -> set[str]:
    """What makes a function known; queries that differ in case alone are the same."""
    return {function.query.lower(), function.passage}


def functions_of_source(source: str, module: str) -> list[Function]:
    """The functions in a module's source whose docstring is a query; none when it does not parse."""
    functions = []
    for node, name, lines in _definitions(source):
        if ast.get_docstring(node, clean=False) and len(node.body) > 1:  # more than a docstring
            function = _describe(node, name, lines, module)
            if is_sentence(function.query):
                functions.append(function)
    return functions


def all_functions_of_source(source: str, module: str) -> list[Function]:
    """All functions in a module's source, their docstrings left in the passages; none when it does not parse."""
    functions = []
    for node, name, lines in _definitions(source):
        passage = _unindented(lines[node.lineno - 1 : node.end_lineno])
        functions.append(replace(_describe(node, name, lines, module), passage=passage))
    return functions


def is_sentence(text: str) -> bool:
    """Whether a docstring's first paragraph says something in words that a person might search for."""
    words = _WORD.findall(text)
    letters = sum(len(word) for word in words)
    is_markup = text.startswith((":", "@", ">>>"))  # parameters, or an example
    return len(words) >= 4 and len(text) <= 400 and letters > 0.6 * len(text) and not is_markup


def _definitions(source: str) -> Iterator[tuple[ast.FunctionDef, str, list[str]]]:
    """Functions of a module, their names with the class, and the module's lines; none inside other functions."""
    try:
        with warnings.catch_warnings():  # of escapes in other people's strings
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    lines = source.splitlines()
    for node, name in _functions_in(tree):
        yield node, name, lines


def _functions_in(scope: ast.AST, prefix: str = "") -> Iterator[tuple[ast.FunctionDef, str]]:
    for node in ast.iter_child_nodes(scope):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node, prefix + node.name
        elif isinstance(node, ast.ClassDef):
            yield from _functions_in(node, f"{prefix}{node.name}.")
        else:
            yield from _functions_in(node, prefix)


def _describe(node: ast.FunctionDef, name: str, lines: list[str], module: str) -> Function:
    """A function of a module whose source has these lines."""
    docstring = ast.get_docstring(node) or ""
    paragraph = docstring.split("\n\n")[0]
    code = lines[node.lineno - 1 : node.end_lineno]
    if docstring:
        place = node.body[0]
        code = lines[node.lineno - 1 : place.lineno - 1] + lines[place.end_lineno : node.end_lineno]
    loops = (ast.For, ast.AsyncFor, ast.While, ast.comprehension)
    return Function(
        package=module.partition(".")[0],
        module=module,
        name=name,
        line=node.lineno,
        query=" ".join(paragraph.split()),
        passage=_unindented(code),
        has_loop=any(isinstance(inner, loops) for inner in ast.walk(node)),
    )


def _unindented(code: list[str]) -> str:
    """Lines as one text, moved left by the first one's indentation and cut to MAX_CHARS."""
    if not code:  # docstring and definition on one line
        return ""
    indent = len(code[0]) - len(code[0].lstrip())
    return "\n".join(line[indent:].rstrip() for line in code)[:MAX_CHARS]


def _functions_below(root: Path, one_file_in: int) -> list[Function]:
    """Functions of a folder's Python files, sorted by file; the files are read by several processes."""
    paths = sorted(path for path in root.rglob("*.py") if SKIPPED.isdisjoint(path.relative_to(root).parts))
    functions = []
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for found in pool.map(partial(_read_file, root), paths[::one_file_in], chunksize=64):
            functions += found
    return functions


def _read_file(root: Path, path: Path) -> list[Function]:
    """Functions of one file; none when it is not readable as Python."""
    module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
    try:
        return functions_of_source(path.read_text(encoding="utf-8"), module)
    except (UnicodeDecodeError, RecursionError):
        return []
