"""The engines as users have them: the same folders from each, bf16, and one process's end is every process's end.

python -m pytest tests/runtime/test_engines.py
"""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import toy
from conftest import read_metrics
from harness import (
    free_port,
    launcher_environment,
    on_processes,
    server,
    through_the_door,
    through_the_door_in_fp64,
    train_steps,
)
from safetensors.torch import load_file

import run
import utils
from data.feed import Feed
from runtime import engine
from utils import RunError

ROOT = Path(__file__).parent.parent.parent
LORA = {"use_lora": True, "lora_dropout": 0.0, "lora_target_modules": "q_proj,up_proj"}
ALL = {"use_mrl": True, "teacher_model_path": "teacher", "gradient_checkpointing": True}


@pytest.fixture
def config(settings, tmp_path):
    toy.make_backbone(tmp_path / "teacher", hidden_size=48, seed=7)
    return settings | {"train_batch_size": 4, "log_interval": 1, "min_lr": 0.0, "warmup_steps": 0,
                       "scheduler_type": "constant_with_warmup", "process_timeout": 60}  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("changes", [{}, LORA], ids=["full", "LoRA"])
def test_every_engine_saves_the_same_bytes(config, tmp_path, changes):
    """With a rate so small that no weight moves files cannot differ by rounding: names, dtypes, order must agree."""
    config |= changes | {"learning_rate": 1e-60, "train_steps": 2}
    folders = []
    for world, kind in ((1, "ddp"), (2, "ddp"), (2, "fsdp"), (3, "fsdp")):
        name = {"experiment_id": f"{kind}{world}", "train_batch_size": 12 // world}
        assert on_processes(world, through_the_door, config | name, kind=kind) == [0] * world
        folders.append(Path(config["output_dir"]) / f"{kind}{world}" / "step_2")
    alone, *others = map(contents, folders)
    assert any(name.endswith("model.safetensors") for name in alone)
    for other in others:
        assert other == alone


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("changes", [ALL, LORA | ALL], ids=["full", "LoRA"])
def test_a_whole_run_of_two_is_that_of_one(config, tmp_path, kind, changes):
    """Training, validation and saving, with Matryoshka, distillation and checkpointing; computed in fp64."""
    config |= changes | {"teacher_model_path": str(tmp_path / "teacher"), "train_steps": 6, "validation_steps": 3,
                         "learning_rate": 1e-4}  # fmt: skip
    folders = []
    for world in (1, 2):
        name = {"experiment_id": f"{kind}{world}", "train_batch_size": 8 // world}
        assert on_processes(world, through_the_door_in_fp64, config | name, kind=kind) == [0] * world
        folders.append(Path(config["output_dir"]) / f"{kind}{world}")
    for line, values in (("train", "losses"), ("validation", "measures")):
        for ours, theirs in zip(*(read_metrics(folder, line) for folder in folders), strict=True):
            for name, expected in theirs[values].items():
                assert ours[values][name] == pytest.approx(expected, rel=1e-9)
    file = "adapter_model.safetensors" if "use_lora" in changes else "model.safetensors"
    ours, theirs = (load_file(folder / "step_6" / file) for folder in folders)
    assert ours.keys() == theirs.keys()
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) <= 1.2e-7  # one bit of fp32


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_bf16_computes_in_bf16_and_keeps_fp32_weights_and_gradients(config, tmp_path, kind):
    config |= {"train_steps": 3, "learning_rate": 1e-30, "gradient_checkpointing": True}
    exact = on_processes(1, train_steps, [config | {"train_batch_size": 8}], torch.float32)[0][0]
    bf16 = {"ACCELERATE_MIXED_PRECISION": "bf16"}
    found = on_processes(2, train_steps, [config | {"experiment_id": "bf16"}], torch.float32, kind=kind, extra=bf16)[0][
        0
    ]
    assert all(value.dtype == np.float32 for value in [*found["weights"].values(), *found["gradients"][0].values()])
    for ours, theirs in zip(found["gradients"], exact["gradients"], strict=True):
        difference = sum(((ours[name] - theirs[name]) ** 2).sum() for name in theirs) ** 0.5
        assert 1e-4 < difference / sum((value**2).sum() for value in theirs.values()) ** 0.5 < 0.1
        name = "backbone.layers.0.self_attn.q_proj.weight"
        rounded = torch.from_numpy(ours[name]).bfloat16().float().numpy()
        assert (rounded != ours[name]).mean() > 0.5  # summed over processes in fp32


def test_buckets_under_fsdp_are_refused(config):
    status = end_of(2, config | {"attn_backend": "buckets"}, no_fault, kind="fsdp")
    assert [code for code, _ in status] == [1, 1]
    assert "attn_backend buckets: processes would call a sharded model unequally often" in status[0][1] + status[1][1]


def test_processes_that_do_not_find_each_other_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(engine, "Accelerator", lambda **_: SimpleNamespace(num_processes=1))
    with pytest.raises(RunError, match="2 processes were launched, but each of them is alone"):
        engine.start([], "")


# -------------------------------------------------------------------------------- one ends, all end


def _process(rank: int, world: int, port: int, kind: str, config: dict, fault, log: str) -> None:
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY)
    os.dup2(descriptor, 1), os.dup2(descriptor, 2)
    sys.stdout = sys.stderr = os.fdopen(descriptor, "w", buffering=1)
    os.environ.pop("ACCELERATE_USE_CPU", None)
    os.environ |= launcher_environment(rank, world, port, kind)
    torch.set_num_threads(1)
    fault(rank)
    sys.exit(through_the_door(rank, world, config))


def end_of(world: int, config: dict, fault, kind: str = "ddp", within: float = 60) -> list[tuple[int | None, str]]:
    """(exit status, what it printed) of each process; no launcher that would kill the others. None: never ended."""
    port, context = free_port(), server()
    logs = [f"{config['cache_dir']}.{rank}.log" for rank in range(world)]
    processes = [
        context.Process(target=_process, args=(rank, world, port, kind, config, fault, logs[rank]))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + within
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
    return [(code, Path(log).read_text(errors="replace")) for code, log in zip(codes, logs, strict=True)]


def no_fault(rank: int) -> None:
    pass


def at_step_three(action, victim: int, rank: int) -> None:
    """A fault in the data path of one process."""
    training = Feed.training

    def broken(self, step: int):
        if step == 3 and rank == victim:
            action()
        return training(self, step)

    Feed.training = broken


def suicide(number: int) -> None:
    os.kill(os.getpid(), number)


def boom():
    raise ValueError("the disk is on fire")


def full_disk(rank: int) -> None:
    """What only the main process does fails."""

    def write(*_):
        raise OSError(28, "No space left on device")

    utils.Metrics.write = write


def broken_save(rank: int) -> None:
    def save(*_):
        raise OSError(28, "No space left on device")

    run.model_folder.save = save


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize(("fault", "cause", "first"), [
    (partial(at_step_three, boom, 1), "ValueError: the disk is on fire", 1),
    (partial(at_step_three, boom, 0), "ValueError: the disk is on fire", 0),
    (full_disk, "No space left on device", 0),
    (broken_save, "No space left on device", 0),
], ids=["data path of one", "data path of main", "log of main", "save of main"])  # fmt: skip
def test_an_exception_on_one_process_ends_all_with_its_cause(config, kind, fault, cause, first):
    began = time.monotonic()
    ends = end_of(3, config | {"train_steps": 6, "process_timeout": 40, "checkpointing_steps": 4}, fault, kind)
    assert time.monotonic() - began < 40
    assert [code for code, _ in ends] == [1, 1, 1]
    printed = "".join(text for _, text in ends)
    assert printed.count("Traceback (most recent call last)") == ("on fire" in cause)  # a full disk needs none
    assert cause in ends[first][1]
    if first != 0:
        assert f"run.py: ended, because of process {first}" in ends[0][1]  # one line for this machine


def test_a_killed_process_ends_the_others(config):
    began = time.monotonic()
    fault = partial(at_step_three, partial(suicide, signal.SIGKILL), 1)
    ends = end_of(2, config | {"train_steps": 6, "process_timeout": 5}, fault)
    assert time.monotonic() - began < 40
    assert [code for code, _ in ends] == [1, -signal.SIGKILL]
    assert re.search("Connection (closed|reset)|no sign of life", ends[0][1])


def test_a_hanging_process_ends_the_others_within_the_limit(config):
    fault = partial(at_step_three, partial(suicide, signal.SIGSTOP), 1)
    began = time.monotonic()
    ends = end_of(2, config | {"train_steps": 6, "process_timeout": 4}, fault, within=12)
    assert [code for code, _ in ends] == [1, None]  # the stopped one cannot end by itself
    assert "process 1 gave no sign of life for 4 s: it hangs or its machine is gone" in ends[0][1]
    assert time.monotonic() - began < 40


# ------------------------------------------------------------------------------- through the launchers


@pytest.mark.parametrize("name", ["accelerate_fsdp_cpu", "accelerate_deepspeed_cpu"])
def test_the_shipped_cpu_configs_launch(config, tmp_path, name):
    if "deepspeed" in name and not importlib.util.find_spec("deepspeed"):
        pytest.skip("DeepSpeed is an optional package")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config | {"train_steps": 2}))
    words = [
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        f"configs/{name}.yaml",
        "run.py",
        "--config",
        str(path),
    ]
    environment = {k: v for k, v in os.environ.items() if k != "ACCELERATE_USE_CPU"} | {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "processes: 2" in done.stdout  # not two runs that know nothing of each other
    assert (Path(config["output_dir"]) / "toy" / "step_2" / "model.safetensors").exists()
