"""The pruning command: what it writes trains and loads elsewhere, what it cannot do it refuses at once.

python -m pytest tests/tools/test_prune_model.py
"""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import toy_settings, train_here
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, LlamaConfig

from modeling.versions import embedding_width, in_dtype
from tools import prune_model


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("calibration") / "texts.jsonl"
    lines = [json.dumps(f"The river number {number} is old.") for number in range(20)]
    lines += ['{"text": "A castle was sold."}', '{"query": "bridge", "passage": "The bridge stands empty."}', ""]
    path.write_text("\n".join(lines))
    return path


def prune(source, target, *more) -> int:
    return prune_model.main(["--input", str(source), "--output", str(target), *map(str, more)])


def test_a_pruned_folder_is_consistent_and_trains_on_the_stores_of_the_larger_one(toy_world, texts, tmp_path, capsys):
    small = tmp_path / "small"
    sizes = ("--hidden_size", 24, "--intermediate_size", 40, "--num_layers", 1, "--calibration", texts)
    assert prune(toy_world.backbone, small, *sizes) == 0
    config = json.loads((small / "config.json").read_text())
    assert (config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]) == (24, 40, 1)
    assert len(config.get("layer_types", [0])) == 1  # configs name them since Transformers 4.53
    assert config["head_dim"] == 8
    assert config["rope_theta"] == config.get("rope_parameters", config)["rope_theta"]  # Transformers 4 looks here
    weights = load_file(small / "model.safetensors")
    assert weights["layers.0.self_attn.q_norm.weight"].shape == (8,)
    assert weights["embed_tokens.weight"].shape == (512, 24)
    said = capsys.readouterr().out
    assert "parameters" in said
    assert "23 texts ranked the units" in said

    trained = train_here(toy_settings(toy_world, tmp_path) | {"model_path": str(small)})

    assert (trained / "step_4" / "model.safetensors").exists()


@pytest.fixture(scope="module")
def trained(toy_world, tmp_path_factory):
    """A model folder that run.py has written."""
    settings = {"use_mrl": True, "train_steps": 2, "attn_backend": "segments"}
    return train_here(toy_settings(toy_world, tmp_path_factory.mktemp("trained")) | settings) / "step_2"


def pooling_name(module) -> str:
    """What Sentence Transformers says of its own module; 5.0 by a method."""
    return module.get_pooling_mode_str() if hasattr(module, "get_pooling_mode_str") else module.pooling_mode


@pytest.mark.parametrize("author", ["written here", "written elsewhere"])
def test_a_trained_folder_stays_one_that_sentence_transformers_loads(trained, texts, tmp_path, author):
    source = trained
    if author == "written elsewhere":
        source = shutil.copytree(trained, tmp_path / "source")
        (source / "f2llm.json").unlink()
    assert prune(source, tmp_path / "small", "--hidden_size", 24, "--num_layers", 1, "--calibration", texts) == 0
    whole, model = (SentenceTransformer(str(folder), device="cpu") for folder in (source, tmp_path / "small"))
    assert embedding_width(model) == 24
    assert [type(module) for module in model] == [type(module) for module in whole]
    assert pooling_name(model[1]) == pooling_name(whole[1]) == "lasttoken"
    assert model.prompts == whole.prompts
    assert model.prompts["query"].startswith("Instruct: ")
    assert model.max_seq_length == whole.max_seq_length
    found = model.encode_query(["a river"])
    assert found.shape == (1, 24)
    assert np.linalg.norm(found) == pytest.approx(1, abs=1e-5)
    assert abs(found - model.encode_document(["a river"])).max() > 1e-3  # the prompt is in it
    pooling = json.loads((tmp_path / "small" / "1_Pooling" / "config.json").read_text())
    assert pooling["word_embedding_dimension"] == 24
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["matryoshka_dimensions"] == [8, 16, 24]
    assert (config["num_hidden_layers"], len(config.get("layer_types", [0]))) == (1, 1)
    read_strictly(tmp_path / "small")


def test_modules_with_weights_of_the_old_width_are_refused(trained, tmp_path, capsys):
    source = shutil.copytree(trained, tmp_path / "source")
    modules = json.loads((source / "modules.json").read_text())
    modules.append({"idx": 3, "name": "3", "path": "../3_Dense", "type": "sentence_transformers.models.Dense"})
    (source / "modules.json").write_text(json.dumps(modules))
    assert prune(source, tmp_path / "small", "--num_layers", 1) == 2
    said = capsys.readouterr().err
    assert "its module Dense has weights for the decoder's width" in said
    assert "'../3_Dense' is not the name of a folder beside it" in said
    for text in ("{}", '[{"type": 1}]', "["):
        (source / "modules.json").write_text(text)
        assert prune(source, tmp_path / "small", "--num_layers", 1) == 2
        assert "modules.json: not a list of modules" in capsys.readouterr().err
    assert not (tmp_path / "small").exists()


@pytest.fixture(scope="module")
def llama(toy_world, tmp_path_factory):
    """A Llama folder with the toy tokenizer; a hidden size that its heads divide is all that Transformers takes."""
    folder = tmp_path_factory.mktemp("llama") / "model"
    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, rope_theta=777.0, initializer_range=0.2)
    AutoModel.from_config(config).save_pretrained(folder)
    copy_tokenizer(toy_world.backbone, folder)
    return folder


def copy_tokenizer(source, target) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (target / name).write_bytes((source / name).read_bytes())


def read_strictly(folder):
    """A decoder whose files hold all its weights, and no others."""
    model, found = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values()), found
    return model


def test_a_llama_is_cut_in_all_directions_and_every_reader_takes_it(llama, toy_world, texts, tmp_path, capsys):
    small = tmp_path / "small"
    sizes = ("--hidden_size", 20, "--intermediate_size", 16, "--num_layers", 2, "--calibration", texts)
    assert prune(llama, small, *sizes) == 0
    model = read_strictly(small)
    layer = model.layers[1]
    assert model.embed_tokens.weight.shape == (512, 20)
    assert layer.self_attn.q_proj.weight.shape == (4 * 8, 20)  # heads keep their width of 8: 4 x 8 is no longer hidden
    assert layer.self_attn.k_proj.weight.shape == (2 * 8, 20)
    assert layer.mlp.down_proj.weight.shape == (20, 16)
    config = json.loads((small / "config.json").read_text())
    assert (config["num_hidden_layers"], config["head_dim"], config["rope_theta"]) == (2, 8, 777.0)
    parameters = sum(weight.numel() for weight in model.parameters())
    assert f"-> {parameters:,} (" in capsys.readouterr().out
    assert SentenceTransformer(str(small), device="cpu").encode(["a river"]).shape == (1, 20)
    assert (small / "model.safetensors").stat().st_mode == (small / "config.json").stat().st_mode
    trained = train_here(toy_settings(toy_world, tmp_path) | {"model_path": str(small), "train_steps": 1})
    assert (trained / "step_1" / "model.safetensors").exists()


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_folder_of_which_nothing_is_cut_is_the_same_decoder(llama, toy_world, texts, tmp_path, kind):
    source = {"llama": llama, "qwen3": toy_world.backbone}[kind]
    assert prune(source, tmp_path / "same", "--hidden_size", 32, "--calibration", texts) == 0
    tokens = torch.arange(3, 40)[None]
    before, after = (read_strictly(folder).eval()(tokens).last_hidden_state for folder in (source, tmp_path / "same"))
    assert torch.equal(before, after)


def test_an_adapter_is_refused_with_the_command_that_merges_it(toy_world, tmp_path, capsys):
    settings = toy_settings(toy_world, tmp_path) | {"use_lora": True, "train_steps": 1}
    adapter = train_here(settings) / "step_1"
    assert prune(adapter, tmp_path / "small", "--num_layers", 1) == 2
    assert "it holds a LoRA adapter: make a model of it with python -m tools.merge_adapter" in capsys.readouterr().err
    assert not (tmp_path / "small").exists()


def test_the_same_command_gives_the_same_weights_and_another_norm_or_sample_others(toy_world, texts, tmp_path):
    commands = {"one": (), "two": (), "norm": ("--norm", "max"), "sample": ("--calibration_texts", 2, "--seed", 5)}
    found = {}
    for name, more in commands.items():
        sizes = ("--hidden_size", 12, "--intermediate_size", 20, "--calibration", texts)
        assert prune(toy_world.backbone, tmp_path / name, *sizes, *more) == 0
        found[name] = load_file(tmp_path / name / "model.safetensors")["layers.1.mlp.up_proj.weight"]
    assert torch.equal(found["one"], found["two"])
    assert not torch.equal(found["one"], found["norm"])
    assert not torch.equal(found["one"], found["sample"])


def test_residual_units_stay_at_their_places_unless_ascending_ones_are_asked_for(toy_world, texts, tmp_path):
    order = {}
    for way, more in {"places": [], "ascending": ["--unit_order", "ascending"]}.items():
        words = ["--hidden_size", 24, "--calibration", texts, *more]
        assert prune(toy_world.backbone, tmp_path / way, *words) == 0
        order[way] = units_of(tmp_path / way, toy_world.backbone)
    assert order["ascending"] == sorted(order["places"])
    assert order["places"] != order["ascending"]
    for unit in order["ascending"]:
        assert unit >= 24 or order["places"][unit] == unit


def units_of(small, whole) -> list[int]:
    """Which of the larger decoder's residual units each unit is, by its column of token embeddings."""
    columns = load_file(whole / "model.safetensors")["embed_tokens.weight"].T
    found = load_file(small / "model.safetensors")["embed_tokens.weight"].T
    return torch.cdist(found, columns).argmin(dim=1).tolist()


def test_depth_alone_needs_no_texts_and_keeps_bf16(toy_world, tmp_path):
    half = tmp_path / "half"
    model = AutoModel.from_pretrained(toy_world.backbone, **in_dtype(torch.bfloat16))
    model.save_pretrained(half)
    copy_tokenizer(toy_world.backbone, half)
    assert prune(half, tmp_path / "small", "--num_layers", 1) == 0
    weights = load_file(tmp_path / "small" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    original = model.state_dict()
    assert all(torch.equal(weight, original[name]) for name, weight in weights.items())


REFUSED = {
    "nothing to prune": (),
    "--hidden_size 33: must be between 1 and 32": ("--hidden_size", 33),
    "--num_layers 0: must be between 1 and 2": ("--num_layers", 0),
    "--calibration: needed to choose units": ("--intermediate_size", 8),
}


@pytest.mark.parametrize("message", REFUSED)
def test_sizes_that_cannot_be_are_refused(toy_world, tmp_path, capsys, message):
    assert prune(toy_world.backbone, tmp_path / "small", *REFUSED[message]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "small").exists()


@pytest.mark.skipif(not hasattr(LlamaConfig, "validate_architecture"), reason="Transformers 4 takes these sizes")
def test_a_hidden_size_that_transformers_refuses_is_refused_before_the_model_is_loaded():
    config = LlamaConfig(hidden_size=36, num_attention_heads=9, num_key_value_heads=3, intermediate_size=64)
    words = ["--input", "model", "--output", "small", "--hidden_size"]
    (said,) = prune_model.size_problems(prune_model.parse([*words, "32"]), config)
    assert said.startswith("Transformers refuses these sizes: ")
    assert "(32) is not a multiple of the number of attention heads (9)" in said
    assert prune_model.size_problems(prune_model.parse([*words, "27"]), config) == []


def test_all_problems_are_named_at_once(toy_world, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('"good"\n{"title": "no text"}\nnot json\n')
    flags = ("--hidden_size", 99, "--num_layers", 9, "--calibration", bad)
    assert prune(toy_world.backbone, tmp_path, *flags) == 2
    said = capsys.readouterr().err
    for part in ("--hidden_size 99", "--num_layers 9", "already exists", "line 2: give a JSON string", "line 3: give"):
        assert part in said


def test_missing_models_and_texts_are_refused(tmp_path, toy_world, capsys):
    assert prune(tmp_path / "nowhere", tmp_path / "small", "--num_layers", 1) == 2
    assert "no such folder" in capsys.readouterr().err
    assert prune(toy_world.backbone, tmp_path / "small", "--hidden_size", 8, "--calibration", tmp_path / "none") == 2
    assert "cannot be read" in capsys.readouterr().err
    (tmp_path / "empty").write_text("\n")
    assert prune(toy_world.backbone, tmp_path / "small", "--hidden_size", 8, "--calibration", tmp_path / "empty") == 2
    assert "no text in it: on each line, give a JSON string, an object with text, or" in capsys.readouterr().err


ROWS = {  # a row -> its texts
    '{"query": "a", "passage": "b", "negative_1": "c", "negative_2": null}': "abc",
    '{"query": "a", "positive": "b", "score": 1}': "ab",
    '{"anchor": "a", "positive": "b", "negative": "c"}': "abc",
    '{"query": "a", "pos": ["b", "c"], "neg": ["d", " "], "prompt": "find"}': "abcd",
    '{"query": "a", "passage": "b", "negatives": ["c"]}': "abc",
    '{"query": "a"}': "a",
    '{"passage": "b"}': "b",
    '{"text": "a", "title": "b"}': "a",
    '"a"': "a",
    '{"query": "a", "answer": "b"}': "",  # refused: the answer would be lost
    '{"title": "a"}': "",
    '["a"]': "",
}


@pytest.mark.parametrize("row", ROWS)
def test_calibration_reads_all_texts_of_a_row_or_none(row):
    assert prune_model.texts_of_line(row) == list(ROWS[row])


def test_a_line_separator_in_a_text_ends_no_line(tmp_path):
    (tmp_path / "texts").write_text(json.dumps("a\u2028b", ensure_ascii=False), encoding="utf-8")
    words = ["--input", "", "--output", "", "--hidden_size", "8", "--calibration", str(tmp_path / "texts")]
    assert prune_model.calibration_texts(prune_model.parse(words)) == (["a\u2028b"], [])


def test_a_calibration_file_that_is_not_json_lines_and_no_room_for_texts_are_refused(toy_world, tmp_path, capsys):
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    for path in (tmp_path, tmp_path / "bytes", tmp_path / "rows.parquet"):
        flags = ("--hidden_size", 8, "--max_seq_length", 1, "--calibration_texts", 0, "--calibration", path)
        assert prune(toy_world.backbone, tmp_path / "small", *flags) == 2
        said = capsys.readouterr().err
        assert f"--calibration {path}: not a file of JSON lines" in said
        assert "--max_seq_length 1: must be at least 2" in said
        assert "--calibration_texts 0: must be at least 1" in said
        assert len(said.strip().splitlines()) == 3
