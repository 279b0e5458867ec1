"""Malformed input of every kind: refused with words, a non-zero status, and not a file changed.

python -m pytest -s tests/test_fuzz.py        prints how many cases there were of each kind

Most cases are put to the function that decides, a few of each kind to the whole command.
"""

import contextlib
import io
import json
import random
import shutil
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_origin

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import toy
from conftest import tokenize, write_state
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import arguments
import run
import tokenize_data_qwen
from arguments import Args
from data import cache, jobs
from runtime import checkpoint

MANY = settings(max_examples=150, suppress_health_check=list(HealthCheck))
FEW = settings(max_examples=4, suppress_health_check=list(HealthCheck))
KEYS = {field.name: field for field in fields(Args)}
ODD = {  # values of every JSON type
    str: ["", "x" * 300, "../x", "a\0b", "ünï", "true", "1"], int: [-1, 7, 10**30],
    float: [0.5, -2.5], bool: [True, False], type(None): [None],
    list: [[], [1], [["q_proj"]], [None]], dict: [{}, {"a": 1}],
}  # fmt: skip
WELCOME = {int: {int}, float: {int, float}, bool: {bool}, str: {str}}  # type of a key -> JSON types that may be right


def snapshot(folder: Path) -> dict[str, tuple]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.rglob("*"))}


def status_and_output(call) -> tuple[int, str]:
    """The exit status of a command, and everything that it printed."""
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            status = call()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
            print(end.code)
    return status, err.getvalue() + out.getvalue()


def check_counts(cases: Counter, kinds: list[str]) -> None:
    """Enough cases, and some of each kind."""
    for kind in kinds:
        print(f"{cases[kind]:5} {kind}")
    assert cases.total() >= 120
    assert min(cases[kind] for kind in kinds) >= 3


# --------------------------------------------------------------------------------------------- configs


def wrong_type(draw, good: dict) -> str:
    name = draw(st.sampled_from(sorted(KEYS)))
    kinds = get_args(KEYS[name].type) or (KEYS[name].type,)
    welcome = set().union(*(WELCOME.get(kind, {get_origin(kind) or kind}) for kind in kinds))
    kind = draw(st.sampled_from([kind for kind in ODD if kind not in welcome]))
    return json.dumps(good | {name: draw(st.sampled_from(ODD[kind]))})


def out_of_range(draw, good: dict) -> str:
    low = {name: f.metadata["low"] for name, f in KEYS.items() if f.metadata["low"] is not None}
    name = draw(st.sampled_from(sorted(low)))
    return json.dumps(good | {name: low[name] - draw(st.integers(1, 10**6))})


def unknown_key(draw, good: dict) -> str:
    name = draw(st.text(min_size=1).filter(lambda name: name not in KEYS))
    return json.dumps(good | {name: draw(st.sampled_from([1, "x", None]))})


def key_twice(draw, good: dict) -> str:
    name = draw(st.sampled_from(sorted(good)))
    return json.dumps(good)[:-1] + f", {json.dumps(name)}: {json.dumps(good[name])}}}"


def cut(draw, good: dict) -> str:
    text = json.dumps(good)
    return text[: draw(st.integers(0, len(text) - 1))]


def no_number(draw, good: dict) -> str:
    name = draw(st.sampled_from(["learning_rate", "temperature", "seed", "max_seq_length"]))
    word = draw(st.sampled_from(["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000]))
    return json.dumps(good | {name: 0}).replace(f'"{name}": 0', f'"{name}": {word}')


def not_an_object(draw, good: dict) -> str:
    junk = st.one_of(st.text(), st.integers(), st.lists(st.integers()), st.just("[" * 100_000))
    value = draw(junk)
    return value if isinstance(value, str) and value.startswith("[[") else json.dumps(value)


def escape(draw, good: dict) -> str:
    part = st.sampled_from(["..", ".", "/", "\\", "\0", "a" * 200, "ａ", "%2e", " ", "\n", "~", "$HOME", ":"])
    return json.dumps(good | {"experiment_id": "".join(draw(st.lists(part, min_size=1, max_size=4))).rjust(2, "/")})


CONFIGS = (wrong_type, out_of_range, unknown_key, key_twice, cut, no_number, not_an_object, escape)


@st.composite
def broken_configs(draw, good: dict) -> tuple[str, str]:
    kind = draw(st.sampled_from(CONFIGS))
    return kind.__name__, kind(draw, good)


def test_malformed_configs(settings, tmp_path):
    path = tmp_path / "config.json"
    cases = Counter()

    @MANY
    @given(broken_configs(settings))
    def each(case):
        kind, text = case
        path.write_text(text, encoding="utf-8", errors="surrogateescape")
        before = snapshot(tmp_path)
        _, problems, _ = arguments.parse(["--config", str(path)])
        assert problems, (kind, text[:300])
        assert snapshot(tmp_path) == before
        cases[kind] += 1

    each()
    check_counts(cases, [kind.__name__ for kind in CONFIGS])


@pytest.mark.parametrize("kind", CONFIGS, ids=lambda kind: kind.__name__)
def test_the_training_command_refuses_malformed_configs(settings, tmp_path, kind):
    path = tmp_path / "config.json"

    @FEW
    @given(st.data())
    def each(data):
        text = kind(data.draw, settings)
        path.write_text(text, encoding="utf-8", errors="surrogateescape")
        before = snapshot(tmp_path)
        status, printed = status_and_output(lambda: run.main(["--config", str(path)]))
        assert status == 2, (text[:300], printed)
        assert "nothing was started" in printed
        assert snapshot(tmp_path) == before

    each()


# ------------------------------------------------------------------------------------------ raw files


def bad_row(draw, rows: list) -> bytes:
    junk = st.sampled_from([None, 3, "text", [], {}, {"query": "q"}, {"query": "q", "passage": ""}, {"passage": "p"},
                            {"query": None, "passage": "p"}, {"query": 1, "passage": "p"},
                            {"query": " ", "passage": "p"},
                            {"query": ["q"], "passage": "p"}, {"query": "q", "passage": {"a": 1}},
                            {"query": "q", "passage": "p", "negative_1": 5},
                            {"query": "q", "anchor": "q", "positive": "p"}])  # fmt: skip
    rows = [*rows, draw(junk)]
    random.Random(draw(st.integers(0, 99))).shuffle(rows)
    return "\n".join(map(json.dumps, rows)).encode()


def bad_line(draw, rows: list) -> bytes:
    lines = [json.dumps(row).encode() for row in rows]
    place = draw(st.integers(0, len(lines) - 1))
    lines[place] = draw(
        st.sampled_from([lines[place][:-1], b"\xff\xfe", b"{", b"nul", lines[place] + b"}", b"'q'", b"\0"])
    )
    return b"\n".join(lines)


def cut_parquet(draw, rows: list) -> bytes:
    data = as_parquet(pa.Table.from_pylist(rows))
    return data[: draw(st.integers(0, len(data) - 1))]


def other_columns(draw, rows: list) -> bytes:
    n, some = len(rows), draw(st.sampled_from(["ints", "lists", "none", "renamed", "empty"]))
    columns = {
        "ints": {"query": list(range(n)), "passage": ["p"] * n},
        "lists": {"query": [["q"]] * n, "passage": ["p"] * n},
        "none": {"query": pa.nulls(n, pa.string()), "passage": ["p"] * n},
        "renamed": {"question": ["q"] * n, draw(st.sampled_from(["answer", "text", "Passage"])): ["p"] * n},
        "empty": {"query": pa.array([], pa.string()), "passage": pa.array([], pa.string())},
    }
    return as_parquet(pa.table(columns[some]))


def as_parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


RAW = {bad_row: "jsonl", bad_line: "jsonl", cut_parquet: "parquet", other_columns: "parquet"}


@st.composite
def broken_files(draw) -> tuple[str, str, bytes]:
    kind = draw(st.sampled_from(list(RAW)))
    return kind.__name__, RAW[kind], kind(draw, toy.raw_rows(6, 2))


@pytest.fixture
def raw(tmp_path):
    """A folder of raw files with a sound one in it."""
    toy.write_parquet(tmp_path / "raw" / "sound.parquet", toy.raw_rows(5, 2))
    return tmp_path / "raw"


def test_malformed_raw_files(raw, tmp_path):
    words = ["--input_dir", str(raw), "--output_dir", str(tmp_path / "stores"), "--task", "retrieval"]
    flags = tokenize_data_qwen.parse(words)
    cases = Counter()

    @MANY
    @given(broken_files())
    def each(case):
        kind, suffix, data = case
        path = raw / f"broken.{suffix}"
        path.write_bytes(data)
        before = snapshot(tmp_path)
        files, problems = tokenize_data_qwen.find_raw_files(flags)
        problems += jobs.plan(files, tokenize_data_qwen.order_of(flags, ""))[1]
        assert problems, (kind, data[:300])
        assert all(str(path) in problem for problem in problems)
        assert snapshot(tmp_path) == before
        path.unlink()
        cases[kind] += 1

    each()
    check_counts(cases, [kind.__name__ for kind in RAW])


@pytest.mark.parametrize("kind", RAW, ids=lambda kind: kind.__name__)
def test_the_tokenising_command_refuses_malformed_raw_files(toy_world, raw, tmp_path, kind):
    path = raw / f"broken.{RAW[kind]}"

    @FEW
    @given(st.data())
    def each(data):
        content = kind(data.draw, toy.raw_rows(6, 2))
        path.write_bytes(content)
        before = snapshot(tmp_path)
        status, printed = status_and_output(
            lambda: tokenize(raw, tmp_path / "stores", toy_world.backbone, "--task", "retrieval")
        )
        assert status == 2, (content[:300], printed)
        assert str(path) in printed
        assert snapshot(tmp_path) == before

    each()


# ---------------------------------------------------------------------------------- stores and states


def test_malformed_stores(toy_world, tmp_path):
    shutil.copytree(toy_world.stores / "toy_classification", tmp_path / "data" / "toy_classification")
    path = tmp_path / "data" / "toy_classification" / "meta.json"
    good = json.loads(path.read_text())
    keys = ["format", "name", "task", "rows", "texts", "tokens", "negatives", "max_token_id", "eos_token_id", "sha256"]
    values = st.one_of(*(st.sampled_from(values) for values in ODD.values()), st.just("gone"))
    cases = Counter()

    @MANY
    @given(st.sampled_from(keys), values)
    def each(key, value):
        meta = {name: old for name, old in good.items() if name != key}
        path.write_text(json.dumps(meta if value == "gone" else meta | {key: value}))
        before = snapshot(tmp_path / "data")
        stores, problems = cache.prepare(tmp_path / "data", tmp_path / "cache", lambda _: None)
        assert problems, (key, value)
        assert stores == []
        assert all(str(path.parent) in problem for problem in problems)
        assert snapshot(tmp_path / "data") == before
        cases[key] += 1

    each()
    check_counts(cases, keys)


def is_same_json(data: bytes, other: bytes) -> bool:
    try:
        return json.loads(data) == json.loads(other)
    except ValueError:
        return False


def test_malformed_states(tmp_path):
    folder = write_state(tmp_path, 3, {"weights": {"a": torch.arange(6.0)}}, {"sizes": {"metrics": 3}}, keep=1)
    names = [path.name for path in folder.iterdir()]
    whole = {name: (folder / name).read_bytes() for name in names}
    cases = Counter()

    @MANY
    @given(st.sampled_from(names), st.integers(0, 10**6), st.integers(1, 255), st.booleans())
    def each(name, place, change, is_cut):
        data = bytearray(whole[name])
        place %= len(data)
        data[place] ^= change
        if is_cut:
            del data[place:]
        (folder / name).write_bytes(data)
        if name == "state.json" and is_same_json(data, whole[name]):  # other white space
            step, facts, _ = checkpoint.read(folder)
            assert (step, facts) == (3, {"sizes": {"metrics": 3}})
        else:
            with pytest.raises(ValueError, match=r"state|checksum|format"):
                checkpoint.read(folder)
        (folder / name).write_bytes(whole[name])
        cases[name] += 1

    each()
    check_counts(cases, names)
    assert checkpoint.read(folder)[0] == 3
