"""Read a saved folder back and compare it with the live model, before it is renamed to its final name.

Wrong pooling, a lost EOS or a silent change of dtype would otherwise show only in a user's search results.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer

from modeling.backbone import load_backbone
from modeling.pooling import POOLINGS, cut_of, pooling_of
from modeling.tokenizer import make_encoder

PROBE_TEXTS = (
    "How do I sort a list in place?",
    "Wo liegt die Quelle der Donau? 河源在哪里?",
    "one two three four five " * 4096,  # is cut
)
_LONGEST = 64  # tokens: cutting is the same at any length, and a 14B model is read back on the CPU
_CAUSAL_TOLERANCE = 1e-2  # relative; loose, since the saved weights may be bf16
# Limits of the distance between unit vectors, which is at most 2; a wrong pooling or a lost EOS is off by about 1.
EXACT = 1e-3  # a GPU rounds fp32 otherwise than a CPU, through all layers
_ROUNDED = 1e-2
_WORSE = 1.5  # times the distance of plain bf16


def probe_batch(tokenizer, max_seq_length: int) -> tuple[Tensor, Tensor]:
    """The probe texts as training has them.

    Returns:
        tokens: [T] int64, all texts end to end; the last text is cut.
        cu_seqlens: [n + 1] int32, text i is tokens[cu_seqlens[i] : cu_seqlens[i + 1]].
    """
    encode = make_encoder(tokenizer, min(max_seq_length, _LONGEST))
    tokens, lengths, _ = encode(list(PROBE_TEXTS))
    ends = torch.from_numpy(lengths).cumsum(0)  # [n]
    return torch.from_numpy(tokens).long(), F.pad(ends, (1, 0)).to(torch.int32)


def read_back(folder: Path, tokens: Tensor, cu_seqlens: Tensor, live: Tensor, rounded: bool) -> list[str]:
    """What differs between a saved folder and training, one line each.

    How far bf16 may be from fp32 depends on the model: 36 layers move a text by 0.1 to 0.5, and no fixed limit tells
    that from a fault. So the folder is run in bf16 as well, the plain way, and the live model may be half as far again
    from the folder in fp32.

    Args:
        tokens, cu_seqlens: from `probe_batch`.
        live: [n, cut] the live model's embeddings of them, not normalised; `cut` is the folder's dimensions, d where
            it cuts nothing.
        rounded: bf16 had a part in `live` or in the folder's weights.

    Raises:
        ValueError: the folder has a pooling or a cut that is not known here, or its weights do not fit its config.
    """
    cut = cut_of(folder)
    lengths = cu_seqlens.diff().tolist()
    texts = [text.tolist() for text in tokens.cpu().split(lengths)]  # token ids of each text
    model = load_backbone(str(folder), torch.float32).eval()
    states = [_states(model, text) for text in texts]  # each [L, d]
    saved = _pool(states, pooling_of(folder))[:, :cut]  # [n, cut]
    limit = EXACT
    if rounded:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):  # the cache keeps a copy of every weight
            in_bf16 = _pool([_states(model, text) for text in texts], pooling_of(folder))[:, :cut]
        limit = _ROUNDED + _WORSE * _largest_distance(saved, in_bf16)
    return (
        tokenizer_problems(folder, texts)
        + _embedding_problems(folder, saved, live, limit)
        + _causality_problems(folder, model, texts, states)
    )


@torch.no_grad()
def _states(model: nn.Module, text: list[int]) -> Tensor:
    """[L, d] final hidden states of one text, fp32."""
    output = model(input_ids=torch.tensor([text]), use_cache=False)
    return output.last_hidden_state[0].float()


def _pool(states: list[Tensor], pooling: str) -> Tensor:
    """[n, d]: one embedding for each text, from its [L, d] states."""
    lengths = torch.tensor([len(text) for text in states])
    ends = lengths.cumsum(0)  # [n]
    return POOLINGS[pooling](torch.cat(states), ends - lengths, ends - 1)


def tokenizer_problems(folder: Path, texts: list[list[int]]) -> list[str]:
    """Probe texts that the saved tokenizer turns into other ids than training had.

    Args:
        texts: the ids that training has of each.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    longest = max(len(text) for text in texts)
    problems = []
    for text, expected in zip(PROBE_TEXTS, texts, strict=True):
        found = tokenizer(text, truncation=True, max_length=longest)["input_ids"]
        if found != expected:
            difference = _first_difference(found, expected)
            problems.append(f"{folder}: its tokenizer gives other ids for {text[:30]!r}: {difference}")
    return problems


def _first_difference(found: list[int], expected: list[int]) -> str:
    """A sentence on where two lists of token ids begin to differ."""
    place = 0
    while place < min(len(found), len(expected)) and found[place] == expected[place]:
        place += 1
    return (
        f"at place {place} {_id_at(found, place)}, in training {_id_at(expected, place)}; "
        f"{len(found)} tokens, in training {len(expected)}"
    )


def _id_at(ids: list[int], place: int) -> str:
    return str(ids[place]) if place < len(ids) else "nothing"


def _embedding_problems(folder: Path, saved: Tensor, live: Tensor, limit: float) -> list[str]:
    """Whether some text's embedding, [n, d] both, is further from the live model's than `limit`."""
    if saved.shape != live.shape:
        return [f"{folder}: its embeddings have {saved.shape[1]} dimensions, the live model's {live.shape[1]}"]
    difference = _largest_distance(saved, live)
    if difference <= limit:
        return []
    # NaN comes here too: it compares as false.
    return [f"{folder}: its embeddings differ from the live model's by {difference:.1e}, more than {limit:.0e}"]


def _largest_distance(one: Tensor, other: Tensor) -> float:
    """The largest distance between the unit vectors of a text, [n, d] both."""
    other = other.to("cpu", one.dtype)
    return (F.normalize(one, dim=-1) - F.normalize(other, dim=-1)).norm(dim=-1).max().item()


def _causality_problems(folder: Path, model: nn.Module, texts: list[list[int]], states: list[Tensor]) -> list[str]:
    """Whether another last token changes the state of the first token: in a causal decoder it cannot."""
    changed_text = texts[0][:-1] + texts[1][:1]  # the first text, ending in the second one's first token
    before = states[0][0]  # [d]
    after = _states(model, changed_text)[0]  # [d]
    if (after - before).norm() <= _CAUSAL_TOLERANCE * before.norm():
        return []
    # NaN comes here too: it compares as false.
    return [f"{folder}: changing the last token moves the first state: the saved model is not causal"]
