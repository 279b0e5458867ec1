"""A LoRA adapter's folder: loaded around the base model that it names, or why that cannot be."""

import textwrap
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open

from modeling.backbone import load_backbone, read_config, weight_problems
from utils import RunError, first_line, plural, read_json

_WEIGHTS = "adapter_model.safetensors"
# What PEFT, torch and safetensors were seen to raise for files that are damaged, or of two adapters.
_REFUSALS = (KeyError, OSError, RuntimeError, SafetensorError, TypeError, ValueError)


def load_adapter(adapter: Path) -> PeftModel:
    """An adapter around the base model that it names, in fp32, whatever the base was saved in.

    bf16 would round most of an adapter away when it is merged.

    Raises:
        RunError: the adapter's files are damaged, or do not belong together.
        ValueError: the base model cannot be loaded.
    """
    try:
        saved = _saved_names(adapter / _WEIGHTS)
        config = PeftConfig.from_pretrained(adapter)
    except _REFUSALS as error:
        raise _refusal(adapter, str(error)) from error
    base = load_backbone(config.base_model_name_or_path, torch.float32, revision=config.revision)
    try:
        model = PeftModel.from_pretrained(base, adapter)
    except _REFUSALS as error:
        raise _refusal(adapter, str(error)) from error
    expected = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    if saved != expected:  # of which PEFT only warns, and leaves what is missing as it was made: zero, or drawn
        raise _refusal(adapter, _difference(saved, expected))
    return model


def _saved_names(path: Path) -> set[str]:
    """The names of the tensors in a file of safetensors."""
    if not path.is_file():  # PEFT would look for it on the hub
        raise FileNotFoundError(f"no {path.name} in it")
    with safe_open(path, framework="pt") as file:
        return set(file.keys())


def _difference(saved: set[str], expected: set[str]) -> str:
    """Which tensors are missing in the weights, or which the config does not ask for."""
    missing = sorted(expected - saved)
    if missing:
        return f"{_WEIGHTS} lacks {plural(len(missing), 'tensor')} that its config asks for, as {missing[0]}"
    spare = sorted(saved - expected)
    return f"{_WEIGHTS} has {plural(len(spare), 'tensor')} that its config does not ask for, as {spare[0]}"


def _refusal(adapter: Path, reason: str) -> RunError:
    reason = textwrap.shorten(reason, 300, placeholder=" ...")  # on one line; PEFT names every tensor
    return RunError(
        f"{adapter}: no adapter can be loaded from it ({reason}): its files are damaged, or are not those of one "
        "adapter; copy the whole folder anew"
    )


def base_problems(adapter: Path) -> list[str]:
    """Why the base model of an adapter cannot be loaded; the adapter may have been moved away from it."""
    try:
        config = read_json(adapter / "adapter_config.json")
        base = config["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        return [f"{adapter / 'adapter_config.json'}: names no base model ({first_line(error)})"]
    _, problems = read_config(str(base), config.get("revision"))
    problems = problems or weight_problems(str(base))
    return [f"the base model of {adapter}: {problem}" for problem in problems]
