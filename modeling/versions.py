"""Where the oldest supported packages differ from the newest: nothing else in the project looks at a version.

They differ in a few names, and in Transformers in who makes masks and whether the decoder or its layers recompute
activations. `make test-oldest` runs the tests with the oldest.
"""

from collections.abc import Callable
from importlib import import_module, metadata
from importlib.util import find_spec

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from modeling.attention import NAMES

_LAYERS_RECOMPUTE_THEMSELVES = find_spec("transformers.modeling_layers") is not None  # since 4.52
_DECODERS_MAKE_MASKS = find_spec("transformers.masking_utils") is None  # until 4.52
OLDEST = {"transformers": (4, 51), "accelerate": (1, 10), "peft": (0, 15)}  # the bounds of requirements.txt


def numbers(version: str) -> tuple[int, int]:
    """The first two numbers of a version: "4.51.3" -> (4, 51)."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def too_old(installed: Callable[[str], str] = metadata.version) -> list[str]:
    """A line for each package that is older than the oldest supported version.

    Args:
        installed: package -> its version.
    """
    lines = []
    for package, oldest in OLDEST.items():
        found = installed(package)
        if numbers(found) < oldest:
            wanted = ".".join(map(str, oldest))
            lines.append(f"{package} {found}: {wanted} or newer is needed: pip install -U -r requirements.txt")
    return lines


_TRANSFORMERS = numbers(transformers.__version__)
_DTYPE = "dtype" if _TRANSFORMERS >= (4, 56) else "torch_dtype"


def in_dtype(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The keyword that `AutoModel` takes a dtype by."""
    return {_DTYPE: dtype}


def dtype_of(config: PretrainedConfig) -> torch.dtype | None:
    """What a config says that the weights are saved in."""
    return getattr(config, _DTYPE, None)


def settings_of(config: PretrainedConfig) -> dict:
    """What a config says that not every config says, in the words of Transformers 5, whichever version has read it.

    Before 5.0 rope's settings stand in two keys, and one that a newer version wrote is there and not looked at. In
    4.51 the kinds of Qwen's layers have no key: they follow from max_window_layers.
    """
    settings = config.to_diff_dict()
    if "rope_theta" in settings:
        settings["rope_parameters"] = _rope_of(settings.pop("rope_theta"), settings.pop("rope_scaling", None))
    if settings.get("model_type") in ("qwen2", "qwen3") and "layer_types" not in settings:
        if not settings.get("use_sliding_window"):
            settings["sliding_window"] = None
        settings["layer_types"] = _layer_types(settings)
    return settings


def rope_problem(config: PretrainedConfig, version: tuple[int, int] = _TRANSFORMERS) -> str | None:
    """Why this Transformers would silently run a different model than a config describes; None if it would not.

    Until 5.0 it ignores rope's settings as 5 writes them; folders of this project have both ways.

    Args:
        version: of Transformers.
    """
    written = getattr(config, "rope_parameters", None) or {}
    if version >= (5, 0) or "rope_theta" not in written:
        return None
    read = _rope_of(config.rope_theta, config.rope_scaling)
    if all(read[name] == written.get(name, read[name]) for name in ("rope_theta", "rope_type")):
        return None
    return (
        f"Transformers 5 has written its config.json, and {transformers.__version__} ignores the rope_parameters "
        "there, which makes it a different model: pip install -U transformers"
    )


def _rope_of(theta: float, scaling: dict | None) -> dict:
    """The settings of rope that stand in two keys until 5.0, in one as since then."""
    scaling = scaling or {}
    return scaling | {"rope_theta": theta, "rope_type": scaling.get("rope_type", scaling.get("type", "default"))}


def _layer_types(settings: dict) -> list[str]:
    """The kind of attention of each layer of Qwen 2 and 3: the first max_window_layers see the whole text."""
    layers = settings["num_hidden_layers"]
    whole = layers
    if settings["sliding_window"] is not None:
        whole = min(settings["max_window_layers"], layers)
    return ["full_attention"] * whole + ["sliding_attention"] * (layers - whole)


def set_attention(decoder: PreTrainedModel, name: str) -> None:
    """Have a decoder attend by the function of this name.

    Until 4.52 a decoder makes a mask [1, 1, T, T + 1] for any function that it does not know. Ours are given the
    lengths of the texts and refuse a mask, which would be of no use and of quadratic size.
    """
    if hasattr(decoder, "set_attn_implementation"):  # since 4.54
        decoder.set_attn_implementation(name)
    else:
        decoder.config._attn_implementation = name
    if not _DECODERS_MAKE_MASKS:
        return
    vars(decoder).pop("_update_causal_mask", None)  # the method of its class comes back
    if name in NAMES.values():
        decoder._update_causal_mask = lambda mask, *_, **__: mask


def layers_of(model: nn.Module, decoder: PreTrainedModel) -> list[nn.Module]:
    """The layers that activations can be recomputed of, in their order."""
    if _LAYERS_RECOMPUTE_THEMSELVES:
        kind = import_module("transformers.modeling_layers").GradientCheckpointingLayer
        return [part for part in model.modules() if isinstance(part, kind)]
    names = set(decoder._no_split_modules or [])
    return [part for part in model.modules() if names & {kind.__name__ for kind in type(part).__mro__}]


def let_layers_choose(decoder: PreTrainedModel) -> None:
    """Recompute only the layers whose `gradient_checkpointing` is true, once the decoder recomputes its layers.

    In 4.51 the decoder recomputes all of its layers or none; since then each layer looks at its own attribute.
    """
    if _LAYERS_RECOMPUTE_THEMSELVES:
        return
    recompute = decoder._gradient_checkpointing_func

    def by_layer(call: Callable, *inputs):
        layer = getattr(call, "func", call).__self__  # of layer.__call__, or of a partial of it
        if layer.gradient_checkpointing:
            return recompute(call, *inputs)
        return call(*inputs)

    decoder._gradient_checkpointing_func = by_layer


def embedding_width(model) -> int:
    """d of a SentenceTransformer, whose method for it has another name in 5.0."""
    ask = getattr(model, "get_embedding_dimension", None) or model.get_sentence_embedding_dimension
    return ask()
