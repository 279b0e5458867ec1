"""The benchmarks that need what is not here still run, at toy size.

python -m pytest tests/test_benchmarks.py
"""

import sys

import pytest
import torch

from benchmarks import mining, results, state, step
from benchmarks.common import batch_of_shape
from benchmarks.lengths import SHAPES, padding_ratio, tuples


def test_the_benchmark_of_states_runs_at_toy_size(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["state.py", "--gigabytes", "0.001", "--states", "2", "--folder", str(tmp_path)])
    monkeypatch.setattr(state, "WIDTH", 64)
    state.main()
    printed = capsys.readouterr().out
    assert printed.count("0.00 GB") == 2
    assert "one after another, as before: the loop stood still for" in printed
    assert "4B: a state of 48.2 GB every 30 minutes" in printed
    assert list(tmp_path.iterdir()) == []


def test_the_benchmark_of_mining_measures_what_is_missing(monkeypatch, tmp_path, capsys):
    """A toy size: every way once; a row that is lost is measured again, and no other is."""
    measured = []

    def here(function, *arguments):
        measured.append(arguments[2])
        return function(*arguments)

    monkeypatch.setattr(mining, "QUERIES", 20)
    monkeypatch.setattr(mining, "in_fresh_process", here)
    (tmp_path / "vectors").mkdir()
    flags = ["--passages", "300", "--encode", "0", "--threads", "1", "--folder", str(tmp_path / "vectors")]
    flags += ["--rows", str(tmp_path / "rows.jsonl")]
    mining.main([*flags, "--minutes", "0"])
    assert capsys.readouterr().out.count("left out: ") == 4
    assert measured == []
    mining.main(flags)
    assert measured == ["exact fp32", "exact fp16", "flat", "IVF"]
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-4:]]
    assert [row[:-8] for row in rows] == [["exact", "fp32"], ["exact", "fp16"], ["flat"], ["IVF"]]
    assert [(row[-8], row[-5]) for row in rows] == [("300", "20")] * 4
    recalls = [float(row[-1]) for row in rows]
    assert recalls[0] == recalls[2] == 1
    assert recalls[1] > 0.95
    assert not any((tmp_path / "vectors").iterdir())
    kept = (tmp_path / "rows.jsonl").read_text().splitlines()
    (tmp_path / "rows.jsonl").write_text("\n".join([*kept[:2], kept[3]]) + "\n")  # that of "flat" is lost
    mining.main(flags)
    assert measured[4:] == ["exact fp32", "flat"]  # the first only to be compared with
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 4


def test_frozen_lengths_are_as_named():
    ratios = {name: padding_ratio(tuples(name, 16)) for name in SHAPES}
    assert ratios == pytest.approx({"heavy-tailed": 7.24, "MS-MARCO-like": 2.47, "long documents": 1.78}, abs=0.01)


def test_columns_hold_the_texts_of_the_batch():
    batch = batch_of_shape("MS-MARCO-like", 3, 16384)
    columns = step.columns(batch)
    texts = batch.tokens.split(batch.lengths.tolist())
    assert len(columns) == 9
    for column, first in ((0, 0), (1, 3), (2, 6), (8, 12)):
        places = range(first, first + 3) if column < 2 else range(6 + column - 2, 27, 7)
        for row, place in zip(range(3), places, strict=True):
            ids = columns[column]["input_ids"][row][columns[column]["attention_mask"][row].bool()]
            assert torch.equal(ids, texts[place])


def test_the_page_has_a_place_for_every_command():
    page = results.PAGE.read_text(encoding="utf-8")
    for command in (*results.ANYWHERE, *results.AFTER_QUICKSTART, *results.ON_A_GPU):
        changed = results.replaced(page, command, "the figures of this command")
        assert changed.count("the figures of this command") == 1


def test_results_are_replaced_below_their_command():
    page = "Machine: old\n\n`python -m benchmarks.x`, in turn:\n\n```\nold\n```\n"
    page += "\n`python -m benchmarks.y`\n\n```\ny\n```\n"
    found = results.replaced(page, "python -m benchmarks.x", "new\nlines")
    assert found == page.replace("old\n```", "new\nlines\n```")
    with pytest.raises(ValueError, match="z"):
        results.replaced(page, "python -m benchmarks.z", "")
