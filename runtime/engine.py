"""Processes: how they start, what they hold together, and how they end together.

The engine (DDP, FSDP2, DeepSpeed ZeRO) comes from accelerate's configuration. What is added here is what none of them
gives: fp32 reductions under bf16, whole weights from any engine, and an end within seconds on every process when one
fails, is killed or hangs. NCCL alone waits ten minutes, gloo thirty.
"""

import errno
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import DistributedType, InitProcessGroupKwargs, ProjectConfiguration
from safetensors import SafetensorError
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

COLLECTIVE_TIMEOUT = timedelta(minutes=60)  # a large model is saved and read back by one process; the others wait
FAILED = 1  # exit status of every process when one has failed
DISK = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}  # no fault of the code
STOPPED = 75  # of a run that was told to stop and can go on: EX_TEMPFAIL


@contextmanager
def process_group(trackers: list[str], logging_dir: str, silence: float) -> Iterator[Accelerator]:
    """Start accelerate; inside, an exception on any process ends all of them, with its traceback printed once.

    Args:
        silence: seconds without a sign of life after which a process counts as hanging.
    """
    accelerator = start(trackers, logging_dir)
    if accelerator.num_processes == 1:
        yield accelerator
        accelerator.state.destroy_process_group()
        return
    watch = Heartbeat(accelerator.process_index, accelerator.num_processes, silence)
    try:
        yield accelerator
    except BaseException as error:
        watch.fail(error)
    watch.stop()
    dist.barrier()  # the store lives in one of the processes
    dist.destroy_process_group()


def start(trackers: list[str], logging_dir: str) -> Accelerator:
    """The Accelerator that the launcher's environment asks for.

    Raises:
        SystemExit: the launcher started several processes that do not find each other.
    """
    sharded = any(os.environ.get(f"ACCELERATE_USE_{engine}", "").lower() == "true" for engine in ("FSDP", "DEEPSPEED"))
    if not torch.accelerator.is_available():
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")  # without it accelerate leaves each process alone
    if sharded and os.environ.get("ACCELERATE_USE_CPU"):
        _start_sharding_on_cpu()
    accelerator = Accelerator(
        log_with=trackers or None,
        project_config=ProjectConfiguration(logging_dir=logging_dir),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=COLLECTIVE_TIMEOUT)],
    )
    expected = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != expected:
        raise SystemExit(
            f"run.py: {expected} processes were launched, but each of them is alone: take a config file of configs/, "
            "and on a machine without a GPU set ACCELERATE_USE_CPU=true"
        )
    if plugin := getattr(accelerator.state, "fsdp_plugin", None):
        if plugin.fsdp_version != 2:
            raise SystemExit("run.py: fsdp_version: 2 is needed in the accelerate config")
        plugin.mixed_precision_policy = _precision(accelerator)
    return accelerator


def user_message(error: BaseException) -> str | None:
    """What a user should read instead of a traceback; None where a traceback tells more."""
    if isinstance(error, SystemExit | KeyboardInterrupt):
        return str(error) or "run.py: interrupted"
    if isinstance(error, FloatingPointError):
        return f"run.py: {error}"
    in_safetensors = isinstance(error, SafetensorError) and "os error" in str(error)
    if in_safetensors or (isinstance(error, OSError) and error.errno in DISK):
        return (
            f"run.py: the disk refuses what is written: {error}\n"
            "run.py: what was saved before is whole: make room, and the same command goes on from there"
        )
    return None


def tracker_problems(names: list[str]) -> list[str]:
    """Why numbers cannot be sent to these trackers, one line each."""
    installed = {str(getattr(name, "value", name)) for name in get_available_trackers()}
    problems = []
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            problems.append(f"report_to: {name!r} is none of {', '.join(LOGGER_TYPE_TO_CLASS)}, none")
        elif name not in installed:
            problems.append(f"report_to: {name} is not installed: pip install {name}, or take another")
    return problems


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether a forward pass is a collective: then all processes must run as many of them."""
    return accelerator.distributed_type == DistributedType.FSDP


def check_deepspeed(accelerator: Accelerator, folder: Path, parts: bool) -> bool:
    """Whether this is DeepSpeed, which keeps weights and moments in a way of its own: its runs do not resume.

    Args:
        folder: of the run.
        parts: the step shall run in parts.

    Raises:
        SystemExit: what is asked for does not go with DeepSpeed.
    """
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return False
    if parts:
        raise SystemExit("run.py: max_tokens_per_forward: not under DeepSpeed; take configs/accelerate_config.yaml")
    if (folder / "args.json").exists():
        raise SystemExit(
            f"run.py: {folder}: holds a run already, and DeepSpeed's do not resume: choose another experiment_id"
        )
    accelerator.print("DeepSpeed: an interrupted run cannot go on; configs/accelerate_config.yaml can")
    return True


def prepare(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, batch_size: int, max_grad_norm: float
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Model and optimizer as the engine runs them. DeepSpeed clips in its backward pass, so it is told the limit."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config |= {"train_micro_batch_size_per_gpu": batch_size, "gradient_clipping": max_grad_norm}
    return accelerator.prepare(model, optimizer)


def shard_frozen(accelerator: Accelerator, module: nn.Module, layers: list[str]) -> nn.Module:
    """A teacher in parts over the processes, where the student is: no optimizer state, never saved.

    Args:
        layers: class names of the modules that are gathered one at a time.
    """
    if is_sharded(accelerator):
        for layer in [part for part in module.modules() if type(part).__name__ in layers]:
            fully_shard(layer, mp_policy=_precision(accelerator))
        # Without a backward pass torch would leave the root unsharded: for a teacher the largest table of all.
        fully_shard(module, mp_policy=_precision(accelerator), reshard_after_forward=True)
    return module


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


def _start_sharding_on_cpu() -> None:
    """Let accelerate shard over gloo. By itself it turns FSDP and DeepSpeed on a CPU into DDP without a word."""
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


class StopSignal:
    """Whether this process was told to stop: SIGTERM before a machine is taken away, SIGUSR1 by a scheduler.

    The signal only leaves a mark; the loop looks at it between two steps, so a second one hurts nothing.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self):
        self.stop = False
        self.before = {number: signal.signal(number, self._note) for number in self.SIGNALS}

    def _note(self, *_) -> None:
        self.stop = True

    def forget(self) -> None:
        """Put back what the signals did before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)


def on_any_process(accelerator: Accelerator, flags: list[bool]) -> list[bool]:
    """Whether each flag is set on any process: all of them act alike. One small collective a step."""
    if accelerator.num_processes == 1:
        return [bool(flag) for flag in flags]
    marks = torch.tensor([float(bool(flag)) for flag in flags], device=accelerator.device)
    dist.all_reduce(marks, op=dist.ReduceOp.MAX)
    return [mark > 0 for mark in marks.tolist()]


class Heartbeat:
    """Signs of life between processes, through the store that they met at.

    Each process beats and listens to the next one in a ring. Whoever first fails, or first misses a beat for too long,
    leaves the reason under one key; everybody reads that key with every beat and ends. A failed process prints its
    traceback; the others print one line a machine.
    """

    def __init__(self, rank: int, world: int, silence: float):
        self.rank, self.world, self.silence = rank, world, silence
        self.interval = min(2.0, silence / 10)
        # A connection of its own: a blocked main thread must not hold up the beat. Torch has no public way to it.
        self.store = dist.distributed_c10d._get_default_store().clone()
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._beat, name="watch", daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """The run is over: this process will be silent, and needs to hear nobody."""
        self.stopped.set()
        self.thread.join()
        self.store.set(f"beat/{self.rank}", "over")

    def fail(self, error: BaseException) -> None:
        """Tell everybody, print the traceback if nobody failed before, and end this process."""
        lost = isinstance(error, RuntimeError) and self._lost_contact(error)
        if lost:
            self.stopped.wait(2 * self.interval)  # another process may be about to say what really happened
        first = self._report(f"{type(error).__name__}: {error}", otherwise=not lost)
        if first:
            line = user_message(error)
            self._say(line) if line else traceback.print_exception(error)
            self.stopped.wait(2 * self.interval)  # the store may live in this process: let the others read it
        self._end(first)

    def _beat(self) -> None:
        heard, patience, count = None, self.silence, 0
        neighbour = f"beat/{(self.rank + 1) % self.world}"
        while not self.stopped.wait(self.interval):
            try:
                count += 1
                self.store.set(f"beat/{self.rank}", str(count))
                if self.store.check(["failure"]):
                    self._end(first=False)
                beat = self.store.get(neighbour) if self.store.check([neighbour]) else None
            except RuntimeError as error:  # the process that keeps the store is gone
                self._say(f"run.py: lost the main process ({str(error).splitlines()[0]})")
                os._exit(FAILED)
            alive = beat != heard or beat == b"over"
            heard, patience = beat, self.silence if alive else patience - self.interval
            if patience <= 0:
                silent = f"process {(self.rank + 1) % self.world} gave no sign of life for {self.silence:.0f} s"
                if self._report(silent):
                    self._say(f"run.py: {silent}: it hangs or its machine is gone")
                self._end(first=True)

    def _report(self, reason: str, otherwise: bool = True) -> bool:
        """Leave the reason of the end where all look; whether this was the first. `otherwise`: the store is gone."""
        mine = f"process {self.rank} on {socket.gethostname()}: {reason}"
        try:
            return self.store.compare_set("failure", "", mine).decode() == mine
        except RuntimeError:
            return otherwise

    def _end(self, first: bool) -> None:
        if not first and int(os.environ.get("LOCAL_RANK", self.rank)) == 0:
            try:
                reason = self.store.get("failure").decode()[:300]
            except RuntimeError:
                reason = "the end of process 0, which kept the others together"
            self._say(f"run.py: ended, because of {reason}")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(FAILED)  # an orderly end would wait for collectives that nobody answers

    @staticmethod
    def _say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    @staticmethod
    def _lost_contact(error: RuntimeError) -> bool:
        words = ("Connection closed", "Connection reset", "Timed out", "gloo", "NCCL", "Broken pipe")
        return any(word in str(error) for word in words)


def use_all_cores(device: torch.device) -> None:
    """On CPU, share the machine's cores between the processes of this node.

    `accelerate launch` and torchrun set OMP_NUM_THREADS=1 where nobody chose: one process on 16 cores would
    use one of them and say nothing. A number above 1 was chosen by somebody and stays.
    """
    if device.type == "cpu" and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
