"""Everything that run.py refuses before a weight is loaded, and what it says if a run cannot continue.

python -m pytest tests/test_run_refusals.py
"""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import toy
from conftest import door_here, flags, tokenize
from safetensors.torch import load_file, save_file
from transformers import AutoModel

import run
from data.store_writer import StoreWriter, text_key
from runtime import engine, processes
from runtime.resume import lock_folder
from training import models, two_pass
from utils import RunError


def refused(capsys, *words: str) -> str:
    assert run.main(list(words)) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


def test_a_run_is_never_overwritten(train, settings, capsys):
    folder = train()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert "already holds a run" in refused(capsys, *flags(settings, resume="never"))
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
        "report_to: 'tensorbord' is not one of",
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
                 "report_to: 'tensorbord' is not one of", "holds something other than a run"):  # fmt: skip
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
    assert "hf download" not in refused(capsys, *flags(settings, teacher_model_path=path))


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


def test_what_does_not_go_with_deepspeed_is_refused_before_it_starts(settings, monkeypatch, capsys):
    folder = Path(settings["output_dir"]) / "toy"
    folder.mkdir(parents=True)
    (folder / "args.json").write_text("{}")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    error = refused(capsys, *flags(settings, max_tokens_per_forward=100))
    assert "max_tokens_per_forward: not under DeepSpeed" in error
    assert f"{folder}: already holds a run, and DeepSpeed's do not resume" in error


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
