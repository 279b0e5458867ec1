"""The model card: the README.md of a model folder, which the hub shows.

Its head, between two lines of dashes, is YAML that the hub reads, written by huggingface_hub, which knows the rules.
The same facts give the same bytes.
"""

import re
from dataclasses import dataclass, field

from huggingface_hub import EvalResult, ModelCardData

from export import card_usage
from export.card_results import evaluation_rows, in_cell, results_section, table
from modeling.pooling import DEFAULT as DEFAULT_POOLING
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

CITATION = """@article{2025F2LLM,
  title   = {F2LLM Technical Report: Matching SOTA Embedding Performance with 6 Million Open-Source Data},
  author  = {Ziyin Zhang and Zihan Liao and Hang Yu and Peng Di and Rui Wang},
  journal = {CoRR}, volume = {abs/2510.02294}, year = {2025}, doi = {10.48550/ARXIV.2510.02294}
}
@article{2026F2LLMv2,
  title   = {F2LLM-v2: Inclusive, Performant, and Efficient Embeddings for a Multilingual World},
  author  = {Ziyin Zhang and Zihan Liao and Hang Yu and Peng Di and Rui Wang},
  journal = {CoRR}, volume = {abs/2603.19223}, year = {2026}
}"""


@dataclass(frozen=True)
class Facts:
    """What a folder must say about its model besides the weights; f2llm.json holds them as they are.

    Those with a default say nothing that is trained: `model_folder.is_finished` does not look at them.
    """

    hidden_size: int
    max_seq_length: int
    query_instruction: str
    base_model: str
    matryoshka_dims: list[int]  # empty without Matryoshka
    training: dict  # hyper-parameter -> value
    datasets: dict  # dataset -> number of training tuples
    cut_to: int | None = None  # dimensions that the folder's readers cut embeddings to; None = all of them
    tasks: dict = field(default_factory=dict)  # dataset -> task
    results: dict = field(default_factory=dict)  # as export/card_results.py has them
    license: str | None = None  # the hub's identifier of one, apache-2.0
    languages: list[str] = field(default_factory=list)  # codes of ISO 639: en
    hub_model_id: str | None = None  # where the folder will lie on the hub
    base_on_hub: bool = False  # whether base_model is a hub id, rather than a folder
    in_onnx: bool = False  # whether the folder holds onnx/model.onnx in place of safetensors

    @property
    def width(self) -> int:
        """Dimensions of the embeddings that the folder's readers give."""
        return self.cut_to or self.hidden_size


def model_card(facts: Facts, pooling: str = DEFAULT_POOLING) -> str:
    """The text of README.md."""
    parts = [
        f"---\n{_head(facts)}\n---",
        _introduction(facts, pooling),
        card_usage.section(
            facts.hub_model_id or "path/to/this/folder",
            facts.query_instruction,
            facts.max_seq_length,
            facts.matryoshka_dims,
            facts.cut_to,
            in_onnx=facts.in_onnx,
            last_token=pooling == "lasttoken",
        ),
        results_section(facts.results, facts.hidden_size),
        _training(facts),
        _licence(facts.license),
        f"## Citation\n\n```bibtex\n{CITATION}\n```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(facts: Facts) -> str:
    """The YAML, without the lines of dashes.

    A base model in a folder is left out: the hub takes `models/qwen3-0.6b` for somebody's repository.
    """
    tags = ["sentence-transformers", "feature-extraction", "f2llm"]
    if facts.matryoshka_dims:
        tags.append("matryoshka")
    rows = evaluation_rows(facts.results, facts.width)
    data = ModelCardData(
        language=facts.languages or None,
        license=facts.license,
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=tags,
        base_model=facts.base_model if facts.base_on_hub else None,
        model_name=(facts.hub_model_id or _title(facts)) if rows else None,
        eval_results=[_eval_result(*row) for row in rows] or None,
    )
    return data.to_yaml()


def _eval_result(task: str, metric: str, value: float) -> EvalResult:
    """One figure of the hub's model-index; its dataset's `type` must be there, and may be any identifier."""
    identifier = re.sub(r"[^A-Za-z0-9._-]+", "-", task).strip("-") or "dataset"
    return EvalResult(
        task_type="text-retrieval" if "ndcg" in metric.lower() else "feature-extraction",
        dataset_type=identifier,
        dataset_name=task,
        metric_type=metric,
        metric_value=value,
    )


def _title(facts: Facts) -> str:
    return f"Text embeddings from {' '.join(facts.base_model.split())}"


def _introduction(facts: Facts, pooling: str) -> str:
    pooled = f"{_POOLING_IN_WORDS[pooling]} pooling"
    return f"""# {in_cell(_title(facts))}

A text-embedding model: the decoder {in_cell(facts.base_model)}, fine-tuned by contrastive learning with the losses of
F2LLM ([arXiv 2510.02294](https://arxiv.org/abs/2510.02294)) and F2LLM-v2
([arXiv 2603.19223](https://arxiv.org/abs/2603.19223)).

{facts.width} dimensions, at most {facts.max_seq_length} tokens, cosine similarity, {pooled}.
The tokenizer appends the EOS itself; do not append another."""


def _training(facts: Facts) -> str:
    """Hyper-parameters and data."""
    settings = [[in_cell(key), in_cell(value)] for key, value in facts.training.items()]
    datasets = table(["dataset", "task", "training tuples"], _dataset_rows(facts.datasets, facts.tasks))
    return f"## Training\n\n{table(['', ''], settings)}\n\n{datasets}"


def _dataset_rows(datasets: dict[str, int], tasks: dict[str, str]) -> list[list[str]]:
    """Cells of the training tuples: every dataset, or the largest ones and what the others have together."""
    shown = list(datasets.items())
    if len(shown) > _DATASETS_SHOWN:
        shown = sorted(shown, key=lambda item: (-item[1], item[0]))[:_DATASETS_SHOWN]
    rows = [[in_cell(name), in_cell(tasks.get(name, "")), f"{count:,}"] for name, count in shown]
    others = len(datasets) - len(shown)
    if others:
        rest = sum(datasets.values()) - sum(count for _, count in shown)
        rows.append([f"and {plural(others, 'other dataset')}", "", f"{rest:,}"])
    return rows


def _licence(license: str | None) -> str:
    declared = license or "None was declared when this folder was saved."
    return f"## Licence\n\n{declared}"
