"""A model folder: what Transformers, Sentence Transformers and the servers load as it is.

    config.json, model.safetensors            or adapter_config.json, adapter_model.safetensors under LoRA
    tokenizer.json, tokenizer_config.json     a tokenizer that appends the training's EOS itself, once
    modules.json, 1_Pooling/, 2_Normalize/    pooling and normalisation, in the layout that every reader knows;
                                              2_Dense/ and 3_Normalize/ where embeddings are cut
    sentence_bert_config.json, config_sentence_transformers.json, README.md
    f2llm.json                                what the folder says about its model, for this project

A folder is written under a temporary name and renamed when it is whole, so under its own name it is whole or absent.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import MISSING, asdict, fields
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig

from export.model_card import Facts, model_card
from modeling.pooling import DEFAULT as DEFAULT_POOLING
from modeling.prompts import query_prompt
from modeling.tokenizer import save_tokenizer
from utils import aside_of, let_others_read, publish, read_json, remove, retire, write_json

# A pooling's name in Sentence Transformers -> the boolean that stood for it before poolings had names.
_BOOLEAN_OF_POOLING = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "max": "pooling_mode_max_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}


def save(
    folder: Path,
    backbone: nn.Module,
    tokenizer,
    facts: Facts,
    dtype: torch.dtype,
    weights: dict | None = None,
    check: Callable[[Path], list[str]] | None = None,
    *,
    pooling: str = DEFAULT_POOLING,
    replace: bool = False,
) -> None:
    """Write a model folder, or an adapter folder for a PeftModel.

    Args:
        dtype: of the saved weights; adapters are small and stay in fp32.
        weights: the backbone's whole state dict where the module holds only a part; None = the module's own. It is
            emptied, so that its memory is free when `check` loads the saved weights.
        check: called on the finished temporary folder; any returned problem aborts the rename.
        pooling: what the model was trained with, a name of modeling/pooling.py.
        replace: what is at `folder` already gives way when the new folder is whole.

    Raises:
        FileExistsError: there is something at `folder` already, and it shall not give way.
        ValueError: `check` found a problem; the temporary folder stays, as .NAME.partial.
    """
    if folder.exists() and not replace:
        raise FileExistsError(f"{folder} already exists")
    aside = aside_of(folder)
    remove(aside)
    aside.mkdir(parents=True)
    if weights is None:
        weights = backbone.state_dict()
    if isinstance(backbone, PeftModel):
        _save_adapter(aside, backbone, weights)
    else:
        save_weights(aside, backbone, weights, dtype, facts.matryoshka_dims)
    save_around(aside, tokenizer, facts, pooling)
    if check is not None:
        problems = check(aside)
        if problems:
            raise ValueError("\n".join(problems))
    publish(folder)


def save_around(folder: Path, tokenizer, facts: Facts, pooling: str) -> None:
    """Write all of a model folder but config.json and the weights: tokenizer, pooling, prompts, card."""
    save_tokenizer(tokenizer, folder, facts.max_seq_length)
    if (folder / "config.json").exists():
        _name_special_tokens(folder / "config.json", tokenizer)
    write_sentence_transformers_files(folder, facts, pooling)
    let_others_read(folder)


def is_finished(folder: Path, facts: Facts) -> bool:
    """Whether `folder` is the model folder of these facts; a folder with its final name is always finished.

    Facts with a default are not compared. They do not describe what was trained, a resumed run may have others, and
    results on a GPU differ in their last digits.
    """
    path = folder / "f2llm.json"
    if not path.exists():
        return False
    trained = [f.name for f in fields(Facts) if f.default is MISSING and f.default_factory is MISSING]
    as_written = json.loads(json.dumps(asdict(facts)))  # lists for tuples, as the file has them
    found = read_json(path)
    return all(name in found and found[name] == as_written[name] for name in trained)


def remove_old(run_folder: Path, limit: int, step: int, steps_per_epoch: int) -> None:
    """Remove all model folders of a run up to a step but the newest ones.

    Folders of later steps stay: the run went back to an older state, and will come to them again.

    Args:
        limit: how many stay; 0 = all.
    """
    step_of = {}
    for path in run_folder.glob("*_*/f2llm.json"):
        kind, _, number = path.parent.name.partition("_")
        if kind in ("step", "epoch") and number.isdecimal():
            step_of[path.parent] = int(number) * (steps_per_epoch if kind == "epoch" else 1)
    up_to_now = sorted((folder for folder in step_of if step_of[folder] <= step), key=step_of.get)
    if limit:
        for folder in up_to_now[:-limit]:
            retire(folder)


def write_sentence_transformers_files(folder: Path, facts: Facts, pooling: str = DEFAULT_POOLING) -> None:
    """Pooling, normalisation, prompts and the card.

    The class paths and the pooling booleans are the long-established ones: Sentence Transformers 6 loads
    them without a warning, and vLLM, TEI and llama.cpp versions exist that know nothing newer.

    Raises:
        ValueError: Sentence Transformers has no such pooling.
    """
    if pooling not in _BOOLEAN_OF_POOLING:
        raise ValueError(f"pooling {pooling!r} is not one of Sentence Transformers': {', '.join(_BOOLEAN_OF_POOLING)}")
    names = ["Transformer", "Pooling", "Normalize"]
    if facts.cut_to is not None:
        names.insert(2, "Dense")  # before Normalize, so that what is left is a unit vector
    _write_modules(folder, names)
    _write_pooling(folder / "1_Pooling", facts.hidden_size, pooling)
    if facts.cut_to is not None:
        _write_cut(folder / "2_Dense", facts.hidden_size, facts.cut_to)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": facts.max_seq_length, "do_lower_case": False})
    prompts = {"query": query_prompt(facts.query_instruction), "document": ""}
    write_json(
        folder / "config_sentence_transformers.json",
        {"prompts": prompts, "default_prompt_name": None, "similarity_fn_name": "cosine"},
    )
    write_json(folder / "f2llm.json", asdict(facts))
    (folder / "README.md").write_text(model_card(facts, pooling), encoding="utf-8")


def copy_sentence_transformers_files(source: Path, folder: Path, hidden_size: int) -> None:
    """Pooling, normalisation and prompts of a folder that another program wrote, for a narrower decoder.

    Args:
        source: a folder in which `modules_to_cut` found no problem.
        hidden_size: of the decoder in `folder`.
    """
    for name in ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"):
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    for module in read_json(source / "modules.json"):
        if not module["path"]:
            continue  # the decoder itself
        own = folder / module["path"]
        own.mkdir()
        if (source / module["path"] / "config.json").exists():  # of normalisation there is none
            config = read_json(source / module["path"] / "config.json")
            sizes = {key: hidden_size for key in ("word_embedding_dimension", "embedding_dimension") if key in config}
            write_json(own / "config.json", config | sizes)


def modules_to_cut(source: Path) -> list[str]:
    """Why the modules of a Sentence Transformers folder cannot follow a narrower decoder, one line each."""
    if not (source / "modules.json").exists():
        return []
    try:
        modules = read_json(source / "modules.json")
        found = [(module["type"].rpartition(".")[2], module["path"]) for module in modules]
    except (ValueError, KeyError, TypeError, AttributeError):
        found = []
    if not found:
        return [f"{source / 'modules.json'}: not a list of modules"]
    problems = []
    for kind, path in found:
        if kind not in ("Transformer", "Pooling", "Normalize"):
            problems.append(
                f"{source}: its module {kind} has weights for the decoder's width: only pooling can be kept"
            )
        if path != Path(path).name:
            problems.append(f"{source / 'modules.json'}: {path!r} is not the name of a folder beside it")
    return problems


def _write_modules(folder: Path, names: list[str]) -> None:
    """modules.json: the steps from a text to its embedding, and where the settings of each lie."""
    modules = []
    for number, name in enumerate(names):
        path = f"{number}_{name}" if number else ""  # the decoder lies in the folder itself
        kind = f"sentence_transformers.models.{name}"
        modules.append({"idx": number, "name": str(number), "path": path, "type": kind})
        (folder / path).mkdir(exist_ok=True)  # also for Normalize, which has no settings: the layout has it
    write_json(folder / "modules.json", modules)


def _write_cut(folder: Path, hidden_size: int, dimension: int) -> None:
    """2_Dense/: a linear map [dimension, hidden_size] that keeps the first dimensions.

    Sentence Transformers' own `truncate_dim` cuts behind Normalize and leaves vectors shorter than one. A Dense module
    is also what vLLM and TEI read; the activation must be named, since without a name Sentence Transformers takes tanh.
    """
    config = {
        "in_features": hidden_size,
        "out_features": dimension,
        "bias": False,
        "activation_function": "torch.nn.modules.linear.Identity",
    }
    write_json(folder / "config.json", config)
    save_file({"linear.weight": torch.eye(dimension, hidden_size)}, folder / "model.safetensors")


def _write_pooling(folder: Path, hidden_size: int, pooling: str) -> None:
    """1_Pooling/config.json: the pooling in the old spelling, a boolean per pooling, and in the new one, a name."""
    config = {"word_embedding_dimension": hidden_size}
    for name, boolean in _BOOLEAN_OF_POOLING.items():
        config[boolean] = name == pooling
    config["pooling_mode"] = pooling
    config["include_prompt"] = True
    write_json(folder / "config.json", config)


def save_weights(
    folder: Path, backbone: nn.Module, weights: dict, dtype: torch.dtype, matryoshka_dims: list[int] = ()
) -> None:
    """config.json and the weights in `dtype`; `weights` is emptied, one after the other."""
    converted = {name: weights.pop(name).detach().to("cpu", dtype) for name in list(weights)}
    backbone.save_pretrained(folder, state_dict=converted)
    _complete_config(folder, dtype, matryoshka_dims)


def save_config(folder: Path, backbone: nn.Module, facts: Facts) -> None:
    """config.json alone, of a model in fp32 whose weights lie in another form."""
    backbone.config.architectures = [type(backbone).__name__]
    backbone.config.save_pretrained(folder)
    _complete_config(folder, torch.float32, facts.matryoshka_dims)


def _complete_config(folder: Path, dtype: torch.dtype, matryoshka_dims: list[int] = ()) -> None:
    """Put into config.json what readers other than Transformers 5 need.

    These are rope_theta and rope_scaling at the top level (without them Transformers 4.57 takes another base, and no
    YaRN, in silence), the true dtype, also under its old name, and the Matryoshka dimensions (vLLM serves shorter
    vectors only where they are named).
    """
    config = read_json(folder / "config.json")
    config["dtype"] = str(dtype).removeprefix("torch.")
    config["torch_dtype"] = config["dtype"]  # what Transformers until 4.55 reads and writes
    rope_parameters = config.get("rope_parameters") or {}
    if rope_parameters.get("rope_theta"):
        config["rope_theta"] = rope_parameters["rope_theta"]
        if rope_parameters.get("rope_type", "default") != "default":
            config["rope_scaling"] = {key: value for key, value in rope_parameters.items() if key != "rope_theta"}
    config.pop("matryoshka_dimensions", None)  # of the folder that this one was made from
    if matryoshka_dims:
        config["matryoshka_dimensions"] = sorted(matryoshka_dims)
    write_json(folder / "config.json", config)


def _name_special_tokens(path: Path, tokenizer) -> None:
    """Make the ids of special tokens in a config.json numbers or absent, where they are null: TEI reads no null.

    The id of padding is left out rather than named: a decoder that knows it never trains that token's embedding.
    """
    config = read_json(path)
    if config.get("eos_token_id") is None:
        config["eos_token_id"] = tokenizer.eos_token_id
    if AutoConfig.for_model(config["model_type"]).pad_token_id is None and config.get("pad_token_id") is None:
        config.pop("pad_token_id", None)
    write_json(path, config)


def _save_adapter(folder: Path, backbone: PeftModel, weights: dict) -> None:
    """adapter_config.json and the adapter's weights. A base model in a folder is named by its full path, so that the
    adapter can be loaded from anywhere."""
    backbone.save_pretrained(folder, state_dict=weights)
    weights.clear()
    config = read_json(folder / "adapter_config.json")
    base = Path(config["base_model_name_or_path"])
    if base.is_dir():
        config["base_model_name_or_path"] = str(base.resolve())
    write_json(folder / "adapter_config.json", config)
