"""What a model folder says about its model in words: the README.md that the hub shows, and the query prompt."""

import json
from dataclasses import dataclass

from modeling.pooling import DEFAULT as DEFAULT_POOLING
from modeling.prompts import query_prompt
from utils import plural

_DATASETS_SHOWN = 10  # in the card's table; published recipes have hundreds

# Every pooling that Sentence Transformers has, by its name there.
_POOLING_IN_WORDS = {
    "cls": "first-token",
    "mean": "mean",
    "max": "maximum",
    "mean_sqrt_len_tokens": "sum over root of length",
    "weightedmean": "position-weighted mean",
    "lasttoken": "last-token",
}


@dataclass(frozen=True)
class Facts:
    """What a folder must say about its model besides the weights; f2llm.json holds them as they are."""

    hidden_size: int
    max_seq_length: int
    query_instruction: str
    base_model: str
    matryoshka_dims: list[int]  # empty without Matryoshka
    training: dict  # hyper-parameter -> value
    datasets: dict  # dataset -> number of training tuples
    cut_to: int | None = None  # dimensions that the folder's readers cut embeddings to; None = all of them


def model_card(facts: Facts, pooling: str = DEFAULT_POOLING) -> str:
    """The text of README.md. Its head, between the two lines of dashes, is what the hub reads."""
    training_rows = [f"| {key} | {value} |" for key, value in facts.training.items()]
    dataset_rows = _dataset_rows(facts.datasets)
    training = "\n".join(training_rows)
    datasets = "\n".join(dataset_rows)
    dimensions = facts.cut_to or facts.hidden_size
    pooling_words = f"{_POOLING_IN_WORDS[pooling]} pooling"
    return f"""---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags: [sentence-transformers, feature-extraction, f2llm]
base_model: {json.dumps(facts.base_model)}
---

# Text embeddings from {facts.base_model}

{dimensions} dimensions, at most {facts.max_seq_length} tokens, cosine similarity, {pooling_words}.
The tokenizer appends the EOS itself; do not append another.

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("path/to/this/folder")
queries = model.encode_query(["..."])       # adds: {query_prompt(facts.query_instruction)!r}
documents = model.encode_document(["..."])  # adds nothing
print(model.similarity(queries, documents))
```
{_matryoshka_sentence(facts.matryoshka_dims)}
## Training

| | |
|---|---|
{training}

| dataset | training tuples |
|---|---|
{datasets}
"""


def _dataset_rows(datasets: dict[str, int]) -> list[str]:
    """The table of training tuples: every dataset, or the largest ones and what the others have together."""
    shown = list(datasets.items())
    if len(shown) > _DATASETS_SHOWN:
        shown = sorted(shown, key=lambda item: (-item[1], item[0]))[:_DATASETS_SHOWN]
    rows = [f"| {name} | {count:,} |" for name, count in shown]
    others = len(datasets) - len(shown)
    if others:
        rest = sum(datasets.values()) - sum(count for _, count in shown)
        rows.append(f"| and {plural(others, 'other dataset')} | {rest:,} |")
    return rows


def _matryoshka_sentence(dims: list[int]) -> str:
    """How to use the shorter embeddings, where there are any; the longest is the whole embedding."""
    shorter = sorted(dims)[:-1]
    if not shorter:
        return ""
    listed = ", ".join(str(dim) for dim in shorter)
    return f"\nThe first {listed} dimensions are embeddings of their own; normalise them again after cutting.\n"
