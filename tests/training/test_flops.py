"""Work, counted: what a step computes against the least it could, and against the published layout.

python -m pytest -s tests/training/test_flops.py        on the meta device: exact, without noise, in seconds
"""

import numpy as np
import pytest
import torch
from meta_device import NO_MASK, forbid_autocast
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, Qwen3Config

from benchmarks.lengths import packed, padding_ratio, tuples
from model import Embedder

CONFIG = Qwen3Config(vocab_size=512, hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=4,
                     num_key_value_heads=2, head_dim=64)  # fmt: skip
GAINS = {"heavy-tailed": 7.0, "MS-MARCO-like": 3.0, "long documents": 2.4}


def counted(lengths: np.ndarray, backend: str, checkpointing: bool) -> int:
    """FLOPs of forward and backward."""
    with torch.device("meta"):
        model = Embedder(AutoModel.from_config(CONFIG), backend, checkpointing).train()
    tokens, cu_seqlens, flat = packed(lengths, 512, "meta")
    with FlopCounterMode(display=False) as counter:
        if backend == "padded":  # its mask is read on the way, which meta tensors cannot; it adds no work
            ids = torch.zeros(len(flat), int(flat.max()), dtype=torch.long, device="meta")
            model.states("sdpa", input_ids=ids, attention_mask=NO_MASK)[:, -1].sum().backward()
        else:
            model(tokens, cu_seqlens, flat).sum().backward()
    return counter.get_total_flops()


def least(lengths: np.ndarray) -> int:
    """Every linear layer on every real token, attention within each text; backward twice the forward pass."""
    c = CONFIG
    heads = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    layer = c.hidden_size * (heads + 3 * c.intermediate_size) + c.num_attention_heads * c.head_dim * c.hidden_size
    attention = 2 * c.num_attention_heads * c.head_dim * (lengths.flatten() ** 2).sum()
    return int(3 * 2 * c.num_hidden_layers * (layer * lengths.sum() + attention))


@pytest.mark.parametrize("name", GAINS)
def test_packed_work_is_the_least_and_far_below_the_published(name, monkeypatch):
    forbid_autocast(monkeypatch)
    lengths = tuples(name, 16)
    ours, published = counted(lengths, "segments", False), counted(lengths, "padded", True)
    print(f"\n{name}: padding ratio {padding_ratio(lengths):.2f}, {ours / least(lengths):.3f} x the least, "
          f"{published / ours:.2f} x below the published")  # fmt: skip
    assert 0.98 <= ours / least(lengths) <= 1.02
    assert published / ours >= GAINS[name]


def test_parts_cost_one_more_forward_pass(monkeypatch):
    forbid_autocast(monkeypatch)
    lengths = tuples("MS-MARCO-like", 8)
    with torch.device("meta"):
        model = Embedder(AutoModel.from_config(CONFIG), "segments").train()
    with FlopCounterMode(display=False) as whole:
        model(*packed(lengths, 512, "meta")).sum().backward()
    with FlopCounterMode(display=False) as parts:
        for half in np.split(lengths, 2):
            with torch.no_grad():
                model(*packed(half, 512, "meta"))
        for half in np.split(lengths, 2):
            model(*packed(half, 512, "meta")).sum().backward()
    assert parts.get_total_flops() == pytest.approx(whole.get_total_flops() * 4 / 3, rel=1e-3)
