"""The mining command: what it writes and says, what it refuses, and one launch on two processes.

python -m pytest tests/tools/test_mine_hard_negatives.py
"""

import json
import os

import harness
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_encoders
import toy
from conftest import tokenize
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import mine_hard_negatives as mine_with_library

from data.token_store import open_store
from examples.models import minilm
from tools import mine_hard_negatives

FEW = ["--num_negatives", "3", "--range_min", "1", "--range_max", "60", "--max_score", "none", "--relative_margin", "0"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return tiny_encoders.make_encoder(tmp_path_factory.mktemp("model") / "encoder")


@pytest.fixture
def raw(tmp_path):
    return toy.write_parquet(tmp_path / "raw" / "questions.parquet", toy.raw_rows(80, 0))


def mine(raw, *more: str, name: str = "questions") -> tuple[int, list[dict], dict]:
    """Call the command: (exit status, rows written, report)."""
    output = raw.parent.parent / "mined" / f"{name}.parquet"
    status = mine_hard_negatives.main(["--input", str(raw), "--output", str(output), *more])
    report = output.with_name(f"{name}.report.json")
    written = pq.read_table(output).to_pylist() if output.exists() else []
    return status, written, json.loads(report.read_text()) if report.exists() else {}


def test_a_file_is_mined_reported_and_can_be_tokenised(raw, encoder, toy_world, capsys):
    (raw.parent / "tasks.json").write_text('{"questions": "retrieval"}')
    status, written, report = mine(raw, "--model", str(encoder), *FEW)
    assert status == 0
    assert list(written[0]) == ["query", "passage", "negative_1", "negative_2", "negative_3"]
    order = [row["query"] for row in toy.raw_rows(80, 0)]
    places = [order.index(row["query"]) for row in written]
    assert places == sorted(places)
    assert report["counts"]["rows_written"] == len(written) > 10
    assert report["settings"]["rules"]["relative_margin"] == 0
    printed = capsys.readouterr().out
    assert "80 rows, 80 distinct queries, 80 distinct passages" in printed
    assert "Sentence Transformers" in printed
    folder = raw.parent.parent / "mined"
    assert (folder / "questions.report.png").exists()
    assert tokenize(folder, raw.parent.parent / "stores", toy_world.backbone) == 0
    assert open_store(raw.parent.parent / "stores" / "questions").tuples.shape == (len(written), 5)


def test_an_instruction_is_put_before_queries_that_carry_none(raw, encoder):
    table = [{"query": row["query"].split("Query: ")[1], "passage": row["passage"]} for row in toy.raw_rows(40, 0)]
    table[3]["query"] = "Instruct: Its own.\nQuery: blue"
    toy.write_parquet(raw, table)
    words = ["--model", str(encoder), *FEW, "--relative_margin", "none"]
    _, written, _ = mine(raw, *words, "--instruction", "Find it.")
    queries = [row["query"] for row in written]
    assert queries[0] == f"Instruct: Find it.\nQuery: {table[0]['query']}"
    assert queries[3] == table[3]["query"]
    _, stripped, _ = mine(raw, *words, "--instruction", "Find it.", "--strip_instruction", "true", name="stripped")
    _, bare, _ = mine(raw, *words, name="bare")
    assert [row["negative_1"] for row in stripped[4:]] == [row["negative_1"] for row in bare[4:]]
    assert [row["negative_1"] for row in stripped] != [row["negative_1"] for row in written]


def test_a_models_own_prompts_are_for_the_model_alone(raw, tmp_path):
    folder = tiny_encoders.make_encoder(tmp_path / "model", {"query": "castle castle ", "document": "engine "})
    words = ["--model", str(folder), *FEW]
    _, written, report = mine(raw, *words)
    assert all(row["passage"].startswith("The ") for row in written)
    assert report["settings"]["model"]["corpus_prompt"] == "engine "
    _, _, report = mine(raw, *words, "--corpus_prompt", "", name="without")
    assert report["settings"]["model"]["corpus_prompt"] == ""


def test_a_cross_encoder_decides(raw, encoder, tmp_path):
    folder = tiny_encoders.make_cross_encoder(tmp_path / "cross")
    toy.write_parquet(raw, toy.raw_rows(30, 0))
    words = ["--model", str(encoder), *FEW]
    _, by_cosine, _ = mine(raw, *words)
    status, by_cross, report = mine(raw, *words, "--cross_encoder", str(folder), name="cross")
    assert status == 0
    assert report["settings"]["cross_encoder"] == "cross"
    assert len(by_cross) > 5
    assert [row["negative_1"] for row in by_cross] != [row["negative_1"] for row in by_cosine]
    _, lexical, _ = mine(raw, *FEW, "--backend", "bm25", "--cross_encoder", str(folder), name="lexical")
    assert len(lexical) > 5


def test_the_cache_can_go_when_all_is_done(raw, encoder):
    mine(raw, "--model", str(encoder), *FEW, "--keep_cache", "false")
    shared = raw.parent.parent / "shared"
    shared.mkdir()
    (shared / "of others").touch()
    mine(raw, "--model", str(encoder), *FEW, "--keep_cache", "false", "--cache_dir", str(shared))
    assert [path.name for path in shared.iterdir()] == ["of others"]
    assert sorted(path.name for path in (raw.parent.parent / "mined").iterdir()) == [
        "questions.parquet",
        "questions.report.json",
        "questions.report.png",
    ]


@pytest.mark.weights
def test_all_minilm_mines_as_in_sentence_transformers(raw, tmp_path):
    pytest.importorskip("all_minilm_l6_v2")
    folder = minilm.unpack(tmp_path / "all-MiniLM-L6-v2")
    table = [{"query": row["query"].split("Query: ")[1], "passage": row["passage"]} for row in toy.raw_rows(150, 0)]
    toy.write_parquet(raw, table)
    numbers = {"range_min": 5, "range_max": 100, "max_score": 0.8, "relative_margin": 0.05, "num_negatives": 8}
    words = [word for name, value in numbers.items() for word in (f"--{name}", str(value))]
    _, written, _ = mine(raw, "--model", str(folder), *words)
    model = SentenceTransformer(str(folder), device="cpu")
    expected = mine_with_library(Dataset.from_list(table), model, **numbers, output_format="n-tuple", verbose=False)
    assert written == list(expected)
    assert 10 < len(written) < 150


# ----------------------------------------------------------------------------------------- bad input


def refused(capsys, raw, *more: str) -> str:
    """What the command says when it refuses; nothing is written."""
    output = raw.parent.parent / "mined"
    output.mkdir(exist_ok=True)
    (output / "questions.parquet").write_text("as it was")
    words = ["--input", str(raw), "--output", str(output / "questions.parquet"), *more]
    assert mine_hard_negatives.main(words) == 2
    assert (output / "questions.parquet").read_text() == "as it was"
    return capsys.readouterr().err


def test_flags_that_make_no_sense_are_refused_together(raw, encoder, capsys):
    said = refused(
        capsys, raw, *("--num_negatives", "0", "--relative_margin", "5", "--instruction", "", "--max_length", "1")
    )
    for words in (
        "num_negatives must",
        "relative_margin is a share",
        "needs --model",
        "--instruction ''",
        "max_length",
    ):
        assert words in said
    itself = str(raw.parent.parent / "mined" / "questions.parquet")
    assert "is an input too" in refused(capsys, raw, "--backend", "bm25", "--corpus", itself)
    grouped = ["--backend", "faiss", "--model", str(encoder), "--group_column", "x"]
    assert "does not work with --backend faiss" in refused(capsys, raw, *grouped)
    assert "no such folder" in refused(capsys, raw, "--model", "nowhere/at-all")
    assert "no column 'x'" in refused(capsys, raw, "--backend", "bm25", "--group_column", "x")


def test_files_that_cannot_be_read_are_named(raw, capsys):
    bm25 = ["--backend", "bm25"]
    assert "no such file" in refused(capsys, raw.with_name("nowhere.parquet"), *bm25).lower()
    toy.write_parquet(raw, [{"question": "a", "passage": "b"}])
    assert "no query and positive among them" in refused(capsys, raw, *bm25)
    lines = raw.with_suffix(".jsonl")
    lines.write_bytes(b'{"query": "a", "passage": "b"}\n{"query": "\xff", "passage": "b"}\n')
    assert "row 1 (counted from 0) is not UTF-8" in refused(capsys, lines, *bm25)
    broken = pa.array([b"old river", b"\xff\xfe"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"query": ["a", "b"], "passage": broken}), raw)
    assert "row 1 (counted from 0): 'passage' is not UTF-8" in refused(capsys, raw, *bm25)
    toy.write_parquet(raw, toy.raw_rows(9, 0))
    corpus = toy.write_parquet(raw.with_name("corpus.parquet"), [{"title": "a", "body": "b"}])
    said = refused(capsys, raw, *bm25, "--corpus", str(corpus))
    assert "no column passage or text" in said
    assert "the columns are title, body: choose one with --corpus_column" in said
    (raw.parent / "tasks.json").write_text('{"questions": "classification"}')
    assert "its task is classification" in refused(capsys, raw, *bm25)


def test_rows_without_a_text_are_refused_or_left_out_and_counted(raw, capsys):
    table = toy.raw_rows(40, 0)
    table[3]["query"] = "  "
    table[5]["passage"] = None
    table[7] = table[6]
    toy.write_parquet(raw, table)
    said = refused(capsys, raw, "--backend", "bm25")
    assert "1 row with an empty or null query (row 3, counted from 0)" in said
    assert "1 row with an empty or null positive (row 5" in said
    (raw.parent.parent / "mined" / "questions.parquet").unlink()
    status, written, report = mine(raw, "--backend", "bm25", "--num_negatives", "2", "--skip_bad_rows", "true")
    assert status == 0
    assert report["counts"]["bad_rows"] == 2
    assert report["counts"]["duplicate_rows"] == 1
    assert len(written) + report["counts"]["rows_dropped"] == 38
    printed = capsys.readouterr().out
    assert "2 rows without query or passage left out" in printed
    assert "1 row with the query and passage of an earlier one" in printed


def test_fewer_texts_than_negatives_are_refused_unless_fewer_will_do(raw, capsys):
    toy.write_parquet(raw, toy.raw_rows(9, 0))
    said = refused(capsys, raw, "--backend", "bm25")
    assert "there are 9 distinct passages, one of them the positive, and --num_negatives 24 are wanted" in said
    (raw.parent.parent / "mined" / "questions.parquet").unlink()
    status, written, _ = mine(raw, "--backend", "bm25", "--too_few", "fewer", "--range_min", "0")
    assert status == 0
    assert len(written) == 9
    assert all(row["negative_24"] is None for row in written)


def test_a_mining_that_leaves_no_row_says_so_and_writes_none(raw, encoder, capsys):
    status, written, report = mine(raw, "--model", str(encoder), *FEW, "--min_score", "0.9999")
    assert (status, written) == (1, [])
    assert report["candidates"]["min_score"] > 0
    assert "no row has 3 negatives" in capsys.readouterr().err


def test_a_text_of_a_megabyte_is_cut_and_counted(raw, encoder, capsys):
    table = toy.raw_rows(40, 0)
    table[7]["passage"] = "old river " * 100_000
    toy.write_parquet(raw, table)
    status, written, report = mine(raw, "--model", str(encoder), *FEW, "--relative_margin", "none")
    assert status == 0
    assert report["counts"]["passages_cut"] >= 1
    assert f"{report['counts']['passages_cut']} of 40 passages were longer" in capsys.readouterr().out
    assert written[7]["passage"] == table[7]["passage"]  # whole in the output


# ------------------------------------------------------------------------------------------ a launch


@pytest.mark.processes
def test_two_launched_processes_write_the_bytes_of_one(raw, toy_world, tmp_path):
    words = ["--input", raw, "--model", toy_world.backbone, *FEW]
    alone = tmp_path / "alone" / "questions.parquet"
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    assert mine_hard_negatives.main([*map(str, words), "--output", str(alone)]) == 0
    launched = tmp_path / "launched" / "questions.parquet"
    launcher = ["-m", "accelerate.commands.launch", "--config_file", "configs/accelerate_cpu.yaml"]
    done = harness.run_command(
        *launcher, *map(str, ["-m", "tools.mine_hard_negatives", *words, "--output", launched]), environment=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert launched.read_bytes() == alone.read_bytes()
    assert done.stdout.count("80 rows") == 1  # the first process speaks
