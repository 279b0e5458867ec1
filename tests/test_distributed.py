"""Several real processes over gloo against one, on raw values and gradients.

python -m pytest tests/test_distributed.py
"""

import os
import socket
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from losses import in_batch_loss
from utils import Meter, all_rows, gather


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _worker(rank: int, world: int, port: int, function, arguments: tuple, queue) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", rank=rank, world_size=world)
        queue.put((rank, function(rank, world, *arguments), None))
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))
    finally:
        dist.destroy_process_group()


def on_processes(world: int, function, *arguments) -> list:
    """What `function(rank, world, *arguments)` returns on each of `world` gloo processes, by rank."""
    context = mp.get_context("fork")  # no second import of torch; nothing here has started threads that matter
    queue, port = context.Queue(), free_port()
    workers = [
        context.Process(target=_worker, args=(rank, world, port, function, arguments, queue)) for rank in range(world)
    ]
    for worker in workers:
        worker.start()
    found = sorted((queue.get(timeout=60) for _ in workers), key=lambda item: item[0])
    for worker in workers:
        worker.join(10)
    failures = [error for _, _, error in found if error]
    assert not failures, "\n".join(failures)
    return [value for _, value, _ in found]


def part(rows: torch.Tensor, counts: list[int], rank: int) -> torch.Tensor:
    return rows.split(counts)[rank]


def local_gradients(rank: int, world: int, queries, positives, counts: list[int]):
    """Loss and gradients as run.train_step has them: own queries, all positives, scaled by b * W / B."""
    q = part(queries, counts, rank).numpy().copy()
    q, p = torch.from_numpy(q).requires_grad_(), part(positives, counts, rank).clone().requires_grad_()
    candidates = gather(p, counts)
    targets = torch.arange(counts[rank]) + sum(counts[:rank])
    loss = in_batch_loss(q, candidates, targets, 0.05) * counts[rank] * world / sum(counts)
    loss.backward()
    dist.all_reduce(loss := loss.detach())
    return candidates.detach().numpy(), q.grad.numpy(), p.grad.numpy(), loss.item() / world


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
    return all_rows(torch.tensor([float(rank), 10.0]), world).tolist()


def test_all_rows_stacks_a_vector_of_every_process():
    expected = [[0.0, 10.0], [1.0, 10.0], [2.0, 10.0]]
    assert on_processes(3, stacked) == [expected] * 3
    assert all_rows(torch.tensor([1.0]), 1).tolist() == [[1.0]]


def collectives_of_a_log_line(rank: int, world: int, datasets: int) -> tuple[int, dict, dict]:
    calls = []
    for name in ("all_gather", "all_reduce", "broadcast", "gather", "all_gather_object"):
        setattr(dist, name, lambda *a, call=getattr(dist, name), **k: calls.append(call) or call(*a, **k))
    meter = Meter([f"d{i}" for i in range(datasets)], ["in_batch", "hard"], torch.device("cpu"))
    meter.add(rank, {"hard": torch.tensor(1.0 + rank)}, rows=1 + 2 * rank)
    meter.add(7, {"in_batch": torch.tensor(4.0 * rank)}, rows=1)
    meter.count(tuples=10, tokens=100, computed=200)
    losses, rates = meter.read(world)
    return len(calls), losses, rates


@pytest.mark.parametrize("datasets", [8, 502])
def test_a_log_line_costs_one_collective_whatever_the_number_of_datasets(datasets):
    for calls, losses, rates in on_processes(2, collectives_of_a_log_line, datasets):
        assert calls == 1
        assert losses == {"d0": {"hard": 1.0}, "d1": {"hard": 2.0}, "d7": {"in_batch": 2.0}}  # (0 + 4) / 2 rows
        assert rates["padding"] == 0.5
