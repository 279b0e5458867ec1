"""Descriptions of sources: what is refused, and in which words.

python -m pytest tests/tuples/test_sources.py
"""

import json
from dataclasses import fields
from pathlib import Path

import pytest

from tuples.sources.description import KINDS, Source, read_description

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "configs" / "sources").rglob("*.json"))
PAIRS = {"name": "x", "kind": "pairs", "files": "x.jsonl"}
TWO_WAY = PAIRS | {"kind": "classification", "labels": {"0": "bad", "1": "good"}}


def problems_of(description, folder: Path) -> list[str]:
    """What is said of a description, without its path."""
    path = folder / "source.json"
    path.write_text(description if isinstance(description, str) else json.dumps(description))
    source, problems = read_description(path)
    assert (source is None) == bool(problems)
    assert all(problem.startswith(f"{path}: ") for problem in problems)
    return [problem.removeprefix(f"{path}: ") for problem in problems]


def test_each_kind_has_a_description_without_problems(tmp_path):
    for kind in KINDS:
        description = PAIRS | {"kind": kind}
        if kind == "classification":
            description = TWO_WAY
        assert problems_of(description, tmp_path) == []


@pytest.mark.parametrize(("change", "words"), [
    ({"instrction": "x"}, "instrction: no such key; did you mean instruction?"),
    ({"kind": "cluster"}, 'kind: "cluster" is not one of pairs, nli, sts, duplicates, classification, clustering; did'),
    ({"cap": -1}, "cap: -1 is below 0"),
    ({"cap": "80000"}, 'cap: "80000" is not a whole number; leave out the quotes'),
    ({"files": []}, "files: [] is not a text or a list of texts or null"),
    ({"columns": ["a"]}, 'columns: ["a"] is not an object or null'),
    ({"columns": {"querry": "a"}}, "columns: querry: no such role; did you mean query? (pairs: query, passage, id)"),
    ({"columns": {"query": 3}}, "columns: query: must be a column's name, or a list of names"),
    ({"columns": {"id": ["a", "b"]}}, "columns: id: one column, not 2"),
    ({"files": None}, "files, hub: give one of the two"),
    ({"hub": "a/b"}, "files, hub: give one of the two"),
    ({"split": "test"}, "split: is for hub datasets, and this source has files"),
    ({"name": "a b"}, "dataset name 'a b': use 1 to 128 of"),
    ({"threshold": 4}, "threshold: is for sts, and this is pairs"),
    ({"negatives": 7}, "negatives: is for nli, clustering, and this is pairs"),
    ({"labels": {"1": "duplicate"}}, "labels: is for nli, duplicates, classification, clustering, and this is pairs"),
    ({"task": "sorting"}, 'task: "sorting" is not one of retrieval, clustering, classification'),
    ({"document_instruction_rate": 1.5, "instruction": "Find it."}, "document_instruction_rate: 1.5 is above 1"),
    ({"document_instruction_rate": 0.3}, "document_instruction_rate: needs an instruction: give one"),
    ({"instruction": "Instruct: Find it.\nQuery: "}, "instruction: 'Instruct: Find it.\\nQuery: ': must be the instr"),
    (TWO_WAY | {"document_instruction_rate": 0.3, "instruction": "Say."}, "document_instruction_rate: documents of cl"),
    (TWO_WAY | {"labels": None}, "labels: the texts of the two classes are missing"),
    (TWO_WAY | {"labels": {"0": "a", "1": "b", "2": "c"}}, "labels: two-way classification needs two texts, not 3"),
    (TWO_WAY | {"labels": {"0": "a", "1": ""}}, "labels: every value must be a text"),
    ({"kind": "clustering", "labels": {"0": "a", "1": "a"}}, "labels: all values mean the same class, so there is"),
    ({"kind": "nli", "labels": {"0": "entails"}}, "labels: 0: 'entails' is not one of entailment, neutral, contra"),
    ({"kind": "nli", "labels": {"0": "neutral"}}, "labels: no value means entailment, so there would be no tuple"),
    ({"kind": "duplicates", "labels": {"y": "duplicate"}}, "labels: no column is read for them: add \"label\" to col"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused(change, words, tmp_path):
    found = problems_of({**PAIRS, **change}, tmp_path)
    assert any(problem.startswith(words) for problem in found), found


@pytest.mark.parametrize(("text", "words"), [
    ("{", "not JSON ("), ("[]", "must be one object of keys and values"), ("{}", "kind is missing"),
])  # fmt: skip
def test_what_is_no_description_is_refused(text, words, tmp_path):
    assert problems_of(text, tmp_path)[0].startswith(words)


def test_all_problems_are_named_at_once(tmp_path):
    found = problems_of({"nme": "x", "cap": -1, "seed": "y"}, tmp_path)
    assert [problem.partition(":")[0] for problem in found] == [
        "cap",
        "kind is missing",
        "name is missing",
        "nme",
        "seed",
    ]


def test_every_key_stands_on_the_page():
    page = (ROOT / "docs" / "tuples.md").read_text()
    for field in fields(Source):
        assert f"| `{field.name}` |" in page, field.name


def test_there_are_shipped_descriptions():
    assert len(SHIPPED) > 50


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_description_parses(path):
    source, problems = read_description(path)
    assert problems == []
    assert source.name == path.stem
    assert source.exercised is False  # none could be reached where they were written
    tasks = json.loads((ROOT / "configs" / "dataset_tasks.json").read_text())
    assert source.task_of_tuples == tasks[source.name]
    assert source.instruction
