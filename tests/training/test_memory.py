"""What a model and its tokens take: counted on a model, and by the arithmetic of the tables.

python -m pytest tests/training/test_memory.py        a GPU's answers are given by stand-ins of its functions
"""

import pytest
import torch
import toy
from transformers import AttentionInterface, AutoModel, Qwen3Config

from benchmarks.common import qwen3_config
from benchmarks.memory import token_cost
from model import Embedder
from modeling.versions import in_dtype
from training import kernels, memory
from training.memory import Cost, Layout, Weights

COST = Cost(layers=8, per_layer=1000, per_recomputed_layer=100, outside_layers=50)


def embedder(dtype=torch.float32) -> Embedder:
    torch.manual_seed(0)
    return Embedder(AutoModel.from_config(toy.config(), **in_dtype(dtype)), "segments").train()


def test_the_counted_cost_of_a_token_is_what_autograd_keeps():
    model = embedder()
    cost = memory.cost_of(model)
    model.recompute(0)
    kept = memory.kept_bytes(model, 300)
    fixed = memory.kept_bytes(model, 1) - 4 * (cost.outside_layers + cost.layers * cost.per_layer)
    assert cost.layers == len(model.layers()) == 2
    assert kept - fixed == pytest.approx(1200 * (cost.outside_layers + 2 * cost.per_layer), rel=0.01)
    model.recompute(1)
    recomputed = memory.kept_bytes(model, 300)
    inputs = 1200 * (cost.outside_layers + 2 * cost.per_recomputed_layer)
    assert recomputed == pytest.approx(inputs, rel=0.05)  # nothing of a layer but its input
    assert recomputed < 0.2 * kept
    assert cost.per_recomputed_layer == 4 * model.hidden_size
    half = memory.cost_of(embedder(torch.bfloat16))
    assert 0.4 * cost.per_layer < half.per_layer < 0.8 * cost.per_layer
    kernels.compile_layers(model, "aot_eager")
    assert memory.cost_of(model).per_layer < 1.2 * cost.per_layer  # the same function, in a row of rounded length


def test_a_decoder_that_cannot_recompute_keeps_everything(monkeypatch):
    model = embedder()
    monkeypatch.setattr(type(model.backbone), "supports_gradient_checkpointing", False)
    assert not model.can_recompute
    model.recompute(0)
    cost = memory.cost_of(model)
    assert (cost.layers, cost.per_layer) == (0, 0)
    assert cost.per_token(0) == cost.outside_layers > 1000


def test_a_token_costs_less_the_more_is_recomputed():
    costs = [COST.per_token(every) for every in (0, 8, 4, 2, 1)]
    assert costs == [9050, 9150, 8250, 6450, 2850]
    assert [COST.recomputed_layers(every) for every in (0, 8, 3, 2, 1)] == [0, 1, 3, 4, 8]


class Kernel(torch.autograd.Function):
    """Keeps what a kernel for packed texts keeps: queries, keys, values and result in bf16, a sum for each head."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = q.clone()  # [1, heads, T, head_dim]
        ctx.save_for_backward(q, k, v, out, q.new_zeros(q.shape[:3], dtype=torch.float32))
        return out.transpose(1, 2)


def stand_in(module, query, key, value, attention_mask, **_):
    return Kernel.apply(query.bfloat16(), key.bfloat16(), value.bfloat16()), None


@pytest.mark.parametrize("size", ["0.6B", "4B"])
def test_the_table_counts_a_token_as_autograd_does(size, monkeypatch):
    """An eighth of the real widths; under autocast, as on one GPU."""
    config = qwen3_config(size)
    small = Qwen3Config(
        vocab_size=64,
        hidden_size=config.hidden_size // 8,
        intermediate_size=config.intermediate_size // 8,
        num_hidden_layers=2,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim // 8,
    )
    model = Embedder(AutoModel.from_config(small, **in_dtype(torch.float32)), "segments").train()
    before = AttentionInterface()["f2llm_segments"]
    AttentionInterface.register("f2llm_segments", stand_in)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            counted = memory.cost_of(model)
    finally:
        AttentionInterface.register("f2llm_segments", before)
    computed = token_cost(small)
    assert computed.layers == counted.layers == 2
    assert computed.per_recomputed_layer == counted.per_recomputed_layer
    assert computed.per_layer == pytest.approx(counted.per_layer, rel=0.02)
    assert computed.outside_layers == pytest.approx(counted.outside_layers, rel=0.2)


def test_free_memory_is_a_gpus_rest_or_half_of_the_machines(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 12 * 2**30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 9 * 2**30)
    assert memory.free_bytes(torch.device("cuda"), 8) == 63 * 2**30
    monkeypatch.setattr(memory, "_CONTAINER", tmp_path / "memory.max")
    whole = memory.free_bytes(torch.device("cpu"), 1)
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_bytes(torch.device("cpu"), 1) == whole
    (tmp_path / "memory.max").write_text("1000000\n")
    assert memory.free_bytes(torch.device("cpu"), 2) == 250_000
    (tmp_path / "memory.max").unlink()
    assert memory.free_bytes(torch.device("cpu"), 4) == pytest.approx(whole / 4, rel=1e-6)


def test_weights_are_counted_by_what_engines_do_with_them():
    model = embedder()
    weights = memory.weights_of(model)
    assert weights.whole == weights.trained == sum(p.numel() for p in model.parameters())
    layers = [sum(p.numel() for p in layer.parameters()) for layer in model.layers()]
    table, norm = model.backbone.embed_tokens.weight.numel(), model.backbone.norm.weight.numel()
    assert (weights.in_layers, weights.largest_layer, weights.largest_other) == (sum(layers), max(layers), table)
    assert weights.whole == weights.in_layers + table + norm
    model.requires_grad_(False)
    model.layers()[0].requires_grad_(True)
    assert memory.weights_of(model).trained == layers[0]


WEIGHTS = Weights(whole=1000, trained=1000, in_layers=800, largest_layer=100, largest_other=150)
ADAPTERS = Weights(whole=1000, trained=10, in_layers=850, largest_layer=100, largest_other=150)


def test_what_each_engine_keeps():
    alone, copies, parts, nodes = Layout(), Layout(8, 1), Layout(8, 8), Layout(16, 8)
    for layout, share in ((alone, 1), (copies, 1), (parts, 8), (nodes, 8)):
        assert memory.weight_bytes(WEIGHTS, layout) == 4000 / share
        assert memory.gradient_and_moment_bytes(WEIGHTS, layout) == 12_000 / share  # DDP's buckets are the gradients
        assert memory.gradient_and_moment_bytes(ADAPTERS, layout) == 120 / share
    assert memory.working_bytes(WEIGHTS, copies) == 2 * 800 + 4 * 150  # autocast's copies, the table's gradient
    assert memory.working_bytes(ADAPTERS, copies) == 2 * 850
    two_and_table = 2 * 100 + 150
    assert memory.working_bytes(WEIGHTS, parts) == 2 * two_and_table + 2 * two_and_table + 4 * 150
    assert memory.working_bytes(WEIGHTS, parts, keep_gathered=True) == 2 * 1000 + 2 * two_and_table + 4 * 150
    assert memory.working_bytes(ADAPTERS, parts) == pytest.approx(2 * two_and_table, rel=0.03)


def test_what_is_left_for_activations_may_be_less_than_nothing():
    free = 100 * 2**30
    assert memory.bytes_for_activations(free, 10, 20) == memory.USABLE * (free - 30) - memory.SPARE
    assert memory.bytes_for_activations(0, 0, 0) < 0
