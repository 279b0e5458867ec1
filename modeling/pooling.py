"""From final hidden states to one embedding for each text.

A pooling is given all states end to end and where each text begins and ends among them, so one function serves every
layout of a batch. To add one, write it here under the name that Sentence Transformers has for it
(cls, mean, max, lasttoken, ...): the model uses it (model.py), and a saved folder says so (export/model_folder.py).
"""

import json
from collections.abc import Callable
from pathlib import Path

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
        raise ValueError(f"{path}: pooling {name!r} is none of {', '.join(POOLINGS)}")
    return name
