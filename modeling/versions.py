"""What Transformers 4.51 to 4.57 do otherwise than 5: one keyword, and who makes masks and recomputes layers.

Everything that differs asks here; nothing else in the project looks at a version. `make test-oldest` runs the tests
with the oldest.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from modeling.attention import NAMES

_LAYERS_RECOMPUTE_THEMSELVES = find_spec("transformers.modeling_layers") is not None  # since 4.52
_DECODERS_MAKE_MASKS = find_spec("transformers.masking_utils") is None  # until 4.52
_MAJOR, _MINOR = (int(number) for number in transformers.__version__.split(".")[:2])


def in_dtype(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The keyword that `AutoModel` takes a dtype by: `torch_dtype` until 4.55."""
    return {"dtype" if (_MAJOR, _MINOR) >= (4, 56) else "torch_dtype": dtype}


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
