"""The descriptions in configs/sources, each run unchanged on a few made rows that have its columns.

The rows stand for data that no test may reach. They show that a description does what it says: which rows it uses,
what its queries look like, which task its tuples have. That the real data have these columns they cannot show.

python -m pytest tests/tools/test_shipped_sources.py
"""

import gzip
import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tools import build_tuples
from tuples.sources import reading
from tuples.sources.description import FILE, KINDS, Source, read_description

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "configs" / "sources"
SHIPPED = sorted(SOURCES.rglob("*.json"))
LABELS = {"nli": ["0", "1", "2"], "duplicates": ["1", "0"]}  # of descriptions that give no table
TUPLES = {  # of six rows: those of each kind that `rows_of` makes
    "pairs": 6,
    "nli": 2,  # of two premises, each with one entailed hypothesis
    "sts": 6,  # three pairs reach the threshold, in both directions
    "duplicates": 6,
    "classification": 6,
    "clustering": 6,
}


def rows_of(source: Source) -> list[dict]:
    """Six rows with the columns of a description, and with all of its labels."""
    labels = list(source.labels or []) or LABELS.get(source.kind, ["a", "b"])
    rows = []
    for number in range(6):
        row = {}
        for role, columns in source.columns_of.items():
            for column in columns:
                put(row, column, value_of(source, role, column, number, labels))
        rows.append(row)
    return rows


def value_of(source: Source, role: str, column: str, number: int, labels: list[str]):
    """What row `number` holds in a column."""
    if role == "label":
        return labels[number % len(labels)]
    if role == "score":
        return source.threshold - number % 2
    if role == "premise":
        return f"premise {number // 3}"
    if source.joins(role) and len(source.columns_of[role]) == 1:
        return [f"{column} {number}", f"more {number}"]  # a column of lists, or there would be nothing to join
    return f"{column} {number}"


def put(row: dict, column: str, value) -> None:
    """Put a value into a row; "a.b" is b of the object a."""
    *outer, name = column.split(".")
    for key in outer:
        row = row.setdefault(key, {})
    row[name] = value


def tuples_expected(source: Source) -> int:
    """Tuples of these rows."""
    if source.kind == "duplicates" and "label" in source.columns_of:
        return 3 * (1 + source.turns_pairs)  # every second row is labelled different
    return TUPLES[source.kind]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Raw tuples of all descriptions, built by one command."""
    folder = tmp_path_factory.mktemp("sources")
    shutil.copytree(SOURCES, folder / "sources")
    of_hub = {}
    for path in sorted((folder / "sources").rglob("*.json")):
        source, _ = read_description(path)
        if source.hub is None:
            write_files(path.parent, source)
        elif source.layout:
            of_hub |= judged_tables(source)
        else:
            rows = rows_of(source)
            share = -(-len(rows) // len(source.splits))  # of each split, so that all of them are read
            for number, split in enumerate(source.splits):
                of_hub[source.name, source.config, split] = rows[number * share : (number + 1) * share]

    def open_hub(source: Source, split: str, config: str | None = None) -> list[dict]:
        return of_hub[source.name, config or source.config, split]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "_open_hub", open_hub)
        paths = map(str, sorted((folder / "sources").rglob("*.json")))
        assert build_tuples.main(["--source", *paths, "--output_dir", str(folder / "raw")]) == 0
    return folder / "raw"


def judged_tables(source: Source) -> dict[tuple, list[dict]]:
    """The three tables of a judged source, by name, configuration and split."""
    rows = rows_of(source)
    ids = [f"id {number}" for number in range(len(rows))]
    texts = [{"_id": name, "text": row["query"]} for name, row in zip(ids, rows, strict=True)]
    documents = [{"_id": name, "title": row["title"], "text": row["text"]} for name, row in zip(ids, rows, strict=True)]
    judgements = [{"query-id": name, "corpus-id": name, "score": 1.0} for name in ids]
    return {
        (source.name, "queries", "queries"): texts,
        (source.name, "corpus", "corpus"): documents,
        (source.name, "default", source.split): judgements,
    }


def write_files(folder: Path, source: Source) -> None:
    """The rows of a source of files, as files that fit its pattern: one for each label where the file is the label."""
    parts = {"some": rows_of(source)}
    if FILE in source.columns_of.get("label", []):
        parts = {name: [row for row in parts["some"] if row[FILE] == name] for name in ("a", "b")}
    for name, rows in parts.items():
        path = folder / source.files.replace("*", name)
        path.parent.mkdir(exist_ok=True)
        text = "".join(json.dumps(row | {FILE: "not read"}) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_description_gives_its_tuples(path, built):
    source, problems = read_description(path)
    assert problems == []
    table = pq.read_table(built / f"{source.name}.parquet").to_pylist()
    assert len(table) == tuples_expected(source)
    assert all(row["query"].startswith(f"Instruct: {source.instruction}\nQuery: ") for row in table)
    assert not any(row["passage"].startswith("Instruct: ") for row in table)
    if source.kind == "classification":
        assert {row["passage"] for row in table} == set(source.labels.values())
        assert all({row["passage"], row["negative_1"]} == set(source.labels.values()) for row in table)
    if source.kind == "clustering":
        assert all(row["negative_1"] != row["passage"] for row in table)
    for role in KINDS[source.kind].columns[: 1 if source.kind in ("classification", "clustering") else 2]:
        texts = "\n".join(row["query"] + "\n" + row["passage"] for row in table)
        for column in source.columns_of[role]:
            assert role == "premise" or f"{column} 0" in texts  # every column that is named is read


def test_the_tasks_are_the_published_ones(built):
    published = json.loads((ROOT / "configs" / "dataset_tasks.json").read_text())
    tasks = json.loads((built / "tasks.json").read_text())
    assert tasks == {path.stem: published[path.stem] for path in SHIPPED}
