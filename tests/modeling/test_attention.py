"""Kernels for packed rows: called as each version of each of them wants it.

A CUDA kernel itself cannot run here; stand-ins have its signature.

python -m pytest tests/modeling/test_attention.py
"""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from modeling import attention
from modeling.attention import HeadShape, backend_candidates, explain_backend, head_shape, try_kernels

LENGTHS = np.array([5, 1, 7])
STARTS = torch.tensor([0, 5, 6, 13], dtype=torch.int32)


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch):
    monkeypatch.setattr(attention, "_left_out", {})
    attention.installed_kernels.cache_clear()
    yield
    attention.installed_kernels.cache_clear()


def plain(q, k, v, starts, scale):
    """[T, heads, d], text by text."""
    parts = zip(*(x.split(starts.diff().tolist()) for x in (q, k, v)), strict=True)
    out = [
        F.scaled_dot_product_attention(
            *(x.transpose(0, 1)[None] for x in part), is_causal=True, scale=scale, enable_gqa=True
        )
        for part in parts
    ]
    return torch.cat(out, dim=2)[0].transpose(0, 1)


def torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    assert (is_causal, max_q, max_k) == (True, 7, 7)
    return plain(query, key, value, cu_seq_q, None)


def torch_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    assert (window_size, max_q) == ((-1, 0), 7)
    return plain(query, key, value, cu_seq_q, scale)


def torch_2_13(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    assert enable_gqa
    return torch_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)


def flash_2(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False
):
    assert (causal, max_seqlen_k) == (True, 7)
    return plain(q, k, v, cu_seqlens_q, softmax_scale)


def flash_3(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False):
    return flash_2(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, softmax_scale, causal), None


@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("stand_in", [torch_2_10, torch_2_11, torch_2_13, flash_2, flash_3])
def test_every_signature_gives_what_segments_give(monkeypatch, stand_in, scaling):
    monkeypatch.setattr(attention, "KERNELS", (("missing_module", "f"), ("stand_in", "varlen")))
    monkeypatch.setitem(sys.modules, "stand_in", SimpleNamespace(varlen=stand_in))
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 13, 8, dtype=torch.bfloat16) for heads in (4, 2, 2))
    rest = {"attention_mask": None, "scaling": scaling, "text_lengths": LENGTHS}
    expected, _ = attention.segments(None, query, key, value, **rest)
    found, _ = attention.varlen(None, query, key, value, text_starts=STARTS, **rest)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    with pytest.raises(ValueError, match="bf16 or fp16"):
        attention.varlen(None, query.float(), key.float(), value.float(), text_starts=STARTS, **rest)
    with pytest.raises(ValueError, match="no dropout"):
        attention.varlen(None, query, key, value, text_starts=STARTS, dropout=0.1, **rest)
    with pytest.raises(ValueError, match="no mask"):
        attention.varlen(None, query, key, value, **rest | {"attention_mask": torch.ones(1)}, text_starts=STARTS)


def test_the_kernel_is_taken_where_it_can_run(monkeypatch):
    chosen = {"on_cpu": False, "windowed": False, "equal_calls": False, "half": True}
    assert backend_candidates("auto", **chosen) == ["varlen", "buckets"]  # torch has one
    assert backend_candidates("auto", **chosen | {"equal_calls": True}) == ["varlen", "segments", "padded"]
    assert backend_candidates("auto", **chosen | {"half": False}) == ["buckets"]
    assert backend_candidates("auto", **chosen | {"windowed": True}) == ["buckets"]
    assert backend_candidates("auto", **chosen | {"on_cpu": True}) == ["segments", "buckets"]
    assert explain_backend("varlen", "auto", False, False, True) == "torch.nn.attention.varlen.varlen_attn"
    monkeypatch.setattr(attention, "KERNELS", ())
    attention.installed_kernels.cache_clear()
    assert backend_candidates("auto", **chosen) == ["buckets"]
    reasons = [
        ("segments", "segments", True, False, False, "as asked"),
        ("segments", "auto", True, False, False, "no GPU"),
        ("buckets", "auto", False, True, True, "it has sliding-window layers"),
        ("buckets", "auto", False, False, False, "kernels for packed texts take bf16 or fp16"),
        ("buckets", "auto", False, False, True, "no kernel for packed texts is installed"),
        ("buckets", "auto", True, False, False, "packed texts were not exact when tried"),
    ]
    for backend, asked, on_cpu, windowed, half, said in reasons:
        assert explain_backend(backend, asked, on_cpu, windowed, half) == said


def test_flash_attention_is_told_when_the_same_bits_are_asked_for(monkeypatch):
    told = []

    def kernel(q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale=None, causal=False, deterministic=False):
        told.append(deterministic)
        return q

    install(monkeypatch, stand_in=kernel)
    q = torch.ones(13, 2, 8)
    attention.kernel()(q, q, q, STARTS, 7, 1.0)
    torch.use_deterministic_algorithms(True)
    attention.kernel()(q, q, q, STARTS, 7, 1.0)
    torch.use_deterministic_algorithms(False)
    assert told == [False, True]


def hopper_only(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False):
    raise RuntimeError("FlashAttention only supports Hopper GPUs or newer.\n(more)")


def sees_what_follows(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False
):
    rows = [x.transpose(0, 1)[None] for x in (q, k, v)]
    return F.scaled_dot_product_attention(*rows, scale=softmax_scale, enable_gqa=True)[0].transpose(0, 1)


def forward_alone(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False):
    return plain(q, k, v, cu_seqlens_q, softmax_scale).detach().requires_grad_()  # its backward pass reaches no input


def install(monkeypatch, **kernels) -> None:
    for name, function in kernels.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(varlen=function))
    monkeypatch.setattr(attention, "KERNELS", tuple((name, "varlen") for name in kernels))
    attention.installed_kernels.cache_clear()


def test_the_first_kernel_that_runs_and_is_right_is_taken(monkeypatch):
    """The first that can be imported was taken: FlashAttention 3, on a card that it has no code for, ended packing."""
    install(monkeypatch, three=hopper_only, wrong=sees_what_follows, half=forward_alone, right=flash_2, never=flash_3)
    random_state = torch.get_rng_state()
    lines = try_kernels(torch.device("cpu"), [HeadShape(4, 2, 8)])
    assert [line.split(":")[0] for line in lines] == ["three.varlen", "wrong.varlen", "half.varlen"]
    assert "Hopper GPUs or newer. (more)" in lines[0]
    assert "its values are" in lines[1]
    assert "RuntimeError" in lines[2]
    assert attention.kernel().__name__ == "right.varlen"
    assert torch.equal(torch.get_rng_state(), random_state)
    assert (
        try_kernels(torch.device("cpu"), [HeadShape(4, 2, 8)]) == lines
    )  # of a teacher's trial: said again, not tried


def test_a_kernel_must_serve_every_model(monkeypatch):
    def narrow(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False):
        assert q.shape[-1] <= 8, "head_dim 16"
        return plain(q, k, v, cu_seqlens_q, softmax_scale)

    install(monkeypatch, narrow=narrow)
    student = SimpleNamespace(num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    teacher = SimpleNamespace(num_attention_heads=4, hidden_size=64)  # every query head has its own key
    assert [head_shape(config) for config in (student, teacher)] == [(4, 2, 8), (4, 4, 16)]
    assert try_kernels(torch.device("cpu"), [head_shape(student)]) == []
    (line,) = try_kernels(torch.device("cpu"), [head_shape(student), head_shape(teacher)])
    assert "head_dim 16" in line
    assert attention.kernel() is None
    assert explain_backend("buckets", "auto", False, False, True) == "no kernel for packed texts runs here"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_processor_computes_attention_in_fp32_at_least(dtype, monkeypatch):
    """Also under autocast, where rotary positions leave queries and keys in fp32 and values come in bf16."""
    torch.manual_seed(0)
    wide = dtype if dtype == torch.float64 else torch.float32
    query = torch.randn(1, 4, 13, 8, dtype=wide, requires_grad=True)
    key = torch.randn(1, 2, 13, 8, dtype=wide)
    value = torch.randn(1, 2, 13, 8, dtype=dtype)
    expected = plain(*(x[0].transpose(0, 1).to(wide) for x in (query, key, value)), STARTS, None)  # [T, heads, d]
    used = []
    sdpa = F.scaled_dot_product_attention

    def noted(q, k, v, **options):
        used.append((q.dtype, k.dtype, v.dtype))
        return sdpa(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        out, _ = attention.segments(None, query, key, value, None, text_lengths=LENGTHS)
    assert used == [(wide, wide, wide)] * 3
    assert out.dtype == dtype
    torch.testing.assert_close(out[0], expected.to(dtype))
    out.sum().backward()
    assert query.grad.abs().sum() > 0
