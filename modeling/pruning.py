"""A smaller decoder out of a larger one: fewer layers, narrower residual stream, narrower MLPs (F2LLM-v2, section 3.3).

    model = first_layers(model, 8)                        depth: the first n layers and the final norm
    found = importance(model, texts)                      how strongly each unit is active on a sample of texts
    hidden = at_their_places(strongest(found.hidden, 320))
    small = keep_units(model, hidden, [strongest(one, 2048) for one in found.mlp])

One set of residual units holds for the whole decoder, since all layers add to the same stream; each layer's MLP has a
set of its own. Heads, KV heads, their size and the vocabulary stay. The report names neither the norm nor the sample.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from modeling.versions import in_dtype

NORMS = ("l2", "l1", "max")

# What the rows and the columns of a weight stand for; "own" stays whole. A bias, or a norm's weight, has rows alone.
_UNITS = {
    "embed_tokens": ("own", "hidden"),
    "input_layernorm": ("hidden", None),
    "post_attention_layernorm": ("hidden", None),
    "norm": ("hidden", None),
    "q_proj": ("own", "hidden"),
    "k_proj": ("own", "hidden"),
    "v_proj": ("own", "hidden"),
    "q_norm": ("own", None),
    "k_norm": ("own", None),
    "o_proj": ("hidden", "own"),
    "gate_proj": ("mlp", "hidden"),
    "up_proj": ("mlp", "hidden"),
    "down_proj": ("hidden", "mlp"),
}
_NORMS_OF_THE_STREAM = ("input_layernorm", "post_attention_layernorm", "norm")


@dataclass(frozen=True)
class Importance:
    """How strongly the units of a decoder are active.

    Attributes:
        hidden: fp64 [hidden_size], of the residual stream.
        mlp: of each layer, fp64 [intermediate_size].
    """

    hidden: Tensor
    mlp: list[Tensor]


def first_layers(model: PreTrainedModel, count: int) -> PreTrainedModel:
    """A decoder of the first `count` layers, with the same embeddings and final norm. Weights are copied.

    Raises:
        ValueError: it has not so many layers.
    """
    depth = model.config.num_hidden_layers
    if not 1 <= count <= depth:
        raise ValueError(f"{count} is not between 1 and {depth}, the model's layers")
    small = _empty(pruned_config(model.config, num_layers=count), model.dtype)
    weights = model.state_dict()
    small.load_state_dict({name: weights[name].clone() for name in small.state_dict()}, assign=True)
    return small


@torch.no_grad()
def importance(model: PreTrainedModel, texts: Iterable[Tensor], norm: str = "l2") -> Importance:
    """The norm of each unit's activation over all tokens of a sample.

    A residual unit is looked at behind each norm of the stream, so that every layer reads it at its own scale; the
    norms of those places are added up. A unit of an MLP is looked at where `down_proj` reads it.

    Args:
        texts: token ids of each text, int64 [length].
        norm: over tokens: "l2", "l1" or "max", the largest magnitude.

    Raises:
        ValueError: an unknown norm, or no text.
    """
    if norm not in NORMS:
        raise ValueError(f"norm {norm!r} is not one of {', '.join(NORMS)}")
    places = _Places(norm)
    hooks = []
    for name, module in model.named_modules():
        kind = name.rpartition(".")[2]
        if kind in _NORMS_OF_THE_STREAM:
            hooks.append(module.register_forward_hook(places.output_of(name)))
        elif kind == "down_proj":
            hooks.append(module.register_forward_pre_hook(places.input_of(name)))
    try:
        for tokens in texts:
            model(input_ids=tokens[None], use_cache=False)  # [1, length]: nothing is padded
    finally:
        for hook in hooks:
            hook.remove()
    if not places.totals:
        raise ValueError("no text to look at")
    totals = places.norms()
    hidden = sum(total for name, total in totals.items() if not name.endswith("down_proj"))  # [hidden_size]
    layers = range(model.config.num_hidden_layers)
    return Importance(hidden, [totals[f"layers.{layer}.mlp.down_proj"] for layer in layers])


class _Places:
    """Activations by the module that they were seen at, gathered over tokens: name -> fp64 [units]."""

    def __init__(self, norm: str):
        self.norm = norm
        self.totals: dict[str, Tensor] = {}

    def output_of(self, name: str):
        """A hook that sees what a module puts out."""

        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            self.add(name, output)

        return hook

    def input_of(self, name: str):
        """A hook that sees what a module reads."""

        def hook(module: nn.Module, inputs: tuple) -> None:
            self.add(name, inputs[0])

        return hook

    def add(self, name: str, activations: Tensor) -> None:
        """Gather the activations of one text, [1, length, units]."""
        sizes = activations.double().abs().flatten(0, 1)  # [length, units]
        if self.norm == "max":
            of_text = sizes.amax(dim=0)
        elif self.norm == "l2":
            of_text = sizes.square().sum(dim=0)
        else:
            of_text = sizes.sum(dim=0)
        if name not in self.totals:
            self.totals[name] = of_text
        elif self.norm == "max":
            self.totals[name] = torch.maximum(self.totals[name], of_text)
        else:
            self.totals[name] += of_text

    def norms(self) -> dict[str, Tensor]:
        """The norms over all tokens."""
        if self.norm == "l2":
            return {name: total.sqrt() for name, total in self.totals.items()}
        return self.totals


def strongest(values: Tensor, count: int) -> Tensor:
    """The numbers of the `count` largest values, ascending; of equal ones the first.

    Args:
        values: [units].

    Returns:
        int64 [count].

    Raises:
        ValueError: there are not so many.
    """
    if not 1 <= count <= len(values):
        raise ValueError(f"{count} is not between 1 and {len(values)}, the model's units")
    order = torch.argsort(values, descending=True, stable=True)
    return order[:count].sort().values


def at_their_places(units: Tensor) -> Tensor:
    """The same units reordered: each whose number is below their count keeps it as its place; the others fill the gaps.

    What a decoder computes does not depend on the order of its residual units. But distillation compares the student's
    unit i with the teacher's unit i, and a Matryoshka prefix is made of the first ones. So a student begins nearer to
    its teacher where as many units as possible keep their number (docs/v2.md says what that brought).

    Args:
        units: int64 [count], ascending.

    Returns:
        int64 [count].

    >>> at_their_places(torch.tensor([0, 2, 5, 7]))
    tensor([0, 5, 2, 7])
    """
    count = len(units)
    stays = units < count
    order = torch.full((count,), -1)
    order[units[stays]] = units[stays]
    order[order == -1] = units[~stays]
    return order


def keep_units(model: PreTrainedModel, hidden: Tensor, mlp: list[Tensor]) -> PreTrainedModel:
    """A decoder of these units alone.

    RMSNorm divides by the root of the mean of squares over all units. Where units are gone that were zero that mean is
    larger, so the norms' weights are multiplied by sqrt(units before / units kept): the decoder computes what it did,
    but for the norm's epsilon, which weighs less beside a larger mean.

    Args:
        hidden: int64 [kept], of the residual stream, in the order that they are to have.
        mlp: of each layer, int64 [kept], equally many.

    Raises:
        ValueError: a weight whose units are not known here.
    """
    config = pruned_config(model.config, hidden_size=len(hidden), intermediate_size=len(mlp[0]))
    weights = {}
    for name, weight in model.state_dict().items():
        layer = _layer_of(name)
        kept = {"own": None, "hidden": hidden, "mlp": None if layer is None else mlp[layer]}
        weights[name] = _cut(name, weight, kept)
    scale = math.sqrt(model.config.hidden_size / len(hidden))
    for name in weights:
        if _kind_of(name) in _NORMS_OF_THE_STREAM:
            weights[name] = weights[name] * scale
    small = _empty(config, model.dtype)
    small.load_state_dict(weights, assign=True)
    return small


def _cut(name: str, weight: Tensor, kept: dict[str, Tensor | None]) -> Tensor:
    """The rows and columns of a weight that belong to kept units, copied."""
    if _kind_of(name) not in _UNITS:
        raise ValueError(f"{name}: only the weights of Qwen3 and Llama decoders are known: {', '.join(_UNITS)}")
    rows, columns = _UNITS[_kind_of(name)]
    if kept[rows] is not None:
        weight = weight[kept[rows]]
    is_matrix = weight.dim() == 2  # a bias has rows alone
    if is_matrix and kept[columns] is not None:
        weight = weight[:, kept[columns]]
    return weight.clone()


def _kind_of(name: str) -> str:
    """What a weight belongs to: layers.3.mlp.up_proj.weight -> up_proj."""
    return name.split(".")[-2]


def _layer_of(name: str) -> int | None:
    """The layer that a weight belongs to; None for embeddings and final norm."""
    words = name.split(".")
    return int(words[1]) if words[0] == "layers" else None


def pruned_config(
    config: PretrainedConfig,
    hidden_size: int | None = None,
    intermediate_size: int | None = None,
    num_layers: int | None = None,
) -> PretrainedConfig:
    """The config of a smaller decoder; None keeps what there is.

    The size of a head is written down, since readers compute it from the hidden size where it is missing; lists with an
    entry for each layer are cut with the layers.
    """
    settings = config.to_dict()
    settings["head_dim"] = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if hidden_size is not None:
        settings["hidden_size"] = hidden_size
        if settings.get("matryoshka_dimensions"):
            narrower = [dim for dim in settings["matryoshka_dimensions"] if dim < hidden_size]
            settings["matryoshka_dimensions"] = [*narrower, hidden_size]
    if intermediate_size is not None:
        settings["intermediate_size"] = intermediate_size
    if num_layers is not None:
        settings["num_hidden_layers"] = num_layers
        if settings.get("layer_types"):
            settings["layer_types"] = settings["layer_types"][:num_layers]
        if settings.get("max_window_layers") is not None:
            settings["max_window_layers"] = min(settings["max_window_layers"], num_layers)
    return type(config).from_dict(settings)


def _empty(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A decoder whose weights are still to be assigned."""
    with torch.device("meta"):
        shell = AutoModel.from_config(config, attn_implementation="sdpa", trust_remote_code=False, **in_dtype(dtype))
    model = shell.eval()
    model.rotary_emb = type(model.rotary_emb)(config)  # its frequencies are computed, not stored
    return model
