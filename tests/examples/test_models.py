"""A decoder from a GGUF file: the folder is the model, whole or its first layers; what is wrong is said in a sentence.

python -m pytest tests/examples/test_models.py
"""

import json

import pytest
import tiny_gguf
import torch
from transformers import AutoModel, AutoTokenizer

from examples.models import minilm, smollm2, weights
from modeling.tokenizer import load_tokenizer, make_encoder
from utils import RunError

TEXTS = ["def copy(source, target):\n    return shutil.copy(source, target)", "Copy a file and its permissions, 12 345"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A GGUF file, and the model that it holds."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return path, tiny_gguf.write(path, TEXTS * 20)


def states(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).last_hidden_state[0]


def test_the_folder_is_the_model_of_the_file(tiny, tmp_path):
    path, model = tiny
    smollm2.make_backbone(tmp_path / "all", None, path)
    read = AutoModel.from_pretrained(tmp_path / "all")
    ids = list(range(3, 40))
    expected = states(model, ids)
    assert expected.abs().mean() > 0.1
    torch.testing.assert_close(states(read, ids), expected)
    config = json.loads((tmp_path / "all" / "config.json").read_text())
    assert config["architectures"] == ["LlamaModel"]
    assert "quantization_config" not in config
    assert "tiny" not in json.dumps(config)  # the name that the file has for its model
    assert not list((tmp_path / "all").glob("*.bin"))


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_depth_is_the_first_layers_and_the_final_norm(tiny, tmp_path, layers):
    path, model = tiny
    smollm2.make_backbone(tmp_path / "some", layers, path)
    read = AutoModel.from_pretrained(tmp_path / "some")
    assert read.config.num_hidden_layers == layers
    seen = []
    hook = model.layers[layers - 1].register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    ids = list(range(3, 40))
    states(model, ids)
    hook.remove()
    after = seen[0].reshape(len(ids), -1)  # Transformers 4 gives a tuple of [1, T, d], 5 [1, T, d] itself
    torch.testing.assert_close(states(read, ids), model.norm(after).detach())


def test_eos_ends_texts_though_it_pads_as_well(tiny, tmp_path):
    path, _ = tiny
    smollm2.make_backbone(tmp_path / "all", None, path)
    tokenizer, problems = load_tokenizer(str(tmp_path / "all"))
    assert problems == []
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    ids, lengths, _ = make_encoder(tokenizer, 512)(TEXTS)
    ends = lengths.cumsum() - 1
    assert ids[ends].tolist() == [2, 2]
    assert (ids == 2).sum() == 2  # one in each text, no begin token before it
    by_reader = AutoTokenizer.from_pretrained(tmp_path / "all")(TEXTS[0])["input_ids"]
    assert by_reader == ids[: lengths[0]].tolist()


def test_a_folder_of_the_same_file_and_depth_is_made_once(tiny, tmp_path):
    path, _ = tiny
    folder = tmp_path / "some"
    smollm2.make_backbone(folder, 2, path)
    first = (folder / "model.safetensors").stat().st_mtime_ns
    smollm2.make_backbone(folder, 2, path)
    assert (folder / "model.safetensors").stat().st_mtime_ns == first
    smollm2.make_backbone(folder, 1, path)
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 1


def test_a_folder_of_somebody_else_is_left_alone(tiny, tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mine.txt").write_text("mine")
    with pytest.raises(RunError, match="models: exists and was not made by this command"):
        smollm2.make_backbone(tmp_path / "models", 1, tiny[0])
    assert (tmp_path / "models" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("layers", [0, 4, -1])
def test_a_depth_that_the_model_has_not_is_refused(tiny, tmp_path, layers):
    with pytest.raises(RunError, match=rf"layers: {layers} is not between 1 and 3"):
        smollm2.make_backbone(tmp_path / "some", layers, tiny[0])
    assert not (tmp_path / "some").exists()


def cut_short(data: bytes) -> bytes:
    return data[: len(data) // 2]


def no_gguf(data: bytes) -> bytes:
    return b"GIF89a" + data[6:]


def without_names(data: bytes) -> bytes:
    return data.replace(b"blk.2.attn_q", b"blk.2.attn_x")


@pytest.mark.parametrize("damage", [cut_short, no_gguf, without_names])
def test_a_damaged_file_is_refused_and_the_folder_stays_as_it_was(tiny, tmp_path, damage):
    folder = tmp_path / "some"
    smollm2.make_backbone(folder, 1, tiny[0])
    before = (folder / "model.safetensors").read_bytes()
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(damage(tiny[0].read_bytes()))
    with pytest.raises(RunError, match=r"damaged\.gguf: "):
        smollm2.make_backbone(folder, 1, damaged)
    assert (folder / "model.safetensors").read_bytes() == before


def test_the_command_says_what_is_missing_in_one_line(tmp_path, capsys):
    assert smollm2.main([str(tmp_path / "some"), "--gguf", str(tmp_path / "none.gguf")]) == 2
    assert capsys.readouterr().err == f"{tmp_path}/none.gguf: no such file\n"


def test_a_missing_package_is_named_with_the_command_that_installs_it():
    absent = weights.Weights(package="no-such-package==1.0", module="no_such_module", file="x", sha256="")
    with pytest.raises(RunError) as refused:
        weights.locate(absent)
    assert str(refused.value) == f"the package no-such-package==1.0 is missing: {weights.INSTALL}"


def test_a_file_that_is_not_the_published_one_is_refused(tmp_path, monkeypatch):
    (tmp_path / "some_weights").mkdir()
    (tmp_path / "some_weights" / "__init__.py").write_text("raise RuntimeError('is not imported')")
    (tmp_path / "some_weights" / "model.zip").write_bytes(b"something else")
    monkeypatch.syspath_prepend(tmp_path)
    other = weights.Weights(package="some-weights==1.0", module="some_weights", file="model.zip", sha256="0" * 64)
    with pytest.raises(RunError, match=r"model\.zip: damaged, its checksum is another"):
        weights.locate(other)


def package_is_installed(wanted: weights.Weights) -> bool:
    try:
        weights.locate(wanted)
    except RunError:
        return False
    return True


@pytest.mark.weights
def test_smollm2_is_the_decoder_that_its_authors_describe(tmp_path):
    if not package_is_installed(weights.SMOLLM2):
        pytest.skip(weights.INSTALL)
    smollm2.make_backbone(tmp_path / "smollm2")
    model = AutoModel.from_pretrained(tmp_path / "smollm2")
    assert sum(weight.numel() for weight in model.parameters()) == 134_515_008
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "smollm2")
    ids = tokenizer("The capital of France is", add_special_tokens=False)["input_ids"]
    next_id = int((states(model, ids)[-1] @ model.embed_tokens.weight.T).argmax())
    assert tokenizer.decode(next_id) == " Paris"


@pytest.mark.weights
def test_minilm_finds_what_it_should(tmp_path):
    if not package_is_installed(weights.MINILM):
        pytest.skip(weights.INSTALL)
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(minilm.unpack(tmp_path / "minilm")), device="cpu")
    texts = ["a cat sits on a mat", "the kitten is on the rug", "interest rates rose again"]
    cosines = model.similarity(model.encode(texts), model.encode(texts))
    assert cosines[0, 1] > 0.5 > cosines[0, 2]
