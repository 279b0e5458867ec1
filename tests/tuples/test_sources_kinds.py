"""Tuples of every kind, against plain loops over the rows.

python -m pytest tests/tuples/test_sources_kinds.py
"""

import json
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tools import build_tuples
from tuples.sources import kinds as sources_kinds
from tuples.sources import rows as sources_rows
from tuples.sources.columns import path_problems, schema_problems
from tuples.sources.description import Source
from tuples.sources.instructions import instruct


def build(folder: Path, rows: list[dict], **keys) -> tuple[list[dict], dict]:
    """The tuples that the tool makes of some rows, and its report."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "x.json").write_text(json.dumps({"name": "x", "files": "rows.jsonl", **keys}))
    status = build_tuples.main(["--source", str(folder / "x.json"), "--output_dir", str(folder / "raw")])
    assert status == 0
    report = json.loads((folder / "raw" / "x.build.json").read_text())
    assert report["rows_read"] == len(rows)
    return pq.read_table(folder / "raw" / "x.parquet").to_pylist(), report


def negatives_of(row: dict) -> list[str]:
    """A tuple's negatives; those that are missing stand last."""
    texts = [row[name] for name in row if name.startswith("negative_")]
    given = [text for text in texts if text is not None]
    assert texts[: len(given)] == given
    return given


def test_each_relevant_passage_gives_a_tuple(tmp_path):
    rows = [
        {"query": "a", "passage": ["1", "2", "1"]},
        {"query": "b", "passage": "3"},
        {"query": "c", "passage": ["", "4"]},
    ]
    tuples, report = build(tmp_path, rows, kind="pairs")
    assert [(row["query"], row["passage"]) for row in tuples] == [("a", "1"), ("a", "2"), ("b", "3"), ("c", "4")]
    assert list(tuples[0]) == ["query", "passage"]
    assert (report["task"], report["rows_used"]) == ("retrieval", 3)
    assert report["in_part"] == {"an empty passage beside others": {"rows": 1, "first": ["rows.jsonl:2"]}}


def test_columns_of_other_names_are_read_and_several_are_joined(tmp_path):
    rows = [{"q": "a", "title": "t", "body": "b"}, {"q": "c", "title": None, "body": "d"}]
    columns = {"query": "q", "passage": ["title", "body"]}
    tuples, _ = build(tmp_path, rows, kind="pairs", columns=columns)
    assert [(row["query"], row["passage"]) for row in tuples] == [("a", "t\nb"), ("c", "d")]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_values_in_objects_are_read_and_lists_are_joined_where_the_description_gives_a_list(ending, tmp_path):
    rows = [
        {"q": {"text": "a"}, "of": {"parts": ["x", "", "y"], "year": 1}},
        {"q": {"text": "b"}, "of": {"parts": ["z"], "year": 2}},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")

    def built(passage) -> list[tuple[str, str]]:
        description = {"name": "x", "kind": "pairs", "files": f"rows.{ending}"}
        description |= {"columns": {"query": "q.text", "passage": passage, "id": "of.year"}}
        (tmp_path / "x.json").write_text(json.dumps(description))
        assert build_tuples.main(["--source", str(tmp_path / "x.json"), "--output_dir", str(tmp_path / "raw")]) == 0
        tuples = pq.read_table(tmp_path / "raw" / "x.parquet").to_pylist()
        return [(row["query"], row["passage"]) for row in tuples]

    assert built(["of.parts"]) == [("a", "x\ny"), ("b", "z")]
    assert built("of.parts") == [("a", "x"), ("a", "y"), ("b", "z")]


@pytest.mark.parametrize(("rows", "refused"), [
    ([{"a": {"c": "x"}}], True),
    ([{"a": "text"}], True),
    ([{"a": {}}, {"a": None}], True),
    ([{"a": {"c": "x"}}, {"a": {"b": "x"}}], False),
    ([{"a": {"b": None}}, {"a": {}}], False),
    ([{"a": None}, "no object"], False),
    ([{"a.b": "x"}], False),
    ([], False),
])  # fmt: skip
def test_a_path_that_no_row_has_is_known_before_all_are_read(rows, refused):
    source = Source("x", "pairs", columns={"query": ["q"], "passage": ["a.b"]})
    problems = ["no column 'a.b' for passage; 'a' has none of that name"] if refused else []
    assert path_problems(iter(rows), source) == problems


def test_a_list_can_be_joined_to_a_text_and_to_no_label_score_or_id():
    schema = pa.schema([("texts", pa.list_(pa.string()))])
    columns = {"sentence1": ["texts"], "sentence2": ["texts"], "score": ["texts"], "id": ["texts"]}
    found = schema_problems(schema, Source("x", "sts", columns=columns))
    assert [problem.rpartition(" ")[2] for problem in found] == ["score", "id"]


def test_a_class_may_be_the_name_of_the_file(tmp_path):
    for name in ("cats", "dogs"):
        rows = [{"text": f"{name} {number}"} for number in range(3)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
    found = []
    for ending in ("jsonl", "parquet"):
        description = {"name": "x", "kind": "clustering", "files": f"*.{ending}", "columns": {"label": "(file)"}}
        (tmp_path / "x.json").write_text(json.dumps(description))
        assert build_tuples.main(["--source", str(tmp_path / "x.json"), "--output_dir", str(tmp_path / "raw")]) == 0
        found.append(pq.read_table(tmp_path / "raw" / "x.parquet").to_pylist())
    assert found[0] == found[1]
    assert len(found[0]) == 6
    for row in found[0]:
        own, other = row["query"][:4], {"cats": "dogs", "dogs": "cats"}[row["query"][:4]]
        assert row["passage"].startswith(own)
        assert row["passage"] != row["query"]
        assert [text[:4] for text in negatives_of(row)] == [other] * 3


def inferences(seed: int) -> list[dict]:
    """Premises with hypotheses of random labels, shuffled."""
    rng = random.Random(seed)
    rows = []
    for premise in range(40):
        for hypothesis in range(rng.randrange(1, 9)):
            text = {"premise": f"premise {premise}", "hypothesis": f"hypothesis {premise} {hypothesis}"}
            rows.append(text | {"label": rng.randrange(3)})
    rng.shuffle(rows)
    return rows


def test_a_premise_gets_an_entailed_hypothesis_and_its_other_ones_as_negatives(tmp_path):
    rows = inferences(0)
    tuples, report = build(tmp_path, rows, kind="nli", negatives=4)
    entailed, others, order = {}, {}, []
    for row in rows:
        group = entailed if row["label"] == 0 else others
        group.setdefault(row["premise"], []).append(row["hypothesis"])
    for row in rows:
        if row["premise"] in entailed and row["premise"] not in order:
            order.append(row["premise"])
    assert 5 < len(order) < 40
    assert [row["query"] for row in tuples] == order
    is_first = []
    for row in tuples:
        assert row["passage"] in entailed[row["query"]]
        is_first.append(row["passage"] == entailed[row["query"]][0])
        wanted = others.get(row["query"], [])
        found = negatives_of(row)
        assert len(found) == min(4, len(wanted))
        assert [text for text in wanted if text in found] == found  # in their order, each once
    assert {True, False} == set(is_first)  # drawn
    without = sum(row["premise"] not in entailed for row in rows)
    assert report["left_out"]["its premise has no entailed hypothesis"]["rows"] == without > 0
    assert report["negatives"] == 4


def test_a_scored_pair_gives_a_tuple_in_each_direction(tmp_path):
    rows = [{"sentence1": f"a{score}", "sentence2": f"b{score}", "score": score} for score in (5, 3.99, "4.0", 0)]
    tuples, report = build(tmp_path, rows, kind="sts")
    assert [(row["query"], row["passage"]) for row in tuples] == [
        ("a5", "b5"),
        ("b5", "a5"),
        ("a4.0", "b4.0"),
        ("b4.0", "a4.0"),
    ]
    assert report["left_out"] == {"a score below 4": {"rows": 2, "first": ["rows.jsonl:1", "rows.jsonl:3"]}}
    tuples, _ = build(tmp_path, rows, kind="sts", threshold=3.5, both_directions=False)
    assert [row["query"] for row in tuples] == ["a5", "a3.99", "a4.0"]


def test_only_the_pairs_labelled_as_duplicates_are_used(tmp_path):
    rows = [{"sentence1": f"a{n}", "sentence2": f"b{n}", "is": n % 2 == 0} for n in range(4)]
    rows.append({"sentence1": "b0", "sentence2": "a0", "is": True})  # the first one turned round
    tuples, report = build(tmp_path, rows, kind="duplicates", columns={"label": "is"})
    assert [(row["query"], row["passage"]) for row in tuples] == [("a0", "b0"), ("a2", "b2")]
    assert {rule: found["rows"] for rule, found in report["left_out"].items()} == {
        "labelled different": 2, "texts that came before": 1,
    }  # fmt: skip
    tuples, _ = build(tmp_path, rows, kind="duplicates")  # no column of labels: all are
    assert len(tuples) == 4


def test_two_way_classification_has_the_label_texts(tmp_path):
    rows = [{"text": f"t{n}", "label": n % 3} for n in range(6)]
    labels = {"0": "It is bad.", "1": "It is good.", "2": "It is good."}
    tuples, report = build(tmp_path, rows, kind="classification", labels=labels)
    for row, made in zip(rows, tuples, strict=True):
        own = labels[str(row["label"])]
        assert made == {"query": row["text"], "passage": own, "negative_1": ({*labels.values()} - {own}).pop()}
    assert (report["task"], report["negatives"]) == ("classification", 1)


def test_classes_give_another_text_of_the_class_and_texts_of_other_classes(tmp_path):
    rng = random.Random(1)
    rows = [{"text": f"t{n}", "label": rng.choice("aaab") + rng.choice("xyz")} for n in range(400)]
    tuples, report = build(tmp_path, rows, kind="clustering")
    class_of = {row["text"]: row["label"] for row in rows}
    assert [row["query"] for row in tuples] == [row["text"] for row in rows]
    for row in tuples:
        own = class_of[row["query"]]
        assert class_of[row["passage"]] == own
        assert row["passage"] != row["query"]
        found = negatives_of(row)
        assert len(set(found)) == len(found) == 24
        assert own not in {class_of[text] for text in found}
    drawn = Counter(row["passage"] for row in tuples)
    assert max(drawn.values()) < 8  # 400 draws, one expected for each text
    assert report["tuples_with_fewer_negatives"] == 0


def test_few_texts_give_few_negatives_and_are_counted(tmp_path):
    rows = [{"text": f"t{n}", "label": min(n, 8) // 4} for n in range(9)] + [{"text": "alone", "label": 7}]
    tuples, report = build(tmp_path, rows[:8], kind="clustering")
    for row in tuples:
        assert sorted(negatives_of(row)) == sorted(r["text"] for r in rows[:8] if r["label"] != (row["query"] > "t3"))
    assert (report["negatives"], report["tuples_with_fewer_negatives"]) == (4, 8)


@pytest.mark.parametrize(("count", "wanted"), [(3, 24), (24, 24), (90, 24), (97, 24), (10**9, 24), (1, 1)])
def test_draws_are_distinct_and_below_the_count(count, wanted):
    rng = np.random.RandomState(0)
    for _ in range(20):
        drawn = sources_kinds.draw_distinct(rng, count, wanted)
        assert len(set(drawn.tolist())) == len(drawn) == min(count, wanted)
        assert 0 <= drawn.min() <= drawn.max() < count
    assert sorted(sources_kinds.draw_distinct(rng, wanted, wanted)) == list(range(wanted))


def test_every_candidate_is_drawn_as_often():
    rng = np.random.RandomState(0)
    counts = np.bincount(np.concatenate([sources_kinds.draw_distinct(rng, 100, 20) for _ in range(2000)]))
    assert len(counts) == 100
    assert np.abs(counts - 400).max() < 5 * 20  # binomial: 2000 x 0.2 = 400, deviation 18


def test_the_cap_draws_the_rows_that_pandas_would(tmp_path):
    pandas = pytest.importorskip("pandas")
    rows = [{"query": f"q{n}", "passage": f"p{n}"} for n in range(50)]
    for seed in (42, 7):
        tuples, report = build(tmp_path, rows, kind="pairs", cap=20, seed=seed)
        expected = pandas.DataFrame(rows).sample(n=20, random_state=seed).sort_index()
        assert [row["query"] for row in tuples] == expected["query"].tolist()
        assert (report["rows_used"], report["tuples_left_out_by_the_cap"]) == (50, 30)


def test_a_share_of_documents_carries_the_instruction(tmp_path):
    rows = [{"text": f"t{n}", "label": n % 5} for n in range(200)]
    keys = {"kind": "clustering", "instruction": "Name the class.", "document_instruction_rate": 0.3}
    tuples, report = build(tmp_path, rows, **keys)
    bare, _ = build(tmp_path, rows, kind="clustering")
    prompt = "Instruct: Name the class.\nQuery: "
    documents = 0
    for row, plain in zip(tuples, bare, strict=True):
        assert row["query"] == prompt + plain["query"]
        for name in row:
            assert row[name].removeprefix(prompt) == plain[name]  # the same draws
            documents += name != "query" and row[name].startswith(prompt)
    assert documents == report["documents_with_instruction"]
    assert abs(documents - 0.3 * 200 * 25) < 5 * 32.4  # binomial: sqrt(5000 x 0.3 x 0.7)


def test_a_text_that_carries_an_instruction_keeps_its_own():
    own = "Instruct: Mine.\nQuery: x"
    (queries, documents), prompted = instruct([[own, "y"], [own, None]], "Other.", 1.0, np.random.RandomState(0))
    assert queries == [own, "Instruct: Other.\nQuery: y"]
    assert (documents, prompted) == ([own, None], 0)


def test_texts_are_found_whatever_piece_they_lie_in(tmp_path):
    """Texts of many pieces, some of them empty, equal those of one."""
    from tuples.sources.description import Source

    source = Source(name="x", kind="pairs", files="x")
    rows = [(n, {"query": f"q{n} ä", "passage": f"p{n}"}) for n in range(10)]
    cuts = [0, 3, 3, 4, 10, 10]
    folders = []
    for number, (begin, end) in enumerate(pairwise(cuts)):
        folders.append(tmp_path / str(number))
        sources_rows.write_piece(folders[-1], rows[begin:end], source, 0, "x", {})
    found = sources_rows.Rows(folders)
    texts = [text for n in range(10) for text in (f"q{n} ä", f"p{n}")]
    numbers = np.array([19, 0, -1, 6, 7, 5, 8])
    assert found.texts(numbers) == [None if n < 0 else texts[n] for n in numbers]
    assert found.source_rows.tolist() == list(range(10))
