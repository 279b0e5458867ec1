"""Texts to unit vectors, by a model folder as training wrote it."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import trange

from model import Embedder
from modeling.backbone import load_backbone
from modeling.packing import MULTIPLE
from modeling.pooling import pooling_of
from modeling.tokenizer import load_tokenizer, make_encoder

BATCH = 256  # texts that are embedded at once


@torch.no_grad()
def encode(folder: Path, texts: list[str], max_length: int, bf16: bool = False) -> np.ndarray:
    """Embeddings of texts, normalised: the dot product of two is their cosine.

    Args:
        folder: a model folder that training wrote, or a bare decoder with its tokenizer.
        texts: queries with their instruction, or passages, as in training; in any order and of any length.
        max_length: tokens of a text at most, EOS included; longer texts are cut.
        bf16: compute in bf16 under autocast, as training does with --mixed_precision bf16: faster where the processor
            has instructions for it, and some 1e-3 off in a cosine.

    Returns:
        fp32 [n, d], in the order of `texts`.

    Raises:
        ValueError: the folder holds no tokenizer that ends texts, no readable weights, or an unknown pooling.
    """
    tokenizer, problems = load_tokenizer(str(folder))
    if problems:
        raise ValueError(problems[0])
    model = load_embedder(folder)
    if bf16:
        model.multiple = MULTIPLE
    tokenize = make_encoder(tokenizer, max_length)
    vectors = np.zeros((len(texts), model.hidden_size), np.float32)  # [n, d]
    by_length = np.argsort([len(text) for text in texts])  # the texts of a batch are of like length
    for start in trange(0, len(texts), BATCH, desc="encoding", unit="batch", disable=None):  # None: on a terminal
        batch = by_length[start : start + BATCH]
        tokens, lengths, _ = tokenize([texts[number] for number in batch])  # [T], [batch]
        cu_seqlens = F.pad(torch.from_numpy(lengths).cumsum(0), (1, 0)).to(torch.int32)  # [batch + 1]
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            states = model(torch.from_numpy(tokens).long(), cu_seqlens, lengths)  # [batch, d]
        vectors[batch] = F.normalize(states, dim=-1).numpy()
    return vectors


def load_embedder(folder: Path) -> Embedder:
    """The model of a folder in fp32 on the CPU, pooling as it was trained to.

    Raises:
        ValueError: its weights do not fit its config, or its pooling is none that is known here.
    """
    backbone = load_backbone(str(folder), torch.float32)
    return Embedder(backbone, pooling=pooling_of(folder)).eval()
