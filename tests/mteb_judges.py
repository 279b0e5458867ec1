"""Other people's figures for a task folder: Sentence Transformers' evaluators, scikit-learn by hand, pytrec_eval.

Each function takes a model of Sentence Transformers and the folder of a task, and gives what mteb must give, by mteb's
names of metrics. None of them reads a folder by way of the project. Imported by tests only.
"""

import json
import random
from pathlib import Path

import numpy as np
import pytrec_eval
from sentence_transformers import SentenceTransformer
from sentence_transformers.evaluation import (  # its name in 5.0 as well as in 6
    BinaryClassificationEvaluator,
    EmbeddingSimilarityEvaluator,
    InformationRetrievalEvaluator,
    TranslationEvaluator,
)
from sklearn.cluster import MiniBatchKMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score, v_measure_score

from retrieval import beir, metrics
from retrieval.search import search

SEED = 42  # mteb's


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def column(rows: list[dict], name: str) -> list:
    return [row[name] for row in rows]


class Prompted:
    """A model whose every text has a prompt before it: evaluators that know no prompts see a plain model."""

    def __init__(self, model: SentenceTransformer, prompt: str):
        self.model = model
        self.prompt = prompt
        self.similarity_fn_name = "cosine"
        self.model_card_data = model.model_card_data

    def encode(self, texts, **options):
        return self.model.encode(texts, **{**options, "prompt": self.prompt, "prompt_name": None})

    def __getattr__(self, name):
        return getattr(self.model, name)


def judgements(folder: Path) -> dict[str, dict[str, int]]:
    lines = (folder / "qrels" / "test.tsv").read_text().splitlines()[1:]
    found = {}
    for query, document, score in (line.split("\t") for line in lines):
        found.setdefault(query, {})[document] = int(score)
    return found


def retrieval(model: SentenceTransformer, folder: Path, prompt: str) -> dict[str, float]:
    queries = {row["_id"]: row["text"] for row in rows_of(folder / "queries.jsonl")}
    corpus = {row["_id"]: f"{row['title']} {row['text']}".strip() for row in rows_of(folder / "corpus.jsonl")}
    relevant = {query: set(documents) for query, documents in judgements(folder).items()}
    evaluator = InformationRetrievalEvaluator(
        queries, corpus, relevant, precision_recall_at_k=[10, 100], query_prompt=prompt, write_csv=False
    )
    found = evaluator(model)
    wanted = {"ndcg_at_10": "ndcg@10", "mrr_at_10": "mrr@10", "map_at_100": "map@100", "recall_at_100": "recall@100"}
    return {name: found[f"cosine_{theirs}"] for name, theirs in wanted.items()}


def retrieval_by_trec(model: SentenceTransformer, folder: Path, prompt: str) -> dict[str, float]:
    queries = rows_of(folder / "queries.jsonl")
    corpus = rows_of(folder / "corpus.jsonl")
    scores = (
        model.encode(column(queries, "text"), prompt=prompt)
        @ model.encode([f"{row['title']} {row['text']}".strip() for row in corpus]).T
    )
    run = {}
    for query, row in zip(queries, scores.tolist(), strict=True):
        run[query["_id"]] = dict(zip(column(corpus, "_id"), row, strict=True))
    found = pytrec_eval.RelevanceEvaluator(judgements(folder), {"ndcg_cut.10", "map_cut.100", "recall.100"}).evaluate(
        run
    )
    names = {"ndcg_at_10": "ndcg_cut_10", "map_at_100": "map_cut_100", "recall_at_100": "recall_100"}
    return {name: float(np.mean([of[theirs] for of in found.values()])) for name, theirs in names.items()}


def retrieval_by_ours(model: SentenceTransformer, folder: Path, prompt: str) -> dict[str, float]:
    one = beir.read_set(folder)
    found = search(model.encode(one.queries, prompt=prompt), model.encode(one.documents[:]), k=100)
    names = {"nDCG@10": "ndcg_at_10", "MRR@10": "mrr_at_10", "MAP@100": "map_at_100", "recall@100": "recall_at_100"}
    return {
        names[name]: value for name, value in metrics.evaluate(found.passages, one.relevance).items() if name in names
    }


def pair_classification(model: SentenceTransformer, folder: Path, prompt: str) -> dict[str, float]:
    rows = rows_of(folder / "test.jsonl")
    columns = [column(rows, name) for name in ("sentence1", "sentence2", "label")]
    found = BinaryClassificationEvaluator(*columns, write_csv=False)(Prompted(model, prompt))
    names = ("ap", "accuracy")  # not f1: the two programs try different thresholds
    return {f"cosine_{name}": found[f"cosine_{name}"] for name in names}


def sts(model: SentenceTransformer, folder: Path, prompt: str) -> dict[str, float]:
    rows = rows_of(folder / "test.jsonl")
    columns = [column(rows, name) for name in ("sentence1", "sentence2", "score")]
    found = EmbeddingSimilarityEvaluator(*columns, write_csv=False)(Prompted(model, prompt))
    return {"cosine_spearman": found["spearman_cosine"], "cosine_pearson": found["pearson_cosine"]}


def bitext(model: SentenceTransformer, folder: Path, prompt: str) -> dict[str, float]:
    rows = rows_of(folder / "test.jsonl")
    columns = [column(rows, name) for name in ("sentence1", "sentence2")]
    found = TranslationEvaluator(*columns, write_csv=False)(Prompted(model, prompt))
    return {"accuracy": found["src2trg_accuracy"]}


def classification(model: SentenceTransformer, folder: Path, prompt: str) -> dict[str, float]:
    """Ten logistic regressions, each of eight rows of every class, drawn as mteb draws them."""
    train = rows_of(folder / "train.jsonl")
    test = rows_of(folder / "test.jsonl")
    seen = model.encode(column(train, "text"), prompt=prompt)
    unseen = model.encode(column(test, "text"), prompt=prompt)
    order = list(range(len(train)))
    scores = []
    for _ in range(10):
        np.random.RandomState(SEED).shuffle(order)
        chosen = []
        for number in order:
            of_label = [other for other in chosen if train[other]["label"] == train[number]["label"]]
            if len(of_label) < 8:
                chosen.append(number)
        classifier = LogisticRegression(max_iter=100, random_state=SEED)
        classifier.fit(seen[chosen], [train[number]["label"] for number in chosen])
        predicted = classifier.predict(unseen)
        truth = column(test, "label")
        scores.append((accuracy_score(truth, predicted), f1_score(truth, predicted, average="macro")))
    return dict(zip(("accuracy", "f1"), np.mean(scores, axis=0).tolist(), strict=True))


def clustering(model: SentenceTransformer, folder: Path, prompt: str) -> dict[str, float]:
    """Ten times k-means of texts drawn with replacement."""
    rows = rows_of(folder / "test.jsonl")
    vectors = model.encode(column(rows, "text"), prompt=prompt)
    labels = np.array(column(rows, "label"))
    rng = random.Random(SEED)
    means = MiniBatchKMeans(len(set(labels)), batch_size=512, init="k-means++", n_init=1, random_state=SEED)
    scores = []
    for _ in range(10):
        drawn = rng.choices(range(len(rows)), k=min(2048, len(rows)))
        scores.append(v_measure_score(labels[drawn], means.fit_predict(vectors[drawn])))
    return {"v_measure": float(np.mean(scores))}


OF_KIND = {
    "retrieval": (retrieval, retrieval_by_trec, retrieval_by_ours),
    "classification": (classification,),
    "clustering": (clustering,),
    "pair_classification": (pair_classification,),
    "bitext": (bitext,),
    "sts": (sts,),
}


def compare(model: SentenceTransformer, root: Path, results: dict, prompts: dict[str, str]) -> int:
    """Assert that the judges' figures of every task are those of mteb to 1e-6; returns how many were compared.

    mteb rounds the figures of a search to five decimals; of these the judges must also agree with each other to 1e-6.

    Args:
        results: task -> metric -> value.
        prompts: task -> what stands before its queries, or before both sides.
    """
    compared = 0
    for task, scores in results.items():
        kind = json.loads((root / task / "task.json").read_text())["type"]
        tolerance = 5.5e-6 if kind == "retrieval" else 1e-6
        first = {}
        for judge in OF_KIND[kind]:
            for metric, value in judge(model, root / task, prompts[task]).items():
                said = f"{task}, {judge.__name__}, {metric}: {scores[metric]} is not {value}"
                assert abs(scores[metric] - value) <= tolerance, said
                assert abs(first.setdefault(metric, value) - value) <= 1e-6, said
                compared += 1
    return compared
