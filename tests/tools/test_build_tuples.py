"""The tool that builds raw tuples: bad input is named and counted, and parts are joined to the same bytes.

python -m pytest tests/tools/test_build_tuples.py
"""

import csv
import gzip
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import contents

from tools import build_tuples
from tuples.sources import reading as sources_reading


def describe(folder: Path, files, **keys) -> Path:
    """A description of `files` beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    description = {"name": "x", "kind": "pairs", "files": files} | keys
    path = folder / f"{description['name']}.json"
    path.write_text(json.dumps({key: value for key, value in description.items() if value is not None}))
    return path


def lines(path: Path, rows: list) -> None:
    """Rows as JSON lines; bytes stay as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows))


def build(output: Path, *descriptions: Path, more: tuple = ()) -> int:
    return build_tuples.main(["--source", *map(str, descriptions), "--output_dir", str(output), *more])


def report_of(output: Path, name: str = "x") -> dict:
    """A report; every row that was read is used, or left out by one rule."""
    report = json.loads((output / f"{name}.build.json").read_text())
    assert report["rows_read"] == report["rows_used"] + sum(found["rows"] for found in report["left_out"].values())
    return report


def pairs(count: int) -> list[dict]:
    return [{"query": f"q{n} ä", "passage": f"p{n}"} for n in range(count)]


# ------------------------------------------------------------------------------------- rows that are bad


def test_each_rule_names_and_counts_its_rows(tmp_path, capsys):
    long = {"query": "long", "passage": "x" * 2**20}
    rows = [
        *pairs(2), {"query": None, "passage": "p"}, {"query": "q", "passage": " \n"}, {"passage": "p"},
        {"query": 3, "passage": "p"}, {"query": "same", "passage": "same"}, b'{"query": "\xe9", "passage": "p"}',
        b'{"query": ', b"[1]", b'{"query": "\\ud800", "passage": "p"}', {"query": "q0 \u00e4", "passage": "p0"}, long,
    ]  # fmt: skip
    lines(tmp_path / "a.jsonl", rows)
    assert build(tmp_path / "raw", describe(tmp_path, "a.jsonl")) == 0
    report = report_of(tmp_path / "raw")
    found = {rule: counted["first"] for rule, counted in report["left_out"].items()}
    assert found == {
        "query is empty": ["a.jsonl:2", "a.jsonl:4"],
        "passage is empty": ["a.jsonl:3"],
        "query is no text": ["a.jsonl:5"],
        "a passage that is its query": ["a.jsonl:6"],
        "is not UTF-8: save the file as UTF-8": ["a.jsonl:7"],
        "is not JSON (Expecting value): fix it, and check again": ["a.jsonl:8"],
        "is not an object of column names and values": ["a.jsonl:9"],
        "query is not UTF-8": ["a.jsonl:10"],
        "texts that came before": ["a.jsonl:11"],
    }
    assert report["left_out"]["query is no text"]["values"] == ["3"]
    assert report["in_part"] == {"a text cut to 100,000 characters": {"rows": 1, "first": ["a.jsonl:12"]}}
    tuples = pq.read_table(tmp_path / "raw" / "x.parquet").to_pylist()
    assert [row["query"] for row in tuples] == ["q0 ä", "q1 ä", "long"]
    assert tuples[-1]["passage"] == "x" * 100_000
    printed = capsys.readouterr().out
    for rule in (*found, "a text cut to 100,000 characters"):
        assert rule in printed
    assert "left out: 2 rows: query is empty (a.jsonl:2, a.jsonl:4)" in printed


@pytest.mark.parametrize("kind", ["nli", "classification", "clustering"])
def test_labels_that_cannot_be_used_are_counted(kind, tmp_path):
    labels = [0, 1, 0, 1, None, "", -1, "7", float("nan"), 0, 1]
    texts = [f"t{n}" for n in range(len(labels))]
    texts[-2:] = "both", "both"
    rows = [
        {"text": text, "premise": "p", "hypothesis": text, "label": label}
        for text, label in zip(texts, labels, strict=True)
    ]
    lines(tmp_path / "a.jsonl", rows)
    table = {"nli": {"0": "entailment", "1": "neutral"}, "clustering": {"0": "a", "1": "b"}}
    table["classification"] = table["clustering"]
    assert build(tmp_path / "raw", describe(tmp_path, "a.jsonl", kind=kind, labels=table[kind])) == 0
    found = report_of(tmp_path / "raw")["left_out"]
    assert found["no label (null, empty or -1)"]["first"] == [f"a.jsonl:{n}" for n in (4, 5, 6, 8)]
    assert found["a label outside the table"] == {"rows": 1, "first": ["a.jsonl:7"], "values": ["'7'"]}
    assert found["the same texts under two labels"]["first"] == ["a.jsonl:9", "a.jsonl:10"]
    assert len(found) == 3


def test_scores_that_cannot_be_used_are_counted(tmp_path, capsys):
    scores = [5, "4.5", None, "high", True, float("nan"), 1]
    rows = [{"sentence1": f"a{n}", "sentence2": f"b{n}", "score": score} for n, score in enumerate(scores)]
    lines(tmp_path / "a.jsonl", rows)
    assert build(tmp_path / "raw", describe(tmp_path, "a.jsonl", kind="sts")) == 0
    assert "4 rows: a score that is not a number: " in capsys.readouterr().out
    found = report_of(tmp_path / "raw")["left_out"]
    assert found["a score that is no number"]["first"] == [f"a.jsonl:{n}" for n in (2, 3, 4, 5)]
    assert found["a score below 4"]["first"] == ["a.jsonl:6"]


def test_an_id_that_came_before_is_left_out_in_any_file_of_the_source(tmp_path):
    rows = [row | {"nr": nr} for row, nr in zip(pairs(6), [1, 2, 2.0, None, None, 3], strict=True)]
    rows[0]["passage"] = ["several", "of one id"]
    lines(tmp_path / "a.jsonl", rows)
    lines(tmp_path / "b.jsonl", [{"query": "new", "passage": "text", "nr": "3"}])
    assert build(tmp_path / "raw", describe(tmp_path, ["a.jsonl", "b.jsonl"], columns={"id": "nr"})) == 0
    report = report_of(tmp_path / "raw")
    assert report["left_out"] == {"an id that came before": {"rows": 2, "first": ["a.jsonl:2", "b.jsonl:0"]}}
    assert (report["in_part"], report["tuples"]) == ({}, 6)  # two of the first row, whose id stands once


def test_bytes_that_are_not_utf8_cost_only_their_row_in_every_format(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'query,passage\nq0,p0\nq\xe91,p1\n"q\n2",p2\nq3,p3,more\nq4,p4\n')
    query = pa.array([b"q0", b"q\xe91", b"q\n2", b"q4"]).view(pa.string())
    pq.write_table(pa.table({"query": query, "passage": ["p0", "p1", "p2", "p4"]}), tmp_path / "a.parquet")
    for name, bad in (("a.csv", 2), ("a.parquet", 1)):
        assert build(tmp_path / name[2:], describe(tmp_path, name)) == 0
        report = report_of(tmp_path / name[2:])
        assert report["left_out"]["is not UTF-8: save the file as UTF-8"]["first"] == [f"{name}:1"]
        assert (report["rows_used"], len(report["left_out"])) == (3, bad)
    read = [pq.read_table(tmp_path / folder / "x.parquet").to_pylist() for folder in ("csv", "parquet")]
    assert read[0] == read[1]


@pytest.mark.parametrize(("name", "text", "words"), [
    ("a.csv", 'query,passage\nq,p\nq,"p\n', "row 1 (counted from 0) cannot be read (unexpected end of data)"),
    ("a.json", '[{"query": "q", "passage": "p"}, {"query"', "row 1 (counted from 0) is not JSON"),
])  # fmt: skip
def test_a_file_of_which_the_rest_would_be_lost_is_refused(name, text, words, tmp_path, capsys):
    (tmp_path / name).write_text(text)
    assert build(tmp_path / "raw", describe(tmp_path, name)) == 2
    assert words in capsys.readouterr().err
    assert contents(tmp_path / "raw") == {}


# ------------------------------------------------------------------------------ refused before it begins


def test_all_problems_of_all_descriptions_are_named_before_anything_is_written(tmp_path, capsys):
    lines(tmp_path / "a.jsonl", pairs(3))
    lines(tmp_path / "objects.jsonl", [{"q": {"text": "a"}, "passage": "b"}])
    pq.write_table(pa.table({"text": ["t"], "label": [[1]]}), tmp_path / "b.parquet")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "only_names.csv").write_text("query,passage\n")
    descriptions = [
        describe(tmp_path, "a.jsonl", name="one", columns={"query": "querry"}),
        describe(tmp_path, ["b.parquet", "none.parquet", "*.tsv"], name="two", kind="clustering"),
        describe(tmp_path, ["empty.csv", "only_names.csv", ".", "a.json"], name="three"),
        describe(tmp_path, "a.jsonl", name="four", capp=1),
        describe(tmp_path, "objects.jsonl", name="six", columns={"query": "q.txt"}),
        describe(tmp_path, ["a.jsonl", "a.jsonl"], name="five"),
        tmp_path / "nowhere.json",
    ]
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "tasks.json").write_text('{"five": "clustering"}')
    before = contents(tmp_path / "raw")
    assert build(tmp_path / "raw", *descriptions) == 2
    said = capsys.readouterr().err
    for words in (
        "13 problems, no tuples were written",
        f"one.json: files: {tmp_path}/a.jsonl: no column 'querry' for query; did you mean query?; the columns are q",
        "column 'label' holds list<element: int64>, which cannot be the label",
        f"two.json: files: none.parquet: no such file in {tmp_path}",
        "two.json: files: *.tsv: no such file",
        "empty.csv: the file is empty",
        "only_names.csv: the file has no rows",
        "is a folder: name its files, for instance with /*.parquet",
        "four.json: capp: no such key; did you mean cap?",
        "five.json: files: a.jsonl: given twice",
        f"six.json: files: {tmp_path}/objects.jsonl: no column 'q.txt' for query; 'q' has none of that name",
        "nowhere.json: No such file or directory",
        "tasks.json: five is 'clustering' there, and the description makes it 'retrieval': change one",
    ):
        assert words in said, said
    assert contents(tmp_path / "raw") == before


@pytest.mark.parametrize(("kind", "rows", "words"), [
    ("clustering", [{"text": f"t{n}", "label": 1} for n in range(3)], "all rows are of one class, '1': there are no n"),
    ("clustering", [{"text": f"t{n}", "label": n} for n in range(3)], "no row is left to make a tuple of; left out: 3"),
    ("classification", [{"text": "t", "label": 0}], "all rows are of one class, 'no': there are no negatives"),
    ("nli", [{"premise": "p", "hypothesis": "h", "label": 2}], "no row is left to make a tuple of; left out: 1 row: i"),
    ("pairs", [{"query": "", "passage": "p"}], "no row is left to make a tuple of; left out: 1 row: query is empty"),
])  # fmt: skip
def test_a_source_that_gives_no_tuple_is_refused_and_no_other_is_written(kind, rows, words, tmp_path, capsys):
    lines(tmp_path / "a.jsonl", rows)
    lines(tmp_path / "good.jsonl", pairs(3))
    labels = {"0": "no", "1": "yes"} if kind == "classification" else None
    good = describe(tmp_path, "good.jsonl", name="good")
    assert build(tmp_path / "raw", good, describe(tmp_path, "a.jsonl", kind=kind, labels=labels)) == 2
    assert f"x: {words}" in capsys.readouterr().err
    assert contents(tmp_path / "raw") == {}


def test_a_file_that_was_not_built_here_is_not_replaced(tmp_path, capsys):
    lines(tmp_path / "a.jsonl", pairs(3))
    source = describe(tmp_path, "a.jsonl")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "x.parquet").write_bytes(b"somebody's")
    assert build(tmp_path / "raw", source) == 2
    assert "x.parquet: was not built by this tool" in capsys.readouterr().err
    assert contents(tmp_path / "raw") == {"x.parquet": b"somebody's"}
    assert build(tmp_path / "raw", source, more=("--overwrite",)) == 0
    before = contents(tmp_path / "raw")
    assert build(tmp_path / "raw", source) == 0  # the same command again: the same bytes
    assert contents(tmp_path / "raw") == before
    assert sorted(before) == ["tasks.json", "x.build.json", "x.parquet"]


def test_tasks_of_other_data_sets_stay(tmp_path):
    lines(tmp_path / "a.jsonl", pairs(3))
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "tasks.json").write_text('{"other": "clustering"}')
    assert build(tmp_path / "raw", describe(tmp_path, "a.jsonl")) == 0
    assert json.loads((tmp_path / "raw" / "tasks.json").read_text()) == {"other": "clustering", "x": "retrieval"}


@pytest.mark.parametrize("words", ["--part 0/2", "--part 3/2", "--part 2", "--join 0", "--part 1/2 --join 2"])
def test_parts_that_there_cannot_be_are_refused(words, capsys):
    with pytest.raises(SystemExit) as refused:
        build_tuples.main(["--source", "a", "--output_dir", "b", *words.split()])
    assert refused.value.code == 2


def test_patterns_name_files_beside_the_description_in_their_order(tmp_path):
    folder = tmp_path / "a folder [1]"
    for name in ("b/2.jsonl", "b/10.jsonl", "a[0].jsonl"):
        lines(folder / name, [{"query": name, "passage": "p"}])
    assert build(tmp_path / "raw", describe(folder, ["a[0].jsonl", "**/*.jsonl"], name="y")) == 2  # one fits both
    source = describe(folder, ["b/*.jsonl", "a[0].jsonl"], columns={"id": "query"})
    assert build(tmp_path / "raw", source) == 0
    found = pq.read_table(tmp_path / "raw" / "x.parquet")["query"].to_pylist()
    assert found == ["b/10.jsonl", "b/2.jsonl", "a[0].jsonl"]


# ------------------------------------------------------------------------------------ formats and parts


def write_as(path: Path, rows: list[dict]) -> None:
    """Rows in the format of the file's ending."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=40)
    elif path.suffix in (".csv", ".tsv"):
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    else:
        lines(path, rows)


@pytest.mark.parametrize("kind", ["pairs", "clustering", "sts", "nli"])
def test_every_format_gives_the_same_bytes(kind, tmp_path):
    rng = random.Random(0)
    rows = []
    for n in range(60):
        row = {"query": f'q "{n}"\n', "passage": f"p, {n}", "sentence1": f"a{n}", "sentence2": f"b\t{n}"}
        row |= {"text": f"t{n}", "label": rng.randrange(3), "score": rng.randrange(6), "premise": f"p{n % 20}"}
        rows.append(row | {"hypothesis": f"h{n}"})
    found = set()
    for ending in ("parquet", "jsonl", "json", "csv", "tsv", "jsonl.gz"):
        write_as(tmp_path / f"a.{ending}", rows)
        assert build(tmp_path / ending, describe(tmp_path, f"a.{ending}", kind=kind, cap=50)) == 0
        found.add((tmp_path / ending / "x.parquet").read_bytes())
        assert report_of(tmp_path / ending)["rows_read"] == 60
    assert len(found) == 1


def sources_in_pieces(folder: Path, monkeypatch) -> list[Path]:
    """Descriptions of all sorts of sources, whose Parquet files have many pieces."""
    monkeypatch.setattr(sources_reading, "PIECE_BYTES", 200)
    rng = random.Random(0)
    labelled = [{"text": f"t{rng.randrange(500)}", "label": rng.choice("cab")} for _ in range(300)]
    inferences = [
        {"premise": f"p{rng.randrange(50)}", "hypothesis": f"h{n}", "label": rng.randrange(4)} for n in range(200)
    ]
    write_as(folder / "a.parquet", labelled)
    write_as(folder / "b.parquet", inferences)
    lines(folder / "c.jsonl", pairs(20))
    lines(folder / "d.jsonl", [*pairs(30), {"query": "q"}])
    return [
        describe(folder, "a.parquet", name="classes", kind="clustering", cap=60),
        describe(folder, "b.parquet", name="inferences", kind="nli"),
        describe(folder, ["d.jsonl", "c.jsonl"], name="searches"),
    ]


@pytest.mark.parametrize("parts", [2, 5, 40])
def test_parts_are_joined_to_the_bytes_of_one_run(parts, tmp_path, monkeypatch, capsys):
    descriptions = sources_in_pieces(tmp_path, monkeypatch)
    plan, _ = build_tuples.plan_build(descriptions, tmp_path / "one", overwrite=False)
    assert len([piece for piece in plan.pieces if piece.source == 0]) > 5
    assert build(tmp_path / "one", *descriptions) == 0
    expected = contents(tmp_path / "one")
    assert [report_of(tmp_path / "one", name)["rows_read"] for name in ("inferences", "searches")] == [200, 51]
    report = report_of(tmp_path / "one", "classes")
    assert report["rows_read"] == 300  # each row of each piece once
    assert report["left_out"]["texts that came before"]["rows"] > 0  # found across pieces
    for part in range(parts, 0, -1):  # in any order
        assert build(tmp_path / "joined", *descriptions, more=("--part", f"{part}/{parts}")) == 0
    assert not (tmp_path / "joined" / "tasks.json").exists()
    assert build(tmp_path / "joined", *descriptions, more=("--join", str(parts))) == 0
    assert contents(tmp_path / "joined") == expected


def test_every_piece_is_dealt_to_one_part_and_parts_are_about_equal(tmp_path, monkeypatch):
    plan, _ = build_tuples.plan_build(sources_in_pieces(tmp_path, monkeypatch), tmp_path / "raw", overwrite=False)
    dealt = build_tuples.sources_parts.part_of(plan.pieces, 4)
    assert dealt == sorted(dealt)
    sizes = [
        sum(piece.size for piece, part in zip(plan.pieces, dealt, strict=True) if part == own) for own in (1, 2, 3, 4)
    ]
    assert max(sizes) <= sum(sizes) / 4 + max(piece.size for piece in plan.pieces)
    assert min(sizes) > 0


def test_a_join_names_the_parts_that_are_not_there(tmp_path, monkeypatch, capsys):
    descriptions = sources_in_pieces(tmp_path, monkeypatch)
    assert build(tmp_path / "raw", *descriptions, more=("--part", "2/3")) == 0
    capsys.readouterr()
    assert build(tmp_path / "raw", *descriptions, more=("--join", "3")) == 2
    said = capsys.readouterr().err
    assert "part 1/3 is missing: run --part 1/3" in said
    assert "part 3/3 is missing" in said
    assert "part 2/3" not in said
    changed = json.loads(descriptions[0].read_text()) | {"seed": 1}
    descriptions[0].write_text(json.dumps(changed))
    for part in ("1/3", "3/3"):
        assert build(tmp_path / "raw", *descriptions, more=("--part", part)) == 0
    capsys.readouterr()
    status = build(tmp_path / "raw", *descriptions, more=("--join", "3"))
    if status == 0:  # nothing of the changed source was in part 2
        return
    assert "part 2/3 is missing" in capsys.readouterr().err


def test_an_interrupted_build_goes_on_with_the_pieces_that_it_has(tmp_path, monkeypatch, capsys):
    descriptions = sources_in_pieces(tmp_path, monkeypatch)
    assert build(tmp_path / "whole", *descriptions) == 0
    real, read = build_tuples.sources_parts.rows_of, []

    def rows_of(source, piece):
        read.append(piece)
        if len(read) == 4:
            raise KeyboardInterrupt
        return real(source, piece)

    monkeypatch.setattr(build_tuples.sources_parts, "rows_of", rows_of)
    assert build(tmp_path / "raw", *descriptions) == 130
    assert "the same command continues" in capsys.readouterr().err
    assert build(tmp_path / "raw", *descriptions) == 0
    assert len(set(read)) == len(read) - 1  # only the one that was interrupted was read again
    assert contents(tmp_path / "raw") == contents(tmp_path / "whole")


# -------------------------------------------------------------------------------------------- the hub


def test_a_hub_data_set_is_read_through_datasets(tmp_path, capsys):
    """A folder of Parquet files stands for the hub, which no test may reach; `datasets` takes either."""
    pytest.importorskip("datasets")
    (tmp_path / "set" / "data").mkdir(parents=True)
    rows = pairs(20)
    pq.write_table(pa.Table.from_pylist(rows[:12]), tmp_path / "set" / "data" / "train-00000-of-00001.parquet")
    pq.write_table(pa.Table.from_pylist(rows[12:]), tmp_path / "set" / "data" / "validation-00000-of-00001.parquet")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "file.parquet")
    hub = str(tmp_path / "set")
    assert build(tmp_path / "hub", describe(tmp_path, None, hub=hub, split=["train", "validation"], cap=9)) == 0
    assert build(tmp_path / "file", describe(tmp_path, "file.parquet", cap=9)) == 0
    assert (tmp_path / "hub" / "x.parquet").read_bytes() == (tmp_path / "file" / "x.parquet").read_bytes()
    wrong = describe(tmp_path, None, hub=hub, columns={"query": "question"})
    assert build(tmp_path / "no", wrong) == 2
    assert "no column 'question' for query; the columns are query, passage" in capsys.readouterr().err
    assert build(tmp_path / "no", describe(tmp_path, None, hub=str(tmp_path / "nowhere"))) == 2
    assert f"hub: {tmp_path / 'nowhere'}: 'train' cannot be read (" in capsys.readouterr().err
