"""Whatever stands in a source, each of its rows is used or counted, and what comes out are tuples.

python -m pytest tests/tuples/test_sources_fuzz.py
"""

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tools import build_tuples
from tuples.sources.description import KINDS

TEXTS = st.one_of(
    st.sampled_from(["a", "b", "c", "d", "", " \n", "\ud800", "ä", "a\0", "x" * 50, None, 3, {}]),
    st.text(max_size=3),
    st.lists(st.sampled_from(["a", "b", "e", "", None]), max_size=3),
)
LABELS = st.sampled_from([0, 1, 2, "0", "1", 1.0, True, None, -1, "", "zebra", float("nan"), [], 10**30])
COLUMNS = {role: TEXTS for kind in KINDS.values() for role in kind.columns}
COLUMNS |= {"label": LABELS, "score": LABELS, "id": st.sampled_from([None, 1, 1.0, "1", "2", "", 7])}
ROWS = st.lists(st.fixed_dictionaries({}, optional=COLUMNS), min_size=1, max_size=30)
KEYS = {
    "instruction": st.sampled_from(["", "Find it."]),
    "cap": st.sampled_from([0, 1, 3]),
    "max_chars": st.sampled_from([2, 1000]),
}


@pytest.fixture(autouse=True, scope="module")
def without_waiting_for_the_disk():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.mark.parametrize("kind", KINDS)
@given(rows=ROWS, keys=st.fixed_dictionaries(KEYS))
@settings(max_examples=20)
def test_every_row_is_used_or_counted(kind, rows, keys):
    roles = KINDS[kind].columns
    first = dict.fromkeys((*roles, "id"), "a first row that names the columns")
    if kind == "classification":
        keys = keys | {"labels": {"0": "no", "1": "yes"}}
    description = {"name": "x", "kind": kind, "files": "a.jsonl", "columns": {"id": "id"}, **keys}
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "a.jsonl").write_text("\n".join(json.dumps(row) for row in [first, *rows]))
        (folder / "x.json").write_text(json.dumps(description))
        status = build_tuples.main(["--source", str(folder / "x.json"), "--output_dir", str(folder / "raw")])
        if status == build_tuples.REFUSED:
            assert not any((folder / "raw").iterdir())
            return
        assert status == build_tuples.DONE
        report = json.loads((folder / "raw" / "x.build.json").read_text())
        left_out = sum(found["rows"] for found in report["left_out"].values())
        assert report["rows_read"] == len(rows) + 1 == report["rows_used"] + left_out
        check(pq.read_table(folder / "raw" / "x.parquet").to_pylist(), report, keys["cap"])


def check(tuples: list[dict], report: dict, cap: int) -> None:
    """They are tuples: a query, another text as its passage, negatives that differ from both and each other."""
    assert len(tuples) == report["tuples"] > 0
    assert not cap or len(tuples) <= cap
    for row in tuples:
        query = row["query"].removeprefix("Instruct: Find it.\nQuery: ")
        texts = [text for name, text in row.items() if name != "query" and text is not None]
        assert row["passage"]
        assert query.strip()
        assert len(set(texts)) == len(texts)
        assert query not in texts or report["kind"] == "classification"
