"""Settings of single datasets: trained as the keys of the configuration would, each on its own data alone.

python -m pytest tests/training/test_recipes.py
"""

import json

import harness
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from conftest import door_here, interrupted, read_metrics, train_here
from harness import on_processes, train_steps
from safetensors.torch import load_file

from data.plan import batch_count

STILL = {"learning_rate": 1e-30, "min_lr": 0.0, "warmup_steps": 0}  # all steps see the same weights
MIXED = {  # every key, and three datasets that differ in all
    "toy_retrieval": {"temperature": 0.1, "num_hard_neg": 5, "sampling_weight": 0.5, "max_length": 12},
    "toy_clustering": {"temperature": 0.02, "num_hard_neg": 2, "losses": ["in_batch", "hard"], "sampling_weight": 2},
    "toy_classification": {"max_length": 9, "sampling_weight": 1.5},
}


def data_with(toy_world, folder, content: dict, *names: str) -> str:
    """A data folder with toy stores, all or those named, and a file of settings."""
    folder.mkdir()
    for store in toy_world.stores.iterdir():
        if store.is_dir() and (not names or store.name in names):
            (folder / store.name).symlink_to(store)
    (folder / "dataset_settings.json").write_text(json.dumps(content))
    return str(folder)


def weights(folder) -> dict:
    return load_file(folder / "model.safetensors")


def same_weights(a, b) -> bool:
    ours, theirs = weights(a), weights(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("name", ["*", "toy_retrieval"])
def test_settings_of_the_only_dataset_train_as_the_keys_of_the_configuration(train, toy_world, tmp_path, name):
    keys = {"temperature": 0.1, "num_hard_neg": 5}
    only = data_with(toy_world, tmp_path / "only", {}, "toy_retrieval")
    plain = train(experiment_id="plain", train_data_path=only, log_interval=1)
    by_keys = train(experiment_id="keys", train_data_path=only, log_interval=1, max_seq_length=12, **keys)
    own = data_with(toy_world, tmp_path / "own", {name: keys | {"max_length": 12}}, "toy_retrieval")
    by_settings = train(experiment_id="settings", train_data_path=own, log_interval=1)
    assert read_metrics(by_settings, "train") == read_metrics(by_keys, "train")
    assert read_metrics(by_settings, "train") != read_metrics(plain, "train")
    assert same_weights(by_settings / "step_4", by_keys / "step_4")


def test_without_hard_among_its_losses_a_dataset_trains_as_without_negatives(train, toy_world, tmp_path):
    only = data_with(toy_world, tmp_path / "only", {}, "toy_retrieval")
    by_key = train(experiment_id="key", train_data_path=only, num_hard_neg=0, validation_steps=4)
    own = data_with(toy_world, tmp_path / "own", {"*": {"losses": ["in_batch"]}}, "toy_retrieval")
    by_setting = train(experiment_id="setting", train_data_path=own, validation_steps=4)
    assert (by_setting / "metrics.jsonl").read_bytes() == (by_key / "metrics.jsonl").read_bytes()
    assert set(read_metrics(by_setting, "train")[0]["losses"]["toy_retrieval"]) == {"in_batch"}


def test_in_batch_can_be_left_out(train, toy_world, tmp_path):
    own = data_with(toy_world, tmp_path / "own", {"*": {"losses": ["hard"]}})
    folder = train(train_data_path=own, validation_steps=4)
    for line in read_metrics(folder, "train"):
        assert all(kinds.keys() == {"hard"} for kinds in line["losses"].values())
    assert all("in_batch" not in kinds for kinds in read_metrics(folder, "validation")[0]["measures"].values())


def gradients_of(config: dict) -> dict:
    """What harness reports of a run in this process."""
    try:
        return harness.train_one(config)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def test_each_batch_of_a_mix_is_that_of_its_own_plain_run(settings, toy_world, tmp_path):
    """At weights that stand still every step's gradient is that of a run with this dataset's settings as its keys."""
    (tmp_path / "output").mkdir()
    names = ("toy_retrieval", "toy_clustering")
    own = {
        "toy_retrieval": {"temperature": 0.1, "num_hard_neg": 5, "max_length": 12},
        "toy_clustering": {"temperature": 0.02, "num_hard_neg": 2},
    }
    mixed = data_with(toy_world, tmp_path / "mixed", own, *names)
    plain = data_with(toy_world, tmp_path / "plain", {}, *names)
    still = settings | STILL | {"train_steps": 29}  # an epoch: batch_count(198, 8) + batch_count(29, 8)
    ours = gradients_of(still | {"train_data_path": mixed})
    others = {}
    for name in names:
        keys = {"max_seq_length" if key == "max_length" else key: value for key, value in own[name].items()}
        others[name] = gradients_of(still | keys | {"train_data_path": plain, "experiment_id": name})
        assert ours["losses"][name] == others[name]["losses"][name]
    from_run = dict.fromkeys(names, 0)
    for step, gradient in enumerate(ours["gradients"]):
        equal = [name for name in names if is_equal(gradient, others[name]["gradients"][step])]
        assert len(equal) == 1, f"step {step + 1}"
        from_run[equal[0]] += 1
    assert from_run == {"toy_retrieval": batch_count(198, 8), "toy_clustering": batch_count(29, 8)}


def is_equal(a: dict, b: dict) -> bool:
    assert a.keys() == b.keys()
    return all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.processes
def test_two_processes_train_what_one_trains(toy_world, settings, tmp_path):
    mixed = data_with(toy_world, tmp_path / "mixed", MIXED)
    found = {}
    for world in (1, 2):
        (tmp_path / f"w{world}").mkdir()
        config = settings | {"train_data_path": mixed, "train_steps": 12, "train_batch_size": 8 // world}
        config |= {"output_dir": str(tmp_path / f"w{world}" / "output"), "cache_dir": str(tmp_path / f"w{world}" / "c")}
        (found[world],) = on_processes(world, train_steps, [config], torch.float64)[0]
    assert len(found[2]["gradients"]) == 12
    for ours, theirs in zip(found[2]["gradients"], found[1]["gradients"], strict=True):
        for name, gradient in theirs.items():
            np.testing.assert_allclose(ours[name], gradient, rtol=0, atol=1e-12 * np.abs(gradient).max() + 1e-15)
    assert found[2]["losses"].keys() == set(MIXED)
    for name, kinds in found[1]["losses"].items():
        assert found[2]["losses"][name] == pytest.approx(kinds, rel=1e-5)


# ------------------------------------------------------------------------------------------- resume


def test_a_resumed_run_with_settings_is_the_uninterrupted_one(settings, toy_world, tmp_path):
    mixed = data_with(toy_world, tmp_path / "mixed", MIXED)
    config = settings | {"train_data_path": mixed, "train_batch_size": 24, "train_steps": 15, "checkpointing_steps": 8}
    config |= {"validation_steps": 15}  # an epoch has 9 x 0.5 + 2 x 2 + 2 x 1.5 = 12 steps, rounded by dataset
    whole = train_here(config | {"experiment_id": "whole"})
    halted = interrupted(config, 11)
    assert not (halted / "epoch_1").exists()
    train_here(config)
    assert (halted / "epoch_1").exists()
    assert (halted / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert same_weights(halted / "step_15", whole / "step_15")


def test_changed_settings_are_refused_with_the_difference_and_the_same_by_another_way_are_not(
    settings, toy_world, tmp_path, capsys
):
    own = data_with(toy_world, tmp_path / "own", {"toy_clustering": {"temperature": 0.1}})
    path = tmp_path / "own" / "dataset_settings.json"
    config = settings | {"train_data_path": own}
    train_here(config)

    elsewhere = tmp_path / "elsewhere.json"  # another file, and a setting that says what the configuration says
    elsewhere.write_text(json.dumps({"toy_clustering": {"temperature": 0.1, "num_hard_neg": 3}}))
    train_here(config | {"dataset_settings": str(elsewhere)})
    assert "this run is finished" in capsys.readouterr().out

    path.write_text(json.dumps({"*": {"sampling_weight": 2}}))
    assert door_here(config) == 2
    said = capsys.readouterr().err
    assert "dataset toy_clustering: its settings were temperature 0.1, are now sampling weight 2.0" in said
    assert "dataset toy_retrieval: its settings were none, are now sampling weight 2.0" in said
    path.unlink()
    assert door_here(config) == 2
    assert "its settings were temperature 0.1, are now none" in capsys.readouterr().err


# --------------------------------------------------------------------------------- said and refused


def test_settings_are_shown_and_written_down(train, toy_world, tmp_path, capsys):
    mixed = data_with(toy_world, tmp_path / "mixed", MIXED)
    folder = train(train_data_path=mixed, dataset_settings=None)
    printed = capsys.readouterr().out
    for line in (
        "3 datasets with settings of their own:",
        "  toy_classification  texts cut at 9 tokens, sampling weight 1.5",
        "  toy_clustering      losses in_batch and hard, 2 hard negatives, temperature 0.02, sampling weight 2.0",
        "  toy_retrieval       5 hard negatives, temperature 0.1, texts cut at 12 tokens, sampling weight 0.5",
        "warning: toy_clustering: the in-batch loss on clustering or classification data",
        # 25 batches of retrieval x 0.5 + 4 of clustering x 2 + 4 of classification x 1.5
        "4 steps, 27 an epoch",
    ):
        assert line in printed
    assert json.loads((folder / "args.json").read_text())["dataset_settings"] is None
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["settings"]["toy_retrieval"] == {
        "negatives": 5, "temperature": 0.1, "max_length": 12, "sampling_weight": 0.5,
    }  # fmt: skip
    assert "| settings of toy_classification | texts cut at 9 tokens" in (folder / "step_4" / "README.md").read_text()


def test_without_settings_nothing_is_said_or_written(train, capsys):
    folder = train()
    assert "settings of" not in capsys.readouterr().out
    assert "settings" not in json.loads((folder / "manifest.json").read_text())


def test_a_length_that_no_text_will_have_is_warned_of(train, toy_world, tmp_path, capsys):
    own = data_with(toy_world, tmp_path / "own", {"*": {"max_length": 16}})
    train(train_data_path=own)
    assert "max_seq_length 64, but the settings of the datasets cut all texts at 16" in capsys.readouterr().out


def test_everything_wrong_is_said_before_a_model_is_loaded(settings, toy_world, tmp_path, capsys):
    own = data_with(
        toy_world,
        tmp_path / "own",
        {"toy_retrieval": {"temprature": 1, "max_length": 65}, "toy_clusterin": {}, "toy_clustering": {"losses": [1]}},
    )
    config = settings | {"train_data_path": own, "num_hard_neg": -1}
    assert door_here(config) == 2
    error = capsys.readouterr().err
    for line in (
        "num_hard_neg: -1 is below 0",
        "toy_retrieval: temprature: no such setting; did you mean temperature?",
        "toy_retrieval: max_length: 65 is above the configuration's max_seq_length 64",
        "toy_clusterin: no such dataset; did you mean toy_clustering?",
        "toy_clustering: losses: [1] is not a list of texts or null",
    ):
        assert line in error, line
    assert not (tmp_path / "output" / "toy").exists()
    assert door_here(settings | {"dataset_settings": str(tmp_path / "nowhere.json")}) == 2
    assert "nowhere.json: No such file or directory" in capsys.readouterr().err


def test_a_dataset_that_is_left_without_a_loss_is_refused(settings, toy_world, tmp_path, capsys):
    own = data_with(toy_world, tmp_path / "own", {"toy_clustering": {"num_hard_neg": 0}})
    assert door_here(settings | {"train_data_path": own}) == 2
    assert "nothing would be learnt from it" in capsys.readouterr().err
