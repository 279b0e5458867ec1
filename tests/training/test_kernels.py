"""Compiled layers and Liger's kernels: the same embeddings and gradients, few compilations, refusals with a message.

python -m pytest tests/training/test_kernels.py        Liger needs a GPU: a stand-in with its signature takes its place
"""

import shutil
import sys
from collections import Counter
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import toy
from conftest import train_here
from harness import on_processes, train_steps
from torch._dynamo.backends.debugging import aot_eager, boxed_nop
from transformers import AutoModel
from transformers.models.qwen3 import modeling_qwen3

from model import Embedder
from modeling.backbone import add_lora, describe_backbone, load_backbone
from modeling.versions import in_dtype
from runtime import engine
from training import kernels, preflight

BATCHES = [(5, 30, 1, 12), (260, 3), (100, 200, 50), (7,), (300, 12, 12, 40, 9), (255, 1)]


def packed(lengths) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    tokens = torch.arange(sum(lengths)) * 7919 % 500
    return tokens, torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32), np.array(lengths)


def embedder(backend: str = "segments", every: int = 0, dropout: float | None = None) -> Embedder:
    torch._dynamo.reset()
    torch.manual_seed(0)
    backbone = AutoModel.from_config(toy.config(), **in_dtype(torch.float32))
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


class Executions:
    """A compiler that counts what it compiles, and how often its forward and its backward graphs run."""

    def __init__(self):
        self.graphs = 0
        self.runs = Counter()

    def __call__(self, graph, inputs) -> Callable:
        self.graphs += 1
        return aot_eager(graph, inputs, fw_compiler=self.counting("forward"), bw_compiler=self.counting("backward"))

    def counting(self, which: str) -> Callable:
        def compiler(graph, inputs) -> Callable:
            function = boxed_nop(graph, inputs)

            def run(arguments: list):
                self.runs[which] += 1
                return function(arguments)

            run._boxed_call = True
            return run

        return compiler


@pytest.mark.parametrize(("every", "dropout"), [(2, None), (1, 0.3)])
def test_compiled_layers_equal_plain_ones_and_are_compiled_once(every, dropout):
    plain, model = embedder(every=every, dropout=dropout), embedder(every=every, dropout=dropout)
    if dropout:
        plain.multiple = kernels.MULTIPLE  # masks of the same shape
    executions = Executions()
    assert kernels.compile_layers(model, executions) == []
    graphs, runs = [], []
    for lengths in BATCHES:
        executions.runs.clear()
        same(passed(model, lengths), passed(plain, lengths), 1e-5)
        graphs.append(executions.graphs)
        runs.append(executions.runs["forward"])
    assert graphs[0] > 0
    assert graphs == graphs[:1] * len(BATCHES)  # the number of tokens is a variable from the first one on
    assert runs == runs[:1] * len(BATCHES)
    assert runs[0] >= 2 * (2 + 2 // every)  # before and behind attention, in two layers, and in those recomputed
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
    executions = Executions()
    assert kernels.compile_layers(model, executions) == []
    assert executions.runs["backward"]
    assert added == []
    passed(model, BATCHES[0])
    assert added  # the hooks work


def test_recomputed_layers_run_compiled_in_the_forward_pass_and_when_recomputed():
    """None of 16 graphs ran: torch leaves what is checkpointed inside of what it compiles as it is."""
    runs = {}
    expected = passed(embedder(), BATCHES[1])
    for every in (0, 1, 2):
        model, executions = embedder(every=every), Executions()
        assert kernels.compile_layers(model, executions) == []
        passed(model, BATCHES[0])
        executions.runs.clear()
        same(passed(model, BATCHES[1]), expected, 1e-5)
        runs[every] = dict(executions.runs)
    once = runs[0]["forward"]
    assert once >= 2 * 2  # before and behind attention, in two layers
    assert runs[0]["backward"] == once
    assert runs[1] == {"forward": 2 * once, "backward": once}
    assert runs[2] == {"forward": once + once // 2, "backward": once}  # one of the two layers is recomputed


def trained_compiled(rank: int, world: int, config: dict) -> tuple[dict, dict, list[str]]:
    """What train_steps reports with compiled layers, which graphs ran in the steps, and the layers' classes."""
    executions, kinds = Executions(), []
    compile_layers, prepare = kernels.compile_layers, engine.prepare

    def compile_counted(model: Embedder) -> list[str]:
        problems = compile_layers(model, executions)
        executions.runs.clear()
        return problems

    def prepare_recorded(accelerator, model, *rest):
        prepared = prepare(accelerator, model, *rest)
        kinds.extend(type(layer).__name__ for layer in model.layers())
        return prepared

    kernels.compile_layers, engine.prepare = compile_counted, prepare_recorded
    return train_steps(rank, world, [config], torch.float32), dict(executions.runs), kinds


@pytest.mark.processes
@pytest.mark.parametrize(("kind", "expected"), [("ddp", "Qwen3DecoderLayer"), ("fsdp", "FSDPQwen3DecoderLayer")])
def test_two_processes_train_compiled_recomputed_layers_as_plain_ones(settings, kind, expected):
    keys = settings | {"gradient_checkpointing": True, "max_tokens_per_forward": 0, "train_steps": 3}
    plain = on_processes(2, train_steps, [keys | {"experiment_id": "plain"}], torch.float32, kind=kind)[0][0]
    [found], runs, kinds = on_processes(2, trained_compiled, keys | {"compile": True}, kind=kind)[0]
    assert runs["forward"] == 2 * runs["backward"]
    assert runs["backward"] >= 3 * 2 * 2  # steps, layers, before and behind attention
    assert kinds == [expected] * 2  # each layer is sharded by itself
    assert found["engine"] == plain["engine"]
    for ours, theirs in zip(found["gradients"], plain["gradients"], strict=True):
        assert ours.keys() == theirs.keys()
        for name, expected_gradient in theirs.items():
            assert np.abs(expected_gradient).max() > 0, name
            np.testing.assert_allclose(ours[name], expected_gradient, rtol=1e-3, atol=1e-5)


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
        return lambda *args: [x * 1.1 if torch.is_tensor(x) and x.is_floating_point() else x for x in graph(*args)]

    model = embedder()
    (line,) = kernels.compile_layers(model, wrong)
    assert "embeddings come out" in line

    with monkeypatch.context() as patch:  # as torch does where it cannot follow: a layer runs as it is, without a word
        patch.setattr(torch, "compile", lambda function, **_: function)
        assert kernels.compile_layers(embedder(), "aot_eager") == [
            "compile: torch compiles nothing of this decoder's layers: set it to false"
        ]


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
    assert "continuing after step 2 of 4" in capsys.readouterr().out


def test_a_replaced_function_serves_its_device_alone():
    there, elsewhere = (SimpleNamespace(device=SimpleNamespace(type=kind)) for kind in ("cuda", "cpu"))
    call = kernels._by_device(lambda x, scale: ("plain", scale), lambda x, scale: ("fast", scale), "cuda")
    assert call(there, scale=2) == ("fast", 2)
    assert call(elsewhere, scale=2) == ("plain", 2)


def compiled_in_parts(rank: int, world: int, path: str) -> list[str]:
    accelerator = engine.start([], "")
    backbone = load_backbone(path, torch.float32) if rank == 0 else describe_backbone(path, torch.float32)
    model = engine.place(accelerator, Embedder(backbone, "segments")).train()
    problems = kernels.compile_layers(model, "aot_eager")
    assert all(parameter.grad is None for parameter in model.parameters())
    return problems


@pytest.mark.processes
def test_layers_of_a_model_in_parts_are_compiled_and_compared(toy_world):
    assert on_processes(2, compiled_in_parts, str(toy_world.backbone), kind="fsdp") == [[], []]
