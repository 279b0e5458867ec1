"""Saved folders: every reader gets the training's own vectors, and the probe notices when one would not.

python -m pytest tests/export/test_model_folder.py
"""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import toy
from model_folders import (
    LIMIT,
    TEXTS,
    as_sentence_transformers_reads,
    assert_same_vectors,
    facts,
    make_adapted,
    training_vectors,
)
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoConfig, AutoModel, AutoTokenizer

from export import model_folder, probe
from model import Embedder
from modeling.backbone import add_lora, load_backbone
from modeling.pooling import POOLINGS, pooling_of
from modeling.tokenizer import make_encoder
from modeling.versions import in_dtype
from tools import merge_adapter
from training.identity import config_digest
from utils import write_json


@pytest.fixture
def tokenizer(toy_world):
    return AutoTokenizer.from_pretrained(toy_world.backbone)


@pytest.fixture
def backbone(toy_world):
    return load_backbone(str(toy_world.backbone), torch.float32).eval()


def test_sentence_transformers_gives_the_training_vectors(backbone, tokenizer, tmp_path, recwarn):
    model_folder.save(tmp_path / "m", backbone, tokenizer, facts(), torch.float32)
    loaded = SentenceTransformer(str(tmp_path / "m"), device="cpu")
    assert not [w for w in recwarn if "sentence_transformers" in str(w.filename) and "deprecat" in str(w.message)]
    assert loaded.max_seq_length == LIMIT
    assert loaded.similarity_fn_name == "cosine"
    assert_same_vectors(loaded.encode(TEXTS, convert_to_tensor=True), training_vectors(backbone, tokenizer, TEXTS))
    prompted = [model_folder.query_prompt("Find it.") + text for text in TEXTS]
    expected = training_vectors(backbone, tokenizer, as_sentence_transformers_reads(prompted))
    assert_same_vectors(loaded.encode_query(TEXTS, convert_to_tensor=True), expected)
    assert_same_vectors(
        loaded.encode_document(TEXTS, convert_to_tensor=True), training_vectors(backbone, tokenizer, TEXTS)
    )


def test_files_say_what_every_reader_looks_for(backbone, tokenizer, tmp_path):
    dims = [8, 16, 32]
    model_folder.save(tmp_path / "m", backbone, tokenizer, facts(matryoshka_dims=dims), torch.bfloat16)

    def read(name: str):
        return json.loads((tmp_path / "m" / name).read_text())

    config = read("config.json")
    assert config["architectures"] == ["Qwen3Model"]
    assert config["rope_theta"] == config.get("rope_parameters", config)["rope_theta"]  # a dictionary since 5
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert len(config.get("layer_types", backbone.layers)) == config["num_hidden_layers"]
    assert config["matryoshka_dimensions"] == dims
    assert [module["type"] for module in read("modules.json")] == [
        f"sentence_transformers.models.{name}" for name in ("Transformer", "Pooling", "Normalize")
    ]
    pooling = read("1_Pooling/config.json")
    assert pooling["word_embedding_dimension"] == 32
    assert [mode for mode, on in pooling.items() if mode.startswith("pooling_mode_") and on] == [
        "pooling_mode_lasttoken"
    ]
    assert pooling["pooling_mode"] == "lasttoken"
    assert read("sentence_bert_config.json") == {"max_seq_length": LIMIT, "do_lower_case": False}
    assert read("config_sentence_transformers.json")["prompts"] == {
        "query": "Instruct: Find it.\nQuery: ",
        "document": "",
    }
    assert {tensor.dtype for tensor in load_file(tmp_path / "m" / "model.safetensors").values()} == {torch.bfloat16}
    card = (tmp_path / "m" / "README.md").read_text()
    assert "| toy |  | 1,234 |" in card
    assert "first 8, 16 dimensions" in card
    assert "cosine similarity, last-token pooling.\n" in card
    assert not list(tmp_path.glob(".*"))  # nothing is left aside


def test_the_way_positions_are_stretched_is_said_where_any_version_looks_for_it(toy_world, tmp_path):
    """Transformers 4 reads rope_scaling; 5 reads both, and writes rope_parameters alone."""
    config = json.loads((toy_world.backbone / "config.json").read_text())
    theta = config.get("rope_parameters", config)["rope_theta"]
    config.pop("rope_parameters", None)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    (tmp_path / "base").mkdir()
    write_json(tmp_path / "base" / "config.json", config | {"rope_theta": theta, "rope_scaling": yarn})
    backbone = AutoModel.from_config(AutoConfig.from_pretrained(tmp_path / "base"))
    model_folder.save_weights(tmp_path / "m", backbone, backbone.state_dict(), torch.float32)
    saved = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (saved["rope_theta"], saved["rope_scaling"]) == (theta, yarn)
    assert config_digest(AutoConfig.from_pretrained(tmp_path / "m")) == config_digest(backbone.config)


def test_a_folder_is_never_overwritten(backbone, tokenizer, tmp_path):
    model_folder.save(tmp_path / "m", backbone, tokenizer, facts(), torch.float32)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "m").rglob("*")}
    with pytest.raises(FileExistsError):
        model_folder.save(tmp_path / "m", backbone, tokenizer, facts(), torch.float32)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "m").rglob("*")} == before


def test_a_folder_that_fails_its_check_gets_no_name(backbone, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="wrong"):
        model_folder.save(tmp_path / "m", backbone, tokenizer, facts(), torch.float32, check=lambda folder: ["wrong"])
    assert not (tmp_path / "m").exists()
    assert (tmp_path / ".m.partial" / "model.safetensors").exists()


def test_others_may_read_what_is_saved(backbone, tokenizer, tmp_path):
    model_folder.save(tmp_path / "m", backbone, tokenizer, facts(), torch.float32)
    assert len({path.stat().st_mode for path in (tmp_path / "m").rglob("*") if path.is_file()}) == 1


@pytest.fixture
def adapted(toy_world):
    """A backbone with adapters that are not zero."""
    return make_adapted(toy_world.backbone)


def test_an_adapter_names_its_base_and_its_merge_is_a_model(adapted, tokenizer, tmp_path):
    """Their vectors: tests/export/test_round_trip.py."""
    model_folder.save(tmp_path / "adapter", adapted, tokenizer, facts(), torch.float32)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] == "FEATURE_EXTRACTION"
    assert Path(config["base_model_name_or_path"]).is_absolute()  # the adapter is loaded from anywhere
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    assert merge_adapter.main([str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 0
    assert (tmp_path / "merged" / "model.safetensors").exists()
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    assert merge_adapter.main([str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 2  # already exists
    assert merge_adapter.main([str(tmp_path / "nowhere"), str(tmp_path / "other")]) == 2


def test_an_adapter_on_a_bf16_base_is_merged_in_fp32(toy_world, adapted, tokenizer, tmp_path):
    load_backbone(str(toy_world.backbone), torch.bfloat16).save_pretrained(tmp_path / "base")
    torch.manual_seed(3)
    model = add_lora(load_backbone(str(tmp_path / "base"), torch.float32), 4, 8, 0.1, ["q_proj"]).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=1e-3)  # far below what bf16 resolves beside a weight of 0.2
    expected = training_vectors(model, tokenizer, TEXTS)
    model_folder.save(tmp_path / "adapter", model, tokenizer, facts(), torch.float32)
    assert merge_adapter.main([str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 0
    merged = load_backbone(str(tmp_path / "merged"), torch.float32)
    assert_same_vectors(training_vectors(merged, tokenizer, TEXTS), expected)


# ------------------------------------------------------------------------------------------ probe


@pytest.fixture
def saved(backbone, tokenizer, tmp_path):
    """A good folder and what `read_back` needs to know about the live model."""
    model_folder.save(tmp_path / "m", backbone, tokenizer, facts(), torch.float32)
    batch = probe.probe_batch(tokenizer, LIMIT)
    with torch.no_grad():
        live = Embedder(backbone)(*batch, batch[1].diff().numpy())
    return tmp_path / "m", *batch, live


def test_probe_passes_a_good_folder(saved):
    assert saved[2].diff()[-1] == LIMIT  # one probe text is cut
    assert probe.read_back(*saved, rounded=False) == []


def test_probe_allows_what_bf16_costs_this_model_and_no_more(toy_world, tokenizer, tmp_path):
    """A limit of 0.1 refused this right folder, at the end of a training."""
    torch.manual_seed(0)
    config = toy.config(layers=30)
    config.initializer_range = 0.5
    deep = AutoModel.from_config(config, **in_dtype(torch.float32)).eval()
    model_folder.save(tmp_path / "m", deep, tokenizer, facts(), torch.float32)
    batch = probe.probe_batch(tokenizer, LIMIT)
    embedder = Embedder(deep, "buckets")  # rectangles of all texts: other products than text by text
    with torch.no_grad():
        exact = embedder(*batch, batch[1].diff().numpy())
        with torch.autocast("cpu", torch.bfloat16):
            live = embedder(*batch, batch[1].diff().numpy())
    assert probe._largest_distance(exact, live) > 0.1
    assert probe.read_back(tmp_path / "m", *batch, live, rounded=True) == []
    (problem,) = probe.read_back(tmp_path / "m", *batch, live, rounded=False)
    assert "embeddings differ" in problem
    neighbours = live.roll(1, dims=0)  # each text has another's embedding
    (problem,) = probe.read_back(tmp_path / "m", *batch, neighbours, rounded=True)
    assert "embeddings differ" in problem


def test_probe_notices_changed_weights(saved):
    path = saved[0] / "model.safetensors"
    weights = load_file(path)
    weights["layers.0.mlp.up_proj.weight"] *= 1.1
    save_file(weights, path, metadata={"format": "pt"})
    assert "embeddings differ from the live model's" in probe.read_back(*saved, rounded=False)[0]


def test_probe_notices_a_tokenizer_without_eos(saved, toy_world):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (saved[0] / name).write_bytes((toy_world.backbone / name).read_bytes())
    assert "its tokenizer gives other ids" in probe.read_back(*saved, rounded=False)[0]


def test_probe_notices_nan(saved):
    folder, tokens, cu_seqlens, live = saved
    assert probe.read_back(folder, tokens, cu_seqlens, live * float("nan"), rounded=False) != []


def test_probe_notices_a_model_that_looks_ahead(saved, monkeypatch):
    class LooksAhead(torch.nn.Module):
        def forward(self, input_ids, use_cache):
            states = input_ids.double().flip(1).cumsum(1).flip(1)[..., None].expand(-1, -1, 32)
            return type("Output", (), {"last_hidden_state": states})

    monkeypatch.setattr(probe, "load_backbone", lambda path, dtype: LooksAhead())
    assert any("not causal" in problem for problem in probe.read_back(*saved, rounded=False))


def test_the_toy_tokenizer_adds_no_eos_by_itself(tokenizer):
    # As Qwen's does not: otherwise the tests above would show nothing.
    assert tokenizer("a")["input_ids"][-1] != tokenizer.eos_token_id


# ---------------------------------------------------------------------------------- another pooling


def mean(states: torch.Tensor, first: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """The mean of each text's states: [N, d] -> [n, d]."""
    bounds = zip(first.tolist(), last.tolist(), strict=True)
    return torch.stack([states[begin : end + 1].mean(0) for begin, end in bounds])


@pytest.fixture
def mean_is_known(monkeypatch):
    monkeypatch.setitem(POOLINGS, "mean", mean)


def vectors_by_hand(backbone, tokens: torch.Tensor, cu_seqlens: torch.Tensor, pooling: str) -> torch.Tensor:
    """[n, d] unit vectors: each text alone through the decoder, then the pooling function on all their states."""
    with torch.no_grad():
        texts = tokens.split(cu_seqlens.diff().tolist())
        states = [backbone(input_ids=text[None], use_cache=False).last_hidden_state[0] for text in texts]
    first, last = cu_seqlens[:-1].long(), cu_seqlens[1:].long() - 1
    return F.normalize(POOLINGS[pooling](torch.cat(states), first, last), dim=-1)


@pytest.mark.usefixtures("mean_is_known")
def test_sentence_transformers_pools_as_the_folder_was_told(backbone, tokenizer, tmp_path):
    model_folder.save(tmp_path / "m", backbone, tokenizer, facts(), torch.float32, pooling="mean")
    tokens, lengths, _ = make_encoder(tokenizer, LIMIT)(TEXTS)
    cu_seqlens = F.pad(torch.from_numpy(lengths).cumsum(0), (1, 0)).int()
    expected = vectors_by_hand(backbone, torch.from_numpy(tokens).long(), cu_seqlens, "mean")
    assert (expected - training_vectors(backbone, tokenizer, TEXTS)).abs().max() > 0.05  # the poolings differ
    loaded = SentenceTransformer(str(tmp_path / "m"), device="cpu")
    assert_same_vectors(loaded.encode(TEXTS, convert_to_tensor=True), expected)
    config = json.loads((tmp_path / "m" / "1_Pooling" / "config.json").read_text())
    assert [key for key, value in config.items() if value is True] == ["pooling_mode_mean_tokens", "include_prompt"]
    assert "cosine similarity, mean pooling." in (tmp_path / "m" / "README.md").read_text()


@pytest.mark.usefixtures("mean_is_known")
def test_probe_notices_another_pooling(backbone, tokenizer, tmp_path):
    batch = probe.probe_batch(tokenizer, LIMIT)
    live = vectors_by_hand(backbone, *batch, "mean")
    for pooling in ("mean", "lasttoken"):
        model_folder.save(tmp_path / pooling, backbone, tokenizer, facts(), torch.float32, pooling=pooling)
    assert probe.read_back(tmp_path / "mean", *batch, live, rounded=False) == []
    problems = probe.read_back(tmp_path / "lasttoken", *batch, live, rounded=False)
    assert len(problems) == 1
    assert "embeddings differ from the live model's" in problems[0]


@pytest.mark.usefixtures("mean_is_known")
def test_a_merged_adapter_keeps_its_pooling(adapted, tokenizer, tmp_path):
    model_folder.save(tmp_path / "adapter", adapted, tokenizer, facts(), torch.float32, pooling="mean")
    assert merge_adapter.main([str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 0
    assert pooling_of(tmp_path / "merged") == "mean"


def test_a_pooling_that_sentence_transformers_does_not_have_is_refused(backbone, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="'softest' is not one of Sentence Transformers': cls, mean"):
        model_folder.save(tmp_path / "m", backbone, tokenizer, facts(), torch.float32, pooling="softest")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_gathered_weights_are_gone_when_the_folder_is_read_back(toy_world, tmp_path, tokenizer, lora):
    """What reads the folder back needs as much memory as they did."""
    model = make_adapted(toy_world.backbone) if lora else load_backbone(str(toy_world.backbone), torch.float32)
    gathered = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
    memory = [StorageWeakRef(weight.untyped_storage()) for weight in gathered.values()]
    gone = []

    def check(folder):
        gone.extend(place.expired() for place in memory)
        return []

    model_folder.save(tmp_path / "m", model, tokenizer, facts(), torch.float32, gathered, check)
    assert len(gone) > 20
    assert all(gone)
