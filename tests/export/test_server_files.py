"""What the servers that no test here can start look for in a folder's files, each by its own way of reading them.

    python -m pytest tests/export/test_server_files.py

The keys are those that vLLM, text-embeddings-inference (TEI), SGLang and llama.cpp read in versions of 2025 and 2026,
by their sources; docs/serving.md says how to start them. A server that does run here is asked in
tests/serving/test_server.py.
"""

import json
from importlib.metadata import version
from pathlib import Path

import gguf
import pytest
import torch
from model_folders import LIMIT, facts
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer

from export import model_folder
from modeling.backbone import load_backbone
from modeling.versions import numbers

# The only types of modules that TEI has; one that it has not makes it ignore the whole file.
TEI_MODULES = [f"sentence_transformers.models.{name}" for name in ("Transformer", "Pooling", "Dense", "Normalize")]
# Of TEI's config of a Qwen3: key -> what its type takes. A missing key or null makes it refuse the model.
TEI_QWEN3 = {
    "attention_bias": bool, "vocab_size": int, "hidden_size": int, "intermediate_size": int, "num_hidden_layers": int,
    "num_attention_heads": int, "num_key_value_heads": int, "hidden_act": str, "max_position_embeddings": int,
    "rms_norm_eps": float, "rope_theta": float, "use_sliding_window": bool, "eos_token_id": int, "model_type": str,
    "architectures": list,
}  # fmt: skip


@pytest.fixture(scope="module", params=["full", "cut"])
def folder(request, toy_world, tokenizer, tmp_path_factory) -> Path:
    """A model folder, whole or cut to 8 dimensions."""
    path = tmp_path_factory.mktemp("server_files") / request.param
    backbone = load_backbone(str(toy_world.backbone), torch.float32)
    changes = {"matryoshka_dims": [8, 16, 32]}
    if request.param == "cut":
        changes = {"matryoshka_dims": [8], "cut_to": 8}
    model_folder.save(path, backbone, tokenizer, facts(**changes), torch.float32)
    return path


def read(folder: Path, name: str):
    return json.loads((folder / name).read_text())


def modules(folder: Path) -> dict[str, dict]:
    """Last word of a module's type -> its entry of modules.json."""
    return {module["type"].rpartition(".")[2]: module for module in read(folder, "modules.json")}


def test_vllm_pooling(folder):
    """get_pooling_config: modules.json by exact type, the pooling's folder by `path`, one true boolean by its name."""
    found = modules(folder)
    assert found["Pooling"]["type"] == "sentence_transformers.models.Pooling"
    pooling = read(folder, found["Pooling"]["path"] + "/config.json")
    assert [name for name, on in pooling.items() if name.startswith("pooling_mode_") and on is True] == [
        "pooling_mode_lasttoken"
    ]
    assert found["Normalize"]["type"] == "sentence_transformers.models.Normalize"  # switches normalisation on


def test_vllm_length_and_prompts(folder):
    """get_sentence_transformer_tokenizer_config wants both keys; /v2/embed takes `input_type` from the prompts."""
    assert read(folder, "sentence_bert_config.json").keys() >= {"max_seq_length", "do_lower_case"}
    assert read(folder, "config_sentence_transformers.json")["prompts"].keys() == {"query", "document"}


def test_vllm_dimensions(folder):
    """A request's `dimensions` must stand in config.json's matryoshka_dimensions, and be no more than are served."""
    served = 8 if folder.name == "cut" else 32
    assert max(read(folder, "config.json")["matryoshka_dimensions"]) == served


def test_vllm_architecture(folder):
    """`architectures` ...Model makes it an embedding model without a flag; its weights are named without `model.`"""
    assert read(folder, "config.json")["architectures"] == ["Qwen3Model"]
    names = load_file(folder / "model.safetensors").keys()
    assert {name.partition(".")[0] for name in names} == {"layers", "embed_tokens", "norm"}


def test_vllm_and_tei_cut(folder):
    """_load_st_projector and DenseConfig: the type, the sizes, no bias, an activation both know, linear.weight."""
    found = modules(folder)
    if folder.name == "full":
        assert "Dense" not in found
        return
    assert found["Dense"]["type"] == "sentence_transformers.models.Dense"
    assert found["Dense"]["idx"] < found["Normalize"]["idx"]
    assert read(folder, found["Dense"]["path"] + "/config.json") == {
        "in_features": 32,
        "out_features": 8,
        "bias": False,
        "activation_function": "torch.nn.modules.linear.Identity",
    }
    weights = load_file(folder / found["Dense"]["path"] / "model.safetensors")
    assert list(weights) == ["linear.weight"]
    assert torch.equal(weights["linear.weight"], torch.eye(32)[:8])


def test_tei_config(folder):
    """ModelConfig and Qwen3Config: every key is there and of its type; pad_token_id may be missing, never null."""
    config = read(folder, "config.json")
    wrong = {key: config.get(key) for key, kind in TEI_QWEN3.items() if type(config.get(key)) is not kind}
    assert wrong == {}
    assert config.get("pad_token_id", 0) is not None
    assert config["use_sliding_window"] is False  # TEI refuses such a Qwen3


def test_tei_modules_pooling_and_prompts(folder):
    """ModuleType, PoolConfig at a fixed path, STConfig.max_seq_length, NewSTConfig.prompts, which are all texts."""
    assert [module["type"] for module in read(folder, "modules.json") if module["type"] not in TEI_MODULES] == []
    pooling = read(folder, "1_Pooling/config.json")
    assert pooling["pooling_mode_lasttoken"] is True
    for name in ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens"):
        assert pooling[f"pooling_mode_{name}"] is False  # all but one without a default in older versions
    assert read(folder, "sentence_bert_config.json")["max_seq_length"] == LIMIT
    assert all(isinstance(text, str) for text in read(folder, "config_sentence_transformers.json")["prompts"].values())


def test_tei_tokenizer(folder, tokenizer):
    """Tokenizer::from_file, and truncation, after which EOS is still the last token."""
    found = Tokenizer.from_file(str(folder / "tokenizer.json"))
    found.enable_truncation(LIMIT)
    for text in ("a", "one two three " * 50):
        ids = found.encode(text).ids
        assert ids[-1] == tokenizer.eos_token_id
        assert ids.count(tokenizer.eos_token_id) == 1
        assert len(ids) <= LIMIT


def test_sglang_weights(folder):
    """Qwen3ForCausalLM.load_weights adds `model.` to names that begin so (before its PR 17535 only in a folder whose
    path has "Embedding" in it)."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert all(name.startswith(("layers.", "embed_tokens.", "norm.")) for name in file.keys())  # noqa: SIM118
    assert read(folder, "config.json")["model_type"] == "qwen3"


def test_llama_cpp_pooling(folder):
    """_try_set_pooling_type: the exact old type before 2026, and three booleans that must be there."""
    found = modules(folder)["Pooling"]
    assert found["type"] == "sentence_transformers.models.Pooling"
    pooling = read(folder, found["path"] + "/config.json")
    assert not pooling["pooling_mode_mean_tokens"]
    assert not pooling["pooling_mode_cls_token"]
    assert pooling["pooling_mode_lasttoken"]


@pytest.mark.skipif(numbers(version("gguf")) < (0, 19), reason="gguf before 0.19 does not look at the post-processor")
def test_llama_cpp_appends_eos(folder, toy_world, tokenizer):
    """The package gguf, llama.cpp's own reader of tokenizers: add_eos_token, taken from the post-processor."""
    found = gguf.SpecialVocab(folder, load_merges=True)
    assert found.special_token_ids["eos"] == tokenizer.eos_token_id
    assert found.add_special_token["eos"] is True
    assert found.merges
    assert "eos" not in gguf.SpecialVocab(toy_world.backbone).add_special_token  # the decoder's tokenizer has it not
