"""Compiled layers and Liger's kernels: the same embeddings and gradients, few compilations, refusals in words.

python -m pytest tests/training/test_kernels.py        Liger needs a GPU: a stand-in with its signature takes its place
"""

import shutil
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import toy
from conftest import train_here
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModel
from transformers.models.qwen3 import modeling_qwen3

from model import Embedder
from modeling.backbone import add_lora
from training import kernels, preflight

BATCHES = [(5, 30, 1, 12), (260, 3), (100, 200, 50), (7,), (300, 12, 12, 40, 9), (255, 1)]


def packed(lengths) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    tokens = torch.arange(sum(lengths)) * 7919 % 500
    return tokens, torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32), np.array(lengths)


def embedder(backend: str = "segments", every: int = 0, dropout: float | None = None) -> Embedder:
    torch._dynamo.reset()
    torch.manual_seed(0)
    backbone = AutoModel.from_config(toy.config(), dtype=torch.float32)
    if dropout is not None:
        backbone = add_lora(backbone, 4, 8, dropout, ["q_proj", "up_proj"])
        for name, parameter in backbone.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return Embedder(backbone, backend, every).train()


def passed(model: Embedder, lengths) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings and the gradient of a projection of them; under one seed."""
    torch.manual_seed(1)
    model.zero_grad()
    embeddings = model(*packed(lengths))
    weights = torch.sin(torch.arange(embeddings.numel(), dtype=torch.float32)).view_as(embeddings)
    (embeddings * weights).sum().backward()
    return embeddings.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def same(ours, theirs, limit: float) -> None:
    assert theirs[1].norm() > 0.1
    for found, expected in zip(ours, theirs, strict=True):
        assert (found - expected).norm() <= limit * expected.norm()


@pytest.mark.parametrize(("every", "dropout"), [(0, None), (2, None), (1, 0.3)])
def test_compiled_layers_equal_plain_ones_in_two_compilations(every, dropout):
    plain, model = embedder(every=every, dropout=dropout), embedder(every=every, dropout=dropout)
    if dropout:
        plain.multiple = kernels.MULTIPLE  # masks of the same shape
    counter = CompileCounterWithBackend("aot_eager")
    assert kernels.compile_layers(model, counter) == []
    counts = []
    for lengths in BATCHES:
        same(passed(model, lengths), passed(plain, lengths), 1e-5)
        counts.append(counter.frame_count)
    assert counts[0] > 0
    assert counts[1:] == [counts[1]] * (len(BATCHES) - 1)  # the second number of tokens makes it a variable
    assert model.computed_positions(np.array([300, 12])) == 512
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in plain.named_parameters()}
    if dropout:
        torch.manual_seed(2)  # dropout is on
        assert not torch.equal(model(*packed((9, 4))), plain(*packed((9, 4))))


def test_trying_compiled_layers_leaves_no_gradient_and_adds_none_up():
    """It added up the gradients of all weights, which take as much memory as the model, before training had begun."""
    model = embedder()
    added = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(added.append)
    counter = CompileCounterWithBackend("aot_eager")
    assert kernels.compile_layers(model, counter) == []
    assert counter.frame_count
    assert added == []
    passed(model, BATCHES[0])
    assert added  # the hooks work


@pytest.mark.processes
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_kernels_made_by_the_compiler_equal_plain_ones_and_draw_the_same_dropout():
    plain, model = embedder(dropout=0.3), embedder(dropout=0.3)
    plain.multiple = kernels.MULTIPLE
    assert kernels.compile_layers(model) == []
    # First a row of another length than compile_layers tried: so there is one compilation for training, not two.
    for lengths in (BATCHES[1], BATCHES[0], BATCHES[2]):
        same(passed(model, lengths), passed(plain, lengths), 1e-4)
    torch.manual_seed(3)
    kept = model(*packed(BATCHES[0]))
    torch.manual_seed(3)
    with torch.no_grad():  # the first of the two passes of a step in parts: another compilation
        torch.testing.assert_close(model(*packed(BATCHES[0])), kept)
    torch.manual_seed(4)
    assert not torch.allclose(model(*packed(BATCHES[0])), kept)


def test_what_cannot_be_compiled_is_refused_in_a_sentence(monkeypatch):
    model = embedder("buckets")
    assert kernels.compile_layers(model) == [
        "compile: with attn_backend segments or varlen, not buckets: set it to false"
    ]

    def broken(*_):
        raise RuntimeError("no compiler\nhere")

    model = embedder()
    (line,) = kernels.compile_layers(model, broken)
    assert line.startswith("compile: cannot run here")
    assert "no compiler" in line

    def wrong(graph, inputs):
        return lambda *args: [x * 1.1 if x.is_floating_point() else x for x in graph(*args)]

    model = embedder()
    (line,) = kernels.compile_layers(model, wrong)
    assert "embeddings come out" in line


def liger(factor: float, seen: list) -> ModuleType:
    """A package with Liger's door: RMSNorm of every layer by `factor`."""

    def apply(rope=True, cross_entropy=False, fused_linear_cross_entropy=True, rms_norm=True, swiglu=True, model=None):
        seen.append((rope, rms_norm, swiglu, cross_entropy, fused_linear_cross_entropy))
        for layer in model.layers:
            layer.input_layernorm.register_forward_hook(lambda module, inputs, output: output * factor)

    return SimpleNamespace(MODEL_TYPE_TO_APPLY_LIGER_FN={"qwen3": apply})


def test_liger_replaces_what_an_embedder_has_and_is_refused_where_it_differs(monkeypatch):
    name, seen = "liger_kernel.transformers.monkey_patch", []
    monkeypatch.setitem(sys.modules, name, liger(1.0, seen))
    assert kernels.use_liger(embedder(dropout=0.1)) == []  # within adapters too
    assert seen == [(True, True, True, False, False)]
    monkeypatch.setitem(sys.modules, name, liger(1.2, seen))
    (line,) = kernels.use_liger(embedder())
    assert "embeddings come out" in line
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(MODEL_TYPE_TO_APPLY_LIGER_FN={}))
    assert kernels.use_liger(embedder()) == ["liger: has no kernels for a qwen3: set it to false"]
    monkeypatch.setitem(sys.modules, name, None)
    (line,) = kernels.use_liger(embedder())
    assert "pip install liger-kernel" in line


class MadeOfTriton:
    """Stands for Liger's classes, which cannot be used on a CPU."""

    def __init__(self, *_, **__):
        raise RuntimeError("0 active drivers: Triton needs a GPU")


def liger_as_it_is(calls: list) -> ModuleType:
    """Liger's door with its side effect: names of Transformers' module are replaced for all models to come."""

    def apply(rope=True, cross_entropy=False, fused_linear_cross_entropy=True, rms_norm=True, swiglu=True, model=None):
        original = modeling_qwen3.apply_rotary_pos_emb

        def rotate(query, *rest, **options):
            calls.append(query.device.type)
            return original(query, *rest, **options)

        modeling_qwen3.apply_rotary_pos_emb = rotate
        modeling_qwen3.Qwen3RMSNorm = MadeOfTriton
        modeling_qwen3.Qwen3MLP = MadeOfTriton

    return SimpleNamespace(MODEL_TYPE_TO_APPLY_LIGER_FN={"qwen3": apply})


@pytest.fixture
def transformers_as_before(monkeypatch):
    for name in ("apply_rotary_pos_emb", "Qwen3RMSNorm", "Qwen3MLP"):
        monkeypatch.setattr(modeling_qwen3, name, getattr(modeling_qwen3, name))


def test_a_run_with_liger_saves_its_folders_and_goes_on_after_a_stop(
    settings, monkeypatch, transformers_as_before, capsys
):
    """Its first save failed: the folder is read back on the CPU, and was made of Triton's classes."""
    calls = []
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", liger_as_it_is(calls))
    monkeypatch.setattr(preflight, "machine_problems", lambda *_: [])
    keys = settings | {"liger": True, "train_steps": 4, "checkpointing_steps": 2, "experiment_id": "liger"}
    folder = train_here(keys)
    assert (folder / "step_2" / "model.safetensors").exists()
    assert "Liger's kernels" in capsys.readouterr().out
    assert calls
    for left in ("state/step_4", "step_4", "epoch_1"):
        shutil.rmtree(folder / left, ignore_errors=True)
    train_here(keys)
    assert "going on after step 2 of 4" in capsys.readouterr().out


def test_a_replaced_function_serves_its_device_alone():
    there, elsewhere = (SimpleNamespace(device=SimpleNamespace(type=kind)) for kind in ("cuda", "cpu"))
    call = kernels._by_device(lambda x, scale: ("plain", scale), lambda x, scale: ("fast", scale), "cuda")
    assert call(there, scale=2) == ("fast", 2)
    assert call(elsewhere, scale=2) == ("plain", 2)
