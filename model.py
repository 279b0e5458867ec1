"""The model: a causal decoder whose embedding of a text is its last token's final hidden state.

A batch arrives without padding: `tokens` [T], all texts end to end, and `cu_seqlens` [n + 1], where each
begins. How the decoder consumes it is the attention backend; all give the same embeddings and gradients
(tests/test_model.py):

    padded      one rectangle [n, longest] with a mask, the published layout; the reference
    buckets     length-sorted rectangles without a mask: the decoder is causal and padding stands on
                the right, so no real token ever sees a pad
    segments    one row [1, T], attention called once a text; no padding at all; the fastest on CPU

Lengths decide where a text ends, never token ids: with eos = pad, or a literal pad token inside a
text, a mask made from ids hides real tokens. Packed rows go in with `attention_mask=None` and
`use_cache=False`: with either of the two otherwise, Transformers lets texts attend to each other in
silence (measured difference 3.96; exact without).
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

BACKENDS = ("auto", "segments", "buckets", "padded")
_SEGMENTS = "f2llm_segments"  # its name among Transformers' attention functions
_BUCKET_TOKENS = 16384  # rectangle of one bucket at most, padding included; large enough to fill a GPU


class Embedder(nn.Module):
    """A decoder with last-token pooling.

    Args:
        backbone: any causal decoder of Transformers with full attention, or a PeftModel around one.
        backend: one of BACKENDS; "auto" takes segments on CPU and buckets elsewhere.
        gradient_checkpointing: recompute each layer's activations in the backward pass.
    """

    def __init__(self, backbone: nn.Module, backend: str = "auto", gradient_checkpointing: bool = False):
        super().__init__()
        self.backbone = backbone
        self.backend = backend
        AttentionInterface.register(_SEGMENTS, _segment_attention)
        if gradient_checkpointing:
            enable = getattr(backbone, "activation_checkpointing_enable", None)  # its name since Transformers 5.23
            (enable or backbone.gradient_checkpointing_enable)({"use_reentrant": False})

    @property
    def hidden_size(self) -> int:
        """d, the width of an embedding."""
        return self.backbone.config.hidden_size

    def forward(self, tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Embed n texts.

        Args:
            tokens: [T] int64, all texts end to end.
            cu_seqlens: [n + 1] int32, text i is tokens[cu_seqlens[i] : cu_seqlens[i + 1]], none empty.

        Returns:
            [n, d] last-token states, not normalised, fp32 (fp64 for an fp64 model).
        """
        return self.encode(tokens, cu_seqlens)

    def encode(self, tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
        """`forward` under a name that accelerate does not wrap in autocast: for checks in full precision."""
        run = {"segments": self._segments, "buckets": self._buckets, "padded": self._padded}
        states = run[self._chosen(tokens.device)](tokens, cu_seqlens)
        return states.to(torch.promote_types(states.dtype, torch.float32))

    def _run(self, attention: str, **inputs) -> Tensor:
        config = self.backbone.config
        if config._attn_implementation != attention:
            self._decoder().set_attn_implementation(attention)
        return self.backbone(use_cache=False, **inputs).last_hidden_state

    def _decoder(self) -> PreTrainedModel:
        return self.backbone.get_base_model() if hasattr(self.backbone, "peft_config") else self.backbone

    def _segments(self, tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
        positions = torch.arange(len(tokens), device=tokens.device)
        positions = positions - cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff())  # [T], restarting at each text
        states = self._run(
            _SEGMENTS,
            input_ids=tokens[None],
            position_ids=positions[None],
            attention_mask=None,
            cu_seq_lens_q=cu_seqlens,
        )  # [1, T, d]
        return states[0, cu_seqlens[1:] - 1]  # [n, d]

    def _padded(self, tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
        lengths = cu_seqlens.diff()
        ids, real = rectangle(tokens, cu_seqlens)  # [n, longest] both
        return last_token_pool(self._run("sdpa", input_ids=ids, attention_mask=real.long()), lengths)

    def _buckets(self, tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
        lengths = cu_seqlens.diff()
        order = lengths.argsort(descending=True, stable=True)
        pooled = []
        for group in torch.split(order, bucket_sizes(lengths[order].tolist(), _BUCKET_TOKENS)):
            pieces = [tokens[cu_seqlens[i] : cu_seqlens[i + 1]] for i in group.tolist()]
            ids = nn.utils.rnn.pad_sequence(pieces, batch_first=True)  # [group, longest]; a pad is any id
            pooled.append(last_token_pool(self._run("sdpa", input_ids=ids), lengths[group]))
        return torch.cat(pooled)[order.argsort()]  # [n, d], back in the order of the batch

    def computed(self, lengths: np.ndarray, device: torch.device) -> int:
        """Positions that a forward pass on texts of these lengths computes, padding included."""
        backend = self._chosen(device)
        if backend == "segments":
            return int(lengths.sum())
        if backend == "padded":
            return int(lengths.max()) * len(lengths)
        ordered = np.sort(lengths)[::-1]
        firsts = np.cumsum([0, *(sizes := bucket_sizes(ordered.tolist(), _BUCKET_TOKENS))])[:-1]
        return int((ordered[firsts] * sizes).sum())

    def _chosen(self, device: torch.device) -> str:
        if self.backend != "auto":
            return self.backend
        return "segments" if device.type == "cpu" else "buckets"


class FrozenEmbedder(Embedder):
    """A teacher: no gradient, and never in training mode, whatever is called on the model around it."""

    def __init__(self, backbone: nn.Module, backend: str = "auto"):
        super().__init__(backbone, backend)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "FrozenEmbedder":
        """Stay in eval mode."""
        return super().train(False)


def last_token_pool(states: Tensor, lengths: Tensor) -> Tensor:
    """The state of each row's last real token: states [n, L, d], lengths [n] -> [n, d]."""
    return states[torch.arange(len(lengths), device=states.device), lengths - 1]


def rectangle(tokens: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Packed texts as right-padded ids [n, longest], and where they are real, bool [n, longest]."""
    lengths = cu_seqlens.diff()
    real = torch.arange(int(lengths.max()), device=tokens.device) < lengths[:, None]
    return tokens.new_zeros(real.shape).masked_scatter(real, tokens), real


def bucket_sizes(lengths: list[int], budget: int) -> list[int]:
    """Cut descending `lengths` into runs of texts for rectangles of at most `budget` tokens (or one text).

    A run also ends where a text is shorter than 3/4 of the run's longest, so at most a quarter is padding.
    """
    sizes, longest, count = [], lengths[0], 0
    for length in lengths:
        if count and (longest * (count + 1) > budget or 4 * length < 3 * longest):
            sizes.append(count)
            longest, count = length, 0
        count += 1
    return [*sizes, count]


def _segment_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, cu_seq_lens_q=None, **_):
    """Causal attention within each text of one packed row: query [1, heads, T, head_dim] -> [1, T, heads, head_dim]."""
    if cu_seq_lens_q is None or attention_mask is not None:
        raise ValueError("packed attention needs cu_seq_lens_q and no mask: without them texts would see each other")
    lengths = cu_seq_lens_q.diff().tolist()
    parts = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    out = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, dropout_p=dropout, enable_gqa=True)
        for q, k, v in parts
    ]
    return torch.cat(out, dim=2).transpose(1, 2), None


# ------------------------------------------------------------------------------------ from disk


def check_backbone(
    path: str, max_token_id: int, max_seq_length: int, backend: str, lora_targets: list[str] | str = ()
) -> tuple[PreTrainedConfig | None, list[str]]:
    """A backbone's config, and what in it does not fit data, backend and LoRA targets. Loads no weight."""
    config, problems = read_config(path)
    if config is None:
        return None, problems
    if max_token_id >= config.vocab_size:
        problems.append(
            f"the data hold token id {max_token_id}, but the model's vocabulary has {config.vocab_size} entries: "
            "tokenise again with the tokenizer of this model"
        )
    limit = getattr(config, "max_position_embeddings", None)
    if limit and max_seq_length > limit:
        problems.append(f"max_seq_length {max_seq_length} is above the model's max_position_embeddings {limit}")
    window = getattr(config, "sliding_window", None)
    if window and window < max_seq_length and backend != "padded" and "sliding_attention" in (config.layer_types or []):
        problems.append(f"the model attends within a window of {window} tokens: set attn_backend to padded")
    return config, problems + _lora_problems(config, lora_targets)


def check_teacher(path: str, student: PreTrainedConfig) -> list[str]:
    """Why the model at `path` cannot teach this student, one line each."""
    config, problems = read_config(path)
    if config and student.hidden_size > config.hidden_size:
        problems.append(
            f"hidden size {config.hidden_size}, but the student's is {student.hidden_size}: a student learns the first "
            "dimensions of its teacher, so take a teacher at least as wide"
        )
    return problems


def read_config(path: str) -> tuple[PreTrainedConfig | None, list[str]]:
    """The config of a backbone, a folder or a hub id; or None and why it cannot be read."""
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False), []
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
    if Path(path).is_dir():
        return None, [f"{path!r}: the folder holds no readable model config ({reason})"]
    return None, [
        f"{path!r}: no such folder, and no hub model of that name could be fetched ({reason}); "
        "download one first: hf download Qwen/Qwen3-0.6B --local-dir models/qwen3-0.6b"
    ]


def _lora_problems(config: PreTrainedConfig, targets: list[str] | str) -> list[str]:
    """LoRA targets that name no layer of the model, one line each. Builds the model without memory."""
    if not targets or targets == "all-linear":
        return []
    with torch.device("meta"):
        modules = AutoModel.from_config(config, trust_remote_code=False).named_modules()
    layers = {name.rpartition(".")[2] for name, module in modules if isinstance(module, nn.Linear)}
    missing = [target for target in targets if target.rpartition(".")[2] not in layers]
    return [
        f"lora_target_modules: no layer is called {name!r}; there are {', '.join(sorted(layers))}" for name in missing
    ]


def load_backbone(path: str, dtype: torch.dtype) -> PreTrainedModel:
    """The decoder of a folder or hub id, without its language-model head. Safetensors only, no remote code."""
    return AutoModel.from_pretrained(
        path, dtype=dtype, attn_implementation="sdpa", use_safetensors=True, trust_remote_code=False
    )


def add_lora(backbone: PreTrainedModel, r: int, alpha: int, dropout: float, targets: list[str] | str) -> nn.Module:
    """Freeze the backbone and add LoRA adapters to the modules whose names end in one of `targets`."""
    config = LoraConfig(
        task_type=TaskType.FEATURE_EXTRACTION, r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets
    )
    return get_peft_model(backbone, config)


@torch.no_grad()
def is_causal(model: Embedder, tokens: Tensor) -> bool:
    """Whether changing what follows a token leaves its state as it was: packing and pooling rely on it.

    Args:
        tokens: [T >= 2] ids of one text.
    """
    states = [
        model._run("sdpa", input_ids=ids[None])[0, 0]
        for ids in (tokens, torch.cat([tokens[:1], tokens[1:].flip(0), tokens[:1]]))
    ]
    return bool(torch.allclose(*states, atol=1e-2 * float(states[0].abs().max())))
