"""The exporting command: what it writes is the model that it was given, and what it cannot write it refuses first.

    python -m pytest tests/tools/test_export.py

The vectors of its folders in other people's programs: tests/export/test_round_trip.py.
"""

import json
import resource
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from model_folders import LIMIT, TEXTS, facts, make_adapted, training_vectors
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaModel

from export import convert, model_folder, onnx_file
from modeling.backbone import load_backbone
from modeling.merging import merge
from modeling.pooling import cut_of
from modeling.tokenizer import make_encoder
from tools import export


@pytest.fixture(scope="module")
def full(toy_world, tokenizer, tmp_path_factory):
    """A folder of a model that was trained with Matryoshka."""
    folder = tmp_path_factory.mktemp("export") / "full"
    backbone = load_backbone(str(toy_world.backbone), torch.float32).eval()
    model_folder.save(folder, backbone, tokenizer, facts(matryoshka_dims=[8, 16, 32]), torch.float32)
    return folder


def run(model, output, *more: str) -> int:
    return export.main(["--model", str(model), "--output", str(output), *more])


def config_of(folder) -> dict:
    return json.loads((folder / "config.json").read_text())


# ------------------------------------------------------------------------------------------ safetensors


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_weights_are_of_the_type_that_is_asked_for(full, tmp_path, name, capsys):
    assert run(full, tmp_path / "m", "--dtype", name) == 0
    weights = load_file(tmp_path / "m" / "model.safetensors")
    before = load_file(full / "model.safetensors")
    assert weights.keys() == before.keys()
    for key, weight in weights.items():
        assert torch.equal(weight, before[key].to(export.DTYPES[name]))
    assert config_of(tmp_path / "m")["dtype"] == str(export.DTYPES[name]).removeprefix("torch.")
    assert "32 dimensions, read back" in capsys.readouterr().out


def test_a_models_own_type_of_weights_is_kept(full, tmp_path):
    assert run(full, tmp_path / "first", "--dtype", "bf16") == 0
    assert run(tmp_path / "first", tmp_path / "second", "--dimension", "16") == 0
    for name in ("model.safetensors", "tokenizer.json", "1_Pooling/config.json", "config_sentence_transformers.json"):
        assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "first" / name).read_bytes(), name


def test_a_cut_folder_says_so_everywhere_and_is_cut_again(full, tmp_path):
    assert run(full, tmp_path / "first", "--dimension", "16") == 0
    assert run(tmp_path / "first", tmp_path / "second", "--dimension", "8") == 0
    assert run(tmp_path / "second", tmp_path / "same") == 0
    for name, dims in (("first", [8, 16]), ("second", [8]), ("same", [8])):
        folder = tmp_path / name
        assert cut_of(folder) == dims[-1]
        assert config_of(folder)["matryoshka_dimensions"] == dims
        assert f"\n{dims[-1]} dimensions, at most {LIMIT} tokens" in (folder / "README.md").read_text()
    assert run(tmp_path / "first", tmp_path / "other", "--dimension", "32") == 2  # they are gone


def test_the_whole_width_is_no_cut(full, tmp_path):
    assert run(full, tmp_path / "m", "--dimension", "32") == 0
    assert cut_of(tmp_path / "m") is None
    assert (tmp_path / "m" / "modules.json").read_bytes() == (full / "modules.json").read_bytes()


def test_an_average_of_cut_folders_is_cut(full, tmp_path):
    assert run(full, tmp_path / "cut", "--dimension", "8") == 0
    merge([tmp_path / "cut", tmp_path / "cut"], [1.0, 1.0], tmp_path / "average")
    assert cut_of(tmp_path / "average") == 8


# ------------------------------------------------------------------------------------------------ ONNX


def vectors_of_onnx(folder, tokenizer, texts: list[str]) -> np.ndarray:
    """[n, d] of texts in one padded batch, the pads being any token."""
    tokens, lengths, _ = make_encoder(tokenizer, LIMIT)(texts)
    ids = np.full((len(texts), lengths.max()), 7, np.int64)
    mask = np.arange(lengths.max()) < lengths[:, None]
    ids[mask] = tokens
    return onnx_file.embed(onnx_file.open_session(folder / "onnx" / "model.onnx"), ids, mask.astype(np.int64))


@pytest.fixture(scope="module")
def in_onnx(toy_world, tokenizer, tmp_path_factory):
    """An adapter, merged, cut and exported."""
    root = tmp_path_factory.mktemp("onnx")
    adapted = make_adapted(toy_world.backbone)
    model_folder.save(root / "adapter", adapted, tokenizer, facts(matryoshka_dims=[8, 16, 32]), torch.float32)
    assert run(root / "adapter", root / "m", "--format", "onnx", "--dimension", "16") == 0
    return root / "m", training_vectors(adapted, tokenizer, TEXTS)


def test_onnx_gives_the_training_vectors_alone_and_in_any_batch(in_onnx, tokenizer):
    folder, full_vectors = in_onnx
    expected = F.normalize(full_vectors[:, :16], dim=-1).numpy()
    assert expected.std() > 0.05
    alone = np.concatenate([vectors_of_onnx(folder, tokenizer, [text]) for text in TEXTS])  # 1 to 24 tokens
    assert np.abs(alone - expected).max() <= 1e-5
    for count in (2, len(TEXTS)):
        assert np.abs(vectors_of_onnx(folder, tokenizer, TEXTS[:count]) - expected[:count]).max() <= 1e-5
    many = vectors_of_onnx(folder, tokenizer, TEXTS * 9)
    assert np.abs(many.reshape(9, *expected.shape) - expected).max() <= 1e-5


def test_onnx_has_the_states_too_and_the_folder_everything_but_weights(in_onnx):
    folder, _ = in_onnx
    session = onnx_file.open_session(folder / "onnx" / "model.onnx")
    assert [output.name for output in session.get_outputs()] == ["last_hidden_state", "sentence_embedding"]
    assert session.get_outputs()[0].shape[-1] == 32
    assert session.get_outputs()[1].shape[-1] == 16
    names = {path.name for path in folder.iterdir()}
    assert "model.safetensors" not in names
    assert names >= {"config.json", "tokenizer.json", "modules.json", "README.md", "f2llm.json", "2_Dense"}
    assert config_of(folder)["architectures"] == ["Qwen3Model"]


def test_onnx_of_a_llama(tokenizer, tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    model = LlamaModel(config).eval()
    model_folder.save(tmp_path / "llama", model, tokenizer, facts(), torch.float32)
    assert run(tmp_path / "llama", tmp_path / "m", "--format", "onnx") == 0
    found = vectors_of_onnx(tmp_path / "m", tokenizer, TEXTS)
    assert np.abs(found - training_vectors(model, tokenizer, TEXTS).numpy()).max() <= 1e-5


def test_onnx_that_differs_is_not_published(full, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(onnx_file, "write", lambda *arguments: None)
    monkeypatch.setattr(onnx_file, "largest_distance", lambda *arguments: float("nan"))
    assert run(full, tmp_path / "m", "--format", "onnx") == 2
    assert "its embeddings differ from the source's by nan" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


# ------------------------------------------------------------------------------------------------ GGUF


def test_gguf_is_a_folder_that_llama_cpp_converts_and_the_commands(full, tmp_path, capsys):
    assert run(full, tmp_path / "m", "--format", "gguf", "--dtype", "bf16") == 0
    printed = capsys.readouterr().out
    assert f"python convert_hf_to_gguf.py {tmp_path / 'm'} --outfile {tmp_path / 'm'}.gguf --outtype bf16" in printed
    assert f"--embedding --pooling last --ctx-size {LIMIT}" in printed
    assert (tmp_path / "m" / "model.safetensors").exists()


# --------------------------------------------------------------------------------------------- refusals


def test_read_back_notices_another_model(full, tmp_path, monkeypatch, capsys):
    real = model_folder.save_weights

    def damaged(folder, backbone, weights, *more):
        changed = {name: weight * 1.1 if "up_proj" in name else weight for name, weight in weights.items()}
        real(folder, backbone, changed, *more)

    monkeypatch.setattr(model_folder, "save_weights", damaged)
    assert run(full, tmp_path / "m") == 2
    assert "embeddings differ from the live model's" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


def test_read_back_notices_a_cut_that_is_missing(full):
    """The folder has 32 dimensions, the source 8."""
    source = convert.read(full)
    (problem,) = convert.probe.read_back(
        full, source.tokens, source.cu_seqlens, source.embeddings[:, :8], rounded=False
    )
    assert "its embeddings have 32 dimensions, the live model's 8" in problem


@pytest.mark.parametrize(
    ("change", "value"), [("bias", True), ("activation_function", "torch.nn.modules.activation.Tanh")]
)
def test_a_dense_module_that_does_more_than_cut_is_refused(full, tmp_path, change, value, capsys):
    assert run(full, tmp_path / "m", "--dimension", "8") == 0
    path = tmp_path / "m" / "2_Dense" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {change: value}))
    assert run(tmp_path / "m", tmp_path / "again") == 2
    assert "a Dense module that does more than cut embeddings" in capsys.readouterr().err


def test_a_dense_module_with_other_weights_is_refused(full, tmp_path, capsys):
    assert run(full, tmp_path / "m", "--dimension", "8") == 0
    save_file({"linear.weight": 2 * torch.eye(8, 32)}, tmp_path / "m" / "2_Dense" / "model.safetensors")
    assert run(tmp_path / "m", tmp_path / "again") == 2
    assert "a Dense module that does more than cut embeddings" in capsys.readouterr().err


def test_all_problems_are_named_at_once_and_what_was_there_stays(full, tmp_path, capsys):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "mine").write_text("mine")
    assert run(full, tmp_path / "m", "--format", "onnx", "--dtype", "bf16", "--dimension", "12") == 2
    said = capsys.readouterr().err
    assert "--dimension 12: the model was trained to be cut to 8, 16, 32" in said
    assert f"--output {tmp_path / 'm'}: already exists" in said
    assert "--dtype bf16: ONNX is written in fp32" in said
    assert (tmp_path / "m" / "mine").read_text() == "mine"


def test_a_model_without_matryoshka_is_not_cut(toy_world, tokenizer, tmp_path, capsys):
    backbone = load_backbone(str(toy_world.backbone), torch.float32)
    model_folder.save(tmp_path / "plain", backbone, tokenizer, facts(), torch.float32)
    assert run(tmp_path / "plain", tmp_path / "m", "--dimension", "8") == 2
    assert "--dimension 8: the model was trained without use_mrl" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{", '{"hidden_size": 32}', "[]"])
def test_damaged_facts_are_refused_with_the_file(full, tmp_path, text, capsys):
    (tmp_path / "m").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "m" / name).write_bytes((full / name).read_bytes())
    (tmp_path / "m" / "f2llm.json").write_text(text)
    assert run(tmp_path / "m", tmp_path / "out") == 2
    assert f"{tmp_path / 'm' / 'f2llm.json'}: cannot be read" in capsys.readouterr().err


def test_another_folder_is_refused(toy_world, tmp_path, capsys):
    assert run(toy_world.backbone, tmp_path / "m") == 2
    said = f"{toy_world.backbone}: no f2llm.json in it; give a folder that run.py saved, as output/RUN/epoch_2"
    assert said in capsys.readouterr().err
    assert run(tmp_path / "nowhere", tmp_path / "m") == 2
    assert "no such folder" in capsys.readouterr().err


def test_a_folder_without_whole_weights_is_refused_before_it_is_loaded(full, in_onnx, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(convert, "load_backbone", None)
    shutil.copytree(full, tmp_path / "cut short")
    weights = tmp_path / "cut short" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert run(tmp_path / "cut short", tmp_path / "m") == 2
    assert f"{weights}: damaged or cut short" in capsys.readouterr().err
    assert run(in_onnx[0], tmp_path / "m") == 2  # its weights are not safetensors
    assert f"{in_onnx[0] / 'model.safetensors'}: no such file" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_said(full, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert run(full, tmp_path / "file" / "m") == 2
    assert f"{tmp_path / 'file'} is a file" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("limit", [200, 20_000], ids=["a small file", "the weights"])
def test_a_full_disk_ends_in_a_sentence(full, tmp_path, monkeypatch, capsys, limit):
    """It had the exit status of refused input; in the weights, whose library has its own error, it was a traceback."""
    real = convert.write
    sizes = resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_small_disk(*words) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, sizes[1]))
        try:
            real(*words)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, sizes)

    monkeypatch.setattr(convert, "write", on_small_disk)
    assert run(full, tmp_path / "m") == 1
    assert "the disk refuses what is written: " in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


def test_a_fault_of_the_code_is_not_told_as_refused_input(full, tmp_path, monkeypatch):
    def lost(*_):
        raise FileNotFoundError("a file that was never written")

    monkeypatch.setattr(convert, "write", lost)
    with pytest.raises(FileNotFoundError):
        run(full, tmp_path / "m")


def test_an_adapter_without_its_base_is_refused(toy_world, tokenizer, tmp_path, capsys):
    model_folder.save(tmp_path / "a", make_adapted(toy_world.backbone), tokenizer, facts(), torch.float32)
    path = tmp_path / "a" / "adapter_config.json"
    moved = str(tmp_path / "moved away")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": moved}))
    assert run(tmp_path / "a", tmp_path / "m") == 2
    assert f"the base model of {tmp_path / 'a'}: {moved!r}: no such folder" in capsys.readouterr().err


def test_gguf_is_not_cut(full, tmp_path, capsys):
    assert run(full, tmp_path / "m", "--format", "gguf", "--dimension", "8") == 2
    assert "llama.cpp cannot cut embeddings" in capsys.readouterr().err


def test_missing_packages_are_named_with_the_command_that_installs_them():
    assert export.format_problems("onnx", None, []) == []
    (problem,) = export.format_problems("onnx", None, ["onnxscript"])
    assert problem == "--format onnx: needs onnxscript: pip install onnx onnxscript onnxruntime"
    assert export.format_problems("safetensors", "bf16", ["onnxscript"]) == []
