"""What fits: counted costs, the choice between recomputing and parts, and a run that follows it.

python -m pytest tests/training/test_memory.py        a GPU's answers are given by stand-ins of its functions
"""

from types import SimpleNamespace

import pytest
import torch
import toy
from conftest import read_metrics
from transformers import AutoModel

from model import Embedder
from training import kernels, memory
from training.memory import Cost, Policy, choose_policy

COST = Cost(layers=8, per_layer=1000, per_recomputed_layer=100, outside_layers=50)


def embedder(dtype=torch.float32) -> Embedder:
    torch.manual_seed(0)
    return Embedder(AutoModel.from_config(toy.config(), dtype=dtype), "segments").train()


def test_the_counted_cost_of_a_token_is_what_autograd_keeps():
    model = embedder()
    cost = memory.cost_of(model)
    model.recompute(0)
    kept = memory.kept_bytes(model, 300)
    fixed = memory.kept_bytes(model, 1) - 4 * (cost.outside_layers + cost.layers * cost.per_layer)
    assert cost.layers == len(model.layers()) == 2
    assert kept - fixed == pytest.approx(1200 * (cost.outside_layers + 2 * cost.per_layer), rel=0.01)
    model.recompute(1)
    assert memory.kept_bytes(model, 300) < 0.2 * kept
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
    assert choose_policy(cost, 0.5 * cost.outside_layers * 2_048, 2_048, 64, None, None) == Policy(0, 1_024)


def test_a_token_costs_less_the_more_is_recomputed():
    costs = [COST.per_token(every) for every in (0, 8, 4, 2, 1)]
    assert costs == [9050, 9150, 8250, 6450, 2850]


@pytest.mark.parametrize(
    ("free", "expected"),
    [
        (9050 * 10_240, Policy(0, 10_240)),  # all of a usual step of 10,000 tokens
        (8250 * 10_240, Policy(4, 10_240)),  # every fourth layer is enough
        (6450 * 10_240, Policy(2, 10_240)),
        (2850 * 10_240, Policy(1, 10_240)),
        (2850 * 9_990, Policy(0, 3_072)),  # not even then: parts, and nothing recomputed
        (9050 * 1_024, Policy(0, 1_024)),
        (9050 * 1_000, Policy(4, 1_024)),  # a part must hold the longest text
        (2850 * 100, Policy(1, 1_024)),  # it does not fit; try
    ],
)
def test_the_cheapest_policy_that_fits(free, expected):
    assert (
        choose_policy(COST, free, usual_step=10_000, longest_text=1_024, recompute_every=None, token_limit=None)
        == expected
    )


def test_what_the_user_fixed_stays():
    assert choose_policy(COST, 2850 * 20_480, 10_000, 1_024, recompute_every=1, token_limit=None) == Policy(1, 20_480)
    assert choose_policy(COST, 9050 * 5_120, 10_000, 1_024, recompute_every=0, token_limit=None) == Policy(0, 5_120)
    assert choose_policy(COST, 2850 * 10_240, 10_000, 1_024, recompute_every=None, token_limit=777) == Policy(0, 777)
    assert choose_policy(COST, 2850 * 10_240, 10_000, 1_024, recompute_every=None, token_limit=4_000) == Policy(
        2, 4_000
    )
    assert choose_policy(COST, 9050 * 2_000, 10_000, 1_024, recompute_every=None, token_limit=0) == Policy(
        1, 0
    )  # no parts: as little as can be


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


def test_gradients_moments_and_copies_are_left_room_for():
    model = embedder()
    count = sum(p.numel() for p in model.parameters())
    free = 100 * 2**30
    whole = memory.bytes_for_activations(free, model, model.layers(), sharded=False)
    assert whole == memory.USABLE * (free - 18 * count) - memory.SPARE
    model.requires_grad_(False)
    assert (
        memory.bytes_for_activations(free, model, model.layers(), False)
        == memory.USABLE * (free - 2 * count) - memory.SPARE
    )
    assert memory.bytes_for_activations(0, model, model.layers(), True) == 0
    layer = sum(p.numel() for p in model.layers()[0].parameters())
    sharded = memory.bytes_for_activations(free, model, model.layers(), True)
    table = model.backbone.embed_tokens.weight.numel()
    assert sharded == memory.USABLE * (free - 8 * (table + 2 * layer)) - memory.SPARE


def test_a_usual_step_is_the_longest_datasets():
    stores = [SimpleNamespace(meta={"tokens": tokens, "texts": 10}) for tokens in (1000, 9000, 2000)]
    assert memory.usual_tokens(stores, [7, 1, 7], rows=[4, 4, 4], max_length=500) == 4 * 9 * 200
    assert memory.usual_tokens(stores[:2], [0, 1], rows=[4, 4], max_length=500) == 4 * 3 * 500
    assert memory.usual_tokens(stores[:2], [7, 1], rows=[4, 1], max_length=500) == 4 * 9 * 100  # the second is small


def test_a_run_chooses_by_itself_and_trains_the_same(train, monkeypatch, capsys):
    def shown() -> str:
        return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("activations:"))

    plain = read_metrics(
        train(experiment_id="plain", log_interval=1, gradient_checkpointing=False, num_processes=3), "train"
    )
    said = capsys.readouterr().out
    assert "attention: segments (no GPU)" in said
    assert "activations: all kept as asked; at most" in said
    assert "num_processes 3 is only a record" in said
    train(experiment_id="asked", train_steps=1, gradient_checkpointing=2, max_tokens_per_forward=300)
    said = capsys.readouterr().out
    assert "recomputed in one of every 2 layers as asked; at most 300 tokens a forward pass as asked; a usual" in said
    assert "4 parts, each run twice" in said
    monkeypatch.setattr(memory, "SPARE", 0)
    monkeypatch.setattr(memory, "ROUND", 64)
    for name, share, said in (("tight", 0.9, "recomputed in"), ("scarce", 0.2, "all kept; at most")):
        cost, usual = memory.cost_of(embedder()), 1044  # tokens of a usual step of the toy
        monkeypatch.setattr(memory, "bytes_for_activations", lambda *_, free=share * usual * cost.per_token(0): free)
        found = read_metrics(train(experiment_id=name, log_interval=1), "train")
        assert said in shown()
        for ours, expected in zip(found, plain, strict=True):
            assert ours["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
            assert ours["losses"] == {key: pytest.approx(value, rel=1e-5) for key, value in expected["losses"].items()}
