"""One training step, ours beside the published layout and Sentence Transformers' losses: same tuples, same weights.

    python -m benchmarks.step [--rounds 2] [--tuples N]          (pip install sentence-transformers for its two rows)

Forward, losses, backward and update of one process in fp32, the fastest of several rounds, all variants in turn, on the
frozen length distributions. Sentence Transformers trains another objective (all documents of the batch are negatives of
each query) on texts padded column by column; no tokenising is timed on either side, and no compilation.
"""

import argparse
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from shutil import which

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModel, Qwen3Config

from benchmarks.lengths import MEASURED, SHAPES, packed, padding_ratio, tuples
from data.batch import Batch, split_by_budget
from model import Embedder, rectangle
from training import kernels, two_pass
from training.objective import Objective

CONFIG = Qwen3Config(vocab_size=16384, hidden_size=256, intermediate_size=768, num_hidden_layers=3,
                     num_attention_heads=4, num_key_value_heads=2, head_dim=64)  # fmt: skip

TUPLES = {"code search": 8, "heavy-tailed": 4, "MS-MARCO-like": 16, "long documents": 2}  # some seconds a step


class Alone:
    """One process: what bounded.backward asks of accelerate."""

    @staticmethod
    def backward(loss: Tensor) -> None:
        """Nothing is scaled."""
        loss.backward()

    @staticmethod
    def no_sync(model: nn.Module) -> AbstractContextManager:
        """Nobody to wait for."""
        return nullcontext()


def main() -> None:
    """Measure and print a table for each distribution."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--tuples", type=int, help="by default " + ", ".join(f"{n} {name}" for name, n in TUPLES.items())
    )
    flags = parser.parse_args()
    for name in (*MEASURED, *SHAPES):
        count = flags.tuples or TUPLES[name]
        batch = frozen(name, count)
        lengths = batch.lengths[batch.index]
        print(f"\n{name}: {count} tuples, {lengths.sum():,} tokens, padding ratio {padding_ratio(lengths):.2f}")
        seconds: dict[str, list[float]] = {variant: [] for variant in variants()}
        for _ in range(flags.rounds):
            for variant, step in variants().items():
                seconds[variant].append(step(batch))
        base = min(seconds["padded + checkpointing (published)"])
        print(f"{'':42}{'s':>7}{'tuples/s':>10}{'speed-up':>10}")
        for variant, spent in seconds.items():
            best = min(spent)
            print(f"{variant:42}{best:7.2f}{count / best:10.2f}{base / best:9.1f}x", flush=True)


def frozen(name: str, count: int) -> Batch:
    """A step with texts of a frozen distribution."""
    lengths = tuples(name, count)  # [m, 2 + n]
    order = np.concatenate([lengths[:, 0], lengths[:, 1], lengths[:, 2:].flatten()])
    tokens, cu_seqlens, flat = packed(order, CONFIG.vocab_size)
    mask, places = torch.ones(count, lengths.shape[1] - 2, dtype=torch.bool), torch.arange(len(flat))
    facts = {"counts": (count,), "begin": 0, "negatives": int(mask.sum()), "heaviest": len(tokens)}
    cuts = {"texts": places.numpy(), "lengths": flat, "cuts": (0, len(flat))}
    return Batch(tokens, cu_seqlens, places, mask, positives=torch.arange(count), **cuts, **facts)


def variants() -> dict[str, Callable[[Batch], float]]:
    """Name -> a function that makes one step and returns its seconds."""
    table = {
        "padded + checkpointing (published)": lambda batch: ours(batch, "padded", True),
        "padded": lambda batch: ours(batch, "padded", False),
        "packed (here)": lambda batch: ours(batch, "segments", False),
        "packed, in parts of 2,048 tokens (here)": lambda batch: ours(batch, "segments", False, 2048),
    }
    if which("g++"):
        table["packed, compiled (here)"] = lambda batch: ours(batch, "segments", False, compiled=True)
    try:
        import sentence_transformers  # noqa: F401
    except ImportError:
        return table
    return table | {
        "Sentence Transformers, plain": lambda batch: theirs(batch, 0),
        "Sentence Transformers, cached, 16 at a time": lambda batch: theirs(batch, 16),
    }


def backbone() -> nn.Module:
    """The same random weights each time."""
    torch.manual_seed(0)
    return AutoModel.from_config(deepcopy(CONFIG), dtype=torch.float32)


def ours(batch: Batch, backend: str, checkpointing: bool, budget: int = 0, compiled: bool = False) -> float:
    """A step of this repository."""
    model = Embedder(backbone(), backend, checkpointing).train()
    if compiled:
        assert not kernels.compile_layers(model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    goal = Objective(0.05, {CONFIG.hidden_size: 1.0})
    batch = Batch(**vars(batch) | {"cuts": tuple(split_by_budget(batch.lengths, budget))})

    def loss_of(embeddings: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        terms = goal.terms(batch, embeddings, True)
        return goal.total(terms, embeddings), terms

    began = time.perf_counter()
    two_pass.backward(Alone, model, batch, 0, loss_of)
    optimizer.step()
    return time.perf_counter() - began


class Decoder(nn.Module):
    """The backbone as Sentence Transformers' first module."""

    def __init__(self):
        super().__init__()
        self.backbone = backbone()

    def forward(self, features: dict) -> dict:
        """Adds token_embeddings [n, L, d]."""
        states = self.backbone(features["input_ids"], attention_mask=features["attention_mask"], use_cache=False)
        return features | {"token_embeddings": states.last_hidden_state}


def theirs(batch: Batch, at_a_time: int) -> float:
    """A step with Sentence Transformers' model, pooling and loss."""
    from sentence_transformers import SentenceTransformer, losses
    from sentence_transformers.models import Pooling

    model = SentenceTransformer(modules=[Decoder(), Pooling(CONFIG.hidden_size, pooling_mode="lasttoken")]).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    if at_a_time:
        loss = losses.CachedMultipleNegativesRankingLoss(model, scale=20.0, mini_batch_size=at_a_time)
    else:
        loss = losses.MultipleNegativesRankingLoss(model, scale=20.0)
    features = columns(batch)
    began = time.perf_counter()
    loss(features, None).backward()
    optimizer.step()
    return time.perf_counter() - began


def columns(batch: Batch) -> list[dict[str, Tensor]]:
    """Queries, positives, and a column for each negative: right-padded, as their collator makes them."""
    texts = batch.tokens.split(batch.lengths.tolist())
    places, b = batch.index.tolist(), batch.rows
    n = batch.mask.shape[1]
    rest = [places[2 * b + column :: n] for column in range(n)]
    made = []
    for column in [places[:b], places[b : 2 * b], *rest]:
        lengths = torch.tensor([len(texts[place]) for place in column])
        ids, real = rectangle(torch.cat([texts[place] for place in column]), lengths, int(lengths.max()))
        made.append({"input_ids": ids, "attention_mask": real.long()})
    return made


if __name__ == "__main__":
    main()
