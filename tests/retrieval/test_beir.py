"""Retrieval sets in BEIR's layout: what is read, and everything that is refused, with its place.

python -m pytest tests/retrieval/test_beir.py
"""

import json
import tracemalloc
from pathlib import Path

import pytest

from retrieval import beir
from retrieval.beir import CORPUS, JUDGEMENTS, QUERIES, read_set, read_sets
from utils import RunError

QUESTIONS = [{"_id": "q1", "text": "what is old?"}, {"_id": "q2", "text": "where is it?"}, {"_id": "q3", "text": "?"}]
DOCUMENTS = [
    {"_id": "d1", "title": "The river", "text": "It is old. "},
    {"_id": "d10", "title": "", "text": "A castle."},
    {"_id": "d9", "text": "価値 is not ASCII"},
    {"_id": "d2", "title": None, "text": ""},
]
SCORES = "query-id\tcorpus-id\tscore\nq2\td9\t1\nq1\td1\t2\nq1\td2\t0\n"


def write(folder: Path, queries: list | str = QUESTIONS, corpus: list | str = DOCUMENTS, scores: str = SCORES) -> Path:
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    for name, rows in ((QUERIES, queries), (CORPUS, corpus)):
        if not isinstance(rows, str):
            rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / name).write_text(rows, encoding="utf-8")
    (folder / JUDGEMENTS).write_text(scores, encoding="utf-8")
    return folder


def test_a_set_has_the_judged_queries_and_all_documents_by_descending_id(tmp_path):
    found = read_set(write(tmp_path / "old_things"))
    assert found.name == "old_things"
    assert found.query_ids == ["q1", "q2"]  # q3 is not judged
    assert found.queries == ["what is old?", "where is it?"]
    assert found.document_ids == ["d9", "d2", "d10", "d1"]
    assert found.documents[0:3] == ["価値 is not ASCII", "", "A castle."]
    assert found.documents[3:9] == ["The river It is old."]
    assert len(found.documents) == 4
    assert found.relevance == [{3: 2, 1: 0}, {0: 1}]


def test_the_header_may_be_missing_and_lines_may_end_as_windows_ends_them(tmp_path):
    folder = write(tmp_path / "a", scores="\r\n".join(["q2\td9\t1", "q1\td1\t-1", "", ""]))
    (folder / QUERIES).write_bytes((folder / QUERIES).read_bytes().replace(b"\n", b"\r\n\r\n"))
    assert read_set(folder).relevance == [{3: -1}, {0: 1}]
    assert read_set(folder).queries == ["what is old?", "where is it?"]


def test_ids_may_be_numbers(tmp_path):
    rows = [{"_id": number, "text": f"text {number}"} for number in range(3)]
    found = read_set(write(tmp_path / "a", rows, rows, "1\t2\t1\n"))
    assert (found.query_ids, found.relevance) == (["1"], [{0: 1}])


def test_all_that_is_wrong_is_named_at_once(tmp_path):
    queries = [*QUESTIONS, {"_id": "q1", "text": "again"}, {"_id": "q4", "text": " "}, {"_id": "q5"}]
    corpus = [*DOCUMENTS, {"_id": "d1", "text": "again"}, {"_id": "d10", "text": "again"},
              {"_id": "d5", "text": "\ud800"}, {"_id": "d6", "text": "x", "title": 3}, ["d7"],
              {"_id": True, "text": ""}]  # fmt: skip
    corpus = "".join(json.dumps(row) + "\n" for row in corpus) + "{\n"
    scores = SCORES + "q9\td1\t1\nq1\td8\t1\nq1\td9\t1.5\nq1\td1\nq1\td1\t3\nq4\td1\t1\nq8\td1\t1\n"
    folder = write(tmp_path / "a", queries, corpus, scores)
    _, problems = read_sets(str(folder))
    assert problems == [
        f"{folder / QUERIES}, line 4: 'q1': an id that an earlier line has",
        f"{folder / QUERIES}, line 6: text is missing, or not a text",
        f"{folder / CORPUS}, line 5: 'd1': an id that an earlier line has; and 1 more like it",
        f"{folder / CORPUS}, line 7: half of a surrogate pair, which no tokenizer reads",
        f"{folder / CORPUS}, line 8: title is not a text",
        f"{folder / CORPUS}, line 9: not an object with _id and text",
        f"{folder / CORPUS}, line 10: _id is missing, or not a text",
        f"{folder / CORPUS}, line 11: not JSON",
        f"{folder / JUDGEMENTS}, line 5: 'q9': a query that is not in queries.jsonl; and 1 more like it",
        f"{folder / JUDGEMENTS}, line 6: 'd8': a document that is not in corpus.jsonl",
        f"{folder / JUDGEMENTS}, line 7: '1.5': a score that is not a whole number",
        f"{folder / JUDGEMENTS}, line 8: not a query, a document and a score, separated by tabs",
        f"{folder / JUDGEMENTS}, line 9: a different score than before for the same query and document",
        f"{folder / QUERIES}, 'q4': an empty query",
    ]
    with pytest.raises(RunError, match="line 4: 'q1': an id that an earlier line has\n"):
        read_set(folder)


def test_a_set_without_files_documents_or_answers_is_refused(tmp_path):
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / CORPUS).write_text("")
    _, problems = read_sets(str(tmp_path / "part"))
    whole = "a set has queries.jsonl, corpus.jsonl, qrels/test.tsv"
    assert problems == [f"{tmp_path / 'part' / name}: missing; {whole}" for name in (QUERIES, JUDGEMENTS)]
    folder = write(tmp_path / "empty", corpus=[], scores="q1\td1\t0\n")
    _, problems = read_sets(str(folder))
    assert f"{folder / CORPUS}: no document" in problems
    assert f"{folder / JUDGEMENTS}: no query has a document of a score above 0" in problems


def test_a_folder_of_sets_or_several_folders_are_read(tmp_path, monkeypatch):
    for name in ("b", "a"):
        write(tmp_path / "sets" / name)
    (tmp_path / "sets" / "notes").mkdir()
    write(tmp_path / "c")
    sets, problems = read_sets(f"{tmp_path / 'sets'}, {tmp_path / 'c'},")
    assert ([one.name for one in sets], problems) == (["a", "b", "c"], [])
    _, problems = read_sets(f"{tmp_path / 'sets'},{tmp_path / 'sets' / 'a'},{tmp_path / 'none'}")
    assert problems == [
        f"{tmp_path / 'sets' / 'a'}: a second set of the name a: rename one of the folders",
        f"{tmp_path / 'none'}: no such folder",
    ]
    monkeypatch.chdir(tmp_path / "c")
    assert [one.name for one in read_sets(".")[0]] == ["c"]
    (tmp_path / "other").mkdir()
    _, [problem] = read_sets(str(tmp_path / "other"))
    assert "neither a retrieval set nor a folder of some" in problem


def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    folder = write(tmp_path / "a")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", str(folder / CORPUS))

    monkeypatch.setattr(beir, "_rows", refuse)
    assert read_sets(str(folder)) == ([], [f"{folder / CORPUS}: cannot be read: Permission denied"])


def test_memory_does_not_grow_with_the_texts(tmp_path):
    """Ids and places alone are kept; a chunk of texts is in memory while it is asked for."""
    rows = [{"_id": f"d{number}", "text": f"{number} " + "long text " * 400} for number in range(3000)]
    folder = write(tmp_path / "a", corpus=rows, scores="q1\td7\t1\n")
    size = (folder / CORPUS).stat().st_size
    tracemalloc.start()
    found = read_set(folder)
    texts = found.documents[2990:3000]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(texts) == 10
    assert size > 12e6
    assert peak < size / 6
