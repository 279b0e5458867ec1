"""run.py on a stand-in for GPUs: every path that asks for CUDA or NCCL, with real numbers (tests/stand_in).

python -m pytest tests/runtime/test_stand_in.py
"""

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import toy
from conftest import train_here
from harness import ENGINES, PATIENCE, ROOT, free_port, start_command
from safetensors.torch import load_file
from stand_in.gpu import build_library

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA's own library"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    return build_library(tmp_path_factory.mktemp("library"))


@dataclass
class Results:
    """Of one process."""

    printed: str
    statuses: list[int]  # of its runs
    waits: list[list[dict[str, int]]]  # of each run's steps


def environment_of(library: Path, **more: str) -> dict[str, str]:
    paths = f"{ROOT / 'tests'}{os.pathsep}{ROOT}"
    own = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    return own | {"LD_PRELOAD": str(library), "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | more


def train_on_stand_in(library: Path, folder: Path, configs: list[dict], world: int = 1, **environment: str) -> list:
    """Runs with these configurations, one after another, on `world` processes with a GPU each: a Results of each."""
    paths = []
    for number, config in enumerate(configs):
        paths.append(folder / f"{number}.json")
        paths[-1].write_text(json.dumps(config))
    launched = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    started = []
    for rank in range(world):
        own = environment
        if world > 1:
            own = environment | {name: str(value) for name, value in launched.items()}
            own |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        program = ROOT / "tests/stand_in/program.py"
        words = [sys.executable, str(program), str(folder / f"results.{rank}.json"), *map(str, paths)]
        started.append(start_command(*words, log=folder / f"log.{rank}", environment=environment_of(library, **own)))
    results = []
    for rank, process in enumerate(started):
        process.wait(PATIENCE)
        printed = (folder / f"log.{rank}").read_text()
        assert process.returncode == 0, printed
        runs = json.loads((folder / f"results.{rank}.json").read_text())
        results.append(Results(printed, [run["status"] for run in runs], [run["waits"] for run in runs]))
    return results


def test_the_stand_in_refuses_notes_and_delays_what_a_gpu_does(library, tmp_path):
    process = start_command(
        sys.executable, str(ROOT / "tests/stand_in/proof.py"), log=tmp_path / "log", environment=environment_of(library)
    )
    process.wait(PATIENCE)
    assert (tmp_path / "log").read_text().endswith("proved\n")


def test_a_run_on_one_gpu_with_everything_a_resume_and_lora(library, settings, tmp_path):
    """In bf16, which nobody asked for, by FlashAttention; no step waits for the GPU."""
    toy.write_retrieval_set(tmp_path / "sets" / "first")
    settings |= {"num_hard_neg": 2, "log_interval": 1, "validation_steps": 2, "checkpointing_steps": 2}
    everything = settings | {
        "use_mrl": True, "mask_same_text": True, "max_tokens_per_forward": 512,
        "teacher_model_path": settings["model_path"], "evaluation_data_path": str(tmp_path / "sets"),
        "evaluation_steps": 2, "best_metric": "nDCG@10", "scheduler_type": "constant_with_warmup", "train_steps": 2,
    }  # fmt: skip
    lora = settings | {
        "experiment_id": "lora", "use_lora": True, "lora_dropout": 0.2, "gradient_checkpointing": True, "train_steps": 2
    }  # fmt: skip
    buckets = settings | {"experiment_id": "buckets", "attn_backend": "buckets", "train_steps": 2}
    [found] = train_on_stand_in(library, tmp_path, [everything, everything | {"train_steps": 4}, lora, buckets])
    assert found.statuses == [0] * 4, found.printed
    assert found.waits[:3] == [[{}] * 2] * 3, found.printed
    for waits in found.waits[3]:  # Transformers looks for packed texts in each rectangle
        assert all("transformers/" in wait for wait in waits)
    assert found.printed.count("mixed precision: bf16, attention: varlen (flash_attn.flash_attn_varlen_func)") == 3
    assert "2 parts" in found.printed
    assert "this update is left out" not in found.printed
    assert "continuing after step 2 of 4" in found.printed
    folder = Path(settings["output_dir"])
    for name in ("toy/step_2", "toy/step_4", "toy/best", "lora/step_2"):
        assert any((folder / name).glob("*.safetensors"))


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_gpus_train_what_one_cpu_trains(library, settings, tmp_path, kind):
    """In fp32, in parts; with collectives as NCCL takes them."""
    settings |= {"checkpointing_steps": 2, "max_tokens_per_forward": 512, "train_steps": 2, "attn_backend": "segments"}
    expected = load_file(train_here(settings | {"experiment_id": "cpu"}) / "step_2" / "model.safetensors")
    engine = {name: value for name, value in ENGINES[kind].items() if name != "ACCELERATE_USE_CPU"}
    two = settings | {"train_batch_size": settings["train_batch_size"] // 2}
    results = train_on_stand_in(library, tmp_path, [two], world=2, ACCELERATE_MIXED_PRECISION="no", **engine)
    for result in results:
        assert result.statuses == [0]
        [(first, second)] = result.waits
        assert second == {}
        assert all("two_pass" in wait for wait in first)  # once in a run, where DDP's buckets are agreed upon
        assert "FutureWarning" not in result.printed
    found = load_file(Path(settings["output_dir"]) / "toy" / "step_2" / "model.safetensors")
    untrained = load_file(Path(settings["model_path"]) / "model.safetensors")
    assert found.keys() == expected.keys()
    moved = max((expected[name] - untrained[name]).abs().max() for name in expected)
    off = max((found[name] - expected[name]).abs().max() for name in expected)
    print(f"moved {moved:.1e}, off {off:.1e}")
    assert moved > 1e-4
    assert off < 1e-2 * moved


def test_the_benchmark_for_gpus_runs_on_one(library, tmp_path):
    """Its paths for CUDA. Where the profiler fails, no more than the shares of time is left out."""
    words = ["--sizes", "toy", "--steps", "2", "--tuples", "2", "--compile", "none", "--parts", "equality,speed"]
    words += ["--kinds", "full", "--lengths", "MS-MARCO-like", "--output", str(tmp_path / "gpu")]
    program = str(ROOT / "tests/stand_in/benchmark.py")
    log = tmp_path / "log"
    process = start_command(sys.executable, program, *words, log=log, environment=environment_of(library))
    process.wait(PATIENCE)
    printed = log.read_text()
    assert process.returncode == 0, printed
    report = json.loads((tmp_path / "gpu" / "gpu_equality_speed_toy.json").read_text())
    assert report["left_out"] == [], printed
    [equality], [speed] = report["equality"], report["speed"]
    assert equality["backend"] == "varlen"
    assert sum("gradients" in way for way in equality["ways"]) == 8
    ways = {way["way"]: way for way in speed["ways"]}
    assert ways["ours"]["waits"] == 0
    assert ways["published layout"]["waits"] > 0
    assert ways["ours"]["shares"] == {}
    assert ways["ours"]["loss"] == pytest.approx(ways["published layout"]["loss"], rel=1e-2)
