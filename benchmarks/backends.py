"""The attention backends side by side: one training step on the same tuples, in turn, in one process.

    make quickstart && python -m benchmarks.backends

Prints seconds of CPU for forward, losses, backward and update, the fastest of several rounds, and the ratio to the
published layout: padded to the longest text of the step, recomputing activations.
"""

import argparse
import time
from pathlib import Path

import torch
import transformers

from data.batch import Batch
from data.feed import Feed
from data.plan import Plan, split_sizes
from data.token_store import open_store
from losses import hard_negative_loss, in_batch_loss
from model import Embedder
from modeling.backbone import load_backbone

VARIANTS = {  # name -> (backend, activation checkpointing)
    "padded + checkpointing (published)": ("padded", True),
    "padded": ("padded", False),
    "buckets": ("buckets", False),
    "segments + checkpointing": ("segments", True),
    "segments": ("segments", False),
}


def main() -> None:
    """Measure every variant in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, default=Path("quickstart/data_tokenized_qwen/code_search"))
    parser.add_argument("--model", default="quickstart/models/tiny-qwen3")
    parser.add_argument("--batch", type=int, default=16, help="tuples, as in the published 4B recipe")
    parser.add_argument("--negatives", type=int, default=7)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    flags = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # CPU seconds of one thread are what a noisy machine can be asked
    store = open_store(flags.store)
    plan = Plan((split_sizes(len(store.tuples))[0],), flags.batch, 0)
    _, batch = Feed([store], [flags.negatives], plan, flags.max_length).training(1)
    real, longest = len(batch.tokens), int(batch.lengths.max()) * len(batch.lengths)
    print(f"{len(batch.lengths)} texts, {real:,} tokens; padded {longest:,}, {1 - real / longest:.0%} of them padding")

    seconds, losses = {name: [] for name in VARIANTS}, {}
    for _ in range(flags.rounds):
        for name, (backend, checkpointing) in VARIANTS.items():
            spent, losses[name] = step(flags.model, backend, checkpointing, batch)
            seconds[name].append(spent)
    base = min(seconds["padded + checkpointing (published)"])
    print(f"{'':38}{'CPU s':>8}{'speed-up':>10}{'loss':>12}")
    for name, values in seconds.items():
        print(f"{name:38}{min(values):8.2f}{base / min(values):9.1f}x{losses[name]:12.6f}")


def step(path: str, backend: str, checkpointing: bool, batch: Batch) -> tuple[float, float]:
    """CPU seconds and loss of one update of a fresh model."""
    model = Embedder(load_backbone(path, torch.float32), backend, checkpointing).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    began = time.process_time()
    queries, positives, negatives = batch.split(model(batch.tokens, batch.cu_seqlens, batch.lengths))
    loss = in_batch_loss(queries, positives, batch.targets, 0.05)
    loss = loss + hard_negative_loss(queries, positives, negatives, 0.05, batch.mask)
    loss.backward()
    optimizer.step()
    return time.process_time() - began, loss.item()


if __name__ == "__main__":
    main()
