"""The store on disk: the same bytes whatever happens on the way, and every kind of damage is found.

python -m pytest tests/data/test_token_store.py
"""

import errno
import json
import shutil

import numpy as np
import pytest

import utils
from data import store_writer, token_store
from data.store_writer import StoreWriter, text_key

EOS = 9
META = {"name": "toy", "task": "retrieval", "max_seq_length": 8, "eos_token_id": EOS, "tokenizer": "abc"}
TEXTS = [[1, 2, EOS], [3, EOS], [4, 5, 6, EOS], [7, EOS]]
TUPLES = [[0, 1, 2], [3, 2, -1], [1, 0, 3]]


def add(writer: StoreWriter, texts: list[list[int]], tuples: list[list[int]]) -> None:
    keys = [text_key(bytes(text)) for text in texts]
    writer.add_texts(keys, np.array([i for text in texts for i in text]), np.array([len(text) for text in texts]))
    writer.add_tuples(np.array(tuples, np.int32).reshape(-1, 3))


def write(folder, texts=TEXTS, tuples=TUPLES):
    writer = StoreWriter(folder, 1, {"source": "x"})
    add(writer, texts, tuples)
    return writer.finish(META)


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_round_trip(tmp_path):
    store = token_store.open_store(write(tmp_path / "toy"))
    assert [store.tokens[a:b].tolist() for a, b in zip(store.offsets, store.offsets[1:], strict=False)] == TEXTS
    assert store.tuples.tolist() == TUPLES
    assert (store.name, store.task, store.eos, store.meta["max_token_id"]) == ("toy", "retrieval", EOS, 9)
    assert {path.name for path in store.folder.iterdir()} == {"tokens.npy", "offsets.npy", "tuples.npy", "meta.json"}
    assert all(isinstance(array.base, np.memmap) for array in (store.tokens, store.offsets, store.tuples))
    assert token_store.deep_check(store) == []


@pytest.mark.parametrize("cut", [0, 1, 2])
def test_an_interrupted_writer_continues_to_the_same_bytes(tmp_path, cut):
    whole = contents(write(tmp_path / "whole"))
    first = StoreWriter(tmp_path / "toy", 1, {"source": "x"})
    add(first, TEXTS[:3], TUPLES[:1])
    first.commit(1)
    add(first, TEXTS[3:], TUPLES[1 : 1 + cut])  # after the commit, and lost with the process
    for file in first.files.values():
        file.flush()
    second = StoreWriter(tmp_path / "toy", 1, {"source": "x"})
    assert second.position == 1
    assert len(second.numbers) == 3
    add(second, TEXTS[3:], TUPLES[1:])
    assert contents(second.finish(META)) == whole


def test_a_killed_finish_continues_to_the_same_bytes(tmp_path, monkeypatch):
    whole = contents(write(tmp_path / "whole"))
    writer = StoreWriter(tmp_path / "toy", 1, {"source": "x"})
    add(writer, TEXTS, TUPLES)
    writer.commit(3)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store_writer, "file_digest", killed)  # headers are filled in, meta.json is not there yet
        with pytest.raises(KeyboardInterrupt):
            writer.finish(META)
    assert not (tmp_path / "toy").exists()
    second = StoreWriter(tmp_path / "toy", 1, {"source": "x"})
    assert second.position == 3
    assert contents(second.finish(META)) == whole


def test_other_inputs_start_afresh(tmp_path):
    first = StoreWriter(tmp_path / "toy", 1, {"source": "x"})
    add(first, TEXTS, TUPLES)
    first.commit(3)
    second = StoreWriter(tmp_path / "toy", 1, {"source": "y"})
    assert second.position == 0
    assert second.numbers == {}


def test_a_journal_that_promises_more_than_the_files_hold_is_not_trusted(tmp_path):
    first = StoreWriter(tmp_path / "toy", 1, {"source": "x"})
    add(first, TEXTS, TUPLES)
    first.commit(3)
    with open(tmp_path / ".toy.partial" / "tokens.npy", "r+b") as file:
        file.truncate(130)
    assert StoreWriter(tmp_path / "toy", 1, {"source": "x"}).position == 0


@pytest.mark.parametrize("name", ["tokens.npy", "offsets.npy", "tuples.npy"])
def test_one_flipped_bit_is_found(tmp_path, name):
    folder = write(tmp_path / "toy")
    path = folder / name
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    problems = token_store.deep_check(token_store.open_store(folder))
    assert any(name in problem and "checksum" in problem for problem in problems)


@pytest.mark.parametrize("name", ["tokens.npy", "offsets.npy", "tuples.npy"])
@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "garbage"])
def test_a_broken_file_is_refused_before_it_is_read(tmp_path, name, damage):
    folder = write(tmp_path / "toy")
    path = folder / name
    if damage == "gone":
        path.unlink()
    else:
        size = {"cut": -1, "empty": 0, "garbage": 0}[damage]
        path.write_bytes(path.read_bytes()[:size] + b"no array" * (damage == "garbage"))
    problems = token_store.quick_check(folder)
    assert len(problems) == 1
    assert name in problems[0]
    with pytest.raises(ValueError, match=name):
        token_store.open_store(folder)


def test_opening_parses_no_header_that_is_as_written_and_reads_others_as_numpy_does(tmp_path, monkeypatch):
    """502 stores took a second, most of it for numpy's parsing of 1,506 headers, twice each."""
    as_written, by_numpy = write(tmp_path / "toy"), write_unchecked(tmp_path / "other", TEXTS, TUPLES)
    parsed = []
    load = np.load
    monkeypatch.setattr(np, "load", lambda path, **options: parsed.append(path.parent.name) or load(path, **options))
    stores = [token_store.open_store(folder) for folder in (as_written, by_numpy)]
    assert parsed == ["other"] * 3
    for name in token_store.ARRAYS:
        ours, theirs = (getattr(store, name) for store in stores)
        assert np.array_equal(ours, theirs)
        assert (ours.dtype, ours.flags.writeable) == (theirs.dtype, False)
    with (as_written / "tokens.npy").open("ab") as file:
        file.write(b"more")
    assert np.array_equal(token_store.open_store(as_written).tokens, stores[1].tokens)  # as numpy has it
    assert parsed[3:] == ["toy"]


def test_a_system_that_allows_too_few_open_files_is_named_as_the_reason(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    folder = write(tmp_path / "toy")
    monkeypatch.setattr(token_store, "_map_as_written", full)
    assert all("ulimit -n" in line and "damaged" not in line for line in token_store.quick_check(folder))
    assert len(token_store.quick_check(folder)) == 3


def test_a_store_without_meta_is_half_written(tmp_path):
    folder = write(tmp_path / "toy")
    (folder / "meta.json").unlink()
    assert "half of a store" in token_store.quick_check(folder)[0]


@pytest.mark.parametrize(
    ("texts", "tuples", "rule"),
    [
        ([[1, 2], [3, EOS], [4, EOS]], [[0, 1, 2]], "does not end in EOS"),
        ([[1, EOS], [3, EOS]], [[0, 5, 1]], "a query or positive is not a text number"),
        ([[1, EOS], [3, EOS]], [[0, -1, 1]], "a query or positive is not a text number"),
        ([[1, EOS], [3, EOS]], [[0, 1, -2]], "a negative is not a text number or -1"),
        ([[1, EOS], [3, EOS]], [[0, 1, 1]], "a positive is its own negative"),
        ([[-5, EOS], [3, EOS]], [[0, 1, -1]], "a token id is negative"),
        ([[], [3, EOS]], [[0, 1, -1]], "offsets do not rise"),
    ],
)
def test_each_rule_of_the_contents_is_checked(tmp_path, texts, tuples, rule):
    store = token_store.open_store(write_unchecked(tmp_path / "toy", texts, tuples))
    assert any(rule in problem for problem in token_store.deep_check(store))


def write_unchecked(folder, texts, tuples):
    """A store whose headers and checksums are right and whose contents the writer would not have written."""
    arrays = {
        "tokens": np.array([i for text in texts for i in text], np.int32),
        "offsets": np.cumsum([0, *map(len, texts)]),
        "tuples": np.array(tuples, np.int32),
    }
    meta = json.loads((write(folder) / "meta.json").read_text())
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
        meta["sha256"][name] = utils.file_digest(folder / f"{name}.npy")
    meta |= {"rows": len(tuples), "texts": len(texts), "tokens": len(arrays["tokens"])}
    (folder / "meta.json").write_text(json.dumps(utils.seal({k: meta[k] for k in meta if k != "check"})))
    return folder


def test_identity_changes_with_the_files(tmp_path):
    folder = write(tmp_path / "toy")
    before = token_store.identity(folder)
    assert token_store.identity(folder) == before
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, copy_function=shutil.copy2)
    assert token_store.identity(copy) == before
    (folder / "tokens.npy").write_bytes((folder / "tokens.npy").read_bytes())
    assert token_store.identity(folder) != before


def test_declared_tasks_win_over_the_published_ones(tmp_path):
    assert token_store.known_tasks(tmp_path)[0]["msmarco"] == "retrieval"
    assert "unheard_of" not in token_store.known_tasks(tmp_path)[0]
    (tmp_path / "tasks.json").write_text(json.dumps({"msmarco": "clustering", "unheard_of": "classification"}))
    tasks, problems = token_store.known_tasks(tmp_path)
    assert problems == []
    assert (tasks["msmarco"], tasks["unheard_of"]) == ("clustering", "classification")


@pytest.mark.parametrize("text", ["{", "[]", '{"x": "sorting"}', '{"x": ["retrieval"]}', '{"x": 3}'])
def test_a_broken_declaration_is_said(tmp_path, text):
    (tmp_path / "tasks.json").write_text(text)
    (problem,) = token_store.known_tasks(tmp_path)[1]
    assert "tasks.json: " in problem


def test_a_negative_with_the_ids_of_its_positive_is_left_out(tmp_path):
    writer = StoreWriter(tmp_path / "toy", 2, {})
    writer.add_texts(
        [text_key(bytes([i])) for i in range(4)], np.array([1, EOS, 2, EOS, 2, EOS, 3, EOS]), np.full(4, 2)
    )
    writer.add_tuples(np.array([[0, 1, 2, 3], [0, 3, 2, -1]]))
    store = token_store.open_store(writer.finish(META))
    assert store.tuples.tolist() == [[0, 1, -1, 3], [0, 3, 2, -1]]
    assert store.meta["stats"] == {"own": 1}


def test_a_text_is_added_once(tmp_path):
    writer = StoreWriter(tmp_path / "toy", 1, {})
    add(writer, TEXTS, TUPLES)
    for keys in ([text_key(bytes(TEXTS[0]))], [text_key(b"new")] * 2):
        with pytest.raises(ValueError, match="twice"):
            writer.add_texts(keys, np.array([EOS] * len(keys)), np.ones(len(keys), int))


def test_all_published_sources_have_a_task():
    tasks = json.loads(token_store.PUBLISHED_TASKS.read_text())
    assert len(tasks) == 502
    assert set(tasks.values()) == set(token_store.TASKS)
    assert all(token_store.name_problem(name) is None for name in tasks)


@pytest.mark.parametrize("name", ["", ".hidden", "-rf", "a/b", "..", "a b", "a\0", "é", "x" * 129])
def test_names_that_cannot_be_folders_are_refused(name):
    assert token_store.name_problem(name)
