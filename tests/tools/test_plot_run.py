"""A run's picture is drawn from its log, and a log that cannot be drawn is refused with a message.

python -m pytest tests/tools/test_plot_run.py
"""

import json

import pytest

from tools import plot_run

TRAIN = [
    {"step": step, "kind": "train", "lr": 1e-3, "grad_norm": norm, "losses": {"toy": {"in_batch": 1 / step}}}
    for step, norm in ((1, 0.5), (2, None), (3, 0.4))  # the second update was left out
]
VALIDATION = {"step": 3, "kind": "validation", "measures": {"toy": {"in_batch": 0.5, "mrr": 0.8}}}


def write_log(folder, lines: list[dict]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_run_is_drawn(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    write_log(tmp_path, [*TRAIN, VALIDATION])
    assert plot_run.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "training.png")
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("text", "words"), [
    (None, "No such file"), ("", "no training step was logged yet"), ('{"step": 1, "ki', "metrics.jsonl, line 1: "),
], ids=["none", "empty", "cut"])  # fmt: skip
def test_a_log_that_cannot_be_drawn_is_refused(tmp_path, capsys, text, words):
    pytest.importorskip("matplotlib")
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    assert plot_run.main([str(tmp_path)]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "training.png").exists()
