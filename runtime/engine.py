"""The engine, DDP, FSDP2 or DeepSpeed ZeRO, as accelerate's configuration asks for it.

What is added here is what none of them gives: fp32 sums of gradients under bf16, whole weights from any engine, a
teacher that is sharded as the student is, and sharding over gloo on a CPU.
"""

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    fsdp2_prepare_model,
)
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from runtime import sharding
from utils import RunError

# DDP: gradients lie in the buckets in which they are summed, instead of beside them (4 bytes a parameter); and nothing
# is sent for buffers, which hold what every process works out by itself.
_COPIES = DistributedDataParallelKwargs(
    gradient_as_bucket_view=True, broadcast_buffers=False, find_unused_parameters=False
)
COLLECTIVE_TIMEOUT = timedelta(minutes=60)  # a large model is saved and read back by one process; the others wait


# ------------------------------------------------------------------------------------------- start


def start(trackers: list[str], logging_dir: str) -> Accelerator:
    """The Accelerator that the launcher's environment asks for.

    Raises:
        RunError: processes do not find each other, or the launcher asked for FSDP1, weights on the CPU or fp16.
    """
    if not torch.accelerator.is_available():
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")  # without it accelerate leaves each process alone
    if _sharding_is_wanted() and os.environ.get("ACCELERATE_USE_CPU"):
        _start_sharding_on_cpu()
    accelerator = Accelerator(
        mixed_precision=precision_to_ask_for(os.environ, gpu_with_bf16()),
        log_with=trackers or None,
        project_config=ProjectConfiguration(logging_dir=logging_dir),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=COLLECTIVE_TIMEOUT), _COPIES],
    )
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != launched:
        raise RunError(
            f"{launched} processes were launched, but each of them is alone: take a config file of configs/, "
            "and on a machine without a GPU set ACCELERATE_USE_CPU=true"
        )
    problem = precision_problem(accelerator.mixed_precision)
    if problem:
        raise RunError(problem)
    fsdp = getattr(accelerator.state, "fsdp_plugin", None)
    if fsdp is not None:
        if fsdp.fsdp_version != 2:
            raise RunError("fsdp_version: 2 is needed in the accelerate config")
        if fsdp.activation_checkpointing:
            raise RunError("fsdp_activation_checkpointing: set it to false; gradient_checkpointing recomputes layers")
        # AdamW would hear of a broken gradient (found_inf) by a copy from the GPU that it does not wait for.
        if isinstance(fsdp.cpu_offload, CPUOffloadPolicy):
            raise RunError("fsdp_offload_params: set it to false; more processes or use_lora take less memory")
        fsdp.mixed_precision_policy = _precision(accelerator)
        fsdp.cpu_ram_efficient_loading = False  # accelerate's gathers each weight on every process; `place` does not
    return accelerator


def precision_to_ask_for(environment: Mapping[str, str], bf16_here: bool) -> str | None:
    """What accelerate is told: bf16 where nobody said a precision and the GPU has it; None leaves it to the launcher.

    `accelerate launch` always says one; `python run.py` says none, and accelerate would then train in fp32, several
    times slower and with twice the activations, without a word.

    Args:
        environment: of this process.
        bf16_here: whether it computes on a GPU that has bf16.
    """
    if "ACCELERATE_MIXED_PRECISION" in environment or not bf16_here:
        return None
    return "bf16"


def gpu_with_bf16() -> bool:
    """Whether there is a GPU with instructions for bf16."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def precision_problem(mixed_precision: str) -> str | None:
    """Why a run cannot train in a precision, None if it can.

    In fp16 gradients are scaled, and an update that is left out for one that is not finite would have to tell the
    scaler; decoders of today are trained in bf16, which needs no scaling.
    """
    if mixed_precision in ("no", "bf16"):
        return None
    return (
        f"mixed_precision: {mixed_precision} is not supported: "
        "accelerate launch --mixed_precision bf16, or mixed_precision: bf16 in its config file"
    )


def _sharding_is_wanted() -> bool:
    """Whether the launcher's environment asks for FSDP or DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" or deepspeed_is_wanted()


def deepspeed_is_wanted() -> bool:
    """Whether the launcher's environment asks for DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"


def _start_sharding_on_cpu() -> None:
    """Let accelerate shard over gloo. By itself it turns FSDP and DeepSpeed on a CPU into DDP without a word.

    It does so where ACCELERATE_USE_CPU is set. So that is taken away, and accelerate finds its state, which is common
    to all Accelerators of a process, filled in already: with a CPU, but several processes on several devices.
    """
    os.environ.pop("ACCELERATE_USE_CPU", None)
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=COLLECTIVE_TIMEOUT)
    PartialState._shared_state |= {
        "_cpu": False,
        "backend": "gloo",
        "device": torch.device("cpu"),
        "debug": False,
        "distributed_type": DistributedType.MULTI_GPU,
        "num_processes": dist.get_world_size(),
        "process_index": dist.get_rank(),
        "local_process_index": int(os.environ.get("LOCAL_RANK", 0)),
        "fork_launched": False,
    }


# ------------------------------------------------------------------------------------ what it runs


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether a forward pass is a collective: then all processes must run as many of them."""
    return accelerator.distributed_type == DistributedType.FSDP


def name_of(accelerator: Accelerator) -> str | None:
    """What people call it; None for a process alone, which has none."""
    if accelerator.num_processes == 1:
        return None
    if is_sharded(accelerator):
        return "FSDP2" if _mesh(accelerator) is None else "HSDP"
    return "DeepSpeed" if is_deepspeed(accelerator) else "DDP"


def is_deepspeed(accelerator: Accelerator) -> bool:
    """Whether weights and moments are kept in DeepSpeed's own way: its runs do not resume."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def autocast_of_trials(accelerator: Accelerator) -> AbstractContextManager:
    """The precision of the training, for forward passes before the engine has the model.

    accelerate's own context is empty under DeepSpeed, which turns the weights into bf16 later: a trial in fp32 would
    rule out every kernel that takes bf16 alone. And autocast keeps its bf16 copies of all weights until it ends, also
    without gradients: half of the model once more, for a trial of nine tokens. Without that cache a copy lives as long
    as its product. Not under FSDP2, which gathers the weights in bf16 itself.
    """
    kind = accelerator.device.type
    bf16 = accelerator.mixed_precision == "bf16" and not is_sharded(accelerator)
    return torch.autocast(kind, torch.bfloat16, enabled=bf16, cache_enabled=False)


def has_buckets(accelerator: Accelerator) -> bool:
    """Whether each of several processes has a whole copy of the model, and sums gradients in buckets: DDP."""
    return accelerator.num_processes > 1 and not is_sharded(accelerator) and not is_deepspeed(accelerator)


def shards(accelerator: Accelerator) -> int:
    """How many processes share gradients and moments of one copy of the model; 1 = each has all of them."""
    if is_deepspeed(accelerator):
        return accelerator.num_processes
    if not is_sharded(accelerator):
        return 1
    mesh = _mesh(accelerator)
    return accelerator.num_processes if mesh is None else mesh.size(-1)


@contextmanager
def trials(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """Around forward passes before the engine has the optimizer: in the precision of the training.

    What a sharded model gathered for them is freed afterwards: an optimizer made then must find the parts.
    """
    with autocast_of_trials(accelerator):
        yield
    sharding.share_out(model)


def device_to_read_to(accelerator: Accelerator) -> torch.device | None:
    """Where a process of an engine that does not shard reads its model to; None = the CPU, for DeepSpeed to move it."""
    return None if is_deepspeed(accelerator) else accelerator.device


def place(accelerator: Accelerator, model: nn.Module, frozen: bool = False) -> nn.Module:
    """A model on its device; where the engine shards, in parts over the processes. Then it is a collective.

    Args:
        model: whole; where the engine shards only the main process needs its weights, and the others may describe it
            on the meta device. Its `_no_split_modules` are the class names of what is gathered at a time, its layers.
        frozen: it is not trained, a teacher.

    Raises:
        RunError: on every process: they describe different models.
    """
    if not is_sharded(accelerator):
        return model.to(accelerator.device)
    weights = sharding.take_weights(model)
    sharding.agree_on_weights(model)
    if frozen:
        sharding.shard_frozen(model, model._no_split_modules, _precision(accelerator), _mesh(accelerator))
    else:
        fsdp2_prepare_model(accelerator, model)
        # What stands outside the layers: the backward pass begins with it, and accelerate 1.10 alone would free it.
        model.set_reshard_after_forward(False, recurse=False)
    sharding.hand_out(model, weights, accelerator.device)
    return model


def prepare(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, batch_size: int, max_grad_norm: float
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Model and optimizer as the engine runs them.

    Args:
        model: from `place`, tried.
        batch_size: tuples per process; for DeepSpeed, which cannot see it in a data loader here.
        max_grad_norm: for DeepSpeed, which clips gradients in its backward pass.
    """
    if is_deepspeed(accelerator):
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"] = batch_size
        config["gradient_clipping"] = max_grad_norm
    if is_sharded(accelerator):
        # The optimizer has the sharded weights already. accelerate.prepare would look them up by their addresses,
        # and a process's part that has no rows has none.
        assert all(isinstance(weight, DTensor) for group in optimizer.param_groups for weight in group["params"])
        model.register_forward_hook(_share_out_after_evaluation)
        return model, accelerator.prepare_optimizer(optimizer)
    with warnings.catch_warnings():
        # torch 2.13 has another name for it, which earlier ones do not know
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        return accelerator.prepare(model, optimizer)


def whole_weights(accelerator: Accelerator, model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of a prepared model, complete on the main process. A collective where the model is sharded."""
    if is_sharded(accelerator):
        return accelerator.get_state_dict(model)
    return accelerator.unwrap_model(model).state_dict()


def _precision(accelerator: Accelerator) -> MixedPrecisionPolicy:
    """bf16 compute, but fp32 sums of gradients and fp32 embeddings; accelerate would take bf16 for both."""
    if accelerator.mixed_precision != "bf16":
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def _mesh(accelerator: Accelerator) -> DeviceMesh | None:
    """The processes by copy of the model and share of it, where the launcher asked for several copies; else None."""
    mesh = accelerator.torch_device_mesh
    return None if mesh is None else mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)]


# ----------------------------------------------------------------- what a sharded model has gathered


def keeps_gathered(accelerator: Accelerator) -> bool:
    """Whether a sharded model keeps what it gathered in the forward pass until the backward pass.

    So it is where the accelerate config says `fsdp_reshard_after_forward: false`, or `keep_gathered` was called.
    """
    return not accelerator.state.fsdp_plugin.reshard_after_forward


def keep_gathered(accelerator: Accelerator, model: nn.Module) -> None:
    """Let a sharded model keep what it gathered: half as many gathers, 2 bytes a parameter on every process."""
    accelerator.state.fsdp_plugin.reshard_after_forward = False
    model.set_reshard_after_forward(False)


@contextmanager
def earlier_part(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """Around forward and backward pass of any part of a step but the last.

    Copies of a model sum their gradients once, with the last part. A sharded model sums them at each part: waiting
    would keep its gradients whole, 4 bytes a parameter on every process, which is more than parts save. Where it keeps
    its weights gathered, they stay so for the next part.
    """
    if not isinstance(model, FSDPModule):
        with accelerator.no_sync(model):
            yield
        return
    model.set_reshard_after_backward(not keeps_gathered(accelerator))
    yield
    model.set_reshard_after_backward(True)


def _share_out_after_evaluation(model: nn.Module, _inputs, _output) -> None:
    """Free what a pass without a backward pass has gathered: torch would keep it until the next backward pass."""
    if model.training or torch.is_grad_enabled():
        return
    sharding.share_out(model)


def clear_gradients(accelerator: Accelerator, optimizer: torch.optim.Optimizer) -> None:
    """Forget the gradients of a step.

    Under DDP they are set to zero where they lie. Without them the next step's first part would make others beside
    the buckets, which keep their memory anyway: 4 bytes a parameter.
    """
    optimizer.zero_grad(set_to_none=not has_buckets(accelerator))
