"""How a process computes, as far as it can be seen without a GPU; its number of threads: test_launcher.py.

python -m pytest tests/runtime/test_computing.py
"""

import threading

import pytest
import torch

from export import probe
from runtime import computing


@pytest.mark.parametrize(
    ("device", "chosen"),
    [
        (torch.device("cuda", 5), [torch.device("cuda", 5)]),
        (torch.device("cuda"), []),  # of a process alone: a new thread's current GPU is the first anyway
        (torch.device("cpu"), []),
    ],
    ids=str,
)
def test_a_thread_begins_on_the_gpu_of_its_process(monkeypatch, device, chosen):
    asked = []
    monkeypatch.setattr(torch.cuda, "set_device", asked.append)
    computing.first_in_thread(device)()
    assert asked == chosen


def test_every_thread_of_a_run_that_meets_the_gpu_begins_there(train, monkeypatch):
    """Page-locked memory was got by threads whose current GPU was the first of the machine, by all eight processes."""
    begun = []

    def first_in_thread(device: torch.device):
        return lambda: begun.append((threading.current_thread().name, device.type))

    monkeypatch.setattr(computing, "first_in_thread", first_in_thread)
    train(train_steps=1)
    assert sorted(begun) == [("batches_0", "cpu"), ("state writer_0", "cpu")]


def test_a_folder_is_read_back_with_all_cores_of_a_process_also_beside_a_gpu(train, monkeypatch):
    """Launchers leave a process one thread. It read a model of any size back alone, and all GPUs waited."""
    monkeypatch.setattr(computing, "set_threads", lambda device, wanted: torch.set_num_threads(1))  # as on a GPU
    monkeypatch.setattr(computing, "_usable_cores", lambda: 6)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # nobody chose
    seen = []
    real = probe.read_back

    def read_back(*words, **named):
        seen.append(torch.get_num_threads())
        return real(*words, **named)

    monkeypatch.setattr(probe, "read_back", read_back)
    train(train_steps=1)
    assert (seen, torch.get_num_threads()) == ([3], 1)
