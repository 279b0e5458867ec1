"""How a process computes: with how many threads, on which GPU, and whether in the same bits each time."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch

from runtime import launcher


def set_threads(device: torch.device, wanted: int) -> None:
    """Set how many threads this process computes with: the number wanted, else a person's, else its share of the cores.

    Without this one process on 16 cores would use one of them and say nothing: `accelerate launch` and torchrun set
    OMP_NUM_THREADS=1 where nobody chose. A person's number counts, because only they know what else the machine does:
    two threads on two cores that others use too were 30 times slower than one, since OpenMP's threads wait in a loop.

    Args:
        device: where the model is; away from a CPU nothing is chosen, only what is wanted is set.
        wanted: 0 = automatic.
    """
    if wanted or device.type == "cpu":
        torch.set_num_threads(wanted or _automatic_threads())


@contextmanager
def threads_of_a_processor(wanted: int) -> Iterator[None]:
    """Around what the processor computes while GPUs wait for it: with as many threads as there would be without a GPU.

    Training on a GPU keeps the one thread that launchers set, and needs no more. But a saved model folder is read back
    on the CPU, by that thread alone, while all GPUs wait.

    Args:
        wanted: 0 = automatic.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(wanted or _automatic_threads())
    try:
        yield
    finally:
        torch.set_num_threads(before)


def compute_deterministically() -> None:
    """Have every operation give the same bits each time, also on a GPU, or fail.

    On a GPU sums in the backward passes of embeddings, of gathers and of attention otherwise come in any order. cuBLAS
    reads its variable when it is first used, so this must be called before a model is on its device.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def first_in_thread(device: torch.device) -> Callable[[], None]:
    """What a new thread of this process calls first, where it gets page-locked memory or works on the GPU.

    CUDA has a current device for each thread, and a new thread's is the first GPU of the machine. So each of eight
    processes could open a context there by its threads, of half a gigabyte, and leave that GPU less than the others.

    Args:
        device: of this process. Without a number, as accelerate gives it to a process alone, it is the first.
    """
    if device.type != "cuda" or device.index is None:
        return _nothing
    return partial(torch.cuda.set_device, device)


def _automatic_threads() -> int:
    """A person's number of threads, else this process's share of the cores."""
    processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return launcher.threads_of_environment() or max(1, _usable_cores() // processes_here)


def _nothing() -> None:
    """Nothing is to be done."""


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # on Linux: a container or a scheduler may have left fewer than there are
        return len(os.sched_getaffinity(0))
    return os.cpu_count()
