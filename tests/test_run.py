"""The training door: what a run writes, golden losses, and everything refused before a weight is loaded.

python -m pytest tests/test_run.py

The golden losses are remade, after a change that is meant to change them, by

    UPDATE_GOLDEN=1 python -m pytest tests/test_run.py -k golden
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import toy
from conftest import door_here, read_metrics, tokenize
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModel

import run
from data import cache, plan
from data.store_writer import StoreWriter, text_key
from losses import hard_negative_loss, in_batch_loss
from model import Embedder
from modeling.backbone import load_backbone
from modeling.packing import MULTIPLE
from runtime import engine, processes
from runtime.resume import lock_folder
from training import models, two_pass
from training.plot import draw
from training.schedule import Schedule
from utils import RunError

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


# ---------------------------------------------------------------------------------------- refusals


def refused(capsys, *words: str) -> str:
    assert run.main(list(words)) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


def flags(settings, **changes) -> list[str]:
    return [word for key, value in (settings | changes).items() for word in (f"--{key}", str(value))]


def test_a_run_is_never_overwritten(train, settings, capsys):
    folder = train()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert "holds a run already" in refused(capsys, *flags(settings, resume="never"))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_all_problems_at_once_and_before_the_model_loads(settings, toy_world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(models, "load_backbone", lambda *_: pytest.fail("a model was loaded"))
    other = tmp_path / "other"
    toy.make_tokenizer(other, vocab_size=330)
    toy.config(vocab_size=100, hidden_size=16).save_pretrained(other)
    error = refused(
        capsys,
        *flags(settings, model_path=other, max_seq_length=2000, report_to="tensorbord", use_lora="true",
               lora_target_modules="qproj", teacher_model_path=toy_world.root / "nowhere"),
    )  # fmt: skip
    for line in (
        "report_to: 'tensorbord' is none of",
        "model_path: the data hold token id",
        "model_path: max_seq_length 2000 is above",
        "lora_target_modules: no layer is called 'qproj'",
        "was written by another tokenizer than that of",
        "teacher_model_path: ",
    ):
        assert line in error, line
    assert not Path(settings["output_dir"]).exists()


def test_a_wrong_key_does_not_hide_what_else_is_wrong(settings, tmp_path, capsys):
    (tmp_path / "output" / "toy").mkdir(parents=True)
    (tmp_path / "output" / "toy" / "thesis.txt").write_text("mine")
    values = flags(settings, learning_rat=1, train_batch_size=0, model_path="nowhere/at_all", report_to="tensorbord")
    error = refused(capsys, *values)
    for line in ("learning_rat: no such key", "train_batch_size: 0 is below 1", "model_path: 'nowhere/at_all'",
                 "report_to: 'tensorbord' is none of", "holds something else than a run"):  # fmt: skip
        assert line in error, line
    assert "5 problems" in error
    assert not (tmp_path / "cache").exists()  # nothing was built for a run that cannot start


@pytest.mark.parametrize("changes", [{"num_hard_neg": 0}, {"train_data_path": "bare"}])
def test_data_that_no_loss_applies_to_are_refused(settings, toy_world, tmp_path, capsys, changes):
    toy.write_parquet(tmp_path / "raw" / "labels.parquet", [{"query": f"q{i}", "passage": "yes"} for i in range(9)])
    assert tokenize(tmp_path / "raw", tmp_path / "bare", toy_world.backbone, "--task", "classification") == 0
    if "train_data_path" in changes:
        changes = {"train_data_path": tmp_path / "bare"}
    error = refused(capsys, *flags(settings, **changes))
    assert "has the hard-negative loss alone, and no negatives" in error
    assert "retrieval" not in error  # which has the in-batch loss


def test_two_runs_of_one_name_do_not_mix(train, settings):
    folder = train()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    lock = lock_folder(folder)  # as another process at work would hold it
    with pytest.raises(RunError, match="another run is at work there"):
        train()
    lock.release()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_model_that_is_not_finite_stops_after_a_few_updates(train, toy_world, settings, tmp_path, monkeypatch):
    folder = tmp_path / "nan"
    shutil.copytree(toy_world.backbone, folder)
    weights = load_file(folder / "model.safetensors")
    weights["layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError, match="a text's state is not finite"):
        train(model_path=str(folder))
    monkeypatch.setattr(models, "choose_backend", lambda *_: [])
    with pytest.raises(RunError, match=r"step 4: the gradient is nan: tuples .*; 4 updates in a row"):
        train(model_path=str(folder), log_interval=1, experiment_id="again")
    assert not list(Path(settings["output_dir"]).glob("*/step_*"))


def test_a_model_whose_weights_are_another_ones_is_named(train, toy_world, tmp_path):
    folder = tmp_path / "odd"
    shutil.copytree(toy_world.backbone, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 80}))
    with pytest.raises(RunError, match=r"its weights do not fit its config\.json"):
        train(model_path=str(folder))


def test_a_tracker_that_is_not_installed_is_refused(settings, capsys):
    assert "report_to: comet_ml is not installed" in refused(capsys, *flags(settings, report_to="comet_ml"))


def test_a_model_without_weights_and_a_cut_one_are_refused(settings, toy_world, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(toy_world.backbone, folder)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert "damaged or cut short" in refused(capsys, *flags(settings, model_path=folder))
    assert "damaged or cut short" in refused(capsys, *flags(settings, teacher_model_path=folder))


def test_a_teacher_with_a_smaller_vocabulary_is_refused_without_advice_to_tokenise_again(
    settings, toy_world, tmp_path, capsys
):
    folder = tmp_path / "teacher"
    shutil.copytree(toy_world.backbone, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    error = refused(capsys, *flags(settings, teacher_model_path=folder))
    assert "teacher_model_path: the data hold token id" in error
    assert "take a teacher with the student's vocabulary" in error
    assert "tokenise again" not in error


def test_published_data_that_do_not_fit_the_model_are_refused_after_the_conversion(
    settings, toy_world, tmp_path, capsys
):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tasks.json").write_text('{"x": "retrieval"}')
    ids = [[600, 5]] * 4
    pq.write_table(pa.table({"query_input_ids": ids, "passage_input_ids": ids}), tmp_path / "data" / "x.parquet")
    assert "the data hold token id 600" in refused(capsys, *flags(settings, train_data_path=tmp_path / "data"))


def test_a_narrow_teacher_is_refused(settings, tmp_path, capsys):
    toy.make_backbone(tmp_path / "narrow", hidden_size=16)
    error = refused(capsys, *flags(settings, teacher_model_path=tmp_path / "narrow"))
    assert "teacher_model_path: hidden size 16, but the student's is 32" in error


@pytest.mark.parametrize("path", ["models/qwen3-0.6b", "no/such/model/anywhere"])
def test_a_missing_model_says_how_to_get_one(settings, capsys, path):
    assert "hf download Qwen/Qwen3-0.6B" in refused(capsys, *flags(settings, model_path=path))


def test_half_written_and_damaged_data_are_refused(settings, toy_world, tmp_path, capsys):
    folder = tmp_path / "data"
    (folder / "broken").mkdir(parents=True)
    (folder / "broken" / "tokens.npy").write_bytes(b"")
    assert "half of a store" in refused(capsys, *flags(settings, train_data_path=folder))
    (folder / "broken" / "tokens.npy").unlink()
    assert "no dataset in it" in refused(capsys, *flags(settings, train_data_path=folder))


def test_another_eos_is_refused(settings, toy_world, tmp_path, capsys):
    writer = StoreWriter(tmp_path / "data" / "x", 0, {})
    writer.add_texts([text_key(b"a"), text_key(b"b")], np.array([1, 5, 2, 5]), np.array([2, 2]))
    writer.add_tuples(np.array([[0, 1]]))
    writer.finish({"name": "x", "task": "retrieval", "max_seq_length": None, "eos_token_id": 5, "tokenizer": None})
    assert "ends texts in token 5" in refused(capsys, *flags(settings, train_data_path=tmp_path / "data"))


def test_what_a_machine_without_a_gpu_cannot_do_is_refused_at_once(settings, capsys):
    error = refused(capsys, *flags(settings, liger="true", attn_backend="varlen"))
    assert "liger: needs a GPU and its package" in error
    assert "attn_backend: varlen needs a GPU: set it to auto" in error
    error = refused(capsys, *flags(settings, compile="true", attn_backend="buckets"))
    assert "compile: not with attn_backend buckets" in error


def test_fp16_is_refused_with_everything_else(settings, monkeypatch, capsys):
    """An update that was left out did not tell the scaler, and the next one failed."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert door_here(settings | {"warmup_steps": -1}) == processes.REFUSED
    printed = capsys.readouterr().err
    assert "mixed_precision: fp16 is not supported: accelerate launch --mixed_precision bf16" in printed
    assert "2 problems, nothing was started" in printed


def test_bf16_is_asked_for_where_nobody_chose_and_the_gpu_has_it():
    assert engine.precision_to_ask_for({}, bf16_here=True) == "bf16"
    assert engine.precision_to_ask_for({}, bf16_here=False) is None
    assert engine.precision_to_ask_for({"ACCELERATE_MIXED_PRECISION": "no"}, bf16_here=True) is None  # said is said
    assert engine.precision_problem("fp8").startswith("mixed_precision: fp8")


@pytest.mark.parametrize("keys", [{"gradient_checkpointing": False}, {"gradient_checkpointing": True}])
def test_a_full_memory_is_told_with_the_step_and_the_keys_that_help(settings, monkeypatch, capsys, keys):
    monkeypatch.setattr(two_pass, "embed", full_memory)
    assert door_here(settings | keys) == processes.FAILED
    printed = capsys.readouterr().err
    assert "step 1: the memory of cpu is full (CUDA out of memory. Tried to allocate 2.00 GiB.)" in printed
    assert re.search(r"8 tuples, \d+ texts and [\d,]+ tokens on this process, the longest text \d+", printed)
    assert ("gradient_checkpointing true, or" in printed) != keys["gradient_checkpointing"]
    assert "a lower max_tokens_per_forward" in printed


def full_memory(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation")


def test_a_memory_without_room_for_the_weights_is_told_at_once(settings, toy_world, monkeypatch, capsys):
    """It was told as weights that do not fit their config.json: the error of a full memory is a RuntimeError too."""
    monkeypatch.setattr(AutoModel, "from_pretrained", full_memory)
    assert door_here(settings) == processes.FAILED
    printed = capsys.readouterr().err
    assert f"run.py: model_path: {toy_world.backbone}: cpu has no room for its weights (CUDA out of memory" in printed
    assert "share them out over more GPUs" in printed
    assert "Traceback" not in printed


def test_a_full_memory_outside_of_a_step_is_a_sentence_too(settings, monkeypatch, capsys):
    monkeypatch.setattr(run, "validate", full_memory)
    assert door_here(settings | {"train_steps": 2, "validation_steps": 1}) == processes.FAILED
    printed = capsys.readouterr().err
    assert "run.py: the memory of the GPU is full (CUDA out of memory. Tried to allocate 2.00 GiB.)" in printed
    assert "max_tokens_per_forward" in printed
    assert "Traceback" not in printed


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
