"""Peak memory of a step against its number of tuples, at a fixed max_tokens_per_forward.

    python -m benchmarks.memory_batch [--most 16384]

Each size runs in a process of its own: MS-MARCO-like lengths, one hard negative, both losses, forward, backward and
update. What must grow is the embeddings: those of the distinct texts, those in the order of the tuples, and the
gradients of both. On Linux freed blocks go back to the system at once, so that the peak is what was held.
"""

import argparse
import ctypes
import resource
import time
from dataclasses import dataclass

import numpy as np
import torch
from transformers import AutoModel, Qwen3Config

from benchmarks.common import add_gradients, batch_of_lengths, in_fresh_process, in_parts
from benchmarks.lengths import tuples
from model import Embedder
from modeling.versions import in_dtype

CONFIG = Qwen3Config(
    vocab_size=4096,
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
)
SIZES = (64, 256, 1024, 4096, 16384)  # tuples
BUDGET = 8192  # tokens of a forward pass
SHORTER = 8  # texts are an eighth of the distribution's, so that 16,384 tuples take a minute
M_MMAP_THRESHOLD = -3  # of malloc.h: blocks of at least so many bytes are mapped, and unmapped when freed


@dataclass(frozen=True)
class Peak:
    """What one step needed."""

    tokens: int
    parts: int
    mib: float  # at the peak, above what the process had before
    embeddings_mib: float  # computed: of the embeddings and their gradients
    seconds: float


def main() -> None:
    """Print peak memory for each number of tuples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=16384)
    most = parser.parse_args().most
    print(f"at most {BUDGET:,} tokens a forward pass; {CONFIG.hidden_size} wide\n")
    print(f"{'tuples':>8}{'tokens':>12}{'parts':>7}{'peak MiB':>10}", end="")
    print(f"{'embeddings MiB':>16}{'the rest':>10}{'seconds':>9}")
    for size in SIZES:
        if size > most:
            break
        peak = in_fresh_process(measure, size)
        print(f"{size:8,}{peak.tokens:12,}{peak.parts:7}{peak.mib:10,.0f}", end="")
        rest = peak.mib - peak.embeddings_mib
        print(f"{peak.embeddings_mib:16,.1f}{rest:10,.0f}{peak.seconds:9.1f}", flush=True)


def measure(count: int) -> Peak:
    """One step of `count` tuples; the peak is that of this process."""
    return_freed_blocks_at_once()
    lengths = np.maximum(2, tuples("MS-MARCO-like", count, negatives=1) // SHORTER)  # [m, 3]
    batch = in_parts(batch_of_lengths(lengths, CONFIG.vocab_size), BUDGET)
    torch.manual_seed(0)
    model = Embedder(AutoModel.from_config(CONFIG, **in_dtype(torch.float32)), "segments").train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    before = peak_memory()
    began = time.perf_counter()
    add_gradients(model, batch, CONFIG.hidden_size)
    optimizer.step()
    seconds = time.perf_counter() - began
    embeddings = 4 * lengths.size * CONFIG.hidden_size * 4 / 2**20  # four copies in fp32
    return Peak(len(batch.tokens), batch.parts, peak_memory() - before, embeddings, seconds)


def return_freed_blocks_at_once() -> None:
    """Let malloc map blocks of a MiB and more one by one; only Linux's can be told."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 2**20)


def peak_memory() -> float:
    """MiB that this process had at most until now."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


if __name__ == "__main__":
    main()
