"""Every two of v2's pieces together train what the plain run of the second one trains.

    python -m pytest tests/training/test_combinations.py -v      names each pair

                 KD           LoRA          two-pass    FSDP2          resume
    MRL          loops        loops         one pass    one process    never stopped
    KD                        loops         one pass    one process    never stopped
    LoRA                                    one pass    one process    never stopped
    two-pass                                            one process    never stopped
    FSDP2                                                              never stopped

KD stands here twice, with the live teacher and with arrays of its embeddings, which are compared with each other too.
"Loops" are this file's own: each text through the decoder alone, each cosine of each prefix of each tuple added up.
All runs go through run.setup and run.train_step, in fp64, with weights that move; compared are losses, the gradients of
every step, and the last weights. A resume is compared bit for bit.

More of it: test_distributed.py has MRL, KD, LoRA and two-pass on 2, 3 and 4 processes under DDP and FSDP2 (here is the
one process); test_two_pass.py has two-pass in every attention backend, in bf16 and with dropout;
tests/runtime/test_resume.py stops whole runs, with MRL, KD and LoRA's dropout, and under FSDP2;
tests/runtime/test_killed_v2.py kills one with MRL and KD under FSDP2, which continues with 1, 2 and 3 processes.
"""

import math
from functools import cache
from itertools import combinations

import numpy as np
import pytest
import torch
import toy
from accelerate.state import AcceleratorState, GradientState
from conftest import tokenize
from harness import compute_in, live_run, on_processes, record_gradients, train_steps
from test_distributed import check_wrapped, largest_difference, relative_error
from torch import Tensor
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

import run
from tools import embed_store
from training import models

STEPS = 3
STOP = 1  # a run that is resumed is stopped after this step
TEMPERATURE = 0.05
KD_WEIGHT = 3.0
PREFIXES = {8: 1 / (3 * 2), 16: 1 / (2 * math.sqrt(2)), 32: 1.0}  # of 32 dimensions, by the report's formula

CHANGING = {  # with each of these a run has another gradient than without
    "MRL": {"use_mrl": True},
    "KD": {"teacher_model_path": "teacher", "kd_weight": KD_WEIGHT},
    "KD arrays": {"teacher_embeddings": "embeddings", "kd_weight": KD_WEIGHT},
    "LoRA": {"use_lora": True, "lora_dropout": 0.0, "lora_target_modules": "q_proj,up_proj"},
}
PIECES = CHANGING | {"two-pass": {"max_tokens_per_forward": 150}}

LOOPS = [("MRL", "KD"), ("MRL", "KD arrays"), ("MRL", "LoRA"), ("KD", "LoRA"), ("KD arrays", "LoRA")]
TWO_PASS = [(name, "two-pass") for name in CHANGING]
FSDP2 = [(name, "FSDP2") for name in PIECES]
RESUME = [(name, "resume") for name in [*PIECES, "FSDP2"]]


def by_pair(pairs: list[tuple[str, str]]):
    return pytest.mark.parametrize("pair", pairs, ids=" x ".join)


def test_every_two_are_compared():
    names = ["MRL", "KD", "LoRA", "two-pass", "FSDP2", "resume"]
    compared = {*LOOPS, *TWO_PASS, *FSDP2, *RESUME}
    assert set(combinations(names, 2)) <= compared


# ------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def world(toy_world, tmp_path_factory):
    """Data with 0 to 4 negatives a tuple, a teacher wider than the student, and its embeddings."""
    root = tmp_path_factory.mktemp("combinations")
    raw = toy.write_gappy(root / "raw", {"retrieval": 31, "clustering": 15})
    assert tokenize(raw, root / "stores", toy_world.backbone) == 0
    toy.make_backbone(root / "teacher", hidden_size=48, seed=7)
    words = ["--model", root / "teacher", "--stores", root / "stores", "--output", root / "embeddings"]
    assert embed_store.main([*map(str, words), "--max_seq_length", "64"]) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    (root / "backbone").symlink_to(toy_world.backbone)
    return root


def configuration(root, *pieces: str, processes: int = 1, stop: int = 0) -> dict:
    """A run with these pieces; its name is its own."""
    name = "-".join([*pieces, str(processes), str(stop)]).replace(" ", "_")
    config = {
        "model_path": "backbone", "experiment_id": name,
        "output_dir": str(root / "output"), "tb_dir": str(root), "cache_dir": str(root / f"cache_{processes}"),
        "train_data_path": str(root / "stores"),
        "train_batch_size": 12 // processes, "max_seq_length": 64, "num_hard_neg": 3, "train_steps": STEPS,
        "warmup_steps": 0, "scheduler_type": "constant_with_warmup", "learning_rate": 1e-3, "report_to": "none",
        "gradient_checkpointing": False, "max_tokens_per_forward": 0, "temperature": TEMPERATURE,
    }  # fmt: skip
    for piece in pieces:
        config |= PIECES[piece]
    for key in ("model_path", "teacher_model_path", "teacher_embeddings"):
        if key in config:
            config[key] = str(root / config[key])
    return config


@pytest.fixture(scope="module", autouse=True)
def in_fp64():
    """Models of this process are fp64, until this file is done."""
    with pytest.MonkeyPatch.context() as patch:
        for place, name in ((models, "load_backbone"), (models, "describe_backbone"), (Qwen3RMSNorm, "forward")):
            patch.setattr(place, name, getattr(place, name))  # so that it is put back
        compute_in(torch.float64)
        yield


@pytest.fixture(scope="module")
def trained(world):
    """A function (*pieces, stop=0) -> what `train_steps` says of a run with them in this process; each is run once."""

    @cache
    def one(*pieces: str, stop: int = 0) -> dict:
        return train_steps(0, 1, [configuration(world, *pieces, stop=stop)], torch.float64, stop)[0]

    return one


def same(ours: dict, theirs: dict, limit: float) -> None:
    """Two runs have the same gradients, none of them zero, losses and last weights."""
    assert len(ours["gradients"]) == len(theirs["gradients"]) == STEPS
    for gradient, expected in zip(ours["gradients"], theirs["gradients"], strict=True):
        assert sum(float(np.square(value).sum()) for value in expected.values()) > 1e-6
        assert relative_error(gradient, expected) <= limit
    assert ours["losses"].keys() == theirs["losses"].keys() == {"retrieval", "clustering"}
    for dataset, kinds in theirs["losses"].items():
        assert ours["losses"][dataset] == pytest.approx(kinds, rel=limit)
    assert largest_difference(ours["weights"], theirs["weights"]) <= limit


@by_pair(LOOPS)
def test_each_piece_changes_the_gradient_of_the_other(trained, pair):
    both = trained(*pair)
    for name in pair:
        other = trained(*(piece for piece in pair if piece != name))
        if name == "LoRA":
            assert all(".lora_" in weight for weight in both["gradients"][0])
            assert all(".lora_" not in weight for weight in other["gradients"][0])
        else:
            assert relative_error(both["gradients"][-1], other["gradients"][-1]) > 1e-2
    assert all(np.abs(gradient).max() > 0 for gradient in both["gradients"][-1].values())


# ------------------------------------------------------------------------------------------------ loops


@by_pair(LOOPS)
def test_losses_and_gradients_are_those_of_loops(world, pair):
    live = live_run(configuration(world, *pair) | {"output_dir": str(world / "loops")})
    gradients, tasks = [], set()
    record_gradients(live, gradients)
    for step in range(1, STEPS + 1):
        name, losses, gradient = by_loops(live, step, world)
        run.train_step(live, step)
        assert live.meter.read(1)[0] == {name: pytest.approx(losses, rel=1e-10)}
        assert sum(float(np.square(value).sum()) for value in gradient.values()) > 1e-6
        assert relative_error(gradients[-1], gradient) < 1e-10
        tasks.add(name)
    assert tasks == {"retrieval", "clustering"}


def by_loops(live: run.Run, step: int, root) -> tuple[str, dict[str, float], dict[str, np.ndarray]]:
    """(dataset, its losses, the gradient of what they come to) of a step: by tuples, prefixes and texts."""
    dataset, batch = live.feed.training(step)
    store = live.feed.stores[dataset]
    texts = [alone(live.model, store, number) for number in batch.texts]  # each [d]
    prefixes = PREFIXES if live.args.use_mrl else {32: 1.0}
    losses = {"hard": torch.zeros((), dtype=torch.float64)}
    if store.task == "retrieval":
        losses["in_batch"] = torch.zeros((), dtype=torch.float64)
    b = batch.rows
    queries, positives, negatives = texts[:b], texts[b : 2 * b], iter(texts[2 * b :])
    for i in range(b):
        own_negatives = [next(negatives) for is_there in batch.mask[i] if is_there]
        for dim, weight in prefixes.items():
            hard = [positives[i], *own_negatives]
            losses["hard"] = losses["hard"] + weight / b * nll(queries[i], hard, 0, dim)
            if "in_batch" in losses:
                losses["in_batch"] = losses["in_batch"] + weight / b * nll(queries[i], positives, i, dim)
    total = sum(losses.values())
    taught = [taught_states(live, store, number, root) for number in batch.texts]  # each [D], or None
    if taught[0] is not None:
        pairs = list(zip(texts, taught, strict=True))
        losses["distillation"] = sum(map(mean_square, (pairs[:b], pairs[b : 2 * b], pairs[2 * b :])))
        total = total + KD_WEIGHT * losses["distillation"]
    total.backward()
    gradient = {name: p.grad.numpy().copy() for name, p in live.model.named_parameters() if p.grad is not None}
    live.optimizer.zero_grad()
    return store.name, {name: loss.item() for name, loss in losses.items()}, gradient


def alone(model, store, number: int) -> Tensor:
    """[d], the last state of a text that goes through a decoder by itself."""
    ids = torch.from_numpy(store.tokens[store.offsets[number] : store.offsets[number + 1]].astype(np.int64))
    assert len(ids) <= 64
    return model.states("sdpa", input_ids=ids[None])[0, -1]


def taught_states(live: run.Run, store, number: int, root) -> Tensor | None:
    """[D], what the run's teacher makes of a text."""
    if live.args.teacher_embeddings:
        return torch.from_numpy(np.load(root / "embeddings" / store.name / "embeddings.npy")[number])
    return None if live.teacher is None else alone(live.teacher, store, number).detach()


def nll(query: Tensor, candidates: list[Tensor], own: int, dim: int) -> Tensor:
    """-log of the share that a query's own candidate has among all, by the first `dim` dimensions."""
    shares = [(cosine(query[:dim], candidate[:dim]) / TEMPERATURE).exp() for candidate in candidates]
    return -(shares[own] / sum(shares)).log()


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b) / ((a @ a) * (b @ b)).sqrt()


def mean_square(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Of student [d] and teacher [D >= d], over all pairs and the student's dimensions."""
    return sum((student - teacher[:32]).square().sum() for student, teacher in pairs) / (32 * len(pairs))


@pytest.mark.parametrize(
    "pieces", [(), ("MRL",), ("LoRA",), ("two-pass",)], ids=lambda names: " ".join(names) or "alone"
)
def test_arrays_of_a_teacher_train_as_the_live_one_does(trained, pieces):
    """But for the rounding of its embeddings to fp32, by which the two can be told apart."""
    arrays, live = (trained(*(name for name in PIECES if name in (*pieces, kd))) for kd in ("KD arrays", "KD"))
    assert (arrays["teacher"], live["teacher"]) == (None, "Parameter")
    same(arrays, live, 1e-5)
    assert relative_error(arrays["gradients"][-1], live["gradients"][-1]) > 1e-12


# -------------------------------------------------------------------------------- two-pass, FSDP2, resume


@by_pair(TWO_PASS)
def test_two_passes_train_as_one_does(trained, pair):
    one, two = trained(pair[0]), trained(*pair)
    assert one["passes"] == STEPS
    assert two["passes"] > 3 * 2 * STEPS  # more than three parts a step, each twice
    same(two, one, 1e-10)


def on_two(rank: int, processes: int, configs: list[dict], resumed: dict) -> list[dict]:
    return [
        *train_steps(rank, processes, configs, torch.float64),
        *train_steps(rank, processes, [resumed], torch.float64, STOP),
    ]


@pytest.fixture(scope="module")
def sharded(world):
    """The same runs on two processes under FSDP2, by piece; and one of nothing but FSDP2 that is resumed."""
    pieces = [(), *((name,) for name in PIECES)]
    configs = [configuration(world, *names, processes=2) for names in pieces]
    resumed = configuration(world, processes=2, stop=STOP)
    *found, again = on_processes(2, on_two, configs, resumed, kind="fsdp")[0]
    return dict(zip(["plain", *PIECES], found, strict=True)) | {"resume": again}


@pytest.mark.processes
@by_pair(FSDP2)
def test_shards_train_as_one_process_does(trained, sharded, pair):
    ours = sharded[pair[0]]
    check_wrapped(ours, "fsdp")
    if pair[0] == "two-pass":
        assert ours["passes"] > 2 * 2 * STEPS
        same(ours, trained(), 1e-10)  # two processes in two passes, one process in one
    else:
        same(ours, trained(pair[0]), 1e-10)


@by_pair([pair for pair in RESUME if "FSDP2" not in pair])
def test_a_resumed_run_is_the_one_that_never_stopped(trained, pair):
    same_bits(trained(pair[0], stop=STOP), trained(pair[0]))


@pytest.mark.processes
@by_pair([("FSDP2", "resume")])
def test_a_resumed_run_of_shards_is_the_one_that_never_stopped(sharded, pair):
    check_wrapped(sharded["resume"], "fsdp")
    same_bits(sharded["resume"], sharded["plain"])


def same_bits(ours: dict, theirs: dict) -> None:
    """`train_steps` has seen to it that the resumed run began where the first one stopped."""
    same(ours, theirs, 0)
