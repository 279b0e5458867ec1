"""v2's losses under FSDP2 through a kill: Matryoshka and distillation on two processes, of which one gets SIGKILL.

    python -m pytest tests/runtime/test_killed_v2.py

The same two end in the bytes of a run that nobody touched; one process and three of them, to which neither the batch
nor the rows of the weights divide as before, to its losses and weights within the rounding of their sums.
"""

import os
import shutil
import signal
from pathlib import Path

import pytest
import toy
from chaos import final
from conftest import read_metrics, toy_settings
from harness import door_on_processes, on_processes, through_the_door
from safetensors.torch import load_file

from data.feed import Feed

LAST = 12  # step
KILLED = 8  # the second process dies when it asks for the data of this step, a few steps ahead of the update
KD_WEIGHT = 3.0


def die_in_step(rank: int) -> None:
    """Let the second process be killed when it asks for the data of a step."""

    def training(self, number: int, real=Feed.training):
        if number == KILLED and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, number)

    Feed.training = training


@pytest.fixture(scope="module")
def runs(toy_world, tmp_path_factory):
    """(configuration of two processes, folder of the run that nobody touched, folder of the one that was killed)"""
    root = tmp_path_factory.mktemp("killed")
    config = toy_settings(toy_world, root) | {
        "use_mrl": True, "teacher_model_path": str(toy.make_backbone(root / "teacher", hidden_size=48, seed=7)),
        "kd_weight": KD_WEIGHT, "train_batch_size": 12, "train_steps": LAST, "checkpointing_steps": 3,
        "log_interval": 2, "validation_steps": 5,
    }  # fmt: skip
    assert on_processes(2, through_the_door, config | {"experiment_id": "whole"}, kind="fsdp") == [0, 0]
    other, killed = door_on_processes(2, config, die_in_step, kind="fsdp")
    assert killed.status == -signal.SIGKILL
    assert other.status == 1  # it ended by itself
    output = Path(config["output_dir"])
    assert not (output / "toy" / f"step_{LAST}").exists()
    return config, output / "whole", output / "toy"


def gone_on(runs, name: str, world: int, kind: str) -> tuple[Path, str]:
    """A copy of the killed run that so many processes brought to its end, and what the first of them printed."""
    config, _, killed = runs
    folder = shutil.copytree(killed, killed.with_name(name))
    config |= {"experiment_id": name, "train_batch_size": 24 // world}
    ended = door_on_processes(world, config, kind=kind)
    assert [end.status for end in ended] == [0] * world, ended
    return folder, ended[0].printed


@pytest.mark.processes
def test_the_same_processes_go_on_to_the_same_bytes(runs):
    _, whole, _ = runs
    folder, printed = gone_on(runs, "same", 2, "fsdp")
    assert "continuing after step " in printed
    ours, theirs = final(folder), final(whole)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []
    for line in read_metrics(whole, "train"):
        for losses in line["losses"].values():
            assert losses["distillation"] > 1e-2


@pytest.mark.processes
@pytest.mark.parametrize(("world", "kind"), [(1, "ddp"), (3, "fsdp")])
def test_another_number_of_processes_goes_on_within_its_rounding(runs, world, kind):
    _, whole, _ = runs
    folder, printed = gone_on(runs, f"on_{world}", world, kind)
    assert "continuing after step " in printed
    for line, values in (("train", "losses"), ("validation", "measures")):
        ours, theirs = (read_metrics(path, line) for path in (folder, whole))
        assert [mine["step"] for mine in ours] == [expected["step"] for expected in theirs]
        for mine, expected in zip(ours, theirs, strict=True):
            for name, kinds in expected[values].items():
                assert mine[values][name] == pytest.approx(kinds, rel=2e-5)
    weights = Path(f"step_{LAST}") / "model.safetensors"
    ours, theirs = load_file(folder / weights), load_file(whole / weights)
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) < 1e-5
