"""Trackers: the same numbers in each one's own files, resumed runs continue in them, and none ends a training.

python -m pytest tests/training/test_trackers.py
"""

import json
import os
import sqlite3
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import interrupted, read_metrics, train_here
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from training import trackers

Curves = dict[str, dict[int, list[float]]]  # tag -> step -> the values that were logged there


def add(curves: Curves, tag: str, step: int, value: float) -> None:
    curves.setdefault(tag, {}).setdefault(step, []).append(pytest.approx(value, rel=1e-6))


def of_tensorboard(folder: Path) -> Curves:
    curves = {}
    events = EventAccumulator(str(folder)).Reload()
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            add(curves, tag, event.step, event.value)
    return curves


def records(path: Path) -> list[bytes]:
    """What an offline file of Weights & Biases holds: a log of LevelDB's kind behind 7 bytes, in blocks of 32 KiB.

    Each piece has a checksum (4 bytes), a length (2) and a kind (1): whole, first, middle, last.
    """
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    found, at, part = [], 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # too little for a head: the block is filled up
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            found.append(part)
            part = b""
    return found


def of_wandb(path: Path) -> tuple[Curves, str, dict]:
    """(curves, the project, the configuration) of an offline file."""
    from wandb.proto import wandb_internal_pb2

    curves, project, config = {}, None, {}
    for data in records(path):
        record = wandb_internal_pb2.Record.FromString(data)
        if record.HasField("run"):
            project = record.run.project
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        if not record.HasField("history"):
            continue
        for item in record.history.item:
            name = item.key or "/".join(item.nested_key)
            if not name.startswith("_"):
                add(curves, name, record.history.step.num, json.loads(item.value_json))
    return curves, project, config


def of_trackio(folder: Path) -> tuple[Curves, set[str]]:
    """(curves, ids of the runs) of a project's database."""
    curves = {}
    with sqlite3.connect(folder / f"{trackers.PROJECT}.db") as database:
        rows = database.execute("SELECT run_id, step, metrics FROM metrics ORDER BY id").fetchall()
    for _, step, metrics in rows:
        for tag, value in json.loads(metrics).items():
            add(curves, tag, step, value)
    return curves, {run_id for run_id, _, _ in rows}


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """No key, no settings of this machine, and everything that trackers keep below `tmp_path`."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "TRACKIO_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    for kind in ("CONFIG", "CACHE", "DATA", "ARTIFACT"):
        monkeypatch.setenv(f"WANDB_{kind}_DIR", str(tmp_path / "wandb_of_user"))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    assert "trackio" not in sys.modules


@pytest.mark.processes  # Weights & Biases' own
@pytest.mark.usefixtures("offline")
def test_each_tracker_has_the_published_tags_and_a_resumed_run_goes_on_in_them(settings, tmp_path, capsys):
    if "trackio" not in trackers.LOGGER_TYPE_TO_CLASS:  # before it is imported: it needs a newer huggingface_hub too
        pytest.skip("this accelerate knows no trackio: pip install -U accelerate")
    wandb = pytest.importorskip("wandb", reason="pip install wandb")
    pytest.importorskip("trackio", reason="pip install trackio")
    keys = {"report_to": "tensorboard,wandb,trackio", "log_interval": 1, "train_steps": 5, "validation_steps": 5}
    keys["checkpointing_steps"] = 2
    folder = interrupted(settings | keys, 4)  # logs step 3, which the state of step 2 does not know
    wandb.finish()  # of this process; a kill would leave it open
    assert "wandb: no key is set (`wandb login` sets one): written to" in capsys.readouterr().out
    train_here(settings | keys)

    board = of_tensorboard(tmp_path / "tb" / "toy")
    assert list(board["lr"]) == [1, 2, 3, 4, 5]
    for line in read_metrics(folder, "train"):
        for dataset, losses in line["losses"].items():
            for loss, value in losses.items():
                assert board[f"{dataset}/training_loss_{loss}"][line["step"]] == [value]
    assert {"lr", "grad_norm", "Avg/clustering/valid_loss_hard", "Avg/retrieval/valid_group_mrr"} <= set(board)

    parts = sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    before, after = (of_wandb(path) for path in parts)
    assert parts[0].name == parts[1].name  # one run
    assert (before[1], after[1]) == ("f2llm", "f2llm")
    assert before[2]["learning_rate"] == 1e-3
    assert before[0]["lr"].keys() == {1, 2, 3}
    assert after[0]["lr"].keys() == {3, 4, 5}
    joined = {tag: before[0].get(tag, {}) | after[0][tag] for tag in after[0]}
    assert joined == board
    assert before[0]["lr"][3] == after[0]["lr"][3]

    curves, ids = of_trackio(tmp_path / "trackio")
    assert len(ids) == 1
    assert curves["lr"][3] == board["lr"][3] * 2  # a killed run's lines stay, and say the same
    once = {tag: {step: values[:1] for step, values in steps.items()} for tag, steps in curves.items()}
    assert once == board


# ------------------------------------------------------------------------------- Weights & Biases' mode


class FakeWandb(SimpleNamespace):
    """As much of wandb as decides where a run goes."""

    errors = SimpleNamespace(Error=LookupError)


def login_that(answer):
    def login(*, prompt, verify):
        assert (prompt, verify) == (False, True)
        if isinstance(answer, Exception):
            raise answer
        return answer

    return login


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (True, None),
        (False, "no key is set (`wandb login` sets one)"),
        (LookupError("no route"), "its server does not answer, or refuses the key"),
        (TypeError("prompt"), "no key is set (`wandb login` sets one)"),
    ],
)
def test_a_run_is_sent_only_where_it_can_be(answer, reason, monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_RUN_ID", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(login=login_that(answer)))
    said = []
    options = trackers.wandb_options("toy", tmp_path, {"seed": 1}, 0, said.append)
    assert options.get("mode") == ("offline" if reason else None)
    assert len(said) == bool(reason)
    assert all(reason in line for line in said)
    assert (options["name"], options["dir"], options["resume"]) == ("toy", str(tmp_path), "allow")
    again = trackers.wandb_options("toy", tmp_path, {"seed": 1}, 4, said.append)
    assert again["id"] == options["id"]
    assert trackers.wandb_options("toy", tmp_path, {"seed": 1}, 0, said.append)["id"] != options["id"]


def test_what_the_environment_says_to_wandb_wins(monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_RUN_ID"):
        monkeypatch.setenv(name, "theirs")
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(login=login_that(AssertionError("asked"))))
    options = trackers.wandb_options("toy", tmp_path, {}, 0, pytest.fail)
    assert not {"mode", "dir", "id"} & set(options)


# --------------------------------------------------------------------------------- trackers that fail


class Broken(SimpleNamespace):
    """A tracker that fails at its second line."""

    def log(self, values, step):
        if self.lines:
            raise BrokenPipeError("its process is gone")
        self.lines.append((step, values))

    def finish(self):
        raise BrokenPipeError("its process is gone")


def test_a_tracker_that_fails_is_left_out_and_said_once(capsys):
    good, broken = Broken(name="trackio", lines=[]), Broken(name="wandb", lines=[(0, {})])
    accelerator = SimpleNamespace(trackers=[broken, good])
    trackers.log(accelerator, {"lr": 1.0}, 3)
    assert good.lines == [(3, {"lr": 1.0})]
    assert accelerator.trackers == [good]
    trackers.finish(accelerator)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "warning: wandb failed and is left out; metrics.jsonl has everything: its process is gone"
    assert len(said) == 2
    with pytest.raises(BrokenPipeError):  # what this machine's disk refuses ends the run
        trackers.log(SimpleNamespace(trackers=[Broken(name="tensorboard", lines=[1])]), {}, 1)


def test_a_tracker_that_cannot_start_is_a_sentence(tmp_path, monkeypatch):
    def refuses(*_, **__):
        raise ValueError("a name that is reserved\nmore")

    monkeypatch.setitem(trackers.LOGGER_TYPE_TO_CLASS, "trackio", refuses)
    accelerator = SimpleNamespace(is_main_process=True, log_with=["trackio"], print=print)
    with pytest.raises(trackers.RunError, match=r"^report_to: trackio: cannot start: a name that is reserved$"):
        trackers.start_trackers(accelerator, ["trackio"], "toy", tmp_path, {}, 0)
