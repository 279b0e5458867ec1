"""From final hidden states to one embedding for each text.

A pooling is given all states end to end and where each text begins and ends among them, so one function serves every
layout of a batch. To add one, write it here under the name that Sentence Transformers has for it
(cls, mean, max, lasttoken, ...): the model uses it (model.py), and a saved folder says so (export/model_folder.py).
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor


def last_token_pool(states: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """The state of each text's last token, EOS, which alone has seen the whole text (F2LLM report).

    Args:
        states: [N, d] final hidden states; what lies between two texts is padding.
        first, last: [n] int64, where each text's first and last token stand in `states`.

    Returns:
        [n, d].
    """
    return states[last]


POOLINGS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"lasttoken": last_token_pool}
DEFAULT = "lasttoken"  # of both reports


def pooling_of(folder: Path) -> str:
    """The pooling that a model folder was trained with; the default where it does not say.

    Raises:
        ValueError: it names one that is not known here.
    """
    path = folder / "1_Pooling" / "config.json"
    if not path.exists():
        return DEFAULT
    config = json.loads(path.read_text(encoding="utf-8"))
    name = config.get("pooling_mode")
    if name is None:  # older folders say it in booleans: pooling_mode_mean_tokens, pooling_mode_lasttoken
        chosen = [key for key, value in config.items() if key.startswith("pooling_mode_") and value]
        words = [key.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token") for key in chosen]
        name = "+".join(words) or DEFAULT
    if name not in POOLINGS:
        raise ValueError(f"{path}: pooling {name!r} is not one of {', '.join(POOLINGS)}")
    return name


def cut_of(folder: Path) -> int | None:
    """To how many of their first dimensions a model folder cuts its embeddings, before it normalises them.

    The cut is a Dense module of Sentence Transformers whose weight [cut, d] is the first rows of the identity
    (export/model_folder.py writes it).

    Returns:
        None if nothing is cut.

    Raises:
        ValueError: the folder has a Dense module that does anything else.
    """
    path = folder / "modules.json"
    if not path.exists():
        return None
    modules = json.loads(path.read_text(encoding="utf-8"))
    dense = [module for module in modules if module["type"].endswith(".Dense")]
    if not dense:
        return None
    weight = _weight_of_cut(folder / dense[0]["path"])
    if len(dense) > 1 or weight is None or not torch.equal(weight, torch.eye(*weight.shape)):
        raise ValueError(f"{path}: a Dense module that does more than cut embeddings is not known here")
    return len(weight)


def _weight_of_cut(folder: Path) -> Tensor | None:
    """The weight [cut, d] of a Dense module without bias and activation; None of any other."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config["bias"] or not config["activation_function"].endswith(".Identity"):
        return None
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return file.get_tensor("linear.weight").float()
