"""What cannot be merged is refused before anything is loaded; the merge: tests/export/test_model_folder.py.

python -m pytest tests/tools/test_merge_adapter.py
"""

import json
import os
import shutil
from pathlib import Path

import model_folders
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from export import model_folder
from tools import merge_adapter


@pytest.fixture
def adapter(toy_world, tmp_path):
    """What `merge_adapter` looks at of an adapter folder before it loads one."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {"base_model_name_or_path": str(toy_world.backbone)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "f2llm.json").write_text("{}")
    return folder


def test_an_adapter_with_its_base_has_no_problems(adapter, tmp_path):
    assert merge_adapter.find_problems(adapter, tmp_path / "merged") == []


@pytest.mark.parametrize("name", ["adapter_config.json", "f2llm.json"])
def test_another_folder_is_refused(adapter, tmp_path, name, capsys):
    (adapter / name).unlink()
    assert merge_adapter.main([str(adapter), str(tmp_path / "merged")]) == 2
    assert f"{adapter}: no {name} in it" in capsys.readouterr().err


def test_an_adapter_without_its_base_is_refused_with_the_path(adapter, tmp_path, capsys):
    missing = str(tmp_path / "moved away")
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": missing}))
    assert merge_adapter.main([str(adapter), str(tmp_path / "merged")]) == 2
    assert f"the base model of {adapter}: {missing!r}: no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_an_adapter_that_names_no_base_is_refused(adapter, tmp_path, capsys, text):
    (adapter / "adapter_config.json").write_text(text)
    assert merge_adapter.main([str(adapter), str(tmp_path / "merged")]) == 2
    assert "adapter_config.json: names no base model" in capsys.readouterr().err


def test_all_problems_are_named_at_once(tmp_path, capsys):
    assert merge_adapter.main([str(tmp_path / "nowhere"), str(tmp_path)]) == 2
    nowhere = tmp_path / "nowhere"
    assert capsys.readouterr().err.splitlines() == [
        f"{nowhere}: no adapter_config.json in it; give a folder that a LoRA run saved, as output/RUN/epoch_2",
        f"{tmp_path}: already exists",
    ]


def test_a_run_s_folder_is_refused_with_the_model_that_was_saved_last(tmp_path, capsys):
    for number, name in enumerate(("epoch_9", "epoch_10", "best")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "f2llm.json").write_text("{}")
        os.utime(tmp_path / name / "f2llm.json", (number % 2, number % 2))
    assert merge_adapter.main([str(tmp_path), str(tmp_path / "merged")]) == 2
    assert f"give a folder that a LoRA run saved, as {tmp_path / 'epoch_10'}" in capsys.readouterr().err
    (tmp_path / "best" / "model.safetensors").write_bytes(b"")
    assert merge_adapter.main([str(tmp_path / "best"), str(tmp_path / "merged")]) == 2
    assert "it is a whole model, and there is nothing to merge" in capsys.readouterr().err


# ---------------------------------------------------------------------------------- damaged adapters


@pytest.fixture(scope="module")
def whole(toy_world, tmp_path_factory) -> Path:
    """A real adapter folder."""
    folder = tmp_path_factory.mktemp("adapters") / "whole"
    adapted = model_folders.make_adapted(toy_world.backbone)
    tokenizer = AutoTokenizer.from_pretrained(toy_world.backbone)
    model_folder.save(folder, adapted, tokenizer, model_folders.facts(), torch.float32)
    return folder


def without_a_tensor(path: Path) -> None:
    weights = load_file(path)
    del weights[min(weights)]
    save_file(weights, path)


def with_another_tensor(path: Path) -> None:
    save_file(load_file(path) | {"base_model.model.other.lora_A.weight": torch.ones(4, 2)}, path)


@pytest.mark.parametrize(("damage", "words"), [
    (Path.unlink, "no adapter_model.safetensors in it"),
    (lambda path: path.write_bytes(path.read_bytes()[:1000]), "Error while deserializing header"),  # SafetensorError
    (without_a_tensor, "lacks 1 tensor that its config asks for, as base_model.model.layers.0"),  # a warning of PEFT's
    (with_another_tensor, "has 1 tensor that its config does not ask for, as base_model.model.other"),  # in silence
], ids=["no file", "cut short", "a tensor less", "a tensor more"])  # fmt: skip
def test_damaged_weights_of_an_adapter_are_refused(whole, tmp_path, capsys, damage, words):
    shutil.copytree(whole, tmp_path / "adapter")
    damage(tmp_path / "adapter" / "adapter_model.safetensors")
    assert merge_adapter.main([str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path / 'adapter'}: no adapter can be loaded from it (" in said
    assert words in said
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(("changes", "words"), [
    ({"r": 8}, "size mismatch for"),  # RuntimeError
    ({"lora_alpha": "x"}, "unsupported operand type"),  # TypeError
    ({"peft_type": "NONE"}, "'NONE'"),  # KeyError
    ({"target_modules": ["nowhere"]}, "not found in the base model"),  # ValueError
])  # fmt: skip
def test_a_config_of_another_adapter_is_refused(whole, tmp_path, capsys, changes, words):
    folder = shutil.copytree(whole, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    assert merge_adapter.main([str(folder), str(tmp_path / "merged")]) == 2
    said = capsys.readouterr().err
    assert f"{folder}: no adapter can be loaded from it (" in said
    assert words in said
