"""A model folder as mteb sees it: each task with its instruction, at any of its dimensions."""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_implementations.codefuse_models import f2llmv2_prompts_dict
from mteb.models.model_meta import ScoringFunction
from mteb.types import PromptType
from sentence_transformers import SentenceTransformer

from modeling.prompts import query_prompt
from modeling.versions import embedding_width, in_dtype
from tools.evaluation.kept_vectors import KeptVectors
from utils import RunError, first_line

MANY = 10_000  # texts that take long enough for a progress bar


@dataclass(frozen=True)
class Prompts:
    """Which words stand before a text.

    `published`: the instructions that F2LLM-v2 was evaluated with, which mteb holds by task and by type of task, in
    the words "Instruct: ...\\nQuery: ". Both sides of a symmetric task have the same; documents of a search have none.
    `own`: the prompts that the model folder names "query" and "document", before the two sides of a search.
    `none`: nothing.
    """

    way: str
    overrides: dict = field(default_factory=dict)  # task or type -> text, or {"query": text, "document": text}

    def by_name(self) -> dict:
        """Task, type of task or side of a search -> its instruction; a task goes before its type."""
        if self.way == "published":
            return published_instructions() | self.overrides
        return dict(self.overrides)


class FolderModel(AbsEncoder):
    """A folder of Sentence Transformers, for mteb.

    Vectors shorter than the model's are its first elements, normalised again. A text is embedded once for all
    dimensions where `kept` takes its vectors.

    Raises:
        RunError: the folder cannot be loaded.
    """

    def __init__(
        self,
        folder: Path,
        prompts: Prompts,
        revision: str,
        max_length: int | None = None,
        dtype: str = "float32",
        device: str | None = None,
        kept: KeptVectors | None = None,
    ):
        self.model = load(folder, dtype, device)
        if max_length is not None:
            self.model.max_seq_length = max_length
        self.prompts = prompts
        self.prompts_dict = prompts.by_name()
        self.width = embedding_width(self.model)
        self.dimension = self.width
        self.kept = kept
        name = f"local/{folder.resolve().name}"
        facts = {"name": name, "revision": revision, "similarity_fn_name": ScoringFunction.COSINE}
        self.full_meta = ModelMeta.create_empty(facts | {"embed_dim": self.width, "max_tokens": self.max_length})
        self.mteb_model_meta = self.full_meta

    @property
    def max_length(self) -> int | None:
        """Tokens of a text at most, EOS included."""
        return self.model.max_seq_length

    def use(self, dimension: int) -> None:
        """Embed with this many dimensions from now on; mteb files such results as an experiment."""
        self.dimension = dimension
        experiment = None if dimension == self.width else {"embed_dim": dimension}
        self.mteb_model_meta = self.full_meta.model_copy(update={"experiment_kwargs": experiment})

    def prompt(self, task_metadata, side: PromptType | None) -> str:
        """What stands before the texts of one side of a task; None is a task whose sides are alike."""
        text = self.text_before(task_metadata, side)
        return query_prompt(text) if self.prompts.way == "published" else text

    def text_before(self, task_metadata, side: PromptType | None) -> str:
        """The instruction or prompt of one side of a task. A single text that is given is not for documents."""
        given = self.prompts_dict.get(task_metadata.name, self.prompts_dict.get(task_metadata.type))
        if side == PromptType.document:
            return given.get("document", "") if isinstance(given, dict) else self.own_prompt(side)
        if given is None and self.prompts.way != "published":
            return self.own_prompt(side)
        return self.get_instruction(task_metadata, side)

    def prompts_of(self, task_metadata) -> dict[str, str]:
        """Side -> what stands before its texts."""
        if task_metadata.simplified_task_type != "retrieval":
            return {"both": self.prompt(task_metadata, None)}
        return {side.value: self.prompt(task_metadata, side) for side in PromptType}

    def long_prompts(self, tasks: list) -> list[str]:
        """Prompts that are as long as a text may be, so that the text behind them is cut away; one line each."""
        problems = []
        for metadata in (task.metadata for task in tasks):
            for prompt in set(self.prompts_of(metadata).values()):
                tokens = len(self.model.tokenizer(prompt, verbose=False)["input_ids"])
                if self.max_length is not None and tokens >= self.max_length:
                    problems.append(
                        f"{metadata.name}: {prompt!r} takes {tokens} tokens, EOS included, and texts are cut to "
                        f"{self.max_length}, so nothing of them is left: raise --max_seq_length, or give a shorter "
                        "instruction"
                    )
        return problems

    def own_prompt(self, side: PromptType | None) -> str:
        """The folder's own prompt for a side of a search where none was given; empty unless the way is `own`."""
        if self.prompts.way != "own" or side is None:
            return ""
        return self.model.prompts.get(side.value) or ""

    def encode(self, inputs, *, task_metadata, hf_split, hf_subset, prompt_type=None, **kwargs) -> np.ndarray:
        """Vectors fp32 [n, dimension] of mteb's batches of texts."""
        texts = [text for batch in inputs for text in batch["text"]]
        prompt = self.prompt(task_metadata, prompt_type)
        vectors = self.full_vectors(texts, prompt, kwargs.get("batch_size", 32))  # [n, width]
        if self.dimension == self.width:
            return vectors
        return normalised(vectors[:, : self.dimension])

    def full_vectors(self, texts: list[str], prompt: str, batch_size: int) -> np.ndarray:
        """Vectors [n, width] as the folder's modules give them, read where they were kept."""
        found = None if self.kept is None else self.kept.find([prompt, *texts])
        if found is not None:
            return found
        vectors = self.model.encode(
            texts,
            prompt=prompt,
            batch_size=batch_size,
            convert_to_tensor=True,
            show_progress_bar=sys.stderr.isatty() and len(texts) > MANY,
        )
        vectors = vectors.float().cpu().numpy()
        if self.kept is not None:
            self.kept.keep([prompt, *texts], vectors)
        return vectors


def published_instructions() -> dict[str, str]:
    """Task, type of task or side of a search -> what F2LLM-v2 was evaluated with, as mteb holds it."""
    return dict(f2llmv2_prompts_dict)


def load(folder: Path, dtype: str, device: str | None) -> SentenceTransformer:
    """The folder in Sentence Transformers; nothing is fetched.

    Raises:
        RunError: it cannot be loaded.
    """
    options = {"use_safetensors": True} | in_dtype(getattr(torch, dtype))
    try:
        return SentenceTransformer(
            str(folder), device=device, local_files_only=True, trust_remote_code=False, model_kwargs=options
        ).eval()
    except Exception as error:  # of any kind, as the folder's classes raise them
        raise RunError(f"--model {folder}: Sentence Transformers cannot load it ({first_line(error)})") from None


def normalised(vectors: np.ndarray) -> np.ndarray:
    """Rows of length 1; a row of zeros stays."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(lengths, 1e-12)
