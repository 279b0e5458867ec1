"""One training step, ours beside the published layout and Sentence Transformers' losses: same tuples, same weights.

    python -m benchmarks.step [--rounds 2] [--tuples N]          (pip install sentence-transformers for its two rows)

Forward, losses, backward and update of one process in fp32, the fastest of several rounds, all variants in turn, on the
frozen length distributions. Sentence Transformers trains another objective (all documents of the batch are negatives of
each query) on texts padded column by column; no tokenising is timed on either side, and no compilation.
"""

import argparse
import time
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from importlib.util import find_spec
from shutil import which

import torch
from torch import Tensor, nn
from transformers import AutoModel, Qwen3Config

from benchmarks.common import TEMPERATURE, add_gradients, batch_of_shape, in_parts, measure_in_turn
from benchmarks.lengths import MEASURED, SHAPES, padding_ratio, tuples
from data.batch import Batch
from model import Embedder
from modeling.packing import rectangle
from modeling.versions import in_dtype
from training import kernels

CONFIG = Qwen3Config(
    vocab_size=16384,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
)
TUPLES = {"code search": 8, "heavy-tailed": 4, "MS-MARCO-like": 16, "long documents": 2}  # some seconds a step
PUBLISHED = "padded + checkpointing (published)"


def main() -> None:
    """Measure and print a table for each distribution."""
    usual = ", ".join(f"{count} {shape}" for shape, count in TUPLES.items())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tuples", type=int, help=f"by default {usual}")
    flags = parser.parse_args()
    for shape in (*MEASURED, *SHAPES):
        count = flags.tuples or TUPLES[shape]
        lengths = tuples(shape, count)
        print(f"\n{shape}: {count} tuples, {lengths.sum():,} tokens, padding ratio {padding_ratio(lengths):.2f}")
        batch = batch_of_shape(shape, count, CONFIG.vocab_size)
        seconds = measure_in_turn(variants(batch), flags.rounds)
        published = min(seconds[PUBLISHED])
        print(f"{'':42}{'s':>7}{'tuples/s':>10}{'speed-up':>10}")
        for name, spent in seconds.items():
            best = min(spent)
            print(f"{name:42}{best:7.2f}{count / best:10.2f}{published / best:9.1f}x", flush=True)


def variants(batch: Batch) -> dict[str, Callable[[], float]]:
    """Name -> a function that makes one step on the batch and returns its seconds."""
    table = {
        PUBLISHED: partial(our_step, batch, "padded", checkpointing=True),
        "padded": partial(our_step, batch, "padded"),
        "packed (here)": partial(our_step, batch, "segments"),
        "packed, in parts of 2,048 tokens (here)": partial(our_step, batch, "segments", max_tokens_per_forward=2048),
    }
    if which("g++"):
        table["packed, compiled (here)"] = partial(our_step, batch, "segments", compiled=True)
    if find_spec("sentence_transformers"):
        table["Sentence Transformers, plain"] = partial(their_step, batch)
        table["Sentence Transformers, cached, 16 at a time"] = partial(their_step, batch, texts_at_once=16)
    return table


def backbone() -> nn.Module:
    """A decoder with the same random weights each time."""
    torch.manual_seed(0)
    return AutoModel.from_config(deepcopy(CONFIG), **in_dtype(torch.float32))


def our_step(
    batch: Batch, backend: str, checkpointing: bool = False, max_tokens_per_forward: int = 0, compiled: bool = False
) -> float:
    """Seconds of a step of this repository.

    Args:
        max_tokens_per_forward: 0 = any number.
    """
    model = Embedder(backbone(), backend, checkpointing).train()
    if compiled:
        problems = kernels.compile_layers(model)
        assert not problems, problems
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    batch = in_parts(batch, max_tokens_per_forward)
    began = time.perf_counter()
    add_gradients(model, batch, CONFIG.hidden_size)
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


def their_step(batch: Batch, texts_at_once: int = 0) -> float:
    """Seconds of a step with Sentence Transformers' model, pooling and loss.

    Args:
        texts_at_once: texts of a forward pass of its cached loss; 0 = its plain loss.
    """
    from sentence_transformers import SentenceTransformer, losses
    from sentence_transformers.models import Pooling

    model = SentenceTransformer(modules=[Decoder(), Pooling(CONFIG.hidden_size, pooling_mode="lasttoken")]).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    scale = 1 / TEMPERATURE
    if texts_at_once:
        loss = losses.CachedMultipleNegativesRankingLoss(model, scale=scale, mini_batch_size=texts_at_once)
    else:
        loss = losses.MultipleNegativesRankingLoss(model, scale=scale)
    features = columns(batch)
    began = time.perf_counter()
    loss(features, None).backward()
    optimizer.step()
    return time.perf_counter() - began


def columns(batch: Batch) -> list[dict[str, Tensor]]:
    """Queries, positives, and a column for each negative: right-padded, as their collator makes them."""
    texts = batch.tokens.split(batch.lengths.tolist())
    numbers = batch.index.tolist()  # queries | positives | negatives, row by row
    b, n = batch.mask.shape
    members = [numbers[:b], numbers[b : 2 * b]]
    for column in range(n):
        members.append(numbers[2 * b + column :: n])
    features = []
    for column in members:
        tokens = [texts[number] for number in column]
        lengths = torch.tensor([len(text) for text in tokens])
        ids, real = rectangle(torch.cat(tokens), lengths, int(lengths.max()))  # [b, longest] both
        features.append({"input_ids": ids, "attention_mask": real.long()})
    return features


if __name__ == "__main__":
    main()
