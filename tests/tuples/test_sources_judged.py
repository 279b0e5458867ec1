"""Sources of three tables: queries, documents and judgements, in a folder and as a hub dataset.

python -m pytest tests/tuples/test_sources_judged.py
"""

import json
import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tools import build_tuples
from tuples.sources import judged

QUERIES = [{"_id": f"q{number}", "text": f"question {number}"} for number in range(12)]
CORPUS = [
    {"_id": f"d{number}", "title": f"title {number}" * (number % 2), "text": f"text {number}"} for number in range(30)
]
README = """---
configs:
- config_name: queries
  data_files: [{split: queries, path: queries.jsonl}]
- config_name: corpus
  data_files: [{split: corpus, path: corpus.jsonl}]
- config_name: default
  data_files: [{split: train, path: qrels/train.jsonl}, {split: dev, path: qrels/dev.jsonl}]
---
"""


def judgements(seed: int, count: int) -> list[tuple[str, str, int]]:
    """Query, document and score, some of which give no pair."""
    rng = random.Random(seed)
    found = []
    for query, document in rng.sample([(q, d) for q in range(14) for d in range(33)], count):
        found.append((f"q{query}", f"d{document}", rng.choice([0, 1, 1, 2])))
    return found


def write_lines(path: Path, rows: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def write_set(folder: Path, splits: dict[str, list]) -> None:
    """A set in BEIR's layout that `datasets` can load too."""
    write_lines(folder / "queries.jsonl", QUERIES)
    write_lines(folder / "corpus.jsonl", CORPUS)
    (folder / "README.md").write_text(README)
    for split, judged_pairs in splits.items():
        lines = ["query-id\tcorpus-id\tscore", *("\t".join(map(str, pair)) for pair in judged_pairs)]
        write_lines(folder / "qrels" / f"{split}.tsv", lines)
        rows = [{"query-id": query, "corpus-id": document, "score": score} for query, document, score in judged_pairs]
        write_lines(folder / "qrels" / f"{split}.jsonl", rows)


def build(folder: Path, **keys) -> int:
    """Build a source that is described so; returns the exit status."""
    path = folder / "x.json"
    path.write_text(json.dumps({"name": "x", "kind": "pairs", "layout": "beir"} | keys))
    return build_tuples.main(["--source", str(path), "--output_dir", str(folder / "raw")])


def test_judgements_become_pairs_and_those_that_give_none_are_counted(tmp_path):
    splits = {"train": judgements(0, 60), "dev": judgements(1, 20)}
    write_set(tmp_path / "set", splits)
    expected, left_out = [], {judged.NO_ANSWER: [], judged.NO_QUERY: [], judged.NO_DOCUMENT: []}
    texts = {row["_id"]: row["text"] for row in QUERIES}
    documents = {row["_id"]: "\n".join(filter(None, [row["title"], row["text"]])) for row in CORPUS}
    for number, (query, document, score) in enumerate(splits["train"] + splits["dev"]):
        if score == 0:
            left_out[judged.NO_ANSWER].append(number)
        elif query not in texts:
            left_out[judged.NO_QUERY].append(number)
        elif document not in documents:
            left_out[judged.NO_DOCUMENT].append(number)
        elif (texts[query], documents[document]) not in expected:  # a pair of both splits is one
            expected.append((texts[query], documents[document]))
    assert all(left_out.values())
    assert len(expected) > 20
    for keys in ({"files": "set"}, {"hub": str(tmp_path / "set")}):
        if "hub" in keys:
            pytest.importorskip("datasets")
        assert build(tmp_path, **keys, split=["train", "dev"]) == 0
        tuples = pq.read_table(tmp_path / "raw" / "x.parquet").to_pylist()
        assert [(row["query"], row["passage"]) for row in tuples] == expected
        report = json.loads((tmp_path / "raw" / "x.build.json").read_text())
        for rule, numbers in left_out.items():
            assert report["left_out"][rule]["rows"] == len(numbers)
            assert [int(name.rpartition(":")[2]) for name in report["left_out"][rule]["first"]] == numbers[:10]
        assert report["rows_read"] == 80


@pytest.mark.parametrize(("keys", "words"), [
    ({"files": "set", "split": "test"}, "qrels/test.tsv is missing"),
    ({"files": "nowhere"}, "files: nowhere: no such file"),
    ({"files": "set", "kind": "sts"}, "layout: queries with judged documents are pairs, and this is sts"),
    ({"files": ["set"]}, "files: must be one folder for the layout beir, not a list"),
    ({"files": "set", "columns": {"query": "q"}}, "no column 'q' for query"),
    ({"hub": "a/b", "config": "en"}, "config: the layout beir has a configuration for each table"),
])  # fmt: skip
def test_what_cannot_be_joined_is_refused(keys, words, tmp_path, capsys):
    write_set(tmp_path / "set", {"train": judgements(0, 9)})
    assert build(tmp_path, **keys) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "raw").exists()


@pytest.mark.parametrize(("file", "text", "words"), [
    ("corpus.jsonl", '{"id": "d0", "text": "a"}\n', "corpus.jsonl: no column '_id'; the columns are id, text"),
    ("queries.jsonl", "", "queries.jsonl: the file has no rows"),
    ("qrels/train.tsv", "q0\t0\td0\t1\nq1\t0\td1\t1\n", "no column 'query-id'; the columns are q0, 0, d0, 1"),
])  # fmt: skip
def test_a_table_without_its_columns_is_refused(file, text, words, tmp_path, capsys):
    write_set(tmp_path / "set", {"train": judgements(0, 9)})
    (tmp_path / "set" / file).write_text(text)
    assert build(tmp_path, files="set") == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "raw" / "x.parquet").exists()


def test_judgements_that_end_in_a_broken_field_are_refused_and_not_used_in_part(tmp_path, capsys):
    write_set(tmp_path / "set", {"train": judgements(0, 60)})
    path = tmp_path / "set" / "qrels" / "train.tsv"
    path.write_text(path.read_text() + '"q1\td1\t1\n')
    assert build(tmp_path, files="set") != 0
    assert "set: train.tsv: row 60 (counted from 0) cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "raw" / "x.parquet").exists()


def test_judgements_that_are_none_are_named():
    rows = enumerate([{"query-id": "q0", "corpus-id": "d0", "score": "much"}, {"query-id": "q0"}, "is not JSON"])
    assert list(judged.joined([], [], rows)) == [(0, judged.NO_JUDGEMENT), (1, judged.NO_JUDGEMENT), (2, "is not JSON")]
