"""Tokenising in parts: what is joined has the bytes of one command, every file of every store.

python -m pytest tests/data/test_parts.py
"""

import json
import random

import numpy as np
import pytest
import toy
from conftest import contents, tokenize
from hypothesis import given
from hypothesis import strategies as st

from data import cache, instructions, parts, tokenising
from data.parts import Part, deal
from data.token_store import open_store

FLAGS = ("--task", "retrieval", "--skip_bad_rows", "true", "--instruction", "Find it.")


def rows_with_everything(count: int, seed: int) -> list[dict]:
    """Rows whose texts recur, with missing negatives, some that are the positive, bad rows, and many instructions."""
    rng = random.Random(seed)
    pool = [toy.sentence(rng, toy.SUBJECTS[number % 5], 1 + number % 40) for number in range(count // 2)]
    rows = []
    for number in range(count):
        row = {"query": f"{rng.choice(pool)} {number}", "passage": rng.choice(pool)}
        if number % 3 == 0:
            row["query"] = f"Instruct: Find {number % 7 and rng.randrange(count)}.\nQuery: {row['query']}"
        if number % 11 == 0:
            row["query"] = f"Instruct: {row['query']}"  # in another spelling
        if number % 13 == 0:
            row["query"] = " "
        negatives = [rng.choice([*pool[:20], None]) for _ in range(3)]
        negatives[number % 3] = row["passage"] if number % 5 == 0 else negatives[number % 3]
        rows.append(row | {f"negative_{k + 1}": negative for k, negative in enumerate(negatives)})
    return rows


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Two files of unequal size and kind."""
    folder = tmp_path_factory.mktemp("raw")
    toy.write_parquet(folder / "large.parquet", rows_with_everything(230, seed=1))
    rows = [
        {"query": row["query"], "pos": [row["passage"]], "neg": [row["negative_1"]] * (number % 4)}
        for number, row in enumerate(rows_with_everything(70, seed=2))
        if row["negative_1"]
    ]
    (folder / "small.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


@pytest.fixture(scope="module")
def whole(raw, toy_world, tmp_path_factory):
    """What one command writes."""
    folder = tmp_path_factory.mktemp("whole") / "stores"
    assert tokenize(raw, folder, toy_world.backbone, *FLAGS, "--max_seq_length", "24") == 0
    return contents(folder)


def run_parts(raw, stores, toy_world, count: int, *flags: str, numbers=None) -> None:
    for number in numbers or range(1, count + 1):
        assert tokenize(raw, stores, toy_world.backbone, *flags, "--part", f"{number}/{count}") == 0


# ------------------------------------------------------------------------------------------- the deal


@given(
    files=st.lists(st.tuples(st.integers(1, 10**12), st.integers(1, 1000)), min_size=1, max_size=6),
    count=st.integers(1, 50),
)
def test_every_row_of_every_file_falls_to_one_part_and_bytes_are_even(files, count):
    sizes = [size for size, _ in files]
    dealt = [deal(sizes, Part(number, count)) for number in range(1, count + 1)]
    for place, (_, rows) in enumerate(files):
        bounds = [share[place].rows(rows) for share in dealt if share[place] is not None]
        assert bounds[0].start == 0
        assert bounds[-1].stop == rows
        assert all(a.stop == b.start for a, b in zip(bounds, bounds[1:], strict=False))
    weights = [sum(share.end - share.begin for share in shares if share is not None) for shares in dealt]
    assert sum(weights) == sum(sizes)
    assert max(weights) - min(weights) <= 1


def test_a_file_that_is_sampled_counts_as_what_is_kept(tmp_path):
    path = toy.write_parquet(tmp_path / "a.parquet", toy.raw_rows(100, 2))
    assert parts.size_to_deal(path, 0) == parts.size_to_deal(path, 100) == path.stat().st_size
    assert parts.size_to_deal(path, 25) == path.stat().st_size // 4
    (tmp_path / "a.jsonl").write_text("{}\n" * 10)
    assert parts.size_to_deal(tmp_path / "a.jsonl", 2) == 30


@pytest.mark.parametrize("text", ["1", "0/2", "3/2", "1/", "/2", "a/b", "-1/2", "1/2/3"])
def test_what_is_no_part_is_refused(text):
    with pytest.raises(ValueError, match="is not I/N"):
        parts.read_part(text)
    assert parts.read_part("2/3") == Part(2, 3)


# ------------------------------------------------------------------------------------------ the bytes


@pytest.mark.parametrize("count", [1, 3, 7])
def test_joined_parts_have_the_bytes_of_one_command(raw, whole, toy_world, tmp_path, monkeypatch, count):
    monkeypatch.setattr(tokenising, "BATCH_TEXTS", 40)
    stores = tmp_path / "stores"
    flags = (*FLAGS, "--max_seq_length", "24")
    run_parts(raw, stores, toy_world, count, *flags, numbers=reversed(range(1, count + 1)))  # in any order
    assert {path.name for path in stores.iterdir()} == {".parts"}
    assert tokenize(raw, stores, toy_world.backbone, *flags, "--join", str(count)) == 0
    assert contents(stores) == whole  # and nothing is left of the parts
    meta = open_store(stores / "large").meta
    for name in ("skipped", "truncated", "own"):
        assert meta["stats"][name] > 0, f"the file has no {name}"
    assert meta["stats"]["instructions"]["other"] > 0


def test_more_parts_than_rows(toy_world, tmp_path):
    raw = tmp_path / "raw"
    toy.write_parquet(raw / "a.parquet", toy.raw_rows(3, 2))
    assert tokenize(raw, tmp_path / "whole", toy_world.backbone, "--task", "retrieval") == 0
    run_parts(raw, tmp_path / "stores", toy_world, 8, "--task", "retrieval")
    assert tokenize(raw, tmp_path / "stores", toy_world.backbone, "--task", "retrieval", "--join", "8") == 0
    assert contents(tmp_path / "stores") == contents(tmp_path / "whole")


def test_parts_of_a_sample_of_which_some_have_no_tuple(toy_world, tmp_path):
    raw = tmp_path / "raw"
    toy.write_parquet(raw / "a.parquet", toy.raw_rows(40, 2))
    flags = ("--task", "retrieval", "--max_rows", "5")
    assert tokenize(raw, tmp_path / "whole", toy_world.backbone, *flags) == 0
    run_parts(raw, tmp_path / "stores", toy_world, 20, *flags)
    found = [open_store(path.parent) for path in (tmp_path / "stores" / ".parts").glob("*/a/meta.json")]
    assert len(found) == 20
    assert min(len(store.tuples) for store in found) == 0
    assert tokenize(raw, tmp_path / "stores", toy_world.backbone, *flags, "--join", "20") == 0
    assert contents(tmp_path / "stores") == contents(tmp_path / "whole")


def test_instructions_are_counted_as_in_one_file_also_beyond_what_is_counted_at_a_time(monkeypatch):
    monkeypatch.setattr(instructions, "_COUNTED", 4)
    rng = random.Random(0)
    queries = [f"Instruct: i{min(rng.randrange(9), rng.randrange(9))}\nQuery: q" for _ in range(300)]
    queries += ["no instruction", "Instruct: another spelling"] * 5
    rng.shuffle(queries)
    expected = {}
    instructions.count_instructions(expected, queries)
    cuts = [queries[:7], queries[7:100], queries[100:]]
    words = []
    for part in cuts:
        stats = {}
        instructions.count_instructions(stats, part)
        words.append(list(stats["instructions"]["counts"]))
    numbers = [instructions.instruction_numbers(part) for part in cuts]
    assert instructions.count_numbers(words, numbers) == expected["instructions"]
    assert expected["instructions"]["other"] > 5


# --------------------------------------------------------------------------------- killed, done, refused


def test_a_killed_part_continues_and_a_join_before_it_says_which_is_missing(
    raw, whole, toy_world, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(tokenising, "BATCH_TEXTS", 40)
    monkeypatch.setattr(tokenising, "COMMIT_ROWS", 8)
    stores = tmp_path / "stores"
    flags = (*FLAGS, "--max_seq_length", "24")
    run_parts(raw, stores, toy_world, 3, *flags, numbers=(1, 3))
    calls, add = [], tokenising.add_tuples

    def dies_at_the_fifth(*args):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        add(*args)

    with monkeypatch.context() as patch:
        patch.setattr(tokenising, "add_tuples", dies_at_the_fifth)
        assert tokenize(raw, stores, toy_world.backbone, *flags, "--part", "2/3") == 130
    before = contents(stores)
    capsys.readouterr()
    assert tokenize(raw, stores, toy_world.backbone, *flags, "--join", "3") == 2
    said = capsys.readouterr().err
    assert "are missing; to be run first: --part 2/3\n" in said
    assert "--part 1/3" not in said
    assert contents(stores) == before
    calls.clear()
    run_parts(raw, stores, toy_world, 3, *flags)
    assert "already done" in capsys.readouterr().out
    assert tokenize(raw, stores, toy_world.backbone, *flags, "--join", "3") == 0
    assert contents(stores) == whole
    assert tokenize(raw, stores, toy_world.backbone, *flags, "--join", "3") == 0  # once more: it is there
    run_parts(raw, stores, toy_world, 3, *flags, numbers=(2,))
    assert contents(stores) == whole


def test_a_join_that_is_killed_leaves_the_parts_and_begins_again(raw, whole, toy_world, tmp_path, monkeypatch):
    stores = tmp_path / "stores"
    flags = (*FLAGS, "--max_seq_length", "24")
    run_parts(raw, stores, toy_world, 2, *flags)
    before = contents(stores)
    writer = "data.joining.StoreWriter.add_tuples"
    with monkeypatch.context() as patch:
        patch.setattr(writer, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert tokenize(raw, stores, toy_world.backbone, *flags, "--join", "2") == 130
    after = contents(stores)
    assert {path: after[path] for path in before} == before
    assert tokenize(raw, stores, toy_world.backbone, *flags, "--join", "2") == 0
    assert contents(stores) == whole


def test_other_flags_than_the_parts_were_made_with_are_refused(raw, toy_world, tmp_path, capsys):
    stores = tmp_path / "stores"
    run_parts(raw, stores, toy_world, 2, *FLAGS, numbers=(1,))
    before = contents(stores)
    capsys.readouterr()
    assert tokenize(raw, stores, toy_world.backbone, *FLAGS, "--max_seq_length", "24", "--part", "1/2") == 2
    assert "made from other inputs (max_seq_length 128 -> 24)" in capsys.readouterr().err
    assert contents(stores) == before
    run_parts(raw, stores, toy_world, 2, *FLAGS, "--max_seq_length", "24", numbers=(2,))
    before = contents(stores)
    assert tokenize(raw, stores, toy_world.backbone, *FLAGS, "--join", "2") == 2
    said = capsys.readouterr().err
    assert "2-of-2/small: made with other flags (max_seq_length 24, and here 128): join with the flags of" in said
    assert tokenize(raw, stores, toy_world.backbone, *FLAGS, "--join", "3") == 2
    assert "small: all rows are missing; to be run first: --part 2/3, --part 3/3" in capsys.readouterr().err
    assert tokenize(raw, stores, toy_world.backbone, *FLAGS, "--join", "2", "--part", "1/2") == 2
    assert "--part and --join" in capsys.readouterr().err
    assert contents(stores) == before


def test_a_file_that_changed_between_its_parts_is_refused(toy_world, tmp_path, capsys):
    raw, stores = tmp_path / "raw", tmp_path / "stores"
    flags = ("--task", "retrieval")
    toy.write_parquet(raw / "a.parquet", toy.raw_rows(40, 2))
    run_parts(raw, stores, toy_world, 2, *flags, numbers=(1,))
    toy.write_parquet(raw / "a.parquet", toy.raw_rows(40, 2, seed=5))
    run_parts(raw, stores, toy_world, 2, *flags, numbers=(2,))
    assert tokenize(raw, stores, toy_world.backbone, *flags, "--join", "2") == 2
    assert "a: the raw file changed between its parts" in capsys.readouterr().err
    run_parts(raw, stores, toy_world, 2, *flags, "--overwrite", "true", numbers=(1,))
    assert tokenize(raw, stores, toy_world.backbone, *flags, "--join", "2") == 0


@pytest.mark.parametrize("name", ["keys", "cut", "queries", "tokens.npy"])
def test_a_damaged_part_is_not_joined(toy_world, tmp_path, capsys, name):
    raw, stores = tmp_path / "raw", tmp_path / "stores"
    toy.write_parquet(raw / "a.parquet", toy.raw_rows(40, 2))
    run_parts(raw, stores, toy_world, 2, "--task", "retrieval")
    path = stores / ".parts" / "2-of-2" / "a" / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert tokenize(raw, stores, toy_world.backbone, "--task", "retrieval", "--join", "2") == 2
    assert "damaged" in capsys.readouterr().err
    assert not (stores / "a").exists()


def test_parts_that_were_not_joined_are_no_data(raw, toy_world, tmp_path):
    stores = tmp_path / "stores"
    run_parts(raw, stores, toy_world, 2, *FLAGS)
    _, problems = cache.find_sources(stores)
    assert any("parts of stores: tokenize_data_qwen.py --join N" in line for line in problems)


def test_a_part_reads_only_the_files_that_fall_to_it(raw, toy_world, tmp_path, monkeypatch):
    looked_at = []
    survey = tokenising.raw_files.survey

    def spy(path, task, rows):
        looked_at.append((path.name, rows))
        return survey(path, task, rows)

    monkeypatch.setattr("data.raw_files.survey", spy)
    run_parts(raw, tmp_path / "stores", toy_world, 20, *FLAGS, numbers=(1, 20))
    (name, rows), (other, all_rows) = looked_at
    assert (name, other, all_rows) == ("large.parquet", "small.jsonl", None)
    assert 0 < len(rows) < 40  # of 230


def test_lists_of_negatives_may_be_longer_in_one_part_than_in_another(toy_world, tmp_path):
    raw = tmp_path / "raw"
    rows = [
        {"query": f"q{number}", "pos": [f"p{number}"], "neg": [f"n{k}" for k in range(number // 10)]}
        for number in range(40)
    ]
    toy.write_parquet(raw / "a.parquet", rows)
    assert tokenize(raw, tmp_path / "whole", toy_world.backbone, "--task", "retrieval") == 0
    run_parts(raw, tmp_path / "stores", toy_world, 3, "--task", "retrieval")
    assert tokenize(raw, tmp_path / "stores", toy_world.backbone, "--task", "retrieval", "--join", "3") == 0
    assert contents(tmp_path / "stores") == contents(tmp_path / "whole")
    assert open_store(tmp_path / "stores" / "a").tuples.shape == (40, 5)


def test_bad_rows_are_named_by_the_part_that_has_them_and_by_their_number_in_the_file(toy_world, tmp_path, capsys):
    raw = tmp_path / "raw"
    rows = toy.raw_rows(40, 1)
    rows[33]["query"] = ""
    toy.write_parquet(raw / "a.parquet", rows)
    flags = ("--task", "retrieval")
    assert tokenize(raw, tmp_path / "stores", toy_world.backbone, *flags, "--part", "1/2") == 0
    assert tokenize(raw, tmp_path / "stores", toy_world.backbone, *flags, "--part", "2/2") == 2
    assert "1 row with an empty or null query (row 33, counted from 0)" in capsys.readouterr().err


def test_parts_without_a_good_row_are_not_joined(toy_world, tmp_path, capsys):
    raw = tmp_path / "raw"
    toy.write_parquet(raw / "a.parquet", [{"query": "", "passage": "p"}] * 4)
    flags = ("--task", "retrieval", "--skip_bad_rows", "true")
    run_parts(raw, tmp_path / "stores", toy_world, 2, *flags)
    assert tokenize(raw, tmp_path / "stores", toy_world.backbone, *flags, "--join", "2") == 2
    assert "a: no good row would be left" in capsys.readouterr().err


def test_numbers_of_instructions_have_two_that_mean_something():
    queries = ["plain", "Instruct: spelled otherwise", "Instruct: a\nQuery: x", "Instruct: b\nQuery: x"]
    numbers = instructions.instruction_numbers(queries)
    assert numbers[:2].tolist() == [0, 1]
    assert len(np.unique(numbers)) == 4
