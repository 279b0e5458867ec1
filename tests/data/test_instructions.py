"""Instructions: counted in every query, added where a query carries none, and known to whoever opens the stores.

python -m pytest tests/data/test_instructions.py
"""

import json

import pytest
import toy
from conftest import RETRIEVAL, contents, tokenize, write_jsonl

from data import instructions
from data.token_store import instruction_shares, open_store, usual_instruction
from modeling import prompts
from utils import seal


@pytest.fixture
def queries(tuples):
    """A function (name, *flags) -> the queries in a raw file's store."""
    return lambda name, *flags: [row[0] for row in tuples(name, *RETRIEVAL, *flags)]


def write_queries(path, queries):
    write_jsonl(path, [{"query": query, "passage": "p"} for query in queries])


def found_in(store) -> dict:
    return store.meta["stats"]["instructions"]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("Instruct: Find it.\nQuery: a bridge", ("Find it.", "a bridge")),
        ("Instruct: Two\nlines.\nQuery: a\nQuery: b", ("Two\nlines.", "a\nQuery: b")),
        ("a bridge", (None, "a bridge")),
        ("Instruct: Find it.", (None, "Instruct: Find it.")),
        ("Instruct: Find it.\nQuery:a", (None, "Instruct: Find it.\nQuery:a")),  # without the space: another text
        ("Instruct: \nQuery: a", (None, "Instruct: \nQuery: a")),
        ("", (None, "")),
    ],
)
def test_a_query_is_split_where_its_prompt_ends(text, parts):
    assert prompts.split_prompt(text) == parts
    instruction, query = parts
    assert prompts.query_prompt(instruction or "") + query == text


def test_a_store_knows_how_many_queries_carry_which_instruction(toy_world, raw, tmp_path, queries):
    texts = (
        ["Instruct: A\nQuery: x"] * 5
        + ["Instruct: B\nQuery: y"] * 3
        + ["plain", "Instruct:C\nQuery: spelled otherwise"]
    )
    write_queries(raw / "x.jsonl", texts)
    queries("x")
    store = open_store(tmp_path / "stores" / "x")
    assert found_in(store) == {"counts": {"A": 5, "B": 3}, "other": 1, "none": 1}
    assert found_in(open_store(toy_world.stores / "toy_retrieval")) == {
        "counts": {"Find it.": 200},
        "other": 0,
        "none": 0,
    }
    assert instruction_shares([store]) == {"x": {"A": 0.5, "B": 0.3}}


def test_the_ten_most_frequent_are_kept_and_the_others_counted(raw, tmp_path, queries, monkeypatch):
    texts = [f"Instruct: {number:02}\nQuery: x" for number in range(14) for _ in range(number + 1)]
    write_queries(raw / "x.jsonl", texts)
    queries("x")
    found = found_in(open_store(tmp_path / "stores" / "x"))
    assert list(found["counts"].items()) == [(f"{number:02}", number + 1) for number in range(13, 3, -1)]
    assert found["other"] == 1 + 2 + 3 + 4
    monkeypatch.setattr(instructions, "_COUNTED", 3)  # as if there were a hundred times as many
    queries("x", "--overwrite", "true", "--max_seq_length", "64")
    found = found_in(open_store(tmp_path / "stores" / "x"))
    assert found == {"counts": {"02": 3, "01": 2, "00": 1}, "other": len(texts) - 6, "none": 0}


def test_only_tuples_that_are_written_are_counted(raw, tmp_path, queries):
    write_jsonl(raw / "x.jsonl", [{"query": "Instruct: A\nQuery: x", "passage": p} for p in ("p", "", "q")])
    queries("x", "--skip_bad_rows", "true")
    assert found_in(open_store(tmp_path / "stores" / "x"))["counts"] == {"A": 2}


def test_the_usual_instruction_is_that_of_most_retrieval_queries(raw, tmp_path, queries, capsys):
    write_queries(raw / "a.jsonl", ["Instruct: A\nQuery: x"] * 3 + ["plain"])
    write_queries(raw / "b.jsonl", ["Instruct: B\nQuery: x"] * 4)
    write_jsonl(raw / "c.jsonl", [{"query": "Instruct: C\nQuery: x", "passage": "p", "negative": "n"}] * 50)
    queries("a", "--task", "c=clustering")
    stores = [open_store(tmp_path / "stores" / name) for name in "abc"]
    assert usual_instruction(stores) == ("B", 0.5)
    assert usual_instruction(stores[:1]) == ("A", 0.75)
    assert usual_instruction(stores[2:]) == (None, 0.0)
    assert usual_instruction([]) == (None, 0.0)
    assert "50.0% of the retrieval queries carry the instruction 'B'" in capsys.readouterr().out


def test_queries_without_an_instruction_are_usual_too(raw, tmp_path, queries, capsys):
    write_queries(raw / "x.jsonl", ["Instruct: A\nQuery: x", "one", "two", "three"])
    queries("x")
    assert usual_instruction([open_store(tmp_path / "stores" / "x")]) == (None, 0.75)
    assert "75.0% of the retrieval queries carry no instruction; --instruction TEXT" in capsys.readouterr().out


def test_a_store_that_does_not_know_its_instructions_still_opens(raw, tmp_path, queries):
    write_queries(raw / "x.jsonl", ["Instruct: A\nQuery: x"])
    queries("x")
    path = tmp_path / "stores" / "x" / "meta.json"
    meta = json.loads(path.read_text())
    del meta["stats"]["instructions"], meta["check"]
    path.write_text(json.dumps(seal(meta)))
    store = open_store(path.parent)
    assert instruction_shares([store]) == {}
    assert usual_instruction([store]) == (None, 0.0)


def test_an_instruction_is_put_before_queries_that_carry_none(raw, tmp_path, queries, capsys):
    texts = ["plain", "Instruct: A\nQuery: x", "Instruct:spelled otherwise"]
    write_queries(raw / "x.jsonl", texts)
    write_queries(raw / "y.jsonl", texts)
    flags = ("--instruction", "Find x = y.", "--instruction", "y=Instruct: Find y.\nQuery: ")
    assert queries("x", *flags) == ["Instruct: Find x = y.\nQuery: plain", *texts[1:]]
    assert queries("y", *flags) == ["Instruct: Find y.\nQuery: plain", *texts[1:]]
    assert found_in(open_store(tmp_path / "stores" / "y"))["counts"] == {"A": 1, "Find y.": 1}

    before = contents(tmp_path / "stores")
    capsys.readouterr()
    assert queries("x", *flags)
    assert capsys.readouterr().out.count("already done") == 2
    assert contents(tmp_path / "stores") == before


@pytest.mark.parametrize(("first", "second"), [([], ["--instruction", "B"]), (["--instruction", "A"], [])])
def test_another_instruction_is_noticed(toy_world, raw, tmp_path, capsys, first, second):
    write_queries(raw / "x.jsonl", ["plain"])
    assert tokenize(raw, tmp_path / "stores", toy_world.backbone, *RETRIEVAL, *first) == 0
    assert tokenize(raw, tmp_path / "stores", toy_world.backbone, *RETRIEVAL, *second) == 2
    change = "instruction 'A' -> None" if first else "instruction None -> 'B'"
    assert f"made from other inputs ({change})" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["nobody=Find it."], "no file is called 'nobody'; the files are called x"),
        ([""], "give one instruction"),
        (["x= "], "give one instruction"),
        (["Find\nQuery: it."], "give one instruction"),
        (["A b", "C d"], "given twice for all files; keep one"),
        (["x=A", "x=B"], "given twice for x; keep one"),
    ],
)
def test_an_instruction_that_makes_no_sense_is_refused(toy_world, raw, tmp_path, capsys, flags, message):
    write_queries(raw / "x.jsonl", ["plain"])
    words = [word for flag in flags for word in ("--instruction", flag)]
    assert tokenize(raw, tmp_path / "stores", toy_world.backbone, *RETRIEVAL, *words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv", "lists"])
def test_a_row_may_bring_its_own_instruction(raw, queries, capsys, kind):
    rows = [
        {"query": "q1", "passage": "p1", "prompt": "Find it."},
        {"query": "q2", "passage": "p2", "prompt": "Instruct: Find that.\nQuery:"},
        {"query": "Instruct: A\nQuery: q3", "passage": "p3", "prompt": "Find it."},
        {"query": "q4", "passage": "p4", "prompt": ""},
    ]
    if kind == "jsonl":
        write_jsonl(raw / "x.jsonl", rows)
    elif kind == "parquet":
        toy.write_parquet(raw / "x.parquet", rows)
    elif kind == "lists":
        lists = [{"query": row["query"], "pos": [row["passage"]], "prompt": row["prompt"]} for row in rows]
        write_jsonl(raw / "x.jsonl", lists)
    else:
        table = [",".join(f'"{field}"' for field in row.values()) for row in rows]
        (raw / "x.csv").write_text("query,passage,prompt\n" + "\n".join(table))
    own = ["Instruct: Find it.\nQuery: q1", "Instruct: Find that.\nQuery: q2", "Instruct: A\nQuery: q3"]
    assert queries("x") == [*own, "q4"]
    assert "prompt" not in capsys.readouterr().err
    assert queries("x", "--instruction", "Z", "--overwrite", "true") == [*own, "Instruct: Z\nQuery: q4"]
