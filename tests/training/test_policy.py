"""The fastest way that fits: the choice between recomputing, parts and gathered weights, and a run that follows it.

python -m pytest tests/training/test_policy.py        a GPU's answers are given by stand-ins of its functions
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType
from conftest import read_metrics

from benchmarks.memory_plan import CARDS, situation
from data.feed import Feed
from data.plan import Plan, split_sizes
from data.token_store import open_store
from training import activations, memory, policy
from training.memory import Cost, Layout, Weights
from training.policy import Fixed, Policy, Situation, choose_policy
from training.step_time import Device, Work
from utils import RunError

COST = Cost(layers=8, per_layer=1000, per_recomputed_layer=100, outside_layers=50)
WEIGHTS = Weights(whole=1000, trained=1000, in_layers=800, largest_layer=100, largest_other=150)
BUSY = Device(1e12, float("inf"))  # communication costs nothing
WORK = Work(forward_flops=1e9, layers=8, frozen=False)


def alone(room: float, usual_step: int = 10_000, longest_text: int = 1_024) -> Situation:
    """One process with so many bytes for activations."""
    states = memory.gradient_and_moment_bytes(WEIGHTS, Layout()) + memory.working_bytes(WEIGHTS, Layout())
    free = (room + 1 + memory.SPARE) / memory.USABLE + states
    return Situation(COST, WEIGHTS, WORK, Layout(), BUSY, free, 0, usual_step, longest_text)


@pytest.mark.parametrize(
    ("room", "every", "limit", "parts"),
    [
        (9050 * 10_240, 0, 10_240, 1),  # all of a usual step of 10,000 tokens
        (8250 * 10_240, 4, 10_240, 1),  # every fourth layer is enough
        (6450 * 10_240, 2, 10_240, 1),
        (2850 * 10_240, 1, 10_240, 1),  # recomputing all costs as much as parts do, but no launches
        (2850 * 9_990, 0, 3_072, 4),  # not even then: parts, and nothing recomputed as well
        (9050 * 1_000, 4, 1_024, 10),  # a part must hold the longest text
    ],
)
def test_the_fastest_policy_that_fits(room, every, limit, parts):
    assert choose_policy(alone(room)) == Policy(every, limit, parts=parts)


def test_what_does_not_fit_is_marked_and_tried_with_the_least():
    for room in (2850 * 100, 0, -1e9):
        found = choose_policy(alone(room))
        assert (found.recompute_every, found.fits) == (1, False)
        assert found.max_tokens_per_forward <= 1_024
    assert not choose_policy(alone(9050 * 2_000), Fixed(max_tokens_per_forward=0)).fits
    assert choose_policy(alone(2850 * 100, longest_text=64)) == Policy(1, 100, parts=100)


def test_parts_that_leave_a_gpu_empty_are_dearer_than_recomputing():
    """Where kernels take longer to launch than to run, ten parts cost more than all layers once more."""
    room = 9050 * 1_024
    computing = choose_policy(alone(room))
    launching = choose_policy(replace(alone(room), work=replace(WORK, forward_flops=1e6)))
    assert computing == Policy(0, 1_024, parts=10)
    assert launching == Policy(1, 3_072, parts=4)


def test_parts_that_gather_the_weights_anew_are_dearer_than_recomputing():
    apart = replace(alone(9050 * 1_024), layout=Layout(8, 8), device=Device(1e12, 1e2))
    found = choose_policy(apart, Fixed(keep_gathered=False))
    assert found == Policy(1, 3_072, parts=4)
    gathered = choose_policy(apart)
    assert gathered.keep_gathered
    assert apart.seconds(gathered) < apart.seconds(found)
    assert not choose_policy(replace(apart, device=BUSY)).keep_gathered  # where links are fast it gains nothing


def test_of_ways_that_are_nearly_as_fast_the_one_with_fewest_parts_is_taken():
    """Three parts with half of the layers recomputed take 4.5 forward passes, four with all kept take 4."""
    found = alone(2850 * 9_990)
    assert choose_policy(found) == Policy(0, 3_072, parts=4)
    idle = replace(found, work=replace(WORK, idle_tokens=700.0))  # of each pass
    assert 1 < idle.seconds(Policy(2, 4_096, parts=3)) / idle.seconds(Policy(0, 3_072, parts=4)) < 1 + policy.NEAR
    assert choose_policy(idle) == Policy(2, 4_096, parts=3)


def test_what_the_user_fixed_stays():
    assert choose_policy(alone(2850 * 20_480), Fixed(recompute_every=1)) == Policy(1, 20_480)
    assert choose_policy(alone(9050 * 5_120), Fixed(recompute_every=0)) == Policy(0, 5_120, parts=2)
    assert choose_policy(alone(2850 * 10_240), Fixed(max_tokens_per_forward=777)) == Policy(0, 777, parts=13)
    assert choose_policy(alone(2850 * 10_240), Fixed(max_tokens_per_forward=4_000)) == Policy(2, 4_000, parts=3)
    assert choose_policy(alone(9050 * 10_240), Fixed(max_tokens_per_forward=0)) == Policy(0, 0)


def test_the_two_choices_that_were_made_by_order_are_made_by_time():
    """4B under FSDP2, a step of 47,520 tokens: it was everything kept in 24 parts on 40 GB, in 47 on 24 GB."""
    for card, most, by_order, dearer in (
        (CARDS[1], 2, Policy(0, 2_048, parts=24), 1.05),
        (CARDS[0], 5, Policy(0, 1_024, parts=47), 1.3),
    ):
        found = situation(card, "4B", "FSDP2, 8 GPUs", lora=False)
        chosen = choose_policy(found)
        assert chosen.fits
        assert chosen.recompute_every == 1
        assert chosen.parts <= most
        assert found.seconds(by_order) > dearer * found.seconds(chosen)


# ------------------------------------------------------------------------------------- a usual step


def stores_and_plan(toy_world, global_batch: int):
    names = ("toy_classification", "toy_clustering", "toy_retrieval")
    stores = [open_store(toy_world.stores / name) for name in names]
    plan = Plan(tuple(split_sizes(len(store.tuples))[0] for store in stores), global_batch, 0)
    return stores, [min(3, store.meta["negatives"]) for store in stores], plan


@pytest.mark.parametrize(("processes", "max_lengths"), [(1, [64, 64, 64]), (2, [64, 64, 64]), (1, [9, 64, 12])])
def test_a_usual_step_is_one_that_few_exceed(toy_world, processes, max_lengths):
    stores, negatives, plan = stores_and_plan(toy_world, 8)
    usual = policy.find_usual_step(stores, negatives, plan, max_lengths, processes)
    feeds = [Feed(stores, negatives, plan, max_lengths, rank, processes) for rank in range(processes)]
    tokens = []
    for step in range(1, plan.steps_per_epoch + 1):
        tokens.append(sum(len(feed.training(step)[1].tokens) for feed in feeds) / processes)
    assert len(tokens) <= policy.STEPS
    assert np.mean(tokens) < 0.9 * usual.tokens
    assert 0 < np.mean(np.array(tokens) > 1.02 * usual.tokens) + 0.01 <= 0.06
    assert 5 < usual.text_length < 64


def test_a_usual_step_of_a_long_epoch_is_found_in_few(toy_world, monkeypatch):
    stores, negatives, plan = stores_and_plan(toy_world, 2)
    assert plan.steps_per_epoch > policy.STEPS
    looked_at = []
    step = Plan.step
    monkeypatch.setattr(Plan, "step", lambda self, number: looked_at.append(number) or step(self, number))
    policy.find_usual_step(stores, negatives, plan, [64] * 3, 1)
    assert len(looked_at) == policy.STEPS
    assert (looked_at[0], looked_at[-1]) == (1, plan.steps_per_epoch)


# -------------------------------------------------------------------------------------------- a run


def shown(capsys) -> str:
    return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("activations:"))


def test_a_run_chooses_by_itself_and_trains_the_same(train, monkeypatch, capsys):
    plain = read_metrics(
        train(experiment_id="plain", log_interval=1, gradient_checkpointing=False, num_processes=3), "train"
    )
    said = capsys.readouterr().out
    assert "attention: segments (no GPU)" in said
    assert "activations: all kept as asked; at most" in said
    assert "num_processes 3 is only a record" in said
    train(experiment_id="asked", train_steps=1, gradient_checkpointing=2, max_tokens_per_forward=300)
    said = shown(capsys)
    assert "recomputed in one of every 2 layers as asked; at most 300 tokens a forward pass as asked; a usual" in said
    assert "parts, each run twice" in said
    monkeypatch.setattr(policy, "ROUND", 64)
    room = Situation.room
    for name, share, said in (("tight", 0.9, "recomputed in"), ("scarce", 0.2, "parts, each run twice")):

        def scarce(self, every, kept, share=share):
            return int(share * self.usual_step * self.cost.per_token(0) / self.cost.per_token(every))

        monkeypatch.setattr(Situation, "room", scarce)
        found = read_metrics(train(experiment_id=name, log_interval=1), "train")
        assert said in shown(capsys)
        for ours, expected in zip(found, plain, strict=True):
            assert ours["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
            assert ours["losses"] == {key: pytest.approx(value, rel=1e-5) for key, value in expected["losses"].items()}
    monkeypatch.setattr(Situation, "room", room)


def test_a_run_without_room_says_what_to_turn(train, monkeypatch, capsys):
    monkeypatch.setattr(memory, "SPARE", 2**60)
    train(train_steps=1)
    said = capsys.readouterr().out
    assert "warning: a step may run out of memory" in said
    assert "0.0 GiB are left beside weights, gradients, moments and losses" in said
    assert "use_lora" in said


def test_moments_that_do_not_fit_a_gpu_are_refused():
    fits = SimpleNamespace(weights=WEIGHTS, layout=Layout(), free=12_000)
    activations.refuse_what_cannot_fit(fits)
    for layout, free in ((Layout(), 11_999), (Layout(8, 1), 11_999), (Layout(8, 8), 1_499)):
        with pytest.raises(RunError, match="moments need"):
            activations.refuse_what_cannot_fit(SimpleNamespace(weights=WEIGHTS, layout=layout, free=free))


def test_the_least_free_process_counts(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device, processes: 1_000_000)
    monkeypatch.setattr(activations, "all_rows", lambda own, world: torch.stack([own + 5, own, own + 7])[:world])
    for processes, least in ((1, 1_000_005), (3, 1_000_000)):
        accelerator = SimpleNamespace(device=torch.device("cpu"), num_processes=processes, distributed_type="MULTI_GPU")
        assert activations.least_free_bytes(accelerator, WEIGHTS) == least


@pytest.mark.parametrize(
    ("device", "engine", "processes", "buckets"),
    [("cuda", "MULTI_GPU", 2, 4_000), ("cuda", "MULTI_GPU", 1, 0), ("cuda", "FSDP", 2, 0), ("cpu", "MULTI_GPU", 2, 0)],
)
def test_the_buckets_of_copies_are_there_already(monkeypatch, device, engine, processes, buckets):
    """DDP has them when free memory is asked for, and gradients will lie in them: they are not to be counted twice."""
    monkeypatch.setattr(memory, "free_bytes", lambda device, processes: 1_000_000)
    accelerator = SimpleNamespace(
        device=torch.device(device), num_processes=processes, distributed_type=DistributedType[engine]
    )
    assert activations.free_bytes_here(accelerator, WEIGHTS) == 1_000_000 + buckets
