"""Texts to unit vectors, with a model folder as training wrote it."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from model import Embedder
from modeling.backbone import load_backbone
from modeling.tokenizer import load_tokenizer, make_encoder

BATCH = 256  # texts embedded together


@torch.no_grad()
def embed(folder: Path, texts: list[str], max_length: int) -> np.ndarray:
    """Unit vectors [n, d] of a saved model folder (or a bare backbone), texts of like length together."""
    tokenizer, problems = load_tokenizer(str(folder))
    if problems:
        raise ValueError(problems[0])
    model = Embedder(load_backbone(str(folder), torch.float32)).eval()
    encode = make_encoder(tokenizer, max_length)
    order = np.argsort([len(text) for text in texts])
    vectors = np.zeros((len(texts), model.hidden_size), np.float32)
    for batch in np.array_split(order, -(-len(texts) // BATCH)):
        tokens, lengths, _ = encode([texts[i] for i in batch])
        cu_seqlens = F.pad(torch.from_numpy(lengths).cumsum(0), (1, 0)).to(torch.int32)
        states = model(torch.from_numpy(tokens).long(), cu_seqlens, lengths)  # [batch, d]
        vectors[batch] = F.normalize(states, dim=-1).numpy()
    return vectors
