"""What tests of saved folders share: texts, a folder's facts, a model with adapters, and the training's own vectors.

Imported by tests only.
"""

from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F

from export.model_card import Facts
from model import Embedder
from modeling.backbone import add_lora, load_backbone
from modeling.tokenizer import make_encoder
from modeling.versions import numbers

LIMIT = 24  # tokens of a text at most
STRIPS = numbers(version("sentence-transformers")) < (5, 4)
TEXTS = ["The river is old.", "价格 — naïve café?", "one two three " * 50, "a", ""]


def facts(**changes) -> Facts:
    values = {
        "hidden_size": 32, "max_seq_length": LIMIT, "query_instruction": "Find it.", "base_model": "toy",
        "matryoshka_dims": [], "training": {"steps": 3}, "datasets": {"toy": 1234},
    }  # fmt: skip
    return Facts(**values | changes)


def make_adapted(backbone: Path):
    """A backbone with adapters that are not zero."""
    torch.manual_seed(3)
    model = add_lora(load_backbone(str(backbone), torch.float32), 4, 8, 0.1, ["q_proj", "v_proj", "down_proj"])
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.2)
    return model.eval()


def training_vectors(backbone, tokenizer, texts: list[str]) -> torch.Tensor:
    """What the training forward makes of these texts, cut to LIMIT tokens, as unit vectors."""
    tokens, lengths, _ = make_encoder(tokenizer, LIMIT)(texts)
    cu_seqlens = F.pad(torch.from_numpy(lengths).cumsum(0), (1, 0)).int()
    with torch.no_grad():
        embeddings = Embedder(backbone, "segments").eval()(torch.from_numpy(tokens).long(), cu_seqlens, lengths)
        return F.normalize(embeddings, dim=-1)


def as_sentence_transformers_reads(texts: list[str]) -> list[str]:
    """Until 5.3 it takes the white space off both ends of a text with its prompt, which ends in a space."""
    return [text.strip() for text in texts] if STRIPS else texts


def assert_same_vectors(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.std() > 0.05  # not all the same
    assert found.shape == expected.shape
    assert (found.cpu() - expected).abs().max() <= 1e-5
