"""The examples in docstrings are true.

python -m pytest tests/test_docstring_examples.py
"""

import doctest
from importlib import import_module
from pathlib import Path

import pytest
from test_house_rules import FILES, ROOT

WITH_EXAMPLES = [path for path in FILES if "\n    >>> " in path.read_text()]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def test_most_rooms_have_examples():
    assert len(WITH_EXAMPLES) > 20


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=module_name)
def test_examples_give_what_they_say(path):
    found = doctest.testmod(import_module(module_name(path)))
    assert found.attempted > 0
    assert found.failed == 0
