"""Ctrl-C saves as SIGTERM does, on every process once; a second one ends at once; and the message says how to continue.

python -m pytest tests/runtime/test_interrupts.py
"""

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from chaos import final
from conftest import door_here, toy_settings, train_here
from harness import PATIENCE, ROOT, door_on_processes

import run
from runtime import checkpoint, processes

KEYS = {"train_steps": 12, "log_interval": 3, "train_batch_size": 24}
HALF = {"train_batch_size": 12}  # of two processes: the same global batch


@pytest.fixture
def keys(settings):
    return settings | KEYS


@pytest.fixture(scope="module")
def whole(toy_world, tmp_path_factory):
    """What the run ends in when nobody interrupts it, made once."""
    return final(train_here(toy_settings(toy_world, tmp_path_factory.mktemp("whole")) | KEYS))


def interrupt_at(step: int, times: int, rank: int = 0) -> None:
    """Ctrl-C, so often, during a step."""

    def train_step(live, number: int, real=run.train_step):
        if number == step:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        return real(live, number)

    run.train_step = train_step


def ends_as(folder: Path, whole: dict[str, bytes]) -> bool:
    """Whether a run's folder holds what another one's holds in the end; it may keep another state besides."""
    found = final(folder)
    return [name for name in whole if found.get(name) != whole[name]] == []


def test_ctrl_c_saves_says_how_to_go_on_and_the_run_ends_in_the_same_bytes(keys, whole, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        patch.setattr(run, "train_step", run.train_step)  # put back afterwards
        interrupt_at(6, times=1)
        assert door_here(keys) == processes.STOPPED
    printed = capfd.readouterr()
    assert "run.py: interrupted: stopping after this step; Ctrl-C again ends at once, and the same" in printed.err
    last = printed.out.splitlines()[-1]
    assert last == "stopped after step 6 of 12 and saved: the same command continues from there"
    assert ends_as(train_here(keys), whole)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.processes
def test_ctrl_c_on_two_processes_saves_once_and_ends_both(keys):
    keys |= HALF
    whole = door_on_processes(2, keys | {"experiment_id": "whole"})
    ends = door_on_processes(2, keys, partial(interrupt_at, 6, 1))
    assert [end.status for end in [*whole, *ends]] == [0, 0, processes.STOPPED, processes.STOPPED]
    printed = "".join(end.printed for end in ends)
    assert printed.count("| state ") == 1
    assert printed.count("stopped after step") == 1
    assert printed.count("run.py: interrupted") == 1
    assert "Traceback" not in printed
    assert [end.status for end in door_on_processes(2, keys)] == [0, 0]
    output = Path(keys["output_dir"])
    assert ends_as(output / "toy", final(output / "whole"))


@pytest.mark.processes
def test_a_second_ctrl_c_ends_at_once_and_leaves_the_state_before_it_whole(keys, whole):
    keys |= {"checkpointing_steps": 3}
    [end] = door_on_processes(1, keys, partial(interrupt_at, 6, 2))
    assert end.status == -signal.SIGINT
    assert "Traceback" not in end.printed
    states = Path(keys["output_dir"]) / "toy" / "state"
    assert checkpoint.newest(states, pytest.fail).step == 3
    assert ends_as(train_here(keys), {name: data for name, data in whole.items() if name.startswith("step_12/")})


@pytest.mark.processes
def test_ctrl_c_before_the_first_step_is_a_line(keys):
    words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "run.py", *words], cwd=ROOT, env=environment, **pipes)
    assert "verified" in process.stdout.readline()  # the data are looked at, and nothing else is done
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=PATIENCE)
    assert error == "run.py: interrupted\n"
    assert process.returncode == -signal.SIGINT


def interrupted_in_setup(rank: int) -> None:
    if rank == 1:
        run.setup = stop


def stop(*_) -> None:
    raise KeyboardInterrupt


@pytest.mark.processes
def test_what_an_interrupted_process_leaves_to_the_others_is_a_sentence(keys):
    ends = door_on_processes(2, keys | HALF, interrupted_in_setup)
    assert [end.status for end in ends] == [processes.FAILED] * 2
    assert "run.py: interrupted\n" in ends[1].printed
    host = os.uname().nodename
    assert f"ended, because of process 1 on {host}, which was interrupted\n" in ends[0].printed
