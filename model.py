"""The model: a causal decoder whose embedding of a text is its last token's final hidden state.

A batch arrives without padding: `tokens` [T], all texts end to end; `cu_seqlens` [n + 1], where each begins; and
`lengths` [n], the same fact on the host, so that nothing waits for the device. How the decoder consumes it is the
attention backend; all give the same embeddings and gradients (tests/test_model.py):

    padded      one rectangle [n, longest] with a mask, the published layout; the reference
    buckets     length-sorted rectangles without a mask: the decoder is causal and padding stands on
                the right, so no real token ever sees a pad
    segments    one row [1, T], attention called once a text; no padding at all; the fastest on CPU
    varlen      the same row, all texts in one kernel; CUDA in bf16 or fp16 (attention.py)

Lengths decide where a text ends, never token ids: with eos = pad, or a literal pad token inside a
text, a mask made from ids hides real tokens. Packed rows go in with `attention_mask=None` and
`use_cache=False`: with either of the two otherwise, Transformers lets texts attend to each other in
silence (measured difference 3.96; exact without). `choose_backend` tries that on the model at hand.
"""

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from modeling import attention

_BUCKET_TOKENS = 16384  # rectangle of one bucket at most, padding included; large enough to fill a GPU


class Embedder(nn.Module):
    """A decoder with last-token pooling.

    Args:
        backbone: any causal decoder of Transformers, or a PeftModel around one.
        backend: varlen, segments, buckets or padded; `choose_backend` may choose another.
        gradient_checkpointing: recompute activations in the backward pass: of every k-th layer, True = of all.
    """

    def __init__(self, backbone: nn.Module, backend: str = "segments", gradient_checkpointing: bool | int = False):
        super().__init__()
        self.backbone = backbone
        self.backend = backend
        self.multiple = 1  # packed rows are rounded up to a multiple of so many tokens
        attention.register()
        if gradient_checkpointing:
            self.recompute(int(gradient_checkpointing))

    def recompute(self, every: int) -> None:
        """Recompute the activations of every `every`-th layer in the backward pass; 1 = of all, 0 = of none."""
        if every:
            enable = getattr(self.backbone, "activation_checkpointing_enable", None)  # its name since Transformers 5.23
            (enable or self.backbone.gradient_checkpointing_enable)({"use_reentrant": False})
        for number, layer in enumerate(self.layers()):
            layer.gradient_checkpointing = bool(every) and number % every == 0

    @property
    def can_recompute(self) -> bool:
        """Whether the decoder knows how to recompute its layers."""
        return bool(self.decoder().supports_gradient_checkpointing and self.layers())

    def layers(self) -> list[nn.Module]:
        """The decoder's layers."""
        return [part for part in self.backbone.modules() if isinstance(part, GradientCheckpointingLayer)]

    @property
    def _no_split_modules(self) -> list[str]:
        """Class names of the layers, by which accelerate shards."""
        return sorted(self.decoder()._no_split_modules or [])

    @property
    def hidden_size(self) -> int:
        """d, the width of an embedding."""
        return self.backbone.config.hidden_size

    def forward(self, tokens: Tensor, cu_seqlens: Tensor, lengths: np.ndarray) -> Tensor:
        """Embed n texts.

        Args:
            tokens: [T] int64, all texts end to end.
            cu_seqlens: [n + 1] int32, text i is tokens[cu_seqlens[i] : cu_seqlens[i + 1]], none empty.
            lengths: [n] tokens of each, on the host.

        Returns:
            [n, d] last-token states, not normalised, fp32 (fp64 for an fp64 model).
        """
        run = {"buckets": self._buckets, "padded": self._padded}.get(self.backend, self._packed)
        states = run(tokens, cu_seqlens, lengths)
        return states.to(torch.promote_types(states.dtype, torch.float32))

    def states(self, function: str, **inputs) -> Tensor:
        """[n, L, d] final hidden states of `input_ids` [n, L], with the attention function of this name."""
        if self.backbone.config._attn_implementation != function:
            self.decoder().set_attn_implementation(function)
        return self.backbone(use_cache=False, **inputs).last_hidden_state

    def decoder(self) -> PreTrainedModel:
        """The model of Transformers, within adapters or not."""
        return self.backbone.get_base_model() if hasattr(self.backbone, "peft_config") else self.backbone

    def _packed(self, tokens: Tensor, cu_seqlens: Tensor, lengths: np.ndarray) -> Tensor:
        last = cu_seqlens[1:] - 1  # [n]
        tokens, cu_seqlens, lengths = rounded_up(tokens, cu_seqlens, lengths, self.multiple)
        starts = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff(), output_size=len(tokens))
        positions = torch.arange(len(tokens), device=tokens.device) - starts  # [T], from 0 in each text
        packed = {"input_ids": tokens[None], "position_ids": positions[None], "attention_mask": None}
        texts = {"text_lengths": lengths, "text_starts": cu_seqlens}
        states = self.states(attention.NAMES[self.backend], **packed, **texts)  # [1, T, d]
        return states[0, last]  # [n, d]

    def _padded(self, tokens: Tensor, cu_seqlens: Tensor, lengths: np.ndarray) -> Tensor:
        ids, real = rectangle(tokens, cu_seqlens.diff(), int(lengths.max()))  # [n, longest] both
        return last_token_pool(self.states("sdpa", input_ids=ids, attention_mask=real.long()), cu_seqlens.diff())

    def _buckets(self, tokens: Tensor, cu_seqlens: Tensor, lengths: np.ndarray) -> Tensor:
        order, ends, pooled = np.argsort(-lengths, kind="stable"), np.cumsum(lengths), []
        for group in np.split(order, np.cumsum(bucket_sizes(lengths[order].tolist(), _BUCKET_TOKENS))[:-1]):
            pieces = [tokens[ends[i] - lengths[i] : ends[i]] for i in group]
            ids = nn.utils.rnn.pad_sequence(pieces, batch_first=True)  # [group, longest]; a pad is any id
            last = torch.from_numpy(lengths[group]).to(tokens.device, non_blocking=True)
            pooled.append(last_token_pool(self.states("sdpa", input_ids=ids), last))
        back = torch.from_numpy(np.argsort(order)).to(tokens.device, non_blocking=True)
        return torch.cat(pooled)[back]  # [n, d], in the order of the batch

    def computed(self, lengths: np.ndarray) -> int:
        """Positions that a forward pass on texts of these lengths computes, padding included."""
        if self.backend in attention.NAMES:
            return -(-int(lengths.sum()) // self.multiple) * self.multiple
        if self.backend == "padded":
            return int(lengths.max()) * len(lengths)
        ordered = np.sort(lengths)[::-1]
        firsts = np.cumsum([0, *(sizes := bucket_sizes(ordered.tolist(), _BUCKET_TOKENS))])[:-1]
        return int((ordered[firsts] * sizes).sum())


class FrozenEmbedder(Embedder):
    """A teacher: no gradient, and never in training mode, whatever is called on the model around it."""

    def __init__(self, backbone: nn.Module, backend: str = "segments"):
        super().__init__(backbone, backend)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "FrozenEmbedder":
        """Stay in eval mode."""
        return super().train(False)


def last_token_pool(states: Tensor, lengths: Tensor) -> Tensor:
    """The state of each row's last real token: states [n, L, d], lengths [n] -> [n, d]."""
    return states[torch.arange(len(lengths), device=states.device), lengths - 1]


def rectangle(tokens: Tensor, lengths: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Packed texts as right-padded ids [n, longest], and where they are real, bool [n, longest]."""
    real = torch.arange(longest, device=tokens.device) < lengths[:, None]
    return tokens.new_zeros(real.shape).masked_scatter(real, tokens), real


def rounded_up(
    tokens: Tensor, cu_seqlens: Tensor, lengths: np.ndarray, multiple: int
) -> tuple[Tensor, Tensor, np.ndarray]:
    """The packed row with one more text behind it, so that its tokens are a multiple of `multiple`."""
    gap = -len(tokens) % multiple
    if not gap:
        return tokens, cu_seqlens, lengths
    ends = torch.cat([cu_seqlens, cu_seqlens[-1:] + gap])
    return nn.functional.pad(tokens, (0, gap)), ends, np.append(lengths, gap)


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


def backend_candidates(backend: str, on_cpu: bool, windowed: bool, one_call: bool, half: bool = False) -> list[str]:
    """The backends to try, best first.

    Args:
        backend: what the user said; "auto" leaves it to this function.
        half: the decoder computes in bf16 or fp16.
        windowed: some layers have a sliding window, which a packed row would not honour.
        one_call: every process must call the decoder equally often; buckets differ between processes.
    """
    if backend != "auto":
        return [backend]
    packed = ["varlen"] if half and not on_cpu and not windowed and attention.kernel() else []
    packed += ["segments"] if (on_cpu or one_call) and not windowed else []
    return packed + (["padded"] if one_call else ["buckets"])


def explain_backend(backend: str, asked: str, on_cpu: bool, windowed: bool, half: bool) -> str:
    """Why the model has this backend, for people; the arguments are those of `backend_candidates`."""
    if backend == asked:
        return "as asked"
    if backend == "varlen":
        return attention.kernel().__name__
    if backend == "segments" and on_cpu:
        return "no GPU"
    if windowed:
        return "it has sliding-window layers"
    if not on_cpu and not half:
        return "kernels for packed texts take bf16 or fp16"
    if not on_cpu and attention.kernel() is None:
        return "no kernel for packed texts is installed"
    return "packed texts were not exact when tried"


def choose_backend(model: Embedder, candidates: list[str]) -> list[str]:
    """Give the model the first backend that is exact for it: some decoders cannot be packed.

    Tried on two short texts: in company they must embed as alone, and no token may see what follows it. Some decoders
    mix neighbours by a convolution or an attention of their own.

    Args:
        model: in fp32 or fp64, before any engine wraps it, under the autocast of the training; its mode is put back.

    Returns:
        Why the model cannot be trained, one line each.
    """
    mode = model.training
    model.eval()
    if not _is_finite(model):
        return ["a text's state is not finite: the weights are damaged"]
    causal = _is_causal(model)
    for model.backend in candidates:
        if causal and (settled := _keeps_apart(model)):
            break
    model.train(mode)
    if not causal:
        return ["not causal: the state of a token depends on what follows it"]
    wrong = f"attn_backend {candidates[-1]}: cannot run here, or texts change each other's embeddings; set it to auto"
    return [] if settled else [wrong]


@torch.no_grad()
def _is_finite(model: Embedder) -> bool:
    tokens = torch.arange(9, device=next(model.parameters()).device)
    return bool(model.states("sdpa", input_ids=tokens[None]).isfinite().all())


@torch.no_grad()
def _is_causal(model: Embedder) -> bool:
    """Whether changing the last tokens leaves the states before them as they were."""
    tokens = torch.arange(9, device=next(model.parameters()).device)
    changed = torch.cat([tokens[:4], tokens[:5].flip(0)])
    before, after = (model.states("sdpa", input_ids=ids[None])[0, :4] for ids in (tokens, changed))
    return _near(after, before, 1e-6)


@torch.no_grad()
def _keeps_apart(model: Embedder) -> bool:
    """Whether a text has in company the embedding that it has alone, whatever its neighbour is."""
    tokens = torch.arange(9, device=next(model.parameters()).device)
    batch = {"cu_seqlens": tokens.new_tensor([0, 7, 9], dtype=torch.int32), "lengths": np.array([7, 2])}
    try:
        first, second = (model(ids, **batch)[1] for ids in (tokens, torch.cat([tokens[:7].flip(0), tokens[7:]])))
    except (TypeError, ValueError, RuntimeError):  # an attention that takes no packed row
        return False
    alone = model.states("sdpa", input_ids=tokens[None, 7:])[0, -1]
    rounding = 3e-2 if torch.is_autocast_enabled(tokens.device.type) else 1e-3
    return _near(first, second, 1e-6) and _near(first, alone, rounding)


def _near(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """1e-6 for passes of the same shape, which round the same; 1e-3 for others. A leak may be small: a random
    short convolution of Lfm2 moves its neighbour by 1e-4, a random BERT looks ahead by 2e-3."""
    return bool((found - expected).norm() <= tolerance * expected.norm())
