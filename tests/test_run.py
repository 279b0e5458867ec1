"""The training door: what a run writes, golden losses, and what its keys change. Refusals: test_run_refusals.py.

python -m pytest tests/test_run.py

The golden losses are remade, after a change that is meant to change them, by

    UPDATE_GOLDEN=1 python -m pytest tests/test_run.py -k golden
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
from conftest import flags, read_metrics, tokenize
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import run
from data import cache, plan
from losses import hard_negative_loss, in_batch_loss
from model import Embedder
from modeling.backbone import load_backbone
from modeling.packing import MULTIPLE
from training.plot import draw
from training.schedule import Schedule

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden" / "tiny_run.json"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


# ---------------------------------------------------------------------------------------- outputs


def test_a_run_leaves_everything_it_promises(train, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "draw", draw)
    folder = train(train_steps=-1, train_epochs=2, checkpointing_steps=15, validation_steps=11, report_to="tensorboard")
    steps = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    args = json.loads((folder / "args.json").read_text())
    assert args == run.arguments.parse(["--config", str(folder / "args.json")])[0].__dict__
    assert args["num_processes"] == 1
    assert (folder / "training.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "manifest.json").read_text())["data"].keys() == {
        f"toy_{task}" for task in ("retrieval", "clustering", "classification")
    }
    # 198 retrieval, 29 clustering and 29 classification tuples in batches of 8: 25 + 4 + 4 steps an epoch.
    assert steps == 2 * 33
    folders = {path.name for path in folder.iterdir() if path.is_dir()}
    assert folders == {"epoch_1", "epoch_2", "step_15", "step_30", "step_45", "step_60", "state"}

    trained = read_metrics(folder, "train")
    assert [line["step"] for line in trained] == list(range(2, 67, 2))
    assert trained[-1]["epoch"] == 2
    rates = {"padding", "imbalance"}
    assert trained[0].keys() == {"step", "kind", "epoch", "lr", "grad_norm", "losses"} | rates
    validated = read_metrics(folder, "validation")
    assert [line["step"] for line in validated] == list(range(11, 67, 11))  # 33 and 66 also end epochs: once each
    measures = validated[0]["measures"]
    assert measures["toy_retrieval"].keys() == {"in_batch", "hard", "group_accuracy", "group_mrr"}
    assert measures["toy_clustering"].keys() == {"hard", "group_accuracy", "group_mrr"}
    assert 0 <= measures["toy_retrieval"]["group_accuracy"] <= measures["toy_retrieval"]["group_mrr"] <= 1

    events = EventAccumulator(str(tmp_path / "tb" / "toy")).Reload()
    tags = set(events.Tags()["scalars"])
    assert {
        "lr",
        "toy_retrieval/training_loss_in_batch", "toy_retrieval/training_loss_hard", "toy_clustering/training_loss_hard",
        "Avg/retrieval/training_loss_in_batch", "Avg/retrieval/training_loss_hard", "Avg/clustering/training_loss_hard",
        "Avg/classification/training_loss_hard",
        "toy_retrieval/valid_loss_in_batch", "toy_retrieval/valid_loss_hard", "Avg/classification/valid_loss_hard",
    } <= tags  # fmt: skip
    assert "toy_clustering/training_loss_in_batch" not in tags  # in-batch loss for retrieval only
    assert [event.step for event in events.Scalars("lr")] == list(range(2, 67, 2))


def test_the_resolved_configuration_runs_again_to_the_same_weights(train, tmp_path):
    first = train(train_steps=6)
    again = json.loads((first / "args.json").read_text()) | {"experiment_id": "again"}
    path = tmp_path / "again.json"
    path.write_text(json.dumps(again))
    second = train(**again)
    for name, weight in weights(first / "step_6").items():
        assert torch.equal(weight, weights(second / "step_6")[name])


def test_training_moves_every_weight_and_lowers_the_loss(train, toy_world):
    folder = train(train_steps=60, log_interval=10, learning_rate=5e-3)
    before = weights(toy_world.backbone)
    assert all(not torch.equal(before[name], weight) for name, weight in weights(folder / "step_60").items())
    losses = [line["losses"]["toy_retrieval"]["in_batch"] for line in read_metrics(folder, "train")]
    assert losses[-1] < losses[0] - 1


def test_the_logged_rate_is_that_of_the_update(train):
    folder = train(train_steps=6, log_interval=1)
    schedule = Schedule(peak=1e-3, floor=1e-6, warmup=2, steps=6)
    lines = read_metrics(folder, "train")
    assert [line["lr"] for line in lines] == [schedule.rate(step) for step in range(1, 7)]


def test_golden_losses(train):
    """20 steps with everything on, against the file in git. Other processors round differently: 2e-5 is allowed."""
    folder = train(
        train_steps=20, log_interval=1, validation_steps=10, use_mrl=True, max_seq_length=32, learning_rate=1e-3
    )
    found = [[line["step"], line["losses"], line["grad_norm"]] for line in read_metrics(folder, "train")]
    found += [[line["step"], line["measures"], 0.0] for line in read_metrics(folder, "validation")]
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())
    assert len(golden) == 20 + 2
    for (step, losses, norm), (golden_step, golden_losses, golden_norm) in zip(found, golden, strict=True):
        assert step == golden_step
        assert losses.keys() == golden_losses.keys()
        for name, kinds in losses.items():
            assert kinds == pytest.approx(golden_losses[name], rel=2e-5, abs=1e-6), f"step {step}, {name}"
        assert norm == pytest.approx(golden_norm, rel=1e-4)


def test_the_first_step_is_the_equations(train, toy_world, settings):
    """Loss and gradient norm of step 1 worked out from the store by hand, one text at a time."""
    folder = train(train_steps=1, log_interval=1, max_seq_length=128)
    (line,) = read_metrics(folder, "train")
    args = run.arguments.parse(["--config", str(folder / "args.json")])[0]
    stores, _ = cache.prepare(toy_world.stores, Path(settings["cache_dir"]))
    order = plan.Plan(tuple(plan.split_sizes(len(store.tuples))[0] for store in stores), 8, 0)
    what = order.step(1)
    store = stores[what.dataset]
    rows = plan.split_rows(what.rows, len(store.tuples))
    chosen = plan.choose_negatives(store.tuples[rows, 2:], args.negatives_for(store.task), 0, 0, rows)

    model = Embedder(load_backbone(str(toy_world.backbone), torch.float32), "padded").train()

    def embed(number: int) -> torch.Tensor:
        ids = torch.from_numpy(store.tokens[store.offsets[number] : store.offsets[number + 1]].astype(np.int64))
        return model.backbone(input_ids=ids[None], use_cache=False).last_hidden_state[0, -1]

    queries, positives = (torch.stack([embed(n) for n in store.tuples[rows, column]]) for column in (0, 1))
    negatives = torch.stack([torch.stack([embed(n) for n in row]) for row in chosen])
    expected = {"hard": hard_negative_loss(queries, positives, negatives, 0.05)}
    if store.task == "retrieval":
        expected["in_batch"] = in_batch_loss(queries, positives, torch.arange(len(rows)), 0.05)
    sum(expected.values()).backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert line["losses"] == {store.name: pytest.approx({k: v.item() for k, v in expected.items()}, rel=1e-5)}
    assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


# ------------------------------------------------------------------------------- what keys change


def test_backends_and_checkpointing_do_not_change_the_training(train):
    runs = {
        name: read_metrics(train(experiment_id=name, log_interval=1, **keys), "train")
        for name, keys in {
            "plain": {"gradient_checkpointing": False},
            "checkpointed": {"gradient_checkpointing": True},
            "padded": {"attn_backend": "padded"},
            "buckets": {"attn_backend": "buckets"},
        }.items()
    }
    for name in ("checkpointed", "padded", "buckets"):
        for ours, plain in zip(runs[name], runs["plain"], strict=True):
            assert ours["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-4)
            for dataset, kinds in plain["losses"].items():
                assert ours["losses"][dataset] == pytest.approx(kinds, rel=1e-5)
    assert runs["plain"][0]["padding"] == 0
    assert max(line["padding"] for line in runs["padded"]) > 0.2


def only(toy_world, tmp_path, name: str = "toy_retrieval") -> str:
    """A data folder with one of the toy stores."""
    folder = tmp_path / "only"
    folder.mkdir()
    (folder / name).symlink_to(toy_world.stores / name)
    return str(folder)


def test_gather_without_grad_changes_the_gradient_on_one_process_too(train, toy_world, tmp_path):
    path = only(toy_world, tmp_path)
    full = train(experiment_id="full", train_steps=1, log_interval=1, train_data_path=path)
    detached = train(
        experiment_id="detached", train_steps=1, log_interval=1, train_data_path=path, gather_with_grad=False
    )
    (a,), (b,) = read_metrics(full, "train"), read_metrics(detached, "train")
    assert a["losses"] == b["losses"]
    assert abs(a["grad_norm"] - b["grad_norm"]) > 0.01 * a["grad_norm"]


def test_temperature_and_matryoshka_reach_the_loss(train, toy_world, tmp_path):
    path = only(toy_world, tmp_path)

    def first_loss(**keys) -> float:
        folder = train(experiment_id=f"r{len(list(tmp_path.glob('output/*')))}", train_steps=1, log_interval=1,
                       train_data_path=path, **keys)  # fmt: skip
        return read_metrics(folder, "train")[0]["losses"]["toy_retrieval"]["in_batch"]

    plain, warm, matryoshka = first_loss(), first_loss(temperature=1.0), first_loss(use_mrl=True)
    assert warm != pytest.approx(plain, rel=0.05)
    assert matryoshka > plain  # the full width has weight 1, and every prefix adds to it


def test_distillation_pulls_towards_the_teacher(train, toy_world, tmp_path):
    teacher = toy.make_backbone(tmp_path / "teacher", hidden_size=48, seed=7)
    before = weights(teacher)
    folder = train(train_steps=30, log_interval=10, teacher_model_path=str(teacher), kd_weight=50.0, learning_rate=5e-3)
    lines = [line["losses"]["toy_retrieval"]["distillation"] for line in read_metrics(folder, "train")]
    assert 0 < lines[-1] < 0.8 * lines[0]
    assert all(torch.equal(before[name], weight) for name, weight in weights(teacher).items())
    assert weights(folder / "step_30")["norm.weight"].shape == (32,)  # the student's, and only it, was saved


def test_a_student_that_is_its_teacher_has_nothing_to_learn(train, toy_world):
    folder = train(train_steps=1, log_interval=1, teacher_model_path=str(toy_world.backbone), kd_weight=1.0)
    for kinds in read_metrics(folder, "train")[0]["losses"].values():
        assert kinds["distillation"] < 1e-10


def test_zero_negatives_and_distillation(train, toy_world):
    folder = train(num_hard_neg=0, teacher_model_path=str(toy_world.backbone))
    for line in read_metrics(folder, "train"):
        for name, kinds in line["losses"].items():
            assert ("hard" in kinds) == (name == "toy_classification")  # which has one negative always, as published
        assert np.isfinite(line["grad_norm"])


def test_a_lone_held_out_tuple_has_an_in_batch_measure_of_zero(train, toy_world, tmp_path):
    toy.write_parquet(tmp_path / "raw" / "small.parquet", toy.raw_rows(40, 2))
    assert tokenize(tmp_path / "raw", tmp_path / "small", toy_world.backbone, "--task", "retrieval") == 0
    folder = train(train_data_path=str(tmp_path / "small"), validation_steps=4)
    (line,) = read_metrics(folder, "validation")
    assert "hard" in line["measures"]["small"]
    assert line["measures"]["small"]["in_batch"] == 0  # as published: its positive has no other to win against


def test_missing_negatives_train(train, toy_world, tmp_path):
    raw = toy.write_gappy(tmp_path / "raw", {"gappy": 30})
    assert tokenize(raw, tmp_path / "gappy", toy_world.backbone) == 0
    folder = train(train_data_path=str(tmp_path / "gappy"), validation_steps=2)
    assert all(np.isfinite(line["grad_norm"]) for line in read_metrics(folder, "train"))
    assert read_metrics(folder, "validation")


def test_lora_trains_saves_and_reads_back(train, toy_world):
    folder = train(use_lora=True, lora_target_modules=["q_proj", "up_proj"], learning_rate=1e-2, train_steps=10)
    adapter = load_file(folder / "step_10" / "adapter_model.safetensors")
    assert len(adapter) == 2 * 2 * 2
    assert all(weight.abs().max() > 0 for weight in adapter.values())
    assert not (folder / "step_10" / "model.safetensors").exists()


def test_bf16_weights_on_request(train):
    folder = train(save_dtype="bfloat16")
    assert {weight.dtype for weight in weights(folder / "step_4").values()} == {torch.bfloat16}


def test_bf16_compute_keeps_fp32_weights_and_stays_near(train, monkeypatch):
    plain = train(experiment_id="fp32")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    folder = train(experiment_id="bf16", save_dtype="float32")
    assert json.loads((folder / "manifest.json").read_text())["mixed_precision"] == "bf16"
    ours, theirs = (read_metrics(path, "train")[0]["losses"] for path in (folder, plain))
    assert ours != theirs  # autocast was on
    for name, kinds in theirs.items():
        assert ours[name] == pytest.approx(kinds, rel=0.1)
    rounded = [torch.equal(weight, weight.bfloat16().float()) for weight in weights(folder / "step_4").values()]
    assert not any(rounded)  # masters are fp32: updates far below bf16's resolution are kept
    automatic = train(experiment_id="auto")
    assert {weight.dtype for weight in weights(automatic / "step_4").values()} == {torch.bfloat16}


def test_rows_have_few_lengths_under_bf16_on_a_processor(train, monkeypatch):
    """Its products in bf16 are prepared for each length of a row, and kept: memory would grow with every step."""
    lengths = []
    states = Embedder._states

    def noted(self, attention_name, **inputs):
        if torch.is_grad_enabled():
            lengths.append(inputs["input_ids"].shape[1])
        return states(self, attention_name, **inputs)

    monkeypatch.setattr(Embedder, "_states", noted)
    train(experiment_id="fp32")
    assert any(length % MULTIPLE for length in lengths)
    lengths.clear()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    train(experiment_id="bf16")
    assert len(lengths) >= 4
    assert not any(length % MULTIPLE for length in lengths)


def test_a_dataset_smaller_than_a_batch_trains(train, toy_world, tmp_path):
    for name, rows in (("two", 2), ("one", 1)):
        toy.write_parquet(tmp_path / "raw" / f"{name}.parquet", toy.raw_rows(rows, 2))
    assert tokenize(tmp_path / "raw", tmp_path / "small", toy_world.backbone, "--task", "retrieval") == 0
    folder = train(train_data_path=str(tmp_path / "small"), train_steps=-1, train_epochs=3, validation_steps=1)
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 3 * 2
    assert (folder / "epoch_3").is_dir()


# --------------------------------------------------------------------------------------- the door


def test_the_same_bits_can_be_asked_for(train, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    seen = []

    def noted(live, step, real=run.train_step):
        seen.append((torch.are_deterministic_algorithms_enabled(), os.environ["CUBLAS_WORKSPACE_CONFIG"]))
        return real(live, step)

    monkeypatch.setattr(run, "train_step", noted)
    try:
        train(deterministic=True, train_steps=2)
    finally:
        torch.use_deterministic_algorithms(False)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    assert seen == [(True, ":4096:8")] * 2


def test_a_mistyped_key_is_named_before_torch_is_imported(settings):
    """And what is wrong besides is named after it, with no line twice."""
    config = flags(settings, model_path="nowhere/at_all", learning_rat=3)
    code = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path('run.py', run_name='__main__')"
    hook = "import sys; from runtime import launcher; say = launcher.say\n"
    hook += "launcher.say = lambda lines: say([*lines, f'torch: {\"torch\" in sys.modules}'])\n"
    done = command_line(["-c", hook + code, "run.py", *config])
    assert done.returncode == 2
    first, second, third, fourth, *rest = done.stderr.splitlines()
    assert first == "run.py: learning_rat: no such key; did you mean learning_rate?"
    assert second == "torch: False"
    assert third.startswith("run.py: model_path: 'nowhere/at_all'")
    assert fourth == "run.py: 2 problems, nothing was started"
    assert rest == ["torch: True"]


@pytest.mark.parametrize("words", [["--learning_rat", "3"], ["--help"]])
def test_what_needs_no_torch_imports_none(words):
    code = (
        "import runpy, sys, atexit; sys.argv = sys.argv[1:]; atexit.register(lambda: print('torch' in sys.modules))\n"
    )
    done = command_line(["-c", code + "runpy.run_path('run.py', run_name='__main__')", "run.py", *words])
    assert done.stdout.splitlines()[-1] == "False"


def test_help(capsys):
    assert run.main(["--help"]) == 0
    assert "--learning_rate 0.0001" in capsys.readouterr().out


def test_cache_only_builds_and_starts_nothing(settings, capsys):
    assert run.main(flags(settings, cache_only="true", model_path="nowhere")) == 0
    out = capsys.readouterr().out
    assert "verified toy_retrieval" in out
    assert "data ready: 3 datasets, 260 tuples" in out
    assert not Path(settings["output_dir"]).exists()


# --------------------------------------------------------------------------------- as users launch


def command_line(words: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=120)


def launch(launcher: list[str], settings: dict, tmp_path: Path, **changes) -> Path:
    """Run the door as a command; returns the run's folder."""
    config = settings | changes
    path = tmp_path / f"{config['experiment_id']}.json"
    path.write_text(json.dumps(config))
    done = command_line([*launcher, "run.py", "--config", str(path)])
    assert done.returncode == 0, done.stdout + done.stderr
    return Path(config["output_dir"]) / config["experiment_id"]


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--config_file", "configs/accelerate_cpu.yaml"]


@pytest.mark.processes
@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_two_processes_train_what_one_trains(settings, tmp_path, launcher):
    keys = {"use_mrl": True, "validation_steps": 3, "log_interval": 1, "train_steps": 6}
    half = launch(launcher, settings, tmp_path, experiment_id="half", train_batch_size=4, **keys)
    whole = launch([], settings, tmp_path, experiment_id="whole", train_batch_size=8, **keys)  # the same global batch
    assert json.loads((half / "args.json").read_text())["num_processes"] == 2
    for kind, values in (("train", "losses"), ("validation", "measures")):
        for ours, theirs in zip(read_metrics(half, kind), read_metrics(whole, kind), strict=True):
            for name, expected in theirs[values].items():
                of_prefixes = {kind: expected.pop(kind) for kind in list(expected) if "@" in kind}
                # these get near 0: differences of logits of up to 20, which fp32 holds to 2e-6
                ours_of_prefixes = {kind: ours[values][name].pop(kind) for kind in of_prefixes}
                assert ours_of_prefixes == pytest.approx(of_prefixes, rel=2e-5, abs=1e-6)
                assert ours[values][name] == pytest.approx(expected, rel=2e-5)
    for name, weight in weights(whole / "step_6").items():
        assert (weights(half / "step_6")[name] - weight).abs().max() < 1e-5


@pytest.mark.processes
def test_every_process_of_a_refused_launch_ends(settings, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(settings | {"model_path": "nowhere/at_all"}))
    done = command_line([*TORCHRUN, "run.py", "--config", str(path)])
    assert done.returncode != 0
    before, _, repeated = done.stderr.partition("ChildFailedError")
    assert before.count("nothing was started") == 1  # by one process, and once more below the launcher's traceback
    assert repeated.count("nothing was started") == 1
