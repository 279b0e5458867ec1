"""A decoder with its pooling as an ONNX file, and what onnxruntime makes of it.

The file's inputs are `input_ids` and `attention_mask`, [n, L] int64, padded on the right; its outputs
`last_hidden_state` [n, L, d], for readers with a pooling of their own, and `sentence_embedding` [n, cut]: pooled, cut
and normalised. n and L may be anything.
"""

import contextlib
import io
import logging
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from modeling.pooling import POOLINGS
from modeling.versions import set_attention
from utils import first_line

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OUTPUTS = ("last_hidden_state", "sentence_embedding")


def missing_packages() -> list[str]:
    """The packages for ONNX that are not installed."""
    return [name for name in PACKAGES if find_spec(name) is None]


class _Graph(nn.Module):
    """What is exported: padded texts to their final states and to unit vectors."""

    def __init__(self, backbone: PreTrainedModel, pooling: str, cut: int | None):
        super().__init__()
        self.backbone = backbone
        self.pool = POOLINGS[pooling]
        self.cut = cut

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """[n, L] both -> [n, L, d], [n, cut]."""
        states = self.backbone(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state  # [n, L, d]
        first = torch.arange(states.shape[0]) * states.shape[1]  # [n], among the states of all texts
        last = first + attention_mask.sum(1) - 1
        pooled = self.pool(states.flatten(0, 1), first, last)[:, : self.cut]  # [n, cut]
        return states, F.normalize(pooled, dim=-1)


def write(path: Path, backbone: PreTrainedModel, pooling: str, cut: int | None) -> None:
    """Write `path`, and the weights beside it in NAME.data: one file of ONNX holds 2 GB at most.

    Args:
        backbone: in fp32 on the CPU; its attention is set to sdpa.
        pooling: name in modeling.pooling.POOLINGS.
        cut: to how many dimensions `sentence_embedding` is cut; None = to none.

    Raises:
        ValueError: torch cannot export this decoder.
    """
    set_attention(backbone, "sdpa")
    ids = torch.arange(10).reshape(2, 5)
    any_size = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    try:
        with torch.no_grad(), _quiet():
            exported = torch.export.export(
                _Graph(backbone, pooling, cut).eval(), (), inputs, dynamic_shapes=dict.fromkeys(inputs, any_size)
            )
            torch.onnx.export(
                exported,
                (),
                path,
                input_names=list(inputs),
                output_names=list(OUTPUTS),
                external_data=True,
                dynamo=True,
                verbose=False,
            )
    except (RuntimeError, TypeError, ValueError) as error:  # what torch raises for an operator it has no ONNX for
        raise ValueError(f"torch cannot export this decoder to ONNX ({first_line(error)})") from error


@contextlib.contextmanager
def _quiet():
    """Without the exporter's notes on packages that are not there and on what it will do otherwise some day."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)


def largest_distance(path: Path, texts: list[Tensor], expected: Tensor) -> float:
    """How far onnxruntime's unit vectors are from the expected ones at most: each text alone, and all as one batch.

    Args:
        texts: token ids [L] of each.
        expected: [n, d] unit vectors.
    """
    session = open_session(path)
    lengths = [len(text) for text in texts]
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]  # [n, L]
    batch = nn.utils.rnn.pad_sequence(texts, batch_first=True)  # [n, L]; a pad is any id
    found = [embed(session, text[None].numpy(), np.ones((1, len(text)), np.int64)) for text in texts]
    alone = np.concatenate(found)  # [n, d]
    together = embed(session, batch.numpy(), mask.long().numpy())  # [n, d]
    distances = [np.linalg.norm(vectors - expected.numpy(), axis=1).max() for vectors in (alone, together)]
    return float(np.max(distances))  # not Python's max, which may lose NaN


def open_session(path: Path):
    """An onnxruntime.InferenceSession on the CPU."""
    import onnxruntime

    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def embed(session, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The unit vectors [n, cut] of padded texts [n, L]."""
    (vectors,) = session.run(["sentence_embedding"], {"input_ids": ids, "attention_mask": mask})
    return vectors
