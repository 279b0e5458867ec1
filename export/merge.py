"""Merge a LoRA adapter into the base model that it names."""

from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoTokenizer

from export import model_folder
from modeling.backbone import load_backbone
from modeling.pooling import pooling_of
from utils import read_json


def merge_adapter(adapter: Path, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a plain model folder from an adapter folder and the base model that it names.

    Merging is done in fp32, whatever the base was saved in: bf16 rounds most of an adapter away.

    Args:
        dtype: of the merged weights; only fp32 keeps the vectors of the adapter.

    Raises:
        FileExistsError: there is something at `folder` already.
        FileNotFoundError: `adapter` is no adapter folder of this project.
    """
    facts = model_folder.Facts(**read_json(adapter / "f2llm.json"))
    config = PeftConfig.from_pretrained(adapter)
    base = load_backbone(config.base_model_name_or_path, torch.float32, revision=config.revision)
    merged = PeftModel.from_pretrained(base, adapter).merge_and_unload()
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    model_folder.save(folder, merged, tokenizer, facts, dtype, pooling=pooling_of(adapter))
