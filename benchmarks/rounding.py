"""By how much two right ways of computing embeddings in bf16 differ, for the limits in modeling/rounding.py.

    python -m benchmarks.rounding [--model models/smollm2] [--draws 50]

Packed texts, and each text alone, are compared with each text alone in fp32, over draws of made-up token ids. By what
factor are the packed texts further off? By the norm over the first three texts, by the median of twelve, and in the
worst of twelve. The model is SmolLM2-135M with all its layers unless another is given; it is made where it is missing.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from examples.models.smollm2 import make_backbone
from model import Embedder
from modeling.backbone import load_backbone
from modeling.rounding import FAR, TEXTS, WORSE, distances_of_texts

THREE = 3


def main() -> None:
    """Print the largest factor of all draws, by each statistic."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/smollm2"))
    parser.add_argument("--draws", type=int, default=50)
    flags = parser.parse_args()
    if not flags.model.exists():
        make_backbone(flags.model)
    embedder = Embedder(load_backbone(str(flags.model), torch.float32)).eval()
    factors = [factors_of_draw(embedder, seed) for seed in range(flags.draws)]
    limits = (("norm over three texts", WORSE), ("median of twelve", WORSE), ("worst of twelve", FAR))
    for (name, limit), column in zip(limits, np.array(factors).T, strict=True):
        above = int((column > limit).sum())
        print(f"{name:24}{np.median(column):6.2f} in the middle{column.max():6.2f} at most", end="")
        print(f", above {limit} in {above} of {flags.draws} draws")


@torch.no_grad()
def factors_of_draw(embedder: Embedder, seed: int) -> tuple[float, float, float]:
    """How many times as far as the texts alone the packed ones are from fp32, by three statistics."""
    vocabulary = embedder.decoder().config.vocab_size
    tokens = torch.randint(vocabulary, (sum(TEXTS),), generator=torch.Generator().manual_seed(seed))
    ends = np.cumsum(TEXTS)
    starts = torch.tensor([0, *ends], dtype=torch.int32)
    texts = tokens.split(list(TEXTS))
    exact = embed_alone(embedder, texts)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        alone = embed_alone(embedder, texts)
        packed = embedder(tokens, starts, np.array(TEXTS))
    found, usual = packed[1:], alone[1:]  # the first is beside the others only
    by_norm = [float((way[:THREE] - exact[1 : 1 + THREE]).norm()) for way in (found, usual)]
    ours, theirs = (distances_of_texts(way, exact[1:]) for way in (found, usual))
    medians = float(ours.median() / theirs.median())
    return by_norm[0] / by_norm[1], medians, float(ours.max() / theirs.max())


def embed_alone(embedder: Embedder, texts: tuple[Tensor, ...]) -> Tensor:
    """[n, d]: each text in a pass of its own, by Transformers' own attention."""
    return torch.cat([embedder.states("sdpa", input_ids=text[None])[0, -1:].float() for text in texts])


if __name__ == "__main__":
    main()
