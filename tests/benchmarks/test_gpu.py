"""`python -m benchmarks.gpu` runs whole on a CPU at toy size; what only a GPU does is told by stand-ins.

python -m pytest tests/benchmarks/test_gpu.py
"""

import json
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from benchmarks import gpu, gpu_equality, gpu_model, gpu_profile, gpu_run, gpu_speed, gpu_table
from benchmarks.common import Budget
from benchmarks.gpu_equality import Way
from benchmarks.gpu_trainee import Step, Trainee, Variant, work_of
from benchmarks.lengths import tuples
from training import memory
from utils import RunError

CPU = torch.device("cpu")
TOY = ["--sizes", "toy", "--steps", "2", "--tuples", "2", "--minutes", "60", "--compile"]


def measure(folder, *flags: str, compiler: str = "none") -> dict:
    assert gpu.main([*TOY, compiler, "--output", str(folder), *flags]) == 0
    (path,) = folder.iterdir()  # what a run wrote beside it is removed
    return json.loads(path.read_text())


# ---------------------------------------------------------------------------------------------- whole


def test_equality_and_speed_at_toy_size(tmp_path, capsys):
    flags = ("--parts", "equality,speed", "--kinds", "full", "--lengths", "MS-MARCO-like")
    report = measure(tmp_path, *flags, compiler="eager")
    assert report["left_out"] == []
    (equality,) = report["equality"]
    names = [way["way"] for way in equality["ways"]]
    assert names == [
        *("padded, recomputed", "padded", "buckets", "buckets, recomputed", "segments", "segments, recomputed"),
        *("segments, compiled", "segments, compiled, recomputed"),
    ]
    for way in equality["ways"]:
        assert 1e-3 < way["embeddings"] < 0.1  # bf16 rounds, also on a CPU
        assert 1e-3 < way["gradients"] < 0.2
        assert not way["worse"]
    (table,) = report["speed"]
    theirs = ["Sentence Transformers, cached, 32 at a time"] if find_spec("sentence_transformers") else []
    check_table(table, ["published layout", "ours", "ours, compiled", *theirs])
    printed = capsys.readouterr().out
    assert "\n  published layout   " in printed  # a row of the table
    assert "\nspeed-up: over the published layout. MFU: " in printed  # what the columns mean
    not_measured = [target["target"] for target in report["targets"] if target["verdict"] == "not measured"]
    assert len(not_measured) == 2 * 7 + 2  # of the two published sizes, and of the part that was not run
    assert all(f"\n{target['target']} " in printed for target in report["targets"])


def test_lora_at_toy_size_beside_a_piece_that_fails(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("no such kernel\n(more)")

    monkeypatch.setattr(gpu, "measure_equality", fail)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)  # installed, and cannot be imported
    flags = ("--parts", "equality,speed", "--kinds", "LoRA", "--lengths", "MS-MARCO-like", "--tuples", "1")
    report = measure(tmp_path, *flags)
    assert report["left_out"] == [{"what": "equality of toy", "reason": "failed: RuntimeError: no such kernel"}]
    (table,) = report["speed"]
    assert (table["kind"], table["tuples"]) == ("LoRA", 1)
    check_table(table, ["published layout", "ours"])
    left_out = {way["way"]: way["left_out"] for way in table["ways"] if "left_out" in way}
    assert left_out.keys() == {"ours, compiled", "Sentence Transformers, cached"}
    assert left_out["ours, compiled"] == "--compile none"
    assert "cannot be imported: ModuleNotFoundError" in left_out["Sentence Transformers, cached"]
    console = capsys.readouterr()
    assert "ours, compiled                                --compile none" in console.out
    assert "Traceback" in console.err


def check_table(table: dict, names: list[str]) -> None:
    ways = {way["way"]: way for way in table["ways"] if "left_out" not in way}
    assert list(ways) == names
    ours = [name for name in names if name.startswith("ours")]
    assert len({round(ways[name]["loss"], 4) for name in ["published layout", *ours]}) == 1  # one function
    for way in ways.values():
        assert way["loss"] > 0.1
        assert way["steps"] == 2
        assert way["seconds"] > 0
        assert sum(way["shares"].values()) == pytest.approx(1, abs=0.05)
        assert min(way["shares"]["matmul"], way["shares"]["attention"]) > 0
    assert [ways[name]["waits"] for name in ours] == [0] * len(ours)
    assert ways["published layout"]["waits"] > 0  # it lays the tokens into their rectangle by a mask
    assert table["expected_peak_bytes"] > 1e6


@pytest.mark.processes
def test_a_real_run_at_toy_size_is_killed_and_ends_the_same(tmp_path, capsys):
    report = measure(tmp_path, "--parts", "run", "--deterministic")
    assert report["left_out"] == []
    (run,) = report["runs"]
    assert run["steps"] == 60
    assert run["states"]
    assert all(state["stall_seconds"] is not None and state["megabytes"] > 0 for state in run["states"])
    assert [folder["step"] for folder in run["folders"]] == [41, 60]
    assert 1 <= run["resumed_after_step"] < run["killed_after_step"] < 60
    assert run["largest_loss_difference"] == 0
    assert run["same_bits"]
    assert list(tmp_path.iterdir()) == [tmp_path / "gpu_run_toy.json"]
    printed = capsys.readouterr().out
    assert "the same bits at the end, asked to be deterministic" in printed
    assert "files that differ after a kill" in printed


def test_what_does_not_fit_is_named(tmp_path, capsys):
    report = measure(tmp_path, "--minutes", "0")
    left_out = ["equality of toy", "speed of toy, full", "speed of toy, LoRA", "run of toy"]
    assert [entry["what"] for entry in report["left_out"]] == left_out
    assert {target["verdict"] for target in report["targets"]} == {"not measured"}
    assert capsys.readouterr().out.count("left out: ") == 4


def test_a_mistyped_name_is_refused(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--parts", "equality,sped"])
    assert "'sped' is not one of equality, speed, run" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------- equality


def plain(q, k, v, starts, longest, scale, causal=True):
    texts = []
    for begin, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        rows = [x[begin:end].transpose(0, 1)[None] for x in (q, k, v)]
        texts.append(F.scaled_dot_product_attention(*rows, is_causal=causal, scale=scale, enable_gqa=True)[0])
    return torch.cat(texts, dim=1).transpose(0, 1)


def sees_what_follows(*words):
    return plain(*words, causal=False)


def loses_a_gradient(q, k, v, *rest):
    return plain(q, k.detach(), v, *rest)


def is_missing(*_):
    raise RuntimeError("FlashAttention only supports Hopper GPUs or newer.")


def test_a_wrong_kernel_is_found_by_its_values_or_its_gradients(monkeypatch):
    kernels = (plain, sees_what_follows, loses_a_gradient, is_missing)
    ways = [Way(kernel.__name__, "varlen", False, kernel) for kernel in kernels]
    monkeypatch.setattr(gpu_equality, "_ways", lambda device: ways)
    rows = {row["way"]: row for row in gpu_equality.measure_equality("toy", CPU, "none")["ways"]}
    assert not rows["plain"]["worse"]
    assert rows["sees_what_follows"]["worse"]
    assert rows["loses_a_gradient"]["worse"]
    assert rows["loses_a_gradient"]["embeddings"] == rows["plain"]["embeddings"]
    assert "Hopper" in rows["is_missing"]["left_out"]


# ------------------------------------------------------------------------------- waits, shares of time


def test_waits_are_counted_where_they_are():
    x = torch.arange(4.0)
    assert gpu_profile.count_waits(lambda: x + 1, CPU) == {}
    assert gpu_profile.count_waits(lambda: (float(x.sum()), x[x > 1]), CPU) == {
        "_local_scalar_dense": 1,
        "index by a mask": 1,
    }


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NNT", "matmul"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm>", "matmul"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float>", "matmul"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel", "attention"),
        ("void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90>>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80", "attention"),
        ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL", "communication"),
        ("triton_poi_fused_mul_silu_3", "elementwise and other"),
        ("void at::native::vectorized_elementwise_kernel<4>", "elementwise and other"),
        ("Memcpy DtoD (Device -> Device)", "elementwise and other"),
    ],
)
def test_kernels_are_known_by_their_names(name, kind):
    assert gpu_profile.kind_of(name) == kind


def kernel(name: str, start: float, end: float) -> SimpleNamespace:
    return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start))


def test_kernels_that_run_beside_each_other_leave_the_rest_idle():
    kernels = [kernel("gemm", 100, 140), kernel("nccl", 120, 160), kernel("flash", 180, 190)]
    shares = gpu_profile.shares_of_kernels(kernels, seconds=100e-6)
    expected = {"matmul": 0.4, "communication": 0.4, "attention": 0.1, "elementwise and other": 0, "idle": 0.3}
    assert shares == pytest.approx(expected)


# ----------------------------------------------------------------------------------------------- speed


def test_a_plan_says_the_peak_that_training_counts_with():
    model = gpu_model.build(gpu_model.config_of("toy"), lora=False, device=CPU)
    cost = memory.cost_of(model)
    count = sum(weight.numel() for weight in model.parameters())
    lengths = tuples("MS-MARCO-like", 256)
    ample = gpu_model.plan_step(model, cost, 64 * 2**30, lengths, CPU)
    kept = int(lengths.sum()) * cost.per_token(0)
    assert (ample.recompute_every, ample.max_tokens_per_forward > lengths.sum()) == (0, True)
    assert 16 * count + kept < ample.expected_bytes < 20 * count + 1.1 * kept
    scarce = gpu_model.plan_step(model, cost, 2**30 / memory.USABLE + memory.SPARE, lengths, CPU)
    assert scarce.max_tokens_per_forward < lengths.sum() or scarce.recompute_every
    assert scarce.expected_bytes < 0.9 * ample.expected_bytes


def test_only_the_compiled_variant_runs_compiled_also_where_layers_are_recomputed():
    runs = []

    def compiler(graph, inputs):
        def run(*tensors):
            runs.append(graph)
            return graph(*tensors)

        return run

    trainee = Trainee(gpu_model.build(gpu_model.config_of("toy"), lora=False, device=CPU), CPU)
    assert trainee.compile_layers(compiler) == []
    work = work_of("MS-MARCO-like", 1, 512, CPU)
    ours = trainee.update(work, Variant("ours", "segments"))
    runs.clear()
    trainee.update(work, Variant("ours", "segments", recompute_every=1))
    assert not runs
    compiled = trainee.update(work, Variant("ours, compiled", "segments", recompute_every=1, compiled=True))
    assert len(runs) >= 2 * 2  # both layers, in both passes
    assert float(compiled) == pytest.approx(float(ours), rel=1e-4)


class TooSmall:
    """Stands in for a Trainee: memory for 10 texts at once, and none for what is padded."""

    def __init__(self):
        self.tried = []

    def try_step(self, work, variant):
        self.tried.append(variant.texts_at_once)
        fits = variant.backend != "padded" or 0 < variant.texts_at_once <= 10
        return Step(1.0, 0, 0.5) if fits else None


def test_the_cached_loss_takes_as_many_texts_at_once_as_fit():
    trainee = TooSmall()
    cached = Variant("cached", "padded", texts_at_once=32)
    assert gpu_speed.largest_that_fits(trainee, None, cached).texts_at_once == 8
    assert trainee.tried == [32, 16, 8]
    assert gpu_speed.largest_that_fits(trainee, None, Variant("published", "padded")) is None


def test_a_variant_that_runs_out_of_memory_later_is_dropped_and_the_time_is_kept():
    ours, published = Variant("ours", "segments"), Variant("published", "padded")
    steps = gpu_speed.take_turns(TooSmall(), None, [published, ours], 3, Budget(1))
    assert {variant.name: len(found) for variant, found in steps.items()} == {"ours": 3}
    assert gpu_speed.take_turns(TooSmall(), None, [ours], 3, Budget(0)) == {ours: []}


# ------------------------------------------------------------------------------------------- a real run


def watched(*lines: tuple[float, str]) -> gpu_run.Watched:
    return gpu_run.Watched(list(lines), began=90.0, status=0)


def test_a_stall_is_how_much_later_the_next_step_comes(tmp_path):
    timing = {"kind": "train", "tuples_per_second": 8.0, "tokens_per_second": 800.0, "peak_gib": 1.5}
    (tmp_path / "timings.jsonl").write_text(f"{json.dumps(timing)}\n" * 12)
    at = {1: 100, 2: 101, 3: 102, 4: 103, 5: 104, 6: 107, 7: 108, 8: 109.5, 9: 110.5, 10: 120.5, 11: 121.5, 12: 122.5}
    lines = [(seconds, f"step {step}/12 | epoch 0.1 | retrieval") for step, seconds in at.items()]
    lines += [
        (106.5, "step 5/12 | state output/run/state/step_5, 7,152.1 MB in 2.1 s"),
        (109.9, "step 7/12 | state output/run/state/step_7, 7,152.1 MB in 4.0 s, of which training waited 0.42"),
        (112.0, "step 9/12 | state output/run/state/step_9, 7,152.1 MB in 1.0 s"),
        (113.0, "step 9/12 | saved output/run/step_9, read back and compared"),
        (123.0, "step 12/12 | saved output/run/step_12, read back and compared"),
    ]
    found = gpu_run.describe_run(watched(*lines), tmp_path)
    assert (found["step_seconds"], found["start_seconds"], found["steps"]) == (1.0, 10.0, 12)
    first = {"step": 5, "megabytes": 7152.1, "seconds": 2.1, "waited_seconds": 2.1, "stall_seconds": 2.0}
    second = {"step": 7, "megabytes": 7152.1, "seconds": 4.0, "waited_seconds": 0.42, "stall_seconds": 0.5}
    assert found["states"] == [first, second]
    assert found["folders"] == [{"step": 9, "stall_seconds": 9.0}, {"step": 12, "stall_seconds": None}]


def test_a_run_is_killed_some_steps_after_its_first_state():
    is_time = gpu_run.StepsAfterState()
    lines = [f"step {step}/30 | epoch 0.10 | retrieval" for step in range(1, 6)]
    assert not any(is_time(line) for line in lines)
    assert not is_time("step 4/30 | state output/run/state/step_4, 1.0 MB in 0.1 s")
    assert not is_time("step 6/30 | epoch 0.10 | retrieval")
    assert is_time("step 7/30 | epoch 0.10 | retrieval")


def test_a_run_that_fails_says_its_last_lines(tmp_path, monkeypatch):
    (tmp_path / "run.py").write_text("import sys\nprint('step 1/9 | epoch 0.1')\nsys.exit('no memory')\n")
    monkeypatch.setattr(gpu_run, "ROOT", tmp_path)
    config = {"output_dir": str(tmp_path / "output"), "experiment_id": "made_up"}
    with pytest.raises(RunError, match=r"ended with 1: step 1/9 \| epoch 0.1 / no memory"):
        gpu_run.train(config, ends=gpu_run.time.monotonic() + 60)
    with pytest.raises(RunError, match="before it could be killed"):
        gpu_run.train(config, gpu_run.time.monotonic() + 60, kill_when=lambda line: False)


def test_a_failure_that_explains_itself_has_no_traceback(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise RunError("run.py ended with 1: no memory")

    monkeypatch.setattr(gpu, "measure_equality", fail)
    report = measure(tmp_path, "--parts", "equality")
    assert report["left_out"] == [{"what": "equality of toy", "reason": "failed: run.py ended with 1: no memory"}]
    assert "Traceback" not in capsys.readouterr().err


# --------------------------------------------------------------------------------------------- targets


def row(way: str, seconds: float, peak: float = 10.0, waits: int = 0) -> dict:
    return {"way": way, "seconds": seconds, "peak_bytes": peak, "waits": waits}


def test_targets_are_judged_by_the_figures():
    def table(lengths: str, published: float, ours: float, compiled: float, **more) -> dict:
        ways = [row("published layout", published), row("ours", ours, **more), row("ours, compiled", compiled)]
        facts = {"size": "0.6B", "kind": "full", "lengths": lengths, "flops": 50.0, "expected_peak_bytes": 9.5}
        return facts | {"ways": ways}

    tables = [table("heavy-tailed", 6.0, 1.5, 1.0), table("MS-MARCO-like", 2.5, 1.25, 2.0, peak=11.0, waits=2)]
    equality = [{"size": "0.6B", "ways": [{"way": "padded", "worse": False}, {"way": "buckets", "left_out": "why"}]}]
    run = {"size": "0.6B", "deterministic": True, "same_bits": False, "largest_loss_difference": 0.003}
    run["states"] = [{"stall_seconds": 0.2}, {"stall_seconds": 1.4}, {"stall_seconds": None}]
    report = {"equality": equality, "speed": tables, "runs": [run], "matmul_flops": 100.0}
    found = {target["target"]: (target["figure"], target["verdict"]) for target in gpu_table.judge(report)}
    assert found == {
        "0.6B: ways that are worse than padded bf16": (0, "met"),
        "0.6B: heavy-tailed, over the published layout": (6.0, "met"),
        "0.6B: MS-MARCO-like, over the published layout": (2.0, "not met"),
        "0.6B: long documents, over the published layout": (None, "not measured"),
        "0.6B: MFU, lowest": (0.4, "met"),
        "0.6B: peak memory, off the expected": (pytest.approx(11 / 9.5 - 1), "not met"),
        "0.6B: waits for the device in a step": (2, "not met"),
        "4B: ways that are worse than padded bf16": (None, "not measured"),
        "4B: heavy-tailed, over the published layout": (None, "not measured"),
        "4B: MS-MARCO-like, over the published layout": (None, "not measured"),
        "4B: long documents, over the published layout": (None, "not measured"),
        "4B: MFU, lowest": (None, "not measured"),
        "4B: peak memory, off the expected": (None, "not measured"),
        "4B: waits for the device in a step": (None, "not measured"),
        "0.6B: stall of a state": (1.4, "not met"),
        "0.6B: losses after a kill": (0.003, "met"),
        "0.6B: files that differ after a kill": (1, "not met"),
    }
