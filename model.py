"""The model: a causal decoder whose embedding of a text is its last token's final hidden state.

A batch arrives without padding: `tokens` [T], all texts end to end; `cu_seqlens` [n + 1], where each begins; and
`lengths` [n], the same fact on the host, so that nothing waits for the device. How the decoder consumes it is the
attention backend; all give the same embeddings and gradients (tests/test_model.py):

    padded      one rectangle [n, longest] with a mask, the published layout; the reference
    buckets     length-sorted rectangles without a mask: the decoder is causal and padding stands on
                the right, so no real token ever sees a pad
    segments    one row [1, T], attention called once per text; no padding at all; the fastest on CPU
    varlen      the same row, all texts in one kernel; CUDA in bf16 or fp16 (modeling/attention.py)

Lengths decide where a text ends, never token ids: with eos = pad, or a literal pad token inside a
text, a mask made from ids hides real tokens. Packed rows go in with `attention_mask=None` and
`use_cache=False`: otherwise Transformers silently lets texts attend to each other (measured
difference 3.96; exact without). `choose_backend` tries that on the model at hand.
"""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modeling import attention
from modeling.packing import buckets, places_in_rectangle, rectangle, round_up
from modeling.pooling import DEFAULT as DEFAULT_POOLING
from modeling.pooling import POOLINGS
from modeling.rounding import TEXTS, more_than_rounding
from modeling.versions import layers_of, let_layers_choose, set_attention
from utils import first_line

Agree = Callable[[str | None], str | None]  # this process's problem, or None -> the first that any process has
_BUCKET_TOKENS = 16384  # rectangle of one bucket at most, padding included; large enough to fill a GPU


class Embedder(nn.Module):
    """A decoder with pooling: from texts to one vector each.

    Args:
        backbone: any causal decoder of Transformers, or a PeftModel around one.
        backend: varlen, segments, buckets or padded; `choose_backend` may choose another.
        gradient_checkpointing: recompute activations in the backward pass: of every k-th layer, True = of all.
        pooling: name in modeling.pooling.POOLINGS.
    """

    def __init__(
        self,
        backbone: nn.Module,
        backend: str = "segments",
        gradient_checkpointing: bool | int = False,
        pooling: str = DEFAULT_POOLING,
    ):
        super().__init__()
        self.backbone = backbone
        self.backend = backend
        self.pooling = pooling
        self.multiple = 1  # packed rows are rounded up to a multiple of so many tokens
        attention.register()
        if gradient_checkpointing:
            self.recompute(int(gradient_checkpointing))

    def recompute(self, every: int) -> None:
        """Recompute the activations of every `every`-th layer in the backward pass; 1 = of all, 0 = of none."""
        if every:
            enable = getattr(self.backbone, "activation_checkpointing_enable", None)  # its name since Transformers 5.23
            if enable is None:
                enable = self.backbone.gradient_checkpointing_enable
            # With dropout each layer keeps the random numbers' state, to draw the same ones when it is computed again.
            enable({"use_reentrant": False, "preserve_rng_state": self.has_dropout()})
            let_layers_choose(self.decoder())
        for number, layer in enumerate(self.layers()):
            layer.gradient_checkpointing = bool(every) and number % every == 0

    def has_dropout(self) -> bool:
        """Whether a forward pass of training draws random numbers."""
        layers = [part for part in self.backbone.modules() if isinstance(part, nn.Dropout)]
        config = self.decoder().config.to_dict()  # attention draws inside its kernel, by a number of the config
        shares = [layer.p for layer in layers]
        shares += [value for name, value in config.items() if "dropout" in name and isinstance(value, float)]
        return any(share > 0 for share in shares)

    @property
    def can_recompute(self) -> bool:
        """Whether the decoder knows how to recompute its layers."""
        return bool(self.decoder().supports_gradient_checkpointing and self.layers())

    def layers(self) -> list[nn.Module]:
        """The decoder's layers."""
        return layers_of(self.backbone, self.decoder())

    @property
    def _no_split_modules(self) -> list[str]:
        """Class names of the layers, by which accelerate shards."""
        return sorted(self.decoder()._no_split_modules or [])

    @property
    def hidden_size(self) -> int:
        """d, the width of an embedding."""
        return self.backbone.config.hidden_size

    def decoder(self) -> PreTrainedModel:
        """The model of Transformers, within adapters or not."""
        return self.backbone.get_base_model() if hasattr(self.backbone, "peft_config") else self.backbone

    def forward(self, tokens: Tensor, cu_seqlens: Tensor, lengths: np.ndarray) -> Tensor:
        """Embed n texts.

        Args:
            tokens: [T] int64, all texts end to end.
            cu_seqlens: [n + 1] int32, text i is tokens[cu_seqlens[i] : cu_seqlens[i + 1]], none empty.
            lengths: [n] tokens of each, on the host.

        Returns:
            [n, d] pooled states, not normalised, fp32 (fp64 for an fp64 model).
        """
        if attention.is_packed(self.backend):
            embeddings = self._embed_packed_row(tokens, cu_seqlens, lengths)
        elif self.backend == "buckets":
            embeddings = self._embed_buckets(tokens, lengths)
        else:
            embeddings = self._embed_padded(tokens, cu_seqlens, lengths)
        return embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))

    def states(self, attention_name: str, **inputs) -> Tensor:
        """[n, L, d] final hidden states of `input_ids` [n, L], without pooling, for callers outside.

        An engine that shards takes this for a forward pass and gathers the weights around it; `forward`, which has them
        already, calls `_states`.
        """
        return self._states(attention_name, **inputs)

    def _states(self, attention_name: str, **inputs) -> Tensor:
        """What `states` gives; switches the decoder to the attention of this name."""
        if self.backbone.config._attn_implementation != attention_name:
            set_attention(self.decoder(), attention_name)
        return self.backbone(use_cache=False, **inputs).last_hidden_state

    def pool(self, states: Tensor, first: Tensor, last: Tensor) -> Tensor:
        """One vector for each text, [n, d], from states [N, d] and where its first and last token stand, [n] both."""
        return POOLINGS[self.pooling](states, first, last)

    def _embed_packed_row(self, tokens: Tensor, cu_seqlens: Tensor, lengths: np.ndarray) -> Tensor:
        first, last = cu_seqlens[:-1], cu_seqlens[1:] - 1  # [n], of the texts that count
        tokens, cu_seqlens, lengths = round_up(tokens, cu_seqlens, lengths, self.multiple)
        starts = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff(), output_size=len(tokens))
        positions = torch.arange(len(tokens), device=tokens.device) - starts  # [T], from 0 in each text
        states = self._states(
            attention.NAMES[self.backend],
            input_ids=tokens[None],
            position_ids=positions[None],
            attention_mask=None,
            text_lengths=lengths,
            text_starts=cu_seqlens,
        )  # [1, T, d]
        return self.pool(states[0], first, last)

    def _embed_padded(self, tokens: Tensor, cu_seqlens: Tensor, lengths: np.ndarray) -> Tensor:
        longest = int(lengths.max())
        device_lengths = cu_seqlens.diff()
        ids, real = rectangle(tokens, device_lengths, longest)  # [n, longest] both
        states = self._states("sdpa", input_ids=ids, attention_mask=real.long())  # [n, longest, d]
        return self.pool(states.flatten(0, 1), *places_in_rectangle(device_lengths, longest))

    def _embed_buckets(self, tokens: Tensor, lengths: np.ndarray) -> Tensor:
        ends = np.cumsum(lengths)
        groups = buckets(lengths, _BUCKET_TOKENS)
        pooled = []
        for group in groups:
            texts = [tokens[ends[i] - lengths[i] : ends[i]] for i in group]
            ids = nn.utils.rnn.pad_sequence(texts, batch_first=True)  # [group, longest]; a pad is any id
            device_lengths = _on_device(lengths[group], tokens.device)
            states = self._states("sdpa", input_ids=ids)  # [group, longest, d]
            pooled.append(self.pool(states.flatten(0, 1), *places_in_rectangle(device_lengths, ids.shape[1])))
        original_order = _on_device(np.argsort(np.concatenate(groups)), tokens.device)
        return torch.cat(pooled)[original_order]  # [n, d], in the order of the batch

    def computed_positions(self, lengths: np.ndarray) -> int:
        """Positions that a forward pass on texts of these lengths computes, padding included."""
        if attention.is_packed(self.backend):
            gap = -int(lengths.sum()) % self.multiple
            return int(lengths.sum()) + gap
        if self.backend == "padded":
            return int(lengths.max()) * len(lengths)
        return sum(int(lengths[group].max()) * len(group) for group in buckets(lengths, _BUCKET_TOKENS))


def _on_device(numbers: np.ndarray, device: torch.device) -> Tensor:
    """A copy on the device that the host does not wait for; from memory that is not pinned, CUDA may."""
    tensor = torch.from_numpy(numbers)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class FrozenEmbedder(Embedder):
    """A teacher: no gradient, and never in training mode, whatever is called on the model around it."""

    def __init__(self, backbone: nn.Module, pooling: str = DEFAULT_POOLING):
        super().__init__(backbone, pooling=pooling)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "FrozenEmbedder":
        """Stay in eval mode."""
        return super().train(False)


# --------------------------------------------------------------------------- the choice of a backend


def choose_backend(
    model: Embedder,
    candidates: list[str],
    warn: Callable[[str], None] = lambda line: None,
    agree: Agree = lambda problem: problem,
) -> list[str]:
    """Set `model.backend` to the first backend that is exact for this model.

    Each is tried on a few short texts: a text must get the same embedding in a batch as alone, and no token may see
    what follows it. Decoders with a convolution, or an attention of their own, can mix texts that lie side by side.

    Args:
        model: under the autocast of the training; its mode is put back. A sharded model must have `states` registered
            with its engine as a forward method, and all processes must call this function.
        candidates: from `modeling.attention.backend_candidates`.
        warn: called with a line about each candidate that is left out.
        agree: tells every process the problem that any of them found, so that all choose the same backend.

    Returns:
        Why the model cannot be trained, one line each.
    """
    mode = model.training
    model.eval()
    problems = _try_backends(model, candidates, warn, agree)
    model.train(mode)
    return problems


def _try_backends(model: Embedder, candidates: list[str], warn: Callable[[str], None], agree: Agree) -> list[str]:
    problem = agree(None if _is_finite(model) else "a text's state is not finite: the weights are damaged")
    if problem:
        return [problem]
    problem = agree(None if _is_causal(model) else "not causal: the state of a token depends on what follows it")
    if problem:
        return [problem]
    for backend in candidates:
        model.backend = backend
        problem = agree(_mixing_problem(model))
        if problem is None:
            return []
        warn(f"attn_backend {backend} is left out: {problem}")
    return [f"attn_backend {candidates[-1]}: cannot run here, or texts change each other's embeddings; set it to auto"]


@torch.no_grad()
def _is_finite(model: Embedder) -> bool:
    tokens = torch.arange(9, device=next(model.parameters()).device)
    return bool(model.states("sdpa", input_ids=tokens[None]).isfinite().all())


@torch.no_grad()
def _is_causal(model: Embedder) -> bool:
    """Whether changing the last tokens leaves the states before them as they were."""
    tokens = torch.arange(9, device=next(model.parameters()).device)
    other_end = torch.cat([tokens[:4], tokens[:5].flip(0)])
    before = model.states("sdpa", input_ids=tokens[None])[0, :4]
    after = model.states("sdpa", input_ids=other_end[None])[0, :4]
    return _is_same(after, before)


@torch.no_grad()
def _mixing_problem(model: Embedder) -> str | None:
    """Why a text's embedding differs between a batch and alone, or depends on its neighbours; None if neither holds.

    The first text is the neighbour that changes. In bf16 two right ways of computing differ, by 2 % in 28 layers. So
    the texts in the batch, and the texts alone, are both compared with the texts alone in fp32.
    """
    lengths = np.array(TEXTS)
    ends = [int(end) for end in np.cumsum(lengths)]
    tokens = torch.arange(ends[-1], device=next(model.parameters()).device) % 9
    other_neighbour = torch.cat([tokens[:7].flip(0), tokens[7:]])
    cu_seqlens = tokens.new_tensor([0, *ends], dtype=torch.int32)
    try:
        beside_one = model(tokens, cu_seqlens, lengths)[1:]  # [12, d]
        beside_other = model(other_neighbour, cu_seqlens, lengths)[1:]
    except (TypeError, ValueError, RuntimeError) as error:  # an attention that takes no packed row
        if hasattr(model, "reset_iter_state"):  # sharded: the pass ended between gathering weights and freeing them
            model.reset_iter_state()
        return f"it cannot run here ({first_line(error)})"
    if not _is_same(beside_one, beside_other):
        return "texts change each other's embeddings"
    texts = [tokens[begin:end] for begin, end in pairwise([0, *ends])][1:]
    plain = _alone(model, texts)
    with torch.autocast(tokens.device.type, enabled=False):
        exact = _alone(model, texts)
    tolerance = 1e-3  # fp32 rounds otherwise in passes of other shapes
    if exact.dtype == torch.bfloat16:  # weights in bf16, as a teacher's or as FSDP2 gathers them: two right ways differ
        plain = _padded(model, tokens, cu_seqlens, lengths)[1:]
        tolerance = 3e-2
    distances = more_than_rounding(beside_one, plain, exact, tolerance)
    if distances is None:
        return None
    found, rounding = distances
    return f"texts in a batch are {found:.1%} away from the same texts alone, which rounding moves by {rounding:.1%}"


def _alone(model: Embedder, texts: list[Tensor]) -> Tensor:
    """[n, d]: each text, token ids [L], through the decoder alone."""
    pooled = []
    for text in texts:
        states = model.states("sdpa", input_ids=text[None])[0]  # [L, d]
        pooled.append(model.pool(states, text.new_tensor([0]), text.new_tensor([len(text) - 1])))
    return torch.cat(pooled)


def _padded(model: Embedder, tokens: Tensor, cu_seqlens: Tensor, lengths: np.ndarray) -> Tensor:
    """[n, d]: the texts in one rectangle."""
    backend = model.backend
    model.backend = "padded"
    embeddings = model(tokens, cu_seqlens, lengths)
    model.backend = backend
    return embeddings


def _is_same(found: Tensor, expected: Tensor) -> bool:
    """Whether two passes of the same shape, which round alike, gave the same. The limit is tight, since a leak may be
    small: a random short convolution of Lfm2 moves its neighbour by 1e-4, a random BERT looks ahead by 2e-3."""
    return bool((found - expected).norm() <= 1e-6 * expected.norm())
