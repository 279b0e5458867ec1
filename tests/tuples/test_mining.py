"""Mining as a whole, on a toy decoder: the naive way, killed and gone on, on several processes, every kind of filling.

python -m pytest tests/tuples/test_mining.py
"""

import json
import shutil
import threading
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import toy
from conftest import Killed

from retrieval import vectors
from retrieval.encode import encode
from tuples.mining import blocks as mining_blocks
from tuples.mining import mine as mining
from tuples.mining import output as mining_output
from tuples.mining import report as mining_report
from tuples.mining import texts as mining_texts
from tuples.mining.inputs import read_inputs
from tuples.mining.mine import Mining, Model, Plan, Share
from tuples.mining.rules import Rules

K = 4
RULES = Rules(range_min=2, range_max=80, max_score=None, relative_margin=0.02, num_negatives=K)
LENGTH = 32


def rows(count: int = 150) -> list[dict[str, str]]:
    """Tuples of which some queries come twice, with another passage, or with the same one spelled otherwise."""
    made = toy.raw_rows(count, 0)
    for number in range(0, count, 10):
        made[number + 1]["query"] = made[number]["query"]
        made[number + 2] = {"query": made[number]["query"], "passage": f" {made[number]['passage']}  "}
    return made


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return toy.make_backbone(tmp_path_factory.mktemp("mining") / "backbone")


@pytest.fixture
def small(monkeypatch):
    """Several shards and blocks of a toy."""
    monkeypatch.setattr(vectors, "_FEWEST", 32)
    monkeypatch.setattr(vectors, "_SHARDS", 1000)
    monkeypatch.setattr(mining_blocks, "BLOCK", 25)
    monkeypatch.setattr(mining_output, "BLOCK", 25)
    monkeypatch.setattr(mining_texts, "BATCH_ROWS", 40)
    monkeypatch.setattr(mining, "_SECONDS", 0.01)
    monkeypatch.setattr(mining_report, "draw", lambda *_: None)  # a picture takes a second


@dataclass
class Job:
    """A mining in a folder of its own."""

    folder: Path
    raw: Path
    plan: Plan
    corpora: tuple[Path, ...] = ()
    too_few: str = "drop"
    options: dict = None

    def mine(self, share: Share = Share(), name: str = "mined") -> Path:
        """What the command does; returns the output's path."""
        inputs = read_inputs(self.raw, list(self.corpora), **(self.options or {}))
        job = Mining(self.folder / f"{name}.work", inputs, self.plan, share, "cpu", say=lambda line: None)
        job.encode()
        job.index()
        job.mine()
        output = self.folder / f"{name}.parquet"
        if share.is_first:
            width = self.plan.rules.num_negatives
            counts = mining_output.write_output(output, inputs, job.texts, job.blocks, self.too_few, width)
            mining_report.write(self.folder / name, job, {}, counts)
        return output

    def report(self, name: str = "mined") -> dict:
        return json.loads((self.folder / f"{name}.report.json").read_text())


@pytest.fixture
def job(backbone, tmp_path, small) -> Job:
    raw = toy.write_parquet(tmp_path / "raw.parquet", rows())
    return Job(tmp_path, raw, Plan("exact", RULES, Model(backbone, LENGTH)))


def read(path: Path) -> list[dict]:
    return pq.read_table(path).to_pylist()


def negatives(row: dict) -> list[str]:
    return [text for name, text in row.items() if name.startswith("negative_") and text is not None]


# ------------------------------------------------------------------------------------ the naive way


def naive(table: list[dict], backbone: Path, rules: Rules) -> list[dict]:
    """Query by query, with a sort of everything."""
    corpus = list(dict.fromkeys(row["passage"].strip() for row in table))
    passages = encode(backbone, corpus, LENGTH)
    queries = encode(backbone, [row["query"] for row in table], LENGTH)
    mined = []
    for row, query in zip(table, queries, strict=True):
        answers = {corpus.index(other["passage"].strip()) for other in table if other["query"] == row["query"]}
        cosines = passages @ query
        lowest = min(cosines[list(answers)])
        most = max(sum(other["query"] == row["query"] for other in table) for row in table)
        window = np.argsort(-cosines, kind="stable")[: rules.range_max + most]
        left = [n for n in window if n not in answers and cosines[n] < lowest - abs(lowest) * rules.relative_margin]
        left = left[: rules.range_max][rules.range_min :][: rules.num_negatives]
        if len(left) == rules.num_negatives:
            mined.append(row | {f"negative_{slot + 1}": corpus[number] for slot, number in enumerate(left)})
    return mined


def test_the_output_is_that_of_a_sort_of_everything(job, backbone):
    job.raw = toy.write_parquet(job.folder / "small.parquet", rows(60))
    rules = replace(RULES, range_max=40)
    job.plan = replace(job.plan, rules=rules)
    mined = read(job.mine())
    assert mined == naive(rows(60), backbone, rules)
    assert 10 < len(mined) < 60  # some had too few
    counts = job.report()["counts"]
    assert counts["rows_written"] == len(mined)
    assert counts["rows_written"] + counts["rows_dropped"] == counts["rows"] == 60
    assert counts["duplicate_rows"] == 6
    assert counts["passages"] == len({row["passage"].strip() for row in rows(60)})


def test_no_negative_answers_its_query_and_candidates_add_up(job):
    table = rows()
    mined = read(job.mine())
    answers = {}
    for row in table:
        answers.setdefault(row["query"], set()).add(row["passage"].strip())
    assert len(mined) > 30
    for row in mined:
        assert len(set(negatives(row))) == K
        assert answers[row["query"]].isdisjoint(text.strip() for text in negatives(row))
    report = job.report()
    candidates = report["candidates"]
    taken = candidates["found"] - sum(count for name, count in candidates.items() if name not in ("found", "random"))
    assert sum(report["scores"]["negatives"]) == taken
    assert len(report["hardest"]) == mining_report.HARDEST
    gaps = [example["negative_score"] - example["positive_score"] for example in report["hardest"]]
    assert gaps == sorted(gaps, reverse=True)


# --------------------------------------------------------------------------- kills, processes, the cache


def everything(job: Job, name: str = "mined") -> tuple[bytes, str]:
    return (job.folder / f"{name}.parquet").read_bytes(), (job.folder / f"{name}.report.json").read_text()


def test_killed_anywhere_the_same_command_comes_to_the_same_bytes(job, monkeypatch):
    job.raw = toy.write_parquet(job.folder / "small.parquet", rows(80))
    job.mine()
    expected = everything(job)
    points = [
        (mining_texts, "publish", 1),
        (vectors.VectorFolder, "write", 4),
        (vectors.os, "replace", 6),
        (mining_blocks.BlockFolder, "write", 2),
        (mining_output, "_is_kept", 50),
    ]
    for owner, function, number in points:
        calls = 0

        def dies(*arguments, real=getattr(owner, function), number=number, **more):
            nonlocal calls
            calls += 1
            if calls == number:
                raise Killed
            return real(*arguments, **more)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(owner, function, dies)
            job.mine(name="killed")
        assert not (job.folder / "killed.parquet").exists()
        (job.folder / ".killed.parquet.123").touch()  # as a kill leaves it, of a process with another number
        job.mine(name="killed")
        assert everything(job, "killed") == expected
        assert not list(job.folder.glob(".killed.parquet*"))
        shutil.rmtree(job.folder / "killed.work")
        (job.folder / "killed.parquet").unlink()


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """How many texts each call of an encoder gets, from now on."""
    counts = []
    real = mining.open_encoder

    def counting(*arguments):
        encoder = real(*arguments)
        encode_texts = encoder.encode
        encoder.encode = lambda texts: counts.append(len(texts)) or encode_texts(texts)
        return encoder

    monkeypatch.setattr(mining, "open_encoder", counting)
    return counts


def test_only_what_is_gone_is_computed_again(job, encoded):
    job.mine()
    expected = everything(job)
    whole = len(encoded)
    assert whole > 5
    job.mine()
    assert len(encoded) == whole  # nothing
    work = job.folder / "mined.work"
    next(work.glob("vectors-*/passages/00001.npy")).unlink()
    shutil.rmtree(next(work.glob("blocks-*")))
    job.mine()
    assert encoded[whole:] == [32]
    assert everything(job) == expected
    damaged = next(work.glob("blocks-*/00002.npz"))
    damaged.write_bytes(damaged.read_bytes()[:50])
    job.mine()
    assert everything(job) == expected
    job.plan = replace(job.plan, rules=replace(RULES, range_min=0))
    job.mine()
    assert encoded[whole:] == [32]  # other rules, the same vectors
    assert everything(job) != expected
    job.plan = replace(job.plan, model=replace(job.plan.model, max_length=8))
    job.mine()
    assert len(encoded) == 2 * whole + 1  # another length, other vectors
    assert job.report()["counts"]["passages_cut"] > 0


def test_several_processes_mine_the_same_bytes_as_one(job, monkeypatch):
    """Threads in their place. Transformers 4 cannot load two models at once in one process."""
    alone = threading.Lock()

    def one_by_one(mining, real=Mining._open_encoder):
        with alone:
            return real(mining)

    monkeypatch.setattr(Mining, "_open_encoder", one_by_one)
    job.mine()
    expected = everything(job)
    for world in (2, 3):
        name = f"on_{world}"
        processes = [threading.Thread(target=job.mine, args=(Share(rank, world), name)) for rank in range(world)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        assert everything(job, name) == expected


# ------------------------------------------------------------------------------------------- backends


def test_a_flat_index_finds_what_the_exact_search_finds(job):
    exact = read(job.mine())
    job.plan = replace(job.plan, backend="faiss", index="flat")
    assert read(job.mine()) == exact
    assert job.report()["recall"] == 1
    job.plan = replace(job.plan, index="IVF", lists=8, probes=1)
    job.mine()
    assert job.report()["recall"] < 1


def test_bm25_mines_without_a_model_and_leaves_out_what_shares_no_word(job):
    rules = replace(RULES, relative_margin=None, range_min=0, num_negatives=2)
    job.plan = Plan("bm25", rules)
    job.raw = toy.write_parquet(
        job.folder / "words.parquet",
        [
            {"query": "Instruct: Find the engine.\nQuery: old river", "passage": "the old river"},
            {"query": "old river", "passage": "river"},
            {"query": "castle", "passage": "an old castle"},
            {"query": "Castle", "passage": "one castle, one river"},
            {"query": "engine", "passage": "the engine is old"},
        ],
    )
    mined = {row["query"]: negatives(row) for row in read(job.mine())}
    # The first two have the same words, and so the same two answers; the others find fewer than two passages.
    assert set(mined) == {"Instruct: Find the engine.\nQuery: old river", "old river"}
    for texts in mined.values():
        assert texts[0] == "an old castle"
        assert texts[1] in ("one castle, one river", "the engine is old")
    assert job.report()["scores"]["positives"] == [0] * 50


def test_a_model_scores_what_bm25_found(job, backbone):
    job.plan = replace(job.plan, backend="bm25")
    mined = read(job.mine())
    assert len(mined) > 10
    report = job.report()
    assert report["candidates"]["relative_margin"] > 0
    assert max(report["scores"]["edges"]) <= 1


# ---------------------------------------------------------------------------------- what a row may be


def test_further_passages_are_found_and_come_first(job):
    lines = [{"text": f"{row['passage']} twice"} for row in rows(40)] + [{"text": " "}]
    job.corpora = (toy.write_parquet(job.folder / "corpus.parquet", lines),)
    mined = read(job.mine())
    further = {line["text"] for line in lines}
    assert any(text in further for row in mined for text in negatives(row))
    assert job.report()["counts"]["corpus_rows"] == 41
    assert job.report()["counts"]["corpus_rows_empty"] == 1


def test_queries_of_the_same_words_share_their_answers_whatever_their_instruction(job):
    table = toy.raw_rows(40, 0)
    words = table[0]["query"].split("Query: ")[1]
    table[1]["query"] = f"Instruct: Find another.\nQuery: {words}"
    job.raw = toy.write_parquet(job.folder / "two.parquet", table)
    job.plan = replace(job.plan, rules=Rules(0, 38, None, None, None, None, 38))
    mined = {row["query"]: negatives(row) for row in read(job.mine())}
    answers = {table[0]["passage"], table[1]["passage"]}
    for query in (table[0]["query"], table[1]["query"]):
        assert len(mined[query]) == 38
        assert answers.isdisjoint(mined[query])


def test_a_query_is_no_negative_of_itself(job):
    table = [{"query": f"Instruct: Find it.\nQuery: {a}", "passage": b} for a, b in symmetric(20)]
    job.raw = toy.write_parquet(job.folder / "symmetric.parquet", table)
    job.plan = replace(job.plan, rules=Rules(0, 39, None, None, None, None, 38))  # the search finds all 40 passages
    mined = read(job.mine())
    assert len(mined) == 40
    for row in mined:
        own = row["query"].split("Query: ")[1]
        assert own not in negatives(row)
        assert row["passage"] not in negatives(row)
        assert len(set(negatives(row))) == 38


def symmetric(pairs: int) -> list[tuple[str, str]]:
    """Pairs in both directions."""
    one_way = [(row["query"].split("Query: ")[1], row["passage"]) for row in toy.raw_rows(pairs, 0)]
    return one_way + [(b, a) for a, b in one_way]


def test_negatives_that_the_input_has_come_first_and_mined_ones_fill_up(job):
    table = toy.raw_rows(60, 0)
    for number, row in enumerate(table):
        row["negative_1"] = f"a contradiction of number {number}" if number % 3 else None
        row["negative_2"] = table[number - 1]["passage"] if number % 2 else row["passage"]
    job.raw = toy.write_parquet(job.folder / "nli.parquet", table)
    job.plan = replace(job.plan, rules=replace(RULES, relative_margin=None))
    mined = read(job.mine())
    assert len(mined) == 60
    for number, row in enumerate(mined):
        own = [f"a contradiction of number {number}"] * bool(number % 3) + [table[number - 1]["passage"]] * (number % 2)
        assert negatives(row)[: len(own)] == own
        assert len(set(negatives(row))) == K
        assert row["passage"] not in negatives(row)
    job.options = {"keep_negatives": False}
    assert "contradiction" not in str(read(job.mine()))


def test_passages_of_a_querys_own_group_are_no_negatives(job):
    table = [row | {"label": row["passage"].split()[1]} for row in toy.raw_rows(80, 0)]
    label_of = {row["passage"]: row["label"] for row in table}
    table[1] |= {"query": "Which of two groups?", "passage": table[0]["passage"], "label": "another"}
    job.raw = toy.write_parquet(job.folder / "classes.parquet", table)
    job.plan = replace(job.plan, rules=replace(RULES, relative_margin=None, range_min=0))
    without = read(job.mine())
    own = {row["query"]: row["label"] for row in table}
    assert any(label_of[text] == own[row["query"]] for row in without for text in negatives(row))
    job.options = {"group_column": "label"}
    for backend in ("exact", "bm25"):
        job.plan = replace(job.plan, backend=backend)
        mined = read(job.mine())
        assert len(mined) > 60
        assert not [row for row in mined if table[0]["passage"] in negatives(row)]  # it is in two groups
        assert not [row for row in mined for text in negatives(row) if label_of[text] == own[row["query"]]]


def test_too_few_negatives_are_dropped_kept_or_filled_up(job):
    dropped = read(job.mine())
    job.too_few = "fewer"
    kept = read(job.mine())
    assert len(kept) == 150
    assert [row for row in kept if len(negatives(row)) == K] == dropped
    assert any(0 < len(negatives(row)) < K for row in kept)
    job.too_few = "random"
    job.plan = replace(job.plan, fill=True)
    filled = read(job.mine())
    assert len(dropped) < len(filled)
    drawn = job.report()["candidates"]["random"]
    assert drawn > 0
    by_query = {row["query"]: negatives(row) for row in kept}
    for row in filled:
        assert len(set(negatives(row))) == K
        assert negatives(row)[: len(by_query[row["query"]])] == by_query[row["query"]]
    passages = {row["passage"].strip() for row in rows()}
    assert all(text.strip() in passages for row in filled for text in negatives(row))
