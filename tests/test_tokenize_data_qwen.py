"""The tokenising door: column styles, skipping, continuing, and every kind of bad input refused before it writes.

python -m pytest tests/test_tokenize_data_qwen.py
"""

import json
import shutil

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import toy
from conftest import contents, door_here, texts_of, tokenize, write_jsonl

import tokenize_data_qwen
from data import raw_columns, raw_formats, tokenising
from data.token_store import open_store
from modeling.tokenizer import load_tokenizer


def test_stores_hold_the_texts_that_went_in(toy_world):
    tokenizer, _ = load_tokenizer(str(toy_world.backbone))
    store = open_store(toy_world.stores / "toy_retrieval")
    rows = toy.raw_rows(200, 24, seed=1)
    assert texts_of(store, tokenizer) == [list(row.values()) for row in rows]
    assert store.task == "retrieval"
    labels = open_store(toy_world.stores / "toy_classification")
    assert len(labels.offsets) - 1 < 3 * len(labels.tuples)  # two label texts, stored once each
    assert len(np.unique(labels.tuples[:, 1:])) == 2


def test_same_input_same_bytes(toy_world, tmp_path):
    assert tokenize(toy_world.raw, tmp_path / "again", toy_world.backbone) == 0
    assert contents(tmp_path / "again") == contents(toy_world.stores)


def test_column_styles_and_formats_give_the_same_store(toy_world, raw, tmp_path):
    rows = toy.raw_rows(20, 3)
    toy.write_parquet(raw / "published.parquet", rows)
    write_jsonl(raw / "lines.jsonl", rows)
    renamed = [{"anchor": r["query"], "positive": r["passage"]} | {k: r[k] for k in r if "neg" in k} for r in rows]
    toy.write_parquet(raw / "trainer.parquet", renamed)
    negatives = [f"negative_{k}" for k in (1, 2, 3)]
    lists = [{"query": r["query"], "pos": [r["passage"]], "neg": [r[k] for k in negatives]} for r in rows]
    toy.write_parquet(raw / "flag.parquet", lists)
    write_jsonl(raw / "flag_lines.jsonl", lists)
    assert tokenize(raw, tmp_path / "stores", toy_world.backbone, "--task", "retrieval") == 0
    stores = [open_store(tmp_path / "stores" / path.stem) for path in sorted(raw.iterdir())]
    assert len(stores) == 5
    for store in stores:
        assert store.tuples.shape == (20, 5)
        assert np.array_equal(store.tokens, stores[0].tokens)
        assert np.array_equal(store.offsets, stores[0].offsets)
        assert np.array_equal(store.tuples, stores[0].tuples)


def test_a_column_style_is_added_in_one_place(toy_world, raw, tmp_path, monkeypatch, capsys):
    style = raw_columns.Style("question, answer", "question", ("answer", "reply"))
    monkeypatch.setattr(raw_columns, "STYLES", (*raw_columns.STYLES, style))
    rows = [{"question": "q1", "reply": "p1", "negative_1": "n1"}, {"question": "q2", "reply": "p2", "negative_1": ""}]
    toy.write_parquet(raw / "x.parquet", rows)
    assert tokenize(raw, tmp_path / "stores", toy_world.backbone, "--task", "retrieval") == 0
    tokenizer, _ = load_tokenizer(str(toy_world.backbone))
    assert texts_of(open_store(tmp_path / "stores" / "x"), tokenizer) == [["q1", "p1", "n1"], ["q2", "p2", None]]
    toy.write_parquet(raw / "y.parquet", [{"question": "q"}])
    assert tokenize(raw, tmp_path / "stores", toy_world.backbone, "--task", "retrieval") == 2
    assert "; or query, pos, neg as lists; or question, answer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["passage", "neg", "pos", "query"], ("query", "pos", ("neg",))),  # lists win where several styles fit
        (["query", "positive", "passage"], ("query", "passage", ())),
        (["query", "positive", "negative"], ("query", "positive", ("negative",))),
        (["anchor", "positive", "query"], ("query", "positive", ())),
        (["anchor", "positive", "negative"], ("anchor", "positive", ("negative",))),
        (["query", "passage", "negative_10", "negative_9", "negative"],
         ("query", "passage", ("negative_9", "negative_10"))),
        (["anchor", "passage"], None),
    ],
)  # fmt: skip
def test_which_columns_of_a_file_are_read(names, expected):
    columns = raw_columns.find_columns(names)
    found = None if columns is None else (columns.query, columns.positive, columns.negatives)
    assert found == expected


def test_several_positives_give_several_tuples_and_lists_may_differ_in_length(toy_world, raw, tmp_path):
    write_jsonl(
        raw / "x.jsonl",
        [{"query": "q1", "pos": ["p1", "p2"], "neg": ["n1"]}, {"query": "q2", "pos": ["p3"], "neg": []}],
    )
    assert tokenize(raw, tmp_path / "stores", toy_world.backbone, "--task", "x=clustering") == 0
    store = open_store(tmp_path / "stores" / "x")
    tokenizer, _ = load_tokenizer(str(toy_world.backbone))
    assert texts_of(store, tokenizer) == [["q1", "p1", "n1"], ["q1", "p2", "n1"], ["q2", "p3", None]]
    assert store.task == "clustering"


def test_missing_negatives_are_allowed(toy_world, raw, tmp_path):
    rows = [{"query": "q1", "passage": "p1", "negative_1": None, "negative_2": "n"},
            {"query": "q2", "passage": "p2", "negative_1": "", "negative_2": None}]  # fmt: skip
    toy.write_parquet(raw / "some.parquet", rows)
    toy.write_parquet(raw / "none.parquet", [{"query": "q", "passage": "p"}] * 3)
    assert tokenize(raw, tmp_path / "stores", toy_world.backbone, "--task", "retrieval") == 0
    some = open_store(tmp_path / "stores" / "some")
    assert (some.tuples[:, 2:] >= 0).tolist() == [[False, True], [False, False]]
    assert open_store(tmp_path / "stores" / "none").tuples.shape == (3, 2)


def test_done_files_are_skipped_and_other_inputs_are_refused(toy_world, raw, tmp_path, capsys):
    toy.write_parquet(raw / "a.parquet", toy.raw_rows(10, 2))
    arguments = (raw, tmp_path / "stores", toy_world.backbone, "--task", "retrieval")
    assert tokenize(*arguments) == 0
    before, stamp = contents(tmp_path / "stores"), (tmp_path / "stores" / "a" / "meta.json").stat().st_mtime_ns
    capsys.readouterr()
    assert tokenize(*arguments) == 0
    assert "already done" in capsys.readouterr().out
    assert (tmp_path / "stores" / "a" / "meta.json").stat().st_mtime_ns == stamp

    toy.write_parquet(raw / "a.parquet", toy.raw_rows(10, 2, seed=5))
    toy.write_parquet(raw / "b.parquet", toy.raw_rows(10, 2))
    assert tokenize(*arguments, "--max_seq_length", "32") == 2
    error = capsys.readouterr().err
    assert "source_sha256" in error
    assert "max_seq_length 128 -> 32" in error
    assert "--overwrite true" in error
    assert contents(tmp_path / "stores") == before  # not even b was written
    assert tokenize(*arguments, "--max_seq_length", "32", "--overwrite", "true") == 0
    assert open_store(tmp_path / "stores" / "a").meta["max_seq_length"] == 32


def test_an_interrupted_run_continues_to_the_same_bytes(toy_world, raw, tmp_path, monkeypatch, capsys):
    rows = toy.raw_rows(50, 2)
    for number, row in enumerate(rows):  # instructions are counted across the interruption too
        row["query"] = row["query"].replace("Find it.", f"Find it {number % 13}.")
    toy.write_parquet(raw / "a.parquet", rows)
    monkeypatch.setattr(tokenising, "BATCH_TEXTS", 28)
    monkeypatch.setattr(tokenising, "COMMIT_ROWS", 14)
    arguments = ("--task", "retrieval", "--max_rows", "33")
    assert tokenize(raw, tmp_path / "whole", toy_world.backbone, *arguments) == 0
    calls, add = [], tokenising.add_tuples

    def dies_at_the_fifth(*args):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        add(*args)

    with monkeypatch.context() as patch:
        patch.setattr(tokenising, "add_tuples", dies_at_the_fifth)
        assert tokenize(raw, tmp_path / "stores", toy_world.backbone, *arguments) == 130
    assert capsys.readouterr().err == "tokenize_data_qwen.py: interrupted; the same command continues\n"
    assert not (tmp_path / "stores" / "a").exists()
    skipped = []
    read = raw_formats.read

    def spy(path, types, rows, skip=0):
        skipped.append(skip)
        return read(path, types, rows, skip)

    monkeypatch.setattr(raw_formats, "read", spy)
    assert tokenize(raw, tmp_path / "stores", toy_world.backbone, *arguments) == 0
    assert skipped[-1] == 28  # four batches of seven had been committed: it went on there
    assert contents(tmp_path / "stores") == contents(tmp_path / "whole")


def test_max_rows_samples_as_pandas_does(toy_world, raw, tmp_path):
    rows = toy.raw_rows(40, 1)
    toy.write_parquet(raw / "a.parquet", rows)
    assert tokenize(raw, tmp_path / "stores", toy_world.backbone, "--task", "retrieval", "--max_rows", "15") == 0
    sampled = pandas.DataFrame(rows).sample(n=15, random_state=42)
    tokenizer, _ = load_tokenizer(str(toy_world.backbone))
    found = texts_of(open_store(tmp_path / "stores" / "a"), tokenizer)
    assert sorted(row[0] for row in found) == sorted(sampled["query"])
    assert [row[0] for row in found] == [row["query"] for i, row in enumerate(rows) if i in set(sampled.index)]


def test_without_flags_the_first_scripts_folders_and_lengths_are_used():
    flags = tokenize_data_qwen.parse([])
    assert (str(flags.input_dir), flags.max_seq_length, flags.max_rows) == ("training_data", 1024, 0)
    assert str(flags.output_dir) == "training_data/data_tokenized_qwen"


def test_bad_rows_are_named_and_left_out_only_when_told(toy_world, raw, tmp_path, capsys):
    rows = [{k: str(v) for k, v in row.items()} for row in toy.raw_rows(8, 2)]
    rows[2]["query"] = "  "
    rows[4]["query"] = None
    rows[5]["passage"] = ""
    rows[6]["negative_2"] = rows[6]["passage"]
    toy.write_parquet(raw / "a.parquet", rows)
    assert tokenize(raw, tmp_path / "stores", toy_world.backbone, "--task", "retrieval") == 2
    error = capsys.readouterr().err
    assert "2 problems" in error
    assert "2 rows with an empty or null query (row 2, 4, counted from 0)" in error
    assert "1 row with an empty or null positive (row 5" in error
    assert "mend the file, or leave such rows out with --skip_bad_rows true" in error
    assert not (tmp_path / "stores").exists()
    assert tokenize(raw, tmp_path / "stores", toy_world.backbone, "--task", "retrieval", "--skip_bad_rows", "true") == 0
    printed = capsys.readouterr().out
    assert "3 skipped" in printed
    assert "1 negative equal to the positive left out" in printed
    assert printed.splitlines()[-1] == f"train with --train_data_path {tmp_path / 'stores'}"
    assert len(open_store(tmp_path / "stores" / "a").tuples) == 5


def test_nothing_is_said_of_what_did_not_happen(toy_world, raw, tmp_path, capsys):
    toy.write_parquet(raw / "a.parquet", toy.raw_rows(8, 2))
    assert tokenize(raw, tmp_path / "stores", toy_world.backbone, "--task", "retrieval") == 0
    line = capsys.readouterr().out.splitlines()[0]
    assert line.split()[:4] == ["a", "retrieval", "8", "rows"]
    assert not any(word in line for word in ("truncated", "skipped", "left out"))


def test_a_misspelt_column_is_named_with_the_one_that_was_meant(toy_world, raw, tmp_path, capsys):
    toy.write_parquet(raw / "a.parquet", [{"Query": "q", "pasage": "p", "negative_1": "n"}])
    assert tokenize(raw, tmp_path / "stores", toy_world.backbone, "--task", "retrieval") == 2
    said = "no query and positive among them (Query may be query, pasage may be passage); have query, passage"
    assert said in capsys.readouterr().err


def test_everything_wrong_is_said_at_once_and_nothing_is_written(toy_world, raw, tmp_path, capsys):
    (raw / "not_parquet.parquet").write_bytes(b"this is no Parquet file, whatever its name says")
    (raw / "empty.parquet").write_bytes(b"")
    (raw / "no_json.jsonl").write_text("query,passage\n")
    (raw / "half.jsonl").write_text('{"query": "q", "passage": "p"}\n{"query": "q", "pass\n')
    toy.write_parquet(raw / "no_column.parquet", [{"query": "q", "answer": "p"}])
    toy.write_parquet(raw / "numbers.parquet", [{"query": "q", "passage": 3}])
    toy.write_parquet(raw / "bad name.parquet", toy.raw_rows(3, 1))
    toy.write_parquet(raw / "unknown.parquet", toy.raw_rows(3, 1))
    (raw / "tasks.json").write_text('{"numbers": "retrieval", "no_column": "sorting"}')
    assert tokenize(raw, tmp_path / "stores", toy_world.backbone, "--task", "good=ranking") == 2
    error = capsys.readouterr().err
    for line in (
        "not_parquet.parquet: not a Parquet file",
        "empty.parquet: the file is empty",
        "no_json.jsonl: row 0 (counted from 0) is not JSON",
        "half.jsonl: row 1 (counted from 0) is not JSON",
        "no_column.parquet: columns query, answer: no query and positive among them",
        'tasks.json: no_column: "sorting" is not one of retrieval, clustering, classification',
        "numbers.parquet: column 'passage' holds int64, not text",
        "bad name.parquet: dataset name 'bad name'",
        "unknown.parquet: no task is known for 'unknown': give --task unknown=retrieval",
        "--task good=ranking: 'ranking' is not one of retrieval, clustering, classification",
    ):
        assert line in error, line
    assert "Traceback" not in error
    assert not (tmp_path / "stores").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--input_dir", "nowhere"], "--input_dir nowhere: no such folder"),
        (["--tokenizer_path", "nowhere/at_all"], "--tokenizer_path 'nowhere/at_all': no tokenizer there"),
        (["--max_seq_length", "1"], "--max_seq_length must be at least 2"),
    ],
)
def test_wrong_flags(toy_world, raw, tmp_path, capsys, flags, message):
    toy.write_parquet(raw / "a.parquet", toy.raw_rows(3, 1))
    assert tokenize(raw, tmp_path / "stores", toy_world.backbone, "--task", "retrieval", *flags) == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_data_is_an_error(toy_world, raw, tmp_path, capsys):
    assert tokenize(raw, tmp_path / "stores", toy_world.backbone) == 2
    assert "no file with one of the endings .parquet, .jsonl" in capsys.readouterr().err


def test_what_comes_late_in_a_large_jsonl_is_read(toy_world, raw, tmp_path):
    # `datasets` fixes columns and types by the first 10 MB; a scan of all keys does not.
    filler = "word " * 1000
    rows = [{"query": f"q{i}", "passage": f"p{i} {filler}"} for i in range(2200)]
    rows.append({"query": "last", "passage": "p", "negative_2": "late", "meta": {"pos": 1}})
    write_jsonl(raw / "x.jsonl", rows)
    assert (raw / "x.jsonl").stat().st_size > 11e6
    assert tokenize(raw, tmp_path / "stores", toy_world.backbone, "--task", "retrieval") == 0
    store = open_store(tmp_path / "stores" / "x")
    tokenizer, _ = load_tokenizer(str(toy_world.backbone))
    assert texts_of(store, tokenizer)[-1] == ["last", "p", "late"]
    assert (store.tuples[:-1, 2] == -1).all()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"query": "q", "passage": 3}', "row 1 (counted from 0): 'passage' holds 3, not text"),
        ('{"query": ["q"], "passage": "p"}', "row 1 (counted from 0): 'query' holds [\"q\"], not text"),
        ('["q", "p"]', "row 1 (counted from 0) is not an object"),
        ('{"query": "q", "passage": "\\ud800"}', "row 1 (counted from 0): 'passage' holds"),
        ("\udcff", "row 1 (counted from 0) is not UTF-8: save"),
    ],
)
def test_a_bad_line_is_named(toy_world, raw, tmp_path, capsys, line, message):
    text = '{"query": "q", "passage": "p"}\n\n' + line + "\n"
    (raw / "x.jsonl").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert tokenize(raw, tmp_path / "stores", toy_world.backbone, "--task", "retrieval") == 2
    assert message in capsys.readouterr().err


def test_other_encodings_of_text_columns_are_read(toy_world, raw, tmp_path):
    rows = toy.raw_rows(9, 2)
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, raw / "plain.parquet")
    wide = {name: table[name].cast(pa.large_string()) for name in table.column_names}
    pq.write_table(pa.table(wide | {"passage": table["passage"].dictionary_encode()}), raw / "other.parquet")
    assert tokenize(raw, tmp_path / "stores", toy_world.backbone, "--task", "retrieval") == 0
    plain, other = (open_store(tmp_path / "stores" / name) for name in ("plain", "other"))
    assert np.array_equal(plain.tokens, other.tokens)
    assert np.array_equal(plain.tuples, other.tuples)


def test_negatives_that_are_cut_to_their_positive_are_left_out_and_counted(toy_world, raw, tmp_path, capsys):
    long = "one two three four five six seven eight nine ten"
    row = {"query": "q", "passage": f"{long} yes", "negative_1": f"{long} no", "negative_2": "other"}
    toy.write_parquet(raw / "x.parquet", [row])
    assert tokenize(raw, tmp_path / "stores", toy_world.backbone, "--task", "retrieval", "--max_seq_length", "8") == 0
    assert "1 negative equal to the positive left out" in capsys.readouterr().out
    assert open_store(tmp_path / "stores" / "x").tuples[0, 2:].tolist() == [-1, 3]


def test_a_folder_that_is_no_store_is_left_alone(toy_world, raw, tmp_path, capsys):
    toy.write_parquet(raw / "x.parquet", toy.raw_rows(3, 1))
    mine = tmp_path / "stores" / "x" / "thesis.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    arguments = (raw, tmp_path / "stores", toy_world.backbone, "--task", "retrieval", "--overwrite", "true")
    assert tokenize(*arguments) == 2
    assert "is not a token store and would be replaced" in capsys.readouterr().err
    assert mine.read_text() == "mine"


def test_an_output_folder_below_a_file_is_refused(toy_world, raw, tmp_path, capsys):
    toy.write_parquet(raw / "x.parquet", toy.raw_rows(3, 1))
    (tmp_path / "file").write_text("")
    assert tokenize(raw, tmp_path / "file" / "stores", toy_world.backbone, "--task", "retrieval") == 2
    assert "file is a file" in capsys.readouterr().err


@pytest.mark.parametrize("skip", [0, 4, 10, 17, 29, 30])
def test_parquet_is_read_on_from_any_row_page_by_page(tmp_path, skip):
    path, names = tmp_path / "a.parquet", ["query", "passage"]
    texts = [f"text {number}" for number in range(30)]
    pq.write_table(pa.table({"query": texts, "passage": texts[::-1]}), path, row_group_size=10)
    parts = list(raw_formats.read(path, raw_columns.find_columns(names).types, 7, skip))
    assert all(len(part) <= 7 for part in parts)
    assert [row for part in parts for row in part.to_pylist()] == [
        {"query": query, "passage": passage} for query, passage in zip(texts[skip:], texts[::-1][skip:], strict=True)
    ]


def test_a_large_row_group_is_never_held_whole(tmp_path):
    path, text = tmp_path / "a.parquet", "x" * 100
    texts = pa.array([f"{number}{text}" for number in range(200_000)])
    pq.write_table(pa.table({"query": texts, "passage": texts}), path, row_group_size=2**20, compression="none")
    held = []
    for _ in raw_formats.read(path, raw_columns.find_columns(["query", "passage"]).types, 1000):
        held.append(pa.total_allocated_bytes())
    assert len(held) == 200
    assert max(held) - texts.nbytes < path.stat().st_size / 4  # 43 MB in all


# --------------------------------------------------------------------------- settings of datasets


def test_an_instruction_is_given_when_tokenising_and_must_be_the_one_that_was(settings, toy_world, tmp_path, capsys):
    raw, stores = tmp_path / "raw", tmp_path / "stores"
    raw.mkdir()
    rows = [{"query": f"a query {number}", "passage": f"a passage {number}"} for number in range(40)]
    (raw / "plain.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    stores.mkdir()
    path = stores / "dataset_settings.json"
    path.write_text(json.dumps({"plain": {"instruction": "Find it."}}))
    assert tokenize(raw, stores, toy_world.backbone, "--task", "retrieval") == 0
    assert "100.0% of the retrieval queries carry the instruction 'Find it.'" in capsys.readouterr().out
    config = settings | {"train_data_path": str(stores), "train_steps": 1}
    assert door_here(config) == 0
    assert "plain  instruction 'Find it.'" in capsys.readouterr().out

    path.write_text(json.dumps({"*": {"instruction": "Find another."}}))
    assert door_here(config) == 2
    said = f"{path}: instruction: 'Find another.', but plain was tokenised with 'Find it.': tokenise again"
    assert said in capsys.readouterr().err


def test_tokenising_reads_the_file_where_training_does_and_refuses_one_beside_the_raw_files(
    toy_world, tmp_path, capsys
):
    raw, stores = tmp_path / "raw", tmp_path / "stores"
    raw.mkdir()
    shutil.copy(toy_world.raw / "toy_retrieval.parquet", raw)
    arguments = (raw, stores, toy_world.backbone, "--task", "retrieval")
    path = raw / "dataset_settings.json"
    path.write_text(json.dumps({"toy_retrieval": {"instruction": "Find it."}, "not_here": {}}))
    assert tokenize(*arguments) == 2
    assert f"{path}: belongs beside the stores: move it to {stores}" in capsys.readouterr().err
    path.write_text(json.dumps({"*": {"instructon": "Find it."}}))
    assert tokenize(*arguments, "--dataset_settings", str(path)) == 2
    assert "*: instructon: no such setting; did you mean instruction?" in capsys.readouterr().err
    path.write_text(json.dumps({"*": {"instruction": "Instruct: Find it.\nQuery: a\nQuery: b"}}))
    assert tokenize(*arguments, "--dataset_settings", str(path)) == 2
    assert "give one instruction" in capsys.readouterr().err
    path.write_text(json.dumps({"*": {"instruction": "Find it."}}))
    assert tokenize(*arguments, "--dataset_settings", str(path)) == 0
    inputs = json.loads((stores / "toy_retrieval" / "meta.json").read_text())["inputs"]
    assert inputs["instruction"] == "Find it."
    assert tokenize(*arguments, "--dataset_settings", str(path), "--instruction", "Find that.") == 2  # flags win
    assert "instruction 'Find it.' -> 'Find that.'" in capsys.readouterr().err
