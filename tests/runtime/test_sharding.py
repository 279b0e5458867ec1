"""What engines send and keep: gathers and sums are counted, and copies of shards train what one process trains.

python -m pytest tests/runtime/test_sharding.py
"""

import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import toy
from harness import door_on_processes, live_run, on_processes, run_command, train_steps
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModel

import run
from model import Embedder
from modeling.versions import in_dtype
from runtime import engine, resume
from training import kernels, setup
from training.policy import Policy

PARTS = {"max_tokens_per_forward": 60, "gradient_checkpointing": False}
WHOLE = {"max_tokens_per_forward": 0, "gradient_checkpointing": False}
CALLS = ("all_gather_single", "reduce_scatter_single", "all_reduce")


@pytest.fixture
def config(settings):
    return settings | {"train_batch_size": 4, "log_interval": 100, "min_lr": 0.0, "warmup_steps": 0, "train_steps": 3,
                       "scheduler_type": "constant_with_warmup", "learning_rate": 1e-4}  # fmt: skip


def count_calls() -> dict[str, int]:
    """From now on, how often FSDP2 gathers weights and scatters gradients."""
    counts = dict.fromkeys(CALLS, 0)

    def counting(name: str):
        call = getattr(dist, name)

        def counted(*args, **kwargs):
            counts[name] += 1
            return call(*args, **kwargs)

        return counted

    for name in CALLS:
        setattr(dist, name, counting(name))
    return counts


# ----------------------------------------------------------------------------------- FSDP2: gathers


def calls_of_steps(rank: int, world: int, config: dict, chosen: Policy | None) -> tuple[list[dict], list[int], dict]:
    """Calls of each step, its parts, and the weights at the end; the policy is what a run's would have been."""
    if chosen is not None:
        setup.choose_activation_policy = lambda *_: chosen
    live = live_run(config)
    counts = count_calls()
    calls, parts = [], []
    for step in range(1, 4):
        before = dict(counts)
        parts.append(live.feed.training(step)[1].parts)
        run.train_step(live, step)
        calls.append({name: counts[name] - before[name] for name in CALLS})
    weights = {
        name: tensor.numpy().copy() for name, tensor in engine.whole_weights(live.accelerator, live.model).items()
    }
    return calls, parts, weights


@pytest.mark.processes
def test_gathered_weights_stay_where_it_is_chosen(config):
    """Two layers and the rest of the model are three units; the rest stays gathered from forward to backward anyway.

    At once: three gathers forward, two backward. In p parts: without gradients 2p + 1, with them 2p + p - 1 forward and
    2p backward, together 7p. Where all stays gathered: three, whatever the parts.
    """
    found = {}
    for name, keys, chosen in (
        ("shared out", WHOLE, None),
        ("gathered", WHOLE, Policy(0, 0, keep_gathered=True)),
        ("shared out, parts", PARTS, None),
        ("gathered, parts", PARTS, Policy(0, 60, keep_gathered=True)),
    ):
        changes = keys | {"experiment_id": name.replace(", ", "_").replace(" ", "_")}
        found[name] = on_processes(2, calls_of_steps, config | changes, chosen, kind="fsdp")[0]
    for name in ("shared out", "gathered"):
        calls, parts, _ = found[name]
        assert parts == [1, 1, 1]
        assert [call["reduce_scatter_single"] for call in calls] == [3, 3, 3]
        assert [call["all_gather_single"] for call in calls] == [5 if name == "shared out" else 3] * 3
    for name in ("shared out, parts", "gathered, parts"):
        calls, parts, _ = found[name]
        assert min(parts) > 1
        assert [call["reduce_scatter_single"] for call in calls] == [3 * count for count in parts]
        gathers = [7 * count if name == "shared out, parts" else 3 for count in parts]
        assert [call["all_gather_single"] for call in calls] == gathers
    expected = found["shared out"][2]
    assert expected
    for _, _, weights in found.values():
        for name, weight in expected.items():
            assert weights[name] == pytest.approx(weight, abs=2e-6), name


@pytest.mark.processes
def test_the_accelerate_config_may_ask_for_it(config):
    asked = {"FSDP_RESHARD_AFTER_FORWARD": "false"}
    [calls, _, _] = on_processes(2, calls_of_steps, config | WHOLE, None, kind="fsdp", extra=asked)[0]
    assert [call["all_gather_single"] for call in calls] == [3, 3, 3]


def evaluate_and_capture(rank: int, world: int, config: dict) -> tuple[int, int, bool]:
    """How many parameters are whole after a validation; how many weights a state captured then has; whether all but
    single numbers in it are of the sizes that were foreseen at the start."""
    live = live_run(config)
    foreseen = sizes(resume.like_part(live.accelerator, live.model, rank, world))
    run.train_step(live, 1)
    run.validate(live, 1)
    whole = sum(not isinstance(parameter, DTensor) for parameter in live.model.parameters())
    captured = resume.capture(live.accelerator, live.model, live.optimizer, live.meter.state(), rank, world)
    run.train_step(live, 2)
    del captured["processes"]
    return whole, len(captured["weights"]), foreseen == sizes(captured)


def sizes(tensors: dict[str, dict[str, torch.Tensor]]) -> dict[str, tuple]:
    """Kind and name -> shape and dtype, of all but single numbers."""
    found = {}
    for kind, named in tensors.items():
        found |= {f"{kind} {name}": (tensor.shape, tensor.dtype) for name, tensor in named.items() if tensor.dim()}
    return found


@pytest.mark.processes
@pytest.mark.parametrize("reshard", ["true", "false"])
def test_nothing_stays_gathered_after_a_validation(config, reshard):
    """torch frees weights in the backward pass, and a validation has none: they stood beside what is saved after it."""
    extra = {"FSDP_RESHARD_AFTER_FORWARD": reshard}
    for whole, captured, as_foreseen in on_processes(2, evaluate_and_capture, config | WHOLE, kind="fsdp", extra=extra):
        assert whole == 0
        assert captured > 20
        assert as_foreseen


# --------------------------------------------------------------------------------------------- HSDP


@pytest.mark.processes
def test_copies_of_shards_train_what_one_process_trains(config, tmp_path):
    """Two copies, each in two parts; in fp64."""
    toys = config | {"teacher_model_path": config["model_path"], "use_mrl": True, "gradient_checkpointing": False}
    configs = [toys | WHOLE | {"experiment_id": "whole"}, toys | PARTS | {"experiment_id": "parts"}]
    whole = [changed | {"train_batch_size": 16, "max_tokens_per_forward": 0} for changed in configs]
    [one, _] = on_processes(1, train_steps, whole, torch.float64)[0]
    for four in on_processes(4, train_steps, configs, torch.float64, kind="hsdp")[0]:
        assert four["engine"] == "FSDPEmbedder"
        assert len(four["gradients"]) == 3
        for ours, theirs in zip(four["gradients"], one["gradients"], strict=True):
            assert ours.keys() == theirs.keys()
            for name, gradient in theirs.items():
                assert abs(gradient).max() > 0
                assert ours[name] == pytest.approx(gradient, rel=1e-9, abs=1e-12), name
        assert four["norms"] == pytest.approx(one["norms"], rel=1e-9)
        for dataset, kinds in one["losses"].items():
            assert four["losses"][dataset] == pytest.approx(kinds, rel=1e-9)
        for name, weight in one["weights"].items():
            assert four["weights"][name] == pytest.approx(weight, abs=1e-12), name


def sends_of_a_step(rank: int, world: int, config: dict) -> tuple[dict, int]:
    live = live_run(config)
    run.train_step(live, 1)
    counts = count_calls()
    run.train_step(live, 2)
    return counts, engine.shards(live.accelerator)


@pytest.mark.processes
def test_weights_are_gathered_within_a_set_of_shards(config):
    counts, shards = on_processes(4, sends_of_a_step, config | WHOLE, kind="hsdp")[0]
    assert shards == 2
    assert counts["all_gather_single"] == 5
    assert counts["reduce_scatter_single"] == 3
    assert counts["all_reduce"] >= 3  # of each unit's share of the gradients, between the copies


@pytest.mark.processes
def test_a_run_of_copies_of_shards_saves_and_goes_on(config):
    config |= WHOLE | {"experiment_id": "hsdp", "train_steps": 4, "checkpointing_steps": 2}
    first = door_on_processes(4, config | {"train_steps": 2}, kind="hsdp")
    assert [end.status for end in first] == [0] * 4, first[0].printed
    second = door_on_processes(2, config | {"train_batch_size": 8}, kind="fsdp")
    assert [end.status for end in second] == [0] * 2, second[0].printed
    assert "continuing after step 2 of 4" in second[0].printed


@pytest.mark.processes
def test_the_shipped_config_of_copies_of_shards_launches(config, tmp_path):
    """On one machine with four processes: what the command line overrides is what another cluster would."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config | {"train_steps": 2}))
    launch = ["-m", "accelerate.commands.launch", "--config_file", "configs/accelerate_hsdp.yaml"]
    launch += ["--num_machines", "1", "--num_processes", "4", "--mixed_precision", "no"]
    launch += ["--parallelism_config_dp_replicate_size", "2", "--parallelism_config_dp_shard_size", "2"]
    environment = dict(os.environ)
    environment.pop("ACCELERATE_USE_CPU", None)
    done = run_command(*launch, "run.py", "--config", str(path), environment=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "processes: 4" in done.stdout
    assert (Path(config["output_dir"]) / "toy" / "step_2" / "model.safetensors").exists()


# ---------------------------------------------------------------------------------------------- DDP


def settings_of_copies(rank: int, world: int, config: dict) -> tuple[dict, int, int, bool]:
    """What DDP was told; in how many storages gradients lie; how many there are; whether they end as zeros."""
    live = live_run(config)
    assert isinstance(live.model, DistributedDataParallel)
    told = {
        "gradient_as_bucket_view": live.model.gradient_as_bucket_view,
        "broadcast_buffers": live.model.broadcast_buffers,
        "find_unused_parameters": live.model.find_unused_parameters,
    }
    storages = []
    for step in (1, 2, 3):
        found = []
        clip = live.accelerator.clip_grad_norm_

        def noting(parameters, limit, clip=clip, found=found):
            parameters = list(parameters)
            assert all(parameter.grad.abs().max() > 0 for parameter in parameters)
            found += [parameter.grad.untyped_storage().data_ptr() for parameter in parameters]
            return clip(parameters, limit)

        live.accelerator.clip_grad_norm_ = noting
        assert live.feed.training(step)[1].parts > 1
        run.train_step(live, step)
        live.accelerator.clip_grad_norm_ = clip
        storages.append(sorted(set(found)))
    parameters = list(live.model.parameters())
    assert storages[1] == storages[2]
    cleared = all(parameter.grad is not None and not parameter.grad.any() for parameter in parameters)
    return told, len(storages[-1]), len(parameters), cleared


@pytest.mark.processes
def test_gradients_of_copies_lie_in_their_buckets(config):
    """Else each parameter had 4 bytes in a bucket, and 4 beside it while the parts of a step are run."""
    told, storages, parameters, cleared = on_processes(2, settings_of_copies, config | PARTS)[0]
    assert told == {"gradient_as_bucket_view": True, "broadcast_buffers": False, "find_unused_parameters": False}
    assert parameters > 20
    assert storages <= 2  # the toy's parameters fit one or two buckets
    assert cleared


def test_compiled_layers_are_not_cut_at_ddps_buckets():
    """torch would split each graph where a bucket ends, to send it early: of a layer there is only a part left."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Embedder(AutoModel.from_config(toy.config(), **in_dtype(torch.float32)), "segments").train()
    with torch._dynamo.config.patch(optimize_ddp=True):
        assert kernels.compile_layers(model, "eager") == []
        assert torch._dynamo.config.optimize_ddp is False
