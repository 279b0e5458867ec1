"""A model folder: what Transformers, Sentence Transformers and the servers load as it is.

    config.json, model.safetensors            or adapter_config.json, adapter_model.safetensors under LoRA
    tokenizer.json, tokenizer_config.json     a tokenizer that appends the training's EOS itself, once
    modules.json, 1_Pooling/, 2_Normalize/    last-token pooling and normalisation, in the layout every reader knows
    sentence_bert_config.json, config_sentence_transformers.json, README.md

A folder is written aside and renamed: it is whole or absent. `probe` then reads it back and compares it with
the live model; wrong pooling, a lost EOS or a silent dtype change would otherwise show only in a user's search results.
"""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from modeling.tokenizer import make_encoder, save_tokenizer
from utils import flush, remove

PROBE_TEXTS = (
    "How do I sort a list in place?",
    "Wo liegt die Quelle der Donau? 河源在哪里?",
    "one two three four five " * 4096,
)
_POOLING = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")


@dataclass(frozen=True)
class Facts:
    """What a folder must say about its model besides the weights."""

    hidden_size: int
    max_seq_length: int
    query_instruction: str
    base_model: str
    matryoshka_dims: list[int]  # empty without Matryoshka
    training: dict  # shown in the model card: hyper-parameter -> value
    datasets: dict  # shown in the model card: dataset -> training tuples


def save(
    folder: Path,
    backbone: nn.Module,
    tokenizer,
    facts: Facts,
    dtype: torch.dtype,
    weights: dict | None = None,
    check: Callable[[Path], list[str]] | None = None,
) -> None:
    """Write a model folder, or an adapter folder for a PeftModel.

    Args:
        dtype: of the saved weights; adapters are small and stay in fp32.
        weights: the backbone's whole state dict where the module holds only a part; None = the module's own.
        check: is given the folder before it gets its name; what it finds wrong keeps the folder from it.

    Raises:
        FileExistsError: there is something at `folder` already.
        ValueError: `check` found something; what was written stays aside, as .NAME.partial.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists already")
    aside = folder.with_name(f".{folder.name}.partial")
    remove(aside)
    aside.mkdir(parents=True)
    weights = backbone.state_dict() if weights is None else weights
    if isinstance(backbone, PeftModel):
        backbone.save_pretrained(aside, state_dict=weights)
        _complete_adapter_config(aside / "adapter_config.json")
    else:
        weights = {name: weight.detach().to("cpu", dtype) for name, weight in weights.items()}
        backbone.save_pretrained(aside, state_dict=weights)
        _complete_config(aside / "config.json", dtype, facts)
    save_tokenizer(tokenizer, aside, facts.max_seq_length)
    write_sentence_transformers_files(aside, facts)
    _let_others_read(aside)
    if problems := check(aside) if check else []:
        raise ValueError("\n".join(problems))
    for path in [*aside.rglob("*"), aside]:
        flush(path)
    os.replace(aside, folder)
    flush(folder.parent)


def holds(folder: Path, facts: Facts) -> bool:
    """Whether `folder` is the finished model folder of these facts."""
    path = folder / "f2llm.json"
    return path.exists() and json.loads(path.read_text(encoding="utf-8")) == json.loads(json.dumps(asdict(facts)))


def write_sentence_transformers_files(folder: Path, facts: Facts) -> None:
    """Pooling, normalisation, prompts and the card.

    The class paths and the pooling booleans are the long-established ones: Sentence Transformers 6 loads
    them without a warning, and vLLM, TEI and llama.cpp versions exist that know nothing newer.
    """
    package = "sentence_transformers.models"
    parts = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
    _write_json(
        folder / "modules.json",
        [{"idx": i, "name": str(i), "path": path, "type": f"{package}.{name}"} for i, (name, path) in enumerate(parts)],
    )
    for _, path in parts[1:]:
        (folder / path).mkdir()
    booleans = {f"pooling_mode_{mode}": mode == "lasttoken" for mode in _POOLING}
    _write_json(
        folder / "1_Pooling" / "config.json",
        {
            "word_embedding_dimension": facts.hidden_size,
            **booleans,
            "pooling_mode": "lasttoken",
            "include_prompt": True,
        },
    )
    _write_json(folder / "sentence_bert_config.json", {"max_seq_length": facts.max_seq_length, "do_lower_case": False})
    _write_json(
        folder / "config_sentence_transformers.json",
        {
            "prompts": {"query": query_prompt(facts.query_instruction), "document": ""},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    )
    _write_json(folder / "f2llm.json", asdict(facts))
    (folder / "README.md").write_text(_card(facts), encoding="utf-8")


def query_prompt(instruction: str) -> str:
    """What stands before a query's text in training and in use; passages have none."""
    return f"Instruct: {instruction}\nQuery: " if instruction else ""


def merge_adapter(adapter: Path, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a plain model folder from an adapter folder and the base model it names.

    Merging is done in fp32, whatever the base was saved in: bf16 rounds most of an adapter away. `dtype` is that of
    the merged weights; only fp32 keeps the vectors of the adapter.

    Raises:
        FileExistsError: there is something at `folder` already.
        FileNotFoundError: `adapter` is no adapter folder of this project.
    """
    facts = Facts(**json.loads((adapter / "f2llm.json").read_text(encoding="utf-8")))
    base = _load(PeftConfig.from_pretrained(adapter).base_model_name_or_path, torch.float32)
    merged = PeftModel.from_pretrained(base, adapter).merge_and_unload()
    save(folder, merged, AutoTokenizer.from_pretrained(adapter), facts, dtype)


# ------------------------------------------------------------------------------------------ probe


def probe_batch(tokenizer, max_seq_length: int) -> tuple[Tensor, Tensor]:
    """The probe texts as training has them: tokens int64 [T] and cu_seqlens int32 [n + 1]; the last one is cut.

    It is cut to 64 tokens at most: cutting is the same at any length, and a 14B model is read back on the CPU.
    """
    tokens, lengths, _ = make_encoder(tokenizer, min(max_seq_length, 64))(list(PROBE_TEXTS))
    return torch.from_numpy(tokens).long(), F.pad(torch.from_numpy(lengths).cumsum(0), (1, 0)).to(torch.int32)


def probe(folder: Path, tokens: Tensor, cu_seqlens: Tensor, live: Tensor, tolerance: float) -> list[str]:
    """Read a saved folder back and list what differs from training, one line each.

    Args:
        tokens, cu_seqlens: from `probe_batch`.
        live: [n, d] the live model's embeddings of them, not normalised.
        tolerance: the largest difference between unit vectors to accept.
    """
    expected = [part.tolist() for part in tokens.cpu().split(cu_seqlens.diff().tolist())]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    longest = max(map(len, expected))
    ids = [tokenizer(text, truncation=True, max_length=longest)["input_ids"] for text in PROBE_TEXTS]
    problems = [
        f"{folder}: its tokenizer gives other ids for {text[:30]!r}: {_first_difference(got, want)}"
        for text, got, want in zip(PROBE_TEXTS, ids, expected, strict=True)
        if got != want
    ]
    model = _load(str(folder), torch.float32).eval()
    with torch.no_grad():
        states = [
            model(input_ids=torch.tensor([text]), use_cache=False).last_hidden_state[0].float() for text in expected
        ]
        changed = (
            model(input_ids=torch.tensor([expected[0][:-1] + expected[1][:1]]), use_cache=False)
            .last_hidden_state[0]
            .float()
        )
    saved = F.normalize(torch.stack([state[-1] for state in states]), dim=-1)
    difference = (saved - F.normalize(live.float().cpu(), dim=-1)).norm(dim=-1).max().item()
    if not difference <= tolerance:  # also true for NaN
        problems.append(
            f"{folder}: its embeddings differ from the live model's by {difference:.1e}, more than {tolerance:.0e}"
        )
    if not (changed[0] - states[0][0]).norm() <= 1e-2 * states[0][0].norm():  # also true for NaN
        problems.append(f"{folder}: changing the last token moves the first state: the saved model is not causal")
    return problems


def _first_difference(got: list[int], want: list[int]) -> str:
    pairs = enumerate(zip(got, want, strict=False))
    place = next((i for i, (a, b) in pairs if a != b), min(len(got), len(want)))
    shown = [str(ids[place]) if place < len(ids) else "nothing" for ids in (got, want)]
    return f"at place {place} {shown[0]}, in training {shown[1]}; {len(got)} tokens, in training {len(want)}"


def _load(path: str, dtype: torch.dtype | str) -> nn.Module:
    return AutoModel.from_pretrained(path, dtype=dtype, use_safetensors=True, trust_remote_code=False)


# ------------------------------------------------------------------------------------------ files


def _complete_config(path: Path, dtype: torch.dtype, facts: Facts) -> None:
    """What readers need beside Transformers 5: rope_theta at the top level (4.57 takes another base in silence
    without), the true dtype, and the Matryoshka dimensions (vLLM serves shorter vectors only where they are named)."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    if theta := (config.get("rope_parameters") or {}).get("rope_theta"):
        config["rope_theta"] = theta
    if facts.matryoshka_dims:
        config["matryoshka_dimensions"] = sorted(facts.matryoshka_dims)
    _write_json(path, config)


def _let_others_read(folder: Path) -> None:
    """The permissions that any new file would have: safetensors writes files for their owner alone."""
    os.umask(mask := os.umask(0))
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o666 & ~mask)


def _complete_adapter_config(path: Path) -> None:
    """A base model in a folder by its full path: the adapter is loaded from anywhere."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if (base := Path(config["base_model_name_or_path"])).is_dir():
        config["base_model_name_or_path"] = str(base.resolve())
    _write_json(path, config)


def _write_json(path: Path, value: dict | list) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _card(facts: Facts) -> str:
    """The model card."""
    training = "\n".join(f"| {key} | {value} |" for key, value in facts.training.items())
    datasets = "\n".join(f"| {name} | {rows:,} |" for name, rows in facts.datasets.items())
    prefixes = ", ".join(map(str, sorted(facts.matryoshka_dims)[:-1]))
    shorter = f"\nThe first {prefixes} dimensions are embeddings of their own; normalise them again after cutting.\n"
    return f"""---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags: [sentence-transformers, feature-extraction, f2llm]
base_model: {json.dumps(facts.base_model)}
---

# Text embeddings from {facts.base_model}

{facts.hidden_size} dimensions, at most {facts.max_seq_length} tokens, cosine similarity, last-token pooling.
The tokenizer appends the EOS itself; do not append another.

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("path/to/this/folder")
queries = model.encode_query(["..."])       # adds: {query_prompt(facts.query_instruction)!r}
documents = model.encode_document(["..."])  # adds nothing
print(model.similarity(queries, documents))
```
{shorter if prefixes else ""}
## Training

| | |
|---|---|
{training}

| dataset | training tuples |
|---|---|
{datasets}
"""
