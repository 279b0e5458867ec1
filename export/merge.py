"""Merge a LoRA adapter into the base model that it names."""

from pathlib import Path

import torch
from peft import PeftConfig, PeftModel

from modeling.backbone import load_backbone, read_config, weight_problems
from utils import first_line, read_json


def load_adapter(adapter: Path) -> PeftModel:
    """An adapter around the base model that it names, in fp32, whatever the base was saved in.

    bf16 would round most of an adapter away when it is merged.
    """
    config = PeftConfig.from_pretrained(adapter)
    base = load_backbone(config.base_model_name_or_path, torch.float32, revision=config.revision)
    return PeftModel.from_pretrained(base, adapter)


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
