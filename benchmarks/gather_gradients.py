"""What each way of sharing passages between processes does to the gradient of the in-batch loss.

    python -m benchmarks.gather_gradients

Four gloo processes hold a quarter of a batch each; their gradients are averaged, as data parallelism does, and compared
with the gradient of one process that holds the whole batch. The seven patterns are those found in published trainers,
written down here in a few lines each. Adam hides a wrong length, though not from clipping, weight decay or a second
loss term; nothing hides a wrong direction.
"""

import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from losses import in_batch_loss
from runtime.collectives import gather

WORLD = 4  # processes
ROWS = 32  # pairs in the global batch
WIDTH = 16  # of an embedding
TEMPERATURE = 0.05


def main() -> None:
    """Print the table."""
    torch.manual_seed(0)
    model = encoder()
    queries, passages = torch.randn(2, ROWS, 64, dtype=torch.float64)
    in_batch_loss(model(queries), model(passages), torch.arange(ROWS), TEMPERATURE).backward()
    expected = gradient(model)
    print(f"{WORLD} processes x {ROWS // WORLD} pairs, against one process x {ROWS}; fp64\n")
    print(f"{'pattern':58}{'cosine':>8}{'length':>8}")
    for name, found in zip(PATTERNS, measure(model, queries, passages), strict=True):
        cosine = torch.dot(found, expected) / (found.norm() * expected.norm())
        length = found.norm() / expected.norm()
        print(f"{name:58}{cosine:8.3f}{length:8.3f}")


def encoder() -> nn.Module:
    """A network that queries and passages share, as a bi-encoder's do."""
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, WIDTH)).double()


def gradient(model: nn.Module) -> Tensor:
    """All gradients as one vector."""
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


# ---------------------------------------------------------------------------------------- the patterns
# Each takes this process's query and passage embeddings [b, d], and gives the loss that it would differentiate.


def local_queries_no_gradient(queries: Tensor, passages: Tensor) -> Tensor:
    """Passages from everywhere, without gradient: not even to this process's own."""
    return loss_of(queries, gathered(passages.detach()))


def local_queries_own_slice(queries: Tensor, passages: Tensor) -> Tensor:
    """As above, but this process's own passages keep theirs."""
    return loss_of(queries, own_slice(passages))


def all_queries_own_slice(queries: Tensor, passages: Tensor) -> Tensor:
    """Queries and passages from everywhere, own slices with gradient, the loss over all queries."""
    return in_batch_loss(own_slice(queries), own_slice(passages), torch.arange(ROWS), TEMPERATURE)


def all_queries_own_slice_scaled(queries: Tensor, passages: Tensor) -> Tensor:
    """The same times the number of processes."""
    return all_queries_own_slice(queries, passages) * WORLD


def local_queries_with_gradient(queries: Tensor, passages: Tensor) -> Tensor:
    """Passages from everywhere, with gradient: the project's `gather_with_grad: true`."""
    return loss_of(queries, gather(passages, [len(passages)] * WORLD))


def local_queries_with_gradient_scaled(queries: Tensor, passages: Tensor) -> Tensor:
    """The same times the number of processes."""
    return local_queries_with_gradient(queries, passages) * WORLD


def all_queries_with_gradient(queries: Tensor, passages: Tensor) -> Tensor:
    """Queries and passages from everywhere, all with gradient, the loss over all queries."""
    counts = [len(passages)] * WORLD
    return in_batch_loss(gather(queries, counts), gather(passages, counts), torch.arange(ROWS), TEMPERATURE)


PATTERNS = {
    "own queries, all passages, no gradient (F2LLM as launched)": local_queries_no_gradient,
    "own queries, all passages, gradient to own": local_queries_own_slice,
    "all queries, all passages, gradient to own": all_queries_own_slice,
    "all queries, all passages, gradient to own, x processes": all_queries_own_slice_scaled,
    "own queries, all passages, gradient to all (here)": local_queries_with_gradient,
    "own queries, all passages, gradient to all, x processes": local_queries_with_gradient_scaled,
    "all queries, all passages, gradient to all": all_queries_with_gradient,
}


def loss_of(queries: Tensor, candidates: Tensor) -> Tensor:
    """In-batch loss of this process's queries against the passages of all processes."""
    begin = len(queries) * dist.get_rank()
    targets = torch.arange(len(queries)) + begin
    return in_batch_loss(queries, candidates, targets, TEMPERATURE)


def gathered(rows: Tensor) -> Tensor:
    """Rows from everywhere, without gradient."""
    parts = [torch.empty_like(rows) for _ in range(WORLD)]
    dist.all_gather(parts, rows.detach())
    return torch.cat(parts)


def own_slice(rows: Tensor) -> Tensor:
    """Rows from everywhere, of which this process's own keep their gradient."""
    parts = list(gathered(rows).split(len(rows)))
    parts[dist.get_rank()] = rows
    return torch.cat(parts)


# ---------------------------------------------------------------------------------------- processes


def measure(model: nn.Module, queries: Tensor, passages: Tensor) -> list[Tensor]:
    """The averaged gradient of each pattern."""
    context = mp.get_context("fork")
    queue = context.Queue()
    arguments = (free_port(), model, queries, passages, queue)
    workers = [context.Process(target=work, args=(rank, *arguments)) for rank in range(WORLD)]
    for worker in workers:
        worker.start()
    found = [torch.from_numpy(array) for array in queue.get(timeout=60)]
    for worker in workers:
        worker.join()
    return found


def free_port() -> int:
    """A port that no program listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def work(rank: int, port: int, model: nn.Module, queries: Tensor, passages: Tensor, queue) -> None:
    """One process: its quarter through every pattern; gradients averaged; the first process reports."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    own_rows = slice(rank * ROWS // WORLD, (rank + 1) * ROWS // WORLD)
    found = []
    for pattern in PATTERNS.values():
        model.zero_grad()
        loss = pattern(model(queries[own_rows]), model(passages[own_rows]))
        loss.backward()
        total = gradient(model)
        dist.all_reduce(total)
        found.append((total / WORLD).numpy())
    if rank == 0:
        queue.put(found)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
