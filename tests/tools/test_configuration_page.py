"""The page of all keys is what the code says.

python -m pytest tests/tools/test_configuration_page.py
"""

from dataclasses import fields
from pathlib import Path

import arguments
from configuration.dataset_settings import KEYS
from tools import configuration_page

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_the_page_in_docs_is_the_one_of_this_code():
    printed = configuration_page.page() + "\n"
    assert PAGE.read_text(encoding="utf-8") == printed, "python -m tools.configuration_page > docs/configuration.md"


def test_every_key_stands_once_below_its_group():
    _, *sections, settings = configuration_page.page().split("\n## ")
    found = []
    for section in sections:
        group, _, table = section.partition("\n")
        rows = [row for row in table.splitlines() if row.startswith("| `")]
        found += [(group, row.split("`")[1]) for row in rows]
    assert sorted(found) == sorted((key.metadata["group"], key.name) for key in fields(arguments.Args))
    assert [line.split("`")[1] for line in settings.splitlines() if line.startswith("| `")] == list(KEYS)
    assert [section.partition("\n")[0] for section in sections] == [
        line.removesuffix(":") for line in arguments.help_text().splitlines() if line.endswith(":")
    ]


def test_rows_have_four_cells():
    rows = [line for line in configuration_page.page().splitlines() if line.startswith("|")]
    assert len(rows) > 50
    assert {row.count("|") for row in rows} == {5}
