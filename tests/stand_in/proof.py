"""What the stand-in for a GPU refuses, notes and delays: a program of assertions.

LD_PRELOAD=device.so python tests/stand_in/proof.py
"""

import pytest
import torch
import torch.distributed as dist
from harness import free_port
from stand_in.gpu import install
from stand_in.tensors import WAITS, StandIn


def numbers_are_those_of_a_cpu() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 3)
    x = torch.randn(5, 4)
    layer(x).square().sum().backward()
    expected = layer.weight.grad.clone()
    assert expected.norm() > 1
    layer.zero_grad()
    layer.to("cuda")
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    layer(x.cuda()).square().sum().backward()
    assert layer.weight.grad.is_cuda
    torch.testing.assert_close(layer.weight.grad.cpu(), expected)
    before = layer.weight.detach().cpu()
    optimizer.step()
    assert (layer.weight.detach().cpu() - before).abs().min() > 0.09
    view = x.cuda()[1:]
    view += 1
    torch.testing.assert_close(view.cpu(), x[1:] + 1)


def devices_do_not_mix() -> None:
    on_gpu, on_cpu = torch.ones(3, device="cuda"), torch.ones(3)
    for mixed in (lambda: on_gpu + on_cpu, lambda: torch.cat([on_gpu, on_cpu]), lambda: on_gpu[torch.tensor([1])]):
        with pytest.raises(RuntimeError, match="on the CPU"):
            mixed()
    assert (on_gpu + torch.tensor(1.0)).is_cuda  # as CUDA allows
    with pytest.raises(RuntimeError, match="numpy"):
        on_gpu.numpy()


def waits_are_noted() -> None:
    x = torch.arange(4.0).to("cuda")
    pinned = torch.ones(4).pin_memory()
    quiet = [lambda: x.sum(), lambda: pinned.to("cuda", non_blocking=True), lambda: x.to("cpu", non_blocking=True)]
    loud = [
        lambda: x.sum().item(), lambda: float(x[0]), lambda: bool(x[0]), lambda: x.tolist(), lambda: x.cpu(),
        lambda: x[x > 1], lambda: x.nonzero(), lambda: torch.ones(4).to("cuda"), lambda: pinned.to("cuda"),
        lambda: torch.ones(4).to("cuda", non_blocking=True), torch.cuda.synchronize, torch.accelerator.synchronize,
    ]  # fmt: skip
    for operations, expected in ((quiet, 0), (loud, 1)):
        for number, operation in enumerate(operations):
            WAITS.clear()
            operation()
            assert WAITS.total() == expected, (number, WAITS)


def copies_arrive_when_somebody_waits() -> None:
    x = torch.full((2,), 3.0, device="cuda")
    early = x.to("cpu", non_blocking=True)
    room = torch.empty(2, pin_memory=True)
    before = torch.cuda.Event()
    before.record()
    room.copy_(x, non_blocking=True)
    assert early.isnan().all()
    before.synchronize()
    assert early.tolist() == [3.0, 3.0]
    assert room.isnan().all()
    torch.accelerator.synchronize()
    assert room.tolist() == [3.0, 3.0]


def collectives_take_what_is_on_the_gpu() -> None:
    dist.init_process_group(backend="nccl", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    x = torch.ones(2, device="cuda")
    dist.all_reduce(x)
    assert x.is_cuda
    found = [None]
    dist.all_gather_object(found, {"a": 1})
    assert found == [{"a": 1}]
    with pytest.raises(RuntimeError, match="NCCL takes tensors on the GPU alone"):
        dist.all_reduce(torch.ones(2))


if __name__ == "__main__":
    install()
    with StandIn():
        numbers_are_those_of_a_cpu()
        devices_do_not_mix()
        waits_are_noted()
        copies_arrive_when_somebody_waits()
        collectives_take_what_is_on_the_gpu()
    print("proved")
