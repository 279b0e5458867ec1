"""What a start takes: bytes a weight, at the peak, from before the model is read until the engine has it.

python -m pytest tests/training/test_startup_memory.py -s

Counted, not measured: every storage that torch makes in run.setup, as long as it lives. Weights that still lie in the
file, mapped into memory, take none of it.
"""

import json
import os
from pathlib import Path

import pytest
import torch
import toy
from harness import on_processes
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModel

import run
from modeling.backbone import load_backbone
from modeling.versions import in_dtype
from runtime import engine

LARGE = 2**18  # bytes; when a storage of this size comes, all are summed up
SHAPE = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 28}


class Counted(TorchDispatchMode):
    """Counts the bytes of all storages made within it, and remembers the most there were at a time."""

    def __init__(self):
        super().__init__()
        self.alive: dict[int, StorageWeakRef] = {}  # by address, which the reference keeps from being given away
        self.mapped: list[tuple[int, int]] = []
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes here again with the parts
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        given = {storage._cdata for storage in storages((args, kwargs))}
        for storage in storages(result):
            self.note(storage, made=storage._cdata not in given)
        if "split_with_sizes_copy" in str(function):  # FSDP2 has filled storages that it emptied after the last use
            self.look()
        return result

    def note(self, storage: torch.UntypedStorage, made: bool) -> None:
        if storage._cdata in self.alive or (not made and self.is_in_a_file(storage)):
            return
        self.alive[storage._cdata] = StorageWeakRef(storage)
        if storage.nbytes() >= LARGE:
            self.look()

    def look(self) -> None:
        """Sum up what lives now."""
        total = 0
        for key, reference in list(self.alive.items()):
            storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            if storage is None:
                del self.alive[key]
            else:
                total += storage.nbytes()
        self.peak = max(self.peak, total)

    def is_in_a_file(self, storage: torch.UntypedStorage) -> bool:
        """Whether a storage is a piece of a safetensors file that is mapped into memory."""
        address = storage.data_ptr()
        if not any(begin <= address < end for begin, end in self.mapped):
            self.mapped = mapped_files()
        return any(begin <= address < end for begin, end in self.mapped)


def storages(tree) -> list[torch.UntypedStorage]:
    """Of all tensors in a tree of arguments that hold memory."""
    leaves = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    leaves = [leaf for leaf in leaves if not isinstance(leaf, FakeTensor)]  # DTensor asks them for shapes alone
    return [leaf.untyped_storage() for leaf in leaves if leaf.device.type == "cpu"]


def mapped_files() -> list[tuple[int, int]]:
    """Where safetensors files lie in memory, first byte and the one behind the last."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    bounds = [line.split()[0].split("-") for line in lines if line.endswith(".safetensors")]
    return [(int(begin, 16), int(end, 16)) for begin, end in bounds]


def start(rank: int, world: int, config: dict) -> list[float]:
    """Set up a run, and return [peak, own part], both in bytes a weight of model and teacher."""
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # a counter sees its own thread alone
    path = Path(config["output_dir"]).with_suffix(f".{os.getpid()}.json")
    path.write_text(json.dumps(config))
    args, problems, unknown = run.arguments.parse(["--config", str(path)])
    stores, recipes, tokenizer, problems = run.open_inputs(args, problems, unknown)
    assert problems == []
    accelerator = engine.start([], args.tb_dir)
    assert accelerator.num_processes == world
    with Counted() as counted:
        live = run.setup(args, accelerator, stores, recipes, tokenizer)
    models = [model for model in (live.model, live.teacher) if model is not None]
    parameters = [parameter for model in models for parameter in model.parameters()]
    weights = sum(parameter.numel() for parameter in parameters)
    own = sum(local(parameter).untyped_storage().nbytes() for parameter in parameters)
    live.metrics.close()
    if live.lock:
        live.lock.release()
    return [counted.peak / weights, own / weights]


def local(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter.detach()


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A decoder of 17 million weights, in bf16 on disk as decoders come."""
    folder = tmp_path_factory.mktemp("large") / "backbone"
    config = toy.config()
    for key, value in SHAPE.items():
        setattr(config, key, value)
    config.layer_types = ["full_attention"] * config.num_hidden_layers
    torch.manual_seed(0)
    AutoModel.from_config(config, **in_dtype(torch.bfloat16)).save_pretrained(folder)
    toy.make_tokenizer(folder)
    return folder


@pytest.mark.processes
def test_a_start_in_parts_takes_little_more_than_the_parts(large, settings):
    config = settings | {"model_path": str(large)}
    found = on_processes(2, start, config, kind="fsdp", extra={"ACCELERATE_MIXED_PRECISION": "bf16"})
    print(f"two processes: [peak, own] bytes a weight: {found}")
    for rank, (peak, own) in enumerate(found):
        assert own == pytest.approx(4 / 2, rel=0.01)
        if rank == 0:
            assert 3.9 < peak <= 4.0  # it reads the model, and begins with the smallest weights
        else:
            assert own <= peak <= 1.2 * own


@pytest.mark.processes
def test_a_teacher_is_read_by_one_process_and_shared_out_too(large, settings):
    """In bf16, 2 bytes a weight, that stay in their file until they are sent; the student is a thousandth of it."""
    config = settings | {"teacher_model_path": str(large)}
    found = on_processes(2, start, config, kind="fsdp", extra={"ACCELERATE_MIXED_PRECISION": "bf16"})
    print(f"two processes and a teacher: [peak, own] bytes a weight: {found}")
    for peak, own in found:
        assert own == pytest.approx(2 / 2, rel=0.01)
        assert own <= peak <= 1.3 * own


@pytest.mark.processes
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_start_alone_takes_little_more_than_the_model(large, settings, precision):
    config = settings | {"model_path": str(large)}
    [(peak, own)] = on_processes(1, start, config, extra={"ACCELERATE_MIXED_PRECISION": precision})
    print(f"one process, {precision}: {peak:.2f} bytes a weight")
    assert own == pytest.approx(4, rel=0.01)
    assert own <= peak <= 1.1 * own


def test_a_model_for_a_gpu_never_lies_in_main_memory_as_a_whole(large, monkeypatch):
    """The meta device stands in for a GPU: what is copied to it leaves main memory."""
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    with Counted() as counted:
        model = load_backbone(str(large), torch.float32, device=torch.device("meta"))
    weights = sum(parameter.numel() for parameter in model.parameters())
    largest = max(parameter.numel() for parameter in model.parameters())
    assert all(parameter.is_meta and parameter.dtype == torch.float32 for parameter in model.parameters())
    assert counted.peak <= 8 * largest < 0.2 * weights
    with Counted() as counted:
        load_backbone(str(large), torch.float32)
    assert counted.peak > 3.9 * weights  # what the counter sees on the CPU
