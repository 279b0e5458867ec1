"""How a process computes, as far as it can be seen without a GPU; its number of threads: test_launcher.py.

python -m pytest tests/runtime/test_computing.py
"""

import threading

import pytest
import torch

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
