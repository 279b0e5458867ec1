"""The attention backends against the padded reference, value and gradient, and texts that must not see each other.

python -m pytest tests/test_model.py
"""

import json
import shutil

import numpy as np
import pytest
import torch
import toy
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, BertConfig, LlamaConfig, MistralConfig, Qwen2Config

from model import Embedder, FrozenEmbedder, choose_backend
from modeling.attention import backend_candidates
from modeling.backbone import add_lora, attention_window, check_backbone, check_teacher, load_backbone
from modeling.packing import bucket_sizes, rectangle
from modeling.versions import in_dtype
from utils import read_json

LENGTHS = (5, 30, 1, 12, 2, 29, 17, 12)
SMALL = {
    "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2,
}  # fmt: skip


def packed(lengths=LENGTHS, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 500, (sum(lengths),), generator=generator)
    return tokens, torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32), np.array(lengths)


def backbone(config=None, dtype=torch.float64):
    torch.manual_seed(0)
    return AutoModel.from_config(config or toy.config(), **in_dtype(dtype))


def embed_and_differentiate(model: Embedder, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings, and the gradient of a random projection of them, as one vector."""
    model.zero_grad()
    embeddings = model(*batch)
    torch.manual_seed(1)
    (embeddings * torch.randn_like(embeddings)).sum().backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return embeddings.detach(), torch.cat(gradients)


@pytest.mark.parametrize("backend", ["segments", "buckets"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_backends_equal_the_padded_reference(backend, checkpointing):
    model = backbone()
    reference, gradient = embed_and_differentiate(Embedder(model, "padded").train(), packed())
    assert reference.shape == (len(LENGTHS), 32)
    assert gradient.norm() > 1
    found, ours = embed_and_differentiate(Embedder(model, backend, checkpointing).train(), packed())
    assert model.is_gradient_checkpointing == checkpointing
    torch.testing.assert_close(found, reference, rtol=1e-10, atol=1e-10)
    assert (ours - gradient).norm() <= 1e-12 * gradient.norm()


@pytest.mark.parametrize("kind", [Qwen2Config, LlamaConfig, MistralConfig])
def test_other_decoders_are_exact_too(kind):
    model = backbone(kind(**SMALL))
    reference = Embedder(model, "padded")(*packed())
    for backend in ("segments", "buckets"):
        torch.testing.assert_close(Embedder(model, backend)(*packed()), reference, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ["segments", "buckets", "padded"])
def test_changing_one_text_moves_no_other_embedding(backend):
    model = Embedder(backbone(), backend).eval()
    tokens, cu_seqlens, lengths = packed()
    before = model(tokens, cu_seqlens, lengths)
    changed = 3
    tokens[cu_seqlens[changed] : cu_seqlens[changed + 1]] += 1
    moved = (model(tokens, cu_seqlens, lengths) - before).norm(dim=1)
    assert moved[changed] > 1e-2
    assert moved[torch.arange(len(LENGTHS)) != changed].max() == 0  # bit for bit


def test_a_text_has_the_same_embedding_alone_and_in_company():
    model = Embedder(backbone(), "segments").eval()
    tokens, cu_seqlens, lengths = packed()
    process_group = model(tokens, cu_seqlens, lengths)
    for i, text in enumerate(tokens.split(cu_seqlens.diff().tolist())):
        alone = model(text, torch.tensor([0, len(text)], dtype=torch.int32), np.array([len(text)]))
        torch.testing.assert_close(alone[0], process_group[i], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ["segments", "buckets", "padded"])
def test_the_pad_token_is_an_ordinary_token_inside_a_text(backend):
    # The published mask was made from ids (id != pad), which hides a literal pad, and EOS where eos = pad.
    model = Embedder(backbone(), backend).eval()
    tokens, cu_seqlens, lengths = packed()
    tokens[2] = tokens[cu_seqlens[1] - 1] = 0  # 0 is what `rectangle` pads with
    alone = model.backbone(input_ids=tokens[None, :5], use_cache=False).last_hidden_state[0, -1]
    torch.testing.assert_close(model(tokens, cu_seqlens, lengths)[0], alone, rtol=1e-10, atol=1e-10)


def test_packed_attention_refuses_a_mask_and_missing_lengths():
    model, ids = Embedder(backbone(), "segments"), torch.arange(4)[None]
    model(*packed())  # chooses the packed attention function
    for inputs in ({"text_lengths": np.array([4]), "attention_mask": torch.ones(1, 1, 4, 4, dtype=torch.bool)}, {}):
        with pytest.raises(ValueError, match="no mask"):
            model.backbone(input_ids=ids, use_cache=False, **inputs)


def test_rectangle_pads_on_the_right():
    ids, real = rectangle(torch.tensor([7, 8, 9]), torch.tensor([1, 2]), 2)
    assert ids.tolist() == [[7, 0], [8, 9]]
    assert real.tolist() == [[True, False], [True, True]]


def test_buckets_stay_within_their_tokens_and_waste_at_most_a_quarter():
    lengths = sorted(np.random.default_rng(0).integers(1, 300, 500).tolist(), reverse=True)
    sizes = bucket_sizes(lengths, 1000)
    assert sum(sizes) == 500
    begin = 0
    for size in sizes:
        bucket = lengths[begin : begin + size]
        assert size == 1 or bucket[0] * size <= 1000
        assert bucket[-1] >= 0.75 * bucket[0]
        begin += size
    assert bucket_sizes([5000], 1000) == [1]


def test_computed_positions_are_what_each_backend_runs():
    lengths = np.array(LENGTHS)
    for backend in ("segments", "buckets", "padded"):
        model, seen = Embedder(backbone(), backend), []
        model.backbone.embed_tokens.register_forward_hook(lambda _, ids, __, seen=seen: seen.append(ids[0].numel()))
        model(*packed())
        assert model.computed_positions(lengths) == sum(seen)


def test_lora_trains_adapters_only_and_its_dropout_is_on():
    frozen = backbone(dtype=torch.float32)
    model = Embedder(add_lora(frozen, 4, 8, 0.5, ["q_proj", "v_proj"]), "segments", True).train()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 2  # A and B, of two modules, in two layers
    assert all("lora_" in name for name in trained)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()  # zero at first, which would hide the dropout
    assert not torch.equal(model(*packed()), model(*packed()))
    assert embed_and_differentiate(model, packed())[1].norm() > 0
    model.eval()
    assert torch.equal(model(*packed()), model(*packed()))
    reference = Embedder(model.backbone, "padded").eval()(*packed())
    torch.testing.assert_close(model(*packed()), reference, rtol=1e-4, atol=1e-5)


def test_a_teacher_stays_frozen_and_in_eval_mode():
    teacher = FrozenEmbedder(backbone())
    torch.nn.ModuleList([teacher]).train()
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not teacher(*packed()).requires_grad


def test_every_backend_is_tried_before_training(toy_world):
    for backend in ("segments", "buckets", "padded"):
        model = Embedder(load_backbone(str(toy_world.backbone), torch.float32)).train()
        assert choose_backend(model, [backend]) == []
        assert (model.backend, model.training) == (backend, True)


def test_backends_are_tried_best_first():
    common = {"on_cpu": True, "windowed": False, "equal_calls": False}
    assert backend_candidates("padded", **common) == ["padded"]  # said is said
    assert backend_candidates("auto", **common) == ["segments", "buckets"]
    assert backend_candidates("auto", **common | {"windowed": True}) == ["buckets"]
    assert backend_candidates("auto", **common | {"on_cpu": False}) == ["buckets"]
    assert backend_candidates("auto", **common | {"on_cpu": False, "equal_calls": True}) == ["segments", "padded"]
    assert backend_candidates("auto", **common | {"windowed": True, "equal_calls": True}) == ["padded"]


def test_a_model_that_looks_ahead_is_refused():
    config = BertConfig(**{k: v for k, v in SMALL.items() if k != "num_key_value_heads"} | {"initializer_range": 0.02})
    (problem,) = choose_backend(Embedder(backbone(config, torch.float32)), ["padded"])
    assert problem.startswith("not causal")


@pytest.mark.parametrize("kind", ["falcon", "lfm2"])
def test_a_decoder_that_cannot_be_packed_gets_buckets_or_is_refused(kind):
    # Falcon's attention is its own; Lfm2's short convolution reaches over the end of a text, by 1e-4 when random.
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this Transformers has no {kind}: it came with 4.54")
    extra = {"layer_types": ["conv", "full_attention"], "num_key_value_heads": 2} if kind == "lfm2" else {}
    config = AutoConfig.for_model(
        kind, vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **extra
    )
    model = Embedder(backbone(config, torch.float32))
    left_out = []
    assert choose_backend(model, ["segments", "buckets"], left_out.append) == []
    assert model.backend == "buckets"
    assert [line.partition(":")[0] for line in left_out] == ["attn_backend segments is left out"]
    (problem,) = choose_backend(Embedder(backbone(config, torch.float32)), ["segments"])
    assert problem.startswith("attn_backend segments: cannot run here, or texts change each other's embeddings")


def test_sliding_windows_are_seen_and_get_buckets():
    windowed = MistralConfig(**SMALL, sliding_window=4)  # no layer_types: every layer has the window
    assert attention_window(windowed) == 4
    assert attention_window(toy.config()) is None
    assert attention_window(Qwen2Config(**SMALL, sliding_window=4, use_sliding_window=False)) is None
    model = backbone(windowed)
    assert choose_backend(Embedder(model), ["buckets"]) == []
    reference = Embedder(model, "padded")(*packed())
    torch.testing.assert_close(Embedder(model, "buckets")(*packed()), reference, rtol=1e-10, atol=1e-10)


def test_weights_are_fp32_whatever_the_folder_holds(toy_world, tmp_path):
    load_backbone(str(toy_world.backbone), torch.bfloat16).save_pretrained(tmp_path)
    config = read_json(tmp_path / "config.json")
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"
    assert {p.dtype for p in load_backbone(str(tmp_path), torch.float32).parameters()} == {torch.float32}


def test_what_does_not_fit_is_said_before_a_weight_is_loaded(toy_world, tmp_path):
    path = str(toy_world.backbone)
    assert check_backbone(path, 511, 64, "auto", ["q_proj", "mlp.up_proj"])[1] == []
    _, problems = check_backbone(path, 512, 4096, "auto", ["q_proj", "w_pack"])
    assert len(problems) == 3
    assert "token id 512" in problems[0]
    assert "max_seq_length 4096" in problems[1]
    assert "no layer is called 'w_pack'; the layers are called down_proj," in problems[2]
    config, problems = check_backbone(str(tmp_path / "none"), 0, 64, "auto")
    assert config is None
    assert "none': no such folder" in problems[0]
    (tmp_path / "empty").mkdir()
    assert "no readable model config" in check_backbone(str(tmp_path / "empty"), 0, 64, "auto")[1][0]


def test_a_window_shorter_than_the_texts_is_refused_for_packed_rows(toy_world, tmp_path):
    backbone(MistralConfig(**SMALL, sliding_window=16), torch.float32).save_pretrained(tmp_path)
    assert "no further than 16 tokens back" in check_backbone(str(tmp_path), 0, 64, "segments")[1][0]
    for backend in ("auto", "buckets", "padded"):
        assert check_backbone(str(tmp_path), 0, 64, backend)[1] == []
    assert check_backbone(str(tmp_path), 0, 16, "segments")[1] == []


def test_missing_and_damaged_weights_are_found_before_they_are_loaded(toy_world, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(toy_world.backbone, folder)
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-100])
    assert "damaged or cut short" in check_backbone(str(folder), 0, 64, "auto")[1][0]
    weights.unlink()
    assert "no such file; weights must be safetensors" in check_backbone(str(folder), 0, 64, "auto")[1][0]
    index = folder / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": {"norm.weight": "a.safetensors", "embed_tokens.weight": "b.safetensors"}})
    )
    (folder / "a.safetensors").write_bytes(data)
    (problem,) = check_backbone(str(folder), 0, 64, "auto")[1]
    assert "b.safetensors: no such file" in problem
    index.write_text("[]")
    assert "not an index of safetensors files" in check_backbone(str(folder), 0, 64, "auto")[1][0]


def test_a_student_wider_than_its_teacher_is_refused(toy_world, tmp_path):
    toy.config(hidden_size=16).save_pretrained(tmp_path)
    student = AutoConfig.from_pretrained(toy_world.backbone)
    assert "hidden size 16, but the student's is 32" in check_teacher(str(tmp_path), student, 0, 64, "auto")[-1]
    assert check_teacher(str(toy_world.backbone), student, 511, 64, "auto") == []
    assert "token id 512" in check_teacher(str(toy_world.backbone), student, 512, 64, "auto")[0]


@pytest.mark.parametrize(("every", "again"), [(False, 0), (True, 4), (1, 4), (2, 2), (3, 2)])
def test_every_kth_layer_is_recomputed(every, again):
    model = Embedder(backbone(LlamaConfig(**SMALL | {"num_hidden_layers": 4})), "segments", every).train()
    calls = []
    for layer in model.backbone.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))  # recomputing stops inside the MLP
    model(*packed()).sum().backward()
    assert len(calls) == 4 + again


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_random_numbers_are_kept_for_recomputation_only_where_there_is_dropout(monkeypatch, dropout):
    """And with it, the gradient is that of the same dropout kept in memory."""
    states = []
    get_state = torch.get_rng_state
    monkeypatch.setattr(torch, "get_rng_state", lambda: states.append(get_state()) or states[-1])
    model = Embedder(add_lora(backbone(), 4, 8, dropout, ["q_proj", "up_proj"]), "segments").train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)  # zeros would leave the other half without a gradient
    gradients = []
    kept = []
    for every in (1, 0):
        states.clear()
        model.recompute(every)
        torch.manual_seed(5)
        gradients.append(embed_and_differentiate(model, packed())[1])
        kept.append(len(states))
    # Of each layer that is recomputed the state that it began with, and that which its second pass must leave behind.
    assert kept == [2 * len(model.layers()) if dropout else 0, 0]
    assert gradients[0].norm() > 0
    assert torch.equal(*gradients)
