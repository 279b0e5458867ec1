"""Every tool explains itself and refuses what it cannot use, as a module and as a file, from any folder.

python -m pytest tests/tools/test_doors.py
"""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("*.py") if path.stem != "__init__")

pytestmark = pytest.mark.processes


def run(words: list, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, words)], cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize("name", TOOLS)
def test_help_is_printed(name):
    done = run(["-m", f"tools.{name}", "--help"], ROOT)
    assert done.returncode == 0, done.stderr
    assert f"usage: python -m tools.{name}" in done.stdout
    assert "--help" in done.stdout


@pytest.mark.parametrize("name", TOOLS)
def test_a_tool_runs_as_a_file_from_any_folder(name, tmp_path):
    done = run([ROOT / "tools" / f"{name}.py", "--help"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"usage: python -m tools.{name}" in done.stdout


@pytest.mark.parametrize("name", TOOLS)
def test_flag_types_that_a_tool_does_not_know_are_refused(name, capsys):
    tool = importlib.import_module(f"tools.{name}")
    with pytest.raises(SystemExit) as refused:
        tool.main(["--no_such_flag", "x", "y", "z"])
    assert refused.value.code == 2
    assert "--no_such_flag" in capsys.readouterr().err
