"""How a model card says that its model is used, in Python that runs as it stands."""

from modeling.prompts import query_prompt


def section(
    where: str,
    instruction: str,
    max_seq_length: int,
    dims: list[int],
    cut_to: int | None,
    *,
    in_onnx: bool,
    last_token: bool,
) -> str:
    """The card's section on use.

    Args:
        where: a folder or a hub id.
        instruction: of queries; "" for none.
        max_seq_length: in tokens, EOS included.
        dims: of the Matryoshka prefixes, all dimensions that the folder gives among them; empty without Matryoshka.
        cut_to: how many of its dimensions the folder gives; None = all.
        in_onnx: whether the weights are an ONNX file, which Transformers does not read.
        last_token: whether that is the pooling. Of another one nothing is said for Transformers alone.
    """
    prompt = query_prompt(instruction)
    loading = f'"{where}"'
    if in_onnx:
        loading += ', backend="onnx"'
    parts = ["## Use", _sentence_transformers(loading, prompt)]
    if prompt:
        parts.append(
            "A query of another task takes another instruction, with the same words around it: "
            '`model.encode(texts, prompt="Instruct: ...\\nQuery: ")`.'
        )
    shorter = sorted(dims)[:-1]  # the longest is all that there is
    if shorter:
        parts.append(_matryoshka(loading, shorter))
    if last_token and not in_onnx:
        parts.append(_transformers(where, prompt, max_seq_length, cut_to))
    return "\n\n".join(parts)


def _sentence_transformers(loading: str, prompt: str) -> str:
    adds = f"adds: {prompt!r}" if prompt else "adds nothing"
    return f"""```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer({loading})
queries = model.encode_query(["..."])  # {adds}
documents = model.encode_document(["..."])  # adds nothing
print(model.similarity(queries, documents))
```"""


def _matryoshka(loading: str, shorter: list[int]) -> str:
    """How to cut embeddings. Sentence Transformers cuts what is normalised already, and normalises if asked."""
    listed = ", ".join(str(dim) for dim in shorter)
    return f"""The first {listed} dimensions are embeddings of their own; normalise them again after cutting:

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer({loading}, truncate_dim={shorter[-1]})
queries = model.encode_query(["..."], normalize_embeddings=True)
documents = model.encode_document(["..."], normalize_embeddings=True)
```"""


def _transformers(where: str, prompt: str, max_seq_length: int, cut_to: int | None) -> str:
    pooled = "states[torch.arange(len(texts)), last]"
    if cut_to is not None:
        pooled += f"[:, :{cut_to}]"
    return f"""With Transformers alone, an embedding is the last hidden state of a text's last token, which is the EOS:

```python
import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoTokenizer

PROMPT = {prompt!r}  # of queries; documents have none
tokenizer = AutoTokenizer.from_pretrained("{where}", padding_side="right")
model = AutoModel.from_pretrained("{where}").eval()


def embed(texts: list[str]) -> torch.Tensor:
    batch = tokenizer(texts, padding=True, truncation=True, max_length={max_seq_length}, return_tensors="pt")
    last = batch["attention_mask"].sum(1) - 1  # the EOS, which the tokenizer appends
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    return F.normalize({pooled}.float(), dim=-1)


queries = embed([PROMPT + text for text in ["..."]])
documents = embed(["..."])
print(queries @ documents.T)
```"""
