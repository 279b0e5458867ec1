"""The attention backends side by side: one training step on the same tuples, in turn, in one process.

    make quickstart && python -m benchmarks.backends

Prints seconds of CPU for forward, losses, backward and update, the fastest of several rounds, and the ratio to the
published layout: padded to the longest text of the step, recomputing activations.
"""

import argparse
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import transformers

from benchmarks.common import add_gradients, measure_in_turn
from data.batch import Batch
from data.feed import Feed
from data.plan import Plan, split_sizes
from data.token_store import open_store
from model import Embedder
from modeling.backbone import load_backbone

PUBLISHED = "padded + checkpointing (published)"
VARIANTS = {  # name -> (backend, activation checkpointing)
    PUBLISHED: ("padded", True),
    "padded": ("padded", False),
    "buckets": ("buckets", False),
    "segments + checkpointing": ("segments", True),
    "segments": ("segments", False),
}


class Step(NamedTuple):
    """What one update took and gave."""

    seconds: float  # of CPU
    loss: float


def main() -> None:
    """Measure every variant in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, default=Path("quickstart/data_tokenized_qwen/code_search"))
    parser.add_argument("--model", default="quickstart/models/smollm2")
    parser.add_argument("--batch", type=int, default=16, help="tuples, as in the published 4B recipe")
    parser.add_argument("--negatives", type=int, default=7)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    flags = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # CPU seconds of one thread are what a noisy machine can be asked
    batch = first_batch(flags.store, flags.batch, flags.negatives, flags.max_length)
    texts, tokens = len(batch.lengths), len(batch.tokens)
    padded = texts * int(batch.lengths.max())
    print(f"{texts} texts, {tokens:,} tokens; padded {padded:,}, {1 - tokens / padded:.0%} of them padding")

    variants = {
        name: partial(step, flags.model, backend, checkpointing, batch)
        for name, (backend, checkpointing) in VARIANTS.items()
    }
    steps = measure_in_turn(variants, flags.rounds)
    fastest = {name: min(found) for name, found in steps.items()}
    print(f"{'':38}{'CPU s':>8}{'speed-up':>10}{'loss':>12}")
    for name, (seconds, loss) in fastest.items():
        speed_up = fastest[PUBLISHED].seconds / seconds
        print(f"{name:38}{seconds:8.2f}{speed_up:9.1f}x{loss:12.6f}")


def first_batch(folder: Path, tuples: int, negatives: int, max_length: int) -> Batch:
    """The first step of a training on this store alone."""
    store = open_store(folder)
    trained, _ = split_sizes(len(store.tuples))
    feed = Feed([store], [negatives], Plan((trained,), tuples, 0), [max_length])
    _, batch = feed.training(1)
    return batch


def step(path: str, backend: str, checkpointing: bool, batch: Batch) -> Step:
    """One update of a fresh model."""
    model = Embedder(load_backbone(path, torch.float32), backend, checkpointing).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    began = time.process_time()
    loss = add_gradients(model, batch, model.hidden_size)
    optimizer.step()
    return Step(time.process_time() - began, loss.item())


if __name__ == "__main__":
    main()
