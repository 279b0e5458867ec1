"""The models of a run: loaded, given adapters and kernels, tried, and moved to their device."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import PretrainedConfig

from arguments import Args
from model import Agree, Embedder, FrozenEmbedder, choose_backend
from modeling.attention import backend_candidates, explain_backend, head_shape, try_kernels
from modeling.backbone import add_lora, attention_window, describe_backbone, load_backbone, read_config
from modeling.packing import MULTIPLE
from modeling.pooling import pooling_of
from runtime import engine
from runtime.collectives import problem_of_any
from training import kernels
from utils import RunError, first_line


def load_models(args: Args, accelerator: Accelerator) -> tuple[Embedder, FrozenEmbedder | None, str]:
    """The model on its device, tried out; its teacher, if any; and for people, how and why attention is computed.

    Where the engine shards this is a collective, trials included.

    Raises:
        RunError: on every process: the model cannot be read, or cannot be trained as asked.
    """
    set_seed(args.seed)  # the same adapters on every process
    model = load_student(args, accelerator)
    if in_bf16(accelerator) and not on_cpu(accelerator):
        leave_out_kernels(args, accelerator, model.backbone.config)

    def warn(line: str) -> None:
        accelerator.print(f"warning: {line}")

    candidates = candidates_for(accelerator, model, args.attn_backend)
    equal_calls = engine.is_sharded(accelerator)
    with engine.trials(accelerator, model):
        problems = set_backend_and_kernels(args, model, candidates, equal_calls, warn, agreement(accelerator))
    problem = problem_of_any("\n".join(f"{args.model_path}: {line}" for line in problems), accelerator.num_processes)
    if problem:
        raise RunError(problem)
    round_up_rows(accelerator, model)
    teacher = None
    if args.teacher_model_path:
        teacher = load_teacher(args.teacher_model_path, accelerator, args.attn_backend, args.teacher_revision)
    return model, teacher, describe_attention(args, accelerator, model)


def in_bf16(accelerator: Accelerator) -> bool:
    """Whether models compute in bf16."""
    return accelerator.mixed_precision == "bf16"


def on_cpu(accelerator: Accelerator) -> bool:
    """Whether models compute on a CPU."""
    return accelerator.device.type == "cpu"


def candidates_for(accelerator: Accelerator, model: Embedder, backend: str) -> list[str]:
    """The attention backends to try on a model, best first. `backend` is what the user said."""
    windowed = attention_window(model.backbone.config) is not None
    equal_calls = engine.is_sharded(accelerator)
    return backend_candidates(backend, on_cpu(accelerator), windowed, equal_calls, in_bf16(accelerator))


def round_up_rows(accelerator: Accelerator, model: Embedder) -> None:
    """On a CPU in bf16 have packed rows rounded up, which saves memory (modeling/packing.py)."""
    if on_cpu(accelerator) and in_bf16(accelerator):
        model.multiple = MULTIPLE


def describe_attention(args: Args, accelerator: Accelerator, model: Embedder) -> str:
    """How and why attention is computed, for people."""
    windowed = attention_window(model.backbone.config) is not None
    reason = explain_backend(model.backend, args.attn_backend, on_cpu(accelerator), windowed, in_bf16(accelerator))
    attention = f"{model.backend} ({reason})"
    if args.compile:
        attention += ", layers compiled around it"
    if args.liger:
        attention += ", Liger's kernels"
    return attention


def leave_out_kernels(args: Args, accelerator: Accelerator, config: PretrainedConfig) -> None:
    """Try the kernels for packed texts with the heads of model and teacher, and say which cannot be used, and why."""
    shapes = [head_shape(config)]
    if args.teacher_model_path:
        teacher_config, _ = read_config(args.teacher_model_path, args.teacher_revision)
        shapes.append(head_shape(teacher_config))
    for line in try_kernels(accelerator.device, shapes):
        accelerator.print(f"warning: attention kernel left out: {line}")


def load_student(args: Args, accelerator: Accelerator) -> Embedder:
    """The model to train, in fp32, with adapters where they are asked for, on the device or in parts over processes."""
    backbone = read_backbone(accelerator, args.model_path, torch.float32, "model_path", args.model_revision)
    model = engine.place(accelerator, student_around(args, backbone))
    register_fsdp_forward_method(model, "states")  # trials call it from outside
    return model


def describe_student(args: Args) -> Embedder:
    """The model to train without weights, on the meta device: its parameters have their names and shapes."""
    return student_around(args, describe_backbone(args.model_path, torch.float32, revision=args.model_revision))


def student_around(args: Args, backbone: nn.Module) -> Embedder:
    """The model to train, with adapters where they are asked for."""
    if args.use_lora:
        sizes = (args.lora_r, args.lora_alpha, args.lora_dropout)
        backbone = add_lora(backbone, *sizes, args.lora_targets(), args.model_revision)
    return Embedder(backbone)


def read_backbone(
    accelerator: Accelerator, path: str | Path, dtype: torch.dtype, key: str, revision: str | None
) -> nn.Module:
    """A decoder for `engine.place`; a collective.

    Each process reads it onto its own device. Where the engine shards the main process alone reads it, into main
    memory, and the others describe it on the meta device.

    Args:
        key: of the configuration, that names the path.
        revision: of a hub id.

    Raises:
        RunError: on every process: one of them cannot read it, or has no room for it.
    """
    backbone = None
    problem = None
    try:
        if not engine.is_sharded(accelerator):
            backbone = load_backbone(path, dtype, revision=revision, device=engine.device_to_read_to(accelerator))
        elif accelerator.is_main_process:
            backbone = load_backbone(path, dtype, revision=revision)
        else:
            backbone = describe_backbone(path, dtype, revision=revision)
    except ValueError as error:
        problem = f"{key}: {error}"
    except torch.OutOfMemoryError as error:
        problem = (
            f"{key}: {path}: {accelerator.device} has no room for its weights ({first_line(error)}): share them out "
            "over more GPUs (configs/accelerate_config.yaml), or take a smaller model"
        )
    problem = problem_of_any(problem, accelerator.num_processes)
    if problem:
        raise RunError(problem)
    return backbone


def set_backend_and_kernels(
    args: Args, model: Embedder, candidates: list[str], equal_calls: bool, warn: Callable[[str], None], agree: Agree
) -> list[str]:
    """Set the model's attention backend and change its kernels as asked. Returns what cannot be done, one line each.

    Args:
        candidates: the backends to try, best first.
        equal_calls: every process must call the model equally often.
        warn: called with a line about each backend that is left out.
        agree: tells every process the problem that any of them found.
    """
    problems = choose_backend(model, candidates, warn, agree)
    if equal_calls and model.backend == "buckets":
        problems = ["attn_backend buckets: processes would call a sharded model unequally often; set it to auto"]
    if args.gradient_checkpointing and not model.can_recompute:
        problems.append("gradient_checkpointing: this decoder cannot recompute its layers: set it to false")
    if args.liger and not problems:
        problems = kernels.use_liger(model)
    if args.compile and not problems:
        problems = kernels.compile_layers(model)
    return problems


def trained_share(model: nn.Module) -> float:
    """Trained weights over all."""
    total = sum(parameter.numel() for parameter in model.parameters())
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) / total


def load_teacher(
    path: str | Path, accelerator: Accelerator, backend: str, revision: str | None = None
) -> FrozenEmbedder:
    """A teacher in the precision of the training, in parts over the processes where the student is; a collective.

    Args:
        backend: its attention, as `attn_backend` has it; "auto" finds the best that is exact for this decoder, whose
            layers may have windows where the student's have none.

    Raises:
        RunError: on every process: it cannot be read, its weights are damaged, or it is not a causal decoder: packed
            texts are embedded with causal attention, whatever the model was trained with.
    """
    dtype = torch.bfloat16 if in_bf16(accelerator) else torch.float32
    backbone = read_backbone(accelerator, path, dtype, "teacher_model_path", revision)
    teacher = engine.place(accelerator, FrozenEmbedder(backbone, pooling=pooling_of(Path(path))), frozen=True)
    register_fsdp_forward_method(teacher, "states")
    candidates = candidates_for(accelerator, teacher, backend)
    with engine.trials(accelerator, teacher):
        problems = choose_backend(teacher, candidates, agree=agreement(accelerator))
    if problems:
        raise RunError("\n".join(f"{path}: it cannot be a teacher: {line}" for line in problems))
    round_up_rows(accelerator, teacher)
    return teacher


def agreement(accelerator: Accelerator) -> Agree:
    """What tells every process the problem that any of them found, so that all choose the same backend."""
    return partial(problem_of_any, world=accelerator.num_processes)


def saved_dtype(args: Args, accelerator: Accelerator) -> torch.dtype:
    """Of the weights in model folders."""
    if args.save_dtype == "auto":
        return torch.bfloat16 if in_bf16(accelerator) else torch.float32
    return getattr(torch, args.save_dtype)
