"""Under `accelerate launch` and torchrun: a person's threads, the last lines on the screen, and signals.

python -m pytest tests/runtime/test_launcher.py

A launcher that is a few lines of Python stands in for them where it is about one thing that they do.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from harness import PATIENCE, run_command

from runtime import computing, launcher

ROOT = Path(__file__).parent.parent.parent
OURS = "run.py: learning_rat: no such key; did you mean learning_rate?"
# Sets what a launcher sets, runs the code that is its argument in a child, and prints a traceback where that fails.
STAND_IN = """
import os, signal, subprocess, sys, time
os.environ |= {"TORCHELASTIC_RUN_ID": "none"}
os.environ.setdefault("OMP_NUM_THREADS", "1")
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], start_new_session=True)
if child.wait():
    time.sleep(0.5)
    os.system(f"kill -TERM -- -{child.pid} 2> /dev/null")
    raise RuntimeError("ChildFailedError")
"""


def environment(**changes: str) -> dict[str, str]:
    """This process's, as a person's shell would have it; without a launcher and a number of threads."""
    chosen = {"OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_BACKEND", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}
    kept = {name: value for name, value in os.environ.items() if name not in chosen}
    return kept | {"PYTHONPATH": str(ROOT)} | changes


# ---------------------------------------------------------------------------------------- threads


@pytest.mark.parametrize(("chosen", "found"), [({}, "None"), ({"OMP_NUM_THREADS": "1"}, "1"),
                                               ({"OMP_NUM_THREADS": "3"}, "3")])  # fmt: skip
@pytest.mark.parametrize("launched", [False, True])
@pytest.mark.processes
def test_a_number_of_threads_in_the_environment_is_a_persons_unless_the_launcher_put_it_there(launched, chosen, found):
    code = "from runtime.launcher import threads_of_environment as f; print(f())"
    words = [STAND_IN, code] if launched else [code]
    done = run_command("-c", *words, environment=environment(**chosen))
    assert done.stdout.strip() == found


@pytest.mark.processes
def test_threads_given_to_accelerate_are_a_persons():
    code = "from runtime.launcher import threads_of_environment as f; print(f())"
    words = ["-c", STAND_IN, code, "--num_cpu_threads_per_process", "1"]
    assert run_command(*words, environment=environment()).stdout.strip() == "1"


@pytest.mark.parametrize(("variable", "wanted", "used"), [
    ("1", 0, [1]), ("3", 0, [3]), ("3,2", 0, [3]), (None, 0, [4]), ("none", 0, [4]), ("1", 2, [2]),
])  # fmt: skip
def test_threads_are_a_persons_choice_and_else_a_share_of_the_cores(monkeypatch, variable, wanted, used):
    for name in ("OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    monkeypatch.setattr(computing.os, "sched_getaffinity", lambda _: range(8))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    computing.set_threads(torch.device("cpu"), wanted)
    assert chosen == used
    computing.set_threads(torch.device("meta"), 0)  # not where a device computes
    assert chosen == used


# ----------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("chosen", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_allocator_is_told_before_torch_is_there_unless_somebody_chose(monkeypatch, chosen):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # so that what the code sets is taken back
        monkeypatch.delenv(name)
    if chosen:
        monkeypatch.setenv(chosen, "max_split_size_mb:128")
    launcher.use_expandable_segments()
    assert os.environ.get("PYTORCH_ALLOC_CONF") == {
        None: "expandable_segments:True", "PYTORCH_ALLOC_CONF": "max_split_size_mb:128",
    }.get(chosen)  # fmt: skip


RUN_MODELS = (  # every door that may run a model on a GPU
    "run",
    "tools.embed_store",
    "tools.evaluate",
    "tools.mine_hard_negatives",
    "examples.code_search.search",
    "benchmarks.gpu",
)
UNTIL_TORCH = """
import os, runpy, sys

class NoTorch:
    def find_spec(self, name, *_):
        if name == "torch":
            print(door, "imports torch with", os.environ.get("PYTORCH_ALLOC_CONF"))
            sys.exit()

sys.meta_path.insert(0, NoTorch())
for door in sys.argv[1:]:
    os.environ.pop("PYTORCH_ALLOC_CONF", None)
    sys.argv = [door]
    try:
        runpy.run_module(door, run_name="__main__", alter_sys=True)
    except SystemExit:
        print(door, "ends with", os.environ.get("PYTORCH_ALLOC_CONF"))
"""


@pytest.mark.processes
def test_every_door_that_runs_a_model_tells_the_allocator_before_torch_is_there():
    unchosen = {name: value for name, value in environment().items() if "_ALLOC_CONF" not in name}
    said = run_command("-c", UNTIL_TORCH, *RUN_MODELS, environment=unchosen).stdout
    for door in RUN_MODELS:
        assert f"{door} ends with expandable_segments:True\n" in said
    at_torch = [line.split(" imports torch with ") for line in said.splitlines() if "imports torch" in line]
    assert {"tools.embed_store", "tools.mine_hard_negatives", "benchmarks.gpu"} <= {door for door, _ in at_torch}
    assert {chosen for _, chosen in at_torch} == {"expandable_segments:True"}


# ------------------------------------------------------------------------------ the last lines


FAILS = f"""
import sys
from runtime import launcher
launcher.say(["{OURS}"])
launcher.repeat_below_launcher(["{OURS}"])
sys.exit(2)
"""


@pytest.mark.processes
def test_our_lines_come_once_more_below_the_launchers_traceback():
    printed = run_command("-c", STAND_IN, FAILS, environment=environment()).stderr
    assert printed.startswith(OURS)
    assert printed.endswith(f"ChildFailedError\n\n{OURS}\n")


@pytest.mark.processes
def test_without_a_launcher_nothing_is_repeated_and_one_process_of_a_machine_repeats():
    printed = run_command("-c", FAILS, environment=environment()).stderr
    assert printed == f"{OURS}\n"
    printed = run_command("-c", STAND_IN, FAILS, environment=environment(LOCAL_RANK="1")).stderr
    assert printed.endswith("ChildFailedError\n")


@pytest.mark.processes
def test_what_waits_for_the_launcher_gives_up():
    impatient = FAILS.replace("launcher.say", "launcher._PATIENCE_SECONDS = 0; launcher.say")
    printed = run_command("-c", STAND_IN, impatient, environment=environment()).stderr
    assert printed.endswith("ChildFailedError\n")  # half a second later


ONE = ["-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
TWO = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
PLAIN = ["--mixed_precision", "no", "--dynamo_backend", "no"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.mark.processes
@pytest.mark.parametrize(
    "words", [ONE + PLAIN, TWO + PLAIN, TORCHRUN], ids=["accelerate 1", "accelerate 2", "torchrun"]
)
def test_a_refused_launch_ends_with_our_lines(words):
    given = environment(ACCELERATE_USE_CPU="true")
    printed = run_command(*words, "run.py", "--learning_rat", "3", environment=given).stderr
    traceback, _, repeated = printed.rpartition("\n\n")
    assert "Traceback" in traceback  # the launcher's, which cannot be helped
    assert repeated.startswith(OURS)
    assert repeated.endswith("run.py: 2 problems, nothing was started\n")
    assert traceback.count("nothing was started") == 1  # by one of two processes


# ------------------------------------------------------------------------------------- signals


@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_the_end_of_the_launcher_reaches_the_run(tmp_path):
    """As a SIGTERM to `accelerate launch` of one process, which passes nothing on."""
    child = f"""
import pathlib, signal, sys, time
from runtime import launcher
def told(*_):
    pathlib.Path({str(tmp_path / "told")!r}).touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, told)
launcher.stop_when_launcher_ends()
pathlib.Path({str(tmp_path / "begun")!r}).touch()
time.sleep({PATIENCE})
"""
    stand_in = subprocess.Popen([sys.executable, "-c", STAND_IN, child], env=environment())
    wait_for(tmp_path / "begun")
    stand_in.send_signal(signal.SIGTERM)
    assert stand_in.wait(PATIENCE) == -signal.SIGTERM
    wait_for(tmp_path / "told")


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_error_in_one_line():
    assert launcher.one_line(ValueError("first\nsecond")) == "ValueError: first"
    assert launcher.one_line(KeyboardInterrupt()) == "KeyboardInterrupt"
