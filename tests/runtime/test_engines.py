"""The engines as users have them: the same folders from each, bf16, and one process's end is every process's end.

python -m pytest tests/runtime/test_engines.py
"""

import importlib.util
import json
import os
import re
import signal
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import toy
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from conftest import contents, read_metrics
from harness import (
    PATIENCE,
    door_on_processes,
    on_processes,
    run_command,
    start_door,
    through_the_door,
    through_the_door_in_fp64,
    train_steps,
)
from safetensors.torch import load_file

import run
from data.feed import Feed
from export import model_folder
from runtime import engine
from training import records
from utils import RunError

LORA = {"use_lora": True, "lora_dropout": 0.0, "lora_target_modules": "q_proj,up_proj"}
ALL = {"use_mrl": True, "teacher_model_path": "teacher", "gradient_checkpointing": True}


@pytest.fixture
def config(settings, tmp_path):
    toy.make_backbone(tmp_path / "teacher", hidden_size=48, seed=7)
    return settings | {"train_batch_size": 4, "log_interval": 1, "min_lr": 0.0, "warmup_steps": 0,
                       "scheduler_type": "constant_with_warmup", "process_timeout": 60}  # fmt: skip


@pytest.mark.processes
@pytest.mark.parametrize("changes", [{}, LORA], ids=["full", "LoRA"])
def test_every_engine_saves_the_same_bytes(config, tmp_path, changes):
    """With a rate so small that no weight moves files cannot differ by rounding: names, dtypes, order must agree."""
    config |= changes | {"learning_rate": 1e-60, "train_steps": 2}
    folders = []
    for world, kind in ((1, "ddp"), (2, "ddp"), (3, "fsdp")):
        name = {"experiment_id": f"{kind}{world}", "train_batch_size": 12 // world}
        assert on_processes(world, through_the_door, config | name, kind=kind) == [0] * world
        folders.append(Path(config["output_dir"]) / f"{kind}{world}" / "step_2")
    alone, *others = map(contents, folders)
    assert any(name.endswith("model.safetensors") for name in alone)
    for other in others:
        assert other == alone


@pytest.mark.processes
@pytest.mark.parametrize("changes", [ALL, LORA | ALL], ids=["full", "LoRA"])
def test_a_whole_run_of_two_is_that_of_one(config, tmp_path, changes):
    """Training, validation and saving, with Matryoshka, distillation and checkpointing; computed in fp64."""
    config |= changes | {"teacher_model_path": str(tmp_path / "teacher"), "train_steps": 6, "validation_steps": 3,
                         "learning_rate": 1e-4}  # fmt: skip
    folders = []
    for world, kind in ((1, "ddp"), (2, "ddp"), (2, "fsdp")):
        name = {"experiment_id": f"{kind}{world}", "train_batch_size": 8 // world}
        assert on_processes(world, through_the_door_in_fp64, config | name, kind=kind) == [0] * world
        folders.append(Path(config["output_dir"]) / f"{kind}{world}")
    one, *twos = folders
    for two in twos:
        check_same_metrics(two, one)
        file = "adapter_model.safetensors" if "use_lora" in changes else "model.safetensors"
        ours, theirs = load_file(two / "step_6" / file), load_file(one / "step_6" / file)
        assert ours.keys() == theirs.keys()
        largest = max(float((ours[name] - theirs[name]).abs().max()) for name in ours)
        assert largest <= 1.2e-7  # one bit of fp32


def check_same_metrics(folder: Path, expected: Path) -> None:
    for kind, values in (("train", "losses"), ("validation", "measures")):
        for ours, theirs in zip(read_metrics(folder, kind), read_metrics(expected, kind), strict=True):
            for name, numbers in theirs[values].items():
                assert ours[values][name] == pytest.approx(numbers, rel=1e-9)


@pytest.mark.processes
def test_bf16_computes_in_bf16_and_keeps_fp32_weights_and_gradients(config):
    config |= {"train_steps": 3, "learning_rate": 1e-30, "gradient_checkpointing": True}
    [exact] = on_processes(1, train_steps, [config | {"train_batch_size": 8}], torch.float32)[0]
    bf16 = {"ACCELERATE_MIXED_PRECISION": "bf16"}
    for kind in ("ddp", "fsdp"):
        configs = [config | {"experiment_id": kind}]
        [found] = on_processes(2, train_steps, configs, torch.float32, kind=kind, extra=bf16)[0]
        arrays = [*found["weights"].values(), *found["gradients"][0].values()]
        assert all(array.dtype == np.float32 for array in arrays)
        for ours, theirs in zip(found["gradients"], exact["gradients"], strict=True):
            difference = sum(((ours[name] - theirs[name]) ** 2).sum() for name in theirs) ** 0.5
            assert 1e-4 < difference / sum((value**2).sum() for value in theirs.values()) ** 0.5 < 0.1
            name = "backbone.layers.0.self_attn.q_proj.weight"
            rounded = torch.from_numpy(ours[name]).bfloat16().float().numpy()
            assert (rounded != ours[name]).mean() > 0.5  # summed over processes in fp32


@pytest.mark.processes
def test_buckets_under_fsdp_are_refused(config):
    ends = door_on_processes(2, config | {"attn_backend": "buckets"}, kind="fsdp")
    assert [end.status for end in ends] == [1, 1]
    printed = ends[0].printed + ends[1].printed
    assert "attn_backend buckets: processes would call a sharded model unequally often" in printed


def test_processes_that_do_not_find_each_other_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(engine, "Accelerator", lambda **_: SimpleNamespace(num_processes=1))
    with pytest.raises(RunError, match="2 processes were launched, but each of them is alone"):
        engine.start([], "")


@pytest.mark.parametrize(("key", "remedy"), [
    ("OFFLOAD_PARAMS", "fsdp_offload_params: set it to false"),
    ("ACTIVATION_CHECKPOINTING", "fsdp_activation_checkpointing: set it to false"),
])  # fmt: skip
def test_what_fsdp_cannot_do_here_is_refused_before_a_model_is_read(train, monkeypatch, key, remedy):
    """As a launcher asks for it: accelerate itself reads the key."""
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv(f"FSDP_{key}", "true")
    state = SimpleNamespace(fsdp_plugin=FullyShardedDataParallelPlugin())
    monkeypatch.setattr(
        engine, "Accelerator", lambda **_: SimpleNamespace(num_processes=1, mixed_precision="no", state=state)
    )
    monkeypatch.setattr(run, "setup", lambda *_: pytest.fail("a model is read"))
    with pytest.raises(RunError, match=remedy):
        train()


# -------------------------------------------------------------------------------- one ends, all end


def at_step_three(action, victim: int, rank: int) -> None:
    """A fault in the data path of one process."""
    training = Feed.training

    def broken(self, step: int):
        if step == 3 and rank == victim:
            action()
        return training(self, step)

    Feed.training = broken


def end_by_signal(number: int, mark: Path | None = None) -> None:
    """This process gets a signal; the mark is left just before."""
    if mark:
        mark.touch()
    os.kill(os.getpid(), number)


def boom():
    raise ValueError("the disk is on fire")


def no_space(*_, **__):
    raise OSError(28, "No space left on device")


def full_disk(rank: int) -> None:
    """Writing a log line fails; only the main process has a file for it."""
    if rank == 0:
        records.Metrics.write = no_space


def broken_save(rank: int) -> None:
    """What only the main process does fails."""
    model_folder.save = no_space


@pytest.mark.processes
@pytest.mark.parametrize(("kind", "world"), [("ddp", 3), ("fsdp", 2)])
@pytest.mark.parametrize(("fault", "cause", "first"), [
    (partial(at_step_three, boom, 1), "ValueError: the disk is on fire", 1),
    (partial(at_step_three, boom, 0), "ValueError: the disk is on fire", 0),
    (full_disk, "No space left on device", 0),
    (broken_save, "No space left on device", 0),
], ids=["data path of one", "data path of main", "log of main", "save of main"])  # fmt: skip
def test_an_exception_on_one_process_ends_all_with_its_cause(config, kind, world, fault, cause, first):
    """In words: a silence would be noticed only long after this test has run out of patience."""
    config |= {"train_steps": 6, "process_timeout": 10 * PATIENCE, "checkpointing_steps": 4}
    ends = door_on_processes(world, config, fault, kind)
    assert [end.status for end in ends] == [1] * world
    printed = "".join(end.printed for end in ends)
    assert printed.count("Traceback (most recent call last)") == ("on fire" in cause)  # a full disk needs none
    assert cause in ends[first].printed
    if first != 0:
        assert f"ended, because of process {first}" in ends[0].printed  # one line for this machine


@pytest.mark.processes
def test_a_killed_process_ends_the_others(config):
    fault = partial(at_step_three, partial(end_by_signal, signal.SIGKILL), 1)
    ends = door_on_processes(2, config | {"train_steps": 6, "process_timeout": 10}, fault)
    assert [end.status for end in ends] == [1, -signal.SIGKILL]
    assert re.search("Connection (closed|reset)|no sign of life", ends[0].printed)


@pytest.mark.processes
def test_a_hanging_process_ends_the_others_within_the_limit(config, tmp_path):
    limit = 6
    mark = tmp_path / "stopped"
    fault = partial(at_step_three, partial(end_by_signal, signal.SIGSTOP, mark), 1)
    processes = start_door(2, config | {"train_steps": 6, "process_timeout": limit}, fault)
    assert processes.wait(PATIENCE, rank=0)
    seconds = time.time() - mark.stat().st_mtime
    ends = processes.end(seconds=0)
    assert [end.status for end in ends] == [1, None]  # the stopped one cannot end by itself
    assert f"process 1 gave no sign of life for {limit} s: it hangs or its machine is gone" in ends[0].printed
    assert 0.5 * limit < seconds < 5 * limit


# ------------------------------------------------------------------------------- through the launchers


@pytest.mark.processes
@pytest.mark.parametrize("name", ["accelerate_fsdp_cpu", "accelerate_deepspeed_cpu"])
def test_the_shipped_cpu_configs_launch(config, tmp_path, name):
    if "deepspeed" in name and not importlib.util.find_spec("deepspeed"):
        pytest.skip("DeepSpeed is an optional package")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config | {"train_steps": 2}))
    launch = ["-m", "accelerate.commands.launch", "--config_file", f"configs/{name}.yaml"]
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    del environment["ACCELERATE_USE_CPU"]
    done = run_command(*launch, "run.py", "--config", str(path), environment=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "processes: 2" in done.stdout  # not two runs that know nothing of each other
    assert (Path(config["output_dir"]) / "toy" / "step_2" / "model.safetensors").exists()


@pytest.mark.parametrize(("kind", "mixed_precision", "dtype"), [
    ("NO", "no", torch.float32), ("MULTI_GPU", "bf16", torch.bfloat16), ("DEEPSPEED", "bf16", torch.bfloat16),
    ("FSDP", "bf16", torch.float32),  # its own policy computes in bf16, without autocast
])  # fmt: skip
def test_trials_compute_in_the_precision_of_the_training_and_keep_no_copies_of_weights(kind, mixed_precision, dtype):
    """accelerate's own autocast is empty under DeepSpeed, where `varlen` was tried in fp32 and never taken."""
    layer = torch.nn.Linear(8, 8)
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), mixed_precision=mixed_precision, distributed_type=DistributedType[kind]
    )
    with torch.no_grad(), engine.autocast_of_trials(accelerator):
        assert layer(torch.ones(1, 8)).dtype == dtype
        assert not torch.is_autocast_enabled("cpu") or not torch.is_autocast_cache_enabled()
