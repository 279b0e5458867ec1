"""Weights handed out by one process: every process has its rows of them, and only those.

python -m pytest tests/runtime/test_hand_out.py
"""

import pytest
import torch
import torch.distributed as dist
from harness import on_processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from runtime import sharding, shards
from runtime.collectives import problem_of_any
from training.identity import weights_digest
from utils import RunError

CPU = torch.device("cpu")


class Small(nn.Module):
    """Weights whose rows no number of processes divides, one with a single row, and buffers of both kinds."""

    def __init__(self, rows: int = 7):
        super().__init__()
        self.first = nn.Linear(3, rows)
        self.second = nn.Linear(rows, 1)
        self.table = nn.Parameter(torch.randn(5, 2, 3))
        self.register_buffer("kept", torch.randn(4))
        self.register_buffer("passing", torch.randn(2, 2), persistent=False)

    @classmethod
    def whole(cls, state: dict) -> "Small":
        """One process's, with these weights."""
        module = cls()
        module.load_state_dict(state)
        return module

    def forward(self, x):
        return self.second(self.first(x)) + self.table.sum() + self.kept.sum() + self.passing.sum()


def shard(module: nn.Module, mesh=None) -> None:
    fully_shard(module.first, mesh=mesh)
    fully_shard(module, mesh=mesh)


def handed_out(rank: int, world: int, sent_at_once: int, copies: int) -> None:
    dist.init_process_group("gloo", rank=rank, world_size=world)
    sharding._SENT_AT_ONCE = sent_at_once
    torch.manual_seed(0)
    whole = Small()
    expected = {name: tensor.detach().clone() for name, tensor in whole.state_dict().items()}
    answer = whole(torch.ones(2, 3)).detach()
    torch.manual_seed(1 + rank)  # what the others make is never seen
    module = whole if rank == 0 else Small()
    passing = whole.passing.clone()
    weights = sharding.take_weights(module)
    assert all(tensor.is_meta for tensor in [*module.parameters(), *module.buffers()])
    sharding.agree_on_weights(module)
    mesh = init_device_mesh("cpu", (copies, world // copies), mesh_dim_names=("copy", "part")) if copies else None
    shard(module, mesh)
    sharding.hand_out(module, weights, CPU)
    assert rank != 0 or not weights
    for name, parameter in module.named_parameters():
        begin, end = sharding.rows_here(parameter)
        assert torch.equal(parameter.to_local(), expected[name][begin:end]), name
        assert torch.equal(parameter.full_tensor(), expected[name]), name
    assert torch.equal(module.kept, expected["kept"])
    assert torch.equal(module.passing, passing)
    assert set(module.state_dict()) == set(expected)
    assert weights_digest(module) == weights_digest(Small.whole(expected))
    module(torch.ones(2, 3)).sum().backward()
    assert all(parameter.grad.full_tensor().norm() > 0 for parameter in module.parameters())
    with torch.no_grad():
        torch.testing.assert_close(module(torch.ones(2, 3)), answer)


@pytest.mark.processes
@pytest.mark.parametrize(("world", "sent_at_once", "copies"), [(2, 2**28, 0), (3, 40, 0), (4, 1, 0), (4, 100, 2)])
def test_every_process_gets_its_own_rows(world, sent_at_once, copies):
    on_processes(world, handed_out, sent_at_once, copies)


def described(rank: int, world: int, rows: int) -> str:
    dist.init_process_group("gloo", rank=rank, world_size=world)
    with torch.device("meta"):
        module = Small(rows if rank == 1 else 7)
    if rank == 0:
        module.second.to(torch.float64)
    try:
        sharding.agree_on_weights(module)
    except RunError as error:
        return str(error)
    assert module.second.weight.dtype == torch.float64
    assert module.first.weight.dtype == torch.float32
    return ""


@pytest.mark.processes
def test_processes_with_another_model_are_refused_and_dtypes_are_the_main_process_s():
    assert on_processes(2, described, 7) == ["", ""]
    refusal = "process 1 finds another model than the main process: give all the same folder"
    assert on_processes(3, described, 6) == [refusal] * 3


def first_problem(rank: int, world: int) -> list:
    dist.init_process_group("gloo", rank=rank, world_size=world)
    return [problem_of_any(f"of {rank}" if rank else "", world), problem_of_any(None, world)]


@pytest.mark.processes
def test_a_problem_of_one_process_is_everybody_s():
    assert on_processes(3, first_problem) == [["of 1", None]] * 3
    assert problem_of_any("mine", 1) == "mine"


def test_parts_are_cut_as_torch_cuts_them():
    for rows in range(1, 12):
        for parts in range(1, 8):
            sizes = [len(chunk) for chunk in torch.arange(rows).chunk(parts)]
            sizes += [0] * (parts - len(sizes))
            bounds = [shards.rows_of(rows, part, parts) for part in range(parts)]
            assert [own.stop - own.start for own in bounds] == sizes
