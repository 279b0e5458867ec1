"""What tests train on: a tokenizer with Qwen's special tokens, tiny random decoders, and a little made-up data.

Imported by tests only; everything is seeded, nothing is downloaded.
"""

import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import AutoModel, AutoTokenizer, Qwen3Config

from modeling.qwen_bpe import train_tokenizer
from modeling.versions import in_dtype

SUBJECTS = ("river", "castle", "engine", "poem", "planet", "market", "violin", "garden", "bridge", "island")
FACTS = ("is old", "was sold", "looks blue", "needs repair", "became famous", "stands empty", "costs little")


def sentence(rng: random.Random, subject: str, words: int) -> str:
    """A sentence about `subject`, of about `words` words."""
    rest = " ".join(rng.choice(SUBJECTS + FACTS) for _ in range(max(1, words // 2)))
    return f"The {subject} number {rng.randrange(10**6)} {rng.choice(FACTS)} and {rest}."


def make_tokenizer(folder: Path, vocab_size: int = 512):
    """A tokenizer as Qwen's, trained on 400 of the sentences above; adds no EOS by itself."""
    rng = random.Random(0)
    texts = [sentence(rng, rng.choice(SUBJECTS), 12) for _ in range(400)]
    train_tokenizer(texts, vocab_size).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def config(hidden_size: int = 32, layers: int = 2, vocab_size: int = 512) -> Qwen3Config:
    """A Qwen3 of a few thousand weights, with grouped-query attention as the real ones have."""
    return Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=1024,
        initializer_range=0.2,  # large, so that attention and gradients are far from zero
    )


def make_backbone(folder: Path, hidden_size: int = 32, seed: int = 0, layers: int = 2) -> Path:
    """A backbone folder: random weights from a seed, and the toy tokenizer."""
    torch.manual_seed(seed)
    model = AutoModel.from_config(config(hidden_size, layers), **in_dtype(torch.float32))
    model.save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def raw_rows(rows: int, negatives: int, seed: int = 0, words: int = 8) -> list[dict[str, str]]:
    """Tuples in the published layout: query and positive speak of one subject, each negative of another."""
    rng = random.Random(seed)
    table = []
    for _ in range(rows):
        subject = rng.choice(SUBJECTS)
        others = [other for other in SUBJECTS if other != subject]
        row = {
            "query": f"Instruct: Find it.\nQuery: {sentence(rng, subject, 3)}",
            "passage": sentence(rng, subject, words),
        }
        row |= {
            f"negative_{k + 1}": sentence(rng, rng.choice(others), rng.randrange(2, 3 * words))
            for k in range(negatives)
        }
        table.append(row)
    return table


def write_parquet(path: Path, rows: list[dict]) -> Path:
    """Rows as a Parquet file; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_raw(folder: Path, rows: int = 200) -> Path:
    """Three raw datasets, one of each task, and their declaration: `rows` for retrieval, 30 for each other."""
    write_parquet(folder / "toy_retrieval.parquet", raw_rows(rows, 24, seed=1))
    write_parquet(folder / "toy_clustering.parquet", raw_rows(30, 24, seed=2))
    labels = ("It is about nature.", "It is about people.")
    rng = random.Random(3)
    two_way = []
    for _ in range(30):
        label = rng.randrange(2)
        query = f"Instruct: Classify it.\nQuery: {sentence(rng, SUBJECTS[label], 6)}"
        two_way.append({"query": query, "passage": labels[label], "negative_1": labels[1 - label]})
    write_parquet(folder / "toy_classification.parquet", two_way)
    tasks = {f"toy_{task}": task for task in ("retrieval", "clustering", "classification")}
    (folder / "tasks.json").write_text(json.dumps(tasks))
    return folder


def write_gappy(folder: Path, rows: dict[str, int], negatives: int = 4) -> Path:
    """Raw datasets of so many tuples each, by name, in which tuple i has i mod (negatives + 1) negatives.

    The one called clustering is declared clustering, all others retrieval.
    """
    for name, count in rows.items():
        table = raw_rows(count, negatives, seed=count)
        for i, row in enumerate(table):
            row |= {f"negative_{k}": None for k in range(1 + i % (negatives + 1), negatives + 1)}
        write_parquet(folder / f"{name}.parquet", table)
    tasks = {name: "clustering" if name == "clustering" else "retrieval" for name in rows}
    (folder / "tasks.json").write_text(json.dumps(tasks))
    return folder


def write_many(folder: Path, datasets: int) -> Path:
    """Raw datasets set_00, set_01, ... of 3, 4, ... tuples, all of one task: too many for a line about each."""
    for number in range(datasets):
        write_parquet(folder / f"set_{number:02}.parquet", raw_rows(3 + number, 1, seed=number))
    (folder / "tasks.json").write_text(json.dumps({f"set_{number:02}": "retrieval" for number in range(datasets)}))
    return folder


def write_retrieval_set(folder: Path, queries: int = 20, documents: int = 60, seed: int = 0) -> Path:
    """A retrieval set in BEIR's layout: a document answers a query of its subject, better the sooner it was written."""
    rng = random.Random(seed)
    (folder / "qrels").mkdir(parents=True)
    subjects = [rng.choice(SUBJECTS) for _ in range(documents)]
    with open(folder / "corpus.jsonl", "w") as file:
        for number, subject in enumerate(subjects):
            row = {"_id": f"d{number}", "title": subject, "text": sentence(rng, subject, rng.randrange(2, 16))}
            file.write(json.dumps(row) + "\n")
    lines = ["query-id\tcorpus-id\tscore"]
    with open(folder / "queries.jsonl", "w") as file:
        for number in range(queries):
            subject = SUBJECTS[number % len(SUBJECTS)]
            file.write(json.dumps({"_id": f"q{number}", "text": sentence(rng, subject, 3)}) + "\n")
            answers = [place for place, own in enumerate(subjects) if own == subject][:6]
            lines += [f"q{number}\td{place}\t{1 + (place < documents // 2)}" for place in answers]
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n")
    return folder
