"""The decoder on disk: what of it fits the data, how it is loaded, and LoRA adapters around it.

A folder and a hub id are the same to everything here. Safetensors only, no remote code.
"""

import json
from pathlib import Path

import torch
from peft import LoraConfig, TaskType, get_peft_model
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from modeling.attention import is_packed
from modeling.hub import loading_options, not_found
from modeling.versions import in_dtype, rope_problem
from utils import first_line

_INDEX = "model.safetensors.index.json"


def check_backbone(
    path: str,
    max_token_id: int,
    max_seq_length: int,
    backend: str,
    lora_targets: list[str] | str = (),
    revision: str | None = None,
) -> tuple[PretrainedConfig | None, list[str]]:
    """A backbone's config, and what does not fit data, backend and LoRA targets. Loads no weight."""
    config, problems = read_config(path, revision)
    if config is None:
        return None, problems
    problems = weight_problems(path)
    problems += _vocabulary_problems(config, max_token_id, "tokenise again with the tokenizer of this model")
    problems += _length_problems(config, max_seq_length, backend)
    return config, problems + _lora_problems(config, lora_targets)


def check_teacher(
    path: str,
    student: PretrainedConfig,
    max_token_id: int,
    max_seq_length: int,
    backend: str,
    revision: str | None = None,
) -> list[str]:
    """Why the model at `path` cannot teach this student, one line each. It reads the texts that the student reads."""
    config, problems = read_config(path, revision)
    if config is None:
        return problems
    problems = weight_problems(path)
    problems += _vocabulary_problems(config, max_token_id, "take a teacher with the student's vocabulary")
    problems += _length_problems(config, max_seq_length, backend)
    if student.hidden_size > config.hidden_size:
        problems.append(
            f"hidden size {config.hidden_size}, but the student's is {student.hidden_size}: a student learns the first "
            "dimensions of its teacher, so take a teacher at least as wide"
        )
    return problems


def attention_window(config: PretrainedConfig) -> int | None:
    """How many tokens back the sliding-window layers of a decoder see; None without such layers."""
    window = getattr(config, "sliding_window", None)
    if not window or getattr(config, "use_sliding_window", True) is False:
        return None
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and "sliding_attention" not in layer_types:
        return None
    return window


def read_config(path: str, revision: str | None = None) -> tuple[PretrainedConfig | None, list[str]]:
    """The config of a backbone, a folder or a hub id; or None and why it cannot be read."""
    if Path(path).is_dir() and not (Path(path) / "config.json").exists():  # Transformers 4 guesses by the folder's name
        return None, [not_found(path, "no config.json", revision)]
    try:
        config = AutoConfig.from_pretrained(path, **loading_options(path, revision))
    except (OSError, ValueError, KeyError) as error:
        return None, [not_found(path, first_line(error), revision)]
    problem = rope_problem(config)
    if problem:
        return None, [f"{path!r}: {problem}"]
    return config, []


def _vocabulary_problems(config: PretrainedConfig, max_token_id: int, remedy: str) -> list[str]:
    if max_token_id < config.vocab_size:
        return []
    return [
        f"the data hold token id {max_token_id}, but the model's vocabulary has {config.vocab_size} entries: {remedy}"
    ]


def _length_problems(config: PretrainedConfig, max_seq_length: int, backend: str) -> list[str]:
    """Why texts of this length cannot go through the decoder in this way, one line each."""
    problems = []
    limit = getattr(config, "max_position_embeddings", None)
    if limit and max_seq_length > limit:
        problems.append(f"max_seq_length {max_seq_length} is above the model's max_position_embeddings {limit}")
    window = attention_window(config)
    if window and window < max_seq_length and is_packed(backend):
        problems.append(f"its tokens see no further than {window} tokens back: set attn_backend to auto or buckets")
    return problems


def weight_problems(path: str) -> list[str]:
    """What is wrong with the weight files of a local folder, as far as their headers and sizes tell."""
    folder = Path(path)
    if not folder.is_dir():
        return []  # a hub id: fetched, and checked, when it is loaded
    names = ["model.safetensors"]
    if (folder / _INDEX).exists():
        try:
            index = json.loads((folder / _INDEX).read_text())
            names = sorted(set(index["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            return [f"{folder / _INDEX}: not an index of safetensors files"]
    outside = [name for name in names if not isinstance(name, str) or name != Path(name).name]
    if outside:
        return [f"{folder / _INDEX}: {name!r} is not the name of a file beside it" for name in outside]
    return [problem for name in names for problem in _weight_file_problems(folder / name)]


def _weight_file_problems(path: Path) -> list[str]:
    """What is wrong with one safetensors file, one line, or nothing. Reads its header."""
    try:
        with safe_open(path, framework="pt"):
            return []
    except FileNotFoundError:
        return [f"{path}: no such file; weights must be safetensors"]
    except (SafetensorError, OSError) as error:
        return [f"{path}: damaged or cut short ({error}): fetch it again"]


def _lora_problems(config: PretrainedConfig, targets: list[str] | str) -> list[str]:
    """LoRA targets that name no layer of the model, one line each. Builds the model without memory."""
    if not targets or targets == "all-linear":
        return []
    with torch.device("meta"):
        modules = AutoModel.from_config(config, trust_remote_code=False).named_modules()
    layers = {name.rpartition(".")[2] for name, module in modules if isinstance(module, nn.Linear)}
    missing = [target for target in targets if target.rpartition(".")[2] not in layers]
    return [
        f"lora_target_modules: no layer is called {name!r}; the layers are called {', '.join(sorted(layers))}"
        for name in missing
    ]


def load_backbone(
    path: str, dtype: torch.dtype, revision: str | None = None, device: torch.device | None = None
) -> PreTrainedModel:
    """The decoder of a folder or hub id, without its language-model head. Safetensors only, no remote code.

    Args:
        revision: commit, tag or branch of a hub id; None = its main branch.
        device: a GPU gets one weight after the other from the file, and the model never lies in main memory as a
            whole; None = the CPU.

    Raises:
        ValueError: the weights are not those that the config describes.
        torch.OutOfMemoryError: the device has no room for them.
    """
    options = loading_options(path, revision) | in_dtype(dtype)
    if device is not None and device.type != "cpu":
        options["device_map"] = {"": device}
    try:
        return AutoModel.from_pretrained(path, attn_implementation="sdpa", use_safetensors=True, **options)
    except torch.OutOfMemoryError:  # a RuntimeError too, but no fault of the folder's
        raise
    except RuntimeError as error:  # Transformers has printed a table of what differs
        raise ValueError(f"{path}: its weights do not fit its config.json ({first_line(error)})") from None


def describe_backbone(path: str, dtype: torch.dtype, revision: str | None = None) -> PreTrainedModel:
    """The decoder that `load_backbone` gives, on the meta device: it has no weights and takes no memory."""
    config = AutoConfig.from_pretrained(path, **loading_options(path, revision))
    with torch.device("meta"):
        model = AutoModel.from_config(config, attn_implementation="sdpa", trust_remote_code=False, **in_dtype(dtype))
    return model.eval()  # as one that was read


def add_lora(
    backbone: PreTrainedModel, r: int, alpha: int, dropout: float, targets: list[str] | str, revision: str | None = None
) -> nn.Module:
    """Freeze the backbone and add LoRA adapters to the modules whose names end in one of `targets`.

    Args:
        revision: of the backbone, where it came from the hub: readers of the adapter load the same.
    """
    config = LoraConfig(
        task_type=TaskType.FEATURE_EXTRACTION, r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets
    )
    return get_peft_model(backbone, config, revision=revision)
