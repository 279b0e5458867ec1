"""A run that is killed again and again ends in the bytes of one that was left alone.

python -m pytest -s tests/runtime/test_chaos.py        `make chaos` does the same with 1,000 kills, over more engines
"""

import signal

import chaos
import pytest
from chaos import POINTS, TOKENISING, KilledRun, prepare_data, train_under_kills
from harness import Ended


@pytest.mark.processes
def test_kills_anywhere_change_nothing(tmp_path):
    tokenising = prepare_data(tmp_path, tokenising=2)
    assert {point for point in TOKENISING if tokenising[point]} == set(TOKENISING)
    run, problem = train_under_kills(tmp_path, [(2, "ddp")], "LoRA with dropout", kills=4, epochs=2)
    assert {point for point in POINTS if run.seen[point]} == set(POINTS)
    assert run.seen["random"] >= 2  # a kill may come too late, when the run is over
    assert run.unreadable == []
    assert run.hangs == []
    assert problem == ""


class Hanging:
    """Stands for two processes that wait for each other until they are killed."""

    def __init__(self):
        self.signals = []
        self.printed = [b"waits in all_reduce", b"waits in barrier"]

    def running(self) -> list[int]:
        return [] if signal.SIGKILL in self.signals else [0, 1]

    def wait(self, seconds: float) -> bool:
        return not self.running()

    def kill(self, ranks: list[int], number: int = signal.SIGKILL) -> None:
        assert ranks == [0, 1]
        self.signals.append(number)

    def end(self) -> list[Ended]:
        return [Ended(-signal.SIGKILL, "")] * 2


def test_a_run_that_stands_still_is_ended_and_its_stacks_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(chaos, "STILL", 0.05)
    run = KilledRun({"output_dir": str(tmp_path), "experiment_id": "killed"}, [(2, "ddp")], 0)
    (run.states / "step_9").mkdir(parents=True)
    run.marks = [tmp_path, tmp_path]
    group = Hanging()
    assert run._end(group, chaos.time.monotonic(), "in the gather") == [-signal.SIGKILL] * 2
    assert group.signals == [signal.SIGUSR2, signal.SIGKILL]  # their stacks are printed first
    [hang] = run.hangs
    for word in ("in the gather", "no new state", "step_9", "waits in all_reduce", "waits in barrier"):
        assert word in hang


def test_runs_that_do_not_exist_are_refused_with_the_names_of_those_that_do(capsys):
    with pytest.raises(SystemExit) as end:
        chaos.main(["--only", "5 x fsdp"])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "--only '5 x fsdp': no run has this in its name" in said
    assert said.count("\n  ") == 12
    for name in ("full, 4 x fsdp", "LoRA with dropout, changing"):
        assert f"\n  {name}\n" in said
