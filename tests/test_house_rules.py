"""The walls of the house, read from the source: who may import whom, and how large a room may grow.

python -m pytest tests/test_house_rules.py

Verbs are scripts with a main(), never imported by the code; nouns have no main(), do nothing on import and never
import a verb. The arrows between nouns are listed here, all of them.
"""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
VERBS = {"run", "tokenize_data_qwen"}
ARROWS = {  # noun -> nouns
    "data": {"token_store", "plan"},
    "arguments": {"disk", "values"},
    "token_store": {"disk"},
    "store_writer": {"disk", "token_store"},
    "published": {"token_store", "store_writer"},
    "cache": {"token_store", "published"},
    "model_folder": {"disk", "tokenizer"},
    "checkpoint": {"disk"},
    "tokenizer": {"hub"},
    "backbone": {"hub"},
    "preflight": {"arguments", "backbone", "cache", "engine", "plan", "schedule", "token_store", "tokenizer"},
    "resume": {"checkpoint", "utils"},
    "model": {"attention"},
    "fusion": {"attention", "model"},
    "memory": {"model"},
    "objective": {"losses", "data", "utils"},
    "bounded": {"data"},
    "assemble": {
        "arguments",
        "backbone",
        "data",
        "engine",
        "fusion",
        "losses",
        "memory",
        "model",
        "objective",
        "plan",
        "preflight",
        "resume",
        "schedule",
        "token_store",
        "utils",
    },
}
OUTSIDE = {  # noun -> the packages it may import besides the standard library
    "losses": {"torch"},
    "bounded": {"torch", "accelerate"},
    "model": {"numpy", "torch", "transformers"},
    "token_store": {"numpy"},
    "arguments": set(),
    "values": set(),
    "fusion": {"numpy", "torch", "transformers"},
    "memory": {"numpy", "torch"},
    "plan": {"numpy"},
    "data": {"numpy", "torch"},
    "cache": {"filelock"},
    "published": {"numpy", "tqdm", "pyarrow"},
    "store_writer": {"numpy"},
    "schedule": set(),
    "hub": set(),
    "disk": set(),
    "checkpoint": {"torch", "safetensors"},
    "objective": {"torch"},
}
LISTING = ["git", "ls-files", "-co", "--exclude-standard", "*.py"]
TRACKED = subprocess.run(LISTING, cwd=ROOT, capture_output=True, text=True)
FILES = sorted(path for name in TRACKED.stdout.split() if (path := ROOT / name).exists())
NOUNS = sorted(path.stem for path in ROOT.glob("*.py") if path.stem not in VERBS)
STANDARD = set(__import__("sys").stdlib_module_names)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.partition(".")[0])
    return found


def is_definition(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef | ast.ClassDef)


def lines(node: ast.AST) -> int:
    """Code lines of a function: without its docstring, comments and empty lines do count."""
    docstring = node.body[0] if ast.get_docstring(node) else None
    return node.end_lineno - node.lineno + 1 - (docstring.end_lineno - docstring.lineno + 1 if docstring else 0)


def test_there_are_files_to_check():
    assert len(FILES) > 20
    assert {"losses", "data", "model", "token_store", "utils", "arguments"} <= set(NOUNS)


@pytest.mark.parametrize("noun", NOUNS)
def test_nouns_import_no_verb_and_only_the_listed_nouns(noun):
    found = imports(ROOT / f"{noun}.py")
    assert not found & VERBS
    assert found & set(NOUNS) == ARROWS.get(noun, set())
    if noun in OUTSIDE:
        assert found - STANDARD - set(NOUNS) <= OUTSIDE[noun]


@pytest.mark.parametrize("noun", NOUNS)
def test_nouns_do_nothing_on_import_and_take_no_args(noun):
    tree = ast.parse((ROOT / f"{noun}.py").read_text())
    allowed = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign
    for node in tree.body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        assert is_docstring or isinstance(node, allowed), f"{noun}.py:{node.lineno} runs on import"
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert "main" not in {function.name for function in functions}
    if noun not in ("arguments", "preflight", "assemble"):  # configuration stops at the door
        assert not {argument.arg for function in functions for argument in function.args.args} & {"args", "config_dict"}


def test_accelerate_stays_at_the_door():
    users = {path.stem for path in ROOT.glob("*.py") if "accelerate" in imports(path)}
    assert users == {"assemble", "bounded", "engine", "resume", "utils"}


def test_training_from_a_token_store_needs_no_datasets():
    for path in ROOT.glob("*.py"):
        top = {name for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)
               for name in [getattr(node, "module", None) or node.names[0].name]}  # fmt: skip
        assert "datasets" not in top, f"{path.name} imports datasets at the top"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_are_small_and_labelled(path):
    source = path.read_text()
    tree = ast.parse(source)
    assert ast.get_docstring(tree), "a module without a docstring"
    in_tests = "tests" in path.parts
    assert in_tests or len(source.splitlines()) <= 350
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    public = [node for scope in (tree, *classes) for node in scope.body if is_definition(node)]
    for node in public:
        labelled = node.name.startswith("_") or in_tests or ast.get_docstring(node)
        assert labelled, f"{path.name}:{node.lineno} {node.name} has no docstring"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            limit = 100 if node.name == "train" else 60  # the loop may be long
            assert lines(node) <= limit, f"{path.name}:{node.lineno} {node.name} has {lines(node)} lines"


def test_most_functions_are_short():
    nodes = [node for path in ROOT.glob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    sizes = sorted(lines(node) for node in nodes if isinstance(node, ast.FunctionDef))
    assert sizes[len(sizes) // 2] <= 11
    assert sizes[int(len(sizes) * 0.9)] <= 32


def test_nothing_is_unpickled_and_no_remote_code_is_trusted():
    forbidden = ("pickle.load", "torch.load", "allow_pickle=True", "trust_remote_code=True", "weights_only=False")
    for path in FILES:
        if path != Path(__file__):
            assert not [word for word in forbidden if word in path.read_text()], path.name
