"""Real processes for tests: gloo processes connected as a launcher would connect them, and command lines.

    on_processes(2, function, argument)      what function(rank, world, argument) returns on each of two processes
    door_on_processes(2, config, fault)      how the training door ends on each of two, and what it prints
    run_command("run.py", "--config", path)  a command line in a Python of its own

Imported by tests only; a test that starts a process carries the mark `processes`.
"""

import contextlib
import json
import multiprocessing.connection
import os
import random
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
import transformers
from accelerate.state import AcceleratorState, GradientState
from torch.distributed.tensor import DTensor
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

import run
from modeling.backbone import describe_backbone, load_backbone
from runtime import engine
from training import models

ROOT = Path(__file__).parent.parent
PATIENCE = 600.0  # seconds: a deadlock ends a test after them; no test comes near, on a machine five times slower
ENGINES = {
    "ddp": {"ACCELERATE_USE_CPU": "true"},
    "fsdp": {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    },
}
ENGINES["hsdp"] = ENGINES["fsdp"] | {  # two copies of a model, each in two parts
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2",
}
run.draw = lambda folder: None  # a picture takes a second: test_console.py draws some, test_run.py one of a run
may_start_processes = True  # conftest sets it for each test, by its mark


# --------------------------------------------------------------------------------- gloo processes


@dataclass
class Ended:
    """How one process ended."""

    status: int | None  # exit status; minus the signal that killed it; None: it did not end, and was killed here
    printed: str  # to the console, by it and by what it started
    value: object = None  # what its function returned


class Processes:
    """`function(rank, world, *arguments)` running on each of `world` processes; nobody kills the others if one fails.

    What they print is read while they run, so that none waits at a full pipe; and into a pipe, not into a file, so
    that a limit on the size of files does not silence them.

    Args:
        kind: "ddp", "fsdp" or "hsdp", what a launcher would ask for.
        extra: further environment variables.
    """

    def __init__(self, world: int, function: Callable, *arguments, kind: str = "ddp", extra: dict | None = None):
        context = _server()
        port = free_port()
        self.workers, self.answers, self.consoles = [], [], []
        self.printed = [b""] * world
        self.values = [None] * world
        for rank in range(world):
            environment = _launcher_environment(rank, world, port, kind) | (extra or {})
            answer, answer_end = context.Pipe(duplex=False)
            console, console_end = context.Pipe(duplex=False)
            words = (rank, world, environment, function, arguments, answer_end, console_end)
            worker = context.Process(target=_work, args=words)
            worker.start()
            answer_end.close()
            console_end.close()
            self.workers.append(worker)
            self.answers.append(answer)
            self.consoles.append(console)

    def running(self) -> list[int]:
        """The ranks of the processes that have not ended."""
        return [rank for rank, worker in enumerate(self.workers) if worker.is_alive()]

    def wait(self, seconds: float, rank: int | None = None) -> bool:
        """Wait for the end of all processes, or of one. Returns whether it came within `seconds`."""
        deadline = time.monotonic() + seconds
        while True:
            waiting = [number for number in self.running() if rank in (None, number)]
            left = deadline - time.monotonic()
            if not waiting or left <= 0:
                self._read()
                return not waiting
            ends = [self.workers[number].sentinel for number in waiting]
            multiprocessing.connection.wait([*ends, *self._open_pipes()], left)
            self._read()

    def kill(self, ranks: list[int], number: int = signal.SIGKILL) -> None:
        """Send a signal: SIGKILL, as when a machine goes, or another."""
        for rank in set(ranks) & set(self.running()):
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(self.workers[rank].pid, number)

    def end(self, seconds: float = PATIENCE) -> list[Ended]:
        """Wait for the end of all, kill who has not ended after `seconds`, and say how each ended."""
        self.wait(seconds)
        late = self.running()
        self.kill(late)
        self.wait(PATIENCE)
        ended = []
        for rank, worker in enumerate(self.workers):
            status = None if rank in late else worker.exitcode
            ended.append(Ended(status, self.printed[rank].decode(errors="replace"), self.values[rank]))
        return ended

    def _open_pipes(self) -> list:
        return [pipe for pipe in [*self.answers, *self.consoles] if not pipe.closed]

    def _read(self) -> None:
        """Take what lies in the pipes, and close those whose process has ended."""
        ready = multiprocessing.connection.wait(self._open_pipes(), timeout=0)
        while ready:
            for pipe in ready:
                self._read_one(pipe)
            ready = multiprocessing.connection.wait(self._open_pipes(), timeout=0)

    def _read_one(self, pipe) -> None:
        if pipe in self.consoles:
            data = os.read(pipe.fileno(), 1 << 16)
            self.printed[self.consoles.index(pipe)] += data
            if not data:
                pipe.close()
            return
        try:
            self.values[self.answers.index(pipe)] = pipe.recv()
        except EOFError:
            pipe.close()


def _server():
    """Processes are forked from a server that has imported everything and computed nothing.

    A fork of the test process itself would hang: its OpenMP, Arrow and tokenizer threads are not in the child.
    """
    _check_mark()
    os.environ["PYTHONPATH"] = f"{ROOT / 'tests'}{os.pathsep}{ROOT}"  # where the server finds what it imports ahead
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["harness"])
    return context


def _check_mark() -> None:
    assert may_start_processes, "a test that starts processes carries the mark `processes`"


def free_port() -> int:
    """A port that nobody listens at, below those that the system gives away to connections: it stays free."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


def _launcher_environment(rank: int, world: int, port: int, kind: str) -> dict[str, str]:
    """What torchrun or accelerate launch would set; one process needs no launcher."""
    if world == 1:
        return {"ACCELERATE_USE_CPU": "true"}
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in ranks.items()} | ENGINES[kind]


def _work(rank: int, world: int, environment: dict, function: Callable, arguments: tuple, answer, console) -> None:
    """One process, from its start to its end."""
    os.dup2(console.fileno(), 1)
    os.dup2(console.fileno(), 2)
    os.environ.pop("ACCELERATE_USE_CPU", None)
    os.environ |= environment
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    status = 0
    try:
        answer.send(function(rank, world, *arguments))
        if dist.is_initialized():
            dist.destroy_process_group()
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    with contextlib.suppress(OSError):  # a full console
        sys.stdout.flush()
    os._exit(status)


def on_processes(world: int, function: Callable, *arguments, kind: str = "ddp", extra: dict | None = None) -> list:
    """What `function(rank, world, *arguments)` returns on each of `world` processes, by rank; they must all succeed."""
    ended = Processes(world, function, *arguments, kind=kind, extra=extra).end()
    failures = [f"process {rank}: {end}" for rank, end in enumerate(ended) if end.status != 0]
    assert not failures, "\n".join(failures)
    return [end.value for end in ended]


# -------------------------------------------------------------------- the training door on processes


def through_the_door(rank: int, world: int, config: dict) -> int:
    """run.main with this configuration, as a launched process would; returns its exit status."""
    path = Path(config["cache_dir"]).parent / f"{config['experiment_id']}.{rank}.json"
    path.write_text(json.dumps(config))
    return run.main(["--config", str(path)])


def through_the_door_in_fp64(rank: int, world: int, config: dict) -> int:
    """The same; saved weights are fp32 as always."""
    compute_in(torch.float64)
    return through_the_door(rank, world, config)


def no_fault(rank: int) -> None:
    """Nothing happens."""


def start_door(world: int, config: dict, fault: Callable = no_fault, kind: str = "ddp") -> Processes:
    """The training door on `world` processes, after `fault(rank)` has broken something in each."""
    Path(config["cache_dir"]).parent.mkdir(exist_ok=True)
    return Processes(world, _break_and_enter, config, fault, kind=kind)


def door_on_processes(world: int, config: dict, fault: Callable = no_fault, kind: str = "ddp") -> list[Ended]:
    """How the training door ends on each of `world` processes, by rank."""
    return start_door(world, config, fault, kind).end()


def _break_and_enter(rank: int, world: int, config: dict, fault: Callable) -> None:
    fault(rank)
    sys.exit(through_the_door(rank, world, config))


def compute_in(dtype: torch.dtype) -> None:
    """Models of this process are of this dtype throughout."""
    models.load_backbone = lambda path, _, **named: load_backbone(path, dtype, **named)
    models.describe_backbone = lambda path, _, **named: describe_backbone(path, dtype, **named)
    if dtype == torch.float64:  # Transformers rounds to fp32 here, where a difference of 1e-16 can become one of 1e-7
        Qwen3RMSNorm.forward = lambda self, x: F.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)


def train_steps(rank: int, world: int, configs: list[dict], dtype: torch.dtype, stop: int = 0) -> list[dict]:
    """Run each configuration through run.setup and run.train_step, in `dtype`, and report from the main process.

    Args:
        stop: after this step a state is saved and everything is set up anew from it; 0 = never.

    Returns:
        For each configuration: "gradients", one dict of arrays by parameter a step, before clipping; "norms"; "losses",
        the meter's; "before" and "weights", before the first step and after the last; "engine", the wrapper's class;
        "teacher", the class of its parameters; "passes", forward passes of the student (not counted: after `stop`).
    """
    compute_in(dtype)
    return [train_one(config, stop) for config in configs]


def live_run(config: dict) -> run.Run:
    """Everything up to the first step, as run.py makes it."""
    path = Path(config["output_dir"]).with_suffix(f".{os.getpid()}.json")
    path.write_text(json.dumps(config))
    args, problems, unknown = run.arguments.parse(["--config", str(path)])
    stores, recipes, tokenizer, problems = run.open_inputs(args, problems, unknown)
    assert not problems, problems
    AcceleratorState._reset_state()
    GradientState._reset_state()
    accelerator = engine.start([], args.tb_dir)
    assert accelerator.num_processes == int(os.environ.get("WORLD_SIZE", 1))
    live = run.setup(args, accelerator, stores, recipes, tokenizer)
    live.model.train()
    return live


def train_one(config: dict, stop: int = 0) -> dict:
    """Run one configuration in this process; `stop` and what is returned are those of `train_steps`."""
    live = live_run(config)
    found = {"gradients": [], "norms": [], "engine": type(live.model).__name__}
    record_gradients(live, found["gradients"])
    passes = []
    live.model.register_forward_hook(lambda *_: passes.append(1))
    found["before"] = _whole(dict(live.model.named_parameters()))
    for step in range(1, live.schedule.steps + 1):
        found["norms"].append(float(run.train_step(live, step)[1]))
        live.steps_done = step
        if step == stop:
            live = _stop_and_go_on(live, config)
            record_gradients(live, found["gradients"])
    found["losses"] = live.meter.read(live.accelerator.num_processes)[0]
    found["weights"] = _whole(dict(live.model.named_parameters()))
    found["teacher"] = None if live.teacher is None else type(next(live.teacher.parameters())).__name__
    found["passes"] = len(passes)
    _leave(live)
    return found if live.accelerator.is_main_process else {}


def record_gradients(live: run.Run, gradients: list[dict]) -> None:
    """From now on each step adds its gradients before clipping, as arrays by parameter name."""
    accelerator = live.accelerator
    clip = accelerator.clip_grad_norm_

    def recorded(parameters, limit):
        gradients.append(_whole({name: p.grad for name, p in live.model.named_parameters()}))
        return clip(parameters, limit)

    accelerator.clip_grad_norm_ = recorded


def _stop_and_go_on(live: run.Run, config: dict) -> run.Run:
    """Save a state and forget everything else; returns what a new start of the same configuration makes of it."""
    run.save_state(live, live.steps_done)
    with live.states:
        live.states.wait()
    _leave(live)
    again = live_run(config)
    assert again.steps_done == live.steps_done
    return again


def _leave(live: run.Run) -> None:
    """Let another run have the folder."""
    live.metrics.close()
    if live.lock:
        live.lock.release()


def _whole(tensors: dict[str, torch.Tensor | None]) -> dict[str, np.ndarray]:
    """By parameter name, without the wrappers' prefixes, as arrays; what is sharded is put together on all processes.

    In one collective for all parameters: a `full_tensor()` for each was a quarter of the time of these tests.
    """
    arrays, sharded = {}, []
    sharing = slice(None)
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            sharded.append(name)
            sharing = slice(tensor.device_mesh.size(-1))  # the first processes share one copy, the next another
            tensor = tensor.to_local()  # some rows, perhaps none
        if tensor is not None:
            arrays[name] = tensor.detach().numpy().copy()
    if sharded:
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, {name: arrays[name] for name in sharded})
        for name in sharded:
            arrays[name] = np.concatenate([part[name] for part in parts[sharing]])
    return {name.removeprefix("module."): array for name, array in arrays.items()}


# -------------------------------------------------------------------------------------- command lines


def run_command(
    *words: str, environment: dict | None = None, folder: Path = ROOT, python: str | Path = sys.executable
) -> subprocess.CompletedProcess:
    """`words` given to a Python of its own, to its end; it has PATIENCE.

    Args:
        environment: the whole of it, instead of this process's.
        python: another than this one.
    """
    _check_mark()
    command = [python, *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=PATIENCE)


def start_command(*words: str, log: Path, environment: dict | None = None) -> subprocess.Popen:
    """Any command, started in the repository; what it prints goes to the end of the file `log`."""
    _check_mark()
    with log.open("a") as console:
        return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=console, stderr=subprocess.STDOUT)
