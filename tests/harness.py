"""Real gloo processes for tests: forked from a clean server, connected as a launcher would connect them.

Imported by tests only. `train_steps` runs the door's own setup and train_step in each of them.
"""

import contextlib
import json
import os
import socket
import sys
import traceback
from pathlib import Path
from queue import Empty

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
import transformers
from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

import run
from modeling.backbone import load_backbone
from runtime import engine
from training import setup

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


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def launcher_environment(rank: int, world: int, port: int, kind: str = "ddp") -> dict[str, str]:
    """What torchrun or accelerate launch would set."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in ranks.items()} | ENGINES[kind]


def server():
    """Processes forked from a server that has imported everything and computed nothing.

    A fork of the test process itself would hang: its OpenMP, Arrow and tokenizer threads are not in the child.
    """
    here = Path(__file__).parent
    os.environ["PYTHONPATH"] = f"{here}{os.pathsep}{here.parent}"  # where the server finds what it imports ahead
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["harness"])
    return context


def _worker(rank: int, world: int, port: int, kind: str, extra: dict, function, arguments: tuple, queue) -> None:
    os.environ.pop("ACCELERATE_USE_CPU", None)
    os.environ |= launcher_environment(rank, world, port, kind) if world > 1 else {"ACCELERATE_USE_CPU": "true"}
    os.environ |= extra
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    PartialState._reset_state()
    sys.stdout = open(os.devnull, "w")
    try:
        queue.put((rank, function(rank, world, *arguments), None))
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def on_processes(world: int, function, *arguments, kind: str = "ddp", extra: dict | None = None) -> list:
    """What `function(rank, world, *arguments)` returns on each of `world` processes, by rank."""
    context = server()
    queue, port = context.Queue(), free_port()
    workers = [
        context.Process(target=_worker, args=(rank, world, port, kind, extra or {}, function, arguments, queue))
        for rank in range(world)
    ]
    for worker in workers:
        worker.start()
    found: dict[int, tuple] = {}
    while len(found) < world:
        with contextlib.suppress(Empty):
            rank, value, error = queue.get(timeout=1)
            found[rank] = value, error
            continue
        for rank, worker in enumerate(workers):  # ended without a word: os._exit, or a signal
            if not worker.is_alive() and rank not in found and queue.empty():
                found[rank] = None, f"process {rank} ended with status {worker.exitcode}"
    for worker in workers:
        worker.join(10)
    failures = [error for _, error in found.values() if error]
    assert not failures, "\n".join(failures)
    return [found[rank][0] for rank in range(world)]


def through_the_door(rank: int, world: int, config: dict) -> int:
    """run.main with this configuration, as a launched process would; returns its exit status."""
    path = Path(config["cache_dir"]).parent / f"{config['experiment_id']}.{rank}.json"
    path.write_text(json.dumps(config))
    return run.main(["--config", str(path)])


def compute_in(dtype: torch.dtype) -> None:
    """Models of this process are of this dtype throughout."""
    setup.load_backbone = lambda path, _: load_backbone(path, dtype)
    if dtype == torch.float64:  # Transformers rounds to fp32 here, where a difference of 1e-16 can become one of 1e-7
        Qwen3RMSNorm.forward = lambda self, x: F.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)


def through_the_door_in_fp64(rank: int, world: int, config: dict) -> int:
    """The same; saved weights are fp32 as always."""
    compute_in(torch.float64)
    return through_the_door(rank, world, config)


def train_steps(rank: int, world: int, configs: list[dict], dtype: torch.dtype) -> list[dict]:
    """Run each configuration through run.setup and run.train_step, in `dtype`, and report from the main process.

    Returns:
        For each configuration: "gradients", one dict of arrays by parameter a step, before clipping; "norms"; "losses",
        the meter's; and "weights" at the end.
    """
    compute_in(dtype)
    return [_train(config, dtype) for config in configs]


def _train(config: dict, dtype: torch.dtype) -> dict:
    path = Path(config["output_dir"]).with_suffix(f".{os.getpid()}.json")
    path.write_text(json.dumps(config))
    args, problems, unknown = run.arguments.parse(["--config", str(path)])
    stores, tokenizer, problems = run.find_problems(args, problems, unknown)
    assert problems == []
    AcceleratorState._reset_state()
    GradientState._reset_state()
    accelerator = engine.start([], args.tb_dir)
    assert accelerator.num_processes == int(os.environ.get("WORLD_SIZE", 1))
    live = run.setup(args, accelerator, stores, tokenizer)
    found = {"gradients": [], "norms": [], "engine": type(live.model).__name__}
    clip = accelerator.clip_grad_norm_

    def recorded(parameters, limit):
        found["gradients"].append(_whole({name: p.grad for name, p in live.model.named_parameters()}))
        return clip(parameters, limit)

    accelerator.clip_grad_norm_ = recorded
    live.model.train()
    for step in range(1, live.schedule.steps + 1):
        found["norms"].append(run.train_step(live, step)[1])
    found["losses"] = live.meter.read(accelerator.num_processes)[0]
    found["weights"] = _whole(dict(live.model.named_parameters()))
    found["teacher"] = None if live.teacher is None else type(next(live.teacher.parameters())).__name__
    live.metrics.close()
    if live.lock:
        live.lock.release()
    return found if accelerator.is_main_process else {}


def _whole(tensors: dict[str, torch.Tensor | None]) -> dict:
    """By parameter name, without the wrappers' prefixes, as arrays; gathers what is sharded."""
    whole = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in tensors.items() if t is not None}
    return {name.removeprefix("module."): tensor.detach().numpy().copy() for name, tensor in whole.items()}
