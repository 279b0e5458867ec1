"""A step asks for nothing that the device has not got yet; what it found out is read later, and nothing is lost by it.

python -m pytest tests/training/test_reports.py
"""

from collections import Counter

import pytest
import torch
from chaos import final
from conftest import door_here, train_here
from harness import live_run, on_processes

import run
from benchmarks.gpu_profile import CountWaits
from runtime import processes
from training.reports import Report, Reports

CPU = torch.device("cpu")


def test_the_counter_counts():
    x = torch.arange(4.0)
    with CountWaits() as counter:
        float(x.sum())
        x[x > 1]
        x.masked_scatter(x > 1, x)
        torch.arange(2).repeat_interleave(torch.tensor([2, 3]))
    assert dict.fromkeys(counter.waits) == dict.fromkeys(
        ["_local_scalar_dense", "index by a mask", "masked_scatter", "repeat_interleave"]
    )
    assert sum(counter.waits.values()) == 4


@pytest.mark.parametrize(
    "keys",
    [
        {"use_mrl": True, "mask_same_text": True},
        {"max_tokens_per_forward": 64},
        {"use_lora": True, "lora_dropout": 0.2, "gradient_checkpointing": True},
    ],
    ids=["one pass", "in parts", "LoRA"],
)
def test_a_step_waits_for_nothing_between_its_batch_and_its_update(settings, monkeypatch, keys):
    """It waited three times: for the norm, for the flags, and where negatives were laid into their places."""
    counters = []

    def counted(live, step, real=run.train_step):
        live.batches.training(step)  # made by another thread, which is not counted
        with CountWaits() as counter:
            found = real(live, step)
        counters.append(counter)
        return found

    monkeypatch.setattr(run, "train_step", counted)
    train_here(settings | keys | {"train_steps": 6, "num_hard_neg": 2})
    assert len(counters) == 6
    assert min(counter.operations for counter in counters) > 500
    assert [counter.waits for counter in counters] == [Counter()] * 6


def waits_of_steps(rank: int, world: int, config: dict) -> tuple[list[int], list[dict]]:
    """Of two steps: how many operations there were, and for which the host would wait."""
    live = live_run(config)
    counters = []
    for step in (1, 2):
        live.batches.training(step)
        with CountWaits() as counter:
            run.train_step(live, step)
        counters.append(counter)
    return [counter.operations for counter in counters], [dict(counter.waits) for counter in counters]


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_step_of_two_processes_waits_for_nothing_either(settings, kind):
    """The clipping, the gather of embeddings and the parts of a step differ by engine."""
    keys = {"max_tokens_per_forward": 64, "num_hard_neg": 2, "train_batch_size": 4}
    for operations, waits in on_processes(2, waits_of_steps, settings | keys, kind=kind):
        assert min(operations) > 500
        assert waits == [{}, {}]


# ------------------------------------------------------------------------------------- read a step later


def test_reports_arrive_in_order_one_step_later_or_all_at_once():
    late = Reports(CPU, processes=1, delay=1)
    assert late.arrived() == []
    late.send(1, torch.tensor(0.5), [False, True])
    assert late.arrived() == []
    late.send(2, torch.tensor(float("inf")), [True, False])
    assert late.arrived() == [Report(1, 0.5, (False, True))]
    (second,) = late.arrived(everything=True)
    assert (second.step, second.flags, second.is_left_out) == (2, (True, False), True)
    assert late.arrived(everything=True) == []


@pytest.fixture
def read_late(monkeypatch):
    """As on a GPU."""
    real = Reports.__init__
    monkeypatch.setattr(Reports, "__init__", lambda self, device, processes: real(self, device, processes, delay=1))


def broken(steps: set[int], real=run.train_step):
    """A train_step whose gradient is NaN at these steps."""

    def train_step(live, step):
        handle = live.model.register_forward_hook(lambda *a: a[2] * float("nan") if step in steps else None)
        try:
            return real(live, step)
        finally:
            handle.remove()

    return train_step


def test_broken_updates_are_left_out_alike_whenever_they_are_read(settings, monkeypatch, capsys):
    keys = {"train_steps": 9, "checkpointing_steps": 4, "log_interval": 3}
    monkeypatch.setattr(run, "train_step", broken({2, 4, 5, 9}))
    at_once = final(train_here(settings | keys | {"experiment_id": "at_once"}))
    with monkeypatch.context() as patch:
        real = Reports.__init__
        patch.setattr(Reports, "__init__", lambda self, device, processes: real(self, device, processes, delay=1))
        later = final(train_here(settings | keys | {"experiment_id": "later"}))
    assert capsys.readouterr().err.count("this update is left out") == 8
    weights = [name for name in at_once if name.endswith("model.safetensors")]
    assert weights
    for name in weights:
        assert later[name] == at_once[name]


def test_too_many_broken_updates_end_the_run_a_step_later(settings, monkeypatch, read_late, capsys):
    monkeypatch.setattr(run, "train_step", broken(set(range(3, 20))))
    assert door_here(settings | {"train_steps": 20, "max_skipped_steps": 2}) == processes.FAILED
    assert "step 5: the gradient is nan" in capsys.readouterr().err


def update_left_out(rank: int, world: int, kind: str) -> list:
    """A sharded or a copied weight, an update, one that is left out, another: what stands there after each."""
    from accelerate import Accelerator

    accelerator = Accelerator()
    layer = torch.nn.Linear(4, 4, bias=False)
    torch.nn.init.constant_(layer.weight, 1.0)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    if kind == "fsdp":
        from torch.distributed.fsdp import fully_shard

        fully_shard(layer)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    seen = []
    for factor in (1.0, float("nan"), 1.0):
        optimizer.zero_grad()
        (layer(torch.eye(4)).sum() * factor).backward()
        norm = torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        norm = norm.full_tensor() if kind == "fsdp" else norm
        optimizer.found_inf = (~norm.isfinite()).float()
        optimizer.step()
        weight = layer.weight.full_tensor() if kind == "fsdp" else layer.weight
        moments = optimizer.state[layer.weight]
        mean = moments["exp_avg"].full_tensor() if kind == "fsdp" else moments["exp_avg"]
        seen.append((weight.tolist(), mean.tolist(), float(moments["step"])))
    del accelerator
    return seen


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_an_update_that_is_left_out_changes_neither_weights_nor_moments(kind):
    for first, left_out, third in on_processes(2, update_left_out, kind, kind=kind):
        assert left_out == first
        assert (first[2], left_out[2], third[2]) == (1, 1, 2)
        assert third[0] != first[0]
