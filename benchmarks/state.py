"""What saving a state costs training, and what that comes to for 4B.

    python -m benchmarks.state [--gigabytes 0.75] [--states 3] [--folder DIR]

One process trains a model whose weights and moments have this size, and saves a state several times. The training loop
waits while the numbers are checked and copied; a background thread writes, hashes and flushes them. For comparison the
same bytes are saved one step after another, as an earlier version did: checked, written, read again for the checksum,
flushed. Both write into DIR, so choose a folder on the disk that is to be measured.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import nn

from runtime import resume
from runtime.background import StateWriter
from utils import file_digest, flush

WIDTH = 2048  # of a layer: 50 MB of weights and moments
EVERY = 1800  # seconds between two states: save_every_minutes 30
BYTES = 12  # of a state, for each trained weight: fp32 weight and two moments
WEIGHTS_4B = 4.02e9
GPUS = 8


def main() -> None:
    """Print both ways and the arithmetic."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=0.75)
    parser.add_argument("--states", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None)
    flags = parser.parse_args()
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    model, optimizer = accelerator.prepare(*trained_model(flags.gigabytes))
    with tempfile.TemporaryDirectory(dir=flags.folder) as name:
        rates = in_the_background(accelerator, model, optimizer, Path(name) / "state", flags.states)
        one_after_another(accelerator, model, optimizer, Path(name), flags.states)
    say_arithmetic(rates)


def trained_model(gigabytes: float) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model and AdamW, whose state has this size when an update was made."""
    layers = max(1, round(gigabytes * 1e9 / (WIDTH * WIDTH * BYTES)))
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def train_step(accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """One update; returns its seconds."""
    began = time.perf_counter()
    loss = model(torch.ones(64, WIDTH, device=accelerator.device)).square().mean()
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    if accelerator.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def in_the_background(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, states: int
) -> tuple[float, float]:
    """Save as run.py does. Returns bytes a second: of the copy, and of the writing."""
    writer = StateWriter(accelerator, folder, keep=1)
    quiet = [train_step(accelerator, model, optimizer) for _ in range(4)][1:]
    meter = torch.zeros(1, dtype=torch.float64)
    rates = []
    print("state       size     loop stood still     until it had its name     of which a step took, before")
    with writer:
        for number in range(states):
            began = time.monotonic()
            parts = resume.capture(accelerator, model, optimizer, meter, writer.number, writer.count)
            assert resume.broken(parts) is None
            writer.begin(number + 1, parts, {}, began)
            meanwhile = []
            while not writer.published.done():
                meanwhile.append(train_step(accelerator, model, optimizer))
            writer.wait()
            state = writer.check()
            rates.append((state.size / state.waited, state.size / (state.seconds - state.waited)))
            print(
                f"{number + 1:5}{state.size / 1e9:8.2f} GB{state.waited:17.2f} s{state.seconds:24.2f} s"
                f"{statistics.median(meanwhile):19.2f} s,{statistics.median(quiet):7.2f} s"
            )
    copies, writes = zip(*rates, strict=True)
    copied, written = statistics.median(copies), statistics.median(writes)
    print(f"copied at {copied / 1e9:.2f} GB/s, written at {written / 1e6:,.0f} MB/s (medians)")
    return copied, written


def one_after_another(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, states: int
) -> None:
    """The former way; the loop stands still all the time."""
    seconds = []
    for _ in range(states):
        began = time.perf_counter()
        parts = resume.capture(accelerator, model, optimizer, torch.zeros(1), 0, 1)
        assert all(tensor.isfinite().all() for named in parts.values() for tensor in named.values())
        for kind, named in parts.items():
            path = folder / f"{kind}.safetensors"
            save_file({name: tensor.cpu().contiguous() for name, tensor in named.items()}, path)
            file_digest(path)
            flush(path)
        seconds.append(time.perf_counter() - began)
    gigabytes = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e9
    median = statistics.median(seconds)
    print(f"one after another, as before: the loop stood still for {median:.2f} s, {median / gigabytes:.1f} s a GB")


def say_arithmetic(rates: tuple[float, float]) -> None:
    """What the rates come to for 4B, whose state is 12 bytes a weight."""
    size = WEIGHTS_4B * BYTES
    print(f"\n4B: a state of {size / 1e9:.1f} GB every {EVERY // 60} minutes, at these rates:")
    for count in (1, GPUS):
        stands_still = size / count / rates[0]
        print(
            f"  {count} GPU{'s' if count > 1 else ''}: {size / count / 1e9:.1f} GB a process, copied in "
            f"{stands_still:.1f} s = {stands_still / EVERY:.2%} of training; written behind its back in "
            f"{size / count / rates[1]:.0f} s where each process has this disk to itself, else {size / rates[1]:.0f} s"
        )


if __name__ == "__main__":
    main()
