"""Any embedding model as a folder: decoders run without padding, all others through Sentence Transformers.

Both have `width`, the vectors' d; `description`, for people; and encode(texts) -> (unit vectors, texts that were cut).
"""

import json
from pathlib import Path

import numpy as np
import torch

from model import choose_backend
from modeling.attention import backend_candidates
from modeling.backbone import attention_window, read_config
from modeling.packing import bucket_sizes
from modeling.tokenizer import appended_token, load_tokenizer
from modeling.versions import embedding_width
from retrieval.encode import TOKENS, DecoderEncoder
from utils import RunError, first_line, read_json

LONGEST = 1024  # tokens of a text where neither the model nor a person says less (F2LLM v1)
_PACKABLE = (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"])
_DOCUMENT_PROMPTS = ("document", "passage", "corpus")  # the first that a folder has, as Sentence Transformers does


def open_encoder(
    folder: Path, max_length: int | None = None, bf16: bool = False, device: str = "cpu"
) -> "DecoderEncoder | LibraryEncoder":
    """The model of a folder, ready to encode.

    Args:
        folder: a decoder, or a folder of Sentence Transformers.
        max_length: tokens of a text at most; None = as many as the model reads, and at most LONGEST.
        bf16: compute in bf16 under autocast.
        device: where it computes.

    Raises:
        RunError: it is neither.
    """
    encoder, reason = _open_decoder(folder, max_length, bf16, device)
    if encoder is not None:
        return encoder
    return LibraryEncoder(folder, max_length, bf16, device, reason)


def prompts_of(folder: Path) -> tuple[str, str]:
    """What a model folder wants before queries and before passages; empty where it says nothing."""
    try:
        prompts = read_json(folder / "config_sentence_transformers.json").get("prompts") or {}
    except (OSError, ValueError):
        return "", ""
    document = next((prompts[name] for name in _DOCUMENT_PROMPTS if name in prompts), "")
    return prompts.get("query") or "", document or ""


def _open_decoder(folder: Path, max_length: int | None, bf16: bool, device: str) -> tuple[DecoderEncoder | None, str]:
    """The folder as a decoder without padding; or None, and why it is not one."""
    modules = _module_names(folder)
    if modules is not None and modules not in _PACKABLE:
        return None, f"its modules are {', '.join(modules)}"
    config, problems = read_config(str(folder))
    tokenizer, tokenizer_problems = load_tokenizer(str(folder))
    if problems or tokenizer_problems:
        return None, (problems + tokenizer_problems)[0]
    end = appended_token(tokenizer)
    if modules is not None and end is None:
        return None, "its tokenizer puts more than one token around a text"
    length = max_length or min(LONGEST, _own_length(folder) or LONGEST)
    try:
        encoder = DecoderEncoder(folder, length, bf16, device, end)
    except (ValueError, OSError) as error:  # OSError: Transformers finds no weights that are safetensors
        return None, first_line(error)
    candidates = backend_candidates(
        "auto", device == "cpu", windowed=bool(attention_window(config)), equal_calls=False, half=bf16
    )
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
        problems = choose_backend(encoder.model, candidates)
    if problems:
        return None, problems[0]
    encoder.description = f"a decoder without padding ({encoder.model.backend}), texts of at most {length} tokens"
    return encoder, ""


def _module_names(folder: Path) -> list[str] | None:
    """The modules of a folder of Sentence Transformers by their class's name; None if it is not one."""
    try:
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        return [module["type"].rpartition(".")[2] for module in modules]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _own_length(folder: Path) -> int | None:
    """How many tokens of a text the folder says that its model reads."""
    for name, key in (("sentence_bert_config.json", "max_seq_length"), ("tokenizer_config.json", "model_max_length")):
        try:
            value = read_json(folder / name).get(key)
        except (OSError, ValueError, AttributeError):
            continue
        if isinstance(value, int) and value > 0:
            return value
    return None


class LibraryEncoder:
    """A folder that Sentence Transformers loads: encoders with any pooling, and what has modules of its own.

    Texts of like length go together, in rectangles of at most TOKENS tokens, padding included.

    Args:
        reason: why the folder is not a decoder, for the message if the library cannot load it either.

    Raises:
        RunError: it cannot be loaded, or the package is not installed.
    """

    def __init__(self, folder: Path, max_length: int | None, bf16: bool, device: str, reason: str):
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            raise RunError(
                f"{folder} is not a decoder ({reason}), and needs the package: pip install sentence-transformers"
            ) from None
        options = {"use_safetensors": True, "trust_remote_code": False}
        try:
            self.model = SentenceTransformer(
                str(folder), device=device, local_files_only=True, trust_remote_code=False, model_kwargs=options
            ).eval()
        except Exception as error:  # of any kind, as the folder's classes raise them
            raise RunError(
                f"{folder}: no model that can be loaded: as a decoder: {reason}; "
                f"by Sentence Transformers: {first_line(error)}"
            ) from None
        self.max_length = min(max_length or LONGEST, self.model.max_seq_length or LONGEST)
        self.model.max_seq_length = self.max_length
        self.bf16 = bf16
        self.description = f"by Sentence Transformers ({reason}), texts of at most {self.max_length} tokens"

    @property
    def width(self) -> int:
        """d."""
        return embedding_width(self.model)

    @torch.no_grad()
    def encode(self, texts: list[str]) -> tuple[np.ndarray, int]:
        """Unit vectors fp32 [n, d], and how many of the texts were longer than the model reads."""
        vectors = np.zeros((len(texts), self.width), np.float32)
        if not texts:
            return vectors, 0
        ids = self.model.tokenizer(texts, truncation=False, verbose=False)["input_ids"]
        whole = np.array([len(text) for text in ids])
        lengths = np.minimum(whole, self.max_length)  # [n]
        order = np.argsort(-lengths, kind="stable")
        sizes = bucket_sizes(lengths[order].tolist(), TOKENS)
        for batch in np.split(order, np.cumsum(sizes)[:-1]):
            vectors[batch] = self._embed([texts[text] for text in batch])
        return vectors, int((whole > self.max_length).sum())

    def _embed(self, texts: list[str]) -> np.ndarray:
        """The unit vectors of one rectangle, [b, d]. The prompt stands before the texts already."""
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bf16):
            vectors = self.model.encode(
                texts,
                prompt="",
                batch_size=len(texts),
                normalize_embeddings=True,
                convert_to_tensor=True,
                show_progress_bar=False,
            )
        return vectors.float().cpu().numpy()
