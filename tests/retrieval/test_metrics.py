"""Metrics of rankings, against trec_eval's own code and against paper.

python -m pytest tests/retrieval/test_metrics.py
"""

import math

import numpy as np
import pytest

from retrieval.metrics import DEPTH, METRICS, by_query, evaluate, score
from retrieval.search import search

TREC = {  # ours -> trec_eval's, on the first DEPTH of a ranking; MRR@10 on the first ten
    "nDCG@10": "ndcg_cut_10",
    "recall@10": "recall_10",
    "recall@100": "recall_100",
    "MAP@100": "map_cut_100",
}


def trec_eval(run: dict, judgements: dict) -> dict[str, dict[str, float]]:
    """Query -> metric -> value, by pytrec_eval."""
    pytrec_eval = pytest.importorskip("pytrec_eval")
    found = pytrec_eval.RelevanceEvaluator(judgements, {*TREC.values(), "map"}).evaluate(run)
    first_ten = {}
    for query, scores in run.items():
        best = sorted(scores, key=lambda document: (scores[document], document), reverse=True)[:10]
        first_ten[query] = {document: scores[document] for document in best}
    ranks = pytrec_eval.RelevanceEvaluator(judgements, {"recip_rank"}).evaluate(first_ten)
    return {query: values | {"MRR@10": ranks[query]["recip_rank"]} for query, values in found.items()}


def random_search(rng: np.random.Generator, documents: int) -> tuple[np.ndarray, np.ndarray, list[str], list[dict]]:
    """Vectors of few values, so that many scores are equal; ids in descending order; graded judgements, some below 0.

    The last query has no relevant document, and the one before it has more than the ideal ranking can show.
    """
    queries = rng.integers(-1, 2, (12, 4)).astype(np.float32)
    passages = rng.integers(-1, 2, (documents, 4)).astype(np.float32)
    ids = sorted((f"d{number}" for number in rng.choice(10_000, documents, replace=False)), reverse=True)
    relevance = []
    for _ in queries:
        judged = rng.choice(documents, rng.integers(1, min(documents, 30) + 1), replace=False)
        relevance.append({int(number): int(rng.integers(-1, 4)) for number in judged})
    relevance[-1] = {0: 0, 1: -1}
    relevance[-2] = {number: 1 + number % 3 for number in range(documents)}
    return queries, passages, ids, relevance


@pytest.mark.parametrize("documents", [300, 120, 7])
def test_every_metric_is_that_of_trec_eval_with_graded_scores_and_ties(documents):
    """Documents are numbered by descending id, so that our rule for ties, the lower number, is trec_eval's."""
    queries, passages, ids, relevance = random_search(np.random.default_rng(documents), documents)
    found = search(queries, passages, DEPTH)
    scores = queries @ passages.T
    tied = np.sort(scores, axis=1)[:, -10:]
    assert (np.diff(tied) == 0).any(axis=1).mean() > 0.5
    run, judgements = {}, {}
    for query in range(len(queries)):
        # trec_eval gets all scores; of MAP and recall it looks at the first DEPTH by itself
        run[f"q{query}"] = {ids[number]: float(scores[query, number]) for number in range(documents)}
        judgements[f"q{query}"] = {ids[number]: score for number, score in relevance[query].items()}
    expected = trec_eval(run, judgements)
    ours = by_query(found.passages, relevance)
    assert set(ours) == set(METRICS) == {*TREC, "MRR@10"}
    for name, values in ours.items():
        theirs = [expected[f"q{query}"][TREC.get(name, name)] for query in range(len(queries))]
        np.testing.assert_allclose(values, theirs, rtol=1e-12, atol=0)
        assert 0 < np.mean(theirs) < 1
    assert all(values[-1] == 0 for values in ours.values())  # nothing is relevant to the last query
    if documents <= DEPTH:
        whole = [expected[f"q{query}"]["map"] for query in range(len(queries))]
        np.testing.assert_allclose(ours["MAP@100"], whole, rtol=1e-12)


def test_metrics_by_hand():
    # Query 0: scores 3 and 1, found second and fourth. Query 1: one relevant document, found eleventh.
    ranking = np.array([[5, 0, 6, 1, *range(7, 15)], [*range(10), 30, 31]])
    relevance = [{0: 3, 1: 1, 5: 0}, {30: 2, 3: -1}]
    dcg = 3 / math.log2(3) + 1 / math.log2(5)
    ideal = 3 + 1 / math.log2(3)
    assert evaluate(ranking, relevance) == {
        "nDCG@10": pytest.approx(dcg / ideal / 2),
        "MRR@10": pytest.approx(1 / 2 / 2),
        "recall@10": pytest.approx(1 / 2),
        "recall@100": pytest.approx(1.0),
        "MAP@100": pytest.approx(((1 / 2 + 2 / 4) / 2 + 1 / 11) / 2),
    }


def test_one_right_answer_by_hand():
    # Query 0 finds its passage first, query 1 third, query 2 not among the best ten.
    ranking = np.array([[0, *range(20, 29)], [7, 8, 1, *range(20, 27)], [*range(20, 30)]])
    assert score(ranking) == {
        "nDCG@10": pytest.approx((1 + 1 / math.log2(4)) / 3),
        "MRR@10": pytest.approx((1 + 1 / 3) / 3),
        "recall@10": pytest.approx(2 / 3),
    }


def test_only_the_first_ten_of_a_ranking_count():
    ranking = np.array([[*range(20, 30), 0, 30]])
    assert score(ranking) == {"nDCG@10": 0.0, "MRR@10": 0.0, "recall@10": 0.0}
