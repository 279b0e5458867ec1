"""The texts of an evaluation set are found in training, whatever their case and spaces.

python -m pytest tests/tuples/test_inspection_evaluation.py
"""

import json

import numpy as np
import pyarrow as pa
import pytest
import toy

from data.raw_rows import RawError
from tuples.inspection.evaluation import comparable_keys, read_evaluation
from tuples.inspection.texts import MISSING


def keys(*texts: str) -> np.ndarray:
    return comparable_keys(pa.array(texts, pa.large_string()))


def write_beir(folder, judgements: dict[str, str]):
    folder.mkdir()
    queries = [{"_id": f"q{number}", "text": f"Query number {number}?"} for number in range(4)]
    documents = [{"_id": f"d{number}", "title": "A title", "text": f"Document {number}."} for number in range(4)]
    documents[1].pop("title")
    for name, rows in (("queries", queries), ("corpus", documents)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, lines in judgements.items():
        (folder / "qrels").mkdir(exist_ok=True)
        (folder / "qrels" / name).write_text("query-id\tcorpus-id\tscore\n" + lines)
    return folder


def test_raw_tuples_are_compared_without_instruction_case_and_spaces(tmp_path):
    rows = [{"query": "Instruct: Find it.\nQuery: Where  is IT?", "passage": "Here.", "negative_1": "There."}]
    found = read_evaluation(toy.write_parquet(tmp_path / "held_out.parquet", rows))
    columns = [keys("where is it?", "Where?", "there."), keys("x", "here. ", "y")]
    assert found.has_query(columns).tolist() == [True, False, False]
    assert found.has_passage(columns).tolist() == [False, True, False]
    assert (len(found.queries), len(found.passages)) == (1, 1)
    assert found.queries.was_found.all()
    assert found.passages.was_found.all()
    assert not found.has_query([np.array([MISSING])]).any()


@pytest.mark.parametrize(("judgements", "queries", "documents"), [
    ({}, [0, 1, 2, 3], [0, 1, 2, 3]),
    ({"test.tsv": "q1\td1\t1\nq1\td2\t0\nq2\td3\t2\n", "train.tsv": "q0\td0\t1\n"}, [1, 2], [1, 3]),
    ({"dev.tsv": "q1\td1\t1\n", "other.tsv": "q3\td0\t1\n"}, [1, 3], [0, 1]),
], ids=["no judgements", "test", "others"])  # fmt: skip
def test_of_a_beir_folder_judged_queries_and_relevant_documents_count(tmp_path, judgements, queries, documents):
    found = read_evaluation(write_beir(tmp_path / "beir", judgements))
    all_queries = keys(*[f"query  NUMBER {number}?" for number in range(4)])
    assert np.flatnonzero(found.has_query([all_queries])).tolist() == queries
    without_title = keys(*[f"document {number}." for number in range(4)])
    with_title = keys(*[f"A title\nDocument {number}." for number in range(4)])
    assert np.flatnonzero(found.has_passage([without_title])).tolist() == documents
    assert found.passages.was_found.all()
    assert np.flatnonzero(found.has_passage([with_title])).tolist() == [number for number in documents if number != 1]
    assert len(found.passages) == len(documents)  # with and without title they are the same ones


@pytest.mark.parametrize(("break_it", "words"), [
    (lambda folder: (folder / "corpus.jsonl").unlink(), "corpus.jsonl is missing"),
    (lambda folder: (folder / "queries.jsonl").write_text('{"_id": "q0"}'), "row 0 (counted from 0) has no 'text'"),
    (lambda folder: (folder / "qrels" / "test.tsv").write_text("a\tb\n1\t2\n"), "must name query-id, corpus-id and"),
    (lambda folder: (folder / "corpus.jsonl").write_bytes(b"\xff\n"), "row 0 (counted from 0) is not"),
], ids=["no corpus", "no text", "other judgements", "not UTF-8"])  # fmt: skip
def test_a_broken_beir_folder_is_refused_by_its_file(tmp_path, break_it, words):
    folder = write_beir(tmp_path / "beir", {"test.tsv": "q1\td1\t1\n"})
    break_it(folder)
    with pytest.raises(RawError) as refused:
        read_evaluation(folder)
    assert words in str(refused.value)
    assert str(folder) in str(refused.value)


def test_what_is_no_evaluation_set_is_refused(tmp_path):
    with pytest.raises(RawError, match="no such file"):
        read_evaluation(tmp_path / "nothing")
    with pytest.raises(RawError, match="neither raw tuples"):
        read_evaluation(tmp_path)
    (tmp_path / "held_out.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(RawError, match=r"held_out\.jsonl: columns text: no query and positive"):
        read_evaluation(tmp_path)
