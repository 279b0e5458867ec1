"""Texts to unit vectors, by a decoder as training wrote it: packed end to end, without padding."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from model import Embedder
from modeling.backbone import load_backbone
from modeling.packing import MULTIPLE
from modeling.pooling import cut_of, pooling_of
from modeling.tokenizer import load_tokenizer, make_encoder

TEXTS = 8192  # that are tokenised and sorted by length at once
TOKENS = 16384  # of the texts that are embedded at once, or one text


def encode(folder: Path, texts: list[str], max_length: int, bf16: bool = False) -> np.ndarray:
    """Embeddings of texts on the CPU, normalised: the dot product of two is their cosine.

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
    encoder = DecoderEncoder(folder, max_length, bf16)
    vectors = np.zeros((len(texts), encoder.width), np.float32)  # [n, d]
    with tqdm(total=len(texts), desc="encoding", unit="text", disable=None) as bar:  # None: on a terminal
        for start in range(0, len(texts), TEXTS):
            part = slice(start, start + TEXTS)
            vectors[part], _ = encoder.encode(texts[part])
            bar.update(len(vectors[part]))
    return vectors


class DecoderEncoder:
    """A causal decoder that embeds texts of all lengths in one packed row.

    Its `width` is d, the dimensions of its vectors: all of the decoder's, or those that the folder cuts them to.

    Args:
        folder, max_length, bf16: as of `encode`.
        device: where it computes.
        end: the token that ends each text; None = the tokenizer's EOS, as in training.

    Raises:
        ValueError: as `encode`.
    """

    def __init__(self, folder: Path, max_length: int, bf16: bool = False, device: str = "cpu", end: int | None = None):
        tokenizer, problems = load_tokenizer(str(folder))
        if problems:
            raise ValueError(problems[0])
        backbone = load_backbone(str(folder), torch.float32)
        self.model = Embedder(backbone, pooling=pooling_of(folder)).eval().to(device)
        self.width = cut_of(folder) or self.model.hidden_size  # d
        if bf16:
            self.model.multiple = MULTIPLE
        self.tokenize = make_encoder(tokenizer, max_length, end=end)
        self.max_length = max_length
        self.bf16 = bf16
        self.device = torch.device(device)
        self.description = "a decoder without padding"

    @torch.no_grad()
    def encode(self, texts: list[str]) -> tuple[np.ndarray, int]:
        """Unit vectors fp32 [n, d], and how many of the texts were longer than max_length."""
        vectors = np.zeros((len(texts), self.width), np.float32)
        if not texts:
            return vectors, 0
        tokens, lengths, is_cut = self.tokenize(texts)  # [T], [n], [n]
        for batch in batches_by_tokens(lengths, TOKENS):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                states = self.model(*pack(tokens, lengths, batch, self.device))  # [b, hidden size]
            vectors[batch] = F.normalize(states[:, : self.width], dim=-1).cpu().numpy()
        return vectors, int(is_cut.sum())


def batches_by_tokens(lengths: np.ndarray, max_tokens_per_forward: int) -> Iterator[np.ndarray]:
    """Texts of like length together, at most so many tokens in all, or one text: the text numbers of each batch."""
    order = np.argsort(lengths, kind="stable")
    begin = 0
    tokens = 0
    for place, text in enumerate(order):
        if place > begin and tokens + lengths[text] > max_tokens_per_forward:
            yield order[begin:place]
            begin = place
            tokens = 0
        tokens += lengths[text]
    if begin < len(order):
        yield order[begin:]


def pack(
    tokens: np.ndarray, lengths: np.ndarray, texts: np.ndarray, device: torch.device
) -> tuple[Tensor, Tensor, np.ndarray]:
    """Some of the texts that lie end to end, as `Embedder.forward` takes them.

    Args:
        tokens: [T] of all texts.
        lengths: [n] tokens of each.
        texts: [b] numbers of those that are wanted.

    Returns:
        tokens [t], cu_seqlens [b + 1], lengths [b].
    """
    ends = np.cumsum(lengths)
    wanted = np.concatenate([tokens[ends[text] - lengths[text] : ends[text]] for text in texts])
    cu_seqlens = F.pad(torch.from_numpy(lengths[texts]).cumsum(0), (1, 0)).to(torch.int32)
    return torch.from_numpy(wanted).long().to(device), cu_seqlens.to(device), lengths[texts]
