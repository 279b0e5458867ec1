"""A teacher's embeddings on the disk: what is read of them, and what is refused.

python -m pytest tests/data/test_embedding_store.py
"""

import json
import shutil

import numpy as np
import pytest

from data import embedding_store
from data.embedding_store import are_cut_alike, find_problems, open_embeddings, other_teachers, texts_of, verify
from data.embedding_writer import RowWriter, TextBatches, begin, finish, is_done, longest_text
from data.feed import Feed
from data.plan import Plan
from data.token_store import StoreError, open_store
from utils import seal, write_json

WIDTH = 40


@pytest.fixture(scope="module")
def store(toy_world):
    return open_store(toy_world.stores / "toy_clustering")


def facts_of(store, dtype: str = "float32", **changes) -> dict:
    facts = {
        "name": store.name, "model": "a/teacher", "teacher": {"weights": "0123", "pooling": "lasttoken"},
        "precision": "no", "store": texts_of(store), "max_seq_length": 16, "longest_text": longest_text(store),
        "texts": len(store.offsets) - 1, "width": WIDTH, "dtype": dtype,
    }  # fmt: skip
    return facts | changes


def row_of(texts: np.ndarray) -> np.ndarray:
    """Made-up embeddings of text numbers, another for each, [n, WIDTH]."""
    return np.sin(texts[:, None] + np.arange(WIDTH)).astype(np.float32)


def write(folder, store, **changes):
    """Finished embeddings of a store, in folder/NAME."""
    facts = facts_of(store, **changes)
    own = folder / store.name
    batches = TextBatches(store, facts["max_seq_length"], 200)
    begin(own, facts, len(batches), 200)
    rows = RowWriter(own, facts["dtype"], WIDTH)
    for number in range(len(batches)):
        rows.write(number, batches.numbers(number), row_of(batches.numbers(number)))
    rows.close()
    finish(own, facts)
    return own


def test_every_text_is_in_one_batch_beside_texts_of_its_length(store, monkeypatch):
    monkeypatch.setattr("data.embedding_writer.WINDOW", 100)  # several windows
    batches = TextBatches(store, 16, 64)
    numbers = [batches.numbers(number) for number in range(len(batches))]
    assert sorted(np.concatenate(numbers).tolist()) == list(range(len(store.offsets) - 1))
    lengths = np.minimum(np.diff(store.offsets), 16)
    assert len(batches) > 100
    for batch in numbers:
        assert lengths[batch].sum() <= 64
        assert (np.diff(lengths[batch]) <= 0).all()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rows_are_those_of_the_texts_in_fp32_and_only_the_columns_that_are_wanted(store, tmp_path, dtype):
    own = write(tmp_path, store, dtype=dtype)
    found = open_embeddings(own, 24)
    texts = np.array([7, 0, len(store.offsets) - 2])
    rows = found.of(texts)
    assert (rows.dtype, rows.shape) == (np.float32, (3, 24))
    assert (rows == row_of(texts)[:, :24].astype(dtype)).all()
    assert not found.rows.flags.writeable
    assert np.load(own / "embeddings.npy").shape == (len(store.offsets) - 1, WIDTH)  # a .npy file as any other


def test_a_batch_brings_the_rows_of_its_distinct_texts_and_validation_reads_none(toy_world, tmp_path):
    store = open_store(toy_world.stores / "toy_classification")  # all tuples share two labels
    embeddings = open_embeddings(write(tmp_path, store), 32)
    plain = Feed([store], [1], Plan((29,), 8, 0), [16])
    taught = Feed([store], [1], Plan((29,), 8, 0), [16], embeddings=[embeddings])
    _, batch = taught.training(1)
    assert (batch.spread(batch.teacher).numpy() == row_of(batch.texts)[:, :32]).all()
    assert len(batch.teacher) == len(batch.lengths) < len(batch.texts)
    assert batch.teacher.dtype.itemsize == 4
    assert plain.training(1)[1].teacher is None
    assert next(taught.held_out(0)).teacher is None
    nobody = Feed([store], [1], Plan((29,), 2, 0), [16], 2, 3, embeddings=[embeddings])  # the third process of 2 rows
    _, empty = nobody.training(1)
    assert (empty.rows, len(empty.teacher)) == (0, 1)


# ---------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(("one", "other", "longest", "alike"), [
    (512, 512, 9000, True),
    (512, 1024, 9000, False),  # the teacher did not see what the student will
    (1024, 512, 9000, False),  # the teacher saw what the student will not
    (512, 1024, 513, False),
    (512, 1024, 512, True),  # no text is cut by either
])  # fmt: skip
def test_cuts_must_be_equal_or_at_tokens_that_no_text_has(one, other, longest, alike):
    assert are_cut_alike(one, other, longest) is alike
    assert are_cut_alike(other, one, longest) is alike
    lengths = np.arange(1, longest + 1)  # the rule itself: every text is cut to the same tokens
    assert (np.minimum(lengths, one) == np.minimum(lengths, other)).all() == alike


def test_what_does_not_fit_is_named(toy_world, store, tmp_path):
    own = write(tmp_path, store)
    assert find_problems(tmp_path, store, 16, WIDTH) == []
    longest = longest_text(store)
    assert 16 < longest < 128
    for length in (8, 17, 128):
        (problem,) = find_problems(tmp_path, store, length, WIDTH)
        assert f"cut to 16 tokens, and this run cuts them to {length}" in problem
        assert f"--max_seq_length {length}" in problem
    (problem,) = find_problems(tmp_path, store, 16, WIDTH + 1)
    assert "40 dimensions, but the student has 41" in problem
    other = open_store(toy_world.stores / "toy_retrieval")
    (problem,) = find_problems(tmp_path, other, 16, WIDTH)
    assert "toy_retrieval: no embeddings" in problem
    shutil.copytree(own, tmp_path / other.name)
    (problem,) = find_problems(tmp_path, other, 16, WIDTH)
    assert problem.endswith("holds now: name the right folder, or run tools.embed_store into another one")
    begin(tmp_path / "half" / store.name, facts_of(store), 10, 200)
    assert "half-written" in find_problems(tmp_path / "half", store, 16, WIDTH)[0]


def test_good_work_is_kept_where_embeddings_are_looked_for_or_written(toy_world, store, tmp_path):
    (problem,) = find_problems(toy_world.stores, store, 16, WIDTH)
    assert problem == f"{store.folder}: a token store, not embeddings: keep it, and name another folder"
    assert is_done(store.folder, facts_of(store)) == (False, [problem])
    shutil.copytree(store.folder, tmp_path / f".{store.name}.partial")  # half a store: `begin` would remove it
    done, (problem,) = is_done(tmp_path / store.name, facts_of(store))
    assert not done
    assert "a token store, not embeddings" in problem
    own = write(tmp_path / "embeddings", store)
    others = facts_of(store) | {"store": {"tokens": "0", "offsets": "0"}}
    problems = is_done(own, others)[1]
    for text in ("{}", "no JSON"):
        (own / "meta.json").write_text(text)
        problems += find_problems(tmp_path / "embeddings", store, 16, WIDTH)
    assert len(problems) == 3
    assert not any("delete" in line for line in problems)


def test_damage_is_found(store, tmp_path):
    own = write(tmp_path, store)
    names = [store.name]
    said = []
    assert verify(tmp_path, names, tmp_path / "cache", said.append) == []
    assert verify(tmp_path, names, tmp_path / "cache", said.append) == []
    assert len(said) == 1  # a second run finds the mark
    data = bytearray((own / "embeddings.npy").read_bytes())
    data[1000] ^= 1
    (own / "embeddings.npy").write_bytes(data)
    assert find_problems(tmp_path, store, 16, WIDTH) == []  # no header and no size tells
    assert "checksum differs" in verify(tmp_path, names, tmp_path / "cache", said.append)[0]
    (own / "embeddings.npy").write_bytes(data[:-1])
    assert "cut short" in find_problems(tmp_path, store, 16, WIDTH)[0]
    with pytest.raises(StoreError, match="cut short"):
        open_embeddings(own, 8)
    meta = json.loads((own / "meta.json").read_text())
    (own / "meta.json").write_text(json.dumps(meta | {"max_seq_length": 17}))
    assert "damaged or edited" in find_problems(tmp_path, store, 17, WIDTH)[0]


def test_all_datasets_have_one_teacher(toy_world, store, tmp_path):
    other = open_store(toy_world.stores / "toy_classification")
    write(tmp_path, store)
    own = write(tmp_path, other)
    names = [store.name, other.name]
    assert other_teachers(tmp_path, names) == []
    meta = {key: value for key, value in embedding_store.read_meta(own).items() if key != "check"}
    write_json(own / "meta.json", seal(meta | {"precision": "bf16"}))
    (problem,) = other_teachers(tmp_path, names)
    assert "different teachers" in problem
    assert "precision bf16" in problem
    write_json(own / "meta.json", seal(meta | {"teacher_config": "0123"}))
    assert other_teachers(tmp_path, names) == []  # the other one is older, and says nothing of its teacher's config
    of_first = embedding_store.read_meta(tmp_path / store.name)
    del of_first["check"]
    write_json(tmp_path / store.name / "meta.json", seal(of_first | {"teacher_config": "4567"}))
    assert "config 0123" in other_teachers(tmp_path, names)[0]


# ------------------------------------------------------------------------------------------ writing


def test_numbers_that_fit_no_float16_are_refused(store, tmp_path):
    facts = facts_of(store, "float16")
    begin(tmp_path / "x", facts, 1, 200)
    rows = RowWriter(tmp_path / "x", "float16", WIDTH)
    large = np.ones((2, WIDTH), np.float32)
    large[1, 3] = 1e5
    with pytest.raises(ValueError, match=r"text 5: 1e\+05 is too large for float16"):
        rows.write(0, np.array([4, 5]), large)
    with pytest.raises(ValueError, match=r"text 4: .*not finite"):
        rows.write(0, np.array([4, 5]), large * np.nan)
    rows.close()
    with pytest.raises(StoreError, match="1 batches are missing"):
        finish(tmp_path / "x", facts)


def test_what_was_committed_survives_and_other_inputs_begin_anew(store, tmp_path):
    folder, facts = tmp_path / store.name, facts_of(store)
    batches = TextBatches(store, 16, 200)
    assert begin(folder, facts, len(batches), 200) == 0
    rows = RowWriter(folder, "float32", WIDTH)
    for number in range(3):
        rows.write(number, batches.numbers(number), row_of(batches.numbers(number)))
    rows.commit()
    rows.write(3, batches.numbers(3), row_of(batches.numbers(3)))  # and killed: never committed
    assert begin(folder, facts | {"model": "moved/teacher"}, len(batches), 200) == 3
    assert RowWriter(folder, "float32", WIDTH).remaining()[0] == 3
    assert begin(folder, facts | {"max_seq_length": 17}, len(batches), 200) == 0
    assert len(RowWriter(folder, "float32", WIDTH).remaining()) == len(batches)


def test_finished_embeddings_are_left_alone_and_others_refused(store, tmp_path):
    own = write(tmp_path, store)
    facts = facts_of(store)
    assert is_done(own, facts) == (True, [])
    assert is_done(own, facts | {"model": "moved"}) == (True, [])
    done, (problem,) = is_done(own, facts | {"max_seq_length": 17, "dtype": "float16"})
    assert not done
    assert "max_seq_length 16 -> 17; dtype 'float32' -> 'float16'" in problem
    assert is_done(tmp_path / "nothing", facts) == (False, [])
