"""Raw files in every format and column style: read alike, and what is not read is named, never lost.

python -m pytest tests/data/test_raw_files.py
"""

import gzip
import json

import numpy as np
import pytest
import toy
from conftest import RETRIEVAL, contents, tokenize, write_jsonl

from data import raw_rows
from data.token_store import open_store


@pytest.fixture
def refused(toy_world, raw, tmp_path, capsys):
    """A function (*flags) -> what is printed when the folder is refused; nothing may have been written."""

    def read(*flags: str) -> str:
        assert tokenize(raw, tmp_path / "stores", toy_world.backbone, *(flags or RETRIEVAL)) == 2
        assert not (tmp_path / "stores").exists()
        return capsys.readouterr().err

    return read


# -------------------------------------------------------------------------------------------- columns


@pytest.mark.parametrize("skip", ["true", "false"])
@pytest.mark.parametrize(("column", "other"), [("pos", "neg"), ("neg", "pos"), ("negatives", "pos")])
def test_a_text_where_a_list_belongs_is_refused_by_its_row(raw, refused, column, other, skip):
    rows = [
        {"query": "q", "pos": ["p"], other: ["p"], column: ["n"]},
        {"query": "q2", "pos": ["p"], column: "sorted(x)"},
    ]
    write_jsonl(raw / "x.jsonl", rows)
    message = f'x.jsonl: row 1 (counted from 0): {column!r} holds "sorted(x)", not a list of texts'
    assert message in refused(*RETRIEVAL, "--skip_bad_rows", skip)


@pytest.mark.parametrize("value", [{"a": "b"}, [["p"]], [3], 3, True])
def test_only_texts_are_taken_for_a_list_of_texts(raw, refused, value):
    write_jsonl(raw / "x.jsonl", [{"query": "q", "pos": value}])
    assert "row 0 (counted from 0): 'pos' holds" in refused()


def test_rows_of_two_styles_are_refused_by_the_names_of_both(raw, refused):
    rows = [{"query": f"q{i}", "passage": f"p{i}"} for i in range(5)]
    rows += [{"anchor": "a", "positive": "p", "negative_1": "n"}, {"query": "q", "passage": "p", "negative_7": "n"}]
    write_jsonl(raw / "x.jsonl", rows)
    printed = refused(*RETRIEVAL, "--skip_bad_rows", "true")
    assert "x.jsonl: 3 column styles in one file" in printed
    assert "query, passage (5 rows: 0, 1, 2, ...)" in printed
    assert "anchor, positive, negative_k (1 row: 5)" in printed
    assert "query, passage, negative_k (1 row: 6)" in printed
    assert "same column names, or split the file" in printed
    assert "empty" not in printed


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"query": "q", "passage": "p"}, {"query": "q", "positive": "p"}),
        ({"query": "q", "passage": "p"}, {"query": "q", "pos": ["p"]}),
        ({"query": "q", "passage": "p", "negative": "n"}, {"query": "q", "passage": "p", "negative_1": "n"}),
        ({"query": "q", "passage": "p", "negatives": ["n"]}, {"query": "q", "passage": "p", "negative_1": "n"}),
    ],
)
def test_every_pair_of_styles_in_one_file_is_refused(raw, refused, first, second):
    write_jsonl(raw / "x.jsonl", [first, second])
    assert "2 column styles in one file" in refused()


def test_a_row_with_two_queries_is_refused_in_every_format(raw, refused):
    row = {"query": "q", "anchor": "a", "positive": "p"}
    write_jsonl(raw / "x.jsonl", [{"query": "q", "positive": "p"}, row])
    toy.write_parquet(raw / "y.parquet", [row])
    (raw / "z.csv").write_text("query,anchor,positive\nq,a,p\n")
    printed = refused()
    for name, rows in (("x.jsonl", "1"), ("y.parquet", "0"), ("z.csv", "0")):
        assert f"{name}: 'query' and 'anchor' are in one row (1 row: {rows}, counted from 0)" in printed


def test_rows_of_two_styles_in_one_table_are_told_apart_by_what_they_hold(raw, refused):
    rows = [{"query": "q", "passage": "p"}] * 3 + [{"anchor": "a", "positive": "p"}, {"query": "q", "positive": "p"}]
    names = ("query", "passage", "anchor", "positive")
    table = [{name: row.get(name) for name in names} for row in rows]
    toy.write_parquet(raw / "x.parquet", table)
    (raw / "y.csv").write_text("\n".join([",".join(names), *(",".join(row[n] or "" for n in names) for row in table)]))
    printed = refused(*RETRIEVAL, "--skip_bad_rows", "true")
    for name in ("x.parquet", "y.csv"):
        assert (
            f"{name}: 3 column styles in one file, query, passage (3 rows: 0, 1, 2); anchor, positive (1 row: 3)"
            in printed
        )


def test_a_column_that_holds_nothing_decides_nothing_in_a_table_too(raw, tuples):
    rows = [{"query": "q1", "anchor": None, "positive": "p1", "negative_1": None, "negative": "n1"},
            {"query": "q2", "anchor": "", "positive": "p2", "negative_1": "", "negative": None}]  # fmt: skip
    toy.write_parquet(raw / "x.parquet", rows)
    assert tuples("x") == [["q1", "p1", "n1"], ["q2", "p2", None]]


def test_columns_that_hold_nothing_decide_nothing(raw, tuples):
    rows = [
        {"query": "q1", "anchor": None, "positive": "p1", "pos": [], "negative_1": None, "negative": "n1"},
        {"query": "q2", "anchor": "", "positive": "p2", "neg": None, "negative": None},
    ]
    write_jsonl(raw / "x.jsonl", rows)
    assert tuples("x") == [["q1", "p1", "n1"], ["q2", "p2", None]]


@pytest.mark.parametrize("column", ["negatives", "neg"])
def test_a_list_of_negatives_is_read_in_every_style(raw, tuples, column):
    rows = [("q1", "p1", ["n1", "n2"]), ("q2", "p2", []), ("q3", "p3", ["n3"])]
    for name, query, positive in (("a", "query", "passage"), ("b", "anchor", "positive")):
        table = [{query: row[0], positive: row[1], column: row[2]} for row in rows]
        write_jsonl(raw / f"{name}_lines.jsonl", table)
        toy.write_parquet(raw / f"{name}_columns.parquet", table)
    lists = [{"query": row[0], "pos": [row[1]], column: row[2]} for row in rows]
    write_jsonl(raw / "lists.jsonl", lists)
    for name in ("a_lines", "a_columns", "b_lines", "b_columns", "lists"):
        assert tuples(name) == [["q1", "p1", "n1", "n2"], ["q2", "p2", None, None], ["q3", "p3", "n3", None]]


def test_columns_that_are_not_read_are_named_with_the_reason(raw, tuples, capsys):
    row = {"query": "q", "positive": "p", "hard_negative_1": "n", "pos_scores": [0.5], "neg_scores": [0.1], "id": 3}
    write_jsonl(raw / "x.jsonl", [row])
    toy.write_parquet(raw / "y.parquet", [row | {"passage": "p"}])
    assert tuples("x") == [["q", "p"]]
    printed = capsys.readouterr().err
    assert "not read: column hard_negative_1 of x.jsonl and 1 other file: negatives are read from negative_1" in printed
    assert "not read: columns pos_scores, neg_scores of x.jsonl and 1 other file: scores are not used" in printed
    assert "not read: column id of x.jsonl and 1 other file: no column of that name is known" in printed
    assert "not read: column positive of y.parquet: the tuple is in query and passage" in printed


def test_a_list_in_a_column_of_texts_is_answered_with_the_name_for_lists(raw, refused):
    write_jsonl(raw / "x.jsonl", [{"query": "q", "positive": "p", "negative": ["n"]}])
    toy.write_parquet(raw / "y.parquet", [{"query": "q", "passage": ["p"]}])
    printed = refused()
    assert "x.jsonl: row 0 (counted from 0): 'negative' holds [\"n\"], not text: call the column negatives" in printed
    assert "column 'passage' holds list" in printed
    assert "not text: call the column pos" in printed


def test_a_prompt_that_is_no_instruction_is_answered_with_what_it_is_read_as(raw, refused):
    row = {"query": "q", "passage": "p", "prompt": {"system": "s"}}
    write_jsonl(raw / "x.jsonl", [row])
    toy.write_parquet(raw / "y.parquet", [row])
    assert refused().count("not text: it is read as the instruction of the row's query; if it is something else") == 2


# -------------------------------------------------------------------------------------------- bad rows


def test_a_negative_that_is_its_positive_costs_only_itself(raw, tuples, capsys):
    rows = [
        {"query": "q1", "passage": "p1", "negative_1": "p1", "negative_2": "n"},
        {"query": "q2", "passage": "p2", "negative_1": "p2", "negative_2": None},
    ]
    toy.write_parquet(raw / "x.parquet", rows)
    assert tuples("x") == [["q1", "p1", None, "n"], ["q2", "p2", None, None]]
    assert "2 negatives equal to the positive left out" in capsys.readouterr().out


@pytest.mark.parametrize("task", ["clustering", "classification"])
def test_a_tuple_without_another_negative_is_bad_where_negatives_are_all_there_is(raw, refused, tuples, task):
    rows = [
        {"query": "q1", "passage": "p1", "negative_1": "p1", "negative_2": "n"},
        {"query": "q2", "passage": "p2", "negative_1": "p2", "negative_2": None},
    ]
    toy.write_parquet(raw / "x.parquet", rows)
    assert "1 row with no negative but its positive, so that nothing is left to learn from (row 1" in refused(
        "--task", task
    )
    assert tuples("x", "--task", task, "--skip_bad_rows", "true") == [["q1", "p1", None, "n"]]


def test_all_bad_lines_are_counted_and_the_first_ten_named(raw, refused):
    good = json.dumps({"query": "q", "passage": "p"})
    lines = []
    for _ in range(9):
        lines += [good, "{", '["q"]', '{"query": "q", "passage": 3}']
    (raw / "x.jsonl").write_text("\n".join(lines) + "\n")
    printed = refused()
    named = [line for line in printed.splitlines() if "x.jsonl: row" in line]
    assert [int(line.split("row ")[1].split(" ")[0]) for line in named] == [1, 2, 3, 5, 6, 7, 9, 10, 11, 13]
    assert "x.jsonl: and 17 more rows that cannot be read" in printed


def test_bad_lines_and_empty_texts_are_said_together_by_their_own_numbers(raw, refused):
    (raw / "x.jsonl").write_text('nothing\n{"query": "q", "passage": "p"}\n{"query": "", "passage": "p"}\n')
    printed = refused()
    assert "row 0 (counted from 0) is not JSON" in printed
    assert "1 row with an empty or null query (row 2, counted from 0)" in printed


# --------------------------------------------------------------------------------------------- formats


def test_every_format_gives_the_same_store(toy_world, raw, tmp_path):
    rows = toy.raw_rows(30, 3)  # a query has a line break in it
    rows[3]["negative_2"] = ""
    rows[4]["passage"] = 'a "quoted" text, with\ttab'
    toy.write_parquet(raw / "columns.parquet", rows)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    texts = {
        "lines.jsonl": lines,
        "lines_upper.JSONL": lines,
        "lines_in_json.json": lines,
        "array.json": json.dumps(rows),
        "array_indented.json": "\ufeff" + json.dumps(rows, indent=2),
        "commas.csv": separated(rows, ","),
        "commas_bom.CSV": "\ufeff" + separated(rows, ","),
        "tabs.tsv": separated(rows, "\t"),
    }
    for name, text in texts.items():
        (raw / name).write_text(text, encoding="utf-8")
        (raw / f"gz_{name}.gz").write_bytes(gzip.compress(text.encode()))
    assert tokenize(raw, tmp_path / "stores", toy_world.backbone, *RETRIEVAL) == 0
    stores = [open_store(folder) for folder in sorted((tmp_path / "stores").iterdir())]
    assert len(stores) == 1 + 2 * len(texts)
    for store in stores:
        for array in ("tokens", "offsets", "tuples"):
            assert np.array_equal(getattr(store, array), getattr(stores[0], array)), (store.name, array)


def separated(rows: list[dict], separator: str) -> str:
    """Rows as a spreadsheet writes them: every field quoted, quotes doubled."""

    def line(fields) -> str:
        return separator.join('"' + field.replace('"', '""') + '"' for field in fields) + "\r\n"

    return line(rows[0]) + "".join(line(row.values()) for row in rows)


@pytest.mark.parametrize("size", [1, 7, 64])
def test_an_array_is_read_piece_by_piece(tmp_path, monkeypatch, size):
    monkeypatch.setattr(raw_rows, "_CHUNK", size)
    rows = [{"query": "q" * i, "n": [i, {"deep": None}], "x": 1.5} for i in range(20)]
    path = tmp_path / "x.json"
    path.write_text(json.dumps(rows, indent=1))
    assert list(raw_rows.rows_of(path, ".json")) == list(enumerate(rows))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.json", '[{"query": "q", "passage": "p"}, {"query": "q"', "row 1 (counted from 0) is not JSON"),
        ("x.json", '[{"query": "q", "passage": "p"} {"query": "q"}]', "row 0 (counted from 0) is not JSON (a comma"),
        ("x.json", '[{"query": "q", "passage": "p"}, 3, null]', "row 2 (counted from 0) is not an object"),
        (
            "x.json",
            '[{"query": "q", "passage": "p"}]\n[{"query": "q"}]',
            "row 1 (counted from 0) is not JSON (more follows",
        ),
        ("x.json", "[]", "the file has no rows"),
        ("x.csv", "query,passage\n", "the file has no rows"),
        ("x.csv", "query,passage\nq,p\nq,p,r\n", "row 1 (counted from 0) has 3 fields, but the first line names 2"),
        ("x.csv", 'query,passage\nq,p\nq,"p\n', "row 1 (counted from 0) cannot be read (unexpected end of data)"),
        (
            "x.csv",
            b"query,passage\nq,p\nq,\xe9\nq,p\nq,\xe9\n",
            "row 3 (counted from 0) is not UTF-8: save the file as",
        ),
        ("x.csv", b"query,p\xe9\nq,p\n", "its first line is not UTF-8: save the file as UTF-8"),
        ("x.csv", "query,query\nq,p\n", "column 'query' occurs twice in the first line"),
        ("x.tsv", 'query\tpassage\n"a" b\tp\n', "row 0 (counted from 0) cannot be read"),
    ],
)
def test_what_is_wrong_in_an_array_or_a_table_is_named_by_its_row(raw, refused, name, text, message):
    (raw / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert f"{name}: {message}" in refused()


def test_a_damaged_gz_file_is_refused(raw, refused):
    data = gzip.compress("".join(json.dumps(row) + "\n" for row in toy.raw_rows(50, 2)).encode())
    (raw / "x.jsonl.gz").write_bytes(data[: len(data) // 2])
    (raw / "y.jsonl.gz").write_text("no gz at all, whatever its name says")
    printed = refused()
    assert "x.jsonl.gz: damaged after row" in printed
    assert "y.jsonl.gz: damaged after row 0" in printed


# --------------------------------------------------------------------------------------------- folders


def test_what_else_lies_in_the_folder_is_named_in_one_line(toy_world, raw, tmp_path, tuples, capsys):
    write_jsonl(raw / "x.jsonl", [{"query": "q", "passage": "p"}])
    write_jsonl(raw / ".hidden.jsonl", [{"query": "q", "passage": "p"}])
    write_jsonl(raw / "sub" / "y.jsonl", [{"query": "q", "passage": "p"}])
    (raw / "tasks.json").write_text('{"x": "retrieval"}')
    (raw / "x.build.json").write_text('{"rows_read": 1}')
    (raw / "settings.json").write_text('{"a": 1}')
    (raw / "notes.txt").write_text("")
    assert tuples("x") == [["q", "p"]]
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "not read in" in line]
    assert line.endswith(
        ".hidden.jsonl (hidden), notes.txt (of another ending), settings.json (not an array of rows), sub (a folder)"
    )


def test_the_folder_of_stores_beside_the_raw_files_is_not_named(toy_world, raw, capsys):
    write_jsonl(raw / "x.jsonl", [{"query": "q", "passage": "p"}])
    for _ in range(2):
        assert tokenize(raw, raw / "stores", toy_world.backbone, *RETRIEVAL) == 0
    assert "not read" not in capsys.readouterr().err


def test_a_folder_in_which_nothing_can_be_read_is_refused_with_what_is_there(raw, refused):
    (raw / "sub").mkdir()
    (raw / "data.arrow").write_text("")
    printed = refused()
    assert "no file with one of the endings .parquet, .jsonl, .json, .csv, .tsv" in printed
    assert "it holds data.arrow (of another ending), sub (a folder)" in printed


def test_a_folder_called_as_a_file_is_refused_in_a_sentence(raw, refused):
    for name in ("x.jsonl", "y.parquet"):
        (raw / name).mkdir()
    printed = refused()
    assert "x.jsonl: is a folder: a dataset is one file; give the folder itself as --input_dir" in printed
    assert "y.parquet: is a folder" in printed


def test_a_single_file_may_be_given(toy_world, raw, tmp_path, capsys):
    write_jsonl(raw / "x.jsonl", [{"query": "q", "passage": "p"}])
    write_jsonl(raw / "y.jsonl", [{"query": "q", "passage": "p"}])
    (raw / "tasks.json").write_text('{"x": "clustering"}')
    assert tokenize(raw / "x.jsonl", tmp_path / "stores", toy_world.backbone) == 0
    assert [path.name for path in (tmp_path / "stores").iterdir()] == ["x"]
    assert open_store(tmp_path / "stores" / "x").task == "clustering"
    (raw / "z.txt").write_text("text")
    assert tokenize(raw / "z.txt", tmp_path / "stores", toy_world.backbone) == 2
    assert "z.txt: not one of .parquet, .jsonl" in capsys.readouterr().err


def test_many_files_make_a_summary_and_a_report(toy_world, raw, tmp_path, capsys):
    for number in range(21):
        write_jsonl(raw / f"set_{number:02}.jsonl", [{"query": "q", "passage": f"p{i}"} for i in range(number + 1)])
    assert tokenize(raw, tmp_path / "stores", toy_world.backbone, *RETRIEVAL) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:10]] == [f"set_{number:02}" for number in range(20, 10, -1)]
    assert lines[10].startswith("the largest of 21 datasets  231 rows")
    assert lines[11] == f"all of them: {tmp_path / 'stores' / 'report.txt'}"
    assert lines[13:] == [f"train with --train_data_path {tmp_path / 'stores'}"]
    before = contents(tmp_path / "stores")
    report = before["report.txt"].decode().splitlines()
    assert [line.split()[0] for line in report] == [f"set_{number:02}" for number in range(21)]
    assert tokenize(raw, tmp_path / "stores", toy_world.backbone, *RETRIEVAL) == 0
    assert contents(tmp_path / "stores") == before
