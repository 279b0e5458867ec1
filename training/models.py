"""The models of a run: loaded, given adapters and kernels, tried, and moved to their device."""

from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import PreTrainedConfig

from arguments import Args
from model import Embedder, FrozenEmbedder, choose_backend
from modeling.attention import backend_candidates, explain_backend, head_shape, try_kernels
from modeling.backbone import add_lora, attention_window, load_backbone, read_config
from modeling.packing import MULTIPLE
from modeling.pooling import pooling_of
from runtime import engine
from training import kernels
from utils import RunError


def load_models(args: Args, accelerator: Accelerator) -> tuple[Embedder, FrozenEmbedder | None, str]:
    """The model on its device, tried out; its teacher, if any; and for people, how and why attention is computed.

    Raises:
        RunError: the model cannot be read, or cannot be trained as asked.
    """
    set_seed(args.seed)  # the same adapters on every process
    backbone = load_trained_backbone(args)
    on_cpu = accelerator.device.type == "cpu"
    windowed = attention_window(backbone.config) is not None
    half = accelerator.mixed_precision == "bf16"
    one_call = engine.is_sharded(accelerator)
    if half and not on_cpu:
        leave_out_kernels(args, accelerator, backbone.config)
    candidates = backend_candidates(args.attn_backend, on_cpu, windowed, one_call, half)
    model = Embedder(backbone.to(accelerator.device), candidates[0])

    def warn(line: str) -> None:
        accelerator.print(f"warning: {line}")

    with engine.autocast_of_trials(accelerator):
        problems = find_model_problems(args, model, candidates, one_call, warn)
    if problems:
        raise RunError("\n".join(f"{args.model_path}: {problem}" for problem in problems))
    if on_cpu and half:
        model.multiple = MULTIPLE
    teacher = None
    if args.teacher_model_path:
        teacher = load_teacher(args.teacher_model_path, accelerator, candidates, args.teacher_revision)
    attention = f"{model.backend} ({explain_backend(model.backend, args.attn_backend, on_cpu, windowed, half)})"
    if args.compile:
        attention += ", layers compiled around it"
    if args.liger:
        attention += ", Liger's kernels"
    return model, teacher, attention


def leave_out_kernels(args: Args, accelerator: Accelerator, config: PreTrainedConfig) -> None:
    """Try the kernels for packed texts with the heads of model and teacher, and say which cannot be used, and why."""
    shapes = [head_shape(config)]
    if args.teacher_model_path:
        teacher_config, _ = read_config(args.teacher_model_path, args.teacher_revision)
        shapes.append(head_shape(teacher_config))
    for line in try_kernels(accelerator.device, shapes):
        accelerator.print(f"warning: attention kernel left out: {line}")


def load_trained_backbone(args: Args) -> torch.nn.Module:
    """The decoder in fp32, with adapters where they are asked for."""
    try:
        backbone = load_backbone(args.model_path, torch.float32, revision=args.model_revision)
    except ValueError as error:
        raise RunError(f"model_path: {error}") from None
    if args.use_lora:
        sizes = (args.lora_r, args.lora_alpha, args.lora_dropout)
        backbone = add_lora(backbone, *sizes, args.lora_targets(), args.model_revision)
    return backbone


def find_model_problems(
    args: Args, model: Embedder, candidates: list[str], one_call: bool, warn: Callable[[str], None]
) -> list[str]:
    """Give the model its backend and kernels, and say what of it cannot be, one line each.

    Args:
        candidates: the backends to try, best first.
        one_call: every process must call the model equally often.
        warn: called with a line about each backend that is left out.
    """
    problems = choose_backend(model, candidates, warn)
    if one_call and model.backend == "buckets":
        problems = ["attn_backend buckets: processes would call a sharded model unequally often; set it to auto"]
    if args.gradient_checkpointing and not model.can_recompute:
        problems.append("gradient_checkpointing: this decoder cannot recompute its layers: set it to false")
    if args.liger and not problems:
        problems = kernels.use_liger(model)
    if args.compile and not problems:
        problems = kernels.compile_layers(model)
    return problems


def load_teacher(
    path: str | Path, accelerator: Accelerator, candidates: list[str], revision: str | None = None
) -> FrozenEmbedder:
    """A teacher in the precision of the training, in parts over the processes where the student is."""
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    backbone = load_backbone(path, dtype, revision=revision).to(accelerator.device)
    teacher = FrozenEmbedder(backbone, pooling=pooling_of(Path(path)))
    with engine.autocast_of_trials(accelerator):
        choose_backend(teacher, candidates)
    if accelerator.device.type == "cpu" and dtype == torch.bfloat16:
        teacher.multiple = MULTIPLE
    engine.shard_frozen(accelerator, teacher, teacher._no_split_modules)
    return teacher
