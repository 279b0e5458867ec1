"""Averages of model folders: equal to the plain sum, from one weights file or many; what does not fit is refused.

python -m pytest tests/modeling/test_merging.py
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy import make_backbone

from modeling import merging
from tools import merge_checkpoints


@pytest.fixture
def folders(tmp_path):
    return [make_backbone(tmp_path / f"model_{seed}", seed=seed) for seed in range(3)]


def weights_of(folder) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def merge(folders, target, *weights) -> int:
    words = ["--inputs", *map(str, folders), "--output", str(target)]
    if weights:
        words += ["--weights", *map(str, weights)]
    return merge_checkpoints.main(words)


def test_the_average_is_the_weighted_sum_of_every_tensor(folders, tmp_path):
    assert merge(folders, tmp_path / "merged", 1, 2, 5) == 0
    merged = weights_of(tmp_path / "merged")
    parts = [weights_of(folder) for folder in folders]
    assert merged.keys() == parts[0].keys()
    for name, weight in merged.items():
        plain = 0.125 * parts[0][name] + 0.25 * parts[1][name] + 0.625 * parts[2][name]
        assert torch.allclose(weight, plain, atol=1e-7)
    assert not torch.equal(merged["embed_tokens.weight"], parts[0]["embed_tokens.weight"])
    record = json.loads((tmp_path / "merged" / merging.RECORD).read_text())
    assert record == {"folders": [str(folder) for folder in folders], "shares": [0.125, 0.25, 0.625]}
    assert (tmp_path / "merged" / "tokenizer.json").exists()
    modes = {(tmp_path / "merged" / name).stat().st_mode for name in ("model.safetensors", merging.RECORD)}
    assert len(modes) == 1  # safetensors alone would write for the owner only


def test_a_folder_merged_with_itself_is_itself(folders, tmp_path):
    assert merge([folders[0], folders[0]], tmp_path / "merged") == 0
    merged = weights_of(tmp_path / "merged")
    assert len(merged) > 10
    for name, weight in weights_of(folders[0]).items():
        assert torch.equal(merged[name], weight)


def test_many_weights_files_give_the_same_as_one(folders, tmp_path):
    assert merge(folders, tmp_path / "one") == 0
    for folder in folders[:2]:
        split(folder)
    assert merge(folders, tmp_path / "many") == 0
    assert len(list((tmp_path / "many").glob("*.safetensors"))) == 3
    one = weights_of(tmp_path / "one")
    many = weights_of(tmp_path / "many")
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)


def split(folder) -> None:
    """The weights in three files and an index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number in range(3):
        file = f"model-{number}.safetensors"
        part = {name: weights[name] for name in sorted(weights)[number::3]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_bf16_is_averaged_in_fp32_and_rounded_once():
    tensors = [torch.tensor([1.0, 256.0]).bfloat16(), torch.tensor([1.0, 1.0]).bfloat16()]
    tensors.append(tensors[1])
    shares = [1 / 3] * 3
    found = merging.average(tensors, shares)
    assert found.dtype == torch.bfloat16
    exact = torch.stack([tensor.float() for tensor in tensors]).mean(0)
    assert torch.equal(found, exact.bfloat16())
    assert torch.equal(merging.average([torch.tensor([3])] * 2, [0.5, 0.5]), torch.tensor([3]))


def test_what_does_not_fit_is_refused_before_anything_is_written(folders, tmp_path, capsys):
    wider = make_backbone(tmp_path / "wider", hidden_size=64)
    deeper = make_backbone(tmp_path / "deeper", layers=3)
    adapter = tmp_path / "adapter"
    shutil.copytree(folders[0], adapter)
    (adapter / "adapter_config.json").write_text("{}")
    assert merge([folders[0], wider, deeper, adapter, tmp_path / "nowhere"], tmp_path / "merged", 1, 1, -1) == 2
    said = capsys.readouterr().err
    for part in (
        "3 weights for 5 folders",
        "weight -1.0: must be 0 or more",
        f"{wider}: embed_tokens.weight is [512, 64], in {folders[0]} it is [512, 32]",
        f"{wider}: its config.json is not that of {folders[0]}: hidden_size 64 instead of 32, intermediate_size 128",
        f"{deeper}: layers.2.",
        "is a LoRA adapter: make a model of it",
        f"{tmp_path / 'nowhere'}: no readable model folder",
    ):
        assert part in said
    assert said.count(f"{wider}: ") == said.count(f"{deeper}: ") == 2  # of the weights, of the config
    assert not (tmp_path / "merged").exists()


def test_of_configs_that_differ_in_everything_some_keys_are_named():
    ours = dict.fromkeys("abcdef", 1)
    theirs = dict.fromkeys("bcdefg", 2)
    named = merging._setting_differences(ours, theirs)
    assert named == "a None instead of 1, b 2 instead of 1, c 2 instead of 1, and 4 other keys"
    assert merging._setting_differences(ours, dict(ours)) == ""
    long = merging._setting_differences({"layer_types": ["full"] * 28}, {"layer_types": ["full"] * 99})
    assert len(long) < 100


@pytest.mark.parametrize(
    ("count", "weights", "message"),
    [(1, [], "give two folders"), (2, [0, 0], "add up to 0"), (2, [1, "nan"], "must be 0 or more")],
)
def test_numbers_that_make_no_average_are_refused(folders, tmp_path, capsys, count, weights, message):
    assert merge(folders[:count], tmp_path / "merged", *weights) == 2
    assert message in capsys.readouterr().err


def test_other_tokenizers_and_existing_folders_are_refused(folders, tmp_path, capsys):
    path = folders[1] / "tokenizer.json"
    path.write_text(path.read_text().replace("castle", "castel"))
    assert merge(folders[:2], tmp_path) == 2
    said = capsys.readouterr().err
    assert "its tokenizer.json is not that of" in said
    assert "already exists" in said
    with pytest.raises(FileExistsError):
        merging.merge(folders[:1], [1.0], tmp_path)
