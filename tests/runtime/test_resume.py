"""A run that is interrupted and continued is the run that was not: weights, moments, order and logs, bit for bit.

python -m pytest tests/runtime/test_resume.py
"""

import contextlib
import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
import toy
from chaos import final
from conftest import (
    RETRIEVAL,
    Killed,
    contents,
    door_here,
    interrupted,
    read_metrics,
    tensors_of,
    tokenize,
    toy_settings,
    train_here,
    write_state,
)
from harness import door_on_processes, on_processes, through_the_door
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import run
from data.feed import Feed
from runtime import checkpoint, processes, shards
from training import models
from utils import RunError

LORA = {"use_lora": True, "lora_dropout": 0.2, "lora_target_modules": "q_proj,up_proj"}


# Two epochs over three datasets, a state every five steps.
KEYS = {"train_steps": -1, "train_epochs": 2, "train_batch_size": 24, "log_interval": 3, "checkpointing_steps": 5,
        "validation_steps": 7}  # fmt: skip


@pytest.fixture
def keys(settings, tmp_path):
    toy.make_backbone(tmp_path / "teacher", hidden_size=48, seed=7)
    return settings | KEYS


@pytest.fixture(scope="module")
def once(toy_world, tmp_path_factory):
    """(run that nobody touched, run that was killed after its second state), made once."""
    keys = toy_settings(toy_world, tmp_path_factory.mktemp("once")) | KEYS
    return train_here(keys | {"experiment_id": "whole"}), interrupted(keys, 13)


@pytest.fixture
def begun(keys, once):
    """A run that was killed after its second state; returns its folder."""
    return shutil.copytree(once[1], Path(keys["output_dir"]) / "toy")


@pytest.mark.parametrize("changes", [
    {}, {"use_mrl": True, "teacher_model_path": "teacher"}, LORA,
    LORA | {"use_mrl": True, "teacher_model_path": "teacher"},
], ids=["full", "full, matryoshka, distillation", "LoRA with dropout", "LoRA, all"])  # fmt: skip
def test_a_run_killed_twice_ends_in_the_same_bytes(train, keys, tmp_path, monkeypatch, changes):
    changes = dict(changes)
    if "teacher_model_path" in changes:
        changes["teacher_model_path"] = str(tmp_path / "teacher")
    whole = train(**keys | changes | {"experiment_id": "whole"})
    steps = read_metrics(whole, "train")[-1]["step"]
    assert steps == 2 * (9 + 2 + 2)
    for step in (9, 18):  # in the first epoch between two states; in the second
        interrupted(keys | changes, step)
    folder = train(**keys | changes)
    assert final(folder) == final(whole)
    assert {path.name for path in (folder / "state").iterdir()} == {"step_25", f"step_{steps}"}


def test_a_run_killed_before_its_first_state_begins_again(train, keys, once):
    interrupted(keys, 5)
    assert final(train(**keys)) == final(once[0])


def test_a_finished_run_says_so(train, keys, once, capsys):
    shutil.copytree(once[0], Path(keys["output_dir"]) / "toy")
    assert final(train(**keys)) == final(once[0])
    assert "this run is finished: 26 steps were trained" in capsys.readouterr().out


def test_tensorboard_has_one_curve(train, keys, tmp_path, monkeypatch):
    keys |= {"report_to": "tensorboard"}
    interrupted(keys, 15)
    train(**keys)
    events = EventAccumulator(str(tmp_path / "tb" / "toy")).Reload()
    assert [event.step for event in events.Scalars("lr")] == [3, 6, 9, 12, 15, 18, 21, 24, 26]


@pytest.mark.processes
@pytest.mark.parametrize(("world", "kind"), [(2, "ddp"), (2, "fsdp"), (4, "ddp")])
def test_several_processes_resume_to_the_same_bytes(keys, world, kind):
    """Of four processes, because two numbers have the same sum in any order."""
    keys |= {"train_batch_size": 24 // world} | LORA
    assert on_processes(world, through_the_door, keys | {"experiment_id": "whole"}, kind=kind) == [0] * world
    assert on_processes(world, stopped, 8, keys, kind=kind) == [processes.STOPPED] * world
    assert on_processes(world, through_the_door, keys, kind=kind) == [0] * world
    output = Path(keys["output_dir"])
    ours, theirs = final(output / "toy"), final(output / "whole")
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []


def stopped(rank: int, world: int, step: int, config: dict) -> int:
    """The door, with SIGTERM and SIGUSR1 to one process while it works on this step."""

    def training(self, number: int, real=Feed.training):
        if number == step and rank == 1 % world:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGUSR1)
        return real(self, number)

    Feed.training = training
    return through_the_door(rank, world, config)


@pytest.mark.processes
def test_another_number_of_processes_and_another_engine_go_on(keys):
    """One process, then two under FSDP2, then three under DDP: the losses of one process all along."""
    ways = [(1, "ddp", 8), (2, "fsdp", 16), (3, "ddp", None)]
    alone = keys | {"experiment_id": "alone", "checkpointing_steps": 0}
    assert on_processes(1, through_the_door, alone) == [0]
    for world, kind, stop in ways:
        config = keys | {"train_batch_size": 24 // world, "checkpointing_steps": 0}
        function = (stopped, stop) if stop else (through_the_door,)
        assert on_processes(world, *function, config, kind=kind) == [processes.STOPPED if stop else 0] * world
    folders = [Path(keys["output_dir"]) / name for name in ("toy", "alone")]
    for kind, values in (("train", "losses"), ("validation", "measures")):
        ours, theirs = (read_metrics(folder, kind) for folder in folders)
        assert [line["step"] for line in ours] == [line["step"] for line in theirs]
        for mine, expected in zip(ours, theirs, strict=True):
            for name, kinds in expected[values].items():
                assert mine[values][name] == pytest.approx(kinds, rel=2e-5)
    ours, theirs = (load_file(folder / "epoch_2" / "model.safetensors") for folder in folders)
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-5


# ------------------------------------------------------------------------------------ what has changed


def no_model(*_, **__):
    pytest.fail("a model was loaded")


@pytest.mark.parametrize(("changes", "line"), [
    ({"learning_rate": 5e-4}, "learning_rate: was 0.001, is now 0.0005"),
    ({"train_batch_size": 12}, "global batch (train_batch_size times processes): was 24 tuples, is now 12"),
    ({"train_epochs": 3}, "steps of the run: were 26, are now 39"),
    ({"model_path": "wider"}, "model: was '"),
    ({"use_lora": True}, "use_lora: was false, is now true"),
    ({"train_data_path": "other"}, "dataset toy_retrieval: its tuples are others (checksum was "),
])  # fmt: skip
def test_what_has_changed_is_refused_before_a_model_is_loaded(
    keys, toy_world, begun, tmp_path, monkeypatch, capsys, changes, line
):
    if "model_path" in changes:
        changes = {"model_path": str(toy.make_backbone(tmp_path / "wider", layers=3))}
    if "train_data_path" in changes:
        toy.write_raw(tmp_path / "raw", rows=190)
        assert tokenize(tmp_path / "raw", tmp_path / "other", toy_world.backbone) == 0
        changes = {"train_data_path": str(tmp_path / "other")}
    monkeypatch.setattr(models, "load_backbone", no_model)
    before = contents(begun)
    assert door_here(keys | changes) == processes.REFUSED
    said = capsys.readouterr().err
    assert "cannot continue, because this has changed:\n" in said
    assert f"\n  {line}" in said
    assert "\n  put it back, or choose another experiment_id\nrun.py: 1 problem, nothing was started" in said
    assert contents(begun) == before


def test_what_has_changed_is_told_together_and_with_everything_else(keys, toy_world, begun, tmp_path, capsys):
    changes = {"learning_rate": 5e-4, "use_mrl": True, "train_batch_size": 12}
    toy.write_raw(tmp_path / "raw", rows=190)
    (tmp_path / "raw" / "toy_clustering.parquet").rename(tmp_path / "raw" / "toy_new.parquet")
    (tmp_path / "raw" / "tasks.json").unlink()
    assert tokenize(tmp_path / "raw", tmp_path / "other", toy_world.backbone, *RETRIEVAL) == 0
    assert door_here(keys | changes | {"train_data_path": str(tmp_path / "other")}) == processes.REFUSED
    said = capsys.readouterr().err
    for line in ("learning_rate: was ", "use_mrl: was ", "global batch (", "dataset toy_retrieval: its tokenised texts",
                 "dataset toy_clustering: was among the data when the run began, and is not now",
                 "dataset toy_new: is among the data now, and was not when the run began",
                 "dataset toy_classification: its task was classification, is now retrieval"):  # fmt: skip
        assert f"\n  {line}" in said
    assert said.count("toy_new") == said.count("toy_clustering") == 1

    assert door_here(keys | changes | {"report_to": "tensorbord", "train_epochs": 3}) == processes.REFUSED
    said = capsys.readouterr().err
    assert "report_to: " in said
    assert "learning_rate: was " in said
    assert "2 problems, nothing was started" in said
    for line in ("global batch", "dataset ", "steps of the run"):  # may only follow from what else is wrong
        assert line not in said


def test_where_the_newest_state_is_damaged_the_one_before_it_tells_what_has_changed(keys, begun, capsys):
    (begun / "state" / "step_10" / "state.json").write_text("{")
    assert door_here(keys | {"learning_rate": 5e-4}) == processes.REFUSED
    assert "learning_rate: was 0.001" in capsys.readouterr().err
    by_name = keys | {"learning_rate": 5e-4, "resume": str(begun / "state" / "step_5")}
    assert door_here(by_name) == processes.REFUSED
    assert "learning_rate: was 0.001" in capsys.readouterr().err


@pytest.mark.processes
def test_what_has_changed_is_refused_on_every_process_and_told_once(keys, begun):
    ended = door_on_processes(2, keys | {"learning_rate": 5e-4, "train_batch_size": 12})
    assert [end.status for end in ended] == [processes.REFUSED] * 2
    assert "learning_rate: was 0.001, is now 0.0005" in ended[0].printed
    assert "global batch" not in ended[0].printed  # 12 tuples on each of two processes are those 24
    assert "cannot continue" not in ended[1].printed


def test_harmless_keys_may_change(train, keys, begun):
    folder = train(**keys | {"save_total_limit": 1, "validation_steps": 0, "process_timeout": 9.0, "seed": 0})
    assert [path.name for path in (folder / "state").iterdir()] == ["step_26"]


def test_never_refuses_and_a_path_goes_on_from_there(train, keys, begun, capsys):
    flags = [word for key, value in (keys | {"resume": "never"}).items() for word in (f"--{key}", str(value))]
    assert run.main(flags) == 2
    assert "already holds a run" in capsys.readouterr().err
    train(**keys | {"resume": str(begun / "state" / "step_5")})
    assert "continuing after step 5 of 26" in capsys.readouterr().out


# ------------------------------------------------------------------------------------ damage, numbers


def cut(data: bytes) -> bytes:
    return data.rstrip()[:-1]


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def empty(data: bytes) -> bytes:
    return b""


STATE_FILES = [f"{kind}-00001-of-00001.safetensors" for kind in ("weights", "moments", "processes")] + ["state.json"]


@pytest.mark.parametrize("name", STATE_FILES)
@pytest.mark.parametrize("damage", [flip, cut, empty, None], ids=["flip", "cut", "empty", "gone"])
def test_a_damaged_state_is_passed_over_for_the_one_before_it(once, tmp_path, name, damage):
    states = shutil.copytree(once[1] / "state", tmp_path / "state")
    path = states / "step_10" / name
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    warnings = []
    found = checkpoint.newest(states, warnings.append)
    assert found.step == 5
    expected = checkpoint.read(once[1] / "state" / "step_5")
    assert found.facts == expected.facts
    assert found.tensors.keys() == expected.tensors.keys() == {"weights", "moments", "processes"}
    ours, theirs = tensors_of(found), tensors_of(expected)
    for kind, tensors in theirs.items():
        assert ours[kind].keys() == tensors.keys() != set()
        assert all(torch.equal(ours[kind][name], tensor) for name, tensor in tensors.items())
    [line] = warnings
    assert "step_10" in line
    assert "going back to the state before it" in line


def test_a_run_with_a_damaged_state_says_so_and_ends_in_the_same_bytes(train, keys, begun, once, capsys):
    path = begun / "state" / "step_10" / STATE_FILES[0]
    path.write_bytes(flip(path.read_bytes()))
    capsys.readouterr()
    assert final(train(**keys)) == final(once[0])
    printed = capsys.readouterr()
    assert "step_10" in printed.err
    assert "going back to the state before it" in printed.err
    assert "continuing after step 5" in printed.out


def test_where_no_state_is_whole_nothing_is_trained(train, keys, begun):
    for path in (begun / "state").glob("*/weights-*.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(RunError, match="no state in it is intact"):
        train(**keys)


def test_a_kill_at_any_point_of_a_write_leaves_the_newest_whole_state(tmp_path, monkeypatch):
    tensors = {"weights": {"a": torch.arange(5.0)}, "moments": {"b": torch.ones(3)}}
    write_state(tmp_path, 1, tensors, {"n": 1}, keep=2)
    killed = set()  # (point, the step of the newest state after the kill)
    for module, name in [(os, "replace"), (os, "fsync"), (shutil, "rmtree"), (shards, "write_file")]:
        real = getattr(module, name)
        for calls in range(1, 9):
            left = [calls]

            def dies(*arguments, real=real, left=left, **keywords):
                left[0] -= 1
                if left[0] == 0:
                    raise Killed
                return real(*arguments, **keywords)

            with monkeypatch.context() as patch:
                patch.setattr(module, name, dies)
                with contextlib.suppress(Killed):
                    write_state(tmp_path, 2, tensors, {"n": 2}, keep=2)
            step, facts, found = checkpoint.newest(tmp_path, lambda line: pytest.fail(line))
            assert facts == {"n": step}
            assert torch.equal(found["weights"].read("a"), tensors["weights"]["a"])
            if left[0] <= 0:
                killed.add((name, step))
            shutil.rmtree(tmp_path / "step_2", ignore_errors=True)
    assert killed == {("replace", 1), ("fsync", 1), ("fsync", 2), ("rmtree", 2), ("write_file", 1)}


def test_states_are_pruned_only_after_the_new_one_is_there(tmp_path):
    for step in (5, 10, 15):
        write_state(tmp_path, step, {"weights": {"a": torch.ones(1)}}, {}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_10", "step_15"]


def broken_gradient(steps: set[int]):
    """NaN in the model's output at these steps."""
    seen = []

    def train_step(live, step, real=run.train_step):
        handle = live.model.register_forward_hook(lambda *a: a[2] * float("nan") if step in steps else None)
        seen.append(step)
        try:
            return real(live, step)
        finally:
            handle.remove()

    return train_step


def test_an_update_with_a_broken_gradient_is_left_out_and_named(train, keys, monkeypatch, capsys):
    monkeypatch.setattr(run, "train_step", broken_gradient({5, 6, 12}))
    folder = train(**keys)
    printed = capsys.readouterr().err
    assert printed.count("this update is left out") == 3
    assert "step 5: the gradient is nan: tuples " in printed
    assert all(torch.isfinite(weight).all() for weight in load_file(folder / "epoch_2" / "model.safetensors").values())
    assert all(json.dumps(line, allow_nan=False) for line in read_metrics(folder, "train"))


def test_too_many_broken_updates_in_a_row_end_the_run(keys, monkeypatch, capsys):
    monkeypatch.setattr(run, "train_step", broken_gradient(set(range(7, 21))))
    flags = [word for key, value in (keys | {"max_skipped_steps": 2}).items() for word in (f"--{key}", str(value))]
    assert run.main(flags) == processes.FAILED
    assert re.search(r"step 9: the gradient is nan.*3 updates in a row", capsys.readouterr().err)
    folder = Path(keys["output_dir"]) / "toy"
    assert [path.name for path in (folder / "state").iterdir()] == ["step_5"]
