"""The walls of the house, read from the source: which room may import which, and how large a room may grow.

python -m pytest tests/test_house_rules.py

Functions that are too involved are refused by ruff, whose limits stand in pyproject.toml.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {  # room -> the rooms that it may import, lowest first; a room is a folder, or a file at the root
    "utils": set(),
    "losses": set(),
    "modeling": {"utils"},
    "configuration": {"utils"},
    "arguments": {"configuration", "utils"},
    "data": {"modeling", "utils"},
    "runtime": {"utils"},
    "model": {"modeling", "utils"},
    "export": {"modeling", "model", "utils"},
    "retrieval": {"modeling", "model", "utils"},
    "tuples": {"configuration", "modeling", "model", "data", "retrieval", "utils"},
    "training": {
        "utils",
        "losses",
        "modeling",
        "configuration",
        "arguments",
        "data",
        "runtime",
        "model",
        "export",
        "retrieval",
    },
}
DOORS = {"run", "tokenize_data_qwen", "tools", "benchmarks", "examples"}  # may import any room; no room imports them
PACKAGES = {  # room -> the packages that it may import, where fewer are better
    "losses": {"torch"},
    "utils": set(),
    "configuration": set(),
    "arguments": set(),
    "model": {"numpy", "torch", "transformers"},
    "data": {"filelock", "numpy", "pyarrow", "torch", "tqdm"},
}
LISTING = ["git", "ls-files", "-co", "--exclude-standard", "*.py"]
TRACKED = subprocess.run(LISTING, cwd=ROOT, capture_output=True, text=True)
FILES = sorted(path for name in TRACKED.stdout.split() if (path := ROOT / name).exists())


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


IN_ROOMS = [path for path in FILES if room_of(path) in MAY_IMPORT]


def imports(tree: ast.AST) -> set[str]:
    """Top-level names of everything that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.partition(".")[0])
    return found


def code_lines(function: ast.AST, source: str) -> int:
    """Lines of a function without its docstring; comments and blank lines, which help to read it, cost nothing."""
    lines = source.splitlines()[function.lineno - 1 : function.end_lineno]
    count = sum(1 for line in lines if line.strip() and not line.strip().startswith("#"))
    if ast.get_docstring(function):
        docstring = function.body[0]
        text = source.splitlines()[docstring.lineno - 1 : docstring.end_lineno]
        count -= sum(1 for line in text if line.strip())
    return count


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_every_file_has_a_room():
    assert {room_of(path) for path in FILES} == {*MAY_IMPORT, *DOORS, "tests"}
    assert len(IN_ROOMS) > 20


@pytest.mark.parametrize("path", [path for path in IN_ROOMS if path.name == "__init__.py"], ids=name)
def test_a_room_lists_its_files(path):
    listed = re.findall(r"^ *(\w+\.py) ", ast.get_docstring(ast.parse(path.read_text())), re.MULTILINE)
    assert sorted(listed) == sorted(other.name for other in path.parent.glob("*.py") if other != path)


def test_the_layers_have_no_circle():
    lower = set()
    for room, below in MAY_IMPORT.items():
        assert below <= lower, f"{room} may import {below - lower}, which stand above it"
        lower.add(room)


@pytest.mark.parametrize("path", IN_ROOMS, ids=name)
def test_a_room_imports_only_rooms_below_it(path):
    room, found = room_of(path), imports(ast.parse(path.read_text()))
    assert found & {*MAY_IMPORT, *DOORS} <= MAY_IMPORT[room] | {room}
    if room in PACKAGES:
        others = found - set(sys.stdlib_module_names) - set(MAY_IMPORT)
        assert others <= PACKAGES[room]


@pytest.mark.parametrize("path", IN_ROOMS, ids=name)
def test_a_room_does_nothing_on_import_and_has_no_main(path):
    tree = ast.parse(path.read_text())
    allowed = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign
    for node in tree.body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        assert is_docstring or isinstance(node, allowed), f"{path.name}:{node.lineno} runs on import"
    assert "main" not in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_the_configuration_stops_where_a_run_is_put_together():
    takers = set()
    for path in IN_ROOMS:
        functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
        if {argument.arg for function in functions for argument in function.args.args} & {"args", "config_dict"}:
            takers.add(name(path))
    assert takers == {
        "arguments.py",
        "training/activations.py",
        "training/advice.py",
        "training/continuing.py",
        "training/identity.py",
        "training/models.py",
        "training/preflight.py",
        "training/recipes.py",
        "training/setup.py",
        "training/steps.py",
    }


def test_training_from_a_token_store_needs_no_datasets():
    rooms = [path for path in IN_ROOMS if room_of(path) in {"training", *MAY_IMPORT["training"]}]
    assert len(rooms) > 20
    for path in [*rooms, ROOT / "run.py", ROOT / "tokenize_data_qwen.py"]:
        assert "datasets" not in imports(ast.parse(path.read_text())), f"{path.name} imports datasets"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_files_are_small_and_labelled(path):
    source = path.read_text()
    tree = ast.parse(source)
    assert ast.get_docstring(tree), "a module without a docstring"
    in_tests = room_of(path) == "tests"
    assert in_tests or len(source.splitlines()) <= 350
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    for scope in (tree, *classes):
        for node in scope.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                labelled = node.name.startswith("_") or in_tests or ast.get_docstring(node)
                assert labelled, f"{path.name}:{node.lineno} {node.name} has no docstring"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            limit = 100 if node.name == "train" else 60  # the loop may be long
            count = code_lines(node, source)
            assert count <= limit, f"{path.name}:{node.lineno} {node.name} has {count} lines"


def test_nothing_is_unpickled_and_no_remote_code_is_trusted():
    forbidden = ("pickle.load", "torch.load", "allow_pickle=True", "trust_remote_code=True", "weights_only=False")
    for path in FILES:
        if path != Path(__file__):
            assert not [word for word in forbidden if word in path.read_text()], path.name
