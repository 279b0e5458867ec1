"""The attention backends against the padded reference, value and gradient, and texts that must not see each other.

python -m pytest tests/test_model.py
"""

import numpy as np
import pytest
import torch
import toy
from transformers import AutoConfig, AutoModel, BertConfig, LlamaConfig, MistralConfig, Qwen2Config

from model import (
    Embedder,
    FrozenEmbedder,
    add_lora,
    bucket_sizes,
    check_backbone,
    check_teacher,
    is_causal,
    load_backbone,
    rectangle,
)

LENGTHS = (5, 30, 1, 12, 2, 29, 17, 12)
SMALL = {
    "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2,
}  # fmt: skip


def packed(lengths=LENGTHS, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 500, (sum(lengths),), generator=generator)
    return tokens, torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)


def backbone(config=None, dtype=torch.float64):
    torch.manual_seed(0)
    return AutoModel.from_config(config or toy.config(), dtype=dtype)


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
    tokens, cu_seqlens = packed()
    before = model(tokens, cu_seqlens)
    changed = 3
    tokens[cu_seqlens[changed] : cu_seqlens[changed + 1]] += 1
    moved = (model(tokens, cu_seqlens) - before).norm(dim=1)
    assert moved[changed] > 1e-2
    assert moved[torch.arange(len(LENGTHS)) != changed].max() == 0  # bit for bit


def test_a_text_has_the_same_embedding_alone_and_in_company():
    model = Embedder(backbone(), "segments").eval()
    tokens, cu_seqlens = packed()
    together = model(tokens, cu_seqlens)
    for i, text in enumerate(tokens.split(cu_seqlens.diff().tolist())):
        alone = model(text, torch.tensor([0, len(text)], dtype=torch.int32))
        torch.testing.assert_close(alone[0], together[i], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ["segments", "buckets", "padded"])
def test_the_pad_token_is_an_ordinary_token_inside_a_text(backend):
    # The published mask was made from ids (id != pad), which hides a literal pad, and EOS where eos = pad.
    model = Embedder(backbone(), backend).eval()
    tokens, cu_seqlens = packed()
    tokens[2] = tokens[cu_seqlens[1] - 1] = 0  # 0 is what `rectangle` pads with
    alone = model.backbone(input_ids=tokens[None, :5], use_cache=False).last_hidden_state[0, -1]
    torch.testing.assert_close(model(tokens, cu_seqlens)[0], alone, rtol=1e-10, atol=1e-10)


def test_packed_attention_refuses_a_mask():
    model = Embedder(backbone(), "segments")
    model(*packed())  # registers the attention function
    with pytest.raises(ValueError, match="no mask"):
        model.backbone(input_ids=torch.arange(4)[None], attention_mask=torch.ones(1, 4), use_cache=False)


def test_rectangle_pads_on_the_right():
    ids, real = rectangle(torch.tensor([7, 8, 9]), torch.tensor([0, 1, 3]))
    assert ids.tolist() == [[7, 0], [8, 9]]
    assert real.tolist() == [[True, False], [True, True]]


def test_buckets_stay_within_budget_and_waste_at_most_a_quarter():
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
    lengths, cpu = np.array(LENGTHS), torch.device("cpu")
    for backend in ("segments", "buckets", "padded"):
        model, seen = Embedder(backbone(), backend), []
        model.backbone.embed_tokens.register_forward_hook(lambda _, ids, __, seen=seen: seen.append(ids[0].numel()))
        model(*packed())
        assert model.computed(lengths, cpu) == sum(seen)
    assert Embedder(backbone(), "auto").computed(lengths, cpu) == sum(LENGTHS)  # no padding on CPU


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


def test_causal_models_are_told_from_others(ground):
    assert is_causal(Embedder(load_backbone(str(ground.backbone), torch.float32)), torch.arange(8))
    bert = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}
    assert not is_causal(Embedder(AutoModel.from_config(BertConfig(**bert))), torch.arange(8))


def test_weights_are_fp32_whatever_the_folder_holds(ground, tmp_path):
    load_backbone(str(ground.backbone), torch.bfloat16).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert {p.dtype for p in load_backbone(str(tmp_path), torch.float32).parameters()} == {torch.float32}


def test_what_does_not_fit_is_said_before_a_weight_is_loaded(ground, tmp_path):
    path = str(ground.backbone)
    assert check_backbone(path, 511, 64, "auto", ["q_proj", "mlp.up_proj"])[1] == []
    _, problems = check_backbone(path, 512, 4096, "auto", ["q_proj", "w_pack"])
    assert len(problems) == 3
    assert "token id 512" in problems[0]
    assert "max_seq_length 4096" in problems[1]
    assert "no layer is called 'w_pack'; there are down_proj," in problems[2]
    config, problems = check_backbone(str(tmp_path / "none"), 0, 64, "auto")
    assert config is None
    assert "no such folder, and no hub model of that name" in problems[0]
    (tmp_path / "empty").mkdir()
    assert "no readable model config" in check_backbone(str(tmp_path / "empty"), 0, 64, "auto")[1][0]
    MistralConfig(**SMALL, sliding_window=16).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.layer_types = ["sliding_attention"] * 2
    config.save_pretrained(tmp_path)
    assert "window of 16 tokens" in check_backbone(str(tmp_path), 0, 64, "auto")[1][0]
    assert check_backbone(str(tmp_path), 0, 64, "padded")[1] == []


def test_a_student_wider_than_its_teacher_is_refused(ground, tmp_path):
    toy.config(hidden_size=16).save_pretrained(tmp_path)
    student = AutoConfig.from_pretrained(ground.backbone)
    assert "hidden size 16, but the student's is 32" in check_teacher(str(tmp_path), student)[0]
    assert check_teacher(str(ground.backbone), student) == []
