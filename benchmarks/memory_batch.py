"""Peak memory of a step against its number of tuples, at a fixed budget of tokens a forward pass.

    python -m benchmarks.memory_batch [--most 16384]

Each size runs in a process of its own: MS-MARCO-like lengths, one hard negative, both losses, forward, backward and
update. What must grow is the embeddings: those of the distinct texts, those in the order of the tuples, and the
gradients of both. On Linux freed blocks go back to the system at once, so that the peak is what was held.
"""

import argparse
import ctypes
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import torch
from transformers import AutoModel, Qwen3Config

from benchmarks.lengths import packed, tuples
from benchmarks.step import Alone
from data.batch import Batch, split_by_budget
from model import Embedder
from training import two_pass
from training.objective import Objective

CONFIG = {"vocab_size": 4096, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}  # fmt: skip
BUDGET, SHORTER = 8192, 8  # texts are an eighth of the distribution's, so that 16,384 tuples take a minute


def main() -> None:
    """Print peak memory for each number of tuples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=16384)
    sizes = [64 * 4**i for i in range(5) if 64 * 4**i <= parser.parse_args().most]
    print(f"at most {BUDGET:,} tokens a forward pass; {CONFIG['hidden_size']} wide\n")
    print(
        f"{'tuples':>8}{'tokens':>12}{'parts':>7}{'peak MiB':>10}{'embeddings MiB':>16}{'the rest':>10}{'seconds':>9}"
    )
    for size in sizes:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:  # a peak belongs to a process
            tokens, parts, peak, embeddings, seconds = pool.submit(measure, size).result()
        print(
            f"{size:8,}{tokens:12,}{parts:7}{peak:10,.0f}{embeddings:16,.1f}{peak - embeddings:10,.0f}{seconds:9.1f}",
            flush=True,
        )


def measure(count: int) -> tuple[int, int, float, float, float]:
    """Tokens, parts, peak MiB above the start, MiB of embeddings and their gradients, seconds."""
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 2**20)  # M_MMAP_THRESHOLD
    lengths = np.maximum(2, tuples("MS-MARCO-like", count, negatives=1) // SHORTER)  # [m, 3]
    order = np.concatenate([lengths[:, 0], lengths[:, 1], lengths[:, 2]])
    tokens, cu_seqlens, flat = packed(order, CONFIG["vocab_size"])
    mask, places = torch.ones(count, 1, dtype=torch.bool), torch.arange(len(flat))
    cuts = tuple(split_by_budget(flat, BUDGET))
    facts = {"counts": (count,), "begin": 0, "negatives": count, "heaviest": len(tokens)}
    batch = Batch(tokens, cu_seqlens, places, mask, torch.arange(count), places.numpy(), flat, cuts, **facts)
    torch.manual_seed(0)
    model = Embedder(AutoModel.from_config(Qwen3Config(**CONFIG), dtype=torch.float32), "segments").train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    goal = Objective(0.05, {CONFIG["hidden_size"]: 1.0})

    def loss_of(embeddings):
        terms = goal.terms(batch, embeddings, True)
        return goal.total(terms, embeddings), terms

    before, began = _peak(), time.perf_counter()
    two_pass.backward(Alone, model, batch, 0, loss_of)
    optimizer.step()
    embeddings = 4 * len(flat) * CONFIG["hidden_size"] * 4 / 2**20
    return len(tokens), batch.parts, _peak() - before, embeddings, time.perf_counter() - began


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


if __name__ == "__main__":
    main()
