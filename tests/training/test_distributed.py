"""Four processes train what one trains: raw gradients and weights of the door's own train_step, over gloo.

python -m pytest tests/training/test_distributed.py

Every process runs run.setup and run.train_step under DDP or FSDP2. The toy has all that is unequal: three datasets of
30, 14 and 2 training tuples in global batches of 12 (so 12, 9, 9; 7, 7; 2 rows: unequal on 2 and 4 processes, none at
all on some of 3 and 4), and tuples with 0 to 4 negatives.
"""

import numpy as np
import pytest
import torch
import torch.distributed as dist
import toy
from conftest import tokenize
from harness import on_processes, train_steps

from data.feed import Feed
from data.plan import Plan, split_sizes
from data.token_store import open_store
from losses import in_batch_loss, matryoshka_weights
from runtime.collectives import all_rows, gather
from training import objective
from training.meter import Meter
from training.objective import Objective

LORA = {"use_lora": True, "lora_dropout": 0.0, "lora_target_modules": "q_proj,up_proj"}
VARIANTS = {
    "both losses": {},
    "in-batch alone": {"num_hard_neg": 0, "teacher_model_path": "teacher", "kd_weight": 0.0},
    "matryoshka": {"use_mrl": True},
    "distillation": {"teacher_model_path": "teacher", "kd_weight": 3.0},
    "checkpointing": {"gradient_checkpointing": True},
    "detached": {"gather_with_grad": False},
    "detached, matryoshka, distillation": {"gather_with_grad": False, "use_mrl": True, "teacher_model_path": "teacher"},
    "in parts, matryoshka, distillation": {
        "max_tokens_per_forward": 150,
        "use_mrl": True,
        "teacher_model_path": "teacher",
        "kd_weight": 3.0,
    },
    "LoRA": LORA,
    "LoRA, matryoshka, distillation": LORA | {"use_mrl": True, "teacher_model_path": "teacher"},
    "LoRA, detached, checkpointing": LORA | {"gather_with_grad": False, "gradient_checkpointing": True},
}
WITH_BOTH = {  # a variant with Matryoshka and distillation -> the same with one of the two, or with none
    "in parts, matryoshka, distillation": ["matryoshka", "distillation"],
    "detached, matryoshka, distillation": ["detached"],
    "LoRA, matryoshka, distillation": ["LoRA"],
}
STEPS = 6  # one epoch of the toy
ROUNDED = ["both losses", "in parts, matryoshka, distillation", "LoRA, matryoshka, distillation"]  # in fp32 as well
MOVING = 1e-4  # learning rate
STILL = 1e-30  # no weight moves: six steps show six gradients at the same weights


@pytest.fixture(scope="module")
def world_of_toys(toy_world, tmp_path_factory):
    """Data of unequal sizes with missing negatives, and a teacher wider than the student."""
    root = tmp_path_factory.mktemp("distributed")
    raw = toy.write_gappy(root / "raw", {"retrieval": 31, "clustering": 15, "tiny": 3})
    assert tokenize(raw, root / "stores", toy_world.backbone) == 0
    toy.make_backbone(root / "teacher", hidden_size=48, seed=7)
    return root


def configuration(root, toy_world, world: int, name: str, **changes) -> dict:
    base = {
        "model_path": str(toy_world.backbone), "experiment_id": f"w{world}", "output_dir": str(root / f"out{world}"),
        "tb_dir": str(root), "cache_dir": str(root / "cache"), "train_data_path": str(root / "stores"),
        "train_batch_size": 12 // world, "max_seq_length": 64, "num_hard_neg": 3, "train_steps": STEPS,
        "warmup_steps": 0, "scheduler_type": "constant_with_warmup", "min_lr": 0.0, "report_to": "none",
        "gradient_checkpointing": False, "max_tokens_per_forward": 0,
    }  # fmt: skip
    config = base | VARIANTS[name] | changes
    if world == 1:
        config["max_tokens_per_forward"] = 0  # parts on several processes against one pass on one
    if "teacher_model_path" in config:
        config["teacher_model_path"] = str(root / config["teacher_model_path"])
    return config


def train_variants(folder, toy_world, world: int, dtype, variants: list[tuple[str, float]], kind: str = "ddp"):
    """What `train_steps` reports of each (name of a variant, learning rate), all on one set of processes.

    Args:
        folder: an empty one; the data are linked into it, because each world has a cache and outputs of its own.
    """
    configs = []
    for number, (name, rate) in enumerate(variants):
        config = configuration(folder, toy_world, world, name, learning_rate=rate)
        configs.append(config | {"experiment_id": f"w{world}-{number}"})
    return on_processes(world, train_steps, configs, dtype, kind=kind)[0]


def linked(root, name: str):
    """A folder with the data of `root` in it."""
    folder = root / name
    folder.mkdir()
    for part_of_it in ("stores", "teacher"):
        (folder / part_of_it).symlink_to(root / part_of_it)
    return folder


@pytest.fixture(scope="module")
def alone(world_of_toys, toy_world):
    """What one process makes of the whole batch, by variant; in fp64."""
    variants = [(name, MOVING) for name in VARIANTS]
    found = train_variants(linked(world_of_toys, "alone"), toy_world, 1, torch.float64, variants)
    return dict(zip(VARIANTS, found, strict=True))


def relative_error(found: dict, expected: dict) -> float:
    assert found.keys() == expected.keys()
    difference = sum(float(((found[name] - expected[name]) ** 2).sum()) for name in expected)
    return (difference / sum(float((expected[name] ** 2).sum()) for name in expected)) ** 0.5


def largest_difference(found: dict, expected: dict) -> float:
    assert found.keys() == expected.keys()
    return max(float(np.abs(found[name] - value).max()) for name, value in expected.items())


def check_wrapped(ours: dict, kind: str) -> None:
    """The engine that was asked for took the model, and its teacher."""
    assert ours["engine"] == {"ddp": "DistributedDataParallel", "fsdp": "FSDPEmbedder"}[kind]
    assert ours["teacher"] in (None, {"ddp": "Parameter", "fsdp": "DTensor"}[kind])


def check_gradients(ours: dict, theirs: dict, limit: float, name: str) -> float:
    """Each step's gradient is that of one process. Returns the largest relative error."""
    assert len(ours["gradients"]) == STEPS
    worst, compared = 0.0, 0
    for step, (gradient, expected) in enumerate(zip(ours["gradients"], theirs["gradients"], strict=True)):
        norm = sum(float((value**2).sum()) for value in expected.values()) ** 0.5
        if norm == 0:  # clustering without negatives has no loss
            assert all((value == 0).all() for value in gradient.values())
            continue
        compared += norm > 1e-3
        worst = max(worst, relative_error(gradient, expected))
        assert worst <= limit, f"{name}, step {step}"
        assert ours["norms"][step] == pytest.approx(norm, rel=1e-5)  # of the whole, not of a shard
    assert compared >= (4 if name == "in-batch alone" else STEPS), name
    return worst


def check_losses(ours: dict, theirs: dict, name: str) -> None:
    for dataset, kinds in theirs["losses"].items():
        assert ours["losses"][dataset] == pytest.approx(kinds, rel=1e-5), name


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_processes_have_the_gradients_and_weights_of_one(alone, world_of_toys, toy_world, world, kind):
    """In fp64, where the weights stay so near that the gradients of later steps can be compared as well."""
    variants = [(name, MOVING) for name in VARIANTS]
    folder = linked(world_of_toys, f"{kind}{world}")
    found = train_variants(folder, toy_world, world, torch.float64, variants, kind)
    worst, moved = 0.0, 0.0
    for ours, (name, theirs) in zip(found, alone.items(), strict=True):
        check_wrapped(ours, kind)
        worst = max(worst, check_gradients(ours, theirs, 1e-12, name))
        check_losses(ours, theirs, name)
        if name.startswith("in parts"):
            assert ours["passes"] > 2 * STEPS == 2 * theirs["passes"]  # several parts in most steps, each twice
        apart = largest_difference(ours["weights"], theirs["weights"])
        assert apart <= 1e-12, f"{name}: weights after {STEPS} steps"
        moved = max(moved, apart)
    print(f"{kind} x {world}: gradients {worst:.1e} apart, weights after {STEPS} steps {moved:.1e}")


@pytest.fixture(scope="module")
def alone_in_fp32(world_of_toys, toy_world):
    """The same of some variants in fp32, standing still and moving; and what was trained."""
    variants = [(name, rate) for name in ROUNDED for rate in (STILL, MOVING)]
    folder = linked(world_of_toys, "alone32")
    return variants, train_variants(folder, toy_world, 1, torch.float32, variants)


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_in_fp32_they_differ_by_its_rounding(alone_in_fp32, world_of_toys, toy_world, kind):
    variants, alone = alone_in_fp32
    found = train_variants(linked(world_of_toys, f"{kind}32"), toy_world, 3, torch.float32, variants, kind)
    for ours, theirs, (name, rate) in zip(found, alone, variants, strict=True):
        check_wrapped(ours, kind)
        if rate == STILL:
            check_gradients(ours, theirs, 2e-6, name)
        check_losses(ours, theirs, name)
        apart = largest_difference(ours["weights"], theirs["weights"])
        assert apart <= 1e-6, f"{name}: weights after {STEPS} steps"


@pytest.mark.processes
def test_the_toy_moves_and_its_variants_differ(alone):
    for run in alone.values():
        names = [name for name in run["weights"] if name in run["gradients"][0]]
        assert max(float(np.abs(run["weights"][n] - run["before"][n]).max()) for n in names) > 1e-4
    gradients = {name: run["gradients"] for name, run in alone.items()}
    for other in ("in-batch alone", "matryoshka", "distillation", "detached"):
        assert max(map(relative_error, gradients[other], gradients["both losses"])) > 1e-2, other
    for name, pieces in WITH_BOTH.items():  # neither Matryoshka nor distillation is idle beside the other, in any step
        for other in pieces:
            parts = zip(gradients[name], gradients[other], strict=True)
            assert min(relative_error(both, one) for both, one in parts) > 5e-2, (name, other)
        assert all(kinds["distillation"] > 1e-2 for kinds in alone[name]["losses"].values()), name
    assert max(map(relative_error, gradients["checkpointing"], gradients["both losses"])) < 1e-6
    assert all(len(step) == 2 * 2 * 2 for step in gradients["LoRA"])  # A and B of two modules in two layers


# ---------------------------------------------------------------------- one process of two, simulated


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("settings", [
    {}, {"prefixes": matryoshka_weights(32)}, {"gather_with_grad": False}, {"kd_weight": 2.0},
], ids=["plain", "matryoshka", "detached", "distillation"])  # fmt: skip
def test_parts_of_all_processes_average_to_the_whole(world_of_toys, monkeypatch, settings, world):
    """Every rank's part worked out in this process: their average has the value and the gradient of the whole."""
    stores = [open_store(world_of_toys / "stores" / name) for name in ("clustering", "retrieval", "tiny")]
    plan = Plan(tuple(split_sizes(len(store.tuples))[0] for store in stores), 12, 0)
    goal = Objective(0.05, **{"prefixes": {32: 1.0}} | settings)
    for step in range(1, plan.steps_per_epoch + 1):
        dataset, whole = Feed(stores, [3, 3, 3], plan, [64] * 3).training(step)
        task = stores[dataset].task == "retrieval"
        table = torch.randn(stores[dataset].meta["texts"], 32, dtype=torch.float64).requires_grad_()  # by text number
        taught = torch.randn(len(table), 48, dtype=torch.float64) if "kd_weight" in settings else None

        def value(batch, table=table, taught=taught, task=task):
            numbers = torch.zeros(len(batch.lengths), dtype=torch.long)
            numbers[batch.index] = torch.from_numpy(batch.texts).long()  # [u]
            embeddings = table[numbers]
            return goal.total(
                goal.gather_and_losses(batch, embeddings, task, None if taught is None else taught[numbers]), embeddings
            )

        expected = value(whole)
        (gradient,) = torch.autograd.grad(expected, table)
        assert gradient.norm() > 1e-3
        batches = [Feed(stores, [3, 3, 3], plan, [64] * 3, rank, world).training(step)[1] for rank in range(world)]
        positives = torch.cat([table[batch.texts[batch.rows : 2 * batch.rows]] for batch in batches])
        if not goal.gather_with_grad:
            positives = positives.detach()
        monkeypatch.setattr(objective, "gather", lambda rows, counts, positives=positives: positives)
        average = sum(value(batch) for batch in batches) / world
        monkeypatch.setattr(objective, "gather", gather)
        torch.testing.assert_close(average, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(torch.autograd.grad(average, table)[0], gradient, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------ gather


def part(rows: torch.Tensor, counts: list[int], rank: int) -> torch.Tensor:
    return rows.split(counts)[rank]


def local_gradients(rank: int, world: int, queries, positives, counts: list[int]):
    """Loss and gradients of own queries against all positives, scaled by b * W / B."""
    dist.init_process_group("gloo", rank=rank, world_size=world)
    q = part(queries, counts, rank).numpy().copy()
    q, p = torch.from_numpy(q).requires_grad_(), part(positives, counts, rank).clone().requires_grad_()
    candidates = gather(p, counts)
    targets = torch.arange(counts[rank]) + sum(counts[:rank])
    loss = in_batch_loss(q, candidates, targets, 0.05) * counts[rank] * world / sum(counts)
    loss.backward()
    dist.all_reduce(loss := loss.detach())
    return candidates.detach().numpy(), q.grad.numpy(), p.grad.numpy(), loss.item() / world


@pytest.mark.processes
@pytest.mark.parametrize("counts", [[4, 4], [3, 1], [2, 0, 5], [1, 2, 3, 1]])
def test_gathered_in_batch_loss_has_the_gradient_of_one_process(counts):
    torch.manual_seed(0)
    total, world = sum(counts), len(counts)
    queries, positives = torch.randn(2, total, 8, dtype=torch.float64)
    q, p = queries.clone().requires_grad_(), positives.clone().requires_grad_()
    reference = in_batch_loss(q, p, torch.arange(total), 0.05)
    reference.backward()
    assert p.grad.norm() > 1e-3

    found = on_processes(world, local_gradients, queries, positives, counts)
    for rank, (candidates, q_grad, p_grad, loss) in enumerate(found):
        assert torch.equal(torch.from_numpy(candidates), positives)
        assert loss == pytest.approx(reference.item(), rel=1e-12)
        # Data parallelism averages over processes: what a process holds counts 1 / world.
        torch.testing.assert_close(torch.from_numpy(q_grad) / world, part(q.grad, counts, rank), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(torch.from_numpy(p_grad) / world, part(p.grad, counts, rank), rtol=1e-12, atol=1e-14)


def stacked(rank: int, world: int):
    dist.init_process_group("gloo", rank=rank, world_size=world)
    return all_rows(torch.tensor([float(rank), 10.0]), world).tolist()


@pytest.mark.processes
def test_all_rows_stacks_a_vector_of_every_process():
    expected = [[0.0, 10.0], [1.0, 10.0], [2.0, 10.0]]
    assert on_processes(3, stacked) == [expected] * 3
    assert all_rows(torch.tensor([1.0]), 1).tolist() == [[1.0]]


def collectives_of_a_log_line(rank: int, world: int, datasets: int) -> tuple[int, dict, dict]:
    dist.init_process_group("gloo", rank=rank, world_size=world)
    calls = []
    for name in ("all_gather", "all_reduce", "broadcast", "gather", "all_gather_object"):
        setattr(dist, name, lambda *a, call=getattr(dist, name), **k: calls.append(call) or call(*a, **k))
    meter = Meter([f"d{i}" for i in range(datasets)], ["in_batch", "hard"], torch.device("cpu"))
    meter.add(rank, {"hard": torch.tensor(1.0 + rank)}, rows=1 + 2 * rank)
    meter.add(7, {"in_batch": torch.tensor(4.0 * rank)}, rows=1)
    meter.count(tuples=10, tokens=100, computed=200)
    losses, shares, _ = meter.read(world)
    return len(calls), losses, shares


@pytest.mark.processes
@pytest.mark.parametrize("datasets", [8, 502])
def test_a_log_line_costs_one_collective_whatever_the_number_of_datasets(datasets):
    for calls, losses, rates in on_processes(2, collectives_of_a_log_line, datasets):
        assert calls == 1
        assert losses == {"d0": {"hard": 1.0}, "d1": {"hard": 2.0}, "d7": {"in_batch": 2.0}}  # (0 + 4) / 2 rows
        assert rates["padding"] == 0.5
