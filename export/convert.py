"""A saved model folder in another form: adapters merged, other weights' type, fewer dimensions, ONNX.

A folder is read (`read`), its facts are changed (`shortened`), and it is written (`write`, `write_onnx`). What is
written is read back and compared with the source before it gets its name.
"""

import warnings
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from export import model_folder, onnx_file, probe
from export.adapter import base_problems, load_adapter
from export.model_card import Facts
from export.saved_in import saved_in
from model import Embedder
from modeling.backbone import load_backbone, read_config, weight_problems
from modeling.pooling import cut_of, pooling_of
from modeling.tokenizer import load_tokenizer
from modeling.versions import dtype_of
from utils import aside_of, first_line, publish, read_json, remove


@dataclass(frozen=True)
class Source:
    """A model that was read from a folder, in fp32 and merged, and what it makes of the probe texts."""

    backbone: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    facts: Facts
    pooling: str
    dtype: torch.dtype  # of the weights in the folder; fp32 where an adapter was merged
    tokens: Tensor  # [T], the probe texts end to end
    cu_seqlens: Tensor  # [n + 1], where each begins
    embeddings: Tensor  # [n, d] of the model as it was trained, adapters beside the weights; not normalised


def keep_quiet() -> None:
    """For commands: leave out what Transformers and peft print by themselves, which tears their lines apart."""
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)  # peft asks


def source_problems(folder: Path) -> list[str]:
    """Why `folder` is not a model or adapter folder of this project, one line each. Loads no weights."""
    if not folder.is_dir():
        return [f"{folder}: no such folder"]
    if not (folder / "f2llm.json").is_file():
        return [f"{folder}: no f2llm.json in it; give a folder that run.py saved, as {saved_in(folder)}"]
    if is_adapter(folder):
        return base_problems(folder)
    return read_config(str(folder))[1] or weight_problems(str(folder))


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a LoRA adapter rather than a whole model."""
    return (folder / "adapter_config.json").is_file()


def read_facts(folder: Path) -> Facts:
    """What a folder says about its model.

    Raises:
        ValueError: its f2llm.json says something else.
    """
    try:
        return Facts(**read_json(folder / "f2llm.json"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'f2llm.json'}: cannot be read ({first_line(error)})") from None


def read(folder: Path) -> Source:
    """Load a model folder, or an adapter folder with its base, and embed the probe texts with it.

    Raises:
        RunError: it holds an adapter that is damaged.
        ValueError: its weights do not fit its config, its pooling or cut is not known, or it has no tokenizer.
    """
    facts = replace(read_facts(folder), hub_model_id=None)  # the folder made from this one is not on the hub
    if cut_of(folder) != facts.cut_to:
        raise ValueError(f"{folder}: modules.json cuts to {cut_of(folder)}, f2llm.json to {facts.cut_to} dimensions")
    tokenizer, problems = load_tokenizer(str(folder))
    if problems:
        raise ValueError(problems[0])
    dtype = torch.float32
    if is_adapter(folder):
        backbone = load_adapter(folder)
    else:
        dtype = dtype_of(read_config(str(folder))[0]) or torch.float32
        backbone = load_backbone(str(folder), torch.float32)
    pooling = pooling_of(folder)
    tokens, cu_seqlens = probe.probe_batch(tokenizer, facts.max_seq_length)
    with torch.no_grad():
        embedder = Embedder(backbone, "padded", pooling=pooling).eval()
        embeddings = embedder(tokens, cu_seqlens, cu_seqlens.diff().numpy())  # [n, d]
    if isinstance(backbone, PeftModel):
        backbone = backbone.merge_and_unload()
    return Source(backbone, tokenizer, facts, pooling, dtype, tokens, cu_seqlens, embeddings)


def dimension_problems(facts: Facts, dimension: int | None) -> list[str]:
    """Why embeddings cannot be cut to `dimension`, one line, or nothing. None asks for no cut."""
    width = facts.cut_to or facts.hidden_size
    if dimension is None or dimension == width:
        return []
    if not facts.matryoshka_dims:
        return [f"--dimension {dimension}: the model was trained without use_mrl, so only all {width} belong together"]
    allowed = sorted({*(dim for dim in facts.matryoshka_dims if dim <= width), width})
    if dimension in allowed:
        return []
    listed = ", ".join(str(dim) for dim in allowed)
    return [f"--dimension {dimension}: the model was trained to be cut to {listed}"]


def shortened(facts: Facts, dimension: int | None) -> Facts:
    """The facts of a folder that cuts its embeddings to `dimension`; None or the whole width change nothing."""
    if dimension is None or dimension == (facts.cut_to or facts.hidden_size):
        return facts
    dims = [dim for dim in facts.matryoshka_dims if dim <= dimension]
    return replace(facts, cut_to=dimension, matryoshka_dims=dims)


def write(source: Source, folder: Path, facts: Facts, dtype: torch.dtype) -> None:
    """Write a model folder with weights in safetensors.

    Args:
        facts: the source's, or what `shortened` made of them.
        dtype: of the weights.

    Raises:
        FileExistsError: there is something at `folder` already.
        ValueError: read back, the folder is not the source's model.
    """
    check = partial(
        probe.read_back,
        tokens=source.tokens,
        cu_seqlens=source.cu_seqlens,
        live=source.embeddings[:, : facts.cut_to],
        rounded=dtype != torch.float32,
    )
    model_folder.save(folder, source.backbone, source.tokenizer, facts, dtype, check=check, pooling=source.pooling)


def merge_adapter(adapter: Path, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a plain model folder from an adapter folder and the base model that it names.

    Args:
        dtype: of the merged weights; only fp32 keeps the vectors of the adapter.

    Raises:
        FileExistsError, RunError, ValueError: as `read` and `write`.
    """
    source = read(adapter)
    write(source, folder, source.facts, dtype)


def write_onnx(source: Source, folder: Path, facts: Facts) -> float:
    """Write a model folder with onnx/model.onnx, in fp32, in place of safetensors.

    Returns:
        The largest distance of a probe text's unit vector from the source's, alone or in a batch.

    Raises:
        FileExistsError: there is something at `folder` already.
        ValueError: the model cannot be exported, or onnxruntime makes other embeddings of it.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} already exists")
    aside = aside_of(folder)
    remove(aside)
    (aside / "onnx").mkdir(parents=True)
    path = aside / "onnx" / "model.onnx"
    onnx_file.write(path, source.backbone, source.pooling, facts.cut_to)
    model_folder.save_config(aside, source.backbone, facts)
    model_folder.save_around(aside, source.tokenizer, replace(facts, in_onnx=True), source.pooling)
    texts = source.tokens.split(source.cu_seqlens.diff().tolist())
    expected = F.normalize(source.embeddings[:, : facts.cut_to], dim=-1)  # [n, cut]
    distance = onnx_file.largest_distance(path, list(texts), expected)
    problems = probe.tokenizer_problems(aside, [text.tolist() for text in texts])
    if not distance <= probe.EXACT:  # NaN too
        problems.append(f"{path}: its embeddings differ from the source's by {distance:.1e}")
    if problems:
        raise ValueError("\n".join(problems))
    publish(folder)
    return distance
