"""The gather between processes, the meter and the records.

python -m pytest tests/training/test_records.py
"""

import json
from types import SimpleNamespace

import pytest
import torch

from runtime.collectives import gather
from training import meter as meter_module
from training import records
from training.meter import Meter
from training.records import Metrics, task_means, write_manifest


def test_gather_of_one_process_is_the_tensor_itself():
    rows = torch.randn(3, 4, requires_grad=True)
    assert gather(rows, [3]) is rows


def test_meter_weighs_means_by_rows():
    meter = Meter(["a", "b"], ["in_batch", "hard"], torch.device("cpu"))
    meter.add(0, {"in_batch": torch.tensor(1.0), "hard": torch.tensor(4.0)}, 10)
    meter.add(0, {"in_batch": torch.tensor(4.0)}, 5)
    meter.add(1, {"hard": torch.tensor(0.5, requires_grad=True)}, 2)
    meter.count(tuples=17, tokens=300, computed=400, heaviest=300)
    losses, shares, timings = meter.read(world=1)
    assert losses == {"a": {"in_batch": pytest.approx(2.0), "hard": 4.0}, "b": {"hard": 0.5}}
    assert shares["padding"] == 0.25
    assert timings["tokens_per_second"] / timings["tuples_per_second"] == pytest.approx(300 / 17)
    assert timings["seconds"] * timings["tuples_per_second"] == pytest.approx(17)
    assert timings["peak_gib"] > 0
    losses, _, timings = meter.read(world=1)  # starts again
    assert losses == {}
    assert timings["tuples_per_second"] == 0


def test_task_means_weigh_datasets_the_same():
    losses = {"a": {"hard": 1.0, "in_batch": 5.0}, "b": {"hard": 3.0}, "c": {"hard": 7.0}}
    means = task_means(losses, {"a": "retrieval", "b": "retrieval", "c": "clustering"})
    assert means == {("retrieval", "hard"): 2.0, ("retrieval", "in_batch"): 5.0, ("clustering", "hard"): 7.0}


class Accelerator(SimpleNamespace):
    """As much of accelerate's as the writers touch."""

    name = "stand-in"

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.logged.append("end")


@pytest.mark.parametrize("main", [True, False])
def test_metrics_go_to_the_files_and_the_trackers_of_the_main_process_only(tmp_path, main):
    accelerator = Accelerator(is_main_process=main, logged=[])
    accelerator.trackers = [accelerator]
    metrics = Metrics(accelerator, tmp_path, {})
    metrics.write(3, "train", {"lr": 0.5}, {"tag": 1.0}, {"seconds": 2.0})
    metrics.write(4, "validation", {}, {"tag": 2.0})
    sizes = metrics.sizes()
    metrics.close()
    assert (tmp_path / "metrics.jsonl").exists() == main
    if main:
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert lines == [{"step": 3, "kind": "train", "lr": 0.5}, {"step": 4, "kind": "validation"}]
        assert json.loads((tmp_path / "timings.jsonl").read_text()) == {"step": 3, "kind": "train", "seconds": 2.0}
        assert accelerator.logged == [(3, {"tag": 1.0}), (4, {"tag": 2.0}), "end"]
        with open(tmp_path / "metrics.jsonl", "a") as file:
            file.write('{"step": 5, ')  # what a killed run left
        Metrics(accelerator, tmp_path, sizes).close()
        assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_meter_goes_on_from_its_state():
    first, second = (Meter(["a", "b"], ["hard"], torch.device("cpu")) for _ in range(2))
    first.add(1, {"hard": torch.tensor(3.0)}, 2)
    first.count(tuples=2, tokens=9, computed=12, heaviest=9)
    second.load(first.state())
    for meter in (first, second):
        meter.add(1, {"hard": torch.tensor(1.0)}, 2)
    assert first.read(1)[:2] == second.read(1)[:2]


def test_a_resumed_run_says_its_own_speed_and_the_padding_of_all_its_steps(monkeypatch):
    """It divided what both starts had trained by the seconds of the second one."""
    now = [0.0]
    monkeypatch.setattr(meter_module.time, "perf_counter", lambda: now[0])
    before, meter = (Meter(["a"], ["hard"], torch.device("cpu")) for _ in range(2))
    before.count(tuples=30, tokens=300, computed=600, heaviest=300)
    meter.load(before.state())
    now[0] = 60.0  # trackers, data
    meter.start()
    for seconds in (2.0, 4.0):
        meter.count(tuples=10, tokens=100, computed=200, heaviest=100)
        now[0] += seconds
        _, shares, timings = meter.read(world=1)
        assert timings["seconds"] == seconds
        assert timings["tuples_per_second"] == 10 / seconds
        assert timings["tokens_per_second"] == 100 / seconds
        assert shares["padding"] == 0.5


def test_the_clock_stands_still_while_paused(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(meter_module.time, "perf_counter", lambda: now[0])
    meter = Meter(["a"], ["hard"], torch.device("cpu"))
    meter.count(tuples=10)
    now[0] = 2.0
    with meter.paused():
        now[0] = 100.0
    now[0] += 3.0
    assert meter.read(world=1)[2]["tuples_per_second"] == 10 / 5


def test_a_machine_without_git_has_a_manifest(tmp_path, monkeypatch):
    def no_git(*_, **__):
        raise FileNotFoundError("git")

    monkeypatch.setattr(records.subprocess, "run", no_git)
    accelerator = Accelerator(device=torch.device("cpu"), num_processes=1, mixed_precision="no")
    write_manifest(tmp_path / "manifest.json", accelerator, {}, {})
    assert json.loads((tmp_path / "manifest.json").read_text())["commit"] is None


def test_manifest_says_what_ran(tmp_path):
    accelerator = Accelerator(device=torch.device("cpu"), num_processes=2, mixed_precision="no")
    write_manifest(tmp_path / "manifest.json", accelerator, {"toy": "abc"}, {"toy": "retrieval"})
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["versions"]["torch"] == torch.__version__
    assert (manifest["num_processes"], manifest["data"]) == (2, {"toy": "abc"})
