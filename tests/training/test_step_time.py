"""The model of a step's time: what must be dearer is dearer, and by how much where that can be said beforehand.

python -m pytest tests/training/test_step_time.py
"""

import pytest
import torch
from meta_device import NO_MASK, forbid_autocast
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel

from benchmarks.common import qwen3_config
from benchmarks.memory import weights_of_config, with_adapters
from modeling.pruning import pruned_config
from training import step_time
from training.memory import Layout
from training.step_time import DEVICES, Device, Way, device_of, step_seconds, work_of

SMALL, LARGE = qwen3_config("0.6B"), qwen3_config("4B")
H100 = DEVICES["H100"]
FAST_LINKS = Device(H100.flops, 1e30)


def seconds(config, way: Way, tokens: int = 2**20, layout: Layout = Layout(), device: Device = H100, lora=False):
    weights = weights_of_config(config)
    if lora:
        weights = with_adapters(weights, config)
    heads = config.num_attention_heads * config.head_dim
    work = work_of(weights, config.num_hidden_layers, config.hidden_size, heads, 165)
    return step_seconds(tokens, way, work, weights, layout, device)


def test_recomputing_costs_a_third_of_forward_and_backward_and_parts_a_third_more():
    plain = seconds(LARGE, Way(1, 0.0))
    assert seconds(LARGE, Way(1, 1.0)) == pytest.approx(plain * 4 / 3, rel=1e-6)
    assert seconds(LARGE, Way(1, 0.5)) == pytest.approx(plain * 7 / 6, rel=1e-6)
    assert seconds(LARGE, Way(2, 0.0)) == pytest.approx(plain * 4 / 3, rel=0.01)
    frozen = seconds(LARGE, Way(1, 0.0), lora=True)
    assert frozen == pytest.approx(plain * 2 / 3, rel=0.01)


def test_small_parts_do_not_fill_a_gpu():
    """28 layers x 60 kernels x 5 us are 8.4 ms a pass, what 4,700 tokens of a 0.6B take on an H100; and 1,400 idle."""
    shares = []
    for tokens in (1024, 4096, 16384, 65536):
        computed = seconds(SMALL, Way(1, 0.0), tokens) - seconds(SMALL, Way(1, 0.0), 0)
        shares.append(1 - computed / seconds(SMALL, Way(1, 0.0), tokens))
    assert shares == sorted(shares, reverse=True)
    assert shares == pytest.approx([0.86, 0.60, 0.27, 0.08], abs=0.02)
    parts = [seconds(SMALL, Way(count, 0.0), 2**17) for count in (2, 8, 64, 128)]
    assert parts == sorted(parts)
    assert parts[-1] > 2 * parts[0]


def test_each_part_of_a_sharded_step_gathers_three_times_and_sums_once():
    """With links so slow that nothing else counts: of 8 processes each gets 7/8 from the others."""
    layout, slow = Layout(8, 8), Device(1e30, 1e9)
    numbers = weights_of_config(SMALL).whole * 7 / 8
    gather, reduce = 2 * numbers / 1e9, 4 * numbers / 1e9

    def found(parts: int, kept: bool) -> float:
        return seconds(SMALL, Way(parts, 0.0, kept), 2**20, layout, slow)

    assert found(1, False) == pytest.approx(2 * gather + reduce, rel=0.05)
    assert found(5, False) == pytest.approx(5 * (3 * gather + reduce), rel=0.05)
    assert found(1, True) == pytest.approx(gather + reduce, rel=0.05)
    assert found(5, True) == pytest.approx(gather + 5 * reduce, rel=0.05)
    ddp = seconds(SMALL, Way(5, 0.0), 2**20, Layout(8, 1), slow)
    assert ddp == pytest.approx(2 * reduce, rel=0.05)  # once, there and back
    hybrid = seconds(SMALL, Way(1, 0.0), 2**20, Layout(16, 8), slow)
    assert hybrid == pytest.approx(2 * gather + reduce * (1 + 2 * (1 / 8) * (1 / 2) * 8 / 7), rel=0.05)


def test_communication_beside_enough_computing_is_hidden_but_for_a_tenth():
    layout, slow = Layout(8, 8), Device(H100.flops, 20e9)

    def found(parts: int, device: Device) -> float:
        return seconds(LARGE, Way(parts, 0.0), 2**18, layout, device)

    assert 1 < found(1, H100) / found(1, FAST_LINKS) < 1 + step_time.SLOWED
    assert found(1, slow) < 1.2 * found(1, FAST_LINKS)
    assert found(128, slow) > 4 * found(128, FAST_LINKS)


def test_devices_are_known_by_their_names():
    assert device_of("NVIDIA H100 80GB HBM3") == DEVICES["H100"]
    assert device_of("NVIDIA A100-SXM4-40GB") == DEVICES["A100"]
    assert device_of("NVIDIA A10G") == DEVICES["A10"]
    assert device_of("NVIDIA L40S") == DEVICES["L40"]
    assert device_of("of tomorrow") == step_time.OTHER_GPU
    assert device_of("cpu") == step_time.CPU


class Kernels(TorchDispatchMode):
    """How many operations run that compute something: views and empty tensors are free."""

    FREE = ("view", "transpose", "t.", "unsqueeze", "expand", "slice", "detach", "empty", "_unsafe_view", "alias")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).removeprefix("aten.")
        self.count += not name.startswith(self.FREE)
        return function(*args, **(kwargs or {}))


def test_a_layer_has_about_as_many_kernels_as_are_assumed(monkeypatch):
    forbid_autocast(monkeypatch)

    def count(layers: int) -> int:
        config = pruned_config(qwen3_config("0.6B"), num_layers=layers)
        with torch.device("meta"):
            model = AutoModel.from_config(config)
            ids = torch.zeros(1, 64, dtype=torch.long)
        with Kernels() as kernels:
            model(input_ids=ids, attention_mask=NO_MASK, use_cache=False)
        return kernels.count

    assert 0.6 * step_time.KERNELS <= count(3) - count(2) <= 1.4 * step_time.KERNELS
